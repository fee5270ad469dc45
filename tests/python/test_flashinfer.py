"""FlashInfer's vocabulary (flash_mla_kernels.flashinfer), with torch's attention as the oracle."""

import math

import pytest
import torch

from flash_mla_kernels import flashinfer

H_Q, H_KV, D, PAGE = 8, 2, 64, 4


def pages(lengths, layout="NHD", seed=0):
    """A cache of pages, its CSR tables, and each sequence's keys and values."""
    g = torch.Generator().manual_seed(seed)
    counts = [-(-n // PAGE) for n in lengths]
    indices = torch.randperm(sum(counts), generator=g).int()
    indptr = torch.tensor([0, *counts]).cumsum(0).int()
    last = torch.tensor([(n - 1) % PAGE + 1 if n > 0 else 0 for n in lengths], dtype=torch.int32)
    shape = (sum(counts), 2, PAGE, H_KV, D) if layout == "NHD" else (sum(counts), 2, H_KV, PAGE, D)
    cache = torch.full(shape, float("nan"), dtype=torch.bfloat16)
    rows = [[torch.randn(n, H_KV, D, generator=g).bfloat16() for _ in range(2)] for n in lengths]
    key, value = (torch.cat([r[i] for r in rows]) for i in range(2))
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    sequences, positions = flashinfer.get_batch_indices_positions(starts, torch.tensor(lengths), sum(lengths))
    flashinfer.append_paged_kv_cache(key, value, sequences, positions, cache, indices, indptr, last, layout)
    return cache, (indptr, indices, last), rows


def attention(q, k, v, causal=False, seen=None, slopes=None):
    """out and lse in base 2 of queries (n, H_Q, D) over (m, H_KV, D), in float64."""
    n, m, group = q.shape[0], k.shape[0], H_Q // H_KV
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) / math.sqrt(D)
    distance = torch.arange(m - n, m).unsqueeze(1) - torch.arange(m)
    if slopes is not None:
        scores -= slopes.double()[:, None, None] * distance.abs()
    if causal:
        scores = scores.masked_fill(distance < 0, -math.inf)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    out = scores.softmax(-1) @ v.repeat_interleave(group, 0)
    return out.transpose(0, 1), scores.logsumexp(-1).t() * math.log2(math.e)


def close(got, expected):
    for x, y, tolerance in zip(got, expected, (2e-2, 1e-4)):
        torch.testing.assert_close(x.double(), y, atol=tolerance, rtol=0)


def joined(parts):
    return tuple(torch.cat(x) for x in zip(*parts))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("mode", ["NONE", "ALIBI"])
def test_batch_decode(layout, mode):
    lengths = [5, 17, 1, 130]
    cache, tables, rows = pages(lengths, layout)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(1, dtype=torch.uint8), layout)
    wrapper.plan(*tables, H_Q, H_KV, D, PAGE, pos_encoding_mode=mode)
    q = torch.randn(4, H_Q, D).bfloat16()
    slopes = torch.tensor([2.0**-i for i in range(1, 9)]) if mode == "ALIBI" else None
    expected = joined(attention(q[i : i + 1], *rows[i], slopes=slopes) for i in range(4))
    close(wrapper.run(q, cache, return_lse=True), expected)
    close(wrapper.run_return_lse(q, tuple(cache.unbind(1))), expected)
    assert torch.equal(wrapper.run(q, cache), wrapper.run_return_lse(q, cache)[0])


def test_a_sequence_without_pages_is_empty_in_flashinfers_way():
    cache, tables, _ = pages([3, 0])
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(1, dtype=torch.uint8))
    wrapper.plan(*tables, H_Q, H_KV, D, PAGE)
    out, lse = wrapper.run(torch.randn(2, H_Q, D).bfloat16(), cache, return_lse=True)
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all() and lse[0].isfinite().all()


def test_a_plan_for_graphs_is_refilled_in_place():
    cache, tables, rows = pages([9, 4])
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(1, dtype=torch.uint8), use_cuda_graph=True)
    wrapper.plan(*tables, H_Q, H_KV, D, PAGE)
    before = wrapper._tensors["seqlens_k"].data_ptr()
    indptr, indices, last = tables
    wrapper.plan(
        torch.tensor([0, 2, 3], dtype=torch.int32),
        torch.cat([indices[:2], indices[3:]]),
        torch.tensor([4, 4]),
        H_Q,
        H_KV,
        D,
        PAGE,
    )
    assert wrapper._tensors["seqlens_k"].data_ptr() == before
    q = torch.randn(2, H_Q, D).bfloat16()
    rows[0] = [x[:8] for x in rows[0]]
    close(wrapper.run(q, cache, return_lse=True), joined(attention(q[i : i + 1], *rows[i]) for i in range(2)))


@pytest.mark.parametrize("causal", [False, True])
def test_batch_prefill_over_pages_and_ragged(causal):
    queries, lengths = [3, 1, 8], [10, 7, 8]
    cache, tables, rows = pages(lengths)
    q = torch.randn(sum(queries), H_Q, D).bfloat16()
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    expected = joined(attention(x, *r, causal=causal) for x, r in zip(q.split(queries), rows))
    paged = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(1, dtype=torch.uint8))
    paged.plan(starts, *tables, H_Q, H_KV, D, PAGE, causal=causal)
    close(paged.run(q, cache, return_lse=True), expected)
    ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(torch.empty(1, dtype=torch.uint8))
    ragged.plan(starts, torch.tensor([0, *lengths]).cumsum(0).int(), H_Q, H_KV, D, causal=causal)
    k, v = (torch.cat([r[i] for r in rows]) for i in range(2))
    close(ragged.run(q, k, v, return_lse=True), expected)


