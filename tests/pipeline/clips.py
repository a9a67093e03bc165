"""Small clips made by program for the media tests: a flash and a click at known instants, in any container, rate and layout of streams.

Pictures are a textured ground with a moving square, white during a flash; the sound is quiet noise with one sharp click. Both are functions of
absolute time, so a stream that starts late or early simply shows another part of the same world.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, cached_property
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

FLASH_SECONDS = Fraction(12, 100)
CLICK_RATE_HZ = 48000


@dataclass(frozen=True)
class Recipe:
    """What a generated clip is like. Times are in seconds of the container's clock."""

    container: str = "mp4"
    video_codec: str | None = "libx264"
    audio_codec: str | None = "aac"
    frame_rate: Fraction = Fraction(25)
    picture_times: tuple[Fraction, ...] | None = None
    """Start of every picture, for a variable frame rate; else they follow from the rate."""
    seconds: Fraction = Fraction(2)
    start: Fraction = Fraction(0)
    """When the first picture is shown, and where the world's own time 0 is."""
    audio_start: Fraction | None = None
    """When the sound begins; None for `start`."""
    audio_seconds: Fraction | None = None
    flash_picture: int = 20
    width: int = 96
    height: int = 64
    pixel_format: str = "yuv420p"
    audio_rate_hz: int = 44100
    layout: str = "stereo"
    rotation_degrees: int = 0
    audio_hole: tuple[Fraction, Fraction] | None = None
    """Sound packets whose start is in this half-open range are left out."""
    preroll_pictures: int = 0
    """Pictures before `start` that an edit list hides (mp4, mov)."""
    amplitude: float = 0.02
    title: str = ""
    video_options: tuple[tuple[str, str], ...] = ()

    @cached_property
    def times(self) -> tuple[Fraction, ...]:
        """Start of every picture that is shown."""
        if self.picture_times is not None:
            return tuple(self.start + time for time in self.picture_times)
        return tuple(self.start + n / self.frame_rate for n in range(int(self.seconds * self.frame_rate)))

    @cached_property
    def flash(self) -> Fraction:
        """The instant of the flash and the click: the start of a picture, so that the source itself is exact."""
        return self.times[self.flash_picture]


def click(rate_hz: int = CLICK_RATE_HZ) -> np.ndarray:
    """3 ms of a decaying 2 kHz tone that starts at its loudest: an onset that correlation finds to a sample."""
    t = np.arange(int(0.003 * rate_hz)) / rate_hz
    return (np.cos(2 * np.pi * 2000 * t) * np.exp(-t / 0.0008)).astype(np.float32)


def wave(recipe: Recipe) -> np.ndarray:
    """The sound of the world from `audio_start`, mono, at the recipe's rate."""
    rate, start = recipe.audio_rate_hz, recipe.start if recipe.audio_start is None else recipe.audio_start
    stop = recipe.start + recipe.seconds if recipe.audio_seconds is None else start + recipe.audio_seconds
    samples = np.random.default_rng(7).standard_normal(round((stop - start) * rate)).astype(np.float32) * recipe.amplitude
    at, sound = round((recipe.flash - start) * rate), click(rate)
    if at >= 0 and at + len(sound) <= len(samples):
        samples[at : at + len(sound)] += 0.7 * sound
    return samples


