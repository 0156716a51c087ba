"""What a stage tells the experiment tracker, as lines in a file: saying it costs microseconds and cannot fail.

`components/tracking/mlflow_client.py` carries journals to MLflow, from another thread or process; what it
could not deliver stays here and goes with the next run.

    STAGE-TIME-PID/lines.jsonl   one JSON object per line: {"kind", "time", ...}, of a child run also "child"
    STAGE-TIME-PID/0003/...      files that line 3 speaks of
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
    """Plots and reports never end a run whose work is done: a failure is a warning that names the report."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever a plot or a page fails at, the results stand without it
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        print(f"{name}: not written: {reason}; going on without", file=sys.stderr, flush=True)


class EventLog:
    """The tracker a stage talks to. A context manager: leaving it says how the stage ended."""

    def __init__(self, folder: Path, stage: str, key: str) -> None:
        self._lines = _Lines(folder / f"{stage}-{time.time_ns()}-{os.getpid()}")
        self._child: dict[str, int] = {}
        parent = os.environ.get(PARENT_RUN)
        self._say("start", name=stage, tags={"stage": stage, "key": key}, parent=parent, pid=os.getpid())

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        stopped = exc_type is not None and not issubclass(exc_type, Exception)
        self._say("end", status="KILLED" if stopped else "FAILED" if exc_type else "FINISHED")

    def child(self, name: str) -> EventLog:
        """A run within this one, such as a trial of a search; a context manager too."""
        child = copy.copy(self)
        child._child = {"child": self._lines.number()}
        child._say("start", name=name, tags={})
        return child

    def params(self, values: Mapping[str, Any]) -> None:
        self._say("params", values=dict(values))

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self._say("metrics", values={key: float(value) for key, value in values.items()}, step=step)

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        self._say("dataset", name=name, digest=digest, source=source, context=context)

    def table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        self._say("table", name=name, columns=dict(columns))

    def artifact(self, path: Path) -> None:
        copy = shutil.copytree if path.is_dir() else shutil.copy2
        self._file("artifact", path.name, lambda target: copy(path, target))

    def figure(self, figure: Any, name: str) -> None:
        self._file("artifact", name, figure.savefig)

    def _file(self, kind: str, name: str, write: Callable[[Path], Any]) -> None:
        """Keep a copy, because a later run of the stage may remove the original before it is carried."""
        target = self._lines.folder / f"{self._lines.number():04d}" / name
        self._lines.attempt(target.parent.mkdir)
        if not target.parent.is_dir():
            return
        with warn_on_failure(f"tracking: {name}"):
            write(target)
            self._say(kind, path=target.relative_to(self._lines.folder).as_posix())

    def _say(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"kind": kind, "time": int(time.time() * 1000), **self._child, **fields}, default=str)
        self._lines.append(line)


class _Lines:
    """The file that a event_log and its children write into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._count = 0
        self._broken = False
        self.attempt(lambda: folder.mkdir(parents=True))

    def number(self) -> int:
        """One that nothing else in this event_log has."""
        with self._lock:
            self._count += 1
            return self._count

    def append(self, line: str) -> None:
        self.attempt(lambda: self._append(line))

    def _append(self, line: str) -> None:
        with self._lock, (self.folder / "lines.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def attempt(self, action: Callable[[], Any]) -> None:
        """A full disk must not end training: say it once, then go on untracked."""
        try:
            action()
        except OSError as error:
            if not self._broken:
                print(f"tracking: {self.folder}: not written: {error}; going on without", file=sys.stderr, flush=True)
            self._broken = True
