"""Alembic runs this file for every command; the connection and its transaction are `schema`'s."""

from alembic import context

from server.conversations.schema import VERSION_TABLE
from server.conversations.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    # SQLite's DDL is transactional when the driver begins no transactions of its own, which `database` sees to.
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
