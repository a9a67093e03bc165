"""Videos inside tar files: where each one lies, so that it is read by its range of bytes and nothing is unpacked.

Knows tar headers, and files by their paths, local or in object storage. Knows no lists, no clips and no media, and imports little: planning does.
Compressed tars are `pipeline.unpack`'s matter.

Headers are read one after the other, payloads are skipped: a part of 25 GB costs some MB. POSIX (ustar and pax), GNU and the oldest tars are
understood, hard and symbolic links inside a tar, and several tars in one file. What a damaged file may have lost cannot be told, so damage is an
error and not a shorter list, unless `salvage` asks for what there is: one part of VGGSound's public copy, for one, is damaged where it is published.
"""

import hashlib
import json
import logging
import os
import posixpath
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from tqdm import tqdm

from configs import storage
from configs.storage import Stat
from pipeline.lists import VIDEO_SUFFIXES

PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
TAR_SUFFIXES = (".tar", *PACKED_SUFFIXES)
INSIDE = "::"
"""Between a tar's path and a member's name in a clip's source."""
HIDDEN = re.compile(r"(?:^|/)\.(?!\./)")
BLOCK = 512
ZEROS = bytes(BLOCK)
MAGIC, MAGIC_PLACE = b"ustar", 257
"""What headers of all but the oldest tars have, and where."""
SPACE = ord(" ")
OCTAL = re.compile(rb"[0-7]+")
END_BLOCKS = 2
"""Of zeros, with which a tar ends."""
RECORD = 20 * BLOCK
"""What tars are filled up to with zeros."""
WINDOW_BYTES = 4096
"""Read at once where a header is: also the header after a member as small as a clip's json."""
SCAN_BYTES = 1 << 20
MOST_LINKS = 8
"""That lead from one to the next."""
LISTING_THREADS = 32
KEPT_MEMBERS = 256
"""Lists at least this long are kept in the cache folder: headers lie a seek or a request apart."""
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"(\xb5/\xfd": "zstd"}
"""How compressed files begin, whatever they are called."""
REGULAR, HARD_LINK, LINK, EMPTY_KINDS = b"0", b"1", b"2", b"3456"
LONG_NAME, LONG_LINK, EXTENDED, EXTENDED_FOR_ALL, SPARSE, CONTINUED = b"L", b"K", b"x", b"g", b"S", b"M"
DESCRIBING = (LONG_NAME, LONG_LINK, EXTENDED)
MOST_DESCRIBING_BYTES = 1 << 20
log = logging.getLogger(__name__)


class TarVideo(NamedTuple):
    """A video in a tar: its bytes are `[offset, offset + size)` of the file."""

    member: str
    """Its path in the tar, without `./`."""
    offset: int
    size: int


class ReplacedTar(ValueError):  # noqa: N818 - what it is called says what was found
    """A tar that is not the one in which a member was found."""


class TruncatedTar(ValueError):  # noqa: N818 - as above
    """A tar that ends inside a member."""


class Stopped(Exception):  # noqa: N818 - as above
    """What is being read is not wanted any more: another file of the same call has failed, or the caller has gone."""


# --- names ----------------------------------------------------------------------------------------------------------------------------


def is_tar(path: str) -> bool:
    """Whether a file is called like a tar, plain or compressed."""
    return path.lower().endswith(TAR_SUFFIXES)


def source_of(path: str, member: str) -> str:
    """What a member of a tar is called where a file's path could stand: `PATH.tar::MEMBER`."""
    return f"{path}{INSIDE}{member}"


def tar_of(source: str) -> tuple[str, str]:
    """The tar's path and the member's name out of `PATH.tar::MEMBER`."""
    at = source.find(INSIDE)
    while not is_tar(source[:at]):
        assert at >= 0, f"{source!r} is no member of a tar"
        at = source.find(INSIDE, at + 1)
    return source[:at], source[at + len(INSIDE) :]


# --- what a tar holds -----------------------------------------------------------------------------------------------------------------


def videos(path: str, *, salvage: bool = False) -> Iterator[TarVideo]:
    """The videos of one plain tar, in its order, links last; names that begin with a dot are passed over, as in folders.

    A link has the bytes that it leads to, none (size 0) where it leads nowhere. FileNotFoundError if there is no such file; ValueError, once it is
    reached, for what is compressed, truncated, damaged or no tar. `salvage` goes on after damage with the next header that there is, and says so in
    the log; a video that the file's end cuts is listed as its header has it.
    """
    with _File(stat_of(path), threading.Event(), salvage=salvage) as file:
        yield from _videos(file)
        _warn(file)


