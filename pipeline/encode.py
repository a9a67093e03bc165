"""Writing clips: the re-encoder that makes media records, sound put under untouched pictures, stretches of originals, and wav files.

Everything happens in process through PyAV; the bytes of a re-encoded clip depend on its source, the configuration and the libraries' versions only.
`reencode` holds its clip in memory; everything else takes a film of any length, packets and sound pass through as they are read.
This module knows no dataset, no Ray and no network; `pipeline/decode.py` reads, and says what time 0 is.
"""

import io
import os
import platform
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from heapq import merge
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.container.core import Flags
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES
from pipeline.decode import (
    NO_TIME,
    MediaError,
    OpenClip,
    Pictures,
    Sound,
    SourceInfo,
    Ticks,
    channel_layout,
    empty_pictures,
    exact_seconds,
    open_clip,
)

PIECE_SAMPLES = 1 << 16
"""Samples per channel that are read, converted and encoded at a time."""
RF64_SIZE = 0xFFFFFFFF
"""What a wav file's header says where the size does not fit: it is in the ds64 chunk then."""
AAC_RATES_HZ = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
"""Sample rates that AAC knows."""


@dataclass(frozen=True)
class EncodeConfig:
    """How clips are re-encoded. The defaults are the published recipe (`-crf 10`, 25 fps, short side 256, AAC mono), at a preset that costs less."""

    frame_rate_hz: int = FRAME_RATE_HZ
    """Frames per second. The segment clock, and so the features, assume 25."""
    short_side: int = 256
    """Height or width of the pictures, whichever is shorter, in pixels; even. The other follows, rounded down to an even number."""
    crf: float = 10.0
    """x264's constant rate factor: 0 is lossless, 18 looks it, 23 is x264's own default."""
    preset: str = "fast"
    """x264's trade of CPU time for size: ultrafast, superfast, veryfast, faster, fast, medium, slow, slower, veryslow. Measured on real clips against
    medium (the published one): fast takes 0.84 of the CPU time for 1.4 % more bytes at the same SSIM; `preset=faster tune=ssim
    x264_params=ref=1:partitions=i8x8,i4x4` takes half, for 2 % more bytes, 0.0005 less SSIM and 0.3 dB less PSNR."""
    tune: str = ""
    """x264's tuning (film, grain, stillimage, psnr, ssim, fastdecode, zerolatency); empty for none."""
    gop_frames: int = 0
    """Most frames between two keyframes; 0 for x264's default, 250. Smaller makes seeking into a clip cheaper and the file larger."""
    pixel_format: str = "yuv420p"
    """Pixel format of the pictures."""
    x264_params: str = ""
    """More x264 parameters, `name=value:name=value`; they win over the preset."""
    x264_asm: str = "avx2"
    """Instruction set that x264 may use on x86. Its AVX-512 code is not deterministic; `auto` allows it, and older CPUs need their own."""
    x264_threads: int = 1
    """Threads that encode one clip. The bytes depend on it."""
    decode_threads: int = 1
    """Threads that decode one clip. The bytes do not depend on it."""
    audio_rate_hz: int = 44100
    """Sample rate of the sound, one that AAC knows."""
    audio_channels: int = 1
    """Channels of the sound, mixed down or up by swresample's rules."""
    audio_bitrate: int = 0
    """Bits per second of the sound; 0 for the AAC encoder's default (69,000 for one channel at 44100 Hz)."""

    def __post_init__(self) -> None:
        if self.short_side < 16 or self.short_side % 2:
            raise ValueError(f"short_side is {self.short_side}; expected an even number of pixels, at least 16")
        if self.frame_rate_hz < 1:
            raise ValueError(f"frame_rate_hz is {self.frame_rate_hz}; expected at least 1")


