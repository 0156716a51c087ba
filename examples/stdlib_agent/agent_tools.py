"""The agent's tools: what it looks up in its facts, and arithmetic. Saved with a model, these modules alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from examples.stdlib_agent.arithmetic import calculate
from examples.stdlib_agent.knowledge import Knowledge

FACTS = "knowledge.sqlite"


def tools(folder: Path) -> list[Callable[[str], str]]:
    """None of them needs a permission: the facts are opened here.

    Raises: InputError when the facts are missing or broken.
    """
    knowledge = Knowledge(folder / FACTS)
    return [knowledge.lookup, knowledge.bases, knowledge.module, calculate, knowledge.search]
