"""What a stage says reaches MLflow, and the registry keeps its versions: on a real SQLite database."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from components.config.params import InputError
from components.runtime.process import host_id
from components.tracking import mlflow_client as tracking
from components.tracking.event_log import PARENT_RUN, EventLog
from components.tracking.mlflow_client import UPLOADER, Uploader, connect, create_run, end_killed_runs, open_tracker
from components.tracking.mlflow_database import DATABASE
from components.tracking.registry import ModelVersion, Registry, is_empty, resolve

SOURCE = Path(__file__).parents[2]
Register = Callable[..., ModelVersion]


def run_named(name: str, home: Path) -> Any:
    client = connect(home)
    experiment = client.get_experiment_by_name("loopwright").experiment_id
    (run,) = client.search_runs([experiment], f"attributes.run_name = '{name}'")
    return run


def artifacts(run: Any, home: Path) -> list[str]:
    return [file.path for file in connect(home).list_artifacts(run.info.run_id)]


def deliver(home: Path) -> None:
    uploader = Uploader(home)
    uploader.start()
    uploader.finish()
    assert not uploader.is_alive()


def test_everything_a_stage_says_is_in_mlflow(home: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<p>")
    with open_tracker("tune", "key1", home) as tracker:
        tracker.params({"tune.max_steps": 30, "tune.dataset": ["a", "b"]})
        for step in range(2500):
            tracker.metrics({"loss": 3.0 - step / 1000}, step)
        tracker.dataset("stdlib-conversations", "d1", "data/collected/stdlib-conversations", "training")
        tracker.table("answers.json", {"question": ["q1", "q2"], "correct": [True, False]})
        tracker.artifact(tmp_path / "page.html")
        tracker.figure(Figure(), "loss.png")
    run = run_named("tune", home)
    client = connect(home)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["stage"], run.data.tags["key"]) == ("tune", "key1")
    assert run.data.params == {"tune.max_steps": "30", "tune.dataset": "['a', 'b']"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in history] == list(range(2500))
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("stdlib-conversations", "d1")
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "training")]
    assert sorted(artifacts(run, home)) == ["answers.json", "loss.png", "page.html"]
    # This tag is what makes the table one that the MLflow page shows.
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "answers.json", "type": "table"}]
    table = json.loads((Path(client.download_artifacts(run.info.run_id, "answers.json"))).read_text())
    assert (table["columns"], table["data"]) == (["question", "correct"], [["q1", True], ["q2", False]])
    assert not list((home / "tracking").glob("*/lines.jsonl")), "what was delivered is removed"


def test_a_picture_that_cannot_be_drawn_is_a_warning_that_names_it(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = Figure()
    figure.add_subplot().set_title("$x^{2$")
    with open_tracker("assess", "key", home) as tracker:
        tracker.figure(figure, "price.png")
        tracker.artifact(home / "absent.html")
        tracker.metrics({"score": 0.5})
    said = capsys.readouterr().err
    assert "price.png: not written: " in said
    assert "absent.html: not written: " in said
    run = run_named("assess", home)
    assert (run.info.status, run.data.metrics, artifacts(run, home)) == ("FINISHED", {"score": 0.5}, [])
    assert not list((home / "tracking").glob("*/lines.jsonl")), "nothing is held up by what is missing"


def test_a_stage_is_a_child_of_the_run_it_belongs_to(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = create_run(connect(home), "pipeline", {}, None, 0)
    monkeypatch.setenv(PARENT_RUN, parent)
    with open_tracker("collect", "key", home):
        pass
    assert run_named("collect", home).data.tags["mlflow.parentRunId"] == parent


def test_trials_of_a_stage_are_runs_within_its_run(home: Path) -> None:
    with EventLog(home / "tracking", "finetune", "key") as event_log:
        for number in range(2):
            with event_log.child(f"trial-{number}") as trial:
                trial.params({"learning_rate": 0.1 * number})
                trial.metrics({"macro_f1": 0.5}, 1)
                if number:
                    deliver(home)
                    assert run_named("trial-1", home).info.status == "RUNNING"
                trial.metrics({"macro_f1": 0.6 + number / 10}, 2)
        event_log.metrics({"macro_f1": 0.9})
    deliver(home)
    parent = run_named("finetune", home)
    assert parent.data.metrics == {"macro_f1": 0.9}
    for number in range(2):
        trial_run = run_named(f"trial-{number}", home)
        assert trial_run.info.status == "FINISHED"
        assert trial_run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        history = connect(home).get_metric_history(trial_run.info.run_id, "macro_f1")
        assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.6 + number / 10)]


def test_a_stage_that_ends_while_its_lines_are_on_their_way_was_not_killed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine MLflow takes seconds for the first lines, and a short stage is over by then."""
    event_log = EventLog(home / "tracking", "collect", "key")
    send = tracking._send

    def slow(*given: Any) -> None:
        monkeypatch.setattr(tracking, "_send", send)
        event_log.metrics({"rows": 3.0})
        event_log.__exit__(None)
        monkeypatch.setattr(tracking, "alive", lambda pid: False)
        send(*given)

    monkeypatch.setattr(tracking, "_send", slow)
    deliver(home)
    run = run_named("collect", home)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"rows": 3.0})
    assert not list((home / "tracking").glob("*/lines.jsonl"))


