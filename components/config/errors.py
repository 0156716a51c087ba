"""The two errors that end a command with one line instead of a traceback, and other errors within such a line."""

from __future__ import annotations


class InputError(ValueError):
    """Wrong input that its sender can fix: *where: what, with its value; what is allowed or what to run*."""


class Unavailable(InputError):
    """A database or server does not answer; the same call may succeed later."""


class Refused(Exception):
    """Data validation or the promotion gate refused. The command exits with 3."""


def reason_of(error: object) -> str:
    """A library's error as part of a line: on one line, and not longer than can be read."""
    return " ".join(str(error).split())[:300]
