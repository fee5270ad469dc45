"""Jinja templates for tests: of the shapes that checkpoints publish, and random ones; and Jinja2 as transformers sets it up."""

import json
import random

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment


def environment():
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env


ENVIRONMENT = environment()


def render(template, messages, bos_token, eos_token, add_generation_prompt=True, **variables):
    """What transformers renders."""
    variables = {"tools": None, "documents": None, **variables}
    return ENVIRONMENT.from_string(template).render(
        messages=messages, bos_token=bos_token, eos_token=eos_token, add_generation_prompt=add_generation_prompt, **variables
    )


# In the style of V3 and R1: system messages first, calls of tools one after another, their outputs in one block.
CALLS = """
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{%- set ns = namespace(first=true, in_tools=false, system='', first_output=true) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- set ns.system = message['content'] if ns.first else ns.system + '\\n\\n' + message['content'] -%}
    {%- set ns.first = false -%}
  {%- endif -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {%- set ns.in_tools = false -%}
    {{ '<｜User｜>' + message['content'] }}
  {%- endif -%}
  {%- if message['role'] == 'assistant' and message['tool_calls'] is defined and message['tool_calls'] is not none -%}
    {%- for call in message['tool_calls'] -%}
      {%- if loop.first -%}
        {{ '<｜Assistant｜>' ~ (message['content'] or '') ~ '<｜calls｜>' }}
      {%- else -%}
        {{ '\\n' }}
      {%- endif -%}
      {{ '<｜call｜>' + call['type'] + '<｜sep｜>' + call['function']['name'] + '\\n```json\\n' + call['function']['arguments']|tojson + '\\n```' }}
      {%- if loop.last %}{{ '<｜/calls｜>' + eos_token }}{% endif -%}
    {%- endfor -%}
  {%- elif message['role'] == 'assistant' -%}
    {%- if ns.in_tools -%}
      {{ '<｜/outputs｜>' + message['content'] + eos_token }}
      {%- set ns.in_tools = false -%}
    {%- else -%}
      {%- set content = message['content'] -%}
      {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif -%}
      {{ '<｜Assistant｜>' + content + eos_token }}
    {%- endif -%}
  {%- endif -%}
  {%- if message['role'] == 'tool' -%}
    {{ '<｜outputs｜>' if not ns.in_tools else '\\n' }}{{ '<｜output｜>' + message['content'] + '<｜/output｜>' }}
    {%- set ns.in_tools = true -%}
  {%- endif -%}
{%- endfor -%}
{%- if ns.in_tools %}{{ '<｜/outputs｜>' }}{% endif -%}
{%- if add_generation_prompt and not ns.in_tools %}{{ '<｜Assistant｜><think>\\n' }}{% endif -%}"""

# In the style of V3.1: a switch for thinking, tools listed in Markdown.
SWITCH = """
{% if not thinking is defined %}{% set thinking = false %}{% endif %}
{% set ns = namespace(last=none) %}
{%- if tools %}
{{ bos_token }}## Tools
{% for tool in tools %}
### {{ tool.function.name }}
Description: {{ tool.function.description | default('none', true) | trim }}

Parameters: {{ tool.function.parameters | tojson }}
{% endfor %}
{%- else %}
{{- bos_token -}}
{% endif %}
{%- for message in messages %}
  {%- if message.role == 'user' %}
    {{- '<｜User｜>' ~ message.content }}
  {%- elif message.role == 'assistant' %}
    {%- if ns.last in ['user', 'developer'] %}{{- '<｜Assistant｜>' }}{{- '<think>' if loop.last and thinking else '</think>' }}{%- endif %}
    {%- if message.content is string and not message.content.startswith('<think>') %}
      {{- message.content.rstrip('\\n') + eos_token }}
    {%- endif %}
  {%- endif %}
  {%- set ns.last = message.role %}
{%- endfor -%}
{%- if add_generation_prompt and ns.last in ('user', 'tool') %}
{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}
{%- endif %}
"""

