"""Parquet files that can tell whether they are whole: a sha256 over all of a file's bytes is kept in the file.

Parquet itself protects little: a flipped bit may be another letter in a name, and some damage ends the process that reads it. The hash is in the
file's metadata (which other readers ignore), and is taken with its own 64 digits as zeros; so it can be checked before anything is parsed.

Knows bytes and parquet's writer. Knows no ledgers and not what the rows mean.
"""

import io
import re
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

KEY = b"soundshard.file"
DIGITS = 64
PREFIX = b"soundshard sha256:"
SEAL = re.compile(re.escape(PREFIX) + rb"([0-9a-f]{64})")
UNREADABLE = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError)
"""What parsing a damaged parquet file raises."""


class Damaged(ValueError):  # noqa: N818 - says what is wrong, as ValueError does
    """A file is not what was written."""


class Writer(pq.ParquetWriter):
    """Writes a parquet file by row groups, and the hash at its end. The same rows, groups and library give the same bytes."""

    def __init__(self, file: Any, schema: pa.Schema, *, dictionary: Sequence[str] | None = None) -> None:
        """`dictionary`: the columns whose values are few; by default the library finds out."""
        kept = {name: value for name, value in (schema.metadata or {}).items() if name != KEY}  # of a file that the rows were read from
        few: Any = True if dictionary is None else list(dictionary)  # the stubs know a bool only
        self._sink = _Sink(file)
        super().__init__(self._sink, schema.with_metadata(kept), compression="zstd", compression_level=3, use_dictionary=few)

    def close(self) -> None:
        """Writes the file's end, with the hash over all of it."""
        if not self.is_open:
            return
        self.add_key_value_metadata({KEY: PREFIX + b"0" * DIGITS})
        self._sink.hold()
        super().close()
        self._sink.seal()


class _Sink(io.RawIOBase):
    """Passes on what is written and hashes it; holds back the file's end until the hash can be put there."""

    def __init__(self, file: Any) -> None:
        self._file, self._hash, self._held, self._size = file, sha256(), None, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hash.update(data)
        if self._held is None:
            self._file.write(data)
        else:
            self._held += bytes(data)
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        return self._size

    def hold(self) -> None:
        self._held = b""

    def seal(self) -> None:
        assert self._held is not None
        head, prefix, tail = self._held.rpartition(PREFIX)
        assert prefix and tail.startswith(b"0" * DIGITS)
        self._file.write(head + prefix + self._hash.hexdigest().encode() + tail[DIGITS:])
        self._held = b""


def check(data: bytes) -> bool:
    """Whether the file is proven whole by its hash. False where it has none, as older versions wrote them. Raises Damaged if it is not."""
    found = list(SEAL.finditer(data))
    if not found:
        if KEY in data or PREFIX in data:
            raise Damaged("the hash that is kept in it is damaged")
        return False
    start, stop = found[-1].span(1)
    digest = sha256(memoryview(data)[:start])
    digest.update(b"0" * DIGITS)
    digest.update(memoryview(data)[stop:])
    if digest.hexdigest().encode() != found[-1][1]:
        raise Damaged("it is not as it was written: the hash over its bytes is another than the one that is kept in it")
    return True


def parsed(data: bytes) -> pq.ParquetFile:
    """The file, open. Raises Damaged where these bytes are no parquet file."""
    try:
        return pq.ParquetFile(pa.BufferReader(data))
    except UNREADABLE as error:
        raise Damaged(f"it cannot be read as parquet ({first_line(error)})") from error


def rows(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of a file. Raises Damaged where these bytes are no parquet file, or hold values that cannot be."""
    file = parsed(data)
    try:
        table = file.read(columns=None if columns is None else list(columns), use_threads=False)
        table.validate(full=True)
    except UNREADABLE as error:
        raise Damaged(f"it cannot be read as parquet ({first_line(error)})") from error
    return table


def first_line(error: BaseException) -> str:
    """An error in a line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
