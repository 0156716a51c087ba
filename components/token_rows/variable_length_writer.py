"""Token rows of variable length on disk (variable_length.py reads them), written without torch: processes that prepare
shards start sooner.

    train.ids.bin  train.segments.bin ...   raw little-endian arrays, one number per token, row after row
    train.ids.ends.bin                      where each row ends in that array (int64); fields of a group share it
    train.label.bin                         one number per row
    rows.json                               rows per split, vocab_size, ids of special tokens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from components.runtime.shards import Output, concatenate

ENDS = np.dtype("<i8")
"""Type of the ends of rows."""
COUNTS = ("rows", "tokens")
"""What a writer counts."""
SPECIAL = 2
"""`starts` of a special token; else 1 where a word starts, and 0 within."""
NO_PAIR = 2
"""`random` of a row with one segment; else 1 where the second is of another document."""


class VariableLengthWriter:
    """Appends rows of one split. `tokens` maps each per-token field to its type, `numbers` each per-row field.

    A field named `a.b` has the lengths of the field `a`.
    """

    def __init__(self, folder: Path, split: str, tokens: Mapping[str, str], numbers: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._types = {name: np.dtype(kind).newbyteorder("<") for name, kind in {**tokens, **numbers}.items()}
        lengths = {f"{name}.ends": ENDS for name in tokens if "." not in name}
        self._files = {name: (folder / f"{split}.{name}.bin").open("wb") for name in (*self._types, *lengths)}
        self._ends = dict.fromkeys(lengths, 0)
        self.rows = 0
        self.tokens = 0

    def add(self, **row: Sequence[int] | int) -> None:
        """One row, by field; a dot in a field's name is written as two underscores."""
        for key, value in row.items():
            name = key.replace("__", ".")
            self._files[name].write(np.asarray(value, self._types[name]).tobytes())
            if f"{name}.ends" in self._ends and not isinstance(value, int):
                self._ends[f"{name}.ends"] += len(value)
                self._files[f"{name}.ends"].write(ENDS.type(self._ends[f"{name}.ends"]).astype(ENDS).tobytes())
                self.tokens += len(value)
        self.rows += 1

    def close(self) -> dict[str, int]:
        """Finish the files; `COUNTS` of the split."""
        for file in self._files.values():
            file.close()
        return {name: getattr(self, name) for name in COUNTS}


def join_variable_length(
    folder: Path,
    splits: Sequence[str],
    outputs: Sequence[Output],
    tokens: Mapping[str, str],
    numbers: Mapping[str, str],
) -> dict[str, int]:
    """Write the arrays of a folder from those of shards, one behind the other; SPLIT_COUNT for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    for split in splits:
        parts = [output for output in outputs if split in output.result["splits"]]
        for name in (*tokens, *numbers):
            file = f"{split}.{name}.bin"
            concatenate(folder / file, [part.folder / file for part in parts])
        for name in (name for name in tokens if "." not in name):
            file, end = f"{split}.{name}.ends.bin", 0
            with (folder / file).open("wb") as out:
                for part in parts:
                    ends = np.fromfile(part.folder / file, ENDS) + end
                    out.write(ends.tobytes())
                    end = int(ends[-1]) if len(ends) else end
        counts |= {f"{split}_{name}": sum(part.result["splits"][split][name] for part in parts) for name in COUNTS}
    return counts
