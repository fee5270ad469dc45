"""Sparse attention and FP8 caches through the Python interface, with torch as the oracle."""

import math

import numpy as np
import pytest
import torch

import flash_mla_kernels
from flash_mla_kernels import (
    FlashMLASchedMeta,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_decoding_metadata,
    get_mla_metadata,
)

FORMATS = {"v32": (656, 576), "v4": (584, 512), "tensor": (576, 576), "rows": (None, 576), "rows512": (None, 512)}
TENSOR_SCALE = 1 / 64


def quantise_tile(x):
    """FlashMLA's recipe on the last dimension: e4m3 values and a power of two."""
    scale = torch.pow(2, (x.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-4).log2().ceil())
    return (x / scale).to(torch.float8_e4m3fn), scale


def make_cache(kind, pages, page_size, seed=0):
    """A cache of random tokens, and what its slots hold: (pages * page_size, d_qk) float64."""
    g = torch.Generator().manual_seed(seed)
    width, d_qk = FORMATS[kind]
    x = (torch.randn(pages * page_size, d_qk, generator=g) / 10).clamp(-1, 1).bfloat16().float()
    n = x.shape[0]
    if kind.startswith("rows"):
        return x.bfloat16().view(pages, page_size, 1, d_qk), x.double()
    if kind == "tensor":
        values = (x / TENSOR_SCALE).to(torch.float8_e4m3fn)
        return values.view(pages, page_size, 1, 576), values.double() * TENSOR_SCALE
    latent, tile = (512, 128) if kind == "v32" else (448, 64)
    values, scale = quantise_tile(x[:, :latent].view(n, -1, tile))
    rope = x[:, latent:].bfloat16()
    held = torch.cat([(values.double() * scale.double()).view(n, latent), rope.double()], dim=1)
    values = values.view(n, latent).view(torch.uint8)
    if kind == "v32":
        scales = scale.view(n, 4).contiguous().view(torch.uint8)
        rows = torch.cat([values, scales, rope.contiguous().view(torch.uint8)], dim=1)
        return rows.view(pages, page_size, 1, 656).view(torch.float8_e4m3fn), held
    rows = torch.cat([values, rope.contiguous().view(torch.uint8)], dim=1).view(pages, page_size * 576)
    exponents = (scale.view(n, 7).log2() + 127).to(torch.uint8)
    exponents = torch.cat([exponents, torch.full((n, 1), 255, dtype=torch.uint8)], dim=1).view(pages, page_size * 8)
    stride = math.ceil(page_size * 584 / 576) * 576
    pool = torch.full((pages, stride), 255, dtype=torch.uint8)
    pool[:, : page_size * 576] = rows
    pool[:, page_size * 576 : page_size * 584] = exponents
    return pool.as_strided((pages, page_size, 1, 584), (stride, 584, 584, 1)), held


def make_lists(shape, slots, seed=0):
    g = torch.Generator().manual_seed(seed + 50)
    lists = torch.randint(0, slots, shape, generator=g, dtype=torch.int32)
    lists[torch.rand(shape, generator=g) < 0.2] = -1
    return lists


def expected(q, keys, scale, sink=None):
    """(out, lse, max_logits) of one query token (h_q, d) over keys (n, d), in float64."""
    h_q = q.shape[0]
    if keys.shape[0] == 0:
        inf = torch.full((h_q,), math.inf, dtype=torch.float64)
        return torch.zeros(h_q, 512, dtype=torch.float64), inf, -inf
    s = q.double() @ keys.T * scale
    lse = torch.logsumexp(s, dim=-1)
    out = torch.softmax(s, dim=-1) @ keys[:, :512]
    if sink is not None:
        out = out / (1 + torch.exp(sink.double() - lse))[:, None]
    return out, lse, s.amax(-1)


def assert_near(got, want, absolute=1e-3, relative=2.01 / 128):
    got, want = got.double(), want.double()
    assert got.shape == want.shape
    finite = torch.isfinite(want)
    assert torch.equal(got[~finite], want[~finite])
    error = (got - want).abs()[finite]
    assert ((error <= absolute) | (error <= relative * want.abs()[finite])).all(), error.max()


