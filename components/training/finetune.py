"""Stage: a pretrained model into one that does something: the encoder classifies, the encoder-decoder summarizes."""

from __future__ import annotations

from components.models.devices import configure_cpu
from components.runtime.stage import StageRun
from components.training.classifier import finetune_classifier
from components.training.summarizer import finetune_summarizer


def finetune(run: StageRun) -> None:
    """Train data/models/base/FAMILY on data/tokens/FAMILY/MODEL, save data/models/MODEL.

    Raises: InputError when base and rows do not fit, when there is nothing to learn, or when saving fails.
    """
    configure_cpu()
    {"classifier": finetune_classifier, "summarizer": finetune_summarizer}[run.item](run)
