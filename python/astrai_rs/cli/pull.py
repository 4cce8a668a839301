"""`astrai-rs pull`: download a model of the hub."""

from __future__ import annotations

from typing import Annotated

import typer


def pull(
    model: Annotated[str, typer.Argument(help="Hub id: owner/name, or owner/name:Q4_K_M for a GGUF file.")],
) -> None:
    """Download a model, so that it is there when it is needed. Prints where it lies."""
    from astrai_rs.model import resolve

    # The hub's library draws the progress bars.
    typer.echo(resolve(model))
