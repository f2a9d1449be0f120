"""Object stores on this machine: moto's S3, in a process of its own, and a proxy before it that lets requests fail."""

import http.client
import multiprocessing
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "not-a-secret-of-anybody", "AWS_REGION": "us-east-1"}


def _serve_s3(port: Any) -> None:
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    port.put(server.server_port)
    server.serve_forever()


@contextmanager
def in_process(serve: Callable[..., None], *arguments: object) -> Iterator[int]:
    """``serve(*arguments, queue)`` in a process of its own, which puts its port into the queue; the port."""
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    process = context.Process(target=serve, args=(*arguments, port), daemon=True)
    process.start()
    try:
        yield port.get(timeout=60)
    finally:
        process.kill()
        process.join()


@contextmanager
def s3_server() -> Iterator[int]:
    """moto's S3 on loopback; its port."""
    with in_process(_serve_s3) as port:
        yield port


def request(port: int, method: str, path: str, body: bytes = b"") -> bytes:
    """One request to a server on loopback; the answer's body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body)
        return connection.getresponse().read()
    finally:
        connection.close()


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass


Fault = Callable[
    [str, str], str | None
]  # of a method and a path: "503", "reset", "cut", "slow", "silent", "lost" or nothing


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that were killed, and servers that are gone, are what is tested."""


class Proxy(_Server):
    """Passes requests on to ``port``. ``fault`` says what happens to each, ``answered`` is told the answers."""

    def __init__(self, port: int) -> None:
        self.behind = port
        self.fault: Fault = lambda method, path: None
        self.answered: Callable[[str, int], object] = lambda path, status: None
        super().__init__(("127.0.0.1", 0), _Passing)


class _Passing(_Quiet):
    server: Proxy

    def _pass(self) -> None:
        fault = self.server.fault(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault == "503":
            self._answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.close_connection = True
            self.connection.close()
            return
        if fault == "slow":
            time.sleep(0.3)
        if fault == "silent":
            time.sleep(20)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        headers = {
            k: v
            for k, v in answer.getheaders()
            if k.lower() not in ("transfer-encoding", "connection", "content-length")
        }
        if self.command == "HEAD":
            headers["Content-Length"] = answer.getheader("Content-Length") or "0"
        connection.close()
        if fault == "lost":
            self.close_connection = True
            self.connection.close()
            return
        self.server.answered(self.path, answer.status)
        self._answer(answer.status, headers, content, cut=fault == "cut" and answer.status < 300)

    def _answer(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD" and status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True
            self.connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass


class Files(_Server):
    """The files below ``root``, with ranges and e-tags, and no listing: a plain web server. ``seen`` are the paths asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seen: list[str] = []
        super().__init__(("127.0.0.1", 0), _File)


class _File(_Quiet):
    server: Files

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        path = self.server.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_response_only(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        stat = path.stat()
        etag = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'
        start, stop, status = 0, stat.st_size, 200
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if self.headers.get("If-None-Match") == etag:
            status, stop = 304, 0
        elif wanted:
            status = 206
            if wanted[1]:
                start, stop = int(wanted[1]), min(stop, int(wanted[2] or stop) + 1)
            else:
                start = max(0, stop - int(wanted[2]))
        self.send_response_only(status)
        self.send_header("ETag", etag)
        self.send_header("Last-Modified", self.date_time_string(int(stat.st_mtime)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{stat.st_size}")
        if status != 304:
            self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "GET":
            with path.open("rb") as file:
                file.seek(start)
                self.wfile.write(file.read(stop - start))

    do_HEAD = do_GET


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[int]:
    """Serve in a thread; the port."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
