"""Examples for Synchformer's training from clips of media datasets: decoded, cut to segments, augmented.

    prepare = ContrastClip(decode, augment=CONTRAST_AUGMENT)      # stage I: sound and pictures of the same segments
    prepare = PairClip(decode, augment=PAIR_AUGMENT)              # stage II: the sound of some time before or after, and by which class
    prepare = PairClip(decode, grid=SYNCHRONISABLE, question="synchronisable", augment=PAIR_AUGMENT)      # stage III
    example = prepare(mp4, key, seed)                             # tensors; what `shards.clips.ClipStream` takes

All are values that can be pickled: they run in a stream's worker processes. Pixels stay uint8 and sound stays a waveform, which is a quarter of what
they become; normalisation and spectrograms are made on the device. Without `augment` nothing is drawn but the offset: that is evaluation.

Knows tensors, segments' grids and the augmentation. Knows no container and no codec (`decode` is given) and no dataset.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES
from model.segments import (
    CONTRAST,
    OFFSET,
    SAMPLE_RATE_HZ,
    SAMPLES_PER_FRAME,
    SEGMENT_SAMPLES,
    SYNC_CLASS,
    Cut,
    SegmentGrid,
    cut_at,
    draw_cut,
    draw_offset,
    draw_synchronisable,
    index_at,
    offset_grid,
)
from shards.clips import SkipClip
from train.augment import AugmentOptions, augment_pictures, augment_sound, cut_square, draw_square, middle_square, resize

Decode = Callable[[bytes], tuple[np.ndarray | Tensor, np.ndarray | Tensor]]
"""Bytes of an mp4 -> its pictures at 25 fps, uint8 [frames, height, width, 3], and its sound at 16 kHz, float32 [samples]. Can be pickled."""
SIDE = 8 / 7
"""A picture's short side, of the square that is cut out of it: 256 for 224 (as published)."""
LONGEST_SECONDS = 10.0
"""What is beyond is not looked at, as published."""
LARGEST_OFFSET_SECONDS = float(offset_grid().max())


@dataclass(frozen=True)
class ContrastClip:
    """An example for stage I: `pixels` and `sound` of segments at the same instants.

    With `augment` they begin at a random frame, and the sound up to `jitter_seconds` off it; without, they lie in the middle of the clip.
    """

    decode: Decode
    grid: SegmentGrid = CONTRAST
    """Its cut is the whole clip, however long; fewer segments make use of shorter clips."""
    augment: AugmentOptions | None = None
    size: int = 224
    """Height and width of the pixels."""
    jitter_seconds: float = 0.05
    longest_seconds: float = LONGEST_SECONDS

    def __call__(self, mp4: bytes, key: str, seed: int) -> dict[str, Tensor]:  # noqa: ARG002 - examples of all kinds are made from the same
        """`pixels` uint8 [segments, 16, size, size, 3], `sound` float32 [segments, 10240] and `target` int64 [], which is always "in sync".

        SkipClip for a clip that is too short.
        """
        rng, span = random.Random(seed), self.grid.span_frames
        frames, sound = opened(self.decode(mp4), self.longest_seconds)
        spare = len(frames) - span
        if spare < 0:
            raise SkipClip(f"{_told(frames)}: too short for {self.grid.segments} segments, which are {span / FRAME_RATE_HZ:.2f} s")
        start_frame, jitter = spare // 2, 0
        if self.augment is not None:
            start_frame = rng.randint(0, spare)
            reach = min(index_at(self.jitter_seconds, SAMPLE_RATE_HZ), min(start_frame, spare - start_frame) * SAMPLES_PER_FRAME)
            jitter = rng.randint(-reach, reach)
        example = _segments(frames, sound, start_frame, start_frame * SAMPLES_PER_FRAME + jitter, self.grid, self.size, self.augment, rng)
        return {**example, "target": torch.tensor(SYNC_CLASS)}


