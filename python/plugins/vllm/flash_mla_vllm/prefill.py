"""Our prefill kernel as an MLA prefill backend of vLLM, on Hopper GPUs."""

import torch
from vllm.v1.attention.backends.mla.prefill.base import MLADimensions, MLAPrefillBackend

from flash_mla_kernels import dense_prefill

from .hopper import why_not_available

_DEEPSEEK = MLADimensions(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


class FlashMLAPrefillBackend(MLAPrefillBackend):
    supported_mla_dimensions = [_DEEPSEEK]  # noqa: RUF012 (as vLLM has it)

    @staticmethod
    def get_name():
        return "CUSTOM"

    @classmethod
    def supports_compute_capability(cls, device_capability):
        return (device_capability.major, device_capability.minor) == (9, 0)

    def __init__(self, *arguments, **dimensions):
        reason = why_not_available()
        if reason is not None:
            raise RuntimeError(reason)
        super().__init__(*arguments, **dimensions)

    def supports_out(self):
        return True

    def run_prefill_new_tokens(self, q, k, v, return_softmax_lse, out=None, output_scale=None):
        if output_scale is not None:
            raise ValueError("output_scale is given, expected None: out is not quantised here")
        starts = self._prefill_metadata.query_start_loc
        out, lse = attend(q, k, v, starts, starts, self.scale, True, out)
        return (out, lse) if return_softmax_lse else out

    def run_prefill_context_chunk(self, chunk=None, q=None, k=None, v=None, out=None, chunk_idx=None):
        """A part of what prompts have in the cache already. vLLM 0.26 and 0.27 give its number, later ones the chunk."""
        if chunk is not None:
            starts, context_starts = chunk.query_start_loc, chunk.cu_seq_lens
        else:
            starts = self._prefill_metadata.query_start_loc
            context_starts = self._prefill_metadata.chunked_context.cu_seq_lens[chunk_idx]
        return attend(q, k, v, starts, context_starts, self.scale, False, out)


def attend(q, k, v, starts_q, starts_k, scale, causal, out):
    """out (tokens, heads, 128) and lse (heads, tokens). k: (tokens, heads, 192), in whose last 64 columns vLLM has put the
    same values for every head: read are those of the first."""
    return dense_prefill(
        q,
        k[..., :128],
        k[:, 0, 128:],
        v,
        starts_q.to(torch.int32),
        starts_k.to(torch.int32),
        softmax_scale=scale,
        causal=causal,
        out=out,
    )
