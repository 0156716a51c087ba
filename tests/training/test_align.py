"""The stage align: a candidate trained on user feedback, with its lineage."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.agent.agent import Agent
from components.config.params import InputError
from components.config.paths import Paths
from components.datasets.formats import DatasetWriter
from components.feedback.curate import curate
from components.models.base_store import read_base
from components.models.checkpoint import load_decoder
from components.models.decoder import Decoder, DecoderConfig
from components.models.weight_files import weights_digest
from components.runtime.stage import digest
from components.token_rows.batches import TokenRows
from components.token_rows.preference_rows import AlignRows, PreferenceRows, Role
from components.training.align import align, align_objective, freeze, reference_log_probs, row_log_probs
from components.training.loop import train
from tests.feedback.project import SETTINGS, chat, correction, item, new_run, write_partition, write_project
from tests.training.test_stages import Processes

LONG = {
    "align__max_steps": 40,
    "align__learning_rate": 0.004,
    "align__micro_batch_size": 4,
    "align__checkpoint_seconds": 60.0,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another where others use the cores make tiny products slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """A project with corrections, likes and dislikes, curated."""
    made = write_project(tmp_path)
    votes = [item(number, f"hello number {number}", rating="down" if number % 2 else "up") for number in range(50, 62)]
    write_partition(made, [*(correction(number) for number in range(12)), *votes])
    curate(new_run(made, "curate"))
    return made


def learned_preferences(paths: Paths) -> PreferenceRows:
    return PreferenceRows(paths.curated / "preferences-rows", "train")


def gains(paths: Paths) -> dict[Role, float]:
    """By how much the candidate finds each kind of answer more probable than the model it started from, in nats."""
    rows = learned_preferences(paths)
    batch = rows.batch(np.arange(len(rows.tokens)))
    moved = row_log_probs(load_decoder(paths.candidate), batch) - row_log_probs(load_decoder(paths.start), batch)
    return {role: float(moved[batch["role"] == role].mean()) for role in set(map(Role, rows.roles.tolist()))}


def test_align_leaves_a_candidate_and_who_taught_it(paths: Paths) -> None:
    start = digest(paths.start)
    align(new_run(paths, "align"))
    assert digest(paths.start) == start
    candidate = load_decoder(paths.candidate)
    assert candidate.config == load_decoder(paths.start).config
    assert Agent.load(paths.candidate, candidate.config.max_seq_len).max_steps == 2
    curated = json.loads((paths.curated / "curated.json").read_text())
    assert json.loads((paths.candidate / "lessons.json").read_text()) == {
        "parent": "agent/1",
        "feedback": curated["feedback"],
        "curated": digest(paths.curated),
    }
    assert len(curated["feedback"]) == 12 - 3 + 12 - 3
    metrics = json.loads((paths.metrics / "align.json").read_text())
    assert metrics["steps"] == 24
    assert metrics["weights_sha256"] == digest(paths.candidate / "model.safetensors")
    assert any(new_run(paths, "align").state.iterdir()), "until DVC has stored the candidate"


def test_align_moves_towards_what_people_want(paths: Paths) -> None:
    align(new_run(paths, "align", **LONG))
    moved = gains(paths)
    assert moved[Role.CHOSEN] > 1
    assert moved[Role.CHOSEN] > moved[Role.REJECTED] + 1
    assert moved[Role.LIKED] > moved[Role.DISLIKED]


def test_settings_follow_from_a_champion_that_is_an_adapter_alone(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(paths.root)
    monkeypatch.setenv("LOOPWRIGHT_HOME", "var")
    unset = {f"align__{name}": None for name in ("max_steps", "global_batch_size", "micro_batch_size", "warmup_steps")}
    align(new_run(paths, "align", align__lora_rank=4, **unset | {"align__max_steps": 2}))
    assert "params.yaml overrides each" not in capsys.readouterr().out
    (paths.candidate / "origin.json").write_text(json.dumps({"version": "agent/2"}))
    shutil.rmtree(paths.start)
    shutil.move(paths.candidate, paths.start)
    shutil.rmtree(paths.root / "state" / "align")
    align(new_run(paths, "align", **unset))
    assert "agent/2, 33 rows: learning_rate 0.005, global_batch_size 16" in capsys.readouterr().out


def test_an_adapter_is_trained_beside_the_champion_from_one_copy_of_its_weights(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First a new adapter of a champion that has none, then, from that one, the adapter goes on."""
    monkeypatch.chdir(paths.root)
    (paths.root / "dvc.yaml").touch()
    monkeypatch.setenv("LOOPWRIGHT_HOME", "var")
    seen: list[set[int]] = []

    def watched(config: Any, reference: Decoder) -> Any:
        seen.append({weight.data_ptr() for weight in reference.parameters()})
        objective = align_objective(config, reference)

        def watch(model: Decoder, batch: Any) -> Any:
            own = {weight.data_ptr() for weight in model.parameters() if weight.requires_grad}
            assert {weight.data_ptr() for weight in model.parameters()} - own <= seen[-1]
            assert not own & seen[-1]
            return objective(model, batch)

        return watch

    monkeypatch.setattr("components.training.align.align_objective", watched)
    align(new_run(paths, "align", align__lora_rank=4, **LONG))
    gained = gains(paths)
    assert gained[Role.CHOSEN] > 0 > gained[Role.REJECTED]
    first = read_base(paths.candidate)
    assert first.weights_sha256 == weights_digest(paths.start)
    shutil.rmtree(paths.start)
    paths.candidate.rename(paths.start)
    (paths.start / "origin.json").write_text('{"version": "agent/2"}')
    shutil.rmtree(paths.root / "state" / "align")  # of other inputs
    align(new_run(paths, "align", **LONG))
    assert read_base(paths.candidate) == first
    again = gains(paths)
    assert again[Role.CHOSEN] > 0
    assert len(seen) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device quantizes")
