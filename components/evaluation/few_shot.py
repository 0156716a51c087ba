"""What examples in the prompt change (Brown et al. 2020): each question behind 0, 1, 4 ... solved ones of its kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from components.agent.agent import Agent
from components.config.model_settings import EvaluateConfig
from components.datasets.formats import Row, read_rows
from components.evaluation.questions import Question

READ = 4_000
"""Training conversations that examples are taken from."""
Figures = dict[str, Any]
Kind = tuple[str, ...]
"""Names of the tools that a conversation calls, in order."""


def few_shot(
    agent: Agent,
    answer: Callable[..., Sequence[Row]],
    folders: Sequence[Path],
    questions: Sequence[Question],
    config: EvaluateConfig,
    seed: int,
    progress: Callable[..., None] = lambda *args, **facts: None,
) -> dict[str, Figures]:
    """By suite: exact match with each number of examples, over the first `shot_questions` that have right answers.

    `answer` puts questions to the model, as `Answering` does. Examples are training conversations that call the same
    tools; where there are too few of them the question is left out, and one whose examples leave no room in the
    context counts as wrong and under `too_long`.
    """
    examples = _examples(folders, seed)
    most = max(config.shots, default=0)
    asked = [one for one in _first(questions, config.shot_questions) if len(examples.get(_called(one), ())) >= most]
    figures: dict[str, Figures] = {one.suite: {"questions": 0} for one in asked}
    for one in asked:
        figures[one.suite]["questions"] += 1
    random = np.random.default_rng(seed)
    drawn = [random.choice(len(examples[_called(one)]), most, replace=False) for one in asked]
    for shots in config.shots:
        behind = [
            _behind([examples[_called(one)][place] for place in places[:shots]], one)
            for one, places in zip(asked, drawn, strict=True)
        ]
        fits = [len(agent.tokenizer.encode_chat(one.messages, one.tools)[0]) < agent.context_len for one in behind]
        for one, row, fit in zip(asked, answer(behind, progress), fits, strict=True):
            suite = figures[one.suite]
            suite[str(shots)] = suite.get(str(shots), 0) + row["correct"]
            suite["too_long"] = suite.get("too_long", 0) + (not fit)
    for suite in figures.values():
        for shots in config.shots:
            suite[str(shots)] = round(suite[str(shots)] / suite["questions"], 4)
    return figures


def _first(questions: Sequence[Question], most: int) -> list[Question]:
    counts: dict[str, int] = {}
    kept = []
    for one in questions:
        counts[one.suite] = counts.get(one.suite, 0) + 1
        if counts[one.suite] <= most and one.expected:
            kept.append(one)
    return kept


def _examples(folders: Sequence[Path], seed: int) -> dict[Kind, list[list[Row]]]:
    """Training conversations by the tools they call, in an order that the seed says."""
    read = [
        row["messages"]
        for folder in folders
        for row, _ in zip(read_rows(folder, "train", ["messages", "tools"]), range(READ), strict=False)
        if not row["tools"]
    ]
    by_kind: dict[Kind, list[list[Row]]] = {}
    for place in np.random.default_rng(seed).permutation(len(read)):
        messages = read[place]
        calls = [call for message in messages for call in message["tool_calls"] or ()]
        by_kind.setdefault(tuple(call["function"]["name"] for call in calls), []).append(messages)
    return by_kind


def _called(question: Question) -> Kind:
    return tuple(call["name"] for call in question.expected_calls)


def _behind(examples: Sequence[list[Row]], question: Question) -> Question:
    """The question behind solved ones, as if one conversation had gone before."""
    before = [message for messages in examples for message in messages]
    return Question(
        question.suite, [*before, *question.messages], question.tools, question.expected, question.expected_calls
    )
