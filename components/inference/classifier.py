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
    """A unit vector."""
    tokens: int
    truncated: bool


class TextEncoder:
    """An encoder and its tokenizer: embeds texts."""

    kind: type[Encoder] = Encoder
    mismatch = "is no encoder; give an encoder's folder"

    def __init__(self, model: Encoder, tokenizer: Tokenizer) -> None:
        self.model, self._tokenizer = model.eval(), tokenizer
        self.max_seq_len, self.embed_dim = model.config.max_seq_len, model.config.embed_dim
        self._device = model.embed.weight.device
        tokenizer.encode_special_tokens = True  # special tokens in a text are plain text
        tokenizer.enable_truncation(self.max_seq_len)
        tokenizer.no_padding()

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises: InputError when the folder holds no model of this kind with its tokenizer."""
        model = load_model(folder, device=best_device())
        if not isinstance(model, cls.kind):
            raise InputError(f"{folder}: a {type(model).__name__.lower()} {cls.mismatch}")
        return cls(model, load_tokenizer(folder))

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> list[TextEmbedding]:
        """The embedding of each text: the mean of its tokens' last hidden states, normalized to length 1."""
        encoded = self._tokenizer.encode_batch_fast(list(texts))
        embeddings: dict[int, TextEmbedding] = {}
        for rows, input_ids, segments, mask in self._passes(encoded):
            vectors = mean_pooled(self.model.hidden(input_ids, segments, mask), mask)
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
            ids = torch.zeros(len(rows), longest, dtype=torch.long)
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

    def __init__(self, model: Classifier, tokenizer: Tokenizer) -> None:
        super().__init__(model, tokenizer)
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


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Unit vectors (B, E): means of hidden (B, T, E) where mask (B, T) is not 0."""
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden.float() * weight).sum(1) / weight.sum(1).clamp(min=1), dim=-1)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises: InputError when there is none.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path}: not found; a model folder has its tokenizer")
    return read_tokenizer(folder)[0]
