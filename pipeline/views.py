"""Views of a clip: which crop of its pictures the tower sees. View 0 is the centre; others keep the augmentation that caching would cost."""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8


@dataclass(frozen=True)
class Crop:
    """A square crop of every frame of a clip, mirrored left to right if `flip`."""

    top: int
    left: int
    size: int
    flip: bool = False

    def apply(self, frames: UInt8[np.ndarray, "frames height width 3"]) -> UInt8[np.ndarray, "frames size size 3"]:
        """The crop as a view of the frames; nothing is copied."""
        cut = frames[:, self.top : self.top + self.size, self.left : self.left + self.size]
        return cut[:, :, ::-1] if self.flip else cut


def view_crop(key: str, view: int, height: int, width: int, size: int) -> Crop:
    """The crop of one view of one clip; the same on every machine and in every run.

    View 0 is the published test crop, `int(round((side - size) / 2))`. View v > 0 is the published training augmentation (random crop, random
    flip), drawn once per clip from a generator seeded by the key and v. Raises ValueError for frames smaller than the crop.
    """
    if min(height, width) < size:
        raise ValueError(f"frames of {width}x{height} are smaller than the visual tower's {size}x{size}; re-encode with encode.short_side >= {size}")
    if view == 0:
        return Crop(round((height - size) / 2), round((width - size) / 2), size)
    seed = int.from_bytes(hashlib.sha256(f"{key}\n{view}".encode()).digest()[:8], "little")
    draw = np.random.Generator(np.random.PCG64(seed))
    top, left = int(draw.integers(height - size + 1)), int(draw.integers(width - size + 1))
    return Crop(top, left, size, bool(draw.integers(2)))
