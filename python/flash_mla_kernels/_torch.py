"""The calls as operators of torch's (torch.ops.flash_mla_kernels), each with what a fake tensor needs.

torch.compile, torch.export and fake tensors follow operators, not extension modules. Called from where ``traced`` says so,
and loaded only then: torch is not needed to import the package. Outputs are arguments that the operator writes to, so that
``out=`` is one too; only a plan, whose number of rows is the library's to say, is a result.
"""

from functools import partial

import torch

from . import _C
from ._arrays import cuda_device
from ._gqa import INPUTS as _GQA_INPUTS
from ._gqa import call_gqa_attention
from ._library import call_dense_decode
from ._prefill import call_dense_prefill
from ._rows import call_rows
from ._sparse import call_dense_fp8_decode, call_sparse_decode, call_sparse_prefill

_NAMESPACE = "flash_mla_kernels"
_library = torch.library.Library(_NAMESPACE, "DEF")


def _operator(schema: str, run, fake):
    """Registers ``schema``, whose implementation is the same on every device, and returns torch's operator."""
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


def _nothing(*arguments, **options) -> None:
    """What a fake run does to outputs that exist already."""


def _run_plan(cache_seqlens, s_q, h_q, h_k, token_rows, fixed_split_blocks=0):
    from ._interface import _plan

    return _plan(cache_seqlens, s_q, h_q, h_k, token_rows, fixed_split_blocks)


def _fake_plan(cache_seqlens, s_q, h_q, h_k, token_rows, fixed_split_blocks=0):
    b = cache_seqlens.shape[0]
    device = cuda_device(cache_seqlens)
    if device is None:
        parts = _C.cpu_schedule_options()["num_parts"]
    elif any(isinstance(size, torch.SymInt) for size in (b, s_q, h_q, h_k)):
        parts = torch.library.get_ctx().new_dynamic_size()
    else:
        parts = _C.cuda_schedule_options(device, s_q, h_q, h_k, b)["num_parts"]
    return (
        cache_seqlens.new_empty((parts, 8), dtype=torch.int32),
        cache_seqlens.new_empty((b + 1,), dtype=torch.int32),
    )


plan = _operator(
    "plan(Tensor cache_seqlens, SymInt s_q, SymInt h_q, SymInt h_k, bool token_rows, "
    "int fixed_split_blocks=0) -> (Tensor, Tensor)",
    _run_plan,
    _fake_plan,
)


def _run_dense_decode(q, k_cache, block_table, cache_seqlens, parts, num_splits, out, lse, **options):
    inputs = (q, k_cache, block_table, cache_seqlens, parts, num_splits)
    call_dense_decode(cuda_device(q), inputs, out, lse, **options)


dense_decode = _operator(
    "dense_decode(Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens, Tensor parts, Tensor num_splits, "
    "Tensor(a!) out, Tensor(b!) lse, *, float? softmax_scale=None, bool causal=False, bool token_rows=False, "
    "int block_size=64, int fixed_split_blocks=0, int num_threads=0, Tensor? q_rope=None) -> ()",
    _run_dense_decode,
    _nothing,
)


def _run_with(call, *names):
    """An implementation that gives ``call`` its first arguments as a dict of these names and the others as they are."""

    def run(*arguments):
        call(dict(zip(names, arguments)), *arguments[len(names) :])

    return run


dense_fp8_decode = _operator(
    "dense_fp8_decode(Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens, Tensor parts, "
    "Tensor num_splits, Tensor(a!) out, Tensor(b!) lse, float? softmax_scale, bool causal, bool token_rows, "
    "int block_size, int fixed_split_blocks, int num_threads, float kv_scale, bool fp8_mma) -> ()",
    _run_with(
        call_dense_fp8_decode,
        *("q", "k_cache", "block_table", "cache_seqlens", "tile_scheduler_metadata", "num_splits", "out", "lse"),
    ),
    _nothing,
)

sparse_decode = _operator(
    "sparse_decode(Tensor q, Tensor k_cache, Tensor indices, Tensor? topk_length, Tensor? attn_sink, "
    "Tensor? extra_k_cache, Tensor? extra_indices_in_kvcache, Tensor? extra_topk_length, Tensor(a!) out, Tensor(b!) lse, "
    "float? softmax_scale, int fixed_split_blocks, int num_threads, float kv_scale, float extra_kv_scale, "
    "bool reference) -> ()",
    _run_with(
        call_sparse_decode,
        *("q", "k_cache", "indices", "topk_length", "attn_sink", "extra_k_cache", "extra_indices_in_kvcache"),
        *("extra_topk_length", "out", "lse"),
    ),
    _nothing,
)

sparse_prefill = _operator(
    "sparse_prefill(Tensor q, Tensor kv, Tensor indices, Tensor? topk_length, Tensor? attn_sink, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? block_table, Tensor? cache_seqlens, Tensor(a!) out, Tensor(b!) max_logits, "
    "Tensor(c!) lse, float? softmax_scale, int num_threads, float kv_scale, bool reference) -> ()",
    _run_with(
        call_sparse_prefill,
        *("q", "kv", "indices", "topk_length", "attn_sink", "cu_seqlens_q", "cu_seqlens_k", "block_table"),
        *("cache_seqlens", "out", "max_logits", "lse"),
    ),
    _nothing,
)

dense_prefill = _operator(
    "dense_prefill(Tensor q, Tensor k_nope, Tensor k_rope, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "Tensor(a!) out, Tensor(b!) lse, float? softmax_scale, bool causal) -> ()",
    _run_with(call_dense_prefill, *("q", "k_nope", "k_rope", "v", "cu_seqlens_q", "cu_seqlens_k", "out", "lse")),
    _nothing,
)

gqa_attention = _operator(
    "gqa_attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqlens_k, "
    "Tensor? block_table, Tensor? page_indptr, Tensor? page_indices, Tensor? sinks, Tensor? alibi_slopes, Tensor? mask, "
    "Tensor? mask_indptr, Tensor? parts, Tensor? num_splits, Tensor(a!) out, Tensor(b!) lse, float? softmax_scale, "
    "bool causal, int window_left, int window_right, float soft_cap, SymInt max_seqlen_q, int num_scheduled, "
    "SymInt max_scheduled_q, int fixed_split_blocks, int num_threads, bool reference) -> ()",
    _run_with(call_gqa_attention, *_GQA_INPUTS, "out", "lse"),
    _nothing,
)

rms_norm = _operator(
    "rms_norm(Tensor x, Tensor(a!)? residual, Tensor weight, Tensor(b!) out, float eps, float weight_offset, "
    "float out_scale, int num_threads) -> ()",
    _run_with(partial(call_rows, "rms_norm"), "x", "residual", "weight", "out"),
    _nothing,
)

gated_activation = _operator(
    "gated_activation(Tensor gate_up, Tensor(a!) out, str activation, int num_threads) -> ()",
    _run_with(partial(call_rows, "gated_activation"), "gate_up", "out"),
    _nothing,
)

apply_rope = _operator(
    "apply_rope(Tensor x, Tensor positions, Tensor? cos_sin, Tensor(a!) out, bool interleaved, int rotary_dim, "
    "float theta, str scaling, float factor, int original_max_position, float low_freq_factor, float high_freq_factor, "
    "float beta_fast, float beta_slow, float attention_factor, int num_threads) -> ()",
    _run_with(partial(call_rows, "apply_rope"), "x", "positions", "cos_sin", "out"),
    _nothing,
)
