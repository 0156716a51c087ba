"""Schedules and their last success, which were files of one host."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "schedules",
        sa.Column("flow", sa.String(64), primary_key=True),
        sa.Column("scheduled", sa.Float),
        sa.Column("succeeded", sa.Float),
    )
