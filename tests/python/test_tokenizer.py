"""The tokenizer against PyPI's tokenizers, on tokenizers of the same make as DeepSeek's."""

import json
import random
import time

import pytest
import tokenizer_files as files
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import flash_mla_kernels

RUN = 100_000

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces   three\t\ttabs\n\n\nlines\r\n\r\nwindows \r mac \n ",
    "trailing spaces   ",
    "trailing newline\n",
    "don't I'll we've (x[0]+y)*2 == 3.14159; a->b::c() // ok?\n\tfoo_bar();",
    "1 12 123 1234 12345 1234567890 ٣٤٥٦ १२३४ ⅷ½ 𝟘𝟙",
    "敏捷的棕色狐狸。今天，12345个abc！「引用」～全角ＡＢＣ１２３",
    "いろは カタカナ ー 한국어 문장 漢字かな交じり",
    "Привет ελληνικά עברית العربية हिन्दी ไทย",
    "🙂🙃 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 ☃️ 🫨",
    "e\u0301 a\u0308\u0323 Z\u0351\u036b\u0343 \u0301leading mark \u20dd",
    "\u180e\u0085\u00a0\u1680\u2028\u2029\u200b\u200d\u2060\u3000\ufeffx",
    "\x00\x01\x7f\x80\x9f\ufffd\ufffe\U0010ffff",
    "ø ÿ øÿ Ā ġ Ġ Ċ",
    files.BOS,
    f"{files.BOS}{files.USER}What is 2+2?{files.ASSISTANT}<think>4</think>4{files.EOS}",
    f"a{files.BOS}b {files.EOS} <｜begin▁of▁sentence| <｜begin▁of▁sentence｜",
    "<think><thinker><thinke <<think>>think></think></think <|EOT|><|EOT",
    f"{files.USER} \n {files.ASSISTANT}  {files.USER}",
]

