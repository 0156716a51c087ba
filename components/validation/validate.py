"""Data validation: every dataset is checked by the Great Expectations suite of its kind, shard by shard.

Suites are JSON in `data/expectations`. Cross-shard checks, such as repeated ids, are queries of DuckDB.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.errors import InputError, Refused, reason_of
from components.datasets.formats import SCHEMAS, Kind, Row, read_info, shards, write_json
from components.runtime.shards import Output, Result, Shard, run_shards
from components.runtime.stage import StageRun, digest, warn_on_failure
from components.validation.cross_shard import cross_shard_checks
from components.validation.report import (
    Check,
    Example,
    ValidationReport,
    offline,
    refusal,
    shown,
    write_docs_index,
    write_page,
)
from components.validation.row_features import ROW_FEATURES
from components.validation.thumbnails import PictureRow, picture_rows

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "validation", "test")
_BATCH_BYTES = 32 << 20  # of a shard in memory at once
_BATCH_ROWS = 12_000  # each batch costs Great Expectations a quarter of a second, however small


def validate(run: StageRun) -> None:
    """Check every collected dataset; refuse all of them if one fails, naming the rows.

    Writes the digests of the datasets of each section that names datasets.
    """
    folders = sorted(path.parent for path in run.paths.collected.glob("*/dataset.json"))
    sections = run.params.datasets
    for name in sorted({name for names in sections.values() for name in names} - {folder.name for folder in folders}):
        raise InputError(f'{run.paths.collected / name}: no dataset; run "loopwright run --until collect"')
    reports = _check_by_shards(run, folders, run.paths.home / "docs" / "validation")
    run.paths.validation.mkdir(parents=True, exist_ok=True)
    write_json(run.paths.validation / "result.json", [report.to_json() for report in reports])
    page = run.paths.validation / "docs" / "index.html"
    with warn_on_failure(str(page)):
        write_page(page, reports)
    counts = {report.dataset: report.counts() for report in reports}
    write_json(run.paths.metrics / "validate.json", counts)
    run.tracker.metrics({f"{name}/{key}": value for name, values in counts.items() for key, value in values.items()})
    run.tracker.artifact(page)
    if not all(report.success for report in reports):
        raise Refused(refusal(reports, str(page.relative_to(run.paths.root))))
    digests = {folder.name: digest(folder) for folder in folders}
    for section, names in sections.items():
        write_json(run.paths.validated(section), {name: digests[name] for name in names})


def _check_by_shards(run: StageRun, folders: Sequence[Path], docs: Path) -> list[ValidationReport]:
    suites, share = run.paths.expectations, run.params.validate_.max_failed_share
    work = []
    for folder in folders:
        kind = read_info(folder).kind
        for file in _files(folder):
            values = {"expectations": str(suites), "max_failed_share": share, "file": str(file), "kind": kind}
            work.append(Shard(f"{folder.name}-{file.stem}", check_file, [file, suites], values))
    outputs, reports = iter(run_shards(run, work)), []
    for done, folder in enumerate(folders, 1):
        reports.append(_report(folder, [_stored(next(outputs)) for _ in _files(folder)], docs, run.paths.home))
        run.progress(done, len(folders), dataset=folder.name, **reports[-1].counts())
    return reports


def check_file(out: Path, expectations: str, max_failed_share: float, file: str, kind: Kind) -> Result:
    """The checks of a shard; its page is written as `page.html`."""
    validator = _validator(suites := Path(expectations), max_failed_share, digest(suites))
    checked = validator.check_shard(Path(file), kind, with_page=True)
    if checked.page:
        (out / "page.html").write_text(checked.page, encoding="utf-8")
    return {"checks": [asdict(check) for check in checked.checks]}


@cache
def _validator(expectations: Path, max_failed_share: float, version: str) -> Validator:
    return Validator(expectations, max_failed_share)


def _stored(output: Output) -> ShardChecks:
    entries = output.result["checks"]
    checks = [Check(**{**entry, "examples": [Example(**row) for row in entry["examples"]]}) for entry in entries]
    page = output.folder / "page.html"
    return ShardChecks(checks, page.read_text("utf-8") if page.is_file() else None)


@dataclass(frozen=True)
class ShardChecks:
    """The checks of one shard."""

    checks: list[Check]
    page: str | None = None
    """Great Expectations' page, where one was asked for."""


