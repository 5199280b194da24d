"""The store's schema: created when there is none, refused when it is another version's, migrated on request."""

from __future__ import annotations

import shlex
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text
from sqlalchemy.ext.asyncio import AsyncSession

from server.checkpoints import tables as _checkpoint_tables  # noqa: F401 - they share the metadata
from server.conversations.database import Database
from server.conversations.errors import SchemaMismatch
from server.conversations.tables import Base

VERSION_TABLE = "conversations_schema"
MIGRATIONS = Path(__file__).parent / "migrations"
# Any fixed number: replicas that start together on an empty PostgreSQL take turns by it.
ADVISORY_LOCK = 240_213_253


async def prepare(database: Database) -> None:
    """Create the schema in an empty database, else check it. Raises SchemaMismatch, StoreUnavailable."""
    database.make_place()
    async with database.read() as session:
        found = await session.run_sync(lambda s: version(s.connection()))
    if found is None:
        await migrate(database)
    else:
        _refuse_others(found, database.shown_url)


async def migrate(database: Database) -> str:
    """Bring the schema to this version, in one transaction, and return its number. Raises SchemaMismatch if newer."""
    database.make_place()
    async with database.write() as session:
        await _one_at_a_time(database, session)
        found = await session.run_sync(lambda s: version(s.connection()))
        if found is not None and found > newest():
            _refuse_others(found, database.shown_url)
        await session.run_sync(lambda s: _upgrade(s.connection()))
    return newest()


async def _one_at_a_time(database: Database, session: AsyncSession) -> None:
    if not database.is_sqlite:
        await session.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))


def version(connection: Connection) -> str | None:
    """The schema's number, or None for a database without any. Raises SchemaMismatch for tables of something else."""
    found = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()
    if found is None:
        foreign = set(inspect(connection).get_table_names()) & set(Base.metadata.tables)
        if foreign:
            raise SchemaMismatch(
                f"The database has tables named {', '.join(sorted(foreign))} that this service did not make. "
                "Give it a database of its own with --store."
            )
    return found


def newest() -> str:
    """The number of the newest migration in this version of the software."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head


def _refuse_others(found: str, shown_url: str) -> None:
    wanted = newest()
    if found < wanted:
        raise SchemaMismatch(
            f"The conversation store has schema {found}, this version needs {wanted}. "
            f"Run: bimedix conversations migrate --store {shlex.quote(shown_url)}"
        )
    if found > wanted:
        raise SchemaMismatch(
            f"The conversation store has schema {found}, newer than this version's {wanted}. "
            "Run the version that made it: pip install --upgrade bimedix"
        )


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config


def _upgrade(connection: Connection) -> None:
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
