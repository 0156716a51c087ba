"""Stage: a base, pretrained here or imported, into the agent, by learning the model's own turns of conversations."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from components.config.paths import AGENT, TOOLS
from components.models.checkpoint import load_decoder, save_decoder
from components.models.devices import configure_cpu
from components.models.lora import add_lora, merge_lora
from components.runtime.stage import StageRun
from components.token_rows.batches import TokenRows
from components.training.loop import measure_loss, refuse_bad_masks, train
from components.training.objectives import causal_lm
from components.training.report import TEST_ROWS, describe, refuse_other_vocabulary, report

AGENT_STEPS = 6
"""Turns that an agent may take for one answer."""


def tune(run: StageRun) -> None:
    """Train the base on data/tokens/decoder/tune, save data/models/agent with its tools.

    Raises: InputError when the mask is empty or full, when base and rows do not fit, or when saving fails.
    """
    configure_cpu()
    rows = TokenRows(run.paths.tokens("decoder") / "tune", "train")
    refuse_bad_masks(rows, tuning=True)
    config, base = run.params.tune, run.paths.start_of("decoder")
    model = load_decoder(base)
    refuse_other_vocabulary(run, "decoder", model.config.vocab_size, rows)
    torch.manual_seed(run.params.seed)
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha)
    describe(run, model, model.config.max_seq_len, rows)
    measured = train(run, config, model, rows, causal_lm)
    merge_lora(model)
    save_decoder(model, run.paths.agent, base, _agent_files(run) | _kept(base))
    test = measure_loss(model, TokenRows(rows.folder, "test"), causal_lm, config.micro_batch_size, TEST_ROWS)
    report(run, config, model, measured, run.paths.agent, {"test_loss": test})


def _kept(base: Path) -> dict[str, Path | str]:
    """What ends a generation may be more than the tokenizer says."""
    path = base / "generation_config.json"
    return {path.name: path} if path.is_file() else {}


def _agent_files(run: StageRun) -> dict[str, Path | str]:
    """What makes the model the project's agent, where it learns the project's conversations."""
    agent = json.loads((run.paths.agent_files / AGENT).read_text(encoding="utf-8"))
    if not set(agent.pop("datasets")) & set(run.params.tune.datasets):
        agent = {"tools": [], "forms": False}
    files: dict[str, Path | str] = {AGENT: json.dumps(agent | {"max_steps": AGENT_STEPS}, indent=2) + "\n"}
    return files | ({TOOLS: run.paths.agent_files / TOOLS} if agent["tools"] else {})
