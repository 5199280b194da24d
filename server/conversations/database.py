"""One database, SQLite or PostgreSQL: commits that last, short transactions, one exception when it is in trouble."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiosqlite
import asyncpg
from sqlalchemy import URL, Connection, event, func, make_url, select
from sqlalchemy import exc as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine

from server.conversations.errors import Conflict, StoreError, StoreUnavailable

BUSY_SECONDS = 5.0
CONNECT_SECONDS = 5.0
COMMAND_SECONDS = 30.0

# An acknowledged commit survives the loss of power (synchronous, fullfsync), and deleted text is overwritten.
PRAGMAS = (
    "journal_mode = WAL",
    "synchronous = FULL",
    "fullfsync = ON",
    "checkpoint_fullfsync = ON",
    "foreign_keys = ON",
    "secure_delete = ON",
)


def default_url() -> str:
    """SQLite in the user's data directory: $XDG_DATA_HOME/bimedix, or ~/.local/share/bimedix."""
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return f"sqlite:///{Path(home) / 'bimedix' / 'conversations.db'}"


def async_url(url: str) -> URL:
    """`sqlite:///PATH` or `postgresql://...` for the async drivers. Raises ValueError for anything else."""
    try:
        parsed = make_url(url)
    except (sa.ArgumentError, ValueError):
        parsed = URL.create("none")
    backend = parsed.get_backend_name()
    # SQLite in memory, or under a URI's options, would not survive.
    if backend == "sqlite" and parsed.database and not parsed.database.startswith((":", "file:")):
        return parsed.set(drivername="sqlite+aiosqlite")
    if backend in {"postgres", "postgresql"}:
        # asyncpg takes libpq's sslmode under another name.
        query = {"ssl" if name == "sslmode" else name: value for name, value in parsed.query.items()}
        return parsed.set(drivername="postgresql+asyncpg", query=query)
    raise ValueError("the store is a URL: sqlite:////var/lib/bimedix/conversations.db, postgresql://USER@HOST/DATABASE")


def shown_url(url: str) -> str:
    """`url` without its password."""
    return make_url(url).render_as_string(hide_password=True)