def test_a_quantized_base_is_refused_on_a_cpu(paths: Paths) -> None:
    with pytest.raises(InputError, match=r"params\.yaml: align\.quantize_base: nf4: needs a CUDA device"):
        align(new_run(paths, "align", align__quantize_base="nf4", align__lora_rank=4))
    assert not paths.candidate.exists()


def test_a_set_of_lone_preferences_trains_too(paths: Paths) -> None:
    """No feedback, and so no demonstration: pairs alone, between earlier conversations."""
    with DatasetWriter(paths.added / "mine", "mine", "preferences") as writer:
        for number in range(16):
            (prompt, chosen), rejected = chat(number), {"role": "assistant", "content": "go away"}
            row = {"id": f"m{number}", "prompt": [prompt], "chosen": [chosen], "rejected": [rejected]}
            writer.write("train", row)
    curate(new_run(paths, "curate", align__dataset="mine"))
    align(new_run(paths, "align", align__dataset="mine", **LONG))
    moved = gains(paths)
    assert set(moved) == {Role.CHOSEN, Role.REJECTED}
    assert moved[Role.CHOSEN] > moved[Role.REJECTED] + 1


def test_the_reference_stays_as_it_was(paths: Paths) -> None:
    run = new_run(paths, "align")
    reference, model = load_decoder(paths.start).eval().requires_grad_(False), load_decoder(paths.start)
    preferences = learned_preferences(paths)
    reference_log_probs(reference, preferences, 3)
    measured = preferences.reference.copy()
    batch = preferences.batch(np.arange(len(preferences.tokens)))
    np.testing.assert_allclose(measured, row_log_probs(reference, batch).numpy(), rtol=1e-4)
    replay = TokenRows(paths.curated / "replay", "train")
    rows = AlignRows(TokenRows(paths.curated / "sft", "train"), replay, preferences)
    train(run, run.params.align, model, rows, align_objective(run.params.align, reference))
    assert equal(reference, load_decoder(paths.start))
    assert not equal(reference, model)
    np.testing.assert_array_equal(preferences.reference, measured)


def equal(one: Decoder, other: Decoder) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    ("share", "blocks"), [(0.01, [3]), (0.25, [3]), (0.5, [2, 3]), (0.75, [1, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_the_last_blocks_learn_and_the_embeddings_only_with_all_of_them(share: float, blocks: list[int]) -> None:
    model = Decoder(DecoderConfig(31, 16, 4, 2, 1, 8, 24, 32))
    freeze(model, share)
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {int(name.split(".")[1]) for name in learning if name.startswith("blocks.")} == set(blocks)
    assert "norm.weight" in learning
    assert ("embed.weight" in learning) is (share == 1)


def test_rows_longer_than_the_model_takes_are_refused(paths: Paths) -> None:
    larger = {"prepare__decoder__seq_len": 192, "model__decoder__max_seq_len": 256}
    curate(new_run(paths, "curate", **larger))
    with pytest.raises(InputError, match=r"prepare\.decoder\.seq_len: 192 exceeds the 128 tokens of the model"):
        align(new_run(paths, "align", **larger))


@pytest.fixture
def processes(paths: Paths) -> Iterator[Processes]:
    made = Processes(paths, SETTINGS | {"align.max_steps": 80})
    with made.server:
        yield made
        assert made.server.stdin is not None
        made.server.stdin.close()


def test_killed_runs_end_at_the_weights_of_an_unbroken_one(processes: Processes) -> None:
    expected, _ = processes.finish("align", "unbroken")
    lessons = (processes.paths.candidate / "lessons.json").read_bytes()
    steps = [random.randint(2, 9) for _ in range(2)]
    for step in steps:
        code, _ = processes.run("align", "killed", kill_after=step)
        assert code == -signal.SIGKILL, steps
    found, lines = processes.finish("align", "killed")
    assert any(line.startswith("align  resumed at step ") for line in lines), (steps, lines)
    assert found == expected, steps
    assert (processes.paths.candidate / "lessons.json").read_bytes() == lessons
