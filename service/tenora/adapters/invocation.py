"""Activated LoRA: an adapter that acts only from its invocation on, a string of tokens in the prompt. Free of torch.

Before it every token is computed as the base computes it, so that its keys and values are those of the base, and of
every other such adapter (Greenewald et al. 2025, arXiv:2504.12397).
"""

from __future__ import annotations

from collections.abc import Sequence

NEVER = 2**62
"""A position that no token has."""

MAX_INVOCATION = 256
"""Most tokens of an invocation."""


def adapted_from(token_ids: Sequence[int], invocation: Sequence[int]) -> int:
    """The position of the first token that an adapter acts on, as PEFT finds it.

    Args:
        token_ids: of a whole prompt.
        invocation: of the adapter; empty if it acts on every token.

    Returns:
        Where the invocation begins for the last time; NEVER if it does not occur, and everything is the base's.
    """
    if not invocation:
        return 0
    wanted, length = list(invocation), len(invocation)
    for start in range(len(token_ids) - length, -1, -1):
        if token_ids[start] == wanted[0] and list(token_ids[start : start + length]) == wanted:
            return start
    return NEVER
