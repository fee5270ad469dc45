import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import Problem, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

import flash_mla_kernels
from flash_mla_kernels import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_decoding_metadata, get_mla_metadata


def decode(p, generation="tensors"):
    if generation == "today":
        metadata, num_splits = get_mla_metadata()
    elif generation == "2025-09":
        metadata, num_splits = get_mla_metadata(p.cache_seqlens, p.s_q * p.h_q // p.h_kv, p.h_kv, p.h_q, False, None)
    elif generation == "2025-02":
        metadata, num_splits = get_mla_metadata(p.cache_seqlens, p.s_q * p.h_q // p.h_kv, p.h_kv)
    else:
        metadata, num_splits = get_mla_decoding_metadata(p.cache_seqlens, p.s_q * p.h_q // p.h_kv, p.h_kv, p.h_q)
    return flash_mla_with_kvcache(*p.args(), metadata, num_splits, p.softmax_scale, p.causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("generation", ["2025-02", "2025-09", "tensors", "today"])
@pytest.mark.parametrize(
    "shape",
    [
        dict(lengths=[1000, 1, 0, 64, 65], h_q=16),
        dict(lengths=[300, 2], s_q=3, h_q=6, h_kv=2, causal=True),
        dict(lengths=[129], s_q=2, h_q=9, page_size=16, softmax_scale=0.1352338),
        dict(lengths=[50, 7], h_q=3, d_qk=72, d_v=64, page_size=5),
    ],
)
def test_against_torch(shape, generation, dtype):
    p = Problem(dtype=dtype, **shape)
    assert_close(*decode(p, generation), *p.expected(), dtype)


def test_unabsorbed_formulation_agrees_with_the_reference():
    """Expanding the latent with random W_UK and W_UV and plain multi-head attention gives the same numbers."""
    p = Problem([37], h_q=4, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    nope, rope, heads, dv = 128, 64, 4, 128
    w_uk = torch.randn(heads, nope, 512, generator=g, dtype=torch.float64) / 20
    w_uv = torch.randn(heads, dv, 512, generator=g, dtype=torch.float64) / 20
    q_nope = torch.randn(1, 1, heads, nope, generator=g, dtype=torch.float64)
    q_rope = torch.randn(1, 1, heads, rope, generator=g, dtype=torch.float64)
    scale = 2.0**-4  # the C++ API takes the scale as float32: one that loses nothing
    p.q = torch.cat([torch.einsum("bshn,hnl->bshl", q_nope, w_uk), q_rope], dim=-1).contiguous()
    out, lse = flash_mla_kernels.reference_dense_decode(*p.args(), softmax_scale=scale)
    absorbed = torch.einsum("bshl,hvl->bshv", out, w_uv)

    keys = p.keys(0)[:, 0]
    k = torch.cat([torch.einsum("kl,hnl->hkn", keys[:, :512], w_uk), keys[None, :, 512:].expand(heads, -1, -1)], dim=-1)
    v = torch.einsum("kl,hvl->hkv", keys[:, :512], w_uv)
    q = torch.cat([q_nope, q_rope], dim=-1)[0, 0]
    s = torch.einsum("hd,hkd->hk", q, k) * scale
    expected = torch.einsum("hk,hkv->hv", torch.softmax(s, dim=-1), v)
    assert (absorbed[0, 0] - expected).abs().max() < 1e-10
    assert (lse[0, :, 0] - torch.logsumexp(s, dim=-1)).abs().max() < 1e-10


def test_numpy_in_numpy_out():
    p = Problem([100, 3], dtype=torch.float32)
    arrays = [x.numpy() for x in p.args()[:4]]
    metadata, num_splits = get_mla_decoding_metadata(arrays[3], 4, 1)
    out, lse = flash_mla_with_kvcache(*arrays, 512, metadata, num_splits)
    assert all(isinstance(x, np.ndarray) for x in (metadata, num_splits, out, lse))
    assert_close(torch.from_numpy(out), torch.from_numpy(lse), *p.expected(), torch.float32)


def test_numpy_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    p = Problem([100, 3])
    q, k = (x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) for x in (p.q, p.k_cache))
    metadata, num_splits = get_mla_decoding_metadata(p.cache_seqlens.numpy(), 4, 1)
    out, lse = flash_mla_with_kvcache(
        q, k, p.block_table.numpy(), p.cache_seqlens.numpy(), 512, metadata, num_splits
    )
    assert out.dtype == ml_dtypes.bfloat16
    assert_close(
        torch.from_numpy(out.view(np.int16)).view(torch.bfloat16), torch.from_numpy(lse), *p.expected(), torch.bfloat16
    )


class OnlyDlpack:
    """A tensor of some other framework."""

    def __init__(self, x):
        self.x, self.shape, self.dtype = x, tuple(x.shape), str(x.dtype).rsplit(".", 1)[-1]

    def __dlpack__(self, **kwargs):
        return self.x.__dlpack__()

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


def test_anything_with_dlpack():
    p = Problem([70], dtype=torch.float32)
    args = [OnlyDlpack(x) for x in p.args()[:4]]
    metadata, num_splits = get_mla_decoding_metadata(args[3], 4, 1)
    out, lse = flash_mla_with_kvcache(*args, 512, metadata, num_splits)
    assert_close(torch.as_tensor(out), torch.as_tensor(lse), *p.expected(), torch.float32)


class NothingButDlpack:
    """As the protocol has it: two methods, and neither a shape nor a dtype."""

    def __init__(self, x):
        self._x = x

    def __dlpack__(self, **kwargs):
        return self._x.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self._x.__dlpack_device__()


@pytest.mark.parametrize("generation", ["tensors", "today"])
def test_nothing_but_dlpack(generation):
    p = Problem([70], dtype=torch.float32)
    args = [NothingButDlpack(x) for x in p.args()[:4]]
    metadata, num_splits = get_mla_decoding_metadata(args[3], 4, 1) if generation == "tensors" else get_mla_metadata()
    out, lse = flash_mla_with_kvcache(*args, 512, metadata, num_splits)
    assert_close(torch.as_tensor(out), torch.as_tensor(lse), *p.expected(), torch.float32)
    out, lse = flash_mla_kernels.reference_dense_decode(*args, 512)
    assert (torch.as_tensor(out) - p.expected()[0]).abs().max() < 1e-6


def test_dlpack_of_bfloat16_gives_numpy_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    p = Problem([70])
    args = [NothingButDlpack(x) for x in p.args()[:4]]
    out, _ = flash_mla_with_kvcache(*args, 512, get_mla_metadata()[0])
    assert out.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("wrap", [lambda x: x, NothingButDlpack])
def test_read_only_inputs(wrap):
    p = Problem([100, 3], dtype=torch.float32)
    arrays = [x.numpy().copy() for x in p.args()[:4]]
    for x in arrays:
        x.flags.writeable = False
    args = [wrap(x) for x in arrays]
    out, lse = flash_mla_with_kvcache(*args, 512, *get_mla_decoding_metadata(args[3], 4, 1))
    assert out.flags.writeable
    assert_close(torch.from_numpy(out), torch.from_numpy(lse), *p.expected(), torch.float32)


@pytest.mark.parametrize(
    "name, change",
    [
        ("q", lambda x: x.astype(">f4")),
        ("q", lambda x: x.astype(object)),
        ("q", lambda x: x.astype("complex64")),
        ("q", lambda x: x[::-1]),
    ],
)
def test_arrays_that_cannot_be_used_are_named(name, change):
    p = Problem([100, 3], dtype=torch.float32)
    q, *rest = [x.numpy() for x in p.args()[:4]]
    with pytest.raises(ValueError, match=f"^{name}[ .]"):
        flash_mla_with_kvcache(change(q), *rest, 512, get_mla_metadata()[0])


def test_strided_inputs():
    p = Problem([200, 90], h_q=8)
    metadata, num_splits = get_mla_decoding_metadata(p.cache_seqlens, 8, 1)
    pool = torch.full((p.k_cache.shape[0], 2, 64, 1, 576), float("nan"), dtype=torch.bfloat16)
    pool[:, 0] = p.k_cache
    q = torch.empty(2, 8, 1, 576, dtype=torch.bfloat16).transpose(1, 2)
    q.copy_(p.q)
    out, lse = flash_mla_with_kvcache(q, pool[:, 0], p.block_table, p.cache_seqlens, 512, metadata, num_splits)
    assert_close(out, lse, *p.expected(), torch.bfloat16)


def test_empty_batch():
    p = Problem([])
    out, lse = decode(p)
    assert out.shape == (0, 1, 4, 512) and lse.shape == (0, 4, 1)


def test_repeats_are_bit_equal():
    p = Problem([3000, 100, 5], h_q=32)
    first = decode(p)
    for _ in range(5):
        again = decode(p)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_lazy_object_is_filled_once_and_refuses_other_shapes():
    p = Problem([100, 20])
    meta, none = get_mla_metadata()
    assert isinstance(meta, FlashMLASchedMeta) and none is None and not meta.have_initialized
    flash_mla_with_kvcache(*p.args(), meta)
    assert meta.have_initialized and meta.num_splits.shape == (3,)
    schedule = meta.tile_scheduler_metadata
    flash_mla_with_kvcache(*p.args(), meta)
    assert meta.tile_scheduler_metadata is schedule
    other = Problem([100, 20], h_q=8)
    with pytest.raises(ValueError, match="filled for"):
        flash_mla_with_kvcache(*other.args(), meta)
    with pytest.raises(ValueError, match="filled for"):
        flash_mla_with_kvcache(*p.args(), meta, causal=True)


def test_the_object_is_returned_whatever_get_mla_metadata_is_given():
    """As vLLM calls it, and as nobody should."""
    lengths = torch.tensor([100, 20], dtype=torch.int32)
    for args, kwargs in [((), {}), ((lengths, 16, 1), dict(is_fp8_kvcache=False)), ((None, "x"), dict(anything=1))]:
        first, second = get_mla_metadata(*args, **kwargs), get_mla_metadata(*args, **kwargs)
        assert first == (FlashMLASchedMeta(), None) and first[0] is not second[0]


def test_a_plan_may_be_copied_into_other_tensors():
    """As SGLang does for its graphs: buffers of the largest size, of which a step fills the first rows."""
    p = Problem([1000, 20], h_q=16)
    metadata, num_splits = get_mla_decoding_metadata(p.cache_seqlens, 16, 1)
    rows, splits = torch.full((200, 8), -1, dtype=torch.int32), torch.full((65,), -1, dtype=torch.int32)
    rows[: len(metadata)].copy_(metadata)
    splits[: len(num_splits)].copy_(num_splits)
    out, lse = flash_mla_with_kvcache(*p.args(), rows[: len(metadata)], splits[: len(num_splits)])
    assert_close(out, lse, *p.expected(), torch.bfloat16)


def test_a_plan_for_bits_that_do_not_depend_on_the_batch():
    p = Problem([1000, 20, 700], h_q=16)

    def run(requests):
        q, k_cache, table, lengths = (x if x is p.k_cache else x[requests] for x in p.args()[:4])
        plan = get_mla_decoding_metadata(lengths, 16, 1, fixed_split_blocks=2)
        return flash_mla_kernels.dense_decode(
            q, k_cache, table, lengths, 512, *plan, fixed_split_blocks=2, token_rows=True
        )

    out, lse = run([0, 1, 2])
    assert_close(out, lse, *p.expected(), torch.bfloat16)
    for i in range(3):
        alone, lse_alone = run([i])
        assert torch.equal(alone[0], out[i]) and torch.equal(lse_alone[0], lse[i])
    with pytest.raises(ValueError, match="fixed_split_blocks is -1, expected an integer >= 0"):
        get_mla_decoding_metadata(p.cache_seqlens, 16, 1, fixed_split_blocks=-1)


@pytest.mark.parametrize("generation", ["tensors", "today"])
@pytest.mark.parametrize("numpy", [False, True])
def test_out_is_written_to_and_returned(numpy, generation):
    p = Problem([1000, 0, 20], s_q=2, h_q=16, dtype=torch.float32)
    args = [x.numpy() if numpy else x for x in p.args()[:4]]
    pool = torch.full((4, 2, 16, 512), float("nan"))
    out = pool[1:].numpy() if numpy else pool[1:]
    plan = get_mla_metadata() if generation == "today" else get_mla_decoding_metadata(args[3], 32, 1)
    result, lse = flash_mla_with_kvcache(*args, 512, *plan, out=out)
    assert result is out
    assert_close(pool[1:], torch.as_tensor(lse), *p.expected(), torch.float32)
    assert pool[0].isnan().all()


@pytest.mark.parametrize(
    "out, message",
    [
        (torch.empty(2, 1, 4, 511, dtype=torch.bfloat16), r"^out has shape \(2, 1, 4, 511\), expected \(2, 1, 4, 512\)"),
        (torch.empty(8, 512, dtype=torch.bfloat16), r"^out has shape \(8, 512\), expected a tensor of rank 4"),
        (torch.empty(2, 1, 4, 512), "^out.* expected .*bfloat16"),
        (torch.empty(2, 4, 1, 1024, dtype=torch.bfloat16)[..., ::2].transpose(1, 2), "^out has strides .* contiguous"),
        (np.empty((2, 1, 4, 512), dtype=np.float32), "^out is a ndarray, expected a Tensor as q is"),
        (torch.empty(2, 1, 4, 512, dtype=torch.bfloat16, device="meta"), "^out"),
        ("here", "^out"),
    ],
)
def test_a_bad_out_is_named(out, message):
    p = Problem([100, 20])
    with pytest.raises(ValueError, match=message):
        flash_mla_with_kvcache(*p.args(), get_mla_metadata()[0], out=out)


@pytest.mark.parametrize(
    "bad",
    [
        dict(block_table=None),
        dict(cache_seqlens=None),
        dict(k_cache=None),
        dict(q=None),
        dict(head_dim_v=None),
        dict(softmax_scale="wide"),
        dict(q=torch.zeros(1, 1, 4, 576, dtype=torch.bfloat16)),
        dict(cache_seqlens=torch.tensor([20, 100000], dtype=torch.int32)),
    ],
)
def test_a_refused_first_call_leaves_the_lazy_object_as_it_was(bad):
    p = Problem([100, 20])
    args = dict(zip(["q", "k_cache", "block_table", "cache_seqlens", "head_dim_v"], p.args()))
    meta = get_mla_metadata()[0]
    with pytest.raises(ValueError):
        flash_mla_with_kvcache(**{**args, **bad}, tile_scheduler_metadata=meta)
    assert meta == FlashMLASchedMeta()
    out, lse = flash_mla_with_kvcache(**args, tile_scheduler_metadata=meta)
    assert meta.have_initialized
    assert_close(out, lse, *p.expected(), torch.bfloat16)


@pytest.mark.parametrize("token_rows", [False, True])
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("block_size", [64, 16])
def test_plans_of_build_decode_schedule_decode(token_rows, step, block_size):
    p = Problem([1000, 1, 0, 300], h_q=8, s_q=2, causal=True)
    plan = dict(block_size=block_size, fixed_split_blocks=step, token_rows=token_rows)
    parts, num_splits = flash_mla_kernels.build_decode_schedule(p.cache_seqlens, 5, **plan)
    assert num_splits[-1] > 4  # something is split
    out, lse = flash_mla_kernels.dense_decode(*p.args(), parts, num_splits, causal=True, num_threads=2, **plan)
    assert_close(out, lse, *p.expected(), torch.bfloat16)


@pytest.mark.parametrize(
    "name, value",
    [("block_size", 0), ("block_size", None), ("fixed_split_blocks", -1), ("num_threads", -1), ("num_threads", "2")],
)
def test_bad_plan_options_of_a_decode_are_named(name, value):
    p = Problem([100])
    parts, num_splits = flash_mla_kernels.build_decode_schedule(p.cache_seqlens, 2)
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        flash_mla_kernels.dense_decode(*p.args(), parts, num_splits, **{name: value})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("step", [0, 2])
def test_queries_in_two_parts(step, dtype):
    p = Problem([300, 2, 0], s_q=2, h_q=16, causal=True, dtype=dtype)
    plan = flash_mla_kernels.build_decode_schedule(p.cache_seqlens, 3, fixed_split_blocks=step)
    _, *tables = p.args()
    options = dict(softmax_scale=0.1, causal=True, fixed_split_blocks=step)
    expected = flash_mla_kernels.dense_decode(p.q, *tables, *plan, **options)
    latent = p.q[..., :512].transpose(0, 2).contiguous().transpose(0, 2)
    got = flash_mla_kernels.dense_decode(latent, *tables, *plan, **options, q_rope=p.q[..., 512:])
    assert all(torch.equal(x, y) for x, y in zip(got, expected))
    if dtype == torch.float32:
        got = flash_mla_kernels.dense_decode(
            p.q[..., :512].numpy(), *tables, *plan, **options, q_rope=p.q[..., 512:].numpy()
        )
        assert isinstance(got[0], np.ndarray) and np.array_equal(got[0], expected[0].numpy())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(q_rope=torch.zeros(2, 1, 4, 64)), "q_rope is float32"),
        (dict(q_rope=torch.zeros(2, 1, 4, 32).bfloat16()), r"k_cache.shape\[3\] is 576, expected q.shape\[3\]"),
        (dict(q_rope="x"), "q_rope"),
        (dict(is_fp8_kvcache=True), "q_rope is given, expected None with is_fp8_kvcache"),
        (dict(indices=torch.zeros(2, 1, 4).int(), causal=False), "q_rope is given, expected None beside indices"),
    ],
)
def test_a_rotary_part_that_cannot_be_used_is_named(options, message):
    p = Problem([100, 20], h_q=4)
    options = {"causal": True, "q_rope": p.q[..., 512:], **options}
    _, *tables = p.args()
    with pytest.raises(ValueError, match=message):
        flash_mla_with_kvcache(p.q[..., :512], *tables, get_mla_metadata()[0], **options)


def test_a_forked_child_decodes():
    code = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from conftest import Problem
from flash_mla_kernels import flash_mla_with_kvcache, get_mla_decoding_metadata, get_mla_metadata
p = Problem([3000, 100], h_q=16)
plan = get_mla_decoding_metadata(p.cache_seqlens, 16, 1)
before = flash_mla_with_kvcache(*p.args(), *plan)
child = os.fork()
if child == 0:
    signal.alarm(60)
    lazy = flash_mla_with_kvcache(*p.args(), get_mla_metadata()[0])[0]
    same = flash_mla_with_kvcache(*p.args(), *plan)[0].equal(before[0])
    os._exit(0 if same and (lazy.float() - before[0].float()).abs().max() < 1e-2 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    here = os.path.dirname(os.path.abspath(__file__))
    subprocess.run([sys.executable, "-c", code, here], check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})


def test_schedule_of_other_lengths_is_refused():
    p = Problem([1000, 20])
    metadata, num_splits = get_mla_decoding_metadata(torch.tensor([20, 1000], dtype=torch.int32), 4, 1)
    with pytest.raises(ValueError, match="schedule"):
        flash_mla_with_kvcache(*p.args(), metadata, num_splits)


@pytest.mark.parametrize(
    "name, replacement",
    [
        ("q", lambda p: p.q.to(torch.int32)),
        ("q", lambda p: p.q[..., :500]),
        ("q", lambda p: p.q[0]),
        ("q", lambda p: p.q.transpose(2, 3)),
        ("k_cache", lambda p: p.k_cache.float()),
        ("k_cache", lambda p: p.k_cache[..., :512]),
        ("k_cache", lambda p: p.k_cache.expand(-1, -1, 3, -1)),
        ("block_table", lambda p: p.block_table.long()),
        ("block_table", lambda p: p.block_table[:1]),
        ("block_table", lambda p: p.block_table.clone().fill_(1 << 20)),
        ("block_table", lambda p: p.block_table.clone().fill_(-1)),
        ("block_table", lambda p: "pages"),
        ("cache_seqlens", lambda p: p.cache_seqlens - 1000),
        ("cache_seqlens", lambda p: p.cache_seqlens + 100000),
        ("cache_seqlens", lambda p: p.cache_seqlens.float()),
        ("cache_seqlens", lambda p: p.cache_seqlens[:1]),
        ("head_dim_v", lambda p: 0),
        ("head_dim_v", lambda p: "wide"),
        ("d_qk", lambda p: None),
        ("tile_scheduler_metadata", lambda p: torch.zeros(2, 7, dtype=torch.int32)),
        ("num_splits", lambda p: torch.zeros(9, dtype=torch.int32)),
        ("softmax_scale", lambda p: -1.0),
        ("softmax_scale", lambda p: float("nan")),
        ("softmax_scale is 'wide'", lambda p: "wide"),
        ("q is None", lambda p: None),
        ("q is of type list", lambda p: [[1.0]]),
        ("k_cache is None", lambda p: None),
        ("block_table is None", lambda p: None),
        ("cache_seqlens is None", lambda p: None),
        ("tile_scheduler_metadata is None", lambda p: None),
        ("num_splits is None", lambda p: None),
        ("head_dim_v is None", lambda p: None),
        ("head_dim_v is True", lambda p: True),
        ("head_dim_v", lambda p: 10**12),
        ("head_dim_v", lambda p: 1 << 70),
    ],
)
def test_bad_arguments_are_named(name, replacement):
    p = Problem([100, 20])
    metadata, num_splits = get_mla_decoding_metadata(p.cache_seqlens, 4, 1)
    kwargs = dict(
        q=p.q,
        k_cache=p.k_cache,
        block_table=p.block_table,
        cache_seqlens=p.cache_seqlens,
        head_dim_v=512,
        tile_scheduler_metadata=metadata,
        num_splits=num_splits,
        softmax_scale=None,
    )
    pattern = {"tile_scheduler_metadata": "parts"}.get(name, name)
    if name == "d_qk":
        kwargs["head_dim_v"] = 100
    else:
        kwargs[name.split()[0]] = replacement(p)
    with pytest.raises(ValueError, match=pattern):
        flash_mla_with_kvcache(**kwargs)


@pytest.mark.parametrize(
    "kwargs, argument",
    [
        (dict(is_fp8_kvcache=True), "k_cache"),
        (dict(indices=torch.zeros(1)), "indices"),
        (dict(attn_sink=torch.zeros(1)), "attn_sink"),
        (dict(extra_k_cache=torch.zeros(1)), "extra_k_cache"),
        (dict(topk_length=torch.zeros(1)), "topk_length"),
    ],
)
def test_arguments_of_other_modes_are_named(kwargs, argument):
    p = Problem([10])
    with pytest.raises(ValueError, match=f"^{argument}"):
        flash_mla_with_kvcache(*p.args(), get_mla_metadata()[0], None, **kwargs)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=6), st.integers(0, 10**6), st.data())
