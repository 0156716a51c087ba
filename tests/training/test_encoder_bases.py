"""Randomly initialised encoders of `transformers` are imported, fine-tuned as a classifier's base, and classify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from components.config.params import InputError, load_params
from components.config.paths import Paths
from components.datasets.formats import DatasetWriter
from components.inference.classifier import TextClassifier
from components.models.checkpoint import load_model
from components.models.encoder import Classifier, Encoder
from components.models.lora import merge_lora
from components.models.sentence_pooling import read_pooling
from components.runtime.model_tasks import task_of
from components.runtime.stage import StageRun
from components.token_rows.prepare import prepare
from components.tokenization import text_tokenizer
from components.tracking.model_import import import_model, inspect_model
from components.tracking.registry import Registry
from components.training.finetune import finetune
from flows.orchestration.base_models import fetch_base_models
from tests.inference.test_sentence_pooling import described
from tests.tokenization.hf_tokenizers import ENCODERS, TEXTS, roberta

SOURCE = Path(__file__).parents[2]
LABELS = {"question": "what does it do?", "answer": "Hello there, 42 times."}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
# Of `transformers`: its name, its vocabulary with some to spare, and what its configuration says.
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta": ("Roberta", {"vocab_size": 512, "max_position_embeddings": 66, "type_vocab_size": 1, **SHAPE}),
    "xlm-roberta": ("XLMRoberta", {"vocab_size": 256, "max_position_embeddings": 66, "type_vocab_size": 1, **SHAPE}),
    "distilbert": (
        "DistilBert",
        {"vocab_size": 320, "max_position_embeddings": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2},
    ),
    "modernbert": ("ModernBert", {"vocab_size": 520, "max_position_embeddings": 64, "local_attention": 8, **SHAPE}),
}
SETTINGS: dict[str, Any] = {
    "scale": "smoke",
    "prepare.encoder.seq_len": 32,
    "pretrain.encoder.dataset": "docs",
    "classifier.dataset": "labelled",
    "classifier.base": "stranger@champion",
    "classifier.optimizer": "adamw",
    "classifier.learning_rate": 0.01,
    "classifier.precision": "fp32",
    "classifier.max_steps": 40,
    "classifier.warmup_steps": 2,
    "classifier.validation_steps": 10,
    "classifier.patience": 9,
    "classifier.adapt_steps": 3,
    "classifier.trials": 0,
    "classifier.global_batch_size": 8,
    "classifier.micro_batch_size": 8,
}


def base(name: str, folder: Path, ending: str) -> Path:
    """A folder of `transformers` with a tokenizer of its make."""
    family, values = BASES[name]
    folder.mkdir()
    ENCODERS[name](folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    roles = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.cls_token_id}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **values, **roles, eos_token_id=tokenizer.sep_token_id, initializer_range=0.1
    )
    getattr(transformers, family + ending)(config).save_pretrained(folder)
    return folder


@pytest.fixture
def paths(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A project with texts and labels, and a tokenizer of its own."""
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(home))
    paths = Paths(tmp_path)
    with DatasetWriter(paths.collected / "docs", "docs", "documents") as writer:
        for split in ("train", "test"):
            writer.write(split, {"id": split, "text": "words here. " * 50, "source": "here"})
    with DatasetWriter(paths.collected / "labelled", "labelled", "labelled_texts") as writer:
        for split, count in (("train", 32), ("validation", 8), ("test", 8)):
            for number in range(count):
                label = list(LABELS)[number % 2]
                writer.write(split, {"id": f"{split}-{number}", "text": f"{LABELS[label]} {number}", "label": label})
    text_tokenizer.save(text_tokenizer.train_encoder(TEXTS, 400), paths.tokenizer("encoder"))
    paths.metrics.mkdir(parents=True)
    paths.params.write_text(
        (SOURCE / "params.yaml").read_text().replace("classifier:", "classifier:\n  base: stranger@champion", 1)
    )
    return paths


def tuned(paths: Paths, home: Path, folder: Path, recorder: Any, **changes: Any) -> Path:
    import_model(folder, inspect_model(folder), "stranger", Registry(home))
    fetch_base_models(paths, print)
    params = load_params(
        SOURCE / "params.yaml", SETTINGS | {f"classifier.{key}": each for key, each in changes.items()}
    )
    prepare(StageRun("prepare@encoder", params, paths, paths.root / "state", recorder))
    finetune(StageRun("finetune@classifier", params, paths, paths.root / "state", recorder))
    return paths.classifier


@pytest.mark.parametrize("name", list(BASES))
def test_a_stranger_becomes_a_classifier(name: str, paths: Paths, home: Path, recorder: Any) -> None:
    """Adapted to the texts by masked tokens first; what is left is what transformers loads and says."""
    folder = base(name, paths.root / "theirs", "ForMaskedLM")
    classifier = tuned(paths, home, folder, recorder)
    before, after = load_model(folder), load_model(classifier)
    assert isinstance(before, Encoder)
    assert isinstance(after, Classifier)
    assert not torch.equal(before.embed.weight, after.embed.weight)
    assert task_of(classifier) == "classify"
    texts = [*LABELS.values(), "Hello <s>[CLS]</s>, what? 東京"]
    found = TextClassifier.load(classifier).classify(texts)
    assert [one.label for one in found[:2]] == list(LABELS)
    theirs = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    read = AutoTokenizer.from_pretrained(classifier)(texts[:2], padding=True, return_tensors="pt")
    read.pop("token_type_ids", None)
    with torch.no_grad():
        scores = theirs(**read).logits.softmax(-1)
    for one, row in zip(found, scores.tolist(), strict=False):
        assert one.scores == pytest.approx(dict(zip(theirs.config.id2label.values(), row, strict=True)), abs=1e-5)


@pytest.mark.parametrize("name", ["roberta", "modernbert"])
def test_a_stranger_without_a_head_is_tuned_by_lora(name: str, paths: Paths, home: Path, recorder: Any) -> None:
    """One of sentence-transformers: its pooling comes along."""
    folder = described(base(name, paths.root / "theirs", "Model"), "max_tokens", normalize=False)
    classifier = tuned(paths, home, folder, recorder, adapt_steps=0, lora_rank=4)
    assert read_pooling(classifier) == read_pooling(folder)
    assert read_pooling(classifier).mode == "max"
    before, after = load_model(folder), load_model(classifier)
    assert torch.equal(before.get_parameter("embed.weight"), after.get_parameter("embed.weight"))
    merge_lora(after)
    weight = "blocks.0.attention.qkv.weight"
    assert not torch.equal(before.get_parameter(weight), after.get_parameter(weight))
    assert [one.label for one in TextClassifier.load(classifier).classify(list(LABELS.values()))] == list(LABELS)


def test_positions_are_counted_by_the_padding_of_the_tokenizer(tmp_path: Path) -> None:
    folder = base("roberta", tmp_path / "model", "Model")
    roberta(folder, pad_token="<unk>")
    with pytest.raises(InputError, match="pad_token_id: 1 is not the tokenizer's 3, by which positions are counted"):
        inspect_model(folder)
