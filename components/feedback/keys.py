"""Stored API keys: digest, owner, scopes, rate limit and expiry, never the key.

A key is 32 random bytes, so that its SHA-256 cannot be found by brute force: a slow hash, which would delay every
request, is needed only for passwords that people choose.
"""

from __future__ import annotations

import hashlib
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sqlalchemy import select

from components.config.params import InputError
from components.feedback.database import Database
from components.feedback.tables import API_KEYS, OWNER_CHARACTERS

Scope = Literal["predict", "feedback", "admin"]
"""predict: send requests and trace answers; feedback: vote; admin: both, and read all votes."""
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "lw-"
"""Prefix of every key created here, for people and secret scanners to recognize."""
NAME_CHARACTERS = OWNER_CHARACTERS


@dataclass(frozen=True)
class ApiKey:
    id: str
    digest: str
    """SHA-256, in hexadecimal."""
    scopes: frozenset[str]
    requests_per_minute: int | None = None
    """None: the endpoint's own limit, `serve.requests_per_minute`."""
    owner: str = ""
    """Who owns the records that are made with it; keys of one owner share them."""

    def opens(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes


def key_digest(key: str | bytes) -> str:
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()


class Keys(Database):
    """The part of the store that holds API keys."""

    def create_key(
        self, name: str, scopes: Sequence[str], requests_per_minute: int | None = None, owner: str | None = None
    ) -> tuple[str, str]:
        """Create a key, whose owner is its name where none is given; returns its id and the key, which is not stored.

        Raises: InputError.
        """
        owner = name if owner is None else owner
        for field, value in (("name", name), ("owner", owner)):
            if not value.strip() or len(value) > NAME_CHARACTERS or "\0" in value:
                raise InputError(
                    f"{field}: {value[:80]!r} is empty or longer than {NAME_CHARACTERS} characters; "
                    "give the name of its user"
                )
        unknown = [scope for scope in scopes if scope not in SCOPES]
        if unknown or not scopes:
            raise InputError(f"scope: {unknown[0] if unknown else 'none'!r} is not one of {', '.join(SCOPES)}")
        if requests_per_minute is not None and requests_per_minute < 1:
            raise InputError(f"requests_per_minute: {requests_per_minute} is below 1; to block a key, revoke it")
        key = PREFIX + secrets.token_urlsafe(32)
        key_id = f"key-{uuid.uuid4().hex[:12]}"
        row = {
            "id": key_id,
            "name": name,
            "digest": key_digest(key),
            "scopes": " ".join(scope for scope in SCOPES if scope in scopes),
            "requests_per_minute": requests_per_minute,
            "created": time.time(),
            "owner": owner,
        }
        with self._write() as connection:
            connection.execute(API_KEYS.insert(), row)
        return key_id, key

    def keys(self) -> list[dict[str, Any]]:
        """Every key, oldest first; `revoked` is null for an active one."""
        shown = [column for column in API_KEYS.c if column.name != "digest"]
        rows = self._rows(select(*shown).order_by(API_KEYS.c.created))
        return [{**row, "scopes": row["scopes"].split()} for row in rows]

    def open_keys(self) -> list[ApiKey]:
        return [
            ApiKey(row["id"], row["digest"], frozenset(row["scopes"].split()), row["requests_per_minute"], row["owner"])
            for row in self._rows(select(API_KEYS).where(API_KEYS.c.revoked.is_(None)))
        ]

    def revoke_key(self, key_id: str) -> None:
        """Revoke a key.

        Raises: InputError when there is no such key, or it was revoked before.
        """
        revoke = API_KEYS.update().where(API_KEYS.c.id == key_id, API_KEYS.c.revoked.is_(None))
        with self._write() as connection:
            if not connection.execute(revoke.values(revoked=time.time())).rowcount:
                raise InputError(f'{key_id}: no active key has this id; run "loopwright keys list"')
