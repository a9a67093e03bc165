"""Every byte of a shard's tar, read once from its beginning to its end: its sha256, and whether headers, padding, arrays and records are right.

Knows tars, npy and JSON, and where a ledger says that members lie. Decides nothing: what is to be done about a broken shard is for others to say.
"""

import io
import json
import math
import os
import tarfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from tarfile import BLOCKSIZE
from tokenize import TokenError
from typing import Any

import numpy as np

from configs import storage
from shards.check_rows import Place, Problem
from shards.write import end_bytes, member_header

PIECE_BYTES = 4 << 20
"""What is read at once; a multiple of every number's size, so that numbers lie whole in a piece."""
PIECES_AHEAD = 2
JSON_BYTES = 16 << 20
"""A record is not larger; what is, is not parsed."""
MOST = 20
"""Problems that are told of one tar."""
EXPONENTS = {2: 0x7C00, 4: 0x7F80_0000, 8: 0x7FF0_0000_0000_0000}
"""Of floats, by their size: all of these bits are set in an infinity and in what is no number."""
NOT_NPY = (ValueError, TypeError, SyntaxError, KeyError, OverflowError, RecursionError, MemoryError, TokenError)
"""What numpy raises on headers that are none; its parser is Python's."""


class Stopped(Exception):  # noqa: N818 - no error
    """Checking was asked to end."""


@dataclass(frozen=True)
class Found:
    """A member as it lies in the tar."""

    name: str
    offset: int
    size: int
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    described: Mapping[str, Any] | None = None
    """What a clip's json says."""


@dataclass
class Checked:
    """What was found in a tar."""

    sha256: str = ""
    """Empty where it could not be read to its end."""
    size: int = 0
    members: list[Found] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class Codes:
    """What a dataset's spec says of its codec tokens."""

    extension: str
    codebooks: int | None
    card: int | None

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> "Codes | None":
        """None for a dataset without codes."""
        codec = spec.get("codec")
        if not isinstance(codec, Mapping) or not isinstance(codec.get("name"), str):
            return None
        codebooks, card = (value if isinstance(value := codec.get(name), int) else None for name in ("codebooks", "card"))
        return cls(f"{codec['name']}.npy", codebooks, card)


def check_tar(
    found: storage.Stat,
    wanted: Sequence[Place] | None,
    codes: Codes | None = None,
    *,
    stop: threading.Event | None = None,
    told: Callable[[int], None] | None = None,
) -> Checked:
    """Reads a tar to its end. `wanted`: what its ledger says; None where there is none. `told` is called with the bytes of every piece that was read.

    FileNotFoundError if it is not there, StorageError where it cannot be read now, Stopped once `stop` is set.
    """
    checked = Checked(size=found.size)
    walk = _Walk(storage.basename(found.path), checked, wanted, codes)
    with ExitStack() as stack:
        stream = _Stream(_pieces(found, stop or threading.Event(), stack), told)
        try:
            walk.run(stream, found.size)
        except OSError as error:
            if isinstance(error, (FileNotFoundError, storage.StorageError)):
                raise
            walk.tell(f"it cannot be read: {error}")
        else:
            stream.drain()
            checked.sha256 = stream.sha256()
    return checked


class _Stream:
    """The bytes of a file, piece by piece, each hashed as it comes."""

    def __init__(self, pieces: Iterator[bytes | memoryview], told: Callable[[int], None] | None) -> None:
        self._pieces, self._told, self._hash = pieces, told, sha256()
        self._held = memoryview(b"")
        self.position = 0

    def read(self, count: int) -> memoryview:
        """So many bytes, or those that there still are."""
        if count <= len(self._held):
            taken, self._held = self._held[:count], self._held[count:]
        else:
            parts, left = [self._held], count - len(self._held)
            self._held = memoryview(b"")
            while left and (piece := self._next()) is not None:
                parts.append(piece[:left])
                self._held = piece[left:]
                left -= len(parts[-1])
            taken = memoryview(b"".join(parts))
        self.position += len(taken)
        return taken

    def drain(self) -> None:
        """Hash what was not read."""
        while self._next() is not None:
            pass

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def _next(self) -> memoryview | None:
        piece = next(self._pieces, None)
        if piece is None:
            return None
        self._hash.update(piece)
        if self._told is not None:
            self._told(len(piece))
        return memoryview(piece)


