"""The command line over the fake core."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import astrai_rs

PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a CI may start us with SIGINT ignored
sys.path[:0] = [{tests!r}, {source!r}]
import fake_core
fake_core.install()
fake_core.FakeEngine.step_seconds = {step}
from astrai_rs import engine
engine._load_tokenizer = lambda path, tokenizer: fake_core.ByteTokenizer()
if {template}:
    fake_core.ByteTokenizer.chat_template = "x"
    fake_core.ByteTokenizer.apply_chat_template = lambda self, messages: self.encode(messages[-1]["content"])
sys.argv = ["astrai-rs", *sys.argv[1:]]
from astrai_rs.cli import main
main()
"""


@pytest.fixture
def start(folder):
    def run(*arguments, step=0.0, template=False, model=True):
        tests, source = str(Path(__file__).parent), str(Path(astrai_rs.__file__).parent.parent)
        code = PROGRAM.format(tests=tests, source=source, step=step, template=template)
        if model:
            arguments = (*arguments, "--model", str(folder))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-c", code, *arguments], text=True, **pipes)

    return run


@pytest.fixture
def run(start):
    def finish(*arguments, input="", **options):
        with start(*arguments, **options) as process:
            out, err = process.communicate(input, timeout=30)
        return process.returncode, out, err

    return finish


def test_run(run):
    code, out, err = run("run", "hello")
    assert (code, out) == (0, "HELLO\n")
    assert "6 tokens" in err
    assert "tokens/s" in err
    assert "first token after" in err


def test_run_from_stdin(run):
    assert run("run", input="from stdin")[:2] == (0, "FROM STDIN\n")


def test_json(run):
    code, out, _ = run("run", "hello", "--json", "-n", "3")
    answer = json.loads(out)
    assert code == 0
    assert (answer["text"], answer["finish_reason"], answer["num_tokens"]) == ("HEL", "length", 3)


def test_jsonl(run, tmp_path):
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"prompt": "abc", "id": 7}\n\n{"prompt": "defg", "max_tokens": 2, "stop": "x"}\n')
    code, out, err = run("run", "--input", str(lines), "--output", str(tmp_path / "out.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (code, out) == (0, "")
    assert [(row["text"], row["finish_reason"]) for row in rows] == [("ABC", "stop"), ("DE", "length")]
    assert rows[0]["id"] == 7
    assert "2 prompts" in err
    assert run("run", "--input", str(lines))[1].count("\n") == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "in.jsonl:1: not valid JSON"),
        ("[1]", 'either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', 'either "prompt" or "messages"'),
        ('{"prompt": "a", "colour": 1}', "unknown fields: colour"),
        ('{"prompt": "a", "top_k": "x"}', "in.jsonl:1: top_k must be an int"),
    ],
)
def test_bad_jsonl(run, tmp_path, line, message):
    (tmp_path / "in.jsonl").write_text(line)
    code, _, err = run("run", "--input", str(tmp_path / "in.jsonl"))
    assert code == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "a", "-t", "-1"), 1, "astrai-rs: error: temperature must be at least 0"),
        (("run", "a", "--input", "x"), 2, "give a prompt or --input, not both"),
        (("run", "--input", "/no/such"), 2, "/no/such: no such file"),
        (("run", "a", "--max-tokens", "x"), 2, "max-tokens"),
        (("run", "a", "--nothing"), 2, "--nothing"),
        (("chat",), 1, "no chat template"),
    ],
)
def test_errors_are_one_line(run, arguments, code, message):
    got, _, err = run(*arguments)
    assert got == code
    assert message in err
    assert "Traceback" not in err


def test_missing_model(run):
    code, _, err = run("run", "a", "--model", "/no/such", model=False)
    assert code == 1
    assert err == "astrai-rs: error: /no/such: no such file or folder\n"


def test_ctrl_c_ends_run(start):
    with start("run", "a" * 400, step=0.02) as process:
        assert process.stdout.read(2) == "AA"
        process.send_signal(2)
        process.communicate(timeout=10)
    assert process.returncode == 130


def test_chat(run):
    code, out, err = run("chat", input="hello\n/new\n/help\n\nbye\n/exit\nnot read\n", template=True)
    assert (code, out) == (0, "HELLO\nBYE\n")
    assert err.count("/new starts over") == 2


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(start):
    with start("chat", step=0.02, template=True) as process:
        process.stdin.write("a" * 400 + "\nnext\n")
        process.stdin.flush()
        assert process.stdout.read(2) == "AA"
        process.send_signal(2)
        out, _ = process.communicate(timeout=20)
    assert out.endswith(" …\nNEXT\n")
    assert len(out) < 300
    assert process.returncode == 0


def test_doctor(run):
    code, out, _ = run("doctor", model=False)
    assert code == 0
    for name in ("astrai_rs", "tier", "num_threads", "cuda", "python", "tokenizers", "embedded model"):
        assert any(line.startswith(name) for line in out.splitlines()), name


def test_help_is_quick(run):
    run("--help", model=False)
    start = time.monotonic()
    code, out, _ = run("--help", model=False)
    assert code == 0
    for name in ("run", "chat", "doctor"):
        assert name in out
    assert time.monotonic() - start < 1.0, "0.2 s on a quiet machine"


def test_without_the_extra(folder):
    source = str(Path(astrai_rs.__file__).parent.parent)
    code = f"import sys; sys.path.insert(0, {source!r}); sys.modules['typer'] = None; import astrai_rs.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "astrai-rs: the command line needs: pip install 'astrai_rs[cli]'\n"
