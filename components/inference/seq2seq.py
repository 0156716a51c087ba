"""Sequence-to-sequence generation with an encoder-decoder: greedy, or beam search (Wu et al. 2016, section 7).

A target's score is the sum of its tokens' log-probabilities, its end included, divided by its number of tokens to the
power `length_penalty`; a search ends when no running beam can score better than the worst finished target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from components.config.params import InputError
from components.models.encoder_decoder import EncoderDecoder

SOURCE_TOKENS = 8192
"""Source tokens of one batch, padding and beams included."""


@dataclass(frozen=True)
class Search:
    max_new_tokens: int
    """Tokens of a target at most, end token included."""
    end_id: int
    """Token that ends a target; not returned."""
    beams: int = 1
    """Number of beams; 1: greedy."""
    length_penalty: float = 1.0
    """Exponent of the length: 1 compares mean log-probabilities, 0 favours short targets."""
    no_repeat_ngram_size: int = 0
    """Size of the n-grams that a target may have only once (arXiv 1705.04304, section 2.5); 0: no limit."""


@dataclass(frozen=True)
class Target:
    ids: list[int]
    score: float
    """Sum of log-probabilities over length ** length_penalty."""
    ended: bool
    """False when the limit ended it."""


def generate_targets(model: EncoderDecoder, sources: Sequence[Sequence[int]], search: Search) -> list[Target]:
    """The best target for each source, in order; sources of similar length share a batch.

    Raises: InputError when a source is empty.
    """
    empty = next((number for number, source in enumerate(sources) if not source), None)
    if empty is not None:
        raise InputError(f"source {empty}: 0 tokens; send text")
    targets: list[Target | None] = [None] * len(sources)
    for numbers in _batches(sources, search.beams):
        best = _Beams(model, [sources[number] for number in numbers], search).run()
        for number, target in zip(numbers, best, strict=True):
            targets[number] = target
    return [target for target in targets if target is not None]


def _batches(sources: Sequence[Sequence[int]], beams: int) -> Iterator[list[int]]:
    order = sorted(range(len(sources)), key=lambda number: len(sources[number]))
    while order:
        count = max(1, SOURCE_TOKENS // (len(sources[order[-1]]) * beams))
        order, numbers = order[:-count], order[-count:]
        yield numbers


class _Beams:
    """The running beams of a batch: B sources with K beams each, B * K rows."""

    @torch.inference_mode()
    def __init__(self, model: EncoderDecoder, sources: Sequence[Sequence[int]], search: Search) -> None:
        self.model, self.search = model, search
        device = model.embed.weight.device
        width = max(map(len, sources))
        ids = torch.tensor([[*source, *[0] * (width - len(source))] for source in sources], device=device)
        lengths = torch.tensor([len(source) for source in sources], device=device)
        mask = torch.arange(width, device=device) < lengths.unsqueeze(1)
        beams = search.beams
        self.context = model.encode(ids, mask).repeat_interleave(beams, 0)
        self.mask = mask.repeat_interleave(beams, 0)
        self.cache = model.new_cache(len(sources) * beams, search.max_new_tokens)
        self.newest = torch.full((len(sources) * beams, 1), model.config.start_id, device=device)
        # All beams of a source start equal: only the first may be extended.
        self.sums = torch.full((len(sources), beams), -torch.inf, device=device)
        self.sums[:, 0] = 0.0
        self.written: list[list[int]] = [[] for _ in range(len(sources) * beams)]
        self.finished: list[list[Target]] = [[] for _ in sources]
        self.done = [False] * len(sources)
        self.active = list(range(len(sources)))
        """The source of each row of a greedy search."""

    @torch.inference_mode()
    def run(self) -> list[Target]:
        step = self._greedy if self.search.beams == 1 else self._branch
        for length in range(1, self.search.max_new_tokens + 1):
            hidden = self.model.decode(self.newest, self.context, self.mask, self.cache)
            step(self._unrepeated(self.model.head(hidden[:, -1]).float().log_softmax(-1)), length)
            if all(self.done):
                break
        return [self._best(source) for source in range(len(self.finished))]

    def _unrepeated(self, chances: Tensor) -> Tensor:
        """Log-probabilities with minus infinity for tokens that would repeat an n-gram of their row."""
        if size := self.search.no_repeat_ngram_size:
            start = self.model.config.start_id  # part of the n-grams, as in transformers
            for row, source in enumerate(self.active if self.search.beams == 1 else range(len(self.written))):
                if repeats := _repeats([start, *self.written[source]], size):
                    chances[row, repeats] = -torch.inf
        return chances

    def _greedy(self, chances: Tensor, length: int) -> None:
        best, ids = chances.max(-1)
        self.sums[self.active, 0] += best
        self.newest = ids.unsqueeze(1)
        for source, token in zip(self.active, ids.tolist(), strict=True):
            if self.done[source]:
                continue
            if token == self.search.end_id:
                self._keep(source, source, float(self.sums[source, 0]), length)
                self.done[source] = True
            else:
                self.written[source].append(token)

        left = [row for row, source in enumerate(self.active) if not self.done[source]]
        if 0 < len(left) <= len(self.active) // 2:  # copies the cache, so not for each finished row
            self._narrow(left)

    def _narrow(self, left: list[int]) -> None:
        rows = torch.tensor(left, device=self.newest.device)
        self.cache.keep(rows)
        self.context, self.mask, self.newest = self.context[rows], self.mask[rows], self.newest[rows]
        self.active = [self.active[row] for row in left]

    def _branch(self, chances: Tensor, length: int) -> None:
        """Extend the best K continuations without an end token; finish those with one among the best K."""
        beams, vocab_size = self.search.beams, chances.shape[1]
        sums = (self.sums.view(-1, 1) + chances).view(len(self.finished), -1)
        best, places = sums.topk(min(2 * beams, sums.shape[1]), -1)  # each beam has one end: K continue
        rows, tokens = places // vocab_size, places % vocab_size
        chosen: list[tuple[int, int, float]] = []
        for source, candidates in enumerate(zip(best.tolist(), rows.tolist(), tokens.tolist(), strict=True)):
            continued: list[tuple[int, int, float]] = []
            for rank, (total, beam, token) in enumerate(zip(*candidates, strict=True)):
                row = source * beams + beam
                if token != self.search.end_id:
                    continued.append((row, token, total))
                elif rank < beams and not self.done[source] and total > -torch.inf:
                    self._keep(source, row, total, length)
            continued = continued[:beams]
            self.done[source] = self.done[source] or self._is_done(source, continued[0][2], length)
            chosen += continued
        self.written = [[*self.written[row], token] for row, token, _ in chosen]
        device = chances.device
        self.cache.keep(torch.tensor([row for row, _, _ in chosen], device=device))
        self.newest = torch.tensor([[token] for _, token, _ in chosen], device=device)
        self.sums = torch.tensor([total for _, _, total in chosen], device=device).view(-1, beams)

    def _keep(self, source: int, row: int, total: float, length: int) -> None:
        target = Target(list(self.written[row]), self._score(total, length), True)
        best = sorted([*self.finished[source], target], key=lambda each: -each.score)
        self.finished[source] = best[: self.search.beams]

    def _is_done(self, source: int, total: float, length: int) -> bool:
        """Whether K targets are finished, and the best running beam scores no better than the worst of them."""
        finished = self.finished[source]
        return len(finished) == self.search.beams and finished[-1].score >= self._score(total, length)

    def _best(self, source: int) -> Target:
        """The best finished target, or a better one that the limit ended."""
        row, running = source * self.search.beams, float(self.sums[source, 0])
        length = len(self.written[row])
        cut = Target(self.written[row], self._score(running, max(1, length)), False)
        best = self.finished[source][:1]
        if self.done[source]:
            return best[0]
        return max([*best, cut], key=lambda target: target.score)

    def _score(self, total: float, length: int) -> float:
        return float(total / length**self.search.length_penalty)


def _repeats(written: Sequence[int], size: int) -> list[int]:
    """The tokens that would complete an n-gram of `size` tokens a second time."""
    last = written[len(written) - size + 1 :]
    starts = range(len(written) - size + 1)
    return [written[start + size - 1] for start in starts if written[start : start + size - 1] == last]
