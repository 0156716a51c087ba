"""The pretrained encoder into a classifier: adapt to the texts, search settings, train with the best, calibrate.

Devlin et al. 2019 (arXiv 1810.04805) for the head on [CLS], Gururangan et al. 2020 (arXiv 2004.10964) for going on
with pretraining on the texts themselves, Guo et al. 2017 (arXiv 1706.04599) for the temperature.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import f1_score
from torch import Tensor
from torch.nn import functional as F

from components.config.model_settings import ClassifierConfig
from components.config.params import InputError
from components.models.checkpoint import load_model, save_model
from components.models.devices import best_device
from components.models.encoder import Classifier, Encoder, EncoderForPretraining, classifier_from
from components.models.lora import add_lora, merge_lora
from components.runtime.stage import StageRun, Tracker
from components.token_rows.variable_length import LabelledRows
from components.tokenization.text_tokenizer import TextTokenizer
from components.training.checkpoints import Checkpoints
from components.training.early_stopping import EarlyStopping
from components.training.loop import train
from components.training.objectives import classification, masked_lm_next_sentence
from components.training.report import describe, refuse_other_vocabulary, report
from components.training.rows import MaskedRows, TokenDropoutRows
from components.training.search import Range, TrialMonitor, Tried, Values, best_of, search

if TYPE_CHECKING:
    import optuna

VALIDATION_BATCH = 256


@dataclass(frozen=True)
class Part(StageRun):
    """A training within a stage, with its own checkpoints; progress counts the steps of all of them."""

    before: int = 0
    """Steps of the parts before this one."""
    whole: int = 0
    """Steps of all parts."""
    title: str = ""

    def progress(self, done: int, total: int, **facts: float | str) -> None:
        super().progress(self.before + done, self.whole, part=self.title, **facts)


class Finetuning:
    """One run of the stage: what its parts share."""

    def __init__(self, run: StageRun) -> None:
        self.run = run
        self.base = run.paths.start_of("encoder")
        folder = run.paths.tokens("encoder") / "classifier"
        self.rows, self.validation = (LabelledRows(folder, split) for split in ("train", "validation"))
        self.tokenizer = TextTokenizer.load(self.base)
        self.encoder = _load_encoder(self.base, self.rows)
        self.config = config = _long_enough(run.params.classifier, len(self.rows))
        if config.fresh and not config.base and not config.lora_rank:
            torch.manual_seed(run.params.seed)
            self.encoder = type(self.encoder)(self.encoder.config)
        refuse_other_vocabulary(run, "encoder", self.encoder.config.vocab_size, self.rows)
        self.parts: list[Part] = []
        self.whole = config.adapt_steps + config.trials * config.trial_steps + config.max_steps
        numbers = self.rows.numbers("label")
        weights = class_weights(numbers, len(self.rows.labels), config.class_weight_power)
        self.weights = torch.tensor(weights, dtype=torch.float32, device=best_device())

    def part(self, title: str, before: int, tracker: Tracker) -> Part:
        """A run for one training, whose checkpoints lie in a folder of its own."""
        run = self.run
        state = run.state / title
        made = Part(run.name, run.params, run.paths, state, tracker, before, self.whole, title)
        self.parts.append(made)
        return made

    def adapt(self) -> None:
        """Go on with masked language modelling, on the texts that are to be classified."""
        config = self.config
        if not config.adapt_steps:
            return
        if not isinstance(self.encoder, EncoderForPretraining):
            raise InputError(
                f"{self.base}: has no head for masked tokens; set classifier.adapt_steps to 0, now {config.adapt_steps}"
            )
        rows = MaskedRows(self.rows, self.tokenizer, config.masked_share, self.run.params.seed)
        steps = config.model_copy(update={"max_steps": config.adapt_steps})
        torch.manual_seed(self.run.params.seed)
        with self.run.tracker.child("adapt") as tracker:
            train(self.part("adapt", 0, tracker), steps, self.encoder, rows, masked_lm_next_sentence)

    def search(self) -> list[Tried]:
        """Short trainings with other settings; none where `trials` is 0."""
        config = self.config
        if not config.trials:
            return []
        given = {name: float(getattr(config, name)) for name in _ranges(config)}
        return search(config.trials, self.run.params.seed, given, _ranges(config), self._attempt)

    def _attempt(self, trial: optuna.trial.Trial, values: Values) -> TrialMonitor:
        config = self.config
        title, before = f"trial-{trial.number}", config.adapt_steps + trial.number * config.trial_steps
        settings = config.model_copy(update={**values, "max_steps": config.trial_steps})
        with self.run.tracker.child(title) as tracker:
            tracker.params(values)
            part = self.part(title, before, tracker)
            model = self._new_model(settings)
            watch = TrialMonitor(
                trial, lambda: self.score(model), settings.validation_steps, settings.patience, _told(part, tracker)
            )
            self._train(part, settings, model, watch)
        return watch

    def final(self, values: Values) -> tuple[Classifier, EarlyStopping, Any]:
        """The long training, with these values instead of the given ones."""
        settings = self.config.model_copy(update=values)
        part = self.part("final", self.whole - self.config.max_steps, self.run.tracker)
        model = self._new_model(settings)
        watch = EarlyStopping(
            lambda: self.score(model), settings.validation_steps, settings.patience, _told(part, part.tracker)
        )
        return model, watch, self._train(part, settings, model, watch)

    def _new_model(self, settings: ClassifierConfig) -> Classifier:
        torch.manual_seed(self.run.params.seed)
        model = classifier_from(self.encoder, self.rows.labels, settings.dropout)
        if settings.lora_rank:
            add_lora(model, settings.lora_rank, settings.lora_alpha, also=("pooler", "head"))
        return model

    def _train(self, part: Part, settings: ClassifierConfig, model: Classifier, watch: EarlyStopping) -> Any:
        rows = TokenDropoutRows(self.rows, self.tokenizer, settings.token_dropout, self.run.params.seed)
        return train(part, settings, model, rows, classification(self.weights, settings.label_smoothing), watch)

    def score(self, model: Classifier) -> float:
        """Macro-F1 on the validation texts."""
        labels, guesses = self.validation.numbers("label"), validation_logits(model, self.validation).argmax(1).numpy()
        return float(f1_score(labels, guesses, average="macro")) if len(labels) else 0.0


def finetune_classifier(run: StageRun) -> None:
    """Train the base on data/tokens/encoder/classifier, save data/models/classifier."""
    work = Finetuning(run)
    describe(run, work.encoder, work.encoder.config.max_seq_len, work.rows)
    work.adapt()
    tried = work.search()
    best = best_of(tried, 1 / len(work.rows.labels)) if tried else None
    chosen = best.values if best else {}
    model, watch, measured = work.final(chosen)
    merge_lora(model)
    logits = validation_logits(model, work.validation)
    temperature = fit_temperature(logits, torch.from_numpy(work.validation.numbers("label")))
    apply_temperature(model, temperature)
    save_model(model, run.paths.classifier, work.base)
    facts: dict[str, float | int | str | None] = {
        "validation_macro_f1": watch.best_score,
        "best_step": watch.best_step,
        "temperature": temperature,
        "labels": len(work.rows.labels),
        "texts": len(work.rows),
        "texts_cut": work.rows.info["truncated"].get("train_truncated", 0),
        "trials": len(tried),
        **{f"chosen_{name}": value for name, value in chosen.items()},
    }
    if best:
        facts["chosen_trial"] = best.number
        run.tracker.table("trials.json", _columns(tried))
    for part in work.parts:
        Checkpoints(part.state).clear()
    report(run, work.config, model, measured, run.paths.classifier, facts)


def _load_encoder(base: Any, rows: LabelledRows) -> Encoder:
    encoder = load_model(base)
    if not isinstance(encoder, Encoder):
        raise InputError(f"{base}: a {type(encoder).__name__.lower()} reads no labels; give an encoder's folder")
    if len(rows.labels) < 2:
        raise InputError(f"{rows.folder}: one label alone, {rows.labels}; a classifier needs two or more")
    return encoder


def _long_enough(config: ClassifierConfig, texts: int) -> ClassifierConfig:
    """The settings with as many steps as `min_epochs` passes take."""
    steps = math.ceil(config.min_epochs * texts / config.global_batch_size)
    return config.model_copy(update={"max_steps": max(config.max_steps, steps)})


def _ranges(config: ClassifierConfig) -> dict[str, Range]:
    """Rates up to three times the given ones and down to a third, regularisation up to twice and down to half.

    Not down to none: short trials like that best, for what it is there for comes later.
    """
    rates, others = ("learning_rate", "muon_learning_rate"), ("label_smoothing", "token_dropout", "dropout")
    given = {name: float(getattr(config, name)) for name in (*rates, *others)}
    found = {name: Range(given[name] / 3, given[name] * 3, log=True) for name in rates}
    return found | {name: Range(given[name] / 2, min(given[name] * 2, 0.9)) for name in others if given[name]}


def _told(part: Part, tracker: Tracker) -> Any:
    def told(step: int, score: float) -> None:
        tracker.metrics({"validation_macro_f1": score}, step)
        part.progress(step, part.whole, macro_f1=score)

    return told


def _columns(tried: list[Tried]) -> dict[str, list[Any]]:
    rows = [{**asdict(one), **one.values} for one in tried]
    return {name: [row[name] for row in rows] for name in rows[0] if name != "values"}


@torch.no_grad()
def validation_logits(model: Classifier, rows: LabelledRows) -> Tensor:
    """Logits (N, L) float32 of every row, in order; batches are of rows about as long as each other."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    order = np.argsort(rows.lengths(), kind="stable")
    found = torch.zeros(len(rows), len(model.config.labels))
    for start in range(0, len(order), VALIDATION_BATCH):
        places = order[start : start + VALIDATION_BATCH]
        batch = {name: part.to(device) for name, part in rows.batch(places).items()}
        logits = model.logits(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"])
        found[torch.from_numpy(places)] = logits.float().cpu()
    model.train(training)
    return found


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T of softmax(logits / T) with the lowest cross-entropy: logits (N, L), labels (N,)."""
    if not len(labels):
        return 1.0

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / np.exp(log_temperature), labels))

    return float(np.exp(minimize_scalar(loss, bounds=(-2.0, 2.0), method="bounded", options={"xatol": 1e-6}).x))


def class_weights(numbers: npt.NDArray[np.int64], count: int, power: float) -> npt.NDArray[np.float64]:
    """The weight (L,) of each label in the loss: (N / (L n)) ** power for one that n of the N texts have.

    Power 1 weighs all labels alike however rare ("balanced" in scikit-learn), power 0 all texts alike.
    """
    found = np.bincount(numbers, minlength=count)
    weights: npt.NDArray[np.float64] = (len(numbers) / (count * np.maximum(found, 1))) ** power
    return weights


@torch.no_grad()
def apply_temperature(model: Classifier, temperature: float) -> None:
    """Divide the logits by a temperature, within the head: any reader of the folder gets calibrated probabilities."""
    model.head.weight.div_(temperature)
    model.head.bias.div_(temperature)
