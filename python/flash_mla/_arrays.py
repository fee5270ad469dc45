"""Outputs of the caller's own kind. torch and NumPy are used when the caller uses them, never imported otherwise."""

import sys
from typing import Any

#: A torch tensor, a NumPy array, or anything else with ``__dlpack__``.
Array = Any


def is_torch(x: Array) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def empty(shape, like: Array, dtype=None) -> Array:
    """Uninitialised memory beside ``like``; ``dtype`` is "float32", "float64" or "int32", by default ``like``'s."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=like.dtype if dtype is None else getattr(torch, dtype), device=like.device)
    import numpy

    if dtype is None:
        dtype = getattr(like, "dtype", None)
        if dtype is None:
            raise ValueError(f"q is of type {type(like).__name__}, expected a torch tensor or an array with a dtype")
        if not isinstance(dtype, numpy.dtype):
            dtype = str(dtype).rsplit(".", 1)[-1]
    return numpy.empty(shape, dtype=dtype)


def shape_of(x: Array, name: str, rank: int) -> tuple:
    """The shape of a tensor of ``rank`` dimensions. Raises ValueError naming the argument."""
    try:
        shape = tuple(x.shape)
    except AttributeError:
        raise ValueError(
            f"{name} is of type {type(x).__name__}, expected a torch tensor, a NumPy array or anything with __dlpack__"
        ) from None
    if len(shape) != rank:
        raise ValueError(f"{name} has shape {shape}, expected a tensor of rank {rank}")
    return shape
