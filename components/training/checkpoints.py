"""Resumable checkpoints of a run: one file each, written atomically.

A file's name has the digest of its content, so that a torn or altered file is recognized and skipped. The last two
are kept, also after the last step: the stage runner removes them when DVC has stored the result.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from components.config.params import InputError
from components.runtime.files import replace_file

MAX_CHECKPOINTS = 2
_NAME = re.compile(r"step-(\d{8})-([0-9a-f]{32})\.safetensors")


@dataclass(frozen=True)
class CheckpointState:
    """What a run needs to resume: tensors by name, and JSON values."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: CheckpointState) -> None:
        """Write a checkpoint.

        Raises: InputError when it cannot be written; earlier checkpoints stay.
        """
        tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
        content = tensors_to_bytes(tensors, {"facts": json.dumps(state.values)})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"step-{state.step:08d}-{_digest(content)}.safetensors"
            replace_file(path, lambda file: file.write(content))
        except OSError as error:
            raise InputError(
                f"{self.folder}: checkpoint of step {state.step} ({len(content) / 1e6:.1f} MB) cannot be written:"
                f" {error.strerror}; free space and run again, the last one is kept"
            ) from error
        for old in self._files()[:-MAX_CHECKPOINTS]:
            old.unlink(missing_ok=True)

    def load(self) -> CheckpointState | None:
        """The newest valid checkpoint; None when there is none."""
        files = self._files()
        for path in reversed(files):
            content = path.read_bytes()
            name = _NAME.fullmatch(path.name)
            if name and _digest(content) == name[2]:
                return CheckpointState(int(name[1]), tensors_from_bytes(content), _values(content))
            print(f"warning: {path}: torn checkpoint (its digest differs); skipped", flush=True)
        if files:
            print(f"warning: {self.folder}: no valid checkpoint is left; starting over", flush=True)
        return None

    def clear(self) -> None:
        """Remove every checkpoint, and what a killed process left of one."""
        for path in (*self._files(), *self.folder.glob(".step-*.tmp")):
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*.safetensors") if _NAME.fullmatch(path.name))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _values(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    values: dict[str, Any] = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["facts"])
    return values
