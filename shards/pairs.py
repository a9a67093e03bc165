"""Pairs of pictures' and sound's segments, cut from the stored features of both, each with what it is an example of.

    stream = PairStream(index, PairConfig(segments=14, visual_stride=1, audio_stride=8), rank, world, draw=draw)
    for batch in stream:      # visual, audio, target, keys

Where in a clip a pair lies, and what its target is, a function says that the caller gives: `draw`. It draws from a generator of its own for every
sample, so that a pair depends on the seed, the clip's key and how often the clip was taken before, and on nothing else. The order, and all that
streams have in common, is `shards.samples`.

Knows tensors and the dataset format. Knows no offsets, no classes and no model.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypedDict

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float16, Int64
from torch import Tensor

from configs.clock import SEGMENT_TOKENS
from shards.dataset import DatasetMismatch
from shards.order import AUDIO_VIEW, VIEW, counter_hash
from shards.read import ArrayMembers, Index
from shards.samples import MOST_REPLACED, Cut, CutStream, Picked, SampleConfig, at_least, check_repeats, clip_bits, stand_in_bits
from shards.source import Source

VISUAL, AUDIO = "avclip.npy", "avclip_audio.npy"


@dataclass(frozen=True)
class PairDraw:
    """Where in a clip a pair lies, and what it is an example of."""

    visual: int
    """The first segment of pictures, of those stored."""
    audio: int
    """The first segment of sound, of those stored."""
    target: int


Draw = Callable[[str, random.Random, int, int], PairDraw | None]
"""(key, generator, stored segments of pictures, stored segments of sound) -> the pair; None: this clip gives none. Can be pickled."""


class PairBatch(TypedDict):
    """One rank's share of a global batch."""

    visual: Float16[Tensor, "b segments 8 visual_width"]
    audio: Float16[Tensor, "b segments tokens audio_width"]
    target: Int64[Tensor, "b"]
    keys: list[str]


@dataclass(frozen=True)
class PairConfig(SampleConfig):
    """Which pairs make a batch, and how they are read."""

    segments: int = 14
    """Segments in a pair, of pictures and of sound each; 14 that overlap by half are 4.8 s."""
    visual_stride: int = 1
    """From one of a pair's segments of pictures to the next, in stored segments."""
    audio_stride: int = 8
    """The same for sound."""
    least_visual: int = 0
    """Clips with fewer stored segments of pictures are left out, and so is always one that has not enough for a pair."""
    least_audio: int = 0
    """The same for sound."""
    pairs_per_clip: int = 1
    """Pairs taken of a clip in an epoch, near each other in the order. With more, fewer bytes are read for each; remote reading gains."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, {"segments": 1, "visual_stride": 1, "audio_stride": 1, "least_visual": 0, "least_audio": 0, "pairs_per_clip": 1})

    @property
    def visual_span(self) -> int:
        """Stored segments of pictures from a pair's first to its last, both included."""
        return (self.segments - 1) * self.visual_stride + 1

    @property
    def audio_span(self) -> int:
        """The same for sound."""
        return (self.segments - 1) * self.audio_stride + 1


@dataclass(frozen=True)
class PairCut(Cut):
    """The pairs of a batch that one dataset gives."""

    places: np.ndarray
    """[pairs, 3]: the first segment of pictures, of sound, and the target."""
    visual_views: np.ndarray
    audio_views: np.ndarray


@dataclass(frozen=True)
class Track:
    """One half of the pairs that a dataset offers: segments of a member, one every `stride`."""

    members: ArrayMembers
    segments: int
    stride: int

    def empty(self, size: int, row: int, *, pin_memory: bool) -> Float16[Tensor, "size segments tokens width"]:
        """For the segments of so many pairs, of the shape that they have in this row."""
        tokens, width = self.members.shape[row, 2:].tolist()
        return torch.empty((size, self.segments, tokens, width), dtype=torch.float16, pin_memory=pin_memory)

    def copy(
        self,
        out: np.ndarray,
        slots: np.ndarray,
        rows: np.ndarray,
        views: np.ndarray,
        firsts: np.ndarray,
        buffers: Sequence[np.ndarray],
        begins: np.ndarray,
    ) -> None:
        """Puts each row's segments, from these first ones on, into these slots of `out`. `buffers` hold a row's bytes, from `begins` in its tar."""
        item, width, tokens = out.itemsize, out.shape[-1], out.shape[-2]
        assert (self.members.shape[rows, 2:] == (tokens, width)).all()
        segment = tokens * width * item
        strides = (self.stride * segment, width * item, item)
        at = self.members.data_offset[rows] + (views * self.members.shape[rows, 1] + firsts) * segment - begins
        for slot, buffer, start in zip(slots.tolist(), buffers, at.tolist(), strict=True):
            out[slot] = np.ndarray(out.shape[1:], out.dtype, buffer, start, strides)


