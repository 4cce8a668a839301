"""Run the app in this process: uvicorn, signals, drain."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn

from astrai_rs.engine import Engine
from astrai_rs.server.app import create_app
from astrai_rs.server.protocol import LimitedProtocol
from astrai_rs.server.settings import ServerSettings
from astrai_rs.server.state import ServerState

log = logging.getLogger("astrai_rs.server")

_POLL_S = 0.05


class Server(uvicorn.Server):
    """The first SIGTERM or SIGINT lets accepted requests finish; the second one stops at once."""

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
        if self._state.draining or self._loop is None:
            self.force_exit = self.should_exit = True
            return
        self._state.draining = True
        name = signal.Signals(sig).name
        self._loop.call_soon_threadsafe(self._start_drain, name)

    def _start_drain(self, name: str) -> None:
        log.info("%s: finishing %d requests; once more stops at once", name, self._state.num_live)
        self._drain = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        end = asyncio.get_running_loop().time() + self._state.settings.drain_timeout_s
        while self._state.num_live and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_POLL_S)
        self._state.end_all()
        self.should_exit = True


def serve(
    engine: Engine,
    settings: ServerSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    uds: str | None = None,
) -> None:
    """Serve until a signal, then return; the engine stays the caller's to close.

    Args:
        port: 0 takes a free one.
        uds: path of a Unix socket, instead of host and port.

    Raises:
        OSError: the address cannot be listened on.
    """
    app = create_app(engine, settings)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        uds=uds,
        http=LimitedProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    sockets = [] if uds is not None else [_listen(host, port)]
    for sock in sockets:
        shown, number = sock.getsockname()[:2]
        name = f"[{shown}]" if ":" in shown else shown
        sys.stderr.write(f"serving {settings.model_names[0]} on http://{name}:{number}\n")
        sys.stderr.flush()
    Server(config, app.state.server).run(sockets=sockets or None)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; errors name the address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return sock
