"""What it takes to hand a prompt's pages over from a prefill to a decode server, and to load them from a tier, beside
computing the prompt again.

    python3 bench/transfer_figures.py --json bench/results/cpu-transfer.json
    FLASH_MLA_NIXL=... python3 bench/transfer_figures.py --transports shm,nixl --json x.json
    python3 bench/transfer_figures.py --model DIR --serve-flags "--device cuda --load-format dummy" --json x.json

Servers are processes of this machine, without prefix caches. One prompt of --tokens random tokens goes to each --rounds
times, after one round that does not count, for one token (TTFT) of the answer. Medians count. Without --model it is
models/small's shape with random weights and as many positions as the prompt needs.

  alone      one server computes the prompt
  transfers  a prefill server computes it, a decode server goes on with its pages, for each transport, sent as a whole and
             while it is computed ("by_layer"). bytes/s are those of the writes; the rest of the way (copies to and from
             the cache, checksums) is in TTFT. overlap: the part of the writes' time while the prompt was still computed.
  tiers      a server that has stored the prompt in a tier loads it from there; bytes/s are those of the tier's reads, on
             a file those of the page cache

Eight tokens of every such answer, with their log-probabilities, are compared with those of one server first: with
--batch-invariant they are the same to the bit.
"""

import argparse
import concurrent.futures
import contextlib
import json
import pathlib
import random
import shlex
import statistics
import subprocess
import tempfile
import time
import urllib.request

from provenance import commit, machine
from server_figures import Server

ROOT = pathlib.Path(__file__).resolve().parents[1]


