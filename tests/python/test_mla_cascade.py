"""Latent attention behind a shared prefix, with the whole context in float64 by torch as the oracle."""

import pytest
import torch

from flash_mla_kernels import expand_latents, mla_cascade

H, NOPE, ROPE, V, RANK, PAGE = 4, 128, 64, 128, 512, 16


def problem(prefix, lengths, s_q, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    contexts = [random(n, RANK + ROPE).to(dtype) for n in (prefix, *lengths)]
    counts = [-(-len(x) // PAGE) for x in contexts]
    order = torch.randperm(sum(counts), generator=g).int()
    cache = torch.full((sum(counts), PAGE, 1, RANK + ROPE), float("nan"), dtype=dtype)
    tables = order.split(counts)
    for rows, pages in zip(contexts, tables):
        for t, row in enumerate(rows):
            cache[pages[t // PAGE], t % PAGE, 0] = row
    table = torch.full((len(lengths), max(counts[1:])), -1, dtype=torch.int32)
    for i, pages in enumerate(tables[1:]):
        table[i, : len(pages)] = pages
    q = (random(len(lengths), s_q, H, NOPE + ROPE) * 0.3).to(dtype)
    kv_b = (random(H, NOPE + V, RANK) / RANK**0.5).to(dtype)
    return q, kv_b, cache, tables[0], table, contexts


def whole_context(q, kv_b, contexts, scale, causal):
    outs, sums = [], []
    for i, own in enumerate(contexts[1:]):
        latents = torch.cat((contexts[0], own)).double()
        expanded = torch.einsum("tc,hdc->htd", latents[:, :RANK], kv_b.double())
        keys = torch.cat((expanded[..., :NOPE], latents[:, RANK:].expand(H, -1, -1)), -1)
        scores = q[i].double().transpose(0, 1) @ keys.transpose(1, 2) * scale
        if causal:
            n, m = scores.shape[1:]
            scores = scores.masked_fill(torch.ones(n, m).triu(m - n + 1).bool(), -torch.inf)
        outs.append((scores.softmax(-1) @ expanded[..., NOPE:]).transpose(0, 1))
        sums.append(scores.logsumexp(-1))
    return torch.stack(outs), torch.stack(sums)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("s_q", [1, 2])
def test_is_attention_over_the_whole_context(dtype, s_q):
    lengths = [30, 7, 90]
    q, kv_b, cache, pages, table, contexts = problem(100, lengths, s_q, dtype)
    k, v = expand_latents(cache, pages, 100, kv_b, NOPE)
    assert k.shape == (100, H, NOPE + ROPE) and v.shape == (100, H, V) and k.dtype == dtype
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    given = dict(softmax_scale=0.1, causal=True)
    out, lse = mla_cascade(q, k, v, kv_b, cache, table, seqlens, **given)
    expected, sums = whole_context(q, kv_b, contexts, 0.1, True)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(lse.double(), sums, atol=tolerance, rtol=0)
    buffer = torch.empty_like(out)
    again, _ = mla_cascade(q, k, v, kv_b, cache, table, seqlens, out=buffer, num_threads=1, **given)
    assert again is buffer


def test_errors_name_the_argument():
    q, kv_b, cache, pages, table, _ = problem(20, [5], 1, torch.float32)
    k, v = expand_latents(cache, pages, 20, kv_b, NOPE)
    seqlens = torch.tensor([5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"k_cache.shape\[3\] is 576, expected rank \+ d_rope = 564"):
        mla_cascade(q, k, v, kv_b[:, :, :500], cache, table, seqlens)
    with pytest.raises(ValueError, match="prefix_k is bfloat16"):
        mla_cascade(q, k.bfloat16(), v, kv_b, cache, table, seqlens)
    with pytest.raises(ValueError, match=r"pages.shape\[0\] is 2, expected at least 3"):
        expand_latents(cache, pages, 40, kv_b, NOPE)
    with pytest.raises(ValueError, match="kv_b has shape"):
        expand_latents(cache, pages, 20, kv_b, 256)
