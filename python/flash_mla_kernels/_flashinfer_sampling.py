"""FlashInfer's names for choices of tokens and experts: part of flash_mla_kernels.flashinfer, which says what holds for all of it.

Draws are the library's: a seed and an offset give the same tokens on every machine, not those that FlashInfer draws.
"""

from typing import Optional, Tuple, Union

import torch

from ._routing import choose_experts
from ._sampling import filter_tokens, sample_tokens, speculative_sampling, token_probabilities

_Limit = Union[torch.Tensor, int, float]
_Key = Optional[Union[int, torch.Tensor]]
_Samples = Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]


def softmax(
    logits: torch.Tensor,
    temperature: Optional[Union[torch.Tensor, float]] = None,
    enable_pdl: Optional[bool] = None,
) -> torch.Tensor:
    """softmax(logits / temperature) in float32; temperature is a number or (rows,)."""
    return token_probabilities(logits, temperature=1.0 if temperature is None else _floats(temperature))


def sampling_from_logits(
    logits: torch.Tensor,
    indices: Optional[torch.Tensor] = None,
    deterministic: bool = True,
    generator: Optional[torch.Generator] = None,
    check_nan: bool = False,
    seed: _Key = None,
    offset: _Key = None,
) -> torch.Tensor:
    """A token from each row of logits, or for each of ``indices`` from that row."""
    return _sample(logits, False, indices, generator, seed, offset)


def sampling_from_probs(
    probs: torch.Tensor,
    indices: Optional[torch.Tensor] = None,
    deterministic: bool = True,
    generator: Optional[torch.Generator] = None,
    check_nan: bool = False,
    seed: _Key = None,
    offset: _Key = None,
    return_valid: bool = False,
) -> _Samples:
    """A token from each row of probs. return_valid: also whether the row had one; without it, a row that has none raises
    ValueError."""
    return _sample(probs, True, indices, generator, seed, offset, return_valid)


def top_p_sampling_from_probs(
    probs: torch.Tensor,
    top_p: Union[torch.Tensor, float],
    indices: Optional[torch.Tensor] = None,
    deterministic: bool = True,
    generator: Optional[torch.Generator] = None,
    check_nan: bool = False,
    seed: _Key = None,
    offset: _Key = None,
    return_valid: bool = False,
) -> _Samples:
    """Of the fewest likeliest tokens that together reach top_p."""
    return _sample(probs, True, indices, generator, seed, offset, return_valid, top_p=_floats(top_p))


def top_k_sampling_from_probs(
    probs: torch.Tensor,
    top_k: Union[torch.Tensor, int],
    indices: Optional[torch.Tensor] = None,
    deterministic: bool = True,
    generator: Optional[torch.Generator] = None,
    check_nan: bool = False,
    seed: _Key = None,
    offset: _Key = None,
    return_valid: bool = False,
) -> _Samples:
    """Of the top_k likeliest tokens."""
    return _sample(probs, True, indices, generator, seed, offset, return_valid, top_k=_positive(top_k))


def min_p_sampling_from_probs(
    probs: torch.Tensor,
    min_p: Union[torch.Tensor, float],
    indices: Optional[torch.Tensor] = None,
    deterministic: bool = True,
    generator: Optional[torch.Generator] = None,
    check_nan: bool = False,
    seed: _Key = None,
    offset: _Key = None,
    return_valid: bool = False,
) -> _Samples:
    """Of the tokens at least min_p times as likely as the likeliest."""
    return _sample(probs, True, indices, generator, seed, offset, return_valid, min_p=_floats(min_p))


def top_k_top_p_sampling_from_logits(
    logits: torch.Tensor,
    top_k: Union[torch.Tensor, int],
    top_p: Union[torch.Tensor, float],
    indices: Optional[torch.Tensor] = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: Optional[torch.Generator] = None,
    check_nan: bool = False,
    seed: _Key = None,
    offset: _Key = None,
    top_k_max: Optional[int] = None,
) -> torch.Tensor:
    """Of the top_k likeliest tokens those that reach top_p of their sum; "joint": of the sum of all."""
    limits = dict(top_k=_positive(top_k), top_p=_floats(top_p), joint=_joint(filter_apply_order))
    return _sample(logits, False, indices, generator, seed, offset, **limits)


def top_k_top_p_sampling_from_probs(
    probs: torch.Tensor,
    top_k: Union[torch.Tensor, int],
    top_p: Union[torch.Tensor, float],
    indices: Optional[torch.Tensor] = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: Optional[torch.Generator] = None,
    check_nan: bool = False,
    seed: _Key = None,
    offset: _Key = None,
    return_valid: bool = False,
    top_k_max: Optional[int] = None,
) -> _Samples:
    """top_k_top_p_sampling_from_logits of probabilities."""
    limits = dict(top_k=_positive(top_k), top_p=_floats(top_p), joint=_joint(filter_apply_order))
    return _sample(probs, True, indices, generator, seed, offset, return_valid, **limits)


