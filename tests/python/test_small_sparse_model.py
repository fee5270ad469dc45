"""The trained model with sparse attention: whole, as described, and the same in transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import expected_greedy, expected_logits
from tokenizers import Tokenizer
from transformers import DeepseekV32ForCausalLM

from flash_mla_kernels import LLM, SamplingParams
from flash_mla_kernels.model import Model

DIRECTORY = Path(__file__).resolve().parents[2] / "models" / "small-sparse"
# About 560 tokens, of which a token attends to 128.
LONG = (
    "And it came to pass, when Solomon had finished the building of the house of the LORD, and the king's house, "
    "and all Solomon's desire which he was pleased to do, That the LORD appeared to Solomon the second time, as he "
    "had appeared unto him at Gibeon. And the LORD said unto him, I have heard thy prayer and thy supplication, "
    "that thou hast made before me: I have hallowed this house, which thou hast built, to put my name there for "
    "ever; and mine eyes and mine heart shall be there perpetually.\n"
) * 4


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))


@pytest.fixture(scope="module")
def oracle():
    return DeepseekV32ForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32, attn_implementation="eager").eval()


def encode(tokenizer, prompt):
    return [0, *tokenizer.encode(prompt, add_special_tokens=False).ids]


def logits_of(model, tokens):
    model.allocate_cache(16)
    return model.forward(tokens, [0, len(tokens)], [len(tokens)], [list(range(16))])


def greedy(model, prompt, count):
    model.allocate_cache(16)
    new, length, out = prompt, 0, []
    for _ in range(count):
        length += len(new)
        logits = model.forward(new, [0, len(new)], [length], [list(range(16))], [len(new) - 1])
        new = [int(logits[0].argmax())]
        out += new
    return out


def test_size():
    assert sum(file.stat().st_size for file in DIRECTORY.iterdir()) <= 20 << 20
    config = json.loads((DIRECTORY / "config.json").read_text())
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (512, 64)
    assert config["index_topk"] <= 256


def test_matches_transformers(tokenizer, oracle):
    model = Model(DIRECTORY, precision="float32", num_threads=2)
    tokens = encode(tokenizer, LONG)
    assert len(tokens) > 400
    logits, expected = logits_of(model, tokens), expected_logits(oracle, tokens)
    assert np.abs(logits[:128] - expected[:128]).max() < 2e-4
    # Tokens that no index head scores above zero are ties: the oracle takes others of them than the first.
    assert np.abs(logits - expected).mean() < 0.1
    assert abs(loss(logits, tokens) - loss(expected, tokens)) < 0.05
    assert greedy(model, tokens[:64], 48) == expected_greedy(oracle, tokens[:64], 48)


def loss(logits, tokens):
    return float(torch.nn.functional.cross_entropy(torch.tensor(logits[:-1]), torch.tensor(tokens[1:])))


@pytest.mark.parametrize("kv_cache", ["auto", "fp8"])
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_predicts_its_own_kind_of_text(tokenizer, precision, kv_cache):
    tokens = encode(tokenizer, LONG)
    model = Model(DIRECTORY, precision=precision, kv_cache=kv_cache, num_threads=2)
    assert loss(logits_of(model, tokens), tokens) < 3.4  # nats per token; 8.3 of a model that knows nothing


def test_selection_matters(tokenizer, tmp_path):
    """Past index_topk tokens a model that attends to all of them, or to others, says something else."""
    for file in DIRECTORY.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((DIRECTORY / "config.json").read_text())
    tokens = encode(tokenizer, LONG)
    sparse = logits_of(Model(DIRECTORY, precision="float32", num_threads=2), tokens)
    (tmp_path / "config.json").write_text(json.dumps({**config, "index_topk": 2048}))
    dense = logits_of(Model(tmp_path, precision="float32", num_threads=2), tokens)
    topk = config["index_topk"]
    assert np.abs(sparse[:topk] - dense[:topk]).max() < 1e-3
    assert np.abs(sparse[topk + 64 :] - dense[topk + 64 :]).max() > 0.05
    assert abs(loss(sparse, tokens) - loss(dense, tokens)) < 0.3


def test_writes(tokenizer):
    llm = LLM(DIRECTORY, device="cpu", num_pages=32)
    params = SamplingParams(max_tokens=400, temperature=0.7, seed=1, ignore_eos=True)
    (output,) = llm.generate(["And it came to pass"], params, progress=False)
    words = output.text.split()
    assert len(words) > 150
    # Mostly words of the books that it learned from, which a broken selection would not give.
    model = Model(DIRECTORY, precision="float32", num_threads=2)
    tokens = [0, *llm.tokenize("And it came to pass", False), *output.choices[0].token_ids]
    assert loss(logits_of(model, tokens), tokens) < 3.5
