"""Fine-tune the pretrained encoder to classify: domain adaptation, hyper-parameter search, training, calibration.

Devlin et al. 2019 (arXiv 1810.04805) for the head on [CLS], Gururangan et al. 2020 (arXiv 2004.10964) for pretraining
on the texts themselves, Guo et al. 2017 (arXiv 1706.04599) for temperature scaling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
from components.models.base_store import store_base
from components.models.checkpoint import load_model, save_model
from components.models.devices import best_device
from components.models.encoder import Classifier, Encoder, EncoderForPretraining, classifier_from
from components.models.lora import add_lora, merge_lora
from components.models.sentence_pooling import pooling_files
from components.runtime.stage import StageRun, Tracker
from components.token_rows.variable_length import LabelledRows
from components.tokenization.text_tokenizer import TextTokenizer
from components.training.defaults import fit_to_base
from components.training.distributed import rank, sum_in_place, world_size
from components.training.early_stopping import EarlyStopping
from components.training.from_base import quantize_frozen, refuse_other_vocabulary
from components.training.loop import Measured, train
from components.training.objectives import classification, masked_lm_next_sentence
from components.training.report import describe, report
from components.training.rows import MaskedRows, TokenDropoutRows
from components.training.search import Range, Trial, TrialMonitor, Values, best_of, search

if TYPE_CHECKING:
    import optuna

VALIDATION_BATCH = 256


@dataclass(frozen=True)
class Phase(StageRun):
    """One training within the stage, with its own checkpoints; progress counts the steps of all phases."""

    first_step: int = 0
    """Steps of the phases before this one."""
    total_steps: int = 0
    """Steps of all phases."""
    title: str = ""

    def progress(self, done: int, total: int, **values: float | str) -> None:
        super().progress(self.first_step + done, self.total_steps, part=self.title, **values)


class ClassifierTraining:
    """One run of the stage: what its phases share."""

    def __init__(self, run: StageRun) -> None:
        self.run = run
        self.base = run.paths.start_of("encoder")
        folder = run.paths.tokens("encoder") / "classifier"
        self.rows, self.validation = (LabelledRows(folder, split) for split in ("train", "validation"))
        self.tokenizer = TextTokenizer.load(self.base)
        self.encoder = _load_encoder(self.base, self.rows)
        config = run.params.classifier
        config = fit_to_base(run, config, self.encoder, self.rows, config.base)
        epoch_steps = math.ceil(config.min_epochs * len(self.rows) / config.global_batch_size)
        self.config = config = config.model_copy(update={"max_steps": max(config.max_steps, epoch_steps)})
        if config.fresh and not config.base and not config.lora_rank:
            torch.manual_seed(run.params.seed)
            self.encoder = type(self.encoder)(self.encoder.config)
        refuse_other_vocabulary(run, "encoder", self.encoder.config.vocab_size, self.rows)
        self.total_steps = config.adapt_steps + config.trials * config.trial_steps + config.max_steps
        numbers = self.rows.numbers("label")
        weights = class_weights(numbers, len(self.rows.labels), config.class_weight_power)
        self.weights = torch.tensor(weights, dtype=torch.float32, device=best_device())

    def phase(self, title: str, first_step: int, tracker: Tracker) -> Phase:
        """A run for one training, whose checkpoints lie in a folder of its own."""
        run = self.run
        return Phase(run.name, run.params, run.paths, run.state / title, tracker, first_step, self.total_steps, title)

    def adapt(self) -> None:
        """Continue masked language modelling on the texts to classify."""
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
            phase = self.phase("adapt", 0, tracker)
            train(phase, steps, self.encoder, rows, masked_lm_next_sentence, is_last=False)

    def search(self) -> list[Trial]:
        """Short trainings with other settings; none where `trials` is 0."""
        config = self.config
        if not config.trials:
            return []
        ranges = _ranges(config)
        initial = {name: float(getattr(config, name)) for name in ranges}
        return search(config.trials, self.run.params.seed, initial, ranges, self._run_trial)

    def _run_trial(self, trial: optuna.trial.Trial, values: Values) -> TrialMonitor:
        config = self.config
        title, first_step = f"trial-{trial.number}", config.adapt_steps + trial.number * config.trial_steps
        settings = config.model_copy(update={**values, "max_steps": config.trial_steps})
        with self.run.tracker.child(title) as tracker:
            tracker.params(values)
            phase = self.phase(title, first_step, tracker)
            model = self._new_model(settings)
            monitor = TrialMonitor(
                trial, self.score, settings.validation_steps, settings.patience, _score_logger(phase)
            )
            self._train(phase, settings, model, monitor, is_last=False)
        return monitor

    def final(self, values: Values) -> tuple[Classifier, EarlyStopping, Measured]:
        """The long training, with `values` in place of those of the configuration."""
        settings = self.config.model_copy(update=values)
        phase = self.phase("final", self.total_steps - self.config.max_steps, self.run.tracker)
        model = self._new_model(settings)
        stopping = EarlyStopping(self.score, settings.validation_steps, settings.patience, _score_logger(phase))
        return model, stopping, self._train(phase, settings, model, stopping, is_last=True)

    def _new_model(self, settings: ClassifierConfig) -> Classifier:
        torch.manual_seed(self.run.params.seed)
        model = classifier_from(self.encoder, self.rows.labels, settings.dropout)
        if settings.lora_rank:
            # Adapted to the texts, the base is no longer the one that is stored.
            base = None if settings.adapt_steps else store_base(self.base, self.run.paths.home)
            add_lora(model, settings.lora_rank, settings.lora_alpha, ("pooler", "head"), base)
        quantize_frozen(self.run, settings.quantize_base, model)
        return model

    def _train(
        self, phase: Phase, settings: ClassifierConfig, model: Classifier, stopping: EarlyStopping, is_last: bool
    ) -> Measured:
        rows = TokenDropoutRows(self.rows, self.tokenizer, settings.token_dropout, self.run.params.seed)
        objective = classification(self.weights, settings.label_smoothing)
        return train(phase, settings, model, rows, objective, stopping, is_last)

    def score(self, model: Classifier) -> float:
        """Macro-F1 on the validation texts."""
        labels = self.validation.numbers("label")
        predictions = validation_logits(model, self.validation).argmax(1).numpy()
        return float(f1_score(labels, predictions, average="macro")) if len(labels) else 0.0


def finetune_classifier(run: StageRun) -> None:
    """Train the base on data/tokens/encoder/classifier, save data/models/classifier."""
    training = ClassifierTraining(run)
    describe(run, training.encoder, training.encoder.config.max_seq_len, training.rows)
    training.adapt()
    trials = training.search()
    best = best_of(trials, 1 / len(training.rows.labels)) if trials else None
    chosen = best.values if best else {}
    model, stopping, measured = training.final(chosen)
    if training.config.adapt_steps:
        merge_lora(model)
    logits = validation_logits(model, training.validation)
    temperature = fit_temperature(logits, torch.from_numpy(training.validation.numbers("label")))
    apply_temperature(model, temperature)
    save_model(model, run.paths.classifier, training.base, pooling_files(training.base))
    metrics: dict[str, float | int | str | None] = {
        "validation_macro_f1": stopping.best_score,
        "best_step": stopping.best_step,
        "temperature": temperature,
        "labels": len(training.rows.labels),
        "texts": len(training.rows),
        "texts_cut": training.rows.info["truncated"].get("train_truncated", 0),
        "trials": len(trials),
        **{f"chosen_{name}": value for name, value in chosen.items()},
    }
    if best:
        metrics["chosen_trial"] = best.number
        rows = [{**asdict(trial), **trial.values} for trial in trials]
        run.tracker.table("trials.json", {name: [row[name] for row in rows] for name in rows[0] if name != "values"})
    report(run, training.config, model, measured, run.paths.classifier, metrics)


def _load_encoder(base: Any, rows: LabelledRows) -> Encoder:
    encoder = load_model(base)
    if not isinstance(encoder, Encoder):
        raise InputError(f"{base}: a {type(encoder).__name__.lower()} cannot classify; give an encoder's folder")
    if len(rows.labels) < 2:
        raise InputError(f"{rows.folder}: one label alone, {rows.labels}; a classifier needs two or more")
    return encoder


def _ranges(config: ClassifierConfig) -> dict[str, Range]:
    """Learning rates from a third to three times those of the configuration, regularisation from half to twice.

    Regularisation never down to zero: short trials prefer none, and it helps the long training.
    """
    rates, others = ("learning_rate", "muon_learning_rate"), ("label_smoothing", "token_dropout", "dropout")
    initial = {name: float(getattr(config, name)) for name in (*rates, *others)}
    ranges = {name: Range(initial[name] / 3, initial[name] * 3, log=True) for name in rates}
    return ranges | {name: Range(initial[name] / 2, min(initial[name] * 2, 0.9)) for name in others if initial[name]}


def _score_logger(phase: Phase) -> Callable[[int, float], None]:
    def log(step: int, score: float) -> None:
        phase.tracker.metrics({"validation_macro_f1": score}, step)
        phase.progress(step, phase.total_steps, macro_f1=score)

    return log


@torch.no_grad()
def validation_logits(model: Classifier, rows: LabelledRows) -> Tensor:
    """Logits (N, L) float32 of every row, in order, on every rank; each batch holds rows of similar length."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    order = np.argsort(rows.lengths(), kind="stable")
    all_logits = torch.zeros(len(rows), len(model.config.labels))
    starts = range(0, len(order), VALIDATION_BATCH)
    for first in range(0, len(starts), world_size()):
        number = first + rank()
        # A rank without a batch repeats the last: the ranks exchange weights in each pass.
        start = starts[min(number, len(starts) - 1)]
        indices = order[start : start + VALIDATION_BATCH]
        batch = {name: part.to(device) for name, part in rows.batch(indices).items()}
        logits = model.logits(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"])
        if number < len(starts):
            all_logits[torch.from_numpy(indices)] = logits.float().cpu()
    model.train(training)
    return sum_in_place(all_logits)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T of softmax(logits / T) with the lowest cross-entropy: logits (N, L), labels (N,)."""
    if not len(labels):
        return 1.0

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / np.exp(log_temperature), labels))

    return float(np.exp(minimize_scalar(loss, bounds=(-2.0, 2.0), method="bounded", options={"xatol": 1e-6}).x))


def class_weights(numbers: npt.NDArray[np.int64], count: int, power: float) -> npt.NDArray[np.float64]:
    """The weight (L,) of each label in the loss: (N / (L n)) ** power for a label of n of the N texts.

    Power 1 weighs all labels alike however rare ("balanced" in scikit-learn), power 0 all texts alike.
    """
    texts = np.bincount(numbers, minlength=count)
    weights: npt.NDArray[np.float64] = (len(numbers) / (count * np.maximum(texts, 1))) ** power
    return weights


@torch.no_grad()
def apply_temperature(model: Classifier, temperature: float) -> None:
    """Divide the head by a temperature, so that any reader of the folder gets calibrated probabilities."""
    model.head.weight.div_(temperature)
    model.head.bias.div_(temperature)
