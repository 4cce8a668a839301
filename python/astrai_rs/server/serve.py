"""Run the app in this process: uvicorn, signals, drain."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from astrai_rs.engine import Engine
from astrai_rs.server.app import create_app
from astrai_rs.server.protocol import LimitedProtocol
from astrai_rs.server.settings import ServerSettings
from astrai_rs.server.state import ServerState

log = logging.getLogger("astrai_rs.server")

_POLL_S = 0.05
_BACKLOG = 2048


class Server(uvicorn.Server):
    """The first SIGTERM or SIGINT lets accepted requests finish; the second one ends them with an
    error, and a third one does not wait for that."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self._state = state
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def main_loop(self) -> None:
        self._loop = asyncio.get_running_loop()
        await super().main_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Signals are not passed on: having drained, the process ends with 0."""
        if self.should_exit or self._loop is None:
            self.force_exit = self.should_exit = True
            return
        if self._state.draining:
            self._loop.call_soon_threadsafe(self._state.end_all)
            self.should_exit = True
            return
        self._state.draining = True
        name = signal.Signals(sig).name
        self._loop.call_soon_threadsafe(self._start_drain, name)

    def _start_drain(self, name: str) -> None:
        log.info("%s: finishing %d requests; once more stops at once", name, self._state.num_requests)
        self._drain = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        end = asyncio.get_running_loop().time() + self._state.settings.drain_timeout_s
        while self._state.num_requests and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_POLL_S)
        self._state.end_all()
        self.should_exit = True


def serve(engine: Engine, settings: ServerSettings, sockets: Sequence[socket.socket]) -> None:
    """Serve on listening sockets until a signal, then return; the engine stays the caller's to close."""
    app = create_app(engine, settings)
    config = uvicorn.Config(
        app,
        http=LimitedProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    for address in dict.fromkeys(map(_address, sockets)):
        sys.stderr.write(f"serving {settings.model_names[0]} on {address}\n")
    sys.stderr.flush()
    Server(config, app.state.server).run(sockets=list(sockets))


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets, one for each address of the host; port 0 takes a free one.

    Raises:
        OSError: it cannot be listened on; the message names host and port.
    """
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address[0], port, *address[2:]))
            port = sock.getsockname()[1]
            sock.listen(_BACKLOG)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return sockets


def listen_unix(path: Path) -> socket.socket:
    """A listening Unix socket that only its owner may connect to; it takes the place of one that nobody
    listens on.

    Raises:
        OSError: it cannot be listened on; the message names the path.
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket():
            if _is_listening(path):
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            path.unlink()
        old = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(old)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen on {path}: {error.strerror or error}") from error
    return sock


def _is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        return True


def _address(sock: socket.socket) -> str:
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    shown, number = sock.getsockname()[:2]
    return f"http://[{shown}]:{number}" if ":" in shown else f"http://{shown}:{number}"
