"""FlashInfer's names for calls of this library: a program changes its import and goes on.

Signatures are FlashInfer's as far as they mean something here; arguments that choose among its kernels are taken and have no
effect. Log-sum-exps are FlashInfer's, (tokens, heads) in base 2 and -inf where no key is seen: converted at this border from the
library's, (heads, tokens) in base e and +inf. What is not offered raises NotImplementedError naming it. Takes torch tensors, on the
CPU or a Hopper GPU.
"""

from . import _flashinfer_cascade as cascade
from . import _flashinfer_mhc as mhc
from . import _flashinfer_pages as page
from . import _flashinfer_rows as norm
from . import _flashinfer_sampling as sampling
from ._flashinfer_attention import (
    BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
    CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
    single_decode_with_kv_cache,
    single_prefill_with_kv_cache,
)
from ._flashinfer_cascade import (
    BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
    MultiLevelCascadeAttentionWrapper,
)
from ._flashinfer_merge import merge_state, merge_state_in_place, merge_states
from ._flashinfer_mhc import mhc_fused_post_pre, mhc_post
from ._flashinfer_mixed import BatchAttention, BatchPODWithPagedKVCacheWrapper, PODWithPagedKVCacheWrapper
from ._flashinfer_mla import BatchMLAPagedAttentionWrapper
from ._flashinfer_pages import (
    append_paged_kv_cache,
    append_paged_mla_kv_cache,
    get_batch_indices_positions,
    get_seq_lens,
)
from ._flashinfer_rows import (
    apply_llama31_rope,
    apply_llama31_rope_inplace,
    apply_llama31_rope_pos_ids,
    apply_llama31_rope_pos_ids_inplace,
    apply_rope,
    apply_rope_inplace,
    apply_rope_pos_ids,
    apply_rope_pos_ids_inplace,
    apply_rope_with_cos_sin_cache,
    apply_rope_with_cos_sin_cache_inplace,
    fused_add_rmsnorm,
    fused_add_rmsnorm_quant,
    gelu_and_mul,
    gelu_tanh_and_mul,
    gemma_fused_add_rmsnorm,
    gemma_rmsnorm,
    rmsnorm,
    rmsnorm_quant,
    silu_and_mul,
)
from ._flashinfer_sampling import (
    chain_speculative_sampling,
    fused_topk_deepseek,
    min_p_sampling_from_probs,
    sampling_from_logits,
    sampling_from_probs,
    softmax,
    top_k_mask_logits,
    top_k_renorm_prob,
    top_k_renorm_probs,
    top_k_sampling_from_probs,
    top_k_top_p_sampling_from_logits,
    top_k_top_p_sampling_from_probs,
    top_p_renorm_prob,
    top_p_renorm_probs,
    top_p_sampling_from_probs,
)

__all__ = [
    "BatchAttention",
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "BatchMLAPagedAttentionWrapper",
    "BatchPODWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
    "PODWithPagedKVCacheWrapper",
    "activation",
    "append_paged_kv_cache",
    "append_paged_mla_kv_cache",
    "apply_llama31_rope",
    "apply_llama31_rope_inplace",
    "apply_llama31_rope_pos_ids",
    "apply_llama31_rope_pos_ids_inplace",
    "apply_rope",
    "apply_rope_inplace",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
    "cascade",
    "chain_speculative_sampling",
    "fused_add_rmsnorm",
    "fused_add_rmsnorm_quant",
    "fused_topk_deepseek",
    "gelu_and_mul",
    "gelu_tanh_and_mul",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "get_batch_indices_positions",
    "get_seq_lens",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "mhc",
    "mhc_fused_post_pre",
    "mhc_post",
    "min_p_sampling_from_probs",
    "norm",
    "page",
    "rmsnorm",
    "rmsnorm_quant",
    "rope",
    "sampling",
    "sampling_from_logits",
    "sampling_from_probs",
    "silu_and_mul",
    "single_decode_with_kv_cache",
    "single_prefill_with_kv_cache",
    "softmax",
    "top_k_mask_logits",
    "top_k_renorm_prob",
    "top_k_renorm_probs",
    "top_k_sampling_from_probs",
    "top_k_top_p_sampling_from_logits",
    "top_k_top_p_sampling_from_probs",
    "top_p_renorm_prob",
    "top_p_renorm_probs",
    "top_p_sampling_from_probs",
]

# FlashInfer's modules; its norms, gates and rotations are one file here.
activation = rope = norm

#: Of FlashInfer, and not here.
_NOT_OFFERED = (
    *("BlockSparseAttentionWrapper", "VariableBlockSparseAttentionWrapper"),
    *("layernorm", "fused_rmsnorm_silu", "fused_add_rmsnorm_fp8_block_quant", "rope_quantize_fp8"),
    *("packbits", "segment_packbits", "bmm_fp8", "cutlass_fused_moe", "mhc_pre_big_fuse"),
)


def __getattr__(name: str):
    if name in _NOT_OFFERED:
        raise NotImplementedError(f"flash_mla_kernels.flashinfer has no {name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
