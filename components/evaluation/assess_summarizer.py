"""What a run's summarizer is worth on held-out sources, beside what the likest training source would lend it.

The same figures hold for any set of pairs, translation too.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.config.params import InputError, Params
from components.datasets.formats import Row, read_rows, split_digest, write_json
from components.evaluation.baseline import nearest_targets
from components.evaluation.gate import GateDecision, Slice, decide
from components.evaluation.overlap import overlap
from components.inference.summarizer import Summarizer
from components.runtime.stage import StageRun

WRITTEN = "written.parquet"
"""What a summarizer wrote of each held-out source, beside what was wanted."""
WRITTEN_OF = "written.json"
"""Which sources these were."""
TEST = "test"
"""Suite of rows that name none: a user's own held-out pairs."""
BATCH = 256
SAMPLES = 40
"""Of each suite, so many are shown beside a run."""
Figures = dict[str, Any]


def assess_summarizer(run: StageRun) -> None:
    """Let data/models/summarizer write of every held-out source; write data/assessment, metrics and plots."""
    params, collected = run.params, run.paths.collected
    asked = read_pairs(collected, params)
    if not asked:
        raise InputError("params.yaml: summarizer.dataset: no held-out pairs in it; add rows")
    writer = Summarizer.load(run.paths.summarizer)
    written = write_all(writer, asked, params.assess.beams, run.progress)
    known = [row for name in params.summarizer.datasets for row in read_rows(collected / name, "train")]
    lent = nearest_targets(
        [row["source"] for row in known], [row["target"] for row in known], [row["source"] for row in asked]
    )
    greedy = written if params.assess.beams == 1 else write_all(writer, asked, 1, run.progress)
    figures = measure(asked, {"": written, "baseline_": lent, "greedy_": greedy})
    figures["held_out_digest"] = held_out_digest(collected, params)
    write_json(run.paths.metrics / f"{run.name}.json", figures)
    _write_plot(run.paths.metrics / f"{run.name}_overlap.csv", figures["suites"])
    keep_written(run.paths.assessment(run.item), asked, written, figures["held_out_digest"])
    run.tracker.metrics(flat_metrics(figures))
    run.tracker.table("summaries.json", _samples(asked, written, lent))


def read_pairs(collected: Path, params: Params) -> list[Row]:
    """The first `assess.max_texts` held-out pairs of each suite of the summarizer's datasets."""
    counts: dict[str, int] = {}
    kept = []
    for name in params.summarizer.datasets:
        for row in read_rows(collected / name, "test"):
            suite = row.get("suite") or TEST
            counts[suite] = counts.get(suite, 0) + 1
            if counts[suite] <= params.assess.max_texts:
                kept.append({**row, "suite": suite})
    return kept


def write_all(
    writer: Summarizer,
    asked: Sequence[Row],
    beams: int,
    progress: Callable[..., None] = lambda *args, **facts: None,
) -> list[str]:
    """What the writer makes of each source, in order."""
    written: list[str] = []
    for start in range(0, len(asked), BATCH):
        written += writer.write([row["source"] for row in asked[start : start + BATCH]], beams)
        progress(len(written), len(asked), beams=beams)
    return written


def measure(asked: Sequence[Row], texts: dict[str, list[str]]) -> Figures:
    """ROUGE, chrF and exact matches of every suite; `texts` by the prefix under which their figures stand."""
    suites: dict[str, Figures] = {}
    for suite, places in _suites(asked).items():
        wanted = [asked[place]["target"] for place in places]
        figures: Figures = {"texts": len(places)}
        for prefix, written in texts.items():
            found = [written[place] for place in places]
            common = overlap(found, wanted)
            exact = sum(map(str.__eq__, found, wanted)) / len(wanted)
            values = {"rouge1": common.rouge1, "rouge2": common.rouge2, "rougeL": common.rougeL}
            values |= {"chrf": common.chrf, "exact_match": exact}
            figures |= {f"{prefix}{name}": round(value, 4) for name, value in values.items()}
        figures["baseline_is_better"] = figures["baseline_rougeL"] > figures["rougeL"]
        suites[suite] = figures
    score = sum(one["rougeL"] for one in suites.values()) / len(suites)
    return {"score": round(score, 6), "suites": suites}


