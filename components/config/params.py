"""What a person may set: `params.yaml`, checked once, then trusted.

Values come from `components/config/scales.yaml` (what each scale derives), the project's own `scales`, and
`params.yaml` (what a person overrides). The classes of `settings` and `loop_settings` give
type, meaning and bounds, and no values: DVC watches the files, so no default may hide in code.
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
from components.config.loop_settings import AlignConfig, CurateConfig, FeedbackConfig, JudgeConfig, ServeConfig
from components.config.model_settings import (
    AssessConfig,
    ClassifierConfig,
    CollectConfig,
    EvaluateConfig,
    Family,
    FineTuneConfig,
    ModelConfig,
    PrepareConfig,
    PretrainConfig,
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
    "feedback.max_per_voice": "feedback.max_items_per_user",
}
"""Earlier names of keys: each is refused with the present one."""

SCALES_FILE = Path(__file__).with_name("scales.yaml")


class Params(Section):
    """All of `params.yaml`, resolved."""

    project: str
    """The module that says what is this project's own: datasets, tools, held-out suites, smoke questions."""
    project_path: str
    """Its folder or file, by which DVC sees an edit of it; `loopwright run` writes it where `project` has changed."""
    scale: Scale
    """The one dial: every value below is derived from it unless set."""
    seed: int = Field(ge=0)
    """Seed of every random choice."""
    collect: CollectConfig
    validate_: ValidateConfig = Field(alias="validate")
    train_tokenizer: TrainTokenizerConfig
    prepare: PrepareConfig
    model: ModelConfig
    pretrain: PretrainConfig
    tune: TuneConfig
    classifier: ClassifierConfig
    summarizer: SummarizerConfig
    assess: AssessConfig
    evaluate: EvaluateConfig
    feedback: FeedbackConfig
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
        """Names of the datasets that each section learns from, by the section's dotted name."""
        pretrained: dict[str, TrainConfig] = {f"pretrain.{name}": getattr(self.pretrain, name) for name in FAMILIES}
        return {name: config.datasets for name, config in (pretrained | self.fine_tuned).items()}

    def datasets_of(self, family: Family) -> list[str]:
        """Names of the datasets that a family learns from, each once."""
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
    given = _read_yaml(path)
    for dotted, value in (overrides or {}).items():
        _assign(given, dotted, value)
    scales = _read_yaml(SCALES_FILE)
    scale = given.get("scale")
    if scale not in scales or scale == "all":
        raise InputError(f"{path.name}: scale: {scale!r} is not one of smoke, laptop, gpu, cluster")
    given |= project_of(given, path)
    project = load_project(given["project"], path.parent)
    values = _merge(scales["all"], scales[scale])
    for place in ("all", scale):
        values = _merge(values, dict(project.scales.get(place, {})), where=f"{project.name}.scales")
    values = _merge(values, given, where=path.name)
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path.name}: {_first_error(error, values)}") from error


def read_value(dotted: str, text: str) -> Any:
    """The value that a text has as YAML under `section.key`."""
    value, written = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)
    for key in reversed(dotted.split(".")):
        value, written = {key: value}, {key: written}
    value = _as_written(value, written, Params)
    for key in dotted.split("."):
        value = value[key]
    return value


def _as_written(value: Any, text: Any, kind: Any) -> Any:
    """YAML's value, with what only text fits as it is written: a dataset may be called `no`, `null` or `2024_01_31`."""
    if isinstance(value, list) and get_origin(kind) is list:
        return [_as_written(one, written, get_args(kind)[0]) for one, written in zip(value, text, strict=True)]
    if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, BaseModel):
        kinds = {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
        return {key: _as_written(one, text.get(key), kinds.get(key)) for key, one in value.items()}
    is_none = value is None and (not text or NoneType in get_args(kind))
    return text if _is_text(kind) and not is_none else value


def _is_text(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return all(isinstance(one, str) for one in get_args(kind))
    nested = get_origin(kind) in (Union, UnionType, list, dict)
    return kind in (str, NoneType) or (nested and all(map(_is_text, get_args(kind))))


def project_of(given: Mapping[str, Any], path: Path) -> dict[str, str]:
    """`project` and `project_path` of what a params.yaml says.

    Raises: InputError when they name different modules.
    """
    name = given.get("project") or DEFAULT_PROJECT
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        raise InputError(f"{path.name}: project: {name!r} is not the name of a module")
    expected, said = module_path(name, path.parent), given.get("project_path")
    if said and expected and said != expected:
        raise InputError(
            f"{path.name}: project_path: {said!r} is not where {name} lies, which is {expected!r};"
            ' "loopwright run" writes it'
        )
    return {"project": name, "project_path": expected or said or name}


def moved_project(path: Path, overrides: Mapping[str, Any]) -> dict[str, str]:
    """The override that `project_path` needs, where a person changed `project` alone."""
    given = _read_yaml(path) | dict(overrides)
    said = given.pop("project_path", None)
    expected = module_path(project_of(given, path)["project"], path.parent)
    return {"project_path": expected} if expected and expected != said else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        value = _as_written(yaml.safe_load(text), yaml.load(text, yaml.BaseLoader), Params)
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
        known = values.get(section)
        values[section] = dict(known) if isinstance(known, dict) else {}
        values = values[section]
    values[key] = value


def _merge(base: dict[str, Any], over: dict[str, Any], where: str = "scales.yaml") -> dict[str, Any]:
    """`over` wins key by key, in sections and their sub-sections; a key without a value leaves the base's."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(base.get(key), dict):
            if value is not None and not isinstance(value, dict):
                raise InputError(f"{where}: {key}: expected a section, found {value!r}")
            merged[key] = _merge(base[key], value or {}, where)
        elif value is not None:
            merged[key] = value
    return merged


def _decoder_keys(section: str) -> Collection[str]:
    """What stood in the section itself before each family had a sub-section."""
    by_family: Any = Params.model_fields[section].annotation
    keys: Collection[str] = by_family.model_fields["decoder"].annotation.model_fields
    return keys


def _first_error(error: ValidationError, values: Any) -> str:
    """`section.key: value: reason`, from the first of pydantic's errors, or what it says of a part of that value."""
    places = [(_place(one, values), one) for one in error.errors()]
    within = [(place, one) for place, one in places if place.startswith(places[0][0])]
    place, first = max(within, key=lambda found: len(found[0]))
    if first["type"] == "extra_forbidden":
        if place in RENAMED:
            return f"{place}: renamed; write {RENAMED[place]}"
        section, _, key = place.partition(".")
        if section in BY_FAMILY and key in _decoder_keys(section):
            return f"{place}: each family has values of its own; write {section}.decoder.{key}"
        return f"{place}: unknown key; see components/config/model_settings.py for the keys of each section"
    reasons = dict.fromkeys(one["msg"] for there, one in within if there == place)
    reason = " or ".join(reasons).removeprefix("Value error, ").replace(" or Input should be", " or")
    value = "" if isinstance(first["input"], (dict, BaseModel)) else f"{first['input']!r}: "
    return f"{place}: {value}{reason}" if place else f"{value}{reason}"


def _place(error: Any, values: Any) -> str:
    """Where an error is, in keys of the file: pydantic also names the type of a union that it tried."""
    place = []
    for part in error["loc"]:
        if isinstance(part, int) and isinstance(values, list):
            place.append(str(part))
            values = values[part]
        elif isinstance(values, dict) and (part in values or error["type"] == "missing"):
            place.append(str(part))
            values = values.get(part)
    return ".".join(place)
