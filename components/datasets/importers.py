"""Import of a user's files as a dataset: read by format, normalised by kind, all or nothing."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from functools import partial
from pathlib import Path
from typing import Any

from components.config.params import InputError, Refused
from components.datasets import chunks, records
from components.datasets.conversations import ROLES, read_conversation
from components.datasets.deduplication import hash_text
from components.datasets.formats import SCHEMAS, DatasetInfo, DatasetWriter, Kind, Row, row_id, shards
from components.datasets.preferences import read_preference
from components.datasets.records import Record
from components.validation.report import ValidationReport, refusal, shown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns, and of the roles of turns, where they differ from the defaults."""

    text: str | None = None
    label: str | None = None
    source: str | None = None
    target: str | None = None
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)


Reader = Callable[[Path], Iterator[Record]]


@dataclass(frozen=True)
class _Kind:
    """The import of one kind of dataset."""

    formats: Callable[[Sequence[Path]], Mapping[str, Reader]]
    """Readers by file suffix, given all files."""
    row: Callable[[Record, str, Columns], Row]
    """A row of the kind's schema from one record of the named file."""
    columns: tuple[str, ...]
    """Options of the kind: columns, or "roles"."""
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
) -> DatasetInfo:
    """Import files as the dataset `folder/name`; exact duplicates are counted and dropped.

    `check` validates the finished dataset before it takes its place; where `version` fails, it is removed again.
    `built_in` are the names of the project's own datasets.

    Raises: InputError for the first error in a file, with its row; Refused when validation fails. Nothing is changed
    then.
    """
    columns = columns or Columns()
    reader = _reader(kind, columns)
    _check_name(name, folder, replace, built_in)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".adding-{name}-", dir=folder))
    try:
        info = _write(reader, files, columns, DatasetWriter(temporary / name, name, _known_kind(kind)))
        report = check(temporary / name) if check else None
        if report and not report.success:
            _locate(report, temporary / name, _new_rows(reader, _readers(reader, files), columns))
            raise Refused(refusal([report]))
        if (folder / name).exists():
            os.rename(folder / name, temporary / "replaced")
        os.rename(temporary / name, folder / name)
        try:
            version()
        except BaseException:
            os.rename(folder / name, temporary / name)
            if (temporary / "replaced").exists():
                os.rename(temporary / "replaced", folder / name)
            raise
    finally:
        shutil.rmtree(temporary)
    return info


def _write(reader: _Kind, files: Sequence[Path], columns: Columns, writer: DatasetWriter) -> DatasetInfo:
    readers = _readers(reader, files)
    sources = [
        {"name": _shown_name(path), "sha256": records.inspect(path, path.suffix.lower() == ".parquet")}
        for path in files
    ]
    with writer:
        writer.info.sources = sources
        for _, row in _new_rows(reader, readers, columns, dropped=lambda: writer.drop("exact_duplicate")):
            writer.write("train", row)
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
            found = f"{path.suffix!r} is" if path.suffix else "a name without suffix is"
            unpack = "; unpack the file first" if suffix in _PACKED else ""
            raise InputError(
                f"{path}: {found} not a format of this kind; allowed: {', '.join(formats)}{beside}{unpack}"
            )
    return [(path, formats[suffix]) for path, suffix in zip(files, suffixes, strict=True)]


def _new_rows(
    reader: _Kind,
    readers: Sequence[tuple[Path, Reader]],
    columns: Columns,
    dropped: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, Row]]:
    """(location, row) of every row that is no exact duplicate."""
    seen: set[int] = set()
    labels: dict[str, str] = {}
    for path, read in readers:
        for location, row in _rows(reader, read, path, columns):
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


def _rows(reader: _Kind, read: Reader, path: Path, columns: Columns) -> Iterator[tuple[str, Row]]:
    first, file = True, _shown_name(path)
    for record in read(path):
        if first:
            columns, first = _columns_of(record, reader, columns), False
        try:
            row = reader.row(record, file, columns)
            json.dumps(row, ensure_ascii=False).encode()
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


def _columns_of(record: Record, reader: _Kind, columns: Columns) -> Columns:
    """The columns of a file, by its first row."""
    names = [meaning for meaning in reader.columns if meaning != "roles"]
    chosen: dict[str, Any] = {meaning: _column(record, meaning, columns, names) for meaning in names}
    return replaced(columns, **chosen)


