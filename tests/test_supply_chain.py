"""The lock has a hash for each package, by which uv refuses a file that was replaced in an index."""

from __future__ import annotations

import re

from tests.pages import ROOT

UNHASHED = {"torch"}
"""Differs between the indexes of PyPI, CPU and CUDA."""


def test_every_package_is_locked_with_hashes() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", text.strip())
    hashed = {entry.partition("==")[0] for entry in entries if re.search(r"--hash=sha256:[0-9a-f]{64}", entry)}
    assert {entry.partition("==")[0] for entry in entries} - hashed == UNHASHED
    assert len(hashed) > 300
