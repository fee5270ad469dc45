"""The indexer's operations against torch."""

import pytest

torch = pytest.importorskip("torch")
import flash_mla  # noqa: E402


@pytest.mark.parametrize("n", [1000, 2048, 2049, 40000])
def test_top_k_selects_torchs_values(n):
    g = torch.Generator().manual_seed(n)
    logits = torch.randn(6, n, generator=g)
    logits[1] = logits[1].relu()
    logits[2] = (logits[2] * 4).round() / 4
    logits[3] = -1
    lengths = torch.full((6,), n, dtype=torch.int32)
    k = min(2048, n)
    got = flash_mla.top_k(logits, lengths, 2048)
    assert got.shape == (6, 2048) and got.dtype == torch.int32 and (got[:, k:] == -1).all()
    assert (got[:, 1:k] > got[:, : k - 1]).all()
    values = logits.gather(1, got[:, :k].long()).sort(descending=True).values
    assert torch.equal(values, logits.topk(k).values)
    # Among equals the smaller position: a stable sort.
    want = logits.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    assert torch.equal(got[:, :k].long(), want)
    assert torch.equal(got, flash_mla.top_k(logits, lengths, 2048, reference=True))


def test_top_k_of_rows_within_a_matrix_becomes_slots():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 500, generator=g)
    starts = torch.tensor([0, 10, 0, 400], dtype=torch.int32)
    lengths = torch.tensor([500, 300, 0, 100], dtype=torch.int32)
    table = torch.randperm(100, generator=g).int().view(2, 50)
    positions = flash_mla.top_k(logits, lengths, 128, row_starts=starts)
    slots = flash_mla.top_k(logits, lengths, 128, row_starts=starts, block_table=table, page_size=16)
    for i in range(4):
        valid = positions[i][positions[i] >= 0].long()
        assert len(valid) == min(128, lengths[i])
        assert torch.equal(slots[i, : len(valid)].long(), table[i // 2].long()[valid // 16] * 16 + valid % 16)
        assert (slots[i, len(valid) :] == -1).all()
        row = logits[i, starts[i] : starts[i] + lengths[i]]
        assert torch.equal(valid, row.topk(len(valid)).indices.sort().values)
    moved = flash_mla.top_k(logits, lengths, 128, row_starts=starts, offsets=starts)
    assert torch.equal(moved, torch.where(positions >= 0, positions + starts[:, None], -1))


def test_top_k_says_what_is_wrong():
    logits = torch.zeros(2, 100)
    lengths = torch.tensor([100, 101], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^lengths\[1\] is 101, expected 0 to 100"):
        flash_mla.top_k(logits, lengths, 128)
    with pytest.raises(ValueError, match="^k is 4097, expected 1 to 4096"):
        flash_mla.top_k(logits, lengths, 4097)
    with pytest.raises(ValueError, match="^lengths is int64"):
        flash_mla.top_k(logits, lengths.long(), 128)
