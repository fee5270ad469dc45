"""Latent attention of requests that share a prefix."""

from typing import Optional, Tuple

from . import _C
from ._arrays import Array, count, empty, output, shape_of
from ._library import build_decode_schedule


def expand_latents(
    k_cache: Array, pages: Array, num_tokens: int, kv_b: Array, d_nope: int, *, num_threads: int = 0
) -> Tuple[Array, Array]:
    """The latents of a prefix as keys and values of every head, made once for a prefix and layer.

    k_cache: (num_blocks, page_size, 1, rank + d_rope); pages: (n,) int32, the prefix's; num_tokens: of the prefix. kv_b: the
    model's ``kv_b_proj.weight`` as (h, d_nope + d_v, rank), k_cache's dtype (float32, float16, bfloat16). Returns k (num_tokens,
    h, d_nope + d_rope), keys behind the rotary part as queries have it, and v (num_tokens, h, d_v). On the CPU. Raises ValueError
    naming the argument.
    """
    heads, width, rank = shape_of(kv_b, "kv_b", 3)
    d_cache = shape_of(k_cache, "k_cache", 4)[3]
    n, d_nope = count(num_tokens, "num_tokens", 0), count(d_nope, "d_nope", 1)
    if d_nope >= width or d_cache < rank:
        raise ValueError(
            f"kv_b has shape {(heads, width, rank)}, expected (h, d_nope + d_v, rank) with d_nope = {d_nope} and a rank up to {d_cache}"
        )
    k = empty((n, heads, d_nope + d_cache - rank), k_cache)
    v = empty((n, heads, width - d_nope), k_cache)
    _C.expand_latents(dict(k_cache=k_cache, pages=pages, kv_b=kv_b, k=k, v=v), num_threads)
    return k, v


def mla_cascade(
    q: Array,
    prefix_k: Array,
    prefix_v: Array,
    kv_b: Array,
    k_cache: Array,
    block_table: Array,
    cache_seqlens: Array,
    *,
    schedule: Optional[Tuple[Array, Array]] = None,
    fixed_split_blocks: int = 0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    num_threads: int = 0,
    out: Optional[Array] = None,
) -> Tuple[Array, Array]:
    """Latent attention of a batch over a prefix that all its requests share and what each has of its own behind it.

    Over the prefix attention is not absorbed, over prefix_k (n, h, d_nope + d_rope) and prefix_v (n, h, d_v) of expand_latents;
    over the rest it is, over the latents in k_cache (num_blocks, page_size, 1, rank + d_rope), block_table (b, max_blocks) and
    cache_seqlens (b,) int32, which count from the prefix's end. q: (b, s_q, h, d_nope + d_rope), not absorbed; kv_b: (h, d_nope +
    d_v, rank). ``causal``: query i sees of its request's own tokens those up to length - s_q + i. softmax_scale defaults to
    (d_nope + d_rope) ** -0.5. schedule: what build_decode_schedule made of cache_seqlens; it is made here where it is not given.

    Returns out (b, s_q, h, d_v) in q's dtype, W_UV applied, and lse (b, h, s_q) float32, natural log. On the CPU. Raises ValueError
    naming the argument, NotImplementedError for tensors of a GPU.
    """
    b, s_q, heads, _ = shape_of(q, "q", 4)
    out = output(out, (b, s_q, heads, shape_of(prefix_v, "prefix_v", 3)[2]), q)
    lse = empty((b, heads, s_q), q, "float32")
    if schedule is None:
        options = _C.cpu_schedule_options()
        options["fixed_split_blocks"] = fixed_split_blocks
        schedule = build_decode_schedule(cache_seqlens, **options)
    tensors = dict(q=q, prefix_k=prefix_k, prefix_v=prefix_v, kv_b=kv_b, k_cache=k_cache, block_table=block_table)
    tensors.update(cache_seqlens=cache_seqlens, out=out, lse=lse, parts=schedule[0], num_splits=schedule[1])
    _C.mla_cascade(tensors, softmax_scale, causal, fixed_split_blocks, num_threads)
    return out, lse
