"""The tokenizer learned from a sample by shards is that of the same texts in memory."""

import json
import random
from pathlib import Path

import pytest

from components.config.params import InputError, load_params
from components.config.paths import Paths
from components.datasets import formats
from components.datasets.formats import DatasetWriter, in_test_split, row_id
from components.runtime.stage import StageRun, digest
from components.tokenization import text_tokenizer
from components.tokenization.text_tokenizer import TextTokenizer
from components.tokenization.train_tokenizer import train_tokenizer
from components.tracking.event_log import NoTracker

ROOT = Path(__file__).parents[2]
VOCAB_SIZE, LIMIT, ROWS = 330, 50, 120


def run_of(folder: Path) -> StageRun:
    name = "train_tokenizer@encoder"
    values = {"scale": "smoke", "train_tokenizer.encoder.vocab_size": VOCAB_SIZE}
    params = load_params(ROOT / "params.yaml", values | {"train_tokenizer.encoder.max_documents": LIMIT})
    return StageRun(name, params, Paths(folder), folder / "state", NoTracker())


def write(folder: Path, texts: dict[str, list[str]]) -> list[str]:
    """Write the datasets of the encoder; returns the sample of each, in order."""
    sample: list[str] = []
    for name, kind in (("stdlib-documents", "documents"), ("stdlib-areas", "labelled_texts")):
        rows = [{"id": row_id(name, str(number)), "text": text} for number, text in enumerate(texts[name])]
        with DatasetWriter(folder / "data/collected" / name, name, kind) as writer:  # type: ignore[arg-type]
            for row in rows:
                writer.write("train", row)
        share = min(1, 1.2 * LIMIT / max(1, len(rows)))
        sample += [row["text"] for row in rows if in_test_split(row["id"], share)][:LIMIT]
    return sample


def test_a_sample_by_shards_gives_the_tokenizer_of_its_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "ROWS_PER_GROUP", 10)
    monkeypatch.setattr(formats, "ROWS_PER_SHARD", 30)
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefg", k=draw.randrange(2, 7))) for _ in range(200)]
    texts = [" ".join(draw.choices(words, k=draw.randrange(1, 12))) for _ in range(ROWS + LIMIT // 2)]
    sample = write(tmp_path, {"stdlib-documents": texts[:ROWS], "stdlib-areas": texts[ROWS:]})
    assert len(sample) == LIMIT + LIMIT // 2, "one dataset is cut, of the other all is taken"
    run = run_of(tmp_path)
    train_tokenizer(run)
    text_tokenizer.save(text_tokenizer.train_encoder(sample, VOCAB_SIZE), tmp_path / "reference")
    assert digest(run.paths.tokenizer("encoder")) == digest(tmp_path / "reference")
    tokens = sum(map(len, TextTokenizer.load(tmp_path / "reference").encode_batch(sample)))
    assert json.loads((run.paths.metrics / f"{run.name}.json").read_text()) == {
        "vocab_size": VOCAB_SIZE,
        "documents": len(sample),
        "bytes_per_token": round(sum(map(len, sample)) / tokens, 4),
    }


def test_datasets_without_text_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"stdlib-documents": ["", ""], "stdlib-areas": []})
    with pytest.raises(InputError, match="data/collected: no text to train a tokenizer on"):
        train_tokenizer(run_of(tmp_path))
