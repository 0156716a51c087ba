"""Whose each request, vote and API key is; keys that expire and name their tools; who did what (audit).

Rows made before have no owner: once there are keys, the scope `admin` alone reads them. Keys that may predict keep the
tools of MCP servers, which new keys get by the scope `tools`.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("requests", _owner())
    # SQLite's constraints have no names: the convention gives this one the name under which it is dropped.
    sqlite = op.get_bind().dialect.name == "sqlite"
    convention = {"uq": "%(table_name)s_%(column_0_name)s_key"}
    with op.batch_alter_table(
        "feedback", naming_convention=convention if sqlite else None, table_kwargs={"sqlite_autoincrement": True}
    ) as feedback:
        feedback.add_column(_owner())
        feedback.drop_constraint("feedback_idempotency_key_key", type_="unique")
        feedback.create_unique_constraint("uq_feedback_owner_idempotency_key", ["owner", "idempotency_key"])
    op.add_column("api_keys", _owner())
    op.add_column("api_keys", sa.Column("expires", sa.Float))
    op.add_column("api_keys", sa.Column("tools", sa.Text))
    op.execute("UPDATE api_keys SET owner = name")
    op.execute("UPDATE api_keys SET scopes = scopes || ' tools' WHERE scopes LIKE '%predict%'")
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("actor", sa.String(256), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("object", sa.String(256), nullable=False),
        sa.Column("detail", sa.Text),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_audit_action", "audit", ["action"])


def _owner() -> sa.Column[str]:
    return sa.Column("owner", sa.String(64), nullable=False, server_default="")
