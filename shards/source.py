"""The good rows of a dataset that samples are made of, and their bytes.

A dataset on a local file system is mapped. Of one in an object store, blocks are fetched and held in memory while they are in use, if the rows to
come are told ahead; a row that was not told is fetched by itself.

Knows the dataset format. Knows no order, and not what is made of the bytes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from configs import storage
from shards.blocks import BlockReader, FetchConfig, Ranges
from shards.read import Index, Members

WIDEST_GAP_BYTES = 1 << 20
"""Unwanted bytes between two samples that are fetched along, for one request instead of two."""


class Source:
    """See the module's docstring. For one thread."""

    def __init__(self, index: Index, rows: np.ndarray, members: Sequence[Members], fetch: FetchConfig | None = None) -> None:
        """`rows` of the index, which ascend, and which of their members are read."""
        self.index, self.rows, self._members = index, rows, members
        self.bytes = int(sum(each.size[rows].sum() for each in members))
        """What is read of all rows, in bytes."""
        self._fetch, self._reader, self._remote = fetch or FetchConfig(), None, storage.is_remote(index.root)
        self._fetch.check()
        self._block_bytes, self._cut = storage.PART_BYTES, None

    def blocks(self, block_bytes: int) -> np.ndarray:
        """The block of every row in `rows`, counted from 0: runs of a shard of this many bytes."""
        shard, block = self.index.shard_of[self.rows], self._members[0].offset[self.rows] // max(1, block_bytes)
        self.begin()
        self._block_bytes, self._cut = block_bytes, None
        return _runs((np.diff(shard) != 0) | (np.diff(block) != 0))

    def ahead(self, rows: np.ndarray) -> None:
        """These rows will be asked for after those told before. An object store's blocks are fetched ahead of that; local files need nothing."""
        if self._remote:
            self._blocks().tell(self._range_of[rows])

    def begin(self) -> None:
        """Before the first of a new sequence of rows: forgets what was told of another."""
        self.forget()
        self._reader = None

    def forget(self) -> None:
        """What was told will not be asked for: ends all requests and frees the blocks. Of a thread that still asks, too: it gets an error."""
        if self._reader is not None:
            self._reader.close()

    @contextmanager
    def reading(self, rows: np.ndarray) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        """For each row, bytes that hold its members, and where in its shard they begin."""
        if not self._remote:
            yield [self.index.mapped(shard) for shard in self.index.shard_of[rows].tolist()], np.zeros(len(rows), np.int64)
            return
        starts, stops = self._extent(rows)
        with self._blocks().using(self._range_of[rows], starts, stops) as found:
            yield found

    def _blocks(self) -> BlockReader:
        if self._reader is None:
            self._reader = BlockReader(self._ranges, self._fetch)
        return self._reader

    @property
    def _ranges(self) -> Ranges:
        return self._requests()[0]

    @property
    def _range_of(self) -> np.ndarray:
        return self._requests()[1]

    def _requests(self) -> tuple[Ranges, np.ndarray]:
        """See `_cut_ranges`. Cut when the first is asked for: local files need none."""
        if self._cut is None:
            self._cut = self._cut_ranges(self._block_bytes)
        return self._cut

    def _cut_ranges(self, block_bytes: int) -> tuple[Ranges, np.ndarray]:
        """What to request at a time, and which of it each row needs: neighbouring rows, with no wide gap between them, that share a block."""
        rows, index = self.rows, self.index
        start, stop = self._extent(rows)
        gap, place = start[1:] - stop[:-1], self._members[0].offset[rows] // min(max(1, block_bytes), storage.PART_BYTES)
        cuts = (np.diff(index.shard_of[rows]) != 0) | (np.diff(place) != 0) | (gap < 0) | (gap > WIDEST_GAP_BYTES)
        of = np.full(len(index), -1)
        of[rows] = _runs(cuts)
        first, last = np.append(0, np.flatnonzero(cuts) + 1), np.append(np.flatnonzero(cuts), len(rows) - 1)
        paths = [storage.join(index.root, f"{name}.tar") for name in index.shards]
        return Ranges(paths, index.shard_of[rows][first], start[first], stop[last]), of

    def _extent(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in its shard what may be needed of each row begins and ends."""
        starts = np.min([each.offset[rows] for each in self._members], axis=0)
        return starts, np.max([each.offset[rows] + each.size[rows] for each in self._members], axis=0)


def _runs(changes: np.ndarray) -> np.ndarray:
    """The number, from 0, of the run that each element is in, by whether it and the next belong to different ones."""
    return np.concatenate([[0], np.cumsum(changes)])
