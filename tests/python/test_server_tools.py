"""Tool calls in a model's text: parsing however the text is cut, formats of templates, grammars of calls."""

from __future__ import annotations

import json
import time

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astrai_rs import Engine, SamplingParams
from astrai_rs.model import embedded_model
from astrai_rs.server.parse import Content, OutputParser, Reasoning, ToolCallStart, starts_in_reasoning
from astrai_rs.server.tools import FORMATS, detect_format, detect_reasoning, tool_grammar
from make_chat_fixtures import TEMPLATES

THINK = ("<think>", "</think>")
OBJECT_FORMATS = [name for name in FORMATS if not FORMATS[name].name_end]


def read(text, name, *, pieces=None, **options):
    """`(content, reasoning, calls as (name, arguments))` of a text."""
    parser = OutputParser(tool_format=FORMATS.get(name), **options)
    deltas = [delta for piece in pieces or [text] for delta in parser.add(piece)] + parser.flush()
    content, reasoning, calls = "", "", []
    for delta in deltas:
        if isinstance(delta, ToolCallStart):
            assert delta.index == len(calls)
            calls.append((delta.name, ""))
        else:
            assert delta.text
            if isinstance(delta, Content):
                content += delta.text
            elif isinstance(delta, Reasoning):
                reasoning += delta.text
            else:
                assert delta.index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + delta.text)
    return content, reasoning, calls


def body(name, tool, arguments):
    return f'{{"name": {json.dumps(tool)}, "{FORMATS[name].arguments}": {arguments}}}'


def written(name, *calls):
    """Calls as a model writes them in a format."""
    if name == "mistral-args":
        return "".join(f"[TOOL_CALLS]{tool}[ARGS]{arguments}" for tool, arguments in calls)
    bodies = [body(name, *call) for call in calls]
    if name == "hermes":
        return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in bodies)
    if name == "mistral":
        return f"[TOOL_CALLS] [{', '.join(bodies)}]"
    return {"llama3": "; ", "json": "\n"}[name].join(bodies)


