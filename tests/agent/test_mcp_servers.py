"""Tools of a real MCP server, called through the agent's loop, and what a server that fails costs."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from components.agent.agent import Agent
from components.agent.mcp_servers import McpServers
from components.agent.tools import Tool, call
from components.config.loop_settings import McpServer
from components.config.params import InputError
from components.tokenization import chat_tokenizer as bpe
from components.tokenization.chat_tokenizer import ChatTokenizer

SCRIPT = Path(__file__).with_name("mcp_server.py")
WAIT = 60.0


def shop(**env: str) -> McpServer:
    return McpServer(name="shop", command=sys.executable, args=[str(SCRIPT)], env=env or None)


@pytest.fixture(scope="module")
def web() -> Iterator[McpServer]:
    """The same server over streamable HTTP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, str(SCRIPT), str(port)]) as process:
        yield McpServer(name="web", url=f"http://127.0.0.1:{port}/mcp")
        process.terminate()


@pytest.fixture(scope="module")
def servers(web: McpServer) -> Iterator[McpServers]:
    os.environ["SHOP_MARK"] = "!"
    gone = McpServer(name="gone", command="/nonexistent/server")
    far = McpServer(name="far", url="http://127.0.0.1:9/mcp")
    servers = McpServers([shop(MARK="$SHOP_MARK"), web, gone, far], call_seconds=5.0)
    servers.wait(WAIT)
    _until_there(servers, "web_price")
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(bpe.train(["what does an apple cost"] * 9, 400), bpe.TEMPLATE_FILE.read_text())


def test_a_servers_tools_come_with_its_name_and_their_schemas(servers: McpServers) -> None:
    tools = {tool.name: tool for tool in servers.tools()}
    functions = ("price", "fail", "sleep", "label", "die")
    assert set(tools) == {f"{name}_{tool}" for name in ("shop", "web") for tool in functions}
    price = tools["shop_price"]
    assert price.description == "What an article costs."
    assert price.parameters["required"] == ["article"]
    assert price.parameters["properties"]["currency"]["enum"] == ["eur", "usd"]


def test_calls_reach_the_server_and_come_back(servers: McpServers) -> None:
    tools = servers.tools()
    assert call(tools, "shop_price", {"article": "apple", "currency": "usd"}) == "apple costs 5 usd!"
    assert call(tools, "web_price", {"article": "plum"}) == "plum costs 4 eur"
    assert "no reason" in call(tools, "shop_fail", {"reason": "no reason"})
    assert (
        call(tools, "shop_price", {"article": 1}) == "error: shop_price: argument 'article': 1 is not of type 'string'"
    )


def test_no_pattern_of_an_output_schema_stops_the_process() -> None:
    """In a process of its own: while `re` backtracks no thread runs, that of a time limit included."""
    program = """
import sys
from components.agent.mcp_servers import McpServers
from components.agent.tools import call
from components.config.loop_settings import McpServer

servers = McpServers([McpServer(name="shop", command=sys.executable, args=[sys.argv[1]])], call_seconds=5.0)
servers.wait(60)
print(call(servers.tools(), "shop_label", {}))
servers.close()
"""
    process = subprocess.run(
        [sys.executable, "-c", program, str(SCRIPT)], capture_output=True, text=True, timeout=30, check=True
    )
    assert process.stdout.replace(" ", "").startswith('{"text":"aaaa')


def test_the_agent_declares_and_calls_them(servers: McpServers, tokenizer: ChatTokenizer) -> None:
    own = Tool("echo", "Says it again.", {"type": "object", "properties": {"text": {"type": "string"}}}, str.upper)
    agent = Agent(tokenizer, [own], max_steps=3, context_len=2000, external_tools=servers.tools)
    conversation = agent.answer([{"role": "user", "content": "What does an apple cost?"}])
    shown = tokenizer.decode(next(conversation).ids)
    assert "shop_price: What an article costs." in shown
    assert "echo: Says it again." in shown
    shown = tokenizer.decode(conversation.send(written(tokenizer, "shop_price", {"article": "apple"})).ids)
    assert shown.endswith("apple costs 5 eur!")
    with pytest.raises(StopIteration) as stop:
        conversation.send(written(tokenizer))
    assert [step["content"] for step in stop.value.value.steps if step["type"] == "result"] == ["apple costs 5 eur!"]


