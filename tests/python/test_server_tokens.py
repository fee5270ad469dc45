"""Fields that name tokens or look at a prompt's: logit_bias, allowed_token_ids, min_tokens, bad_words, echo, prompt_logprobs,
best_of, suffix, and messages that go on."""

import json
import shutil

import pytest
from live_server import ROOT, Server

SMALL = ROOT / "models" / "small"
PROMPT = "And it came to pass"


@pytest.fixture(scope="module")
def server():
    server = Server(SMALL, "--precision", "fp32", "--batch-invariant")
    yield server
    server.wait_until_idle()
    assert server.stop() == 0


def body(**kw):
    return {"model": "small", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **kw}


def complete(server, **kw):
    return server.json("/v1/completions", body(**kw))["choices"]


def ids_of(server, text):
    return server.json("/v1/tokenize", {"prompt": text})["tokens"]


def generated(server, **kw):
    """Text and token ids of an answer, by the tokens that its log-probabilities name."""
    choice = complete(server, logprobs=0, ignore_eos=True, **kw)[0]
    return choice["text"], choice["logprobs"]["tokens"]


def test_logit_bias(server):
    text, tokens = generated(server)
    first = ids_of(server, PROMPT + text)[len(ids_of(server, PROMPT))]
    assert generated(server, logit_bias={first: -100})[1][0] != tokens[0]
    comma = ids_of(server, ",")[-1]
    assert set(generated(server, logit_bias={comma: 100})[1]) == {","}
    assert set(generated(server, logit_bias={str(comma): 100}, temperature=1, top_p=0.9)[1]) == {","}
    for bias, message in (
        ({"a": 1}, "token ids"),
        ({"5": 101}, "-100 to 100"),
        ({"5": "x"}, "numbers"),
        ({"4096": 1}, "4095"),
        ([5], "object"),
    ):
        error = server.json("/v1/completions", body(logit_bias=bias), expected=400)["error"]
        assert "logit_bias" in error["message"] and message in error["message"]


def test_allowed_token_ids(server):
    allowed = ids_of(server, "a b c")[1:]
    text, tokens = generated(server, allowed_token_ids=allowed, temperature=1.5, max_tokens=40)
    assert set(tokens) <= {"a", " b", " c"} and len(set(tokens)) > 1
    # Nothing but the end is allowed: it comes at once.
    assert complete(server, allowed_token_ids=[1])[0] == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert (
        "allowed_token_ids"
        in server.json("/v1/completions", body(allowed_token_ids=[]), expected=400)["error"]["message"]
    )


def test_min_tokens(server):
    text, tokens = generated(server)
    at = next(i for i in range(2, 8) if not any(tokens[i] in t for t in tokens[:i]))  # new there
    stop = ids_of(server, PROMPT + text)[len(ids_of(server, PROMPT)) + at]
    short = complete(server, stop_token_ids=[stop], logprobs=0)[0]
    assert short["finish_reason"] == "stop" and short["logprobs"]["tokens"] == tokens[: at + 1]
    later = complete(server, stop_token_ids=[stop], min_tokens=8, logprobs=0)[0]["logprobs"]["tokens"]
    assert len(later) >= 8 and tokens[at] not in later[:8]
    # A stop string before that many is text.
    word = tokens[at]
    assert complete(server, stop=word)[0]["text"] == "".join(tokens[:at])
    assert complete(server, stop=word, min_tokens=at + 2)[0]["text"].startswith("".join(tokens[: at + 1]))
    assert complete(server, stop_token_ids=[stop], min_tokens=12)[0]["finish_reason"] == "length"
    assert "min_tokens is 13" in server.json("/v1/completions", body(min_tokens=13), expected=400)["error"]["message"]


def test_bad_words(server):
    text, tokens = generated(server, max_tokens=60)
    words = sorted({w for w in text.split() if w.isalpha()}, key=text.find)[:3]
    # As the tokenizer spells them, alone or behind a space: that such a word is spelled otherwise is possible.
    for word in words:
        spelled = [tuple(ids_of(server, w)[1:]) for w in (word, " " + word)]
        out = ids_of(server, generated(server, max_tokens=60, bad_words=[word])[0])
        assert not any(tuple(out[i : i + len(s)]) == s for s in spelled for i in range(len(out)))
    first = ids_of(server, PROMPT + text)[len(ids_of(server, PROMPT)) :][:2]
    _, other = generated(server, bad_words_ids=[first])
    assert other[0] == tokens[0] and other[1] != tokens[1]  # the run is broken at its end
    assert "bad_words" in server.json("/v1/completions", body(bad_words=[""]), expected=400)["error"]["message"]


