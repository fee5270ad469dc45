"""Host time of one flash_mla_with_kvcache call on an input so small that the arithmetic does not matter; JSON."""

import json
import platform
import time

import torch

from flash_mla import __version__, flash_mla_with_kvcache, get_mla_metadata


def microseconds_per_call(call, calls=2000, rounds=15):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return sorted(times)[len(times) // 2], min(times)


def main():
    torch.set_num_threads(1)
    lengths = torch.tensor([1], dtype=torch.int32)
    q = torch.randn(1, 1, 1, 576, dtype=torch.bfloat16)
    k_cache = torch.randn(1, 64, 1, 576, dtype=torch.bfloat16)
    table = torch.zeros(1, 1, dtype=torch.int32)
    metadata, num_splits = get_mla_metadata(lengths, 1, 1)
    scheduled, _ = get_mla_metadata()
    calls = {
        "flash_mla_with_kvcache, tensors": lambda: flash_mla_with_kvcache(
            q, k_cache, table, lengths, 512, metadata, num_splits
        ),
        "flash_mla_with_kvcache, object": lambda: flash_mla_with_kvcache(q, k_cache, table, lengths, 512, scheduled),
        "get_mla_metadata": lambda: get_mla_metadata(lengths, 1, 1),
    }
    result = {"version": __version__, "python": platform.python_version(), "torch": torch.__version__, "us_per_call": {}}
    for name, call in calls.items():
        call()
        median, best = microseconds_per_call(call)
        result["us_per_call"][name] = {"median": round(median, 2), "min": round(best, 2)}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
