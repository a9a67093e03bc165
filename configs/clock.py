"""The segment clock: every rate and position that the rest of the code agrees on.

1 segment = 0.64 s = 16 frames at 25 fps = 8 video tokens = 48 EnCodec-24k steps. Rates are exact fractions and positions
are integers, so time never drifts. This module knows no tensors, no files and no models.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import floor

FRAME_RATE_HZ = 25
"""Frames per second of every re-encoded clip."""
SEGMENT_FRAMES = 16
"""Frames in one segment (Synchformer, Iashin et al. 2024, sec. 3.1)."""
SEGMENT_TOKENS = 8
"""Video tokens that the visual tower gives for one segment: one per two frames."""
SEGMENT_SECONDS = Fraction(SEGMENT_FRAMES, FRAME_RATE_HZ)
SYNCHFORMER_RATE_HZ = 16000
"""Samples per second of the sound that Synchformer hears."""


def segment_count(frames: int, hop_frames: int) -> int:
    """Segments that start every `hop_frames` and fit whole into `frames`; 0 for a clip shorter than one segment."""
    return max(0, (frames - SEGMENT_FRAMES) // hop_frames + 1)


def check_hop(hop_frames: int) -> int:
    """The hop itself, if contiguous windows can be cut on it: a divisor of a segment's 16 frames. Raises ValueError otherwise."""
    if hop_frames < 1 or SEGMENT_FRAMES % hop_frames:
        raise ValueError(f"hop_frames is {hop_frames}; expected a divisor of {SEGMENT_FRAMES} (16, 8, 4, 2 or 1), so that contiguous windows exist")
    return hop_frames


def window_segments(start_hop: int, segments: int, hop_frames: int) -> range:
    """Indices of `segments` contiguous (touching, not overlapping) segments, the first at hop index `start_hop`."""
    stride = SEGMENT_FRAMES // check_hop(hop_frames)
    return range(start_hop, start_hop + segments * stride, stride)


def window_starts(stored_segments: int, segments: int, hop_frames: int) -> int:
    """How many hop indices can begin a window of `segments` contiguous segments; 0 if the clip is too short."""
    stride = SEGMENT_FRAMES // check_hop(hop_frames)
    return max(0, stored_segments - (segments - 1) * stride)


@dataclass(frozen=True)
class CodecClock:
    """A codec's steps on the clip's time axis: step i covers `[i, i + 1) * hop_samples / sample_rate_hz` seconds."""

    sample_rate_hz: int
    hop_samples: int

    @property
    def rate(self) -> Fraction:
        """Codec steps per second, exactly: 75 for EnCodec 24 kHz, 44100/512 for DAC."""
        return Fraction(self.sample_rate_hz, self.hop_samples)

    def step_at(self, seconds: Fraction) -> int:
        """The step that covers an instant. Exact for every clip length: no error accumulates."""
        return floor(seconds * self.rate)

    def steps_in(self, segments: int) -> int:
        """Whole steps in a window of `segments` segments: 48 each for EnCodec 24 kHz, 220 in four for DAC 44.1 kHz."""
        return floor(segments * SEGMENT_SECONDS * self.rate)

    def window_steps(self, start_frame: int, segments: int) -> range:
        """Codec steps of the window of `segments` segments that starts at frame `start_frame` (25 fps), from the step that begins nearest to it."""
        start = floor(Fraction(start_frame, FRAME_RATE_HZ) * self.rate + Fraction(1, 2))
        return range(start, start + self.steps_in(segments))
