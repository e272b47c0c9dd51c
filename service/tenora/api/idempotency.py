"""`Idempotency-Key`: the same key and payload give the first answer again instead of doing the work twice."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from fastapi import Request, Response
from pydantic import BaseModel

from tenora.control.control import Control
from tenora.control.idempotency import StoredAnswer
from tenora.control.records import Principal
from tenora.errors import InvalidRequestError

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


async def once(
    request: Request,
    control: Control,
    caller: Principal,
    payload: bytes,
    work: Callable[[], Awaitable[BaseModel]],
    *,
    status: int = 200,
) -> Response:
    """Answer with what `work` gives, or with what it gave to the first request that had this key.

    Without the header `work` simply runs. A failed attempt is forgotten, so that it may be repeated with its key.

    Raises:
        InvalidRequestError: the key is malformed.
        TenoraError: as `Idempotency.begin` says of a key that was used for another payload or is in use now.
    """
    key = request.headers.get("idempotency-key")
    if key is None:
        return _json((await work()).model_dump_json().encode(), status)
    if not _KEY.fullmatch(key):
        raise InvalidRequestError(
            "Idempotency-Key must be 1 to 255 visible ASCII characters.", code="invalid_idempotency_key"
        )
    route = f"{request.method} {request.url.path}"
    stored = await control.idempotency.begin(caller, route, key, payload)
    if stored is not None:
        response = _json(stored.body, stored.status)
        response.headers["idempotency-replayed"] = "true"
        return response
    try:
        answer = StoredAnswer(status, (await work()).model_dump_json().encode())
    except BaseException:
        await control.idempotency.abandon(caller, route, key)
        raise
    await control.idempotency.finish(caller, route, key, answer)
    return _json(answer.body, answer.status)


def _json(body: bytes, status: int) -> Response:
    return Response(body, status, media_type="application/json")
