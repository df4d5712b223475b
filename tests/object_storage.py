"""A real S3 server (moto) on this machine, in a process of its own, and a door to it that fails now and then."""

from __future__ import annotations

import http.client
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pyarrow import fs

SECRET = "wJalrXUtnFEMI-K7MDENG-secret"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLEKEYID", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}


@contextmanager
def s3_server(bucket: str) -> Iterator[dict[str, str]]:
    """Environment variables by which a client finds the server, which has an empty bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("PUT", f"/{bucket}")
        assert connection.getresponse().status == 200
        yield {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_EC2_METADATA_DISABLED": "true", **CREDENTIALS}
    finally:
        server.kill()
        server.wait()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@contextmanager
def unreliable(endpoint: str, every: int) -> Iterator[tuple[str, list[str]]]:
    """An endpoint that passes requests on and answers every so manieth with 503; and what it has refused."""
    counter, refused = itertools.count(1), list[str]()

    class Door(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _pass_on(self) -> None:
            body = self._body()
            if next(counter) % every == 0:
                refused.append(f"{self.command} {self.path}")
                self._answer(503, [], b"")
                return
            connection = http.client.HTTPConnection(endpoint.removeprefix("http://"))
            headers = {key: value for key, value in self.headers.items() if key.lower() not in ("transfer-encoding", "expect")}
            connection.request(self.command, self.path, body=body, headers={**headers, "Content-Length": str(len(body))})
            answer = connection.getresponse()
            self._answer(answer.status, answer.getheaders(), answer.read())

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():  # trailers
                pass
            return b"".join(parts)

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response(status)
            kept = [(k, v) for k, v in headers if k.lower() not in ("transfer-encoding", "connection", "date", "server")]
            for key, value in kept:
                self.send_header(key, value)
            if not any(key.lower() == "content-length" for key, _ in kept):
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", refused
    finally:
        server.shutdown()


def client(environment: dict[str, str]) -> fs.S3FileSystem:
    """To look at a server from outside of what is tested."""
    return fs.S3FileSystem(
        access_key=environment["AWS_ACCESS_KEY_ID"], secret_key=environment["AWS_SECRET_ACCESS_KEY"], region="us-east-1",
        endpoint_override=environment["AWS_ENDPOINT_URL"], scheme="http",
    )  # fmt: skip


def with_environment(environment: dict[str, str], code: str) -> str:
    """What ``code`` prints in a process with that environment: the S3 client reads it once."""
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
