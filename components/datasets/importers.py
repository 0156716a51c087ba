"""Import of a user's files as a dataset: read by format, normalised by kind, all or nothing."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from dataclasses import replace as replaced
from functools import partial
from pathlib import Path
from typing import Any

from components.config.params import InputError, Refused
from components.datasets import chunks, records
from components.datasets.columns import OTHER_OPTIONS, columns_of, value_of
from components.datasets.columns import Columns as Columns
from components.datasets.conversations import ROLES, read_conversation
from components.datasets.deduplication import hash_text
from components.datasets.formats import SCHEMAS, DatasetInfo, DatasetWriter, Kind, Row, row_id, shards
from components.datasets.picture_records import read_picture_json, read_picture_parquet, read_picture_row
from components.datasets.preferences import read_preference
from components.datasets.quarantine import Quarantine
from components.datasets.records import Record
from components.runtime.files import remove
from components.runtime.process import file_lock
from components.validation.report import ValidationReport, refusal, shown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_ADDING, _DONE = ".adding-", ".done"
"""A dataset that is being added is in the folder `.adding-NAME`, which gets the suffix when it is in its place."""
_OLD, _NONE = ".old", ".none"
"""There: the dataset that it replaces, or a file that says that there was none."""

Reader = Callable[[Path], Iterator[Record]]
LeaveOut = Callable[[str, str, Mapping[str, Any]], None]
"""Given the location of a row that breaks a rule, the reason and the row."""


@dataclass(frozen=True)
class _Kind:
    """The import of one kind of dataset."""

    formats: Callable[[Sequence[Path]], Mapping[str, Reader]]
    """Readers by file suffix, given all files."""
    row: Callable[[Record, Path, Columns], Row]
    """A row of the kind's schema from one record of the file."""
    columns: tuple[str, ...]
    """Options of the kind: columns, or `OTHER_OPTIONS`."""
    parallel: bool = False
    """Whether two parallel text files make rows: the lines of the first are sources, those of the second targets."""


def add(
    kind: str,
    files: Sequence[Path],
    name: str,
    folder: Path,
    columns: Columns | None = None,
    replace: bool = False,
    check: Callable[[Path], ValidationReport] | None = None,
    built_in: Collection[str] = (),
    version: Callable[[], object] = lambda: None,
    quarantine: Quarantine | None = None,
    licence: str = "",
) -> DatasetInfo:
    """Import files as the dataset `folder/name`; exact duplicates are counted and dropped.

    `check` validates the finished dataset before it takes its place; where `version` fails, it is removed again.
    `built_in` are the names of the project's own datasets. Pictures in the wild are damaged: rows of kind `images` that
    break a rule go to `quarantine` where there is one.

    The caller holds the lock `adding`, and what is killed here is undone by the next call, or by `undo_killed`.

    Raises: InputError for the first error in a file, with its row; Refused when validation fails. Nothing is changed
    then.
    """
    columns = columns or Columns()
    reader = _reader(kind, columns)
    _check_name(name, folder, replace, built_in)
    if quarantine and kind != "images":
        raise InputError(f"--quarantine: is not supported by {kind}; allowed: images")
    _undo(folder, name)
    temporary = folder / f"{_ADDING}{name}"
    temporary.mkdir(parents=True)
    try:
        writer = DatasetWriter(temporary / name, name, _known_kind(kind))
        writer.info.licence = licence
        info = _write(reader, files, columns, writer, quarantine)
        report = check(temporary / name) if check else None
        if report and not report.success:
            leave_out = (lambda *_: None) if quarantine else None
            rows = _new_rows(reader, _readers(reader, files), columns, leave_out)
            _locate(report, temporary / name, quarantine.passed(rows) if quarantine else rows)
            raise Refused(refusal([report]))
        if (folder / name).exists():
            os.rename(folder / name, temporary / _OLD)
        else:
            (temporary / _NONE).touch()
        os.rename(temporary / name, folder / name)
        version()
        temporary = temporary.rename(temporary.with_suffix(_DONE))
    except BaseException:
        _undo(folder, name)
        raise
    remove(temporary)
    return info


