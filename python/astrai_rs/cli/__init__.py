"""The command line `astrai-rs`. Needs the extra `cli` (typer, rich, prompt-toolkit)."""

from __future__ import annotations

import sys

try:
    import typer
except ImportError:  # the entry point is installed without the extra, too
    sys.exit("astrai-rs: the command line needs: pip install 'astrai_rs[cli]'")

from astrai_rs.cli import bench, chat, inspect, pull, run, serve
from astrai_rs.cli.common import FAILED, INTERRUPTED, USAGE, fail

app = typer.Typer(
    help="Run language models on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for command in (run.run, chat.chat, serve.serve, pull.pull, inspect.inspect, inspect.doctor):
    app.command()(command)
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        from astrai_rs import _core

        typer.echo(_core.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Run language models on this machine."""


def main() -> None:
    """Entry point: errors become one line on stderr and an exit code."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(FAILED)
    except (OSError, ValueError, RuntimeError, MemoryError, TypeError) as error:
        from astrai_rs._core import CheckpointError

        is_usage = isinstance(error, (ValueError, TypeError)) and not isinstance(error, CheckpointError)
        fail(str(error) or type(error).__name__, USAGE if is_usage else FAILED)