def test_a_trial_of_a_killed_stage_is_closed_with_it(home: Path) -> None:
    said = "event_log.child('trial').metrics({'loss': 1.5}); os.kill(os.getpid(), 9)"
    made = "import os, pathlib, sys; from components.tracking.event_log import EventLog"
    program = f"{made}; event_log = EventLog(pathlib.Path(sys.argv[1]), 'finetune', 'key'); {said}"
    subprocess.run([sys.executable, "-c", program, str(home / "tracking")], cwd=SOURCE)
    deliver(home)
    for name in ("finetune", "trial"):
        assert run_named(name, home).info.status == "KILLED"
    assert run_named("trial", home).data.metrics == {"loss": 1.5}


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_stage_that_ends_early_is_told_apart(home: Path, error: type[BaseException], status: str) -> None:
    def end_early() -> None:
        with open_tracker("prepare", "key", home) as tracker:
            tracker.metrics({"rows": 1})
            raise error

    with pytest.raises(error):
        end_early()
    run = run_named("prepare", home)
    assert (run.info.status, run.data.metrics) == (status, {"rows": 1.0})


def test_the_run_of_a_killed_stage_is_closed(home: Path) -> None:
    said = "EventLog(pathlib.Path(sys.argv[1]), 'tune', 'key').metrics({'loss': 1.5}); os.kill(os.getpid(), 9)"
    program = f"import os, pathlib, sys; from components.tracking.event_log import EventLog; {said}"
    subprocess.run([sys.executable, "-c", program, str(home / "tracking")], cwd=SOURCE)
    deliver(home)
    run = run_named("tune", home)
    assert (run.info.status, run.data.metrics) == ("KILLED", {"loss": 1.5})


def test_what_goes_on_is_seen_before_the_stage_ends(home: Path) -> None:
    with EventLog(home / "tracking", "tune", "key") as event_log:
        event_log.metrics({"loss": 2.0}, 1)
        deliver(home)
        assert run_named("tune", home).info.status == "RUNNING"
        assert run_named("tune", home).data.metrics == {"loss": 2.0}
        event_log.metrics({"loss": 1.0}, 2)
    deliver(home)
    run = run_named("tune", home)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 1.0})


