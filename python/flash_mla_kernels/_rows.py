"""What is done to single rows between attentions: norms, gates, rotations."""

from typing import Optional

from . import _C
from ._arrays import Array, cuda_device, current_stream, empty, shape_of, traced
from ._sparse import as_bytes


def rms_norm(
    x: Array,
    weight: Array,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    out: Optional[Array] = None,
    out_scale: float = 1.0,
    num_threads: int = 0,
) -> Array:
    """x / sqrt(mean(x^2) + eps) * (weight + weight_offset), row by row, in float32, rounded once.

    x: (n, d) float32, float16 or bfloat16, its last dimension contiguous; weight: (d,), x's dtype or float32. ``out``, x's
    dtype by default, may be x itself; one of float8_e4m3fn (or uint8, its bytes) gets the nearest e4m3 of value / out_scale,
    at most 448. Returns ``out``. On a GPU the work is queued on torch's current stream. Raises ValueError naming the argument.
    """
    return _norm(x, None, weight, eps, weight_offset, out, out_scale, num_threads)


def add_rms_norm(
    x: Array,
    residual: Array,
    weight: Array,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    out: Optional[Array] = None,
    out_scale: float = 1.0,
    num_threads: int = 0,
) -> Array:
    """residual += x, in place and rounded to its dtype; then rms_norm of what was rounded, in one pass.

    x, residual: (n, d), one dtype. ``out`` may be x, not residual. Everything else as rms_norm.
    """
    if residual is None:
        raise ValueError("residual is None, expected a tensor; rms_norm takes none")
    return _norm(x, residual, weight, eps, weight_offset, out, out_scale, num_threads)


def _norm(x, residual, weight, eps, weight_offset, out, out_scale, num_threads):
    if out is None:
        out = empty(shape_of(x, "x", 2), x)
    numbers = (float(eps), float(weight_offset), float(out_scale), num_threads)
    _call("rms_norm", dict(x=x, residual=residual, weight=weight, out=as_bytes(out)), *numbers)
    return out


def gated_activation(
    gate_up: Array, activation: str = "silu", *, out: Optional[Array] = None, num_threads: int = 0
) -> Array:
    """activation(gate) * up, in float32, rounded once.

    gate_up: (n, 2 d) float32, float16 or bfloat16, gate first; activation: "silu", "gelu" (by the error function) or
    "gelu_tanh" (its approximation). Returns ``out`` (n, d). Raises ValueError naming the argument.
    """
    if out is None:
        n, width = shape_of(gate_up, "gate_up", 2)
        if width % 2 != 0:
            raise ValueError(f"gate_up has shape {(n, width)}, expected an even number of columns: gate, then up")
        out = empty((n, width // 2), gate_up)
    _call("gated_activation", dict(gate_up=gate_up, out=out), activation, num_threads)
    return out


def apply_rope(
    x: Array,
    positions: Array,
    *,
    cos_sin: Optional[Array] = None,
    interleaved: bool = False,
    rotary_dim: int = 0,
    theta: float = 10000.0,
    scaling: str = "none",
    factor: float = 1.0,
    original_max_position: int = 0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float = 1.0,
    out: Optional[Array] = None,
    num_threads: int = 0,
) -> Array:
    """Turns the pairs of every head: pair i of a token at position p by the angle p * theta^(-2i / rotary_dim), scaled.

    x: (n, heads, d) float32, float16 or bfloat16; positions: (n,) int32 or int64. Pairs are (i, i + rotary_dim / 2), as in
    Llama, or with ``interleaved`` (2i, 2i + 1), as in MLA; rotary_dim leading elements of a head are turned (0: all), the
    others copied. ``cos_sin`` (max_positions, rotary_dim) float32, cosines of a position's pairs and then sines, takes the
    place of theta and scaling. scaling: "none"; "linear", all frequencies divided by ``factor``; "llama3" with
    low_freq_factor, high_freq_factor and original_max_position; "yarn" with beta_fast, beta_slow, original_max_position and
    attention_factor, which cosines and sines are multiplied by (transformers': 0.1 * ln(factor) + 1).

    Returns ``out``, which may be x. Positions outside the table raise ValueError on the CPU; on a GPU they are the caller's to
    get right. Raises ValueError naming the argument.
    """
    if out is None:
        out = empty(shape_of(x, "x", 3), x)
    numbers = (bool(interleaved), rotary_dim, float(theta), scaling, float(factor), original_max_position)
    more = (low_freq_factor, high_freq_factor, beta_fast, beta_slow, attention_factor)
    tensors = dict(x=x, positions=positions, cos_sin=cos_sin, out=out)
    _call("apply_rope", tensors, *numbers, *(float(x) for x in more), num_threads)
    return out


def _call(name: str, tensors: dict, *options) -> None:
    first = next(iter(tensors.values()))
    if traced(first):
        from . import _torch

        getattr(_torch, name)(*tensors.values(), *options)
    else:
        call_rows(name, tensors, *options)


def call_rows(name: str, tensors: dict, *options) -> None:
    """One of the library's operations on rows, on the current stream of its first tensor."""
    device = cuda_device(next(iter(tensors.values())))
    getattr(_C, name)(tensors, *options, stream=current_stream(device))