def top_p_renorm_probs(
    probs: torch.Tensor, top_p: Union[torch.Tensor, float], is_deterministic: bool = False
) -> torch.Tensor:
    """What top_p_sampling_from_probs draws from: these probabilities over their sum, and 0."""
    return filter_tokens(probs, probabilities=True, top_p=_floats(top_p))


def top_k_renorm_probs(
    probs: torch.Tensor, top_k: Union[torch.Tensor, int], is_deterministic: bool = False
) -> torch.Tensor:
    """What top_k_sampling_from_probs draws from: these probabilities over their sum, and 0."""
    return filter_tokens(probs, probabilities=True, top_k=_positive(top_k))


def top_k_mask_logits(logits: torch.Tensor, top_k: Union[torch.Tensor, int]) -> torch.Tensor:
    """The top_k largest logits of each row, and -inf."""
    return filter_tokens(logits, top_k=_positive(top_k))


top_p_renorm_prob = top_p_renorm_probs
top_k_renorm_prob = top_k_renorm_probs


def chain_speculative_sampling(
    draft_probs: torch.Tensor,
    draft_token_ids: torch.Tensor,
    target_probs: torch.Tensor,
    maybe_output_accepted_token_num: Optional[torch.Tensor] = None,
    maybe_output_emitted_draft_token_num: Optional[torch.Tensor] = None,
    deterministic: bool = True,
    generator: Optional[torch.Generator] = None,
    seed: _Key = None,
    offset: _Key = None,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens (chains, drafts + 1), -1 behind the last; drafts acceptable each by itself, and drafts emitted, added to the
    tensors that are given."""
    key = _key(generator, seed, offset, draft_probs.shape[0])
    tokens, *counts = speculative_sampling(draft_probs, draft_token_ids, target_probs, **key)
    given = (maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num)
    return (tokens, *(new if old is None else old.add_(new) for old, new in zip(given, counts)))


def fused_topk_deepseek(
    scores: torch.Tensor,
    bias: torch.Tensor,
    n_group: int,
    topk_group: int,
    topk: int,
    routed_scaling_factor: float,
    topk_values: torch.Tensor,
    topk_indices: torch.Tensor,
    launch_with_pdl: bool = True,
    routing_replay_out: Optional[torch.Tensor] = None,
    *,
    backend: str = "default",
) -> None:
    """DeepSeek-V3's routing: scores (tokens, experts) before the sigmoid; weights to topk_values, experts to topk_indices, int32,
    both (tokens, topk)."""
    choose_experts(
        scores,
        topk,
        bias=bias,
        scores="sigmoid",
        num_groups=n_group,
        groups_kept=topk_group,
        groups_by_best_two=True,
        normalise=True,
        scale=routed_scaling_factor,
        out=(topk_indices, topk_values),
    )
    if routing_replay_out is not None:
        routing_replay_out[: scores.shape[0]] = topk_indices


def _floats(x: Union[torch.Tensor, float]):
    return x.float() if isinstance(x, torch.Tensor) else x


def _positive(top_k: Union[torch.Tensor, int]):
    tensor = isinstance(top_k, torch.Tensor)
    # A GPU's numbers are not read on the host.
    if (not top_k.is_cuda and (top_k < 1).any()) if tensor else top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected >= 1")
    return top_k


def _joint(order: str) -> bool:
    if order not in ("top_k_first", "joint"):
        raise ValueError(f'filter_apply_order is {order!r}, expected "top_k_first" or "joint"')
    return order == "joint"


def _key(generator: Optional[torch.Generator], seed: _Key, offset: _Key, draws: int) -> dict:
    """A call's key; without a seed one from the generator, torch's own by default, which it moves on."""
    if seed is None:
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(1 << 62, (1,), generator=generator, device=device))
    return dict(seed=_of_draws(seed, draws), position=_of_draws(0 if offset is None else offset, draws))


def _of_draws(x: Union[int, torch.Tensor], draws: int):
    if not isinstance(x, torch.Tensor):
        return x
    x = x.view(torch.int64)  # of uint64 the same bits
    return x.expand(draws).contiguous() if x.numel() == 1 else x


def _sample(scores, probabilities, indices, generator, seed, offset, return_valid=False, **limits) -> _Samples:
    draws = scores.shape[0] if indices is None else indices.shape[0]
    tokens = torch.empty(draws, dtype=torch.int32 if indices is None else indices.dtype, device=scores.device)
    valid = torch.empty(draws, dtype=torch.uint8, device=scores.device) if return_valid else None
    sample_tokens(
        scores,
        probabilities=probabilities,
        rows=indices,
        out=tokens,
        valid=valid,
        **_key(generator, seed, offset, draws),
        **limits,
    )
    return (tokens, valid.bool()) if return_valid else tokens
