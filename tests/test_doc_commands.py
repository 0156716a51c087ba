"""Each command of README and docs parses: subcommands, options, parameters, targets, modules, routes.

What a command does is tested elsewhere: tests/test_your_project.py runs those of docs/your-project.md, the tests marked
`platform` the others.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import jsonschema
import pytest
import typer

from components.runtime.stage import STAGE_MODULES
from loopwright.cli import app
from serving.http.app import new_api
from tests.pages import ROOT, SPAN, Text, fences, is_parameter, prose

TOOLS = ("bentoml", "dvc", "mlflow", "prefect")
"""Their own help is asked for subcommands and options."""
OTHERS = ("git", "vllm", "ray", "pre-commit", "export", "eval")
"""Taken as they are."""


def commands() -> list[Text]:
    """Each line of each `sh` block."""
    lines = [
        Text(block.page, block.line + at, line)
        for block in fences("sh")
        for at, line in enumerate(block.text.split("\n"))
    ]
    return [line for line in lines if shlex.split(line.text, comments=True)]


COMMANDS = commands()


class _Parsed(Exception):
    """A program has parsed its arguments; the rest of it is not run."""


def check_command(line: str) -> str:
    """Why a line of a page cannot be run as it is written; empty when it can."""
    words = shlex.split(line, comments=True)
    while re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)
    name, *rest = words
    if name == "loopwright":
        return check_loopwright(rest)
    if name == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return "; ".join(f"the Makefile has no target {one}" for one in rest if one not in targets)
    if name == "python" and rest[0] == "-m":
        return check_module(rest[1], rest[2:])
    if name == "curl":
        return check_curl(rest)
    if name == "torchrun":
        from torch.distributed.run import parse_args

        parsed = parse_args(rest)
        module, words = parsed.training_script, parsed.training_script_args
        return check_module(module, words) if parsed.module else f"{module} is a file; start it by -m"
    if name in TOOLS:
        return check_tool(name, rest)
    if name == "pytest":
        return "; ".join(f"no file {word}" for word in rest if word.endswith(".py") and not (ROOT / word).is_file())
    return "" if name in OTHERS else f"{name}: what is this?"


def check_loopwright(words: list[str]) -> str:
    """Parse a command line with the real parsers, and the values of `--set` by their names."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("loopwright", [], resilient_parsing=True)
    while isinstance(command, typer.core.TyperGroup):
        found = command.get_command(context, words[0]) if words else None
        if found is None:
            return f"no command {' '.join(words[:1])!r}; there are {', '.join(command.list_commands(context))}"
        command, words = found, words[1:]
    try:
        command.make_context(command.name, [*words])  # it empties the list
    except Exception as error:  # noqa: BLE001 - typer's own classes have no public base
        return f"{type(error).__name__}: {error}"
    named = [value.partition("=")[0] for flag, value in pairwise(words) if flag == "--set"]
    return "; ".join(f"no parameter {one}" for one in named if not is_parameter(one))


def check_module(name: str, words: list[str]) -> str:
    """Whether a module exists and takes these arguments; its work is not done."""
    if find_spec(name) is None:
        return f"no module {name}"
    if name == "components.runtime.stage":
        return "" if words[0].partition("@")[0] in STAGE_MODULES else f"no stage {words[0]}"
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser: argparse.ArgumentParser, *_: Any) -> None:
        parse(parser, words)
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        patch.setattr(sys, "argv", [name, *words])
        try:
            main: Callable[[], None] | None = getattr(importlib.import_module(name), "main", None)
            main() if main else runpy.run_module(name, run_name="__main__")
        except _Parsed:
            pass
        except SystemExit as ended:
            return f"{name} exits with {ended.code}" if ended.code else ""
    return ""


@cache
def help_of(*words: str) -> tuple[int, str]:
    """Exit code and output of a tool's help, asked in this process: a start of each takes seconds."""
    output = io.StringIO()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # of the tool's own libraries
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(sys, "argv", [*words, "--help"])
        stack.enter_context(redirect_stdout(output))
        stack.enter_context(redirect_stderr(output))
        try:
            runpy.run_module(words[0], run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0), output.getvalue()
    return 0, output.getvalue()


