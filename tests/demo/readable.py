"""Whether a text reads like English prose: long enough, made of words that occur in English, not going in circles.

    python3 tests/demo/readable.py build/demo/text.txt

Knows nothing of the text itself, which differs between machines. It first makes sure that it refuses what a broken
model would write: noise, the model's vocabulary in random order, one sentence again and again.
"""

import json
import pathlib
import random
import re
import sys

MODEL = pathlib.Path(__file__).resolve().parents[2] / "models" / "small"
# The commonest words of English make up about half of any prose, whoever writes it and about what.
COMMON = set(
    """a about after all am an and any are as at be been before but by could did do for from had has have he her him
    his how i if in into is it its me more most much must my no not now of on one or our out said shall she should so
    some such than that the thee their them then there these they this thou thy to unto up upon us very was we were
    what when which who will with would you your""".split()
)


def complaints(text):
    """What speaks against the text; empty if it is readable."""
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())
    if len(words) < 40:
        return [f"{len(words)} words, expected at least 40"]
    found = []
    letters = sum(c.isalpha() or c in " \n.,;:!?'\"-_()" for c in text) / len(text)
    if letters < 0.95:
        found.append(f"{letters:.0%} of the characters are letters or punctuation, expected 95%")
    common = sum(word in COMMON for word in words) / len(words)
    if common < 0.35:
        found.append(f"{common:.0%} of the words are common ones, expected at least 35%")
    runs = list(zip(*(words[i:] for i in range(4))))
    distinct = len(set(runs)) / len(runs)
    if distinct < 0.8:
        found.append(f"{distinct:.0%} of the runs of four words are distinct, expected at least 80%")
    return found


def broken_texts():
    draw = random.Random(0)
    vocabulary = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    yield "nothing", ""
    yield "noise", "".join(chr(draw.randrange(33, 127)) for _ in range(600))
    yield "random tokens", "".join(draw.choices(list(vocabulary), k=120)).replace("Ġ", " ").replace("Ċ", "\n")
    yield "circles", "She was very much pleased with him. " * 15


def main():
    for name, text in broken_texts():
        if not complaints(text):
            sys.exit(f"the check is broken: it takes {name} for prose")
    found = complaints(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
    if found:
        sys.exit(f"{sys.argv[1]} is not readable: {'; '.join(found)}")
    print(f"{sys.argv[1]}: readable")


if __name__ == "__main__":
    main()
