"""Stage `curate`: feedback as training rows, and held-out prompts for the promotion gate.

A correction is a demonstration, and a preference pair over the answer that it corrects; a rating alone is an unpaired
label. Prompts are held out, never rows: all feedback on a held-out prompt is kept from training. Earlier conversations
are replayed, so that the model keeps its skills.

    demonstrations/  preferences/    datasets; a row's id is the feedback's, test rows are held out
    picture-demonstrations/          the same of demonstrations with pictures
    sft/  replay/  preferences-rows/ token rows of the demonstrations, of earlier conversations, of the preferences
    curated.json                     per skill: corrections, how many are held out, whether they supersede its wording;
                                     of pictures: the questions and earlier answers that they supersede
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from components.config.params import InputError
from components.config.paths import CONFIG, CURATED, REVOKED
from components.datasets.formats import DatasetWriter, Row, Split, batched, read_info, read_rows, write_json
from components.datasets.images import complete_messages
from components.feedback.items import (
    NO_CALL,
    PICTURES,
    Item,
    Reworded,
    answered,
    prompt_key,
    read_items,
    read_pictures,
    skill_of,
)
from components.media.messages import pictures_of, with_pictures
from components.media.pictures import Picture, decode_picture, resized
from components.runtime.stage import StageRun
from components.token_rows.augmentation import Piece, with_token_noise
from components.token_rows.packing import RowWriter, id_type, pack_rows, write_rows_file
from components.token_rows.picture_rows import PictureWriter
from components.token_rows.preference_rows import write_preferences
from components.tokenization.chat_tokenizer import ChatTokenizer, read_json
from components.tokenization.hf_tokenizer import load_chat_tokenizer

FEEDBACK = "feedback"
"""The name in `align.dataset` for user feedback; any other is an added dataset."""
HAVE_PICTURES = "have pictures, which the model that training starts from does not read"
"""Why items are set aside."""
EXAMPLES_IN_MEMORY = 64
"""Examples whose pictures are read at a time."""
DEMONSTRATIONS, PICTURE_DEMONSTRATIONS = "demonstrations", "picture-demonstrations"
MAX_REPEATS = 40
"""Repetitions of a demonstration at most, however few there are."""


@dataclass(frozen=True)
class TrainingExample:
    """One example of feedback or of a preference dataset."""

    id: str
    key: str
    """Digest of the prompt: examples of one key are on one side of the split."""
    skill: str
    demonstration: Row | None
    preference: Row | None
    images: Sequence[str] = ()
    """Digests of the prompt's pictures."""


