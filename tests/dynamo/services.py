"""Dynamo's frontend and workers over models/small, in processes of their own on this machine's loopback."""

import atexit
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "python"))

from live_server import PATIENCE, ROOT, wait_for

SMALL = ROOT / "models" / "small"
LOGS = ROOT / "build" / "dynamo" / "logs"
PLANES = ("--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq")


def free_port():
    """Below 32768, since Dynamo 1.6.1 reads DYN_SYSTEM_PORT as a signed number of 16 bits."""
    while True:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", random.randrange(20000, 32768)))
            return s.getsockname()[1]


def get(port, path):
    """Status and text; 0 where nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()
    except OSError:
        return 0, ""


class Process:
    def __init__(self, name, command, folder, **environment):
        LOGS.mkdir(parents=True, exist_ok=True)
        self.name, self.log = name, LOGS / f"{name}.log"
        common = {"DYN_FILE_KV": str(folder), "HF_HUB_OFFLINE": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command], stdout=log, stderr=log, env={**os.environ, **common, **environment}
            )
        atexit.register(self.kill)

    def check(self):
        assert self.process.poll() is None, f"{self.name} has ended: {self.log.read_text()[-3000:]}"

    def kill(self, how=signal.SIGKILL):
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(PATIENCE)


class Worker(Process):
    """python -m flash_mla.dynamo; its metrics are at a port of its own."""

    FLAGS = ("--precision", "float32", "--batch-invariant", "--num-threads", "1", "--num-pages", "64")

    def __init__(self, name, folder, *flags):
        self.port = free_port()
        command = ("flash_mla.dynamo", "--model", str(SMALL), "--served-model-name", "small", *PLANES, *self.FLAGS, *flags)
        super().__init__(name, command, folder, DYN_SYSTEM_PORT=str(self.port))

    def metric(self, name, **labels):
        """The sum of the samples with these labels, of an engine's metric."""
        total = 0.0
        for line in get(self.port, "/metrics")[1].splitlines():
            found = re.match(rf"{name}(?:{{(.*)}})? (\S+)$", line)
            if found and all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
                total += float(found[2])
        return total

    def requests(self):
        return self.metric("mla_requests_submitted_total")

    def wait_until_up(self):
        def up():
            self.check()
            return "mla_cache_pages" in get(self.port, "/metrics")[1]

        wait_for(up, f"{self.name} does not come up: {self.log}")

    def listens_at(self):
        """The IPv4 addresses, with ports, at which the process listens; those of IPv6 as text of 32 digits."""
        sockets = set()
        for file in pathlib.Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(file))
        out = []
        for table in ("tcp", "tcp6"):
            for line in pathlib.Path(f"/proc/{self.process.pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                    address, port = fields[1].split(":")
                    if table == "tcp":
                        address = socket.inet_ntoa(bytes.fromhex(address)[::-1])
                    out.append((address, int(port, 16)))
        return out

    def wait_until_idle(self):
        wait_for(lambda: self.metric("mla_sequences_running") == 0, f"{self.name} goes on")
        assert self.metric("mla_cache_pages_used") == 0


class Frontend(Process):
    def __init__(self, folder, *flags, name="frontend"):
        self.port = free_port()
        command = ("dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(self.port), *PLANES)
        hosts = {f"DYN_{plane}_HOST": "127.0.0.1" for plane in ("TCP_RPC", "TCP_RESPONSE_STREAM", "EVENT_PLANE", "SYSTEM")}
        super().__init__(name, (*command, "--router-mode", "kv", *flags), folder, **hosts)

    def wait_until_up(self):
        def up():
            self.check()
            status, text = get(self.port, "/v1/models")
            return status == 200 and any(model["id"] == "small" for model in json.loads(text)["data"])

        wait_for(up, f"the frontend has no model: {self.log}")
