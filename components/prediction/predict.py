"""Batch inference: the rows of a source become files of answers, shard by shard, with a manifest to go on from.

    TO/manifest.jsonl      one line per finished shard: source, counts, digests of inputs, answers and weights
    TO/part-00000.parquet  the columns of a shard's rows, and those of their answers

A shard's bytes depend on its rows, the model folder and the section `serve` alone: executors, workers and kills change
none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.config.errors import InputError
from components.config.loop_settings import RunConfig, ServeConfig
from components.config.paths import Paths
from components.models.weight_files import cached_digest
from components.prediction.predictors import COLUMNS, ERROR, MAX_ROWS, TOOLS, PredictionTask, Predictor, load_predictor
from components.prediction.sources import Part, first_columns, parts, read_rows, source_files
from components.runtime.files import scratch_folder
from components.runtime.model_tasks import task_of
from components.runtime.object_store import list_files, read_bytes, size_of, version_of, write_file
from components.runtime.shards import execute
from components.runtime.stage import digest

Line = dict[str, Any]
MANIFEST = "manifest.jsonl"
_INPUT = "input_"
"""Before the name of a source's column that an answer has too."""


@dataclass(frozen=True)
class Model:
    """What answers."""

    folder: Path
    name: str
    """`NAME/VERSION`, or the folder."""
    task: PredictionTask
    serve: ServeConfig
    root: Path
    """The project, whose tools a base may call."""

    def check(self) -> None:
        """Raises: InputError when the folder's model has another task."""
        own = task_of(self.folder)
        if self.task not in (own, "embed"):
            raise InputError(f"--task: {self.task}: {self.name} is a model to {own}; name another with --model")

    def settings(self) -> dict[str, Any]:
        """What answers depend on besides the row and the folder."""
        names = ("max_new_tokens", "max_steps", "max_context_tokens", "max_prompt_characters", "allow_writes", "int8")
        values = {name: getattr(self.serve, name) for name in names} if self.task == "chat" else {}
        return {"task": self.task, **values}


@dataclass(frozen=True)
class Summary:
    """What a run has written."""

    to: str
    task: PredictionTask
    model: str
    weights: str
    """SHA-256."""
    files: int
    rows: int
    errors: int
    """Rows without an answer."""


@dataclass(frozen=True)
class _Job:
    """A shard to do, as it goes to a worker."""

    key: str
    part: Part
    column: str
    model: Model
    weights: str
    inputs: str
    """Digest of the file, of the model folder and of everything else that the shard's answers depend on."""
    to: str
    threads: int

    def run(self) -> Line:
        """Write the shard's answers; its line of the manifest."""
        predictor = _predictor(self.model, self.threads)
        with scratch_folder(Paths(self.model.root).home, "predict") as scratch:
            file = scratch / "answers"
            errors = self._write(predictor, file)
            size, sha256 = file.stat().st_size, digest(file)
            write_file(_inside(self.to, f"{self.key}.parquet"), file)
        source = {"source": self.part.address, "first_row": self.part.row, "rows": self.part.rows, "errors": errors}
        model = {"model": self.model.name, "weights_sha256": self.weights, "task": self.model.task}
        return {"key": self.key, **source, **model, "inputs": self.inputs, "sha256": sha256, "bytes": size}

    def _write(self, predictor: Predictor[Any], file: Path) -> int:
        """Write the answers; returns how many rows have none."""
        errors = 0
        writer: pq.ParquetWriter | None = None
        try:
            for rows in read_rows(self.part, [self.column, self.column.partition(".")[0], TOOLS]):
                table = _beside(rows.table, predictor.answers(rows.values, self.column))
                errors += table.num_rows - table[ERROR].null_count
                writer = writer or pq.ParquetWriter(file, table.schema)
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()
        return errors


@lru_cache(maxsize=1)
def _loaded(task: PredictionTask, folder: Path, threads: int, serve: str, root: Path) -> Predictor[Any]:
    return load_predictor(task, folder, threads, ServeConfig.model_validate_json(serve), root)


def _predictor(model: Model, threads: int) -> Predictor[Any]:
    """The model, which a process loads once."""
    return _loaded(model.task, model.folder, threads, model.serve.model_dump_json(), model.root)


def _beside(table: pa.Table, answers: pa.Table) -> pa.Table:
    """A table with the columns of another behind its own, which are renamed where both have a name."""
    names: list[str] = []
    for name in table.column_names:
        while name in answers.column_names or name in names:
            name = _INPUT + name
        names.append(name)
    table = table.rename_columns(names)
    for name in answers.column_names:
        table = table.append_column(answers.schema.field(name), answers[name])
    return table


