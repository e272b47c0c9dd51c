"""What the database's driver raises, told by its codes: SQLite's result codes and Postgres' SQLSTATEs."""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DBAPIError

from tenora.errors import StorageFullError, TenoraError, UnavailableError

_PRIMARY = 0xFF  # the low byte of SQLite's extended codes is the code that they refine
_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE}  # the latter: no room for the index of the log
_BUSY = {
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_IOERR_NOMEM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
}
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY}
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_FULL_STATES = ("53100",)
_BUSY_STATES = ("08", "53", "57", "40001", "40P01", "55P03")
_DAMAGED_STATES = ("XX001", "XX002", "58030")


class RegistryBusyError(UnavailableError):
    """Another process holds the registry, or it cannot be reached now; nothing was written. Trying again may help."""

    code = "registry_busy"

    def __init__(self) -> None:
        super().__init__("The registry is busy; try again in a moment.")


class RegistryDamagedError(TenoraError):
    """What the registry's disk gives back is not what was written, or nothing can be written to it at all."""

    code = "registry_damaged"

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"The registry's database is damaged or its disk has failed ({reason}). Nothing was changed. The operator "
            "has to stop the service and restore the database from a backup."
        )


def told(error: DBAPIError) -> TenoraError | None:
    """The error of ours that says the same; None if it is nobody's fault but ours."""
    origin = error.orig
    code = getattr(origin, "sqlite_errorcode", None)
    if code is not None:
        reason = str(getattr(origin, "sqlite_errorname", code))
        kinds = {code, code & _PRIMARY}
        full, busy, damaged = bool(kinds & _FULL), bool(kinds & _BUSY), bool(kinds & _DAMAGED)
    else:
        state = str(getattr(origin, "sqlstate", None) or getattr(origin, "pgcode", None) or "")
        reason = f"SQLSTATE {state}"
        full, damaged = state.startswith(_FULL_STATES), state.startswith(_DAMAGED_STATES)
        busy = error.connection_invalidated or state.startswith(_BUSY_STATES)
    if full:
        return StorageFullError("The disk of the registry is full; free some space and try again.")
    if busy:
        return RegistryBusyError()
    return RegistryDamagedError(reason) if damaged else None
