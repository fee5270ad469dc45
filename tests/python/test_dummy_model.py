"""Random weights in the shape of a config.json: `--load-format dummy` and bench/dummy_model.py."""

import json
import subprocess
import sys

import pytest
from letters import VOCAB_SIZE, write_tokenizer
from live_server import PROGRAM, ROOT, Server

from flash_mla_kernels import LLM, SamplingParams

LITE = json.loads((ROOT / "data/models/deepseek-v2-lite.json").read_text())
SHAPE = dict(
    LITE, vocab_size=5000, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=24, n_routed_experts=8, eos_token_id=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A shape and a tokenizer that has fewer tokens than the model; no weights."""
    path = tmp_path_factory.mktemp("models") / "nothing"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SHAPE))
    write_tokenizer(path)
    return path


def flash_mla(*arguments):
    return subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def test_a_server_without_a_checkpoint(directory, tmp_path):
    (tmp_path / "serve.toml").write_text('load-format = "dummy"\n')
    for flags in (["--load-format", "dummy"], ["--config", str(tmp_path / "serve.toml")]):
        server = Server(directory, *flags)
        assert "random weights" in server.log.read_text()
        request = {"model": "nothing", "prompt": "Hello", "max_tokens": 50, "temperature": 1, "seed": 5, "ignore_eos": True}
        answer = server.json("/v1/completions", request)
        # Nearly all of the model's tokens are none of the tokenizer's: they stand for no text.
        assert answer["usage"]["completion_tokens"] == 50 and len(answer["choices"][0]["text"]) < 50
        assert server.json("/v1/completions", {**request, "logprobs": 2})["choices"][0]["text"] == answer["choices"][0]["text"]
        done = flash_mla("loadtest", "--url", f"http://127.0.0.1:{server.port}", "--requests", 12, "--clients", 4,
                         "--short-tokens", 20, "--long-tokens", 200, "--max-tokens", 5)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        server.wait_until_idle()
        assert server.stop() == 0


def test_the_other_commands_take_it_too(directory):
    generate = ["generate", "--model", directory, "--prompt", "Hello", "--max-tokens", 9, "--ignore-eos", "--json"]
    done = flash_mla(*generate, "--load-format", "dummy", "--seed", 1)
    assert done.returncode == 0, done.stderr
    tokens = json.loads(done.stdout)["completions"][0]["choices"][0]["token_ids"]
    assert len(tokens) == 9 and max(tokens) >= VOCAB_SIZE
    again = flash_mla(*generate, "--load-format", "dummy", "--seed", 1)
    assert json.loads(again.stdout)["completions"][0]["choices"][0]["token_ids"] == tokens
    load = ["loadtest", "--engine", directory, "--requests", 4, "--clients", 2, "--short-tokens", 20, "--long-tokens", 100]
    assert flash_mla(*load, "--load-format", "dummy").returncode == 0
    # By default there are weights to be read.
    done = flash_mla(*generate)
    assert done.returncode != 0 and "safetensors" in done.stderr
    done = flash_mla(*generate, "--load-format", "gguf")
    assert done.returncode == 2 and "--load-format" in done.stderr and "gguf" in done.stderr and "dummy" in done.stderr


def test_from_python(directory):
    llm = LLM(directory, load_format="dummy", num_pages=16)
    output = llm.generate("Hello", SamplingParams(max_tokens=5, ignore_eos=True), progress=False)[0]
    assert len(output.choices[0].token_ids) == 5
    with pytest.raises(ValueError, match='load_format is "gguf", expected auto or dummy'):
        LLM(directory, load_format="gguf")


def test_a_directory_in_the_shape_of_a_large_model(tmp_path):
    script = [sys.executable, str(ROOT / "bench/dummy_model.py")]
    subprocess.run([*script, str(tmp_path / "lite")], check=True)
    assert json.loads((tmp_path / "lite/config.json").read_text())["vocab_size"] == 102400
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    subprocess.run([*script, str(tmp_path / "own"), "--config", str(tmp_path / "config.json")], check=True)
    llm = LLM(tmp_path / "own", load_format="dummy", num_pages=16)
    text = "And it came to pass: abcd."
    assert llm.tokenize(text) == LLM(ROOT / "models/small", num_pages=16).tokenize(text)
    words = [llm.detokenize([token]) for token in range(4096, 5000)]
    assert all(words) and len(set(words)) == len(words)
    (tmp_path / "config.json").write_text(json.dumps(dict(SHAPE, vocab_size=100)))
    done = subprocess.run([*script, str(tmp_path / "no"), "--config", str(tmp_path / "config.json")], capture_output=True, text=True)
    assert done.returncode != 0 and "vocab_size, 100" in done.stderr