Decide = Callable[[list[str], list[int], list[int]], np.ndarray]
"""(keys, stored segments of pictures and of sound of each) -> [clips, takes, 3]: what is cut from each; -1 for nothing."""


class Pairs(Source):
    """The clips of a feature dataset that pairs are cut from."""

    def __init__(self, index: Index, config: PairConfig, decide: Decide | None = None) -> None:
        """`decide` says what is cut from each clip, where that is decided beforehand; those of which nothing is are left out."""
        if index.info.kind != "features":
            raise DatasetMismatch(f"{index.root} is a {index.info.kind} dataset; pairs are cut from a features dataset: `soundshard featurise`")
        visual, audio = index.members.get(VISUAL), index.members.get(AUDIO)
        if not isinstance(visual, ArrayMembers) or not isinstance(audio, ArrayMembers):
            raise ValueError(
                f"{index.root} offers no pairs: a sample needs {VISUAL} and {AUDIO}, and the {index.ok} good ones have "
                f"{', '.join(index.members) or 'no members'}; `soundshard featurise` stores the sound's segments where audio.weights are given"
            )
        self.visual, self.audio = Track(visual, config.segments, config.visual_stride), Track(audio, config.segments, config.audio_stride)
        least = {"pictures": max(config.least_visual, config.visual_span), "sound": max(config.least_audio, config.audio_span)}
        rows = np.flatnonzero((visual.shape[:, 1] >= least["pictures"]) & (audio.shape[:, 1] >= least["sound"]))
        if not len(rows):
            longest = {"pictures": visual.shape[:, 1].max(initial=0), "sound": audio.shape[:, 1].max(initial=0)}
            raise ValueError(
                f"{index.root} has {index.ok} good clips, and none is long enough for a pair: expected "
                f"{' and '.join(f'{count} stored segments of {what}' for what, count in least.items())}; the longest have "
                f"{' and '.join(f'{count} of {what}' for what, count in longest.items())}"
            )
        shapes = np.unique(np.column_stack([visual.shape[rows, 2:], audio.shape[rows, 2:]]), axis=0)
        if len(shapes) > 1 or shapes[0, 0] != SEGMENT_TOKENS or not visual.dtype == audio.dtype == np.float16:
            raise ValueError(
                f"{index.root}: features must be float16 [views, segments, tokens, width], with {SEGMENT_TOKENS} tokens of pictures, and alike in "
                f"all clips; found {visual.dtype} and {audio.dtype} with [tokens, width, tokens, width] {shapes.tolist()}"
            )
        self.places: np.ndarray | None = None
        """[rows, takes, 3]: what is cut from each row, where that is decided beforehand."""
        if decide is not None:
            counts = [track.shape[rows, 1].tolist() for track in (visual, audio)]
            places = decide(index.keys.take(pa.array(rows)).to_pylist(), *counts)
            whole = (places >= 0).all(axis=(1, 2))
            if not whole.any():
                raise ValueError(f"{index.root} has {len(rows)} clips that are long enough for a pair, and of none of them is one to be taken")
            rows, self.places = rows[whole], places[whole]
        super().__init__(index, rows, (visual, audio), config)

    def stored(self, row: int) -> tuple[int, int]:
        """How many segments of pictures and of sound there are of a clip."""
        return int(self.visual.members.shape[row, 1]), int(self.audio.members.shape[row, 1])

    def fill(self, batch: PairBatch, cut: PairCut) -> None:
        """Puts the pairs into their places of a batch."""
        visual, audio = batch["visual"].numpy(), batch["audio"].numpy()
        with self.reading(cut.rows) as (buffers, begins):
            self.visual.copy(visual, cut.slots, cut.rows, cut.visual_views, cut.places[:, 0], buffers, begins)
            self.audio.copy(audio, cut.slots, cut.rows, cut.audio_views, cut.places[:, 1], buffers, begins)
        batch["target"].numpy()[cut.slots] = cut.places[:, 2]
        for slot, key in zip(cut.slots.tolist(), self.index.keys.take(pa.array(cut.rows)).to_pylist(), strict=True):
            batch["keys"][slot] = key


