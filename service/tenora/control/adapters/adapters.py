"""Adapters: aliases and immutable versions; import, rollback, pin, export, delete."""

from __future__ import annotations

import asyncio
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tenora.adapters.digest import CONFIG_NAME, WEIGHTS_NAME, chunks, content_hasher, damaged
from tenora.config import Settings
from tenora.control.adapters import rows
from tenora.control.adapters.blobs import Blob, Blobs
from tenora.control.adapters.model_card import README_NAME, model_card
from tenora.control.adapters.peft_upload import check_loadable, stage_upload
from tenora.control.adapters.pins import Pins
from tenora.control.adapters.records import AdapterRecord
from tenora.control.adapters.resolution import split_canonical
from tenora.control.adapters.versions import NewVersion, adapter_record, add_version
from tenora.control.registry.database import Database, Session
from tenora.control.registry.ids import DIGEST_PREFIX, check_name
from tenora.control.registry.tables import AdapterRow, AdapterVersionRow
from tenora.control.storage.directory import Storage, full_disk, remove
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
            return self._record(principal, await self._meant(session, principal, name))

    async def versions(self, principal: Principal, name: str) -> Sequence[AdapterRecord]:
        """Every version, newest first."""
        async with self._database.read() as session:
            alias = await self._alias(session, principal, name)
            return self._records(principal, await rows.versions_of(session, principal.tenant_id, alias.name))

    async def rollback(self, principal: Principal, name: str, version: int | str) -> AdapterRecord:
        """Point the alias at one of its versions, given as a number or as hex digits of its digest."""
        async with self._database.read() as session:
            alias, row = await self._version(session, principal, name, version)
        if alias.pinned:
            await self.pins.require_intact(row.digest)
        async with self._database.write() as session:
            alias, row = await self._version(session, principal, name, version)
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
            alias, row = await self._active(session, principal, name)
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
                directory = self._blobs.store.path(record.digest)
                await asyncio.to_thread(_zip, directory, record.digest, model_card(record), archive)
        except BaseException as error:
            await asyncio.to_thread(remove, archive)
            if isinstance(error, NotFoundError):
                raise _missing(name) from error  # deleted meanwhile
            raise
        return str(archive)

    async def delete(self, principal: Principal, name: str) -> None:
        """Remove the alias, its versions and the checkpoints of the jobs that made them.

        Accepted requests finish, those that wait for a slot too; then slot, host copy and disk are freed unless
        another adapter has the same content.
        """
        async with self._database.write(frees=True) as session:
            alias = await self._alias(session, principal, name)
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
                raise _missing(model_name)
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

    async def _active(self, session: Session, principal: Principal, name: str) -> tuple[AdapterRow, AdapterVersionRow]:
        bare = split_canonical(principal, name)
        found: tuple[AdapterRow, AdapterVersionRow] | None = None
        if bare is not None:
            found = await rows.active_version(session, principal.tenant_id, bare)
        if found is None:
            raise _missing(name)
        return found

    async def _meant(self, session: Session, principal: Principal, name: str) -> tuple[AdapterRow, AdapterVersionRow]:
        if name.startswith("ft:"):
            version = await rows.result_version(session, principal.tenant_id, name)
            owner = None if version is None else await rows.alias_of(session, version)
            if version is None or owner is None:
                raise _missing(name)
            return owner, version
        alias, at, digits = name.partition("@")
        if not at:
            return await self._active(session, principal, name)
        if DIGEST_PREFIX.fullmatch(digits) is None:
            raise _missing(name)
        return await self._version(session, principal, alias, digits)

    async def _version(
        self, session: Session, principal: Principal, name: str, version: int | str
    ) -> tuple[AdapterRow, AdapterVersionRow]:
        """The alias, and the version of it that a number or hex digits mean."""
        alias = await self._alias(session, principal, name)
        found = await rows.versions_of(session, principal.tenant_id, alias.name, version)
        if not found:
            raise NotFoundError(f"The adapter {name!r} has no version {version!r}; list its versions.", param="version")
        if len({row.digest for _, row in found}) > 1:
            raise InvalidRequestError(f"Several versions begin with {version!r}; give more digits.", param="version")
        return alias, found[0][1]

    async def _alias(self, session: Session, principal: Principal, name: str) -> AdapterRow:
        """The alias, which may mean none of its versions: a job's result that was not to take its name over."""
        bare = split_canonical(principal, name)
        found = None if bare is None else await rows.find_alias(session, principal.tenant_id, bare)
        if found is None:
            raise _missing(name)
        return found

    def _records(
        self, principal: Principal, pairs: Iterable[tuple[AdapterRow, AdapterVersionRow]]
    ) -> Sequence[AdapterRecord]:
        on_device = frozenset(self._engine.stats.adapters_resident)
        return [adapter_record(alias, row, tenant=principal.tenant, on_device=on_device) for alias, row in pairs]

    def _record(self, principal: Principal, pair: tuple[AdapterRow, AdapterVersionRow]) -> AdapterRecord:
        return self._records(principal, [pair])[0]


def _zip(directory: Path, digest: str, card: str, archive: Path) -> None:
    """Pack a version, whose bytes are compared with its digest on their way."""
    readme = zipfile.ZipInfo(README_NAME)  # its time is a constant: equal cards make equal archives
    readme.external_attr = 0o644 << 16
    # Stored, not deflated: trained weights are noise to a compressor.
    with full_disk(), zipfile.ZipFile(archive, "x", zipfile.ZIP_STORED) as file:
        try:
            config = (directory / CONFIG_NAME).read_bytes()
            hasher = content_hasher(config)
            file.writestr(zipfile.ZipInfo.from_file(directory / CONFIG_NAME, CONFIG_NAME), config)
            entry = zipfile.ZipInfo.from_file(directory / WEIGHTS_NAME, WEIGHTS_NAME)
            with (directory / WEIGHTS_NAME).open("rb") as weights, file.open(entry, "w") as packed:
                for chunk in chunks(weights):
                    hasher.update(chunk)
                    packed.write(chunk)
        except FileNotFoundError as error:
            raise damaged(digest) from error
        file.writestr(readme, card)
    if hasher.hexdigest() != digest:
        raise damaged(digest)


def _missing(name: str) -> NotFoundError:
    return NotFoundError(f"There is no adapter {name!r}; GET /v1/adapters lists yours.", param="name")
