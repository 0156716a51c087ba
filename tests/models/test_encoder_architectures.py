"""Every encoder architecture of the table against `transformers`: folders in and out, logits, padding, gradients."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from components.config.params import InputError
from components.models.checkpoint import load_model, read_architecture, save_model
from components.models.encoder import Classifier, Encoder, EncoderForPretraining, classifier_from
from components.models.encoder_formats import DIFFERENCES, ENCODERS

LENGTH, PAD = 24, 1
ENDINGS = ("Model", "ForMaskedLM", "ForSequenceClassification")
LABELS = {0: "good", 1: "bad", 2: "neither"}


@dataclass(frozen=True)
class Case:
    """A configuration of `transformers`, small and with every part at work."""

    family: str
    values: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(
        default_factory=lambda: {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
        }
    )


TOLERANCE = 1e-4
CASES = {
    "bert": Case("Bert", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
    "roberta": Case("Roberta", {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "hidden_act": "relu"}),
    "roberta with padding 3": Case("Roberta", {"pad_token_id": 3, "classifier_dropout": 0.3}),
    "xlm-roberta": Case("XLMRoberta", {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "camembert": Case("Camembert", {"type_vocab_size": 1}),
    "distilbert": Case(
        "DistilBert", {"activation": "relu"}, {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 2}
    ),
    "modernbert": Case("ModernBert", {"local_attention": 8}),
    "modernbert otherwise": Case(
        "ModernBert",
        {
            "local_attention": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "classifier_bias": True,
            "classifier_pooling": "mean",
            "classifier_activation": "silu",
            "hidden_activation": "gelu_pytorch_tanh",
            "decoder_bias": False,
            "norm_eps": 1e-3,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 300.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    ),
}


def reference(name: str, ending: str, folder: Path) -> Any:
    """A randomly initialised model of `transformers`, saved into a folder."""
    case = CASES[name]
    values = {
        "vocab_size": 97,
        "max_position_embeddings": 40,
        "pad_token_id": PAD,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "cls_token_id": 0,
        "sep_token_id": 2,
        "initializer_range": 0.3,
        "id2label": LABELS,
        "label2id": {label: number for number, label in LABELS.items()},
        **case.sizes,
        **case.values,
    }
    torch.manual_seed(3)
    config = getattr(transformers, f"{case.family}Config")(**values)
    model = getattr(transformers, f"{case.family}{ending}")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:  # gains and biases, which start as ones and zeros
                weight.add_(torch.randn_like(weight) * 0.2)
            else:
                weight.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def texts(pad: int, left: bool = False, count: int = 3) -> dict[str, Tensor]:
    """Two of three texts are padded."""
    ids = torch.randint(4, 97, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(count, LENGTH, dtype=torch.long)
    for row in range(count):
        padding = (9, 0, 17)[row % 3]
        place = slice(0, padding) if left else slice(LENGTH - padding, None)
        ids[row, place], mask[row, place] = pad, 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs(theirs: Any, ours: Encoder, given: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What both make of texts, ours first: of tokens that are not padding."""
    expected = theirs(**given)
    real = given["attention_mask"].bool()
    if isinstance(ours, Classifier):
        read = real[:, 0] | (ours.config.pooled_tokens == "mean")  # a text that begins with padding has no first token
        return [(ours(**given)[read], expected.logits[read])]
    if isinstance(ours, EncoderForPretraining):
        return [(ours(**given)[0][real], expected.logits[real])]
    hidden = ours.hidden(**given)
    pairs = [(hidden[real], expected.last_hidden_state[real])]
    if (pooled := getattr(expected, "pooler_output", None)) is not None:
        pairs.append((ours.pooled(hidden), pooled))
    return pairs


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative for numbers above 1."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float(((ours - theirs).abs() / (1 + theirs.abs())).max())


Both = tuple[Any, Encoder, int]


@pytest.fixture(params=[(name, ending) for name in CASES for ending in ENDINGS], ids=lambda each: "-".join(each))
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Both:
    name, ending = request.param
    theirs = reference(name, ending, tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs").eval()
    assert isinstance(ours, Encoder)
    return theirs, ours, CASES[name].values.get("pad_token_id", PAD)


def test_the_table_has_a_case_for_each_architecture() -> None:
    assert set(DIFFERENCES) == {case.family for case in CASES.values()}
    assert set(ENCODERS) == {family + ending for family in DIFFERENCES for ending in ENDINGS} | {"BertForPreTraining"}


@pytest.mark.parametrize("left", [False, True])
def test_outputs_are_those_of_transformers(both: Both, left: bool) -> None:
    theirs, ours, pad = both
    with torch.no_grad():
        for got, expected in outputs(theirs, ours, texts(pad, left)):
            assert error(got, expected) < TOLERANCE
    for got, expected in outputs(theirs, ours, texts(pad, left)):  # as in training
        assert error(got, expected) < TOLERANCE


def test_without_a_mask(both: Both) -> None:
    theirs, ours, _ = both
    ids = texts(PAD)["input_ids"][1:2]
    with torch.no_grad():
        expected = theirs(ids)[0]
        got = ours.hidden(ids) if type(ours) is Encoder else ours(ids)
    assert error(got[0] if isinstance(got, tuple) else got, expected) < TOLERANCE


def test_gradients_are_those_of_transformers(both: Both) -> None:
    theirs, ours, pad = both
    for (got, expected), side in zip(outputs(theirs, ours, texts(pad)), range(2), strict=False):
        weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(side))
        ((got * weights).sum() + (expected * weights).sum()).backward(retain_graph=True)
    embedded = theirs.get_input_embeddings().weight.grad
    assert embedded is not None
    assert ours.embed.weight.grad is not None
    rows = torch.arange(97) != pad  # whose gradient transformers leaves out
    scale = embedded.abs().max()
    assert error(ours.embed.weight.grad[rows] / scale, embedded[rows] / scale) < TOLERANCE


def test_in_bf16(both: Both) -> None:
    """As far from exact outputs as `transformers` is."""
    theirs, ours, pad = both
    with torch.no_grad():
        exact = [expected for _, expected in outputs(theirs, ours, texts(pad, count=48))]
        rounded = outputs(theirs.bfloat16(), ours.bfloat16(), texts(pad, count=48))
    for (got, expected), truth in zip(rounded, exact, strict=True):
        assert (got - truth).abs().mean() < 1.3 * (expected - truth).abs().mean()


def test_a_folder_goes_out_as_it_came(both: Both, tmp_path: Path) -> None:
    theirs, ours, pad = both
    save_model(ours, tmp_path / "ours")
    kind = "BertForPreTraining" if type(theirs).__name__ == "BertForMaskedLM" else type(theirs).__name__
    again = getattr(transformers, kind).from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(**texts(pad))[0], theirs(**texts(pad))[0])
    assert read_architecture(tmp_path / "ours") == (kind, ours.config)
    before, after = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("theirs", "ours"))
    changed = {"architectures", "dtype", "torch_dtype", "position_embedding_type"}
    kept = before.keys() - changed - {name for name, value in before.items() if value is None}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


@pytest.mark.parametrize("name", list(CASES))
def test_a_folder_goes_out_in_its_dtype(name: str, tmp_path: Path) -> None:
    theirs = reference(name, "Model", tmp_path / "theirs")
    theirs.bfloat16().save_pretrained(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours")
    again = AutoModel.from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(weight, theirs.state_dict()[key]) for key, weight in again.state_dict().items())


@pytest.mark.parametrize("ending", ["Model", "ForMaskedLM"])
@pytest.mark.parametrize("name", list(CASES))
def test_a_classifier_made_from_a_base_is_one_for_transformers(name: str, ending: str, tmp_path: Path) -> None:
    theirs = reference(name, ending, tmp_path / "theirs")
    change(tmp_path / "theirs", problem_type="regression")  # what the base was once tuned for
    base = load_model(tmp_path / "theirs")
    assert isinstance(base, Encoder)
    torch.manual_seed(0)
    classifier = classifier_from(base, ["one", "two"], dropout=0.25).eval()
    nn.init.normal_(classifier.head.weight)
    save_model(classifier, tmp_path / "ours")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    given = texts(CASES[name].values.get("pad_token_id", PAD))
    with torch.no_grad():
        assert error(classifier(**given), again(**given).logits) < TOLERANCE
        real = given["attention_mask"].bool()
        assert error(classifier.hidden(**given)[real], theirs.base_model(**given).last_hidden_state[real]) < TOLERANCE
    assert again.config.id2label == {0: "one", 1: "two"}
    assert {each.p for each in again.modules() if isinstance(each, nn.Dropout)} == {0.25}
    config = read_architecture(tmp_path / "ours")[1]
    assert config == replace(classifier.config, head_dropout=config.head_dropout, embed_dropout=config.embed_dropout)


def test_modernberts_classifier_begins_with_the_head_of_its_masked_tokens(tmp_path: Path) -> None:
    """As that of `transformers` does: both call it `head`."""
    reference("modernbert", "ForMaskedLM", tmp_path)
    torch.manual_seed(0)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    base = load_model(tmp_path)
    assert isinstance(base, Encoder)
    ours = classifier_from(base, ["a", "b", "c"]).eval()
    with torch.no_grad():
        ours.head.weight.copy_(theirs.classifier.weight)
        ours.head.bias.copy_(theirs.classifier.bias)
        assert error(ours(**texts(PAD)), theirs(**texts(PAD)).logits) < TOLERANCE


