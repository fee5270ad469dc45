"""The lightning indexer and the selection of tokens."""

from typing import Optional

from . import _C
from ._arrays import Array, count, cuda_device, current_stream, empty, shape_of, workspace_allocator


def top_k(
    logits: Array,
    lengths: Array,
    k: int,
    *,
    row_starts: Optional[Array] = None,
    offsets: Optional[Array] = None,
    block_table: Optional[Array] = None,
    row_request: Optional[Array] = None,
    page_size: int = 64,
    num_threads: int = 0,
    reference: bool = False,
) -> Array:
    """The positions of the k largest scores of every row, exactly: (n, k) int32, ascending, -1 after the last.

    logits: (n, width) float32. lengths: (n,) int32, scores of each row that take part; row_starts: (n,) int32, the
    column where each row begins (0), from which positions are counted. Larger values come first, among equal ones the
    smaller position; NaN is above +inf. A row's result depends on its scores alone. offsets: (n,) int32, added to the
    positions of each row. block_table: (b, max_blocks) int32, pages of ``page_size`` tokens: positions become slots,
    page * page_size + offset; row_request: (n,) int32, the request of each row, by default each has n / b rows, one
    after the other. k is 1 to 4096. ``reference``: by a sort of each row. Raises ValueError naming the argument; on a
    GPU values are not checked.
    """
    n, _ = shape_of(logits, "logits", 2)
    k = count(k, "k")
    if k > 4096:
        raise ValueError(f"k is {k}, expected 1 to 4096")
    device = cuda_device(logits)
    indices = empty((n, k), logits, "int32")
    tensors = dict(
        logits=logits,
        lengths=lengths,
        row_starts=row_starts,
        offsets=offsets,
        block_table=block_table,
        row_request=row_request,
        indices=indices,
    )
    _C.top_k(
        tensors,
        page_size,
        num_threads,
        reference,
        stream=current_stream(device),
        allocate=workspace_allocator(device),
    )
    return indices
