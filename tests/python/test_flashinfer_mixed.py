"""Decoding sequences and prompts in one batch, and shared prefixes, under FlashInfer's names."""

import math

import pytest
import torch
from test_flashinfer import H_KV, H_Q, PAGE, D, attention, close, joined, pages

from flash_mla_kernels import flashinfer, gqa_attention, gqa_schedule

BUFFER = torch.empty(1, dtype=torch.uint8)


def ints(*x):
    return torch.tensor(x, dtype=torch.int32)


def starts_of(counts):
    return torch.tensor([0, *counts]).cumsum(0).int()


@pytest.mark.parametrize("queries", [[1, 1, 3, 40, 20], [40, 1, 1, 20, 3], [1, 2, 1, 4, 16], [0, 0, 0, 0, 0]])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_batch_attention(queries, layout):
    lengths = [200, 33, 70, 40, 90]
    cache, (indptr, indices, _), rows = pages(lengths, layout)
    q = torch.randn(sum(queries), H_Q, D).bfloat16()
    wrapper = flashinfer.BatchAttention(layout, "cpu")
    tables = (starts_of(queries), indptr, indices, torch.tensor(lengths))
    wrapper.plan(*tables, H_Q, H_KV, D, D, PAGE, causal=True)
    expected = joined(attention(x, *r, causal=True) for x, r in zip(q.split(queries), rows))
    out, lse = torch.empty_like(q), torch.empty(len(q), H_Q)
    got = wrapper.run(q, cache, out, lse)
    assert got[0] is out and got[1] is lse
    close(got, expected)


