"""Formats beside reasoning and calls of tools: calls that have to come or are strict are of their schemas, whatever the model
would rather write, and a format of the words begins where its reasoning ends."""

import json

import jsonschema
import openai
import pytest
from call_service import CALL, CALLS, CITY, GLM47, MARKERS, SAY, TOOLS, V31, Service, check_calls, parts_of, scripts
from live_server import Server, wait_for
from scripted_model import letter, write_model

STRICT = [
    {"type": "function", "function": {
        "name": "get_weather", "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Bonn", "Ulm"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "note": {"type": ["null", "boolean"]}, "code": {"type": "string", "minLength": 2, "maxLength": 4}},
            "required": ["city", "days", "code"], "additionalProperties": False}}},
    {"type": "function", "function": {
        "name": "now", "strict": True, "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}},
]  # fmt: skip
BY_NAME = {tool["function"]["name"]: tool["function"]["parameters"] for tool in STRICT}


def check_valid(answer):
    """How many calls of an answer that is whole; all are of their schemas."""
    if answer.choices[0].finish_reason != "tool_calls":
        assert answer.choices[0].finish_reason == "length"
        return 0
    calls = parts_of(answer)["calls"]
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), BY_NAME[name])
    return len(calls)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["any", "named"]
)
def test_a_call_that_has_to_come_is_of_its_schema(service, choice):
    """The script is not among what may come, so that every token is drawn: a random walk through the format."""
    names = set()
    for seed in range(6):
        answer = service.chat(
            SAY, tools=STRICT, tool_choice=choice, seed=seed, temperature=1, max_tokens=600, parallel_tool_calls=False
        )
        assert check_valid(answer) == 1 and parts_of(answer)["content"] == ""
        names.add(parts_of(answer)["calls"][0][0])
    assert names == ({"get_weather", "now"} if choice == "required" else {"get_weather"})


def test_several_calls_that_have_to_come(service):
    assert sum(
        check_valid(service.chat(SAY, tools=STRICT, tool_choice="required", seed=s, temperature=1, max_tokens=900))
        for s in range(4)
    )


def test_strict_calls_come_up_in_free_text(service):
    # What is of the schema already is left as it is, and words are.
    loose = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    answer = service.chat(CALL, tools=loose)
    assert parts_of(answer)["content"] == "Let me see." and answer.choices[0].finish_reason == "tool_calls"
    check_calls(parts_of(answer)["calls"])
    assert service.streamed(CALL, tools=loose)[0] == parts_of(answer)
    assert parts_of(service.chat(SAY, tools=STRICT))["content"] == "Just words, 1 < 2."
    # The script's city is none of those that there are.
    answer = service.chat(CALL, tools=STRICT, temperature=1, seed=1, max_tokens=900)
    parts = parts_of(answer)
    assert parts["content"].startswith("Let me see.") and parts["calls"][0][0] == "get_weather"
    assert CITY not in json.dumps(parts["calls"], ensure_ascii=False)
    check_valid(answer)


def test_generation_ends_behind_the_one_call(service):
    whole = service.chat(CALL, tools=TOOLS)
    one = service.chat(CALL, tools=TOOLS, parallel_tool_calls=False)
    assert [name for name, _ in parts_of(one)["calls"]] == ["get_weather"]
    assert one.choices[0].finish_reason == "tool_calls"
    assert one.usage.completion_tokens < whole.usage.completion_tokens - 4
    streamed, finish, usage = service.streamed(CALL, tools=TOOLS, parallel_tool_calls=False)
    assert streamed == parts_of(one) and finish == "tool_calls"
    assert usage.completion_tokens == one.usage.completion_tokens
    both = service.chat(CALL, tools=TOOLS, parallel_tool_calls=False, n=2)
    assert [len(c.message.tool_calls) for c in both.choices] == [1, 1]
    service.server.wait_until_idle()


