"""Loudness of the output: the reference's figures, torchaudio's loudness, pieces against the whole, silence and short sounds."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio

from pipeline.encode import WavWriter, wav_pieces, write_wav
from pipeline.normalise import NORMS, LoudnessMeter, Meter, Normalisation, apply, normalise, normalise_wav
from tests.model.fill import checksum, inp

GOLDEN = Path(__file__).parents[1] / "model" / "goldens" / "audio_norm.npz"
WHOLE = ("peak", "rms", "loudness")


def _sound(channels: int, seconds: float, rate_hz: int, seed: int = 0) -> np.ndarray:
    """Noise under a slow tremolo, with a quiet passage that the relative gate drops."""
    random, count = np.random.default_rng(seed), round(seconds * rate_hz)
    level = 0.1 * (1 + np.sin(np.arange(count) / rate_hz * 3)) * np.where(np.arange(count) < count // 3, 0.02, 1)
    return (random.standard_normal((channels, count)) * level).astype(np.float32)


def _uneven(wave: np.ndarray, seed: int = 1) -> list[np.ndarray]:
    """In pieces of 0 to 3 s at 11 kHz, most of them short."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, wave.shape[1], 23))
    return np.split(wave, cuts, axis=1)


@pytest.mark.parametrize("norm", NORMS[:4])
def test_the_references_figures(norm: str) -> None:
    golden = np.load(GOLDEN)
    wave = inp("norm_wave", (1, 1, 22050), 0.3)[0].numpy()
    got, _ = normalise(wave, 44100, Normalisation(norm))
    assert np.abs(got[0, :64] - golden[f"{norm}_slice"]).max() < 1e-5
    assert np.abs(checksum(got) - golden[f"{norm}_sum"]).max() < 1e-5
    assert np.abs(got).max() == pytest.approx(float(golden[f"{norm}_absmax"]), abs=1e-5)


def test_none_leaves_all_and_says_what_will_be_clipped() -> None:
    loud, quiet = np.array([[0.5, -2.0, 0.1]], np.float32), np.array([[0.5, -0.99, 0.1]], np.float32)
    got, note = normalise(loud, 8000, Normalisation("none"))
    assert np.array_equal(got, loud) and note == "peaks 6.0 dB beyond full scale are clipped (norm=none)"
    got, note = normalise(quiet, 8000, Normalisation("none"))
    assert np.array_equal(got, quiet) and note is None


@pytest.mark.parametrize(("channels", "rate_hz", "seconds"), [(1, 44100, 3.3), (2, 11025, 7.77), (5, 8000, 2.0), (1, 24000, 0.41)])
@pytest.mark.parametrize("level", [1.0, 30.0, 0.003])
def test_loudness_is_torchaudios(channels: int, rate_hz: int, seconds: float, level: float) -> None:
    """Loud enough for its filters to clip, and so quiet that most blocks are gated."""
    wave = _sound(channels, seconds, rate_hz) * np.float32(level)
    expected = torchaudio.functional.loudness(torch.from_numpy(wave), rate_hz).item()
    for pieces in ([wave], _uneven(wave)):
        meter = LoudnessMeter(rate_hz, channels)
        for piece in pieces:
            meter.add(piece)
        lkfs = meter.lkfs()
        assert lkfs is not None and lkfs == pytest.approx(expected, abs=1e-3)


def test_loudness_of_a_sine_is_the_standards() -> None:
    """BS.1770-4: a 997 Hz sine at full scale in one channel reads -3.01 LKFS; torchaudio's filters are 0.04 dB off."""
    wave = np.sin(2 * np.pi * 997 * np.arange(48000 * 3) / 48000).astype(np.float32)[None] / 10
    meter = LoudnessMeter(48000, 1)
    meter.add(wave)
    assert meter.lkfs() == pytest.approx(-23.01, abs=0.06)


