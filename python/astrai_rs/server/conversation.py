"""From a chat request to a running generation: template, tokens, submit."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING

from astrai_rs.chat_template import ChatTemplate
from astrai_rs.request import SamplingParams, StructuredOutputsParams
from astrai_rs.server.chat import ChatPlan, ChatRequest
from astrai_rs.server.errors import invalid
from astrai_rs.server.generation import Generation
from astrai_rs.server.messages import spelled_out, template_messages, template_tools
from astrai_rs.server.tools import detect_format, detect_reasoning
from astrai_rs.tokenizer import AutoTokenizer

if TYPE_CHECKING:
    from astrai_rs.server.state import ServerState


_RESERVED = frozenset(
    name
    for function in (AutoTokenizer.chat_prompt, AutoTokenizer._render, ChatTemplate.render)
    for name in signature(function).parameters
)
"""What a request's variables for the template must not be called: a client chooses no template."""


async def start_chat(state: ServerState, body: ChatRequest) -> tuple[ChatPlan, Generation]:
    """Submit a conversation; the plan says how to read what comes."""
    state.check_model(body.model)
    plan = chat_plan(state, body)
    params = plan.params(state.settings)
    ids = await state.call(chat_prompt, state, plan)
    try:
        return plan, await state.start([ids], [params])
    except ValueError as error:
        raise await state.call(_in_the_requests_words, state, plan, error) from error


def _in_the_requests_words(state: ServerState, plan: ChatPlan, error: ValueError) -> Exception:
    """The error of a grammar that was made of the tools or of `response_format`, with their names."""
    name, _, reason = str(error).partition(": ")
    if name == "structured_outputs.json" and plan.body.structured_outputs is None:
        return invalid(f"response_format.json_schema.schema: {reason}", param="response_format")
    if name != "structured_outputs.grammar" or plan.body.structured_outputs is not None:
        return error
    for index, tool in enumerate(plan.tools):
        schema = StructuredOutputsParams(json=tool.function.parameters or {})
        try:
            state.engine.compile_grammars([SamplingParams(structured_outputs=schema)])
        except ValueError as fault:
            field = f"tools.{index}.function.parameters"
            return invalid(f"{field}: {str(fault).partition(': ')[2]}", param=field)
    return invalid(f"tools: {reason.partition(chr(10))[0]}", param="tools")


def prompt_ids(state: ServerState, body: ChatRequest) -> list[int]:
    """What a chat request's conversation is to the model."""
    plan = chat_plan(state, body)
    plan.params(state.settings)  # for its checks
    return chat_prompt(state, plan)


def chat_plan(state: ServerState, body: ChatRequest) -> ChatPlan:
    """How the answer to a chat request is to be read."""
    source = template_source(state)
    return ChatPlan(
        body,
        tool_format=detect_format(source),
        reasoning=detect_reasoning(source),
        token_ids=state.tokenizer.control_token_ids,
    )


def template_source(state: ServerState) -> str:
    """The chat template's text; of several, all."""
    template = getattr(state.tokenizer, "chat_template", None)
    if template is None:
        raise invalid("this model has no chat template; use /v1/completions", code="unsupported")
    source = template.source
    return source if isinstance(source, str) else "\n".join(source.values())


def chat_prompt(state: ServerState, plan: ChatPlan) -> list[int]:
    """The conversation as ids. Notes in the plan where the answer begins."""
    body = plan.body
    messages = template_messages(body.messages, state.settings)
    state.check_lengths(message["content"] for message in messages)
    tools = template_tools(plan.tools)
    if plan.spells_out_tools:
        messages, tools = spelled_out(messages, tools), []
    options = dict(body.chat_template_kwargs or {})
    if taken := sorted(_RESERVED.intersection(options)):
        raise invalid(f"chat_template_kwargs may not set {', '.join(taken)}", param="chat_template_kwargs")
    if body.reasoning_effort is not None:
        options.setdefault("reasoning_effort", body.reasoning_effort)
    text, ids = state.tokenizer.chat_prompt(
        messages,
        tools=tools or None,
        system_prompt=body.system_prompt,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        sanitize_control_tokens=state.settings.sanitize_control_tokens,
        **options,
    )
    plan.read_prompt(text)
    return ids
