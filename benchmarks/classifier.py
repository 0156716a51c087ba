"""What the classifier is worth beside TF-IDF with logistic regression: `python -m benchmarks.classifier`.

The stages of the pipeline, from the datasets to the assessment, in a folder of their own: on the reference project's
areas of the library, and with `--banking77 DIR` on BANKING77 (its train and test CSV), whose test set is its own;
`--base DIR` starts from the encoder in that folder instead of a pretrained one. Reported are both splits, the baseline
on the same texts, and the seconds of each training.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.runtime.stage import ENVIRONMENT

SOURCE = Path(__file__).parents[1]
BANKING = "banking77"
STAGES = ("train_tokenizer@encoder", "prepare@encoder", "pretrain@encoder", "finetune@classifier", "assess@classifier")
VALIDATION_SHARE = 0.1


class Silent:
    """A tracker that keeps nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    @contextmanager
    def child(self, name: str) -> Iterator[Silent]:
        yield self


def run(
    dataset: str, root: Path, overrides: dict[str, Any], banking: Path | None, base: Path | None, each: int | None
) -> dict[str, Any]:
    """Every stage on one dataset, with `each` training texts of a label at most; the figures of the assessment, and the
    seconds of each stage."""
    from components.config.params import load_params
    from components.config.paths import Paths
    from components.runtime.stage import StageRun, stage_function
    from components.tracking.model_import import place_model

    paths = Paths(root)
    # Other datasets of the reference project cost time and change nothing here.
    settings = {"classifier.dataset": dataset, "collect.conversations": 100, "collect.questions": 10, **overrides}
    if banking is not None:
        settings |= {"pretrain.encoder.dataset": "stdlib-documents"}
    params = load_params(paths.params, settings)
    if base is not None:
        place_model(base, paths.imported("encoder"), {"folder": str(base)})
    seconds = {}
    for name in ("collect", *(stage for stage in STAGES if base is None or not stage.startswith("pretrain"))):
        # BANKING77 is none of the project's own datasets: `collect` refuses its name, and it is written beside them.
        settings = load_params(paths.params) if name == "collect" and banking is not None else params
        stage = StageRun(name, settings, paths, root / "state" / name, Silent())
        stage.state.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        stage_function(name)(stage)
        if name == "collect" and banking is not None:
            _add_banking(banking, paths.collected / BANKING, params.seed, each)
        seconds[name] = round(time.perf_counter() - started, 1)
    figures: dict[str, Any] = json.loads((paths.metrics / "assess@classifier.json").read_text(encoding="utf-8"))
    trained = json.loads((paths.metrics / "finetune@classifier.json").read_text(encoding="utf-8"))
    return {"suites": figures["suites"], "seconds": seconds, "trained": trained}


def _add_banking(folder: Path, target: Path, seed: int, each: int | None) -> None:
    """BANKING77 with the test set that everyone reports on, and `each` training texts of a label at most."""
    from components.datasets.added_rows import by_label
    from components.datasets.formats import DatasetWriter, Row

    def rows(split: str) -> list[Row]:
        with (folder / f"banking77_{split}.csv").open(encoding="utf-8", newline="") as file:
            return [
                {"id": f"{split}-{number}", "text": row["text"], "label": row["category"], "suite": None}
                for number, row in enumerate(csv.DictReader(file))
            ]

    seen: Counter[str] = Counter()
    learned = []
    for row in rows("train"):
        seen[row["label"]] += 1
        if each is None or seen[row["label"]] <= each:
            learned.append(row)
    # `by_label` splits in three; what it would test by is learned from too, for the test set is a file of its own.
    split_of = by_label(lambda: learned, 0.0, VALIDATION_SHARE, seed).split_of
    with DatasetWriter(target, BANKING, "labelled_texts") as writer:
        for row in learned:
            writer.write("validation" if split_of(row) == "validation" else "train", row)
        for row in rows("test"):
            writer.write("test", row)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores",
        "",
        "| dataset | held out | texts | accuracy | macro-F1 | ECE | baseline accuracy | baseline macro-F1 |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for dataset, result in results.items():
        lines += [
            f"| {dataset} | {suite} | {row['texts']} | {row['accuracy']:.3f} | {row['macro_f1']:.3f} "
            f"| {row['ece']:.3f} | {row['baseline_accuracy']:.3f} | {row['baseline_macro_f1']:.3f} |"
            for suite, row in result["suites"].items()
        ]
    lines += ["", "Seconds of each stage:", ""]
    lines += [f"- {dataset}: {result['seconds']}" for dataset, result in results.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--banking77", type=Path, help="folder with banking77_train.csv and banking77_test.csv")
    parser.add_argument("--base", type=Path, metavar="DIR", help="folder of an encoder to start from")
    parser.add_argument("--each", type=int, metavar="N", help="training texts of each label of BANKING77 at most")
    parser.add_argument("--only", choices=["stdlib-areas", BANKING])
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--folder", type=Path, help="keep the work here; otherwise it is removed")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for variable, value in ENVIRONMENT.items():  # as the stages run; before torch reads it
        os.environ.setdefault(variable, value)
    overrides = {key: json.loads(value) for key, _, value in (setting.partition("=") for setting in options.set)}
    if options.base:
        overrides = {"classifier.base": str(options.base), "classifier.fresh": False} | overrides
    datasets: dict[str, Path | None] = {"stdlib-areas": None}
    if options.banking77:
        datasets[BANKING] = options.banking77
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        for dataset, banking in datasets.items():
            if options.only in (None, dataset):
                root = (options.folder or Path(temporary)) / dataset
                root.mkdir(parents=True, exist_ok=True)
                for name in ("params.yaml", "dvc.yaml"):
                    shutil.copy(SOURCE / name, root / name)
                results[dataset] = run(dataset, root, overrides, banking, options.base, options.each)
    print(json.dumps(results, indent=2) if options.json else table(results))


if __name__ == "__main__":
    main()
