"""What a person may set: `params.yaml`, checked once, then trusted.

Values come from two files: `components/scales.yaml` (what each scale derives) and
`params.yaml` (what a person overrides). The classes below give type, meaning and
bounds, and no values: DVC watches the files, so no default may hide in code.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Scale = Literal["smoke", "laptop", "gpu", "cluster"]
Family = Literal["decoder", "encoder", "encoder_decoder"]
SCALES_FILE = Path(__file__).with_name("scales.yaml")


class InputError(ValueError):
    """Wrong input that its giver can mend: *where: what, with its value; what is allowed or what to run*."""


class Refused(Exception):
    """A gate said no (data validation or promotion). The command exits with 3."""


class Section(BaseModel):
    """One section of `params.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _names(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


class CollectConfig(Section):
    """Gathering the raw data into datasets."""

    modules: list[str]
    """Standard-library packages to read (top-level names); empty means all of them."""
    conversations: int = Field(ge=100)
    """Reference training conversations to write."""
    questions: int = Field(ge=10)
    """Held-out questions per suite; each reported figure needs 300 or more to be worth quoting."""
    held_out_share: float = Field(gt=0, lt=0.5)
    """Share of symbols, and of modules, that training never sees; share of rows held out of a user's dataset."""
    validation_share: float = Field(gt=0, lt=0.5)
    """Share of labelled texts and text pairs that training chooses its best weights by."""
    near_duplicate_similarity: float = Field(gt=0.5, le=1)
    """Estimated Jaccard similarity of word 5-grams at which a document counts as a near-duplicate."""


class ValidateConfig(Section):
    """The gate on data."""

    max_failed_share: float = Field(ge=0, le=0.2)
    """Share of rows of a shard that may fail a row-wise expectation before the dataset is refused."""


class TokenizerConfig(Section):
    """Byte-level BPE of one family."""

    vocab_size: int = Field(ge=320, le=262_144)
    """Entries, special tokens and the 256 bytes included."""
    max_documents: int = Field(ge=1)
    """Rows of each dataset sampled to learn merges from."""


class TrainTokenizerConfig(TokenizerConfig):
    """Byte-level BPE: the decoder's, and in sub-sections the other families'."""

    encoder: TokenizerConfig
    encoder_decoder: TokenizerConfig


class EncoderRowsConfig(Section):
    """Rows of the encoder: pairs of sentences, and texts with their labels."""

    seq_len: int = Field(ge=16)
    """Tokens of a row at most, special tokens included; a longer text is cut and counted."""


class EncoderDecoderRowsConfig(Section):
    """Rows of the encoder-decoder: running text, and sources with their targets."""

    seq_len: int = Field(ge=16)
    """Tokens of a piece of running text, and of a source at most; a longer source is cut and counted."""
    target_len: int = Field(ge=8)
    """Tokens of a target at most; a longer one is cut and counted."""


class PrepareConfig(Section):
    """Token rows for training: the decoder's, and in sub-sections the other families'."""

    seq_len: int = Field(ge=32)
    """Tokens per packed row; a longer conversation is dropped and counted, a longer document is cut."""
    copy_share: float = Field(ge=0, lt=1)
    """Share of pretraining rows that practise copying: repeated spans of names and of random tokens."""
    noise_share: float = Field(ge=0, le=1)
    """Share of conversations told once more with random tokens in the names and results that they copy."""
    encoder: EncoderRowsConfig
    encoder_decoder: EncoderDecoderRowsConfig


class EncoderModelConfig(Section):
    """Shape of the encoder."""

    embed_dim: int = Field(ge=8)
    """Width of the residual stream."""
    num_layers: int = Field(ge=1)
    """Blocks."""
    num_heads: int = Field(ge=1)
    """Attention heads; they share embed_dim."""
    hidden_dim: int = Field(ge=8)
    """Inner width of the feed-forward."""
    max_seq_len: int = Field(ge=32)
    """Longest text in tokens, both segments together."""
    dropout: float = Field(ge=0, lt=1)
    """Share of what blocks add that training leaves out."""
    attention_dropout: float = Field(ge=0, lt=1)
    """Share of attention's weights that training leaves out; above 0 training on a CPU takes a slower path."""

    @model_validator(mode="after")
    def _heads_divide(self) -> EncoderModelConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide embed_dim {self.embed_dim}")
        return self


class EncoderDecoderModelConfig(Section):
    """Shape of the encoder-decoder."""

    embed_dim: int = Field(ge=8)
    """Width of the residual stream."""
    num_layers: int = Field(ge=1)
    """Blocks of the encoder."""
    num_decoder_layers: int = Field(ge=1)
    """Blocks of the decoder."""
    num_heads: int = Field(ge=1)
    """Attention heads."""
    head_dim: int = Field(ge=4)
    """Width of one head."""
    hidden_dim: int = Field(ge=8)
    """Inner width of the gated feed-forward."""
    max_seq_len: int = Field(ge=32)
    """Longest source, and longest target, in tokens."""
    dropout: float = Field(ge=0, lt=1)
    """Share of what blocks add, and of attention's weights, that training leaves out."""
    tie_embeddings: bool
    """One matrix for embedding and output head."""


class ModelConfig(Section):
    """Shape of the decoder, and in sub-sections of the other families."""

    embed_dim: int = Field(ge=8)
    """Width of the residual stream."""
    num_layers: int = Field(ge=1)
    """Blocks."""
    num_heads: int = Field(ge=1)
    """Query heads."""
    num_kv_heads: int = Field(ge=1)
    """Key and value heads; fewer than num_heads is grouped-query attention."""
    head_dim: int = Field(ge=4)
    """Width of one head."""
    hidden_dim: int = Field(ge=8)
    """Inner width of the SwiGLU feed-forward."""
    max_seq_len: int = Field(ge=32)
    """Longest context in tokens, prompt and answer together."""
    rope_theta: float = Field(gt=1)
    """Base of the rotary position frequencies."""
    qk_norm: bool
    """RMSNorm on queries and keys: Qwen3's format; without it the format is Llama's."""
    tie_embeddings: bool
    """One matrix for embedding and output head."""
    encoder: EncoderModelConfig
    """Shape of the encoder."""
    encoder_decoder: EncoderDecoderModelConfig
    """Shape of the encoder-decoder."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions need an even width")
        return self


class TrainConfig(Section):
    """What every training stage of the one loop shares."""

    dataset: str | list[str]
    """Name of the dataset, or list of names, to learn from (`loopwright data list`)."""
    optimizer: Literal["adamw", "muon"]
    """muon: Muon on the block matrices, AdamW on embeddings and norms."""
    max_steps: int = Field(ge=1)
    """Optimizer steps."""
    global_batch_size: int = Field(ge=1)
    """Rows per optimizer step."""
    micro_batch_size: int = Field(ge=1)
    """Rows per forward pass; the rest is gradient accumulation."""
    learning_rate: float = Field(gt=0)
    """Peak rate of AdamW."""
    muon_learning_rate: float = Field(gt=0)
    """Peak rate of Muon."""
    warmup_steps: int = Field(ge=0)
    """Linear warm-up."""
    decay_share: float = Field(ge=0, le=1)
    """Last share of the steps in which the rate falls linearly to zero."""
    weight_decay: float = Field(ge=0)
    """Decoupled weight decay on matrices."""
    max_grad_norm: float = Field(gt=0)
    """Gradients are clipped to this global norm."""
    precision: Literal["auto", "fp32", "bf16"]
    """auto: bf16 weights with fp32 masters where the machine multiplies bf16 faster, else fp32."""
    compile: Literal["auto", "on", "off"]
    """torch.compile; auto: on CUDA only."""
    checkpoint_seconds: float = Field(gt=0)
    """Wall time between resumable checkpoints."""
    log_steps: int = Field(ge=1)
    """Steps between progress lines and logged metrics."""

    @model_validator(mode="after")
    def _batches_divide(self) -> TrainConfig:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size: {self.micro_batch_size} does not divide global_batch_size {self.global_batch_size}"
            )
        return self

    @property
    def datasets(self) -> list[str]:
        return _names(self.dataset)


class EncoderPretrainConfig(TrainConfig):
    """Masked language modelling and next-sentence prediction from scratch."""

    masked_share: float = Field(gt=0, lt=1)
    """Share of the tokens that are to be guessed."""
    whole_words: bool
    """Whether the tokens of a word are masked together."""


class EncoderDecoderPretrainConfig(TrainConfig):
    """Span corruption from scratch."""

    corrupted_share: float = Field(gt=0, lt=1)
    """Share of the tokens that lie in hidden spans."""
    span_length: float = Field(ge=1)
    """Mean tokens of a hidden span."""


class FineTuneConfig(TrainConfig):
    """What the stages share that start from a model: which one, and how much of it learns."""

    base: str
    """A registered model (NAME@ALIAS, NAME/VERSION) or a model folder to start from; empty: the pretrained one."""
    lora_rank: int = Field(ge=0)
    """Rank of the pairs that learn beside every product of the blocks, all else frozen (LoRA); 0: all weights learn."""
    lora_alpha: float = Field(gt=0)
    """What the pairs add is scaled by lora_alpha / lora_rank."""


class PretrainConfig(TrainConfig):
    """Causal language modelling from scratch, and in sub-sections what the other families are pretrained with."""

    encoder: EncoderPretrainConfig
    """Masked language modelling and next-sentence prediction."""
    encoder_decoder: EncoderDecoderPretrainConfig
    """Span corruption."""

    def of(self, family: Family) -> TrainConfig:
        """What a family is pretrained with."""
        return {"decoder": self, "encoder": self.encoder, "encoder_decoder": self.encoder_decoder}[family]


class ClassifierConfig(FineTuneConfig):
    """Fine-tuning of the pretrained encoder into a classifier."""

    validation_steps: int = Field(ge=1)
    """Steps between two looks at the validation texts."""
    patience: int = Field(ge=1)
    """Looks without a better macro-F1 after which training stops."""
    class_weight_power: float = Field(ge=0, le=1)
    """1: all labels weigh alike however rare, 0: all texts alike, between: between."""
    label_smoothing: float = Field(ge=0, lt=1)
    """Share of each text's label that goes to all labels alike."""
    hidden_share: float = Field(ge=0, lt=1)
    """Share of the tokens shown as [MASK] in training, other ones each time."""
    dropout: float = Field(ge=0, lt=1)
    """Share of what blocks add, and of the pooled vector, that training leaves out."""
    adapt_steps: int = Field(ge=0)
    """Steps of masked language modelling on the training texts before (arXiv 2004.10964); 0: none."""
    masked_share: float = Field(gt=0, lt=1)
    """Share of the tokens that are to be guessed in these steps."""
    trials: int = Field(ge=0)
    """Short trainings to search learning rates and regularisation by; 0: none, the values here are taken."""
    trial_steps: int = Field(ge=1)
    """Steps of each at most; the median rule ends those that fall behind."""


class SummarizerConfig(FineTuneConfig):
    """Fine-tuning of the pretrained encoder-decoder on sources and what is to be written of them."""


class AssessConfig(Section):
    """What classifier and summarizer are measured on."""

    max_texts: int = Field(ge=1)
    """Held-out texts of each suite asked at most."""
    beams: int = Field(ge=1)
    """Targets that the summarizer follows side by side; 1: always the likeliest token."""


class TuneConfig(FineTuneConfig):
    """Instruction tuning of the pretrained base into the agent."""


class FeedbackConfig(Section):
    """Taking in what people said."""

    max_items: int = Field(ge=1)
    """Items that one ingestion takes, into one partition; the rest waits for the next."""
    max_per_voice: int = Field(ge=1)
    """Items of one voice (API key, or user) that 24 hours may bring; what is above is quarantined."""
    improve_after: int = Field(ge=1)
    """Accepted items that no model learned from at which ingestion asks for an improvement."""
    keep_days: int | None = Field(ge=1)
    """Days that a request without feedback stays on record; null: for ever."""


class CurateConfig(Section):
    """From what people said to rows to learn from."""

    held_out_share: float = Field(gt=0, lt=0.9)
    """Share of prompts with feedback that are never trained on: the gate asks them."""
    feedback_share: float = Field(gt=0, lt=1)
    """Share of the learned conversations that are people's; the others are told again from earlier training."""
    noise: float = Field(ge=0, le=1)
    """Share of a correction's repetitions with random tokens in the names and results that it copies."""
    replay: int = Field(ge=1)
    """Conversations of the model's earlier training told again, so that old skills stay."""
    min_corrections: int = Field(ge=1)
    """Corrections from which a skill's wording is people's, not its suite's: the old wording is no longer replayed."""


class AlignConfig(TrainConfig):
    """Learning from people: corrections by instruction tuning, preferences by DPO, lone votes by KTO."""

    trained_share: float = Field(gt=0, le=1)
    """Share of the blocks that learn, the last ones; below 1 the embeddings stay too. Fewer change old skills less."""
    beta: float = Field(gt=0)
    """Strength of the tie to the frozen reference model in DPO and KTO."""
    replay_weight: float = Field(gt=0)
    """How many learned tokens one token of an earlier conversation counts for in the mean loss."""
    preference_weight: float = Field(ge=0)
    """How many learned tokens one preference counts for in the mean loss."""


class JudgeConfig(Section):
    """The gate between a candidate and the champion."""

    max_questions: int = Field(ge=1)
    """Held-out questions per suite at most."""
    false_promotion_rate: float = Field(gt=0, lt=0.5)
    """Chance that a candidate no better than the champion passes, over all skills together."""
    min_corrected: float = Field(ge=0, le=1)
    """Share of a skill's held-out corrections to be answered as corrected before they count as learned."""
    max_fall: float = Field(ge=0, lt=1)
    """Share of a skill's held-out questions that may be lost without more ado."""
    fall_rate: float = Field(gt=0, lt=0.5)
    """Error rate of the test that calls a larger fall real."""


class EvaluateConfig(Section):
    """What the agent is measured on."""

    batch_size: int = Field(ge=1)
    """Questions answered side by side."""
    max_questions: int = Field(ge=1)
    """Questions per suite at most."""
    max_new_tokens: int = Field(ge=8)
    """Tokens per model turn at most."""
    documents_tokens: int = Field(ge=256)
    """Held-out tokens read for bits per byte."""
    shots: list[Annotated[int, Field(ge=0)]]
    """Numbers of solved examples before a question at which the agent is measured too."""
    shot_questions: int = Field(ge=0)
    """Questions per suite asked so; 0: none."""


ModelTool = Literal["classifier", "summarizer"]
"""Registered models that can be tools of the agent."""


class McpServer(Section):
    """An MCP server whose tools the agent may call: started here by `command`, or reached at `url`."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")
    """Its tools are called NAME_TOOL."""
    command: str | None = None
    """Program to start, that speaks on its standard input and output."""
    args: list[str] | None = None
    """The program's arguments."""
    env: dict[str, str] | None = None
    """Environment of the program beside PATH, HOME and the like; $NAME stands for a variable of ours."""
    url: str | None = Field(default=None, pattern=r"^https?://")
    """Address of a server that speaks streamable HTTP."""

    @model_validator(mode="after")
    def _one_way(self) -> McpServer:
        if (self.command is None) == (self.url is None):
            raise ValueError(f"{self.name}: give either command (with args, env) or url")
        if self.url is not None and (self.args or self.env):
            raise ValueError(f"{self.name}: args and env belong to command, not to url")
        return self


class ServeConfig(Section):
    """The prediction endpoint."""

    backend: Literal["engine", "openai"]
    """Who makes the tokens: the engine in this process, or another server that speaks OpenAI's chat API."""
    int8: bool
    """Round the weights to int8 on a CPU, where the model passes for itself rounded; faster from some millions of
    parameters on."""
    backend_url: str | None
    """Of that server, up to and with `/v1`; its key, where it wants one, is in `LOOPWRIGHT_BACKEND_KEY`."""
    backend_model: str | None
    """What that server calls the model."""
    max_body_bytes: int = Field(ge=1024)
    """Larger request bodies are answered with 413."""
    max_new_tokens: int = Field(ge=1)
    """Tokens per model turn where the request sets no limit."""
    max_steps: int = Field(ge=1)
    """Model turns per answer; the last one may not call a tool."""
    max_running: int = Field(ge=1)
    """Requests that are answered at the same time, a step of the model for all of them."""
    max_waiting: int = Field(ge=1)
    """Requests that may wait for a slot before 429."""
    request_seconds: float = Field(gt=0)
    """Time for one answer: one that has no slot by then is answered with 503, one that is being written ends there."""
    follow_seconds: float = Field(gt=0)
    """Time between looks at the registry alias."""
    model_tools: list[ModelTool]
    """Registered models that the agent may call, each while it has a champion."""
    mcp_servers: list[McpServer]
    """Servers whose tools the agent may call beside its own; needs the extra `mcp`."""
    mcp_call_seconds: float = Field(gt=0)
    """Longest wait for a tool of theirs; then the model is told so."""
    max_texts: int = Field(ge=1)
    """Texts of one request to classify or embed; more are answered with 413."""
    max_correction_characters: int = Field(ge=1)
    """Longer corrections and comments are answered with 413."""
    max_prompt_characters: int = Field(ge=1)
    """Longer conversations are refused before anything is made of them."""
    requests_per_minute: int = Field(ge=1)
    """Requests that one API key may send, where the key has no limit of its own; more are answered with 429."""
    allowed_origins: list[str]
    """Web pages of these origins (`https://host`) may call the endpoint from a browser; others may not."""
    traces: Literal["off", "mlflow"]
    """Where the steps of answers are traced, beside their record in the store."""
    trace_share: float = Field(ge=0, le=1)
    """Share of the answers that are traced."""


