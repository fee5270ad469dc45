"""torch, FlashAttention-3 and FlashInfer beside `flash-mla bench --preset h200-shelf`, row by row, on one GPU.

    flash-mla bench --preset h200-shelf --json shelf.json
    python3 bench/compare_shelf.py shelf.json --json shelf-compare.json

Run it right behind the benchmark. Its protocol is repeated: random data of the same kind, every call behind a read pass over
256 MiB and a spin kernel, events around it, the median. Each call's output is checked. What a peer has nothing for, or what is
not installed here, is said in `missing`. FlashAttention-3 is vLLM's (vllm.vllm_flash_attn); FlashInfer is flashinfer-python.
"""

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import shlex
import statistics
import sys
import time

import torch
from provenance import commit, machine_with_torch
from shelf_peers import ATTENTION, ROWS, Attention, Missing

SPIN_CLOCKS = 400_000  # about 0.2 ms: Python is slower than a program at queueing a call
LONG_FLOP = 2e12


class Timer:
    def __init__(self):
        self.flush = torch.ones(256 << 18, dtype=torch.int32, device="cuda")

    def us(self, call, reps):
        times = []
        for i in range(reps + 3):
            self.flush.max()
            torch.cuda._sleep(SPIN_CLOCKS)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            if i >= 3:
                times.append(1e3 * begin.elapsed_time(end))
        return statistics.median(times)


def why(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def measure_attention(row, timer, reps, peers):
    problem, times, missing = Attention(row), {}, {}
    for name, make in ATTENTION.items():
        if peers and not any(p in name for p in peers):
            continue
        try:
            made = make(problem)
            call, view = made if isinstance(made, tuple) else (made, lambda out: out)
            worst = problem.wrong(view(call()))
            if not worst <= 1:
                missing[name] = f"differs from fp32 by {worst:.2f} of what is allowed"
                continue
            times[name] = timer.us(call, reps)
        except Exception as error:  # noqa: BLE001 (whatever a library raises, the others are measured)
            missing[name] = str(error) if isinstance(error, Missing) else why(error)
        torch.cuda.synchronize()
    return times, missing


def measure_rows(row, timer, reps, peers):
    made, times, missing = ROWS[row["operation"]](row), {}, {}
    makers, right = made[:2]
    reset = made[2] if len(made) > 2 else None
    for name, make in makers.items():
        if peers and not any(p in name for p in peers):
            continue
        try:
            if reset:
                reset()
            call = make()
            call()
            getattr(call, "finish", lambda: None)()
            if not right():
                missing[name] = "differs from torch in fp32"
                continue
            times[name] = timer.us(call, reps)
        except Exception as error:  # noqa: BLE001
            missing[name] = why(error)
        torch.cuda.synchronize()
    return times, missing


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", type=pathlib.Path, help="what flash-mla bench wrote")
    parser.add_argument("--json", type=pathlib.Path, help="write the results to this file")
    parser.add_argument("--reps", type=int, default=30)
    parser.add_argument("--only", default="", help="rows whose names contain this text")
    parser.add_argument("--peers", default="", help="peers whose names contain one of these, separated by commas")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no new row begins")
    arguments = parser.parse_args()
    begin = time.monotonic()
    ours = json.loads(arguments.ours.read_text(encoding="utf-8"))
    peers = [p for p in arguments.peers.split(",") if p]
    torch.manual_seed(0)
    timer, results = Timer(), []
    for row in ours["rows"]:
        if arguments.only not in row["name"]:
            continue
        if time.monotonic() - begin > arguments.deadline:
            print(f"out of time before {row['name']}", file=sys.stderr)
            break
        reps = min(10, arguments.reps) if row["flop"] > LONG_FLOP else arguments.reps
        times, missing = (measure_attention if row["flop"] > 0 else measure_rows)(row, timer, reps, peers)
        best = min(times, key=times.get) if times else None
        us = row.get("us")
        results.append({**{key: row[key] for key in ("name", "operation", "flop", "bytes", "floor_us")}, "us": us,
                        "peers_us": times, "missing": missing, "best": best,
                        "over_best": us / times[best] if us and best else None})  # fmt: skip
        ratio = f"{us / times[best]:.2f}" if us and best else "-"
        print(f"{row['name']:45s} {us or 0:9.2f} us, of the best {ratio:5s} | "
              + ", ".join(f"{name} {t:.2f}" for name, t in times.items()), flush=True)  # fmt: skip
        torch.cuda.empty_cache()
    if arguments.json:
        report = {"machine": {**machine_with_torch(), "gpu": torch.cuda.get_device_name()}, "commit": commit(),
                  "commit_of_ours": ours["commit"], "command": shlex.join(["compare_shelf.py", *sys.argv[1:]]),
                  "command_of_ours": ours["command"],
                  "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                  "versions": {"cudnn": torch.backends.cudnn.version(), "vllm": version("vllm"),
                               "flashinfer-python": version("flashinfer-python")},
                  "protocol": __doc__.split("\n\n")[2].replace("\n", " "), "rows": results}  # fmt: skip
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {arguments.json}")


if __name__ == "__main__":
    main()