# In the style of GLM: macros over contents in parts, the last user's message looked for first.
MACROS = """[gMASK]<sop>
{%- macro visible(content) -%}
{%- if content is string -%}
{{ content }}
{%- elif content is iterable and content is not mapping -%}
{%- for item in content -%}
{%- if item is mapping and item.type == 'text' %}{{ item.text }}{% elif item is string %}{{ item }}{% endif -%}
{%- endfor -%}
{%- else -%}
{{ content }}
{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
<|system|>
# Tools
<tools>
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
</tools>
{%- endif -%}
{%- set ns = namespace(last_user=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}
{%- if m.role == 'user' -%}<|user|>
{{ visible(m.content) }}
{{- '/nothink' if (enable_thinking is defined and not enable_thinking and not visible(m.content).endswith('/nothink')) else '' -}}
{%- elif m.role == 'assistant' -%}
<|assistant|>
{%- set reasoning = '' %}
{%- set content = visible(m.content) %}
{%- if m.reasoning_content is string %}
{%- set reasoning = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > ns.last_user and reasoning -%}
{{ '\\n<think>' + reasoning.strip() + '</think>' }}
{%- else -%}
{{ '\\n<think></think>' }}
{%- endif -%}
{%- if content.strip() -%}{{ '\\n' + content.strip() }}{%- endif -%}
{% for call in m.tool_calls or [] %}
{%- set call = call.function if call.function else call %}
{{ '\\n<tool_call>' + call.name }}
{% set arguments = call.arguments %}
{% for k, v in arguments.items() %}
<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
{% endfor %}
</tool_call>{% endfor %}
{%- elif m.role == 'tool' -%}
{% if loop.first or (messages[loop.index0 - 1].role != 'tool') %}{{ '<|observation|>' }}{% endif %}
{{- '\\n<tool_response>\\n' }}{{ visible(m.content) }}{{- '\\n</tool_response>' }}
{%- elif m.role == 'system' -%}
<|system|>
{{ visible(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{{- '\\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}{%- endif -%}"""

# In the style of Kimi: names of roles, calls with identifiers, a list cut in two.
ROLES = """
{%- macro role(m) -%}
  {%- set name = m.get('name') or m['role'] -%}
  <|im_{{ m['role'] if m['role'] in ['user', 'assistant'] else 'system' }}|>{{ name }}<|im_middle|>
{%- endmacro -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages if m['role'] == 'assistant' and not m.get('tool_calls') -%}{%- set ns.last = loop.index0 -%}{%- endfor -%}
{%- set history, rest = messages[:ns.last + 1], messages[ns.last + 1:] -%}
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>{%- endif -%}
{%- for m in history -%}{{ role(m) }}{{ m['content'] }}<|im_end|>{%- endfor -%}
{%- for m in rest -%}
  {%- if loop.first and m['role'] != 'system' and not history -%}<|im_system|>default<|im_end|>{%- endif -%}
  {{ role(m) }}
  {%- if m['role'] == 'assistant' -%}
    <think>{{ m.get('reasoning_content', '') }}</think>
    {%- for call in m['tool_calls'] -%}
      <|call|>{{ call.get('id', 'functions.' + call['function']['name'] + ':' + (loop.index0 | string)) }}<|argument|>
      {%- if call['function']['arguments'] is string -%}{{ call['function']['arguments'] }}{%- else -%}{{ call['function']['arguments'] | tojson }}{%- endif -%}<|end|>
    {%- endfor -%}
  {%- elif m['role'] == 'tool' -%}
    ## Return of {{ m.tool_call_id }}
{{ m['content'] }}
  {%- elif m['content'] is string -%}
    {{ m['content'] }}
  {%- else -%}
    {%- for part in m['content'] -%}{{ part['text'] if part.type == 'text' else raise_exception('only text, not ' + part.type) }}{%- endfor -%}
  {%- endif -%}
  <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"""

SHAPES = {"calls": CALLS, "switch": SWITCH, "macros": MACROS, "roles": ROLES}


