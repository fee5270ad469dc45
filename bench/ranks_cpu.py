"""What a decode step costs on two ranks of the CPU, over one rank with as many threads.

    python3 bench/ranks_cpu.py build/release/src/cli/flash-mla --json bench/results/cpu-ranks.json

`flash-mla bench-engine --config bench/configs/small-2048` runs --rounds times with each of --tp 1 and --tp N, in turn, in
OMP_NUM_THREADS=N threads. A round gives the median of its steps, the figure is the median of the rounds; `ratio` is tokens/s of the
ranks over those of one rank, of each round's neighbours. Beside each run stands what else ran: the machine's load before
it, and the share of its processors' time that others took while it ran.
"""

import argparse
import datetime
import json
import os
import pathlib
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile

import provenance

CONFIG = pathlib.Path(__file__).resolve().parent / "configs" / "small-2048"


def busy_seconds():
    """Of all processors, since the machine started."""
    with open("/proc/stat", encoding="utf-8") as file:
        fields = [int(x) for x in file.readline().split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(args, ranks):
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "out.json"
        command = [
            args.program, "bench-engine", "--config", str(CONFIG), "--device", "cpu", "--tp", str(ranks),
            "--batch", args.batch, "--context", "256", "--prefill", "64", "--steps", str(args.steps),
            "--generate", "2", "--json", str(out),
        ]  # fmt: skip
        load, busy, own = os.getloadavg()[0], busy_seconds(), own_seconds()
        begin = datetime.datetime.now(datetime.timezone.utc)
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.ranks)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        wall = (datetime.datetime.now(datetime.timezone.utc) - begin).total_seconds()
        others = busy_seconds() - busy - (own_seconds() - own)
        report = json.loads(out.read_text(encoding="utf-8"))
    return {
        "tp": ranks,
        "load_before": load,
        "share_of_others": max(others, 0) / wall / os.cpu_count(),
        "step_ms": {str(row["batch"]): row["step_seconds"] * 1e3 for row in report["decode"]},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()

    runs = []
    for _ in range(args.rounds):
        for ranks in (1, args.ranks):
            runs.append(measure(args, ranks))
            print(runs[-1], flush=True)
    rows = []
    for batch in args.batch.split(","):
        ones, many = ([r["step_ms"][batch] for r in runs if r["tp"] == tp] for tp in (1, args.ranks))
        rows.append({
            "batch": int(batch),
            "one_rank_ms": statistics.median(ones),
            "ranks_ms": statistics.median(many),
            "ratio": statistics.median(a / b for a, b in zip(ones, many, strict=True)),
        })  # fmt: skip
        print(rows[-1])
    if args.json:
        report = {
            "machine": provenance.machine(),
            "commit": provenance.commit(),
            "command": shlex.join(["python3", "bench/ranks_cpu.py", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "ranks": args.ranks,
            "rows": rows,
            "runs": runs,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
