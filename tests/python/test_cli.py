"""The command line with the story model and the embedded one."""

from __future__ import annotations

import json
import os

import pytest

import astrai_rs
from astrai_rs import AutoTokenizer, Engine, SamplingParams
from astrai_rs.model import embedded_model
from command_line import START, run, start
from conftest import FIXTURES, GLASS, LIMIT, NO_CUDA, python, unless_cuda_works

EXACT = ("--dtype", "float32")


def read_until(stream, text):
    assert any(text in line for line in iter(stream.readline, "")), f"ended without {text!r}"


@pytest.fixture
def case(cases):
    return cases[0]


def test_run(case):
    code, out, err = run("run", case["prompt"], "--raw", "-n", 40, *EXACT)
    assert (code, out) == (0, case["text"] + "\n")
    for part in ("40 tokens", "tokens/s", "first token after"):
        assert part in err


def test_run_uses_the_chat_template(case):
    """The story model's template puts a space after each message."""
    with Engine(GLASS, dtype="float32") as engine:
        greedy = SamplingParams(temperature=0, max_tokens=8)
        expected = engine.generate(f"Be good. {case['prompt']} ", greedy).text
    assert run("run", case["prompt"], "--system", "Be good.", "-n", 8, *EXACT)[:2] == (0, expected + "\n")


def test_run_from_stdin(case):
    arguments = ("run", "--raw", "-n", 40, *EXACT)
    assert run(*arguments, input=case["prompt"])[:2] == (0, case["text"] + "\n")


def test_run_samples_with_a_seed(case):
    arguments = ("run", case["prompt"], "-n", 20, "-t", 1, "--top-p", 0.9, "--top-k", 30, "--seed", 7)
    assert run(*arguments)[:2] == run(*arguments)[:2] != run(*arguments[:-1], 8)[:2]


def test_json(case):
    code, out, _ = run("run", case["prompt"], "--raw", "--json", "-n", 40, *EXACT)
    answer = json.loads(out)
    assert code == 0
    assert (answer["text"], answer["finish_reason"], answer["num_tokens"]) == (case["text"], "length", 40)
    assert answer["time_to_first_token_s"] > 0
    assert answer["tokens_per_s"] > 0


def test_the_embedded_model_answers():
    case = json.loads((FIXTURES / "golden/smollm2-135m/golden.json").read_text(encoding="utf-8"))[0]
    (message,) = case["messages"][-1:]
    system = [m["content"] for m in case["messages"][:-1]]
    arguments = ("--system", *system) if system else ()
    count = len(case["greedy_ids"])
    code, out, _ = run("run", message["content"], *arguments, "-n", count, *EXACT, model=None)
    assert (code, out) == (0, case["text"] + "\n")


def test_jsonl(cases, tmp_path):
    first, second = cases[0], cases[1]
    stop = first["text"][10:16]
    rows = [
        {"prompt": first["prompt"], "id": 7},
        {"prompt": second["prompt"], "max_tokens": 2},
        {"prompt": first["prompt"], "stop": stop, "n": 2},
    ]
    lines, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    options = ("--raw", "-n", 40, *EXACT)
    code, out, err = run("run", "--input", lines, "--output", answers, *options)
    assert (code, out) == (0, "")
    assert "3 prompts" in err
    got = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in got if "id" in row] == [7]
    assert [(row["text"], row["finish_reason"]) for row in got] == [
        (first["text"], "length"),
        (AutoTokenizer.from_pretrained(GLASS).decode(second["greedy_ids"][:2]), "length"),
        (first["text"][: first["text"].index(stop)], "stop"),
    ]
    assert [sample["text"] for sample in got[2]["outputs"]] == [got[2]["text"]] * 2
    assert run("run", "--input", lines, *options)[1] == answers.read_text(encoding="utf-8")


def test_jsonl_of_messages(case, tmp_path):
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": case["prompt"]}], "max_tokens": 3})
    )
    code, out, _ = run("run", "--input", tmp_path / "in.jsonl")
    assert (code, json.loads(out)["num_tokens"]) == (0, 3)
    code, out, err = run("run", "--input", tmp_path / "in.jsonl", "--raw")
    error = "messages need a chat template, and --raw is given or the model has none"
    assert (code, json.loads(out)["error"]) == (1, error)
    assert f"error: {tmp_path}/in.jsonl:1: {error}\n" in err


