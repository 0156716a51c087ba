"""What the trainings of a params.yaml take, before anything runs: tokens, operations, memory, disk and time.

A model is built on torch's meta device, which holds no numbers, and a row is passed forward and back through it: torch
counts the operations, and its hooks what is saved for the backward pass. Time is operations over a rate, which
`measure_machine` takes from steps of the same training loop.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from components.config.model_settings import Checkpointing, LoopConfig
from components.config.params import InputError, Params
from components.models.decoder import Decoder, DecoderConfig
from components.models.devices import best_device, compute_dtype, configure_cpu, device_memory
from components.models.encoder import EncoderConfig, EncoderForPretraining
from components.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from components.runtime.files import replace_file
from components.token_rows.batches import Batch
from components.training.activations import checkpoint_blocks, watch_saved
from components.training.budget import COPY_BYTES, LOGIT_BYTES, STATE_BYTES, Budget
from components.training.checkpoints import MAX_CHECKPOINTS
from components.training.defaults import count_parameters
from components.training.loop import Training, compute_in
from components.training.objectives import causal_lm, chunk_rows
from components.training.optimizers import Masters, build_optimizers

CPU = "this CPU"
"""The name of a machine without a GPU."""
MEASURED_WIDTHS = {"cpu": (64, 192, 512), "cuda": (768, 1280, 2048)}
"""`embed_dim` of the decoders that are measured."""
MEASURED_LAYERS, MEASURED_VOCAB = 4, 4096
MEASURED_TOKENS = {"cpu": 2048, "cuda": 65_536}
"""Of a measured step."""
MEASURED_SECONDS = 5.0
"""Of the steps of one size, at least."""
SHARD_BYTES = 4 + STATE_BYTES
"""Of a trained weight over all of several devices: in fp32, with its gradient and AdamW's two moments."""
COPIES_OF_ROWS = 2
"""On the disk: the rows, and DVC's cache of them."""


@dataclass(frozen=True)
class Rate:
    """Operations a second of a training step on a decoder of so many parameters."""

    parameters: int
    flops: float


@dataclass(frozen=True)
class Machine:
    """What a training step reaches on one device."""

    name: str
    memory: int
    """Bytes."""
    rates: tuple[Rate, ...]
    """By growing number of parameters."""
    start_seconds: float
    """From the start of a training stage's process to its code: what it imports; 0 where it was not measured."""
    measured: bool

    def rate(self, parameters: int) -> float:
        """Operations a second for a model of this size: between two that were measured, else that of the nearest."""
        below = [rate for rate in self.rates if rate.parameters <= parameters] or [self.rates[0]]
        above = [rate for rate in self.rates if rate.parameters > parameters] or [self.rates[-1]]
        low, high = below[-1], above[0]
        if low.parameters >= high.parameters:
            return low.flops
        share = math.log(parameters / low.parameters) / math.log(high.parameters / low.parameters)
        return low.flops * math.pow(high.flops / low.flops, share)

    def write(self, path: Path) -> None:
        """Replace the file that `read` reads."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(asdict(self), indent=2).encode()
        replace_file(path, lambda file: file.write(content))

    @classmethod
    def read(cls, path: Path) -> Machine:
        """What `write` wrote.

        Raises: InputError when it is damaged.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**values | {"rates": tuple(Rate(**rate) for rate in values["rates"])})
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f'{path}: not readable: {error}; run "loopwright bench-machine"') from error


ASSUMED_SHARE = 0.4
"""Of a device's published peak, where it was not measured: public trainings of 0.1 to 7 billion parameters reach 0.35
to 0.5."""
_PUBLISHED = {
    # Memory in 10^9 bytes, dense bf16 operations a second in 10^12, as the makers state them.
    "h200": (141, 989),
    "h100": (80, 989),
    "a100": (80, 312),
    "l40s": (48, 362),
    "l4": (24, 121),
}
PUBLISHED = {
    name: Machine(name, memory * 10**9, (Rate(1, ASSUMED_SHARE * peak * 1e12),), 0.0, False)
    for name, (memory, peak) in _PUBLISHED.items()
}
"""Devices by their makers' figures."""


Parts = tuple[nn.Module, int, int, Callable[[], Tensor]]
"""A model on the meta device, the tokens and the targets of a row, and the pass of a row to its normed stream."""


@dataclass(frozen=True)
class StagePlan:
    """What one training stage takes on each of its devices."""

    stage: str
    parameters: int
    tokens: int
    """Read in training, at most: rows shorter than the longest are counted as the longest."""
    flops: float
    memory: int
    """Bytes at the peak, of each device."""
    disk: int
    """Bytes of the checkpoints while it trains: those that are kept of each of its phases, and the one that is written.
    The model and its copy in DVC's cache, which come then, take less than that one."""
    rows: int
    """Bytes of its token rows and their copy in DVC's cache, if each is read once: less where they are read again."""
    seconds: float | None
    """Start and steps; None without a machine. Steps of several devices take as many times less: what they exchange is
    not counted."""


