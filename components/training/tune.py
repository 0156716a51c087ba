"""Stage: tune a base, pretrained here or imported, on the model's own turns of conversations into the agent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch

from components.config.paths import AGENT, CONFIG, GENERATION, TOOLS
from components.models.base_store import is_adapter
from components.models.checkpoint import check_model, load_decoder, save_decoder
from components.models.devices import best_device, compute_dtype, configure_cpu
from components.models.vision import VisionLanguageModel
from components.runtime.stage import StageRun
from components.token_rows.batches import Rows, TokenRows
from components.training.defaults import fit_to_base
from components.training.distributed import agreed, join, world_size
from components.training.from_base import refuse_other_vocabulary, train_from_base
from components.training.loop import measure_loss, refuse_bad_masks
from components.training.objectives import causal_lm
from components.training.replay import with_replay
from components.training.report import TEST_ROWS, report

AGENT_STEPS = 6
"""Most turns of an agent for one answer."""


def tune(run: StageRun) -> None:
    """Train the base on data/tokens/decoder/tune, save data/models/agent with its tools.

    Raises: InputError when the mask is empty or full, when base and rows do not fit, or when saving fails.
    """
    configure_cpu()
    join()
    conversations = TokenRows(run.paths.tokens("decoder") / "tune", "train")
    refuse_bad_masks(conversations, tuning=True)
    base, rows = run.paths.start_of("decoder"), cast(Rows, conversations)
    if (run.paths.sight / CONFIG).is_file():
        base = run.paths.sight
    if run.params.tune.base and run.params.tune.replay_share:
        rows = with_replay(run, conversations, base, run.params.tune.replay_share)
    shape = check_model(base)
    config = fit_to_base(run, run.params.tune, shape, rows, run.params.tune.base)
    # A frozen base is read in the dtype of the training, so that there is no second copy in fp32.
    low_rank = config.lora_rank or is_adapter(base)
    dtype = agreed(compute_dtype(config.precision, best_device(), shape)) if low_rank else torch.float32
    model = load_decoder(base, dtype, best_device() if low_rank and world_size() == 1 else None)
    refuse_other_vocabulary(run, "decoder", model.config.vocab_size, rows)
    if isinstance(model, VisionLanguageModel):
        model.train_vision(config.train_vision)
    measured = train_from_base(run, config, model, base, rows, causal_lm)
    generation = base / GENERATION
    files = _agent_files(run) | ({GENERATION: generation} if generation.is_file() else {})
    save_decoder(model, run.paths.agent, base, files)
    test = measure_loss(model, TokenRows(conversations.folder, "test"), causal_lm, config.micro_batch_size, TEST_ROWS)
    report(run, config, model, measured, run.paths.agent, {"test_loss": test})


def _agent_files(run: StageRun) -> dict[str, Path | str]:
    """The files of the project's agent, if the model is tuned on the project's conversations."""
    agent = json.loads((run.paths.agent_files / AGENT).read_text(encoding="utf-8"))
    if not set(agent.pop("datasets")) & set(run.params.tune.datasets):
        agent = {"tools": [], "forms": False}
    files: dict[str, Path | str] = {AGENT: json.dumps(agent | {"max_steps": AGENT_STEPS}, indent=2) + "\n"}
    return files | ({TOOLS: run.paths.agent_files / TOOLS} if agent["tools"] else {})