class Params(Section):
    """All of `params.yaml`, resolved."""

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
        if self.prepare.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"prepare.seq_len: {self.prepare.seq_len} exceeds model.max_seq_len {self.model.max_seq_len}"
            )
        return self


@dataclass(frozen=True)
class Paths:
    """Where a project keeps things; the outs of `dvc.yaml` under the names the code uses."""

    root: Path

    @property
    def home(self) -> Path:
        """The state folder: databases, logs, checkpoints; never an out of DVC."""
        return (self.root / os.environ.get("LOOPWRIGHT_HOME", "var")).resolve()

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def expectations(self) -> Path:
        return self.root / "data/expectations"

    @property
    def added(self) -> Path:
        """Datasets a user brought with `data add`."""
        return self.root / "data/added"

    @property
    def collected(self) -> Path:
        """One folder per dataset, written by `collect`."""
        return self.root / "data/collected"

    @property
    def knowledge(self) -> Path:
        """The agent's facts: symbols, relations and a search index."""
        return self.root / "data/knowledge.sqlite"

    @property
    def validation(self) -> Path:
        return self.root / "data/validation"

    def tokenizer(self, family: Family) -> Path:
        return self.root / "data/tokenizer" / family

    def tokens(self, family: Family) -> Path:
        """One folder of rows per objective, written by `prepare`."""
        return self.root / "data/tokens" / family

    def base(self, family: Family) -> Path:
        """The pretrained model of a family."""
        return self.root / "data/models/base" / family

    def imported(self, family: Family) -> Path:
        """Where a run puts the model that `tune.base` and its like name; the folder is there without one too."""
        return self.root / "data/imported" / family

    def start_of(self, family: Family) -> Path:
        """The model that fine-tuning starts from: the imported one where one was named, or the pretrained one."""
        imported = self.imported(family)
        return imported if (imported / "config.json").is_file() else self.base(family)

    @property
    def agent(self) -> Path:
        return self.root / "data/models/agent"

    @property
    def classifier(self) -> Path:
        return self.root / "data/models/classifier"

    @property
    def summarizer(self) -> Path:
        return self.root / "data/models/summarizer"

    @property
    def evaluation(self) -> Path:
        return self.root / "data/evaluation"

    def assessment(self, name: str) -> Path:
        """What `assess` asked a model, and what it said."""
        return self.root / "data/assessment" / name

    @property
    def feedback(self) -> Path:
        """What people said, taken in: one immutable Parquet partition per ingestion, and `withdrawn.json`."""
        return self.root / "data/feedback"

    @property
    def champion(self) -> Path:
        """The model that a candidate must beat, fetched from the registry; no out of a stage."""
        return self.root / "data/models/champion"

    @property
    def start(self) -> Path:
        """The model that an improvement starts from: the champion, or an earlier one that learned nothing withdrawn."""
        return self.root / "data/models/start"

    @property
    def candidate(self) -> Path:
        return self.root / "data/models/candidate"

    @property
    def curated(self) -> Path:
        """Feedback as rows to learn from, and prompts to judge by."""
        return self.root / "data/curated"

    @property
    def judged(self) -> Path:
        return self.root / "data/judged"

    @property
    def metrics(self) -> Path:
        return self.root / "data/metrics"


def find_root(start: Path | None = None) -> Path:
    """The project folder: the nearest one upwards that has a `dvc.yaml` and a `params.yaml`."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "params.yaml").is_file():
            return folder
    raise InputError(f"{start}: no Loopwright project here or above (no dvc.yaml with params.yaml); run inside a clone")


def load_params(path: Path, overrides: dict[str, Any] | None = None) -> Params:
    """Read `params.yaml` over the values of its scale.

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
    values = _merge(_merge(scales["all"], scales[scale]), given, where=path.name)
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path.name}: {_first_error(error)}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
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
    """`over` wins key by key, in sections and their sub-sections."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(base.get(key), dict):
            if value is not None and not isinstance(value, dict):
                raise InputError(f"{where}: {key}: expected a section, found {value!r}")
            merged[key] = _merge(base[key], value or {}, where)
        else:
            merged[key] = value
    return merged


def _first_error(error: ValidationError) -> str:
    """`section.key: value: reason`, from the first of pydantic's errors."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key; see components/config.py for the keys of each section"
    value = "" if isinstance(first["input"], (dict, BaseModel)) else f"{first['input']!r}: "
    return f"{place}: {value}{reason}" if place else f"{value}{reason}"
