"""Questions for one tool, about symbols, sums and descriptions, real or made up; and small talk without tools."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from components.config.params import InputError
from examples.stdlib_agent import inventions
from examples.stdlib_agent.arithmetic import calculate
from examples.stdlib_agent.dialogue import ERROR, Hop, Message, exchange, turn
from examples.stdlib_agent.held_out import HeldOut
from examples.stdlib_agent.knowledge import NOT_FOUND, Knowledge, listed
from examples.stdlib_agent.phrasings import Talk, talks, template_groups, templates, words
from examples.stdlib_agent.stdlib import Symbol
from examples.stdlib_agent.summaries import shortened
from examples.stdlib_agent.sums import Sums
from examples.stdlib_agent.tasks import about, as_task, task
from examples.stdlib_agent.wordings import Wordings, quoted, typed

TOOLS = {"lookup": 32, "bases": 26, "module": 8, "search": 10, "calculate": 24}
"""Questions for each tool, in a hundred."""
MADE_UP_SHARE = 0.5
SYMBOL_TOOLS = ("lookup", "bases", "module")
"""The tools whose argument is a symbol."""
OFF_TOPIC = "off_topic"
"""The intent of requests outside the agent's task."""


@dataclass(frozen=True)
class Question:
    """The user's text, its tool calls and their results."""

    text: str
    hops: tuple[Hop, ...]

    @classmethod
    def of(cls, text: str, tool: str, argument: str, result: str) -> Question:
        """A question that a single call answers."""
        return cls(text, (Hop(tool, argument, result),))

    def messages(self, number: int = 1) -> list[Message]:
        return exchange(self.text, self.hops, number)


@dataclass(frozen=True)
class Manner:
    """The style of a question: a wording held out of training or not, with a typing error or not."""

    rng: random.Random
    held_out: bool = False
    disturbed: bool = False

    def put(self, wordings: Wordings, **slots: str) -> str:
        return typed(self.rng, wordings.pick(self.rng, self.held_out), slots, self.disturbed)

    def chat(self, wordings: Wordings) -> str:
        return typed(self.rng, wordings.pick(self.rng, self.held_out), {}, self.disturbed, chat=True)


