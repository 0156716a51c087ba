"""The routes that read texts, in one process: their shapes, what they refuse, what they count, and how they swap."""

from __future__ import annotations

import asyncio
import base64
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from serving.engine.classifier_worker import MAX_BATCH_SIZE, MAX_WAIT_SECONDS, Batcher, ClassifierWorker, Overloaded
from serving.models.alias_watcher import AliasWatcher, ModelRejected
from serving.models.versions import Bundled, Version
from serving.observability.metrics import Metrics

TOPICS = {"fruit": ["apple", "pear", "plum"], "metal": ["iron", "zinc", "tin"], "animal": ["cat", "dog", "cow"]}


@pytest.fixture(scope="module")
def texts(classifier_folder: Path, tmp_path_factory: pytest.TempPathFactory, local_app: Any) -> Iterator[Any]:
    """An endpoint that serves a classifier alone."""
    with local_app(classifier_folder, tmp_path_factory.mktemp("home"), "classifier") as app:
        yield app


def classify(app: Any, body: Any, path: str = "/v1/classify") -> Any:
    return app.client.post(path, json=body)


def test_every_text_gets_its_label_and_the_scores_of_all(texts: Any) -> None:
    words = [word for topic in TOPICS.values() for word in topic]
    answer = classify(texts, {"input": words}).json()
    assert answer["model"] == "classifier/1"
    assert [one["label"] for one in answer["results"]] == [topic for topic, many in TOPICS.items() for _ in many]
    for one in answer["results"]:
        assert set(one["scores"]) == set(TOPICS)
        assert sum(one["scores"].values()) == pytest.approx(1)
        assert one["truncated"] is False
    (alone,) = classify(texts, {"input": "apple"}).json()["results"]
    assert alone["scores"] == pytest.approx(answer["results"][0]["scores"]), "a text alone is a list of one"


def test_a_cut_text_is_said_and_counted(texts: Any) -> None:
    def count(what: str) -> float:
        line = next(row for row in texts.client.get("/metrics").text.splitlines() if row.startswith(what))
        return float(line.rpartition(" ")[2])

    classify(texts, {"input": ["iron"]})
    before = count('loopwright_truncated_texts_total{route="/v1/classify"}')
    found = classify(texts, {"input": ["iron", "iron " * 50]}).json()["results"]
    assert [one["truncated"] for one in found] == [False, True]
    assert count('loopwright_truncated_texts_total{route="/v1/classify"}') == before + 1


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/embeddings"])
@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "input: missing; it is required"),
        ({"input": []}, 400, "input: []: List should have at least 1 item"),
        ({"input": ""}, 400, 'input: "": an empty text; send words'),
        ({"input": ["iron", " \n"]}, 400, 'input[1]: " \\n": an empty text; send words'),
        ({"input": [1, 2]}, 400, "input: [1, 2]: token ids are not supported; send texts"),
        ({"input": [[1, 2]]}, 400, "input: [[1, 2]]: token ids are not supported; send texts"),
        ({"input": [{"text": "iron"}]}, 400, "expected texts"),
        ({"input": ["iron", 3]}, 400, "input[1]: 3: Input should be a valid string"),
        ({"input": 3}, 400, "input: 3: expected a text or a list of texts"),
        ({"input": ["iron"] * 257}, 413, "input: 257 texts; send at most 256 (serve.max_texts)"),
        ({"input": "x" * 2_000_000}, 413, "body: larger than 1048576 bytes; send less"),
        ({"input": "iron", "model": "gpt-5"}, 404, "model: 'gpt-5' is not served here; served: classifier/1"),
    ],
)
def test_bad_input_is_told_what_to_send(texts: Any, path: str, body: Any, status: int, said: str) -> None:
    answer = classify(texts, body, path)
    assert (answer.status_code, answer.json()["error"]["type"]) == (
        status,
        "not_found_error" if status == 404 else "invalid_request_error",
    )
    assert said in answer.json()["error"]["message"]


