"""Sparse MLA on Hopper GPUs: vLLM's FLASHMLA_SPARSE with our kernels in the places where it calls FlashMLA's.

The metadata, the lists' translation into slots, cache writes and what vLLM decides per batch stay vLLM's. Where FlashMLA wants
64 or 128 heads ours takes as many as there are, and prompts are attended to in the FP8 cache itself.
"""

from inspect import signature
from typing import ClassVar

import torch
from vllm.v1.attention.backends.mla.flashmla_sparse import FlashMLASparseBackend, FlashMLASparseImpl

from flash_mla_kernels import sparse_decode, sparse_prefill

from .hopper import why_not_available

#: More query tokens than this in one request are a prompt's (or vLLM's batch of everything), and not a step of decode.
MOST_DECODE_TOKENS = 64


class FlashMLASparseHopperBackend(FlashMLASparseBackend):
    # It keeps vLLM's name: vLLM ties to it which format an FP8 cache has.
    supported_kv_cache_dtypes: ClassVar[list] = [
        name for name in FlashMLASparseBackend.supported_kv_cache_dtypes if "fp4" not in name
    ]

    @staticmethod
    def get_impl_cls():
        return FlashMLASparseHopperImpl

    @classmethod
    def supports_compute_capability(cls, capability):
        return (capability.major, capability.minor) == (9, 0)


class FlashMLASparseHopperImpl(FlashMLASparseImpl):
    def __init__(self, *arguments, **mla_arguments):
        reason = why_not_available()
        if reason is not None:
            raise RuntimeError(reason)
        super().__init__(*arguments, **mla_arguments)

    def _fp8_flash_mla_kernel(self, q, kv_c_and_k_pe_cache, topk_indices, kernel_metadata):
        """Over a cache of 656 bytes a token: q (requests, tokens, heads, 576), slots (requests, tokens, topk). Returns out
        (requests, tokens, heads, 512) and lse (requests, heads, tokens)."""
        cache = kv_c_and_k_pe_cache.view(torch.uint8).unsqueeze(-2)
        if q.size(0) == 1 and q.size(1) > MOST_DECODE_TOKENS:
            out, _, lse = sparse_prefill(q[0], cache, topk_indices[0], softmax_scale=self.softmax_scale)
            return out.unsqueeze(0), lse.T.unsqueeze(0)
        return sparse_decode(q, cache, topk_indices, softmax_scale=self.softmax_scale)

    def _bf16_flash_mla_kernel(
        self, q, kv_c_and_k_pe_cache, topk_indices, topk_length=None, actual_num_heads=None, out=None
    ):
        """Over rows of 16 bits: q (tokens, heads, 576), slots (tokens, topk). Returns out (tokens, heads, 512), from vLLM 0.29
        on with lse (tokens, heads). Heads past ``actual_num_heads`` are padding."""
        heads = q.shape[1] if actual_num_heads is None else actual_num_heads
        fits = out is not None and out.shape[1] == heads
        result, _, lse = sparse_prefill(
            q[:, :heads],
            kv_c_and_k_pe_cache.view(-1, 1, kv_c_and_k_pe_cache.shape[-1]),
            topk_indices.view(q.shape[0], -1),
            topk_length=topk_length,
            softmax_scale=self.softmax_scale,
            out=out if fits else None,
        )
        if out is not None and not fits:
            result = out[:, :heads].copy_(result)
        if not RETURNS_LSE:
            return result
        # A rank without one of a query's keys: the value that vLLM's reduction over ranks leaves out.
        return result, lse.masked_fill(lse == float("inf"), float("-inf"))


#: Whether vLLM's own function returns lse beside out.
RETURNS_LSE = "actual_num_heads" in signature(FlashMLASparseImpl._bf16_flash_mla_kernel).parameters
