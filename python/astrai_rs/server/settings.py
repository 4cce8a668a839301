"""`ServerSettings`: who may ask, and how much."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class ServerSettings:
    """Limits and options of one app. The defaults suit a small server; all sizes are per request."""

    model_names: tuple[str, ...] = ("model",)
    """Names that requests may use; the first one is reported."""
    api_keys: tuple[str, ...] = ()
    """Any of them opens every route; none: no key is asked for."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names that a request may be addressed to; empty: any. Keeps web pages that rebind their name to
    this machine out of a server without a key."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages that may call; empty: only the server's own page."""
    sanitize_control_tokens: bool = True
    """Control tokens that are typed in messages reach the model as plain text."""
    max_body_bytes: int = 8 << 20
    max_messages: int = 2048
    max_prompts: int = 256
    """Prompts of one completions request."""
    max_n: int = 128
    max_stop: int = 16
    """Stop strings."""
    max_bad_words: int = 128
    max_stop_chars: int = 8 << 10
    """Characters of all stop strings and bad words."""
    max_logprobs: int = 20
    max_schema_bytes: int = 64 << 10
    """JSON schemas and grammars."""
    max_schema_depth: int = 32
    max_regex_bytes: int = 4 << 10
    max_tools: int = 128
    max_queued: int = 512
    """Samples that may wait for a place in a step; more are answered with 429."""
    body_timeout_s: float = 20.0
    """Time for a whole body to arrive."""
    keep_alive_s: float = 15.0
    """Silence after which a stream gets a comment, so that proxies keep it open."""
    stuck_after_s: float = 1.5
    """A step that takes longer than this makes `/health` fail."""
    drain_timeout_s: float = 30.0
    """After SIGTERM, time for accepted requests to finish."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, tuple) and not isinstance(value, tuple):
                raise TypeError(f"{field.name} must be a tuple of strings; given: {type(value).__name__}")
        if not all(key.strip() for key in self.api_keys):
            raise ValueError("an API key must not be empty")
