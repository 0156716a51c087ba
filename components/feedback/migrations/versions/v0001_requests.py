"""Requests, answers and votes."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "requests",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("body", sa.JSON, nullable=False),
    )
    op.create_table(
        "answers",
        sa.Column("request_id", sa.String(64), sa.ForeignKey("requests.id"), primary_key=True),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("steps", sa.JSON, nullable=False),
        sa.Column("tool_calls", sa.JSON, nullable=False),
        sa.Column("finish_reason", sa.String(32), nullable=False),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("completion_tokens", sa.Integer, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
    )
    op.create_table(
        "feedback",
        sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("completion_id", sa.String(64), sa.ForeignKey("requests.id"), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("rating", sa.String(8), nullable=False),
        sa.Column("correction", sa.Text),
        sa.Column("comment", sa.Text),
        sa.Column("idempotency_key", sa.String(256), unique=True),
        sa.Column("replaced_by", sa.String(64)),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_requests_created", "requests", ["created"])
    op.create_index("ix_feedback_completion_id", "feedback", ["completion_id"])
