"""JSON schemas that a grammar can hold a model to: what is understood is kept, what is not is named.

Draft 2020-12 as llguidance reads it (its docs/json_schema.md). Annotations and unknown keywords say nothing about
validity and are dropped, as the standard has it; a keyword that does, and cannot be held to, is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from itertools import combinations
from typing import Any
from urllib.parse import unquote

from components.config.params import InputError

MAX_CHARACTERS = 100_000
"""Of a schema written as JSON."""
MAX_DEPTH = 40
"""Schemas within schemas."""
MAX_PATTERN_SIZE = 20_000
"""Characters of a pattern once its counted repetitions are written out."""
MAX_MULTIPLE = 10_000
"""The least common multiple of all `multipleOf`, as digits: 0.25 counts as 25. Automata grow with it."""
MAX_COMPARED = 10_000
"""Pairs of schemas looked at to see that the branches of a union exclude each other."""

KINDS = ("null", "boolean", "integer", "number", "string", "array", "object")
FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"))
"""What `format` is held to; any other value is an annotation."""
_YEAR = r"(?:[1-9]\d{3}|0[1-9]\d\d|00[1-9]\d|000[1-9])"
_LEAP_YEAR = r"(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_MONTH_AND_DAY = (
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))"
)
_DATE = rf"(?:{_YEAR}-{_MONTH_AND_DAY}|{_LEAP_YEAR}-02-29)"
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_PATTERNS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "email": rf"^{_ATOM}(?:\.{_ATOM}){{0,4}}@(?:{_LABEL}\.){{1,4}}[A-Za-z]{{2,63}}$",
}
"""Formats as every reader takes them: days that there are, no leap second, no quoted local part."""

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


def checked(schema: Any, where: str, usable: Callable[[str], bool] | None = None) -> Schema:
    """The schema with nothing in it but what validity depends on and a grammar can express.

    Without `usable`, what no grammar can express is refused. With it, such keywords are left out, as are patterns that
    are not `usable`: whatever fits the schema fits the result, and whoever takes the value checks the rest.

    Raises: SchemaError, naming the place (below `where`) and the keyword.
    """
    if len(written := json.dumps(schema, ensure_ascii=False)) > MAX_CHARACTERS:
        raise SchemaError(f"{where}: a schema of more than {MAX_CHARACTERS} characters; send a smaller one")
    reader = _Reader(json.loads(written) if '"discriminator"' in written else schema, usable)
    kept = reader.read(where)
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
        inner: Iterable[Any] = ()
        if isinstance(value, dict):
            inner = value.values() if key in _BY_NAME else (value,) if key in _OF_ONE else ()
        elif isinstance(value, list) and key in (*_OF_MANY, *_OF_ONE):
            inner = value
        for part in inner:
            yield from parts(part)


class _Reader:
    """One schema, with the definitions that its references lead to."""

    def __init__(self, root: Any, usable: Callable[[str], bool] | None) -> None:
        self._root, self._usable = root, usable
        self._compared = 0

    def read(self, where: str) -> Schema | bool:
        self._require_tags()
        return self._kept(self._root, where, 0)

    def _kept(self, schema: Any, where: str, depth: int) -> Schema | bool:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise SchemaError(f"{where}: {_shown(schema)} is no JSON schema; expected an object or a boolean")
        if depth > MAX_DEPTH:
            if self._usable:
                return True
            raise SchemaError(f"{where}: schemas nested more than {MAX_DEPTH} deep; send a flatter one")
        kept: Schema = {}
        for key, value in schema.items():
            at = f"{where}.{key}"
            if self._usable and self._is_left_out(key, value, self._usable):
                continue
            if key in ("anyOf", "oneOf", "allOf") and value == [] and self._usable:
                raise SchemaError(f"{at}: []: expected schemas")
            if key in _UNSUPPORTED or (key == "uniqueItems" and value is not False):
                raise SchemaError(f"{at}: the keyword {key!r} is not supported; leave it out")
            if key in _OF_ONE and not isinstance(value, list):
                kept[key] = self._kept(value, at, depth + 1)
            elif key in _OF_MANY or key in _OF_ONE:
                kept[key] = [
                    self._kept(part, f"{at}[{place}]", depth + 1) for place, part in enumerate(_list(value, at))
                ]
            elif key in _BY_NAME:
                kept[key] = {
                    name: self._kept(part, f"{at}.{name}", depth + 1)
                    for name, part in _object(value, at).items()
                    if not (self._usable and key == "patternProperties" and not self._usable(name))
                }
            elif key in _CHECKS:
                _CHECKS[key](value, at)
                kept[key] = value
        if kept.get("format") not in FORMATS:
            kept.pop("format", None)
        if kept.get("format") in _PATTERNS and "pattern" not in kept:
            kept["pattern"] = _PATTERNS[kept.pop("format")]
        if kept.get("minProperties", 0) > max(1, len(kept.get("required", ()))):
            if not self._usable:
                raise SchemaError(
                    f"{where}.minProperties: more than 'required' lists is not supported; list them there"
                )
            del kept["minProperties"]
        if self._usable and kept.get("additionalProperties") is False and "patternProperties" not in kept:
            known = kept.get("properties", {})
            kept |= {key: [name for name in kept[key] if name in known] for key in ("required",) if key in kept}
        if kept.get("oneOf") and (self._usable or self._exclude_each_other(schema["oneOf"])):
            kept["allOf"] = [*kept.get("allOf", []), {"anyOf": kept.pop("oneOf")}]
            if len(kept["allOf"]) == 1 and "anyOf" not in kept:
                kept |= kept.pop("allOf")[0]
        return kept

    def _is_left_out(self, key: str, value: Any, usable: Callable[[str], bool]) -> bool:
        """Of a schema that is held to as far as possible: whether a keyword is nothing that a grammar can express."""
        if key in _UNSUPPORTED or key == "uniqueItems":
            return True
        if key == "pattern" and isinstance(value, str):
            return pattern_size(value) > MAX_PATTERN_SIZE or not usable(value)
        if key == "multipleOf" and _is_number(value):
            return _multiple(value) is None
        if key == "$ref" and isinstance(value, str):
            return not value.startswith("#")
        if isinstance(value, bool) and key in ("required", "exclusiveMinimum", "exclusiveMaximum"):
            return True  # as drafts before 6 have it
        return (value is None and key != "const") or (key == "type" and value == "any")

    def _require_tags(self) -> None:
        """Make each branch of a union with OpenAPI's `discriminator` require its tag, which may have a default.

        Without its tag nobody can tell a value's branch, so pydantic takes none.
        """
        for part in list(parts(self._root)):
            tag = part["discriminator"].get("propertyName") if isinstance(part.get("discriminator"), dict) else None
            for branch in self._branches(part) if isinstance(tag, str) else ():
                required = branch.get("required") or []
                if tag in (branch.get("properties") or {}) and isinstance(required, list) and tag not in required:
                    branch["required"] = [*required, tag]

    def _branches(self, schema: Any, depth: int = 0) -> Iterator[Schema]:
        """The branches of a union, and of the unions among them."""
        schema = self._resolved(schema)
        if isinstance(schema, dict) and depth < MAX_DEPTH:
            inner = next((schema[key] for key in ("oneOf", "anyOf") if isinstance(schema.get(key), list)), None)
            if inner is None:
                yield schema
            for branch in inner or ():
                yield from self._branches(branch, depth + 1)

    def _resolved(self, schema: Any) -> Any:
        """What a bare reference leads to; None where that is nothing."""
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or not isinstance(path := schema.get("$ref"), str):
                return schema
            schema = self._root
            for name in unquote(path).split("/")[1:]:
                name = name.replace("~1", "/").replace("~0", "~")
                schema = schema.get(name) if isinstance(schema, dict) else None
        return schema

    def _exclude_each_other(self, branches: Any) -> bool:
        return isinstance(branches, list) and all(
            self._disjoint(one, other) for one, other in combinations(branches, 2)
        )

    def _disjoint(self, one: Any, other: Any, depth: int = 0) -> bool:
        """Whether it is certain that no value fits both: by kinds, by constants, or by those of what both require."""
        self._compared += 1
        one, other = self._resolved(one), self._resolved(other)
        if one is False or other is False:
            return True
        if not (isinstance(one, dict) and isinstance(other, dict)) or depth > 8 or self._compared > MAX_COMPARED:
            return False
        for left, right in ((one, other), (other, one)):
            for key in ("anyOf", "oneOf"):
                if isinstance(left.get(key), list) and left[key]:
                    return all(self._disjoint(part, right, depth + 1) for part in left[key])
        ours, theirs = _constants(one), _constants(other)
        if ours is not None and theirs is not None:
            return not ours & theirs
        kinds, other_kinds = _kinds(one), _kinds(other)
        if not kinds & other_kinds:
            return True
        needed = [name for name in one.get("required") or () if name in (other.get("required") or ())]
        return kinds & other_kinds == {"object"} and any(
            self._disjoint(
                (one.get("properties") or {}).get(name), (other.get("properties") or {}).get(name), depth + 1
            )
            for name in needed
        )


def _constants(schema: Schema) -> set[str] | None:
    """The only values that fit, as JSON; None where there may be others."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list):
        return None
    whole = (int(value) if isinstance(value, float) and value.is_integer() else value for value in values)
    return {json.dumps(value, sort_keys=True) for value in whole}


def _kinds(schema: Schema) -> set[str]:
    """The kinds of values that may fit; every integer is a number."""
    named = schema.get("type")
    kinds = {kind for kind in (named if isinstance(named, list) else [named]) if isinstance(kind, str)} or set(KINDS)
    return {"number" if kind == "integer" else kind for kind in kinds}


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


def _multiple(value: float) -> int | None:
    """The digits of a `multipleOf`; None where it is too fine."""
    number = Decimal(str(value))
    exponent = int(number.as_tuple().exponent)
    return int(number * 10 ** max(0, -exponent)) if number > 0 and exponent >= -6 else None


def _check_multiples(schema: Any, where: str) -> None:
    multiples = [_multiple(part["multipleOf"]) or MAX_MULTIPLE + 1 for part in parts(schema) if "multipleOf" in part]
    if math.lcm(*multiples) > MAX_MULTIPLE:
        raise SchemaError(
            f"{where}: multipleOf: at least one, or all of them together, are too fine or too large; their least common"
            f" multiple may have the digits {MAX_MULTIPLE} at most"
        )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