def _pieces(found: storage.Stat, stop: threading.Event, stack: ExitStack) -> Iterator[bytes | memoryview]:
    """A file's bytes in order, a few pieces read ahead."""
    read = _reader(found, stop, stack)
    pool = ThreadPoolExecutor(PIECES_AHEAD, thread_name_prefix="soundshard-read")
    stack.callback(pool.shutdown, cancel_futures=True)
    ahead: deque[Future[bytes | memoryview]] = deque()
    for start in range(0, found.size, PIECE_BYTES):
        ahead.append(pool.submit(read, start, min(found.size, start + PIECE_BYTES)))
        if len(ahead) > PIECES_AHEAD:
            yield _taken(ahead.popleft(), stop)
    while ahead:
        yield _taken(ahead.popleft(), stop)


def _taken(piece: "Future[bytes | memoryview]", stop: threading.Event) -> bytes | memoryview:
    if stop.is_set():
        raise Stopped
    return piece.result()


def _reader(found: storage.Stat, stop: threading.Event, stack: ExitStack) -> Callable[[int, int], bytes | memoryview]:
    if storage.is_remote(found.path):
        return lambda start, end: storage.read_range(found, start, end, stop=stop)
    file = open(found.path, "rb")  # noqa: SIM115 - the stack closes it
    stack.callback(file.close)
    return lambda start, end: _pread(file.fileno(), start, end)