def listed(paths: Sequence[str], *, salvage: bool = False) -> Iterator[tuple[Stat, list[TarVideo]]]:
    """Many tars as they are now, each with its videos, in the order given; several are read at a time. Raises what `videos` raises.

    Lists of large tars without damage are kept in the cache folder, by path, size and version.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        try:
            found = pool.map(partial(_listed, stop=stop, salvage=salvage), paths)
            yield from tqdm(found, total=len(paths), desc="tar headers", unit="tar", delay=5.0, mininterval=drawing_seconds())
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def stat_of(path: str) -> Stat:
    """Size and version of a file. FileNotFoundError if there is none."""
    found = storage.stat(path)
    if found is None:
        raise FileNotFoundError(2, "no such file", path)
    return found


def drawing_seconds() -> float:
    """Seconds between two drawings of a bar: a log file gets few."""
    return 0.5 if sys.stderr.isatty() else 30.0


def _listed(path: str, *, stop: threading.Event, salvage: bool) -> tuple[Stat, list[TarVideo]]:
    found = stat_of(path)
    name = hashlib.sha256(f"{path} {found.size} {found.version}".encode(errors="surrogateescape")).hexdigest()[:32]
    kept = storage.cache_dir() / "tars" / f"{name}.json"
    if (known := _known(kept)) is not None:
        return found, known
    with _File(found, stop, salvage=salvage) as file:
        members = list(_videos(file))
    _warn(file)
    if file.headers >= KEPT_MEMBERS and not file.damage:
        try:
            storage.write_bytes(kept, json.dumps(members).encode())
        except OSError as error:
            log.warning("%s: %s; the headers of %s are read again next time", kept, error, path)
    return found, members


def _known(kept: os.PathLike) -> list[TarVideo] | None:
    return [TarVideo(*video) for video in json.loads(storage.read_bytes(kept))] if storage.is_file(kept) else None


def _warn(file: "_File") -> None:
    for what in file.damage:
        log.warning("%s; what can be read of it is taken", what)


class _File:
    """A file's bytes by position, read a window at a time until `stop` is set."""

    def __init__(self, found: Stat, stop: threading.Event, *, salvage: bool) -> None:
        self.path, self.size = found.path, found.size
        self.headers = 0
        self.damage: list[str] = []
        self._salvage = salvage
        self._found, self._stop = found, stop
        self._start, self._data = 0, b""
        self._local = None if storage.is_remote(found.path) else os.open(found.path, os.O_RDONLY)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        if self._local is not None:
            os.close(self._local)

    def read(self, start: int, end: int) -> bytes:
        """The bytes `[start, end)`, fewer where the file ends."""
        end = min(end, self.size)
        if not self._start <= start <= end <= self._start + len(self._data):
            stop = min(max(end, start + WINDOW_BYTES), self.size)
            self._start, self._data = start, self._range(start, stop)
        return self._data[start - self._start : end - self._start]

    def _range(self, start: int, end: int) -> bytes:
        if end <= start:
            return b""
        if self._stop.is_set():
            raise Stopped
        if self._local is None:
            return bytes(storage.read_range(self._found, start, end, stop=self._stop))
        return os.pread(self._local, end - start, start)

    def damaged(self, what: str) -> None:
        """Note damage. ValueError unless what is left is to be salvaged."""
        if not self._salvage:
            raise ValueError(f"{self.path} {what}; fetch it again, or salvage=true takes what can be read of it")
        self.damage.append(f"{self.path} {what}")

    def next_header(self, at: int) -> int:
        """The first block from `at` on that begins a member, by its magic number and its checksum; the file's end if there is none."""
        for start in range(at, self.size, SCAN_BYTES):
            data = self._range(start, min(start + SCAN_BYTES, self.size))
            place = data.find(MAGIC)
            while place >= 0:
                block, inside = divmod(place, BLOCK)
                if inside == MAGIC_PLACE and _header(data[block * BLOCK : (block + 1) * BLOCK]) is not None:
                    return start + block * BLOCK
                place = data.find(MAGIC, place + 1)
        return self.size

    def next_data(self, at: int) -> int | None:
        """The first block from `at` on that is not all zeros; None if there is none."""
        for start in range(at, self.size, SCAN_BYTES):
            data = self._range(start, min(start + SCAN_BYTES, self.size))
            if left := len(data.lstrip(b"\0")):
                return start + (len(data) - left) // BLOCK * BLOCK
        return None


