"""Host time of one flash_mla_with_kvcache call on an input so small that the arithmetic does not matter; JSON.

With --device cuda the calls are queued, not waited for: what is timed is what the caller's thread spends.
"""

import argparse
import json
import time

import torch
from provenance import commit, machine_with_torch

from flash_mla_kernels import __version__, flash_mla_with_kvcache, get_mla_decoding_metadata, get_mla_metadata


def microseconds_per_call(call, device, rounds=15):
    # On a GPU as many as its queue takes without making the caller wait.
    calls = 2000 if device == "cpu" else 200
    times = []
    for _ in range(rounds):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return sorted(times)[len(times) // 2], min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    # Not torch.set_default_device: under it every torch function takes several microseconds more.
    lengths = torch.tensor([1], dtype=torch.int32, device=device)
    q = torch.randn(1, 1, 1, 576, dtype=torch.bfloat16, device=device)
    k_cache = torch.randn(1, 64, 1, 576, dtype=torch.bfloat16, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    out = torch.zeros(1, 1, 1, 512, dtype=torch.bfloat16, device=device)
    metadata, num_splits = get_mla_decoding_metadata(lengths, 1, 1)
    scheduled, _ = get_mla_metadata()
    calls = {
        "flash_mla_with_kvcache, tensors": lambda: flash_mla_with_kvcache(
            q, k_cache, table, lengths, 512, metadata, num_splits
        ),
        "flash_mla_with_kvcache, object": lambda: flash_mla_with_kvcache(q, k_cache, table, lengths, 512, scheduled),
        "flash_mla_with_kvcache, tensors, out=": lambda: flash_mla_with_kvcache(
            q, k_cache, table, lengths, 512, metadata, num_splits, out=out
        ),
        "get_mla_decoding_metadata": lambda: get_mla_decoding_metadata(lengths, 1, 1),
        # What torch itself takes for an allocation, of which a call has two (one with out=), and for queueing a kernel.
        "torch: Tensor.new_empty": lambda: q.new_empty((1, 1, 1, 512)),
        "torch: Tensor.add_": lambda: out.add_(1.0),
    }
    result = {
        "version": __version__,
        "commit": commit(),
        "machine": machine_with_torch(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "command": f"bench/python_overhead.py --device {device}",
        "us_per_call": {},
    }
    for name, call in calls.items():
        call()
        median, best = microseconds_per_call(call, device)
        result["us_per_call"][name] = {"median": round(median, 2), "min": round(best, 2)}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
