"""The forward pass of a DeepSeek-V2 or V3 checkpoint over a paged latent cache, on the CPU.

A thin door to the C++ model, for tests and experiments: the caller owns the block table.
"""

import os

import numpy as np

from . import _C

PAGE_SIZE = 64


def _ints(values, ndim=1):
    array = np.ascontiguousarray(values, dtype=np.int32)
    return array.reshape(0) if array.size == 0 and ndim == 1 else array


class Model:
    """A model directory in Hugging Face's format (config.json and safetensors), loaded.

    ``precision``: of weights, activations and cache; "float32", "bfloat16", or "auto" for bfloat16 where the
    processor multiplies it natively. ``quantize``: of the weights, "none" (as stored), "int8", "fp8" or "w4a8".
    ``kv_cache``: of the cache's rows; "auto" as precision says, "bfloat16", "float16", or "fp8" for 656 bytes per token
    and layer. ``num_threads``: 0 for as many as OpenMP would use.

    Raises ``ValueError`` for a malformed checkpoint and ``NotImplementedError`` for one that the library does not run.
    """

    def __init__(self, directory, *, precision="auto", quantize="none", kv_cache="auto", num_threads=0):
        self._model = _C.load_model(os.fspath(directory), precision, quantize, kv_cache, num_threads)
        self.num_pages = 0

    @property
    def vocab_size(self):
        return self._model.vocab_size

    @property
    def max_position(self):
        """Longest sequence, in tokens."""
        return self._model.max_position

    @property
    def bytes_per_page(self):
        """Cache bytes of PAGE_SIZE tokens, over all layers."""
        return self._model.bytes_per_page

    def allocate_cache(self, num_pages):
        """A fresh cache of ``num_pages`` pages of PAGE_SIZE tokens."""
        self._model.allocate_cache(num_pages)
        self.num_pages = num_pages

    def copy_page(self, source, target):
        """Copies one page of the cache, in every layer."""
        self._model.copy_page(source, target)

    def forward(self, token_ids, query_starts, seq_lens, block_table, logit_rows=None, *, batch_invariant=False):
        """One step over several sequences; returns logits (len(logit_rows), vocab_size) float32.

        ``token_ids`` (num_tokens): the new tokens, sequence after sequence; ``query_starts`` (num_seqs + 1): where
        each sequence's begin; ``seq_lens`` (num_seqs): its tokens once these are appended; ``block_table``
        (num_seqs, max_blocks): its pages; ``logit_rows``: tokens whose logits are wanted, all by default. All int32.
        ``batch_invariant``: the same bits for a sequence whatever else is in the batch.

        Raises ``ValueError`` for an argument out of range.
        """
        token_ids = _ints(token_ids)
        logit_rows = np.arange(len(token_ids), dtype=np.int32) if logit_rows is None else _ints(logit_rows)
        logits = np.empty((len(logit_rows), self.vocab_size), dtype=np.float32)
        self._model.forward(
            token_ids,
            _ints(query_starts),
            _ints(seq_lens),
            _ints(block_table, 2),
            logit_rows,
            batch_invariant,
            logits,
        )
        return logits
