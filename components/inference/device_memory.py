"""Addresses of a CUDA device that take its memory page by page: `paged_memory` where no system does it by itself.

The driver's virtual memory management is called by ctypes, as the CUDA driver API documents it. A page without memory
of its own reads as zeros: one page of zeros is mapped to all of them, for kernels read masked positions too, and a read
of an address with no page at all is a fault.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

KEPT_PAGES_BYTES = 1 << 28
"""Of pages that were given back and are kept for the next row: creating one takes longer than mapping it."""
SLACK = 16
"""A part that grows takes one page more for each so many that it needs: fewer, larger growths."""
OUT_OF_MEMORY, PINNED, DEVICE, READ_WRITE = 2, 1, 1, 3
"""Of the driver: CUDA_ERROR_OUT_OF_MEMORY, CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_LOCATION_TYPE_DEVICE,
CU_MEM_ACCESS_FLAGS_PROT_READWRITE."""

logger = logging.getLogger("loopwright.engine")


class DriverError(RuntimeError):
    """The driver refused a call."""

    def __init__(self, function: str, code: int) -> None:
        super().__init__(f"the CUDA driver: {function} failed with code {code}")
        self.code = code


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("win32_metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", ctypes.c_int))


class Driver:
    """The driver's calls on the memory of one device."""

    def __init__(self, library: Any, device: int) -> None:
        """`library`: libcuda, or what answers like it."""
        self._library = library
        place = Location(DEVICE, device)
        self._properties = AllocationProperties(type=PINNED, location=place)
        self._access = Access(place, READ_WRITE)

    def granularity(self) -> int:
        """Bytes of the smallest page."""
        size = ctypes.c_size_t()
        self._call("cuMemGetAllocationGranularity", ctypes.pointer(size), ctypes.pointer(self._properties), 0)
        return size.value

    def reserve(self, size: int) -> int:
        """Addresses, as the first of them."""
        address, zero = ctypes.c_uint64(), ctypes.c_uint64(0)
        self._call("cuMemAddressReserve", ctypes.pointer(address), _size(size), _size(0), zero, zero)
        return address.value

    def create(self, size: int) -> int:
        """Memory, as a handle."""
        handle = ctypes.c_uint64()
        arguments = ctypes.pointer(handle), _size(size), ctypes.pointer(self._properties), ctypes.c_uint64(0)
        self._call("cuMemCreate", *arguments)
        return handle.value

    def map(self, address: int, size: int, handle: int) -> None:
        """Memory to addresses, which are not accessible yet."""
        zero = ctypes.c_uint64(0)
        self._call("cuMemMap", ctypes.c_uint64(address), _size(size), _size(0), ctypes.c_uint64(handle), zero)

    def allow(self, address: int, size: int) -> None:
        """Let kernels of the device read and write mapped addresses."""
        self._call("cuMemSetAccess", ctypes.c_uint64(address), _size(size), ctypes.pointer(self._access), _size(1))

    def unmap(self, address: int, size: int) -> None:
        self._call("cuMemUnmap", ctypes.c_uint64(address), _size(size))

    def release(self, handle: int) -> None:
        self._call("cuMemRelease", ctypes.c_uint64(handle))

    def zero(self, address: int, size: int) -> None:
        self._call("cuMemsetD8_v2", ctypes.c_uint64(address), ctypes.c_ubyte(0), _size(size))

    def free(self, address: int, size: int) -> None:
        """Give addresses back, to which nothing is mapped."""
        self._call("cuMemAddressFree", ctypes.c_uint64(address), _size(size))

    def _call(self, function: str, *arguments: Any) -> None:
        if code := getattr(self._library, function)(*arguments):
            raise DriverError(function, code)


_size = ctypes.c_size_t


