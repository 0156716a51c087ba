"""The stages of the encoder and the encoder-decoder on a tiny project, from datasets to model folders."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForPreTraining,
)

from components.config.params import InputError, load_params
from components.config.paths import Paths
from components.datasets.formats import DatasetWriter
from components.models.checkpoint import load_model, save_model
from components.models.encoder import Classifier, EncoderForPretraining
from components.models.lora import merge_lora
from components.runtime.stage import StageRun
from components.token_rows.batches import IGNORED
from components.token_rows.prepare import prepare
from components.token_rows.variable_length import Chunks, LabelledRows, SentencePairs
from components.tokenization.text_tokenizer import TextTokenizer
from components.tokenization.train_tokenizer import train_tokenizer
from components.training.finetune import finetune
from components.training.pretrain import pretrain
from components.training.rows import MaskedRows, SpanRows, TokenDropoutRows

SOURCE = Path(__file__).parents[2]
WORDS = {
    "fruit": ["apple", "pear", "plum", "cherry", "grape", "melon"],
    "metal": ["iron", "zinc", "tin", "copper", "lead", "nickel"],
    "animal": ["cow", "dog", "cat", "horse", "sheep", "goat"],
}
LOOP = {"max_steps": 12, "global_batch_size": 8, "micro_batch_size": 4, "warmup_steps": 2, "log_steps": 2}
TINY = (
    {"scale": "smoke", "train_tokenizer.encoder.vocab_size": 400, "train_tokenizer.encoder_decoder.vocab_size": 440}
    | {"prepare.encoder.seq_len": 32, "prepare.encoder_decoder.seq_len": 32, "prepare.encoder_decoder.target_len": 12}
    | {f"model.encoder.{key}": value for key, value in {"embed_dim": 32, "hidden_dim": 64, "max_seq_len": 32}.items()}
    | {"model.encoder_decoder.embed_dim": 32, "model.encoder_decoder.head_dim": 16}
    | {
        f"{section}.{key}": value
        for section in ("pretrain.encoder", "pretrain.encoder_decoder", "classifier", "summarizer")
        for key, value in {**LOOP, "checkpoint_seconds": 0.0001, "precision": "fp32", "learning_rate": 0.01}.items()
    }
    | {"classifier.max_steps": 40, "classifier.validation_steps": 4, "classifier.patience": 8}
    | {"classifier.adapt_steps": 4, "classifier.trials": 3, "classifier.trial_steps": 8}
)


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.settings: dict[str, Any] = {}
        self.tables: dict[str, Mapping[str, list[Any]]] = {}
        self.children: dict[str, Recorder] = {}

    def params(self, values: Mapping[str, Any]) -> None:
        self.settings.update(values)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.values.update(values)

    def dataset(self, name: str, digest: str, source: str, context: str) -> None: ...

    def table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        self.tables[name] = columns

    def artifact(self, path: Path) -> None: ...

    def figure(self, figure: Any, name: str) -> None: ...

    @contextmanager
    def child(self, name: str) -> Iterator[Recorder]:
        yield self.children.setdefault(name, Recorder())


def new_run(root: Path, name: str, **changes: Any) -> StageRun:
    overrides = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    return StageRun(
        name, load_params(SOURCE / "params.yaml", overrides), Paths(root), root / "state" / name, Recorder()
    )


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with datasets, tokenizers, rows and both base models."""
    return write_project(tmp_path_factory.mktemp("project"))


def write_project(root: Path) -> Path:
    random = np.random.default_rng(0)

    def sentence(label: str) -> str:
        return " ".join(random.choice(WORDS[label], 4))

    for name, kind in (
        ("stdlib-documents", "documents"),
        ("stdlib-areas", "labelled_texts"),
        ("stdlib-summaries", "text_pairs"),
    ):
        with DatasetWriter(root / "data/collected" / name, name, kind) as writer:  # type: ignore[arg-type]
            for split, count in (("train", 60), ("validation", 12), ("test", 12)):
                if (split, kind) == ("validation", "documents"):
                    continue
                for number in range(count):
                    label = list(WORDS)[number % 3]
                    text = ". ".join(sentence(label) for _ in range(3)) + "."
                    row = {"text": text, "label": label, "source": text, "target": label}
                    writer.write(
                        split, {"id": f"{split}-{number}"} | {k: row[k] for k in row if k in writer.schema.names}
                    )
    for family in ("encoder", "encoder_decoder"):
        for stage in (train_tokenizer, prepare, pretrain):
            stage(new_run(root, f"{stage.__name__}@{family}"))
    return root


