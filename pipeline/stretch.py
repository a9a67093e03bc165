"""Which stretch of a video is wanted, and its pictures: all at once for a clip, in pieces for a film. Runs where decoding is isolated.

Knows no torch and no Ray, so that the process which decodes stays small.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES
from pipeline.decode import MediaError, Pictures, exact_seconds, picture_pieces, video_frames


@dataclass(frozen=True)
class Stretch:
    """A part of a video on its 25 fps clock."""

    start_frame: int = 0
    segments: int = 0
    """Whole segments of it; 0 takes everything up to the end, the last segment filled up by holding the last picture."""
    end_frame: int | None = None
    """Where the video ends for this purpose, if it goes on."""

    @classmethod
    def of(cls, start_seconds: float, segments: int, *, end_seconds: float | None = None) -> "Stretch":
        """The stretch from the picture that is shown at `start_seconds`, of a video that ends at `end_seconds` or by itself."""
        start, end = (None if at is None else floor(exact_seconds(at) * FRAME_RATE_HZ) for at in (start_seconds, end_seconds))
        return cls(start or 0, segments, end)

    @property
    def start_seconds(self) -> Fraction:
        """Where the stretch begins: the time of its first picture."""
        return Fraction(self.start_frame, FRAME_RATE_HZ)

    def frames_of(self, video_frames: int) -> int:
        """How many frames the stretch has in a video of so many. Raises MediaError `too_short` where the video has not enough."""
        end = video_frames if self.end_frame is None else min(video_frames, self.end_frame)
        left, wanted = end - self.start_frame, self.segments * SEGMENT_FRAMES
        if left < max(wanted, SEGMENT_FRAMES):
            raise MediaError(
                "too_short",
                f"{max(0, left) / FRAME_RATE_HZ:.2f} s of pictures from {float(self.start_seconds):.2f} s on; "
                f"wanted {max(wanted, SEGMENT_FRAMES) / FRAME_RATE_HZ:.2f} s",
            )
        return wanted or left


def whole_segments(pictures: UInt8[np.ndarray, "_ height width 3"]) -> UInt8[np.ndarray, "_ height width 3"]:
    """Pictures filled up to whole segments by holding the last one."""
    missing = -len(pictures) % SEGMENT_FRAMES
    return np.concatenate([pictures, np.repeat(pictures[-1:], missing, axis=0)]) if missing else pictures


def clip_pictures(source: str | Path | bytes, stretch: Stretch, *, short_side: int | None, most_frames: int) -> Pictures | int:
    """The stretch's pictures, or only their number where they are more than `most_frames`: a film, to be taken in pieces."""
    frames = stretch.frames_of(video_frames(source))
    if frames > most_frames:
        return frames
    start = stretch.start_seconds
    return next(iter(picture_pieces(source, short_side=short_side, piece_frames=frames, start_seconds=start)))


def film_pictures(source: str | Path | bytes, stretch: Stretch, *, short_side: int | None, piece_segments: int) -> Iterator[Pictures]:
    """The stretch's pictures in pieces of so many segments, the last one of as many as are left."""
    left = stretch.frames_of(video_frames(source))
    pieces = picture_pieces(source, short_side=short_side, piece_frames=piece_segments * SEGMENT_FRAMES, start_seconds=stretch.start_seconds)
    for piece in pieces:
        yield whole_segments(piece[:left])
        left -= len(piece)
        if left <= 0:
            return
