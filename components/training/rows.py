"""Rows that `prepare` wrote, corrupted for training: masked tokens, corrupted spans, token dropout.

BERT (arXiv 1810.04805) and T5 (arXiv 1910.10683). Corruption is a function of (seed, step, row): resume is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from components.config.model_settings import EncoderDecoderPretrainConfig
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

R = TypeVar("R", bound=VariableLengthRows)
Ids = npt.NDArray[np.int64]
Marks = npt.NDArray[np.bool_]

MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Of the chosen tokens: replaced by the mask, replaced by a random token; the rest stays as it is."""


class _CorruptedRows(Generic[R]):
    """Rows on disk, corrupted anew at each step."""

    def __init__(self, rows: R, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self.folder, self.seq_len, self.vocab_size = rows.folder, rows.seq_len, rows.vocab_size

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self, indices: Indices) -> Indices:
        return self.rows.lengths(indices)

    def _randoms(self, step: int, indices: Indices) -> list[np.random.Generator]:
        return [np.random.default_rng([self.seed, step, index]) for index in indices.tolist()]


class _EncoderRows(_CorruptedRows[R]):
    """Rows of the encoder, of which any token but padding, [CLS] and [SEP] may be masked."""

    def __init__(self, rows: R, tokenizer: TextTokenizer, seed: int) -> None:
        super().__init__(rows, seed)
        self._mask_id = tokenizer.id_of(MASK)
        self._unmaskable = [tokenizer.pad_id, tokenizer.id_of(CLS), tokenizer.id_of(SEP)]

    def _maskable(self, ids: Ids) -> Marks:
        return ~np.isin(ids, self._unmaskable)


class MaskedRows(_EncoderRows[SentencePairs | LabelledRows]):
    """Rows with masked tokens: what `masked_lm_next_sentence` reads.

    Labelled texts, on which an encoder's pretraining goes on, have no second segment, and lose their labels.
    """

    def __init__(
        self,
        rows: SentencePairs | LabelledRows,
        tokenizer: TextTokenizer,
        masked_share: float,
        seed: int,
        whole_words: bool = False,
    ) -> None:
        super().__init__(rows, tokenizer, seed)
        self.masked_share, self.whole_words = masked_share, whole_words
        self._regular = np.arange(tokenizer.regular.start, tokenizer.regular.stop, dtype=np.int64)

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """input_ids, labels, token_type_ids and attention_mask (B, T); next_sentence_labels (B,)."""
        batch = self.rows.batch(indices, step)
        ids, words = batch["input_ids"].numpy(), batch.pop("words", None)
        masked = [
            mask_tokens(
                ids[row],
                self._maskable(ids[row]),
                random,
                self._mask_id,
                self._regular,
                self.masked_share,
                words[row].numpy() if words is not None and self.whole_words else None,
            )
            for row, random in enumerate(self._randoms(step, indices))
        ]
        inputs, labels = (np.stack([pair[side] for pair in masked]) for side in (0, 1))
        unpaired = torch.full((len(indices),), IGNORED)
        return {"next_sentence_labels": unpaired} | batch | tensors({"input_ids": inputs, "labels": labels})


class TokenDropoutRows(_EncoderRows[LabelledRows]):
    """Labelled texts with a share of their tokens shown as [MASK], so that no single word is relied on."""

    def __init__(self, texts: LabelledRows, tokenizer: TextTokenizer, token_dropout: float, seed: int) -> None:
        super().__init__(texts, tokenizer, seed)
        self.token_dropout = token_dropout

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """The batch of `LabelledRows`, with token dropout."""
        batch = self.rows.batch(indices, step)
        if not self.token_dropout:
            return batch
        ids = batch["input_ids"].numpy()
        draws = np.stack([random.random(ids.shape[1]) for random in self._randoms(step, indices)])
        return batch | tensors(
            {"input_ids": np.where((draws < self.token_dropout) & self._maskable(ids), self._mask_id, ids)}
        )


