"""Reading clips: any container's pictures and sound on one clock, as arrays or as frames about to be encoded.

**Time 0** is the instant a player starts: the earliest thing presented, first picture or first sample, whichever comes first, after edit
lists, decoder priming and start offsets (ffmpeg's rule). The clip lasts as long as its pictures. Sound that starts late, stops early or has a hole
is silence there; sound beyond the last picture is cut, so a clip of n frames always has `round(n / frame_rate * sample_rate)` samples.

**Frame k** of the 25 fps clock is the last picture whose timestamp is before `(k + 1/2) / 25` s: every picture goes to the nearest tick and is held
until the next one (ffmpeg's `fps` filter with its defaults: at most half a frame early or late, and a long still picture never anticipates the next).
Positions are exact fractions of the container's timestamps. A clip that is already at 25 fps gives exactly its coded frames.

This module knows no dataset, no Ray and no network.
"""

import io
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import chain, pairwise
from math import floor
from pathlib import Path
from typing import TypeVar, cast

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.filter import Graph
from av.packet import Packet
from av.sidedata.sidedata import SideData, SideDataContainer
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import Float32, UInt8

from configs.clock import FRAME_RATE_HZ

FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
"""Demuxers that may open an input. Playlists and scripts are not among them: a text file must not make a worker open other files or addresses."""
MIN_PRESENT = Fraction(9, 10)
"""A file that holds less than this part of the duration it declares is truncated."""
MAX_FAULTY = Fraction(1, 10)
"""A stream of which more than this part of the packets cannot be decoded is undecodable."""
MIN_PICTURE_SECONDS = Fraction(1, 1000)
"""A shorter duration of a picture is a demuxer's way to say that it does not know."""
MAX_STILL_SECONDS = 120
"""A longer time without a new picture is a damaged timestamp, not a still picture."""
AUDIO_JITTER_SECONDS = Fraction(1, 100)
"""Audio timestamps this near to where the samples already decoded end are taken as contiguous: containers round them."""

Pictures = UInt8[np.ndarray, "frames height width 3"]
Sound = Float32[np.ndarray, "channels samples"]
T = TypeVar("T")


class MediaError(Exception):
    """A clip's own fault: `reason` is one word for the ledger, `message` what was found."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


@dataclass(frozen=True)
class SourceInfo:
    """What a file held, and what was wrong with it; goes into the clip's json."""

    container: str
    video_codec: str
    pixel_format: str
    width: int
    height: int
    frame_rate: str
    rotation_degrees: int
    video_start_seconds: float
    """Where the first picture was on the output's clock: above 0 if the sound began first."""
    audio_codec: str | None
    audio_rate_hz: int | None
    audio_layout: str | None
    audio_start_seconds: float | None
    """Where the first sample was on the output's clock."""
    audio_gaps: int
    """Holes in the sound's timestamps that became silence."""
    video_faults: int
    """Video packets that could not be decoded and pictures decoded with damage."""
    audio_faults: int
    """Audio packets that could not be decoded."""


@dataclass(frozen=True)
class DecodedClip:
    """Pictures and sound of one clip on one clock."""

    frames: Pictures
    audio: Sound
    sample_rate_hz: int
    frame_rate_hz: int
    source: SourceInfo


def decode(
    source: str | Path | bytes,
    *,
    sample_rate_hz: int | None = None,
    channels: int | None = None,
    short_side: int | None = None,
    frame_rate_hz: int = FRAME_RATE_HZ,
    threads: int = 1,
) -> DecodedClip:
    """Pictures and sound of a clip with one reading; None keeps the file's own sample rate, channels or picture size."""
    with open_clip(source, frame_rate_hz=frame_rate_hz, threads=threads, need_audio=True) as clip:
        audio, rate_hz = clip.sound(sample_rate_hz, channels)
        frames = clip.rgb(short_side)
        return DecodedClip(frames, audio, rate_hz, frame_rate_hz, clip.info())


def decode_video(source: str | Path | bytes, *, short_side: int | None = None, frame_rate_hz: int = FRAME_RATE_HZ, threads: int = 1) -> Pictures:
    """RGB pictures on the clip's clock, upright; `short_side` scales as the re-encoder does, None keeps the file's size.

    The conversion to RGB is PyAV's `to_ndarray(format="rgb24")`, which the published models' pictures went through.
    """
    with open_clip(source, frame_rate_hz=frame_rate_hz, threads=threads) as clip:
        return clip.rgb(short_side)


