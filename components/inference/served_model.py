"""A decoder as it is served, and evaluated: on a CPU quantized, in bf16 or fp16, where its answers pass, and packed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from components.inference.batching import Row, generate
from components.inference.packed_weights import (
    agreement,
    pack,
    packs_fp16,
    round_checked,
    rows_are_independent,
    should_pack,
)
from components.models.checkpoint import load_decoder
from components.models.decoder import Decoder
from components.models.devices import SMALL_MODEL, best_device, compute_dtype, threads_for, use_threads
from components.models.lora import lora_of, merge_lora
from components.tokenization.chat_tokenizer import ChatTokenizer

MIN_AGREEMENT = 0.98
"""Share of greedy tokens that have to agree on SAMPLES between the model in fp32 and in int8 or bf16."""
SAMPLES = ("Hello", "Thank you!", "What can you do?", "How much is 37 times 12?", "Tell me a story.")
SAMPLE_TOKENS = 48

logger = logging.getLogger("loopwright.engine")


def load_replicas(folder: Path, tokenizer: ChatTokenizer, int8: bool, devices: Sequence[torch.device]) -> list[Decoder]:
    """`load_served` on each device; on a CPU named again the modules are copied, and share their weights.

    So they have one precision, which a CPU measures anew at each load.
    """
    first = load_served(folder, tokenizer, int8, devices[0])
    others = (
        load_served(folder, tokenizer, int8, each) if each.type == "cuda" else _copy(first) for each in devices[1:]
    )
    return [first, *others]


def _copy(model: Decoder) -> Decoder:
    """The same model in modules of its own, which an adapter bank may replace."""
    parts = (
        part
        for each in model.modules()
        for part in (*each.parameters(False), *each.buffers(False), *vars(each).values())
    )
    return copy.deepcopy(model, {id(part): part for part in parts if not isinstance(part, dict | nn.Module)})


def load_served(
    folder: Path, tokenizer: ChatTokenizer, int8: bool = False, device: torch.device | None = None
) -> Decoder:
    """The model of a folder, an adapter merged; it can no longer be trained or saved.

    Raises: InputError as `load_decoder`, and when `int8` changes too many of its tokens.
    """
    device = device or best_device()
    # As it was trained: a GPU computes in bf16 twice as fast and more, and reads half as much.
    full = compute_dtype("auto", device) if device.type == "cuda" else torch.float32
    model = _merged(folder, full, device)
    use_threads(threads_for(model.num_parameters))
    if device.type == "cuda":
        return model
    if int8:
        round_checked(model, _samples(model, tokenizer), MIN_AGREEMENT)
    elif model.num_parameters > SMALL_MODEL:
        samples = _samples(model, tokenizer)
        fast = [torch.bfloat16] if compute_dtype("auto", device, model) == torch.bfloat16 else []
        for dtype in fast + ([torch.float16] if packs_fp16() else []):
            share, cases = agreement(model, samples, partial(pack, dtype=dtype))
            if share >= MIN_AGREEMENT:
                return model
            name = str(dtype).removeprefix("torch.")
            logger.warning("%s: not in %s, in which it agrees in %.1f%% of %d cases", folder, name, 100 * share, cases)
            model = _merged(folder, full, device)
    if should_pack(model) or not rows_are_independent(model):
        pack(model)
    return model


def _merged(folder: Path, dtype: torch.dtype, device: torch.device) -> Decoder:
    model = load_decoder(folder, dtype, device).eval()
    if lora_of(model) is not None:
        merge_lora(model)
    return model


def _samples(model: Decoder, tokenizer: ChatTokenizer) -> list[list[int]]:
    """SAMPLES with the model's answers, as ids."""
    chats: list[tuple[list[dict[str, str]], None]] = [([{"role": "user", "content": text}], None) for text in SAMPLES]
    prompts = tokenizer.encode_chats(chats, add_generation_prompt=True)
    rows = [Row(ids, SAMPLE_TOKENS, stop_ids=(tokenizer.end_id,)) for ids, _ in prompts]
    longest = max(len(row.ids) for row in rows)
    generate(model, rows, max_context=min(model.config.max_seq_len, longest + SAMPLE_TOKENS))
    return [row.ids for row in rows]
