"""The real thing: one command from raw text to a registered model whose served Bento answers."""

from __future__ import annotations

import json
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from components.config.params import FAMILIES, Refused, load_params
from components.config.paths import Paths
from components.evaluation.compare_agents import AgentFolder, judge_folders
from components.tracking.mlflow_client import mlflow_name
from components.tracking.registry import Registry
from flows.orchestration.prefect_server import prefect_api
from flows.release import fetch_answers
from loopwright.cli import app
from tests.conftest import SOURCE, Project, Released

pytestmark = [
    pytest.mark.platform,
    pytest.mark.timeout(900),
]

STAGES = [
    "collect",
    "validate",
    *(f"{name}@{family}" for name in ("train_tokenizer", "prepare", "pretrain") for family in FAMILIES),
    "pretrain_vision",
    *(f"finetune@{model}" for model in ("classifier", "summarizer")),
    "connect",
    *(f"assess@{model}" for model in ("classifier", "summarizer")),
    "tune",
    "evaluate",
]


def rows(database: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(database)) as tables:
        return tables.execute(query).fetchall()


Command = Callable[..., Any]
MODELS = ["agent", *(stage.partition("@")[2] for stage in STAGES if stage.startswith("finetune@"))]
"""What a run releases, in order."""


@pytest.fixture
def here(released: Released, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The JSON document of a command run in this process, which spares each the import of MLflow."""
    monkeypatch.chdir(released.project.root)
    for name in ("LOOPWRIGHT_HOME", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)

    def ask(*words: str, refused: bool = False) -> Any:
        ended = CliRunner().invoke(app, [*words, "--json"])
        if refused:
            assert isinstance(ended.exception, Refused)
            return str(ended.exception)
        assert ended.exit_code == 0, ended.exception
        return json.loads(ended.stdout)

    return ask


def test_one_command_runs_every_stage_and_releases_a_champion(released: Released) -> None:
    report = released.report
    assert [(stage["name"], stage["outcome"]) for stage in report["stages"]] == [(name, "ran") for name in STAGES]
    told = [(one["version"], one["outcome"], one["bento"]) for one in report["releases"]]
    assert told == [(f"{name}/1", "promoted", f"{name}:v1") for name in MODELS]
    for one in report["releases"]:
        assert isinstance(one["answer"], str)
        assert one["scores"]
        assert set(one["baselines"]) == (set() if one["version"] == "agent/1" else set(one["scores"]))
    assert report["refusals"] == []
    assert "params.yaml: scale: laptop → smoke" in released.said
    assert "pretrain@decoder  30/30  loss" in released.said


def test_the_bento_carries_the_page(released: Released) -> None:
    carried = released.project.home / "bento/bentos/agent/v1/src/serving/page"
    assert {path.name for path in carried.iterdir()} == {path.name for path in (SOURCE / "serving/page").iterdir()}


def test_nobody_else_can_read_the_state_folder(released: Released) -> None:
    """Nor would they if the folder itself were open: by the mode of each file, or of a folder above it."""

    def is_open(path: Path) -> bool:
        return bool(path.stat().st_mode & (0o011 if path.is_dir() else 0o044))

    home = released.project.home
    files = [path for path in home.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 100
    for path in files:
        above = [folder for folder in path.parents if home in folder.parents]
        assert not all(map(is_open, [path, *above])), path
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_prefect_has_a_task_per_stage_and_effect_with_artifacts(released: Released) -> None:
    database = released.project.home / "prefect/prefect.db"
    states = dict(rows(database, "SELECT name, state_name FROM task_run"))
    stages = {name.split("-")[0]: state for name, state in states.items()}
    assert {name: stages[name] for name in STAGES} == dict.fromkeys(STAGES, "Ran")
    effects = ("register", "gate", "package", "smoke", "promote")
    assert {f"{effect} {name}" for effect in effects for name in MODELS} <= stages.keys()
    (flow,) = rows(database, "SELECT id, state_type FROM flow_run")
    assert flow[1] == "COMPLETED"
    assert released.report["flow_run"].replace("-", "") in flow[0].replace("-", "")
    kinds = {kind for (kind,) in rows(database, "SELECT DISTINCT type FROM artifact")}
    assert {"progress", "table"} <= kinds
    said = {message for (message,) in rows(database, "SELECT message FROM log")}
    assert any(message.startswith("pretrain@decoder  30/30  loss") for message in said)


def test_mlflow_has_a_child_run_per_stage_with_params_metrics_and_inputs(released: Released) -> None:
    database = released.project.home / "mlflow/mlflow.db"
    runs = dict(rows(database, "SELECT name, run_uuid FROM runs"))
    assert set(runs) >= {"pipeline", *(f"register {name}/1" for name in MODELS), *STAGES}
    parents = dict(rows(database, "SELECT run_uuid, value FROM tags WHERE key = 'mlflow.parentRunId'"))
    trials = {name for name in runs if name.startswith("trial-")}
    assert trials
    assert {parents[runs[name]] for name in trials} == {runs["finetune@classifier"]}
    assert {parents[runs[name]] for name in runs if name not in trials | {"pipeline"}} == {runs["pipeline"]}
    assert {status for (status,) in rows(database, "SELECT status FROM runs")} == {"FINISHED"}
    losses = f"SELECT COUNT(*) FROM metrics WHERE run_uuid = '{runs['pretrain@decoder']}' AND key LIKE '%loss%'"
    assert rows(database, losses)[0][0] > 1
    used = f"SELECT name FROM datasets JOIN inputs ON dataset_uuid = source_id WHERE destination_id = '{runs['tune']}'"
    assert {"data/tokens/decoder/tune", "data/models/base/decoder"} <= {name for (name,) in rows(database, used)}


def test_a_second_run_finds_everything_up_to_date(released: Released) -> None:
    report = released.project.ask("run")
    assert {stage["outcome"] for stage in report["stages"]} == {"up to date"}
    assert report["flow_run"] is None, "nothing to do starts no server and no flow run"
    assert {one["outcome"] for one in report["releases"]} == {"up to date"}
    assert [one["answer"] for one in report["releases"]] == [one["answer"] for one in released.report["releases"]]


def test_status_agrees_with_the_run(here: Command) -> None:
    status = here("status")
    assert (status["scale"], status["run"]) == ("smoke", None)
    assert [(stage["name"], stage["up_to_date"]) for stage in status["stages"]] == [(name, True) for name in STAGES]
    assert [champion["model"] for champion in status["champions"]] == [f"{name}/1" for name in MODELS]


@pytest.mark.parametrize("name", MODELS)
def test_each_version_has_a_card_that_fits_a_terminal(name: str, here: Command) -> None:
    shown = here("registry", "show", f"{name}@champion")
    for title in ("Held-out suites", "Promotion gate", "Known weaknesses", "Data", "Training", "Lineage"):
        assert f"## {title}\n" in shown["card"]
    readme = (Path(shown["folder"]) / "README.md").read_text()
    assert readme.endswith(shown["card"])
    assert shown["metrics"]["cpu_hours"] > 0
    commands = (["show", f"{name}@champion"], ["list"], ["history", name], ["compare", name, "1", "champion", "--all"])
    for command in commands:
        lines = CliRunner().invoke(app, ["registry", *command], env={"COLUMNS": "80"}).stdout.splitlines()
        assert lines
        assert [line for line in lines if len(line) > 80 and not line.startswith("Files: ")] == []


def test_the_version_carries_its_lineage(released: Released, here: Command) -> None:
    shown = here("registry", "show", "agent@champion")
    tags = shown["tags"]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=released.project.root, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert (tags["git_commit"], tags["git_dirty"]) == (commit, "true"), "--scale changed params.yaml"
    assert tags["prefect_flow_run"] == released.report["flow_run"]
    assert json.loads(tags["params"])["scale"] == "smoke"
    assert json.loads(tags["validation"])
    locked = yaml.safe_load((released.project.root / "dvc.lock").read_text())["stages"]
    stages = (
        "collect",
        "validate",
        "train_tokenizer@decoder",
        "prepare@decoder",
        "pretrain@decoder",
        "connect",
        "tune",
    )
    behind = {entry["path"]: entry["md5"] for name in stages for entry in locked[name]["deps"]}
    behind["data/models/agent"] = tags["model_digest"]
    del behind["data/collected"], behind["data/added"]  # of which the agent read these datasets
    for section in ("pretrain.decoder", "tune"):
        passed = json.loads(Paths(released.project.root).validated(section).read_text())
        behind |= {f"data/collected/{name}": digest for name, digest in passed.items()}
    assert {name: value for name, value in tags.items() if name.startswith("dvc.")} == {
        mlflow_name(f"dvc.{path}"): digest for path, digest in behind.items()
    }
    assert tags["model_digest"] == tags["dvc.data/models/agent"]
    evaluated = json.loads((released.project.root / "data/metrics/evaluate.json").read_text())
    assert tags["held_out_digest"] == evaluated["held_out_digest"]
    assert shown["metrics"]["score"] == pytest.approx(evaluated["score"])


def test_the_registered_model_predicts_outside_the_project(released: Released, tmp_path: Path) -> None:
    program = """
import json, mlflow, sys, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/agent@champion")
import components
asked = [{"role": "user", "content": "Hello"}]
answers = [
    model.predict(["Hello"]),
    model.predict(pd.DataFrame({"prompt": ["Hello", "What is 1+1?"]}))[:1],
    model.predict(pd.DataFrame({"messages": [asked]}), params={"max_new_tokens": 128}),
]
print(components.__path__[0])
for name in sys.argv[2:]:
    (said,) = mlflow.pyfunc.load_model(f"models:/{name}@champion").predict(["Return the sum."])
    assert isinstance(said, str), said
print(json.dumps(answers))
"""
    address = f"sqlite:///{released.project.home / 'mlflow/mlflow.db'}"
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, address, *MODELS[1:]],
        cwd=tmp_path,
        env=released.project.environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    code, answers = ended.stdout.splitlines()[-2:]
    assert code.endswith("/code/components"), "the code came with the model"
    first, second, third = json.loads(answers)
    assert first == second == third
    assert isinstance(first[0], str)


@pytest.fixture(scope="module")
def prefect(released: Released) -> Iterator[str]:
    """A server that outlives a run, as PREFECT_API_URL names one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        patch.setenv("PREFECT_HOME", str(released.project.home / "prefect"))
        with prefect_api(released.project.home) as api:
            yield api.wait()


def test_a_killed_run_leaves_no_orphan_and_keeps_its_checkpoint(released: Released, prefect: str) -> None:
    project = released.project
    given = (project.root / "params.yaml").read_text()
    long = ["--set", "pretrain.decoder.max_steps=100000", "--set", "pretrain.decoder.checkpoint_seconds=0.5"]
    with subprocess.Popen(
        project.command("run", "--until", "pretrain", *long),
        cwd=project.root,
        env={**project.environment, "PREFECT_API_URL": prefect},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("pretrain@decoder  ") and checkpoints(project):
                break
        family = psutil.Process(run.pid).children(recursive=True)
        run.kill()
    (project.root / "params.yaml").write_text(given)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert len(family) >= 2, "DVC and the stage"
    assert not alive
    assert checkpoints(project)


def checkpoints(project: Project) -> list[Path]:
    return list((project.home / "checkpoints/pretrain@decoder").glob("*/step-*"))


def test_the_run_after_a_killed_one_restores_what_was_made_before(released: Released, prefect: str) -> None:
    report = released.project.ask("run", PREFECT_API_URL=prefect)
    outcomes = {stage["name"]: stage["outcome"] for stage in report["stages"]}
    assert outcomes["pretrain@decoder"] in ("restored from cache", "up to date")
    assert outcomes["evaluate"] == "up to date"
    assert report["releases"][0]["version"] == "agent/1"


def test_a_failed_stage_stops_what_follows_with_its_own_message(released: Released, prefect: str) -> None:
    project = released.project
    given = (project.root / "params.yaml").read_text()
    ended = project.loopwright("run", "--set", "tune.dataset=missing", "--json", PREFECT_API_URL=prefect)
    (project.root / "params.yaml").write_text(given)
    assert ended.returncode == 1
    message = json.loads(ended.stdout)["error"]
    assert message.startswith("params.yaml: tune.dataset: 'missing' is not a dataset; known: ")
    assert ended.stderr.splitlines()[-1] == message
    assert "validate: " not in ended.stderr, "nothing after collect was started"
    states = rows(project.home / "prefect/prefect.db", "SELECT state_type FROM flow_run ORDER BY created")
    assert states[-1] == ("FAILED",)


def test_a_model_that_is_not_better_is_refused_and_people_may_overrule(
    released: Released, prefect: str, here: Command
) -> None:
    ended = released.project.loopwright("run", "--set", "tune.max_steps=2", "--json", PREFECT_API_URL=prefect)
    assert ended.returncode == 3
    reason = json.loads(ended.stdout)["error"]
    assert reason.startswith("agent/2: refused against agent/1: ")
    assert here("run", refused=True) == reason, "nothing changed, so nothing is measured again"
    listed = {row["model"]: row["aliases"] for row in here("registry", "list") if row["name"] == "agent"}
    assert listed == {"agent/2": ["challenger"], "agent/1": ["champion"]}
    compared = here("registry", "compare", "agent", "champion", "challenger")
    assert compared["same_held_out_sets"]
    assert "score" in {row["metric"] for row in compared["metrics"]}
    assert here("registry", "promote", "agent", "2") == {"champion": "agent/2", "previous": "agent/1"}
    assert here("registry", "rollback", "agent") == {"champion": "agent/1", "previous": "agent/2"}
    kept = here("run")["releases"][0]
    assert (kept["version"], kept["outcome"]) == ("agent/1", "agent/2 was rolled back, agent/1 stays")


def test_a_champions_answers_are_kept_for_its_challengers(
    released: Released, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = Paths(released.project.root)
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(paths.home))
    registry = Registry(paths.home)
    champion = registry.resolve("agent@champion")
    fetch_answers(registry, champion, tmp_path)
    params = load_params(paths.params)
    asked, again = AgentFolder(champion.folder), AgentFolder(champion.folder, tmp_path)
    judged = judge_folders(again, asked, paths.collected, None, params, "any_gain")
    assert not judged.decision.promote
    assert all(one.wins == one.losses == 0 for one in judged.decision.findings), "what was kept is what it answers"
    assert (tmp_path / "answers.parquet").is_file()


def test_doctor_finds_nothing_wrong(released: Released) -> None:
    checked = released.project.loopwright("doctor", "--json")
    checks = {row["check"]: row for row in json.loads(checked.stdout)["checks"]}
    for name in ("python", "git", "uv", "versions", "write access", "params.yaml", "dvc"):
        assert checks[name]["ok"], checks[name]
    assert all(row["remedy"] for row in checks.values() if not row["ok"])
