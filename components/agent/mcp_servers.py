"""Tools of MCP servers (Model Context Protocol, https://modelcontextprotocol.io) for the agent.

One thread keeps a connection to each server of `serve.mcp_servers`, refreshes its tools and reconnects when the
connection is lost. While a server is down only its tools are missing.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import jsonschema

from components.agent.tools import Tool
from components.config.loop_settings import McpServer
from components.config.params import InputError
from components.config.secrets import hidden, literal_secrets

if TYPE_CHECKING:
    from mcp import Client

REFRESH_SECONDS = 30.0
"""Interval of refreshing a server's tools, which also checks its health."""
MAX_PAUSE_SECONDS = 60.0
"""Between attempts to connect; starts at a second and doubles."""
CLOSE_SECONDS = 10.0
"""Grace period for servers that were started here."""
MAX_NAME = 64
"""Characters of a function name in OpenAI's API."""

logger = logging.getLogger("loopwright.mcp")


class McpServers:
    """The connections to all servers, on their own thread."""

    def __init__(self, servers: Sequence[McpServer], call_seconds: float) -> None:
        """Start connecting, without waiting.

        Raises: InputError where the extra is not installed.
        """
        if servers and importlib.util.find_spec("mcp") is None:
            names = ", ".join(server.name for server in servers)
            raise InputError(
                f"params.yaml: serve.mcp_servers: {names}: the package mcp is missing;"
                ' run pip install "loopwright[mcp]"'
            )
        for key in literal_secrets({"mcp_servers": [server.model_dump(exclude_none=True) for server in servers]}):
            logger.warning("serve.%s: a literal value in params.yaml; write $NAME and set it in the environment", key)
        self._call_seconds = call_seconds
        self._tools: dict[str, list[Tool]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running = threading.Event()
        self._broken = {server.name: asyncio.Event() for server in servers}
        self._attempted = {server.name: threading.Event() for server in servers}
        self._thread = threading.Thread(target=self._run, args=(list(servers),), name="mcp", daemon=True)
        if servers:
            self._thread.start()
            self._running.wait()

    def tools(self) -> list[Tool]:
        """The tools of every connected server, named `SERVER_TOOL`."""
        return [tool for tools in list(self._tools.values()) for tool in tools]

    def wait(self, seconds: float) -> None:
        """Wait until the first attempt to connect to each server has ended, or the time is over."""
        for attempted in self._attempted.values():
            attempted.wait(seconds)

    def close(self) -> None:
        """Disconnect, and end the servers that were started here."""
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop)
            self._thread.join(CLOSE_SECONDS)

    def _stop(self) -> None:
        for task in asyncio.all_tasks():
            task.cancel()

    def _run(self, servers: Sequence[McpServer]) -> None:
        async def connect_all() -> None:
            self._loop = asyncio.get_running_loop()
            self._running.set()
            await asyncio.gather(*(self._reconnect(server) for server in servers))

        with suppress(asyncio.CancelledError):
            asyncio.run(connect_all())

    async def _reconnect(self, server: McpServer) -> None:
        pause = 1.0
        while True:
            try:
                await self._connect(server)
                pause = 1.0
            except Exception as error:  # noqa: BLE001 - no error of a server stops the endpoint
                reason = " ".join(str(_first(error)).split()) or type(_first(error)).__name__
                message = "serve.mcp_servers: %s: %s; its tools are unavailable, next attempt in %.0f s"
                logger.warning(message, server.name, hidden(reason), pause)
            finally:
                self._tools.pop(server.name, None)
                self._attempted[server.name].set()
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    async def _connect(self, server: McpServer) -> None:
        """Provide the server's tools for as long as it answers."""
        from mcp import Client

        broken = self._broken[server.name]
        broken.clear()
        async with AsyncExitStack() as stack:
            transport = await _transport(server, self._call_seconds, stack)
            client = await stack.enter_async_context(Client(transport, read_timeout_seconds=self._call_seconds))
            while not broken.is_set():
                tools = [tool for tool in await _list_tools(client) if _is_usable(server, tool)]
                if server.name not in self._tools:
                    logger.info("serve.mcp_servers: %s: %s tools", server.name, len(tools))
                self._tools[server.name] = [self._tool(server, client, tool) for tool in tools]
                self._attempted[server.name].set()
                with suppress(TimeoutError):
                    await asyncio.wait_for(broken.wait(), REFRESH_SECONDS)

    def _tool(self, server: McpServer, client: Client, tool: Any) -> Tool:
        function = partial(self._call, server, client, tool.name)
        name = re.sub(r"[^A-Za-z0-9_-]", "_", f"{server.name}_{tool.name}")[:MAX_NAME]
        # No permissions: the tool runs in the server's process.
        # The protocol's default: a tool that does not say that it only reads may write.
        reads = tool.annotations is not None and tool.annotations.read_only_hint is True
        return Tool(name, tool.description or "", tool.input_schema, function, writes=not reads, server=server.name)

    def _call(self, server: McpServer, client: Client, name: str, **arguments: Any) -> str:
        """Raises: InputError with the server's error, or that it does not answer."""
        from mcp.types import REQUEST_TIMEOUT, CallToolRequest, CallToolRequestParams, CallToolResult

        if self._loop is None or not self._thread.is_alive():
            raise InputError(f"{server.name} is no longer connected")
        # Not `call_tool`, which matches the result against the patterns of the server's output schema with `re`: one
        # that backtracks without end would stop this process.
        request = CallToolRequest(params=CallToolRequestParams(name=name, arguments=arguments))
        future = asyncio.run_coroutine_threadsafe(client.session.send_request(request, CallToolResult), self._loop)
        try:
            result = future.result(self._call_seconds)
        except Exception as error:
            future.cancel()
            # The client has the same time limit, and may notice first.
            if isinstance(error, TimeoutError) or getattr(error, "code", None) == REQUEST_TIMEOUT:
                raise InputError(f"{server.name} did not answer within {self._call_seconds:g} s") from None
            self._loop.call_soon_threadsafe(self._broken[server.name].set)
            raise InputError(f"{server.name} failed: {_first(error)}") from error
        # Of other content than text, the model gets the type.
        text = "\n".join(part.text if part.type == "text" else f"[{part.type}]" for part in result.content)
        if result.is_error:
            raise InputError(text or f"{server.name} failed")
        return text


