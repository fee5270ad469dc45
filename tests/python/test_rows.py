"""Norms, gates and rotations from Python, with torch in float64 as the oracle."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

import flash_mla_kernels as fm
from flash_mla_kernels import flashinfer

UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2e-6}


def close(got, expected, dtype):
    torch.testing.assert_close(got.double(), expected.double(), rtol=1.05 * UNIT[dtype], atol=2e-5)


def normed(x, weight, eps=1e-6, offset=0.0):
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight.double() + offset)


def randn(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rotated(x, positions, frequencies, interleaved=False, scale=1.0):
    """x (n, heads, d), whose leading 2 * len(frequencies) elements are turned, in float64."""
    x = x.double()
    pairs = len(frequencies)
    angle = positions.double()[:, None, None] * frequencies.double()
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    part = x[..., : 2 * pairs]
    a, b = (part[..., ::2], part[..., 1::2]) if interleaved else (part[..., :pairs], part[..., pairs:])
    turned = (a * cosine - b * sine, b * cosine + a * sine)
    turned = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((turned, x[..., 2 * pairs :]), -1)


def plain(rotary, theta=10000.0):
    return theta ** (-torch.arange(0, rotary, 2).double() / rotary)


@pytest.mark.parametrize("dtype", UNIT)
def test_norms_in_new_memory_in_place_and_where_it_is_wanted(dtype):
    x, weight = randn(5, 96, dtype=dtype), randn(64, seed=1, dtype=torch.float32)
    x = x[:, 16:80]  # strided
    close(fm.rms_norm(x, weight, eps=1e-5), normed(x, weight, 1e-5), dtype)
    out = torch.empty(5, 64, dtype=dtype)
    assert fm.rms_norm(x, weight, weight_offset=1.0, out=out) is out
    close(out, normed(x, weight, offset=1.0), dtype)
    residual = randn(5, 64, dtype=dtype, seed=2)
    total, kept = (residual.float() + x.float()).to(dtype), x.clone()
    assert fm.add_rms_norm(x, residual, weight, out=x) is x
    assert torch.equal(residual, total)
    close(x, normed(total, weight), dtype)
    assert not torch.equal(x, kept)


def test_norms_to_e4m3():
    x, residual, weight = randn(4, 256), randn(4, 256, seed=3), randn(256, seed=4)
    out = torch.empty(4, 256, dtype=torch.float8_e4m3fn)
    fm.rms_norm(x, weight, out=out, out_scale=0.25)
    # torch rounds float32 to e4m3; a bit may differ where float32 and float64 fall on either side of a tie.
    expected = (normed(x, weight) / 0.25).float().to(torch.float8_e4m3fn)
    assert (out.view(torch.uint8) != expected.view(torch.uint8)).sum() <= 2
    flashinfer.fused_add_rmsnorm_quant(out, x, residual, weight, torch.tensor([0.25]))
    expected = (normed(residual, weight) / 0.25).float().to(torch.float8_e4m3fn)
    assert (out.view(torch.uint8) != expected.view(torch.uint8)).sum() <= 2
    with pytest.raises(NotImplementedError, match="float8_e5m2"):
        flashinfer.rmsnorm_quant(out.view(torch.float8_e5m2), x, weight, 1.0)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gates(activation):
    gate_up = randn(7, 128, dtype=torch.float16)
    gate, up = gate_up.double().split(64, -1)
    functions = dict(
        silu=torch.nn.functional.silu,
        gelu=torch.nn.functional.gelu,
        gelu_tanh=lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    )
    expected = functions[activation](gate) * up
    close(fm.gated_activation(gate_up, activation), expected, torch.float16)
    call = getattr(flashinfer, activation + "_and_mul")
    close(call(gate_up.view(1, 7, 128))[0], expected, torch.float16)
    out = torch.empty(7, 64, dtype=torch.float16)
    assert call(gate_up, out) is out
    close(out, expected, torch.float16)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotations(interleaved):
    x, positions = randn(6, 3, 64, dtype=torch.float32), torch.tensor([0, 1, 5, 90, 17, 3])
    close(
        fm.apply_rope(x, positions, interleaved=interleaved),
        rotated(x, positions, plain(64), interleaved),
        torch.float32,
    )
    part = fm.apply_rope(x, positions.int(), interleaved=interleaved, rotary_dim=32, theta=5e5)
    close(part, rotated(x, positions, plain(32, 5e5), interleaved), torch.float32)
    table = torch.cat([f(positions[:, None] * plain(64)) for f in (torch.cos, torch.sin)], -1).float()
    places = torch.arange(6)
    by_table = x.clone()
    assert fm.apply_rope(by_table, places, cos_sin=table, interleaved=interleaved, out=by_table) is by_table
    close(by_table, rotated(x, positions, plain(64), interleaved), torch.float32)


def test_scaled_rotations_are_transformers():
    config = pytest.importorskip("transformers").LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    x, positions = randn(4, 2, 128, dtype=torch.float32), torch.tensor([0, 8191, 30000, 7])
    numbers = {
        "llama3": dict(
            rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
        ),
        "yarn": dict(rope_theta=1e4, factor=40.0, beta_fast=32, beta_slow=1, original_max_position_embeddings=4096),
    }
    for scaling, given in numbers.items():
        settings = config(
            hidden_size=256,
            num_attention_heads=2,
            head_dim=128,
            max_position_embeddings=1 << 17,
            rope_parameters=dict(given, rope_type=scaling),
        )
        frequencies, factor = ROPE_INIT_FUNCTIONS[scaling](settings, "cpu")
        options = dict(given)
        options["original_max_position"] = options.pop("original_max_position_embeddings")
        got = fm.apply_rope(
            x, positions, theta=options.pop("rope_theta"), scaling=scaling, attention_factor=factor, **options
        )
        # Angles of up to 30000 in float32.
        torch.testing.assert_close(got.double(), rotated(x, positions, frequencies, scale=factor), rtol=0, atol=2e-2)
        small = fm.apply_rope(x, positions[[0, 0, 3, 3]], theta=given["rope_theta"], scaling=scaling,
                              attention_factor=factor, **options)  # fmt: skip
        expected = rotated(x, positions[[0, 0, 3, 3]], frequencies, scale=factor)
        torch.testing.assert_close(small.double(), expected, rtol=0, atol=2e-5)


def test_other_array_libraries():
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(ml_dtypes.bfloat16)
    weight = np.random.default_rng(1).standard_normal(64).astype(np.float32)
    out = fm.rms_norm(x, weight)
    assert isinstance(out, np.ndarray) and out.dtype == ml_dtypes.bfloat16
    expected = normed(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(weight))
    close(torch.from_numpy(out.astype(np.float32)), expected, torch.bfloat16)
    narrow = np.empty((3, 64), np.uint8)
    fm.rms_norm(x, weight, out=narrow)
    assert len(set(narrow.ravel().tolist())) > 20


def test_flashinfers_norms():
    x, residual, weight = randn(5, 64), randn(5, 64, seed=1), randn(64, seed=2)
    close(flashinfer.rmsnorm(x, weight), normed(x, weight), torch.bfloat16)
    close(flashinfer.gemma_rmsnorm(x, weight), normed(x, weight, offset=1), torch.bfloat16)
    heads = randn(5, 3, 96, seed=3)[..., 8:72]  # of a larger tensor: no two dimensions are one
    close(flashinfer.rmsnorm(heads, weight), normed(heads, weight), torch.bfloat16)
    for name, offset in (("fused_add_rmsnorm", 0.0), ("gemma_fused_add_rmsnorm", 1.0)):
        a, b = x.clone(), residual.clone()
        assert getattr(flashinfer, name)(a, b, weight, 1e-5) is None
        assert torch.equal(b, x + residual)
        close(a, normed(b, weight, 1e-5, offset), torch.bfloat16)


@pytest.mark.parametrize("llama", [False, True])
def test_flashinfers_rotations(llama):
    q, k = randn(7, 4, 64, dtype=torch.float32), randn(7, 2, 64, dtype=torch.float32, seed=1)
    indptr, offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32), torch.tensor([10, 5, 100], dtype=torch.int32)
    positions = torch.tensor([10, 11, 12, 100, 101, 102, 103])
    name = "apply_llama31_rope" if llama else "apply_rope"
    frequencies = plain(64, 5e5 if llama else 1e4)
    if llama:
        waves = 2 * math.pi / frequencies
        kept = ((8192 / waves - 1) / 3).clamp(0, 1)
        frequencies = (1 - kept) * frequencies / 8 + kept * frequencies
    expected = [rotated(x, positions, frequencies) for x in (q, k)]
    for suffix, places in (("", (indptr, offsets)), ("_pos_ids", (positions.int(),))):
        for got, e in zip(getattr(flashinfer, name + suffix)(q, k, *places), expected):
            close(got, e, torch.float32)
        a, b = q.clone(), k.clone()
        assert getattr(flashinfer, name + suffix + "_inplace")(a, b, *places) is None
        close(a, expected[0], torch.float32)
        close(b, expected[1], torch.float32)


@pytest.mark.parametrize("neox", [False, True])
def test_flashinfers_rotation_by_a_table(neox):
    positions = torch.tensor([3, 0, 1])
    angles = torch.arange(5)[:, None] * plain(32)
    cache = torch.cat([angles.cos(), angles.sin()], -1).float()
    query, key = randn(3, 4 * 64, dtype=torch.float32), randn(3, 2 * 64, dtype=torch.float32, seed=1)
    expected = [rotated(x.view(3, -1, 64), positions, plain(32), not neox).flatten(1) for x in (query, key)]
    for got, e in zip(flashinfer.apply_rope_with_cos_sin_cache(positions, query, key, 64, cache, neox), expected):
        assert got.shape == e.shape
        close(got, e, torch.float32)
    flashinfer.apply_rope_with_cos_sin_cache_inplace(positions, query, key, 64, cache, neox)
    close(query, expected[0], torch.float32)
    close(key, expected[1], torch.float32)


def test_torch_compile_sees_operators():
    def step(x, residual, weight, positions):
        x = fm.add_rms_norm(x, residual, weight)
        x = fm.apply_rope(x.view(4, 2, 32), positions).flatten(1)
        return fm.gated_activation(x)

    args = (randn(4, 64), randn(4, 64, seed=1), randn(64, seed=2), torch.arange(4))
    expected = step(args[0], args[1].clone(), *args[2:])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(args[0], args[1].clone(), *args[2:]), expected)


def test_bad_input_is_named():
    x, weight = randn(3, 64), randn(64)
    for call, message in (
        (lambda: fm.rms_norm(x, weight[:63]), "weight.shape[0] is 63"),
        (lambda: fm.rms_norm(x, None), "weight is (none), expected a tensor"),
        (lambda: fm.rms_norm(x, weight, out=torch.empty(3, 63, dtype=x.dtype)), "out.shape[1] is 63"),
        (lambda: fm.rms_norm(x, weight, out_scale=-1), "out_scale is -1"),
        (lambda: fm.add_rms_norm(x, None, weight), "residual is None"),
        (lambda: fm.gated_activation(x[:, :63]), "gate_up has shape (3, 63)"),
        (lambda: fm.gated_activation(x, "relu"), "activation is 'relu'"),
        (lambda: fm.apply_rope(x.view(3, 1, 64), torch.arange(3), scaling="ntk"), "scaling is 'ntk'"),
        (lambda: fm.apply_rope(x.view(3, 1, 64), torch.arange(4)), "positions.shape[0] is 4"),
        (
            lambda: fm.apply_rope(x.view(3, 1, 64), torch.arange(3), cos_sin=torch.zeros(2, 64)),
            "positions[2] is 2, expected 0 to 1",
        ),
    ):
        with pytest.raises(ValueError) as e:
            call()
        assert message in str(e.value)
