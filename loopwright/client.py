"""`loopwright chat` and `classify`, and the endpoint they call: running already, or started in this process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from components.config.params import InputError
from components.config.paths import Paths, find_root
from loopwright.attachments import message_content
from loopwright.output import Json, print_json, print_table, say

Messages = list[dict[str, Any]]
ADDRESS = "http://127.0.0.1:3000"
ATTACH = "/image"
SHOWN = 5
"""Labels of each text in the table; `--json` has all."""
WIDTH = 60

Url = Annotated[str, typer.Option(help="Address of a running endpoint.")]
ModelName = Annotated[str, typer.Option(metavar="NAME@ALIAS|NAME/VERSION", help="Which model, where no endpoint runs.")]


def chat(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; without it, a conversation begins.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A picture or clip to ask about; may be repeated.")
    ] = None,
    url: Url = ADDRESS,
    model: ModelName = "agent@champion",
    as_json: Json = False,
) -> None:
    """Talk to the endpoint, or to the registered agent in this process where none runs; Ctrl-C stops a reply."""
    if as_json and prompt is None:
        raise InputError("--json: needs a PROMPT; give one, or leave --json out")
    files = list(image or ())
    messages: Messages = [{"role": "user", "content": message_content(prompt or "", files)}]
    with endpoint(url, model) as address:
        if prompt is None:
            _converse(address, files)
        elif as_json:
            print_json(post(f"{address}/v1/chat/completions", {"messages": messages}))
        else:
            _print_streamed(address, messages)


def _converse(address: str, files: list[Path]) -> None:
    """Read prompts and print answers until the user ends the conversation; `files` go with the first prompt."""
    say(
        "Ctrl-C stops a reply, Ctrl-D ends the conversation, /image FILE shows a picture or clip with the next question"
    )
    messages: Messages = []
    while True:
        try:
            question = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        command, _, argument = question.partition(" ")
        try:
            if command == ATTACH:
                files.append(_readable(argument))
            elif question:
                shown, files = files, []
                _ask(address, messages, message_content(question, shown))
        except InputError as error:
            say(str(error))


def _readable(argument: str) -> Path:
    """Raises: InputError when the argument of `/image` is no file."""
    path = Path(argument.strip()).expanduser()
    if not path.is_file():
        raise InputError(f"{ATTACH}: {argument.strip()!r} is not a file; give the path of a picture or clip")
    say(f"{path.name} goes with the next question")
    return path


def _ask(address: str, messages: Messages, content: Any) -> None:
    """Add a question and its answer to a conversation, or neither when it is refused."""
    messages.append({"role": "user", "content": content})
    try:
        messages.append({"role": "assistant", "content": _answer_within_context(address, messages)})
    except InputError:
        messages.pop()
        raise


def _answer_within_context(address: str, messages: Messages) -> str:
    """Answer; while the conversation is longer than the model's context, drop its oldest exchange."""
    while True:
        try:
            return _print_streamed(address, messages)
        except ContextTooLong:
            if len(messages) == 1:
                raise
            del messages[:2]


def _print_streamed(address: str, messages: Messages) -> str:
    """Print the answer as it comes, tool calls in dim lines; returns its text.

    Calls that wait for a person are run, and the answer goes on, where someone at the terminal says so.
    """
    answer, conversation, confirmed = "", list(messages), list[str]()
    while True:
        text, calls, results = _print_turn(address, conversation, confirmed)
        answer += text
        if confirmed:
            ran = zip(conversation[-1]["tool_calls"], results, strict=False)  # results of further calls follow
            conversation += [{"role": "tool", "tool_call_id": call["id"], "content": result} for call, result in ran]
        confirmed = [call["id"] for call in calls if _is_confirmed(call["function"])]
        if not confirmed:
            return answer
        conversation.append({"role": "assistant", "content": text or None, "tool_calls": calls})


def _print_turn(address: str, messages: Messages, confirmed: list[str]) -> tuple[str, list[dict[str, Any]], list[str]]:
    """Print an answer up to its end or to calls that wait; returns its text, these calls, and the results of others."""
    answer, calls, results = "", list[dict[str, Any]](), list[str]()
    try:
        for delta in _deltas(address, messages, confirmed):
            for step in delta.get("steps", []):
                _print_dim(_step(step))
                results += [step["content"]] if step["type"] == "result" else []
            calls += delta.get("tool_calls", [])
            if text := delta.get("content"):
                answer += text
                print(text, end="", flush=True)
    except KeyboardInterrupt:
        _print_dim(" (stopped)")
        return answer, [], results
    print()
    return answer, calls, results