def decode_audio(source: str | Path | bytes, sample_rate_hz: int | None = None, channels: int | None = None, *, threads: int = 1) -> Sound:
    """Sound from time 0 of the clip's clock, resampled and mixed by swresample as ffmpeg does; exactly as long as the pictures.

    A file without pictures lasts as long as its sound.
    """
    with open_clip(source, threads=threads, need_video=False, need_audio=True) as clip:
        return clip.sound(sample_rate_hz, channels)[0]


@contextmanager
def open_clip(
    source: str | Path | bytes, *, frame_rate_hz: int = FRAME_RATE_HZ, threads: int = 1, need_video: bool = True, need_audio: bool = False
) -> "Iterator[OpenClip]":
    """An open clip; raises MediaError if the file, or a stream that is needed, is not there."""
    file = _file(source)
    try:
        container = av.open(file, "r", metadata_errors="replace", options={"format_whitelist": FORMATS, "protocol_whitelist": "file"})
    except MemoryError:
        raise
    except FFmpegError as error:
        raise _cannot_open(source, error) from error
    with container:
        video, audio = _video_stream(container), _audio_stream(container)
        if need_video and video is None:
            raise MediaError("no_video", f"{container.format.name} file without a video stream")
        if need_audio and audio is None:
            raise MediaError("no_audio", f"{container.format.name} file without an audio stream")
        yield OpenClip(container, video, audio, frame_rate_hz, threads)


