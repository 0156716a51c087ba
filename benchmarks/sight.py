"""Speed of a decoder with sight: the first token with a picture, a second question about it, and mixed requests.

    python -m benchmarks.sight [--model DIR] [--rounds 5]

Ratios of one run, medians of its rounds, beside the same model on text of as many tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from components.inference.batching import ContinuousBatch, Row
from components.inference.served_model import load_served
from components.media.pictures import Picture
from components.models.vision import VisionLanguageModel
from components.tokenization.chat_tokenizer import ChatTokenizer
from components.tokenization.hf_tokenizer import load_chat_tokenizer

QUESTION = "What color is the shape?"
WRITTEN = 32
"""Tokens of an answer."""
REQUESTS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("data/models/agent"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    tokenizer = load_chat_tokenizer(arguments.model)
    model = load_served(arguments.model, tokenizer)
    if not isinstance(model, VisionLanguageModel):
        raise SystemExit(f"{arguments.model}: reads text only; run the project examples.sight first")
    bench = Bench(model, tokenizer)
    rounds = [bench.round(number) for number in range(arguments.rounds + 1)][1:]
    for name in rounds[0]:
        print(f"{name:45} {statistics.median(values[name] for values in rounds):.3f}")


class Bench:
    """Prompts about pictures that no earlier prompt showed, and text of as many tokens."""

    def __init__(self, model: VisionLanguageModel, tokenizer: ChatTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.random = np.random.default_rng(0)
        self.batch = ContinuousBatch(model, REQUESTS)

    def round(self, number: int) -> dict[str, float]:
        """Milliseconds to first tokens, tokens a second, and their ratios."""
        picture = self.picture()
        text = self.first_token(self.text_row(1))
        tower = seconds(lambda: self.encode(self.picture()))
        first = self.first_token(self.picture_row(picture, 1))
        second = self.first_token(self.picture_row(picture, 1, "Is there a circle?"))
        texts = self.throughput([self.text_row(WRITTEN) for _ in range(REQUESTS)])
        about = [self.picture_row(self.picture(), WRITTEN) for _ in range(REQUESTS // 2)]
        mixed = self.throughput([*about, *(self.text_row(WRITTEN) for _ in range(REQUESTS // 2))])
        return {
            "first token, text alone (ms)": 1000 * text,
            "one pass of the tower (ms)": 1000 * tower,
            "first token with a picture (ms)": 1000 * first,
            "(picture - text) / tower pass": (first - text) / tower,
            "second question about it / text alone": second / text,
            "32 texts (tokens/s)": texts,
            "32 mixed (tokens/s)": mixed,
            "mixed / text": mixed / texts,
        }

    @torch.inference_mode()
    def encode(self, picture: Picture) -> None:
        pixels = torch.from_numpy(picture.pixels).permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1
        self.model.encode_pictures(pixels.to(self.model.embed.weight.dtype))

    def picture(self) -> Picture:
        size = self.model.config.vision.image_size
        return Picture(self.random.integers(0, 256, (size, size, 3), dtype=np.uint8))

    def picture_row(self, picture: Picture, written: int, question: str = QUESTION) -> Row:
        message = {"role": "user", "content": f"<image>\n{question}", "images": [picture]}
        ids, _ = self.tokenizer.encode_chat([message], None, True)
        return Row(ids, written, pictures=[picture])

    def text_row(self, written: int) -> Row:
        """As many tokens, none of them those of an earlier prompt."""
        length = len(self.picture_row(self.picture(), 1).prompt)
        return Row(self.random.integers(20, self.tokenizer.vocab_size - 1, length).tolist(), written)

    def first_token(self, row: Row) -> float:
        return seconds(lambda: self.run([row]))

    def throughput(self, rows: Sequence[Row]) -> float:
        return sum(row.limit for row in rows) / seconds(lambda: self.run(rows))

    def run(self, rows: Sequence[Row]) -> None:
        waiting = list(rows)
        while waiting or self.batch.free < self.batch.count:
            if waiting and not self.batch.prefilling:
                count = self.batch.group(waiting)
                self.batch.admit(waiting[:count])
                del waiting[:count]
            self.batch.advance()


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