class PairStream(CutStream[Pairs, PairCut, PairBatch]):
    """Pairs of feature datasets: see `shards.samples.SampleStream`.

    Training draws a pair anew each time that a clip is taken, and the views. A clip of which `draw` gives None is replaced by the next one.
    Evaluation takes every clip `repeats` times, view 0, and leaves out those of which `draw` gives None.
    """

    _config: PairConfig

    def __init__(
        self,
        data: Index | Sequence[Index],
        config: PairConfig,
        rank: int = 0,
        world: int = 1,
        *,
        draw: Draw,
        shuffle: bool = True,
        repeats: int = 1,
    ) -> None:
        check_repeats(repeats, shuffle=shuffle)
        self._draw, self._repeats = draw, repeats
        super().__init__(data, config, rank, world, shuffle=shuffle, takes=config.pairs_per_clip if shuffle else repeats)

    def _open(self, index: Index, seed: int) -> Pairs:
        return Pairs(index, self._config, None if self._shuffle else partial(self._decided, seed))

    def _names(self) -> dict[str, int]:
        names = ("segments", "visual_stride", "audio_stride", "least_visual", "least_audio", "pairs_per_clip")
        return {name: getattr(self._config, name) for name in names}

    def _anew(self) -> "Callable[[], PairStream]":
        config = replace(self._config, lanes=self.lanes, prefetch=0, workers=0, pin_memory=False)
        return partial(PairStream, self._indexes, config, self._rank, self._world, draw=self._draw, shuffle=self._shuffle, repeats=self._repeats)

    # --- what is cut ---

    def _cut(self, dataset: int, picked: Picked) -> PairCut:
        pairs, seed = self._sources[dataset], self._seeds[dataset]
        if pairs.places is not None:
            places = pairs.places[np.searchsorted(pairs.rows, picked.rows), picked.takes]
            return PairCut(picked.slots, picked.rows, places, np.zeros_like(picked.rows), np.zeros_like(picked.rows))
        rows, places = self._drawn_now(dataset, picked)
        keys = rows * self._takes + picked.takes
        views = [
            (counter_hash(seed, purpose, picked.epochs, keys) % track.members.shape[rows, 0].astype(np.uint64)).astype(np.int64)
            for purpose, track in ((VIEW, pairs.visual), (AUDIO_VIEW, pairs.audio))
        ]
        return PairCut(picked.slots, rows, places, *views)

    def _drawn_now(self, dataset: int, picked: Picked) -> tuple[np.ndarray, np.ndarray]:
        """The rows that pairs are cut from, which are those picked but where another takes a clip's place, and where in them."""
        pairs, seed = self._sources[dataset], self._seeds[dataset]
        rows, places, index = picked.rows.copy(), np.empty((len(picked.rows), 3), np.int64), pairs.index
        keys = index.keys.take(pa.array(rows)).to_pylist()
        for number, (key, bits) in enumerate(zip(keys, clip_bits(seed, keys, picked.turns), strict=True)):
            row, taken = int(rows[number]), key
            found = self._place(key, bits, *pairs.stored(row))
            for _ in range(MOST_REPLACED):
                if found is not None:
                    break
                self._refuse(taken, "no pair is to be taken of it")
                row = self._stand_in(dataset, row)
                taken = index.keys[row].as_py()
                found = self._place(taken, stand_in_bits(seed, taken, key, int(picked.turns[number])), *pairs.stored(row))
            if found is None:
                raise ValueError(f"{index.root}: no pair is to be taken of {key}, nor of the {MOST_REPLACED} clips after it")
            rows[number], places[number] = row, found
        return rows, places

    def _decided(self, seed: int, keys: list[str], visual: list[int], audio: list[int]) -> np.ndarray:
        """What an evaluation cuts from each of these clips; see `Decide`."""
        found = np.full((len(keys), self._repeats, 3), -1)
        for take in range(self._repeats):
            for number, bits in enumerate(clip_bits(seed, keys, np.full(len(keys), take))):
                place = self._place(keys[number], bits, visual[number], audio[number])
                if place is not None:
                    found[number, take] = place
        return found

    def _place(self, key: str, bits: int, visual: int, audio: int) -> tuple[int, int, int] | None:
        """What `draw` gives, of a clip with so many stored segments. ValueError for segments that there are not."""
        drawn = self._draw(key, random.Random(bits), visual, audio)
        if drawn is None:
            return None
        for what, first, span, stored in (
            ("pictures", drawn.visual, self._config.visual_span, visual),
            ("sound", drawn.audio, self._config.audio_span, audio),
        ):
            if not 0 <= first <= stored - span:
                raise ValueError(f"clip {key}: a pair from segment {first} of {what} on; it has {stored}, of which a pair spans {span}")
        if drawn.target < 0:
            raise ValueError(f"clip {key}: a pair with the target {drawn.target}; expected 0 or more")
        return drawn.visual, drawn.audio, drawn.target

    # --- the batch ---

    def _batch(self, cuts: list[PairCut]) -> PairBatch:
        size, pin, first = sum(len(cut.slots) for cut in cuts), self._config.pin_memory and torch.cuda.is_available(), self._sources[0]
        row = int(first.rows[0])
        batch: PairBatch = {
            "visual": first.visual.empty(size, row, pin_memory=pin),
            "audio": first.audio.empty(size, row, pin_memory=pin),
            "target": torch.empty(size, dtype=torch.int64, pin_memory=pin),
            "keys": [""] * size,
        }
        for cut, pairs in zip(cuts, self._sources, strict=True):
            if len(cut.slots):
                pairs.fill(batch, cut)
        return batch
