"""The held-out suites: questions about symbols, packages, operands and in wordings that training never saw.

The name of a suite is SKILL/WHAT_IS_HELD_OUT. The expected answer is the last message of the conversation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from components.datasets.formats import Row
from examples.stdlib_agent.chains import CHAINS, Chain, Chains
from examples.stdlib_agent.conversations import MAX_CHARACTERS, any_answer, replayed
from examples.stdlib_agent.dialogue import Hop, Message, exchange, row, turn, user_text
from examples.stdlib_agent.forms import in_form
from examples.stdlib_agent.held_out import is_askable_class
from examples.stdlib_agent.phrasings import hand_written
from examples.stdlib_agent.questions import SYMBOL_TOOLS, Asker, Manner, written
from examples.stdlib_agent.stdlib import Symbol
from examples.stdlib_agent.tasks import task
from examples.stdlib_agent.wordings import quoted

LATER = {
    *(f"{skill}/held_out_symbols" for skill in (*SYMBOL_TOOLS, "search", "multi_hop")),
    *("arithmetic/unseen_operands", "small_talk/unseen_wordings", "off_topic/unseen_wordings"),
}
"""Suites whose questions are also put behind another."""
TRIES = 1_000
"""Draws for one that is short enough to stand before another."""
Maker = Callable[[random.Random, int], list[Message]]
"""Makes the question of a number."""


def suites(asker: Asker, count: int, seed: int) -> Iterator[Row]:
    """Up to `count` questions per suite, no two asking the same; no suite where there is nothing to ask about."""
    for name, make in _makers(asker, seed).items():
        rng = random.Random(f"{seed}:{name}")
        seen: set[str] = set()
        for number in range(count * 3):
            messages = make(rng, number)
            if user_text(messages) not in seen:
                seen.add(user_text(messages))
                yield row(messages, suite=name)
            if len(seen) == count:
                break


def _makers(asker: Asker, seed: int) -> dict[str, Maker]:
    makers: dict[str, Maker] = {}
    for tool in SYMBOL_TOOLS:
        for part, held_out in (("symbols", asker.held_out.symbols), ("modules", asker.held_out.modules)):
            if pool := _fit(asker, tool, held_out):
                makers[f"{tool}/held_out_{part}"] = _about_symbols(asker, tool, pool)
        if pool:
            makers[f"{tool}/held_out_modules_phrasings"] = _about_symbols(asker, tool, pool, held_out_wording=True)
            makers[f"{tool}/held_out_modules_hand_written"] = _hand_written(asker, tool, pool)
    formed = {name: make for name, make in makers.items() if name.endswith("/held_out_symbols")}
    if formed:
        makers["form/held_out_symbols"] = _in_form(list(formed.values()))
    if tasks := [symbol for symbol in _fit(asker, "lookup", asker.held_out.symbols) if task(symbol)]:
        makers["search/held_out_symbols"] = lambda rng, number: asker.searching(
            Manner(rng), tasks[number % len(tasks)], real=True
        ).messages()
        makers["search/held_out_symbols_hand_written"] = _hand_written_search(asker, tasks)
    chains = Chains(asker, seed)
    makers |= _multi_hop(chains) | _arithmetic(asker) | _talks(asker)
    later = [make for name, make in makers.items() if name in LATER]
    return makers | {"later_question/held_out_symbols": _later(chains, later)}


def _later(chains: Chains, makers: Sequence[Maker]) -> Maker:
    """Questions of other suites by turns, behind another one that was answered and has nothing to do with them."""

    def make(rng: random.Random, number: int) -> list[Message]:
        last = makers[number % len(makers)](rng, number // len(makers))
        for _ in range(TRIES):
            first = any_answer(chains.asker, chains, Manner(rng), 1 + len(last))
            messages = replayed(rng, first) + last
            if sum(len(message["content"]) for message in messages) <= MAX_CHARACTERS:
                return messages
        return last  # so long that nothing fits before it

    return make


def _fit(asker: Asker, tool: str, pool: Sequence[Symbol]) -> list[Symbol]:
    """Symbols worth asking about, in a fixed disorder; none whose summary training has, for another symbol."""
    if tool == "bases":
        fit = [symbol for symbol in pool if is_askable_class(symbol)]
    elif tool == "module":
        fit = [symbol for symbol in pool if symbol.kind != "module"]
    else:
        known = set(asker.summaries)
        fit = [symbol for symbol in pool if symbol.summary and symbol.summary not in known]
    return random.Random(len(fit)).sample(fit, len(fit))


def _about_symbols(asker: Asker, tool: str, pool: Sequence[Symbol], held_out_wording: bool = False) -> Maker:
    return lambda rng, number: asker.about_symbol(
        Manner(rng, held_out_wording), tool, pool[number % len(pool)]
    ).messages()


def _in_form(makers: Sequence[Maker]) -> Maker:
    """Questions of other suites by turns, to be answered in JSON."""
    return lambda rng, number: in_form(rng, makers[number % len(makers)](rng, number // len(makers)))


def _hand_written(asker: Asker, tool: str, pool: Sequence[Symbol]) -> Maker:
    def make(rng: random.Random, number: int) -> list[Message]:
        name = written(rng, pool[number % len(pool)], asker.knowledge)
        text = rng.choice(hand_written(tool)).format(x=quoted(rng, name))
        return exchange(text, [Hop(tool, name, asker.tool_result(tool, name))])

    return make


def _hand_written_search(asker: Asker, pool: Sequence[Symbol]) -> Maker:
    def make(rng: random.Random, number: int) -> list[Message]:
        subject = task(pool[number % len(pool)])
        text = rng.choice(hand_written("search")).format(q=subject)
        return exchange(text, [Hop("search", subject, asker.tool_result("search", subject))])

    return make


def _multi_hop(chains: Chains) -> dict[str, Maker]:
    """Questions of two and three calls, in the proportions of training."""
    held_out = chains.asker.held_out
    makers: dict[str, Maker] = {}
    for part, pool in (("symbols", held_out.symbols), ("modules", held_out.modules)):
        about = {
            chain: random.Random(len(fit)).sample(fit, len(fit))
            for chain in CHAINS
            if (fit := chains.whole(chain, pool))
        }
        if about:
            makers[f"multi_hop/held_out_{part}"] = _chained(chains, about)
    if about:
        makers["multi_hop/held_out_modules_phrasings"] = _chained(chains, about, held_out_wording=True)
        by_hand = {tuple(tools.split()): texts for tools, texts in hand_written("multi_hop").items()}
        makers["multi_hop/held_out_modules_hand_written"] = _chained(chains, about, by_hand=by_hand)
    return makers


def _chained(
    chains: Chains,
    about: Mapping[Chain, Sequence[Symbol]],
    held_out_wording: bool = False,
    by_hand: Mapping[Chain, Sequence[str]] = MappingProxyType({}),
) -> Maker:
    def make(rng: random.Random, number: int) -> list[Message]:
        chain = rng.choices(list(about), [CHAINS[chain] for chain in about])[0]
        symbol = about[chain][number % len(about[chain])]
        return chains.about(Manner(rng, held_out_wording), chain, symbol, by_hand.get(chain, ())).messages()

    return make


def _arithmetic(asker: Asker) -> dict[str, Maker]:
    by_hand = hand_written("arithmetic")
    return {
        "arithmetic/unseen_operands": lambda rng, _: asker.calculation(Manner(rng), held_out=True).messages(),
        "arithmetic/unseen_phrasings": lambda rng, _: asker.calculation(Manner(rng, True), held_out=True).messages(),
        "arithmetic/hand_written": lambda rng, _: asker.calculation(Manner(rng), True, by_hand).messages(),
    }


def _talks(asker: Asker) -> dict[str, Maker]:
    by_hand = [(talk, text) for talk in asker.small_talk for text in hand_written("small_talk")[talk.intent]]
    off_topic = [(talk, text) for talk in asker.off_topic for text in hand_written(talk.intent)]
    return {
        "small_talk/unseen_wordings": lambda rng, number: asker.talk(
            Manner(rng, True), asker.small_talk[number % len(asker.small_talk)]
        ),
        "off_topic/unseen_wordings": lambda rng, _: asker.talk(Manner(rng, True), rng.choice(asker.off_topic)),
    } | {
        f"{skill}/hand_written": lambda rng, number, pairs=pairs: [
            turn("user", pairs[number % len(pairs)][1]),
            turn("assistant", pairs[number % len(pairs)][0].reply),
        ]
        for skill, pairs in (("small_talk", by_hand), ("off_topic", off_topic))
    }
