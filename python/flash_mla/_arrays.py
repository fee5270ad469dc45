"""Outputs of the caller's own kind. torch and NumPy are used when the caller uses them, never imported otherwise."""

import sys
from typing import Any, Optional

#: A torch tensor, a NumPy array, or anything else with ``__dlpack__``.
Array = Any

_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


def is_torch(x: Array) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def cuda_device(x: Array) -> Optional[int]:
    """The index of the CUDA device that ``x`` lives on, None for host memory.

    Raises NotImplementedError for device memory of another library than torch: its current stream and its allocator
    are not known here.
    """
    if is_torch(x):
        return x.device.index if x.device.type == "cuda" else None
    device = getattr(x, "__dlpack_device__", None)
    if device is not None and int(device()[0]) in _DLPACK_CUDA:
        raise NotImplementedError(
            f"a {type(x).__module__}.{type(x).__name__} on a GPU is not taken; pass torch tensors (torch.from_dlpack)"
        )
    return None


def current_stream(device: Optional[int]) -> int:
    """The cudaStream_t that torch works on there, 0 for the host."""
    return 0 if device is None else sys.modules["torch"].cuda.current_stream(device).cuda_stream


def workspace_allocator(device: Optional[int]):
    """Scratch memory from torch's allocator, which knows streams and graphs; None for the host."""
    if device is None:
        return None
    torch = sys.modules["torch"]
    return lambda size: torch.empty(size, dtype=torch.uint8, device=torch.device("cuda", device))


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
