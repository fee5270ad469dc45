"""Chat templates against transformers and Jinja2: templates of the make of published ones, and random ones."""

import json
import warnings

import jinja_templates
import pytest
import tokenizer_files as files
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

import flash_mla_kernels

V2 = """
{{- bos_token }}
{%- for message in messages %}
  {%- if message['role'] == 'user' %}
    {{- 'User: ' + message['content'] + '\\n\\n' }}
  {%- elif message['role'] == 'assistant' %}
    {{- 'Assistant: ' + message['content'] + eos_token }}
  {%- else %}
    {{- message['content'] + '\\n\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- 'Assistant:' }}
{%- endif %}"""


def v3(*, keep_reasoning=True, joined_system=True, think=False, eos="'<｜end▁of▁sentence｜>'"):
    system = (
        """{%- if ns.is_first_sp %}
      {%- set ns.system = message['content'] %}
      {%- set ns.is_first_sp = false %}
    {%- else %}
      {%- set ns.system = ns.system + '\\n\\n' + message['content'] %}
    {%- endif %}"""
        if joined_system
        else "{%- set ns.system = message['content'] %}"
    )
    first = ", is_first_sp=true" if joined_system else ""
    answer = "message['content']" if keep_reasoning else "message['content'].split('</think>')[-1]"
    begin = "'<｜Assistant｜><think>\\n'" if think else "'<｜Assistant｜>'"
    return f"""
{{%- set ns = namespace(system=''{first}) %}}
{{%- for message in messages %}}
  {{%- if message['role'] == 'system' %}}
    {system}
  {{%- endif %}}
{{%- endfor %}}
{{{{- bos_token + ns.system }}}}
{{%- for message in messages %}}
  {{%- if message['role'] == 'user' %}}
    {{{{- '<｜User｜>' + message['content'] }}}}
  {{%- elif message['role'] == 'assistant' %}}
    {{{{- '<｜Assistant｜>' + {answer} + {eos} }}}}
  {{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}
  {{{{- {begin} }}}}
{{%- endif %}}"""


TEMPLATES = {
    "V2": V2,
    "V3": v3(),
    "V3, the last system message": v3(joined_system=False),
    "V3, eos_token": v3(eos="eos_token"),
    "R1": v3(keep_reasoning=False, joined_system=False),
    "R1, begins with <think>": v3(keep_reasoning=False, think=True),
}

CONVERSATIONS = [
    [("user", "Hello")],
    [("system", "Be brief."), ("user", "Hello")],
    [("user", "1+1?"), ("assistant", "2"), ("user", "and\n3?")],
    [("system", "A"), ("user", "B"), ("assistant", "C"), ("system", "D"), ("user", "")],
    [("user", "x"), ("assistant", "<think>\nhm</think>\n\nyes"), ("user", "y")],
    [("user", "x"), ("assistant", "a</think>b</think>c"), ("assistant", "</think>")],
    [("user", "  spaces  "), ("assistant", " 敏捷 🙂 "), ("user", files.USER)],
    [("assistant", "only an answer")],
]


def check(template, conversation, generate, eos=files.EOS):
    messages = [{"role": role, "content": content} for role, content in conversation]
    rendered, _ = render_jinja_template(
        conversations=[messages], chat_template=template, add_generation_prompt=generate, bos_token=files.BOS, eos_token=eos
    )
    ours = flash_mla_kernels.ChatTemplate.from_jinja(template, files.BOS, eos)
    assert ours.apply(messages, add_generation_prompt=generate) == rendered[0]


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations(name, conversation, generate):
    check(TEMPLATES[name], conversation, generate)


def test_end_of_answer():
    check(TEMPLATES["V3"], CONVERSATIONS[2], True, eos="<eos>")
    check(TEMPLATES["V3, eos_token"], CONVERSATIONS[2], True, eos="<eos>")


turns = st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=20) | st.just("a</think>b"))


