"""What one layer makes and another needs without knowing it: functions handed over by where they are, so that no layer imports its neighbour.

`pipeline` alone decodes media and knows the published lists of clips, and training needs a decoder in its loader's processes and the offsets to
validate on. This is the one place that knows both names.
"""

import importlib
from collections.abc import Callable

from jaxtyping import Float32, UInt8
from numpy import ndarray

MediaDecoder = Callable[[bytes], tuple[UInt8[ndarray, "frames height width 3"], Float32[ndarray, "samples"]]]
"""A clip's bytes -> its pictures at 25 fps and its sound, one channel at 16 kHz, both from time 0. Can be pickled."""


def media_decoder() -> MediaDecoder:
    """`pipeline.media.training_clip`."""
    return importlib.import_module("pipeline.media").training_clip


def listed_offsets(path: str) -> dict[str, tuple[float, float]]:
    """`pipeline.sync_lists.fixed_offsets`: for each key of a list of fixed offsets, where pictures start and the offset, in seconds."""
    return importlib.import_module("pipeline.sync_lists").fixed_offsets(path)
