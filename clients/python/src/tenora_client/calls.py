"""Every call of the API as a value: what to send and how to read the answer. No input or output happens here."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter

from tenora_client import models, pooled
from tenora_client.params import (
    Answers,
    ChatParams,
    ClassifyParams,
    CompletionParams,
    EmbeddingParams,
    JobParams,
    PoolParams,
    ReadingParams,
)
from tenora_client.settings import RowParams

T = TypeVar("T")
JobT = TypeVar("JobT", bound=models.JobState)
Texts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""A text, texts, token ids, or lists of them."""
OnBytes = Callable[[int, int], None]
"""Called with the bytes transferred so far and the total (0 if unknown)."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A multipart body, read from disk while it is sent.

    Attributes:
        fields: plain form fields.
        files: form field → path.
        on_bytes: told of the files' bytes as they leave; starts again from 0 if the request is retried.
    """

    fields: Mapping[str, str]
    files: Mapping[str, Path]
    on_bytes: OnBytes | None = None


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request and the type of its answer.

    Attributes:
        idempotency_key: makes a POST safe to repeat; the same for all attempts.
        changes_nothing: a POST that only asks.
    """

    method: str
    path: str
    answer: TypeAdapter[T]
    params: Mapping[str, str | int] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    upload: Upload | None = None
    idempotency_key: str | None = None
    changes_nothing: bool = False

    @property
    def idempotent(self) -> bool:
        """Whether sending it twice does no more than sending it once."""
        return self.method == "GET" or self.changes_nothing or self.idempotency_key is not None


_ANYTHING: TypeAdapter[object] = TypeAdapter(object)
_MODEL = TypeAdapter(models.Model)
_MODELS = TypeAdapter(models.ListPage[models.Model])
_FILE = TypeAdapter(models.File)
_FILES = TypeAdapter(models.ListPage[models.File])
_PREVIEW = TypeAdapter(models.Preview)
_ESTIMATE = TypeAdapter(models.Estimate)
_DELETED = TypeAdapter(models.Deleted)
_EVENTS = TypeAdapter(models.ListPage[models.JobEvent])
_CHECKPOINTS = TypeAdapter(models.ListPage[models.Checkpoint])
_ADAPTER = TypeAdapter(models.Adapter)
_ADAPTERS = TypeAdapter(models.ListPage[models.Adapter])
_TENANT = TypeAdapter(models.Tenant)
_TENANTS = TypeAdapter(models.ListPage[models.Tenant])
_KEY = TypeAdapter(models.ApiKey)
_KEYS = TypeAdapter(models.ListPage[models.ApiKey])
_NEW_KEY = TypeAdapter(models.NewApiKey)
_CHAT = TypeAdapter(models.ChatCompletion)
_CHAT_CHUNK = TypeAdapter(models.ChatChunk)
_COMPLETION = TypeAdapter(models.Completion)
_EMBEDDINGS = TypeAdapter(pooled.EmbeddingList)
_CLASSES = TypeAdapter(pooled.Classifications)
_POOLED = TypeAdapter(pooled.Pooled)
_REWARDS = TypeAdapter(pooled.Rewards)


def _segment(name: str) -> str:
    """`name` as one path segment: ids with `/` arrive as %2F. Dots alone would be resolved away."""
    return "".join("%2E" if char == "." else char for char in name) if set(name) == {"."} else quote(name, safe="")


def _body(params: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """The request body: named fields that are set, the typed parameters, then `extra`, which wins."""
    rest = {key: value for key, value in params.items() if key != "extra"}
    chosen = {key: value for key, value in fields.items() if value is not None}
    return {**chosen, **rest, **params.get("extra", {})}


def _query(**fields: str | int | None) -> dict[str, str | int]:
    return {key: value for key, value in fields.items() if value is not None}


# ---- inference -----------------------------------------------------------------------------------------------------


def chat(messages: Sequence[models.Message], model: str | None, params: ChatParams) -> Call[models.ChatCompletion]:
    """POST /v1/chat/completions."""
    return Call("POST", "/v1/chat/completions", _CHAT, body=_body(params, model=model, messages=list(messages)))


def chat_stream(messages: Sequence[models.Message], model: str | None, params: ChatParams) -> Call[models.ChatChunk]:
    """The same, streamed."""
    body = _body(params, model=model, messages=list(messages), stream=True)
    return Call("POST", "/v1/chat/completions", _CHAT_CHUNK, body=body)


def completion(
    prompt: str | Sequence[Any], model: str | None, params: CompletionParams, *, stream: bool = False
) -> Call[models.Completion]:
    """POST /v1/completions; `prompt` is a string, strings, token ids or lists of them."""
    text = prompt if isinstance(prompt, str) else list(prompt)
    return Call(
        "POST", "/v1/completions", _COMPLETION, body=_body(params, model=model, prompt=text, stream=stream or None)
    )


def embeddings(texts: Texts, model: str | None, params: EmbeddingParams) -> Call[pooled.EmbeddingList]:
    """POST /v1/embeddings; numbers come as bytes."""
    return _reading("/v1/embeddings", _EMBEDDINGS, _body(params, model=model, input=texts, encoding_format="base64"))


def classify(texts: Texts, model: str | None, params: ClassifyParams) -> Call[pooled.Classifications]:
    """POST /classify."""
    return _reading("/classify", _CLASSES, _body(params, model=model, input=texts))


def pool(texts: Texts, model: str | None, params: PoolParams) -> Call[pooled.Pooled]:
    """POST /pooling; numbers come as bytes."""
    return _reading("/pooling", _POOLED, _body(params, model=model, input=texts, encoding_format="base64"))


def rewards(given: Sequence[Any] | Answers, model: str | None, params: ReadingParams) -> Call[pooled.Rewards]:
    """POST /v1/rewards; `given` is messages, conversations, or a prompt with its completions."""
    return _reading("/v1/rewards", _REWARDS, _body(params, model=model, input=given))


def _reading(path: str, answer: TypeAdapter[T], body: Mapping[str, Any]) -> Call[T]:
    return Call("POST", path, answer, body=body, changes_nothing=True)


def list_models() -> Call[models.ListPage[models.Model]]:
    """GET /v1/models."""
    return Call("GET", "/v1/models", _MODELS)


def get_model(name: str) -> Call[models.Model]:
    """GET /v1/models/{name}."""
    return Call("GET", f"/v1/models/{_segment(name)}", _MODEL)


def delete_model(name: str) -> Call[models.Deleted]:
    """DELETE /v1/models/{name}."""
    return Call("DELETE", f"/v1/models/{_segment(name)}", _DELETED)


# ---- files ---------------------------------------------------------------------------------------------------------


def upload_file(
    path: Path, purpose: str, expires_after: int | None, on_bytes: OnBytes | None, idempotency_key: str | None
) -> Call[models.File]:
    """POST /v1/files; `expires_after` in seconds from the upload."""
    fields = {"purpose": purpose}
    if expires_after is not None:
        fields |= {"expires_after[anchor]": "created_at", "expires_after[seconds]": str(expires_after)}
    upload = Upload(fields, {"file": path}, on_bytes)
    return Call("POST", "/v1/files", _FILE, upload=upload, idempotency_key=idempotency_key or new_key())


def list_files(
    after: str | None, limit: int | None, order: str | None, purpose: str | None
) -> Call[models.ListPage[models.File]]:
    """GET /v1/files."""
    return Call("GET", "/v1/files", _FILES, params=_query(after=after, limit=limit, order=order, purpose=purpose))


def get_file(file_id: str) -> Call[models.File]:
    """GET /v1/files/{id}."""
    return Call("GET", f"/v1/files/{_segment(file_id)}", _FILE)


def delete_file(file_id: str) -> Call[models.Deleted]:
    """DELETE /v1/files/{id}."""
    return Call("DELETE", f"/v1/files/{_segment(file_id)}", _DELETED)


def preview_file(file_id: str, limit: int | None, after: int | None, rows: RowParams) -> Call[models.Preview]:
    """POST /v1/files/{id}/preview."""
    body = _body(rows, limit=limit, after=after)
    return Call("POST", f"/v1/files/{_segment(file_id)}/preview", _PREVIEW, body=body, changes_nothing=True)


def file_content(file_id: str) -> str:
    """Path of a file's content."""
    return f"/v1/files/{_segment(file_id)}/content"


