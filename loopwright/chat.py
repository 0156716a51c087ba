"""`loopwright chat`: talk to the agent in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from components.config.params import InputError
from loopwright.endpoint import ADDRESS, ContextTooLong, check, endpoint, headers, post
from loopwright.output import Json, print_json, say

Messages = list[dict[str, Any]]


def chat(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; without it, a conversation begins.")] = None,
    url: Annotated[str, typer.Option(help="Address of a running endpoint.")] = ADDRESS,
    model: Annotated[
        str, typer.Option(metavar="NAME@ALIAS|NAME/VERSION", help="Which model, where no endpoint runs.")
    ] = "agent@champion",
    as_json: Json = False,
) -> None:
    """Talk to the endpoint, or to the registered agent in this process where none runs; Ctrl-C stops a reply."""
    if as_json and prompt is None:
        raise InputError("--json: needs a PROMPT; give one, or leave --json out")
    with endpoint(url, model) as address:
        if prompt is None:
            _converse(address)
        elif as_json:
            body = {"messages": [{"role": "user", "content": prompt}]}
            print_json(post(f"{address}/v1/chat/completions", body))
        else:
            _say_streamed(address, [{"role": "user", "content": prompt}])


def _converse(address: str) -> None:
    """Ask, answer, until the person ends it."""
    say("Ctrl-C stops a reply, Ctrl-D ends the conversation")
    messages: Messages = []
    while True:
        try:
            question = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        if question:
            messages.append({"role": "user", "content": question})
            try:
                messages.append({"role": "assistant", "content": _within_context(address, messages)})
            except InputError as error:
                messages.pop()
                say(str(error))


def _within_context(address: str, messages: Messages) -> str:
    """Answer, forgetting the oldest exchange as often as the model's context asks for it."""
    while True:
        try:
            return _say_streamed(address, messages)
        except ContextTooLong:
            if len(messages) == 1:
                raise
            del messages[:2]


def _say_streamed(address: str, messages: Messages) -> str:
    """Print the answer as it comes, tool calls in dim lines; returns its text."""
    said = ""
    try:
        for delta in _deltas(address, messages):
            for step in delta.get("steps", []):
                _dim(_step(step))
            if text := delta.get("content"):
                said += text
                print(text, end="", flush=True)
    except KeyboardInterrupt:
        _dim(" (stopped)")
        return said
    print()
    return said


def _deltas(address: str, messages: Messages) -> Iterator[dict[str, Any]]:
    import httpx

    body = {"messages": messages, "stream": True}
    path = f"{address}/v1/chat/completions"
    with httpx.stream("POST", path, json=body, headers=headers(), timeout=None) as response:
        check(response)
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise InputError(f"{address}: {event['error']['message']}")
            yield event["choices"][0]["delta"]


def _step(step: dict[str, Any]) -> str:
    if step["type"] == "call":
        arguments = ", ".join(f"{key}={value!r}" for key, value in step["arguments"].items())
        return f"→ {step['name']}({arguments})"
    return f"← {step['content']}"


def _dim(line: str) -> None:
    """A line that is no part of the answer."""
    say(f"\x1b[2m{line}\x1b[0m" if sys.stderr.isatty() else line)
