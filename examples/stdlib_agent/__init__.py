"""An agent that answers questions about Python's standard library with tools: what `make run` builds.

Everything is read from the interpreter that runs it, so that nothing is downloaded (`library_datasets.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from examples.stdlib_agent.agent_tools import tools as tools

if TYPE_CHECKING:
    from components.config.project import Collecting, Rows
    from components.datasets.formats import Kind

datasets: dict[str, Kind] = {
    "stdlib-documents": "documents",
    "stdlib-conversations": "conversations",
    "stdlib-areas": "labelled_texts",
    "stdlib-summaries": "text_pairs",
}
licences = dict.fromkeys(datasets, "PSF-2.0")
smoke_questions = {
    "agent": "What does json.dumps do?",
    "classifier": "Serialize obj to a JSON formatted str.",
    "summarizer": "def add(first, second):\n    return first + second\n",
}
scales: dict[str, dict[str, Any]] = {
    "all": {
        "pretrain": {
            "decoder": {"dataset": "stdlib-documents"},
            "encoder": {"dataset": ["stdlib-documents", "stdlib-areas"]},
            "encoder_decoder": {"dataset": "stdlib-documents"},
        },
        "tune": {"dataset": "stdlib-conversations"},
        "classifier": {"dataset": "stdlib-areas"},
        "summarizer": {"dataset": "stdlib-summaries"},
    },
    "smoke": {"collect": {"modules": ["json", "collections", "textwrap", "string", "calendar", "csv"]}},
}
response_formats = True


# What reads the library is imported when it is read: a project's module is imported wherever params.yaml is.
def rows(name: str, collecting: Collecting) -> Rows:
    from examples.stdlib_agent.library_datasets import dataset_rows

    return dataset_rows(name, collecting)


def tool_files(collecting: Collecting) -> None:
    from examples.stdlib_agent.library_datasets import write_facts

    write_facts(collecting)
