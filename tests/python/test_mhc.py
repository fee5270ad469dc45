"""Hyper-connections from Python, with transformers' module and float64 as the oracles."""

import ml_dtypes
import numpy as np
import pytest
import torch

import flash_mla_kernels as fm
from flash_mla_kernels import flashinfer

STREAMS, WIDTH = 4, 96


def numbers(tokens=6, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(1)
    residual, x = (torch.randn(*s, generator=g).to(dtype) for s in ((tokens, STREAMS, WIDTH), (tokens, WIDTH)))
    fn = torch.randn(24, STREAMS * WIDTH, generator=g) * 0.05
    return residual, x, fn, torch.randn(3, generator=g), torch.randn(24, generator=g)


def test_it_is_transformers_module():
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    from transformers import DeepseekV4Config

    config = DeepseekV4Config(hidden_size=WIDTH, hc_mult=STREAMS, rms_norm_eps=1e-5)
    module = modeling.DeepseekV4HyperConnection(config)
    residual, _, fn, scale, base = numbers(dtype=torch.float32)
    with torch.no_grad():
        for parameter, value in ((module.fn, fn), (module.scale, scale), (module.base, base)):
            parameter.copy_(value)
        post, comb, collapsed = module(residual[None])
    got = fm.mhc_pre(
        residual, fn, scale, base, rms_eps=1e-5, sinkhorn_repeat=config.hc_sinkhorn_iters, sinkhorn_eps=config.hc_eps
    )
    for mine, theirs in zip(got, (post[0], comb[0], collapsed[0])):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_it_is_the_definition_and_one_pass_is_two():
    residual, x, fn, scale, base = numbers()
    norm = torch.rand(WIDTH).bfloat16()
    post, comb, layer_input = fm.mhc_pre(residual, fn, scale, base, norm=norm)
    wide = fm.mhc_pre(residual, fn, scale, base, norm=norm, reference=True)
    for mine, theirs, tolerance in zip((post, comb, layer_input), wide, (1e-5, 1e-5, 2**-7)):
        assert theirs.dtype == torch.float64
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=1e-5)
    out = fm.mhc_post(x, residual, post, comb)
    expected = fm.mhc_post(x, residual, post, comb, reference=True)
    mixed = torch.einsum("tsi,tsd->tid", comb.double(), residual.double()) + post.double()[..., None] * x.double()[:, None]
    torch.testing.assert_close(expected, mixed, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-6)
    together = fm.mhc_post_pre(x, residual, post, comb, fn, scale, base, norm=norm)
    apart = (out, *fm.mhc_pre(out, fn, scale, base, norm=norm))
    assert all(torch.equal(a, b) for a, b in zip(together, apart))


def test_flashinfers_names():
    residual, x, fn, scale, base = numbers()
    norm = torch.rand(WIDTH).bfloat16()
    post, comb, _ = fm.mhc_pre(residual, fn, scale, base)
    shaped = (x.view(2, 3, WIDTH), residual.view(2, 3, STREAMS, WIDTH), post.view(2, 3, STREAMS, 1), comb.view(2, 3, 4, 4))
    assert torch.equal(flashinfer.mhc_post(*shaped).view(residual.shape), fm.mhc_post(x, residual, post, comb))
    got = flashinfer.mhc_fused_post_pre(*shaped, fn, scale, base, norm)
    expected = fm.mhc_post_pre(x, residual, post, comb, fn, scale, base, norm=norm, rms_eps=1e-5, norm_eps=1e-5)
    assert [tuple(g.shape[2:]) for g in got] == [(STREAMS, WIDTH), (STREAMS, 1), (STREAMS, STREAMS), (WIDTH,)]
    assert all(torch.equal(g.flatten(), e.flatten()) for g, e in zip(got, expected))
    out = tuple(torch.empty_like(e) for e in expected)
    flashinfer.mhc_fused_post_pre(*shaped, fn, scale, base, norm, out=out)
    assert all(torch.equal(o, e) for o, e in zip(out, expected))


def test_other_array_libraries_and_bad_input():
    residual, x, fn, scale, base = numbers()
    given = [np.asarray(a.float()).astype(ml_dtypes.bfloat16) for a in (residual, x)]
    post, comb, layer_input = fm.mhc_pre(given[0], fn.numpy(), scale.numpy(), base.numpy())
    expected = fm.mhc_pre(residual, fn, scale, base)
    assert (post == expected[0].numpy()).all() and (layer_input.astype(np.float32) == expected[2].float().numpy()).all()
    with pytest.raises(ValueError, match=r"fn.shape\[0\] is 23, expected n \* \(n \+ 2\) = 24"):
        fm.mhc_pre(residual, fn[:23], scale, base)
    with pytest.raises(ValueError, match="sinkhorn_repeat is 0"):
        fm.mhc_pre(residual, fn, scale, base, sinkhorn_repeat=0)
    with pytest.raises(ValueError, match=r"post.shape\[1\] is 3"):
        fm.mhc_post(x, residual, *(torch.ones(6, 3), torch.ones(6, 4, 4)))
