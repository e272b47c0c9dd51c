"""What a training file would teach: its rows as the model sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tenora.config import Settings
from tenora.control.files.files import TRAINING_PURPOSE
from tenora.control.files.rows import find_file
from tenora.control.jobs.field_checks import whole
from tenora.control.jobs.shape import Limits
from tenora.control.registry.database import Database
from tenora.control.storage.directory import Storage
from tenora.control.tenancy.records import Principal
from tenora.control.tokenizing.threads import Tokenizing
from tenora.data.preview import Preview, preview_file
from tenora.errors import InvalidRequestError
from tenora.training.settings import ROWS, RowSettings

if TYPE_CHECKING:
    from tenora.model.tokenizer import Tokenizer

MAX_ROWS = 100
_USUAL_ROWS = RowSettings()


class Previews:
    """Previews of a tenant's training files."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        storage: Storage,
        tokenizing: Tokenizing,
        limits: Callable[[], Limits],
    ) -> None:
        self._settings = settings
        self._database = database
        self._storage = storage
        self._tokenizing = tokenizing
        self._limits = limits

    async def preview(
        self,
        principal: Principal,
        file_id: str,
        *,
        limit: int = 10,
        after: int = 0,
        rows: RowSettings = _USUAL_ROWS,
    ) -> Preview:
        """Some rows of a training file, also of one whose status is `error`.

        Args:
            limit: how many rows, at most MAX_ROWS.
            after: the line of the last row that was seen.
            rows: as of a job.

        Raises:
            NotFoundError: no such file.
            InvalidRequestError: it is not a training file, or a value is out of bounds.
        """
        limits = self._limits()
        whole(limit, "limit", 1, MAX_ROWS)
        whole(after, "after", 0, 2**63 - 1)
        length = limits.max_model_len
        if rows.max_seq_length:
            length = limits.of(ROWS["max_seq_length"]).check(rows.max_seq_length)
        async with self._database.read() as session:
            row = await find_file(session, principal.tenant_id, file_id)
        if row.purpose != TRAINING_PURPOSE:
            raise InvalidRequestError(
                f"The file {file_id} has the purpose {row.purpose!r}; only those with the purpose {TRAINING_PURPOSE!r} "
                "can be previewed.",
                param="file_id",
            )
        most = self._settings.max_training_rows

        def preview(tokenizer: Tokenizer) -> Preview:
            path = Path(self._storage.objects.local(principal.tenant_id, file_id))
            return preview_file(
                path, tokenizer, max_length=length, truncate=rows.truncate, limit=limit, after=after, max_rows=most
            )

        return await self._tokenizing.file(principal.tenant_id, preview)
