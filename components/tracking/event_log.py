"""The experiment tracker of a stage, as an event log (outbox) on disk: a write costs microseconds and cannot fail.

`components/tracking/mlflow_client.py` uploads event logs to MLflow from another thread or process; what it could not
send stays here and goes with the next run.

    STAGE-TIME-PID/lines.jsonl   an event a line: {"kind", "time", ...}, of a child run also "child"
    STAGE-TIME-PID/0003/...      files of the event in line 3
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARENT_RUN = "LOOPWRIGHT_PARENT_RUN"
"""Environment variable with the tracker's run that a stage's run is a child of."""


@contextmanager
def warn_on_failure(name: str) -> Iterator[None]:
    """Turn the failure of a plot or report into a warning that names it; it must not end a run."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever a plot or a page fails at, the results stand without it
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        print(f"{name}: not written: {reason}; going on without", file=sys.stderr, flush=True)


class EventLog:
    """The tracker of a stage; as a context manager it records how the stage ended."""

    def __init__(self, folder: Path, stage: str, key: str) -> None:
        self._lines = _Lines(folder / f"{stage}-{time.time_ns()}-{os.getpid()}")
        self._child: dict[str, int] = {}
        parent = os.environ.get(PARENT_RUN)
        self._record("start", name=stage, tags={"stage": stage, "key": key}, parent=parent, pid=os.getpid())

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        stopped = exc_type is not None and not issubclass(exc_type, Exception)
        self._record("end", status="KILLED" if stopped else "FAILED" if exc_type else "FINISHED")

    def child(self, name: str) -> EventLog:
        """A run within this one, such as a trial of a search; a context manager too."""
        child = copy.copy(self)
        child._child = {"child": self._lines.number()}
        child._record("start", name=name, tags={})
        return child

    def params(self, values: Mapping[str, Any]) -> None:
        self._record("params", values=dict(values))

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self._record("metrics", values={key: float(value) for key, value in values.items()}, step=step)

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        self._record("dataset", name=name, digest=digest, source=source, context=context)

    def table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        self._record("table", name=name, columns=dict(columns))

    def artifact(self, path: Path) -> None:
        copy = shutil.copytree if path.is_dir() else shutil.copy2
        self._file("artifact", path.name, lambda target: copy(path, target))

    def figure(self, figure: Any, name: str) -> None:
        self._file("artifact", name, figure.savefig)

    def _file(self, kind: str, name: str, write: Callable[[Path], Any]) -> None:
        """Store a copy: a later run of the stage may remove the original before the upload."""
        target = self._lines.folder / f"{self._lines.number():04d}" / name
        self._lines.attempt(target.parent.mkdir)
        if not target.parent.is_dir():
            return
        with warn_on_failure(f"tracking: {name}"):
            write(target)
            self._record(kind, path=target.relative_to(self._lines.folder).as_posix())

    def _record(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"kind": kind, "time": int(time.time() * 1000), **self._child, **fields}, default=str)
        self._lines.append(line)


class NoTracker(EventLog):
    """A tracker that records nothing: that of a rank beside rank 0, which records for all."""

    def __init__(self) -> None: ...

    def child(self, name: str) -> EventLog:
        return self

    def _file(self, kind: str, name: str, write: Callable[[Path], Any]) -> None: ...

    def _record(self, kind: str, **fields: Any) -> None: ...


class _Lines:
    """The file that an event log and its children write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._count = 0
        self._broken = False
        self.attempt(lambda: folder.mkdir(parents=True))

    def number(self) -> int:
        """A number that is unique in this event log."""
        with self._lock:
            self._count += 1
            return self._count

    def append(self, line: str) -> None:
        self.attempt(lambda: self._append(line))

    def _append(self, line: str) -> None:
        with self._lock, (self.folder / "lines.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def attempt(self, action: Callable[[], Any]) -> None:
        """Run an action; a full disk must not end training, and is reported once."""
        try:
            action()
        except OSError as error:
            if not self._broken:
                print(f"tracking: {self.folder}: not written: {error}; going on without", file=sys.stderr, flush=True)
            self._broken = True