@dataclass(frozen=True)
class RowCost:
    """What one row takes."""

    tokens: int
    flops: float
    """Forward and backward."""
    saved: int
    """Bytes held at the peak for the backward pass, in the dtype of the weights."""


def plan(params: Params, machine: Machine | None = None, devices: int = 1) -> list[StagePlan]:
    """What each training stage takes that begins with a model of params.yaml; one on a base says so when it starts.

    All of them share `devices` alike.
    """
    return [_stage(*training, machine, devices) for training in _trainings(params)]


def _trainings(params: Params) -> Iterator[tuple[str, LoopConfig, int, Parts, int, int]]:
    """Stage, settings, steps and model of each training; bytes of a token's marks on disk, and phases."""
    rows, vocabulary, model = params.prepare, params.train_tokenizer, params.model
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig.from_params(model.decoder, vocabulary.decoder.vocab_size))
        encoder = EncoderForPretraining(EncoderConfig.from_params(model.encoder, vocabulary.encoder.vocab_size))
        shape = EncoderDecoderConfig.from_params(model.encoder_decoder, vocabulary.encoder_decoder.vocab_size)
        encoder_decoder = EncoderDecoder(shape)
        text, tokens, source, target = (
            torch.zeros(1, length, dtype=torch.long)
            for length in (
                rows.decoder.seq_len,
                rows.encoder.seq_len,
                rows.encoder_decoder.seq_len,
                rows.encoder_decoder.target_len,
            )
        )

    def decode() -> Tensor:
        return decoder.hidden(text, torch.ones_like(text), torch.zeros_like(text))

    def encode() -> Tensor:
        return encoder.hidden(tokens, torch.zeros_like(tokens), torch.ones_like(tokens))

    def translate() -> Tensor:
        mask = torch.ones_like(source)
        return encoder_decoder.decode(target, encoder_decoder.encode(source, mask), mask)

    length, masked = tokens.shape[1], params.pretrain.encoder.masked_share
    pair = source.shape[1] + target.shape[1], target.shape[1]
    written: Parts = decoder, text.shape[1], text.shape[1], decode
    translated: Parts = encoder_decoder, *pair, translate
    pretraining, classifier = params.pretrain, params.classifier
    yield "pretrain@decoder", pretraining.decoder, pretraining.decoder.max_steps, written, 3, 1
    filled: Parts = encoder, length, round(masked * length), encode
    yield "pretrain@encoder", pretraining.encoder, pretraining.encoder.max_steps, filled, 2, 1
    steps = pretraining.encoder_decoder.max_steps
    yield "pretrain@encoder_decoder", pretraining.encoder_decoder, steps, translated, 0, 1
    if not params.tune.base:
        yield "tune", params.tune, params.tune.max_steps, written, 3, 1
    if not classifier.base:
        steps = classifier.adapt_steps + classifier.trials * classifier.trial_steps + classifier.max_steps
        phases = bool(classifier.adapt_steps) + classifier.trials + 1
        yield "finetune@classifier", classifier, steps, (encoder, length, 0, encode), 0, phases
    if not params.summarizer.base:
        yield "finetune@summarizer", params.summarizer, params.summarizer.max_steps, translated, 0, 1


def _stage(
    name: str,
    config: LoopConfig,
    steps: int,
    parts: Parts,
    mark_bytes: int,
    phases: int,
    machine: Machine | None,
    devices: int,
) -> StagePlan:
    model, tokens, targets, forward = parts
    parameters, vocab_size = count_parameters(model), len(cast(nn.Linear, model.head).weight)
    device = "cpu" if machine is None or machine.name == CPU else "cuda"
    itemsize = 2 if config.precision == "bf16" or (config.precision == "auto" and device == "cuda") else 4
    model.to(outline_dtype(device, itemsize))
    cost = row_cost(model, tokens, targets, forward, config.activation_checkpointing)
    rows = steps * config.global_batch_size
    logits = min(chunk_rows(vocab_size, device), config.micro_batch_size * targets) * vocab_size
    logits *= LOGIT_BYTES + itemsize
    saved = cost.saved * itemsize // outline_dtype(device, itemsize).itemsize
    checkpoint = COPY_BYTES if device == "cpu" else 0
    budget = Budget(parameters * itemsize, parameters, itemsize, saved, config.micro_batch_size, logits, checkpoint)
    memory = budget.total
    if devices > 1:
        memory -= budget.weights + budget.states + budget.copies
        memory += parameters * (SHARD_BYTES + checkpoint) // devices + _gathered(model, itemsize)
    flops = rows * cost.flops
    return StagePlan(
        name,
        parameters,
        rows * cost.tokens,
        flops,
        memory,
        (MAX_CHECKPOINTS * phases + 1) * _checkpoint_bytes(model, config, with_best=name == "finetune@classifier"),
        COPIES_OF_ROWS * rows * cost.tokens * ((2 if vocab_size <= 2**16 else 4) + mark_bytes),
        machine.start_seconds + flops / machine.rate(parameters) / devices if machine is not None else None,
    )


