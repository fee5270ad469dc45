"""FlashMLA's interface, in the three forms it has had.

One rule for the schedule: ``get_mla_metadata`` returns an object that the first decode fills, whatever it is given, as
FlashMLA does today and vLLM relies on. Who wants it as tensors and at once, as it was in 2025 and SGLang copies it into the
buffers of its graphs, calls ``get_mla_decoding_metadata``. ``flash_mla_with_kvcache`` takes either.
"""

from dataclasses import dataclass
from typing import Any, Optional, Tuple

from . import _C
from ._arrays import Array, count, cuda_device, current_stream, empty, head_dim, shape_of, traced
from ._library import run_dense_decode
from ._sparse import as_bytes, dense_fp8_decode, sparse_decode, sparse_prefill


@dataclass
class FlashMLASchedMeta:
    """Schedule of a decoding step, filled by the first flash_mla_with_kvcache call it is passed to.

    May be passed again for calls with the same shapes and flags and the same lengths (every layer of a step).
    """

    @dataclass
    class Config:
        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: Optional[int]
        extra_page_block_size: Optional[int]
        extra_topk: Optional[int]

    have_initialized: bool = False
    config: Optional[Config] = None
    tile_scheduler_metadata: Any = None
    num_splits: Any = None


def get_mla_metadata(*args: Any, **kwargs: Any) -> Tuple[FlashMLASchedMeta, None]:
    """The schedule of a decoding step, still to be made: (FlashMLASchedMeta(), None).

    The arguments of its earlier forms (lengths and numbers of heads) are taken and not looked at: the first
    flash_mla_with_kvcache call that is given the object plans for its own. A new object is due whenever lengths change.
    Inside a CUDA graph the plan is made by the graph, anew with each replay, where the call that fills the object is
    captured. get_mla_decoding_metadata plans at once and returns tensors.
    """
    return FlashMLASchedMeta(), None


def get_mla_decoding_metadata(
    cache_seqlens: Array,
    num_q_tokens_per_head_k: Optional[int] = None,
    num_heads_k: Optional[int] = None,
    num_heads_q: Optional[int] = None,
    is_fp8_kvcache: bool = False,
    topk: Optional[int] = None,
    *,
    num_heads_per_head_k: Optional[int] = None,
    fixed_split_blocks: int = 0,
) -> Tuple[Array, Array]:
    """Plans a decoding step at once, as get_mla_metadata did in 2025; one plan serves every layer.

    cache_seqlens: (b,) int32, contiguous. Returns tile_scheduler_metadata (num_sm_parts, 8) int32, rows
    (begin_req, begin_token, end_req inclusive, end_token, begin_split, 0, 0, 0), and num_splits (b + 1,) int32, on the
    device of cache_seqlens. num_sm_parts is the number of threads OpenMP would use on the CPU, and on a GPU the number
    of clusters of CTAs that run at a time. ``num_q_tokens_per_head_k`` (``num_heads_per_head_k`` until September 2025)
    is s_q * h_q // h_kv. On a GPU the plan is made there, on torch's current stream, and never read back: a CUDA graph
    may capture it. The tensors may be copied into others of their shapes.

    is_fp8_kvcache and topk change nothing: sparse attention plans within the call, from the lists' lengths.
    ``fixed_split_blocks`` > 0 is the batch-invariant mode of dense_decode and dense_fp8_decode, which are to be given the
    same number (and token_rows=True): splits of so many blocks of 64 tokens, whatever else is in the batch.

    Raises ValueError for bad arguments.
    """
    if topk is not None:
        count(topk, "topk", 0)
    if num_heads_per_head_k is not None:
        if num_q_tokens_per_head_k is not None:
            raise ValueError(
                f"num_heads_per_head_k is {num_heads_per_head_k!r}, expected None beside num_q_tokens_per_head_k, "
                "its name since September 2025"
            )
        num_q_tokens_per_head_k = num_heads_per_head_k
    num_q_tokens_per_head_k = count(num_q_tokens_per_head_k, "num_q_tokens_per_head_k")
    num_heads_k = count(num_heads_k, "num_heads_k")
    s_q, h_q = 1, num_q_tokens_per_head_k * num_heads_k
    if num_heads_q is not None:
        num_heads_q = count(num_heads_q, "num_heads_q")
        if h_q % num_heads_q != 0:
            raise ValueError(
                f"num_heads_q is {num_heads_q}, expected a divisor of num_q_tokens_per_head_k * num_heads_k = {h_q}"
            )
        s_q, h_q = h_q // num_heads_q, num_heads_q
    fixed_split_blocks = count(fixed_split_blocks, "fixed_split_blocks", 0)
    return _plan(cache_seqlens, s_q, h_q, num_heads_k, token_rows=True, fixed_split_blocks=fixed_split_blocks)


