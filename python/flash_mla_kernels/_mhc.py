"""Hyper-connections: a residual of several streams, mixed around every layer."""

from typing import Optional, Tuple

from . import _C
from ._arrays import Array, cuda_device, current_stream, empty, shape_of


def mhc_pre(
    residual: Array,
    fn: Array,
    scale: Array,
    base: Array,
    *,
    norm: Optional[Array] = None,
    rms_eps: float = 1e-6,
    pre_eps: float = 1e-6,
    post_mult: float = 2.0,
    sinkhorn_eps: float = 1e-6,
    sinkhorn_repeat: int = 20,
    norm_eps: float = 1e-6,
    num_threads: int = 0,
    reference: bool = False,
) -> Tuple[Array, Array, Array]:
    """Manifold-constrained hyper-connections before a layer (Xie et al., arXiv 2512.24880), as DeepSeek V4 has them.

    residual: (tokens, n, d) float32, float16 or bfloat16, n streams up to 8; fn: (n * (n + 2), n * d), scale: (3,), base:
    (n * (n + 2),), float32. With f = flat(residual): mixes = fn f / sqrt(mean(f^2) + rms_eps), times scale (of the first n, of the
    next n, of the others), plus base. pre = sigmoid(first n) + pre_eps, post = sigmoid(next n) * post_mult, comb (n, n) = a
    softmax of every row + sinkhorn_eps, columns divided by their sum + sinkhorn_eps, then sinkhorn_repeat - 1 times rows and
    columns. The layer's input is the sum of pre[s] * residual[s]; with ``norm`` (d,) its RMSNorm.

    Returns post (tokens, n) float32, comb (tokens, n, n) float32, from stream and to stream, and the layer's input (tokens, d)
    of residual's dtype. ``reference`` computes in float64 and returns that, on the CPU. On a GPU the work is queued on torch's
    current stream. Raises ValueError naming the argument.
    """
    tensors = dict(residual=residual, fn=fn, scale=scale, base=base, norm=norm)
    _put_mixes(tensors, residual, reference)
    numbers = (rms_eps, pre_eps, post_mult, sinkhorn_eps, sinkhorn_repeat, norm_eps, num_threads)
    _C.mhc(tensors, *numbers, reference=reference, stream=current_stream(cuda_device(residual)))
    return tensors["next_post"], tensors["next_comb"], tensors["layer_input"]


def mhc_post(
    x: Array,
    residual: Array,
    post: Array,
    comb: Array,
    *,
    out: Optional[Array] = None,
    num_threads: int = 0,
    reference: bool = False,
) -> Array:
    """Hyper-connections behind a layer: out[t] = post[t] * x + sum over s of comb[s, t] * residual[s].

    x: (tokens, d), the layer's output, and residual: (tokens, n, d), one dtype; post and comb as mhc_pre returned them. Returns
    ``out`` (tokens, n, d), which may be residual. ``reference`` and errors as mhc_pre.
    """
    shape = shape_of(residual, "residual", 3)
    if out is None:
        out = empty(shape, residual, "float64" if reference else None)
    tensors = dict(x=x, residual=residual, post=post, comb=comb, out=out)
    stream = current_stream(cuda_device(residual))
    _C.mhc(tensors, num_threads=num_threads, reference=reference, stream=stream)
    return out


def mhc_post_pre(
    x: Array,
    residual: Array,
    post: Array,
    comb: Array,
    fn: Array,
    scale: Array,
    base: Array,
    *,
    norm: Optional[Array] = None,
    rms_eps: float = 1e-6,
    pre_eps: float = 1e-6,
    post_mult: float = 2.0,
    sinkhorn_eps: float = 1e-6,
    sinkhorn_repeat: int = 20,
    norm_eps: float = 1e-6,
    out: Optional[Array] = None,
    num_threads: int = 0,
) -> Tuple[Array, Array, Array, Array]:
    """mhc_post of one layer and mhc_pre of the next in one pass, with the bits of the two.

    Returns the new residual (tokens, n, d), which may be written over the old one (``out``), and what mhc_pre returns of it.
    """
    out = empty(shape_of(residual, "residual", 3), residual) if out is None else out
    tensors = dict(x=x, residual=residual, post=post, comb=comb, fn=fn, scale=scale, base=base, norm=norm, out=out)
    _put_mixes(tensors, residual, False)
    numbers = (rms_eps, pre_eps, post_mult, sinkhorn_eps, sinkhorn_repeat, norm_eps, num_threads)
    _C.mhc(tensors, *numbers, stream=current_stream(cuda_device(residual)))
    return out, tensors["next_post"], tensors["next_comb"], tensors["layer_input"]


def _put_mixes(tensors: dict, residual: Array, reference: bool) -> None:
    tokens, n, d = shape_of(residual, "residual", 3)
    wide = "float64" if reference else "float32"
    tensors["next_post"] = empty((tokens, n), residual, wide)
    tensors["next_comb"] = empty((tokens, n, n), residual, wide)
    tensors["layer_input"] = empty((tokens, d), residual, "float64" if reference else None)
