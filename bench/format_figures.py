"""What a format of the text costs per token: time of the engine's processor with and without, for vocabularies of two sizes.

    python3 bench/format_figures.py --json bench/results/cpu-formats.json

models/small (4,096 tokens), and the same shape with random weights and the 129,280 tokens of DeepSeek V3. Every format
generates the same number of tokens as free text whose row of logits goes to the host as well (a bias of 0); the difference
of the processor's time, over the tokens, is what the format costs. `first` is a request's first use of a grammar: making it,
and the masks of the places that its text comes to; `again` is later ones.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "python"))
from live_server import Server  # noqa: E402

FORMATS = {
    "json_object": {"response_format": {"type": "json_object"}},
    "json_schema": {
        "guided_json": {
            "type": "array",
            "minItems": 4000,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "age": {"type": "integer"},
                    "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
                },
                "required": ["name", "age", "tags"],
            },
        }
    },
    "regex": {"guided_regex": "([a-z]{1,9} ){400}"},
}


def cpu_seconds(server):
    fields = pathlib.Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(server, tokens, seed, **kw):
    """Microseconds of the processor per token."""
    body = {
        "model": server.name,
        "prompt": "And",
        "max_tokens": tokens,
        "ignore_eos": True,
        "seed": seed,
        "logit_bias": {"5": 0},
    }
    begin = cpu_seconds(server)
    answer = server.json("/v1/completions", {**body, **kw})
    return 1e6 * (cpu_seconds(server) - begin) / answer["usage"]["completion_tokens"]


def figures(directory, name, flags, tokens, rounds):
    server = Server(directory, "--threads", "1", *flags)
    server.name = name
    measure(server, 16, 0)
    free = min(measure(server, tokens, seed) for seed in range(rounds))
    out = {"free_us": round(free, 1)}
    for kind, fields in FORMATS.items():
        first = measure(server, tokens, 1, **fields)
        again = min(measure(server, tokens, seed, **fields) for seed in range(1, rounds + 1))
        out[kind] = {"first_us": round(first - free, 1), "again_us": round(again - free, 1)}
    server.stop()
    return out


def wide_model(directory):
    config = json.loads((ROOT / "models/small/config.json").read_text())
    config["vocab_size"] = 129280
    (directory / "config.json").write_text(json.dumps(config))
    subprocess.run(
        [sys.executable, ROOT / "bench/dummy_model.py", directory / "wide", "--config", directory / "config.json"],
        check=True,
    )
    return directory / "wide"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    scratch = pathlib.Path(tempfile.mkdtemp())
    out = {
        "command": " ".join(["python3", "bench/format_figures.py", *sys.argv[1:]]),
        "machine": next(
            (x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), platform.processor()
        ),
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short=9", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "vocabulary_4096": figures(ROOT / "models/small", "small", [], a.tokens, a.rounds),
        "vocabulary_129280": figures(wide_model(scratch), "wide", ["--load-format", "dummy"], a.tokens, a.rounds),
    }
    shutil.rmtree(scratch)
    text = json.dumps(out, indent=1)
    print(text)
    if a.json:
        a.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
