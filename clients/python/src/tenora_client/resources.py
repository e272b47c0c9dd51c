# Made of async_resources.py by scripts/unasync.py (`make client`): change that one.
"""What the synchronous client offers, by resource: `client.chat`, `.completions`, `.models`, `.files`, `.adapters`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Unpack, overload

from tenora_client import calls
from tenora_client.connection import Connection
from tenora_client.errors import ResponseError
from tenora_client.models import Adapter, ChatChunk, ChatCompletion, Completion, Deleted, File, Message, Model, Preview
from tenora_client.paging import Pages
from tenora_client.params import ChatParams, CompletionParams, EmbeddingParams
from tenora_client.pooled import EmbeddingList
from tenora_client.progress import transfer
from tenora_client.settings import RowParams
from tenora_client.streams import Stream


class Chat:
    """Conversations."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @overload
    def create(
        self,
        messages: Sequence[Message],
        model: str | None = None,
        *,
        stream: Literal[False] = False,
        **params: Unpack[ChatParams],
    ) -> ChatCompletion: ...

    @overload
    def create(
        self,
        messages: Sequence[Message],
        model: str | None = None,
        *,
        stream: Literal[True],
        **params: Unpack[ChatParams],
    ) -> Stream[ChatChunk]: ...

    def create(
        self,
        messages: Sequence[Message],
        model: str | None = None,
        *,
        stream: bool = False,
        **params: Unpack[ChatParams],
    ) -> ChatCompletion | Stream[ChatChunk]:
        """Answer `messages` with the adapter (or the base) called `model`; with `stream` chunk by chunk."""
        if stream:
            return self._connection.stream(calls.chat_stream(messages, model, params))
        return self._connection.send(calls.chat(messages, model, params))


class Completions:
    """Plain text, continued."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @overload
    def create(
        self,
        prompt: str | Sequence[Any],
        model: str | None = None,
        *,
        stream: Literal[False] = False,
        **params: Unpack[CompletionParams],
    ) -> Completion: ...

    @overload
    def create(
        self,
        prompt: str | Sequence[Any],
        model: str | None = None,
        *,
        stream: Literal[True],
        **params: Unpack[CompletionParams],
    ) -> Stream[Completion]: ...

    def create(
        self,
        prompt: str | Sequence[Any],
        model: str | None = None,
        *,
        stream: bool = False,
        **params: Unpack[CompletionParams],
    ) -> Completion | Stream[Completion]:
        """Continue `prompt`: a string, strings, token ids or lists of them."""
        call = calls.completion(prompt, model, params, stream=stream)
        if stream:
            return self._connection.stream(call)
        return self._connection.send(call)


class Embeddings:
    """Vectors of length 1."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, texts: calls.Texts, model: str | None = None, **params: Unpack[EmbeddingParams]) -> EmbeddingList:
        """Of each text; `model` is the base, or an adapter with an embedding head."""
        return self._connection.send(calls.embeddings(texts, model, params))


