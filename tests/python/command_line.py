"""The command `astrai-rs` in a process of its own."""

from __future__ import annotations

import subprocess

from conftest import GLASS, INTERRUPTIBLE, LIMIT, python

START = (
    INTERRUPTIBLE
    + "import runpy, sys; sys.argv[0] = 'astrai-rs'; runpy.run_module('astrai_rs', {}, '__main__')"
)


def start(*arguments, model=GLASS):
    if model is not None:
        arguments = (*arguments, "--model", str(model))
    return python("-c", START, *map(str, arguments), stdin=subprocess.PIPE)


def run(*arguments, input="", **options):
    with start(*arguments, **options) as process:
        out, err = process.communicate(input, timeout=LIMIT)
    return process.returncode, out, err
