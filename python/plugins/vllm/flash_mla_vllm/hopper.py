"""MLA decode on Hopper GPUs: vLLM's backend CUSTOM."""

from typing import ClassVar

import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend, MLACommonImpl
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, MultipleOf

import flash_mla_kernels

from .decode import DecodeMetadataBuilder, decode, decode_fp8


def why_not_available():
    """None where the kernels can run, the library's own reason otherwise."""
    for backend in flash_mla_kernels.backends():
        if backend["name"] == "sm90":
            return None if backend["available"] else f"flash_mla_kernels' Hopper backend: {backend['detail']}"
    return "this flash_mla_kernels knows no Hopper backend"


class FlashMLAHopperBackend(MLACommonBackend):
    supported_dtypes: ClassVar[list] = [torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "bfloat16", "float16", "fp8", "fp8_e4m3"]

    @staticmethod
    def get_name():
        return "CUSTOM"

    @staticmethod
    def get_builder_cls():
        return FlashMLAHopperBuilder

    @staticmethod
    def get_impl_cls():
        return FlashMLAHopperImpl

    @classmethod
    def get_supported_head_sizes(cls):
        return [576]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [MultipleOf(64)]

    @classmethod
    def supports_compute_capability(cls, capability):
        return (capability.major, capability.minor) == (9, 0)

    @classmethod
    def supports_batch_invariance(cls):
        return True

    @classmethod
    def supports_combination(
        cls,
        head_size,
        dtype,
        kv_cache_dtype,
        block_size,
        use_mla,
        has_sink,
        use_sparse,
        use_mm_prefix,
        device_capability,
    ):
        if has_sink:
            return "flash-mla-vllm has no attention sinks"
        # Whether the kernels run here is not asked: it would begin CUDA in a process that vLLM may fork.
        return None


class FlashMLAHopperBuilder(DecodeMetadataBuilder):
    # Full graphs for decode, piecewise ones for the rest.
    _cudagraph_support: ClassVar = AttentionCGSupport.UNIFORM_BATCH
    # Requests with at most so many new tokens are decoded.
    reorder_batch_threshold: int = 64


class FlashMLAHopperImpl(MLACommonImpl):
    can_return_lse_for_decode = True
    supports_dcp = True

    def __init__(
        self,
        num_heads,
        head_size,
        scale,
        num_kv_heads,
        alibi_slopes,
        sliding_window,
        kv_cache_dtype,
        logits_soft_cap,
        attn_type,
        kv_sharing_target_layer_name,
        **mla_arguments,
    ):
        for name, value in dict(
            alibi_slopes=alibi_slopes, sliding_window=sliding_window, logits_soft_cap=logits_soft_cap
        ).items():
            if value is not None and value != 0:
                raise NotImplementedError(f"{name} is {value!r}, expected None: MLA's decode has none")
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"attn_type is {attn_type!r}, expected {AttentionType.DECODER!r}")
        reason = why_not_available()
        if reason is not None:
            raise RuntimeError(reason)
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **mla_arguments,
        )
        self.supports_quant_query_input = False

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        if kv_c_and_k_pe_cache.dtype == torch.float8_e4m3fn:
            out, lse = decode_fp8(self, q, kv_c_and_k_pe_cache, attn_metadata, layer._k_scale_float)
        else:
            out, lse = decode(self, q, kv_c_and_k_pe_cache, attn_metadata)
        if not self.need_to_return_lse_for_decode:
            return out, None
        return out, rows_of(lse)


def rows_of(lse):
    """The statistic as vLLM's reducers over ranks want it: (tokens, heads), and -inf where a rank has no key."""
    lse = lse.permute(0, 2, 1).flatten(0, 1)
    return lse.masked_fill(lse == float("inf"), float("-inf"))
