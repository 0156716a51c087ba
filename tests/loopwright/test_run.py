"""What `run --scale` and `--set` write into params.yaml, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import yaml
from ruamel.yaml import YAML

from components.config.params import InputError, load_params
from components.config.paths import Paths
from components.runtime.checkpoint_folders import History
from components.runtime.params_file import write_params
from loopwright.run import Terminal, read_overrides, run

PARAMS = """\
# The dial.
scale: laptop  # or smoke
seed: 0

model:
  decoder: {}
pretrain:
  decoder:
    dataset: stdlib-documents  # or a list
tune:
  dataset: stdlib-conversations
"""


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS)
    return path


def test_values_are_written_beside_their_comments(params: Path) -> None:
    told: list[str] = []
    wanted = read_overrides(
        "smoke", ["pretrain.decoder.dataset=[a, b]", "model.decoder.num_layers=3", "tune.learning_rate=1e-3"]
    )
    write_params(params, wanted, told.append)
    text = params.read_text()
    assert "# The dial.\nscale: smoke   # or smoke\n" in text
    assert "    dataset: [a, b]            # or a list\n" in text
    assert "  learning_rate: 0.001\n" in text
    written = load_params(params)
    assert (written.scale, written.model.decoder.num_layers, written.tune.learning_rate) == ("smoke", 3, 1e-3)
    assert written.pretrain.decoder.datasets == ["a", "b"]
    assert "params.yaml: scale: laptop → smoke" in told
    assert "params.yaml: model.decoder.num_layers: unset → 3" in told


@pytest.mark.parametrize("name", ["no", "123", "2024_01_31", "2024-01-31", "1e3", "0x1F", "null", "on", "[no, 1_0, a]"])
def test_a_dataset_may_be_called_what_yaml_reads_as_something_else(params: Path, name: str) -> None:
    wanted = name.strip("[]").split(", ")
    for assignment in (f"tune.dataset={name}", f"pretrain.encoder.dataset={name}"):
        write_params(params, read_overrides(None, [assignment]), lambda line: None)
    written = load_params(params)
    assert written.tune.datasets == written.pretrain.encoder.datasets == wanted
    for read in (yaml.safe_load(params.read_text()), YAML(typ="safe").load(params.read_text())):
        assert read["tune"]["dataset"] == (wanted if name.startswith("[") else name), "whoever reads the file"
    told: list[str] = []
    write_params(params, read_overrides(None, [f"tune.dataset={name}"]), told.append)
    assert told == [], "it stands there already"
    params.write_text(PARAMS.replace("stdlib-conversations", name), encoding="utf-8")
    assert load_params(params).tune.datasets == wanted, "as a person writes it"


def test_only_text_is_taken_as_written(params: Path) -> None:
    wanted = [
        "serve.int8=no",
        "seed=0x1F",
        "serve.backend_url=null",
        "tune.compile=on",
        "pretrain.decoder.max_steps=1_000",
    ]
    write_params(params, read_overrides(None, wanted), lambda line: None)
    read = load_params(params)
    assert (read.serve.int8, read.seed, read.serve.backend_url) == (False, 31, None)
    assert (read.tune.compile, read.pretrain.decoder.max_steps) == ("on", 1000)


def test_a_full_disk_leaves_the_file_as_it_was(
    params: Path, small_files: Callable[[int], AbstractContextManager[None]]
) -> None:
    with (
        small_files(20),
        pytest.raises(InputError, match=r"params.yaml.*: cannot be written: File too large"),
    ):
        write_params(params, read_overrides("smoke", []), lambda line: None)
    assert [path.name for path in params.parent.iterdir()] == ["params.yaml"]
    assert params.read_text() == PARAMS


def test_nothing_is_written_when_nothing_changes(params: Path) -> None:
    told: list[str] = []
    write_params(params, read_overrides("laptop", ["seed=0"]), told.append)
    assert (params.read_text(), told) == (PARAMS, [])


@pytest.mark.parametrize(
    ("scale", "assignment", "message"),
    [
        ("huge", "seed=1", r"params.yaml: scale: 'huge' is not one of smoke, laptop, gpu, cluster"),
        (None, "pretrain.stepz=1", r"params.yaml: pretrain.stepz: unknown key"),
        (
            None,
            "model.decoder.num_heads=0",
            r"params.yaml: model.decoder.num_heads: 0: Input should be greater than or equal to 1",
        ),
        (None, "pretrain.decoder.micro_batch_size=3", r"micro_batch_size: 3 does not divide global_batch_size 8"),
        (None, "seed", r"--set: 'seed': expected SECTION.KEY=VALUE, such as pretrain.decoder.max_steps=100"),
        (None, "seed=[1", r"--set: 'seed=\[1': not a YAML value"),
    ],
)
def test_wrong_values_change_nothing(params: Path, scale: str | None, assignment: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_params(params, read_overrides(scale, [assignment]), print)
    assert params.read_text() == PARAMS


def test_with_json_the_run_talks_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(as_json=True)("tune  1/10  loss 2.3")
    Terminal(as_json=False)("tune  2/10  loss 2.2")
    said = capsys.readouterr()
    assert (said.err, said.out) == ("tune  1/10  loss 2.3\n", "tune  2/10  loss 2.2\n")


def test_a_dry_run_states_why_and_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`first` took 90 s in two runs, the first of which was stopped."""
    monkeypatch.delenv("LOOPWRIGHT_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    stages = {
        "first": {"cmd": "false", "deps": ["source.txt"], "outs": ["first.txt"]},
        "last": {"cmd": "false", "deps": ["first.txt"], "outs": ["last.txt"]},
    }
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (tmp_path / "params.yaml").write_text("scale: smoke\n")
    (tmp_path / "source.txt").touch()
    (tmp_path / ".dvc").mkdir()
    history = History("first", Paths(tmp_path))
    (tmp_path / "var/stages").mkdir(parents=True)
    history.open("inputs", afresh=False)
    history.ended(60.0, finished=False)
    history.ended(30.0, finished=True)
    run(dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split("  ")[:3] == ["first", "90 s", ""]
    assert "source.txt" in lines[1]
    assert lines[2].split()[:2] == ["last", "?"]
    assert lines[-1] == "2 of 2 stages may run, 90 s at most by their last results; not known of 1 that never ran here"
    with pytest.raises(InputError, match="--dry-run: changes no file, and --scale and --set do; write them into"):
        run(dry_run=True, set_=["seed=1"])
