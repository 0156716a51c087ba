"""Secrets in parameters, addresses and environment variables, and text in which they are hidden.

Secrets live in the environment; params.yaml refers to them as `$NAME` or `${NAME}`. Whatever is recorded, packaged,
logged or printed goes through `redacted` or `hidden`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HIDDEN = "[hidden]"
ENVIRONMENTS = ("env", "headers")
"""Keys of params.yaml whose values are secrets unless they refer to environment variables."""
MIN_CHARACTERS = 6
"""Shorter values of the environment would hide ordinary words in logs."""

_REFERENCE = re.compile(r"(?:[A-Za-z]+ )?\$(?:\w+|\{\w+\})")
"""`$NAME`, also behind a scheme as in `Bearer $NAME`."""
_WORDS = "api[_-]?key|access[_-]?key|auth[_-]?string|credentials?|passphrase|passw(?:or)?d|secret|token"
_NAME = re.compile(rf"(?i)(?:^|[_-])(?:{_WORDS}|keys?)(?:$|[_-])")
_OPTION = re.compile(rf"(?i)--?[\w-]*(?:{_WORDS})")
_USERINFO = re.compile(r"(?<=://)([^/?#\s@:\"'\\<>]*)(:[^/?#\s\"'\\<>]*)?@")
_QUERY = re.compile(rf"(?i)([?&][^=&\s]*(?:{_WORDS}|key|sig|signature)=)[^&\s#\"'\\<>]+")


def redacted(value: Any, key: str = "") -> Any:
    """A copy of parameters in which every literal secret is replaced; `key` is the name of the value.

    A value under `env` or `headers` becomes a reference to the environment variable of its name.
    """
    if isinstance(value, Mapping):
        replace = _referenced if key in ENVIRONMENTS else redacted
        return {name: replace(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list):
        entries = [redacted(entry) for entry in value]
        return _arguments(entries) if key == "args" else entries
    if not isinstance(value, str) or _REFERENCE.fullmatch(value):
        return value
    return HIDDEN if value and _NAME.search(key) else hidden(value)


def redacted_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """A version's tags, whose `params` earlier releases recorded with secrets."""
    if "params" not in tags:
        return dict(tags)
    return {**tags, "params": json.dumps(redacted(json.loads(tags["params"])))}


def literal_secrets(value: Any) -> list[str]:
    """Dotted names of the parameters that `redacted` replaces."""
    return list(_differences(value, redacted(value), ""))


def hidden(text: str, secrets: Sequence[str] = ()) -> str:
    """A text without the `secrets`, and without passwords and keys in its URLs."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return _QUERY.sub(rf"\1{HIDDEN}", _USERINFO.sub(_without_password, text))


def environment_secrets(environment: Mapping[str, str]) -> list[str]:
    """Values of environment variables that are secrets by their name, and passwords of URLs; longest first."""
    values = {value.strip() for name, value in environment.items() if _NAME.search(name)}
    values |= {part.strip() for value in values for part in value.split(",")}
    for text in environment.values():
        values |= {password.removeprefix(":") for _, password in _USERINFO.findall(text)}
    return sorted((value for value in values if len(value) >= MIN_CHARACTERS), key=len, reverse=True)


def _referenced(value: Any, name: str) -> Any:
    if not isinstance(value, str) or _REFERENCE.fullmatch(value):
        return value
    return "$" + re.sub(r"\W", "_", name).upper()


def _arguments(entries: list[Any]) -> list[Any]:
    """Arguments of a program: what follows `--token`, and the value of `--token=VALUE`, are secrets."""
    shown: list[Any] = []
    for number, entry in enumerate(entries):
        option, is_set, value = str(entry).partition("=")
        before = str(entries[number - 1]) if number else ""
        if is_set and _OPTION.fullmatch(option) and not _REFERENCE.fullmatch(value):
            entry = f"{option}={HIDDEN}"
        elif _OPTION.fullmatch(before) and not _REFERENCE.fullmatch(str(entry)):
            entry = HIDDEN
        shown.append(entry)
    return shown


def _without_password(match: re.Match[str]) -> str:
    user, password = match[1], match[2]
    if password is None:  # a token in the place of the user
        return f"{user if _REFERENCE.fullmatch(user) else HIDDEN}@"
    return f"{user}:{password[1:] if _REFERENCE.fullmatch(password[1:]) else '***'}@"


def _differences(before: Any, after: Any, key: str) -> Iterator[str]:
    if isinstance(before, Mapping):
        for name, entry in before.items():
            yield from _differences(entry, after[name], f"{key}.{name}".lstrip("."))
    elif isinstance(before, list):
        for number, entry in enumerate(before):
            # A server of a list by its name, as people look for it.
            name = entry.get("name", number) if isinstance(entry, Mapping) else number
            yield from _differences(entry, after[number], f"{key}.{name}".lstrip("."))
    elif before != after:
        yield key
