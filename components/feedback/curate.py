"""Stage `curate`: what people said, as rows to learn from and prompts to judge by.

A correction is a demonstration, and a preference over the answer that it corrects; a thumb alone is a vote. Prompts
are held out, never rows: whatever is said of a held-out prompt is kept from training and asked by the gate. Older
conversations are told again beside them, so that old skills stay.

    demonstrations/  preferences/    datasets; a row's id is the feedback's, test rows are held out
    sft/  replay/  preferences-rows/ token rows of the demonstrations, of earlier conversations, of the preferences
    curated.json                     per skill: corrections, how many are held out, whether they overrule its wording
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.config.params import InputError
from components.datasets.formats import DatasetWriter, Row, Split, read_info, read_rows, write_json
from components.feedback.items import Item, answered, prompt_key, read_items, skill_of
from components.runtime.stage import StageRun
from components.token_rows.augmentation import Piece, with_token_noise
from components.token_rows.packing import RowWriter, id_type, pack_rows, write_rows_file
from components.token_rows.preference_rows import write_preferences
from components.tokenization.chat_tokenizer import ChatTokenizer
from components.tokenization.hf_tokenizer import load_chat_tokenizer

FEEDBACK = "feedback"
"""The name in `align.dataset` that means what people said; any other is a dataset that a user added."""
MAX_TOLD = 40
"""A demonstration is told so many times at most, however few there are."""


@dataclass(frozen=True)
class TrainingExample:
    """One thing to learn from, whoever said it."""

    id: str
    key: str
    """Digest of the prompt: lessons of one key are on one side of the split."""
    skill: str
    demonstration: Row | None
    preference: Row | None


def curate(run: StageRun) -> None:
    """Write data/curated from data/feedback, or from the preference sets that `align.dataset` names.

    Raises: InputError when there is nothing to learn from.
    """
    said = [lesson for name in run.params.align.datasets for lesson in _lessons(run, name)]
    gone = _withdrawn(run.paths.feedback)
    lessons = [lesson for lesson in said if lesson.id not in gone]
    if not lessons:
        raise InputError(
            f'{run.paths.feedback}: nothing to learn from; collect feedback and run "loopwright feedback ingest"'
        )
    # What was withdrawn keeps its place in the order, so that no other prompt changes sides.
    held_out = hold_out(said, run.params.curate.held_out_share, run.params.seed)
    run.paths.curated.mkdir(parents=True, exist_ok=True)
    train = [lesson for lesson in lessons if lesson.key not in held_out]
    test = [lesson for lesson in lessons if lesson.key in held_out]
    _write_datasets(run.paths.curated, train, test)
    skills = _skills(train, test, run.params.curate.min_corrections)
    tokenizer = load_chat_tokenizer(run.paths.start)
    counts = _write_rows(run, tokenizer, train, {name for name, facts in skills.items() if facts["overruled"]})
    facts = {"skills": skills, "feedback": sorted(lesson.id for lesson in train), "rows": counts}
    write_json(run.paths.curated / "curated.json", facts)
    write_json(run.paths.metrics / "curate.json", {"train": len(train), "held_out": len(test), **counts})
    run.tracker.metrics({"train": float(len(train)), "held_out": float(len(test))})
    run.progress(1, 1, train=str(len(train)), held_out=str(len(test)))


def hold_out(lessons: Sequence[TrainingExample], share: float, seed: int) -> set[str]:
    """Keys of the held-out prompts: of each skill, one of every 1/share new prompts in the order they came.

    Which one of them is a fixed pseudo-random choice. So the share is kept also among few, and a prompt never
    changes sides when more come.
    """
    block = max(2, round(1 / share))
    seen: dict[str, list[str]] = {}
    for lesson in lessons:
        keys = seen.setdefault(lesson.skill, [])
        if not any(lesson.key in others for others in seen.values()):
            keys.append(lesson.key)
    chosen: set[str] = set()
    for skill, keys in seen.items():
        for start in range(0, len(keys), block):
            digest = hashlib.blake2b(f"{seed}:{skill}:{start}".encode(), digest_size=8).digest()
            chosen.update(keys[start + int.from_bytes(digest, "big") % block :][:1])
    return chosen


def _lessons(run: StageRun, name: str) -> Iterator[TrainingExample]:
    if name == FEEDBACK:
        yield from map(training_example_of, read_items(run.paths.feedback))
        return
    folder = run.paths.added / name
    info = read_info(folder)
    if info.kind != "preferences":
        raise InputError(f"params.yaml: align.dataset: {name!r} holds {info.kind}; align learns from preferences")
    for row in read_rows(folder, "train"):
        yield TrainingExample(str(row["id"]), prompt_key(row["prompt"]), name, None, row)


def _withdrawn(folder: Path) -> set[str]:
    """Ids of the items that people revoked, or replaced by a later vote."""
    path = folder / "withdrawn.json"
    return set(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else set()


def training_example_of(item: Item) -> TrainingExample:
    """What one vote teaches."""
    context, tools = answered(item), item.tools
    said: Row = {"role": "assistant", "content": item.answer}
    demonstration: Row | None = None
    preference: Row | None = None
    if item.correction is not None:
        better: Row = {"role": "assistant", "content": item.correction}
        demonstration = {"id": item.feedback_id, "messages": [*context, better], "tools": tools, "suite": None}
        if item.correction != item.answer:
            preference = {"prompt": context, "chosen": [better], "rejected": [said]}
    else:
        # An unpaired label is on all that the model did for it, calls included.
        did = [*context[len(item.messages) :], said]
        liked, disliked = (did, None) if item.rating == "up" else (None, did)
        preference = {"prompt": list(item.messages), "chosen": liked, "rejected": disliked}
    if preference is not None:
        preference |= {"id": item.feedback_id, "tools": tools}
    return TrainingExample(item.feedback_id, prompt_key(item.messages), item.skill, demonstration, preference)


def _write_datasets(folder: Path, train: Sequence[TrainingExample], test: Sequence[TrainingExample]) -> None:
    with (
        DatasetWriter(folder / "demonstrations", "demonstrations", "conversations") as demonstrations,
        DatasetWriter(folder / "preferences", "preferences", "preferences") as preferences,
    ):
        sides: tuple[tuple[Split, Sequence[TrainingExample]], ...] = (("train", train), ("test", test))
        for split, lessons in sides:
            for lesson in lessons:
                if lesson.demonstration is not None:
                    suite = f"feedback/{lesson.skill}" if split == "test" else None
                    demonstrations.write(split, {**lesson.demonstration, "suite": suite})
                # A held-out correction is judged by its words; its preference would count the same prompt twice.
                if lesson.preference is not None and (split == "train" or lesson.demonstration is None):
                    preferences.write(split, lesson.preference)


def _skills(
    train: Sequence[TrainingExample], test: Sequence[TrainingExample], min_corrections: int
) -> dict[str, dict[str, Any]]:
    """Per skill: corrections, how many are held out, votes, and whether its old wording no longer holds."""
    changes = Counter(
        lesson.skill for lesson in (*train, *test) if lesson.demonstration is not None and lesson.preference is not None
    )
    held_out = Counter(lesson.skill for lesson in test if lesson.demonstration is not None)
    votes = Counter(lesson.skill for lesson in (*train, *test) if lesson.demonstration is None)
    return {
        skill: {
            "corrections": changes[skill],
            "held_out": held_out[skill],
            "votes": votes[skill],
            "overruled": changes[skill] >= min_corrections,
        }
        for skill in sorted({lesson.skill for lesson in (*train, *test)})
    }


def _write_rows(run: StageRun, tokenizer: ChatTokenizer, train: Sequence[TrainingExample], overruled: set[str]) -> Row:
    """The token rows of everything that is trained on; returns how many there are of each."""
    seq_len = run.params.prepare.decoder.seq_len
    random = np.random.default_rng(run.params.seed)
    replay = list(_replay(run, tokenizer, overruled, random))
    chats = [(row["messages"], row["tools"]) for lesson in train if (row := lesson.demonstration)]
    demonstrations = [_last_turn(*piece) for piece in tokenizer.encode_chats(chats)]
    told = list(_told(demonstrations, replay, run, tokenizer, random))
    too_long = _pack(run, "sft", tokenizer, told, random) + _pack(run, "replay", tokenizer, replay, random)
    preferences = (lesson.preference for lesson in train if lesson.preference is not None)
    aligned = write_preferences(run.paths.curated / "preferences-rows", "train", tokenizer, preferences, seq_len)
    return {
        "replayed": len(replay),
        "demonstrations": len(demonstrations),
        "pairs": aligned["pairs"],
        "votes": aligned["votes"],
        "too_long": too_long + aligned["too_long"],
    }


def _pack(
    run: StageRun, name: str, tokenizer: ChatTokenizer, pieces: Sequence[Piece], random: np.random.Generator
) -> int:
    """Pack shuffled pieces into rows; returns how many were too long for one."""
    folder = run.paths.curated / name
    folder.mkdir(exist_ok=True)
    writer = RowWriter(folder, "train", run.params.prepare.decoder.seq_len, id_type(tokenizer))
    too_long = pack_rows((pieces[number] for number in random.permutation(len(pieces))), writer)
    writer.close()
    write_rows_file(folder, tokenizer, writer.seq_len, {"train": writer})
    return too_long


def _replay(
    run: StageRun, tokenizer: ChatTokenizer, overruled: set[str], random: np.random.Generator
) -> Iterator[Piece]:
    """Earlier conversations; of a skill whose wording people overruled, the calls alone are learned again."""
    folders = [run.paths.collected / name for name in run.params.tune.datasets]
    sizes = [read_info(folder).rows.get("train", 0) for folder in folders]
    count = min(run.params.curate.replay, sum(sizes))
    wanted = set(random.choice(sum(sizes), count, replace=False).tolist())
    rows = [row for number, row in enumerate(_all_rows(folders)) if number in wanted]
    encoded = tokenizer.encode_chats([(row["messages"], row["tools"]) for row in rows])
    for row, (ids, mask) in zip(rows, encoded, strict=True):
        if skill_of(row["messages"]) in overruled:
            mask = _but_last_turn(mask)
        yield ids, mask
        noisy = (
            with_token_noise(ids, random, tokenizer)
            if random.random() < run.params.prepare.decoder.token_noise_rate
            else None
        )
        if noisy:
            yield noisy, mask


def _all_rows(folders: Iterable[Path]) -> Iterator[Row]:
    for folder in folders:
        yield from read_rows(folder, "train", ["messages", "tools"])


def _told(
    demonstrations: Sequence[Piece],
    replay: Sequence[Piece],
    run: StageRun,
    tokenizer: ChatTokenizer,
    random: np.random.Generator,
) -> Iterator[Piece]:
    """The demonstrations, as often as gives them their share of the tokens, mostly with noise in what they copy.

    A few dozen corrections of one kind share names that could be learned by heart; random ones can only be copied.
    """
    share = run.params.curate.feedback_share
    tokens = sum(len(ids) for ids, _ in demonstrations)
    wanted = share / (1 - share) * sum(len(ids) for ids, _ in replay)
    times = min(MAX_TOLD, max(1, round(wanted / tokens))) if tokens else 0
    for number in range(times):
        for ids, mask in demonstrations:
            noisy = (
                with_token_noise(ids, random, tokenizer)
                if number and random.random() < run.params.curate.noise
                else None
            )
            yield noisy or ids, mask


def _last_turn(ids: list[int], mask: list[int]) -> Piece:
    """Only the last turn is learned: a correction says what should be answered, not that the calls were right."""
    start = _last_start(mask)
    return ids, [learned if place >= start else 0 for place, learned in enumerate(mask)]


def _but_last_turn(mask: list[int]) -> list[int]:
    start = _last_start(mask)
    return [learned if place < start else 0 for place, learned in enumerate(mask)]


def _last_start(mask: list[int]) -> int:
    """Where the last run of learned tokens begins: the model's last turn, whatever opens one."""
    stop = max((place for place, learned in enumerate(mask) if learned), default=-1)
    return 1 + max((place for place in range(stop) if not mask[place]), default=-1)