def test_echo(server):
    (plain,) = complete(server)
    (echo,) = complete(server, echo=True)
    assert echo["text"] == PROMPT + plain["text"] and echo["logprobs"] is None
    assert complete(server, echo=True, max_tokens=0)[0]["text"] == PROMPT
    texts = [c["text"] for c in complete(server, prompt=["And", [0, 5, 6]], n=2, echo=True, max_tokens=1)]
    assert len(texts) == 4 and all(t.startswith("And") for t in texts[:2])
    _, stream, _ = server.call("/v1/completions", body(echo=True, stream=True, logprobs=1))
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    assert "".join(c["choices"][0]["text"] for c in chunks) == echo["text"]
    assert sum(len(c["choices"][0]["logprobs"]["tokens"]) for c in chunks) == len(ids_of(server, PROMPT)) + 12
    assert server.json("/v1/completions", body(max_tokens=0), expected=400)["error"]["param"] == "max_tokens"
    chat = {"model": "small", "messages": [{"role": "user", "content": "a"}], "echo": True}
    assert server.json("/v1/chat/completions", chat, expected=400)["error"]["param"] == "echo"


def test_logprobs_of_the_prompt_are_the_models(server):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    oracle = transformers.DeepseekV3ForCausalLM.from_pretrained(
        SMALL, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    # Longer than a page, and than kMaxScoredTokens, so that it is scored in pieces.
    ids = ids_of(server, "CHAPTER I\n\nEmma was handsome, clever and rich. " * 25)
    assert len(ids) > 300
    with torch.no_grad():
        expected = torch.log_softmax(oracle(torch.tensor([ids])).logits[0].float(), -1)
    of_prompt = expected[range(len(ids) - 1), ids[1:]].tolist()

    def check_close(values, wanted):
        """Where two experts are nearly as good, the last bit of a score says which one a token takes, and torch's differs
        with where its memory lies: what a text's tokens get of that is more than rounding."""
        errors = [abs(a - b) for a, b in zip(values, wanted, strict=True)]
        assert max(errors) < 2e-2 and sum(errors) / len(errors) < 3e-4

    rounds = []
    for _ in range(2):  # the second time from pages that the cache has
        for max_tokens in (0, 1):
            (choice,) = complete(server, prompt=ids, echo=True, logprobs=2, max_tokens=max_tokens)
            values = choice["logprobs"]["token_logprobs"]
            assert values[0] is None and choice["logprobs"]["top_logprobs"][0] is None
            assert len(values) == len(ids) + max_tokens == len(choice["logprobs"]["text_offset"])
            rounds.append(values[1 : len(ids)])
            check_close(rounds[-1], of_prompt)
            check_close(
                [max(top.values()) for top in choice["logprobs"]["top_logprobs"][1 : len(ids)]],
                expected[:-1].max(-1).values.tolist(),
            )
        (choice,) = complete(server, prompt=ids, prompt_logprobs=1)
        assert choice["logprobs"] is None and choice["prompt_logprobs"][0] is None
        chosen = [one[str(token)] for one, token in zip(choice["prompt_logprobs"][1:], ids[1:], strict=True)]
        rounds.append([one["logprob"] for one in chosen])
        ranks = [1 + int((row > value).sum()) for row, value in zip(expected, of_prompt)]
        near = [abs(one["rank"] - rank) <= 1 for one, rank in zip(chosen, ranks, strict=True)]  # nearly equals
        assert sum(near) > 0.98 * len(near)
    assert all(values == rounds[0] for values in rounds), "the engine's own are the same to the bit"
    chat = {"model": "small", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "prompt_logprobs": 0}
    assert len(server.json("/v1/chat/completions", chat)["prompt_logprobs"]) == 4
    assert server.json("/v1/completions", body(prompt_logprobs=-1), expected=400)["error"]["param"] == "prompt_logprobs"


def test_many_prompts_at_once_are_scored_as_alone(server):
    prompts = [[0] + [(7 * i + k) % 4000 + 5 for k in range(90 + i)] for i in range(8)]
    alone = [
        complete(server, prompt=p, echo=True, logprobs=0, max_tokens=0)[0]["logprobs"]["token_logprobs"]
        for p in prompts
    ]
    together = complete(server, prompt=prompts, echo=True, logprobs=0, max_tokens=0)
    assert [c["logprobs"]["token_logprobs"] for c in together] == alone


def test_best_of(server):
    sampled = dict(temperature=1, seed=5, ignore_eos=True, logprobs=0)
    every = complete(server, n=5, **sampled)
    mean = [sum(c["logprobs"]["token_logprobs"]) / 12 for c in every]
    order = sorted(range(5), key=lambda i: -mean[i])
    best = complete(server, n=2, best_of=5, **sampled)
    assert [c["text"] for c in best] == [every[i]["text"] for i in order[:2]] and [c["index"] for c in best] == [0, 1]
    del sampled["logprobs"]
    (one,) = complete(server, best_of=5, **sampled)
    assert one["text"] == best[0]["text"] and one["logprobs"] is None
    for wrong in {"n": 3, "best_of": 2}, {"best_of": 2, "stream": True}, {"best_of": 1000}:
        server.json("/v1/completions", body(**wrong), expected=400)


def test_a_message_goes_on(server):
    messages = [{"role": "user", "content": "The family of Dashwood"}, {"role": "assistant", "content": "had long "}]
    chat = {"model": "small", "messages": messages, "max_tokens": 12, "temperature": 0}
    rendered = [0, 4094, *ids_of(server, "The family of Dashwood")[1:], 4095, *ids_of(server, "had long ")[1:]]
    (expected,) = complete(server, prompt=rendered)

    def answer(**kw):
        reply = server.json("/v1/chat/completions", {**chat, **kw})
        assert reply["usage"]["prompt_tokens"] == len(rendered)
        return reply["choices"][0]["message"]["content"]

    assert answer(continue_final_message=True) == expected["text"]
    assert answer(continue_final_message=True, add_generation_prompt=False) == expected["text"]
    assert answer(messages=[messages[0], {**messages[1], "prefix": True}]) == expected["text"]  # DeepSeek's name of it
    closed = server.json("/v1/chat/completions", {**chat, "add_generation_prompt": False})
    assert closed["usage"]["prompt_tokens"] == len(rendered) + 1  # the end of the message
    for wrong in (
        {"continue_final_message": True, "add_generation_prompt": True},
        {"continue_final_message": True, "messages": messages[:1]},
    ):
        assert (
            server.json("/v1/chat/completions", {**chat, **wrong}, expected=400)["error"]["param"]
            == "continue_final_message"
        )
    assert (
        server.json("/v1/completions", body(continue_final_message=True), expected=400)["error"]["param"]
        == "continue_final_message"
    )


def test_suffix(server, tmp_path):
    error = server.json("/v1/completions", body(suffix="the end"), expected=400)["error"]
    assert "suffix" in error["message"] and "fill in the middle" in error["message"] and error["param"] == "suffix"
    # The small model with DeepSeek's tokens to fill in the middle in place of others.
    shutil.copytree(SMALL, tmp_path / "small")
    names = {"<｜▁pad▁｜>": "<｜fim▁begin｜>", "<｜User｜>": "<｜fim▁hole｜>", "<｜Assistant｜>": "<｜fim▁end｜>"}
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / "small" / file).read_text()
        for old, new in names.items():
            text = text.replace(old, new)
        (tmp_path / "small" / file).write_text(text)
    filling = Server(tmp_path / "small", "--precision", "fp32", "--batch-invariant")
    prompt = [0, 2, *ids_of(server, "def f(")[1:], 4094, *ids_of(server, "<｜fim▁end｜>")[1:], 4095]
    expected = complete(server, prompt=prompt, ignore_eos=True)
    answer = filling.json("/v1/completions", body(prompt="def f(", suffix="<｜fim▁end｜>", ignore_eos=True))
    assert answer["usage"]["prompt_tokens"] == len(prompt) and answer["choices"] == expected
    assert filling.stop() == 0