@dataclass(frozen=True)
class PairClip:
    """An example for stages II and III: `pixels` of segments, `sound` of segments a while before or after them, and `target`.

    The cut is drawn as in the published training; or `fixed` says for every clip where its pictures start and the offset, both in seconds.
    With `augment` the segments begin at a random frame of the cut, where it has any to spare, and the sound is up to `jitter_seconds` off.
    """

    decode: Decode
    grid: SegmentGrid = OFFSET
    question: Literal["offset", "synchronisable"] = "offset"
    """What the target says: the offset's class, or whether there is anything to synchronise (1) or not (0: the offset is the cut's whole length)."""
    fixed: Mapping[str, tuple[float, float]] | None = None
    """(start_seconds, offset_seconds) by key; clips that it does not name are left out. None: they are drawn."""
    augment: AugmentOptions | None = None
    size: int = 224
    """Height and width of the pixels."""
    jitter_seconds: float = 0.05
    longest_seconds: float = LONGEST_SECONDS

    @property
    def least_seconds(self) -> float:
        """What a clip must have, that every offset may be drawn."""
        reach = LARGEST_OFFSET_SECONDS if self.question == "offset" else max(LARGEST_OFFSET_SECONDS, self.grid.crop_seconds)
        return self.grid.crop_seconds + reach

    def __call__(self, mp4: bytes, key: str, seed: int) -> dict[str, Tensor]:
        """`pixels` uint8 [segments, 16, size, size, 3], `sound` float32 [segments, 10240], `target` int64 [] and `offset_seconds` float32 [].

        SkipClip for a clip that is too short, or that the list does not name.
        """
        if self.fixed is not None and key not in self.fixed:
            raise SkipClip("the list of offsets does not name it")
        rng = random.Random(seed)
        frames, sound = opened(self.decode(mp4), self.longest_seconds)
        cut, target = self._drawn(frames, sound, rng) if self.fixed is None else self._listed(frames, sound, *self.fixed[key])
        first = self.grid.frame_starts().start
        if self.augment is not None:
            first = rng.randint(0, self.grid.crop_frames - self.grid.span_frames)
        start_frame, start_sample = cut.start_frame + first, cut.start_sample + first * SAMPLES_PER_FRAME
        example = _segments(frames, sound, start_frame, start_sample, self.grid, self.size, self.augment, rng)
        return {**example, "target": torch.tensor(target), "offset_seconds": torch.tensor(cut.offset_seconds)}

    def _drawn(self, frames: Tensor, sound: Tensor, rng: random.Random) -> tuple[Cut, int]:
        if len(frames) < (least := index_at(self.least_seconds, FRAME_RATE_HZ)):
            raise SkipClip(f"{_told(frames)}: too short for any offset, which takes {least / FRAME_RATE_HZ:.2f} s")
        offset_seconds, in_order = (draw_offset(rng), True) if self.question == "offset" else draw_synchronisable(rng, self.grid)
        jitter_seconds = 0.0 if self.augment is None else self.jitter_seconds
        cut = draw_cut(rng, offset_seconds, len(frames), len(sound), grid=self.grid, jitter_seconds=jitter_seconds)
        return cut, cut.target if self.question == "offset" else int(in_order)

    def _listed(self, frames: Tensor, sound: Tensor, start_seconds: float, offset_seconds: float) -> tuple[Cut, int]:
        cut = cut_at(start_seconds, offset_seconds, self.grid)
        if cut.start_frame + cut.frames > len(frames) or cut.start_sample + cut.samples > len(sound):
            raise SkipClip(f"{_told(frames)}: too short for what the list says, pictures from {start_seconds} s and an offset of {offset_seconds} s")
        return cut, cut.target if self.question == "offset" else int(abs(cut.offset_seconds) <= LARGEST_OFFSET_SECONDS)


def opened(
    decoded: tuple[np.ndarray | Tensor, np.ndarray | Tensor], longest_seconds: float
) -> tuple[UInt8[Tensor, "n h w 3"], Float[Tensor, "samples"]]:
    """Pictures and the sound under them, as far as both go. Seconds become frames by truncation of a float product, as published."""
    frames, sound = (part if isinstance(part, Tensor) else torch.from_numpy(part if part.flags.writeable else part.copy()) for part in decoded)
    seconds = min(longest_seconds, len(frames) / FRAME_RATE_HZ, len(sound) / SAMPLE_RATE_HZ)
    count = index_at(seconds, FRAME_RATE_HZ)
    return frames[:count], sound[: count * SAMPLES_PER_FRAME]


def fitted(frames: UInt8[Tensor, "n h w 3"], size: int) -> UInt8[Tensor, "n short long 3"]:
    """Pictures whose short side is 8/7 of `size`. Those of another side are scaled."""
    _, height, width, _ = frames.shape
    short = round(size * SIDE)
    if min(height, width) == short:
        return frames
    return resize(frames, *((short, short * width // height) if height < width else (short * height // width, short)))


def _segments(
    frames: UInt8[Tensor, "n h w 3"],
    sound: Float[Tensor, "samples"],
    start_frame: int,
    start_sample: int,
    grid: SegmentGrid,
    size: int,
    augment: AugmentOptions | None,
    rng: random.Random,
) -> dict[str, Tensor]:
    """Segments of pictures and of sound from where each starts."""
    pictures = fitted(frames[start_frame : start_frame + grid.span_frames], size)
    wave = sound[start_sample : start_sample + grid.span_frames * SAMPLES_PER_FRAME]
    height, width = pictures.shape[1:3]
    square = middle_square(height, width, size) if augment is None else draw_square(rng, height, width, size, augment)
    pictures = cut_square(pictures, square, size)
    if augment is not None and augment.each == "clip":
        pictures, wave = augment_pictures(pictures[None], rng, augment)[0], augment_sound(wave[None], rng, augment)[0]
    pixels = pictures.unfold(0, SEGMENT_FRAMES, grid.hop_frames).movedim(-1, 1)
    waves = wave.unfold(0, SEGMENT_SAMPLES, grid.hop_frames * SAMPLES_PER_FRAME)
    if augment is not None and augment.each == "segment":
        return {"pixels": augment_pictures(pixels, rng, augment), "sound": augment_sound(waves.contiguous(), rng, augment)}
    return {"pixels": pixels.contiguous(), "sound": waves.contiguous()}


def _told(frames: Tensor) -> str:
    return f"a clip of {len(frames) / FRAME_RATE_HZ:.2f} s"
