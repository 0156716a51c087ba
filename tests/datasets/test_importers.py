"""`add`: a user's files become a dataset, all or nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config.params import InputError, Refused
from components.datasets import formats as datasets
from components.datasets.conversations import named_roles
from components.datasets.formats import SCHEMAS, DatasetWriter, read_info, read_rows, shards
from components.datasets.importers import Columns, add, adding, undo_killed
from components.validation.report import Check, Example, ValidationReport
from tests.pages import ROOT

USER, ANSWER = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}


def written(path: Path, content: str | bytes | list[Any]) -> Path:
    if isinstance(content, list) and path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    elif isinstance(content, list):
        path.write_text("\n".join(json.dumps(row) for row in content), encoding="utf-8")
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return list(read_rows(folder, "train"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "One.\n\nTwo.\n"),
        ("a.jsonl", [{"text": "One."}, {"text": "Two."}]),
        ("a.json", '[{"text": "One."}, {"text": "Two."}]'),
        ("a.csv", "text,label\r\nOne.,a\r\nTwo.,b\r\n"),
        ("a.tsv", "label\tText\na\tOne.\nb\tTwo.\n"),
        ("one_column.csv", "sentence\nOne.\nTwo.\n"),
        ("a.parquet", [{"text": "One.", "n": {"x": 1}}, {"text": "Two.", "n": None}]),
        ("A.JSONL", [{"text": "One."}, {"text": "Two."}]),
    ],
)
def test_documents_are_read_from_every_format(tmp_path: Path, name: str, content: str | list[Any]) -> None:
    path = written(tmp_path / name, content)
    info = add("documents", [path], "mine", tmp_path / "added")
    assert info.rows == {"train": 2}
    assert read_info(tmp_path / "added/mine") == info
    assert [source["name"] for source in info.sources] == [name]
    rows = rows_of(tmp_path / "added/mine")
    assert [(row["text"], row["source"]) for row in rows] == [("One.", name), ("Two.", name)]
    assert pq.read_schema(shards(tmp_path / "added/mine", "train")[0]).equals(SCHEMAS["documents"])


def test_capitals_of_a_suffix_change_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", [{"text": "One."}]).rename(tmp_path / "A.PARQUET")
    assert add("documents", [path], "mine", tmp_path / "added").rows == {"train": 1}


def test_packed_files_side_by_side_are_no_texts(tmp_path: Path) -> None:
    files = [written(tmp_path / f"a.{name}.gz", b"\x1f\x8b") for name in ("en", "de")]
    with pytest.raises(InputError, match=r"a\.en\.gz: '\.gz' is not a format of this kind"):
        add("text_pairs", files, "mine", tmp_path / "added")


def test_a_file_whose_name_is_no_utf_8_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / os.fsdecode(b"caf\xe9.jsonl"), [{"text": "One."}])
    info = add("documents", [path], "mine", tmp_path / "added")
    assert [source["name"] for source in info.sources] == ["caf\\xe9.jsonl"]
    assert [row["source"] for row in rows_of(tmp_path / "added/mine")] == ["caf\\xe9.jsonl"]


def test_columns_are_chosen_once_for_a_file(tmp_path: Path) -> None:
    rows = [{"TEXT": "a", "text": "one", "label": "x"}, {"text": "two", "Text": "b", "label": "y"}]
    add("labelled_texts", [written(tmp_path / "a.jsonl", rows)], "mine", tmp_path / "added")
    assert [row["text"] for row in rows_of(tmp_path / "added/mine")] == ["one", "two"]


def test_roles_can_be_named_where_there_are_turns(tmp_path: Path) -> None:
    turns = [{"from": "caller", "value": "x"}, {"from": "agent", "value": "y"}]
    path = written(tmp_path / "a.jsonl", [{"conversations": turns}])
    columns = Columns(roles=named_roles(["caller=user", "agent=assistant"]))
    add("conversations", [path], "mine", tmp_path / "added", columns)
    (row,) = rows_of(tmp_path / "added/mine")
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    rated = written(tmp_path / "b.jsonl", [{"conversations": turns[:1], "chosen": turns[1], "rejected": "z"}])
    assert add("preferences", [rated], "rated", tmp_path / "added", columns).rows == {"train": 1}
    with pytest.raises(InputError, match=r"--role: is not supported by documents, which has no turns"):
        add("documents", [path], "other", tmp_path / "added", columns)


def test_markdown_files_become_documents_with_their_names(tmp_path: Path) -> None:
    files = [written(tmp_path / f"{name}.md", f"# {name}\n\nWords.\n") for name in ("a", "b")]
    add("documents", files, "mine", tmp_path)
    assert [(row["text"], row["source"]) for row in rows_of(tmp_path / "mine")] == [
        ("# a\n\nWords.", "a.md"),
        ("# b\n\nWords.", "b.md"),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("openai.jsonl", [{"messages": [USER, ANSWER]}]),
        ("openai.json", json.dumps([{"messages": [USER, ANSWER]}], indent=2)),
        ("share.json", '[{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}]'),
        ("share.jsonl", [{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}]),
        ("alpaca.json", '[{"instruction": "x", "input": "", "output": "y"}]'),
        ("alpaca.jsonl", [{"instruction": "x", "input": "", "output": "y"}]),
        ("nested.parquet", [{"messages": [USER, ANSWER]}]),
    ],
)
def test_conversations_are_read_from_every_format(tmp_path: Path, name: str, content: str | list[Any]) -> None:
    info = add("conversations", [written(tmp_path / name, content)], "mine", tmp_path)
    assert info.rows == {"train": 1}
    (row,) = rows_of(tmp_path / "mine")
    assert [(message["role"], message["content"]) for message in row["messages"]] == [("user", "x"), ("assistant", "y")]
    assert row["tools"] is None


def test_own_schema_keeps_its_ids(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "d", "d", "conversations") as writer:
        writer.write("train", {"id": "mine-1", "messages": [USER, ANSWER], "tools": None, "suite": "lookup/x"})
    add("conversations", shards(tmp_path / "d", "train"), "again", tmp_path)
    assert [(row["id"], row["suite"]) for row in rows_of(tmp_path / "again")] == [("mine-1", None)]
    rows = [{"id": "a", "text": "same", "source": "s"}, {"id": "b", "text": "same", "source": "s"}]
    add("documents", [written(tmp_path / "d.parquet", rows)], "documents", tmp_path)
    assert rows_of(tmp_path / "documents") == rows


def test_named_column_holds_the_text_also_within_another(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"text": "no", "data": {"body": "yes"}}])
    add("documents", [path], "mine", tmp_path, Columns(text="data.body"))
    assert [row["text"] for row in rows_of(tmp_path / "mine")] == ["yes"]


def test_repeated_rows_are_counted_and_ids_follow_the_content(tmp_path: Path) -> None:
    first = written(tmp_path / "a.csv", "text\none\ntwo\none\n")
    second = written(tmp_path / "b.csv", "text\ntwo\nthree\n")
    info = add("documents", [first, second], "mine", tmp_path)
    assert info.rows == {"train": 3}
    assert info.dropped == {"exact_duplicate": 2}
    alone = add("documents", [second], "other", tmp_path)
    assert alone.dropped == {}
    ids = {row["text"]: row["id"] for row in rows_of(tmp_path / "mine")}
    assert all(ids[row["text"]] == row["id"] for row in rows_of(tmp_path / "other"))


def test_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"messages": [USER, ANSWER]}, {"instruction": "a", "output": "b"}])
    for name in ("x", "y"):
        add("conversations", [path], "mine", tmp_path / name)
    for file in ("dataset.json", "train-00000.parquet"):
        assert (tmp_path / "x/mine" / file).read_bytes() == (tmp_path / "y/mine" / file).read_bytes()


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("documents", "a.docx", "x", r"a\.docx: '\.docx' is not a format of this kind; allowed: \.txt, \.md, \.jsonl,"),
        ("documents", "notes", "x", r"notes: a name without suffix is not a format of this kind"),
        ("conversations", "a.txt", "x", r"a\.txt: '\.txt' is not a format of this kind; allowed: \.jsonl,"),
        ("documents", "a.jsonl.gz", b"\x1f\x8b", r"'\.gz' is not a format of this kind; .*; unpack the file first"),
        ("labelled_texts", "a.csv.ZST", b"(\xb5", r"'\.ZST' is not a format of this kind; .*; unpack the file first"),
        ("text_pairs", "a.zip", b"PK\xff", r"'\.zip' is not a format of this kind; .*; unpack the file first"),
        (
            "documents",
            "a.jsonl",
            [{"only": "x"}, {"other": "y"}],
            r"a\.jsonl:2: no column 'only'; found columns: other",
        ),
        ("documents", "a.csv", "Text,TEXT\na,b\n", r"a\.csv:2: more than one column 'text'; found columns: Text, TEXT"),
        (
            "documents",
            "a.jsonl",
            '{"id": "1", "text": "x", "source": "\\ud83d"}',
            r"a\.jsonl:1: '\\ud83d': half of a surrogate pair",
        ),
        (
            "labelled_texts",
            "a.csv",
            "text,label\na,1\nb,2.0\nc,1.0\n",
            r"a\.csv:4: label: '1\.0' and '1' are one number written in two ways",
        ),
        ("labelled_texts", "a.jsonl", '{"text": "a", "label": 1e999}', r"a\.jsonl:1: label: inf is no label"),
        ("labelled_texts", "a.jsonl", f'{{"text": "a", "label": {"9" * 6000}}}', r"a\.jsonl:1: label: .* is no label"),
        (
            "conversations",
            "a.jsonl",
            '{"messages": [{"role": "user", "content": ' + '{"a":' * 900 + "1" + "}" * 900 + "}]}",
            r"a\.jsonl:1: ",
        ),
        ("documents", "a.txt", "", r"a\.txt: empty file; nothing to add"),
        ("documents", "a.txt", " \n\n", r"a\.txt: holds no rows; nothing to add"),
        ("documents", "a.json", "[]", r"a\.json: holds no rows; nothing to add"),
        ("documents", "a.csv", "text\n", r"a\.csv: holds no rows; nothing to add"),
        ("documents", "a.txt", b"fine\n\xff", r"a\.txt:2: invalid UTF-8, byte 0xff at offset 5"),
        ("documents", "a.jsonl", '{"text": "x"}\n{oh}\n', r"a\.jsonl:2: not valid JSON: "),
        (
            "documents",
            "a.csv",
            "title,body\na,b\n",
            r"a\.csv:2: no column 'text'; found columns: title, body; name one with --text-column",
        ),
        (
            "documents",
            "a.jsonl",
            [{"text": "x"}, {"a": 1, "b": 2}],
            r"a\.jsonl:2: no column 'text'; found columns: a, b",
        ),
        ("documents", "a.jsonl", [{"text": 7}], r"a\.jsonl:1: text: expected text, found int '7'"),
        ("documents", "a.parquet", [{"text": ["a"]}], r"a\.parquet: row 1: text: expected text, found list"),
        (
            "documents",
            "a.jsonl",
            '{"text": "half \\ud83d"}',
            r"a\.jsonl:1: '\\ud83d': half of a surrogate pair, no character",
        ),
        ("conversations", "a.json", '[{"messages": [{"role": "user", "content": "\\ude00"}]}]', r"no assistant turn"),
        (
            "conversations",
            "a.jsonl",
            '{"instruction": "\\ude00", "output": "y"}',
            r"a\.jsonl:1: '\\ude00': half of a surrogate pair",
        ),
        (
            "conversations",
            "a.jsonl",
            [{"messages": [USER, ANSWER]}, {"messages": [USER]}],
            r"a\.jsonl:2: no assistant turn",
        ),
    ],
)
def test_file_that_does_not_fit_is_reported_in_one_line_and_leaves_nothing(
    tmp_path: Path, kind: str, name: str, content: str | bytes | list[Any], message: str
) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as raised:
        add(kind, [path], "mine", tmp_path / "added")
    assert "\n" not in str(raised.value)
    assert list((tmp_path / "added").iterdir()) == []


def test_second_file_that_does_not_fit_discards_the_first(tmp_path: Path) -> None:
    files = [written(tmp_path / "a.csv", "text\none\n"), tmp_path / "missing.csv"]
    with pytest.raises(InputError, match=r"missing\.csv: not found; check the name"):
        add("documents", files, "mine", tmp_path / "added")
    assert list((tmp_path / "added").iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        ("docs", Columns(), r"'docs' is not a kind of dataset; allowed: documents, conversations, preferences"),
        ("pictures", Columns(), r"'pictures' is not a kind of dataset; allowed: documents, conversations, preferences"),
        (
            "conversations",
            Columns(text="t"),
            r"--text-column: 't' is not supported by conversations; .* of this kind: none",
        ),
        (
            "documents",
            Columns(label="l"),
            r"--label-column: 'l' is not supported by documents; .* of this kind: --text-column",
        ),
        ("documents", Columns(text="t"), r"a\.csv:2: no column 't'; found columns: text"),
    ],
)
def test_wrong_kind_and_columns_are_reported(tmp_path: Path, kind: str, columns: Columns, message: str) -> None:
    path = written(tmp_path / "a.csv", "text\none\n")
    with pytest.raises(InputError, match=message):
        add(kind, [path], "mine", tmp_path / "added", columns)


@pytest.mark.parametrize("name", ["", "a b", "../x", ".hidden", "a.b", "x" * 65, "-a", "ü"])
def test_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "a.csv", "text\none\n")
    with pytest.raises(InputError, match=r"--name: .* is no name for a dataset; use up to 64 letters"):
        add("documents", [path], name, tmp_path / "added")


def test_taken_names_are_refused_unless_replaced(tmp_path: Path) -> None:
    one, two = (written(tmp_path / f"{text}.csv", f"text\n{text}\n") for text in ("one", "two"))
    with pytest.raises(InputError, match="'stdlib-documents' is a built-in dataset; choose another name"):
        add("documents", [one], "stdlib-documents", tmp_path, built_in=["stdlib-documents"])
    add("documents", [one], "mine", tmp_path)
    with pytest.raises(
        InputError, match="'mine' exists already; choose another name, or put it in its place with --replace"
    ):
        add("documents", [two], "mine", tmp_path)
    assert [row["text"] for row in rows_of(tmp_path / "mine")] == ["one"]
    add("documents", [two], "mine", tmp_path, replace=True)
    assert [row["text"] for row in rows_of(tmp_path / "mine")] == ["two"]
    (tmp_path / "elsewhere.dvc").write_text("outs: []")
    with pytest.raises(InputError, match="'elsewhere' exists already"):
        add("documents", [two], "elsewhere", tmp_path)
    assert not list(tmp_path.glob(".adding-*"))


def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path) -> None:
    file = written(tmp_path / "a.csv", "text\none\n")
    command = f"""
