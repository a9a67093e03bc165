"""An endless stream of samples for a trainer: its order, position, ranks, prefetching, worker processes and saved state, whatever a sample is.

That is all under plain PyTorch: no DataLoader, no sampler, no `set_epoch`. A stream is endless; with `run_on=False` each `for` ends with its epoch.
`DataLoader(stream, batch_size=None)` works and adds nothing. A DataLoader with worker processes is refused, for the position would be counted in the
workers, ahead of training: `SampleConfig.workers` has such processes with an exact position.

The order is one endless list of samples, numbered g = 0, 1, 2, ..., each sample once in every epoch (`shards.order`). A batch that straddles an
epoch's end holds the last samples of one epoch and the first of the next. Several datasets are mixed by weight, each with an epoch of its own.

A global batch of B is the next B numbers; rank r of W takes every W-th of them from the r-th, which are whole lanes. So global batches are equal on
any W that divides L and B, and the state is one integer, the samples consumed, besides what identifies the order: the seed, the lanes, the datasets'
fingerprints and contents (not where they lie). Worker w of n of a rank makes each n-th of its batches.

Knows numbers, datasets and processes. Knows no trainer and no model, and what a sample is only its heirs do: windows of features and codes
(`shards.stream`), pairs of pictures' and sound's segments (`shards.pairs`), clips that are decoded (`shards.clips`).
"""

import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count, islice
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from configs import storage
from shards.blocks import FetchConfig
from shards.dataset import DatasetMismatch, differences
from shards.order import DRAW, LIST, Mixture, Order, check_lanes, counter_hash
from shards.read import Index
from shards.source import Source

BLOCKS_PER_LANE = 8
"""A small dataset is cut into smaller blocks than configured, so that a lane still has this many to shuffle."""
MOST_PLANNED = 2**18
"""Samples that are told ahead to what reads object storage: a block of a dataset that hardly comes into a mixture may be fetched more than once."""
MOST_REPLACED = 100
"""So many clips one after the other of which nothing can be made are an error."""
KEYS_TOLD = 20
"""How many of the clips that are left out are named."""
log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class SampleConfig(FetchConfig):
    """Which samples make a batch, and how they are read."""

    batch_size: int = 64
    """Samples in a global batch, over all ranks."""
    weights: list[float] | None = None
    """Of several datasets: what share of the samples comes from each, in any unit. Default: in proportion to their clips."""
    seed: int = 0
    """Decides the order of samples, and what is drawn for each."""
    lanes: int | None = None
    """Parallel sequences that the order is dealt to; a multiple of the number of ranks. Default: the largest up to 64 that divides batch_size."""
    block_bytes: int = 8 << 20
    """Length of a block, the unit of reading and shuffling, in bytes. Small datasets use smaller ones."""
    open_blocks: int = 4
    """Blocks that a lane draws from at a time. More shuffle better and, where reading means copying, take lanes x blocks x bytes of memory."""
    run_on: bool = True
    """Batches run on across an epoch's end, so that no sample is left out. false: iterating ends with the epoch, whose last samples, fewer than a
    batch, are left out; iterating again goes on with the next epoch."""
    prefetch: int = 2
    """Batches prepared ahead by one background thread (by each worker process, where there are); 0 for none."""
    workers: int = 0
    """Processes that make batches in place of the thread. For datasets in object storage they are started anew, and import your script: what it does
    must then be under `if __name__ == "__main__"`."""
    pin_memory: bool = False
    """Assemble batches in page-locked memory, for faster copies to a GPU. Ignored where there is none."""

    def __post_init__(self) -> None:
        at_least(self, {"batch_size": 1, "block_bytes": 1, "open_blocks": 1, "prefetch": 0, "workers": 0})


def at_least(config: object, least: Mapping[str, int]) -> None:
    """ValueError for those of a configuration's fields that are below the least that can be meant."""
    wrong = [f"{name}={getattr(config, name)}: expected at least {value}" for name, value in least.items() if getattr(config, name) < value]
    if wrong:
        raise ValueError("; ".join(wrong))


