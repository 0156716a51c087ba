"""Chat templates render as `transformers` renders them, and end whatever is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from components.config.params import InputError
from components.tokenization import chat_templates
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
CHATS = [
    [{"role": "user", "content": "a {{ b }} {% c %}"}, {"role": "assistant", "content": "d\n\n"}],
    [{"role": "user", "content": "e"}],
]


@pytest.mark.parametrize("template", [*TEMPLATES, *(template for template, *_ in CALLING.values())])
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
    ],
)
def test_a_template_that_does_not_end_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "MAX_WORK", 2_000)
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
        ("{% if %}", "Expected an expression"),
        ("{% for x in y %}" * 22 + "{% endfor %}" * 22, "too many statically nested blocks"),
    ],
)
def test_a_template_that_fails_is_an_input_error_of_one_line(template: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^tokenizer_config.json: chat_template: .*{message}[^\n]*$"):
        compile_template(template)(messages=[])
