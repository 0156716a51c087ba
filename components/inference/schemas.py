"""JSON schemas for structured output: the supported keywords are kept, unsupported ones refused by name.

Draft 2020-12 as llguidance supports it (its docs/json_schema.md). Annotations and unknown keywords do not affect
validity and are dropped, as the standard specifies.
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
"""Characters of a schema as JSON."""
MAX_DEPTH = 40
"""Nesting depth of schemas."""
MAX_PATTERN_SIZE = 20_000
"""Characters of a pattern with its counted repetitions expanded."""
MAX_MULTIPLE = 10_000
"""Least common multiple of all `multipleOf`, in digits: 0.25 counts as 25. The automaton's size grows with it."""
MAX_COMPARED = 10_000
"""Pairs of schemas compared to show that the branches of a union are disjoint."""

KINDS = ("null", "boolean", "integer", "number", "string", "array", "object")
FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"))
"""Values of `format` that are enforced; any other is an annotation."""
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
"""Formats as all parsers accept them: existing days, no leap second, no quoted local part."""

_OF_ONE = ("items", "additionalItems", "additionalProperties")
_OF_MANY = ("anyOf", "oneOf", "allOf", "prefixItems")
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_UNSUPPORTED = (
    *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "propertyNames"),
    *("contains", "minContains", "maxContains", "unevaluatedItems", "unevaluatedProperties"),
    *("$dynamicRef", "$recursiveRef", "$vocabulary"),
)

Schema = dict[str, Any]


class SchemaError(InputError):
    """A schema that is invalid or not supported."""


def checked(schema: Any, where: str, usable: Callable[[str], bool] | None = None) -> Schema:
    """The schema reduced to supported keywords.

    Without `usable`, unsupported keywords are refused. With it, they are dropped, as are patterns that are not
    `usable`: every value that fits the schema fits the result, and clients validate the rest.

    Raises: SchemaError, naming the path (below `where`) and the keyword.
    """
    if len(written := json.dumps(schema, ensure_ascii=False)) > MAX_CHARACTERS:
        raise SchemaError(f"{where}: a schema of more than {MAX_CHARACTERS} characters; send a smaller one")
    reducer = _Reducer(json.loads(written) if '"discriminator"' in written else schema, usable)
    reduced = reducer.reduce(where)
    if reduced is False:
        raise SchemaError(f"{where}: no value fits this schema")
    _check_multiples(reduced, where)
    return {} if reduced is True else dict(reduced)


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


