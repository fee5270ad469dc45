"""The calls seen by torch.compile, torch.export and fake tensors: one operator each, whose results are those of the call."""

import subprocess
import sys

import pytest
import torch
from conftest import Problem
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import flash_mla_kernels
from flash_mla_kernels import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_decoding_metadata, get_mla_metadata


def layers(q, k_cache, block_table, cache_seqlens):
    """Two layers of a step, as a model calls them."""
    plan, _ = get_mla_metadata(cache_seqlens, q.shape[2], 1)
    first, _ = flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, 512, plan, causal=True)
    out, lse = flash_mla_with_kvcache(
        q * 2, k_cache, block_table, cache_seqlens, 512, plan, softmax_scale=0.1, causal=True
    )
    return first + out, lse


def with_tensors(q, k_cache, block_table, cache_seqlens):
    plan = get_mla_decoding_metadata(cache_seqlens, q.shape[1] * q.shape[2], 1)
    return flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, 512, *plan, causal=True)


def into_out(q, k_cache, block_table, cache_seqlens):
    out = torch.zeros(q.shape[0] + 1, q.shape[1], q.shape[2], 512, dtype=q.dtype)
    _, lse = flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, 512, get_mla_metadata()[0], causal=True, out=out[1:]
    )
    return out + 1, lse


def in_two_parts(q, k_cache, block_table, cache_seqlens):
    plan, tables = get_mla_metadata()[0], (k_cache, block_table, cache_seqlens)
    return flash_mla_with_kvcache(q[..., :512], *tables, 512, plan, causal=True, q_rope=q[..., 512:])


def inputs(lengths=(300, 2, 0), h_q=16, **options):
    p = Problem(list(lengths), s_q=2, h_q=h_q, **options)
    return p.q, p.k_cache, p.block_table, p.cache_seqlens


def same(got, expected):
    return all(torch.equal(x, y) for x, y in zip(got, expected))


@pytest.mark.parametrize("function", [layers, with_tensors, into_out, in_two_parts])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_is_one_graph_and_has_the_same_bits(function, backend):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for lengths in [(300, 2, 0), (70, 200, 1)]:
        args = inputs(lengths)
        assert same(compiled(*args), function(*args))


def test_inductor_compiles_a_step():
    torch._dynamo.reset()
    args = inputs()
    assert same(torch.compile(layers, fullgraph=True)(*args), layers(*args))


def test_one_graph_serves_every_batch():
    torch._dynamo.reset()
    seen = []

    def backend(graph, example_inputs):
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(layers, fullgraph=True, dynamic=True, backend=backend)
    for lengths in [(300, 2, 9), (70, 200, 1, 30), (5, 6, 7, 8, 900)]:  # 3 unlike s_q: torch takes equal sizes for one
        args = inputs(lengths)
        assert same(compiled(*args), layers(*args))
    assert len(seen) == 1
    called = [str(node.target) for node in seen[0].graph.nodes if "flash_mla_kernels" in str(node.target)]
    assert called == ["flash_mla_kernels.plan.default"] + ["flash_mla_kernels.dense_decode.default"] * 2


def test_an_object_planned_outside_is_filled_by_a_compiled_layer_and_used_by_the_next():
    torch._dynamo.reset()

    def layer(q, k_cache, block_table, cache_seqlens, plan):
        return flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, 512, plan)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    args, plan = inputs(), get_mla_metadata()[0]
    first = compiled(*args, plan)
    assert plan.have_initialized and plan.num_splits.shape == (4,)
    schedule = plan.tile_scheduler_metadata
    assert same(compiled(*args, plan), first) and plan.tile_scheduler_metadata is schedule
    assert same(layer(*args, plan), first)
    with pytest.raises(Exception, match="filled for"):
        compiled(*inputs(h_q=8), plan)


def test_a_bad_argument_of_a_compiled_call_is_named():
    torch._dynamo.reset()
    q, k_cache, block_table, lengths = inputs()
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="^block_table"):
        compiled(q, k_cache, block_table.clone().fill_(1 << 20), lengths)