class Models:
    """What can be asked: the base and the tenant's adapters."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def get(self, name: str) -> Model:
        """One model."""
        return self._connection.send(calls.get_model(name))

    def delete(self, name: str) -> Deleted:
        """Delete an adapter by any of its names."""
        return self._connection.send(calls.delete_model(name))

    def base(self) -> Model:
        """The base model that the server serves: the one without a parent."""
        for model in self.list():
            if model.parent is None:
                return model
        raise ResponseError("The server lists no base model. Is it a Tenora server?")

    def list(self) -> Pages[Model]:
        """All models."""
        return Pages(lambda _: self._connection.send(calls.list_models()))


class Files:
    """Training files."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def upload(
        self,
        path: str | os.PathLike[str],
        *,
        purpose: str = "fine-tune",
        expires_after: int | None = None,
        progress: bool | calls.OnBytes = False,
        idempotency_key: str | None = None,
    ) -> File:
        """Upload a file; it streams from disk.

        Args:
            expires_after: seconds after which the server deletes it.
            progress: True draws a bar on stderr; a callable gets (bytes sent, bytes in all).
            idempotency_key: sent by itself, a fresh one each call; give one to make a repeated call the same upload.
        """
        source = Path(path)
        with transfer(progress, f"uploading {source.name}") as on_bytes:
            return self._connection.send(calls.upload_file(source, purpose, expires_after, on_bytes, idempotency_key))

    def get(self, file_id: str) -> File:
        """One file's record."""
        return self._connection.send(calls.get_file(file_id))

    def delete(self, file_id: str) -> Deleted:
        """Delete a file."""
        return self._connection.send(calls.delete_file(file_id))

    def preview(
        self,
        file_id: str,
        *,
        limit: int | None = None,
        after: int | None = None,
        **rows: Unpack[RowParams],
    ) -> Preview:
        """Rows of a training file as the model would see them, also of one with errors.

        Args:
            limit: how many rows, at most 100; 10 if None.
            after: the line of the last row seen (`Preview.last_line`).
            rows: how they are read, as of a job.
        """
        return self._connection.send(calls.preview_file(file_id, limit, after, rows))

    def content(self, file_id: str) -> bytes:
        """A file's bytes."""
        return self._connection.content(calls.file_content(file_id))

    def download(self, file_id: str, path: str | os.PathLike[str], *, progress: bool | calls.OnBytes = False) -> Path:
        """Write a file's bytes to `path`, which appears only when complete, without holding them; returns it."""
        with transfer(progress, f"downloading {file_id}") as on_bytes:
            return self._connection.download(calls.file_content(file_id), Path(path), on_bytes)

    def list(
        self, *, purpose: str | None = None, order: Literal["asc", "desc"] | None = None, limit: int | None = None
    ) -> Pages[File]:
        """All files, newest first unless `order` says otherwise; `limit` is the size of a page."""
        return Pages(lambda after: self._connection.send(calls.list_files(after, limit, order, purpose)))


class Adapters:
    """Adapters by name, and their immutable versions."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def get(self, name: str) -> Adapter:
        """One adapter."""
        return self._connection.send(calls.get_adapter(name))

    def import_(
        self,
        name: str,
        directory: str | os.PathLike[str],
        *,
        progress: bool | calls.OnBytes = False,
        idempotency_key: str | None = None,
    ) -> Adapter:
        """Import a directory that PEFT, or AdapterHub's library, saved; a name in use gets a version."""
        with transfer(progress, f"importing {name}") as on_bytes:
            return self._connection.send(calls.import_adapter(name, Path(directory), on_bytes, idempotency_key))

    def download(self, name: str, path: str | os.PathLike[str], *, progress: bool | calls.OnBytes = False) -> Path:
        """Write the adapter's PEFT directory as a zip to `path`, which appears only when complete; returns it."""
        with transfer(progress, f"downloading {name}") as on_bytes:
            return self._connection.download(calls.adapter_download(name), Path(path), on_bytes)

    def delete(self, name: str) -> Deleted:
        """Delete a name and all its versions; requests that run finish."""
        return self._connection.send(calls.delete_adapter(name))

    def rollback(self, name: str, version: int | str) -> Adapter:
        """Point the name at an earlier version."""
        return self._connection.send(calls.rollback_adapter(name, version))

    def pin(self, name: str, *, pinned: bool = True) -> Adapter:
        """Keep (or no longer keep) the adapter in a slot."""
        return self._connection.send(calls.pin_adapter(name, pinned=pinned))

    def versions(self, name: str) -> Pages[Adapter]:
        """All versions of a name."""
        return Pages(lambda after: self._connection.send(calls.adapter_versions(name, after)))

    def list(self) -> Pages[Adapter]:
        """All adapters."""
        return Pages(lambda after: self._connection.send(calls.list_adapters(after)))
