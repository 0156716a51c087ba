"""Packed rows hold every token once, in order, with the mask of the chat template."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from components.config.params import InputError, load_params
from components.config.paths import Paths
from components.datasets import formats
from components.datasets.formats import DatasetWriter, Row
from components.runtime.stage import StageRun, digest
from components.token_rows.augmentation import FIRST_ID, copy_augmented_rows, with_token_noise
from components.token_rows.packing import RowWriter, fill_rows, pack_rows
from components.token_rows.prepare import prepare
from components.tokenization import chat_tokenizer as bpe
from components.tokenization.hf_tokenizer import load_chat_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [f"def name_{number}(value): return value + {number}\n" * (number % 4 + 1) for number in range(40)]


class Silent:
    """A tracker that keeps nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def chat(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def run(tmp_path: Path) -> StageRun:
    overrides = {
        "scale": "smoke",
        "prepare.decoder.seq_len": 64,
        "pretrain.decoder.dataset": "docs",
        "tune.dataset": "chats",
    }
    paths = Paths(tmp_path)
    with DatasetWriter(paths.collected / "docs", "docs", "documents") as writer:
        for number, text in enumerate(TEXTS):
            writer.write("test" if number % 8 == 0 else "train", {"id": str(number), "text": text, "source": "here"})
    with DatasetWriter(paths.collected / "chats", "chats", "conversations") as writer:
        for number in range(20):
            row = chat(f"what is {number}?", "long " * 99 if number == 7 else f"it is {number}")
            writer.write("train", {"id": str(number), **row})
    bpe.save(bpe.train(TEXTS, 400), paths.tokenizer("decoder"))
    return StageRun(
        "prepare@decoder", load_params(ROOT / "params.yaml", overrides), paths, tmp_path / "state", Silent()
    )


def read(folder: Path, split: str) -> dict[str, np.ndarray]:
    facts = json.loads((folder / "rows.json").read_text())
    shape = (facts["rows"][split], facts["seq_len"])
    kinds = {"ids": facts["dtype"], "segments": "uint16", "mask": "uint8"}
    return {name: np.fromfile(folder / f"{split}.{name}.bin", kind).reshape(shape) for name, kind in kinds.items()}


def test_documents_come_back_whole_and_in_order(run: StageRun) -> None:
    prepare(run)
    tokenizer = load_chat_tokenizer(run.paths.tokenizer("decoder"))
    rows = read(run.paths.tokens("decoder") / "pretrain", "test")
    ids = rows["ids"][rows["segments"] > 0].tolist()
    assert tokenizer.decode(ids) == "".join(TEXTS[::8])
    assert ids.count(tokenizer.document_id) == ids.count(tokenizer.end_id) == len(TEXTS[::8])


def test_conversations_are_whole_and_masked_by_the_template(run: StageRun) -> None:
    prepare(run)
    tokenizer = load_chat_tokenizer(run.paths.tokenizer("decoder"))
    rows = read(run.paths.tokens("decoder") / "tune", "train")
    found = []
    for ids, segments, mask in zip(rows["ids"], rows["segments"], rows["mask"], strict=True):
        for number in range(1, segments.max() + 1):
            here = segments == number
            found.append((ids[here].tolist(), mask[here].tolist()))
    expected = [tokenizer.encode_chat(chat(f"what is {n}?", f"it is {n}")["messages"]) for n in range(20) if n != 7]
    assert sorted(found) == sorted(expected)


def test_conversations_too_long_for_a_row_are_counted(run: StageRun) -> None:
    prepare(run)
    assert json.loads((run.paths.metrics / "prepare@decoder.json").read_text())["tune"]["too_long"] == 1


def test_preparing_twice_gives_the_same_bytes(run: StageRun) -> None:
    prepare(run)
    first = {path: path.read_bytes() for path in run.paths.tokens("decoder").rglob("*.*")}
    prepare(run)
    assert first == {path: path.read_bytes() for path in run.paths.tokens("decoder").rglob("*.*")}


def test_a_dataset_of_the_wrong_kind_is_named(run: StageRun) -> None:
    params = load_params(
        ROOT / "params.yaml", {"scale": "smoke", "pretrain.decoder.dataset": "chats", "tune.dataset": "chats"}
    )
    with pytest.raises(
        InputError,
        match=r"pretrain.decoder.dataset: 'chats' holds conversations; pretrain.decoder trains on documents",
    ):
        prepare(StageRun("prepare@decoder", params, run.paths, run.state, run.tracker))


def test_rows_too_short_for_every_conversation_are_refused(run: StageRun) -> None:
    overrides = {"scale": "smoke", "pretrain.decoder.dataset": "docs", "tune.dataset": "long"}
    with DatasetWriter(run.paths.collected / "long", "long", "conversations") as writer:
        writer.write("train", {"id": "1", **chat("why?", "because " * 500)})
    with pytest.raises(InputError, match=r"tune.dataset: nothing to learn in its rows of 256 tokens \(1 too_long\)"):
        prepare(
            StageRun("prepare@decoder", load_params(ROOT / "params.yaml", overrides), run.paths, run.state, run.tracker)
        )


def test_a_long_document_goes_on_in_the_next_row(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path, "train", seq_len=4, dtype="uint16")
    fill_rows([[1, 2, 3], [4, 5, 6, 7, 8, 9]], writer)
    assert writer.close() == {"rows": 3, "tokens": 9, "learned": 7}
    assert np.fromfile(tmp_path / "train.ids.bin", "uint16").tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0]
    assert np.fromfile(tmp_path / "train.segments.bin", "uint16").tolist() == [1, 1, 1, 2, 1, 1, 1, 1, 1, 0, 0, 0]
    assert np.fromfile(tmp_path / "train.mask.bin", "uint8").tolist() == [0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0]


