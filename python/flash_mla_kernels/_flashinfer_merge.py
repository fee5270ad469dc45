"""FlashInfer's names for merging: part of flash_mla_kernels.flashinfer, which says what holds for all of it."""

import math
from typing import Optional, Tuple

import torch

from ._library import merge_states as _merge_states
from ._pages import merge_states_in_place


def merge_state(v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor):
    """v (tokens, heads, d) and s (tokens, heads), base 2, of the same queries over two disjoint sets of keys: (v, s)."""
    v, s = _merge_states(
        *(x for v, s in ((v_a, s_a), (v_b, s_b)) for x in (v.unsqueeze(0), s.t().unsqueeze(0))), base="2"
    )
    return v[0], _minus_inf_(s[0].t())


def merge_state_in_place(
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor,
    s_other: torch.Tensor,
    mask: Optional[torch.Tensor] = None,
) -> None:
    """merge_state into v and s, of the tokens that the mask (tokens) lets through."""
    if mask is not None and v.is_cuda:  # the kernel there takes no mask
        merged_v, merged_s = merge_state(v, s, v_other, s_other)
        v.copy_(torch.where(mask.bool()[:, None, None], merged_v, v))
        s.copy_(torch.where(mask.bool()[:, None], merged_s, s))
        return
    states = (v[None], s.t()[None], v_other[None], s_other.t()[None])
    merge_states_in_place(*states, mask=None if mask is None else mask.bool().view(torch.uint8)[None], base="2")
    _minus_inf_(s)


def merge_states(v: torch.Tensor, s: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """v (tokens, states, heads, d) and s (tokens, states, heads), base 2: all states of a token merged, in order."""
    merged = (v[:, 0].contiguous(), s[:, 0].contiguous())
    for i in range(1, v.shape[1]):
        merge_state_in_place(*merged, v[:, i], s[:, i])
    return merged


def base_2(lse: torch.Tensor) -> torch.Tensor:
    """lse (tokens, heads) of the library, base e and +inf where no key is seen, as FlashInfer's: base 2 and -inf."""
    return _minus_inf_(lse * math.log2(math.e)).contiguous()


def _minus_inf_(s: torch.Tensor) -> torch.Tensor:
    """What sees no key, in FlashInfer's way."""
    return s.masked_fill_(s == math.inf, -math.inf)
