"""Answers to rows: a chat, a label, a summary or an embedding for each, as the endpoint gives them.

A row that cannot be answered gets the reason in its column `error`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import pyarrow as pa

from components.agent.agent import Agent, Answer
from components.agent.batch_rollout import Chat, answer_all
from components.agent.saved_tools import project_tools
from components.agent.tool_policy import OPEN
from components.config.loop_settings import ServeConfig
from components.config.params import InputError
from components.config.paths import AGENT, Paths
from components.datasets.conversations import parsed, read_messages, read_tools
from components.inference.cache_plan import context_len, plan_cache
from components.inference.classifier import TextClassifier, TextEncoder
from components.inference.sampling import Sampling
from components.inference.served_model import load_served
from components.inference.summarizer import Summarizer
from components.models.devices import threads_for, use_threads
from components.runtime.model_tasks import task_of
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.tokenization.tool_calls import openai_call

PredictionTask = Literal["chat", "classify", "summarize", "embed"]
MESSAGES = "messages"
"""Column of a chat whose text is JSON."""
COLUMNS: Mapping[PredictionTask, tuple[str, ...]] = {
    "chat": (MESSAGES, "prompt", "text"),
    "classify": ("text",),
    "summarize": ("text", "source"),
    "embed": ("text",),
}
"""The columns that are looked for where none is named."""
TOOLS = "tools"
"""Column of a chat: the client's tools, whose calls are returned."""
ERROR = "error"
_NO_ROOM = "a tool's result leaves the context no room for an answer"
MAX_ROWS: Mapping[PredictionTask, int] = {"chat": 1000, "classify": 50_000, "summarize": 10_000, "embed": 50_000}
"""Rows of a shard."""

Row = dict[str, Any]
T = TypeVar("T")


class Predictor(ABC, Generic[T]):
    """A loaded model that answers rows."""

    schema: pa.Schema
    """The answer's columns."""

    def answers(self, rows: Sequence[Row | InputError], column: str) -> pa.Table:
        """The answer to each row, in order, by the values of its `column`, and `error`."""
        results: list[Row] = [{} for _ in rows]
        readable: dict[int, T] = {}
        for number, row in enumerate(rows):
            try:
                if isinstance(row, InputError):
                    raise row
                readable[number] = self.read(row, column)
            except InputError as error:
                results[number] = {ERROR: str(error)}
        for number, answer in zip(readable, self.answer(list(readable.values())) if readable else (), strict=True):
            results[number] = answer
        return pa.Table.from_pylist(results, pa.schema([*self.schema, (ERROR, pa.string())]))

    @abstractmethod
    def read(self, row: Row, column: str) -> T:
        """What the model is given of a row. Raises: InputError when it cannot be answered."""

    @abstractmethod
    def answer(self, inputs: Sequence[T]) -> list[Row]:
        """The columns of each answer, in order."""


class _Texts(Predictor[str]):
    """Answers to texts."""

    def read(self, row: Row, column: str) -> str:
        value = _value(row, column)
        if not isinstance(value, str):
            raise InputError(f"{column}: expected text, found {type(value).__name__} {str(value)[:40]!r}")
        if not value.strip():
            raise InputError(f"{column}: an empty text; give words")
        return value


class _Labels(_Texts):
    def __init__(self, folder: Path, threads: int) -> None:
        self._model = TextClassifier.load(folder)
        _share_cores(self._model.model.num_parameters, threads)
        scores = pa.struct([(label, pa.float32()) for label in self._model.labels])
        self.schema = pa.schema([("label", pa.string()), ("scores", scores), ("truncated", pa.bool_())])

    def answer(self, inputs: Sequence[str]) -> list[Row]:
        return [vars(prediction) for prediction in self._model.classify(inputs)]


class _Embeddings(_Texts):
    schema = pa.schema([("embedding", pa.list_(pa.float32())), ("truncated", pa.bool_())])

    def __init__(self, folder: Path, threads: int) -> None:
        kind = TextClassifier if task_of(folder) == "classify" else TextEncoder
        self._model: TextEncoder = kind.load(folder)
        _share_cores(self._model.model.num_parameters, threads)

    def answer(self, inputs: Sequence[str]) -> list[Row]:
        return [{"embedding": each.vector, "truncated": each.truncated} for each in self._model.embed(inputs)]


