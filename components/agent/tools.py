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
"""Events of what may then do anything."""
FILES = ("open", "os.", "shutil.", "sqlite3.connect", "glob.", "tempfile.", "mmap.")
NETWORK = ("socket.",)
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_RESULT = 400
"""Characters of a result shown to the model."""


@dataclass(frozen=True)
class Tool:
    """One function that the model may call with JSON arguments."""

    name: str
    description: str
    parameters: dict[str, Any]
    """JSON schema of the arguments, an object."""
    function: Callable[..., Any]
    """Called with the arguments by name; what it returns is shown to the model, as JSON unless it is text."""
    permissions: frozenset[Permission] = frozenset()
    """What it may use besides what it holds already: anything else raises PermissionError in it."""

    @classmethod
    def of(cls, function: Callable[..., Any], permissions: Iterable[Permission] = (), name: str = "") -> Tool:
        """The tool that a typed function is: its name, the first paragraph of its docstring, its parameters' hints.

        Hints may be anything that pydantic knows, dataclasses and models too; arguments are converted to them.

        Raises: InputError for a function that cannot be one.
        """
        named = name or getattr(function, "__name__", type(function).__name__)
        if not _NAME.fullmatch(named):
            raise InputError(f"tool {named}: a name has up to 64 letters, digits, '_' and '-'; define it with def")
        if inspect.iscoroutinefunction(function):
            raise InputError(f"tool {named}: an async function cannot be a tool; define it with def alone")
        for parameter in inspect.signature(function).parameters.values():
            unnamed = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if unnamed or parameter.annotation is parameter.empty:
                raise InputError(
                    f"tool {named}: parameter {parameter}: a tool's parameters have a name and a type hint"
                )
        description = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
        if not description:
            raise InputError(f"tool {named}: it has no docstring; its first paragraph tells the model what it does")
        try:
            schema = TypeAdapter(cast(Any, function)).json_schema(schema_generator=_Untitled)
        except (PydanticUserError, NameError) as error:
            reason = " ".join(str(error).split("\n")[0].split())
            raise InputError(f"tool {named}: its type hints have no JSON schema: {reason}") from None
        return cls(named, description, schema, validate_call(function), frozenset(permissions))

    def declaration(self) -> dict[str, Any]:
        """The entry of an OpenAI `tools` list."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


class _Untitled(GenerateJsonSchema):
    """Without the titles that repeat the names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def call(tools: Iterable[Tool], name: str, arguments: object) -> str:
    """The tool's result in one line, or `error: ...` that the model can relay; never raises."""
    known = {tool.name: tool for tool in tools}
    if name not in known:
        return _error(f"no tool {name!r}; known: {', '.join(known) or 'none'}")
    tool = known[name]
    try:
        if wrong := _misfit(tool.parameters, arguments):
            return _error(f"{name}: {wrong}")
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


def _misfit(schema: dict[str, Any], arguments: object) -> str:
    """Why the arguments do not fit the schema; empty when they do."""
    if not isinstance(arguments, dict):
        return f"arguments must be an object, not {type(arguments).__name__}"
    # The empty registry: without one, the library would fetch whatever address a schema refers to.
    validator = jsonschema.Draft202012Validator(schema, registry=Registry())
    error = jsonschema.exceptions.best_match(validator.iter_errors(arguments))
    if error is None:
        return ""
    place = error.json_path.removeprefix("$").removeprefix(".")
    return f"argument {place!r}: {error.message}" if place else str(error.message)


class _Running(threading.local):
    permissions: frozenset[Permission] | None = None
    """What the tool that runs in this thread may use; None while none runs."""


_running = _Running()


@contextmanager
def restricted_to(permissions: frozenset[Permission]) -> Iterator[None]:
    """What the block does in this thread raises PermissionError where it uses anything else."""
    _watch()
    before, _running.permissions = _running.permissions, permissions
    try:
        yield
    finally:
        _running.permissions = before


@cache
def _watch() -> None:
    """Once for the process: an audit hook cannot be taken away again."""
    sys.addaudithook(_heard)


def _heard(event: str, _arguments: tuple[Any, ...]) -> None:
    allowed = _running.permissions
    if allowed is None:
        return
    for permission in sorted(_needed(event) - allowed):
        raise PermissionError(f"the tool has no permission for {permission} ({event})")


@cache
def _needed(event: str) -> frozenset[Permission]:
    if event.startswith(PROCESSES):
        return frozenset({"files", "network"})
    if event.startswith(FILES):
        return frozenset({"files"})
    return frozenset({"network"} if event.startswith(NETWORK) else ())