class Sparse:
    def __init__(self, kind="v32", b=3, s_q=2, h_q=6, topk=70, page_size=16, extra=None, lengths=False, sink=False):
        g = torch.Generator().manual_seed(7)
        d_qk = FORMATS[kind][1]
        self.scale = d_qk**-0.5
        self.q = (torch.randn(b, s_q, h_q, d_qk, generator=g) / 2).bfloat16()
        self.k_cache, self.held = make_cache(kind, 20, page_size)
        self.indices = make_lists((b, s_q, topk), 20 * page_size)
        self.fp8 = not kind.startswith("rows")
        self.sparse = {}
        if lengths:
            self.sparse["topk_length"] = torch.tensor([0, topk, topk // 2][:b], dtype=torch.int32)
            self.indices[2, :, topk // 2 :] = 2147480000
        if sink:
            self.sparse["attn_sink"] = torch.randn(h_q, generator=g) + 3
        self.extra_held = None
        if extra:
            cache, self.extra_held = make_cache(extra, 40, 2, seed=1)
            self.sparse["extra_k_cache"] = cache
            self.sparse["extra_indices_in_kvcache"] = make_lists((b, s_q, 24), 80, seed=1)
            self.sparse["extra_topk_length"] = torch.tensor([24, 5, 0][:b], dtype=torch.int32)

    def run(self, metadata=None, num_splits=None, **changed):
        args = dict(
            q=self.q,
            k_cache=self.k_cache,
            block_table=None,
            cache_seqlens=None,
            head_dim_v=512,
            tile_scheduler_metadata=metadata if metadata is not None else get_mla_metadata()[0],
            num_splits=num_splits,
            is_fp8_kvcache=self.fp8,
            indices=self.indices,
            **self.sparse,
        )
        args.update(changed)
        return flash_mla_with_kvcache(**args)

    def expected(self):
        b, s_q, h_q, _ = self.q.shape
        out = torch.zeros(b, s_q, h_q, 512, dtype=torch.float64)
        lse = torch.zeros(b, h_q, s_q, dtype=torch.float64)
        for r in range(b):
            for i in range(s_q):
                length = self.sparse.get("topk_length", None)
                mine = self.indices[r, i][: None if length is None else int(length[r])]
                keys = [self.held[mine[mine >= 0].long()]]
                if self.extra_held is not None:
                    mine = self.sparse["extra_indices_in_kvcache"][r, i][: int(self.sparse["extra_topk_length"][r])]
                    keys.append(self.extra_held[mine[mine >= 0].long()])
                out[r, i], lse[r, :, i], _ = expected(
                    self.q[r, i], torch.cat(keys), self.scale, self.sparse.get("attn_sink")
                )
        return out, lse


def assert_matches(p, got):
    out, lse = p.expected()
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    assert_near(got[0], out)
    assert_near(got[1], lse, 1e-6, 8.01 / 65536)


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("kind, extra", [("v32", None), ("v4", None), ("v32", "v32"), ("v4", "v4"), ("rows", "v32")])
def test_sparse_decode_against_torch(kind, extra, sink, lengths):
    p = Sparse(kind, extra=extra, sink=sink, lengths=lengths)
    assert_matches(p, p.run())


@pytest.mark.parametrize("h_q", [1, 16, 100, 128])
@pytest.mark.parametrize("kind", ["v32", "v4", "rows512"])
def test_any_number_of_heads(kind, h_q):
    p = Sparse(kind, b=1, s_q=1, h_q=h_q, topk=130)
    assert_matches(p, p.run())


def test_the_form_of_september_2025():
    p = Sparse("v32", b=3, s_q=1, h_q=16)
    lengths = torch.full((3,), 320, dtype=torch.int32)
    metadata, num_splits = get_mla_decoding_metadata(lengths, 16, 1, 16, True, 70)
    assert metadata.shape[1] == 8 and num_splits.shape == (4,)
    block_table = torch.zeros(3, 20, dtype=torch.int32)
    out = flash_mla_with_kvcache(
        p.q, p.k_cache, block_table, lengths, 512, metadata, num_splits, None, False, True, p.indices
    )
    assert_matches(p, out)


@pytest.mark.parametrize("view", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_any_dtype_of_one_byte(view):
    p = Sparse("v32")
    p.k_cache = p.k_cache.view(view)
    assert_matches(p, p.run())


def test_the_lazy_object_is_filled_and_refuses_other_shapes():
    p = Sparse("v32")
    meta = get_mla_metadata()[0]
    with pytest.raises(ValueError, match="^causal is True"):
        p.run(meta, causal=True)
    assert meta == FlashMLASchedMeta()
    p.run(meta)
    assert meta.have_initialized and meta.config.topk == 70 and meta.config.is_fp8_kvcache
    p.run(meta)
    with pytest.raises(ValueError, match="filled for"):
        Sparse("v32", topk=71).run(meta)


@pytest.mark.parametrize(
    "message, change",
    [
        (r"^q is None", dict(q=None)),
        (r"^k_cache is None|^k_cache is of type", dict(k_cache=None)),
        (r"^k_cache.shape\[3\] is 576, expected 656 or 584", dict(k_cache=torch.zeros(2, 4, 1, 576, dtype=torch.bfloat16))),
        (r"^head_dim_v is 576, expected 512", dict(head_dim_v=576)),
        (r"^indices is int64", dict(indices=torch.zeros(3, 2, 70, dtype=torch.int64))),
        (r"^indices\[0\]\[0\]\[0\] is 320, expected -1 or 0 to 319", dict(indices=torch.full((3, 2, 70), 320, dtype=torch.int32))),
        (r"^indices.shape\[0\] is 2", dict(indices=torch.zeros(2, 2, 70, dtype=torch.int32))),
        (r"^topk_length\[1\] is 71", dict(topk_length=torch.tensor([0, 71, 0], dtype=torch.int32))),
        (r"^attn_sink.shape\[0\] is 5", dict(attn_sink=torch.zeros(5))),
        (r"^extra_k_cache is not given", dict(extra_topk_length=torch.zeros(3, dtype=torch.int32))),
        (r"^softmax_scale is", dict(softmax_scale="wide")),
    ],
)
def test_errors_name_the_argument(message, change):
    with pytest.raises(ValueError, match=message):
        Sparse("v32").run(**change)


def test_sparse_arguments_without_indices_are_refused():
    p = Sparse("v32", sink=True)
    with pytest.raises(ValueError, match="^attn_sink is given, expected None without indices"):
        p.run(indices=None)


def test_the_reference_and_the_batch_invariant_mode():
    p = Sparse("v4", extra="v4", sink=True)
    kwargs = {k: v for k, v in p.sparse.items()}
    out, lse = flash_mla_kernels.sparse_decode(p.q, p.k_cache, p.indices, reference=True, **kwargs)
    assert (out - p.expected()[0]).abs().max() < 1e-6
    got = flash_mla_kernels.sparse_decode(p.q, p.k_cache, p.indices, fixed_split_blocks=1, **kwargs)
    assert_matches(p, got)


@pytest.mark.parametrize("kind", ["rows", "rows512", "v32"])
@pytest.mark.parametrize("h_q", [3, 64])
def test_sparse_prefill_against_torch(kind, h_q):
    g = torch.Generator().manual_seed(3)
    n, topk, d_qk = 9, 128, FORMATS[kind][1]
    cache, held = make_cache(kind, 300, 1)
    q = (torch.randn(n, h_q, d_qk, generator=g) / 2).bfloat16()
    indices = make_lists((n, 1, topk), 340)  # beyond the tokens: none
    indices[4] = -1
    length = torch.randint(0, topk + 1, (n,), generator=g, dtype=torch.int32)
    sink = torch.randn(h_q, generator=g)
    for kwargs in ({}, {"attn_sink": sink, "topk_length": length}):
        out, max_logits, lse = flash_mla_sparse_fwd(q, cache.view(300, 1, -1), indices, 0.07, **kwargs)
        for i in range(n):
            mine = indices[i, 0][: int(length[i]) if kwargs else None]
            mine = mine[(mine >= 0) & (mine < 300)].long()
            want = expected(q[i], held[mine], 0.07, kwargs.get("attn_sink"))
            assert_near(out[i], want[0], 8e-4, 3.01 / 128)
            assert_near(lse[i], want[1], 1e-6, 2.01 / 65536)
            assert_near(max_logits[i], want[2], 1e-6, 2.01 / 65536)


def test_sparse_prefill_of_pages():
    g = torch.Generator().manual_seed(3)
    cache, held = make_cache("v32", 12, 16)
    q = (torch.randn(5, 4, 576, generator=g) / 2).bfloat16()
    block_table = torch.randperm(12, generator=g).to(torch.int32).view(2, 6)
    seqlens = torch.tensor([96, 50], dtype=torch.int32)
    indices = torch.randint(-1, 120, (5, 40), generator=g, dtype=torch.int32)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    out, _, lse = flash_mla_kernels.sparse_prefill(
        q, cache, indices, cu_seqlens_q=starts, block_table=block_table, cache_seqlens=seqlens
    )
    for i in range(5):
        r = 0 if i < 2 else 1
        mine = indices[i][(indices[i] >= 0) & (indices[i] < seqlens[r])].long()
        slots = block_table[r].long()[mine // 16] * 16 + mine % 16
        want = expected(q[i], held[slots], 576**-0.5)
        assert_near(out[i], want[0])
        assert_near(lse[i], want[1], 1e-6, 8.01 / 65536)


@pytest.mark.parametrize("generation", ["2025-09", "today"])
@pytest.mark.parametrize("kind", ["v32", "v4", "tensor"])
def test_dense_decode_over_fp8_caches(kind, generation):
    g = torch.Generator().manual_seed(3)
    width, d_qk = FORMATS[kind]
    cache, held = make_cache(kind, 20, 16)
    lengths = torch.tensor([96, 0, 33], dtype=torch.int32)
    table = torch.randperm(20, generator=g).to(torch.int32)[:18].view(3, 6)
    table = torch.cat([table, torch.full((3, 1), -1, dtype=torch.int32)], dim=1)
    q = (torch.randn(3, 2, 8, d_qk, generator=g) / 2).bfloat16()
    if kind == "tensor":
        parts, num_splits = flash_mla_kernels.build_decode_schedule(lengths, 2)
        out, lse = flash_mla_kernels.dense_fp8_decode(
            q, cache, table, lengths, parts, num_splits, causal=True, kv_scale=TENSOR_SCALE
        )
    else:
        plan = get_mla_metadata() if generation == "today" else get_mla_decoding_metadata(lengths, 16, 1, 8, True)
        out, lse = flash_mla_with_kvcache(
            q, cache, table, lengths, 512, *plan, causal=True, is_fp8_kvcache=True
        )
    for r, n in enumerate(lengths.tolist()):
        slots = table[r].long()[torch.arange(n) // 16] * 16 + torch.arange(n) % 16
        for i in range(2):
            want = expected(q[r, i], held[slots[: max(n - 1 + i, 0)]], d_qk**-0.5)
            assert_near(out[r, i], want[0])
            assert_near(lse[r, :, i], want[1], 1e-6, 8.01 / 65536)


def test_append_is_torchs_quantiser_and_gather_reads_it_back():
    g = torch.Generator().manual_seed(3)
    x = (torch.randn(40, 576, generator=g) / 10).bfloat16()
    cache = torch.full((5, 16, 1, 656), 255, dtype=torch.uint8).view(torch.float8_e4m3fn)
    slots = torch.randperm(80, generator=g)[:40]
    slots[7] = -1
    flash_mla_kernels.append_kv(x[:, :512].contiguous(), x[:, 512:].contiguous(), slots, cache)
    values, scale = quantise_tile(x[:, :512].float().view(40, 4, 128))
    got = cache.view(torch.uint8).view(80, 656)
    written = torch.zeros(80, dtype=torch.bool)
    for i, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        written[slot] = True
        assert torch.equal(got[slot, :512], values[i].reshape(512).view(torch.uint8))
        assert torch.equal(got[slot, 512:528], scale[i].reshape(4).contiguous().view(torch.uint8))
        assert torch.equal(got[slot, 528:], x[i, 512:].contiguous().view(torch.uint8))
    assert (got[~written] == 255).all()
    rows = flash_mla_kernels.gather_kv(cache, slots, dtype="bfloat16")
    assert rows.dtype == torch.bfloat16 and (rows[7] == 0).all()
    want = torch.cat([(values.float() * scale).view(40, 512).bfloat16(), x[:, 512:]], dim=1)
    want[7] = 0
    assert torch.equal(rows, want)


@pytest.mark.parametrize("recipe", ["flash_mla", "vllm", "sglang", "indexer_pow2", "indexer", "vllm_indexer"])
def test_quantisers(recipe):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(30, 256, generator=g) * torch.logspace(-8, 2, 30)[:, None]
    x[5] = 0
    values, scales = flash_mla_kernels.quantise_fp8(x, 128, recipe)
    tiles = x.view(30, 2, 128)
    amax = tiles.abs().amax(-1)
    want = {
        "flash_mla": torch.pow(2, (amax / 448).clamp_min(1e-4).log2().ceil()),
        "vllm": (amax / 448).clamp_min(torch.finfo(torch.float32).tiny),
        "sglang": amax / 448,
        "indexer_pow2": torch.pow(2, (amax.clamp_min(1e-4) / 448).log2().ceil()),
        "indexer": amax.clamp_min(1e-4) / 448,
        "vllm_indexer": torch.pow(2, (amax.clamp_min(1e-10) / 448).log2().ceil()),
    }[recipe]
    assert torch.equal(scales, want)
    divided = tiles * (1 / scales)[..., None] if recipe == "sglang" else tiles / scales[..., None]
    divided[amax == 0] = 0
    assert torch.equal(values, divided.clamp(-448, 448).to(torch.float8_e4m3fn).view(30, 256).view(torch.uint8))
    with pytest.raises(ValueError, match='^recipe is "none", expected one of: flash_mla'):
        flash_mla_kernels.quantise_fp8(x, 128, "none")


def test_numpy_in_numpy_out():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    p = Sparse("v32", b=1, s_q=1)
    q = p.q.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    out, lse = flash_mla_kernels.sparse_decode(q, p.k_cache.view(torch.uint8).numpy(), p.indices.numpy())
    assert isinstance(out, np.ndarray) and out.dtype == ml_dtypes.bfloat16
    want = p.expected()
    assert_near(torch.from_numpy(out.view(np.int16)).view(torch.bfloat16), want[0])
    assert_near(torch.from_numpy(lse), want[1], 1e-6, 8.01 / 65536)
