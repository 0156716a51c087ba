"""Stages before a decoder is tuned on pictures: its vision tower, and the projector that joins the two.

The tower learns from pictures and what is said of them (SigLIP, arXiv 2303.15343); then the projector alone learns
while tower and decoder stay as they are (LLaVA, arXiv 2304.08485, section 4.2). Both read the rows that `prepare`
made of the datasets of `tune`; where these have no pictures, the stages leave folders without a model.

Shapes: P pictures, T tokens, E width of the shared space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.config.model_settings import PretrainVisionConfig
from components.config.params import InputError
from components.config.paths import GENERATION
from components.datasets.formats import write_json
from components.models.attention import Attention, padding_mask
from components.models.blocks import FeedForward, PreNormBlock
from components.models.checkpoint import check_model, load_decoder, load_model, save_decoder, save_model
from components.models.devices import configure_cpu
from components.models.vision import VisionConfig, VisionLanguageModel, VisionTower, normalized, vision_language_from
from components.runtime.stage import StageRun
from components.token_rows.batches import Batch, Indices, TokenRows
from components.token_rows.text_rows import tuned_tokenizer
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.training.loop import train
from components.training.objectives import Loss, causal_lm
from components.training.report import describe, report

NO_MODEL = "no_model.txt"
"""The only file of a folder without a model."""
MAX_TEXT = 96
"""Tokens of the text of a picture."""
INITIAL_SCALE, INITIAL_BIAS = math.log(10.0), -10.0
"""Of the logits of pairs (section 3.2): at first nearly all are told apart as different."""


def pretrain_vision(run: StageRun) -> None:
    """Train the vision tower, save data/models/base/vision.

    Raises: InputError when no picture stands alone in a conversation, or when saving fails.
    """
    configure_cpu()
    rows = _rows(run)
    if rows.images is None or _has_sight(run):
        _leave_empty(run, run.paths.vision_tower, "pairs")
        return
    config, shape = run.params.pretrain_vision, run.params.model.vision
    pairs = CaptionPairs(rows)
    torch.manual_seed(run.params.seed)
    model = ImageTextModel(VisionConfig(**shape.model_dump()), config, rows.vocab_size)
    describe(run, model, MAX_TEXT, pairs)
    measured = train(run, config, model, pairs, sigmoid_image_text)
    save_model(model.vision, run.paths.vision_tower)
    report(run, config, model, measured, run.paths.vision_tower, {"pairs": len(pairs)})


def connect(run: StageRun) -> None:
    """Join the base and the tower by a projector and train that alone, save data/models/base/sight.

    Raises: InputError when base and rows do not fit, or when saving fails.
    """
    configure_cpu()
    rows = _rows(run)
    if rows.images is None or _has_sight(run):
        _leave_empty(run, run.paths.sight, "rows")
        return
    base, config = run.paths.start_of("decoder"), run.params.connect
    decoder, tower = load_decoder(base), load_model(run.paths.vision_tower)
    assert isinstance(tower, VisionTower)
    torch.manual_seed(run.params.seed)
    model = vision_language_from(decoder, tower, rows.images.image_id, rows.vocab_size)
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    pictured = PicturedRows(rows)
    describe(run, model, model.config.max_seq_len, pictured)
    measured = train(run, config, model, pictured, causal_lm)
    tokenizer = load_chat_tokenizer(tuned_tokenizer(run)).with_images(rows.images.image_tokens)
    files: dict[str, Path | str] = {"tokenizer.json": tokenizer.to_json()}
    if (base / GENERATION).is_file():
        files[GENERATION] = base / GENERATION
    save_decoder(model, run.paths.sight, tuned_tokenizer(run), files)
    report(run, config, model, measured, run.paths.sight, {"rows": len(pictured)})


def _leave_empty(run: StageRun, folder: Path, counted: str) -> None:
    """The outs of a stage that has nothing to do: a folder without a model, in which DVC expects a file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NO_MODEL).write_text("Nothing to train: tune.dataset has no pictures, or tune.base reads them already.\n")
    write_json(run.paths.metrics / f"{run.name}.json", {counted: 0})


def _rows(run: StageRun) -> TokenRows:
    return TokenRows(run.paths.tokens("decoder") / "tune", "train")


def _has_sight(run: StageRun) -> bool:
    """Whether the base reads pictures already: it was imported with a tower."""
    folder = run.paths.start_of("decoder")
    return isinstance(check_model(folder), VisionLanguageModel)