@dataclass(frozen=True)
class Picked:
    """The samples of a batch that one dataset gives, by number."""

    slots: np.ndarray
    """Their places in the batch."""
    rows: np.ndarray
    """Of the dataset's index."""
    epochs: np.ndarray
    """In evaluation 0."""
    takes: np.ndarray
    """Which of the samples that a clip gives in an epoch, or in an evaluation."""
    turns: np.ndarray
    """How often the clip was taken before."""


@dataclass(frozen=True)
class Cut:
    """The same, once it is decided what is cut from each row."""

    slots: np.ndarray
    rows: np.ndarray


SourceT = TypeVar("SourceT", bound=Source)
CutT = TypeVar("CutT", bound=Cut)
BatchT = TypeVar("BatchT")


class SampleStream(IterableDataset, ABC, Generic[SourceT, CutT, BatchT]):
    """Iterates over batches of one or several datasets: endless and shuffled for training; one complete pass, in order, for evaluation.

    Training (`shuffle=True`): what is drawn for a sample is drawn per (seed, epoch, sample). Iterating goes on from `consumed`, which counts the
    samples of all ranks in the batches handed out so far, not those prefetched; call `load_state_dict` before `iter`.
    Evaluation (`shuffle=False`): every sample once, nothing padded or dropped: the last batch is short, and with several ranks some may have one
    batch fewer. Several datasets come one after the other.
    """

    def __init__(self, data: Index | Sequence[Index], config: SampleConfig, rank: int, world: int, *, shuffle: bool, takes: int) -> None:
        """`takes` is how many samples a clip gives in an epoch, or in an evaluation."""
        assert 0 <= rank < world
        self.refused: dict[str, str] = {}
        """Clips of which nothing could be made when it was their turn, with the reason. In training another took their place, see `_stand_in`."""
        self._indexes = [data] if isinstance(data, Index) else list(data)
        self._config, self._rank, self._world, self._shuffle, self._takes = config, rank, world, shuffle, takes
        check_alike(self._indexes)
        if config.weights is not None and len(config.weights) != len(self._indexes):
            raise ValueError(f"{len(config.weights)} weights for {len(self._indexes)} datasets; give one for each")
        # Datasets of a mixture draw each for itself; the first as it would alone.
        self._seeds = [config.seed, *counter_hash(config.seed, LIST, 0, np.arange(1, len(self._indexes))).tolist()]
        self._sources = [self._open(index, seed) for index, seed in zip(self._indexes, self._seeds, strict=True)]
        self._remote = any(storage.is_remote(index.root) for index in self._indexes)
        self._local = config.batch_size // world
        self._set_lanes(check_lanes(config.batch_size, config.lanes if shuffle else world, world))
        if shuffle and not config.run_on and self.samples < config.batch_size:
            raise ValueError(f"an epoch has {self.samples} samples, fewer than batch_size={config.batch_size}; take a smaller one, or run_on=true")
        self.consumed = 0
        """Samples of the endless order handed out so far, over all ranks: the whole state."""

    # --- what a sample is ---

    @abstractmethod
    def _open(self, index: Index, seed: int) -> SourceT:
        """What a dataset offers. `seed` is what its samples are drawn with."""

    @abstractmethod
    def _cut(self, dataset: int, picked: Picked) -> CutT:
        """What is cut for these samples of a dataset."""

    @abstractmethod
    def _names(self) -> dict[str, int]:
        """What of the configuration decides the samples, beside what decides any stream's order."""

    @abstractmethod
    def _made(self) -> Generator[tuple[int, BatchT], None, None]:
        """The batches from `consumed` on, made ahead, each with the position after it."""

    # --- its position ---

    @property
    def samples(self) -> int:
        """Samples in an epoch of all datasets, over all ranks."""
        return sum(self._lengths)

    @property
    def skipped(self) -> int:
        """Good clips left out because nothing can be made of them: they are too short, or a list does not name them."""
        return sum(map(len, self._indexes)) - sum(len(source.rows) for source in self._sources) + len(self.refused)

    @property
    def skipped_keys(self) -> list[str]:
        """The keys of some of them."""
        left_out = ((index, np.setdiff1d(np.arange(len(index)), source.rows)) for index, source in zip(self._indexes, self._sources, strict=True))
        known = [key for index, rows in left_out for key in index.keys.take(pa.array(rows[:KEYS_TOLD])).to_pylist()]
        return [*known, *self.refused][:KEYS_TOLD]

    @property
    def lanes(self) -> int:
        return self._lanes

    @property
    def epoch(self) -> int:
        """Epochs completed; of a mixture: how many times as many samples as there are were handed out."""
        return self.consumed // self.samples

    @property
    def epochs(self) -> list[float]:
        """Epochs of each dataset so far, parts included."""
        return [count / length for count, length in zip(self._mixture.counts(self.consumed), self._lengths, strict=True)]

    @property
    def steps_per_epoch(self) -> int:
        """Batches in this rank's evaluation pass; for training, where epochs need not end with a batch, the whole batches in one (at least 1)."""
        if self._shuffle:
            return max(1, self.samples // self._config.batch_size)
        return math.ceil(len(range(self._rank, self.samples, self._world)) / self._local)

    def __iter__(self) -> Generator[BatchT, None, None]:
        if get_worker_info() is not None:
            raise ValueError(
                "a DataLoader's worker processes would count the position ahead of training and lose it; iterate over the stream itself "
                "(its configuration's `workers` gives it such processes), or give the DataLoader num_workers=0"
            )
        with closing(self._made()) as batches:
            try:
                for consumed, batch in batches:
                    self.consumed = consumed
                    yield batch
            finally:
                self._forget()  # first, so that the thread need not wait for storage that does not answer

    def state_dict(self) -> dict[str, int | str]:
        """Where the stream is, and what that position refers to. The batch size and the number of ranks are no part of it."""
        return {"consumed": self.consumed, **self._identity()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Goes to a saved position. DatasetMismatch, naming what differs, if the order there was another one."""
        adopted = {"lanes": int(state["lanes"])} if self._config.lanes is None else {}
        here = self._identity() | adopted
        differing = [f"{name}: {state.get(name)} there, {value} here" for name, value in here.items() if state.get(name) != value]
        differing += [f"{name}: {value} there" for name, value in state.items() if name not in here and name != "consumed"]
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

    def _plan(self, first: int = 0, every: int = 1) -> Iterator[tuple[int, list[CutT]]]:
        """From `consumed` on: what is to be cut for every so many of this rank's batches, from the first-th, and the position after each."""
        chosen = islice(self._training() if self._shuffle else self._evaluation(), first, None, every)
        picked = ((after, self._drawn(numbers) if self._shuffle else self._in_order(numbers)) for after, numbers in chosen)
        plan = ((after, [self._cut(dataset, share) for dataset, share in enumerate(shares)]) for after, shares in picked)
        return self._told_ahead(plan) if self._remote else plan

    def _told_ahead(self, plan: Iterator[tuple[int, list[CutT]]]) -> Iterator[tuple[int, list[CutT]]]:
        """The plan itself. What follows its first batch is told to the sources, as far ahead as lanes keep a block open."""
        most = math.ceil(self._reach / self._config.batch_size)
        coming: deque[tuple[int, list[CutT]]] = deque()
        for source in self._sources:
            source.begin()
        try:
            for number, item in enumerate(plan):
                if number:
                    for source, cut in zip(self._sources, item[1], strict=True):
                        source.ahead(cut.rows)
                coming.append(item)
                if number == 0 or len(coming) > most:
                    yield coming.popleft()
            yield from coming
        finally:
            self._forget()

    def _forget(self) -> None:
        for source in self._sources:
            source.forget()

    def _identity(self) -> dict[str, int | str]:
        """All that decides the order and the samples."""
        config = self._config
        names = {**self._names(), "seed": config.seed, "block_bytes": config.block_bytes, "open_blocks": config.open_blocks}
        several, datasets = len(self._indexes) > 1, {}
        for number, (index, length, share) in enumerate(zip(self._indexes, self._lengths, self._mixture.shares, strict=True)):
            what = {"fingerprint": index.info.fingerprint, "content": index.content, "samples": length, **({"share": share} if several else {})}
            datasets |= {f"data[{number}].{name}" if several else name: value for name, value in what.items()}
        return {**names, "lanes": self._lanes, **datasets}

    def _set_lanes(self, lanes: int) -> None:
        config, self._lanes, self._orders, lengths = self._config, lanes, [], []
        for source, seed in zip(self._sources, self._seeds, strict=True):
            blocks = np.repeat(source.blocks(min(config.block_bytes, source.bytes // (BLOCKS_PER_LANE * lanes))), self._takes)
            lengths.append(len(blocks) / (blocks[-1] + 1))
            self._orders.append(Order(blocks, lanes=lanes, open_blocks=config.open_blocks, seed=seed))
        self._lengths = [len(order) for order in self._orders]
        self._mixture = Mixture(config.weights or [float(length) for length in self._lengths], lanes=lanes)
        shares = np.array(self._mixture.shares) / sum(self._mixture.shares)
        # How many numbers pass from a block's first use to its last.
        self._reach = min(MOST_PLANNED, int(max(lengths / shares) * lanes * (config.open_blocks + 1)))

    def _training(self) -> Iterator[tuple[int, np.ndarray]]:
        """This rank's numbers of each batch, and the position after the batch."""
        size = self._config.batch_size
        for first, after in spans(self.consumed, size, None if self._config.run_on else self.samples):
            yield after, np.arange(first + self._rank, first + size, self._world)

    def _evaluation(self) -> Iterator[tuple[int, np.ndarray]]:
        mine = np.arange(self._rank, self.samples, self._world)
        for first in range(0, len(mine), self._local):
            yield 0, mine[first : first + self._local]

    def _drawn(self, numbers: np.ndarray) -> list[Picked]:
        """The samples at these numbers of the endless order."""
        picked = []
        datasets, places = self._mixture.places(numbers)
        for dataset, order in enumerate(self._orders):
            slots = np.flatnonzero(datasets == dataset)
            picked.append(self._pick(dataset, slots, order.items(places[slots]), places[slots] // len(order)))
        return picked

    def _in_order(self, numbers: np.ndarray) -> list[Picked]:
        """The samples at these numbers of the datasets' samples one after the other."""
        ends, picked = np.cumsum(self._lengths), []
        for dataset, length in enumerate(self._lengths):
            slots = np.flatnonzero(np.searchsorted(ends, numbers, side="right") == dataset)
            picked.append(self._pick(dataset, slots, numbers[slots] - ends[dataset] + length, np.zeros_like(slots)))
        return picked

    def _pick(self, dataset: int, slots: np.ndarray, items: np.ndarray, epochs: np.ndarray) -> Picked:
        takes = items % self._takes
        return Picked(slots, self._sources[dataset].rows[items // self._takes], epochs, takes, epochs * self._takes + takes)

    def _stand_in(self, dataset: int, row: int) -> int:
        """The row that takes the place of one of which nothing can be made: the next one, so that it depends on nothing but the dataset."""
        rows = self._sources[dataset].rows
        return int(rows[(np.searchsorted(rows, row) + 1) % len(rows)])

    def _refuse(self, key: str, reason: str) -> None:
        """Nothing can be made of this clip. Told, and counted."""
        if key not in self.refused and len(self.refused) <= KEYS_TOLD:
            log.warning("%s is left out: %s", key, reason) if len(self.refused) < KEYS_TOLD else log.warning("further ones are not told")
        self.refused[key] = reason


class CutStream(SampleStream[SourceT, CutT, BatchT]):
    """A stream whose batches are cut from stored arrays, by one thread or by processes that have each their own."""

    @abstractmethod
    def _batch(self, cuts: list[CutT]) -> BatchT:
        """The batch itself; a cut for each dataset."""

    @abstractmethod
    def _anew(self) -> "Callable[[], CutStream]":
        """Opens this stream again in another process, which makes no processes of its own."""

    def batches(self, first: int = 0, every: int = 1) -> Iterator[tuple[int, BatchT]]:
        """From `consumed` on: every so many of this rank's batches, from the first-th, each with the position after it."""
        for after, cuts in self._plan(first, every):
            yield after, self._batch(cuts)

    def _made(self) -> Generator[tuple[int, BatchT], None, None]:
        if self._config.workers:
            return in_processes(WorkerBatches(self), self._config, remote=self._remote)
        return prefetched(self.batches(), self._config.prefetch)


def clip_bits(seed: int, keys: Sequence[str], turns: np.ndarray) -> list[int]:
    """64 random bits for each of these clips, when it is taken for the turns-th time: the same wherever in a dataset a clip is."""
    numbers = np.array([int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little") for key in keys], np.uint64)
    return counter_hash(seed, DRAW, turns, numbers).tolist()


def stand_in_bits(seed: int, key: str, missing: str, turn: int) -> int:
    """The same for a clip that takes the place of one of which nothing can be made: others than its own."""
    return clip_bits(seed, [f"{key} for {missing}"], np.array([turn]))[0]


def check_repeats(repeats: int, *, shuffle: bool) -> None:
    """ValueError for how often an evaluation takes every clip, if that cannot be meant."""
    if repeats < 1 or (shuffle and repeats > 1):
        raise ValueError(
            f"repeats={repeats}{' in training' if shuffle else ''}: expected 1, or more in an evaluation, which takes every clip so often"
        )


def check_alike(indexes: Sequence[Index]) -> None:
    """DatasetMismatch, naming what differs, unless the datasets can be mixed: they must be made alike, whatever they are made of."""
    if not indexes:
        raise ValueError("no dataset to read; give one or more")
    for other in indexes[1:]:
        differing = differences(indexes[0].info, other.info)
        if differing:
            raise DatasetMismatch(
                f"{indexes[0].root} and {other.root} cannot be mixed: they were made otherwise; make one like the other, or take one of them:\n"
                + "\n".join(f"  {name}: {first!r} in the one, {second!r} in the other" for name, first, second in differing)
            )


def spans(first: int, size: int, epoch: int | None) -> Iterator[tuple[int, int]]:
    """Where each batch from number `first` on begins, and where the next one does: endlessly, or to the end of an epoch of this length."""
    if epoch is None:
        yield from ((number, number + size) for number in count(first, size))
        return
    end = (first // epoch + 1) * epoch
    if end - first < size:  # what a smaller batch left over
        first, end = end, end + epoch
    while first < end:
        after = first + size if end - first >= 2 * size else end
        yield first, after
        first = after


class WorkerBatches(IterableDataset):
    """What a worker process iterates over: its share of a rank's batches, from a stream that it opens for itself."""

    def __init__(self, stream: CutStream) -> None:
        self._open, self._consumed = stream._anew(), stream.consumed

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        worker = get_worker_info()
        assert worker is not None
        stream = self._open()
        stream.consumed = self._consumed
        return stream.batches(worker.id, worker.num_workers)


def in_processes(made: WorkerBatches, config: SampleConfig, *, remote: bool) -> Generator[tuple[int, Any], None, None]:
    """A stream's batches, made by processes, in order. Object storage is not read in forked ones: its client does not survive a fork."""
    loader = DataLoader(
        made,
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=max(1, config.prefetch),
        collate_fn=as_it_is,
        pin_memory=config.pin_memory and torch.cuda.is_available(),
        multiprocessing_context="spawn" if remote else "fork",
    )
    batches = iter(loader)
    try:
        yield from batches
    finally:
        # An error's traceback would keep the iterator, and the collector might end its queues before it: then each worker is waited for in vain.
        batches._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue] - of the iterator for several processes


def as_it_is(made: T) -> T:
    """A batch is one already."""
    return made


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
