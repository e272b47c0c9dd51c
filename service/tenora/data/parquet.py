"""Parquet files as records, read in a process of its own. Free of torch.

Pages say in the file how long they become, and a library of native code reads them: whatever a file makes of that
costs memory up to a bound, and at worst the reader's life, never the service's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import msgspec

from tenora.data.records import Record, unreadable
from tenora.environment import for_child

MAGIC = b"PAR1"
MEMORY_BYTES = 768 * 1024 * 1024
"""What reading a file may take. A page is read whole; by default it has a megabyte, or some rows if they are longer."""
_READER = "tenora.data.parquet_reader"


def read_parquet(path: Path) -> Iterator[Record]:
    """The rows of a file: the columns of its form, nested lists and structs as lists and objects.

    A null counts as absent, also inside a struct: there it stands for a key that other rows have.
    """
    decode = msgspec.json.Decoder(Record).decode
    number = 0
    reader = subprocess.Popen(
        [sys.executable, "-P", "-m", _READER, str(path), str(MEMORY_BYTES)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Arrow's own pool reserves addresses, which the bound counts, far ahead of what it uses.
        env=for_child({"PYTHONPATH": os.pathsep.join(sys.path), "ARROW_DEFAULT_MEMORY_POOL": "system"}),
    )
    rows = cast("IO[bytes]", reader.stdout)
    try:
        for line in rows:
            if line.endswith(b"\n"):
                record = decode(line)
                number = record.line
                yield record
        if reader.wait() != 0:
            message = "The Parquet file cannot be read: it broke its reader; write it again, for example with pyarrow."
            yield unreadable(number + 1, "data_type", message, last=True)
    finally:
        reader.kill()
        reader.wait()
        rows.close()
