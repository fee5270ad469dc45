"""Keys and values into pages; merging into place."""

from typing import Optional, Tuple

from . import _C
from ._arrays import Array, count, cuda_device, current_stream, empty, shape_of
from ._sparse import as_bytes


def append_pages(
    key: Array,
    value: Optional[Array],
    batch_indices: Array,
    positions: Array,
    page_indptr: Array,
    page_indices: Array,
    k_cache: Array,
    v_cache: Optional[Array] = None,
    *,
    num_threads: int = 0,
) -> None:
    """Copies tokens to their places in pages of keys and values, which are written there and nowhere else.

    key: (n, h, d), value: (n, h, d_v) or None, any one dtype; batch_indices, positions: (n,), the sequence of each token and
    its position there. Pages of sequence i are page_indices[page_indptr[i]] to page_indices[page_indptr[i + 1] - 1];
    page_indptr: (b + 1,). k_cache: (num_pages, page_size, h, d), v_cache: (num_pages, page_size, h, d_v), their last dimension
    contiguous; a pool in HND order is passed as ``pool.transpose(1, 2)``, latents as one head. Integers are int32 or int64.

    On the CPU all numbers are checked before anything is written. On a GPU, where the work is queued on torch's current stream,
    tokens whose numbers lead to no page are written nowhere. Raises ValueError naming the argument.
    """
    tensors = dict(key=key, value=value, k_cache=k_cache, v_cache=v_cache)
    tensors = {name: as_bytes(x) for name, x in tensors.items()}
    tensors.update(batch_indices=batch_indices, positions=positions, page_indptr=page_indptr, page_indices=page_indices)
    _C.append_pages(tensors, num_threads, stream=current_stream(cuda_device(key)))


def batch_positions(
    indptr: Array, seqlens: Array, n: int, *, out: Optional[Tuple[Array, Array]] = None
) -> Tuple[Array, Array]:
    """The sequence and the position of each of n new tokens, those of a sequence being its last ones: both (n,) int32, or ``out``.

    indptr: (b + 1,), tokens indptr[i] to indptr[i + 1] - 1 belong to sequence i, from 0 to n; seqlens: (b,), with the new
    tokens. int32 or int64. On a GPU tokens behind indptr[b] get -1, which append_pages passes over. Raises ValueError naming the
    argument.
    """
    n = count(n, "n", 0)
    sequences, positions = (empty((n,), indptr, "int32") for _ in range(2)) if out is None else out
    tensors = dict(indptr=indptr, seqlens=seqlens, batch_indices=sequences, positions=positions)
    _C.batch_positions(tensors, stream=current_stream(cuda_device(indptr)))
    return sequences, positions


def paged_seqlens(page_indptr: Array, last_page_len: Array, page_size: int) -> Array:
    """The length (b,) int32 of each sequence, all of whose pages but the last are full; 0 of one without pages.

    page_indptr: (b + 1,), last_page_len: (b,), int32 or int64. Raises ValueError naming the argument.
    """
    seqlens = empty(shape_of(last_page_len, "last_page_len", 1), last_page_len, "int32")
    tensors = dict(page_indptr=page_indptr, last_page_len=last_page_len, seqlens=seqlens)
    _C.paged_seqlens(tensors, page_size, stream=current_stream(cuda_device(page_indptr)))
    return seqlens


def merge_states_in_place(
    out: Array, lse: Array, other_out: Array, other_lse: Array, *, mask: Optional[Array] = None, base: str = "e"
) -> None:
    """merge_states of (out, lse) and (other_out, other_lse) into out and lse.

    out, other_out: (b, s_q, h_q, d), lse, other_lse: (b, h_q, s_q) float32, as merge_states takes them. ``mask`` (b, s_q) uint8:
    queries where it is 0 stay as they are.
    """
    if base not in ("e", "2"):
        raise ValueError(f'base is {base!r}, expected "e" or "2"')
    tensors = dict(out=out, lse=lse, other_out=other_out, other_lse=other_lse, mask=mask)
    _C.merge_states_in_place(tensors, base == "2", stream=current_stream(cuda_device(out)))
