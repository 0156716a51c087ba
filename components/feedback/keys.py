"""Stored API keys: digest, owner, scopes, rate limit and expiry, never the key.

A key is 32 random bytes, so that its SHA-256 cannot be found by brute force: a slow hash, which would delay every
request, is needed only for passwords that people choose.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, Connection, or_, select

from components.config.params import InputError
from components.feedback.audit import Audit
from components.feedback.database import through_restarts
from components.feedback.tables import API_KEYS, OWNER_CHARACTERS

Scope = Literal["predict", "feedback", "tools", "admin"]
"""predict: send requests and trace answers; feedback: vote; tools: have the tools of other servers called; admin: all,
and read every owner's records."""
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "lw-"
"""Prefix of every key created here, for people and secret scanners to recognize."""
NAME_CHARACTERS = OWNER_CHARACTERS
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


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
    expires: float | None = None
    """Unix time from which it opens nothing."""
    tools: frozenset[str] | None = None
    """Names of the tools that are called for it; None: every one that its scopes allow."""

    def opens(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes


def key_digest(key: str | bytes) -> str:
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()


class Keys(Audit):
    """The part of the store that holds API keys; what changes them is in the audit log."""

    def create_key(
        self,
        name: str,
        scopes: Sequence[str],
        requests_per_minute: int | None = None,
        owner: str | None = None,
        seconds: float | None = None,
        tools: Sequence[str] | None = None,
    ) -> tuple[str, str]:
        """Create a key, whose owner is its name where none is given; returns its id and the key, which is not stored.

        It expires after `seconds`; None: never.

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
        if wrong := next((tool for tool in tools or () if not _TOOL_NAME.fullmatch(tool)), None):
            raise InputError(f"tools: {wrong[:80]!r} is not the name of a tool; send names separated by commas")
        row = {
            "name": name,
            "scopes": " ".join(scope for scope in SCOPES if scope in scopes),
            "requests_per_minute": requests_per_minute,
            "owner": owner,
            "expires": None if seconds is None else time.time() + seconds,
            "tools": None if tools is None else " ".join(tools),
        }
        with self._write() as connection:
            key_id, key = _insert_key(connection, row)
            self._add_audit(connection, "key create", key_id, f"{name}: {row['scopes']}, owner {owner}")
        return key_id, key

    def rotate_key(self, name: str, grace_seconds: float, seconds: float | None = None) -> tuple[str, str]:
        """Create a key like the newest active one of a name or id, all of whose others expire after the grace period.

        The new key expires after `seconds`; None: after as long as the old one was valid for. Returns as `create_key`.

        Raises: InputError.
        """
        now = time.time()
        named = (or_(API_KEYS.c.name == name, API_KEYS.c.id == name), *_active(now))
        with self._write() as connection:
            newest = select(API_KEYS).where(*named).order_by(API_KEYS.c.created.desc())
            old = connection.execute(newest).mappings().first()
            if old is None:
                raise InputError(f'{name}: no active key has this name or id; run "loopwright keys list"')
            if seconds is None and old["expires"] is not None:
                seconds = old["expires"] - old["created"]
            until = now + grace_seconds
            earlier = or_(API_KEYS.c.expires.is_(None), API_KEYS.c.expires > until)
            connection.execute(API_KEYS.update().where(*named, earlier).values(expires=until))
            copied = ("name", "scopes", "requests_per_minute", "owner", "tools")
            row = {**{column: old[column] for column in copied}, "expires": None if seconds is None else now + seconds}
            key_id, key = _insert_key(connection, row)
            self._add_audit(connection, "key rotate", str(old["id"]), f"{old['name']}: replaced by {key_id}")
        return key_id, key

    def keys(self) -> list[dict[str, Any]]:
        """Every key, oldest first; `revoked` is null for an active one."""
        shown = [column for column in API_KEYS.c if column.name != "digest"]
        rows = self._rows(select(*shown).order_by(API_KEYS.c.created))
        return [{**row, "scopes": row["scopes"].split()} for row in rows]

    @through_restarts
    def open_keys(self) -> list[ApiKey]:
        """The keys that are neither revoked nor expired."""
        return [
            ApiKey(
                row["id"],
                row["digest"],
                frozenset(row["scopes"].split()),
                row["requests_per_minute"],
                row["owner"],
                row["expires"],
                None if row["tools"] is None else frozenset(row["tools"].split()),
            )
            for row in self._rows(select(API_KEYS).where(*_active(time.time())))
        ]

    def revoke_key(self, key_id: str) -> None:
        """Revoke a key.

        Raises: InputError when there is no such key, or it was revoked before.
        """
        revoke = API_KEYS.update().where(API_KEYS.c.id == key_id, API_KEYS.c.revoked.is_(None))
        with self._write() as connection:
            if not connection.execute(revoke.values(revoked=time.time())).rowcount:
                raise InputError(f'{key_id}: no active key has this id; run "loopwright keys list"')
            self._add_audit(connection, "key revoke", key_id)


def _insert_key(connection: Connection, row: Mapping[str, Any]) -> tuple[str, str]:
    """Insert a row with a new id and key; returns both."""
    key_id, key = f"key-{uuid.uuid4().hex[:12]}", PREFIX + secrets.token_urlsafe(32)
    connection.execute(API_KEYS.insert(), {**row, "id": key_id, "digest": key_digest(key), "created": time.time()})
    return key_id, key


def _active(now: float) -> tuple[ColumnElement[bool], ...]:
    return API_KEYS.c.revoked.is_(None), or_(API_KEYS.c.expires.is_(None), API_KEYS.c.expires > now)
