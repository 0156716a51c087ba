"""The only door to MLflow: runs of stages, uploaded from their event logs, and pyfunc models.

SQLite and plain files under the state folder, or the server that MLFLOW_TRACKING_URI names.
Run ids are always passed explicitly; MLflow is imported when it is first needed (seconds).
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from components.config.errors import InputError, Unavailable, reason_of
from components.config.secrets import hidden
from components.runtime.files import write_text
from components.runtime.model_tasks import Task, task_of
from components.runtime.process import alive, file_lock, host_id
from components.tracking.event_log import EventLog
from components.tracking.mlflow_database import EXPERIMENT, LOCK_SECONDS, artifact_location, database_uri, relocate
from components.tracking.mlflow_requests import (
    SETTINGS,
    RemoteClient,
    errors,
    is_denied,
    is_missing,
    transfer,
    unavailable,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

UPLOADER = "LOOPWRIGHT_COURIER"
"""Environment variable with the process that uploads the event logs of all stages."""

_REQUIREMENTS = ("jinja2", "numpy", "pandas", "pyarrow", "pydantic", "pyyaml", "safetensors", "tokenizers", "torch")
_LOADERS: Mapping[Task, str] = {
    "chat": "components.agent.pyfunc",
    "classify": "components.inference.pyfunc",
    "summarize": "components.inference.pyfunc",
}
"""The module that loads a model folder for MLflow, by the model's task."""
_MAX_BATCH = 1000
_MAX_PARAM = 500


def connect(home: Path) -> MlflowClient:
    """A client for the state folder's database, created on first use, or for MLFLOW_TRACKING_URI.

    Raises: InputError where the server refuses the account, Unavailable, as methods do, while it does not answer.
    """
    if "%" in sys.prefix:
        # In the path of MLflow's package its migrations fail.
        raise InputError(f"{sys.prefix}: MLflow cannot have '%' in the path of its environment; move the project")
    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)
    from mlflow import MlflowClient

    uri = os.environ.get("MLFLOW_TRACKING_URI") or database_uri(home)
    # `loopwright env` names the state folder's own database.
    server = None if uri == database_uri(home) else uri
    if importlib.util.find_spec("psycopg2") is None:  # the driver of MLflow's default; ours is psycopg
        uri = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", uri)
    client = MlflowClient(uri, uri)
    try:
        if not server and artifact_location(home) == (home / "mlflow" / "artifacts").as_uri():
            return client
        # Two processes must not create the tables at the same time.
        with file_lock(home / "mlflow", "database", patience=LOCK_SECONDS):
            if not server:
                relocate(home)
            if client.get_experiment_by_name(EXPERIMENT) is None:
                _create_experiment(client, None if _is_server(uri) else _artifact_root(home, server))
    except errors() as error:
        if not server:
            raise
        if is_denied(error):
            reason, account = reason_of(hidden(str(error))), "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            raise InputError(f"MLFLOW_TRACKING_URI: {hidden(server)}: refused: {reason}; check {account}") from error
        raise unavailable(server, error) from error
    return cast("MlflowClient", RemoteClient(client, server)) if server else client


def _is_server(uri: str) -> bool:
    """Whether the address is a server's, which says where artifacts go, and not a database's."""
    return uri.partition(":")[0].partition("+")[0] not in ("sqlite", "postgresql", "mysql", "mssql")


def _artifact_root(home: Path, database: str | None) -> str:
    """Where the artifacts of a database's runs go; by default MLflow puts them into the current folder."""
    root = os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT") if database else None
    return root or (home / "mlflow" / "artifacts").as_uri()


def _create_experiment(client: MlflowClient, artifact_location: str | None) -> None:
    try:
        client.create_experiment(EXPERIMENT, artifact_location=artifact_location)
    except errors():
        if client.get_experiment_by_name(EXPERIMENT) is None:  # not made by another machine meanwhile
            raise


def create_run(client: MlflowClient, name: str, tags: Mapping[str, str], parent: str | None, start_ms: int) -> str:
    """Start a run and return its id."""
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    own = {"mlflow.source.name": "loopwright", "mlflow.source.type": "PROJECT", **tags}
    if parent:
        own["mlflow.parentRunId"] = parent
    run_id: str = client.create_run(experiment, start_time=start_ms, tags=own, run_name=name).info.run_id
    return run_id


