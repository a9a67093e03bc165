"""A video's sound moved against its pictures: packets are copied with other times, nothing is encoded where the container can say when sound begins.

Runs where decoding is isolated. Knows no network and no dataset; how far to move is for others to say.
"""

import io
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from heapq import merge
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from av.audio.format import AudioFormat
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.codec import Codec
from av.codec.codec import UnknownCodecError
from av.container import InputContainer, OutputContainer
from av.container.core import Flags
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition, Stream

from pipeline.decode import FORMATS, NO_TIME, MediaError, OpenClip, Sound, channel_layout, exact_seconds, open_clip

TOLERANCE_SECONDS = 0.0025
"""How exactly a container must keep the place of copied sound: its ticks may be a millisecond."""
ENCODED_TOLERANCE_SECONDS = 0.01
"""The same where it is encoded anew."""
PIECE_SAMPLES = 1 << 16
"""Samples per channel that are read and encoded at a time."""
BITS_PER_SECOND = 128_000
"""Of sound that is encoded anew, where its own rate is not known."""
CONTAINERS = {
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "webm",
    ".avi": "avi",
    ".ts": "mpegts",
    ".mts": "mpegts",
    ".m2ts": "mpegts",
    ".mpg": "mpeg",
    ".mpeg": "mpeg",
    ".flv": "flv",
    ".ogv": "ogg",
    ".wmv": "asf",
}
"""Endings of video files, and what ffmpeg calls their containers."""


@dataclass(frozen=True)
class Moved:
    """What `move_sound` wrote."""

    path: Path
    container: str
    video_packets: int
    encoded: bool
    """Whether the sound was encoded anew, because the container cannot say when sound begins."""
    notes: tuple[str, ...]
    """What the file is not, or has not, that the source was or had."""


def move_sound(source: str | Path | bytes, out_path: str | Path, delay_seconds: float | Fraction) -> Moved:
    """The video with its sound `delay_seconds` later (earlier if below 0), in the container that the name of `out_path` says.

    Pictures, sound and subtitles are copied packet by packet; every audio track is moved. Sound that would begin before the pictures or after their
    end is left out, to the packet (some 20 ms). Where the container cannot say when sound begins (avi), the sound is moved as samples and encoded
    anew, and only the track that a player takes is kept. The file is read back and its times compared before it gets its name.

    Raises MediaError where the source is at fault, ValueError for a container that cannot hold what the source has. Memory does not grow with the
    film but for its packets' times.
    """
    out_path, delay = Path(out_path), exact_seconds(delay_seconds)
    if out_path.suffix.lower() not in CONTAINERS:
        raise ValueError(f"{out_path} does not say by its ending which container it is; expected one of {', '.join(CONTAINERS)}")
    container, part = CONTAINERS[out_path.suffix.lower()], out_path.with_name(f"{out_path.name}.part")
    try:
        with open_clip(source, need_audio=True, in_memory=False) as clip:
            copied = _attempt(_copy, clip, part, container, delay) or _attempt(_encode, clip, part, container, delay)
            if copied is None:
                assert clip.video is not None and clip.audio is not None
                codecs = f"{clip.video.codec_context.name} pictures and {clip.audio.codec_context.name} sound"
                raise ValueError(f"{out_path.name}: {container} does not take {codecs}, or not so moved; give out= the source's own ending, or .mkv")
        part.replace(out_path)
    finally:
        part.unlink(missing_ok=True)
    return Moved(out_path, container, copied.video_packets, copied.encoded, copied.notes)


@dataclass(frozen=True)
class _Copied:
    """What an attempt wrote."""

    video_packets: int
    sound_seconds: np.ndarray
    """When the packets of the track that a player takes ought to begin, after the first picture."""
    encoded: bool
    notes: tuple[str, ...] = ()


def _attempt(
    write: Callable[[OpenClip, Path, str, Fraction], _Copied], clip: OpenClip, part: Path, container: str, delay: Fraction
) -> _Copied | None:
    """What was written; None where the container refused, or does not keep the sound's place."""
    try:
        copied = write(clip, part, container, delay)
    except (FFmpegError, ValueError):
        return None
    return copied if _is_in_place(part, copied) else None


def _is_in_place(part: Path, copied: _Copied) -> bool:
    """Whether the file that was written says when its sound begins as it ought to."""
    try:
        with open_clip(part, need_audio=True, in_memory=False) as clip:
            assert clip.video_track is not None and clip.audio_track is not None
            found = _seconds(clip.audio_track.shown, clip.audio_track.stream) - _seconds(clip.video_track.shown, clip.video_track.stream).min()
    except MediaError:  # it counts sound that begins late as missing (asf)
        return False
    if copied.encoded:
        return abs(float(found[0] - copied.sound_seconds[0])) <= ENCODED_TOLERANCE_SECONDS
    # From the end: what is hidden in front is not always told of.
    both = min(len(found), len(copied.sound_seconds))
    return both > 0 and bool(np.abs(found[-both:] - copied.sound_seconds[-both:]).max() <= TOLERANCE_SECONDS)