ARGUMENTS = {
    "plain": '{"city": "Paris", "days": 3}',
    "compact": '{"city":"Paris","days":3}',
    "on lines": '{\n  "city" : "Paris"\n}',
    "empty": "{}",
    "unicode": '{"city": "東京 🗼", "é": "\\u00e9\\ud83d\\ude00"}',
    "escapes": '{"path": "C:\\\\dir\\\\", "quote": "\\"}\\"", "line": "a\\nb"}',
    "braces in strings": '{"code": "if (a) { b[0] } // }}]</tool_call>", "k{": "["}',
    "nested": '{"a": {"b": [{"c": {}}, [[]]]}, "name": "x", "arguments": {"parameters": 1}}',
    "values": '{"a": null, "b": -1.5e3, "c": true, "d": []}',
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_call(name, arguments):
    assert read(written(name, ("get_weather", arguments)), name) == ("", "", [("get_weather", arguments)])


@pytest.mark.parametrize("name", FORMATS)
def test_several_calls_and_text_around(name):
    calls = [(f"tool_{i}", arguments) for i, arguments in enumerate(ARGUMENTS.values())]
    text = written(name, *calls)
    assert read(text, name) == ("", "", calls)
    assert read(f"  Let me\n see: \n\n{text}", name) == ("  Let me\n see:", "", calls)
    assert read(f"Wait.{text} \n Done.\n", name) == ("Wait.Done.\n", "", calls)


@pytest.mark.parametrize("name", OBJECT_FORMATS)
def test_arguments_before_the_name(name):
    text = written(name, ("f", '{"a": [1]}'))
    key = FORMATS[name].arguments
    swapped = text.replace(body(name, "f", '{"a": [1]}'), f'{{"{key}": {{"a": [1]}}, "id": 7, "name": "f"}}')
    assert swapped != text
    assert read(swapped, name) == ("", "", [("f", '{"a": [1]}')])


@pytest.mark.parametrize(
    ("object", "call"),
    [
        ('{"name": "f"}', ("f", "{}")),
        ('{"name": "f", "arguments": null}', ("f", "{}")),
        ('{"name": "f", "arguments": ""}', ("f", "{}")),
        ('{"name": "f", "arguments": "{\\"a\\": \\"\\\\n\\\\u00e9\\"}"}', ("f", '{"a": "\\n\\u00e9"}')),
        ('{"name": "f", "arguments": {"a": 1}, "arguments": {"a": 2}}', ("f", '{"a": 1}')),
        ('{"id": [1, {}], "name": "f\\u00fc\\"", "x": null, "arguments": {}}', ('fü"', "{}")),
        ('{"name": "f\\ud83d", "arguments": {}}', ("f\ufffd", "{}")),
        ('{"name":"f","arguments":{"a":1},}', ("f", '{"a":1}')),
        ('{"name":"f","arguments":{"a":1}', ("f", '{"a":1}')),
        ('\n\n {"name": "f" , "arguments" : {} } \n', ("f", "{}")),
    ],
)
def test_objects_that_are_calls(object, call):
    assert read(f"<tool_call>{object}</tool_call>", "hermes") == ("", "", [call])
    assert read(f"[TOOL_CALLS][{object}]", "mistral") == ("", "", [call])
    assert read(object, "json", tool_names=["x", call[0]])[2] == [call]


MALFORMED = [
    "{}",
    '{"a": 1}',
    '{"name": 5, "arguments": {}}',
    '{"name": null, "arguments": {}}',
    '{"name": ["f"], "arguments": {}}',
    '{"name" "f"}',
    '{name: "f"}',
    "{{}}",
    '{"name": , "arguments": {}}',
    '{"name": "f',
    '{"nam',
    "{",
    "so what",
    '["f"]x',
    "",
]


@pytest.mark.parametrize("object", MALFORMED)
def test_what_is_no_call_is_content(object):
    for name, text in [
        ("hermes", f"a <tool_call>\n{object}\n</tool_call> b\n"),
        ("hermes", f"<tool_call>{object}"),
        ("mistral", f"a [TOOL_CALLS] [{object}] b"),
        ("llama3", f" <|python_tag|> {object} "),
        ("llama3", f"{object}; {object}"),
        ("mistral-args", f" [TOOL_CALLS]{object} x"),
        ("mistral-args", f"[TOOL_CALLS][ARGS]{object}"),
        ("json", f"x {object} y"),
        ("json", f"\n{object}\n"),
        (None, written("hermes", ("f", "{}")) + object),
    ]:
        assert read(text, name) == (text, "", [])


def test_objects_without_marker_must_look_like_calls():
    for text in ('{"name": "Ann", "age": 3}', '{"name": "Ann", "arguments": [1]}', '{"name": "Ann"'):
        assert read(text, "json") == (text, "", [])
    text = written("json", ("other", "{}"))
    assert read(text, "json", tool_names=["f"]) == (text, "", [])
    assert read(f'{{"calls": [{text}]}}', "json") == (f'{{"calls": [{text}]}}', "", [])


def test_a_call_after_what_was_none():
    call = ("f", "{}")
    assert read("<tool_call><tool_call" + written("hermes", call), "hermes")[2] == [call]
    assert read("a {b} {" + written("json", call), "json") == ("a {b} {", "", [call])
    text = written("hermes", call) + " <tool_call>no</tool_call> " + written("hermes", call)
    assert read(text, "hermes") == ("<tool_call>no</tool_call>", "", [call, call])


def test_the_python_tag_is_a_marker():
    text = f"Hm.\n<|python_tag|>{written('llama3', ('f', '{}'), ('g', '{}'))}"
    assert read(text, "llama3") == ("Hm.", "", [("f", "{}"), ("g", "{}")])
    assert read('<|python_tag|>{"name": "f"}', "llama3") == ("", "", [("f", "{}")])


def test_a_bare_name_and_arguments():
    text = "Hm. [TOOL_CALLS] f[CALL_ID]x1[ARGS] {} \n[TOOL_CALLS]g[ARGS]" + '{"a": "}"}.'
    assert read(text, "mistral-args") == ("Hm..", "", [("f", "{}"), ("g", '{"a": "}"}')])
    assert read('[TOOL_CALLS]f[ARGS]{"a', "mistral-args") == ("", "", [("f", '{"a')])
    assert read("[TOOL_CALLS]f[ARG", "mistral-args") == ("[TOOL_CALLS]f[ARG", "", [])


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "f"', ""),
        ('{"name": "f", "arguments": {"a": "b\\', '{"a": "b\\'),
        ('{"name": "f", "arguments": {}', "{}"),
        ('{"name": "f", "arguments": "{\\"a\\": 1', '{"a": 1'),
        ('{"name": "f", "arguments": "a\\', "a"),
        ('{"name": "f", "arguments": "a\\u00e', "a"),
        ('{"name": "f", "arguments": 12', "12"),
        ('{"name": "f", "arguments": {}, "id": "x', "{}"),
    ],
)
def test_a_call_that_is_cut_off(text, arguments):
    assert read("<tool_call>\n" + text, "hermes") == ("", "", [("f", arguments)])


