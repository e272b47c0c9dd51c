"""A Postgres of the test session's own on the loopback interface: nothing on it lasts, so nothing on it is synced."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from tenora.control.registry.database import Database
from tenora.processes import die_with_parent
from tests.support.patience import PATIENCE

REQUIRED = "POSTGRES_REQUIRED"  # set where a missing Postgres is a failure, not a reason to leave tests out
OPTIONS = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "shared_buffers": "16MB",
    "max_connections": "60",
    "autovacuum": "off",
    "unix_socket_directories": "",
    "listen_addresses": "127.0.0.1",
}


class Postgres:
    """A running cluster; `database()` makes a fresh migrated registry in it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._numbers = itertools.count()
        self._has_template = False

    def url(self, name: str) -> str:
        """Where a database is; the password is one that must not be told."""
        return f"postgresql://tenora:hunter2@127.0.0.1:{self.port}/{name}"

    async def empty(self) -> str:
        """The URL of a database without tables."""
        name = f"empty_{next(self._numbers)}"
        await self._execute(f"CREATE DATABASE {name}")
        return self.url(name)

    async def database(self) -> str:
        """The URL of a database with the newest schema, copied from one that was migrated once."""
        if not self._has_template:
            await self._execute("CREATE DATABASE migrated")
            await (await Database.open(self.url("migrated"))).close()
            self._has_template = True
        name = f"registry_{next(self._numbers)}"
        await self._execute(f"CREATE DATABASE {name} TEMPLATE migrated")
        return self.url(name)

    async def _execute(self, statement: str) -> None:
        connection = await asyncpg.connect(self.url("postgres"))
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


def binaries() -> Path | None:
    """The directory of `initdb` and `postgres`, or None if this machine has none."""
    found = shutil.which("initdb")
    if found is not None and Path(found).resolve().with_name("postgres").exists():
        return Path(found).resolve().parent
    return max((path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")), default=None)


def _user() -> str | None:
    """Whom the server runs as: itself it refuses to be root. None: as we."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in known)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running() -> Iterator[Postgres]:
    """A cluster for as long as the block runs; it ends with this process, however that ends."""
    directory = binaries()
    if directory is None:
        if os.environ.get(REQUIRED):
            pytest.fail(f"{REQUIRED} is set, but there is no Postgres; on Debian: apt-get install postgresql")
        pytest.skip("no Postgres on this machine; on Debian: apt-get install postgresql")
    user = _user()
    home = Path(tempfile.mkdtemp(prefix="tenora-postgres-"))
    if user is not None:
        shutil.chown(home, user)
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    log = home / "log"
    try:
        initialise = [directory / "initdb", "--no-sync", "--username=tenora", "--auth=trust", "--pgdata", home / "data"]
        done = subprocess.run(
            initialise, user=user, cwd=home, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        port = _free_port()
        options = [word for name, value in {**OPTIONS, "port": str(port)}.items() for word in ("-c", f"{name}={value}")]
        with log.open("w") as output:
            server = subprocess.Popen(
                [directory / "postgres", "-D", home / "data", *options],
                user=user,
                cwd=home,
                env=environment,
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent,  # noqa: PLW1509 (no other thread runs yet)
            )
        try:
            _await_ready(directory, port, server, log)
            yield Postgres(port)
        finally:
            server.terminate()
            try:
                server.wait(PATIENCE)
            finally:
                server.kill()
                server.wait()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _await_ready(directory: Path, port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    """Ask until it takes connections; it tells nobody when it does."""
    ask = [directory / "pg_isready", "--quiet", "--host=127.0.0.1", f"--port={port}", "--timeout=1"]
    while subprocess.run(ask, check=False).returncode:
        assert server.poll() is None, log.read_text()
