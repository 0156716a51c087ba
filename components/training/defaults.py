"""Settings of a fine-tuning that follow from its base and its rows, where params.yaml has none of its own.

Which settings follow is in scales.yaml (`follow_base`), and so are the bounds of a training (`base_epochs`,
`base_steps`); the rules are here. They depend on what DVC watches alone: the base, the rows and these settings.
`align` has them where the champion is an adapter, whose training goes on.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
from torch import nn

from components.config.loop_settings import AlignConfig
from components.config.model_settings import FromBaseConfig
from components.models.devices import SMALL_MODEL, best_device
from components.runtime.stage import StageRun
from components.token_rows.batches import Rows

C = TypeVar("C", bound=FromBaseConfig)

LORA_RANK = 16
LORA_RATE, LORA_SIZE, LORA_EXPONENT = 1e-3, 135e6, 0.3
"""AdamW's rate for pairs beside so many parameters; with size it falls, with the width to the power of 0.8 or so, as
Thinking Machines measured on Llama (thinkingmachines.ai/blog/lora, 2025)."""
ALIGN_SHARE = 0.5
"""Of that rate for an adapter that is trained already: at all of it, skills without feedback regressed."""
FULL_RATE, FULL_SIZE, FULL_EXPONENT = 5e-4, 22.7e6, 0.55
"""For all weights: measured on MiniLM; at eight billion it is the usual 2e-5."""
TOKEN_DROPOUT = 0.1
STEP_TOKENS = 2048
"""Of an optimizer step on up to FEW_ROWS rows; twice as many on four times the rows."""
FEW_ROWS = 20_000
MIN_ROWS, MAX_ROWS = 8, 32
"""Of an optimizer step."""
FORWARD_TOKENS = {"cpu": 1024, "cuda": 16_384}
"""Of a forward pass: fewer cost a third of a CPU's speed at 512, more cost memory."""
FORWARD_ROWS = {"cpu": 16, "cuda": 64}
"""Of a forward pass at most: rows of like length are together, and more of them are less alike."""
WARMUP_SHARE = 0.05
VALIDATIONS = 12
"""Of a training: with a patience of 5 it ends early where a good third of it brought nothing."""


def fit_to_base(run: StageRun, config: C, model: nn.Module, rows: Rows, base: str) -> C:
    """`config` with the values that follow from the model, which is called `base`; they are printed and logged."""
    if not config.follow_base:
        return config
    lengths = rows.lengths(np.arange(len(rows)))
    tokens = float(lengths.mean())
    values = following(config, count_parameters(model), len(rows), tokens)
    run.tracker.params({f"from_base.{name}": value for name, value in values.items()})
    settings = ", ".join(f"{name} {value}" for name, value in values.items())
    print(f"{run.name}  {base}, {len(rows):,} rows: {settings}; params.yaml overrides each", flush=True)
    return config.model_copy(update=values)


def following(config: FromBaseConfig, parameters: int, rows: int, row_tokens: float) -> dict[str, Any]:
    """The value of each setting in `config.follow_base`, for a base of so many parameters and rows of so many tokens.

    The others' values are taken into account: a rank that a person set decides the learning rate.
    """
    follows = set(config.follow_base)
    values: dict[str, Any] = {"optimizer": "adamw", "trials": 0, "token_dropout": TOKEN_DROPOUT}
    values["lora_rank"] = LORA_RANK if parameters > SMALL_MODEL else 0
    rank = values["lora_rank"] if "lora_rank" in follows else config.lora_rank
    peak, size, exponent = (LORA_RATE, LORA_SIZE, LORA_EXPONENT) if rank else (FULL_RATE, FULL_SIZE, FULL_EXPONENT)
    rate = min(10 * peak, peak * (size / parameters) ** exponent)
    rate *= ALIGN_SHARE if isinstance(config, AlignConfig) else 1
    values["learning_rate"] = float(f"{rate:.1e}")
    step_rows = STEP_TOKENS * 2 ** max(0, math.floor(math.log(max(1, rows) / FEW_ROWS, 4) + 1)) / row_tokens
    values["global_batch_size"] = min(MAX_ROWS, max(MIN_ROWS, _power_of_two(step_rows)))
    if "global_batch_size" in follows and "micro_batch_size" not in follows:
        values["global_batch_size"] = math.ceil(values["global_batch_size"] / config.micro_batch_size)
        values["global_batch_size"] *= config.micro_batch_size
    batch = values["global_batch_size"] if "global_batch_size" in follows else config.global_batch_size
    device = best_device().type
    forward = min(FORWARD_ROWS[device], _power_of_two(FORWARD_TOKENS[device] / row_tokens))
    values["micro_batch_size"] = math.gcd(batch, forward)
    values["max_steps"] = min(config.base_steps, max(1, math.ceil(config.base_epochs * rows / batch)))
    steps = values["max_steps"] if "max_steps" in follows else config.max_steps
    values["warmup_steps"] = math.ceil(WARMUP_SHARE * steps)
    values["validation_steps"] = math.ceil(steps / VALIDATIONS)
    return {name: value for name, value in values.items() if name in follows}


def count_parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def _power_of_two(value: float) -> int:
    """The greatest that is no more than `value`; at least 1."""
    return 1 << max(0, math.floor(math.log2(max(1.0, value))))
