"""Bases in memory: engines whose models are adapters of one base share its weights, its batch and its scheduler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from components.config.loop_settings import ServeConfig
from components.inference.adapter_bank import AdapterBank
from components.models.base_store import read_base
from components.models.checkpoint import check_model
from components.models.decoder import Decoder
from serving.engine.router import Router

_SHARED: dict[Any, SharedBase] = {}
"""By the digest of the weights and the settings of serving."""
_OPENING = threading.RLock()


class SharedBase:
    """A base with the adapters of the engines that use it, on each device; it ends with the last of them."""

    def __init__(self, models: Sequence[Decoder], name: str, config: ServeConfig) -> None:
        self._banks = [AdapterBank(model) for model in models]
        self.router = Router(models, name, config, on_step=self._on_step)
        self._listeners: dict[int, Callable[[int], None]] = {}
        """What each adapter's engine does after a decode step."""

    @classmethod
    def open(cls, folder: Path, config: ServeConfig, load: Callable[[], Sequence[Decoder]]) -> tuple[SharedBase, int]:
        """The base of an adapter's folder, from `load` where it is not in memory yet, and the adapter's number there.

        Raises: InputError when the adapter does not fit its base.
        """
        base, key = read_base(folder), (read_base(folder).weights_sha256, config.model_dump_json())
        adapted = check_model(folder)
        assert isinstance(adapted, Decoder)
        with _OPENING:
            if key not in _SHARED:
                _SHARED[key] = cls(load(), f"base {base.source}", config)
            shared = _SHARED[key]
            number = {bank.add(adapted) for bank in shared._banks}.pop()  # each bank counts alike
            shared._listeners[number] = lambda rows: None
            return shared, number

    def listen(self, number: int, on_step: Callable[[int], None]) -> None:
        """Call `on_step` with the number of rows of each decode step."""
        self._listeners[number] = on_step

    def leave(self, number: int) -> None:
        """Forget an adapter, and end with the last; called again, it does nothing."""
        with _OPENING:
            if self._listeners.pop(number, None) is None:
                return
            for bank in self._banks:
                bank.remove(number)
            if not self._listeners:
                for key in [key for key, shared in _SHARED.items() if shared is self]:
                    del _SHARED[key]
                self.router.end()

    def _on_step(self, rows: int) -> None:
        for on_step in list(self._listeners.values()):
            on_step(rows)
