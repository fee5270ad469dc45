"""vLLM's MLA backend for CPUs with our decode. Its prefill, cache writes and block size of 16 stay."""

from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl

from .decode import DecodeMetadataBuilder, decode


class FlashMLACpuBackend(CPUMLABackend):
    @staticmethod
    def get_builder_cls():
        return DecodeMetadataBuilder

    @staticmethod
    def get_impl_cls():
        return FlashMLACpuImpl


class FlashMLACpuImpl(CPUMLAImpl):
    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        # Like CPUMLAImpl, for which vLLM reduces nothing over ranks: no lse.
        return decode(self, q, kv_c_and_k_pe_cache, attn_metadata)[0], None
