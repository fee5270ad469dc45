"""MLA decode of flash_mla_kernels as an attention backend of vLLM 0.26 to 0.33.

vLLM calls ``register`` in each of its processes (entry point ``vllm.general_plugins``); README.md says how to choose the
backend. Nothing of vLLM is imported before that.
"""

import logging
import re
from typing import Optional, Tuple

#: Releases of vLLM whose interfaces are known to fit: the first, and the first that is not.
SUPPORTED = ((0, 26), (0, 34))
#: vLLM has an MLA backend for CPUs, which ours takes the place of, from here on.
SUPPORTED_ON_CPU = ((0, 28), (0, 34))

logger = logging.getLogger("vllm.flash_mla_vllm")


def release_of(version: str) -> Optional[Tuple[int, int]]:
    """(0, 32) of "0.32.0+cpu"; None where no release can be read."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def refusal(version: str, supported=SUPPORTED) -> Optional[str]:
    """Why this vLLM is not supported, None if it is."""
    first, end = supported
    release = release_of(version)
    if release is not None and first <= release < end:
        return None
    return (
        f"flash-mla-vllm supports vLLM {first[0]}.{first[1]} to {end[0]}.{end[1] - 1}, this is vLLM {version}; "
        "its backend is not registered"
    )


def register() -> None:
    """Gives vLLM the backend of this machine's platform. May be called more than once.

    Where it cannot, it says so once in vLLM's log and leaves vLLM as it is: a model without MLA must start all the same.
    """
    import vllm
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    reason = refusal(vllm.__version__, SUPPORTED_ON_CPU if on_cpu else SUPPORTED)
    if reason is None and not on_cpu and not current_platform.is_cuda():
        reason = "flash-mla-vllm has backends for CUDA and for CPUs; its backend is not registered on this platform"
    if reason is not None:
        logger.warning(reason)
        return

    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if on_cpu:
        # vLLM's CPU platform chooses among its own names only, so the name stays and the class changes.
        register_backend(AttentionBackendEnum.CPU_MLA, "flash_mla_vllm.cpu.FlashMLACpuBackend")
    else:
        from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum, register_mla_prefill_backend

        register_backend(AttentionBackendEnum.CUSTOM, "flash_mla_vllm.backend.Backend")
        prefill = "flash_mla_vllm.prefill.FlashMLAPrefillBackend"
        register_mla_prefill_backend(MLAPrefillBackendEnum.CUSTOM, prefill)
