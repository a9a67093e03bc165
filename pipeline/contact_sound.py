"""The sound of contacts: decaying partials and a short burst of noise for each strike, by material, size and force.

Modal synthesis in its plainest form (van den Doel and Pai 1998: a struck solid is a bank of damped sines, excited the more
brightly the harder and faster the strike), plus a little room. It knows no pictures and no files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

from pipeline.scenes import Contact, Sounder


@dataclass(frozen=True)
class Timbre:
    """A material's voice: partials over the lowest, that one for a body 10 cm in size, and how it is set off and dies away."""

    ratios: tuple[float, ...]
    lowest_hz: float
    decay_seconds: float
    damping: float  # how much faster each higher partial dies
    hardness: float  # 1: the strike sets off the high partials as much as the low ones
    noise: float
    noise_seconds: float


TIMBRES = {
    "metal": Timbre((1.0, 2.76, 5.40, 8.93), 1150.0, decay_seconds=0.32, damping=0.35, hardness=0.75, noise=0.25, noise_seconds=0.004),
    "glass": Timbre((1.0, 2.32, 4.25, 6.63), 1900.0, decay_seconds=0.11, damping=0.30, hardness=0.9, noise=0.35, noise_seconds=0.003),
    "wood": Timbre((1.0, 2.57, 4.95, 7.10), 520.0, decay_seconds=0.040, damping=0.45, hardness=0.5, noise=0.5, noise_seconds=0.006),
    "stone": Timbre((1.0, 1.83, 3.10, 4.70), 760.0, decay_seconds=0.028, damping=0.40, hardness=0.6, noise=0.7, noise_seconds=0.008),
    "rubber": Timbre((1.0, 1.72, 2.61), 165.0, decay_seconds=0.055, damping=0.60, hardness=0.2, noise=0.35, noise_seconds=0.012),
}
PEAK = 0.7
"""Of the waveform, for the hardest strike."""
HISS = 2e-4
"""The room's own noise (-74 dB): no recording is silent to the last bit."""
REVERB_SECONDS = 0.18
REVERB_SHARE = 0.05


def soundtrack(contacts: Sequence[Contact], *, seconds: float, sample_rate_hz: int, rng: np.random.Generator) -> Float[Array, "samples"]:
    """The clip's sound, float32 in [-1, 1]: each contact begins on the sample nearest its time."""
    samples = round(seconds * sample_rate_hz)
    dry = np.zeros(samples)
    detune = {s: rng.uniform(0.94, 1.06, size=8) for s in dict.fromkeys(s for c in contacts for s, _ in c.sounders)}
    for contact in contacts:
        start = round(contact.seconds * sample_rate_hz)
        struck = np.zeros(samples - start)
        for sounder, share in contact.sounders:
            tone = strike(sounder, contact.strength, detune=detune[sounder], sample_rate_hz=sample_rate_hz, rng=rng)[: len(struck)]
            struck[: len(tone)] += share * tone
        struck *= PEAK * (0.12 + 0.88 * contact.strength) / max(1e-9, np.abs(struck).max())
        dry[start:] += struck
    wet = _room(dry, sample_rate_hz, rng)
    sound = dry + REVERB_SHARE * wet + HISS * rng.standard_normal(samples)
    return np.tanh(sound).astype(np.float32)


def strike(sounder: Sounder, strength: float, *, detune: Float[Array, "8"], sample_rate_hz: int, rng: np.random.Generator) -> Float[Array, "samples"]:
    """One body struck once, from the first sample on. Small bodies sound high, soft ones dull, and gentle strikes duller than hard ones."""
    timbre = TIMBRES[sounder.material]
    lowest = timbre.lowest_hz * (0.10 / sounder.size_m) ** 0.7
    seconds = max(6 * timbre.decay_seconds, 8 * timbre.noise_seconds)
    t = np.arange(round(seconds * sample_rate_hz)) / sample_rate_hz
    tone = np.zeros_like(t)
    dullness = (1.6 - strength) * (1.05 - timbre.hardness)
    for k, ratio in enumerate(timbre.ratios):
        hz = lowest * ratio * detune[k]
        if hz < 0.45 * sample_rate_hz:
            loudness = np.exp(-1.3 * dullness * k) * rng.uniform(0.85, 1.0)
            tone += loudness * np.exp(-t / timbre.decay_seconds * (1 + timbre.damping * (ratio - 1))) * np.sin(2 * np.pi * hz * t)
    brief = t[: round(8 * timbre.noise_seconds * sample_rate_hz)]
    burst = rng.standard_normal(len(brief)) * np.exp(-brief / timbre.noise_seconds)
    width = max(1, round((1 - timbre.hardness) * 0.0006 * sample_rate_hz))  # soft things do not hiss
    tone[: len(brief)] += timbre.noise * (0.4 + 0.6 * strength) * np.convolve(burst, np.ones(width) / width**0.5)[: len(brief)]
    return tone


def _room(dry: Float[Array, "samples"], sample_rate_hz: int, rng: np.random.Generator) -> Float[Array, "samples"]:
    """A small room's diffuse answer: noise that dies away, 8 ms after the sound."""
    length = round(REVERB_SECONDS * 3 * sample_rate_hz)
    t = np.arange(length) / sample_rate_hz
    answer = rng.standard_normal(length) * np.exp(-t / REVERB_SECONDS * 3) * (t > 0.008)
    size = 1 << (len(dry) + length - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(dry, size) * np.fft.rfft(answer, size), size)[: len(dry)]
