"""Reasoning and calls of tools through the openai package, against live servers whose model writes given texts."""

import json

import openai
import pytest
from live_server import Server
from scripted_model import letter, write_model
from tokenizer_files import ASSISTANT, USER

# In the style of V3.1: a switch for thinking, arguments as JSON text, tools left to the system message.
V31 = """
{%- set ns = namespace(system='', user=false) -%}
{%- for m in messages if m.role == 'system' -%}{%- set ns.system = ns.system + m.content -%}{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}{%- set ns.user = true -%}{{ '<｜User｜>' + m.content }}{%- endif -%}
  {%- if m.role == 'assistant' -%}
    {%- if ns.user -%}{{ '<｜Assistant｜></think>' }}{%- set ns.user = false -%}{%- endif -%}
    {%- if m.content is not none -%}{{ m.content }}{%- endif -%}
    {%- for call in m.tool_calls or [] -%}
      {{ ('<｜tool▁calls▁begin｜>' if loop.first else '') + '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments + '<｜tool▁call▁end｜>' }}
      {%- if loop.last -%}{{ '<｜tool▁calls▁end｜>' }}{%- endif -%}
    {%- endfor -%}
    {{ eos_token }}
  {%- endif -%}
  {%- if m.role == 'tool' -%}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.user -%}{{ '<｜Assistant｜>' + ('<think>' if 'reason' in messages[-1].content else '</think>') }}{%- endif -%}
"""

# In the style of V3 and R1: calls only where there is no content, and an answer that begins with reasoning.
R1 = """
{%- set ns = namespace(system='', outputs=false) -%}
{%- for m in messages if m.role == 'system' -%}{%- set ns.system = ns.system + m.content -%}{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}{%- set ns.outputs = false -%}{{ '<｜User｜>' + m.content }}{%- endif -%}
  {%- if m.role == 'assistant' and m.content is none -%}
    {%- for call in m.tool_calls -%}
      {{ ('<｜Assistant｜><｜tool▁calls▁begin｜>' if loop.first else '\\n') + '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] + '\\n```json\\n' + call['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' }}
    {%- endfor -%}
    {{ '<｜tool▁calls▁end｜>' + eos_token }}
  {%- elif m.role == 'assistant' -%}
    {{ ('<｜tool▁outputs▁end｜>' if ns.outputs else '<｜Assistant｜>') + m.content.split('</think>')[-1] + eos_token }}
    {%- set ns.outputs = false -%}
  {%- endif -%}
  {%- if m.role == 'tool' -%}
    {{ ('\\n' if ns.outputs else '<｜tool▁outputs▁begin｜>') + '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
    {%- set ns.outputs = true -%}
  {%- endif -%}
{%- endfor -%}
{%- if ns.outputs -%}{{ '<｜tool▁outputs▁end｜>' }}{%- endif -%}
{%- if add_generation_prompt and not ns.outputs -%}{{ '<｜Assistant｜><think>\\n' }}{%- endif -%}
"""

# As V3.2, which publishes code instead: DSML, whose parameters say whether they are strings.
V32 = """
{{- bos_token -}}
{%- if tools -%}## Tools{% for tool in tools %}{{ '\\n' + (tool.function | tojson) }}{% endfor %}{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}{{ '<｜User｜>' + m.content + '<｜Assistant｜>' + ('<think>' if 'reason' in m.content else '</think>') }}{%- endif -%}
  {%- if m.role == 'assistant' -%}
    {{ m.content or '' }}
    {%- for call in m.tool_calls or [] -%}
      {%- if loop.first -%}{{ '\\n\\n<｜DSML｜function_calls>\\n' }}{%- endif -%}
      {{ '<｜DSML｜invoke name="' + call.function.name + '">\\n' }}
      {%- for k, v in call.function.arguments.items() -%}
        {{ '<｜DSML｜parameter name="' + k + '" string="' + ('true' if v is string else 'false') + '">' + (v if v is string else v | tojson) + '</｜DSML｜parameter>\\n' }}
      {%- endfor -%}
      {{ '</｜DSML｜invoke>\\n' }}
      {%- if loop.last -%}{{ '</｜DSML｜function_calls>' }}{%- endif -%}
    {%- endfor -%}
    {{ eos_token }}
  {%- endif -%}
  {%- if m.role == 'tool' -%}{{ '<function_results>' + m.content + '</function_results></think>' }}{%- endif -%}
{%- endfor -%}
"""