class _Reducer:
    """Reduces one schema, and resolves its references."""

    def __init__(self, root: Any, usable: Callable[[str], bool] | None) -> None:
        self._root, self._usable = root, usable
        self._compared = 0

    def reduce(self, where: str) -> Schema | bool:
        self._require_tags()
        return self._reduced(self._root, where, 0)

    def _reduced(self, schema: Any, where: str, depth: int) -> Schema | bool:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise SchemaError(f"{where}: {_shown(schema)} is not a JSON schema; expected an object or a boolean")
        if depth > MAX_DEPTH:
            if self._usable:
                return True
            raise SchemaError(f"{where}: schemas nested more than {MAX_DEPTH} deep; send a flatter one")
        reduced: Schema = {}
        for key, value in schema.items():
            at = f"{where}.{key}"
            if self._usable and self._is_dropped(key, value, self._usable):
                continue
            if key in ("anyOf", "oneOf", "allOf") and value == [] and self._usable:
                raise SchemaError(f"{at}: []: expected schemas")
            if key in _UNSUPPORTED or (key == "uniqueItems" and value is not False):
                raise SchemaError(f"{at}: the keyword {key!r} is not supported; leave it out")
            if key in _CHECKS:
                _CHECKS[key](value, at)
            if key in _OF_ONE and not isinstance(value, list):
                reduced[key] = self._reduced(value, at, depth + 1)
            elif key in _OF_MANY or key in _OF_ONE:
                reduced[key] = [self._reduced(part, f"{at}[{index}]", depth + 1) for index, part in enumerate(value)]
            elif key in _BY_NAME:
                reduced[key] = {
                    name: self._reduced(part, f"{at}.{name}", depth + 1)
                    for name, part in value.items()
                    if not (self._usable and key == "patternProperties" and not self._usable(name))
                }
            elif key in _CHECKS:
                reduced[key] = value
        if reduced.get("format") not in FORMATS:
            reduced.pop("format", None)
        if reduced.get("format") in _PATTERNS and "pattern" not in reduced:
            reduced["pattern"] = _PATTERNS[reduced.pop("format")]
        if reduced.get("minProperties", 0) > max(1, len(reduced.get("required", ()))):
            if not self._usable:
                raise SchemaError(
                    f"{where}.minProperties: more than 'required' lists is not supported; list them there"
                )
            del reduced["minProperties"]
        if self._usable and reduced.get("additionalProperties") is False and "patternProperties" not in reduced:
            properties = reduced.get("properties", {})
            if "required" in reduced:
                reduced["required"] = [name for name in reduced["required"] if name in properties]
        if reduced.get("oneOf") and (self._usable or self._are_disjoint(schema["oneOf"])):
            reduced["allOf"] = [*reduced.get("allOf", []), {"anyOf": reduced.pop("oneOf")}]
            if len(reduced["allOf"]) == 1 and "anyOf" not in reduced:
                reduced |= reduced.pop("allOf")[0]
        return reduced

    def _is_dropped(self, key: str, value: Any, usable: Callable[[str], bool]) -> bool:
        """Whether a keyword of a schema that is enforced as far as possible is not supported."""
        if key in _UNSUPPORTED or key == "uniqueItems":
            return True
        if key == "pattern" and isinstance(value, str):
            return pattern_size(value) > MAX_PATTERN_SIZE or not usable(value)
        if key == "multipleOf" and _is_number(value):
            return _multiple(value) is None
        if key == "$ref" and isinstance(value, str):
            return not value.startswith("#")
        if isinstance(value, bool) and key in ("required", "exclusiveMinimum", "exclusiveMaximum"):
            return True  # drafts before 6
        return (value is None and key != "const") or (key == "type" and value == "any")

    def _require_tags(self) -> None:
        """Make each branch of a union with OpenAPI's `discriminator` require its tag, which may have a default.

        pydantic refuses a value without its tag.
        """
        for part in list(parts(self._root)):
            tag = part["discriminator"].get("propertyName") if isinstance(part.get("discriminator"), dict) else None
            for branch in self._branches(part) if isinstance(tag, str) else ():
                required = branch.get("required") or []
                if tag in (branch.get("properties") or {}) and isinstance(required, list) and tag not in required:
                    branch["required"] = [*required, tag]

    def _branches(self, schema: Any, depth: int = 0) -> Iterator[Schema]:
        """The branches of a union, nested unions flattened."""
        schema = self._resolved(schema)
        if isinstance(schema, dict) and depth < MAX_DEPTH:
            inner = next((schema[key] for key in ("oneOf", "anyOf") if isinstance(schema.get(key), list)), None)
            if inner is None:
                yield schema
            for branch in inner or ():
                yield from self._branches(branch, depth + 1)

    def _resolved(self, schema: Any) -> Any:
        """The target of a bare reference; None where there is none."""
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or not isinstance(path := schema.get("$ref"), str):
                return schema
            schema = self._root
            for name in unquote(path).split("/")[1:]:
                name = name.replace("~1", "/").replace("~0", "~")
                schema = schema.get(name) if isinstance(schema, dict) else None
        return schema

    def _are_disjoint(self, branches: Any) -> bool:
        return isinstance(branches, list) and all(
            self._disjoint(left, right) for left, right in combinations(branches, 2)
        )

    def _disjoint(self, left: Any, right: Any, depth: int = 0) -> bool:
        """Whether it is certain that no value fits both: by type, by constants, or by those of required properties."""
        self._compared += 1
        left, right = self._resolved(left), self._resolved(right)
        if left is False or right is False:
            return True
        if not (isinstance(left, dict) and isinstance(right, dict)) or depth > 8 or self._compared > MAX_COMPARED:
            return False
        for union, other in ((left, right), (right, left)):
            for key in ("anyOf", "oneOf"):
                if isinstance(union.get(key), list) and union[key]:
                    return all(self._disjoint(part, other, depth + 1) for part in union[key])
        constants, other_constants = _constants(left), _constants(right)
        if constants is not None and other_constants is not None:
            return not constants & other_constants
        kinds, other_kinds = _kinds(left), _kinds(right)
        if not kinds & other_kinds:
            return True
        required = [name for name in left.get("required") or () if name in (right.get("required") or ())]
        return kinds & other_kinds == {"object"} and any(
            self._disjoint(
                (left.get("properties") or {}).get(name), (right.get("properties") or {}).get(name), depth + 1
            )
            for name in required
        )


def _constants(schema: Schema) -> set[str] | None:
    """The values of `const` or `enum`, as JSON; None without them."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list):
        return None
    whole = (int(value) if isinstance(value, float) and value.is_integer() else value for value in values)
    return {json.dumps(value, sort_keys=True) for value in whole}


def _kinds(schema: Schema) -> set[str]:
    """The types that may fit; every integer is a number."""
    types = schema.get("type")
    kinds = {kind for kind in (types if isinstance(types, list) else [types]) if isinstance(kind, str)} or set(KINDS)
    return {"number" if kind == "integer" else kind for kind in kinds}


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
        raise SchemaError(
            f"{at}: more than {MAX_PATTERN_SIZE} characters with repetitions expanded; write a smaller one"
        )


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
    **dict.fromkeys(_OF_MANY, _fits(lambda value: isinstance(value, list), "a list of schemas")),
    **dict.fromkeys(_BY_NAME, _fits(lambda value: isinstance(value, dict), "schemas by name")),
    **dict.fromkeys(_NUMBERS, _fits(_is_number, "a number")),
}


def pattern_size(pattern: str) -> int:
    """Characters of a regular expression with counted repetitions expanded: `(ab){3}` has 8."""
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
    """The digits of a `multipleOf`; None below 1e-6."""
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
