"""The parameters of `params.yaml`, validated when they are read.

Values come from `components/config/scales.yaml` (defaults of each scale), the project's own `scales`, and `params.yaml`
(overrides). The classes of `model_settings` and `loop_settings` give type, meaning and bounds, and no defaults: DVC
watches the files, so that no default may be in code.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from components.config.errors import InputError as InputError
from components.config.errors import Refused as Refused
from components.config.loop_settings import (
    AlignConfig,
    AssessConfig,
    CurateConfig,
    EvaluateConfig,
    FeedbackConfig,
    JudgeConfig,
    KeepConfig,
    RunConfig,
    ServeConfig,
)
from components.config.model_settings import (
    ClassifierConfig,
    CollectConfig,
    ConnectConfig,
    Family,
    FineTuneConfig,
    ModelConfig,
    PrepareConfig,
    PretrainConfig,
    PretrainVisionConfig,
    Section,
    SummarizerConfig,
    TrainConfig,
    TrainTokenizerConfig,
    TuneConfig,
    ValidateConfig,
)
from components.config.project import DEFAULT_PROJECT, load_project, module_path

Scale = Literal["smoke", "laptop", "gpu", "cluster"]

FAMILIES: tuple[Family, ...] = get_args(Family)
FAMILY_OF_SECTION: Mapping[str, Family] = {
    "tune": "decoder",
    "classifier": "encoder",
    "summarizer": "encoder_decoder",
}
"""Sections of params.yaml that fine-tune a model of one family."""
BY_FAMILY = ("train_tokenizer", "prepare", "model", "pretrain")
"""Sections that have a sub-section for each family."""
RENAMED: Mapping[str, str] = {
    "classifier.hidden_share": "classifier.token_dropout",
    "prepare.copy_share": "prepare.decoder.copy_rate",
    "prepare.decoder.copy_share": "prepare.decoder.copy_rate",
    "prepare.noise_share": "prepare.decoder.token_noise_rate",
    "prepare.decoder.noise_share": "prepare.decoder.token_noise_rate",
    "feedback.keep_days": "keep.request_days",
    "feedback.max_per_voice": "feedback.max_items_per_user",
}
"""Earlier names of keys: each is refused with the present one."""

SCALES_FILE = Path(__file__).with_name("scales.yaml")


class Params(Section):
    """All of `params.yaml`, resolved."""

    project: str
    """The module with the project's own datasets, tools, held-out suites and smoke questions."""
    project_path: str
    """Its folder or file, by which DVC sees an edit of it; `loopwright run` writes it where `project` has changed."""
    scale: Scale
    """The one dial: every value below is derived from it unless set."""
    seed: int = Field(ge=0)
    """Seed of all random generators."""
    collect: CollectConfig
    validate_: ValidateConfig = Field(alias="validate")
    train_tokenizer: TrainTokenizerConfig
    prepare: PrepareConfig
    model: ModelConfig
    pretrain: PretrainConfig
    pretrain_vision: PretrainVisionConfig
    connect: ConnectConfig
    tune: TuneConfig
    classifier: ClassifierConfig
    summarizer: SummarizerConfig
    assess: AssessConfig
    evaluate: EvaluateConfig
    feedback: FeedbackConfig
    keep: KeepConfig
    run: RunConfig
    curate: CurateConfig
    align: AlignConfig
    judge: JudgeConfig
    serve: ServeConfig

    @model_validator(mode="after")
    def _rows_fit(self) -> Params:
        seq_len, longest = self.prepare.decoder.seq_len, self.model.decoder.max_seq_len
        if seq_len > longest:
            raise ValueError(f"prepare.decoder.seq_len: {seq_len} exceeds model.decoder.max_seq_len {longest}")
        return self

    @property
    def datasets(self) -> dict[str, list[str]]:
        """Names of the datasets that each section trains on, by the section's dotted name."""
        pretrained: dict[str, TrainConfig] = {f"pretrain.{name}": getattr(self.pretrain, name) for name in FAMILIES}
        return {name: config.datasets for name, config in (pretrained | self.fine_tuned).items()}

    def datasets_of(self, family: Family) -> list[str]:
        """Names of the datasets that a family trains on, without duplicates."""
        sections = [f"pretrain.{family}", *(name for name, of in FAMILY_OF_SECTION.items() if of == family)]
        return list(dict.fromkeys(name for section in sections for name in self.datasets[section]))

    @property
    def fine_tuned(self) -> dict[str, FineTuneConfig]:
        """The sections of `FAMILY_OF_SECTION`."""
        return {name: getattr(self, name) for name in FAMILY_OF_SECTION}


