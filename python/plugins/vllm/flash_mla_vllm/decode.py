"""What the CPU's and Hopper's backends share: the schedule of a step, and the decode of a layer."""

from dataclasses import dataclass, fields

import torch
import vllm.envs
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonDecodeMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)

from flash_mla_kernels import (
    FlashMLASchedMeta,
    dense_decode,
    dense_fp8_decode,
    flash_mla_with_kvcache,
    get_mla_decoding_metadata,
    get_mla_metadata,
)

#: Blocks of 64 tokens in a split where VLLM_BATCH_INVARIANT asks for the same bits whatever else is in a batch.
INVARIANT_SPLIT_BLOCKS = 16


def fixed_split_blocks():
    return INVARIANT_SPLIT_BLOCKS if vllm.envs.VLLM_BATCH_INVARIANT else 0


@dataclass
class DecodeMetadata(MLACommonDecodeMetadata):
    """vLLM's metadata of a step's decode, and the step's schedule, which its first layer plans.

    Planned there, it is part of a captured CUDA graph, and each replay plans for the lengths that it finds.
    """

    plan: FlashMLASchedMeta


class DecodeMetadataBuilder(MLACommonMetadataBuilder):
    query_len_support = QueryLenSupport.UNIFORM

    def _build_decode(self, **arguments) -> DecodeMetadata:
        # vLLM passes them by name, and other ones in other releases; what they become is vLLM's to say.
        common = super()._build_decode(**arguments)
        values = {field.name: getattr(common, field.name) for field in fields(common)}
        return DecodeMetadata(**values, plan=get_mla_metadata()[0])


def decode(impl, q, cache, attn_metadata):
    """One layer's decode: out (tokens, heads, 512) and lse (requests, heads, s_q).

    q: (tokens, heads, 576), or its two parts as vLLM has them, of ``num_decodes`` requests with equally many tokens each.
    cache: (blocks, block_size, 576). Views of what vLLM has are all that is made: nothing runs but the library's kernels.
    """
    q, q_rope = q if isinstance(q, tuple) else (q, None)
    metadata, requests = attn_metadata.decode, attn_metadata.num_decodes
    inputs = (by_request(q, requests), cache.unsqueeze(-2), metadata.block_table, metadata.seq_lens, impl.kv_lora_rank)
    options = dict(softmax_scale=impl.scale, causal=True)
    if q_rope is not None:
        options["q_rope"] = by_request(q_rope, requests)
    blocks = fixed_split_blocks()
    if blocks == 0:
        out, lse = flash_mla_with_kvcache(*inputs, metadata.plan, **options)
    else:
        plan = planned(metadata, inputs[0], blocks)
        out, lse = dense_decode(*inputs, *plan, fixed_split_blocks=blocks, token_rows=True, **options)
    return out.flatten(0, 1), lse


def planned(metadata, q, blocks):
    """The step's plan as tensors, made by its first layer."""
    plan = metadata.plan
    if not plan.have_initialized:
        tokens, heads = q.shape[1:3]
        plan.tile_scheduler_metadata, plan.num_splits = get_mla_decoding_metadata(
            metadata.seq_lens, tokens * heads, 1, heads, fixed_split_blocks=blocks
        )
        plan.have_initialized = True
    return plan.tile_scheduler_metadata, plan.num_splits


def decode_fp8(impl, q, cache, attn_metadata, scale):
    """The same over a cache of e4m3 elements, (blocks, block_size, 576), which stand for their products with ``scale``."""
    if isinstance(q, tuple):
        q = torch.cat(q, dim=-1)
    metadata, blocks = attn_metadata.decode, fixed_split_blocks()
    q = by_request(q, attn_metadata.num_decodes)
    out, lse = dense_fp8_decode(
        q,
        cache.unsqueeze(-2),
        metadata.block_table,
        metadata.seq_lens,
        *planned(metadata, q, blocks),
        softmax_scale=impl.scale,
        causal=True,
        token_rows=True,
        fixed_split_blocks=blocks,
        kv_scale=scale,
    )
    return out.flatten(0, 1), lse


def by_request(q, requests):
    """(tokens, heads, width) as (requests, tokens of each, heads, width)."""
    if q.shape[0] % requests != 0:
        raise ValueError(f"q has {q.shape[0]} tokens, expected equally many for each of {requests} requests")
    return q.unflatten(0, (requests, -1))
