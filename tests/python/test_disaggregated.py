"""flash-mla serve --role: prefill and decode as two processes, given each request as a router gives it."""

import concurrent.futures
import json
import os
import random
import re
import signal
import subprocess

import pytest
from live_server import PROGRAM, ROOT, Server, wait_for

SMALL = ROOT / "models" / "small"
# On a GPU: "--device cuda --load-format dummy", say.
FLAGS = tuple(os.environ.get("FLASH_MLA_TRANSFER_FLAGS", "--precision fp32 --threads 1").split())
PROMPT = "And it came to pass in those days, that there went out a decree. " * 20  # about 300 tokens
# The last bits of a sequence's logits are the same whatever runs beside it.
COMMON = (*FLAGS, "--batch-invariant", "--transport", os.environ.get("TRANSPORT", "shm"))


def prefill_server(*flags, **kw):
    server = Server(SMALL, *COMMON, "--role", "prefill", "--bootstrap-port", "0", *flags, **kw)
    wait_for(lambda: re.search(r"meet it at \S+:\d+", server.log.read_text()), "it says no bootstrap port")
    server.bootstrap_port = int(re.search(r"meet it at \S+:(\d+)", server.log.read_text()).group(1))
    return server


def decode_server(*prefills, flags=(), **kw):
    peers = [f for p in prefills for f in ("--peer", f"127.0.0.1:{p.bootstrap_port}")]
    return Server(SMALL, *COMMON, "--role", "decode", *peers, *flags, **kw)


