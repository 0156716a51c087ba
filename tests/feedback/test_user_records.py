"""Records of one person: all of them and no one else's are exported and erased, and each such act is on record."""

from __future__ import annotations

import io
import json
import os
import pwd
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from components.config.errors import InputError
from components.feedback.ledger import Outcome
from components.feedback.pictures import PictureFile, reference
from components.feedback.store import AnswerRecord, Store, UnknownCompletion
from components.tracking.registry import Registry
from loopwright.cli import app

SECRET = "the word of ada"
ANSWER = AnswerRecord(SECRET, "stop", 1, 1, 0.5, steps=[{"type": "call", "name": SECRET, "arguments": {}}])
DIGESTS = ("a" * 64, "b" * 64)


def body(user: str | None = None, *digests: str) -> dict[str, object]:
    content = [{"type": "text", "text": SECRET}, *map(reference, digests)]
    return {"messages": [{"role": "user", "content": content}], **({"user": user} if user else {})}


def picture(digest: str) -> PictureFile:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return PictureFile(digest, 1, 1, file.getvalue())


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    """The answers c1 and c2 of ada, c3 and c4 of the owner shop, c4 for its user ada, and c5 without a key."""
    store = Store.of(home)
    shared = [picture(digest) for digest in DIGESTS]
    store.add_exchange("c1", "agent/1", body(None, *DIGESTS), 1.0, ANSWER, shared, owner="ada")
    store.add_exchange("c2", "agent/1", body(), 2.0, ANSWER, owner="ada")
    store.add_exchange("c3", "agent/1", body(None, DIGESTS[1]), 3.0, ANSWER, shared[1:], owner="shop")
    store.add_exchange("c4", "agent/1", body("bob"), 4.0, ANSWER, owner="shop")
    store.add_exchange("c5", "agent/1", body(), 5.0, ANSWER)
    yield store
    store.close()


def test_erasing_an_owner_leaves_nothing_of_them_and_all_of_others(store: Store, tmp_path: Path) -> None:
    own = store.add_feedback("c1", "down", SECRET, SECRET, "key", "user:ada", owner="ada")
    on_others = store.add_feedback("c3", "down", SECRET, SECRET, "key 2", "user:ada", owner="ada")
    others = store.add_feedback("c4", "up", owner="shop")
    votes = store.behind_watermark(9)
    outcomes = [Outcome(vote["id"], vote["sequence"], "accepted", None, "user:ada", 1.0, "d") for vote in votes[:1]]
    store.commit_partition("items-1-1", "digest", outcomes)
    before = store.completion("c4")
    records = store.erase_user("ada")
    assert (records.completions, records.votes) == (["c1", "c2"], [own, on_others])
    assert store.completion("c4") == before
    with pytest.raises(UnknownCompletion):
        store.completion("c2")
    emptied = store.completion("c1")
    assert (emptied["request"], emptied["answer"], emptied["owner"]) == ({"messages": []}, None, "")
    vote = emptied["feedback"][0]
    assert (vote["correction"], vote["comment"], vote["idempotency_key"], vote["voice"]) == (None, None, None, "")
    assert store.known_pictures(DIGESTS) == {DIGESTS[1]}
    assert store.withdrawn() == {own: "revoked"}
    assert {vote["id"]: vote["revoked"] for vote in store.behind_watermark(9)} == {on_others: on_others, others: None}
    with pytest.raises(InputError, match="ada: no record has this owner or user"):
        store.erase_user("ada")
    [row] = store.audit_rows("erase-user")
    assert (row["actor"], row["object"]) == (pwd.getpwuid(os.geteuid()).pw_name, "ada")
    assert row["detail"] == "2 requests, 2 votes"


def test_a_user_of_several_owners_is_of_one_at_a_time(store: Store) -> None:
    store.add_exchange("c6", "agent/1", body("bob"), 6.0, ANSWER, owner="ada")
    store.add_exchange("c7", "agent/1", body("bob"), 7.0, ANSWER)
    with pytest.raises(InputError, match="bob: records of the owners '', 'ada', 'shop'; choose one with --owner"):
        store.user_records("bob")
    chosen = {owner: store.user_records("bob", owner).completions for owner in ("", "ada", "shop")}
    assert chosen == {"": ["c7"], "ada": ["c6"], "shop": ["c4"]}
    with pytest.raises(InputError, match="no record"):
        store.user_records("bob", "nobody")


@pytest.fixture
def run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """The command in a project."""
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(home))

    def run(*words: str) -> tuple[int, str]:
        ended = CliRunner().invoke(app, list(words))
        return ended.exit_code, ended.stdout

    return run


def test_export_and_erasure_name_the_models_that_were_trained_on_the_votes(
    store: Store,
    run: Callable[..., tuple[int, str]],
    registry: Registry,
    registered: Callable[..., object],
    tmp_path: Path,
) -> None:
    vote = store.add_feedback("c1", "up", owner="ada")
    folder = registry.home / "agent"
    folder.mkdir(exist_ok=True)
    (folder / "lessons.json").write_text(json.dumps({"parent": None, "feedback": [vote]}))
    registered(0.5, "agent")
    code, out = run("data", "export-user", "ada", "out", "--json")
    assert code == 0
    report = json.loads(out)
    assert (report["requests"], report["votes"], report["models"]) == (2, 1, {"agent/1": [vote]})
    lines = (tmp_path / "out" / "completions.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["c1", "c2"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [f"{digest}.png" for digest in DIGESTS]
    code, out = run("data", "erase-user", "ada", "--json")
    assert (code, json.loads(out)) == (0, {"requests": 2, "votes": 1, "models": {"agent/1": [vote]}})
    assert run("registry", "promote", "agent", "1")[0] == 0
    code, out = run("audit", "list", "--json")
    assert [row["action"] for row in json.loads(out)] == ["export-user", "erase-user", "promote"]
    assert run("audit", "export", "log.jsonl")[0] == 0
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_what_is_done_to_keys_is_on_record(run: Callable[..., tuple[int, str]]) -> None:
    run("keys", "create", "web", "--expires", "90d", "--owner", "shop", "--json")
    assert run("keys", "rotate", "web", "--grace", "1h", "--json")[0] == 0
    listed = json.loads(run("keys", "list", "--json")[1])
    assert [key["owner"] for key in listed] == ["shop", "shop"]
    assert run("keys", "revoke", listed[1]["id"])[0] == 0
    rows = json.loads(run("audit", "list", "--json")[1])
    assert [(row["action"], row["object"]) for row in rows] == [
        ("key create", listed[0]["id"]),
        ("key rotate", listed[0]["id"]),
        ("key revoke", listed[1]["id"]),
    ]
    assert all(row["actor"] for row in rows)
