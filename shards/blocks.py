"""Ranges of bytes of files in an object store, in memory while they are used: fetched ahead, several at a time, each once.

The reader is told which ranges will be used, in order. It requests them ahead of their use within a bound in bytes, keeps each until its last use
that it was told of, and asks for the version of the file that was listed at the start, so that a file which is replaced meanwhile is an error and
never a mixture.

Memory: what is in use (the caller's order decides how much that is), and at most `read_ahead_mb` of what is not in use yet.

Knows object storage and numbers of ranges. Knows no samples and no tensors.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from configs import storage
from shards.cache import RangeCache

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchConfig:
    """How bytes come from an object store. Datasets on a local file system are mapped, and need none of this."""

    read_ahead_mb: int = 256
    """Megabytes requested ahead of their use, on each rank. What is in use comes on top: lanes / ranks x (open_blocks + 1) x block_bytes at most."""
    connections: int = 16
    """Requests in flight at a time, on each rank. One connection to an object store gives 20 to 90 MB/s."""
    cache_dir: str | None = None
    """A local folder in which what was fetched is kept for the next epoch and for other processes; null for none."""
    cache_gb: float = 100.0
    """What may lie in cache_dir, in gigabytes. When it is full, what was not used for an hour makes room; else nothing is added."""

    def check(self) -> None:
        """ValueError for values that cannot be meant."""
        if min(self.read_ahead_mb, self.connections) < 1 or self.cache_gb <= 0:
            raise ValueError(f"read_ahead_mb and connections must be at least 1, and cache_gb above 0; got {self}")


@dataclass(frozen=True)
class Ranges:
    """Ranges [start, stop) of files, numbered from 0: flat arrays, one element per range."""

    paths: Sequence[str]
    file: np.ndarray
    """Of each range: a number in `paths`."""
    start: np.ndarray
    stop: np.ndarray


class BlockReader:
    """See the module's docstring. For one thread, which tells and takes; only the requests are made by others."""

    def __init__(self, ranges: Ranges, config: FetchConfig) -> None:
        config.check()
        self._ranges, self._config, self._size = ranges, config, ranges.stop - ranges.start
        self._coming = np.zeros(len(self._size), np.int64)
        """Uses that were told and not made yet."""
        self._waiting: deque[int] = deque()
        """Ranges to request, in order of their first use."""
        self._held: dict[int, Future[np.ndarray]] = {}
        self._unused: set[int] = set()
        """Those held that no use was made of yet."""
        self._unused_bytes = 0
        self._pool = ThreadPoolExecutor(config.connections, thread_name_prefix="soundshard-fetch")
        self._stop = threading.Event()
        self._listing = threading.Lock()
        self._found: dict[str, storage.Stat] | None = None
        self._cache = RangeCache(config.cache_dir, int(config.cache_gb * 1e9)) if config.cache_dir is not None else None

    def tell(self, numbers: np.ndarray) -> None:
        """These ranges will be used, after all that was told before; a range that is used several times is told as often."""
        new, first = np.unique(numbers, return_index=True)
        for number in new[np.argsort(first)].tolist():
            if not self._coming[number] and number not in self._held:
                self._waiting.append(number)
        np.add.at(self._coming, numbers, 1)
        self._request_ahead()

    def take(self, numbers: np.ndarray) -> dict[int, np.ndarray]:
        """The bytes of these ranges, which were told, once all of them are there. They stay until `done` is called with the same numbers."""
        wanted = np.unique(numbers).tolist()
        for number in wanted:
            if number not in self._held:
                self._request(number)
            if number in self._unused:
                self._unused.discard(number)
                self._unused_bytes -= int(self._size[number])
        self._request_ahead()
        return {number: self._result(number) for number in wanted}

    def done(self, numbers: np.ndarray) -> None:
        """These uses were made: a range that no other was told of is let go."""
        np.subtract.at(self._coming, numbers, 1)
        for number in np.unique(numbers).tolist():
            if self._coming[number] <= 0:
                self._held.pop(number, None)
        self._request_ahead()

    def told(self, numbers: np.ndarray) -> np.ndarray:
        """Which of these ranges were told, and have uses left."""
        return self._coming[numbers] > 0

    def fetch(self, wanted: Iterable[tuple[int, int, int]]) -> list[np.ndarray]:
        """Other ranges (file, start, stop), now, and not kept: for the few bytes that a first batch needs before whole blocks are there."""
        return list(self._pool.map(lambda each: self._read(*each), wanted))

    def close(self) -> None:
        """Ends all requests, and lets go of all bytes. What waits for a store that does not answer ends within seconds."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._held.clear()

    def _request_ahead(self) -> None:
        most = self._config.read_ahead_mb << 20
        while self._waiting:
            number = self._waiting[0]
            if number in self._held or not self._coming[number]:
                self._waiting.popleft()
                continue
            if self._unused_bytes and self._unused_bytes + self._size[number] > most:
                return
            self._waiting.popleft()
            self._request(number)

    def _request(self, number: int) -> None:
        self._held[number] = self._pool.submit(self._block, number)
        self._unused.add(number)
        self._unused_bytes += int(self._size[number])

    def _result(self, number: int) -> np.ndarray:
        try:
            return self._held[number].result()
        except BaseException:
            self._held.pop(number)  # so that another try may do better
            raise

    def _block(self, number: int) -> np.ndarray:
        file, start, stop = (int(values[number]) for values in (self._ranges.file, self._ranges.start, self._ranges.stop))
        if self._cache is None:
            return self._read(file, start, stop)
        found = self._version(self._ranges.paths[file], stop)
        kept = self._cache.get(found, start, stop)
        if kept is not None:
            return kept
        data = self._read(file, start, stop)
        self._cache.put(found, start, data)
        return data

    def _read(self, file: int, start: int, stop: int) -> np.ndarray:
        found = self._version(self._ranges.paths[file], stop)
        return np.frombuffer(storage.read_range(found, start, stop, stop=self._stop), np.uint8)

    def _version(self, path: str, end: int) -> storage.Stat:
        """The file as one listing showed it, before anything was read."""
        with self._listing:
            if self._found is None:
                folders = {storage.parent(each) for each in self._ranges.paths}
                self._found = {found.path: found for folder in folders for found in storage.scan(folder, recursive=False)}
        found = self._found.get(path)
        if found is None:
            raise ValueError(f"{path} is missing, though its ledger is there: copy it back, or remove the ledger and run the job again")
        if found.size < end:
            raise ValueError(f"{path} has {found.size} bytes, and its ledger leads to byte {end}: the file is cut short or not its own")
        return found
