# Made of async_client.py by scripts/unasync.py (`make client`): change that one.
"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import httpx

from tenora_client import calls
from tenora_client.admin import Admin
from tenora_client.connection import Connection
from tenora_client.exchange import DEFAULT_TIMEOUT
from tenora_client.jobs import Jobs
from tenora_client.params import Answers, ClassifyParams, PoolParams, ReadingParams
from tenora_client.pooled import Classifications, Pooled, Rewards
from tenora_client.resources import (
    Adapters,
    Chat,
    Completions,
    Embeddings,
    Files,
    Models,
)
from tenora_client.retry import RetryPolicy


class Client(Connection):
    """A synchronous connection to a Tenora server, safe to share between threads. Close it, or use it in `with`.

    Args:
        base_url: default `$TENORA_URL`, else http://127.0.0.1:8000.
        api_key: default `$TENORA_API_KEY`, else what `tenora serve` left in `$TENORA_HOME/credentials`.
        timeout: seconds for each read, or an `httpx.Timeout`; the default suits long generations.
        retries: when to try again; `RetryPolicy(max_retries=0)` never does.
        transport: how requests travel; tests put `httpx.MockTransport` or an ASGI bridge here.
        sleep: how to wait between attempts and polls.

    Raises:
        ConfigurationError: if there is no key or the address is malformed.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        retries: RetryPolicy | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(base_url, api_key, timeout=timeout, retries=retries, transport=transport, sleep=sleep)
        self.chat = Chat(self)
        self.completions = Completions(self)
        self.models = Models(self)
        self.files = Files(self)
        self.jobs = Jobs(self)
        self.adapters = Adapters(self)
        self.admin = Admin(self)
        self.embeddings = Embeddings(self)

    def classify(
        self, texts: calls.Texts, model: str | None = None, **params: Unpack[ClassifyParams]
    ) -> Classifications:
        """The probabilities that a classification head of the adapter `model` gives its labels, for each text."""
        return self.send(calls.classify(texts, model, params))

    def pool(self, texts: calls.Texts, model: str | None = None, **params: Unpack[PoolParams]) -> Pooled:
        """What the head of the adapter `model` gives as it is, or hidden states of the base or an adapter."""
        return self.send(calls.pool(texts, model, params))

    def rewards(
        self, given: Sequence[Any] | Answers, model: str | None = None, **params: Unpack[ReadingParams]
    ) -> Rewards:
        """Score messages, conversations, or the completions of a prompt by a scalar head of the adapter `model`."""
        return self.send(calls.rewards(given, model, params))
