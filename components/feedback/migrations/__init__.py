"""How a database of any earlier version becomes one of today: Alembic's revisions, one module each."""
