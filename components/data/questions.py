"""The reference conversations: questions that want a tool, small talk that wants none, and the held-out suites.

Half of the training conversations about symbols are of made-up names with made-up results, so that arguments and
answers can only be copied. A suite asks about what training never saw: symbols, packages, wordings, operands.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from components.config import InputError
from components.data import inventions
from components.data.arithmetic import calculate
from components.data.datasets import Row
from components.data.dialogue import ERROR, Message, asked, exchange, row, said
from components.data.held_out import HeldOut, is_askable_class
from components.data.knowledge import NOT_FOUND, Knowledge, listed
from components.data.phrasings import Talk, talks, template_groups, templates, words
from components.data.stdlib import Symbol
from components.data.summaries import shortened
from components.data.sums import Sums
from components.data.tasks import about, as_task, task
from components.data.wordings import Wordings, quoted, typed

MADE_UP_SHARE = 0.5
DISTURBED_SHARE = 0.25
OFF_TOPIC = "off_topic"
"""The intent of requests for something else than the agent is for."""
TRIES = 50
"""Draws for a question that was not asked before."""


@dataclass(frozen=True)
class Question:
    """What the user types, the call it wants and what the tool answers."""

    text: str
    tool: str
    argument: str
    result: str

    def messages(self, number: int = 1) -> list[Message]:
        return exchange(self.text, self.tool, self.argument, self.result, number)


@dataclass(frozen=True)
class Manner:
    """How a question is put: in words held out of training or not, with a slip or not."""

    rng: random.Random
    held_out: bool = False
    disturbed: bool = False

    def put(self, wordings: Wordings, **slots: str) -> str:
        return typed(self.rng, wordings.pick(self.rng, self.held_out), slots, self.disturbed)

    def chat(self, wordings: Wordings) -> str:
        return typed(self.rng, wordings.pick(self.rng, self.held_out), {}, self.disturbed, chat=True)


class Asker:
    """Puts questions about symbols, sums and anything else into words."""

    def __init__(self, held_out: HeldOut, knowledge: Knowledge, held_out_share: float, seed: int) -> None:
        self.held_out = held_out
        self.knowledge = knowledge
        self.sums = Sums(held_out_share, seed)
        self.lookup = Wordings(templates("lookup"), seed)
        self.bases = Wordings(templates("bases"), seed)
        self.search = Wordings(templates("search"), seed)
        self.search_about = Wordings(templates("search_about"), seed)
        self.follow_ups = {tool: Wordings(group, seed) for tool, group in template_groups("follow_ups").items()}
        self.talks = {talk: Wordings(talk.templates, seed) for talk in talks()}
        self.small_talk = [talk for talk in self.talks if talk.intent != OFF_TOPIC]
        self.off_topic = [talk for talk in self.talks if talk.intent == OFF_TOPIC]
        self.documented = [symbol for symbol in held_out.train if shortened(symbol.docstring)]
        self.summaries = [symbol.summary for symbol in held_out.train if symbol.summary]
        self.classes = [symbol for symbol in held_out.train if symbol.kind == "class" and symbol.bases]
        self.tasks = [symbol for symbol in held_out.train if task(symbol)]

    # -- questions about one symbol, real or made up

    def about_symbol(self, manner: Manner, tool: str, symbol: Symbol) -> Question:
        """A question whose answer is the tool's own."""
        name = written(manner.rng, symbol, self.knowledge)
        text = manner.put(self.lookup if tool == "lookup" else self.bases, x=quoted(manner.rng, name))
        try:
            result = self.knowledge.lookup(name) if tool == "lookup" else self.knowledge.bases(name)
        except InputError as error:
            result = f"{ERROR}{error}"
        return Question(text, tool, name, result)

    def made_up(self, manner: Manner, tool: str) -> Question:
        name = inventions.any_name(manner.rng)
        text = manner.put(self.lookup if tool == "lookup" else self.bases, x=quoted(manner.rng, name))
        return Question(text, tool, name, self._made_up_result(manner.rng, tool, name))

    def _made_up_result(self, rng: random.Random, tool: str, name: str) -> str:
        luck = rng.random()
        if luck < 0.1:
            return NOT_FOUND + name
        if luck < 0.15:
            kind = rng.choice(("function", "method", "module"))
            reasons = (f"{name} is a {kind}, not a class", f"the bases of {name} are computed when it is made")
            other = (
                f"{name} may be {listed([f'{inventions.word(rng)}.{name}' for _ in range(rng.choice((2, 3)))], 'or')}"
            )
            return ERROR + rng.choice((*reasons, other) if tool == "bases" else (other, _mishap(rng)))
        if tool == "bases":
            return listed(inventions.base_names(rng))
        if luck < 0.18:
            return f"{name} has no docstring."
        summary = inventions.sentence(rng, self.summaries)
        return f"{inventions.word(rng)}.{name}: {summary}" if "." not in name and rng.random() < 0.7 else summary

    # -- other questions

    def searching(self, manner: Manner, symbol: Symbol | None, real: bool = False) -> Question:
        """A question for what does something; `real` asks the index, else the answer is the symbol itself."""
        rng = manner.rng
        name, summary = (symbol.name, symbol.summary) if symbol else (inventions.any_name(rng), inventions.deed(rng))
        wanted = as_task(summary)
        by_subject = rng.random() < 0.35
        query = about(wanted) if by_subject else wanted
        text = manner.put(self.search_about, k=query) if by_subject else manner.put(self.search, q=query)
        if real:
            return Question(text, "search", query, self.knowledge.search(query))
        found = NOT_FOUND + query if symbol is None and rng.random() < 0.1 else f"{name}: {summary}"
        return Question(text, "search", query, found)

    def calculation(self, manner: Manner, held_out: bool = False) -> Question:
        while True:
            text, expression = self.sums.question(manner.rng, held_out, manner.held_out, manner.disturbed)
            try:
                return Question(text, "calculate", expression, calculate(expression))
            except InputError as error:
                if not held_out:
                    return Question(text, "calculate", expression, f"{ERROR}{error}")

    def talk(self, manner: Manner, talk: Talk) -> list[Message]:
        return [said("user", manner.chat(self.talks[talk])), said("assistant", talk.reply)]

    def any_question(self, manner: Manner) -> Question:
        """One training question in the proportions of the recipe."""
        rng = manner.rng
        invented = rng.random() < MADE_UP_SHARE
        kind = rng.choices(("lookup", "bases", "search", "calculate"), (36, 33, 9, 17))[0]
        if kind == "calculate":
            return self.calculation(manner)
        if kind == "search":
            return self.searching(manner, None if invented or not self.tasks else rng.choice(self.tasks))
        if invented:
            return self.made_up(manner, kind)
        # Some ask for the bases of what is no class, and hear so.
        pool = self.classes if kind == "bases" and rng.random() > 0.03 else self.documented
        return self.about_symbol(manner, kind, rng.choice(pool))

    def follow_up(self, manner: Manner, first: Question) -> Question:
        """The other question about the symbol of the first, as `it`."""
        tool = "bases" if first.tool == "lookup" else "lookup"
        result = self._made_up_result(manner.rng, tool, first.argument)
        return Question(manner.put(self.follow_ups[tool]), tool, first.argument, result)


