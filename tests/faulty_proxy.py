"""An HTTP proxy before a server, with faults: what goes wrong with each request is said by a script."""

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

HOP = {"connection", "transfer-encoding", "keep-alive"}
BODY = "<?xml version='1.0'?><Error><Code>{}</Code><Message>a fault of the test's</Message></Error>"
CODES = {500: "InternalError", 501: "NotImplemented", 503: "SlowDown", 403: "AccessDenied"}


@dataclass
class Faults:
    """`script(method, path)` names the fault of a request: "" (none), an HTTP status, "reset", "cut" (half of the body),
    "lost" (the request arrives, its answer does not), or "stall" and seconds. `seen` are the requests; `down(seconds)`
    closes the port itself for so long."""

    uri: str = ""
    down: Callable[[float], None] = lambda seconds: None
    script: Callable[[str, str], str] = lambda method, path: ""
    seen: list[str] = field(default_factory=list)

    def few(self, count: int, fault: str, where: str = "") -> None:
        """The next `count` requests whose "METHOD path" holds `where` meet a fault."""
        left = [count]

        def script(method: str, path: str) -> str:
            if where in f"{method} {path}" and left[0] > 0:
                left[0] -= 1
                return fault
            return ""

        self.script = script


@contextmanager
def faulty_proxy(server: str) -> Iterator[Faults]:
    """In front of `server`, on a free port of loopback."""
    faults, target = Faults(), urlsplit(server)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            faults.seen.append(f"{self.command} {self.path}")
            fault = faults.script(self.command, self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if fault == "reset":
                return self.reset()
            if fault.isdigit():
                return self.answer(int(fault), [], BODY.format(CODES[int(fault)]).encode())
            if fault.startswith("stall"):
                time.sleep(float(fault.split()[1]))
            assert target.hostname
            upstream = http.client.HTTPConnection(target.hostname, target.port, timeout=60)
            # with the client's own Host: signatures cover it
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in {*HOP, "expect"}:
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            got = upstream.getresponse()
            data = got.read()
            upstream.close()
            if fault == "lost":
                return self.reset()
            headers = [(k, v) for k, v in got.getheaders() if k.lower() not in {*HOP, "content-length"}]
            if self.command == "HEAD":
                headers.append(("Content-Length", got.getheader("Content-Length") or "0"))
                return self.answer(got.status, headers, b"", len_of_body=False)
            return self.answer(got.status, headers, data, cut=fault == "cut")

        def answer(
            self, status: int, headers: list, data: bytes, cut: bool = False, len_of_body: bool = True
        ) -> None:
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            if len_of_body:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.close_connection = True

        def reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()  # with nothing lingering: RST, not FIN
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

    port = _Port(Handler)
    faults.uri, faults.down = f"http://127.0.0.1:{port.number}", port.down
    try:
        yield faults
    finally:
        port.end()


class _Port:
    """Listens on a free port; `down` refuses connections for a while, and resets those that stand."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.handler, self.number = handler, 0
        self.timer: threading.Timer | None = None
        self.listen()

    def listen(self) -> None:
        self.server = _Server(("127.0.0.1", self.number), self.handler)
        self.number = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self, seconds: float) -> None:
        self.close()
        self.timer = threading.Timer(seconds, self.listen)
        self.timer.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.server.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
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
        """Broken connections are what it is for."""
