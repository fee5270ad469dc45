"""Dense MLA decode beside torch and OpenBLAS, in one process on the same data.

    python3 bench/compare_torch.py --preset bench/presets/cpu-house.json --json compare.json

Contenders, all on the shapes of a preset of `flash-mla bench`:

  flash_mla       this library through its Python package: paged cache, permuted block table
  torch_matmul    torch fp32 matmul on the two products S = Q K^T and O = S V, per request
  openblas_sgemm  the same two products through OpenBLAS, where there is one
  sdpa_fp32       torch's scaled_dot_product_attention on the gathered cache; the heads are the query rows
  sdpa_bf16       over the one latent head
  sdpa_*_v576     the same with V as wide as K (576), for which torch has a fused kernel and for 512 none

The products leave out softmax, paging and conversion; gathering the cache is never counted; the attention of
torch gets no causal mask (a mask only costs it time). GFLOP/s = 2 * h_q * s_q * sum(s_k) * (576 + 512) / t for
all of them. Caches are warm: repetitions follow each other. The contenders take turns in rounds, with a pause
between them in which spinning worker threads fall asleep.
"""

import argparse
import ctypes
import datetime
import json
import os
import pathlib
import resource
import shlex
import statistics
import sys
import time

# OpenBLAS reads these when it is loaded. Pinned kernels would make it a weaker opponent than the machine allows.
for variable in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(variable, None)

import torch  # noqa: E402
from provenance import commit, machine_with_torch  # noqa: E402

D_QK, D_V = 576, 512
SETTLE_SECONDS = 0.06
ROUNDS = 3
DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
          "fp32": torch.float32, "float32": torch.float32}
DEFAULT_SHAPE = {"b": 4, "s_q": 1, "h_q": 128, "h_kv": 1, "s_k": 4096, "varlen": False, "causal": False,
                 "dtype": "bf16", "page_size": 64}
# Largest difference from torch's fp32 attention, per dtype of ours: rounding of the output and of the weights.
SANITY = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 2e-5}


class OpenBlas:
    """cblas_sgemm on torch tensors."""

    def __init__(self, path):
        self.library = ctypes.CDLL(path)
        self.library.openblas_get_config.restype = ctypes.c_char_p
        self.library.openblas_get_corename.restype = ctypes.c_char_p
        integer, real, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
        self.library.cblas_sgemm.argtypes = [integer] * 6 + [real, pointer, integer, pointer, integer, real, pointer,
                                                             integer]
        self.library.cblas_sgemm.restype = None

    def description(self):
        return f"{self.library.openblas_get_config().decode()}, {self.library.openblas_get_corename().decode()} kernels"

    def set_num_threads(self, count):
        self.library.openblas_set_num_threads(count)

    def matmul(self, a, b, out, transpose_b=False):
        """out = a @ b, or a @ b.T; all row-major, b with any row stride."""
        row_major, plain, transposed = 101, 111, 112
        m, k = a.shape
        n = out.shape[1]
        self.library.cblas_sgemm(row_major, plain, transposed if transpose_b else plain, m, n, k, 1.0, a.data_ptr(),
                                 a.stride(0), b.data_ptr(), b.stride(0), 0.0, out.data_ptr(), out.stride(0))


def load_openblas(path):
    for name in [path] if path else ["libopenblas.so.0", "libopenblas.so"]:
        try:
            return OpenBlas(name)
        except (OSError, AttributeError) as error:
            if path:
                sys.exit(f"--blas: {error}")
    return None


