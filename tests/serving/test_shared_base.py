"""Adapters of one base are served from one copy of it: in one batch, and swapped by their alias alone."""

from __future__ import annotations

import json
import queue
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from components.agent.pyfunc import Predictor
from components.config.params import InputError, load_params
from components.inference.adapter_bank import bank_of
from components.models.base_store import BASE, STORE, base_folder, store_base
from components.models.checkpoint import load_decoder, merge_folder, save_decoder
from components.models.lora import add_lora
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.tracking.registry import BASE_VERSION, WEIGHTS_SHA256, Registry
from serving.engine.backend import Completion, Event, Failure, GenerationRequest
from serving.engine.local import LocalEngine
from serving.models.alias_watcher import AliasWatcher
from serving.models.versions import Bundled, Registered
from tests.serving.conftest import EXAMPLES, GREETING, ROOT, learn

CONFIG = load_params(ROOT / "params.yaml").serve.model_copy(update={"max_new_tokens": 64, "max_running": 4})
WORDS = {"first": "One two three four five.", "second": "The end of it."}
"""Made of tokens that the base has learned: its head is frozen."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module", autouse=True)
def project(home: Path) -> Iterator[None]:
    """The current folder is in a project whose state folder is `home`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOOPWRIGHT_HOME", str(home))
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def adapters(agent_folder: Path, home: Path) -> dict[str, Path]:
    """Adapters of the tiny agent, each with a greeting of its own."""
    folders = {}
    tokenizer = load_chat_tokenizer(agent_folder)
    for name, words in WORDS.items():
        model = load_decoder(agent_folder)
        torch.manual_seed(0)
        add_lora(model, 8, 16.0, base=store_base(agent_folder, home, "tiny/1"))
        greeting = [*EXAMPLES[0][0][:1], {"role": "assistant", "content": words}]
        learn(model, [tokenizer.encode_chat(greeting, None)])
        folders[name] = agent_folder.parent / name
        files: dict[str, Path | str] = {
            file: agent_folder / file for file in ("agent.json", "knowledge.sqlite", "tokenizer.json")
        }
        save_decoder(model, folders[name], agent_folder, files)
    return folders


def answers(engines: list[LocalEngine]) -> list[str]:
    """What each engine says to a greeting when all are asked at once."""
    told: list[queue.Queue[Event]] = []
    for engine in engines:
        told.append(queue.Queue())
        engine.submit(GenerationRequest([{"role": "user", "content": "Hello"}]), told[-1].put)
    texts = []
    for events in told:
        while not isinstance(event := events.get(timeout=60), Completion | Failure):
            pass
        assert isinstance(event, Completion), event
        texts.append(event.content)
    return texts


def test_engines_of_one_base_share_it_and_answer_as_their_own_model(adapters: dict[str, Path]) -> None:
    engines = [LocalEngine.load(folder, f"{name}/1", CONFIG) for name, folder in adapters.items()]
    first, second = engines
    assert first.model is second.model
    assert first.router is second.router
    assert answers(engines * 2) == list(WORDS.values()) * 2
    first.close()
    assert answers([second]) == [WORDS["second"]]
    second.close()
    again = LocalEngine.load(adapters["first"], "first/1", CONFIG)
    assert again.model is not first.model, "with its last adapter a base leaves memory"
    assert answers([again]) == [WORDS["first"]]
    again.close()


def test_adapters_answer_alike_on_two_devices(adapters: dict[str, Path]) -> None:
    config = CONFIG.model_copy(update={"devices": ["cpu", "cpu"], "max_running": 1})
    engines = [LocalEngine.load(folder, f"{name}/1", config) for name, folder in adapters.items()]
    assert answers(engines * 2) == list(WORDS.values()) * 2
    banks = {id(bank_of(model)) for model in engines[0].router.models}
    assert len(banks) == 2
    engines[0].close()
    assert answers(engines[1:] * 4) == [WORDS["second"]] * 4
    engines[1].close()


def test_a_merged_adapter_answers_the_same(adapters: dict[str, Path], tmp_path: Path) -> None:
    assert Predictor(merge_folder(adapters["first"], tmp_path)).predict(["Hello"]) == [WORDS["first"]]
    assert Predictor(adapters["first"]).predict(["Hello"]) == [WORDS["first"]]


def test_a_promoted_adapter_is_swapped_in_without_its_base(adapters: dict[str, Path], home: Path) -> None:
    registry = Registry(home)
    versions = [registry.register(folder, "crew", {}, {}, None) for folder in adapters.values()]
    base = registry.resolve("crew-base/1")
    assert [version.tags[BASE_VERSION] for version in versions] == ["crew-base/1"] * 2
    assert base.tags[WEIGHTS_SHA256] == json.loads((versions[0].folder / BASE).read_text())["weights_sha256"]
    assert not (versions[0].folder / "model.safetensors").exists()
    shutil.rmtree(home / STORE)  # as on another machine, where the registry alone is
    registry.promote(registry.resolve("crew/1"))
    load = partial(LocalEngine.load, config=CONFIG)
    watcher = AliasWatcher("crew@champion", Registered(registry), load, None)
    watcher.update()
    assert (champion := watcher.engine) is not None
    assert isinstance(champion, LocalEngine)
    assert answers([champion]) == [WORDS["first"]]
    for promoted, words in (("crew/2", WORDS["second"]), ("crew/1", WORDS["first"])):
        registry.promote(registry.resolve(promoted))
        watcher.update()
        assert isinstance(watcher.engine, LocalEngine)
        assert watcher.engine.name == promoted
        assert watcher.engine.model is champion.model
        assert answers([watcher.engine]) == [words]
    watcher.close()


def test_a_base_whose_weights_were_replaced_is_refused(adapters: dict[str, Path], home: Path) -> None:
    registry = Registry(home)
    version = registry.register(adapters["first"], "crew", {}, {}, None)
    weights = base_folder(version.folder) / "model.safetensors"
    kept = weights.rename(weights.with_suffix(".kept"))
    weights.write_bytes(b"others")
    refused = r"its weights have the SHA-256 \w{12}…, and were registered with \w{12}…"
    try:
        with pytest.raises(InputError, match=f"the base: .*{refused}"):
            _ = registry.resolve(str(version)).folder
        with pytest.raises(InputError, match=f"{version}: .*{refused}"):
            Bundled(version.stored, {"name": version.name, "version": version.version, "tags": version.tags})
    finally:
        kept.replace(weights)
    assert registry.resolve(str(version)).folder == version.folder


def test_the_base_itself_answers_as_before(agent_folder: Path, adapters: dict[str, Path]) -> None:
    assert Predictor(agent_folder).predict(["Hello"]) == [GREETING]
