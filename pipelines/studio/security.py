"""What every request passes before a route sees it: Host, Origin, session, CSRF token, size; and the headers of replies.

The studio listens on loopback only, but every web page that a person has open can send requests there. So a request
must name a loopback host (against DNS rebinding), and one that writes must come from the studio's own pages (Origin,
Sec-Fetch-Site), from a browser that showed the studio's token (cookie), and repeat that session's CSRF token.
"""

from __future__ import annotations

import hmac
import json
import logging
import re
from http.cookies import CookieError, SimpleCookie
from typing import Annotated
from urllib.parse import parse_qsl, urlencode

from fastapi import Depends, HTTPException, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.studio.sessions import Session, Sessions

HOST = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::(\d{1,5}))?", re.IGNORECASE)
READING = ("GET", "HEAD")
AGAIN = '<!doctype html><meta http-equiv="refresh" content="0"><title>inpaint studio</title>'
"""Loads its own address again, now from the studio's own page, so that the session's cookie comes with it."""
TOKEN_PATH = "/token"  # the only write without a session
MAX_BODY_BYTES = 2**20  # of requests that are not uploads
DRAIN_FACTOR = 4  # of the limit: bytes that are read and dropped, so that a browser sees the answer
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
READ_ONLY = (
    "this needs the studio's token: open the link that `inpaint studio` printed, or enter it at /token"
)


class SecurityMiddleware:
    """The outermost application: checks requests, adds headers, and turns unexpected errors into one line."""

    def __init__(self, app: ASGIApp, sessions: Sessions, max_upload_bytes: int) -> None:
        self._app, self._sessions, self._max_upload_bytes = app, sessions, max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # the studio has no websockets
            await send({"type": "websocket.close", "code": 1008})
            return
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)  # a report has a stricter policy of its own
                is_static = scope["path"].startswith("/static/")
                headers.setdefault("Cache-Control", "no-cache" if is_static else "no-store")
            await send(message)

        try:
            response = self._check(scope)
            if response is None:
                receive = self._bounded(scope, receive)
                await self._app(scope, receive, send_with_headers)
                return
            if scope["method"] not in READING:
                await _drain(receive, DRAIN_FACTOR * self._max_bytes(scope))
            await response(scope, receive, send_with_headers)
        except Exception:
            logging.getLogger(__name__).exception("%s %s failed", scope["method"], scope["path"])
            if started:
                raise
            text = "an unexpected error; the studio's terminal shows where"
            await _answer(scope, 500, text)(scope, receive, send_with_headers)

    def _check(self, scope: Scope) -> Response | None:
        """The refusal of a request, or the redirect that exchanges the token; None: the routes answer it."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        match = HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if not match:
            return _answer(
                scope, 421, "open the studio as 127.0.0.1 or localhost: no other host name is served"
            )
        cookie_name = f"inpaint-studio-{match[1] or 80}"  # cookies do not tell ports apart
        session = self._sessions.get(_read_cookie(headers, cookie_name))
        scope.setdefault("state", {})["session"] = session
        if scope["method"] in READING:
            exchanged = self._exchange_token(scope, cookie_name)
            return (
                HTMLResponse(AGAIN)
                if exchanged is None and session is None and _is_from_a_link(headers)
                else exchanged
            )
        if headers.get("origin") != f"http://{hosts[0]}":
            return _answer(scope, 403, "refused: the request does not come from the studio's own page")
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return _answer(scope, 403, "refused: the request comes from another site")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._max_bytes(scope):
            return _answer(scope, 413, self._too_large(scope, length))
        if scope["path"] == TOKEN_PATH:
            scope["state"]["cookie_name"] = cookie_name
            return None
        if session is None:
            return _answer(scope, 403, READ_ONLY)
        if not hmac.compare_digest(headers.get("x-csrf-token", "").encode(), session.csrf.encode()):
            return _answer(scope, 403, "refused: the page is older than the session; reload it")
        return None

    def _exchange_token(self, scope: Scope, cookie_name: str) -> Response | None:
        """For a link with ?token=: the session's cookie and the same address without the token."""
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        tokens = [value for key, value in pairs if key == "token"]
        if not tokens:
            return None
        # wrong ones are not counted: any web page could use them up by such links, and the token has 192 bits
        if not self._sessions.is_token(tokens[0]):
            scope["state"]["wrong_token"] = True
            scope["path"], scope["raw_path"], scope["query_string"] = TOKEN_PATH, TOKEN_PATH.encode(), b""
            return None
        query = urlencode([pair for pair in pairs if pair[0] != "token"])
        path = scope.get("raw_path", b"/").decode("latin-1").split("?")[0]
        path = "/" + path.lstrip("/\\")  # //host would be another site's address, and browsers take \ for /
        response = Response(status_code=303, headers={"Location": f"{path}?{query}" if query else path})
        set_session_cookie(response, cookie_name, self._sessions.open())
        return response

    def _max_bytes(self, scope: Scope) -> int:
        is_upload = scope["path"].startswith("/api/photos")
        return self._max_upload_bytes if is_upload else MAX_BODY_BYTES

    def _too_large(self, scope: Scope, length: str) -> str:
        limit = self._max_bytes(scope) / 2**20
        size = f"{int(length) / 2**20:.1f} MiB" if length.isdigit() else "larger than allowed"
        return f"the file is {size}; the studio takes up to {limit:g} MiB: `inpaint fill` takes larger ones"

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` that raises 413 when a body of unknown length gets too large."""
        limit, count = self._max_bytes(scope), 0

        async def bounded() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > limit:
                if message.get("more_body"):
                    await _drain(receive, DRAIN_FACTOR * limit)
                raise HTTPException(413, self._too_large(scope, ""))
            return message

        return bounded


def _is_from_a_link(headers: Headers) -> bool:
    """Whether a link on another site's page, such as a terminal in the browser, led here: no cookie comes with it."""
    return (headers.get("sec-fetch-site"), headers.get("sec-fetch-mode")) == ("cross-site", "navigate")


async def _drain(receive: Receive, limit: int) -> None:
    """Read and drop the rest of a body, at most `limit` bytes of it."""
    count, more = 0, True
    while more and count <= limit:
        message = await receive()
        count += len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)


def _read_cookie(headers: Headers, name: str) -> str | None:
    try:
        cookie = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return None
    return cookie[name].value if name in cookie else None


def set_session_cookie(response: Response, name: str, session: Session) -> None:
    """Give the browser its session; no script can read the cookie, and no other site's request carries it."""
    response.set_cookie(name, session.id, httponly=True, samesite="strict", path="/")


def wants_json(scope: Scope) -> bool:
    """Whether errors are answered as JSON {"error": ...} and not as a page."""
    return scope["path"].startswith("/api/") or scope["method"] not in READING


def _answer(scope: Scope, status: int, text: str) -> Response:
    if wants_json(scope):
        return JSONResponse({"error": text}, status)
    return PlainTextResponse(f"{text}\n", status)


def session_of(request: Request) -> Session | None:
    """The session of a request; None: it may only read."""
    session: Session | None = request.scope.get("state", {}).get("session")
    return session


async def require_write(request: Request) -> Session:
    """Dependency of all routes that write, or that read what belongs to a session: the session, else 403."""
    session = session_of(request)
    if session is None:
        raise HTTPException(403, READ_ONLY)
    return session


Writer = Annotated[Session, Depends(require_write)]
"""Type of a route's argument that gets the session."""


async def read_json(request: Request) -> dict[str, object]:
    """The body of a request, a JSON object, or 400 in one line."""
    try:
        value = json.loads(await request.body())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise HTTPException(400, "the request's body is not a JSON object")
    return value
