"""The agent as an MCP server: the official client starts `loopwright mcp`, asks through it and votes on the answer."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import pytest
from mcp import Client, StdioServerParameters

from components.config.paths import Paths
from components.feedback.store import Store
from serving.server import local_endpoint

pytestmark = pytest.mark.platform


def offered(url: str) -> StdioServerParameters:
    words = ["-m", "loopwright", "mcp", "--url", url]
    env = {"PYTHONPATH": os.pathsep.join(sys.path)}
    return StdioServerParameters(command=sys.executable, args=words, env=env)


def test_another_agent_asks_ours_and_corrects_it(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("LOOPWRIGHT_HOME", "var")

    async def talk(url: str) -> None:
        async with Client(offered(url)) as client:
            tools = {tool.name: tool for tool in (await client.list_tools()).tools}
            assert set(tools) == {"ask", "feedback"}
            assert tools["ask"].input_schema["required"] == ["question"]
            asked = await client.call_tool("ask", {"question": "What is 6*7?"})
            assert not asked.is_error
            answer = asked.structured_content
            assert (answer["answer"], answer["model"]) == ("That is 42.", "agent/1")
            assert [step["type"] for step in answer["steps"]] == ["call", "result"]
            vote = {"completion_id": answer["completion_id"], "rating": "down", "correction": "42"}
            thanked = (await client.call_tool("feedback", vote)).structured_content
            store = Store.of(project.home)
            assert store.completion(answer["completion_id"])["feedback"][-1]["id"] == thanked["id"]
            store.close()
            wrong = await client.call_tool("feedback", {"completion_id": "nothing", "rating": "up"})
            assert wrong.is_error
            assert "nothing" in wrong.content[0].text

    with local_endpoint(Paths(project.root), "agent@champion") as url:
        asyncio.run(talk(url))


def test_without_an_endpoint_a_call_says_what_to_start() -> None:
    async def ask() -> str:
        async with Client(offered("http://127.0.0.1:9")) as client:
            answer = await client.call_tool("ask", {"question": "Anybody?"})
            assert answer.is_error
            return str(answer.content[0].text)

    assert "http://127.0.0.1:9: no endpoint answers" in asyncio.run(ask())
