"""The key-value cache is bounded by the machine's memory, and by `serve.max_context_tokens`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from components.config.params import InputError
from components.inference import cache_plan, slot_cache
from components.inference.batching import ContinuousBatch, Row, generate
from components.inference.cache_plan import (
    CACHE_SHARE,
    EVEN_ROWS,
    ROOM_FOR,
    CachePlan,
    context_len,
    plan_cache,
)
from components.inference.paged_memory import PagedMemory
from components.models import devices
from components.models.decoder import Decoder, DecoderConfig
from components.models.devices import device_memory

GiB = 1 << 30
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QWEN3_0_6B = DecoderConfig(151_936, 1024, 28, 16, 8, 128, 3072, 40_960)
SMALL = DecoderConfig(64, 16, 2, 2, 1, 8, 32, 1024)


def plan(
    config: DecoderConfig, memory: int, rows: int = 32, context: int | None = None, device: torch.device = CPU
) -> CachePlan:
    return plan_cache(config, torch.float32, device, rows, context, memory)


@pytest.mark.parametrize("memory", [16 * GiB, 24 * GiB, 96 * GiB, 2000 * GiB])
@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("context", [None, 512, 4096])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_keys_and_values_stay_within_their_share(
    memory: int, rows: int, context: int | None, device: torch.device
) -> None:
    planned = plan(QWEN3_0_6B, memory, rows, context, device)
    assert planned.token_bytes == 28 * 2 * 8 * 128 * 4
    capacity = planned.tokens
    if device == CUDA:  # allocated for each row's whole context
        capacity = -(-planned.rows // EVEN_ROWS) * EVEN_ROWS * planned.context_len
    assert planned.context_len <= capacity <= memory * CACHE_SHARE / planned.token_bytes
    assert 1 <= planned.rows <= rows
    assert planned.context_len <= (context or QWEN3_0_6B.max_seq_len)
    assert planned.context_len == plan(QWEN3_0_6B, memory, 1, context).context_len, "whatever else runs beside it"


def test_memory_enough_holds_all() -> None:
    planned = plan(QWEN3_0_6B, 2000 * GiB)
    assert (planned.rows, planned.context_len) == (32, 40_960)
    assert planned.note(40_960, 32) is None
    assert plan(SMALL, 24 * GiB).context_len == SMALL.max_seq_len


def test_a_long_context_is_shared_out() -> None:
    for device, rows in ((CPU, 32), (CUDA, ROOM_FOR)):
        planned = plan(QWEN3_0_6B, 24 * GiB, device=device)
        tokens = 24 * GiB // 4 // planned.token_bytes
        assert (planned.rows, planned.context_len) == (rows, tokens // ROOM_FOR)
        holds = f"tokens: {rows} requests at once, each of up to 3,510 tokens, of serve.max_running 32"
        assert holds in str(planned.note(40_960, 32))


def test_a_context_that_was_set_takes_rows_where_they_are_allocated() -> None:
    assert plan(QWEN3_0_6B, 24 * GiB, context=7_000, device=CUDA).rows == 4
    assert plan(QWEN3_0_6B, 24 * GiB, context=512, device=CUDA).rows == 32
    assert plan(QWEN3_0_6B, 24 * GiB, context=28_000).rows == 32


def test_what_cannot_fit_is_refused_by_the_setting() -> None:
    with pytest.raises(InputError, match=r"serve\.max_context_tokens: 40960: .* 35\.00 GiB of the 6\.00 GiB .* 7,021$"):
        plan(QWEN3_0_6B, 24 * GiB, context=100_000, device=CUDA)
    with pytest.raises(InputError, match=r"of 1 such request take 8\.75 GiB of the 6\.00 GiB .* at most 28,086$"):
        plan(QWEN3_0_6B, 24 * GiB, context=100_000)
    with pytest.raises(InputError, match=r"max_context_tokens: 256: .*; give more memory$"):
        plan(QWEN3_0_6B, GiB // 8)
    with pytest.raises(InputError, match=r"gives no 536870912\.0 GiB of addresses .*ulimit"):
        PagedMemory(1 << 59)


def test_the_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = device_memory(CPU)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(devices, "CGROUP_LIMITS", (str(limit), str(tmp_path / "absent")))
    for text, expected in (("max\n", None), (f"{GiB}\n", GiB)):
        limit.write_text(text)
        assert device_memory(CPU) == expected or (expected is None and device_memory(CPU) >= machine)


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """A model for whose keys and values the machine has 1,200 tokens, and 256 for a request."""
    torch.manual_seed(1)
    model = Decoder(SMALL).eval()
    token_bytes = 2 * 2 * 1 * 8 * 4
    monkeypatch.setattr(cache_plan, "device_memory", lambda device: int(4 * 300 * token_bytes / CACHE_SHARE))
    return model


def test_all_rows_are_generated_though_few_fit(short_of_memory: Decoder) -> None:
    batch = ContinuousBatch(short_of_memory, 32)
    assert (batch.count, batch.context, batch.plan.tokens) == (32, context_len(short_of_memory), 1200)
    assert batch.context == 256
    rows = [Row(list(range(1, 5 + n)), 5) for n in range(9)]
    generate(short_of_memory, rows)
    assert [len(row.generated) for row in rows] == [5] * 9
    with pytest.raises(InputError, match="prompt: 300 tokens; the model takes 1 to 256"):
        generate(short_of_memory, [Row([1] * 300, 5)])


def test_few_long_requests_or_many_short_ones_share_the_memory(short_of_memory: Decoder) -> None:
    """A request is admitted once its last token has memory: none that runs is stopped, and none overtakes."""
    batch = ContinuousBatch(short_of_memory, 32)
    block = batch._cache.block
    short, long = ([Row([1] * 10, limit) for _ in range(9)] for limit in (5, 300))
    assert batch.group(short) == min(9, 1200 // block)
    assert batch.group(long) == 1200 // 256
    batch.admit(long[:2])
    assert batch.group([*long[2:], *short]) == 2, "others wait, also behind those that do not fit yet"
    batch.prefill()
    batch.drop(long[0])
    assert batch.group(long[2:]) == 3


def pages_in_use(batch: ContinuousBatch) -> int:
    """Bytes of the cache that take memory, as Linux counts them, with those of caches that adjoin it."""
    address = batch._cache.whole.data_ptr()
    mappings = re.findall(r"^(\w+)-(\w+) .*(?:\n\w+:.*)*?\nRss: +(\d+) kB", Path("/proc/self/smaps").read_text(), re.M)
    return next(int(size) * 1024 for start, end, size in mappings if int(start, 16) <= address < int(end, 16))


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="pages in use are read from /proc")
def test_memory_follows_the_tokens_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a tenth, rows of unlike lengths beside each other, some gone and some moved; all left, none is taken."""
    monkeypatch.setattr(slot_cache, "KEPT_BYTES", 0)
    torch.manual_seed(1)
    batch = ContinuousBatch(Decoder(DecoderConfig(64, 64, 2, 2, 2, 64, 32, 4096)).eval(), 8)
    others = pages_in_use(batch)
    rows = [Row([1] * length, 90) for length in (700, 33, 250, 1200, 18)]
    waiting = list(rows)

    def run(steps: int) -> None:
        for _ in range(steps):
            if waiting and not batch.prefilling and (size := batch.group(waiting)):
                batch.admit(waiting[:size])
                del waiting[:size]
            batch.advance()

    def assert_memory_follows() -> None:
        tokens = sum(-(-row.cached // batch._cache.block) * batch._cache.block for row in batch.decoding)
        expected = (tokens + batch._cache.block) * batch.plan.token_bytes
        assert pages_in_use(batch) - others == pytest.approx(expected, rel=0.1)

    run(12)
    assert len(batch.decoding) == 5
    assert_memory_follows()
    batch.drop(rows[3])
    batch.drop(rows[0])
    run(3)
    assert_memory_follows()
    run(90)
    assert pages_in_use(batch) - others <= batch._cache.block * batch.plan.token_bytes, "padding's place alone"
