"""Choosing tokens from logits: constraints that mask them, greedy decoding and seeded nucleus (top-p) sampling."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Allowed = NDArray[np.bool_]
"""One entry per token of the vocabulary."""


@dataclass(frozen=True)
class Sampling:
    """How to pick tokens, and when to stop."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    seed: int | None = None
    """Same seed, same tokens."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a row; the one that did is the row's last."""


class Constraint(Protocol):
    """One row's rules, told each token that the row was given.

    Whoever picks asks `allowed`, picks one of those and tells it by `advance`, from the first token of the row on.
    """

    @property
    def finished(self) -> bool:
        """Nothing may follow: the row ends here, whether or not its last token is a stop token."""

    @property
    def fallback_tokens(self) -> tuple[list[int], list[int]] | None:
        """Tokens that are forbidden, and the allowed ones that a wish for any of them is taken for."""

    def allowed(self, left: int) -> Allowed | None:
        """The tokens that may come next, at least one; None: all may.

        `left` is how many tokens the row may still get, the next one counted: near the end a constraint closes what it
        began, where that is possible.
        """

    def advance(self, token_id: int) -> None:
        """Take the token that was picked, one of those allowed."""


def mask_logits(logits: Tensor, constraints: Sequence[Constraint | None], left: Sequence[int]) -> Tensor:
    """The logits `(rows, vocab_size)` with minus infinity for what each row's constraint forbids.

    Logits beyond a constraint's vocabulary (a padded embedding) are forbidden too. What the model would give to some of
    the forbidden goes to what a constraint names instead, whose odds among themselves stay as they are.
    Without a constraint that forbids anything the logits come back as they are.
    """
    masks = {
        row: mask
        for row, constraint in enumerate(constraints)
        if constraint is not None and (mask := constraint.allowed(left[row])) is not None
    }
    if not masks:
        return logits
    forbidden = torch.ones(len(masks), logits.shape[1], dtype=torch.bool)
    for place, mask in enumerate(masks.values()):
        forbidden[place, : len(mask)] = torch.from_numpy(~mask)
    rows = torch.tensor(list(masks), device=logits.device)
    masked = logits[rows].masked_fill_(forbidden.to(logits.device), -torch.inf)
    for place, row in enumerate(masks):
        constraint = constraints[row]
        if constraint is not None and (fallback_tokens := constraint.fallback_tokens) is not None:
            wished, given = fallback_tokens
            odds = logits[row, wished + given].logsumexp(0) - logits[row, given].logsumexp(0)
            masked[place, given] += odds
    return logits.index_put((rows,), masked)


def greedy(logits: Tensor) -> Tensor:
    """The id of each row's largest logit (B, V) -> (B)."""
    if logits.is_cuda:
        return logits.argmax(-1)
    return torch.from_numpy(logits.numpy().argmax(-1))  # twenty times as fast as torch's on a CPU


def sampled(logits: Tensor, temperature: Tensor | float, top_p: Tensor | float, numbers: Tensor) -> Tensor:
    """An id of each row (B, V) -> (B), drawn with its number in [0, 1).

    temperature and top_p are the same for all rows, or (B, 1); numbers (B, 1). A row's id depends on that row alone.
    """
    probabilities = (logits / temperature).softmax(-1)
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    reached = ordered.cumsum(-1)
    # A token stays while those before it have less than top_p; the likeliest always does.
    kept = ordered * (reached - ordered < top_p)
    sums = kept.cumsum(-1)
    place = torch.searchsorted(sums, numbers * sums[:, -1:], right=True).clamp_(max=sums.shape[1] - 1)
    tokens: Tensor = ids.gather(1, place).squeeze(1)
    return tokens


def random_stream(seed: int | None) -> np.random.Generator:
    """The numbers of one row: the same seed, the same numbers; without a seed, new ones each time."""
    return np.random.default_rng([secrets.randbits(64) if seed is None else seed % 2**64, 0])
