"""The validation report: one check per expectation and shard, as JSON, as an error message and as offline pages.

Our page is the same for the same data; Great Expectations' pages contain the time of the run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from components.datasets.formats import Kind
from components.validation.thumbnails import PictureRow

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
    location: str | None = None
    """Location of the row in the user's own file, during its import."""

    def __str__(self) -> str:
        return f"{self.location or f'{self.shard} row {self.row}'} (id {self.id}): {self.value}"


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
    pictures: list[PictureRow] = field(default_factory=list)
    """Offending rows and some of the others, of a dataset with pictures; for the pages alone."""

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


_PICTURES_STYLE = """
.pictures { margin-top: 1rem; } .pictures .bad { color: #cf222e; font-weight: 600; }
.pictures img { max-width: 6rem; max-height: 6rem; min-width: 2rem; image-rendering: pixelated; margin: 0 .2rem 0 0; }
"""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { margin: 2.2rem 0 .3rem; border-top: 1px solid var(--line); padding-top: 1.2rem; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0 1.2rem; }
th, td { text-align: left; padding: .35rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { background: var(--soft); } td.number { text-align: right; font-variant-numeric: tabular-nums; }
code { font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.examples { margin: .3rem 0 0; padding-left: 1.1rem; } small { opacity: .75; }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Data validation</title><style>{{ style }}</style></head><body>
<h1>Data validation: {{ verdict(reports | rejectattr("success") | list | length == 0) }}</h1>
<p>Each dataset is held against the suite of its kind in <code>data/expectations</code>; no row may fail unless
<code>validate.max_failed_share</code> in <code>params.yaml</code> allows a share.</p>
<table><tr><th>dataset</th><th>kind</th><th>rows</th><th>checks</th><th>failed checks</th><th></th></tr>
{% for report in reports %}<tr><td><a href="#{{ report.dataset }}">{{ report.dataset }}</a></td>
<td>{{ report.kind }}</td><td>{% for split, count in report.rows.items() %}
{{ "{:,}".format(count) }} {{ split }}{{ ", " if not loop.last }}{% endfor %}</td>
<td class="number">{{ report.checks | length }}</td><td class="number">{{ report.failed | length }}</td>
<td>{{ verdict(report.success) }}</td></tr>{% endfor %}</table>
{% for report in reports %}
<h2 id="{{ report.dataset }}">{{ report.dataset }} <small>{{ report.kind }}</small></h2>
<table><tr><th>expectation</th><th>shard</th><th>rows</th><th>failed</th><th></th></tr>
{% for check in report.failed + (report.checks | selectattr("success") | list) %}
<tr><td>{{ check.description }}<br>
<small><code>{{ check.expectation }}{{ " of " + check.column if check.column }}</code></small>
{% if check.broken %}<br>{{ check.broken }}{% endif %}
{% if check.examples %}<ul class="examples">{% for example in check.examples %}
<li>{{ example.shard }} row {{ example.row }} <small>id {{ example.id }}</small>
<code>{{ example.value }}</code></li>{% endfor %}</ul>{% endif %}</td>
<td><code>{{ check.shard }}</code></td><td class="number">{{ "{:,}".format(check.rows) }}</td>
<td class="number">{{ "{:,}".format(check.failed) }}</td><td>{{ verdict(check.success) }}</td></tr>
{% endfor %}</table>{{ thumbnails(report.pictures) }}{% endfor %}
</body></html>
"""

_THUMBNAILS = """{% if rows %}<style>{{ style }}</style>
<table class="pictures"><tr><th>row</th><th>pictures</th><th>turns</th></tr>
{% for row in rows %}<tr><td><code>{{ row.shard }}</code> row {{ row.row }}
{% if row.offending %}<br><span class="bad">offending</span>{% endif %}</td>
<td>{% for picture in row.pictures %}{% if picture %}<img src="{{ picture }}" alt="">
{% else %}<span class="bad">unreadable</span> {% endif %}{% endfor %}</td><td>{{ row.text }}</td></tr>
{% endfor %}</table>{% endif %}"""

_INDEX = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Data Docs</title><style>{{ style }}</style></head><body>
<h1>Data Docs</h1><p>Great Expectations' page of each shard, as of its last validation.</p>
{% for name, pages in datasets %}<h2>{{ name }}</h2><ul>
{% for page in pages %}<li><a href="{{ name }}/{{ page }}">{{ page.removesuffix(".html") }}</a></li>
{% endfor %}</ul>{% endfor %}
</body></html>
"""

# The rules of style sheets on the network that Great Expectations' pages use.
_OFFLINE_STYLE = """
<style>
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; color: #222; background: #fff; }
.container-fluid > .row { display: flex; gap: 2rem; flex-wrap: wrap; }
.row { display: block; } .col-lg-2 { flex: 0 0 15rem; } .col-lg-10 { flex: 1 1 40rem; min-width: 0; }
.pl-5 { padding: 1rem 2rem; } .card, .alert { border: 1px solid #ddd; border-radius: 6px; margin: 0 0 1rem; }
.card-header, .alert { background: #f3f4f6; padding: .5rem .8rem; } h4, h5 { margin: .2rem 0; }
table { border-collapse: collapse; width: 100%; } .m-3 { margin: 1rem; }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top; }
.badge { background: #e5e7eb; border-radius: 4px; padding: 0 .35rem; font-family: ui-monospace, monospace; }
.fa-check-circle::before { content: "\\2713"; color: #1a7f37; } .fa-times::before { content: "\\2717"; color: #cf222e; }
.fa-exclamation-triangle::before { content: "!"; color: #9a6700; }
i.fas, i.fa { font-style: normal; font-weight: bold; }
.collapse { display: block; }
nav.navbar, .modal, footer, .btn, #ge-cta-footer, .card-text, .popover { display: none !important; }
#navigation { display: block !important; } #navigation ul { list-style: none; padding: .4rem; margin: 0; }
</style>
"""
_FROM_NETWORK = re.compile(
    r"<script\b.*?</script>|<link\b[^>]*>|<img\b[^>]*>|<iframe\b.*?</iframe>|url\('https?:[^)]*\)[^;]*;?",
    re.DOTALL | re.IGNORECASE,
)


def write_page(path: Path, reports: Sequence[ValidationReport]) -> Path:
    """Write our page of every check, failed checks first."""
    return _write(path, _PAGE, reports=list(reports))


def write_docs_index(docs: Path) -> Path:
    """Write the index of Great Expectations' pages in `docs/NAME`."""
    folders = sorted(folder for folder in docs.glob("*") if folder.is_dir())
    datasets = [(folder.name, sorted(page.name for page in folder.glob("*.html"))) for folder in folders]
    return _write(docs / "index.html", _INDEX, datasets=datasets)


def offline(html: str, pictures: Sequence[PictureRow] = ()) -> str:
    """A page of Great Expectations without what it would load from the network, with its own style, and thumbnails."""
    page = _FROM_NETWORK.sub("", html).replace("</head>", _OFFLINE_STYLE + "</head>", 1)
    head, end, tail = page.rpartition("</body>")
    return head + _thumbnails(pictures) + end + tail if end else page + _thumbnails(pictures)


def _thumbnails(rows: Sequence[PictureRow]) -> str:
    from jinja2 import Environment

    return (
        Environment(autoescape=True, trim_blocks=True).from_string(_THUMBNAILS).render(rows=rows, style=_PICTURES_STYLE)
    )


def _write(path: Path, template: str, **values: object) -> Path:
    from jinja2 import Environment
    from markupsafe import Markup

    def verdict(success: bool) -> Markup:
        return Markup('<span class="{}">{}</span>').format(*(("good", "passed") if success else ("bad", "failed")))

    page = Environment(autoescape=True, trim_blocks=True).from_string(template)
    path.parent.mkdir(parents=True, exist_ok=True)
    html = page.render(
        style=Markup(_STYLE), verdict=verdict, thumbnails=lambda rows: Markup(_thumbnails(rows)), **values
    )
    path.write_text(html, encoding="utf-8")
    return path
