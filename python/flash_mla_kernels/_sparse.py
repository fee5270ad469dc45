"""Sparse attention, decode over FP8 caches, and what writes and reads such caches."""

import sys
from typing import Optional, Tuple

from . import _C
from ._arrays import (
    Array,
    cuda_device,
    current_stream,
    empty,
    is_torch,
    output,
    shape_of,
    traced,
    workspace_allocator,
)

_LATENT_WIDTH = 512


def as_bytes(x: Optional[Array]) -> Optional[Array]:
    """A cache of bytes as uint8, whichever one-byte dtype it has; anything else as it is."""
    if x is None:
        return None
    if is_torch(x):
        if x.element_size() != 1:
            return x
        torch = sys.modules["torch"]
        one_byte = {getattr(torch, name, None) for name in ("int8", "float8_e4m3fn")}
        return x.view(torch.uint8) if x.dtype in one_byte else x
    dtype = getattr(x, "dtype", None)
    if getattr(dtype, "itemsize", 0) == 1 and str(dtype) in ("int8", "float8_e4m3fn"):
        return x.view("uint8")
    return x


def sparse_decode(
    q: Array,
    k_cache: Array,
    indices: Array,
    *,
    topk_length: Optional[Array] = None,
    attn_sink: Optional[Array] = None,
    extra_k_cache: Optional[Array] = None,
    extra_indices_in_kvcache: Optional[Array] = None,
    extra_topk_length: Optional[Array] = None,
    softmax_scale: Optional[float] = None,
    fixed_split_blocks: int = 0,
    num_threads: int = 0,
    kv_scale: float = 1.0,
    extra_kv_scale: float = 1.0,
    reference: bool = False,
    out: Optional[Array] = None,
) -> Tuple[Array, Array]:
    """Attention of every query token over the cache slots on its lists.

    q: (b, s_q, h_q, 576 or 512) bfloat16 or float16. k_cache: (num_pages, page_size, 1, width), any page_size, pages any
    distance apart: q's dtype and width, or one-byte elements with width 656 (DeepSeek V3.2), 584 (V4) or 576 (all e4m3
    times ``kv_scale``). indices: (b, s_q, topk) int32, page * page_size + offset in any order, -1 for none; what stands
    twice counts twice. topk_length: (b,) int32, entries that are looked at. attn_sink: (h_q,) float32, natural log,
    changes out alone. extra_*: a second cache in the same softmax, with its own format, page size and lists.
    softmax_scale defaults to d_qk ** -0.5. ``fixed_split_blocks`` > 0 is the batch-invariant mode: a row's bits depend
    on its own list alone. ``reference``: by the definition in float64, slowly.

    Returns out (b, s_q, h_q, 512) in q's dtype and lse (b, h_q, s_q) float32, natural log and without the sink; an empty
    selection gives out 0 and lse +inf. ``reference`` returns both in float64. ``out``, where it is given, is written to
    and returned. Raises ValueError naming the argument; on a GPU values are not checked.
    """
    b, s_q, h_q, _ = shape_of(q, "q", 4)
    out = output(out, (b, s_q, h_q, _LATENT_WIDTH), q, "float64" if reference else None)
    lse = empty((b, h_q, s_q), q, "float64" if reference else "float32")
    tensors = dict(
        q=q,
        k_cache=as_bytes(k_cache),
        indices=indices,
        topk_length=topk_length,
        attn_sink=attn_sink,
        extra_k_cache=as_bytes(extra_k_cache),
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        extra_topk_length=extra_topk_length,
        out=out,
        lse=lse,
    )
    options = (softmax_scale, fixed_split_blocks, num_threads, kv_scale, extra_kv_scale, reference)
    if traced(q):
        from . import _torch

        _torch.sparse_decode(*tensors.values(), *options)
    else:
        call_sparse_decode(tensors, *options)
    return out, lse


def call_sparse_decode(tensors, *options) -> None:
    device = cuda_device(tensors["q"])
    try:
        _C.sparse_decode(
            tensors, *options, stream=current_stream(device), allocate=workspace_allocator(device)
        )
    except ValueError as error:
        raise ValueError(_python_names(str(error))) from None