def written(tokenizer: ChatTokenizer, name: str = "", arguments: dict[str, Any] | None = None) -> list[int]:
    calls = [{"function": {"name": name, "arguments": arguments}}] if name else []
    turn = {"role": "assistant", "content": "" if name else "Done.", "tool_calls": calls}
    return tokenizer.encode_chat([turn])[0][1:]


def test_without_guests_a_prompt_declares_nothing(tokenizer: ChatTokenizer) -> None:
    agent = Agent(tokenizer, [Tool("echo", "Says it again.", {"type": "object"}, str)], 3, 2000)
    prompt = next(agent.answer([{"role": "user", "content": "hi"}]))
    assert "echo" not in tokenizer.decode(prompt.ids)


def test_a_late_answer_is_not_waited_for() -> None:
    servers = McpServers([shop()], call_seconds=2.0)  # its start has this limit too
    try:
        servers.wait(WAIT)
        late = call(_until_there(servers), "shop_sleep", {"seconds": 60.0})
        assert late == "error: shop did not answer within 2 s"
    finally:
        servers.close()


def test_a_server_that_dies_comes_back() -> None:
    servers = McpServers([shop()], call_seconds=5.0)
    try:
        servers.wait(WAIT)
        assert call(servers.tools(), "shop_die", {}).startswith("error: shop ")
        assert call(_until_there(servers), "shop_price", {"article": "pear"}) == "pear costs 4 eur"
        last = servers.tools()
    finally:
        servers.close()
    assert servers.tools() == []
    assert call(last, "shop_price", {"article": "pear"}) == "error: shop is no longer connected"


def _until_there(servers: McpServers, name: str = "shop_price") -> list[Tool]:
    """The tools, once they are those of a living server."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        tools = servers.tools()
        if tools and not call(tools, name, {"article": "x"}).startswith("error: "):
            return tools
        time.sleep(0.05)
    raise AssertionError("the server did not come back")


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r'^params\.yaml: serve\.mcp_servers: shop: .*run pip install "loopwright\[mcp\]"$'
    ):
        McpServers([shop()], call_seconds=1.0)
    McpServers([], call_seconds=1.0).close()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"name": "a"}, "give either command"),
        ({"name": "a", "command": "x", "url": "http://x"}, "give either command"),
        ({"name": "a", "url": "http://x", "args": ["y"]}, "args and env belong to command"),
        ({"name": "a b", "command": "x"}, "pattern"),
        ({"name": "a", "url": "file:///x"}, "pattern"),
    ],
)
def test_a_server_has_one_way_to_it(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        McpServer.model_validate(given)


def test_headers_carry_secrets_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    received: list[str | None] = []

    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.headers["Authorization"])
            self.send_error(401)

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setenv("SHOP_TOKEN", "of-the-environment")
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/s3cretZ0123456789/mcp?profile=s3cret-profile"
        servers = McpServers([McpServer(name="far", url=url, headers={"Authorization": "Bearer $SHOP_TOKEN"})], 5.0)
        servers.wait(WAIT)
        servers.close()
        server.shutdown()
        thread.join()
    assert set(received) == {"Bearer of-the-environment"}
    assert "serve.mcp_servers: far: " in caplog.text
    assert "s3cret" not in caplog.text


def test_a_literal_secret_is_reported_without_its_value(caplog: pytest.LogCaptureFixture) -> None:
    McpServers([shop(TOKEN="s3cret-value", MARK="$SHOP_MARK")], 5.0).close()
    reported = [record.getMessage() for record in caplog.records if "literal" in record.getMessage()]
    assert reported == [
        "serve.mcp_servers.shop.env.TOKEN: a literal value in params.yaml; write $NAME and set it in the environment"
    ]
    assert "s3cret-value" not in caplog.text
