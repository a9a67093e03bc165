"""Clips of media datasets, prepared by a function that the caller gives: decoded, cut, augmented; in processes, in an exact order.

    stream = ClipStream(index, ClipConfig(batch_size=8, workers=4), rank, world, prepare=prepare)
    for batch in stream:      # what prepare gives, stacked; and the clips' keys

`prepare` gets a clip's bytes and a seed of its own for every sample, which depends on the stream's seed, the clip's key and how often the clip was
taken before, and on nothing else. The order, and all that streams have in common, is `shards.samples`.

Bytes are read by the process that trains, once whatever the number of others. Those only prepare: a clip each at a time, so that what is in memory
follows from the batches that are ahead. What they make comes back through shared memory (`/dev/shm`).

Knows bytes and tensors. Knows no codec and no model: what is in a clip `prepare` knows.
"""

import math
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from shards.dataset import DatasetMismatch
from shards.read import Index
from shards.samples import (
    MOST_REPLACED,
    Cut,
    Picked,
    SampleConfig,
    SampleStream,
    at_least,
    check_repeats,
    clip_bits,
    prefetched,
    stand_in_bits,
)
from shards.source import Source

MEDIA = "mp4"


class SkipClip(Exception):  # noqa: N818 - a word about a clip, not about the program
    """Raised by `prepare` where nothing can be made of a clip, which is no error: it is too short, say. Its message is the reason."""


Prepare = Callable[[bytes, str, int], dict[str, Tensor]]
"""(bytes of the mp4, key, seed of 63 bits) -> tensors, of the same names and shapes for every clip. Can be pickled."""
ClipBatch = dict[str, Any]
"""One rank's share of a global batch: tensors [b, ...] by name, and `keys`, a list of b."""


@dataclass(frozen=True)
class ClipConfig(SampleConfig):
    """Which clips make a batch, and how they are read and prepared."""

    least_seconds: float = 0.0
    """Clips that the dataset says are shorter are left out."""
    workers: int = 0
    """Processes that prepare clips; 0: one background thread."""
    prefetch: int = 2
    """Batches prepared ahead, by the thread or the processes; by those at least so many that each has a clip at hand and one to go on with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, {"least_seconds": 0})


@dataclass(frozen=True)
class Refused:
    """`prepare` could make nothing of a clip."""

    reason: str


Prepared = Callable[[], "dict[str, Tensor] | Refused"]
"""Waits for a clip that is being prepared."""
Submit = Callable[[bytes, str, int], Prepared]


@dataclass(frozen=True)
class ClipCut(Cut):
    """The clips of a batch that one dataset gives."""

    turns: np.ndarray


@dataclass(frozen=True)
class Asked:
    """A clip that is being prepared."""

    dataset: int
    row: int
    key: str
    turn: int
    prepared: Prepared


class Clips(Source):
    """The clips of a media dataset that are long enough."""

    def __init__(self, index: Index, config: ClipConfig) -> None:
        if index.info.kind != "media":
            raise DatasetMismatch(f"{index.root} is a {index.info.kind} dataset; clips are prepared from a media dataset: `soundshard reencode`")
        media = index.members.get(MEDIA)
        if media is None:
            raise ValueError(f"{index.root} offers no clips: it has {index.ok} good samples, with {', '.join(index.members) or 'no members'}")
        self.media = media
        seconds = index.table.filter(pc.field("status") == "ok")["duration_seconds"].to_numpy()
        rows = np.flatnonzero((media.offset >= 0) & ~(seconds < config.least_seconds))  # what does not say how long it is stays
        if not len(rows):
            longest = np.nanmax(seconds, initial=0.0)
            raise ValueError(f"{index.root} has no clip of {config.least_seconds:g} s; the longest of {index.ok} has {longest:g} s")
        super().__init__(index, rows, [media], config)

    def payloads(self, rows: np.ndarray) -> list[bytes]:
        """The clips' bytes, copied."""
        with self.reading(rows) as (buffers, begins):
            starts = (self.media.offset[rows] - begins).tolist()
            return [
                buffer[start : start + size].tobytes() for buffer, start, size in zip(buffers, starts, self.media.size[rows].tolist(), strict=True)
            ]


