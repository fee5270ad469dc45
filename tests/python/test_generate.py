"""`flash-mla generate` on the small model of the repository."""

import json
import os
import pathlib
import subprocess

import pytest

from flash_mla_kernels import LLM, SamplingParams

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("FLASH_MLA_PROGRAM", str(ROOT / "build/release/src/cli/flash-mla"))
MODEL = ROOT / "models/small"
PROMPT = "And it came to pass"


def generate(*flags, model=MODEL, expected=0, **kw):
    run = subprocess.run(
        [PROGRAM, "generate", "--model", str(model), "--precision", "fp32", *flags], capture_output=True, **kw
    )
    assert run.returncode == expected, run.stderr.decode()
    return run.stdout.decode(), run.stderr.decode()


@pytest.fixture(scope="module")
def llm():
    return LLM(MODEL, precision="float32")


def test_streamed_text_is_that_of_the_library(llm):
    flags = ["--max-tokens", "40", "--temperature", "0"]
    out, report = generate("--prompt", PROMPT, *flags)
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=40, temperature=0), progress=False)[0].text
    assert out == expected + "\n"
    for figure in ("TTFT", "TPOT", "tokens/s", "cache hit rate"):
        assert figure in report
    assert generate("-p", "-", *flags, input=PROMPT.encode())[0] == out


def test_prompts_of_files_follow_the_others(tmp_path):
    (tmp_path / "one").write_text(PROMPT)
    (tmp_path / "two").write_text("Emma was")
    flags = ["--max-tokens", "20", "--temperature", "0"]
    out = generate("-f", str(tmp_path / "one"), *flags)[0]
    assert out == generate("-p", PROMPT, *flags)[0]
    several = generate("--file", str(tmp_path / "one"), "--file", str(tmp_path / "two"), "-p", "Emma was", *flags)[0]
    parts = several.split("--- prompt ")[1:]
    assert [part.partition(",")[0] for part in parts] == ["1", "2", "3"]
    assert parts[1].endswith(out) and parts[0][1:] == parts[2][1:]


def test_json_has_every_continuation_and_the_figures(tmp_path):
    trace = tmp_path / "trace.json"
    out, _ = generate(
        *("--prompt", PROMPT, "--prompt", "Emma was", "-n", "2", "--seed", "5", "--max-tokens", "8", "--json"),
        *("--logprobs", "2", "--trace", str(trace)),
    )
    result = json.loads(out)
    assert [len(c["choices"]) for c in result["completions"]] == [2, 2]
    choice = result["completions"][0]["choices"][0]
    assert len(choice["logprobs"]) == len(choice["token_ids"]) and len(choice["logprobs"][0]["top"]) == 2
    assert result["report"]["generated_tokens"] == sum(
        c["usage"]["completion_tokens"] for c in result["completions"]
    )
    assert json.loads(trace.read_text())["traceEvents"]


def test_drafts_leave_the_text_and_are_reported():
    prompt = "It was not so. " * 3 + "It was"
    flags = ["--prompt", prompt, "--max-tokens", "150", "--temperature", "0", "--batch-invariant", "--json"]
    off = json.loads(generate(*flags)[0])
    assert off["report"]["drafts"]["ngram"]["drafted"] == 0
    for speculative in ("ngram", "auto"):
        out, report = generate(*flags, "--speculative", speculative, "--draft-tokens", "4")
        on = json.loads(out)
        assert on["completions"] == off["completions"]
        drafts = on["report"]["drafts"]["ngram"]
        assert drafts["accepted"] <= drafts["drafted"]
        assert on["report"]["steps"] <= off["report"]["steps"]
        if speculative == "ngram":  # auto may find that they do not pay on this machine
            assert drafts["accepted"] > 0 and drafts["tokens_per_step"] > 1
            assert on["report"]["steps"] < off["report"]["steps"]
            assert "ngram drafts accepted" in report
    for value in ("0", "16"):
        _, error = generate("--prompt", "a", "--speculative", "ngram", "--draft-tokens", value, expected=2)
        assert f"draft_tokens is {value}, expected 1 to 15" in error
    sparse = ROOT / "models/small-sparse"  # comes without a module
    _, error = generate("--prompt", "a", "--speculative", "mtp", model=sparse, expected=2)
    assert "the checkpoint has no module for multi-token prediction" in error


