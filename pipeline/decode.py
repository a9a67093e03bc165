"""Reading clips: any container's pictures and sound on one clock, as arrays or as frames about to be encoded.

**Time 0** is the instant a player starts: the earliest thing presented, first picture or first sample, whichever comes first, after edit
lists, decoder priming and start offsets (ffmpeg's rule). The clip lasts as long as its pictures. Sound that starts late, stops early or has a hole
is silence there; sound beyond the last picture is cut, so a clip of n frames always has `round(n / frame_rate * sample_rate)` samples.

**Frame k** of the 25 fps clock is the last picture whose timestamp is before `(k + 1/2) / 25` s: every picture goes to the nearest tick and is held
until the next one (ffmpeg's `fps` filter with its defaults: at most half a frame early or late, and a long still picture never anticipates the next).
Positions are exact fractions of the container's timestamps. A clip that is already at 25 fps gives exactly its coded frames.

**A part** of a video (`start_seconds`, `end_seconds` of `open_clip`) is a clip whose time 0 is where the part begins: its frames and samples are
placed as if the video were only that part, whatever the start; no key frame or packet moves it. From a start on the grid of frames and samples they
are the whole video's, bit for bit.

A clip is read into memory once. A **film** (`picture_pieces`, `open_clip(in_memory=False)`) is not: a first reading keeps only the times of its
packets, 25 bytes each, and every stream that is then decoded is read from the file again, so that memory does not grow with the film.

This module knows no dataset, no Ray and no network.
"""

import io
import os
import struct
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain, islice
from math import ceil, floor
from pathlib import Path
from typing import Any, TypeVar, cast

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
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import Bool, Float32, Int64, UInt8

from configs.clock import FRAME_RATE_HZ

FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
"""Demuxers that may open an input. Playlists and scripts are not among them: a text file must not make a worker open other files or addresses."""
MIN_PRESENT = Fraction(9, 10)
"""A file that holds less than this part of the duration it declares is truncated."""
MAX_FAULTY = Fraction(1, 10)
"""A stream of which more than this part of the packets cannot be decoded is undecodable."""
MIN_PART = Fraction(9, 10)
"""A video that holds less of a part that it is asked for is too short for it."""
MIN_PICTURE_SECONDS = Fraction(1, 1000)
"""A shorter duration of a picture is a demuxer's way to say that it does not know."""
MAX_STILL_SECONDS = 120
"""A longer time without a new picture is a damaged timestamp, not a still picture."""
NO_TIME = -(1 << 63)
"""In place of a time that a container does not give: no time is so early."""
SILENCE_SAMPLES = 1 << 16
"""The longest piece in which silence is made."""
AUDIO_JITTER_SECONDS = Fraction(1, 100)
"""Audio timestamps this near to where the samples already decoded end are taken as contiguous: containers round them."""

Pictures = UInt8[np.ndarray, "frames height width 3"]
Sound = Float32[np.ndarray, "channels samples"]
Ticks = Int64[np.ndarray, "packets"]
"""Times of a stream's packets, in its time base."""
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
    """Where the first picture was on the video's clock: above 0 if the sound began first."""
    audio_codec: str | None
    audio_rate_hz: int | None
    audio_layout: str | None
    audio_start_seconds: float | None
    """Where the first sample was on the video's clock."""
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
    mono: Float32[np.ndarray, "mono_samples"] | None = None
    """The mean of the sound's own channels, at the rate that was asked for; None if it was not."""


def decode(
    source: str | Path | bytes,
    *,
    sample_rate_hz: int | None = None,
    channels: int | None = None,
    mono_rate_hz: int | None = None,
    short_side: int | None = None,
    frame_rate_hz: int = FRAME_RATE_HZ,
    threads: int = 1,
) -> DecodedClip:
    """Pictures and sound of a clip with one reading; None keeps the file's own sample rate, channels or picture size.

    `mono_rate_hz` asks for the sound in a second form (`DecodedClip.mono`), as networks hear it whose training took the mean of the channels:
    swresample's mix of two is louder by 3 dB.
    """
    with open_clip(source, frame_rate_hz=frame_rate_hz, threads=threads, need_audio=True) as clip:
        (audio, rate_hz), *others = clip.sounds((sample_rate_hz, channels), *([(mono_rate_hz, None)] if mono_rate_hz else []))
        frames = clip.rgb(short_side)
        mono = others[0][0].mean(0) if others else None
        return DecodedClip(frames, audio, rate_hz, frame_rate_hz, clip.info(), mono)


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


