"""What is told of made pictures and sounds is what was made."""

import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
from av.audio.resampler import AudioResampler

from pipeline.decode import MediaError
from pipeline.isolate import Limits, call
from pipeline.media_scores import (
    SCORERS,
    Vad,
    bandwidth_hz,
    cut_frames,
    decoded,
    loudness,
    silent_fraction,
    speech_scores,
    still_fraction,
    still_frames,
    vad_file,
)
from pipeline.scorers import Item, ScoreOptions, registered
from tests.pipeline.clips import make_clip

HEIGHT, WIDTH = 64, 86


def scene(seed: int) -> np.ndarray:
    """A picture: a few flat patches in colours of its own, with some noise on them."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(30, 220, (4, 5, 3))
    large = np.kron(patches, np.ones((HEIGHT // 4, WIDTH // 5 + 1, 1)))[:, :WIDTH]
    return (large + rng.normal(0, 4, large.shape)).clip(0, 255).astype(np.uint8)


def shots(*lengths: int) -> np.ndarray:
    """Each a still picture of its own for so many frames, with noise from frame to frame as encoding leaves it."""
    rng = np.random.default_rng(7)
    pictures = np.concatenate([np.repeat(scene(seed)[None], length, 0) for seed, length in enumerate(lengths)])
    return (pictures + rng.normal(0, 1, pictures.shape)).clip(0, 255).astype(np.uint8)


# --- pictures -------------------------------------------------------------------------------------------------------------------------


def test_hard_cuts_are_found_where_they_are() -> None:
    assert cut_frames(shots(31, 17, 44)) == [31, 48]
    assert cut_frames(shots(92)) == []
    assert cut_frames(shots(7)) == [] and cut_frames(shots(9, 3)) == []  # too short for what is compared


def test_flashes_are_no_cuts() -> None:
    pictures = shots(60)
    pictures[20:23] = 255
    pictures[40:44] = np.maximum(pictures[40:44], 180)
    assert cut_frames(pictures) == []
    pictures = shots(30, 30)
    pictures[14:16] = 255  # near a cut, which stays one
    assert cut_frames(pictures) == [30]


def test_motion_pans_and_jerks_are_no_cuts() -> None:
    wide = np.concatenate([scene(seed) for seed in range(6)], axis=1)
    pan = np.stack([wide[:, 5 * at : 5 * at + WIDTH] for at in range(80)])  # in a second and a half through five pictures
    assert cut_frames(pan) == []
    square = np.stack([scene(1)] * 60)
    for at, picture in enumerate(square):
        picture[10:40, (3 * at) % 60 : (3 * at) % 60 + 20] = 250
    assert cut_frames(square) == []
    jerk = shots(60)
    jerk[33:] = np.roll(jerk[33:], (9, 15), (1, 2))
    assert cut_frames(jerk) == []


def test_fades_are_no_hard_cuts() -> None:
    weight = np.linspace(0, 1, 25)[:, None, None, None]
    fade = (scene(1) * (1 - weight) + scene(2) * weight).astype(np.uint8)
    assert cut_frames(np.concatenate([np.stack([scene(1)] * 25), fade, np.stack([scene(2)] * 25)])) == []


def test_a_cut_while_the_camera_moves_is_found() -> None:
    pictures = np.concatenate([np.stack([np.roll(scene(seed), 2 * at, 1) for at in range(35)]) for seed in (3, 4)])
    assert cut_frames(pictures) == [35]


def test_still_pictures() -> None:
    assert still_fraction(shots(50)) == 1.0
    moving = shots(50)
    for at in range(25, 50):
        moving[at, 20:36, at : at + 16] = 255
    assert still_fraction(moving) == pytest.approx(20 / 45)  # the 25 pictures from number 5 on, less the first, are as 0.2 s before
    held = np.repeat(np.stack([np.roll(scene(1), 3 * at, 1) for at in range(17)]), 3, 0)  # 8 pictures a second, each shown three times
    assert still_fraction(held) == 0.0
    assert still_fraction(shots(5)) is None


def test_a_slide_show_is_still_and_has_cuts() -> None:
    pictures = shots(50, 50)
    assert still_fraction(pictures) == pytest.approx(90 / 95) and cut_frames(pictures) == [50]


# --- sound ----------------------------------------------------------------------------------------------------------------------------


def noise(seconds: float, rate_hz: int, level: float = 0.1, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(3).normal(0, level, (channels, round(seconds * rate_hz))).astype(np.float32)


def tone(seconds: float, rate_hz: int, hz: float, level: float) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)).astype(np.float32)[None]


def resampled(wave: np.ndarray, rate_hz: int, to_hz: int) -> np.ndarray:
    frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
    frame.rate = rate_hz
    resampler = AudioResampler(format="fltp", layout="mono", rate=to_hz)
    return np.concatenate([piece.to_ndarray() for piece in (*resampler.resample(frame), *resampler.resample(None))], 1)


def test_loudness_is_that_of_a_tone() -> None:
    # ITU-R BS.1770-4: a sine of 997 Hz at 0 dB of full scale in one channel measures -3.01 LKFS.
    found = loudness(tone(3.1, 48000, 997.0, 0.1), 48000)
    assert found["loudness_lufs"] == pytest.approx(-23.01, abs=0.05) and found["peak_dbfs"] == pytest.approx(-20, abs=0.01)
    assert loudness(np.zeros((2, 44100), np.float32), 44100) == {"loudness_lufs": None, "peak_dbfs": None}


def test_silent_fraction() -> None:
    sound = noise(2.0, 16000)
    sound[:, 8000:24000] *= 1e-4  # one of two seconds at -100 dB
    assert silent_fraction(sound, 16000, -60.0) == pytest.approx(0.5)
    assert silent_fraction(sound, 16000, -110.0) == 0.0
    assert silent_fraction(np.zeros((1, 777), np.float32), 16000, -60.0) == 1.0
    assert silent_fraction(np.zeros((1, 0), np.float32), 16000, -60.0) is None


@pytest.mark.parametrize("own_hz", [8000, 16000, 22050, 32000])
def test_bandwidth_tells_sound_that_was_resampled(own_hz: int) -> None:
    narrow = resampled(resampled(noise(2.3, 44100), 44100, own_hz), own_hz, 44100)
    assert own_hz / 2 <= bandwidth_hz(narrow, 44100) <= 1.12 * own_hz / 2


def test_bandwidth_of_what_is_not_cut_off() -> None:
    assert bandwidth_hz(noise(1.1, 44100), 44100) == 22050
    assert bandwidth_hz(noise(1.1, 44100, 0.001) + tone(1.1, 44100, 50.0, 0.3), 44100) == 22050  # hum over quiet noise
    brown = np.cumsum(noise(1.1, 44100, 0.001), 1)
    assert bandwidth_hz(brown - brown.mean(), 44100) == 22050  # falls by 6 dB in each octave
    assert bandwidth_hz(np.zeros((2, 44100), np.float32), 44100) is None
    assert bandwidth_hz(noise(0.01, 16000), 16000) == 8000  # shorter than a block


# --- speech ---------------------------------------------------------------------------------------------------------------------------


def vowels(seconds: float) -> np.ndarray:
    """Something like a voice at 16 kHz: pulses at a changing pitch through the formants of vowels, four syllables a second."""
    rng, rate_hz = np.random.default_rng(5), 16000
    count = round(seconds * rate_hz)
    time = np.arange(count) / rate_hz
    pitch = 125 + 20 * np.sin(2 * np.pi * 0.7 * time) + np.cumsum(rng.normal(0, 0.02, count))
    phase = np.cumsum(pitch / rate_hz)
    source = np.diff(np.floor(phase), prepend=0) - 0.02 + rng.normal(0, 0.02, count)
    out = np.zeros(count)
    for number, start in enumerate(range(0, count, 4000)):
        piece = source[start : start + 4000]
        spectrum, hz = np.fft.rfft(piece, 8192), np.fft.rfftfreq(8192, 1 / rate_hz)
        gain = sum(1 / (1 + ((hz - formant) / 70) ** 2) for formant in ((700, 1200, 2600), (300, 2200, 3000), (400, 800, 2500))[number % 3])
        shaped = np.fft.irfft(spectrum * gain)[: len(piece)]
        out[start : start + len(piece)] = shaped * np.hanning(len(piece)) ** 0.5
    return (0.3 * out / np.abs(out).max()).astype(np.float32)


def test_a_voice_is_speech_and_noise_is_none() -> None:
    pytest.importorskip("silero_vad")
    voice, hiss = vowels(3.0), noise(2.1, 16000)[0]
    together = Vad()([voice, hiss, np.zeros(0, np.float32)])
    assert [len(found) for found in together] == [94, 66, 0]
    speaking, hissing = (speech_scores(found) for found in together[:2])
    assert speaking["speech_fraction"] > 0.4 and speaking["speech_probability"] > 0.4, speaking
    assert hissing["speech_fraction"] == 0 and hissing["speech_probability"] < 0.1, hissing
    assert speech_scores(together[2]) == {"speech_probability": None, "speech_fraction": None}
    alone = Vad()([hiss])[0]
    np.testing.assert_allclose(alone, together[1], atol=1e-5)  # longer ones beside it change nothing


def test_without_its_package_speech_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    monkeypatch.setattr("pipeline.media_scores.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[score\]'"):
        vad_file()


# --- one decode -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    make_clip(path, seconds=Fraction(3), width=112, height=80, audio_rate_hz=22050)
    return path.read_bytes()


def test_a_clip_is_decoded_once_into_what_is_needed(clip: bytes) -> None:
    media = call(decoded, clip, frozenset({"pictures", "sound", "speech", "stills"}), limits=Limits())
    assert media.frames == 75 and media.pictures is not None and media.pictures.shape == (75, 64, 88, 3)
    assert media.sound is not None and media.sound.shape == (2, 66150) and media.sound_rate_hz == 22050
    assert media.speech is not None and media.speech.shape == (48000,)
    assert media.stills is not None and media.stills.shape == (10, 80, 112, 3)
    alone = decoded(clip, frozenset({"sound"}))
    assert alone.pictures is alone.stills is alone.speech is None and np.array_equal(alone.sound, media.sound)
    assert decoded(clip, frozenset({"pictures"})).sound is None
    assert np.array_equal(decoded(clip, frozenset({"stills"})).stills, media.stills)


def test_still_frames_are_those_that_imagebind_looks_at() -> None:
    assert still_frames(250) == [0, 49, 50, 99, 100, 149, 150, 199, 200, 249]
    # 3.2 s: clips begin at 0, 0.3, 0.6, 0.9 and 1.2 s, and a picture k is at k / 25 s.
    assert still_frames(80) == [0, 49, 8, 57, 15, 64, 23, 72, 30, 79]
    assert still_frames(30) == [0, 29] * 5 and still_frames(1) == [0, 0] * 5


def test_a_clip_without_sound_is_an_error_of_scorers_of_sound(tmp_path: Path) -> None:
    make_clip(tmp_path / "mute.mp4", seconds=Fraction(1), audio_codec=None)
    item = Item("mute", {}, lambda _: np.zeros(0), decoded(str(tmp_path / "mute.mp4"), frozenset({"sound", "pictures"})))
    scorers = {scorer.name: scorer.make(ScoreOptions()) for scorer in SCORERS if scorer.usual}
    assert scorers["cuts"]([item]) == [{"cuts": 0}]
    for name in ("loudness", "silence", "bandwidth"):
        with pytest.raises(MediaError, match="no_audio"):
            scorers[name]([item])


def test_every_usual_scorer_gives_its_columns(clip: bytes) -> None:
    item = Item("clip", {}, lambda _: np.zeros(0), decoded(clip, frozenset({"pictures", "sound"})))
    for scorer in registered().values():
        if scorer.usual and scorer.kind == "media":
            (row,) = scorer.make(ScoreOptions())([item])
            assert row.keys() == scorer.columns.keys(), scorer.name
            for column, kind in scorer.columns.items():
                assert pa.array([row[column]], kind).null_count == 0
        assert scorer.summary and all(name.isidentifier() for name in (scorer.name, *scorer.columns))


def test_options_that_decide_scores_are_in_their_version() -> None:
    silence = next(scorer for scorer in SCORERS if scorer.name == "silence")
    assert silence.version(ScoreOptions()) != silence.version(ScoreOptions(silence_dbfs=-50.0))
    assert silence.version(ScoreOptions()) == silence.version(ScoreOptions(device="cpu"))
