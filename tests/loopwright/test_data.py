"""`loopwright data`: what a person types, reads, and gets as an exit code."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from components.datasets.formats import DatasetWriter
from components.runtime.stage import digest
from examples.stdlib_agent import datasets
from loopwright.cli import main

SOURCE = Path(__file__).parents[2]
Outcome = tuple[int, str, str]
Loopwright = Callable[..., Outcome]
SmallFiles = Callable[[int], AbstractContextManager[None]]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with git, before its first run."""
    root = tmp_path / "project"
    (root / "data/added").mkdir(parents=True)
    (root / ".dvc").mkdir()
    for name in ("params.yaml", "dvc.yaml", ".dvc/config", ".dvc/.gitignore", ".dvcignore"):
        shutil.copy(SOURCE / name, root / name)
    shutil.copytree(SOURCE / "data/expectations", root / "data/expectations")
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    monkeypatch.chdir(root)
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(tmp_path / "home"))
    return root


@pytest.fixture
def loopwright(project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Loopwright:
    """Run a command of `loopwright data`; (exit code, stdout, stderr)."""

    def command(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["loopwright", "data", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), said.out, said.err

    return command


def written(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    return written(tmp_path / "notes.jsonl", {"text": "One."}, {"text": "Two."}, {"text": "One."})


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    call = json.dumps({"name": "lookup", "arguments": {"symbol": "x"}})
    turns = [("human", "What is x?"), ("function_call", call), ("observation", "A letter."), ("gpt", "A letter it is.")]
    return written(
        tmp_path / "chats.jsonl",
        {"conversations": [{"from": role, "value": value} for role, value in turns], "tools": "[]"},
    )


def test_added_dataset_is_listed_shown_validated_and_versioned(
    loopwright: Loopwright, project: Path, documents: Path
) -> None:
    code, out, err = loopwright("add", "documents", documents, "--name", "notes", "--licence", "CC-BY-4.0")
    assert code == 0
    assert out.splitlines() == [
        "notes: 2 train rows of kind documents (1 exact_duplicate dropped); valid",
        "train on it: loopwright run --set pretrain.decoder.dataset=notes",
    ]
    assert "version recorded in data/added/notes.dvc; git add data/added/notes.dvc data/added/.gitignore" in err
    assert "path: notes" in (project / "data/added/notes.dvc").read_text()
    assert (project / "data/added/.gitignore").read_text() == "/notes\n"

    code, out, _ = loopwright("list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "dataset",
        "stdlib-documents",
        "stdlib-conversations",
        "stdlib-areas",
        "stdlib-summaries",
        "notes",
    ]
    assert out.splitlines()[-1].split()[1:] == ["documents", "2", "train", "added", "passed"]
    assert 'not collected yet; run "loopwright run --until collect"' in out

    code, out, _ = loopwright("show", "notes", "--rows", "1")
    assert code == 0
    assert "rows         2 train" in out
    assert "dropped      1 exact_duplicate" in out
    assert "source       notes.jsonl  sha256 " in out
    assert "licence      CC-BY-4.0" in out
    assert "  text     One." in out
    assert "Two." not in out

    code, out, _ = loopwright("validate", "notes")
    assert code == 0
    assert out.splitlines()[1].split()[:4] == ["notes", "documents", "2", "train"]


def test_every_command_answers_with_one_json_document(loopwright: Loopwright, conversations: Path) -> None:
    code, out, _ = loopwright("add", "conversations", conversations, "--name", "chats", "--json")
    added = json.loads(out)
    assert (code, added["rows"], added["version"]) == (0, {"train": 1}, "data/added/chats.dvc")

    code, out, _ = loopwright("list", "--json")
    assert [one["name"] for one in json.loads(out)] == [*datasets, "chats"]

    code, out, _ = loopwright("show", "chats", "--json")
    shown = json.loads(out)
    assert shown["validation"] == "passed"
    assert [message["role"] for message in shown["first_rows"][0]["messages"]] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]

    code, out, _ = loopwright("validate", "--json")
    validated = json.loads(out)
    assert code == 0
    assert [(one["dataset"], one["success"]) for one in validated["datasets"]] == [("chats", True)]
    assert Path(validated["docs"]).is_file()


def test_conversation_is_shown_turn_by_turn(loopwright: Loopwright, conversations: Path) -> None:
    loopwright("add", "conversations", conversations, "--name", "chats")
    _, out, _ = loopwright("show", "chats")
    assert "  user       What is x?" in out
    assert '             calls lookup {"symbol": "x"}' in out
    assert "  tool       A letter." in out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_rows_are_shown_whatever_the_encoding_of_the_terminal(project: Path, tmp_path: Path, encoding: str) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9 \xc3\xbc.jsonl"
    written(Path(os.fsdecode(name)), {"text": "Grüße 😀 项目"})
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C"}

    def run(*words: str | bytes) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "loopwright", "data", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, encoding=encoding)

    added = run("add", "documents", name, "--name", "notes")
    assert (added.returncode, added.stderr.count("Traceback")) == (0, 0), added.stderr
    shown = run("show", "notes")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "caf" in shown.stdout
    assert ("Grüße 😀" if encoding == "utf-8" else "\\U0001f600") in shown.stdout
    document = json.loads(run("show", "notes", "--json").stdout)
    assert document["first_rows"][0]["text"] == "Grüße 😀 项目"


@pytest.mark.parametrize("file", ["dataset.json", "train-00000.parquet"])
def test_damaged_dataset_is_said_in_one_line(loopwright: Loopwright, project: Path, documents: Path, file: str) -> None:
    loopwright("add", "documents", documents, "--name", "notes")
    (project / "data/added/notes" / file).write_bytes(b"{}\xff" * 10)
    code, out, err = loopwright("show", "notes")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"{file}: damaged: " in err
    assert 'run "dvc checkout --force ' in err


def test_pictures_are_added_with_a_quarantine_shown_and_validated(loopwright: Loopwright, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8), (99 * number,) * 3).save(tmp_path / f"pictures/{number}.png")

    def row(picture: str, answer: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": "<image>\nHow dark?"}, {"from": "gpt", "value": answer}]
        return {"image": picture, "conversations": turns}

    rows = [row("0.png", "black"), row("1.png", ""), row("2.png", "white"), row("1.png", "grey")]
    left_out = tmp_path / "left_out.jsonl"
    options = ("--name", "mine", "--image-folder", tmp_path / "pictures")
    path = written(tmp_path / "llava.jsonl", *rows)
    code, _, err = loopwright("add", "images", path, *options)
    assert code == 1
    assert "llava.jsonl:3: 2.png: not found in " in err
    code, out, _ = loopwright("add", "images", path, *options, "--quarantine", left_out)
    assert code == 0
    assert out.splitlines() == [
        "mine: 2 train rows of kind images (2 quarantined dropped); valid",
        f"left out, with reasons: {left_out}",
        "train on it: loopwright run --set tune.dataset=mine",
    ]
    locations = [json.loads(line)["location"] for line in left_out.read_text().splitlines()]
    assert locations == ["llava.jsonl:3", "llava.jsonl:2"]
    code, out, _ = loopwright("show", "mine", "--rows", 1)
    assert code == 0
    assert "images   1 of " in out
    code, out, _ = loopwright("show", "mine", "--json")
    assert [set(image) for row in json.loads(out)["first_rows"] for image in row["images"]] == [{"bytes", "sha256"}] * 2
    assert loopwright("validate", "mine")[0] == 0


def test_role_is_named_by_an_option(loopwright: Loopwright, tmp_path: Path) -> None:
    turns = [{"from": "caller", "value": "x"}, {"from": "agent", "value": "y"}]
    path = written(tmp_path / "calls.jsonl", {"conversations": turns})
    code, _, err = loopwright("add", "conversations", path, "--name", "calls")
    assert code == 1
    assert "'caller' is not a role" in err
    assert "--role NAME=ROLE" in err
    named = ("--role", "caller=user", "--role", "agent=assistant")
    assert loopwright("add", "conversations", path, "--name", "calls", *named)[0] == 0
    assert "  assistant  y" in loopwright("show", "calls")[1]


def test_file_that_does_not_fit_ends_with_1_and_one_line(loopwright: Loopwright, project: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "x"}]})
    code, out, err = loopwright("add", "conversations", path, "--name", "mine")
    assert (code, out) == (1, "")
    assert err == "a.jsonl:1: no assistant turn among 1; there is nothing to learn from\n"
    assert list((project / "data/added").iterdir()) == []