def picture_pieces(
    source: str | Path | bytes,
    *,
    short_side: int | None = None,
    piece_frames: int,
    start_seconds: float | int | Fraction = 0,
    duration_seconds: float | int | Fraction | None = None,
    frame_rate_hz: int = FRAME_RATE_HZ,
    threads: int = 1,
) -> Iterator[Pictures]:
    """The frames of `decode_video`, bit for bit, in pieces of `piece_frames` (the last may be shorter), whatever the length of the film.

    `start_seconds` begins with the frame that the clip's clock shows at that instant, number `floor(start_seconds * frame_rate_hz)`, as the published
    test starts do; decoding begins at the key frame before it, the file is read from its beginning. `duration_seconds` ends after so many whole
    frames. Memory: the pieces, some decoded frames, and 50 bytes for each packet of the file; a source given as bytes is in memory as it is.
    Raises MediaError where the film is at fault, damage to later parts when they are reached, and `too_short` where it ends before `start_seconds`.
    """
    if piece_frames < 1:
        raise ValueError(f"piece_frames is {piece_frames}; expected at least 1")
    with open_clip(source, frame_rate_hz=frame_rate_hz, threads=threads, in_memory=False) as film:
        yield from film.rgb_pieces(piece_frames, short_side, *film.frame_range(start_seconds, duration_seconds))


def video_frames(
    source: str | Path | bytes,
    *,
    start_seconds: float | int | Fraction = 0,
    duration_seconds: float | int | Fraction | None = None,
    frame_rate_hz: int = FRAME_RATE_HZ,
) -> int:
    """How many frames `picture_pieces` gives: the file is read once at constant memory, and no picture is decoded."""
    with open_clip(source, frame_rate_hz=frame_rate_hz, in_memory=False) as film:
        start, stop = film.frame_range(start_seconds, duration_seconds)
        return stop - start


def exact_seconds(seconds: float | int | Fraction) -> Fraction:
    """0.64 as 16/25: what the float was meant to be."""
    return seconds if isinstance(seconds, Fraction) else Fraction(seconds).limit_denominator(1_000_000)


@contextmanager
def open_clip(
    source: str | Path | bytes,
    *,
    frame_rate_hz: int = FRAME_RATE_HZ,
    threads: int = 1,
    need_video: bool = True,
    need_audio: bool = False,
    in_memory: bool = True,
    start_seconds: float | int | Fraction | None = None,
    end_seconds: float | int | Fraction | None = None,
) -> "Iterator[OpenClip]":
    """An open clip; raises MediaError if the file, or a stream that is needed, is not there.

    `in_memory=False` is for films: packets are read again when they are needed, instead of being kept. `start_seconds` and `end_seconds`, on the
    video's own clock, are for a part of it: MediaError `too_short` where the video ends before that begins, or holds less than nine tenths of it;
    what little may be missing then is missing at the end.
    """
    part = _part(start_seconds, end_seconds)
    with _opened(source) as container:
        video, audio = _video_stream(container), _audio_stream(container)
        if need_video and video is None:
            raise MediaError("no_video", f"{container.format.name} file without a video stream")
        if need_audio and audio is None:
            raise MediaError("no_audio", f"{container.format.name} file without an audio stream")
        with closing(OpenClip(source, container, video, audio, frame_rate_hz, threads, in_memory, part)) as clip:
            yield clip


def _part(start_seconds: float | int | Fraction | None, end_seconds: float | int | Fraction | None) -> tuple[Fraction, Fraction | None]:
    start, end = exact_seconds(start_seconds or 0), None if end_seconds is None else exact_seconds(end_seconds)
    if start < 0 or (end is not None and end <= start):
        raise ValueError(f"start_seconds is {start_seconds}, end_seconds {end_seconds}; expected a start of at least 0 and an end after it, or None")
    return start, end