# ---- fine-tuning jobs ----------------------------------------------------------------------------------------------


def create_job(
    answer: TypeAdapter[JobT],
    *,
    training_file: str | None,
    validation_file: str | None,
    model: str,
    params: JobParams,
    idempotency_key: str | None,
) -> Call[JobT]:
    """POST /v1/fine_tuning/jobs."""
    body = _body(params, model=model, training_file=training_file, validation_file=validation_file)
    return Call("POST", "/v1/fine_tuning/jobs", answer, body=body, idempotency_key=idempotency_key or new_key())


def estimate_job(
    *, training_file: str | None, validation_file: str | None, model: str, params: JobParams
) -> Call[models.Estimate]:
    """POST /v1/fine_tuning/estimate."""
    body = _body(params, model=model, training_file=training_file, validation_file=validation_file)
    return Call("POST", "/v1/fine_tuning/estimate", _ESTIMATE, body=body, changes_nothing=True)


def list_jobs(
    answer: TypeAdapter[models.ListPage[JobT]], after: str | None, limit: int | None, metadata: Mapping[str, str] | None
) -> Call[models.ListPage[JobT]]:
    """GET /v1/fine_tuning/jobs; `metadata` keeps the jobs that carry these pairs."""
    wanted = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
    return Call("GET", "/v1/fine_tuning/jobs", answer, params={**_query(after=after, limit=limit), **wanted})