def test_export():
    class Step(torch.nn.Module):
        def forward(self, q, k_cache, block_table, cache_seqlens):
            return layers(q, k_cache, block_table, cache_seqlens)

    args = inputs()
    b = torch.export.Dim("b", min=2, max=64)
    exported = torch.export.export(Step(), args, dynamic_shapes=({0: b}, {}, {0: b}, {0: b}))
    more = inputs((10, 20, 30, 40), seed=1)
    q, k_cache, block_table, lengths = more
    # The pool and the table's width were not declared to vary.
    wide = torch.zeros_like(args[2]).repeat(2, 1)[:4]
    wide[:, :3] = block_table[:, :3]
    pool = torch.zeros_like(args[1])
    pool[: len(k_cache)] = k_cache[: len(pool)]
    wide.clamp_(0, len(pool) - 1)
    step = (q, pool, wide, lengths)
    assert same(exported.module()(*step), layers(*step))


@pytest.mark.parametrize("function", [layers, with_tensors, into_out])
def test_fake_tensors_get_the_shapes_and_dtypes_of_the_call(function):
    args = inputs()
    expected = function(*args)
    with FakeTensorMode() as mode:
        got = function(*(mode.from_tensor(x) for x in args))
    for x, y in zip(got, expected):
        assert type(x).__name__ == "FakeTensor" and (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


def test_make_fx_records_the_operators():
    args = inputs()
    graph = make_fx(layers)(*args)
    assert "flash_mla_kernels.dense_decode" in graph.code and same(graph(*args), layers(*args))


def sparse_inputs(dtype=torch.bfloat16, tokens=200):
    g = torch.Generator().manual_seed(3)
    rows = (torch.randn(tokens, 576, generator=g) / 10).to(dtype)
    cache = torch.zeros(4, 64, 1, 656, dtype=torch.uint8)
    flash_mla_kernels.append_kv(rows[:, :512], rows[:, 512:], torch.arange(tokens), cache)
    q = (torch.randn(3, 1, 16, 576, generator=g) / 10).to(dtype)
    indices = torch.randint(-1, tokens, (3, 1, 70), generator=g, dtype=torch.int32)
    return q, cache, indices, rows


def sparse_step(q, cache, indices, rows):
    plan = get_mla_metadata()[0]
    out, lse = flash_mla_with_kvcache(q, cache, None, None, 512, plan, is_fp8_kvcache=True, indices=indices)
    again, _ = flash_mla_with_kvcache(q, cache, None, None, 512, plan, is_fp8_kvcache=True, indices=indices)
    prefill = flash_mla_sparse_fwd(q[:, 0], rows[:, None], indices, 0.1)
    table, lengths = torch.arange(4, dtype=torch.int32).view(1, 4).repeat(3, 1), torch.full((3,), 150).int()
    dense = flash_mla_with_kvcache(q, cache, table, lengths, 512, get_mla_metadata()[0], is_fp8_kvcache=True)
    return out, lse, again, *prefill, *dense


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_sparse_and_fp8_calls_compile(backend):
    torch._dynamo.reset()
    args = sparse_inputs()
    expected = sparse_step(*args)
    assert same(torch.compile(sparse_step, fullgraph=True, backend=backend)(*args), expected)
    with FakeTensorMode() as mode:
        for x, y in zip(sparse_step(*(mode.from_tensor(x) for x in args)), expected):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)


def test_the_operators_keep_what_torch_asks_of_them():
    from flash_mla_kernels import _torch

    q, k_cache, block_table, lengths = inputs()
    plan = (lengths, 2, 16, 1, False)
    torch.library.opcheck(_torch.plan, plan)
    parts, num_splits = _torch.plan(*plan)
    out, lse = torch.empty(3, 2, 16, 512, dtype=q.dtype), torch.empty(3, 16, 2)
    torch.library.opcheck(_torch.dense_decode, (q, k_cache.nan_to_num(), block_table, lengths, parts, num_splits, out, lse))
    q, cache, indices, rows = sparse_inputs()
    out, lse = torch.empty(3, 1, 16, 512, dtype=q.dtype), torch.empty(3, 16, 1)
    arguments = (q, cache, indices, None, None, None, None, None, out, lse, 0.1, 0, 0, 1.0, 1.0, False)
    torch.library.opcheck(_torch.sparse_decode, arguments)


def test_a_plain_call_goes_past_the_operators():
    """They cost several microseconds: nothing is registered before something needs it."""
    code = """
import sys, torch
import flash_mla_kernels as f
q, k = torch.randn(1, 1, 4, 576), torch.randn(1, 64, 1, 576)
f.flash_mla_with_kvcache(q, k, torch.zeros(1, 1).int(), torch.tensor([9]).int(), 512, f.get_mla_metadata()[0])
print("flash_mla_kernels._torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
