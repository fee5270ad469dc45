"""deploy/nginx.conf in front of `flash-mla serve`: TLS, a key, streams that are not held back. Needs Debian's nginx-light
and openssl on the PATH."""

import getpass
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess

import openai
import pytest
from live_server import PATIENCE, ROOT, Server, wait_for

NAME = "api.example.com"


def program(name, package):
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    assert found, f"{name} is not installed; Debian has it in {package}"
    return found


class Proxy:
    """nginx with deploy/nginx.conf, its ports and paths changed to ones that a test may use. It gets the sockets that it
    listens on from here, as from an nginx that it takes over from: nobody else can take a port in between."""

    def __init__(self, folder, server_port):
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        self.port, self.plain_port = [s.getsockname()[1] for s in sockets]
        self.certificate = folder / "certificate.pem"
        command = [program("openssl", "openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
        command += ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}", "-keyout", str(folder / "key.pem"), "-out", str(self.certificate)]
        subprocess.run(command, check=True, capture_output=True)
        site = (ROOT / "deploy" / "nginx.conf").read_text()
        for old, new in (
            ("127.0.0.1:8000", f"127.0.0.1:{server_port}"),
            ("listen 443 ", f"listen 127.0.0.1:{self.port} "),
            ("listen 80;", f"listen 127.0.0.1:{self.plain_port};"),
            ("/etc/ssl/api.example.com/fullchain.pem", str(self.certificate)),
            ("/etc/ssl/api.example.com/privkey.pem", str(folder / "key.pem")),
        ):
            lines = [line for line in site.splitlines() if not line.lstrip().startswith("#")]
            assert sum(old in line for line in lines) == 1, old
            site = "\n".join(line if line.lstrip().startswith("#") else line.replace(old, new) for line in site.splitlines())
        (folder / "site.conf").write_text(site + "\n")
        paths = "".join(f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        (folder / "nginx.conf").write_text(
            f"user {getpass.getuser()}; daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;\nevents {{}}\n"
            f"http {{\n{paths}access_log off;\ninclude {folder}/site.conf;\n}}\n"
        )
        command = [program("nginx", "nginx-light"), "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
        files = [s.fileno() for s in sockets]
        inherited = {**os.environ, "NGINX": "".join(f"{file};" for file in files)}
        self.process = subprocess.Popen(command, env=inherited, pass_fds=files)
        for s in sockets:
            s.close()
        self.context = ssl.create_default_context(cafile=self.certificate)
        try:
            assert self.call("/health")[0] == 200
        except OSError as error:
            raise AssertionError((folder / "error.log").read_text()) from error

    def connect(self):
        connection = http.client.HTTPSConnection(NAME, timeout=PATIENCE)
        connection.sock = self.context.wrap_socket(socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE), server_hostname=NAME)
        return connection

    def call(self, path, body=None, **headers):
        connection = self.connect()
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data, {"Authorization": "Bearer a key", **headers})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        return response.status, response.headers, text


@pytest.fixture(scope="module")
def server():
    server = Server(ROOT / "models" / "small", "--api-key", "a key", "--allowed-host", NAME)
    yield server
    server.wait_until_idle()
    assert server.stop() == 0


@pytest.fixture(scope="module")
def proxy(server, tmp_path_factory):
    proxy = Proxy(tmp_path_factory.mktemp("nginx"), server.port)
    yield proxy
    proxy.process.terminate()
    assert proxy.process.wait(timeout=PATIENCE) == 0


def body(**kw):
    return {"model": "small", "prompt": "And it came to pass", "max_tokens": 12, "temperature": 0, "ignore_eos": True, **kw}


def test_answers_are_the_servers(server, proxy):
    status, headers, text = proxy.call("/v1/completions", body())
    direct = server.json("/v1/completions", body(), headers={"Authorization": "Bearer a key"})
    assert status == 200 and json.loads(text)["choices"] == direct["choices"]
    assert server.logged(headers["x-request-id"])["status"] == 200, "both logs have the same id"
    assert proxy.call("/v1/models", Authorization="Bearer another")[0] == 401
    assert proxy.call("/v1/completions", b"x" * (8 << 20))[0] == 400, "a body as large as the server takes"
    assert proxy.call("/v1/completions", b"x" * ((8 << 20) + 1))[0] == 413


def test_what_is_for_inside_stays_there(proxy):
    assert [proxy.call(path)[0] for path in ("/metrics", "/trace", "/experts", "/", "/health", "/v1/models")] == [404, 404, 404, 404, 200, 200]


def test_tokens_leave_when_they_come(server, proxy):
    """The first event of a long text is there while the text is being made."""
    connection = proxy.connect()
    request = json.dumps(body(max_tokens=1900, n=2, temperature=1, stream=True))
    connection.request("POST", "/v1/completions", request, {"Authorization": "Bearer a key"})
    response = connection.getresponse()
    assert response.status == 200 and response.headers["content-type"] == "text/event-stream"
    assert response.readline().startswith(b"data: {")
    assert server.metric("mla_sequences_running") > 0, "the text was whole before its first event came"
    events = [line for line in response.read().split(b"\n\n") if line.strip()]
    assert events[-1] == b"data: [DONE]" and len(events) > 100
    connection.close()


def test_a_client_that_leaves_the_proxy_frees_its_pages(server, proxy):
    cancelled = 'mla_continuations_finished_total{reason="cancelled"}'
    before = server.metric(cancelled)
    connection = proxy.connect()
    connection.request("POST", "/v1/completions", json.dumps(body(max_tokens=1900, stream=True)), {"Authorization": "Bearer a key"})
    connection.getresponse().readline()
    connection.sock and connection.sock.close()
    connection.close()
    wait_for(lambda: server.metric(cancelled) > before, "the request of a client that left goes on")


def test_without_tls_there_is_only_the_way(proxy):
    connection = http.client.HTTPConnection("127.0.0.1", proxy.plain_port, timeout=PATIENCE)
    connection.request("GET", "/v1/models", headers={"Host": NAME, "Authorization": "Bearer a key"})
    response = connection.getresponse()
    assert response.status == 301 and response.headers["location"] == f"https://{NAME}/v1/models"


def test_openai_through_tls(proxy, monkeypatch):
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **kw: resolve("127.0.0.1" if host in (NAME, NAME.encode()) else host, *rest, **kw))
    with openai.OpenAI(base_url=f"https://{NAME}:{proxy.port}/v1", api_key="a key", http_client=openai.DefaultHttpxClient(verify=proxy.context), max_retries=0) as client:
        chunks = list(client.completions.create(model="small", prompt="And it came to pass", max_tokens=12, temperature=0, stream=True))
    assert "".join(c.choices[0].text for c in chunks) and re.match("cmpl-", chunks[0].id)
