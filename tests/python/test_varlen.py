"""FlashMLA's dense prefill against torch, in its three forms."""

import pytest
import torch

from flash_mla_kernels import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

LENGTHS_Q, LENGTHS_K = [5, 0, 70, 1], [9, 12, 70, 0]


def ends(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def tensors(lengths_q, lengths_k, heads, heads_k, d, d_v, dtype=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(lengths_q), heads, d, generator=g).to(dtype)
    k = torch.randn(sum(lengths_k), heads_k, d, generator=g).to(dtype)
    v = torch.randn(sum(lengths_k), heads_k, d_v, generator=g).to(dtype)
    return q, k, v


def reference(q, k, v, lengths_q, lengths_k, scale, causal):
    """In float64, a sequence at a time."""
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    lse = torch.full(q.shape[:2], float("inf"), dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    at_q = at_k = 0
    for n, m in zip(lengths_q, lengths_k):
        if n and m:
            rows_q = q[at_q : at_q + n].double()
            rows_k, rows_v = (x[at_k : at_k + m].double().repeat_interleave(group, 1) for x in (k, v))
            s = torch.einsum("ihd,jhd->hij", rows_q, rows_k) * scale
            if causal:
                s.masked_fill_(~torch.ones(n, m, dtype=torch.bool).tril(m - n), float("-inf"))
            out[at_q : at_q + n] = torch.einsum("hij,jhd->ihd", s.softmax(-1), rows_v)
            lse[at_q : at_q + n] = s.logsumexp(-1).T
        at_q, at_k = at_q + n, at_k + m
    return out, lse


def assert_close(got, expected):
    (out, lse), (expected_out, expected_lse) = got, expected
    assert out.shape == expected_out.shape and lse.shape == expected_lse.shape and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected_out, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads, heads_k, d, d_v", [(4, 4, 192, 128), (8, 2, 128, 128), (3, 3, 64, 64)])
def test_it_is_attention(heads, heads_k, d, d_v, causal):
    q, k, v = tensors(LENGTHS_Q, LENGTHS_K, heads, heads_k, d, d_v)
    limits = (ends(LENGTHS_Q), ends(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K))
    got = flash_attn_varlen_func(q, k, v, *limits, causal=causal)
    assert_close(got, reference(q, k, v, LENGTHS_Q, LENGTHS_K, d**-0.5, causal))
    scaled = flash_attn_varlen_func(q, k, v, *limits, 0.0, 0.05, causal, deterministic=True, is_varlen=False)
    assert_close(scaled, reference(q, k, v, LENGTHS_Q, LENGTHS_K, 0.05, causal))


def test_packed_forms_are_the_same():
    d, d_v = 192, 128
    q, k, v = tensors(LENGTHS_Q, LENGTHS_Q, 4, 4, d, d_v)
    limits = ends(LENGTHS_Q)
    longest = max(LENGTHS_Q)
    out, lse = flash_attn_varlen_func(q, k, v, limits, limits, longest, longest, causal=True)
    for packed in (
        flash_attn_varlen_qkvpacked_func(torch.cat((q, k, v), -1), limits, longest, d, causal=True),
        flash_attn_varlen_kvpacked_func(q, torch.cat((k, v), -1), limits, limits, longest, longest, d, causal=True),
    ):
        assert torch.equal(packed[0], out) and torch.equal(packed[1], lse)


def test_what_is_refused():
    q, k, v = tensors([3], [3], 2, 2, 64, 64)
    limits = (ends([3]), ends([3]), 3, 3)
    with pytest.raises(NotImplementedError, match="dropout_p is 0.1, expected 0"):
        flash_attn_varlen_func(q, k, v, *limits, 0.1)
    with pytest.raises(NotImplementedError, match="k requires a gradient, expected none: there is no backward pass"):
        flash_attn_varlen_func(q, k.clone().requires_grad_(), v, *limits)
    with torch.no_grad():
        flash_attn_varlen_func(q, k.clone().requires_grad_(), v, *limits)
    with pytest.raises(NotImplementedError, match="qkv requires a gradient"):
        flash_attn_varlen_qkvpacked_func(torch.cat((q, k, v), -1).requires_grad_(), ends([3]), 3, 64)
    with pytest.raises(ValueError, match=r"head_dim_qk is 96, expected less than qkv.shape\[2\] / 2 = 192 / 2"):
        flash_attn_varlen_qkvpacked_func(torch.cat((q, k, v), -1), ends([3]), 3, 96)
    with pytest.raises(ValueError, match="max_seqlen_qo is -1, expected an integer >= 0"):
        flash_attn_varlen_func(q, k, v, *limits[:2], -1, 3)