class SpanRows(_CorruptedRows[Chunks]):
    """Running text with corrupted spans as sources, and the tokens of the spans as targets."""

    def __init__(
        self, chunks: Chunks, tokenizer: TextTokenizer, config: EncoderDecoderPretrainConfig, seed: int
    ) -> None:
        super().__init__(chunks, seed)
        self.config = config
        self._sentinels, self._end = tokenizer.sentinels, tokenizer.id_of("</s>")

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """The batch that `sequence_to_sequence` reads."""
        texts = (self.rows.ids(index) for index in indices.tolist())
        pairs = [self._corrupted(*each) for each in zip(texts, self._randoms(step, indices), strict=True)]
        sources, targets = ([np.array(pair[side], np.int64) for pair in pairs] for side in (0, 1))
        return seq2seq(sources, targets, self.rows.pad_id)

    def _corrupted(self, text: Ids, random: np.random.Generator) -> tuple[list[int], list[int]]:
        if len(text) < 2:
            return [*text.tolist(), self._end], [self._end]
        share, length = self.config.corrupted_share, self.config.span_length
        return corrupt_spans(text[: self.seq_len - 1], random, self._sentinels, self._end, share, length)


def mask_tokens(
    ids: Ids,
    maskable: Marks,
    random: np.random.Generator,
    mask_id: int,
    regular: Ids,
    share: float,
    words: Ids | None,
) -> tuple[Ids, Ids]:
    """Input ids (T,) and labels (T,), IGNORED where nothing is predicted (BERT, section 3.1, task 1).

    `share` of the `maskable` tokens (T,), at least one, is predicted: 80 % of them become `mask_id`, 10 % a random
    one of `regular` (R,), 10 % stay. With `words` (T,), the number of each token's word, whole words are chosen, as
    many as fit.
    """
    inputs, labels = ids.copy(), np.full_like(ids, IGNORED)
    positions = np.flatnonzero(maskable)
    if not len(positions):
        return inputs, labels
    count = max(1, round(len(positions) * share))
    chosen = random.permutation(positions)[:count] if words is None else _whole_words(positions, words, count, random)
    labels[chosen] = ids[chosen]
    draws = random.random(len(chosen))
    inputs[chosen[draws < MASKED_SHARE]] = mask_id
    replaced = chosen[(draws >= MASKED_SHARE) & (draws < MASKED_SHARE + RANDOM_SHARE)]
    inputs[replaced] = regular[random.integers(len(regular), size=len(replaced))]
    return inputs, labels


def _whole_words(positions: Ids, words: Ids, count: int, random: np.random.Generator) -> Ids:
    """At most `count` positions of words in random order; a word that does not fit is left out."""
    numbers = words[positions]
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 1))
    groups = np.split(positions, starts[1:])
    chosen: list[Ids] = []
    room = count
    for number in random.permutation(len(groups)):
        if len(groups[number]) <= room:
            chosen.append(groups[number])
            room -= len(groups[number])
        if not room:
            break
    return np.concatenate(chosen) if chosen else groups[int(random.integers(len(groups)))][:count]


def corrupt_spans(
    ids: Ids, random: np.random.Generator, sentinels: Sequence[int], end_id: int, share: float, mean_length: float
) -> tuple[list[int], list[int]]:
    """Source and target of ids (T,) (T5, section 3.1.4).

    About `share` of the tokens lie in spans of `mean_length` on average. Each span is one of the `sentinels` in the
    source; the target repeats each with its span. Both end with `end_id`. The lengths depend on T alone.
    """
    noise = min(max(round(len(ids) * share), 1), len(ids) - 1)
    spans = min(max(1, round(noise / mean_length)), noise, len(ids) - noise, len(sentinels))
    corrupted = _partition(noise, spans, random)
    intact = _partition(len(ids) - noise, spans, random)
    source: list[int] = []
    target: list[int] = []
    start = 0
    for sentinel, before, length in zip(sentinels, intact, corrupted, strict=False):
        source += [*ids[start : start + before].tolist(), sentinel]
        target += [sentinel, *ids[start + before : start + before + length].tolist()]
        start += before + length
    return [*source, end_id], [*target, end_id]


def _partition(total: int, parts: int, random: np.random.Generator) -> list[int]:
    """`total` as a sum of `parts` positive numbers, all such sums equally likely."""
    cuts = np.sort(random.choice(total - 1, parts - 1, replace=False)) + 1
    return [int(size) for size in np.diff(cuts, prepend=0, append=total)]
