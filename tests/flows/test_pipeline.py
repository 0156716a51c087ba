"""What is out of date and why, and one stage brought up to date: by real DVC, on three toy stages."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml

from components.config.params import InputError
from components.config.paths import Paths
from components.runtime.checkpoint_folders import copy_lock_files
from flows.orchestration.dvc_repo import StageState, configure, stage_states, version_data
from flows.orchestration.run_stage import StageFailed, reproduce
from loopwright.doctor import CHECKS

STAGES = {
    "first": {"cmd": "python first.py", "deps": ["first.py", "source.txt"], "params": ["a"], "outs": ["first.txt"]},
    "side": {"cmd": "cp source.txt side.txt", "deps": ["source.txt"], "outs": ["side.txt"]},
    "last": {"cmd": "cp first.txt last.txt", "deps": ["first.txt"], "outs": ["last.txt"]},
}
FIRST = """
import pathlib, yaml
print("first  1/1  loss 0.5")
pathlib.Path("first.txt").write_text(str(yaml.safe_load(open("params.yaml"))["a"] > 0))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of three stages, never run."""
    monkeypatch.delenv("LOOPWRIGHT_HOME", raising=False)
    (tmp_path / "source.txt").write_text("source")
    (tmp_path / "first.py").write_text(FIRST)
    (tmp_path / "params.yaml").write_text("a: 1\n")
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}, sort_keys=False))
    (tmp_path / ".gitignore").write_text("var\n")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / ".dvc").mkdir()
    shutil.copy(Path(__file__).parents[2] / ".dvc/config", tmp_path / ".dvc")
    configure(tmp_path)
    return tmp_path


def run(name: str, project: Path, force: bool = False) -> str:
    return reproduce(name, project, force, lambda line: None).outcome


def run_all(project: Path) -> list[str]:
    return [run(name, project) for name in STAGES]


def reasons(project: Path, **wanted: object) -> dict[str, tuple[str, ...]]:
    """What is wrong with each stage; or `after` and the stages it depends on that are out of date."""
    states = stage_states(project, **wanted)  # type: ignore[arg-type]
    return {state.name: state.reasons or (("after", *state.after) if state.after else ()) for state in states}


def test_outcomes_are_told_apart(project: Path) -> None:
    assert run_all(project) == ["ran", "ran", "ran"]
    assert run_all(project) == ["up to date"] * 3
    (project / "first.txt").unlink()
    assert run("first", project) == "restored from cache"
    assert run("first", project, force=True) == "ran"
    (project / "params.yaml").write_text("a: 2\n")
    assert run("first", project) == "ran"
    assert run("last", project) == "up to date", "its input came out the same"


def test_reasons_name_what_changed_and_follow_the_graph(project: Path) -> None:
    assert all(reasons(project).values())
    run_all(project)
    assert reasons(project) == {"first": (), "side": (), "last": ()}
    (project / "params.yaml").write_text("a: 2\n")
    assert reasons(project) == {"first": ("params.yaml: a modified",), "side": (), "last": ("after", "first")}
    (project / "params.yaml").write_text("a: 1\n")
    (project / "source.txt").write_text("another")
    assert reasons(project) == {
        "first": ("source.txt modified",),
        "side": ("source.txt modified",),
        "last": ("after", "first"),
    }
    (project / "source.txt").write_text("source")
    (project / "side.txt").unlink()
    assert reasons(project) == {"first": (), "side": ("side.txt deleted",), "last": ()}


def test_stages_come_in_the_order_they_run(project: Path) -> None:
    upside_down = dict(reversed(STAGES.items()))
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": upside_down}, sort_keys=False))
    names = list(reasons(project))
    assert sorted(names) == sorted(STAGES)
    assert names.index("first") < names.index("last")


MATRIX = {
    "make": {
        "matrix": {"family": ["decoder", "encoder"]},
        "cmd": "cp source.txt ${item.family}.txt",
        "params": ["model", "tune.dataset", {"components/config/scales.yaml": ["all.model"]}],
        "outs": ["${item.family}.txt"],
    }
}


def test_until_takes_all_of_a_stage_with_a_matrix(project: Path) -> None:
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": {**STAGES, **MATRIX}}))
    (project / "params.yaml").write_text("a: 1\nmodel: {}\ntune: {dataset: a}\n")
    assert set(reasons(project, until="make")) == {"make@decoder", "make@encoder"}
    assert set(reasons(project, until="make@encoder")) == {"make@encoder"}


def test_until_takes_a_stage_and_what_it_needs(project: Path) -> None:
    assert set(reasons(project, until="last")) == {"first", "last"}
    with pytest.raises(InputError, match=r"--until: 'middle' is no stage of dvc.yaml; one of first, side, last"):
        stage_states(project, until="middle")


def test_force_gives_every_stage_a_reason(project: Path) -> None:
    run_all(project)
    states = stage_states(project, force=True)
    assert all(state.reasons == ("--force",) for state in states)


def test_a_state_fits_a_line_and_says_how_much_it_leaves_out() -> None:
    reasons = tuple(f"components/module_{number}.py modified" for number in range(30))
    stale = StageState("first", (), reasons)
    waiting = StageState("last", ("first",), (), ("collect", "prepare@encoder", "pretrain@encoder"))
    assert stale.describe(90) == f"{reasons[0]}, {reasons[1]}, and 28 more"
    assert waiting.describe(90) == "up to date until after collect, prepare@encoder, pretrain@encoder"
    assert waiting.describe(50) == "up to date until after collect, and 2 more"
    assert StageState("side", (), ()).describe(10) == "up to date"
    for width in range(20, 2000, 7):
        for state in (stale, waiting):
            line = state.describe(width)
            assert len(line) <= width
            assert line[-1] == "…" or line.count(",") + 1 == len(state.reasons or state.after) or " more" in line


def test_doctor_says_that_data_was_collected_under_another_python(project: Path) -> None:
    metrics = Paths(project).metrics / "collect.json"
    metrics.parent.mkdir(parents=True)
    Paths(project).collected.mkdir(parents=True)
    for version, shown in ((sys.version, False), ("3.99.1 (main)", True)):
        metrics.write_text(json.dumps({"python": version}))
        found, remedy = CHECKS["python"](Paths(project))
        assert not remedy
        assert ('data collected under 3.99.1: "loopwright run --until collect --force" renews it' in found) == shown


def test_doctor_compares_what_is_installed_with_the_lock(project: Path) -> None:
    lock = project / "requirements.lock"
    shutil.copy(Path(__file__).parents[2] / "requirements.lock", lock)
    assert CHECKS["versions"](Paths(project))[1] == ""
    lock.write_text(re.sub("(?m)^dvc==.*", "dvc==3.1.0", lock.read_text()))
    found, remedy = CHECKS["versions"](Paths(project))
    assert re.fullmatch(r"dvc \S+, locked 3\.1\.0", found)
    assert remedy.startswith("run make setup")


def test_each_line_of_a_stage_is_heard_without_what_dvc_says(project: Path) -> None:
    heard: list[str] = []
    reproduce("first", project, False, heard.append)
    assert heard == ["> python first.py", "first  1/1  loss 0.5"]


@pytest.mark.parametrize(("code", "message"), [(1, "a.txt: empty; give it rows"), (3, "refused: 2 bad rows")])
def test_a_failed_stage_fails_with_its_own_message_and_code(project: Path, code: int, message: str) -> None:
    stages = Paths(project).home / "stages"
    report = json.dumps({"exit_code": code, "message": message})
    (project / "first.py").write_text(
        f"import pathlib, sys\np = pathlib.Path({str(stages)!r})\np.mkdir(parents=True)\n"
        f"(p / 'first.json').write_text({report!r})\nsys.exit({code})"
    )
    with pytest.raises(StageFailed) as caught:
        run("first", project)
    assert (str(caught.value), caught.value.exit_code) == (message, code)


TRAIN = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path("checkpoint").write_text("")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("first  1/9", flush=True)
time.sleep(60)
"""
RUN = """
import pathlib, sys
from flows.orchestration.run_stage import reproduce
reproduce('first', pathlib.Path(sys.argv[1]), False, print)
"""


