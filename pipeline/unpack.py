"""Compressed tars written once as plain ones, whose videos can then be read by range.

Knows compression and files by their paths, local or in object storage. What a plain tar holds is `pipeline.tars`' matter.
"""

import bz2
import json
import logging
import lzma
import os
import posixpath
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from configs import storage
from configs.storage import Stat
from pipeline.tars import BLOCK, PACKED_SUFFIXES, Stopped, compression, drawing_seconds, is_start, stat_of

THREADS = 8
LOOKING_THREADS = 32
PIECE_BYTES = 8 << 20
"""Read at once."""
FED_BYTES, FED_BYTES_SALVAGING = 1 << 20, 1 << 14
"""Decompressed at once: bounds what it may become, and what is lost where damage begins."""
MAGIC_BYTES = 8
DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "bzip2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}
log = logging.getLogger(__name__)


def compressed(paths: Sequence[str]) -> list[str]:
    """Those of the files that are compressed, by how they begin: a name may say otherwise."""
    with ThreadPoolExecutor(LOOKING_THREADS) as pool:
        kinds = list(pool.map(_kind, paths))
    return [path for path, kind in zip(paths, kinds, strict=True) if kind]


def unpacked(paths: Sequence[str], folder: str, *, salvage: bool = False) -> list[str]:
    """Plain tars for all of these, in the same order: those that are plain as they are, compressed ones (gzip, bzip2, xz) written to `folder`, once.

    Several are unpacked at a time, each appears whole or not at all, and one that is there from an earlier call stays if the compressed file is the
    same still. ValueError for a file that is damaged or no compressed tar; those that are finished by then are kept. `salvage` keeps what comes
    before the damage and says so in the log.
    """
    common = posixpath.commonprefix([f"{storage.parent(path)}/" for path in paths]).rpartition("/")[0] + "/"
    packed = set(compressed(paths))
    plain = [storage.join(folder, _plain_name(path.removeprefix(common))) if path in packed else path for path in paths]
    if len(set(plain)) < len(plain):
        twice = next(path for path in plain if plain.count(path) > 1)
        raise ValueError(f"{twice} would be the place of several files; unpack them with one call each, to folders of their own")
    works = [_Work(stat_of(path), target, salvage) for path, target in zip(paths, plain, strict=True) if path in packed]
    _do_all([work for work in works if not work.is_done()])
    return plain


def _kind(path: str) -> str:
    return compression(storage.read_bytes(path, 0, MAGIC_BYTES)) or ""


def _plain_name(name: str) -> str:
    ending = next((suffix for suffix in (*PACKED_SUFFIXES, ".tar") if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(ending)] + ".tar"


def _do_all(works: "Sequence[_Work]") -> None:
    if not works:
        return
    total, stop = sum(work.found.size for work in works), threading.Event()
    with tqdm(total=total, desc="unpack", unit="B", unit_scale=True, mininterval=drawing_seconds()) as bar, ThreadPoolExecutor(THREADS) as pool:
        running = [pool.submit(work.do, bar, stop) for work in works]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # what is left of them when one has failed, or on Ctrl-C, ends at its next piece
        errors = [future.exception() for future in running]
    told = [error for error in errors if error is not None and not isinstance(error, Stopped)]
    if told:
        raise told[0]


@dataclass
class _Work:
    """One compressed file, and where its content goes."""

    found: Stat
    target: str
    salvage: bool
    damage: str | None = None
    _note: str = field(init=False)
    """Beside the target: what it was made of, and what was wrong with that."""

    def __post_init__(self) -> None:
        self._note = f"{self.target}.from.json"

    def _told(self) -> dict[str, Any]:
        return {"source": self.found.path, "size": self.found.size, "version": self.found.version}

    def is_done(self) -> bool:
        """Whether the target was made of this very file. One that was made of another is removed before its note is."""
        there, noted = storage.is_file(self.target), storage.is_file(self._note)
        if there and not noted:
            raise ValueError(f"{self.target} is there, and nothing says what it was unpacked from; remove it, or give it as source itself")
        told = json.loads(storage.read_bytes(self._note)) if there else {}
        damage = told.pop("damage", None)
        if there and told == self._told():
            if damage and not self.salvage:
                raise ValueError(damage)
            if damage:
                log.warning("%s: what came before is in %s", damage, self.target)
            return True
        storage.remove(self.target)
        return False

    def do(self, bar: tqdm, stop: threading.Event) -> None:
        """Write the target."""
        storage.remove_stale(self.target)
        pieces, start = self._pieces(bar, stop), b""
        while len(start) < BLOCK and (piece := next(pieces, b"")):
            start += piece
        if not is_start(start):
            raise ValueError(self.damage or f"{self.found.path} is compressed, but there is no tar in it: it begins with {start[:16]!r}")
        storage.write_bytes(self._note, json.dumps(self._told()).encode())
        with storage.writing(self.target) as out:
            out.write(start)
            for piece in pieces:
                out.write(piece)
            if self.damage:
                log.warning("%s: what came before is in %s", self.damage, self.target)
                storage.write_bytes(self._note, json.dumps(self._told() | {"damage": self.damage}).encode())
        kind, _, time = self.found.version.partition(":")
        if kind == "mtime" and not storage.is_remote(self.target):
            os.utime(self.target, ns=(int(time), int(time)))  # so that unpacked anew, after a scratch disk was emptied, it is the same input

    def _pieces(self, bar: tqdm, stop: threading.Event) -> Iterator[bytes]:
        """The content in pieces; several streams one after the other are one, as the tools have it."""
        found, kind = self.found, _kind(self.found.path)
        if kind not in DECOMPRESSORS:
            raise ValueError(f"{found.path} is compressed ({kind}), which cannot be unpacked here; unpack it with that tool and give the plain tar")
        machine, at = DECOMPRESSORS[kind](), 0
        for data in self._read(bar):
            at += len(data)
            while data:
                if stop.is_set():
                    raise Stopped
                if machine.eof:
                    data = data.lstrip(b"\0")  # what some writers fill up with
                    if not data:
                        break
                    machine = DECOMPRESSORS[kind]()
                try:
                    piece = machine.decompress(data)
                except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
                    self._damaged(f"{found.path} is damaged before byte {at} of {found.size} ({error})", error)
                    return
                data = machine.unused_data if machine.eof else b""
                if piece:
                    yield piece
        if not machine.eof:
            self._damaged(f"{found.path} is truncated: its {kind} stream goes on after byte {found.size}", None)

    def _read(self, bar: tqdm) -> Iterator[bytes]:
        fed = FED_BYTES_SALVAGING if self.salvage else FED_BYTES
        for at in range(0, self.found.size, PIECE_BYTES):
            read = storage.read_bytes(self.found.path, at, min(at + PIECE_BYTES, self.found.size))
            yield from (read[begin : begin + fed] for begin in range(0, len(read), fed))
            bar.update(len(read))

    def _damaged(self, what: str, error: BaseException | None) -> None:
        self.damage = f"{what}; fetch it again, or salvage=true takes what comes before"
        if not self.salvage:
            raise ValueError(self.damage) from error
