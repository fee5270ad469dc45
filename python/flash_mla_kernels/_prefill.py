"""Prefill in the form that is not absorbed."""

from typing import Optional, Tuple

from . import _C
from ._arrays import (
    Array,
    cuda_device,
    current_stream,
    empty,
    output,
    shape_of,
    traced,
    workspace_allocator,
)

_V_WIDTH = 128


def dense_prefill(
    q: Array,
    k_nope: Array,
    k_rope: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    out: Optional[Array] = None,
) -> Tuple[Array, Array]:
    """Attention of whole prompts or chunks of them, every head with keys and values of its own; on Hopper GPUs alone.

    q: (total_q, num_heads, 192) bfloat16 or float16, 128 columns and then 64 of the rotary part; k_nope: (total_k,
    num_heads, 128); k_rope: (total_k, 64), the same for all heads; v: (total_k, num_heads, 128). Any strides that are
    multiples of 8 elements, the last 1: k_nope and k_rope may be columns of keys that have been put together.
    cu_seqlens_q, cu_seqlens_k: (num_seqs + 1,) int32, where each sequence's queries and keys begin. causal: query i of a
    sequence sees keys j <= seqlen_k - seqlen_q + i. softmax_scale defaults to 192 ** -0.5.

    Returns out (total_q, num_heads, 128) in q's dtype and lse (num_heads, total_q) float32, natural log; 0 and +inf where a
    query sees no key. ``out``, where it is given, is written to and returned. The work is queued on torch's current stream;
    lengths are not checked. Raises ValueError naming the argument, NotImplementedError for tensors of a CPU.
    """
    total_q, num_heads, _ = shape_of(q, "q", 3)
    out = output(out, (total_q, num_heads, _V_WIDTH), q)
    lse = empty((num_heads, total_q), q, "float32")
    tensors = dict(
        q=q,
        k_nope=k_nope,
        k_rope=k_rope,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        out=out,
        lse=lse,
    )
    if traced(q):
        from . import _torch

        _torch.dense_prefill(*tensors.values(), softmax_scale, causal)
    else:
        call_dense_prefill(tensors, softmax_scale, causal)
    return out, lse


def call_dense_prefill(tensors, softmax_scale, causal) -> None:
    device = cuda_device(tensors["q"])
    _C.dense_prefill(
        tensors, softmax_scale, causal, stream=current_stream(device), allocate=workspace_allocator(device)
    )