@contextmanager
def _opened(source: str | Path | bytes) -> Iterator[InputContainer]:
    file = _file(source)
    try:
        container = av.open(file, "r", metadata_errors="replace", options={"format_whitelist": FORMATS, "protocol_whitelist": "file"})
    except MemoryError:
        raise
    except FFmpegError as error:
        raise _cannot_open(source, error) from error
    with container:
        yield container


class Track:
    """One stream of a clip: the times of its packets in the order of the file, and the packets if they are kept."""

    def __init__(self, stream: VideoStream | AudioStream, *, keep: bool) -> None:
        self.stream = stream
        self.context = stream.codec_context
        """What decodes it: of the latest reading, which may have been of another opening of the file."""
        self.packets: list[Packet] | None = [] if keep else None
        self._pts, self._dts, self._durations, self._flags = array("q"), array("q"), array("q"), bytearray()

    def __len__(self) -> int:
        return len(self._flags)

    def add(self, packet: Packet) -> None:
        """Note the file's next packet."""
        self._pts.append(NO_TIME if packet.pts is None else packet.pts)
        self._dts.append(NO_TIME if packet.dts is None else packet.dts)
        self._durations.append(packet.duration or 0)
        self._flags.append(packet.is_keyframe | packet.is_discard << 1)
        if self.packets is not None:
            self.packets.append(packet)

    @property
    def pts(self) -> Ticks:
        """Presentation times as the container gives them; NO_TIME where it does not."""
        return np.frombuffer(self._pts, np.int64)

    @property
    def dts(self) -> Ticks:
        """Decoding times as the container gives them; NO_TIME where it does not."""
        return np.frombuffer(self._dts, np.int64)

    @property
    def shown(self) -> Ticks:
        """Presentation times, or where there are none decoding times: avi has no others."""
        return np.where(self.pts == NO_TIME, self.dts, self.pts)

    @property
    def durations(self) -> Ticks:
        """How long each packet lasts; 0 where the container does not say."""
        return np.frombuffer(self._durations, np.int64)

    @property
    def is_key(self) -> Bool[np.ndarray, "packets"]:
        """Which packets can be decoded without those before."""
        return np.frombuffer(self._flags, np.uint8) & 1 == 1

    @property
    def is_presented(self) -> Bool[np.ndarray, "packets"]:
        """Which packets an edit list does not hide, among those with a time."""
        return (np.frombuffer(self._flags, np.uint8) & 2 == 0) & (self.shown != NO_TIME)

    def span(self) -> tuple[Fraction, Fraction] | None:
        """First presentation time and end of the packets that are presented, in the container's seconds; None if there are none."""
        times, durations = self.shown[self.is_presented], self.durations[self.is_presented]
        if not len(times) or self.stream.time_base is None:
            return None
        order = np.lexsort((durations, times))
        first, last, duration = (int(ticks) for ticks in (times[order[0]], times[order[-1]], durations[order[-1]]))
        if duration * self.stream.time_base < MIN_PICTURE_SECONDS and len(times) > 1:
            # Not every container says how long the last picture is shown: until the declared end, if that can be, or as long as the one before.
            gaps = np.diff(times[order])
            declared = first + (self.stream.duration or 0) - last
            duration = declared if 0 < declared <= gaps.max() else int(gaps[-1])
        return first * self.stream.time_base, (last + duration) * self.stream.time_base


