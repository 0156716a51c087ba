"""Folders of sentence-transformers: imported, embedded as their files say, refused by what they ask for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, DistilBertConfig, DistilBertModel, XLMRobertaConfig, XLMRobertaModel

from components.config.params import InputError
from components.inference.classifier import TextClassifier, TextEncoder
from components.models.checkpoint import load_model, save_model
from components.models.encoder import Encoder, classifier_from
from components.models.sentence_pooling import pooling_files, read_pooling
from components.tracking.model_import import import_model, inspect_model, place_model
from components.tracking.registry import Registry
from tests.tokenization.hf_tokenizers import distilbert, xlm_roberta

TEXTS = [
    "Hello there, what does json.dumps do? It serializes obj to a str",
    "  answer: 42 times \n",
    "question",
    "str obj name " * 40,
]
MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
MAX_SEQ_LENGTH = 12


def folder_of(folder: Path, mode: str, normalize: bool, **sizes: Any) -> Path:
    """A tiny DistilBERT, or XLM-R where the mode is the mean, as sentence-transformers saves it."""
    torch.manual_seed(0)
    if mode == "mean_tokens":
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        config = XLMRobertaConfig(
            vocab_size=256, max_position_embeddings=70, type_vocab_size=1, initializer_range=0.3, **shape
        )
        XLMRobertaModel(config).save_pretrained(folder)
        xlm_roberta(folder)
    else:
        smaller = DistilBertConfig(
            vocab_size=320,
            dim=32,
            n_layers=2,
            n_heads=2,
            hidden_dim=48,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
        DistilBertModel(smaller).save_pretrained(folder)
        distilbert(folder)
    return described(folder, mode, normalize, **sizes)


def described(folder: Path, mode: str, normalize: bool, **sizes: Any) -> Path:
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": number, "name": str(number), "path": paths[number], "type": f"sentence_transformers.models.{kind}"}
        for number, kind in enumerate(kinds)
    ]
    pooling = {"word_embedding_dimension": 32} | {f"pooling_mode_{each}": each == mode for each in MODES}
    pooling |= {"pooling_mode_weightedmean_tokens": False, "pooling_mode_lasttoken": False, "include_prompt": True}
    (folder / "1_Pooling").mkdir()
    for name, values in (
        ("modules.json", modules),
        ("1_Pooling/config.json", pooling),
        ("sentence_bert_config.json", {"max_seq_length": MAX_SEQ_LENGTH, "do_lower_case": False, **sizes}),
        ("config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": None}),
    ):
        (folder / name).write_text(json.dumps(values))
    return folder


@torch.no_grad()
def reference(folder: Path, mode: str, normalize: bool, texts: list[str]) -> Tensor:
    """What sentence-transformers makes of the hidden states of `transformers`."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    read = tokenizer(
        [text.strip() for text in texts], padding=True, truncation=True, max_length=MAX_SEQ_LENGTH, return_tensors="pt"
    )
    read.pop("token_type_ids", None)
    hidden, mask = model(**read).last_hidden_state, read["attention_mask"].unsqueeze(-1).float()
    vectors = {
        "cls_token": hidden[:, 0],
        "mean_tokens": (hidden * mask).sum(1) / mask.sum(1),
        "max_tokens": hidden.masked_fill(mask == 0, -1e9).max(1).values,
        "mean_sqrt_len_tokens": (hidden * mask).sum(1) / mask.sum(1).sqrt(),
    }[mode]
    return vectors / vectors.norm(dim=-1, keepdim=True) if normalize else vectors


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_an_imported_folder_embeds_as_its_files_say(
    mode: str, normalize: bool, registry: Registry, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "model", mode, normalize)
    version = import_model(folder, inspect_model(folder), "sentences", registry)
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (version.folder / name).read_bytes() == (folder / name).read_bytes()
    found = TextEncoder.load(version.folder).embed(TEXTS)
    expected = reference(folder, mode, normalize, TEXTS)
    torch.testing.assert_close(torch.tensor([one.vector for one in found]), expected, rtol=1e-4, atol=1e-4)
    assert [one.truncated for one in found] == [len(one) > MAX_SEQ_LENGTH for one in _ids(folder)]
    place_model(version.folder, tmp_path / "place", {})
    place_model(version.folder, tmp_path / "place", {})  # over what is there
    assert read_pooling(tmp_path / "place") == read_pooling(folder)


