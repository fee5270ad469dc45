"""Reasoning and calls of tools through the openai package, against live servers whose model writes given texts."""

import json

import openai
import pytest
from call_service import (
    ANSWER,
    BROKEN,
    CALL,
    CALLS,
    CITY,
    FORCE,
    MARKERS,
    REASON,
    SAY,
    TOOLS,
    Service,
    check_calls,
    parts_of,
    scripts,
)
from live_server import Server
from scripted_model import letter, write_model


def test_calls_are_found_whole_and_streamed(service):
    assert f"calls of tools: {service.name}" in service.server.log.read_text()
    answer = service.chat(CALL, tools=TOOLS)
    whole = parts_of(answer)
    assert answer.choices[0].finish_reason == "tool_calls" and whole["content"] == "Let me see."
    check_calls(whole["calls"])
    ids = [call.id for call in answer.choices[0].message.tool_calls]
    assert len(set(ids)) == 2 and (service.name != "kimi_k2" or ids == ["functions.get_weather:0", "functions.now:1"])
    streamed, finish, usage = service.streamed(CALL, tools=TOOLS)
    assert streamed == whole and finish == "tool_calls"
    assert usage.completion_tokens == answer.usage.completion_tokens
    assert usage.completion_tokens_details == answer.usage.completion_tokens_details


def test_reasoning_stands_apart(service):
    text = "reason"
    answer = service.chat(REASON, text, tools=TOOLS)
    whole = parts_of(answer)
    assert whole["reasoning"] == "Two words: naïve.\n\nNow <b>decide</b>." and whole["content"] == "Then:"
    assert answer.choices[0].message.reasoning == whole["reasoning"]
    check_calls(whole["calls"])
    tokens = answer.usage.completion_tokens_details.reasoning_tokens
    assert 10 < tokens < answer.usage.completion_tokens
    streamed, finish, usage = service.streamed(REASON, text, tools=TOOLS)
    assert streamed == whole and finish == "tool_calls"
    assert usage.completion_tokens == answer.usage.completion_tokens
    assert usage.completion_tokens_details == answer.usage.completion_tokens_details
    # Cut within the reasoning: there is nothing else.
    cut = service.chat(REASON, text, tools=TOOLS, max_tokens=12)
    assert cut.choices[0].finish_reason == "length" and cut.choices[0].message.content == ""
    assert (
        whole["reasoning"].startswith(parts_of(cut)["reasoning"])
        and 4 < cut.usage.completion_tokens_details.reasoning_tokens <= 12
    )
    # Left where it is, or left out.
    together = parts_of(service.chat(REASON, text, tools=TOOLS, extra_body={"separate_reasoning": False}))
    assert whole["reasoning"] + "\n</think>\n\nThen:" in together["content"] and together["reasoning"] == ""
    without = parts_of(service.chat(REASON, text, tools=TOOLS, extra_body={"include_reasoning": False}))
    assert without == {**whole, "reasoning": ""}


def test_no_event_has_a_half_tag(service):
    """Nor text that is taken back: what has been sent is the beginning of the whole."""
    for chunk in service.chat(REASON, "reason", tools=TOOLS, stream=True):
        for choice in chunk.choices:
            for text in (choice.delta.content, getattr(choice.delta, "reasoning_content", None)):
                assert not text or not any(tag in text for tag in ("think", "<｜", "<|", "tool", "arg_"))


def test_without_tools_text_is_text(service):
    whole = parts_of(service.chat(CALL))
    assert whole["calls"] == [] and "".join(CALLS[service.name][:2]) in whole["content"]
    none = service.chat(CALL, tools=TOOLS, tool_choice="none")
    assert parts_of(none) == whole and none.choices[0].finish_reason == "stop"
    words = service.chat(SAY, tools=TOOLS)
    assert parts_of(words)["content"] == "Just words, 1 < 2." and words.choices[0].finish_reason == "stop"


def test_what_is_no_call_stays_content(service):
    answer = service.chat(BROKEN, tools=TOOLS)
    begin, weather, _, _ = CALLS[service.name]
    assert parts_of(answer)["content"] == "Broken: " + (begin + weather)[: len(begin) + 14]
    assert answer.choices[0].finish_reason == "stop"
    assert service.streamed(BROKEN, tools=TOOLS)[0] == parts_of(answer)


