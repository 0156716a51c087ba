"""A classifier folder as a reader of texts: which label each has, and where it lies as a vector.

Texts are padded as little as may be: those of one forward pass have nearly the same length.
Shapes: B batch, T tokens, E embed_dim, L labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from components.config.params import InputError
from components.models.checkpoint import load_model
from components.models.devices import best_device
from components.models.encoder import Classifier, Encoder
from components.models.sentence_pooling import SentencePooling, read_pooling
from components.tokenization.text_tokenizer import read_tokenizer

TOKENS_A_PASS = 16_384
"""Padding included; more texts than that take several forward passes."""


@dataclass(frozen=True)
class LabelPrediction:
    """What a classifier says of one text."""

    label: str
    """The likeliest."""
    scores: dict[str, float]
    """Probability of every label, likeliest first."""
    truncated: bool
    """Whether the text was longer than the model reads, and only its beginning was read."""


@dataclass(frozen=True)
class TextEmbedding:
    """Where a text lies."""

    vector: list[float]
    """Of length 1, unless the model is of sentence-transformers and does not normalise."""
    tokens: int
    truncated: bool


class TextEncoder:
    """An encoder and its tokenizer: where texts lie."""

    def __init__(self, model: Encoder, tokenizer: Tokenizer, pooling: SentencePooling | None = None) -> None:
        """`pooling`: the mean over a text's tokens, brought to length 1, unless given."""
        self.model, self._tokenizer = model.eval(), tokenizer
        self.max_seq_len, self.embed_dim = model.config.max_seq_len, model.config.embed_dim
        self.pooling = pooling or SentencePooling()
        self._device = model.embed.weight.device
        _prepare(tokenizer, self.max_seq_len)
        self._embedding_tokenizer = tokenizer
        if (limit := self.pooling.max_seq_len or self.max_seq_len) < self.max_seq_len:
            self._embedding_tokenizer = Tokenizer.from_str(tokenizer.to_str())
            _prepare(self._embedding_tokenizer, limit)

    @classmethod
    def load(cls, folder: Path) -> TextEncoder:
        """Raises: InputError when the folder holds no encoder with its tokenizer."""
        model = load_model(folder, device=best_device())
        if not isinstance(model, Encoder):
            raise InputError(f"{folder}: a {type(model).__name__.lower()} is no encoder; give an encoder's folder")
        return cls(model, load_tokenizer(folder), read_pooling(folder))

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> list[TextEmbedding]:
        """The vector of each text: its tokens' of the last block, pooled as `pooling` says."""
        read = self._embedding_tokenizer.encode_batch_fast([self.pooling.text(text) for text in texts])
        found: list[TextEmbedding | None] = [None] * len(read)
        for rows, input_ids, segments, mask in self._passes(read):
            vectors = self.pooling.pool(self.model.hidden(input_ids, segments, mask), mask)
            for row, vector in zip(rows, vectors.tolist(), strict=True):
                found[row] = TextEmbedding(vector, len(read[row].ids), bool(read[row].overflowing))
        return [one for one in found if one is not None]

    def _passes(self, read: Sequence[Encoding]) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
        """Rows of nearly one length, their input_ids, token_type_ids and attention_mask (B, T) each."""
        order = sorted(range(len(read)), key=lambda row: len(read[row].ids))
        while order:
            rows = [order.pop()]
            longest = len(read[rows[0]].ids)
            while order and (len(rows) + 1) * longest <= TOKENS_A_PASS:
                rows.append(order.pop())
            ids = torch.full((len(rows), longest), self.model.config.pad_id or 0)
            segments, mask = torch.zeros_like(ids), torch.zeros_like(ids)
            for place, row in enumerate(rows):
                length = len(read[row].ids)
                ids[place, :length] = torch.tensor(read[row].ids)
                segments[place, :length] = torch.tensor(read[row].type_ids)
                mask[place, :length] = 1
            yield rows, ids.to(self._device), segments.to(self._device), mask.to(self._device)


class TextClassifier(TextEncoder):
    """A classifier and its tokenizer: which label texts have, beside where they lie."""

    model: Classifier

    def __init__(self, model: Classifier, tokenizer: Tokenizer, pooling: SentencePooling | None = None) -> None:
        super().__init__(model, tokenizer, pooling)
        self.labels = model.config.labels

    @classmethod
    def load(cls, folder: Path) -> TextClassifier:
        """Raises: InputError when the folder holds no classifier with its tokenizer."""
        model = load_model(folder, device=best_device())
        if not isinstance(model, Classifier):
            raise InputError(f"{folder}: a {type(model).__name__.lower()} has no labels; give a classifier's folder")
        return cls(model, load_tokenizer(folder), read_pooling(folder))

    @torch.inference_mode()
    def classify(self, texts: Sequence[str]) -> list[LabelPrediction]:
        """The label of each text, in order."""
        read = self._tokenizer.encode_batch_fast(list(texts))
        found: list[LabelPrediction | None] = [None] * len(read)
        for rows, input_ids, segments, mask in self._passes(read):
            scores = self.model.logits(input_ids, segments, mask).float().softmax(-1)
            ordered = scores.sort(stable=True, dim=-1, descending=True)
            for row, values, order in zip(rows, ordered.values.tolist(), ordered.indices.tolist(), strict=True):
                names = [self.labels[index] for index in order]
                found[row] = LabelPrediction(
                    names[0], dict(zip(names, values, strict=True)), bool(read[row].overflowing)
                )
        return [one for one in found if one is not None]


def _prepare(tokenizer: Tokenizer, max_seq_len: int) -> None:
    tokenizer.encode_special_tokens = True  # a text never turns into a special token
    tokenizer.enable_truncation(max_seq_len)
    tokenizer.no_padding()


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises: InputError when there is none.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path}: not found; a model folder has its tokenizer")
    return read_tokenizer(folder)[0]
