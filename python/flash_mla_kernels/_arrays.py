"""Outputs of the caller's own kind. torch and NumPy are used when the caller uses them, never imported otherwise."""

import operator
import sys
from functools import lru_cache
from typing import Any, Optional

from . import _C

#: A torch tensor, a NumPy array, or anything else with ``__dlpack__``.
Array = Any

_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


def is_torch(x: Array) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def traced(x: Array) -> bool:
    """Whether torch only follows the call instead of running it: under torch.compile, torch.export or a dispatch mode,
    and with fake tensors. Then it must see operators of its own (_torch.py); otherwise they would only cost time."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return False
    if torch.compiler.is_compiling():
        return True
    return type(x) is not torch.Tensor and type(x) is not torch.nn.Parameter or _mode_is_active(torch)


def _mode_is_active(torch) -> bool:
    depth = getattr(torch._C, "_len_torch_dispatch_stack", None)
    return depth is not None and depth() > 0


def output(out: Optional[Array], shape, like: Array, dtype=None) -> Array:
    """``out``, checked, or memory for it. Raises ValueError naming it."""
    if out is None:
        return empty(shape, like, dtype)
    if tuple(shape_of(out, "out", len(shape))) != tuple(shape):
        raise ValueError(f"out has shape {tuple(out.shape)}, expected {tuple(shape)}")
    if is_torch(out) != is_torch(like):
        raise ValueError(f"out is a {type(out).__name__}, expected a {type(like).__name__} as q is")
    if is_torch(out) and not out.is_contiguous():
        raise ValueError(f"out has strides {out.stride()}, expected it to be contiguous")
    return out


def cuda_device(x: Array) -> Optional[int]:
    """The index of the CUDA device that ``x`` lives on, None for host memory.

    Raises NotImplementedError for device memory of another library than torch: its current stream and its allocator
    are not known here.
    """
    if is_torch(x):
        return x.get_device() if x.is_cuda else None
    device = getattr(x, "__dlpack_device__", None)
    if device is not None and int(device()[0]) in _DLPACK_CUDA:
        raise NotImplementedError(
            f"a {type(x).__module__}.{type(x).__name__} on a GPU is not taken; pass torch tensors (torch.from_dlpack)"
        )
    return None


def current_stream(device: Optional[int]) -> int:
    """The cudaStream_t that torch works on there, 0 for the host."""
    if device is None:
        return 0
    torch = sys.modules["torch"]
    # What compiled code of torch's asks for: without the object that torch.cuda.current_stream makes of it.
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return torch.cuda.current_stream(device).cuda_stream if raw is None else raw(device)


def workspace_allocator(device: Optional[int]):
    """Scratch memory from torch's allocator, which knows streams and graphs; None for the host."""
    if device is None:
        return None
    torch = sys.modules["torch"]
    return lambda size: torch.empty(size, dtype=torch.uint8, device=_cuda(device))


@lru_cache(maxsize=None)
def _cuda(index: int):
    return sys.modules["torch"].device("cuda", index)


def empty(shape, like: Array, dtype=None) -> Array:
    """Uninitialised memory of ``like``'s kind (NumPy's for what is no torch tensor); ``dtype`` is "float32", "float64"
    or "int32", by default ``like``'s."""
    if is_torch(like):
        if dtype is None:
            return like.new_empty(shape)
        return like.new_empty(shape, dtype=getattr(sys.modules["torch"], dtype))
    import numpy

    if dtype is None:
        dtype = _C.shape_and_dtype(like, "q")[1]
    if dtype == "bfloat16":
        dtype = _bfloat16()
    return numpy.empty(shape, dtype=dtype)


def _bfloat16():
    try:
        import ml_dtypes
    except ImportError:
        raise ValueError(
            "q is bfloat16 and no torch tensor, expected the package ml_dtypes to be installed, "
            "which gives NumPy that dtype"
        ) from None
    return ml_dtypes.bfloat16


def shape_of(x: Array, name: str, rank: int) -> tuple:
    """The shape of a tensor of ``rank`` dimensions. Raises ValueError naming the argument."""
    shape = tuple(x.shape) if is_torch(x) else _C.shape_and_dtype(x, name)[0]
    if len(shape) != rank:
        raise ValueError(f"{name} has shape {shape}, expected a tensor of rank {rank}")
    return shape


def count(x: Any, name: str, least: int = 1) -> int:
    """An integer argument: anything with ``__index__`` but bool. Raises ValueError naming it."""
    try:
        value = None if isinstance(x, bool) else operator.index(x)
    except TypeError:
        value = None
    if value is None or value < least:
        raise ValueError(f"{name} is {x!r}, expected an integer >= {least}")
    return value


def head_dim(head_dim_v: Any, d_qk: int) -> int:
    """head_dim_v, checked before memory for it is asked for. Raises ValueError."""
    value = count(head_dim_v, "head_dim_v")
    if value > d_qk:
        raise ValueError(f"head_dim_v is {value}, expected 1 to q.shape[3] (d_qk) = {d_qk}")
    return value
