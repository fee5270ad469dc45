"""Multi-head latent attention (MLA) on CPUs and Hopper GPUs; a drop-in for FlashMLA's interface."""

# First: it loads the library.
from ._threads import threading_info  # isort: skip
from ._arrays import Array
from ._C import version as _version
from ._gqa import gqa_attention, gqa_schedule
from ._indexer import (
    append_index_keys,
    fp8_mqa_logits,
    fp8_paged_mqa_logits,
    mqa_top_k,
    paged_mqa_top_k,
    quantise_index_queries,
    top_k,
)
from ._interface import (
    FlashMLASchedMeta,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_decoding_metadata,
    get_mla_metadata,
)
from ._library import (
    backends,
    build_decode_schedule,
    cpu_isa,
    dense_decode,
    merge_states,
    reference_dense_decode,
)
from ._mhc import mhc_post, mhc_post_pre, mhc_pre
from ._mla_cascade import expand_latents, mla_cascade
from ._pages import append_pages, batch_positions, merge_states_in_place, paged_seqlens
from ._prefill import dense_prefill
from ._routing import choose_experts
from ._rows import add_rms_norm, apply_rope, gated_activation, rms_norm
from ._sampling import filter_tokens, sample_tokens, speculative_sampling, token_probabilities
from ._sparse import append_kv, dense_fp8_decode, gather_kv, quantise_fp8, sparse_decode, sparse_prefill
from ._varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .llm import LLM, SamplingParams
from .tokenizer import ChatTemplate, Tokenizer

__version__ = _version()

__all__ = [
    "Array",
    "ChatTemplate",
    "FlashMLASchedMeta",
    "LLM",
    "SamplingParams",
    "Tokenizer",
    "add_rms_norm",
    "append_index_keys",
    "append_kv",
    "append_pages",
    "apply_rope",
    "backends",
    "batch_positions",
    "build_decode_schedule",
    "choose_experts",
    "cpu_isa",
    "dense_decode",
    "dense_fp8_decode",
    "dense_prefill",
    "expand_latents",
    "filter_tokens",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "fp8_mqa_logits",
    "fp8_paged_mqa_logits",
    "gated_activation",
    "gather_kv",
    "get_mla_decoding_metadata",
    "get_mla_metadata",
    "gqa_attention",
    "gqa_schedule",
    "merge_states",
    "merge_states_in_place",
    "mhc_post",
    "mhc_post_pre",
    "mhc_pre",
    "mla_cascade",
    "mqa_top_k",
    "paged_mqa_top_k",
    "paged_seqlens",
    "quantise_fp8",
    "quantise_index_queries",
    "reference_dense_decode",
    "rms_norm",
    "sample_tokens",
    "sparse_decode",
    "sparse_prefill",
    "speculative_sampling",
    "threading_info",
    "token_probabilities",
    "top_k",
]