def predict(
    source: str,
    to: str,
    model: Model,
    run: RunConfig,
    column: str | None = None,
    progress: Callable[[int, int, Line], None] = lambda done, total, line: None,
) -> Summary:
    """Answer every row of a source; what an earlier run has finished in `to` is not done again.

    `run.workers` processes of this machine, or tasks of a Ray cluster, divide the shards.

    Raises: InputError when the source or the model cannot be used, when `to` has something else, or when a worker is
    killed; what is finished stays.
    """
    model.check()
    weights = cached_digest(model.folder)
    jobs = _jobs(source, to, model, weights, run, column)
    lines = _finished(to, jobs)
    unfinished = [job for key, job in jobs.items() if key not in lines]
    _write_manifest(to, lines.values())
    for line in execute("predict", unfinished, run):
        lines[line["key"]] = line
        _write_manifest(to, lines.values())
        progress(len(lines), len(jobs), line)
    ordered = [lines[key] for key in jobs]
    _write_manifest(to, ordered)
    rows, errors = (sum(line[name] for line in ordered) for name in ("rows", "errors"))
    return Summary(to, model.task, model.name, weights, len(ordered), rows, errors)


def _jobs(source: str, to: str, model: Model, weights: str, run: RunConfig, column: str | None) -> dict[str, _Job]:
    """The shards of a source by their keys, in order."""
    if f"{to}/".startswith(f"{source.rstrip('/')}/"):
        raise InputError(f"--to: {to} is in the source {source}; choose a folder outside it")
    files = source_files(source)
    settings = [digest(model.folder), model.settings()]
    threads = 1 if run.launcher == "ray" else max(1, (os.cpu_count() or 1) // run.workers)  # Ray: a core for each task
    jobs: dict[str, _Job] = {}
    for file in files:
        name = column or _column(file, model.task)
        content = version_of(file) if "://" in file else digest(Path(file))
        for part in parts(file, name, MAX_ROWS[model.task]):
            key = f"part-{len(jobs):05d}"
            text = json.dumps([asdict(part), name, content, settings], sort_keys=True)
            inputs = hashlib.sha256(text.encode()).hexdigest()
            jobs[key] = _Job(key, part, name, model, weights, inputs, to, threads)
    if not jobs:
        raise InputError(f"{source}: no rows; give a source that has some")
    return jobs


def _column(file: str, task: PredictionTask) -> str:
    """The column that holds what is answered: the first of those of the task, or a file's only one."""
    columns = first_columns(file)
    known = [name for name in COLUMNS[task] if name in columns] or (columns if len(columns) == 1 else [])
    if not known and columns:
        raise InputError(
            f"{file}: none of the columns {', '.join(COLUMNS[task])}; found columns: {', '.join(columns)};"
            " name one with --column"
        )
    return known[0] if known else ""


def _finished(to: str, jobs: dict[str, _Job]) -> dict[str, Line]:
    """The lines of the manifest whose files are as they were written.

    Raises: InputError when `to` has something else than answers of these inputs.
    """
    manifest = read_bytes(_inside(to, MANIFEST))
    if manifest is None:
        _refuse_files(to)
        return {}
    try:
        lines: dict[str, Line] = {line["key"]: line for line in map(json.loads, manifest.splitlines())}
        other = next((each for key, each in lines.items() if key not in jobs or each["inputs"] != jobs[key].inputs), {})
        answers = f"{other['model']} to {other['source']}" if other else ""
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{_inside(to, MANIFEST)}: damaged: {error!r}; choose another folder, or remove it") from None
    if answers:
        raise InputError(
            f"{to}: has answers of {answers}, which is another model, source or setting, or has changed since;"
            " choose another folder, or remove it"
        )
    return {key: line for key, line in lines.items() if _is_whole(to, line)}


def _refuse_files(to: str) -> None:
    try:
        files = list_files(to)
    except InputError:
        return
    raise InputError(f"{to}: is not empty ({files[0]}); choose another folder, or empty it first")


def _is_whole(to: str, line: Line) -> bool:
    """Whether a shard's file is there: with its digest on this machine, with its size in an object store."""
    file = _inside(to, f"{line['key']}.parquet")
    if "://" in to:
        return bool(size_of(file) == line["bytes"])
    return Path(file).is_file() and bool(digest(Path(file)) == line["sha256"])


def _write_manifest(to: str, lines: Iterable[Line]) -> None:
    write_file(_inside(to, MANIFEST), "".join(f"{json.dumps(line)}\n" for line in lines).encode())


def _inside(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"
