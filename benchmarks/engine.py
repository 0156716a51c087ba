"""The engine's tokens per second, alone and in company: `python -m benchmarks.engine` (in `make bench`).

Beside Hugging Face. Random weights of a stated shape, the same for all; prompts of one length that never repeat, token
for token the same for all; every answer as long as any other. One process, rounds interleaved, medians reported;
ratios are of tokens per second of processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import random
import statistics
import string
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.runtime.stage import ENVIRONMENT

if TYPE_CHECKING:
    from components.tokenization.chat_tokenizer import ChatTokenizer

SHAPES = {
    "laptop": (2048, 192, 4, 3, 3, 64, 512),
    "larger": (8192, 512, 10, 8, 4, 64, 1408),
}
"""vocab_size, embed_dim, num_layers, num_heads, num_kv_heads, head_dim, hidden_dim."""
CONTEXT = 512
PROMPT, WRITTEN = 64, 64
"""Tokens of each prompt, as the chat template renders it, and of each answer."""
CROWD = 32
ALONE, THEIRS_ALONE = "Loopwright, one after another", "Hugging Face, one after another"


@dataclass(frozen=True)
class Prompt:
    """A question, and the tokens that its model reads."""

    text: str
    ids: list[int]


Prompts = list[Prompt]
Contender = Callable[[Prompts], int]
"""Answers all prompts and gives the number of tokens written."""


def make_folder(folder: Path, size: str) -> Path:
    """A model folder with random weights and a tokenizer learned from the standard library."""
    import torch

    from components.models.checkpoint import save_decoder
    from components.models.decoder import Decoder, DecoderConfig
    from components.tokenization import chat_tokenizer as tokenizer

    sources = sorted(Path(statistics.__file__).parent.glob("*.py"))[:80]
    learned = tokenizer.train([source.read_text(encoding="utf-8") for source in sources], SHAPES[size][0])
    tokenizer.save(learned, folder / "tokenizer")
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(*SHAPES[size], CONTEXT, qk_norm=True, tie_embeddings=True))
    with torch.no_grad():
        model.embed.weight[: len(tokenizer.SPECIAL_TOKENS)] = 0  # never the likeliest: no answer ends early
    save_decoder(model, folder / "model", folder / "tokenizer", {"agent.json": '{"tools": [], "max_steps": 1}'})
    return folder / "model"


def prompts(tokenizer: ChatTokenizer, count: int, dice: random.Random) -> Prompts:
    """Random texts whose rendered prompts have `PROMPT` tokens."""
    drawn: Prompts = []
    while len(drawn) < count:
        text = "".join(dice.choice(string.ascii_lowercase + " ") for _ in range(2 * PROMPT))
        excess = len(_rendered(tokenizer, text)) - PROMPT
        while excess > 0:
            text = text[:-excess]
            excess = len(_rendered(tokenizer, text)) - PROMPT
        if not excess:
            drawn.append(Prompt(text, _rendered(tokenizer, text)))
    return drawn


def _rendered(tokenizer: ChatTokenizer, text: str) -> list[int]:
    return tokenizer.encode_chat(_chat(text), None, add_generation_prompt=True)[0]


def _chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


class Loopwright:
    """Our engine, asked by as many at a time as are let."""

    def __init__(self, folder: Path) -> None:
        from components.config.params import SCALES_FILE, load_params
        from serving.engine.local import LocalEngine

        config = load_params(SCALES_FILE.parents[2] / "params.yaml").serve
        self.engine = LocalEngine.load(folder, "agent/1", config.model_copy(update={"max_running": CROWD}))

    def contender(self, concurrent: int) -> Contender:
        return lambda batch: self.answer(batch, concurrent)

    def answer(self, batch: Prompts, concurrent: int) -> int:
        from serving.engine.backend import Completion, Event, Failure, GenerationRequest

        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        waiting, running, written = list(batch), 0, 0

        def listen(event: Event) -> None:
            if isinstance(event, Completion | Failure):
                events.put(event)

        while waiting or running:
            while waiting and running < concurrent:
                chat = _chat(waiting.pop().text)
                self.engine.submit(GenerationRequest(chat, may_call=False, max_tokens=WRITTEN), listen)
                running += 1
            event = events.get()
            assert isinstance(event, Completion)
            running -= 1
            written += event.completion_tokens
        return written


class HuggingFace:
    """`transformers` on the same folder."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        self.options = {"max_new_tokens": WRITTEN, "do_sample": False, "pad_token_id": 0}

    def one_by_one(self, batch: Prompts) -> int:
        return sum(self.together([prompt]) for prompt in batch)

    def together(self, batch: Prompts) -> int:
        import torch

        with torch.inference_mode():
            ids = torch.tensor([prompt.ids for prompt in batch])
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **self.options)
        return int(out.shape[0] * (out.shape[1] - PROMPT))

    def continuous(self, batch: Prompts) -> int:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        settings = GenerationConfig(eos_token_id=-1, **self.options)
        blocks = ContinuousBatchingConfig(
            page_size=32, num_blocks=4 * CROWD * (PROMPT + WRITTEN) // 32, max_batch_tokens=1024
        )
        answers = self.model.generate_batch([prompt.ids for prompt in batch], settings, blocks)
        return sum(len(answer.generated_tokens) for answer in answers.values())


