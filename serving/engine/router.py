"""The router: a scheduler for each device, over its own copy of the model, and which of them a turn goes to.

Each device answers with the same bits as another one of its kind, so that routing changes speed alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from components.config.errors import InputError
from components.config.loop_settings import ServeConfig
from components.inference.batching import ContinuousBatch
from components.models.decoder import Decoder
from components.models.devices import use_threads
from serving.engine.scheduler import Scheduler, Turn

TURN_TOKENS = 64
"""Tokens of a known prefix that outweigh one turn more on a device."""
MOST_TOKENS = 512
"""Of a known prefix that count: for none do turns crowd on a device that has eight more than another."""


class Router:
    """Sends turns to the device that knows most of their prompt, unless others have much less to do."""

    def __init__(
        self,
        models: Sequence[Decoder],
        name: str,
        config: ServeConfig,
        slots: int = 0,
        on_step: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """`models`: the model on each device; `on_step` is called with the number of rows of each decode step."""
        self.models, rows = models, slots or config.max_running
        sharers = len(models) if models[0].embed.weight.device.type == "cpu" else 1
        use_threads(max(1, torch.get_num_threads() // sharers))  # which each scheduler's thread takes over
        batches = [ContinuousBatch(model, rows, config.max_context_tokens, sharers) for model in models]
        self.schedulers = [Scheduler(batch, name, on_step) for batch in batches]
        self.count = sum(batch.count for batch in batches)
        """Turns that have a slot at most."""
        self.context = min(batch.context for batch in batches)
        self.note = batches[0].plan.note(models[0].config.max_seq_len, rows)
        """What the memory of a device does not hold; None where it holds all."""
        self._choosing = threading.Lock()

    def submit(self, turn: Turn, first: bool = False) -> None:
        """Queue a turn on a device; `first` puts it in front of that queue."""
        if len(self.schedulers) == 1:
            self.schedulers[0].submit(turn, first)
            return
        with self._choosing:  # the next one counts this one
            max(self.schedulers, key=lambda scheduler: _merit(scheduler, turn)).submit(turn, first)

    def end(self) -> None:
        """End the threads when no turn is left."""
        for scheduler in self.schedulers:
            scheduler.end()

    def join(self) -> None:
        for scheduler in self.schedulers:
            scheduler.join()


def _merit(scheduler: Scheduler, turn: Turn) -> tuple[bool, bool, int]:
    """What is compared to choose a device: whether it works, has a free slot, and its known tokens against its load."""
    load, known = scheduler.load, min(scheduler.slots.shared(turn.row), MOST_TOKENS)
    return not scheduler.failing, load < scheduler.slots.count, known - TURN_TOKENS * load


def serving_devices(names: Literal["auto"] | Sequence[str]) -> list[torch.device]:
    """The devices of `serve.devices`.

    Raises: InputError when there is no such device, or they are not of one kind.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if names == "auto":
        return [torch.device("cuda", number) for number in range(count)] or [torch.device("cpu")]
    devices = [torch.device(name) for name in names]
    cuda = [device for device in devices if device.type == "cuda"]
    if missing := [str(device) for device in cuda if device.index >= count]:
        raise InputError(f"serve.devices: {missing[0]}: {count} CUDA devices are visible here; name others, or auto")
    if 0 < len(cuda) < len(devices) or len(set(cuda)) < len(cuda):
        raise InputError(f"serve.devices: {', '.join(names)}: name CUDA devices, each once, or the CPU alone")
    return devices
