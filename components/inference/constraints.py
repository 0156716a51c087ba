"""Which tokens may come next: what a row of generated tokens is held to, whatever the weights say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Allowed = NDArray[np.bool_]
"""One entry per token of the vocabulary."""


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
