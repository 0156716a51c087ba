"""What DVC holds for changed and a stage does not read: datasets that others learn from.

DVC watches the folder of all datasets. Here dvc.lock learns of a change that is nothing to a stage, which is then up
to date for DVC too.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from components.config.params import load_params
from components.config.paths import Paths
from components.runtime.stage import read_stages, stage_inputs

COLLECTED, VALIDATION = "data/collected", "data/validation"
"""A folder for each dataset; and what says that all of them passed, which no stage reads."""


def pass_over_datasets(name: str, root: Path) -> None:
    """Let dvc.lock know the collected datasets as they are, where those that the stage names are what they were.

    To be called when the stages that it needs have run. A stage that names none reads all of them, as the gate on data
    does; it is left to DVC, and so is one that ran never, or whose earlier datasets are no longer in DVC's cache.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    declared = read_stages(root)[name]
    if COLLECTED not in declared.get("deps", ()):
        return
    values = stage_inputs(name, Paths(root), load_params(Paths(root).params)).values
    named = [value for dotted, value in values.items() if dotted.endswith(".dataset")]
    datasets = {one for value in named for one in ([value] if isinstance(value, str) else value)}
    if not datasets:
        return
    with suppress(DvcException), Repo(str(root)) as repo:  # DVC itself says then what is wrong
        _tell_datasets(repo, repo.stage.load_one(str(root / "dvc.yaml"), name), datasets)


def _tell_datasets(repo: Any, stage: Any, datasets: Iterable[str]) -> None:
    deps = {dep.def_path: dep for dep in stage.deps if dep.def_path in (COLLECTED, VALIDATION)}
    if not all(dep.hash_info and dep.exists for dep in deps.values()) or not deps[COLLECTED].changed_checksum():
        return
    if not _holds_the_same(deps[COLLECTED], datasets):
        return
    for dep in deps.values():
        dep.save()
    with repo.lock:
        stage.dump(update_pipeline=False)


def _holds_the_same(dep: Any, datasets: Iterable[str]) -> bool:
    """Whether the folders of these datasets are now what dvc.lock has of them."""
    from dvc_data.hashfile import load
    from dvc_data.hashfile.db import HashFileDB
    from dvc_data.hashfile.tree import Tree

    cache: HashFileDB = dep.cache
    try:
        trees = [load(cache, info) for info in (dep.hash_info, dep.get_hash())]
    except FileNotFoundError:
        return False
    before, now = ({key: info for key, _, info in tree} for tree in trees if isinstance(tree, Tree))
    return all(
        {key: info for key, info in before.items() if key[0] == one}
        == {key: info for key, info in now.items() if key[0] == one}
        for one in datasets
    )
