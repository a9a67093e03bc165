"""What preparing a clip costs on some machine: the file that `soundshard bench-prepare` writes, and other jobs reckon with.

Numbers and their meaning only: imports neither torch nor av, and measures nothing.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from configs import storage


@dataclass(frozen=True)
class Cost:
    """Time that some work takes."""

    wall_seconds: float
    cpu_seconds: float
    """Of all threads together."""

    def over(self, count: int) -> "Cost":
        """The cost of one of `count`."""
        return Cost(self.wall_seconds / count, self.cpu_seconds / count)


@dataclass(frozen=True)
class Rates:
    """What one clip costs. A clip that fails counts where it was opened, in `reencode` and `reencode_fused`; everything else is for a good clip."""

    clips: int
    """Clips that were opened."""
    failed: int
    """Of them, those that could not be re-encoded."""
    reasons: dict[str, int]
    video_seconds: float
    """Length of a good clip."""
    segments: float
    """Segments of a good clip that the tower sees, all views."""
    reencode: Cost
    """Decode, scale and encode one clip, failed ones included."""
    reencode_fused: Cost
    """The same with the pictures kept as RGB for the tower, as `prepare fused=true` does it."""
    decode: Cost
    """Decode a stored clip to RGB pictures and sound at the codec's rate."""
    tower: Cost
    """Crop, copy to the device and run the visual tower over all segments of a clip, in batches as `featurise` makes them."""
    codec: Cost
    source_bytes: float
    """Size of an input file, failed ones included."""
    media_bytes: float
    """What a clip takes in a media shard."""
    feature_bytes: float
    """What a clip takes in a feature shard."""
    decoded_bytes: float
    """RGB pictures of a decoded clip in memory."""
    worker_process_bytes: int
    """Memory of a process with everything imported, before it does anything."""
    decoder_process_bytes: int
    """Most memory of the process of its own in which a worker decodes and encodes a clip."""
    actor_process_bytes: int
    """Memory of a process that holds the networks, without decoded clips."""
    device: str
    """`cpu` or `cuda`: where the tower and the codec ran."""
    gpu_kind: str
    """The GPU's name; empty for the CPU."""
    gpu_memory_bytes: int
    cpu_kind: str
    cpus: int
    versions: dict[str, str]
    options: dict[str, Any]
    """The resolved options of the measurement."""
    audio: Cost = field(default_factory=lambda: Cost(0.0, 0.0))
    """Run the audio tower over all segments of a clip's sound; nothing where its features are not stored."""

    @property
    def networks(self) -> Cost:
        """Towers and codec together."""
        parts = (self.tower, self.audio, self.codec)
        return Cost(sum(part.wall_seconds for part in parts), sum(part.cpu_seconds for part in parts))


def read_rates(path: str) -> Rates:
    """The rates in a file that `bench-prepare` wrote. Raises ValueError if it is none."""
    try:
        given = json.loads(storage.read_bytes(path))
        costs = {name: Cost(**given[name]) for name in ("reencode", "reencode_fused", "decode", "tower", "codec")}
        return Rates(**{**given, **costs, "audio": Cost(**given.get("audio", {"wall_seconds": 0.0, "cpu_seconds": 0.0}))})
    except FileNotFoundError as error:
        raise ValueError(f"rates is {path!r}, and there is no such file; `soundshard bench-prepare source=SAMPLE out={path}` makes it") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"rates is {path!r}, which `soundshard bench-prepare` of this version did not write ({error}); measure again") from error
