"""Requests to an MLflow server: settings, time limits, credentials and errors."""

from __future__ import annotations

import base64
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from components.config.errors import InputError, Unavailable, reason_of
from components.config.secrets import hidden

if TYPE_CHECKING:
    from mlflow import MlflowClient

TIME_LIMIT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
"""MLflow's environment variable: seconds without a byte from the server after which a request fails."""
REQUEST_SECONDS, TRANSFER_SECONDS = "5", "600"
"""A server that does not answer must not hold a stage for minutes. One that stores or fetches a file of some gigabytes
is silent for as long; that it has died meanwhile is found by TCP's keepalive, within a minute."""
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    TIME_LIMIT: REQUEST_SECONDS,
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Files go through the server, which every client reaches: an address in its object store may be one of another
    # network, and an upload to it has no time limit.
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    # The address of a run that has ended, which a server's client prints into the JSON of a command.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # Traces are written from a thread of our own, which must see failures.
    "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
PROMOTED = "promoted"
"""Tag of a registered model: the number of the champion that this project promoted; during a promotion, until it is in
the audit log, those of the former and the new champion, 0 for none, the action and the actor. Any other champion was
promoted by another program, as MLflow's page."""
_OUTAGES = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED")
"""MLflow's codes of a server without an answer, of HTTP 5xx, and of a database that is away."""
_transfers = 0
"""Transfers of this process that are running."""
_counting = threading.Lock()


@contextmanager
def transfer() -> Iterator[None]:
    """Give requests of this process the time that uploads and downloads take, for the length of the block.

    MLflow has one limit for all requests, which it reads from the environment at each. A limit that the user has set
    stays.
    """
    global _transfers
    with _counting:
        _transfers += 1
        _replace_limit(REQUEST_SECONDS, TRANSFER_SECONDS)
    try:
        yield
    finally:
        with _counting:
            _transfers -= 1
            if not _transfers:
                _replace_limit(TRANSFER_SECONDS, REQUEST_SECONDS)


def _replace_limit(before: str, after: str) -> None:
    if os.environ.get(TIME_LIMIT) == before:
        os.environ[TIME_LIMIT] = after


def authorization() -> dict[str, str]:
    """The header by which MLflow's client signs in, from the environment variables that it reads."""
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if user and password:
        return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def create_version(client: MlflowClient, name: str, source: str, run_id: str, tags: dict[str, str]) -> int:
    """Create the version of a run and return its number.

    Exactly one, also where the response to a request is lost, which MLflow's client then sends again.
    """
    failure: Exception | None = None
    try:
        if not client.search_registered_models(f"name = '{name}'"):
            with suppress(*errors()):  # another process may be first
                client.create_registered_model(name, {PROMOTED: "0"})
        client.create_model_version(name, source, run_id, tags=tags)
    except errors() as error:
        failure = error
    numbers = sorted(int(row.version) for row in client.search_model_versions(f"run_id = '{run_id}'"))
    if not numbers:
        raise failure or InputError(f"{name}: the registry has no version of the run {run_id}; register it again")
    for number in numbers[1:]:
        client.delete_model_version(name, str(number))
    return numbers[0]


def errors() -> tuple[type[Exception], ...]:
    """Exceptions of a failing MLflow client, database or object store."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # The client of S3 raises its own; where its module is not imported, none of them is on its way.
    storage = sys.modules.get("botocore.exceptions")
    of_storage = (storage.BotoCoreError, storage.ClientError) if storage else ()
    return (MlflowException, SQLAlchemyError, OSError, ValueError, *of_storage)


class RemoteClient:
    """MLflow's client of a server or of its database: methods raise Unavailable while that does not answer."""

    def __init__(self, client: MlflowClient, server: str) -> None:
        self._client, self._server = client, server

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        if not callable(attribute):
            return attribute

        def translated(*values: Any, **named: Any) -> Any:
            try:
                return attribute(*values, **named)
            except errors() as error:
                if is_outage(error):
                    raise unavailable(self._server, error) from error
                raise

        return translated


def unavailable(server: str, error: Exception) -> Unavailable:
    """The failure of a request to the server that MLFLOW_TRACKING_URI names."""
    reason = reason_of(hidden(str(error)))
    return Unavailable(f"MLFLOW_TRACKING_URI: {hidden(server)}: {reason}; start that server, or unset the variable")


def is_outage(error: Exception) -> bool:
    """Whether the same request may succeed when a server, or what it stores in, is back."""
    from sqlalchemy.exc import OperationalError

    # Of the clients of files, as in `errors`; a wrong address is a ValueError.
    http, storage = sys.modules.get("requests"), sys.modules.get("botocore.exceptions")
    if http and isinstance(error, http.RequestException):
        is_answered = error.response is not None and error.response.status_code < 500
        return not is_answered and not isinstance(error, ValueError)
    of_storage = (storage.ConnectionError, storage.HTTPClientError) if storage else ()
    is_away = isinstance(error, (ConnectionError, TimeoutError, OperationalError, *of_storage))
    return is_away or getattr(error, "error_code", "") in _OUTAGES


def is_missing(error: Exception) -> bool:
    """Whether MLflow's error means that there is no such object, or that the name is invalid."""
    return getattr(error, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def is_denied(error: Exception) -> bool:
    """Whether the server does not accept the account, or it may not do this."""
    return getattr(error, "error_code", "") in ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED")