def end_killed_runs(client: MlflowClient, name: str, home: Path) -> None:
    """Mark runs of that name in this state folder that count as running; the caller knows that none does.

    Another host, even of the same name, may have a state folder of the same path on the same server.
    """
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    unended = f"attributes.status = 'RUNNING' and attributes.run_name = '{name}'"
    for run in client.search_runs([experiment], unended):
        tags, host = run.data.tags, host_id(home)
        if tags.get("home") == str(home) and tags.get("host", host) == host:  # quotes of a path may break the filter
            client.set_terminated(run.info.run_id, "KILLED")


@contextmanager
def open_tracker(stage: str, key: str, home: Path) -> Iterator[EventLog]:
    """A tracker for one stage; uploads its event log itself when no run of the orchestrator does."""
    folder = home / "tracking"
    is_uploaded = alive(int(os.environ.get(UPLOADER, "0")))
    uploader = None if is_uploaded else Uploader(home)
    if uploader:
        uploader.start()
    try:
        with EventLog(folder, stage, key) as event_log:
            yield event_log
    finally:
        if uploader:
            uploader.finish()


class Uploader(threading.Thread):
    """Uploads event logs to MLflow in the background during a run."""

    def __init__(self, home: Path) -> None:
        super().__init__(name="uploader", daemon=True)
        self.folder = home / "tracking"
        self._home = home
        self._finishing = threading.Event()
        self._client: MlflowClient | None = None

    def finish(self, seconds: float = 60.0) -> None:
        """Upload the rest, waiting no longer than `seconds`; what is left goes with the next run."""
        self._finishing.set()
        self.join(seconds)

    def run(self) -> None:
        while True:
            last = self._finishing.is_set()
            failure = self._upload_all(patience=10.0 if last else 0.0)
            if last:
                break
            self._finishing.wait(5.0 if failure else 1.0)
        if failure:
            print(f"tracking: {failure}; kept in {self.folder}, goes with the next run", file=sys.stderr, flush=True)

    def _upload_all(self, patience: float) -> str:
        """Upload new lines of all event logs, one uploader at a time; returns the failure, if any."""
        try:
            self._client = self._client or connect(self._home)
            with file_lock(self.folder, "uploader", patience):
                for lines in sorted(self.folder.glob("*/lines.jsonl")):
                    _upload(self._client, lines.parent)
        except InputError as error:
            return str(error)
        except errors() as error:
            return " ".join(hidden(f"MLflow: {error}").split())[:300]
        return ""


def _upload(client: MlflowClient, folder: Path) -> None:
    """Send the new lines of an event log; a finished event log is removed."""
    state_file = folder / "delivered.json"
    sent: dict[str, Any] = {"run_id": None, "offset": 0, "pid": 0, "children": {}}
    if state_file.exists():
        sent = json.loads(state_file.read_text())
    with (folder / "lines.jsonl").open("rb") as file:
        file.seek(sent["offset"])
        read = file.read()
    whole = read.rpartition(b"\n")[0]
    end = sent["offset"] + len(read)
    events = [event for line in whole.splitlines() if (event := _parsed(line))]
    if events and events[0]["kind"] == "start" and "child" not in events[0]:
        start = events[0]
        sent["run_id"] = create_run(client, start["name"], start["tags"], start["parent"], start["time"])
        sent["pid"] = start["pid"]
        write_text(state_file, json.dumps(sent))
    if not sent["run_id"]:
        return
    own = [event for event in events if "child" not in event]
    _send(client, sent["run_id"], own, folder)
    _upload_children(client, sent, [event for event in events if "child" in event], folder)
    sent["offset"] += len(whole) + 1 if whole else 0
    write_text(state_file, json.dumps(sent))
    ends = [event for event in own if event["kind"] == "end"]
    if not ends and alive(sent["pid"]):
        return
    if not ends and (folder / "lines.jsonl").stat().st_size > end:
        _upload(client, folder)  # the stage ended meanwhile; now its log is complete
        return
    last = ends[-1] if ends else {"status": "KILLED", "time": None}
    for run_id in (*sent["children"].values(), sent["run_id"]):
        client.set_terminated(run_id, last["status"], last["time"])
    shutil.rmtree(folder)


