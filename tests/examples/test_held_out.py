"""Training, held-out symbols and held-out packages share no definition."""

from collections import Counter

import pytest

from examples.stdlib_agent.areas import area
from examples.stdlib_agent.held_out import HeldOut, draw_definitions, hold_out, is_askable_class, one_name_each
from examples.stdlib_agent.stdlib import Symbol, library_symbols


@pytest.fixture(scope="module")
def symbols() -> list[Symbol]:
    return library_symbols()


@pytest.fixture(scope="module")
def parts(symbols: list[Symbol]) -> HeldOut:
    return hold_out(symbols, 0.12, 320, 0)


def test_parts_share_no_definition(parts: HeldOut) -> None:
    train, held_out, modules = (
        {symbol.family for symbol in part} for part in (parts.train, parts.symbols, parts.modules)
    )
    assert not train & held_out
    assert not train & modules
    assert not held_out & modules
    assert {symbol.package for symbol in parts.modules} == parts.packages
    assert not {symbol.package for symbol in parts.train} & parts.packages


def test_enough_is_held_out_for_every_suite(parts: HeldOut, symbols: list[Symbol]) -> None:
    summaries = sum(bool(symbol.summary) for symbol in parts.modules)
    assert summaries >= 320
    assert sum(map(is_askable_class, parts.modules)) >= 110
    assert sum(bool(symbol.summary) for symbol in parts.symbols) >= 320
    assert len(parts.train) > 0.6 * len(one_name_each(symbols))


def test_each_area_gives_about_its_share_and_never_all(parts: HeldOut) -> None:
    held, trained = (Counter(map(area, part)) for part in (parts.symbols, parts.train))
    for name, count in trained.items():
        share = held[name] / (held[name] + count)
        assert share <= 0.24 or held[name] == 1, name
        if count > 40:
            assert share > 0.04, name


def test_the_only_definition_of_an_area_is_not_drawn(symbols: list[Symbol]) -> None:
    alone = [symbol for symbol in symbols if symbol.family == symbols[0].family]
    assert draw_definitions(alone, 0.5, "0") == frozenset()


def test_the_choice_is_fixed_by_the_seed(symbols: list[Symbol], parts: HeldOut) -> None:
    assert hold_out(symbols, 0.12, 320, 0) == parts
    assert hold_out(symbols, 0.12, 320, 1).packages != parts.packages


def test_a_single_package_is_never_held_out_whole() -> None:
    parts = hold_out(library_symbols(["json"]), 0.12, 20, 0)
    assert parts.packages == frozenset()
    assert parts.train


def test_each_object_has_one_name_its_shortest(symbols: list[Symbol]) -> None:
    names = {symbol.name for symbol in one_name_each(symbols)}
    assert "json.JSONDecoder" in names
    assert "json.decoder.JSONDecoder" not in names
    assert "json.JSONDecoder.decode" in names
    assert "os.path.join" in names