def _seconds(ticks: np.ndarray, stream: Stream) -> np.ndarray:
    return ticks.astype(np.float64) * float(stream.time_base or 0)


# Copying


class _Times:
    """When the packets of a stream are shown and decoded, in the order of the file, as the container says."""

    def __init__(self) -> None:
        self._pts, self._dts = array("q"), array("q")

    def add(self, packet: Packet) -> None:
        self._pts.append(NO_TIME if packet.pts is None else packet.pts)
        self._dts.append(NO_TIME if packet.dts is None else packet.dts)

    def settled(self) -> tuple[np.ndarray, np.ndarray]:
        """Both for every packet; what is not said follows from the other."""
        pts, dts = np.frombuffer(self._pts, np.int64), np.frombuffer(self._dts, np.int64)
        shown = np.where(pts == NO_TIME, dts, pts)
        if (dts != NO_TIME).all():
            return shown, dts
        decoded = np.sort(shown)  # matroska: in order, and early enough for every picture
        return shown, decoded - (decoded - shown).max(initial=0)


def _copy(clip: OpenClip, part: Path, container: str, delay: Fraction) -> _Copied:
    """Every stream's packets as they are, the sound's with other times."""
    assert clip.video is not None and clip.audio is not None
    with _reopened(clip.source) as source:
        kept = [stream for stream in source.streams if _is_kept(stream)]
        times = {stream.index: _Times() for stream in kept}
        for packet in source.demux(kept):
            if packet.size:
                times[packet.stream.index].add(packet)
    settled = {index: own.settled() for index, own in times.items()}
    with _reopened(clip.source) as source, av.open(str(part), "w", format=container) as out:
        out.flags |= Flags.bitexact.value
        out.metadata.update(source.metadata)
        into, notes = _streams(source, out, kept=list(times))
        moves = {index: _Move.of(source.streams[index], clip, delay, *settled[index]) for index in into}
        for packet in source.demux([source.streams[index] for index in into]):
            index = packet.stream.index
            if packet.size and moves[index].place(packet):
                packet.stream = into[index]
                out.mux_one(packet)
    pictures, sound = moves[clip.video.index], moves[clip.audio.index]
    first_shown = float(pictures.shown.min() * (clip.video.time_base or 0))
    # As they ought to be, not as the container's ticks make them: avi's are as long as a packet.
    exact = _seconds(settled[clip.audio.index][0][sound.wanted], clip.audio) + float(delay)
    return _Copied(len(pictures.shown), exact - first_shown, encoded=False, notes=notes)


@contextmanager
def _reopened(source: str | Path | bytes) -> Iterator[InputContainer]:
    """A source that has been opened before."""
    file = io.BytesIO(source) if isinstance(source, bytes) else "file:" + os.fspath(source)
    with av.open(file, "r", metadata_errors="replace", options={"format_whitelist": FORMATS, "protocol_whitelist": "file"}) as container:
        yield container


def _is_kept(stream: Stream) -> bool:
    """Pictures, sound and subtitles; a cover is none of them."""
    return stream.type in ("video", "audio", "subtitle") and not stream.disposition & Disposition.attached_pic


def _streams(source: InputContainer, out: OutputContainer, *, kept: Sequence[int]) -> tuple[dict[int, Stream], tuple[str, ...]]:
    """The new file's streams by the numbers of the old one's, and what had to be left out."""
    into: dict[int, Stream] = {}
    left_out: list[str] = []
    for stream in source.streams:
        try:
            if stream.index not in kept:
                left_out.append(stream.type)
                continue
            new = out.add_stream_from_template(stream, opaque=True)
        except ValueError:
            if stream.type != "subtitle":
                raise
            left_out.append("subtitles")
            continue
        new.metadata.update(stream.metadata)
        into[stream.index] = new
    return into, (f"left out: {', '.join(left_out)}",) if left_out else ()


@dataclass(frozen=True)
class _Move:
    """New times of a stream's packets, one after the other."""

    shown: np.ndarray
    decoded: np.ndarray
    wanted: np.ndarray
    """Which of them stay."""
    _order: Iterator[int]

    @classmethod
    def of(cls, stream: Stream, clip: OpenClip, delay: Fraction, shown: np.ndarray, decoded: np.ndarray) -> "_Move":
        """Sound is moved; other streams stay."""
        wanted = np.ones(len(shown), bool)
        if stream.type == "audio":
            assert stream.time_base is not None
            ticks = round(delay / stream.time_base)
            shown, decoded = shown + ticks, decoded + ticks
            wanted = shown < round(clip.video_end / stream.time_base)
            if delay < 0:
                wanted &= shown >= round(clip.start / stream.time_base)
        return cls(shown, decoded, wanted, iter(range(len(shown))))

    def place(self, packet: Packet) -> bool:
        """Give the next packet its times; whether it stays."""
        number = next(self._order)
        packet.pts, packet.dts = int(self.shown[number]), int(self.decoded[number])
        return bool(self.wanted[number])


