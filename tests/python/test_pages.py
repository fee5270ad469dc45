"""Keys and values into pages, from Python and under FlashInfer's names."""

import numpy as np
import pytest
import torch

import flash_mla_kernels as fm
from flash_mla_kernels import flashinfer

PAGE, H, D = 4, 2, 8


def batch():
    """Three sequences of 10, 0 and 8 tokens, whose last 5, 0 and 2 are new."""
    indptr, pages = torch.tensor([0, 3, 3, 5], dtype=torch.int32), torch.tensor([6, 1, 4, 0, 3], dtype=torch.int32)
    last = torch.tensor([2, 0, 4], dtype=torch.int32)
    seqlens = flashinfer.get_seq_lens(indptr, last, PAGE)
    assert seqlens.tolist() == [10, 0, 8] and seqlens.dtype == torch.int32
    starts = torch.tensor([0, 5, 5, 7])
    places = flashinfer.get_batch_indices_positions(starts, seqlens, 7)
    assert [x.tolist() for x in places] == [[0, 0, 0, 0, 0, 2, 2], [5, 6, 7, 8, 9, 6, 7]]
    given = [torch.empty(7, dtype=torch.int32) for _ in range(2)]
    assert flashinfer.get_batch_indices_positions(starts, seqlens, 7, *given)[0] is given[0]
    assert torch.equal(given[1], places[1])
    return indptr, pages, last, *places


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_keys_and_values(layout, dtype):
    indptr, pages, last, sequences, positions = batch()
    key, value = (torch.randn(7, H, D).to(dtype) for _ in range(2))
    shape = (8, 2, PAGE, H, D) if layout == "NHD" else (8, 2, H, PAGE, D)
    cache = torch.full(shape, -3.0).to(dtype)
    flashinfer.append_paged_kv_cache(key, value, sequences, positions, cache, pages, indptr, last, layout)
    by_token = cache if layout == "NHD" else cache.transpose(2, 3)
    expected = torch.full((8, 2, PAGE, H, D), -3.0).to(dtype)
    page = pages[indptr[sequences.long()].long() + positions.long() // PAGE].long()
    for i, rows in enumerate((key, value)):
        expected.view(torch.uint8 if dtype == torch.float8_e4m3fn else dtype)[page, i, positions.long() % PAGE] = rows.view(
            torch.uint8 if dtype == torch.float8_e4m3fn else dtype
        )
    assert torch.equal(by_token.float(), expected.float())


def test_latents_in_halves_of_one_cache():
    indptr, pages, last, sequences, positions = batch()
    rows = torch.randn(7, 576)
    cache = torch.zeros(8, PAGE, 576)
    flashinfer.append_paged_mla_kv_cache(
        rows[:, :512], rows[:, 512:], sequences, positions, cache[..., :512], cache[..., 512:], pages, indptr, last
    )
    page = pages[indptr[sequences.long()].long() + positions.long() // PAGE].long()
    assert torch.equal(cache[page, positions.long() % PAGE], rows)
    assert (cache != 0).any(-1).sum() == 7


def test_other_array_libraries():
    indptr, pages = np.array([0, 2]), np.array([3, 1])
    sequences, positions = fm.batch_positions(np.array([0, 3]), np.array([7]), 3)
    assert isinstance(sequences, np.ndarray) and positions.tolist() == [4, 5, 6]
    key, cache = np.random.default_rng(0).standard_normal((3, 1, 5)), np.zeros((4, 4, 1, 5))
    fm.append_pages(key, None, sequences, positions, indptr, pages, cache)
    assert (cache[1, :3] == key).all() and (cache != 0).sum() == 15
    assert fm.paged_seqlens(indptr, np.array([3]), 4).tolist() == [7]


def test_merging_in_place_with_and_without_a_mask():
    out, other = (torch.randn(6, H, D) for _ in range(2))
    lse, other_lse = (torch.randn(6, H) for _ in range(2))
    lse[2], other_lse[2] = -torch.inf, -torch.inf
    lse[3] = -torch.inf
    merged = flashinfer.merge_state(out, lse, other, other_lse)
    mask = torch.tensor([True, False, True, True, True, False])
    kept = [x.clone() for x in (out, lse)]
    flashinfer.merge_state_in_place(out, lse, other, other_lse, mask)
    for got, new, old in zip((out, lse), merged, kept):
        assert torch.equal(got[mask], new[mask]) and torch.equal(got[~mask], old[~mask])
    assert (lse[2] == -torch.inf).all() and torch.equal(out[3], other[3])
    out, lse = kept
    flashinfer.merge_state_in_place(out, lse, other, other_lse)
    assert torch.equal(out, merged[0]) and torch.equal(lse, merged[1])


def test_bad_numbers_are_named():
    indptr, pages, last, sequences, positions = batch()
    key, cache = torch.randn(7, H, D), torch.zeros(8, PAGE, H, D)
    for change, message in (
        (dict(positions=positions + 4), "positions[3] is 12, expected 0 to 11"),
        (dict(page_indices=pages + 5), "page_indices[2] is 9"),
        (dict(batch_indices=sequences - 1), "batch_indices[0] is -1"),
        (dict(k_cache=cache[:, :, :1]), "k_cache.shape[2] is 1"),
    ):
        given = dict(batch_indices=sequences, positions=positions, page_indptr=indptr, page_indices=pages, k_cache=cache)
        with pytest.raises(ValueError) as e:
            fm.append_pages(key, None, **dict(given, **change))
        assert message in str(e.value)
    assert (cache == 0).all()
