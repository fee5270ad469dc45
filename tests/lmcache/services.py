"""LMCache's server and Redis in processes of their own, on free ports of this machine."""

import atexit
import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "python"))

from live_server import ROOT, Server, wait_for

SMALL = ROOT / "models" / "small"
LOGS = ROOT / "build" / "lmcache" / "logs"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


class Process:
    """A service that is up once its port answers."""

    def __init__(self, name, port):
        self.name, self.port, self.process = name, port, None
        atexit.register(self.kill)

    def begin(self, command, **environment):
        LOGS.mkdir(parents=True, exist_ok=True)
        with open(LOGS / f"{self.name}.log", "a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})

    def wait(self):
        def up():
            assert self.process.poll() is None, f"{self.name} has ended; see {LOGS}"
            return answers(self.port)

        wait_for(up, f"{self.name} does not answer")
        return self

    def kill(self, how=signal.SIGKILL):
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(60)


class Redis(Process):
    """With every write on disk before it is answered, so that it survives being killed."""

    def __init__(self):
        super().__init__("redis", free_port())
        self.directory = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, self.directory, ignore_errors=True)

    def start(self):
        self.begin(["redis-server", "--port", str(self.port), "--dir", self.directory, "--save", "", "--appendonly", "yes",
                    "--appendfsync", "always"])  # fmt: skip
        return self.wait()

    def client(self):
        import redis

        return redis.Redis(port=self.port)


class LmCache(Process):
    def __init__(self, redis=None, size_gb=0.5, *flags):
        super().__init__("lmcache", free_port())
        self.pool_name = f"flash_mla_{uuid.uuid4().hex[:12]}"
        self.redis, self.size_gb, self.flags = redis, size_gb, flags
        atexit.register(self.remove_pool)

    def start(self):
        """Returns when it answers."""
        self.launch()
        return self.wait()

    def launch(self):
        self.remove_pool()
        command = [str(pathlib.Path(sys.executable).parent / "lmcache"), "server", "--transport", "grpc", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--http-port", str(free_port()), "--prometheus-port", str(free_port())]
        command += ["--chunk-size", "256", "--l1-size-gb", str(self.size_gb), "--eviction-policy", "LRU"]
        command += ["--supported-transfer-mode", "engine_driven", "--shm-name", self.pool_name, *self.flags]
        if self.redis:
            command += ["--l2-adapter", json.dumps({"type": "resp", "host": "127.0.0.1", "port": self.redis.port})]
        # No word to anybody but the engines of this machine.
        self.begin(command, LMCACHE_TRACK_USAGE="false", LMCACHE_DISABLE_BANNER="1")

    def pool(self):
        """The file of the pool in which its chunks lie."""
        (file,) = [p for p in pathlib.Path("/dev/shm").iterdir() if self.pool_name in p.name]
        return file

    def remove_pool(self):
        """What a server that was killed leaves behind."""
        for file in pathlib.Path("/dev/shm").iterdir():
            if self.pool_name in file.name:
                file.unlink()

    def stop(self):
        self.kill(signal.SIGTERM)


class Engine(Server):
    """flash-mla serve on the CPU in float32, with or without a tier at `lmcache`."""

    def __init__(self, lmcache=None, *flags, model=SMALL, precision="fp32", wait=60, num_pages=64):
        tier = () if lmcache is None else ("--kv-tier", f"lmcache://127.0.0.1:{lmcache.port}", "--kv-tier-wait", str(wait))
        flags = ("--device", "cpu", "--precision", precision, "--threads", "1", "--served-model-name", "model", *tier, *flags)
        super().__init__(model, *flags, num_pages=num_pages)

    def ask(self, tokens, max_tokens=8, logprobs=1):
        """What it writes behind these tokens, with the log-probabilities of it, and how many of them it had."""
        body = {"model": "model", "prompt": tokens, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        answer = self.json("/v1/completions", {**body, "logprobs": logprobs} if logprobs else body)
        (choice,) = answer["choices"]
        return (choice["text"], choice.get("logprobs")), answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    def tier(self, what):
        return self.metric(f'mla_kv_tier_{what}_total{{tier="lmcache"}}')

    def wait_until_stored(self, tokens):
        wait_for(lambda: self.tier("tokens_stored") >= tokens, f"{tokens} tokens are not stored")

    def settled(self):
        """Nothing is on its way to the tier any more."""

        def still():
            before = [self.tier(what) for what in ("tokens_stored", "failures", "tokens_dropped")]
            time.sleep(0.3)
            return before == [self.tier(what) for what in ("tokens_stored", "failures", "tokens_dropped")]

        wait_for(still, "stores do not end")
