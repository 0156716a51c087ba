"""Writing with an encoder-decoder: as transformers does from the same folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from components.config import InputError
from components.prediction.writing import MAX_NEW_TOKENS, TextWriter

SOURCES = ["def add a b return a + b", "return the sum", "a " * 90, ""]


@pytest.mark.parametrize("beams", [1, 3])
def test_what_is_written_is_what_transformers_writes(summarizer_folder: Path, beams: int) -> None:
    theirs = AutoModelForSeq2SeqLM.from_pretrained(summarizer_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(summarizer_folder)
    written = TextWriter.load(summarizer_folder).write(SOURCES, beams)
    assert len(set(written)) > 1
    for source, target in zip(SOURCES, written, strict=True):
        ids = tokenizer(source, return_tensors="pt", truncation=True).input_ids
        options = {"length_penalty": 1.0, "early_stopping": False} if beams > 1 else {}
        said = theirs.generate(ids, max_new_tokens=MAX_NEW_TOKENS, num_beams=beams, do_sample=False, **options)
        assert target == tokenizer.decode(said[0], skip_special_tokens=True).strip()


def test_another_family_writes_nothing(classifier_folder: Path) -> None:
    with pytest.raises(InputError, match=r"a classifier writes no target; give an encoder-decoder's$"):
        TextWriter.load(classifier_folder)
