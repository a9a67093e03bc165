"""Writing clips: the re-encoder that makes media records, sound put under untouched pictures, and wav files.

Everything happens in process through PyAV; the bytes of a re-encoded clip depend on its source, the configuration and the libraries' versions only.
This module knows no dataset, no Ray and no network; `pipeline/decode.py` reads, and says what time 0 is.
"""

import io
import platform
import struct
from dataclasses import asdict, dataclass
from fractions import Fraction
from heapq import merge
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.container.core import Flags
from av.packet import Packet
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES
from pipeline.decode import MediaError, OpenClip, Pictures, Sound, SourceInfo, channel_layout, empty_pictures, open_clip


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


def reencode(source: str | Path | bytes, config: EncodeConfig | None = None, *, keep_frames: bool = False) -> EncodedClip:
    """One clip as mp4 bytes on its clock: `frames / 25` seconds of pictures and exactly as much sound.

    `keep_frames` also returns the pictures and the sound about to be encoded, for featurising without a second decode.
    Raises MediaError where the clip is at fault.
    """
    config = config or EncodeConfig()
    with open_clip(source, frame_rate_hz=config.frame_rate_hz, threads=config.decode_threads, need_audio=True) as clip:
        if clip.frames < SEGMENT_FRAMES:
            raise MediaError("too_short", f"{clip.frames} frames at {config.frame_rate_hz} fps; one segment of {SEGMENT_FRAMES} is the least")
        audio, _ = clip.sound(config.audio_rate_hz, config.audio_channels)
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as out:
            out.flags |= Flags.bitexact.value
            video = out.add_stream("libx264", rate=config.frame_rate_hz, options=_x264_options(config))
            sound = out.add_stream("aac", rate=config.audio_rate_hz)
            assert isinstance(video, VideoStream) and isinstance(sound, AudioStream)
            video_packets, kept = _encode_pictures(video, clip, config, keep_frames=keep_frames)
            _interleave(out, video_packets, _encode_sound(sound, audio, config.audio_rate_hz, config.audio_bitrate))
        return EncodedClip(
            mp4=buffer.getvalue(),
            frames=clip.frames,
            width=video.codec_context.width,
            height=video.codec_context.height,
            samples=audio.shape[1],
            sample_rate_hz=config.audio_rate_hz,
            duration_seconds=clip.frames / config.frame_rate_hz,
            source=clip.info(),
            pictures=kept,
            audio=audio if keep_frames else None,
        )


@dataclass(frozen=True)
class Muxed:
    """What `mux` wrote."""

    path: Path
    """The file; its suffix is `.mkv` where the pictures' codec cannot go into an mp4."""
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
    start = _fraction(start_seconds)
    stop = None if duration_seconds is None else start + _fraction(duration_seconds)
    if stop is not None:
        audio = audio[:, : round((stop - start) * sample_rate_hz)]
    with open_clip(video_source) as clip:
        packets = _shifted(clip, start, stop)
        out_path, note = Path(out_path), None
        try:
            count = _write_muxed(out_path, "mp4", clip, packets, audio, sample_rate_hz, audio_bitrate)
            return Muxed(out_path, "mp4", count, None)
        except ValueError as error:
            if not str(error).startswith("'mp4' format does not support"):
                raise
            assert clip.video is not None
            note = f"{clip.video.codec_context.name} pictures cannot go into an mp4"
        early = -(packets[0].pts or 0) * packets[0].time_base
        if early > 0:
            note += f"; matroska has no edit lists, so it begins {float(early):.3f} s early"
        out_path = out_path.with_suffix(".mkv")
        count = _write_muxed(out_path, "matroska", clip, packets, audio, sample_rate_hz, audio_bitrate)
        return Muxed(out_path, "matroska", count, note)