def load_params(path: Path, overrides: dict[str, Any] | None = None) -> Params:
    """Read `params.yaml` over the values of its scale and its project.

    `overrides` maps `section.key` (or `section.family.key`, `scale`, `seed`) to a value that wins over the file.

    Raises: InputError naming the file, the key and its value.
    """
    raw = _read_yaml(path)
    for dotted, value in (overrides or {}).items():
        _assign(raw, dotted, value)
    scales = _read_yaml(SCALES_FILE)
    scale = raw.get("scale")
    if scale not in scales or scale == "all":
        raise InputError(f"{path.name}: scale: {scale!r} is not one of smoke, laptop, gpu, cluster")
    raw |= project_of(raw, path)
    project = load_project(raw["project"], path.parent)
    values = _merge(scales["all"], scales[scale])
    for section in ("all", scale):
        values = _merge(values, dict(project.scales.get(section, {})), where=f"{project.name}.scales")
    values = _merge(values, raw, where=path.name)
    for section in FAMILY_OF_SECTION:
        values[section] = _following(values[section], raw.get(section) or {})
    written = raw.get("align") or {}
    follow = [name for name in values["align"]["follow_base"] if written.get(name) is None]
    values["align"] = values["align"] | {"follow_base": follow}
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path.name}: {_first_error(error, values)}") from error


def read_value(dotted: str, text: str) -> Any:
    """The value that a text has as YAML under `section.key`."""
    value, raw = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)
    for key in reversed(dotted.split(".")):
        value, raw = {key: value}, {key: raw}
    value = _strings_unparsed(value, raw, Params)
    for key in dotted.split("."):
        value = value[key]
    return value