@cache
def ground(height: int, width: int) -> np.ndarray:
    """What does not move: RGB [height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    rgb = np.repeat((60 + 30 * np.sin(x / 5.0 + y / 7.0))[..., None], 3, axis=2) + np.array([12, 0, -12])
    return rgb.clip(0, 255).astype(np.uint8)


def picture(recipe: Recipe, time: Fraction) -> np.ndarray:
    """The world at an instant: RGB [height, width, 3]."""
    rgb = ground(recipe.height, recipe.width).copy()
    left = int(float(time - recipe.start) * 30) % (recipe.width - 16)
    rgb[8:24, left : left + 16] = (110, 70, 30)
    if 0 <= time - recipe.flash < FLASH_SECONDS:
        rgb[:] = 245
    return rgb


def make_clip(path: Path, recipe: Recipe | None = None, **changes) -> Recipe:
    """Write a clip; `changes` are fields of the recipe. Returns the recipe, which knows when the flash is."""
    recipe = replace(recipe or Recipe(), **changes)
    with av.open(str(path), "w", format={"mkv": "matroska"}.get(recipe.container, recipe.container)) as out:
        out.metadata.update({"title": recipe.title} if recipe.title else {})
        packets = []
        video = audio = None
        if recipe.video_codec:
            options = {"preset": "veryfast", "crf": "12"} if recipe.video_codec == "libx264" else {}
            if recipe.video_codec.startswith("libvpx"):
                options = {"cpu-used": "8", "deadline": "realtime", "crf": "8", "b": "2M"}
            video = out.add_stream(recipe.video_codec, rate=recipe.frame_rate, options=options | dict(recipe.video_options))
            assert isinstance(video, VideoStream)
            video.width, video.height, video.pix_fmt = recipe.width, recipe.height, recipe.pixel_format
            video.codec_context.thread_count = 1
            video.codec_context.time_base = Fraction(1, 1000) if recipe.picture_times else 1 / recipe.frame_rate
            if recipe.video_codec == "mpeg4":
                video.codec_context.bit_rate = 2_000_000
            if recipe.rotation_degrees:
                video.set_display_rotation(recipe.rotation_degrees)
        if recipe.audio_codec:
            audio = out.add_stream(recipe.audio_codec, rate=recipe.audio_rate_hz, options={"b": "128k", "strict": "-2"})
            assert isinstance(audio, AudioStream)
            audio.codec_context.layout = recipe.layout
        if video is not None:
            packets += _video_packets(video, recipe)
        if audio is not None:
            packets += _audio_packets(audio, recipe)
        for packet in sorted(packets, key=lambda packet: (packet.dts if packet.dts is not None else packet.pts) * packet.time_base):
            out.mux(packet)
    return recipe


def _video_packets(stream: VideoStream, recipe: Recipe) -> list[av.Packet]:
    time_base = stream.codec_context.time_base
    early = [recipe.start - n / recipe.frame_rate for n in range(recipe.preroll_pictures, 0, -1)]
    packets = []
    for time in (*early, *recipe.times):
        frame = VideoFrame.from_ndarray(picture(recipe, time), format="rgb24").reformat(format=recipe.pixel_format)
        frame.pts, frame.time_base = round(time / time_base), time_base
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def _audio_packets(stream: AudioStream, recipe: Recipe) -> list[av.Packet]:
    samples, rate = wave(recipe), recipe.audio_rate_hz
    start = recipe.start if recipe.audio_start is None else recipe.audio_start
    channels = _spread(samples, recipe.layout)
    packets, size = [], 1024
    for at in range(0, channels.shape[1], size):
        frame = AudioFrame.from_ndarray(np.ascontiguousarray(channels[:, at : at + size]), format="fltp", layout=recipe.layout)
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = at + round(start * rate)
        packets += stream.encode(frame)
    packets += stream.encode(None)
    if recipe.audio_hole:
        low, high = recipe.audio_hole
        packets = [packet for packet in packets if not low <= packet.pts * packet.time_base < high]
    return packets


def _spread(samples: np.ndarray, layout: str) -> np.ndarray:
    """The same sound on every channel, each at its own loudness, so that a wrong channel order would be heard."""
    channels = av.AudioLayout(layout).nb_channels
    return np.stack([samples * (1 - 0.12 * n) for n in range(channels)])


def flash_frame(frames: np.ndarray) -> int:
    """The first frame of the flash."""
    bright = frames.reshape(len(frames), -1).mean(axis=1) > 180
    assert bright.any(), "no flash in the pictures"
    return int(np.argmax(bright))


def click_seconds(audio: np.ndarray, rate_hz: int) -> float:
    """The instant of the click in mono or many-channel sound, by correlation with the click itself."""
    mono = audio.mean(axis=0) if audio.ndim == 2 else audio
    score = np.abs(np.correlate(mono, click(rate_hz), mode="valid"))
    return int(np.argmax(score)) / rate_hz


def shift_samples(sound: np.ndarray, other: np.ndarray, most: int = 4000) -> int:
    """How many samples later `other` is than `sound`, by cross-correlation."""
    size = 1 << (len(sound) + len(other)).bit_length()
    product = np.fft.irfft(np.fft.rfft(other, size) * np.conj(np.fft.rfft(sound, size)), size)
    lags = np.concatenate([product[-most:], product[: most + 1]])
    return int(np.argmax(lags)) - most


def corrupt(data: bytes, ranges: Sequence[tuple[float, float]]) -> bytes:
    """The bytes with parts of them (fractions of the length) overwritten by noise."""
    out, random = bytearray(data), np.random.default_rng(3)
    for low, high in ranges:
        start, stop = int(low * len(data)), int(high * len(data))
        out[start:stop] = random.integers(0, 256, stop - start, dtype=np.uint8).tobytes()
    return bytes(out)