def adding(locks: Path, name: str) -> AbstractContextManager[None]:
    """The lock of the process that adds a dataset of this name; raises InputError where another one does."""
    return file_lock(locks, f"data-add-{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:64]}")


def undo_killed(folder: Path, locks: Path) -> None:
    """Undo what processes that were killed have begun to add to `folder`: the datasets are as before."""
    for temporary in folder.glob(f"{_ADDING}*"):
        name = temporary.name.removeprefix(_ADDING).removesuffix(_DONE)
        with suppress(InputError), adding(locks, name):  # else it is being added
            _undo(folder, name)


def _undo(folder: Path, name: str) -> None:
    """Undo what was begun and not done; it may be killed and called again."""
    temporary = folder / f"{_ADDING}{name}"
    if (temporary / _OLD).exists():
        remove(folder / name)
        os.rename(temporary / _OLD, folder / name)
    elif (temporary / _NONE).exists() and not (temporary / name).exists():
        remove(folder / name)
    remove(temporary)
    remove(temporary.with_suffix(_DONE))


def _write(
    reader: _Kind, files: Sequence[Path], columns: Columns, writer: DatasetWriter, quarantine: Quarantine | None
) -> DatasetInfo:
    readers = _readers(reader, files)
    sources = [
        {"name": _shown_name(path), "sha256": records.inspect(path, path.suffix.lower() == ".parquet")}
        for path in files
    ]
    with writer:
        writer.info.sources = sources
        leave_out = quarantine.add if quarantine else None
        rows = _new_rows(reader, readers, columns, leave_out, lambda: writer.drop("exact_duplicate"))
        for _, row in quarantine.passing(rows) if quarantine else rows:
            writer.write("train", row)
        if quarantine and quarantine.rows:
            writer.drop("quarantined", quarantine.rows)
            if not writer.info.rows:
                raise InputError(
                    f"{writer.info.name}: no row is left: each breaks a rule; see what without --quarantine"
                )
    return writer.info


def _shown_name(path: Path) -> str:
    """The name of a file, bytes that are not UTF-8 escaped."""
    return os.fsencode(path.name).decode("utf-8", "backslashreplace")


def _readers(reader: _Kind, files: Sequence[Path]) -> list[tuple[Path, Reader]]:
    """The reader of each file; two parallel files have one.

    Raises: InputError for a format that the kind does not support.
    """
    formats = reader.formats(files)
    suffixes = [path.suffix.lower() for path in files]
    if reader.parallel and len(files) == 2 and not {*formats, *_PACKED} & set(suffixes):
        return [(files[0], partial(records.read_parallel, target=files[1]))]
    for path, suffix in zip(files, suffixes, strict=True):
        if suffix not in formats:
            beside = ", or two text files of equally many lines" if reader.parallel else ""
            subject = f"{path.suffix!r} is" if path.suffix else "a name without suffix is"
            unpack = "; unpack the file first" if suffix in _PACKED else ""
            raise InputError(
                f"{path}: {subject} not a format of this kind; allowed: {', '.join(formats)}{beside}{unpack}"
            )
    return [(path, formats[suffix]) for path, suffix in zip(files, suffixes, strict=True)]


def _new_rows(
    reader: _Kind,
    readers: Sequence[tuple[Path, Reader]],
    columns: Columns,
    leave_out: LeaveOut | None = None,
    dropped: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, Row]]:
    """(location, row) of every row that is no exact duplicate."""
    seen: set[int] = set()
    labels: dict[str, str] = {}
    for path, read in readers:
        for location, row in _rows(reader, read, path, columns, leave_out):
            if "label" in row:
                _refuse_two_spellings(location, row["label"], labels)
            identity = hash_text(str(row["id"]))
            if identity in seen and row["id"] == _content_id(row):
                dropped()
            else:
                yield location, row
            seen.add(identity)


