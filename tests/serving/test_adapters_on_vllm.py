"""Adapters on a vLLM server: loaded at promotion, unloaded with the last request, loaded again after a restart.

The stand-in answers as vLLM 0.32 does (vllm/entrypoints: openai/models/serving.py, serve/lora/api_router.py).
"""

from __future__ import annotations

import json
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from safetensors.torch import load_file, save_file

from components.config.loop_settings import ServeConfig
from components.config.params import load_params
from components.models.weight_files import weight_files, weights_digest, write_weights
from components.tracking.registry import ModelVersion, Registry
from serving.engine.backend import Backend, BackendNotReady, Completion, Event, Failure, GenerationRequest
from serving.engine.remote import RemoteServer
from serving.models.alias_watcher import AliasWatcher, ModelRejected
from serving.models.versions import Registered
from serving.server import listen

CONFIG = load_params(Path(__file__).parents[2] / "params.yaml").serve
BASE = "base"


class VLLM:
    """A server of one base, that answers with what an adapter's configuration says under `answer`."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.adapters: dict[str, str] = {}
        self.loaded: queue.Queue[str] = queue.Queue()
        self.unloaded: queue.Queue[str] = queue.Queue()
        self.updating = True
        """VLLM_ALLOW_RUNTIME_LORA_UPDATING."""
        self.status = 200
        """Of every answer, as a proxy gives it while the server starts."""
        self.open = threading.Event()
        self.open.set()
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/load_lora_adapter")(self.load)
        self.app.post("/v1/unload_lora_adapter")(self.unload)
        self.app.post("/v1/chat/completions")(self.chat)

    def restart(self) -> None:
        self.adapters.clear()

    async def models(self) -> Response:
        cards = [{"id": BASE, "root": self.root, "parent": None}]
        cards += [{"id": name, "root": path, "parent": BASE} for name, path in self.adapters.items()]
        return JSONResponse({"object": "list", "data": cards}, self.status)

    async def load(self, request: Request) -> Response:
        body = await request.json()
        name, path = body["lora_name"], body["lora_path"]
        if not self.updating:
            return JSONResponse({"detail": "Not Found"}, 404)
        if self.status != 200:
            return refusal(self.status, "ServiceUnavailable", "starting")
        if name in self.adapters:
            message = f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place,"
            return refusal(400, "InvalidUserInput", f"{message} set 'load_inplace' to True.")
        if not (Path(path) / "adapter_config.json").is_file():
            return refusal(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for {path}")
        self.adapters[name] = path
        self.loaded.put(name)
        return Response(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        if self.adapters.pop(name, None) is None:
            return refusal(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        self.unloaded.put(name)
        return Response(f"Success: LoRA adapter '{name}' removed successfully.")

    async def chat(self, request: Request) -> Response:
        name = (await request.json())["model"]
        if self.status != 200:
            return refusal(self.status, "ServiceUnavailable", "starting")
        if name != BASE and name not in self.adapters:
            return refusal(404, "NotFoundError", f"The model `{name}` does not exist. Valid aliases: {BASE}.")
        path = self.adapters.get(name)
        answer = json.loads((Path(path) / "adapter_config.json").read_text())["answer"] if path else "the base"
        return StreamingResponse(self.chunks(answer), media_type="text/event-stream")

    def chunks(self, answer: str) -> Iterator[str]:
        yield f"data: {json.dumps({'choices': [{'delta': {'role': 'assistant', 'content': ''}}]})}\n\n"
        self.open.wait(60)
        yield f"data: {json.dumps({'choices': [{'delta': {'content': answer}, 'finish_reason': 'stop'}]})}\n\n"
        yield "data: [DONE]\n\n"


def refusal(status: int, kind: str, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


@pytest.fixture
def vllm(agent_folder: Path) -> Iterator[VLLM]:
    server = VLLM(agent_folder)
    listener = listen("127.0.0.1", 0)
    uvicorn_server = uvicorn.Server(uvicorn.Config(server.app, lifespan="off", log_config=None))
    thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listener]})
    thread.start()
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    yield server
    server.open.set()
    uvicorn_server.should_exit = True
    thread.join()


@pytest.fixture
def config(vllm: VLLM) -> ServeConfig:
    return CONFIG.model_copy(update={"backend": "openai", "backend_url": vllm.url, "backend_model": BASE})


@pytest.fixture
def adapter(agent_folder: Path, registry: Registry, tmp_path: Path) -> Callable[..., ModelVersion]:
    """Register an adapter that answers every question alike; `expected` is the answer that its tags promise."""

    def register(answer: str, expected: str | None = None) -> ModelVersion:
        folder = tmp_path / answer / "agent"
        shutil.copytree(agent_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        (folder / "adapter_config.json").write_text(json.dumps({"answer": answer}))
        base = {"weights_sha256": weights_digest(agent_folder), "source": "theirs/1"}
        (folder / "base.json").write_text(json.dumps(base))
        save_file({}, folder / "adapter_model.safetensors")
        if "theirs" not in registry.names():
            registry.register(agent_folder, "theirs", {}, {}, None)
        return registry.register(folder, "agent", {}, {"smoke_answer": expected or answer}, None)

    return register


@pytest.fixture
def watcher(registry: Registry, config: ServeConfig) -> Iterator[AliasWatcher[Backend]]:
    def load(folder: Path, name: str) -> Backend:
        return RemoteServer.load(folder, name, config, home=registry.home)

    watcher: AliasWatcher[Backend] = AliasWatcher("agent@champion", Registered(registry), load, None)
    yield watcher
    watcher.close()


def submit(engine: Backend | None) -> queue.Queue[Event]:
    assert engine is not None
    events: queue.Queue[Event] = queue.Queue()
    engine.submit(GenerationRequest([{"role": "user", "content": "Hello"}]), events.put)
    return events


def completion(events: queue.Queue[Event]) -> str:
    while not isinstance(event := events.get(timeout=60), Completion):
        assert not isinstance(event, Failure), event.error
    return event.content


def answer(engine: Backend | None) -> str:
    return completion(submit(engine))


def test_promotion_and_rollback_load_and_unload(
    watcher: AliasWatcher[Backend], vllm: VLLM, registry: Registry, adapter: Callable[..., ModelVersion]
) -> None:
    first, second = adapter("first"), adapter("second")
    for move, name, text in (
        (lambda: registry.promote(first), "agent-1", "first"),
        (lambda: registry.promote(second), "agent-2", "second"),
        (lambda: registry.rollback("agent"), "agent-1", "first"),
    ):
        before = set(vllm.adapters)
        move()
        watcher.update()
        assert answer(watcher.engine) == text
        assert {vllm.unloaded.get(timeout=60) for _ in before} == before
        assert set(vllm.adapters) == {name}
    assert vllm.adapters["agent-1"] == str(first.folder.resolve())
    watcher.close()
    assert vllm.adapters == {}


def test_adapter_that_fails_its_smoke_test_leaves_the_old_one(
    watcher: AliasWatcher[Backend], vllm: VLLM, registry: Registry, adapter: Callable[..., ModelVersion]
) -> None:
    registry.promote(adapter("first"))
    watcher.update()
    registry.promote(adapter("second", expected="promised"))
    with pytest.raises(ModelRejected, match="answered 'second' instead of 'promised'"):
        watcher.update()
    assert answer(watcher.engine) == "first"
    assert vllm.unloaded.get(timeout=60) == "agent-2"
    assert registry.aliases("agent")["champion"] == 1


def test_adapter_is_loaded_again_after_a_restart(
    watcher: AliasWatcher[Backend], vllm: VLLM, registry: Registry, adapter: Callable[..., ModelVersion]
) -> None:
    registry.promote(adapter("first"))
    watcher.update()
    vllm.restart()
    requests = [submit(watcher.engine) for _ in range(4)]
    assert [completion(events) for events in requests] == ["first"] * 4
    assert [vllm.loaded.get() for _ in range(vllm.loaded.qsize())] == ["agent-1"] * 2
    vllm.restart()
    vllm.updating = False
    events = submit(watcher.engine)
    while not isinstance(event := events.get(timeout=60), Failure):
        assert not isinstance(event, Completion)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in str(event.error)


def test_adapter_stays_loaded_until_its_last_request_ends(
    watcher: AliasWatcher[Backend], vllm: VLLM, registry: Registry, adapter: Callable[..., ModelVersion]
) -> None:
    registry.promote(adapter("first"))
    watcher.update()
    vllm.open.clear()
    events = submit(watcher.engine)
    events.get(timeout=60)  # it has begun
    registry.promote(adapter("second"))
    update = threading.Thread(target=watcher.update)  # its smoke question waits too
    update.start()
    assert [vllm.loaded.get(timeout=60) for _ in range(2)] == ["agent-1", "agent-2"]
    vllm.open.set()
    update.join()
    assert completion(events) == "first"
    assert vllm.unloaded.get(timeout=60) == "agent-1"
    assert answer(watcher.engine) == "second"


def test_promotion_waits_for_a_server_that_cannot_answer(
    watcher: AliasWatcher[Backend], vllm: VLLM, registry: Registry, adapter: Callable[..., ModelVersion]
) -> None:
    registry.promote(adapter("first"))
    watcher.update()
    registry.promote(adapter("second"))
    vllm.status = 503
    with pytest.raises(BackendNotReady, match="agent/2: 'Hello': BackendUnavailable: the backend answered 503"):
        watcher.update()
    assert watcher.engine is not None
    assert watcher.engine.name == "agent/1"
    vllm.status = 200
    watcher.update()
    assert answer(watcher.engine) == "second"
    assert registry.aliases("agent")["champion"] == 2


def refuse_updates(vllm: VLLM, config: ServeConfig) -> ServeConfig:
    vllm.updating = False
    return config


def take_the_name(vllm: VLLM, config: ServeConfig) -> ServeConfig:
    vllm.adapters["agent-1"] = "/elsewhere"
    return config


def move_away(vllm: VLLM, config: ServeConfig) -> ServeConfig:
    return config.model_copy(update={"adapter_root": "/mnt/state"})


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (refuse_updates, "load_lora_adapter: not found; adapters need vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_"),
        (take_the_name, "agent-1 is another adapter there, /elsewhere; unload that"),
        (move_away, "No adapter found for /mnt/state/mlflow/artifacts/"),
    ],
)
def test_what_the_server_refuses_is_one_line_and_changes_nothing(
    prepare: Callable[[VLLM, ServeConfig], ServeConfig],
    message: str,
    vllm: VLLM,
    config: ServeConfig,
    registry: Registry,
    adapter: Callable[..., ModelVersion],
) -> None:
    version = adapter("first")
    config = prepare(vllm, config)
    before = dict(vllm.adapters)
    with pytest.raises(BackendNotReady) as refused:
        RemoteServer.load(version.folder, str(version), config, home=registry.home)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert vllm.adapters == before


def test_adapter_of_another_base_is_not_loaded(
    vllm: VLLM, config: ServeConfig, adapter: Callable[..., ModelVersion], tmp_path: Path
) -> None:
    version = adapter("first")
    base = json.loads((version.folder / "base.json").read_text()) | {"weights_sha256": "0" * 64}
    (version.folder / "base.json").write_text(json.dumps(base))
    with pytest.raises(BackendNotReady, match=r"does not have the weights of theirs/1, the base of agent/1, and a ser"):
        RemoteServer.load(version.folder, str(version), config)
    assert vllm.adapters == {}


def test_whole_model_waits_for_the_server_that_has_its_weights(
    watcher: AliasWatcher[Backend],
    vllm: VLLM,
    registry: Registry,
    agent_folder: Path,
    agent_maker: Callable[[Path, str], Path],
    tmp_path: Path,
) -> None:
    registry.promote(registry.register(agent_folder, "agent", {}, {}, None))
    watcher.update()
    second = agent_maker(tmp_path / "agent", "Hi")
    registry.promote(registry.register(second, "agent", {}, {}, None))
    for _ in range(2):
        with pytest.raises(BackendNotReady, match="does not have the weights of agent/2, and a server cannot change"):
            watcher.update()
    vllm.root = str(second)
    watcher.update()
    assert watcher.engine is not None
    assert watcher.engine.name == "agent/2"
    assert answer(watcher.engine) == "the base"


def test_whole_model_in_shards_is_served_by_a_server_of_several_devices(
    watcher: AliasWatcher[Backend],
    vllm: VLLM,
    config: ServeConfig,
    registry: Registry,
    agent_folder: Path,
    tmp_path: Path,
) -> None:
    """With `--tensor-parallel-size` a server has one address and one root, whose shards are compared."""
    sharded = tmp_path / "sharded"
    shutil.copytree(agent_folder, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(agent_folder / "model.safetensors")
    write_weights(tensors.items(), sharded, shard_bytes=sum(each.nbytes for each in tensors.values()) // 4)
    assert len(weight_files(sharded)) > 2
    registry.promote(registry.register(sharded, "agent", {}, {}, None))
    vllm.root = str(sharded)
    watcher.update()
    vllm.open.clear()
    asked = [submit(watcher.engine) for _ in range(CONFIG.max_running)]
    vllm.open.set()
    assert [completion(events) for events in asked] == ["the base"] * CONFIG.max_running
    first, *others = weight_files(sharded)
    first.write_bytes(others[0].read_bytes())
    with pytest.raises(BackendNotReady, match=r"does not have the weights of agent/1"):
        RemoteServer.load(registry.resolve("agent/1").folder, "agent/1", config)
