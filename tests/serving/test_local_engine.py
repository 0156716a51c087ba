"""The engine's events: the same words streamed or whole, bounded, stoppable, one slot each."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from components.agent.agent import Agent, ContextTooLong
from components.agent.tools import Tool
from components.config.params import load_params
from components.inference import served_model
from components.inference.cache_plan import plan_cache
from components.inference.packed_weights import PackedLinear
from components.models.checkpoint import read_config
from components.tokenization.chat_tokenizer import ChatTokenizer
from serving.engine.backend import (
    AgentStep,
    BackendRetired,
    Completion,
    Event,
    Failure,
    GenerationRequest,
    QueueFull,
    Start,
    TextDelta,
)
from serving.engine.local import LocalEngine, StopSequenceFilter

GREETING = "Grüße, naïve façade: 日本語 and \N{SNOWMAN}."
STORY = "One two three four five six seven eight nine ten. The end of it. And then some more words."
CONFIG = load_params(Path(__file__).parents[2] / "params.yaml").serve.model_copy(
    update={"max_new_tokens": 64, "max_running": 4, "max_waiting": 1, "follow_seconds": 1}
)


def events(engine: LocalEngine, content: str, **options: Any) -> list[Event]:
    """Everything that comes of one question."""
    told: queue.Queue[Event] = queue.Queue()
    engine.submit(GenerationRequest([{"role": "user", "content": content}], **options), told.put)
    return list(iter_until_end(told.get))


def iter_until_end(get: Callable[..., Event]) -> list[Event]:
    found: list[Event] = []
    while not found or not isinstance(found[-1], Completion | Failure):
        found.append(get(timeout=60))
    return found


def finished(engine: LocalEngine, content: str, **options: Any) -> Completion:
    last = events(engine, content, **options)[-1]
    assert isinstance(last, Completion)
    return last


def pieces(told: list[Event]) -> list[str]:
    return [event.text for event in told if isinstance(event, TextDelta)]


@pytest.mark.parametrize(("question", "answer"), [("Hello", GREETING), ("A story", STORY)])
def test_pieces_joined_are_the_answer(engine: LocalEngine, question: str, answer: str) -> None:
    told = events(engine, question)
    assert isinstance(told[0], Start)
    assert isinstance(told[-1], Completion)
    assert "".join(pieces(told)) == told[-1].content == answer
    assert len(pieces(told)) > 5


def test_no_piece_holds_part_of_a_character(engine: LocalEngine) -> None:
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces(events(engine, "Hello")))


def test_steps_are_told_before_the_words_that_follow_them(engine: LocalEngine) -> None:
    told = events(engine, "What is 6*7?")
    steps = [event.step for event in told if isinstance(event, AgentStep)]
    assert steps == [
        {"type": "call", "name": "calculate", "arguments": {"expression": "6*7"}},
        {"type": "result", "name": "calculate", "content": "42"},
    ]
    assert [type(event) for event in told[:4]] == [Start, AgentStep, AgentStep, TextDelta]
    assert isinstance(told[-1], Completion)
    assert told[-1].steps == steps
    assert told[-1].content == "That is 42."


def test_a_call_is_told_while_its_tool_still_runs(narrow: LocalEngine) -> None:
    told: queue.Queue[Event] = queue.Queue()
    called = threading.Event()

    def calculate(expression: str) -> str:
        """Waits until its call was told."""
        assert called.wait(60)
        return "42"

    agent = narrow.agent
    narrow.agent = Agent(agent.tokenizer, [Tool.of(calculate)], agent.max_steps, agent.context_len)
    narrow.submit(GenerationRequest([{"role": "user", "content": "What is 6*7?"}]), told.put)
    first, second = told.get(timeout=60), told.get(timeout=60)
    assert [type(first), type(second)] == [Start, AgentStep]
    assert isinstance(second, AgentStep)
    assert second.step["type"] == "call"
    called.set()
    last = iter_until_end(told.get)[-1]
    assert isinstance(last, Completion)
    assert last.content == "That is 42."


def test_own_tools_are_not_called_when_calls_are_forbidden(engine: LocalEngine) -> None:
    assert finished(engine, "What is 6*7?", may_call=False).steps == []


@pytest.mark.parametrize(
    ("stops", "answer"),
    [
        (("five six",), "One two three four "),
        (("zzz", "ten. The"), "One two three four five six seven eight nine "),
        (("One",), ""),
        (("more words.!",), STORY),
    ],
)
def test_nothing_from_a_stop_string_on_is_said(engine: LocalEngine, stops: tuple[str, ...], answer: str) -> None:
    told = events(engine, "A story", stops=stops)
    assert "".join(pieces(told)) == answer
    assert isinstance(told[-1], Completion)
    assert (told[-1].content, told[-1].finish_reason) == (answer, "stop")


def test_max_tokens_ends_with_length(engine: LocalEngine) -> None:
    last = finished(engine, "A story", max_tokens=4)
    assert (last.completion_tokens, last.finish_reason) == (4, "length")
    assert STORY.startswith(last.content)


def test_max_tokens_bounds_all_turns_together(engine: LocalEngine) -> None:
    whole = finished(engine, "What is 6*7?")
    last = finished(engine, "What is 6*7?", max_tokens=whole.completion_tokens - 2)
    assert last.completion_tokens == whole.completion_tokens - 2
    assert last.finish_reason == "length"
    assert len(last.steps) == 2


def test_same_seed_same_words(engine: LocalEngine) -> None:
    once = finished(engine, "A story", temperature=2.0, seed=7)
    assert finished(engine, "A story", temperature=2.0, seed=7).content == once.content
    others = {finished(engine, "A story", temperature=2.0, seed=seed).content for seed in range(3)}
    assert len(others) == 3


@pytest.mark.parametrize("options", [{"temperature": 1e-40}, {"temperature": 2.0, "top_p": 0.0}])
def test_cold_or_narrow_sampling_is_greedy(engine: LocalEngine, options: dict[str, float]) -> None:
    assert finished(engine, "A story", **options).content == STORY


def test_prompt_beyond_the_context_is_refused(engine: LocalEngine) -> None:
    told = events(engine, "long " * 400)
    assert isinstance(told[-1], Failure)
    assert isinstance(told[-1].error, ContextTooLong)
    assert len(told) == 1


def test_memory_that_is_short_bounds_context_and_tokens(
    agent_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    token_bytes = plan_cache(read_config(agent_folder), torch.float32, torch.device("cpu"), 1).token_bytes
    monkeypatch.setattr("components.inference.cache_plan.device_memory", lambda device: 4 * 256 * 4 * token_bytes)
    engine = LocalEngine.load(
        agent_folder, "small/1", CONFIG.model_copy(update={"max_context_tokens": 256, "max_running": 8})
    )
    try:
        assert (engine.context_len, engine.slots) == (256, 8)
        assert "small/1: the key-value cache (0.0 GiB) holds 1,024 tokens: 8 requests at once" in caplog.text
        (refused,) = events(engine, "x" * 300)
        assert isinstance(refused, Failure)
        assert isinstance(refused.error, ContextTooLong)
        assert finished(engine, "Hello").content == GREETING
    finally:
        engine.close()


def test_answer_ends_where_the_context_does(engine: LocalEngine) -> None:
    last = finished(engine, "x" * 240, max_tokens=10_000, temperature=2.0, seed=1)
    assert last.prompt_tokens + last.completion_tokens <= engine.agent.context_len


def test_threads_get_their_own_answers(engine: LocalEngine) -> None:
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = finished(engine, "A story" if number % 2 else "Hello").content

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: STORY if number % 2 else GREETING for number in range(12)}


class Held:
    """A listener that keeps its request at its first event until it is let go."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.go = threading.Event()
        self.told: queue.Queue[Event] = queue.Queue()

    def __call__(self, event: Event) -> None:
        self.told.put(event)
        if isinstance(event, Start):
            self.reached.set()
            self.go.wait(60)