def _refuse_two_spellings(location: str, label: str, labels: dict[str, str]) -> None:
    """Refuse labels "1" and "1.0", which tables with and without gaps write for one integer."""
    other = labels.setdefault(re.sub(r"(?<=\d)\.0+$", "", label), label)
    if other != label:
        raise InputError(
            f"{location}: label: {label!r} and {other!r} are one number written in two ways; write it in one"
        )


def _rows(
    reader: _Kind, read: Reader, path: Path, columns: Columns, leave_out: LeaveOut | None
) -> Iterator[tuple[str, Row]]:
    first = True
    for record in read(path):
        if first:
            columns, first = columns_of(record, reader.columns, columns), False
        try:
            row = reader.row(record, path, columns)
            json.dumps(row, ensure_ascii=False, default=len).encode()
        except InputError as error:
            if leave_out is None:
                raise
            leave_out(record.location, str(error), record.values)
            continue
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise InputError(
                f"{record.location}: {half!a}: half of a surrogate pair, no character; remove it"
            ) from None
        except RecursionError:
            raise InputError(f"{record.location}: not readable: nested too deep") from None
        yield record.location, row
    if first:
        raise InputError(f"{path}: holds no rows; nothing to add")


def _locate(report: ValidationReport, folder: Path, rows: Iterator[tuple[str, Row]]) -> None:
    """Add to each offending row its location in the user's file: the files are read once more."""
    import pyarrow.parquet as pq

    before, offsets = 0, {}
    for shard in shards(folder, "train"):
        offsets[shard.name] = before
        before += pq.read_metadata(shard).num_rows
    numbers = {offsets[each.shard] + each.row for check in report.failed for each in check.examples}
    locations = {number: location for number, (location, _) in enumerate(rows, 1) if number in numbers}
    for check in report.failed:
        check.examples = [replaced(each, location=locations[offsets[each.shard] + each.row]) for each in check.examples]


def _document(record: Record, path: Path, columns: Columns) -> Row:
    row = {"text": _text(record, columns.text), "source": str(record.values.get("source") or _shown_name(path))}
    return {**row, "id": _own_id(record.values, "documents") or _content_id(row) or row_id(record.location)}


def _conversation(record: Record, path: Path, columns: Columns) -> Row:
    messages, tools = read_conversation(record.location, record.values, columns.roles)
    row: Row = {"messages": messages, "tools": tools, "suite": None}
    return {**row, "id": _own_id(record.values, "conversations") or _content_id(row)}


def _pictures(record: Record, path: Path, columns: Columns) -> Row:
    folder = columns.image_folder or path.parent
    row = read_picture_row(record.location, record.values, folder, columns.roles)
    return {**row, "id": _own_id(record.values, "images") or _content_id(row)}


def _preference(record: Record, path: Path, columns: Columns) -> Row:
    row = read_preference(record.location, record.values, columns.roles)
    return {**row, "id": _own_id(record.values, "preferences") or _content_id(row)}


def _labelled_text(record: Record, path: Path, columns: Columns) -> Row:
    text, value = _text(record, columns.text) or "", value_of(record, columns.label)
    label = _label(value)
    if not label:
        raise InputError(f"{record.location}: {columns.label}: {shown(value)} is no label; every text needs one")
    row: Row = {"text": text, "label": label, "suite": None}
    own = _own_id(record.values, "labelled_texts")
    return {**row, "id": own or _content_id(row) or row_id(record.location)}


