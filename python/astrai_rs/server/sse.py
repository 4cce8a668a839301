"""Server-sent events, by the HTML standard: `data: …`, an empty line, comments as keep-alives."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

log = logging.getLogger("astrai_rs.server")

EVENTS = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"


def event(data: Any, name: str | None = None) -> bytes:
    """One event with JSON data; Anthropic's and OpenAI's responses name theirs."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode()


class StreamResponse(StreamingResponse):
    """Sends what a generator gives. When the client leaves, the generator is closed at once."""

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        *,
        keep_alive_s: float | None,
        media_type: str,
    ) -> None:
        super().__init__(chunks, headers={"x-accel-buffering": "no"}, media_type=media_type)
        self._chunks = chunks
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        writer = asyncio.ensure_future(self._write(send))
        watcher = asyncio.ensure_future(disconnected(receive))
        tasks = [writer, watcher]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._chunks.aclose()

    async def _write(self, send: Send) -> None:
        loop, last = asyncio.get_running_loop(), [0.0]

        async def keep_alive(seconds: float) -> None:
            while True:
                await asyncio.sleep(max(0.0, last[0] + seconds - loop.time()))
                if loop.time() >= last[0] + seconds:
                    last[0] = loop.time()
                    await send({"type": "http.response.body", "body": _KEEP_ALIVE, "more_body": True})

        last[0] = loop.time()
        keeper = asyncio.ensure_future(keep_alive(self._keep_alive_s)) if self._keep_alive_s else None
        try:
            async for chunk in self._chunks:
                last[0] = loop.time()
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # the client has left
            pass
        except Exception:
            log.exception("a stream failed")
        finally:
            if keeper is not None:
                keeper.cancel()


async def disconnected(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
