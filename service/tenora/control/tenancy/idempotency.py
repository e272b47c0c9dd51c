"""First answers of POSTs that carried an Idempotency-Key: the same key and payload get the first answer again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from tenora.control.registry.database import Database, RowExistsError, Session
from tenora.control.registry.ids import unix_now
from tenora.control.registry.presence import Presence
from tenora.control.registry.tables import IdempotencyRow
from tenora.control.tenancy.records import Principal
from tenora.control.tenancy.rows import (
    Reserved,
    find_answer,
    forget_answers,
    free_key,
    free_keys_of_the_dead,
    keep_answer,
)
from tenora.errors import ConflictError, InvalidRequestError

KEPT_SECONDS = 24 * 3600
LONGEST_KEY = 255
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """What the first request with this key was answered: HTTP status and body, kept byte for byte."""

    status: int
    body: bytes


class Receipt(Generic[T]):
    """The answer to a request with a reserved key, written by the very transaction that does the request's work.

    So there is no moment at which the work is done and its answer is not kept: a process that is killed then would let
    the client's retry do the work a second time.

    Attributes:
        answer: what was written; None before.
    """

    def __init__(self, reserved: Reserved, answer: Callable[[T], StoredAnswer]) -> None:
        self.answer: StoredAnswer | None = None
        self._reserved = reserved
        self._answer = answer

    async def write(self, session: Session, made: T) -> None:
        """Keep the answer for 24 hours, if the transaction commits."""
        self.answer = self._answer(made)
        await keep_answer(session, self._reserved, self.answer.status, self.answer.body)


class Idempotency:
    """`begin`, then the work with a `receipt`; or `abandon` if it raised, so that the client may try again.

    `payload` is what tells two requests apart: the body, or for an upload its fields and the SHA-256 of its bytes.
    """

    def __init__(self, database: Database, presence: Presence) -> None:
        self._database = database
        self._presence = presence

    async def begin(self, principal: Principal, route: str, key: str, payload: bytes) -> StoredAnswer | None:
        """Reserve the key. None: do the work with a `receipt`. An answer: send it, do nothing.

        Raises:
            InvalidRequestError: code idempotency_mismatch, the key was used with another payload.
            ConflictError: code idempotency_in_progress, the first request with it is still being worked on.
        """
        if not 0 < len(key) <= LONGEST_KEY:
            raise InvalidRequestError(
                f"Idempotency-Key must have 1 to {LONGEST_KEY} characters.", param="Idempotency-Key"
            )
        digest = hashlib.sha256(payload).hexdigest()
        now = unix_now()
        row = IdempotencyRow(
            tenant_id=principal.tenant_id,
            route=route,
            key=key,
            payload_hash=digest,
            process_id=self._presence.id,
            status=None,
            body=None,
            created_at=now,
        )
        try:
            async with self._database.write() as session:
                await forget_answers(session, principal.tenant_id, now - KEPT_SECONDS)
                session.add(row)
        except RowExistsError:
            return await self._first(Reserved(principal.tenant_id, route, key), digest)
        return None

    def receipt(self, principal: Principal, route: str, key: str, answer: Callable[[T], StoredAnswer]) -> Receipt[T]:
        """What the work takes along to keep its answer; `answer` makes it of the work's record."""
        return Receipt(Reserved(principal.tenant_id, route, key), answer)

    async def abandon(self, principal: Principal, route: str, key: str) -> None:
        """Free a reserved key; an answer that is kept already stays."""
        async with self._database.write() as session:
            await free_key(session, Reserved(principal.tenant_id, route, key))

    async def forget_dead(self) -> None:
        """Free the keys that processes had reserved which are dead now."""
        async with self._database.write() as session:
            await free_keys_of_the_dead(session)

    async def _first(self, reserved: Reserved, digest: str) -> StoredAnswer:
        async with self._database.read() as session:
            row = await find_answer(session, reserved)
        if row is not None and row.payload_hash != digest:
            raise InvalidRequestError(
                "This Idempotency-Key was used with another payload; use a new key for a new request.",
                code="idempotency_mismatch",
                param="Idempotency-Key",
            )
        if row is None or row.status is None or row.body is None:
            raise ConflictError(
                "The first request with this Idempotency-Key is still being worked on; try again when it has ended.",
                code="idempotency_in_progress",
                param="Idempotency-Key",
            )
        return StoredAnswer(row.status, row.body)