RUNS = {
    "letters": "a" * RUN,
    "pairs": "ab" * (RUN // 2),
    "spaces": " " * RUN,
    "spaces then letter": " " * RUN + "a",
    "newlines": "\n" * RUN,
    "spaces and newlines": " \n" * (RUN // 2),
    "punctuation": "!" * RUN,
    "mixed punctuation": "!\n" * (RUN // 2),
    "digits": "1" * RUN,
    "han": "一" * RUN,
    "latin": "é" * RUN,
    "emoji": "🙂" * RUN,
    "zero": "\x00" * RUN,
    "marks": "\u0301" * RUN,
    "letters and marks": "a\u0301" * (RUN // 2),
    "half special": "<｜" * (RUN // 2),
    "half added": "<think" * (RUN // 6),
    "special": files.USER * (RUN // 8),
}


class Pair:
    """The same tokenizer twice."""

    def __init__(self, theirs, content):
        self.theirs = theirs
        self.ours = flash_mla_kernels.Tokenizer.from_json(content)

    def check(self, text, *, decoded=True):
        for allow_special in (True, False):
            self.theirs.encode_special_tokens = not allow_special
            expected = self.theirs.encode(text, add_special_tokens=False).ids
            assert self.ours.encode(text, add_special_tokens=False, allow_special=allow_special) == expected
        if decoded:
            self.check_decode(expected)

    def check_decode(self, ids):
        for skip_special in (True, False):
            expected = self.theirs.decode(ids, skip_special_tokens=skip_special)
            assert self.ours.decode(ids, skip_special=skip_special) == expected
            stream = self.ours.stream_decoder(skip_special=skip_special)
            parts = [stream.push(i) for i in ids] + [stream.flush()]
            assert "".join(parts) == expected


@pytest.fixture(scope="module")
def v3():
    theirs = files.v3()
    return Pair(theirs, theirs.to_str())


@pytest.fixture(scope="module")
def v2():
    return Pair(*files.v2())


@pytest.fixture(scope="module", params=["v2", "v3"])
def pair(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_texts(pair, text):
    pair.check(text)


def test_ordinary_text_survives(pair):
    for text in TEXTS:
        if "ø" not in text:  # V2 has it as a token whose bytes are those of its letter
            ids = pair.ours.encode(text, allow_special=False)
            assert pair.ours.decode(ids) == text


@pytest.mark.parametrize("name", RUNS)
def test_long_runs(pair, name):
    start = time.perf_counter()
    pair.ours.encode(RUNS[name])
    seconds = time.perf_counter() - start
    pair.check(RUNS[name], decoded=False)
    assert seconds < 2  # measured: at most 0.05


@pytest.mark.parametrize("tail", ["一", "\x01"])
def test_long_run_of_spaces_that_v2_tries_in_vain(v2, tail):
    # Quadratic in the reference, a minute at this length: a tenth of it is compared.
    start = time.perf_counter()
    v2.ours.encode(" " * RUN + tail)
    assert time.perf_counter() - start < 2
    v2.check(" " * 2000 + tail)


def test_long_merges():
    """One word of 10^5 letters whose merges reach across all of it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = {c: i for i, c in enumerate(letters)}, []
    for length in (2**n for n in range(1, 17)):
        merges.append(("a" * (length // 2), "a" * (length // 2)))
        vocab["a" * length] = len(vocab)
    theirs = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    theirs.pre_tokenizer, theirs.decoder = files.byte_level(), decoders.ByteLevel()
    pair = Pair(theirs, theirs.to_str())
    for text in ("a" * RUN, "a" * 65535 + "b" + "a" * 9, "aaab" * (RUN // 4)):
        start = time.perf_counter()
        pair.ours.encode(text)
        assert time.perf_counter() - start < 2
        pair.check(text)


@settings(deadline=None, max_examples=300)
@given(text=st.text(max_size=80))
def test_any_text(v3, v2, text):
    v3.check(text)
    v2.check(text)


pieces = st.sampled_from(
    [*files.CORPUS[:7], files.BOS, files.USER, "<think>", "<｜", "｜>", " ", "  ", "\n", "\r\n", "\t", "a", "É", "1", "123"]
    + ["，", "。", "龥", "の", "ー", "한", "🙂", "\u200d", "\u0301", "!", "?!", "'s", "ø", "ÿ", "\u180e", "\u3000", "\x00"]
)


@settings(deadline=None, max_examples=300)
@given(parts=st.lists(st.one_of(pieces, st.text(max_size=3)), max_size=30))
def test_mixed_text(v3, v2, parts):
    v3.check("".join(parts))
    v2.check("".join(parts))


# First and last letter of an alphabet, or of a part of it.
SCRIPTS = ["az", "AZ", "àÿ", "Āſ", "ΑΩ", "αω", "АЯ", "ая", "את", "ءي", "अह", "กฮ", "აჰ", "ሀፗ", "一龥", "ぁゖ", "ァヺ", "가힣", "！～"]
BETWEEN = [" ", " ", " ", "", "  ", "\n", "\n\n", "\r\n", "\t", ", ", ". ", "。", "、", "! ", " (", ") ", "'s ", "-", "/", "\u3000", "\u200d"]


def multilingual(rng):
    """Words of one or a few scripts, numbers and emoji, with what stands between words there."""
    scripts = rng.sample(SCRIPTS, rng.randint(1, 4))
    parts = []
    for _ in range(rng.randint(1, 25)):
        kind = rng.random()
        if kind < 0.8:
            low, high = rng.choice(scripts)
            parts.append("".join(chr(rng.randint(ord(low), ord(high))) for _ in range(rng.randint(1, 9))))
        elif kind < 0.9:
            parts.append(str(rng.randrange(10 ** rng.randint(1, 12))))
        else:
            parts.append(chr(rng.randint(0x1F300, 0x1F6FF)) + rng.choice(["", "\u200d", "\ufe0f", "\U0001f3fd"]))
        parts.append(rng.choice(BETWEEN))
    return "".join(parts)


def test_multilingual_text():
    """2,000 random strings, on vocabularies large enough that words of every script were merged."""
    rng = random.Random(11)
    corpus = [*files.CORPUS, *(multilingual(rng) for _ in range(3000))]
    for splits in (files.v3_splits(), files.v2_splits()):
        theirs = files.train(splits, vocab_size=6000, corpus=corpus)
        pair = Pair(theirs, theirs.to_str())
        assert pair.ours.vocab_size == 6000
        for _ in range(1000):
            text = multilingual(rng)
            pair.check(text)
            assert pair.ours.decode(pair.ours.encode(text)) == text


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_tokens_decode(v3, v2, data):
    for pair in (v3, v2):
        ids = data.draw(st.lists(st.integers(0, pair.ours.vocab_size - 1), max_size=40))
        pair.check_decode(ids)


@settings(deadline=None, max_examples=300)
@given(data=st.one_of(st.binary(max_size=40), st.lists(st.sampled_from(
    [b"a", b" ", b"\xc3", b"\xa9", b"\xe4", b"\xb8", b"\x80", b"\xed\xa0\x80", b"\xf0\x9f", b"\x99\x82", b"\xff", b"\xc0\xaf",
     b"\xf4\x90\x80\x80", b"\xe0\x80"]), max_size=20).map(b"".join)))
def test_invalid_utf8(v3, data):
    replaced = data.decode("utf-8", errors="replace")
    assert v3.ours.encode(data) == v3.theirs.encode(replaced, add_special_tokens=False).ids
    # The same bytes as tokens come out as the same text, and in pieces that are whole UTF-8.
    bytes_of = {v3.ours.token_bytes(i): i for i in range(2, 258)}
    ids = [bytes_of[bytes([b])] for b in data]
    assert v3.ours.decode(ids) == replaced
    v3.check_decode(ids)


def test_lone_surrogates(v3):
    assert v3.ours.encode("a\ud800b") == v3.ours.encode("a\ufffd\ufffd\ufffdb")


@pytest.mark.parametrize("category", ["\\p{L}", "\\p{M}", "\\p{N}", "\\p{P}", "\\p{S}", "\\p{Z}", "\\P{L}", "\\s", "\\S", ".",
                                      "[^\\r\\n\\p{L}\\p{P}\\p{S}]", "[^\\s\\p{L}\\p{N}]", "(?i:s)", "digits"])
def test_every_code_point_has_its_category(category):
    """A tokenizer that merges "a" with the next byte if the expression puts both in a word."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(letters)}
    merges = [("a", c) for c in letters]
    vocab.update({"a" + c: 256 + i for i, c in enumerate(letters)})
    theirs = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    if category == "digits":
        splits = [files.split("a.|\n"), pre_tokenizers.Digits(individual_digits=True)]
    else:
        splits = [files.split(f"a{category}|.|\n")]
    theirs.pre_tokenizer = pre_tokenizers.Sequence([*splits, files.byte_level()])
    theirs.decoder = decoders.ByteLevel()
    ours = flash_mla_kernels.Tokenizer.from_json(theirs.to_str())
    # Every assigned one; of the planes that are empty or private a sample.
    assigned = [*range(0xD800), *range(0xE000, 0x33000), *range(0xE0000, 0xE0200)]
    points = [chr(c) for c in [*assigned, *range(0x33000, 0x110000, 64)]]
    different = []
    for i in range(0, len(points), 4096):
        text = "".join("a" + c for c in points[i : i + 4096])
        if ours.encode(text) != theirs.encode(text).ids:
            different += [hex(ord(c)) for c in points[i : i + 4096] if ours.encode("a" + c) != theirs.encode("a" + c).ids]
    assert different == []


def test_vocabulary(pair):
    vocab = pair.theirs.get_vocab(with_added_tokens=True)
    assert pair.ours.vocab_size == max(vocab.values()) + 1
    for token, i in vocab.items():
        assert pair.ours.token_to_id(token) == i
        assert pair.ours.id_to_token(i) == token
    assert pair.ours.token_to_id("not a token") == -1
    assert pair.ours.id_to_token(pair.ours.vocab_size) == ""
    special = {i for i in vocab.values() if pair.ours.is_special(i)}
    assert special == {i for i, t in pair.theirs.get_added_tokens_decoder().items() if t.special}


def test_tokens_beyond_the_vocabulary_are_no_text(v3):
    hello = v3.ours.encode("Hello")
    assert v3.ours.decode([*hello, v3.ours.vocab_size, 10**6]) == "Hello"
    with pytest.raises(ValueError, match="token id = -1"):
        v3.ours.decode([-1])


def test_ignore_merges():
    theirs = files.v3()
    content = json.loads(theirs.to_str())
    content["model"]["ignore_merges"] = True
    word = max((t for t in content["model"]["vocab"] if t.isascii() and t.isalpha()), key=len)
    content["model"]["merges"] = [m for m in content["model"]["merges"] if "".join(m) != word]
    pair = Pair(Tokenizer.from_str(json.dumps(content)), json.dumps(content))
    assert pair.ours.encode(word) == [content["model"]["vocab"][word]]
    for text in TEXTS:
        pair.check(text)


def test_gpt2_words():
    theirs = files.train([])
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pair = Pair(theirs, theirs.to_str())
    for text in TEXTS:
        pair.check(text)


def test_template_processing(v3):
    content = json.loads(v3.theirs.to_str())
    content["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": files.BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {files.BOS: {"id": files.BOS, "ids": [0], "tokens": [files.BOS]}},
            },
        ],
    }
    text = json.dumps(content)
    ours, theirs = flash_mla_kernels.Tokenizer.from_json(text), Tokenizer.from_str(text)
    for sample in TEXTS:
        assert ours.encode(sample) == theirs.encode(sample).ids
        assert ours.encode(sample, add_special_tokens=False) == theirs.encode(sample, add_special_tokens=False).ids


def test_directory(v3, tmp_path):
    v3.theirs.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer_config.json: cannot be read; expected it beside tokenizer.json"):
        flash_mla_kernels.Tokenizer(tmp_path)
    plain = v3.ours.encode("Hello")
    config = {"add_bos_token": True, "bos_token": {"content": files.BOS}, "add_eos_token": True, "eos_token": files.EOS}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert flash_mla_kernels.Tokenizer(tmp_path).encode("Hello") == [0, *plain, 1]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<s>"}))
    with pytest.raises(ValueError, match='tokenizer_config.json: bos_token = "<s>"'):
        flash_mla_kernels.Tokenizer(tmp_path)
    with pytest.raises(ValueError, match="missing.*tokenizer.json: cannot be read"):
        flash_mla_kernels.Tokenizer(tmp_path / "missing")
