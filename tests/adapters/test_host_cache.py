"""Prepared adapters between the disk and the slots, against a list that is searched from the front."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tenora.adapters.host_cache import HostCache
from tenora.adapters.prepared import PreparedAdapter


def flat(elements: int) -> PreparedAdapter:
    return PreparedAdapter(torch.zeros(elements), (1,), (1.0,))


def test_the_least_recently_used_go_first() -> None:
    cache = HostCache(40)
    a, b, c = flat(4), flat(4), flat(4)
    cache.put("a", a)
    cache.put("b", b)
    assert cache.get("a") is a
    cache.put("c", c)
    assert cache.digests() == ("a", "c")
    assert cache.get("b") is None
    assert cache.used_bytes == 32


def test_one_that_exceeds_the_budget_is_held_alone() -> None:
    cache = HostCache(0)
    cache.put("a", flat(4))
    cache.put("b", flat(8))
    assert cache.digests() == ("b",)
    assert (cache.size("b"), cache.size("a")) == (32, 0)
    cache.check_integrity()


def test_the_proof_notices_bytes_that_were_not_counted() -> None:
    cache = HostCache(40)
    cache.put("a", flat(4))
    cache.used_bytes -= 4
    with pytest.raises(RuntimeError, match="holds 16 bytes but counts 12"):
        cache.check_integrity()
    cache = HostCache(40)
    cache.put("a", flat(4))
    cache.put("b", flat(4))
    cache.max_bytes = 16
    with pytest.raises(RuntimeError, match="more than its 16"):
        cache.check_integrity()


class CacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cache = HostCache(100)
        self.model: list[tuple[str, PreparedAdapter]] = []

    digests = st.sampled_from("abcdef")

    @rule(digest=digests, elements=st.integers(1, 30))
    def put(self, digest: str, elements: int) -> None:
        adapter = flat(elements)
        self.cache.put(digest, adapter)
        self.model = [entry for entry in self.model if entry[0] != digest] + [(digest, adapter)]
        while len(self.model) > 1 and sum(held.nbytes for _, held in self.model) > 100:
            del self.model[0]

    @rule(digest=digests)
    def get(self, digest: str) -> None:
        found = dict(self.model).get(digest)
        assert self.cache.get(digest) is found
        if found is not None:
            self.model = [entry for entry in self.model if entry[0] != digest] + [(digest, found)]

    @rule(digest=digests)
    def discard(self, digest: str) -> None:
        self.cache.discard(digest)
        self.model = [entry for entry in self.model if entry[0] != digest]

    @invariant()
    def equal(self) -> None:
        self.cache.check_integrity()
        assert self.cache.digests() == tuple(digest for digest, _ in self.model)
        assert len(self.cache) == len(self.model)


CacheMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestCache = CacheMachine.TestCase
