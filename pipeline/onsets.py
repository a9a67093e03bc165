"""When sounds begin, and how well that agrees with when they should.

Onset times from a waveform by spectral flux (Bello et al. 2005, sec. III), placed to the millisecond by the steepest rise of energy
nearby, and the F1 of onsets against expected times, each matched at most once. Knows waveforms and times, no files, no models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

TOLERANCE_SECONDS = 0.08
"""About two frames at 25 fps either side: how far sound and picture of an impact can be apart unnoticed (ITU-R BT.1359: +45 to -125 ms)."""
HOP_SECONDS = 0.005
WINDOW_SECONDS = 0.02
MIN_GAP_SECONDS = 0.06
SHARE_OF_LARGEST = 0.12
QUIET = 2e-3
"""Root mean square (-54 dB of full scale) under which nothing counts as an onset: hiss has spectral flux too."""


@dataclass(frozen=True)
class OnsetScore:
    """Counts that F1 is made of; counts of several clips add up."""

    matched: int
    detected: int
    expected: int

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 1 where there was nothing to find and nothing was found."""
        total = self.detected + self.expected
        return 2 * self.matched / total if total else 1.0

    def __add__(self, other: "OnsetScore") -> "OnsetScore":
        return OnsetScore(self.matched + other.matched, self.detected + other.detected, self.expected + other.expected)


def onset_times(wave: Float[Array, "samples"], sample_rate_hz: int) -> list[float]:
    """Seconds at which something begins to sound in a mono waveform, in order."""
    hop, window = round(HOP_SECONDS * sample_rate_hz), round(WINDOW_SECONDS * sample_rate_hz)
    if len(wave) < window:
        return []
    # Half a window first, so that frame i is centred on sample i * hop: the sound's mirror image, because against silence a recording's own
    # noise would begin at 0. Nothing at the end, where silence would make a tone cut off click.
    padded = np.pad(wave.astype(np.float32), (window // 2, 0), mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    magnitude = np.abs(np.fft.rfft(frames * np.hanning(window).astype(np.float32), axis=1))
    level = np.log1p(200 * magnitude / max(float(magnitude.max()), 1e-12))
    flux = np.maximum(level[2:] - level[:-2], 0).mean(axis=1)  # over two hops, so that a rise slower than one hop counts whole
    flux = np.pad(flux, 1)[: len(level)]
    loud = np.sqrt((frames**2).mean(axis=1))
    # Steady noise has flux too, always about the same: twice its median is out of its reach.
    threshold = SHARE_OF_LARGEST * flux.max() + 2 * _running_median(flux, round(0.1 / HOP_SECONDS))
    reach = round(MIN_GAP_SECONDS / 2 / HOP_SECONDS)
    onsets: list[float] = []
    for i in np.flatnonzero(flux > threshold):
        near = slice(max(0, i - reach), i + reach + 1)
        if flux[i] == flux[near].max() and loud[i : i + 2 * reach].max() > QUIET:
            seconds = _steepest_rise(wave, round(i * hop), sample_rate_hz)
            if not onsets or seconds - onsets[-1] >= MIN_GAP_SECONDS / 2:
                onsets.append(seconds)
    return onsets


def score_onsets(detected: Sequence[float], expected: Sequence[float], tolerance_seconds: float = TOLERANCE_SECONDS) -> OnsetScore:
    """Pairs of detected and expected times no farther apart than the tolerance, as many as there can be, each time in one pair at most."""
    found, wanted = sorted(detected), sorted(expected)
    matched = i = j = 0
    while i < len(found) and j < len(wanted):
        gap = found[i] - wanted[j]
        if abs(gap) <= tolerance_seconds:  # with one tolerance for all, pairing the earliest two that fit never costs a pair
            matched, i, j = matched + 1, i + 1, j + 1
        elif gap < 0:
            i += 1
        else:
            j += 1
    return OnsetScore(matched, len(found), len(wanted))


def total_score(detected: Sequence[Sequence[float]], expected: Sequence[Sequence[float]], tolerance_seconds: float = TOLERANCE_SECONDS) -> OnsetScore:
    """Every clip's onsets against its own expected times."""
    assert len(detected) == len(expected)
    return sum((score_onsets(d, e, tolerance_seconds) for d, e in zip(detected, expected, strict=True)), OnsetScore(0, 0, 0))


def chance_score(
    detected: Sequence[Sequence[float]], expected: Sequence[Sequence[float]], tolerance_seconds: float = TOLERANCE_SECONDS
) -> OnsetScore:
    """The same onsets against all the other clips' expected times: what the right number of onsets at the wrong times would score."""
    pairs = [(d, e) for i, d in enumerate(detected) for j, e in enumerate(expected) if i != j]
    return total_score([d for d, _ in pairs], [e for _, e in pairs], tolerance_seconds)


def _running_median(x: Float[Array, "frames"], reach: int) -> Float[Array, "frames"]:
    return np.median(np.lib.stride_tricks.sliding_window_view(np.pad(x, reach, mode="edge"), 2 * reach + 1), axis=1)


def _steepest_rise(wave: Float[Array, "samples"], centre: int, sample_rate_hz: int) -> float:
    """The instant near a sample where the energy after it exceeds that before it by the largest factor, in steps of half a millisecond."""
    step = max(1, round(0.0005 * sample_rate_hz))
    reach, span = round(0.02 * sample_rate_hz) // step, 8
    start = centre - (reach + span) * step
    stretch = np.zeros((2 * reach + 2 * span) * step, np.float32)
    low, high = max(0, start), min(len(wave), start + len(stretch))
    stretch[low - start : high - start] = wave[low:high]
    energy = np.concatenate([[0], np.cumsum((stretch.astype(np.float64) ** 2).reshape(-1, step).sum(axis=1))])
    before = energy[span:-span] - energy[: -2 * span]
    after = energy[2 * span :] - energy[span:-span]
    floor = 1e-2 * after.max() + 1e-12
    return max(0.0, (start + (span + int(np.argmax((after + floor) / (before + floor)))) * step) / sample_rate_hz)