class DeviceMemory:
    """`parts` ranges of `size` bytes, each with memory for its first bytes, as many as it was to `hold`.

    One thread holds and releases; what it has started on the device has ended before a page changes.
    """

    def __init__(self, driver: Driver, device: torch.device, parts: int, size: int, spare: range) -> None:
        """`size`: a multiple of the driver's granularity; the bytes `spare` have memory always. Raises: DriverError."""
        self._driver, self._device = driver, device
        self._page, self._size, self._total = driver.granularity(), size, parts * size
        self._pages: dict[int, int] = {}
        """The handle of each page with memory of its own, by its number."""
        self._reserve: list[int] = []
        """Handles of pages that were given back."""
        self._held = [0] * parts
        """Pages that have memory, of each part."""
        self._zeros, self._address = driver.create(self._page), driver.reserve(self._total)
        addresses = range(self._address, self._address + self._total, self._page)
        for address in addresses:
            driver.map(address, self._page, self._zeros)
        driver.allow(self._address, self._total)
        driver.zero(self._address, self._page)
        owned = self._zeros, self._pages, self._reserve
        weakref.finalize(self, _give_back, driver, device, addresses, *owned).atexit = False
        self._spare = frozenset(range(spare.start // self._page, (spare.stop - 1) // self._page + 1))
        self._take(self._spare)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self._total,), "typestr": "|u1", "data": (self._address, False), "version": 3}

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """All of it; keeps it alive."""
        return torch.as_tensor(self, device=self._device).view(dtype)

    @property
    def resident(self) -> int:
        """Bytes of the device that it takes."""
        return (1 + len(self._pages) + len(self._reserve)) * self._page

    def hold(self, part: int, length: int) -> None:
        """Let the first `length` bytes of a part have memory; new memory is zero. Raises: DriverError."""
        if length > self._held[part] * self._page:
            count = -(-length // self._page)
            count = min(count + count // SLACK, self._size // self._page)
            first = part * self._size // self._page
            self._take(range(first + self._held[part], first + count))
            self._held[part] = count

    def release(self, part: int) -> None:
        """Give the memory of a part back; what was there is lost."""
        first = part * self._size // self._page
        numbers = set(range(first, first + self._held[part])) - self._spare
        self._held[part] = 0
        self._reserve += [self._pages.pop(number) for number in numbers]
        self._map(dict.fromkeys(numbers, self._zeros))
        while len(self._reserve) * self._page > KEPT_PAGES_BYTES:
            self._driver.release(self._reserve.pop())

    def _take(self, numbers: Iterable[int]) -> None:
        """Give memory to pages that have none."""
        missing = [number for number in numbers if number not in self._pages]
        while len(self._reserve) < len(missing):  # before any page changes: memory may be short
            self._reserve.append(self._create())
        pages = {number: self._reserve.pop() for number in missing}
        self._pages |= pages
        self._map(pages)
        for number in pages:
            self._driver.zero(self._address + number * self._page, self._page)

    def _create(self) -> int:
        try:
            return self._driver.create(self._page)
        except DriverError as error:
            if error.code != OUT_OF_MEMORY or self._device.type != "cuda":
                raise
            torch.cuda.empty_cache()  # what torch keeps for its next tensors
            return self._driver.create(self._page)

    def _map(self, pages: Mapping[int, int]) -> None:
        """Map handles to pages, by their numbers, in place of what is there."""
        if not pages:
            return
        _wait(self._device)
        for run in _runs(pages):
            for number in run:
                self._driver.unmap(self._address + number * self._page, self._page)
                self._driver.map(self._address + number * self._page, self._page, pages[number])
            self._driver.allow(self._address + run[0] * self._page, len(run) * self._page)


def _runs(numbers: Iterable[int]) -> Iterator[list[int]]:
    """Numbers that follow each other."""
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        yield [number for _, number in run]


def _wait(device: torch.device) -> None:
    """Until what the calling thread has started is done; other threads may capture graphs meanwhile."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _give_back(
    driver: Driver, device: torch.device, addresses: range, zeros: int, pages: dict[int, int], reserve: list[int]
) -> None:
    """Free all that a `DeviceMemory` had; `addresses` are those of its pages."""
    _wait(device)
    for address in addresses:
        driver.unmap(address, addresses.step)
    for handle in (*pages.values(), *reserve, zeros):
        driver.release(handle)
    driver.free(addresses.start, addresses.stop - addresses.start)


@cache
def paging_driver(device: torch.device) -> Driver | None:
    """The driver of a CUDA device whose memory can be paged, as a trial shows; None elsewhere."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    try:
        torch.cuda.synchronize(device)  # makes the device's context this thread's
        driver = Driver(ctypes.CDLL("libcuda.so.1"), device.index or 0)
        page = driver.granularity()
        memory = DeviceMemory(driver, device, 2, page, range(1))
        memory.hold(1, page)
        memory.release(1)
    except (OSError, AttributeError, RuntimeError) as error:
        logger.warning("%s: no paged memory: %s; the cache is allocated for each row's whole context", device, error)
        return None
    return driver