def _plan(
    cache_seqlens: Array, s_q: int, h_q: int, h_k: int, token_rows: bool, fixed_split_blocks: int = 0
) -> Tuple[Array, Array]:
    (b,) = shape_of(cache_seqlens, "cache_seqlens", 1)
    if traced(cache_seqlens):
        from . import _torch

        return _torch.plan(cache_seqlens, s_q, h_q, h_k, token_rows, fixed_split_blocks)
    device = cuda_device(cache_seqlens)
    options = _C.cpu_schedule_options() if device is None else _C.cuda_schedule_options(device, s_q, h_q, h_k, b)
    if token_rows:
        options["min_blocks_per_request"] = 0
    options["fixed_split_blocks"] = fixed_split_blocks
    parts = empty((options.pop("num_parts"), 8), cache_seqlens, "int32")
    num_splits = empty((b + 1,), cache_seqlens, "int32")
    _C.build_schedule(cache_seqlens, parts, num_splits, token_rows=token_rows, stream=current_stream(device), **options)
    return parts, num_splits


def flash_mla_with_kvcache(
    q: Array,
    k_cache: Array,
    block_table: Optional[Array],
    cache_seqlens: Optional[Array],
    head_dim_v: int,
    tile_scheduler_metadata: Any,
    num_splits: Optional[Array] = None,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Optional[Array] = None,
    attn_sink: Optional[Array] = None,
    extra_k_cache: Optional[Array] = None,
    extra_indices_in_kvcache: Optional[Array] = None,
    topk_length: Optional[Array] = None,
    extra_topk_length: Optional[Array] = None,
    out: Optional[Array] = None,
    q_rope: Optional[Array] = None,
) -> Tuple[Array, Array]:
    """MLA decode over a paged cache: dense, or with ``indices`` over the tokens on a list.

    Dense:
    q: (b, s_q, h_q, d_qk) bfloat16, float16 or float32; k_cache: (num_blocks, page_size, h_kv, d_qk), q's dtype, whose
    first head_dim_v columns are V; block_table: (b, max_blocks) int32; cache_seqlens: (b,) int32. d_qk is 576 and
    head_dim_v 512 for DeepSeek models. tile_scheduler_metadata and num_splits as get_mla_metadata or
    get_mla_decoding_metadata returned them.
    softmax_scale defaults to d_qk ** -0.5, which is not DeepSeek's (V3 and R1: 0.1352338). causal: query i of s_q sees
    keys j <= length - s_q + i.
    q_rope: (b, s_q, h_q, d_qk - head_dim_v), where a query's rotary part lies apart; q is then the first head_dim_v
    columns. Both may have any strides that a multiple of 16 bytes is: nothing is copied together.

    On a GPU (torch tensors on a Hopper) the work is queued on torch's current stream of that device and waited for by
    nobody; scratch memory comes from torch's allocator. Lengths, block-table entries and the schedule's agreement with
    cache_seqlens are not checked there. bfloat16 and float16, d_qk 576, head_dim_v 512, pages of 16, 32 or a multiple
    of 64 tokens.

    is_fp8_kvcache: k_cache has one-byte elements (float8_e4m3fn, int8 or uint8) and 656 (DeepSeek V3.2) or 584 (V4) per
    token; dequantised with float32 scales. q is bfloat16 or float16, (b, s_q, h_q, 576) or (…, 512) for V4.

    Sparse: indices (b, s_q, topk) int32, page * page_size + offset, -1 for none; topk_length (b,) int32; attn_sink (h_q,)
    float32; a second cache with its own lists in the extra_* arguments: see flash_mla_kernels.sparse_decode. Any h_q, topk and
    page_size, either format with or without topk_length and a second cache, and caches of q's dtype too
    (is_fp8_kvcache=False). block_table and cache_seqlens are not read, nor is the schedule; causal is False.

    Returns out (b, s_q, h_q, head_dim_v) in q's dtype and lse (b, h_q, s_q) float32, natural log, +inf where a query
    sees no key (out is 0 there). Results are torch tensors where q is one, NumPy arrays otherwise; ``out`` is written to
    and returned where it is given, contiguous and of that shape and dtype. Inputs may be read-only; nothing but out and
    a FlashMLASchedMeta that the call fills is changed. A child of fork() runs on one thread. torch.compile,
    torch.export and fake tensors see one operator of torch's, torch.ops.flash_mla_kernels.

    Raises ValueError naming the argument that is wrong, NotImplementedError for a feature that is not there yet.
    """
    if indices is not None:
        lists = dict(
            topk_length=topk_length,
            attn_sink=attn_sink,
            extra_k_cache=extra_k_cache,
            extra_indices_in_kvcache=extra_indices_in_kvcache,
            extra_topk_length=extra_topk_length,
        )
        if q_rope is not None:
            raise ValueError("q_rope is given, expected None beside indices")
        flags = (head_dim_v, causal, is_fp8_kvcache)
        return _sparse(q, k_cache, indices, lists, flags, tile_scheduler_metadata, num_splits, softmax_scale, out)
    if not (attn_sink is extra_k_cache is extra_indices_in_kvcache is topk_length is extra_topk_length is None):
        _refuse_lists(
            attn_sink=attn_sink,
            extra_k_cache=extra_k_cache,
            extra_indices_in_kvcache=extra_indices_in_kvcache,
            topk_length=topk_length,
            extra_topk_length=extra_topk_length,
        )
    q_shape = shape_of(q, "q", 4)
    device = cuda_device(q)
    head_dim_v = head_dim(head_dim_v, q_shape[3])
    token_rows = True
    parts = tile_scheduler_metadata
    config = None
    if isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        if num_splits is not None:
            raise ValueError("num_splits is given, expected None beside a FlashMLASchedMeta")
        token_rows = False
        config = _config(q, k_cache, causal, is_fp8_kvcache)
        parts, num_splits = _metadata(tile_scheduler_metadata, config, cache_seqlens)
    inputs = (q, k_cache, block_table, cache_seqlens, parts, num_splits)
    if is_fp8_kvcache:
        if q_rope is not None:
            raise ValueError("q_rope is given, expected None with is_fp8_kvcache")
        _check_latent_width(head_dim_v)
        _check_fp8(k_cache)
        out, lse = dense_fp8_decode(*inputs, softmax_scale=softmax_scale, causal=causal, token_rows=token_rows, out=out)
    else:
        options = dict(softmax_scale=softmax_scale, causal=causal, token_rows=token_rows)
        if q_rope is not None:
            options["q_rope"] = q_rope
        out, lse = run_dense_decode(q_shape, head_dim_v, device, inputs, out, **options)
    if config is not None and not tile_scheduler_metadata.have_initialized:
        # Only now: a call that was refused must not bind the object to its shapes.
        tile_scheduler_metadata.tile_scheduler_metadata = parts
        tile_scheduler_metadata.num_splits = num_splits
        tile_scheduler_metadata.config = config
        tile_scheduler_metadata.have_initialized = True
    return out, lse