# In the style of GLM-4.7 and GLM-5: keys and values in tags, reasoning of earlier answers kept.
GLM47 = """[gMASK]<sop>
{%- if tools -%}<|system|># Tools{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}{{ '<|user|>' + m.content }}{%- endif -%}
  {%- if m.role == 'assistant' -%}
    {{ '<|assistant|><think>' + (m.reasoning_content or '') + '</think>' + m.content }}
    {%- for call in m.tool_calls or [] -%}
      {{ '<tool_call>' + call.function.name }}
      {%- for k, v in call.function.arguments.items() -%}
        {{ '<arg_key>' + k + '</arg_key><arg_value>' + (v if v is string else v | tojson) + '</arg_value>' }}
      {%- endfor -%}
      {{ '</tool_call>' }}
    {%- endfor -%}
  {%- endif -%}
  {%- if m.role == 'tool' -%}{{ '<|observation|><tool_response>' + m.content + '</tool_response>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""
GLM45 = (
    GLM47.replace("call.function.name }}", "call.function.name + '\\n' }}")
    .replace("</arg_key><arg", "</arg_key>\\n<arg")
    .replace("'</arg_value>'", "'</arg_value>\\n'")
)

# In the style of Kimi K2: calls with identifiers that their results repeat.
KIMI = """
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{%- endif -%}
{%- for m in messages -%}
  {{ '<|im_' + ('assistant' if m.role == 'assistant' else 'user' if m.role == 'user' else 'system') + '|>' + m.role + '<|im_middle|>' }}
  {%- if m.role == 'tool' -%}{{ '## Return of ' + m.tool_call_id + '\\n' }}{%- endif -%}
  {{ m.content or '' }}
  {%- for call in m.tool_calls or [] -%}
    {{ ('<|tool_calls_section_begin|>' if loop.first else '') + '<|tool_call_begin|>' + call.id + '<|tool_call_argument_begin|>' }}
    {%- if call.function.arguments is string -%}{{ call.function.arguments }}{%- else -%}{{ call.function.arguments | tojson }}{%- endif -%}
    {{ '<|tool_call_end|>' + ('<|tool_calls_section_end|>' if loop.last else '') }}
  {%- endfor -%}
  <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""

MARKERS = {
    "deepseek": [USER, ASSISTANT, "<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>",
                 "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "｜DSML｜"],
    "glm": ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<think>", "</think>", "<tool_call>", "</tool_call>",
            "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"],
    "kimi": ["<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>", "<think>", "</think>",
             "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>",
             "<|tool_call_end|>"],
}  # fmt: skip

TOOLS = [
    {"type": "function", "function": {
        "name": "get_weather", "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}}},
    {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}}},
]  # fmt: skip
CITY = 'Köln "Süd"\n天'
ARGUMENTS = json.dumps({"city": CITY, "days": 3}, ensure_ascii=False)

DEEPSEEK_CALL = "<｜tool▁call▁begin｜>"
# The calls get_weather(CITY, 3) and now(), as each format writes them, and what stands around all.
CALLS = {
    "deepseek_v3": ("<｜tool▁calls▁begin｜>", f"{DEEPSEEK_CALL}function<｜tool▁sep｜>get_weather\n```json\n{ARGUMENTS}\n```<｜tool▁call▁end｜>",
                    f"\n{DEEPSEEK_CALL}function<｜tool▁sep｜>now\n```json\n{{}}\n```<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    "deepseek_v31": ("<｜tool▁calls▁begin｜>", f"{DEEPSEEK_CALL}get_weather<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>",
                     f"{DEEPSEEK_CALL}now<｜tool▁sep｜>{{}}<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    "deepseek_v32": ("\n\n<｜DSML｜function_calls>\n",
                     f'<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">{CITY}</｜DSML｜parameter>\n'
                     '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n',
                     '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n', "</｜DSML｜function_calls>"),
    "glm45": ("\n", f"<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>{CITY}</arg_value>\n<arg_key>days</arg_key>\n"
              "<arg_value>3</arg_value>\n</tool_call>\n", "<tool_call>now\n</tool_call>", ""),
    "glm47": ("", f"<tool_call>get_weather<arg_key>city</arg_key><arg_value>{CITY}</arg_value><arg_key>days</arg_key><arg_value>3"
              "</arg_value></tool_call>", "<tool_call>now</tool_call>", ""),
    "kimi_k2": ("<|tool_calls_section_begin|>",
                f"<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{ARGUMENTS}<|tool_call_end|>",
                "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>", "<|tool_calls_section_end|>"),
}  # fmt: skip
TEMPLATES = {
    "deepseek_v3": R1,
    "deepseek_v31": V31,
    "deepseek_v32": V32,
    "glm45": GLM45,
    "glm47": GLM47,
    "kimi_k2": KIMI,
}
FORCED = {  # what a prompt that must call get_weather ends with
    "deepseek_v3": "function<｜tool▁sep｜>get_weather\n```json\n", "deepseek_v31": "get_weather<｜tool▁sep｜>",
    "deepseek_v32": 'get_weather">\n', "glm45": "get_weather\n", "glm47": "get_weather",
    "kimi_k2": "functions.get_weather:0<|tool_call_argument_begin|>",
}  # fmt: skip