def _pread(descriptor: int, start: int, end: int) -> bytes:
    """The bytes [start, end), fewer where the file has become shorter."""
    parts = []
    while start < end and (data := os.pread(descriptor, end - start, start)):
        parts.append(data)
        start += len(data)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _Walk:
    """From header to header."""

    def __init__(self, file: str, checked: Checked, wanted: Sequence[Place] | None, codes: Codes | None) -> None:
        self._file, self._checked, self._wanted, self._codes = file, checked, wanted, codes
        self._more = 0

    def tell(self, message: str, key: str | None = None) -> None:
        if len(self._checked.problems) < MOST:
            self._checked.problems.append(Problem(self._file, message, key))
        elif len(self._checked.problems) == MOST:
            self._checked.problems.append(Problem(self._file, "and more"))

    def run(self, stream: _Stream, size: int) -> None:
        """To the end of the archive, or to where nothing can be told any more."""
        while True:
            at = stream.position
            block = bytes(stream.read(BLOCKSIZE))
            if block == bytes(BLOCKSIZE):
                break
            info = self._header(block, at, size)
            if info is None:
                return
            wanted = self._expected(info.name, at + BLOCKSIZE, info.size)
            self._checked.members.append(self._payload(stream, info, wanted))
            if any(stream.read(-info.size % BLOCKSIZE)):
                self.tell(f"between byte {stream.position - (-info.size % BLOCKSIZE)} and the next header are others than zeros")
        self._end(stream, at)
        lacking = (self._wanted or [])[len(self._checked.members) :]
        if lacking:
            self.tell(f"it ends before its member {lacking[0].extension}, to which its ledger leads", lacking[0].key)

    def _header(self, block: bytes, at: int, size: int) -> tarfile.TarInfo | None:
        """What a header block says; None if nothing can be read behind it."""
        if len(block) < BLOCKSIZE:
            self.tell(f"it ends at byte {at + len(block)}, before the end of the archive")
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
            as_written = member_header(info.name, info.size)
        except (tarfile.TarError, ValueError) as error:
            self.tell(f"at byte {at} is no header of a member ({error})")
            return None
        if block != as_written:
            self.tell(f"the header at byte {at} has other fields than those of a shard's member")
        if not 0 <= info.size <= size - at - BLOCKSIZE:
            self.tell(f"its member {info.name} has {info.size} bytes by its header, and the file ends before")
            return None
        return info

    def _expected(self, name: str, offset: int, size: int) -> Place | None:
        """The member that the ledger has here, if it is this one."""
        if self._wanted is None:
            return None
        number = len(self._checked.members)
        if number >= len(self._wanted):
            self.tell(f"at byte {offset} is a member {name}, which its ledger does not know")
            return None
        place = self._wanted[number]
        if (name, offset, size) == (place.name, place.offset, place.size):
            return place
        self.tell(f"at byte {offset} is {name} with {size} bytes; its ledger has {place.name} with {place.size} bytes at {place.offset}", place.key)
        return None

    def _payload(self, stream: _Stream, info: tarfile.TarInfo, wanted: Place | None) -> Found:
        key, _, extension = info.name.partition(".")
        start = stream.position
        if extension.endswith("npy"):
            shape, dtype = self._array(stream, info, extension, key, wanted)
            found = Found(info.name, start, info.size, shape, dtype)
        elif extension == "json" and info.size <= JSON_BYTES:
            found = Found(info.name, start, info.size, described=self._record(bytes(stream.read(info.size)), key))
        else:
            found = Found(info.name, start, info.size)
        while left := start + info.size - stream.position:
            if not stream.read(min(left, PIECE_BYTES)):
                break
        return found

    def _array(self, stream: _Stream, info: tarfile.TarInfo, extension: str, key: str, wanted: Place | None) -> tuple:
        """Shape and dtype of an npy member, whose numbers are looked at; (None, None) if it is none."""
        header = bytes(stream.read(min(10, info.size)))
        header += bytes(stream.read(min(int.from_bytes(header[8:10], "little"), info.size - len(header))))
        expected = None if wanted is None or wanted.shape is None or wanted.dtype is None else (wanted.shape, wanted.dtype)
        found = expected if expected is not None and header == npy_header(*expected) else self._npy(header, extension, key)
        if found is None:
            return None, None
        if expected is not None and found != expected:
            self.tell(f"its {extension} is {found[1]} {list(found[0])}; its ledger says {expected[1]} {list(expected[0])}", key)
        shape, dtype = found[0], np.dtype(found[1])
        size = math.prod(shape) * dtype.itemsize
        if size != info.size - len(header):
            self.tell(f"its {extension} has {info.size - len(header)} bytes of numbers; {dtype.str} {list(shape)} are {size}", key)
            return None, None
        self._numbers(stream, size, shape, dtype, extension, key)
        return found

    def _npy(self, header: bytes, extension: str, key: str) -> tuple[tuple[int, ...], str] | None:
        """An npy header that is not the one that was expected, or of which nothing is known."""
        stream = io.BytesIO(header)
        try:
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError("not of version 1.0")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        except NOT_NPY as error:
            self.tell(f"its {extension} is no npy array ({str(error).splitlines()[0][:100] if str(error) else type(error).__name__})", key)
            return None
        if (fortran and len(shape) > 1) or dtype.hasobject or dtype.byteorder == ">" or dtype.itemsize == 0 or any(n < 0 for n in shape):
            self.tell(f"its {extension} is {dtype} {shape}, which no shard holds: numbers in C order, little endian, were expected", key)
            return None
        return tuple(map(int, shape)), dtype.str

    def _numbers(self, stream: _Stream, size: int, shape: tuple[int, ...], dtype: np.dtype, extension: str, key: str) -> None:
        """Floats must be finite, codes below the size of their codebook."""
        codes = self._codes if self._codes is not None and self._codes.extension == extension else None
        if codes is not None and (dtype.kind not in "ui" or len(shape) != 2 or codes.codebooks not in (None, shape[0])):
            self.tell(f"its {extension} is {dtype.str} {list(shape)}; the spec has {codes.codebooks} codebooks of whole numbers", key)
            return
        wrong, largest, left = False, -1, size
        whole = PIECE_BYTES - PIECE_BYTES % dtype.itemsize
        while left and (data := stream.read(min(left, whole))):
            left -= len(data)
            if dtype.kind in "fc" and len(data) % dtype.itemsize == 0:
                wrong = wrong or _not_finite(data, dtype)
            elif codes is not None and len(data) % dtype.itemsize == 0:
                numbers = np.frombuffer(data, dtype)
                largest, wrong = max(largest, int(numbers.max())), wrong or int(numbers.min()) < 0
        if wrong:
            self.tell(f"its {extension} holds {'what is no finite number' if codes is None else 'codes below 0'}", key)
        if codes is not None and codes.card is not None and largest >= codes.card:
            self.tell(f"its {extension} holds the code {largest}; a codebook has {codes.card}", key)

    def _record(self, data: bytes, key: str) -> Mapping[str, Any] | None:
        try:
            described = json.loads(data)
        except (ValueError, RecursionError) as error:
            self.tell(f"its json cannot be read ({str(error)[:100]})", key)
            return None
        if not isinstance(described, dict):
            self.tell("its json is no object", key)
            return None
        return described

    def _end(self, stream: _Stream, at: int) -> None:
        """The zeros at the end, of which the first block, at byte `at`, is read already."""
        count, zeros = BLOCKSIZE, True
        while data := stream.read(PIECE_BYTES):
            count += len(data)
            zeros = zeros and not np.frombuffer(data, np.uint8).any()
        if not zeros:
            self.tell(f"behind its end at byte {at} are others than zeros")
        if count != end_bytes(at):
            self.tell(f"it ends with {count} zeros behind its last member, at byte {at}; {end_bytes(at)} were written")


