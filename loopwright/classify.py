"""`loopwright classify`: the labels of texts, with their scores."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loopwright.endpoint import ADDRESS, endpoint, post
from loopwright.output import Json, print_json, print_table, say

SHOWN = 5
"""Labels of each text in the table; `--json` has all."""
WIDTH = 60


def classify(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="What to classify.")],
    url: Annotated[str, typer.Option(help="Address of a running endpoint.")] = ADDRESS,
    model: Annotated[
        str, typer.Option(metavar="NAME@ALIAS|NAME/VERSION", help="Which model, where no endpoint runs.")
    ] = "classifier@champion",
    as_json: Json = False,
) -> None:
    """Print the labels of texts with scores, from the endpoint or, where none runs, the registered classifier here."""
    with endpoint(url, model) as address:
        answer = post(f"{address}/v1/classify", {"input": texts})
    if as_json:
        print_json(answer)
        return
    rows = [row for text, result in zip(texts, answer["results"], strict=True) for row in _rows(text, result)]
    print_table(("text", "label", "score"), rows)
    if cut := sum(result["truncated"] for result in answer["results"]):
        say(f"{cut} of {len(texts)} texts are longer than {answer['model']} reads: only their beginning counted")


def _rows(text: str, result: dict[str, Any]) -> list[tuple[str | None, str, float]]:
    shown = text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."
    best = list(result["scores"].items())[:SHOWN]
    return [(shown if index == 0 else None, label, score) for index, (label, score) in enumerate(best)]
