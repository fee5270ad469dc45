"""DeepSeek's chat formats against transformers running templates of the same make."""

import json

import pytest
import tokenizer_files as files
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

import flash_mla

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
    ours = flash_mla.ChatTemplate.from_jinja(template, files.BOS, eos)
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
    v2 = flash_mla.ChatTemplate.from_jinja(V2, "<b>", "<e>")
    assert v2.apply(messages) == "<b>S\n\nUser: U\n\nAssistant: A<e>Assistant:"
    r1 = flash_mla.ChatTemplate.from_jinja(TEMPLATES["R1, begins with <think>"], "<b>", "<e>")
    assert r1.apply(messages) == "<b>S<｜User｜>U<｜Assistant｜>A<｜end▁of▁sentence｜><｜Assistant｜><think>\n"


def test_directory(tmp_path):
    config = {"bos_token": {"content": "<b>"}, "eos_token": "<e>", "chat_template": V2}
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(config))
    hello = [{"role": "user", "content": "Hello"}]
    assert flash_mla.ChatTemplate(tmp_path).apply(hello) == "<b>User: Hello\n\nAssistant:"
    path.write_text(json.dumps({**config, "chat_template": [{"name": "default", "template": V2}]}))
    assert flash_mla.ChatTemplate(tmp_path).apply(hello) == "<b>User: Hello\n\nAssistant:"
    (tmp_path / "chat_template.jinja").write_text(v3())
    assert flash_mla.ChatTemplate(tmp_path).apply(hello) == "<b><｜User｜>Hello<｜Assistant｜>"


def test_refused(tmp_path):
    switch = v3() + "{% if thinking %}<｜Assistant｜><think>{% else %}<｜Assistant｜></think>{% endif %}"
    for template in ("{% for m in messages %}<|im_start|>{{ m }}{% endfor %}", "", switch):
        with pytest.raises(NotImplementedError, match="t.jinja: the template is"):
            flash_mla.ChatTemplate.from_jinja(template, "", "", "t.jinja")
    chat = flash_mla.ChatTemplate.from_jinja(V2, "", "")
    with pytest.raises(ValueError, match=r'messages\[1\].role = "tool": expected "system", "user" or "assistant"'):
        chat.apply([{"role": "user", "content": ""}, {"role": "tool", "content": "x"}])
    with pytest.raises(ValueError, match="messages is empty"):
        chat.apply([])
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer_config.json: chat_template is missing"):
        flash_mla.ChatTemplate(tmp_path)