def check_tool(name: str, words: list[str]) -> str:
    """Whether a tool's help knows the subcommands, and the options of the last one."""
    subcommands = [word for word in words[:2] if re.fullmatch(r"[a-z-]+", word) and not word.startswith("-")]
    if name == "mlflow" or words[0] in ("repro", "status", "config"):
        subcommands = subcommands[:1]
    code, text = help_of(name, *subcommands)
    if code:
        return f"{name} {' '.join(subcommands)} --help exits with {code}"
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    return "; ".join(f"{name} has no option {option}" for option in options if option not in text)


def check_curl(words: list[str]) -> str:
    """Whether the API has the route, and takes the body."""
    address = next(word for word in words if "localhost:" in word or "127.0.0.1:" in word)
    path = "/" + address.split("://")[-1].partition("/")[2]
    body = words[words.index("-d") + 1] if "-d" in words else None
    # FastAPI writes oneOf of branches that a function tells apart, and that may overlap.
    schema = json.loads(json.dumps(new_api().openapi()).replace('"oneOf"', '"anyOf"'))
    operation = schema["paths"].get(path.partition("?")[0], {}).get("post" if body else "get")
    if operation is None:
        return f"the API has no route {path}"
    if body:
        wanted = operation["requestBody"]["content"]["application/json"]["schema"]
        validator = jsonschema.Draft202012Validator({**wanted, "components": schema["components"]})
        return "; ".join(error.message for error in validator.iter_errors(json.loads(body)))
    return ""


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.place)
def test_a_command_can_be_run_as_it_is_written(command: Text) -> None:
    assert not (fault := check_command(command.text)), f"{command.place}: {command.text}\n{fault}"


def test_the_pages_have_commands() -> None:
    pages = {command.page.relative_to(ROOT).as_posix() for command in COMMANDS}
    assert {"README.md", "CONTRIBUTING.md", "docs/operations.md", "docs/your-project.md", "docs/api.md"} <= pages


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("loopwright runn", "no command 'runn'"),
        ("loopwright data ad documents x.txt --name n", "no command 'ad'"),
        ("loopwright run --scael smoke", "No such option"),
        ("loopwright up --mlflow-port many", "BadParameter"),
        ("loopwright export agent@champion", "Missing"),
        ("loopwright run --set pretrain.dataset=notes", "no parameter pretrain.dataset"),
        ("make runn", "no target runn"),
        ("python -m benchmarks.engines", "no module"),
        ("python -m benchmarks.soak --hours 1", "exits with 2"),
        ("curl localhost:3000/v1/classifi -d '{}'", "no route"),
        ("curl localhost:3000/v1/classify -d '{\"inputs\": []}'", "'input' is a required property"),
        ("dvc cache dri", "exits with"),
        ("dvc cache dir --lokal x", "no option --lokal"),
        ("mvn test", "what is this?"),
    ],
)
def test_a_wrong_command_is_found(line: str, fault: str) -> None:
    assert fault in check_command(line)


def test_commands_within_a_sentence_exist_with_their_options() -> None:
    faults = []
    for span, found in prose(SPAN):
        words = [word for word in found[1].split() if "..." not in word]
        if words[:1] != ["loopwright"] or len(words) < 2 or not words[1].isalpha():
            continue
        command: Any = typer.main.get_command(app)
        context = command.make_context("loopwright", [], resilient_parsing=True)
        for name in words[1:]:
            if command is None or not isinstance(command, typer.core.TyperGroup):
                break
            command = command.get_command(context, name)
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        known = {"--help", "--json"} | {flag for one in getattr(command, "params", ()) for flag in one.opts}
        known |= {flag for one in getattr(command, "params", ()) for flag in one.secondary_opts}
        if command is None or set(options) - known:
            faults.append(f"{span.place}: {found[0]}")
    assert not faults