import os
import subprocess
import sys
from pathlib import Path
from components.datasets.importers import add
add("documents", [Path({str(file)!r})], "mine", Path({str(tmp_path)!r}), check=lambda folder: os.kill(os.getpid(), 9))
"""
    assert subprocess.run([sys.executable, "-c", command]).returncode == -9
    assert list(tmp_path.glob(".adding-*"))
    add("documents", [file], "mine", tmp_path)
    assert [row["text"] for row in rows_of(tmp_path / "mine")] == ["one"]
    assert not list(tmp_path.glob(".adding-*"))


def failing(row: int, shard: str = "train-00000.parquet") -> Callable[[Path], ValidationReport]:
    def check(folder: Path) -> ValidationReport:
        assert read_info(folder).rows == {"train": 4}
        check_ = Check("expect_x", "text", "A text is fine", shard, rows=4, failed=1)
        check_.note(Example(shard, row, "abc", "'bad'"))
        return ValidationReport("mine", "documents", {"train": 4}, [check_])

    return check


@pytest.mark.parametrize("replace", [False, True])
def test_refused_dataset_leaves_what_was_there(tmp_path: Path, replace: bool) -> None:
    folder = tmp_path / "added"
    if replace:
        add("documents", [written(tmp_path / "old.csv", "text\nold\n")], "mine", folder)
    path = written(tmp_path / "a.csv", "text\none\none\ntwo\nthree\nfour\n")
    with pytest.raises(Refused) as raised:
        add("documents", [path], "mine", folder, replace=True, check=failing(row=3))
    first = str(raised.value).splitlines()[0]
    assert (
        first
        == "mine: data validation failed: A text is fine: 1 of 4 rows failed (25.00%); first a.csv:5 (id abc): 'bad'"
    )
    assert [row["text"] for row in rows_of(folder / "mine")] == (["old"] if replace else [])
    assert not list(folder.glob(".adding-*"))


KILLED = """
import os, sys
from itertools import count
from pathlib import Path

