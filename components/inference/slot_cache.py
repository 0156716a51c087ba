"""The key-value cache of continuous batching: a slot for each row, whose memory follows the tokens in it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from components.inference.cache_plan import SEEN
from components.inference.device_memory import DeviceMemory, paging_driver
from components.inference.paged_memory import PagedMemory, page_positions
from components.models.attention import KVCache, LayerCache
from components.models.decoder import Decoder

KEPT_BYTES = 1 << 28
"""Of a whole cache that keeps its memory: in a small model, giving pages back and taking them anew costs 1 to 4 %."""


class _Layer(LayerCache):
    """One layer's keys and values, as `components.models.attention` extends them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values  # (slots, K, span, D)
        self._flat = flat(keys), flat(values)
        self._pass: tuple[slice, Tensor, int] | None = None

    def at(self, slots: slice, index: Tensor, span: int) -> None:
        """Prepare for one pass: which slots, which flat places are written, how many positions are seen."""
        self._pass = slots, index, span

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, K, T, D) to their places; the slots' first positions (B, K, S, D)."""
        assert self._pass is not None
        slots, index, span = self._pass
        for whole, new in zip(self._flat, (keys, values), strict=True):
            whole.index_copy_(0, index, new.reshape(-1, new.shape[-1]))
        return self.keys[slots, :, :span], self.values[slots, :, :span]


class SlotCache(KVCache):
    """Keys and values (layers, 2, slots, K, span, D); padding is written behind the context's end of the first slot.

    A slot is a range of addresses. On a CPU it takes memory as its positions are written, until it is released. On a
    CUDA device they are to be held first, and a position's keys and values of all layers lie side by side: pages are
    large there.
    """

    def __init__(self, model: Decoder, slots: int, context_len: int, paged: bool) -> None:
        """`paged`: as `plan_cache` says; else the cache is allocated whole. Raises: InputError, DriverError."""
        c, weight = model.config, model.embed.weight
        self.length = 0  # not one for all rows: positions and masks are given with each pass
        self.context_len = context_len
        self._memory: PagedMemory | None = None
        self._device_memory: DeviceMemory | None = None
        size = weight.element_size()
        token_bytes = c.num_layers * 2 * c.num_kv_heads * c.head_dim * size
        driver = paging_driver(weight.device) if paged else None
        self.block = SEEN
        """Positions of a slot that take memory together."""
        if driver is not None:
            page = driver.granularity()
            self.block, span = -(-page // token_bytes), _up(context_len + SEEN, page // math.gcd(page, token_bytes))
            spare = range(context_len * token_bytes, (context_len + 1) * token_bytes)
            memory = DeviceMemory(driver, weight.device, slots, span * token_bytes, spare)
            shape = (slots, span, c.num_layers, 2, c.num_kv_heads, c.head_dim)
            self._device_memory, self._token_bytes = memory, token_bytes
            whole = memory.tensor(weight.dtype).view(shape).permute(2, 3, 0, 4, 1, 5)
            self.whole = whole[:, :, :, :, : _up(context_len + 1, SEEN)]
        else:
            if on_cpu := weight.device.type == "cpu":
                self.block = math.lcm(SEEN, page_positions(c.head_dim * size))
            shape = (c.num_layers, 2, slots, c.num_kv_heads, _up(context_len + 1, self.block), c.head_dim)
            if on_cpu:
                self._memory = PagedMemory(math.prod(shape) * size)
                self.whole = self._memory.tensor(weight.dtype).view(shape)
            else:
                self.whole = weight.new_zeros(shape)
        self.passes = [_Layer(layer[0], layer[1]) for layer in self.whole]
        self.layers = list[LayerCache](self.passes)
        self._heads = torch.arange(c.num_kv_heads, device=weight.device)

    def at(self, first: int, places: Tensor, seen: int) -> None:
        """Prepare for a pass over slots from `first` on: it writes to places (B, T) and sees `seen` positions."""
        slot, head, position = row_strides(self.whole[0, 0])
        slots = torch.arange(first, first + places.shape[0], device=places.device)
        heads = self._heads * head
        rows = slots.unsqueeze(1) * slot + heads  # (B, K)
        places = places.unsqueeze(1)  # (B, 1, T)
        rows = rows.unsqueeze(2).where(places < self.context_len, heads.unsqueeze(1))
        index = (rows + places * position).flatten()  # (B, K, T)
        for layer in self.passes:
            layer.at(slice(first, first + places.shape[0]), index, seen)

    def advance(self, count: int) -> None:
        """Rows count their own positions."""

    def hold(self, slot: int, positions: int) -> None:
        """Let the first positions of a slot have memory, before they are written; on a CPU the system sees to it."""
        if self._device_memory is not None:
            self._device_memory.hold(slot, positions * self._token_bytes)

    def release(self, slot: int) -> None:
        """Give the memory of a slot back, whose keys and values are lost; a cache of at most KEPT_BYTES keeps it."""
        if self.whole.nbytes <= KEPT_BYTES:
            return
        if self._device_memory is not None:
            self._device_memory.release(slot)
        elif self._memory is not None:
            part = self.whole[0, 0, 0].nbytes
            for number in range(2 * len(self.whole)):
                self._memory.release((number * self.whole.shape[2] + slot) * part, part)


def flat(part: Tensor) -> Tensor:
    """The vectors (N, D) from a part's first to its last, by whose numbers `row_strides` counts."""
    last = sum((size - 1) * stride for size, stride in zip(part.shape[:-1], part.stride()[:-1], strict=True))
    width = part.shape[-1]
    return part.as_strided((last // width + 1, width), (width, 1))


def row_strides(part: Tensor) -> list[int]:
    """How many vectors of D each dimension but the last steps over."""
    return [stride // part.shape[-1] for stride in part.stride()[:-1]]


def _up(count: int, multiple: int) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple
