"""Preference data in the formats of others, through `add` and validation."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config.params import InputError
from components.datasets.formats import DatasetWriter, read_rows
from components.datasets.importers import add
from components.datasets.preferences import read_preference
from components.validation.report import ValidationReport
from components.validation.validate import Validator

EXPECTATIONS = Path(__file__).parents[2] / "data/expectations"
USER = {"role": "user", "content": "Who?"}
GOOD, BAD = {"role": "assistant", "content": "Ada."}, {"role": "assistant", "content": "Eve."}
PAIR = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": None}
ROW = {**PAIR, "id": "1"}


def written(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def checked(folder: Path) -> ValidationReport:
    return Validator(EXPECTATIONS).check(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "Who?", "chosen": "Ada.", "rejected": "Eve."},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Who?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Who?", "chosen": json.dumps([GOOD]), "rejected": "Eve."},
        {
            "conversations": [{"from": "human", "value": "Who?"}],
            "chosen": {"from": "gpt", "value": "Ada."},
            "rejected": {"role": "assistant", "content": "Eve."},
        },
        {"chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 8.0},
        {"chosen": "\n\nHuman: Who?\n\nAssistant: Ada.", "rejected": "\n\nHuman: Who?\n\nAssistant: Eve."},
        {"instruction": "Who?", "input": "", "chosen": "Ada.", "rejected": "Eve."},
        {"question": "Who?", "system": "", "chosen": "Ada.", "rejected": "Eve."},
        {"instruction": "Who?", "chosen_response": "Ada.", "rejected_response": "Eve."},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"prompt": "Who?", "messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
    ],
)
def test_a_pair_is_read_from_every_shape(values: dict[str, Any]) -> None:
    assert read_preference("a:1", values) == PAIR


@pytest.mark.parametrize(("label", "side", "other"), [(True, "chosen", "rejected"), (False, "rejected", "chosen")])
def test_an_unpaired_label_is_one_side(label: bool, side: str, other: str) -> None:
    shapes: list[dict[str, Any]] = [
        {"messages": [USER, GOOD]},
        {"prompt": "Who?", "completion": "Ada."},
        {"prompt": [USER], "completion": [GOOD]},
        {"instruction": "Who?", "input": "", "output": "Ada."},
    ]
    for name, values in product(("label", "kto_tag"), shapes):
        row = read_preference("a:1", {**values, name: label})
        assert (row["prompt"], row[side], row[other]) == ([USER], [GOOD], None)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),
        ("Sky?\nblue", "Sky?\nred", "Sky?\n"),
        ("The sky is", "The sky is blue.", "The sky"),
    ],
)
def test_texts_without_a_prompt_begin_with_it(chosen: str, rejected: str, prompt: str) -> None:
    row = read_preference("a:1", {"chosen": chosen, "rejected": rejected})
    assert row["prompt"] == [{"role": "user", "content": prompt}]
    assert [row[side][0]["content"] for side in ("chosen", "rejected")] == [
        chosen.removeprefix(prompt),
        rejected.removeprefix(prompt),
    ]


def test_a_prompt_implied_by_the_pair_holds_the_calls_that_both_make() -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    begun = [USER, called, {"role": "tool", "content": "1"}]
    row = read_preference("a:1", {"system": "Be brief.", "chosen": [*begun, GOOD], "rejected": [*begun, BAD]})
    assert [message["role"] for message in row["prompt"]] == ["system", "user", "assistant", "tool"]
    assert (row["chosen"], row["rejected"]) == ([GOOD], [BAD])


def test_an_answer_that_is_json_stays_text() -> None:
    row = read_preference("a:1", {"prompt": "JSON?", "chosen": '{"a": 1}', "rejected": "[1]"})
    assert [row[side][0]["content"] for side in ("chosen", "rejected")] == ['{"a": 1}', "[1]"]


def test_a_vote_is_on_the_calls_of_the_answer_too() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "c", "content": "1"}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    row = read_preference("a:1", {"messages": [USER, GOOD, USER, called, result, GOOD], "label": True})
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"]
    assert [message["role"] for message in row["chosen"]] == ["assistant", "tool", "assistant"]


def test_a_pair_may_answer_a_tool_result_of_its_prompt() -> None:
    called = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    turns = [{"from": "human", "value": "Who?"}, called, {"from": "observation", "value": "1"}]
    row = read_preference("a:1", {"conversations": turns, "chosen": "One.", "rejected": "Two."})
    assert (row["prompt"][-1]["role"], row["chosen"][0]["content"]) == ("tool", "One.")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "x", "chosen": "y", "rejected": "y"}, "chosen and rejected are equal; nothing is preferred"),
        ({"prompt": "x", "chosen": "", "rejected": "y"}, "chosen: empty; an answer says something or calls a tool"),
        ({"prompt": "x", "chosen": [], "rejected": "y"}, "chosen: empty; an answer is a turn of the assistant"),
        ({"prompt": "x", "chosen": "y"}, 'rejected: missing; a pair has "chosen" and "rejected"'),
        ({"prompt": "x", "chosen": "y", "rejected": None}, "rejected: missing"),
        ({"chosen": "y", "rejected": "z"}, 'prompt: missing; expected "prompt" or "conversations"'),
        ({"completion": "y", "label": True}, 'prompt: missing; expected "prompt" or "conversations" beside the answer'),
        ({"prompt": " ", "chosen": "y", "rejected": "z"}, "prompt: empty; say what was answered"),
        ({"prompt": 3, "chosen": "y", "rejected": "z"}, "prompt: expected text, a turn or a list of turns, found int"),
        ({"prompt": [], "chosen": "y", "rejected": "z"}, "prompt: no turn of a user that says something"),
        ({"prompt": [USER, GOOD], "chosen": "y", "rejected": "z"}, "prompt: ends with a turn of role assistant"),
        ({"prompt": "x", "chosen": USER, "rejected": "z"}, "chosen: begins with a turn of role user"),
        ({"prompt": "x", "chosen": [GOOD, USER], "rejected": "z"}, "chosen: ends with a turn of role user"),
        ({"prompt": "x", "chosen": 1, "rejected": "z"}, "chosen: expected text, a turn or a list of turns, found int"),
        ({"prompt": "x", "chosen": {"role": "me"}, "rejected": "z"}, "chosen: turn 1: role: 'me' is not a role"),
        ({"messages": [USER, GOOD], "label": 1}, "label: 1 is no boolean; expected true .liked. or false .disliked."),
        ({"messages": [USER, GOOD], "label": None}, "label: None is no boolean"),
        ({"messages": [USER], "label": True}, "chosen: empty; an answer is a turn of the assistant"),
        ({"messages": [GOOD], "label": True}, "no turn of a user among 1; a label is for the answer to one"),
        ({"messages": [USER, GOOD], "label": True, "chosen": "y"}, '"label" beside "chosen"'),
        ({"messages": [USER, GOOD]}, 'no rated answer; found columns: messages; expected "prompt"'),
    ],
)
def test_a_misfit_is_reported_with_file_row_and_reason(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"prompt": "Who?", "chosen": "Ada.", "rejected": "Eve."}
    path = written(tmp_path / "a.jsonl", [good, values])
    with pytest.raises(InputError, match=rf"^a\.jsonl:2: .*{message}") as caught:
        add("preferences", [path], "mine", tmp_path / "added")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "added").iterdir()) == []


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_pairs_and_votes_become_a_valid_dataset_with_stable_ids(suffix: str, tmp_path: Path) -> None:
    pairs = [{"prompt": "Who?", "chosen": "Ada.", "rejected": word} for word in ("Eve.", "Bob.", "Eve.")]
    votes = [{"messages": [USER, GOOD], "label": label} for label in (True, False)]
    files = [written(tmp_path / f"pairs.{suffix}", pairs), written(tmp_path / f"votes.{suffix}", votes)]
    info = add("preferences", files, "mine", tmp_path / "added", check=checked)
    assert (info.rows, info.dropped) == ({"train": 4}, {"exact_duplicate": 1})
    rows = list(read_rows(tmp_path / "added/mine", "train"))
    assert [(bool(row["chosen"]), bool(row["rejected"])) for row in rows] == [(1, 1), (1, 1), (1, 0), (0, 1)]
    add("preferences", files[:1], "again", tmp_path / "added")
    again = read_rows(tmp_path / "added/again", "train")
    assert [row["id"] for row in again] == [row["id"] for row in rows[:2]]
    shard = tmp_path / "added/mine/train-00000.parquet"
    add("preferences", [shard], "copy", tmp_path / "added")
    assert list(read_rows(tmp_path / "added/copy", "train")) == rows, "our own files come in again as they are"


def test_the_gate_finds_each_fault(tmp_path: Path) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    faulty: dict[str, dict[str, Any]] = {
        "prompt_roles": {"prompt": [USER, GOOD]},
        "question": {"prompt": [{"role": "user", "content": " "}]},
        "answers": {"chosen": None, "rejected": None},
        "equal_answers": {"rejected": [GOOD]},
        "foreign_answers": {"chosen": [USER]},
        "empty_answers": {"rejected": [{"role": "assistant", "content": ""}]},
        "unanswered_calls": {"chosen": [{"role": "assistant", "tool_calls": [call]}, GOOD]},
        "uncalled_results": {"chosen": [{"role": "tool", "tool_call_id": "d", "content": "1"}, GOOD]},
        "unreadable_tools": {"tools": "{"},
    }
    with DatasetWriter(tmp_path / "mine", "mine", "preferences") as writer:
        for name, changes in faulty.items():
            writer.write("train", {**ROW, "id": name, **changes})
        writer.write("test", {**ROW, "id": "held out"})
    failed = {check.column or check.expectation: check for check in checked(tmp_path / "mine").failed}
    for name in faulty:
        assert name in [example.id for example in failed[name].examples]
    leaked = failed["held_out_rows_are_not_trained_on"]
    assert leaked.failed == len(faulty) - 1, "all but the one that asks something else"


def test_of_two_formats_columns_the_first_known_counts() -> None:
    """In whatever order the record, or a set of its names, has them."""
    record = {"prompt": "p", "chosen_response": "b", "rejected_response": "c"}
    both = {**record, "preferred_output": "d", "non_preferred_output": "e"}
    row = read_preference("row 1", both)
    assert row["chosen"] == read_preference("row 1", {"prompt": "p", "chosen": "d", "rejected": "e"})["chosen"]