SAY, CALL, REASON, FORCE, BROKEN, ANSWER = range(6)


def scripts(name):
    begin, weather, now, end = CALLS[name]
    calls = begin + weather + now + end
    close = "\n</think>\n\n"
    opened = "" if name.startswith("deepseek") else "<think>"  # by the prompt
    reasoning = f"{opened}Two words: naïve.\n\nNow <b>decide</b>.{close}"
    prefix = f"Short.{close}" if name == "deepseek_v3" else ""  # R1's prompt has opened it
    return [
        prefix + "Just words, 1 < 2.",
        f"{prefix}Let me see.{calls}",
        reasoning + "Then:" + calls,
        (weather + now + end).split(FORCED[name], 1)[1],
        prefix + "Broken: " + (begin + weather)[: len(begin) + 14],
        "It is warm there.",
    ]


class Service:
    def __init__(self, directory, name, *flags):
        family = name.split("_")[0].rstrip("0123456789")
        write_model(directory, scripts(name), TEMPLATES[name], MARKERS[family])
        self.start(directory, name, *flags)

    def start(self, directory, name, *flags):
        self.name = name
        self.server = Server(directory, "--model-name", "scripted", *flags, num_pages=512)
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.server.port}/v1", api_key="none", max_retries=0, timeout=60
        )

    def chat(self, script, text="", history=(), **kw):
        messages = (
            [*history, {"role": "user", "content": f"{letter(script)} {text}"}]
            if text or not history
            else list(history)
        )
        return self.client.chat.completions.create(model="scripted", messages=messages, **kw)

    def streamed(self, script, text="", **kw):
        """The pieces' sum, with what an answer that is not streamed has."""
        message, finish, usage = {"content": "", "reasoning": "", "calls": []}, None, None
        for chunk in self.chat(script, text, stream=True, stream_options={"include_usage": True}, **kw):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                finish = choice.finish_reason or finish
                delta = choice.delta
                message["content"] += delta.content or ""
                message["reasoning"] += getattr(delta, "reasoning_content", None) or ""
                assert getattr(delta, "reasoning", None) == getattr(delta, "reasoning_content", None)
                for call in delta.tool_calls or []:
                    if call.function.name:
                        assert call.index == len(message["calls"]) and call.id and call.type == "function"
                        message["calls"].append([call.function.name, ""])
                    assert call.index == len(message["calls"]) - 1
                    message["calls"][-1][1] += call.function.arguments
        return message, finish, usage


def parts_of(answer):
    message = answer.choices[0].message
    calls = [[c.function.name, c.function.arguments] for c in message.tool_calls or []]
    return {
        "content": message.content or "",
        "reasoning": getattr(message, "reasoning_content", None) or "",
        "calls": calls,
    }


@pytest.fixture(scope="module", params=TEMPLATES)
def service(request, tmp_path_factory):
    service = Service(tmp_path_factory.mktemp(request.param), request.param)
    yield service
    service.server.wait_until_idle()
    assert service.server.stop() == 0


def check_calls(calls):
    assert [name for name, _ in calls] == ["get_weather", "now"]
    assert json.loads(calls[0][1]) == {"city": CITY, "days": 3} and json.loads(calls[1][1]) == {}


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