@lru_cache(maxsize=4096)
def npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """The header of an npy file as shards are written."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"shape": shape, "fortran_order": False, "descr": dtype})
    return stream.getvalue()


def _not_finite(data: memoryview, dtype: np.dtype) -> bool:
    each = dtype.itemsize // (2 if dtype.kind == "c" else 1)
    if each not in EXPONENTS:
        return not np.isfinite(np.frombuffer(data, dtype)).all()
    exponent = np.array(EXPONENTS[each], f"<u{each}")
    return bool((np.frombuffer(data, f"<u{each}") & exponent).max(initial=0) == exponent)


def check_records(file: str, rows: Sequence[Mapping[str, Any]], members: Sequence[Found], codes: Codes | None = None) -> Iterator[Problem]:
    """Whether what the clips' json say agrees with the ledger's rows and with the arrays beside them."""
    by_key = {row["key"]: row for row in rows if row["status"] == "ok"}
    lengths = [("segments", "avclip.npy"), ("audio_segments", "avclip_audio.npy"), *([("steps", codes.extension)] if codes else [])]
    shapes = {found.name: found.shape for found in members if found.shape is not None}
    for found in members:
        key = found.name.partition(".")[0]
        if found.described is None or key not in by_key:
            continue
        row, said = by_key[key], found.described
        for name in ("key", "split", "label", "duration_seconds"):
            if name in said and _plain(said[name]) != row[name]:
                yield Problem(file, f"its json has {name} {said[name]!r}; its ledger has {row[name]!r}", key)
        for name, extension in lengths:
            shape = shapes.get(f"{key}.{extension}")
            if name in said and shape is not None and (len(shape) < 2 or shape[1] != said[name]):
                yield Problem(file, f"its json has {said[name]} {name}; its {extension} is {list(shape)}", key)


def _plain(value: Any) -> Any:
    """A text as a ledger has it: with what is no UTF-8 as `\\udcff`."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