@pytest.mark.parametrize("name", ["roberta", "distilbert", "modernbert"])
def test_sentence_encoders_name_a_head_that_they_lack(name: str, tmp_path: Path) -> None:
    """sentence-transformers writes the base model and keeps the name of what it was trained from."""
    theirs = reference(name, "Model", tmp_path)
    change(tmp_path, architectures=[f"{CASES[name].family}ForMaskedLM"])
    model = load_model(tmp_path).eval()
    assert type(model) is Encoder
    with torch.no_grad():
        for got, expected in outputs(theirs, model, texts(PAD)):
            assert error(got, expected) < TOLERANCE


def test_the_first_modernberts_name_their_layers_and_angles_otherwise(tmp_path: Path) -> None:
    reference("modernbert", "Model", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("layer_types", "rope_parameters"):
        del config[name]
    older = {"global_attn_every_n_layers": 2, "global_rope_theta": 300.0, "local_rope_theta": 20.0}
    (tmp_path / "config.json").write_text(json.dumps(config | older))
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    model = load_model(tmp_path).eval()
    assert isinstance(model, Encoder)
    assert model.config.windowed_layers == (False, True, False)
    with torch.no_grad():
        for got, expected in outputs(theirs, model, texts(PAD)):
            assert error(got, expected) < TOLERANCE


def test_a_roberta_that_lacks_its_pooler_or_has_one_it_does_not_read(tmp_path: Path) -> None:
    theirs = reference("roberta", "ForMaskedLM", tmp_path / "lm")
    weights = load_file(tmp_path / "lm/model.safetensors")
    pooler = {"roberta.pooler.dense.weight": torch.ones(32, 32), "roberta.pooler.dense.bias": torch.ones(32)}
    save_file(weights | pooler, tmp_path / "lm/model.safetensors")
    model = load_model(tmp_path / "lm").eval()
    with torch.no_grad():
        assert error(outputs(theirs, model, texts(PAD))[0][0], outputs(theirs, model, texts(PAD))[0][1]) < TOLERANCE
    save_model(model, tmp_path / "out")
    assert set(load_file(tmp_path / "out/model.safetensors")) <= set(weights)
    reference("roberta", "Model", tmp_path / "base")
    weights = load_file(tmp_path / "base/model.safetensors")
    save_file(
        {name: each for name, each in weights.items() if "pooler" not in name}, tmp_path / "base/model.safetensors"
    )
    first, second = (load_model(tmp_path / "base").get_parameter("pooler.weight") for _ in range(2))
    assert torch.equal(first, second)


def test_masked_tokens_after_training_are_those_of_transformers(tmp_path: Path) -> None:
    """A model that was changed here is what transformers reads, its tied head among it."""
    for name in ("roberta", "distilbert", "modernbert"):
        reference(name, "ForMaskedLM", tmp_path / name)
        model = load_model(tmp_path / name).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.1)
        save_model(model, tmp_path / name)
        theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            for got, expected in outputs(theirs, model, texts(PAD)):
                assert error(got, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("roberta", {"position_embedding_type": "relative_key"}, "position_embedding_type: 'relative_key' is not supp"),
        ("roberta", {"is_decoder": True}, "is_decoder: True is not supported; allowed: False"),
        ("roberta", {"hidden_act": "mish"}, "hidden_act: 'mish' is not supported; allowed: 'relu'"),
        ("roberta", {"max_position_embeddings": 2}, "max_position_embeddings: 2 leaves no position behind pad_token"),
        ("roberta", {"tie_word_embeddings": False}, "tie_word_embeddings: False is not supported"),
        ("distilbert", {"n_heads": 5}, "n_heads: 5 does not divide dim 32"),
        ("distilbert", {"activation": "mish"}, "activation: 'mish' is not supported"),
        ("distilbert", {"problem_type": "regression"}, "problem_type: 'regression' is not supported"),
        ("modernbert", {"layer_types": ["full_attention"]}, "layer_types: .* for each of 3 layers"),
        ("modernbert", {"classifier_pooling": "max"}, "classifier_pooling: 'max' is not supported; allowed: 'cls'"),
        ("modernbert", {"hidden_activation": "mish"}, "hidden_activation: 'mish' is not supported"),
        ("modernbert", {"rope_scaling": {"factor": 2.0}}, "rope_scaling: {'factor': 2.0} is not supported"),
        (
            "modernbert",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope_type: 'yarn' is not supported; allowed: 'default'",
        ),
        ("modernbert", {"num_hidden_layers": 0}, "num_hidden_layers: 0 layers; at least 1"),
    ],
)
def test_what_is_not_computed_is_refused_by_field_and_value(
    name: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    reference(name, "ForSequenceClassification", tmp_path)
    change(tmp_path, **values)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)