@dataclass(frozen=True)
class EncodedClip:
    """A re-encoded clip, and what it was made of."""

    mp4: bytes
    frames: int
    width: int
    height: int
    samples: int
    sample_rate_hz: int
    duration_seconds: float
    source: SourceInfo
    pictures: Pictures | None = None
    """The frames as they went into the encoder, RGB; only if asked for."""
    audio: Sound | None = None
    """The sound as it went into the encoder; only if asked for."""

    def record(self) -> dict:
        """What the clip's json says about it."""
        names = ("frames", "width", "height", "samples", "sample_rate_hz", "duration_seconds")
        return {name: getattr(self, name) for name in names} | {"source": asdict(self.source)}


def reencode(
    source: str | Path | bytes,
    config: EncodeConfig | None = None,
    *,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    keep_frames: bool = False,
) -> EncodedClip:
    """One clip as mp4 bytes on its clock: `frames / 25` seconds of pictures and exactly as much sound.

    `start_seconds` and `end_seconds` take a part of the video; `keep_frames` also returns the pictures and the sound about to be encoded, for
    featurising without a second decode. Raises MediaError where the clip is at fault.
    """
    config = config or EncodeConfig()
    with open_clip(
        source,
        frame_rate_hz=config.frame_rate_hz,
        threads=config.decode_threads,
        need_audio=True,
        in_memory=start_seconds is None and end_seconds is None,  # a part of a film should not cost the film's memory
        start_seconds=start_seconds,
        end_seconds=end_seconds,
    ) as clip:
        if clip.frames < SEGMENT_FRAMES:
            raise MediaError("too_short", f"{clip.frames} frames at {config.frame_rate_hz} fps; one segment of {SEGMENT_FRAMES} is the least")
        audio, _ = clip.sound(config.audio_rate_hz, config.audio_channels)
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as out:
            out.flags |= Flags.bitexact.value
            video = out.add_stream("libx264", rate=config.frame_rate_hz, options=_x264_options(config))
            sound = out.add_stream("aac", rate=config.audio_rate_hz)
            assert isinstance(video, VideoStream) and isinstance(sound, AudioStream)
            pictures, kept = clip.pictures(config.short_side, config.pixel_format), []
            video_packets = list(_encode_pictures(video, _keeping(pictures, clip.frames, kept) if keep_frames else pictures, config))
            sound_packets = list(_encode_sound(sound, [audio], audio.shape[0], config.audio_rate_hz, config.audio_bitrate))
            _interleave(out, video_packets, sound_packets)
        return EncodedClip(
            mp4=buffer.getvalue(),
            frames=clip.frames,
            width=video.codec_context.width,
            height=video.codec_context.height,
            samples=audio.shape[1],
            sample_rate_hz=config.audio_rate_hz,
            duration_seconds=clip.frames / config.frame_rate_hz,
            source=clip.info(),
            pictures=kept[0] if kept else None,
            audio=audio if keep_frames else None,
        )


@dataclass(frozen=True)
class Muxed:
    """What `mux`, `mux_wav` or `transcode_original` wrote."""

    path: Path
    """The file; its suffix is `.mkv` where pictures that are copied cannot go into an mp4."""
    container: str
    video_packets: int
    note: str | None
    """Why the file is not what was asked for; None if it is."""


def mux(
    video_source: str | Path | bytes,
    audio: Sound,
    sample_rate_hz: int,
    out_path: str | Path,
    *,
    start_seconds: float | int | Fraction = 0,
    duration_seconds: float | int | Fraction | None = None,
    audio_bitrate: int = 0,
) -> Muxed:
    """New sound under a video's own pictures, which are copied packet by packet and never re-encoded.

    Sample 0 of `audio` plays at `start_seconds` of the source's clock, where the new file begins: pictures only there to decode later ones are
    hidden by the mp4's edit list. The end is cut by packets: pictures that earlier ones need may stay, a few at most.
    """
    track = _SoundTrack(lambda: iter([audio]), audio.shape[0], sample_rate_hz, audio_bitrate)
    return _mux(video_source, track, out_path, exact_seconds(start_seconds), duration_seconds)


