"""The reference conversations that the agent is trained on: questions of one call and of several, and small talk.

Half of those about symbols are of made-up names with made-up results, so that arguments and answers can only be copied.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from components.config.params import InputError
from components.datasets.formats import Row
from examples.stdlib_agent.chains import Chains
from examples.stdlib_agent.dialogue import ERROR, Message, arguments, in_words, row, user_text
from examples.stdlib_agent.forms import in_form
from examples.stdlib_agent.knowledge import NOT_FOUND
from examples.stdlib_agent.questions import SYMBOL_TOOLS, Asker, Manner

KINDS = {"question": 44, "chain": 24, "small_talk": 8, "off_topic": 8, "several": 11, "chat_first": 2, "follow_up": 3}
"""Conversations of each kind, in a hundred."""
ONE_ANSWER = ("question", "chain", "small_talk", "off_topic")
AMONG_SEVERAL = {"question": 55, "chain": 20, "small_talk": 15, "off_topic": 10}
"""Questions of each kind, in a hundred, of conversations with several."""
THIRD_SHARE = 0.25
"""Of these, that have three."""
IN_WORDS_SHARE = 0.6
"""Of the answers before the last one, those that stand without the calls that led to them."""
DISTURBED_SHARE = 0.25
FORM_SHARE = 0.08
"""Of the conversations of one answer, those that give it as JSON."""
MAX_CHARACTERS = 420
"""Of a conversation: some 200 tokens, so that it fits one row of training."""
TRIES = 50
"""Draws for a new question."""


def training_conversations(asker: Asker, count: int, seed: int, avoid: set[str]) -> Iterator[Row]:
    """Exactly `count` conversations with different questions, none in `avoid` or about held-out symbols."""
    rng = random.Random(f"{seed}:train")
    chains = Chains(asker, seed)
    seen = set(avoid)
    unseen = {symbol.name for symbol in (*asker.held_out.symbols, *asker.held_out.modules)}
    for number in range(count):
        for _ in range(TRIES):
            messages = _conversation(asker, chains, rng)
            short = sum(len(message["content"]) for message in messages) <= MAX_CHARACTERS
            # A made-up name can be that of a real symbol.
            if short and user_text(messages) not in seen and not unseen & arguments(messages):
                break
        else:
            raise InputError(f"params.yaml: collect.conversations: {count} is more than the {number} that can be made")
        seen.add(user_text(messages))
        yield row(messages)


def _conversation(asker: Asker, chains: Chains, rng: random.Random) -> list[Message]:
    manner = Manner(rng, disturbed=rng.random() < DISTURBED_SHARE)
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    if kind in ONE_ANSWER:
        messages = one_answer(asker, chains, manner, kind)
        return in_form(rng, messages) if rng.random() < FORM_SHARE else messages
    if kind == "chat_first":
        return asker.talk(manner, rng.choice(list(asker.talks))) + asker.any_question(manner).messages()
    if kind == "follow_up":
        first = asker.made_up(manner, rng.choice(SYMBOL_TOOLS))
        if first.hops[0].result.startswith((NOT_FOUND, ERROR)):
            return first.messages()
        return replayed(rng, first.messages()) + asker.follow_up(manner, first).messages(2)
    return several_questions(asker, chains, manner)


def several_questions(asker: Asker, chains: Chains, manner: Manner) -> list[Message]:
    """Two or three questions that have nothing to do with each other, each with its answer."""
    messages: list[Message] = []
    for _ in range(2 if manner.rng.random() < THIRD_SHARE else 1):
        messages += replayed(manner.rng, any_answer(asker, chains, manner, 1 + len(messages)))
    return messages + any_answer(asker, chains, manner, 1 + len(messages))


def replayed(rng: random.Random, messages: list[Message]) -> list[Message]:
    """An answered question as it stands in a later prompt: most clients send words back, and no calls."""
    return in_words(messages) if rng.random() < IN_WORDS_SHARE else messages


def any_answer(asker: Asker, chains: Chains, manner: Manner, number: int = 1) -> list[Message]:
    """One question of those that have nothing to do with each other."""
    kind = manner.rng.choices(list(AMONG_SEVERAL), list(AMONG_SEVERAL.values()))[0]
    return one_answer(asker, chains, manner, kind, number)


def one_answer(asker: Asker, chains: Chains, manner: Manner, kind: str, number: int = 1) -> list[Message]:
    """A question and its answer; `number` is that of the first call."""
    if kind == "chain":
        return chains.any_question(manner).messages(number)
    if kind == "question":
        return asker.any_question(manner).messages(number)
    return asker.talk(manner, manner.rng.choice(asker.small_talk if kind == "small_talk" else asker.off_topic))
