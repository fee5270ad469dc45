import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_mla_kernels import _C, build_decode_schedule, get_mla_decoding_metadata


def ints(x):
    return torch.tensor(x, dtype=torch.int32)


# FlashMLA's own numbers: rows of (begin_req, begin_token, end_req, end_token, begin_split), block 64, overhead 5.
@pytest.mark.parametrize(
    "lengths, parts, splits, rows",
    [
        (
            [20, 140, 4096, 65],
            4,
            [0, 1, 2, 6, 7],
            {0: [0, 0, 2, 576, 0], 1: [2, 576, 2, 2048, 1], 2: [2, 2048, 2, 3520, 2], 3: [2, 3520, 3, 65, 3]},
        ),
        (
            [20, 140, 4096, 65],
            66,
            [0, 1, 3, 35, 36],
            {
                0: [0, 0, 0, 20, 0],
                1: [1, 0, 1, 128, 0],
                2: [1, 128, 1, 140, 1],
                3: [2, 0, 2, 128, 0],
                4: [2, 128, 2, 256, 1],
                65: [4, 0, 3, 65, 0],
            },
        ),
        ([1000, 1], 2, [0, 2, 3], {0: [0, 0, 0, 896, 0], 1: [0, 896, 1, 1, 1]}),
        (
            [0, 64, 0, 129],
            8,
            [0, 1, 2, 3, 4],
            {0: [0, 0, 0, 0, 0], 1: [1, 0, 1, 64, 0], 2: [2, 0, 2, 0, 0], 3: [3, 0, 3, 129, 0]},
        ),
    ],
)
def test_token_rows(lengths, parts, splits, rows):
    got, num_splits = build_decode_schedule(ints(lengths), parts, token_rows=True, min_blocks_per_request=0)
    assert num_splits.tolist() == splits
    for i, row in rows.items():
        assert got[i].tolist() == row + [0, 0, 0]


# Rows of (begin_req, end_req, begin_block, end_block, begin_split, first_is_split, last_is_split).
@pytest.mark.parametrize(
    "lengths, parts, rows",
    [
        (
            [20, 140, 4096, 65],
            4,
            [(0, 2, 0, 9, 0, 0, 1), (2, 2, 9, 32, 1, 1, 1), (2, 2, 32, 55, 2, 1, 1), (2, 3, 55, 2, 3, 1, 0)],
        ),
        ([1000, 1], 2, [(0, 0, 0, 14, 0, 1, 1), (0, 1, 14, 1, 1, 1, 0)]),
        # An empty request counts as a block in the balance and ends at block 0 in its row; idle parts follow.
        (
            [0, 64, 0, 129],
            8,
            [(0, 0, 0, 0, 0, 0, 0), (1, 1, 0, 1, 0, 0, 0), (2, 2, 0, 0, 0, 0, 0), (3, 3, 0, 3, 0, 0, 0)]
            + [(4, 3, 0, 3, 0, 0, 0)] * 4,
        ),
        ([64, 0], 1, [(0, 1, 0, 0, 0, 0, 0)]),
    ],
)
def test_block_rows(lengths, parts, rows):
    got, _ = build_decode_schedule(ints(lengths), parts)
    assert [tuple(r[:7]) for r in got.tolist()] == rows