class Asker:
    """Generates questions about symbols, sums and anything else."""

    def __init__(self, held_out: HeldOut, knowledge: Knowledge, held_out_share: float, seed: int) -> None:
        self.held_out = held_out
        self.knowledge = knowledge
        self.sums = Sums(held_out_share, seed)
        self.arithmetic = Wordings(templates("arithmetic"), seed)
        self.about = {tool: Wordings(templates(tool), seed) for tool in SYMBOL_TOOLS}
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
        text = manner.put(self.about[tool], x=quoted(manner.rng, name))
        return Question.of(text, tool, name, self.tool_result(tool, name))

    @lru_cache(maxsize=20_000)  # noqa: B019 - the asker lives as long as the stage
    def tool_result(self, tool: str, argument: str) -> str:
        """The tool's real result."""
        knowledge = self.knowledge
        ask = {"lookup": knowledge.lookup, "bases": knowledge.bases, "module": knowledge.module}
        try:
            return ask[tool](argument) if tool in ask else knowledge.search(argument)
        except InputError as error:
            return f"{ERROR}{error}"

    def made_up(self, manner: Manner, tool: str) -> Question:
        rng = manner.rng
        typical = tool == "bases" and rng.random() < 0.7
        name = inventions.dotted_name(rng, inventions.class_name(rng)) if typical else inventions.any_name(rng)
        text = manner.put(self.about[tool], x=quoted(manner.rng, name))
        return Question.of(text, tool, name, self.made_up_result(manner.rng, tool, name))

    def made_up_result(self, rng: random.Random, tool: str, name: str, succeeds: bool = False) -> str:
        """A plausible result for a name that does not exist; with `succeeds`, neither "not found" nor an error."""
        luck = 1.0 if succeeds else rng.random()
        if luck < 0.1:
            return NOT_FOUND + name
        if luck < 0.15:
            return ERROR + _made_up_error(rng, tool, name)
        if tool == "bases":
            return listed(inventions.base_names(rng))
        if tool == "module":
            return inventions.module_name(rng, name)
        if luck < 0.18:
            return f"{name} has no docstring."
        summary = inventions.sentence(rng, self.summaries)
        return f"{inventions.word(rng)}.{name}: {summary}" if "." not in name and rng.random() < 0.7 else summary

    # -- other questions

    def searching(self, manner: Manner, symbol: Symbol | None, real: bool = False) -> Question:
        """A question for what does something; `real` asks the index, else the answer is the symbol itself."""
        rng = manner.rng
        name, summary = (symbol.name, symbol.summary) if symbol else (inventions.any_name(rng), inventions.deed(rng))
        goal = as_task(summary)
        subject = about(goal) if rng.random() < 0.35 else ""
        query = subject or goal
        text = manner.put(self.search_about, k=subject) if subject else manner.put(self.search, q=goal)
        if real:
            return Question.of(text, "search", query, self.tool_result("search", query))
        result = NOT_FOUND + query if symbol is None and rng.random() < 0.1 else f"{name}: {summary}"
        return Question.of(text, "search", query, result)

    def calculation(self, manner: Manner, held_out: bool = False, by_hand: Sequence[str] = ()) -> Question:
        """A sum, `held_out` with numbers that training never sees together; wordings `by_hand` are used as they are."""
        while True:
            drawn = self.sums.draw(manner.rng, held_out, orders=not manner.held_out and not by_hand)
            wording = drawn.order or self.arithmetic.pick(manner.rng, manner.held_out)
            text = typed(manner.rng, wording, drawn.slots, manner.disturbed)
            text = manner.rng.choice(by_hand).format(**drawn.slots) if by_hand else text
            try:
                return Question.of(text, "calculate", drawn.expression, calculate(drawn.expression))
            except InputError as error:
                if not held_out:
                    return Question.of(text, "calculate", drawn.expression, f"{ERROR}{error}")

    def talk(self, manner: Manner, talk: Talk) -> list[Message]:
        return [turn("user", manner.chat(self.talks[talk])), turn("assistant", talk.reply)]

    def any_question(self, manner: Manner) -> Question:
        """One training question in the proportions of the recipe."""
        rng = manner.rng
        invented = rng.random() < MADE_UP_SHARE
        kind = rng.choices(list(TOOLS), list(TOOLS.values()))[0]
        if kind == "calculate":
            return self.calculation(manner)
        if kind == "search":
            return self.searching(manner, None if invented or not self.tasks else rng.choice(self.tasks))
        if invented:
            return self.made_up(manner, kind)
        # Some ask for the bases of a symbol that is no class.
        pool = self.classes if kind == "bases" and rng.random() > 0.03 else self.documented
        return self.about_symbol(manner, kind, rng.choice(pool))

    def follow_up(self, manner: Manner, first: Question) -> Question:
        """Another question about the symbol of the first, as `it`."""
        tool = manner.rng.choice([tool for tool in SYMBOL_TOOLS if tool != first.hops[0].tool])
        name = first.hops[0].argument
        result = self.made_up_result(manner.rng, tool, name, succeeds=True)
        return Question.of(manner.put(self.follow_ups[tool]), tool, name, result)


def written(rng: random.Random, symbol: Symbol, knowledge: Knowledge) -> str:
    """A symbol's name as users write it: in full, or short where it is unambiguous; some with ()."""
    parts = symbol.name.split(".")
    name = symbol.name
    if len(parts) > 1 and rng.random() < 0.22:
        short = ".".join(parts[-2:]) if symbol.kind == "method" else parts[-1]
        name = short if knowledge.full_name(short) else name
    return f"{name}()" if symbol.kind in ("function", "method") and rng.random() < 0.04 else name


def _made_up_error(rng: random.Random, tool: str, name: str) -> str:
    several = f"{name} may be {listed([f'{inventions.word(rng)}.{name}' for _ in range(rng.choice((2, 3)))], 'or')}"
    if tool == "lookup":
        return rng.choice((several, _mishap(rng)))
    if tool == "module":
        return rng.choice((several, f"{name} is a module itself"))
    kind = rng.choice(("function", "method", "module"))
    return rng.choice((f"{name} is a {kind}, not a class", f"{name} has no bases that are written down", several))


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