@dataclass
class OpenClip:
    """A clip being read: its packets, its clock, and each stream to be decoded once.

    The packets of both streams are read up front, so that time 0 is known before the first picture is; kept (a clip's size in memory), or for
    a film only counted and read again.
    """

    source: str | Path | bytes
    container: InputContainer
    video: VideoStream | None
    audio: AudioStream | None
    frame_rate_hz: int
    threads: int
    in_memory: bool = True
    part: tuple[Fraction, Fraction | None] = (Fraction(0), None)
    """Seconds of the video's own clock between which the clip lies; no end is the video's."""
    video_faults: int = 0
    audio_faults: int = 0
    audio_gaps: int = 0
    _rotation: int = 0

    def __post_init__(self) -> None:
        self.video_track = self.audio_track = None
        if self.video is not None:
            self.video_track = Track(self.video, keep=self.in_memory)
        if self.audio is not None:
            self.audio_track = Track(self.audio, keep=self.in_memory)
        self._tracks = [track for track in (self.video_track, self.audio_track) if track is not None]
        self._read_packets()
        self._sound_packets = 0
        self._sound_frames = self._decoded_sound()
        self._first_sound = next(self._sound_frames, None)
        self._spans = {track.stream.type: span for track in self._tracks if (span := track.span())}
        if self.video is not None and "video" not in self._spans:
            raise MediaError("undecodable", "no video packet with a time could be read")
        starts = [self._spans["video"][0]] if self.video is not None else []
        if self._first_sound is not None:
            starts.append(self._first_sound[0])
        if not starts:
            raise MediaError("undecodable", "no sound could be decoded")
        self.origin = min(starts)
        """Where the video's own clock begins, in the container's seconds."""
        self._check_complete()
        self.start, self.end = self._part_between()
        """Where the clip's clock begins and its last frame ends, in the container's seconds."""

    def _part_between(self) -> tuple[Fraction, Fraction]:
        """Start and end of the wanted part in the container's seconds, as far as the video goes."""
        whole_end = self._spans["video" if self.video is not None else "audio"][1]
        start, end = self.origin + self.part[0], whole_end if self.part[1] is None else self.origin + self.part[1]
        if self.is_part and (start >= whole_end or whole_end - start < MIN_PART * (end - start)):
            wanted = f"from {float(self.part[0]):g} s on" if self.part[1] is None else f"{float(self.part[0]):g} to {float(self.part[1]):g} s"
            raise MediaError("too_short", f"it ends at {float(whole_end - self.origin):.2f} s; the clip is the part of it {wanted}")
        return start, min(end, whole_end)

    @property
    def is_part(self) -> bool:
        """Whether the clip is not all of the video."""
        return self.part != (0, None)

    def close(self) -> None:
        """Let go of the files that are read again; the clip's own container is its opener's."""
        self._sound_frames.close()

    def _read_packets(self) -> None:
        for track in self._tracks:
            self._set_threads(track.stream)
        for packet in _demuxed(self.container, *(track.stream for track in self._tracks)):
            track = self.video_track if packet.stream is self.video else self.audio_track
            assert track is not None
            track.add(packet)

    def _set_threads(self, stream: VideoStream | AudioStream) -> None:
        stream.codec_context.thread_count = self.threads
        if stream.type == "video" and self.threads != 1:
            stream.codec_context.thread_type = "AUTO"

    def packets(self, track: Track, start: int = 0, stop: int | None = None) -> Iterator[Packet]:
        """The track's packets `[start, stop)` in the order of the file, kept or read again; after the last, the empty one that ends decoding."""
        if track.packets is not None:
            yield from islice(chain(track.packets, [_flush(track.stream)]), start, stop)
            return
        with _opened(self.source) as container:
            stream = container.streams[track.stream.index]
            assert isinstance(stream, VideoStream | AudioStream)
            self._set_threads(stream)
            track.context = stream.codec_context
            yield from islice(chain(_demuxed(container, stream), [_flush(stream)]), start, stop)

    def _check_complete(self) -> None:
        """Every duration that the file declares against the packets that are there, and the packets' times against reason."""
        for track in self._tracks:
            stream = track.stream
            if stream.duration and stream.time_base and stream.type in self._spans:
                start, stop = self._spans[stream.type]
                _check_present(stop - start, stream.duration * stream.time_base, f"{stream.type} stream")
        if self.container.duration and self._spans:
            starts, stops = zip(*self._spans.values(), strict=True)
            present = max(stops) - min(0, *starts)  # some containers count from 0, some from the start
            _check_present(present, Fraction(self.container.duration, 1_000_000), f"{self.container.format.name} file")
        if self.video_track is not None and self.video_track.stream.time_base:
            first, stop = self._spans["video"]
            times = np.sort(self.video_track.shown[self.video_track.is_presented])
            between = int(np.diff(times).max(initial=0)) * self.video_track.stream.time_base
            longest = max(first - self.origin, between, stop - int(times[-1]) * self.video_track.stream.time_base)
            if longest > MAX_STILL_SECONDS:
                raise MediaError("undecodable", f"the pictures' times jump by {float(longest):.0f} s")

    @property
    def video_end(self) -> Fraction:
        """When the last picture ends, in the container's seconds."""
        return self._spans["video"][1]

    @property
    def frames(self) -> int:
        """Frames on the clip's clock: to the pictures' end or the part's, to the nearest frame. Without a video stream, the sound's end."""
        return floor((self.end - self.start) * self.frame_rate_hz + Fraction(1, 2))

    def frame_range(self, start_seconds: float | int | Fraction = 0, duration_seconds: float | int | Fraction | None = None) -> tuple[int, int]:
        """The frames `[start, stop)` that are shown from an instant of the clip's clock on, for a duration or to the end."""
        if start_seconds < 0 or (duration_seconds is not None and duration_seconds <= 0):
            raise ValueError(f"start_seconds is {start_seconds}, duration_seconds {duration_seconds}; expected at least 0, and more than 0 or None")
        start, stop = floor(exact_seconds(start_seconds) * self.frame_rate_hz), self.frames
        if start and start >= self.frames:
            raise MediaError("too_short", f"it has {self.frames / self.frame_rate_hz:.2f} s of pictures, which end before {float(start_seconds):g} s")
        if duration_seconds is not None:
            stop = min(stop, start + max(1, floor(exact_seconds(duration_seconds) * self.frame_rate_hz)))
        return start, stop

    def samples(self, sample_rate_hz: int, frames: int | None = None) -> int:
        """Samples on the output clock, per channel: in the whole clip, or in its first `frames`."""
        return floor(Fraction((self.frames if frames is None else frames) * sample_rate_hz, self.frame_rate_hz) + Fraction(1, 2))

    # Pictures

    def pictures(
        self, short_side: int | None = None, pixel_format: str | None = "yuv420p", start: int = 0, stop: int | None = None
    ) -> Iterator[VideoFrame]:
        """The clip's frames `[start, stop)` on its clock, upright, scaled to `short_side`; the same object again where a picture is held. One use.

        Without a size and a format, pictures are as they were decoded, or turned.
        """
        fit = PictureFit(short_side, pixel_format)
        shown: tuple[VideoFrame, VideoFrame] | None = None
        stop = self.frames if stop is None else stop
        for frame in islice(hold(self._ticked_pictures(start, stop), stop), start, None):
            if shown is None or shown[0] is not frame:
                shown = (frame, self._fitted(fit, frame))
            yield shown[1]

    def rgb(self, short_side: int | None = None) -> Pictures:
        """The clip's frames as RGB. One use."""
        pieces = list(self.rgb_pieces(self.frames, short_side))
        if not pieces:
            raise MediaError("too_short", "its pictures last for less than half a frame")
        return pieces[0]

    def rgb_pieces(self, piece_frames: int, short_side: int | None = None, start: int = 0, stop: int | None = None) -> Iterator[Pictures]:
        """The clip's frames `[start, stop)` as RGB, so many at a time. One use. A piece is the caller's: it is not looked at again."""
        stop = self.frames if stop is None else stop
        to_rgb, piece, at, shown, size = VideoReformatter(), None, 0, None, None
        for index, frame in enumerate(self.pictures(short_side, "yuv420p" if short_side else None, start, stop), start):
            size = size or (frame.width, frame.height)
            if piece is None:
                piece, at = empty_pictures(min(piece_frames, stop - index), size[1], size[0]), 0
            if frame is shown and at:
                piece[at] = piece[at - 1]
            else:
                piece[at] = to_rgb.reformat(frame, *size, format="rgb24", threads=1).to_ndarray()
            shown, at = frame, at + 1
            if at == len(piece):
                yield piece
                piece = None

    def _fitted(self, fit: "PictureFit", frame: VideoFrame) -> VideoFrame:
        try:
            return fit(frame)
        except MemoryError:
            raise
        except FFmpegError as error:
            raise MediaError("undecodable", f"{frame.format.name} pictures of {frame.width}x{frame.height} cannot be scaled: {error}") from error

    def _ticked_pictures(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, VideoFrame]]:
        """Decoded pictures in time order with the tick of the output clock that each starts on: those of frames `[start, stop)`, and some before."""
        track = self.video_track
        assert track is not None
        count, last, step = 0, None, Fraction(1, 25)
        key = self._key_before(track, start)
        own_time_base = track.stream.time_base
        assert own_time_base is not None  # else there were no span
        settled = int(track.shown[key]) * own_time_base
        for fed, (_, frame) in self._decoded(track, key):
            time_base = frame.time_base or own_time_base
            step = frame.duration * time_base if frame.duration else step
            pts = frame.pts if frame.pts is not None else frame.dts
            seconds = pts * time_base if pts is not None else (self.origin if last is None else last + step)
            self._rotation = frame.rotation
            count += 1
            if key and seconds < settled:
                self.video_faults = 0  # pictures shown before the key frame may miss others that were not decoded
                continue
            self.video_faults += frame.is_corrupt
            if last is None or seconds >= last:
                tick = floor((seconds - self.start) * self.frame_rate_hz + Fraction(1, 2))
                if stop is not None and (stop < self.frames or self.end < self.video_end) and tick >= stop:
                    _check_faults(self.video_faults, fed, "video")
                    return
                yield tick, frame
                last = seconds
        if not count:
            raise MediaError("undecodable", f"no picture in {len(track)} {track.context.name} packets")
        _check_faults(self.video_faults, len(track) + 1 - key, "video")

    def _key_before(self, track: Track, start: int) -> int:
        """The packet from which to decode what is shown from frame `start` on: a key frame, or the first."""
        if (not start and self.start == self.origin) or (track.pts == NO_TIME).any():
            return 0  # without presentation times, a picture's time depends on the ones before
        assert track.stream.time_base is not None
        latest = ceil((self.start + Fraction(2 * start + 1, 2 * self.frame_rate_hz)) / track.stream.time_base)  # half a frame: to the nearest tick
        keys = np.flatnonzero(track.is_key & track.is_presented & (track.pts < latest))
        return int(keys[track.pts[keys].argmax()]) if len(keys) else 0

    # Sound

    def sound(self, sample_rate_hz: int | None = None, channels: int | None = None) -> tuple[Sound, int]:
        """The whole sound on the clip's clock, and its sample rate. One use."""
        return self.sounds((sample_rate_hz, channels))[0]

    def sounds(self, *formats: tuple[int | None, int | None]) -> list[tuple[Sound, int]]:
        """The whole sound on the clip's clock in each (sample rate in Hz, channels), decoded once; and its sample rate. One use."""
        own_rate_hz, own_channels = self.sound_format()
        frames = self._all_sound() if len(formats) == 1 else list(self._all_sound())
        found, counted = [], (self.audio_gaps, self.audio_faults)
        for sample_rate_hz, channels in formats:
            if found:
                self.audio_gaps, self.audio_faults = counted  # a hole counts once, however often it is resampled
            rate_hz = sample_rate_hz or own_rate_hz
            track, at = np.zeros((channels or own_channels, self.samples(rate_hz)), np.float32), 0
            # Of a part, what comes after it is not decoded; of all of it, every packet is seen to be good.
            for wave in self._pieces(frames, rate_hz, track.shape[0], 0, self.frames if self.is_part else None):
                track[:, at : at + wave.shape[1]] = wave
                at += wave.shape[1]
            if self.is_part:
                _check_faults(self.audio_faults, self._sound_packets + 1, "audio")
            found.append((track, rate_hz))
        return found

    @property
    def has_sound(self) -> bool:
        """Whether there is sound that can be decoded."""
        return self._first_sound is not None

    def sound_format(self) -> tuple[int, int]:
        """The sound's own sample rate in Hz and number of channels. Raises MediaError if none can be decoded."""
        if self._first_sound is None:
            raise MediaError("undecodable", f"no sound in {len(self.audio_track or ())} audio packets")
        first = self._first_sound[1]
        return first.sample_rate, first.layout.nb_channels

    def sound_pieces(self, sample_rate_hz: int, channels: int | None = None, start: int = 0, stop: int | None = None) -> Iterator[Sound]:
        """The sound of the clip's frames `[start, stop)` in pieces as they are decoded, silence where there is none. One use.

        Sound is always decoded from the beginning: only so is its place exact to the sample in every container.
        """
        yield from self._pieces(self._all_sound(), sample_rate_hz, channels, start, stop)

    def _all_sound(self) -> Iterator[tuple[Fraction, AudioFrame]]:
        return chain([self._first_sound] if self._first_sound else [], self._sound_frames)

    def _pieces(
        self, frames: Iterable[tuple[Fraction, AudioFrame]], sample_rate_hz: int, channels: int | None, start: int, stop: int | None
    ) -> Iterator[Sound]:
        _, own_channels = self.sound_format()
        assert self._first_sound is not None
        layout = channel_layout(channels) if channels else self._first_sound[1].layout.name
        filled, end = self.samples(sample_rate_hz, start), self.samples(sample_rate_hz, stop)
        for at, wave in self._placed_sound(frames, layout, sample_rate_hz):
            if stop is not None and filled >= end:
                break
            skip = max(0, filled - at)  # a run that starts inside the one before: what is already there stays
            until = min(end, at + wave.shape[1])
            if until > at + skip:
                yield from _silence(wave.shape[0], at + skip - filled)
                yield wave[:, skip : until - at]
                filled = until
        yield from _silence(channels or own_channels, end - filled)

    def _placed_sound(self, frames: Iterable[tuple[Fraction, AudioFrame]], layout: str, rate_hz: int) -> Iterator[tuple[int, Sound]]:
        """Resampled pieces of sound, each with the sample of the output clock on which it starts; only a hole in the timestamps makes one there."""
        run: _Run | None = None
        for seconds, frame in frames:
            if run is not None and not run.continues(frame, seconds):
                self.audio_gaps += 1
                yield from run.finish()
                run = None
            if run is None:
                run = _Run(seconds, floor((seconds - self.start) * rate_hz + Fraction(1, 2)), frame, layout, rate_hz)
            try:
                pieces = run.add(frame)
            except MemoryError:
                raise
            except FFmpegError:  # damage can look like a format that no sound has
                self.audio_faults += 1
                run = None
            else:
                yield from pieces
        if run is not None:
            yield from run.finish()
        _check_faults(self.audio_faults, len(self.audio_track or ()) + 1, "audio")

    def _decoded_sound(self) -> Generator[tuple[Fraction, AudioFrame]]:
        """Audio frames with the time of their first sample; a frame without a timestamp follows the one before it."""
        following = Fraction(0)
        for fed, (packet, frame) in self._decoded(self.audio_track) if self.audio_track is not None else ():
            self._sound_packets = fed
            seconds = following if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base
            if packet.pts is not None and packet.has_sidedata("skip_samples"):
                # The decoder rounds the time of a frame that it trimmed to the container's ticks (1 ms in webm).
                (skipped,) = struct.unpack_from("<I", bytes(packet.get_sidedata("skip_samples")))
                exact = packet.pts * packet.time_base + Fraction(skipped, frame.sample_rate)
                seconds = exact if abs(exact - seconds) <= packet.time_base else seconds
            following = seconds + Fraction(frame.samples, frame.sample_rate)
            if frame.samples:
                yield seconds, frame

    def _decoded(self, track: Track, start: int = 0) -> Iterator[tuple[int, tuple[Packet, Any]]]:
        """Packets from the one numbered `start` with the frames they gave, counted; those that cannot be decoded are noted and skipped."""
        for fed, packet in enumerate(self.packets(track, start), 1):
            try:
                frames = packet.decode()
            except MemoryError:
                raise
            except FFmpegError:
                self.video_faults += track is self.video_track
                self.audio_faults += track is self.audio_track
                continue
            for frame in frames:
                yield fed, (packet, frame)

    def info(self) -> SourceInfo:
        """What the file held; complete once its streams have been decoded."""
        assert self.video is not None and self.video_track is not None
        context = cast(VideoCodecContext, self.video_track.context)
        start, sound = self._first_sound or (None, None)
        return SourceInfo(
            container=self.container.format.name,
            video_codec=context.name,
            pixel_format=context.pix_fmt or "unknown",
            width=context.width,
            height=context.height,
            frame_rate=str(self.video.average_rate or self.video.guessed_rate or "unknown"),
            rotation_degrees=self._rotation,
            video_start_seconds=float(self._spans["video"][0] - self.origin),
            audio_codec=self.audio_track.context.name if self.audio_track else None,
            audio_rate_hz=sound.sample_rate if sound else None,
            audio_layout=sound.layout.name if sound else None,
            audio_start_seconds=float(start - self.origin) if start is not None else None,
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
    Without either, pictures stay as they are unless they must be turned.
    """

    def __init__(self, short_side: int | None, pixel_format: str | None) -> None:
        self.short_side = short_side
        self.pixel_format = pixel_format
        self.scaled: tuple[int, int] | None = None
        self._kind: tuple | None = None
        self._graph = Graph()

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        turns = self.turns(frame)
        if self.short_side is None and self.pixel_format is None and not turns:
            return frame
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
        elif self.pixel_format is not None and (frame.width % 2 or frame.height % 2):
            filters.append(graph.add("crop", w="trunc(iw/2)*2", h="trunc(ih/2)*2"))
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
    """Contiguous audio frames of one format on their way through one resampler; pieces come out with the sample of the output clock they start on."""

    def __init__(self, start: Fraction, at: int, frame: AudioFrame, layout: str, rate_hz: int) -> None:
        self.start = start
        self.at = at
        self.samples = 0
        self.format = (frame.format.name, frame.layout.name, frame.sample_rate)
        self._resampler = AudioResampler(format="fltp", layout=layout, rate=rate_hz)

    def continues(self, frame: AudioFrame, seconds: Fraction) -> bool:
        expected = self.start + Fraction(self.samples, frame.sample_rate)
        return self.format == (frame.format.name, frame.layout.name, frame.sample_rate) and abs(seconds - expected) <= AUDIO_JITTER_SECONDS

    def add(self, frame: AudioFrame) -> list[tuple[int, Sound]]:
        self.samples += frame.samples
        return self._placed(self._resampler.resample(frame))

    def finish(self) -> list[tuple[int, Sound]]:
        return self._placed(self._resampler.resample(None))

    def _placed(self, frames: Iterable[AudioFrame | None]) -> list[tuple[int, Sound]]:
        pieces = []
        for frame in frames:
            if frame is not None:
                pieces.append((self.at, frame.to_ndarray()))
                self.at += frame.samples
        return pieces


def _silence(channels: int, samples: int) -> Iterator[Sound]:
    """So many samples of it, in pieces."""
    for at in range(0, samples, SILENCE_SAMPLES):
        yield np.zeros((channels, min(SILENCE_SAMPLES, samples - at)), np.float32)


def _demuxed(container: InputContainer, *streams: VideoStream | AudioStream) -> Iterator[Packet]:
    """The streams' packets in the order of the file, as far as it can be read."""
    try:
        for packet in container.demux(streams):
            if packet.size:
                yield packet
    except MemoryError:
        raise
    except (FFmpegError, IndexError):
        # A file that breaks off, or grows streams from damaged bytes (PyAV's IndexError): what was read stays, and `_check_complete` judges
        # whether it is enough.
        return


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


def channel_layout(channels: int) -> str:
    """swresample's name for that many channels."""
    return {1: "mono", 2: "stereo"}.get(channels) or f"{channels} channels"


def _check_present(present: Fraction, declared: Fraction, what: str) -> None:
    if present < MIN_PRESENT * declared:
        raise MediaError("truncated", f"the {what} says {float(declared):.2f} s but holds {float(present):.2f} s")


def _check_faults(faults: int, packets: int, what: str) -> None:
    if faults > MAX_FAULTY * packets:
        raise MediaError("undecodable", f"{faults} of {packets} {what} packets cannot be decoded")
