"""Running one stage: its key, its state folder, its lock, its exit codes, its end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from components.config.params import InputError, Refused, flat, load_params
from components.config.paths import Paths
from components.runtime import stage
from components.runtime.checkpoint_folders import remove_committed
from components.runtime.launcher import FORCE
from components.runtime.process import RUN_PID, file_lock, lock_owner
from components.runtime.stage import StageRun, digest, run_stage, stage_inputs
from components.tracking.event_log import EventLog
from components.tracking.mlflow_client import UPLOADER
from flows.orchestration import run_stage as run_stage_module

SOURCE = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """The declarations of this project, with a file in every place that a stage depends on."""
    monkeypatch.delenv("LOOPWRIGHT_HOME", raising=False)
    # This process counts as the one that carries journals: no stage here needs MLflow.
    monkeypatch.setenv(UPLOADER, str(os.getpid()))
    shutil.copy(SOURCE / "dvc.yaml", tmp_path)
    (tmp_path / "params.yaml").write_text("scale: smoke\n")
    for declared in stage.read_stages(tmp_path).values():
        for dep in declared["deps"]:
            place = tmp_path / dep
            (place if place.suffix else place / "file").parent.mkdir(parents=True, exist_ok=True)
            (place if place.suffix else place / "file").write_text("{}")
    return Paths(tmp_path)


def key_of(name: str, project: Paths, **overrides: Any) -> str:
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return stage_inputs(name, project, load_params(project.params, dotted)).key


@pytest.fixture
def act(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[StageRun], None]], None]:
    """Let a function of the test be every stage's function."""
    return lambda function: monkeypatch.setattr(stage, "stage_function", lambda name: function)


def test_key_follows_dependencies_and_declared_params_alone(project: Paths) -> None:
    key = key_of("pretrain@decoder", project)
    assert key == key_of("pretrain@decoder", project)
    assert key == key_of("pretrain@decoder", project, tune__max_steps=7)
    assert key != key_of("pretrain@decoder", project, pretrain__decoder__max_steps=7)
    assert key != key_of("pretrain@decoder", project, model__decoder__num_layers=3)
    assert key != key_of("pretrain@decoder", project, seed=1)
    (project.tokens("decoder") / "pretrain" / "file").write_text("other content")
    assert key != key_of("pretrain@decoder", project)