def test_packing_wastes_little(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pieces = [([9] * size, [1] * size) for size in random.integers(10, 90, size=2_000).tolist()]
    writer = RowWriter(tmp_path, "train", seq_len=256, dtype="uint16")
    assert pack_rows(pieces, writer) == 0
    writer.close()
    assert writer.tokens == sum(len(ids) for ids, _ in pieces)
    assert writer.tokens / (writer.rows * 256) > 0.97


def test_copy_augmentation_masks_repetitions_alone(run: StageRun) -> None:
    tokenizer = load_chat_tokenizer(run.paths.tokenizer("decoder"))
    for row in copy_augmented_rows(["json.dumps", "OrderedDict"], tokenizer, count=8, seq_len=64, seed=0):
        for ids, mask in row:
            for place in (place for place, learned in enumerate(mask) if learned):
                pair = ids[place - 1 : place + 1]
                assert any(ids[start : start + 2] == pair for start in range(1, place - 1))


def test_token_noise_changes_every_copy_of_a_span_alike(run: StageRun) -> None:
    tokenizer = load_chat_tokenizer(run.paths.tokenizer("decoder"))
    call = {"function": {"name": "lookup", "arguments": {"symbol": "value.name_3"}}}
    messages = [
        {"role": "user", "content": "what is value.name_3"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "a def of name"},
        {"role": "assistant", "content": "a def of name"},
    ]
    ids, mask = tokenizer.encode_chat(messages)
    noisy = with_token_noise(ids, np.random.default_rng(0), tokenizer)
    assert noisy is not None
    name, result = (tokenizer.encode(text) for text in (" value.name_3", " a def of name"))
    groups = []
    for span in (name, result):
        places = [at for at in range(len(ids)) if ids[at : at + len(span)] == span]
        assert len(places) == 2
        groups.append([noisy[at : at + len(span)] for at in places])
        assert groups[-1][0] == groups[-1][1] != span
    assert all(new == old for new, old in zip(noisy, ids, strict=True) if old < FIRST_ID)
    assert len(noisy) == len(mask)


def test_a_conversation_that_copies_nothing_has_no_noisy_twin(run: StageRun) -> None:
    tokenizer = load_chat_tokenizer(run.paths.tokenizer("decoder"))
    ids, _ = tokenizer.encode_chat(chat("how are you?", "fine")["messages"])
    assert with_token_noise(ids, np.random.default_rng(0), tokenizer) is None


def test_shards_hold_what_one_file_holds_and_a_killed_stage_goes_on(
    run: StageRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two stages, one of them broken off at its third shard, write the same bytes; every document is there once."""
    monkeypatch.setattr(formats, "ROWS_PER_SHARD", 10)
    monkeypatch.setattr(formats, "ROWS_PER_GROUP", 10)
    with DatasetWriter(run.paths.collected / "docs", "docs", "documents") as writer:
        for number, text in enumerate(TEXTS):
            writer.write("test" if number % 8 == 0 else "train", {"id": str(number), "text": text, "source": "here"})
    loads = []

    def load(folder: Path) -> bpe.ChatTokenizer:
        loads.append(folder)
        if len(loads) == 4:  # the first is the stage's own
            raise KeyboardInterrupt
        return load_chat_tokenizer(folder)

    with monkeypatch.context() as patch:
        patch.setattr("components.token_rows.prepare.load_chat_tokenizer", load)
        with pytest.raises(KeyboardInterrupt):
            prepare(run)
        loads.clear()
        loads.extend([Path()] * 10)
        prepare(run)
    assert len(loads) == 10 + 8, "for five of seven shards, and the stage's own three"
    broken = digest(run.paths.tokens("decoder"))
    prepare(replace(run, state=tmp_path / "other-state"))
    assert digest(run.paths.tokens("decoder")) == broken
    tokenizer = load_chat_tokenizer(run.paths.tokenizer("decoder"))
    rows = read(run.paths.tokens("decoder") / "pretrain", "train")
    documents = tokenizer.decode(rows["ids"][rows["segments"] > 0].tolist())
    assert documents.startswith("".join(text for number, text in enumerate(TEXTS) if number % 8))
