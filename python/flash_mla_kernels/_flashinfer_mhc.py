"""FlashInfer's names for hyper-connections: part of flash_mla_kernels.flashinfer, which says what holds for all of it."""

from typing import Optional, Tuple

import torch

from ._mhc import mhc_post as _mhc_post
from ._mhc import mhc_post_pre


def mhc_post(
    x: torch.Tensor, residual: torch.Tensor, post_layer_mix: torch.Tensor, comb_res_mix: torch.Tensor
) -> torch.Tensor:
    """x (..., d), residual (..., n, d), post_layer_mix (..., n) or (..., n, 1), comb_res_mix (..., n, n) to (..., n, d)."""
    return _mhc_post(*_by_token(x, residual, post_layer_mix, comb_res_mix)).view(residual.shape)


def mhc_fused_post_pre(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_layer_mix: torch.Tensor,
    comb_res_mix: torch.Tensor,
    fn: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    norm_weight: torch.Tensor,
    rms_eps: float = 1e-5,
    hc_pre_eps: float = 1e-6,
    hc_sinkhorn_eps: float = 1e-6,
    hc_post_mult_value: float = 2.0,
    sinkhorn_repeat: int = 20,
    norm_eps: float = 1e-5,
    out: Optional[tuple] = None,
    fallback: bool = True,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """mhc_post, then the next layer's mixes and its input, normalised: residual (..., n, d), post (..., n, 1), comb (..., n, n),
    input (..., d)."""
    shape, n = residual.shape, residual.shape[-2]
    results = mhc_post_pre(
        *_by_token(x, residual, post_layer_mix, comb_res_mix),
        fn,
        hc_scale,
        hc_base,
        norm=norm_weight,
        rms_eps=rms_eps,
        pre_eps=hc_pre_eps,
        post_mult=hc_post_mult_value,
        sinkhorn_eps=hc_sinkhorn_eps,
        sinkhorn_repeat=sinkhorn_repeat,
        norm_eps=norm_eps,
    )
    shapes = (shape, (*shape[:-1], 1), (*shape[:-1], n), x.shape)
    results = tuple(result.view(s) for result, s in zip(results, shapes))
    if out is not None:
        for to, result in zip(out, results):
            to.copy_(result.view(to.shape))
        return tuple(to.view(s) for to, s in zip(out, shapes))
    return results


def _by_token(x, residual, post, comb):
    n, d = residual.shape[-2:]
    return x.reshape(-1, d), residual.reshape(-1, n, d), post.reshape(-1, n), comb.reshape(-1, n, n)