def get_job(answer: TypeAdapter[JobT], job_id: str) -> Call[JobT]:
    """GET /v1/fine_tuning/jobs/{id}."""
    return Call("GET", f"/v1/fine_tuning/jobs/{_segment(job_id)}", answer)


def job_action(answer: TypeAdapter[JobT], job_id: str, action: str) -> Call[JobT]:
    """POST /v1/fine_tuning/jobs/{id}/{cancel,pause,resume}."""
    return Call("POST", f"/v1/fine_tuning/jobs/{_segment(job_id)}/{action}", answer)


def job_events(job_id: str, after: str | None, limit: int | None) -> Call[models.ListPage[models.JobEvent]]:
    """GET /v1/fine_tuning/jobs/{id}/events, newest first."""
    return Call(
        "GET", f"/v1/fine_tuning/jobs/{_segment(job_id)}/events", _EVENTS, params=_query(after=after, limit=limit)
    )


def job_checkpoints(job_id: str, after: str | None, limit: int | None) -> Call[models.ListPage[models.Checkpoint]]:
    """GET /v1/fine_tuning/jobs/{id}/checkpoints, newest first."""
    path = f"/v1/fine_tuning/jobs/{_segment(job_id)}/checkpoints"
    return Call("GET", path, _CHECKPOINTS, params=_query(after=after, limit=limit))


# ---- adapters ------------------------------------------------------------------------------------------------------


def list_adapters(after: str | None) -> Call[models.ListPage[models.Adapter]]:
    """GET /v1/adapters."""
    return Call("GET", "/v1/adapters", _ADAPTERS, params=_query(after=after))


def get_adapter(name: str) -> Call[models.Adapter]:
    """GET /v1/adapters/{name}."""
    return Call("GET", f"/v1/adapters/{_segment(name)}", _ADAPTER)


def adapter_versions(name: str, after: str | None) -> Call[models.ListPage[models.Adapter]]:
    """GET /v1/adapters/{name}/versions."""
    return Call("GET", f"/v1/adapters/{_segment(name)}/versions", _ADAPTERS, params=_query(after=after))


