#!/usr/bin/env python3
"""Makes the tables of the documentation from the benchmark's results, so that neither can drift from the other.

    python3 bench/readme_table.py            rewrites the blocks
    python3 bench/readme_table.py --check    says which blocks differ from what the results say; exit code 1 if any do

A block stands between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->`; it is empty where there are no results. They are
bench/results/h200-dense-decode.json, written by `flash-mla bench --preset h200-dense --json FILE`, and
bench/results/h200-sparse.json, of `--preset h200-sparse`, and those that shelf_table.py names.
"""

import argparse
import json
import math
import pathlib
import re
import sys
import textwrap

import shelf_table

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = "bench/results/h200-dense-decode.json"
SPARSE_RESULTS = "bench/results/h200-sparse.json"

# (b, s_q, h_q, s_k) of the rows that README shows, all of equal lengths and without a causal mask.
README_ROWS = [
    (1, 1, 16, 4096),
    (1, 1, 128, 4096),
    (16, 1, 128, 4096),
    (128, 1, 16, 8192),
    (128, 1, 64, 8192),
    (128, 1, 128, 4096),
    (128, 1, 128, 32768),
    (128, 2, 128, 16384),
]


def geometric_mean(rows, key):
    return math.exp(sum(math.log(r["ms"] / r[key]) for r in rows) / len(rows))


def paragraph(*sentences):
    return textwrap.wrap(" ".join(sentences), width=120, break_long_words=False, break_on_hyphens=False)


def short_commit(commit):
    return re.sub(r"^([0-9a-f]{9})[0-9a-f]*", r"\1", commit)


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def readme(results):
    rows = results["rows"]
    plain = {(r["b"], r["s_q"], r["h_q"], r["s_k"]): r for r in rows if not r["varlen"] and not r["causal"]}
    cells = []
    for key in README_ROWS:
        r = plain[key]
        cells.append(
            [str(x) for x in key]
            + [
                f"{1e3 * r['ms']:.0f}",
                f"{1e3 * r['best_ms']:.0f}",
                f"{r['best_ms'] / r['ms']:.2f}x",
                f"{r['gflops'] / 1e3:.0f}",
                f"{r['gbps'] / 1e3:.2f}",
            ]
        )
    return [
        *paragraph(
            "Dense decode on an H200, BF16, against the fastest of FlashMLA, FlashInfer and FlashAttention-3 for each shape",
            f"(geometric mean over {len(rows)} shapes: {1 / geometric_mean(rows, 'best_ms'):.2f}x; [all of them, and what",
            "is open](docs/kernels/dense-decode-sm90.md)):",
        ),
        "",
        *table(["batch", "s_q", "heads", "s_k", "µs", "best peer, µs", "", "TFLOP/s", "TB/s"], cells),
    ]


def limits(results):
    """One sentence on the ceilings of the same process, where they were measured."""
    ceilings = results.get("limits")
    if not ceilings:
        return []
    text = f"In the same process a read stream reached {ceilings['read_gbps']:.0f} GB/s"
    if ceilings["matmul_gflops"]:
        text += f" and a matrix product of 8192³ {ceilings['matmul_gflops'] / 1e3:.0f} TFLOP/s, timed alike"
        text += f" ({ceilings['matmul_graph_gflops'] / 1e3:.0f} when 20 follow each other)"
    return [text + "."]


def kernel_page(results):
    rows, machine = results["rows"], results["machine"]
    over = [r["ms"] / r["best_ms"] for r in rows if r["ms"] > r["best_ms"]]
    wrong = sum(not r["correct"] for r in rows)
    cells = [
        [
            *(str(r[key]) for key in ("b", "s_q", "h_q", "s_k")),
            "yes" if r["varlen"] else "",
            "yes" if r["causal"] else "",
            f"{1e3 * r['ms']:.1f}",
            f"{1e3 * r['best_ms']:.1f}",
            f"{r['ms'] / r['best_ms']:.2f}",
            f"{r['ms'] / r['floor_ms']:.2f}",
            f"{r['gflops'] / 1e3:.0f}",
            f"{r['gbps']:.0f}",
        ]
        for r in rows
    ]
    slower = f"{len(over)} of {len(rows)} are slower than best"
    slower += f", by at most {100 * (max(over) - 1):.0f}%." if over else "."
    return [
        *paragraph(
            f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, commit {short_commit(results['commit'])},",
            f"`{RESULTS}` (`{results['command']}`). {len(rows) - wrong} of {len(rows)} shapes passed the check in the same",
            "process.",
            *limits(results),
        ),
        "",
        *table(
            "b,s_q,h_q,s_k,varlen,causal,µs,best µs,over best,over floor,TFLOP/s,GB/s".split(","), cells
        ),
        "",
        *paragraph(
            f"Geometric mean over all {len(rows)} shapes: {geometric_mean(rows, 'best_ms'):.3f} of best,",
            f"{geometric_mean(rows, 'floor_ms'):.2f} of the floor; {slower}",
        ),
        *other_figures(results),
    ]


