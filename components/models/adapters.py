"""Adapters: the low-rank pairs of a model as a PEFT folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.config.params import InputError
from components.models.base_store import BASE, STORE, read_base
from components.models.encoder import Classifier
from components.models.encoder_decoder import EncoderDecoder
from components.models.formats import hub_tensors
from components.models.lora import LoraSettings, add_lora, lora_of, low_rank_products
from components.models.vision import VisionLanguageModel
from components.models.vision_formats import current_name, module_name
from components.models.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, write_json

_PREFIX = "base_model.model."
"""PEFT's, before each name of a tensor."""
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
"""Fields of adapter_config.json that must be null, false or empty: what they ask for is not computed."""


def write_adapter(model: nn.Module, folder: Path) -> None:
    """Write the pairs of a model, and the modules that were trained fully, as PEFT reads them."""
    settings = lora_of(model)
    assert settings is not None
    tensors: dict[str, Tensor] = {}
    targets: set[str] = set()
    for product, names in low_rank_products(model):
        for name, (a, b) in zip(names, product.pairs(), strict=True):
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            targets.add(re.sub(r"^.*\.\d+\.", "", name))
    modules = [model.get_submodule(name) for name in settings.modules]
    trained = {weight.data_ptr() for module in modules for weight in module.parameters()}
    saved = {name: weight for name, weight in hub_tensors(model) if weight.data_ptr() in trained} if trained else {}
    tensors |= saved
    named = ((module_name(name), weight.detach().float().contiguous().cpu()) for name, weight in tensors.items())
    save_file({f"{_PREFIX}{name}": weight for name, weight in named}, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    task = {EncoderDecoder: "SEQ_2_SEQ_LM", Classifier: "SEQ_CLS"}.get(type(model), "CAUSAL_LM")
    config = {
        "peft_type": "LORA",
        "task_type": task,
        # A path: the name of a version could be someone else's on the hub.
        "base_model_name_or_path": f"var/{STORE}/{settings.base.weights_sha256}" if settings.base else None,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(targets),
        # A vision tower's products have the names of a decoder's.
        "exclude_modules": r".*\bvision_tower\b.*" if isinstance(model, VisionLanguageModel) else None,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in saved}) or None,
    }
    write_json(folder / ADAPTER_CONFIG, config)
    if settings.base is not None:
        write_json(folder / BASE, asdict(settings.base))


@torch.no_grad()
def attach_adapter(model: nn.Module, folder: Path) -> None:
    """Put the pairs of an adapter's folder beside the products of its base.

    Pairs of several ranks become pairs of the largest one, padded with zeros and scaled as each pair was.

    Raises: InputError when the adapter is of another kind or base.
    """
    config, tensors = _read(folder)
    ranks = [len(weight) for name, weight in tensors.items() if name.endswith(".lora_A.weight")]
    if not ranks:
        raise InputError(f"{folder / ADAPTER_WEIGHTS}: has no low-rank pairs; give a LoRA adapter")
    rank, scale = max(ranks), _scale(config, "", config["r"])
    base = read_base(folder) if (folder / BASE).is_file() else None
    targets = dict(hub_tensors(model))
    add_lora(model, rank, scale * rank, (), base)
    for product, names in low_rank_products(model):
        for name, (a, b) in zip(names, product.pairs(), strict=True):
            down, up = (tensors.pop(f"{name}.lora_{half}.weight", None) for half in "AB")
            a.zero_()  # b is zero
            if down is None or up is None:
                continue
            _fits(folder, name, (tuple(down.shape), tuple(up.shape)), ((len(down), a.shape[1]), (len(b), len(down))))
            a[: len(down)] = down
            b[:, : len(down)] = up * (_scale(config, name, len(down)) / scale)
    for name, weight in tensors.items():
        if name not in targets:
            raise InputError(
                f"{folder / ADAPTER_WEIGHTS}: {name}: is no weight of the base; the adapter is of another base"
            )
        _fits(folder, name, (tuple(weight.shape),), (tuple(targets[name].shape),))
        targets[name].copy_(weight)
    copied = {targets[name].data_ptr() for name in tensors}
    full = {path.rpartition(".")[0] for path, weight in model.named_parameters() if weight.data_ptr() in copied}
    model.__dict__["lora"] = LoraSettings(rank, scale * rank, tuple(sorted(full)), base)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json, and the tensors without PEFT's prefix."""
    path, weights = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        values = {"peft_type": config["peft_type"], "bias": config.get("bias", "none"), "r": int(config["r"])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not a readable adapter configuration: {error!r}") from None
    for name, allowed in (("peft_type", "LORA"), ("bias", "none")):
        if values[name] != allowed:
            raise InputError(f"{path}: {name}: {values[name]!r} is not supported; allowed: {allowed!r}")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise InputError(f"{path}: {name}: {config[name]!r} is not supported; train the adapter without it")
    if not weights.is_file():
        raise InputError(f"{weights}: not found; pickled weights are refused, save the adapter as safetensors")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{weights}: corrupt: {error}; fetch or train it again") from None
    return config, {current_name(name.removeprefix(_PREFIX)): weight for name, weight in tensors.items()}


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor of a pair: alpha / rank, or with `use_rslora` alpha / sqrt(rank)."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    alpha = next((patterns[key] for key in patterns if re.fullmatch(rf"(.*\.)?({key})", module)), config["lora_alpha"])
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _fits(folder: Path, name: str, actual: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    if actual != expected:
        raise InputError(
            f"{folder / ADAPTER_WEIGHTS}: {name}: shapes {actual} do not fit the base, which asks for {expected};"
            " the adapter is of another base"
        )