# What the C++ API calls the arguments of this one.
_NAMES = (
    ("extra.cache", "extra_k_cache"),
    ("extra.indices", "extra_indices_in_kvcache"),
    ("extra.topk_length", "extra_topk_length"),
    ("keys.cache", "k_cache"),
    ("keys.indices", "indices"),
    ("keys.topk_length", "topk_length"),
)


def _python_names(message: str) -> str:
    for theirs, ours in _NAMES:
        message = message.replace(theirs, ours)
    return message


def _cache_is(message: str, name: str) -> str:
    """A message about ``cache``, as the C++ API calls it, about what Python calls ``name``."""
    return name + message[5:] if message.startswith(("cache.", "cache ")) else message


def sparse_prefill(
    q: Array,
    kv: Array,
    indices: Array,
    *,
    topk_length: Optional[Array] = None,
    attn_sink: Optional[Array] = None,
    cu_seqlens_q: Optional[Array] = None,
    cu_seqlens_k: Optional[Array] = None,
    block_table: Optional[Array] = None,
    cache_seqlens: Optional[Array] = None,
    softmax_scale: Optional[float] = None,
    num_threads: int = 0,
    kv_scale: float = 1.0,
    reference: bool = False,
    out: Optional[Array] = None,
) -> Tuple[Array, Array, Array]:
    """sparse_decode for the query tokens of whole prompts, of one request or of several, one after the other.

    q: (n, h_q, 576 or 512). kv: tokens (s_kv, 1, width), or pages (num_pages, page_size, 1, width), in any format of
    sparse_decode. indices: (n, topk) or (n, 1, topk) int32: slots of kv; with cu_seqlens_q (b + 1,) int32, positions in
    the query's own request, whose tokens are the slots cu_seqlens_k[r] to cu_seqlens_k[r + 1] - 1, or in the pages
    block_table[r], cache_seqlens[r] of them. What is negative, or not below the number of tokens, is none. topk_length:
    (n,) int32. attn_sink: (h_q,) float32.

    Returns out (n, h_q, 512) in q's dtype, max_logits and lse (n, h_q) float32: the largest scaled score and the natural
    log of the sum, without the sink; -inf and +inf where nothing is selected, and out 0. ``reference`` returns float64.
    ``out``, where it is given, is written to and returned. Raises ValueError naming the argument.
    """
    n, h_q, _ = shape_of(q, "q", 3)
    out = output(out, (n, h_q, _LATENT_WIDTH), q, "float64" if reference else None)
    max_logits = empty((n, h_q), q, "float64" if reference else "float32")
    lse = empty((n, h_q), q, "float64" if reference else "float32")
    tensors = dict(
        q=q,
        kv=as_bytes(kv),
        indices=indices,
        topk_length=topk_length,
        attn_sink=attn_sink,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        out=out,
        max_logits=max_logits,
        lse=lse,
    )
    options = (softmax_scale, num_threads, kv_scale, reference)
    if traced(q):
        from . import _torch

        _torch.sparse_prefill(*tensors.values(), *options)
    else:
        call_sparse_prefill(tensors, *options)
    return out, max_logits, lse


def call_sparse_prefill(tensors, *options) -> None:
    device = cuda_device(tensors["q"])
    try:
        _C.sparse_prefill(
            tensors, *options, stream=current_stream(device), allocate=workspace_allocator(device)
        )
    except ValueError as error:
        raise ValueError(_cache_is(str(error), "kv")) from None


def dense_fp8_decode(
    q: Array,
    k_cache: Array,
    block_table: Array,
    cache_seqlens: Array,
    parts: Array,
    num_splits: Array,
    *,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    block_size: int = 64,
    fixed_split_blocks: int = 0,
    token_rows: bool = False,
    num_threads: int = 0,
    kv_scale: float = 1.0,
    fp8_mma: bool = False,
    out: Optional[Array] = None,
) -> Tuple[Array, Array]:
    """dense_decode over a cache in any format of sparse_decode, with a plan of build_decode_schedule.

    q: (b, s_q, h_q, 576 or 512) bfloat16 or float16; the other arguments, the result (head_dim_v is 512) and the errors
    as dense_decode. ``fp8_mma``: on a GPU, products in FP8 where the format allows it, faster and less exact.
    """
    b, s_q, h_q, _ = shape_of(q, "q", 4)
    out = output(out, (b, s_q, h_q, _LATENT_WIDTH), q)
    lse = empty((b, h_q, s_q), q, "float32")
    tensors = dict(
        q=q,
        k_cache=as_bytes(k_cache),
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        tile_scheduler_metadata=parts,
        num_splits=num_splits,
        out=out,
        lse=lse,
    )
    options = (softmax_scale, causal, bool(token_rows), block_size, fixed_split_blocks, num_threads, kv_scale)
    options += (bool(fp8_mma),)
    if traced(q):
        from . import _torch

        _torch.dense_fp8_decode(*tensors.values(), *options)
    else:
        call_dense_fp8_decode(tensors, *options)
    return out, lse


