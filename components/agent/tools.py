"""Tools: typed Python functions that the agent calls, each in a sandbox of its permissions.

`Tool.of(function)` derives name, description and JSON schema from the function. The sandbox is built on Python's audit
events: it stops a tool that does more than it declares, whatever the model was talked into. It does not contain hostile
code: native code raises no events, and threads that a tool starts are not watched.
"""

from __future__ import annotations

import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import jsonschema
from pydantic import PydanticUserError, TypeAdapter, ValidationError, validate_call
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import to_json
from referencing import Registry

from components.config.errors import InputError

Permission = Literal["files", "network"]
PROCESSES = ("subprocess.", "os.system", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "pty.", "ctypes.dlopen")
"""Events of processes and native code, which escape the audit hook."""
FILES = ("open", "os.", "shutil.", "sqlite3.connect", "glob.", "tempfile.", "mmap.")
NETWORK = ("socket.",)
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_ARGUMENT_BYTES = 65_536
"""Bytes of a call's arguments as JSON at most."""
MAX_RESULT = 400
"""Characters of a result at most; longer ones are truncated."""


@dataclass(frozen=True)
class Tool:
    """One function that the model may call with JSON arguments."""

    name: str
    description: str
    parameters: dict[str, Any]
    """JSON schema of the arguments, an object."""
    function: Callable[..., Any]
    """Called with keyword arguments; the model gets what it returns, as JSON unless it is text."""
    permissions: frozenset[Permission] = frozenset()
    """What it may use; anything else raises PermissionError in it."""
    writes: bool = False
    """Whether it changes something; the endpoint asks before it runs such a tool."""
    server: str = ""
    """Name of the MCP server that runs it; empty: this process."""

    @classmethod
    def of(
        cls, function: Callable[..., Any], permissions: Iterable[Permission] = (), name: str = "", writes: bool = False
    ) -> Tool:
        """A tool from a typed function: its name, the first paragraph of its docstring, its parameters' type hints.

        Hints may be any type that pydantic supports, such as dataclasses and models; arguments are converted to it.

        Raises: InputError for a function that cannot be a tool.
        """
        tool_name = name or getattr(function, "__name__", type(function).__name__)
        if not _NAME.fullmatch(tool_name):
            raise InputError(f"tool {tool_name}: a name has up to 64 letters, digits, '_' and '-'; define it with def")
        if inspect.iscoroutinefunction(function):
            raise InputError(f"tool {tool_name}: an async function cannot be a tool; define it with def alone")
        for parameter in inspect.signature(function).parameters.values():
            unnamed = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if unnamed or parameter.annotation is parameter.empty:
                raise InputError(
                    f"tool {tool_name}: parameter {parameter}: a tool's parameters have a name and a type hint"
                )
        description = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
        if not description:
            raise InputError(f"tool {tool_name}: it has no docstring; its first paragraph tells the model what it does")
        try:
            schema = TypeAdapter(cast(Any, function)).json_schema(schema_generator=_Untitled)
        except (PydanticUserError, NameError) as error:
            reason = " ".join(str(error).split("\n")[0].split())
            raise InputError(f"tool {tool_name}: its type hints have no JSON schema: {reason}") from None
        return cls(tool_name, description, schema, validate_call(function), frozenset(permissions), writes)

    def declaration(self) -> dict[str, Any]:
        """The entry of an OpenAI `tools` list."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


class _Untitled(GenerateJsonSchema):
    """Without titles, which repeat the names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def call(tools: Iterable[Tool], name: str, arguments: object) -> str:
    """The tool's result in one line, or `error: ...` for the model; never raises."""
    by_name = {tool.name: tool for tool in tools}
    if name not in by_name:
        return _error(f"no tool {name!r}; known: {', '.join(by_name) or 'none'}")
    tool = by_name[name]
    try:
        if len(to_json(arguments, serialize_unknown=True)) > MAX_ARGUMENT_BYTES:
            return _error(f"{name}: arguments of more than {MAX_ARGUMENT_BYTES} bytes")
        if problem := _schema_violation(tool.parameters, arguments):
            return _error(f"{name}: {problem}")
        assert isinstance(arguments, dict)
        with restricted_to(tool.permissions):
            result = tool.function(**arguments)
        return one_line(result if isinstance(result, str) else to_json(result).decode(), MAX_RESULT)
    except ValidationError as error:
        return _error(f"{name}: {error.errors()[0]['msg']}")
    except Exception as error:  # noqa: BLE001 - whatever a tool does, the conversation goes on
        return _error(str(error) or type(error).__name__)


def one_line(text: str, limit: int = 80) -> str:
    """The text without line breaks, cut to `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _error(text: str) -> str:
    return one_line(f"error: {text}", MAX_RESULT)


def _unchecked(_validator: Any, _value: Any, _instance: Any, _schema: Any) -> Iterator[Any]:
    yield from ()


def _extra_properties(validator: Any, extra: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if "patternProperties" not in schema:
        yield from jsonschema.Draft202012Validator.VALIDATORS["additionalProperties"](
            validator, extra, instance, schema
        )


# Python's regular expressions may take for ever. The grammar enforces patterns while the model writes, in bounded time;
# pydantic those of our functions, a server its own.
_Validator: Any = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    {"additionalProperties": _extra_properties, "pattern": _unchecked, "patternProperties": _unchecked},
)


def _schema_violation(schema: dict[str, Any], arguments: object) -> str:
    """Why the arguments violate the schema; empty when they do not."""
    if not isinstance(arguments, dict):
        return f"arguments must be an object, not {type(arguments).__name__}"
    # An empty registry: by default the library fetches the URLs that a schema refers to.
    validator = _Validator(schema, registry=Registry())
    error = jsonschema.exceptions.best_match(validator.iter_errors(arguments))
    if error is None:
        return ""
    path = error.json_path.removeprefix("$").removeprefix(".")
    return f"argument {path!r}: {error.message}" if path else str(error.message)


class _Running(threading.local):
    permissions: frozenset[Permission] | None = None
    """Permissions of the tool that runs in this thread; None while none runs."""


_running = _Running()


@contextmanager
def restricted_to(permissions: frozenset[Permission]) -> Iterator[None]:
    """Raise PermissionError in the block, in this thread, where it uses anything else."""
    _install_audit_hook()
    before, _running.permissions = _running.permissions, permissions
    try:
        yield
    finally:
        _running.permissions = before


@cache
def _install_audit_hook() -> None:
    """Once per process: an audit hook cannot be removed."""
    sys.addaudithook(_audit)


def _audit(event: str, _arguments: tuple[Any, ...]) -> None:
    allowed = _running.permissions
    if allowed is None:
        return
    for permission in sorted(_required(event) - allowed):
        raise PermissionError(f"the tool has no permission for {permission} ({event})")


@cache
def _required(event: str) -> frozenset[Permission]:
    if event.startswith(PROCESSES):
        return frozenset({"files", "network"})
    if event.startswith(FILES):
        return frozenset({"files"})
    return frozenset({"network"} if event.startswith(NETWORK) else ())
