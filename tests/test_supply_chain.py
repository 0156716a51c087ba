"""Each lock has a hash for each package, by which uv refuses a file that was replaced in an index."""

from __future__ import annotations

import re

import pytest

from tests.pages import ROOT

UNHASHED = {"torch"}
"""Differs between the indexes of PyPI, CPU and CUDA."""


SERVE, WORKER = "requirements-serve.lock", "requirements-worker.lock"


def locked(lock: str) -> dict[str, str]:
    """The entries of a lock, by package and version."""
    entries = re.split(r"\n(?=\S)", (ROOT / lock).read_text(encoding="utf-8").strip())
    return {entry.split(" ", 1)[0]: entry for entry in entries}


@pytest.mark.parametrize("lock", ["requirements.lock", SERVE, WORKER])
def test_every_package_is_locked_with_hashes(lock: str) -> None:
    entries = locked(lock)
    hashed = {
        name.partition("==")[0] for name, text in entries.items() if re.search(r"--hash=sha256:[0-9a-f]{64}", text)
    }
    assert {name.partition("==")[0] for name in entries} - hashed == UNHASHED
    assert len(hashed) > 130


def test_what_is_deployed_is_what_was_tested() -> None:
    tested, deployed = set(locked("requirements.lock")), {*locked(SERVE), *locked(WORKER)}
    known = {name.partition("==")[0] for name in tested}
    assert not [name for name in deployed - tested if name.partition("==")[0] in known]
    names = {name.partition("==")[0] for name in deployed}
    assert "psycopg-binary" in names
    assert not names & {"pytest", "playwright", "lm-eval", "mypy", "ruff", "hypothesis", "schemathesis", "pre-commit"}