def _report(folder: Path, checked: Sequence[ShardChecks], docs: Path | None, home: Path | None) -> ValidationReport:
    """The report of a dataset; Data Docs go to `docs/NAME`."""
    info, files = read_info(folder), _files(folder)
    checks = [check for each in checked for check in each.checks]
    report = ValidationReport(info.name, info.kind, dict(info.rows), checks)
    if all(each.checks[0].success for each in checked):  # the first is that of the columns
        report.checks += cross_shard_checks(files, info, home)
        if info.kind == "images":
            report.pictures = _pictures(files, report)
    if docs is not None:
        with warn_on_failure(f"{docs / info.name}: Data Docs"):
            _write_docs(docs, report, {file.stem: each.page for file, each in zip(files, checked, strict=True)})
    return report


def _write_docs(docs: Path, report: ValidationReport, pages: Mapping[str, str | None]) -> None:
    """Great Expectations' page of each shard; it contains the time of the run, so it is no out of the stage."""
    shutil.rmtree(docs / report.dataset, ignore_errors=True)
    for stem, page in pages.items():
        if page is not None:
            path = docs / report.dataset / f"{stem}.html"
            path.parent.mkdir(parents=True, exist_ok=True)
            pictures = [row for row in report.pictures if Path(row.shard).stem == stem]
            path.write_text(offline(page, pictures), encoding="utf-8")
    write_docs_index(docs)


class Validator:
    """The suites and Great Expectations' context, loaded once.

    Checks across shards put into the state folder `home` what they have no memory for; without one memory must do.
    """

    def __init__(self, expectations: Path, max_failed_share: float = 0.0, home: Path | None = None) -> None:
        self._home = home
        self._expectations = expectations
        self._max_failed_share = max_failed_share
        self._suites: dict[str, Any] = {}
        with _quiet():
            import great_expectations as gx
            from great_expectations.data_context.types.base import ProgressBarsConfig

            self._context = gx.get_context(mode="ephemeral")
            self._context.variables.progress_bars = ProgressBarsConfig(globally=False)
            asset = self._context.data_sources.add_pandas("shards").add_dataframe_asset("rows")
            self._batches = asset.add_batch_definition_whole_dataframe("batch")

    def check(self, folder: Path, docs: Path | None = None) -> ValidationReport:
        """Check one dataset by the suite of its kind.

        Raises: InputError when the folder holds no dataset, or its kind has no readable suite.
        """
        kind = read_info(folder).kind
        checked = [self.check_shard(file, kind, docs is not None) for file in _files(folder)]
        return _report(folder, checked, docs, self._home)

    def check_shard(self, shard: Path, kind: Kind, with_page: bool = False) -> ShardChecks:
        """Check one shard by the suite of its kind: its columns, and then its rows."""
        columns = _schema_check(shard, kind)
        if not columns.success:
            return ShardChecks([columns])
        result = self._run(shard, kind)
        page = None
        if with_page and result.page is not None:
            with warn_on_failure(f"{shard}: Data Docs"), _quiet():
                from great_expectations.render.renderer import ValidationResultsPageRenderer
                from great_expectations.render.view import DefaultJinjaPageView

                page = str(DefaultJinjaPageView().render(ValidationResultsPageRenderer().render(result.page)))
        return ShardChecks([columns, *result.checks.values()], page)

    def failing_rows(self, rows: Sequence[Row], kind: Kind) -> dict[int, str]:
        """The expectation that each failing row breaks, by the row's index."""
        return self.failing([ROW_FEATURES[kind](row) for row in rows], kind)

    def failing(self, rows: Sequence[Row], suite: str) -> dict[int, str]:
        """The expectation that each failing flat row breaks, by the row's index.

        Raises: Refused when the rows lack what the suite expects, such as a column.
        """
        import pandas as pd

        failures: dict[int, str] = {}
        for offset in range(0, len(rows), _BATCH_ROWS):
            frame = pd.DataFrame(rows[offset : offset + _BATCH_ROWS], dtype=object)
            with _quiet():
                batch = self._batches.get_batch(batch_parameters={"dataframe": frame})
                validated = batch.validate(self._suite(suite), result_format={"result_format": "COMPLETE"})
            for result in validated.results:
                description = result.expectation_config.description or result.expectation_config.type.replace("_", " ")
                if "unexpected_index_list" not in result.result:
                    _refuse_if_broken(result, suite, description)
                for index in result.result.get("unexpected_index_list") or []:
                    failures.setdefault(offset + index, description)
        return failures

    def _run(self, shard: Path, kind: Kind) -> _ShardResult:
        """Run the suite on one shard, a few thousand rows in memory at a time."""
        suite = self._suite(kind)
        result = _ShardResult(shard.name, self._max_failed_share)
        for offset, frame in _frames(shard, kind):
            with _quiet():
                batch = self._batches.get_batch(batch_parameters={"dataframe": frame})
                result.merge(batch.validate(suite, result_format={"result_format": "COMPLETE"}), frame, offset)
        return result

    def _suite(self, kind: str) -> Any:
        if kind not in self._suites:
            path = self._expectations / f"{kind}.json"
            with _quiet():
                self._suites[kind] = self._context.suites.add(_read_suite(path))
        return self._suites[kind]