def test_ranks_leave_the_text():
    flags = ["--prompt", "In the beginning", "--max-tokens", "24", "--temperature", "0", "--device", "cpu", "--json"]
    flags += ["--batch-invariant"]
    one = json.loads(generate(*flags)[0])
    for ranks in (["--tp", "2"], ["--tp", "4", "--ep", "2", "--expert-placement", "round-robin"]):
        assert json.loads(generate(*flags, *ranks)[0])["completions"] == one["completions"]
    for ranks, part in (
        (["--tp", "3"], "tp is 3, expected a divisor of 4, the attention heads"),
        (["--tp", "2", "--ep", "4"], "ep is 4, expected 0 or a divisor of 2, tp times dp"),
        (["--tp", "2", "--expert-placement", "/no/such/file"], "/no/such/file"),
    ):
        assert part in generate("--prompt", "a", "--device", "cpu", *ranks, expected=2)[1]


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_the_models_own_module_drafts(temperature):
    flags = ["--prompt", PROMPT, "--prompt", "CHAPTER I\n\nEmma was", "--max-tokens", "200", "--ignore-eos"]
    flags += ["--temperature", temperature, "--seed", "7", "--batch-invariant", "--json"]
    off = json.loads(generate(*flags)[0])
    on = json.loads(generate(*flags, "--speculative", "mtp", "--draft-tokens", "2")[0])
    assert on["completions"] == off["completions"]
    drafts = on["report"]["drafts"]["mtp"]
    # Of greedy text it guesses most, of drawn text about a third.
    least = 0.6 if temperature == "0" else 0.15
    assert drafts["drafted"] > 100 and drafts["acceptance"] > least
    assert on["report"]["steps"] < off["report"]["steps"]


def test_chat(llm):
    out, _ = generate("--chat", "--prompt", "Emma was", "--max-tokens", "30", "--temperature", "0")
    params = SamplingParams(max_tokens=30, temperature=0)
    answer = llm.chat([{"role": "user", "content": "Emma was"}], params, progress=False)[0]
    assert out == answer.text + "\n"


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "a", "--top-p", "2"], "top_p is 2"),
        (["--prompt", "a " * 5000], "expected at most 2047"),
        (["--prompt", "a", "--max-batch-size", "0"], "max_batch_size is 0"),
        (["--prompt", "a", "--num-pages", "-1"], "num_pages is -1"),
        (["--prompt", "a", "--system", "b"], "--system"),
        (["--prompt", "a", "--device", "tpu"], "--device"),
        ([], "--prompt"),
        (["--file", "/no/such/file"], "/no/such/file"),
    ],
)
def test_wrong_usage_is_told(flags, part):
    assert part in generate(*flags, expected=2)[1]


def test_a_directory_without_a_model_is_refused(tmp_path):
    assert "tokenizer.json" in generate("--prompt", "a", model=tmp_path, expected=2)[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["info"],
        ["--help"],
        ["generate", "--model", str(MODEL), "--prompt", "The", "--max-tokens", "4"],
        ["generate", "--model", str(MODEL), "--prompt", "The", "--max-tokens", "4", "--json"],
        ["plan", "--model", "deepseek-v3", "--hardware", "h200", "--users", "8", "--input", "1024"],
    ],
    ids=lambda a: " ".join(a[:1] + a[-1:]),
)
def test_output_to_a_full_disk_is_an_error_that_says_so(arguments):
    with open("/dev/full", "w") as full:
        result = subprocess.run([PROGRAM, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert result.returncode == 1
    assert "could not be written in full: No space left on device" in result.stderr
