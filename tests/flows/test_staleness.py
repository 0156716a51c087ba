"""DVC, `status` and `run` name the same stages, and looking changes no file.

The declarations are those of this project, the stages stubs that take no time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from components.config.params import FAMILIES, SCALES_FILE, load_params
from components.config.versions import VERSIONS_FILE
from components.feedback.store import Store
from components.runtime.stage import IMPROVEMENT, PIPELINE, declared_libraries, digest, outs, read_stages
from components.tracking.registry import Registry
from flows.orchestration.dvc_repo import StageState, configure, stage_states
from loopwright.doctor import doctor
from loopwright.run import run
from loopwright.status import status

SOURCE = Path(__file__).parents[2]
SCALES = SCALES_FILE.relative_to(SOURCE).as_posix()
VERSIONS = VERSIONS_FILE.relative_to(SOURCE).as_posix()

STUB = """
import hashlib, json, pathlib, sys, yaml

def load(path):
    return yaml.load(open(path), yaml.CSafeLoader)

name, params, scales = sys.argv[1], load("params.yaml"), load("SCALES")
stage = json.load(open("stages.json"))[name]

def look_up(values, dotted):
    for part in dotted.replace("${scale}", params["scale"]).split("."):
        values = values[part]
    return values

def content(path):
    path = pathlib.Path(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(file.as_posix(), file.read_text()) for file in files if file.is_file() and file.suffix != ".pyc"]

def digest(*values):
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()

def write(path, text):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

def datasets(section):
    named = look_up(params, section)["dataset"]
    return [named] if isinstance(named, str) else named

values = [look_up(params, one) for one in stage["params"]] + [look_up(scales, one) for one in stage["scaled"]]
values += [load("VERSIONS")[library] for library in stage["libraries"]]
said = digest(values, [content(dep) for dep in stage["deps"]])
if name == "collect":
    said = digest(params["collect"])  # the agent's facts are of no dataset
    for one in {one for section in stage["sections"] for one in datasets(section)}:
        write(f"data/collected/{one}/train", digest(params["collect"], content(f"data/added/{one}")))
elif name == "validate":
    for section in stage["sections"]:
        passed = [content(f"data/collected/{one}") for one in datasets(section)]
        write(f"data/validation/datasets/{section}.json", digest(passed))
for path in stage["writes"]:
    write(path, json.dumps({"digest": said}))
with open("ran", "a") as ran:
    ran.write(f"{name}\\n")
"""
"""A stage that writes a digest of all that it declares; `collect` and `validate` part it by dataset, as the real do."""


@pytest.fixture(scope="module")
def cloned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the declarations of this one, in which nothing has run."""
    root = tmp_path_factory.mktemp("project")
    for name in ("params.yaml", PIPELINE, IMPROVEMENT, SCALES, VERSIONS, ".dvc/config", ".dvcignore", ".gitignore"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SOURCE / name, root / name)
    for section, names in load_params(root / "params.yaml").datasets.items():  # the stub knows no project
        setting(f"{section}.dataset", names)(root)
    stages = read_stages(root)
    made = [out for stage in stages.values() for out in outs(stage)]
    deps = [dep for stage in stages.values() for dep in stage["deps"]]
    for dep in deps:
        if not inside(dep, made) and not dep.startswith(("data/feedback", "data/models/")):
            file = root / dep if Path(dep).suffix else root / dep / "file"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("content")
    (root / "components/runtime").mkdir()
    for package in ("components", "components/runtime"):
        (root / package / "__init__.py").touch()
    (root / "components/runtime/stage.py").write_text(STUB.replace("SCALES", SCALES).replace("VERSIONS", VERSIONS))
    told = {name: described(stage, deps, root) for name, stage in stages.items()}
    (root / "stages.json").write_text(json.dumps(told))
    (root / "data/added/tickets").mkdir(parents=True)
    (root / "data/added/tickets/train").write_text("tickets")
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    return root


