"""Continuous batching: rows that come and go, each with keys and values in a slot of one cache.

A row's tokens do not depend on what else is in the batch, bit for bit on a CPU: every product has a multiple of
`EVEN_ROWS` rows, and then gives each row the same numbers, whichever part of a prompt it is read with. So a later
prompt with the same prefix takes keys and values over from the prefix cache; what was decoded token by token went
through other products (`decode_step.py`) and is prefilled again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from components.config.params import InputError
from components.inference.adapter_bank import bank_of
from components.inference.cache_plan import EVEN_ROWS, SEEN, plan_cache
from components.inference.decode_step import Step
from components.inference.packed_weights import rows_are_independent
from components.inference.picture_cache import PictureCache
from components.inference.prefix_cache import MIN_SHARED, Ids, PrefixCache, common
from components.inference.sampling import Constraint, greedy, mask_logits, random_stream, sampled
from components.inference.slot_cache import SlotCache
from components.media.pictures import Picture
from components.models.attention import SHORT
from components.models.decoder import Decoder
from components.models.vision import VisionLanguageModel

PREFILL_TOKENS = 512
"""Prompt tokens prefilled between two decode steps, padding included."""
PREFIX_BYTES = 1 << 30
"""Of the prefix cache: beyond what the cache itself takes of the memory."""


@dataclass(eq=False)
class Row:
    """One sequence of the batch: its request and its state."""

    prompt: Sequence[int]
    limit: int
    """Tokens to generate at most, at least one."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    constraint: Constraint | None = None
    adapter: int = 0
    """Its number in the batch's bank of adapters; 0 is the base alone."""
    pictures: Sequence[Picture] = ()
    """Those of the prompt's image tokens, in order."""
    ids: list[int] = field(init=False)
    """The prompt and the generated ids."""
    key: Ids = field(init=False)
    """The adapter and the prompt, as key of the prefix cache."""
    cached: int = 0
    """Positions whose keys and values are in the cache."""
    slot: int = -1
    finished: bool = False

    def __post_init__(self) -> None:
        self.ids, self.key = list(self.prompt), (self.adapter, *self.prompt)
        self._numbers = random_stream(self.seed) if self.temperature > 0 else None

    @property
    def generated(self) -> list[int]:
        return self.ids[len(self.prompt) :]

    @property
    def left(self) -> int:
        return self.limit - len(self.ids) + len(self.prompt)

    def number(self) -> float:
        """The row's next random number."""
        assert self._numbers is not None
        return float(self._numbers.random(dtype=np.float32))

    def take(self, token: int) -> None:
        """Append a token; sets `finished` where no other may follow."""
        self.ids.append(token)
        ended = token in self.stop_ids or self.left == 0
        if self.constraint is not None:
            self.constraint.advance(token)
            ended = ended or self.constraint.finished
        self.finished = ended


