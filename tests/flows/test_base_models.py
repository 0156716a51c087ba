"""A section's `base`: the model lies where the stages read it before DVC looks, and goes when it is named no more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from components.config.params import InputError
from components.config.paths import Paths
from components.datasets.formats import DatasetWriter
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.tracking.model_import import import_model, inspect_model
from components.tracking.registry import Registry
from flows.orchestration.base_models import fetch_base_models
from tests.tokenization.hf_tokenizers import CHATML, LLAMA, llama
from tests.tracking.test_model_import import SOURCE, decoder, encoder


@pytest.fixture
def paths(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(home))
    shutil.copy(SOURCE / "params.yaml", tmp_path / "params.yaml")
    return Paths(tmp_path)


def name(paths: Paths, base: str, **settings: str) -> None:
    params = yaml.safe_load(paths.params.read_text())
    params["tune"] = {"base": base, **settings}
    paths.params.write_text(yaml.safe_dump(params))


def test_a_named_model_is_fetched_once_and_goes_when_it_is_named_no_more(paths: Paths) -> None:
    folder, said = decoder(paths.root / "theirs"), list[str]()
    import_model(folder, inspect_model(folder), "stranger", Registry(paths.home))
    place = paths.imported("decoder")
    assert paths.start_of("decoder") == paths.base("decoder")
    for base, origin in (("stranger@champion", {"version": "stranger/1"}), ("theirs", {"folder": "theirs"})):
        name(paths, base)
        for _ in range(2):
            fetch_base_models(paths, said.append)
        assert origin.items() <= json.loads((place / "origin.json").read_text()).items()
        assert (place / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        assert paths.start_of("decoder") == place
    name(paths, "")
    fetch_base_models(paths, said.append)
    assert not (place / "config.json").exists()
    assert paths.start_of("decoder") == paths.base("decoder")
    assert [line.partition(" (")[0] for line in said] == [
        "tune.base: stranger@champion",
        "tune.base: theirs",
        "tune.base: none; tune starts from the pretrained model again",
    ]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere/at/all", r"tune\.base: nowhere/at/all: no model folder \(no config\.json there\), and no NAME@ALIAS"),
        ("nobody@champion", "nobody@champion: not in the registry|nobody: no such model in the registry"),
        ("bert", r"params\.yaml: tune\.base: bert: BertForMaskedLM is no decoder; name a model that is"),
    ],
)
def test_a_base_that_cannot_be_one_is_one_line(base: str, message: str, paths: Paths) -> None:
    encoder(paths.root / "bert")
    name(paths, base)
    with pytest.raises(InputError, match=message):
        fetch_base_models(paths, print)
    assert not (paths.imported("decoder") / "config.json").exists()


def test_a_base_without_tools_gets_a_template_that_knows_them(paths: Paths) -> None:
    """As SmolLM2, whose conversations with calls were refused after half a minute of other work."""
    folder, said = llama(decoder(paths.root / "theirs")), list[str]()
    name(paths, "theirs")
    fetch_base_models(paths, said.append)
    place = paths.imported("decoder")
    own, tuned = load_chat_tokenizer(folder), load_chat_tokenizer(place)
    assert (own.knows_tools, tuned.knows_tools) == (False, True)
    assert said[0].startswith("tune.template: auto: the chat template of theirs knows no tools; declarations, calls")
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    assert tuned.encode_chat(chat) == own.encode_chat(chat)
    assert (folder / "chat_template.jinja").read_text() == LLAMA


def test_the_template_of_a_base_may_be_a_file(paths: Paths) -> None:
    folder = decoder(paths.root / "theirs")
    (paths.root / "own.jinja").write_text(CHATML + "{# own #}")
    name(paths, "theirs", template="own.jinja")
    fetch_base_models(paths, print)
    place = paths.imported("decoder") / "chat_template.jinja"
    assert place.read_text() == CHATML + "{# own #}"
    (paths.root / "own.jinja").write_text(CHATML + "{# edited #}")
    fetch_base_models(paths, print)
    assert place.read_text() == CHATML + "{# edited #}"
    name(paths, "theirs", template="own")
    fetch_base_models(paths, print)
    assert not place.exists()
    assert (place.parent / "tokenizer_config.json").read_bytes() == (folder / "tokenizer_config.json").read_bytes()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("nowhere.jinja", r"tune\.template: nowhere\.jinja: no such file; write auto, own, or a template's path"),
        (
            "own",
            r"tune\.template: own: the chat template knows no tools .* of stdlib-conversations call some",
        ),
        ("bad.jinja", "chat_template: where the model writes message 1 is unknown"),
    ],
)
def test_a_template_that_does_not_suit_is_refused_before_any_work(template: str, message: str, paths: Paths) -> None:
    llama(decoder(paths.root / "theirs"))
    (paths.root / "bad.jinja").write_text("{{ messages | length }}" + LLAMA)
    name(paths, "theirs", template=template)
    with pytest.raises(InputError, match=message):
        fetch_base_models(paths, print)
    assert not (paths.imported("decoder") / "config.json").exists()


@pytest.mark.parametrize("calling", [False, True])
def test_a_template_without_tools_suits_conversations_without_calls(calling: bool, paths: Paths) -> None:
    llama(decoder(paths.root / "theirs"))
    function = {"name": "lookup", "arguments": "{}"}
    answer = {"role": "assistant", "content": "answer"} | (
        {"tool_calls": [{"id": "1", "type": "function", "function": function}]} if calling else {}
    )
    with DatasetWriter(paths.collected / "chats", "chats", "conversations") as writer:
        writer.write("train", {"id": "1", "messages": [{"role": "user", "content": "question"}, answer]})
    name(paths, "theirs", template="own", dataset="chats")
    if calling:
        with pytest.raises(InputError, match="the conversations of chats call some; write"):
            fetch_base_models(paths, print)
    else:
        fetch_base_models(paths, print)
    assert (paths.imported("decoder") / "config.json").exists() != calling
