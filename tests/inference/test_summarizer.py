"""Writing with an encoder-decoder: as transformers does from the same folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from components.config.params import InputError
from components.inference.summarizer import MAX_NEW_TOKENS, Summarizer

SOURCES = ["def add a b return a + b", "return the sum", "a " * 90, ""]


def told(folder: Path, copy: Path, settings: str) -> Path:
    """A copy of the folder that says something else of generation."""
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").write_text(settings)
    return copy


@pytest.mark.parametrize(("beams", "unrepeated"), [(1, 0), (3, 0), (1, 2), (3, 2)])
def test_what_is_written_is_what_transformers_writes(
    summarizer_folder: Path, beams: int, unrepeated: int, tmp_path: Path
) -> None:
    if unrepeated:
        settings = json.loads((summarizer_folder / "generation_config.json").read_text())
        settings = json.dumps({**settings, "no_repeat_ngram_size": unrepeated})
        summarizer_folder = told(summarizer_folder, tmp_path / "copy", settings)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(summarizer_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(summarizer_folder)
    written = Summarizer.load(summarizer_folder).write(SOURCES, beams)
    assert len(set(written)) > 1
    for source, target in zip(SOURCES, written, strict=True):
        ids = tokenizer(source, return_tensors="pt", truncation=True).input_ids
        options = {"length_penalty": 1.0, "early_stopping": False} if beams > 1 else {}
        said = theirs.generate(ids, max_new_tokens=MAX_NEW_TOKENS, num_beams=beams, do_sample=False, **options)
        assert target == tokenizer.decode(said[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("[]", "generation_config.json: not a readable generation configuration"),
        (
            '{"no_repeat_ngram_size": -1}',
            "generation_config.json: no_repeat_ngram_size: -1; expected a number of tokens",
        ),
    ],
)
def test_broken_generation_settings_are_an_input_error(
    summarizer_folder: Path, settings: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        Summarizer.load(told(summarizer_folder, tmp_path / "copy", settings))


def test_another_family_writes_nothing(classifier_folder: Path) -> None:
    with pytest.raises(InputError, match=r"a classifier is no encoder-decoder; give an encoder-decoder's folder$"):
        Summarizer.load(classifier_folder)