def timed(contender: Contender, batch: Prompts) -> tuple[float, float]:
    """Tokens per second of wall time, and of processor time, which says more on a machine that others use too."""
    began, worked = time.perf_counter(), time.process_time()
    written = contender(batch)
    return written / (time.perf_counter() - began), written / (time.process_time() - worked)


def measure(size: str, rounds: int, threads: int) -> dict[str, Any]:
    import torch

    dice = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_folder(Path(scratch), size)
        loopwright, hugging_face = Loopwright(folder), HuggingFace(folder)
        torch.set_num_threads(threads)
        contenders: dict[str, tuple[Contender, int]] = {
            ALONE: (loopwright.contender(1), 3),
            "Loopwright, 8 at a time": (loopwright.contender(8), 16),
            "Loopwright, 32 at a time": (loopwright.contender(CROWD), 2 * CROWD),
            THEIRS_ALONE: (hugging_face.one_by_one, 2),
            "Hugging Face, continuous batching of 32": (hugging_face.continuous, CROWD),
            "Hugging Face, static batch of 32": (hugging_face.together, CROWD),
        }
        speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for number in range(rounds + 1):
            for name, (contender, count) in contenders.items():
                speed = timed(contender, prompts(loopwright.engine.agent.tokenizer, count, dice))
                if number:  # the first round warms
                    speeds[name].append(speed)
        loopwright.engine.close()
        parameters = hugging_face.model.num_parameters()
    wall = {name: statistics.median(each[0] for each in measured) for name, measured in speeds.items()}
    work = {name: statistics.median(each[1] for each in measured) for name, measured in speeds.items()}
    crowd = work["Loopwright, 32 at a time"]
    return {
        "size": size,
        "parameters": parameters,
        "threads": threads,
        "tokens_per_second": {name: round(speed) for name, speed in wall.items()},
        "tokens_per_processor_second": {name: round(speed) for name, speed in work.items()},
        "ratios": {
            "8 at a time to one after another": round(work["Loopwright, 8 at a time"] / work[ALONE], 2),
            "32 at a time to one after another": round(crowd / work[ALONE], 2),
            "one after another to Hugging Face's": round(work[ALONE] / work[THEIRS_ALONE], 2),
            **{f"32 at a time to {name}": round(crowd / work[name], 2) for name in work if name.startswith("Hugging")},
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
    }


def main() -> None:
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch, for all; wall time tells with several")
    arguments = parser.parse_args()
    for size in arguments.sizes:
        print(json.dumps(measure(size, arguments.rounds, arguments.threads)))


if __name__ == "__main__":
    main()
