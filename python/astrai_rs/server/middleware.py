"""What every request passes: request id, host, key, size and time of the body, access log."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Iterable
from typing import Protocol
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from astrai_rs.server.errors import ApiError, busy, from_exception
from astrai_rs.server.settings import ServerSettings

access_log = logging.getLogger("astrai_rs.access")

_OPEN_PATHS = frozenset({"/health", "/", "/app.js", "/markdown.js", "/style.css"})
"""No key: they tell nothing about the model or its users."""

_DISCARD_S = 0.8
"""Time for the rest of a body that is too large."""

_SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Drainable(Protocol):
    """What tells whether new requests are taken, and counts those that were."""

    num_requests: int

    @property
    def draining(self) -> bool: ...


class Gate:
    """ASGI middleware. The body is read whole before the app sees the request."""

    def __init__(self, app: ASGIApp, *, settings: ServerSettings, state: Drainable) -> None:
        self._app = app
        self._settings = settings
        self._state = state
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        start, status = time.perf_counter(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        self._state.num_requests += 1
        try:
            self._check(scope)
            body = await self._body(scope, receive)
            await self._app(scope, _replay(body, receive), send_with_headers)
        except Exception as error:
            if status:  # what has begun cannot become an error
                raise
            await from_exception(error).response()(scope, receive, send_with_headers)
        finally:
            self._state.num_requests -= 1
            _log(scope, request_id, status or 500, time.perf_counter() - start)

    def _check(self, scope: Scope) -> None:
        """Whether the request may come in at all, before anything of its body is read."""
        headers = Headers(scope=scope)
        hosts = self._settings.allowed_hosts
        host = _host(headers.get("host", ""))
        if hosts and host not in hosts:
            message = f"without an API key, this server answers for {', '.join(hosts)}; given: {host!r:.80}"
            raise ApiError(421, message, code="wrong_host")
        path = scope["path"]
        if self._keys and path not in _OPEN_PATHS and scope["method"] != "OPTIONS":
            self._check_key(headers)
        if not self._keys and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            self._check_origin(headers)
        if self._state.draining and path != "/health":
            raise busy("the server is shutting down", code="shutting_down")

    def _check_key(self, headers: Headers) -> None:
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        # Every key is compared, so that the time tells nothing.
        matches = [hmac.compare_digest(given.encode(), key) for key in self._keys]
        if not any(matches):
            what = "wrong API key" if given else "no API key: send it as 'Authorization: Bearer …'"
            headers_out = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, what, code="invalid_api_key", headers=headers_out)

    def _check_origin(self, headers: Headers) -> None:
        """Without a key, no other site's page may make a browser ask."""
        origin = headers.get("origin")
        allowed = self._settings.allowed_origins
        if origin is None or origin in allowed or "*" in allowed:
            return
        if urlsplit(origin).netloc != headers.get("host"):
            message = f"pages of {origin!r:.80} may not use this server: it is not among the allowed origins"
            raise ApiError(403, message, code="wrong_origin")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limit, seconds = self._settings.max_body_bytes, self._settings.body_timeout_s
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if not (length.isdigit() and int(length) > limit):
            try:
                async with asyncio.timeout(seconds):
                    body = await _read(receive, limit)
            except TimeoutError:
                message = f"the body did not arrive within {seconds:g} s"
                raise ApiError(408, message, code="body_timeout", headers={"connection": "close"}) from None
            if body is not None:
                return body
        if "expect" not in headers:
            await _discard(receive)
        message = f"the body may have at most {limit} bytes"
        raise ApiError(413, message, code="body_too_large", headers={"connection": "close"})


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The whole body; None if it is larger."""
    chunks: list[bytes] = []
    size = 0
    while size <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client left before the body was complete")
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size <= limit and not message.get("more_body", False):
            return b"".join(chunks)
    return None


async def _discard(receive: Receive) -> None:
    """Most clients send all before they read, and closing on unread bytes resets the connection."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            while (await receive()).get("more_body", False):
                pass


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give the body once, then what comes after it: the disconnect."""
    sent = False

    async def receive_again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def _host(header: str) -> str:
    """The name in a Host header, without the port."""
    if header.startswith("["):
        return header.partition("]")[0].removeprefix("[").lower()
    return header.partition(":")[0].lower()


def _request_id(given: str | None) -> str:
    """The client's own id if it is harmless in a log, else a new one."""
    if given and len(given) <= 128 and given.isascii() and given.isprintable():
        return given
    return f"req-{uuid.uuid4().hex}"


def _log(scope: Scope, request_id: str, status: int, seconds: float) -> None:
    """One JSON object per request; without the query string, which may hold a prompt."""
    if not access_log.isEnabledFor(logging.INFO):
        return
    client: Iterable[object] = scope.get("client") or ("-",)
    fields = {
        "request_id": request_id,
        "client": next(iter(client)),
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "ms": round(seconds * 1e3, 1),
    }
    access_log.info(json.dumps(fields))
