"""Anthropic's Messages API, through the `anthropic` package and from raw sockets."""

import json

import anthropic
import pytest
from live_server import PATIENCE, ROOT, Server, raw

SMALL = ROOT / "models" / "small"
PROMPT = "The family of Dashwood had long been settled in Sussex."
MESSAGES = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def server():
    server = Server(SMALL, "--precision", "fp32", "--batch-invariant", "--api-key", "a key")
    yield server
    server.wait_until_idle()
    assert server.stop() == 0


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.port}", api_key="a key", max_retries=0, timeout=PATIENCE) as c:
        yield c


def create(client, **kw):
    kw = {"model": "small", "max_tokens": 12, "messages": MESSAGES, "extra_body": {"temperature": 0}, **kw}
    return client.messages.create(**kw)


def chat(server, messages, **kw):
    body = {"model": "small", "messages": messages, "max_tokens": 12, "temperature": 0, **kw}
    return server.json("/v1/chat/completions", body, headers={"x-api-key": "a key"})


def test_a_message_is_what_a_chat_says(server, client):
    message = create(client, system="Write as you were taught.")
    answer = chat(server, [{"role": "system", "content": "Write as you were taught."}, *MESSAGES])
    assert (message.type, message.role, message.model) == ("message", "assistant", "small")
    assert message.content[0].text == answer["choices"][0]["message"]["content"] and message.content[0].text
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == answer["usage"]["prompt_tokens"] and usage.output_tokens == 12


def test_blocks(server, client):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "One, ", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "two."}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": ""}, {"type": "text", "text": "Three."}]},
        {"role": "user", "content": "Four?"},
    ]
    system = [{"type": "text", "text": "Short."}]
    plain = [{"role": "system", "content": "Short."}, {"role": "user", "content": "One, two."},
             {"role": "assistant", "content": "Three."}, {"role": "user", "content": "Four?"}]  # fmt: skip
    assert create(client, messages=messages, system=system).content[0].text == chat(server, plain)["choices"][0]["message"]["content"]


def test_the_answer_goes_on_behind_a_last_message_of_the_assistant(server, client):
    messages = [*MESSAGES, {"role": "assistant", "content": "It was"}]
    answer = chat(server, messages, continue_final_message=True, add_generation_prompt=False)
    assert create(client, messages=messages).content[0].text == answer["choices"][0]["message"]["content"]


def test_streaming(client):
    whole = create(client)
    events = list(create(client, stream=True))
    names = [e.type for e in events]
    deltas = names.count("content_block_delta")
    assert deltas > 3, "the text came in one piece"
    assert names == ["message_start", "content_block_start", *["content_block_delta"] * deltas, "content_block_stop", "message_delta", "message_stop"]
    start = events[0].message
    assert start.content == [] and start.stop_reason is None
    assert start.usage.input_tokens + start.usage.cache_read_input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    assert "".join(e.delta.text for e in events if e.type == "content_block_delta") == whole.content[0].text
    assert events[-2].delta.stop_reason == "max_tokens" and events[-2].usage.output_tokens == 12
    with client.messages.stream(model="small", max_tokens=12, messages=MESSAGES, extra_body={"temperature": 0}) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        assert stream.get_final_message().usage.output_tokens == 12


def test_stop_sequences(client):
    text = create(client, max_tokens=40).content[0].text
    stop = text.split()[4]
    stopped = create(client, max_tokens=40, stop_sequences=["no such text", stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert stopped.content[0].text == text[: text.index(stop)]
    with client.messages.stream(model="small", max_tokens=40, messages=MESSAGES, stop_sequences=[stop], extra_body={"temperature": 0}) as stream:
        assert "".join(stream.text_stream) == stopped.content[0].text
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", stop)
    nothing = create(client, stop_sequences=[text[:1]])
    assert nothing.content == [] and nothing.stop_sequence == text[:1]


def test_tokens_are_counted(server, client):
    count = client.messages.count_tokens(model="small", messages=MESSAGES, system="Short.").input_tokens
    usage = create(client, system="Short.").usage
    assert count == usage.input_tokens + usage.cache_read_input_tokens
    assert count > client.messages.count_tokens(model="small", messages=MESSAGES).input_tokens


def test_cached_tokens_are_counted_apart(client):
    messages = [{"role": "user", "content": "In the beginning of a long story, " * 20}]
    first, second = create(client, messages=messages).usage, create(client, messages=messages).usage
    assert first.cache_read_input_tokens == 0 and second.cache_read_input_tokens >= 64
    assert first.input_tokens == second.input_tokens + second.cache_read_input_tokens


def test_errors_are_the_clients_own(server, client):
    with pytest.raises(anthropic.NotFoundError):
        create(client, model="claude")
    with pytest.raises(anthropic.BadRequestError) as error:
        create(client, extra_body={"temperature": -1})
    assert error.value.body["type"] == "error" and error.value.body["error"]["type"] == "invalid_request_error"
    assert "temperature" in error.value.body["error"]["message"]
    with pytest.raises(anthropic.AuthenticationError) as error:
        create(anthropic.Anthropic(base_url=client.base_url, api_key="another", max_retries=0))
    assert error.value.body["error"]["type"] == "authentication_error"
    for key in ({"x-api-key": "a key"}, {"Authorization": "Bearer a key"}):
        assert server.call("/v1/messages", {"model": "small", "max_tokens": 1, "messages": MESSAGES}, headers=key)[0] == 200


@pytest.mark.parametrize(
    "body, named",
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]}, "tool_use"),
        ({"system": [{"type": "image"}]}, "system"),
        ({"stop_sequences": "a"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools"),
        ({"tool_choice": {"type": "every"}}, "tool_choice"),
        ({"thinking": {"type": "much"}}, "thinking"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"n": 2}, "n is not supported"),
        ({"top_p": 7}, "top_p"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server, body, named):
    body = {"model": "small", "max_tokens": 2, "messages": MESSAGES, **body}
    for stream in (False, True):
        answer = server.json("/v1/messages", {**body, "stream": stream}, expected=400, headers={"x-api-key": "a key"})
        assert answer["type"] == "error" and answer["error"]["type"] == "invalid_request_error" and named in answer["error"]["message"]
    if "max_tokens" not in named:
        server.json("/v1/messages/count_tokens", {k: v for k, v in body.items() if k != "max_tokens"}, expected=400, headers={"x-api-key": "a key"})


def test_the_wire(server):
    body = json.dumps({"model": "small", "max_tokens": 3, "messages": MESSAGES, "stream": True})
    got = raw(server, f"POST /v1/messages?beta=true HTTP/1.0\r\nX-API-Key: a key\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode(), half_close=False)
    head, _, text = got.decode().partition("\r\n\r\n")
    assert "200 OK" in head and "text/event-stream" in head
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")
    refused = raw(server, b"GET /v1/messages HTTP/1.1\r\nHost: x\r\nX-Api-Key: a key\r\n\r\n")
    assert b" 405 " in refused.split(b"\r\n")[0] and b'"type":"error"' in refused


def test_a_stream_that_takes_too_long_ends_with_an_error():
    server = Server(SMALL, "--request-timeout", "0.3")
    body = {"model": "small", "messages": MESSAGES, "max_tokens": 2000, "stream": True, "ignore_eos": True}
    last = server.call("/v1/messages", body)[1].removesuffix("\n\n").split("\n\n")[-1]
    assert last.startswith("event: error\n") and json.loads(last.split("data: ")[1])["error"]["type"] == "timeout_error"
    server.wait_until_idle()
    assert server.stop() == 0
