"""The promotion gate: exact paired tests of candidate and champion, skill by skill.

Both answer the same held-out questions, so only the questions on which they differ count. A gain is significant when an
exact one-sided test rejects chance at `false_promotion_rate`, corrected for the number of skills that could have gained
(Holm 1979); a regression is significant when it is larger than `max_fall` and an exact test rejects chance at
`fall_rate`, corrected in the same way: without that, a dozen skills would refuse every second good candidate by chance.
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
"""gain: a skill with user feedback must gain. replace: the champion must go, nothing may regress.
any_gain: some skill must gain, whichever."""

SIGN_FLIPS = 20_000
"""Assignments of signs: all of them for up to 14 pairs, else a sample of this size."""
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Slice:
    """The paired scores of one skill: correct or wrong (1, 0), or any number of which more is better."""

    skill: str
    target: bool
    """Whether it has user feedback; other skills must merely not regress."""
    candidate: Sequence[float]
    champion: Sequence[float]
    floor: float | None = None
    """Mean below which a gain does not count: learning the most frequent of contradicting answers is a gain too."""

    @property
    def differences(self) -> Values:
        differences: Values = np.asarray(self.candidate, float) - np.asarray(self.champion, float)
        return differences


@dataclass(frozen=True)
class SkillResult:
    """The outcome of the tests for one skill."""

    skill: str
    target: bool
    questions: int
    candidate: float
    """Mean score."""
    champion: float
    wins: int
    losses: int
    p_gain: float
    """After Holm's correction; 1 where no gain was tested."""
    p_fall: float
    """After Holm's correction."""
    outcome: str
    """better, worse or even."""

    @property
    def difference(self) -> float:
        return self.candidate - self.champion

    @property
    def summary(self) -> str:
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
    """Compare a candidate with the champion by their paired scores; slices without questions are left out."""
    slices = [each for each in slices if len(each.champion)]
    needed = wins_needed(config.false_promotion_rate)
    targets = [each for each in slices if mode == "any_gain" or each.target]
    # Skills with too few questions to ever pass must not make it harder for the others.
    eligible = [each for each in targets if len(each.champion) >= needed]
    p_gains = dict(zip(map(id, eligible), holm([p_greater(each.differences) for each in eligible]), strict=True))
    p_falls = holm([p_greater(-each.differences) for each in slices])
    findings = [
        _test(each, p_gains.get(id(each), 1.0), p_fall, config) for each, p_fall in zip(slices, p_falls, strict=True)
    ]
    promote, reason = _conclude(findings, {each.skill for each in targets}, needed, mode)
    return GateDecision(promote, reason, mode, config.false_promotion_rate, findings)


def decide_by_suite(
    suites: Mapping[str, Sequence[int]],
    candidate: Sequence[float],
    champion: Sequence[float],
    config: JudgeConfig,
) -> GateDecision:
    """The decision on the scores of all rows: by suite, from the indices of its rows, and over all suites."""
    slices = [
        Slice(suite, False, [candidate[index] for index in indices], [champion[index] for index in indices])
        for suite, indices in suites.items()
    ]
    if len(slices) > 1:
        slices.append(Slice("overall", False, candidate, champion))
    return decide(slices, config, "any_gain")


def p_greater(differences: Values) -> float:
    """p-value of differences above zero: a sign test where answers are correct or wrong, else by flipped signs."""
    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    if np.all(np.abs(moved) == 1):
        return float(binomtest(int((moved > 0).sum()), len(moved), alternative="greater").pvalue)
    if len(moved) == 1:  # refused by scipy
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
    """Holm's adjusted p-values, in the order of `p_values`."""
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=lambda number: p_values[number])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = highest
    return adjusted


def wins_needed(rate: float) -> int:
    """Questions won, with none lost, below which no sign test reaches `rate`."""
    return math.ceil(math.log2(1 / rate))


def _test(slice_: Slice, p_gain: float, p_fall: float, config: JudgeConfig) -> SkillResult:
    differences = slice_.differences
    candidate, champion = float(np.mean(slice_.candidate)), float(np.mean(slice_.champion))
    # A skill with user feedback may not regress significantly at all; others may within `max_fall`.
    fell = p_fall <= config.fall_rate and (slice_.target or -differences.mean() > config.max_fall)
    gained = p_gain <= config.false_promotion_rate and (slice_.floor is None or candidate >= slice_.floor)
    return SkillResult(
        slice_.skill,
        slice_.target,
        len(differences),
        candidate,
        champion,
        wins=int((differences > 0).sum()),
        losses=int((differences < 0).sum()),
        p_gain=p_gain,
        p_fall=p_fall,
        outcome="worse" if fell else "better" if gained else "even",
    )


def _conclude(findings: Sequence[SkillResult], targets: set[str], needed: int, mode: Mode) -> tuple[bool, str]:
    worse = sorted((each for each in findings if each.outcome == "worse"), key=lambda each: each.difference)
    better = [each for each in findings if each.outcome == "better"]
    if worse:
        return False, "regresses: " + "; ".join(each.summary for each in worse)
    if better:
        return True, "gains: " + "; ".join(each.summary for each in better) + "; nothing regresses"
    if mode == "replace" and findings:
        return True, "the champion was trained on revoked feedback; nothing regresses without it"
    tested = [each for each in findings if each.skill in targets]
    if not tested:
        return False, "no held-out feedback to judge by; collect more"
    most = max(tested, key=lambda each: each.questions)
    if most.questions < needed:
        return False, f"too little held-out feedback: {most.skill} has {most.questions} prompts, a gain needs {needed}"
    closest = min(tested, key=lambda each: (each.p_gain, -each.difference))
    return False, f"no significant gain: closest is {closest.summary}, p = {closest.p_gain:.2g}"


def report(decision: GateDecision, candidate: str, champion: str) -> str:
    """The decision as a page of Markdown."""
    word = "promoted" if decision.promote else "refused"
    lines = [
        f"# {candidate} against {champion}: {word}",
        "",
        f"{decision.reason[:1].upper()}{decision.reason[1:]}.",
        "",
        f"A candidate no better than its champion passes with a chance of at most {decision.false_promotion_rate:g}.",
        "",
        "| skill | judged | questions | champion | candidate | won | lost | p gain | p fall | outcome |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {each.skill} | {'must gain' if each.target else 'must not regress'} | {each.questions} "
        f"| {each.champion:.4g} | {each.candidate:.4g} | {each.wins} | {each.losses} "
        f"| {each.p_gain:.2g} | {each.p_fall:.2g} | {each.outcome} |"
        for each in sorted(decision.findings, key=lambda each: (not each.target, each.skill))
    ]
    return "\n".join(lines) + "\n"
