"""Errors of a database that are nobody's defect; its dialect tells by the driver's codes which one it is."""

from __future__ import annotations

from tenora.errors import ConflictError, StorageFullError, TenoraError, UnavailableError


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


class RowExistsError(ConflictError):
    """Another row has the same key or name already; nothing was written."""

    code = "exists"

    def __init__(self) -> None:
        super().__init__("Something of that name is there already, or was made at this moment; nothing was stored.")


def registry_full() -> StorageFullError:
    """No room on the registry's disk."""
    return StorageFullError("The disk of the registry is full; free some space and try again.")


def registry_orphan() -> ConflictError:
    """A row whose owner is gone: a tenant's last upload may end after the tenant has."""
    return ConflictError("What this belongs to was deleted meanwhile; nothing was stored.", code="deleted")
