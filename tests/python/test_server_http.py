"""What `flash-mla serve` takes for a request, from raw sockets: what two servers in a row may read differently is
refused, and the connection with it."""

import http.client
import json
import re

import pytest
from live_server import PATIENCE, ROOT, Server, raw

SMALL = ROOT / "models" / "small"
BODY = json.dumps({"model": "small", "prompt": "And", "max_tokens": 2, "temperature": 0, "ignore_eos": True}).encode()
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
# What a smuggler hides in a body: it must never be answered.
HIDDEN = b"GET /v1/models/small HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def server():
    server = Server(SMALL)
    yield server
    server.wait_until_idle()
    assert server.stop() == 0


def post(fields, body, version="1.1", host="Host: x\r\n"):
    return f"POST /v1/completions HTTP/{version}\r\n{host}{fields}\r\n".encode() + body


def answers(data):
    """The statuses of all answers on a connection."""
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d+) ", data)]


def test_one_length_given_in_one_way_is_taken(server):
    length = f"Content-Length: {len(BODY)}\r\n"
    close = "Connection: close\r\n"
    assert answers(raw(server, post(length + close, BODY), half_close=False)) == [200]
    assert answers(raw(server, post("Transfer-Encoding: chunked\r\n" + close, CHUNKED), half_close=False)) == [200]
    assert answers(raw(server, post("transfer-encoding:chunked \r\n" + close, CHUNKED), half_close=False)) == [200]
    assert answers(raw(server, post(length, BODY, version="1.0", host=""), half_close=False)) == [200]
    assert answers(raw(server, b"GET /health HTTP/1.1\r\nhOST: [::1]:8000\r\n\r\n" * 2)) == [200, 200]


@pytest.mark.parametrize(
    "fields",
    [
        *(f"Transfer-Encoding: {value}\r\n" for value in
          ("xchunked", "identity", '"chunked"', "chunked, chunked", "gzip, chunked", "chunked;q=1", "gzip", "", "chunked,",
           "Chunked", "chunked\x0b", "\x0cchunked", "chunked identity")),
        "Transfer-Encoding:\r\n chunked\r\n",
        "Transfer-Encoding:\r\n\tchunked\r\n",
        "Transfer-Encoding: chu\r\n nked\r\n",
        "Transfer-Encoding : chunked\r\n",
        " Transfer-Encoding: chunked\r\n",
        "X: a\r\n Transfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n",
        "X: a\nTransfer-Encoding: chunked\r\n",
        "X: a\rTransfer-Encoding: chunked\r\n",
        f"Content-Length: {len(CHUNKED)}\r\nTransfer-Encoding: chunked\r\n",
        f"Transfer-Encoding: chunked\r\nContent-Length: {len(CHUNKED)}\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 0\r\n",
        f"Content-Length: {len(CHUNKED)}\r\nContent-Length: {len(CHUNKED)}\r\n",
        f"Content-Length: {len(CHUNKED)}\r\nContent-Length: 0\r\n",
        *(f"Content-Length: {value}\r\n" for value in
          (f"+{len(CHUNKED)}", f"{len(CHUNKED)}, {len(CHUNKED)}", f"0x{len(CHUNKED):x}", "1_0", "-1", "1 0", "")),
    ],
    ids=repr,
)  # fmt: skip
def test_other_lengths_end_the_connection(server, fields):
    got = raw(server, post(fields, CHUNKED + HIDDEN))
    assert answers(got) == [400], got
    assert b"Connection: close" in got
    json.loads(got.split(b"\r\n\r\n", 1)[1])["error"]["message"]


@pytest.mark.parametrize("value", ["chunked", "identity", "xchunked"])
def test_http_1_0_has_no_transfer_encoding(server, value):
    got = raw(server, post(f"Transfer-Encoding: {value}\r\nConnection: keep-alive\r\n", CHUNKED + HIDDEN, version="1.0"))
    assert answers(got) == [400]


@pytest.mark.parametrize("host", ["", "Host: a\r\nHost: a\r\n", "Host: a\r\nhost: b\r\n", "Host: a, b\r\n", "Host: a b\r\n", "Host: a/b\r\n"], ids=repr)
def test_host_is_given_once(server, host):
    got = raw(server, b"GET /health HTTP/1.1\r\n" + host.encode() + b"\r\n" + HIDDEN)
    assert answers(got) == [400] and b"Host" in got
    two = b"GET /health HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n"
    assert answers(raw(server, two)) == [400]


def test_head_is_answered_without_a_body(server):
    for path, status in (("/health", 200), ("/metrics", 200), ("/", 200), ("/v1/models", 200), ("/nothing", 404), ("/v1/completions", 405)):
        get = raw(server, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        head = raw(server, f"HEAD {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert answers(get) == answers(head) == [status], path
        assert head.endswith(b"\r\n\r\n") and head.count(b"\r\n\r\n") == 1, path
        length = re.search(rb"Content-Length: (\d+)", head)
        assert length and int(length[1]) > 0
    # Nothing that comes behind is taken for its body.
    both = raw(server, b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answers(both) == [200, 200] and both.count(b'{"status":"ok"}') == 1
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    for method in ("HEAD", "GET", "HEAD", "GET"):
        connection.request(method, "/ready")
        assert connection.getresponse().read() == (b"" if method == "HEAD" else b'{"status":"ready"}')
    refused = raw(server, b"HEAD /health HTTP/1.1\r\n\r\n")
    assert answers(refused) == [400] and refused.endswith(b"\r\n\r\n")


def test_a_wrong_method_is_told_the_right_ones(server):
    assert b"Allow: GET, HEAD\r\n" in raw(server, b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"Allow: POST\r\n" in raw(server, b"GET /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n")