def test_text_comes_as_soon_as_it_is_certain():
    parser = OutputParser(tool_format=FORMATS["hermes"])
    pieces = [
        "Hi",
        " th",
        "ere <",
        "b> \n<tool",
        '_call>{"name": "f',
        '", ',
        '"arguments": {"a"',
        ": 1",
        "}}",
    ]
    given = ["".join(getattr(d, "text", None) or d.name for d in parser.add(piece)) for piece in pieces]
    assert given == ["Hi", " th", "ere", " <b>", "", "f", '{"a"', ": 1", "}"]


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>\nso\n</think>\n\nHi ", False, ("Hi ", "so")),
        ("\n <think>a\n\nb</think>c", False, ("c", "a\n\nb")),
        ("<think>\n\n</think>\n\nHi", False, ("Hi", "")),
        ("\nso\n</think>\n\nHi", True, ("Hi", "so")),
        ("no end </thin", True, ("", "no end </thin")),
        ("<think>no end\n", False, ("", "no end")),
        ("Hi <think>a</think>", False, ("Hi <think>a</think>", "")),
        (" <thin", False, (" <thin", "")),
        ("a</think>b <think>c</think>", True, ("b <think>c</think>", "a")),
        (" \n", False, (" \n", "")),
    ],
)
def test_reasoning(text, inside, expected):
    for name in (None, *FORMATS):
        for pieces in ([text], list(text)):
            got = read(text, name, pieces=pieces, reasoning=THINK, starts_in_reasoning=inside)
            assert got == (*expected, [])
    calls = [("f", "{}"), ("g", '{"a": 1}')]
    thought = f"<think>{written('hermes', *calls)}</think>\n{written('hermes', *calls)}"
    assert read(thought, "hermes", reasoning=THINK) == ("", written("hermes", *calls), calls)


NEAR = [
    *(
        "<tool_call>",
        "</tool_call>",
        "<tool_call",
        "[TOOL_CALLS]",
        "[TOOL_",
        "[ARGS]",
        "<|python_tag|>",
        "<|python_",
    ),
    *(
        "<think>",
        "</think>",
        "</th",
        "<",
        "[",
        "]",
        "{",
        "}",
        ";",
        ", ",
        '"',
        "\\",
        '{"name": "f"',
        '{"name": "',
    ),
    *(
        '"arguments": ',
        '"parameters": {"a": ',
        '"{\\"a\\": 1}"',
        "null",
        "\n",
        " ",
        "  \n",
        "x",
        "é🗼",
        "\\ud83d",
    ),
    *MALFORMED,
]
CALLS = st.builds(
    written,
    st.sampled_from(list(FORMATS)),
    st.tuples(st.sampled_from(["f", "gé"]), st.sampled_from(list(ARGUMENTS.values()))),
    st.tuples(st.just("h"), st.sampled_from(['"{}"', "{}", "null", "3"])),
)
PARTS = st.one_of(st.sampled_from(NEAR), CALLS, st.text("ab \n", max_size=4), st.text(max_size=5))
THOUGHTS = st.sampled_from(["", "", "<think>", "<think>a</think>", "\n</think> b "])
TEXTS = st.builds(lambda thought, parts: thought + "".join(parts), THOUGHTS, st.lists(PARTS, max_size=10))


