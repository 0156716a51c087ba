"""JSON schemas that a grammar can hold a model to: what is understood is kept, what is not is named.

Draft 2020-12 as llguidance reads it (its docs/json_schema.md). Annotations and unknown keywords say nothing about
validity and are dropped, as the standard has it; a keyword that does, and cannot be held to, is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from components.config.params import InputError

MAX_CHARACTERS = 100_000
"""Of a schema written as JSON."""
MAX_DEPTH = 40
"""Schemas within schemas."""
MAX_PATTERN_SIZE = 20_000
"""Characters of a pattern once its counted repetitions are written out."""
MAX_MULTIPLE = 10_000
"""The least common multiple of all `multipleOf`, as digits: 0.25 counts as 25. Automata grow with it."""

KINDS = ("null", "boolean", "integer", "number", "string", "array", "object")
FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"))
"""What `format` is held to; any other value is an annotation."""

_OF_ONE = ("items", "additionalItems", "additionalProperties")
_OF_MANY = ("anyOf", "oneOf", "allOf", "prefixItems")
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_PLAIN = ("$schema", "$ref", "const", "enum", "type", "required", "pattern", "format")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_UNSUPPORTED = (
    *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "propertyNames"),
    *("contains", "minContains", "maxContains", "unevaluatedItems", "unevaluatedProperties"),
    *("$dynamicRef", "$recursiveRef", "$vocabulary"),
)

Schema = dict[str, Any]


class SchemaError(InputError):
    """A schema that is wrong, or that a grammar cannot express."""


def checked(schema: Any, where: str) -> Schema:
    """The schema with nothing in it but what validity depends on and a grammar can express.

    Raises: SchemaError, naming the place (below `where`) and the keyword.
    """
    if len(json.dumps(schema, ensure_ascii=False)) > MAX_CHARACTERS:
        raise SchemaError(f"{where}: a schema of more than {MAX_CHARACTERS} characters; send a smaller one")
    kept = _kept(schema, where, 0)
    if kept is False:
        raise SchemaError(f"{where}: no value fits this schema")
    _check_multiples(kept, where)
    return {} if kept is True else dict(kept)


def parts(schema: Any) -> Iterator[Schema]:
    """The schema and every schema inside it."""
    if not isinstance(schema, dict):
        return
    yield schema
    for key, value in schema.items():
        inner = value if key in _OF_MANY else value.values() if key in _BY_NAME else (value,) if key in _OF_ONE else ()
        for part in inner if isinstance(value, dict | list) else ():
            yield from parts(part)


def _kept(schema: Any, where: str, depth: int) -> Schema | bool:
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise SchemaError(f"{where}: {_shown(schema)} is no JSON schema; expected an object or a boolean")
    if depth > MAX_DEPTH:
        raise SchemaError(f"{where}: schemas nested more than {MAX_DEPTH} deep; send a flatter one")
    kept: Schema = {}
    for key, value in schema.items():
        at = f"{where}.{key}"
        if key in _UNSUPPORTED or (key == "uniqueItems" and value is not False):
            raise SchemaError(f"{at}: the keyword {key!r} is not supported; leave it out")
        if key in _OF_ONE and not isinstance(value, list):
            kept[key] = _kept(value, at, depth + 1)
        elif key in _OF_MANY or key in _OF_ONE:
            kept[key] = [_kept(part, f"{at}[{place}]", depth + 1) for place, part in enumerate(_list(value, at))]
        elif key in _BY_NAME:
            kept[key] = {name: _kept(part, f"{at}.{name}", depth + 1) for name, part in _object(value, at).items()}
        elif key in _CHECKS:
            _CHECKS[key](value, at)
            kept[key] = value
    if kept.get("format") not in FORMATS:
        kept.pop("format", None)
    if kept.get("minProperties", 0) > max(1, len(kept.get("required", ()))):
        raise SchemaError(f"{where}.minProperties: more than 'required' lists is not supported; list them there")
    return kept


def _list(value: Any, at: str) -> list[Any]:
    if not isinstance(value, list):
        raise SchemaError(f"{at}: {_shown(value)}: expected a list of schemas")
    return value


def _object(value: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise SchemaError(f"{at}: {_shown(value)}: expected schemas by name")
    return value


def _fits(fits: Callable[[Any], bool], expected: str) -> Callable[[Any, str], None]:
    def check(value: Any, at: str) -> None:
        if not fits(value):
            raise SchemaError(f"{at}: {_shown(value)}: expected {expected}")

    return check


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_kind(value: Any) -> bool:
    kinds = value if isinstance(value, list) else [value]
    return bool(kinds) and all(kind in KINDS for kind in kinds if isinstance(kind, str)) and _is_texts(kinds)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_pattern(value: Any, at: str) -> None:
    if not isinstance(value, str):
        raise SchemaError(f"{at}: {_shown(value)}: expected a regular expression")
    if pattern_size(value) > MAX_PATTERN_SIZE:
        raise SchemaError(f"{at}: its repetitions come to more than {MAX_PATTERN_SIZE} characters; write a smaller one")


_CHECKS: Mapping[str, Callable[[Any, str], None]] = {
    "$schema": _fits(lambda value: isinstance(value, str), "a string"),
    "$ref": _fits(
        lambda value: isinstance(value, str) and value.startswith("#"), "a reference within the schema: '#/$defs/...'"
    ),
    "const": _fits(lambda value: True, "anything"),
    "enum": _fits(lambda value: isinstance(value, list) and bool(value), "a list of values"),
    "type": _fits(_is_kind, f"one or a list of {', '.join(KINDS)}"),
    "required": _fits(_is_texts, "a list of names"),
    "pattern": _check_pattern,
    "format": _fits(lambda value: isinstance(value, str), "a string"),
    **dict.fromkeys(
        _COUNTS,
        _fits(lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0, "a whole number"),
    ),
    **dict.fromkeys(_NUMBERS, _fits(_is_number, "a number")),
}


def pattern_size(pattern: str) -> int:
    """Characters of a regular expression whose counted repetitions are written out: `(ab){3}` has 8."""
    sizes, last = [0], 0
    for piece in re.findall(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d+(?:,\d*)?\}|.", pattern, re.DOTALL):
        if piece == "(":
            sizes.append(1)
        elif piece == ")" and len(sizes) > 1:
            last = sizes.pop() + 1
            sizes[-1] += last
        elif piece[0] == "{" and len(piece) > 1:
            times = max(int(number[:9]) for number in re.findall(r"\d+", piece))
            sizes[-1] += last * max(0, times - 1)
        else:
            last = 1
            sizes[-1] += 1
    return sum(sizes)


def _check_multiples(schema: Any, where: str) -> None:
    together = 1
    for part in parts(schema):
        if "multipleOf" in part:
            number = Decimal(str(part["multipleOf"]))
            exponent = int(number.as_tuple().exponent)
            fine = number > 0 and exponent >= -6
            together = math.lcm(together, int(number * 10 ** max(0, -exponent)) if fine else MAX_MULTIPLE + 1)
    if together > MAX_MULTIPLE:
        raise SchemaError(
            f"{where}: multipleOf: at least one, or all of them together, are too fine or too large; their least common"
            f" multiple may have the digits {MAX_MULTIPLE} at most"
        )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
