"""`create_app`: the routes. Each reads a request, asks the engine, and hands the answer to a converter."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError

from astrai_rs import _core
from astrai_rs.engine import Engine
from astrai_rs.server import anthropic, astrai, errors, responses, tokens
from astrai_rs.server.chat import ChatReply, ChatRequest
from astrai_rs.server.completions import CompletionReply, CompletionRequest, params_of, prompts_of
from astrai_rs.server.conversation import prompt_ids, start_chat
from astrai_rs.server.errors import ApiError
from astrai_rs.server.generation import ClientLeft
from astrai_rs.server.middleware import Gate
from astrai_rs.server.settings import ServerSettings
from astrai_rs.server.state import ServerState

STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""A route's other kind of answer."""

Body = TypeVar("Body")

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
    for status, text in {
        400: "A field is wrong or not supported; `error.param` names it.",
        401: "No API key, or a wrong one.",
        404: "No such model.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        421: "A host name that is not this server's.",
        429: "The queue is full; try again after `Retry-After` seconds.",
        500: "A fault of the server.",
        503: "The server is shutting down, or the engine has stopped.",
    }.items()
}

_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/markdown.js": ("markdown.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
}


def create_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """An ASGI app over an engine, which stays the caller's to close. `app.state.server` is its state."""
    settings = settings or ServerSettings()
    state = ServerState(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        state.draining = True
        state.end_all()

    app = FastAPI(
        title="astrai_rs",
        version=_core.__version__,
        description="OpenAI-compatible inference server.",
        lifespan=lifespan,
        responses=_ERRORS,
        docs_url=None,  # Swagger's page loads scripts from a foreign host
        redoc_url=None,
    )
    app.state.server = state
    errors.install(app)
    app.add_exception_handler(ClientLeft, _nobody)
    app.add_middleware(Gate, settings=settings, state=state)
    if settings.allowed_origins:
        origins = list(settings.allowed_origins)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    _service_routes(app, state)
    _openai_routes(app, state)
    _other_chat_routes(app, state)
    tokens.add_routes(app, state)
    astrai.add_routes(app, state)
    return app


async def _nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # as nginx logs it; nobody reads it


def _service_routes(app: FastAPI, state: ServerState) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["service"])
    async def health() -> JSONResponse:
        """200 while the engine steps; 503 with the reason otherwise."""
        fault = state.health()
        ok = fault is None
        body = {"status": "ok" if ok else "error", "model_loaded": True, "engine_ready": ok}
        return JSONResponse(body if ok else {**body, "message": fault}, 200 if ok else 503)

    @app.get("/version", tags=["service"])
    async def version() -> dict[str, str]:
        return {"version": _core.__version__}

    @app.get("/metrics", tags=["service"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, (name, media_type) in _PAGE.items():
        _page_route(app, path, name, media_type)


def _page_route(app: FastAPI, path: str, name: str, media_type: str) -> None:
    @app.head(path, include_in_schema=False)
    @app.get(path, include_in_schema=False)
    async def page() -> Response:
        file = resources.files("astrai_rs.server") / "page" / name
        if not file.is_file():
            raise ApiError(404, "this installation has no chat page")
        headers = {"content-security-policy": _CSP, "cache-control": "no-cache"}
        return Response(file.read_bytes(), media_type=media_type, headers=headers)


def _openai_routes(app: FastAPI, state: ServerState) -> None:
    @app.get("/v1/models", tags=["openai"])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(state, name) for name in state.settings.model_names]}

    @app.get("/v1/models/{name:path}", tags=["openai"])
    async def model(name: str) -> dict[str, Any]:
        state.check_model(name)
        return _model(state, name)

    @app.post("/v1/completions", tags=["openai"], responses=STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        state.check_model(body.model)
        params = params_of(body, state.settings)
        prompts = prompts_of(body, state.settings)
        state.check_lengths(prompts)
        ids = await state.call(encoded, state, prompts, body.add_special_tokens)
        texts = [_prompt_text(state, prompt) for prompt in prompts] if body.echo else []
        id_to_text = None if state.engine.tokenizer is None else state.engine.id_to_text
        reply = CompletionReply(body, texts, state.settings.model_names[0], id_to_text)
        generation = await state.start(ids, [params] * len(ids))
        if body.stream:
            return state.stream(reply.stream(generation))
        await generation.finish(request)
        return JSONResponse(reply.whole(generation))

    @app.post("/v1/chat/completions", tags=["openai"], responses=STREAMED)
    async def chat(body: ChatRequest, request: Request) -> Response:
        plan, generation = await start_chat(state, body)
        token_bytes = await state.call(lambda: state.token_bytes) if body.logprobs else []
        reply = ChatReply(plan, state.settings.model_names[0], token_bytes)
        if body.stream:
            return state.stream(reply.stream(generation))
        await generation.finish(request)
        return JSONResponse(reply.whole(generation))


def _other_chat_routes(app: FastAPI, state: ServerState) -> None:
    name = state.settings.model_names[0]

    @app.post("/v1/messages", tags=["anthropic"], responses=STREAMED)
    async def messages(body: anthropic.MessagesRequest, request: Request) -> Response:
        plan, generation = await start_chat(state, _converted(anthropic.chat_request, body))
        reply = anthropic.MessagesReply(plan, name)
        if body.stream:
            return state.stream(reply.stream(generation))
        await generation.finish(request)
        return JSONResponse(reply.whole(generation))

    @app.post("/v1/messages/count_tokens", tags=["anthropic"])
    async def count_tokens(body: anthropic.MessagesRequest) -> dict[str, int]:
        state.check_model(body.model)
        ids = await state.call(prompt_ids, state, _converted(anthropic.chat_request, body))
        return {"input_tokens": len(ids)}

    @app.post("/v1/responses", tags=["openai"], responses=STREAMED)
    async def create_response(body: responses.ResponsesRequest, request: Request) -> Response:
        plan, generation = await start_chat(state, _converted(responses.chat_request, body))
        reply = responses.ResponsesReply(body, plan, name)
        if body.stream:
            return state.stream(reply.stream(generation))
        await generation.finish(request)
        return JSONResponse(reply.whole(generation))


def _converted(convert: Callable[[Body], ChatRequest], body: Body) -> ChatRequest:
    """A request in another interface's words; what is wrong with it is named as in chat completions."""
    try:
        return convert(body)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
        raise errors.from_validation(faults) from error


def _model(state: ServerState, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "astrai_rs",
        "max_model_len": state.engine.max_model_len,
    }


def encoded(
    state: ServerState, prompts: Sequence[str | list[int]], add_special_tokens: bool
) -> list[list[int]]:
    """Prompts as ids."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    ids = iter(state.tokenizer.encode(texts, add_special_tokens) if texts else [])
    return [next(ids) if isinstance(prompt, str) else prompt for prompt in prompts]


def _prompt_text(state: ServerState, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else state.tokenizer.decode(prompt, skip_special_tokens=False)
