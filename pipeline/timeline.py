"""What Synchformer said along a video, and what follows from it: one offset for the whole, and how far its windows agree.

An offset above 0 means that the sound is ahead of the pictures: it comes too early. Knows numbers only; no network, no media and no pages.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64

from configs.clock import FRAME_RATE_HZ
from model.segments import OFFSET_STEP_SECONDS, SYNC_CLASS, class_seconds

NEAR_CLASSES = 1
"""Windows whose best offsets are no further apart than this agree: 0.2 s, as in the published accuracy within one class."""
IN_SYNC_SECONDS = OFFSET_STEP_SECONDS / 2
"""What is nearer to no offset than to any other is in sync."""
CERTAIN = 0.5
"""Below this part of windows that agree, one offset does not describe the video."""


@dataclass(frozen=True)
class Estimate:
    """One answer for a whole video."""

    probabilities: Float32[np.ndarray, "classes"]
    """The mean of its windows'."""
    seconds: float
    """The offset: the mean of the most probable one and its two neighbours, as probable as they are."""
    agreement: float
    """The part of the windows whose own most probable offset is within 0.2 s of the most probable one of all."""
    synchronisable: float | None
    """The mean probability that there is anything to synchronise; None if that was not asked."""

    @property
    def best(self) -> int:
        """The class of the most probable offset."""
        return int(self.probabilities.argmax())

    @property
    def in_sync(self) -> bool:
        """Whether no offset is the nearest."""
        return abs(self.seconds) <= IN_SYNC_SECONDS

    def top(self, most: int) -> list[tuple[float, float]]:
        """(offset in seconds, probability) of the most probable offsets, the first first."""
        order = np.argsort(-self.probabilities, kind="stable")[:most]
        return [(class_seconds(int(index)), float(self.probabilities[index])) for index in order]


@dataclass(frozen=True)
class Timeline:
    """A video's windows."""

    duration_seconds: float
    """Of the whole video."""
    window_seconds: float
    """Of each window."""
    starts_seconds: Float64[np.ndarray, "windows"]
    """Where the windows' pictures begin in the video."""
    probabilities: Float32[np.ndarray, "windows 21"]
    """Of the offsets."""
    faults: tuple[str, ...]
    """Why a window's answer does not count: `silent`, `blank`; empty for one that does."""
    peaks: Float32[np.ndarray, "frames"]
    """The loudest of the sound under every picture from the first window's first on."""
    synchronisable: Float32[np.ndarray, "windows"] | None = None
    """Probability that there is anything to synchronise."""
    offset_seconds: float = 0.0
    """What the sound was moved by before it was compared: it was taken so much later in the file."""
    repeated: bool = False
    """Whether the video is shorter than a window, and was repeated to fill one."""

    def __post_init__(self) -> None:
        assert len(self.starts_seconds) == len(self.probabilities) == len(self.faults)

    @property
    def counted(self) -> Int64[np.ndarray, "_"]:
        """Numbers of the windows whose answers count."""
        return np.flatnonzero([not fault for fault in self.faults])

    @property
    def best_seconds(self) -> Float64[np.ndarray, "windows"]:
        """Every window's most probable offset."""
        return (self.probabilities.argmax(axis=1) - SYNC_CLASS) * OFFSET_STEP_SECONDS

    @property
    def step_seconds(self) -> float:
        """From one window to the next."""
        return float(np.diff(self.starts_seconds).max(initial=0)) or 1 / FRAME_RATE_HZ

    def estimate(self) -> Estimate:
        """The offset of the whole video. There must be a window that counts.

        A window adds a distribution, not a vote: where nothing happens it is flat and decides little, and a stretch that is quite sure of something
        else shows as a second peak, without moving the first. Where it is known what can be synchronised, windows count by that.
        """
        counted = self.counted
        weights = np.ones(len(counted)) if self.synchronisable is None else np.maximum(self.synchronisable[counted], 1e-3)
        probabilities = np.average(self.probabilities[counted], axis=0, weights=weights).astype(np.float32)
        best = int(probabilities.argmax())
        near = np.arange(max(0, best - 1), min(len(probabilities), best + 2))
        seconds = float(np.average((near - SYNC_CLASS) * OFFSET_STEP_SECONDS, weights=probabilities[near]))
        agree = np.abs(self.probabilities[counted].argmax(axis=1) - best) <= NEAR_CLASSES
        mean = None if self.synchronisable is None else float(self.synchronisable[counted].mean())
        return Estimate(probabilities, round(seconds, 3), float(np.average(agree, weights=weights)), mean)


def words(seconds: float) -> str:
    """An offset as a sentence's end: `0.60 s ahead of the pictures`."""
    if abs(seconds) <= IN_SYNC_SECONDS:
        return "in sync with the pictures"
    return f"{abs(seconds):.2f} s {'ahead of' if seconds > 0 else 'behind'} the pictures"
