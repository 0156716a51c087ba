"""Whether vectors find what words do not: `python -m examples.stdlib_retrieval` in a project whose pipeline has run.

The agent's `search` looks for words (BM25 in SQLite, `examples/stdlib_agent/knowledge.py`) among names and first
sentences of docstrings. Asked here is what somebody could type who never saw that sentence: the second sentence of the
docstring of each symbol that training never sees, its name taken out. Compared are BM25, the mean-pooled vectors of
each encoder given, and both by reciprocal rank fusion (Cormack et al. 2009): share of first places (recall@1) and mean
reciprocal rank.
"""

from __future__ import annotations

import argparse
import json
import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from components.agent.saved_tools import TOOL_FILES
from components.config.params import load_params
from components.config.paths import Paths, find_root
from components.inference.classifier import TextEncoder
from examples.stdlib_agent.agent_tools import FACTS
from examples.stdlib_agent.held_out import hold_out
from examples.stdlib_agent.knowledge import _RANK, _STOP_WORDS, MAX_QUERY_WORDS
from examples.stdlib_agent.stdlib import library_symbols

DEEP = 100
"""Places that count."""
FUSION = 60
"""The constant of reciprocal rank fusion."""
MIN_WORDS = 5
BATCH = 512


@dataclass(frozen=True)
class Query:
    """A description, and the symbol it is of."""

    text: str
    symbol: str


def documents(path: Path) -> dict[str, str]:
    """What the search index knows of each symbol: its name in words and its first sentence."""
    with closing(sqlite3.connect(path)) as connection:
        return {name: f"{words}: {text}" for name, words, text in connection.execute("SELECT * FROM texts")}


def queries(root: Path, known: dict[str, str]) -> list[Query]:
    """Second sentences of the docstrings of held-out symbols."""
    params = load_params(root / "params.yaml")
    config = params.collect
    held_out = hold_out(library_symbols(config.modules), config.held_out_share, config.questions, params.seed)
    pairs = []
    for symbol in (*held_out.symbols, *held_out.modules):
        sentences = re.split(r"(?<=[.!?])\s+|\n\s*\n", " ".join(symbol.docstring.split()))
        second = sentences[1] if len(sentences) > 1 else ""
        second = re.sub(rf"\b{re.escape(symbol.name.rpartition('.')[2])}\b", " ", second)
        if symbol.name in known and len(re.findall(r"[a-z]{3,}", second)) >= MIN_WORDS:
            pairs.append(Query(second, symbol.name))
    return pairs


def by_words(path: Path, searches: Sequence[Query]) -> list[list[str]]:
    """Names in the order of the agent's search: those with all words first, then those with any."""
    ranked = []
    with closing(sqlite3.connect(path)) as connection:
        for query in searches:
            words = [word for word in re.findall(r"\w+", query.text.lower()) if word not in _STOP_WORDS]
            quoted = [f'"{word}"' for word in dict.fromkeys(words[:MAX_QUERY_WORDS])]
            names: dict[str, None] = {}
            for glue in (" AND ", " OR "):
                rows = connection.execute(_RANK.replace("LIMIT 1", f"LIMIT {DEEP}"), (glue.join(quoted),))
                names |= dict.fromkeys(name for name, _ in rows)
            ranked.append(list(names)[:DEEP])
    return ranked


def by_vectors(folder: Path, known: dict[str, str], searches: Sequence[Query]) -> list[list[str]]:
    """Names in the order of their vectors' nearness."""
    encoder = TextEncoder.load(folder)

    def embedded(texts: Sequence[str]) -> torch.Tensor:
        parts = [encoder.embed(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
        return torch.tensor([embedding.vector for part in parts for embedding in part])

    names, there = list(known), embedded(list(known.values()))
    centre = there.mean(0)  # what all vectors have in common tells none of them apart
    there = torch.nn.functional.normalize(there - centre, dim=-1)
    sought = torch.nn.functional.normalize(embedded([query.text for query in searches]) - centre, dim=-1)
    return [[names[index] for index in row] for row in (sought @ there.T).topk(DEEP).indices.tolist()]


def fused(*rankings: list[list[str]]) -> list[list[str]]:
    """Reciprocal rank fusion: the sum over rankings of 1 / (60 + position)."""
    merged = []
    for rows in zip(*rankings, strict=True):
        scores: dict[str, float] = {}
        for row in rows:
            for position, name in enumerate(row, 1):
                scores[name] = scores.get(name, 0.0) + 1 / (FUSION + position)
        merged.append(sorted(scores, key=lambda name: -scores[name])[:DEEP])
    return merged


def figures(ranked: list[list[str]], searches: Sequence[Query]) -> dict[str, float]:
    pairs = zip(ranked, searches, strict=True)
    places = [row.index(query.symbol) + 1 if query.symbol in row else 0 for row, query in pairs]
    return {
        "recall@1": round(sum(rank == 1 for rank in places) / len(places), 4),
        "recall@10": round(sum(0 < rank <= 10 for rank in places) / len(places), 4),
        "mrr": round(sum(1 / rank for rank in places if rank) / len(places), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.stdlib_retrieval", description=__doc__)
    parser.add_argument("--model", type=Path, action="append", help="an encoder's folder; may be given again")
    arguments = parser.parse_args()
    paths = Paths(find_root())
    knowledge = paths.agent_files / TOOL_FILES / FACTS
    if not knowledge.is_file():
        parser.error(f"{knowledge}: not built yet; run `loopwright run` here first")
    folders = arguments.model or [folder for folder in (paths.base("encoder"), paths.classifier) if folder.is_dir()]
    known = documents(knowledge)
    searches = queries(paths.root, known)
    words = by_words(knowledge, searches)
    results: dict[str, Any] = {"queries": len(searches), "documents": len(known), "bm25": figures(words, searches)}
    for folder in folders:
        vectors = by_vectors(folder, known, searches)
        results[f"vectors of {folder.name}"] = figures(vectors, searches)
        results[f"bm25 and {folder.name}"] = figures(fused(words, vectors), searches)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
