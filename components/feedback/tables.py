"""The tables of the newest schema; the column `voice` is the user of a vote.

`owner` is who may read a row over HTTP: the owner of the API key that made it; empty for rows made without a key, which
the scope `admin` alone reads once there are keys. A picture belongs to the requests that refer to it.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

METADATA = MetaData()
VOICE_CHARACTERS = 80
OWNER_CHARACTERS = 64

REQUESTS = Table(
    "requests",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("created", Float, nullable=False, index=True),
    Column("model", String(256), nullable=False),
    Column("body", JSON, nullable=False),
    Column("owner", String(OWNER_CHARACTERS), nullable=False, server_default=""),
)
ANSWERS = Table(
    "answers",
    METADATA,
    Column("request_id", ForeignKey("requests.id"), primary_key=True),
    Column("created", Float, nullable=False),
    Column("content", Text, nullable=False),
    Column("steps", JSON, nullable=False),
    Column("tool_calls", JSON, nullable=False),
    Column("finish_reason", String(32), nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("seconds", Float, nullable=False),
    # Digest of the conversation up to this answer, by which its next request is recognized; null in older rows.
    Column("conversation", String(32), index=True),
)
PICTURES = Table(
    "pictures",
    METADATA,
    # Digest of the pixels (components/media/pictures.py): what looks the same is stored once.
    Column("digest", String(64), primary_key=True),
    Column("created", Float, nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    # A PNG file without metadata.
    Column("content", LargeBinary, nullable=False),
)
REQUEST_PICTURES = Table(
    "request_pictures",
    METADATA,
    Column("request_id", ForeignKey("requests.id"), primary_key=True),
    Column("digest", ForeignKey("pictures.digest"), primary_key=True, index=True),
)
FEEDBACK = Table(
    "feedback",
    METADATA,
    # Increases in commit order, so that a reader can continue from the last number it read.
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("completion_id", ForeignKey("requests.id"), nullable=False, index=True),
    Column("created", Float, nullable=False),
    Column("rating", String(8), nullable=False),
    Column("correction", Text),
    Column("comment", Text),
    Column("idempotency_key", String(256)),
    Column("replaced_by", String(64)),
    Column("voice", String(VOICE_CHARACTERS), nullable=False, server_default=""),
    Column("owner", String(OWNER_CHARACTERS), nullable=False, server_default=""),
    Index("ix_feedback_replaced_by", "replaced_by"),
    UniqueConstraint("owner", "idempotency_key", name="uq_feedback_owner_idempotency_key"),
    sqlite_autoincrement=True,
)
PARTITIONS = Table(
    "partitions",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("first_sequence", Integer, nullable=False),
    Column("last_sequence", Integer, nullable=False, unique=True),
    Column("created", Float, nullable=False),
    Column("accepted", Integer, nullable=False),
    Column("quarantined", Integer, nullable=False),
    # SHA-256 of the file; empty where nothing was accepted and no file written.
    Column("digest", String(64), nullable=False),
    # DVC's hash of data/feedback with this partition; null until it is versioned.
    Column("dvc", String(64)),
)
OUTCOMES = Table(
    "outcomes",
    METADATA,
    Column("feedback_id", ForeignKey("feedback.id"), primary_key=True),
    Column("sequence", Integer, nullable=False, index=True),
    Column("partition", ForeignKey("partitions.name"), nullable=False),
    Column("status", String(16), nullable=False),
    Column("reason", Text),
    Column("voice", String(VOICE_CHARACTERS), nullable=False),
    Column("created", Float, nullable=False),
    Column("content_digest", String(32), nullable=False, index=True),
    Index("ix_outcomes_voice_created", "voice", "created"),
    Index("ix_outcomes_status_sequence", "status", "sequence"),
)
REVOCATIONS = Table(
    "revocations",
    METADATA,
    Column("feedback_id", ForeignKey("feedback.id"), primary_key=True),
    Column("created", Float, nullable=False),
    Column("reason", Text),
)
IMPROVEMENTS = Table(
    "improvements",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("created", Float, nullable=False),
    Column("last_sequence", Integer, nullable=False),
    Column("candidate", String(256), nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("reason", Text, nullable=False),
)
API_KEYS = Table(
    "api_keys",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("name", String(64), nullable=False),
    # SHA-256 of the key; the key itself is not stored.
    Column("digest", String(64), nullable=False, unique=True),
    # Words of Scope, separated by spaces.
    Column("scopes", String(64), nullable=False),
    # Null: the endpoint's own limit.
    Column("requests_per_minute", Integer),
    Column("created", Float, nullable=False),
    Column("revoked", Float),
    Column("owner", String(OWNER_CHARACTERS), nullable=False, server_default=""),
    # Unix time from which it is refused; null: never.
    Column("expires", Float),
    # Names of the tools that are run for it, separated by spaces; null: every one that its scopes allow.
    Column("tools", Text),
)
AUDIT = Table(
    "audit",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("created", Float, nullable=False),
    Column("actor", String(256), nullable=False),
    Column("action", String(32), nullable=False, index=True),
    Column("object", String(256), nullable=False),
    Column("detail", Text),
    sqlite_autoincrement=True,
)
RATE_LIMITS = Table(
    "rate_limits",
    METADATA,
    Column("key", String(96), primary_key=True),
    # Time of the database's clock at which the key may send a whole minute's requests again.
    Column("full_at", Float, nullable=False),
)
REPLICAS = Table(
    "replicas",
    METADATA,
    Column("id", String(64), primary_key=True),
    # Time of the database's clock.
    Column("seen", Float, nullable=False),
    # Names of the models that it can answer with, or has refused for itself.
    Column("models", JSON, nullable=False),
)
LEASES = Table(
    "leases",
    METADATA,
    Column("name", String(64), primary_key=True),
    # Host, process and a random part; empty once it was given back.
    Column("owner", String(256), nullable=False),
    # Increases with every owner: what an earlier owner still writes is refused.
    Column("token", Integer, nullable=False),
    # Time of the database's clock.
    Column("expires", Float, nullable=False),
)
SCHEDULES = Table(
    "schedules",
    METADATA,
    Column("flow", String(64), primary_key=True),
    # Unix time of the first registration of its schedule; null where it has none.
    Column("scheduled", Float),
    # Unix time of its last success; null: never.
    Column("succeeded", Float),
)
