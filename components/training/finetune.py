"""Stage: fine-tune the pretrained encoder to classify, the pretrained encoder-decoder to summarize."""

from __future__ import annotations

from components.config.params import InputError
from components.models.checkpoint import load_model, save_model
from components.models.devices import configure_cpu
from components.models.encoder_decoder import EncoderDecoder
from components.runtime.stage import StageRun
from components.token_rows.variable_length import TextPairRows
from components.training.classifier import finetune_classifier
from components.training.defaults import fit_to_base
from components.training.distributed import join
from components.training.from_base import refuse_other_vocabulary, train_from_base
from components.training.loop import measure_loss
from components.training.objectives import sequence_to_sequence
from components.training.report import TEST_ROWS, report


def finetune(run: StageRun) -> None:
    """Train data/models/base/FAMILY on data/tokens/FAMILY/MODEL, save data/models/MODEL.

    Raises: InputError when base and rows do not fit, when there is nothing to learn, or when saving fails.
    """
    configure_cpu()
    join()
    {"classifier": finetune_classifier, "summarizer": finetune_summarizer}[run.item](run)


def finetune_summarizer(run: StageRun) -> None:
    """Train the base on data/tokens/encoder_decoder/summarizer, save data/models/summarizer."""
    config, base = run.params.summarizer, run.paths.start_of("encoder_decoder")
    folder = run.paths.tokens("encoder_decoder") / "summarizer"
    rows, validation, test = (TextPairRows(folder, split) for split in ("train", "validation", "test"))
    model = load_model(base)
    if not isinstance(model, EncoderDecoder):
        raise InputError(f"{base}: a {type(model).__name__.lower()} cannot summarize; give an encoder-decoder's folder")
    refuse_other_vocabulary(run, "encoder_decoder", model.config.vocab_size, rows)
    config = fit_to_base(run, config, model, rows, config.base)
    measured = train_from_base(run, config, model, base, rows, sequence_to_sequence)
    generation = {"no_repeat_ngram_size": config.no_repeat_ngram_size}
    save_model(model, run.paths.summarizer, base, generation=generation)
    losses = {
        f"{name}_loss": measure_loss(model, part, sequence_to_sequence, config.micro_batch_size, TEST_ROWS)
        for name, part in (("validation", validation), ("test", test))
    }
    report(run, config, model, measured, run.paths.summarizer, losses)
