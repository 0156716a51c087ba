"""Stage: candidate and champion answer the same held-out questions, and the gate decides.

Asked are the suites of the datasets, the prompts whose answers people corrected and that were kept from training, and
how much each model prefers what people preferred. The champion's answers to the suites are measured once, when it is
registered, and read again here.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from components.agent.agent import Agent
from components.config.params import Params
from components.datasets.formats import Row, read_rows, write_json
from components.evaluation.evaluate import (
    ANSWERS,
    ANSWERS_OF,
    held_out_digest,
    read_conversations,
    write_answers,
)
from components.evaluation.gate import GateDecision, Mode, Slice, decide, report
from components.evaluation.metrics import masked_bytes, piece_bits
from components.evaluation.questions import answer_questions, read_questions
from components.feedback.items import NO_CALL
from components.inference.cache_plan import context_len
from components.models.checkpoint import load_decoder
from components.models.decoder import Decoder
from components.models.devices import best_device
from components.runtime.stage import StageRun, warn_on_failure
from components.token_rows.preference_rows import Answer, Role, encode_preferences

MODE = "gate.json"
"""Beside a champion: `{"mode": ...}` where the gate is to ask for something else than a gain."""
FEEDBACK = "feedback/"
"""Skills that people spoke about are called so, and then as their tool."""


@dataclass(frozen=True)
class Scores:
    """What one model scored, question by question in one order for all models, by skill."""

    words: dict[str, list[float]]
    """1 where the answer is exactly right."""
    calls: dict[str, list[float]]
    """1 where the tool calls are exactly right."""
    texts: dict[str, list[float]]
    """Mean probability of a byte in conversations that have no one right answer, 2 ** -bits per byte."""
    tools: dict[str, str]
    """What a skill's questions should call: corrections are known by the tool, suites by a name of their own."""
    preferences: dict[str, list[float]]
    """Log-probability of what people liked less that of what they did not, in nats."""


@dataclass(frozen=True)
class Model:
    """A model folder, and where its answers to the suites lie, if they were kept."""

    folder: Path
    answers: Path | None = None


@dataclass(frozen=True)
class Judgement:
    """The verdict with what it was reached from."""

    verdict: GateDecision
    slices: list[Slice]
    score: float
    """Mean of the candidate's share of right answers over the skills."""
    answers: list[Row]
    """What the candidate answered to the suites."""


def judge(run: StageRun) -> None:
    """Write data/judged and data/metrics/judge.json."""
    paths = run.paths
    mode_file = paths.champion / MODE
    mode: Mode = json.loads(mode_file.read_text(encoding="utf-8"))["mode"] if mode_file.is_file() else "gain"
    candidate, champion = Model(paths.candidate), Model(paths.champion, paths.champion)
    judged = judge_folders(candidate, champion, paths.collected, paths.curated, run.params, mode, run.progress)
    paths.judged.mkdir(parents=True, exist_ok=True)
    page = paths.judged / "report.md"
    with warn_on_failure(str(page)):
        page.write_text(report(judged.verdict, "candidate", "champion"), encoding="utf-8")
    pq.write_table(_paired(judged.slices), paths.judged / "paired.parquet")
    write_answers(paths.judged, judged.answers, paths.collected, run.params, run.params.judge.max_questions)
    write_json(paths.metrics / "judge.json", {"score": judged.score, **judged.verdict.to_json()})
    run.tracker.metrics(judged_metrics(judged))
    run.tracker.artifact(page)


def judged_metrics(judged: Judgement) -> dict[str, float]:
    """The figures under the names that the registry shows."""
    findings = judged.verdict.findings
    return {"score": judged.score} | {f"{one.skill}/score": one.candidate for one in findings}


