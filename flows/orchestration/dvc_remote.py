"""DVC's remote: what a flow run has versioned is pushed there."""

from __future__ import annotations

from pathlib import Path

from components.config.errors import Unavailable
from components.tracking.event_log import warn_on_failure
from flows.orchestration.dvc_repo import LOCAL_REMOTE, open_repo
from flows.orchestration.flow_run import Echo, effect

_PATIENCE_SECONDS = 10.0
"""Short: nothing waits for a push, and the next one makes up for it."""


def push_to_remote(root: Path, echo: Echo) -> None:
    """Inside a flow run: push to the default remote; what fails is warned of, and pushed with the next version."""
    with warn_on_failure("dvc push"):
        pushed = effect(push_data, root, patience=_PATIENCE_SECONDS)
        if pushed is not None:
            echo(f"dvc push: {pushed} objects")


def push_data(root: Path) -> int | None:
    """Push what dvc.lock and `*.dvc` name to the default remote; the number of objects that it lacked.

    None where the default is the state folder's own remote, on this disk.

    Raises: InputError for what DVC refuses, Unavailable where the remote does not take it.
    """
    from dvc.exceptions import UploadError

    with open_repo(root) as repo:
        name = repo.config["core"].get("remote", LOCAL_REMOTE)
        if name == LOCAL_REMOTE:
            return None
        try:
            return int(repo.push())
        except UploadError as error:
            raise Unavailable(f"remote {name}: {error.amount} objects were not pushed") from error
