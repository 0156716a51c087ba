"""What holding a row to a schema costs: `python -m benchmarks.constrained`.

Rows of evenly random tokens among those allowed, with the tokenizer of a model folder; no model runs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

ROWS = 40
TOKENS = 120
CLOSED: dict[str, Any] = {"type": "object", "additionalProperties": False}
SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": {**CLOSED, "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
    "nested": {
        **CLOSED,
        "properties": {
            "lines": {
                "type": "array",
                "items": {
                    **CLOSED,
                    "properties": {"sku": {"type": "string", "pattern": "^[A-Z]{2}\\d{3}$"}, "n": {"type": "number"}},
                    "required": ["sku", "n"],
                },
            }
        },
        "required": ["lines"],
    },
}


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """For calls and answers of each schema: compiling in milliseconds, and a token in microseconds."""
    import numpy as np

    from components.agent.turn_grammar import TurnOptions, turn_rules
    from components.tokenization.hf_tokenizer import load_chat_tokenizer

    tokenizer = load_chat_tokenizer(folder)
    turn_rules(tokenizer, [], TurnOptions(), runs_tools=False)  # the vocabulary is made once
    measured = {}
    for name, schema in SCHEMAS.items():
        tools = [{"type": "function", "function": {"name": "place_order", "parameters": schema}}]
        for kind, declared, options in (
            ("call", tools, TurnOptions("required")),
            ("answer", [], TurnOptions(schema=schema)),
        ):
            began = time.perf_counter()
            rule = turn_rules(tokenizer, declared, options, runs_tools=False)
            compiled = time.perf_counter() - began
            taken = []
            for seed in range(ROWS):
                chance, watcher = np.random.default_rng(seed), rule.turn.constraint(rule.structured)
                for left in range(TOKENS, 0, -1):
                    began = time.perf_counter()
                    mask = watcher.allowed(left)
                    compile_seconds = time.perf_counter() - began
                    token = int(chance.choice(np.flatnonzero(mask)))
                    began = time.perf_counter()
                    watcher.advance(token)
                    taken.append(compile_seconds + time.perf_counter() - began)
                    if watcher.finished:
                        break
            median, late = (float(1e6 * np.quantile(taken, share)) for share in (0.5, 0.99))
            measured[f"{name} {kind}"] = {"compile_ms": 1e3 * compiled, "token_us": median, "token_us_p99": late}
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.constrained", description=__doc__)
    parser.add_argument(
        "--tokenizer", type=Path, default=Path("data/models/agent"), help="a tokenizer's or model's folder"
    )
    for name, numbers in measure(parser.parse_args().tokenizer).items():
        print(json.dumps({"what": name, **{key: round(value, 2) for key, value in numbers.items()}}))


if __name__ == "__main__":
    main()
