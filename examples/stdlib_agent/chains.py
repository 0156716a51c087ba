"""Questions that take two or three calls: the result of one tool is the argument of the next.

*Which module defines the class that OrderedDict extends?* needs `bases`, then `module`. Such wordings are composed: a
frame for the last tool, around a noun for each tool before it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from examples.stdlib_agent import inventions
from examples.stdlib_agent.dialogue import Hop
from examples.stdlib_agent.phrasings import template_groups, templates
from examples.stdlib_agent.questions import MADE_UP_SHARE, Asker, Manner, Question, written
from examples.stdlib_agent.stdlib import Symbol
from examples.stdlib_agent.tasks import as_task, task
from examples.stdlib_agent.wordings import Wordings, quoted

Chain = tuple[str, ...]
"""Tools in the order of their calls."""

CHAINS: dict[Chain, int] = {
    ("bases", "module"): 24,
    ("bases", "lookup"): 21,
    ("bases", "bases"): 15,
    ("search", "module"): 14,
    ("module", "lookup"): 9,
    ("bases", "bases", "module"): 6,
    ("bases", "bases", "lookup"): 6,
    ("bases", "module", "lookup"): 5,
}
"""Questions for each chain, in a hundred."""
ENDS_EARLY = 0.12
"""Share of made-up chains in which a call may find nothing, fail or find several."""
TRIES = 200
"""Draws for a real chain without held-out symbols."""


class Chains:
    """Generates questions for chains about symbols and descriptions."""

    def __init__(self, asker: Asker, seed: int) -> None:
        self.asker = asker
        self.wordings = {chain: Wordings(composed(chain), seed) for chain in CHAINS}
        held_out = asker.held_out
        self._pools = {chain: fit(chain, held_out.train) for chain in CHAINS}
        self._unseen = {symbol.name for symbol in (*held_out.symbols, *held_out.modules)}
        everything = (*held_out.train, *held_out.symbols, *held_out.modules)
        self._summarized = {symbol.name for symbol in everything if symbol.summary}

    def any_question(self, manner: Manner) -> Question:
        """One training question, real or made up."""
        rng = manner.rng
        chain = rng.choices(list(CHAINS), list(CHAINS.values()))[0]
        pool = self._pools[chain]
        if not pool or rng.random() < MADE_UP_SHARE:
            return self._made_up(manner, chain)
        for _ in range(TRIES):
            question = self.about(manner, chain, rng.choice(pool))
            if not self._unseen & {self.asker.knowledge.full_name(hop.argument) for hop in question.hops}:
                return question
        return self._made_up(manner, chain)

    def about(self, manner: Manner, chain: Chain, symbol: Symbol, by_hand: Sequence[str] = ()) -> Question:
        """A question whose answer is the tools' own; wordings `by_hand` are used as they are."""
        rng = manner.rng
        searched = chain[0] == "search"
        first = task(symbol) if searched else written(rng, symbol, self.asker.knowledge)
        slots = {"q": first} if searched else {"x": quoted(rng, first)}
        text = rng.choice(by_hand).format(**slots) if by_hand else manner.put(self.wordings[chain], **slots)
        return Question(text, self.walk(chain, first))

    def walk(self, chain: Chain, argument: str) -> tuple[Hop, ...]:
        """The real calls, each with the result of the previous one; fewer where a result has no single name."""
        hops: list[Hop] = []
        for tool in chain:
            hops.append(Hop(tool, argument, self.asker.tool_result(tool, argument)))
            argument = hops[-1].next_argument
            if not argument:
                break
        return tuple(hops)

    def whole(self, chain: Chain, pool: Sequence[Symbol]) -> list[Symbol]:
        """The symbols for which every call succeeds; a final summary is a plain short sentence."""
        return [symbol for symbol in fit(chain, pool) if self._is_whole(chain, symbol)]

    def _is_whole(self, chain: Chain, symbol: Symbol) -> bool:
        hops = self.walk(chain, task(symbol) if chain[0] == "search" else symbol.name)
        whole = len(hops) == len(chain) and hops[-1].next_argument != ""
        return whole and (
            chain[-1] != "lookup" or self.asker.knowledge.full_name(hops[-1].argument) in self._summarized
        )

    def _made_up(self, manner: Manner, chain: Chain) -> Question:
        rng = manner.rng
        summary = inventions.deed(rng)
        first = as_task(summary) if chain[0] == "search" else inventions.any_name(rng)
        slots = {"q": first} if chain[0] == "search" else {"x": quoted(rng, first)}
        hops: list[Hop] = []
        argument = first
        for tool in chain:
            hops.append(Hop(tool, argument, self._made_up_result(rng, tool, argument, summary)))
            argument = hops[-1].next_argument
            if not argument:
                break
        return Question(manner.put(self.wordings[chain], **slots), tuple(hops))

    def _made_up_result(self, rng: random.Random, tool: str, argument: str, summary: str) -> str:
        if tool == "search":
            return f"{inventions.dotted_name(rng, inventions.function_name(rng))}: {summary}"
        if rng.random() < ENDS_EARLY:
            return self.asker.made_up_result(rng, tool, argument)
        if tool == "bases":
            return inventions.base_names(rng)[0]
        return self.asker.made_up_result(rng, tool, argument, succeeds=True)


def fit(chain: Chain, pool: Sequence[Symbol]) -> list[Symbol]:
    """Symbols that the first call of a chain can be about."""
    if chain[0] == "search":
        return [symbol for symbol in pool if task(symbol)]
    if chain[0] == "bases":
        return [symbol for symbol in pool if symbol.kind == "class" and symbol.bases not in ((), ("object",))]
    return [symbol for symbol in pool if symbol.kind != "module"]


def composed(chain: Chain) -> list[str]:
    """The templates of a chain, with a slot for what its first call is about."""
    inner = template_groups("nouns")[chain[0]]
    for tool in chain[1:-1]:
        inner = [noun.replace("{x}", part) for noun in template_groups("outer_nouns")[tool] for part in inner]
    frames = templates("module") if chain[-1] == "module" else template_groups("frames")[chain[-1]]
    # "the class that X extends's module" is no English.
    frames = [frame for frame in frames if "{x}'s" not in frame]
    templates_of_chain = [frame.replace("{x}", noun) for frame in frames for noun in inner]
    shortcuts = template_groups("shortcuts").get(" ".join(chain), [])
    # Users rather write "the grandparent": half as often as all composed templates.
    return templates_of_chain + shortcuts * (len(templates_of_chain) // (2 * len(shortcuts)) if shortcuts else 0)
