"""Chat templates in Jinja: where a folder has them, what they are rendered with, and which text the model writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import pydantic_core
from jinja2 import nodes
from jinja2.ext import Extension

from components.config.params import InputError
from components.config.paths import TEMPLATE
from components.media.messages import IMAGE
from components.tokenization.template_sandbox import SandboxedEnvironment

# Noncharacters of Unicode, reserved for use inside a program: they mark the template's generation block, and pictures.
_OPEN, _CLOSE, PICTURE = "\ufdd0", "\ufdd1", "\ufdd2"
_RESERVED = str.maketrans("", "", _OPEN + _CLOSE + PICTURE)
_FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
PRELUDE_FILE = Path(__file__).with_name("tool_prelude.jinja")
_CALLING = "\n\nAnswer in words where no tool is needed. To call a tool, write its call and nothing else:\n"
TOOL_SYNTAXES: Sequence[tuple[Sequence[str], Mapping[str, Any]]] = (
    (
        ("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"),  # as Phi's
        {
            "opening": "<|tool|>[",
            "between": ", ",
            "closing": "]<|/tool|>",
            "call": ("<|tool_call|>[", ", ", "]<|/tool_call|>"),
            "key": "arguments",
            "role": "tool_response",
            "result": ("", ""),
        },
    ),
    (
        ("<start_of_turn>",),  # as Gemma's
        {
            "opening": "You can call these tools:\n",
            "between": "\n",
            "closing": f'{_CALLING}```tool_code\n{{"name": NAME, "parameters": {{KEY: VALUE}}}}\n```',
            "call": ("```tool_code\n", "\n```\n```tool_code\n", "\n```"),
            "key": "parameters",
            "role": "user",
            "result": ("```tool_output\n", "\n```"),
        },
    ),
    (
        (),  # as Hermes' and Qwen's
        {
            "opening": "You can call these tools:\n<tools>\n",
            "between": "\n",
            "closing": f'\n</tools>{_CALLING}<tool_call>\n{{"name": NAME, "arguments": {{KEY: VALUE}}}}\n</tool_call>',
            "call": ("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
            "key": "arguments",
            "role": "user",
            "result": ("<tool_response>\n", "\n</tool_response>"),
        },
    ),
)
"""Tokens that a vocabulary must have, and how tools are declared, called and answered in messages of text."""


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
    own = folder / TEMPLATE
    template = own.read_text(encoding="utf-8") if own.is_file() else config.get("chat_template")
    if isinstance(template, list):
        template = _merged({each["name"]: each["template"] for each in template})
    if not isinstance(template, str):
        raise InputError(f"{folder / 'tokenizer_config.json'}: chat_template is missing; add the one of the model")
    return template


def _merged(named: Mapping[str, str]) -> str | None:
    """Named templates as one: `tool_use` for chats with tools or calls, `default` for others."""
    default, tool_use = named.get("default"), named.get("tool_use")
    if default is None or tool_use is None:
        return default
    calls = "messages | selectattr('tool_calls', 'defined') | list"
    return f"{{%- if tools or {calls} %}}{tool_use}{{%- else %}}{default}{{%- endif %}}"


def tool_templates(template: str, tokens: Collection[str]) -> Iterator[str]:
    """A template that knows no tools, extended by each syntax for them that suits a vocabulary, the best first."""
    prelude = PRELUDE_FILE.read_text(encoding="utf-8").rstrip()
    for needed, syntax in TOOL_SYNTAXES:
        if all(token in tokens for token in needed):
            for system in (True, False):
                marks = json.dumps({**syntax, "system": system}, ensure_ascii=False)
                yield f"{{%- set syntax = {marks} %}}\n{prelude}{template}"


def compile_template(template: str) -> Callable[..., str]:
    """A chat template with what Hugging Face's know: `generation`, `break`, `tojson`, `raise_exception`.

    `strftime_now` is left out: what a model is trained on must not depend on the day.

    Returns: the function that renders it with variables; it raises InputError when the template fails, refuses the
    chat, or does not end within MAX_WORK (`components/tokenization/template_sandbox.py`).

    Raises: InputError when it cannot be compiled.
    """
    environment = SandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
        optimized=False,  # or constant expressions are computed without a limit
    )
    environment.globals["raise_exception"] = _raise
    with _naming_template():
        compiled = environment.compile_metered(template)

    def render(**variables: Any) -> str:
        with _naming_template():
            return str(compiled.render(environment.variables(variables)))

    return render


@contextmanager
def _naming_template() -> Iterator[None]:
    """Errors of a template as InputError."""
    try:
        yield
    except InputError:
        raise
    except (jinja2.TemplateError, *_FAILURES) as error:
        raise InputError(f"tokenizer_config.json: chat_template: {' '.join(str(error).split())[:300]}") from error


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def plain_messages(messages: Sequence[Mapping[str, Any]], special: re.Pattern[str]) -> list[dict[str, Any]]:
    """Messages as a template wants them: text content, parsed arguments, no special token in anyone's text.

    Where a message with `images` has a mark of one (`components/media/messages.py`), the content has PICTURE.

    Calls are numbered by ids of nine letters and digits, which is what Mistral's templates demand.
    """
    ids = dict[str, str]()
    return [_plain_message(message, special, ids) for message in messages]


def _plain_message(message: Mapping[str, Any], special: re.Pattern[str], ids: dict[str, str]) -> dict[str, Any]:
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    calls = []
    for call in message.get("tool_calls") or []:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        number = f"call{len(ids):05d}"
        ids[call.get("id") or number] = number
        function = {"name": name, "arguments": _read_arguments(arguments)}
        calls.append({"type": "function", "function": function, "id": number})
    plain = {"role": message["role"], "content": content, "name": message.get("name"), "tool_calls": calls}
    if message["role"] == "tool":
        plain["tool_call_id"] = ids.get(message.get("tool_call_id") or "", f"call{max(0, len(ids) - 1):05d}")
    plain = {key: defused(value, special) for key, value in plain.items() if value or key == "content"}
    if message.get("images"):
        plain["content"] = PICTURE.join(defused(text, special) for text in str(content).split(IMAGE))
    return plain


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
        return special.sub(r"\g<0> ", value).translate(_RESERVED)
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
