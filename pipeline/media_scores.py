"""What pictures and sound say of a clip without a large network: loudness, silence, still pictures, cuts, bandwidth, speech.

Each is a plain measure on arrays, with its threshold beside it. Speech is Silero VAD's answer, whose weights come with the package `silero-vad`.
Also the one decode that all of them look at. Knows no datasets and no Ray.
"""

import threading
import warnings
from collections.abc import Collection, Sequence
from importlib.metadata import version as package_version
from importlib.util import find_spec
from math import ceil, log10
from pathlib import Path

import numpy as np
import pyarrow as pa
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from jaxtyping import Float32, Float64, UInt8

from configs.clock import FRAME_RATE_HZ, SYNCHFORMER_RATE_HZ
from pipeline.decode import OpenClip, PictureFit, Pictures, Sound, open_clip
from pipeline.media import MediaError
from pipeline.scorers import Item, Media, Need, ScoreOptions, Scorer, Scores, Scoring, each

SMALL_SIDE = 64
"""Pixels of the shorter side of the pictures that are compared with each other."""
MOST_CHANNELS = 2
"""More are mixed to stereo, as a player does."""
STILL_CLIPS = 5
STILL_CLIP_SECONDS = 2
"""ImageBind looks at the first and the last picture of so many clips of this length, spread evenly."""

SILENCE_SECONDS = 0.1
"""Length of the pieces of sound that are silent or not."""
STILL_FRAMES = 5
"""Pictures are compared with those 0.2 s before: video of 8 pictures a second, held, still moves."""
STILL_BLOCK = 8
STILL_LEVELS = 3.0
"""A picture has not changed if no block of 8 x 8 small pixels has by more than so many levels of 255 on average. Encoding leaves about one."""
CUT_FRAMES = 5
"""A cut must tell apart every picture of the 0.2 s before from every one of the 0.2 s after: a flash is over by then."""
CUT_SIDE = 16
"""Short side in pixels of the pictures compared for cuts: averages in which small things that move hardly show."""
CUT_LEVELS = 12.0
"""The least difference of a cut, in mean levels of 255."""
CUT_COLOURS = 0.2
"""And the least part of the picture whose colours, in 8 x 8 x 8 bins, are others after it: a jerk of the camera shows the same ones elsewhere."""
CUT_RATIO = 3.0
"""By how much it must be above the mean difference from picture to picture around it: motion and pans are large everywhere."""
CUT_AROUND = 12
"""Pictures to either side of a cut that tell how much moves."""
BAND_HZ = 100
BAND_FLOOR_DBFS = -120.0
"""Below this, a band holds nothing but the rounding of samples."""
BAND_DROP_DB = 20.0
"""The sound's band ends where everything above is so far below the half octave before."""
LOWEST_BAND_HZ = 500
FFT_SAMPLES = 4096
VAD_WINDOW = 512
"""Samples at 16 kHz of which Silero VAD says how probably they are speech: 32 ms."""
SPEECH = 0.5
"""From this probability on it is taken for speech, as published."""


# --- one decode for all ---------------------------------------------------------------------------------------------------------------


def decoded(source: str | bytes, needs: Collection[Need]) -> Media:
    """A clip, as far as it is looked at. Raises MediaError. Knows numpy only: it runs in the process for native decoding."""
    with open_clip(source) as clip:
        sound, rate_hz, speech = _heard(clip, needs)
        pictures, stills = _seen(clip, needs)
        return Media(clip.frames, pictures, sound, rate_hz, speech, stills)


def _heard(clip: OpenClip, needs: Collection[Need]) -> tuple[Sound | None, int, Float32[np.ndarray, "samples"] | None]:
    if not clip.has_sound or not {"sound", "speech"} & set(needs):
        return None, 0, None
    _, channels = clip.sound_format()
    (sound, rate_hz), *mono = clip.sounds((None, min(channels, MOST_CHANNELS)), *([(SYNCHFORMER_RATE_HZ, None)] if "speech" in needs else []))
    return sound, rate_hz, mono[0][0].mean(0) if mono else None


def _seen(clip: OpenClip, needs: Collection[Need]) -> tuple[Pictures | None, Pictures | None]:
    if not {"pictures", "stills"} & set(needs):
        return None, None
    small, whole, to_rgb = PictureFit(SMALL_SIDE, "yuv420p"), PictureFit(None, "yuv420p"), VideoReformatter()
    wanted = set(still_frames(clip.frames)) if "stills" in needs else set()
    pictures, stills, before = [], {}, None
    for number, frame in enumerate(clip.pictures(pixel_format=None)):
        if "pictures" in needs:
            pictures.append(pictures[-1] if frame is before else _rgb(to_rgb, small(frame)))
        if number in wanted:
            stills[number] = _rgb(to_rgb, whole(frame))
        before = frame
    if before is None:
        raise MediaError("too_short", "its pictures last for less than half a frame")
    shown = np.stack([stills[number] for number in still_frames(clip.frames)]) if wanted else None
    return np.stack(pictures) if pictures else None, shown


