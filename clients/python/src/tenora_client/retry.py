"""When to try again. Pure: the clients do the sleeping."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tenora_client.errors import StatusError, TenoraError, TransportError


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with jitter; the server's Retry-After wins over it.

    Attributes:
        max_retries: attempts after the first; 0 never retries.
        base, cap: seconds; attempt k waits between half and the whole of min(cap, base * 2**k).
        max_retry_after: a longer Retry-After is the caller's decision, so the error is raised at once.
    """

    max_retries: int = 3
    base: float = 0.5
    cap: float = 8.0
    max_retry_after: float = 120.0
    random: random.Random = field(default_factory=random.Random, repr=False, compare=False)

    def delay(self, attempt: int, error: TenoraError, *, idempotent: bool) -> float | None:
        """Seconds to wait after failed attempt number `attempt` (from 0), or None to give up.

        429 and 503 were refused before any work, so they are retried for every request. A broken connection, a
        timeout, 502 and 504 may hide work that was done, so only an idempotent request is sent again. 409 never is.
        """
        if attempt >= self.max_retries or not self._may_retry(error, idempotent=idempotent):
            return None
        after = error.retry_after if isinstance(error, StatusError) else None
        if after is None:
            ceiling = min(self.cap, self.base * 2.0**attempt)
            return ceiling * (0.5 + 0.5 * self.random.random())
        return after if after <= self.max_retry_after else None

    @staticmethod
    def _may_retry(error: TenoraError, *, idempotent: bool) -> bool:
        if isinstance(error, TransportError):
            return idempotent or not error.sent
        if not isinstance(error, StatusError) or error.should_retry is False:
            return False
        return error.status_code in {429, 503} or (idempotent and error.status_code in {502, 504})
