"""Partitions of hosts with one PostgreSQL and one DVC remote: each has what is recorded, and nothing else."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from components.config.loop_settings import FeedbackConfig
from components.config.params import InputError, Params
from components.config.paths import Paths
from components.feedback.ingest import erase_items, ingest
from components.feedback.items import picture_digests, read_items
from components.feedback.leases import Lease, leased
from components.feedback.pictures import PictureFile, reference
from components.feedback.store import AnswerRecord, Store
from components.media.pictures import Picture
from flows import feedback
from flows.feedback import IngestReport, fetch_partitions
from flows.orchestration.prefect_server import free_port
from tests.servers import new_database

CONFIG = FeedbackConfig(max_items=100, max_items_per_user=50, improve_after=5)
REMOTE = "[core]\n    no_scm = true\n    remote = shared\n['remote \"shared\"']\n    url = {}\n"


@pytest.fixture
def store(postgres: str) -> Iterator[Store]:
    with closing(Store(new_database(postgres, f"partitions_{uuid.uuid4().hex[:12]}"))) as store:
        yield store


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Paths]:
    """Three projects with a DVC remote in common."""
    monkeypatch.delenv("LOOPWRIGHT_HOME", raising=False)
    roots = [tmp_path / name for name in ("one", "two", "three")]
    for root in roots:
        (root / ".dvc").mkdir(parents=True)
        (root / ".dvc/config").write_text(REMOTE.format(tmp_path / "remote"))
    return [Paths(root) for root in roots]


def vote(store: Store, number: int, owner: str = "") -> str:
    """A correction of an answer about a picture of its own; returns its id."""
    picture = PictureFile.of(Picture(np.full((6, 8, 3), number, np.uint8)))
    content = [reference(picture.digest), {"type": "text", "text": f"What is {number}?"}]
    body = {"messages": [{"role": "user", "content": content}]}
    answer = AnswerRecord("A cow.", "stop", 5, 5, 0.1)
    store.add_exchange(f"chatcmpl-{number}", "agent/1", body, 1.7e9, answer, [picture], owner=owner)
    return store.add_feedback(f"chatcmpl-{number}", "down", f"A {number}.", user="user:a", owner=owner)


def ingest_here(store: Store, host: Paths) -> None:
    ingest(store, host.feedback, CONFIG, lambda rows: {})


def version_here(store: Store, host: Paths) -> str:
    with leased(store, "ingest") as lease:
        version = ingestion(store, host, lease).version()
    assert version
    return version


def ingestion(store: Store, host: Paths, lease: Lease) -> Any:
    """The ingestion's flow, of which `version` reads no params."""
    return feedback._Job(host, cast(Params, None), store, never, IngestReport(), lease)


def items_of(host: Paths) -> list[str]:
    return [item.feedback_id for item in read_items(host.feedback)]


def contents(host: Paths) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in host.feedback.glob("*.parquet")}


def never(line: str) -> None:
    raise AssertionError(line)


def test_a_host_that_lost_its_lease_marks_nothing_as_versioned(store: Store, hosts: list[Paths]) -> None:
    vote(store, 1)
    ingest_here(store, hosts[0])
    with leased(store, "ingest") as lease:
        assert lease.token is not None
        with pytest.raises(InputError, match="another host has gone on"):
            ingestion(store, hosts[0], replace(lease, token=lease.token + 1)).version()
    assert store.unversioned()
    version_here(store, hosts[0])
    assert not store.unversioned()


def test_what_one_host_erased_comes_back_on_no_other(store: Store, hosts: list[Paths]) -> None:
    host_a, host_b, host_c = hosts
    erased, other = vote(store, 1, owner="ada"), vote(store, 2)
    ingest_here(store, host_a)
    version_here(store, host_a)
    later = vote(store, 3)
    fetch_partitions(host_b, store, never)
    ingest_here(store, host_b)
    version_here(store, host_b)
    assert items_of(host_b) == [erased, other, later]
    fetch_partitions(host_a, store, never)
    assert contents(host_a) == contents(host_b)
    store.erase_user("ada")
    version_here(store, host_a)
    for host in (host_b, host_c):  # one that has the former partition, and one whose disk is empty
        fetch_partitions(host, store, never)
        assert items_of(host) == [other, later]
        assert len(picture_digests(host.feedback)) == 2
        assert contents(host) == contents(host_a)