class Database:
    """Connections and transactions. `read`, `write` and `autocommit` raise StoreUnavailable, Conflict or StoreError."""

    def __init__(self, url: str, *, patient: bool = False) -> None:
        """`patient` is for migrations and maintenance: statements may take as long as they need."""
        self.given_url = url
        self.url = async_url(url)
        self.shown_url = shown_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = create_async_engine(
            self.url,
            # Parameters are what people wrote: never in an exception or a log.
            hide_parameters=True,
            pool_pre_ping=not self.is_sqlite,
            pool_timeout=BUSY_SECONDS,
            connect_args=self._connect_args(patient),
        )
        self._writer = self.engine.execution_options(sqlite_begin="BEGIN IMMEDIATE")
        self._autocommit = self.engine.execution_options(sqlite_begin="")
        if self.is_sqlite:
            # At DEBUG it logs every statement with its values, whatever `hide_parameters` says.
            logging.getLogger("aiosqlite").setLevel(logging.WARNING)
            event.listen(self.engine.sync_engine, "connect", _set_pragmas)
            event.listen(self.engine.sync_engine, "begin", _begin)
        else:
            self._autocommit = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        # SQLite has one writer. Waiting for it here is fair and prompt; SQLite itself sleeps and tries again.
        self._sqlite_writer = asyncio.Lock() if self.is_sqlite else None

    def _connect_args(self, patient: bool) -> dict[str, Any]:
        if self.is_sqlite:
            # Transactions are begun by `_begin`, not by the driver's guess at which statements need one.
            return {"timeout": BUSY_SECONDS, "isolation_level": None}
        return {
            "timeout": CONNECT_SECONDS,
            "command_timeout": None if patient else COMMAND_SECONDS,
            "server_settings": {"synchronous_commit": "on", "application_name": "bimedix"},
        }

    def make_place(self) -> None:
        """Create a SQLite store's directory and file, readable by this user only: it will hold what patients write."""
        if not self.is_sqlite or self.url.database is None:
            return
        path = Path(self.url.database)
        with translated():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # A file that is there is not touched: closing any descriptor of it would take this process's locks away
            # from SQLite, and the next process to leave would delete the log that we write (see section 2.2 of SQLite's
            # "How To Corrupt An SQLite Database File").
            with suppress(FileExistsError):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A transaction for reading: one snapshot on SQLite, one per statement on PostgreSQL."""
        with translated():
            async with AsyncSession(self.engine, expire_on_commit=False) as session, session.begin():
                yield session

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """A transaction for writing, committed durably when the block ends, rolled back when it raises."""
        with translated():
            async with (
                self._alone(),
                AsyncSession(self._writer, expire_on_commit=False) as session,
                session.begin(),
            ):
                yield session

    @asynccontextmanager
    async def autocommit(self) -> AsyncIterator[AsyncConnection]:
        """A connection outside any transaction, for maintenance statements."""
        with translated():
            async with self._alone(), self._autocommit.connect() as connection:
                yield connection

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        if self._sqlite_writer is None:
            yield
            return
        async with asyncio.timeout(BUSY_SECONDS):
            await self._sqlite_writer.acquire()
        try:
            yield
        finally:
            self._sqlite_writer.release()

    async def now(self, session: AsyncSession) -> float:
        """Seconds since the epoch by the database's clock: replicas' own clocks may differ, leases must not."""
        if self.is_sqlite:
            return time.time()
        return float(await session.scalar(select(func.extract("epoch", func.clock_timestamp()))) or 0)

    async def dispose(self) -> None:
        """Close every connection."""
        await self.engine.dispose()


def _set_pragmas(connection: Any, _: object) -> None:
    connection.run_async(_apply_pragmas)


async def _apply_pragmas(connection: aiosqlite.Connection) -> None:
    for pragma in PRAGMAS:
        await _execute_patiently(connection, f"PRAGMA {pragma}")


async def _execute_patiently(connection: aiosqlite.Connection, statement: str) -> None:
    """SQLite itself does not wait where several want to turn a new file to WAL at once.

    Each reads the file's version, then asks to write it, and whoever reads already is told SQLITE_BUSY without the
    connection's timeout (`sqlite3BtreeSetVersion` and `sqlite3BtreeBeginTrans` in SQLite's btree.c).
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            async with connection.execute(statement):
                return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname != "SQLITE_BUSY" or time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.01)


def _begin(connection: Connection) -> None:
    # A writer takes the write lock at once: a reader that turns into a writer later can fail halfway.
    statement = connection.get_execution_options().get("sqlite_begin", "BEGIN")
    if statement:
        connection.exec_driver_sql(statement)


@contextmanager
def translated() -> Iterator[None]:
    """Turn database exceptions into the store's. The originals may quote values, so they are not chained."""
    try:
        yield
    except sa.IntegrityError:
        raise Conflict("two requests wanted the same place in the conversation store") from None
    except (sa.ProgrammingError, sa.DataError, sa.NotSupportedError) as error:
        raise StoreError(f"the conversation store refused a statement ({_reason(error)})") from None
    except (
        sa.DBAPIError,
        sa.TimeoutError,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
        OSError,
        TimeoutError,
    ) as error:
        raise StoreUnavailable(_reason(error)) from None


def _reason(error: BaseException) -> str:
    """SQLite's error name, PostgreSQL's SQLSTATE, or the exception's type: enough to act on, nothing people wrote."""
    cause = getattr(error, "orig", None) or error
    for candidate in (cause, cause.__cause__):
        for attribute in ("sqlite_errorname", "sqlstate"):
            if name := getattr(candidate, attribute, None):
                return str(name)
    return type(cause).__name__
