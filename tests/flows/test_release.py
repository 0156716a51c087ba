"""The first gate and what needs no release, on a real registry."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from components.config.params import Refused
from components.config.paths import Paths
from components.feedback.store import Store, StoreUnavailable, shared_registry
from components.tracking.registry import ModelVersion, Registry
from components.tracking.version_files import lineage
from flows.release import GateReport, apply_gate, current_release, gate, promote, register, release_states

Register = Callable[..., ModelVersion]


@pytest.fixture
def paths(home: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A project whose pipeline made the model folder with digest `made.dir`."""
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(home))
    root = home.parent
    (root / "dvc.lock").write_text(
        "stages:\n  tune:\n    cmd: x\n    outs:\n    - path: data/models/agent\n      md5: made.dir\n"
    )
    return Paths(root)


def refuse(registry: Registry, version: ModelVersion) -> str:
    with pytest.raises(Refused) as caught:
        apply_gate(registry, version, GateReport(False, "against agent/1: regresses: lookup from 0.938 to 0.875"))
    return str(caught.value)


def test_the_first_model_passes(registry: Registry, registered: Register, paths: Paths) -> None:
    assert gate(registry, registered(0.1), paths, print) == GateReport(True, "there was no champion")


def test_a_model_that_passes_is_told_why(registry: Registry, registered: Register) -> None:
    registry.promote(registered(0.5))
    assert apply_gate(registry, registered(0.6), GateReport(True, "against agent/1: gains")) == "against agent/1: gains"


def test_a_model_that_is_refused_becomes_the_challenger(registry: Registry, registered: Register, paths: Paths) -> None:
    registry.promote(registered(0.5))
    reason = refuse(registry, registered(0.4, model_digest="made.dir"))
    assert reason.startswith("agent/2: refused against agent/1: regresses: lookup from 0.938 to 0.875; overrule with")
    assert 'overrule with "loopwright registry promote agent 2"' in reason
    assert registry.resolve("agent@challenger").version == 2
    assert registry.resolve("agent@champion").version == 1
    with pytest.raises(Refused, match="agent/2: refused"):
        current_release(paths)


def test_a_refusal_holds_only_against_the_same_champion(registry: Registry, registered: Register, paths: Paths) -> None:
    registry.promote(registered(0.5))
    refuse(registry, registered(0.4, model_digest="made.dir"))
    registry.promote(registered(0.3))
    assert current_release(paths) is None, "to be judged again"


def test_a_model_that_the_champion_was_trained_from_is_not_released_again(
    registry: Registry, registered: Register, paths: Paths
) -> None:
    registry.promote(registered(0.5, model_digest="made.dir"))
    registry.promote(registered(0.6, parent="agent/1"))
    found = current_release(paths)
    assert found is not None
    assert (found.version, found.outcome) == ("agent/2", "agent/2 was trained on feedback since agent/1")


def test_nothing_registered_needs_a_release(paths: Paths, registered: Register) -> None:
    assert current_release(paths) is None
    registered(0.5, model_digest="other.dir")
    assert current_release(paths) is None


def test_the_champion_is_current_while_its_bento_is_there(
    registry: Registry, registered: Register, paths: Paths
) -> None:
    registry.promote(registered(0.5, model_digest="made.dir", bento="agent:v1", smoke_answer="Hi."))
    assert current_release(paths) is None, "its Bento is gone"
    params = paths.home / "bento/bentos/agent/v1/src/params.yaml"
    params.parent.mkdir(parents=True)
    assert current_release(paths) is None, "its build was killed"
    params.write_text("")
    found = current_release(paths)
    assert found is not None
    assert (found.version, found.outcome, found.answer) == ("agent/1", "up to date", "Hi.")
    assert found.scores == {"lookup": 0.5}


VALIDATED = "data/validation/datasets"
LOCKED: dict[str, tuple[list[str], list[str]]] = {
    "collect": (["sources", "data/added"], ["data/collected", "data/knowledge"]),
    "validate": (["data/collected"], ["data/validation"]),
    "prepare@decoder": ([f"{VALIDATED}/tune.json"], ["data/tokens/decoder"]),
    "prepare@encoder": ([f"{VALIDATED}/classifier.json", "mail"], ["data/tokens/encoder"]),
    "tune": (["data/tokens/decoder/tune", "data/knowledge"], ["data/models/agent", "data/metrics/tune.json"]),
    "finetune@classifier": (["data/tokens/encoder/classifier"], ["data/models/classifier"]),
    "assess@classifier": (["data/models/classifier", f"{VALIDATED}/classifier.json"], ["data/assessment"]),
    "align": (["data/curated", "data/models/start"], ["data/models/candidate"]),
    "curate": (["data/feedback"], ["data/curated"]),
}
"""What each stage reads and makes."""
DATASETS = {"tune": "chats", "classifier": "letters"}


