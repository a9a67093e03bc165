"""Which stored segments of a clip make an example for Synchformer's stages II and III: drawn at random, or as a list says.

As published (Iashin et al. 2024, sec. 4.1), but on the grid of what is stored: pictures start at a stored segment, and sound at the stored
segment that is nearest to what is asked for. At the default hops (8 frames, 640 samples) every offset of the 0.2 s grid is exact, and the jitter
of 0.05 s becomes one of -0.04, 0 and 0.04 s. Knows numbers only.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from model.segments import (
    SAMPLE_RATE_HZ,
    SAMPLES_PER_FRAME,
    SYNC_CLASS,
    SegmentGrid,
    cut_at,
    draw_offset,
    draw_synchronisable,
    offset_class,
    offset_grid,
)
from model.synchformer import Head
from shards.pairs import PairDraw


@dataclass(frozen=True)
class StoredGrid:
    """A grid of segments, and the hops at which a dataset stores them."""

    grid: SegmentGrid
    head: Head
    hop_frames: int
    hop_samples: int

    def __post_init__(self) -> None:
        wrong = []
        if self.grid.hop_frames % self.hop_frames:
            wrong.append(f"pictures every {self.hop_frames} frames (hop_frames), expected a divisor of {self.grid.hop_frames}")
        if (self.grid.hop_frames * SAMPLES_PER_FRAME) % self.hop_samples:
            wrong.append(
                f"sound every {self.hop_samples} samples (audio.hop_samples), expected a divisor of {self.grid.hop_frames * SAMPLES_PER_FRAME}"
            )
        if wrong:
            raise ValueError(f"the dataset stores segments of {' and of '.join(wrong)}; featurise the clips again")

    @property
    def visual_stride(self) -> int:
        """Stored segments of pictures from one of an example's to the next."""
        return self.grid.hop_frames // self.hop_frames

    @property
    def audio_stride(self) -> int:
        return self.grid.hop_frames * SAMPLES_PER_FRAME // self.hop_samples

    @property
    def visual_span(self) -> int:
        """Stored segments of pictures from an example's first to its last."""
        return (self.grid.segments - 1) * self.visual_stride + 1

    @property
    def audio_span(self) -> int:
        return (self.grid.segments - 1) * self.audio_stride + 1

    @property
    def widest_seconds(self) -> float:
        """The largest offset that is drawn."""
        widest = float(offset_grid().max())
        return round(max(widest, self.grid.crop_seconds) if self.head == "synchronisable" else widest, 2)

    @property
    def least_visual(self) -> int:
        """Stored segments of pictures that a clip needs for every offset."""
        return ceil(self.widest_seconds * SAMPLE_RATE_HZ / (self.hop_frames * SAMPLES_PER_FRAME)) + self.visual_span

    @property
    def least_audio(self) -> int:
        return ceil(self.widest_seconds * SAMPLE_RATE_HZ / self.hop_samples) + self.audio_span

    def sound_at(self, visual: int, samples: float | int) -> int:
        """The stored segment of sound that starts nearest to `samples` after a stored segment of pictures."""
        return round((visual * self.hop_frames * SAMPLES_PER_FRAME + samples) / self.hop_samples)


@dataclass(frozen=True)
class DrawPair:
    """An example at random: an offset of the grid, a place where it fits, and a jitter of the sound. Can be pickled."""

    stored: StoredGrid
    jitter_seconds: float = 0.0
    in_sync: bool = False
    """Only examples without an offset."""

    def __call__(self, key: str, rng: random.Random, visual: int, audio: int) -> PairDraw | None:  # noqa: ARG002 - as a list needs it
        grid = self.stored
        offset, target = (0.0, SYNC_CLASS) if self.in_sync else draw_target(rng, grid.head, grid.grid)
        last_sound = audio - grid.audio_span
        places = [v for v in range(visual - grid.visual_span + 1) if 0 <= grid.sound_at(v, offset * SAMPLE_RATE_HZ) <= last_sound]
        if not places:
            return None
        place = rng.choice(places)
        jitter = rng.uniform(-self.jitter_seconds, self.jitter_seconds) if self.jitter_seconds else 0.0
        sound = grid.sound_at(place, (offset + jitter) * SAMPLE_RATE_HZ)
        return PairDraw(place, min(max(sound, 0), last_sound), target)


@dataclass(frozen=True)
class ListedPair:
    """The example that a list has for a clip; None for a clip that it does not name, or that is too short for it. Can be pickled."""

    stored: StoredGrid
    offsets: Mapping[str, tuple[float, float]] = field(repr=False)
    """For each key: where the pictures start, and the offset, in seconds."""

    def __call__(self, key: str, rng: random.Random, visual: int, audio: int) -> PairDraw | None:  # noqa: ARG002 - nothing is drawn
        listed, grid = self.offsets.get(key), self.stored
        if listed is None:
            return None
        start, offset = listed
        cut = cut_at(start, offset, grid.grid)
        place = round((cut.start_frame + grid.grid.frame_starts().start) / grid.hop_frames)
        place = min(max(place, 0), visual - grid.visual_span)
        sound = grid.sound_at(place, cut.start_sample - cut.start_frame * SAMPLES_PER_FRAME)
        if place < 0 or not 0 <= sound <= audio - grid.audio_span:
            return None
        return PairDraw(place, sound, cut.target)


def draw_target(rng: random.Random, head: Head, grid: SegmentGrid) -> tuple[float, int]:
    """An offset in seconds, and the class that a head of this kind shall give."""
    if head == "offset":
        offset = draw_offset(rng)
        return offset, offset_class(offset)
    offset, synchronisable = draw_synchronisable(rng, grid)
    return offset, int(synchronisable)
