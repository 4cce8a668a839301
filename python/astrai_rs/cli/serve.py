"""`astrai-rs serve`: the HTTP server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from astrai_rs.cli.common import (
    FAILED,
    USAGE,
    Device,
    Dtype,
    MaxLen,
    Model,
    Threads,
    fail,
    model_name,
    open_engine,
)

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    uds: Annotated[str | None, typer.Option(help="Path of a Unix socket, instead of host and port.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="ASTRAI_API_KEY", help="Key that requests must bring; may be given repeatedly."),
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
    drain_timeout: Annotated[float, typer.Option(help="Seconds to finish requests after SIGTERM.")] = 30.0,
    max_num_seqs: Annotated[int, typer.Option(help="Most samples in one step.")] = 256,
    kv_cache_tokens: Annotated[int | None, typer.Option(help="Size of the KV cache.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    max_model_len: MaxLen = None,
) -> None:
    """Serve a model over HTTP: OpenAI's, Anthropic's and AstrAI's interfaces."""
    try:
        import fastapi
        import uvicorn  # noqa: F401
    except ImportError:
        fail("serving needs: pip install 'astrai_rs[server]'", FAILED)
    import logging

    from astrai_rs.server.serve import serve as run_server
    from astrai_rs.server.settings import ServerSettings

    del fastapi
    keys = [*(api_key or ()), *(read_keys(api_key_file) if api_key_file else ())]
    is_loopback = host in LOOPBACK
    settings = ServerSettings(
        model_names=tuple(served_model_name or [model_name(model)]),
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
    with open_engine(model, device, dtype, threads, max_model_len, **limits) as engine:
        run_server(engine, settings, host=host, port=port, uds=uds)


def read_keys(path: Path) -> list[str]:
    """The keys in a file, one per line; empty lines and lines with # are left out."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        fail(f"{path}: no key in it", USAGE)
    return keys
