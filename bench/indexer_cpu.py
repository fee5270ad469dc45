"""Sparse attention's steps on one CPU core: the rate of the indexer's scores beside that of their product alone, and the
context from which scoring, choosing and attending to 2,048 tokens take less time than attending to all.

    python bench/indexer_cpu.py [--json FILE]

The product is torch's of bfloat16 (oneDNN), of the same queries and keys, without ReLU, weights, scales and the e4m3 that
keys and queries are made of. Figures are the processor's time of one thread, the median of rounds in which each
contestant runs once, so that a machine which does other work as well changes them little.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import torch
from provenance import commit, machine_with_torch

import flash_mla_kernels

HEADS, DIM, TOPK, PAGE = 64, 128, 2048, 64
SCALE = 0.1352338


def index_cache(tokens):
    cache = torch.zeros(tokens // PAGE, PAGE, 1, DIM + 4, dtype=torch.uint8)
    flash_mla_kernels.append_index_keys(torch.randn(tokens, DIM).bfloat16(), torch.arange(tokens), cache, num_threads=1)
    return cache


def index_queries(rows, next_n):
    q, weights = flash_mla_kernels.quantise_index_queries(
        torch.randn(rows * next_n, HEADS, DIM).bfloat16(),
        torch.randn(rows * next_n, HEADS),
        factor=(HEADS * DIM) ** -0.5,
    )
    return q.view(rows, next_n, HEADS, DIM), weights


def measure(contestants, rounds):
    """Seconds of each."""
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def rates(rounds):
    """Of prompts, eight tokens that share their keys and more, and of decoding, one."""
    keys, out = 16384, []
    cache, table = index_cache(keys), torch.arange(keys // PAGE, dtype=torch.int32)[None]
    plain_keys = torch.randn(keys, DIM).bfloat16()
    for next_n in (1, 8, 64):
        q, weights = index_queries(1, next_n)
        lengths = torch.full((1, next_n), keys, dtype=torch.int32)
        plain_q = torch.randn(next_n * HEADS, DIM).bfloat16()
        t = measure(
            {
                "scores": lambda q=q, w=weights, n=lengths: flash_mla_kernels.fp8_paged_mqa_logits(
                    q, cache, w, n, table, None, keys, num_threads=1
                ),
                "product": lambda q=plain_q: torch.matmul(q, plain_keys.T),
            },
            rounds,
        )
        flop = 2.0 * next_n * HEADS * DIM * keys
        row = {"tokens": next_n, "keys": keys, **{f"{k}_gflops": flop / v / 1e9 for k, v in t.items()}}
        row["ratio"] = row["scores_gflops"] / row["product_gflops"]
        out.append(row)
        print(f"{next_n:3d} tokens x {keys} keys: scores {row['scores_gflops']:.0f} GFLOP/s, "
              f"product {row['product_gflops']:.0f}, ratio {row['ratio']:.2f}")  # fmt: skip
    return out


def attention(heads, context, format):
    """One token's attention to all of a context, as dense decode, and to the chosen ones, with the choice."""
    slots = torch.arange(context)
    latent, rope = torch.randn(context, 512).bfloat16(), torch.randn(context, 64).bfloat16()
    if format == "fp8":
        cache = torch.zeros(context // PAGE, PAGE, 1, 656, dtype=torch.uint8)
        flash_mla_kernels.append_kv(latent, rope, slots, cache, num_threads=1)
    else:
        cache = torch.cat([latent, rope], dim=-1).view(context // PAGE, PAGE, 1, 576).contiguous()
    index, table = index_cache(context), torch.arange(context // PAGE, dtype=torch.int32)[None]
    lengths = torch.tensor([context], dtype=torch.int32)
    q = torch.randn(1, 1, heads, 576).bfloat16()
    index_q, weights = index_queries(1, 1)
    parts, splits = flash_mla_kernels.build_decode_schedule(lengths, num_parts=1)[:2]

    def dense():
        if format == "fp8":
            flash_mla_kernels.dense_fp8_decode(
                q, cache, table, lengths, parts, splits, softmax_scale=SCALE, num_threads=1
            )
        else:
            flash_mla_kernels.dense_decode(q, cache, table, lengths, 512, parts, splits, softmax_scale=SCALE, num_threads=1)

    def choose():
        return flash_mla_kernels.paged_mqa_top_k(
            index_q, index, weights, lengths[:, None], table, TOPK, slots=True, num_threads=1
        )  # fmt: skip

    chosen = choose()

    def sparse():
        flash_mla_kernels.sparse_decode(q, cache, chosen.view(1, 1, TOPK), softmax_scale=SCALE, num_threads=1)

    return {"dense": dense, "choose": choose, "sparse": sparse}


def crossover(heads, format, rounds):
    """Times over contexts, and the context from which the sparse way takes less time."""
    rows, at, before = [], None, None
    for context in (2048, 2560, 3072, 4096, 6144, 8192, 16384, 32768):
        t = measure(attention(heads, context, format), rounds)
        row = {"context": context, **{f"{name}_us": 1e6 * x for name, x in t.items()}}
        gain = t["dense"] - t["choose"] - t["sparse"]
        row["dense_over_sparse"] = t["dense"] / (t["choose"] + t["sparse"])
        if gain > 0 and at is None:
            at = (
                context if before is None else round(before[0] + (context - before[0]) * before[1] / (before[1] - gain))
            )
        before = context, gain
        rows.append(row)
        print(f"{heads:4d} heads {format} {context:6d}: dense {row['dense_us']:8.0f} us, choice {row['choose_us']:7.0f}, "
              f"attention to the chosen {row['sparse_us']:7.0f}, dense/sparse {row['dense_over_sparse']:.2f}")  # fmt: skip
    print(f"{heads:4d} heads {format}: the sparse way is faster from {at} tokens on")
    return {"heads": heads, "format": format, "faster_from": at, "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    report = {"command": " ".join(sys.argv), "commit": commit(), "machine": machine_with_torch()}
    report["rates"] = rates(arguments.rounds)
    report["crossover"] = [
        crossover(heads, format, arguments.rounds) for heads in (16, 128) for format in ("bf16", "fp8")
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
