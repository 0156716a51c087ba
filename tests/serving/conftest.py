"""A tiny agent that learned five conversations by heart, and one real server that serves it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from httpx import Response
from torch.nn import functional as F

from components.config.loop_settings import ServeConfig
from components.config.params import SCALES_FILE, load_params
from components.models.checkpoint import save_decoder
from components.models.decoder import Decoder, DecoderConfig
from components.tokenization import chat_tokenizer as bpe
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.tracking.registry import Registry
from examples.stdlib_agent import facts
from serving.engine.backend import (
    Backend,
    Completion,
    GenerationRequest,
    GenerationTask,
    Notify,
    Start,
    load_agent,
)
from serving.engine.local import LocalEngine
from serving.http import keyring
from serving.http.app import new_api
from serving.http.gateway import GatewayMiddleware
from serving.models.alias_watcher import ServingModels
from serving.models.state import Serving
from serving.models.versions import Bundled
from tests.conftest import command_output
from tests.serving.browsing import browser as browser
from tests.serving.browsing import visit as visit

ROOT = SCALES_FILE.parents[2]
GREETING = "Grüße, naïve façade: 日本語 and \N{SNOWMAN}."
STORY = "One two three four five six seven eight nine ten. The end of it. And then some more words."
LETTERS = " ".join("abcdefghijklmnopqrstuvwxyz" * 3)
"""Long enough to be interrupted."""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def called(name: str, **arguments: str) -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


EXAMPLES: list[tuple[list[dict[str, Any]], Any]] = [
    ([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": GREETING}], None),
    ([{"role": "user", "content": "A story"}, {"role": "assistant", "content": STORY}], None),
    ([{"role": "user", "content": "Letters"}, {"role": "assistant", "content": LETTERS}], None),
    (
        [
            {"role": "user", "content": "What is 6*7?"},
            called("calculate", expression="6*7"),
            {"role": "tool", "tool_call_id": "call_1", "name": "calculate", "content": "42"},
            {"role": "assistant", "content": "That is 42."},
        ],
        None,
    ),
    ([{"role": "user", "content": "Weather in Paris?"}, called("get_weather", city="Paris")], [WEATHER]),
]


def build_agent(folder: Path, greeting: str = GREETING) -> Path:
    """A model folder whose agent answers the examples, made by the real code in a few seconds."""
    examples = [*EXAMPLES]
    examples[0] = ([examples[0][0][0], {"role": "assistant", "content": greeting}], None)
    texts = [message["content"] for messages, _ in examples for message in messages]
    bpe.save(bpe.train(texts * 4, 360), folder.parent / "tokenizer")
    tokenizer = load_chat_tokenizer(folder.parent / "tokenizer")
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        embed_dim=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        hidden_dim=128,
        max_seq_len=256,
        qk_norm=True,
    )
    model = Decoder(config)
    torch.nn.init.normal_(model.embed.weight, std=0.1)
    learn(model, [tokenizer.encode_chat(*example) for example in examples])
    knowledge = folder.parent / "knowledge.sqlite"
    facts.build(knowledge, [])
    settings = json.dumps({"tools": ["calculate"], "max_steps": 4})
    save_decoder(model, folder, folder.parent / "tokenizer", {"knowledge.sqlite": knowledge, "agent.json": settings})
    return folder


def learn(model: Decoder, examples: list[tuple[list[int], list[int]]]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    longest = max(len(ids) for ids, _ in examples)
    inputs = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full((len(examples), longest), -100)
    for row, (ids, mask) in enumerate(examples):
        inputs[row, : len(ids)] = torch.tensor(ids)
        targets = [number if learned else -100 for number, learned in zip(ids[1:], mask[1:], strict=True)]
        labels[row, : len(targets)] = torch.tensor(targets)
    for _ in range(200):
        loss = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())
        if loss.item() < 0.005:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"the tiny agent did not learn: loss {loss.item()}")


@pytest.fixture(scope="session")
def agent_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_agent(tmp_path_factory.mktemp("model") / "agent")


@pytest.fixture(scope="session")
def agent_maker() -> Callable[[Path, str], Path]:
    """For tests that need another agent, with its own greeting."""
    return build_agent


@pytest.fixture(scope="session")
def engine(agent_folder: Path) -> Iterator[LocalEngine]:
    engine = LocalEngine.load(agent_folder, "agent/1", load_params(ROOT / "params.yaml").serve)
    yield engine
    engine.close()


@dataclass
class Local:
    """The whole app in this process, without a network."""

    client: TestClient
    serving: Serving

    def ask(self, content: str, **options: Any) -> Response:
        return self.post({"messages": [{"role": "user", "content": content}], **options})

    def post(self, body: Any) -> Response:
        return self.client.post("/v1/chat/completions", json=body)


@contextmanager
def open_local(folder: Path, home: Path, name: str = "agent", config: ServeConfig | None = None) -> Iterator[Local]:
    """The routes with everything around them, answering with one tiny model as if out of a Bento."""
    api = new_api()
    bundled = Bundled(folder, {"name": name, "version": 1, "run_id": "r1", "tags": {"git_commit": "c0ffee"}})
    config = config or load_params(ROOT / "params.yaml").serve
    api.state.serving = serving = Serving.open(home, config, "", bundled)
    serving.wait()
    try:
        yield Local(TestClient(GatewayMiddleware(api, api), raise_server_exceptions=False), serving)
    finally:
        serving.close()


class PictureCounter(Backend):
    """A model that sees: it answers with the sizes and digests of the pictures that it got, and the text around them.

    It has no weights: what is tested is how pictures reach a backend and the record.
    """

    sees_pictures = True

    def __init__(self, folder: Path, config: ServeConfig, name: str = "agent/7") -> None:
        super().__init__(load_agent(folder, config), name, config)
        self.requests: list[GenerationRequest] = []

    @property
    def context_len(self) -> int:
        return 256

    def _new_task(self, request: GenerationRequest, notify: Notify) -> GenerationTask:
        return GenerationTask(self, request, notify)

    def _start(self, task: GenerationTask) -> None:
        threading.Thread(target=self._answer, args=(task,)).start()

    def _answer(self, task: GenerationTask) -> None:
        messages = task.request.messages
        pictures = [picture for message in messages for picture in message.get("images", ())]
        self.requests.append(task.request)
        task.notify(Start())
        sizes = [f"{picture.pixels.shape[1]}x{picture.pixels.shape[0]} {picture.digest[:8]}" for picture in pictures]
        task.send_text(", ".join(sizes) or "no picture")
        task.notify(Completion("".join(task.text), [], [], "stop", 5, 5))
        self.release_slot()
        self.finish(task)

    def _stop(self) -> None:
        pass

    def _join(self) -> None:
        pass


@contextmanager
def open_seeing(folder: Path, home: Path, **settings: Any) -> Iterator[Local]:
    """The routes before a model that sees; `settings` are of `serve`."""
    config = load_params(ROOT / "params.yaml", {f"serve.{name}": value for name, value in settings.items()}).serve
    with open_local(folder, home, config=config) as app:
        models = app.serving.models
        former, models.serving_models = models.serving_models, ServingModels(PictureCounter(folder, config))
        yield app
        models.serving_models = former


@pytest.fixture(scope="session")
def seeing(agent_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    with open_seeing(agent_folder, tmp_path_factory.mktemp("seeing")) as app:
        yield app


@pytest.fixture(scope="session")
def seeing_app() -> Callable[..., AbstractContextManager[Local]]:
    """For tests that need settings of their own before a model that sees."""
    return open_seeing


@pytest.fixture(scope="session")
def local(agent_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    with open_local(agent_folder, tmp_path_factory.mktemp("home")) as app:
        yield app


@pytest.fixture(scope="session")
def local_app() -> Callable[..., AbstractContextManager[Local]]:
    """For tests that need an app of their own."""
    return open_local


@pytest.fixture
def app(agent_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Local]:
    """An app of its own whose keys are read at every request."""
    monkeypatch.setattr(keyring, "REFRESH_SECONDS", 0.0)
    monkeypatch.delenv("LOOPWRIGHT_API_KEYS", raising=False)
    with open_local(agent_folder, tmp_path) as app:
        yield app


@dataclass
class Project:
    """A project folder with a registry, and the command run in it."""

    root: Path

    @property
    def home(self) -> Path:
        return self.root / "var"

    @property
    def environment(self) -> dict[str, str]:
        given = {key: value for key, value in os.environ.items() if not key.startswith("LOOPWRIGHT_")}
        return {**given, "LOOPWRIGHT_HOME": "var", "OMP_NUM_THREADS": "1"}

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "loopwright", *words],
            cwd=self.root,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*words, **environment)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def call(self, *words: str) -> tuple[int, str, str]:
        """As `run`, in this process: for commands that are clients of the endpoint or of the stores."""
        return command_output(self.root, self.environment, *words)

    def serve(self, *words: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
        """A running server and its address."""
        process = self.start("serve", "--port", "0", "--json", *words, **environment)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        return process, json.loads(line)["url"]


@pytest.fixture(scope="session")
def project(agent_folder: Path, classifier_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("project")
    for name in ("params.yaml", "dvc.yaml"):
        (root / name).write_bytes((ROOT / name).read_bytes())
    with (root / "params.yaml").open("a") as params:
        params.write("\nserve: {follow_seconds: 0.1}\n")
    project = Project(root)
    registry = Registry(project.home)
    registry.promote(registry.register(agent_folder, "agent", {"score": 0.5}, {"git_commit": "c0ffee"}, None))
    registry.promote(registry.register(classifier_folder, "classifier", {"score": 0.9}, {}, None))
    return project


@pytest.fixture(scope="session")
def url(project: Project) -> Iterator[str]:
    """The address of `loopwright serve` in that project."""
    process, url = project.serve()
    yield url
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0
