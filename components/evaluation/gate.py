"""Whether a candidate may follow the champion: exact paired tests on the same held-out questions, skill by skill.

A *target* is what the change is about; promotion needs a real gain on one. A *guard* is every other skill; none may
really fall. Right or wrong answers: the sign test on questions that the two answer differently (McNemar 1947,
exact). Scores between 0 and 1: the sign-flip permutation test on the mean difference. Gains are corrected over all
targets together (Holm 1979), targets too small to ever show one set aside beforehand (Tarone 1990, with numbers of
questions, which no answer changes). Falls are not corrected: "nothing fell" must hold of each skill, so correcting
would hide harm; the price is a candidate refused in vain now and then, which costs an evening and no user.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from components.config import JudgeConfig

Mode = Literal["gain", "replace", "any_gain"]
"""gain: better in what people said. replace: the champion must go, nothing may be worse. any_gain: better anywhere."""
Role = Literal["target", "guard"]
Side = Literal["greater", "less"]

EXACT_PAIRS = 14
"""Up to so many differing pairs every flip of signs is tried (2 ** 14)."""
FLIPS = 20_000
_FLIPS_AT_ONCE = 500


@dataclass(frozen=True)
class Slice:
    """Both sides' scores on the same questions of one skill, each from 0 to 1."""

    name: str
    role: Role
    champion: Sequence[float]
    candidate: Sequence[float]


@dataclass(frozen=True)
class Finding:
    """What one slice says."""

    name: str
    role: Role
    questions: int
    champion: float
    candidate: float
    difference: float
    wins: int
    losses: int
    p_gain: float
    p_gain_corrected: float
    """1 where gains do not count, or the slice is too small to show one."""
    p_fall: float
    verdict: str
    """`gained`, `fell`, `no real change`, or `too few`: no result on so few questions could have been a gain."""


@dataclass(frozen=True)
class Verdict:
    """The gate's word."""

    promote: bool
    reason: str
    """One line that names the skill and by how much."""
    mode: Mode
    false_promotion_rate: float
    findings: list[Finding] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def decide(slices: Iterable[Slice], config: JudgeConfig, mode: Mode = "gain") -> Verdict:
    """Judge the slices; with mode any_gain each is target and guard in one."""
    given = [part for part in slices if len(part.champion)]
    if mode == "any_gain":
        given = [replace(part, role="target") for part in given]
    rate = config.false_promotion_rate
    measured = [_measure(part) for part in given]
    targets = [index for index, found in enumerate(measured) if found.role == "target"]
    testable = [targets[place] for place in _testable([measured[index].questions for index in targets], rate)]
    corrected = dict(zip(testable, holm([measured[index].p_gain for index in testable]), strict=True))
    findings = [
        _conclude(found, corrected.get(index), index in targets, config, mode) for index, found in enumerate(measured)
    ]
    promote, reason = _decide(findings, config, mode)
    return Verdict(promote, reason, mode, rate, findings)


def first(config: JudgeConfig, mode: Mode = "gain") -> Verdict:
    """The verdict where there is no champion to beat."""
    return Verdict(True, "there was no champion", mode, config.false_promotion_rate)


def p_value(differences: Sequence[float] | npt.NDArray[np.float64], side: Side, seed: int = 0) -> float:
    """Chance of a mean at least so large (`less`: so small) were each difference as likely with the other sign."""
    values = np.asarray(differences, dtype=np.float64)
    values = values[values != 0] * (1 if side == "greater" else -1)
    if not len(values):
        return 1.0
    if np.all(np.abs(values) == 1):
        return sign_test(int((values > 0).sum()), len(values))
    return _sign_flip_test(values, seed)


def sign_test(wins: int, pairs: int) -> float:
    """Chance of `wins` or more heads in `pairs` tosses of a fair coin."""
    return sum(math.comb(pairs, heads) for heads in range(wins, pairs + 1)) / (1 << pairs)


