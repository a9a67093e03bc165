"""How loud generated sound is made: at once, or for a film in two passes over a wav file.

`clip` and `none` need no knowledge of what comes later and go piece by piece. `peak`, `rms` and `loudness` need the whole: a `Meter` is fed with the
pieces while they are written as 32-bit floats, and its gain is applied on a second pass (`normalise_wav`).

    with WavWriter(whole, rate_hz, channels, bits=32) as file:
        for piece in pieces:
            meter.add(piece)
            file.write(piece)
    note = normalise_wav(whole, "out.wav", options, meter=meter)

The defaults are the published ones. Knows no video, no Ray and no model.
"""

from array import array
from dataclasses import dataclass
from math import isfinite, log10
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64
from torchaudio.functional import highpass_biquad, treble_biquad

from pipeline.decode import Sound
from pipeline.encode import PIECE_SAMPLES, WavWriter, wav_format, wav_pieces

NORMS = ("clip", "peak", "rms", "loudness", "none")
GATE_SECONDS = 0.4
"""ITU-R BS.1770-4: loudness is measured in blocks of this length, each beginning a quarter of one after the last."""
GATE_LKFS = -70.0
"""Blocks below this do not count; a sound that has no others is taken for silence."""
RELATIVE_GATE_LU = -10.0
"""Nor do blocks so far below the mean of the others."""
BIAS_LKFS = -0.691
CHANNEL_WEIGHTS = (1.0, 1.0, 1.0, 1.41, 1.41)
SETTLE_SECONDS = 0.25
"""Sound before a piece that its filters are given again: the slower one, a high-pass at 38 Hz, forgets it to one part in 10^25."""
MEASURE_SECONDS = 1.0
"""Small pieces are collected up to this length, so that little is filtered twice."""


@dataclass(frozen=True)
class Normalisation:
    """How loud generated sound is made."""

    norm: str = "clip"
    """clip: samples beyond the headroom are clipped, nothing else changes (as published). peak: the largest sample comes to the headroom. rms and
    loudness: scaled to a level, then clipped to full scale. none: left as it is; what is beyond full scale is clipped by 16-bit files and by AAC."""
    headroom_db: float = 6.0
    """For clip and peak: how far below full scale the largest sample may be, in dB."""
    rms_db: float = -18.0
    """For rms: root mean square of the channels' mean, in dB of full scale."""
    loudness_lkfs: float = -12.0
    """For loudness: ITU-R BS.1770-4 loudness, in LKFS."""

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm is {self.norm!r}; expected one of {', '.join(NORMS)}")
        if self.headroom_db < 0:
            raise ValueError(f"headroom_db is {self.headroom_db:g}; expected at least 0")

    @property
    def needs_whole(self) -> bool:
        """Whether nothing can be written before the end is known."""
        return self.norm in ("peak", "rms", "loudness")


class Meter:
    """Measures sound piece by piece, and says what to do with it; memory grows by 80 bytes a second."""

    def __init__(self, sample_rate_hz: int, channels: int, options: Normalisation) -> None:
        self.options = options
        self.samples = 0
        """Samples per channel so far."""
        self.peak = 0.0
        """The largest sample so far, without its sign."""
        self._mono_squares = 0.0
        self._loudness = LoudnessMeter(sample_rate_hz, channels) if options.norm == "loudness" else None

    def add(self, wave: Sound) -> None:
        """The next piece. Raises ValueError where it is not finite."""
        if not wave.shape[1]:
            return
        peak = float(np.abs(wave).max())
        if not isfinite(peak):
            raise ValueError(f"the sound is not finite (NaN or infinite) between samples {self.samples} and {self.samples + wave.shape[1]}")
        self.samples += wave.shape[1]
        self.peak = max(self.peak, peak)
        self._mono_squares += float(np.square(wave.mean(axis=0, dtype=np.float64)).sum())
        if self._loudness is not None:
            self._loudness.add(wave)

    @property
    def rms(self) -> float:
        """Root mean square of the channels' mean."""
        return (self._mono_squares / self.samples) ** 0.5 if self.samples else 0.0

    @property
    def lkfs(self) -> float | None:
        """Loudness so far; None for silence, or if it is not measured."""
        return self._loudness.lkfs() if self._loudness is not None else None

    @property
    def is_silent(self) -> bool:
        """Whether there is nothing that could be made louder: no sound at all, or for loudness none above its absolute gate."""
        match self.options.norm:
            case "rms":
                return self.rms == 0
            case "loudness":
                return self.lkfs is None
            case _:
                return self.peak == 0

    def gain(self) -> float:
        """The factor for every sample. Silence stays as it is: 1."""
        options = self.options
        if not options.needs_whole or self.is_silent:
            return 1.0
        match options.norm:
            case "peak":
                return 10 ** (-options.headroom_db / 20) / self.peak
            case "rms":
                return 10 ** (options.rms_db / 20) / self.rms
            case _:
                assert self.lkfs is not None
                return 10 ** ((options.loudness_lkfs - self.lkfs) / 20)

    def note(self) -> str | None:
        """What a listener should know; None if there is nothing."""
        if self.is_silent:
            return f"silence: left as it is, not brought to a level by norm={self.options.norm}" if self.options.needs_whole else None
        over_db = 20 * log10(self.peak * self.gain()) if self.options.norm != "clip" and self.peak else 0.0
        return f"peaks {over_db:.1f} dB beyond full scale are clipped (norm={self.options.norm})" if over_db > 1e-6 else None


