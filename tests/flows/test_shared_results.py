"""Results of stages between two clones with one DVC remote: what one host has finished the other does not repeat."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.config.paths import Paths
from flows import pipeline
from flows.orchestration import dvc_remote
from flows.orchestration.dvc_remote import RemoteResults, push_data, results_in_remote
from flows.orchestration.dvc_repo import stage_states
from flows.pipeline import RunOptions, run_pipeline
from loopwright.run import run

STAGES = {
    "train": {
        "cmd": "mkdir -p model && cp in.txt model/weights && echo 1 > model/config && wc -c in.txt > metrics.txt"
        " && echo train >> runs.txt",
        "deps": ["in.txt"],
        "outs": ["model"],
        "metrics": [{"metrics.txt": {"cache": False}}],
    },
    "evaluate": {
        "cmd": "cp model/weights report.txt && echo evaluate >> runs.txt",
        "deps": ["model"],
        "outs": ["report.txt"],
    },
}
REMOTE = "[core]\n    remote = shared\n['remote \"shared\"']\n    url = {}\n"
WEIGHTS = b"weights"


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    return tmp_path / "remote"


@pytest.fixture
def hosts(tmp_path: Path, remote: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two clones of a project that has never run; nothing of Prefect."""
    monkeypatch.delenv("LOOPWRIGHT_HOME", raising=False)
    monkeypatch.delenv("LOOPWRIGHT_DATABASE_URL", raising=False)
    monkeypatch.setattr(dvc_remote, "effect", lambda function, *values, **_: function(*values))
    monkeypatch.setattr(pipeline, "_StageOutput", lambda name, echo: echo)
    monkeypatch.setattr(pipeline, "fetch_base_models", lambda *_: None)
    host_a, host_b = tmp_path / "a", tmp_path / "b"
    (host_a / ".dvc").mkdir(parents=True)
    (host_a / ".dvc/config").write_text(REMOTE.format(remote))
    (host_a / ".gitignore").write_text("/var\n/runs.txt\n")
    (host_a / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    (host_a / "params.yaml").write_text("scale: smoke\n")
    (host_a / "in.txt").write_bytes(WEIGHTS)
    git(host_a, "init", "--quiet")
    commit(host_a)
    git(host_a, "clone", "--quiet", str(host_a), str(host_b))
    return host_a, host_b


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a", *words], cwd=root, check=True)


def commit(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "State")


def update(root: Path, *names: str, force: bool = False) -> tuple[list[str], list[str]]:
    """Bring stages up to date as a run does; returns their outcomes and what the run said."""
    lines: list[str] = []
    options = RunOptions(root, force=force, echo=lines.append)
    results = RemoteResults(root, lines.append)
    return [pipeline._update(name, options, results).outcome for name in names or STAGES], lines


def executed(root: Path) -> list[str]:
    path = root / "runs.txt"
    return path.read_text().split() if path.exists() else []


def stored(remote: Path, content: bytes) -> Path:
    md5 = hashlib.md5(content).hexdigest()
    return remote / "files/md5" / md5[:2] / md5[2:]


def test_what_one_host_has_trained_the_other_fetches(hosts: tuple[Path, Path], remote: Path) -> None:
    host_a, host_b = hosts
    assert update(host_a)[0] == ["ran", "ran"]
    (host_b / "model").mkdir()
    (host_b / "model/weights").write_text("half of a training that was killed")
    assert update(host_b)[0] == ["restored from remote", "restored from remote"]
    assert executed(host_b) == []
    for path in ("model/weights", "model/config", "metrics.txt", "report.txt", "dvc.lock"):
        assert (host_b / path).read_bytes() == (host_a / path).read_bytes()
    assert not any(state.is_due for state in stage_states(host_b))
    assert update(host_b)[0] == ["up to date", "up to date"]
    assert update(host_b, force=True)[0] == ["ran", "ran"]


def test_other_inputs_are_trained_on(hosts: tuple[Path, Path]) -> None:
    host_a, host_b = hosts
    update(host_a)
    (host_b / "in.txt").write_text("others")
    assert update(host_b)[0] == ["ran", "ran"]


def test_what_dvc_lock_names_is_fetched_without_a_run_cache(hosts: tuple[Path, Path], remote: Path) -> None:
    """As of a remote to which a plain `dvc push` has sent files."""
    host_a, host_b = hosts
    update(host_a)
    commit(host_a)
    git(host_b, "pull", "--quiet")
    (remote / "runs").rename(remote / "no-runs")
    assert update(host_b)[0] == ["restored from remote", "restored from remote"]
    assert executed(host_b) == []


def _remove_weights(remote: Path) -> None:
    stored(remote, WEIGHTS).unlink()


def _remove_file_list(remote: Path) -> None:
    (listing,) = remote.rglob("*.dir")
    listing.unlink()


def _remove_metrics(remote: Path) -> None:
    stored(remote, b"7 in.txt\n").unlink()


@pytest.mark.parametrize("is_locked", [False, True])
@pytest.mark.parametrize("lose", [_remove_weights, _remove_file_list, _remove_metrics])
def test_a_result_of_which_files_are_missing_is_made_again(
    hosts: tuple[Path, Path], remote: Path, lose: Callable[[Path], None], is_locked: bool
) -> None:
    host_a, host_b = hosts
    update(host_a, "train")
    if is_locked:
        commit(host_a)
        git(host_b, "pull", "--quiet")
    lose(remote)
    outcomes, lines = update(host_b, "train")
    if is_locked and lose is _remove_metrics:  # they are in git
        assert outcomes == ["restored from remote"]
        return
    assert (outcomes, executed(host_b)) == (["ran"], ["train"])
    assert "train: DVC's remote has a result of the same inputs, but lacks files of it" in lines
    if lose is _remove_weights:  # DVC pushes a folder's list last, and takes its files for pushed where the list is
        return
    for path in (host_a / ".dvc/cache", host_a / "model"):
        subprocess.run(["rm", "-r", str(path)], check=True)
    (host_a / "metrics.txt").unlink()
    assert update(host_a, "train")[0] == ["restored from remote"], "what was missing is pushed"


def test_a_result_for_which_the_remote_was_away_is_pushed_by_the_next_run(
    hosts: tuple[Path, Path], remote: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host_a, host_b = hosts
    remote.write_text("no folder")
    assert update(host_a)[0] == ["ran", "ran"]
    assert "dvc push train: not written: " in capsys.readouterr().err
    lines: list[str] = []
    options = RunOptions(host_a, until="evaluate", echo=lines.append)
    run_pipeline(options)
    assert "dvc push: not written: " in capsys.readouterr().err
    remote.unlink()
    run_pipeline(options)
    assert [line for line in lines if line.startswith("dvc push")] == ["dvc push: 6 objects"]
    run_pipeline(options)
    assert len([line for line in lines if line.startswith("dvc push")]) == 1, "nothing waits any more"
    assert update(host_b)[0] == ["restored from remote", "restored from remote"]


def test_a_remote_that_does_not_answer_ends_no_run(hosts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, host_b = hosts

    def fail(*_: Any) -> None:
        raise ConnectionError("no route to the store")

    monkeypatch.setattr(dvc_remote, "_run_caches", fail)
    outcomes, lines = update(host_b, "train")
    assert outcomes == ["ran"]
    assert "train: not looked for in DVC's remote: no route to the store; this run looks there no more" in lines
    assert results_in_remote(host_b, ["evaluate"]) == []


def test_a_dry_run_names_the_results_that_the_remote_has(
    hosts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host_a, host_b = hosts
    update(host_a)
    monkeypatch.chdir(host_b)
    capsys.readouterr()
    before = sorted(host_b.rglob("*"))
    run(dry_run=True)
    assert "result in DVC's remote: " in capsys.readouterr().out
    run(dry_run=True, as_json=True)
    train, evaluate = json.loads(capsys.readouterr().out)["stages"]
    assert (train["in_remote"], train["runs"]) == (True, "no")
    assert (evaluate["in_remote"], evaluate["runs"]) == (False, "yes"), "its inputs are not here"
    assert sorted(host_b.rglob("*")) == before


def test_without_a_remote_nothing_is_looked_for_or_kept(hosts: tuple[Path, Path]) -> None:
    host_a, _ = hosts
    (host_a / ".dvc/config").unlink()
    assert dvc_remote.remote_name(host_a) is None
    assert push_data(host_a, "train") is None
    assert results_in_remote(host_a, list(STAGES)) == []
    assert not (Paths(host_a).home / "stages").exists()
