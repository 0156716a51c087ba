"""A real MCP server for the tests, on standard input and output, or on a port: `python mcp_server.py [PORT]`."""

import os
import sys
import time
from typing import Literal

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel, Field

server = MCPServer("shop", log_level="ERROR")


def price(article: str, currency: Literal["eur", "usd"] = "eur") -> str:
    """What an article costs."""
    return f"{article} costs {len(article)} {currency}{os.environ.get('MARK', '')}"


def fail(reason: str) -> str:
    """Never works."""
    raise ToolError(reason)


def sleep(seconds: float) -> str:
    """Answers late."""
    time.sleep(seconds)
    return "awake"


class Label(BaseModel):
    """Its published pattern, which pydantic does not check, backtracks without end over `text`."""

    text: str = Field(json_schema_extra={"pattern": "^(a+)+$"})


def label() -> Label:
    """Structured content with an output schema."""
    return Label(text="a" * 40 + "!")


def die() -> str:
    """Ends the server."""
    os._exit(3)


if __name__ == "__main__":
    for function in (price, fail, sleep, label, die):
        server.add_tool(function)
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run("stdio")