def training_conversations(asker: Asker, count: int, seed: int, avoid: set[str]) -> Iterator[Row]:
    """Exactly `count` conversations, no two asking the same, none asking what is in `avoid`."""
    rng = random.Random(f"{seed}:train")
    seen = set(avoid)
    for number in range(count):
        for _ in range(TRIES):
            messages = _conversation(asker, rng)
            if asked(messages) not in seen:
                break
        else:
            raise InputError(f"params.yaml: collect.conversations: {count} is more than the {number} that can be made")
        seen.add(asked(messages))
        yield row(messages)


def _conversation(asker: Asker, rng: random.Random) -> list[Message]:
    manner = Manner(rng, disturbed=rng.random() < DISTURBED_SHARE)
    kind = rng.choices(("question", "small_talk", "off_topic", "two", "chat_first", "follow_up"), (70, 9, 9, 5, 3, 4))[
        0
    ]
    if kind == "small_talk":
        return asker.talk(manner, rng.choice(asker.small_talk))
    if kind == "off_topic":
        return asker.talk(manner, rng.choice(asker.off_topic))
    if kind == "chat_first":
        return asker.talk(manner, rng.choice(list(asker.talks))) + asker.any_question(manner).messages()
    if kind == "two":
        return asker.any_question(manner).messages() + _second(asker, manner)
    if kind == "follow_up":
        first = asker.made_up(manner, rng.choice(("lookup", "bases")))
        if not first.result.startswith((NOT_FOUND, ERROR)):
            return first.messages() + asker.follow_up(manner, first).messages(2)
    return asker.any_question(manner).messages()


