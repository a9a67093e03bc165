"""Where Synchformer's segments lie in a clip, and which offset between sound and pictures is which class.

Pictures run at 25 frames and sound at 16000 samples a second. A clip is cut to a few seconds, the sound's cut shifted against the
pictures' by an offset, and both are taken apart into segments of 16 frames (Iashin et al. 2024, sec. 3). Seconds become indices by
truncation of a float product, as published: 2.32 s is frame 57, and the published lists of offsets depend on it. This module knows numbers
only.
"""

import random
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES, SYNCHFORMER_RATE_HZ

SAMPLE_RATE_HZ = SYNCHFORMER_RATE_HZ
SAMPLES_PER_FRAME = SAMPLE_RATE_HZ // FRAME_RATE_HZ
SEGMENT_SAMPLES = SEGMENT_FRAMES * SAMPLES_PER_FRAME
OFFSET_CLASSES = 21
SYNC_CLASS = OFFSET_CLASSES // 2
"""The class of no offset."""
OFFSET_STEP_SECONDS = 0.2
"""Between neighbouring classes."""


def index_at(seconds: float, rate_hz: int) -> int:
    """The frame or sample at an instant: the float product, truncated towards 0 (as published; 2.32 s at 25 fps is 57)."""
    return int(seconds * rate_hz)


# --- segments -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SegmentGrid:
    """How a cut of a clip is taken apart into segments."""

    crop_seconds: float
    segments: int
    hop_frames: int
    """From one segment's start to the next: 16 is no overlap, 8 is half."""

    @property
    def crop_frames(self) -> int:
        """Frames of the cut."""
        return index_at(self.crop_seconds, FRAME_RATE_HZ)

    @property
    def crop_samples(self) -> int:
        """Samples of the cut."""
        return index_at(self.crop_seconds, SAMPLE_RATE_HZ)

    @property
    def span_frames(self) -> int:
        """From the first segment's start to the last one's end."""
        return SEGMENT_FRAMES + (self.segments - 1) * self.hop_frames

    def frame_starts(self) -> range:
        """First frames of the segments, which lie in the middle of the cut."""
        first = (self.crop_frames - self.span_frames) // 2
        return range(first, first + self.segments * self.hop_frames, self.hop_frames)

    def sample_starts(self) -> range:
        """First samples of the segments: at the same instants as the frames."""
        frames = self.frame_starts()
        return range(frames.start * SAMPLES_PER_FRAME, frames.stop * SAMPLES_PER_FRAME, frames.step * SAMPLES_PER_FRAME)


CONTRAST = SegmentGrid(10.0, 14, 16)
"""Of the segment-level contrastive pre-training (stage I)."""
OFFSET = SegmentGrid(5.0, 14, 8)
"""Of the offset's prediction (stage II)."""
SYNCHRONISABLE = SegmentGrid(4.48, 13, 8)
"""Of the question whether there is anything to synchronise (stage III)."""


# --- offsets --------------------------------------------------------------------------------------------------------------------------


def offset_grid() -> Float[Tensor, "classes"]:
    """The offsets of the classes in seconds, float32: -2.0, -1.8, ..., 2.0."""
    return ((torch.arange(OFFSET_CLASSES, dtype=torch.float64) - SYNC_CLASS) * OFFSET_STEP_SECONDS).float()


def offset_class(seconds: float) -> int:
    """The class nearest to an offset, the first of two that are equally near in float32 (0.1 s: class 10; 0.3 s: class 12)."""
    return int((offset_grid() - seconds).abs().argmin())


def class_seconds(index: int) -> float:
    """The offset of a class, to the hundredth."""
    if not 0 <= index < OFFSET_CLASSES:
        raise ValueError(f"class {index}; there are {OFFSET_CLASSES} classes of offsets, counted from 0")
    return round((index - SYNC_CLASS) * OFFSET_STEP_SECONDS, 2)


# --- cuts -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Which frames and which samples of a clip go together. An offset above 0 takes the sound from later in the file: it is ahead."""

    start_frame: int
    frames: int
    start_sample: int
    samples: int
    offset_seconds: float
    jitter_samples: int = 0
    """What `start_sample` was moved by, beyond the offset."""

    @property
    def target(self) -> int:
        """The offset's class."""
        return offset_class(self.offset_seconds)


def cut_at(start_seconds: float, offset_seconds: float, grid: SegmentGrid = OFFSET) -> Cut:
    """The cut whose pictures start at `start_seconds` and whose sound starts `offset_seconds` later in the file.

    A sound that would start less than a frame before the file starts with it; ValueError if it would start earlier.
    """
    offset_seconds = round(offset_seconds, 2)
    start_sample = index_at(start_seconds + offset_seconds, SAMPLE_RATE_HZ)
    if start_seconds < 0 or start_sample < -SAMPLES_PER_FRAME:
        raise ValueError(f"pictures from {start_seconds} s with an offset of {offset_seconds} s begin before the clip does")
    return Cut(index_at(start_seconds, FRAME_RATE_HZ), grid.crop_frames, max(0, start_sample), grid.crop_samples, offset_seconds)


def draw_offset(rng: random.Random) -> float:
    """An offset of the grid, as in training stage II."""
    return round(rng.choice(offset_grid().tolist()), 2)


def draw_synchronisable(rng: random.Random, grid: SegmentGrid = SYNCHRONISABLE) -> tuple[float, bool]:
    """An offset for training stage III, and whether it can be synchronised: half the time one of the grid, else the cut's whole length."""
    if rng.random() < 0.5:
        return draw_offset(rng), True
    return round(rng.choice([-grid.crop_seconds, grid.crop_seconds]), 2), False


def draw_cut(
    rng: random.Random, offset_seconds: float, clip_frames: int, clip_samples: int, *, grid: SegmentGrid = OFFSET, jitter_seconds: float = 0.0
) -> Cut:
    """A cut with the offset at a random place, its sound moved by up to `jitter_seconds` more (0.05 in the published training).

    Draws from `rng` as the published training does. Raises ValueError if the clip is too short for the offset.
    """
    last_seconds = (clip_frames - grid.crop_frames) / FRAME_RATE_HZ
    low, high = max(0.0, -offset_seconds), min(last_seconds, last_seconds - offset_seconds)
    if low > high:
        raise ValueError(f"a clip of {clip_frames} frames is too short for a cut of {grid.crop_seconds} s with an offset of {offset_seconds} s")
    start_frame = index_at(rng.uniform(low, high), FRAME_RATE_HZ)
    cut = cut_at(start_frame / FRAME_RATE_HZ, offset_seconds, grid)
    last_sample, reach = clip_samples - cut.samples, index_at(jitter_seconds, SAMPLE_RATE_HZ)
    if cut.start_sample > last_sample:
        raise ValueError(f"{clip_samples} samples of sound are too few for {cut.samples} from sample {cut.start_sample} on")
    jitter = rng.randint(-min(cut.start_sample, reach), min(last_sample - cut.start_sample, reach)) if reach else 0
    return Cut(start_frame, cut.frames, cut.start_sample + jitter, cut.samples, cut.offset_seconds, jitter)