def test_one_call_if_more_are_not_wanted(service):
    answer = service.chat(CALL, tools=TOOLS, parallel_tool_calls=False)
    assert [name for name, _ in parts_of(answer)["calls"]] == ["get_weather"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_can_be_asked_for(service, choice):
    tools = TOOLS[:1] if choice == "required" else TOOLS
    one = {"parallel_tool_calls": False} if choice == "required" else {}  # the script's second is not among the tools
    answer = service.chat(FORCE, "reason", tools=tools, tool_choice=choice, **one)
    whole = parts_of(answer)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert whole["calls"][0][0] == "get_weather" and json.loads(whole["calls"][0][1]) == {"city": CITY, "days": 3}
    if tools is TOOLS:
        assert answer.choices[0].message.content is None and whole["reasoning"] == ""
        check_calls(whole["calls"])
    assert service.streamed(FORCE, "reason", tools=tools, tool_choice=choice, **one)[0] == whole


def test_a_conversation_goes_on_with_what_the_tools_returned(service):
    first = service.chat(CALL, "How is the weather?", tools=TOOLS).choices[0].message
    sent = first.model_dump(exclude_none=True)
    history = [{"role": "user", "content": f"{letter(CALL)} How is the weather?"}, sent]
    results = [{"role": "tool", "tool_call_id": c.id, "content": f"{letter(ANSWER)} 21 °C"} for c in first.tool_calls]
    answer = service.chat(ANSWER, history=[*history, *results], tools=TOOLS)
    if service.name == "deepseek_v3":  # whose prompt goes on behind the outputs
        assert parts_of(answer)["content"] == "It is warm there."
    else:
        assert parts_of(answer)["content"] == "It is warm there." and parts_of(answer)["reasoning"] == ""
    # Each part of the history is in the prompt.
    count = answer.usage.prompt_tokens
    for shorter in ([history[0], {**sent, "tool_calls": sent["tool_calls"][:1]}, results[0]],):
        assert service.chat(ANSWER, history=shorter, tools=TOOLS).usage.prompt_tokens < count
    assert service.chat(ANSWER, history=[*history, *results]).usage.prompt_tokens < count  # the tools' own words


@pytest.mark.parametrize(
    "field, value, param",
    [
        ("tools", [{"type": "web_search"}], "tools"),
        ("tools", [{"type": "function", "function": {"name": "a b"}}], "tools"),
        ("tools", [{"type": "function", "function": {"name": "a", "parameters": 5}}], "tools"),
        ("tools", [{"type": "function", "function": {"name": "a", "strict": 5}}], "strict"),
        ("tool_choice", "always", "tool_choice"),
        ("tool_choice", {"type": "function", "function": {"name": "unknown"}}, "tool_choice"),
    ],
)
def test_bad_tools_are_refused_by_name(service, field, value, param):
    with pytest.raises(openai.BadRequestError) as error:
        service.chat(SAY, **{"tools": TOOLS, field: value})
    assert error.value.param == param and param in str(error.value)


def test_parsers_by_name(tmp_path):
    service = Service(tmp_path, "deepseek_v3", "--reasoning-parser", "none", "--tool-call-parser", "deepseek_v31")
    answer = parts_of(service.chat(CALL, tools=TOOLS))
    assert answer["reasoning"] == "" and answer["content"] == "Short.\n</think>\n\nLet me see."
    assert answer["calls"][0][0] == "function"  # which is where V3.1 has the name
    assert service.server.stop() == 0
    with pytest.raises(AssertionError, match="reasoning parser is"):
        Server(tmp_path, "--reasoning-parser", "unheard_of")
    with pytest.raises(AssertionError, match="tool-call-parser"):
        Server(tmp_path, "--tool-call-parser", "unheard_of")


@pytest.mark.parametrize("name, markers", [("deepseek_v32", []), ("deepseek_v4", ["<｜latest_reminder｜>"])])
def test_formats_that_are_built_in(tmp_path, name, markers):
    texts = [
        text.replace("function_calls", "tool_calls" if name == "deepseek_v4" else "function_calls")
        for text in scripts("deepseek_v32")
    ]
    write_model(tmp_path, texts, None, MARKERS["deepseek"] + markers)
    service = Service.__new__(Service)
    service.start(tmp_path, name)
    assert f"calls of tools: {name}" in service.server.log.read_text()
    first = service.chat(CALL, "How is the weather?", tools=TOOLS).choices[0].message
    check_calls([[c.function.name, c.function.arguments] for c in first.tool_calls])
    results = [{"role": "tool", "tool_call_id": c.id, "content": f"{letter(ANSWER)} 21 °C"} for c in first.tool_calls]
    history = [
        {"role": "user", "content": f"{letter(CALL)} How is the weather?"},
        first.model_dump(exclude_none=True),
        *results,
    ]
    assert parts_of(service.chat(ANSWER, history=history, tools=TOOLS))["content"] == "It is warm there."
    assert service.server.stop() == 0


def test_langchain_binds_tools(service):
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        model="scripted", base_url=f"http://127.0.0.1:{service.server.port}/v1", api_key="none", max_retries=0
    )
    bound = model.bind_tools(TOOLS)
    question = HumanMessage(f"{letter(CALL)} How is the weather?")
    answer = bound.invoke([question])
    expected = [("get_weather", {"city": CITY, "days": 3}), ("now", {})]
    assert [(c["name"], c["args"]) for c in answer.tool_calls] == expected and not answer.invalid_tool_calls
    together = None
    for chunk in bound.stream([question]):
        together = chunk if together is None else together + chunk
    assert [(c["name"], c["args"]) for c in together.tool_calls] == expected
    results = [ToolMessage(f"{letter(ANSWER)} 21 °C", tool_call_id=c["id"]) for c in answer.tool_calls]
    assert bound.invoke([question, answer, *results]).content == "It is warm there."
    forced = model.bind_tools(TOOLS, tool_choice="get_weather").invoke([HumanMessage(f"{letter(FORCE)} reason")])
    assert (forced.tool_calls[0]["name"], forced.tool_calls[0]["args"]) == expected[0]