def call_dense_fp8_decode(tensors, *options) -> None:
    device = cuda_device(tensors["q"])
    try:
        _C.dense_fp8_decode(
            tensors, *options, stream=current_stream(device), allocate=workspace_allocator(device)
        )
    except ValueError as error:
        raise ValueError(_cache_is(str(error), "k_cache")) from None


def append_kv(
    latent: Array,
    rope: Array,
    slot_mapping: Array,
    cache: Array,
    *,
    recipe: str = "flash_mla",
    norm_weight: Optional[Array] = None,
    norm_eps: float = 1e-6,
    positions: Optional[Array] = None,
    cos_sin: Optional[Array] = None,
    kv_scale: float = 1.0,
    num_threads: int = 0,
) -> None:
    """Writes tokens into ``cache``, (num_pages, page_size, 1, width) in any format of sparse_decode.

    latent: (n, 512) for caches of 576 elements per token, (n, 448) for those of 512; rope: (n, 64); one dtype of
    bfloat16, float16, float32. slot_mapping: (n,) int64 or int32, -1 to skip a token. recipe: how the scales of a
    656-byte cache are chosen, "flash_mla", "vllm" or "sglang". norm_weight: float32, an RMSNorm of the latent first, or
    of latent and rope as one row where it is that long. positions (n,) and cos_sin (max_positions, 64) float32: RoPE of
    the rope part, pairs of neighbours. CUDA tensors: on torch's current stream, and slots and positions outside are the
    caller's to get right. Raises ValueError naming the argument, before anything is written.
    """
    tensors = dict(
        latent=latent,
        rope=rope,
        slot_mapping=slot_mapping,
        cache=as_bytes(cache),
        norm_weight=norm_weight,
        positions=positions,
        cos_sin=cos_sin,
    )
    _C.append_kv(tensors, recipe, norm_eps, kv_scale, num_threads, stream=current_stream(cuda_device(latent)))


def gather_kv(
    cache: Array, slots: Array, *, dtype: str = "float32", kv_scale: float = 1.0, num_threads: int = 0
) -> Array:
    """Tokens of a cache, dequantised: (n, 576 or 512) of ``dtype`` "float32", "bfloat16" or "float16".

    slots: (n,) int64 or int32, -1 for a row of zeros. Raises ValueError naming the argument.
    """
    cache = as_bytes(cache)
    _, _, _, width = shape_of(cache, "cache", 4)
    d_qk = {656: 576, 584: 512}.get(width, width)
    (n,) = shape_of(slots, "slots", 1)
    out = empty((n, d_qk), cache, dtype)
    _C.gather_kv(
        dict(cache=cache, slots=slots, out=out), kv_scale, num_threads, stream=current_stream(cuda_device(cache))
    )
    return out


def quantise_fp8(x: Array, tile: int, recipe: str) -> Tuple[Array, Array]:
    """Quantises the rows of x (n, d), tile by tile, to e4m3 (n, d) uint8 with scales (n, ceil(d / tile)) float32.

    recipe: "flash_mla", "vllm", "sglang", "indexer_pow2", "indexer" or "vllm_indexer". CUDA tensors: on torch's
    current stream. Raises ValueError.
    """
    n, d = shape_of(x, "x", 2)
    values = empty((n, d), x, "uint8")
    scales = empty((n, -(-d // tile) if isinstance(tile, int) and tile > 0 else 0), x, "float32")
    stream = current_stream(cuda_device(x))
    _C.quantise_fp8(dict(x=x, values=values, scales=scales), tile, recipe, stream=stream)
    return values, scales
