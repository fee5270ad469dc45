"""A server whose model writes given texts with reasoning and calls of tools, in every format that models have for them."""

import json

import openai
from live_server import PATIENCE, Server
from scripted_model import letter, write_model
from tokenizer_files import ASSISTANT, USER

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
            base_url=f"http://127.0.0.1:{self.server.port}/v1", api_key="none", max_retries=0, timeout=PATIENCE
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


def check_calls(calls):
    assert [name for name, _ in calls] == ["get_weather", "now"]
    assert json.loads(calls[0][1]) == {"city": CITY, "days": 3} and json.loads(calls[1][1]) == {}
