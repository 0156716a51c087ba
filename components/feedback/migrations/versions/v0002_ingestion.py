"""Who voted, what ingestion made of it, what was withdrawn, and what was learned from it."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("feedback", sa.Column("voice", sa.String(80), nullable=False, server_default=""))
    op.create_index("ix_feedback_replaced_by", "feedback", ["replaced_by"])
    op.create_table(
        "partitions",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("first_sequence", sa.Integer, nullable=False),
        sa.Column("last_sequence", sa.Integer, nullable=False, unique=True),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("accepted", sa.Integer, nullable=False),
        sa.Column("quarantined", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("dvc", sa.String(64)),
    )
    op.create_table(
        "outcomes",
        sa.Column("feedback_id", sa.String(64), sa.ForeignKey("feedback.id"), primary_key=True),
        sa.Column("sequence", sa.Integer, nullable=False),
        sa.Column("partition", sa.String(64), sa.ForeignKey("partitions.name"), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("voice", sa.String(80), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("content_digest", sa.String(32), nullable=False),
    )
    op.create_index("ix_outcomes_voice_created", "outcomes", ["voice", "created"])
    op.create_index("ix_outcomes_status_sequence", "outcomes", ["status", "sequence"])
    op.create_table(
        "revocations",
        sa.Column("feedback_id", sa.String(64), sa.ForeignKey("feedback.id"), primary_key=True),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("reason", sa.Text),
    )
    op.create_table(
        "improvements",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("last_sequence", sa.Integer, nullable=False),
        sa.Column("candidate", sa.String(256), nullable=False),
        sa.Column("outcome", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
    )
    op.create_index("ix_outcomes_sequence", "outcomes", ["sequence"])
    op.create_index("ix_outcomes_content_digest", "outcomes", ["content_digest"])