class _Summaries(_Texts):
    schema = pa.schema([("summary", pa.string()), ("finish_reason", pa.string())])

    def __init__(self, folder: Path, threads: int) -> None:
        self._model = Summarizer.load(folder)
        _share_cores(self._model.model.num_parameters, threads)

    def read(self, row: Row, column: str) -> str:
        text = super().read(row, column)
        tokens, most = self._model.count(text), self._model.max_seq_len
        if tokens > most:
            raise InputError(f"{column}: {tokens} tokens; the model takes {most} at most")
        return text

    def answer(self, inputs: Sequence[str]) -> list[Row]:
        summaries = self._model.generate(inputs)
        return [{"summary": each.text, "finish_reason": "stop" if each.ended else "length"} for each in summaries]


class _Chats(Predictor[Chat]):
    """Greedy answers of the agent, which calls its own tools where a row brings none."""

    schema = pa.schema([(name, pa.string()) for name in ("answer", "steps", "tool_calls", "finish_reason")])

    def __init__(self, folder: Path, threads: int, serve: ServeConfig, root: Path) -> None:
        self._serve, self._model = serve, load_served(folder, load_chat_tokenizer(folder), serve.int8)
        _share_cores(self._model.num_parameters, threads)
        config, weight = self._model.config, self._model.embed.weight
        plan = plan_cache(config, weight.dtype, weight.device, serve.max_running, serve.max_context_tokens)
        loaded = Agent.load(folder, min(plan.context_len, context_len(self._model)))
        # An agent's tools are in its folder; a base that no agent was made of calls the project's.
        external = [] if (folder / AGENT).is_file() else project_tools(Paths(root))
        tokenizer = loaded.tokenizer
        try:
            tokenizer = tokenizer.with_tools()
        except InputError:  # its chat template has no place for tools
            external = []
        steps = min(loaded.max_steps, serve.max_steps)
        self._agent = Agent(tokenizer, loaded.own_tools, steps, loaded.context_len, lambda: external, loaded.forms)
        # Nobody confirms a call here: those of tools that write are returned, except for these tools'.
        self._policy = replace(OPEN, allowed_writes=frozenset(serve.allow_writes))

    def read(self, row: Row, column: str) -> Chat:
        value = _value(row, column)
        if isinstance(value, str):  # a text is a turn whatever it looks like: it may be anyone's
            named = column.rpartition(".")[2] == MESSAGES
            value = parsed(column, MESSAGES, value) if named else [{"role": "user", "content": value}]
        if not isinstance(value, list):
            raise InputError(f"{column}: expected text or a list of messages, found {type(value).__name__}")
        messages = read_messages(column, value)
        characters = sum(len(message["content"]) for message in messages)
        if characters > self._serve.max_prompt_characters:
            limit = f"{self._serve.max_prompt_characters:,} (serve.max_prompt_characters)"
            raise InputError(f"{column}: {characters:,} characters; give at most {limit}")
        if not any(message["content"].strip() for message in messages):
            raise InputError(f"{column}: an empty chat; give words")
        if messages[-1]["role"] == "assistant":
            raise InputError(f"{column}: ends with a turn of the assistant; give a chat that waits for an answer")
        tools = read_tools(TOOLS, _value(row, column.removesuffix(column.rpartition(".")[2]) + TOOLS))
        chat = messages, json.loads(tools) if tools else None
        next(self._agent.answer(*chat))  # whether it fits, and its template takes it
        return chat

    def answer(self, inputs: Sequence[Chat]) -> list[Row]:
        sampling = Sampling(self._serve.max_new_tokens, stop_ids=(self._agent.tokenizer.end_id,))
        answers = answer_all(self._model, self._agent, inputs, sampling, self._serve.max_running, policy=self._policy)
        return [{ERROR: _NO_ROOM} if answer is None else _columns(answer) for answer in answers]


def _value(row: Row, column: str) -> Any:
    """The value of a column; a dot in its name reaches into an object."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _columns(answer: Answer) -> Row:
    calls = [openai_call(call, f"call_{number}") for number, call in enumerate(answer.tool_calls, 1)]
    return {
        "answer": answer.content,
        "steps": json.dumps(answer.steps, ensure_ascii=False),
        "tool_calls": json.dumps(calls, ensure_ascii=False) if calls else None,
        "finish_reason": answer.finish_reason,
    }


def load_predictor(task: PredictionTask, folder: Path, threads: int, serve: ServeConfig, root: Path) -> Predictor[Any]:
    """A model folder, loaded for a task; `threads`: of torch, at most.

    Raises: InputError when the folder holds no usable model of that task.
    """
    if task == "chat":
        return _Chats(folder, threads, serve, root)
    if task == "classify":
        return _Labels(folder, threads)
    return _Summaries(folder, threads) if task == "summarize" else _Embeddings(folder, threads)


def _share_cores(parameters: int, threads: int) -> None:
    use_threads(min(threads_for(parameters), threads))
