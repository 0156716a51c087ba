"""The stage judge: two models answer the same questions, whether their answers are saved or computed."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from components.config.paths import Paths
from components.datasets.formats import Row
from components.evaluation import parallel_rollout
from components.evaluation.compare_agents import Scores, _mixed, _skill, _slices, judge
from components.evaluation.evaluate import held_out_digest
from components.evaluation.questions import COLUMNS
from components.feedback.curate import curate
from components.feedback.items import NO_CALL
from components.inference.served_model import load_served
from components.models.decoder import Decoder
from tests.feedback.project import correction, item, new_run, write_model, write_partition, write_project

KEPT = ("answers.parquet", "answers.json")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another where others use the cores make tiny products slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """A curated project with a champion and a candidate that differ in their weights alone."""
    paths = write_project(tmp_path_factory.mktemp("judged"))
    votes = [item(number, f"hello number {number}", rating="down" if number % 2 else "up") for number in range(50, 74)]
    write_partition(paths, [*(correction(number) for number in range(20)), *votes])
    curate(new_run(paths, "curate"))
    write_model(paths, paths.champion, seed=0)
    write_model(paths, paths.candidate, seed=1)
    return paths


@pytest.fixture
def paths(made: Paths, tmp_path: Path) -> Paths:
    shutil.copytree(made.root, tmp_path, dirs_exist_ok=True)
    return Paths(tmp_path)


def decision(paths: Paths) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((paths.metrics / "judge.json").read_text())
    return read


def paired(paths: Paths) -> list[Row]:
    rows: list[Row] = pq.read_table(paths.judged / "paired.parquet").to_pylist()
    return rows


def keep_answers(paths: Paths) -> None:
    """Put what the champion answers to the suites into its folder, as its registration does."""
    other = new_run(paths, "judge")
    shutil.move(paths.candidate, paths.root / "aside")
    shutil.copytree(paths.champion, paths.candidate)
    judge(other)
    for name in KEPT:
        shutil.copy(paths.judged / name, paths.champion / name)
    shutil.rmtree(paths.candidate)
    shutil.move(paths.root / "aside", paths.candidate)


def tell_right(paths: Paths) -> None:
    """Rewrite the kept answers, so that whoever reads them finds every one right."""
    rows = pq.read_table(paths.champion / KEPT[0]).to_pylist()
    told = [row | {"correct": True, "right_calls": True} for row in rows]
    pq.write_table(pa.Table.from_pylist(told), paths.champion / KEPT[0])


def test_a_large_model_is_asked_as_it_is_served(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(folder: Path, *arguments: Any) -> Decoder:
        loaded.append(folder)
        return load_served(folder, *arguments)

    monkeypatch.setattr(parallel_rollout, "SMALL_MODEL", 0)
    monkeypatch.setattr(parallel_rollout, "load_served", load)
    judge(new_run(paths, "judge"))
    assert loaded == [paths.candidate, paths.champion]
    assert decision(paths)["findings"]


def test_a_model_is_no_better_than_itself(paths: Paths) -> None:
    shutil.rmtree(paths.candidate)
    shutil.copytree(paths.champion, paths.candidate)
    judge(new_run(paths, "judge"))
    assert decision(paths)["promote"] is False
    assert all(row["champion"] == row["candidate"] for row in paired(paths))


def test_a_decision_comes_with_its_page_pairs_and_answers(paths: Paths) -> None:
    run = new_run(paths, "judge")
    judge(run)
    found = decision(paths)
    assert found["mode"] == "gain"
    assert found["reason"][1:] in (paths.judged / "report.md").read_text()
    skills = {"lookup", "conversation", "feedback/lookup", "talks", "feedback/preferences"}
    assert {finding["skill"] for finding in found["findings"]} == skills
    assert {finding["skill"] for finding in found["findings"] if finding["target"]} == {
        "feedback/lookup",
        "feedback/preferences",
    }
    # Twelve of each suite, twelve texts without one right answer, five corrected prompts, two likes with a dislike.
    counts = Counter(row["skill"] for row in paired(paths))
    assert counts == {"lookup": 12, "conversation": 12, "talks": 12, "feedback/lookup": 5, "feedback/preferences": 2}
    answers = pq.read_table(paths.judged / KEPT[0])
    assert tuple(answers.column_names) == COLUMNS
    assert set(answers["suite"].to_pylist()) == {"lookup/held_out", "conversation/held_out", "talks"}
    assert json.loads((paths.judged / KEPT[1]).read_text()) == {
        "held_out_digest": held_out_digest(paths.collected, run.params),
        "questions": run.params.judge.max_questions,
    }


def test_kept_answers_are_the_measured_ones(paths: Paths) -> None:
    judge(new_run(paths, "judge"))
    measured = paired(paths), decision(paths)
    keep_answers(paths)
    judge(new_run(paths, "judge"))
    assert (paired(paths), decision(paths)) == measured


def test_kept_answers_are_used_as_far_as_they_are_asked(paths: Paths) -> None:
    keep_answers(paths)
    tell_right(paths)
    judge(new_run(paths, "judge", judge__max_questions=10))
    suites = [row["champion"] for row in paired(paths) if row["skill"] in ("lookup", "conversation")]
    assert suites == [1.0] * 20
    assert decision(paths)["promote"] is False
    assert decision(paths)["reason"].startswith("regresses: ")


@pytest.mark.parametrize("changed", [{"held_out_digest": "of other questions"}, {"questions": 3}])
def test_answers_to_other_questions_are_measured_anew(changed: dict[str, Any], paths: Paths) -> None:
    judge(new_run(paths, "judge"))
    measured = paired(paths)
    keep_answers(paths)
    tell_right(paths)
    about = paths.champion / KEPT[1]
    about.write_text(json.dumps(json.loads(about.read_text()) | changed))
    judge(new_run(paths, "judge"))
    assert paired(paths) == measured


@pytest.mark.parametrize(("min_corrected", "guarded"), [(0.0, "lookup (calls)"), (1.0, "lookup")])
def test_overruled_wording_guards_its_calls_once_the_new_one_is_learned(
    min_corrected: float, guarded: str, paths: Paths
) -> None:
    assert json.loads((paths.curated / "curated.json").read_text())["skills"]["lookup"]["overruled"] is True
    judge(new_run(paths, "judge", judge__min_corrected=min_corrected))
    (found,) = (one for one in decision(paths)["findings"] if one["skill"].startswith("lookup"))
    assert found["skill"] == guarded
    assert found["target"] is False


def test_suites_that_end_on_several_tools_are_parted_by_the_one_that_is_put_into_words() -> None:
    bases, module = {"name": "bases", "arguments": {}}, {"name": "module", "arguments": {}}
    questions = [
        ("bases/held_out_symbols", [bases], "bases", "bases"),
        ("multi_hop/held_out_symbols", [bases, module], "multi_hop to module", "module"),
        ("multi_hop/held_out_modules", [bases, bases], "multi_hop to bases", "bases"),
        ("later_question/held_out_symbols", [bases], "later_question to bases", "bases"),
        ("later_question/held_out_symbols", [], f"later_question to {NO_CALL}", NO_CALL),
        ("feedback/module", [bases, module], "feedback/module", "module"),
        ("small_talk/hand_written", [], "small_talk", NO_CALL),
    ]
    mixed = _mixed([(suite, calls) for suite, calls, _, _ in questions])
    for suite, calls, skill, tool in questions:
        assert _skill(suite, calls, mixed) == (skill, tool)


def test_superseded_skills_still_regress_with_their_calls(paths: Paths) -> None:
    """Many wrong calls refuse a candidate whatever wording users want."""
    keep_answers(paths)
    tell_right(paths)
    judge(new_run(paths, "judge", judge__min_corrected=0.0))
    assert decision(paths)["promote"] is False
    assert "lookup (calls)" in decision(paths)["reason"]


def test_the_mode_lies_beside_the_champion(paths: Paths) -> None:
    (paths.champion / "gate.json").write_text(json.dumps({"mode": "any_gain"}))
    judge(new_run(paths, "judge"))
    assert decision(paths)["mode"] == "any_gain"
    (overall,) = (one for one in decision(paths)["findings"] if one["skill"] == "overall")
    assert overall["questions"] == 29


def test_a_suite_is_known_by_the_tool_it_calls_and_not_by_its_name() -> None:
    tools = {"arithmetic": "calculate", "feedback/calculate": "calculate"}
    right, wrong = [1.0, 1.0], [0.0, 0.0]
    champion = Scores({"arithmetic": right, "feedback/calculate": wrong}, {"arithmetic": right}, {}, tools, {})
    candidate = Scores({"arithmetic": wrong, "feedback/calculate": right}, {"arithmetic": right}, {}, tools, {})
    skills = [each.skill for each in _slices(candidate, champion, {"calculate"}, 0.6)]
    assert skills == ["arithmetic (calls)", "feedback/calculate"]
    assert [each.skill for each in _slices(champion, champion, {"calculate"}, 0.6)] == [
        "arithmetic",
        "feedback/calculate",
    ]


@pytest.mark.parametrize(("corrected", "guarded"), [(3, "lookup (calls)"), (2, "lookup")])
def test_a_suite_guards_its_calls_alone_from_the_share_of_corrections_that_must_be_answered(
    corrected: int, guarded: str
) -> None:
    """Three of five are 0.6."""
    tools = {"lookup": "lookup", "feedback/lookup": "lookup"}
    answered = [1.0] * corrected + [0.0] * (5 - corrected)
    champion = Scores({"lookup": [1.0], "feedback/lookup": [0.0] * 5}, {"lookup": [1.0]}, {}, tools, {})
    candidate = Scores({"lookup": [0.0], "feedback/lookup": answered}, {"lookup": [1.0]}, {}, tools, {})
    suite, feedback = _slices(candidate, champion, {"lookup"}, 0.6)
    assert suite.skill == guarded
    assert (feedback.target, feedback.floor) == (True, 0.6)
    assert not suite.target
