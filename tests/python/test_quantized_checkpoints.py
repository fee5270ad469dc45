"""Checkpoints with weights of 8 and 4 bits: as others write them, and as `flash-mla quantize` does."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import edit_config, edit_weights, expected_logits, random_tokens, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flash_mla_kernels.model import Model

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("FLASH_MLA_PROGRAM", str(ROOT / "build/release/src/cli/flash-mla"))
SMALL = ROOT / "models" / "small"
TOLERANCE = 2e-4


def logits_of(directory, tokens, precision="float32", quantize="none"):
    model = Model(directory, precision=precision, quantize=quantize, num_threads=2)
    pages = -(-len(tokens) // 64)
    model.allocate_cache(pages)
    return model.forward(tokens, [0, len(tokens)], [len(tokens)], [list(range(pages))])


def save_twin(oracle, directory, meant):
    """The checkpoint with float32 weights where another has quantised ones; its model in transformers."""
    oracle.save_pretrained(directory)
    edit_weights(directory, lambda tensors: tensors.update(meant))
    return type(oracle).from_pretrained(directory, dtype=torch.float32).eval()


def fp8_blocks(tensors, block, powers):
    meant = {}
    for name in [n for n, w in tensors.items() if w.ndim == 2 and "_proj" in n]:
        weight = tensors[name].float()
        rows, columns = weight.shape
        grid = (-(-rows // block), -(-columns // block))
        padded = torch.zeros(grid[0] * block, grid[1] * block)
        padded[:rows, :columns] = weight
        blocks = padded.view(grid[0], block, grid[1], block)
        scale = (blocks.abs().amax(dim=(1, 3)) / 448).clamp(min=1e-12)
        if powers:
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        small = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        meant[name] = (small.float() * scale[:, None, :, None]).reshape(padded.shape)[:rows, :columns].contiguous()
        tensors[name] = small.view(padded.shape)[:rows, :columns].contiguous()
        tensors[name + "_scale_inv"] = scale.to(torch.float8_e8m0fnu) if powers else scale
    return meant


@pytest.mark.parametrize("powers", [False, True], ids=["float", "ue8m0"])
@pytest.mark.parametrize("name", ["v3", "v3-unnormalised", "v2-lite", "v32"])
def test_fp8(tmp_path, name, powers):
    oracle = write_checkpoint(name, tmp_path)
    meant = {}
    edit_weights(tmp_path, lambda tensors: meant.update(fp8_blocks(tensors, 24, powers)))
    edit_config(
        tmp_path,
        quantization_config={
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [24, 24],
            "scale_fmt": "ue8m0" if powers else "float",
        },
    )
    reference = save_twin(oracle, tmp_path / "plain", meant)
    tokens = random_tokens(40)
    assert np.abs(logits_of(tmp_path, tokens) - expected_logits(reference, tokens)).max() < TOLERANCE


def pack_int4(weight, group, wide_shape):
    """A matrix as compressed-tensors packs it; its tensors, and what it means."""
    rows, columns = weight.shape
    size = group if group > 0 else columns
    groups = -(-columns // size)
    padded = np.zeros((rows, groups * size), np.float32)
    padded[:, :columns] = weight
    grouped = padded.reshape(rows, groups, size)
    scale = np.maximum(np.abs(grouped).max(axis=2) / 7.5, 1e-8).astype(ml_dtypes.bfloat16)
    codes = np.clip(np.rint(grouped / scale.astype(np.float32)[:, :, None]), -8, 7)
    meant = (codes * scale.astype(np.float32)[:, :, None]).reshape(padded.shape)[:, :columns]
    unsigned = (codes.reshape(padded.shape)[:, :columns] + 8).astype(np.uint32)
    words = np.zeros((rows, -(-columns // 8)), np.uint32)
    for k in range(columns):
        words[:, k // 8] |= unsigned[:, k] << np.uint32(k % 8 * 4)
    return {
        "weight_packed": torch.tensor(words.view(np.int32)),
        "weight_scale": torch.tensor(scale.view(np.uint16)).view(torch.bfloat16),
        "weight_shape": torch.tensor([rows, columns], dtype=torch.int64 if wide_shape else torch.int32),
    }, torch.tensor(meant)


def int4_config(group):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, "actorder": None}
    weights |= {"strategy": "group", "group_size": group} if group > 0 else {"strategy": "channel", "group_size": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
    }


def quantise_experts(tensors, group, everything=False):
    meant = {}
    for name in list(tensors):
        if ".experts." in name or (everything and "_proj" in name and name.endswith(".weight")):
            packed, meant[name] = pack_int4(tensors.pop(name).float().numpy(), group, wide_shape=group != 32)
            tensors.update({name.removesuffix("weight") + key: value for key, value in packed.items()})
    return meant


@pytest.mark.parametrize("group", [128, 32, 7, -1])
@pytest.mark.parametrize("everything", [False, True], ids=["experts", "all"])
def test_int4(tmp_path, group, everything):
    oracle = write_checkpoint("v3-unnormalised", tmp_path)
    meant = {}
    edit_weights(tmp_path, lambda tensors: meant.update(quantise_experts(tensors, group, everything)))
    edit_config(tmp_path, quantization_config=int4_config(group))
    reference = save_twin(oracle, tmp_path / "plain", meant)
    tokens = random_tokens(50)
    expected = expected_logits(reference, tokens)
    assert np.abs(logits_of(tmp_path, tokens) - expected).max() < TOLERANCE
    # Quantised anew: 8 bits of values that have 4.
    again = logits_of(tmp_path, tokens, quantize="int8")
    # A near-tie in the router sends single tokens elsewhere, so the typical token is what is held to account.
    assert 0 < np.median(np.abs(again - expected)) < 0.03


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda t, n: t.pop(n + "_scale"), "no tensor .*down_proj.weight_scale"),
        (lambda t, n: t.pop(n + "_shape"), "no tensor .*down_proj.weight_shape"),
        (lambda t, n: t[n + "_scale"].view(-1).__setitem__(1, 0.0), "down_proj.weight_scale.* 0 at row"),
        (lambda t, n: t[n + "_scale"].view(-1).__setitem__(1, float("nan")), "down_proj.weight_scale.* nan at row"),
        (lambda t, n: t.update({n + "_scale": t[n + "_scale"][1:].clone()}), "down_proj.weight_scale.*shape"),
        (lambda t, n: t[n + "_shape"].__setitem__(0, 3), "down_proj.weight_shape.*3, "),
        (lambda t, n: t.update({n + "_packed": t[n + "_packed"][1:].clone()}), "down_proj.weight_packed.*shape"),
    ],
)
def test_broken_int4(tmp_path, break_it, message):
    write_checkpoint("v3", tmp_path)
    edit_weights(tmp_path, lambda tensors: quantise_experts(tensors, 16))
    edit_config(tmp_path, quantization_config=int4_config(16))
    edit_weights(tmp_path, lambda tensors: break_it(tensors, "model.layers.1.mlp.experts.3.down_proj.weight"))
    with pytest.raises(ValueError, match=message):
        Model(tmp_path)


def quantize_program(model, out, *flags):
    return subprocess.run(
        [PROGRAM, "quantize", "--model", str(model), "--out", str(out), *flags], capture_output=True, text=True
    )


def dequantised(directory):
    """What the tensors of a quantised directory mean, by the formats' own definitions, in torch."""
    stored = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        stored |= load_file(file)
    out = {}
    for name, tensor in stored.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = stored[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            out[name] = tensor.float() * scale[: tensor.shape[0], : tensor.shape[1]]
        elif name.endswith("_packed"):
            base = name.removesuffix("_packed")
            rows, columns = stored[base + "_shape"].tolist()
            nibbles = torch.stack([(tensor >> (4 * i)) & 15 for i in range(8)], dim=2).reshape(rows, -1)[:, :columns]
            scale = stored[base + "_scale"].float()
            scale = scale.repeat_interleave(columns // scale.shape[1], 1)
            out[base] = (nibbles - 8).float() * scale
        elif not name.endswith(("_scale_inv", "weight_scale", "weight_shape", "input_scale")):
            out[name] = tensor
    return out


def write_plain(directory, tensors, out):
    out.mkdir()
    for file in Path(directory).iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            shutil.copy(file, out)
    config = json.loads((out / "config.json").read_text())
    config.pop("quantization_config")
    (out / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})


TEXT = (
    "And it came to pass, when Solomon had finished the building of the house of the LORD, and the king's house, "
    "and all Solomon's desire which he was pleased to do, That the LORD appeared to Solomon the second time."
)


def small_tokens():
    from tokenizers import Tokenizer

    return [0, *Tokenizer.from_file(str(SMALL / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids]


def divergence(logits, exact):
    """Of the distributions, in nats per token."""
    return float(
        torch.nn.functional.kl_div(
            torch.tensor(logits).log_softmax(-1),
            torch.tensor(exact).log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )
    )


@pytest.mark.parametrize("flags, limit", [(["--format", "fp8"], 0.003), (["--format", "fp8", "--ue8m0"], 0.004),
                                          (["--format", "w4a8"], 0.03),
                                          (["--format", "w4a8", "--layers", "attention,shared,experts,dense"], 0.06)],
                         ids=["fp8", "ue8m0", "w4a8", "w4a8-all"])  # fmt: skip
def test_quantize(tmp_path, flags, limit):
    out = tmp_path / "out"
    done = quantize_program(SMALL, out, *flags, "--shard-size", "2MiB")
    assert done.returncode == 0, done.stderr
    assert "model.layers.1 experts" in done.stdout and "100%" in done.stderr
    assert len(list(out.glob("model-*.safetensors"))) > 3
    assert (out / "tokenizer.json").read_bytes() == (SMALL / "tokenizer.json").read_bytes()
    tokens = small_tokens()
    logits = logits_of(out, tokens)
    # Equal to its dequantised twin, and near the original.
    write_plain(out, dequantised(out), tmp_path / "plain")
    assert np.abs(logits - logits_of(tmp_path / "plain", tokens)).max() < 1e-3
    exact = logits_of(SMALL, tokens)
    assert 0 < divergence(logits, exact) < limit
    # Kept in as many bits by the products in bfloat16.
    assert divergence(logits_of(out, tokens, precision="auto"), logits) < 0.002
    # The same as quantising when the model is loaded, but for kv_b.
    if flags in (["--format", "fp8"], ["--format", "w4a8"]):
        loaded = logits_of(SMALL, tokens, quantize=flags[1])
        assert divergence(logits, loaded) < (0.002 if flags[1] == "fp8" else 0.03)
    # Layers that are not asked for stay to the bit.
    with safe_open(SMALL / "model.safetensors", "pt") as before:
        after = dequantised(out)
        for name in ("model.embed_tokens.weight", "model.layers.1.mlp.gate.weight", "model.norm.weight"):
            assert torch.equal(after[name], before.get_tensor(name))
    # A quantised checkpoint can be quantised.
    other = "w4a8" if flags[1] == "fp8" else "fp8"
    assert quantize_program(out, tmp_path / "again", "--format", other).returncode == 0
    assert divergence(logits_of(tmp_path / "again", tokens), exact) < 2 * limit + 0.03


def test_quantize_with_calibration(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((TEXT + "\n") * 8)
    done = quantize_program(SMALL, tmp_path / "awq", "--format", "w4a8", "--calibration", str(text),
                            "--static-activations", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    errors = {e["layers"]: e for e in json.loads(done.stdout)["errors"]}
    assert quantize_program(SMALL, tmp_path / "plain", "--format", "w4a8").returncode == 0
    experts = errors["model.layers.2 experts"]
    assert 0 < experts["relative_error_of_products"] < 0.2 and 0 < experts["relative_error"] < 0.2
    # Folding changes nothing but the rounding.
    tokens = small_tokens()
    exact = logits_of(SMALL, tokens)
    assert 0 < divergence(logits_of(tmp_path / "awq", tokens), exact) < 0.03
    stored = load_file(tmp_path / "awq" / "model.safetensors")
    scale = stored["model.layers.1.mlp.shared_experts.down_proj.input_scale"]
    assert scale.shape == (1,) and scale.dtype == torch.float32 and 0 < scale.item() < 1
    config = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["input_activations"]["strategy"] == "tensor"


def test_quantize_refuses(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    done = quantize_program(SMALL, there, "--format", "fp8")
    assert done.returncode == 2 and "expected the name of a new directory" in done.stderr
    done = quantize_program(SMALL, tmp_path / "out", "--format", "fp4")
    assert done.returncode == 2 and "--format" in done.stderr
    done = quantize_program(SMALL, tmp_path / "out", "--format", "fp8", "--layers", "router")
    assert done.returncode == 2 and "--layers" in done.stderr
    done = quantize_program(SMALL, tmp_path / "out", "--format", "w4a8", "--static-activations")
    assert done.returncode == 2 and "calibration" in done.stderr
    write_checkpoint("v3", tmp_path / "bad")
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    edit_weights(tmp_path / "bad", lambda tensors: tensors[name].view(-1).__setitem__(3, float("inf")))
    done = quantize_program(tmp_path / "bad", tmp_path / "out", "--format", "fp8")
    assert done.returncode == 2 and name in done.stderr and "inf" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "there"]
