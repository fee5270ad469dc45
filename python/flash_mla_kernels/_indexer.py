"""The lightning indexer and the selection of tokens."""

from typing import Optional, Tuple

from . import _C
from ._arrays import Array, count, cuda_device, current_stream, empty, shape_of, workspace_allocator
from ._sparse import as_bytes


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


def _logits(shape, like: Array, reference: bool) -> Array:
    return empty(shape, like, "float64" if reference else "float32")


def fp8_mqa_logits(
    q: Array,
    kv: Tuple[Array, Array],
    weights: Array,
    ks: Array,
    ke: Array,
    clean_logits: bool = True,
    *,
    compressed_width: Optional[int] = None,
    num_threads: int = 0,
    reference: bool = False,
) -> Array:
    """The lightning indexer's scores of m query tokens over n keys: float32 (m, n).

    q: (m, heads, 64 or 128) e4m3. kv: the keys (n, 64 or 128) e4m3 and their scales (n,) float32. weights: (m, heads)
    float32, with the queries' scales. ks, ke: (m,) int32: row i scores keys ks[i] to ke[i] - 1. logits[i][j] =
    scale[j] * sum over heads of weights[i][h] * max(q[i][h] . k[j], 0), and -inf elsewhere, or undefined without
    ``clean_logits``. ``compressed_width``: key j of row i in column j - ks[i] of so many. ``reference``: in float64.
    Raises ValueError naming the argument; on a GPU values are not checked.
    """
    k, k_scales = kv
    m, _, _ = shape_of(q, "q", 3)
    n, _ = shape_of(k, "kv[0]", 2)
    width = n if compressed_width is None else count(compressed_width, "compressed_width")
    device = cuda_device(q)
    logits = _logits((m, width), weights, reference)
    tensors = dict(q=as_bytes(q), weights=weights, k=as_bytes(k), k_scales=k_scales, ks=ks, ke=ke, logits=logits)
    _C.mqa_logits(
        tensors,
        compressed_width is not None,
        bool(clean_logits),
        num_threads,
        reference,
        stream=current_stream(device),
        allocate=workspace_allocator(device),
    )
    return logits


def fp8_paged_mqa_logits(
    q: Array,
    fused_kv_cache: Array,
    weights: Array,
    context_lens: Array,
    block_table: Array,
    schedule_meta: Optional[Array] = None,
    max_context_len: int = 1,
    clean_logits: bool = True,
    *,
    num_threads: int = 0,
    reference: bool = False,
) -> Array:
    """The indexer's scores of next_n tokens of each of b requests over a paged cache: (b * next_n, max_context_len).

    q: (b, next_n, heads, 64 or 128) e4m3, any next_n. fused_kv_cache: (num_pages, page_size, 1, 68 or 132) bytes: the
    page's keys, e4m3, then its float32 scales. weights: (b * next_n, heads) float32. context_lens: int32, (b, next_n)
    keys that each token scores, or (b,) those of the last token, one less for each before it. block_table: (b,
    max_blocks) int32. schedule_meta is not needed and not looked at. Otherwise as fp8_mqa_logits.
    """
    b, next_n, _, _ = shape_of(q, "q", 4)
    device = cuda_device(q)
    logits = _logits((b * next_n, count(max_context_len, "max_context_len")), weights, reference)
    tensors = dict(
        q=as_bytes(q),
        cache=as_bytes(fused_kv_cache),
        weights=weights,
        context_lens=context_lens,
        block_table=block_table,
        logits=logits,
    )
    _C.paged_mqa_logits(
        tensors,
        bool(clean_logits),
        num_threads,
        reference,
        stream=current_stream(device),
        allocate=workspace_allocator(device),
    )
    return logits


