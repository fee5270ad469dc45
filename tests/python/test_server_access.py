"""Who may call `flash-mla serve`: names in Host, pages of other origins, keys; and what it goes by. From raw sockets."""

import json
import re
import socket
import subprocess

import pytest
from live_server import PATIENCE, PROGRAM, ROOT, Server, raw, wait_for

SMALL = ROOT / "models" / "small"
PAGE = "https://app.example.com"


def body(**kw):
    return {"model": "small", "prompt": "And", "max_tokens": 4, "temperature": 0, "ignore_eos": True, **kw}


def ask(server, path, method="GET", body=None, host="x", **fields):
    """Status, header fields (lower case) and body of an answer to a request written out by hand."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    if body is not None:
        lines.append(f"Content-Length: {len(data)}")
    head, _, text = raw(server, "\r\n".join(lines).encode() + b"\r\n\r\n" + data, half_close=False).partition(b"\r\n\r\n")
    status, *rest = head.decode().split("\r\n")
    return int(status.split()[1]), {k.lower(): v for k, v in (line.split(": ", 1) for line in rest)}, text


@pytest.fixture(scope="module")
def server():
    server = Server(SMALL, "--api-key", "a key", "--cors-origin", PAGE, "--cors-origin", "http://localhost:3000",
                    "--served-model-name", "first", "--served-model-name", "second", "--stream-keep-alive", "1",
                    "--max-batch-size", "1", "--max-model-len", "1500")  # fmt: skip
    yield server
    server.wait_until_idle()
    assert server.stop() == 0


# ---------------------------------------------------------------------------------------------- Host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "[::1]:8000", "localhost", "LocalHost:99", "app.localhost", "model-server:80", "10.1.2.3"])
def test_at_a_loopback_address_addresses_and_local_names_are_answered(server, host):
    assert ask(server, "/health", host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "evil.example."])
def test_at_a_loopback_address_a_strangers_name_is_refused(server, host):
    """A page of that name, which its owner lets resolve to 127.0.0.1, would read the answer."""
    for path in ("/health", "/metrics", "/v1/models", "/"):
        status, _, text = ask(server, path, host=host, Authorization="Bearer a key")
        error = json.loads(text)["error"]
        assert status == 403 and error["code"] == "host_not_allowed" and "--allowed-host" in error["message"]


def test_allowed_hosts():
    server = Server(SMALL, "--allowed-host", "api.example.com", "--allowed-host", "*.inside.example")
    for host in ("API.example.com", "api.example.com:443", "api.example.com.", "a.inside.example", "a.b.inside.example", "localhost", "127.0.0.1"):
        assert ask(server, "/health", host=host)[0] == 200, host
    for host in ("example.com", "xapi.example.com", "inside.example", "x"):
        assert ask(server, "/health", host=host)[0] == 403, host
    assert server.stop() == 0
    server = Server(SMALL, "--allowed-host", "*")
    assert ask(server, "/health", host="evil.example")[0] == 200
    assert server.stop() == 0


def test_at_a_public_address_any_host_is_answered_and_a_missing_key_is_warned_of(monkeypatch):
    server = Server(SMALL, "--host", "0.0.0.0")
    assert ask(server, "/health", host="api.example.com")[0] == 200
    log = server.log.read_text()
    assert "warning" in log and "0.0.0.0" in log and "FLASH_MLA_API_KEY" in log
    assert server.stop() == 0
    monkeypatch.setenv("FLASH_MLA_API_KEY", "from outside")
    server = Server(SMALL, "--host", "0.0.0.0")
    assert "warning" not in server.log.read_text()
    assert ask(server, "/v1/models")[0] == 401
    assert ask(server, "/v1/models", Authorization="Bearer from outside")[0] == 200
    assert server.stop() == 0
    server = Server(SMALL, "--api-key", "given")  # the command line comes first
    assert ask(server, "/v1/models", Authorization="Bearer from outside")[0] == 401
    assert "warning" not in server.log.read_text()
    assert server.stop() == 0


@pytest.mark.parametrize(
    "flags",
    [["--allowed-host", "http://a"], ["--allowed-host", "a:80"], ["--allowed-host", ""], ["--cors-origin", "app.example.com"],
     ["--cors-origin", "https://a/"], ["--cors-origin", "https://*.a"], ["--cors-origin", ""], ["--served-model-name", ""],
     ["--api-key", ""], ["--stream-keep-alive", "-1"]],
    ids=" ".join,
)  # fmt: skip
def test_names_that_no_request_could_have_are_refused_at_the_start(flags):
    done = subprocess.run([PROGRAM, "serve", "--model", str(SMALL), "--port", "0", *flags], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and flags[0] in done.stderr, done.stderr


def test_a_length_past_the_models_is_refused_at_the_start():
    done = subprocess.run([PROGRAM, "serve", "--model", str(SMALL), "--port", "0", "--max-model-len", "1000000"], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "max_model_len is 1000000" in done.stderr, done.stderr


# ---------------------------------------------------------------------------------------------- pages of other origins


def preflight(server, origin, path="/v1/chat/completions", method="POST", headers="authorization,content-type,x-stainless-os"):
    fields = {"Origin": origin, "Access_Control_Request_Method": method, "Access_Control_Request_Headers": headers}
    return ask(server, path, method="OPTIONS", **fields)


def test_a_page_of_an_allowed_origin_may_call(server):
    for origin in (PAGE, "http://localhost:3000"):
        status, head, text = preflight(server, origin)
        assert (status, text) == (204, b"") and "content-length" not in head and "content-type" not in head
        assert head["access-control-allow-origin"] == origin and head["vary"] == "Origin"
        assert head["access-control-allow-methods"] == "POST"
        assert head["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"
    for request in (body(model="first"), body(model="first", stream=True), body(model="none")):
        status, head, _ = ask(server, "/v1/completions", method="POST", body=request, Origin=PAGE, Authorization="bearer a key", Sec_Fetch_Site="cross-site")
        assert status == (404 if request["model"] == "none" else 200)
        assert head["access-control-allow-origin"] == PAGE and head["vary"] == "Origin"
        assert "x-request-id" in head["access-control-expose-headers"]
    status, head, _ = ask(server, "/v1/completions", method="POST", body=body(), Origin=PAGE)
    assert status == 401 and head["access-control-allow-origin"] == PAGE, "the page shall see what is wrong"


def test_a_page_of_another_origin_may_not(server):
    for origin in ("https://evil.example", "http://app.example.com", "https://app.example.com:444", "null", "https://app.example.com.evil.example"):
        status, head, _ = preflight(server, origin)
        assert status in (401, 405) and not any(name.startswith("access-control") for name in head)
        status, head, text = ask(server, "/v1/completions", method="POST", body=body(model="first"), Origin=origin, Authorization="Bearer a key", Sec_Fetch_Site="cross-site")
        assert status == 403 and json.loads(text)["error"]["code"] == "origin_not_allowed"
        assert not any(name.startswith("access-control") for name in head)
    # Programs send no Sec-Fetch-Site, the server's own page none that is cross-site.
    for fields in ({"Origin": "https://evil.example"}, {"Sec_Fetch_Site": "same-origin", "Origin": "https://evil.example"}):
        status, head, _ = ask(server, "/v1/completions", method="POST", body=body(model="first"), Authorization="Bearer a key", **fields)
        assert status == 200 and "access-control-allow-origin" not in head


def test_a_permission_is_for_what_there_is(server):
    assert preflight(server, PAGE, path="/v1/nothing")[0] == 404
    assert preflight(server, PAGE, path="/v1/models", method="GET")[1]["access-control-allow-methods"] == "GET, HEAD"
    assert "access-control-allow-headers" not in preflight(server, PAGE, headers="a: b")[1]
    assert ask(server, "/v1/completions", method="OPTIONS", Origin=PAGE, Authorization="Bearer a key")[0] == 405
    # The connection goes on.
    asked = f"OPTIONS /health HTTP/1.1\r\nHost: x\r\nOrigin: {PAGE}\r\nAccess-Control-Request-Method: GET\r\n\r\n".encode()
    assert re.findall(rb"HTTP/1.1 (\d+)", raw(server, asked + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")) == [b"204", b"200"]


def test_any_origin():
    server = Server(SMALL, "--cors-origin", "*")
    for origin in (PAGE, "null"):
        assert preflight(server, origin)[1]["access-control-allow-origin"] == origin
        fields = {"Origin": origin, "Sec_Fetch_Site": "cross-site"}
        assert ask(server, "/v1/completions", method="POST", body=body(), **fields)[0] == 200
    assert server.stop() == 0


# ---------------------------------------------------------------------------------------------- keys and names


def test_a_missing_key_is_asked_for(server):
    for path, method in (("/v1/models", "GET"), ("/v1/completions", "POST"), ("/v1/nothing", "GET")):
        status, head, _ = ask(server, path, method=method, body=body() if method == "POST" else None)
        assert status == 401 and head["www-authenticate"].startswith("Bearer")
    for scheme in ("Bearer ", "bearer ", "BEARER ", "bEaReR   ", ""):
        assert ask(server, "/v1/models", Authorization=scheme + "a key")[0] == 200
    for value in ("Bearer", "Bearer ", "bearer another", "Basic a key", "Bearer a", "Bearer a key!"):
        assert ask(server, "/v1/models", Authorization=value)[0] == 401


def test_a_wrong_method_is_told_the_right_ones(server):
    status, head, _ = ask(server, "/v1/completions", Authorization="Bearer a key")
    assert status == 405 and head["allow"] == "POST"


def test_a_model_of_several_names(server):
    key = {"Authorization": "Bearer a key"}
    assert [m["id"] for m in server.json("/v1/models", headers=key)["data"]] == ["first", "second"]
    for name in ("first", "second"):
        assert server.json(f"/v1/models/{name}", headers=key)["id"] == name
        assert server.json("/v1/completions", body(model=name), headers=key)["model"] == "first"
    server.json("/v1/models/small", headers=key, expected=404)
    error = server.json("/v1/completions", body(model="small"), headers=key, expected=404)["error"]
    assert error["code"] == "model_not_found" and '"first" or "second"' in error["message"]


def test_version(server):
    shown = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True).stdout.strip()
    assert server.json("/version") == {"version": shown}


def test_tokens_to_text(server):
    key = {"Authorization": "Bearer a key"}
    for tokenize, detokenize in (("/v1/tokenize", "/v1/detokenize"), ("/tokenize", "/detokenize")):
        for text in ("And it came to pass", "ünïcode ☃ 漢字", ""):
            tokens = server.json(tokenize, {"prompt": text, "add_special_tokens": False}, headers=key)["tokens"]
            assert server.json(detokenize, {"model": "first", "tokens": tokens}, headers=key) == {"prompt": text}
    tokens = server.json("/tokenize", {"prompt": "And"}, headers=key)["tokens"]
    assert server.json("/detokenize", {"tokens": tokens}, headers=key)["prompt"] == "<｜begin▁of▁sentence｜>And"
    assert server.json("/detokenize", {"tokens": tokens, "skip_special_tokens": True}, headers=key)["prompt"] == "And"
    for wrong in (None, "a", [-1], [1 << 40], [10**6], [1.5], ["a"], [[1]]):
        error = server.json("/detokenize", {"tokens": wrong}, headers=key, expected=400)["error"]
        assert error["param"] == "tokens"


def test_the_longest_text_may_be_set(server):
    key = {"Authorization": "Bearer a key"}
    assert server.json("/v1/models", headers=key)["data"][0]["max_model_len"] == 1500
    choice = server.json("/v1/completions", body(model="first", prompt=[5] * 1495, max_tokens=50), headers=key)["choices"][0]
    assert (choice["finish_reason"], choice["limited_by"]) == ("length", "max_model_len")
    error = server.json("/v1/completions", body(model="first", prompt=[5] * 1500), headers=key, expected=400)["error"]
    assert "max_model_len" in error["message"] and error["param"] == "prompt"


# ---------------------------------------------------------------------------------------------- streams


def test_a_stream_that_waits_is_kept_alive(server):
    """With one place in the batch the second stream waits for the first: comments, then its text."""
    key = {"Authorization": "Bearer a key"}
    long = json.dumps(body(model="first", max_tokens=1490, stream=True, n=16))  # one after the other
    first = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: bearer a key\r\nContent-Length: {len(long)}\r\n\r\n{long}"
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as busy:
        busy.sendall(first.encode())
        assert busy.recv(100)
        wait_for(lambda: server.metric("mla_sequences_running") > 0, "nothing runs")
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as waiting:
            waiting.sendall(first.replace("1490", "4").replace(str(len(long)), str(len(long) - 3)).encode())
            seen = b""
            while seen.count(b": still waiting\n\n") < 2:
                seen += waiting.recv(4096)
            assert b"data:" not in seen, "the engine was faster than this test"
            busy.close()  # cancelled
            while not seen.endswith(b"0\r\n\r\n"):
                seen += waiting.recv(4096)
            assert seen.count(b"data: {") >= 2 and b"data: [DONE]" in seen
    assert server.json("/v1/models", headers=key)
