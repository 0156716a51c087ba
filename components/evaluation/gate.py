"""The gate between a candidate and the champion: exact paired tests, skill by skill.

Both answer the same held-out questions, so only the questions on which they differ tell anything. A gain is real when
an exact one-sided test says so at `false_promotion_rate`, corrected for the number of skills that could have gained
(Holm 1979); a fall is real when it is larger than `max_fall` and an exact test says so at `fall_rate`, corrected in
the same way: without that, a dozen skills would refuse every second good candidate by chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, permutation_test

from components.config.loop_settings import JudgeConfig

Mode = Literal["gain", "replace", "any_gain"]
"""gain: what people spoke about must get better. replace: the champion must go, nothing may fall.
any_gain: some skill must get better, whichever."""

SIGN_FLIPS = 20_000
"""Assignments of signs: all of them for up to 14 pairs, else as many drawn."""
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Slice:
    """The paired scores of one skill: right or wrong (1, 0), or any number of which more is better."""

    skill: str
    target: bool
    """What people spoke about; other skills must merely not fall."""
    champion: Sequence[float]
    candidate: Sequence[float]
    floor: float | None = None
    """Mean below which a gain does not count: who learned the commonest of contradicting answers gains too."""

    @property
    def differences(self) -> Values:
        moved: Values = np.asarray(self.candidate, float) - np.asarray(self.champion, float)
        return moved


@dataclass(frozen=True)
class SkillResult:
    """What the tests say of one skill."""

    skill: str
    target: bool
    questions: int
    champion: float
    """Mean score."""
    candidate: float
    wins: int
    losses: int
    p_gain: float
    """After Holm's correction; 1 where no gain was asked for."""
    p_fall: float
    """After Holm's correction."""
    outcome: str
    """better, worse or even."""

    @property
    def difference(self) -> float:
        return self.candidate - self.champion

    @property
    def told(self) -> str:
        return f"{self.skill} from {self.champion:.3f} to {self.candidate:.3f} ({self.wins} won, {self.losses} lost)"


@dataclass(frozen=True)
class GateDecision:
    """Whether the candidate is promoted, and why."""

    promote: bool
    reason: str
    mode: Mode
    false_promotion_rate: float
    findings: list[SkillResult] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def decide(slices: Sequence[Slice], config: JudgeConfig, mode: Mode = "gain") -> GateDecision:
    """Judge a candidate by its paired scores; slices without questions are left out."""
    asked = [one for one in slices if len(one.champion)]
    needed = wins_needed(config.false_promotion_rate)
    wanted = [one for one in asked if mode == "any_gain" or one.target]
    # Skills with too few questions to ever pass must not make it harder for the others.
    eligible = [one for one in wanted if len(one.champion) >= needed]
    gains = dict(zip(map(id, eligible), holm([p_greater(one.differences) for one in eligible]), strict=True))
    falls = holm([p_greater(-one.differences) for one in asked])
    findings = [_find(one, gains.get(id(one), 1.0), fall, config) for one, fall in zip(asked, falls, strict=True)]
    promote, reason = _conclude(findings, {one.skill for one in wanted}, needed, mode)
    return GateDecision(promote, reason, mode, config.false_promotion_rate, findings)


def decide_by_suite(
    suites: Mapping[str, Sequence[int]],
    candidate: Sequence[float],
    champion: Sequence[float],
    config: JudgeConfig,
) -> GateDecision:
    """The decision on the scores of all rows: by suite, from the indices of its rows, and over all suites."""
    slices = [
        Slice(suite, False, [champion[index] for index in indices], [candidate[index] for index in indices])
        for suite, indices in suites.items()
    ]
    if len(slices) > 1:
        slices.append(Slice("overall", False, champion, candidate))
    return decide(slices, config, "any_gain")


def p_greater(differences: Values) -> float:
    """Chance of differences so far above zero: a sign test where answers are right or wrong, else by flipped signs."""
    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    if np.all(np.abs(moved) == 1):
        return float(binomtest(int((moved > 0).sum()), len(moved), alternative="greater").pvalue)
    if len(moved) == 1:  # which scipy refuses: one coin
        return 0.5 if moved[0] > 0 else 1.0
    flips = permutation_test(
        (moved,),
        np.sum,
        permutation_type="samples",
        n_resamples=SIGN_FLIPS,
        batch=1000,
        alternative="greater",
        rng=np.random.default_rng(0),
    )
    return float(flips.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=lambda number: p_values[number])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = highest
    return adjusted


def wins_needed(rate: float) -> int:
    """Questions won, with none lost, below which no sign test reaches `rate`."""
    return math.ceil(math.log2(1 / rate))


def _find(one: Slice, p_gain: float, p_fall: float, config: JudgeConfig) -> SkillResult:
    moved = one.differences
    candidate = float(np.mean(one.candidate))
    # What people spoke about may not really fall at all; elsewhere a fall within `max_fall` is let pass.
    fell = p_fall <= config.fall_rate and (one.target or -moved.mean() > config.max_fall)
    gained = p_gain <= config.false_promotion_rate and (one.floor is None or candidate >= one.floor)
    wins, losses = int((moved > 0).sum()), int((moved < 0).sum())
    outcome = "worse" if fell else "better" if gained else "even"
    champion = float(np.mean(one.champion))
    return SkillResult(one.skill, one.target, len(moved), champion, candidate, wins, losses, p_gain, p_fall, outcome)


def _conclude(findings: Sequence[SkillResult], wanted: set[str], needed: int, mode: Mode) -> tuple[bool, str]:
    worse = sorted((one for one in findings if one.outcome == "worse"), key=lambda one: one.difference)
    better = [one for one in findings if one.outcome == "better"]
    if worse:
        return False, "falls: " + "; ".join(one.told for one in worse)
    if better:
        return True, "gains: " + "; ".join(one.told for one in better) + "; nothing falls"
    if mode == "replace" and findings:
        return True, "the champion learned from what was withdrawn; nothing falls without it"
    candidates = [one for one in findings if one.skill in wanted]
    if not candidates:
        return False, "no held-out feedback to judge by; collect more"
    most = max(candidates, key=lambda one: one.questions)
    if most.questions < needed:
        return False, f"too little held-out feedback: {most.skill} has {most.questions} prompts, a gain needs {needed}"
    closest = min(candidates, key=lambda one: (one.p_gain, -one.difference))
    return False, f"no gain is real: closest is {closest.told}, p = {closest.p_gain:.2g}"


def report(verdict: GateDecision, candidate: str, champion: str) -> str:
    """The verdict as a page of Markdown."""
    word = "promoted" if verdict.promote else "refused"
    lines = [
        f"# {candidate} against {champion}: {word}",
        "",
        f"{verdict.reason[:1].upper()}{verdict.reason[1:]}.",
        "",
        f"A candidate no better than its champion passes with a chance of at most {verdict.false_promotion_rate:g}.",
        "",
        "| skill | judged | questions | champion | candidate | won | lost | p gain | p fall | outcome |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {one.skill} | {'must gain' if one.target else 'must not fall'} | {one.questions} | {one.champion:.4g} "
        f"| {one.candidate:.4g} | {one.wins} | {one.losses} | {one.p_gain:.2g} | {one.p_fall:.2g} | {one.outcome} |"
        for one in sorted(verdict.findings, key=lambda one: (not one.target, one.skill))
    ]
    return "\n".join(lines) + "\n"
