"""Parquet files as records, batch by batch. Free of torch; the library is imported when the first such file is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tenora.training.forms import FORM_KEYS, check_columns
from tenora.training.records import MAX_ROW_BYTES, Record, unreadable
from tenora.training.rows import RowChecker

MAGIC = b"PAR1"
_BATCH_BYTES = 4 * 1024 * 1024
_BATCH_ROWS = 256
_READ_AHEAD = 1024 * 1024


def read_parquet(path: Path) -> Iterator[Record]:
    """The rows of a file: the columns of its form, nested lists and structs as lists and objects.

    A null counts as absent, also inside a struct: there it stands for a key that other rows have.
    """
    import pyarrow  # noqa: PLC0415  # a fifth of a second and tens of megabytes that few processes need
    from pyarrow import parquet  # noqa: PLC0415

    number = 0
    try:
        metadata = parquet.read_metadata(path)
        leaves = [metadata.schema.column(index) for index in range(metadata.num_columns)]
        with parquet.ParquetFile(
            path,
            metadata=metadata,
            # A long string that many rows share is stored once, and must not be unfolded into all rows of a batch.
            read_dictionary=[leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"],
            pre_buffer=False,
            buffer_size=_READ_AHEAD,
        ) as file:
            columns = [name for name in file.schema_arrow.names if name in FORM_KEYS]
            checker = RowChecker(1)
            if check_columns(file.schema_arrow.names, checker) is None:
                yield unreadable(1, checker.issues[0].code, checker.issues[0].message, last=True)
                return
            for group in range(file.num_row_groups):
                rows = _rows_per_batch(metadata.row_group(group))
                for batch in file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                    for index in range(batch.num_rows):
                        number += 1
                        yield _record(number, columns, [column[index] for column in batch.columns])
    except (pyarrow.ArrowException, OSError) as error:
        yield unreadable(number + 1, "data_type", f"The Parquet file cannot be read: {error}", last=True)


def _rows_per_batch(group: Any) -> int:
    """As many rows as take some megabytes, by the size that the row group names."""
    row_bytes = max(group.total_byte_size // max(group.num_rows, 1), 1)
    return int(min(max(_BATCH_BYTES // row_bytes, 1), _BATCH_ROWS))


def _record(number: int, columns: Sequence[str], scalars: Sequence[Any]) -> Record:
    try:
        value = {name: _without_nulls(scalar.as_py()) for name, scalar in zip(columns, scalars, strict=True)}
    except UnicodeDecodeError:
        return unreadable(number, "bad_utf8", "The row holds a string that is not UTF-8; write it again as UTF-8.")
    if sum(map(_size, value.values())) > MAX_ROW_BYTES:
        return unreadable(number, "too_long", f"The row is longer than {MAX_ROW_BYTES // 2**20} MiB.")
    return Record(number, value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _size(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else len(value) if isinstance(value, str | bytes) else 8
