"""Alembic runs this file to migrate: on the connection, and in the transaction, that the store has opened."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=False)
context.run_migrations()
