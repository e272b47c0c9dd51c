"""State directories whose registry need not be migrated anew for every test."""

from __future__ import annotations

from tenora.config import Settings
from tenora.control.registry.database import Database
from tests.support.statements import remember_statements

remember_statements()
_migrated: list[bytes] = []  # a registry on SQLite with the newest schema and nothing in it


async def migrate(settings: Settings) -> None:
    """Make the registry of a state directory that has none; all but a process's first are copies of that one."""
    root = settings.root
    root.mkdir(mode=0o700, exist_ok=True)
    file = root / "tenora.db"
    if not _migrated:
        await (await Database.open(settings.database)).close()
        _migrated.append(file.read_bytes())
    elif not file.exists():
        file.touch(mode=0o600)
        file.write_bytes(_migrated[0])
