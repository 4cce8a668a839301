"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import reprlib
from dataclasses import fields
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from astrai_rs._core import EngineClosed
from astrai_rs.request import SamplingParams

log = logging.getLogger("astrai_rs.server")

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    421: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer other than 200. `param` is the field that is wrong, `code` a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The body as OpenAI's clients read it; `type` at the top is for Anthropic's."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"type": "error", "error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400."""
    return ApiError(400, message, param=param, code=code)


def busy(message: str, *, status: int = 503, code: str) -> ApiError:
    """Try again later."""
    return ApiError(status, message, code=code, headers={"Retry-After": "1"})


def from_exception(error: BaseException) -> ApiError:
    """The answer to an exception of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NotImplementedError):
        return invalid(str(error), code="unsupported")
    if isinstance(error, ValueError):
        is_long = str(error).startswith("the prompt must leave room")
        code = "context_length_exceeded" if is_long else None
        return invalid(str(error), param=_leading_field(str(error)), code=code)
    if isinstance(error, RecursionError):
        return invalid("the request nests too deeply")
    if isinstance(error, EngineClosed):
        return busy(str(error), code="engine_closed")
    if isinstance(error, MemoryError):
        return busy(str(error), code="out_of_memory")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "internal error; the server's log has the details", code="internal_error")


def install(app: FastAPI) -> None:
    """Make every failure of a route an answer in this shape."""

    async def engine_error(_: Request, error: Exception) -> JSONResponse:
        return from_exception(error).response()

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers) if error.headers else None
        message = f"{request.method} {request.url.path:.200}: {error.detail}"
        return ApiError(error.status_code, message, headers=headers).response()

    async def validation_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return from_validation(error.errors()).response()

    for kind in (ApiError, ValueError, EngineClosed, MemoryError, NotImplementedError, RecursionError):
        app.add_exception_handler(kind, engine_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)


_SAMPLING = frozenset(field.name for field in fields(SamplingParams))


def _leading_field(message: str) -> str | None:
    """The sampling field that a message of the engine begins with."""
    name = message.partition(" ")[0].rstrip(":,").partition(".")[0].partition("[")[0]
    return name if name in _SAMPLING else None


def from_validation(errors: Any) -> ApiError:
    """The deepest fault that pydantic found, with its field: of a union, in the member that fits best."""
    fault = max(errors, key=lambda error: len(error["loc"]))
    name = _field(fault)
    if name == "body" and isinstance(fault.get("input"), bytes):
        return invalid("the body must be JSON, with the header 'Content-Type: application/json'")
    if fault["type"] == "extra_forbidden":
        return invalid(f"{name}: this field is not supported", param=name, code="unsupported_field")
    if fault["type"] == "json_invalid":
        reason = fault.get("ctx", {}).get("error", fault["msg"])
        return invalid(f"the body is not valid JSON: {reason} at character {fault['loc'][-1]}")
    expected = [error["msg"] for error in errors if _field(error) == name]
    message = " or ".join(dict.fromkeys(expected)).removeprefix("Value error, ")
    return invalid(
        f"{name}: {message}; given: {_shown(fault.get('input'))}", param=name, code="invalid_value"
    )


def _shown(value: Any) -> str:
    shown = repr(value[:80]) if isinstance(value, str) else reprlib.repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


_UNION_MEMBERS = ("str", "int", "float", "bool", "dict", "constrained-str")


def _field(error: Any) -> str:
    """The field that an error is in, without the members of unions that pydantic puts into the path."""
    *path, last = [str(part) for part in error["loc"]]
    names = [name for name in path[1:] if not _is_union_member(name)]
    if error["type"] == "extra_forbidden" or not _is_union_member(last):
        names += [last] if path else []
    return ".".join(names) or "body"


def _is_union_member(name: str) -> bool:
    return name in _UNION_MEMBERS or "[" in name or name[:1].isupper() or name.startswith("<")