@pytest.mark.parametrize(
    ("name", "out", "behind"),
    [
        ("agent", "agent", ["data/tokens/decoder/tune", f"{VALIDATED}/tune.json", "data/knowledge", "sources"]),
        (
            "classifier",
            "classifier",
            ["data/tokens/encoder/classifier", f"{VALIDATED}/classifier.json", "mail", "sources"],
        ),
        ("agent", "candidate", ["data/curated", "data/feedback", "data/models/start"]),
    ],
)
def test_a_version_names_what_it_was_made_from_and_nothing_else(
    name: str, out: str, behind: list[str], registry: Registry, paths: Paths
) -> None:
    def entries(names: list[str]) -> list[dict[str, str]]:
        return [{"path": name, "md5": f"digest of {name}"} for name in names]

    stages = {stage: {"deps": entries(deps), "outs": entries(outs)} for stage, (deps, outs) in LOCKED.items()}
    (paths.root / "dvc.lock").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    for section, dataset in DATASETS.items():
        file = paths.validated(section)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({dataset: f"digest of data/collected/{dataset}"}))
    shutil.copy(Path(__file__).parents[2] / "params.yaml", paths.params)
    folder = paths.root / "data/models" / out
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    version = register(registry, paths, name, folder, {"score": 0.5}, {}, "run")
    assert not [key for key in version.tags if key.startswith("dvc.")], "a dozen tags for people to read"
    tags = lineage(version)
    behind += [f"data/collected/{DATASETS[Path(path).stem]}" for path in behind if path.startswith(VALIDATED)]
    assert {key for key in tags if key.startswith("dvc.")} == {f"dvc.{one}" for one in [*behind, f"data/models/{out}"]}
    assert all(tags[f"dvc.{one}"] == f"digest of {one}" for one in behind)
    assert tags["model_digest"] == f"digest of data/models/{out}"


def test_what_was_rolled_back_is_not_promoted_again(registry: Registry, registered: Register, paths: Paths) -> None:
    registry.promote(registered(0.5))
    registry.promote(registered(0.6, model_digest="made.dir"))
    registry.rollback("agent")
    found = current_release(paths)
    assert found is not None
    assert (found.version, found.outcome) == ("agent/1", "agent/2 was rolled back, agent/1 stays")


def make_classifier(paths: Paths) -> None:
    with (paths.root / "dvc.lock").open("a") as lock:
        lock.write(
            "  finetune@classifier:\n    cmd: x\n    outs:\n    - path: data/models/classifier\n      md5: read.dir\n"
        )


def test_each_model_is_released_by_itself(registry: Registry, registered: Register, paths: Paths) -> None:
    make_classifier(paths)
    assert release_states(paths).pending == ["agent", "classifier"]
    registry.promote(registered(0.9, "classifier", model_digest="other.dir"))
    refuse(registry, registered(0.8, "classifier", model_digest="read.dir"))
    found = release_states(paths)
    assert found.pending == ["agent"], "a refusal of one does not stop the others"
    assert found.champions == []
    (refusal,) = found.refusals
    assert refusal.startswith("classifier/2: refused against agent/1: regresses")
    assert 'overrule with "loopwright registry promote classifier 2"' in refusal


def test_a_first_classifier_that_the_baseline_beats_passes_and_is_told_so(
    registry: Registry, registered: Register, paths: Paths
) -> None:
    version = registered(0.7, "classifier", suite="by_symbol")
    registry.log_metrics(version.run_id, {"by_symbol/baseline_macro_f1": 0.75})
    assert gate(registry, registry.resolve(str(version)), paths, print) == GateReport(
        True, "there was no champion; the baseline is better on by_symbol: 0.750 against 0.700"
    )


def test_a_release_that_went_on_after_the_move_leaves_its_row(home: Path, registered: Register) -> None:
    def refused(*_: str) -> None:
        raise StoreUnavailable("the store is locked")

    version, registry = registered(0.5), shared_registry(home)
    with pytest.raises(StoreUnavailable):
        promote(Registry(home, audit=refused), version, "", "there was no champion")
    for _ in range(2):  # as `effect` and the next release do
        promote(registry, version, "", "there was no champion")
    with closing(Store.of(home)) as store:
        assert [row["object"] for row in store.audit_rows("promote")] == ["agent/1"]
