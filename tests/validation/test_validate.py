"""Data validation: valid sets pass, every fault is refused with its rows, and the outs depend on the data alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config.params import InputError, Refused, load_params
from components.config.paths import Paths
from components.datasets import formats as datasets
from components.datasets.formats import DatasetWriter, Kind, Row, row_id
from components.runtime.stage import StageRun, digest
from components.tracking.event_log import EventLog
from components.validation import validate as gate
from components.validation.cross_shard import cross_shard_checks
from components.validation.report import ValidationReport, refusal, shown
from components.validation.validate import Validator, validate

SOURCE = Path(__file__).parents[2]
EXPECTATIONS = SOURCE / "data/expectations"
CALL = {"id": "c1", "type": "function", "function": {"name": "lookup", "arguments": '{"symbol": "x"}'}}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "lookup", "content": "found"}


@pytest.fixture(scope="module")
def validator() -> Validator:
    return Validator(EXPECTATIONS)


def document(text: str | None, **changed: Any) -> Row:
    return {"id": row_id(text or ""), "text": text, "source": "a.txt", **changed}


def turn(role: str, content: str | None = "words", *calls: Row) -> Row:
    return {"role": role, "content": content, **({"tool_calls": list(calls)} if calls else {})}


def conversation(*messages: Row, number: int = 0, tools: str | None = None) -> Row:
    return {"id": f"row-{number}", "messages": list(messages), "tools": tools, "suite": None}


def good_conversations(count: int) -> list[Row]:
    asked = [turn("user", f"What is x{number}?") for number in range(count)]
    ways = [
        lambda user: (turn("system"), user, turn("assistant")),
        lambda user: (user, turn("assistant", "", CALL), RESULT, turn("assistant"), turn("user"), turn("assistant")),
        lambda user: (user, turn("assistant", None, CALL)),
    ]
    return [conversation(*ways[number % 3](user), number=number) for number, user in enumerate(asked)]


def dataset(folder: Path, kind: Kind, train: list[Row], test: list[Row] = []) -> Path:  # noqa: B006
    with DatasetWriter(folder, folder.name, kind) as writer:
        for row in train:
            writer.write("train", row)
        for row in test:
            writer.write("test", row)
    return folder


def failed(findings: ValidationReport) -> dict[str, list[str]]:
    """Offending rows by the expectation, and the column, that they fail."""
    return {
        f"{check.expectation}({check.column or ''})": [str(example) for example in check.examples]
        for check in findings.failed
    }


def test_valid_documents_pass(validator: Validator, tmp_path: Path) -> None:
    train = [document(f"text {number}\u2028 ü😀") for number in range(50)]
    findings = validator.check(dataset(tmp_path / "d", "documents", train, [document("another")]))
    assert findings.success, refusal([findings])
    assert {check.shard for check in findings.checks} == {"train-00000.parquet", "test-00000.parquet", "all shards"}
    assert findings.counts() == {"rows": 51, "checks": len(findings.checks), "failed_checks": 0, "failed_rows": 0}


def test_valid_conversations_pass(validator: Validator, tmp_path: Path) -> None:
    rows = good_conversations(40)
    findings = validator.check(dataset(tmp_path / "c", "conversations", rows[:30], rows[30:]))
    assert findings.success, refusal([findings])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (document(None), "expect_column_values_to_not_be_null(text)"),
        (document(" \n\t"), "expect_column_values_to_match_regex(text)"),
        (document("a\x00b"), "expect_column_values_to_not_match_regex(text)"),
        (document("a\ufffd\ufffd\ufffdb"), "expect_column_values_to_not_match_regex(text)"),
        (document("x" * 4_000_001), "expect_column_value_lengths_to_be_between(text)"),
        (document("fine", id=None), "expect_column_values_to_not_be_null(id)"),
        (document("fine", source=None), "expect_column_values_to_not_be_null(source)"),
    ],
)
def test_faulty_document_is_found_with_its_row(validator: Validator, tmp_path: Path, row: Row, expected: str) -> None:
    rows = [document("one"), document("two"), row, document("three")]
    findings = validator.check(dataset(tmp_path / "d", "documents", rows))
    (examples,) = [failed(findings)[expected]]
    assert len(failed(findings)) == 1
    assert examples[0].startswith("train-00000.parquet row 3 (id ")


USER, ANSWER = turn("user"), turn("assistant")
NO_OBJECT = {**CALL, "function": {"name": "lookup", "arguments": "[1]"}}
NO_JSON = {**CALL, "function": {"name": "lookup", "arguments": "{oh"}}
NAMELESS = {**CALL, "function": {"name": None, "arguments": "{}"}}


@pytest.mark.parametrize(
    ("messages", "expected", "value"),
    [
        ((USER, turn("system"), ANSWER), "match_regex(roles)", "'user system assistant'"),
        ((USER, turn("assistant", "", CALL), ANSWER), "match_regex(roles)", "'user call assistant'"),
        ((USER, turn("assistant", "", CALL), ANSWER), "be_null(unanswered_calls)", "\"turn 2: call 'c1'\""),
        ((USER, RESULT, ANSWER), "be_null(uncalled_results)", "turn 2: tool_call_id 'c1'"),
        ((USER, USER), "match_regex(roles)", "'user user'"),
        ((), "match_regex(roles)", "''"),
        ((ANSWER,), "match_regex(question)", "''"),
        ((turn("user", " "), ANSWER), "match_regex(question)", "' '"),
        (
            (USER, turn("assistant", " \n")),
            "be_null(empty_answers)",
            "turn 2: an assistant turn without text or tool call",
        ),
        ((USER, turn("assistant", None)), "be_null(empty_answers)", "turn 2"),
        ((USER, turn("assistant", "", NO_OBJECT)), "be_null(unreadable_calls)", "turn 2: arguments of lookup: [1]"),
        ((USER, turn("assistant", "", NO_JSON)), "be_null(unreadable_calls)", "turn 2: arguments of lookup: {oh"),
        (
            (USER, turn("assistant", "", NAMELESS)),
            "be_null(unreadable_calls)",
            "turn 2: a call without a function name",
        ),
        ((USER, turn("narrator"), ANSWER), "be_null(unknown_roles)", "turn 2: 'narrator'"),
        ((turn("user", "x" * 4_000_000), ANSWER), "be_between(characters)", "4000007"),
    ],
)
def test_faulty_conversation_is_found_with_its_turn(
    validator: Validator, tmp_path: Path, messages: tuple[Row, ...], expected: str, value: str
) -> None:
    rows = [*good_conversations(3), conversation(*messages, number=7)]
    found = failed(validator.check(dataset(tmp_path / "c", "conversations", rows)))
    (examples,) = [examples for name, examples in found.items() if name.endswith(expected) and value in examples[0]]
    assert examples[0].startswith("train-00000.parquet row 4 (id row-7): ")


@pytest.mark.parametrize("tools", ["{oh", '{"name": "a"}', '[{"name": "a"}]', "[7]"])
def test_unreadable_tools_are_found(validator: Validator, tmp_path: Path, tools: str) -> None:
    found = failed(validator.check(dataset(tmp_path / "c", "conversations", [conversation(USER, ANSWER, tools=tools)])))
    assert list(found) == ["expect_column_values_to_be_null(unreadable_tools)"]


def test_rows_are_counted_over_batches_and_shards(
    validator: Validator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_BATCH_ROWS", 7)
    monkeypatch.setattr(datasets, "ROWS_PER_GROUP", 10)
    monkeypatch.setattr(datasets, "ROWS_PER_SHARD", 20)
    rows = [document(f"text {number}" if number % 15 else " " * (number + 1)) for number in range(50)]
    findings = validator.check(dataset(tmp_path / "d", "documents", rows), docs=tmp_path / "docs")
    checks = [check for check in findings.checks if check.expectation.endswith("to_match_regex")]
    assert [(check.shard, check.rows, check.failed) for check in checks] == [
        ("train-00000.parquet", 20, 2),
        ("train-00001.parquet", 20, 1),
        ("train-00002.parquet", 10, 1),
    ]
    assert [example.row for check in checks for example in check.examples] == [1, 16, 11, 6]
    page = (tmp_path / "docs/d/train-00000.html").read_text()
    assert "2 unexpected values found" in page
    assert "of 20 total rows" in page


def test_batches_are_bounded_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_BATCH_BYTES", 50_000)
    rows = [document(f"{number} " + "word " * 1000) for number in range(40)]
    shard = datasets.shards(dataset(tmp_path / "d", "documents", rows), "train")[0]
    frames = list(gate._frames(shard, "documents"))
    assert sum(len(frame) for _, frame in frames) == 40
    assert max(len(frame) for _, frame in frames) <= 20


@pytest.mark.parametrize(("share", "success"), [(0.0, False), (0.1, False), (0.2, True)])
def test_share_of_rows_may_fail(tmp_path: Path, share: float, success: bool) -> None:
    rows = [document(f"text {number}") for number in range(8)] + [document(" "), document("  ")]
    findings = Validator(EXPECTATIONS, share).check(dataset(tmp_path / "d", "documents", rows))
    assert findings.success is success


def test_what_checks_have_no_memory_for_goes_to_the_state_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/tmp may be memory too."""
    folders: list[Path] = []

    def connect(config: dict[str, Any], connect: Any = duckdb.connect) -> Any:
        folders.append(Path(config["temp_directory"]))
        assert folders[-1].is_dir()
        return connect(config=config)

    monkeypatch.setattr(duckdb, "connect", connect)
    folder = dataset(tmp_path / "d", "documents", [document("one")], [document("two")])
    cross_shard_checks(datasets.shards(folder, "train"), datasets.read_info(folder), tmp_path / "var")
    assert [spill.parent for spill in folders] == [tmp_path / "var/scratch"]
    assert not folders[0].exists()


