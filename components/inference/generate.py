"""Token ids out of a decoder: a static batch whose finished rows leave, or one prompt streamed.

Rows are padded on the left, so that every row's newest token stands in the same slot of the
cache; what is padding is masked, and no row's tokens depend on the others in the batch.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from components.config.params import InputError
from components.inference.constraints import Constraint, mask_logits
from components.inference.sampling import drawn, likeliest, random_stream
from components.models.decoder import Decoder

PREFILL_TOKENS = 1024
"""Prompt tokens read in one pass, padding counted."""
CROWDED = 0.75
"""Share of unfinished rows under which the finished ones are worth copying the cache without them."""


@dataclass(frozen=True)
class Sampling:
    """How to pick tokens, and when to stop."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    seed: int | None = None
    """Same seed, same tokens; row i of a batch has a random stream of its own."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a row; the one that did is the row's last."""


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    constraints: Sequence[Constraint | None] | None = None,
) -> list[list[int]]:
    """What follows each prompt: at most `max_new_tokens`, or as many as the model's context has room for.

    Each row keeps to its constraint, where it has one, and ends where that is finished.

    Raises: InputError when a prompt is empty or longer than the context.
    """
    if not prompts or sampling.max_new_tokens < 1:
        return [[] for _ in prompts]
    batch = _Batch(model, prompts, sampling, constraints or [None] * len(prompts))
    while batch.unfinished:
        batch.step()
    return batch.generated


def stream(
    model: Decoder, prompt: Sequence[int], sampling: Sampling, constraint: Constraint | None = None
) -> Iterator[int]:
    """The tokens of `generate` for one prompt, each as soon as it is known."""
    if sampling.max_new_tokens < 1:
        return
    batch = _Batch(model, [prompt], sampling, [constraint])
    while batch.unfinished:
        batch.step()
        yield batch.generated[0][-1]


class _Batch:
    """Rows being continued: the cache, and the logits of each one's next token."""

    @torch.inference_mode()
    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        constraints: Sequence[Constraint | None],
    ) -> None:
        self.model, self.sampling, self.constraints = model, sampling, constraints
        self.device = model.embed.weight.device
        self.context = model.config.max_seq_len
        lengths = [len(prompt) for prompt in prompts]
        for length in lengths:
            if not 0 < length <= self.context:
                raise InputError(f"prompt: {length} tokens; the model takes 1 to {self.context}")
        self.generated: list[list[int]] = [[] for _ in prompts]
        self.rows = list(range(len(prompts)))
        self.unfinished = set(self.rows)
        self.limits = [min(sampling.max_new_tokens, 1 + self.context - length) for length in lengths]
        self.positions = torch.tensor(lengths, device=self.device)
        self.random = self._random(len(prompts))
        self.drawn = 0
        longest = max(lengths)
        self.cache = model.new_cache(len(prompts), longest + max(self.limits))
        padding = longest - self.positions
        slots = torch.arange(longest + max(self.limits), device=self.device)
        dtype = model.embed.weight.dtype
        self.bias = torch.zeros(len(prompts), len(slots), dtype=dtype, device=self.device)
        self.bias.masked_fill_(slots < padding.unsqueeze(1), torch.finfo(dtype).min)
        self.logits = self._prefill(prompts, longest)
        self.cache.advance(longest)

    def _prefill(self, prompts: Sequence[Sequence[int]], longest: int) -> Tensor:
        """Read all prompts, those of like length together, into the right end of their slots."""
        order = sorted(self.rows, key=lambda row: len(prompts[row]))
        logits = torch.empty(len(prompts), self.model.config.vocab_size, device=self.device)
        while order:
            width = len(prompts[order[-1]])
            count = max(1, PREFILL_TOKENS // width)
            order, chosen = order[:-count], order[-count:]
            ids = [[0] * (width - len(prompts[row])) + list(prompts[row]) for row in chosen]
            input_ids, rows = torch.tensor(ids, device=self.device), torch.tensor(chosen, device=self.device)
            mask = torch.arange(width, device=self.device) >= width - self.positions[rows].unsqueeze(1)
            positions = (mask.cumsum(1) - 1).clamp_(min=0)
            cache = self.model.new_cache(len(chosen), width)
            newest = torch.arange(1, len(chosen) + 1, device=self.device) * width - 1
            hidden = self.model.hidden(input_ids, position_ids=positions, cache=cache, attention_mask=mask, rows=newest)
            logits[rows] = self.model.head(hidden).float()
            for layer, part in zip(self.cache.layers, cache.layers, strict=True):
                layer.keys[rows, :, longest - width : longest] = part.keys
                layer.values[rows, :, longest - width : longest] = part.values
        return logits

    @torch.inference_mode()
    def step(self) -> None:
        """Add a token to each unfinished row."""
        if self.drawn:
            self._advance()
        self._constrain()
        self.tokens = self._pick()
        self.drawn += 1
        for row, token in zip(self.rows, self.tokens.tolist(), strict=True):
            if row not in self.unfinished:
                continue
            self.generated[row].append(token)
            constraint = self.constraints[row]
            if constraint is not None:
                constraint.advance(token)
            ended = token in self.sampling.stop_ids or (constraint is not None and constraint.finished)
            if ended or len(self.generated[row]) == self.limits[row]:
                self.unfinished.remove(row)
        if 0 < len(self.unfinished) <= CROWDED * len(self.rows):
            self._drop_finished()

    def _advance(self) -> None:
        """Read the newest tokens."""
        mask = self.bias[:, None, : self.cache.length + 1]
        positions = self.positions.clamp(max=self.context - 1).unsqueeze(1)  # finished rows may run over
        logits = self.model(self.tokens.unsqueeze(1), position_ids=positions, cache=self.cache, attention_mask=mask)
        self.logits = logits[:, -1].float()
        self.positions += 1

    def _constrain(self) -> None:
        """Forbid what the constraints of unfinished rows forbid."""
        constraints = [self.constraints[row] if row in self.unfinished else None for row in self.rows]
        left = [self.limits[row] - len(self.generated[row]) for row in self.rows]
        self.logits = mask_logits(self.logits, constraints, left)

    def _pick(self) -> Tensor:
        if self.random is None:
            return likeliest(self.logits)
        numbers = self.random[:, self.drawn, None]
        return drawn(self.logits, self.sampling.temperature, self.sampling.top_p, numbers)

    def _random(self, rows: int) -> Tensor | None:
        """A number in [0, 1) for each token that each row may get."""
        if self.sampling.temperature <= 0:
            return None
        seed = secrets.randbits(64) if self.sampling.seed is None else self.sampling.seed
        streams = [random_stream(seed, row) for row in range(rows)]
        count = max(self.limits)
        return torch.from_numpy(np.stack([each.random(count, dtype=np.float32) for each in streams])).to(self.device)

    def _drop_finished(self) -> None:
        alive = [place for place, row in enumerate(self.rows) if row in self.unfinished]
        self.rows = [self.rows[place] for place in alive]
        kept = torch.tensor(alive, device=self.device)
        self.cache.keep(kept)
        self.bias, self.positions, self.tokens = self.bias[kept], self.positions[kept], self.tokens[kept]
        self.random = self.random[kept] if self.random is not None else None