def set_openmp_threads(count):
    """For the calling thread, in every OpenMP runtime of this process: torch brings its own, we use the system's."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        paths = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    for path in paths:
        ctypes.CDLL(path).omp_set_num_threads(count)


def lengths_of(shape, generator):
    if not shape["varlen"]:
        return [shape["s_k"]] * shape["b"]
    drawn = shape["s_k"] * (1 + 0.5 * torch.randn(shape["b"], generator=generator))
    return drawn.round().clamp(1, 2 * shape["s_k"]).int().tolist()


def random_values(size, dtype, generator):
    return (torch.randn(size, generator=generator) / 10).clamp(-1, 1).to(dtype)


class Problem:
    """q, the paged cache with a permuted block table, and each request's keys gathered."""

    def __init__(self, shape, seed):
        generator = torch.Generator().manual_seed(seed)
        self.shape = shape
        self.dtype = DTYPES[shape["dtype"]]
        self.lengths = lengths_of(shape, generator)
        b, page, h_kv = shape["b"], shape["page_size"], shape["h_kv"]
        blocks = [-(-length // page) for length in self.lengths]
        self.q = random_values((b, shape["s_q"], shape["h_q"], D_QK), self.dtype, generator)
        self.k_cache = random_values((sum(blocks), page, h_kv, D_QK), self.dtype, generator)
        order = torch.randperm(sum(blocks), generator=generator).int()
        self.block_table = torch.full((b, max(blocks)), -1, dtype=torch.int32)
        for request, part in enumerate(order.split(blocks)):
            self.block_table[request, : len(part)] = part
        self.cache_seqlens = torch.tensor(self.lengths, dtype=torch.int32)

    def flop(self):
        return 2 * self.shape["h_q"] * self.shape["s_q"] * sum(self.lengths) * (D_QK + D_V)

    def keys(self, request, dtype):
        """(h_kv, length, 576)"""
        length = self.lengths[request]
        pages = self.block_table[request, : -(-length // self.shape["page_size"])].long()
        keys = self.k_cache[pages].flatten(0, 1)[:length]
        return keys.to(dtype).transpose(0, 1).contiguous()

    def queries(self, request, dtype):
        """(h_kv, rows, 576), rows = query tokens times the heads that share a latent head."""
        h_kv = self.shape["h_kv"]
        q = self.q[request].to(dtype).reshape(self.shape["s_q"], h_kv, -1, D_QK)
        return q.transpose(0, 1).flatten(1, 2).contiguous()


def ours(problem, causal):
    from flash_mla_kernels import flash_mla_with_kvcache, get_mla_decoding_metadata

    shape = problem.shape
    rows = shape["s_q"] * shape["h_q"] // shape["h_kv"]
    metadata, num_splits = get_mla_decoding_metadata(problem.cache_seqlens, rows, shape["h_kv"])
    return lambda: flash_mla_with_kvcache(problem.q, problem.k_cache, problem.block_table, problem.cache_seqlens, D_V,
                                          metadata, num_splits, causal=causal)


def products(problem, matmul):
    """Runs S = Q K^T and O = S V for every request and latent head through matmul(a, b, out, transpose_b)."""
    work = []
    for request, length in enumerate(problem.lengths):
        q, k = problem.queries(request, torch.float32), problem.keys(request, torch.float32)
        work += [(q[head], k[head], torch.empty(q.shape[1], length), torch.empty(q.shape[1], D_V))
                 for head in range(q.shape[0])]

    def run():
        for q, k, scores, out in work:
            matmul(q, k, scores, True)
            matmul(scores, k[:, :D_V], out, False)

    return run


def torch_matmul(a, b, out, transpose_b):
    torch.matmul(a, b.T if transpose_b else b, out=out)


def attention(problem, dtype, value_width):
    """One batched call when all requests are of one length, else a call per request."""
    pairs = [(problem.queries(r, dtype), problem.keys(r, dtype)) for r in range(len(problem.lengths))]
    if len(set(problem.lengths)) == 1:
        pairs = [(torch.stack([q for q, _ in pairs]), torch.stack([k for _, k in pairs]))]
    else:
        pairs = [(q[None], k[None]) for q, k in pairs]
    work = [(q, k, k if value_width == D_QK else k[..., :value_width].contiguous()) for q, k in pairs]

    def run():
        return [torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=D_QK**-0.5) for q, k, v in work]

    return run


def difference(problem, call):
    """Largest difference of our output from torch's fp32 attention, without a mask."""
    shape = problem.shape
    out = call()[0]
    out = torch.as_tensor(out).float().reshape(shape["b"], shape["s_q"], shape["h_kv"], -1, D_V)
    expected = torch.cat([part for part in attention(problem, torch.float32, D_V)()])
    return (out.transpose(1, 2).flatten(2, 3) - expected).abs().max().item()


def time_in_rounds(calls, reps, min_seconds):
    """Median seconds of each call; the calls take turns."""
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            time.sleep(SETTLE_SECONDS)
            call()
            spent, count = 0.0, 0
            while count < -(-reps // ROUNDS) or spent < min_seconds / ROUNDS:
                start = time.perf_counter()
                call()
                seconds = time.perf_counter() - start
                times[name].append(seconds)
                spent, count = spent + seconds, count + 1
    return {name: statistics.median(values) for name, values in times.items()}


def reset_peak_rss():
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass  # the figure then is the peak since the process started


def peak_rss_bytes():
    for line in pathlib.Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(shape, threads, blas, arguments):
    problem = Problem(shape, arguments.seed)
    call = ours(problem, shape["causal"])
    error = difference(problem, ours(problem, False))
    if not error <= SANITY[problem.dtype]:
        sys.exit(f"{shape['name']}: flash_mla differs from torch's attention by {error:.2e}, "
                 f"expected at most {SANITY[problem.dtype]:.0e}")
    reset_peak_rss()
    call()
    peak = peak_rss_bytes()
    calls = {"flash_mla": call, "torch_matmul": products(problem, torch_matmul)}
    if blas:
        calls["openblas_sgemm"] = products(problem, blas.matmul)
    for name, dtype in (("sdpa_fp32", torch.float32), ("sdpa_bf16", torch.bfloat16)):
        calls[name] = attention(problem, dtype, D_V)
        calls[f"{name}_v576"] = attention(problem, dtype, D_QK)
    seconds = time_in_rounds(calls, arguments.reps, arguments.min_time)
    best_gemm = min(seconds[name] for name in ("torch_matmul", "openblas_sgemm") if name in seconds)
    best_sdpa = min(value for name, value in seconds.items() if name.startswith("sdpa"))
    mine = seconds["flash_mla"]
    return {**shape, "tokens": sum(problem.lengths), "threads": threads, "cache": "warm",
            "ms": mine * 1e3, "gflops": problem.flop() / mine / 1e9,
            "contenders": {name: {"ms": value * 1e3, "gflops": problem.flop() / value / 1e9}
                           for name, value in seconds.items()},
            "ratio_sgemm": best_gemm / mine, "ratio_sdpa": best_sdpa / mine, "max_difference": error,
            "peak_rss_bytes": peak}


def read_preset(path):
    try:
        preset = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"--preset {path}: {error}")
    shapes = [{**DEFAULT_SHAPE, **shape} for shape in preset["shapes"]]
    for shape in shapes:
        shape.setdefault("name", f"b{shape['b']} h{shape['h_q']} s{shape['s_k']} {shape['dtype']}")
        if shape["dtype"] not in DTYPES:
            sys.exit(f"--preset {path}: dtype is {shape['dtype']!r}, expected one of {', '.join(DTYPES)}")
    return shapes, preset.get("threads", [len(os.sched_getaffinity(0))])


def print_table(rows):
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    header = ["shape", "threads", *names, "/ best gemm", "/ best sdpa", "peak RSS"]
    table = [header] + [
        [row["name"], str(row["threads"]), *(f"{row['contenders'][name]['gflops']:.1f}" for name in names),
         f"{row['ratio_sgemm']:.2f}", f"{row['ratio_sdpa']:.2f}", f"{row['peak_rss_bytes'] / 2**20:.0f} MiB"]
        for row in rows]
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    print("\nGFLOP/s")
    for line in table:
        print("  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]))


def speedups(rows):
    """Ours: the most threads over one thread, per shape that was measured with both."""
    found = []
    for one in (row for row in rows if row["threads"] == 1):
        others = [row for row in rows if row["name"] == one["name"] and row["threads"] > 1]
        found += [{"name": one["name"], "threads": row["threads"], "speedup": one["ms"] / row["ms"]} for row in others]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = pathlib.Path(__file__).resolve().parent
    parser.add_argument("--preset", type=pathlib.Path, default=here / "presets" / "cpu-house.json")
    parser.add_argument("--only", help="measure only these shapes of the preset: names, separated by commas")
    parser.add_argument("--threads", help="thread counts, separated by commas; default: the preset's")
    parser.add_argument("--reps", type=int, default=9, help="repetitions, at least; the median counts")
    parser.add_argument("--min-time", type=float, default=0.5, help="seconds of repetitions, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blas", help="OpenBLAS library instead of the system's")
    parser.add_argument("--json", type=pathlib.Path, help="write the results to this file")
    arguments = parser.parse_args()

    shapes, threads = read_preset(arguments.preset)
    if arguments.only:
        wanted = arguments.only.split(",")
        unknown = sorted(set(wanted) - {shape["name"] for shape in shapes})
        if unknown:
            parser.error(f"--only names {', '.join(unknown)}, expected some of: "
                         f"{', '.join(shape['name'] for shape in shapes)}")
        shapes = [shape for shape in shapes if shape["name"] in wanted]
    if arguments.threads:
        try:
            threads = [int(word) for word in arguments.threads.split(",")]
        except ValueError:
            parser.error(f"--threads is {arguments.threads!r}, expected integers separated by commas")
        if min(threads) < 1:
            parser.error(f"--threads is {arguments.threads!r}, expected integers of at least 1")
    try:
        import flash_mla_kernels  # noqa: F401
    except ImportError as error:
        sys.exit(f"the Python package flash_mla_kernels is not installed here ({error}); pip install . first")
    blas = load_openblas(arguments.blas)

    rows = []
    for count in threads:
        torch.set_num_threads(count)
        set_openmp_threads(count)
        if blas:
            blas.set_num_threads(count)
        for shape in shapes:
            print(f"{len(rows) + 1} of {len(shapes) * len(threads)}: {shape['name']}, {count} thread(s)",
                  file=sys.stderr)
            rows.append(measure(shape, count, blas, arguments))
    print_table(rows)
    found = speedups(rows)
    for entry in found:
        print(f"{entry['name']}: {entry['threads']} threads are {entry['speedup']:.2f} times as fast as one")
    print(f"sgemm: {blas.description() if blas else 'no OpenBLAS found'}")
    if arguments.json:
        report = {"machine": machine_with_torch(), "commit": commit(), "command": shlex.join(["compare_torch.py", *sys.argv[1:]]),
                  "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                  "seed": arguments.seed, "blas": blas.description() if blas else None, "rows": rows,
                  "speedups": found}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {arguments.json}")


if __name__ == "__main__":
    main()