def test_one_long_request_fills_43_of_66_parts():
    got, num_splits = build_decode_schedule(ints([8192]), 66)
    assert num_splits.tolist() == [0, 43]
    assert sum(r[0] <= r[1] and r[0] < 1 for r in got.tolist()) == 43


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 131072), max_size=40),
    st.integers(1, 140),
    st.integers(0, 5),
    st.sampled_from([0, 0, 1, 4, 16]),
    st.integers(0, 1),
    st.integers(1, 9),
    st.sampled_from([0, 5, 100]),
)
def test_every_block_is_in_exactly_one_part(lengths, parts, overhead, step, least, least_of_part, whole):
    got, num_splits = build_decode_schedule(
        ints(lengths),
        parts,
        fixed_overhead_blocks=overhead,
        fixed_split_blocks=step,
        min_blocks_per_request=least,
        min_blocks_per_part=least_of_part,
        whole_requests_percent=whole,
    )
    splits = num_splits.tolist()
    at = (0, 0, 0)  # request, block, split
    for begin, end, first, last, split, *_ in got.tolist():
        if begin > end or begin >= len(lengths):
            continue
        assert (begin, first, split) == at
        for r in range(begin, end + 1):
            blocks = -(-lengths[r] // 64)
            start, stop = (first if r == begin else 0), (last if r == end else blocks)
            assert start <= stop <= blocks and (stop > start or blocks == 0)
            pieces = max(-(-(stop - start) // step), 1) if step else 1
            count = pieces + (split if r == begin else 0)
            if stop == blocks:
                assert splits[r + 1] - splits[r] == count
                at = (r + 1, 0, 0)
            else:
                assert r == end and (not step or stop % step == 0)
                at = (r, stop, count)
    assert at == (len(lengths), 0, 0)
    if not step:
        assert sum(b - a for a, b in zip(splits, splits[1:]) if b - a > 1) <= 2 * parts


@pytest.mark.parametrize(
    "kwargs, name",
    [
        (dict(num_parts=0), "num_parts"),
        (dict(num_parts=2, block_size=0), "block_size"),
        (dict(num_parts=2, fixed_overhead_blocks=-1), "fixed_overhead_blocks"),
        (dict(num_parts=2, min_blocks_per_request=2), "min_blocks_per_request"),
        (dict(num_parts=2, fixed_split_blocks=-1), "fixed_split_blocks"),
        (dict(num_parts=2, min_blocks_per_part=0), "min_blocks_per_part"),
        (dict(num_parts=2, whole_requests_percent=-1), "whole_requests_percent"),
        (dict(num_parts=None), "num_parts is None"),
        (dict(num_parts="3"), "num_parts is '3'"),
        (dict(num_parts=1 << 70), "num_parts"),
        (dict(num_parts=2, block_size="a"), "block_size is 'a'"),
        (dict(num_parts=2, block_size=None), "block_size is None"),
        (dict(num_parts=2, fixed_overhead_blocks=1 << 40), "fixed_overhead_blocks"),
        (dict(num_parts=2, min_blocks_per_request=True), "min_blocks_per_request is True"),
        (dict(num_parts=2, fixed_split_blocks=1.5), "fixed_split_blocks is 1.5"),
    ],
)
def test_bad_options_are_named(kwargs, name):
    with pytest.raises(ValueError, match=name):
        build_decode_schedule(ints([10]), **kwargs)


@pytest.mark.parametrize("lengths", [ints([5, -1]), torch.tensor([1.0]), ints([[1]]), [1, 2]])
def test_bad_lengths_are_named(lengths):
    with pytest.raises(ValueError, match="cache_seqlens"):
        get_mla_decoding_metadata(lengths, 1, 1)


@pytest.mark.parametrize("heads", [(0, 1), (1, 0), (None, 1), (1, None), (True, 1), ("4", 1), (1, 1.0)])
def test_bad_head_counts_are_named(heads):
    with pytest.raises(ValueError, match="num_"):
        get_mla_decoding_metadata(ints([1]), *heads)


def test_metadata_shapes():
    metadata, num_splits = get_mla_decoding_metadata(ints([100, 200]), num_heads_per_head_k=4, num_heads_k=1)
    assert metadata.dtype == num_splits.dtype == torch.int32
    assert metadata.dim() == 2 and metadata.shape[1] == 8 and num_splits.shape == (3,)


def test_options_are_by_default_what_they_are_in_cpp():
    defaults = {name: p.default for name, p in inspect.signature(build_decode_schedule).parameters.items()}
    options = _C.schedule_options()
    assert options.pop("num_parts") == 1
    assert {name: defaults.get(name) for name in options} == options


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="fixed_split"):
        _C.build_schedule(ints([10]), ints([[0] * 8]), ints([0, 0]), fixed_split=1)