async def _transport(server: McpServer, seconds: float, stack: AsyncExitStack) -> Any:
    """The way to a server, with the environment's values for $NAME; `stack` closes what it opens."""
    from mcp import StdioServerParameters

    if server.url is None:
        args = [os.path.expandvars(value) for value in server.args or []]
        return StdioServerParameters(command=server.command or "", args=args, env=_expanded(server.env))
    # It logs each request with the whole address, in which there can be a key.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    url = os.path.expandvars(server.url)
    if not server.headers:
        return url
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    # Reading is not limited: a server may hold a response stream open.
    timeout = httpx2.Timeout(seconds, read=None)
    client = await stack.enter_async_context(httpx2.AsyncClient(headers=_expanded(server.headers), timeout=timeout))
    return streamable_http_client(url, http_client=client)


def _expanded(values: Mapping[str, str] | None) -> dict[str, str]:
    return {name: os.path.expandvars(value) for name, value in (values or {}).items()}


async def _list_tools(client: Client) -> list[Any]:
    """Every page of the server's tools."""
    page = await client.list_tools(cache_mode="refresh")
    tools = list(page.tools)
    while page.next_cursor:
        page = await client.list_tools(cursor=page.next_cursor, cache_mode="refresh")
        tools += page.tools
    return tools


def _is_usable(server: McpServer, tool: Any) -> bool:
    try:
        jsonschema.Draft202012Validator.check_schema(tool.input_schema)
    except jsonschema.exceptions.SchemaError as error:
        logger.warning("serve.mcp_servers: %s: %s has an invalid schema: %s", server.name, tool.name, error.message)
        return False
    return True


def _first(error: BaseException) -> BaseException:
    """The first cause inside nested exception groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
