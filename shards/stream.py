"""Batches of feature and codec windows for a trainer, in an order that depends on the seed and the datasets alone, resumable to the sample.

    index = Index.open("data/features", "train")
    stream = FeatureStream(index, StreamConfig(batch_size=64), rank, world)   # its share of each batch, for every process of a job
    stream.load_state_dict(state)                                             # to go on; before iterating
    for batch in stream:                                                      # tensors: features and codes; and the clips' keys
        ...
        state = stream.state_dict()                                           # after this batch: what to save in a checkpoint

The order, and all that streams have in common, is `shards.samples`. Worker processes hand over batches of windows at more cost than one thread needs
to make them; use them where something else keeps the process from running Python.

Knows tensors, the segment clock and the dataset format. Knows no trainer and no model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from shards.order import START, VIEW, counter_hash
from shards.read import Index
from shards.samples import Cut, CutStream, Picked, SampleConfig, at_least
from shards.windows import Batch, Windows


@dataclass(frozen=True)
class StreamConfig(SampleConfig):
    """Which windows make a batch, and how they are read."""

    segments: int = 4
    """Contiguous segments in a window; 4 are 2.56 s."""
    short_clips: Literal["drop", "pad"] = "drop"
    """What becomes of clips shorter than a window: left out, or padded with zeros, and masks say what is there."""
    windows_per_clip: int = 1
    """Windows taken of a clip in an epoch, near each other in the order. With more, fewer bytes are read for each; remote reading gains."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, {"segments": 1, "windows_per_clip": 1})


@dataclass(frozen=True)
class WindowCut(Cut):
    """The windows of a batch that one dataset gives."""

    starts: np.ndarray
    """Hop indices."""
    views: np.ndarray


class FeatureStream(CutStream[Windows, WindowCut, Batch]):
    """Windows of feature datasets: see `shards.samples.SampleStream`.

    Training draws a window's start and its view. Evaluation takes view 0 from the clip's start, or from where a view's list says.
    """

    _config: StreamConfig

    def __init__(self, data: Index | Sequence[Index], config: StreamConfig, rank: int = 0, world: int = 1, *, shuffle: bool = True) -> None:
        super().__init__(data, config, rank, world, shuffle=shuffle, takes=config.windows_per_clip if shuffle else 1)

    @property
    def padded(self) -> int:
        """Good clips shorter than a window that are padded."""
        return sum(windows.padded for windows in self._sources)

    def _open(self, index: Index, seed: int) -> Windows:  # noqa: ARG002 - windows need none
        config = self._config
        return Windows(index, config.segments, short_clips=config.short_clips, pin_memory=config.pin_memory, fetch=config)

    def _names(self) -> dict[str, int]:
        several = self._config.windows_per_clip
        return {"segments": self._config.segments, **({"windows_per_clip": several} if several > 1 else {})}

    def _anew(self) -> "Callable[[], FeatureStream]":
        config = replace(self._config, lanes=self.lanes, prefetch=0, workers=0, pin_memory=False)
        return partial(FeatureStream, self._indexes, config, self._rank, self._world, shuffle=self._shuffle)

    def _cut(self, dataset: int, picked: Picked) -> WindowCut:
        rows, windows, seed = picked.rows, self._sources[dataset], self._seeds[dataset]
        if not self._shuffle:
            return WindowCut(picked.slots, rows, windows.given[rows], np.zeros_like(rows))
        keys = rows * self._takes + picked.takes
        starts = counter_hash(seed, START, picked.epochs, keys) % windows.starts[rows].astype(np.uint64)
        views = counter_hash(seed, VIEW, picked.epochs, keys) % windows.views[rows].astype(np.uint64)
        return WindowCut(picked.slots, rows, starts.astype(np.int64), views.astype(np.int64))

    def _batch(self, cuts: list[WindowCut]) -> Batch:
        batch = self._sources[0].empty(sum(len(cut.slots) for cut in cuts))
        for cut, windows in zip(cuts, self._sources, strict=True):
            if len(cut.slots):
                windows.fill(batch, cut.slots, cut.rows, cut.starts, cut.views)
        return batch
