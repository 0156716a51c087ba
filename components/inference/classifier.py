"""Text classifiers and encoders of a model folder: labels and embeddings of texts.

Texts of similar length share a forward pass, which keeps padding low.
Shapes: B batch, T tokens, E embed_dim, L labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

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
"""Tokens of one forward pass, padding included."""


@dataclass(frozen=True)
class LabelPrediction:
    """A classifier's prediction for one text."""

    label: str
    """The most probable."""
    scores: dict[str, float]
    """Probability of every label, in descending order."""
    truncated: bool
    """Whether the text was longer than the model's context, and cut."""


@dataclass(frozen=True)
class TextEmbedding:
    vector: list[float]
    """A unit vector, unless the pooling of a sentence-transformers folder does not normalize."""
    tokens: int
    truncated: bool


class TextEncoder:
    """An encoder and its tokenizer: embeds texts."""

    kind: type[Encoder] = Encoder
    mismatch = "is no encoder; give an encoder's folder"

    def __init__(self, model: Encoder, tokenizer: Tokenizer, pooling: SentencePooling | None = None) -> None:
        """`pooling`: by default the mean over a text's tokens, normalized to length 1."""
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
    def load(cls, folder: Path) -> Self:
        """Raises: InputError when the folder holds no model of this kind with its tokenizer."""
        model = load_model(folder, device=best_device())
        if not isinstance(model, cls.kind):
            raise InputError(f"{folder}: a {type(model).__name__.lower()} {cls.mismatch}")
        return cls(model, load_tokenizer(folder), read_pooling(folder))

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> list[TextEmbedding]:
        """The embedding of each text: its tokens' last hidden states, pooled as `pooling` says."""
        encoded = self._embedding_tokenizer.encode_batch_fast([self.pooling.text(text) for text in texts])
        embeddings: dict[int, TextEmbedding] = {}
        for rows, input_ids, segments, mask in self._passes(encoded):
            vectors = self.pooling.pool(self.model.hidden(input_ids, segments, mask), mask)
            for row, vector in zip(rows, vectors.tolist(), strict=True):
                embeddings[row] = TextEmbedding(vector, len(encoded[row].ids), bool(encoded[row].overflowing))
        return [embeddings[row] for row in range(len(encoded))]

    def _passes(self, encoded: Sequence[Encoding]) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
        """Rows of similar length, with their input_ids, token_type_ids and attention_mask (B, T)."""
        order = sorted(range(len(encoded)), key=lambda row: len(encoded[row].ids))
        while order:
            rows = [order.pop()]
            longest = len(encoded[rows[0]].ids)
            while order and (len(rows) + 1) * longest <= TOKENS_A_PASS:
                rows.append(order.pop())
            ids = torch.full((len(rows), longest), self.model.config.pad_id or 0)
            segments, mask = torch.zeros_like(ids), torch.zeros_like(ids)
            for index, row in enumerate(rows):
                length = len(encoded[row].ids)
                ids[index, :length] = torch.tensor(encoded[row].ids)
                segments[index, :length] = torch.tensor(encoded[row].type_ids)
                mask[index, :length] = 1
            yield rows, ids.to(self._device), segments.to(self._device), mask.to(self._device)


class TextClassifier(TextEncoder):
    """A classifier and its tokenizer: labels and embeds texts."""

    kind = Classifier
    mismatch = "has no labels; give a classifier's folder"
    model: Classifier

    def __init__(self, model: Classifier, tokenizer: Tokenizer, pooling: SentencePooling | None = None) -> None:
        super().__init__(model, tokenizer, pooling)
        self.labels = model.config.labels

    @torch.inference_mode()
    def classify(self, texts: Sequence[str]) -> list[LabelPrediction]:
        encoded = self._tokenizer.encode_batch_fast(list(texts))
        predictions: dict[int, LabelPrediction] = {}
        for rows, input_ids, segments, mask in self._passes(encoded):
            scores = self.model.logits(input_ids, segments, mask).float().softmax(-1)
            ordered = scores.sort(stable=True, dim=-1, descending=True)
            for row, values, order in zip(rows, ordered.values.tolist(), ordered.indices.tolist(), strict=True):
                names = [self.labels[index] for index in order]
                scores_by_label = dict(zip(names, values, strict=True))
                predictions[row] = LabelPrediction(names[0], scores_by_label, bool(encoded[row].overflowing))
        return [predictions[row] for row in range(len(encoded))]


def _prepare(tokenizer: Tokenizer, max_seq_len: int) -> None:
    tokenizer.encode_special_tokens = True  # special tokens in a text are plain text
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
