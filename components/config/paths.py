"""Paths of a project, and messages for errors of the disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from components.config.model_settings import Family
from components.config.params import InputError

CONFIG, TOKENIZER, TEMPLATE = "config.json", "tokenizer.json", "chat_template.jinja"
"""In a model folder: configuration, tokenizer and chat template, as Hugging Face names them."""
GENERATION = "generation_config.json"
"""In a model folder: its stop tokens, which may be more than the tokenizer's, and how tokens are sampled."""
AGENT, TOOLS = "agent.json", "tools"
"""In a model folder: the agent's configuration, and the folder of its tools (components/agent/saved_tools.py)."""
ORIGIN = "origin.json"
"""In a model folder that a flow fetched: the version or the folder it was copied from."""
TRAINED_ON_FILE = "lessons.json"
"""In a model folder that `align` wrote: its parent, and the feedback items it was trained on."""
GATE_MODE = "gate.json"
"""Beside the champion that `judge` compares with: the mode of the promotion gate."""
CURATED = "curated.json"
"""In data/curated: the report of the curated feedback."""
REVOKED = "withdrawn.json"
"""In data/feedback: the ids of revoked items."""


@dataclass(frozen=True)
class Paths:
    """Paths of a project: the outs of `dvc.yaml`, and the state folder."""

    root: Path

    @property
    def home(self) -> Path:
        """The state folder: databases, logs, checkpoints; never an out of DVC."""
        home = (self.root / os.environ.get("LOOPWRIGHT_HOME", "var")).resolve()
        if wrong := [sign for sign in "?\n\r" if sign in str(home)]:
            # The URL of an SQLite database ends there, for MLflow, Prefect and SQLAlchemy.
            raise InputError(f"LOOPWRIGHT_HOME: {str(home)!r} contains {wrong[0]!r}; choose a path without it")
        return home

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def replay_requests(self) -> Path:
        """Ordinary requests, one a line, whose answers by the base are replayed in tuning."""
        return self.root / "data/replay_requests.txt"

    @property
    def expectations(self) -> Path:
        return self.root / "data/expectations"

    @property
    def added(self) -> Path:
        """Datasets that `data add` added."""
        return self.root / "data/added"

    @property
    def collected(self) -> Path:
        """One folder per dataset, written by `collect`."""
        return self.root / "data/collected"

    @property
    def agent_files(self) -> Path:
        """The files that make a model the project's agent: agent.json, and its tools with their source and files."""
        return self.root / "data/agent"

    @property
    def validation(self) -> Path:
        return self.root / "data/validation"

    def validated(self, section: str) -> Path:
        """Digests of the datasets that a section of params.yaml names, as they passed validation.

        A stage that reads datasets depends on this file: it changes when they do, and with no other dataset.
        """
        return self.validation / "datasets" / f"{section}.json"

    def tokenizer(self, family: Family) -> Path:
        return self.root / "data/tokenizer" / family

    def tokens(self, family: Family) -> Path:
        """One folder of rows per objective, written by `prepare`."""
        return self.root / "data/tokens" / family

    def base(self, family: Family) -> Path:
        """The pretrained model of a family."""
        return self.root / "data/models/base" / family

    @property
    def vision_tower(self) -> Path:
        """The pretrained vision tower; an empty folder where nothing is learned from pictures."""
        return self.root / "data/models/base/vision"

    @property
    def sight(self) -> Path:
        """The decoder that tuning starts from, joined to the vision tower; empty where there are no pictures."""
        return self.root / "data/models/base/sight"

    def imported(self, family: Family) -> Path:
        """The base model that a section's `base` names; the folder exists without a base too."""
        return self.root / "data/imported" / family

    def start_of(self, family: Family) -> Path:
        """The model that fine-tuning starts from: the imported base where there is one, or the pretrained model."""
        imported = self.imported(family)
        return imported if (imported / CONFIG).is_file() else self.base(family)

    @property
    def agent(self) -> Path:
        return self.root / "data/models/agent"

    @property
    def classifier(self) -> Path:
        return self.root / "data/models/classifier"

    @property
    def summarizer(self) -> Path:
        return self.root / "data/models/summarizer"

    @property
    def evaluation(self) -> Path:
        return self.root / "data/evaluation"

    def assessment(self, name: str) -> Path:
        """Held-out texts of `assess`, and the model's predictions."""
        return self.root / "data/assessment" / name

    @property
    def feedback(self) -> Path:
        """Ingested user feedback: one immutable Parquet partition per ingestion, and `withdrawn.json`."""
        return self.root / "data/feedback"

    @property
    def champion(self) -> Path:
        """The champion that a candidate is compared with, fetched from the registry; no out of a stage."""
        return self.root / "data/models/champion"

    @property
    def start(self) -> Path:
        """The model that an improvement starts from: the champion, or an ancestor without revoked training examples."""
        return self.root / "data/models/start"

    @property
    def candidate(self) -> Path:
        return self.root / "data/models/candidate"

    @property
    def curated(self) -> Path:
        """Feedback as training rows and held-out prompts."""
        return self.root / "data/curated"

    @property
    def judged(self) -> Path:
        return self.root / "data/judged"

    @property
    def metrics(self) -> Path:
        return self.root / "data/metrics"


def find_root(start: Path | None = None) -> Path:
    """The project folder: the nearest one upwards that has a `dvc.yaml` and a `params.yaml`."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "params.yaml").is_file():
            return folder
    raise InputError(f"{start}: no Loopwright project here or above (no dvc.yaml with params.yaml); run inside a clone")


_REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or raise the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "give this user access",
    errno.EPERM: "give this user access",
}
_SQLITE = {
    "database or disk is full": errno.ENOSPC,
    "attempt to write a readonly database": errno.EROFS,
    "unable to open database file": errno.EACCES,
}


def disk_trouble(error: BaseException | None, path: Path | None = None) -> str:
    """One line with the disk's error and its remedy, where an exception comes from the disk; else empty.

    `path` is named where the exception names no file.
    """
    if error is None:
        return ""
    name, number = str(path or "disk"), error.errno if isinstance(error, OSError) else None
    if isinstance(error, shutil.Error):  # source, target and why, of every file
        _, name, reason = error.args[0][0]
        number = next((known for known in _REMEDIES if os.strerror(known) in str(reason)), None)
    elif number is None:
        number = next((code for words, code in _SQLITE.items() if words in str(error)), None)
    elif isinstance(error, OSError):
        file = error.filename2 or error.filename
        name = os.fsdecode(file) if file else name
        if not file and number in (errno.EACCES, errno.EPERM):  # of a socket, a process
            number = None
    if number in (errno.EACCES, errno.EPERM):  # to read, or to write
        return f"{name}: {os.strerror(number)}; {_REMEDIES[number]}"
    if number in _REMEDIES:
        return f"{name}: cannot be written: {os.strerror(number)}; {_REMEDIES[number]}"
    return disk_trouble(error.__cause__ or error.__context__, path)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Raises: InputError when the disk refuses what a block writes below a folder, or no folder can be there."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if message := disk_trouble(error, target):
            raise InputError(message) from error
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise InputError(f"{target}: cannot be written: {error.strerror}; choose another folder") from error
        raise
