"""Caches in other types than the model's: kv_cache of Model and LLM, dense and sparse."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import expected_logits, random_tokens, write_checkpoint

from flash_mla_kernels import LLM, SamplingParams
from flash_mla_kernels.model import PAGE_SIZE, Model

SMALL = Path(__file__).resolve().parents[2] / "models" / "small"
# Root mean square difference of logits over their deviation: mostly of a choice, of experts or tokens, that turns.
LIMITS = {
    ("v3-full-heads", "bfloat16"): 0.08,
    ("v3-full-heads", "float16"): 0.03,
    ("v3-full-heads", "fp8"): 0.3,
    ("v32-full-heads", "bfloat16"): 0.2,
    ("v32-full-heads", "fp8"): 0.6,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            made[name] = directory, write_checkpoint(name, directory)
        return made[name]

    return get


def whole(model, tokens, chunk=None):
    """Logits of every token, given in chunks."""
    pages = -(-len(tokens) // PAGE_SIZE)
    model.allocate_cache(pages)
    table, out = [list(reversed(range(pages)))], []
    for at in range(0, len(tokens), chunk or len(tokens)):
        new = tokens[at : at + (chunk or len(tokens))]
        out.append(model.forward(new, [0, len(new)], [at + len(new)], table))
    return np.concatenate(out)


@pytest.mark.parametrize("name, kv_cache", LIMITS)
def test_is_close_to_transformers(checkpoint, name, kv_cache):
    directory, oracle = checkpoint(name)
    tokens = random_tokens(300)
    expected = expected_logits(oracle, tokens)
    model = Model(directory, precision="float32", kv_cache=kv_cache, num_threads=2)
    off = np.sqrt(np.mean((whole(model, tokens) - expected) ** 2)) / expected.std()
    assert 1e-6 < off < LIMITS[name, kv_cache]
    # As far from the oracle in small chunks, some of them in the absorbed form.
    for chunk in (100, 16):
        other = np.sqrt(np.mean((whole(model, tokens, chunk) - expected) ** 2)) / expected.std()
        assert 1e-6 < other < LIMITS[name, kv_cache]


@pytest.mark.parametrize("kv_cache", ["bfloat16", "fp8"])
def test_engine_shares_copies_and_recomputes_pages(kv_cache):
    """One answer whatever is shared, however prompts are cut, with preemption: each quantises the same rows."""
    prompts = [
        "And it came to pass in those days, that he went out into a mountain to pray, " * n for n in (1, 4, 4, 7)
    ]
    params = SamplingParams(max_tokens=90, temperature=0.7, seed=3, n=2, ignore_eos=True)

    def run(**options):
        llm = LLM(
            SMALL, device="cpu", precision="float32", kv_cache=kv_cache, batch_invariant=True,
            **{"num_pages": 64, **options},
        )  # fmt: skip
        outputs = llm.generate(prompts, params, progress=False)
        return [[c.token_ids for c in o.choices] for o in outputs], llm.stats()

    expected, _ = run(prefix_cache=False, max_batch_size=1)
    shared, stats = run(max_batch_size=4, max_tokens_per_step=48)
    assert shared == expected
    assert stats["prefix_tokens_hit"] > 0
    few, stats = run(num_pages=8)
    assert few == expected
    assert stats["preemptions"] > 0


def test_engine_counts_the_bytes_of_its_pages():
    sizes = {
        kv_cache: LLM(SMALL, device="cpu", precision="float32", kv_cache=kv_cache, memory_bytes=64 << 20).stats()
        for kv_cache in ("auto", "bfloat16", "float16", "fp8")
    }
    layers = json.loads((SMALL / "config.json").read_text())["num_hidden_layers"]
    bytes_per_token = {"auto": 2304, "bfloat16": 1152, "float16": 1152, "fp8": 656}
    for kv_cache, stats in sizes.items():
        assert stats["bytes_per_page"] == layers * PAGE_SIZE * bytes_per_token[kv_cache]
        assert stats["pages_total"] == (64 << 20) // stats["bytes_per_page"]


def test_errors_name_what_is_wrong(checkpoint, tmp_path):
    directory, _ = checkpoint("v3-full-heads")
    with pytest.raises(ValueError, match="kv_cache is 'fp4'"):
        Model(directory, kv_cache="fp4")
    with pytest.raises(ValueError, match='kv_cache is "int8", expected auto, bfloat16, float16 or fp8'):
        LLM(SMALL, kv_cache="int8")
    with pytest.raises(NotImplementedError, match="kv_cache"):
        LLM(SMALL, device="cuda", kv_cache="fp8")
    write_checkpoint("v3", tmp_path)
    with pytest.raises(NotImplementedError, match="kv_lora_rank is 32, expected 512 for a kv_cache of fp8"):
        Model(tmp_path, kv_cache="fp8")
