"""Choices of tokens: draws whose bits depend on nothing but a row, its limits and its key."""

import operator
from typing import Optional, Tuple, Union

from . import _C
from ._arrays import Array, cuda_device, current_stream, empty, shape_of

Number = Union[float, Array]

_LIMITS = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


def sample_tokens(
    scores: Array,
    *,
    probabilities: bool = False,
    temperature: Number = 1.0,
    top_k: Union[int, Array] = 0,
    top_p: Number = 1.0,
    min_p: Number = 0.0,
    joint: bool = False,
    seed: Union[int, Array] = 0,
    position: Union[int, Array] = 0,
    indices: Optional[Array] = None,
    rows: Optional[Array] = None,
    out: Optional[Array] = None,
    valid: Optional[Array] = None,
    num_threads: int = 0,
) -> Array:
    """A token from each row: of those whose weight is at least min_p of the likeliest's the top_k likeliest, of these the fewest
    that together reach top_p of their sum (``joint``: of the sum before top_k cuts), and of these one at random.

    scores: (n, vocab) float32, float16 or bfloat16, vocab up to 2^20 - 1: logits, of which -inf excludes a token, or
    ``probabilities`` >= 0, which need not add up to 1. temperature (0: the likeliest token), top_k (0: all), top_p and min_p
    are a number for all rows or an array (n,). Weights are whole numbers, 2^44 for the likeliest token of a row, so that a draw
    has the same bits on every machine; of equally likely tokens the one with the smaller id counts as likelier.

    Randomness is a pure function (Philox 4x32-10) of seed, index and position: numbers for all draws, or int64 arrays (m,);
    ``indices`` is the number of the draw in the call by default. The engine's draws are those of a request's seed, the number
    of its continuation and the token's position. ``rows`` (m,) int32 or int64: the row of each draw, each its own by default.

    Returns tokens (m,) int32, or ``out``. ``valid`` (m,) uint8 gets 0 where a row has no token that is possible, whose token is
    -1; without it that raises ValueError on the CPU, as NaN, +inf and negative probabilities do. On a GPU, where nobody reads
    scores on the host, the work is queued on torch's current stream.
    """
    n, _ = shape_of(scores, "scores", 2)
    tensors = dict(scores=scores, rows=rows, indices=indices, valid=valid)
    options = _options(tensors, probabilities, joint, num_threads, temperature, top_k, top_p, min_p)
    _key(tensors, options, seed, position)
    m = n if rows is None else shape_of(rows, "rows", 1)[0]
    tensors["tokens"] = empty((m,), scores, "int32") if out is None else out
    _C.sample_tokens(tensors, options)
    return tensors["tokens"]


def filter_tokens(
    scores: Array,
    *,
    probabilities: bool = False,
    temperature: Number = 1.0,
    top_k: Union[int, Array] = 0,
    top_p: Number = 1.0,
    min_p: Number = 0.0,
    joint: bool = False,
    out: Optional[Array] = None,
    num_threads: int = 0,
) -> Array:
    """What sample_tokens draws from: probabilities of the tokens that stay over their sum, and 0 for the others; or their logits
    as they are, and -inf.

    Arguments as sample_tokens takes them. Returns ``out`` (n, vocab) of scores' dtype, which may be scores. Without top_p and
    min_p tokens stay that are too unlikely to be drawn.
    """
    shape = shape_of(scores, "scores", 2)
    tensors = dict(scores=scores, out=empty(shape, scores) if out is None else out)
    options = _options(tensors, probabilities, joint, num_threads, temperature, top_k, top_p, min_p)
    _C.filter_tokens(tensors, options)
    return tensors["out"]


def token_probabilities(
    logits: Array, *, temperature: Number = 1.0, out: Optional[Array] = None, num_threads: int = 0
) -> Array:
    """softmax(logits / temperature) of every row, sums in float64; at temperature 0 it is 1 for the likeliest token.

    logits: (n, vocab) float32, float16 or bfloat16; temperature: a number or an array (n,). Returns ``out`` (n, vocab) float32,
    or of logits' dtype where it is given so. Raises ValueError naming the argument.
    """
    shape = shape_of(logits, "logits", 2)
    tensors = dict(logits=logits, out=empty(shape, logits, "float32") if out is None else out)
    _C.token_probabilities(tensors, _options(tensors, False, False, num_threads, temperature))
    return tensors["out"]


def speculative_sampling(
    draft_probs: Array,
    draft_tokens: Array,
    target_probs: Array,
    *,
    seed: Union[int, Array] = 0,
    position: Union[int, Array] = 0,
    indices: Optional[Array] = None,
    num_threads: int = 0,
) -> Tuple[Array, Array, Array]:
    """Which drafts a target model accepts, and the token behind them: tokens distributed as the target's (arXiv 2211.17192,
    2302.01318).

    draft_probs: (b, n, vocab); draft_tokens: (b, n) int32 or int64, drawn from them; target_probs: (b, n + 1, vocab), the same
    dtype. Draft i is accepted with probability min(1, q / p); the first that is not is replaced by a draw from max(q - p, 0),
    and behind n accepted ones comes one from the last q. seed, position and indices as in sample_tokens, of b chains; a chain's
    i-th token has the position ``position`` + i.

    Returns tokens (b, n + 1) int32, -1 behind the last; accepted (b,) int32, drafts that would be accepted each by itself; and
    emitted (b,) int32, those before the first that was not. Raises ValueError naming the argument.
    """
    b, n, _ = shape_of(draft_probs, "draft_probs", 3)
    tensors = dict(draft_probs=draft_probs, draft_tokens=draft_tokens, target_probs=target_probs, indices=indices)
    options = _options(tensors, True, False, num_threads)
    _key(tensors, options, seed, position)
    results = dict(tokens=(b, n + 1), accepted=(b,), emitted=(b,))
    tensors.update({name: empty(shape, draft_probs, "int32") for name, shape in results.items()})
    _C.speculative_sampling(tensors, options)
    return tuple(tensors[name] for name in results)


def _options(tensors, probabilities, joint, num_threads, *limits) -> dict:
    """The numbers of a call; limits that are arrays go to ``tensors``."""
    options = dict(_LIMITS, probabilities=bool(probabilities), joint=bool(joint), num_threads=num_threads)
    options.update(seed=0, position=0, stream=current_stream(cuda_device(next(iter(tensors.values())))))
    for name, value in zip(_LIMITS, limits):
        _put(tensors, options, name, name, value, int if name == "top_k" else float)
    return options


def _key(tensors, options, seed, position) -> None:
    for name, tensor, value in (("seed", "seeds", seed), ("position", "positions", position)):
        _put(tensors, options, name, tensor, value, lambda x: operator.index(x) % (1 << 64))


def _put(tensors, options, name, tensor_name, value, number) -> None:
    if getattr(value, "shape", ()) or hasattr(value, "__dlpack__") and not hasattr(value, "shape"):
        cuda_device(value)
        tensors[tensor_name] = value
        return
    try:
        options[name] = number(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {value!r}, expected a number or an array of one for each row") from None
    if name == "top_k" and not 0 <= options[name] < 1 << 63:
        raise ValueError(f"top_k is {value!r}, expected >= 0 (0: all)")