def test_ids_used_twice_are_found_across_shards_and_splits(validator: Validator, tmp_path: Path) -> None:
    train = [document("one", id="a"), document("two", id="b")]
    findings = validator.check(dataset(tmp_path / "d", "documents", train, [document("three", id="a")]))
    assert failed(findings) == {
        "ids_are_unique(id)": ["test-00000.parquet row 1 (id a): 'a'", "train-00000.parquet row 1 (id a): 'a'"]
    }
    assert findings.failed[0].failed == 2


def test_held_out_document_in_training_is_found(validator: Validator, tmp_path: Path) -> None:
    train = [document("Some  text", id="a"), document("other", id="b")]
    found = failed(validator.check(dataset(tmp_path / "d", "documents", train, [document("some TEXT\n", id="c")])))
    assert found == {"held_out_rows_are_not_trained_on()": ["train-00000.parquet row 1 (id a): 'some text'"]}


def test_held_out_question_in_training_is_found(validator: Validator, tmp_path: Path) -> None:
    train = [conversation(turn("user", "Why?"), turn("assistant", "So."), number=1)]
    test = [conversation(turn("user", "Why?"), turn("assistant", "Because."), number=2)]
    found = failed(validator.check(dataset(tmp_path / "c", "conversations", train, test)))
    assert list(found) == ["held_out_rows_are_not_trained_on()"]


