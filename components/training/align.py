"""Stage: a model that people have judged into one that learned from it, starting from its own weights.

Corrections are demonstrations, with earlier conversations replayed between them; pairs and unpaired labels are compared
with the frozen model that training starts from.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from components.config.paths import AGENT, ORIGIN, TOOLS
from components.models.checkpoint import load_decoder, save_decoder
from components.models.decoder import Decoder
from components.models.devices import best_device, compute_dtype, configure_cpu
from components.runtime.stage import StageRun, digest
from components.token_rows.batches import TokenRows
from components.token_rows.preference_rows import AlignRows, PreferenceRows
from components.training.loop import refuse_bad_masks, train
from components.training.preferences import align_objective, reference_log_probs
from components.training.report import describe, report


def align(run: StageRun) -> None:
    """Train data/models/start on data/curated, save data/models/candidate.

    Raises: InputError when model and rows do not fit, when there is nothing to learn, or when saving fails.
    """
    configure_cpu()
    config, curated = run.params.align, run.paths.curated
    replay = TokenRows(curated / "replay", "train")
    refuse_bad_masks(replay, tuning=True)
    device = best_device()
    reference = load_decoder(run.paths.start, compute_dtype(config.precision, device), device).eval()
    reference.requires_grad_(False)
    preferences = PreferenceRows(curated / "preferences-rows", "train")
    reference_log_probs(reference, preferences, config.micro_batch_size)
    rows = AlignRows(TokenRows(curated / "sft", "train"), replay, preferences)
    model = load_decoder(run.paths.start)
    freeze(model, config.trained_share)
    torch.manual_seed(run.params.seed)
    describe(run, model, model.config.max_seq_len, rows)
    measured = train(run, config, model, rows, align_objective(config, reference))
    save_decoder(model, run.paths.candidate, run.paths.start, _agent_files(run.paths.start, _lessons(run)))
    report(run, config, model, measured, run.paths.candidate, {})


def freeze(model: Decoder, trained_share: float) -> None:
    """Let only the last blocks learn, and the final norm; a share of 1 trains everything."""
    if trained_share == 1:
        return
    model.requires_grad_(False)
    model.norm.requires_grad_(True)
    for block in model.blocks[-max(1, round(len(model.blocks) * trained_share)) :]:
        block.requires_grad_(True)


def _lessons(run: StageRun) -> str:
    """Where the candidate comes from, as JSON."""
    curated = json.loads((run.paths.curated / "curated.json").read_text(encoding="utf-8"))
    origin = json.loads((run.paths.start / ORIGIN).read_text(encoding="utf-8"))
    lessons = {"parent": origin["version"], "feedback": curated["feedback"], "curated": digest(run.paths.curated)}
    return json.dumps(lessons, indent=2) + "\n"


def _agent_files(start: Path, lessons: str) -> dict[str, Path | str]:
    """The tools of the model before it."""
    # The last is of a model that was saved before tools were saved with models.
    names = (AGENT, TOOLS, "knowledge.sqlite")
    kept: dict[str, Path | str] = {name: start / name for name in names if (start / name).exists()}
    return kept | {"lessons.json": lessons}
