"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from astrai_rs._core import EngineClosed

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
        return invalid(str(error))
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

    async def http_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers) if error.headers else None
        return ApiError(error.status_code, str(error.detail), headers=headers).response()

    async def validation_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return from_validation(error.errors()).response()

    for kind in (ApiError, ValueError, EngineClosed, MemoryError, NotImplementedError, Exception):
        app.add_exception_handler(kind, engine_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)


def from_validation(errors: Any) -> ApiError:
    """The first fault that pydantic found, with the field it is in."""
    first, name = errors[0], _field(errors[0])
    if name == "body" and isinstance(first.get("input"), bytes):
        return invalid("the body must be JSON, with the header 'Content-Type: application/json'")
    if first["type"] == "extra_forbidden":
        return invalid(f"{name}: this field is not supported", param=name, code="unsupported_field")
    if first["type"] == "json_invalid":
        return invalid(f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    # A union has an error per member.
    expected = [error["msg"] for error in errors if _field(error) == name]
    given = repr(first.get("input"))
    shown = given if len(given) <= 80 else given[:77] + "..."
    message = " or ".join(dict.fromkeys(expected)).removeprefix("Value error, ")
    return invalid(f"{name}: {message}; given: {shown}", param=name, code="invalid_value")


def _field(error: Any) -> str:
    """The field that an error is in, without the members of unions that pydantic puts into the path."""
    names = [str(part) for part in error["loc"][1:]]
    kinds = ("str", "int", "float", "bool", "dict", "constrained-str")
    return ".".join(n for n in names if n not in kinds and "[" not in n and not n[:1].isupper()) or "body"
