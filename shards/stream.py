"""Batches of feature and codec windows for a trainer, in an order that depends on the seed and the dataset alone, resumable to the sample.

The order is one endless list of samples, numbered g = 0, 1, 2, ... Epoch e is the numbers [e * N, (e + 1) * N): each sample exactly once in it.
Number g belongs to lane g mod L, whatever the batch size and the number of ranks. In every epoch the blocks (contiguous runs of samples in a shard)
are permuted and dealt to the lanes one after the other, in shares that differ by one sample at most (so L - 1 cuts may go through a block), and each
lane shuffles its samples among the few blocks it has open. Because the shares follow from g, lanes need no padding and run on across epochs in step:
a batch that straddles an epoch's end holds the last samples of one epoch and the first of the next.

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
from typing import TypedDict, TypeVar

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float16, Int64
from torch import Tensor

from configs.clock import SEGMENT_FRAMES, SEGMENT_SECONDS, SEGMENT_TOKENS, CodecClock, check_hop, window_starts
from shards.dataset import DatasetMismatch
from shards.read import ArrayMembers, Index

MAX_LANES = 64
BLOCKS_PER_LANE = 8
"""A small dataset is cut into smaller blocks than configured, so that a lane still has this many to shuffle."""
BLOCKS, SHUFFLE, START, VIEW = range(4)
"""What a draw is for: keys of the counter-based generator."""
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


class Batch(TypedDict):
    """One rank's share of a global batch."""

    features: Float16[Tensor, "b segments 8 width"]
    codes: Int64[Tensor, "b codebooks steps"]
    keys: list[str]


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
        self._windows = _Windows(index, config)
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


