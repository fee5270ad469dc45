"""`flash-mla serve` in a process of its own, for tests."""

import atexit
import http.client
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("FLASH_MLA_PROGRAM", str(ROOT / "build/release/src/cli/flash-mla"))


# How long a test waits for what has to come. Cores are few and often busy: what takes a moment may take seconds.
PATIENCE = 300


def wait_for(condition, what, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class Server:
    BUSY = ("mla_sequences_running", "mla_sequences_waiting", "mla_cache_pages_used")

    def __init__(self, directory, *flags, num_pages=64):
        self.process = subprocess.Popen(
            [PROGRAM, "serve", "--model", str(directory), "--port", "0", "--num-pages", str(num_pages), *flags],
            stdout=subprocess.DEVNULL,  # nothing of the caller's is held open by it
            stderr=(log := tempfile.NamedTemporaryFile("w", suffix=".log", delete=False)),
            text=True,
        )
        atexit.register(self.process.kill)  # a test that failed has not stopped it
        self.log = pathlib.Path(log.name)  # a file: nobody has to read it for the server to go on
        match = None
        while match is None:
            match = re.search(r":(\d+)/v1", self.log.read_text())
            assert match or self.process.poll() is None, self.log.read_text()
            time.sleep(0.01)
        self.port = int(match.group(1))

    def logged(self, request_id):
        """The log's line of a request; it is written after the answer."""

        def found():
            lines = self.log.read_text().rpartition("\n")[0].splitlines()  # the last may be half written
            lines = [json.loads(x) for x in lines if x.startswith("{")]
            return [x for x in lines if x.get("request_id") == request_id]

        wait_for(found, f"nothing is logged for {request_id}")
        (line,) = found()
        return line

    def call(self, path, body=None, headers=None, method=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        data = body if body is None or isinstance(body, (str, bytes)) else json.dumps(body)
        connection.request(method or ("GET" if body is None else "POST"), path, data, headers or {})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text, response.headers

    def json(self, path, body=None, expected=200, **kw):
        status, text, _ = self.call(path, body, **kw)
        assert status == expected, text
        return json.loads(text)

    def metric(self, name):
        text = self.call("/metrics")[1]
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M).group(1))

    def wait_until_idle(self):
        wait_for(lambda: all(self.metric(m) == 0 for m in self.BUSY), "pages are still in use")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=PATIENCE)
        self.log.unlink()
        return code


def raw(server, data, timeout=PATIENCE, half_close=True):
    """What the server answers to these bytes and an end of input; b"" if it only closes. Without `half_close` it is the
    server that must close."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout) as s:
        answer = b""
        try:
            s.sendall(data)
            if half_close:
                s.shutdown(socket.SHUT_WR)
            while part := s.recv(65536):
                answer += part
        except TimeoutError:
            raise AssertionError(f"the connection hangs after {data!r}") from None
        except OSError:
            pass  # closed while bytes of ours were on their way
        return answer


def cpu_seconds(server):
    """Of the server's process, all its threads."""
    fields = pathlib.Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(server):
    """Bytes of the server's process in memory."""
    text = pathlib.Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", text).group(1)) << 10
