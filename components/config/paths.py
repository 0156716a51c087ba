"""Where a project keeps things."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from components.config.model_settings import Family
from components.config.params import InputError

AGENT, TOOLS = "agent.json", "tools"
"""In a model folder: what makes it an agent, and the folder of its tools (components/agent/saved_tools.py)."""


@dataclass(frozen=True)
class Paths:
    """Where a project keeps things; the outs of `dvc.yaml` under the names the code uses."""

    root: Path

    @property
    def home(self) -> Path:
        """The state folder: databases, logs, checkpoints; never an out of DVC."""
        return (self.root / os.environ.get("LOOPWRIGHT_HOME", "var")).resolve()

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def expectations(self) -> Path:
        return self.root / "data/expectations"

    @property
    def added(self) -> Path:
        """Datasets a user brought with `data add`."""
        return self.root / "data/added"

    @property
    def collected(self) -> Path:
        """One folder per dataset, written by `collect`."""
        return self.root / "data/collected"

    @property
    def agent_files(self) -> Path:
        """What makes a model the project's agent: agent.json, and its tools with their source and files."""
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

    def imported(self, family: Family) -> Path:
        """Where a run puts the model that `tune.base` and its like name; the folder is there without one too."""
        return self.root / "data/imported" / family

    def start_of(self, family: Family) -> Path:
        """The model that fine-tuning starts from: the imported one where one was named, or the pretrained one."""
        imported = self.imported(family)
        return imported if (imported / "config.json").is_file() else self.base(family)

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
        """What `assess` asked a model, and what it said."""
        return self.root / "data/assessment" / name

    @property
    def feedback(self) -> Path:
        """What people said, taken in: one immutable Parquet partition per ingestion, and `withdrawn.json`."""
        return self.root / "data/feedback"

    @property
    def champion(self) -> Path:
        """The model that a candidate must beat, fetched from the registry; no out of a stage."""
        return self.root / "data/models/champion"

    @property
    def start(self) -> Path:
        """The model that an improvement starts from: the champion, or an earlier one that learned nothing withdrawn."""
        return self.root / "data/models/start"

    @property
    def candidate(self) -> Path:
        return self.root / "data/models/candidate"

    @property
    def curated(self) -> Path:
        """Feedback as rows to learn from, and prompts to judge by."""
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
