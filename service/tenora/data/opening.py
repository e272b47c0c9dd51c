"""What the bytes of a training file are: text, opened as UTF-8 whatever it was written in, or why they are none.

gzip is unpacked on the way and UTF-16 and UTF-32 are decoded, a piece at a time, so that memory stays flat. Anything
else that is no text is named by the signature it begins with. Free of torch.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Mapping
from typing import BinaryIO, cast

from tenora.data.rows import IssueCode

HEAD_BYTES = 64 * 1024
"""Of a file's beginning, by which it is known."""
MAX_UNPACKED_BYTES = 1024**3
"""Of a gzip file: a thousandth of it may be all that is uploaded."""
BOM = b"\xef\xbb\xbf"

_GZIP = b"\x1f\x8b"
_BOMS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
_NULLS: Mapping[
    tuple[bool, ...], str
] = {  # RFC 4627, section 3: where the null bytes of text stand that begins with two ASCII characters
    (False, True, True, True): "utf-32-le",
    (True, True, True, False): "utf-32-be",
    (False, True, False, True): "utf-16-le",
    (True, False, True, False): "utf-16-be",
}
_UNPACK = "unpack it and send the JSON Lines, CSV or Parquet file that is in it"
_EXPORT = "export its rows as JSON Lines, CSV or Parquet"
_SIGNATURES = (
    (b"PK\x03\x04", "a ZIP archive or an Office document", f"{_UNPACK}, or save the sheet as CSV UTF-8"),
    (b"PK\x05\x06", "an empty ZIP archive", _UNPACK),
    (_GZIP, "a gzip file inside a gzip file", _UNPACK),
    (b"PAR1", "a Parquet file inside a gzip file", "send the Parquet file itself, which is compressed already"),
    (b"PARE", "an encrypted Parquet file", "write it without encryption"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", f"{_UNPACK}, or pack it with gzip"),
    (b"BZh", "a bzip2 file", f"{_UNPACK}, or pack it with gzip"),
    (b"\xfd7zXZ\x00", "an xz file", f"{_UNPACK}, or pack it with gzip"),
    (b"\x04\x22\x4d\x18", "an LZ4 file", f"{_UNPACK}, or pack it with gzip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"%PDF-", "a PDF document", "extract its text into rows {text}"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "save the sheet as CSV UTF-8"),
    (b"SQLite format 3\x00", "an SQLite database", _EXPORT),
    (b"ARROW1", "an Arrow file", _EXPORT),
    (b"ORC", "an ORC file", _EXPORT),
    (b"Obj\x01", "an Avro file", _EXPORT),
    (b"\x93NUMPY", "a NumPy array", _EXPORT),
    (b"\x89HDF", "an HDF5 file", _EXPORT),
    (b"\x89PNG", "a PNG image", "only text is learned"),
    (b"\xff\xd8\xff", "a JPEG image", "only text is learned"),
    (b"GIF8", "a GIF image", "only text is learned"),
    (b"RIFF", "a RIFF file (audio, video or an image)", "only text is learned"),
    (b"\x7fELF", "a program", "only text is learned"),
    *((bytes([0x80, number]), "a Python pickle", _EXPORT) for number in range(2, 6)),
)
_MARKUP = (b"<!doctype", b"<html", b"<?xml")


class UnreadableError(Exception):
    """The rest of the file cannot be read."""

    def __init__(self, code: IssueCode, message: str) -> None:
        super().__init__(message)
        self.code: IssueCode = code
        self.message = message


def open_text(file: BinaryIO) -> tuple[BinaryIO, bytes]:
    """The text of a file as UTF-8 with lines that end in LF, and its first bytes; both may still begin with a BOM.

    Raises:
        UnreadableError: the file is not text; reading on may raise it, too.
    """
    text, head = _with_head(file)
    if head.startswith(_GZIP):
        text, head = _with_head(_Unpacked(text))
    _refuse_foreign(head)
    encoding = _encoding(head)
    if encoding is not None:
        text, head = _with_head(_Decoded(text, encoding))
    elif b"\x00" in head and not head.lstrip().startswith((b"{", b"[")):  # JSON has it as the fault of one line
        raise UnreadableError(
            "data_type",
            f"The file is not text (byte {head.index(0) + 1} is 0); send JSON Lines, CSV or Parquet.",
        )
    if b"\r" in head and b"\n" not in head:
        text, head = _with_head(_LineFeeds(text))
    return text, head


def not_utf8(raw: bytes, start: int) -> str:
    """What to say of a line whose byte at `start` is not UTF-8."""
    found = f"Byte {start + 1} (0x{raw[start]:02X}) is not UTF-8"
    try:
        guess = bytes(raw[start : start + 1]).decode("cp1252")
    except UnicodeDecodeError:
        return f"{found}; save the file as UTF-8."
    return (
        f"{found}; in Windows-1252 (Latin-1) it would be {guess!r}. Save the file as UTF-8, for example with: "
        "iconv -f WINDOWS-1252 -t UTF-8."
    )


def _with_head(source: io.RawIOBase | BinaryIO) -> tuple[BinaryIO, bytes]:
    stream = io.BufferedReader(cast("io.RawIOBase", source), HEAD_BYTES)
    return stream, stream.peek(HEAD_BYTES)


def _refuse_foreign(head: bytes) -> None:
    for signature, name, advice in _SIGNATURES:
        if head.startswith(signature):
            raise UnreadableError("data_type", f"The file is {name}; {advice}.")
    if head.removeprefix(BOM).lstrip()[:9].lower().startswith(_MARKUP):
        raise UnreadableError("data_type", "The file is an HTML or XML page; was the download refused? Send its rows.")


def _encoding(head: bytes) -> str | None:
    """The encoding of text whose first bytes leave no doubt that it is not UTF-8."""
    marked = next((encoding for bom, encoding in _BOMS if head.startswith(bom)), None)
    return marked or _NULLS.get(tuple(not byte for byte in head[:4]))


class _Layer(io.RawIOBase):
    """Bytes made of another stream's, a piece at a time."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._held = memoryview(b"")
        self._over = False
        self._fault: UnreadableError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # a BufferedReader gives no other
        """Fill the buffer unless the end is reached, so that the first read is the whole head.

        A fault is raised when what stands before it has been given, so that it comes with its line.
        """
        filled = 0
        while filled < len(buffer):
            self._hold()
            if not self._held:
                break
            count = min(len(buffer) - filled, len(self._held))
            buffer[filled : filled + count] = self._held[:count]
            self._held = self._held[count:]
            filled += count
        if not filled and self._fault is not None:
            raise self._fault
        return filled

    def _hold(self) -> None:
        """Take the next bytes if none are held and there are any."""
        while not self._held and not self._over:
            try:
                piece = self._next()
            except UnreadableError as error:
                self._fault, piece = error, None
            self._over = piece is None
            self._held = memoryview(piece or b"")

    def _next(self) -> bytes | None:
        """The next bytes; None at the end."""
        raise NotImplementedError


class _Unpacked(_Layer):
    """What a gzip file holds."""

    def __init__(self, source: BinaryIO) -> None:
        super().__init__(source)
        self._gzip = gzip.GzipFile(fileobj=source)
        self._total = 0

    def _next(self) -> bytes | None:
        try:
            piece = self._gzip.read(HEAD_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            message = f"The gzip file is damaged or cut off ({error}); pack it again."
            raise UnreadableError("data_type", message) from None
        self._total += len(piece)
        if self._total > MAX_UNPACKED_BYTES:
            raise UnreadableError(
                "too_long", f"The gzip file unpacks to more than {MAX_UNPACKED_BYTES // 2**20} MiB; split it."
            )
        return piece or None


class _Decoded(_Layer):
    """Text of another Unicode encoding."""

    def __init__(self, source: BinaryIO, encoding: str) -> None:
        super().__init__(source)
        self._encoding = encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()

    def _next(self) -> bytes | None:
        piece = self._source.read(HEAD_BYTES)
        try:
            text = self._decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            raise UnreadableError(
                "bad_utf8",
                f"The file begins as {self._encoding.upper()}, what follows is not ({error.reason}); save it as UTF-8.",
            ) from None
        return text.encode() if piece else None


class _LineFeeds(_Layer):
    """Text whose lines ended in CR alone."""

    def _next(self) -> bytes | None:
        return self._source.read(HEAD_BYTES).replace(b"\r", b"\n") or None