def _column(record: Record, meaning: str, columns: Columns, meanings: Sequence[str]) -> str:
    """The column for a meaning: the one of the option, the one of that name, or a table's only column."""
    if named := getattr(columns, meaning):
        return str(named)
    if meaning in record.values:
        return meaning
    matching = [name for name in record.values if name.lower() == meaning]
    if not matching and len(meanings) == len(record.values) == 1:
        matching = list(record.values)
    if len(matching) != 1:
        raise InputError(
            f"{record.location}: {'more than one' if matching else 'no'} column {meaning!r}; "
            f"found columns: {', '.join(record.values) or 'none'}; name one with --{meaning}-column"
        )
    return matching[0]


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
        check.examples = [replaced(each, place=locations[offsets[each.shard] + each.row]) for each in check.examples]


def _document(record: Record, file: str, columns: Columns) -> Row:
    row = {"text": _text(record, columns.text), "source": str(record.values.get("source") or file)}
    return {**row, "id": _own_id(record.values, "documents") or _content_id(row) or row_id(record.location)}


def _conversation(record: Record, file: str, columns: Columns) -> Row:
    messages, tools = read_conversation(record.location, record.values, columns.roles)
    row: Row = {"messages": messages, "tools": tools, "suite": None}
    return {**row, "id": _own_id(record.values, "conversations") or _content_id(row)}


def _preference(record: Record, file: str, columns: Columns) -> Row:
    row = read_preference(record.location, record.values, columns.roles)
    return {**row, "id": _own_id(record.values, "preferences") or _content_id(row)}


def _labelled_text(record: Record, file: str, columns: Columns) -> Row:
    text, value = _text(record, columns.text) or "", _value(record, columns.label)
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


def _text_pair(record: Record, file: str, columns: Columns) -> Row:
    source, target = (_text(record, column) or "" for column in (columns.source, columns.target))
    row: Row = {"source": source, "target": target, "suite": None}
    return {**row, "id": _own_id(record.values, "text_pairs") or _content_id(row)}


def _text(record: Record, name: str | None) -> str | None:
    text = _value(record, name)
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
        return row_id(json.dumps(row["messages"], ensure_ascii=False), row["tools"] or "")
    if "label" in row:
        return row_id(row["text"], row["label"]) if row["text"] else None
    if "target" in row:
        return row_id(row["source"], row["target"])
    if "prompt" in row:
        parts = (json.dumps(row[name], ensure_ascii=False) for name in ("prompt", "chosen", "rejected"))
        return row_id(*parts, row["tools"] or "")
    return row_id(row["text"]) if row["text"] else None


def _value(record: Record, name: str | None) -> Any:
    """A column's value; a dot in the name reaches into nested columns."""
    assert name is not None  # set from the first row
    if name in record.values:
        return record.values[name]
    value: Any = record.values
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise InputError(
                f"{record.location}: no column {name!r}; found columns: {', '.join(record.values) or 'none'}"
            )
        value = value[part]
    return value


_JSON: Mapping[str, Reader] = dict.fromkeys((".jsonl", ".ndjson", ".json"), records.read_json)
_PARQUET: Mapping[str, Reader] = {".parquet": records.read_parquet}
_CSV: Mapping[str, Reader] = dict.fromkeys((".csv", ".tsv"), records.read_csv)
_TABLES: Mapping[str, Reader] = {**_CSV, **_JSON, **_PARQUET}
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
}


def _known_kind(kind: str) -> Kind:
    for known in _KINDS:
        if kind == known:
            return known
    raise InputError(f"{kind!r} is not a kind of dataset; allowed: {', '.join(_KINDS)}")


def _reader(kind: str, columns: Columns) -> _Kind:
    reader = _KINDS[_known_kind(kind)]
    if columns.roles != ROLES and "roles" not in reader.columns:
        raise InputError(f"--role: is not supported by {kind}, which has no turns; allowed: conversations, preferences")
    for name, value in vars(columns).items():
        if name != "roles" and value is not None and name not in reader.columns:
            allowed = ", ".join(f"--{column}-column" for column in reader.columns if column != "roles") or "none"
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
