"""A local folder of byte ranges that came from an object store, with a limit in bytes. Any number of processes may share it.

A file is a range of a version of an object, named by a hash of all three, and appears whole or not at all. What is in the folder counts against the
limit before it is written; the count is kept in a file that processes lock, and is taken anew from the folder when it reaches the limit, so that what
a killed process counted and did not write is found out.

When it is full, what has not been used for an hour goes first, longest unused first. What is left then is in somebody's use, and nothing is added: a
shuffled epoch that pushed out what comes later in it would find hardly anything (for half a dataset 15 % against 50 %).

Knows bytes and files. Knows no samples.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np

from configs import storage

STALE_SECONDS = 3600.0
"""What has not been used for so long makes room for others."""
FULL_SECONDS = 60.0
"""How long a process that found no room leaves the folder alone."""
COUNT = ".bytes"
log = logging.getLogger(__name__)
_telling, _told = threading.Lock(), set[Path]()
"""Folders that failed since a cache was last opened in them, and were told of. For the whole process: one stream may end while another begins."""


class RangeCache:
    """See the module's docstring. For any number of threads."""

    def __init__(self, folder: str | os.PathLike, limit_bytes: int) -> None:
        if storage.is_remote(folder):
            raise ValueError(f"cache_dir is {folder}; expected a folder on a local disk")
        self._folder, self._limit, self._pause_until = Path(folder), limit_bytes, 0.0
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._locked() as count:
            storage.sweep(self._folder)  # what killed processes were writing
            self._set(count, sum(entry.stat().st_size for entry in self._entries()))
        with _telling:
            _told.discard(self._folder)

    def get(self, found: storage.Stat, start: int, stop: int) -> np.ndarray | None:
        """The bytes [start, stop) of this version of an object, mapped; None if they are not here."""
        path = self._path(found, start, stop)
        try:
            os.utime(path)
            if os.path.getsize(path) != stop - start:  # damaged
                return None
            return np.memmap(path, mode="r", dtype=np.uint8)
        except FileNotFoundError:  # or evicted just now
            return None

    def put(self, found: storage.Stat, start: int, data: np.ndarray) -> None:
        """Keeps the bytes from `start` on of this version of an object, if there is room. A disk that fails is told once, and done without."""
        if time.monotonic() < self._pause_until:
            return
        path = self._path(found, start, start + data.size)
        temporary = self._folder / f".{path.name}.{secrets.token_hex(6)}.tmp"
        try:
            file = self._reserve(path, temporary, data.size)
            if file is not None:
                with file:
                    file.write(data.data)
                    file.flush()
                    os.fsync(file.fileno())
                    with self._locked():
                        os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            self._pause_until = time.monotonic() + FULL_SECONDS
            with _telling:  # many threads may find out at once
                told = self._folder in _told
                _told.add(self._folder)
            if not told:
                log.warning("%s: cannot keep what was fetched, going on without (%s)", self._folder, error)

    def _reserve(self, path: Path, temporary: Path, size: int) -> BinaryIO | None:
        """A new file that counts with its size from now on; None if there is no room, or another process was faster."""
        with self._locked() as count:
            if path.is_file() and path.stat().st_size == size:
                return None
            if not self._has_room(count, size):
                self._pause_until = time.monotonic() + FULL_SECONDS
                return None
            file = open(temporary, "xb")  # noqa: SIM115 - the caller closes it
            fcntl.flock(file, fcntl.LOCK_EX)  # which tells `storage.sweep` that somebody writes it
            file.truncate(size)
            return file

    def _path(self, found: storage.Stat, start: int, stop: int) -> Path:
        return self._folder / f"{sha256(f'{found.path} {found.version} {start} {stop}'.encode()).hexdigest()[:32]}.range"

    def _has_room(self, count: BinaryIO, size: int) -> bool:
        """Counts `size` bytes more, if they have room or can be given it."""
        total = int(count.read() or self._limit)
        if total + size > self._limit:
            total = self._make_room(size)
        fits = total + size <= self._limit
        self._set(count, total + size if fits else total)
        return fits

    def _make_room(self, size: int) -> int:
        """Removes what is stale, longest unused first, until there is some room to spare; the bytes that are left."""
        entries = sorted((found.st_mtime, found.st_size, entry.path) for entry in self._entries() for found in [entry.stat()])
        total = sum(size for _, size, _ in entries)
        for used, freed, path in entries:
            if total + size <= 0.9 * self._limit or used > time.time() - STALE_SECONDS:
                break
            os.unlink(path)
            total -= freed
        return total

    def _entries(self) -> Iterator[os.DirEntry]:
        """All files that count, those that are being written included."""
        return (entry for entry in os.scandir(self._folder) if entry.name != COUNT)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        with open(self._folder / COUNT, "a+b") as count:
            fcntl.flock(count, fcntl.LOCK_EX)
            count.seek(0)
            yield count

    @staticmethod
    def _set(count: BinaryIO, total: int) -> None:
        count.truncate(0)
        count.write(b"%d" % total)
        count.flush()
