"""Jinja for chat templates of others: every operation spends a budget, so that none takes for ever or fills the memory.

Operators, filters, methods and functions are those that chat templates use; a size that a template could choose (the
count of `'x' * 10 ** 9`, the width of `'%999999999d'`) is spent before there is anything of it.
"""

from __future__ import annotations

import json
import re
import string
import types
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from inspect import unwrap
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

MAX_WORK = 500_000
"""Steps of a rendering: passes of a loop, calls, filters, operators, pieces of output."""
CHARACTERS_PER_STEP = 200
"""Characters that count as one step."""
_ITEM, _PART = 8, 50
"""Characters that an item of a list counts as, and one that is read or made: by what they take of memory and time."""
_SPACES = "".join(filter(str.isspace, map(chr, range(0x3001))))
_MAX_INDENT = 16
_BUDGET = "budget of the rendering"  # no name that a template could spell


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SHALLOW = _names("abs attr count d default first items last length map reject rejectattr select selectattr")
"""Filters that read no more of a value than its parts, or leave that to the filters and tests that they name."""
_TEXT = _names("capitalize e escape float int lower reverse safe string title trim truncate upper wordcount")
_ITEMS = _names("dictsort max min sort unique")
_CHEAP_TESTS = _names("boolean callable defined false float integer iterable mapping none number sequence string")
_CHEAP_TESTS |= _names("sameas true undefined")
_STR = _names(
    "capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit isidentifier"
    " islower isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix"
    " replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
)
_METHODS: Mapping[type, frozenset[str]] = {
    str: _STR,
    dict: _names("copy get items keys values"),
    list: _names("copy count index"),
    tuple: _names("count index"),
}
_PLAIN = ImmutableSandboxedEnvironment()
"""Has Jinja's own filters and tests."""


class Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self.left = MAX_WORK * CHARACTERS_PER_STEP
        """In characters."""

    def spend(self, characters: int, step: int = CHARACTERS_PER_STEP) -> None:
        """Count a step and what it reads or makes.

        Raises: TemplateRuntimeError when nothing is left.
        """
        self.left -= step + characters
        if self.left < 0:
            raise jinja2.TemplateRuntimeError(f"needs more than {MAX_WORK:,} steps; a template has to end")

    def spend_deep(self, *values: Any) -> None:
        """Count a step that reads values with all that is in them, which as text can be far larger than in memory.

        Raises: as `spend`.
        """
        self.spend(0)
        pending = list(values)
        while pending:
            value = pending.pop()
            self.spend(_size(value), _PART)
            if isinstance(value, Mapping):
                pending += [*value.keys(), *value.values()]
            elif isinstance(value, list | tuple | KeysView | ValuesView | ItemsView):
                pending += value


