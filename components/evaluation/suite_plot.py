"""A bar chart of scores by held-out suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_MAX_INCHES = 300
"""Height of a figure; matplotlib refuses 2^16 pixels and more."""
_MARKS = ("D", "s")


def draw_suites(
    scores: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    others: Mapping[str, Sequence[float | None]] | None = None,
    label: str = "final answer exactly right (95 % interval)",
) -> Any:
    """Scores from 0 to 1 with their intervals, as a matplotlib figure; `others` are other models' scores."""
    from matplotlib.figure import Figure

    names = list(scores)[::-1]
    figure = Figure(figsize=(8, min(0.4 * len(names) + 1, _MAX_INCHES)), layout="constrained")
    axes = figure.add_subplot()
    values = [scores[name] for name in names]
    bounds = [intervals.get(name, (score, score)) for name, score in zip(names, values, strict=True)]
    below = [max(0.0, score - low) for score, (low, _) in zip(values, bounds, strict=True)]
    above = [max(0.0, high - score) for score, (_, high) in zip(values, bounds, strict=True)]
    axes.barh(range(len(names)), values, xerr=[below, above], color="#4477aa")
    for (model, points), mark in zip((others or {}).items(), _MARKS, strict=False):
        shown = [(score, row) for row, score in enumerate(reversed(points)) if score is not None]
        values_shown, rows = zip(*shown, strict=True) if shown else ((), ())
        axes.scatter(values_shown, rows, marker=mark, color="#cc6677", zorder=3, label=model, s=22)
    if others:
        axes.legend(loc="lower right")
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xlim(0, 1)
    axes.set_xlabel(label)
    return figure