def test_key_follows_the_versions_of_declared_libraries_alone(
    project: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = yaml.safe_load(stage.VERSIONS_FILE.read_text())
    key, upgraded = key_of("pretrain@decoder", project), tmp_path / "versions.yaml"
    monkeypatch.setattr(stage, "VERSIONS_FILE", upgraded)
    for library, is_declared in (("torch", True), ("optuna", False)):
        upgraded.write_text(yaml.safe_dump(versions | {library: "99"}))
        assert (key != key_of("pretrain@decoder", project)) == is_declared


def test_key_holds_resolved_values_not_spelling(project: Paths) -> None:
    assert key_of("pretrain@decoder", project) == key_of(
        "pretrain@decoder", project, pretrain__decoder__max_steps=30
    ), "30 is smoke's own value"


def test_a_stage_with_a_matrix_is_one_stage_per_item(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text("""
stages:
  one: {cmd: a}
  many:
    matrix: {family: [decoder, encoder]}
    cmd: run many@${item.family}
    outs: ["data/${item.family}"]
    plots: [{"${item.family}_loss.csv": {x: step}}]
""")
    stages = stage.read_stages(tmp_path)
    assert list(stages) == ["one", "many@decoder", "many@encoder"]
    assert stages["many@encoder"]["cmd"] == "run many@encoder"
    assert stage.outs(stages["many@encoder"]) == ["data/encoder", "encoder_loss.csv"]


@pytest.mark.parametrize(
    ("name", "item", "family", "section"),
    [
        ("tune", "", "decoder", "tune"),
        ("pretrain@decoder", "decoder", "decoder", "pretrain.decoder"),
        ("pretrain@encoder_decoder", "encoder_decoder", "encoder_decoder", "pretrain.encoder_decoder"),
        ("finetune@classifier", "classifier", "encoder", "classifier"),
    ],
)
def test_a_run_knows_its_family_and_where_its_values_stand(
    name: str, item: str, family: str, section: str, project: Paths
) -> None:
    run = StageRun(name, load_params(project.params), project, project.home, EventLog(project.home, name, ""))
    assert (run.item, run.family, run.section) == (item, family, section)


def test_digest_sees_names_and_contents_but_no_bytecode(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.py").write_text("1")
    before = digest(tmp_path / "a")
    (tmp_path / "a/__pycache__").mkdir()
    (tmp_path / "a/__pycache__/x.pyc").write_text("2")
    assert digest(tmp_path / "a") == before
    (tmp_path / "a/x.py").rename(tmp_path / "a/y.py")
    assert digest(tmp_path / "a") != before


def test_a_stage_reads_the_datasets_that_passed_validation_and_no_others(project: Paths) -> None:
    for name in ("a", "b"):
        (project.collected / name).mkdir(parents=True)
        (project.collected / name / "train").write_text(name)
    passed = digest(project.collected / "a")
    project.validated("tune").write_text(json.dumps({"a": passed}))
    inputs = stage_inputs("prepare@decoder", project, load_params(project.params))
    read = {dep: content for dep, content in inputs.deps.items() if dep.startswith("data/collected/")}
    assert read == {"data/collected/a": passed}
    (project.collected / "b/train").write_text("other")
    assert key_of("prepare@decoder", project) == inputs.key
    (project.collected / "a/train").write_text("other")
    with pytest.raises(
        InputError, match=r'data/collected/a: changed since its validation; run "loopwright run --until v'
    ):
        key_of("prepare@decoder", project)


def test_missing_dependency_names_the_stage_that_makes_it(project: Paths) -> None:
    shutil.rmtree(project.tokens("decoder"))
    with pytest.raises(
        InputError, match=r'data/tokens/decoder/pretrain: not found; run "loopwright run --until prepare@decoder"'
    ):
        key_of("pretrain@decoder", project)


def test_flat_joins_sections() -> None:
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_stage_gets_its_params_paths_and_a_state_folder(project: Paths, act: Callable[..., None]) -> None:
    runs: list[StageRun] = []
    act(runs.append)
    assert run_stage("pretrain@decoder", project.root) == 0
    (run,) = runs
    assert (run.name, run.paths, run.params.scale) == ("pretrain@decoder", project, "smoke")
    assert run.state == project.home / "checkpoints" / "pretrain@decoder" / key_of("pretrain@decoder", project)
    assert run.state.is_dir()


def test_state_outlives_a_failed_run_and_only_two_are_kept(project: Paths, act: Callable[..., None]) -> None:
    states: list[Path] = []

    def fail(run: StageRun) -> None:
        states.append(run.state)
        assert (run.state / "checkpoint").exists() == (run.state in states[:-1])
        (run.state / "checkpoint").write_text("")
        raise Refused("no")

    act(fail)
    for seed in (0, 0, 1, 2):
        project.params.write_text(f"scale: smoke\nseed: {seed}\n")
        assert run_stage("pretrain@decoder", project.root) == 3
    assert states[0] == states[1]
    assert sorted(states[0].parent.iterdir()) == sorted(states[2:])


def test_a_clock_that_steps_backwards_costs_no_checkpoint(project: Paths, act: Callable[..., None]) -> None:
    """The folders of other inputs are of a later time than that of this run."""
    found: list[bool] = []

    def save(run: StageRun) -> None:
        found.append((run.state / "checkpoint").exists())
        (run.state / "checkpoint").write_text("")
        raise Refused("killed")

    act(save)
    for seed in (1, 2, 0, 0):
        project.params.write_text(f"scale: smoke\nseed: {seed}\n")
        assert run_stage("pretrain@decoder", project.root) == 3
        for other in (project.home / "checkpoints/pretrain@decoder").iterdir():
            later = time.time() + 86_400 * (1 if other.name == key_of("pretrain@decoder", project) else 2)
            os.utime(other, (later, later))
    assert found == [False, False, False, True]


def lock(project: Paths, **entry: Any) -> None:
    """Let dvc.lock have an entry for the stage whose metrics file is as it is."""
    md5 = hashlib.md5((project.metrics / "pretrain@decoder.json").read_bytes()).hexdigest()
    outs = [{"path": "data/metrics/pretrain@decoder.json", "hash": "md5", "md5": md5}]
    stages = {"pretrain@decoder": {"cmd": "train", "outs": outs, **entry}}
    (project.root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


def test_checkpoints_go_when_dvc_has_the_result_and_not_before(project: Paths, act: Callable[..., None]) -> None:
    def train(run: StageRun) -> None:
        (run.state / "checkpoint").write_text("")
        project.metrics.mkdir(parents=True, exist_ok=True)
        (project.metrics / "pretrain@decoder.json").write_text(f'{{"seed": {run.params.seed}}}')

    act(train)
    folder = project.home / "checkpoints/pretrain@decoder"
    project.params.write_text("scale: smoke\nseed: 0\n")
    run_stage("pretrain@decoder", project.root)
    first = folder / key_of("pretrain@decoder", project)
    remove_committed(project)
    assert first.exists(), "no dvc.lock yet"
    lock(project)
    project.params.write_text("scale: smoke\nseed: 1\n")
    run_stage("pretrain@decoder", project.root)
    assert not first.exists(), "the next stage removes it, whoever started that"
    second = folder / key_of("pretrain@decoder", project)
    lock(project)
    (project.metrics / "pretrain@decoder.json").write_text("another result")
    lock(project)
    remove_committed(project)
    assert second.exists(), "dvc.lock has the result of other inputs"
    (project.root / "dvc.lock").write_text("stages: [torn")
    remove_committed(project)
    assert second.exists(), "nothing is known"
    remove_committed(project, "pretrain@decoder")
    assert not second.exists(), "dvc repro ended"


def test_an_equal_result_of_other_inputs_stays_until_dvc_has_it(project: Paths, act: Callable[..., None]) -> None:
    """As where a line of the code changed that changes no weight: DVC would train again."""

    def train(run: StageRun) -> None:
        project.metrics.mkdir(parents=True, exist_ok=True)
        (project.metrics / "pretrain@decoder.json").write_text("{}")

    act(train)
    run_stage("pretrain@decoder", project.root)
    lock(project, deps=[{"path": "code", "md5": "1"}])
    (project.tokens("decoder") / "pretrain" / "file").write_text("other content")
    run_stage("pretrain@decoder", project.root)
    folder = project.home / "checkpoints/pretrain@decoder" / key_of("pretrain@decoder", project)
    remove_committed(project)
    assert folder.exists()
    lock(project, deps=[{"path": "code", "md5": "2"}])
    remove_committed(project)
    assert not folder.exists()


def test_force_starts_without_earlier_checkpoints(
    project: Paths, act: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[Path]] = []

    def look(run: StageRun) -> None:
        found.append(list(run.state.iterdir()))
        (run.state / "checkpoint").write_text("")

    act(look)
    run_stage("pretrain@decoder", project.root)
    run_stage("pretrain@decoder", project.root)
    monkeypatch.setenv(FORCE, "1")
    run_stage("pretrain@decoder", project.root)
    assert [len(files) for files in found] == [0, 1, 0]


def test_leftovers_of_a_killed_writer_are_removed_first(project: Paths, act: Callable[..., None]) -> None:
    project.base("decoder").mkdir(parents=True, exist_ok=True)
    (project.base("decoder") / "half").write_text("")
    act(lambda run: run.paths.base("decoder").mkdir())
    assert run_stage("pretrain@decoder", project.root) == 0
    assert list(project.base("decoder").iterdir()) == []


@pytest.mark.parametrize(("error", "code"), [(InputError("a: b; c"), 1), (Refused("rows are bad"), 3)])
def test_wrong_input_and_refusal_end_with_one_line_and_their_code(
    project: Paths, act: Callable[..., None], capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def fail(run: StageRun) -> None:
        raise error

    act(fail)
    assert run_stage("tune", project.root) == code
    assert capsys.readouterr().err == f"{error}\n"
    report = json.loads((project.home / "stages/tune.json").read_text())
    assert (report["exit_code"], report["message"]) == (code, str(error))


def test_a_bug_keeps_its_traceback(project: Paths, act: Callable[..., None]) -> None:
    act(lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_stage("tune", project.root)
    assert json.loads((project.home / "stages/tune.json").read_text())["exit_code"] == 1


def test_wrong_params_end_the_stage(project: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    project.params.write_text("scale: enormous\n")
    assert run_stage("tune", project.root) == 1
    assert "params.yaml: scale: 'enormous' is not one of" in capsys.readouterr().err


def test_progress_line_is_what_the_orchestrator_reads(
    project: Paths, act: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    act(lambda run: run.progress(3, 10, loss=2.34567, phase="warm up"))
    run_stage("pretrain@decoder", project.root)
    line = capsys.readouterr().out.strip()
    said = stage.PROGRESS.fullmatch(line)
    assert said is not None
    assert said.groupdict() == {
        "stage": "pretrain@decoder",
        "done": "3",
        "total": "10",
        "figures": "loss 2.346  phase warm up",
    }


def test_a_lock_has_one_holder_and_names_it(tmp_path: Path) -> None:
    assert lock_owner(tmp_path, "tune") is None
    with file_lock(tmp_path, "tune"):
        assert lock_owner(tmp_path, "tune") == os.getpid()
        with pytest.raises(InputError, match=f"tune: already running as process {os.getpid()}; wait for it"):
            file_lock(tmp_path, "tune").__enter__()
    with file_lock(tmp_path, "tune"):
        pass
    assert lock_owner(tmp_path, "tune") is None


def test_a_second_writer_is_refused_while_the_first_runs(
    project: Paths, act: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_SECONDS_FOR_ENDING_STAGE", 0.0)
    codes: list[int] = []
    act(lambda run: codes.append(run_stage("tune", project.root)) if run.name == "tune" and not codes else None)
    assert run_stage("tune", project.root) == 0
    assert codes == [1]
    assert f"tune: already running as process {os.getpid()}" in capsys.readouterr().err


CHILD = """
import time
from components.runtime.process import end_with_parent
end_with_parent()
print("up", flush=True)
time.sleep(60)
"""
RUN = """
import os, subprocess, sys
os.environ["LOOPWRIGHT_RUN_PID"] = str(os.getpid())
subprocess.run(sys.argv[1:])
"""


@pytest.mark.parametrize("shell", [False, True], ids=["direct", "through a shell"])
def test_a_stage_ends_when_its_run_is_killed(shell: bool) -> None:
    child = [sys.executable, "-c", CHILD]
    if shell:
        # As DVC starts it; the shell outlives the run, so that the kernel tells the stage nothing.
        child = ["/bin/sh", "-c", '"$0" "$@"; true', *child]
    run = subprocess.Popen([sys.executable, "-c", RUN, *child], cwd=SOURCE, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "up\n"
    family = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    run.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


ORPHAN = """
import signal, sys, time
from components.runtime.process import end_with_parent, is_orphan
end_with_parent()
signal.signal(signal.SIGTERM, lambda *_: (print("orphan" if is_orphan() else "stopped", flush=True), sys.exit()))
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("killed", ["the run", "DVC"])
def test_a_stage_knows_whether_its_run_has_died(killed: str) -> None:
    """A cancellation of the run's process group ends DVC, the stage's parent, before the run."""
    dvc = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])", sys.executable, "-c", ORPHAN]
    run = subprocess.Popen([sys.executable, "-c", RUN, *dvc], cwd=SOURCE, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "up\n"
    (parent,) = psutil.Process(run.pid).children()
    (run if killed == "the run" else parent).kill()
    assert run.stdout.readline() == ("orphan\n" if killed == "the run" else "stopped\n")
    with suppress(psutil.NoSuchProcess):  # it may be gone already
        parent.kill()
    run.kill()
    run.communicate()


def test_a_stage_of_a_run_that_is_gone_does_not_start() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ended = subprocess.run([sys.executable, "-c", CHILD], cwd=SOURCE, env=_family(gone.pid), capture_output=True)
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stdout == b""


def test_a_stage_ends_with_the_worker_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_PID, "17 16")
    assert run_stage_module._environment(force=False)[RUN_PID] == f"{os.getpid()} 17 16"


def _family(run: int) -> dict[str, str]:
    return {**os.environ, RUN_PID: str(run)}


def test_an_unknown_stage_is_a_usage_error() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "components.runtime.stage", "dream"], cwd=SOURCE, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert "'dream' is no stage; one of collect, validate" in ended.stderr


def test_a_stage_with_a_living_family_runs_on() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CHILD.replace("sleep(60)", "sleep(1.5)")], cwd=SOURCE, env=_family(os.getpid())
    )
    assert ended.returncode == 0
