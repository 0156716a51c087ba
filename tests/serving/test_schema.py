"""Requests that `/openapi.json` allows, and some that it does not: nothing breaks, nothing is undocumented.

LOOPWRIGHT_TEST_CASES says how many of each route and kind are drawn; the suite draws few.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CASES = int(os.environ.get("LOOPWRIGHT_TEST_CASES", "5"))
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SECONDS_TO_ANSWER = 60.0
"""The client's 10 are too few while other processes take the processors."""
DRAWN = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


# Another thread of the process, such as that of a Prefect server of an earlier test, may draw from `random` meanwhile.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "forbidden"])
def test_every_route_keeps_to_its_schema(local: Any, mode: GenerationMode) -> None:
    cases = 0
    torch.set_flush_denormal(False)  # as a stage that ran in this process leaves it; Hypothesis draws such numbers
    schema = schemathesis.openapi.from_asgi("/openapi.json", local.client.app)
    routes = [found.ok() for found in schema.get_all_operations()]
    assert {"/v1/chat/completions", "/v1/feedback", "/v1/classify", "/v1/embeddings"} <= {
        route.path for route in routes
    }
    for route in routes:
        if mode is GenerationMode.NEGATIVE and not (route.body or route.query or route.headers):
            continue  # nothing to get wrong

        @DRAWN
        @given(case=route.as_strategy(mode))
        def answers(case: Any) -> None:
            if isinstance(case.body, dict) and "messages" in case.body:
                case.body["max_tokens"] = 1  # what is written is not what is asked here
            nonlocal cases
            cases += 1
            case.call_and_validate(checks=CHECKS, timeout=SECONDS_TO_ANSWER)

        answers()
    print(f"{cases:,} cases")
