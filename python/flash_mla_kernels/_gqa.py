"""Attention over keys and values of their own: multi-head, grouped-query and multi-query."""

from typing import Optional, Tuple

from . import _C
from ._arrays import Array, cuda_device, current_stream, empty, output, shape_of, traced, workspace_allocator
from ._library import build_decode_schedule

#: What a call takes beside outputs, in the order of the operator that torch knows.
INPUTS = (
    *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqlens_k", "block_table", "page_indptr", "page_indices"),
    *("sinks", "alibi_slopes", "mask", "mask_indptr", "parts", "num_splits"),
)


def gqa_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    cu_seqlens_q: Optional[Array] = None,
    cu_seqlens_k: Optional[Array] = None,
    seqlens_k: Optional[Array] = None,
    block_table: Optional[Array] = None,
    page_indptr: Optional[Array] = None,
    page_indices: Optional[Array] = None,
    sinks: Optional[Array] = None,
    alibi_slopes: Optional[Array] = None,
    mask: Optional[Array] = None,
    mask_indptr: Optional[Array] = None,
    schedule: Optional[Tuple[Array, Array]] = None,
    fixed_split_blocks: int = 0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window: Tuple[int, int] = (-1, -1),
    soft_cap: float = 0.0,
    max_seqlen_q: int = 0,
    num_scheduled: int = -1,
    max_scheduled_q: int = 0,
    num_threads: int = 0,
    out: Optional[Array] = None,
    reference: bool = False,
) -> Tuple[Array, Array]:
    """Attention of decoding sequences, prompts and chunks of prompts, all in one call if need be.

    q: (total_q, h_q, d_qk), the queries of all sequences end to end; sequence i has rows cu_seqlens_q[i] to
    cu_seqlens_q[i + 1] - 1, or all have equally many where it is not given. h_q is a multiple of h_kv. k and v lie

    - ragged: (total_k, h_kv, d), with cu_seqlens_k (b + 1,);
    - in pages: (num_pages, page_size, h_kv, d), with seqlens_k (b,) and block_table (b, max_pages), or page_indptr (b + 1,)
      and page_indices; a pool in HND order is passed as ``pool.transpose(1, 2)``;
    - one stretch a sequence: (b, max_seqlen, h_kv, d), with seqlens_k (b,) alone.

    Lengths and tables are int32. Query i of n over m keys has the position p = m - n + i; it sees keys j <= p (``causal``),
    p - window[0] <= j and j <= p + window[1] (-1: no bound) whose bit in ``mask`` is 1. mask: uint8, a bit for every query and
    key of a sequence, row by row, the lowest bit first, from byte mask_indptr[i] on. A score is scaled by softmax_scale
    (d_qk ** -0.5), becomes soft_cap * tanh(score / soft_cap) where soft_cap > 0, and loses alibi_slopes[head] * |j - p|. sinks
    (h_q,) float32: a key of that score and of value 0 for every row, which lse does not count.

    schedule: what gqa_schedule returned for these lengths, to cut long sequences into parts that are computed side by side.
    max_seqlen_q: queries of a sequence at most, which a GPU wants to know beside cu_seqlens_q.

    A batch that begins with decoding sequences and goes on with prompts has a schedule of the decoding ones, and
    num_scheduled says how many they are: prompts are worked on as a whole. max_scheduled_q: as max_seqlen_q, of those
    (0: max_seqlen_q); partial results have room for as many queries.

    Returns out (total_q, h_q, d_v) in q's dtype and lse (h_q, total_q) float32, natural log; 0 and +inf where a query sees no
    key. ``reference`` computes in float64, on the CPU. On a GPU the work is queued on torch's current stream. Raises ValueError
    naming the argument, NotImplementedError for what no backend has (head dimensions on a GPU). There is no backward pass.
    """
    total_q, h_q, _ = shape_of(q, "q", 3)
    d_v = shape_of(v, "v", len(v.shape))[-1]
    out = output(out, (total_q, h_q, d_v), q)
    lse = empty((h_q, total_q), q, "float32")
    parts, num_splits = schedule if schedule is not None else (None, None)
    inputs = (
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, seqlens_k, block_table, page_indptr, page_indices),
        *(sinks, alibi_slopes, mask, mask_indptr, parts, num_splits),
    )
    left, right = window
    options = (
        softmax_scale,
        causal,
        left,
        right,
        float(soft_cap),
        max_seqlen_q,
        num_scheduled,
        max_scheduled_q,
        fixed_split_blocks,
        num_threads,
        reference,
    )
    if traced(q):
        from . import _torch

        _torch.gqa_attention(*inputs, out, lse, *options)
    else:
        call_gqa_attention(dict(zip((*INPUTS, "out", "lse"), (*inputs, out, lse))), *options)
    return out, lse


def call_gqa_attention(tensors, *options) -> None:
    device = cuda_device(tensors["q"])
    _C.gqa_attention(tensors, *options, stream=current_stream(device), allocate=workspace_allocator(device))


def gqa_schedule(
    seqlens_k: Array,
    num_heads_q: int,
    num_heads_k: int,
    head_dim: int,
    *,
    max_seqlen_q: int = 1,
    fixed_split_blocks: int = 0,
) -> Tuple[Array, Array]:
    """The plan of a batch for gqa_attention: (num_parts, 8) and (b + 1,) int32 beside seqlens_k.

    One plan serves all layers of a step. On a GPU it is made there, by a kernel on torch's current stream that a CUDA graph may
    capture; it is worth having where there are few sequences, or few long ones among many. ``fixed_split_blocks`` > 0 cuts
    every sequence at multiples of that many blocks of 64 keys and nowhere else, so that its result has the same bits whatever
    else is in the batch; gqa_attention wants to be told.
    """
    device = cuda_device(seqlens_k)
    if device is None:
        options = _C.cpu_schedule_options()
    else:
        options = _C.gqa_schedule_options(device, max_seqlen_q, num_heads_q, num_heads_k, head_dim)
    options["fixed_split_blocks"] = fixed_split_blocks
    return build_decode_schedule(seqlens_k, **options)