@pytest.mark.parametrize("lost", ["before it was versioned", "with the remote", "of the remote's files"])
def test_what_no_host_can_send_is_made_from_the_database(
    store: Store, hosts: list[Paths], tmp_path: Path, lost: str
) -> None:
    host_a, host_b, host_c = hosts
    before = [vote(store, 1), vote(store, 2)]
    ingest_here(store, host_a)
    version_here(store, host_a)
    unsent = vote(store, 3)
    ingest_here(store, host_a)
    (name,) = store.unversioned()
    if lost == "with the remote":
        version_here(store, host_a)
        (tmp_path / "remote").rename(tmp_path / "away")
    if lost == "of the remote's files":
        version_here(store, host_a)
        for path in host_a.feedback.glob(f"{name.replace('items', '*')}.parquet"):
            md5 = hashlib.md5(path.read_bytes()).hexdigest()
            (tmp_path / "remote/files/md5" / md5[:2] / md5[2:]).unlink()
    lines: list[str] = []
    fetch_partitions(host_b, store, lines.append)
    assert items_of(host_b) == [*before, unsent]
    assert contents(host_b) == contents(host_a), "the same bytes"
    assert f"{name}: DVC's remote lacks it; it is made anew from the database" in lines
    assert name in store.unversioned(), "the next ingestion sends it"
    version_here(store, host_b)
    ingest_here(store, host_b)
    # DVC takes the files of a folder for pushed where the remote has its list: each host makes them by itself.
    echo = lines.append if lost == "of the remote's files" else never
    for host in (host_a, host_c):
        fetch_partitions(host, store, echo)
        assert contents(host) == contents(host_b)


def test_a_remote_that_does_not_answer_lacks_nothing(
    store: Store, hosts: list[Paths], monkeypatch: pytest.MonkeyPatch
) -> None:
    host_a, host_b, _ = hosts
    vote(store, 1)
    ingest_here(store, host_a)
    version_here(store, host_a)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    options = {"endpointurl": f"http://127.0.0.1:{free_port()}", "access_key_id": "a", "secret_access_key": "b"}
    away = "\n    ".join(["s3://bucket", *(f"{name} = {value}" for name, value in options.items())])
    (host_b.root / ".dvc/config").write_text(REMOTE.format(away))
    with pytest.raises(InputError, match="data/feedback: DVC: 1 files failed to download"):
        fetch_partitions(host_b, store, never)


def test_an_erasure_whose_host_was_lost_is_made_up_for(store: Store, hosts: list[Paths]) -> None:
    host_a, host_b, _ = hosts
    vote(store, 1, owner="ada")
    vote(store, 2, owner="bob")
    other = vote(store, 3)
    ingest_here(store, host_a)
    version_here(store, host_a)
    fetch_partitions(host_b, store, never)
    store.erase_user("ada")
    erase_items(store, host_a.feedback)  # and it is lost before it versions this
    store.erase_user("bob")
    fetch_partitions(host_b, store, lambda line: None)
    assert (items_of(host_b), len(picture_digests(host_b.feedback))) == ([other], 1)
    assert store.erased_items() == {}
    version_here(store, host_b)
    fetch_partitions(host_a, store, never)
    assert contents(host_a) == contents(host_b)


def test_a_partition_without_a_record_is_removed(store: Store, hosts: list[Paths]) -> None:
    host_a, host_b, host_c = hosts

    def lost(*_: object) -> None:
        raise InterruptedError

    vote(store, 1)
    commit: Callable[..., None] = store.commit_partition
    store.commit_partition = lost  # type: ignore[method-assign]
    with pytest.raises(InterruptedError):
        ingest_here(store, host_a)
    store.commit_partition = commit  # type: ignore[method-assign]
    vote(store, 2)
    ingest(store, host_b.feedback, CONFIG, lambda rows: dict.fromkeys(range(len(rows)), "wrong"))
    assert len(contents(host_a)) == 2, "a partition and its pictures"
    fetch_partitions(host_a, store, never)
    assert contents(host_a) == {}
    later = vote(store, 3)
    ingest_here(store, host_c)
    assert items_of(host_c) == [later], "an empty disk is no error where nothing was accepted yet"


def test_partitions_of_another_store_are_not_replaced(store: Store, hosts: list[Paths], tmp_path: Path) -> None:
    host_a, _, _ = hosts
    with closing(Store.of(tmp_path / "former")) as former:
        mine = vote(former, 1)
        ingest_here(former, host_a)
    vote(store, 1)
    with pytest.raises(InputError, match="holds votes of another store"):
        fetch_partitions(host_a, store, never)
    assert items_of(host_a) == [mine]
