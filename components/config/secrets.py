"""Secrets in parameters, addresses and environment variables, and text in which they are hidden.

Secrets live in the environment; params.yaml refers to them as `$NAME` or `${NAME}`. Whatever is recorded, packaged,
logged or printed goes through `redacted` or `hidden`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
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
_MORE_WORDS = "auth|bearer|cookie|cred|dsn|header|jwt|login|pass|private|pwd|session|signature|user"
_CARRIER = re.compile(rf"(?i)(?:{_WORDS}|{_MORE_WORDS}|(?:^|[_-])(?:keys?|pat|pin|sig)(?:$|[_-]))")
"""In the name of an option, a header or a variable that could carry a secret."""
_ABOUT = re.compile(
    r"(?i)--?(?:no|disable|skip|without)-|.*[_-](?:dir|file|folder|host|id|limit|method|mode|path|port|timeout|type|url)$"
)
"""The name of an option that says something about a secret, such as the file where it is."""
_LETTERS = "PHabkptu"
"""Options of one letter that carry a secret in some programs: password, header, access, cookie, key, token, user."""
_HEADER = re.compile(r"([\w-]+):\s*(.+)", re.DOTALL)
_HARMLESS = re.compile(r"(?i)|true|false|none|\d{1,5}(?:[.:]\d{1,5}){0,5}")
"""Values that are too short to be secrets: switches, numbers, ports, versions."""
_FILE = re.compile(r"[\w./@-]+\.[a-z]{1,5}")
_ADDRESS = re.compile(r"(?i)([a-z][a-z0-9+.-]*://)(?:([^/?#\s]*)@)?([^/?#\s]*)([^?#\s]*)([^\s]*)")
_PARAMETER = re.compile(r"([?&#])([^=&#]*=)?([^&#]*)")
_TOKEN = re.compile(rf"(?!{_FILE.pattern}$)(?=\D*\d)[\w.~+=-]{{16,}}")
"""A part of an address's path, or an argument, that could be a token: long, with a digit in it, no name of a file."""
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
        if key == "args":
            return [_argument(str(entry), str(before)) for before, entry in zip(["", *value], value, strict=False)]
        return [redacted(entry) for entry in value]
    if not isinstance(value, str) or _REFERENCE.fullmatch(value):
        return value
    if value and _NAME.search(key):
        return HIDDEN
    return _ADDRESS.sub(_address, value) if re.search("(?:^|_)(?:url|address)$", key) else hidden(value)


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


def _argument(entry: str, before: str) -> str:
    """An argument of a program, `before` the previous one, with everything in it hidden that could be a secret."""
    if before.startswith("-") and "=" not in before and _carries(before) and not entry.startswith("--"):
        return _value(entry)
    if re.fullmatch(f"-[{_LETTERS}]", before) and not entry.startswith("-"):
        return entry if _FILE.fullmatch(entry) else _value(entry)
    name, is_set, value = entry.partition("=")
    if is_set and re.fullmatch(r"[\w.-]+", name):
        is_secret = _carries(name) or before in ("-e", "--env")
        return f"{name}={_value(value) if is_secret else _argument(value, '')}"
    if attached := re.fullmatch(rf"(-[{_LETTERS}])(.*[^a-z-].*)", entry, re.DOTALL):  # as in `-ppassword1`
        return attached[1] + _value(attached[2])
    header = _HEADER.fullmatch(entry)
    if (header and _CARRIER.search(header[1])) or re.match(r"[^\s/:@]+:[^\s/]+@", entry) or _TOKEN.fullmatch(entry):
        return _value(entry)
    with suppress(ValueError):
        document = json.loads(entry)
        return entry if (shown := _document(document)) == document else json.dumps(shown, ensure_ascii=False)
    return _ADDRESS.sub(_address, entry)


def _document(value: Any, key: str = "") -> Any:
    """JSON in an argument."""
    if isinstance(value, Mapping):
        return {name: _document(entry, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [_document(entry, key) for entry in value]
    return (_value(value) if _CARRIER.search(key) else _argument(value, "")) if isinstance(value, str) else value


def _carries(name: str) -> bool:
    return bool(_CARRIER.search(name)) and not _ABOUT.match(name)


def _value(value: str) -> str:
    """A value that could be a secret: references, also behind the name of a header, and very short ones stay."""
    header = _HEADER.fullmatch(value)
    if any(
        each.fullmatch(text) for each in (_REFERENCE, _HARMLESS) for text in (value, header[2] if header else value)
    ):
        return value
    return f"{header[1]}: {HIDDEN}" if header and value.startswith(f"{header[1]}: ") else HIDDEN


def _address(match: re.Match[str]) -> str:
    """An address of the parameters without what could be a secret in user, path, query and fragment."""
    scheme, user, host, path, query = match.groups()
    path = "/".join(map(_part, path.split("/")))
    if user is not None:
        is_reference = all(_REFERENCE.fullmatch(part) for part in user.split(":") if part)
        user = f"{user if is_reference else HIDDEN}@"
    query = _PARAMETER.sub(lambda each: each[1] + (each[2] or "") + _part(each[3], named=bool(each[2])), query)
    return f"{scheme}{user or ''}{host}{path}{query}"


def _part(text: str, named: bool = False) -> str:
    """A part of an address: of the path, or the value of a parameter of its name."""
    return _value(text) if named else HIDDEN if _TOKEN.fullmatch(text) else text


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