def _refuse_lists(**lists: Optional[Array]) -> None:
    for name, value in lists.items():
        if value is not None:
            raise ValueError(f"{name} is given, expected None without indices")


def _check_latent_width(head_dim_v: Any) -> None:
    if head_dim_v != 512:
        raise ValueError(f"head_dim_v is {head_dim_v!r}, expected 512")


def _check_fp8(k_cache: Array) -> None:
    bytes_per_token = shape_of(as_bytes(k_cache), "k_cache", 4)[3]
    if bytes_per_token not in (656, 584):
        raise ValueError(
            f"k_cache.shape[3] is {bytes_per_token}, expected 656 or 584 bytes per token with is_fp8_kvcache"
        )


def _sparse(q, k_cache, indices, lists, flags, metadata, num_splits, softmax_scale, out):
    head_dim_v, causal, is_fp8_kvcache = flags
    _check_latent_width(head_dim_v)
    if causal:
        raise ValueError(f"causal is {causal!r}, expected False beside indices: the list is the mask")
    if is_fp8_kvcache:
        _check_fp8(k_cache)
    config = None
    if isinstance(metadata, FlashMLASchedMeta):
        if num_splits is not None:
            raise ValueError("num_splits is given, expected None beside a FlashMLASchedMeta")
        config = _config(q, k_cache, causal, is_fp8_kvcache)
        config.topk = shape_of(indices, "indices", 3)[2]
        if lists["extra_k_cache"] is not None:
            config.extra_page_block_size = shape_of(as_bytes(lists["extra_k_cache"]), "extra_k_cache", 4)[1]
            config.extra_topk = shape_of(lists["extra_indices_in_kvcache"], "extra_indices_in_kvcache", 3)[2]
        if metadata.have_initialized and not metadata.config == config:
            raise ValueError(f"tile_scheduler_metadata was filled for {metadata.config}, expected {config}")
    out, lse = sparse_decode(q, k_cache, indices, softmax_scale=softmax_scale, out=out, **lists)
    if config is not None:
        # Only now: a call that was refused must not bind the object to its shapes.
        metadata.config = config
        metadata.have_initialized = True
    return out, lse