class ClipStream(SampleStream[Clips, ClipCut, ClipBatch]):
    """Prepared clips of media datasets: see `shards.samples.SampleStream`.

    A clip that `prepare` refuses with `SkipClip` is replaced by the next one in training, and left out in evaluation, whose batches may then be
    shorter or fewer; `refused` has its reason. Any other exception of `prepare` ends the stream, and names the clip.
    Evaluation takes every clip `repeats` times.
    """

    _config: ClipConfig

    def __init__(
        self,
        data: Index | Sequence[Index],
        config: ClipConfig,
        rank: int = 0,
        world: int = 1,
        *,
        prepare: Prepare,
        shuffle: bool = True,
        repeats: int = 1,
    ) -> None:
        check_repeats(repeats, shuffle=shuffle)
        self._prepare = prepare
        super().__init__(data, config, rank, world, shuffle=shuffle, takes=repeats)

    def _open(self, index: Index, seed: int) -> Clips:  # noqa: ARG002 - clips need none
        return Clips(index, self._config)

    def _names(self) -> dict[str, int]:
        return {}  # which clips are long enough their number tells

    def _cut(self, dataset: int, picked: Picked) -> ClipCut:  # noqa: ARG002 - a clip is whole
        return ClipCut(picked.slots, picked.rows, picked.turns)

    # --- ahead ---

    def _made(self) -> Generator[tuple[int, ClipBatch], None, None]:
        if self._config.workers:
            return self._by_processes()
        return prefetched(self._batches(lambda mp4, key, seed: partial(prepared, self._prepare, mp4, key, seed), 0), self._config.prefetch)

    def _by_processes(self) -> Generator[tuple[int, ClipBatch], None, None]:
        workers = self._config.workers
        pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=_begin, initargs=(self._prepare,))
        pool.submit(int).result()  # all processes begin here, before a thread reads anything
        ahead, asked = max(self._config.prefetch, math.ceil(2 * workers / self._local)), []

        def submit(mp4: bytes, key: str, seed: int) -> Prepared:
            asked[:] = [future for future in asked if not future.done()]
            asked.append(pool.submit(_prepared_here, mp4, key, seed))
            return asked[-1].result

        made = prefetched(self._batches(submit, ahead), 1)
        try:
            yield from made
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            # The pool's own thread cancels only if it gets to it before the pool is collected.
            for future in tuple(asked):
                future.cancel()
            made.close()

    def _batches(self, submit: Submit, ahead: int) -> Iterator[tuple[int, ClipBatch]]:
        """The batches, in order, while so many more are being prepared."""
        coming: deque[tuple[int, list[Asked]]] = deque()
        for after, cuts in self._plan():
            coming.append((after, self._ask(cuts, submit)))
            if len(coming) > ahead:
                yield from self._finished(*coming.popleft(), submit)
        for after, asked in coming:
            yield from self._finished(after, asked, submit)

    # --- a batch ---

    def _ask(self, cuts: list[ClipCut], submit: Submit) -> list[Asked]:
        """Has a batch's clips prepared; in their order."""
        asked: dict[int, Asked] = {}
        for dataset, (cut, clips) in enumerate(zip(cuts, self._sources, strict=True)):
            keys = clips.index.keys.take(pa.array(cut.rows)).to_pylist()
            seeds = clip_bits(self._seeds[dataset], keys, cut.turns)
            each = zip(cut.slots.tolist(), cut.rows.tolist(), keys, cut.turns.tolist(), seeds, clips.payloads(cut.rows), strict=True)
            for slot, row, key, turn, bits, mp4 in each:
                asked[slot] = Asked(dataset, row, key, turn, submit(mp4, key, bits >> 1))
        return [asked[slot] for slot in sorted(asked)]

    def _finished(self, after: int, asked: list[Asked], submit: Submit) -> Iterator[tuple[int, ClipBatch]]:
        """The batch, unless in an evaluation all its clips were refused."""
        found = [one for one in (self._wait(each, submit) for each in asked) if one is not None]
        if found:
            yield after, stacked(found, pin_memory=self._config.pin_memory and torch.cuda.is_available())

    def _wait(self, asked: Asked, submit: Submit) -> tuple[str, dict[str, Tensor]] | None:
        """A clip and its key, or those of the one that takes its place; None where none does."""
        made = self._answer(asked.dataset, asked.key, asked.prepared)
        if not isinstance(made, Refused):
            return asked.key, made
        self._refuse(asked.key, made.reason)
        if not self._shuffle:
            return None
        clips, row = self._sources[asked.dataset], asked.row
        for _ in range(MOST_REPLACED):
            row = self._stand_in(asked.dataset, row)
            key = clips.index.keys[row].as_py()
            seed = stand_in_bits(self._seeds[asked.dataset], key, asked.key, asked.turn) >> 1
            made = self._answer(asked.dataset, key, submit(clips.payloads(np.array([row]))[0], key, seed))
            if not isinstance(made, Refused):
                return key, made
            self._refuse(key, made.reason)
        raise ValueError(
            f"{clips.index.root}: nothing can be made of clip {asked.key}, nor of the {MOST_REPLACED} after it; the last one's reason: {made.reason}"
        )

    def _answer(self, dataset: int, key: str, wait: Prepared) -> dict[str, Tensor] | Refused:
        try:
            return wait()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a process that prepares clips ended abruptly, at {key} or a clip near it: killed for its memory, out of shared memory (/dev/shm; "
                "a container's --shm-size), or a decoder crashed; fewer workers or a smaller prefetch need less"
            ) from error
        except Exception as error:
            where = self._indexes[dataset].root
            raise ValueError(f"{where}: clip {key} could not be prepared: {type(error).__name__}: {error}") from error


