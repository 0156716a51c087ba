"""How a sentence-transformers folder makes one vector of a text's tokens: its modules.json and what that names.

Shapes: B batch, T tokens, E embed_dim.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from components.config.params import InputError
from components.models.config_fields import Fields

MODULES = "modules.json"
SENTENCE_FILES = (MODULES, "sentence_bert_config.json", "config_sentence_transformers.json")
"""Files of such a folder beside its model; folders of modules.json have a config.json each."""
Mode = Literal["cls", "mean", "max", "mean_sqrt_len"]
_MODES: dict[str, Mode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
}
_UNSUPPORTED_MODES = ("pooling_mode_weightedmean_tokens", "pooling_mode_lasttoken")


@dataclass(frozen=True)
class SentencePooling:
    """What stands between the vectors of a text's tokens and its own."""

    mode: Mode = "mean"
    normalize: bool = True
    """Whether vectors are brought to length 1."""
    max_seq_len: int | None = None
    """Tokens of a text that are read; None: as many as the model reads."""
    lowercase: bool = False
    strip: bool = False
    """Whether white space around a text is left out, as sentence-transformers does."""

    def text(self, text: str) -> str:
        """A text as the tokenizer is given it."""
        stripped = text.strip() if self.strip else text
        return stripped.lower() if self.lowercase else stripped

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Vectors (B, E), float32, of hidden (B, T, E) where mask (B, T) is not 0."""
        if self.mode == "cls":
            pooled = hidden[:, 0].float()
        elif self.mode == "max":
            pooled = hidden.float().masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(1)
        else:
            weight = mask.unsqueeze(-1).to(hidden.dtype)
            count = weight.sum(1).clamp(min=1)
            pooled = (hidden.float() * weight).sum(1) / (count if self.mode == "mean" else count.sqrt())
        return F.normalize(pooled, dim=-1) if self.normalize else pooled


def read_pooling(folder: Path) -> SentencePooling:
    """The pooling of a model folder; the mean, normalized, where it has no modules.json.

    Raises: InputError when a file is missing or unreadable, or asks for what is not computed.
    """
    if not (folder / MODULES).is_file():
        return SentencePooling()
    modules = _read(folder / MODULES, list)
    kinds = [_kind(folder / MODULES, module) for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise InputError(
            f"{folder / MODULES}: type: {', '.join(kinds)} is not supported; allowed: Transformer, Pooling, Normalize"
        )
    if modules[0].get("path"):
        raise InputError(f"{folder / MODULES}: path: {modules[0]['path']!r} of the Transformer is not supported; '' is")
    sizes = _optional(folder / "sentence_bert_config.json")
    _optional(folder / "config_sentence_transformers.json").choice("default_prompt_name", False, [False])
    return SentencePooling(
        _mode(_pooling_config(folder, modules[1])),
        kinds[-1] == "Normalize",
        sizes.whole("max_seq_length", 0) or None,
        sizes.choice("do_lower_case", False, [True, False]),
        strip=True,
    )


def pooling_files(folder: Path) -> dict[str, Path]:
    """The files that say how a folder pools, by their path in it; none where it has no modules.json.

    Raises: InputError as `read_pooling`.
    """
    if not (folder / MODULES).is_file():
        return {}
    read_pooling(folder)
    files = {name: folder / name for name in SENTENCE_FILES if (folder / name).is_file()}
    path = _pooling_config(folder, _read(folder / MODULES, list)[1]).path
    return files | {str(path.relative_to(folder)): path}


def _kind(path: Path, module: Any) -> str:
    kind = module.get("type") if isinstance(module, dict) else None
    if not isinstance(kind, str):
        raise InputError(f"{path}: {module!r} has no type")
    return kind.rpartition(".")[2]


def _pooling_config(folder: Path, module: dict[str, Any]) -> Fields:
    name = module.get("path")
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise InputError(f"{folder / MODULES}: path: {name!r} of the Pooling is not a folder next to it")
    path = folder / name / "config.json"
    return Fields(path, _read(path, dict))


def _mode(fields: Fields) -> Mode:
    if "pooling_mode" in fields.values:  # of newer versions
        names = ("cls", "mean", "max", "mean_sqrt_len_tokens")
        return cast(Mode, fields.choice("pooling_mode", "mean", names).removesuffix("_tokens"))
    for name in _UNSUPPORTED_MODES:
        fields.choice(name, False, [False])
    modes = [name for name in _MODES if fields.choice(name, False, [True, False])]
    if len(modes) != 1:
        named = " and ".join(modes) or "no pooling mode"
        raise InputError(f"{fields.path}: {named} is not supported; one of {', '.join(_MODES)}")
    return _MODES[modes[0]]


def _optional(path: Path) -> Fields:
    return Fields(path, _read(path, dict) if path.is_file() else {})


def _read(path: Path, kind: type) -> Any:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found; the sentence-transformers folder is incomplete") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable: {error}") from None
    if not isinstance(read, kind):
        raise InputError(f"{path}: a {type(read).__name__}, not a {kind.__name__}")
    return read