def test_embeddings_have_openais_shape_in_both_encodings(texts: Any) -> None:
    answer = classify(texts, {"input": ["iron", "cow"], "model": "classifier"}, "/v1/embeddings").json()
    assert (answer["object"], answer["model"]) == ("list", "classifier/1")
    assert [(one["object"], one["index"]) for one in answer["data"]] == [("embedding", 0), ("embedding", 1)]
    assert answer["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    packed = classify(texts, {"input": "iron", "encoding_format": "base64"}, "/v1/embeddings").json()
    vector = struct.unpack("<32f", base64.b64decode(packed["data"][0]["embedding"]))
    assert vector == pytest.approx(answer["data"][0]["embedding"], abs=1e-6)


def test_only_the_models_own_number_of_dimensions_is_given(texts: Any) -> None:
    given = classify(texts, {"input": "iron", "dimensions": 32}, "/v1/embeddings")
    assert given.status_code == 200
    refused = classify(texts, {"input": "iron", "dimensions": 8}, "/v1/embeddings")
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "dimensions: 8: classifier/1 has 32; send that or leave it out"


def test_routes_without_a_model_say_what_is_missing(texts: Any, local: Any) -> None:
    chat = texts.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hello"}]})
    assert chat.status_code == 404
    assert "no model that can chat is served here; served: classifier/1" in chat.json()["error"]["message"]
    labels = local.client.post("/v1/classify", json={"input": "iron"})
    assert (labels.status_code, labels.json()["error"]["code"]) == (404, "model_not_found")
    assert "no model that can classify is served here; served: agent/1" in labels.json()["error"]["message"]


def test_a_classifier_alone_is_ready_and_listed(texts: Any) -> None:
    assert texts.client.get("/readyz").status_code == 200
    listed = texts.client.get("/v1/models").json()["data"]
    assert [(one["id"], one["role"], one["context_length"]) for one in listed] == [("classifier/1", "champion", 16)]
    assert texts.client.get("/v1/models/classifier").json()["id"] == "classifier/1"
    assert 'loopwright_model_version{name="classifier"} 1.0' in texts.client.get("/metrics").text


class Alias:
    """An alias that a test moves by hand."""

    def __init__(self, folders: dict[int, Path]) -> None:
        self.folders, self.number = folders, 1
        self.answers: dict[int, str] = {}
        self.withdrawn: list[str] = []

    def resolve(self, _spec: str) -> tuple[str, str | None]:
        return f"classifier/{self.number}", None

    def etag(self) -> object:
        return None

    def version(self, name: str) -> Bundled:
        number = int(name.partition("/")[2])
        tags = {"smoke_question": "iron", "smoke_answer": self.answers.get(number, "metal")}
        return Bundled(self.folders[number], {"name": "classifier", "version": number, "tags": tags})

    def names(self, _name: str) -> set[str]:
        return set()

    def mark_failed(self, version: Version, reason: str, _device: str) -> None:
        self.withdrawn.append(f"{version}: {reason}")


def test_a_classifier_is_swapped_after_its_smoke_test_alone(
    classifier_folder: Path, classifier_maker: Callable[..., Path], tmp_path: Path
) -> None:
    turned = classifier_maker(tmp_path / "turned", turned=1)
    alias = Alias({1: classifier_folder, 2: turned, 3: turned})
    alias.answers = {3: "animal"}
    watcher = AliasWatcher("classifier@champion", alias, partial(ClassifierWorker.load, metrics=Metrics()), None)
    watcher.update()
    alias.number = 2
    with pytest.raises(
        ModelRejected, match="classifier/2: failed its smoke test: 'iron': answered 'animal' instead of 'metal'"
    ):
        watcher.update()
    assert watcher.engine is not None
    assert watcher.engine.name == "classifier/1"
    assert alias.withdrawn == ["classifier/2: 'iron': answered 'animal' instead of 'metal'"]
    old = watcher.engine

    async def ask_across_the_swap() -> list[tuple[str, int]]:
        asking = asyncio.ensure_future(old.classify(["iron"]))
        await asyncio.sleep(0)
        alias.number = 3
        watcher.update()
        found = [(one.name, one.running) for one in watcher.engines]
        assert [one.label for one in await asking] == ["metal"]
        return found

    assert asyncio.run(ask_across_the_swap()) == [("classifier/3", 0), ("classifier/1", 1)]
    watcher.update()
    assert [one.name for one in watcher.engines] == ["classifier/3"], "whoever held the old one is done"
    watcher.close()


class Gate:
    """A function that is held until a test lets it go, and remembers its batches."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.began.set()
        assert self.go_on.wait(60)
        if -1 in items:
            raise ValueError("a wrong item")
        return [2 * item for item in items]


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def batcher(gate: Gate) -> Iterator[Batcher[int, int]]:
    with ThreadPoolExecutor(1) as thread:
        yield Batcher(gate, thread, lambda size: None)
        gate.go_on.set()


def held(batcher: Batcher[int, int], gate: Gate, *requests: list[int]) -> list[Future[list[int]]]:
    """The first request is being read while the others come."""
    futures = [batcher.submit(requests[0])]
    assert gate.began.wait(60)
    return futures + [batcher.submit(items) for items in requests[1:]]


def test_what_comes_while_a_batch_is_read_makes_the_next_one(batcher: Batcher[int, int], gate: Gate) -> None:
    futures = held(batcher, gate, [1], [2, 3], [4], [5, 6])
    gate.go_on.set()
    assert [future.result(60) for future in futures] == [[2], [4, 6], [8], [10, 12]]
    assert gate.batches == [[1], [2, 3, 4, 5, 6]]


def test_batches_are_bounded_and_requests_stay_whole(batcher: Batcher[int, int], gate: Gate) -> None:
    many = list(range(MAX_BATCH_SIZE + 10))
    futures = held(batcher, gate, [1], many[:40], many[:30], many, [7])
    gate.go_on.set()
    assert futures[3].result(60) == [2 * item for item in many]
    assert futures[4].result(60) == [14]
    assert [len(batch) for batch in gate.batches] == [1, 40, 30, len(many), 1]


def test_whoever_leaves_is_not_read_and_an_error_reaches_its_batch(batcher: Batcher[int, int], gate: Gate) -> None:
    futures = held(batcher, gate, [1], [2], [-1], [4])
    assert futures[1].cancel()
    gate.go_on.set()
    assert futures[0].result(60) == [2]
    for future in futures[2:]:
        with pytest.raises(ValueError, match="a wrong item"):
            future.result(60)
    assert gate.batches[1] == [-1, 4]
    assert batcher.submit([8]).result(60) == [16]


def test_more_than_can_be_read_in_time_is_refused(
    batcher: Batcher[int, int], gate: Gate, texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held(batcher, gate, [1], [2] * 10)
    batcher._seconds = MAX_WAIT_SECONDS / 9
    with pytest.raises(Overloaded, match="10 texts wait"):
        batcher.submit([3])
    monkeypatch.setattr(texts.serving.classifiers.engine._labels, "_seconds", MAX_WAIT_SECONDS)
    monkeypatch.setattr(texts.serving.classifiers.engine._labels, "_count", 2)
    refused = classify(texts, {"input": "iron"})
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    assert refused.json()["error"]["code"] == "queue_full"