def _strings_unparsed(value: Any, text: Any, kind: Any) -> Any:
    """YAML's value, with fields of type string unparsed: a dataset may be called `no`, `null` or `2024_01_31`."""
    if isinstance(value, list) and get_origin(kind) is list:
        return [_strings_unparsed(item, raw, get_args(kind)[0]) for item, raw in zip(value, text, strict=True)]
    if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, BaseModel):
        kinds = {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
        return {key: _strings_unparsed(item, text.get(key), kinds.get(key)) for key, item in value.items()}
    is_none = value is None and (not text or NoneType in get_args(kind))
    return text if _is_text(kind) and not is_none else value


def _is_text(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return all(isinstance(choice, str) for choice in get_args(kind))
    nested = get_origin(kind) in (Union, UnionType, list, dict)
    return kind in (str, NoneType) or (nested and all(map(_is_text, get_args(kind))))


def project_of(values: Mapping[str, Any], path: Path) -> dict[str, str]:
    """`project` and `project_path` of the values of a params.yaml.

    Raises: InputError when they name different modules.
    """
    name = values.get("project") or DEFAULT_PROJECT
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        raise InputError(f"{path.name}: project: {name!r} is not the name of a module")
    expected, declared = module_path(name, path.parent), values.get("project_path")
    if declared and expected and declared != expected:
        raise InputError(
            f"{path.name}: project_path: {declared!r} is not the path of {name}, which is {expected!r};"
            ' "loopwright run" writes it'
        )
    return {"project": name, "project_path": expected or declared or name}


def moved_project(path: Path, overrides: Mapping[str, Any]) -> dict[str, str]:
    """The override of `project_path` that a change of `project` needs."""
    values = _read_yaml(path) | dict(overrides)
    declared = values.pop("project_path", None)
    expected = module_path(project_of(values, path)["project"], path.parent)
    return {"project_path": expected} if expected and expected != declared else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        value = _strings_unparsed(yaml.load(text, yaml.CSafeLoader), yaml.load(text, yaml.CBaseLoader), Params)
    except FileNotFoundError:
        raise InputError(f"{path}: not found; run inside a Loopwright project") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected sections such as 'pretrain:', found {type(value).__name__}")
    return value


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        existing = values.get(section)
        values[section] = dict(existing) if isinstance(existing, dict) else {}
        values = values[section]
    values[key] = value


def _merge(base: dict[str, Any], over: dict[str, Any], where: str = "scales.yaml") -> dict[str, Any]:
    """`over` wins key by key, in sections and their sub-sections; a key without a value leaves the base's.

    In the section `keep` null is a value: never remove.
    """
    merged = dict(base)
    for key, value in over.items():
        if isinstance(base.get(key), dict):
            if value is not None and not isinstance(value, dict):
                raise InputError(f"{where}: {key}: expected a section, found {value!r}")
            merged[key] = {**base[key], **(value or {})} if key == "keep" else _merge(base[key], value or {}, where)
        elif value is not None:
            merged[key] = value
    return merged


def _following(values: dict[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """A section that fine-tunes, where what params.yaml has `written` is a decision, and the scale's values are none.

    What follows from a base has no value that another would have to fit until the stage knows the base.
    """
    follow = values.get("follow_base") or []
    follow = [name for name in follow if values.get("base") and written.get(name) is None]
    values = values | {"follow_base": follow}
    if "micro_batch_size" in follow:
        values["micro_batch_size"] = 1
    elif "global_batch_size" in follow:
        values["global_batch_size"] = values["micro_batch_size"]
    if "min_epochs" in values and ("max_steps" in follow or written.get("max_steps") is not None):
        values["min_epochs"] = 0.0
    return values


def _decoder_keys(section: str) -> Collection[str]:
    """Keys of the section itself in versions without a sub-section per family."""
    by_family: Any = Params.model_fields[section].annotation
    keys: Collection[str] = by_family.model_fields["decoder"].annotation.model_fields
    return keys


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted names."""
    flattened: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flattened |= flat(value, f"{prefix}{key}.")
        else:
            flattened[f"{prefix}{key}"] = value
    return flattened


def _first_error(error: ValidationError, values: Any) -> str:
    """`section.key: value: reason`, from the first of pydantic's errors, or from an error in a part of that value."""
    located = [(_dotted_key(details, values), details) for details in error.errors()]
    within = [(key_path, details) for key_path, details in located if key_path.startswith(located[0][0])]
    key_path, first = max(within, key=lambda entry: len(entry[0]))
    if first["type"] == "extra_forbidden":
        if key_path in RENAMED:
            return f"{key_path}: renamed; write {RENAMED[key_path]}"
        section, _, key = key_path.partition(".")
        if section in BY_FAMILY and key in _decoder_keys(section):
            return f"{key_path}: each family has its own values; write {section}.decoder.{key}"
        return f"{key_path}: unknown key; see components/config/model_settings.py for the keys of each section"
    reasons = dict.fromkeys(details["msg"] for key, details in within if key == key_path)
    reason = " or ".join(reasons).removeprefix("Value error, ").replace(" or Input should be", " or")
    value = "" if isinstance(first["input"], (dict, BaseModel)) else f"{first['input']!r}: "
    return f"{key_path}: {value}{reason}" if key_path else f"{value}{reason}"


def _dotted_key(error: Any, values: Any) -> str:
    """The dotted key of an error in the file: pydantic also names the type of a union that it tried."""
    keys = []
    for part in error["loc"]:
        if isinstance(part, int) and isinstance(values, list):
            keys.append(str(part))
            values = values[part]
        elif isinstance(values, dict) and (part in values or error["type"] == "missing"):
            keys.append(str(part))
            values = values.get(part)
    return ".".join(keys)