def body(room=None, port=None, prompt=PROMPT, **fields):
    out = {"model": "small", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
    if room is not None:
        out |= {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": room}
    return out


def text_of(answer):
    return answer["choices"][0]["text"]


class Router:
    """Gives a request to both at once and answers what the decode side does."""

    def __init__(self, prefill, decode):
        self.prefill, self.decode = prefill, decode
        self.room = 0
        self.threads = concurrent.futures.ThreadPoolExecutor(32)

    def start(self, **fields):
        self.room += 1
        asked = body(self.room, self.prefill.bootstrap_port, **fields)
        first = self.threads.submit(self.prefill.call, "/v1/completions", asked)
        return first, self.threads.submit(self.decode.call, "/v1/completions", asked)


def fallbacks(server, reason):
    try:
        return server.metric(f'mla_transfer_fallbacks_total{{reason="{reason}"}}')
    except AttributeError:
        return 0


@pytest.fixture(scope="module")
def alone():
    server = Server(SMALL, *FLAGS, "--batch-invariant")
    yield lambda **fields: text_of(server.json("/v1/completions", body(**fields)))
    assert server.stop() == 0


def test_the_answer_is_one_servers(alone):
    prefill = prefill_server("--layerwise-tokens", "200", "--max-tokens-per-step", "128")
    decode = decode_server(prefill)
    router = Router(prefill, decode)
    prompts = [PROMPT, "In the beginning", PROMPT + "And all went to be taxed. " * 10]
    for prompt in prompts:
        first, whole = (f.result() for f in router.start(prompt=prompt))
        assert first[0] == whole[0] == 200, (first, whole)
        answer = json.loads(whole[1])
        assert text_of(answer) == alone(prompt=prompt)
        usage = answer["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
    for server in (prefill, decode):
        server.wait_until_idle()
        wait_for(lambda s=server: s.metric("mla_transfer_handed_over_total") == 3, "not all are handed over")
        assert server.metric("mla_transfer_rooms_open") == 0
        assert server.metric("mla_transfer_bytes_total") > 0
    assert prefill.metric("mla_transfer_seconds_total") > 0
    assert 'mla_transfer_info{role="prefill"' in prefill.call("/metrics")[1]
    # A server with a role serves others' requests as any other.
    assert text_of(prefill.json("/v1/completions", body())) == alone()
    assert prefill.stop() == 0
    assert decode.stop() == 0


@pytest.mark.parametrize("dp", ["1", "2"])
def test_tiers_and_ranks_beside_a_role(alone, tmp_path, dp):
    tier = ("--kv-tier", f"file:{tmp_path},1GiB", "--kv-tier-wait", "60")
    prefill = prefill_server("--dp", dp, "--max-tokens-per-step", "256", *tier)
    decode = decode_server(prefill, flags=("--dp", dp, "--max-tokens-per-step", "256", *tier))
    router = Router(prefill, decode)
    started = [(prompt, *router.start(prompt=prompt)) for prompt in (f"{i} {PROMPT}" for i in range(4))]
    for prompt, first, whole in started:
        assert first.result()[0] == 200
        assert text_of(json.loads(whole.result()[1])) == alone(prompt=prompt)
    wait_for(lambda: decode.metric("mla_transfer_handed_over_total") == 4, "not all are handed over")
    wait_for(lambda: prefill.metric('mla_kv_tier_tokens_stored_total{tier="file"}') >= 4 * 256, "not all is stored")
    assert prefill.stop() == 0
    # Another, whose cache is empty, loads them and hands them over; and none loses an answer.
    other = prefill_server("--dp", dp, "--max-tokens-per-step", "256", *tier)
    assert text_of(decode.json("/v1/completions", body(99, prefill.bootstrap_port))) == alone()
    fresh = decode_server(other, flags=("--dp", dp))
    router = Router(other, fresh)
    for prompt, _, _ in started:
        first, whole = router.start(prompt=prompt)
        assert first.result()[0] == 200
        assert text_of(json.loads(whole.result()[1])) == alone(prompt=prompt)
    assert other.metric('mla_kv_tier_tokens_loaded_total{tier="file"}') == 4 * 256
    wait_for(lambda: fresh.metric("mla_transfer_handed_over_total") == 4, "not all are handed over")
    for server in (other, decode, fresh):
        server.wait_until_idle()
        assert server.stop() == 0


def test_a_prefill_server_that_is_killed_costs_no_answer(alone):
    # Too small a step to be done soon: they are killed at work.
    prefill = prefill_server("--max-tokens-per-step", "8", "--max-batch-size", "8")
    decode = decode_server(prefill)
    router = Router(prefill, decode)
    started = [router.start(prompt=f"{i} {PROMPT}") for i in range(6)]
    wait_for(lambda: prefill.metric("mla_sequences_running") > 0, "nothing runs")
    prefill.process.send_signal(signal.SIGKILL)
    prefill.process.wait()
    for i, (_, whole) in enumerate(started):
        status, text, _ = whole.result()
        assert status == 200, text
        assert text_of(json.loads(text)) == alone(prompt=f"{i} {PROMPT}")
    assert fallbacks(decode, "gone") > 0
    # Nor do those that come after it.
    assert text_of(decode.json("/v1/completions", body(99, prefill.bootstrap_port))) == alone()
    decode.wait_until_idle()
    assert decode.metric("mla_transfer_rooms_open") == 0
    assert decode.stop() == 0


def test_a_decode_server_that_is_killed_leaves_nothing_behind(alone):
    prefill = prefill_server("--max-tokens-per-step", "8", "--max-batch-size", "8")
    decode = decode_server(prefill)
    router = Router(prefill, decode)
    started = [router.start(prompt=f"{i} {PROMPT}") for i in range(6)]
    wait_for(lambda: prefill.metric("mla_sequences_running") > 0, "nothing runs")
    decode.process.send_signal(signal.SIGKILL)
    decode.process.wait()
    for first, whole in started:
        assert first.result()[0] in (200, 500)
        with pytest.raises(OSError):
            whole.result()
    prefill.wait_until_idle()
    assert prefill.metric("mla_transfer_rooms_open") == 0
    # Another takes its place.
    other = decode_server(prefill)
    router = Router(prefill, other)
    router.room = 100
    first, whole = router.start()
    assert first.result()[0] == 200
    assert text_of(json.loads(whole.result()[1])) == alone()
    assert other.metric("mla_transfer_handed_over_total") == 1
    assert other.stop() == 0
    assert prefill.stop() == 0


def test_refusals_name_their_reason(alone):
    prefill = prefill_server("--lease", "1")
    decode = decode_server(prefill, flags=("--kv-cache", "fp16"))
    port = prefill.bootstrap_port
    # Sides that differ: the answer is the decode side's own, the prefill side says that nobody came.
    status, text, _ = prefill.call("/v1/completions", body(1, port))
    assert status == 500 and "no decode server has asked" in text
    answer = decode.json("/v1/completions", body(2, port))
    assert answer["usage"]["completion_tokens"] == 8
    assert fallbacks(decode, "refused") == 1
    assert "page_format is" in decode.call("/metrics")[1]
    # Fields.
    for fields, message in [
        ({"bootstrap_room": -1}, "bootstrap_room is -1"),
        ({"bootstrap_room": "x"}, "bootstrap_room is string"),
        ({"bootstrap_room": 1 << 63}, "bootstrap_room is 9223372036854775808"),
        ({"bootstrap_host": 7}, "bootstrap_host is number"),
        ({"bootstrap_host": "x" * 256}, "bootstrap_host has 256 bytes"),
        ({"bootstrap_host": "10.0.0.1"}, "expected one of --peer"),
        ({"bootstrap_port": 0}, "bootstrap_port is 0"),
        ({"prompt": ["a", "b"]}, "bootstrap_room: expected a single prompt, got 2"),
    ]:
        error = decode.json("/v1/completions", body(3, port) | fields, expected=400)["error"]
        assert message in error["message"], error
    asked = body()
    asked["bootstrap_host"] = "127.0.0.1"
    assert "together with bootstrap_room" in decode.json("/v1/completions", asked, expected=400)["error"]["message"]
    # null is absent.
    decode.json("/v1/completions", body() | {"bootstrap_host": None, "bootstrap_room": None})
    prefill.wait_until_idle()
    decode.wait_until_idle()
    assert prefill.stop() == 0
    assert decode.stop() == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--role", "decode"), "transfer.peers is empty"),
        (("--role", "decode", "--peer", "host"), 'transfer.peers has "host"'),
        (("--role", "prefill", "--peer", "host:1"), "transfer.peers: expected none"),
        (("--role", "middle"), "--role"),
    ],
)
def test_wrong_roles_are_refused_before_the_model_is_read(flags, message, tmp_path):
    result = subprocess.run(
        [PROGRAM, "serve", "--model", str(tmp_path), *flags], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode != 0
    assert message in result.stderr


def test_a_server_without_a_role_refuses_rooms():
    server = Server(SMALL)
    error = server.json("/v1/completions", body(1, 8998), expected=400)["error"]
    assert "the server has no --role" in error["message"] and error["param"] == "bootstrap_room"
    assert server.stop() == 0


def test_many_random_requests(alone):
    """Of all lengths, in a cache too small for all of them; some clients leave."""
    count = int(os.environ.get("FLASH_MLA_TRANSFER_REQUESTS", "40"))
    prefill = prefill_server("--lease", "20", "--layerwise-tokens", "300", "--max-tokens-per-step", "256", num_pages=32)
    decode = decode_server(prefill, flags=("--lease", "20", "--transfer-memory", "20MB"), num_pages=32)
    router = Router(prefill, decode)
    chance = random.Random(3)
    words = PROMPT.split() * 4
    prompts = [f"{i} " + " ".join(words[: chance.randrange(1, 300)]) for i in range(40)]
    expected = {p: alone(prompt=p) for p in prompts}
    for _ in range(0, count, 20):
        batch = [(p, *router.start(prompt=p)) for p in chance.sample(prompts, 20)]
        for prompt, first, whole in batch:
            status, text, _ = whole.result()
            assert status == 200, text
            assert text_of(json.loads(text)) == expected[prompt]
            assert first.result()[0] in (200, 500)
    for server in (prefill, decode):
        server.wait_until_idle()
        assert server.metric("mla_transfer_rooms_open") == 0
    handed_over, cached = decode.metric("mla_transfer_handed_over_total"), fallbacks(decode, "unneeded")
    print(f"{count} requests: {handed_over:.0f} handed over, {cached:.0f} in the cache")
    assert handed_over > 0
    assert prefill.stop() == 0
    assert decode.stop() == 0
