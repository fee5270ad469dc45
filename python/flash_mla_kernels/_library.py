"""What the library offers beyond FlashMLA's interface."""

from typing import Dict, List, Optional, Tuple

from . import _C
from ._arrays import (
    Array,
    count,
    cuda_device,
    current_stream,
    empty,
    head_dim,
    output,
    shape_of,
    traced,
    workspace_allocator,
)


def backends() -> List[Dict[str, object]]:
    """All backends the library knows: name, available, device, and why it is or is not used."""
    return _C.backends()


def cpu_isa() -> Dict[str, object]:
    """The CPU backend's instruction set: selected, reason, and the names FLASH_MLA_CPU_ISA accepts here.

    Raises ValueError when FLASH_MLA_CPU_ISA names one that this machine lacks.
    """
    return _C.cpu_isa()


def build_decode_schedule(
    cache_seqlens: Array,
    num_parts: int,
    *,
    block_size: int = 64,
    fixed_overhead_blocks: int = 5,
    min_blocks_per_request: int = 1,
    fixed_split_blocks: int = 0,
    min_blocks_per_part: int = 1,
    whole_requests_percent: int = 0,
    token_rows: bool = False,
) -> Tuple[Array, Array]:
    """Plans which worker handles which tokens of which request.

    cache_seqlens: (b,) int32, contiguous, on the host or on a GPU (torch), where the plan is then made without reading
    anything back. Returns parts (num_parts, 8) int32 with rows (begin_req,
    end_req inclusive, begin_block, end_block exclusive, begin_split, first_is_split, last_is_split, 0), or with
    ``token_rows`` (begin_req, begin_token, end_req, end_token, begin_split, 0, 0, 0); and num_splits (b + 1,) int32,
    the exclusive prefix sum of splits per request. ``fixed_split_blocks`` > 0 is the batch-invariant mode; without it no
    part is given fewer than ``min_blocks_per_part`` blocks as long as there are that many, and requests stay whole where
    that keeps no part busy for more than ``whole_requests_percent`` over the average.
    Raises ValueError for a negative length or an option out of range.
    """
    (b,) = shape_of(cache_seqlens, "cache_seqlens", 1)
    num_parts = count(num_parts, "num_parts")
    if num_parts > 1 << 20:  # the library's own limit, before memory for more is asked for
        raise ValueError(f"num_parts is {num_parts}, expected 1 to {1 << 20}")
    parts = empty((num_parts, 8), cache_seqlens, "int32")
    num_splits = empty((b + 1,), cache_seqlens, "int32")
    _C.build_schedule(
        cache_seqlens,
        parts,
        num_splits,
        token_rows=token_rows,
        block_size=block_size,
        fixed_overhead_blocks=fixed_overhead_blocks,
        min_blocks_per_request=min_blocks_per_request,
        fixed_split_blocks=fixed_split_blocks,
        min_blocks_per_part=min_blocks_per_part,
        whole_requests_percent=whole_requests_percent,
        stream=current_stream(cuda_device(cache_seqlens)),
    )
    return parts, num_splits


def dense_decode(
    q: Array,
    k_cache: Array,
    block_table: Array,
    cache_seqlens: Array,
    head_dim_v: int,
    parts: Array,
    num_splits: Array,
    *,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    block_size: int = 64,
    fixed_split_blocks: int = 0,
    token_rows: bool = False,
    num_threads: int = 0,
    out: Optional[Array] = None,
    q_rope: Optional[Array] = None,
) -> Tuple[Array, Array]:
    """flash_mla_with_kvcache with a plan of build_decode_schedule.

    parts (num_parts, 8) and num_splits (b + 1,) int32 as build_decode_schedule returned them; block_size,
    fixed_split_blocks and token_rows as it was given them. The other tensors, the result and the errors as
    flash_mla_with_kvcache. ``fixed_split_blocks`` > 0 is the batch-invariant mode: a request's result has the same bits
    whatever else is in the batch. ``num_threads`` 0 means as many as OpenMP would use.
    """
    q_shape = shape_of(q, "q", 4)
    device = cuda_device(q)
    head_dim_v = head_dim(head_dim_v, q_shape[3])
    return run_dense_decode(
        q_shape,
        head_dim_v,
        device,
        (q, k_cache, block_table, cache_seqlens, parts, num_splits),
        out,
        softmax_scale=softmax_scale,
        causal=causal,
        token_rows=bool(token_rows),
        block_size=block_size,
        fixed_split_blocks=fixed_split_blocks,
        num_threads=num_threads,
        **({} if q_rope is None else {"q_rope": q_rope}),
    )


def run_dense_decode(q_shape, head_dim_v, device, inputs, out=None, **options):
    """Allocates out and lse beside q, decodes on q's stream and returns them; inputs as dense_decode takes them first,
    parts and num_splits included, options as _C.dense_decode takes them."""
    b, s_q, h_q, _ = q_shape
    q = inputs[0]
    out = output(out, (b, s_q, h_q, head_dim_v), q)
    lse = empty((b, h_q, s_q), q, "float32")
    if traced(q):
        from . import _torch

        _torch.dense_decode(*inputs, out, lse, **options)
    else:
        call_dense_decode(device, inputs, out, lse, **options)
    return out, lse


def call_dense_decode(device, inputs, out, lse, **options):
    q, k_cache, block_table, cache_seqlens, parts, num_splits = inputs
    _C.dense_decode(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        out,
        lse,
        parts,
        num_splits,
        stream=current_stream(device),
        allocate=workspace_allocator(device),
        **options,
    )


def reference_dense_decode(
    q: Array,
    k_cache: Array,
    block_table: Array,
    cache_seqlens: Array,
    head_dim_v: int,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
) -> Tuple[Array, Array]:
    """Dense decode by the definition, every sum in float64; for verification.

    Shapes as flash_mla_with_kvcache; q and k_cache may also be float64. Returns out (b, s_q, h_q, head_dim_v) and lse
    (b, h_q, s_q), both float64. Raises ValueError as flash_mla_with_kvcache does.
    """
    b, s_q, h_q, d_qk = shape_of(q, "q", 4)
    head_dim_v = head_dim(head_dim_v, d_qk)
    out = empty((b, s_q, h_q, head_dim_v), q, "float64")
    lse = empty((b, h_q, s_q), q, "float64")
    _C.reference_dense_decode(q, k_cache, block_table, cache_seqlens, out, lse, softmax_scale, causal)
    return out, lse


def merge_states(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array, base: str = "e") -> Tuple[Array, Array]:
    """Merges the attention of the same queries over two disjoint sets of keys.

    out_a, out_b: (b, s_q, h_q, d) float32, float16 or bfloat16; lse_a, lse_b: (b, h_q, s_q) float32, in ``base`` "e"
    (this library, FlashAttention) or "2" (FlashInfer). An empty state has lse +inf or -inf and contributes nothing.
    Returns (out, lse) of the same shapes, lse +inf where both are empty. CPU tensors, or CUDA tensors of one device, on
    torch's current stream. Raises ValueError for anything else.
    """
    if base not in ("e", "2"):
        raise ValueError(f'base is {base!r}, expected "e" or "2"')
    out = empty(shape_of(out_a, "out_a", 4), out_a)
    lse = empty(shape_of(lse_a, "lse_a", 3), lse_a, "float32")
    stream = current_stream(cuda_device(out_a))
    _C.merge_states(out_a, lse_a, out_b, lse_b, out, lse, base == "2", stream=stream)
    return out, lse