class ContinuousBatch:
    """Rows of one model: `admit` some, `prefill` their prompts, `decode` a token for each, `drop` who is done."""

    def __init__(self, model: Decoder, max_rows: int, max_context: int | None = None, sharers: int = 1) -> None:
        """At most `max_rows` rows of `max_context` tokens, fewer at once where memory is short (`plan_cache`).

        `sharers`: batches that share the device, this one among them.

        Raises: InputError when memory holds no row of `max_context` tokens.
        """
        self.model, self.device, self._dtype = model, model.embed.weight.device, model.embed.weight.dtype
        plan = plan_cache(model.config, self._dtype, self.device, max_rows, max_context, sharers=sharers)
        self.plan, self.context, self._bank = plan, plan.context_len, bank_of(model)
        self.count = count = plan.rows
        # Where the rows of a product do depend on how many there are, every step has all of them.
        alone = getattr(model.head, "dtype", None) == torch.float16 and rows_are_independent(model, 1)
        self._multiple = 1 if alone else EVEN_ROWS if rows_are_independent(model) else _up(count)
        self._cache = SlotCache(model, _up(count), self.context, plan.paged)
        self._step = Step(model, self._cache.whole, self._bank is None)
        self._prefix_tokens = min(plan.tokens, PREFIX_BYTES // plan.token_bytes)
        self._prefix_cache = PrefixCache(self._prefix_tokens)
        self.pictures = PictureCache(model) if isinstance(model, VisionLanguageModel) else None
        # Longer products of scores would go through another kernel.
        self._widest = max(EVEN_ROWS, min(PREFILL_TOKENS, SHORT // self.context) // EVEN_ROWS * EVEN_ROWS)
        self.prefilling: list[Row] = []
        """In adjoining slots behind those that are decoded."""
        self.decoding: list[Row] = []

    @property
    def free(self) -> int:
        return self.count - len(self.prefilling) - len(self.decoding)

    def group(self, waiting: Sequence[Row]) -> int:
        """How many of the first that wait are prefilled together: in one pass where they fit, else one alone.

        Those for whose last token there is no memory wait, and all behind them, until running rows have left.
        """
        running = [*self.prefilling, *self.decoding]
        reserved, size, longest = sum(map(self._reserved, running)), 0, 0
        for row in waiting[: self.free]:
            longest, reserved = max(longest, len(row.ids)), reserved + self._reserved(row)
            if size and _up(longest) * (size + 1) > PREFILL_TOKENS:
                break
            if (size or running) and reserved > self.plan.tokens:
                break
            size += 1
        return size

    def _reserved(self, row: Row) -> int:
        """Positions for which a row may take memory."""
        return min(_up(len(row.prompt) + row.limit, self._cache.block), self.context)

    def admit(self, rows: Sequence[Row]) -> None:
        """Give slots to rows, while none is prefilled, and what the prefix cache has of their prompts.

        Raises: InputError when a prompt is empty or leaves no room.
        """
        assert not self.prefilling
        assert len(rows) <= self.free
        self._compact()
        for row in rows:
            if not 0 < len(row.ids) <= self.context:
                raise InputError(f"prompt: {len(row.ids)} tokens; the model takes 1 to {self.context}")
            row.limit = min(row.limit, 1 + self.context - len(row.ids))
            row.slot = len(self.decoding) + len(self.prefilling)
            row.key = self._key(row)
            self._reuse_prefix(row)
            self.prefilling.append(row)

    @torch.inference_mode()
    def prefill(self) -> list[Row]:
        """Read on in the prompts that are prefilled; once all are read, each row gets its first token and is decoded.

        Returns the rows that got one.
        """
        if not (rows := self.prefilling):
            return []
        unread = [len(row.ids) - row.cached for row in rows]
        width = _up(min(max(unread), self._widest))
        is_last = max(unread) <= width
        seen = min(max(row.cached for row in rows) + width, self.context)
        tokens = np.zeros((len(rows), width), dtype=np.int64)
        # Every row keeps its last token for the last pass, whose stream its first new token comes from.
        counts = [min(width, count if is_last else count - 1) for count in unread]
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            tokens[index, :count] = row.ids[row.cached : row.cached + count]
            self._cache.hold(row.slot, row.cached + count)
        newest = [index * width + max(count - 1, 0) for index, count in enumerate(counts)]
        if self._bank is not None:
            self._bank.select([row.adapter for row in rows])
        hidden = self._pass(rows, tokens, counts, seen, newest)
        for row, count in zip(rows, counts, strict=True):
            row.cached += count
        if not is_last:
            return []
        self.prefilling, self.decoding = [], self.decoding + rows
        self._pick(rows, hidden)
        return rows

    @torch.inference_mode()
    def decode(self) -> list[Row]:
        """One more token for each row that is decoded; returns them."""
        if not (rows := self.decoding):
            return []
        self._compact()
        for row in rows:
            self._cache.hold(row.slot, row.cached + 1)
        padding = [0] * (_up(len(rows), self._multiple) - len(rows))
        tokens = np.array([row.ids[-1] for row in rows] + padding)
        positions = np.array([row.cached for row in rows] + padding)
        places = np.array([row.cached for row in rows] + [self.context for _ in padding])
        if self._bank is not None:
            self._bank.select([row.adapter for row in rows], self._multiple)
        hidden = self._step(tokens, positions, places, _up(int(positions.max()) + 1, SEEN), len(rows))
        for row in rows:
            row.cached += 1
        self._pick(rows, hidden)
        return rows

    def advance(self) -> list[Row]:
        """Prefill and decode once; returns the rows that are finished, which have left."""
        ended = []
        for act in (self.prefill, self.decode):
            for row in [row for row in act() if row.finished]:
                self.drop(row)
                ended.append(row)
        return ended

    def drop(self, row: Row) -> None:
        """Take a row out; its prompt goes to the prefix cache."""
        known = min(row.cached, len(row.prompt))
        if known >= MIN_SHARED:
            self._prefix_cache.keep(row.key[: known + 1], self._cache.whole[:, :, row.slot, :, :known])
        self._cache.release(row.slot)
        if row in self.decoding:
            self.decoding.remove(row)
            return
        index = self.prefilling.index(row)
        del self.prefilling[index]
        for other in self.prefilling[index:]:  # a pass reads adjoining slots
            self._move(other, other.slot - 1)

    def clear(self) -> None:
        """Take all rows out, and forget what was kept."""
        for row in [*self.prefilling, *self.decoding]:
            self._cache.release(row.slot)
        self.prefilling, self.decoding = [], []
        self._prefix_cache = PrefixCache(self._prefix_tokens)

    def _pass(self, rows: Sequence[Row], tokens: np.ndarray, counts: list[int], seen: int, newest: list[int]) -> Tensor:
        """Read the next tokens (B, T) of rows, `counts` of them real; the stream at `newest` and padding."""
        starts = [row.cached for row in rows]
        steps = torch.arange(tokens.shape[1], device=self.device)
        positions = torch.tensor(starts, device=self.device).unsqueeze(1) + steps
        real = steps < torch.tensor(counts, device=self.device).unsqueeze(1)
        seen = _up(seen, SEEN)
        self._cache.at(rows[0].slot, positions.where(real, self.context), seen)
        hidden = torch.arange(seen, device=self.device) > positions.unsqueeze(2)
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self.device)
        mask.masked_fill_(hidden, torch.finfo(self._dtype).min)
        newest = newest + newest[-1:] * (_up(len(newest)) - len(newest))
        return self.model.hidden(
            torch.from_numpy(tokens).to(self.device),
            position_ids=positions.clamp(max=self.context - 1),
            cache=self._cache,
            attention_mask=mask,
            rows=torch.tensor(newest, device=self.device),
            inputs_embeds=self.pictures.inputs(tokens, rows) if self.pictures is not None else None,
        )

    def _pick(self, rows: Sequence[Row], hidden: Tensor) -> None:
        """Give each row its next token."""
        logits = self.model.head(hidden)[: len(rows)].float()
        logits = mask_logits(logits, [row.constraint for row in rows], [row.left for row in rows])
        tokens = greedy(logits)
        warm = [index for index, row in enumerate(rows) if row.temperature > 0]
        if warm:
            drawing = [rows[index] for index in warm]
            settings = torch.tensor([[row.temperature, row.top_p, row.number()] for row in drawing], device=self.device)
            temperature, top_p, numbers = torch.split(settings, 1, dim=1)
            places = torch.tensor(warm, device=self.device)
            tokens[places] = sampled(logits[places], temperature, top_p, numbers)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.take(token)

    def shared(self, row: Row) -> int:
        """Tokens of a prompt whose keys and values are here, as of a moment ago: any thread may ask."""
        try:
            key = self._key(row)
        except InputError:  # which `admit` raises
            return 0
        return max([self._prefix_cache.shared(key), *(common(other.key, key) for other in tuple(self.decoding))])

    def _key(self, row: Row) -> Ids:
        return row.key if self.pictures is None else (row.adapter, *self.pictures.key(row.prompt, row.pictures))

    def _reuse_prefix(self, row: Row) -> None:
        """Copy the longest known prefix of a prompt; its last token is always prefilled, for what follows it."""
        length, part = self._prefix_cache.best(row.key)
        for other in self.decoding:
            if (shared := common(other.key, row.key)) > length:
                length, part = shared, self._cache.whole[:, :, other.slot]
        length = min(length - 1, len(row.ids) - 1)  # the key begins with the adapter
        if part is not None and length >= MIN_SHARED:
            self._cache.hold(row.slot, length)
            self._cache.whole[:, :, row.slot, :, :length] = part[:, :, :, :length]
            row.cached = length

    def _compact(self) -> None:
        """Move rows that are decoded into the first slots."""
        taken = {row.slot for row in self.decoding}
        gaps = [slot for slot in range(len(self.decoding)) if slot not in taken]
        for row in self.decoding:
            if row.slot >= len(self.decoding):
                self._move(row, gaps.pop())
        self.decoding.sort(key=lambda row: row.slot)

    def _move(self, row: Row, slot: int) -> None:
        self._cache.hold(slot, row.cached)
        self._cache.whole[:, :, slot, :, : row.cached] = self._cache.whole[:, :, row.slot, :, : row.cached]
        self._cache.release(row.slot)
        row.slot = slot


def generate(model: Decoder, rows: Sequence[Row], max_rows: int = 32, max_context: int | None = None) -> None:
    """Continue rows to their ends, at most `max_rows` at a time; what each gets depends on nothing but itself.

    Raises: InputError when a prompt is empty or leaves no room.
    """
    slots, waiting = ContinuousBatch(model, min(max_rows, max(1, len(rows))), max_context), deque(rows)
    while waiting or slots.free < slots.count:
        if not slots.prefilling:
            slots.admit([waiting.popleft() for _ in range(slots.group(list(waiting)[:max_rows]))])
        slots.advance()


def _up(count: int, multiple: int = EVEN_ROWS) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple
