"""flash-mla serve with --kv-tier: what one server has computed the next one loads."""

import subprocess

import pytest
from live_server import PROGRAM, ROOT, Server, wait_for

SMALL = ROOT / "models" / "small"
PROMPT = "And it came to pass in those days, that there went out a decree. " * 40  # about 600 tokens


def ask(server):
    body = {"model": "small", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = server.json("/v1/completions", body)
    return answer["choices"][0]["text"], answer["usage"]


def tier_metric(server, what, tier="file"):
    return server.metric(f'mla_kv_tier_{what}_total{{tier="{tier}"}}')


def test_a_prompt_survives_the_server(tmp_path):
    # What a machine that is busy takes a while for is still loaded.
    flags = (
        "--kv-tier",
        "ram:100MB",
        "--kv-tier",
        f"file:{tmp_path},100MB",
        "--kv-tier-wait",
        "100",
        "--precision",
        "fp32",
        "--max-tokens-per-step",
        "256",
    )
    first = Server(SMALL, *flags)
    text, usage = ask(first)
    chunks = usage["prompt_tokens"] // 256
    assert chunks >= 2 and usage["prompt_tokens_details"]["cached_tokens"] == 0
    wait_for(lambda: tier_metric(first, "tokens_stored") == 256 * chunks, "the prompt is not stored")
    assert first.stop() == 0
    second = Server(SMALL, *flags)
    again, usage = ask(second)
    assert again == text
    assert usage["prompt_tokens_details"]["cached_tokens"] == 256 * chunks
    assert tier_metric(second, "tokens_found") == tier_metric(second, "tokens_loaded") == 256 * chunks
    assert tier_metric(second, "failures") == 0
    assert tier_metric(second, "tokens_found", "ram") == 0
    second.wait_until_idle()
    assert second.stop() == 0


@pytest.mark.parametrize(
    "tier, message",
    [
        ("tape:1TB", "is no tier"),
        ("ram:", "has no size"),
        ("file:/tmp", "names no directory or no size"),
    ],
)
def test_wrong_tiers_are_refused_before_the_model_is_read(tier, message, tmp_path):
    result = subprocess.run(
        [PROGRAM, "serve", "--model", str(tmp_path), "--kv-tier", tier],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode != 0
    assert f'"{tier}" {message}' in result.stderr
