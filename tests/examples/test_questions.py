"""Training conversations and suites: correct calls, correct answers, nothing of one in the other."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from components.agent.saved_tools import as_tools
from components.agent.tools import Tool, call
from components.config.params import InputError
from components.datasets.formats import Row
from components.tokenization.response_format import format_message
from examples.stdlib_agent import agent_tools
from examples.stdlib_agent.chains import CHAINS, Chains, composed
from examples.stdlib_agent.conversations import MAX_CHARACTERS, training_conversations
from examples.stdlib_agent.dialogue import ERROR, Hop, answer, arguments, exchange, user_text
from examples.stdlib_agent.facts import build
from examples.stdlib_agent.forms import KEYS
from examples.stdlib_agent.held_out import HeldOut, hold_out
from examples.stdlib_agent.knowledge import NOT_FOUND, Knowledge
from examples.stdlib_agent.phrasings import hand_written, talks, templates
from examples.stdlib_agent.questions import SYMBOL_TOOLS, Asker
from examples.stdlib_agent.stdlib import library_symbols
from examples.stdlib_agent.suites import suites
from examples.stdlib_agent.wordings import Wordings

PACKAGES = ["builtins", "calendar", "collections", "concurrent", "csv", "email", "heapq", "io", "json", "os", "xml"]
COUNT = 40


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("questions") / "knowledge.sqlite"


@pytest.fixture(scope="module")
def held_out(path: Path) -> HeldOut:
    symbols = library_symbols(PACKAGES)
    build(path, symbols)
    return hold_out(symbols, 0.12, COUNT, 0)


@pytest.fixture(scope="module")
def asker(held_out: HeldOut, path: Path) -> Asker:
    return Asker(held_out, Knowledge(path), 0.12, 0)


@pytest.fixture(scope="module")
def tools(asker: Asker, path: Path) -> list[Tool]:
    return as_tools(agent_tools.tools(path.parent))


@pytest.fixture(scope="module")
def tests(asker: Asker) -> list[Row]:
    return list(suites(asker, COUNT, 0))


@pytest.fixture(scope="module")
def training(asker: Asker, tests: list[Row]) -> list[Row]:
    return list(training_conversations(asker, 3000, 0, {user_text(row["messages"]) for row in tests}))


def last_question(row: Row) -> Row:
    """The row from its last question on."""
    messages = row["messages"]
    start = max(place for place, message in enumerate(messages) if message["role"] == "user")
    return row | {"messages": messages[start:]}


def calls(row: Row) -> list[tuple[str, dict[str, str]]]:
    functions = [one["function"] for message in row["messages"] for one in message["tool_calls"] or []]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


def trained_on(rows: list[Row]) -> set[str]:
    return {argument for row in rows for argument in arguments(row["messages"])}


def test_there_are_as_many_as_asked_for_and_no_two_alike(training: list[Row]) -> None:
    assert len(training) == 3000
    assert len({user_text(row["messages"]) for row in training}) == len({row["id"] for row in training}) == 3000


def test_every_skill_has_its_suite(tests: list[Row]) -> None:
    counts = Counter(row["suite"] for row in tests)
    skills = ("lookup", "bases", "module", "multi_hop")
    whole = [f"{skill}/{part}" for skill in skills for part in ("held_out_symbols", "held_out_modules")]
    whole += [f"{skill}/held_out_modules_{how}" for skill in skills for how in ("phrasings", "hand_written")]
    whole += ["search/held_out_symbols", "search/held_out_symbols_hand_written", "arithmetic/unseen_operands"]
    whole += ["arithmetic/unseen_phrasings", "arithmetic/hand_written", "form/held_out_symbols"]
    whole += ["later_question/held_out_symbols"]
    whole += ["small_talk/unseen_wordings", "off_topic/unseen_wordings"]
    assert {name: counts[name] for name in whole} == dict.fromkeys(whole, COUNT)
    assert set(counts) == {*whole, "small_talk/hand_written", "off_topic/hand_written"}
    assert counts["off_topic/hand_written"] == min(COUNT, len(hand_written("off_topic")))


def test_no_test_question_symbol_or_package_is_trained_on(
    tests: list[Row], training: list[Row], held_out: HeldOut
) -> None:
    assert not {user_text(row["messages"]) for row in tests} & {user_text(row["messages"]) for row in training}
    unseen = {symbol.name for symbol in (*held_out.symbols, *held_out.modules)}
    assert trained_on(training) & unseen == set()
    said = "\n".join(message["content"] for row in training for message in row["messages"])
    known = {symbol.summary for symbol in held_out.train}
    summaries = {symbol.summary for symbol in held_out.symbols if symbol.summary} - known
    assert not [summary for summary in summaries if f"\n{summary}\n" in said]


def test_calls_of_tests_give_the_results_and_answers_they_state(tests: list[Row], tools: list[Tool]) -> None:
    for row in map(last_question, tests):  # what was asked before may be made up
        results = [message["content"] for message in row["messages"] if message["role"] == "tool"]
        for (name, given), result in zip(calls(row), results, strict=True):
            assert call(tools, name, given) == result
        said = row["messages"][-1]["content"]
        if results and row["suite"].startswith("form/"):
            assert answer(name, result) in json.loads(said).values()
        elif results:
            assert said == answer(name, result)


def test_a_form_is_filled_as_its_keys_say(training: list[Row], tests: list[Row]) -> None:
    formed = [row for row in [*training, *tests] if row["messages"][0]["role"] == "system"]
    assert 0.05 < sum(not row["suite"] for row in formed) / len(training) < 0.1
    keys = set()
    for row in formed:
        system, *_, last = row["messages"]
        results = [message["content"] for message in row["messages"] if message["role"] == "tool"]
        fields = json.loads(last["content"])
        assert system["content"] == format_message(fields)["content"]
        assert fields.pop("calls", len(results)) == len(results)
        found = bool(results) and not results[-1].startswith((NOT_FOUND, ERROR))
        assert fields.pop("found", found) == found
        [(key, words)] = fields.items()
        keys.add(key)
        assert words
        calls_of_row = calls(row)
        if results:
            assert words == answer(calls_of_row[-1][0], results[-1])
    assert keys == set(KEYS)


def test_each_call_of_a_chain_is_about_what_the_one_before_found(tests: list[Row], training: list[Row]) -> None:
    chains = Counter()
    for row in map(last_question, [*tests, *training]):
        if len(row["messages"]) < 6 or row["messages"][4]["role"] != "tool" or row["messages"][2]["role"] != "tool":
            continue
        results = [message["content"] for message in row["messages"] if message["role"] == "tool"]
        done = calls(row)
        for (name, _), result, (_, given) in zip(done[:-1], results[:-1], done[1:], strict=True):
            assert given == {"symbol": Hop(name, "", result).next_argument}
        chains[tuple(name for name, _ in done)] += 1
    assert set(chains) == set(CHAINS)
    assert chains.total() > 0.08 * len(training)


def test_questions_of_one_conversation_are_of_every_kind_and_order(training: list[Row], tests: list[Row]) -> None:
    pairs, counts = Counter[tuple[str, str]](), Counter[int]()
    for row in training:
        places = [place for place, message in enumerate(row["messages"]) if message["role"] == "user"]
        counts[len(places)] += 1
        if len(places) > 1:
            parts = [row["messages"][start:end] for start, end in zip(places, [*places[1:], None], strict=True)]
            names = [next((name for name, _ in calls({"messages": part})), "none") for part in parts]
            pairs.update(pairwise(names))
        numbers = [call["id"] for message in row["messages"] for call in message["tool_calls"] or []]
        assert len(numbers) == len(set(numbers))
    assert 0.1 < counts[2] / len(training) < 0.2
    assert 0 < counts[3] < counts[2] / 3
    kinds = {*SYMBOL_TOOLS, "search", "calculate", "none"}
    common = kinds - {"module", "search"}
    assert {(one, other) for one in common for other in common} <= set(pairs)
    later = [row for row in tests if row["suite"].startswith("later_question/")]
    assert {next((name for name, _ in calls(last_question(row))), "none") for row in later} == kinds


def test_a_chain_ends_where_a_call_finds_no_single_thing(asker: Asker) -> None:
    hops = Chains(asker, 0).walk(("bases", "lookup"), "collections.abc.Sequence")
    assert [hop.result for hop in hops] == ["Reversible and Collection"]
    assert exchange("?", hops)[-1]["content"] == "It extends Reversible and Collection."
    missing = Chains(asker, 0).walk(("bases", "module"), "json.nothing")
    assert exchange("?", missing)[-1]["content"] == "I could not find json.nothing."


def test_wordings_of_chains_have_one_slot_and_are_distinguished() -> None:
    seen: dict[str, tuple[str, ...]] = {}
    for tool in ("lookup", "bases", "module"):
        for template in templates(tool):
            seen.setdefault(template, (tool,))
    for chain in CHAINS:
        for template in set(composed(chain)):
            assert len(re.findall(r"{[xq]}", template)) == template.count("{") == 1, template
            assert seen.setdefault(template, chain) == chain, template


def test_sums_of_training_are_right(training: list[Row], tools: list[Tool]) -> None:
    results = [
        (given, shown["content"])
        for row in training
        for (name, given), shown in zip(calls(row), [m for m in row["messages"] if m["role"] == "tool"], strict=True)
        if name == "calculate"
    ]
    assert len(results) > 300
    assert all(call(tools, "calculate", given) == result for given, result in results)


def test_arguments_can_be_copied_from_what_the_user_says(training: list[Row], tests: list[Row]) -> None:
    for row in [*training, *tests]:
        for name, given in calls(row):
            if name != "calculate":
                shown = (message["content"] for message in row["messages"] if message["role"] in ("user", "tool"))
                assert any(next(iter(given.values())) in text for text in shown)


def test_half_of_the_names_are_made_up(training: list[Row], held_out: HeldOut) -> None:
    real = {symbol.name for symbol in held_out.train} | {symbol.name.rpartition(".")[2] for symbol in held_out.train}
    names = [
        value.removesuffix("()")
        for row in training
        for name, given in calls(row)
        if name in SYMBOL_TOOLS
        for value in given.values()
    ]
    # A real method may be asked for as Class.method.
    share = sum(not any(name == known or known.endswith(f".{name}") for known in real) for name in names) / len(names)
    assert 0.45 < share < 0.65


def test_small_talk_calls_nothing(training: list[Row], tests: list[Row]) -> None:
    replies = {talk.reply for talk in talks()}
    talk = [row for row in training if row["messages"][1]["content"] in replies]
    assert 0.15 < len(talk) / len(training) < 0.3
    assert not [row for row in tests if row["suite"].startswith(("small_talk", "off_topic")) and calls(row)]


def test_what_is_not_found_or_fails_is_reported(training: list[Row]) -> None:
    answers = [message["content"] for row in training for message in row["messages"] if message["role"] == "assistant"]
    assert sum(said.startswith("I could not find ") for said in answers) > 30
    assert sum(said.startswith("I could not do that: ") for said in answers) > 20


def test_conversations_are_short(training: list[Row], tests: list[Row]) -> None:
    def longest(rows: list[Row]) -> int:
        return max(sum(len(message["content"]) for message in row["messages"]) for row in rows)

    assert longest(training) <= MAX_CHARACTERS
    assert longest(tests) <= MAX_CHARACTERS


def test_phrasings_of_the_suite_are_held_out(asker: Asker, tests: list[Row], training: list[Row]) -> None:
    def wordings(rows: list[Row], tool: str) -> set[str]:
        """What is asked, with the symbol, quotes, capitals and marks taken off."""
        found = set()
        for row in rows:
            for name, given in calls(row)[:1]:
                if name == tool:
                    text = row["messages"][0]["content"].replace(given["symbol"], "{x}")
                    for quote in "'\"`":
                        text = text.replace(f"{quote}{{x}}{quote}", "{x}")
                    found.add(text.lower().rstrip("?!."))
        return found

    for tool in ("lookup", "bases"):
        asking: Wordings = asker.about[tool]
        held_out = wordings([row for row in tests if row["suite"] == f"{tool}/held_out_modules_phrasings"], tool)
        assert len([text for text in held_out if asking.is_held_out(text)]) > COUNT / 4
        assert not held_out & wordings(training, tool)


def test_the_seed_decides(asker: Asker, training: list[Row], tests: list[Row]) -> None:
    avoid = {user_text(row["messages"]) for row in tests}
    assert list(suites(asker, COUNT, 0)) == tests
    assert list(training_conversations(asker, 300, 0, avoid)) == training[:300]
    assert list(training_conversations(asker, 300, 1, avoid)) != training[:300]


def test_more_than_can_be_asked_is_refused(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}]
    monkeypatch.setattr("examples.stdlib_agent.conversations._conversation", lambda asker, chains, rng: talk)
    with pytest.raises(
        InputError, match=r"^params\.yaml: collect\.conversations: 9 is more than the 1 that can be made$"
    ):
        list(training_conversations(asker, 9, 0, set()))
