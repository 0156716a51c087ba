"""Candidate and champion classifier on the same held-out texts: whether one is really better, and if the baseline is.

Only a text on which they differ tells anything: an exact sign test on right and wrong (McNemar's), suite by suite and
over all texts, by the same rules as the agent's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from components.config.params import Params
from components.evaluation.assess_classifier import (
    PREDICTIONS,
    PREDICTIONS_OF,
    HeldOutTexts,
    baseline,
    held_out_digest,
    predict,
    read_held_out,
)
from components.evaluation.gate import GateDecision, Slice, decide
from components.inference.classifier import TextClassifier


def judge_classifier(
    candidate: Path,
    champion: Path,
    collected: Path,
    params: Params,
    candidate_said: Path | None = None,
    champion_said: Path | None = None,
) -> GateDecision:
    """Whether the classifier in `candidate` may replace that in `champion`; its reason says when the baseline beats it.

    The folders `..._said` hold the predictions that `assess` kept, if any; those of other texts are asked for again.
    """
    asked = read_held_out(collected, params)
    ours, base = _said(candidate, candidate_said, asked, collected, params)
    theirs, _ = _said(champion, champion_said, asked, collected, params)
    if base is None:
        base = baseline(collected, params, [], asked.texts).labels
    return judge_guesses(asked, ours, theirs, base, params)


def judge_guesses(
    asked: HeldOutTexts, candidate: Sequence[str], champion: Sequence[str], baseline: Sequence[str], params: Params
) -> GateDecision:
    """The verdict on guesses of all texts, in their order."""
    right = {
        name: [float(guess == label) for guess, label in zip(guesses, asked.labels, strict=True)]
        for name, guesses in (("candidate", candidate), ("champion", champion), ("baseline", baseline))
    }
    slices = [
        Slice(
            suite,
            False,
            [right["champion"][place] for place in places],
            [right["candidate"][place] for place in places],
        )
        for suite, places in asked.suites.items()
    ]
    if len(slices) > 1:
        slices.append(Slice("overall", False, right["champion"], right["candidate"]))
    verdict = decide(slices, params.judge, "any_gain")
    mean, base_mean = (sum(right[name]) / max(1, len(asked.rows)) for name in ("candidate", "baseline"))
    word = "better" if base_mean > mean else "no better"
    told = f"{verdict.reason}; the TF-IDF baseline is {word}: {base_mean:.3f} against {mean:.3f} of all texts right"
    return replace(verdict, reason=told)


def _said(
    folder: Path, kept: Path | None, asked: HeldOutTexts, collected: Path, params: Params
) -> tuple[list[str], list[str] | None]:
    """A model's guesses, and the baseline's where they were kept with them."""
    if kept is not None and _of_these(kept, held_out_digest(collected, params)):
        table = pq.read_table(kept / PREDICTIONS, columns=["predicted", "baseline"])
        if len(table) == len(asked.rows):
            ours, base = ([str(guess) for guess in table[name].to_pylist()] for name in ("predicted", "baseline"))
            return ours, base
    return predict(TextClassifier.load(folder), asked.texts)[0].labels, None


def _of_these(kept: Path, digest: str) -> bool:
    facts = kept / PREDICTIONS_OF
    if not (facts.is_file() and (kept / PREDICTIONS).is_file()):
        return False
    return bool(json.loads(facts.read_text(encoding="utf-8"))["held_out_digest"] == digest)
