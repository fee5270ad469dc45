"""The indexer's operations against torch."""

import pytest

torch = pytest.importorskip("torch")
import flash_mla_kernels  # noqa: E402


@pytest.mark.parametrize("n", [1000, 2048, 2049, 40000])
def test_top_k_selects_torchs_values(n):
    g = torch.Generator().manual_seed(n)
    logits = torch.randn(6, n, generator=g)
    logits[1] = logits[1].relu()
    logits[2] = (logits[2] * 4).round() / 4
    logits[3] = -1
    lengths = torch.full((6,), n, dtype=torch.int32)
    k = min(2048, n)
    got = flash_mla_kernels.top_k(logits, lengths, 2048)
    assert got.shape == (6, 2048) and got.dtype == torch.int32 and (got[:, k:] == -1).all()
    assert (got[:, 1:k] > got[:, : k - 1]).all()
    values = logits.gather(1, got[:, :k].long()).sort(descending=True).values
    assert torch.equal(values, logits.topk(k).values)
    # Among equals the smaller position: a stable sort.
    want = logits.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    assert torch.equal(got[:, :k].long(), want)
    assert torch.equal(got, flash_mla_kernels.top_k(logits, lengths, 2048, reference=True))


def test_top_k_of_rows_within_a_matrix_becomes_slots():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 500, generator=g)
    starts = torch.tensor([0, 10, 0, 400], dtype=torch.int32)
    lengths = torch.tensor([500, 300, 0, 100], dtype=torch.int32)
    table = torch.randperm(100, generator=g).int().view(2, 50)
    positions = flash_mla_kernels.top_k(logits, lengths, 128, row_starts=starts)
    slots = flash_mla_kernels.top_k(logits, lengths, 128, row_starts=starts, block_table=table, page_size=16)
    for i in range(4):
        valid = positions[i][positions[i] >= 0].long()
        assert len(valid) == min(128, lengths[i])
        assert torch.equal(slots[i, : len(valid)].long(), table[i // 2].long()[valid // 16] * 16 + valid % 16)
        assert (slots[i, len(valid) :] == -1).all()
        row = logits[i, starts[i] : starts[i] + lengths[i]]
        assert torch.equal(valid, row.topk(len(valid)).indices.sort().values)
    moved = flash_mla_kernels.top_k(logits, lengths, 128, row_starts=starts, offsets=starts)
    assert torch.equal(moved, torch.where(positions >= 0, positions + starts[:, None], -1))


def test_top_k_says_what_is_wrong():
    logits = torch.zeros(2, 100)
    lengths = torch.tensor([100, 101], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^lengths\[1\] is 101, expected 0 to 100"):
        flash_mla_kernels.top_k(logits, lengths, 128)
    with pytest.raises(ValueError, match="^k is 4097, expected 1 to 4096"):
        flash_mla_kernels.top_k(logits, lengths, 4097)
    with pytest.raises(ValueError, match="^lengths is int64"):
        flash_mla_kernels.top_k(logits, lengths.long(), 128)


def scores(q, k, k_scales, weights):
    """(m, n) in float64, of e4m3 queries (m, heads, d) and keys (n, d)."""
    products = torch.einsum("mhd,nd->mhn", q.double(), k.double()).relu()
    return torch.einsum("mhn,mh->mn", products, weights.double()) * k_scales.double()


def random_fp8(g, *shape):
    return (torch.randn(*shape, generator=g) * 8).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("dim", [64, 128])
def test_mqa_logits(dim):
    g = torch.Generator().manual_seed(dim)
    q, k = random_fp8(g, 7, 32, dim), random_fp8(g, 200, dim)
    k_scales, weights = torch.rand(200, generator=g) / 10, torch.randn(7, 32, generator=g)
    ks = torch.tensor([0, 0, 50, 3, 199, 10, 200], dtype=torch.int32)
    ke = torch.tensor([200, 1, 150, 3, 200, 190, 200], dtype=torch.int32)
    got = flash_mla_kernels.fp8_mqa_logits(q, (k, k_scales), weights, ks, ke)
    j = torch.arange(200)
    inside = (j >= ks[:, None]) & (j < ke[:, None])
    want = scores(q, k, k_scales, weights).masked_fill(~inside, float("-inf"))
    assert torch.equal(got == float("-inf"), ~inside)
    assert (got[inside] - want[inside]).abs().max() < 1e-5 * want[inside].abs().max()
    exact = flash_mla_kernels.fp8_mqa_logits(q, (k, k_scales), weights, ks, ke, reference=True)
    assert torch.allclose(exact, want, rtol=1e-12)
    narrow = flash_mla_kernels.fp8_mqa_logits(q, (k, k_scales), weights, ks, ke, compressed_width=200)
    for i in range(7):
        assert torch.equal(narrow[i, : ke[i] - ks[i]], got[i, ks[i] : ke[i]])
    chosen = flash_mla_kernels.mqa_top_k(q, (k, k_scales), weights, ks, ke, 128, absolute=True, logits_bytes=1000)
    lengths = (ke - ks).int()
    assert torch.equal(chosen, flash_mla_kernels.top_k(got, lengths, 128, row_starts=ks, offsets=ks))


def test_quantised_keys_and_queries_give_the_models_scores():
    """Rotated, quantised and scored: near the scores of the unquantised rows, and the paged form of the ragged ones."""
    g = torch.Generator().manual_seed(5)
    b, next_n, heads, dim, page_size = 3, 2, 64, 128, 64
    lengths = torch.tensor([300, 2, 129], dtype=torch.int32)
    keys = torch.randn(431, dim, generator=g).bfloat16()
    queries = torch.randn(b * next_n, heads, dim, generator=g).bfloat16()
    weights = torch.randn(b * next_n, heads, generator=g)
    table = torch.full((b, 5), -1, dtype=torch.int32)
    pages = torch.randperm(12, generator=g).int().tolist()
    for r, n in enumerate(lengths.tolist()):
        for block in range(-(-n // page_size)):
            table[r, block] = pages.pop()
    cache = torch.full((12, page_size, 1, dim + 4), 255, dtype=torch.uint8)
    starts = [0, 300, 302]
    slots = []
    for r, n in enumerate(lengths.tolist()):
        p = torch.arange(n)
        slots.append(table[r].long()[p // page_size] * page_size + p % page_size)
    flash_mla_kernels.append_index_keys(keys, torch.cat(slots), cache)
    factor = heads**-0.5 * dim**-0.5
    values, scaled = flash_mla_kernels.quantise_index_queries(queries, weights, factor=factor)
    got = flash_mla_kernels.fp8_paged_mqa_logits(values.view(b, next_n, heads, dim), cache, scaled, lengths, table, None, 300)
    for i in range(b * next_n):
        r = i // next_n
        n = int(lengths[r]) - (next_n - 1 - i % next_n)
        mine = keys[starts[r] : starts[r] + n]
        want = scores(queries[i : i + 1], mine, torch.ones(n), weights[i : i + 1] * factor)[0]
        assert (got[i, n:] == float("-inf")).all()
        error = (got[i, :n].double() - want).norm() / want.norm()
        assert error < 0.08
        chosen = flash_mla_kernels.paged_mqa_top_k(
            values.view(b, next_n, heads, dim), cache, scaled, lengths, table, 128, slots=True
        )[i]
        best = got[i, :n].sort(descending=True, stable=True).indices[:128].sort().values
        assert torch.equal(chosen[: len(best)].long(), slots[r][best]) and (chosen[len(best) :] == -1).all()


def test_indexer_says_what_is_wrong():
    q = torch.zeros(1, 2, 96, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"q.shape\[2\] \(D\) is 96, expected 64 or 128"):
        zero = torch.zeros(1, dtype=torch.int32)
        flash_mla_kernels.fp8_mqa_logits(q, (q[0, :1], torch.zeros(1)), torch.zeros(1, 2), zero, zero)
    with pytest.raises(ValueError, match='recipe is "vllm", expected one of: indexer_pow2'):
        flash_mla_kernels.append_index_keys(
            torch.zeros(1, 128), torch.zeros(1).long(), torch.zeros(1, 64, 1, 132, dtype=torch.uint8), recipe="vllm"
        )
