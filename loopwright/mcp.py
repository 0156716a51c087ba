"""`loopwright mcp`: the agent as a tool of other agents (Model Context Protocol), in front of a running endpoint."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel, Field

from components.config.params import InputError
from loopwright.client import ADDRESS, headers
from loopwright.output import print_json

INSTRUCTIONS = "An agent served by Loopwright. Ask it, then rate its answer: the next model is trained on the ratings."


class Answer(BaseModel):
    """The agent's answer."""

    answer: str
    completion_id: str
    """Names this answer in `feedback`."""
    model: str
    """`NAME/VERSION` that answered."""
    steps: list[dict[str, Any]]
    """The tool calls that the agent made, and their results."""


class StoredVote(BaseModel):
    """A vote that was stored."""

    id: str


def mcp(
    url: Annotated[str, typer.Option(help="Address of the running endpoint.")] = ADDRESS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the offered tools as JSON, and exit.")] = False,
) -> None:
    """Offer the agent to other agents: an MCP server on standard input and output, with the tools ask and feedback."""
    try:
        from mcp.server import MCPServer
    except ImportError:
        raise InputError('mcp: the package mcp is missing; run pip install "loopwright[mcp]"') from None
    server = MCPServer("loopwright", instructions=INSTRUCTIONS, log_level="WARNING")
    endpoint = Endpoint(url.rstrip("/"))
    server.add_tool(endpoint.ask)
    server.add_tool(endpoint.feedback)
    if as_json:
        offered = asyncio.run(server.list_tools())
        print_json({"tools": [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in offered]})
        return
    server.run("stdio")


class Endpoint:
    """The running endpoint, as the functions that become tools; its API key is that of `loopwright chat`."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def ask(self, question: Annotated[str, Field(description="In words, as to a person.")]) -> Answer:
        """Ask the agent one question; it plans, calls its own tools and answers in words."""
        completion = await self._post("chat/completions", {"messages": [{"role": "user", "content": question}]})
        message = completion["choices"][0]["message"]
        return Answer(
            answer=message["content"] or "",
            completion_id=completion["id"],
            model=completion["model"],
            steps=message.get("steps") or [],
        )

    async def feedback(
        self,
        completion_id: str,
        rating: Literal["up", "down"],
        correction: Annotated[str | None, Field(description="What it should have said.")] = None,
    ) -> StoredVote:
        """Rate an answer, or correct it; the next model is trained on the vote."""
        vote = {"completion_id": completion_id, "rating": rating, "correction": correction}
        return StoredVote.model_validate(await self._post("feedback", vote))

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        import httpx
        from mcp.server.mcpserver.exceptions import ToolError

        try:
            async with httpx.AsyncClient(timeout=None, headers=headers()) as client:
                response = await client.post(f"{self._url}/v1/{path}", json=body)
            answer = response.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            why = f'{self._url}: no endpoint answers ({error}); start one with "loopwright serve"'
            raise ToolError(why) from None
        if response.is_error:
            raise ToolError(answer["error"]["message"])
        return answer