def _files(folder: Path) -> list[Path]:
    return [shard for split in SPLITS for shard in shards(folder, split)]


def _pictures(files: Sequence[Path], report: ValidationReport) -> list[PictureRow]:
    """Thumbnails of the first rows of each shard and of all offending rows that the report lists."""
    examples = [example for check in report.failed for example in check.examples]
    return [
        row
        for file in files
        for row in picture_rows(file, {example.row for example in examples if example.shard == file.name})
    ]


@dataclass
class _ShardResult:
    """The suite's results over the batches of one shard, added up."""

    shard: str
    max_failed_share: float
    checks: dict[str, Check] = field(default_factory=dict)
    page: Any = None
    """Great Expectations' result of the first batch, with the counts of all."""

    def merge(self, validated: Any, frame: pd.DataFrame, offset: int) -> None:
        first = self.page is None
        self.page = self.page or validated
        pages = {_key(result): result for result in self.page.results}
        for result in validated.results:
            self._raise_if_broken(result)
            check = self.checks.get(_key(result)) or self._new_check(result)
            self._count(check, result, frame, offset)
            page = pages[_key(result)]
            if not first:
                _add_up(page.result, result.result)
            page.success = check.success
        successes = sum(check.success for check in self.checks.values())
        self.page.success = successes == len(self.checks)
        self.page.statistics.update(
            successful_expectations=successes,
            unsuccessful_expectations=len(self.checks) - successes,
            success_percent=100 * successes / max(len(self.checks), 1),
        )

    def _new_check(self, result: Any) -> Check:
        config = result.expectation_config
        share = max(self.max_failed_share, 1 - config.kwargs.get("mostly", 1))
        description = config.description or config.type.replace("_", " ")
        check = Check(config.type, config.kwargs.get("column"), description, self.shard, allowed_share=share)
        self.checks[_key(result)] = check
        return check

    def _count(self, check: Check, result: Any, frame: pd.DataFrame, offset: int) -> None:
        detail = result.result
        if "unexpected_count" not in detail:
            if not result.success:
                check.broken = f"found {shown(detail.get('observed_value'))}"
            return
        check.rows += detail["element_count"]
        check.failed += detail["unexpected_count"]
        for index in detail.get("unexpected_index_list") or []:
            row = frame.iloc[index]
            value = row[check.column] if check.column in frame.columns else row.to_dict()
            check.note(Example(self.shard, offset + index + 1, row["id"], shown(value)))

    def _raise_if_broken(self, result: Any) -> None:
        raised = result.exception_info or {}
        causes = [raised] if "raised_exception" in raised else list(raised.values())
        for cause in causes:
            if isinstance(cause, Mapping) and cause.get("raised_exception"):
                config = result.expectation_config
                raise InputError(
                    f"data/expectations: {config.type} of {config.kwargs.get('column')}: cannot be run: "
                    f"{reason_of(cause.get('exception_message'))}"
                )


