"""Which experts a token goes to."""

from typing import Optional, Tuple

from . import _C
from ._arrays import Array, count, cuda_device, current_stream, empty, shape_of


def choose_experts(
    logits: Array,
    k: int,
    *,
    bias: Optional[Array] = None,
    scores: str = "softmax",
    num_groups: int = 1,
    groups_kept: int = 1,
    groups_by_best_two: bool = False,
    normalise: bool = False,
    scale: float = 1.0,
    out: Optional[Tuple[Array, Array]] = None,
    num_threads: int = 0,
) -> Tuple[Array, Array]:
    """The k experts of every token and what their outputs are weighed with: DeepSeek-V2's routing (arXiv 2405.04434, section
    2.2.2) and V3's (arXiv 2412.19437, section 2.1.2).

    logits: (n, num_experts) float32, float16 or bfloat16, a router's outputs, finite. scores: "softmax" over all experts, or
    "sigmoid" of each by itself. ``bias`` (num_experts,) is added to the scores that choose and not to the weights. With
    num_groups > 1 only the experts of the best groups_kept groups are in the running; a group is worth its best score, or with
    ``groups_by_best_two`` the sum of its two best. ``normalise``: weights are divided by their sum; all are multiplied by
    ``scale``. DeepSeek-V3: scores="sigmoid", num_groups=8, groups_kept=4, groups_by_best_two=True, normalise=True, scale=2.5.

    Returns ids (n, k) int32, best first, of equals the lower id first, and weights (n, k) float32; or ``out``, such a pair,
    whose weights may have logits' dtype. Raises ValueError naming the argument, NotImplementedError for a GPU's tensors that its
    kernel does not take.
    """
    n, _ = shape_of(logits, "logits", 2)
    k = count(k, "k")
    ids, weights = (empty((n, k), logits, "int32"), empty((n, k), logits, "float32")) if out is None else out
    _C.choose_experts(
        dict(logits=logits, bias=bias, ids=ids, weights=weights),
        scores,
        num_groups,
        groups_kept,
        bool(groups_by_best_two),
        bool(normalise),
        float(scale),
        num_threads,
        stream=current_stream(cuda_device(logits)),
    )
    return ids, weights
