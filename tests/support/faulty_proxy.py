"""An HTTP reverse proxy that injects faults, chosen for each request by a script."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

HOP_BY_HOP_HEADERS = {"connection", "transfer-encoding", "keep-alive"}
ERROR_BODY = "<?xml version='1.0'?><Error><Code>{}</Code><Message>injected by the test</Message></Error>"
ERROR_CODES = {500: "InternalError", 501: "NotImplemented", 503: "SlowDown", 403: "AccessDenied"}


@dataclass
class Faults:
    """`script(method, path)` returns the fault for a request: "" (none), an HTTP status, "reset", "cut" (half of the
    body), "lost" (the request arrives, its response does not), or "stall SECONDS". `requests` logs all requests;
    `take_down(seconds)` closes the port for that time."""

    uri: str = ""
    take_down: Callable[[float], None] = lambda seconds: None
    script: Callable[[str, str], str] = lambda method, path: ""
    requests: list[str] = field(default_factory=list)

    def fail_next(self, count: int, fault: str, pattern: str = "") -> None:
        """Give a fault to the next `count` requests whose "METHOD path" contains `pattern`."""
        remaining = [count]

        def script(method: str, path: str) -> str:
            if pattern in f"{method} {path}" and remaining[0] > 0:
                remaining[0] -= 1
                return fault
            return ""

        self.script = script


@contextmanager
def faulty_proxy(server: str) -> Iterator[Faults]:
    """A proxy for the URL `server`, on a free port of loopback."""
    faults, target = Faults(), urlsplit(server)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            faults.requests.append(f"{self.command} {self.path}")
            fault = faults.script(self.command, self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if fault == "reset":
                return self.reset()
            if fault.isdigit():
                return self.answer(int(fault), [], ERROR_BODY.format(ERROR_CODES[int(fault)]).encode())
            if fault.startswith("stall"):
                time.sleep(float(fault.split()[1]))
            assert target.hostname
            upstream = http.client.HTTPConnection(target.hostname, target.port, timeout=60)
            # keeps the client's Host header, which signatures cover
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in {*HOP_BY_HOP_HEADERS, "expect"}:
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            response = upstream.getresponse()
            data = response.read()
            upstream.close()
            if fault == "lost":
                return self.reset()
            headers = [
                (k, v)
                for k, v in response.getheaders()
                if k.lower() not in {*HOP_BY_HOP_HEADERS, "content-length"}
            ]
            if self.command == "HEAD":
                headers.append(("Content-Length", response.getheader("Content-Length") or "0"))
                return self.answer(response.status, headers, b"", send_length=False)
            return self.answer(response.status, headers, data, cut=fault == "cut")

        def answer(
            self, status: int, headers: list, data: bytes, cut: bool = False, send_length: bool = True
        ) -> None:
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            if send_length:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.close_connection = True

        def reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()  # SO_LINGER 0: sends RST, not FIN
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

    port = _Port(Handler)
    faults.uri, faults.take_down = f"http://127.0.0.1:{port.port}", port.take_down
    try:
        yield faults
    finally:
        port.stop()


class _Port:
    """Listens on a free port; `take_down` refuses connections for a while, and resets the open ones."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.handler, self.port = handler, 0
        self.timer: threading.Timer | None = None
        self.listen()

    def listen(self) -> None:
        self.server = _Server(("127.0.0.1", self.port), self.handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def take_down(self, seconds: float) -> None:
        self.close()
        self.timer = threading.Timer(seconds, self.listen)
        self.timer.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.server.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        if self.timer:
            self.timer.cancel()
            self.timer.join()
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, *_: object) -> None:
        """Silent: broken connections are expected."""