def test_permuting_the_batch_permutes_the_result(lengths, seed, data):
    p = Problem(lengths, seed=seed, dtype=torch.float32, d_qk=40, d_v=32)
    order = torch.tensor(data.draw(st.permutations(range(len(lengths)))))
    out, lse = decode(p)
    shuffled = flash_mla_with_kvcache(
        p.q[order], p.k_cache, p.block_table[order], p.cache_seqlens[order], 32, get_mla_metadata()[0]
    )
    torch.testing.assert_close(shuffled[0], out[order], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(shuffled[1], lse[order], atol=2e-6, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.lists(st.integers(0, 300), max_size=4), st.integers(0, 10**6), st.sampled_from("e2"))
def test_any_partition_of_the_keys_merges_to_the_whole(length, cuts, seed, base):
    p = Problem([length], seed=seed, dtype=torch.float32, d_qk=40, d_v=32, page_size=1)
    whole_out, whole_lse = decode(p)
    factor = 1.0 if base == "e" else 1.4426950408889634
    edges = [0] + sorted(min(c, length) for c in cuts) + [length]
    state = None
    for begin, end in zip(edges, edges[1:]):
        table = p.block_table[:, begin : max(end, begin + 1)].contiguous()
        part = torch.tensor([end - begin], dtype=torch.int32)
        out, lse = flash_mla_with_kvcache(p.q, p.k_cache, table, part, 32, get_mla_metadata()[0])
        lse = lse * factor
        state = (out, lse) if state is None else flash_mla_kernels.merge_states(*state, out, lse, base=base)
    torch.testing.assert_close(state[0], whole_out, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(state[1] / factor, whole_lse, atol=4e-6, rtol=1e-5)


def test_imports_and_runs_without_torch():
    code = """
import sys
sys.modules["torch"] = None
import numpy as np
import flash_mla_kernels
q = np.ones((1, 1, 2, 576), np.float32)
cache = np.ones((1, 64, 1, 576), np.float32)
lengths = np.array([5], np.int32)
meta, splits = flash_mla_kernels.get_mla_decoding_metadata(lengths, 2, 1)
out, lse = flash_mla_kernels.flash_mla_with_kvcache(q, cache, np.zeros((1, 1), np.int32), lengths, 512, meta, splits)
assert np.allclose(out, 1.0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gpu_tensors_are_refused_clearly():
    backends = {b["name"]: b for b in flash_mla_kernels.backends()}
    assert backends["cpu"]["available"] and backends["cpu"]["detail"]
    assert not backends["sm90"]["available"] and backends["sm90"]["detail"]
    assert flash_mla_kernels.cpu_isa()["selected"] in flash_mla_kernels.cpu_isa()["available"]


def test_integers_and_scales_of_other_kinds_are_taken():
    p = Problem([100])
    expected = decode(p)
    plan = get_mla_decoding_metadata(p.cache_seqlens, np.int64(4), np.int32(1))
    out, lse = flash_mla_with_kvcache(*p.args()[:4], np.int64(512), *plan, np.float32(576**-0.5), np.bool_(False))
    assert torch.equal(out, expected[0])
    flash_mla_with_kvcache(*p.args(), *plan, softmax_scale=torch.tensor(0.1), causal=1)


@pytest.mark.parametrize("name", ["out_a", "lse_a", "out_b", "lse_b"])
def test_missing_states_are_named(name):
    p = Problem([10])
    out, lse = decode(p)
    with pytest.raises(ValueError, match=f"{name} is None"):
        flash_mla_kernels.merge_states(**{**dict(out_a=out, lse_a=lse, out_b=out, lse_b=lse), name: None})
