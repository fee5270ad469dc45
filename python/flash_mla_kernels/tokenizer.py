"""Text to tokens and back, as DeepSeek's checkpoints define it. Everything is done by the C++ library.

Wrong input raises ``ValueError``, files that ask for something else than DeepSeek's do ``NotImplementedError``; both
name the file, the field and its value.
"""

import json
import os

from . import _C


class Tokenizer:
    """A byte-level BPE tokenizer, read from ``tokenizer.json`` of a model directory.

    >>> Tokenizer(model_directory).encode("Hello")                                             # doctest: +SKIP
    [0, 19923]
    """

    def __init__(self, directory):
        self._tokenizer = _C.Tokenizer.open(os.fspath(directory))

    @classmethod
    def from_json(cls, text, origin="tokenizer.json"):
        """From the text of a ``tokenizer.json``; ``origin`` names it in errors."""
        self = cls.__new__(cls)
        self._tokenizer = _C.Tokenizer.parse(text, origin)
        return self

    @property
    def vocab_size(self):
        """One past the largest token."""
        return self._tokenizer.vocab_size

    def encode(self, text, *, add_special_tokens=True, allow_special=True):
        """The tokens of ``text`` (str, or bytes in UTF-8; what is not UTF-8 counts as U+FFFD).

        ``add_special_tokens`` puts the model's begin-of-sentence token in front, where the model has it so.
        ``allow_special=False`` takes special tokens that the text spells out for ordinary text.
        """
        if isinstance(text, str):
            text = text.encode("utf-8", "surrogatepass")
        return self._tokenizer.encode(text, add_special_tokens, allow_special)

    def decode(self, ids, *, skip_special=True):
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special)

    def stream_decoder(self, *, skip_special=True):
        """A decoder with ``push(id)`` and ``flush()``, which return text that is whole UTF-8."""
        return _C.StreamDecoder(self._tokenizer, skip_special)

    def token_bytes(self, id):
        """The bytes of one token."""
        return self._tokenizer.token_bytes(id)

    def is_special(self, id):
        """Whether a token is special: not text."""
        return self._tokenizer.is_special(id)

    def token_to_id(self, token):
        """The token spelled ``token`` in the file, or -1."""
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, id):
        """The spelling of a token in the file; empty if there is none."""
        return self._tokenizer.id_to_token(id)


class ChatTemplate:
    """The chat template of a checkpoint, in Jinja, read from a model directory.

    The subset of Jinja that published templates use is run, as transformers runs it; a template with anything else
    raises ``NotImplementedError``, with the line, when it is opened.
    A directory of DeepSeek V3.2 or V4 without a template has the format that DeepSeek publishes as code.

    >>> ChatTemplate(model_directory).apply([{"role": "user", "content": "Hello"}])            # doctest: +SKIP
    '<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜>'
    """

    def __init__(self, directory):
        self._template = _C.ChatTemplate.open(os.fspath(directory))

    @classmethod
    def from_jinja(cls, jinja, bos_token, eos_token, origin="chat_template"):
        """From the text of the template that the checkpoint ships; ``origin`` names it in errors."""
        self = cls.__new__(cls)
        self._template = _C.ChatTemplate.parse(jinja, bos_token, eos_token, origin)
        return self

    def apply(self, messages, *, add_generation_prompt=True, **variables):
        """The prompt for ``messages``, dictionaries with "role" and "content", and whatever else the template reads.

        ``variables``: what the template is to see besides, such as ``tools`` or ``thinking``; JSON's types.
        Encode it with ``add_special_tokens=False``: it has its begin-of-sentence token in front. Raises ``ValueError``
        for messages that the template refuses.
        """
        messages = list(messages)
        if not variables and all(m.keys() == {"role", "content"} and isinstance(m["content"], str) for m in messages):
            return self._template.apply([(m["role"], m["content"]) for m in messages], add_generation_prompt)
        return "".join(text for text, _ in self.parts(messages, add_generation_prompt=add_generation_prompt, **variables))

    def parts(self, messages, *, add_generation_prompt=True, **variables):
        """The same prompt as pairs of text and whether it is control.

        Special tokens may be recognised in control text alone: it is the template's own, the rest came from ``messages``
        and ``variables``.
        """
        messages, variables = json.dumps(list(messages)), json.dumps(variables)
        return self._template.render(messages, variables, add_generation_prompt)
