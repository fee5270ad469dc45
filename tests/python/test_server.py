"""`flash-mla serve` as a client sees it, on a small random checkpoint."""

import concurrent.futures
import http.client
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import time

import pytest
from checkpoints import write_checkpoint
from test_llm import write_tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("FLASH_MLA_PROGRAM", str(ROOT / "build/release/src/cli/flash-mla"))


class Server:
    BUSY = ("mla_sequences_running", "mla_sequences_waiting", "mla_cache_pages_used")

    def __init__(self, directory, *flags):
        self.process = subprocess.Popen(
            [PROGRAM, "serve", "--model", str(directory), "--port", "0", "--num-pages", "64", *flags],
            stderr=subprocess.PIPE,
            text=True,
        )
        line = self.process.stderr.readline()
        match = re.search(r":(\d+)/v1", line)
        assert match, line + self.process.stderr.read()
        self.port = int(match.group(1))

    def call(self, path, body=None, headers={}, method=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, (str, bytes)) else json.dumps(body)
        connection.request(method or ("GET" if body is None else "POST"), path, data, headers)
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
        for _ in range(200):
            if all(self.metric(m) == 0 for m in self.BUSY):
                return
            time.sleep(0.02)
        raise AssertionError("pages are still in use")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "letters"
    path.mkdir()
    write_checkpoint("letters", path)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def server(directory):
    server = Server(directory, "--precision", "fp32", "--batch-invariant", "--max-waiting", "64")
    yield server
    server.wait_until_idle()
    assert server.stop() == 0


def body(prompt="Hello", **kw):
    return {"model": "letters", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **kw}


def events(text):
    parts = [line[len("data: ") :] for line in text.split("\n\n") if line]
    assert parts[-1] == "[DONE]"
    return [json.loads(part) for part in parts[:-1]]


def test_models_health_and_tokenize(server):
    assert server.json("/v1/models")["data"][0]["id"] == "letters"
    assert server.json("/health") == {"status": "ok"}
    assert server.json("/ready") == {"status": "ready"}
    assert server.json("/v1/tokenize", {"prompt": "abc"})["count"] == 3


def test_streamed_and_whole_answers_agree(server):
    whole = server.json("/v1/completions", body(["Hello", "abc"], n=2, temperature=1, seed=3))
    assert [c["index"] for c in whole["choices"]] == [0, 1, 2, 3]
    assert whole["usage"]["prompt_tokens"] == 8 and whole["usage"]["completion_tokens"] == 48
    request = body(["Hello", "abc"], n=2, temperature=1, seed=3, stream=True, stream_options={"include_usage": True})
    status, text, headers = server.call("/v1/completions", request)
    assert status == 200 and headers["content-type"] == "text/event-stream"
    texts = [""] * 4
    chunks = events(text)
    for chunk in chunks[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [c["text"] for c in whole["choices"]]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 48


def test_many_clients_get_what_one_gets(server):
    prompts = [f"client {i % 7}" * (1 + i % 5) for i in range(24)]
    expected = [server.json("/v1/completions", body(p))["choices"][0]["text"] for p in prompts]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        got = list(pool.map(lambda p: server.json("/v1/completions", body(p))["choices"][0]["text"], prompts))
    assert got == expected


@pytest.mark.parametrize(
    "request_body, status, param",
    [
        ("{", 400, None),
        ("[]", 400, None),
        (b"\xff\xfe", 400, None),
        ({"prompt": "a"}, 400, "model"),
        ({"model": "other", "prompt": "a"}, 404, "model"),
        ({"model": "letters"}, 400, "prompt"),
        (body(""), 400, None),
        (body(5), 400, "prompt"),
        (body([1, "a"]), 400, "prompt"),
        (body([999]), 400, None),
        (body("a" * 600), 400, None),
        (body(top_p=7), 400, "top_p"),
        (body(temperature="hot"), 400, "temperature"),
        (body(max_tokens=1.5), 400, "max_tokens"),
        (body(max_tokens=10**30), 400, "max_tokens"),
        (body(stop=[""]), 400, "stop"),
        (body(stop=5), 400, "stop"),
        (body(n=1000), 400, "n"),
        (body(echo=True), 400, "echo"),
        (body(stream_options={}), 400, "stream_options"),
    ],
)
def test_errors_have_openais_shape(server, request_body, status, param):
    error = server.json("/v1/completions", request_body, expected=status)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert "/tmp" not in error["message"]


def test_chat_errors(server):
    for messages in (None, [], "hi", [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}]):
        server.json("/v1/chat/completions", {"model": "letters", "messages": messages}, expected=400)
    error = server.json(
        "/v1/chat/completions", {"model": "letters", "messages": [{"role": "user", "content": "hi"}]}, expected=400
    )
    assert "chat template" in error["error"]["message"] and "tmp" not in error["error"]["message"]


def test_unknown_paths_and_methods(server):
    server.json("/v1/nothing", expected=404)
    server.json("/v1/models", method="DELETE", expected=405)
    server.json("/v1/completions", expected=405)


def test_a_client_that_leaves_frees_its_pages(server):
    name = 'mla_continuations_finished_total{reason="cancelled"}'
    before = server.metric(name)
    for _ in range(3):
        data = json.dumps(body(max_tokens=500, stream=True))
        s = socket.create_connection(("127.0.0.1", server.port))
        s.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n{data}".encode())
        assert s.recv(10)
        s.close()
    deadline = time.monotonic() + 10
    while server.metric(name) < before + 3:
        assert time.monotonic() < deadline, "requests of clients that left go on"
        time.sleep(0.02)
    server.wait_until_idle()


def test_malformed_http_is_survived(server):
    for garbage in (b"\r\n\r\n", b"GET\r\n\r\n", b"\x00" * 100, b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
                    b"GET / HTTP/1.1\r\nX: " + b"a" * 20000 + b"\r\n\r\n",
                    b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n"):  # fmt: skip
        s = socket.create_connection(("127.0.0.1", server.port))
        s.settimeout(10)
        try:
            s.sendall(garbage)
            s.shutdown(socket.SHUT_WR)
            answer = s.recv(4096)
        except OSError as error:
            assert not isinstance(error, TimeoutError), "the connection hangs"
            answer = b""  # the server has closed already
        assert answer == b"" or b" 4" in answer.split(b"\r\n")[0]
        s.close()
    assert server.json("/health") == {"status": "ok"}


def test_full_queue_answers_429(directory):
    server = Server(directory, "--max-waiting", "1", "--max-batch-size", "1")
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: server.call("/v1/completions", body(max_tokens=400)), range(12)))
    statuses = [a[0] for a in answers]
    assert set(statuses) == {200, 429}
    assert all(a[2]["retry-after"] == "1" for a in answers if a[0] == 429)
    server.wait_until_idle()
    assert server.stop() == 0


def test_api_keys(directory):
    server = Server(directory, "--api-key", "secret", "--api-key", "other")
    server.json("/v1/models", expected=401)
    server.json("/v1/completions", body(), expected=401, headers={"Authorization": "Bearer secre"})
    server.json("/v1/completions", body(), headers={"Authorization": "Bearer other"})
    server.json("/health")
    assert server.stop() == 0


def test_sigterm_finishes_what_runs(directory):
    server = Server(directory)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.json, "/v1/completions", body(max_tokens=500))
        while server.metric("mla_sequences_running") == 0 and not answer.done():
            time.sleep(0.005)
        assert server.stop() == 0
        assert answer.result()["usage"]["completion_tokens"] == 500
