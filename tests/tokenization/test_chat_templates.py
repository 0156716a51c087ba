"""Chat templates render as `transformers` renders them, and end whatever is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from components.config.params import InputError
from components.tokenization import template_sandbox
from components.tokenization.chat_templates import compile_template
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from tests.tokenization.hf_tokenizers import CALLING, CHATML, INSTRUCT, LLAMA, chatml

LOOPS = "{% for m in messages %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{{ loop.previtem }}{{ m.content }}"
TEMPLATES = [
    CHATML,
    LLAMA,
    INSTRUCT,
    f"{LOOPS}{{% if loop.first %}}{{% continue %}}{{% endif %}}.{{% else %}}none{{% endfor %}}",
]
DOUBLED = """
{%- set s = namespace(x=(1,), y=(1,)) %}
{%- for i in range(60) %}{% set s.x = (s.x, s.x) %}{% set s.y = (s.y, s.y) %}{% endfor %}"""
"""Two values of a few hundred bytes that are 2 ** 60 numbers as text, and as long to compare or hash."""
CHATS = [
    [{"role": "user", "content": "a {{ b }} {% c %}"}, {"role": "assistant", "content": "d\n\n"}],
    [{"role": "user", "content": "e"}],
]


EXPRESSIONS = [
    "{{ '%s: %05.1f%%' % ('a', 2) }}{{ '%d-%s' | format(1, 'b') }}{{ '{:>4}|{a}'.format(1, a=2) }}",
    "{{ messages | tojson(indent=2) }}{{ 'é' | tojson }}{{ [1, {'b': none}] | tojson(separators=(',', ':')) }}",
    "{{ messages[0].content.split(' ', 1) | join('+') }}{{ 'a,b'.replace(',', ', ') }}{{ '-'.join(['a', 'b']) }}",
    "{{ 'a\nb' | indent(2) }}{{ messages | map(attribute='role') | unique | sort | join(', ') }}{{ ' a' | trim }}",
    "{{ [3, 1] | sort }}{{ [3, 1] | max }}{{ {'b': 1, 'a': 2} | dictsort }}{{ {'a': 1}.items() | list }}",
    "{{ messages[::-1] | length }}{{ messages[-1] == messages[0] }}{{ 'a' in 'ab' }}{{ 'role' in messages[0] }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 7 // 2 * 2 - 1 }}{{ 2 ** 10 }}",
    "{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is iterable else x }}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{% set n = namespace(a='x') %}{% set n.a = n.a + 'y' %}{{ n.a }}{{ dict(a=1) }}{{ missing }}{{ missing | d(1) }}",
    "{% macro f(x) %}{{ x }}{{ caller() }}{% endmacro %}{% call f(1) %}2{% endcall %}{{ 'a<b' | e }}{{ 'ab'.title() }}",
    "{% set j = joiner(', ') %}{{ j() }}{{ j() }}{% set c = cycler(1, 2) %}{{ c.next() }}{{ c.next() }}{{ 3 is odd }}",
]


@pytest.mark.parametrize("template", [*TEMPLATES, *EXPRESSIONS, *(template for template, *_ in CALLING.values())])
@pytest.mark.parametrize("chat", CHATS)
def test_a_template_renders_as_transformers_renders_it(template: str, chat: list[dict[str, Any]]) -> None:
    variables = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    expected = render_jinja_template([chat], chat_template=template, **variables)[0][0]
    assert compile_template(template)(messages=chat, tools=None, **variables) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99) %}{% for b in range(99) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{% set x = f(n - 1) %}{% endif %}{% endmacro %}{{ f(13) }}",
        "{% set s = namespace(x='ab') %}{% for i in range(22) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
        "{% set s = namespace(x=['ab']) %}{% for i in range(22) %}{% set s.x = s.x + s.x %}{% endfor %}",
        "{% set s %}{% for i in range(999) %}{{ messages[0] }}{% endfor %}{% endset %}",
        "{{ 'a' * 10 ** 8 }}",
        "{{ 9 ** (10 ** 6) }}",
        "{{ 10 ** 8 * 'a' }}",
        "{{ [1] * 10 ** 8 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%.*f' % (999999999, 1.0) }}",
        "{{ '%(x)999999999s' | format(x=1) }}",
        "{{ '%s' * 99 % (messages * 99) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ ('{0}' * 99).format(messages[0]) }}",
        "{{ 'a' | indent(999999999) }}",
        "{{ messages[0].replace('', messages[0]) }}",
        "{{ messages[0] | replace('', messages[0]) }}",
        "{{ messages[0].join(range(999) | map('string')) }}",
        "{{ range(999) | join(messages[0]) }}",
        "{% set s = namespace(x=[]) %}{% for i in range(999) %}{% set s.x = s.x + [messages[0][1:]] %}{% endfor %}",
        "{% macro f() %}" + "x" * 999 + "{% endmacro %}{% for i in range(999) %}{% set x = f() %}{% endfor %}",
        "{{ messages[0].strip('y' * 9999) }}",
        "{{ messages[0].replace('x', ' ').split() | length + messages[0] | list | length }}",
        f"{DOUBLED}{{{{ s.x }}}}",
        f"{DOUBLED}{{{{ s.x ~ '' }}}}",
        f"{DOUBLED}{{{{ s.x | tojson }}}}",
        f"{DOUBLED}{{{{ s.x | string | length }}}}",
        f"{DOUBLED}{{{{ '%s' % (s.x,) }}}}",
        f"{DOUBLED}{{{{ s.x == s.y }}}}",
        f"{DOUBLED}{{{{ [s.x] | select('eq', s.y) | list }}}}",
        f"{DOUBLED}{{{{ {{}}[s.x] }}}}",
        f"{DOUBLED}{{{{ {{s.x: 1}} }}}}",
        f"{DOUBLED}{{{{ s.x is lower }}}}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_WORK", 2_000)
    with pytest.raises(InputError, match="chat_template: needs more than 2,000 steps; a template has to end"):
        compile_template(template)(messages=["x" * 10_000])


def test_a_tokenizer_whose_template_does_not_end_is_refused(tmp_path: Path) -> None:
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match=r"tokenizer_config\.json: chat_template: needs more than 500,000 steps"):
        load_chat_tokenizer(chatml(tmp_path, template))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
        ("{{ messages[9].content.x }}", "has no element 9"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for a in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ ().__class__.x }}", "is unsafe"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{{ 'a'.center(10 ** 9) }}", "center: chat templates cannot call it"),
        ("{{ 'a'.format_map({}) }}", "format_map: chat templates cannot call it"),
        ("{{ (1).to_bytes(10 ** 9, 'big') }}", "to_bytes: chat templates cannot call it"),
        ("{{ dict.fromkeys(range(9)) }}", "fromkeys: chat templates cannot call it"),
        ("{{ '{:{}}'.format(1, 10 ** 9) }}", "format: chat templates cannot have fields within fields"),
        ("{{ 'a' | center(10 ** 9) }}", "No filter named 'center'"),
        ("{{ [1] | batch(10 ** 9, 1) | list }}", "No filter named 'batch'"),
        ("{{ lipsum(10 ** 9) }}", "'lipsum' is undefined"),
        ("{{ [1] | tojson(indent=10 ** 9) }}", "indent and separators have 16 characters at most"),
        ("{{ {} | tojson(separators=('a' * 17, '')) }}", "indent and separators have 16 characters at most"),
        ("{% if %}", "Expected an expression"),
        ("{% for x in y %}" * 22 + "{% endfor %}" * 22, "too many statically nested blocks"),
    ],
)
def test_a_template_that_fails_is_an_input_error_of_one_line(template: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^tokenizer_config.json: chat_template: .*{message}[^\n]*$"):
        compile_template(template)(messages=[])