def test_a_line_that_mlflow_refuses_does_not_hold_up_the_rest(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_tracker("evaluate", "key", home) as tracker:
        tracker.params({"seed": 0})
        tracker.params({"seed": 1})
        tracker.metrics({"lookup/held out (new)": 0.5})
    run = run_named("evaluate", home)
    assert run.data.params == {"seed": "0"}
    assert run.data.metrics == {"lookup/held out _new_": 0.5}
    assert "tracking: params refused by MLflow" in capsys.readouterr().err


def test_a_tracker_that_does_not_answer_costs_nothing_and_loses_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with open_tracker("tune", "key", home) as tracker:
        tracker.metrics({"loss": 1.0})
    said = capsys.readouterr().err
    assert "tracking: MLFLOW_TRACKING_URI: http://127.0.0.1:9: " in said
    assert "goes with the next run" in said
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    deliver(home)
    assert run_named("tune", home).data.metrics == {"loss": 1.0}


def test_a_disk_that_takes_no_more_does_not_end_the_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with EventLog(tmp_path / "file" / "tracking", "tune", "key") as event_log:
        event_log.metrics({"loss": 1.0})
        event_log.artifact(tmp_path / "missing")
    assert capsys.readouterr().err.count("going on without") == 1


def test_within_a_run_the_orchestrator_carries(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UPLOADER, str(os.getpid()))
    with open_tracker("tune", "key", home) as tracker:
        tracker.metrics({"loss": 1.0})
    assert len(list((home / "tracking").glob("*/lines.jsonl"))) == 1
    deliver(home)
    assert run_named("tune", home).data.metrics == {"loss": 1.0}


def test_runs_of_a_killed_orchestrator_are_closed(home: Path) -> None:
    client = connect(home)
    create_run(client, "pipeline", {"home": str(home)}, None, 0)
    end_killed_runs(client, "pipeline", home / "another")
    assert run_named("pipeline", home).info.status == "RUNNING"
    end_killed_runs(client, "pipeline", home)
    assert run_named("pipeline", home).info.status == "KILLED"


def test_runs_of_a_host_of_the_same_name_and_path_go_on(home: Path) -> None:
    client = connect(home)
    create_run(client, "pipeline", {"home": str(home), "host": host_id(home)}, None, 0)
    (home / "host-id").rename(home / "former")  # another volume at the same path, as in another container
    end_killed_runs(client, "pipeline", home)
    assert run_named("pipeline", home).info.status == "RUNNING"
    (home / "former").replace(home / "host-id")
    end_killed_runs(client, "pipeline", home)
    assert run_named("pipeline", home).info.status == "KILLED"


def test_a_registered_version_keeps_files_metrics_and_tags(registry: Registry, registered: Register) -> None:
    version = registered(0.5, git_commit="abc")
    assert (str(version), version.metrics["score"], version.tags["git_commit"]) == ("agent/1", 0.5, "abc")
    assert json.loads((version.folder / "config.json").read_text()) == {"score": 0.5}
    assert version.source == f"runs:/{version.run_id}/agent"
    assert (version.folder.parents[1] / "code/components/agent/pyfunc.py").exists(), "our code goes along"


def test_promotion_and_rollback_move_aliases(registry: Registry, registered: Register) -> None:
    first, second = registered(0.5), registered(0.6)
    registry.promote(first)
    registry.alias("agent", "challenger", second)
    registry.promote(registry.resolve("agent@challenger"))
    assert [(str(row), row.aliases) for row in registry.versions("agent")] == [
        ("agent/2", ("champion",)),
        ("agent/1", ("previous",)),
    ]
    assert str(registry.rollback("agent")) == "agent/1"
    assert str(registry.resolve("agent@previous")) == "agent/2"
    assert registry.resolve("agent/2").tags["rolled_back"] == "true"
    assert str(registry.rollback("agent")) == "agent/2", "back and forth"
    assert registry.resolve("agent/2").tags["rolled_back"] == "false"


def test_names_resolve_by_alias_version_or_champion(registry: Registry, registered: Register) -> None:
    version = registered(0.5)
    registry.promote(version)
    names = ("agent", "agent@champion", "agent/1", "models:/agent@champion", "models:/agent/1")
    assert {str(registry.resolve(name)) for name in names} == {"agent/1"}
    assert str(resolve("agent", registry.home)) == "agent/1"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("other", "other: no such model in the registry; known: agent"),
        ("agent@challenger", "agent@challenger: not in the registry; known: agent/1, agent@champion"),
        ("agent/7", "agent/7: not in the registry; known: agent/1, agent@champion"),
        ("agent/x", "agent/x: not in the registry; known: agent/1, agent@champion"),
    ],
)
def test_unknown_names_say_what_there_is(registry: Registry, registered: Register, wanted: str, message: str) -> None:
    registry.promote(registered(0.5))
    with pytest.raises(InputError) as caught:
        registry.resolve(wanted)
    assert str(caught.value) == message


def test_moves_that_cannot_be_made_say_why(registry: Registry, registered: Register) -> None:
    version = registered(0.5)
    with pytest.raises(InputError, match="agent@previous: there is no earlier champion"):
        registry.rollback("agent")
    registry.promote(version)
    with pytest.raises(InputError, match="agent/1: is the champion already"):
        registry.promote(version)


def test_an_empty_registry_is_told_without_mlflow(tmp_path: Path, registry: Registry) -> None:
    assert is_empty(tmp_path / "nowhere")
    with pytest.raises(InputError, match='it is empty; run "loopwright run"'):
        registry.versions("agent")


def test_an_environment_that_mlflow_cannot_run_in_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/home/100%/.venv")
    with pytest.raises(InputError, match=r"/home/100%/.venv: MLflow cannot have '%' in the path"):
        connect(home)


def test_a_databases_artifacts_go_into_the_state_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a database's address without a server, MLflow would put them into the current folder."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow' / DATABASE}")
    client = connect(home)
    client.rename_experiment(client.get_experiment_by_name("loopwright").experiment_id, "earlier")
    other = tmp_path / "other"
    artifacts = (other / "mlflow" / "artifacts").as_uri()
    assert connect(other).get_experiment_by_name("loopwright").artifact_location == artifacts
    monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", "s3://bucket/artifacts")
    client.rename_experiment(client.get_experiment_by_name("loopwright").experiment_id, "second")
    assert connect(other).get_experiment_by_name("loopwright").artifact_location == "s3://bucket/artifacts"
