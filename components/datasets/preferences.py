"""Rated answers as others write them: pairs of a better and a worse answer, and unpaired labels.

Read are `prompt`, `conversations` or `instruction` with `chosen` and `rejected` (an answer is a text, a turn or a list
of turns), the two alone where they begin alike, and `messages`, or `prompt` with `completion`, with a boolean `label`.
Pairs and votes may stand in one file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from components.config.params import InputError
from components.datasets.conversations import (
    ASKED,
    ROLES,
    Message,
    first_of,
    question_of,
    read_messages,
    read_tools,
    turns_of,
    written_turns,
)
from components.datasets.formats import SCHEMAS, Row

_SIDES = ("chosen", "rejected")
_OTHER_NAMES = {
    "preferred_output": "chosen",
    "non_preferred_output": "rejected",
    "chosen_response": "chosen",
    "rejected_response": "rejected",
    "kto_tag": "label",
}
"""What OpenAI, Argilla and LLaMA-Factory call the columns."""


def read_preference(place: str, values: Mapping[str, Any], roles: Mapping[str, str] = ROLES) -> Row:
    """A row of kind `preferences` without its id, from one record.

    Raises: InputError naming the place and the reason.
    """
    own = set(values) == set(SCHEMAS["preferences"].names)
    if isinstance(values.get("input"), Mapping):  # OpenAI: the messages and the tools of the prompt
        values = {**values["input"], **values}
    for name in _OTHER_NAMES.keys() & values.keys():
        values = {_OTHER_NAMES[name]: values[name], **values}
    sides = {side: values[side] for side in _SIDES if values.get(side) is not None}
    if "label" in values:
        if sides:
            raise InputError(f'{place}: "label" stands beside "{next(iter(sides))}"; a row has a pair or a label')
        prompt, answers = _vote(place, values, roles)
    elif len(sides) == 2 or (own and sides):
        prompt, answers = _pair(place, values, {side: side for side in sides}, roles)
    else:
        raise _neither(place, values, sides)
    _refuse_misfits(place, prompt, answers)
    tools = read_tools(place, values.get("tools") or values.get("functions"))
    return {"prompt": prompt, "chosen": answers.get("chosen"), "rejected": answers.get("rejected"), "tools": tools}


def _neither(place: str, values: Mapping[str, Any], sides: Mapping[str, Any]) -> InputError:
    """What to say of a row that is neither a pair nor a vote."""
    if sides:
        (missing,) = set(_SIDES) - set(sides)
        return InputError(f'{place}: {missing}: missing; a pair has "chosen" and "rejected"')
    return InputError(
        f"{place}: no rated answer; found columns: {', '.join(values) or 'none'}; "
        'expected "prompt" or "conversations" with "chosen" and "rejected", or "messages" with a boolean "label"'
    )


Rated = tuple[list[Message], dict[str, list[Message]]]
"""A prompt and its answers by side."""


def _vote(place: str, values: Mapping[str, Any], roles: Mapping[str, str]) -> Rated:
    """Prompt and answer of an unpaired label: the answer is all that stands behind the last turn of the user."""
    label = values["label"]
    if not isinstance(label, bool):
        raise InputError(f"{place}: label: {label!r} is no boolean; expected true (liked) or false (disliked)")
    side = "chosen" if label else "rejected"
    if values.get("completion") is not None:
        return _pair(place, values, {side: "completion"}, roles)
    messages = read_messages(place, turns_of(place, values), roles=roles)
    asked = [number for number, message in enumerate(messages, 1) if message["role"] == "user"]
    if not asked:
        raise InputError(f"{place}: no turn of a user among {len(messages)}; a vote is on the answer to one")
    return messages[: asked[-1]], {side: messages[asked[-1] :]}


def _pair(place: str, values: Mapping[str, Any], columns: Mapping[str, str], roles: Mapping[str, str]) -> Rated:
    """Prompt and answers in these columns, by side."""
    if isinstance(values.get("prompt"), str) and not values["prompt"].strip():
        raise InputError(f"{place}: prompt: empty; say what was answered")
    written = {
        side: written_turns(f"{place}: {column}", values[column], "assistant") for side, column in columns.items()
    }
    if not first_of(values, ASKED):
        if len(written) < 2:
            raise InputError(f'{place}: prompt: missing; expected "prompt" or "conversations" beside the answer')
        return _implied(place, values, written, roles)
    prompt = read_messages(f"{place}: prompt", question_of(place, values), roles=roles)
    return prompt, {side: _answer(f"{place}: {columns[side]}", prompt, turns, roles) for side, turns in written.items()}


def _implied(
    place: str, values: Mapping[str, Any], written: Mapping[str, list[Any]], roles: Mapping[str, str]
) -> Rated:
    """Prompt and answers of a pair without a prompt: the prompt is what both begin with, texts in whole words."""
    texts = [values[side] for side, turns in written.items() if isinstance(values[side], str) and len(turns) == 1]
    if len(texts) == 2:
        alike = texts[0][: _alike(*texts)]
        end = max(alike.rfind(" "), alike.rfind("\n") + 1)
        asked = [{"role": "user", "content": alike[:end]}] if alike[:end].strip() else []
        written = {side: [*asked, {"role": "assistant", "content": values[side][end:]}] for side in written}
    whole = {side: read_messages(f"{place}: {side}", turns, roles=roles) for side, turns in written.items()}
    shared = _alike(*whole.values())
    if not shared:
        raise InputError(
            f'{place}: prompt: missing; expected "prompt" or "conversations" beside the answers, or answers that begin'
            " with it"
        )
    system = read_messages(place, [{"role": "system", "content": values["system"]}]) if values.get("system") else []
    prompt = next(iter(whole.values()))[:shared]
    return [*system, *prompt], {side: messages[shared:] for side, messages in whole.items()}


def _alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many of their first elements are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _answer(place: str, prompt: list[Message], turns: list[Any], roles: Mapping[str, str]) -> list[Message]:
    """The turns of one answer; a list may tell the prompt again before them, as some sets do."""
    whole = read_messages(place, turns, roles=roles) if len(turns) > len(prompt) else []
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    return read_messages(place, turns, before=prompt, roles=roles)


def _refuse_misfits(place: str, prompt: list[Message], answers: Mapping[str, list[Message]]) -> None:
    if not any(message["role"] == "user" and message["content"].strip() for message in prompt):
        raise InputError(f"{place}: prompt: no turn of a user that says something; say what was answered")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise InputError(
            f"{place}: prompt: ends with a turn of role {prompt[-1]['role']}; expected the user's or a tool's"
        )
    for side, messages in answers.items():
        if not messages:
            raise InputError(f"{place}: {side}: empty; an answer is a turn of the assistant")
        for name, message in (("begins", messages[0]), ("ends", messages[-1])):
            if message["role"] != "assistant":
                raise InputError(
                    f"{place}: {side}: {name} with a turn of role {message['role']}; expected the assistant's"
                )
        if not (messages[-1]["content"].strip() or messages[-1].get("tool_calls")):
            raise InputError(f"{place}: {side}: empty; an answer says something or calls a tool")
    if len(answers) == 2 and answers["chosen"] == answers["rejected"]:
        raise InputError(f"{place}: chosen and rejected are equal; nothing is preferred")