def _upload_children(client: MlflowClient, sent: dict[str, Any], events: list[dict[str, Any]], folder: Path) -> None:
    """Send the lines of child runs; `sent["children"]` are those that have not ended, by number."""
    for number in dict.fromkeys(str(event["child"]) for event in events):
        own = [event for event in events if str(event["child"]) == number]
        if own[0]["kind"] == "start":
            start = own[0]
            sent["children"][number] = create_run(client, start["name"], start["tags"], sent["run_id"], start["time"])
        run_id = sent["children"].get(number)
        if run_id is None:  # its first line was lost to a full disk
            continue
        _send(client, run_id, own, folder)
        if own[-1]["kind"] == "end":
            client.set_terminated(run_id, own[-1]["status"], own[-1]["time"])
            del sent["children"][number]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """An event, or None for a line that a full disk cut off."""
    try:
        event: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return event


def _send(client: MlflowClient, run_id: str, events: list[dict[str, Any]], folder: Path) -> None:
    metrics = [
        (key, value, event["time"], event["step"])
        for event in events
        if event["kind"] == "metrics"
        for key, value in event["values"].items()
    ]
    log_metrics(client, run_id, metrics)
    for event in events:
        try:
            _send_event(client, run_id, event, folder)
        except Exception as error:
            # A line that MLflow will never accept must not block those behind it.
            is_refused = isinstance(error, ValueError) and not isinstance(error, Unavailable)
            if isinstance(error, errors()) and not is_refused and not is_missing(error):
                raise
            print(f"tracking: {event['kind']} refused by MLflow: {error}", file=sys.stderr, flush=True)


def _send_event(client: MlflowClient, run_id: str, event: Mapping[str, Any], folder: Path) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    match event["kind"]:
        case "params":
            log_params(client, run_id, event["values"])
        case "dataset":
            source = json.dumps({"uri": event["source"]})
            data = Dataset(event["name"], event["digest"][:36], source_type="local", source=source)
            client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", event["context"])])])
        case "table":
            import pandas as pd

            # As objects: MLflow asks pandas for columns of that type, and pandas warns when it finds text instead.
            with transfer():
                client.log_table(run_id, pd.DataFrame(event["columns"], dtype=object), event["name"])
        case "artifact":
            path = folder / event["path"]
            with transfer():
                if path.is_dir():
                    client.log_artifacts(run_id, str(path), path.name)
                else:
                    client.log_artifact(run_id, str(path))


def log_metrics(client: MlflowClient, run_id: str, entries: Sequence[tuple[str, float, int, int]]) -> None:
    """Log `(name, value, time in ms, step)` entries in as few requests as MLflow allows."""
    from mlflow.entities import Metric

    metrics = [Metric(mlflow_name(key), *rest) for key, *rest in entries]
    for first in range(0, len(metrics), _MAX_BATCH):
        client.log_batch(run_id, metrics=metrics[first : first + _MAX_BATCH])


def log_params(client: MlflowClient, run_id: str, values: Mapping[str, Any]) -> None:
    """Log parameters in as few requests as MLflow allows; long values are cut."""
    from mlflow.entities import Param

    params = [Param(mlflow_name(key), str(value)[:_MAX_PARAM]) for key, value in values.items()]
    for first in range(0, len(params), 100):
        client.log_batch(run_id, params=params[first : first + 100])


def mlflow_name(key: str) -> str:
    """A name, or a tag's key, in the letters, digits and _-. :/ that MLflow allows."""
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)


def save_pyfunc(folder: Path, path: Path) -> None:
    """Write an MLflow model around a model folder, with our code, so that it loads anywhere."""
    with warnings.catch_warnings():
        # MLflow warns of types in its own code while it is imported.
        warnings.simplefilter("ignore")
        import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    loader = importlib.import_module(_LOADERS[task_of(folder)])
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)  # wants to know pip's version
    kinds = {int: DataType.long, float: DataType.double}
    settings = ParamSchema([ParamSpec(key, kinds[type(value)], value) for key, value in loader.DEFAULTS.items()])
    # One unnamed column of any type: strings, or a frame with a column of texts or of messages.
    signature = ModelSignature(Schema([ColSpec(AnyType())]), Schema([ColSpec(DataType.string)]), settings)
    mlflow.pyfunc.save_model(
        path,
        loader_module=loader.__name__,
        data_path=str(folder),
        code_paths=[str(Path(__file__).parents[1])],
        signature=signature,
        input_example=[loader.EXAMPLE],
        pip_requirements=[f"{name}=={metadata.version(name)}" for name in _REQUIREMENTS],
    )
