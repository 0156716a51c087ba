"""What several endpoints and hosts share: rate limits, the endpoints that run, leases, and conversations."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "rate_limits",
        sa.Column("key", sa.String(96), primary_key=True),
        sa.Column("full_at", sa.Float, nullable=False),
    )
    if op.get_bind().dialect.name == "postgresql":
        # Written by every request, and worth nothing after a crash.
        op.execute("ALTER TABLE rate_limits SET UNLOGGED")
    op.create_table(
        "replicas",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("seen", sa.Float, nullable=False),
        sa.Column("models", sa.JSON, nullable=False),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(256), nullable=False),
        sa.Column("token", sa.Integer, nullable=False),
        sa.Column("expires", sa.Float, nullable=False),
    )
    op.add_column("answers", sa.Column("conversation", sa.String(32)))
    op.create_index("ix_answers_conversation", "answers", ["conversation"])