def write_wav(path: str | Path, audio: Sound, sample_rate_hz: int, *, bits: int = 16) -> None:
    """A wav file of [channels, samples]: 16-bit integers, clipped to [-1, 1], or with `bits=32` the floats as they are."""
    if bits not in (16, 32):
        raise ValueError(f"bits is {bits}; expected 16 (integers) or 32 (floats)")
    interleaved = np.ascontiguousarray(audio.T)
    data = interleaved.astype("<f4") if bits == 32 else np.rint(interleaved.clip(-1, 1) * 32767).astype("<i2")
    channels, frame_bytes = audio.shape[0], audio.shape[0] * bits // 8
    form = struct.pack("<HHIIHH", 3 if bits == 32 else 1, channels, sample_rate_hz, sample_rate_hz * frame_bytes, frame_bytes, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", data.nbytes) + data.tobytes()
    Path(path).write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


def _shifted(clip: OpenClip, start: Fraction, stop: Fraction | None) -> list[Packet]:
    """The video packets of `[start, stop)` on the clip's clock, from the key frame before, with `start` at timestamp 0."""
    packets = [packet for packet in clip.video_packets if packet.size]
    if not packets:
        raise MediaError("undecodable", "no video packet could be read")
    time_base, shown, decoded = packets[0].time_base, *_times(packets)
    origin = round((clip.start + start) / time_base)
    for packet, pts, dts in zip(packets, shown, decoded, strict=True):
        packet.pts, packet.dts = pts - origin, dts - origin
        if pts == max(shown) and not packet.duration:  # webm does not say how long the last picture is shown
            packet.duration = round(clip.video_end / time_base) - pts
    key = max((n for n, packet in enumerate(packets) if packet.is_keyframe and shown[n] <= origin), default=0)
    limit = None if stop is None else round((clip.start + stop) / time_base)
    last = max((n for n, pts in enumerate(shown) if limit is None or pts < limit), default=0)
    return packets[key : max(last, key) + 1]


def _times(packets: list[Packet]) -> tuple[list[int], list[int]]:
    """Presentation and decoding times, with what a container left out: avi has no presentation times, matroska no decoding times."""
    shown = [packet.dts if packet.pts is None else packet.pts for packet in packets]
    assert all(time is not None for time in shown), "OpenClip has placed these packets on a clock"
    shown = cast(list[int], shown)
    decoded = [packet.dts for packet in packets]
    if any(time is None for time in decoded):  # decoding times in order, early enough for every picture
        delay = max(time - pts for time, pts in zip(sorted(shown), shown, strict=True))
        decoded = [time - delay for time in sorted(shown)]
    return shown, cast(list[int], decoded)


def _write_muxed(path: Path, container: str, clip: OpenClip, packets: list[Packet], audio: Sound, sample_rate_hz: int, bitrate: int) -> int:
    part = path.with_name(path.name + ".part")
    try:
        with av.open(str(part), "w", format=container) as out:
            out.flags |= Flags.bitexact.value
            assert clip.video is not None
            video = out.add_stream_from_template(clip.video, opaque=True)
            sound = out.add_stream("aac", rate=sample_rate_hz)
            assert isinstance(sound, AudioStream)
            for packet in packets:
                packet.stream = video
            _interleave(out, packets, _encode_sound(sound, audio, sample_rate_hz, bitrate))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return len(packets)


def _fraction(seconds: float | int | Fraction) -> Fraction:
    """0.64 as 16/25: what the float was meant to be."""
    return seconds if isinstance(seconds, Fraction) else Fraction(seconds).limit_denominator(1_000_000)


def _x264_options(config: EncodeConfig) -> dict[str, str]:
    asm = f"asm={config.x264_asm}" if config.x264_asm != "auto" and platform.machine() in ("x86_64", "AMD64") else ""
    options = {"crf": str(config.crf), "preset": config.preset, "x264-params": ":".join(part for part in (asm, config.x264_params) if part)}
    if config.tune:
        options["tune"] = config.tune
    if config.gop_frames:
        options["g"] = str(config.gop_frames)
    return options


def _encode_pictures(stream: VideoStream, clip: OpenClip, config: EncodeConfig, *, keep_frames: bool) -> tuple[list[Packet], Pictures | None]:
    """Every frame of the clip's clock through the encoder; the packets, and if they are to be kept the frames themselves."""
    context = stream.codec_context
    packets: list[Packet] = []
    to_rgb, kept = VideoReformatter(), None
    for index, frame in enumerate(clip.pictures(config.short_side, config.pixel_format)):
        if index == 0:
            context.width, context.height, context.pix_fmt = frame.width, frame.height, config.pixel_format
            context.time_base, context.thread_count = Fraction(1, config.frame_rate_hz), config.x264_threads
            context.color_range, context.colorspace = frame.color_range, frame.colorspace
            context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc
            kept = empty_pictures(clip.frames, frame.height, frame.width) if keep_frames else None
        frame.pts, frame.time_base, frame.duration = index, Fraction(1, config.frame_rate_hz), 1
        frame.pict_type = PictureType.NONE  # else the source's own key frames would be forced on x264
        packets += stream.encode(frame)
        if kept is not None:
            kept[index] = to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return packets + stream.encode(None), kept


def _encode_sound(stream: AudioStream, audio: Sound, sample_rate_hz: int, bitrate: int) -> list[Packet]:
    """The whole sound through the AAC encoder. Its first packet is priming with a negative time, which the mp4's edit list hides."""
    layout = channel_layout(audio.shape[0])
    stream.codec_context.layout = layout
    if bitrate:
        stream.codec_context.bit_rate = bitrate
    frame = AudioFrame.from_ndarray(np.ascontiguousarray(audio), format="fltp", layout=layout)
    frame.sample_rate, frame.time_base, frame.pts = sample_rate_hz, Fraction(1, sample_rate_hz), 0
    return stream.encode(frame) + stream.encode(None)


def _interleave(out: OutputContainer, *streams: list[Packet]) -> None:
    """Mux several streams' packets in the order of their decoding times."""
    for packet in merge(*streams, key=lambda packet: (packet.dts or 0) * packet.time_base):
        out.mux_one(packet)
