"""A server's version is downloaded whole or not at all, whatever breaks meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from components.config.errors import InputError, Unavailable
from components.tracking import downloads
from components.tracking.downloads import ATTEMPTS, local_copy


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PAUSE_SECONDS", 0.0)


def source(*outcomes: str | Exception) -> Callable[[str], str]:
    """A download that ends with these, one after another: the content of the model's file, or an error half way."""
    left = list(outcomes)

    def download(scratch: str) -> str:
        model = Path(scratch) / "agent/data/agent"
        model.mkdir(parents=True)
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            (model / "weights").write_text("go")
            raise outcome
        (model / "weights").write_text(outcome)
        return str(Path(scratch) / "agent")

    return download


def verify(model: Path) -> None:
    if (model / "weights").read_text() != "good":
        raise InputError("agent/1: other weights than were registered")


def test_a_failed_download_is_tried_again_and_leaves_nothing(tmp_path: Path) -> None:
    download = source(OSError("connection reset"), "bad", "good")
    copy = local_copy(tmp_path / "agent/1", "agent/1", download, verify)
    assert (copy / "data/agent/weights").read_text() == "good"
    assert {path.name for path in copy.parent.iterdir()} == {"1", "1.lock"}
    assert local_copy(copy, "agent/1", source(), verify) == copy, "no second download"
    (copy / "data/agent/weights").write_text("damaged")
    assert local_copy(copy, "agent/1", source("good"), verify) == copy


@pytest.mark.parametrize(
    ("outcome", "error", "message"),
    [
        (OSError("connection reset"), Unavailable, "agent/1: cannot be downloaded: connection reset; it is tried"),
        ("bad", InputError, "agent/1: other weights than were registered"),
    ],
)
def test_what_fails_each_time_says_whether_it_may_pass(
    tmp_path: Path, outcome: str | Exception, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        local_copy(tmp_path / "agent/1", "agent/1", source(*[outcome] * ATTEMPTS), verify)
    assert type(raised.value) is error
    assert [path.name for path in (tmp_path / "agent").iterdir()] == ["1.lock"]
