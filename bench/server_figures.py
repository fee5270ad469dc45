"""What the server costs over the engine, and how it takes a mixed load.

    python3 bench/server_figures.py --json bench/results/cpu-server.json
    python3 bench/dummy_model.py DIR
    python3 bench/server_figures.py --model DIR --serve-flags "--device cuda --load-format dummy" --only mixed --json x.json

Parts, each with a server of its own; --only names some of them.

  overhead  --clients clients in a closed loop, against `flash-mla loadtest --engine`: the same requests and the
            same loop in the engine's process, without HTTP. Both take turns --rounds times; medians count. The
            engine has --threads threads in both. CPU time per streamed event is that of the server's threads
            other than the engine's, over the events that they sent (one per token, and one per answer).
  streams   --streams streams that wait in the queue: what each adds to the server's resident memory.
  mixed     `flash-mla loadtest`: half short and half long prompts, with success rate, throughput, P50 and P99 of
            TTFT and TPOT, the share of the time in which the engine was at a step, and where there is an NVIDIA GPU
            its peak power by nvidia-smi.
  mixed-engine  the same load on an engine in `flash-mla loadtest`'s process, without HTTP (only if named).

The server, its client and whatever else this machine does share its cores: with fewer than two cores beyond
--threads the client takes time from the engine, which counts against the server.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import re
import resource
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

from provenance import machine

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Server:
    """`flash-mla serve` on a free port."""

    def __init__(self, arguments, *flags):
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        command = [str(pathlib.Path(arguments.program).absolute()), "serve", "--model", arguments.model, "--port", "0", "--no-request-log",
                   *shlex.split(arguments.serve_flags), *flags]  # fmt: skip
        self.command = shlex.join([arguments.program, *command[1:]])
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self.log)
        deadline = time.monotonic() + arguments.start_timeout
        while not (found := re.search(r"http://(\S+):(\d+)/v1", pathlib.Path(self.log.name).read_text())):
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{self.command}: {pathlib.Path(self.log.name).read_text()}")
            time.sleep(0.02)
        self.host, self.port = found.group(1), int(found.group(2))
        self.url = f"http://{self.host}:{self.port}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=60)
        self.process.kill()
        self.process.wait()
        self.log.close()

    def metric(self, name):
        with urllib.request.urlopen(self.url + "/metrics", timeout=60) as answer:
            return float(re.search(rf"^{re.escape(name)} (\S+)$", answer.read().decode(), re.M).group(1))

    def bootstrap_port(self):
        """Of a prefill server: where decode servers meet it."""
        while not (found := re.search(r"meet it at \S+:(\d+)", pathlib.Path(self.log.name).read_text())):
            time.sleep(0.02)
        return int(found.group(1))

    def resident_bytes(self):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status).group(1)) << 10

    def http_seconds(self):
        """CPU time of the threads that are not the engine's (whose OpenMP threads have its name)."""
        total = 0
        for task in pathlib.Path(f"/proc/{self.process.pid}/task").iterdir():
            if (task / "comm").read_text().strip() != "engine":
                total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9


def loadtest(arguments, *flags):
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [str(pathlib.Path(arguments.program).absolute()), "loadtest", "--json", file.name, *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            sys.exit(f"{shlex.join(command)}: {done.stderr}")
        return json.loads(pathlib.Path(file.name).read_text())


def overhead(arguments):
    load = ["--clients", arguments.clients, "--requests", arguments.requests, "--short-tokens", arguments.prompt,
            "--long-tokens", arguments.prompt, "--max-tokens", arguments.new, "--seed", arguments.seed]  # fmt: skip
    engine_flags = ["--threads", str(arguments.threads), "--max-batch-size", str(arguments.clients)]
    rates = {"server": [], "engine": []}
    event_seconds = []
    with Server(arguments, *engine_flags) as server:
        loadtest(arguments, "--url", server.url, *load)  # warms up
        for _ in range(arguments.rounds):
            alone = loadtest(arguments, "--engine", arguments.model, *shlex.split(arguments.serve_flags), *engine_flags, *load)
            begin = server.http_seconds()
            served = loadtest(arguments, "--url", server.url, *load)
            spent = server.http_seconds() - begin
            for name, result in (("engine", alone), ("server", served)):
                if result["all"]["success_rate"] != 1:
                    sys.exit(f"{name}: requests failed: {result['errors']}")
                rates[name].append(result["all"]["completion_tokens_per_second"])
            event_seconds.append(spent / (arguments.requests * (arguments.new + 1)))
        command = server.command
    ratios = [served / alone for served, alone in zip(rates["server"], rates["engine"])]
    return {
        "clients": arguments.clients, "requests": arguments.requests, "prompt_tokens": arguments.prompt,
        "new_tokens": arguments.new, "threads": arguments.threads, "server": command,
        "engine_tokens_per_second": rates["engine"], "server_tokens_per_second": rates["server"],
        "ratio": statistics.median(ratios), "ratios": ratios,
        "http_cpu_microseconds_per_event": statistics.median(event_seconds) * 1e6,
    }  # fmt: skip


def streams(arguments):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else 1 << 16, hard))
    # One sequence at a time: all but the first wait.
    with Server(arguments, "--max-batch-size", "1", "--max-waiting", "0", "--max-connections", str(arguments.streams + 64)) as server:
        with urllib.request.urlopen(server.url + "/v1/models", timeout=60) as answer:
            model = json.load(answer)["data"][0]
        request = {"model": model["id"], "prompt": "And it came to pass", "stream": True, "ignore_eos": True}

        def hold(max_tokens):
            data = json.dumps({**request, "max_tokens": max_tokens})
            s = socket.create_connection((server.host, server.port), timeout=60)
            s.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n{data}".encode())
            if s.recv(12) != b"HTTP/1.1 200":
                sys.exit("a stream was refused")
            return s

        held = [hold(model["max_model_len"] - 16)]
        while server.metric("mla_sequences_running") == 0:
            time.sleep(0.01)
        before = server.resident_bytes()
        held += [hold(1) for _ in range(arguments.streams)]
        if server.metric("mla_sequences_waiting") != arguments.streams:
            sys.exit("the first request ended too early for the others to wait")
        after = server.resident_bytes()
        for s in held:
            s.close()
        return {"streams": arguments.streams, "server": server.command, "resident_bytes_before": before, "resident_bytes": after,
                "bytes_per_idle_stream": (after - before) / arguments.streams}  # fmt: skip


