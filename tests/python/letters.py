"""A random checkpoint whose tokens are the bytes, then <bos> and <eos>."""

from checkpoints import CONFIGS, V3
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

VOCAB_SIZE = 264
EOS = 257
CONFIGS["letters"] = (*V3, dict(CONFIGS["v3"][2], vocab_size=VOCAB_SIZE, eos_token_id=EOS, bos_token_id=256))


def write_tokenizer(directory):
    """Every byte a token, then <bos> and <eos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    return tokenizer
