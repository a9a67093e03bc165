"""Clips of media datasets, prepared by a function that the caller gives: decoded, cut, augmented; in processes, in an exact order.

    stream = ClipStream(index, ClipConfig(batch_size=8, workers=4), rank, world, prepare=prepare)
    for batch in stream:      # what prepare gives, stacked; and the clips' keys

The order, and all that streams have in common, is `shards.samples`.

Knows bytes and tensors. Knows no codec and no model: what is in a clip `prepare` knows.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from shards.samples import SampleConfig, at_least


class SkipClip(Exception):  # noqa: N818 - a word about a clip, not about the program
    """Raised by `prepare` where nothing can be made of a clip, which is no error: it is too short, say. Its message is the reason."""


Prepare = Callable[[bytes, str, int], dict[str, Tensor]]
"""(bytes of the mp4, key, seed of 63 bits) -> tensors, of the same names and shapes for every clip. Can be pickled."""


@dataclass(frozen=True)
class ClipConfig(SampleConfig):
    """Which clips make a batch, and how they are read and prepared."""

    least_seconds: float = 0.0
    """Clips that the dataset says are shorter are left out."""
    workers: int = 0
    """Processes that prepare clips, for batches up to `prefetch` ahead; 0: one background thread."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, {"least_seconds": 0})