class GpuPower:
    """Samples of nvidia-smi while a block runs; nothing where there is none."""

    def __enter__(self):
        self.samples, self.process = [], None
        if shutil.which("nvidia-smi"):
            self.process = subprocess.Popen(
                ["nvidia-smi", "--query-gpu=power.draw,utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "100"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
            self.thread = threading.Thread(target=self._read)
            self.thread.start()
        return self

    def _read(self):
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                self.samples.append([float(x) for x in line.split(",")])

    def __exit__(self, *_):
        if self.process:
            self.process.terminate()
            self.thread.join()
            self.process.wait()

    def summary(self):
        if not self.samples:
            return None
        power, busy, memory = zip(*self.samples)
        return {"samples": len(power), "peak_watts": max(power), "mean_watts": statistics.mean(power),
                "mean_utilization_percent": statistics.mean(busy), "peak_memory_mib": max(memory)}  # fmt: skip


def mixed_load(arguments, target, clients, requests, seed):
    return loadtest(arguments, *target, "--clients", clients, "--requests", requests, "--short-tokens", arguments.short_tokens,
                    "--long-tokens", arguments.long_tokens, "--max-tokens", arguments.mixed_new, "--seed", seed)  # fmt: skip


def mixed_engine(arguments):
    target = ["--engine", arguments.model, *shlex.split(arguments.serve_flags)]
    return mixed_load(arguments, target, arguments.mixed_clients, arguments.mixed_requests, arguments.seed)


def mixed(arguments):
    counters = ("steps", "step_seconds", "computed_tokens", "preemptions")

    def counted(server):
        return {name: server.metric(f"mla_{name}_total") for name in counters}

    with Server(arguments) as server:
        mixed_load(arguments, ["--url", server.url], 8, 8, arguments.seed + 1)  # warms up
        before = counted(server)
        with GpuPower() as power:
            result = mixed_load(arguments, ["--url", server.url], arguments.mixed_clients, arguments.mixed_requests, arguments.seed)
        spent = {name: value - before[name] for name, value in counted(server).items()}
        hits = server.metric("cache_hit_rate")
        command = server.command
        if arguments.trace:
            with urllib.request.urlopen(server.url + "/trace", timeout=60) as answer:
                arguments.trace.write_bytes(answer.read())
    del result["command"]
    return {"server": command, **result, "cache_hit_rate": hits, **spent,
            "engine_busy_share": spent["step_seconds"] / result["seconds"], "gpu": power.summary()}  # fmt: skip


def machine_with_gpus():
    out = machine()
    if shutil.which("nvidia-smi"):
        names = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False)
        out["gpus"] = names.stdout.split("\n")[:-1]
    return out


def commit(program):
    """Of the program's sources."""
    text = subprocess.run([str(pathlib.Path(program).absolute()), "info"], capture_output=True, text=True, check=True).stdout
    return re.search(r"commit (\S+)", text).group(1)


def from_here(path):
    """A path of the repository as a command from here names it, which is what the results tell."""
    return os.path.relpath(ROOT / path)


PARTS = {"overhead": overhead, "streams": streams, "mixed": mixed, "mixed-engine": mixed_engine}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=from_here("build/release/src/cli/flash-mla"))
    parser.add_argument("--model", default=from_here("models/small"))
    parser.add_argument("--serve-flags", default="", help="more flags of the engine, e.g. \"--device cuda\"")
    parser.add_argument("--start-timeout", type=float, default=600, help="seconds for the model to load")
    parser.add_argument("--only", default="overhead,streams,mixed", help="which parts, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1), help="of the engine on the CPU")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--mixed-clients", type=int, default=128)
    parser.add_argument("--mixed-requests", type=int, default=512)
    parser.add_argument("--mixed-new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--short-tokens", type=int, default=1024)
    parser.add_argument("--long-tokens", type=int, default=8192)
    parser.add_argument("--json", type=pathlib.Path, help="write the results to this file")
    parser.add_argument("--trace", type=pathlib.Path, help="write the engine's steps of the mixed load to this file")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--only {arguments.only}: expected some of {', '.join(PARTS)}")

    result = {
        "machine": machine_with_gpus(),
        "commit": commit(arguments.program),
        "command": shlex.join([pathlib.Path(sys.executable).name, *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "load_before": os.getloadavg()[0],
    }
    for part in parts:
        result[part] = PARTS[part](arguments)
        print(json.dumps({part: result[part]}, indent=1), flush=True)
    result["load_after"] = os.getloadavg()[0]
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