@dataclass
class OpenClip:
    """A clip being read: its packets, its clock, and each stream to be decoded once.

    The packets of both streams are read up front (a clip's size in memory), so that time 0 is known before the first picture is.
    """

    container: InputContainer
    video: VideoStream | None
    audio: AudioStream | None
    frame_rate_hz: int
    threads: int
    video_faults: int = 0
    audio_faults: int = 0
    audio_gaps: int = 0
    _rotation: int = 0
    video_packets: list[Packet] = field(default_factory=list)
    audio_packets: list[Packet] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._read_packets()
        self._sound_frames = self._decoded_sound()
        self._first_sound = next(self._sound_frames, None)
        self._spans = {stream: span for stream, packets in self._streams() if (span := _span(packets, stream))}
        if self.video is not None and self.video not in self._spans:
            raise MediaError("undecodable", "no video packet with a time could be read")
        starts = [self._spans[self.video][0]] if self.video is not None else []
        if self._first_sound is not None:
            starts.append(self._first_sound[0])
        if not starts:
            raise MediaError("undecodable", "no sound could be decoded")
        self.start = min(starts)
        self._check_complete()

    def _streams(self) -> list[tuple[VideoStream | AudioStream, list[Packet]]]:
        both = ((self.video, self.video_packets), (self.audio, self.audio_packets))
        return [(stream, packets) for stream, packets in both if stream is not None]

    def _read_packets(self) -> None:
        streams = [stream for stream, _ in self._streams()]
        for stream in streams:
            stream.codec_context.thread_count = self.threads
        if self.video is not None and self.threads != 1:
            self.video.codec_context.thread_type = "AUTO"
        try:
            for packet in self.container.demux(streams):
                if packet.size:
                    (self.video_packets if packet.stream is self.video else self.audio_packets).append(packet)
        except MemoryError:
            raise
        except (FFmpegError, IndexError):
            # A file that breaks off, or grows streams from damaged bytes (PyAV's IndexError): what was read stays, and `_check_complete` judges
            # whether it is enough.
            pass
        for stream, packets in self._streams():
            packets.append(_flush(stream))

    def _check_complete(self) -> None:
        """Every duration that the file declares against the packets that are there, and the packets' times against reason."""
        for stream, (start, stop) in self._spans.items():
            if stream.duration and stream.time_base:
                _check_present(stop - start, stream.duration * stream.time_base, f"{stream.type} stream")
        if self.container.duration and self._spans:
            starts, stops = zip(*self._spans.values(), strict=True)
            present = max(stops) - min(0, *starts)  # some containers count from 0, some from the start
            _check_present(present, Fraction(self.container.duration, 1_000_000), f"{self.container.format.name} file")
        if self.video is not None and self.video.time_base:
            times = [self.start, *(time * self.video.time_base for time, _ in _times(self.video_packets)), self.video_end]
            longest = max(later - earlier for earlier, later in pairwise(times))
            if longest > MAX_STILL_SECONDS:
                raise MediaError("undecodable", f"the pictures' times jump by {float(longest):.0f} s")

    @property
    def video_end(self) -> Fraction:
        """When the last picture ends, in the container's seconds."""
        assert self.video is not None
        return self._spans[self.video][1]

    @property
    def frames(self) -> int:
        """Frames on the output clock: the pictures' end, to the nearest frame. Without a video stream, the sound's end."""
        stream = self.video or self.audio
        assert stream is not None
        return floor((self._spans[stream][1] - self.start) * self.frame_rate_hz + Fraction(1, 2))

    def samples(self, sample_rate_hz: int) -> int:
        """Samples on the output clock, per channel."""
        return floor(Fraction(self.frames * sample_rate_hz, self.frame_rate_hz) + Fraction(1, 2))

    # Pictures

    def pictures(self, short_side: int | None = None, pixel_format: str = "yuv420p") -> Iterator[VideoFrame]:
        """The clip's frames on its clock, upright, scaled to `short_side`; the same object again where a picture is held. One use."""
        fit = PictureFit(short_side, pixel_format)
        shown: tuple[VideoFrame, VideoFrame] | None = None
        for frame in hold(self._ticked_pictures(), self.frames):
            if shown is None or shown[0] is not frame:
                shown = (frame, self._fitted(fit, frame))
            yield shown[1]

    def rgb(self, short_side: int | None = None) -> Pictures:
        """The clip's frames as RGB. One use."""
        pictures = self.pictures(short_side) if short_side else hold(self._upright_pictures(), self.frames)
        to_rgb, out, shown = VideoReformatter(), None, None
        for index, frame in enumerate(pictures):
            if out is None:
                out = empty_pictures(self.frames, frame.height, frame.width)
            if frame is shown:
                out[index] = out[index - 1]
            else:
                out[index] = to_rgb.reformat(frame, out.shape[2], out.shape[1], format="rgb24", threads=1).to_ndarray()
            shown = frame
        assert out is not None  # `hold` ends after at least one frame or raises
        return out

    def _upright_pictures(self) -> Iterator[tuple[int, VideoFrame]]:
        """Pictures at their own size; only those with a display matrix pass a filter."""
        fit = PictureFit(None, None)
        for tick, frame in self._ticked_pictures():
            yield tick, self._fitted(fit, frame) if fit.turns(frame) else frame

    def _fitted(self, fit: "PictureFit", frame: VideoFrame) -> VideoFrame:
        try:
            return fit(frame)
        except MemoryError:
            raise
        except FFmpegError as error:
            raise MediaError("undecodable", f"{frame.format.name} pictures of {frame.width}x{frame.height} cannot be scaled: {error}") from error

    def _ticked_pictures(self) -> Iterator[tuple[int, VideoFrame]]:
        """Decoded pictures in time order with the tick of the output clock that each starts on."""
        assert self.video is not None
        count, last, step = 0, None, Fraction(1, 25)
        for _, frame in self._decoded(self.video_packets, "video"):
            time_base = frame.time_base or self.video.time_base
            assert time_base is not None
            step = frame.duration * time_base if frame.duration else step
            pts = frame.pts if frame.pts is not None else frame.dts
            seconds = pts * time_base if pts is not None else (self.start if last is None else last + step)
            self.video_faults += frame.is_corrupt
            self._rotation = frame.rotation
            count += 1
            if last is None or seconds >= last:
                yield floor((seconds - self.start) * self.frame_rate_hz + Fraction(1, 2)), frame
                last = seconds
        if not count:
            raise MediaError("undecodable", f"no picture in {len(self.video_packets)} {self.video.codec_context.name} packets")
        _check_faults(self.video_faults, len(self.video_packets), "video")

    # Sound

    def sound(self, sample_rate_hz: int | None = None, channels: int | None = None) -> tuple[Sound, int]:
        """The whole sound on the clip's clock, and its sample rate. One use."""
        if self._first_sound is None:
            raise MediaError("undecodable", f"no sound in {len(self.audio_packets)} audio packets")
        first = self._first_sound[1]
        rate_hz = sample_rate_hz or first.sample_rate
        layout = channel_layout(channels) if channels else first.layout.name
        track = np.zeros((channels or first.layout.nb_channels, self.samples(rate_hz)), np.float32)
        filled = 0
        for seconds, wave in self._sound_runs(layout, rate_hz):
            at = floor((seconds - self.start) * rate_hz + Fraction(1, 2))
            skip = max(0, filled - at)  # a run that starts inside the one before: what is already there stays
            stop = min(track.shape[1], at + wave.shape[1])
            if stop > at + skip:
                track[:, at + skip : stop] = wave[:, skip : stop - at]
                filled = stop
        _check_faults(self.audio_faults, len(self.audio_packets), "audio")
        return track, rate_hz

    def _sound_runs(self, layout: str, rate_hz: int) -> Iterator[tuple[Fraction, Sound]]:
        """Stretches of sound without a hole in their timestamps, resampled, each with its start time."""
        assert self._first_sound is not None
        run: _Run | None = None
        for seconds, frame in chain([self._first_sound], self._sound_frames):
            if run is not None and not run.continues(frame, seconds):
                self.audio_gaps += 1
                yield run.start, run.finish()
                run = None
            if run is None:
                run = _Run(seconds, frame, layout, rate_hz)
            try:
                run.add(frame)
            except MemoryError:
                raise
            except FFmpegError:  # damage can look like a format that no sound has
                self.audio_faults += 1
                run = None
        if run is not None:
            yield run.start, run.finish()

    def _decoded_sound(self) -> Iterator[tuple[Fraction, AudioFrame]]:
        """Audio frames with the time of their first sample; a frame without a timestamp follows the one before it."""
        following = Fraction(0)
        for packet, frame in self._decoded(self.audio_packets, "audio"):
            seconds = following if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base
            if packet.pts is not None and packet.has_sidedata("skip_samples"):
                # The decoder rounds the time of a frame that it trimmed to the container's ticks (1 ms in webm).
                (skipped,) = struct.unpack_from("<I", bytes(packet.get_sidedata("skip_samples")))
                exact = packet.pts * packet.time_base + Fraction(skipped, frame.sample_rate)
                seconds = exact if abs(exact - seconds) <= packet.time_base else seconds
            following = seconds + Fraction(frame.samples, frame.sample_rate)
            if frame.samples:
                yield seconds, frame

    def _decoded(self, packets: list[Packet], kind: str) -> Iterator:
        """Packets with the frames they gave; those that cannot be decoded are counted and skipped."""
        for packet in packets:
            try:
                frames = packet.decode()
            except MemoryError:
                raise
            except FFmpegError:
                self.video_faults += kind == "video"
                self.audio_faults += kind == "audio"
                continue
            for frame in frames:
                yield packet, frame

    def info(self) -> SourceInfo:
        """What the file held; complete once its streams have been decoded."""
        assert self.video is not None
        context = self.video.codec_context
        start, sound = self._first_sound or (None, None)
        return SourceInfo(
            container=self.container.format.name,
            video_codec=context.name,
            pixel_format=context.pix_fmt or "unknown",
            width=context.width,
            height=context.height,
            frame_rate=str(self.video.average_rate or self.video.guessed_rate or "unknown"),
            rotation_degrees=self._rotation,
            video_start_seconds=float(self._spans[self.video][0] - self.start),
            audio_codec=self.audio.codec_context.name if self.audio else None,
            audio_rate_hz=sound.sample_rate if sound else None,
            audio_layout=sound.layout.name if sound else None,
            audio_start_seconds=float(start - self.start) if start is not None else None,
            audio_gaps=self.audio_gaps,
            video_faults=self.video_faults,
            audio_faults=self.audio_faults,
        )


