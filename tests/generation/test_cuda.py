"""What only a GPU can show: steps replayed as CUDA graphs, in fp32 and bf16. Without one they skip, saying so."""

from __future__ import annotations

import pytest
import torch

from components.generation.slots import Row, Slots
from components.generation.steps import Captured
from components.models.decoder import Decoder, DecoderConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def continued(model: Decoder, prompts: list[list[int]], graphs: bool) -> list[list[int]]:
    slots = Slots(model, 8)
    if not graphs:
        slots._step._run = slots._step.walk
    rows = [Row(prompt, 40) for prompt in prompts]
    slots.admit(rows)
    while slots.reading:
        slots.read()
    while slots.writing:
        for row in slots.step():
            if row.finished:
                slots.drop(row)
    assert not graphs or isinstance(slots._step._run, Captured)
    return [row.generated for row in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_steps_write_what_launched_ones_do(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(300, 64, 2, 4, 2, 16, 96, 256, qk_norm=True)).to("cuda", dtype).eval()
    prompts = [[(3 * place + number) % 300 for place in range(10 + 25 * number)] for number in range(5)]
    assert continued(model, prompts, graphs=True) == continued(model, prompts, graphs=False)
