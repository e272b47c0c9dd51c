"""What a job may not ask for whose method trains the base's own weights, in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenora.control.jobs.records import JobRequest
from tenora.control.jobs.shape import Limits
from tenora.errors import AdapterFormatError, InvalidRequestError
from tenora.training.full.ranks import SERVED_RANKS
from tenora.training.methods.method import Method
from tenora.training.spec import LoraSpec


def check_apart(
    method: Method, request: JobRequest, own: Mapping[str, Any], lora: Mapping[str, Any], limits: Limits
) -> None:
    """Whether a job of such a method may be.

    Args:
        request: as sent, with what was found in it: the method's own settings, and what is asked of an adapter.

    Raises:
        InvalidRequestError: it starts from an adapter, names layers that the base lacks, or needs memory that this
            machine could never give.
    """
    if request.model != limits.base_id or "init_from" in lora:
        raise InvalidRequestError(
            f"The base's own weights are trained, so the job starts from {limits.base_id!r}, not from an adapter; name "
            "the base, or train an adapter.",
            param="model" if request.model != limits.base_id else "lora.init_from",
        )
    try:
        limits.admit_whole(own)
    except InvalidRequestError as error:
        for setting in method.settings:
            if setting.name == error.param:
                error.param = f"method.{method.name}.{setting.at}"
        raise


def served_rank(limits: Limits) -> int:
    """The highest rank whose adapter could be served here."""
    for rank in reversed(SERVED_RANKS):
        if rank <= limits.max_rank:
            try:
                limits.fits(LoraSpec(rank=rank, target_modules=limits.target_modules))
            except AdapterFormatError:
                continue
            return rank
    return min(SERVED_RANKS[0], limits.max_rank)