_new_array: Callable[[tuple[int, ...]], np.ndarray] = partial(np.empty, dtype=np.uint8)


def decode_into(new_array: Callable[[tuple[int, ...]], np.ndarray]) -> None:
    """From now on, whole clips' pictures are decoded into arrays of bytes that `new_array` makes for a shape: in memory that another process sees."""
    global _new_array
    _new_array = new_array


def empty_pictures(frames: int, height: int, width: int) -> Pictures:
    """An array for a clip's pictures."""
    return _new_array((frames, height, width, 3))


def hold(ticked: Iterable[tuple[int, T]], count: int) -> Iterator[T]:
    """`count` items, one per tick: at tick k the last item whose own tick is k or before; before the first item, the first."""
    emitted, shown, empty = 0, None, True
    for tick, item in ticked:
        if not empty:
            assert shown is not None
            for _ in range(min(tick, count) - emitted):
                yield shown
            emitted = max(emitted, min(tick, count))
        shown, empty = item, False
    if empty:
        raise ValueError("there is nothing to hold: no item was given")
    assert shown is not None
    for _ in range(count - emitted):
        yield shown


class PictureFit:
    """Turns decoded pictures upright and to one size and format, in one pass of filters and without copies through numpy.

    Scaling is the published one (bicubic; the long side rounded down, then cropped to an even size). The size follows the first picture.
    """

    def __init__(self, short_side: int | None, pixel_format: str | None) -> None:
        self.short_side = short_side
        self.pixel_format = pixel_format
        self.scaled: tuple[int, int] | None = None
        self._kind: tuple | None = None
        self._graph = Graph()

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        turns = self.turns(frame)
        kind = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, turns)
        if kind != self._kind:
            self._graph, self._kind = self._build(frame, turns), kind
        self._graph.push(frame)
        return self._graph.vpull()

    def turns(self, frame: VideoFrame) -> tuple[str, ...]:
        """Filters that undo a display matrix: `transpose=...`, `hflip`, `vflip`, by ffmpeg's rule."""
        # `frame.side_data` would refer to the frame and the frame to it: whole clips of decoded pictures then wait for Python's collector.
        side_data = cast(Iterable[SideData], SideDataContainer(frame))  # type: ignore[call-arg]  # typed as a dict, built as a sequence
        data = next((item for item in side_data if item.type == SideDataType.DISPLAYMATRIX), None)
        if data is None:
            return ()
        a, _, _, c, d, *_ = struct.unpack("9i", bytes(data))
        match -frame.rotation % 360:
            case 90:
                return ("transpose=cclock_flip" if c > 0 else "transpose=clock",)
            case 180:
                return tuple(name for name, entry in (("hflip", a), ("vflip", d)) if entry < 0)
            case 270:
                return ("transpose=clock_flip" if c < 0 else "transpose=cclock",)
            case 0:
                return tuple(name for name, entry in (("hflip", a), ("vflip", d)) if entry < 0)
            case _:
                return ()

    def _build(self, frame: VideoFrame, turns: tuple[str, ...]) -> Graph:
        graph = Graph()
        graph.threads = 1
        source = {"video_size": f"{frame.width}x{frame.height}", "pix_fmt": frame.format.name, "time_base": "1/1000", "pixel_aspect": "1/1"}
        source |= {"colorspace": str(frame.colorspace), "range": str(frame.color_range)}
        filters = [graph.add("buffer", **source)]
        for turn in turns:
            name, _, argument = turn.partition("=")
            filters.append(graph.add(name, argument or None))
        if self.short_side is not None:
            width, height = (frame.height, frame.width) if any(turn.startswith("transpose") for turn in turns) else (frame.width, frame.height)
            self.scaled = self.scaled or scaled_size(width, height, self.short_side)
            full_range = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
            ranges = {"out_range": "limited"} if full_range else {}
            filters.append(graph.add("scale", w=str(self.scaled[0]), h=str(self.scaled[1]), flags="bicubic", **ranges))
            filters.append(graph.add("crop", w=str(self.scaled[0] // 2 * 2), h=str(self.scaled[1] // 2 * 2)))
        if self.pixel_format is not None:
            filters.append(graph.add("format", pix_fmts=self.pixel_format))
        filters.append(graph.add("buffersink"))
        graph.link_nodes(*filters).configure()
        return graph


def scaled_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height scaled so that the shorter is `short_side`; the longer is rounded down, as ffmpeg's scale expression does."""
    short = min(width, height)
    return width * short_side // short, height * short_side // short


class _Run:
    """Contiguous audio frames of one format on their way through one resampler."""

    def __init__(self, start: Fraction, frame: AudioFrame, layout: str, rate_hz: int) -> None:
        self.start = start
        self.samples = 0
        self.format = (frame.format.name, frame.layout.name, frame.sample_rate)
        self._resampler = AudioResampler(format="fltp", layout=layout, rate=rate_hz)
        self._waves: list[np.ndarray] = []

    def continues(self, frame: AudioFrame, seconds: Fraction) -> bool:
        expected = self.start + Fraction(self.samples, frame.sample_rate)
        return self.format == (frame.format.name, frame.layout.name, frame.sample_rate) and abs(seconds - expected) <= AUDIO_JITTER_SECONDS

    def add(self, frame: AudioFrame) -> None:
        self.samples += frame.samples
        self._take(self._resampler.resample(frame))

    def finish(self) -> Sound:
        self._take(self._resampler.resample(None))
        return np.concatenate(self._waves, axis=1)

    def _take(self, frames: Iterable[AudioFrame | None]) -> None:
        self._waves.extend(frame.to_ndarray() for frame in frames if frame is not None)


def _file(source: str | Path | bytes) -> str | io.BytesIO:
    """What to hand to libav, after the checks that need no decoder."""
    if isinstance(source, bytes):
        if not source:
            raise MediaError("empty", "0 bytes")
        return io.BytesIO(source)
    try:
        with open(source, "rb") as file:
            if not file.read(1):
                raise MediaError("empty", f"{source} has 0 bytes")
    except FileNotFoundError as error:
        raise MediaError("missing", f"{source} does not exist") from error
    except OSError as error:
        raise MediaError("unreadable", f"{source}: {error.strerror or error}") from error
    return "file:" + os.fspath(source)  # the prefix keeps names with colons or a leading dash from being read as addresses


def _cannot_open(source: str | Path | bytes, error: FFmpegError) -> MediaError:
    """An mp4 cut short before its index cannot be opened at all: tell it from bytes that were never a video."""
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        end = _last_box_end(file, size)
    if end > size:
        return MediaError("truncated", f"{size} bytes of at least {end}; {error.strerror}")
    return MediaError("undecodable", f"not a video file that can be read: {error.strerror}")


def _last_box_end(file: io.BufferedIOBase, size: int) -> int:
    """Where the last top-level box of an ISO media file ends, as its header says; 0 if it is no such file."""
    at, first = 0, True
    while at + 8 <= size:
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        if first and kind != b"ftyp":
            return 0
        if length == 1:
            large = file.read(8)
            length = struct.unpack(">Q", large)[0] if len(large) == 8 else 16
        elif length == 0:
            return size
        at, first = at + max(length, 8), False
    return at if at >= size else size + 1  # a header cut in two is a cut file


def _video_stream(container: InputContainer) -> VideoStream | None:
    """The video stream ffmpeg would take; a cover picture is none."""
    moving = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    stream = best if best in moving else next(iter(moving), None)
    if stream is not None and stream.codec_context is None:
        raise MediaError("undecodable", "no decoder for the video stream's codec")
    return stream  # type: ignore[return-value]  # `best` is typed as any stream


def _audio_stream(container: InputContainer) -> AudioStream | None:
    stream = container.streams.best("audio")
    if stream is not None and stream.codec_context is None:
        raise MediaError("undecodable", "no decoder for the audio stream's codec")
    return stream  # type: ignore[return-value]  # `best` is typed as any stream


def _flush(stream: VideoStream | AudioStream) -> Packet:
    """The empty packet after which a decoder gives up the frames that it still holds."""
    flush = Packet()
    flush.stream = stream
    flush.time_base = stream.time_base or Fraction(1, 1000)
    return flush


def _times(packets: list[Packet]) -> list[tuple[int, int]]:
    """Time and duration of the packets that are presented, in the order of time."""
    presented = [packet for packet in packets if packet.size and not packet.is_discard]
    return sorted((time, packet.duration or 0) for packet in presented if (time := packet.dts if packet.pts is None else packet.pts) is not None)


def _span(packets: list[Packet], stream: VideoStream | AudioStream) -> tuple[Fraction, Fraction] | None:
    """First presentation time and end of the packets that are presented, in the container's seconds; None if there are none."""
    times = _times(packets)
    if not times or stream.time_base is None:
        return None
    first, (last, duration) = times[0][0], times[-1]
    if duration * stream.time_base < MIN_PICTURE_SECONDS and len(times) > 1:
        # Not every container says how long the last picture is shown: until the declared end, if that can be, or as long as the one before.
        gaps = [later - earlier for (earlier, _), (later, _) in pairwise(times)]
        declared = first + (stream.duration or 0) - last
        duration = declared if 0 < declared <= max(gaps) else gaps[-1]
    return first * stream.time_base, (last + duration) * stream.time_base


def channel_layout(channels: int) -> str:
    """swresample's name for that many channels."""
    return {1: "mono", 2: "stereo"}.get(channels) or f"{channels} channels"


def _check_present(present: Fraction, declared: Fraction, what: str) -> None:
    if present < MIN_PRESENT * declared:
        raise MediaError("truncated", f"the {what} says {float(declared):.2f} s but holds {float(present):.2f} s")


def _check_faults(faults: int, packets: int, what: str) -> None:
    if faults > MAX_FAULTY * packets:
        raise MediaError("undecodable", f"{faults} of {packets} {what} packets cannot be decoded")
