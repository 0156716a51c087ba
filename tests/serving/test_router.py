"""A model on two devices, here one CPU named twice: the same answers, each turn where its prefix is known."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from components.config.params import InputError, load_params
from components.inference.batching import Row, generate
from components.inference.cache_plan import plan_cache
from components.inference.served_model import load_replicas
from components.models.decoder import Decoder, DecoderConfig
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from serving.engine import scheduler
from serving.engine.backend import BackendRetired, Completion, Event, Failure, GenerationRequest
from serving.engine.local import LocalEngine
from serving.engine.router import Router, serving_devices
from serving.engine.scheduler import Turn
from tests.serving.conftest import ROOT

CPU = torch.device("cpu")
CONFIG = load_params(ROOT / "params.yaml").serve.model_copy(
    update={"devices": ["cpu", "cpu"], "max_new_tokens": 24, "max_running": 4}
)
SHAPE = DecoderConfig(64, 16, 2, 2, 1, 8, 32, 1024)


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(3)
    return Decoder(SHAPE).eval()


class Watched(Router):
    """Two batches of four rows; `sent` are the devices that turns went to."""

    def __init__(self, model: Decoder) -> None:
        super().__init__([model, model], "agent/1", CONFIG)
        self.sent: list[int] = []
        for number, each in enumerate(self.schedulers):
            each.submit = self._watched(number, each.submit)  # type: ignore[method-assign]

    def _watched(self, number: int, submit: Any) -> Any:
        def watched(turn: Turn, first: bool = False) -> None:
            self.sent.append(number)
            submit(turn, first)

        return watched


@pytest.fixture
def router(model: Decoder) -> Iterator[Watched]:
    router = Watched(model)
    yield router
    router.end()
    router.join()


def prompt(first: int, length: int = 100) -> list[int]:
    return [(first + position * 7) % 60 + 1 for position in range(length)]


class Asked:
    """A turn; one that is `held` keeps its scheduler at the first token until it is to end."""

    def __init__(self, router: Router, ids: list[int], held: bool = False) -> None:
        self.row, self.go, self.reached = Row(ids, 4), threading.Event(), threading.Event()
        self._ended: queue.Queue[Exception | None] = queue.Queue()
        self.turn = Turn(self.row, self.push, self._ended.put, math.inf)
        if not held:
            self.go.set()
        router.submit(self.turn)

    def push(self, token: int) -> bool:
        self.reached.set()
        return self.go.wait(60)

    def end(self) -> Exception | None:
        self.go.set()
        return self._ended.get(timeout=60)


def errors(turns: list[Asked]) -> list[Exception | None]:
    """What all end with; one that is held keeps the others of its device."""
    for each in turns:
        each.go.set()
    return [each.end() for each in turns]


def test_a_prompt_goes_where_its_prefix_is(router: Watched) -> None:
    blocker = Asked(router, prompt(1), held=True)
    first = Asked(router, prompt(30))
    assert first.end() is None
    assert blocker.end() is None
    assert router.sent == [0, 1]
    again = Asked(router, [*first.row.ids, 5, 6])
    other = Asked(router, [*blocker.row.ids, 5, 6])
    assert (again.end(), other.end()) == (None, None)
    assert router.sent[2:] == [1, 0]
    assert Asked(router, prompt(45)).end() is None
    assert router.sent[4:] == [0], "of devices that know as little and do as little, the first"


def test_a_prefix_does_not_outweigh_load(router: Watched) -> None:
    """100 tokens outweigh one turn of 64, and not two."""
    assert Asked(router, prompt(1)).end() is None
    turns = [Asked(router, prompt(1), held=True) for _ in range(3)]
    assert router.sent == [0, 0, 0, 1]
    assert errors(turns) == [None] * 3


def test_a_full_device_gets_a_turn_when_all_are(router: Watched) -> None:
    """However long the prefix that it knows, a free slot elsewhere is sooner."""
    assert Asked(router, prompt(1, 600)).end() is None
    turns = [Asked(router, prompt(1, 600), held=True) for _ in range(9)]
    assert router.sent == [0, 0, 0, 0, 0, 1, 1, 1, 1, 0]
    assert errors(turns) == [None] * 9


def test_a_device_that_fails_rests(
    router: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> list[Row]:
        raise RuntimeError("device-side assert triggered")

    first, second = (each.slots for each in router.schedulers)
    monkeypatch.setattr(first, "decode", broken)
    assert str(Asked(router, prompt(1)).end()) == "device-side assert triggered"
    assert [Asked(router, prompt(1)).end() for _ in range(3)] == [None] * 3
    assert router.sent == [0, 1, 1, 1]
    monkeypatch.setattr(second, "decode", broken)
    assert isinstance(Asked(router, prompt(1)).end(), RuntimeError)
    monkeypatch.undo()
    assert Asked(router, prompt(30)).end() is None
    assert router.sent[4:] == [1, 0], "all have failed: they are tried as before"
    monkeypatch.setattr(scheduler, "REST_SECONDS", 0.0)
    assert not router.schedulers[0].failing
    assert caplog.text.count("a step of the model failed") == 2


def test_turns_are_cancelled_and_ended_on_each_device(router: Watched) -> None:
    turns = [Asked(router, prompt(30 * number), held=True) for number in range(2)]
    assert router.sent == [0, 1]
    router.end()
    for each in turns:
        assert each.reached.wait(60)
        each.turn.cancelled.set()
        assert each.end() is None
        assert 0 < len(each.row.generated) < 4
    router.join()


def test_rows_have_the_bits_of_one_device(router: Watched, model: Decoder) -> None:
    prompts = [prompt(number % 7, 20 + 31 * number) for number in range(12)]
    turns = [Asked(router, ids) for ids in prompts]
    assert errors(turns) == [None] * 12
    assert set(router.sent) == {0, 1}
    alone = [Row(ids, 4) for ids in prompts]
    generate(model, alone)
    assert [each.row.ids for each in turns] == [row.ids for row in alone]


def answers(engine: LocalEngine, **options: Any) -> list[str]:
    """To a dozen questions at once."""
    told: list[queue.Queue[Event]] = [queue.Queue() for _ in range(12)]
    for number, events in enumerate(told):
        chat = [{"role": "user", "content": f"Tell me of {'this and that ' * number}!"}]
        engine.submit(GenerationRequest(chat, seed=number, **options), events.put)
    found = []
    for events in told:
        while not isinstance(event := events.get(timeout=60), Completion | Failure):
            pass
        assert isinstance(event, Completion), event
        found.append(event.content)
    return found


@pytest.mark.parametrize("int8", [False, True])
def test_an_engine_on_two_devices_answers_as_on_one(agent_folder: Path, int8: bool) -> None:
    config = CONFIG.model_copy(update={"int8": int8})
    one = LocalEngine.load(agent_folder, "agent/1", config.model_copy(update={"devices": ["cpu"]}))
    two = LocalEngine.load(agent_folder, "agent/1", config)
    assert (one.slots, two.slots, two.room) == (4, 8, 8 + config.max_waiting)
    assert answers(two, temperature=1.5) == answers(one, temperature=1.5)
    first, second = two.router.models
    assert first.embed.weight is second.embed.weight, "a CPU has the weights once"
    one.close()
    two.close()
    with pytest.raises(BackendRetired):
        answers(two)


def test_copies_share_weights_and_no_module(agent_folder: Path) -> None:
    first, second = load_replicas(agent_folder, load_chat_tokenizer(agent_folder), False, [CPU, CPU])
    assert not set(first.modules()) & set(second.modules())
    assert {id(each) for each in first.parameters()} == {id(each) for each in second.parameters()}
    assert {each.data_ptr() for each in first.buffers()} == {each.data_ptr() for each in second.buffers()}


def test_batches_of_one_memory_divide_its_tokens() -> None:
    memory = 4 * 8 * 1024 * (2 * 2 * 1 * 8 * 4)
    whole, half, least = (plan_cache(SHAPE, torch.float32, CPU, 32, None, memory, sharers) for sharers in (1, 2, 64))
    assert (whole.context_len, whole.tokens) == (1024, 8 * 1024)
    assert (half.context_len, half.tokens) == (1024, 4 * 1024), "requests may be as long as with one batch"
    assert least.tokens == 1024


def test_devices_are_of_one_kind_and_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert serving_devices("auto") == serving_devices(["cpu"]) == [CPU]
    with pytest.raises(InputError, match=r"^serve\.devices: cuda:0: 0 CUDA devices are visible here; name others, or"):
        serving_devices(["cuda:0"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(device) for device in serving_devices("auto")] == ["cuda:0", "cuda:1"]
    assert [str(device) for device in serving_devices(["cuda:1"])] == ["cuda:1"]
    for names in (["cuda:0", "cpu"], ["cuda:1", "cuda:1"]):
        with pytest.raises(InputError, match=rf"{', '.join(names)}: name CUDA devices, each once, or the CPU alone"):
            serving_devices(names)
    for wrong in ([], ["gpu"], "cuda:0"):
        with pytest.raises((InputError, ValidationError), match=r"serve\.devices"):
            load_params(ROOT / "params.yaml", {"serve.devices": wrong})