def test_rows_missing_from_the_files_are_found(validator: Validator, tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", "documents", [document("one")])
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**info, "rows": {"train": 2}}))
    (check,) = validator.check(folder).failed
    assert check.broken == "found {'train': 1}; dataset.json says {'train': 2}"


def test_dataset_without_training_rows_fails(validator: Validator, tmp_path: Path) -> None:
    (check,) = validator.check(dataset(tmp_path / "d", "documents", [])).failed
    assert check.broken == "no rows to train on"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"id": "a", "body": "x"}], "found id: string, body: string; expected id, text, source"),
        ([{"id": "a", "text": ["x"], "source": "s"}], "found id: string, text: list<"),
        (b"no parquet", "not a readable Parquet file: "),
    ],
)
def test_shard_of_another_shape_is_found(validator: Validator, tmp_path: Path, content: Any, message: str) -> None:
    folder = dataset(tmp_path / "d", "documents", [document("one")])
    shard = folder / "train-00000.parquet"
    if isinstance(content, bytes):
        shard.write_bytes(content)
    else:
        pq.write_table(pa.Table.from_pylist(content), shard)
    (check,) = validator.check(folder).failed
    assert check.broken is not None
    assert message in check.broken


def test_shard_written_by_pandas_is_judged_by_its_rows(validator: Validator, tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", "documents", [document("one"), document("two")])
    frame = pq.read_table(folder / "train-00000.parquet").to_pandas()
    frame.loc[1, "text"] = ""
    frame.to_parquet(folder / "train-00000.parquet")
    assert list(failed(validator.check(folder))) == ["expect_column_values_to_match_regex(text)"]


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (None, r"documents\.json: not found; every kind of dataset needs its suite"),
        ("{oh", r"documents\.json: not a Great Expectations suite: "),
        ("[]", r"documents\.json: not a Great Expectations suite: "),
        ('{"name": "x"}', r"documents\.json: not a Great Expectations suite: 'expectations'"),
        ('{"name": "x", "expectations": [{"type": "expect_nothing", "kwargs": {}}]}', "expect_nothing not found"),
        (
            '{"name": "x", "expectations": [{"type": "expect_column_values_to_be_null", "kwargs": {"column": "no"}}]}',
            "expect_column_values_to_be_null of no: cannot be run: ",
        ),
    ],
)
def test_suite_that_cannot_be_run_is_reported(
    tmp_path: Path, suite: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if suite:
        (tmp_path / "documents.json").write_text(suite)
    with pytest.raises(InputError, match=message):
        Validator(tmp_path).check(dataset(tmp_path / "d", "documents", [document("one")]))
    assert capsys.readouterr() == ("", "")


def test_suites_describe_every_expectation() -> None:
    for path in EXPECTATIONS.glob("*.json"):
        suite = json.loads(path.read_text())
        assert suite["name"] == path.stem
        assert all(expectation["description"] for expectation in suite["expectations"])


def test_values_are_shown_on_one_line() -> None:
    assert shown(None) == shown(float("nan")) == "null"
    assert shown("a\nb") == r"'a\nb'"
    assert shown("x" * 500).endswith("… (502 characters)")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StageRun]:
    """The stage in a project folder of its own."""
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(tmp_path / "home"))
    root = tmp_path / "project"
    shutil.copytree(EXPECTATIONS, root / "data/expectations")
    sections = ("pretrain.decoder", "pretrain.encoder", "pretrain.encoder_decoder", "classifier", "summarizer")
    named = {f"{section}.dataset": "a" for section in sections} | {"tune.dataset": ["b", "a"]}
    params = load_params(SOURCE / "params.yaml", {"scale": "smoke", **named})
    with EventLog(tmp_path / "home/event_log", "validate", "key") as event_log:
        yield StageRun("validate", params, Paths(root), tmp_path / "state", event_log)