def held_out_digest(collected: Path, params: Params) -> str:
    """Identity of what is asked: two assessments compare only when theirs are equal."""
    folders = [collected / name for name in params.summarizer.datasets]
    return split_digest(folders, "test", params.assess.model_dump_json())


def flat_metrics(figures: Figures) -> dict[str, float]:
    """The figures under the names the tracker and the registry show."""
    flat = {"score": float(figures["score"])}
    for suite, values in figures["suites"].items():
        flat |= {f"{suite}/{key}": float(value) for key, value in values.items()}
        flat[f"{suite}/score"] = float(values["rougeL"])
    return flat


def judge_summarizer(
    candidate: Path, champion: Path, collected: Path, params: Params, candidate_wrote: Path | None = None
) -> GateDecision:
    """Whether the summarizer in `candidate` may replace that in `champion`: by the ROUGE-L of each text, in pairs.

    The folder `candidate_wrote` holds what `assess` kept, if anything; the champion writes anew.
    """
    asked = read_pairs(collected, params)
    ours = _kept(candidate_wrote, held_out_digest(collected, params)) if candidate_wrote else None
    if ours is None:
        ours = write_all(Summarizer.load(candidate), asked, params.assess.beams)
    theirs = write_all(Summarizer.load(champion), asked, params.assess.beams)
    return judge_texts(asked, ours, theirs, params)


def judge_texts(
    asked: Sequence[Row], candidate: Sequence[str], champion: Sequence[str], params: Params
) -> GateDecision:
    """The verdict on texts written of all sources, in their order."""
    wanted = [row["target"] for row in asked]
    ours, theirs = overlap(candidate, wanted).each, overlap(champion, wanted).each
    slices = [
        Slice(suite, False, [theirs[place] for place in places], [ours[place] for place in places])
        for suite, places in _suites(asked).items()
    ]
    if len(slices) > 1:
        slices.append(Slice("overall", False, theirs, ours))
    return decide(slices, params.judge, "any_gain")


def keep_written(folder: Path, asked: Sequence[Row], written: Sequence[str], digest: str) -> None:
    """Write `WRITTEN` and `WRITTEN_OF`."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {name: [row[name] for row in asked] for name in ("id", "suite", "source", "target")}
    pq.write_table(pa.table({**columns, "written": list(written)}), folder / WRITTEN)
    write_json(folder / WRITTEN_OF, {"held_out_digest": digest})


def _kept(folder: Path, digest: str) -> list[str] | None:
    facts = folder / WRITTEN_OF
    if not facts.is_file() or json.loads(facts.read_text(encoding="utf-8"))["held_out_digest"] != digest:
        return None
    return [str(text) for text in pq.read_table(folder / WRITTEN, columns=["written"])["written"].to_pylist()]


def _suites(asked: Sequence[Row]) -> dict[str, list[int]]:
    """The places of each suite's pairs."""
    places: dict[str, list[int]] = {}
    for place, row in enumerate(asked):
        places.setdefault(row["suite"], []).append(place)
    return dict(sorted(places.items()))


def _samples(asked: Sequence[Row], written: Sequence[str], lent: Sequence[str]) -> dict[str, list[Any]]:
    places = [place for found in _suites(asked).values() for place in found[:SAMPLES]]
    columns: dict[str, list[Any]] = {name: [asked[place][name] for place in places] for name in ("suite", "source")}
    columns["wanted"] = [asked[place]["target"] for place in places]
    return columns | {"written": [written[place] for place in places], "nearest": [lent[place] for place in places]}


def _write_plot(path: Path, suites: dict[str, Figures]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["suite", "rougeL", "baseline_rougeL", "chrf"])
        rows.writerows([name, one["rougeL"], one["baseline_rougeL"], one["chrf"]] for name, one in suites.items())
