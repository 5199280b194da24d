"""The schema: made in an empty store, equal to the tables, refused when it is another version's."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text
from typer.testing import CliRunner

from server.conversations import schema
from server.conversations.cli import app
from server.conversations.database import Database
from server.conversations.errors import SchemaMismatch
from server.conversations.store import Store
from server.conversations.tables import Base
from tests.server.conversations.conftest import OWNER

pytestmark = pytest.mark.anyio

NEWEST = schema.newest()
NEXT = f"""
import sqlalchemy as sa
from alembic import op
revision = "9999"
down_revision = "{NEWEST}"
def upgrade() -> None:
    op.add_column("conversations", sa.Column("colour", sa.Text()))
"""


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """The migrations of a later version of the software."""
    folder = tmp_path / "100% newer"
    shutil.copytree(schema.MIGRATIONS, folder)
    (folder / "versions" / "9999_colour.py").write_text(NEXT)
    return folder


def differences(connection: Connection) -> list[object]:
    context = MigrationContext.configure(
        connection, opts={"version_table": schema.VERSION_TABLE, "compare_type": True, "compare_server_default": True}
    )
    return list(compare_metadata(context, Base.metadata))


async def test_migrations_make_the_tables(store: Store) -> None:
    async with store.database.read() as session:
        assert await session.run_sync(lambda s: differences(s.connection())) == []
        assert await session.run_sync(lambda s: schema.version(s.connection())) == schema.newest()


async def test_many_processes_may_start_on_an_empty_database(url: str) -> None:
    stores = [Store(url) for _ in range(4)]
    await asyncio.gather(*(store.open() for store in stores))
    await asyncio.gather(*(store.create_conversation(OWNER) for store in stores))
    assert (await stores[0].count())["conversations"] == 4
    await asyncio.gather(*(store.close() for store in stores))


async def test_an_older_store_is_refused_until_it_is_migrated(
    url: str, newer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Store(url) as store:
        made = await store.create_conversation(OWNER)
    monkeypatch.setattr(schema, "MIGRATIONS", newer)
    with pytest.raises(SchemaMismatch) as caught:
        await Store(url).open()
    command = str(caught.value).partition("Run: ")[2]
    assert command.startswith("bimedix conversations migrate --store ")
    assert NEWEST in str(caught.value)
    done = await asyncio.to_thread(CliRunner().invoke, app, ["migrate", "--store", url, "--json"])
    assert (done.exit_code, done.stdout) == (0, '{"schema": "9999"}\n'), done.output
    async with Store(url) as store:
        assert (await store.get_conversation(OWNER, made.id)).id == made.id


async def test_a_newer_store_is_refused(url: str, newer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(schema, "MIGRATIONS", newer)
        async with Store(url):
            pass
    database = Database(url)
    for attempt in (Store(url).open(), schema.migrate(database)):
        with pytest.raises(SchemaMismatch, match=rf"newer than this version's {NEWEST}.*pip install --upgrade"):
            await attempt
    await database.dispose()


async def test_somebody_elses_tables_are_left_alone(url: str) -> None:
    database = Database(url)
    database.make_place()
    async with database.write() as session:
        await session.execute(text("CREATE TABLE items (id INTEGER)"))
    await database.dispose()
    with pytest.raises(SchemaMismatch, match="tables named items that this service did not make"):
        await Store(url).open()


def test_the_command_line_imports_fast() -> None:
    code = "import sys, server.conversations.cli; print({'sqlalchemy', 'alembic', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