def test_each_choice_ends_behind_its_one_call(tmp_path):
    """A choice that has its call is cancelled while another goes on: neither would ever come to an end."""
    words = "Words, and more of them; "
    calls = "".join(CALLS["deepseek_v31"])
    write_model(tmp_path, [calls, words], V31, MARKERS["deepseek"], endless=(0, 1), either=[(0, 1)])
    service = Service.__new__(Service)
    service.start(tmp_path, "deepseek_v31")
    cancelled = 'mla_continuations_finished_total{reason="cancelled"}'
    fields = {"parallel_tool_calls": False, "n": 8, "seed": 1, "temperature": 1, "max_tokens": 7000}
    stream = service.chat(0, tools=TOOLS, stream=True, **fields)
    texts, ended = [""] * 8, {}
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ended[choice.index] = choice.finish_reason
        if all(words in text for i, text in enumerate(texts) if i not in ended):
            break
    assert 0 < len(ended) < 8 and set(ended.values()) == {"tool_calls"}
    wait_for(lambda: service.server.metric(cancelled) == len(ended), "a choice that has its call goes on")
    wait_for(lambda: service.server.metric("mla_sequences_running") == 8 - len(ended), "the others ended as well")
    stream.close()
    service.server.wait_until_idle()
    assert service.server.metric(cancelled) == 8
    assert service.server.stop() == 0


def test_words_of_a_format_or_calls(service):
    schema = {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}
    fields = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    called = words = 0
    for seed in range(8):
        answer = service.chat(SAY, tools=STRICT, response_format=fields, temperature=1, seed=seed, max_tokens=600)
        parts = parts_of(answer)
        if answer.choices[0].finish_reason == "stop":
            jsonschema.validate(json.loads(parts["content"]), schema)
            words += 1
        else:
            called += check_valid(answer)
    assert words + called > 0


