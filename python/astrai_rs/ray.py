"""Beyond one machine (extras `ray` and `server`): replicas under Ray Serve, a batch stage for Ray Data.

```python
from ray import serve
from astrai_rs.ray import BatchGenerator, deployment

serve.run(deployment("path/to/model", num_replicas=2, ray_actor_options={"num_cpus": 4}).bind())

stage = {"fn_constructor_kwargs": {"model": "path/to/model"}, "concurrency": 2, "num_cpus": 4}
dataset.map_batches(BatchGenerator, **stage)
```
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from astrai_rs.engine import Engine
from astrai_rs.model import embedded_model
from astrai_rs.request import SamplingParams

try:
    import ray
    from ray import serve
except ImportError as error:
    raise ImportError("astrai_rs.ray needs Ray: pip install 'astrai_rs[ray,server]'") from error

if TYPE_CHECKING:
    import numpy as np
    from fastapi import FastAPI

    from astrai_rs.server import ServerSettings
    from astrai_rs.stream import TokenStream

_MAX_ONGOING_REQUESTS = 768
"""A step's places and the queue of the defaults: the engine batches, so Ray must not hold requests back."""


def deployment(
    model: str | None = None,
    *,
    engine_options: Mapping[str, Any] | None = None,
    settings: ServerSettings | None = None,
    **options: Any,
) -> Any:
    """The server as a Ray Serve deployment: every replica has an engine of its own and serves the same app as
    `astrai-rs serve`, streams and cancellation included.

    Args:
        model: as `Engine`'s, on the replica's machine; None: the embedded one.
        engine_options: `Engine`'s keyword arguments. Without `num_threads`, a replica uses as many threads as
            it has CPUs from Ray (`ray_actor_options={"num_cpus": …}`).
        settings: limits, keys and names; the defaults ask for no key.
        options: of `serve.deployment`, such as `num_replicas` and `ray_actor_options`.

    Returns:
        A `serve.Deployment`; `.bind()` makes the application for `serve.run`.
    """
    engine_options = dict(engine_options or {})

    def build() -> FastAPI:
        from astrai_rs.server import create_app

        return create_app(_engine(model, engine_options), settings)

    class AstraiServer:
        async def check_health(self) -> None:
            """Ray replaces a replica whose engine does not step."""
            fault = self.app.state.server.health()  # type: ignore[attr-defined]
            if fault is not None:
                raise RuntimeError(fault)

    defaults = {"max_ongoing_requests": _MAX_ONGOING_REQUESTS}
    return serve.deployment(**{**defaults, **options})(serve.ingress(build)(AstraiServer))


class BatchGenerator:
    """A stage for `Dataset.map_batches`: answers the rows of a batch together. One engine per actor.

    A row has a column `prompt` (text) or `messages` (a conversation for the chat template), and may have
    `sampling_params`, a dict of fields that differ from the stage's. Added columns: `generated_text`,
    `finish_reason`, `num_input_tokens`, `num_generated_tokens`, and `error` (None, or why there is no text).

    Args:
        model: as `Engine`'s, on the actor's machine; None: the embedded one.
        sampling_params: of all rows; one sample each.
        engine_options: `Engine`'s keyword arguments. Without `num_threads`, an actor uses as many threads as
            it has CPUs from Ray.
        on_error: `"raise"` ends the job with the first row that cannot be answered; `"column"` notes why and
            goes on.

    Raises:
        ValueError: `on_error` is another word, or `sampling_params` asks for several samples.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        sampling_params: SamplingParams | None = None,
        engine_options: Mapping[str, Any] | None = None,
        on_error: Literal["raise", "column"] = "raise",
    ) -> None:
        if on_error not in ("raise", "column"):
            raise ValueError(f"on_error must be 'raise' or 'column'; given: {on_error!r}")
        self._params = _one_sample(sampling_params or SamplingParams())
        self._raises = on_error == "raise"
        self._engine = _engine(model, dict(engine_options or {}))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """The batch, columns of `[rows]`, with the columns that the stage adds."""
        if ("prompt" in batch) == ("messages" in batch):
            raise ValueError(f"rows must have either prompt or messages; given: {', '.join(batch)}")
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        begun = [self._begin(row) for row in rows]
        results = [_failed(each) if isinstance(each, str) else _answer(*each) for each in begun]
        return {**batch, **{name: [result[name] for result in results] for name in _failed("")}}

    def _begin(self, row: Mapping[str, Any]) -> tuple[int, TokenStream] | str:
        """Length of the prompt and the answer to come; or why there is none."""
        try:
            own = row.get("sampling_params")
            params = self._params if own is None else _one_sample(replace(self._params, **own))
            ids = self._prompt_ids(row)
            return len(ids), self._engine.stream(ids, params)
        except (TypeError, ValueError, NotImplementedError) as error:
            if self._raises:
                raise
            return str(error)

    def _prompt_ids(self, row: Mapping[str, Any]) -> list[int]:
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer, and this model has none")
        ids: list[int]
        if "prompt" in row:
            ids = tokenizer.encode(str(row["prompt"]))
        else:
            ids = tokenizer.apply_chat_template([dict(message) for message in _items(row["messages"])])
        return ids


def _engine(model: str | None, options: dict[str, Any]) -> Engine:
    """An engine on the CPUs that Ray gave to this actor."""
    path = embedded_model() if model is None else model
    if path is None:
        raise ValueError("no model given, and no embedded one: pip install 'astrai_rs[demo]'")
    return Engine(path, **{"num_threads": _assigned_cpus(), **options})


def _assigned_cpus() -> int | None:
    """None outside an actor, and for one without a whole CPU."""
    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return None
    return int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0)) or None


def _one_sample(params: SamplingParams) -> SamplingParams:
    if params.n != 1:
        raise ValueError(f"a batch stage gives one sample per row: n must be 1; given: {params.n}")
    return params


def _items(messages: Any) -> Iterable[Mapping[str, Any]]:
    items: Iterable[Mapping[str, Any]] = messages.tolist() if hasattr(messages, "tolist") else messages
    return items


def _answer(num_input_tokens: int, stream: TokenStream) -> dict[str, Any]:
    pieces = list(stream)
    return {
        "generated_text": "".join(piece.text for piece in pieces),
        "finish_reason": pieces[-1].finish_reason,
        "num_input_tokens": num_input_tokens,
        "num_generated_tokens": sum(len(piece.token_ids) for piece in pieces),
        "error": None,
    }


def _failed(reason: str) -> dict[str, Any]:
    return {
        "generated_text": None,
        "finish_reason": None,
        "num_input_tokens": None,
        "num_generated_tokens": None,
        "error": reason,
    }