@pytest.mark.parametrize("started_to", [signal.SIG_DFL, signal.SIG_IGN], ids=["in front", "behind an & of a script"])
def test_an_interrupted_run_lets_the_stage_save_and_ends_it(project: Path, started_to: signal.Handlers) -> None:
    (project / "first.py").write_text(TRAIN)
    command = [sys.executable, "-u", "-c", RUN, str(project)]
    source = Path(__file__).parents[2]
    said = project / "stderr"
    with (
        said.open("w") as stderr,
        subprocess.Popen(
            command,
            cwd=source,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, started_to),
        ) as run,
    ):
        assert run.stdout is not None
        while run.stdout.readline() != "first  1/9\n":
            assert run.poll() is None
        family = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signal.SIGINT)
    assert run.returncode == -signal.SIGINT, said.read_text()
    assert not any(member.is_running() for member in family), "waited for"
    assert (project / "checkpoint").exists()


HELD = """
import json, time
dump = json.dump
def held(value, file, **options):
    if str(getattr(file, "name", "")).endswith("rwlock"):
        json.dump = dump
        print("locking", flush=True)
        time.sleep(0.5)
    dump(value, file, **options)
json.dump = held
"""
"""DVC as it writes its lock file, once, with time for an interrupt."""


def test_an_interrupted_dvc_leaves_a_lock_file_that_it_can_read(project: Path) -> None:
    (project / "first.py").write_text(TRAIN)
    (project / "sitecustomize.py").write_text(HELD)
    lock = project / ".dvc/tmp/rwlock"
    with subprocess.Popen(
        [sys.executable, "-u", "-c", RUN, str(project)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(project)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "locking\n"
        assert lock.read_text() == ""
        run.send_signal(signal.SIGINT)
    assert run.returncode == -signal.SIGINT
    assert isinstance(json.loads(lock.read_text()), dict)


def test_a_lock_file_that_a_killed_dvc_cut_off_is_written_anew(project: Path) -> None:
    run_all(project)
    (project / ".dvc/tmp/rwlock").write_text('{"write": {')
    assert reasons(project) == {"first": (), "side": (), "last": ()}
    assert run_all(project) == ["up to date"] * 3


def test_dvc_replaces_its_files_instead_of_writing_them_in_place(project: Path) -> None:
    """Killed meanwhile, it would leave half of a file: the open one must stay what it was."""
    folder = project / "data/mine"
    folder.mkdir(parents=True)
    for number in (1, 2):
        (folder / "rows").write_text(str(number))
        (project / "params.yaml").write_text(f"a: {number}\n")
        version_data(project, folder)
        run("first", project)
        files = [project / "data/mine.dvc", project / "dvc.lock"]
        if number == 1:
            opened = [(file.open(), file.read_text()) for file in files]
    for file, (before, text) in zip(files, opened, strict=True):
        with before:
            assert before.read() == text != file.read_text()


def test_a_killed_dvc_that_nobody_waited_for_holds_no_lock(project: Path) -> None:
    """It still has a process id, as children of a killed run have in a container without an init process."""
    run_all(project)
    with subprocess.Popen([sys.executable, "-c", ""]) as killed:
        while psutil.Process(killed.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        owner = {"pid": killed.pid, "cmd": "dvc repro"}
        written = {str(project / "first.txt"): owner}
        (project / ".dvc/tmp/rwlock").write_text(json.dumps({"write": written, "read": {}}))
        assert reasons(project) == {"first": (), "side": (), "last": ()}


def test_a_lock_file_that_a_kill_tore_is_restored(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`dvc repro` by hand writes it in place."""
    run("first", project)
    copy_lock_files(Paths(project))
    run_all(project)
    written = (project / "dvc.lock").read_text()
    for torn in ("", written[: written.index("outs:") + 3]):
        (project / "dvc.lock").write_text(torn)
        assert reasons(project)["first"] == ()
        assert capsys.readouterr().err == "dvc.lock: was torn; restored as it was when the last stage began\n"
        assert run_all(project)[0] == "up to date"
        assert (project / "dvc.lock").read_text() == written


def test_a_stage_killed_without_a_word_is_reported_by_dvc(project: Path) -> None:
    (project / "first.py").write_text("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(StageFailed, match=r"first: failed to reproduce 'first': .*exited with"):
        run("first", project)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("dvc.yaml", "stages:\n  first:\n    cmd: [\n", "dvc.yaml: line 4, column 1: did not .*; correct dvc.yaml"),
        ("dvc.yaml", "stages: {a: {dips: []}}", "dvc.yaml: stages.a.dips: extra keys not allowed.*; correct dvc.yaml"),
        ("dvc.yaml", "stages: {a: {cmd: b, deps: [c], outs: [c]}}", "dvc.yaml: DVC: .*in stage: a; correct dvc.yaml"),
        ("dvc.lock", "a: 1", 'dvc.lock: .*a: extra keys.*; remove dvc.lock, and "loopwright run" writes it anew'),
        ("params.yaml", "a: [", "params.yaml: line 2, column 1: .*; correct params.yaml"),
        ("data/mine.dvc", "outs: [", "data/mine.dvc: line 2, column 1: .*; restore data/mine.dvc from git, or add .*"),
        (".dvc/config", "[core", ".dvc/config: DVC: .*line 1; correct it there or in .dvc/config.local"),
    ],
)
def test_what_dvc_cannot_read_is_named_with_place_and_remedy(
    file: str, content: str, message: str, project: Path
) -> None:
    (project / file).parent.mkdir(exist_ok=True)
    (project / file).write_text(content)
    with pytest.raises(InputError) as caught:
        stage_states(project)
    assert re.fullmatch(message, str(caught.value)), str(caught.value)
    with chdir(project):
        found, remedy = CHECKS["dvc"](Paths(project))
    assert f"{found}; {remedy}" == str(caught.value)


def test_without_git_dvc_versions_alone(project: Path) -> None:
    shutil.rmtree(project / ".git")
    assert run_all_configured(project) == ["ran", "ran", "ran"]
    assert reasons(project) == {"first": (), "side": (), "last": ()}


def run_all_configured(project: Path) -> list[str]:
    configure(project)
    return run_all(project)


def test_configuration_keeps_what_the_user_wrote(project: Path) -> None:
    local = project / ".dvc/config.local"
    local.write_text("[core]\n    autostage = true\n['remote \"mine\"']\n    url = /somewhere\n")
    configure(project)
    written = local.read_text()
    assert "autostage = true" in written
    assert "url = /somewhere" in written
    assert "url = ../var/dvc-remote" in written
    before = os.stat(local).st_mtime_ns
    configure(project)
    assert os.stat(local).st_mtime_ns == before, "written once"


def test_results_travel_through_the_local_remote(project: Path) -> None:
    run_all(project)
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "push", "--quiet"], cwd=project, check=True)
    shutil.rmtree(project / ".dvc/cache")
    (project / "last.txt").unlink()
    subprocess.run([*dvc, "pull", "--quiet"], cwd=project, check=True)
    assert (project / "last.txt").read_text() == "True"


def test_a_dataset_of_the_user_is_versioned(project: Path) -> None:
    folder = project / "data/added/mine"
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("row")
    version_data(project, folder)
    (out,) = yaml.safe_load((project / "data/added/mine.dvc").read_text())["outs"]
    assert out["path"] == "mine"
    assert out["md5"].endswith(".dir")
