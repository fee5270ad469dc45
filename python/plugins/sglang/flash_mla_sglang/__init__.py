"""Dense MLA decode of flash_mla_kernels in SGLang's attention backend ``flashmla``.

SGLang calls ``register`` in each of its processes (entry point ``sglang.srt.plugins``). Its hooks replace a function in every
module that has imported it, so what is not ours to serve goes on to the original.
"""

import logging
from functools import lru_cache
from typing import Optional

import torch

from flash_mla_kernels import flash_mla_with_kvcache, get_mla_decoding_metadata

#: The release whose backend is known to fit.
SUPPORTED = "0.5.23"
_BACKEND = "sglang.srt.layers.attention.flashmla_backend"

logger = logging.getLogger("sglang.flash_mla_sglang")


def refusal(version: str) -> Optional[str]:
    """Why this SGLang is not supported, None if it is."""
    if version.split("+")[0].split(".post")[0] == SUPPORTED:
        return None
    return f"flash-mla-sglang supports SGLang {SUPPORTED}, this is SGLang {version}; its kernels are not used"


def register() -> None:
    """Has SGLang call ``plan`` and ``decode`` around its own functions."""
    from importlib.metadata import version

    reason = refusal(version("sglang"))
    if reason is not None:
        logger.warning(reason)
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_BACKEND}.get_mla_metadata", plan, HookType.AROUND)
    HookRegistry.register(f"{_BACKEND}.flash_mla_with_kvcache", decode, HookType.AROUND)


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
    """get_mla_metadata: our plan for dense decode over a 16-bit cache. SGLang copies it into its graphs' buffers."""
    arguments = (cache_seqlens, num_q_tokens_per_head_k, num_heads_k, num_heads_q, is_fp8_kvcache, topk)
    if cache_seqlens is None or is_fp8_kvcache or topk is not None or not _serves(cache_seqlens.device):
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
    """flash_mla_with_kvcache: ours where plan() was, told by what was given: a plan in tensors and 16-bit elements."""
    given = {name: value for name, value in options.items() if value is not None and name != "use_legacy"}
    ours = (
        isinstance(tile_scheduler_metadata, torch.Tensor)
        and not any(value is not False for value in given.values())
        and q.dtype in (torch.bfloat16, torch.float16)
        and k_cache.dtype == q.dtype
        and _serves(q.device)
    )
    arguments = (q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits)
    if not ours:
        return original(*arguments, softmax_scale, causal, **options)
    return flash_mla_with_kvcache(*arguments, softmax_scale, causal)
