"""Every error that Tenora raises on purpose, as one tree.

    TenoraError
    ├── InvalidRequestError         the request cannot be understood or is out of bounds
    │   ├── ContextLengthError      prompt + max_tokens do not fit the model's context
    │   └── CompositionError        adapters that cannot be combined as asked
    ├── AuthenticationError         no key, or a key that is unknown, revoked or expired
    ├── PermissionDeniedError       the key is known but lacks the scope
    ├── NotFoundError               no such thing for this tenant (another tenant's is the same)
    │   └── ModelNotFoundError      no such model or adapter
    ├── ConflictError               the thing is in a state that forbids the request
    ├── PayloadTooLargeError        the body is over the stated limit
    ├── ArtifactError               uploaded content is malformed
    │   ├── AdapterFormatError      not a PEFT LoRA adapter of this base
    │   └── DatasetError            training rows that cannot be used, with their line numbers
    ├── RateLimitedError            contended: try again later
    ├── UnavailableError            no capacity, or no engine, now
    │   └── PoolFullError           every adapter slot is in use or pinned
    ├── StorageFullError            the disk is full
    ├── AdapterDamagedError         a stored adapter is not what was stored
    ├── UnsupportedModelError       a base model that Tenora cannot serve
    ├── TrainingError               a training run that stopped and says why
    └── ConfigurationError          settings that do not fit together, or not this machine
        └── SettingError            a setting whose value means nothing

An error says what is wrong **and what to do**. HTTP status codes live in one table, in `tenora.api.errors`.
"""

from __future__ import annotations

LONGEST_MESSAGE = 2000
LONGEST_PARAM = 200


class TenoraError(Exception):
    """Base of the tree.

    What is quoted may be of any length and is anybody's: it is cut here, for answers, rows and logs alike.

    Attributes:
        message: one sentence for the person who has to act on it.
        code: a stable machine-readable word, or None.
        param: the request field at fault, or None.
    """

    code: str | None = None

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        self.message = brief(message, LONGEST_MESSAGE)
        super().__init__(self.message)
        self.param = None if param is None else brief(param, LONGEST_PARAM)
        if code is not None:
            self.code = code


def brief(text: str, most: int) -> str:
    """`text` in at most `most` characters, its middle left out; a lone surrogate, which is no text, as its escape."""
    if len(text) > most:
        tail = most // 3  # the end of a message says what to do
        text = f"{text[: most - tail - 1]}…{text[-tail:]}"
    if text.isascii():
        return text
    escaped = text.encode(errors="backslashreplace").decode()
    return escaped if len(escaped) <= most or escaped == text else brief(escaped, most)


class InvalidRequestError(TenoraError):
    """The request cannot be understood, or one of its values is out of bounds."""

    code = "invalid_value"


class ContextLengthError(InvalidRequestError):
    """The prompt and the tokens asked for do not fit the model's context."""

    code = "context_length_exceeded"


class CompositionError(InvalidRequestError):
    """The adapters of a request cannot be combined as it asks."""

    code = "adapters_do_not_compose"


class AuthenticationError(TenoraError):
    """No key was sent, or it is unknown, revoked or expired."""

    code = "invalid_api_key"


class PermissionDeniedError(TenoraError):
    """The key is valid but lacks the scope that the call needs."""

    code = "insufficient_scope"


class NotFoundError(TenoraError):
    """The tenant has no such thing. Another tenant's thing gives exactly the same error."""

    code = "not_found"


class ModelNotFoundError(NotFoundError):
    """No model or adapter of that name for this tenant."""

    code = "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"The model {model!r} does not exist or you do not have access to it. "
            "GET /v1/models lists what you can use.",
            param="model",
        )


class ConflictError(TenoraError):
    """The thing exists but its state forbids the request; repeating it will not help."""

    code = "conflict"


class PayloadTooLargeError(TenoraError):
    """The body is larger than the limit that the message names."""

    code = "payload_too_large"


class ArtifactError(TenoraError):
    """Uploaded content is malformed."""

    code = "invalid_artifact"


class AdapterFormatError(ArtifactError):
    """The files are not a PEFT LoRA adapter that this base model can serve."""

    code = "invalid_adapter"


class DatasetError(ArtifactError):
    """The training file has rows that cannot be used; the message names lines."""

    code = "invalid_training_file"


class RateLimitedError(TenoraError):
    """Too many requests for now (HTTP 429): the queue or a quota is contended.

    Attributes:
        retry_after: seconds after which a retry makes sense.
    """

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: float = 1.0, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class UnavailableError(TenoraError):
    """No capacity, or no engine, right now (HTTP 503).

    Attributes:
        retry_after: seconds after which a retry makes sense.
    """

    code = "service_unavailable"

    def __init__(self, message: str, *, retry_after: float = 2.0, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class PoolFullError(UnavailableError):
    """Every adapter on the device is in use or pinned; one that a sequence releases makes room."""

    code = "adapter_unavailable"


class StorageFullError(TenoraError):
    """The disk is full; nothing was written."""

    code = "storage_full"


class AdapterDamagedError(TenoraError):
    """The stored files of an adapter version are gone or changed; it must be stored anew."""

    code = "adapter_damaged"


class UnsupportedModelError(TenoraError):
    """The base model is missing, or is of a kind that Tenora cannot serve; the message lists what it can."""

    code = "unsupported_model"


class TrainingError(TenoraError):
    """A training run stopped; the message says at which step and why."""

    code = "training_failed"


class ConfigurationError(TenoraError):
    """Settings that do not fit together, or a value that is out of range."""

    code = "invalid_configuration"


class DeviceLostError(BaseException):
    """The accelerator computes nothing any more in this process, which has to end so that a new one can begin.

    Not part of the tree, and no `Exception`: whoever catches those to go on with other work must not go on after it.
    """


class SettingError(ConfigurationError):
    """A setting has a value that means nothing; the message names its variable and its flag."""
