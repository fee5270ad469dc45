"""Attention over keys and values of their own, with torch's attention as the oracle."""

import numpy as np
import pytest
import torch

from flash_mla_kernels import gqa_attention, gqa_schedule


def problem(lengths, h_q=8, h_kv=2, d=64, page_size=16, dtype=torch.bfloat16, seed=0):
    """Queries, pools of keys and values in pages, a block table, and each sequence's keys and values."""
    g = torch.Generator().manual_seed(seed)
    pages = [-(-k // page_size) for _, k in lengths]
    order = torch.randperm(sum(pages), generator=g).int()
    pools = [torch.full((sum(pages), page_size, h_kv, d), float("nan"), dtype=dtype) for _ in range(2)]
    table = torch.full((len(lengths), max(pages)), -1, dtype=torch.int32)
    rows, next_page = [], 0
    for i, (_, k) in enumerate(lengths):
        own = order[next_page : next_page + pages[i]]
        next_page += pages[i]
        table[i, : pages[i]] = own
        rows.append([torch.randn(k, h_kv, d, generator=g).to(dtype) for _ in range(2)])
        for pool, x in zip(pools, rows[-1]):
            for j in range(k):
                pool[own[j // page_size], j % page_size] = x[j]
    q = torch.randn(sum(n for n, _ in lengths), h_q, d, generator=g).to(dtype)
    return q, *pools, table, rows


def by_torch(q, rows, lengths, causal=False, window=-1, scale=None):
    out, first = [], 0
    for (n, m), (k, v) in zip(lengths, rows):
        p = torch.arange(m - n, m).unsqueeze(1)
        j = torch.arange(m).unsqueeze(0)
        seen = torch.ones(n, m, dtype=torch.bool)
        if causal:
            seen &= j <= p
        if window >= 0:
            seen &= j >= p - window
        group = q.shape[1] // k.shape[1]
        x = [t.double().transpose(0, 1) for t in (q[first : first + n], k, v)]
        x[1], x[2] = (t.repeat_interleave(group, 0) for t in x[1:])
        out.append(torch.nn.functional.scaled_dot_product_attention(*x, attn_mask=seen, scale=scale).transpose(0, 1))
        first += n
    return torch.cat(out)


def starts(counts):
    return torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)


LENGTHS = [(1, 70), (9, 33), (1, 16), (20, 20)]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pages_of_a_mixed_batch(dtype, split):
    q, k, v, table, rows = problem(LENGTHS, dtype=dtype)
    seqlens = torch.tensor([m for _, m in LENGTHS], dtype=torch.int32)
    schedule = gqa_schedule(seqlens, 8, 2, 64) if split else None
    options = dict(cu_seqlens_q=starts([n for n, _ in LENGTHS]), seqlens_k=seqlens, causal=True, schedule=schedule)
    out, lse = gqa_attention(q, k, v, block_table=table, **options)
    expected = by_torch(q, rows, LENGTHS, causal=True)
    torch.testing.assert_close(out.double(), expected, atol=2e-2 if dtype == torch.bfloat16 else 2e-3, rtol=0)
    assert lse.shape == (8, q.shape[0]) and lse.dtype == torch.float32
    # The same pages as CSR, and as a pool in HND order.
    counts = [-(-m // 16) for _, m in LENGTHS]
    indices = torch.cat([table[i, :n] for i, n in enumerate(counts)])
    csr, _ = gqa_attention(q, k, v, page_indptr=starts(counts), page_indices=indices, **options)
    hnd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    swapped, _ = gqa_attention(q, *hnd, block_table=table, **options)
    assert torch.equal(csr, out) and torch.equal(swapped, out)


def test_ragged_with_a_window():
    q, _, _, _, rows = problem(LENGTHS, dtype=torch.float32)
    k, v = (torch.cat([r[i] for r in rows]) for i in range(2))
    cu_q, cu_k = (starts(x) for x in zip(*LENGTHS))
    out, _ = gqa_attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=True, window=(5, -1))
    torch.testing.assert_close(out.double(), by_torch(q, rows, LENGTHS, True, 5), atol=1e-5, rtol=0)


def test_numpy_and_a_mask():
    q, _, _, _, rows = problem([(3, 10)], dtype=torch.float32)
    k, v = (x.numpy() for x in rows[0])
    bits = np.tril(np.ones((3, 10), dtype=bool), 7)
    packed = np.packbits(bits.reshape(-1), bitorder="little")
    ends = np.array([0, len(packed)], dtype=np.int32)
    one = np.array([0, 10], dtype=np.int32)
    out, lse = gqa_attention(q.numpy(), k, v, cu_seqlens_k=one, mask=packed, mask_indptr=ends)
    assert isinstance(out, np.ndarray) and isinstance(lse, np.ndarray)
    causal, _ = gqa_attention(q, *rows[0], cu_seqlens_k=torch.from_numpy(one), causal=True)
    np.testing.assert_array_equal(out, causal.numpy())


def test_cap_alibi_and_sinks_against_the_definition():
    q, k, v, table, _ = problem(LENGTHS, dtype=torch.float32)
    options = dict(
        cu_seqlens_q=starts([n for n, _ in LENGTHS]),
        seqlens_k=torch.tensor([m for _, m in LENGTHS], dtype=torch.int32),
        block_table=table,
        soft_cap=2.0,
        alibi_slopes=torch.linspace(0.1, 1, 8),
        sinks=torch.linspace(-1, 2, 8),
        causal=True,
    )
    out, lse = gqa_attention(q, k, v, **options)
    expected_out, expected_lse = gqa_attention(q, k, v, reference=True, **options)
    torch.testing.assert_close(out, expected_out, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=0)


def test_out_is_written_and_returned():
    q, k, v, table, _ = problem([(1, 20)])
    out = torch.empty_like(q)
    options = dict(seqlens_k=torch.tensor([20], dtype=torch.int32), block_table=table)
    same, _ = gqa_attention(q, k, v, out=out, **options)
    assert same is out and torch.equal(out, gqa_attention(q, k, v, **options)[0])


def test_compiled():
    q, k, v, table, _ = problem([(1, 20), (1, 40)])
    lengths = torch.tensor([20, 40], dtype=torch.int32)

    def step(q):
        return gqa_attention(q, k, v, seqlens_k=lengths, block_table=table, causal=True)[0] + 1

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q), step(q))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(seqlens_k=None), "seqlens_k is not given"),
        (dict(window=(-2, -1)), "window_left is -2"),
        (dict(soft_cap=float("nan")), "soft_cap is nan"),
        (dict(softmax_scale=-1.0), "softmax_scale is -1"),
        (dict(max_seqlen_q=True), "max_seqlen_q is True"),
        (dict(block_table=torch.full((1, 2), 99, dtype=torch.int32)), "block_table of sequence 0, page 0, is 99"),
        (dict(sinks=torch.zeros(3)), r"sinks.shape\[0\] is 3, expected q.shape\[1\] \(h_q\) = 8"),
    ],
)
def test_bad_input(change, message):
    q, k, v, table, _ = problem([(1, 20)])
    options = dict(seqlens_k=torch.tensor([20], dtype=torch.int32), block_table=table)
    with pytest.raises(ValueError, match=message):
        gqa_attention(q, k, v, **{**options, **change})
