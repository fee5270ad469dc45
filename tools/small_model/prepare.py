#!/usr/bin/env python3
"""Downloads the corpus, trains the tokenizer and encodes the text: everything that needs no GPU.

usage: prepare.py FOLDER

Writes FOLDER/model (tokenizer.json, tokenizer_config.json) and FOLDER/tokens.npz (train, validation: uint16).
"""

import json
import random
import sys
from pathlib import Path

import corpus
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 4096
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
HELD_OUT = 25  # every 25th document validates
CHAT_SHARE = 0.2  # of documents also seen as a dialogue: an opening, and how it goes on

# The splits of DeepSeek-V3's tokenizer: up to three digits; CJK; words with what leads them, punctuation, space.
SPLITS = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def train_tokenizer(texts):
    """A byte-level BPE tokenizer in the structure of DeepSeek-V3's tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True) for token in (BOS, EOS, PAD)]
    chat = [AddedToken(token, normalized=False, special=False) for token in (USER, ASSISTANT)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(chat),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(chat)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=True)
    return tokenizer


def tokenizer_config(max_tokens):
    def token(content):
        return {
            "__type": "AddedToken",
            "content": content,
            "lstrip": False,
            "normalized": True,
            "rstrip": False,
            "single_word": False,
        }

    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": token(BOS),
        "eos_token": token(EOS),
        "pad_token": token(PAD),
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": max_tokens,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }


def dialogue(text, rng):
    """The text cut in two at a sentence, as a user's opening and the answer; None if it is too short."""
    ends = [i + 1 for i, c in enumerate(text[:600]) if c in ".!?;:\n" and i > 20]
    if not ends or len(text) < 800:
        return None
    at = rng.choice(ends)
    return f"{USER}{text[:at].strip()}{ASSISTANT}{text[at:].strip()}"


def encode(tokenizer, texts, rng):
    """Shuffled documents as one run of tokens, each from BOS to EOS."""
    texts = texts + [d for text in texts if rng.random() < CHAT_SHARE and (d := dialogue(text, rng))]
    rng.shuffle(texts)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    ids = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids += [bos, *encoding.ids, eos]
    return np.array(ids, dtype=np.uint16)


def main():
    folder = Path(sys.argv[1])
    root = folder / "packages" / "root"
    if not root.exists():
        corpus.download(folder / "packages")
    sources = corpus.documents(root)
    every = [text for texts in sources.values() for text in texts]
    tokenizer = train_tokenizer(every)
    out = folder / "model"
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = json.dumps(tokenizer_config(2048), indent=2, ensure_ascii=False)
    (out / "tokenizer_config.json").write_text(config + "\n")

    rng = random.Random(0)
    train = encode(tokenizer, [text for i, text in enumerate(every) if i % HELD_OUT != 0], rng)
    validation = encode(tokenizer, [text for i, text in enumerate(every) if i % HELD_OUT == 0], rng)
    np.savez(folder / "tokens.npz", train=train, validation=validation)
    for source, texts in sources.items():
        print(f"{source}: {len(texts)} documents, {sum(map(len, texts))} characters")
    print(f"tokens: {len(train)} to train on, {len(validation)} held out; vocabulary {tokenizer.get_vocab_size()}")


if __name__ == "__main__":
    main()
