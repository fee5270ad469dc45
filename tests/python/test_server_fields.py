"""Fields of a body: obeyed, refused by name, or let through with a warning; never ignored in silence."""

import json

import pytest
from live_server import ROOT, Server, cpu_seconds


@pytest.fixture(scope="module")
def server():
    server = Server(ROOT / "models" / "small", "--precision", "fp32", "--batch-invariant")
    yield server
    server.wait_until_idle()
    assert server.stop() == 0


def completion(**kw):
    return {
        "model": "small",
        "prompt": "And it came to pass",
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        **kw,
    }


def chat(*messages, **kw):
    messages = messages or ({"role": "user", "content": "The family of Dashwood"},)
    return {"model": "small", "messages": list(messages), "max_tokens": 8, "temperature": 0, "ignore_eos": True, **kw}


REFUSED = {
    "guided_decoding_backend": "outlines",
    "thinking": {"type": "enabled"}, "reasoning_effort": "high",
    "prefix": True, "tools": [{"type": "function"}],
    "tool_choice": "required", "functions": [{"name": "f"}],
    "chat_template": "{{ 1 }}",
    "use_beam_search": True, "length_penalty": 2.0, "truncate_prompt_tokens": 3, "skip_special_tokens": False,
    "typical_p": 0.5, "mirostat": 2, "repeat_penalty": 1.3, "stop_sequences": ["a"], "cache_salt": "a",
    "return_token_ids": True, "modalities": ["text", "audio"], "prediction": {"type": "content"}, "verbosity": "low",
    "stop_regex": "a", "lora_path": "a", "enable_thinking": False,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_answer_is_refused_by_name(server, name):
    for path, body in (("/v1/completions", completion), ("/v1/chat/completions", chat)):
        error = server.json(path, body(**{name: REFUSED[name]}), expected=400)["error"]
        assert error["param"] == name and name in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("name, value", [("prefix", True), ("function_call", {"name": "f"})])
def test_messages_too(server, name, value):
    user = {"role": "user", "content": "a"}
    messages = [user, {"role": "assistant", "content": None, name: value}, user]
    error = server.json("/v1/chat/completions", chat(*messages), expected=400)["error"]
    assert error["param"] == f"messages[1].{name}" and f"messages[1].{name}" in error["message"]


def test_tools_are_refused_where_the_template_knows_none(server):
    tool = {"type": "function", "function": {"name": "f"}}
    error = server.json("/v1/chat/completions", chat(tools=[tool]), expected=400)["error"]
    assert error["param"] == "tools" and "chat template" in error["message"]
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    history = ({"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]})
    for messages in (history, (*history[:1], {"role": "tool", "tool_call_id": "a", "content": "b"})):
        error = server.json("/v1/chat/completions", chat(*messages), expected=400)["error"]
        assert error["param"] == "messages" and "messages[1]" in error["message"]


def test_values_that_ask_for_nothing_pass(server):
    plain = server.json("/v1/completions", completion())["choices"]
    nothing = {"tools": None, "logit_bias": {}, "min_tokens": 0, "bad_words": [], "echo": False, "suffix": "", "best_of": 1,
               "guided_json": None, "prompt_logprobs": None, "response_format": {"type": "text"}, "length_penalty": 1.0,
               "use_beam_search": False, "skip_special_tokens": True, "tool_choice": "none", "grammar": "", "typical_p": 1,
               "continue_final_message": False, "thinking": None, "user": "me", "metadata": {"a": 1}, "store": False}  # fmt: skip
    assert server.json("/v1/completions", completion(**nothing))["choices"] == plain
    # As the openai package sends back an answer that it got.
    got = {
        "role": "assistant",
        "content": "a",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    user = {"role": "user", "content": "a"}
    server.json(
        "/v1/chat/completions",
        chat(user, got, user, parallel_tool_calls=True, modalities=["text"], service_tier="auto"),
    )


def test_a_stop_string_is_included_if_asked_for(server):
    whole = server.json("/v1/completions", completion(max_tokens=24))["choices"][0]["text"]
    stop = whole[8:12]
    without = server.json("/v1/completions", completion(max_tokens=24, stop=stop))["choices"][0]["text"]
    included = server.json("/v1/completions", completion(max_tokens=24, stop=stop, include_stop_str_in_output=True))
    assert included["choices"][0]["text"] == without + stop and whole.startswith(without + stop)


def warnings(server):
    whole = server.log.read_text().rpartition("\n")[0].splitlines()
    lines = [json.loads(x) for x in whole if x.startswith("{")]
    return [x["field"] for x in lines if x.get("level") == "warning"]


def test_unknown_fields_are_warned_of_once():
    server = Server(ROOT / "models" / "small")
    for _ in range(3):
        server.json("/v1/completions", completion(frobnicate=1, user="me"))
        server.json("/v1/chat/completions", chat(frobnicate=2, **{"two\nlines \u00e4": 3}))
    assert sorted(warnings(server)) == ["frobnicate", "two\nlines \u00e4"]
    # A log that strangers cannot fill.
    for i in range(40):
        server.json("/v1/completions", completion(max_tokens=1, **{f"{i}_{k}" + "x" * 500: 1 for k in range(40)}))
    assert 100 < len(warnings(server)) <= 256 and max(map(len, warnings(server))) <= 64
    assert server.stop() == 0


def test_the_number_of_messages_is_bounded(server):
    """100,000 messages are refused in under a second of the processor's time, and said why."""
    many = json.dumps(chat(*[{"role": "user", "content": ""}] * 100_000))
    begin = cpu_seconds(server)
    error = server.json("/v1/chat/completions", many, expected=400)["error"]
    assert cpu_seconds(server) - begin < 1
    assert error["param"] == "messages" and "100000" in error["message"]


TEMPLATE = """{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}
{%- if thinking %} think{% endif %}{% for key in order or {} %} {{ key }}{% endfor %}"""


def test_variables_of_the_chat_template(tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text(TEMPLATE)
    server = Server(ROOT / "models" / "small", "--precision", "fp32", "--chat-template", str(template))
    try:
        user = {"role": "user", "content": "The family"}

        def tokens(**kw):
            return server.json("/v1/chat/completions", chat(user, **kw))["usage"]["prompt_tokens"]

        def expected(text):
            return len(server.json("/v1/tokenize", {"prompt": text})["tokens"])

        assert (
            tokens() == tokens(chat_template_kwargs=None) == tokens(chat_template_kwargs={}) == expected("The family")
        )
        assert tokens(chat_template_kwargs={"thinking": True}) == expected("The family think")
        # Keys come in the client's order, however they and their neighbours are spelled; of equal ones the last counts.
        body = json.dumps(chat(user, chat_template_kwargs={"order": {"zebra": '\\"}', "apple": [{}]}}))
        head, tail = (
            body[:1] + ' "chat_template_kwargs" : 3, "a\\"b": "{", ',
            body[1:].replace("chat_template_kwargs", "chat_template\\u005fkwargs"),
        )
        answer = server.json("/v1/chat/completions", head + tail)
        assert answer["usage"]["prompt_tokens"] == expected("The family zebra apple")
        for variables, what in [
            (
                {"enable_thinking": True},
                "chat_template_kwargs.enable_thinking: the model's chat template reads no such variable",
            ),
            ({"messages": []}, "chat_template_kwargs.messages"),
            ([1], "chat_template_kwargs is array, expected an object"),
            ({"thinking": "x" * 70_000}, "chat_template_kwargs has"),
        ]:
            error = server.json("/v1/chat/completions", chat(user, chat_template_kwargs=variables), expected=400)[
                "error"
            ]
            assert error["param"] == "chat_template_kwargs" and what in error["message"]
        assert tokens(chat_template_kwargs={"enable_thinking": False, "other": None}) == expected("The family")
        error = server.json("/v1/completions", completion(chat_template_kwargs={"thinking": True}), expected=400)[
            "error"
        ]
        assert error["param"] == "chat_template_kwargs"
    finally:
        assert server.stop() == 0


def with_generation_config(directory, config):
    """models/small with another generation_config.json."""
    for path in (ROOT / "models" / "small").iterdir():
        if path.name != "generation_config.json":
            (directory / path.name).symlink_to(path)
    (directory / "generation_config.json").write_text(json.dumps(config))
    return directory


def test_the_models_own_sampling_where_a_request_names_none(tmp_path):
    directory = with_generation_config(tmp_path, {"temperature": 0.0, "top_p": 0.9})
    texts = {}
    for how in ("auto", "none"):
        server = Server(directory, "--precision", "fp32", "--batch-invariant", "--generation-config", how)
        try:
            model = server.json("/v1/models")["data"][0]["id"]
            body = {"model": model, "prompt": "And it came to pass", "max_tokens": 24, "seed": 3}
            answers = [
                server.json("/v1/completions", body | sampling)
                for sampling in ({}, {"temperature": 0}, {"temperature": 1, "top_p": 1})
            ]
            texts[how] = [answer["choices"][0]["text"] for answer in answers]
        finally:
            assert server.stop() == 0
    greedy, sampled = texts["auto"][1:]
    assert greedy != sampled
    assert texts["auto"] == [greedy, greedy, sampled]
    assert texts["none"] == [sampled, greedy, sampled]
