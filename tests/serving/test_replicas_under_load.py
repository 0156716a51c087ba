"""Two server processes behind haproxy on PostgreSQL, while one is killed and models and database change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.postgres_server import programs
from benchmarks.replicas import trial

pytestmark = [
    pytest.mark.platform,
    pytest.mark.skipif(
        programs() is None or shutil.which("haproxy") is None,
        reason="PostgreSQL's server or haproxy is not installed; apt-get install postgresql haproxy",
    ),
]


def test_no_answer_is_lost_and_no_version_mixed(
    agent_folder: Path, agent_maker: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("psycopg", reason='PostgreSQL\'s driver is not installed; pip install "loopwright[postgres]"')
    second = agent_maker(tmp_path / "second" / "agent", "I am the second.")
    (tmp_path / "project").mkdir()
    result = trial([agent_folder, second], tmp_path / "project", replicas=2, clients=8, rounds=1)
    assert result["requests"] > 0
    assert result["failures"] == [] or result["failed requests"] == 0, result["failures"]
    assert result["mixed streams"] == result["changed versions"] == 0
    assert set(result["texts by version"].values()) == {1}
    assert abs(result["limit"]["ratio"] - 1) <= 0.02
    assert set(result["exit codes"]) == {0}