@pytest.fixture(scope="module")
def built(cloned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That project, built once by DVC alone."""
    root = copied(cloned, tmp_path_factory.mktemp("built"))
    assert reproduce(root) == list(read_stages(root, PIPELINE)), "in a fresh clone DVC builds all up to the last stage"
    return root


def inside(path: str, folders: Iterable[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def described(stage: Mapping[str, Any], deps: Iterable[str], root: Path) -> dict[str, Any]:
    """What the stub is to read and to write of a stage."""
    scaled = [dotted for entry in stage["params"] if isinstance(entry, dict) for dotted in entry.get(SCALES, ())]
    writes = []
    for out in set(outs(stage)) - {"data/collected"}:
        parts = {dep for dep in deps if dep != out and inside(dep, [out])}
        writes += [f"{out}/result.json"] if out == "data/validation" else sorted(parts) or [out]
    return {
        "deps": stage["deps"],
        "params": [entry for entry in stage["params"] if isinstance(entry, str)],
        "scaled": scaled,
        "libraries": sorted(declared_libraries(stage)),
        "sections": list(load_params(root / "params.yaml").datasets),
        "writes": writes,
    }


def reproduce(root: Path, *names: str) -> list[str]:
    """`dvc repro`, or `dvc repro --single-item` of each stage; returns the stages that ran."""
    from dvc.repo import Repo

    ran = root / "ran"
    ran.write_text("")
    with chdir(root), Repo() as repo:
        for name in names:
            repo.reproduce(name, single_item=True)
        if not names:
            repo.reproduce()
    return ran.read_text().split()


def dvc_status(root: Path) -> set[str]:
    from dvc.repo import Repo

    with chdir(root), Repo() as repo:
        return set(repo.status(PIPELINE))


def setting(dotted: str, value: Any, file: str = "params.yaml") -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        values = yaml.safe_load((root / file).read_text())
        *sections, key = dotted.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[key] = value
        (root / file).write_text(yaml.safe_dump(values))

    return edit


def appended(file: str) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        with (root / file).open("a") as opened:
            opened.write("# another line\n")

    return edit


def all_of(*edits: Callable[[Path], None]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        for each in edits:
            each(root)

    return edit


FINE_TUNED = {f"{stage}@{model}" for stage in ("finetune", "assess") for model in ("classifier", "summarizer")}
TRAINED = {"pretrain_vision", "connect", "tune", *(f"pretrain@{family}" for family in FAMILIES)}
EDITS: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "what no stage reads": (
        all_of(
            setting("judge.max_questions", 7),
            setting("gpu.pretrain.decoder.max_steps", 7, SCALES),
            appended("params.yaml"),
            appended("components/runtime/process.py"),
        ),
        set(),
    ),
    "decoder's vocabulary": (setting("train_tokenizer.decoder.vocab_size", 999), {"train_tokenizer@decoder"}),
    "encoder's rows": (setting("prepare.encoder.seq_len", 32), {"prepare@encoder"}),
    "encoder-decoder's shape": (setting("model.encoder_decoder.num_layers", 3), {"pretrain@encoder_decoder"}),
    "decoder's pretraining": (setting("pretrain.decoder.max_steps", 7), {"pretrain@decoder"}),
    "a fine-tuning": (setting("classifier.max_steps", 7), {"finetune@classifier"}),
    "one scale": (setting("laptop.pretrain.encoder.max_steps", 7, SCALES), {"pretrain@encoder"}),
    "all scales": (setting("all.tune.warmup_steps", 7, SCALES), {"tune"}),
    "a module": (appended("components/evaluation/evaluate.py"), {"evaluate"}),
    "the suites of data validation": (appended("data/expectations/file"), {"validate"}),
    "an added dataset": (appended("data/added/new/train"), {"collect"}),
    "another dataset": (
        setting("classifier.dataset", "tickets"),
        {
            "collect",
            "validate",
            "train_tokenizer@encoder",
            "prepare@encoder",
            "finetune@classifier",
            "assess@classifier",
        },
    ),
    "a library of some stages": (setting("scikit-learn", "99", VERSIONS), {*FINE_TUNED, "evaluate"}),
    "a library of most stages": (setting("torch", "99", VERSIONS), {*TRAINED, *FINE_TUNED, "evaluate"}),
    "a library of no stage": (appended("requirements.lock"), set()),
    "a base": (
        appended("data/imported/encoder_decoder/config.json"),
        {"prepare@encoder_decoder", "finetune@summarizer"},
    ),
}
"""An edit, and the stages of which it changes an input."""


def out_of_date(states: Iterable[StageState]) -> set[str]:
    return {state.name for state in states if state.reasons}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_makes_the_stages_stale_that_read_it(name: str, built: Path, tmp_path: Path) -> None:
    edit, expected = EDITS[name]
    project = copied(built, tmp_path)
    edit(project)
    assert out_of_date(stage_states(project)) == dvc_status(project) == expected


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            all_of(
                setting("summarizer.dataset", ["stdlib-summaries", "tickets"]),
                setting("classifier.max_steps", 7),
                appended("data/added/new/train"),
            ),
            {
                "collect",
                "validate",
                "finetune@classifier",
                "assess@classifier",
                *(f"{name}@encoder_decoder" for name in ("train_tokenizer", "prepare", "pretrain")),
                "finetune@summarizer",
                "assess@summarizer",
            },
        ),
        (setting("torch", "99", VERSIONS), {*TRAINED, *FINE_TUNED, "evaluate"}),
    ],
    ids=["datasets and parameters", "an upgrade of torch"],
)
def test_dvc_alone_and_a_run_execute_the_same_stages_of_those_that_status_names(
    edit: Callable[[Path], None], expected: set[str], built: Path, tmp_path: Path
) -> None:
    alone, run = copied(built, tmp_path / "alone"), copied(built, tmp_path / "run")
    for project in (alone, run):
        edit(project)
    before = (run / "dvc.lock").read_text()
    states = stage_states(run)
    assert (run / "dvc.lock").read_text() == before, "DVC writes it when a stage has run, and nobody else"
    assert out_of_date(states) == dvc_status(run)
    assert out_of_date(states) <= expected <= {state.name for state in states if state.is_due}
    # As the flow does it, without a process for each.
    assert sorted(reproduce(run, *(state.name for state in states if state.is_due))) == sorted(expected)
    assert sorted(reproduce(alone)) == sorted(expected)
    assert not dvc_status(run)
    assert not out_of_date(stage_states(alone))


def digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file and the target of every link, those of git, DVC and the state folder included."""
    return {
        path.relative_to(root).as_posix(): str(path.readlink())
        if path.is_symlink()
        else digest(path)
        if path.is_file()
        else "folder"
        for path in root.rglob("*")
        if "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("progress", ["nothing ran", "a part ran", "all ran"])
def test_status_and_doctor_change_no_file(
    progress: str,
    cloned: Path,
    built: Path,
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "project"
    shutil.copytree(cloned if progress == "nothing ran" else built, root, symlinks=True)
    if progress != "nothing ran":
        configure(root)
        dvc_status(root)
        setting("pretrain.decoder.max_steps", 7)(root)
    if progress == "a part ran":
        shutil.rmtree(root / "data/tokens")
        reproduce(root, "prepare@encoder")
    if progress == "all ran":  # with a state folder in use
        shutil.copytree(registry.home, root / "var", dirs_exist_ok=True)
        Registry(root / "var").names()
        store = Store.of(root / "var")
        store.add_request("1", "agent/1", {"messages": []})
        store.close()
    monkeypatch.delenv("LOOPWRIGHT_HOME", raising=False)
    monkeypatch.delenv("DVC_SITE_CACHE_DIR", raising=False)
    monkeypatch.chdir(root)
    before = digests(root)
    status(as_json=True)
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert digests(root) == before
    with suppress(typer.Exit):  # with problems of this machine, or none
        doctor(as_json=True)
    (dvc,) = [row for row in json.loads(capsys.readouterr().out)["checks"] if row["check"] == "dvc"]
    stale = [stage["name"] for stage in stages if not stage["up_to_date"]]
    assert dvc == {"check": "dvc", "ok": True, "found": f"pipeline readable, {len(stale)} stages to run", "remedy": ""}
    assert digests(root) == before
    run(dry_run=True, as_json=True)
    planned = json.loads(capsys.readouterr().out)["stages"]
    assert [(row["name"], row["reasons"], row["after"]) for row in planned] == [
        (stage["name"], stage["reasons"], stage["after"]) for stage in stages
    ]
    assert digests(root) == before
    assert "DVC_SITE_CACHE_DIR" not in os.environ
    assert {state.name for state in stage_states(root) if state.reasons} == set(stale)


def copied(project: Path, folder: Path) -> Path:
    shutil.copytree(project, folder, symlinks=True, dirs_exist_ok=True)
    configure(folder)
    return folder