def stacked(samples: Sequence[tuple[str, dict[str, Tensor]]], *, pin_memory: bool = False) -> ClipBatch:
    """One tensor for each name, and the keys. ValueError where clips differ in what they have."""
    first_key, first = samples[0]
    shapes = {name: (list(value.shape), value.dtype) for name, value in first.items()}
    for key, sample in samples[1:]:
        here = {name: (list(value.shape), value.dtype) for name, value in sample.items()}
        if here != shapes:
            raise ValueError(f"clips of a batch must be prepared alike; {first_key} is {shapes}, and {key} is {here}")
    batch: ClipBatch = {"keys": [key for key, _ in samples]}
    for name, (shape, dtype) in shapes.items():
        out = torch.empty((len(samples), *shape), dtype=dtype, pin_memory=pin_memory)
        batch[name] = torch.stack([sample[name] for _, sample in samples], out=out)
    return batch


def prepared(prepare: Prepare, mp4: bytes, key: str, seed: int) -> dict[str, Tensor] | Refused:
    """What `prepare` gives, or why it gives nothing."""
    try:
        return prepare(mp4, key, seed)
    except SkipClip as reason:
        return Refused(str(reason))


# --- in a process of its own ---

_prepare: Prepare | None = None


def _begin(prepare: Prepare) -> None:
    """In a new process: it prepares with one thread, leaves interrupts to its parent, and does not outlive it."""
    global _prepare
    _prepare = prepare
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Thread(target=_end_with_parent, name="soundshard-parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _prepared_here(mp4: bytes, key: str, seed: int) -> dict[str, Tensor] | Refused:
    assert _prepare is not None
    return prepared(_prepare, mp4, key, seed)
