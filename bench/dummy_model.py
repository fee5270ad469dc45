"""Writes a model directory without weights, for `flash-mla serve --load-format dummy`: a load test without a checkpoint.

    python3 bench/dummy_model.py DIR
    flash-mla serve --model DIR --load-format dummy

The shape is --config's (DeepSeek-V2-Lite), the tokenizer --tokenizer's (models/small) with made-up words behind its
own: every token that the model can generate has a text, so that as much is streamed as from a trained model.
"""

import argparse
import json
import pathlib
import shutil

ROOT = pathlib.Path(__file__).resolve().parents[1]


def word(number):
    """Letters that no other number has; a token of its own in the byte-level alphabet, with the space in front."""
    letters = ""
    while number:
        number, letter = divmod(number, 26)
        letters = chr(ord("a") + letter) + letters
    return "\u0120" + letters


def widened(tokenizer, vocab_size):
    vocab = tokenizer["model"]["vocab"]
    taken = set(vocab.values()) | {token["id"] for token in tokenizer.get("added_tokens", [])}
    if max(taken) >= vocab_size:
        raise SystemExit(f"the tokenizer has token {max(taken)}, expected less than the model's vocab_size, {vocab_size}")
    number = 26**3  # words of four letters
    for token in sorted(set(range(vocab_size)) - taken):
        while word(number) in vocab:
            number += 1
        vocab[word(number)] = token
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--config", type=pathlib.Path, default=ROOT / "data/models/deepseek-v2-lite.json", help="a config.json")
    parser.add_argument("--tokenizer", type=pathlib.Path, default=ROOT / "models/small", help="a model directory")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(arguments.config, arguments.directory / "config.json")
    config = json.loads(arguments.config.read_text(encoding="utf-8"))
    tokenizer = json.loads((arguments.tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    text = json.dumps(widened(tokenizer, config["vocab_size"]), ensure_ascii=False)
    (arguments.directory / "tokenizer.json").write_text(text, encoding="utf-8")
    if (arguments.tokenizer / "tokenizer_config.json").exists():
        shutil.copyfile(arguments.tokenizer / "tokenizer_config.json", arguments.directory / "tokenizer_config.json")


if __name__ == "__main__":
    main()