def _size(value: Any) -> int:
    """Characters of a text, bits of a number, items of a list without what is in them."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list | tuple | range | Mapping | KeysView | ValuesView | ItemsView):
        return _ITEM * len(value)
    return value.bit_length() if isinstance(value, int) else 1


def _budget(context: Context) -> Budget:
    budget: Budget = context.parent[_BUDGET]
    return budget


class SandboxedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates are compiled by `compile_metered`."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters = {name: _metered_filter(name) for name in _SHALLOW | _TEXT | _ITEMS}
        self.filters |= {"replace": _replace, "join": _join, "list": _list, "indent": _indent, "format": _format}
        self.filters |= {"tojson": _tojson, "counted": _counted, "measured": _measured, "read": _read}
        self.tests = {name: test if name in _CHEAP_TESTS else _metered_test(name) for name, test in self.tests.items()}
        self.globals = {"range": self.globals["range"], "dict": dict, "namespace": _Namespace}
        self.globals |= {"cycler": Cycler, "joiner": Joiner}

    def compile_metered(self, template: str) -> Any:
        """The template, in which loops, output, comparisons and slices spend the budget too.

        Raises: TemplateError.
        """
        tree: Any = _Metering(self).visit(self.parse(template))
        return jinja2.Template.from_code(self, self.compile(tree), self.globals)

    def variables(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """What a template is rendered with, and a new budget."""
        return {**variables, _BUDGET: Budget()}

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function, a macro, a method or a recursive loop."""
        budget = _budget(context)
        method = unwrap(function) if isinstance(function, types.FunctionType) else function  # `str.format` is wrapped
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(function, LoopContext):
            args = (_counted(context, args[0]), *args[1:]) if args else args
        elif isinstance(owner, str) and name in _STR:
            args = ([*args[0]], *args[1:]) if name == "join" and args else args
            _spend_method(budget, owner, name, args, kwargs)
        elif any(isinstance(owner, kind) and name in names for kind, names in _METHODS.items()):
            budget.spend_deep(owner if name in ("count", "index") else None, *args)
        elif isinstance(owner, LoopContext | Cycler) or any(function is each for each in self.globals.values()):
            budget.spend_deep(*args, *kwargs.values())
        elif not isinstance(function, Macro | BlockReference | Joiner | Undefined) and not isinstance(owner, Extension):
            raise SecurityError(f"{name or type(function).__name__}: chat templates cannot call it")
        budget.spend(_ITEM * (len(args) + len(kwargs)))
        result = super().call(context, function, *args, **kwargs)
        budget.spend(_size(result), 0)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator."""
        budget = _budget(context)
        if isinstance(left, str) and operator == "%":
            _spend_format(budget, left, right)
        elif isinstance(left, int) and isinstance(right, int):
            exponent = max(1, right) if operator == "**" else 1
            budget.spend(left.bit_length() ** 2 * exponent**2 + right.bit_length() ** 2)
        elif operator == "*" and isinstance(left, int):
            budget.spend(_size(right) * max(1, left))
        elif operator == "*" and isinstance(right, int):
            budget.spend(_size(left) * max(1, right))
        else:
            budget.spend(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)


class _Metering(NodeTransformer):
    """Puts filters that spend the budget around what the environment does not see."""

    def __init__(self, environment: SandboxedEnvironment) -> None:
        self._environment = environment

    def _filtered(self, node: Any, name: str) -> Any:
        # Short constants are spent with the step that uses them.
        value = node.data if isinstance(node, nodes.TemplateData) else getattr(node, "value", None)
        is_constant = isinstance(node, nodes.Const | nodes.TemplateData)
        if is_constant and not (isinstance(value, str) and len(value) >= CHARACTERS_PER_STEP):
            return node
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=self._environment)

    def visit_For(self, node: nodes.For) -> Any:
        self.generic_visit(node)
        node.iter = self._filtered(node.iter, "counted")
        return node

    def visit_Output(self, node: nodes.Output | nodes.Concat) -> Any:
        self.generic_visit(node)
        node.nodes = [self._filtered(each, "read") for each in node.nodes]
        return node

    visit_Concat = visit_Output

    def visit_Compare(self, node: nodes.Compare) -> Any:
        self.generic_visit(node)
        constant = any(isinstance(each, nodes.Const) for each in (node.expr, *(op.expr for op in node.ops)))
        # Compared with a constant, a list is not read any deeper.
        node.expr = self._filtered(node.expr, "measured" if constant else "read")
        for operand in node.ops:
            operand.expr = self._filtered(operand.expr, "measured" if constant else "read")
        return node

    def visit_Dict(self, node: nodes.Dict) -> Any:
        self.generic_visit(node)
        for pair in node.items:
            pair.key = self._filtered(pair.key, "read")  # to be hashed
        return self._long(node)

    def visit_List(self, node: nodes.List | nodes.Tuple) -> Any:
        self.generic_visit(node)
        return self._long(node)

    visit_Tuple = visit_List

    def _long(self, node: Any) -> Any:
        is_value = getattr(node, "ctx", "load") == "load"
        return self._filtered(node, "measured") if is_value and len(node.items) > CHARACTERS_PER_STEP / _ITEM else node

    def visit_Getitem(self, node: nodes.Getitem) -> Any:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return self._filtered(node, "measured")
        node.arg = self._filtered(node.arg, "read")
        return node


class _Namespace(Namespace):
    def __repr__(self) -> str:
        return "<Namespace>"  # not its attributes, which can be namespaces of namespaces


def _metered_filter(name: str) -> Any:
    @pass_context
    def apply(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        if name in _ITEMS and not isinstance(value, Mapping | Undefined):
            value = _list(context, value)
        if name in _SHALLOW:
            budget.spend(0)
        else:
            budget.spend_deep(value, *args, *kwargs.values())
            budget.spend(_size(value) * _searched(*args, *kwargs.values()))
        result = _PLAIN.call_filter(name, value, args, kwargs, context)
        budget.spend(_size(result), 0)
        return result

    return apply


def _metered_test(name: str) -> Any:
    @pass_context
    def apply(context: Context, value: Any, *args: Any, **kwargs: Any) -> bool:
        _budget(context).spend_deep(value, *args, *kwargs.values())
        return bool(_PLAIN.call_test(name, value, args, kwargs, context))

    return apply


@pass_context
def _counted(context: Context, items: Any) -> Iterator[Any]:
    for item in items:
        _budget(context).spend(0)
        yield item


@pass_context
def _measured(context: Context, value: Any) -> Any:
    _budget(context).spend(_size(value))
    return value


@pass_context
def _read(context: Context, value: Any) -> Any:
    _budget(context).spend_deep(value)
    return value


@pass_context
def _list(context: Context, value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        _budget(context).spend(_size(value))
        return list(value)
    return list(_counted(context, value))


@pass_context
def _join(context: Context, items: Any, separator: Any = "", attribute: Any = None) -> Any:
    items = _list(context, items)
    _budget(context).spend_deep(items, separator)
    _budget(context).spend(len(items) * len(str(separator)))
    return _PLAIN.call_filter("join", items, (separator, attribute), {}, context)


@pass_context
def _replace(context: Context, value: Any, old: str, new: str, count: int | None = None) -> Any:
    _budget(context).spend_deep(value, old, new)
    text = value if isinstance(value, str) else str(value)
    _budget(context).spend(text.count(str(old)) * len(str(new)))
    return _PLAIN.call_filter("replace", text, (old, new, count), {}, context)


@pass_context
def _indent(context: Context, value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
    _budget(context).spend_deep(value, width)
    lines = len(str(value).splitlines()) + 1
    _budget(context).spend(lines * (len(width) if isinstance(width, str) else max(0, width)))
    return _PLAIN.call_filter("indent", value, (width, first, blank), {}, context)


@pass_context
def _format(context: Context, value: str, *args: Any, **kwargs: Any) -> Any:
    _spend_format(_budget(context), str(value), kwargs or args)
    return _PLAIN.call_filter("format", str(value), args, kwargs, context)


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face's templates expect it: without escapes for HTML."""
    if max(indent if isinstance(indent, int) else len(indent or ""), *map(len, separators or ("",))) > _MAX_INDENT:
        raise jinja2.TemplateRuntimeError(f"tojson: indent and separators have {_MAX_INDENT} characters at most")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces = []
    for piece in encoder.iterencode(value):
        _budget(context).spend(len(piece), _PART)
        pieces.append(piece)
    return "".join(pieces)


