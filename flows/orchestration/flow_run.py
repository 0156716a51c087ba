"""One flow run: Prefect's, and the MLflow run beside it that the stages' runs are children of."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from components.config.errors import Unavailable
from components.config.params import InputError, Refused
from components.runtime.process import host_id
from components.tracking.event_log import PARENT_RUN
from components.tracking.mlflow_client import Uploader, connect, create_run, end_killed_runs, mlflow_name
from flows.orchestration.prefect_server import heartbeat, home_tag, mark_crashed_runs, prefect_api, send_logs
from flows.orchestration.run_stage import StageFailed, is_refusal

if TYPE_CHECKING:
    from mlflow import MlflowClient

Note = Callable[[Mapping[str, str]], None]
Echo = Callable[[str], None]
T = TypeVar("T")

RETRIES = 2
SECONDS_BETWEEN_TRIES = 2.0
SECONDS_UNAVAILABLE = 600.0
"""How long a scheduled flow waits for a database or server that does not answer."""
LONGEST_PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class FlowRun:
    """The current flow run."""

    id: str
    """Prefect's id."""
    note: Note
    """Sets tags on the MLflow run."""


def run_flow(name: str, home: Path, echo: Echo, body: Callable[[FlowRun], T], **parameters: Any) -> T:
    """Call `body` as a flow run of this name and return what it returns.

    Inside a flow run, as of a deployment, that run is used; else a flow run is started, on the server that
    PREFECT_API_URL names or on a local server that starts while MLflow and Prefect are imported.
    """
    if flow_run := _current():
        with heartbeat(home, flow_run), _tracked(name, home, echo) as note:
            return _noted(FlowRun(flow_run, note), body)
    with prefect_api(home) as api, _tracked(name, home, echo) as note:
        from prefect import flow, tags
        from prefect.exceptions import MissingResult
        from prefect.settings import temporary_settings
        from prefect.states import Completed

        results: list[T] = []
        refusals: list[Exception] = []

        @flow(name=name, validate_parameters=False)
        def started(**parameters: Any) -> Any:  # shown in Prefect
            flow_run = _current()
            with heartbeat(home, flow_run):
                try:
                    results.append(_noted(FlowRun(flow_run, note), body))
                    return results[0]
                except (Refused, StageFailed) as error:
                    if not is_refusal(error):
                        raise
                    refusals.append(error)
                    return Completed(name="Refused", message=str(error))  # an outcome, as of a deployment

        api.wait()
        with temporary_settings(api.client), tags(home_tag(home)):
            if api.process is not None:
                mark_crashed_runs(home, own_server=True)
                echo(f"Prefect answers at {api.url.removesuffix('/api')} while this runs")
            try:
                try:
                    started(**parameters)
                except MissingResult:  # seen on a busy machine: the server's copy of the last state, without the result
                    if not (results or refusals):
                        raise
                if refusals:
                    raise refusals[0]
                return results[0]
            finally:
                send_logs()


def effect(
    function: Callable[..., T],
    *values: Any,
    of: str = "",
    retries: int = RETRIES,
    patience: float = SECONDS_UNAVAILABLE,
) -> T:
    """Call `function` as a task of the flow run, named after the function and the model `of`.

    It waits `patience` seconds for a database or server that does not answer, and is retried after other failures,
    for a network may come back; computations pass no `retries`.
    """
    from prefect import get_run_logger, task
    from prefect.cache_policies import NO_CACHE

    def report(line: str) -> None:
        get_run_logger().warning("%s", line)
        print(line, file=sys.stderr, flush=True)

    name = getattr(function, "__name__", "effect")
    wrapped = task(
        name=name,
        task_run_name=f"{name} {of}".strip(),
        cache_policy=NO_CACHE,
        retries=retries,
        retry_delay_seconds=SECONDS_BETWEEN_TRIES,
        retry_condition_fn=_may_succeed_later,
    )
    return wrapped(lambda: while_unavailable(lambda: function(*values), report, patience))()


def _may_succeed_later(task: Any, task_run: Any, state: Any) -> bool:
    """Whether a retry may succeed: wrong input stays wrong, a refusal stays a refusal, and an outage was waited for."""
    return not isinstance(state.data, InputError | Refused)


def while_unavailable(body: Callable[[], T], echo: Echo, patience: float = SECONDS_UNAVAILABLE) -> T:
    """What `body` returns; called again, with growing pauses, while a database or server does not answer.

    Raises: Unavailable after pauses of `patience` seconds: a call may have worked for hours before it failed.
    """
    waited, pause = 0.0, 1.0
    while True:
        try:
            return body()
        except Unavailable as error:
            if waited + pause > patience:
                raise
            echo(f"{error}; tries again in {pause:.0f} s")
        time.sleep(pause)
        waited, pause = waited + pause, min(2 * pause, LONGEST_PAUSE_SECONDS)


def _current() -> str:
    """The id of the flow run that this code runs in; empty outside of a flow run."""
    if "prefect" not in sys.modules:  # without importing it, which takes seconds
        return ""
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    return str(context.flow_run.id) if context and context.flow_run else ""


def _noted(run: FlowRun, body: Callable[[FlowRun], T]) -> T:
    run.note({"prefect.flow_run_id": run.id})
    return body(run)


@contextmanager
def _tracked(name: str, home: Path, echo: Echo) -> Iterator[Note]:
    """The MLflow run that the stages' runs are children of; what is noted on it waits for MLflow."""

    def begin() -> tuple[MlflowClient, str]:
        client, tags = connect(home), {"home": str(home), "host": host_id(home)}
        end_killed_runs(client, name, home)
        return client, create_run(client, name, tags, None, int(time.time() * 1000))

    uploader = Uploader(home)
    client, run_id = while_unavailable(begin, echo)
    os.environ[PARENT_RUN] = run_id
    uploader.start()

    def note(tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            while_unavailable(partial(client.set_tag, run_id, mlflow_name(key), value), echo)

    status, patience = "FAILED", 0.0
    try:
        yield note
        status, patience = "FINISHED", SECONDS_UNAVAILABLE
    finally:
        del os.environ[PARENT_RUN]
        uploader.finish()
        with suppress(Unavailable):  # the work is done, or says itself why it failed; the next run ends this one
            while_unavailable(partial(client.set_terminated, run_id, status), echo, patience)
