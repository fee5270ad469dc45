"""FlashMLA's dense prefill: attention over ragged queries, keys and values of their own, forward only."""

import sys
from typing import Any, Optional, Tuple

from ._arrays import Array, count, is_torch, shape_of
from ._gqa import gqa_attention


def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_qo: Array,
    cu_seqlens_kv: Array,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> Tuple[Array, Array]:
    """Attention of every sequence's queries to its keys.

    q: (total_q, h_q, d_qk), k: (total_k, h_kv, d_qk), v: (total_k, h_kv, d_v), bfloat16 or float16 (float32 too on the
    CPU), h_q a multiple of h_kv; sequence i has the rows cu_seqlens_qo[i] to cu_seqlens_qo[i + 1] - 1 of q, and those of
    cu_seqlens_kv of k and v; both (b + 1,) int32. max_seqlen_qo: queries of a sequence at most; max_seqlen_kv is not needed.
    softmax_scale defaults to d_qk ** -0.5. causal: query i of n sees keys j <= m - n + i of m. deterministic and is_varlen
    change nothing: a call with the same inputs always has the same bits.

    Returns out (total_q, h_q, d_v) in q's dtype and lse (total_q, h_q) float32, natural log; 0 and +inf where a query sees
    no key. On a GPU d_qk and d_v as gqa_attention takes them, 192 and 128 among them. Raises ValueError naming the argument,
    NotImplementedError for dropout, and where torch would want a backward pass: there is none.
    """
    if dropout_p != 0:
        raise NotImplementedError(f"dropout_p is {dropout_p!r}, expected 0: there is no dropout")
    _refuse_gradients(q=q, k=k, v=v)
    count(max_seqlen_kv, "max_seqlen_kv", 0)
    out, lse = gqa_attention(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_qo,
        cu_seqlens_k=cu_seqlens_kv,
        softmax_scale=softmax_scale,
        causal=causal,
        max_seqlen_q=count(max_seqlen_qo, "max_seqlen_qo", 0),
    )
    return out, lse.T


def flash_attn_varlen_qkvpacked_func(
    qkv: Array,
    cu_seqlens: Array,
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> Tuple[Array, Array]:
    """flash_attn_varlen_func of q, k and v in one tensor, (total, h, 2 * head_dim_qk + d_v), of which nothing is copied."""
    shape_of(qkv, "qkv", 3)
    d = _head_dim(head_dim_qk, qkv, "qkv", 2)
    _refuse_gradients(qkv=qkv)
    return flash_attn_varlen_func(
        *(qkv[..., :d], qkv[..., d : 2 * d], qkv[..., 2 * d :], cu_seqlens, cu_seqlens, max_seqlen, max_seqlen),
        *(dropout_p, softmax_scale, causal, deterministic, is_varlen),
    )


def flash_attn_varlen_kvpacked_func(
    q: Array,
    kv: Array,
    cu_seqlens_qo: Array,
    cu_seqlens_kv: Array,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> Tuple[Array, Array]:
    """flash_attn_varlen_func of k and v in one tensor, (total_k, h_kv, head_dim_qk + d_v), of which nothing is copied."""
    shape_of(kv, "kv", 3)
    d = _head_dim(head_dim_qk, kv, "kv", 1)
    _refuse_gradients(q=q, kv=kv)
    return flash_attn_varlen_func(
        *(q, kv[..., :d], kv[..., d:], cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv),
        *(dropout_p, softmax_scale, causal, deterministic, is_varlen),
    )


def _head_dim(head_dim_qk: Any, packed: Array, name: str, before_v: int) -> int:
    d, width = count(head_dim_qk, "head_dim_qk"), packed.shape[2]
    if before_v * d >= width:
        raise ValueError(f"head_dim_qk is {d}, expected less than {name}.shape[2] / {before_v} = {width} / {before_v}")
    return d


def _refuse_gradients(**tensors: Array) -> None:
    for name, x in tensors.items():
        if is_torch(x) and x.requires_grad and sys.modules["torch"].is_grad_enabled():
            raise NotImplementedError(
                f"{name} requires a gradient, expected none: there is no backward pass (call under torch.no_grad())"
            )
