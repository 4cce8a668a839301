"""AstrAI's own routes: `/generate` (query string or JSON) and `/stats`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Body, FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response

from astrai_rs.request import SamplingParams
from astrai_rs.server.errors import invalid
from astrai_rs.server.generation import Generation
from astrai_rs.server.sampling import Items, Number, Wire

if TYPE_CHECKING:
    from astrai_rs.server.state import ServerState


class GenerateFields(Wire):
    """A JSON body, where the fields are not in the query string."""

    query: str | None = None
    history: Items[list[str]] | None = None
    temperature: Number = 0.8
    top_p: Number = 0.95
    top_k: int = 50
    max_len: int = 2048
    stream: bool = False


def add_routes(app: FastAPI, state: ServerState) -> None:
    """The routes of AstrAI's server that are not OpenAI's."""

    @app.get("/stats", tags=["astrai"])
    async def stats() -> dict[str, Any]:
        figures = state.engine.stats()
        return {
            "total_tasks": state.metrics.num_finished,
            "total_tokens": figures["generation_tokens_total"],
            "active_tasks": figures["num_requests_running"],
            "waiting_queue": figures["num_requests_waiting"],
            **figures,
        }

    @app.post("/generate", tags=["astrai"], responses={200: {"content": {"text/plain": {}}}})
    async def generate(
        request: Request,
        body: Annotated[GenerateFields | list[list[str]] | None, Body()] = None,
        query: Annotated[str | None, Query()] = None,
        temperature: Annotated[float | None, Query()] = None,
        top_p: Annotated[float | None, Query()] = None,
        top_k: Annotated[int | None, Query()] = None,
        max_len: Annotated[int | None, Query()] = None,
        stream: Annotated[bool | None, Query()] = None,
    ) -> Response:
        """`history` is a list of `[user, assistant]` pairs; the answer is `{"response": text}`, or with
        `stream` plain text, a line per piece."""
        if unknown := sorted(set(request.query_params) - set(GenerateFields.model_fields)):
            name = unknown[0]
            raise invalid(f"{name}: this field is not supported", param=name, code="unsupported_field")
        given = {"query": query, "temperature": temperature, "top_p": top_p}
        given |= {"top_k": top_k, "max_len": max_len, "stream": stream}
        fields = GenerateFields(history=body) if isinstance(body, list) else body or GenerateFields()
        fields = fields.model_copy(update={k: v for k, v in given.items() if v is not None})
        ids = await state.call(_prompt, state, fields)
        generation = await state.start([ids], [_params(fields)])
        if fields.stream:
            return state.stream(_lines(generation), media_type="text/plain; charset=utf-8")
        choices = await generation.finish(request)
        return JSONResponse({"response": choices[0].text})


def _prompt(state: ServerState, fields: GenerateFields) -> list[int]:
    if fields.query is None:
        raise invalid("query is missing", param="query")
    messages = []
    for pair in fields.history or ():
        if len(pair) != 2:
            raise invalid(f"history must hold [user, assistant] pairs; given: {pair!r:.80}", param="history")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages.append({"role": "user", "content": fields.query})
    sanitize = state.settings.sanitize_control_tokens
    return state.tokenizer.chat_prompt(messages, sanitize_control_tokens=sanitize)[1]


def _params(fields: GenerateFields) -> SamplingParams:
    is_greedy = fields.top_p == 0  # AstrAI: exactly one token is kept
    return SamplingParams(
        temperature=fields.temperature,
        top_p=1.0 if is_greedy else fields.top_p,
        top_k=1 if is_greedy else fields.top_k,
        max_tokens=fields.max_len,
    )


async def _lines(generation: Generation) -> AsyncGenerator[bytes, None]:
    try:
        async for _, piece in generation:
            if piece.text:
                yield (piece.text + "\n").encode()
    finally:
        generation.close()