def test_of_two_that_add_one_name_at_once_one_wins(project: Path, documents: Path) -> None:
    command = [sys.executable, "-m", "loopwright", "data", "add", "documents", str(documents), "--name", "notes"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    both = [
        subprocess.Popen(command, cwd=project, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    said = [process.communicate()[1].decode() for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], said
    (refused,) = (text for text, process in zip(said, both, strict=True) if process.returncode)
    reasons = r"(data-add-notes: already running as process \d+; wait|--name: 'notes' exists already;)"
    assert re.fullmatch(rf"{reasons}.*\n", refused)
    assert (project / "data/added/notes/dataset.json").is_file()


def test_faulty_rows_end_with_3_and_leave_nothing(loopwright: Loopwright, project: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"text": "fine"}, {"text": " "})
    code, out, err = loopwright("add", "documents", path, "--name", "mine")
    assert (code, out) == (3, "")
    assert (
        "mine: data validation failed: A text is more than white space: 1 of 2 rows failed (50.00%); first a.jsonl:2"
        in err
    )
    assert list((project / "data/added").iterdir()) == []
    code, out, _ = loopwright("add", "documents", path, "--name", "mine", "--json")
    assert code == 3
    assert json.loads(out)["exit_code"] == 3


def test_share_of_faulty_rows_can_be_allowed_in_params(loopwright: Loopwright, project: Path, tmp_path: Path) -> None:
    params = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(params.replace("validate: {}", "validate: {max_failed_share: 0.2}"))
    path = written(tmp_path / "a.jsonl", *({"text": f"fine {number}"} for number in range(9)), {"text": " "})
    assert loopwright("add", "documents", path, "--name", "mine")[0] == 0


def test_replace_makes_a_new_version(loopwright: Loopwright, project: Path, documents: Path, tmp_path: Path) -> None:
    loopwright("add", "documents", documents, "--name", "notes")
    first = (project / "data/added/notes.dvc").read_text()
    code, _, err = loopwright("add", "documents", documents, "--name", "notes")
    assert code == 1
    assert err == "--name: 'notes' exists already; choose another name, or put it in its place with --replace\n"
    other = written(tmp_path / "other.jsonl", {"text": "Three."})
    assert loopwright("add", "documents", other, "--name", "notes", "--replace")[0] == 0
    assert (project / "data/added/notes.dvc").read_text() != first
    assert "Three." in loopwright("show", "notes")[1]


@pytest.mark.parametrize("link", ["data", "data/added"])
def test_behind_a_link_nothing_is_read_and_what_helps_is_said(
    loopwright: Loopwright, project: Path, tmp_path: Path, link: str
) -> None:
    disk = shutil.move(project / link, tmp_path / "disk")
    (project / link).symlink_to(disk)
    code, _, err = loopwright("add", "documents", tmp_path / "missing.jsonl", "--name", "notes")
    assert code == 1
    assert err.startswith(f"{link}: is a link to {disk}, and DVC versions nothing behind a link; move it back here")
    assert (f'"dvc cache dir --local {disk}/dvc-cache"' in err, err.count("\n")) == (True, 1)


def test_what_cannot_be_versioned_is_not_added(
    loopwright: Loopwright, project: Path, documents: Path, tmp_path: Path
) -> None:
    loopwright("add", "documents", documents, "--name", "notes")
    before = digest(project / "data/added")
    (project / ".gitignore").write_text("*.dvc\n")
    other = written(tmp_path / "other.jsonl", {"text": "Three."})
    for name in ("notes", "others"):
        code, _, err = loopwright("add", "documents", other, "--name", name, "--replace")
        assert code == 1
        assert f"data/added/{name}: DVC: bad DVC file name" in err
        assert "is git-ignored" in err
    assert digest(project / "data/added") == before, "neither in part nor in the place of what was there"
    (project / ".dvc/config.local").write_text("[core\n")
    code, _, err = loopwright("add", "documents", other, "--name", "others")
    assert code == 1
    assert err.startswith(".dvc/config.local: ")


def test_on_a_full_disk_nothing_is_added(
    loopwright: Loopwright, project: Path, tmp_path: Path, small_files: SmallFiles
) -> None:
    """By a limit on the size of files: the disk's own answer, without a disk of one's own."""
    texts = ({"text": secrets.token_hex(1000)} for _ in range(800))
    big = written(tmp_path / "big.jsonl", *texts)
    before = digest(project / "data")
    with small_files(500_000):
        code, _, err = loopwright("add", "documents", big, "--name", "big")
    assert (code, err) == (
        1,
        f"{project}/data/added: cannot be written: File too large; raise the limit on the size of files (ulimit -f)\n",
    )
    assert digest(project / "data") == before


def test_without_git_the_dataset_is_versioned_and_its_person_told(
    loopwright: Loopwright, project: Path, documents: Path
) -> None:
    shutil.rmtree(project / ".git")
    code, _, err = loopwright("add", "documents", documents, "--name", "notes")
    assert code == 0
    assert "version recorded in data/added/notes.dvc; no git here, so back data/added/notes.dvc up yourself" in err
    assert (project / "data/added/notes.dvc").is_file()


def test_changed_dataset_is_found_out(loopwright: Loopwright, project: Path, documents: Path) -> None:
    loopwright("add", "documents", documents, "--name", "notes")
    with DatasetWriter(project / "data/added/notes", "notes", "documents") as writer:
        writer.write("train", {"id": "a", "text": "", "source": "x"})
    assert json.loads(loopwright("show", "notes", "--json")[1])["validation"] == "changed since it was validated"
    code, out, err = loopwright("validate", "notes", "--json")
    assert code == 3
    answer = json.loads(out)
    assert answer["exit_code"] == 3
    assert "first train-00000.parquet row 1 (id a): ''" in answer["error"]
    assert answer["error"] in err
    assert json.loads(loopwright("show", "notes", "--json")[1])["validation"] == "failed (1 checks)"


def test_datasets_that_are_not_here_are_told_apart(loopwright: Loopwright, project: Path) -> None:
    (project / "data/added/pulled.dvc").write_text("outs:\n- path: pulled\n")
    assert (
        loopwright("show", "pulled")[2]
        == 'pulled: its data is not in this checkout; run "dvc pull data/added/pulled.dvc"\n'
    )
    assert loopwright("show", "stdlib-documents")[2] == (
        'stdlib-documents: not collected yet; run "loopwright run --until collect"\n'
    )
    code, _, err = loopwright("show", "nope")
    assert code == 1
    assert err == f"nope: no such dataset; known: {', '.join(datasets)}, pulled\n"


def test_validate_without_any_dataset_says_what_to_run(loopwright: Loopwright) -> None:
    code, _, err = loopwright("validate")
    assert code == 1
    assert err == 'data: no dataset yet; run "loopwright run --until collect" or "loopwright data add"\n'


def test_collected_split_of_an_added_dataset_is_shown(loopwright: Loopwright, project: Path, documents: Path) -> None:
    loopwright("add", "documents", documents, "--name", "notes")
    with DatasetWriter(project / "data/collected/notes", "notes", "documents") as writer:
        writer.write("train", {"id": "a", "text": "One.", "source": "x"})
        writer.write("test", {"id": "b", "text": "Two.", "source": "x"})
    assert "collected    1 test, 1 train" in loopwright("show", "notes")[1]


def test_missing_name_is_a_usage_error(loopwright: Loopwright, documents: Path) -> None:
    code, _, err = loopwright("add", "documents", documents)
    assert code == 2
    assert "Missing option '--name'" in err
