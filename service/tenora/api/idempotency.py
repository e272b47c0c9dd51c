"""`Idempotency-Key`: the same key and payload give the first answer again instead of doing the work twice."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request, Response
from pydantic import BaseModel

from tenora.control.control import Control
from tenora.control.tenancy.idempotency import Receipt, StoredAnswer
from tenora.control.tenancy.records import Principal
from tenora.errors import InvalidRequestError

T = TypeVar("T")
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


async def once(
    request: Request,
    control: Control,
    caller: Principal,
    payload: bytes,
    work: Callable[[Receipt[T] | None], Awaitable[T]],
    show: Callable[[T], BaseModel],
    *,
    status: int = 200,
) -> Response:
    """Answer with what `work` makes, or with what was answered to the first request that had this key.

    Without the header `work` simply runs. A failed attempt is forgotten, so that it may be repeated with its key.

    Args:
        payload: what tells two requests with one key apart.
        work: does what was asked for; it writes the receipt in the transaction that does it.
        show: the answer's body.
        status: the answer's HTTP status.

    Raises:
        InvalidRequestError: the key is malformed.
        TenoraError: as `Idempotency.begin` says of a key that was used for another payload or is in use now.
    """

    def answer(made: T) -> StoredAnswer:
        return StoredAnswer(status, show(made).model_dump_json().encode())

    key = request.headers.get("idempotency-key")
    if key is None:
        return _response(answer(await work(None)))
    if not _KEY.fullmatch(key):
        raise InvalidRequestError(
            "Idempotency-Key must be 1 to 255 visible ASCII characters.", code="invalid_idempotency_key"
        )
    route = f"{request.method} {request.url.path}"
    stored = await control.idempotency.begin(caller, route, key, payload)
    if stored is not None:
        response = _response(stored)
        response.headers["idempotency-replayed"] = "true"
        return response
    receipt = control.idempotency.receipt(caller, route, key, answer)
    try:
        made = await work(receipt)
    except BaseException:
        await control.idempotency.abandon(caller, route, key)
        raise
    # What a repetition is told, to the byte.
    return _response(receipt.answer or answer(made))


def _response(answer: StoredAnswer) -> Response:
    return Response(answer.body, answer.status, media_type="application/json")