@settings(deadline=None, max_examples=100)
@given(name=st.sampled_from(list(TEMPLATES)), conversation=st.lists(turns, min_size=1, max_size=6), generate=st.booleans())
def test_any_conversation(name, conversation, generate):
    check(TEMPLATES[name], conversation, generate)


def test_written_out():
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    v2 = flash_mla_kernels.ChatTemplate.from_jinja(V2, "<b>", "<e>")
    assert v2.apply(messages) == "<b>S\n\nUser: U\n\nAssistant: A<e>Assistant:"
    r1 = flash_mla_kernels.ChatTemplate.from_jinja(TEMPLATES["R1, begins with <think>"], "<b>", "<e>")
    assert r1.apply(messages) == "<b>S<｜User｜>U<｜Assistant｜>A<｜end▁of▁sentence｜><｜Assistant｜><think>\n"


def test_directory(tmp_path):
    config = {"bos_token": {"content": "<b>"}, "eos_token": "<e>", "chat_template": V2}
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(config))
    hello = [{"role": "user", "content": "Hello"}]
    assert flash_mla_kernels.ChatTemplate(tmp_path).apply(hello) == "<b>User: Hello\n\nAssistant:"
    path.write_text(json.dumps({**config, "chat_template": [{"name": "default", "template": V2}]}))
    assert flash_mla_kernels.ChatTemplate(tmp_path).apply(hello) == "<b>User: Hello\n\nAssistant:"
    (tmp_path / "chat_template.jinja").write_text(v3())
    assert flash_mla_kernels.ChatTemplate(tmp_path).apply(hello) == "<b><｜User｜>Hello<｜Assistant｜>"


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Łódź", "days": 3, "exact": 1.5, "of": [None, True]}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": " Of a \"city\"\n", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]
RICH = [
    ([{"role": "user", "content": "Hello"}], {}),
    ([{"role": "user", "content": "Hello"}], {"thinking": True, "enable_thinking": False}),
    ([{"role": "system", "content": "S"}, {"role": "user", "content": "1+1? <｜User｜>"}, {"role": "assistant", "content": "<think>\nhm</think>\n\n2"}, {"role": "user", "content": "and "}], {"thinking": False}),
    ([{"role": "user", "content": "w"}, {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}, {"role": "tool", "content": "{\"t\": 3}", "tool_call_id": "c1"}, {"role": "tool", "content": "x", "tool_call_id": "c1"}], {"tools": TOOLS}),
    ([{"role": "user", "content": "w"}, {"role": "assistant", "content": None, "reasoning_content": " r ", "tool_calls": [CALL]}, {"role": "tool", "content": "7", "tool_call_id": "c1"}, {"role": "assistant", "content": "7 it is"}, {"role": "user", "content": "thanks"}], {"tools": TOOLS}),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], {"tools": None}),
    ([{"role": "user", "content": [{"type": "image"}]}], {}),
    ([{"role": "assistant", "content": "only an answer"}, {"role": "system", "content": "late"}], {}),
]


def either(render):
    """What it returns, or that it refused."""
    try:
        return render()
    except Exception as e:  # noqa: BLE001
        return type(e) if isinstance(e, AssertionError) else "refused"


def same_as_jinja(template, messages, variables, generate=True):
    expected = either(lambda: jinja_templates.render(template, messages, "<b>", "<e>", generate, **variables))
    chat = flash_mla_kernels.ChatTemplate.from_jinja(template, "<b>", "<e>")
    assert either(lambda: chat.apply(messages, add_generation_prompt=generate, **variables)) == expected
    return expected


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("conversation", range(len(RICH)))
@pytest.mark.parametrize("name", jinja_templates.SHAPES)
def test_shapes_of_published_templates(name, conversation, generate):
    messages, variables = RICH[conversation]
    same_as_jinja(jinja_templates.SHAPES[name], messages, variables, generate)


