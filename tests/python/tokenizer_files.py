"""Small tokenizer.json files of the same make as DeepSeek-V2's and V3's, trained on the spot."""

import itertools
import json
import sys
import unicodedata

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Dogs don't mind; foxes do!",
    "for (int i = 0; i < 10; ++i) {\n    total += values[i] * 2;\n}\n\n",
    "敏捷的棕色狐狸跳过了懒狗。今天天气很好，我们去公园吧。",
    "いろはにほへと ちりぬるを カタカナ 한국어 문장도 있습니다",
    "Это предложение на русском языке, а это число: 1234567 и 3.14159",
    "naïve café Ångström Straße ﬁne 🙂🙃👩‍👩‍👧‍👦 e\u0301a\u0308 ٣٤٥ १२३",
    "   indented\n\ttabs\r\n\r\nwindows   \n  spaces   ",
] * 20


def ranges(wanted):
    """The body of a class of the code points for which wanted holds."""
    out = []
    points = (c for c in range(0x80, sys.maxunicode + 1) if wanted(chr(c)))
    for _, run in itertools.groupby(enumerate(points), lambda x: x[1] - x[0]):
        run = [point for _, point in run]
        out.append(chr(run[0]) if len(run) == 1 else f"{chr(run[0])}-{chr(run[-1])}")
    return "".join(out)


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def v3_splits():
    return [
        split(r"\p{N}{1,3}"),
        split("[一-龥\u3040-ゟ゠-ヿ]+"),
        split(
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
            "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
            "| ?[\\p{P}\\p{S}]+[\r\n]*"
            "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
        ),
    ]


def v2_splits():
    cased = ranges(lambda c: unicodedata.category(c) in ("Lu", "Ll", "Lt"))
    return [
        split("[\r\n]"),
        split(rf"\s?[A-Za-z{cased}]+"),
        split(r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+".replace(r"\u3000", "\u3000")),
        split(r"\s+$"),
        split("[一-龥ࠀ-一가-\ud7ff]+"),
        pre_tokenizers.Digits(individual_digits=True),
    ]


def byte_level():
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def train(splits, *, vocab_size=700, added=(), corpus=CORPUS):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level()])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, normalized=False, special=True) for t in (BOS, EOS)],
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def plain(text, **options):
    return AddedToken(text, special=False, **{"normalized": False, **options})


def v3():
    tokenizer = train(
        v3_splits(), added=[plain(USER), plain(ASSISTANT), plain("<think>"), plain("</think>"), plain("<thinker>")]
    )
    tokenizer.add_special_tokens([AddedToken("<|EOT|>", normalized=False, special=True)])
    return tokenizer


def v2():
    """As V2 has it: the special tokens are "normalized", and some letters of the alphabet are added tokens."""
    tokenizer = train(v2_splits(), added=[plain("ø", normalized=True), plain("ÿ", normalized=True)])
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["normalized"] = True
    content["normalizer"] = {"type": "Sequence", "normalizers": []}
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    return tokenizers.Tokenizer.from_str(json.dumps(content)), json.dumps(content)
