"""Rated answers as others write them: pairs of a better and a worse answer, and lone votes.

Read are `prompt` or `conversations` with `chosen` and `rejected` (an answer is a text, a turn or a list of turns),
and `messages`, or `prompt` with `completion`, with a boolean `label`. Pairs and votes may stand in one file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from components.config.params import InputError
from components.datasets.conversations import Message, parsed, read_messages, read_tools, turns_of
from components.datasets.formats import SCHEMAS, Row

_SIDES = ("chosen", "rejected")


def read_preference(place: str, values: Mapping[str, Any]) -> Row:
    """A row of kind `preferences` without its id, from one record.

    Raises: InputError naming the place and the reason.
    """
    own = set(values) == set(SCHEMAS["preferences"].names)
    sides = {side: values[side] for side in _SIDES if values.get(side) is not None}
    if "label" in values:
        if sides:
            raise InputError(f'{place}: found "label" beside "{next(iter(sides))}"; a row is a pair or a lone vote')
        prompt, answers = _vote(place, values)
    elif len(sides) == 2 or (own and sides):
        prompt = read_messages(f"{place}: prompt", _prompt(place, values))
        answers = {side: _answer(f"{place}: {side}", prompt, value) for side, value in sides.items()}
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


def _vote(place: str, values: Mapping[str, Any]) -> tuple[list[Message], dict[str, list[Message]]]:
    """Prompt and answer of a lone vote: the answer is all that stands behind the last turn of the user."""
    label = values["label"]
    if not isinstance(label, bool):
        raise InputError(f"{place}: label: {label!r} is no boolean; expected true (liked) or false (disliked)")
    side = "chosen" if label else "rejected"
    if values.get("completion") is not None:
        prompt = read_messages(f"{place}: prompt", _prompt(place, values))
        return prompt, {side: _answer(f"{place}: completion", prompt, values["completion"])}
    messages = read_messages(place, turns_of(place, values))
    asked = [number for number, message in enumerate(messages, 1) if message["role"] == "user"]
    if not asked:
        raise InputError(f"{place}: no turn of a user among {len(messages)}; a vote is on the answer to one")
    return messages[: asked[-1]], {side: messages[asked[-1] :]}


def _prompt(place: str, values: Mapping[str, Any]) -> Sequence[Any]:
    """The turns that were answered."""
    prompt = values.get("prompt")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError(f"{place}: prompt: empty; say what was answered")
        system = values.get("system")
        return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        return turns_of(place, {**values, "messages": prompt, "conversations": None})
    if prompt is not None:
        raise InputError(f"{place}: prompt: expected text or a list of turns, found {type(prompt).__name__}")
    if values.get("messages") is None and values.get("conversations") is None:
        raise InputError(f'{place}: prompt: missing; expected "prompt" or "conversations" beside the answers')
    return turns_of(place, values)


def _answer(place: str, prompt: list[Message], value: Any) -> list[Message]:
    """The turns of one answer; a list may tell the prompt again before them, as some sets do."""
    if isinstance(value, str) and value[:1] in "[{" and value.strip()[-1:] in ("]", "}"):
        value = _as_turns(place, value)
    if isinstance(value, str):
        turns: list[Any] = [{"role": "assistant", "content": value}]
    elif isinstance(value, Mapping):
        turns = [value]
    elif isinstance(value, list):
        turns = value
    else:
        raise InputError(f"{place}: expected text, a turn or a list of turns, found {type(value).__name__}")
    whole = read_messages(place, turns) if len(turns) > len(prompt) else []
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    return read_messages(place, turns, before=prompt)


def _as_turns(place: str, text: str) -> Any:
    """What a text says as JSON where that is turns; else the text, for an answer may well be JSON."""
    try:
        value = parsed(place, "answer", text)
    except InputError:
        return text
    turns = value if isinstance(value, list) else [value]
    told = all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in turns)
    return value if turns and told else text


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
