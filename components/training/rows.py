"""What is hidden of the rows that `prepare` wrote: a function of (seed, step, row), so that resume is exact."""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from components.config.model_settings import EncoderDecoderPretrainConfig, EncoderPretrainConfig
from components.token_rows.batches import IGNORED, Batch, Indices
from components.token_rows.variable_length import (
    Chunks,
    LabelledRows,
    SentencePairs,
    VariableLengthRows,
    seq2seq,
    tensors,
)
from components.tokenization.text_tokenizer import CLS, MASK, SEP, TextTokenizer
from components.training.corruption import corrupt_spans, mask_tokens

R = TypeVar("R", bound=VariableLengthRows)


class _Shown(Generic[R]):
    """Rows on disk, shown to a model in another way at each step."""

    def __init__(self, rows: R, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self.folder, self.seq_len, self.vocab_size = rows.folder, rows.seq_len, rows.vocab_size

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self, indices: Indices) -> Indices:
        return self.rows.lengths(indices)

    def _random(self, step: int, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, step, index])


class MaskedRows(_Shown[SentencePairs]):
    """Sentence pairs with masked tokens: what `masked_lm_next_sentence` reads."""

    def __init__(
        self, pairs: SentencePairs, tokenizer: TextTokenizer, config: EncoderPretrainConfig, seed: int
    ) -> None:
        super().__init__(pairs, seed)
        self.config = config
        self._hiding = TokenMasking(tokenizer)

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """input_ids, labels, token_type_ids and attention_mask (B, T); next_sentence_labels (B,)."""
        batch = dict(self.rows.batch(indices, step))
        words = batch.pop("words").numpy()
        whole = words if self.config.whole_words else None
        hidden = self._hiding.masked(
            batch["input_ids"].numpy(), whole, indices, step, self.config.masked_share, self.seed
        )
        return batch | tensors(hidden)


class AdaptedRows(_Shown[LabelledRows]):
    """Labelled texts with masked tokens and no second segment: pretraining goes on with them."""

    def __init__(self, texts: LabelledRows, tokenizer: TextTokenizer, masked_share: float, seed: int) -> None:
        super().__init__(texts, seed)
        self.masked_share = masked_share
        self._hiding = TokenMasking(tokenizer)

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """As that of `MaskedRows`."""
        batch = self.rows.batch(indices, step)
        hidden = self._hiding.masked(batch["input_ids"].numpy(), None, indices, step, self.masked_share, self.seed)
        return batch | tensors(hidden) | {"next_sentence_labels": torch.full((len(indices),), IGNORED)}


class TokenMasking:
    """Masks tokens of an encoder's rows."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._mask = tokenizer.id_of(MASK)
        self._fixed = [tokenizer.pad_id, tokenizer.id_of(CLS), tokenizer.id_of(SEP)]
        self._regular = np.arange(tokenizer.regular.start, tokenizer.regular.stop, dtype=np.int64)

    def masked(
        self,
        ids: npt.NDArray[np.int64],
        words: npt.NDArray[np.int64] | None,
        indices: Indices,
        step: int,
        masked_share: float,
        seed: int,
    ) -> dict[str, npt.NDArray[np.int64]]:
        """input_ids and labels (B, T) of ids (B, T)."""
        choosable = ~np.isin(ids, self._fixed)
        rows = [
            mask_tokens(
                ids[place],
                choosable[place],
                np.random.default_rng([seed, step, index]),
                self._mask,
                self._regular,
                masked_share,
                words[place] if words is not None else None,
            )
            for place, index in enumerate(indices.tolist())
        ]
        return {"input_ids": np.stack([shown for shown, _ in rows]), "labels": np.stack([labels for _, labels in rows])}

    def some(self, ids: npt.NDArray[np.int64], share: float, random: np.random.Generator) -> npt.NDArray[np.int64]:
        """ids (T,) with a share of its tokens shown as the mask."""
        hidden = (random.random(len(ids)) < share) & ~np.isin(ids, self._fixed)
        return np.where(hidden, self._mask, ids)


class SpanRows(_Shown[Chunks]):
    """Running text with corrupted spans as sources, and what was in them as targets."""

    def __init__(
        self, chunks: Chunks, tokenizer: TextTokenizer, config: EncoderDecoderPretrainConfig, seed: int
    ) -> None:
        super().__init__(chunks, seed)
        self.config = config
        self._sentinels, self._end = tokenizer.sentinels, tokenizer.id_of("</s>")

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """What `sequence_to_sequence` reads."""
        made = [self._corrupted(index, step) for index in indices.tolist()]
        sources, targets = ([np.array(pair[side], np.int64) for pair in made] for side in (0, 1))
        return seq2seq(sources, targets, self.rows.pad_id)

    def _corrupted(self, index: int, step: int) -> tuple[list[int], list[int]]:
        text = self.rows.ids(index)
        if len(text) < 2:
            return [*text.tolist(), self._end], [self._end]
        random = self._random(step, index)
        share, length = self.config.corrupted_share, self.config.span_length
        return corrupt_spans(text[: self.seq_len - 1], random, self._sentinels, self._end, share, length)


class TokenDropoutRows(_Shown[LabelledRows]):
    """Labelled texts with a share of their tokens shown as [MASK], so that no single word is relied on."""

    def __init__(self, texts: LabelledRows, tokenizer: TextTokenizer, share: float, seed: int) -> None:
        super().__init__(texts, seed)
        self.share = share
        self._hiding = TokenMasking(tokenizer)

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """As that of `LabelledRows`."""
        batch = self.rows.batch(indices, step)
        if not self.share:
            return batch
        randoms = [self._random(step, index) for index in indices.tolist()]
        ids = batch["input_ids"].numpy()
        rows = [self._hiding.some(row, self.share, random) for row, random in zip(ids, randoms, strict=True)]
        return batch | tensors({"input_ids": np.stack(rows)})