@settings(max_examples=400)
@given(
    text=TEXTS,
    name=st.sampled_from([None, *FORMATS]),
    names=st.sampled_from([None, ["f", "h"]]),
    reasoning=st.sampled_from([None, THINK]),
    inside=st.booleans(),
    data=st.data(),
)
def test_the_cuts_make_no_difference(text, name, names, reasoning, inside, data):
    options = {"tool_names": names, "reasoning": reasoning, "starts_in_reasoning": inside and bool(reasoning)}
    whole = read(text, name, **options)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(text, name, pieces=pieces, **options) == whole
    assert read(text, name, pieces=list(text), **options) == whole
    if name is None and reasoning is None:
        assert whole == (text, "", [])
    elif not whole[2] and reasoning is None:
        assert whole[0] == text


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        (None, " "),
        ("hermes", " "),
        ("hermes", "<tool_call>"),
        ("mistral", "[TOOL_CALLS]["),
        ("mistral-args", "[TOOL_CALLS]x]"),
        ("json", "{"),
        ("json", '{"a'),
        ("json", '{"a": '),
        ("llama3", '{"name": "f"} '),
    ],
)
def test_the_cost_is_linear(name, unit):
    """Many pieces and one long one: a quadratic cost takes many seconds."""
    start = time.perf_counter()
    read("", name, pieces=[unit] * (20_000 // len(unit)), reasoning=THINK)
    read(unit * (100_000 // len(unit)), name, reasoning=THINK)
    assert time.perf_counter() - start < 5


QWEN = (
    "{%- if tools %}{{- '# Tools' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}"
    '{{- "For each call, return a json object within <tool_call></tool_call> XML tags" }}{%- endif %}'
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
LLAMA = (
    "{{- '<|start_header_id|>system<|end_header_id|>' }}{%- if tools is not none %}"
    '{{- \'Respond in the format {"name": function name, "parameters": dictionary}.\' }}{%- endif %}'
)
MISTRAL = "{%- if tools is not none %}[AVAILABLE_TOOLS]{{ tools }}{%- endif %}{{- '[TOOL_CALLS] [' }}"


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (QWEN, "hermes"),
        (LLAMA, "llama3"),
        ("{{ tools }}<|python_tag|>", "llama3"),
        (LLAMA.replace("parameters", "args"), "json"),
        (MISTRAL, "mistral"),
        (MISTRAL.replace("] [", "]' + f.name + '[ARGS]"), "mistral-args"),
        (TEMPLATES["tools"], "hermes"),
        (TEMPLATES["named"]["tool_use"], "json"),
        *(
            (TEMPLATES[kind], None)
            for kind in ("chatml", "alternation", "reasoning", "content parts", "trims")
        ),
        ("", None),
    ],
)
def test_the_format_of_a_template(template, name):
    assert detect_format(template) == (FORMATS[name] if name else None)


def test_reasoning_of_a_template():
    assert detect_reasoning(QWEN) == THINK
    assert detect_reasoning(TEMPLATES["reasoning"]) == THINK
    assert detect_reasoning(LLAMA) is None
    assert starts_in_reasoning("<|im_start|>assistant\n<think>\n", THINK)
    assert not starts_in_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n", THINK)
    assert not starts_in_reasoning("Hi", THINK)


def tool(name, **parameters):
    return {"type": "function", "function": {"name": name, "description": "d", **parameters}}


COLOUR = {
    "properties": {"colour": {"enum": ["red", "green {"]}, "on": {"$ref": "#/$defs/on"}},
    "required": ["colour", "on"],
    "additionalProperties": False,
    "$defs": {"on": {"type": "boolean"}},
}
NEST = {
    "type": "object",
    "properties": {"at": {"type": "array", "items": {"type": "integer", "maximum": 9}, "maxItems": 2}},
    "required": ["at"],
    "additionalProperties": False,
}
TOOLS = [
    tool("paint", parameters=COLOUR),
    tool("move-to", parameters=NEST),
    tool("now"),
    tool("stop", parameters={}, strict=True),
]
ODD = 'q"\\\n\u2028é\x7f</tool_call>'


@pytest.fixture(scope="module")
def model():
    with Engine(embedded_model()) as engine:
        yield engine


def generated(model, grammar, n=2):
    """`(text, whether it is complete)` of what the model wrote under a grammar."""
    params = SamplingParams(
        structured_outputs={"grammar": grammar}, max_tokens=70, temperature=1.5, n=n, seed=1
    )
    outputs = model.generate("Call all the tools, please.", params).outputs
    return [(output.text, output.finish_reason == "stop") for output in outputs]


def check(name, calls, tools):
    """Every call is one of the tools', with arguments by its schema."""
    schemas = {one["function"]["name"]: one["function"].get("parameters") for one in tools}
    for called, arguments in calls:
        schema = {"type": "object", **(schemas[called] or {"maxProperties": 0})}
        jsonschema.validate(json.loads(arguments), schema)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_what_a_grammar_makes_a_model_write(model, name, parallel):
    outputs = generated(model, tool_grammar(FORMATS[name], TOOLS, parallel=parallel, token_ids={}))
    assert parallel or all(complete for _, complete in outputs)
    for text, complete in outputs:
        content, _, calls = read(text, name)
        if complete:
            assert not content
            assert text == written(name, *calls)
        assert calls
        assert parallel or len(calls) == 1
        check(name, calls if complete else calls[:-1], TOOLS)


def test_an_odd_name(model):
    grammar = tool_grammar(FORMATS["hermes"], [tool(ODD)], parallel=False, token_ids={})
    [(text, complete)] = generated(model, grammar, n=1)
    assert complete
    assert read(text, "hermes") == ("", "", [(ODD, "{}")])


def test_markers_that_are_control_tokens():
    grammar = tool_grammar(
        FORMATS["hermes"], TOOLS, parallel=True, token_ids={"<tool_call>": 7, "</tool_call>": 8}
    )
    assert "<[7]>" in grammar
    assert "<[8]>" in grammar
    assert "tool_call>" not in grammar
    assert "<[9]>" in tool_grammar(FORMATS["mistral"], TOOLS, parallel=False, token_ids={"[TOOL_CALLS]": 9})