@pytest.mark.parametrize(("needed", "served"), [(0.5, True), (1.01, False)])
def test_products_are_in_bf16_if_the_answers_pass(
    needed: float, served: bool, agent_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_model, "SMALL_MODEL", 0)
    monkeypatch.setattr(served_model, "compute_dtype", lambda *options: torch.bfloat16)
    monkeypatch.setattr(served_model, "MIN_AGREEMENT", needed)
    engine = LocalEngine.load(agent_folder, "agent/1", CONFIG)
    product = engine.model.blocks[0].attention.qkv
    assert (isinstance(product, PackedLinear) and product.dtype == torch.bfloat16) == served
    assert engine.model.embed.weight.dtype == torch.float32
    if needed < 1:
        assert finished(engine, "Hello").content == GREETING
    engine.close()


@pytest.fixture
def narrow(agent_folder: Path) -> Any:
    """One slot, one place to wait."""
    loaded = LocalEngine.load(agent_folder, "agent/1", CONFIG)
    engine = LocalEngine([loaded.model], loaded.agent, "agent/1", CONFIG, slots=1)
    loaded.close()
    yield engine
    engine.close()


STORY_ASK = GenerationRequest([{"role": "user", "content": "A story"}])


def test_full_queue_refuses_and_recovers(narrow: LocalEngine) -> None:
    first, second = Held(), Held()
    narrow.submit(STORY_ASK, first)
    assert first.reached.wait(60)
    narrow.submit(STORY_ASK, second)
    assert (narrow.running, narrow.waiting) == (1, 1)
    with pytest.raises(QueueFull, match="the queue is full; try again in") as full:
        narrow.submit(STORY_ASK, Held())
    assert full.value.retry_after >= 1
    first.go.set()
    second.go.set()
    assert isinstance(iter_until_end(second.told.get)[-1], Completion)
    assert finished(narrow, "A story").content == STORY