def test_loudness_can_be_read_in_between() -> None:
    wave, rate_hz = _sound(2, 6.1, 11025), 11025
    asked, unasked = LoudnessMeter(rate_hz, 2), LoudnessMeter(rate_hz, 2)
    for piece in _uneven(wave):
        asked.add(piece)
        unasked.add(piece)
        asked.lkfs()
    assert asked.lkfs() == pytest.approx(unasked.lkfs(), abs=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_pieces_through_a_file_are_the_whole_at_once(tmp_path: Path, norm: str) -> None:
    wave, options = _sound(2, 5.3, 11025) * np.float32(3), Normalisation(norm, headroom_db=4.0, rms_db=-15.0, loudness_lkfs=-14.0)
    expected, note = normalise(wave, 11025, options)
    meter = Meter(11025, 2, options)
    with WavWriter(tmp_path / "whole.wav", 11025, 2, bits=32) as file:
        for piece in _uneven(wave):
            meter.add(piece)
            file.write(piece)
    for given in (meter, None):
        assert normalise_wav(tmp_path / "whole.wav", tmp_path / "out.wav", options, bits=32, meter=given) == note
        (got,) = wav_pieces(tmp_path / "out.wav", 10**6)
        assert np.abs(got - expected).max() < 1e-6
    if not options.needs_whole:
        assert np.array_equal(np.concatenate([apply(piece, options) for piece in _uneven(wave)], axis=1), expected)
    with pytest.raises(ValueError, match="has heard 0 samples"):
        normalise_wav(tmp_path / "whole.wav", tmp_path / "out.wav", options, meter=Meter(11025, 2, options))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("samples", [0, 1, 997, 30000])
def test_silence_stays_silence(norm: str, samples: int) -> None:
    got, note = normalise(np.zeros((2, samples), np.float32), 11025, Normalisation(norm))
    assert got.shape == (2, samples) and not got.any()
    assert (note is not None) == (norm in WHOLE)


def test_what_is_below_the_gate_is_not_made_loud() -> None:
    hiss = np.random.default_rng(0).standard_normal((1, 22050)).astype(np.float32) * 1e-5
    got, note = normalise(hiss, 11025, Normalisation("loudness"))
    assert np.array_equal(got, hiss) and note is not None and note.startswith("silence")


@pytest.mark.parametrize("samples", [5, 997])
def test_sound_shorter_than_a_block_is_one(samples: int) -> None:
    """The gain then is what a block of that energy calls for: all of it counts, none is gated."""
    wave = _sound(1, samples / 11025 + 0.001, 11025, seed=3)[:, :samples] + np.float32(0.1)
    got, note = normalise(wave, 11025, Normalisation("loudness", loudness_lkfs=-30.0))
    meter = LoudnessMeter(11025, 1)
    meter.add(got)
    assert meter.lkfs() == pytest.approx(-30, abs=1e-3) and note is None


def test_clipped_peaks_are_said() -> None:
    wave = np.zeros((1, 11025), np.float32)
    wave[0, 5000] = 0.9
    got, note = normalise(wave, 11025, Normalisation("rms"))
    assert got.max() == 1 and note is not None and note.startswith("peaks 2") and "norm=rms" in note


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="norm is 'max'; expected one of clip, peak, rms, loudness, none"):
        Normalisation("max")
    with pytest.raises(ValueError, match="headroom_db is -1"):
        Normalisation(headroom_db=-1.0)
    with pytest.raises(ValueError, match="loudness of 6 channels"):
        Meter(48000, 6, Normalisation("loudness"))
    meter = Meter(48000, 1, Normalisation())
    meter.add(np.zeros((1, 7), np.float32))
    with pytest.raises(ValueError, match=r"not finite .* between samples 7 and 9"):
        meter.add(np.array([[0.0, np.nan]], np.float32))


def test_a_short_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", wave := _sound(1, 0.5, 8000), 8000)
    normalise_wav(tmp_path / "a.wav", tmp_path / "a.wav", Normalisation("peak"))  # in place: the name changes hands at the end
    (got,) = wav_pieces(tmp_path / "a.wav", 10**6)
    assert np.abs(got).max() == pytest.approx(10 ** (-6 / 20), abs=1e-4) and got.shape == wave.shape
