"""Names are followed through a library's sources as running them would."""

from pathlib import Path

import pytest

from examples.stdlib_agent.namespaces import Imported, InMemory, InSource, Namespaces

FILES = {
    "plain.py": """
def shown(): "Doc."
def _hidden(): pass
class Kept: pass
import os
""",
    "chosen.py": """
__all__ = ["one"]
__all__ += ["two"]
__all__.extend(["three"])
def one(): pass
def two(): pass
def three(): pass
def four(): pass
""",
    "fallback.py": """
def fast(): "slow"
try:
    from plain import shown as fast
except ImportError:
    def fast(): "none"
""",
    "later.py": """
def shown(): "replaced"
from plain import *
def Kept(): "replaces"
""",
    "platform.py": """
import sys
if sys.platform == "nowhere":
    def f(): "there"
else:
    def f(): "here"
if __name__ == "__main__":
    def f(): "run"
""",
    "made.py": """
class Maker:
    def draw(self): "drawn"
class Heir(Maker): pass
_one = Heir()
draw = _one.draw
alias = draw
""",
    "pack/__init__.py": """
__all__ = ["Inner", "lazy"]
from .inner import Inner
""",
    "pack/inner.py": """
import collections.abc
from enum import IntEnum as Numbers
class Outer: pass
class Inner(Outer, collections.abc.Sized, Numbers): pass
""",
    "pack/other.py": 'def lazy(): "found"',
    "bases.py": """
from enum import IntEnum, _simple_enum
from typing import Generic, NamedTuple, T
class A(NamedTuple): pass
class B(Generic[T]): pass
class C(make()): pass
class D: pass
@_simple_enum(IntEnum)
class E: pass
""",
    "loop.py": "from ring import name",
    "ring.py": "from loop import name",
    "path_like.py": """
__all__ = ["path"]
import plain as path
""",
}


@pytest.fixture
def names(tmp_path: Path) -> Namespaces:
    for file, text in FILES.items():
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return Namespaces(tmp_path)


def described(names: Namespaces, module: str, name: str) -> tuple[str, str | None]:
    found = names.resolve(module, name)
    assert isinstance(found, InSource)
    body = found.node.body[0]
    return found.module, getattr(getattr(body, "value", None), "value", None)


def test_public_names_are_those_defined_or_declared(names: Namespaces) -> None:
    assert names.exports("plain") == ["Kept", "shown"]
    assert names.exports("chosen") == ["one", "three", "two"]
    assert names.exports("later") == ["Kept", "shown"]


@pytest.mark.parametrize(
    ("module", "name", "where", "docstring"),
    [
        ("fallback", "fast", "plain", "Doc."),
        ("later", "shown", "plain", "Doc."),
        ("later", "Kept", "later", "replaces"),
        ("platform", "f", "platform", "here"),
        ("made", "alias", "made", "drawn"),
        ("pack", "lazy", "pack.other", "found"),
    ],
)
def test_a_name_is_what_was_bound_last(names: Namespaces, module: str, name: str, where: str, docstring: str) -> None:
    assert described(names, module, name) == (where, docstring)


def test_bases_are_written_as_their_reader_would(names: Namespaces) -> None:
    def bases(module: str, name: str) -> tuple[str, ...]:
        found = names.resolve(module, name)
        assert isinstance(found, InSource)
        return names.bases(found)

    assert bases("pack", "Inner") == ("Outer", "collections.abc.Sized", "enum.IntEnum")
    assert [bases("bases", name) for name in "ABCDE"] == [
        ("tuple",),
        ("typing.Generic",),
        (),
        ("object",),
        ("enum.IntEnum",),
    ]


def test_modules_extensions_and_cycles(names: Namespaces) -> None:
    assert names.target("path_like", "path") == Imported("plain")
    assert names.resolve("loop", "name") is None
    assert isinstance(names.resolve("builtins", "len"), InMemory)
    assert names.resolve("nowhere", "x") is None
    assert not names.exists("nowhere")
