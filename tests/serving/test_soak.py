"""The soak itself still runs, and what many clients at once are answered is what each gets alone."""

from __future__ import annotations

from pathlib import Path

from benchmarks.soak import soak


def test_answers_under_random_load_are_those_given_alone(agent_folder: Path, tmp_path: Path) -> None:
    found = soak(agent_folder, tmp_path, minutes=0.05)
    assert found["first_wrong"] == []
    assert found["errors"] == found["different_from_alone"] == 0
    assert found["answers"]["gone"] > 0
    assert found["answers"]["stop"] > 0