@pytest.mark.parametrize(
    "parameters, named",
    [
        ({"type": "object", "properties": {"a": {"not": {}}}}, "properties.a.not"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)"}}}, "ookahead"),
    ],
)
def test_what_a_strict_schema_cannot_have_is_refused_by_name(service, parameters, named):
    tools = [TOOLS[1], {"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}]
    with pytest.raises(openai.BadRequestError) as error:
        service.chat(SAY, tools=tools)
    assert error.value.param == "tools" and "tools[1].function.parameters" in str(error.value)
    assert named in str(error.value)
    tools[1]["function"]["strict"] = False
    assert parts_of(service.chat(SAY, tools=tools))["content"] == "Just words, 1 < 2."
    with pytest.raises(openai.BadRequestError) as error:
        service.chat(SAY, tools=STRICT, stop=["x"])
    assert error.value.param == "stop"


PLACE = {"type": "object", "properties": {"city": {"enum": ["Bonn", "Ulm"]}}, "required": ["city"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}
REASONING = 'Bonn {"city": 5} or "Ulm"?'


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The prompt opens the reasoning."""
    directory = tmp_path_factory.mktemp("opened")
    texts = [
        f'{REASONING}\n</think>\n\n{{"city": "Ulm"}}',
        f"{REASONING}\n</think>\n\nI say Rome.",
        "Never ends.",
    ]
    write_model(directory, texts, V31, MARKERS["deepseek"], spoken=["</think>"])
    service = Service.__new__(Service)
    service.start(directory, "deepseek_v31")
    yield service
    assert service.server.stop() == 0


def test_a_format_begins_behind_the_reasoning(opened):
    answer = opened.chat(0, "reason", response_format=FORMAT)
    assert parts_of(answer) == {"content": '{"city": "Ulm"}', "reasoning": REASONING, "calls": []}
    assert answer.choices[0].finish_reason == "stop"
    streamed, finish, _ = opened.streamed(0, "reason", response_format=FORMAT)
    assert streamed == parts_of(answer) and finish == "stop"
    # What is no such text is none behind it either.
    for seed in range(3):
        answer = opened.chat(1, "reason", response_format=FORMAT, seed=seed, temperature=1, max_tokens=300)
        assert parts_of(answer)["reasoning"] == REASONING
        if answer.choices[0].finish_reason == "stop":
            jsonschema.validate(json.loads(parts_of(answer)["content"]), PLACE)
    # A text that would end within its reasoning does not.
    answer = opened.chat(2, "reason", response_format=FORMAT, max_tokens=60)
    assert parts_of(answer)["reasoning"].startswith("Never ends.") and answer.choices[0].finish_reason == "length"


def test_formats_begin_at_once_where_nothing_is_opened(opened):
    answer = opened.chat(1, "no thought", response_format=FORMAT, temperature=1, seed=1, max_tokens=200)
    assert parts_of(answer)["reasoning"] == "" and parts_of(answer)["content"].lstrip().startswith("{")


def test_a_model_may_open_its_reasoning_or_not(tmp_path):
    texts = [f'<think>{REASONING}</think>{{"city": "Ulm"}}', '{"city": "Bonn"}']
    write_model(tmp_path, texts, GLM47, MARKERS["glm"], spoken=["<think>", "</think>"])
    service = Service.__new__(Service)
    service.start(tmp_path, "glm47")
    answer = service.chat(0, response_format=FORMAT)
    assert parts_of(answer) == {"content": '{"city": "Ulm"}', "reasoning": REASONING, "calls": []}
    answer = service.chat(1, response_format=FORMAT)
    assert parts_of(answer) == {"content": '{"city": "Bonn"}', "reasoning": "", "calls": []}
    assert service.server.stop() == 0


@pytest.mark.parametrize("name", ["thinking", "enable_thinking"])
def test_thinking_is_switched_by_the_name_that_the_template_has(tmp_path, name):
    template = V31.replace("'reason' in messages[-1].content", name)
    write_model(tmp_path, ["Well.\n</think>\n\nYes."], template, MARKERS["deepseek"])
    service = Service.__new__(Service)
    service.start(tmp_path, "deepseek_v31")
    for on in ({"thinking": {"type": "enabled"}}, {"enable_thinking": True}, {"chat_template_kwargs": {name: True}}):
        parts = parts_of(service.chat(0, extra_body=on))
        assert parts["reasoning"] == "Well." and parts["content"] == "Yes.", on
    for off in ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}, {}):
        assert parts_of(service.chat(0, extra_body=off))["reasoning"] == "", off
    for wrong, param in [
        ({"thinking": {"type": "maybe"}}, "thinking"), ({"thinking": True}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking"), ({"enable_thinking": "yes"}, "enable_thinking"),
        ({"thinking": {"type": "enabled"}, "enable_thinking": False}, "enable_thinking"),
        ({"enable_thinking": True, "chat_template_kwargs": {name: False}}, "enable_thinking"),
    ]:  # fmt: skip
        with pytest.raises(openai.BadRequestError) as error:
            service.chat(0, extra_body=wrong)
        assert error.value.param == param, wrong
    assert service.server.stop() == 0


def test_thinking_without_a_switch_is_refused_by_name(opened):
    for field in ({"thinking": {"type": "enabled"}}, {"enable_thinking": False}, {"thinking": {"type": "disabled"}}):
        with pytest.raises(openai.BadRequestError) as error:
            opened.chat(0, extra_body=field)
        assert error.value.param == next(iter(field)) and "no switch" in str(error.value)


def test_tools_that_the_template_cannot_list_are_an_error_of_tools(tmp_path):
    plain = "{{ bos_token }}{% for m in messages %}{{ '<｜User｜>' + m.content }}{% endfor %}{{ '<｜Assistant｜>' }}"
    write_model(tmp_path, scripts("glm47")[:1], plain, MARKERS["glm"] + ["<｜User｜>", "<｜Assistant｜>"])
    server = Server(tmp_path, "--model-name", "scripted", "--tool-call-parser", "glm47")
    body = {"model": "scripted", "messages": [{"role": "user", "content": letter(0)}], "tools": TOOLS}
    error = server.json("/v1/chat/completions", body, expected=400)["error"]
    assert error["param"] == "tools" and error["message"].startswith("tools")
    assert server.stop() == 0
