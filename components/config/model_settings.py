"""Sections of `params.yaml` by which models are made and measured: type, meaning and bounds of each value.

No values stand here: those are in files that DVC watches (components/config/params.py).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Family = Literal["decoder", "encoder", "encoder_decoder"]


class Section(BaseModel):
    """One section of `params.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _names(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


class CollectConfig(Section):
    """Gathering the raw data into datasets."""

    modules: list[str]
    """Parts of its source that the project reads, by the names it gives them; empty means all of them."""
    conversations: int = Field(ge=100)
    """Training conversations that the project makes, where it makes as many as are asked for."""
    questions: int = Field(ge=10)
    """Held-out questions per suite; each reported figure needs 300 or more to be worth quoting."""
    held_out_share: float = Field(gt=0, lt=0.5)
    """Share of rows held out of a user's dataset, and of what a project holds out, that training never sees."""
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
    """Share of pretraining rows that are copy augmentation: repeated spans of names and of random tokens."""
    token_noise_rate: float = Field(ge=0, le=1)
    """Share of conversations repeated with random tokens in the names and results that they copy."""


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


class ModelConfig(Section):
    """Shapes of the models, by family."""

    decoder: DecoderModelConfig
    encoder: EncoderModelConfig
    encoder_decoder: EncoderDecoderModelConfig


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


class PretrainConfig(Section):
    """Pretraining from scratch, by family."""

    decoder: TrainConfig
    """Causal language modelling."""
    encoder: EncoderPretrainConfig
    """Masked language modelling and next-sentence prediction."""
    encoder_decoder: EncoderDecoderPretrainConfig
    """Span corruption."""


class ClassifierConfig(FineTuneConfig):
    """Fine-tuning of the pretrained encoder into a classifier."""

    fresh: bool
    """Draw the encoder's weights anew instead of taking the pretrained ones; not where `base` names a model or
    LoRA trains beside it."""
    min_epochs: float = Field(ge=0)
    """Passes over the texts that training makes at least, whatever `max_steps` says: more texts, more steps."""
    validation_steps: int = Field(ge=1)
    """Steps between two looks at the validation texts."""
    patience: int = Field(ge=1)
    """Looks without a better macro-F1 after which training stops."""
    class_weight_power: float = Field(ge=0, le=1)
    """1: all labels weigh alike however rare, 0: all texts alike, between: between."""
    label_smoothing: float = Field(ge=0, lt=1)
    """Share of each text's label that goes to all labels alike."""
    token_dropout: float = Field(ge=0, lt=1)
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

    no_repeat_ngram_size: int = Field(ge=0)
    """Tokens in a row that no target it writes has twice, also told to `transformers`; 0: whatever is likeliest."""


class AssessConfig(Section):
    """What classifier and summarizer are measured on."""

    max_texts: int = Field(ge=1)
    """Held-out texts of each suite asked at most."""
    beams: int = Field(ge=1)
    """Targets that the summarizer follows side by side; 1: always the likeliest token."""


class TuneConfig(FineTuneConfig):
    """Instruction tuning of the pretrained base into the agent."""


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