def test_first_passes_a_full_queue(narrow: LocalEngine) -> None:
    running, told = Held(), queue.Queue[str]()
    narrow.submit(STORY_ASK, running)
    assert running.reached.wait(60)
    for name, first in (("waited", False), ("first", True)):
        done = partial(lambda name, event: told.put(name) if isinstance(event, Completion) else None, name)
        narrow.submit(STORY_ASK, done, first)
    running.go.set()
    assert [told.get(timeout=60) for _ in range(2)] == ["first", "waited"]


def test_cancelling_frees_the_slot(narrow: LocalEngine) -> None:
    held = Held()
    task = narrow.submit(STORY_ASK, held)
    assert held.reached.wait(60)
    task.cancel()
    held.go.set()
    last = iter_until_end(held.told.get)[-1]
    assert isinstance(last, Completion)
    assert (last.finish_reason, last.content) == ("cancelled", "")
    assert finished(narrow, "A story").content == STORY


def test_cancelled_while_waiting_is_never_begun(narrow: LocalEngine) -> None:
    first, second = Held(), Held()
    narrow.submit(STORY_ASK, first)
    assert first.reached.wait(60)
    narrow.submit(STORY_ASK, second).cancel()
    first.go.set()
    told = iter_until_end(second.told.get)
    assert [type(event) for event in told] == [Completion]


def test_who_waits_too_long_is_told_while_the_slot_is_still_taken(narrow: LocalEngine) -> None:
    told, late, order = queue.Queue[Event](), queue.Queue[Event](), list[str]()

    def listen(event: Event) -> None:
        told.put(event)
        if isinstance(event, TextDelta):
            order.append("text")
            if len(order) == 1:
                narrow.request_seconds = 0.0
                narrow.submit(STORY_ASK, late.put)
            elif len(order) == 5:
                failed = late.get(timeout=60)
                assert isinstance(failed, Failure)
                order.append(type(failed.error).__name__)

    narrow.submit(STORY_ASK, listen)
    last = iter_until_end(told.get)[-1]
    assert isinstance(last, Completion)
    assert last.content == STORY
    assert order.index("DeadlineExceeded") == 5


def test_retired_engine_finishes_and_takes_no_more(narrow: LocalEngine) -> None:
    held = Held()
    narrow.submit(STORY_ASK, held)
    assert held.reached.wait(60)
    narrow.retire()
    with pytest.raises(BackendRetired):
        narrow.submit(STORY_ASK, Held())
    held.go.set()
    last = iter_until_end(held.told.get)[-1]
    assert isinstance(last, Completion)
    assert last.content == STORY


def test_failing_listener_does_not_take_the_engine_down(narrow: LocalEngine, caplog: pytest.LogCaptureFixture) -> None:
    told: queue.Queue[Event] = queue.Queue()

    def full_disk(event: Event) -> None:
        told.put(event)
        if isinstance(event, Start):
            raise OSError("no space left")

    narrow.submit(STORY_ASK, full_disk)
    last = iter_until_end(told.get)[-1]
    assert isinstance(last, Failure)
    assert str(last.error) == "no space left"
    assert "no space left" in caplog.text
    assert finished(narrow, "A story").content == STORY


def test_stop_strings_are_held_back_only_as_long_as_they_may_come(engine: LocalEngine) -> None:
    tokenizer: ChatTokenizer = engine.agent.tokenizer
    speech = StopSequenceFilter(tokenizer, ["four!"])
    said = [speech.push(number) for number in tokenizer.encode(" three four five")]
    assert "".join(said) + speech.flush() == "three four five"
    assert all("four!".startswith(piece) is False or piece == "" for piece in said[:2])