def mux_wav(
    video_source: str | Path | bytes,
    wav_path: str | Path,
    out_path: str | Path,
    *,
    start_seconds: float | int | Fraction = 0,
    duration_seconds: float | int | Fraction | None = None,
    audio_bitrate: int = 0,
) -> Muxed:
    """`mux` with the sound of a wav file, which is encoded as it is read.

    Memory grows only by the two files' indexes, of which one is read first and the other written last: 0.7 MB a minute were measured.
    """
    form = wav_format(wav_path)
    track = _SoundTrack(lambda: wav_pieces(wav_path, PIECE_SAMPLES), form.channels, form.sample_rate_hz, audio_bitrate)
    return _mux(video_source, track, out_path, exact_seconds(start_seconds), duration_seconds)


@dataclass(frozen=True)
class _SoundTrack:
    """Sound about to be encoded."""

    pieces: Callable[[], Iterator[Sound]]
    channels: int
    sample_rate_hz: int
    bitrate: int


def _mux(
    source: str | Path | bytes, sound: _SoundTrack, out_path: str | Path, start: Fraction, duration_seconds: float | int | Fraction | None
) -> Muxed:
    stop = None if duration_seconds is None else start + exact_seconds(duration_seconds)
    samples = None if stop is None else round((stop - start) * sound.sample_rate_hz)
    with open_clip(source, in_memory=False) as clip:
        copied, out_path = _Copied.of(clip, start, stop), Path(out_path)
        try:
            _write_muxed(out_path, "mp4", clip, copied, sound, samples)
            return Muxed(out_path, "mp4", copied.count, None)
        except ValueError as error:
            if not str(error).startswith("'mp4' format does not support"):
                raise
            assert clip.video is not None
            note = f"{clip.video.codec_context.name} pictures cannot go into an mp4"
        early = -int(copied.shown[0]) * copied.time_base
        if early > 0:
            note += f"; matroska has no edit lists, so it begins {float(early):.3f} s early"
        out_path = out_path.with_suffix(".mkv")
        _write_muxed(out_path, "matroska", clip, copied, sound, samples)
        return Muxed(out_path, "matroska", copied.count, note)


def transcode_original(
    source: str | Path | bytes,
    out_path: str | Path,
    *,
    start_seconds: float | int | Fraction = 0,
    duration_seconds: float | int | Fraction | None = None,
    short_side: int | None = None,
    config: EncodeConfig | None = None,
) -> Muxed:
    """A stretch of a video with its own sound, encoded anew as h264 and AAC in an mp4: what is played beside a generated one.

    The frames are those of `picture_pieces` (25 per second, from `floor(start_seconds * 25)`), at their own size unless `short_side` says otherwise;
    x264 follows `config` (`crf=10.0` by default, as published). The sound keeps its rate, or takes 48 kHz where AAC does not know it, and at most two
    channels. Where there is none, or none that can be decoded, the file has pictures only and `note` says so. Memory does not grow with the length.
    """
    config = config or EncodeConfig()
    with open_clip(source, frame_rate_hz=config.frame_rate_hz, threads=config.decode_threads, in_memory=False) as clip:
        start, stop = clip.frame_range(start_seconds, duration_seconds)
        if stop == start:
            raise MediaError("too_short", "its pictures last for less than half a frame")
        silent = "the original has no sound" if clip.audio is None else None if clip.has_sound else "the original's sound cannot be decoded"
        with _part(Path(out_path)) as part, av.open(str(part), "w", format="mp4") as out:
            out.flags |= Flags.bitexact.value
            video = out.add_stream("libx264", rate=config.frame_rate_hz, options=_x264_options(config))
            assert isinstance(video, VideoStream)
            streams = [_encode_pictures(video, clip.pictures(short_side, config.pixel_format, start, stop), config)]
            if not silent:
                rate_hz, channels = clip.sound_format()
                rate_hz, channels = rate_hz if rate_hz in AAC_RATES_HZ else 48000, min(channels, 2)
                sound = out.add_stream("aac", rate=rate_hz)
                assert isinstance(sound, AudioStream)
                pieces = clip.sound_pieces(rate_hz, channels, start, stop)
                streams.append(_encode_sound(sound, pieces, channels, rate_hz, config.audio_bitrate))
            _interleave(out, *streams)
        return Muxed(Path(out_path), "mp4", stop - start, silent and f"{silent}: pictures only")


