"""Pairs of segments of pictures and of sound, cut from the stored features of both, with what is to be said of them: an offset's class, in order or not.

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
from hashlib import blake2b
from typing import TypedDict

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float16, Int64
from torch import Tensor

from configs.clock import SEGMENT_TOKENS
from shards.dataset import DatasetMismatch
from shards.order import AUDIO_VIEW, DRAW, VIEW, counter_hash
from shards.read import ArrayMembers, Index
from shards.samples import Cut, Picked, SampleConfig, SampleStream, at_least
from shards.source import Source

VISUAL, AUDIO = "avclip.npy", "avclip_audio.npy"
MOST_REPLACED = 100
"""So many clips one after the other that nothing can be made of are an error."""
KEYS_TOLD = 20
"""How many keys of clips that are left out `skipped_keys` names."""


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

    visual: np.ndarray
    audio: np.ndarray
    targets: np.ndarray
    visual_views: np.ndarray
    audio_views: np.ndarray