def judge_folders(
    candidate: Model,
    champion: Model,
    collected: Path,
    curated: Path | None,
    params: Params,
    mode: Mode,
    progress: Callable[..., None] = lambda *args, **facts: None,
) -> Judgement:
    """Ask two models the same questions and decide between them."""
    theirs, answers = _scores(candidate, collected, curated, params, progress)
    ours, _ = _scores(champion, collected, curated, params, progress)
    overruled = _overruled(curated)
    slices = list(_slices(ours, theirs, overruled, params.judge.min_corrected))
    if mode == "any_gain":
        slices.append(_overall(slices))
    words = [
        sum(values) / len(values)
        for skill, values in theirs.words.items()
        if values and theirs.tools[skill] not in overruled
    ]
    verdict = decide(slices, params.judge, mode)
    return Judgement(verdict, slices, sum(words) / max(1, len(words)), answers)


def _overall(slices: list[Slice]) -> Slice:
    """All right and wrong answers as one: many small gains are one that can be told from chance."""
    words = [one for one in slices if set(one.champion) | set(one.candidate) <= {0.0, 1.0}]
    ours = [value for one in words for value in one.champion]
    return Slice("overall", False, ours, [value for one in words for value in one.candidate])


def _slices(ours: Scores, theirs: Scores, overruled: set[str], min_corrected: float) -> Iterator[Slice]:
    for skill, right in theirs.words.items():
        corrected = theirs.words.get(f"{FEEDBACK}{theirs.tools[skill]}", [])
        if skill.startswith(FEEDBACK):
            yield Slice(skill, True, ours.words[skill], right, min_corrected)
        elif theirs.tools[skill] in overruled and corrected and sum(corrected) / len(corrected) >= min_corrected:
            # People want other words of it, and get them: its suites guard the calls alone.
            yield Slice(f"{skill} (calls)", False, ours.calls[skill], theirs.calls[skill])
        else:
            yield Slice(skill, False, ours.words[skill], right)
    for skill in ours.texts:
        yield Slice(skill, False, ours.texts[skill], theirs.texts[skill])
    for skill in ours.preferences:
        yield Slice(skill, True, ours.preferences[skill], theirs.preferences[skill])


def _overruled(curated: Path | None) -> set[str]:
    """Skills of which people corrected so many answers that their suites' wording no longer counts."""
    if curated is None:
        return set()
    skills: Mapping[str, Row] = json.loads((curated / "curated.json").read_text(encoding="utf-8"))["skills"]
    return {skill for skill, facts in skills.items() if facts["overruled"]}


