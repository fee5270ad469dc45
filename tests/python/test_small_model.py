"""The trained model in the repository: whole, as described, and the same in transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import expected_greedy, expected_logits
from tokenizers import Tokenizer
from transformers import DeepseekV3ForCausalLM

from flash_mla_kernels.model import Model

DIRECTORY = Path(__file__).resolve().parents[2] / "models" / "small"
PROMPTS = [
    "And it came to pass",
    "CHAPTER I\n\nEmma was",
    "<｜User｜>The family of Dashwood had long been settled in Sussex.<｜Assistant｜>",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))


@pytest.fixture(scope="module")
def oracle():
    return DeepseekV3ForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32, attn_implementation="eager").eval()


def encode(tokenizer, prompt):
    return [0, *tokenizer.encode(prompt, add_special_tokens=False).ids]


def greedy(model, prompt, count):
    model.allocate_cache(8)
    new, length, out = prompt, 0, []
    for _ in range(count):
        length += len(new)
        logits = model.forward(new, [0, len(new)], [length], [list(range(8))], [len(new) - 1])
        new = [int(logits[0].argmax())]
        out += new
    return out


def test_size():
    assert sum(file.stat().st_size for file in DIRECTORY.iterdir()) <= 17 << 20
    config = json.loads((DIRECTORY / "config.json").read_text())
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (512, 64)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_matches_transformers(tokenizer, oracle, prompt):
    model = Model(DIRECTORY, precision="float32", num_threads=2)
    model.allocate_cache(8)
    tokens = encode(tokenizer, prompt)
    logits = model.forward(tokens, [0, len(tokens)], [len(tokens)], [[5, 2]])
    assert np.abs(logits - expected_logits(oracle, tokens)).max() < 2e-4
    assert greedy(model, tokens, 64) == expected_greedy(oracle, tokens, 64)


TEXT = (
    "And it came to pass, when Solomon had finished the building of the house of the LORD, and the king's house, "
    "and all Solomon's desire which he was pleased to do, That the LORD appeared to Solomon the second time."
)


def logits_and_loss(tokenizer, **options):
    """Of TEXT: logits of every token, and the loss in nats per token."""
    model = Model(DIRECTORY, num_threads=2, **options)
    model.allocate_cache(2)
    tokens = encode(tokenizer, TEXT)
    logits = torch.tensor(model.forward(tokens, [0, len(tokens)], [len(tokens)], [[0, 1]]))
    return logits, float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:])))


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_predicts_its_own_kind_of_text(tokenizer, precision, quantize):
    _, loss = logits_and_loss(tokenizer, precision=precision, quantize=quantize)
    assert loss < 3.4  # nats per token; 8.3 of a model that knows nothing


def test_weights_of_8_bits_change_little(tokenizer):
    exact, exact_loss = logits_and_loss(tokenizer, precision="float32")
    logits, loss = logits_and_loss(tokenizer, precision="float32", quantize="int8")
    assert 0 < (logits - exact).pow(2).mean().sqrt() < 0.02 * exact.std()
    assert abs(loss - exact_loss) < 0.02
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert divergence < 0.001


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_writes_the_same_with_weights_of_8_bits(tokenizer, precision):
    """Until a close choice turns, and words of its own kind after it."""
    tokens = encode(tokenizer, PROMPTS[0])
    exact = greedy(Model(DIRECTORY, precision="float32", num_threads=2), tokens, 48)
    quantized = greedy(Model(DIRECTORY, precision=precision, quantize="int8", num_threads=2), tokens, 48)
    assert quantized[:4] == exact[:4]
    model = Model(DIRECTORY, precision="float32", num_threads=2)
    model.allocate_cache(2)
    whole = tokens + quantized
    logits = torch.tensor(model.forward(whole, [0, len(whole)], [len(whole)], [[0, 1]]))
    # The unquantised model finds the text as likely as what it would have written itself, nearly.
    loss = torch.nn.functional.cross_entropy(logits[len(tokens) - 1 : -1], torch.tensor(quantized))
    assert loss < 2.0
