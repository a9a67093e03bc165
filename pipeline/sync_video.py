"""A video as Synchformer takes it: pictures at 25 fps and the sound that goes with them at 16 kHz, in pieces, whatever the length of the film.

Runs where decoding is isolated (`pipeline.isolate`), so it knows no torch and no Ray; nor does it know a network.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from pipeline.decode import MediaError, Pictures, Sound, open_clip

SAMPLE_RATE_HZ = 16000
FRAME_SAMPLES = 640
"""Samples under a picture."""
CONTRAST_STEP = 2
"""Every how many rows and columns the contrast looks."""


@dataclass(frozen=True)
class Length:
    """What can be had of a video."""

    frames: int
    """Pictures that it has, at 25 fps."""
    together: int
    """Pictures from the start on that have sound beside them, the sound being moved as asked."""


@dataclass(frozen=True)
class Piece:
    """Some pictures, and the sound that is compared with them."""

    frames: Pictures
    wave: Float32[np.ndarray, "samples"]
    """640 samples for every picture."""
    peaks: Float32[np.ndarray, "frames"]
    """The largest amplitude under each picture."""
    contrasts: UInt8[np.ndarray, "frames"]
    """Of each picture, from its darkest to its brightest value."""


def watch(
    source: str | Path | bytes,
    *,
    start_frame: int,
    start_sample: int,
    most_frames: int | None,
    short_side: int | None,
    piece_frames: int,
    part: tuple[float | None, float | None] = (None, None),
) -> Iterator[Length | Piece]:
    """First the Length, then what follows from `start_frame` and `start_sample` on, at most `most_frames` pictures, `piece_frames` at a time.

    `part`: start and end, in seconds, of the part of the video that is meant, on whose clock all else is. Pictures are scaled to `short_side`, or
    left at their size. Raises MediaError where the video is at fault: `no_video`, `no_audio`, `truncated`, `undecodable`, or `too_short` where it
    ends before its start.
    """
    with open_clip(source, need_audio=True, in_memory=False, start_seconds=part[0], end_seconds=part[1]) as clip:
        sound_rate_hz, _ = clip.sound_format()
        assert sound_rate_hz > 0
        together = max(0, min(clip.frames - start_frame, clip.frames - -(-start_sample // FRAME_SAMPLES)))
        yield Length(clip.frames, together)
        frames = together if most_frames is None else min(together, most_frames)
        if not frames:
            raise MediaError("too_short", f"it ends after {clip.frames / 25:.2f} s, before what was asked for begins")
        sound = _Reader(clip.sound_pieces(SAMPLE_RATE_HZ, 1, start_sample // FRAME_SAMPLES))
        sound.take(start_sample % FRAME_SAMPLES)
        for pictures in clip.rgb_pieces(piece_frames, short_side, start_frame, start_frame + frames):
            wave = sound.take(len(pictures) * FRAME_SAMPLES)
            yield Piece(pictures, wave, np.abs(wave).reshape(len(pictures), -1).max(axis=1), _contrasts(pictures))
            del pictures, wave  # they are the taker's now


def _contrasts(pictures: Pictures) -> UInt8[np.ndarray, "frames"]:
    seen = pictures[:, ::CONTRAST_STEP, ::CONTRAST_STEP].reshape(len(pictures), -1)
    return seen.max(axis=1) - seen.min(axis=1)


class _Reader:
    """Sound that comes in pieces, taken in pieces of other lengths."""

    def __init__(self, pieces: Iterator[Sound]) -> None:
        self._pieces, self._left = pieces, np.zeros(0, np.float32)

    def take(self, samples: int) -> Float32[np.ndarray, "samples"]:
        parts, have = [self._left], len(self._left)
        while have < samples:
            piece = next(self._pieces, None)
            assert piece is not None, "the clip's sound is as long as its pictures"
            parts.append(piece[0])
            have += piece.shape[1]
        together = np.concatenate(parts)
        self._left = together[samples:].copy()
        return together[:samples]
