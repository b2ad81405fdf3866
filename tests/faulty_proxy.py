"""An HTTP proxy before a server, with faults: what goes wrong with each request is said by a script."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOP = {"connection", "transfer-encoding", "keep-alive"}
BODY = "<?xml version='1.0'?><Error><Code>{}</Code><Message>a fault of the test's</Message></Error>"
CODES = {500: "InternalError", 503: "SlowDown", 403: "AccessDenied"}


@dataclass
class Faults:
    """`script(method, path)` names the fault of a request: "" (none), an HTTP status, "reset", "cut" (half of the body),
    "lost" (the request arrives, its answer does not), or seconds of a stall. `seen` are the requests."""

    uri: str = ""
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

    def down(self, seconds: float) -> None:
        """Every connection is reset for so long from now on."""
        until = time.monotonic() + seconds
        self.script = lambda method, path: "reset" if time.monotonic() < until else ""


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
                self.reset()

        def reset(self) -> None:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
        proxy.daemon_threads = True
        faults.uri = f"http://127.0.0.1:{proxy.server_address[1]}"
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield faults
        proxy.shutdown()
