"""Steps replayed from recordings: CUDA graphs on a GPU, and without one what torch's tracer records of the same pass.

The tracer's recording holds, as a graph does, operations on tensors and not a number of the host's: a step that is
right when it is replayed for later rows takes nothing of theirs but its four tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from components.inference.batching import ContinuousBatch, Row
from components.inference.decode_step import Captured, Recording, Step
from components.models.decoder import Decoder, DecoderConfig

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")),
]
CONFIG = DecoderConfig(300, 64, 2, 4, 2, 16, 96, 256, qk_norm=True)
PROMPTS = [[(3 * place + number) % 300 for place in range(10 + 25 * number)] for number in range(5)]


@dataclass
class Trace:
    function: Callable[..., Tensor]
    read: tuple[Tensor, ...]
    written: Tensor

    def replay(self) -> None:
        self.written.copy_(self.function(*self.read))


class Traced(Captured):
    """The same, recorded by torch's tracer."""

    recorded = 0

    def record(self, given: tuple[Tensor, ...]) -> Recording:
        self.recorded += 1
        read = tuple(tensor.clone() for tensor in given)
        traced = make_fx(lambda tokens, at, where, mask: self.function(tokens, at, where, mask))(*read)
        written = torch.empty_like(self.function(*read))
        return Trace(traced, read, written), read, written


def new_model(device: str, dtype: torch.dtype) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(CONFIG)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (weight.dim() == 1))
    return model.to(device, dtype).eval()


def continued(model: Decoder, make: Callable[[Step], Callable[..., Tensor]]) -> list[list[int]]:
    """What rows of unlike ends are given, with steps that run as `make` says."""
    slots = ContinuousBatch(model, 8)
    slots._step.run = make(slots._step)
    rows = [Row(prompt, 20 + 9 * number) for number, prompt in enumerate(PROMPTS)]
    slots.admit(rows)
    while slots.prefilling:
        slots.prefill()
    while slots.decoding:
        for row in list(slots.decode()):
            if row.finished:
                slots.drop(row)
    return [row.generated for row in rows]


def launched(step: Step) -> Callable[..., Tensor]:
    step.fixed = True
    return step.walk


def recorded(step: Step) -> Callable[..., Tensor]:
    step.fixed = True
    return step.run if isinstance(step.run, Captured) else Traced(step.walk)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_steps_write_what_launched_ones_do(dtype: torch.dtype, device: str) -> None:
    model = new_model(device, dtype)
    assert continued(model, recorded) == continued(model, launched)


def test_steps_of_one_shape_write_what_those_that_spare_padding_do() -> None:
    model = new_model("cpu", torch.float32)
    assert continued(model, launched) == continued(model, lambda step: step.walk)


def test_a_recording_is_made_once_for_each_shape() -> None:
    traces: list[Traced] = []

    def watched(step: Step) -> Traced:
        step.fixed = True
        traces.append(Traced(step.walk))
        return traces[-1]

    continued(new_model("cpu", torch.float32), watched)
    shapes = {(rows, seen) for rows in (4, 8) for seen in (64, 128, 256)}
    assert 1 < traces[0].recorded <= len(shapes)


@pytest.mark.parametrize("device", DEVICES)
def test_steps_in_bfloat16_are_those_in_float32_rounded(device: str) -> None:
    """A row's stream behind 40 tokens, read one by one from the same rounded weights."""
    rounded = new_model(device, torch.bfloat16)
    streams = []
    for model in (rounded, new_model(device, torch.float32)):
        model.load_state_dict(rounded.state_dict())
        slots = ContinuousBatch(model, 4)
        slots._step.run = launched(slots._step)
        for place in range(40):
            tokens, places = torch.full((4,), place).numpy(), torch.full((4,), place).numpy()
            stream = slots._step(tokens, places, places, place + 1, 4)
        streams.append(stream.float())
    short = (streams[0] - streams[1]).norm() / streams[1].norm()
    assert 0 < short < 0.03
