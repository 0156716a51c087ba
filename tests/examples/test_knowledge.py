"""The knowledge file answers as the interpreter would, in one line, and is only ever read."""

import collections
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components.config.params import InputError
from examples.stdlib_agent.facts import build
from examples.stdlib_agent.knowledge import Knowledge, listed
from examples.stdlib_agent.stdlib import library_symbols
from examples.stdlib_agent.summaries import summary

PACKAGES = ["builtins", "collections", "heapq", "http", "json", "marshal", "os", "pickle", "shlex"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("knowledge") / "knowledge.sqlite"
    build(path, library_symbols(PACKAGES))
    return path


@pytest.fixture(scope="module")
def knowledge(path: Path) -> Knowledge:
    return Knowledge(path)


def test_answers_are_the_interpreters_own(knowledge: Knowledge) -> None:
    assert knowledge.lookup("json.dumps") == summary(json.dumps.__doc__ or "")
    assert knowledge.bases("collections.OrderedDict") == collections.OrderedDict.__bases__[0].__name__
    assert knowledge.bases("json.JSONDecodeError") == json.JSONDecodeError.__bases__[0].__name__


@pytest.mark.parametrize("written", ["`json.dumps`", "'json.dumps'", "json.dumps()", " json.dumps? ", '"json.dumps"'])
def test_a_symbol_is_known_however_it_is_quoted(knowledge: Knowledge, written: str) -> None:
    assert knowledge.lookup(written) == knowledge.lookup("json.dumps")


def test_short_names_are_answered_with_the_full_one(knowledge: Knowledge) -> None:
    assert knowledge.lookup("OrderedDict") == "collections.OrderedDict: Dictionary that remembers insertion order."
    assert knowledge.lookup("ordereddict") == knowledge.lookup("OrderedDict")
    assert knowledge.lookup("path.join").startswith("os.path.join: ")
    assert knowledge.lookup("builtins.len") == knowledge.lookup("len") == "Return the number of items in a container."
    assert knowledge.full_name("OrderedDict") == "collections.OrderedDict"


def test_ambiguous_names_say_what_they_may_be(knowledge: Knowledge) -> None:
    with pytest.raises(InputError, match=r"^dumps may be json\.dumps, pickle\.dumps or marshal\.dumps$"):
        knowledge.lookup("dumps")
    assert knowledge.full_name("dumps") == ""


def test_what_is_unknown_is_not_found(knowledge: Knowledge) -> None:
    assert knowledge.lookup("json.nothing") == "not found: json.nothing"
    assert knowledge.bases("a\nb" * 100) == "not found: " + ("a b" * 100)[:77] + "..."
    assert knowledge.lookup("'; DROP TABLE symbols; --") == "not found: ; DROP TABLE symbols; --"
    assert knowledge.full_name("json.nothing") == ""


def test_only_classes_have_bases(knowledge: Knowledge) -> None:
    with pytest.raises(InputError, match=r"^json\.dumps is a function, not a class$"):
        knowledge.bases("json.dumps")
    with pytest.raises(InputError, match=r"^object has no bases that are written down$"):
        knowledge.bases("object")
    assert knowledge.bases("http.server.ThreadingHTTPServer") == "socketserver.ThreadingMixIn and HTTPServer"


def test_everything_but_a_module_is_in_one(knowledge: Knowledge) -> None:
    assert knowledge.module("OrderedDict") == collections.OrderedDict.__module__
    assert knowledge.module(knowledge.bases("OrderedDict")) == dict.__module__
    assert knowledge.module("OrderedDict.move_to_end") == "collections"
    assert knowledge.module("os.path.join") == "os.path"
    assert knowledge.module("json.nothing") == "not found: json.nothing"
    assert knowledge.lookup("builtins").startswith("Built-in functions")
    with pytest.raises(InputError, match=r"^http\.server is a module itself$"):
        knowledge.module("http.server")


def test_search_finds_by_what_is_said_and_by_parts_of_names(knowledge: Knowledge) -> None:
    assert knowledge.search("find the n largest elements").startswith("heapq.nlargest: ")
    assert knowledge.search("ordered dict").startswith("collections.OrderedDict: ")
    assert knowledge.search("zzzz qqqq") == "not found: zzzz qqqq"
    assert knowledge.search("of the and") == "not found: of the and"


@pytest.mark.parametrize("query", ['"', "a AND", "NEAR(", "summary:x", "*", "-x", "'; --", "x" * 9000, "(((", "\x00"])
def test_queries_are_words_and_never_syntax(knowledge: Knowledge, query: str) -> None:
    assert "\n" not in knowledge.search(query)


def test_equal_symbols_give_equal_bytes(path: Path, tmp_path: Path) -> None:
    build(tmp_path / "again.sqlite", reversed(library_symbols(PACKAGES)))
    assert (tmp_path / "again.sqlite").read_bytes() == path.read_bytes()


def test_reading_changes_nothing(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "k #1?.sqlite"
    copy.write_bytes(path.read_bytes())
    copy.chmod(0o444)
    assert Knowledge(copy).lookup("json.dumps")
    assert copy.read_bytes() == path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == [copy.name]


def test_threads_share_it(knowledge: Knowledge) -> None:
    names = ["json.dumps", "OrderedDict", "len", "heapq.nlargest"] * 50
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(knowledge.lookup, names)) == [knowledge.lookup(name) for name in names]


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'none\.sqlite: not found; run "loopwright run --until collect"$'):
        Knowledge(tmp_path / "none.sqlite")
    (tmp_path / "broken.sqlite").write_bytes(b"no database at all" * 99)
    with pytest.raises(InputError, match=r"broken\.sqlite: not a knowledge file \("):
        Knowledge(tmp_path / "broken.sqlite")


def test_lists_read_as_sentences() -> None:
    assert [listed("ABC"[:count]) for count in range(4)] == ["", "A", "A and B", "A, B and C"]
    assert listed(["A", "B"], "or") == "A or B"
