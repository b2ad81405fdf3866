"""The command `inpaint studio`. Heavy imports are inside the functions, because --help loads this module."""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import re
import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable
from contextlib import suppress

from pipelines.cli.arguments import AddCommand, port_number

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 8266
TOKEN_VARIABLE, TOKEN = "INPAINT_STUDIO_TOKEN", re.compile(r"[\w-]{16,}", re.ASCII)
SHUTDOWN_SECONDS = 2  # for requests that still run at the end

EPILOG = """example: inpaint studio --storage runs --open
on another machine: ssh -L 8266:127.0.0.1:8266 MACHINE inpaint studio"""


def add_studio(add: AddCommand) -> None:
    studio = add(
        "studio", "serve pages to try, compare and promote models, and to follow runs, on loopback", ""
    )
    studio.epilog = EPILOG
    studio.add_argument(
        "--storage",
        metavar="FOLDER",
        default="runs",
        help="folder or s3://bucket/prefix with the runs (%(default)s)",
    )
    studio.add_argument("--tracking-uri", help="MLflow tracking URI (default: the one in the storage)")
    studio.add_argument("--port", type=port_number, default=DEFAULT_PORT, help="(%(default)s)")
    studio.add_argument("--open", action="store_true", help="open the pages in the browser")
    studio.set_defaults(run="pipelines.cli.studio:studio_command")


def studio_command(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C. ValueError in one line: the port is in use."""
    from data_prep.uris import normalize_storage_uri
    from pipelines.tracking.runs import resolve_tracking

    token = os.environ.get(TOKEN_VARIABLE, "") or secrets.token_urlsafe(24)
    if not TOKEN.fullmatch(token):
        raise ValueError(f"{TOKEN_VARIABLE}: at least 16 letters, digits, - and _")
    storage = normalize_storage_uri(args.storage, "--storage")
    tracking_uri = resolve_tracking(args.tracking_uri, "inpaint", storage).uri
    with listen(args.port) as listener:
        from pipelines.studio.app import create_app
        from pipelines.studio.settings import StudioSettings

        settings = StudioSettings(tracking_uri, storage, args.port, token)
        link = f"http://{LOOPBACK}:{args.port}/?token={settings.token}"

        def announce() -> None:
            print(f"the studio is at {link}\nCtrl-C ends it", flush=True)
            if args.open:
                threading.Thread(target=webbrowser.open, args=(link,), daemon=True).start()

        with suppress(KeyboardInterrupt):  # uvicorn may raise it again after the end
            serve(create_app(settings), listener, announce)
        print("\nthe studio has ended")
    return 0


def listen(port: int) -> socket.socket:
    """A socket that listens on loopback."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            other = port + 1 if port < 65535 else port - 1
            raise ValueError(
                f"port {port} is in use, perhaps by another studio: end it, or use another with --port {other}"
            ) from None
        raise ValueError(f"--port {port}: {error.strerror}: use one above 1023") from None
    return listener


def serve(app: object, listener: socket.socket, announce: Callable[[], None]) -> None:
    """Serve the application; calls `announce` when it answers."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                announce()

    config = uvicorn.Config(
        app,  # type: ignore[arg-type]  # an ASGI application
        log_level="warning",
        access_log=False,  # it would contain the token
        proxy_headers=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    asyncio.run(Server(config).serve([listener]))
