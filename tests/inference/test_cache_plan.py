"""The key-value cache is bounded by the machine's memory, and by `serve.max_context_tokens`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from components.config.params import InputError
from components.inference import cache_plan
from components.inference.batching import ContinuousBatch, Row, generate
from components.inference.cache_plan import (
    CACHE_SHARE,
    EVEN_ROWS,
    ROOM_FOR,
    CachePlan,
    context_len,
    plan_cache,
)
from components.models import devices
from components.models.decoder import Decoder, DecoderConfig
from components.models.devices import device_memory

GiB = 1 << 30
CPU = torch.device("cpu")
QWEN3_0_6B = DecoderConfig(151_936, 1024, 28, 16, 8, 128, 3072, 40_960)
SMALL = DecoderConfig(64, 16, 2, 2, 1, 8, 32, 1024)


def plan(config: DecoderConfig, memory: int, rows: int = 32, context: int | None = None) -> CachePlan:
    return plan_cache(config, torch.float32, CPU, rows, context, memory)


@pytest.mark.parametrize("memory", [16 * GiB, 24 * GiB, 96 * GiB, 2000 * GiB])
@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("context", [None, 512, 4096])
def test_keys_and_values_stay_within_their_share(memory: int, rows: int, context: int | None) -> None:
    planned = plan(QWEN3_0_6B, memory, rows, context)
    assert planned.token_bytes == 28 * 2 * 8 * 128 * 4
    assert -(-planned.rows // EVEN_ROWS) * EVEN_ROWS * planned.context_len * planned.token_bytes <= memory * CACHE_SHARE
    assert 1 <= planned.rows <= rows
    assert planned.context_len <= (context or QWEN3_0_6B.max_seq_len)
    assert planned.context_len == plan(QWEN3_0_6B, memory, 1, context).context_len, "whatever else runs beside it"


def test_memory_enough_holds_all() -> None:
    planned = plan(QWEN3_0_6B, 2000 * GiB)
    assert (planned.rows, planned.context_len) == (32, 40_960)
    assert planned.note(40_960, 32) is None
    assert plan(SMALL, 24 * GiB).context_len == SMALL.max_seq_len


def test_a_long_context_is_shared_out() -> None:
    planned = plan(QWEN3_0_6B, 24 * GiB)
    assert (planned.rows, planned.context_len) == (ROOM_FOR, 24 * GiB // 4 // planned.token_bytes // ROOM_FOR)
    assert "holds 8 requests of 3,510 tokens at once, of serve.max_running 32" in str(planned.note(40_960, 32))


def test_a_context_that_was_set_takes_rows() -> None:
    assert plan(QWEN3_0_6B, 24 * GiB, context=7_000).rows == 4
    assert plan(QWEN3_0_6B, 24 * GiB, context=512).rows == 32


def test_what_cannot_fit_is_refused_by_the_setting() -> None:
    with pytest.raises(InputError, match=r"serve\.max_context_tokens: 40960: .* 35\.00 GiB of the 6\.00 GiB .* 7,021$"):
        plan(QWEN3_0_6B, 24 * GiB, context=100_000)
    with pytest.raises(InputError, match=r"max_context_tokens: 256: .*; give more memory$"):
        plan(QWEN3_0_6B, GiB // 8)


def test_the_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = device_memory(CPU)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(devices, "CGROUP_LIMITS", (str(limit), str(tmp_path / "absent")))
    for text, expected in (("max\n", None), (f"{GiB}\n", GiB)):
        limit.write_text(text)
        assert device_memory(CPU) == expected or (expected is None and device_memory(CPU) >= machine)


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """A model of whose context the machine holds 256 tokens, for four requests."""
    torch.manual_seed(1)
    model = Decoder(SMALL).eval()
    token_bytes = 2 * 2 * 1 * 8 * 4
    monkeypatch.setattr(cache_plan, "device_memory", lambda device: int(4 * 300 * token_bytes / CACHE_SHARE))
    return model


def test_all_rows_are_generated_though_few_fit(short_of_memory: Decoder) -> None:
    batch = ContinuousBatch(short_of_memory, 32)
    assert (batch.count, batch.context) == (4, context_len(short_of_memory)) == (4, 256)
    rows = [Row(list(range(1, 5 + n)), 5) for n in range(9)]
    generate(short_of_memory, rows)
    assert [len(row.generated) for row in rows] == [5] * 9
    with pytest.raises(InputError, match="prompt: 300 tokens; the model takes 1 to 256"):
        generate(short_of_memory, [Row([1] * 300, 5)])
