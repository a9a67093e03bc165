"""Batches of feature and codec windows for a trainer, in an order that depends on the seed and the dataset alone, resumable to the sample.

The order is one endless list of samples, numbered g = 0, 1, 2, ..., each sample once in every epoch (`shards.order`). A batch that straddles an
epoch's end holds the last samples of one epoch and the first of the next.

A global batch of B is the next B numbers; rank r of W takes every W-th of them from the r-th, which are whole lanes. So global batches are equal on
any W that divides L and B, and the state is one integer, the samples consumed.

Knows tensors, the segment clock and the dataset format; shards in an object store are copied to the cache folder as they are needed. Knows no
trainer, no model and no processes.
"""

import math
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import TypeVar

import numpy as np

from shards.dataset import DatasetMismatch
from shards.order import START, VIEW, Order, check_lanes, counter_hash
from shards.read import Index
from shards.windows import Batch, Windows

BLOCKS_PER_LANE = 8
"""A small dataset is cut into smaller blocks than configured, so that a lane still has this many to shuffle."""
T = TypeVar("T")


@dataclass(frozen=True)
class StreamConfig:
    """Which windows make a batch, and how they are read."""

    batch_size: int = 64
    """Windows in a global batch, over all ranks."""
    segments: int = 4
    """Contiguous segments in a window; 4 are 2.56 s. Clips shorter than a window are left out and counted."""
    seed: int = 0
    """Decides the order of samples, the windows' starts and the views."""
    lanes: int | None = None
    """Parallel sequences that the order is dealt to; a multiple of the number of ranks. Default: the largest up to 64 that divides batch_size."""
    block_bytes: int = 8 << 20
    """Length of a block, the unit of reading and shuffling, in bytes. Small datasets use smaller ones."""
    open_blocks: int = 4
    """Blocks that a lane draws from at a time. More shuffle better and, where reading means copying, take lanes x blocks x bytes of memory."""
    prefetch: int = 2
    """Batches prepared ahead by one background thread; 0 for none."""
    pin_memory: bool = False
    """Assemble batches in page-locked memory, for faster copies to a GPU. Ignored where there is none."""