def test_a_line_that_cannot_be_answered_costs_no_other(tmp_path):
    lines = [{"prompt": "a"}, {"prompt": "a", "top_p": 2}, {"prompt": "b " * 5000}, {"prompt": "b"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    code, out, err = run("run", "--input", "-", "-n", 2, input=text)
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, [row["prompt"] for row in rows]) == (1, [line["prompt"] for line in lines])
    assert ["error" in row for row in rows] == [False, True, True, False]
    assert rows[1]["error"] == "top_p must be above 0 and at most 1; given: 2"
    assert "error: -:3: the prompt must leave room" in err


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    code, _, err = run("run", "--input", tmp_path / "in.jsonl")
    assert (code, "in.jsonl:2: not UTF-8: byte 0xe9 at 15" in err) == (2, True)
    code, _, err = run("run", os.fsdecode(b"caf\xe9"))
    assert (code, "the prompt is not UTF-8 from character 3 on" in err) == (2, True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "in.jsonl:1: not valid JSON"),
        ("[1]", 'each line must be an object with either "prompt" or "messages"'),
        ("{}", 'either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', 'either "prompt" or "messages"'),
        ('{"prompt": 3}', 'in.jsonl:1: "prompt" must be a string; given: 3'),
        ('{"messages": []}', 'in.jsonl:1: "messages" must be a list of messages; given: []'),
        ('{"prompt": "a"}\n{"prompt": "a", "colour": 1}', "in.jsonl:2: unknown fields: colour"),
        ('{"prompt": "a", "logprobs": 1}', "in.jsonl:1: unknown fields: logprobs"),
        ('{"prompt": "a", "top_k": "x"}', "in.jsonl:1: top_k must be an int"),
        ('{"prompt": "a", "structured_outputs": {}}', "in.jsonl:1: structured_outputs takes exactly one of"),
    ],
)
def test_bad_jsonl(tmp_path, line, message):
    (tmp_path / "in.jsonl").write_text(line)
    code, out, err = run("run", "--input", tmp_path / "in.jsonl")
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "a", "-t", "-1"), 2, "temperature must be a finite number of at least 0; given: -1"),
        (("run", "a", "--top-p", "0"), 2, "top_p must be above 0 and at most 1; given: 0"),
        (("run", "a", "--top-k", "-2"), 2, "top_k must be at least 1, or 0 or -1 for all ids; given: -2"),
        (("run", "a", "--seed", "-2"), 2, "seed must be between 0 and 18446744073709551615"),
        (("run", "a", "--max-tokens", "0"), 2, "max_tokens must be at least 1; given: 0"),
        (("run", "a", "--max-tokens", "x"), 2, "max-tokens"),
        pytest.param(("run", "a", "--device", "cuda"), 1, NO_CUDA[1], marks=unless_cuda_works),
        (("run", "a", "--device", "tpu"), 2, "device must be one of auto, cpu, cuda"),
        (("run", "a", "--dtype", "int3"), 2, "dtype must be one of auto, float32, bfloat16, float16"),
        (("run", "a", "--threads", "0"), 2, "num_threads must be at least 1; given: 0"),
        (("run", "a", "--max-model-len", "129"), 2, "max_model_len must be at most 128"),
        (("run", "a", "--kv-cache-dtype", "int4"), 2, "kv_cache_dtype must be one of auto, int8"),
        (("run", "a", "--gpu-memory-utilization", "1.5"), 2, "gpu_memory_utilization must be above 0 and at"),
        (("run", "word " * 200), 2, "tokens"),
        (("run", "a", "--input", "x"), 2, "give a prompt or --input, not both"),
        (("run", "--input", "/no/such"), 2, "/no/such: no such file"),
        (("run", "--input", GLASS / "golden.json", "--json"), 2, "--json is for one prompt"),
        (("run", "--input", GLASS / "golden.json", "--system", "x"), 2, "--system is for one prompt"),
        (("run", "a", "--output", "x"), 2, "--output is for the answers to --input"),
        (("bench", "throughput", "--output-json", "/no/b.json"), 2, "/no/b.json cannot be written"),
        (("bench", "throughput", "--output-json", GLASS), 2, "is a folder; a file is to be written"),
        (("bench", "serve", "--plot", "l.png"), 2, "--plot writes .svg files"),
        (("bench", "serve", "--base-url", "localhost:1"), 2, "--base-url must be http://… or https://… and"),
        (("bench", "serve", "--base-url", "http://"), 2, "and name a host; given: 'http://'"),
        (("serve", "--api-key", ""), 2, "an API key must not be empty"),
        (("serve", "--served-model-name", " "), 2, "--served-model-name must not be empty"),
        (("serve", "--allowed-origin", "foo"), 2, "--allowed-origin must be like https://"),
        (("run",), 2, "the prompt is empty"),
        (("run", "a", "--nothing"), 2, "--nothing"),
        (("walk",), 2, "walk"),
    ],
    ids=str,
)
def test_errors_are_one_line(arguments, code, message):
    got, out, err = run(*arguments)
    assert (got, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    if not err.startswith("Usage"):
        assert err.startswith("astrai-rs: error: ")
        assert err.count("\n") == 1


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}')
    code, _, err = run("run", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "no" / "such")
    assert code == 1
    assert "no/such" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("model", ["/no/such", ""])
