"""Our decoders behind the harness that others compare models with (EleutherAI's lm-evaluation-harness, an extra).

Text is read behind the token that begins a document, as in pretraining; chats are rendered by the
model's own template and go as the very ids that it was tuned on, not through their spelled-out text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.config.params import InputError
from components.evaluation.metrics import Encoded, score_pieces
from components.inference.batching import Row, generate
from components.inference.cache_plan import context_len
from components.models.checkpoint import load_decoder
from components.models.decoder import Decoder
from components.models.devices import best_device
from components.tokenization.chat_templates import read_template
from components.tokenization.chat_tokenizer import read_json
from components.tokenization.hf_tokenizer import load_chat_tokenizer

NEW_TOKENS = 256
"""Tokens of an answer at most, where a task does not say."""
MISSING = 'lm-eval: is not installed; run pip install "loopwright[lm-eval]"'


class Answerer:
    """A model folder that answers the harness's three kinds of request."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        """Raises: InputError when the folder is no readable decoder."""
        self.model: Decoder = load_decoder(folder, device=best_device()).eval()
        self.tokenizer = load_chat_tokenizer(folder)
        self.batch_size, self.context_len = batch_size, context_len(self.model)
        self._chats: dict[str, list[int]] = {}
        """Ids of each rendered chat."""

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For (context, continuation): the natural logarithm of its probability, and whether greed would write it."""
        scored = score_pieces(self.model, self.tokenizer, [self._pair(*pair) for pair in pairs], self.batch_size)
        return [(-score.bits * math.log(2), score.greedy) for score in scored]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Of whole texts, each token foretold once, in windows that keep as much context as there is."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pieces: list[Encoded] = []
        owners: list[int] = []
        for number, text in enumerate(texts):
            windows = get_rolling_token_windows(
                self.tokenizer.encode(text), self.tokenizer.document_id, self.context_len - 1, context_len=1
            )
            for before, after in map(make_disjoint_window, windows):
                pieces.append(([*before, *after], [0] * len(before) + [1] * len(after)))
                owners.append(number)
        totals = [0.0] * len(texts)
        for owner, score in zip(owners, score_pieces(self.model, self.tokenizer, pieces, self.batch_size), strict=True):
            totals[owner] -= score.bits * math.log(2)
        return totals

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """What follows each context, up to the first of the strings under `until` or the end of the answer."""
        rows = [self._row(context, options) for context, options in requests]
        generate(self.model, rows, self.batch_size)
        return [
            _until(self.tokenizer.decode(row.generated), options.get("until") or ())
            for row, (_, options) in zip(rows, requests, strict=True)
        ]

    def render(self, messages: Sequence[Mapping[str, Any]], prompt: bool = True) -> str:
        """A chat as text that the other methods know again."""
        text = self.tokenizer.render(messages, add_generation_prompt=prompt)
        self._chats[text] = self.tokenizer.encode_chat(messages, add_generation_prompt=prompt)[0]
        return text

    def _ids(self, context: str) -> list[int]:
        return self._chats.get(context) or [self.tokenizer.document_id, *self.tokenizer.encode(context)]

    def _pair(self, context: str, continuation: str) -> Encoded:
        if context in self._chats:
            before, after = self._chats[context], self.tokenizer.encode(continuation)
        else:
            # Spaces at the end of a context are spelled with what follows them.
            stripped = context.rstrip(" ")
            whole, before = self._ids(stripped + context[len(stripped) :] + continuation), self._ids(stripped)
            after = whole[len(before) :]
        ids = [*before, *after][-self.context_len :]
        learned = min(len(after), len(ids) - 1)
        return ids, [0] * (len(ids) - learned) + [1] * learned

    def _row(self, context: str, options: Mapping[str, Any]) -> Row:
        """What a task asks to be written behind a context, of which the end is read where all has no room."""
        requested = int(options.get("max_gen_toks") or options.get("max_new_tokens") or NEW_TOKENS)
        limit = min(requested, self.context_len // 2)
        temperature = float(options.get("temperature") or 0) if options.get("do_sample") else 0.0
        prompt = self._ids(context)[-(self.context_len - limit) :]
        return Row(prompt, limit, temperature, stop_ids=(self.tokenizer.end_id,))


def _until(text: str, stops: str | Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    stops = [stops] if isinstance(stops, str) else stops
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]


def harness_model(folder: Path, batch_size: int = 32) -> Any:
    """A model folder as an `lm_eval` model, for `lm_eval.simple_evaluate(model=...)`.

    Raises: InputError when the extra is not installed, or the folder is no readable decoder.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise InputError(MISSING) from None
    answerer = Answerer(folder, batch_size)

    class Loopwright(LM):  # type: ignore[misc]
        """Requests in, the answerer's answers out."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return answerer.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return answerer.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            return answerer.generate_until([request.args for request in requests])

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return answerer.render(chat_history, add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str:
            return read_template(folder, read_json(folder / "tokenizer_config.json"))

        @property
        def tokenizer_name(self) -> str:
            return str(folder)

    return Loopwright()


def run_tasks(
    folder: Path, tasks: Sequence[str], include: Path | None, limit: int | None, chat: bool, batch_size: int
) -> dict[str, dict[str, float]]:
    """Figures by task of the harness's tasks, and of those that lie in the folder `include`.

    Raises: InputError when the extra is missing or a task is unknown.
    """
    model = harness_model(folder, batch_size)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include) if include else None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise InputError(
            f'--tasks: {unknown[0]!r} is no task of the harness; run "lm-eval ls tasks", or give --include'
        )
    ended = simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, limit=limit, apply_chat_template=chat, bootstrap_iters=0
    )
    return {
        task: {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
        for task, figures in ended["results"].items()
    }
