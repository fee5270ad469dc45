"""`flash-mla serve` under clients that are many, slow, broken, rude or dead."""

import collections
import concurrent.futures
import contextlib
import http.client
import json
import random
import resource
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time

import pytest
from live_server import PATIENCE, PROGRAM, ROOT, Server, cpu_seconds, memory, raw, wait_for

SMALL = ROOT / "models" / "small"
PROMPT = "And it came to pass"


@pytest.fixture(scope="module")
def server():
    server = Server(SMALL, "--batch-invariant")
    yield server
    server.wait_until_idle()
    assert server.stop() == 0


def body(prompt=PROMPT, **kw):
    return {"model": "small", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **kw}


def post(request, path="/v1/completions", headers=""):
    data = json.dumps(request)
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(data)}\r\n\r\n{data}".encode()


def connect(server, data=b"", timeout=PATIENCE):
    s = socket.create_connection(("127.0.0.1", server.port), timeout=timeout)
    s.sendall(data)
    return s


def read_all(s):
    answer = b""
    while part := s.recv(65536):
        answer += part
    return answer


def reset(s):
    """Closes as a killed process with unread bytes does."""
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    s.close()


@contextlib.contextmanager
def files_at_most(soft):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY:
        soft = min(soft, before[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# ---------------------------------------------------------------------------------------------- many


def hold(server, count, request):
    """Opens so many streams and reads their heads."""
    data = post(request, headers="Connection: close\r\n")
    streams = []
    for _ in range(count):
        streams.append(connect(server, data))
    for s in streams:
        assert s.recv(12) == b"HTTP/1.1 200"  # at once, though most of them wait
    return streams


def finish(streams):
    with selectors.DefaultSelector() as selector:
        texts = {s: b"" for s in streams}
        for s in streams:
            s.setblocking(False)
            selector.register(s, selectors.EVENT_READ)
        deadline = time.monotonic() + PATIENCE
        while selector.get_map():
            assert time.monotonic() < deadline, f"{len(selector.get_map())} streams have not ended"
            for key, _ in selector.select(timeout=1):
                part = key.fileobj.recv(65536)
                texts[key.fileobj] += part
                if not part:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
    return list(texts.values())


def test_a_thousand_streams_are_held_open(record_property):
    """Most of them wait in the queue: each has its answer's head, little memory, and its tokens in the end. With
    a soft limit of 512 files, which the server has to raise itself."""
    with files_at_most(512):
        server = Server(SMALL, "--max-batch-size", "16", "--no-request-log")
    with files_at_most(4096):
        server.json("/v1/completions", body())
        before = memory(server)
        blockers = hold(server, 16, body(max_tokens=1900, stream=True))
        wait_for(lambda: server.metric("mla_sequences_running") == 16, "nothing runs")
        grown = []
        for _ in range(2):
            streams = hold(server, 1000, body(max_tokens=2, stream=True))
            assert server.metric("mla_http_connections") >= 1016
            wait_for(lambda: server.metric("mla_sequences_waiting") == 1000, "not all of them wait")
            begin = time.monotonic()
            assert server.json("/health") == {"status": "ok"} and time.monotonic() - begin < 5
            grown.append(memory(server) - before)
            for s in blockers:
                s.close()
            texts = finish(streams)
            assert all(text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for text in texts)
            assert len({text[text.index(b'"text"') :][:30] for text in texts}) == 1
            blockers = hold(server, 16, body(max_tokens=1900, stream=True))
        for s in blockers:
            s.close()
    record_property("bytes_per_idle_stream", grown[0] / 1000)
    print(f"memory per idle stream: {grown[0] / 1000 / 1024:.1f} KiB, the second time {grown[1] / 1000 / 1024:.1f}")
    assert grown[0] < 1000 * (40 << 10)
    # What the allocator keeps differs by some KiB from time to time; a stream that stays would be 10 of them.
    assert grown[1] < grown[0] + 1000 * (8 << 10), "streams leave something behind"
    server.wait_until_idle()
    assert server.stop() == 0


def test_connections_past_the_limit_get_503():
    server = Server(SMALL, "--max-connections", "8")
    idle = [connect(server) for _ in range(8)]
    for _ in range(3):
        answer = raw(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503") and b"Retry-After: 1" in answer
    for s in idle:
        s.close()
    wait_for(lambda: raw(server, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 200"), "no place again")
    assert server.stop() == 0


# ---------------------------------------------------------------------------------------------- broken

WORDS = [None, True, -1, 0, 1.5, 10**40, 1e308, "", "a", "\ud800", "\u0000", "text", "small", [], {}, [[]], [None], [1],
         {"a": 1}, {"type": 5}, [{"type": ["text"]}], [{"role": "user", "content": [{"type": 1}]}], ["a"] * 300]  # fmt: skip
KEYS = ["prompt", "messages", "stream", "stream_options", "n", "stop", "seed", "logprobs", "top_logprobs", "top_p", "model",
        "temperature", "max_tokens", "max_completion_tokens", "top_k", "min_p", "repetition_penalty", "frequency_penalty",
        "stop_token_ids", "ignore_eos", "echo", "suffix", "best_of", "response_format", "tools", "logit_bias"]  # fmt: skip
BAD_TEXT = [b"[", b'{"a":', b"[" * 5000, b'{"a":' * 5000, b"\xff" * 50, b'{"model":"small","prompt":"\xc3\x28\xed\xa0\x80"}',
            b'{"model":"small","prompt":"\xf4\x90\x80\x80"}', b'{"model":"small","prompt":"a","stop":' + b"[" * 9000 + b"]" * 9000 + b"}",
            b"\xef\xbb\xbf{}", b"nul", b'{"model":"small" "prompt":1}', b'{"prompt":"\\ud800\\u0041","model":"small"}']  # fmt: skip
LINES = ["", "", "", "Transfer-Encoding: chunked\r\n", "Transfer-Encoding: gzip\r\n", "Content-Length: 5\r\n",
         "X-Request-Id: \x01\r\n", ": \r\n", "no colon\r\n", " folded\r\n", "Expect: 100-continue\r\n", "Upgrade: h2c\r\n",
         "X: " + "a" * 20000 + "\r\n", "X: a\r\n" * 3000, "Authorization: Bearer " + "b" * 4000 + "\r\n", "\0: \0\r\n"]  # fmt: skip
PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/tokenize", "/v1/models", "/metrics", "/", "/v1/models/../../etc",
         "*", "http://x/health", "/%00", "/\u00e9", "?", "/" + "a" * 20000]  # fmt: skip


def damaged(rng):
    """A request with something wrong with it, most of the time."""
    request = body(max_tokens=2, messages=[{"role": "user", "content": "hi"}])
    for _ in range(rng.randrange(4)):
        request[rng.choice(KEYS)] = rng.choice(WORDS)
    if isinstance(request["max_tokens"], int) and request["max_tokens"] > 100:
        request["max_tokens"] = 3
    text = rng.choice(BAD_TEXT) if rng.random() < 0.15 else json.dumps(request).encode()
    length = len(text) if rng.random() < 0.8 else rng.choice([-1, 0, 3, len(text) + 9, 10**12, 10**30, "0x10", ""])
    method = rng.choice(["POST", "POST", "POST", "GET", "PUT", "X", ""])
    path = rng.choice(PATHS) if rng.random() < 0.5 else "/v1/completions"
    head = f"{method} {path} HTTP/1.{rng.choice('11101')}\r\nHost: x\r\nContent-Length: {length}\r\n{rng.choice(LINES)}"
    data = bytearray(head.encode() + b"\r\n" + text)
    for _ in range(rng.choice([0, 0, 0, 1, 5])):
        at = rng.randrange(len(data))
        change = rng.randrange(4)
        if change == 0:
            data[at] = rng.randrange(256)
        elif change == 1:
            del data[at : at + rng.randrange(20)]
        elif change == 2:
            data[at:at] = rng.randbytes(rng.randrange(20))
        else:
            del data[at:]
        data = data or bytearray(b"\n")
    return bytes(data)


def test_ten_thousand_malformed_requests(server):
    expected = server.json("/v1/completions", body())["choices"]
    requests = [damaged(random.Random(seed)) for seed in range(10000)]
    for data in requests[:500]:  # what the allocator keeps is there before memory is counted
        raw(server, data)
    before = memory(server)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda data: raw(server, data), requests))
    statuses = collections.Counter(a.split(b" ")[1] if a else b"closed" for a in answers)
    assert all(a == b"" or a.startswith(b"HTTP/1.") for a in answers)
    assert not any(s.startswith(b"5") for s in statuses), statuses
    # Not all of them fail at the same gate.
    assert statuses[b"400"] > 1000 and statuses[b"200"] > 20 and statuses[b"431"] > 100 and statuses[b"413"] > 20, statuses
    assert not any(b"/tmp" in a or str(ROOT).encode() in a for a in answers)
    server.wait_until_idle()
    assert memory(server) - before < 64 << 20
    assert server.json("/v1/completions", body())["choices"] == expected


@pytest.mark.parametrize(
    "text",
    [
        '{"model":"small","prompt":"a","stop":' + "[" * 3_000_000 + "]" * 3_000_000 + "}",
        '{"model":"small","prompt":' + "[" * 3_000_000 + "]" * 3_000_000 + "}",
        '{"a":' * 1_000_000,
        "{" + ",".join(f'"{i}":0' for i in range(500_000)) + "}",
        json.dumps(body(stop=[f"no such text {i}" for i in range(100_000)])),
        json.dumps(body(stop_token_ids=[4000] * 1_000_000)),
        json.dumps(body([5] * 2_000_000)),
        json.dumps(body([[5]] * 1_000_000)),
        json.dumps({"model": "small", "messages": [{"role": "user", "content": "a"}] * 150_000}),
    ],
    ids=["deep stop", "deep prompt", "deep objects", "many keys", "many stops", "many stop ids", "long prompt", "many prompts", "many messages"],
)  # fmt: skip
def test_bodies_that_cost_much_are_refused_quickly(server, text):
    begin = cpu_seconds(server)
    for path in ("/v1/completions", "/v1/chat/completions"):
        server.json(path, text, expected=400)
    assert server.call("/v1/tokenize", text)[0] in (200, 400)
    assert cpu_seconds(server) - begin < 10
    assert server.json("/health") == {"status": "ok"}


def test_what_is_too_long_is_refused_and_heard(server):
    """The client is still sending when the answer comes."""
    for data, status in ((b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n" + b" " * 9_000_000, b"413"),
                         (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 3_000_000 + b"\r\n\r\n", b"431")):  # fmt: skip
        assert raw(server, data).startswith(b"HTTP/1.1 " + status)


def test_a_client_that_asks_before_it_sends_a_body(server):
    data = post(body(), headers="Expect: 100-continue\r\nConnection: close\r\n")
    end = data.index(b"\r\n\r\n") + 4
    s = connect(server, data[:end])
    assert s.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    s.sendall(data[end:])
    assert read_all(s).startswith(b"HTTP/1.1 200")


# ---------------------------------------------------------------------------------------------- large

LARGE = " ".join(f"word{i % 977}" for i in range(1_100_000))[: (8 << 20) - 200]  # 8 MB with what stands around it


def send_all(clients, data):
    """Sends every client's bytes but the last, and those when all others are there: the server has the whole of a body
    only when it has nearly all of the others."""
    with concurrent.futures.ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(lambda s: s.sendall(data[:-1]), clients))
    for s in clients:
        s.sendall(data[-1:])


def large_post(path="/v1/tokenize"):
    request = {"prompt": LARGE} if path == "/v1/tokenize" else body(LARGE)
    return post(request, path, headers="Connection: close\r\n")


def health_beside_large_bodies(server, path):
    """Seconds that /health takes, ascending, while eight bodies of 8 MB are in flight."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        clients = [connect(server) for _ in range(8)]
        sent = [pool.submit(s.sendall, large_post(path)) for s in clients]
        answers = [pool.submit(read_all, s) for s in clients]
        health = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        times = []
        while not all(a.done() for a in answers):
            begin = time.monotonic()
            health.request("GET", "/health")
            assert health.getresponse().read() == b'{"status":"ok"}'
            times.append(time.monotonic() - begin)
            time.sleep(0.005)
        for s in sent:
            s.result()
        statuses = {a.result()[:12] for a in answers}
    assert statuses == ({b"HTTP/1.1 200"} if path == "/v1/tokenize" else {b"HTTP/1.1 400"})  # too long for the model
    print(f"/health: {len(times)} times, median {sorted(times)[len(times) // 2] * 1e3:.1f} ms, longest {max(times) * 1e3:.1f} ms")
    return sorted(times)


@pytest.mark.parametrize("path", ["/v1/tokenize", "/v1/completions"])
def test_health_is_answered_while_large_bodies_are_read(path):
    """They hold up nobody who wants little: one answer in twenty may take longer, but not the seconds that bodies do. A
    machine that is busy with others gets another chance."""
    server = Server(SMALL)
    for _ in range(4):
        times = health_beside_large_bodies(server, path)
        quick = times[len(times) * 19 // 20] < 0.1 and times[-1] < 0.5
        if quick:
            break
    assert quick, "/health waits for large bodies"
    assert server.json("/v1/completions", body())["choices"]
    assert server.stop() == 0


def test_large_bodies_of_clients_that_left_are_not_parsed():
    server = Server(SMALL)
    clients = [connect(server) for _ in range(8)]
    send_all(clients, large_post())
    for s in clients:
        s.close()
    wait_for(lambda: server.log.read_text().count('"path":"/v1/tokenize"') == 8, "bodies of dead clients are kept")
    assert server.log.read_text().count('"status":499') >= 4  # two threads had begun one each, or had two more
    assert server.json("/v1/tokenize", {"prompt": "a" * 100_000})["count"] > 1000
    assert server.stop() == 0


def test_a_text_that_ends_for_want_of_pages_says_so():
    server = Server(SMALL, num_pages=2)
    request = body(max_tokens=1000, logprobs=None)
    for stream in (False, True):
        status, text, headers = server.call("/v1/completions", dict(request, stream=stream), {"X-Request-Id": f"short-{stream}"})
        last = json.loads(text) if not stream else json.loads(text.split("\n\n")[-3][len("data: ") :])
        assert last["choices"][0]["finish_reason"] == "length" and last["choices"][0]["limited_by"] == "cache"
        assert server.logged(f"short-{stream}")["limited_by"] == "cache"
    enough = server.json("/v1/completions", body())["choices"][0]
    assert enough["finish_reason"] == "length" and "limited_by" not in enough
    assert server.stop() == 0


def test_more_memory_than_there_is_is_an_error_that_says_so():
    for flags in (["--memory", "4000GiB"], ["--num-pages", "1000000000"]):
        done = subprocess.run([PROGRAM, "serve", "--model", str(SMALL), "--port", "0", *flags], capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 2 and "GiB" in done.stderr, done.stderr
        assert ("memory_bytes" if flags[0] == "--memory" else "num_pages") in done.stderr


def test_a_model_that_does_not_fit_is_an_error_that_says_so(tmp_path):
    """A config in the shape of V3, on a machine that has no terabyte: refused before anything is allocated."""
    for file in SMALL.iterdir():
        if file.name != "config.json" and file.is_file():
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((SMALL / "config.json").read_text())
    config.update(hidden_size=7168, num_hidden_layers=61, intermediate_size=18432, moe_intermediate_size=65536)
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [PROGRAM, "serve", "--model", str(tmp_path), "--port", "0", "--load-format", "dummy", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and "does not fit" in done.stderr and "GiB" in done.stderr, done.stderr


# ---------------------------------------------------------------------------------------------- slow


def test_slow_requests_are_closed():
    server = Server(SMALL, "--read-timeout", "1", "--idle-timeout", "1")
    slow = [connect(server) for _ in range(20)]
    for s in slow[10:]:  # the head is there, the body drips
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
    begin = time.monotonic()
    open_ones = set(slow[1:])  # the first says nothing at all
    while open_ones and time.monotonic() < begin + PATIENCE:
        for s in list(open_ones):
            try:
                s.send(b"P")
                if s.recv(100, socket.MSG_DONTWAIT) == b"":
                    open_ones.discard(s)
            except BlockingIOError:
                pass
            except OSError:
                open_ones.discard(s)
        time.sleep(0.1)
        assert server.json("/health") == {"status": "ok"}
    assert not open_ones
    assert slow[0].recv(1) == b""
    for s in slow:
        s.close()
    assert server.stop() == 0


def test_clients_that_do_not_read_are_closed():
    """An answer of some 10 MB waits for clients with full buffers; others go on."""
    server = Server(SMALL, "--write-timeout", "1")
    deaf = []
    for _ in range(4):
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.connect(("127.0.0.1", server.port))
        s.sendall(post({"prompt": "a" * 3_000_000}, "/v1/tokenize"))
        deaf.append(s)
    for _ in range(5):
        assert server.json("/v1/completions", body())["usage"]["completion_tokens"] == 12
    wait_for(lambda: server.metric("mla_http_connections") == 1, "clients that do not read are kept")
    for s in deaf:
        s.close()
    assert server.stop() == 0


# ---------------------------------------------------------------------------------------------- dead

STREAMING_CLIENT = """
import socket, sys
s = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
s.sendall(sys.stdin.buffer.read())
s.recv(10)
print("streams", flush=True)
while s.recv(65536): pass
"""


@pytest.mark.parametrize("early_bytes", [b"", b"GET /health HTTP/1.1\r\n"], ids=["", "next request begun"])
@pytest.mark.parametrize("stream", [True, False])
def test_killed_clients_free_their_pages_within_a_step(server, stream, early_bytes):
    def start():
        return subprocess.Popen([sys.executable, "-c", STREAMING_CLIENT, str(server.port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    cancelled = 'mla_continuations_finished_total{reason="cancelled"}'
    before = server.metric(cancelled)
    clients = [start() for _ in range(4)]
    for i, client in enumerate(clients):
        client.stdin.write(post(body(f"{PROMPT} {i}", max_tokens=1900, stream=stream)) + early_bytes)
        client.stdin.close()
    if stream:
        for client in clients:
            assert client.stdout.readline() == b"streams\n"
    wait_for(lambda: server.metric("mla_sequences_running") == 4, "the clients' requests do not run")
    assert server.metric("mla_cache_pages_used") >= 4
    for client in clients:
        client.send_signal(signal.SIGKILL)
    wait_for(lambda: server.metric("mla_cache_pages_used") == 0, "pages of dead clients are kept")
    # Not because their texts were whole: a client that has begun its next request is looked at ten times a second.
    assert server.metric(cancelled) == before + 4
    steps = server.metric("mla_steps_total")
    time.sleep(0.05)
    assert server.metric("mla_steps_total") == steps, "the engine steps with nothing to do"
    assert server.metric("mla_sequences_running") == server.metric("mla_sequences_waiting") == 0
    for client in clients:
        client.wait()
        client.stdout.close()


# ---------------------------------------------------------------------------------------------- rude


def test_soak_with_random_cancels_leaks_nothing():
    """Every answer that arrives whole is the one that the request gets alone, and in the end every page can be had."""
    pages = 12
    server = Server(SMALL, "--batch-invariant", "--max-batch-size", "16", "--max-tokens-per-step", "160", num_pages=pages)
    begin = "And it came to pass in those days, that there went out a decree "
    requests = [body(begin * (1 + i % 5) + str(i % 7), max_tokens=80 + 9 * i % 60, n=1 + (i % 4 == 3), seed=i,
                     temperature=i % 3 / 2, logprobs=2 if i % 5 == 0 else None) for i in range(24)]  # fmt: skip
    alone = [server.json("/v1/completions", r)["choices"] for r in requests]
    answers, failures = collections.Counter(), []
    begin_time = time.monotonic()

    def enough():
        """Ten seconds, and more where the machine has done little in them."""
        if time.monotonic() < begin_time + 10:
            return False
        busy = len(answers) == 5 and min(answers.values()) > 10 and server.metric("mla_preemptions_total") > 0
        return busy or time.monotonic() > begin_time + PATIENCE

    def client(seed):
        rng = random.Random(seed)
        while not failures and not enough():
            i = rng.randrange(len(requests))
            kind = rng.choice(["whole", "whole", "streamed", "left", "reset", "silent"])
            if kind == "whole":
                status, text, _ = server.call("/v1/completions", requests[i])
                if status != 200 or json.loads(text)["choices"] != alone[i]:
                    failures.append((requests[i], status, text, alone[i]))
            else:
                s = connect(server, post(dict(requests[i], stream=True), headers="Connection: close\r\n"))
                if kind == "streamed":
                    text = read_all(s)
                    events = [json.loads(line[6:]) for line in text.decode().splitlines() if line.startswith("data: {")]
                    got = ["".join(e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == n) for n in range(len(alone[i]))]  # fmt: skip
                    if got != [c["text"] for c in alone[i]]:
                        failures.append((requests[i], text, alone[i]))
                elif kind != "silent":
                    for _ in range(rng.randrange(4)):
                        s.recv(300)
                (reset if kind == "reset" else socket.socket.close)(s)
            answers[kind] += 1

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        list(pool.map(client, range(24)))
    assert not failures, failures[0]
    server.wait_until_idle()
    assert min(answers.values()) > 10 and server.metric('mla_continuations_finished_total{reason="cancelled"}') > 20, answers
    assert server.metric('mla_continuations_finished_total{reason="error"}') == 0
    assert server.metric("mla_pages_evicted_total") > 0 and server.metric("mla_preemptions_total") > 0, "the cache was never full"
    print(dict(answers), "preemptions", server.metric("mla_preemptions_total"), "evictions", server.metric("mla_pages_evicted_total"))
    # mla_cache_pages_used counts pages that some sequence refers to; what is left is free or kept for reuse, and a
    # prompt that needs every page gets them all.
    assert server.metric("mla_cache_pages_used") == 0 and server.metric("mla_cache_pages_cached") <= pages
    longest = server.json("/v1/models")["data"][0]["max_model_len"]
    filling = [3 + i % 1000 for i in range(longest - 1)]
    assert server.json("/v1/completions", body(filling, max_tokens=8))["usage"]["prompt_tokens"] == longest - 1
    with concurrent.futures.ThreadPoolExecutor(pages) as pool:
        list(pool.map(lambda i: server.json("/v1/completions", body([i + 3] * 63, max_tokens=1)), range(pages)))
    server.wait_until_idle()
    assert server.stop() == 0


def test_answers_under_load_are_those_of_a_single_request(server):
    requests = [body(f"{PROMPT} {i} " * (1 + i % 9), max_tokens=24, temperature=i % 2, seed=i, logprobs=3) for i in range(48)]
    alone = [server.json("/v1/completions", r)["choices"] for r in requests]
    with concurrent.futures.ThreadPoolExecutor(48) as pool:
        together = list(pool.map(lambda r: server.json("/v1/completions", r)["choices"], requests))
    assert together == alone


def test_a_full_queue_answers_429_at_once():
    server = Server(SMALL, "--max-waiting", "2", "--max-batch-size", "1")
    running = connect(server, post(body(max_tokens=1900, stream=True)))
    wait_for(lambda: server.metric("mla_sequences_running") == 1, "nothing runs")
    waiting = [connect(server, post(body(max_tokens=1, stream=True), headers="Connection: close\r\n")) for _ in range(2)]
    wait_for(lambda: server.metric("mla_sequences_waiting") == 2, "nothing waits")
    for _ in range(20):
        status, text, headers = server.call("/v1/completions", body())
        assert status == 429 and headers["retry-after"] == "1"
        assert json.loads(text)["error"]["code"] == "overloaded"
    running.close()
    for s in waiting:
        assert b"data: [DONE]" in read_all(s)
    assert server.json("/v1/completions", body())["choices"]
    server.wait_until_idle()
    assert server.stop() == 0


# ---------------------------------------------------------------------------------------------- stopping


def test_the_first_sigterm_drains_and_the_second_stops():
    server = Server(SMALL)
    long = connect(server, post(body(max_tokens=1900, stream=True)))
    short = connect(server, post(body(max_tokens=800, stream=True), headers="Connection: close\r\n"))
    kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    kept.request("GET", "/ready")
    assert kept.getresponse().read() == b'{"status":"ready"}'
    wait_for(lambda: server.metric("mla_sequences_running") == 2, "nothing runs")
    server.process.send_signal(signal.SIGTERM)

    def refuses():
        try:
            socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE).close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:  # the listening socket was closed between two steps of the handshake
            return False
        return False

    wait_for(refuses, "new connections are taken")
    kept.request("POST", "/v1/completions", json.dumps(body()))
    answer = kept.getresponse()
    assert answer.status == 503 and answer.headers["connection"] == "close"
    assert b"data: [DONE]" in read_all(short)  # what ran is finished
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=PATIENCE) == 0
    assert b"data: [DONE]" not in read_all(long)
    lines = server.log.read_text()
    assert '"status":499' in lines and "Sanitizer" not in lines
    server.log.unlink()


def busy_with_large_bodies(server):
    """Eight clients whose bodies are being tokenized or wait for it."""
    clients = [connect(server) for _ in range(8)]
    send_all(clients, large_post())
    return clients


def all_answers(clients):
    """Those that are whole; the clients are closed."""
    out = []
    for s in clients:
        with s, contextlib.suppress(ConnectionResetError):
            text = read_all(s)
            if text.endswith((b"}", b"data: [DONE]\n\n\r\n0\r\n\r\n")):
                out.append(text)
    return out


def test_a_second_sigterm_ends_the_process_whatever_runs():
    server = Server(SMALL)
    running = connect(server, post(body(max_tokens=1900, stream=True)))
    clients = busy_with_large_bodies(server)
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "a second signal" in server.log.read_text(), "the first signal is not heard")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=PATIENCE) == 0
    assert not all_answers([running]) and len(all_answers(clients)) < 5, "it has finished what ran"
    server.log.unlink()


def test_the_first_sigterm_finishes_large_bodies():
    server = Server(SMALL)
    clients = busy_with_large_bodies(server)
    server.process.send_signal(signal.SIGTERM)
    assert all(read_all(s).startswith(b"HTTP/1.1 200") for s in clients)
    assert server.process.wait(timeout=PATIENCE) == 0
    server.log.unlink()