class FeatureStream:
    """Iterates over batches of a feature dataset: endless and shuffled for training; one complete pass, in order, for evaluation.

    Training (`shuffle=True`): window starts and views are drawn per (seed, epoch, sample). Iterating goes on from `consumed`, which counts the
    samples of all ranks in the batches handed out so far, not those prefetched; call `load_state_dict` before `iter`.
    Evaluation (`shuffle=False`): every sample once, view 0 from the clip's start, nothing padded or dropped: the last batch is short, and with
    several ranks some may have one batch fewer.
    """

    def __init__(self, index: Index, config: StreamConfig, rank: int = 0, world: int = 1, *, shuffle: bool = True) -> None:
        assert 0 <= rank < world
        if min(config.batch_size, config.segments, config.block_bytes, config.open_blocks) < 1 or config.prefetch < 0:
            raise ValueError(f"batch_size, segments, block_bytes and open_blocks must be at least 1, and prefetch at least 0; got {config}")
        self._index, self._config, self._rank, self._world, self._shuffle = index, config, rank, world, shuffle
        self._windows = Windows(index, config.segments, pin_memory=config.pin_memory)
        self._set_lanes(check_lanes(config.batch_size, config.lanes, world))
        self.consumed = 0
        """Samples of the endless order handed out so far, over all ranks: the whole state."""

    @property
    def samples(self) -> int:
        """Samples in an epoch, over all ranks."""
        return len(self._windows.rows)

    @property
    def skipped(self) -> int:
        """Good clips left out because they are shorter than a window."""
        return len(self._index) - self.samples

    @property
    def lanes(self) -> int:
        return self._lanes

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.consumed // self.samples

    @property
    def steps_per_epoch(self) -> int:
        """Batches in this rank's evaluation pass; for training, where epochs need not end with a batch, the whole batches in one (at least 1)."""
        if self._shuffle:
            return max(1, self.samples // self._config.batch_size)
        return math.ceil(len(range(self._rank, self.samples, self._world)) / self._local)

    def __iter__(self) -> Generator[Batch, None, None]:
        with closing(prefetched(self._training() if self._shuffle else self._evaluation(), self._config.prefetch)) as batches:
            for consumed, batch in batches:
                self.consumed = consumed
                yield batch

    def state_dict(self) -> dict[str, int | str]:
        """Where the stream is, and what that position refers to. The batch size and the number of ranks are no part of it."""
        return {"consumed": self.consumed, **self._identity()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Goes to a saved position. DatasetMismatch, naming what differs, if the order there was another one."""
        adopted = {"lanes": int(state["lanes"])} if self._config.lanes is None else {}
        here = self._identity() | adopted
        differing = [f"{name}: {state.get(name)} there, {value} here" for name, value in here.items() if state.get(name) != value]
        if differing:
            raise DatasetMismatch(
                "the saved position belongs to another order of samples, so training cannot go on exactly from it; give the stream the same "
                f"dataset and values ({'; '.join(differing)}), or start without the saved position"
            )
        lanes = int(state["lanes"])
        if lanes % self._world:
            fitting = [ranks for ranks in range(1, lanes + 1) if lanes % ranks == 0]
            raise ValueError(f"the saved order has {lanes} lanes, which {self._world} ranks cannot share; go on with one of {fitting} ranks")
        self._set_lanes(lanes)
        self.consumed = int(state["consumed"])

    def _identity(self) -> dict[str, int | str]:
        """All that decides the order and the windows."""
        config = self._config
        names = {"seed": config.seed, "segments": config.segments, "block_bytes": config.block_bytes, "open_blocks": config.open_blocks}
        return {**names, "lanes": self._lanes, "fingerprint": self._index.info.fingerprint, "content": self._index.content, "samples": self.samples}

    def _set_lanes(self, lanes: int) -> None:
        self._lanes, self._local = lanes, self._config.batch_size // self._world
        blocks = self._windows.blocks(min(self._config.block_bytes, self._windows.bytes // (BLOCKS_PER_LANE * lanes)))
        self._order = Order(blocks, lanes=lanes, open_blocks=self._config.open_blocks, seed=self._config.seed)

    def _training(self) -> Iterator[tuple[int, Batch]]:
        consumed, windows, seed = self.consumed, self._windows, self._config.seed
        while True:
            positions = np.arange(consumed + self._rank, consumed + self._config.batch_size, self._world)
            rows, epochs = windows.rows[self._order.items(positions)], positions // self.samples
            starts = counter_hash(seed, START, epochs, rows) % windows.starts[rows].astype(np.uint64)
            views = counter_hash(seed, VIEW, epochs, rows) % windows.views[rows].astype(np.uint64)
            consumed += self._config.batch_size
            yield consumed, windows.batch(rows, starts.astype(np.int64), views.astype(np.int64))

    def _evaluation(self) -> Iterator[tuple[int, Batch]]:
        mine = self._windows.rows[self._rank :: self._world]
        for first in range(0, len(mine), self._local):
            rows = mine[first : first + self._local]
            yield 0, self._windows.batch(rows, np.zeros_like(rows), np.zeros_like(rows))


def prefetched(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """The same items, made by a background thread up to `depth` ahead. Its exceptions are raised here; it ends when this iterator is closed."""
    if depth == 0:
        yield from items
        return
    ready: SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = SimpleQueue()
    free, stop = Semaphore(depth), Event()

    def work() -> None:
        try:
            while free.acquire() and not stop.is_set():
                ready.put((next(items), None))
        except BaseException as error:  # handed over and raised there, StopIteration (the end) included
            ready.put((None, error))

    thread = Thread(target=work, name="soundshard-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            free.release()
            yield item  # pyright: ignore[reportReturnType] - an item comes with no error
    finally:
        stop.set()
        free.release()
        thread.join()
