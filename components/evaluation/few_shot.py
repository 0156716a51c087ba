"""Few-shot evaluation (Brown et al. 2020): each question after 0, 1, 4 ... solved examples of its kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from components.agent.agent import Agent
from components.config.loop_settings import EvaluateConfig
from components.datasets.formats import Row, first_per_suite, read_rows
from components.evaluation.questions import Question

MAX_CONVERSATIONS = 4_000
"""Training conversations of each dataset that examples are drawn from."""
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
    progress: Callable[..., None] = lambda *args, **values: None,
) -> dict[str, Figures]:
    """By suite: exact match with each number of examples, over the first `shot_questions` that have right answers.

    `answer` puts questions to the model, as `ParallelRollout` does. Examples are training conversations that call the
    same tools; a question with too few of them is left out, and one whose examples leave no room in the context counts
    as wrong and under `too_long`.
    """
    examples = _examples(folders, seed)
    most = max(config.shots, default=0)
    first = first_per_suite(questions, config.shot_questions, attrgetter("suite"))
    chosen = [each for each in first if each.expected and len(examples.get(_tools_called(each), ())) >= most]
    figures: dict[str, Figures] = {question.suite: {"questions": 0} for question in chosen}
    for question in chosen:
        figures[question.suite]["questions"] += 1
    random = np.random.default_rng(seed)
    draws = [random.choice(len(examples[_tools_called(question)]), most, replace=False) for question in chosen]
    for shots in config.shots:
        prompts = [
            _after([examples[_tools_called(question)][index] for index in indices[:shots]], question)
            for question, indices in zip(chosen, draws, strict=True)
        ]
        fits = [len(agent.tokenizer.encode_chat(each.messages, each.tools)[0]) < agent.context_len for each in prompts]
        for question, row, fit in zip(chosen, answer(prompts, progress), fits, strict=True):
            suite = figures[question.suite]
            suite[str(shots)] = suite.get(str(shots), 0) + row["correct"]
            suite["too_long"] = suite.get("too_long", 0) + (not fit)
    for suite in figures.values():
        for shots in config.shots:
            suite[str(shots)] = round(suite[str(shots)] / suite["questions"], 4)
    return figures


def _examples(folders: Sequence[Path], seed: int) -> dict[Kind, list[list[Row]]]:
    """Training conversations by the tools they call, in a seeded order."""
    conversations = [
        row["messages"]
        for folder in folders
        for row, _ in zip(read_rows(folder, "train", ["messages", "tools"]), range(MAX_CONVERSATIONS), strict=False)
        if not row["tools"]
    ]
    by_kind: dict[Kind, list[list[Row]]] = {}
    for index in np.random.default_rng(seed).permutation(len(conversations)):
        messages = conversations[index]
        calls = [call for message in messages for call in message["tool_calls"] or ()]
        by_kind.setdefault(tuple(call["function"]["name"] for call in calls), []).append(messages)
    return by_kind


def _tools_called(question: Question) -> Kind:
    return tuple(call["name"] for call in question.expected_calls)


def _after(examples: Sequence[list[Row]], question: Question) -> Question:
    """The question after solved examples, all in one conversation."""
    return replace(question, messages=[message for messages in (*examples, question.messages) for message in messages])
