"""Ingestion takes each vote exactly once, masks, quarantines with a reason, and survives kill -9 anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config.loop_settings import FeedbackConfig
from components.config.params import InputError, Refused
from components.datasets.formats import Row
from components.feedback.ingest import IngestResult, erase_items, ingest, revocations_are_written, write_revocations
from components.feedback.items import SCHEMA, prompt_key, read_items, read_pictures
from components.feedback.pictures import PictureFile, UnknownPicture, reference
from components.feedback.store import AnswerRecord, Store
from components.feedback.votes import content_digest, item_features, item_of
from components.media.messages import IMAGE
from components.media.pictures import Picture, decode_picture
from components.validation.validate import Validator

ROOT = Path(__file__).parents[2]
CONFIG = FeedbackConfig(max_items=100, max_items_per_user=50, improve_after=5)
CALL = {"type": "call", "name": "lookup", "arguments": {"name": "json.dumps"}}
ANSWER = AnswerRecord("yes", "stop", 1, 1, 0.1)
RESULT = {"type": "result", "name": "lookup", "content": "Serialize obj. Mail jane.doe@acme.io"}


def passes(rows: Sequence[Row]) -> Mapping[int, str]:
    return {}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.of(tmp_path)
    yield store
    store.close()


@pytest.fixture(scope="module")
def validator() -> Validator:
    return Validator(ROOT / "data/expectations")


def said(
    store: Store,
    number: int,
    rating: str = "down",
    correction: str | None = None,
    user: str = "user:a",
    question: str | None = None,
    answer: str | None = "It is this.",
    comment: str | None = None,
    model: str = "agent/1",
) -> str:
    """A question, its answer and a vote on it; returns the vote's id."""
    completion = f"chatcmpl-{number}"
    messages = [{"role": "user", "content": question or f"What does f{number} do?"}]
    store.add_request(completion, model, {"messages": messages})
    if answer is not None:
        store.add_answer(completion, AnswerRecord(answer, "stop", 5, 5, 0.1, [CALL, RESULT]))
    assert rating in ("up", "down")
    return store.add_feedback(completion, "up" if rating == "up" else "down", correction, comment, None, user)


def states(store: Store) -> dict[str, tuple[str, str | None]]:
    return {vote["id"]: (vote["status"], vote["reason"]) for vote in store.votes(10_000)}


def test_a_vote_becomes_one_row_with_the_answer_it_is_about(store: Store, tmp_path: Path) -> None:
    vote = said(store, 1, correction="Better.", comment="hm")
    assert ingest(store, tmp_path / "feedback", CONFIG, passes) == IngestResult("items-000000001-000000001", 1, {})
    (item,) = read_items(tmp_path / "feedback")
    assert (item.feedback_id, item.sequence, item.completion_id) == (vote, 1, "chatcmpl-1")
    assert (item.model, item.answer, item.correction, item.comment) == ("agent/1", "It is this.", "Better.", "hm")
    assert (item.rating, item.voice, item.skill, item.tools) == ("down", "user:a", "lookup", None)
    assert item.messages[0]["content"] == "What does f1 do?"
    assert json.loads(item.steps)[0] == CALL
    assert "<EMAIL_ADDRESS>" in item.steps


def test_votes_on_other_models_answers_are_no_lessons_for_the_agent(store: Store, tmp_path: Path) -> None:
    kept, summary = said(store, 1), said(store, 2, correction="Add two numbers.", model="summarizer/3")
    result = ingest(store, tmp_path / "feedback", CONFIG, passes)
    assert (result.accepted, [item.feedback_id for item in read_items(tmp_path / "feedback")]) == (1, [kept])
    assert states(store)[summary] == ("quarantined", "An answer of summarizer/3: the agent is not trained on it")


