"""Sections of `params.yaml` for data, training and evaluation: type, meaning and bounds of each value.

There are no defaults here: values are in files that DVC watches (components/config/params.py).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Family = Literal["decoder", "encoder", "encoder_decoder"]
Checkpointing = Literal["none", "selective", "full"]


class Section(BaseModel):
    """One section of `params.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class CollectConfig(Section):
    """Collection of the raw data into datasets."""

    modules: list[str]
    """Parts of its source that the project reads, by the project's names; empty means all."""
    conversations: int = Field(ge=100)
    """Training conversations that the project generates, where their number is free."""
    questions: int = Field(ge=10)
    """Held-out questions per suite; a figure needs 300 or more to be reliable."""
    held_out_share: float = Field(gt=0, lt=0.5)
    """Share of rows held out for testing, of added datasets and of what a project holds out."""
    validation_share: float = Field(gt=0, lt=0.5)
    """Share of labelled texts and text pairs for validation, by which training chooses its best weights."""
    near_duplicate_similarity: float = Field(gt=0.5, le=1)
    """Estimated Jaccard similarity of word 5-grams at which a document counts as a near-duplicate."""


class ValidateConfig(Section):
    """Data validation."""

    max_failed_share: float = Field(ge=0, le=0.2)
    """Share of rows of a shard that may fail a row-wise expectation before the dataset is refused."""


class TokenizerConfig(Section):
    """Byte-level BPE of one family."""

    vocab_size: int = Field(ge=320, le=262_144)
    """Entries, special tokens and the 256 bytes included."""
    max_documents: int = Field(ge=1)
    """Rows of each dataset sampled for training merges."""


class TrainTokenizerConfig(Section):
    """Byte-level BPE, by family."""

    decoder: TokenizerConfig
    encoder: TokenizerConfig
    encoder_decoder: TokenizerConfig

    def of(self, family: Family) -> TokenizerConfig:
        config: TokenizerConfig = getattr(self, family)
        return config


class DecoderRowsConfig(Section):
    """Rows of the decoder: packed documents and conversations."""

    seq_len: int = Field(ge=32)
    """Tokens per packed row; a longer conversation is dropped and counted, a longer document is cut."""
    copy_rate: float = Field(ge=0, lt=1)
    """Copy augmentation: share of pretraining rows with repeated spans of names and of random tokens."""
    token_noise_rate: float = Field(ge=0, le=1)
    """Token-noise augmentation: share of conversations repeated with random tokens in what they copy."""


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
    """Token rows for training, by family."""

    decoder: DecoderRowsConfig
    encoder: EncoderRowsConfig
    encoder_decoder: EncoderDecoderRowsConfig


class BlocksConfig(Section):
    """Shape of blocks whose heads share embed_dim."""

    embed_dim: int = Field(ge=8)
    """Width of the residual stream."""
    num_layers: int = Field(ge=1)
    """Blocks."""
    num_heads: int = Field(ge=1)
    """Attention heads; they share embed_dim."""
    hidden_dim: int = Field(ge=8)
    """Inner width of the feed-forward."""

    @model_validator(mode="after")
    def _heads_divide(self) -> BlocksConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide embed_dim {self.embed_dim}")
        return self


class EncoderModelConfig(BlocksConfig):
    """Shape of the encoder."""

    max_seq_len: int = Field(ge=32)
    """Longest text in tokens, both segments together."""
    dropout: float = Field(ge=0, lt=1)
    """Dropout of the blocks' outputs."""
    attention_dropout: float = Field(ge=0, lt=1)
    """Dropout of the attention weights; above 0 training on a CPU takes a slower kernel."""


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
    """Dropout of the blocks' outputs and of the attention weights."""
    tie_embeddings: bool
    """One matrix for embedding and output head."""


class DecoderModelConfig(Section):
    """Shape of the decoder."""

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

    @model_validator(mode="after")
    def _heads_divide(self) -> DecoderModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions need an even width")
        return self


class VisionModelConfig(BlocksConfig):
    """Shape of the vision tower."""

    image_size: int = Field(ge=8)
    """Height and width in pixels that pictures are resized to."""
    patch_size: int = Field(ge=2)
    """Height and width of a patch, which is one token."""
    num_layers: int = Field(ge=2)
    """Blocks; the decoder reads what the last but one gives."""

    @model_validator(mode="after")
    def _patches_divide(self) -> VisionModelConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide image_size {self.image_size}")
        return self


class ModelConfig(Section):
    """Shapes of the models, by family."""

    decoder: DecoderModelConfig
    encoder: EncoderModelConfig
    encoder_decoder: EncoderDecoderModelConfig
    vision: VisionModelConfig


class LoopConfig(Section):
    """Settings of the training loop."""

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
    activation_checkpointing: Checkpointing
    """What blocks save for the backward pass, which recomputes the rest: none: everything; selective: the results of
    linear layers and of attention's kernels; full: their input."""
    checkpoint_seconds: float = Field(gt=0)
    """Wall time between resumable checkpoints."""
    log_steps: int = Field(ge=1)
    """Steps between progress lines and logged metrics."""

    @model_validator(mode="after")
    def _batches_divide(self) -> LoopConfig:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size: {self.micro_batch_size} does not divide global_batch_size {self.global_batch_size}"
            )
        return self


class TrainConfig(LoopConfig):
    """Settings of the training stages that name datasets."""

    dataset: str | list[str]
    """Name of the dataset, or list of names, to learn from (`loopwright data list`)."""

    @property
    def datasets(self) -> list[str]:
        return [self.dataset] if isinstance(self.dataset, str) else list(self.dataset)


class EncoderPretrainConfig(TrainConfig):
    """Masked language modelling and next-sentence prediction from scratch."""

    masked_share: float = Field(gt=0, lt=1)
    """Share of the tokens that are masked."""
    whole_words: bool
    """Whether the tokens of a word are masked together."""


class EncoderDecoderPretrainConfig(TrainConfig):
    """Span corruption from scratch."""

    corrupted_share: float = Field(gt=0, lt=1)
    """Share of the tokens in masked spans."""
    span_length: float = Field(ge=1)
    """Mean tokens of a masked span."""


QuantizeBase = Literal["none", "int8", "nf4"]
Follower = Literal[
    "optimizer",
    "lora_rank",
    "learning_rate",
    "max_steps",
    "global_batch_size",
    "micro_batch_size",
    "warmup_steps",
    "token_dropout",
    "trials",
    "validation_steps",
]


class FromBaseConfig(TrainConfig):
    """Settings of the stages that start from a model: which weights are trained, and what follows from a base."""

    lora_rank: int = Field(ge=0)
    """Rank of the LoRA adapters of every linear layer of the blocks, all else frozen; 0: all weights are trained."""
    lora_alpha: float = Field(gt=0)
    """The adapters' output is scaled by lora_alpha / lora_rank."""
    quantize_base: QuantizeBase
    """The frozen base of an adapter in 8 or 4 bits, on a CUDA device."""
    follow_base: list[Follower]
    """With a base: settings that follow from its size and the rows, unless params.yaml sets them."""
    base_epochs: float = Field(gt=0)
    """Passes over the rows where `max_steps` follows."""
    base_steps: int = Field(ge=1)
    """Most steps where `max_steps` follows."""


class FineTuneConfig(FromBaseConfig):
    """Settings of the stages that fine-tune a model."""

    base: str
    """A registered model (NAME@ALIAS, NAME/VERSION) or a model folder to start from; empty: the pretrained model."""


class PretrainConfig(Section):
    """Pretraining from scratch, by family."""

    decoder: TrainConfig
    """Causal language modelling."""
    encoder: EncoderPretrainConfig
    """Masked language modelling and next-sentence prediction."""
    encoder_decoder: EncoderDecoderPretrainConfig
    """Span corruption."""


class PretrainVisionConfig(LoopConfig):
    """Image-text pretraining of the vision tower on the pictures of `tune.dataset` and what is said of them."""

    text_dim: int = Field(ge=8)
    """Width of the text encoder that is trained beside the tower."""
    text_layers: int = Field(ge=0)
    """Blocks of the text encoder."""


class ConnectConfig(LoopConfig):
    """Training of the projector between a frozen vision tower and a frozen decoder."""


class ClassifierConfig(FineTuneConfig):
    """Fine-tuning of the pretrained encoder into a classifier."""

    fresh: bool
    """Initialize the encoder's weights randomly instead of from pretraining; not with `base` or LoRA."""
    min_epochs: float = Field(ge=0)
    """Least passes over the texts, beyond the `max_steps` of the scale; one in params.yaml is the maximum."""
    validation_steps: int = Field(ge=1)
    """Steps between two evaluations on the validation texts."""
    patience: int = Field(ge=1)
    """Evaluations without a better macro-F1 after which training stops (early stopping)."""
    class_weight_power: float = Field(ge=0, le=1)
    """Exponent of inverse label frequency in the loss: 1 weighs all labels alike, 0 all texts alike."""
    label_smoothing: float = Field(ge=0, lt=1)
    """Share of each target's probability that is spread over all labels."""
    token_dropout: float = Field(ge=0, lt=1)
    """Token dropout: share of the tokens replaced by [MASK] in training, drawn anew each time."""
    dropout: float = Field(ge=0, lt=1)
    """Dropout of the blocks' outputs and of the pooled vector."""
    adapt_steps: int = Field(ge=0)
    """Steps of masked language modelling on the training texts before (arXiv 2004.10964); 0: none."""
    masked_share: float = Field(gt=0, lt=1)
    """Share of the tokens that are masked in these steps."""
    trials: int = Field(ge=0)
    """Trials of the hyper-parameter search for learning rates and regularization; 0: no search."""
    trial_steps: int = Field(ge=1)
    """Most steps of a trial; the median pruner ends worse trials."""


class SummarizerConfig(FineTuneConfig):
    """Fine-tuning of the pretrained encoder-decoder on pairs of source and target."""

    no_repeat_ngram_size: int = Field(ge=0)
    """Length of n-grams that a generated target may not repeat, also in generation_config.json; 0: no limit."""


class TuneConfig(FineTuneConfig):
    """Instruction tuning of the pretrained base into the agent."""

    template: str = Field(min_length=1)
    """Chat template of an imported base: `own`; `auto`: its own, with a syntax for tools where it knows none; or the
    path of a Jinja template."""
    replay_share: float = Field(ge=0, lt=1)
    """Share of the rows that are an imported base's own answers to data/replay_requests.txt; 0: none."""
    train_vision: bool
    """Whether the vision tower learns too, where `dataset` has pictures; the projector does."""