def _label(value: Any) -> str:
    """A label as text: 3 and 3.0 (an integer in a table with gaps) are "3", true is "true"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value).strip()
    return ""


def _text_pair(record: Record, path: Path, columns: Columns) -> Row:
    source, target = (_text(record, column) or "" for column in (columns.source, columns.target))
    row: Row = {"source": source, "target": target, "suite": None}
    return {**row, "id": _own_id(record.values, "text_pairs") or _content_id(row)}


def _text(record: Record, name: str | None) -> str | None:
    text = value_of(record, name)
    if not isinstance(text, str | None):
        raise InputError(f"{record.location}: {name}: expected text, found {type(text).__name__} {str(text)[:40]!r}")
    return text


def _own_id(values: Mapping[str, Any], kind: Kind) -> str | None:
    """The id of a row in the schema of its kind."""
    own = set(values) == set(SCHEMAS[kind].names) and values["id"] is not None
    return str(values["id"]) if own else None


def _content_id(row: Row) -> str | None:
    """Equal for equal content, so that a row keeps its split when its file grows; None without content."""
    if "messages" in row:
        pictures = (hashlib.sha256(image).hexdigest() for image in row.get("images", ()))
        return row_id(*pictures, json.dumps(row["messages"], ensure_ascii=False), row["tools"] or "")
    if "label" in row:
        return row_id(row["text"], row["label"]) if row["text"] else None
    if "target" in row:
        return row_id(row["source"], row["target"])
    if "prompt" in row:
        parts = (json.dumps(row[name], ensure_ascii=False) for name in ("prompt", "chosen", "rejected"))
        return row_id(*parts, row["tools"] or "")
    return row_id(row["text"]) if row["text"] else None


_JSON: Mapping[str, Reader] = dict.fromkeys((".jsonl", ".ndjson", ".json"), records.read_json)
_PARQUET: Mapping[str, Reader] = {".parquet": records.read_parquet}
_CSV: Mapping[str, Reader] = dict.fromkeys((".csv", ".tsv"), records.read_csv)
_TABLES: Mapping[str, Reader] = {**_CSV, **_JSON, **_PARQUET}
_PICTURES: Mapping[str, Reader] = {**dict.fromkeys(_JSON, read_picture_json), ".parquet": read_picture_parquet}
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z")


def _document_formats(files: Sequence[Path]) -> Mapping[str, Reader]:
    def text(path: Path) -> Iterator[Record]:
        return chunks.read_text(path, chunks.target_chars(files))

    return {".txt": text, ".md": chunks.read_markdown, **_JSON, **_CSV, **_PARQUET}


_KINDS: Mapping[Kind, _Kind] = {
    "documents": _Kind(_document_formats, _document, ("text",)),
    "conversations": _Kind(lambda files: {**_JSON, **_PARQUET}, _conversation, ("roles",)),
    "preferences": _Kind(lambda files: {**_JSON, **_PARQUET}, _preference, ("roles",)),
    "labelled_texts": _Kind(lambda files: _TABLES, _labelled_text, ("text", "label")),
    "text_pairs": _Kind(lambda files: _TABLES, _text_pair, ("source", "target"), parallel=True),
    "images": _Kind(lambda files: _PICTURES, _pictures, OTHER_OPTIONS),
}


def _known_kind(kind: str) -> Kind:
    for known in _KINDS:
        if kind == known:
            return known
    raise InputError(f"{kind!r} is not a kind of dataset; allowed: {', '.join(_KINDS)}")


def _reader(kind: str, columns: Columns) -> _Kind:
    reader = _KINDS[_known_kind(kind)]
    if columns.roles != ROLES and "roles" not in reader.columns:
        raise InputError(
            f"--role: is not supported by {kind}, which has no turns; allowed: conversations, images, preferences"
        )
    if columns.image_folder is not None and "image_folder" not in reader.columns:
        raise InputError(f"--image-folder: is not supported by {kind}; allowed: images")
    named = [column for column in reader.columns if column not in OTHER_OPTIONS]
    for name, value in vars(columns).items():
        if name not in OTHER_OPTIONS and value is not None and name not in named:
            allowed = ", ".join(f"--{column}-column" for column in named) or "none"
            raise InputError(
                f"--{name}-column: {value!r} is not supported by {kind}; column options of this kind: {allowed}"
            )
    return reader


def _check_name(name: str, folder: Path, replace: bool, built_in: Collection[str]) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(f"--name: {name!r} is no name for a dataset; use up to 64 letters, digits, '-' and '_'")
    if name in built_in:
        raise InputError(f"--name: {name!r} is a built-in dataset; choose another name")
    taken = (folder / name).exists() or (folder / f"{name}.dvc").exists()
    if taken and not replace:
        raise InputError(f"--name: {name!r} exists already; choose another name, or put it in its place with --replace")
