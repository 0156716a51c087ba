"""Which tools an answer may call by itself, and which calls wait for a person's confirmation.

Text that a server's tool returns may hold instructions of anyone. What it can make the model do is therefore bounded
by rules outside the model: a key's tools, confirmation of tools that write, and of every such tool of another server
once a server's result is in the answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from components.agent.tools import Tool, call

DECLINED = "error: the person declined this call"


@dataclass(frozen=True)
class ToolPolicy:
    """The rights of one request."""

    external: bool = True
    """Whether tools of other servers are offered."""
    names: frozenset[str] | None = None
    """The only tools that are offered; None: all."""
    allowed_writes: frozenset[str] | None = None
    """Tools that write and are run without confirmation; None: all."""
    servers_read: frozenset[str] = frozenset()
    """Servers whose results are in the answer from its beginning."""


OPEN = ToolPolicy()
"""Everything is offered, and nothing confirmed: evaluation, and tools in one's own process."""


class ToolSession:
    """The tools of one answer."""

    def __init__(self, tools: Callable[[], Sequence[Tool]], policy: ToolPolicy = OPEN) -> None:
        self._tools, self._policy = tools, policy
        self.servers_read = set(policy.servers_read)
        """Servers whose results the model has read."""

    @property
    def tools(self) -> tuple[Tool, ...]:
        return offered(self._tools(), self._policy)

    def needs_confirmation(self, names: Collection[str]) -> bool:
        """Whether one of these tools may not be run without a person."""
        return any(self._is_restricted(tool) for tool in self.tools if tool.name in names)

    def _is_restricted(self, tool: Tool) -> bool:
        allowed = self._policy.allowed_writes
        if not tool.writes or allowed is None:
            return False
        return tool.name not in allowed or bool(self.servers_read - {tool.server})

    def call(self, name: str, arguments: object) -> str:
        """The result of a tool, as `components.agent.tools.call` returns it."""
        tools = self.tools
        self.servers_read |= {tool.server for tool in tools if tool.name == name and tool.server}
        return call(tools, name, arguments)

    def run_confirmed(
        self, calls: Sequence[Mapping[str, Any]], confirmed: Collection[str]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Run those of OpenAI's calls whose ids are confirmed; returns a message for each call, and the steps."""
        messages, steps = list[dict[str, Any]](), list[dict[str, Any]]()
        for each in calls:
            name, arguments = each["function"]["name"], each["function"]["arguments"]
            with suppress(ValueError):
                arguments = json.loads(arguments)
            content = self.call(name, arguments) if each["id"] in confirmed else DECLINED
            steps.append({"type": "call", "name": name, "arguments": arguments})
            steps.append({"type": "result", "name": name, "content": content})
            messages.append({"role": "tool", "tool_call_id": each["id"], "name": name, "content": content})
        return messages, steps


def offered(tools: Sequence[Tool], policy: ToolPolicy) -> tuple[Tool, ...]:
    """Those of the tools that a policy offers to the model."""
    return tuple(
        tool
        for tool in tools
        if (policy.external or not tool.server) and (policy.names is None or tool.name in policy.names)
    )