def curate(run: StageRun) -> None:
    """Write data/curated from data/feedback, or from the preference sets that `align.dataset` names.

    Raises: InputError when there are no examples.
    """
    collected = [example for name in run.params.align.datasets for example in _examples(run, name)]
    path = run.paths.feedback / REVOKED
    withdrawn = set(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else set()
    examples = [example for example in collected if example.id not in withdrawn]
    if not examples:
        raise InputError(
            f'{run.paths.feedback}: no training examples; collect feedback and run "loopwright feedback ingest"'
        )
    # Withdrawn items keep their position, so that no other prompt changes sides.
    held_out = hold_out(collected, run.params.curate.held_out_share, run.params.seed)
    run.paths.curated.mkdir(parents=True, exist_ok=True)
    tokenizer = load_chat_tokenizer(run.paths.start)
    set_aside = [] if tokenizer.image_tokens else [example for example in examples if example.images]
    usable = [example for example in examples if tokenizer.image_tokens or not example.images]
    if not usable:
        raise InputError(f"{run.paths.feedback}: all {len(set_aside)} items {HAVE_PICTURES}; collect feedback on texts")
    usable = list(with_their_pictures(run.paths.feedback, usable, _image_size(run)))
    train = [example for example in usable if example.key not in held_out]
    test = [example for example in usable if example.key in held_out]
    _write_datasets(run.paths.curated, train, test)
    skills = _skills(train, test, run.params.curate.min_corrections)
    superseded = {name for name, counts in skills.items() if counts["overruled"]}
    reworded = Reworded()
    if PICTURES in superseded:
        reworded = Reworded.of(_picture_corrections(usable), _earlier_picture_answers(run))
    counts = _write_rows(run, tokenizer, train, superseded, reworded)
    report = {"skills": skills, "feedback": sorted(example.id for example in train), "rows": counts}
    report["reworded"] = reworded.to_json()
    if set_aside:
        report["set_aside"] = {HAVE_PICTURES: sorted(example.id for example in set_aside)}
        counts |= {"set_aside": len(set_aside)}
    write_json(run.paths.curated / CURATED, report)
    write_json(run.paths.metrics / "curate.json", {"train": len(train), "held_out": len(test), **counts})
    run.tracker.metrics({"train": float(len(train)), "held_out": float(len(test))})
    run.progress(1, 1, train=str(len(train)), held_out=str(len(test)))


def hold_out(examples: Sequence[TrainingExample], share: float, seed: int) -> set[str]:
    """Keys of the held-out prompts: of each skill, one of every 1/share new prompts in the order they came.

    The choice within a block is pseudo-random and fixed: small skills keep the share too, and a prompt never changes
    sides when more are added.
    """
    block = max(2, round(1 / share))
    seen: set[str] = set()
    by_skill: dict[str, list[str]] = {}
    for example in examples:
        keys = by_skill.setdefault(example.skill, [])
        if example.key not in seen:
            seen.add(example.key)
            keys.append(example.key)
    chosen: set[str] = set()
    for skill, keys in by_skill.items():
        for start in range(0, len(keys), block):
            digest = hashlib.blake2b(f"{seed}:{skill}:{start}".encode(), digest_size=8).digest()
            index = start + int.from_bytes(digest, "big") % block
            chosen.update(keys[index : index + 1])
    return chosen


def _examples(run: StageRun, name: str) -> Iterator[TrainingExample]:
    if name == FEEDBACK:
        yield from map(training_example_of, read_items(run.paths.feedback))
        return
    folder = run.paths.added / name
    info = read_info(folder)
    if info.kind != "preferences":
        raise InputError(f"params.yaml: align.dataset: {name!r} holds {info.kind}; align learns from preferences")
    for row in read_rows(folder, "train"):
        yield TrainingExample(str(row["id"]), prompt_key(row["prompt"]), name, None, row)


def training_example_of(item: Item) -> TrainingExample:
    context, tools = answered(item), item.tools
    answer: Row = {"role": "assistant", "content": item.answer}
    demonstration: Row | None = None
    preference: Row | None = None
    if item.correction is not None:
        better: Row = {"role": "assistant", "content": item.correction}
        demonstration = {"id": item.feedback_id, "messages": [*context, better], "tools": tools, "suite": None}
        if item.correction != item.answer:
            preference = {"prompt": context, "chosen": [better], "rejected": [answer]}
    else:
        # An unpaired label covers all of the model's turns, calls included.
        turns = [*context[len(item.messages) :], answer]
        chosen, rejected = (turns, None) if item.rating == "up" else (None, turns)
        preference = {"prompt": list(item.messages), "chosen": chosen, "rejected": rejected}
    if preference is not None:
        preference |= {"id": item.feedback_id, "tools": tools}
    key = prompt_key(item.messages, item.images)
    return TrainingExample(item.feedback_id, key, item.skill, demonstration, preference, item.images)


def _image_size(run: StageRun) -> int:
    """Height and width of the pictures that the start model reads; 0 where it reads text alone."""
    return int(read_json(run.paths.start / CONFIG).get("vision_config", {}).get("image_size", 0))


def with_their_pictures(folder: Path, examples: Iterable[TrainingExample], size: int = 0) -> Iterator[TrainingExample]:
    """Examples of `data/feedback`, their messages with pictures (`Picture`) in `images` where there are some.

    Pictures have `size` pixels a side, unless it is 0: photographs of many votes would fill the memory.

    Raises: InputError when the folder lacks a picture.
    """
    for group in batched(examples, EXAMPLES_IN_MEMORY):
        files = read_pictures(folder, {image for example in group for image in example.images})
        for example in group:
            if not example.images:
                yield example
                continue
            pictures = [decode_picture(files[image], f"{folder}: {image}") for image in example.images]
            pictures = [Picture(resized(picture, size)) for picture in pictures] if size else pictures
            demonstration, preference = example.demonstration, example.preference
            if demonstration is not None:
                demonstration = {**demonstration, "messages": with_pictures(demonstration["messages"], pictures)}
            if preference is not None:
                preference = {**preference, "prompt": with_pictures(preference["prompt"], pictures)}
            yield replace(example, demonstration=demonstration, preference=preference)


def _write_datasets(folder: Path, train: Sequence[TrainingExample], test: Sequence[TrainingExample]) -> None:
    with (
        DatasetWriter(folder / DEMONSTRATIONS, DEMONSTRATIONS, "conversations") as demonstrations,
        DatasetWriter(folder / PICTURE_DEMONSTRATIONS, PICTURE_DEMONSTRATIONS, "images") as pictured,
        DatasetWriter(folder / "preferences", "preferences", "preferences") as preferences,
    ):
        sides: tuple[tuple[Split, Sequence[TrainingExample]], ...] = (("train", train), ("test", test))
        for split, examples in sides:
            for example in examples:
                if example.demonstration is not None:
                    suite = f"feedback/{example.skill}" if split == "test" else None
                    writer = pictured if example.images else demonstrations
                    writer.write(split, {**_stored(example.demonstration), "suite": suite})
                # A held-out correction is evaluated as a demonstration; its pair would count the prompt twice.
                is_compared = split == "train" or example.demonstration is None
                if example.preference is not None and is_compared and not example.images:
                    preferences.write(split, example.preference)


def _stored(demonstration: Row) -> Row:
    """A demonstration as a row of its dataset: pictures as files, in order, beside the messages."""
    messages = [{key: message[key] for key in message if key != "images"} for message in demonstration["messages"]]
    return {**demonstration, "messages": messages, "images": [p.png() for p in pictures_of(demonstration["messages"])]}


def _skills(
    train: Sequence[TrainingExample], test: Sequence[TrainingExample], min_corrections: int
) -> dict[str, dict[str, Any]]:
    """Per skill: corrections, how many are held out, ratings, and whether its old wording is superseded."""
    changes = Counter(
        example.skill
        for example in (*train, *test)
        if example.demonstration is not None and example.preference is not None
    )
    held_out = Counter(example.skill for example in test if example.demonstration is not None)
    votes = Counter(example.skill for example in (*train, *test) if example.demonstration is None)
    return {
        skill: {
            "corrections": changes[skill],
            "held_out": held_out[skill],
            "votes": votes[skill],
            "overruled": changes[skill] >= min_corrections,
        }
        for skill in sorted({example.skill for example in (*train, *test)})
    }


def _picture_corrections(examples: Iterable[TrainingExample]) -> Iterator[tuple[str, str, str]]:
    """Question, answer and correction of each corrected answer about pictures."""
    for example in examples:
        if example.skill == PICTURES and example.demonstration and example.preference:
            *context, better = example.demonstration["messages"]
            question = next(message["content"] for message in reversed(context) if message["role"] == "user")
            yield question, example.preference["rejected"][0]["content"], better["content"]


def _earlier_picture_answers(run: StageRun) -> Iterator[str]:
    for folder in (run.paths.collected / name for name in run.params.tune.datasets):
        if read_info(folder).kind == "images":
            for row in read_rows(folder, "train", ["messages"]):
                yield from (message["content"] for message in row["messages"] if message["role"] == "assistant")


def _write_rows(
    run: StageRun, tokenizer: ChatTokenizer, train: Sequence[TrainingExample], superseded: set[str], reworded: Reworded
) -> Row:
    """Write the token rows of all training data; returns their counts."""
    seq_len = run.params.prepare.decoder.seq_len
    random = np.random.default_rng(run.params.seed)
    sft, replay = _Rows(run, "sft", tokenizer), _Rows(run, "replay", tokenizer)
    replayed = list(_replay(run, replay, superseded, reworded, random))
    chats = [(row["messages"], row["tools"]) for example in train if (row := example.demonstration)]
    demonstrations = [_last_turn(*piece) for piece in sft.pieces(chats)]
    repeated = list(_repeated(demonstrations, replayed, run, tokenizer, random))
    too_long = sft.pack(repeated, random) + replay.pack(replayed, random)
    preferences = (example.preference for example in train if example.preference is not None)
    rows = _Rows(run, "preferences-rows", tokenizer)
    aligned = write_preferences(rows.folder, "train", tokenizer, preferences, seq_len, rows.pictures)
    return {
        "replayed": len(replayed),
        "demonstrations": len(demonstrations),
        "pairs": aligned["pairs"],
        "votes": aligned["votes"],
        "too_long": too_long + aligned["too_long"],
    }


class _Rows:
    """A folder of token rows, with pictures where the model reads them."""

    def __init__(self, run: StageRun, name: str, tokenizer: ChatTokenizer) -> None:
        self.folder, self.tokenizer = run.paths.curated / name, tokenizer
        self.folder.mkdir(exist_ok=True)
        self._seq_len = run.params.prepare.decoder.seq_len
        size = _image_size(run)
        self.pictures = PictureWriter(self.folder, tokenizer, size) if size else None

    def pieces(self, chats: Sequence[tuple[Sequence[Row], Any]]) -> list[Piece]:
        """Ids and masks of `(messages, tools)`."""
        pieces = self.tokenizer.encode_chats(chats)
        if self.pictures is None:
            return pieces
        named = zip(pieces, chats, strict=True)
        return [self.pictures.piece(piece, pictures_of(messages)) for piece, (messages, _) in named]

    def pack(self, pieces: Sequence[Piece], random: np.random.Generator) -> int:
        """Pack shuffled pieces into rows; returns how many were too long for one."""
        writer = RowWriter(self.folder, "train", self._seq_len, id_type(self.tokenizer), self.pictures)
        too_long = pack_rows((pieces[number] for number in random.permutation(len(pieces))), writer)
        writer.close()
        pictures = self.pictures.close() if self.pictures is not None else None
        write_rows_file(self.folder, self.tokenizer, writer.seq_len, {"train": writer.rows}, pictures)
        return too_long


def _replay(
    run: StageRun, target: _Rows, superseded: set[str], reworded: Reworded, random: np.random.Generator
) -> Iterator[Piece]:
    """Earlier conversations; of a skill whose wording is superseded, only the calls are trained on.

    A conversation about pictures asks of several things: of it, what is not `reworded`.
    """
    named = [run.paths.collected / name for name in run.params.tune.datasets]
    folders = [folder for folder in named if target.pictures or read_info(folder).kind != "images"]
    sizes = [read_info(folder).rows.get("train", 0) for folder in folders]
    count = min(run.params.curate.replay, sum(sizes))
    chosen = set(random.choice(sum(sizes), count, replace=False).tolist())
    rows = (read_rows(folder, "train") for folder in folders)
    sampled = [row for number, row in enumerate(chain.from_iterable(rows)) if number in chosen]
    pieces = (
        piece
        for group in batched(sampled, EXAMPLES_IN_MEMORY)
        for piece in target.pieces([(complete_messages(row), row["tools"]) for row in group])
    )
    for row, (ids, mask) in zip(sampled, pieces, strict=True):
        skill = skill_of(row["messages"])
        if row.get("images") and skill == NO_CALL:
            mask = reworded.left_out_of(mask, row["messages"])
        elif skill in superseded:
            start = _last_start(mask)
            mask = mask[:start] + [0] * (len(mask) - start)
        yield ids, mask
        noisy = (
            with_token_noise(ids, random, target.tokenizer)
            if random.random() < run.params.prepare.decoder.token_noise_rate and not row.get("images")
            else None
        )
        if noisy:
            yield noisy, mask


def _repeated(
    demonstrations: Sequence[Piece],
    replay: Sequence[Piece],
    run: StageRun,
    tokenizer: ChatTokenizer,
    random: np.random.Generator,
) -> Iterator[Piece]:
    """The demonstrations, repeated up to their share of the tokens, mostly with token noise in what they copy.

    A few dozen corrections of one kind share names that could be memorized; random ones can only be copied.
    """
    share = run.params.curate.feedback_share
    tokens = sum(len(ids) for ids, _ in demonstrations)
    target = share / (1 - share) * sum(len(ids) for ids, _ in replay)
    times = min(MAX_REPEATS, max(1, round(target / tokens))) if tokens else 0
    for number in range(times):
        for ids, mask in demonstrations:
            noisy = (
                with_token_noise(ids, random, tokenizer)
                if number and random.random() < run.params.curate.noise and max(ids) < tokenizer.vocab_size
                else None
            )
            yield noisy or ids, mask


def _last_turn(ids: list[int], mask: list[int]) -> Piece:
    """Train on the last turn alone: a correction is of the answer, and says nothing of the calls."""
    start = _last_start(mask)
    return ids, [0] * start + mask[start:]


def _last_start(mask: list[int]) -> int:
    """Index of the model's last turn: the first token of the mask's last run of ones."""
    stop = max((index for index, trained in enumerate(mask) if trained), default=-1)
    return 1 + max((index for index in range(stop) if not mask[index]), default=-1)
