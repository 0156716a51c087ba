"""DVC's cache and remote on a real pipeline of one stage: what is pushed, and what pruning leaves to restore."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.config.errors import InputError
from components.config.paths import Paths
from flows.orchestration.dvc_remote import push_data
from flows.orchestration.dvc_repo import fetch_missing, open_repo, prune_cache

STAGE = {
    "cmd": "echo ran >> runs.txt && mkdir -p data && cp in.txt data/out.txt && wc -c in.txt > metrics.txt",
    "deps": ["in.txt"],
    "outs": ["data"],
    "metrics": [{"metrics.txt": {"cache": False}}],
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(tmp_path / "home"))
    root = tmp_path / "project"
    root.mkdir()
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"copy": STAGE}}))
    (root / "in.txt").write_text("text")
    reproduce(root)
    return root


def reproduce(root: Path) -> int:
    """Bring the stage up to date; the number of times it has run."""
    with open_repo(root) as repo, pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        repo.reproduce()
    return (root / "runs.txt").read_text().count("ran")


def name_remote(root: Path, **settings: Any) -> None:
    section = "".join(f"    {key} = {value}\n" for key, value in settings.items())
    (root / ".dvc/config").write_text(f"[core]\n    remote = storage\n['remote \"storage\"']\n{section}")


def test_versions_go_to_the_named_remote_and_not_twice_to_the_same_disk(root: Path, tmp_path: Path) -> None:
    assert push_data(root) is None
    assert not Paths(root).home.joinpath("dvc-remote").exists()
    name_remote(root, url=tmp_path / "remote")
    assert push_data(root) == 4, "a folder, its file, the metrics, and the entry of the run cache"
    assert push_data(root) == 0
    locked = yaml.safe_load((root / "dvc.lock").read_text())["stages"]["copy"]["outs"]
    (md5,) = (out["md5"] for out in locked if out["path"] == "data")
    assert (tmp_path / "remote/files/md5" / md5[:2] / md5[2:]).is_file()


def test_a_later_pipelines_data_comes_from_the_remote(root: Path, tmp_path: Path) -> None:
    """Also what its stages read behind a dependency of another name."""
    name_remote(root, url=tmp_path / "remote")
    push_data(root)
    for folder in ("data", ".dvc/cache"):
        shutil.rmtree(root / folder)
    (root / "later").mkdir()
    (root / "later/dvc.yaml").write_text(yaml.safe_dump({"stages": {"read": {"cmd": "true", "deps": ["in.txt"]}}}))
    fetch_missing(root, "later/dvc.yaml", root / "data")
    assert (root / "data/out.txt").read_text() == "text"


def test_a_remote_that_takes_nothing_is_reported(root: Path, tmp_path: Path) -> None:
    (tmp_path / "remote").write_text("no folder")
    name_remote(root, url=tmp_path / "remote")
    with pytest.raises((InputError, OSError)):
        push_data(root)


def test_a_result_comes_back_from_the_cache_after_pruning(root: Path) -> None:
    """Its metrics too, which are in git, and which DVC wants of the cache before it restores the rest."""
    assert prune_cache(root, [], 0.0, dry_run=False) == []
    (root / "data/out.txt").unlink()
    (root / "metrics.txt").unlink()
    assert reproduce(root) == 1
    assert (root / "metrics.txt").is_file()


def test_a_clone_without_cache_and_remote_computes_what_dvc_lock_names(root: Path) -> None:
    locked = (root / "dvc.lock").read_text()
    shutil.rmtree(root / ".dvc/cache")
    shutil.rmtree(root / "data")
    assert reproduce(root) == 2
    assert (root / "dvc.lock").read_text() == locked
    assert reproduce(root) == 2
