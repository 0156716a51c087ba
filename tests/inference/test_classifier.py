"""Reading texts with a classifier: as transformers does, whatever else is in the batch, truncated and said so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from components.config.params import InputError
from components.inference import classifier as texts
from components.inference.classifier import TextClassifier

TEXTS = ["apple", "iron tin zinc", "cow dog cat cow dog", "plum pear", "nothing known"]


@pytest.fixture(scope="module")
def reader(classifier_folder: Path) -> TextClassifier:
    return TextClassifier.load(classifier_folder)


def test_labels_and_scores_are_those_of_transformers(reader: TextClassifier, classifier_folder: Path) -> None:
    theirs = AutoModelForSequenceClassification.from_pretrained(classifier_folder)
    padded = AutoTokenizer.from_pretrained(classifier_folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = theirs(**padded).logits.softmax(-1)
    for one, row in zip(reader.classify(TEXTS), scores.tolist(), strict=True):
        expected = dict(zip(theirs.config.id2label.values(), row, strict=True))
        assert one.scores == pytest.approx(expected, abs=1e-5)
        assert one.label == max(expected, key=lambda label: expected[label])
        assert list(one.scores.values()) == sorted(one.scores.values(), reverse=True)


def test_texts_are_labelled_alike_alone_and_in_any_batch(
    reader: TextClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = reader.classify(TEXTS)
    monkeypatch.setattr(texts, "TOKENS_A_PASS", 8)  # several passes
    for one, other in zip(reader.classify(TEXTS[::-1])[::-1], together, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
    for text, other in zip(TEXTS, together, strict=True):
        assert reader.classify([text])[0].scores == pytest.approx(other.scores, abs=1e-5)


def test_a_text_longer_than_the_model_reads_is_cut_and_said_so(reader: TextClassifier) -> None:
    fits, longer = reader.classify(["iron " * 14, "iron " * 15])
    assert (fits.truncated, longer.truncated) == (False, True), "two of the sixteen are [CLS] and [SEP]"
    assert longer.scores == pytest.approx(fits.scores, abs=1e-5)
    assert [one.truncated for one in reader.embed(["iron " * 14, "iron " * 15])] == [False, True]


def test_vectors_have_length_one_and_padding_changes_nothing(reader: TextClassifier) -> None:
    alone = reader.embed(["iron"])[0]
    beside = reader.embed(["cow dog cat cow dog", "iron"])[1]
    assert sum(value**2 for value in alone.vector) == pytest.approx(1)
    assert beside.vector == pytest.approx(alone.vector, abs=1e-5)
    assert alone.tokens == 3


def test_like_texts_lie_nearer_than_others(reader: TextClassifier) -> None:
    iron, tin, cow = (torch.tensor(one.vector) for one in reader.embed(["iron", "tin", "cow"]))
    assert iron @ tin > iron @ cow


def test_a_folder_without_labels_or_tokenizer_is_refused(
    classifier_folder: Path, agentless: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="decoder has no labels; give a classifier's folder"):
        TextClassifier.load(agentless)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((classifier_folder / name).read_bytes())
    with pytest.raises(InputError, match=r"tokenizer\.json: not found; a model folder has its tokenizer"):
        TextClassifier.load(tmp_path)


@pytest.fixture
def agentless(tmp_path: Path) -> Path:
    """A decoder's folder."""
    from components.models.checkpoint import save_model
    from components.models.decoder import Decoder, DecoderConfig

    folder = tmp_path / "decoder"
    save_model(Decoder(DecoderConfig(20, 8, 1, 1, 1, 8, 16, 16)), folder)
    return folder
