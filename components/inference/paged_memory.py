"""Addresses that take a machine's memory page by page, as they are written, and give it back.

vAttention (Prabhu et al. 2024, arXiv 2405.04437) on a CPU: the system's page table is the block table of a paged cache,
so that keys and values stay in one piece for the kernels that read them.
"""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

from components.config.params import InputError

NORESERVE = 0x4000 if sys.platform == "linux" else 0
"""Of mmap(2): addresses beyond the memory are no error. Python names it from 3.13 on; macOS counts no addresses."""
RELEASE = mmap.MADV_FREE if sys.platform == "darwin" else mmap.MADV_DONTNEED


class PagedMemory:
    """`size` bytes of zeros. A private mapping: unlike a shared one, reading what was never written takes no memory."""

    def __init__(self, size: int) -> None:
        """Raises: InputError when the system does not give so many addresses."""
        try:
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        except OSError as error:
            raise InputError(
                f"serve.max_context_tokens: the system gives no {size / 2**30:.1f} GiB of addresses to the key-value"
                f" cache ({error.strerror}); set it or serve.max_running lower, or lift `ulimit -v`"
            ) from None
        if sys.platform == "linux":
            with suppress(OSError):  # of a kernel that has no huge pages
                self._map.madvise(mmap.MADV_NOHUGEPAGE)  # else the first token of a row takes 2 MB for each head

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """All of it."""
        return torch.frombuffer(self._map, dtype=dtype)

    def release(self, start: int, length: int) -> None:
        """Give `length` bytes from `start` on back, both multiples of the page's size; what was there is lost."""
        self._map.madvise(RELEASE, start, length)


def page_positions(size: int) -> int:
    """The fewest positions of `size` bytes that fill whole pages."""
    return mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, size)
