"""Sparse decode on the CPU against torch's gather and matmul over the same lists, side by side in one run.

    python bench/compare_sparse.py [--json FILE]

Each round times every contestant once, so that all of them see the same machine; figures are medians, and what counts
are the ratios. The pool is larger than the caches. torch gathers the listed rows of a bfloat16 cache (index_select) and
multiplies in bfloat16 with its softmax in float32: what a model without this library does on a CPU. Of the FP8 cache
(656 bytes per token) it gathers the bytes and dequantises them first.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from provenance import commit, machine_with_torch

import flash_mla_kernels

TOPK, POOL, PAGE = 2048, 262_144, 64
SCALE = 576**-0.5


def make_caches(tokens):
    rows = (torch.randn(tokens, 576) / 10).clamp(-1, 1).bfloat16()
    slots = torch.arange(tokens)
    fp8 = torch.empty(tokens // PAGE, PAGE, 1, 656, dtype=torch.uint8)
    flash_mla_kernels.append_kv(rows[:, :512].contiguous(), rows[:, 512:].contiguous(), slots, fp8)
    return rows, rows.view(-1, PAGE, 1, 576), fp8


def torch_decode(q, rows, indices):
    b, _, h_q, d = q.shape
    keys = rows.index_select(0, indices.view(-1)).view(b, -1, d)
    scores = torch.matmul(q[:, 0], keys.transpose(1, 2)).float() * SCALE
    return torch.matmul(torch.softmax(scores, dim=-1).bfloat16(), keys[..., :512])


def torch_fp8_decode(q, fp8, indices):
    b, _, h_q, d = q.shape
    tokens = fp8.view(-1, 656).index_select(0, indices.view(-1))
    latent = tokens[:, :512].view(torch.float8_e4m3fn).float().view(-1, 4, 128)
    latent = (latent * tokens[:, 512:528].contiguous().view(torch.float32)[..., None]).bfloat16().view(b, -1, 512)
    rope = tokens[:, 528:].contiguous().view(torch.bfloat16).view(b, -1, 64)
    scores = torch.matmul(q[:, 0], torch.cat([latent, rope], dim=-1).transpose(1, 2)).float() * SCALE
    return torch.matmul(torch.softmax(scores, dim=-1).bfloat16(), latent)


def measure(contestants, rounds):
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(1)
    flat, rows, fp8 = make_caches(POOL)
    results = []
    print(f"{'h_q':>5} {'torch':>9} {'torch_fp8':>9} {'bf16':>9} {'fp8':>9}   torch/bf16  torch_fp8/fp8  bf16/fp8")
    for h_q in (1, 8, 16, 32, 64, 128):
        q = (torch.randn(args.batch, 1, h_q, 576) / 2).bfloat16()
        indices = torch.randint(0, POOL, (args.batch, 1, TOPK), dtype=torch.int32)
        contestants = {
            "torch": lambda q=q, i=indices: torch_decode(q, flat, i),
            "torch_fp8": lambda q=q, i=indices: torch_fp8_decode(q, fp8, i),
            "bf16": lambda q=q, i=indices: flash_mla_kernels.sparse_decode(q, rows, i),
            "fp8": lambda q=q, i=indices: flash_mla_kernels.sparse_decode(q, fp8, i),
        }
        # The same numbers, up to the format's rounding.
        want, got = contestants["torch"]().float(), contestants["bf16"]()[0][:, 0].float()
        if (want - got).abs().max() > 2e-3:
            sys.exit(f"h_q {h_q}: results differ by {(want - got).abs().max()}")
        t = measure(contestants, args.rounds)
        row = {
            "h_q": h_q,
            "batch": args.batch,
            "topk": TOPK,
            **{f"{name}_ms": 1e3 * x for name, x in t.items()},
            "torch_over_bf16": t["torch"] / t["bf16"],
            "torch_fp8_over_fp8": t["torch_fp8"] / t["fp8"],
            "bf16_over_fp8": t["bf16"] / t["fp8"],
        }
        results.append(row)
        print(
            f"{h_q:5d} {row['torch_ms']:7.2f}ms {row['torch_fp8_ms']:7.2f}ms {row['bf16_ms']:7.2f}ms {row['fp8_ms']:7.2f}ms"
            f"   {row['torch_over_bf16']:10.2f} {row['torch_fp8_over_fp8']:14.2f} {row['bf16_over_fp8']:9.2f}"
        )
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"machine": machine_with_torch(), "commit": commit(), "threads": torch.get_num_threads(), "results": results}, f, indent=1)


if __name__ == "__main__":
    main()
