"""vLLM's routes about tokens: `/tokenize`, `/detokenize`, `/tokenizer_info`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from astrai_rs.server.chat import ChatRequest
from astrai_rs.server.conversation import prompt_ids
from astrai_rs.server.errors import invalid
from astrai_rs.server.messages import Message, Tool
from astrai_rs.server.sampling import Items, Wire

if TYPE_CHECKING:
    from astrai_rs.server.state import ServerState


class TokenizeRequest(Wire):
    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False
    # As in chat completions.
    messages: Items[Message] | None = None
    tools: Items[Tool] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Wire):
    model: str | None = None
    tokens: Items[int]


def add_routes(app: FastAPI, state: ServerState) -> None:
    """The routes, at the server's root as in vLLM."""

    def tokenized(body: TokenizeRequest) -> list[int]:
        if body.messages is None:
            assert body.prompt is not None
            return state.tokenizer.encode(body.prompt, body.add_special_tokens)
        names = set(ChatRequest.model_fields) & body.model_fields_set
        return prompt_ids(state, ChatRequest.model_construct(**{n: getattr(body, n) for n in names}))

    @app.post("/tokenize", tags=["tokens"])
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        state.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("give either prompt or messages", param="prompt")
        ids = await state.call(tokenized, body)
        strings = [state.engine.id_to_text(i) for i in ids] if body.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": state.engine.max_model_len,
            "tokens": ids,
            "token_strs": strings,
        }

    @app.post("/detokenize", tags=["tokens"])
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        state.check_model(body.model)
        for token_id in body.tokens:
            if not 0 <= token_id < state.engine.vocab_size:
                allowed = f"ids between 0 and {state.engine.vocab_size - 1}"
                raise invalid(f"tokens must hold {allowed}; given: {token_id}", param="tokens")
        text = await state.call(lambda: state.tokenizer.decode(body.tokens, skip_special_tokens=False))
        return {"prompt": text}

    @app.get("/tokenizer_info", tags=["tokens"])
    async def tokenizer_info() -> dict[str, Any]:
        tokenizer = state.tokenizer
        template = tokenizer.chat_template
        return {
            "tokenizer_class": type(tokenizer).__name__,
            **tokenizer.special_tokens_map,
            "eos_token": tokenizer.eos_token,
            "bos_token": tokenizer.bos_token,
            "pad_token": tokenizer.pad_token or tokenizer.eos_token,
            "chat_template": None if template is None else template.source,
        }