from components.datasets.importers import add

path, folder, step = sys.argv[1:]
steps, rename = count(), os.rename


def killed_before(*paths):
    os._exit(9) if next(steps) == int(step) else rename(*paths)


os.rename = killed_before
add("documents", [Path(path)], "mine", Path(folder), replace=True, version=lambda: os._exit(9))
"""


@pytest.mark.parametrize(("exists", "step"), [(True, 0), (True, 1), (True, 2), (False, 0), (False, 1)])
def test_kill_while_a_dataset_takes_its_place_leaves_what_was_there(tmp_path: Path, exists: bool, step: int) -> None:
    folder, locks = tmp_path / "added", tmp_path / "locks"
    if exists:
        add("documents", [written(tmp_path / "old.csv", "text\nold\n")], "mine", folder)
    new = written(tmp_path / "new.csv", "text\nnew\n")
    command = [sys.executable, "-c", KILLED, str(new), str(folder), str(step)]
    assert subprocess.run(command, cwd=ROOT).returncode == 9
    with adding(locks, "mine"):
        undo_killed(folder, locks)
    assert list(folder.glob(".adding-*")), "its process lives"
    undo_killed(folder, locks)
    assert [path.name for path in folder.iterdir()] == (["mine"] if exists else [])
    assert [row["text"] for row in rows_of(folder / "mine")] == (["old"] if exists else [])


def test_refusal_finds_the_row_of_the_file_in_later_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "ROWS_PER_SHARD", 3)
    monkeypatch.setattr(datasets, "ROWS_PER_GROUP", 2)
    path = written(tmp_path / "a.csv", "text\none\ntwo\nthree\nfour\nfour\nfive\n".replace("five", "four"))
    with pytest.raises(Refused, match=r"first a\.csv:5 \(id abc\)"):
        add("documents", [path], "mine", tmp_path, check=failing(row=4))
    path = written(tmp_path / "b.jsonl", [{"text": str(number)} for number in range(4)])
    monkeypatch.setattr(datasets, "ROWS_PER_GROUP", 1)
    with pytest.raises(Refused, match=r"first b\.jsonl:4 \(id abc\)"):
        add("documents", [path], "mine", tmp_path, check=failing(row=1, shard="train-00001.parquet"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "Text,label\nOne.,1\nTwo.,2\n"),
        ("a.jsonl", [{"text": "One.", "label": 1}, {"text": "Two.", "label": 2.0}]),
        ("a.parquet", [{"text": "One.", "label": 1}, {"text": "Two.", "label": 2}]),
    ],
)
def test_labels_that_are_numbers_are_texts(tmp_path: Path, name: str, content: str | list[Any]) -> None:
    add("labelled_texts", [written(tmp_path / name, content)], "mine", tmp_path / "added")
    rows = rows_of(tmp_path / "added/mine")
    assert [(row["text"], row["label"]) for row in rows] == [("One.", "1"), ("Two.", "2")]
    assert len({row["id"] for row in rows}) == 2


def test_columns_of_a_kind_can_be_named(tmp_path: Path) -> None:
    table = written(tmp_path / "a.csv", "q,kind,a\nwho?,x,me\nwhat?,y,that\n")
    add("labelled_texts", [table], "mine", tmp_path / "added", Columns(text="q", label="kind"))
    add("text_pairs", [table], "yours", tmp_path / "added", Columns(source="q", target="a"))
    assert [row["label"] for row in rows_of(tmp_path / "added/mine")] == ["x", "y"]
    assert [(row["source"], row["target"]) for row in rows_of(tmp_path / "added/yours")] == [
        ("who?", "me"),
        ("what?", "that"),
    ]


def test_two_text_files_side_by_side_are_pairs(tmp_path: Path) -> None:
    files = [written(tmp_path / "a.en", "one\ntwo\n"), written(tmp_path / "a.de", "eins\nzwei\n")]
    add("text_pairs", files, "mine", tmp_path / "added")
    assert [(row["source"], row["target"]) for row in rows_of(tmp_path / "added/mine")] == [
        ("one", "eins"),
        ("two", "zwei"),
    ]
    short = written(tmp_path / "b.de", "eins\n")
    with pytest.raises(InputError, match=r"b\.de:2: ends here, a\.en goes on; parallel files have equally many lines"):
        add("text_pairs", [files[0], short], "other", tmp_path / "added")
    with pytest.raises(InputError, match=r"'\.en' is not a format .* or two text files of equally many lines"):
        add("text_pairs", files[:1], "other", tmp_path / "added")
    assert [path.name for path in (tmp_path / "added").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("labelled_texts", "text,label\na,x\nb, \n", r"a\.csv:3: label: ' ' is no label; every text needs one"),
        ("labelled_texts", "text,kind\na,x\n", r"a\.csv:2: no column 'label'; found .* name one with --label-column"),
        ("text_pairs", "source,other\na,x\n", r"a\.csv:2: no column 'target'; .* name one with --target-column"),
    ],
)
def test_rows_without_their_columns_are_refused_whole(tmp_path: Path, kind: str, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        add(kind, [written(tmp_path / "a.csv", content)], "mine", tmp_path / "added")
    assert list((tmp_path / "added").iterdir()) == []
