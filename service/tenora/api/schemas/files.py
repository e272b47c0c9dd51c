"""Files and models, as OpenAI's SDK types define them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field

from tenora.api.schemas.base import ResponseModel
from tenora.api.schemas.settings import model_of
from tenora.control.jobs.previews import MAX_ROWS
from tenora.data.preview import Preview
from tenora.training.settings import ROWS, RowSettings

if TYPE_CHECKING:
    from tenora.api.schemas.base import RequestModel as RowFields
else:
    RowFields = model_of("RowFields", ROWS)


class FileObject(ResponseModel):
    """An uploaded file: a `FileRecord` of the control plane."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None
    expires_at: int | None


class PreviewRequest(RowFields):
    """POST /v1/files/{file_id}/preview. `after` is the line of the last row seen; the others are as of a job."""

    limit: int = Field(default=10, ge=1, le=MAX_ROWS)
    after: int = Field(default=0, ge=0, lt=2**63)

    def row_settings(self) -> RowSettings:
        """Those of a job's rows."""
        return RowSettings(**self.model_dump(include=set(ROWS), exclude_none=True))


class PreviewSpan(ResponseModel):
    """A piece of a row's text: all of its tokens are learned, or none."""

    text: str
    trained: bool


class PreviewIssue(ResponseModel):
    """Why a row cannot be used, and what to do about it."""

    line: int
    code: str
    message: str


class PreviewRow(ResponseModel):
    """A row as the model sees it; of a preference one for each answer, of a pair for each text, told apart by `part`.

    `truncated_tokens` were cut off, `tokens` are left, and the texts of `spans` together are what they say.
    """

    line: int
    part: Literal["chosen", "rejected", "anchor", "positive", "negative"] | None
    tokens: int
    trained_tokens: int
    truncated: bool
    truncated_tokens: int
    spans: list[PreviewSpan]
    issues: list[PreviewIssue]
    label: str | bool | int | float | list[str] | None


class PreviewTotals(ResponseModel):
    """Sums over the rows shown; `truncated` and `unusable` count rows of the file."""

    rows: int
    tokens: int
    trained_tokens: int
    truncated: int
    unusable: int


class PreviewObject(ResponseModel):
    """Some rows of a training file before anything is spent; more follow `after` the line `last_line`."""

    object: Literal["file.preview"] = "file.preview"
    file_id: str
    format: str | None
    data: list[PreviewRow]
    totals: PreviewTotals
    has_more: bool
    last_line: int | None

    @classmethod
    def of_file(cls, file_id: str, preview: Preview) -> Self:
        """The object of a preview."""
        rows = [PreviewRow.of(row) for row in preview.rows]
        return cls(
            file_id=file_id,
            format=preview.format,
            data=rows,
            totals=PreviewTotals(
                rows=len({row.line for row in rows}),
                tokens=sum(row.tokens for row in rows),
                trained_tokens=sum(row.trained_tokens for row in rows),
                truncated=len({row.line for row in rows if row.truncated}),
                unusable=len({row.line for row in rows if row.issues}),
            ),
            has_more=preview.has_more,
            last_line=rows[-1].line if rows else None,
        )


class ModelObject(ResponseModel):
    """A `ModelCard` of the control plane: a model that may be called; adapters have the base as `parent`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