@dataclass(frozen=True)
class _Copied:
    """Packets to be copied from one file into another, `[first, first + count)` of the source's, with their new times."""

    first: int
    shown: Ticks
    decoded: Ticks
    time_base: Fraction
    last_shown: int
    last_duration: int
    """What the picture shown last lasts, where the source does not say."""

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.shown)

    @classmethod
    def of(cls, clip: OpenClip, start: Fraction, stop: Fraction | None) -> "_Copied":
        """The video packets of `[start, stop)` on the clip's clock, from the key frame before, with `start` at timestamp 0."""
        track = clip.video_track
        assert track is not None and track.stream.time_base is not None
        time_base, shown, decoded = track.stream.time_base, track.shown, track.dts
        assert len(shown) and (shown != NO_TIME).all(), "OpenClip has placed these packets on a clock"
        if (decoded == NO_TIME).any():  # matroska: decoding times in order, early enough for every picture
            decoded = np.sort(shown)
            decoded = decoded - (decoded - shown).max()
        origin = round((clip.start + start) / time_base)
        keys = np.flatnonzero(track.is_key & (shown <= origin))
        first = int(keys[-1]) if len(keys) else 0
        wanted = np.arange(len(shown)) if stop is None else np.flatnonzero(shown < round((clip.start + stop) / time_base))
        last = max(int(wanted[-1]) if len(wanted) else 0, first) + 1
        end = int(shown.max())  # webm does not say how long the last picture is shown
        return cls(first, shown[first:last] - origin, decoded[first:last] - origin, time_base, end - origin, round(clip.video_end / time_base) - end)

    def packets(self, clip: OpenClip, stream: VideoStream) -> Iterator[Packet]:
        """The packets themselves, for a stream of the new file."""
        assert clip.video_track is not None
        packets = clip.packets(clip.video_track, self.first, self.first + self.count)
        for packet, pts, dts in zip(packets, self.shown.tolist(), self.decoded.tolist(), strict=True):
            packet.pts, packet.dts = pts, dts
            if pts == self.last_shown and not packet.duration:
                packet.duration = self.last_duration
            packet.stream = stream
            yield packet


def _write_muxed(path: Path, container: str, clip: OpenClip, copied: _Copied, sound: _SoundTrack, samples: int | None) -> None:
    with _part(path) as part, av.open(str(part), "w", format=container) as out:
        out.flags |= Flags.bitexact.value
        assert clip.video is not None
        video = out.add_stream_from_template(clip.video, opaque=True)
        stream = out.add_stream("aac", rate=sound.sample_rate_hz)
        assert isinstance(stream, AudioStream)
        pieces = _first_samples(sound.pieces(), samples)
        _interleave(out, copied.packets(clip, video), _encode_sound(stream, pieces, sound.channels, sound.sample_rate_hz, sound.bitrate))


@contextmanager
def _part(path: Path) -> Iterator[Path]:
    """A file that becomes `path` when it is complete; nothing is left of it otherwise."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _first_samples(pieces: Iterable[Sound], samples: int | None) -> Iterator[Sound]:
    """The pieces, or as many of their samples as are wanted."""
    for piece in pieces:
        if samples is None:
            yield piece
        elif samples:
            yield piece[:, :samples]
            samples -= min(samples, piece.shape[1])


# Wav files


@dataclass(frozen=True)
class WavFormat:
    """What a wav file's header says."""

    sample_rate_hz: int
    channels: int
    bits: int
    """16: integers; 32: floats."""
    samples: int
    """Per channel."""
    data_start: int
    """Byte at which the samples begin."""