def _checkpoint_bytes(model: nn.Module, config: LoopConfig, with_best: bool) -> int:
    """Bytes of the fp32 weights, of the optimizers' states and, with early stopping, of the best weights so far."""
    masters = Masters(model)
    weights = sum(weight.nbytes for weight in masters.trained().values())
    optimizers = build_optimizers(model, masters, config, torch.float32)
    states = sum(tensor.nbytes for optimizer in optimizers for tensor in optimizer.state().values())
    return weights * (2 if with_best else 1) + states


def _gathered(model: nn.Module, itemsize: int) -> int:
    """Bytes that FSDP2 holds whole at once: what belongs to no block, two blocks, and a block's fp32 gradients."""
    blocks = [count_parameters(block) for block in cast(Iterable[nn.Module], model.blocks)]
    return itemsize * (count_parameters(model) - sum(blocks) + 2 * max(blocks)) + 4 * max(blocks)


def outline_dtype(device: str, itemsize: int) -> torch.dtype:
    """That of a model on the meta device which stands for one trained on a device of this type.

    Half precision there takes the attention of a GPU (`takes_packed`), a CPU's has the tensors of fp32.
    """
    return torch.bfloat16 if device == "cuda" and itemsize == 2 else torch.float32


def row_cost(
    model: nn.Module, tokens: int, targets: int, forward: Callable[[], Tensor], checkpointing: Checkpointing = "none"
) -> RowCost:
    """Pass a row forward and back through a model on the meta device; the head is counted at the targets alone."""
    weights = {weight.untyped_storage() for weight in model.parameters()}
    saved: set[torch.UntypedStorage] = set()
    # Off the CPU the model takes the plain functions, of as many operations as those by which a CPU trains.
    checkpoint_blocks(model, checkpointing, whole=1)  # at the peak one block is recomputed, and so held whole
    with watch_saved(lambda tensor: saved.add(tensor.untyped_storage())):
        forward()
    checkpoint_blocks(model, checkpointing)
    counter = FlopCounterMode(display=False)
    with counter:
        torch.autograd.backward(forward().sum())
    checkpoint_blocks(model, "none")
    head = cast(nn.Linear, model.head)
    logits = 3 * 2 * targets * head.weight.numel()  # forward, and backward to the stream and to the weight
    return RowCost(tokens, counter.get_total_flops() + logits, sum(storage.nbytes() for storage in saved - weights))


def measure_machine(config: LoopConfig, report: Callable[[str], None]) -> Machine:
    """Train decoders of random weights on random tokens for some seconds each; `report` gets a line for each."""
    configure_cpu()
    device = best_device()
    rates = []
    for width in MEASURED_WIDTHS[device.type]:
        rate = _measured(config, width, device)
        report(f"{rate.parameters / 1e6:,.1f} M parameters: {rate.flops / 1e9:,.1f} GFLOP/s")
        rates.append(rate)
    start = min(_start_seconds() for _ in range(2))  # the first may read from a cold disk
    report(f"start of a stage: {start:.1f} s")
    name = torch.cuda.get_device_name() if device.type == "cuda" else CPU
    return Machine(name, device_memory(device), tuple(rates), start, True)


def _start_seconds() -> float:
    """Seconds of a process that gets ready to run a training stage."""
    started = time.perf_counter()
    line = "from components.runtime.stage import stage_function; stage_function('tune')"
    subprocess.run([sys.executable, "-c", line], check=True)
    return time.perf_counter() - started


def _measured(config: LoopConfig, width: int, device: torch.device) -> Rate:
    shape = DecoderConfig(
        vocab_size=MEASURED_VOCAB,
        embed_dim=width,
        num_layers=MEASURED_LAYERS,
        num_heads=width // 64,
        num_kv_heads=width // 64,
        head_dim=64,
        hidden_dim=8 * width // 3 // 64 * 64,
        max_seq_len=256,
        qk_norm=True,
        tie_embeddings=True,
    )
    model, length = Decoder(shape), shape.max_seq_len
    with torch.device("meta"):
        outline, row = Decoder(shape), torch.zeros(1, length, dtype=torch.long)
    dtype = compute_dtype(config.precision, device, model)
    outline.to(outline_dtype(device.type, dtype.itemsize))
    cost = row_cost(outline, length, length, lambda: outline.hidden(row, torch.ones_like(row), row))
    rows = MEASURED_TOKENS[device.type] // length
    compute_in(model, config, device, dtype)
    training = Training(model.train(), causal_lm, config, 0)
    ids = torch.randint(MEASURED_VOCAB, (rows, length), device=device)
    positions = torch.arange(length, device=device).expand(rows, -1)
    batch: Batch = {"input_ids": ids, "labels": ids, "segment_ids": torch.ones_like(ids), "position_ids": positions}
    for _ in range(2):  # prepares kernels and buffers
        training.train_step([batch])
    training.read_loss()
    started, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - started < MEASURED_SECONDS:
        training.train_step([batch])
        training.read_loss()  # waits for the device
        steps += 1
    seconds = time.perf_counter() - started
    return Rate(count_parameters(model), steps * rows * cost.flops / seconds)
