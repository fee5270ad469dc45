"""The `openai` package, unchanged, against a live server with the model of the repository."""

import openai
import pytest
from live_server import PATIENCE, ROOT, Server

PROMPT = "And it came to pass"
MESSAGES = [
    {"role": "system", "content": "Write as you were taught."},
    {"role": "user", "content": "The family of Dashwood had long been settled in Sussex."},
]


@pytest.fixture(scope="module")
def server():
    server = Server(ROOT / "models" / "small", "--precision", "fp32", "--batch-invariant", "--api-key", "a key")
    yield server
    server.wait_until_idle()
    assert server.stop() == 0


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="a key", max_retries=0, timeout=PATIENCE) as c:
        yield c


def complete(client, **kw):
    kw = {"model": "small", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **kw}
    return client.completions.create(**kw)


def chat(client, **kw):
    kw = {"model": "small", "messages": MESSAGES, "max_tokens": 12, "temperature": 0, **kw}
    return client.chat.completions.create(**kw)


def test_models(client):
    assert [m.id for m in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "flash_mla"


def test_completion(client):
    answer = complete(client)
    assert answer.object == "text_completion" and answer.model == "small"
    assert answer.choices[0].finish_reason == "length" and len(answer.choices[0].text) > 12
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert complete(client).choices[0].text == answer.choices[0].text


def test_chat(client):
    answer = chat(client)
    assert answer.object == "chat.completion"
    message = answer.choices[0].message
    assert message.role == "assistant" and message.content
    assert answer.usage.completion_tokens == 12
    # The system message counts.
    assert chat(client, messages=MESSAGES[1:]).usage.prompt_tokens < answer.usage.prompt_tokens


def test_streaming_gives_the_same_text_and_the_usage(client):
    whole = complete(client)
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert len(chunks) > 4, "the text came in one piece"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert all(c.usage is None for c in chunks[:-1])

    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    deltas = [c.choices[0].delta for c in chunks[:-1]]
    assert deltas[0].role == "assistant" and all(d.role is None for d in deltas[1:])
    assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    assert all(c.usage is None for c in chat(client, stream=True))


def test_stop(client):
    text = complete(client, max_tokens=40).choices[0].text
    words = text.split()
    answer = complete(client, max_tokens=40, stop=[words[4], "no such text"])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == text[: text.index(words[4])]
    streamed = "".join(c.choices[0].text for c in complete(client, max_tokens=40, stop=words[4], stream=True))
    assert streamed == answer.choices[0].text


def test_seed(client):
    def texts(seed):
        return [c.text for c in complete(client, temperature=1, seed=seed, n=3).choices]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert len(set(texts(1))) == 3


def test_n(client):
    answer = chat(client, n=3, temperature=1, seed=5)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens <= 36
    streamed = [""] * 3
    for chunk in chat(client, n=3, temperature=1, seed=5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == [c.message.content for c in answer.choices]


def test_logprobs(client):
    answer = complete(client, logprobs=3, max_tokens=5).choices[0]
    logprobs = answer.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 5
    assert "".join(logprobs.tokens) == answer.text
    for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
        assert value <= 0 and len(top) == 3
        assert top[token] == max(top.values()) == pytest.approx(value, abs=1e-5)

    answer = chat(client, logprobs=True, top_logprobs=2, max_tokens=5).choices[0]
    assert len(answer.logprobs.content) == 5
    for token in answer.logprobs.content:
        assert bytes(token.bytes).decode() == token.token
        assert [t.token for t in token.top_logprobs][0] == token.token and len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-5)
    assert chat(client).choices[0].logprobs is None


def test_cached_tokens_are_reported(client):
    prompt = "In the beginning of a long story, " * 20
    assert complete(client, prompt=prompt, max_tokens=1).usage.prompt_tokens_details.cached_tokens == 0
    assert complete(client, prompt=prompt, max_tokens=1).usage.prompt_tokens_details.cached_tokens >= 64


def test_a_stream_that_is_closed_is_cancelled(server, client):
    with complete(client, stream=True, max_tokens=1500, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
    server.wait_until_idle()


def test_errors_are_the_clients_own(server, client):
    with pytest.raises(openai.NotFoundError) as error:
        complete(client, model="gpt")
    assert error.value.code == "model_not_found" and error.value.param == "model"
    assert error.value.request_id
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        complete(openai.OpenAI(base_url=client.base_url, api_key="another", max_retries=0))


def test_asynchronous_client(server):
    import asyncio

    async def main():
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="a key") as client:
            return await asyncio.gather(*(complete(client, prompt=f"{PROMPT} {i}") for i in range(8)))

    together = asyncio.run(main())
    assert all(a.usage.completion_tokens <= 12 and a.choices[0].text for a in together)