class WavWriter:
    """A wav file of unknown length, written in pieces: 16-bit integers, clipped to [-1, 1], or with `bits=32` the floats as they are.

    The file appears under its name when it is closed; an exception inside a `with` leaves nothing. Its header has room to become that of an RF64
    (EBU Tech 3306), which a file above 4 GB is.
    """

    def __init__(self, path: str | Path, sample_rate_hz: int, channels: int, *, bits: int = 16) -> None:
        if bits not in (16, 32):
            raise ValueError(f"bits is {bits}; expected 16 (integers) or 32 (floats)")
        self.path = Path(path)
        self.samples = 0
        """How many have been written, per channel."""
        self._form = (sample_rate_hz, channels, bits)
        self._part = self.path.with_name(self.path.name + ".part")
        self._file = open(self._part, "wb")  # noqa: SIM115  # open until `close`
        self._file.write(_wav_header(*self._form, 0, roomy=True))

    def write(self, wave: Sound) -> None:
        """Append a piece of any length."""
        _, channels, bits = self._form
        if wave.shape[0] != channels:
            raise ValueError(f"a piece has {wave.shape[0]} channels; {self.path} has {channels}")
        self._file.write(_wav_bytes(wave, bits))
        self.samples += wave.shape[1]

    def close(self) -> None:
        """Complete the header and give the file its name."""
        if not self._file.closed:
            self._file.seek(0)
            self._file.write(_wav_header(*self._form, self.samples, roomy=True))
            self._file.close()
            self._part.replace(self.path)

    def discard(self) -> None:
        """Leave nothing."""
        if not self._file.closed:
            self._file.close()
            self._part.unlink(missing_ok=True)

    def __enter__(self) -> "WavWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def write_wav(path: str | Path, audio: Sound, sample_rate_hz: int, *, bits: int = 16) -> None:
    """A wav file of [channels, samples]: 16-bit integers, clipped to [-1, 1], or with `bits=32` the floats as they are."""
    if bits not in (16, 32):
        raise ValueError(f"bits is {bits}; expected 16 (integers) or 32 (floats)")
    with open(path, "wb") as file:
        file.write(_wav_header(sample_rate_hz, audio.shape[0], bits, audio.shape[1], roomy=False))
        for at in range(0, audio.shape[1], PIECE_SAMPLES):
            file.write(_wav_bytes(audio[:, at : at + PIECE_SAMPLES], bits))


