"""The harness's requests against transformers on the same weights, and real tasks run through it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from components.config.params import InputError
from components.evaluation.harness import Answerer, run_tasks
from components.models.checkpoint import save_decoder
from components.models.decoder import Decoder, DecoderConfig
from components.tokenization import chat_tokenizer as bpe
from components.tokenization.hf_tokenizer import load_chat_tokenizer

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
TEXTS = ["the cat sat on the mat", "dogs bark at the moon and the cat", "what does json do? it reads text"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("harness")
    bpe.save(bpe.train(TEXTS * 5, 330), root / "tokenizer")
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=load_chat_tokenizer(root / "tokenizer").vocab_size,
        embed_dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        hidden_dim=48,
        max_seq_len=48,
    )
    model = Decoder(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (weight.dim() == 1))
    save_decoder(model, root / "model", root / "tokenizer")
    return root / "model"


@pytest.fixture(scope="module")
def answerer(folder: Path) -> Answerer:
    return Answerer(folder, batch_size=2)


@torch.no_grad()
def reference(folder: Path, ids: list[int], written: int) -> tuple[float, bool]:
    """Log-probability of the last `written` ids, and whether each is the likeliest."""
    chances = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(len(ids) - written, len(ids))
    total = sum(float(chances[place - 1, ids[place]]) for place in places)
    return total, all(int(chances[place - 1].argmax()) == ids[place] for place in places)


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("the cat", " sat on"), ("the cat ", "sat on"), ("", "dogs bark"), ("what does json do?", " it reads text")],
)
def test_loglikelihood_is_that_of_transformers(
    answerer: Answerer, folder: Path, context: str, continuation: str
) -> None:
    before = [answerer.tokenizer.document_id, *answerer.tokenizer.encode(context.rstrip(" "))]
    whole = [answerer.tokenizer.document_id, *answerer.tokenizer.encode(context + continuation)]
    together = answerer.loglikelihood([("dogs", " bark at the moon"), (context, continuation), ("a", "b")])
    total, greedy = reference(folder, whole, len(whole) - len(before))
    assert together[1] == (pytest.approx(total, abs=1e-3), greedy)


def test_what_greed_writes_is_called_greedy(answerer: Answerer) -> None:
    found = 0
    for context in (f"the cat {word}" for word in " ".join(TEXTS).split()):
        (written,) = answerer.generate_until([(context, {"max_gen_toks": 1})])
        spelled = answerer.tokenizer.encode(context + written)
        if spelled[:-1] == answerer.tokenizer.encode(context):  # else the word and what was written melt together
            found += 1
            assert answerer.loglikelihood([(context, written)])[0][1]
    assert found


def test_a_rolling_window_foretells_each_token_once(answerer: Answerer, folder: Path) -> None:
    short, long = "the cat sat", " ".join(TEXTS * 4)
    totals = answerer.loglikelihood_rolling([short, long])
    ids = answerer.tokenizer.encode(short)
    assert totals[0] == pytest.approx(reference(folder, [answerer.tokenizer.document_id, *ids], len(ids))[0], abs=1e-3)
    assert len(answerer.tokenizer.encode(long)) > answerer.context_len
    assert totals[1] < totals[0]


def test_an_answer_ends_at_the_first_stop_string(answerer: Answerer) -> None:
    (whole,) = answerer.generate_until([("dogs", {"max_gen_toks": 12})])
    stop = whole[len(whole) // 2]
    (cut,) = answerer.generate_until([("dogs", {"max_gen_toks": 12, "until": [stop, "never"]})])
    assert cut == whole[: whole.index(stop)]


def test_a_chat_goes_as_the_ids_that_were_tuned_on(answerer: Answerer) -> None:
    messages = [{"role": "user", "content": "the cat?"}]
    text = answerer.render(messages)
    ids, mask = answerer._pair(text, " sat")
    prompt = answerer.tokenizer.encode_chat(messages, add_generation_prompt=True)[0]
    assert ids == [*prompt, *answerer.tokenizer.encode(" sat")]
    assert sum(mask) == len(ids) - len(prompt)


def test_tasks_run_through_the_harness(folder: Path, tmp_path: Path) -> None:
    rows = [{"question": text, "choices": ["moon", "mat"], "answer": number % 2} for number, text in enumerate(TEXTS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path / 'rows.jsonl'}}}\ntest_split: test\n"
    choose = (
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    )
    write = (
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{choices[0]}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n"
    )
    for name, kind in (("house_choose", choose), ("house_write", write)):
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{data}{kind}")
    results = run_tasks(folder, ["house_choose", "house_write"], tmp_path, None, chat=False, batch_size=4)
    assert 0 <= results["house_choose"]["acc,none"] <= 1
    assert results["house_write"]["exact_match,none"] == 0
    with pytest.raises(InputError, match="--tasks: 'no_such' is no task of the harness"):
        run_tasks(folder, ["no_such"], tmp_path, None, chat=False, batch_size=4)
