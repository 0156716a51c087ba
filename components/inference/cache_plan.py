"""How many requests a model's key-value cache holds at once, and how long each may get, in the memory there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from components.config.params import InputError
from components.inference.device_memory import paging_driver
from components.models.checkpoint import read_config
from components.models.decoder import Decoder, DecoderConfig
from components.models.devices import best_device, compute_dtype, device_memory
from components.models.weight_files import weight_files

EVEN_ROWS = 4
"""Products of a multiple of so many rows give each row the same bits, whatever the others are; for fewer, kernels are
chosen whose last bits differ. Measured with MKL, and tried again where it runs (`rows_are_independent`)."""
SEEN = 16
"""Positions attended in a pass are a multiple of this: the softmax sums by vectors."""
CACHE_SHARE = 0.25
"""Of a device's memory for the keys and values of running requests; the prefix cache grows to as much again."""
ROOM_FOR = 8
"""Requests that the context leaves room for, where no setting says how long it is."""
MIN_CONTEXT = 256


@dataclass(frozen=True)
class CachePlan:
    """A cache of at most `rows` requests of up to `context_len` tokens each, prompt and answer together."""

    rows: int
    context_len: int
    tokens: int
    """Tokens of all requests that run at once."""
    token_bytes: int
    """Keys and values of one token in all layers."""
    paged: bool = True
    """Memory follows the tokens in use; else it is allocated for each row's whole context."""

    def note(self, model_len: int, max_rows: int) -> str | None:
        """One line on what the memory does not hold; None where it holds `max_rows` of the model's whole context."""
        if self.context_len == model_len and self.tokens >= max_rows * model_len:
            return None
        return (
            f"the key-value cache ({self.token_bytes * self.tokens / 2**30:.1f} GiB) holds {self.tokens:,} tokens:"
            f" {self.rows} requests at once, each of up to {self.context_len:,} tokens, of serve.max_running {max_rows}"
            f" and the model's {model_len:,} tokens; others wait; serve.max_context_tokens says how long a request may"
            " get"
        )


def plan_cache(
    config: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_rows: int,
    max_context: int | None = None,
    memory: int | None = None,
    sharers: int = 1,
) -> CachePlan:
    """Fit at most `max_rows` requests into CACHE_SHARE of the device's memory (bytes; its own where None).

    On a CPU, and on a CUDA device whose driver pages its memory, it holds one request of the whole context or many
    short ones. Elsewhere it is allocated for each row's whole context, and holds EVEN_ROWS rows at least. The context
    depends on the model, the machine and `max_context` alone, so that what is evaluated is what is served. `sharers`
    caches divide the tokens of a CPU, each with room for a request of that length.

    Raises: InputError when the memory does not hold the fewest rows.
    """
    memory = device_memory(device) if memory is None else memory
    token_bytes = config.num_layers * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize
    tokens = int(memory * CACHE_SHARE) // token_bytes
    context = max(tokens // ROOM_FOR, MIN_CONTEXT)
    paged = device.type == "cpu"
    if not paged and paging_driver(device) is not None:
        # Attention kernels step from position to position by 32 bits: there over the elements of all layers.
        reach = (1 << 31) // (token_bytes // dtype.itemsize) - SEEN
        context = min(context, max(reach, MIN_CONTEXT))
        paged = min(config.max_seq_len, max_context or context) <= reach
    context = min(config.max_seq_len, max_context or context)
    least = 1 if paged else EVEN_ROWS
    if tokens < least * context:
        fix = "give more memory" if max_context is None else f"set it to at most {tokens // least:,}"
        raise InputError(
            f"serve.max_context_tokens: {context}: the keys and values of {least} such request{'s' * (least > 1)} take"
            f" {token_bytes * context * least / 2**30:.2f} GiB of the {memory * CACHE_SHARE / 2**30:.2f} GiB for"
            f" them ({CACHE_SHARE:.0%} of the memory); {fix}"
        )
    rows = max_rows if paged else min(max_rows, tokens // context // EVEN_ROWS * EVEN_ROWS)
    return CachePlan(rows, context, min(max(tokens // sharers, context), rows * context), token_bytes, paged)


def serving_note(folder: Path, max_rows: int, max_context: int | None) -> str | None:
    """What this machine's memory does not hold of the decoder in a folder; None where it holds all."""
    config, device = read_config(folder), best_device()
    try:
        plan = plan_cache(config, compute_dtype("auto", device), device, max_rows, max_context)
    except InputError as error:
        return str(error)
    return plan.note(config.max_seq_len, max_rows)


def check_memory(folder: Path) -> None:
    """Raises: InputError when the weights in a folder are larger than this machine's memory."""
    files = weight_files(folder)
    size, memory = sum(file.stat().st_size for file in files), device_memory(torch.device("cpu"))
    if size > memory:
        raise InputError(
            f"{files[0]}: the weights take {size / 2**30:.1f} GiB, more than the {memory / 2**30:.1f} GiB of memory;"
            " use a smaller model, or serve it elsewhere (serve.backend: openai)"
        )


def context_len(model: Decoder) -> int:
    """Tokens that a prompt and its answer may have together on this machine, where no setting says so."""
    return plan_cache(model.config, model.embed.weight.dtype, model.embed.weight.device, 1).context_len
