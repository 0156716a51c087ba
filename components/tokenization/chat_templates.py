"""Chat templates in Jinja: where a folder has them, what they are rendered with, and which text the model writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import pydantic_core
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from components.config.params import InputError

# Noncharacters of Unicode, reserved for use inside a program: they mark the template's generation block.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the model writes."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads this attribute of the class

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def read_template(folder: Path, config: Mapping[str, Any]) -> str:
    """The chat template, which newer folders keep in a file of its own."""
    own = folder / "chat_template.jinja"
    template = own.read_text(encoding="utf-8") if own.is_file() else config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {each["name"]: each["template"] for each in template}.get("default")
    if not isinstance(template, str):
        raise InputError(f"{folder / 'tokenizer_config.json'}: chat_template is missing; add the one of the model")
    return template


def compile_template(template: str) -> jinja2.Template:
    """A chat template with what Hugging Face's know: `generation`, `break`, `tojson`, `raise_exception`.

    `strftime_now` is left out: what a model is trained on must not depend on the day.

    Raises: InputError.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False, **how})
    environment.globals["raise_exception"] = _raise
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise InputError(f"tokenizer_config.json: chat_template: {error}") from error


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def plain_message(message: Mapping[str, Any], special: re.Pattern[str]) -> dict[str, Any]:
    """A message as a template wants it: text content, parsed arguments, no special token in anyone's text."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    calls = []
    for call in message.get("tool_calls") or []:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        calls.append({"type": "function", "function": {"name": name, "arguments": _read_arguments(arguments)}})
    said = {"role": message["role"], "content": content, "name": message.get("name"), "tool_calls": calls}
    return {key: defused(value, special) for key, value in said.items() if value or key == "content"}


def _read_arguments(arguments: Any) -> Any:
    """A call's arguments by name; of a call that was cut off, whose text is no JSON object, that text as one."""
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        value = pydantic_core.from_json(arguments.strip() or "{}")
    except ValueError:
        value = arguments
    return value if isinstance(value, Mapping) else {"arguments": arguments} if value is not None else {}


def defused(value: Any, special: re.Pattern[str]) -> Any:
    """The value with a space put into every spelled-out special token, so that no text can open a turn."""
    if isinstance(value, str):
        return special.sub(r"\g<0> ", value).replace(_OPEN, "").replace(_CLOSE, "")
    if isinstance(value, Mapping):
        return {defused(key, special): defused(item, special) for key, item in value.items()}
    if isinstance(value, list):
        return [defused(item, special) for item in value]
    return value


def marked_pieces(rendered: str) -> Iterator[tuple[str, bool]]:
    """`(text, the model writes it)` in order, without the marks."""
    for index, text in enumerate(re.split(f"[{_OPEN}{_CLOSE}]", rendered)):
        if text:
            yield text, index % 2 == 1