def _config(q: Array, k_cache: Array, causal: bool, is_fp8_kvcache: bool) -> FlashMLASchedMeta.Config:
    b, s_q, h_q, _ = shape_of(q, "q", 4)
    _, page_size, h_k, _ = shape_of(as_bytes(k_cache), "k_cache", 4)
    return FlashMLASchedMeta.Config(b, s_q, h_q, page_size, h_k, bool(causal), bool(is_fp8_kvcache), None, None, None)


def _metadata(meta: FlashMLASchedMeta, config: FlashMLASchedMeta.Config, cache_seqlens: Array):
    """The object's schedule, or a new one if it has none yet; ValueError if it was planned for something else."""
    if not meta.have_initialized:
        return _plan(cache_seqlens, config.s_q, config.h_q, config.h_k, token_rows=False)
    # Not "!=", which torch.compile does not follow for sizes that vary.
    if not meta.config == config:
        raise ValueError(f"tile_scheduler_metadata was filled for {meta.config}, expected the same as now: {config}")
    return meta.tile_scheduler_metadata, meta.num_splits


def flash_mla_sparse_fwd(
    q: Array,
    kv: Array,
    indices: Array,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Optional[Array] = None,
    topk_length: Optional[Array] = None,
    out: Optional[Array] = None,
) -> Tuple[Array, Array, Array]:
    """Token-sparse prefill over flat tokens.

    q: (s_q, h_q, 576 or 512) bfloat16 or float16; kv: (s_kv, 1, the same), or one-byte elements in an FP8 format of
    flash_mla_kernels.sparse_decode; indices: (s_q, 1, topk) int32, none where negative or not below s_kv; attn_sink: (h_q,)
    float32; topk_length: (s_q,) int32. Any h_q and topk. Several requests, and pages: flash_mla_kernels.sparse_prefill.

    Returns out (s_q, h_q, 512) in q's dtype, max_logits and lse (s_q, h_q) float32, lse in natural log (FlashMLA's was in
    base 2 until 2026); -inf and +inf where nothing is selected. ``out``: as of flash_mla_with_kvcache. Raises ValueError
    naming the argument.
    """
    if d_v != 512:
        raise ValueError(f"d_v is {d_v!r}, expected 512")
    return sparse_prefill(q, kv, indices, softmax_scale=sm_scale, attn_sink=attn_sink, topk_length=topk_length, out=out)