def test_batch_attention_caps_scores_as_planned():
    cache, (indptr, indices, _), rows = pages([50])
    q = torch.randn(1, H_Q, D).bfloat16()
    wrapper = flashinfer.BatchAttention("NHD", "cpu")
    wrapper.plan(ints(0, 1), indptr, indices, ints(50), H_Q, H_KV, D, D, PAGE, sm_scale=0.5, logits_soft_cap=3.0)
    out, _ = wrapper.run(q, cache, logits_soft_cap=3.0)
    k, v = (x.double().transpose(0, 1).repeat_interleave(H_Q // H_KV, 0) for x in rows[0])
    scores = 3 * torch.tanh(q.double().transpose(0, 1) @ k.transpose(1, 2) * 0.5 / 3)
    torch.testing.assert_close(out.double(), (scores.softmax(-1) @ v).transpose(0, 1), atol=2e-2, rtol=0)
    with pytest.raises(ValueError, match="logits_soft_cap is 4.0, expected 3.0"):
        wrapper.run(q, cache, logits_soft_cap=4.0)
    with pytest.raises(NotImplementedError, match="k_scale is 0.5"):
        wrapper.run(q, cache, k_scale=0.5)


def test_pod():
    lengths = [9, 30]
    cache, tables, rows = pages(lengths)
    _, _, ((k, v),) = pages([20], seed=1)
    q_p, q_d = torch.randn(12, H_Q, D).bfloat16(), torch.randn(2, H_Q, D).bfloat16()
    wrapper = flashinfer.PODWithPagedKVCacheWrapper(BUFFER)
    wrapper.plan(*tables, H_Q, H_KV, D, PAGE)
    decodes = joined(attention(q_d[i : i + 1], *rows[i]) for i in range(2))
    prompt, decoded = wrapper.run(q_p, k, v, q_d, cache, causal_p=True, return_lse_p=True, return_lse_d=True)
    close(prompt, attention(q_p, k, v, causal=True))
    close(decoded, decodes)
    assert torch.equal(wrapper.run(q_p, k, v, q_d, cache, causal_p=True)[1], decoded[0])
    with pytest.raises(ValueError, match="window_left_d is 5, expected -1 as in plan"):
        wrapper.run(q_p, k, v, q_d, cache, window_left_d=5)


def test_batch_pod():
    prompts, decodes = [20, 9], [30, 7, 12]
    cache_p, tables_p, rows_p = pages(prompts)
    cache_d, tables_d, rows_d = pages(decodes, seed=1)
    queries = [15, 9]
    q_p, q_d = torch.randn(24, H_Q, D).bfloat16(), torch.randn(3, H_Q, D).bfloat16()
    wrapper = flashinfer.BatchPODWithPagedKVCacheWrapper(BUFFER)
    wrapper.plan(starts_of(queries), *tables_p, ints(0, 1, 2, 3), *tables_d, H_Q, H_KV, D, PAGE)
    of_prompts, of_decodes = wrapper.run(q_p, cache_p, q_d, cache_d, causal_p=True, return_lse=True)
    close(of_prompts, joined(attention(x, *r, causal=True) for x, r in zip(q_p.split(queries), rows_p)))
    close(of_decodes, joined(attention(q_d[i : i + 1], *rows_d[i]) for i in range(3)))
    assert torch.equal(wrapper.run(q_p, cache_p, q_d, cache_d, causal_p=True)[0], of_prompts[0])


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_shared_prefixes(layout):
    own = [5, 9]
    cache, tables, rows = pages(own, layout)
    _, _, ((k, v),) = pages([23], seed=1)
    shared = [k, v] if layout == "NHD" else [x.transpose(0, 1).contiguous() for x in (k, v)]
    whole = [[torch.cat([x, y]) for x, y in zip((k, v), r)] for r in rows]
    q = torch.randn(2, H_Q, D).bfloat16()
    decode = flashinfer.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(BUFFER, layout)
    decode.begin_forward(*tables, H_Q, H_KV, D, PAGE)
    expected, _ = joined(attention(q[i : i + 1], *whole[i]) for i in range(2))
    torch.testing.assert_close(decode.forward(q, *shared, cache).double(), expected, atol=3e-2, rtol=0)

    queries = [3, 9]
    q = torch.randn(12, H_Q, D).bfloat16()
    prefill = flashinfer.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(BUFFER, layout)
    prefill.begin_forward(starts_of(queries), *tables, H_Q, H_KV, D, PAGE)
    expected, _ = joined(attention(x, *r, causal=True) for x, r in zip(q.split(queries), whole))
    got = prefill.forward(q, *shared, cache, causal=True)
    torch.testing.assert_close(got.double(), expected, atol=3e-2, rtol=0)


def test_decoding_for_graphs_has_the_bits_of_plain_decoding():
    cache, tables, _ = pages([9, 30])
    q = torch.randn(2, H_Q, D).bfloat16()
    results = []
    for wrapper in (
        flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BUFFER, *tables),
        flashinfer.BatchDecodeWithPagedKVCacheWrapper(BUFFER),
    ):
        wrapper.plan(*tables, H_Q, H_KV, D, PAGE)
        results.append(wrapper.run(q, cache))
    assert torch.equal(*results)


def test_one_plan_and_one_call_in_our_own_words():
    queries, lengths = [1, 2, 30], [150, 80, 40]
    cache, (indptr, indices, _), rows = pages(lengths)
    q, seqlens = torch.randn(33, H_Q, D).bfloat16(), torch.tensor(lengths, dtype=torch.int32)
    schedule = gqa_schedule(seqlens[:2], H_Q, H_KV, D, max_seqlen_q=2)
    tables = dict(cu_seqlens_q=starts_of(queries), seqlens_k=seqlens, page_indptr=indptr, page_indices=indices)
    options = dict(causal=True, schedule=schedule, max_seqlen_q=30, num_scheduled=2, max_scheduled_q=2)
    out, lse = gqa_attention(q, cache[:, 0], cache[:, 1], **tables, **options)
    expected = joined(attention(x, *r, causal=True) for x, r in zip(q.split(queries), rows))
    close((out, lse.t() * math.log2(math.e)), expected)
    with pytest.raises(ValueError, match="num_scheduled is 4, expected up to b = 3"):
        gqa_attention(q, cache[:, 0], cache[:, 1], **tables, **dict(options, num_scheduled=4))
