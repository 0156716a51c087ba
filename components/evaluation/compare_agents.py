"""Stage: candidate and champion answer the same held-out questions, and the gate decides.

The questions are the suites of the datasets and the held-out prompts with corrected answers; beside them, how much each
model prefers the answers that users preferred. The champion's answers to the suites are measured once, when it is
registered, and read again here.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from components.agent.agent import Agent
from components.config.params import Params
from components.config.paths import CURATED, GATE_MODE
from components.datasets.formats import Row, first_per_suite, read_rows, write_json
from components.evaluation.evaluate import (
    ANSWERS,
    ANSWERS_OF,
    held_out_digest,
    read_conversations,
    write_answers,
)
from components.evaluation.gate import GateDecision, Mode, Slice, decide, report
from components.evaluation.metrics import masked_bytes, piece_bits
from components.evaluation.parallel_rollout import load_agent
from components.evaluation.questions import answer_questions, correctness, read_questions
from components.feedback.items import NO_CALL, PICTURES, Reworded
from components.media.messages import IMAGE
from components.models.decoder import Decoder
from components.runtime.stage import StageRun, warn_on_failure
from components.token_rows.preference_rows import Answer, Role, encode_preferences

FEEDBACK = "feedback/"
"""Prefix of the skills with user feedback; their tool's name follows."""


@dataclass(frozen=True)
class Scores:
    """One model's scores by skill, question by question in one order for all models."""

    answers: dict[str, list[float]]
    """1 where the answer is exactly right; of captions, CIDEr-D as a share of the most."""
    calls: dict[str, list[float]]
    """1 where the tool calls are exactly right."""
    texts: dict[str, list[float]]
    """Mean probability of a byte in conversations that have no one right answer, 2 ** -bits per byte."""
    tools: dict[str, str]
    """The tool that a skill's questions should call last: corrections are by tool, suites have names of their own.

    "pictures" of questions about pictures that users want answered otherwise; of the others "", as no correction is of
    them.
    """
    preferences: dict[str, list[float]]
    """Log-probability of the preferred answer less that of the other, in nats."""


@dataclass(frozen=True)
class AgentFolder:
    """A model folder, and the folder of its saved answers to the suites, if there is one."""

    folder: Path
    answers: Path | None = None


@dataclass(frozen=True)
class Comparison:
    """The gate's decision with what it is made from."""

    decision: GateDecision
    slices: list[Slice]
    score: float
    """Mean of the candidate's share of right answers over the skills."""
    answers: list[Row]
    """The candidate's answers to the suites."""


def judge(run: StageRun) -> None:
    """Write data/judged and data/metrics/judge.json."""
    paths = run.paths
    mode_file = paths.champion / GATE_MODE
    mode: Mode = json.loads(mode_file.read_text(encoding="utf-8"))["mode"] if mode_file.is_file() else "gain"
    candidate, champion = AgentFolder(paths.candidate), AgentFolder(paths.champion, paths.champion)
    comparison = judge_folders(candidate, champion, paths.collected, paths.curated, run.params, mode, run.progress)
    paths.judged.mkdir(parents=True, exist_ok=True)
    page = paths.judged / "report.md"
    with warn_on_failure(str(page)):
        page.write_text(report(comparison.decision, "candidate", "champion"), encoding="utf-8")
    pq.write_table(_paired(comparison.slices), paths.judged / "paired.parquet")
    write_answers(paths.judged, comparison.answers, paths.collected, run.params, run.params.judge.max_questions)
    write_json(paths.metrics / "judge.json", {"score": comparison.score, **comparison.decision.to_json()})
    findings = comparison.decision.findings
    run.tracker.metrics({"score": comparison.score} | {f"{each.skill}/score": each.candidate for each in findings})
    run.tracker.artifact(page)