def _refuse_if_broken(result: Any, suite: str, description: str) -> None:
    """Raises: Refused for a failed check that names no rows."""
    if not result.success:
        observed = result.result.get("observed_value") or result.exception_info
        raise Refused(f"{suite}: data validation failed: {description}: found {shown(observed)}")


def _read_suite(path: Path) -> Any:
    import great_expectations as gx
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    try:
        suite = json.loads(path.read_text(encoding="utf-8"))
        # Built one by one: of a list, the suite only logs what it cannot build, and goes without it.
        built = [ExpectationConfiguration(**expectation).to_domain_obj() for expectation in suite.pop("expectations")]
        return gx.ExpectationSuite(**suite, expectations=built)
    except FileNotFoundError:
        raise InputError(f"{path}: not found; every kind of dataset needs its suite") from None
    except (ValueError, TypeError, KeyError, AttributeError, gx.exceptions.GreatExpectationsError) as error:
        reason = reason_of(error)
        raise InputError(f"{path}: not a Great Expectations suite: {reason}") from None


def _key(result: Any) -> str:
    """Identity of the expectation of a result."""
    kwargs = {name: value for name, value in result.expectation_config.kwargs.items() if name != "batch_id"}
    return json.dumps([result.expectation_config.type, kwargs], sort_keys=True)


def _add_up(total: dict[str, Any], more: dict[str, Any]) -> None:
    """Add the counts of another batch to those that the page shows."""
    for name in ("element_count", "missing_count", "unexpected_count"):
        if name in more:
            total[name] = total.get(name, 0) + more[name]
    for name in ("partial_unexpected_list", "partial_unexpected_counts"):
        if name in more:
            total[name] = (total.get(name, []) + more[name])[:20]
    rows, missing, failed = (total.get(name, 0) for name in ("element_count", "missing_count", "unexpected_count"))
    total["unexpected_percent"] = total["unexpected_percent_nonmissing"] = 100 * failed / max(rows - missing, 1)
    total["unexpected_percent_total"] = 100 * failed / max(rows, 1)


def _schema_check(shard: Path, kind: Kind) -> Check:
    """The check of a shard's columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    check = Check("columns_match_schema", None, f"Columns are those of kind {kind}", shard.name)
    expected = SCHEMAS[kind]
    try:
        schema = pq.read_schema(shard)
        schema.empty_table().select(expected.names).cast(expected)
        check.rows = pq.read_metadata(shard).num_rows
    except (KeyError, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        names = ", ".join(f"{name}: {type_}" for name, type_ in zip(schema.names, schema.types, strict=True))
        check.broken = f"found {names[:300]}; expected {', '.join(expected.names)}"
    except (pa.ArrowException, OSError) as error:
        check.broken = f"not a readable Parquet file: {' '.join(str(error).split())[:200]}"
    return check


def _frames(shard: Path, kind: Kind) -> Iterator[tuple[int, pd.DataFrame]]:
    """(number of rows before it, flat rows) of each batch of a shard."""
    import pandas as pd
    import pyarrow.parquet as pq

    with pq.ParquetFile(shard) as file:
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * file.metadata.num_rows // max(size, 1)))
        offset = 0
        for batch in file.iter_batches(batch_size=batch_rows, columns=SCHEMAS[kind].names):
            if kind in ROW_FEATURES:
                yield offset, pd.DataFrame([ROW_FEATURES[kind](row) for row in batch.to_pylist()])
            else:
                yield offset, batch.to_pandas()
            offset += batch.num_rows


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Great Expectations' telemetry, warnings and log lines."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    logger = logging.getLogger("great_expectations")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
