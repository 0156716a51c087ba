"""Adapters of a base model, in PEFT's format."""

from __future__ import annotations

from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
"""In the folder of an adapter: its configuration, as PEFT names it."""


def is_adapter(folder: Path) -> bool:
    """Whether a model folder holds an adapter instead of a whole model's weights."""
    return (folder / ADAPTER_CONFIG).is_file()
