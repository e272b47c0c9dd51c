"""How long a sequence may be: what the model was made for, what memory holds, what the operator asks for."""

from __future__ import annotations

from tenora.config import Settings
from tenora.errors import ConfigurationError
from tenora.model.spec import ModelSpec


def check_context(settings: Settings, spec: ModelSpec) -> None:
    """Before anything is loaded: raise ConfigurationError if more is asked for than the model can do."""
    if settings.max_model_len > spec.context_length:
        raise ConfigurationError(
            f"TENORA_MAX_MODEL_LEN is {settings.max_model_len}, but the model's context is {spec.context_length} "
            f"tokens ({spec.context_reason}). Lower it, or add a RoPE scaling that the model bears to its config.json."
        )


def context_length(settings: Settings, spec: ModelSpec, num_blocks: int) -> int:
    """Tokens of the longest sequence, prompt and answer together.

    Args:
        settings: with block size and KV memory settled.
        spec: of the base.
        num_blocks: KV blocks that the memory holds.

    Raises:
        ConfigurationError: more is asked for than the model or the memory can do; it is never lowered in silence.
    """
    check_context(settings, spec)
    held = num_blocks * settings.block_size
    if settings.max_model_len > held:
        needed = -(-settings.max_model_len // settings.block_size) * (settings.kv_cache_bytes // num_blocks)
        raise ConfigurationError(
            f"TENORA_MAX_MODEL_LEN is {settings.max_model_len}, but the KV memory of {settings.kv_cache_bytes} bytes "
            f"holds {held} tokens. Lower it, or raise TENORA_KV_CACHE_BYTES to {needed} or more."
        )
    return settings.max_model_len or min(spec.context_length, held)
