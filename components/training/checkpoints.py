"""Resumable checkpoints of a run: one file each, written atomically; of several processes a folder each.

Training waits for a copy of the tensors alone, which a thread then writes; the copies' memory is taken beside the first
steps. A file's name has the digest of its content, so that a torn or altered file is recognized and skipped. In a
folder, which `torch.distributed.checkpoint` writes and which any number of processes reads, `commit.json` is written
last, with the digest of every other file. The two newest are kept, also when training has ended: the stage runner
removes them when DVC has stored the result.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from components.config.params import InputError
from components.models.devices import use_threads
from components.runtime.files import remove, replace_file, write_text
from components.runtime.stage import digest
from components.training.distributed import MAX_WAIT, agreed, local, own_rows, rank, summed, world_size

T = TypeVar("T")
MAX_CHECKPOINTS = 2
COMMIT, VALUES = "commit.json", "values.json"
_NAME = re.compile(r"step-(\d{8})-([0-9a-f]{32})\.safetensors")
_FOLDER = re.compile(r"step-(\d{8})-shards")


@dataclass(frozen=True)
class CheckpointState:
    """What a run needs to resume: tensors by name, and JSON values."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]
    folder: Path | None = None
    """Where the tensors are, if they are not here: a checkpoint of several processes."""

    def copy_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite tensors with those of the same names, or with this rank's rows of them where they are sharded.

        Raises: InputError when a folder cannot be read.
        """
        if self.folder is None:
            for name, tensor in tensors.items():
                target = local(tensor) if world_size() > 1 and tensor.dim() else tensor
                target.copy_(own_rows(self.tensors[name]))
            return
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_loader import load

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process may read it
            try:
                load(dict(tensors), checkpoint_id=self.folder)
            except CheckpointException as error:
                reason = next(iter(error.failures.values()))[0]
                raise InputError(
                    f"{self.folder}: cannot be read: {reason}; remove it and run again; an earlier checkpoint is used"
                ) from error


class Checkpoints:
    """The checkpoints of one run in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: Future[None] | None = None
        self._stager: Any = None
        self._group: dist.ProcessGroup | None = None

    def prepare(self, tensors: dict[str, Tensor]) -> None:
        """Let a thread take the memory for the copies of these tensors, which may change meanwhile.

        Fresh memory takes several times as long as the copying: the first `save` would stop training for it.
        """

        def copy() -> None:
            use_threads(1)  # beside the steps
            self._stage(tensors)

        self._start(copy)

    def save(self, state: CheckpointState) -> None:
        """Copy a checkpoint and let a thread write it, once the checkpoint before is written.

        The copies keep their memory until `wait`, so that the next checkpoint takes no new one.

        Raises: InputError when the checkpoint before could not be written; earlier checkpoints stay.
        """
        self._finish()
        tensors, values = self._stage(state.tensors), json.dumps(state.values)
        write: Callable[[int, dict[str, Tensor], str], None] = self._write_file
        if world_size() > 1:
            # Of its own: training goes on in that of all ranks, in another order.
            self._group = self._group or dist.new_group(backend="gloo", timeout=MAX_WAIT)
            write = self._write_shards
        self._start(lambda: write(state.step, tensors, values))

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises: InputError when it cannot be; earlier checkpoints stay.
        """
        self._finish()
        if self._stager is not None:
            self._stager.close()  # its copies would stay until garbage is collected, being in a cycle
            self._stager = None

    def _stage(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of tensors, in the memory of earlier copies of the same tensors."""
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self._stager = self._stager or DefaultStager(StagingOptions(False, False, False, False))
        copies: dict[str, Tensor] = self._stager.stage(tensors)
        return copies

    def _start(self, work: Callable[[], None]) -> None:
        thread = ThreadPoolExecutor(1)
        self._running = thread.submit(work)
        thread.shutdown(wait=False)

    def _finish(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _write_file(self, step: int, tensors: dict[str, Tensor], values: str) -> None:
        content = tensors_to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()}, {"facts": values})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"step-{step:08d}-{_digest(content)}.safetensors"
            replace_file(path, lambda file: file.write(content))
        except OSError as error:
            raise InputError(
                f"{self.folder}: checkpoint of step {step} ({len(content) / 1e6:.1f} MB) cannot be written:"
                f" {error.strerror}; free space and run again, the last one is kept"
            ) from error
        self._remove_old()

    def _write_shards(self, step: int, tensors: dict[str, Tensor], values: str) -> None:
        """Each rank writes its rows, then rank 0 the values and the digests of all files."""
        from torch.distributed.checkpoint.state_dict_saver import save

        folder, is_first = self.folder / f"step-{step:08d}-shards", rank() == 0

        def write_rows() -> None:
            save(tensors, checkpoint_id=folder, process_group=self._group)

        def write_values() -> dict[str, str]:
            """Digest of each file that this rank wrote."""
            written = [*folder.glob(f"__{rank()}_*")]
            if is_first:
                write_text(folder / VALUES, values)
                written += [folder / ".metadata", folder / VALUES]
            return {path.name: digest(path) for path in written}

        self._on_all(folder, lambda: _remove(folder) if is_first else None)
        self._on_all(folder, write_rows)
        parts = self._on_all(folder, write_values)
        commit = json.dumps({name: digest for part in parts for name, digest in part.items()})
        self._on_all(folder, lambda: write_text(folder / COMMIT, commit) if is_first else None)
        if is_first:
            self._remove_old()

    def _on_all(self, folder: Path, write: Callable[[], T]) -> list[T]:
        """Run `write` on every rank; returns its results in the order of the ranks.

        Raises: InputError on every rank where the disk of one refuses: without an answer the others would wait.
        """
        from torch.distributed.checkpoint.api import CheckpointException

        outcome: tuple[T | None, str]
        try:
            outcome = write(), ""
        except InputError as error:
            outcome = None, str(error)
        except (OSError, CheckpointException) as error:
            reason = error.strerror if isinstance(error, OSError) else next(iter(error.failures.values()))[0]
            outcome = None, f"{folder}: cannot be written: {reason}; free space and run again, the last one is kept"
        outcomes: list[Any] = [None] * world_size()
        dist.all_gather_object(outcomes, outcome, self._group)
        for _, message in outcomes:
            if message:
                raise InputError(message)
        return [result for result, _ in outcomes]

    def _remove_old(self) -> None:
        files = self._files()
        for path in {*files[:-MAX_CHECKPOINTS], *self.folder.glob("step-*-shards")} - {*files[-MAX_CHECKPOINTS:]}:
            _remove(path)

    def load(self) -> CheckpointState | None:
        """The newest valid checkpoint; None when there is none."""
        files = agreed(self._files())
        for path in reversed(files):
            if in_folder := _FOLDER.fullmatch(path.name):
                if _is_whole(path):
                    values = json.loads((path / VALUES).read_text(encoding="utf-8"))
                    return CheckpointState(int(in_folder[1]), {}, values, path)
            else:
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
        for path in (*self._files(), *self.folder.glob(".step-*.tmp"), *self.folder.glob("step-*-shards")):
            _remove(path)

    def _files(self) -> list[Path]:
        """The checkpoints in the order of their steps; folders that were not finished are none."""
        folders = [path.parent for path in self.folder.glob(f"step-*-shards/{COMMIT}")]
        files = [path for path in self.folder.glob("step-*.safetensors") if _NAME.fullmatch(path.name)]
        return sorted(folders + files)


def _remove(path: Path) -> None:
    """Remove a checkpoint; half a folder is none."""
    if path.is_dir():
        (path / COMMIT).unlink(missing_ok=True)
    remove(path)


def _is_whole(folder: Path) -> bool:
    """Whether every file of a folder has its digest; each rank reads its share of them."""
    try:
        digests = json.loads((folder / COMMIT).read_text(encoding="utf-8"))
        share = sorted(digests)[rank() :: world_size()]
        differing = sum(digest(folder / name) != digests[name] for name in share)
    except (OSError, ValueError):
        differing = 1
    return not summed(differing)[0]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _values(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    values: dict[str, Any] = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["facts"])
    return values