class Random:
    """Random templates: mostly ones that make sense, over the same conversation."""

    NAMES = ["messages", "bos_token", "thinking", "nothing", "tools", "a", "b", "m", "n", "s", "d", "l"]
    TEXTS = ["''", "'a'", "\"b c\"", "'</think>'", "' x\\n'", "'é漢'", "'A-b'", "'a,b,,c'", "'1'"]
    TEXT_CALLS = ["strip()", "lstrip()", "rstrip()", "strip('a ')", "split()", "split(',')", "split('a', 1)", "rsplit(',', 1)",
                  "startswith('a')", "endswith(('b', 'c'))", "replace('a', 'xy')", "replace('', '-')", "find('b')", "splitlines()",
                  "count('a')", "join(['x', 'y'])", "get('role')", "items()", "keys()", "removeprefix('a')", "index(1)"]
    FILTERS = ["trim", "length", "string", "tojson", "first", "last", "default('z')", "default('z', true)", "list", "join(',')",
               "int", "float", "abs", "upper", "lower", "capitalize", "reverse|list", "sort", "unique|list", "min", "max", "sum",
               "replace('a', 'b')", "map('string')|list", "select('string')|list", "reject('none')|list", "map(attribute='role')|list",
               "selectattr('role', 'equalto', 'user')|list", "rejectattr('x')|list", "tojson(indent=2)", "items|list", "dictsort",
               "indent(2)", "indent(1, true)", "count", "d(3)"]
    TESTS = ["defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "integer", "float", "boolean",
             "true", "false", "odd", "even", "divisibleby 3", "in [1, 'a']", "eq('a')", "ne 1", "lt 2", "sameas_"]
    BINARY = ["+", "-", "*", "/", "//", "%", "~", "==", "!=", "<", "<=", ">", ">=", "in", "not in", "and", "or"]

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.depth = 0
        self.in_loop = 0

    def pick(self, *choices):
        return self.random.choice(choices)

    def leaf(self):
        kind = self.random.random()
        if kind < 0.35:
            return self.random.choice(self.NAMES)
        if kind < 0.6:
            return self.random.choice(self.TEXTS)
        if kind < 0.7 and self.in_loop:
            return "loop." + self.pick("index", "index0", "first", "last", "length", "revindex", "depth", "previtem", "nextitem")
        return self.pick("0", "1", "-3", "7", "2.5", "1e3", "true", "False", "none", "[]", "{}", "()", "messages[0]", "messages[1].content")

    def expression(self, depth=3):
        if depth == 0 or self.random.random() < 0.2:
            return self.leaf()
        e = lambda: self.expression(depth - 1)  # noqa: E731
        kind = self.random.randrange(14)
        if kind < 3:
            return f"{e()} {self.random.choice(self.BINARY)} {e()}"
        if kind == 3:
            return f"({e()})"
        if kind == 4:
            return f"({e()})|{self.random.choice(self.FILTERS)}"
        if kind == 5:
            test = self.random.choice(self.TESTS[:-1])
            return f"({e()} is {self.pick('', 'not ')}{test})"
        if kind == 6:
            return f"({e()}).{self.random.choice(self.TEXT_CALLS)}"
        if kind == 7:
            return f"({e()})[{self.pick('0', '-1', '1:', ':-1', '::-1', '1:3', ':', '5', chr(39) + 'role' + chr(39), '::2', '-2::-1')}]"
        if kind == 8:
            return f"({e()} if {e()} else {e()})" if self.random.random() < 0.8 else f"({e()} if {e()})"
        if kind == 9:
            return f"[{e()}, {e()}]"
        if kind == 10:
            return f"{{'k': {e()}, {self.pick('1', chr(39) + 'role' + chr(39))}: {e()}}}"
        if kind == 11:
            return f"(not {e()})"
        if kind == 12:
            return f"({e()}).{self.pick('role', 'content', 'k', 'x')}"
        return f"-({e()})"

    def sign(self):
        return self.pick("", "", "-", "+") if self.random.random() < 0.5 else ""

    def tag(self, text):
        return f"{{%{self.sign()} {text} {self.pick('', '', '-', '+')}%}}"

    def data(self):
        return self.pick("", " ", "\n", "\n  ", "x", "x \n", " \n\n y ", "\t", "<｜User｜>", "{ }", "# ")

    def statement(self, depth):
        kind = self.random.randrange(9)
        if depth == 0 or kind < 4:
            return f"{{{{{self.pick('', '-')} {self.expression()} {self.pick('', '-')}}}}}"
        if kind == 4:
            return self.tag(f"set {self.pick('a', 'b', 's', 'a, b', 'ns.x')} = {self.expression()}")
        if kind == 5:
            middle = self.pick("", self.tag("else") + self.body(depth - 1), self.tag(f"elif {self.expression(1)}") + self.body(depth - 1))
            return self.tag(f"if {self.expression(2)}") + self.body(depth - 1) + middle + self.tag("endif")
        if kind == 6:
            what = self.pick("messages", "[1, 2, 3]", "range(3)", "'héy'", "{'k': 1, 'j': 2}", "{'k': 1}.items()", "[]", self.expression(2))
            names = self.pick("m", "n", "k, n") if "items" in what else self.pick("m", "n", "l")
            condition = f" if {self.expression(1)}" if self.random.random() < 0.2 else ""
            self.in_loop += 1
            body = self.body(depth - 1) + self.pick("", "", self.tag(f"if {self.expression(1)}") + self.tag(self.pick("break", "continue")) + self.tag("endif"))
            self.in_loop -= 1
            otherwise = self.tag("else") + self.body(depth - 1) if self.random.random() < 0.2 else ""
            return self.tag(f"for {names} in {what}{condition}") + body + otherwise + self.tag("endfor")
        if kind == 7:
            return self.tag(f"set {self.pick('a', 's')}") + self.body(depth - 1) + self.tag("endset")
        return self.pick(f"{{{{ f({self.expression(1)}) }}}}", "{# a comment #}", "{#- c -#}\n", f"{{{{ f({self.expression(1)}, y={self.expression(1)}) }}}}")

    def body(self, depth):
        return "".join(self.data() + self.statement(depth) for _ in range(self.random.randint(1, 3))) + self.data()

    def template(self):
        loops, self.in_loop = self.in_loop, 0
        macro = self.tag("macro f(x, y='d')") + "{{ x }}:{{ y }}" + self.pick("", self.tag("if x is string") + "{{ x|length }}" + self.tag("endif")) + self.tag("endmacro")
        self.in_loop = loops
        return "{%- set ns = namespace(x=1) -%}" + macro + self.body(3)