class PicturedRows:
    """The rows that have pictures."""

    def __init__(self, rows: TokenRows) -> None:
        """Raises: InputError when there are none."""
        self._rows = rows
        self.folder, self.seq_len, self.vocab_size = rows.folder, rows.seq_len, rows.vocab_size
        self._chosen = np.flatnonzero((np.asarray(rows.pictures) > 0).any(1))
        if not len(self._chosen):
            raise InputError(f"{rows.folder}: no picture fits a row; raise prepare.decoder.seq_len")

    def __len__(self) -> int:
        return len(self._chosen)

    def lengths(self, indices: Indices) -> Indices:
        return self._rows.lengths(indices)

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        return self._rows.batch(self._chosen[indices], step)


class CaptionPairs:
    """Pictures that are alone in a conversation, each with its text: questions give answers their meaning."""

    def __init__(self, rows: TokenRows) -> None:
        """Raises: InputError when there are none."""
        self._rows = rows
        self.folder, self.seq_len, self.vocab_size = rows.folder, MAX_TEXT, rows.vocab_size
        self._pairs: list[tuple[int, list[int]]] = []
        for row in np.flatnonzero((np.asarray(rows.pictures) > 0).any(1)).tolist():
            for number in range(1, 1 + int(rows.segments_in(row))):
                ids, pictures = rows.segment(row, number)
                shown = set(pictures[pictures > 0].tolist())
                if len(shown) == 1:
                    self._pairs.append((shown.pop() - 1, ids[pictures == 0][:MAX_TEXT].tolist()))
        if not self._pairs:
            raise InputError(f"{rows.folder}: no picture is alone in a conversation; add captions to tune.dataset")

    def __len__(self) -> int:
        return len(self._pairs)

    def lengths(self, indices: Indices) -> Indices:
        return np.array([len(self._pairs[index][1]) for index in indices.tolist()])

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """pixel_values (P, H, W, 3) uint8; input_ids and attention_mask (P, T)."""
        pairs = [self._pairs[index] for index in indices.tolist()]
        texts = [torch.tensor(ids) for _, ids in pairs]
        return {
            "pixel_values": torch.from_numpy(np.stack([self._rows.pixels(number) for number, _ in pairs])),
            "input_ids": nn.utils.rnn.pad_sequence(texts, batch_first=True),
            "attention_mask": nn.utils.rnn.pad_sequence(list(map(torch.ones_like, texts)), batch_first=True),
        }


class ImageTextModel(nn.Module):
    """A vision tower and a text encoder whose vectors of a pair are alike."""

    def __init__(self, shape: VisionConfig, config: PretrainVisionConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = shape
        self.vision = VisionTower(shape)
        width = config.text_dim
        self.embed = nn.Embedding(vocab_size, width)
        self.position_embed = nn.Embedding(MAX_TEXT, width)
        self.text_blocks = nn.ModuleList(_text_block(width) for _ in range(config.text_layers))
        self.text_norm = nn.LayerNorm(width)
        self.text_out = nn.Linear(width, shape.embed_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(INITIAL_SCALE))
        self.bias = nn.Parameter(torch.tensor(INITIAL_BIAS))
        for embedding in (self.embed, self.position_embed):
            nn.init.normal_(embedding.weight, std=0.02)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [*self.vision.blocks, *self.text_blocks]

    def texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The vectors (P, E) of texts (P, T): the mean over their tokens, projected."""
        x = self.embed(input_ids) + self.position_embed.weight[: input_ids.shape[1]]
        for block in self.text_blocks:
            x = block(x, mask=padding_mask(attention_mask, x.dtype))
        weights = attention_mask.unsqueeze(-1).to(x.dtype)
        vectors: Tensor = self.text_out((self.text_norm(x) * weights).sum(1) / weights.sum(1).clamp(min=1))
        return vectors


def sigmoid_image_text(model: ImageTextModel, batch: Batch) -> Loss:
    """-sum_ij log sigmoid(z_ij (t x_i . y_j + b)) over all pictures i and texts j of a batch, z = 1 for pairs, else -1.

    (SigLIP, algorithm 1.) A text that another pair has too counts as its own: answers repeat.
    """
    values = normalized(batch["pixel_values"]).to(model.embed.weight.dtype)
    pictures = F.normalize(model.vision.pooled(values), dim=-1)
    texts = F.normalize(model.texts(batch["input_ids"], batch["attention_mask"]), dim=-1)
    logits = (pictures @ texts.T).float() * model.scale.exp() + model.bias
    same = (batch["input_ids"].unsqueeze(1) == batch["input_ids"]).all(-1)
    signs = torch.where(same, 1.0, -1.0)
    return Loss(-F.logsigmoid(signs * logits).sum(), len(logits))


def _text_block(width: int) -> PreNormBlock:
    attention = Attention(width, width // 32 or 1, width // 32 or 1, min(width, 32), bias=True, causal=False)
    return PreNormBlock(attention, FeedForward(width, 4 * width, "gelu", bias=True), width, 1e-6, norm_bias=True)
