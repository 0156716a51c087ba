"""`add` on valid files and on damaged ones: rows are what a reference reader reads, or the file is refused in a line.

The references are pandas for CSV and JSON, pyarrow for Parquet with the columns of `datasets`.
LOOPWRIGHT_TEST_CASES says how many files of each kind and format are drawn; the suite draws few.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from itertools import takewhile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset

from components.config.params import InputError
from components.datasets.formats import read_rows
from components.datasets.importers import add

CASES = int(os.environ.get("LOOPWRIGHT_TEST_CASES", "5"))
TABLES = ("csv", "tsv", "jsonl", "json", "parquet")
NESTED = ("jsonl", "json", "parquet")
FORMATS = {
    "documents": (*TABLES, "txt", "md"),
    "labelled_texts": TABLES,
    "text_pairs": (*TABLES, "en"),
    "conversations": NESTED,
    "preferences": NESTED,
}
WORDS = ["a", "Zoë", "項目", "😀", "x;y", "1,5", '"q"', "it's", "\\n", "NA", "1.0", "{}", "[", "\u2028", "\x85", "# h"]
ODD: list[Any] = [
    None,
    "",
    " ",
    1,
    1.0,
    10**30,
    1e300,
    float("nan"),
    True,
    [],
    {},
    [None],
    {"a": None},
    "[]",
    "{",
    "9" * 9,
]
ARROW: list[Any] = [*ODD, datetime(2024, 5, 1, 9, 30), Decimal("12.50"), b"bytes", b"\xff"]
BYTES = [
    b'"',
    b",",
    b";",
    b"\t",
    b"\n",
    b"\r",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\\",
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"9" * 5000,
]
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "model": "assistant"}
Row = dict[str, Any]


def text(rng: random.Random, joints: Sequence[str] = (*"     \n\t", "\r\n")) -> str:
    return "w" + "".join(rng.choice(WORDS) + rng.choice(joints) for _ in range(rng.randint(1, 6))).strip()


def turns(rng: random.Random) -> list[Row]:
    """One to three questions, some answered after a call."""
    messages: list[Row] = [{"role": "system", "content": text(rng)}] if rng.random() < 0.2 else []
    for number in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text(rng)})
        if rng.random() < 0.4:
            arguments = rng.choice([{"city": text(rng)}, {"n": rng.randint(0, 9), "of": {"deep": [1]}}, {"city": None}])
            call = {"id": f"c{number}", "type": "function", "function": {"name": "f", "arguments": arguments}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": f"c{number}", "content": text(rng)})
        messages.append({"role": "assistant", "content": text(rng)})
    return messages


def conversation(rng: random.Random, shape: int) -> Row:
    messages = turns(rng)
    plain = [one for one in messages if "tool_calls" not in one and one["role"] != "tool"]
    names = {"system": "system", "user": "human", "assistant": rng.choice(["gpt", "bing", "model"])}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    shapes: list[Row] = [
        {"messages": messages},
        {"messages": messages, "tools": [tool]},
        {"conversations": [{"from": names[one["role"]], "value": one["content"]} for one in plain]},
        {"prompt": plain[:-1], "completion": plain[-1:]},
        {"prompt": text(rng), "completion": text(rng)},
        {"instruction": text(rng), "input": rng.choice(["", text(rng)]), "output": text(rng)},
    ]
    return shapes[shape]


def preference(rng: random.Random, shape: int) -> Row:
    begun = [*turns(rng), {"role": "user", "content": text(rng)}]
    good, bad = ([{"role": "assistant", "content": f"{name} {text(rng)}"}] for name in ("Good", "Bad"))
    shapes: list[Row] = [
        {"prompt": begun, "chosen": good, "rejected": bad},
        {"chosen": [*begun, *good], "rejected": [*begun, *bad]},
        {"input": {"messages": begun}, "preferred_output": good, "non_preferred_output": bad},
        {"prompt": text(rng), "chosen": good[0]["content"], "rejected": bad[0]["content"]},
        {"messages": [*begun, *good], "label": rng.random() < 0.5},
        {"prompt": begun, "completion": good, "label": rng.random() < 0.5},
    ]
    return shapes[shape]


def drawn(rng: random.Random, kind: str, shape: int) -> Row:
    if kind == "conversations":
        return conversation(rng, shape)
    if kind == "preferences":
        return preference(rng, shape)
    if kind == "documents":
        return {"text": text(rng), **({"n": rng.randint(0, 9)} if shape else {})}
    if kind == "labelled_texts":
        return {"text": text(rng), "label": rng.choice(["bug", "NA", "ü", "1.5"]) if shape else rng.randint(0, 2)}
    return {"source": text(rng), "target": text(rng)}


def written(rng: random.Random, kind: str, suffix: str, rows: list[Row], separator: str) -> bytes:
    """The file as another tool writes it."""
    buffer = io.BytesIO()
    if suffix in ("csv", "tsv"):
        quoting = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
        end = rng.choice(("\n", "\r\n"))
        frame = pd.DataFrame(rows)
        return frame.to_csv(index=False, sep=separator, quoting=quoting, lineterminator=end).encode("utf-8-sig")  # type: ignore[call-overload,no-any-return]
    if suffix == "parquet":
        if kind == "labelled_texts" and all(row.get("label") in (0, 1, 2) for row in rows):
            table = Dataset.from_list(rows).cast_column("label", ClassLabel(names=["no", "yes", "1"]))
            table.to_parquet(buffer)
        else:
            pq.write_table(pa.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    if suffix in ("jsonl", "json"):
        ascii_, indent = rng.random() < 0.5, rng.choice((None, 2)) if suffix == "json" else None
        if suffix == "json" and rng.random() < 0.7:
            return json.dumps(rows, ensure_ascii=ascii_, indent=indent).encode()
        return "\n".join(json.dumps(row, ensure_ascii=ascii_) for row in rows).encode()
    return "\n\n".join(f"{number} {row['text']}" for number, row in enumerate(rows)).encode()


def odd(rng: random.Random, value: Any, odds: list[Any], depth: int = 0) -> Any:
    """The value with something in it replaced, renamed or left out."""
    if depth and (not isinstance(value, dict | list) or not value or rng.random() < 0.15):
        return rng.choice(odds)
    if isinstance(value, list):
        number = rng.randrange(len(value))
        return [odd(rng, item, odds, depth + 1) if number == index else item for index, item in enumerate(value)]
    name = rng.choice(list(value))
    changed = {key: item for key, item in value.items() if key != name}
    roll = rng.random()
    if roll < 0.1:
        return changed
    return {**changed, (name.title() if roll < 0.2 else name): odd(rng, value[name], odds, depth + 1)}


def damaged(rng: random.Random, content: bytes) -> bytes:
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((0, 0, 1, 1, 5, 1 << 30)))
        content = content[:start] + rng.choice((b"", *BYTES)) + content[end:]
    return content


def reference(content: bytes, suffix: str, separator: str) -> tuple[list[Row], list[str]] | None:
    """Records without what holds nothing, and columns, as pandas or pyarrow read them; None where they cannot."""
    if suffix == "parquet":
        dataset = Dataset(pq.read_table(io.BytesIO(content)))
        names = {name: one.names for name, one in dataset.features.items() if isinstance(one, ClassLabel)}
        rows = [
            {
                name: names[name][value] if name in names and value is not None else bare(value)
                for name, value in row.items()
            }
            for row in dataset.data.to_pylist(maps_as_pydicts="strict")
        ]
        columns = dataset.column_names
    else:
        try:
            if suffix in ("csv", "tsv"):
                options: dict[str, Any] = {
                    "dtype": str,
                    "na_filter": False,
                    "encoding": "utf-8-sig",
                    "index_col": False,
                }
                frame = pd.read_csv(io.BytesIO(content), sep=separator, **options)
            else:
                decoded = content.decode("utf-8-sig")
                options = {"lines": not decoded.lstrip().startswith("["), "orient": "records", "dtype": False}
                frame = pd.read_json(io.StringIO(decoded), precise_float=True, **options)
        except (ValueError, KeyError):  # numbers beyond 64 bits, objects over several lines
            return None
        frame.columns = frame.columns.astype(str).str.strip()
        rows, columns = frame.to_dict("records"), list(frame.columns)
    return [{name: value for name, value in row.items() if not empty(value)} for row in rows], columns


def empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def bare(value: Any) -> Any:
    """An Arrow value without the nulls that align structs, as JSON would hold it."""
    if isinstance(value, dict):
        return {name: bare(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [bare(item) for item in value]
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    if isinstance(value, Decimal):
        return float(value)
    return value.isoformat() if isinstance(value, datetime) else value


def told(value: Any, role: str = "user") -> list[Any]:
    """(role, content, calls) of turns."""
    found = []
    written_turns: list[Row] = [{"role": role, "content": value}] if isinstance(value, str) else value
    for turn in [written_turns] if isinstance(written_turns, dict) else written_turns:
        name = str(turn["from"] if turn.get("from") is not None else turn.get("role")).lower()
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if isinstance(content, dict):
            content = json.dumps(content, ensure_ascii=False)
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        calls = (
            [one["function"] for one in turn.get("tool_calls") or []] if ROLES.get(name, name) == "assistant" else []
        )
        found.append(
            (ROLES.get(name, name), content or "", [(one["name"], one.get("arguments") or {}) for one in calls])
        )
    return found


def expected(kind: str, record: Row, columns: list[str]) -> Any:
    if kind in ("documents", "labelled_texts", "text_pairs"):
        names = {"documents": ["text"], "labelled_texts": ["text", "label"], "text_pairs": ["source", "target"]}[kind]
        values = []
        for name in names:
            alike = [column for column in columns if column.lower() == name]
            (column,) = [name] if name in columns else alike or columns
            values.append(record.get(column) if kind == "documents" else label(record.get(column, "")))
        return tuple(values)
    ask = record.get("prompt", record.get("messages", record.get("conversations")))
    if "instruction" in record:
        parts = [record[name] for name in ("instruction", "input") if record.get(name)]
        ask = "\n\n".join(part for part in parts if part.strip())
    if kind == "conversations":
        asked = record.get("messages", record.get("conversations"))
        if asked is not None:
            return told(asked)
        return told(ask) + told(record.get("output", record.get("completion")), "assistant")
    if "label" in record and "completion" not in record:
        prompt, answer = told(ask)[:-1], told(ask)[-1:]
    else:
        ask = record["input"]["messages"] if isinstance(record.get("input"), dict) else ask
        prompt, answer = told(ask or []), told(record.get("completion", []), "assistant")
    if "label" in record:
        return (prompt, answer, None) if record["label"] else (prompt, None, answer)
    good = told(record.get("chosen", record.get("preferred_output")), "assistant")
    bad = told(record.get("rejected", record.get("non_preferred_output")), "assistant")
    if not prompt:
        begun = takewhile(lambda pair: pair[0] == pair[1], zip(good, bad, strict=False))
        prompt = [one for one, _ in begun]
        good, bad = good[len(prompt) :], bad[len(prompt) :]
    return prompt, good, bad


def label(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def kept(kind: str, row: Row) -> Any:
    """What `expected` says, of a row of ours."""
    if kind in ("documents", "labelled_texts", "text_pairs"):
        return tuple(value for name, value in row.items() if name in ("text", "label", "source", "target"))[
            : 1 + (kind != "documents")
        ]

    def read(messages: list[Row] | None) -> Any:
        if messages is None:
            return None
        return [
            (
                one["role"],
                one["content"],
                [
                    (call["function"]["name"], json.loads(call["function"]["arguments"]))
                    for call in one["tool_calls"] or []
                ],
            )
            for one in messages
        ]

    return (
        read(row["messages"])
        if kind == "conversations"
        else tuple(read(row[name]) for name in ("prompt", "chosen", "rejected"))
    )


def distinct(values: list[Any]) -> list[Any]:
    return list({repr(value): value for value in values}.values())


def outcome(kind: str, files: list[Path], folder: Path) -> tuple[list[Any], str]:
    """The rows of the dataset that the files become, or why they are refused."""
    try:
        add(kind, files, "mine", folder, replace=True)
    except InputError as error:
        return [], str(error)
    return [kept(kind, row) for row in read_rows(folder / "mine", "train")], ""


def check(kind: str, suffix: str, number: int, folder: Path) -> bool:
    """Whether the file was read; its rows are then those of the reference."""
    rng = random.Random(f"{kind} {suffix} {number}")
    shape = rng.randrange(6 if kind in ("conversations", "preferences") else 2)
    rows = [drawn(rng, kind, shape) for _ in range(rng.randint(1, 6))]
    # Commas are not quoted in a file that semicolons separate: in one column they are taken for the separator.
    separator = "\t" if suffix == "tsv" else rng.choice(",;\t") if len(rows[0]) > 1 else ","
    change = rng.choice(("none", "values", "bytes"))
    content = written(rng, kind, suffix, rows, separator)
    if change == "values" and suffix not in ("txt", "md"):
        odds = ARROW if suffix == "parquet" else ODD
        changed = [odd(rng, row, odds) if rng.random() < 0.5 else row for row in rows]
        try:
            content = written(rng, kind, suffix, changed, separator)
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            change = "none"  # no table that Parquet can hold
    content = damaged(rng, content) if change == "bytes" else content
    path = folder / f"a.{suffix}"
    path.write_bytes(content)
    ours, refusal = outcome(kind, [path], folder / "added")
    assert "\n" not in refusal
    assert change != "none" or not refusal or "a quote joins it" in refusal, refusal
    if suffix in ("txt", "md") and not refusal:
        said = content.decode("utf-8-sig")
        assert "".join("".join(one[0].split()) for one in ours) == "".join(said.split())
    elif not refusal and (read := reference(content, suffix, separator)):
        records, columns = read
        assert distinct(ours) == distinct([expected(kind, record, columns) for record in records])
    return not refusal


def check_parallel(number: int, folder: Path) -> bool:
    """Two texts side by side; the reference is their lines."""
    rng = random.Random(number)
    pairs = [(text(rng, "  \r"), text(rng, "  \t")) for _ in range(rng.randint(1, 6))]
    files, change = [folder / "a.en", folder / "a.de"], rng.random() < 0.6
    contents = ["".join(f"{pair[side]}\n" for pair in pairs).encode() for side in (0, 1)]
    contents[0] = damaged(rng, contents[0]) if change else contents[0]
    for path, content in zip(files, contents, strict=True):
        path.write_bytes(content)
    ours, refusal = outcome("text_pairs", files, folder / "added")
    assert "\n" not in refusal
    assert change or not refusal, refusal
    if not refusal:
        lines = [content.decode("utf-8-sig").removesuffix("\n").split("\n") for content in contents]
        theirs = [(one.rstrip("\r"), other) for one, other in zip(*lines, strict=True)]
        assert distinct(ours) == distinct(theirs)
    return not refusal


@pytest.mark.parametrize(("kind", "suffix"), [(kind, suffix) for kind, names in FORMATS.items() for suffix in names])
def test_rows_are_those_of_a_reference_reader_or_refused_in_a_line(tmp_path: Path, kind: str, suffix: str) -> None:
    read = [
        check_parallel(number, tmp_path) if suffix == "en" else check(kind, suffix, number, tmp_path)
        for number in range(CASES)
    ]
    assert any(read), "a reader that refuses everything reads nothing wrongly"
