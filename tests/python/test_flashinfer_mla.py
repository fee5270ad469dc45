"""FlashInfer's names for latent attention (flash_mla_kernels.flashinfer), against the definition in float64."""

import math

import pytest
import torch

from flash_mla_kernels import flashinfer

HEADS, LATENT, ROPE, SCALE = 16, 512, 64, 0.1
LENGTHS = [70, 1, 0, 33]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def caches(lengths, page_size, together, seed=1):
    """Pages of latents and of rotary keys, written by append, with NaN where nothing is; CSR tables; each sequence's rows."""
    g = generator(seed)
    counts = [-(-n // page_size) for n in lengths]
    indptr = torch.tensor([0, *counts]).cumsum(0).int()
    indices = torch.randperm(sum(counts) + 2, generator=g)[: sum(counts)].int()
    shape = (sum(counts) + 2, page_size)
    if together:
        whole = torch.full((*shape, LATENT + ROPE), math.nan, dtype=torch.bfloat16)
        ckv, kpe = whole[..., :LATENT], whole[..., LATENT:]
    else:
        ckv, kpe = (torch.full((*shape, d), math.nan, dtype=torch.bfloat16) for d in (LATENT, ROPE))
    rows = [(torch.randn(n, LATENT + ROPE, generator=g) / 2).bfloat16() for n in lengths]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    sequences, positions = flashinfer.get_batch_indices_positions(starts, torch.tensor(lengths), sum(lengths))
    last = torch.tensor([(n - 1) % page_size + 1 if n else 0 for n in lengths], dtype=torch.int32)
    appended = torch.cat(rows)
    flashinfer.append_paged_mla_kv_cache(
        appended[:, :LATENT], appended[:, LATENT:], sequences, positions, ckv, kpe, indices, indptr, last
    )
    return (ckv, kpe), (indptr, indices), rows


def reference(q, rows, counts, causal):
    out = torch.zeros(*q.shape[:2], LATENT, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    at = 0
    for n, keys in zip(counts, rows):
        m = len(keys)
        if n and m:
            s = torch.einsum("ihd,jd->hij", q[at : at + n].double(), keys.double()) * SCALE
            if causal:
                s.masked_fill_(~torch.ones(n, m, dtype=torch.bool).tril(m - n), -math.inf)
            p = s.softmax(-1).nan_to_num()  # a query before all keys
            out[at : at + n] = torch.einsum("hij,jd->ihd", p, keys[:, :LATENT].double())
            lse[at : at + n] = s.logsumexp(-1).T * math.log2(math.e)
        at += n
    return out, lse


def wrapper(counts, tables, page_size, causal, lengths=LENGTHS):
    made = flashinfer.BatchMLAPagedAttentionWrapper(torch.empty(1, dtype=torch.uint8), backend="fa3")
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    made.plan(
        *(starts, *tables, torch.tensor(lengths, dtype=torch.int32), HEADS, LATENT, ROPE, page_size, causal, SCALE),
        *(torch.bfloat16, torch.bfloat16),
    )
    return made


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("counts", [[1] * 4, [3] * 4, [5, 1, 2, 0], [0, 0, 0, 7]])
@pytest.mark.parametrize("page_size, causal", [(1, True), (16, True), (64, False)])
def test_it_is_attention(counts, page_size, causal, together):
    pages, tables, rows = caches(LENGTHS, page_size, together)
    q = (torch.randn(sum(counts), HEADS, LATENT + ROPE, generator=generator()) / 4).bfloat16()
    expected, expected_lse = reference(q, rows, counts, causal and max(counts) > 1)
    planned = wrapper(counts, tables, page_size, causal)
    out, lse = planned.run(q[..., :LATENT], q[..., LATENT:], *pages, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32 and lse.is_contiguous()
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-3, rtol=1e-3)
    given, given_lse = torch.empty_like(out), torch.empty_like(lse)
    again = planned.run(q[..., :LATENT], q[..., LATENT:], *pages, out=given, lse=given_lse, return_lse=True)
    assert again[0] is given and again[1] is given_lse and torch.equal(given, out) and torch.equal(given_lse, lse)
    assert torch.equal(planned.run(q[..., :LATENT], q[..., LATENT:], *pages), out)


def test_caches_apart_and_together_have_the_same_bits():
    q = torch.randn(4, HEADS, LATENT + ROPE, generator=generator()).bfloat16()
    found = []
    for together in (True, False):
        pages, tables, _ = caches(LENGTHS, 16, together)
        found.append(wrapper([1] * 4, tables, 16, True).run(q[..., :LATENT], q[..., LATENT:], *pages))
    assert torch.equal(*found)


def test_no_queries():
    pages, tables, _ = caches(LENGTHS, 16, True)
    out, lse = wrapper([0] * 4, tables, 16, True).run(
        torch.empty(0, HEADS, LATENT).bfloat16(), torch.empty(0, HEADS, ROPE).bfloat16(), *pages, return_lse=True
    )
    assert out.shape == (0, HEADS, LATENT) and lse.shape == (0, HEADS)


def test_what_is_refused():
    pages, tables, _ = caches(LENGTHS, 16, True)
    with pytest.raises(NotImplementedError, match="use_cuda_graph is True"):
        flashinfer.BatchMLAPagedAttentionWrapper(torch.empty(1), use_cuda_graph=True)
    with pytest.raises(RuntimeError, match=r"run\(\) before plan\(\)"):
        flashinfer.BatchMLAPagedAttentionWrapper(torch.empty(1)).run(None, None, *pages)
    with pytest.raises(ValueError, match="kv_indptr has 5 elements, expected qo_indptr's 4"):
        wrapper([1] * 3, tables, 16, True)
    with pytest.raises(ValueError, match="kv_indices has 1 elements, expected kv_indptr's"):
        wrapper([1] * 4, (tables[0], tables[1][:1]), 16, True)
    planned = wrapper([1] * 4, tables, 16, True)
    q = torch.zeros(4, HEADS, LATENT).bfloat16()
    with pytest.raises(ValueError, match=r"q_pe has shape \(4, 16, 512\), expected \(4, 16, 64\) as planned"):
        planned.run(q, q, *pages)
    with pytest.raises(ValueError, match=r"kpe_cache has shape .*, expected \(num_pages, 16, 64\) as planned"):
        planned.run(q, torch.zeros(4, HEADS, ROPE).bfloat16(), pages[0], pages[0])