def other_figures(results):
    """What the table has no column for, in results that have it."""
    rows, first = results["rows"], results.get("first_call")
    if first is None:
        return []
    host = sorted(r["host_us"] for r in rows)
    back_to_back = math.exp(sum(math.log(r["graph_us"] / (1e3 * r["ms"])) for r in rows) / len(rows))
    schedule = max(r["schedule_us"] for r in rows)
    workspace = max(r["workspace_bytes"] for r in rows)
    return [
        "",
        *paragraph(
            f"In a CUDA graph of 20 back-to-back calls a call takes {back_to_back:.2f} of these times (geometric mean; it",
            "finds its data in L2 where they fit, and 20 long ones run into the power limit).",
            f"Host time per call: {host[0]:.1f} to {host[-1]:.1f} µs (C++). The schedule on the device: up to",
            f"{schedule:.1f} µs. Workspace: up to {workspace / 2**20:.0f} MiB. First call of a process, behind",
            f"{first['context_ms']:.0f} ms for the CUDA context: schedule {first['schedule_ms']:.1f} ms, decode",
            f"{first['decode_ms']:.1f} ms.",
        ),
    ]


def sparse_name(r):
    """What a row measures, in words."""
    name = {
        "sparse_decode": "sparse decode",
        "sparse_prefill": "sparse prefill",
        "dense_fp8_decode": "dense decode over FP8",
        "append_kv": "append, norm and RoPE",
        "merge_states": "merge_states",
    }[r["operation"]]
    if r["operation"] == "append_kv":
        return f"{name}, {r['b'] * r['s_q']} tokens, {r['format']}"
    name += f", b{r['b']}" if r["b"] > 1 else ""
    name += f" s_q{r['s_q']} h{r['h_q']}"
    if r["operation"] == "sparse_decode":
        name += f", {r['topk']}" + (f"+{r['extra_topk']}" if r["extra_topk"] else "") + f" keys, {r['format']}"
    elif r["operation"] != "merge_states":
        name += f", {r['s_kv'] // 1024}K tokens"
    return name


def microseconds(us):
    return "" if us is None else f"{us:.0f}" if us >= 100 else f"{us:.1f}"


def sparse_cells(r):
    best = microseconds(r["best_us"])
    if not r["measured"]:
        return [sparse_name(r), "no kernel yet", microseconds(r["floor_us"]), "", best, ""]
    over_best = f"{r['best_us'] / r['us']:.2f}x" if r["best_us"] else ""
    us = microseconds(r["us"])
    return [sparse_name(r), us, microseconds(r["floor_us"]), f"{r['over_floor']:.2f}", best, over_best]


def sparse_readme(results):
    left_out = {"sparse_decode": lambda r: r["s_q"] > 1 or r["h_q"] == 32, "append_kv": lambda r: True}
    rows = [r for r in results["rows"] if r["measured"] and not left_out.get(r["operation"], lambda r: False)(r)]
    return [
        *paragraph(
            "Sparse attention and FP8 caches on an H200, beside what FLOP, bytes or a copy alone would take, without a launch, and",
            "the best peer ([all rows](docs/sparse.md#figures)):",
        ),
        "",
        *table(["", "µs", "floor, µs", "over floor", "best peer, µs", ""], [sparse_cells(r) for r in rows]),
    ]


def sparse_page(results):
    rows, machine = results["rows"], results["machine"]
    measured = [r for r in rows if r["measured"]]
    right = sum(r["correct"] for r in measured)
    copies = [
        f"{sparse_name(r)} {microseconds(r['us'])} µs ({microseconds(r['graph_us'])} in a graph of 20) where a copy of as"
        f" many bytes takes {microseconds(r['copy_us'])} ({microseconds(r['copy_graph_us'])})"
        for r in measured
        if r["copy_us"]
    ]
    return [
        *paragraph(
            f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, commit {short_commit(results['commit'])},",
            f"`{SPARSE_RESULTS}` (`{results['command']}`). {right} of {len(measured)} measured cases passed the check in the",
            "same process.",
        ),
        "",
        *table(["", "µs", "floor, µs", "over floor", "best peer, µs", ""], [sparse_cells(r) for r in rows]),
        "",
        *paragraph("Floors have no launch in them; with one: " + "; ".join(copies) + "."),
    ]


def shelf_page(results):
    return shelf_table.shelf_page(results, table, paragraph, short_commit)


BLOCKS = [
    ("README.md", "h200-dense-decode", RESULTS, readme),
    ("docs/kernels/dense-decode-sm90.md", "h200-dense-decode", RESULTS, kernel_page),
    ("README.md", "h200-sparse", SPARSE_RESULTS, sparse_readme),
    ("docs/sparse.md", "h200-sparse", SPARSE_RESULTS, sparse_page),
    ("docs/benchmarks.md", "h200-shelf", shelf_table.RESULTS, shelf_page),
]


def replace_block(text, page, name, lines):
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        sys.exit(f"{page}: expected one block from {begin.strip()} to {end}")
    return pattern.sub(lambda _: begin + "".join(line + "\n" for line in lines) + end, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a block differs")
    check = parser.parse_args().check
    differ = 0
    for page, name, results, make in BLOCKS:
        path = ROOT / page
        text = path.read_text()
        lines = []
        if (ROOT / results).exists():
            lines = make(json.loads((ROOT / results).read_text()))
        else:
            print(f"{page}: block {name} is empty, there is no {results}", file=sys.stderr)
        made = replace_block(text, page, name, lines)
        if made == text:
            continue
        differ += 1
        if check:
            print(f"{page}: block {name} is not what {results} says; run bench/readme_table.py", file=sys.stderr)
        else:
            path.write_text(made)
            print(f"{page}: block {name} rewritten")
    return 1 if check and differ else 0


if __name__ == "__main__":
    sys.exit(main())
