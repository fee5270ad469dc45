"""MLA of flash_mla_kernels in SGLang's attention backends ``flashmla`` (dense) and ``dsa`` (sparse).

SGLang calls ``register`` in each of its processes (entry point ``sglang.srt.plugins``). Its hooks replace a function in every
module that has imported it, so what is not ours to serve goes on to the original.
"""

import logging
from functools import lru_cache
from typing import Optional

import torch

from flash_mla_kernels import (
    dense_fp8_decode,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_decoding_metadata,
    sparse_decode,
)

#: The release whose backend is known to fit.
SUPPORTED = "0.5.23"
_INTERFACE = "sglang.kernels.ops.attention.flash_mla_interface"
_FP8 = torch.float8_e4m3fn
_V32_BYTES = 656
_LOG2_E = 1.4426950408889634

logger = logging.getLogger("sglang.flash_mla_sglang")


def refusal(version: str) -> Optional[str]:
    """Why this SGLang is not supported, None if it is."""
    if version.split("+")[0].split(".post")[0] == SUPPORTED:
        return None
    return f"flash-mla-sglang supports SGLang {SUPPORTED}, this is SGLang {version}; its kernels are not used"


def register() -> None:
    """Has SGLang call ``plan``, ``decode`` and ``sparse_prefill`` around its own functions."""
    from importlib.metadata import version

    reason = refusal(version("sglang"))
    if reason is not None:
        logger.warning(reason)
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_INTERFACE}.get_mla_metadata", plan, HookType.AROUND)
    HookRegistry.register(f"{_INTERFACE}.flash_mla_with_kvcache", decode, HookType.AROUND)
    HookRegistry.register(f"{_INTERFACE}.flash_mla_sparse_fwd", sparse_prefill, HookType.AROUND)


@lru_cache(maxsize=None)
def _serves(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0))


def plan(
    original,
    cache_seqlens=None,
    num_q_tokens_per_head_k=None,
    num_heads_k=None,
    num_heads_q=None,
    is_fp8_kvcache=False,
    topk=None,
):
    """get_mla_metadata: our plan for dense decode, which SGLang copies into its graphs' buffers. Ours over lists plans within
    the call, so that SGLang's own serves as well."""
    arguments = (cache_seqlens, num_q_tokens_per_head_k, num_heads_k, num_heads_q, is_fp8_kvcache, topk)
    if cache_seqlens is None or topk is not None or not _serves(cache_seqlens.device):
        return original(*arguments)
    return get_mla_decoding_metadata(*arguments)


def decode(
    original,
    q,
    k_cache,
    block_table,
    cache_seqlens,
    head_dim_v,
    tile_scheduler_metadata,
    num_splits=None,
    softmax_scale=None,
    causal=False,
    **options,
):
    """flash_mla_with_kvcache: ours where the plan is plan()'s, in tensors, and for lists over the cache of V3.2."""
    arguments = (q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits)
    given = {name: value for name, value in options.items() if value is not None and name != "use_legacy"}
    if isinstance(tile_scheduler_metadata, torch.Tensor) and _serves(q.device):
        if _is_v32(q, k_cache, given):
            return sparse_decode(q, k_cache, given["indices"], softmax_scale=softmax_scale)
        if not any(value is not False for value in given.values()) and _is_16_bit(q, k_cache):
            return flash_mla_with_kvcache(*arguments, softmax_scale, causal)
        if given.keys() == {"descale_q", "descale_k"} and q.dtype == k_cache.dtype == _FP8:
            return _decode_fp8(arguments, softmax_scale, causal, **given)
    return original(*arguments, softmax_scale, causal, **options)


def _is_16_bit(q, k_cache):
    return q.dtype in (torch.bfloat16, torch.float16) and k_cache.dtype == q.dtype


def _is_v32(q, k_cache, given):
    """Lists over 656 bytes a token, and nothing beside them that V3.2 does not have."""
    return (
        given.get("indices") is not None
        and given.keys() <= {"indices", "is_fp8_kvcache", "kv_format"}
        and given.get("is_fp8_kvcache") is True
        and given.get("kv_format", "V32") == "V32"
        and q.dtype in (torch.bfloat16, torch.float16)
        and k_cache.element_size() == 1
        and k_cache.shape[-1] == _V32_BYTES
    )


def _decode_fp8(arguments, softmax_scale, causal, descale_q, descale_k):
    """Queries and cache of e4m3 elements under a scale each, which lie in device memory: they multiply the queries and the
    result, since the kernel takes its own from the host."""
    q, k_cache, block_table, cache_seqlens, _, parts, num_splits = arguments
    out, lse = dense_fp8_decode(
        (q.float() * (descale_q * descale_k)).to(torch.bfloat16),
        k_cache,
        block_table,
        cache_seqlens,
        parts,
        num_splits,
        softmax_scale=softmax_scale,
        causal=causal,
        token_rows=True,
    )
    return (out * descale_k).to(torch.bfloat16), lse


def sparse_prefill(original, q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None, *, use_legacy=True):
    """flash_mla_sparse_fwd over rows of 16 bits. Statistics are in the base of the kernels that SGLang would have called."""
    if not (_serves(q.device) and _is_16_bit(q, kv) and d_v == 512 and q.shape[-1] == 576):
        return original(q, kv, indices, sm_scale, d_v, attn_sink, topk_length, use_legacy=use_legacy)
    out, max_logits, lse = flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v, attn_sink, topk_length)
    if use_legacy:
        max_logits, lse = max_logits * _LOG2_E, lse * _LOG2_E
    return out, max_logits, lse
