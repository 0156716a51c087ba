"""Exact and near-duplicate removal, and the split that keeps every evaluation row out of training.

Near-duplicates are found by MinHash over word 5-grams (Broder 1997) with locality-sensitive
hashing (Indyk and Motwani 1998). Memory holds only hashes: about 2 KB a document, never its text. Data beyond that
goes by disk_splits.py, which decides the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from components.config.params import InputError
from components.datasets.formats import DatasetWriter, Kind, Row, Split
from components.media.messages import IMAGE
from components.media.pictures import decode_picture
from components.media.similarity import PictureIndex, Thumbnails, thumbnails

SHINGLE_WORDS = 5
MAX_SHINGLES = 4096  # of a longer document, those with the smallest hashes: the same choice in every near-copy
PERMUTATIONS = 128
EXACT_KINDS = ("conversations", "images")
"""Kinds that are compared exactly alone."""
_BLOCK = 256  # shingles permuted at once, so that the work stays in the processor's cache
_MAX_CANDIDATES = 32  # compared per band; bounds the cost of boilerplate that a whole corpus shares

Hashes = NDArray[np.uint64]
Signature = NDArray[np.uint32]


class Duplicates:
    """An index of hashes of texts, which finds duplicates.

    Held-out rows come first, then `seal` is called: a duplicate of one of them is `in_test` from then on.
    """

    def __init__(self, similarity: float, seed: int = 0, exact_only: bool = False) -> None:
        self.similarity = similarity
        self.exact_only = exact_only
        self._min_hash = MinHash(similarity, seed)
        self._exact: dict[int, bool] = {}  # digest -> whether it is held out
        self._signatures: list[Signature] = []
        self._buckets = Buckets()
        self._held_out = 0
        self._sealed = False

    def seal(self) -> None:
        """All rows so far are held out; only the first call counts."""
        if self._sealed:
            return
        self._held_out = len(self._signatures)
        self._sealed = True

    def reason(self, text: str) -> str | None:
        """None for a new text, which is added to the index; else `exact_duplicate`, `near_duplicate` or `in_test`."""
        normal = normalized(text, self.exact_only)
        digest = hash_text(normal)
        known = self._exact.get(digest)
        if known is not None:
            return "in_test" if known and self._sealed else "exact_duplicate"
        signature = None if self.exact_only else self._min_hash.signature(normal)
        if signature is not None:
            reason = self._near(signature)
            if reason:
                return reason
        self._exact[digest] = not self._sealed
        return None

    def _near(self, signature: Signature) -> str | None:
        """`near_duplicate` or `in_test`; None for a new signature, which is added to the index."""
        keys = self._min_hash.band_keys(signature)
        close = [
            index
            for index in self._buckets.candidates(keys)
            if are_close(self._signatures[index], signature, self.similarity)
        ]
        if close:
            return "in_test" if min(close) < self._held_out else "near_duplicate"
        index = len(self._signatures)
        self._signatures.append(signature)
        self._buckets.add(keys, index)
        return None


class Buckets:
    """Documents by the keys of their bands."""

    def __init__(self) -> None:
        self._documents: dict[int, int | list[int]] = {}  # a list only where there are several

    def candidates(self, keys: Iterable[int]) -> set[int]:
        """The documents that share a key."""
        candidates: set[int] = set()
        for key in keys:
            documents = self._documents.get(key, [])
            candidates.update(documents if isinstance(documents, list) else [documents])
        return candidates

    def add(self, keys: Iterable[int], index: int) -> None:
        for key in keys:
            documents = self._documents.get(key)
            if documents is None:
                self._documents[key] = index
            elif isinstance(documents, int):
                self._documents[key] = [documents, index]
            elif len(documents) < _MAX_CANDIDATES:
                documents.append(index)

    def remove(self, key: int) -> None:
        """Forget a key that no later document has."""
        self._documents.pop(key, None)


class MinHash:
    """Signatures of texts, and the keys of their bands."""

    def __init__(self, similarity: float, seed: int = 0) -> None:
        self._rows_per_band, self._bands = _banding(similarity)
        random = np.random.default_rng(seed)
        self._multipliers = random.integers(0, 2**64, PERMUTATIONS, dtype=np.uint64) | np.uint64(1)
        self._offsets = random.integers(0, 2**64, PERMUTATIONS, dtype=np.uint64)

    def signature(self, normal: str) -> Signature | None:
        """Of a normalized text; None of one that is compared exactly alone, because it is short."""
        shingles = _shingles(normal)
        return None if shingles is None else self.of_set(shingles)

    def of_set(self, shingles: Hashes) -> Signature:
        """The smallest hash of the set under each permutation: two sets agree in a share equal to their Jaccard."""
        smallest = np.full(PERMUTATIONS, 2**64 - 1, dtype=np.uint64)
        for start in range(0, len(shingles), _BLOCK):
            block = shingles[start : start + _BLOCK, None] * self._multipliers + self._offsets  # modulo 2**64
            np.minimum(smallest, block.min(axis=0), out=smallest)
        return (smallest >> np.uint64(32)).astype(np.uint32)

    def band_keys(self, signature: Signature) -> list[int]:
        bands = signature[: self._bands * self._rows_per_band].reshape(self._bands, self._rows_per_band)
        return [
            int.from_bytes(hashlib.blake2b(b"%d:" % i + band.tobytes(), digest_size=8).digest())
            for i, band in enumerate(bands)
        ]


def are_close(first: Signature, second: Signature, similarity: float) -> bool:
    return bool(np.count_nonzero(first == second) >= similarity * PERMUTATIONS)


def normalized(text: str, exact_only: bool) -> str:
    """What is equal in exact duplicates."""
    return " ".join((text if exact_only else text.casefold()).split())


class Splits:
    """Writes the splits of datasets of one kind: the test rows of all, then the training rows that equal none.

    Documents, labelled texts and the sources of pairs are compared exactly and nearly, conversations exactly. A
    conversation with the question of a test conversation, whatever its answer, is in the test split; one with pictures
    when it asks the question of near-duplicates of the test row's pictures.
    """

    def __init__(self, kind: Kind, similarity: float, seed: int = 0) -> None:
        self._duplicates = Duplicates(similarity, seed, exact_only=kind in EXACT_KINDS)
        self._test_questions: set[int] = set()
        self._test_pictures = PictureQuestions()

    def write_held_out(self, split: Split, rows: Iterable[Row], writer: DatasetWriter) -> None:
        """Write the new rows of a held-out split: the test rows of all datasets first, training rows last."""
        if split == "validation":
            self._duplicates.seal()
        for row in rows:
            reason = self._duplicates.reason(content(row))
            if reason:
                writer.drop(reason)
                continue
            writer.write(split, row)
            if row.get("images"):
                self._test_pictures.add(row)
            elif "messages" in row:
                self._test_questions.add(hash_text(question(row)))

    def write_train(self, rows: Iterable[Row], writer: DatasetWriter) -> None:
        """Write the rows that are new and equal no test row; count the rest in the writer.

        Raises: InputError when nothing is left to train on.
        """
        self._duplicates.seal()
        for row in rows:
            reason = "in_test" if self._asks_in_test(row) else self._duplicates.reason(content(row))
            if reason:
                writer.drop(reason)
            else:
                writer.write("train", row)
        refuse_without_training_rows(writer)

    def finish(self) -> None:
        """All rows are written already."""

    def _asks_in_test(self, row: Row) -> bool:
        if row.get("images"):
            return row in self._test_pictures
        return bool(self._test_questions) and hash_text(question(row)) in self._test_questions


class PictureQuestions:
    """The questions of test rows, each with the pictures that it is about: those of the last message with any.

    Turn by turn, for a training row may ask in one conversation what test rows ask one by one.
    """

    def __init__(self) -> None:
        self._index = PictureIndex()

    def add(self, row: Row) -> None:
        for key, small in _picture_questions(row, lambda key: True):
            self._index.add(key, small)

    def __contains__(self, row: Row) -> bool:
        """Whether the row asks a question of near-duplicates of the pictures that a test row asks it of."""
        return any(self._index.near(key, small) for key, small in _picture_questions(row, self._index.__contains__))


def _picture_questions(row: Row, matters: Callable[[int], bool]) -> Iterator[tuple[int, Thumbnails]]:
    """(hash of the words, thumbnails) of each turn of the user that matters, where there are pictures.

    Raises: InputError for a picture that cannot be read.
    """
    after, shown, small = 0, slice(0), None
    for message in row["messages"]:
        content = message["content"] or ""
        if marks := content.count(IMAGE):
            shown, small = slice(after, after + marks), None
            after += marks
        key = hash_text(" ".join(content.replace(IMAGE, " ").split()))
        files = row["images"][shown]
        if message["role"] == "user" and files and matters(key):
            if small is None:
                small = thumbnails([decode_picture(file, f"row {row['id']}: picture") for file in files])
            yield key, small


def question(row: Row) -> str:
    """A conversation's system and user turns."""
    return _joined(message["content"] or "" for message in row["messages"] if message["role"] in ("system", "user"))


