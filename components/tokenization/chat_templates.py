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
from jinja2 import nodes, pass_context
from jinja2.ext import Extension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from components.config.params import InputError
from components.config.paths import TEMPLATE
from components.media.messages import IMAGE

# Noncharacters of Unicode, reserved for use inside a program: they mark the template's generation block, and pictures.
_OPEN, _CLOSE, PICTURE = "\ufdd0", "\ufdd1", "\ufdd2"
_RESERVED = str.maketrans("", "", _OPEN + _CLOSE + PICTURE)
MAX_WORK = 500_000
"""Steps of a rendering: passes of a loop, calls, operators, pieces of output."""
CHARACTERS_PER_STEP = 1_000
"""Characters, or items of a list, that count as one step."""
_BUDGET = "budget of the rendering"  # no name that a template could spell
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


class _Budget:
    """The work that one rendering may still do."""

    def __init__(self) -> None:
        self._left = MAX_WORK

    def spend(self, size: int) -> None:
        """Count one step and `size` characters or items.

        Raises: TemplateRuntimeError when nothing is left.
        """
        self._left -= 1 + size // CHARACTERS_PER_STEP
        if self._left < 0:
            raise jinja2.TemplateRuntimeError(f"needs more than {MAX_WORK:,} steps; a template has to end")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else value.bit_length() if isinstance(value, int) else 1


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which loops, calls, operators and output spend the budget of the rendering."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function, a macro or a recursive loop."""
        _budget(context).spend(0)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator whose result can be larger than its operands."""
        is_count = operator != "+" and isinstance(right, int)
        _budget(context).spend(_size(left) * max(1, right) if is_count else _size(left) + _size(right))
        return super().call_binop(context, operator, left, right)


def _budget(context: Context) -> _Budget:
    budget: _Budget = context.parent[_BUDGET]
    return budget


@pass_context
def _counted(context: Context, items: Any) -> Iterator[Any]:
    for item in items:
        _budget(context).spend(0)
        yield item


@pass_context
def _measured(context: Context, value: Any) -> Any:
    _budget(context).spend(_size(value))
    return value


def compile_template(template: str) -> Callable[..., str]:
    """A chat template with what Hugging Face's know: `generation`, `break`, `tojson`, `raise_exception`.

    `strftime_now` is left out: what a model is trained on must not depend on the day.

    Returns: the function that renders it with variables; it raises InputError when the template fails, refuses the
    chat, or does not end within MAX_WORK.

    Raises: InputError when it cannot be compiled.
    """
    environment = _BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
        optimized=False,  # or constant expressions are computed without a limit
    )
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False, **how})
    environment.filters |= {"counted": _counted, "measured": _measured}
    environment.globals["raise_exception"] = _raise
    with _naming_template():
        tree: Any = environment.parse(template)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, "counted")
        for node in tree.find_all((nodes.Output, nodes.Concat)):
            node.nodes = [
                each if isinstance(each, nodes.TemplateData) else _filtered(each, "measured") for each in node.nodes
            ]
        compiled = jinja2.Template.from_code(environment, environment.compile(tree), environment.globals)

    def render(**variables: Any) -> str:
        with _naming_template():
            return compiled.render({**variables, _BUDGET: _Budget()})

    return render


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


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