# Encoding


def _encode(clip: OpenClip, part: Path, container: str, delay: Fraction) -> _Copied:
    """The pictures' packets as they are, and the sound as samples: silence before it, or its beginning left out."""
    assert clip.video is not None and clip.video_track is not None and clip.audio is not None
    rate_hz, channels = clip.sound_format()
    tracks = len(clip.container.streams.audio)
    with _reopened(clip.source) as source, av.open(str(part), "w", format=container) as out:
        out.flags |= Flags.bitexact.value
        out.metadata.update(source.metadata)
        pictures = out.add_stream_from_template(source.streams[clip.video.index], opaque=True)
        sound = out.add_stream(_encoder(clip.audio, out), rate=rate_hz)
        assert isinstance(sound, AudioStream)
        sound.codec_context.layout = channel_layout(channels)
        sound.codec_context.bit_rate = clip.audio.codec_context.bit_rate or BITS_PER_SECOND
        priming = _priming_samples(sound.codec_context.name, rate_hz, channels)
        # Avi has no time before 0, where an encoder's first, empty samples belong: the sound that they would take the place of is left out.
        early = priming if container == "avi" else 0
        pieces = delayed(clip.sound_pieces(rate_hz), channels, round(delay * rate_hz) - early, clip.samples(rate_hz) - early)
        streams = _pictures(clip, source, pictures), _sound(sound, pieces, rate_hz, round(clip.start * rate_hz) + early)
        for packet in merge(*streams, key=lambda packet: (packet.dts or 0) * packet.time_base):
            out.mux_one(packet)
    start = float(clip.start) - float(_seconds(clip.video_track.shown, clip.video).min()) + (early - priming) / rate_hz
    notes = ["the sound was encoded anew"] + ([f"{tracks - 1} more audio tracks are left out"] if tracks > 1 else [])
    return _Copied(len(clip.video_track), np.array([start]), encoded=True, notes=tuple(notes))


def _encoder(stream: AudioStream, out: OutputContainer) -> str:
    """The sound's own codec if it can be encoded, else the container's usual one."""
    try:
        return Codec(stream.codec_context.name, "w").name
    except UnknownCodecError:
        return out.default_audio_codec


def _priming_samples(encoder: str, rate_hz: int, channels: int) -> int:
    """How many samples an encoder puts before the first that it is given."""
    context = cast(AudioCodecContext, Codec(encoder, "w").create())
    context.sample_rate, context.layout, context.format = rate_hz, channel_layout(channels), (context.codec.audio_formats or [AudioFormat("fltp")])[0]
    frame = AudioFrame.from_ndarray(np.zeros((channels, 1 << 13), np.float32), format="fltp", layout=channel_layout(channels))
    frame.sample_rate, frame.pts = rate_hz, 0
    first = next((packet.pts for packet in (*context.encode(frame), *context.encode(None)) if packet.pts is not None), 0)
    return max(0, -first)


def delayed(pieces: Iterable[Sound], channels: int, samples: int, length: int) -> Iterator[Sound]:
    """A sound of `length` samples moved by so many of silence, or with so many of its first left out if below 0; as long as before."""
    left = length
    for at in range(0, max(0, min(samples, length)), PIECE_SAMPLES):
        silence = np.zeros((channels, min(PIECE_SAMPLES, samples - at, left)), np.float32)
        left -= silence.shape[1]
        yield silence
    skip = max(0, -samples)
    for piece in pieces:
        own = piece[:, skip : skip + left]
        skip = max(0, skip - piece.shape[1])
        left -= own.shape[1]
        if own.shape[1]:
            yield own
    for at in range(0, left, PIECE_SAMPLES):
        yield np.zeros((channels, min(PIECE_SAMPLES, left - at)), np.float32)


def _pictures(clip: OpenClip, source: InputContainer, stream: Stream) -> Iterator[Packet]:
    """The packets of the clip's pictures, for the new file's stream."""
    assert clip.video is not None and clip.video_track is not None
    times = _Times()
    for packet in clip.packets(clip.video_track):
        if packet.size:
            times.add(packet)
    shown, decoded = times.settled()
    packets = (packet for packet in source.demux(source.streams[clip.video.index]) if packet.size)
    for packet, pts, dts in zip(packets, shown.tolist(), decoded.tolist(), strict=True):
        packet.pts, packet.dts, packet.stream = pts, dts, stream
        yield packet


def _sound(stream: AudioStream, pieces: Iterable[Sound], rate_hz: int, first: int) -> Iterator[Packet]:
    """The sound encoded, from sample `first` of the container's clock on."""
    at = first
    for piece in pieces:
        layout = channel_layout(piece.shape[0])
        frame = AudioFrame.from_ndarray(np.ascontiguousarray(piece), format="fltp", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = rate_hz, Fraction(1, rate_hz), at
        at += piece.shape[1]
        yield from stream.encode(frame)
    yield from stream.encode(None)