def judge_folders(
    candidate: AgentFolder,
    champion: AgentFolder,
    collected: Path,
    curated: Path | None,
    params: Params,
    mode: Mode,
    progress: Callable[..., None] = lambda *args, **values: None,
) -> Comparison:
    """Ask two models the same questions and decide between them."""
    scores, answers = _scores(candidate, collected, curated, params, progress)
    champion_scores, _ = _scores(champion, collected, curated, params, progress)
    superseded = {skill for skill, counts in _curated(curated)["skills"].items() if counts["overruled"]}
    slices = list(_slices(scores, champion_scores, superseded, params.judge.min_corrected))
    if mode == "any_gain":
        # Many small gains over all right and wrong answers together can be significant.
        binary = [each for each in slices if set(each.champion) | set(each.candidate) <= {0.0, 1.0}]
        slices.append(
            Slice(
                "overall",
                False,
                [value for each in binary for value in each.candidate],
                [value for each in binary for value in each.champion],
            )
        )
    means = [
        sum(values) / len(values)
        for skill, values in scores.answers.items()
        if values and scores.tools[skill] not in superseded
    ]
    decision = decide(slices, params.judge, mode)
    return Comparison(decision, slices, sum(means) / max(1, len(means)), answers)


def _slices(candidate: Scores, champion: Scores, superseded: set[str], min_corrected: float) -> Iterator[Slice]:
    for skill, correct in candidate.answers.items():
        corrected = candidate.answers.get(f"{FEEDBACK}{candidate.tools[skill]}", [])
        if skill.startswith(FEEDBACK):
            yield Slice(skill, True, correct, champion.answers[skill], min_corrected)
        elif candidate.tools[skill] in superseded and corrected and sum(corrected) / len(corrected) >= min_corrected:
            # Users want another wording of it, and get it: its suites guard the calls alone.
            yield Slice(f"{skill} (calls)", False, candidate.calls[skill], champion.calls[skill])
        else:
            yield Slice(skill, False, correct, champion.answers[skill])
    for skill in candidate.texts:
        yield Slice(skill, False, candidate.texts[skill], champion.texts[skill])
    for skill in candidate.preferences:
        yield Slice(skill, True, candidate.preferences[skill], champion.preferences[skill])


def _curated(curated: Path | None) -> Row:
    """What `curate` wrote: skills, some with so many corrected answers that their suites' wording no longer counts."""
    report: Row = json.loads((curated / CURATED).read_text(encoding="utf-8")) if curated else {"skills": {}}
    return report


