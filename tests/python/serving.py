"""A server in this process, on a port of its own, for real clients."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from astrai_rs import Engine
from astrai_rs.server import ServerSettings, create_app
from astrai_rs.server.protocol import LimitedProtocol
from astrai_rs.server.serve import Server


@contextmanager
def serving(engine: Engine, **settings) -> Iterator[tuple[str, Server]]:
    """`(base URL, the server)`. The engine stays open."""
    app = create_app(engine, ServerSettings(**{"model_names": ("test",), **settings}))
    config = uvicorn.Config(
        app, http=LimitedProtocol, ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=2
    )
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = Server(config, app.state.server)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}", server
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive(), "the server did not stop"
