"""Stage: pretrain a model of each family from scratch, on documents.

The decoder by causal language modelling, the encoder by masked language modelling and next-sentence prediction, the
encoder-decoder by span corruption.
"""

from __future__ import annotations

from pathlib import Path

import torch

from components.config.model_settings import TrainConfig
from components.models.checkpoint import save_model
from components.models.decoder import Decoder, DecoderConfig
from components.models.devices import configure_cpu
from components.models.encoder import EncoderConfig, EncoderForPretraining
from components.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from components.runtime.stage import StageRun
from components.token_rows.batches import Rows, TokenRows
from components.token_rows.variable_length import Chunks, SentencePairs
from components.tokenization.text_tokenizer import TextTokenizer
from components.training.distributed import join
from components.training.loop import measure_loss, refuse_bad_masks, train
from components.training.objectives import M, Objective, causal_lm, masked_lm_next_sentence, sequence_to_sequence
from components.training.report import TEST_ROWS, describe, report
from components.training.rows import MaskedRows, SpanRows


def pretrain(run: StageRun) -> None:
    """Train on data/tokens/FAMILY/pretrain, save data/models/base/FAMILY.

    Raises: InputError when there is nothing to learn, or when saving fails.
    """
    configure_cpu()
    join()
    {"decoder": _decoder, "encoder": _encoder, "encoder_decoder": _encoder_decoder}[run.family](run)


def _decoder(run: StageRun) -> None:
    rows, test = (TokenRows(_folder(run), split) for split in ("train", "test"))
    refuse_bad_masks(rows, tuning=False)
    torch.manual_seed(run.params.seed)
    config = DecoderConfig.from_params(run.params.model.decoder, rows.vocab_size)
    _train(run, run.params.pretrain.decoder, Decoder(config), config.max_seq_len, (rows, test), causal_lm)


def _encoder(run: StageRun) -> None:
    config, seed = run.params.pretrain.encoder, run.params.seed
    tokenizer = TextTokenizer.load(run.paths.tokenizer(run.family))
    rows, test = (
        MaskedRows(SentencePairs(_folder(run), split), tokenizer, config.masked_share, seed, config.whole_words)
        for split in ("train", "test")
    )
    torch.manual_seed(seed)
    shape = EncoderConfig.from_params(run.params.model.encoder, rows.vocab_size)
    _train(run, config, EncoderForPretraining(shape), shape.max_seq_len, (rows, test), masked_lm_next_sentence)


def _encoder_decoder(run: StageRun) -> None:
    config, seed = run.params.pretrain.encoder_decoder, run.params.seed
    tokenizer = TextTokenizer.load(run.paths.tokenizer(run.family))
    rows, test = (SpanRows(Chunks(_folder(run), split), tokenizer, config, seed) for split in ("train", "test"))
    torch.manual_seed(seed)
    shape = EncoderDecoderConfig.from_params(run.params.model.encoder_decoder, rows.vocab_size, tokenizer.pad_id)
    _train(run, config, EncoderDecoder(shape), shape.max_seq_len, (rows, test), sequence_to_sequence)


def _folder(run: StageRun) -> Path:
    return run.paths.tokens(run.family) / "pretrain"


def _train(
    run: StageRun, config: TrainConfig, model: M, max_seq_len: int, splits: tuple[Rows, Rows], objective: Objective[M]
) -> None:
    """Train on the first split, save, and measure on the second."""
    rows, test = splits
    describe(run, model, max_seq_len, rows)
    measured = train(run, config, model, rows, objective)
    base = run.paths.base(run.family)
    save_model(model, base, run.paths.tokenizer(run.family))
    test_loss = measure_loss(model, test, objective, config.micro_batch_size, TEST_ROWS)
    report(run, config, model, measured, base, {"test_loss": test_loss})