def mqa_top_k(
    q: Array,
    kv: Tuple[Array, Array],
    weights: Array,
    ks: Array,
    ke: Array,
    k: int,
    *,
    absolute: bool = False,
    logits_bytes: int = 64 << 20,
    num_threads: int = 0,
) -> Array:
    """fp8_mqa_logits and top_k in one call, with at most ``logits_bytes`` of logits at a time (one row at least).

    Returns (m, k) int32: positions counted from ks[i], or with ``absolute`` rows of kv; ascending, -1 after the last.
    """
    m, _, _ = shape_of(q, "q", 3)
    device = cuda_device(q)
    indices = empty((m, count(k, "k")), ks, "int32")
    tensors = dict(q=as_bytes(q), weights=weights, k=as_bytes(kv[0]), k_scales=kv[1], ks=ks, ke=ke, indices=indices)
    if absolute:
        tensors["offsets"] = ks
    _C.mqa_top_k(
        tensors,
        False,
        False,
        count(logits_bytes, "logits_bytes"),
        num_threads,
        stream=current_stream(device),
        allocate=workspace_allocator(device),
    )
    return indices


def paged_mqa_top_k(
    q: Array,
    fused_kv_cache: Array,
    weights: Array,
    context_lens: Array,
    block_table: Array,
    k: int,
    *,
    slots: bool = False,
    logits_bytes: int = 64 << 20,
    num_threads: int = 0,
) -> Array:
    """fp8_paged_mqa_logits and top_k in one call, with at most ``logits_bytes`` of logits at a time (one row at least).

    Returns (b * next_n, k) int32: positions in the request, or with ``slots`` page * page_size + offset; ascending by
    position, -1 after the last.
    """
    b, next_n, _, _ = shape_of(q, "q", 4)
    device = cuda_device(q)
    indices = empty((b * next_n, count(k, "k")), block_table, "int32")
    tensors = dict(
        q=as_bytes(q),
        cache=as_bytes(fused_kv_cache),
        weights=weights,
        context_lens=context_lens,
        block_table=block_table,
        indices=indices,
    )
    _C.mqa_top_k(
        tensors,
        True,
        bool(slots),
        count(logits_bytes, "logits_bytes"),
        num_threads,
        stream=current_stream(device),
        allocate=workspace_allocator(device),
    )
    return indices


def append_index_keys(
    k: Array,
    slot_mapping: Array,
    cache: Array,
    *,
    recipe: str = "indexer_pow2",
    rotate: bool = True,
    num_threads: int = 0,
) -> None:
    """Quantises keys (n, 64 or 128) into a cache of index keys, (num_pages, page_size, 1, 68 or 132) bytes.

    k: bfloat16, float16 or float32. slot_mapping: (n,) int64 or int32, page * page_size + offset, -1 to skip. recipe:
    "indexer_pow2" or "indexer", a scale for each key. ``rotate``: by the Hadamard matrix first, times dim ** -0.5,
    rounded to k's dtype, as DeepSeek V3.2 does. Raises ValueError naming the argument, before anything is written.
    """
    tensors = dict(k=k, slot_mapping=slot_mapping, cache=as_bytes(cache))
    _C.append_index_keys(tensors, recipe, bool(rotate), num_threads, stream=current_stream(cuda_device(k)))


def quantise_index_queries(
    q: Array,
    weights: Array,
    *,
    factor: float = 1.0,
    recipe: str = "indexer_pow2",
    rotate: bool = True,
    num_threads: int = 0,
) -> Tuple[Array, Array]:
    """Queries (m, heads, 64 or 128) as e4m3 bytes, and weights * factor * scale, (m, heads) float32.

    weights: (m, heads) float32. DeepSeek's factor is heads ** -0.5 * dim ** -0.5. recipe: "indexer_pow2", "indexer" or
    "vllm_indexer", a scale for each head. ``rotate`` as in append_index_keys. Raises ValueError naming the argument.
    """
    shape = shape_of(q, "q", 3)
    values = empty(shape, q, "uint8")
    scaled = empty(shape[:2], weights)
    tensors = dict(q=q, weights=weights, values=values, scaled_weights=scaled)
    _C.quantise_index_queries(
        tensors, float(factor), recipe, bool(rotate), num_threads, stream=current_stream(cuda_device(q))
    )
    return values, scaled