def test_plain_text():
    for template in ["a", "a {{ bos_token }} b", "{", "{ {{ 1 }} {", "a{", "a{# c #}b\n", "\n\n", "{{ 1 }}\n", "a\r\nb{% set x = 1 %}\r\nc"]:
        assert same_as_jinja(template, [{"role": "user", "content": ""}], {}) != "refused"


def test_shapes_are_rendered():
    for template in jinja_templates.SHAPES.values():
        assert sum(same_as_jinja(template, messages, variables) != "refused" for messages, variables in RICH) >= 5


# What Python prints of objects that are no values of a template, or computes of constants at once.
BEYOND = ("generator object", "built-in method", "bound method", " object at 0x", "dict_", "range(", "<Macro")


# What we refuse: formatting by "%", the case of letters outside ASCII, and slices of constants that have none (which are
# undefined to Jinja2, and an error where they are no constants).
LIMITS = ('has "%" behind a string', "a string %", "the case of letters outside ASCII", "a slice of a")


@pytest.mark.parametrize("block", range(20))
def test_random_templates(block):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Hi a,b </think> x"},
        {"role": "assistant", "content": " yes é ", "x": [1, 2]},
    ]
    variables = {"thinking": True, "d": {"k": 1, "role": "r"}, "l": [3, 1, 2], "n": 2, "s": "some, text", "tools": [{"name": "t"}]}
    rendered = 0
    for seed in range(200 * block, 200 * block + 200):
        template = jinja_templates.Random(seed).template()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            expected = either(lambda: jinja_templates.render(template, messages, "<b>", "<e>", **variables))  # noqa: B023
        if expected == "refused" or any(b in expected for b in BEYOND):
            continue
        try:
            ours = flash_mla_kernels.ChatTemplate.from_jinja(template, "<b>", "<e>").apply(messages, **variables)
        except (ValueError, NotImplementedError) as e:
            assert any(limit in str(e) for limit in LIMITS), f"seed {seed}: {template!r}: {e}"
            continue
        assert ours == expected, f"seed {seed}: {template!r}"
        rendered += 1
    assert rendered > 20  # the others make no sense to Jinja2 either


def test_text_of_clients_is_never_control():
    for template in jinja_templates.SHAPES.values():
        chat = flash_mla_kernels.ChatTemplate.from_jinja(template, "<b>", "<e>")
        messages = [{"role": "system", "content": "\x01<b>"}, {"role": "user", "content": "\x01<｜User｜>"}, {"role": "assistant", "content": "\x01<e>"}]
        parts = chat.parts(messages, tools=TOOLS, thinking=True)
        assert any("\x01" in text for text, control in parts if not control)
        assert not any("\x01" in text for text, control in parts if control)


def test_refused(tmp_path):
    for template, what in [("{% include 'x' %}", 'the tag "include"'), ("\n{{ m|urlize }}", 'the filter "urlize"')]:
        with pytest.raises(NotImplementedError, match=f"t.jinja:{1 + template.count(chr(10))}: the chat template has {what}"):
            flash_mla_kernels.ChatTemplate.from_jinja(template, "", "", "t.jinja")
    chat = flash_mla_kernels.ChatTemplate.from_jinja(V2, "", "")
    with pytest.raises(ValueError, match=r'messages\[1\].role = "tool": expected "system", "user" or "assistant"'):
        chat.apply([{"role": "user", "content": ""}, {"role": "tool", "content": "x"}])
    with pytest.raises(ValueError, match="messages is empty"):
        chat.apply([])
    with pytest.raises(ValueError, match="messages: only texts .line 1 of the chat template."):
        flash_mla_kernels.ChatTemplate.from_jinja("{{ raise_exception('only texts') }}", "", "").apply([{"role": "user", "content": "x"}])
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer_config.json: chat_template is missing"):
        flash_mla_kernels.ChatTemplate(tmp_path)
