"""Preference data in the formats of others: pairs of a chosen and a rejected answer, and unpaired labels.

Formats: `prompt`, `conversations` or `instruction` with `chosen` and `rejected` (an answer is a text, a turn or a list
of turns), the two alone where they begin alike, and `messages`, or `prompt` with `completion`, with a boolean `label`.
A file may hold both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from components.config.params import InputError
from components.datasets.conversations import (
    PROMPTS,
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
"""Names of the columns in the formats of OpenAI, Argilla and LLaMA-Factory."""


def read_preference(location: str, values: Mapping[str, Any], roles: Mapping[str, str] = ROLES) -> Row:
    """A row of kind `preferences` without its id, from one record.

    Raises: InputError naming the location and the reason.
    """
    own = set(values) == set(SCHEMAS["preferences"].names)
    if isinstance(values.get("input"), Mapping):  # OpenAI: the messages and the tools of the prompt
        values = {**values["input"], **values}
    for name in [name for name in _OTHER_NAMES if name in values]:
        values = {_OTHER_NAMES[name]: values[name], **values}
    sides = {side: values[side] for side in _SIDES if values.get(side) is not None}
    if "label" in values:
        if sides:
            raise InputError(f'{location}: "label" beside "{next(iter(sides))}"; a row has a pair or a label')
        prompt, answers = _labelled(location, values, roles)
    elif len(sides) == 2 or (own and sides):
        prompt, answers = _pair(location, values, {side: side for side in sides}, roles)
    else:
        raise _neither(location, values, sides)
    _refuse_misfits(location, prompt, answers)
    tools = read_tools(location, values.get("tools") or values.get("functions"))
    return {"prompt": prompt, "chosen": answers.get("chosen"), "rejected": answers.get("rejected"), "tools": tools}


def _neither(location: str, values: Mapping[str, Any], sides: Mapping[str, Any]) -> InputError:
    """The error of a row that is neither a pair nor an unpaired label."""
    if sides:
        (missing,) = set(_SIDES) - set(sides)
        return InputError(f'{location}: {missing}: missing; a pair has "chosen" and "rejected"')
    return InputError(
        f"{location}: no rated answer; found columns: {', '.join(values) or 'none'}; "
        'expected "prompt" or "conversations" with "chosen" and "rejected", or "messages" with a boolean "label"'
    )


PromptAndAnswers = tuple[list[Message], dict[str, list[Message]]]
"""A prompt and its answers by side."""


def _labelled(location: str, values: Mapping[str, Any], roles: Mapping[str, str]) -> PromptAndAnswers:
    """Prompt and answer of an unpaired label: the answer is all after the last turn of the user."""
    label = values["label"]
    if not isinstance(label, bool):
        raise InputError(f"{location}: label: {label!r} is no boolean; expected true (liked) or false (disliked)")
    side = "chosen" if label else "rejected"
    if values.get("completion") is not None:
        return _pair(location, values, {side: "completion"}, roles)
    messages = read_messages(location, turns_of(location, values), roles=roles)
    users = [number for number, message in enumerate(messages, 1) if message["role"] == "user"]
    if not users:
        raise InputError(f"{location}: no turn of a user among {len(messages)}; a label is for the answer to one")
    return messages[: users[-1]], {side: messages[users[-1] :]}


def _pair(
    location: str, values: Mapping[str, Any], columns: Mapping[str, str], roles: Mapping[str, str]
) -> PromptAndAnswers:
    """Prompt and answers in these columns, by side."""
    if isinstance(values.get("prompt"), str) and not values["prompt"].strip():
        raise InputError(f"{location}: prompt: empty; say what was answered")
    turns_by_side = {
        side: written_turns(f"{location}: {column}", values[column], "assistant") for side, column in columns.items()
    }
    if not first_of(values, PROMPTS):
        if len(turns_by_side) < 2:
            raise InputError(f'{location}: prompt: missing; expected "prompt" or "conversations" beside the answer')
        return _implied(location, values, turns_by_side, roles)
    prompt = read_messages(f"{location}: prompt", question_of(location, values), roles=roles)
    return prompt, {
        side: _answer(f"{location}: {columns[side]}", prompt, turns, roles) for side, turns in turns_by_side.items()
    }


def _implied(
    location: str, values: Mapping[str, Any], turns_by_side: Mapping[str, list[Any]], roles: Mapping[str, str]
) -> PromptAndAnswers:
    """Prompt and answers of a pair without a prompt: the common beginning is the prompt, of texts in whole words."""
    texts = [values[side] for side, turns in turns_by_side.items() if isinstance(values[side], str) and len(turns) == 1]
    if len(texts) == 2:
        common = texts[0][: _common_length(*texts)]
        end = max(common.rfind(" "), common.rfind("\n") + 1)
        turns = [{"role": "user", "content": common[:end]}] if common[:end].strip() else []
        turns_by_side = {side: [*turns, {"role": "assistant", "content": values[side][end:]}] for side in turns_by_side}
    whole = {side: read_messages(f"{location}: {side}", turns, roles=roles) for side, turns in turns_by_side.items()}
    shared = _common_length(*whole.values())
    if not shared:
        raise InputError(
            f'{location}: prompt: missing; expected "prompt" or "conversations" beside the answers, or answers that'
            " begin with it"
        )
    system = read_messages(location, [{"role": "system", "content": values["system"]}]) if values.get("system") else []
    prompt = next(iter(whole.values()))[:shared]
    return [*system, *prompt], {side: messages[shared:] for side, messages in whole.items()}


def _common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many of their first elements are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _answer(location: str, prompt: list[Message], turns: list[Any], roles: Mapping[str, str]) -> list[Message]:
    """The turns of one answer; a list may repeat the prompt before them, as some datasets do."""
    whole = read_messages(location, turns, roles=roles) if len(turns) > len(prompt) else []
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    return read_messages(location, turns, before=prompt, roles=roles)


def _refuse_misfits(location: str, prompt: list[Message], answers: Mapping[str, list[Message]]) -> None:
    if not any(message["role"] == "user" and message["content"].strip() for message in prompt):
        raise InputError(f"{location}: prompt: no turn of a user that says something; say what was answered")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise InputError(
            f"{location}: prompt: ends with a turn of role {prompt[-1]['role']}; expected the user's or a tool's"
        )
    for side, messages in answers.items():
        if not messages:
            raise InputError(f"{location}: {side}: empty; an answer is a turn of the assistant")
        for name, message in (("begins", messages[0]), ("ends", messages[-1])):
            if message["role"] != "assistant":
                raise InputError(
                    f"{location}: {side}: {name} with a turn of role {message['role']}; expected the assistant's"
                )
        if not (messages[-1]["content"].strip() or messages[-1].get("tool_calls")):
            raise InputError(f"{location}: {side}: empty; an answer says something or calls a tool")
    if len(answers) == 2 and answers["chosen"] == answers["rejected"]:
        raise InputError(f"{location}: chosen and rejected are equal; nothing is preferred")