def _rgb(to_rgb: VideoReformatter, frame: VideoFrame) -> UInt8[np.ndarray, "height width 3"]:
    return to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()


def still_frames(frames: int) -> list[int]:
    """Which pictures ImageBind looks at, by number: those where its clips begin and end; of a shorter video, the same again and again.

    As pytorchvideo's `ConstantClipsPerVideoSampler` and `UniformTemporalSubsample(2)` have it: from a to b seconds are pictures `ceil(a * rate)` to
    before `ceil(b * rate)`.
    """
    found = []
    for clip in range(STILL_CLIPS):
        # In frames times STILL_CLIPS - 1, so that all are whole numbers.
        start = max(frames - STILL_CLIP_SECONDS * FRAME_RATE_HZ, 0) * clip
        first, end = (-(-at // (STILL_CLIPS - 1)) for at in (start, start + STILL_CLIP_SECONDS * FRAME_RATE_HZ * (STILL_CLIPS - 1)))
        found += [first, min(end, frames) - 1]
    return found


def _sound(item: Item) -> tuple[Sound, int]:
    assert item.media is not None
    if item.media.sound is None:
        raise MediaError("no_audio", "the clip has no sound")
    return item.media.sound, item.media.sound_rate_hz


def _pictures(item: Item) -> Pictures:
    assert item.media is not None and item.media.pictures is not None
    return item.media.pictures


# --- sound ----------------------------------------------------------------------------------------------------------------------------


def loudness(sound: Sound, rate_hz: int) -> Scores:
    """Integrated loudness after ITU-R BS.1770-4, and the largest sample; None for silence."""
    from pipeline.normalise import LoudnessMeter  # torch, which decoding needs not

    meter = LoudnessMeter(rate_hz, len(sound))
    meter.add(sound)
    peak = float(np.abs(sound).max(initial=0))
    return {"loudness_lufs": meter.lkfs(), "peak_dbfs": 20 * log10(peak) if peak else None}


def silent_fraction(sound: Sound, rate_hz: int, silence_dbfs: float) -> float | None:
    """The part of the sound, in tenths of a second, in which the mean of its channels' powers is below a level. None for no sound at all."""
    length = round(SILENCE_SECONDS * rate_hz)
    whole = max(1, sound.shape[1] // length)
    power = np.square(sound[:, : whole * length], dtype=np.float64).mean(0)
    if not len(power):
        return None
    return float((np.array([piece.mean() for piece in np.array_split(power, whole)]) < 10 ** (silence_dbfs / 10)).mean())


def bandwidth_hz(sound: Sound, rate_hz: int) -> float | None:
    """Up to which frequency there is sound: below half the sample rate where a recording, a telephone or an encoder has cut it off.

    It is the highest edge of a band of 100 Hz above which everything is 20 dB or more below the median of the half octave before: noise counts, and
    a falling spectrum has no edge. What swresample brings from 16 kHz to 44.1 kHz ends between 8 and 9 kHz. None for silence.
    """
    levels = _band_levels(sound, rate_hz)
    if levels is None:
        return None
    nyquist = rate_hz / 2
    for edge in range(len(levels) - 1, LOWEST_BAND_HZ // BAND_HZ, -1):
        least = np.median(levels[ceil(edge / 2**0.5) - 1 : edge]) - BAND_DROP_DB
        if levels[edge - 1] > least >= levels[edge:].max():
            return float(edge * BAND_HZ)
    return nyquist


def _band_levels(sound: Sound, rate_hz: int) -> Float64[np.ndarray, "bands"] | None:
    """Mean power of each band over the whole sound, in dB of full scale; None if no band holds anything."""
    wave = sound.mean(0)
    wave = np.pad(wave, (0, max(0, FFT_SAMPLES - len(wave))))
    window = np.blackman(FFT_SAMPLES).astype(np.float32)  # its leakage is below what is looked for
    views = np.lib.stride_tricks.sliding_window_view(wave, FFT_SAMPLES)[:: FFT_SAMPLES // 2]
    power = np.zeros(FFT_SAMPLES // 2 + 1)
    for start in range(0, len(views), 64):
        power += np.square(np.abs(np.fft.rfft(views[start : start + 64] * window, axis=1)), dtype=np.float64).sum(0)
    power /= len(views) * (window.sum(dtype=np.float64) / 2) ** 2
    band = (np.arange(len(power)) * rate_hz // FFT_SAMPLES) // BAND_HZ
    means = np.bincount(band, power) / np.maximum(np.bincount(band), 1)
    with np.errstate(divide="ignore"):
        levels = np.maximum(10 * np.log10(means), BAND_FLOOR_DBFS)[: int(rate_hz // 2 // BAND_HZ)]
    return levels if levels.max(initial=BAND_FLOOR_DBFS) > BAND_FLOOR_DBFS else None


# --- pictures -------------------------------------------------------------------------------------------------------------------------


def still_fraction(pictures: Pictures) -> float | None:
    """The part of the time in which nothing in the picture has changed for 0.2 s; None for a clip that is shorter."""
    grey = pictures.mean(3, dtype=np.float32)
    if len(grey) <= STILL_FRAMES:
        return None
    changed = [_largest_block(np.abs(grey[at] - grey[at - STILL_FRAMES])) > STILL_LEVELS for at in range(STILL_FRAMES, len(grey))]
    return 1 - float(np.mean(changed))


def _largest_block(change: Float32[np.ndarray, "height width"]) -> float:
    """The mean over the block that has most."""
    rows, columns = (np.linspace(0, size, max(1, size // STILL_BLOCK), endpoint=False).astype(int) for size in change.shape)
    sums = np.add.reduceat(np.add.reduceat(change, rows, 0), columns, 1)
    sizes = np.diff(rows, append=change.shape[0])[:, None] * np.diff(columns, append=change.shape[1])
    return float((sums / sizes).max())


def cut_frames(pictures: Pictures) -> list[int]:
    """Hard cuts, each as the number of the first picture after it.

    Pictures are compared by the mean absolute difference of their colours at 16 pixels, and by their histograms of colours. Between the 0.2 s before
    and the 0.2 s after a cut every pair of pictures differs in both, while after a flash it is as before, and after a jerk the colours are the same;
    and the least of the differences is far above those from picture to picture nearby, which a moving camera has everywhere (the adaptive detector
    of PySceneDetect; differs: every pair, and both measures). Not found: cuts in the first and last 0.2 s, one of two within 0.2 s, fades, and jumps
    within a scene that stays as it looks.
    """
    if len(pictures) < 2 * CUT_FRAMES:
        return []
    small = _averaged(pictures, max(1, min(pictures.shape[1:3]) // CUT_SIDE)).reshape(len(pictures), -1)
    levels, colours = _least(small) / small.shape[1], _least(_histograms(pictures)) / 2
    steps = np.abs(np.diff(small, axis=0, prepend=small[:1])).mean(1)
    found = []
    for at in range(CUT_FRAMES, len(small) - CUT_FRAMES + 1):
        near = steps[max(1, at - CUT_AROUND) : at + CUT_AROUND + 1]
        around = (near.sum() - steps[at]) / (len(near) - 1)
        if levels[at] >= max(CUT_LEVELS, CUT_RATIO * around) and colours[at] >= CUT_COLOURS:
            found.append(at)
    return found


def _least(vectors: Float32[np.ndarray, "frames numbers"]) -> Float32[np.ndarray, "frames"]:
    """For each picture k the least sum of differences between one of the `CUT_FRAMES` before it and one of as many from it on."""
    least = np.full(len(vectors), np.inf, np.float32)
    for before in range(1, CUT_FRAMES + 1):
        for after in range(CUT_FRAMES):
            apart = np.abs(vectors[before + after :] - vectors[: len(vectors) - before - after]).sum(1)
            ours = least[before : before + len(apart)]
            np.minimum(ours, apart, out=ours)
    return least


def _histograms(pictures: Pictures) -> Float32[np.ndarray, "frames 512"]:
    """Which part of each picture has which colour, in 8 x 8 x 8 bins."""
    bins = (pictures >> 5).reshape(len(pictures), -1, 3).astype(np.int16) @ np.array([64, 8, 1], np.int16)
    return np.stack([np.bincount(row, minlength=512) for row in bins]).astype(np.float32) / bins.shape[1]


def _averaged(pictures: Pictures, side: int) -> Float32[np.ndarray, "frames rows columns 3"]:
    """Means over squares of `side` pixels; what is left over at the right and below is left out."""
    frames, height, width = len(pictures), pictures.shape[1] // side, pictures.shape[2] // side
    cut = pictures[:, : height * side, : width * side].reshape(frames, height, side, width, side, 3)
    return cut.mean((2, 4), dtype=np.float32)


# --- speech ---------------------------------------------------------------------------------------------------------------------------


class Vad:
    """Silero VAD (github.com/snakers4/silero-vad, MIT) from the weights in its package, whose own code is not imported: that would set torch's
    threads for the whole process."""

    def __init__(self) -> None:
        import torch

        self._lock = threading.Lock()  # the network keeps its state from call to call
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            self._model = torch.jit.load(vad_file(), map_location="cpu").eval()

    def __call__(self, waves: Sequence[Float32[np.ndarray, "_"]]) -> list[Float32[np.ndarray, "_"]]:
        """How probably each 32 ms of 16 kHz sounds is speech; of the last, what is missing is silence. In one batch: what comes later changes nothing
        before it."""
        import torch

        counts = [ceil(len(wave) / VAD_WINDOW) for wave in waves]
        batch = torch.zeros(len(waves), max(1, *counts) * VAD_WINDOW)
        for row, wave in zip(batch, waves, strict=True):
            row[: len(wave)] = torch.from_numpy(wave)
        with self._lock, torch.inference_mode():
            self._model.reset_states()
            found = [self._model(batch[:, at : at + VAD_WINDOW], SYNCHFORMER_RATE_HZ)[:, 0] for at in range(0, batch.shape[1], VAD_WINDOW)]
        return [row[:count].numpy() for row, count in zip(torch.stack(found, 1), counts, strict=True)]


def vad_file() -> Path:
    """The network in the package silero-vad. ValueError says how to install it."""
    found = find_spec("silero_vad")
    if found is None or not found.submodule_search_locations:
        raise ValueError("the scorer speech needs the package silero-vad, which brings its weights (MIT): pip install -e '.[score]'")
    return Path(next(iter(found.submodule_search_locations))) / "data" / "silero_vad.jit"


def speech_scores(probabilities: Float32[np.ndarray, "windows"]) -> Scores:
    """The mean probability, and the part of the time that is taken for speech; None for no sound at all."""
    if not len(probabilities):
        return {"speech_probability": None, "speech_fraction": None}
    return {"speech_probability": float(probabilities.mean()), "speech_fraction": float((probabilities >= SPEECH).mean())}


def _speech(_: ScoreOptions) -> Scoring:
    vad = Vad()

    def score(items: Sequence[Item]) -> Sequence[Scores]:
        waves = []
        for item in items:
            _sound(item)
            assert item.media is not None and item.media.speech is not None
            waves.append(item.media.speech)
        return [speech_scores(found) for found in vad(waves)]

    return score


def _speech_version(_: ScoreOptions) -> str:
    vad_file()
    return f"1 silero-vad {package_version('silero-vad')}"


# --- the scorers ----------------------------------------------------------------------------------------------------------------------


SCORERS: tuple[Scorer, ...] = (
    Scorer(
        name="loudness",
        kind="media",
        columns={"loudness_lufs": pa.float64(), "peak_dbfs": pa.float64()},
        make=lambda _: each(lambda item: loudness(*_sound(item))),
        version=lambda _: "1",
        summary="integrated loudness (ITU-R BS.1770-4) in LUFS, and the largest sample in dB of full scale",
        needs=frozenset({"sound"}),
        usual=True,
    ),
    Scorer(
        name="silence",
        kind="media",
        columns={"silent_fraction": pa.float64()},
        make=lambda options: each(lambda item: {"silent_fraction": silent_fraction(*_sound(item), options.silence_dbfs)}),
        version=lambda options: f"1 below {options.silence_dbfs:g} dBFS",
        summary="the part of the sound, in tenths of a second, that is below silence_dbfs",
        needs=frozenset({"sound"}),
        usual=True,
    ),
    Scorer(
        name="bandwidth",
        kind="media",
        columns={"bandwidth_hz": pa.float64()},
        make=lambda _: each(lambda item: {"bandwidth_hz": bandwidth_hz(*_sound(item))}),
        version=lambda _: "1",
        summary="up to which frequency there is sound",
        needs=frozenset({"sound"}),
        usual=True,
    ),
    Scorer(
        name="still",
        kind="media",
        columns={"still_fraction": pa.float64()},
        make=lambda _: each(lambda item: {"still_fraction": still_fraction(_pictures(item))}),
        version=lambda _: "1",
        summary="the part of the time in which the picture does not change",
        needs=frozenset({"pictures"}),
        usual=True,
    ),
    Scorer(
        name="cuts",
        kind="media",
        columns={"cuts": pa.int64()},
        make=lambda _: each(lambda item: {"cuts": len(cut_frames(_pictures(item)))}),
        version=lambda _: "1",
        summary="how many hard cuts there are",
        needs=frozenset({"pictures"}),
        usual=True,
    ),
    Scorer(
        name="speech",
        kind="media",
        columns={"speech_probability": pa.float64(), "speech_fraction": pa.float64()},
        make=_speech,
        version=_speech_version,
        summary="how probably the sound is speech, on average, and which part of it is (Silero VAD)",
        needs=frozenset({"sound", "speech"}),
    ),
)