def _second(asker: Asker, manner: Manner) -> list[Message]:
    if manner.rng.random() < 0.3:
        return asker.talk(manner, manner.rng.choice(list(asker.talks)))
    return asker.any_question(manner).messages(2)


def suites(asker: Asker, count: int, seed: int) -> Iterator[Row]:
    """The held-out questions: up to `count` per suite, no two asking the same."""
    for name, make in _makers(asker).items():
        rng = random.Random(f"{seed}:{name}")
        seen: set[str] = set()
        for number in range(count * 3):
            messages = make(rng, number)
            if messages is None or len(seen) == count:
                break
            if asked(messages) not in seen:
                seen.add(asked(messages))
                yield row(messages, suite=name)


Maker = Callable[[random.Random, int], "list[Message] | None"]


def _makers(asker: Asker) -> dict[str, Maker]:
    """How each suite makes its next question; None where the library has nothing to ask about."""
    known = set(asker.summaries)
    makers: dict[str, Maker] = {}
    for tool in ("lookup", "bases"):
        for part, pool in (("symbols", asker.held_out.symbols), ("modules", asker.held_out.modules)):
            fit = [
                s for s in pool if (is_askable_class(s) if tool == "bases" else s.summary and s.summary not in known)
            ]
            makers[f"{tool}/held_out_{part}"] = _symbol_maker(asker, tool, fit, False)
        makers[f"{tool}/held_out_modules_phrasings"] = _symbol_maker(asker, tool, fit, True)
    tasks = [symbol for symbol in asker.held_out.symbols if task(symbol) and symbol.summary not in known]
    makers["search/held_out_symbols"] = _search_maker(asker, tasks)
    makers["arithmetic/unseen_operands"] = lambda rng, _: asker.calculation(Manner(rng), held_out=True).messages()
    makers["arithmetic/unseen_phrasings"] = lambda rng, _: asker.calculation(
        Manner(rng, True), held_out=True
    ).messages()
    makers["small_talk/unseen_wordings"] = lambda rng, number: asker.talk(
        Manner(rng, True), asker.small_talk[number % len(asker.small_talk)]
    )
    makers["off_topic/unseen_wordings"] = lambda rng, _: asker.talk(Manner(rng, True), rng.choice(asker.off_topic))
    return makers


def _symbol_maker(asker: Asker, tool: str, pool: Sequence[Symbol], held_out_wording: bool) -> Maker:
    def make(rng: random.Random, number: int) -> list[Message] | None:
        if not pool:
            return None
        order = random.Random(f"{number // len(pool)}").sample(pool, len(pool))
        return asker.about_symbol(Manner(rng, held_out_wording), tool, order[number % len(pool)]).messages()

    return make


def _search_maker(asker: Asker, pool: Sequence[Symbol]) -> Maker:
    def make(rng: random.Random, number: int) -> list[Message] | None:
        return asker.searching(Manner(rng), rng.choice(pool), real=True).messages() if pool else None

    return make


def written(rng: random.Random, symbol: Symbol, knowledge: Knowledge) -> str:
    """A symbol's name as people write it: in full, or short where it means nothing else; some with ()."""
    parts = symbol.name.split(".")
    name = symbol.name
    if len(parts) > 1 and rng.random() < 0.22:
        short = ".".join(parts[-2:]) if symbol.kind == "method" else parts[-1]
        name = short if knowledge.means_one(short) else name
    return f"{name}()" if symbol.kind in ("function", "method") and rng.random() < 0.04 else name


def _mishap(rng: random.Random) -> str:
    state = rng.choice(("locked", "closed", "busy", "empty", "broken", "missing"))
    return rng.choice(
        (
            f"the {rng.choice(words('nouns'))} is {state}",
            f"no answer after {rng.randrange(2, 60)} seconds",
            f"argument {inventions.word(rng)!r} is missing",
            f"unknown argument {inventions.word(rng)!r}",
            f"{inventions.class_name(rng)}Error",
        )
    )