def test_custom_masks():
    queries, lengths = [3, 2], [10, 7]
    cache, tables, rows = pages(lengths)
    q = torch.randn(5, H_Q, D).bfloat16()
    masks = [torch.rand(n, m, generator=torch.Generator().manual_seed(n)) < 0.7 for n, m in zip(queries, lengths)]
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(1, dtype=torch.uint8))
    flat = torch.cat([m.flatten() for m in masks])
    wrapper.plan(torch.tensor([0, 3, 5]), *tables, H_Q, H_KV, D, PAGE, custom_mask=flat, causal=True)
    expected = joined(attention(x, *r, seen=m) for x, r, m in zip(q.split(queries), rows, masks))
    close(wrapper.run(q, cache, return_lse=True), expected)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_single_calls(layout):
    _, _, rows = pages([20])
    k, v = rows[0]
    given = rows[0] if layout == "NHD" else [x.transpose(0, 1).contiguous() for x in rows[0]]
    q = torch.randn(3, H_Q, D).bfloat16()
    out, lse = flashinfer.single_decode_with_kv_cache(q[0], *given, kv_layout=layout, return_lse=True)
    close((out.unsqueeze(0), lse.unsqueeze(0)), attention(q[:1], k, v))
    got = flashinfer.single_prefill_with_kv_cache(q, *given, causal=True, kv_layout=layout, return_lse=True)
    close(got, attention(q, k, v, causal=True))


def test_cascade_is_attention_over_all_levels():
    # Two sequences over a shared prefix of two whole pages, with suffixes of 3 and 5 tokens.
    prefix, suffixes = 2 * PAGE, [3, 5]
    cache, (indptr, indices, _), rows = pages([prefix, *suffixes])
    q = torch.randn(3, H_Q, D).bfloat16()
    queries = [1, 2]
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, torch.empty(1, dtype=torch.uint8))
    ints = lambda *x: torch.tensor(x, dtype=torch.int32)  # noqa: E731
    wrapper.plan(
        [ints(0, 3), ints(0, 1, 3)],
        [indptr[:2], indptr[1:] - indptr[1]],
        [indices[: indptr[1]], indices[indptr[1] :]],
        [ints(PAGE), ints(3, 1)],
        H_Q,
        H_KV,
        D,
        PAGE,
        causal=True,
    )
    whole = [[torch.cat([a, b]) for a, b in zip(rows[0], suffix)] for suffix in rows[1:]]
    expected = joined(attention(x, *r, causal=True) for x, r in zip(q.split(queries), whole))
    torch.testing.assert_close(wrapper.run(q, cache).double(), expected[0], atol=3e-2, rtol=0)


def test_merging():
    _, _, (first, second, third) = pages([6, 9, 2])
    q = torch.randn(4, H_Q, D).bfloat16()
    states = [tuple(x.float() for x in attention(q, *r)) for r in (first, second, third)]
    whole = attention(q, *(torch.cat([r[i] for r in (first, second, third)]) for i in range(2)))
    v, s = (torch.stack(x, 1) for x in zip(*states))
    close(flashinfer.merge_states(v, s), whole)
    a, b = states[:2]
    expected = flashinfer.merge_state(*a, *b)
    v, s = a[0].clone(), a[1].clone()
    flashinfer.merge_state_in_place(v, s, *b, mask=torch.tensor([True, False, True, True]))
    assert torch.equal(v[0], expected[0][0]) and torch.equal(v[1], a[0][1]) and torch.equal(s[1], a[1][1])
    none = (torch.zeros_like(a[0]), torch.full_like(a[1], -math.inf))
    assert (flashinfer.merge_state(*none, *none)[1] == -math.inf).all()
    torch.testing.assert_close(flashinfer.merge_state(*none, *a), a)


def test_what_is_not_offered_is_named():
    with pytest.raises(NotImplementedError, match="BlockSparseAttentionWrapper"):
        flashinfer.BlockSparseAttentionWrapper  # noqa: B018
    with pytest.raises(AttributeError, match="nonsense"):
        flashinfer.nonsense  # noqa: B018
    k = torch.zeros(3, H_KV, D)
    with pytest.raises(NotImplementedError, match="pos_encoding_mode is 'ROPE_LLAMA'"):
        flashinfer.single_decode_with_kv_cache(torch.zeros(H_Q, D), k, k, pos_encoding_mode="ROPE_LLAMA")
    with pytest.raises(NotImplementedError, match="k_scale is 0.5"):
        flashinfer.single_decode_with_kv_cache(torch.zeros(H_Q, D), k, k, k_scale=0.5)
    with pytest.raises(ValueError, match="kv_layout is 'HDN'"):
        flashinfer.single_decode_with_kv_cache(torch.zeros(H_Q, D), k, k, kv_layout="HDN")
