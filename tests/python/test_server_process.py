"""`astrai-rs serve` as a process: signals, a kill, what is wrong at its start."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import threading
import time

import httpx

from conftest import GLASS, LIMIT, python

FOREVER = {"prompt": "Once", "max_tokens": 30_000, "ignore_eos": True}

SERVE = """
import sys
from astrai_rs.cli import main
sys.argv = ["astrai-rs", "serve", "--port", "0", "--model", {model!r}, *{arguments!r}]
main()
"""


class Served:
    """`astrai-rs serve` as a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.url = ""
        for line in iter(process.stderr.readline, ""):
            if line.startswith("serving "):
                self.url = line.split()[-1]
            if "startup complete" in line:
                break
        # Or the pipe fills up and the server waits.
        self._reader = threading.Thread(target=process.stderr.read, daemon=True)
        self._reader.start()

    def end(self) -> int:
        return self.process.wait(LIMIT)


def serve_process(model, *arguments, **options):
    return python("-c", SERVE.format(model=str(model), arguments=arguments), **options)


async def read_stream(url: str, body: dict) -> tuple[str, list[str]]:
    """`(how it ended, the data of its events)`."""
    data: list[str] = []
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT) as client:
        try:
            async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: "):
                        data.append(line.removeprefix("data: "))
        except httpx.HTTPError as error:
            return type(error).__name__, data
    return "complete" if data[-1:] == ["[DONE]"] else "cut", data


async def signalled(served: Served, body: dict, *signals: signal.Signals) -> list[tuple[str, list[str]]]:
    """Eight streams during which signals come."""
    streams = [asyncio.create_task(read_stream(served.url, body)) for _ in range(8)]
    async with httpx.AsyncClient(base_url=served.url, timeout=LIMIT) as client:
        async with asyncio.timeout(LIMIT):
            while (await client.get("/stats")).json()["num_requests_running"] < 8:
                await asyncio.sleep(0.01)
    for each in signals:
        os.kill(served.process.pid, each)
        await asyncio.sleep(0.2)
    return await asyncio.gather(*streams)


async def test_sigterm_lets_streams_finish(endless_folder):
    with serve_process(endless_folder, "--kv-cache-tokens", str(2**16)) as process:
        served = Served(process)
        results = await signalled(served, {**FOREVER, "max_tokens": 3000}, signal.SIGTERM)
        assert [end for end, _ in results] == ["complete"] * 8
        assert {len(data) for _, data in results} == {3001}
        assert served.end() == 0


async def test_sigterm_ends_what_takes_too_long_with_an_error(endless_folder):
    arguments = ("--kv-cache-tokens", str(2**18), "--drain-timeout", "0.3")
    with serve_process(endless_folder, *arguments) as process:
        served = Served(process)
        results = await signalled(served, FOREVER, signal.SIGTERM)
        for end, data in results:
            assert end == "complete"
            assert json.loads(data[-2])["error"]["message"] == "the server is shutting down"
        assert served.end() == 0


async def test_a_second_signal_ends_streams_with_an_error(endless_folder):
    with serve_process(endless_folder, "--kv-cache-tokens", str(2**18)) as process:
        served = Served(process)
        start = time.monotonic()
        results = await signalled(served, FOREVER, signal.SIGINT, signal.SIGINT)
        assert served.end() == 0
        assert time.monotonic() - start < 20
        for _, data in results:
            assert json.loads(data[-2])["error"]["message"] == "the server is shutting down"


async def test_sigterm_waits_for_a_request_that_is_arriving(endless_folder):
    body = json.dumps({**FOREVER, "max_tokens": 500}).encode()
    with serve_process(endless_folder, "--kv-cache-tokens", str(2**16)) as process:
        served = Served(process)
        host, port = served.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:10])
        await asyncio.sleep(0.5)
        os.kill(process.pid, signal.SIGTERM)
        await asyncio.sleep(0.5)
        writer.write(body[10:])
        async with asyncio.timeout(LIMIT):
            answer = await reader.read()
        writer.close()
        assert b'"completion_tokens":500' in answer
        assert served.end() == 0


def test_a_unix_socket_is_its_owners_alone(tmp_path):
    path = tmp_path / "s.sock"
    with serve_process(GLASS, "--uds", str(path)) as process:
        served = Served(process)
        assert served.url == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost"
        ) as client:
            assert client.get("/v1/models").status_code == 200
        for other, message in ((path, "Address already in use"), (tmp_path / "no/s", "No such file")):
            with serve_process(GLASS, "--uds", str(other)) as second:
                _, err = second.communicate(timeout=LIMIT)
                assert second.returncode == 1
                assert f"cannot listen on {other}: {message}" in err
                assert "Traceback" not in err
        process.terminate()
        assert served.end() == 0
    assert not path.exists()


async def test_a_kill_leaves_nothing_behind(endless_folder, tmp_path):
    """The next one has the same port and answers; no file is left."""
    folders = {name: tmp_path / name for name in ("TMPDIR", "HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME")}
    for folder in folders.values():
        folder.mkdir()
    environment = {name: str(folder) for name, folder in folders.items()}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = ("--port", str(free.getsockname()[1]))
    for kill in (signal.SIGKILL, signal.SIGTERM):
        with serve_process(endless_folder, *port, "--kv-cache-tokens", "65536", env=environment) as process:
            served = Served(process)
            body = {**FOREVER, "max_tokens": 30_000 if kill == signal.SIGKILL else 2000}
            results = await signalled(served, body, kill)
            ends = {end for end, _ in results}
            assert ends <= {"RemoteProtocolError", "ReadError"} if kill == signal.SIGKILL else {"complete"}
            assert served.end() == (-kill if kill == signal.SIGKILL else 0)
        assert [list(folder.iterdir()) for folder in folders.values()] == [[]] * len(folders)


def test_serve_names_what_is_wrong(tmp_path):
    (tmp_path / "keys").write_text("# none\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            ("--api-key-file", str(tmp_path / "keys")): (2, "keys: no key in it"),
            ("--port", port): (1, f"cannot listen on 127.0.0.1:{port}"),
            ("--host", "no.such.host.invalid"): (1, "cannot listen on no.such.host.invalid:0"),
        }
        for arguments, (code, message) in cases.items():
            with serve_process(GLASS, *arguments) as process:
                _, err = process.communicate(timeout=LIMIT)
            assert (process.returncode, message in err, "Traceback" in err) == (code, True, False), err