def import_adapter(
    name: str, directory: Path, on_bytes: OnBytes | None, idempotency_key: str | None
) -> Call[models.Adapter]:
    """POST /v1/adapters with the two files of a directory that PEFT or AdapterHub's library saved."""
    weights = directory / "adapter_model.safetensors"
    of_adapterhub = directory / "adapter.safetensors"
    if of_adapterhub.exists() and not weights.exists():
        weights = of_adapterhub
    files = {"adapter_config": directory / "adapter_config.json", "adapter_model": weights}
    upload = Upload({"name": name}, files, on_bytes)
    return Call("POST", "/v1/adapters", _ADAPTER, upload=upload, idempotency_key=idempotency_key or new_key())


def delete_adapter(name: str) -> Call[models.Deleted]:
    """DELETE /v1/adapters/{name}."""
    return Call("DELETE", f"/v1/adapters/{_segment(name)}", _DELETED)


def rollback_adapter(name: str, version: int | str) -> Call[models.Adapter]:
    """POST /v1/adapters/{name}/rollback."""
    return Call("POST", f"/v1/adapters/{_segment(name)}/rollback", _ADAPTER, body={"version": version})


def pin_adapter(name: str, *, pinned: bool) -> Call[models.Adapter]:
    """POST /v1/adapters/{name}/pin or /unpin."""
    return Call("POST", f"/v1/adapters/{_segment(name)}/{'pin' if pinned else 'unpin'}", _ADAPTER)


def adapter_download(name: str) -> str:
    """Path of an adapter's zip."""
    return f"/v1/adapters/{_segment(name)}/download"


# ---- tenants and their keys ----------------------------------------------------------------------------------------


def create_tenant(name: str) -> Call[models.Tenant]:
    """POST /v1/admin/tenants."""
    return Call("POST", "/v1/admin/tenants", _TENANT, body={"name": name})


def list_tenants() -> Call[models.ListPage[models.Tenant]]:
    """GET /v1/admin/tenants."""
    return Call("GET", "/v1/admin/tenants", _TENANTS)


def get_tenant(name: str) -> Call[models.Tenant]:
    """GET /v1/admin/tenants/{tenant}."""
    return Call("GET", f"/v1/admin/tenants/{_segment(name)}", _TENANT)


def update_tenant(name: str, weight: float) -> Call[models.Tenant]:
    """PATCH /v1/admin/tenants/{tenant}; the same twice changes nothing."""
    return Call("PATCH", f"/v1/admin/tenants/{_segment(name)}", _TENANT, body={"weight": weight}, changes_nothing=True)


def delete_tenant(name: str) -> Call[models.Deleted]:
    """DELETE /v1/admin/tenants/{tenant}."""
    return Call("DELETE", f"/v1/admin/tenants/{_segment(name)}", _DELETED)


def create_key(tenant: str, scopes: Sequence[str], name: str | None, expires_in: int | None) -> Call[models.NewApiKey]:
    """POST /v1/admin/tenants/{tenant}/keys; `expires_in` in seconds."""
    body = _body({}, scopes=list(scopes), name=name, expires_in=expires_in)
    return Call("POST", f"/v1/admin/tenants/{_segment(tenant)}/keys", _NEW_KEY, body=body)


def list_keys(tenant: str) -> Call[models.ListPage[models.ApiKey]]:
    """GET /v1/admin/tenants/{tenant}/keys."""
    return Call("GET", f"/v1/admin/tenants/{_segment(tenant)}/keys", _KEYS)


def revoke_key(tenant: str, key_id: str) -> Call[models.ApiKey]:
    """POST /v1/admin/tenants/{tenant}/keys/{id}/revoke."""
    return Call("POST", f"/v1/admin/tenants/{_segment(tenant)}/keys/{_segment(key_id)}/revoke", _KEY)


# ---- what they share -----------------------------------------------------------------------------------------------


def get_bytes(path: str) -> Call[object]:
    """GET of something that is no JSON; the caller reads the response's bytes."""
    return Call("GET", path, _ANYTHING)


def new_key() -> str:
    """A fresh idempotency key."""
    return uuid.uuid4().hex


def file_id(file: str | models.File) -> str:
    """The id of a file or the id itself."""
    return file if isinstance(file, str) else file.id
