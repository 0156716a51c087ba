"""The championship moves in one write: no kill leaves a registry that reads wrongly, and going back restores it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from components.config.params import InputError
from components.config.paths import Paths
from components.feedback.audit import Action
from components.feedback.store import Store, shared_registry
from components.runtime.process import os_user
from components.tracking.mlflow_database import EXPERIMENT
from components.tracking.registry import ModelVersion, Registry
from flows.bento import package
from loopwright.models import import_
from serving.models.versions import Registered

Register = Callable[..., ModelVersion]
CALLS = 10
"""More than a move makes."""


class Killed(BaseException):
    """Stands for a process that ends here: nothing of ours runs after it."""


class Mortal:
    """An MLflow client whose process is killed before its call number `left` that changes something."""

    def __init__(self, client: Any, left: int) -> None:
        self.client, self.left = client, left

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("set_", "delete_")):
            if not self.left:
                raise Killed
            self.left -= 1
        return getattr(self.client, name)


def mortal(registry: Registry, left: int) -> Registry:
    doomed = Registry(registry.home, registry._lock, registry._audit)
    vars(doomed)["client"] = Mortal(registry.client, left)
    return doomed


def direct(registry: Registry) -> dict[str, int]:
    """The aliases as MLflow has them, for programs that know nothing of us."""
    aliases = registry.client.get_registered_model("agent").aliases
    return {alias: int(version) for alias, version in aliases.items()}


@pytest.mark.parametrize("left", range(CALLS))
def test_kill_between_any_two_writes_reads_as_before_or_after(
    registry: Registry, registered: Register, left: int
) -> None:
    first, second = registered(0.5), registered(0.6)
    registry.promote(first)
    registry.alias("agent", "challenger", second)
    registry.tag(second, {"rolled_back": "true"})
    before, after = {"champion": 1, "challenger": 2}, {"champion": 2, "previous": 1}
    with suppress(Killed):
        mortal(registry, left).promote(second)
    seen = Registry(registry.home).aliases("agent")
    assert seen == (after if direct(registry)["champion"] == 2 else before)
    assert registry.resolve("agent/2").tags["rolled_back"] == str(seen == before).lower()
    with suppress(InputError):  # it is the champion already
        registry.promote(second)
    assert registry.aliases("agent") == after
    with suppress(Killed):
        mortal(registry, left).rollback("agent")
    back = {"champion": 1, "previous": 2}
    assert registry.aliases("agent") == (back if direct(registry)["champion"] == 1 else after)
    if registry.aliases("agent") == back:
        assert registry.resolve("agent/2").tags["rolled_back"] == "true"


@pytest.mark.parametrize("left", range(CALLS))
def test_kill_within_a_demotion_leaves_one_that_can_be_repeated(
    registry: Registry, registered: Register, left: int
) -> None:
    for version in [registered(score / 10) for score in range(3)]:
        registry.promote(version)
    with suppress(Killed):
        mortal(registry, left).demote(registry.resolve("agent/3"), "says nothing")
    assert registry.aliases("agent") in ({"champion": 3, "previous": 2}, {"champion": 2, "previous": 1})
    registry.demote(registry.resolve("agent/3"), "says nothing")
    assert registry.aliases("agent") == {"champion": 2, "previous": 1}
    assert registry.resolve("agent/3").tags["rolled_back"] == "true"


def test_aliases_in_mlflow_follow_each_change(registry: Registry, registered: Register) -> None:
    versions = [registered(score / 10) for score in range(3)]
    registry.promote(versions[0])
    registry.alias("agent", "challenger", versions[1])
    registry.promote(versions[1])
    assert direct(registry) == registry.aliases("agent") == {"champion": 2, "previous": 1}
    registry.promote(versions[2])
    registry.rollback("agent")
    assert direct(registry) == registry.aliases("agent") == {"champion": 2, "previous": 3}


def test_a_registry_of_an_earlier_release_reads_the_same(registry: Registry, registered: Register) -> None:
    """Which had aliases and no tag `previous`, and the last move as a tag of the model."""
    for number, alias in enumerate(("previous", "champion", "challenger"), start=1):
        registered(number / 10)
        registry.client.set_registered_model_alias("agent", alias, str(number))
    registry.client.set_registered_model_tag("agent", "move", '{"before": {}, "after": {}, "tags": {}, "done": true}')
    before = {"previous": 1, "champion": 2, "challenger": 3}
    assert registry.aliases("agent") == before
    registry.promote(registered(0.9))
    assert registry.aliases("agent") == {"previous": 2, "champion": 4, "challenger": 3}
    assert registry.demote(registry.resolve("agent/4"), "says nothing")
    assert registry.aliases("agent") == before


def test_demotion_restores_every_alias_and_happens_once(registry: Registry, registered: Register) -> None:
    versions = [registered(score / 10) for score in range(4)]
    for version in versions[:2]:
        registry.promote(version)
    registry.alias("agent", "challenger", versions[3])
    before = registry.aliases("agent")
    assert before == {"champion": 2, "previous": 1, "challenger": 4}
    registry.promote(versions[2])
    assert registry.demote(versions[2], "says nothing")
    assert registry.aliases("agent") == before
    assert not registry.demote(versions[2], "says nothing"), "another server was first"
    assert registry.aliases("agent") == before
    tags = registry.resolve("agent/3").tags
    assert (tags["smoke_failed"], tags["rolled_back"]) == ("says nothing", "true")
    registry.promote(registry.resolve("agent/3"))
    assert registry.resolve("agent/3").tags["smoke_failed"] == "", "a person's word counts more"


def test_demotion_keeps_the_challenger(registry: Registry, registered: Register) -> None:
    first, second, third = registered(0.4), registered(0.5), registered(0.6)
    registry.promote(first)
    registry.promote(second)
    registry.alias("agent", "challenger", third)
    assert registry.demote(second, "says nothing")
    assert registry.aliases("agent") == {"champion": 1, "challenger": 3}


def test_sole_champion_that_fails_stays(registry: Registry, registered: Register) -> None:
    version = registered(0.5)
    registry.promote(version)
    assert not registry.demote(version, "says nothing")
    assert registry.aliases("agent") == {"champion": 1}
    assert registry.resolve("agent/1").tags["smoke_failed"] == "says nothing"
    assert registry.aliases("nobody") == {}


def test_a_promotion_against_another_champion_than_the_one_compared_with_is_refused(
    registry: Registry, registered: Register
) -> None:
    versions = [registered(score) for score in (0.5, 0.6, 0.7)]
    registry.promote(versions[0], expected="")
    registry.promote(versions[1], expected="agent/1")
    message = "agent/3: was compared with agent/1, and agent/2 is the champion now; run it again"
    with pytest.raises(InputError, match=message):
        registry.promote(versions[2], expected="agent/1")
    with pytest.raises(InputError, match="agent/3: was compared with no champion"):
        registry.promote(versions[2], expected="")
    assert registry.aliases("agent") == {"champion": 2, "previous": 1}


def test_of_two_rollbacks_at_once_one_is_made(registry: Registry, registered: Register) -> None:
    for score in (0.5, 0.6):
        registry.promote(registered(score))
    first = Registry(registry.home)

    @contextmanager
    def while_another_rolls_back() -> Iterator[None]:
        first.client.set_registered_model_alias("agent", "champion", "1")
        yield

    with pytest.raises(InputError, match="agent: agent/1 has become the champion meanwhile"):
        Registry(registry.home, while_another_rolls_back).rollback("agent")
    assert registry.aliases("agent")["champion"] == 1


def test_a_failure_on_another_device_than_that_of_the_release_demotes_nothing(home: Path, registered: Register) -> None:
    registry = shared_registry(home)
    versions = [registered(score) for score in (0.5, 0.6)]
    registry.tag(versions[1], {"smoke_device": "cuda bfloat16"})
    for version in versions:
        registry.promote(version)
    source = Registered(registry)
    source.mark_failed(versions[1], "an empty answer", "cpu float32")
    assert registry.aliases("agent") == {"champion": 2, "previous": 1}
    assert registry.resolve("agent/2").tags["smoke_failed cpu float32"] == "an empty answer"
    source.mark_failed(versions[1], "an empty answer", "cuda bfloat16")
    assert registry.aliases("agent")["champion"] == 1
    with closing(Store.of(registry.home)) as store:
        (row,) = store.audit_rows("rollback")
    assert (row["object"], row["detail"]) == ("agent/2", "by the endpoint: an empty answer")


def audited(registry: Registry, action: Action) -> list[tuple[str, str, str]]:
    with closing(Store.of(registry.home)) as store:
        return [(row["actor"], row["object"], row["detail"]) for row in store.audit_rows(action)]


def moved(registry: Registry) -> list[tuple[str, str, str]]:
    return audited(registry, "moved")


def test_a_champion_that_another_program_made_has_one_row_in_the_audit_log(home: Path, registered: Register) -> None:
    registry = shared_registry(home)
    registry.promote(registered(0.5))
    registered(0.6)
    sources = [Registered(registry), Registered(shared_registry(home))]
    for source in sources:
        assert source.resolve("agent@champion") == ("agent/1", None)
    registry.client.set_registered_model_alias("agent", "champion", "2")  # as MLflow's page does
    for source in sources:
        assert source.resolve("agent@champion") == ("agent/2", None)
    row = ("unknown", "agent/2", "outside of Loopwright; the champion was agent/1")
    assert moved(registry) == [row]
    registry.promote(registry.resolve("agent/1"))
    registry.audit_last_move("agent")
    assert moved(registry) == [row], "that was ours"


def test_the_log_that_is_away_delays_no_model(
    home: Path, registered: Register, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = shared_registry(home)
    registered(0.5)
    source = Registered(registry)
    registry.client.set_registered_model_alias("agent", "champion", "1")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "add_audit", None)
        assert source.resolve("agent@champion") == ("agent/1", None)
    assert "no row yet of who made agent/1 champion" in caplog.text
    assert moved(registry) == []
    source.resolve("agent@champion")
    assert moved(registry) == [("unknown", "agent/1", "outside of Loopwright; the champion was agent/0")]


@pytest.mark.parametrize("left", range(CALLS))
def test_a_move_that_was_killed_is_on_record_as_this_projects_own(home: Path, registered: Register, left: int) -> None:
    registry = shared_registry(home)
    registry.promote(registered(0.5), detail="imported")
    with suppress(Killed):
        mortal(registry, left).promote(registered(0.6))
    is_moved = registry.aliases("agent")["champion"] == 2
    registry.audit_last_move("agent")
    rows = audited(registry, "promote")
    assert rows[0] == (os_user(), "agent/1", "imported")
    assert {row[:2] for row in rows[1:]} == ({(os_user(), "agent/2")} if is_moved else set())
    registry.audit_last_move("agent")
    assert (audited(registry, "promote"), moved(registry)) == (rows, [])


def test_a_move_whose_row_could_not_be_written_gets_it_before_the_next_move(home: Path, registered: Register) -> None:
    registry = shared_registry(home)
    registry.promote(registered(0.5))

    def killed(*_: str) -> None:
        raise Killed

    with pytest.raises(Killed):
        Registry(home, audit=killed).promote(registered(0.6), detail="better")
    registry.rollback("agent")
    assert audited(registry, "promote")[1:] == [(os_user(), "agent/2", "its process was killed meanwhile")]
    assert audited(registry, "rollback") == [(os_user(), "agent/1", None)]


def test_the_stamp_is_another_one_after_each_write(
    registry: Registry, registered: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = registered(0.1)
    before = registry.stamp()
    assert before
    assert registry.aliases("agent") == {}
    assert registry.stamp() == before, "reading is no change"
    registry.promote(version)
    assert registry.stamp() != before
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert registry.stamp() is None, "the file here says nothing of a server's"


def test_a_disk_that_fills_up_leaves_nothing_of_a_version(
    registry: Registry, registered: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(0.5)

    def fill(run_id: str, folder: str, name: str) -> None:
        shutil.copytree(folder, registry.home / "mlflow/artifacts" / run_id / "artifacts" / name)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(registry.client, "log_artifacts", fill)
    with pytest.raises(OSError, match="No space left"):
        registered(0.6)
    assert [str(version) for version in registry.versions("agent")] == ["agent/1"]
    kept = {path.name for path in (registry.home / "mlflow/artifacts").iterdir()}
    assert kept == {registry.resolve("agent/1").run_id}
    assert not [path for path in registry.home.iterdir() if path.name.startswith("tmp")]
    runs = registry.client.search_runs([registry.client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED"]


def test_models_whose_bentos_would_have_one_tag_are_not_mixed_up(
    registry: Registry, registered: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(registry.home))
    for name in ("agent", "Agent"):
        registered(0.5, name=name)
    for name, twin in (("agent", "Agent"), ("Agent", "agent")):
        with pytest.raises(InputError, match=rf"{name}/1: BentoML ignores case, and {twin} is registered too"):
            package(Paths(registry.home.parent), f"{name}/1")


@pytest.mark.parametrize("name", ["", "a b", "-a", "a-", "a.", "ä", "a/b", "a:b", "a" * 64])
def test_a_name_that_another_tool_would_refuse_is_refused_at_import(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--name: .* 1 to 63 letters, digits, '.', '_' and '-'"):
        import_(tmp_path, name)
