"""The encoder against BERT of `transformers`, both ways; its heads and its training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
)

from components.config.model_settings import EncoderModelConfig
from components.config.params import InputError
from components.models.checkpoint import load_model, save_model
from components.models.encoder import Classifier, Encoder, EncoderConfig, EncoderForPretraining, classifier_from

TINY = EncoderConfig(vocab_size=89, embed_dim=32, num_layers=2, num_heads=4, hidden_dim=48, max_seq_len=40)
LABELED = replace(TINY, labels=("numbers", "text", "files"))
Model = TypeVar("Model", bound=Encoder)


def randomised(model: Model, seed: int = 0) -> Model:
    """Weights large enough that every part matters in the logits."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (name.endswith("norm.weight")))
    return model.eval()


def texts() -> dict[str, torch.Tensor]:
    """Three texts of two segments each; the first two are padded."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[0, 12:], mask[1, 5:] = 0, 0
    return {
        "input_ids": torch.randint(0, 89, (3, 17), generator=generator),
        "token_type_ids": (torch.arange(17) > 6).long().expand(3, -1),
        "attention_mask": mask,
    }


REAL = texts()["attention_mask"].bool()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def their_config(**changes: Any) -> BertConfig:
    values = {
        "vocab_size": 89,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
        "initializer_range": 0.3,
    }
    torch.manual_seed(3)
    return BertConfig(**values | changes)


@torch.no_grad()
def test_transformers_guesses_masked_tokens_and_next_sentences_as_we_do(tmp_path: Path) -> None:
    model = randomised(EncoderForPretraining(TINY))
    save_model(model, tmp_path / "model")
    tokens, follows = model(**texts())
    theirs = BertForPreTraining.from_pretrained(tmp_path / "model").eval()(**texts())
    assert_close(tokens[REAL], theirs.prediction_logits[REAL])
    assert_close(follows, theirs.seq_relationship_logits)
    masked_lm = AutoModelForMaskedLM.from_pretrained(tmp_path / "model").eval()
    assert_close(tokens[REAL], masked_lm(**texts()).logits[REAL])
    assert_close(follows, BertForNextSentencePrediction.from_pretrained(tmp_path / "model").eval()(**texts()).logits)


@torch.no_grad()
def test_transformers_classifies_as_we_do(tmp_path: Path) -> None:
    model = randomised(Classifier(LABELED))
    save_model(model, tmp_path / "model")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert_close(model(**texts()), theirs(**texts()).logits)
    assert theirs.config.id2label == dict(enumerate(LABELED.labels))


@torch.no_grad()
def test_transformers_embeds_as_we_do(tmp_path: Path) -> None:
    model = randomised(Encoder(replace(TINY, activation="gelu_new", norm_eps=1e-3, num_segments=3)))
    save_model(model, tmp_path / "model")
    theirs = AutoModel.from_pretrained(tmp_path / "model").eval()(**texts())
    hidden = model.hidden(**texts())
    assert_close(hidden[REAL], theirs.last_hidden_state[REAL])
    assert_close(model.pooled(hidden), theirs.pooler_output)


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "relu", "layer_norm_eps": 1e-3, "num_attention_heads": 2}])
@torch.no_grad()
def test_a_pretrained_bert_of_transformers_guesses_the_same_here(changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = BertForPreTraining(their_config(**changes)).eval()
    theirs.cls.predictions.bias.normal_()
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert isinstance(model, EncoderForPretraining)
    expected = theirs(**texts())
    tokens, follows = model.eval()(**texts())
    assert_close(tokens[REAL], expected.prediction_logits[REAL])
    assert_close(follows, expected.seq_relationship_logits)


@torch.no_grad()
def test_a_masked_lm_without_a_pooler_gets_the_same_one_each_time(tmp_path: Path) -> None:
    theirs = BertForMaskedLM(their_config()).eval()
    theirs.save_pretrained(tmp_path)
    model, again = load_model(tmp_path).eval(), load_model(tmp_path).eval()
    assert_close(model(**texts())[0][REAL], theirs(**texts()).logits[REAL])
    assert torch.equal(model(**texts())[1], again(**texts())[1])
    assert 0.01 < float(model.get_parameter("pooler.weight").std()) < 0.03


@torch.no_grad()
def test_a_classifier_of_transformers_classifies_the_same_here(tmp_path: Path) -> None:
    config = their_config(id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    theirs = BertForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert isinstance(model, Classifier)
    assert model.config.labels == ("a", "b", "c")
    assert_close(model.eval()(**texts()), theirs(**texts()).logits)


@torch.no_grad()
def test_a_plain_bert_of_transformers_embeds_the_same_here(tmp_path: Path) -> None:
    theirs = BertModel(their_config()).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    model = load_model(tmp_path)
    assert isinstance(model, Encoder)
    hidden = model.eval().hidden(**texts())
    assert_close(hidden[REAL], theirs(**texts()).last_hidden_state[REAL])


@pytest.mark.parametrize("model", [Encoder(TINY), EncoderForPretraining(TINY), Classifier(LABELED)])
def test_saving_and_loading_keeps_every_bit(model: Encoder, tmp_path: Path) -> None:
    save_model(randomised(model), tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    for (name, ours), (_, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_first_berts_name_their_norms_as_tensorflow_does(tmp_path: Path) -> None:
    model = randomised(EncoderForPretraining(TINY))
    save_model(model, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight
        for name, weight in weights.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(40).unsqueeze(0)
    save_file(old, tmp_path / "model/model.safetensors")
    assert torch.equal(load_model(tmp_path / "model").get_parameter("embed_norm.bias"), model.embed_norm.bias)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: 'relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder: True is not supported; allowed: False"),
        (
            {"hidden_act": "mish"},
            "hidden_act: 'mish' is not supported; allowed: 'relu', 'gelu', 'gelu_new'",
        ),
        ({"num_attention_heads": 5}, "num_attention_heads: 5 does not divide hidden_size 32"),
        ({"problem_type": "multi_label_classification"}, "problem_type: 'multi_label_classification' is not supported"),
        ({"id2label": {"0": "only"}}, "id2label: .* does not number two or more labels from 0"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label: .* does not number two or more labels from 0"),
    ],
)
def test_a_configuration_we_cannot_run_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_model(Classifier(LABELED), tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | values))
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "model")


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    model, given = randomised(Classifier(LABELED)), texts()
    alone = model(given["input_ids"][1:2, :5], given["token_type_ids"][1:2, :5])
    assert_close(model(**given)[1:2], alone)


@torch.no_grad()
def test_asking_for_some_rows_gives_those_of_all() -> None:
    model, rows = randomised(Encoder(TINY)), torch.tensor([3, 0, 19, 35])
    assert_close(model.hidden(**texts(), rows=rows), model.hidden(**texts()).flatten(0, 1)[rows])


def test_dropout_is_for_training_alone() -> None:
    model = randomised(Classifier(replace(LABELED, dropout=0.2, attention_dropout=0.2)))
    assert torch.equal(model(**texts()), model(**texts()))
    model.train()
    assert not torch.equal(model(**texts()), model(**texts()))
    torch.manual_seed(5)
    first = model(**texts())
    torch.manual_seed(5)
    assert torch.equal(first, model(**texts()))


def test_a_classifier_starts_with_the_encoder_it_is_made_from() -> None:
    encoder = randomised(EncoderForPretraining(TINY))
    classifier = classifier_from(encoder, ["yes", "no"], dropout=0.3).eval()
    assert_close(classifier.hidden(**texts()), encoder.hidden(**texts()))
    assert classifier.config == replace(TINY, labels=("yes", "no"), dropout=0.3, attention_dropout=0.3)
    assert classifier.logits(**texts()).shape == (3, 2)


def test_the_configuration_of_params_is_that_of_the_encoder() -> None:
    keys = EncoderModelConfig.model_fields
    values = {key: value for key, value in vars(TINY).items() if key in keys}
    assert EncoderConfig.from_params(EncoderModelConfig(**values), vocab_size=89) == TINY
