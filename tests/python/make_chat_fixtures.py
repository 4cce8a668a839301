"""Writes tests/fixtures/chat_templates.json: what transformers renders for many templates and conversations.

Not a test: run it by hand where transformers is installed (`pip install transformers`, no torch needed).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

TEMPLATES: dict[str, Any] = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
        " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "blocks on their own lines": """
{{ bos_token }}
{% for m in messages %}
    {% if m.role == 'system' %}
        {% continue %}
    {% endif %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    [{{ m.role }}] {{ m.content | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
[assistant]
{%- endif %}
""",
    "alternation": (
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
        "{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]{% else %} {{ m.content }}{{ eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "tools": """
{%- if tools %}
    {{- "# Tools\n" }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- "\n" }}
    {%- endfor %}
    {{- tools | tojson(indent=2) }}
{%- endif %}
{%- for m in messages %}
    {%- if m.tool_calls %}
        {%- for call in m.tool_calls %}
            {%- set f = call.function if call.function is defined else call %}
            {{- '<tool_call>{"name": "' + f.name + '", "arguments": ' }}
            {{- f.arguments if f.arguments is string else f.arguments | tojson(sort_keys=True) }}
            {{- '}</tool_call>\n' }}
        {%- endfor %}
    {%- else %}
        {{- m.role ~ ': ' ~ (m.content if m.content is defined else '(none)') ~ '\n' }}
    {%- endif %}
{%- endfor %}
""",
    "reasoning": (
        "{% set ns = namespace(last=-1, found=false) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% set ns.found = true %}{% endif %}{% endfor %}"
        "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}"
        "</think>{% endif %}{% if m.thinking is defined %}[{{ m.thinking }}]{% endif %}{{ m.content }}{% endfor %}"
        "|{{ ns.last }}|{{ ns.found }}{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}"
    ),
    "content parts": (
        "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<{{ part.type }}>{% endif %}"
        "{% endfor %}{% endif %};{% endfor %}"
    ),
    "generation tag": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "documents": "{% for d in documents or [] %}{{ d.title }}={{ d.text }};{% endfor %}{{ messages[-1].content }}",
    "variables": (
        "{{ bos_token }}{{ custom | default('none') }}{{ dict(a=1) }}{{ dict.fromkeys(['x'], 2) }}"
        "{{ strftime_now('%Y') | length }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}"
    ),
    "html is not escaped": "{{ messages | tojson }}{{ messages[0].content | e }}{{ '%s-%d' % ('a', 3) }}",
    "strings": (
        "{% for m in messages %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{{ m.content[:3] | upper }}"
        "{{ m['content'].startswith('H') }}{{ m.items() | list | length }}{{ loop.last }}{% endfor %}"
    ),
    "trims": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}",
    "drops the end": "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}",
    "underscore": "{% set ns = namespace(a=1) %}{% set ns._x = 2 %}{{ ns._x }}",
    "underscore argument": "{% set ns = namespace(_x=1) %}",
    "climbs out": "{{ messages.__class__.__mro__ }}",
    "climbs out by dict": "{{ dict.__call__.__globals__ }}",
    "changes its input": "{% set _ = messages.append({'role': 'x'}) %}{{ messages | length }}",
    "undefined": "{{ missing }}{{ messages[0].missing }}",
    "undefined attribute": "{{ missing.attribute }}",
    "syntax error": "{% if %}",
    "named": {"default": "default:{{ messages[0].content }}", "tool_use": "tools:{{ tools | length }}"},
    "named without default": {"rag": "x"},
    "macro": (
        "{% macro header(role) %}<|{{ role }}|>{% endmacro %}{% for m in messages %}{{ header(m.role) }}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ header('assistant') }}{% endif %}"
    ),
    "whitespace": "  {%- for m in messages -%}  {{ m.content }}  {%+ if true %} x {% endif %}\n\n{%- endfor %}  \n",
}

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now> & 'later' in a 漢字 town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}

CONVERSATIONS: dict[str, list[Any]] = {
    "one": [{"role": "user", "content": 'Hello <b>&amp; "you"</b>'}],
    "system": [{"role": "system", "content": " Be terse. "}, {"role": "user", "content": "Hi\n"}],
    "turns": [
        {"role": "user", "content": "What is 1+1?"},
        {"role": "assistant", "content": "  2 "},
        {"role": "user", "content": "  And é漢🙂? "},
    ],
    "ends with assistant": [
        {"role": "user", "content": "Tell me"},
        {"role": "assistant", "content": "Once upon a time "},
    ],
    "calls": [
        {"role": "user", "content": "Weather?", "name": None},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": {"town": "Zü", "a": 1}},
                },
                {"function": {"name": "weather", "arguments": '{"town": "B"}'}},
            ],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ],
    "reasoning_content": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y", "reasoning_content": "because"},
    ],
    "reasoning": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "reasoning": "so"}],
    "thinking": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "thinking": "hm"}],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "look "}, {"type": "image", "image": "data"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat"}]},
    ],
    "four": [{"role": "user" if i % 2 == 0 else "assistant", "content": f"message {i}"} for i in range(6)],
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "generation": {"add_generation_prompt": True},
    "tools": {"tools": [TOOL], "add_generation_prompt": True},
    "kwargs": {"enable_thinking": False, "custom": "own", "bos_token": "<other>"},
    "documents": {"documents": [{"title": "T", "text": "body"}, {"title": "U", "text": "more"}]},
    "continue": {"continue_final_message": True},
    "continue thinking": {"continue_final_message": "thinking"},
    "both": {"continue_final_message": True, "add_generation_prompt": True},
}


def main() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL)
    cases = []
    for template, source in TEMPLATES.items():
        tokenizer.chat_template = source
        for conversation, messages in CONVERSATIONS.items():
            for option, kwargs in OPTIONS.items():
                case = {"template": template, "conversation": conversation, "option": option}
                try:
                    case["text"] = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
                except Exception as error:
                    case["error"] = type(error).__name__
                cases.append(case)
    path = Path(__file__).parent.parent / "fixtures" / "chat_templates.json"
    path.write_text(
        "[\n" + ",\n".join(json.dumps(c, ensure_ascii=False) for c in cases) + "\n]\n", encoding="utf-8"
    )
    print(f"{len(cases)} cases, {sum('error' in case for case in cases)} of them errors")


if __name__ == "__main__":
    main()
