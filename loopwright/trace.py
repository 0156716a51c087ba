"""`loopwright trace`: everything behind one answer."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

import typer

from components.config.paths import Paths, find_root
from loopwright.output import Json, print_json

WIDTH = 12


def trace(
    completion_id: Annotated[str, typer.Argument(metavar="ID", help="Id of an answer, as the endpoint gave it.")],
    as_json: Json = False,
) -> None:
    """Print everything behind one answer: request, response, votes, model version, run, commit, data."""
    from components.feedback.lineage import lineage, registry_metadata
    from components.feedback.store import Store

    home = Paths(find_root()).home
    store = Store.of(home)
    try:
        report = lineage(store, completion_id, registry_metadata(home))
    finally:
        store.close()
    if as_json:
        print_json(report)
    else:
        for line in trace_lines(report):
            print(line)


def trace_lines(report: Mapping[str, Any]) -> list[str]:
    """The lineage of an answer, as `loopwright trace` prints it."""
    return [
        _row("completion", report["id"]),
        _row("time", datetime.fromtimestamp(report["created"]).astimezone().isoformat(" ", "seconds")),
        *(_row(message["role"], _text(message)) for message in report["request"]["messages"]),
        *_picture_lines(report["pictures"]),
        *_answer_lines(report["answer"]),
        *_vote_lines(report["feedback"]),
        *_version_lines(report["version"]),
    ]


def _row(name: str, value: Any) -> str:
    return f"{name:<{WIDTH}}  {value}"


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, list):
        content = " ".join(part.get("text") or _media(part) for part in content)
    calls = [
        f"→ {call['function']['name']} {call['function']['arguments']}" for call in message.get("tool_calls") or []
    ]
    return " ".join([content, *calls]).strip()


def _media(part: Mapping[str, Any]) -> str:
    """A picture of a message by the beginning of its digest, a clip by those of its frames."""
    media = part.get(part["type"])
    if not isinstance(media, Mapping):
        return ""
    frames = [f"{frame['seconds']:.1f} s {_short(frame['url'])}" for frame in media.get("frames", ())]
    return f"[clip {', '.join(frames)}]" if frames else f"[picture {_short(media.get('url') or '')}]"


def _short(url: str) -> str:
    return url.rpartition(":")[2][:WIDTH]


def _picture_lines(pictures: list[Mapping[str, Any]]) -> list[str]:
    return [
        _row("picture", f"{each['digest']}  {each['width']} x {each['height']}, {each['bytes']} bytes, {each['path']}")
        for each in pictures
    ]


def _answer_lines(answer: Mapping[str, Any] | None) -> list[str]:
    if answer is None:
        return [_row("answer", "none stored: still being generated, or its server was killed")]
    tokens = f"{answer['prompt_tokens']} + {answer['completion_tokens']} tokens"
    calls = [call["function"] for call in answer["tool_calls"]]
    return [
        *(
            _row(step["type"], f"{step['name']}  {step.get('content', step.get('arguments'))}")
            for step in answer["steps"]
        ),
        *(_row("tool call", f"{call['name']} {call['arguments']}") for call in calls),
        _row("answer", answer["content"]),
        _row("", f"({answer['finish_reason']}, {tokens}, {answer['seconds']:.3f} s)"),
    ]


def _vote_lines(votes: list[Mapping[str, Any]]) -> list[str]:
    lines = []
    for vote in votes:
        parts = [vote["rating"], vote["id"]]
        parts += [f"{key}: {vote[key]!r}" for key in ("correction", "comment") if vote[key]]
        parts += [f"(replaced by {vote['replaced_by']})"] if vote["replaced_by"] else []
        lines.append(_row("feedback", "  ".join(parts)))
    return lines


def _version_lines(version: Mapping[str, Any]) -> list[str]:
    lines = [_row("model", f"{version['name']}/{version['version']}")]
    if "run_id" not in version:
        return [*lines, _row("", "(not in this registry)")]
    lines.append(_row("aliases", ", ".join(version["aliases"]) or "none"))
    lines.append(_row("run", version["run_id"]))
    for model in version.get("taught_by", ()):
        count = f"{len(model['feedback'])} feedback items"
        lines.append(_row("trained on", f"{model['version']}  run {model['run_id']}  {count}"))
        lines += [_row("", f"{model['version']} trained on {item}") for item in model["feedback"]]
    lines += [_row("", f"{key} = {value}") for key, value in sorted(version["tags"].items())]
    lines += [_row("", f"{key} = {value:.4g}") for key, value in sorted(version["metrics"].items())]
    return lines