def _is_confirmed(function: dict[str, Any]) -> bool:
    """Whether someone at the terminal lets a call run."""
    call = _step({"type": "call", "name": function["name"], "arguments": json.loads(function["arguments"])})
    if not sys.stdin.isatty():
        _print_dim(f"{call} waits for confirmation (serve.allow_writes)")
        return False
    return typer.confirm(f"{call}  run it?", err=True)


def _deltas(address: str, messages: Messages, confirmed: list[str]) -> Iterator[dict[str, Any]]:
    import httpx

    body = {"messages": messages, "stream": True, **({"confirmed_tool_calls": confirmed} if confirmed else {})}
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
    """A tool call or its result in a line."""
    if step["type"] == "call":
        arguments = ", ".join(f"{key}={value!r}" for key, value in step["arguments"].items())
        return f"→ {step['name']}({arguments})"
    return f"← {step['content']}"


def _print_dim(line: str) -> None:
    """Print a line that is no part of the answer."""
    say(f"\x1b[2m{line}\x1b[0m" if sys.stderr.isatty() else line)


def classify(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="What to classify.")],
    url: Url = ADDRESS,
    model: ModelName = "classifier@champion",
    as_json: Json = False,
) -> None:
    """Print the labels of texts with scores, from the endpoint or, where none runs, the registered classifier here."""
    with endpoint(url, model) as address:
        answer = post(f"{address}/v1/classify", {"input": texts})
    if as_json:
        print_json(answer)
        return
    rows: list[tuple[str | None, str, float]] = []
    for text, result in zip(texts, answer["results"], strict=True):
        shown = text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."
        best = list(result["scores"].items())[:SHOWN]
        rows += [(shown if index == 0 else None, label, score) for index, (label, score) in enumerate(best)]
    print_table(("text", "label", "score"), rows)
    if cut := sum(result["truncated"] for result in answer["results"]):
        say(f"{cut} of {len(texts)} texts exceed the context of {answer['model']}: their ends were truncated")


class ContextTooLong(InputError):
    """The conversation is longer than the model's context."""


@contextmanager
def endpoint(url: str, model: str) -> Iterator[str]:
    """The running endpoint's address, or that of an endpoint started in this process that serves `model`."""
    if _answers(url):
        yield url
        return
    if url != ADDRESS:
        raise InputError(f'--url: nothing answers on {url}; start it with "loopwright serve", or leave --url out')
    paths = Paths(find_root())
    say(f"no endpoint on {url}: loading {model} into this process")
    from serving.server import local_endpoint

    with local_endpoint(paths, model) as address:
        yield address


def _answers(url: str) -> bool:
    import httpx

    try:
        models = httpx.get(f"{url}/v1/models", headers=headers(), timeout=5)
        return models.status_code == 401 or models.json()["data"][0]["owned_by"] == "loopwright"
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError):
        return False


def headers() -> dict[str, str]:
    """Headers of every request: the API key, where the environment has one."""
    key = os.environ.get("LOOPWRIGHT_API_KEYS", "").partition(",")[0].strip()
    return {"Authorization": f"Bearer {key}"} if key else {}


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST a request and return the JSON body of the response.

    Raises: InputError with the endpoint's own message.
    """
    import httpx

    response = httpx.post(url, json=body, headers=headers(), timeout=None)
    check(response)
    answer: dict[str, Any] = response.json()
    return answer


def check(response: Any) -> None:
    """Raises: InputError when the endpoint refused, ContextTooLong when it did for the length of the conversation."""
    if response.status_code == 200:
        return
    response.read()
    try:
        error = response.json()["error"]
    except (ValueError, LookupError, TypeError):
        raise InputError(f"{response.url}: answered {response.status_code}; is it a Loopwright endpoint?") from None
    raise (ContextTooLong if error.get("code") == "context_length_exceeded" else InputError)(error["message"])