class _Header(NamedTuple):
    """A block that begins a member."""

    name: str
    kind: bytes
    size: int
    link: str


class _Entry(NamedTuple):
    """A member: its header with what long headers before it said, and where its bytes begin."""

    name: str
    kind: bytes
    size: int
    link: str
    offset: int
    sparse: bool


def _videos(file: _File) -> Iterator[TarVideo]:
    places: dict[str, tuple[int, int]] = {}
    links: list[tuple[str, str, int]] = []
    for entry in _entries(file):
        name = posixpath.normpath(entry.name)
        if entry.kind in (HARD_LINK, LINK):
            beside = posixpath.dirname(name) if entry.kind == LINK else ""
            links += [(name, posixpath.normpath(posixpath.join(beside, entry.link)), entry.offset)] if _is_video(name) else []
            continue
        places[name] = entry.offset, entry.size
        if _is_video(name):
            if entry.sparse:
                raise ValueError(f"{file.path}: {name} is stored without its holes, so its bytes are not all there; make the tar without --sparse")
            yield TarVideo(name, entry.offset, entry.size)
    leads_to = {name: target for name, target, _ in links}
    for name, target, offset in links:
        for _ in range(MOST_LINKS):
            target = leads_to.get(target, target)
        yield TarVideo(name, *places.get(target, (offset, 0)))


def _is_video(name: str) -> bool:
    return name.lower().endswith(VIDEO_SUFFIXES) and HIDDEN.search(name) is None