def _ids(folder: Path) -> list[list[int]]:
    ids: list[list[int]] = AutoTokenizer.from_pretrained(folder)([text.strip() for text in TEXTS])["input_ids"]
    return ids


def test_a_classifier_keeps_the_pooling_of_its_base_and_reads_whole_texts(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", "cls_token", normalize=False)
    encoder = load_model(base)
    assert isinstance(encoder, Encoder)
    classifier = classifier_from(encoder, ["a", "b"])
    save_model(classifier, tmp_path / "classifier", base, pooling_files(base))
    reader = TextClassifier.load(tmp_path / "classifier")
    expected = reference(base, "cls_token", False, TEXTS)
    torch.testing.assert_close(
        torch.tensor([one.vector for one in reader.embed(TEXTS)]), expected, rtol=1e-4, atol=1e-4
    )
    assert [one.truncated for one in reader.classify(TEXTS)] == [False, False, False, True]
    assert len(_ids(base)[0]) > MAX_SEQ_LENGTH


def test_lower_case_is_for_the_embeddings_alone(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", "mean_tokens", True, do_lower_case=True)
    texts = [text.lower() for text in TEXTS]
    found = TextEncoder.load(folder).embed(TEXTS)
    expected = reference(folder, "mean_tokens", True, texts)
    torch.testing.assert_close(torch.tensor([one.vector for one in found]), expected, rtol=1e-4, atol=1e-4)


def test_newer_versions_name_one_mode(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", "max_tokens", True)
    path = folder / "1_Pooling/config.json"
    for named, mode in (("mean_sqrt_len_tokens", "mean_sqrt_len"), ("cls", "cls")):
        path.write_text(json.dumps({"pooling_mode": named}))
        assert read_pooling(folder).mode == mode
    path.write_text(json.dumps({"pooling_mode": "lasttoken"}))
    with pytest.raises(InputError, match="pooling_mode: 'lasttoken' is not supported; allowed: 'cls', 'mean', 'max'"):
        read_pooling(folder)


def test_a_folder_without_these_files_has_none(classifier_folder: Path) -> None:
    assert pooling_files(classifier_folder) == {}
    assert (read_pooling(classifier_folder).mode, read_pooling(classifier_folder).normalize) == ("mean", True)


def change(name: str, **values: Any) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return changed


def dense(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules.insert(2, {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))


def outside(folder: Path) -> None:
    text = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(text.replace("1_Pooling", "../1_Pooling"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            change("1_Pooling/config.json", pooling_mode_weightedmean_tokens=True),
            r"1_Pooling/config\.json: pooling_mode_weightedmean_tokens: True is not supported; allowed: False",
        ),
        (
            change("1_Pooling/config.json", pooling_mode_lasttoken=True),
            "pooling_mode_lasttoken: True is not supported; allowed: False",
        ),
        (
            change("1_Pooling/config.json", pooling_mode_max_tokens=True),
            "pooling_mode_cls_token and pooling_mode_max_tokens is not supported; one of pooling_mode_cls_token",
        ),
        (change("1_Pooling/config.json", pooling_mode_cls_token=False), "no pooling mode is not supported; one of"),
        (dense, r"modules\.json: type: Transformer, Pooling, Dense, Normalize is not supported; allowed: Transformer"),
        (outside, r"modules\.json: path: '\.\./1_Pooling' of the Pooling is not a folder next to it"),
        (
            lambda folder: os.remove(folder / "1_Pooling/config.json"),
            r"1_Pooling/config\.json: not found; the sentence",
        ),
        (lambda folder: (folder / "modules.json").write_text("{"), r"modules\.json: not readable: "),
        (lambda folder: (folder / "modules.json").write_text("[3]"), r"modules\.json: 3 has no type"),
        (
            change("config_sentence_transformers.json", default_prompt_name="query"),
            "default_prompt_name: 'query' is not supported; allowed: False",
        ),
        (change("sentence_bert_config.json", max_seq_length=-1), "max_seq_length: -1 is not a whole number"),
    ],
)
def test_what_is_not_computed_is_refused_by_field_and_value(
    spoil: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "model", "cls_token", normalize=True)
    spoil(folder)
    with pytest.raises(InputError, match=message) as error:
        inspect_model(folder)
    assert "\n" not in str(error.value)
