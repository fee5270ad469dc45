"""FlashInfer's names for norms, gates and rotations: part of flash_mla_kernels.flashinfer, which says what holds for all of it."""

from typing import Optional, Tuple, Union

import torch

from ._rows import add_rms_norm, gated_activation, rms_norm
from ._rows import apply_rope as _apply_rope


def rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: Optional[torch.Tensor] = None,
    enable_pdl: Optional[bool] = None,
) -> torch.Tensor:
    """input (tokens, d) or (tokens, heads, d), each row by itself; out may be input."""
    return _norm(input, weight, eps, out, 0.0)


def gemma_rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: Optional[torch.Tensor] = None,
    enable_pdl: Optional[bool] = None,
) -> torch.Tensor:
    """rmsnorm with weight + 1."""
    return _norm(input, weight, eps, out, 1.0)


def rmsnorm_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: Union[float, torch.Tensor],
    eps: float = 1e-6,
    enable_pdl: Optional[bool] = None,
) -> None:
    """out (tokens, d) float8_e4m3fn: rmsnorm over scale."""
    _e4m3(out)
    rms_norm(input, weight, eps=eps, out=out, out_scale=_number(scale))


def fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: Optional[bool] = None,
) -> None:
    """residual += input; input = rmsnorm(residual). In place, both (tokens, d)."""
    add_rms_norm(input, residual, weight, eps=eps, out=input)


def gemma_fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: Optional[bool] = None,
) -> None:
    """fused_add_rmsnorm with weight + 1."""
    add_rms_norm(input, residual, weight, eps=eps, weight_offset=1.0, out=input)


def fused_add_rmsnorm_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    scale: Union[float, torch.Tensor],
    eps: float = 1e-6,
    enable_pdl: Optional[bool] = None,
) -> None:
    """residual += input; out (tokens, d) float8_e4m3fn = rmsnorm(residual) over scale."""
    _e4m3(out)
    add_rms_norm(input, residual, weight, eps=eps, out=out, out_scale=_number(scale))


def silu_and_mul(
    input: torch.Tensor, out: Optional[torch.Tensor] = None, enable_pdl: Optional[bool] = None
) -> torch.Tensor:
    """input (..., 2 d), gate first, to (..., d)."""
    return _gate(input, out, "silu")


def gelu_and_mul(
    input: torch.Tensor, out: Optional[torch.Tensor] = None, enable_pdl: Optional[bool] = None
) -> torch.Tensor:
    """silu_and_mul with GELU by the error function."""
    return _gate(input, out, "gelu")


def gelu_tanh_and_mul(
    input: torch.Tensor, out: Optional[torch.Tensor] = None, enable_pdl: Optional[bool] = None
) -> torch.Tensor:
    """silu_and_mul with GELU's approximation by tanh."""
    return _gate(input, out, "gelu_tanh")


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: Optional[int] = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """q, k (tokens, heads, d); rows indptr[i] to indptr[i + 1] - 1 have the positions offsets[i] and on."""
    return _rotate(q, k, _positions(q, indptr, offsets), False, _linear(rotary_dim, interleave, rope_scale, rope_theta))


def apply_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: Optional[int] = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """apply_rope into q and k."""
    _rotate(q, k, _positions(q, indptr, offsets), True, _linear(rotary_dim, interleave, rope_scale, rope_theta))


def apply_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: Optional[int] = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """apply_rope at the positions pos_ids (tokens)."""
    return _rotate(q, k, pos_ids, False, _linear(rotary_dim, interleave, rope_scale, rope_theta))


def apply_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: Optional[int] = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """apply_rope_pos_ids into q and k."""
    _rotate(q, k, pos_ids, True, _linear(rotary_dim, interleave, rope_scale, rope_theta))


def apply_llama31_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: Optional[int] = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """apply_rope with Llama 3's frequencies."""
    numbers = (rotary_dim, interleave, rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    return _rotate(q, k, _positions(q, indptr, offsets), False, _llama3(*numbers))


def apply_llama31_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: Optional[int] = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """apply_llama31_rope into q and k."""
    numbers = (rotary_dim, interleave, rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    _rotate(q, k, _positions(q, indptr, offsets), True, _llama3(*numbers))


def apply_llama31_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: Optional[int] = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """apply_rope_pos_ids with Llama 3's frequencies."""
    numbers = (rotary_dim, interleave, rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    return _rotate(q, k, pos_ids, False, _llama3(*numbers))


def apply_llama31_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: Optional[int] = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """apply_llama31_rope_pos_ids into q and k."""
    numbers = (rotary_dim, interleave, rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    _rotate(q, k, pos_ids, True, _llama3(*numbers))


def apply_rope_with_cos_sin_cache(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """query, key (tokens, heads * head_size); cos_sin_cache (max_positions, rotary_dim) float32, cosines and then sines."""
    return tuple(x.flatten(1) for x in _by_table(positions, query, key, head_size, cos_sin_cache, is_neox, False))


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> None:
    """apply_rope_with_cos_sin_cache into query and key."""
    _by_table(positions, query, key, head_size, cos_sin_cache, is_neox, True)


def _norm(x, weight, eps, out, offset):
    out = torch.empty_like(x) if out is None else out
    if x.dim() == 3:  # a head at a time: rows of a part of a larger tensor lie at no one distance
        for head in range(x.shape[1]):
            rms_norm(x[:, head], weight, eps=eps, weight_offset=offset, out=out[:, head])
        return out
    return rms_norm(x, weight, eps=eps, weight_offset=offset, out=out)


def _e4m3(out: torch.Tensor) -> None:
    if out.dtype != torch.float8_e4m3fn:
        raise NotImplementedError(f"out has dtype {out.dtype}; flash_mla_kernels.flashinfer quantises to float8_e4m3fn")


def _number(scale: Union[float, torch.Tensor]) -> float:
    return float(scale.item()) if isinstance(scale, torch.Tensor) else float(scale)


def _gate(x, out, activation):
    if out is None:
        out = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    gated_activation(x.flatten(0, -2), activation, out=out.view(-1, out.shape[-1]))
    return out


def _positions(q: torch.Tensor, indptr: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    starts = indptr.to(q.device).long()
    first = offsets.to(q.device).long() - starts[:-1]
    counts = starts[1:] - starts[:-1]
    return torch.arange(q.shape[0], device=q.device) + torch.repeat_interleave(first, counts, output_size=q.shape[0])


def _linear(rotary_dim, interleave, rope_scale, rope_theta) -> dict:
    return dict(
        rotary_dim=rotary_dim or 0, interleaved=interleave, scaling="linear", factor=rope_scale, theta=rope_theta
    )


def _llama3(rotary_dim, interleave, rope_scale, rope_theta, low, high, old_context_len) -> dict:
    return dict(
        rotary_dim=rotary_dim or 0,
        interleaved=interleave,
        scaling="llama3",
        factor=rope_scale,
        theta=rope_theta,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=old_context_len,
    )


def _rotate(q, k, positions, in_place, options):
    return tuple(_apply_rope(x, positions, out=x if in_place else None, **options) for x in (q, k))


def _by_table(positions, query, key, head_size, cos_sin_cache, is_neox, in_place):
    q, k = (x.unflatten(-1, (-1, head_size)) for x in (query, key))
    options = dict(cos_sin=cos_sin_cache, rotary_dim=cos_sin_cache.shape[-1], interleaved=not is_neox)
    return _rotate(q, k, positions, in_place, options)