def _entries(file: _File) -> Iterator[_Entry]:
    """The members that have names: files and links."""
    at, more = 0, dict[str, str]()
    _check_kind(file)
    while at < file.size:
        block = file.read(at, at + BLOCK)
        if block == ZEROS:
            # The end; but there may be another tar after it, and a header that was lost must not pass for the end.
            after = file.next_data(at)
            if after is None:
                if at == 0 and file.size > RECORD:
                    file.damaged("holds nothing but zeros")
                return
            if after - at < END_BLOCKS * BLOCK:
                file.damaged(f"is damaged: the header at byte {at} is gone; what it told of is not known")
            at, block = after, file.read(after, after + BLOCK)
        header = _header(block)
        if header is None:
            file.damaged(f"is damaged: after {file.headers} headers the next one should be at byte {at}, and it is not; what it told of is not known")
            at, more = file.next_header(at), {}
            continue
        if header.kind in DESCRIBING and header.size > MOST_DESCRIBING_BYTES:
            file.damaged(f"is damaged: the header at byte {at} would describe the next one in {header.size} bytes")
            at, more = file.next_header(at + BLOCK), {}
            continue
        file.headers += 1
        start, size = at + BLOCK, int(more.get("size", header.size))
        stored = 0 if header.kind in (HARD_LINK, LINK) or header.kind in EMPTY_KINDS else size
        at = start + -(-stored // BLOCK) * BLOCK
        if start + stored > file.size:
            name = more.get("path", header.name)
            file.damaged(
                f"is truncated: it ends at byte {file.size}, inside {name}, which goes on to byte {start + stored}; what came after is not known"
            )
            if header.kind in DESCRIBING:
                return
        if header.kind in (LONG_NAME, LONG_LINK):
            name = "path" if header.kind == LONG_NAME else "linkpath"
            more[name] = _text(file.read(start, start + size).partition(b"\0")[0])
            if not more[name]:
                file.damaged(f"is damaged: the long name at byte {start} is empty; what it is called is not known")
                del more[name]
        elif header.kind == EXTENDED:
            records = _records(file.read(start, start + size))
            if records is None:
                file.damaged(f"is damaged: the extended header at byte {start} is none; what it told of is not known")
            more |= records or {}
        elif header.kind == CONTINUED:
            raise ValueError(f"{file.path} begins with the rest of {header.name}, which another volume of this tar begins; make it in one volume")
        else:
            if header.kind != EXTENDED_FOR_ALL and header.kind not in EMPTY_KINDS:
                sparse = header.kind == SPARSE or any(name.startswith("GNU.sparse.") for name in more)
                name, link = more.get("path", header.name), more.get("linkpath", header.link)
                yield _Entry(name, header.kind, size, link, start, sparse)
            more = {} if header.kind != EXTENDED_FOR_ALL else more
    if not file.damage:
        file.damaged(
            f"is truncated: it ends at byte {file.size} without the zeros that end a tar; what came after is not known (if it is whole, "
            f"`head -c 1024 /dev/zero >> {file.path}` ends it)"
        )


def _check_kind(file: _File) -> None:
    """ValueError for a file that is no plain tar, from how it begins."""
    start = file.read(0, BLOCK)
    if kind := compression(start):
        raise ValueError(
            f"{file.path} is compressed ({kind}), and a video in it cannot be reached without unpacking all before it; unpack=FOLDER writes the "
            "plain tar there, once"
        )
    if len(start) < BLOCK or (not is_start(start) and file.next_header(0) == file.size):
        what = "has 0 bytes" if not start else f"is no tar: it begins with {start[:16]!r}"
        raise ValueError(f"{file.path} {what}; fetch it again, or give it another name if it is something else")


def compression(start: bytes) -> str | None:
    """What a file that begins so is compressed with; None if it is not."""
    return next((kind for magic, kind in PACKED.items() if start.startswith(magic)), None)


def is_start(start: bytes) -> bool:
    """Whether a plain tar begins so."""
    return start[:BLOCK] == ZEROS or _header(start[:BLOCK]) is not None


def _header(block: bytes) -> _Header | None:
    """What a header block says; None if it is none, by its checksum (of unsigned bytes, or as some old tars have it, of signed ones)."""
    if len(block) < BLOCK:
        return None
    told = _number(block[148:156])
    unsigned = sum(block) - sum(block[148:156]) + 8 * SPACE
    if told != unsigned and told != unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
        return None
    size = _number(block[124:136])
    if size is None:
        return None
    name = _text(block[:100].partition(b"\0")[0])
    if block[257:263] == b"ustar\0" and block[345]:
        prefix = _text(block[345:500].partition(b"\0")[0])
        name = f"{prefix}/{name}"
    kind = REGULAR if block[156:157] in (b"\0", b"7") else block[156:157]
    if kind == REGULAR and name.endswith("/"):  # how folders were before they had a kind
        kind = b"5"
    return _Header(name, kind, size, _text(block[157:257].partition(b"\0")[0]))


def _number(field: bytes) -> int | None:
    """A number of a header: octal digits, or GNU's bytes after one that says so. None if it is neither."""
    if field[0] == 0o200:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    return (int(digits, 8) if OCTAL.fullmatch(digits) else None) if digits else 0


def _records(data: bytes) -> dict[str, str] | None:
    """A pax header's `length name=value` lines; None if it has others."""
    found, at = dict[str, str](), 0
    while at < len(data):
        match = re.compile(rb"(\d{1,12}) ([^=]+)=").match(data, at)
        if match is None or data[at + int(match[1]) - 1 : at + int(match[1])] != b"\n":
            return None
        found[_text(match[2])] = _text(data[match.end() : at + int(match[1]) - 1])
        at += int(match[1])
    return found if re.fullmatch(r"\d+", found.get("size", "0")) else None


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


# --- reading a member -----------------------------------------------------------------------------------------------------------------


def member_bytes(source: str, offset: int, size: int) -> bytes:
    """The bytes of a member (`PATH.tar::MEMBER`) that lies at `offset`, with one reading.

    FileNotFoundError if there is no such tar, TruncatedTar where it ends before they do, ReplacedTar where it is another one now: the header before
    the bytes is read with them.
    """
    path, member = tar_of(source)
    data = storage.read_bytes(path, offset - BLOCK, offset + size)
    if _header(data[:BLOCK]) is None:
        raise ReplacedTar(f"{path} does not have {member} at byte {offset} any more: it was replaced since it was listed")
    if len(data) < BLOCK + size:
        raise TruncatedTar(f"{path} has {len(data) - BLOCK} of the {size} bytes of {member}: the tar ends there")
    return data[BLOCK:]
