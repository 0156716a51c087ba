"""The command `loopwright`: arguments in, calls out.

A group of commands is the typer `app` of its module, a single command a function of its name (`import_` for import,
`bench_machine` for bench-machine). Modules are imported when their command is called, and import what is heavy inside.
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from keyword import iskeyword
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from components.config.params import InputError, Refused
from components.config.paths import Paths, disk_trouble, find_root
from components.config.secrets import environment_secrets, hidden
from components.runtime.files import check_restored, keep_private
from components.runtime.service_registry import bypass_proxies_for_loopback
from loopwright.env import forget_exports
from loopwright.output import print_json, say

COMMANDS = {
    "run": "run",
    "status": "status",
    "data": "data",
    "registry": "registry",
    "serve": "serve",
    "chat": "client",
    "classify": "client",
    "predict": "predict",
    "mcp": "mcp",
    "keys": "keys",
    "audit": "audit",
    "feedback": "feedback",
    "improve": "run",
    "trace": "trace",
    "package": "models",
    "import": "models",
    "export": "models",
    "harness": "models",
    "backup": "maintenance",
    "restore": "maintenance",
    "verify": "maintenance",
    "upgrade": "maintenance",
    "prune": "maintenance",
    "doctor": "doctor",
    "plan": "plan",
    "bench-machine": "plan",
    "env": "env",
    "up": "up",
    "deploy": "up",
}
"""Module of each command, in the order in which `--help` lists them."""


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"loopwright.{COMMANDS[cmd_name]}")
        app = getattr(module, "app", None)
        if app is None:
            app = typer.Typer(add_completion=False)
            name = cmd_name.replace("-", "_")
            app.command(cmd_name)(getattr(module, f"{name}_" if iskeyword(name) else name))
        command = typer.main.get_command(app)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


@app.callback()
def loopwright(context: typer.Context) -> None:
    """Raw text in, a served language-model agent out, and back again: every step versioned, tracked, gated."""
    forget_exports()
    bypass_proxies_for_loopback()
    os.umask(0o077)
    with suppress(InputError):  # no project here, as its command will say
        keep_private(Paths(find_root()))
    if context.invoked_subcommand not in ("restore", "verify", "doctor"):
        check_restored(_home())


def main() -> None:
    """Run the command line; wrong input or a full disk exits with 1 and one line on stderr, a refusal with 3."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr; no character may end a command
    try:
        app()
    except Exception as error:
        message = str(error) if isinstance(error, InputError | Refused) else disk_trouble(error, _home())
        if not message:
            raise
        code = 3 if isinstance(error, Refused) else 1
        message = hidden(message, environment_secrets(os.environ))
        if "--json" in sys.argv:
            print_json({"error": message, "exit_code": code})
        say(message)
        sys.exit(code)


def _home() -> Path:
    """The folder named in disk errors that name no file."""
    try:
        return Paths(find_root()).home
    except InputError:
        return Path.cwd()