def _sign_flip_test(values: npt.NDArray[np.float64], seed: int) -> float:
    count = len(values)
    # Sums that differ only by rounding count as equal.
    reached = values.sum() - 1e-9 * np.abs(values).sum()
    if count <= EXACT_PAIRS:
        signs = (np.arange(2**count)[:, None] >> np.arange(count) & 1) * 2.0 - 1
        return float((signs @ values >= reached).mean())
    random = np.random.default_rng(seed)
    hits = 0
    for _ in range(FLIPS // _FLIPS_AT_ONCE):
        signs = random.integers(0, 2, (_FLIPS_AT_ONCE, count)) * 2.0 - 1
        hits += int((signs @ values >= reached).sum())
    # The observed signs are one of the possible draws: no p-value is 0 (Phipson and Smyth 2010).
    return (hits + 1) / (FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given."""
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def fewest_questions(rate: float) -> int:
    """Questions that a lone slice needs: so many wins without a loss have a p-value of at most `rate`."""
    return math.ceil(-math.log2(rate) - 1e-12)


def _testable(sizes: Sequence[int], rate: float) -> list[int]:
    """Places of the slices that could show a gain, corrected for no more slices than these."""
    for count in range(1, len(sizes) + 1):
        able = [place for place, size in enumerate(sizes) if size >= fewest_questions(rate / count)]
        if len(able) <= count:
            return able
    return []


def _measure(part: Slice) -> Finding:
    champion, candidate = np.asarray(part.champion, np.float64), np.asarray(part.candidate, np.float64)
    if champion.shape != candidate.shape:
        raise ValueError(f"{part.name}: {len(champion)} scores of the champion, {len(candidate)} of the candidate")
    change = candidate - champion
    return Finding(
        name=part.name,
        role=part.role,
        questions=len(change),
        champion=float(champion.mean()),
        candidate=float(candidate.mean()),
        difference=float(change.mean()),
        wins=int((change > 0).sum()),
        losses=int((change < 0).sum()),
        p_gain=p_value(change, "greater"),
        p_gain_corrected=1.0,
        p_fall=p_value(change, "less"),
        verdict="no real change",
    )


def _conclude(found: Finding, corrected: float | None, counts: bool, config: JudgeConfig, mode: Mode) -> Finding:
    # On a target each real fall is one too many; elsewhere, a small one is borne.
    borne = 0.0 if counts and mode != "any_gain" else config.max_fall
    verdict = "no real change"
    if found.p_fall <= config.fall_rate and -found.difference > borne:
        verdict = "fell"
    elif counts and corrected is None:
        verdict = "too few"
    # What may be lost elsewhere without more ado is too little to gain here.
    elif corrected is not None and corrected <= config.false_promotion_rate and found.difference > config.max_fall:
        verdict = "gained"
    return replace(found, p_gain_corrected=1.0 if corrected is None else corrected, verdict=verdict)


def _decide(findings: Sequence[Finding], config: JudgeConfig, mode: Mode) -> tuple[bool, str]:
    fallen = sorted((found for found in findings if found.verdict == "fell"), key=lambda found: found.difference)
    gained = sorted((found for found in findings if found.verdict == "gained"), key=lambda found: -found.difference)
    if fallen:
        return False, " and ".join(f"{_told(found)}, p {found.p_fall:.2g}" for found in fallen[:3])
    if gained:
        better = " and ".join(f"{_told(found)}, corrected p {found.p_gain_corrected:.2g}" for found in gained[:3])
        return True, f"{better}; no skill fell"
    if mode == "replace":
        return (True, "the champion must go, and no skill fell") if findings else (False, "no question was held out")
    targets = [found for found in findings if found.role == "target"]
    if not targets:
        return False, 'no held-out feedback to judge by; collect more and run "loopwright feedback ingest"'
    best = max(targets, key=lambda found: (found.verdict != "too few", found.difference))
    if best.verdict == "too few":
        rate, needed = config.false_promotion_rate, fewest_questions(config.false_promotion_rate)
        return False, (
            f"{best.questions} held-out questions of {best.name} can never reach p <= {rate:g};"
            f" collect at least {needed}"
        )
    return False, f"no real gain: at best {_told(best)}, corrected p {best.p_gain_corrected:.2g}"


def _told(found: Finding) -> str:
    if not round(found.difference, 4):
        return f"{found.name} stays at {found.champion:.1%}"
    moved = "rose" if found.difference > 0 else "fell"
    return (
        f"{found.name} {moved} {abs(found.difference) * 100:.1f} points ({found.champion:.1%} to"
        f" {found.candidate:.1%} on {found.questions}: {found.wins} won, {found.losses} lost)"
    )


def report(verdict: Verdict | Mapping[str, Any], title: str = "Candidate against champion") -> str:
    """The verdict in Markdown."""
    said = verdict.to_json() if isinstance(verdict, Verdict) else verdict
    lines = [
        f"# {title}",
        "",
        f"**{'Promoted' if said['promote'] else 'Refused'}**: {said['reason']}.",
        "",
        f"At most {said['false_promotion_rate']:.1%} of candidates that are no better pass, over all skills together.",
        "",
        "| skill | asked as | questions | champion | candidate | points | won | lost"
        " | p gain | corrected | p fall | verdict |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    lines += [
        f"| {row['name']} | {row['role']} | {row['questions']} | {row['champion']:.1%} | {row['candidate']:.1%}"
        f" | {row['difference'] * 100:+.1f} | {row['wins']} | {row['losses']} | {row['p_gain']:.2g}"
        f" | {row['p_gain_corrected']:.2g} | {row['p_fall']:.2g} | {row['verdict']} |"
        for row in said["findings"]
    ]
    return "\n".join(lines) + "\n"