def _scores(
    agent_folder: AgentFolder, collected: Path, curated: Path | None, params: Params, progress: Callable[..., None]
) -> tuple[Scores, list[Row]]:
    """The scores, and the answers to the suites that they came from."""
    torch.manual_seed(params.seed)
    model, agent = load_agent(agent_folder.folder)
    most = _most(params)
    folders = [collected / name for name in params.tune.datasets]
    answers = _saved_answers(agent_folder.answers, collected, params) if agent_folder.answers else None
    if answers is None:
        questions = [question for folder in folders for question in read_questions(folder, most)]
        answers = answer_questions(model, agent, questions, params.evaluate, progress)
    table, scores = list(answers), correctness(answers)
    if curated is not None:
        held_out = (curated / name for name in ("demonstrations", "picture-demonstrations"))
        corrected = [each for folder in held_out for each in read_questions(folder, params.evaluate.max_questions)]
        table += answer_questions(model, agent, corrected, params.evaluate)
    # A correction is answered word for word or not: likeness would reward the style of contradicting ones.
    scores += [float(row["correct"]) for row in table[len(scores) :]]
    correct, calls = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    tools: dict[str, str] = {}
    expected_calls = [json.loads(row["expected_calls"]) for row in table]
    mixed = _mixed([(row["suite"], expected) for row, expected in zip(table, expected_calls, strict=True)])
    reworded = Reworded.read(_curated(curated))
    for row, expected, score in zip(table, expected_calls, scores, strict=True):
        if "/" in row["suite"]:  # a sample of free text has no right answer
            skill, tool = _skill(row["suite"], expected, mixed)
            if tool == NO_CALL and IMAGE in row["question"]:
                is_reworded = (row["question"], row["expected"]) in reworded
                skill, tool = (f"{skill} reworded", PICTURES) if is_reworded else (skill, "")
            tools.setdefault(skill, tool)
            correct[skill].append(score)
            calls[skill].append(float(row["right_calls"]))
    size = max(1, params.evaluate.batch_size // 4)
    texts = {folder.name: _text_scores(model, agent, folder, most, size) for folder in folders}
    preferred = _preferences(model, agent, curated / "preferences", size) if curated is not None else []
    return Scores(dict(correct), dict(calls), texts, tools, {f"{FEEDBACK}preferences": preferred}), answers


def _skill(suite: str, expected: list[Row], mixed: set[str]) -> tuple[str, str]:
    """The skill of a question, and the last tool that it calls, whose result the answer words.

    A suite whose questions end on several tools is split by tool, for users may want another wording of one of them.
    """
    if suite.startswith(FEEDBACK):
        return suite, suite.removeprefix(FEEDBACK)
    skill, tool = suite.partition("/")[0], _last_tool(expected)
    return (f"{skill} to {tool}" if skill in mixed else skill), tool


def _last_tool(expected: list[Row]) -> str:
    return str(expected[-1]["name"]) if expected else NO_CALL


def _mixed(questions: Iterable[tuple[str, list[Row]]]) -> set[str]:
    """Skills whose questions end on more than one tool."""
    tools = defaultdict[str, set[str]](set)
    for suite, expected in questions:
        tools[suite.partition("/")[0]].add(_last_tool(expected))
    return {skill for skill, names in tools.items() if len(names) > 1}


def _most(params: Params) -> int:
    return min(params.judge.max_questions, params.evaluate.max_questions)


def _text_scores(model: Decoder, agent: Agent, folder: Path, most: int, batch_size: int) -> list[float]:
    pieces = read_conversations(agent, folder, most)
    bits = piece_bits(model, agent.tokenizer, pieces, batch_size)
    sizes = [max(1, masked_bytes(agent.tokenizer, piece)) for piece in pieces]
    return [2 ** -(piece / size) for piece, size in zip(bits, sizes, strict=True)]


def _preferences(model: Decoder, agent: Agent, folder: Path, batch_size: int) -> list[float]:
    """Log-probability of each held-out preferred answer less that of a rejected one.

    A pair is its own comparison; unpaired labels are compared liked with disliked, in their order: higher confidence
    in everything is no gain. Not divided by length: DPO and KTO train these very sums.
    """
    pairs: list[dict[Role, Answer]] = []
    unpaired: dict[Role, list[Answer]] = {Role.CHOSEN: [], Role.REJECTED: []}
    for _, answers in encode_preferences(agent.tokenizer, read_rows(folder, "test")):
        if any(len(answer) > agent.context_len for answer in answers.values()):
            continue
        if len(answers) == 2:
            pairs.append(answers)
        else:
            for role, answer in answers.items():
                unpaired[role].append(answer)
    liked, disliked = unpaired[Role.CHOSEN], unpaired[Role.REJECTED]
    pairs += [{Role.CHOSEN: up, Role.REJECTED: down} for up, down in zip(liked, disliked, strict=False)]
    pieces = [pair[role].piece() for pair in pairs for role in (Role.CHOSEN, Role.REJECTED)]
    bits = piece_bits(model, agent.tokenizer, pieces, batch_size)
    return [(bits[number + 1] - bits[number]) * math.log(2) for number in range(0, len(bits), 2)]


def _saved_answers(folder: Path, collected: Path, params: Params) -> list[Row] | None:
    """The answers saved when the model was registered, if they are to these very suites."""
    path = folder / ANSWERS_OF
    if not path.is_file() or not (folder / ANSWERS).is_file():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved["held_out_digest"] != held_out_digest(collected, params) or saved["questions"] < _most(params):
        return None
    return list(first_per_suite(pq.read_table(folder / ANSWERS).to_pylist(), _most(params)))


def _paired(slices: list[Slice]) -> pa.Table:
    rows = [
        (each.skill, each.target, float(champion), float(candidate))
        for each in slices
        for champion, candidate in zip(each.champion, each.candidate, strict=True)
    ]
    names = ("skill", "target", "champion", "candidate")
    return pa.table({name: [row[column] for row in rows] for column, name in enumerate(names)})
