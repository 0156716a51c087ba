"""Feedback items in `data/feedback`: one row per accepted vote, with its request and answer.

items-FIRST-LAST.parquet     the items of one ingestion, by the sequence of their votes
pictures-FIRST-LAST.parquet  the pictures that they are the first to refer to: digest and PNG file
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.config.params import InputError
from components.datasets.formats import MESSAGES, Row
from components.media.messages import without_marks

NO_CALL = "conversation"
"""The skill of an answer that called no tool."""
PICTURES = "pictures"
"""The skill of an answer about pictures that called no tool."""
FORM = "form"
"""The skill of an answer in JSON, whatever it called."""

_COLUMNS: list[tuple[str, Any]] = [
    ("feedback_id", pa.string()),
    ("sequence", pa.int64()),
    ("completion_id", pa.string()),
    ("created", pa.float64()),
    ("model", pa.string()),
    ("messages", MESSAGES),
    # Digests of the pictures, in the order of the marks in the messages.
    ("images", pa.list_(pa.string())),
    ("tools", pa.string()),
    ("steps", pa.string()),
    ("answer", pa.string()),
    ("rating", pa.string()),
    ("correction", pa.string()),
    ("comment", pa.string()),
    ("voice", pa.string()),
    ("skill", pa.string()),
]
PICTURES_GLOB = "pictures-*.parquet"
PICTURES_PER_GROUP = 64
"""Pictures in memory at a time while their files are written and read."""
SCHEMA = pa.schema(_COLUMNS)
"""Columns of a partition."""
_PICTURE_COLUMNS: list[tuple[str, Any]] = [("digest", pa.string()), ("content", pa.binary())]
PICTURES_SCHEMA = pa.schema(_PICTURE_COLUMNS)
"""Columns of its pictures; the content is a PNG file."""


@dataclass(frozen=True)
class Item:
    """One accepted vote."""

    feedback_id: str
    sequence: int
    completion_id: str
    created: float
    """Seconds since the epoch."""
    model: str
    """`NAME/VERSION` that answered."""
    messages: list[Row]
    images: list[str]
    """Digests of the pictures, as many as the messages have marks; none of an item that was ingested before pictures
    were."""
    tools: str | None
    """The client's tools, JSON."""
    steps: str
    """The agent's calls and results, JSON."""
    answer: str
    rating: str
    correction: str | None
    comment: str | None
    voice: str
    skill: str


def partitions(folder: Path) -> list[Path]:
    """The partitions of `data/feedback`, oldest first."""
    return sorted(folder.glob("items-*.parquet"))


def read_items(folder: Path) -> Iterator[Item]:
    """Every item of every partition, in the order of the votes."""
    for partition in partitions(folder):
        with pq.ParquetFile(partition) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield Item(**{**row, "images": row.get("images") or []})


def picture_digests(folder: Path) -> set[str]:
    """The digests of all pictures in `data/feedback`."""
    tables = (pq.read_table(file, columns=["digest"]) for file in folder.glob(PICTURES_GLOB))
    return {str(digest) for table in tables for digest in table["digest"].to_pylist()}


def read_pictures(folder: Path, digests: Collection[str]) -> dict[str, bytes]:
    """The PNG files of pictures, by digest.

    Raises: InputError when one is missing.
    """
    contents: dict[str, bytes] = {}
    for path in sorted(folder.glob(PICTURES_GLOB)):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PICTURES_PER_GROUP):
                rows = batch.to_pylist()
                contents |= {row["digest"]: row["content"] for row in rows if row["digest"] in digests}
    if missing := set(digests) - set(contents):
        raise InputError(f'{folder}: has no picture {min(missing)}; run "dvc checkout {folder}"')
    return contents


def answered(item: Item) -> list[Row]:
    """The conversation before the answer: the request, and the agent's calls and results."""
    messages: list[Row] = list(item.messages)
    steps: list[Mapping[str, Any]] = json.loads(item.steps or "[]")
    for number, step in enumerate(steps):
        if step["type"] == "call":
            arguments = json.dumps(step["arguments"], ensure_ascii=False)
            function = {"name": step["name"], "arguments": arguments}
            call = {"id": f"call_{number}", "type": "function", "function": function}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        else:
            result = {"role": "tool", "content": step["content"], "tool_call_id": f"call_{number - 1}"}
            messages.append(result | {"name": step["name"]})
    return messages


def skill_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """The last tool that a conversation calls after its last question, else `conversation`.

    The answer is based on its result.
    """
    last = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=0)
    names = [call["function"]["name"] for message in messages[last:] for call in message.get("tool_calls") or []]
    return str(names[-1]) if names else NO_CALL


@dataclass(frozen=True)
class Reworded:
    """Questions about pictures that users want answered otherwise; no tool's name tells them from others."""

    questions: frozenset[str] = frozenset()
    answers: frozenset[str] = frozenset()

    @classmethod
    def of(cls, corrections: Iterable[tuple[str, str, str]], earlier: Iterable[str]) -> Reworded:
        """Of corrections as (question, answer, correction), those that are no mistakes.

        `earlier`: the answers of training. Where "yes" should have been "no", the correction is one of them; and what
        corrections elsewhere say is no wording that users reject.
        """
        rows = [tuple(map(_normalized, row)) for row in corrections]
        right, known = {correction for _, _, correction in rows}, set(map(_normalized, earlier))
        changed = [(q, answer) for q, answer, correction in rows if answer not in right and correction not in known]
        return cls(frozenset(question for question, _ in changed), frozenset(answer for _, answer in changed))

    @classmethod
    def read(cls, report: Mapping[str, Any]) -> Reworded:
        """From `curated.json`."""
        saved = report.get("reworded", {})
        return cls(frozenset(saved.get("questions", ())), frozenset(saved.get("answers", ())))

    def to_json(self) -> dict[str, list[str]]:
        return {"questions": sorted(self.questions), "answers": sorted(self.answers)}

    def __contains__(self, exchange: tuple[str, str]) -> bool:
        """Whether this is about a question and its earlier answer."""
        question, answer = map(_normalized, exchange)
        return question in self.questions or answer in self.answers

    def left_out_of(self, mask: Sequence[int], messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The mask of a conversation's tokens, a run of ones for each answer, without the answers that it contains."""
        edges = np.flatnonzero(np.diff([0, *mask, 0])).tolist()
        turns = iter(zip(edges[::2], edges[1::2], strict=True))
        learned, question = list(mask), ""
        for message in messages:
            if message["role"] == "user":
                question = message["content"]
            elif message["role"] == "assistant":
                start, stop = next(turns)
                if (question, message["content"]) in self:
                    learned[start:stop] = [0] * (stop - start)
        return learned


def _normalized(text: str) -> str:
    """Without marks of pictures, case, spacing and final punctuation."""
    return " ".join(without_marks(text).lower().split()).rstrip(" ?!.")


def prompt_key(messages: Sequence[Mapping[str, Any]], images: Sequence[str] = ()) -> str:
    """Digest of a prompt and the digests of its pictures, ignoring case, whitespace and final punctuation."""
    texts = [(message["role"], " ".join((message.get("content") or "").lower().split())) for message in messages]
    stripped: list[Any] = [(role, text.rstrip(" ?!.")) for role, text in texts]
    normalized = json.dumps([*stripped, *([list(images)] if images else [])], ensure_ascii=False)
    return hashlib.blake2b(normalized.encode(), digest_size=16).hexdigest()
