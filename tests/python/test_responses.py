"""OpenAI's Responses API, through the `openai` package and from raw sockets."""

import json
import re

import openai
import pytest
from live_server import PATIENCE, ROOT, Server, raw

SMALL = ROOT / "models" / "small"
PROMPT = "The family of Dashwood had long been settled in Sussex."


@pytest.fixture(scope="module")
def server():
    server = Server(SMALL, "--precision", "fp32", "--batch-invariant", "--api-key", "a key")
    yield server
    server.wait_until_idle()
    assert server.stop() == 0


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="a key", max_retries=0, timeout=PATIENCE) as c:
        yield c


def create(client, **kw):
    return client.responses.create(**{"model": "small", "input": PROMPT, "max_output_tokens": 12, "temperature": 0, **kw})


def chat(client, messages, **kw):
    return client.chat.completions.create(model="small", messages=messages, max_tokens=12, temperature=0, **kw)


def test_a_response_is_what_a_chat_says(client):
    response = create(client, instructions="Write as you were taught.", metadata={"a": "b"})
    answer = chat(client, [{"role": "system", "content": "Write as you were taught."}, {"role": "user", "content": PROMPT}])
    assert response.object == "response" and response.id.startswith("resp_") and response.model == "small"
    assert response.output_text == answer.choices[0].message.content and response.output_text
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.input_tokens == answer.usage.prompt_tokens and response.usage.output_tokens == 12
    assert response.usage.total_tokens == answer.usage.total_tokens
    assert response.instructions == "Write as you were taught." and response.metadata == {"a": "b"}
    message = response.output[0]
    assert (message.type, message.role, message.status, len(response.output)) == ("message", "assistant", "incomplete", 1)


def test_items_as_input(client):
    items = [
        {"role": "developer", "content": "Short."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "One, "}, {"type": "input_text", "text": "two."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Three.", "annotations": []}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"role": "user", "content": "Four?"},
    ]
    messages = [{"role": "system", "content": "Short."}, {"role": "user", "content": "One, two."},
                {"role": "assistant", "content": "Three."}, {"role": "user", "content": "Four?"}]  # fmt: skip
    assert create(client, input=items).output_text == chat(client, messages).choices[0].message.content


def test_events_have_the_official_names_and_numbers(client):
    whole = create(client)
    events = list(create(client, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    names = [e.type for e in events]
    deltas = names.count("response.output_text.delta")
    assert deltas > 3, "the text came in one piece"
    assert names == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * deltas, "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.incomplete"]  # fmt: skip
    assert events[0].response.status == "in_progress" and events[0].response.output == [] and events[0].response.usage is None
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text == events[-4].text == events[-3].part.text == events[-2].item.content[0].text
    assert events[-1].response.output_text == text and events[-1].response.usage.output_tokens == 12
    assert events[-1].response.id == events[0].response.id
    assert len({e.item_id for e in events if hasattr(e, "item_id")}) == 1
    with client.responses.stream(model="small", input=PROMPT, max_output_tokens=12, temperature=0) as stream:
        assert [e for e in stream if e.type == "response.output_text.delta"][-1].snapshot == text


def test_a_text_that_ends_is_complete(client):
    stop = create(client, max_output_tokens=40).output_text.split()[3]
    response = create(client, max_output_tokens=40, extra_body={"stop": [stop]})
    assert response.status == "completed" and response.incomplete_details is None and stop not in response.output_text
    assert list(create(client, max_output_tokens=40, extra_body={"stop": [stop]}, stream=True))[-1].type == "response.completed"
    empty = create(client, extra_body={"stop": [create(client).output_text[:1]]})
    assert empty.output_text == "" and empty.output[0].content[0].text == ""


def test_a_conversation_goes_on(client):
    first = create(client, instructions="Only here.")
    second = create(client, input="And then?", previous_response_id=first.id)
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "And then?"}]
    answer = chat(client, messages)
    assert second.output_text == answer.choices[0].message.content
    assert second.usage.input_tokens == answer.usage.prompt_tokens, "instructions are of their own response only"
    assert second.previous_response_id == first.id
    streamed = list(create(client, input="And then?", previous_response_id=first.id, stream=True))[-1].response
    third = create(client, input="Why?", previous_response_id=streamed.id)
    assert third.usage.input_tokens > second.usage.input_tokens


def test_what_is_not_stored_cannot_be_followed(client):
    kept_not = create(client, store=False)
    assert kept_not.store is False
    for unknown in (kept_not.id, "resp_nothing"):
        with pytest.raises(openai.BadRequestError) as error:
            create(client, previous_response_id=unknown)
        assert error.value.code == "previous_response_not_found" and error.value.param == "previous_response_id"


def test_the_store_is_bounded(server, client):
    """The latest 1,024 are kept."""
    first = create(client, max_output_tokens=1)
    body = json.dumps({"model": "small", "input": "a", "max_output_tokens": 1})
    request = f"POST /v1/responses HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a key\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    ids = []
    for _ in range(8):
        ids += re.findall(rb'"id":"(resp_\w+)"', raw(server, request * 128 + request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1), half_close=False))
    assert len(set(ids)) == len(ids) == 8 * 129
    with pytest.raises(openai.BadRequestError):
        create(client, previous_response_id=first.id)
    create(client, previous_response_id=ids[-1].decode(), max_output_tokens=1)


@pytest.mark.parametrize(
    "body, param",
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": 5}, "input"),
        ({"input": [5]}, "input"),
        ({"input": [{"role": "user"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"instructions": 5}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"store": "yes"}, "store"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"verbosity": "low"}}, "text"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"previous_response_id": 5}, "previous_response_id"),
        ({f"field{i}": 1 for i in range(300)}, None),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server, body, param):
    body = {"model": "small", "input": PROMPT, "max_output_tokens": 2, **body}
    error = server.json("/v1/responses", body, expected=400, headers={"Authorization": "Bearer a key"})["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error"
    error = server.json("/v1/responses", {**body, "stream": True}, expected=400, headers={"Authorization": "Bearer a key"})["error"]
    assert error["param"] == param


def test_the_wire(server):
    """Event names stand in front of their data, and there is no [DONE]."""
    body = json.dumps({"model": "small", "input": PROMPT, "max_output_tokens": 3, "stream": True})
    got = raw(server, f"POST /v1/responses HTTP/1.0\r\nAuthorization: Bearer a key\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode(), half_close=False)
    head, _, text = got.decode().partition("\r\n\r\n")
    assert "200 OK" in head and "text/event-stream" in head
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")


def test_a_stream_that_takes_too_long_fails_by_event():
    server = Server(SMALL, "--request-timeout", "0.3")
    body = {"model": "small", "input": PROMPT, "max_output_tokens": 2000, "stream": True, "ignore_eos": True}
    last = server.call("/v1/responses", body)[1].removesuffix("\n\n").split("\n\n")[-1]
    assert last.startswith("event: response.failed\n")
    assert json.loads(last.split("data: ")[1])["response"]["error"]["code"] == "request_timeout"
    server.wait_until_idle()
    assert server.stop() == 0