class LoudnessMeter:
    """ITU-R BS.1770-4 loudness of a sound that comes in pieces; torchaudio's `Loudness` of the whole, its filters included, which clip to [-1, 1].

    Differs: sound shorter than a gating block is one block, and where every block is gated there is no loudness instead of NaN.
    """

    def __init__(self, sample_rate_hz: int, channels: int) -> None:
        if channels > len(CHANNEL_WEIGHTS):
            raise ValueError(f"loudness of {channels} channels is not defined; expected at most {len(CHANNEL_WEIGHTS)}: choose another norm")
        self.sample_rate_hz = sample_rate_hz
        self._weights = np.array(CHANNEL_WEIGHTS[:channels])
        self._block = round(GATE_SECONDS * sample_rate_hz)
        self._step = round(self._block / 4)
        self._before = np.zeros((channels, 0), np.float32)  # has been measured, and settles the filters
        self._waiting: list[Sound] = []
        self._energies = array("d")
        self._squares = np.zeros(0)  # from where the next block begins

    def add(self, wave: Sound) -> None:
        """The next piece, [channels, samples]."""
        self._waiting.append(wave)
        if sum(piece.shape[1] for piece in self._waiting) >= MEASURE_SECONDS * self.sample_rate_hz:
            self._measure()

    def lkfs(self) -> float | None:
        """Loudness of what has come so far; None if no block of it is above the absolute gate."""
        if self._waiting:
            self._measure()
        energies = np.array(self._energies if self._energies else [self._squares.mean()] if len(self._squares) else [])
        energies = energies[_lkfs(energies) > GATE_LKFS]
        if not len(energies):
            return None
        loud = energies[_lkfs(energies) > _lkfs(energies.mean(keepdims=True)) + RELATIVE_GATE_LU]
        return float(_lkfs(loud.mean(keepdims=True))[0])

    def _measure(self) -> None:
        """Filter what is waiting, and take the blocks that are complete."""
        known = self._before.shape[1]
        wave = np.concatenate([self._before, *self._waiting], axis=1)
        self._waiting = []
        weighted = treble_biquad(torch.from_numpy(wave), self.sample_rate_hz, 4.0, 1500.0, 0.5**0.5)
        weighted = highpass_biquad(weighted, self.sample_rate_hz, 38.0, 0.5).numpy()[:, known:]
        self._before = wave[:, -round(SETTLE_SECONDS * self.sample_rate_hz) :].copy()
        squares = np.concatenate([self._squares, self._weights @ np.square(weighted.astype(np.float64))])
        starts = np.arange(0, len(squares) - self._block + 1, self._step)
        sums = np.concatenate([[0.0], np.cumsum(squares)])
        self._energies.extend((sums[starts + self._block] - sums[starts]) / self._block)
        self._squares = squares[len(starts) * self._step :].copy()


def apply(wave: Sound, options: Normalisation, gain: float = 1.0) -> Sound:
    """A piece made as loud as the options say, with the meter's gain where they need the whole."""
    match options.norm:
        case "clip":
            most = np.float32(10 ** (-options.headroom_db / 20))
            return wave.clip(-most, most)
        case "peak":
            return wave * np.float32(gain)
        case "none":
            return wave
        case _:
            return (wave * np.float32(gain)).clip(-1, 1)


def normalise(audio: Sound, sample_rate_hz: int, options: Normalisation) -> tuple[Sound, str | None]:
    """A whole sound made as loud as the options say, and the meter's note."""
    meter = Meter(sample_rate_hz, audio.shape[0], options)
    meter.add(audio)
    return apply(audio, options, meter.gain()), meter.note()


def normalise_wav(wav_path: str | Path, out_path: str | Path, options: Normalisation, *, bits: int = 16, meter: Meter | None = None) -> str | None:
    """A wav file made as loud as the options say, at constant memory; the meter's note. Without a meter that has heard it, it is read twice."""
    form = wav_format(wav_path)
    if meter is None:
        meter = Meter(form.sample_rate_hz, form.channels, options)
        for piece in wav_pieces(wav_path, PIECE_SAMPLES):
            meter.add(piece)
    if meter.samples != form.samples:
        raise ValueError(f"the meter has heard {meter.samples} samples; {wav_path} has {form.samples}")
    gain = meter.gain()
    with WavWriter(out_path, form.sample_rate_hz, form.channels, bits=bits) as out:
        for piece in wav_pieces(wav_path, PIECE_SAMPLES):
            out.write(apply(piece, options, gain))
    return meter.note()


def _lkfs(energy: Float64[np.ndarray, "blocks"]) -> Float64[np.ndarray, "blocks"]:
    """Loudness of weighted energies; minus infinity for none."""
    with np.errstate(divide="ignore"):
        return BIAS_LKFS + 10 * np.log10(energy)
