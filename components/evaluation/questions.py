"""Held-out questions, the agent's answers to them, and whether each is right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.agent.agent import Agent, Answer
from components.agent.batch_rollout import answer_all
from components.config.loop_settings import EvaluateConfig
from components.datasets.formats import Row, read_info, read_rows
from components.datasets.images import complete_messages
from components.evaluation.captions import SCALE, CaptionScores, are_captions, caption_scores
from components.inference.sampling import Sampling
from components.media.messages import IMAGE
from components.models.decoder import Decoder

COLUMNS = ("suite", "question", "expected", "answer", "expected_calls", "calls", "correct", "right_calls")
FREE_TEXT_SAMPLES = 64
HELD_OUT = "held_out"
"""The suite of a set of pictures whose rows name none."""


@dataclass(frozen=True)
class Question:
    """One held-out question and its right answer."""

    suite: str
    messages: list[Row]
    tools: str | None
    expected: str
    expected_calls: list[Row]


def answer_questions(
    model: Decoder,
    agent: Agent,
    questions: Sequence[Question],
    config: EvaluateConfig,
    progress: Callable[..., None] = lambda *args, **values: None,
) -> list[Row]:
    """One row of `COLUMNS` for each question, in order: the agent's answer, and whether it is right."""
    answers = answer_all(
        model,
        agent,
        [(question.messages, question.tools) for question in questions],
        Sampling(max_new_tokens=config.max_new_tokens, stop_ids=(agent.tokenizer.end_id,)),
        config.batch_size,
        lambda done: progress(done, len(questions), answered=done),
    )
    return [_graded(question, answer) for question, answer in zip(questions, answers, strict=True)]


def read_questions(folder: Path, most: int) -> Iterator[Question]:
    """The first `most` held-out questions of each suite; of conversations without suites, a sample.

    Those about pictures without suites, as a team adds them, are one suite: each has a right answer.
    """
    counts: dict[str, int] = {}
    unnamed = f"{folder.name}/{HELD_OUT}" if read_info(folder).kind == "images" else folder.name
    for row in read_rows(folder, "test"):
        suite = row["suite"] or unnamed
        limit = min(FREE_TEXT_SAMPLES, most) if suite == folder.name else most
        counts[suite] = counts.get(suite, 0) + 1
        if counts[suite] <= limit:
            yield _question(suite, row)


def captions_in(table: Sequence[Row]) -> dict[str, CaptionScores]:
    """Scores of the suites of captions among answers, rows of `COLUMNS` about pictures."""
    suites: dict[str, list[Row]] = {}
    for row in table:
        if IMAGE in row["question"]:
            suites.setdefault(row["suite"], []).append(row)
    return {
        suite: caption_scores([row["answer"] for row in rows], [[row["expected"]] for row in rows])
        for suite, rows in suites.items()
        if are_captions([row["expected"] for row in rows])
    }


def correctness(table: Sequence[Row]) -> list[float]:
    """Of each answer, 1 where it is exactly right, else 0; a caption in other words counts as CIDEr-D says, up to 1."""
    each = {suite: iter(scores.each) for suite, scores in captions_in(table).items()}
    return [
        max(float(row["correct"]), next(each[row["suite"]]) / SCALE)
        if row["suite"] in each and IMAGE in row["question"]
        else float(row["correct"])
        for row in table
    ]


def _question(suite: str, row: Row) -> Question:
    messages = complete_messages(row)
    last_user = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=0)
    rest = [message for message in messages[last_user + 1 :] if message["role"] == "assistant"]
    # A client's tools are run by the client: the model's first turn is its whole answer.
    rest = rest[:1] if row["tools"] else rest
    calls = [call["function"] for message in rest for call in message["tool_calls"] or []]
    expected_calls = [{"name": call["name"], "arguments": json.loads(call["arguments"])} for call in calls]
    expected = (rest[-1]["content"] or "") if rest else ""
    return Question(suite, messages[: last_user + 1], row["tools"], expected, expected_calls)


def _graded(question: Question, answer: Answer | None) -> Row:
    calls: list[Row] = []
    if answer is not None:
        calls = [{"name": call.name, "arguments": call.arguments} for call in answer.tool_calls]
        calls += [
            {"name": step["name"], "arguments": step["arguments"]} for step in answer.steps if step["type"] == "call"
        ]
    content = answer.content if answer is not None else ""
    right_calls = calls == question.expected_calls
    # Small talk must go without a call; elsewhere the answer in words is what counts.
    needs_calls = bool(question.tools) or not question.expected_calls
    return {
        "suite": question.suite,
        "question": next((m["content"] for m in reversed(question.messages) if m["role"] == "user"), "") or "",
        "expected": question.expected,
        "answer": content,
        "expected_calls": json.dumps(question.expected_calls, ensure_ascii=False),
        "calls": json.dumps(calls, ensure_ascii=False),
        "correct": " ".join(content.split()) == " ".join(question.expected.split())
        and (right_calls or not needs_calls),
        "right_calls": right_calls,
    }
