"""`astrai-rs serve`: the HTTP server."""

from __future__ import annotations

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from astrai_rs.cli.common import (
    FAILED,
    USAGE,
    Model,
    fail,
    model_name,
    open_engine,
    takes_engine_options,
)

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@takes_engine_options
def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    uds: Annotated[Path | None, typer.Option(help="Path of a Unix socket, instead of host and port.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key that requests must bring; repeatable. Default: $ASTRAI_API_KEY, if set."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with one key per line.")] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name for requests; default: the model's own. Repeatable.")
    ] = None,
    allowed_origin: Annotated[
        list[str] | None, typer.Option(help="Web page origin that may call. Repeatable.")
    ] = None,
    sanitize_control_tokens: Annotated[
        bool, typer.Option(help="Control tokens typed in messages reach the model as plain text.")
    ] = True,
    max_queued: Annotated[int, typer.Option(help="Samples that may wait; more get 429.", min=0)] = 512,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds to finish requests after SIGTERM.", min=0)
    ] = 30.0,
    max_num_seqs: Annotated[int, typer.Option(help="Most samples in one step.")] = 256,
    kv_cache_tokens: Annotated[int | None, typer.Option(help="Size of the KV cache.")] = None,
    *,
    options: dict[str, Any],
) -> None:
    """Serve a model over HTTP: OpenAI's, Anthropic's and AstrAI's interfaces."""
    if not all(map(find_spec, ("fastapi", "uvicorn", "prometheus_client"))):
        fail("serving needs: pip install 'astrai_rs[server]'", FAILED)
    import logging

    from astrai_rs.server.serve import listen, listen_unix
    from astrai_rs.server.serve import serve as run_server
    from astrai_rs.server.settings import ServerSettings

    keys = _keys(api_key, api_key_file)
    names = served_model_name or [model_name(model)]
    if not all(name.strip() for name in names):
        fail("--served-model-name must not be empty", USAGE)
    for origin in allowed_origin or ():
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/]+", origin):
            fail(f"--allowed-origin must be like https://host[:port], or *; given: {origin!r}", USAGE)
    is_loopback = host in LOOPBACK
    settings = ServerSettings(
        model_names=tuple(names),
        api_keys=tuple(keys),
        # Without a key, a web page must not reach the server by a name that it points to this machine.
        allowed_hosts=LOOPBACK if is_loopback and not keys and uds is None else (),
        allowed_origins=tuple(allowed_origin or ()),
        sanitize_control_tokens=sanitize_control_tokens,
        max_queued=max_queued,
        drain_timeout_s=drain_timeout,
    )
    if not (is_loopback or keys or uds):
        sys.stderr.write(
            f"astrai-rs: warning: anybody who reaches {host} may use the model: give --api-key\n"
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    limits = {"max_num_seqs": max_num_seqs, "kv_cache_tokens": kv_cache_tokens}
    # Before the model is loaded, which takes longer.
    sockets = listen(host, port) if uds is None else [listen_unix(uds)]
    try:
        with open_engine(model, options | limits) as engine:
            run_server(engine, settings, sockets)
    finally:
        for each in sockets:
            each.close()
        if uds is not None:
            uds.unlink(missing_ok=True)


def _keys(given: list[str] | None, file: Path | None) -> list[str]:
    """The keys of the command line and the file; else the environment's."""
    keys = [*(given or ()), *(read_keys(file) if file else ())]
    if not keys and "ASTRAI_API_KEY" in os.environ:
        keys = [os.environ["ASTRAI_API_KEY"]]
    if not all(key.strip() for key in keys):
        fail("an API key must not be empty: --api-key or ASTRAI_API_KEY is", USAGE)
    return keys


def read_keys(path: Path) -> list[str]:
    """The keys in a file, one per line; empty lines and lines with # are left out."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        fail(f"{path}: no key in it", USAGE)
    return keys