def wav_format(path: str | Path) -> WavFormat:
    """The header of a wav file (RIFF or RF64). Raises ValueError for what is no wav, is cut short, or holds other than 16-bit integers or floats."""
    with open(path, "rb") as file:
        kind, size = file.read(4), os.fstat(file.fileno()).st_size
        if kind not in (b"RIFF", b"RF64") or file.read(8)[4:] != b"WAVE":
            raise ValueError(f"{path} is not a wav file")
        form, large = None, None
        while len(head := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", head)
            if name == b"ds64":
                large = struct.unpack_from("<8xQ", file.read(length))[0]
            elif name == b"fmt ":
                form = struct.unpack_from("<HHIIHH", file.read(length))
            elif name == b"data" and form is not None:
                code, channels, rate_hz, _, frame_bytes, bits = form
                if (code, bits) not in ((1, 16), (3, 32)):
                    raise ValueError(f"{path} holds {bits}-bit samples of format {code}; expected 16-bit integers or 32-bit floats")
                data = large if large is not None and length == RF64_SIZE else length
                if file.tell() + data > size:
                    raise ValueError(f"{path} is cut short: {size} bytes of {file.tell() + data}")
                return WavFormat(rate_hz, channels, bits, data // frame_bytes, file.tell())
            else:
                file.seek(length + length % 2, os.SEEK_CUR)
    raise ValueError(f"{path} is a wav file without samples")


def wav_pieces(path: str | Path, piece_samples: int) -> Iterator[Sound]:
    """The sound of a wav file in pieces of `piece_samples` (the last may be shorter), as floats."""
    form = wav_format(path)
    kind = np.dtype("<i2" if form.bits == 16 else "<f4")
    with open(path, "rb") as file:
        file.seek(form.data_start)
        for at in range(0, form.samples, piece_samples):
            count = min(piece_samples, form.samples - at) * form.channels
            interleaved = np.frombuffer(file.read(count * kind.itemsize), kind).reshape(-1, form.channels)
            wave = np.ascontiguousarray(interleaved.T, np.float32)
            yield wave if form.bits == 32 else wave / np.float32(32767)


def _wav_bytes(wave: Sound, bits: int) -> bytes:
    interleaved = np.ascontiguousarray(wave.T)
    return (interleaved.astype("<f4") if bits == 32 else np.rint(interleaved.clip(-1, 1) * 32767).astype("<i2")).tobytes()


def _wav_header(sample_rate_hz: int, channels: int, bits: int, samples: int, *, roomy: bool) -> bytes:
    """Everything before the samples; a roomy one always has the size of an RF64's."""
    frame_bytes = channels * bits // 8
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3 if bits == 32 else 1, channels, sample_rate_hz, sample_rate_hz * frame_bytes, frame_bytes, bits)
    data, room = samples * frame_bytes, struct.pack("<4sI28x", b"JUNK", 28) if roomy else b""
    size = 4 + len(room) + len(form) + 8 + data
    if size < RF64_SIZE:
        return struct.pack("<4sI4s", b"RIFF", size, b"WAVE") + room + form + struct.pack("<4sI", b"data", data)
    large = struct.pack("<4sIQQQI", b"ds64", 28, size + (0 if room else 36), data, samples, 0)
    return struct.pack("<4sI4s", b"RF64", RF64_SIZE, b"WAVE") + large + form + struct.pack("<4sI", b"data", RF64_SIZE)


# Encoding


def _x264_options(config: EncodeConfig) -> dict[str, str]:
    asm = f"asm={config.x264_asm}" if config.x264_asm != "auto" and platform.machine() in ("x86_64", "AMD64") else ""
    options = {"crf": str(config.crf), "preset": config.preset, "x264-params": ":".join(part for part in (asm, config.x264_params) if part)}
    if config.tune:
        options["tune"] = config.tune
    if config.gop_frames:
        options["g"] = str(config.gop_frames)
    return options


def _keeping(pictures: Iterable[VideoFrame], count: int, kept: list[Pictures]) -> Iterator[VideoFrame]:
    """The pictures, which on their way are also put into one array of RGB, the only item of `kept` afterwards."""
    to_rgb = VideoReformatter()
    for index, frame in enumerate(pictures):
        if not kept:
            kept.append(empty_pictures(count, frame.height, frame.width))
        kept[0][index] = to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
        yield frame


def _encode_pictures(stream: VideoStream, pictures: Iterable[VideoFrame], config: EncodeConfig) -> Iterator[Packet]:
    """Pictures, one for each frame of the clock, through the encoder."""
    context = stream.codec_context
    for index, frame in enumerate(pictures):
        if index == 0:
            context.width, context.height, context.pix_fmt = frame.width, frame.height, config.pixel_format
            context.time_base, context.thread_count = Fraction(1, config.frame_rate_hz), config.x264_threads
            context.color_range, context.colorspace = frame.color_range, frame.colorspace
            context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc
        frame.pts, frame.time_base, frame.duration = index, Fraction(1, config.frame_rate_hz), 1
        frame.pict_type = PictureType.NONE  # else the source's own key frames would be forced on x264
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _encode_sound(stream: AudioStream, pieces: Iterable[Sound], channels: int, sample_rate_hz: int, bitrate: int) -> Iterator[Packet]:
    """Sound through the AAC encoder. Its first packet is priming with a negative time, which the mp4's edit list hides."""
    layout = channel_layout(channels)
    stream.codec_context.layout = layout
    if bitrate:
        stream.codec_context.bit_rate = bitrate
    at = 0
    for piece in pieces:
        if piece.shape[1]:
            frame = AudioFrame.from_ndarray(np.ascontiguousarray(piece), format="fltp", layout=layout)
            frame.sample_rate, frame.time_base, frame.pts = sample_rate_hz, Fraction(1, sample_rate_hz), at
            at += piece.shape[1]
            yield from stream.encode(frame)
    yield from stream.encode(None)


def _interleave(out: OutputContainer, *streams: Iterable[Packet]) -> None:
    """Mux several streams' packets in the order of their decoding times, as they are made."""
    for packet in merge(*streams, key=lambda packet: (packet.dts or 0) * packet.time_base):
        out.mux_one(packet)