def test_each_run_takes_what_came_since_and_no_more_than_it_may(store: Store, tmp_path: Path) -> None:
    votes = [said(store, number) for number in range(5)]
    few = CONFIG.model_copy(update={"max_items": 2})
    names = [ingest(store, tmp_path / "feedback", few, passes).partition for _ in range(4)]
    assert names == ["items-000000001-000000002", "items-000000003-000000004", "items-000000005-000000005", None]
    assert [item.feedback_id for item in read_items(tmp_path / "feedback")] == votes
    assert (store.fresh(), store.waiting(), store.last_accepted_sequence()) == (0, 5, 5)
    store.add_improvement(3, "agent/2", "promoted", "better")
    assert store.waiting() == 2


def test_content_parts_are_flattened_and_the_clients_tools_kept(store: Store) -> None:
    parts = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]
    body = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "this"}]}], "tools": [{"a": 1}]}
    store.add_request("c", "agent/1", body)
    store.add_answer("c", AnswerRecord("yes", "stop", 1, 1, 0.1))
    store.add_feedback("c", "up")
    (vote,) = store.behind_watermark(1)
    item = item_of(vote)
    assert item["messages"][0]["content"] == "see\nthis"
    assert item["tools"] == '[{"a": 1}]'
    assert item["skill"] == "conversation"


def seen(store: Store, number: int, pictures: Sequence[Picture], *texts: str, **vote: Any) -> str:
    """A question with pictures between texts, its answer and a vote on it; returns the vote's id."""
    parts = [{"type": "text", "text": texts[0]}]
    for picture, text in zip(pictures, texts[1:], strict=True):
        parts += [reference(picture.digest), {"type": "text", "text": text}]
    body = {"messages": [{"role": "user", "content": parts}]}
    answer = AnswerRecord("A <image>.", "stop", 5, 5, 0.1)
    files = [PictureFile.of(picture) for picture in pictures]
    store.add_exchange(f"chatcmpl-{number}", "agent/1", body, 1.7e9, answer, files)
    return store.add_feedback(f"chatcmpl-{number}", "down", **vote)


def picture(seed: int) -> Picture:
    return Picture(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8))