def small_shape(directory, tokens):
    """models/small's config.json with room for the prompt, and its tokenizer."""
    for file in (ROOT / "models/small").iterdir():
        if file.suffix == ".json" and file.name != "model.safetensors.index.json":
            (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    config["max_position_embeddings"] = tokens + 64
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def prompt_of(arguments):
    vocab = json.loads((pathlib.Path(arguments.model) / "config.json").read_text())["vocab_size"]
    chance = random.Random(1)
    return [chance.randrange(3, min(vocab, 4000)) for _ in range(arguments.tokens)]


def ask(server, prompt, tokens=1, **fields):
    """The answer, and the seconds that it took."""
    body = {"model": "bench", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    request = urllib.request.Request(
        server.url + "/v1/completions", json.dumps({**body, **fields}).encode(), {"Content-Type": "application/json"}
    )
    begin = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as answer:
        choice = json.loads(answer.read())["choices"][0]
    return (choice["text"], choice["logprobs"]["token_logprobs"]), time.perf_counter() - begin


def wait_for(server, metric, least):
    deadline = time.monotonic() + 120
    while server.metric(metric) < least:
        if time.monotonic() > deadline:
            raise SystemExit(f"{metric} is {server.metric(metric)}, expected {least}")
        time.sleep(0.01)


def check(answer, expected, what):
    if answer != expected:
        raise SystemExit(f"{what}: the answer is {answer}, expected {expected}")


def of_rounds(values):
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def alone(arguments, prompt):
    with Server(arguments) as server:
        expected = ask(server, prompt, 8)[0]
        return expected, {"ttft_s": of_rounds([ask(server, prompt)[1] for _ in range(arguments.rounds)])}


def transfer(arguments, prompt, expected, transport, by_layer):
    common = ("--transport", transport, "--transfer-memory", arguments.transfer_memory)
    with contextlib.ExitStack() as stack:
        layerwise = 1 if by_layer else 1 << 30
        prefill = stack.enter_context(
            Server(arguments, *common, "--role", "prefill", "--bootstrap-port", "0", "--layerwise-tokens", str(layerwise))
        )
        decode = stack.enter_context(Server(arguments, *common, "--role", "decode", "--peer", "*"))
        port = prefill.bootstrap_port()
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))

        def go(room, tokens):
            fields = {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": room}
            first = threads.submit(ask, prefill, prompt, tokens, **fields)
            answer = ask(decode, prompt, tokens, **fields)
            first.result()
            wait_for(prefill, "mla_transfer_handed_over_total", room)
            return answer

        check(go(1, 8)[0], expected, f"{transport}, by_layer {by_layer}")
        rounds = []
        for i in range(arguments.rounds):
            names = ("bytes_total", "seconds_total", "overlapped_seconds_total")
            before = [prefill.metric(f"mla_transfer_{name}") for name in names]
            waited = decode.metric("mla_transfer_seconds_total")
            ttft = go(2 + i, 1)[1]
            sent, seconds, overlapped = (prefill.metric(f"mla_transfer_{n}") - b for n, b in zip(names, before))
            rounds.append((ttft, sent, seconds, overlapped, decode.metric("mla_transfer_seconds_total") - waited))
        ttft, sent, seconds, overlapped, waited = zip(*rounds)
        return {
            "transport": transport,
            "by_layer": by_layer,
            "ttft_s": of_rounds(ttft),
            "bytes": sent[0],
            "write_s": of_rounds(seconds),
            "bytes_per_s": statistics.median(b / s for b, s in zip(sent, seconds)),
            "overlap": statistics.median(o / s for o, s in zip(overlapped, seconds)),
            "ask_to_arrival_s": of_rounds(waited),
        }


def tier(arguments, prompt, expected, name, spec):
    label = f'{{tier="{name}"}}'
    whole = (len(prompt) - 1) // 256 * 256
    with Server(arguments, "--kv-tier", spec, "--kv-tier-wait", "100") as server:
        check(ask(server, prompt, 8)[0], expected, f"computed with tier {name}")
        wait_for(server, f"mla_kv_tier_tokens_stored_total{label}", whole)
        check(ask(server, prompt, 8)[0], expected, f"loaded from tier {name}")
        rounds = []
        for _ in range(arguments.rounds):
            before = [server.metric(f"mla_kv_tier_{n}{label}") for n in ("loaded_bytes_total", "load_seconds_total")]
            ttft = ask(server, prompt)[1]
            loaded, seconds = (
                server.metric(f"mla_kv_tier_{n}{label}") - b
                for n, b in zip(("loaded_bytes_total", "load_seconds_total"), before)
            )
            rounds.append((ttft, loaded, seconds))
        ttft, loaded, seconds = zip(*rounds)
        return {
            "tier": name,
            "ttft_s": of_rounds(ttft),
            "bytes": loaded[0],
            "read_s": of_rounds(seconds),
            # Those of the host's memory are read where they lie.
            "bytes_per_s": None if name == "ram" else statistics.median(b / s for b, s in zip(loaded, seconds)),
        }


def copy_rate():
    """Of this machine's memory, by one thread: bytes that are copied in a second, of 64 MiB."""
    source = memoryview(bytearray(random.Random(2).randbytes(1 << 26)))
    target = memoryview(bytearray(1 << 26))
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        target[:] = source
        seconds.append(time.perf_counter() - begin)
    return (1 << 26) / statistics.median(seconds[1:])


def gpu():
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--program", default=str(ROOT / "build/release/src/cli/flash-mla"))
    add("--model", help="a model directory")
    add("--serve-flags", default="", help="of all servers")
    add("--start-timeout", type=float, default=300)
    add("--tokens", type=int, default=8192, help="of the prompt")
    add("--rounds", type=int, default=5)
    add("--transports", default="shm")
    add("--transfer-memory", default="1GiB")
    add("--tiers", default="ram,file")
    add("--note", default="", help="on what else the machine did")
    add("--commit", default=commit())
    add("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        flags = arguments.serve_flags
        if arguments.model is None:
            (folder / "model").mkdir()
            arguments.model = str(small_shape(folder / "model", arguments.tokens))
            flags += " --load-format dummy"
        pages = arguments.tokens // 64 + 8
        arguments.serve_flags = f"{flags} --served-model-name bench --batch-invariant --no-prefix-cache --num-pages {pages} --max-batch-size 4"
        prompt = prompt_of(arguments)
        out = {
            "what": "a prompt handed over between two processes of one machine, and loaded from a tier, beside computing it",
            "machine": machine() | ({"gpu": gpu()} if gpu() else {}),
            "commit": arguments.commit,
            "note": arguments.note,
            "serve_flags": shlex.split(arguments.serve_flags),
            "prompt_tokens": arguments.tokens,
            "rounds": arguments.rounds,
            "copy_bytes_per_s": copy_rate(),
        }

        def note(what, figures):
            print(what, figures, flush=True)
            out[what].append(figures)
            if arguments.json:
                arguments.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")

        expected, out["alone"] = alone(arguments, prompt)
        print("alone", out["alone"], flush=True)
        out["tiers"], out["transfers"] = [], []
        for name in filter(None, arguments.tiers.split(",")):
            spec = "ram:8GiB" if name == "ram" else f"file:{folder / 'tier'},8GiB"
            note("tiers", tier(arguments, prompt, expected, name, spec))
        for transport in filter(None, arguments.transports.split(",")):
            for by_layer in (False, True):
                note("transfers", transfer(arguments, prompt, expected, transport, by_layer))


if __name__ == "__main__":
    main()
