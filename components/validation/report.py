"""The validation report: one check per expectation and shard, as JSON and as an error message."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from components.datasets.formats import Kind

EXAMPLES = 5
"""Offending rows that a check lists."""
_SHOWN_CHARS = 80


@dataclass(frozen=True)
class Example:
    """One offending row."""

    shard: str
    row: int
    """From 1 within the shard."""
    id: str | None
    value: str
    """Its Python literal; long ones are cut."""
    place: str | None = None
    """Location of the row in the user's own file, during its import."""

    def __str__(self) -> str:
        return f"{self.place or f'{self.shard} row {self.row}'} (id {self.id}): {self.value}"


@dataclass
class Check:
    """One expectation on one shard, or on the whole dataset."""

    expectation: str
    """Great Expectations' name, or that of a cross-shard check."""
    column: str | None
    description: str
    shard: str
    """File name; `all shards` for a cross-shard check."""
    rows: int = 0
    failed: int = 0
    allowed_share: float = 0.0
    """Share of rows that may fail."""
    broken: str | None = None
    """Why a check that does not count rows failed."""
    examples: list[Example] = field(default_factory=list)

    @property
    def success(self) -> bool:
        return self.broken is None and self.failed <= self.allowed_share * self.rows

    def note(self, example: Example) -> None:
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)


@dataclass
class ValidationReport:
    """All checks of one dataset."""

    dataset: str
    kind: Kind
    rows: dict[str, int]
    checks: list[Check] = field(default_factory=list)

    @property
    def success(self) -> bool:
        return all(check.success for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.success]

    def to_json(self) -> dict[str, Any]:
        """The content of `result.json`; equal data gives equal text."""
        checks = [{**asdict(check), "success": check.success} for check in self.checks]
        return {
            "dataset": self.dataset,
            "kind": self.kind,
            "rows": self.rows,
            "success": self.success,
            "checks": checks,
        }

    def counts(self) -> dict[str, int]:
        return {
            "rows": sum(self.rows.values()),
            "checks": len(self.checks),
            "failed_checks": len(self.failed),
            "failed_rows": sum(check.failed for check in self.checks),
        }


def shown(value: Any) -> str:
    """A value in a message: on one line, and cut where it is long."""
    text = "null" if value is None or value != value else repr(value)  # NaN, pandas' null, differs from itself
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}… ({len(text)} characters)"


def refusal(reports: list[ValidationReport], page: str | None = None) -> str:
    """The error message for data that fails: dataset, expectation, number of rows and the first of them.

    The first line gives the first failed check; the others give all.
    """
    failed = [(report.dataset, check) for report in reports for check in report.failed]
    dataset, first = failed[0]
    row = f"; first {first.examples[0]}" if first.examples else ""
    lines = [f"{dataset}: data validation failed: {first.description}: {_count(first)}{row}"]
    for dataset, check in failed:
        column = f" of {check.column}" if check.column else ""
        lines.append(f"  {dataset}, {check.shard}, {check.expectation}{column}: {check.description}: {_count(check)}")
        lines += [f"    {example}" for example in check.examples]
        if check.failed > len(check.examples) > 0:
            lines.append(f"    and {check.failed - len(check.examples):,} more")
    return "\n".join([*lines, f"  all checks: {page}"] if page else lines)


def _count(check: Check) -> str:
    if check.broken:
        return check.broken
    allowed = f", {check.allowed_share:.2%} allowed" if check.allowed_share else ""
    return f"{check.failed:,} of {check.rows:,} rows failed ({check.failed / max(check.rows, 1):.2%}{allowed})"
