"""Ranges of bytes of files in an object store, in memory while they are used: fetched ahead, several at a time, each once.

The reader is told which ranges will be used, in order. It requests them ahead of their use within a bound in bytes, keeps each until its last use
that it was told of, and asks for the version of the file that was listed at the start, so that a file which is replaced meanwhile is an error and
never a mixture.

Memory: what is in use (the caller's order decides how much that is), and at most `read_ahead_mb` of what is not in use yet.

Knows object storage and numbers of ranges. Knows no samples and no tensors.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from configs import storage
from shards.cache import RangeCache


@dataclass(frozen=True)
class FetchConfig:
    """How bytes come from an object store. Datasets on a local file system are mapped, and need none of this."""

    read_ahead_mb: int = 256
    """Megabytes requested ahead of their use, on each rank. What is in use comes on top: lanes / ranks x (open_blocks + 1) x block_bytes at most."""
    connections: int = 32
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

    @contextmanager
    def using(self, numbers: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        """For each [start, stop) in a range: bytes that hold it, and where in the file they begin.

        What was told comes from its whole range, and is one use of it. Of another range only what is wanted is fetched, and not kept: a first batch
        need not wait for whole ranges.
        """
        told = self._coming[numbers] > 0
        held = self._take(np.unique(numbers[told]).tolist())
        others = zip(numbers[~told].tolist(), starts[~told].tolist(), stops[~told].tolist(), strict=True)
        alone = self._pool.map(lambda wanted: self._part(*wanted), others)
        found = [held[number] if known else next(alone) for number, known in zip(numbers.tolist(), told.tolist(), strict=True)]
        yield [data for data, _ in found], np.array([begin for _, begin in found], np.int64)
        self._done(numbers[told])

    def close(self) -> None:
        """Ends all requests, and lets go of all bytes. What waits for a store that does not answer ends within seconds."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._held.clear()

    def _take(self, numbers: list[int]) -> dict[int, tuple[np.ndarray, int]]:
        """These ranges, once all of them are there."""
        for number in numbers:
            if number not in self._held:
                self._request(number)
            if number in self._unused:
                self._unused.discard(number)
                self._unused_bytes -= int(self._size[number])
        self._request_ahead()
        return {number: (self._result(number), int(self._ranges.start[number])) for number in numbers}

    def _done(self, numbers: np.ndarray) -> None:
        """These uses were made: a range of which no other was told is let go."""
        np.subtract.at(self._coming, numbers, 1)
        for number in np.unique(numbers).tolist():
            if not self._coming[number]:
                self._held.pop(number, None)

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
            self._held.pop(number, None)  # so that another try may do better
            raise

    def _block(self, number: int) -> np.ndarray:
        """A range, from the cache or from afar, and then in the cache."""
        kept = self._kept(number)
        if kept is not None:
            return kept
        found, start, stop = self._place(number)
        data = np.frombuffer(storage.read_range(found, start, stop, stop=self._stop), np.uint8)
        if self._cache is not None:
            self._cache.put(found, start, data)
        return data

    def _part(self, number: int, start: int, stop: int) -> tuple[np.ndarray, int]:
        """A part of a range, and where it begins; all of the range if that is in the cache."""
        found, begin, _ = self._place(number)
        kept = self._kept(number)
        if kept is not None:
            return kept, begin
        return np.frombuffer(storage.read_range(found, start, stop, stop=self._stop), np.uint8), start

    def _kept(self, number: int) -> np.ndarray | None:
        return None if self._cache is None else self._cache.get(*self._place(number))

    def _place(self, number: int) -> tuple[storage.Stat, int, int]:
        ranges = self._ranges
        return self._version(ranges.paths[int(ranges.file[number])], int(ranges.stop[number])), int(ranges.start[number]), int(ranges.stop[number])

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
