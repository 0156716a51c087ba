"""How the next token of each row is chosen from its logits: constraint masks, greedy and nucleus sampling."""

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
    max_new_tokens: int
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    """Nucleus sampling: the most probable tokens that together reach this probability."""
    seed: int | None = None
    """The same seed gives the same tokens; None: random."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a row; the one that did is the row's last."""


class Constraint(Protocol):
    """The constraint of one row.

    From the row's first token on, `allowed` gives the mask of the next token and `advance` takes the chosen one.
    """

    @property
    def finished(self) -> bool:
        """No token may follow: the row ends here, whether or not its last token is a stop token."""

    @property
    def fallback_tokens(self) -> tuple[list[int], list[int]] | None:
        """Forbidden tokens, and the allowed tokens that get their probability; None: none."""

    def allowed(self, left: int) -> Allowed | None:
        """Mask of the tokens that may come next, at least one; None: all.

        `left` is the number of tokens the row may still get, the next one included: near its limit a constraint ends
        the text where possible.
        """

    def advance(self, token_id: int) -> None:
        """Consume the chosen token, one of those allowed."""


def mask_logits(logits: Tensor, constraints: Sequence[Constraint | None], left: Sequence[int]) -> Tensor:
    """The logits (B, vocab_size) with minus infinity where a row's constraint forbids a token.

    Logits beyond a constraint's vocabulary (a padded embedding) are forbidden too. The probability of the forbidden
    tokens that a constraint names is given to its fallback tokens, in proportion to theirs. Without masks the logits
    are returned unchanged.
    """
    masks = {
        row: mask
        for row, constraint in enumerate(constraints)
        if constraint is not None and (mask := constraint.allowed(left[row])) is not None
    }
    if not masks:
        return logits
    forbidden = torch.ones(len(masks), logits.shape[1], dtype=torch.bool)
    for index, mask in enumerate(masks.values()):
        forbidden[index, : len(mask)] = torch.from_numpy(~mask)
    rows = torch.tensor(list(masks), device=logits.device)
    masked = logits[rows].masked_fill_(forbidden.to(logits.device), -torch.inf)
    for index, row in enumerate(masks):
        constraint = constraints[row]
        if constraint is not None and (fallback_tokens := constraint.fallback_tokens) is not None:
            replaced, fallback = fallback_tokens
            masked[index, fallback] += logits[row, replaced + fallback].logsumexp(0) - logits[row, fallback].logsumexp(
                0
            )
    return logits.index_put((rows,), masked)


def greedy(logits: Tensor) -> Tensor:
    """The id of each row's largest logit (B, V) -> (B)."""
    if logits.is_cuda:
        return logits.argmax(-1)
    return torch.from_numpy(logits.numpy().argmax(-1))  # twenty times as fast as torch's on a CPU


def sampled(logits: Tensor, temperature: Tensor | float, top_p: Tensor | float, numbers: Tensor) -> Tensor:
    """The sampled id of each row (B, V) -> (B), by its random number in [0, 1).

    temperature and top_p are scalars or (B, 1); numbers (B, 1). A row's id depends on that row alone.
    """
    probabilities = (logits / temperature).softmax(-1)
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    reached = ordered.cumsum(-1)
    # A token is kept while those before it have less than top_p; the most probable one always is.
    nucleus = ordered * (reached - ordered < top_p)
    sums = nucleus.cumsum(-1)
    index = torch.searchsorted(sums, numbers * sums[:, -1:], right=True).clamp_(max=sums.shape[1] - 1)
    tokens: Tensor = ids.gather(1, index).squeeze(1)
    return tokens


def random_stream(seed: int | None) -> np.random.Generator:
    """The random numbers of one row, from its seed; without a seed, different each time."""
    return np.random.default_rng([secrets.randbits(64) if seed is None else seed % 2**64, 0])
