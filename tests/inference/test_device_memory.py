"""Paged memory of a CUDA device, with a stand-in for its driver over this machine's memory.

Addresses are mapped to files in memory as the driver maps them: an access without a page is a fault here too.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from components.inference import cache_plan, slot_cache
from components.inference.batching import ContinuousBatch, Row
from components.inference.cache_plan import plan_cache
from components.inference.device_memory import (
    OUT_OF_MEMORY,
    Access,
    AllocationProperties,
    DeviceMemory,
    Driver,
    DriverError,
    Location,
)
from components.models.decoder import Decoder, DecoderConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="maps files in memory to fixed addresses")
PAGE = 1 << 16
NO_ACCESS, READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
FIXED = 0x10
GiB = 1 << 30
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LLAMA_8B = DecoderConfig(128_256, 4096, 32, 32, 8, 128, 14_336, 131_072)


class FilesForPages:
    """libcuda's calls on memory; INVALID where the driver would say so."""

    INVALID = 1

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.reserved: dict[int, int] = {}
        self.files: dict[int, int] = {}
        """By handle."""
        self.mapped: dict[int, int] = {}
        """The handle at each address."""
        self.left = 1 << 40
        """Pages that there are."""
        self.longest_run = 0

    def cuMemGetAllocationGranularity(self, size: Any, properties: Any, option: int) -> int:
        assert option == 0
        self._check_place(properties.contents.location)
        size.contents.value = PAGE
        return 0

    def cuMemAddressReserve(self, address: Any, size: Any, alignment: Any, wanted: Any, flags: Any) -> int:
        if size.value % PAGE or alignment.value or wanted.value or flags.value:
            return self.INVALID
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        start = self._libc.mmap(None, size.value + PAGE, NO_ACCESS, flags, -1, 0)
        address.contents.value = -(-start // PAGE) * PAGE
        self.reserved[address.contents.value] = size.value
        return 0

    def cuMemCreate(self, handle: Any, size: Any, properties: Any, flags: Any) -> int:
        assert (properties.contents.type, properties.contents.handle_types, flags.value) == (1, 0, 0)
        self._check_place(properties.contents.location)
        if size.value % PAGE:
            return self.INVALID
        if not self.left:
            return OUT_OF_MEMORY
        self.left -= 1
        file = os.memfd_create("page")
        os.truncate(file, size.value)
        os.pwrite(file, b"\xff" * size.value, 0)  # NaNs: what was there before
        handle.contents.value = file + 1000
        self.files[file + 1000] = file
        return 0

    def cuMemMap(self, address: Any, size: Any, offset: Any, handle: Any, flags: Any) -> int:
        if size.value != PAGE or address.value % PAGE or offset.value or flags.value or address.value in self.mapped:
            return self.INVALID
        file = self.files[handle.value]
        self._libc.mmap(address.value, PAGE, NO_ACCESS, mmap.MAP_SHARED | FIXED, file, 0)
        self.mapped[address.value] = handle.value
        return 0

    def cuMemSetAccess(self, address: Any, size: Any, access: Any, count: Any) -> int:
        assert (access.contents.flags, count.value) == (3, 1)
        self._check_place(access.contents.location)
        if any(page not in self.mapped for page in range(address.value, address.value + size.value, PAGE)):
            return self.INVALID
        self.longest_run = max(self.longest_run, size.value // PAGE)
        return int(self._libc.mprotect(address.value, size.value, READ_WRITE))

    def cuMemsetD8_v2(self, address: Any, value: Any, size: Any) -> int:
        ctypes.memset(address.value, value.value, size.value)
        return 0

    def cuMemUnmap(self, address: Any, size: Any) -> int:
        if size.value != PAGE or self.mapped.pop(address.value, None) is None:
            return self.INVALID
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | FIXED
        self._libc.mmap(address.value, PAGE, NO_ACCESS, flags, -1, 0)
        return 0

    def cuMemRelease(self, handle: Any) -> int:
        os.close(self.files.pop(handle.value))
        self.left += 1
        return 0

    def cuMemAddressFree(self, address: Any, size: Any) -> int:
        inside = range(address.value, address.value + size.value)
        if self.reserved.pop(address.value, None) != size.value or any(page in inside for page in self.mapped):
            return self.INVALID
        return int(self._libc.munmap(address.value, size.value))

    def _check_place(self, location: Any) -> None:
        assert (location.type, location.id) == (1, 3), "device 3"


class HostMemory(DeviceMemory):
    """Its tensor is a CPU's; it lives as long as the cache that has both."""

    def tensor(self, dtype: torch.dtype) -> Tensor:
        interface = self.__cuda_array_interface__
        return torch.frombuffer((ctypes.c_char * interface["shape"][0]).from_address(interface["data"][0]), dtype=dtype)


@pytest.fixture
def library() -> Iterator[FilesForPages]:
    library = FilesForPages()
    yield library
    gc.collect()
    assert (library.reserved, library.files, library.mapped) == ({}, {}, {}), "all is given back"


@pytest.fixture
def driver(library: FilesForPages, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """The driver of a device, as which a CPU's model is served."""
    driver = Driver(library, 3)
    monkeypatch.setattr(slot_cache, "paging_driver", lambda device: driver)
    monkeypatch.setattr(slot_cache, "DeviceMemory", HostMemory)
    monkeypatch.setattr(slot_cache, "KEPT_BYTES", 0)
    return driver


def test_structures_have_the_sizes_of_the_drivers() -> None:
    assert [ctypes.sizeof(each) for each in (Location, AllocationProperties, Access)] == [8, 32, 12]


def test_pages_come_zeroed_and_go(driver: Driver, library: FilesForPages) -> None:
    memory = HostMemory(driver, CPU, 3, 40 * PAGE, range(PAGE - 1, PAGE + 1))
    whole = memory.tensor(torch.uint8).view(3, 40 * PAGE)
    assert memory.resident == 3 * PAGE, "that of zeros, and two for what may always be written"
    assert not whole[:, :: PAGE // 8].any(), "all can be read"
    memory.hold(1, 32 * PAGE + 1)
    assert memory.resident == (3 + 33 + 2) * PAGE, "some more than needed, for later"
    assert library.longest_run >= 35
    assert not whole[1].any()
    whole[1, : 33 * PAGE] = 7
    assert not whole[0].any()
    assert not whole[2].any()
    memory.hold(1, 35 * PAGE)
    memory.hold(1, 5)
    assert memory.resident == 38 * PAGE
    memory.hold(2, 39 * PAGE + 1)
    assert memory.resident == (38 + 40) * PAGE, "no more than there is"
    memory.release(1)
    assert not whole[1].any()
    assert memory.resident == (38 + 40) * PAGE, "pages are kept for the next row"
    memory.hold(0, 3 * PAGE)
    assert not whole[0].any(), "also of a row that was there before"
    whole[0, PAGE - 1 : PAGE + 1] = 9
    memory.release(0)
    assert whole[0, PAGE - 1 : PAGE + 1].tolist() == [9, 9]
    del whole


def test_pages_beyond_those_kept_are_given_back(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.inference.device_memory.KEPT_PAGES_BYTES", 2 * PAGE)
    memory = HostMemory(driver, CPU, 1, 8 * PAGE, range(1))
    memory.hold(0, 8 * PAGE)
    assert memory.resident == 9 * PAGE
    memory.release(0)
    assert memory.resident == (1 + 1 + 2) * PAGE


def test_memory_that_is_short_changes_nothing(driver: Driver, library: FilesForPages) -> None:
    memory = HostMemory(driver, CPU, 2, 8 * PAGE, range(1))
    library.left = 3
    with pytest.raises(DriverError, match="the CUDA driver: cuMemCreate failed with code 2"):
        memory.hold(1, 4 * PAGE)
    assert not memory.tensor(torch.uint8).any()
    memory.hold(0, 3 * PAGE)
    memory.hold(1, PAGE)
    memory.tensor(torch.uint8)[8 * PAGE : 9 * PAGE] = 1


def answered(batch: ContinuousBatch, rows: list[Row], seed: int) -> list[list[int]]:
    """What rows get that come and go in an order of chance."""
    dice, waiting = random.Random(seed), list(rows)
    while waiting or batch.free < batch.count:
        if waiting and not batch.prefilling and dice.random() < 0.6:
            size = batch.group(waiting[: dice.randint(1, 4)])
            batch.admit(waiting[:size])
            del waiting[:size]
        batch.advance()
    return [row.ids for row in rows]


def some_rows() -> list[Row]:
    """Some begin alike, some are read in several passes, some are sampled."""
    dice = random.Random(7)
    beginning = [dice.randrange(1, 60) for _ in range(90)]
    lengths = [5, 33, 700, 250, 18, 1100, 64, 3, 400, 90]
    prompts = [
        beginning[: length // 2] + [dice.randrange(1, 60) for _ in range(length - length // 2)] for length in lengths
    ]
    return [Row(ids, 12 + 5 * number, temperature=number % 2 * 1.5, seed=number) for number, ids in enumerate(prompts)]


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_rows_have_the_bits_of_a_cache_that_the_system_pages(
    kv_heads: int, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    model = Decoder(DecoderConfig(64, 48, 3, 3, kv_heads, 16, 64, 2048)).eval()
    paged = answered(ContinuousBatch(model, 6), some_rows(), 1)
    monkeypatch.setattr(slot_cache, "paging_driver", lambda device: None)
    batch = ContinuousBatch(model, 6)
    assert batch._cache.whole.is_contiguous()
    assert answered(batch, some_rows(), 2) == paged


def test_memory_follows_the_tokens_in_use(driver: Driver) -> None:
    torch.manual_seed(1)
    model = Decoder(DecoderConfig(64, 64, 4, 2, 2, 64, 64, 4096)).eval()
    batch = ContinuousBatch(model, 8)
    memory = batch._cache._device_memory
    assert memory is not None
    assert not batch._cache.whole.is_contiguous()
    assert batch._cache.block == PAGE // batch.plan.token_bytes
    others = memory.resident
    rows = [Row([1] * length, 30) for length in (700, 450, 950, 1200, 630)]
    waiting = list(rows)
    while waiting or batch.prefilling:
        if waiting and not batch.prefilling:
            batch.admit([waiting.pop(0)])
        batch.advance()
    for left in (5, 3):
        tokens = sum(row.cached for row in batch.decoding)
        kept = len(memory._reserve) * PAGE
        assert (memory.resident - others - kept) / (tokens * batch.plan.token_bytes) == pytest.approx(1.0, abs=0.1)
        assert len(batch.decoding) == left
        for row in rows[:2]:
            if row in batch.decoding:
                batch.drop(row)
    batch.clear()
    assert memory.resident - others - len(memory._reserve) * PAGE == 0
    del memory


def test_a_device_whose_memory_is_paged_counts_tokens(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(memory: int, context: int | None = None) -> cache_plan.CachePlan:
        return plan_cache(LLAMA_8B, torch.bfloat16, CUDA, 32, context, memory)

    whole = plan(80 * GiB)
    assert (whole.paged, whole.rows) == (False, 8)
    monkeypatch.setattr(cache_plan, "paging_driver", lambda device: driver)
    paged = plan(80 * GiB)
    assert (paged.paged, paged.rows, paged.context_len) == (True, 32, whole.context_len)
    assert paged.tokens == 80 * GiB // 4 // paged.token_bytes
    longest = plan(141 * GiB)
    assert (longest.paged, longest.context_len) == (True, (1 << 31) // 65_536 - 16)
    assert not plan(141 * GiB, 40_000).paged, "kernels do not reach so far from position to position"