def test_missing_model(model):
    code, _, err = run("run", "a", model=model)
    assert code in (1, 2)
    assert err in (
        "astrai-rs: error: /no/such: no such file or folder\n",
        "astrai-rs: error: --model must not be empty\n",
    )


def test_chat_needs_a_template(tmp_path):
    code, out, err = run("chat", model=FIXTURES / "golden/llama")
    assert (code, out) == (1, "")
    assert err == "astrai-rs: error: the model has no chat template; use: astrai-rs run --raw\n"


def test_ctrl_c_ends_run(endless_folder):
    with start("run", "Once", "-n", 30_000, model=endless_folder) as process:
        assert process.stdout.read(2)
        process.send_signal(2)
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_a_reader_that_leaves_ends_run(endless_folder):
    with start("run", "Once", "-n", 30_000, model=endless_folder) as process:
        assert process.stdout.read(2)
        process.stdout.close()
        assert process.wait(LIMIT) == 1
        assert process.stderr.read() == ""


def test_chat():
    """The history grows, /new forgets it, /system goes first."""
    typed = (
        "Once upon\nThe queen said\n/new\nOnce upon\n/system The king\nThe end\n/help\n\n/exit\nnot read\n"
    )
    code, out, err = run("chat", "-t", 0, "-n", 8, *EXACT, input=typed)
    with Engine(GLASS, dtype="float32") as engine:
        greedy = SamplingParams(temperature=0, max_tokens=8)

        def answer(*said):
            return engine.generate("".join(f"{text} " for text in said), greedy).text

        first = answer("Once upon")
        second = answer("Once upon", first, "The queen said")
        third = answer("The king", "Once upon", first, "The end")
    assert (code, out) == (0, f"{first}\n{second}\n{first}\n{third}\n")
    assert err.count("start over") == 2
    assert err.count("[8 tokens") == 4


def test_chat_commands(tmp_path):
    """/retry answers again, /undo forgets, /set changes the sampling, /save writes what was said."""
    file = tmp_path / "said.json"
    typed = f"Once upon\n/retry\n/set max_tokens 3\nThe queen\n/undo\n/system Hm\n/save {file}\n"
    typed += "/set colour 3\n/set top_p x\n/set temperature -1\n/set n 2\n/save\n/new\n/retry\n"
    code, out, err = run("chat", "-t", 0, "-n", 8, *EXACT, input=typed)
    with Engine(GLASS, dtype="float32") as engine:
        first = engine.generate("Once upon ", SamplingParams(temperature=0, max_tokens=8)).text
        said = f"Once upon {first} The queen "
        short = engine.generate(said, SamplingParams(temperature=0, max_tokens=3)).text
    assert (code, out) == (0, f"{first}\n{first}\n{short}\n")
    assert json.loads(file.read_text()) == [
        {"role": "system", "content": "Hm"},
        {"role": "user", "content": "Once upon"},
        {"role": "assistant", "content": first},
    ]
    for message in (
        "no such parameter: colour",
        "top_p must be a number",
        "temperature must be",
        "n stays 1",
        "needs the name",
        "nothing was said yet",
    ):
        assert f"error: {message}" in err or message in err


def test_chat_goes_on_after_an_error():
    typed = "word " * 200 + "\n/new\nOnce upon\n"
    code, out, err = run("chat", "-t", 0, "-n", 8, *EXACT, input=typed)
    assert code == 0
    assert err.count("error: ") == 1
    assert out.count("\n") >= 1
    assert "[8 tokens" in err


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(endless_folder):
    with start("chat", "-n", 20_000, model=endless_folder) as process:
        process.stdin.write("Once upon a time\n")
        process.stdin.flush()
        assert process.stdout.read(2)
        process.send_signal(2)
        read_until(process.stdout, " …\n")  # after what it had said
        process.stdin.write("/exit\n")
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    assert "Traceback" not in err


def test_ctrl_c_while_waiting_leaves_the_chat():
    with start("chat", "-t", 0, "-n", 4) as process:
        process.stdin.write("Once\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        read_until(process.stderr, "tokens")
        process.send_signal(2)
        process.communicate(timeout=LIMIT)
    assert process.returncode == 130


def test_doctor():
    code, out, _ = run("doctor", model=None)
    assert code == 0
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    for name in ("astrai_rs", "tier", "num_threads", "cuda", "python", "tokenizers", "typer", "embedded"):
        assert rows[name], name


def test_a_tier_of_the_cpu_can_be_forced(monkeypatch, case):
    monkeypatch.setenv("ASTRAI_CPU_TIER", "portable")
    code, out, _ = run("doctor", model=None)
    assert code == 0
    assert "portable" in next(line for line in out.splitlines() if line.startswith("tier"))
    monkeypatch.setenv("ASTRAI_CPU_TIER", "sse9")
    code, _, err = run("run", "-t", 0, "-n", 1, case["prompt"])
    assert code != 0
    assert "ASTRAI_CPU_TIER: tier must be one of portable" in err
    assert "'sse9'" in err or '"sse9"' in err


def test_packed_weights_are_kept_where_the_environment_says(monkeypatch, case, tmp_path):
    monkeypatch.setenv("ASTRAI_PACKED_CACHE", str(tmp_path))
    code, _, _ = run("run", "-t", 0, "-n", 1, case["prompt"])
    assert code == 0
    assert [file.suffix for file in tmp_path.iterdir()] == [".packed"]


def test_help_without_loading_the_core():
    program = START.replace("runpy.run", "sys.modules['astrai_rs._core'] = None; runpy.run")
    with python("-c", program, "--help") as process:
        out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, err) == (0, "")
    for name in ("run", "chat", "serve", "pull", "inspect", "doctor", "bench"):
        assert name in out


def test_without_the_extra():
    with python("-c", "import sys; sys.modules['typer'] = None; import astrai_rs.cli") as process:
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert err == "astrai-rs: the command line needs: pip install 'astrai_rs[cli]'\n"


def test_version():
    assert run("--version", model=None)[:2] == (0, f"{astrai_rs.__version__}\n")


def test_inspect():
    code, out, err = run("inspect", GLASS, "--json", "--tensors", model=None)
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert (facts["format"], facts["vocab_size"], facts["max_positions"]) == ("safetensors", 1024, 128)
    sizes = [tensor["bytes"] for tensor in facts["tensors"]]
    file = GLASS / "model.safetensors"
    assert sum(sizes) == file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    code, out, _ = run("inspect", embedded_model(), model=None)
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (code, rows["format"], rows["parameters"], rows["stop_ids"]) == (0, "GGUF", "134515008", "2")
    code, _, err = run("inspect", "/no/such", model=None)
    assert (code, err) == (1, "astrai-rs: error: /no/such: no such file or folder\n")


def test_pull_prints_where_the_model_is():
    assert run("pull", GLASS, model=None)[:2] == (0, f"{GLASS}\n")