class Order:
    """The endless order of samples (see the module's docstring), by position: any part of it can be had without what comes before."""

    def __init__(self, blocks: np.ndarray, *, lanes: int, open_blocks: int, seed: int) -> None:
        """`blocks` is the block of every sample, ascending from 0."""
        self._blocks, self._lanes, self._open_blocks, self._seed = blocks, lanes, open_blocks, seed
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def items(self, positions: np.ndarray) -> np.ndarray:
        """The samples at these positions."""
        samples, found = len(self._blocks), np.empty_like(positions)
        epochs = positions // samples
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            if epoch not in self._epochs:
                self._epochs = dict(list(self._epochs.items())[-1:]) | {epoch: self._epoch(epoch)}
            order, begins = self._epochs[epoch]
            lane, within = positions[here] % self._lanes, positions[here] - epoch * samples
            found[here] = order[begins[lane] + within // self._lanes]
        return found

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's samples, lane after lane, and where each lane begins."""
        samples, blocks = len(self._blocks), self._blocks
        # The lane of the epoch's first position, and so of every one, follows from all samples before it.
        ahead = (np.arange(self._lanes) - epoch * samples) % self._lanes
        lengths = (samples - ahead + self._lanes - 1) // self._lanes
        place = np.empty(blocks[-1] + 1, np.int64)
        place[np.argsort(counter_hash(self._seed, BLOCKS, epoch, np.arange(len(place))), kind="stable")] = np.arange(len(place))
        dealt = np.argsort(place[blocks], kind="stable")
        # A sample of a lane's k-th block is used at a time drawn from [k, k + open_blocks): at any time so many blocks are open.
        jitter = (counter_hash(self._seed, SHUFFLE, epoch, dealt) >> np.uint64(11)) * 2.0**-53
        time = place[blocks[dealt]] + self._open_blocks * jitter
        lane = np.repeat(np.arange(self._lanes), lengths)
        return dealt[np.lexsort((time, lane))], np.cumsum(lengths) - lengths


class _Windows:
    """The windows that a feature dataset offers, and how they are cut from the mapped shards."""

    def __init__(self, index: Index, config: StreamConfig) -> None:
        if index.info.kind != "features":
            raise DatasetMismatch(
                f"{index.root} is a {index.info.kind} dataset; training reads a features dataset, which `soundshard featurise` makes of it"
            )
        spec, self._index, self._segments, self._pin = index.info.spec, index, config.segments, config.pin_memory and torch.cuda.is_available()
        codec: dict = spec.get("codec") or {"name": "(no codec)"}
        features, codes = index.members.get("avclip.npy"), index.members.get(f"{codec['name']}.npy")
        if not isinstance(features, ArrayMembers) or not isinstance(codes, ArrayMembers):
            raise ValueError(
                f"{index.root} offers no windows: a sample needs avclip.npy and {codec['name']}.npy; it has {index.ok} good samples with "
                f"{', '.join(index.members) or 'no members'}"
            )
        self._features, self._codes = features, codes
        clock, hop = CodecClock(codec["sample_rate_hz"], codec["hop_samples"]), check_hop(spec["hop_frames"])
        self._stride, self._steps = SEGMENT_FRAMES // hop, clock.steps_in(config.segments)
        stored, steps = features.shape[:, 1], codes.shape[:, 1]
        by_count = np.array([window_starts(count, config.segments, hop) for count in range(stored.max() + 1)])
        self._first_step = np.array([clock.window_steps(start * hop, config.segments).start for start in range(by_count.max())], np.int64)
        # A codec may give a step fewer than the pictures need: then the last starts are not offered.
        self.starts = np.minimum(by_count[stored], np.searchsorted(self._first_step + self._steps, steps, side="right"))
        """How many hop indices may begin a window, by row of the index."""
        self.views = features.shape[:, 0]
        self.rows = np.flatnonzero(self.starts)
        if not len(self.rows):
            raise ValueError(
                f"{index.root} has {index.ok} good clips in {sorted(set(index.table['split'].to_pylist()))} and none is as long as a window of "
                f"{config.segments} segments ({float(config.segments * SEGMENT_SECONDS):g} s); take fewer segments or another split"
            )
        self.bytes = int((features.size + codes.size)[self.rows].sum())
        shapes = np.unique(np.column_stack([features.shape[self.rows, 2:], codes.shape[self.rows, :1]]), axis=0)
        if len(shapes) > 1 or shapes[0, 0] != SEGMENT_TOKENS or shapes[0, -1] != codec["codebooks"] or features.dtype != np.float16:
            raise ValueError(
                f"{index.root}: features must be float16 [views, segments, {SEGMENT_TOKENS}, width] of one width, with {codec['codebooks']} "
                f"codebooks as dataset.json says; found {features.dtype} with [tokens, width, codebooks] {shapes.tolist()}"
            )
        self._width, self._codebooks = int(shapes[0, 1]), int(shapes[0, 2])

    def blocks(self, block_bytes: int) -> np.ndarray:
        """The block of every row in `rows`, counted from 0: runs of a shard of this many bytes."""
        shard, block = self._index.shard_of[self.rows], self._features.offset[self.rows] // max(1, block_bytes)
        changes = (np.diff(shard) != 0) | (np.diff(block) != 0)
        return np.concatenate([[0], np.cumsum(changes)])

    def batch(self, rows: np.ndarray, starts: np.ndarray, views: np.ndarray) -> Batch:
        """The windows of these rows at these hop indices, cut before they are copied: a window is a quarter of a 10 s clip's bytes."""
        features = torch.empty((len(rows), self._segments, SEGMENT_TOKENS, self._width), dtype=torch.float16, pin_memory=self._pin)
        codes = torch.empty((len(rows), self._codebooks, self._steps), dtype=torch.int64, pin_memory=self._pin)
        features_out, codes_out = features.numpy(), codes.numpy()
        feature_type, code_type = self._features.dtype, self._codes.dtype
        token = self._width * feature_type.itemsize
        segment = SEGMENT_TOKENS * token
        feature_at = self._features.data_offset[rows] + (views * self._features.shape[rows, 1] + starts) * segment
        feature_strides = (self._stride * segment, token, feature_type.itemsize)
        code_at = self._codes.data_offset[rows] + self._first_step[starts] * code_type.itemsize
        code_rows = self._codes.shape[rows, 1] * code_type.itemsize
        shards = self._index.shard_of[rows].tolist()
        for number, (shard, at, steps_at, code_row) in enumerate(zip(shards, feature_at.tolist(), code_at.tolist(), code_rows.tolist(), strict=True)):
            mapped = self._index.mapped(shard)
            features_out[number] = np.ndarray(features_out.shape[1:], feature_type, mapped, at, feature_strides)
            codes_out[number] = np.ndarray(codes_out.shape[1:], code_type, mapped, steps_at, (code_row, code_type.itemsize))
        return {"features": features, "codes": codes, "keys": self._index.keys.take(pa.array(rows)).to_pylist()}


def check_lanes(batch_size: int, lanes: int | None, world: int) -> int:
    """The number of lanes, chosen if None, once it is certain that `world` ranks can share them and the batch. ValueError with the nearest."""
    if batch_size % world:
        below = batch_size // world * world
        raise ValueError(
            f"batch_size is {batch_size}, which {world} ranks cannot share; the nearest that they can: {below or world}, {below + world}"
        )
    chosen = lanes or max(number for number in range(1, min(MAX_LANES, batch_size) + 1) if batch_size % number == 0)
    if chosen % world:
        fitting = [number for number in range(world, batch_size + 1, world) if batch_size % number == 0]
        nearest = sorted(sorted(fitting, key=lambda number: abs(number - chosen))[:2])
        raise ValueError(
            f"{chosen} lanes{'' if lanes else f' (chosen for batch_size {batch_size})'} cannot be shared by {world} ranks; set lanes to "
            f"{' or '.join(map(str, nearest))}, which also divide the batch (the order of samples depends on the lanes: keep them for the whole run)"
        )
    return chosen


def counter_hash(seed: int, purpose: int, epochs: int | np.ndarray, items: np.ndarray) -> np.ndarray:
    """64 random bits for each (seed, purpose, epoch, item), with no state: SplitMix64's output function per key (Steele et al. 2014)."""
    bits = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for word in (np.array(seed % 2**64, np.uint64), np.array(purpose), np.asarray(epochs), items):
            bits = (bits ^ word.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            bits = bits ^ (bits >> np.uint64(31))
    return bits


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
