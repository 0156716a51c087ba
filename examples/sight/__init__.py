"""The agent of `examples/stdlib_agent` with sight: it also answers questions about pictures and short clips.

The pictures are in packages that the extra `sight` installs, so that nothing is downloaded (`picture_files.py`).
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from examples import stdlib_agent
from examples.stdlib_agent import response_formats as response_formats
from examples.stdlib_agent import smoke_questions as smoke_questions
from examples.stdlib_agent import tool_files as tool_files
from examples.stdlib_agent import tools as tools

if TYPE_CHECKING:
    from components.config.project import Collecting, Rows
    from components.datasets.formats import Kind

PICTURES = ("sight-vqa", "sight-digits", "sight-captions", "sight-clips")
datasets: dict[str, Kind] = {**stdlib_agent.datasets, **dict.fromkeys(PICTURES, "images")}
licences = {
    **stdlib_agent.licences,
    **dict.fromkeys(PICTURES, "MIT"),  # easy-vqa, animal-shape-mnist
    "sight-digits": "CC-BY-4.0",  # of the UCI repository, as scikit-learn ships them
}
scales: dict[str, dict[str, Any]] = deepcopy(stdlib_agent.scales)
scales["all"]["tune"]["dataset"] = ["stdlib-conversations", *PICTURES]
# More rows than the agent that reads text alone, and a tower from nothing.
scales["laptop"] = {"pretrain_vision": {"max_steps": 2400}, "connect": {"max_steps": 150}, "tune": {"max_steps": 3400}}


# What draws pictures is imported when they are drawn: a project's module is imported wherever params.yaml is.
def rows(name: str, collecting: Collecting) -> Rows:
    if name not in PICTURES:
        return stdlib_agent.rows(name, collecting)
    from examples.sight.picture_datasets import dataset_rows

    return dataset_rows(name, collecting)
