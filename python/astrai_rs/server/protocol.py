"""uvicorn's HTTP protocol with limits on the head of a request, and errors in OpenAI's shape."""

from __future__ import annotations

import json
from asyncio import Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from astrai_rs.server.errors import ApiError

MAX_HEAD_BYTES = 64 << 10
HEAD_TIMEOUT_S = 10.0
"""For the request line and headers, from the connection or from the first byte of a later request."""


WRITE_TIMEOUT_S = 30.0
"""For a client to read some of an answer that fills all buffers."""


class HeadTooLarge(Exception):
    """More bytes of request line and headers than are read."""


class LimitedProtocol(HttpToolsProtocol):
    """As uvicorn's, for clients that one does not trust."""

    _timer: Any = None
    _unread_timer: Any = None
    _head_bytes = 0
    _refused = False

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_unread_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_timer = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_unread_timer()
        super().resume_writing()

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def data_received(self, data: bytes) -> None:
        if not self._refused:  # what comes after a refusal is not read
            super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._start_timer()

    def on_url(self, url: bytes) -> None:
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(name, value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Also called when a limit makes a callback of the parser fail."""
        if self._head_bytes > MAX_HEAD_BYTES:
            text = f"the request line and headers may have at most {MAX_HEAD_BYTES} bytes"
            self._refuse(ApiError(431, text, code="headers_too_large"))
        else:
            self._refuse(ApiError(400, "not a valid HTTP request", code="invalid_http"))

    def _count(self, *parts: bytes) -> None:
        self._head_bytes += sum(len(part) + 4 for part in parts)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise HeadTooLarge

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._timed_out)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timed_out(self) -> None:
        self._timer = None
        text = f"the request's headers did not arrive within {HEAD_TIMEOUT_S:g} s"
        self._refuse(ApiError(408, text, code="headers_timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Answer without the app, and hang up."""
        self._refused = True
        self._stop_timer()
        if self.transport.is_closing():
            return
        body = json.dumps(error.body()).encode()
        head = (
            f"HTTP/1.1 {error.status} Refused\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
