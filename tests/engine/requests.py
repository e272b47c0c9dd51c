"""Short forms for the engine's messages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import torch

from tenora.adapters.ref import AdapterRef
from tenora.engine.messages import Generate, Pool, SamplingParams
from tenora.engine.sequence import SequenceState

_ids = count()


def sampling(max_tokens: int = 8, temperature: float = 0.0, **given: Any) -> SamplingParams:
    """Greedy unless told otherwise."""
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, **given)


def generate(
    token_ids: Sequence[int],
    params: SamplingParams | None = None,
    *,
    adapter: AdapterRef | None = None,
    share_group: str = "",
    **given: Any,
) -> Generate:
    request_id = given.pop("request_id", f"request-{next(_ids)}")
    return Generate(
        request_id=request_id,
        token_ids=list(token_ids),
        sampling=params or sampling(),
        adapter=adapter,
        share_group=share_group,
        **given,
    )


def pool(token_ids: Sequence[int], **given: Any) -> Pool:
    return Pool(request_id=f"request-{next(_ids)}", token_ids=list(token_ids), **given)


def sequence(
    token_ids: Sequence[int], params: SamplingParams | None = None, output: Sequence[int] = (), **given: Any
) -> SequenceState:
    """A sequence as it stands after `output` was generated."""
    made = SequenceState.start(generate(token_ids, params, **given), next(_ids))
    made.token_ids += output
    return made


def ref(digest: str) -> AdapterRef:
    return AdapterRef(digest=digest, path=f"/nowhere/{digest}")


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 384, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
