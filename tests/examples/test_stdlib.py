"""What is read from the library's text is what the interpreter itself says."""

import collections
import http
import importlib
import inspect
import subprocess
import sys

import pytest

from components.config.params import InputError
from examples.stdlib_agent.stdlib import Symbol, library_symbols

PACKAGES = ["builtins", "collections", "concurrent", "csv", "datetime", "heapq", "http", "io", "itertools", "json"]
PACKAGES += ["math", "os", "random", "string", "textwrap"]


@pytest.fixture(scope="module")
def symbols() -> dict[str, Symbol]:
    return {symbol.name: symbol for symbol in library_symbols(PACKAGES)}


@pytest.mark.parametrize(
    "name",
    [
        "json.dumps",
        "json.JSONDecoder.decode",
        "textwrap.wrap",
        "math.sin",
        "random.randint",
        "os.path.join",
        "os.getcwd",
        "datetime.datetime.isoformat",
        "collections.Counter",
        "collections.deque.appendleft",
        "itertools.chain",
        "heapq.nlargest",
        "http.HTTPStatus",
        "builtins.len",
        "builtins.str.join",
        "builtins.dict.fromkeys",
    ],
)
def test_docstrings_are_the_interpreters_own(symbols: dict[str, Symbol], name: str) -> None:
    module, _, rest = name.partition(".")
    value = importlib.import_module(module)
    for part in rest.split("."):
        value = getattr(value, part)
    assert inspect.cleandoc(symbols[name.removeprefix("builtins.")].docstring) == inspect.cleandoc(value.__doc__)


@pytest.mark.parametrize(
    "value",
    [
        collections.OrderedDict,
        collections.Counter,
        collections.UserDict,
        collections.deque,
        http.HTTPStatus,
        importlib.import_module("json").JSONDecodeError,
        importlib.import_module("http.server").ThreadingHTTPServer,
        importlib.import_module("datetime").datetime,
        importlib.import_module("random").SystemRandom,
        importlib.import_module("concurrent.futures").ThreadPoolExecutor,
        importlib.import_module("csv").excel_tab,
        FileNotFoundError,
        bool,
    ],
)
def test_bases_are_the_interpreters_own(symbols: dict[str, Symbol], value: type) -> None:
    names = [name for name in symbols if name.rpartition(".")[2] == value.__name__ and symbols[name].kind == "class"]
    expected = [base.__name__ for base in value.__bases__]
    assert [base.rpartition(".")[2] for base in symbols[names[0]].bases] == expected


def test_bases_of_other_modules_are_named_where_they_are_public(symbols: dict[str, Symbol]) -> None:
    assert symbols["collections.UserDict"].bases == ("collections.abc.MutableMapping",)
    assert symbols["concurrent.futures.ThreadPoolExecutor"].bases == ("concurrent.futures.Executor",)


def test_symbols_are_public_sorted_and_the_same_each_time(symbols: dict[str, Symbol]) -> None:
    names = list(symbols)
    assert names == sorted(names)
    assert not [name for name in names if any(part.startswith("_") for part in name.split("."))]
    assert library_symbols(["json"]) == [symbol for symbol in symbols.values() if symbol.package == "json"]
    assert {symbols[name].kind for name in ("json", "json.dumps", "json.JSONDecoder", "json.JSONDecoder.decode")} == {
        "module",
        "function",
        "class",
        "method",
    }


def test_aliases_share_a_family(symbols: dict[str, Symbol]) -> None:
    assert symbols["json.JSONDecoder"].family == symbols["json.decoder.JSONDecoder"].family
    assert symbols["json.JSONDecoder.decode"].family == symbols["json.JSONDecoder"].family
    assert symbols["io.BlockingIOError"].family == symbols["BlockingIOError"].family
    assert symbols["io.open"].family == symbols["open"].family
    assert symbols["json.dumps"].source.startswith("def dumps(")


def test_no_module_acts_while_it_is_read() -> None:
    packages = ["tkinter", "turtle", "unittest", "webbrowser", "pydoc", "sqlite3", "ctypes"]
    program = (
        "import sys; from examples.stdlib_agent.stdlib import library_symbols; before = set(sys.modules); "
        f"count = len(library_symbols({packages})); "
        f"acting = {{*{packages}, 'antigravity', 'this', 'idlelib', 'readline'}}; "
        "print(count, *acting & set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    count, *loaded = done.stdout.split()
    assert int(count) > 500
    assert loaded == []
    assert done.stderr == ""


def test_an_unknown_package_is_named() -> None:
    with pytest.raises(InputError, match=r"^params\.yaml: collect\.modules: 'jsn' is not in the standard library"):
        library_symbols(["json", "jsn"])