def _spend_format(budget: Budget, text: str, values: Any) -> None:
    """What `text % values` reads and makes."""
    budget.spend_deep(text, values)
    _spend_marks(budget, text.count("%"), values)
    widths = [int(digits) for digits in re.findall(r"\d+", text)]
    if "*" in text:  # a width that is one of the values
        widths += [
            abs(value) for value in (values if isinstance(values, tuple) else [values]) if isinstance(value, int)
        ]
    budget.spend(sum(widths))


def _spend_marks(budget: Budget, marks: int, values: Any) -> None:
    """What it takes to write the values once for each mark."""
    before = budget.left
    budget.spend_deep(values)
    budget.spend((before - budget.left) * max(0, marks - 1), 0)


def _spend_method(budget: Budget, text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """What a method of a text reads and makes."""
    budget.spend_deep(text, *args, *kwargs.values())
    if name == "format":
        fields = [field for field in string.Formatter().parse(text) if field[1] is not None]
        if any("{" in (spec or "") for _, _, spec, _ in fields):
            raise SecurityError("format: chat templates cannot have fields within fields")
        _spend_marks(budget, len(fields), [*args, *kwargs.values()])
        budget.spend(sum(int(digits) for _, _, spec, _ in fields for digits in re.findall(r"\d+", spec or "")))
    elif name == "replace":
        if kwargs:
            raise TypeError("replace takes no keyword arguments")
        old, new = [*map(str, args), "", ""][:2]
        budget.spend(text.count(old) * len(new))
    elif name == "join":
        budget.spend(len(text) * len(args[0]) if args else 0)
    else:
        budget.spend(len(text) * _searched(*args, *kwargs.values()))
        if "split" in name:
            separator = next((value for value in (*args, *kwargs.values()) if isinstance(value, str) and value), "")
            budget.spend(_PART * (text.count(separator) if separator else sum(map(text.count, _SPACES))))


def _searched(*values: Any) -> int:
    """Characters, in hundreds, with which each of a text may be compared: in `strip` and searches from the end."""
    return sum(len(value) for value in values if isinstance(value, str)) // 100