@pytest.fixture
def project(pretrained: Path, tmp_path: Path) -> Path:
    """A copy to fine-tune in."""
    shutil.copytree(pretrained, tmp_path / "project")
    return tmp_path / "project"


def metrics(root: Path, stage: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((root / f"data/metrics/{stage}.json").read_text())
    return read


def test_transformers_loads_what_pretraining_leaves(pretrained: Path) -> None:
    paths = Paths(pretrained)
    for family, theirs in (("encoder", BertForPreTraining), ("encoder_decoder", AutoModelForSeq2SeqLM)):
        folder = paths.base(family)  # type: ignore[arg-type]
        model = theirs.from_pretrained(folder)
        read = metrics(pretrained, f"pretrain@{family}")
        assert read["parameters"] == sum(weight.numel() for weight in model.parameters())
        assert read["steps"] == 12
        assert 0 < read["test_loss"] < 8
        assert AutoTokenizer.from_pretrained(folder)("apple").input_ids
        assert any((pretrained / f"state/pretrain@{family}").iterdir()), "until DVC has stored the model"


def test_the_classifier_learns_and_is_what_transformers_loads(project: Path) -> None:
    run = new_run(project, "finetune@classifier", classifier__max_steps=120, classifier__patience=20)
    finetune(run)
    read = metrics(project, "finetune@classifier")
    assert read["validation_macro_f1"] == 1.0
    assert (read["labels"], read["texts"], read["texts_cut"], read["trials"]) == (3, 60, 0, 3)
    assert read["temperature"] > 0
    folder = run.paths.classifier
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    assert theirs.config.id2label == {0: "animal", 1: "fruit", 2: "metal"}
    inputs = AutoTokenizer.from_pretrained(folder)(["apple pear", "cow"], padding=True, return_tensors="pt")
    ours = load_model(folder)
    assert isinstance(ours, Classifier)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(**inputs), theirs(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_trials_are_runs_within_the_run_and_the_best_one_is_taken(project: Path) -> None:
    run = new_run(project, "finetune@classifier")
    finetune(run)
    told: Any = run.tracker
    assert list(told.children) == ["adapt", "trial-0", "trial-1", "trial-2"]
    trials = told.tables["trials.json"]
    best = max(range(3), key=lambda number: (trials["score"][number], -number))
    read = metrics(project, "finetune@classifier")
    for name in ("learning_rate", "muon_learning_rate", "label_smoothing", "token_dropout", "dropout"):
        assert read[f"chosen_{name}"] == trials[name][best] == told.children[f"trial-{best}"].settings[name]
        assert trials[name][0] == pytest.approx(getattr(run.params.classifier, name))
    assert "validation_macro_f1" in told.children["trial-0"].values
    assert told.values["final.validation_macro_f1"] == read["validation_macro_f1"]

    # It was killed before DVC had stored the classifier: every training is at its end.
    again: Any = new_run(project, "finetune@classifier")
    finetune(again)
    assert metrics(project, "finetune@classifier") == read
    for tracker in (again.tracker, *again.tracker.children.values()):
        assert "loss" not in tracker.values


def test_without_trials_the_given_values_are_taken(project: Path) -> None:
    run = new_run(project, "finetune@classifier", classifier__trials=0, classifier__adapt_steps=0)
    finetune(run)
    told: Any = run.tracker
    assert (told.children, told.tables) == ({}, {})
    assert not [name for name in metrics(project, "finetune@classifier") if name.startswith("chosen_")]


def test_a_fresh_start_takes_nothing_but_the_shape_of_the_pretrained_encoder(project: Path) -> None:
    paths, ended = Paths(project), []
    changes: dict[str, Any] = {"classifier__trials": 0, "classifier__adapt_steps": 0, "classifier__fresh": True}
    for disturbed in (False, True):
        if disturbed:
            model = load_model(paths.base("encoder"))
            with torch.no_grad():
                model.get_parameter("embed.weight").add_(1.0)
            save_model(model, paths.base("encoder"), paths.tokenizer("encoder"))
        finetune(new_run(project, "finetune@classifier", **changes))
        ended.append(load_model(paths.classifier).state_dict())
    assert all(torch.equal(weight, ended[1][name]) for name, weight in ended[0].items())


def test_max_steps_of_a_person_is_the_maximum_whatever_the_passes_over_the_texts(project: Path) -> None:
    changes: dict[str, Any] = {"classifier__trials": 0, "classifier__adapt_steps": 0, "classifier__patience": 99}
    run = new_run(project, "finetune@classifier", classifier__min_epochs=9.5, **changes)
    finetune(run)
    texts = int(metrics(project, "finetune@classifier")["texts"])
    assert metrics(project, "finetune@classifier")["steps"] == 40 < math.ceil(9.5 * texts / 8)


def test_a_killed_finetuning_ends_at_the_weights_of_an_unbroken_one(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended at any report of any part: while adapting, in each trial, in the last training."""
    finetune(new_run(project, "finetune@classifier"))
    unbroken = metrics(project, "finetune@classifier")
    shutil.rmtree(project / "state")
    whole = 4 + 3 * 8 + 40
    progress = StageRun.progress

    class Killed(BaseException):
        pass

    for stop in (2, 10, 20, whole - 30):

        def told(run: StageRun, done: int, total: int, stop: int = stop, **facts: float | str) -> None:
            progress(run, done, total, **facts)
            if done >= stop:
                raise Killed

        monkeypatch.setattr(StageRun, "progress", told)
        torch.manual_seed(stop)
        with pytest.raises(Killed):
            finetune(new_run(project, "finetune@classifier"))
    monkeypatch.setattr(StageRun, "progress", progress)
    finetune(new_run(project, "finetune@classifier"))
    assert metrics(project, "finetune@classifier") == unbroken


def test_progress_counts_the_steps_of_all_parts(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune(new_run(project, "finetune@classifier"))
    places = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "/" in line]
    done = [int(place.split("/")[0]) for place in places]
    assert {place.split("/")[1] for place in places} == {str(4 + 3 * 8 + 40)}
    assert done == sorted(done)


def test_the_summarizer_learns(project: Path) -> None:
    run = new_run(project, "finetune@summarizer", summarizer__max_steps=60)
    finetune(run)
    read = metrics(project, "finetune@summarizer")
    assert read["test_loss"] < 1.5
    assert read["validation_loss"] < 1.5
    theirs = AutoModelForSeq2SeqLM.from_pretrained(run.paths.summarizer)
    assert theirs.config.d_model == 32
    assert theirs.generation_config.no_repeat_ngram_size == run.params.summarizer.no_repeat_ngram_size == 3


def test_a_base_of_another_kind_or_vocabulary_is_refused(project: Path) -> None:
    paths = Paths(project)
    encoder, other = paths.base("encoder"), paths.base("encoder_decoder")
    away = encoder.rename(project / "away")
    shutil.copytree(other, encoder)
    with pytest.raises(InputError, match="a encoderdecoder cannot classify; give an encoder's folder"):
        finetune(new_run(project, "finetune@classifier"))
    shutil.rmtree(encoder)
    model = load_model(away)
    assert isinstance(model, EncoderForPretraining)
    save_model(EncoderForPretraining(replace(model.config, vocab_size=99)), encoder, away)
    with pytest.raises(InputError, match=r'vocab_size 99 differs from the 326 of .*; run "loopwright run --until'):
        finetune(new_run(project, "finetune@classifier"))
    shutil.rmtree(other)
    shutil.copytree(away, other)
    with pytest.raises(InputError, match="cannot summarize; give an encoder-decoder's folder"):
        finetune(new_run(project, "finetune@summarizer"))


@pytest.mark.parametrize("model", ["classifier", "summarizer"])
def test_low_rank_pairs_alone_learn(model: str, project: Path) -> None:
    paths = Paths(project)
    for name in ("dvc.yaml", "params.yaml"):  # by which the state folder is found, where the base is
        (project / name).touch()
    changes = {f"{model}__lora_rank": 2, "classifier__trials": 1, "classifier__adapt_steps": 0}
    finetune(new_run(project, f"finetune@{model}", **changes))
    before = dict(load_model(paths.base("encoder" if model == "classifier" else "encoder_decoder")).named_parameters())
    adapted = load_model(getattr(paths, model))
    merge_lora(adapted)
    after = dict(adapted.named_parameters())
    assert torch.equal(before["embed.weight"], after["embed.weight"]), "frozen"
    changed = {name for name in after if name in before and not torch.equal(before[name], after[name])}
    learned = ("qkv.weight", "out.weight", "up.weight", "down.weight", "pooler.weight", "pooler.bias")
    assert all(name.endswith(learned) or name.startswith("head.") for name in changed)
    assert any(name.endswith("qkv.weight") for name in changed)


def test_one_label_alone_is_refused(project: Path) -> None:
    path = Paths(project).tokens("encoder") / "classifier/rows.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": ["fruit"]}))
    with pytest.raises(InputError, match=r"one label alone, \['fruit'\]; a classifier needs two or more"):
        finetune(new_run(project, "finetune@classifier"))


def test_corruption_is_a_function_of_seed_step_and_row(pretrained: Path) -> None:
    paths = Paths(pretrained)
    encoder, other = (TextTokenizer.load(paths.tokenizer(family)) for family in ("encoder", "encoder_decoder"))  # type: ignore[arg-type]
    params = load_params(SOURCE / "params.yaml", TINY)
    texts = LabelledRows(paths.tokens("encoder") / "classifier", "train")
    pairs = SentencePairs(paths.tokens("encoder") / "pretrain", "train")
    chunks = Chunks(paths.tokens("encoder_decoder") / "pretrain", "train")
    made: list[Callable[[int], Any]] = [
        lambda seed: TokenDropoutRows(texts, encoder, 0.3, seed),
        lambda seed: MaskedRows(texts, encoder, 0.15, seed),
        lambda seed: MaskedRows(pairs, encoder, 0.15, seed),
        lambda seed: SpanRows(chunks, other, params.pretrain.encoder_decoder, seed),
    ]
    rows = np.arange(6)
    for make in made:
        once, again = (make(0).batch(rows, step=7)["input_ids"] for _ in range(2))
        assert torch.equal(once, again)
        assert not torch.equal(once, make(0).batch(rows, step=8)["input_ids"])
        assert not torch.equal(once, make(1).batch(rows, step=7)["input_ids"])
        backwards = make(0).batch(rows[::-1].copy(), step=7)["input_ids"]
        assert torch.equal(backwards.flip(0), once), "whatever else is in the batch"


def test_padding_and_special_tokens_are_never_masked(pretrained: Path) -> None:
    paths = Paths(pretrained)
    tokenizer = TextTokenizer.load(paths.tokenizer("encoder"))
    config = load_params(SOURCE / "params.yaml", TINY).pretrain.encoder
    pairs = SentencePairs(paths.tokens("encoder") / "pretrain", "train")
    for whole_words in (True, False):
        rows = MaskedRows(pairs, tokenizer, config.masked_share, 0, whole_words)
        plain, batch = pairs.batch(np.arange(20)), rows.batch(np.arange(20))
        chosen = batch["labels"] != IGNORED
        assert torch.equal(batch["labels"][chosen], plain["input_ids"][chosen])
        assert torch.equal(batch["input_ids"][~chosen], plain["input_ids"][~chosen])
        assert not (chosen & (plain["words"] < 0)).any()
        assert "words" not in batch