def test_an_item_has_its_pictures_and_the_folder_each_once(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "feedback"
    one, two, three = map(picture, range(3))
    seen(store, 1, [two, one], "Is ", " an <image> like ", "?", correction="No <image>.")
    seen(store, 2, [one], "", "?", correction="A cat.")
    ingest(store, folder, CONFIG, passes)
    first, second = read_items(folder)
    assert first.messages[0]["content"] == f"Is \n{IMAGE}\n an <image > like \n{IMAGE}\n?"
    assert (first.images, second.images) == ([two.digest, one.digest], [one.digest])
    assert (first.answer, first.correction) == ("A <image >.", "No <image >.")
    assert pq.read_metadata(folder / "pictures-000000001-000000002.parquet").num_rows == 2
    seen(store, 3, [one, three], "", "", "?", correction="A dog.")
    seen(store, 4, [one], "", "?", correction="A dog.")
    ingest(store, folder, CONFIG, passes)
    assert pq.read_table(folder / "pictures-000000003-000000004.parquet")["digest"].to_pylist() == [three.digest]
    files = read_pictures(folder, {each.digest for each in (one, two, three)})
    assert {decode_picture(content, "file").digest for content in files.values()} == set(files)
    with pytest.raises(InputError, match="has no picture 0000"):
        read_pictures(folder, {"0" * 64})
    assert len(list(read_items(folder))) == 4


def test_votes_on_the_same_words_about_other_pictures_are_no_duplicates(store: Store, tmp_path: Path) -> None:
    votes = [seen(store, number, [picture(number % 2)], "", "What?", correction="A cat.") for number in range(3)]
    ingest(store, tmp_path / "feedback", CONFIG, passes)
    found = states(store)
    assert [found[vote][0] for vote in votes] == ["accepted", "accepted", "quarantined"]
    assert len({prompt_key(item.messages, item.images) for item in read_items(tmp_path / "feedback")}) == 2


def test_a_secret_before_a_picture_takes_no_mark_with_it(store: Store, tmp_path: Path) -> None:
    seen(store, 1, [picture(1)], "-----BEGIN PRIVATE KEY-----abcdef", "?", correction="A cat.")
    ingest(store, tmp_path / "feedback", CONFIG, passes)
    (item,) = read_items(tmp_path / "feedback")
    assert item.messages[0]["content"] == f"<SECRET>{IMAGE}\n?"


def test_an_item_without_its_picture_is_quarantined(store: Store, tmp_path: Path) -> None:
    lost = seen(store, 1, [picture(1)], "", "?", correction="A cat.")
    with store._write() as connection:
        connection.exec_driver_sql("DELETE FROM request_pictures")
        connection.exec_driver_sql("DELETE FROM pictures")
    ingest(store, tmp_path / "feedback", CONFIG, passes)
    assert states(store)[lost] == ("quarantined", "A picture of the request is not stored")
    assert list((tmp_path / "feedback").iterdir()) == []


def test_pictures_of_a_killed_run_are_written_again(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "feedback"
    seen(store, 1, [picture(1)], "", "?", correction="A cat.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "commit_partition", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            ingest(store, folder, CONFIG, passes)
    seen(store, 2, [picture(2)], "", "?", correction="A dog.")
    ingest(store, folder, CONFIG, passes)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["items-000000001-000000002.parquet", "pictures-000000001-000000002.parquet"]
    assert set(read_pictures(folder, {picture(1).digest, picture(2).digest})) == {picture(1).digest, picture(2).digest}


def test_items_of_a_partition_before_pictures_have_none(tmp_path: Path) -> None:
    path = tmp_path / "items-000000001-000000001.parquet"
    table = pa.Table.from_pylist([{"feedback_id": "fb-1", "messages": [], "steps": "[]"}], schema=SCHEMA)
    pq.write_table(table.drop_columns(["images"]), path)
    (item,) = read_items(tmp_path)
    assert item.images == []


def test_what_was_to_be_json_is_asked_for_as_the_model_was(store: Store) -> None:
    schema = {"type": "object", "properties": {"answer": {"type": "string"}, "sure": {"type": "boolean"}}}
    form = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}
    messages = [{"role": "user", "content": "What does f do?"}]
    for number, given in enumerate(({"type": "text"}, {"type": "json_object"}, form)):
        store.add_request(f"c{number}", "agent/1", {"messages": messages, "response_format": given})
        store.add_answer(f"c{number}", AnswerRecord("{}", "stop", 1, 1, 0.1))
        store.add_feedback(f"c{number}", "down", '{"answer": "x"}')
    words, anything, named = map(item_of, store.behind_watermark(9))
    assert [message["role"] for message in words["messages"]] == ["user"]
    assert (words["skill"], anything["skill"], named["skill"]) == ("conversation", "form", "form")
    said = [item["messages"][0]["content"] for item in (anything, named)]
    assert said == ["Answer in JSON", "Answer in JSON: answer, sure"]


def test_secrets_and_personal_data_never_reach_a_partition(store: Store, tmp_path: Path) -> None:
    key = "AKIA" + "QYLPMN5HHHFPZAM2"
    said(store, 1, question=f"my key {key}", answer=f"it is {key}", correction=f"say {key} no more", comment=key)
    only = said(store, 2, correction=key)
    taken = ingest(store, tmp_path / "feedback", CONFIG, passes)
    assert taken.quarantined == {"The correction is nothing but a secret": 1}
    assert states(store)[only] == ("quarantined", "The correction is nothing but a secret")
    (item,) = read_items(tmp_path / "feedback")
    assert item.correction == "say <SECRET> no more"
    assert item.comment == "<SECRET>"
    for file in (tmp_path / "feedback").iterdir():
        assert key.encode() not in file.read_bytes()
    assert key not in repr(item)


def test_the_same_voice_saying_the_same_again_is_a_duplicate(store: Store, tmp_path: Path) -> None:
    said(store, 1, correction="Better.", question="What does f do?")
    again = said(store, 2, correction="Better.", question="what does f do")
    other = said(store, 3, correction="Better.", question="What does f do?", user="user:b")
    ingest(store, tmp_path / "feedback", CONFIG, passes)
    later = said(store, 4, correction="Better.", question="What does f do?")
    ingest(store, tmp_path / "feedback", CONFIG, passes)
    found = states(store)
    for vote in (again, later):
        assert found[vote] == ("quarantined", "Duplicate of an earlier vote of the same user")
    assert found[other] == ("accepted", None)


def test_the_same_vote_sent_twice_leaves_the_later_one_standing(store: Store, tmp_path: Path) -> None:
    first = said(store, 1, "up")
    ingest(store, tmp_path / "feedback", CONFIG, passes)
    second = store.add_feedback("chatcmpl-1", "up", user="user:a")
    assert ingest(store, tmp_path / "feedback", CONFIG, passes).accepted == 1
    assert store.withdrawn() == {first: "replaced"}
    assert states(store)[second] == ("accepted", None)
    assert store.waiting() == 1


def test_one_voice_cannot_flood(store: Store, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_items_per_user": 3})
    loud = [said(store, number) for number in range(4)]
    ingest(store, tmp_path / "feedback", config, passes)
    louder, quiet = said(store, 10), said(store, 11, user="user:b")
    ingest(store, tmp_path / "feedback", config, passes)
    found = states(store)
    assert [found[vote][0] for vote in loud] == ["accepted"] * 3 + ["quarantined"]
    assert found[louder] == ("quarantined", "The user has reached the limit of 3 votes in 24 hours")
    assert found[quiet] == ("accepted", None)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(("hours", "status"), [(1, "quarantined"), (23.9, "quarantined"), (24.1, "accepted")])
def test_votes_of_the_last_day_count_against_a_voice(
    store: Store, tmp_path: Path, hours: float, status: str, at_once: bool
) -> None:
    config = CONFIG.model_copy(update={"max_items_per_user": 2})
    for number in range(2):
        said(store, number)
    with store._write() as connection:
        connection.exec_driver_sql(f"UPDATE feedback SET created = created - {hours * 3600}")
    if not at_once:
        ingest(store, tmp_path / "feedback", config, passes)
    third = said(store, 3)
    ingest(store, tmp_path / "feedback", config, passes)
    assert states(store)[third][0] == status


def test_what_was_never_answered_replaced_or_revoked_is_quarantined(store: Store, tmp_path: Path) -> None:
    unanswered = said(store, 1, answer=None)
    replaced = said(store, 2)
    standing = store.add_feedback("chatcmpl-2", "up", user="user:a")
    revoked = said(store, 3)
    store.revoke(revoked, "poison")
    ingest(store, tmp_path / "feedback", CONFIG, passes)
    found = states(store)
    assert found[unanswered] == ("quarantined", "The request was never answered")
    assert found[replaced] == ("quarantined", "Replaced by a later vote before ingestion")
    assert found[revoked][0] == "revoked"
    assert found[standing] == ("accepted", None)
    assert [item.feedback_id for item in read_items(tmp_path / "feedback")] == [standing]
    assert store.withdrawn() == {}


def test_quarantine_alone_moves_the_watermark_and_writes_no_file(store: Store, tmp_path: Path) -> None:
    said(store, 1, answer=None)
    assert ingest(store, tmp_path / "feedback", CONFIG, passes).accepted == 0
    assert list((tmp_path / "feedback").iterdir()) == []
    assert (store.fresh(), store.unversioned()) == (0, [])


def test_withdrawals_are_written_also_when_there_are_none(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "feedback"
    assert revocations_are_written(store, folder)
    first, second = said(store, 1), said(store, 2)
    ingest(store, folder, CONFIG, passes)
    assert not revocations_are_written(store, folder)
    write_revocations(store, folder)
    assert json.loads((folder / "withdrawn.json").read_text()) == {}
    assert store.revoke(first, "poison")
    assert not store.revoke(first)
    changed = store.add_feedback("chatcmpl-2", "up", user="user:a")
    assert not revocations_are_written(store, folder)
    write_revocations(store, folder)
    assert json.loads((folder / "withdrawn.json").read_text()) == {first: "revoked", second: "replaced"}
    assert changed not in store.withdrawn()
    with pytest.raises(InputError, match="nope: no such feedback"):
        store.revoke("nope")


def test_the_suite_quarantines_rows_and_says_why(store: Store, tmp_path: Path, validator: Validator) -> None:
    good = said(store, 1, correction="Better.")
    bad = {
        said(store, 2, correction=" \n"): "Fails: A correction says something",
        said(store, 3, answer="  "): "Fails: There is an answer in words, or its correction",
        said(store, 4, question=" "): "Fails: A user asks something",
        said(store, 5, model="agent@champion"): "Fails: The answering model is a registered version",
        said(store, 6, correction="x<|call|>y"): (
            "Fails: A correction holds no control characters and none of the template's own marks"
        ),
        said(store, 7, correction="x" * 100_001): "Fails: A correction is not longer than 100,000 characters",
    }
    ingest(store, tmp_path / "feedback", CONFIG, lambda rows: validator.failing(rows, "feedback"))
    found = states(store)
    assert found[good] == ("accepted", None)
    assert {vote: found[vote][1] for vote in bad} == bad


def test_rows_of_another_shape_are_refused(store: Store, validator: Validator) -> None:
    said(store, 1)
    row = item_features(item_of(store.behind_watermark(1)[0]))
    assert validator.failing([row], "feedback") == {}
    with pytest.raises(Refused, match="feedback: data validation failed: The columns are those of a vote"):
        validator.failing([{**row, "mood": "good"}], "feedback")


def test_what_a_killed_run_left_is_written_again(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "feedback"
    vote = said(store, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "commit_partition", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            ingest(store, folder, CONFIG, passes)
    (folder / ".items-000000001-000000001.parquet.tmp").write_bytes(b"half")
    assert len(list(folder.iterdir())) == 2
    later = said(store, 2)
    assert ingest(store, folder, CONFIG, passes).partition == "items-000000001-000000002"
    assert [path.name for path in folder.iterdir()] == ["items-000000001-000000002.parquet"]
    assert [item.feedback_id for item in read_items(folder)] == [vote, later]


def test_partitions_of_another_store_are_left_alone(store: Store, tmp_path: Path) -> None:
    said(store, 1)
    ingest(store, tmp_path / "feedback", CONFIG, passes)
    other = Store.of(tmp_path / "other")
    said(other, 1)
    with pytest.raises(InputError, match="holds votes of another store"):
        ingest(other, tmp_path / "feedback", CONFIG, passes)
    other.close()
    assert len(list(read_items(tmp_path / "feedback"))) == 1


def test_a_missing_folder_is_not_started_over(store: Store, tmp_path: Path) -> None:
    said(store, 1)
    ingest(store, tmp_path / "feedback", CONFIG, passes)
    (tmp_path / "feedback").rename(tmp_path / "moved")
    said(store, 2)
    with pytest.raises(InputError, match=r'run "dvc checkout .+/feedback"'):
        ingest(store, tmp_path / "feedback", CONFIG, passes)


def test_two_ingestions_of_the_same_votes_cannot_both_count(store: Store, tmp_path: Path) -> None:
    said(store, 1)
    racer = Store.of(tmp_path)

    def race(rows: Sequence[Row]) -> Mapping[int, str]:
        ingest(racer, tmp_path / "elsewhere", CONFIG, passes)
        return {}

    with pytest.raises(InputError, match="another ingestion"):
        ingest(store, tmp_path / "feedback", CONFIG, race)
    racer.close()
    assert store.waiting() == 1


@pytest.mark.parametrize(("days", "forgotten"), [(0, 0), (6.9, 0), (7.1, 1)])
def test_old_requests_without_feedback_are_forgotten(store: Store, days: float, forgotten: int) -> None:
    said(store, 1)
    store.add_request("silent", "agent/1", {"messages": []})
    store.add_answer("silent", AnswerRecord("yes", "stop", 1, 1, 0.1))
    with store._write() as connection:
        connection.exec_driver_sql(f"UPDATE requests SET created = created - {days * 86_400}")
    assert store.forget(7) == forgotten
    left = 2 - forgotten
    assert store.counts() == {"requests": left, "answers": left, "feedback": 1}


def test_a_clock_that_jumped_ahead_does_not_delete_the_requests(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request of each of the last twenty days; then the clock says that ten years have passed."""
    now = time.time()
    for day in range(20):
        store.add_exchange(f"c-{day}", "agent/1", {"messages": []}, now - day * 86_400, ANSWER)
    assert store.forget(30) == 0
    later = now + 3650 * 86_400
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: later)
        assert store.forget(30) == 0, "nothing was recorded since"
        store.add_exchange("after the jump", "agent/1", {"messages": []}, later, ANSWER)
        assert store.forget(30) == 1, "one day's"
    assert store.counts()["requests"] == 20


def test_votes_are_written_while_requests_are_forgotten(store: Store) -> None:
    now, count = time.time(), 1200
    for number in range(count):
        store.add_exchange(f"c-{number}", "agent/1", {"messages": []}, now - 8 * 86_400, ANSWER)
    forgetting = threading.Thread(target=store.forget, args=(7,))
    forgetting.start()
    silent: list[int] = []
    while forgetting.is_alive():
        said(store, len(silent))
        counts = store.counts()
        silent.append(counts["requests"] - counts["feedback"])
    forgetting.join()
    assert store.counts() == {"requests": len(silent), "answers": len(silent), "feedback": len(silent)}
    assert any(0 < left < count for left in silent), "some were gone, and some not yet"


def test_a_picture_is_forgotten_with_the_last_request_that_refers_to_it(store: Store) -> None:
    old, shared, voted = map(picture, range(3))
    for name, pictures in (("a", [old, shared]), ("b", [shared]), ("c", [voted])):
        body = {"messages": [{"role": "user", "content": [reference(each.digest) for each in pictures]}]}
        store.add_request(name, "agent/1", body, [PictureFile.of(each) for each in pictures])
    store.add_feedback("c", "up")
    with store._write() as connection:
        connection.exec_driver_sql(f"UPDATE requests SET created = created - {8 * 86_400} WHERE id != 'b'")
    assert store.forget(7) == 1
    digests = [each.digest for each in (old, shared, voted)]
    assert store.known_pictures(digests) == set(digests[1:])
    assert [row["digest"] for row in store.pictures_of("b")] == [shared.digest]
    with pytest.raises(UnknownPicture, match="no such picture"):
        store.picture(old.digest)
    assert decode_picture(store.picture(shared.digest), "stored").digest == shared.digest


def test_the_digest_of_content_tells_voices_votes_and_answers_apart(store: Store) -> None:
    said(store, 1)
    item = item_of(store.behind_watermark(1)[0])
    changes: list[Row] = [{"voice": "b"}, {"rating": "up"}, {"answer": "other"}, {"correction": item["answer"]}]
    assert len({content_digest(item | change) for change in [{}, *changes]}) == 5
    corrected = item | {"correction": "x"}
    assert content_digest(corrected) == content_digest(corrected | {"answer": "other", "comment": "c"})


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from components.config.params import FeedbackConfig
from components.feedback import ingest as module
from components.feedback.store import AnswerRecord, Store

home, rounds = Path(sys.argv[1]), int(sys.argv[2])
chance = random.Random(7)
config = FeedbackConfig(max_items=7, max_items_per_user=10_000, improve_after=5)

def once(number):
    store = Store.of(home)
    module.ingest(store, home / "feedback", config, lambda rows: {})
    module.write_revocations(store, home / "feedback")
    store.close()

def timed(number):
    began = time.monotonic()
    child = os.fork()
    if not child:
        once(number)
        os._exit(0)
    return child, began

number = 0
def speak(count):
    global number
    store = Store.of(home)
    for _ in range(count):
        name = f"c{number}"
        store.add_request(name, "agent/1", {"messages": [{"role": "user", "content": f"what is {number}?"}]})
        store.add_answer(name, AnswerRecord("x", "stop", 1, 1, 0.1))
        print(store.add_feedback(name, "down", f"it is {number}", user="v"), flush=True)
        number += 1
    store.close()

speak(3)
child, began = timed(0)
os.waitpid(child, 0)
whole = time.monotonic() - began
killed = 0
for _ in range(rounds):
    speak(5)
    child, began = timed(0)
    time.sleep(chance.random() * whole)
    os.kill(child, signal.SIGKILL)
    killed += os.waitpid(child, 0)[1] == signal.SIGKILL
while True:
    store = Store.of(home)
    fresh = store.fresh()
    store.close()
    if not fresh:
        break
    child, began = timed(0)
    assert os.waitpid(child, 0)[1] == 0
print("killed", killed, flush=True)
"""


def test_killed_anywhere_nothing_acknowledged_is_lost_or_taken_twice(tmp_path: Path) -> None:
    rounds = int(os.environ.get("LOOPWRIGHT_TEST_KILLS", "6"))
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(rounds)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    *acknowledged, told = ended.stdout.splitlines()
    assert int(told.split()[1]) >= rounds // 2, "the kills came too late to tell anything"
    taken = [item.feedback_id for item in read_items(tmp_path / "feedback")]
    assert taken == acknowledged
    store = Store.of(tmp_path)
    assert {state for state, _ in states(store).values()} == {"accepted"}
    files = {path.stem for path in (tmp_path / "feedback").glob("items-*.parquet")}
    assert files == {row["name"] for row in store.partitions()}
    for row in store.partitions():
        assert pq.read_metadata(tmp_path / "feedback" / f"{row['name']}.parquet").num_rows == row["accepted"]
    store.close()


def test_no_query_of_an_ingestion_walks_through_history(tmp_path: Path) -> None:
    """By what the database says that it will do."""
    store = Store.of(tmp_path)
    said(store, 1)
    plans: list[str] = []
    from sqlalchemy import event

    @event.listens_for(store._engine, "before_cursor_execute")
    def explain(_connection, cursor, statement, parameters, *_):  # type: ignore[no-untyped-def]
        if statement.lstrip().upper().startswith(("SELECT", "UPDATE", "DELETE")):
            cursor.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
            plans.extend(f"{row[3]} :: {statement[:90]}" for row in cursor.fetchall())

    ingest(store, tmp_path / "feedback", CONFIG, passes)
    store.waiting(), store.fresh(), store.unversioned(), store.withdrawn()
    store.close()
    walks = [plan for plan in plans if plan.startswith("SCAN") or "ix_outcomes_status_sequence (status=?)" in plan]
    few = ("SCAN partitions", "SCAN revocations", "SCAN improvements", "SCAN CONSTANT")
    assert not [plan for plan in walks if not plan.startswith(few)]


def test_erased_items_leave_their_partition_with_their_pictures(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "feedback"
    shared, own = picture(1), picture(2)
    other = seen(store, 1, [shared], "", "What?", correction="A cat.", user="user:b")
    content = [reference(own.digest), reference(shared.digest), {"type": "text", "text": "What?"}]
    body = {"messages": [{"role": "user", "content": content}]}
    files = [PictureFile.of(each) for each in (own, shared)]
    store.add_exchange("c2", "agent/1", body, 1.7e9, AnswerRecord("A dog.", "stop", 5, 5, 0.1), files, owner="ada")
    erased = store.add_feedback("c2", "down", "A cow.", user="user:a", owner="ada")
    ingest(store, folder, CONFIG, passes)
    name = store.unversioned()
    store.mark_versioned(name, "hash")
    assert {item.feedback_id for item in read_items(folder)} == {other, erased}
    assert store.erase_user("ada").votes == [erased]
    erase_items(store, folder)
    assert [item.feedback_id for item in read_items(folder)] == [other]
    assert set(read_pictures(folder, {shared.digest})) == {shared.digest}
    with pytest.raises(InputError, match="has no picture"):
        read_pictures(folder, {own.digest})
    assert (store.unversioned(), store.erased_items(), store.withdrawn()) == (name, {}, {erased: "revoked"})
