"""Stage: what a run's classifier or summarizer is worth on held-out texts, always beside a baseline."""

from __future__ import annotations

from components.evaluation.assess_classifier import assess_classifier
from components.evaluation.assess_summarizer import assess_summarizer
from components.runtime.stage import StageRun


def assess(run: StageRun) -> None:
    """Write data/assessment/MODEL, its metrics file and plots."""
    {"classifier": assess_classifier, "summarizer": assess_summarizer}[run.item](run)