def _scores(
    asked: Model, collected: Path, curated: Path | None, params: Params, progress: Callable[..., None]
) -> tuple[Scores, list[Row]]:
    """The scores, and the answers to the suites that they came from."""
    torch.manual_seed(params.seed)
    device = best_device()
    model = load_decoder(asked.folder, device=device)
    agent = Agent.load(asked.folder, context_len(model))
    most = _most(params)
    folders = [collected / name for name in params.tune.datasets]
    answers = _known_answers(asked.answers, collected, params) if asked.answers else None
    if answers is None:
        questions = [one for place in folders for one in read_questions(place, most)]
        answers = answer_questions(model, agent, questions, params.evaluate, progress)
    table = list(answers)
    if curated is not None:
        corrected = list(read_questions(curated / "demonstrations", params.evaluate.max_questions))
        table += answer_questions(model, agent, corrected, params.evaluate)
    words, calls = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    tools: dict[str, str] = {}
    asked_of = [(row, json.loads(row["expected_calls"])) for row in table]
    mixed = _mixed([(row["suite"], expected) for row, expected in asked_of])
    for row, expected in asked_of:
        if "/" in row["suite"]:  # a sample of free text has no right answer
            skill, tool = _skill(row["suite"], expected, mixed)
            tools.setdefault(skill, tool)
            words[skill].append(float(row["correct"]))
            calls[skill].append(float(row["right_calls"]))
    size = max(1, params.evaluate.batch_size // 4)
    texts = {place.name: _text_scores(model, agent, place, most, size) for place in folders}
    preferred = _preferences(model, agent, curated / "preferences", size) if curated is not None else []
    return Scores(dict(words), dict(calls), texts, tools, {f"{FEEDBACK}preferences": preferred}), answers


def _skill(suite: str, expected: list[Row], mixed: set[str]) -> tuple[str, str]:
    """The skill that a question counts for, and the tool whose result its answer puts into words: the last it calls.

    Questions of suites that end on several tools are parted by it, as people may want other words of one of them.
    """
    tool = _last_tool(expected)
    if suite.startswith(FEEDBACK):
        return suite, tool
    skill = suite.partition("/")[0]
    return (f"{skill} to {tool}" if skill in mixed else skill), tool


def _last_tool(expected: list[Row]) -> str:
    return str(expected[-1]["name"]) if expected else NO_CALL


def _mixed(asked: Iterable[tuple[str, list[Row]]]) -> set[str]:
    """Skills whose questions end on more than one tool."""
    tools = defaultdict[str, set[str]](set)
    for suite, expected in asked:
        tools[suite.partition("/")[0]].add(_last_tool(expected))
    return {skill for skill, found in tools.items() if len(found) > 1}


def _most(params: Params) -> int:
    return min(params.judge.max_questions, params.evaluate.max_questions)


def _text_scores(model: Decoder, agent: Agent, folder: Path, most: int, batch_size: int) -> list[float]:
    pieces = read_conversations(agent, folder, most)
    bits = piece_bits(model, agent.tokenizer, pieces, batch_size)
    sizes = [max(1, masked_bytes(agent.tokenizer, piece)) for piece in pieces]
    return [2 ** -(one / size) for one, size in zip(bits, sizes, strict=True)]


def _preferences(model: Decoder, agent: Agent, folder: Path, batch_size: int) -> list[float]:
    """By how much each held-out answer that people liked is more probable than one they did not.

    A pair is its own comparison; unpaired labels are compared one liked with one disliked, in their order: a model that
    has become surer of everything has learned nothing. Not divided by length: DPO and KTO train these very sums.
    """
    pairs: list[dict[Role, Answer]] = []
    alone: dict[Role, list[Answer]] = {Role.CHOSEN: [], Role.REJECTED: []}
    for _, answers in encode_preferences(agent.tokenizer, read_rows(folder, "test")):
        if any(len(answer) > agent.context_len for answer in answers.values()):
            continue
        if len(answers) == 2:
            pairs.append(answers)
        else:
            for role, answer in answers.items():
                alone[role].append(answer)
    liked, disliked = alone[Role.CHOSEN], alone[Role.REJECTED]
    pairs += [{Role.CHOSEN: one, Role.REJECTED: other} for one, other in zip(liked, disliked, strict=False)]
    pieces = [pair[role].piece() for pair in pairs for role in (Role.CHOSEN, Role.REJECTED)]
    bits = piece_bits(model, agent.tokenizer, pieces, batch_size)
    return [(bits[number + 1] - bits[number]) * math.log(2) for number in range(0, len(bits), 2)]


def _known_answers(folder: Path, collected: Path, params: Params) -> list[Row] | None:
    """What the model answered to these very suites when it was registered, as far as they are asked here."""
    about = folder / ANSWERS_OF
    if not about.is_file() or not (folder / ANSWERS).is_file():
        return None
    facts = json.loads(about.read_text(encoding="utf-8"))
    if facts["held_out_digest"] != held_out_digest(collected, params) or facts["questions"] < _most(params):
        return None
    seen: dict[str, int] = defaultdict(int)
    rows = []
    for row in pq.read_table(folder / ANSWERS).to_pylist():
        seen[row["suite"]] += 1
        if seen[row["suite"]] <= _most(params):
            rows.append(row)
    return rows


def _paired(slices: list[Slice]) -> pa.Table:
    rows: list[dict[str, Any]] = [
        {"skill": one.skill, "target": one.target, "champion": float(ours), "candidate": float(theirs)}
        for one in slices
        for ours, theirs in zip(one.champion, one.candidate, strict=True)
    ]
    names = ("skill", "target", "champion", "candidate")
    return pa.table({name: [row[name] for row in rows] for name in names})