def write_good(run: StageRun) -> None:
    dataset(run.paths.collected / "a", "documents", [document("one"), document("two")])
    dataset(run.paths.collected / "b", "conversations", good_conversations(6))


def test_stage_writes_result_page_and_metrics(run: StageRun, capsys: pytest.CaptureFixture[str]) -> None:
    write_good(run)
    validate(run)
    result = json.loads((run.paths.validation / "result.json").read_text())
    assert [(found["dataset"], found["success"]) for found in result] == [("a", True), ("b", True)]
    metrics = json.loads((run.paths.metrics / "validate.json").read_text())
    assert metrics["b"] == {"rows": 6, "checks": 14, "failed_checks": 0, "failed_rows": 0}
    page = (run.paths.validation / "docs/index.html").read_text()
    assert '<h1>Data validation: <span class="good">passed</span></h1>' in page
    assert sorted(path.name for path in (run.paths.home / "docs/validation").rglob("*.html")) == [
        "index.html",
        "train-00000.html",
        "train-00000.html",
    ]
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].startswith("validate  2/2  dataset b")
    assert said.err == ""


def test_each_section_has_the_digests_of_its_datasets_that_passed(run: StageRun) -> None:
    write_good(run)
    validate(run)
    passed = json.loads(run.paths.validated("tune").read_text())
    assert passed == {name: digest(run.paths.collected / name) for name in ("a", "b")}
    assert json.loads(run.paths.validated("pretrain.encoder").read_text()) == {"a": passed["a"]}
    tune, pretrain = (run.paths.validated(section).read_bytes() for section in ("tune", "pretrain.decoder"))
    dataset(run.paths.collected / "b", "conversations", good_conversations(7))
    validate(run)
    assert run.paths.validated("tune").read_bytes() != tune
    assert run.paths.validated("pretrain.decoder").read_bytes() == pretrain