def hash_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def content(row: Row) -> str:
    """The content of a row without its id."""
    if "messages" not in row:
        return str(row["source" if "target" in row else "text"])
    parts = [hashlib.sha256(image).hexdigest() for image in row.get("images") or ()]
    parts.append(row.get("tools") or "")
    for message in row["messages"]:
        parts += [message["role"], message["content"] or ""]
        for call in message.get("tool_calls") or []:
            parts += [call["function"]["name"], call["function"]["arguments"]]
    return _joined(parts)


def _joined(parts: Iterable[str]) -> str:
    return " ".join(" ".join(part.split()) + "\x00" for part in parts)


def refuse_without_training_rows(writer: DatasetWriter) -> None:
    """Raises: InputError when nothing is left to train on."""
    if not writer.info.rows.get("train"):
        counts = {"test": writer.info.rows.get("test", 0), **writer.info.dropped}
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(f"{writer.info.name}: no row left to train on ({shown}); add more rows")


def _shingles(normal: str) -> Hashes | None:
    """Hashes of the set of 5-grams, at most MAX_SHINGLES; None for a text shorter than one."""
    words = normal.split(" ")
    if len(normal) > 24 * len(words):  # written without spaces, as Chinese is: characters take the place of words
        units = np.frombuffer(normal.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    else:
        units = np.array([crc32(word.encode("utf-8", "surrogatepass")) for word in words], dtype=np.uint64)
    if len(units) < SHINGLE_WORDS:
        return None
    count = len(units) - SHINGLE_WORDS + 1
    grams = np.zeros(count, dtype=np.uint64)
    for offset in range(SHINGLE_WORDS):
        grams = _mixed(grams ^ units[offset : offset + count])
    grams = np.unique(grams)  # sorted: the smallest come first
    return grams[:MAX_SHINGLES]


def _mixed(values: Hashes) -> Hashes:
    """The finalizer of SplitMix64: each input bit changes every output bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Hashes = values ^ (values >> np.uint64(31))
    return mixed


def _banding(similarity: float) -> tuple[int, int]:
    """(rows per band, bands) that make 99 % of pairs of this similarity meet in one band."""
    if similarity >= 1:
        return 16, 1
    rows = min(16, max(3, int(math.log(0.3) / math.log(similarity))))
    bands = math.ceil(math.log(0.01) / math.log(1 - similarity**rows))
    return rows, min(bands, PERMUTATIONS // rows)
