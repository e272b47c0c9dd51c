"""The process that reads a Parquet file: its path and the bytes of memory that it may take are the arguments, its rows
are lines of JSON on standard output."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow
from pyarrow import compute, parquet, types

from tenora.data.forms import TABLE_KEYS, check_columns, column_names
from tenora.data.records import MAX_ROW_BYTES, Record, unreadable
from tenora.data.rows import RowChecker

_BATCH_BYTES = 4 * 1024 * 1024
_BATCH_ROWS = 256
_READ_AHEAD = 1024 * 1024
_VALUE_BYTES = 8  # what a value without text counts for


def read_rows(path: Path) -> Iterator[Record]:
    """The records of a file, in this process and without a bound on memory; see `tenora.data.parquet`."""
    number = 0
    try:
        for record in _rows(path):
            number = record.line
            yield record
    except (MemoryError, pyarrow.ArrowMemoryError):
        message = "The Parquet file takes too much memory to be read; write it with smaller pages and row groups."
        yield unreadable(number + 1, "too_long", message, last=True)
    except Exception as error:  # noqa: BLE001  # the library raises whatever damaged bytes lead it to
        yield unreadable(number + 1, "data_type", f"The Parquet file cannot be read: {_first_line(error)}", last=True)


def main() -> None:
    """Write the records of the file that is named on the command line."""
    _bound_memory(int(sys.argv[2]))
    encode = msgspec.json.Encoder().encode
    for record in read_rows(Path(sys.argv[1])):
        sys.stdout.buffer.write(encode(record) + b"\n")
    sys.stdout.buffer.flush()


def _rows(path: Path) -> Iterator[Record]:
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
        schema = file.schema_arrow
        names = column_names(schema.names)
        checker = RowChecker(1)
        if check_columns(names, checker) is None:
            yield unreadable(1, checker.issues[0].code, checker.issues[0].message, last=True)
            return
        columns = {own: name for own, name in zip(schema.names, names, strict=True) if name in TABLE_KEYS}
        for own in columns:
            if odd := _odd_type(schema.field(own).type):
                message = f"The column `{own}` holds values of the type {odd}; write them as strings."
                yield unreadable(1, "data_type", message, last=True)
                return
        yield from _batches(file, metadata, columns)


def _batches(file: Any, metadata: Any, columns: dict[str, str]) -> Iterator[Record]:
    number = 0
    for group in range(file.num_row_groups):
        rows = _rows_per_batch(metadata.row_group(group))
        for batch in file.iter_batches(rows, row_groups=[group], columns=list(columns), use_threads=False):
            names = [columns[own] for own in batch.schema.names]
            long = sum(map(_size, batch.columns)) > MAX_ROW_BYTES
            for index in range(batch.num_rows):
                number += 1
                if long and sum(_size(column.slice(index, 1)) for column in batch.columns) > MAX_ROW_BYTES:
                    yield unreadable(number, "too_long", f"The row is longer than {MAX_ROW_BYTES // 2**20} MiB.")
                else:
                    yield _record(number, names, [column[index] for column in batch.columns])


def _rows_per_batch(group: Any) -> int:
    """As many rows as take some megabytes, by the size and the number of values that the row group names."""
    values = sum(group.column(index).num_values for index in range(group.num_columns))
    row_bytes = max((group.total_byte_size + values * _VALUE_BYTES) // max(group.num_rows, 1), 1)
    return int(min(max(_BATCH_BYTES // row_bytes, 1), _BATCH_ROWS))


def _record(number: int, names: Sequence[str], scalars: Sequence[Any]) -> Record:
    try:
        return Record(number, {name: _plain(scalar.as_py()) for name, scalar in zip(names, scalars, strict=True)})
    except UnicodeDecodeError:
        return unreadable(number, "bad_utf8", "The row holds a string that is not UTF-8; write it again as UTF-8.")


def _plain(value: Any) -> Any:
    """Binary columns as the text that older writers put into them, and numbers that JSON has."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _size(array: Any) -> int:
    """Bytes that the values of an array have once they are written out, found without doing so."""
    kind = array.type
    if types.is_dictionary(kind):
        lengths = _lengths(array.dictionary)
        return _total(lengths.take(array.indices)) + len(array) * _VALUE_BYTES if lengths is not None else len(array)
    if types.is_struct(kind):
        return sum(map(_size, array.flatten())) + len(array) * _VALUE_BYTES
    if _is_list(kind):
        return _size(array.flatten()) + len(array) * _VALUE_BYTES
    lengths = _lengths(array)
    return len(array) * _VALUE_BYTES + (0 if lengths is None else _total(lengths))


def _lengths(array: Any) -> Any:
    return compute.binary_length(array) if _is_text(array.type) else None


def _total(lengths: Any) -> int:
    return compute.sum(lengths).as_py() or 0


def _odd_type(kind: Any) -> str | None:
    """The first type within a column's that JSON has no value for."""
    if types.is_dictionary(kind):
        return _odd_type(kind.value_type)
    if types.is_struct(kind):
        return next(filter(None, (_odd_type(kind.field(index).type) for index in range(kind.num_fields))), None)
    if _is_list(kind):
        return _odd_type(kind.value_type)
    numeric = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind)
    return None if numeric or _is_text(kind) else str(kind)


def _is_list(kind: Any) -> bool:
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_text(kind: Any) -> bool:
    return any(
        is_one(kind) for is_one in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


def _bound_memory(more: int) -> None:
    """Let this process have so many bytes of memory more than it has now, and leave no core file if it ends by it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:
        return  # not Linux: the sizes of rows are bounded, those of pages are not
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
