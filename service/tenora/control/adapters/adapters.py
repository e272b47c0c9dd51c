"""Adapters: aliases and immutable versions; import, rollback, pin, export, delete."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tenora.config import Settings
from tenora.control.adapters import rows
from tenora.control.adapters.archive import write_archive
from tenora.control.adapters.blobs import Blob, Blobs
from tenora.control.adapters.lookup import missing, require_active, require_alias, require_meant, require_version
from tenora.control.adapters.model_card import model_card
from tenora.control.adapters.peft_upload import check_loadable, stage_upload
from tenora.control.adapters.pins import Pins
from tenora.control.adapters.records import AdapterRecord
from tenora.control.adapters.versions import NewVersion, adapter_record, add_version
from tenora.control.registry.database import Database, Session
from tenora.control.registry.ids import check_name
from tenora.control.registry.tables import AdapterRow, AdapterVersionRow
from tenora.control.storage.directory import Storage, remove
from tenora.control.storage.failpoints import Failpoints
from tenora.control.tenancy.erasure import AfterCommit
from tenora.control.tenancy.idempotency import Receipt
from tenora.control.tenancy.records import Principal
from tenora.errors import ConflictError, InvalidRequestError, NotFoundError
from tenora.uninterrupted import to_its_end

if TYPE_CHECKING:
    from tenora.engine.client.client import AsyncEngine


class Adapters:
    """The adapters of a tenant.

    `name` is an alias or its canonical form `tenant/name`. A missing adapter and another tenant's give the same
    NotFoundError.

    Attributes:
        pins: of all tenants.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        storage: Storage,
        blobs: Blobs,
        engine: AsyncEngine,
        base_id: str,
        failpoints: Failpoints,
    ) -> None:
        self._settings = settings
        self._database = database
        self._storage = storage
        self._blobs = blobs
        self._engine = engine
        self.pins = Pins(database, blobs, engine)
        self._base_id = base_id
        self._failpoints = failpoints

    async def import_(
        self,
        principal: Principal,
        *,
        name: str,
        config: bytes,
        weights: str,
        receipt: Receipt[AdapterRecord] | None = None,
    ) -> AdapterRecord:
        """Store an uploaded PEFT adapter under `name`; a name that exists gets a new version and points at it.

        Content that the name points at already changes nothing. Everything is checked before anything is stored.

        Args:
            config: adapter_config.json.
            weights: path of adapter_model.safetensors, which stays the caller's to remove.
            receipt: keeps the answer together with the version.

        Raises:
            AdapterFormatError: not a LoRA adapter of this base; the message names the tensor.
            PayloadTooLargeError, StorageFullError: too large for the limit, or for the disk.
            InvalidRequestError: a bad name, or the base model's.
            ConflictError: code pins_full, what is pinned leaves no room for it.
        """
        check_name(name, reserved=self._base_id)
        directory = self._storage.stage()
        try:
            limit = self._settings.max_adapter_bytes
            await to_its_end(asyncio.to_thread(stage_upload, str(directory), config, weights, limit))
            return await self._publish(principal, name, str(directory), receipt)
        finally:
            await asyncio.to_thread(remove, directory)

    async def load_path(self, principal: Principal, *, name: str, path: str, replace: bool) -> AdapterRecord:
        """Import a PEFT directory of this machine, as vLLM's load_lora_adapter does. For the operator.

        Raises:
            PermissionDeniedError: the path is not under one of `adapter_dirs`.
            InvalidRequestError: code already_loaded, the name exists and `replace` is false.
        """
        check_name(name, param="lora_name", reserved=self._base_id)
        allowed = [str(directory) for directory in self._settings.adapter_dirs]
        config, weights = await asyncio.to_thread(check_loadable, path, allowed)
        if not replace:
            async with self._database.read() as session:
                if await rows.find_alias(session, principal.tenant_id, name) is not None:
                    raise InvalidRequestError(
                        f"The adapter {name!r} is loaded already; unload it first or set load_inplace.",
                        code="already_loaded",
                        param="lora_name",
                    )
        return await self.import_(principal, name=name, config=config, weights=weights)

    async def list(self, principal: Principal) -> Sequence[AdapterRecord]:
        """The active version of every adapter, by name."""
        async with self._database.read() as session:
            return self._records(principal, await rows.active_versions(session, principal.tenant_id))

    async def get(self, principal: Principal, name: str) -> AdapterRecord:
        """The version that a name means now, or that `name@digest` or a job's result (`ft:…`) means for ever."""
        async with self._database.read() as session:
            return self._record(principal, await require_meant(session, principal, name))

    async def versions(self, principal: Principal, name: str) -> Sequence[AdapterRecord]:
        """Every version, newest first."""
        async with self._database.read() as session:
            alias = await require_alias(session, principal, name)
            return self._records(principal, await rows.versions_of(session, principal.tenant_id, alias.name))

    async def rollback(self, principal: Principal, name: str, version: int | str) -> AdapterRecord:
        """Point the alias at one of its versions, given as a number or as hex digits of its digest."""
        async with self._database.read() as session:
            alias, row = await require_version(session, principal, name, version)
        if alias.pinned:
            await self.pins.require_intact(row.digest)
        async with self._database.write() as session:
            alias, row = await require_version(session, principal, name, version)
            before = await rows.active_version(session, principal.tenant_id, alias.name)
            alias.version = row.version
            if alias.pinned:
                await self.pins.require_allowed(session)
        if alias.pinned and before is not None:
            await self.pins.move(before[1].digest, row.digest)
        return self._record(principal, (alias, row))

    async def pin(self, principal: Principal, name: str, pinned: bool) -> AdapterRecord:
        """Keep the adapter's slot on the device whatever else is called, or no longer.

        Raises:
            ConflictError: code pins_full, see `tenora.control.adapters.pins`; nothing is stored.
            AdapterDamagedError: the files are not what was stored.
        """
        if pinned:
            await self.pins.require_intact((await self.get(principal, name)).digest)
        async with self._database.write() as session:
            alias, row = await require_active(session, principal, name)
            if pinned and not alias.pinned:
                alias.pinned = True
                await self.pins.require_allowed(session)
            alias.pinned = pinned
        if pinned:
            await self.pins.keep(row.digest)
        else:
            await self.pins.let_go(row.digest)
        return self._record(principal, (alias, row))

    async def archive(self, principal: Principal, name: str) -> str:
        """Path of a zip of a version's PEFT directory with its card; the caller removes it after sending it.

        Args:
            name: as of `get`: a result that did not take its name over has `name@digest` and its `ft:…` only.

        Raises:
            AdapterDamagedError: the files are not what was stored.
        """
        record = await self.get(principal, name)
        archive = self._storage.stage(".zip")
        try:
            with self._blobs.use(record.digest):
                directory = str(self._blobs.store.path(record.digest))
                await asyncio.to_thread(write_archive, directory, record.digest, model_card(record), str(archive))
        except BaseException as error:
            await asyncio.to_thread(remove, archive)
            if isinstance(error, NotFoundError):
                raise missing(name) from error  # deleted meanwhile
            raise
        return str(archive)

    async def delete(self, principal: Principal, name: str) -> None:
        """Remove the alias, its versions and the checkpoints of the jobs that made them.

        Accepted requests finish, those that wait for a slot too; then slot, host copy and disk are freed unless
        another adapter has the same content.
        """
        async with self._database.write(frees=True) as session:
            alias = await require_alias(session, principal, name)
            versions = [row for _, row in await rows.versions_of(session, principal.tenant_id, alias.name)]
            digests = await rows.delete_versions(session, principal.tenant_id, versions)
            await session.delete(alias)
        self._failpoints.hit("adapters.after_delete")
        if alias.pinned:
            for row in (row for row in versions if row.version == alias.version):
                await self.pins.let_go(row.digest)
        await self._blobs.release(digests)

    async def delete_result(self, principal: Principal, model_name: str) -> None:
        """Remove the version that a job made (`ft:…`), and with its last version the alias.

        Raises:
            ConflictError: the alias points at it and has other versions.
        """
        async with self._database.write(frees=True) as session:
            row = await rows.result_version(session, principal.tenant_id, model_name)
            if row is None:
                raise missing(model_name)
            alias = await rows.alias_of(session, row)
            count = 0 if alias is None else await rows.count_versions(session, alias)
            if alias is not None and alias.version == row.version and count > 1:
                raise ConflictError(
                    f"The adapter {alias.name!r} points at this version; roll back to another one first, or delete it."
                )
            digests = await rows.delete_versions(session, principal.tenant_id, [row])
            if alias is not None and count == 1:
                await session.delete(alias)
        self._failpoints.hit("adapters.after_delete")
        if alias is not None and alias.pinned:
            await self.pins.let_go(row.digest)
        await self._blobs.release(digests)

    async def forget(self, session: Session, tenant_id: str) -> AfterCommit:
        """What is to go with a tenant: its pins, and the versions and checkpoints that no other tenant's row names."""
        named, pinned = await rows.named_by(session, tenant_id), await self.pins.of(session, tenant_id)

        async def let_go() -> None:
            for digest in pinned:
                await self.pins.let_go(digest)
            await self._blobs.release(named)

        return let_go

    async def _publish(
        self, principal: Principal, name: str, directory: str, receipt: Receipt[AdapterRecord] | None
    ) -> AdapterRecord:
        async with self._blobs.publishing(directory) as blob:
            self._failpoints.hit("adapters.after_blob")
            return await to_its_end(self._name(principal, name, blob, receipt))

    async def _name(
        self, principal: Principal, name: str, blob: Blob, receipt: Receipt[AdapterRecord] | None
    ) -> AdapterRecord:
        """Let the name mean what was stored, and take its pin along."""
        before: str | None = None
        async with self._database.write() as session:
            found = await rows.active_version(session, principal.tenant_id, name)
            if found is not None:
                before = found[1].digest
            await self.pins.require_room_beside(session, blob)
            if found is None or before != blob.digest:
                new = NewVersion(principal.tenant_id, name, self._base_id, source="upload")
                found = await add_version(session, new, blob)
                if found[0].pinned:
                    await self.pins.require_allowed(session)
            if receipt is not None:
                await receipt.write(session, self._record(principal, found))
        self._failpoints.hit("adapters.after_create")
        alias, row = found
        if alias.pinned and before is not None:
            await self.pins.move(before, row.digest)
        return self._record(principal, (alias, row))

    def _records(
        self, principal: Principal, pairs: Iterable[tuple[AdapterRow, AdapterVersionRow]]
    ) -> Sequence[AdapterRecord]:
        on_device = frozenset(self._engine.stats.adapters_resident)
        return [adapter_record(alias, row, tenant=principal.tenant, on_device=on_device) for alias, row in pairs]

    def _record(self, principal: Principal, pair: tuple[AdapterRow, AdapterVersionRow]) -> AdapterRecord:
        return self._records(principal, [pair])[0]