def test_outs_are_the_same_for_the_same_data(run: StageRun) -> None:
    write_good(run)
    outs: list[dict[str, bytes]] = []
    for _ in range(2):
        validate(run)
        folders = (run.paths.validation, run.paths.metrics)
        outs.append(
            {str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
        )
        shutil.rmtree(run.paths.validation)
    assert outs[0] == outs[1]


def test_a_page_that_cannot_be_written_does_not_fail_the_stage(
    run: StageRun, capsys: pytest.CaptureFixture[str]
) -> None:
    for page in (run.paths.validation / "docs", run.paths.home / "docs"):
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("a file where the folder belongs")
    write_good(run)
    validate(run)
    said = capsys.readouterr().err
    assert said.count(f"{run.paths.validation / 'docs' / 'index.html'}: not written: ") == 1
    assert "Data Docs: not written: " in said
    assert (run.paths.validation / "result.json").is_file()
    assert (run.paths.metrics / "validate.json").is_file()


def test_stage_refuses_faulty_data_and_names_the_rows(run: StageRun) -> None:
    write_good(run)
    dataset(run.paths.collected / "c", "documents", [document("fine"), document("<b>\x00")])
    with pytest.raises(Refused) as raised:
        validate(run)
    lines = str(raised.value).splitlines()
    assert lines[0].startswith(
        "c: data validation failed: A text holds no NUL characters, the mark of binary data: "
        "1 of 2 rows failed (50.00%); first train-00000.parquet row 2 (id "
    )
    assert lines[-1] == "  all checks: data/validation/docs/index.html"
    page = (run.paths.validation / "docs/index.html").read_text()
    assert "&#39;&lt;b&gt;\\x00&#39;" in page
    assert [found["success"] for found in json.loads((run.paths.validation / "result.json").read_text())] == [
        True,
        True,
        False,
    ]
    assert not run.paths.validated("tune").exists()


def test_stage_without_datasets_says_what_to_run(run: StageRun) -> None:
    with pytest.raises(InputError, match='no dataset; run "loopwright run --until collect"'):
        validate(run)


def test_pages_load_nothing_from_the_network(run: StageRun) -> None:
    write_good(run)
    validate(run)
    pages = [*run.paths.validation.rglob("*.html"), *(run.paths.home / "docs").rglob("*.html")]
    assert len(pages) == 4
    for page in pages:
        html = page.read_text()
        assert "<style>" in html
        assert not [tag for tag in ("<script", "<link", "<img", "<iframe", "url('http", "@import") if tag in html]


def test_docs_of_an_earlier_shape_of_the_dataset_are_removed(validator: Validator, tmp_path: Path) -> None:
    stale = tmp_path / "docs/d/train-00009.html"
    stale.parent.mkdir(parents=True)
    stale.write_text("old")
    validator.check(dataset(tmp_path / "d", "documents", [document("one")]), docs=tmp_path / "docs")
    assert sorted(path.name for path in stale.parent.iterdir()) == ["train-00000.html"]
    assert "d/train-00000.html" in (tmp_path / "docs/index.html").read_text()


def labelled(*rows: tuple[str | None, str]) -> list[Row]:
    return [{"id": str(number), "text": text, "label": label} for number, (text, label) in enumerate(rows)]


@pytest.mark.parametrize(
    ("rows", "expectation", "said"),
    [
        (labelled(("a", "x"), ("b", "x")), "labels_can_be_told_apart(label)", "found one label, 'x'; add rows"),
        (
            labelled(*((f"t{n}", f"l{n // 2}") for n in range(2002))),
            "labels_can_be_told_apart(label)",
            "found 1,001 labels; join",
        ),
        (labelled(("a", "x"), ("b", "x"), ("c", "y")), "labels_have_rows(label)", "train-00000.parquet row 3"),
        (
            labelled(("a", "x"), (" ", "x"), ("c", "y"), ("d", "y")),
            "expect_column_values_to_match_regex(text)",
            "train-00000.parquet row 2",
        ),
    ],
)
def test_labelled_texts_that_teach_nothing_are_refused(
    tmp_path: Path, validator: Validator, rows: list[Row], expectation: str, said: str
) -> None:
    findings = validator.check(dataset(tmp_path / "bad", "labelled_texts", rows))
    assert list(failed(findings)) == [expectation]
    (check,) = findings.failed
    assert said in (check.broken or str(check.examples[0]))


def test_held_out_labels_must_be_learned(tmp_path: Path, validator: Validator) -> None:
    train, test = labelled(("a", "x"), ("b", "y")), [{"id": "9", "text": "c", "label": "z"}]
    findings = validator.check(dataset(tmp_path / "bad", "labelled_texts", train, test))
    assert list(failed(findings)) == ["held_out_labels_are_trained_on(label)"]


def test_pairs_need_both_sides(tmp_path: Path, validator: Validator) -> None:
    pairs = [{"id": "1", "source": "a", "target": "b"}, {"id": "2", "source": "c", "target": ""}]
    findings = validator.check(dataset(tmp_path / "pairs", "text_pairs", pairs))
    assert list(failed(findings)) == ["expect_column_values_to_match_regex(target)"]
