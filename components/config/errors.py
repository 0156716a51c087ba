"""The two errors that end a command with one line instead of a traceback."""

from __future__ import annotations


class InputError(ValueError):
    """Wrong input that its sender can fix: *where: what, with its value; what is allowed or what to run*."""


class Unavailable(InputError):
    """A database or server does not answer; the same call may succeed later."""


class Refused(Exception):
    """Data validation or the promotion gate refused. The command exits with 3."""
