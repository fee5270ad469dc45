"""The Python package on torch CUDA tensors. Run by tests/gpu/run.sh; needs a Hopper GPU."""

import itertools
import subprocess
import sys

import pytest
import torch

import flash_mla_kernels
from flash_mla_kernels import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_decoding_metadata, get_mla_metadata

if not torch.cuda.is_available():
    pytest.fail("no CUDA device", pytrace=False)

DEVICES = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


class Problem:
    def __init__(self, lengths, s_q=1, h_q=16, h_kv=1, page_size=64, dtype=torch.bfloat16, causal=False, device="cuda:0"):
        self.lengths, self.s_q, self.h_q, self.h_kv, self.causal = lengths, s_q, h_q, h_kv, causal
        g = torch.Generator().manual_seed(1)
        pages = [-(-n // page_size) for n in lengths]
        total, width = sum(pages) + 2, max(pages, default=0) + 2
        self.k_host = (torch.randn(total, page_size, h_kv, 576, generator=g) / 10).clamp(-1, 1).to(dtype)
        table = torch.full((len(lengths), width), 2147480000, dtype=torch.int32)
        order = torch.randperm(total, generator=g).to(torch.int32)
        used = torch.zeros(total, page_size, dtype=torch.bool)
        at = 0
        for i, n in enumerate(lengths):
            table[i, : pages[i]] = order[at : at + pages[i]]
            at += pages[i]
            for j in range(pages[i]):
                used[table[i, j], : min(page_size, n - j * page_size)] = True
        self.k_host[~used] = float("nan")
        self.table_host = table
        self.q = torch.randn(len(lengths), s_q, h_q, 576, generator=g).clamp(-1, 1).to(dtype).to(device)
        self.k_cache, self.block_table = self.k_host.to(device), table.to(device)
        self.cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)

    def args(self):
        return self.q, self.k_cache, self.block_table, self.cache_seqlens, 512

    def decode(self, *metadata, **kwargs):
        if not metadata:
            metadata = get_mla_decoding_metadata(self.cache_seqlens, self.s_q * self.h_q // self.h_kv, self.h_kv)
        return flash_mla_with_kvcache(*self.args(), *metadata, causal=self.causal, **kwargs)

    def check(self, out, lse, scale=576**-0.5, lengths=None):
        """Against the library's float64 reference on the CPU."""
        lengths = self.cache_seqlens.cpu() if lengths is None else lengths
        expected, expected_lse = flash_mla_kernels.reference_dense_decode(
            self.q.cpu(), self.k_host, self.table_host, lengths, 512, softmax_scale=scale, causal=self.causal
        )
        assert out.device == lse.device == self.q.device and out.dtype == self.q.dtype and lse.dtype == torch.float32
        out, lse = out.cpu().double(), lse.cpu().double()
        error = (out - expected).abs()
        assert ((error <= 8e-4) | (error <= 2.01 / 128 * expected.abs())).all(), error.max()
        assert torch.equal(torch.isinf(lse), torch.isinf(expected_lse))
        finite = torch.isfinite(expected_lse)
        error = (lse - expected_lse).abs()[finite]
        assert ((error <= 1e-5) | (error <= 8.01 / 65536 * expected_lse.abs()[finite])).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("generation", ["february", "september", "today"])
def test_every_generation_of_the_interface(generation, dtype):
    p = Problem([700, 0, 64, 1, 2000], s_q=2, h_q=16, dtype=dtype, causal=True)
    if generation == "february":
        metadata = get_mla_decoding_metadata(p.cache_seqlens, 32, 1)
    elif generation == "september":
        metadata = get_mla_decoding_metadata(p.cache_seqlens, 32, 1, 16, False, None)
    else:
        metadata = get_mla_metadata()
        assert isinstance(metadata[0], FlashMLASchedMeta)
    for _ in range(3):  # every layer of a step
        p.check(*p.decode(*metadata))
    if generation == "today":
        assert metadata[0].have_initialized and metadata[0].num_splits.device == p.q.device
        with pytest.raises(ValueError, match="filled for"):
            other = Problem([700, 0, 64, 1, 2000], s_q=1, h_q=32)
            other.decode(*metadata)
    else:
        assert metadata[0].shape[1] == 8 and metadata[1].shape == (6,) and metadata[0].device == p.q.device


@pytest.mark.parametrize("h_q, h_kv, page_size", [(1, 1, 64), (16, 2, 16), (63, 1, 32), (128, 1, 128), (24, 3, 64)])
def test_shapes(h_q, h_kv, page_size):
    for s_q, causal in itertools.product((1, 3), (False, True)):
        p = Problem([300, 5, 0, 129], s_q, h_q, h_kv, page_size, causal=causal)
        p.check(*p.decode(softmax_scale=0.1352338), scale=0.1352338)


def test_the_metadata_is_the_hosts():
    lengths = torch.randint(0, 5000, (77,), dtype=torch.int32)
    for token_rows in (False, True):
        on_host = flash_mla_kernels.build_decode_schedule(lengths, 132, token_rows=token_rows)
        on_device = flash_mla_kernels.build_decode_schedule(lengths.cuda(), 132, token_rows=token_rows)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(on_host, on_device))


@pytest.mark.parametrize("h_q", [16, 128])
def test_metadata_has_as_many_rows_whatever_the_batch(h_q):
    # Callers copy the metadata of a replay over that of a captured graph.
    rows = {get_mla_decoding_metadata(torch.full((b,), 500, dtype=torch.int32, device="cuda"), h_q, 1)[0].shape for b in (1, 2, 200)}
    assert len(rows) == 1


def test_current_stream_is_used():
    p = Problem([1500, 40], h_q=128)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    q = torch.empty_like(p.q)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s: a launch on any other stream reads q before it is written
        q.copy_(p.q)
        p.q = q
        out, lse = p.decode()
        copies = out.clone(), lse.clone()
    stream.synchronize()
    p.check(*copies)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_device_need_not_be_current(device):
    p = Problem([1500, 40, 0], h_q=128, device=device)
    for current in DEVICES:
        with torch.cuda.device(current):
            p.check(*p.decode())
            assert torch.cuda.current_device() == current.index


def test_nothing_synchronises():
    p = Problem([900, 33], h_q=128)
    p.decode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = p.decode()
        p.decode(*get_mla_metadata())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    p.check(out, lse)
    # Seen from outside: the call returns while earlier work on the stream still runs.
    done = torch.cuda.Event()
    torch.cuda._sleep(400_000_000)
    p.decode()
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("generation", ["tensors", "object"])
def test_cuda_graph_follows_refilled_lengths(generation):
    p = Problem([3000, 2500, 100, 1], s_q=2, h_q=128, causal=True)
    if generation == "tensors":
        p.decode()
    else:
        p.decode(*get_mla_metadata())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metadata = get_mla_decoding_metadata(p.cache_seqlens, 256, 1) if generation == "tensors" else get_mla_metadata()
        layers = [p.decode(*metadata) for _ in range(5)]
    for lengths in ([3000, 2500, 100, 1], [0, 0, 0, 0], [1234, 17, 64, 0], [3000, 0, 0, 1]):
        p.cache_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        for out, lse in layers:
            p.check(out, lse, lengths=torch.tensor(lengths, dtype=torch.int32))


def test_first_call_of_a_process_may_be_captured():
    code = """
import torch, flash_mla_kernels
q = torch.randn(2, 1, 128, 576, dtype=torch.bfloat16, device="cuda") / 10
k = torch.randn(40, 64, 1, 576, dtype=torch.bfloat16, device="cuda") / 10
table = torch.arange(40, dtype=torch.int32, device="cuda").view(2, 20)
lengths = torch.tensor([1280, 77], dtype=torch.int32, device="cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out, lse = flash_mla_kernels.flash_mla_with_kvcache(q, k, table, lengths, 512, *flash_mla_kernels.get_mla_decoding_metadata(lengths, 128, 1))
graph.replay()
again, _ = flash_mla_kernels.flash_mla_with_kvcache(q, k, table, lengths, 512, *flash_mla_kernels.get_mla_decoding_metadata(lengths, 128, 1))
assert torch.equal(out, again) and out.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_comes_from_torchs_allocator():
    p = Problem([5000, 40], h_q=128)
    p.decode()
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    results = [p.decode() for _ in range(20)]
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_stats()["reserved_bytes.all.current"]
    assert torch.cuda.memory_stats()["allocation.all.allocated"] > before
    assert free - torch.cuda.mem_get_info()[0] <= reserved
    assert all(torch.equal(results[0][0], out) for out, _ in results)


def test_strided_inputs():
    p = Problem([400, 90], h_q=8)
    pool = torch.full((p.k_cache.shape[0], 2, 64, 1, 576), float("nan"), dtype=torch.bfloat16, device="cuda")
    pool[:, 0] = p.k_cache
    q = torch.empty(2, 8, 1, 576, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    q.copy_(p.q)
    p.k_cache, p.q = pool[:, 0], q
    p.check(*p.decode())


def test_empty_batch():
    out, lse = Problem([]).decode()
    assert out.shape == (0, 1, 16, 512) and lse.shape == (0, 16, 1) and out.is_cuda


@pytest.mark.parametrize(
    "error, name, change",
    [
        (ValueError, "k_cache", lambda p: dict(k_cache=p.k_cache.cpu())),
        (ValueError, "block_table", lambda p: dict(block_table=p.block_table.cpu())),
        (ValueError, "cache_seqlens", lambda p: dict(cache_seqlens=p.cache_seqlens.cpu())),
        (ValueError, "parts", lambda p: dict(tile_scheduler_metadata=get_mla_decoding_metadata(p.cache_seqlens.cpu(), 16, 1)[0])),
        (ValueError, "k_cache", lambda p: dict(k_cache=p.k_cache.half())),
        (ValueError, "num_splits", lambda p: dict(num_splits=torch.zeros(9, dtype=torch.int32, device="cuda"))),
        (NotImplementedError, "q is float32", lambda p: dict(q=p.q.float(), k_cache=p.k_cache.float())),
        (NotImplementedError, "page_size is 48", lambda p: dict(k_cache=p.k_cache[:, :48])),
        (NotImplementedError, "head dimensions", lambda p: dict(head_dim_v=500)),
    ],
)
def test_bad_arguments_are_named(error, name, change):
    p = Problem([100, 20])
    metadata, num_splits = get_mla_decoding_metadata(p.cache_seqlens, 16, 1)
    kwargs = dict(
        q=p.q,
        k_cache=p.k_cache,
        block_table=p.block_table,
        cache_seqlens=p.cache_seqlens,
        head_dim_v=512,
        tile_scheduler_metadata=metadata,
        num_splits=num_splits,
    )
    kwargs.update(change(p))
    with pytest.raises(error, match=name):
        flash_mla_with_kvcache(**kwargs)
    torch.cuda.synchronize()


def test_bad_head_counts_are_named():
    lengths = torch.tensor([5], dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="num_heads_q"):
        get_mla_decoding_metadata(lengths, 16, 1, 5)


def test_arrays_of_other_libraries_on_a_gpu_are_refused():
    class Other:
        def __init__(self, x):
            self.x, self.shape = x, tuple(x.shape)

        def __dlpack__(self, **kwargs):
            return self.x.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.x.__dlpack_device__()

    with pytest.raises(NotImplementedError, match="torch.from_dlpack"):
        get_mla_decoding_metadata(Other(torch.tensor([5], dtype=torch.int32, device="cuda")), 16, 1)


def test_info_lists_the_gpus():
    gpus = [b for b in flash_mla_kernels.backends() if b["name"] == "sm90"]
    assert len(gpus) == len(DEVICES) and all(b["available"] for b in gpus)
    assert torch.cuda.get_device_name(0) in gpus[0]["device"]


def sparse_problem(v4, h_q, topk, lengths, seed=3):
    """q, an FP8 cache and lists of its tokens, on the CPU; -1 here and there."""
    g = torch.Generator().manual_seed(seed)
    width, latent_width, d_qk = (584, 448, 512) if v4 else (656, 512, 576)
    cache = torch.full((24, 64, 1, width), 255, dtype=torch.uint8)
    n = 24 * 64 - 10
    latent = torch.randn(n, latent_width, generator=g).bfloat16() / 10
    rope = torch.randn(n, 64, generator=g).bfloat16() / 10
    flash_mla_kernels.append_kv(latent, rope, torch.arange(n), cache)
    q = torch.randn(len(lengths), 2, h_q, d_qk, generator=g).bfloat16()
    indices = torch.randint(0, n, (len(lengths), 2, topk), generator=g, dtype=torch.int32)
    indices[torch.rand(indices.shape, generator=g) < 0.1] = -1
    sink = torch.randn(h_q, generator=g)
    return q, cache, indices, torch.tensor(lengths, dtype=torch.int32), sink


@pytest.mark.parametrize("v4", [False, True])
@pytest.mark.parametrize("h_q", [16, 128])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_sparse_decode_as_on_the_cpu(v4, h_q, with_lengths):
    """Lists of one length, whose plan is a function, and of many, which are planned on the device."""
    q, cache, indices, lengths, sink = sparse_problem(v4, h_q, 200, [200, 0, 63, 129])
    extra = dict(topk_length=lengths) if with_lengths else {}
    wanted, wanted_lse = flash_mla_kernels.sparse_decode(q, cache, indices, attn_sink=sink, **extra)
    on_gpu = {k: v.cuda() for k, v in extra.items()}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        tensors = q.cuda(), cache.cuda(), indices.cuda()
        out, lse = flash_mla_kernels.sparse_decode(*tensors, attn_sink=sink.cuda(), **on_gpu)
    stream.synchronize()
    torch.testing.assert_close(out.cpu().float(), wanted.float(), atol=1e-3, rtol=2.01 / 128)
    torch.testing.assert_close(lse.cpu(), wanted_lse, atol=1e-4, rtol=1e-4)


def test_sparse_decode_in_a_graph_with_refilled_lists():
    q, cache, indices, lengths, _ = sparse_problem(False, 64, 300, [300, 17, 250])
    on_gpu = [x.cuda() for x in (q, cache, indices, lengths)]
    for _ in range(2):
        out, lse = flash_mla_kernels.sparse_decode(*on_gpu[:3], topk_length=on_gpu[3])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_mla_kernels.sparse_decode(*on_gpu[:3], topk_length=on_gpu[3])
    for seed in (4, 5):
        _, _, indices, _, _ = sparse_problem(False, 64, 300, [0, 0, 0], seed)
        lengths = torch.tensor([seed * 30, 299, 1], dtype=torch.int32)
        on_gpu[2].copy_(indices)
        on_gpu[3].copy_(lengths)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        wanted, wanted_lse = flash_mla_kernels.sparse_decode(q, cache, indices, topk_length=lengths)
        torch.testing.assert_close(out.cpu().float(), wanted.float(), atol=1e-3, rtol=2.01 / 128)
        torch.testing.assert_close(lse.cpu(), wanted_lse, atol=1e-4, rtol=1e-4)


def test_flashmlas_name_for_sparse_decode():
    q, cache, indices, _, sink = sparse_problem(False, 128, 128, [128, 128])
    metadata, splits = get_mla_metadata()
    args = [x.cuda() for x in (q, cache)]
    out, lse = flash_mla_with_kvcache(
        *args, None, None, 512, metadata, splits, is_fp8_kvcache=True, indices=indices.cuda(), attn_sink=sink.cuda()
    )
    wanted, wanted_lse = flash_mla_kernels.sparse_decode(q, cache, indices, attn_sink=sink)
    torch.testing.assert_close(out.cpu().float(), wanted.float(), atol=1e-3, rtol=2.01 / 128)
    torch.testing.assert_close(lse.cpu(), wanted_lse, atol=1e-4, rtol=1e-4)


def fp8_problem(kind, lengths, h_q, s_q=2, page_size=64):
    """A cache that is NaN wherever no token is, with pages further apart than they are long."""
    g = torch.Generator().manual_seed(7)
    width = {"v32": 656, "tensor": 576}[kind]
    pages = [-(-n // page_size) for n in lengths]
    cache = torch.full((sum(pages) + 2, page_size + 1, 1, width), 255, dtype=torch.uint8)[:, :page_size]
    table = torch.full((len(lengths), max(pages) + 2), 2147480000, dtype=torch.int32)
    order, at, slots = torch.randperm(sum(pages) + 2, generator=g).to(torch.int32), 0, []
    for i, n in enumerate(lengths):
        table[i, : pages[i]] = order[at : at + pages[i]]
        at += pages[i]
        slots += [int(table[i, j // page_size]) * page_size + j % page_size for j in range(n)]
    latent, rope = (torch.randn(len(slots), d, generator=g).bfloat16() / 10 for d in (512, 64))
    flash_mla_kernels.append_kv(latent, rope, torch.tensor(slots), cache, kv_scale=1 / 256)
    q = torch.randn(len(lengths), s_q, h_q, 576, generator=g).bfloat16()
    return q, cache, table, torch.tensor(lengths, dtype=torch.int32)


def dense_fp8(q, cache, table, lengths, parts=4):
    plan = flash_mla_kernels.build_decode_schedule(lengths, parts)
    return flash_mla_kernels.dense_fp8_decode(q, cache, table, lengths, *plan, causal=True, kv_scale=1 / 256)


def assert_as_on_the_cpu(got, wanted):
    torch.testing.assert_close(got[0].cpu().float(), wanted[0].float(), atol=1e-3, rtol=2.01 / 128)
    torch.testing.assert_close(got[1].cpu(), wanted[1], atol=1e-4, rtol=1e-4)


def same_on_the_gpu(x):
    """With the strides it has: a copy of a slice would be dense."""
    if x.is_contiguous():
        return x.cuda()
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    return y.copy_(x)


@pytest.mark.parametrize("kind", ["v32", "tensor"])
@pytest.mark.parametrize("h_q", [8, 32, 64, 128])
@pytest.mark.parametrize("page_size", [16, 61, 64])
def test_dense_fp8_decode_as_on_the_cpu(kind, h_q, page_size):
    problem = fp8_problem(kind, [700, 0, 65, 1], h_q, page_size=page_size)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = dense_fp8(*(same_on_the_gpu(x) for x in problem))
    stream.synchronize()
    assert_as_on_the_cpu(got, dense_fp8(*problem))


def test_dense_fp8_decode_in_a_graph_with_refilled_lengths():
    q, cache, table, lengths = fp8_problem("v32", [1500, 800, 64], 64)
    on_gpu = [same_on_the_gpu(x) for x in (q, cache, table, lengths)]

    def decode():
        return flash_mla_with_kvcache(*on_gpu, 512, *get_mla_metadata(), causal=True, is_fp8_kvcache=True)

    decode()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers = [decode() for _ in range(3)]
    for now in ([1500, 800, 64], [0, 0, 0], [77, 800, 1]):
        refilled = torch.tensor(now, dtype=torch.int32)
        on_gpu[3].copy_(refilled)
        for out, _ in layers:
            out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        wanted = flash_mla_with_kvcache(
            q, cache, table, refilled, 512, *get_mla_metadata(), causal=True, is_fp8_kvcache=True
        )
        for got in layers:
            assert_as_on_the_cpu(got, wanted)


@pytest.mark.parametrize("width", [656, 584, 576])
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_append_and_gather_have_the_cpus_bytes(width, device):
    """Norm, RoPE and quantiser, on a stream of torch's; a slot of -1 is passed over, its position is not looked at."""
    g = torch.Generator().manual_seed(6)
    n, d_qk = 300, 512 if width == 584 else 576
    rows = torch.randn(n, d_qk, generator=g).bfloat16()
    slots = torch.randperm(640, generator=g)[:n]
    slots[::7] = -1
    positions = torch.randint(0, 1000, (n,), generator=g)
    positions[::7] = 1 << 40
    cos_sin = torch.randn(1000, 64, generator=g)
    weight = 1 + torch.randn(d_qk - 64, generator=g) / 4
    on_cpu = torch.full((10, 64, 1, width), 255, dtype=torch.uint8)
    options = dict(norm_weight=weight, positions=positions, cos_sin=cos_sin, kv_scale=0.01)
    flash_mla_kernels.append_kv(rows[:, : d_qk - 64], rows[:, d_qk - 64 :], slots, on_cpu, **options)
    wanted = flash_mla_kernels.gather_kv(on_cpu, slots, dtype="bfloat16", kv_scale=0.01)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        gpu = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        cache, on_gpu = torch.full_like(on_cpu, 255, device=device), rows.to(device)
        flash_mla_kernels.append_kv(on_gpu[:, : d_qk - 64], on_gpu[:, d_qk - 64 :], slots.to(device), cache, **gpu)
        got = flash_mla_kernels.gather_kv(cache, slots.to(device), dtype="bfloat16", kv_scale=0.01)
    stream.synchronize()
    assert torch.equal(cache.cpu(), on_cpu)
    assert torch.equal(got.cpu(), wanted)


@pytest.mark.parametrize("base", ["e", "2"])
def test_merge_states_in_a_graph(base):
    g = torch.Generator().manual_seed(7)
    a, b = (torch.randn(5, 2, 16, 512, generator=g).bfloat16() for _ in range(2))
    lse_a, lse_b = (5 * torch.randn(5, 16, 2, generator=g) for _ in range(2))
    lse_a[1], lse_b[1:3] = float("inf"), float("-inf")
    on_gpu = [x.cuda() for x in (a, lse_a, b, lse_b)]
    for _ in range(2):
        out, lse = flash_mla_kernels.merge_states(*on_gpu, base=base)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_mla_kernels.merge_states(*on_gpu, base=base)
    for _ in range(2):
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        wanted, wanted_lse = flash_mla_kernels.merge_states(*[x.cpu() for x in on_gpu], base=base)
        # The exponentials of the two backends differ in their last bits: up to one step of bfloat16 apart.
        torch.testing.assert_close(out.cpu().float(), wanted.float(), atol=1e-6, rtol=2**-7)
        torch.testing.assert_close(lse.cpu(), wanted_lse, atol=1e-5, rtol=1e-5)
        on_gpu[0].copy_(torch.randn(a.shape, generator=g))
        on_gpu[1].copy_(torch.randn(lse_a.shape, generator=g))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_prefill_of_keys_that_are_put_together(dtype, causal):
    """Keys with the rotary part in every head, as vLLM has them, against the definition; a sequence without keys too."""
    g = torch.Generator().manual_seed(4)
    queries, keys, heads = [70, 1, 200], [130, 0, 260], 8
    rope = torch.randn(sum(keys), 1, 64, generator=g).expand(-1, heads, -1)
    k = torch.cat((torch.randn(sum(keys), heads, 128, generator=g), rope), -1).to(dtype).cuda()
    kv = torch.randn(sum(keys), heads, 256, generator=g).to(dtype).cuda()
    q = (torch.randn(sum(queries), heads, 192, generator=g) / 4).to(dtype).cuda()
    starts = [torch.tensor([0, *n]).cumsum(0).int().cuda() for n in (queries, keys)]
    call = (q, k[..., :128], k[:, 0, 128:], kv[..., 128:], *starts)
    out, lse = flash_mla_kernels.dense_prefill(*call, softmax_scale=0.1, causal=causal)
    for i, (n, m) in enumerate(zip(queries, keys)):
        rows, cols = slice(*starts[0][i : i + 2].tolist()), slice(*starts[1][i : i + 2].tolist())
        if m == 0:
            assert (out[rows] == 0).all() and (lse[:, rows] == float("inf")).all()
            continue
        scores = torch.einsum("ihd,jhd->hij", q[rows].double(), k[cols].double()) * 0.1
        if causal:
            scores.masked_fill_(torch.ones(n, m, device="cuda").triu(m - n + 1).bool(), float("-inf"))
        expected = torch.einsum("hij,jhd->ihd", torch.softmax(scores, -1), kv[cols][..., 128:].double())
        assert (out[rows].double() - expected).abs().max() < 2e-2
        assert (lse[:, rows].double() - torch.logsumexp(scores, -1)).abs().max() < 2e-3
    into = torch.full_like(out, float("nan"))
    again, _ = flash_mla_kernels.dense_prefill(*call, softmax_scale=0.1, causal=causal, out=into)
    assert again is into and torch.equal(into, out)


def test_rows_as_on_the_cpu():
    g = torch.Generator().manual_seed(1)
    x, residual, weight = (torch.randn(*s, generator=g).bfloat16() for s in ((9, 512), (9, 512), (512,)))
    positions = torch.tensor([0, 5, 70, 1, 2, 3, 4, 9, 8])
    heads = torch.randn(9, 4, 128, generator=g).bfloat16()

    def on(device):
        a, r, w, p, h = (t.to(device, copy=True) for t in (x, residual, weight, positions, heads))
        out = flash_mla_kernels.add_rms_norm(a, r, w)
        turned = flash_mla_kernels.apply_rope(h, p, theta=5e5, scaling="llama3", factor=8, original_max_position=8192)
        return r, out, flash_mla_kernels.gated_activation(out), turned

    for got, expected in zip(on(DEVICES[0]), on("cpu")):
        assert got.device == DEVICES[0]
        torch.testing.assert_close(got.cpu().float(), expected.float(), rtol=2**-7, atol=1e-5)
    narrow = [torch.empty(9, 512, dtype=torch.float8_e4m3fn, device=d) for d in (DEVICES[0], "cpu")]
    for out in narrow:
        flash_mla_kernels.rms_norm(x.to(out.device), weight.to(out.device), out=out, out_scale=0.02)
    torch.testing.assert_close(narrow[0].cpu().float(), narrow[1].float(), rtol=2**-3, atol=2**-9)


@pytest.mark.parametrize("grouped", [False, True])
def test_routing_as_on_the_cpu(grouped):
    logits = torch.randn(70, 256, generator=torch.Generator().manual_seed(2))
    bias = 0.1 * torch.randn(256, generator=torch.Generator().manual_seed(3))
    options = dict(scores="sigmoid", normalise=True, scale=2.5)
    if grouped:
        options.update(num_groups=8, groups_kept=4, groups_by_best_two=True)
    ids, weights = flash_mla_kernels.choose_experts(logits.to(DEVICES[0]), 8, bias=bias.to(DEVICES[0]), **options)
    expected = flash_mla_kernels.choose_experts(logits, 8, bias=bias, **options)
    assert torch.equal(ids.cpu(), expected[0])
    torch.testing.assert_close(weights.cpu(), expected[1], rtol=1e-5, atol=0)
    with pytest.raises(NotImplementedError, match="float32"):
        flash_mla_kernels.choose_experts(logits.to(DEVICES[0]).bfloat16(), 8)


def test_sampling_has_the_cpus_tokens():
    g = torch.Generator().manual_seed(4)
    logits, top_p = torch.randn(40, 32000, generator=g), torch.rand(40, generator=g)
    draft, target = torch.rand(6, 3, 500, generator=g).softmax(-1), torch.rand(6, 4, 500, generator=g).softmax(-1)

    def on(device):
        x, p, q, r = (t.to(device) for t in (logits, top_p, draft, target))
        tokens = flash_mla_kernels.sample_tokens(x, temperature=0.8, top_k=50, top_p=p, seed=7)
        left = flash_mla_kernels.filter_tokens(x, top_p=p)
        drafts = flash_mla_kernels.sample_tokens(q.flatten(0, 1), probabilities=True, seed=2).view(6, 3)
        return tokens, left, drafts, *flash_mla_kernels.speculative_sampling(q, drafts, r, seed=3)

    for got, expected in zip(on(DEVICES[0]), on("cpu")):
        assert got.device == DEVICES[0] and torch.equal(got.cpu(), expected)


def test_hyper_connections_and_pages_as_on_the_cpu():
    g = torch.Generator().manual_seed(5)
    residual, x = torch.randn(9, 4, 512, generator=g).bfloat16(), torch.randn(9, 512, generator=g).bfloat16()
    weights = torch.randn(24, 2048, generator=g) * 0.02, torch.ones(3), torch.randn(24, generator=g)
    key = torch.randn(5, 2, 64, generator=g).bfloat16()

    def on(device):
        r, y, *w = (t.to(device) for t in (residual, x, *weights))
        post, comb, given = flash_mla_kernels.mhc_pre(r, *w)
        mixed = flash_mla_kernels.mhc_post_pre(y, r, post, comb, *w)
        indptr, indices, last = (torch.tensor(t, dtype=torch.int32, device=device) for t in ([0, 2, 3], [4, 1, 2], [3, 2]))
        seqlens = flash_mla_kernels.paged_seqlens(indptr, last, 4)
        starts = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)
        sequences, positions = flash_mla_kernels.batch_positions(starts, seqlens, 5)
        pages = torch.zeros(6, 4, 2, 64, dtype=torch.bfloat16, device=device)
        flash_mla_kernels.append_pages(key.to(device), None, sequences, positions, indptr, indices, pages)
        return post, comb, given, *mixed, seqlens, sequences, positions, pages

    for got, expected in zip(on(DEVICES[0]), on("cpu")):
        assert got.device == DEVICES[0]
        torch.testing.assert_close(got.cpu().float(), expected.float(), rtol=2**-7, atol=2e-4)
