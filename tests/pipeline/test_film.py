"""Films: what goes through in pieces is what a clip gives as a whole, and memory does not grow with the length."""

import wave as wavefile
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from math import floor
from pathlib import Path

import av
import numpy as np
import pytest
from av.audio.stream import AudioStream

from pipeline import encode, isolate
from pipeline.decode import exact_seconds
from pipeline.isolate import Child, Limits
from pipeline.media import (
    EncodeConfig,
    MediaError,
    WavWriter,
    decode,
    decode_audio,
    decode_video,
    mux,
    mux_wav,
    open_clip,
    picture_pieces,
    transcode_original,
    video_frames,
    wav_format,
    wav_pieces,
    write_wav,
)
from tests.pipeline import faults
from tests.pipeline.clips import Recipe, click_seconds, flash_frame, make_clip
from tests.pipeline.test_media import EXACT, PRIMED, WEBM, _bad_clip

SHORT_GOPS = (("g", "9"),)
OPEN_GOPS = (("g", "9"), ("x264-params", "open-gop=1:bframes=3:b-pyramid=normal:scenecut=0"))
FORMATS = {
    **{name: EXACT[name] for name in ("mp4-23.976", "mkv-60", "mkv-start", "webm-29.97", "webm-variable", "mov-late-sound", "mp4-early-sound")},
    **{name: EXACT[name] for name in ("mp4-variable", "mp4-edit-list", "avi-xvid", "mp4-hole")},
    **{name: PRIMED[name] for name in ("mpegts", "flv", "avi-mp3")},
    "silent": Recipe(audio_codec=None),
    "rotated": Recipe(rotation_degrees=90),
}


def _whole(pieces: Iterator[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(pieces))


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_are_the_frames_of_the_clip(tmp_path: Path, name: str) -> None:
    make_clip(path := tmp_path / f"clip.{FORMATS[name].container}", FORMATS[name])
    whole = decode_video(path)
    pieces = list(picture_pieces(path, piece_frames=7))
    assert {len(piece) for piece in pieces[:-1]} == {7} and 1 <= len(pieces[-1]) <= 7
    assert np.array_equal(np.concatenate(pieces), whole)
    assert video_frames(path) == len(whole)
    assert np.array_equal(_whole(picture_pieces(path.read_bytes(), short_side=32, piece_frames=64)), decode_video(path, short_side=32))


STARTS = {
    "closed": Recipe(video_options=SHORT_GOPS),
    "open": Recipe(video_options=OPEN_GOPS),
    "open-mkv": Recipe("mkv", video_options=OPEN_GOPS, frame_rate=Fraction(30000, 1001)),
    "variable": replace(EXACT["mp4-variable"], video_options=SHORT_GOPS),
    "webm": Recipe(**WEBM, video_options=SHORT_GOPS),
    "avi": replace(EXACT["avi-xvid"], video_options=SHORT_GOPS),
    "edit-list": Recipe(preroll_pictures=11, video_options=OPEN_GOPS),
    "mpegts": replace(PRIMED["mpegts"], video_options=SHORT_GOPS),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_is_a_frame_of_the_clips_clock(tmp_path: Path, name: str) -> None:
    make_clip(path := tmp_path / f"clip.{STARTS[name].container}", STARTS[name])
    whole = decode_video(path)
    for start, duration in ((0.04, None), (0.53, None), (1.0, 0.64), (Fraction(7, 5), 0.1), (1.88, 9.0)):
        first = floor(exact_seconds(start) * 25)
        stop = None if duration is None else first + floor(exact_seconds(duration) * 25)
        got = _whole(picture_pieces(path, piece_frames=5, start_seconds=start, duration_seconds=duration))
        assert np.array_equal(got, whole[first:stop]), (start, duration)
        assert video_frames(path, start_seconds=start, duration_seconds=duration) == len(got)
    with open_clip(path, in_memory=False) as film:
        assert film.video_track is not None
        assert film._key_before(film.video_track, 40) >= 22, "decoding begins near the start"
    with pytest.raises(MediaError, match=r"too_short: .* end before 7 s"):
        next(picture_pieces(path, piece_frames=5, start_seconds=7))


def test_the_published_starts_are_met() -> None:
    """The frames with which the reference's reader begins, of a clip at 25 fps."""
    assert [floor(exact_seconds(start) * 25) for start in (0.0, 1.49, 3.24, 5.7, 7.43)] == [0, 37, 81, 142, 185]


@pytest.mark.parametrize("kind", ["empty", "text", "noise", "garbled", "audio only", "cut before the index", "cut mkv"])
def test_failures_have_the_same_reasons(tmp_path: Path, kind: str) -> None:
    path, reasons = _bad_clip(tmp_path, kind), []
    for work in (decode_video, lambda path: list(picture_pieces(path, piece_frames=7)), video_frames):
        try:
            work(path)
        except MediaError as error:
            reasons.append(str(error))
    assert len(set(reasons)) == 1 and len(reasons) >= 2  # damage to pictures is not seen by counting them


def test_damage_later_in_a_film_comes_after_the_pieces_before_it(tmp_path: Path) -> None:
    make_clip(path := tmp_path / "clip.mkv", container="mkv", audio_codec=None, video_options=SHORT_GOPS)
    whole = decode_video(path)
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for at, size in places[30:]:
        data[at + 20 : at + size] = bytes(size - 20)
    path.write_bytes(data)
    got = []
    with pytest.raises(MediaError, match="undecodable"):
        got.extend(picture_pieces(path, piece_frames=5))
    assert np.array_equal(np.concatenate(got[:5]), whole[:25])
    assert np.array_equal(_whole(picture_pieces(path, piece_frames=5, duration_seconds=0.9)), whole[:22]), "what is not asked for may be damaged"


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    make_clip(path := tmp_path / "clip.mp4", audio_codec=None)
    with pytest.raises(ValueError, match="piece_frames is 0"):
        next(picture_pieces(path, piece_frames=0))
    with pytest.raises(ValueError, match="start_seconds is -1"):
        next(picture_pieces(path, piece_frames=1, start_seconds=-1))
    with pytest.raises(ValueError, match="duration_seconds 0"):
        next(picture_pieces(path, piece_frames=1, duration_seconds=0))


def test_files_are_closed(tmp_path: Path) -> None:
    """Also where a reading was left in the middle."""
    make_clip(path := tmp_path / "clip.mp4")

    def held() -> int:
        return sum(str(link.resolve()) == str(path) for link in Path("/proc/self/fd").iterdir())

    pieces = picture_pieces(path, piece_frames=5)
    next(pieces)
    assert held() >= 2
    pieces.close()
    assert held() == 0


@pytest.mark.parametrize("name", ["mp4", "mkv-flac", "webm-29.97", "mp4-late-sound", "mp4-hole"])
def test_sound_from_the_middle(tmp_path: Path, name: str) -> None:
    recipe = replace(EXACT[name], seconds=Fraction(4), flash_picture=60)
    make_clip(path := tmp_path / f"clip.{recipe.container}", recipe)
    whole = decode_audio(path, 24000, 1)
    for start, stop in ((0, 31), (35, 80), (75, None)):
        with open_clip(path, in_memory=False) as film:
            pieces = list(film.sound_pieces(24000, 1, start, stop))
        assert np.array_equal(np.concatenate(pieces, axis=1), whole[:, start * 960 : None if stop is None else stop * 960])


# New sound, and the original's


@pytest.mark.parametrize("name", ["mp4", "mkv-23.976", "webm-vp8-vorbis", "avi-xvid", "mp4-edit-list", "mp4-early-sound"])
def test_mux_of_a_wav_is_mux(tmp_path: Path, name: str) -> None:
    make_clip(path := tmp_path / f"clip.{EXACT[name].container}", replace(EXACT[name], video_options=() if "webm" in name else SHORT_GOPS))
    sound = decode_audio(path, 24000, 2)
    with WavWriter(tmp_path / "sound.wav", 24000, 2, bits=32) as wav:
        for at in range(0, sound.shape[1], 5003):
            wav.write(sound[:, at : at + 5003])
    for part in ({}, {"start_seconds": 0.52, "duration_seconds": 0.9}):
        one = mux(path, sound, 24000, tmp_path / "one.mp4", **part)
        two = mux_wav(path, tmp_path / "sound.wav", tmp_path / "two.mp4", **part)
        assert two.path.read_bytes() == one.path.read_bytes() and (two.note, two.video_packets) == (one.note, one.video_packets)


def test_an_interrupted_mux_leaves_nothing(tmp_path: Path) -> None:
    make_clip(path := tmp_path / "clip.mp4", audio_codec=None)
    write_wav(tmp_path / "a.wav", np.zeros((1, 999), np.float32), 16000)
    (tmp_path / "b.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"b\.wav is cut short: 500 bytes of 2042"):
        mux_wav(path, tmp_path / "b.wav", tmp_path / "out.mp4")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.wav", "b.wav", "clip.mp4"]


@pytest.mark.parametrize("name", ["mp4", "webm-29.97", "mp4-5.1", "mp4-late-sound"])
def test_an_original_beside(tmp_path: Path, name: str) -> None:
    recipe = make_clip(path := tmp_path / f"clip.{EXACT[name].container}", replace(EXACT[name], width=98, height=66))
    clip = decode(path)
    made = transcode_original(path, tmp_path / "out.mp4", start_seconds=0.3, duration_seconds=1.28, config=EncodeConfig(preset="veryfast"))
    again = decode(made.path)
    assert (made.video_packets, made.note, made.container) == (32, None, "mp4")
    assert again.frames.shape == (32, 66, 98, 3) and np.abs(again.frames.astype(int) - clip.frames[7:39]).mean() < 3
    assert again.sample_rate_hz == clip.sample_rate_hz and again.audio.shape[0] == 2
    zero = recipe.start if recipe.audio_start is None else min(recipe.start, recipe.audio_start)
    expected = float(recipe.flash - zero - Fraction(7, 25))
    assert abs(click_seconds(again.audio, again.sample_rate_hz) - expected) <= 2e-3 and abs(flash_frame(again.frames) / 25 - expected) <= 0.021
    assert [item.name for item in tmp_path.iterdir() if item != path] == ["out.mp4"]


def test_an_original_without_sound_or_of_odd_size(tmp_path: Path) -> None:
    make_clip(path := tmp_path / "clip.mkv", container="mkv", video_codec="ffv1", audio_codec=None, width=97, height=63, pixel_format="yuv444p")
    made = transcode_original(path, tmp_path / "out.mp4")
    assert made.note == "the original has no sound: pictures only" and decode_video(made.path).shape == (50, 62, 96, 3)
    with open_clip(made.path) as clip:
        assert clip.audio is None
    assert decode_video(transcode_original(path, tmp_path / "small.mp4", short_side=32).path).shape == (50, 32, 48, 3)
    make_clip(other := tmp_path / "other.mkv", container="mkv", audio_codec="pcm_s16le", audio_rate_hz=18900)
    assert decode(transcode_original(other, tmp_path / "other.mp4").path).sample_rate_hz == 48000


# Wav files


@pytest.mark.parametrize("bits", [16, 32])
def test_a_wav_in_pieces(tmp_path: Path, bits: int) -> None:
    sound = np.random.default_rng(0).uniform(-1.2, 1.2, (3, 1001)).astype(np.float32)
    with WavWriter(path := tmp_path / "a.wav", 22050, 3, bits=bits) as wav:
        for piece in np.split(sound, [0, 1, 400, 400, 999], axis=1):
            assert not path.exists()
            wav.write(piece)
        assert wav.samples == 1001
    expected = sound if bits == 32 else np.rint(sound.clip(-1, 1) * 32767) / np.float32(32767)
    assert np.array_equal(np.concatenate(list(wav_pieces(path, 100)), axis=1), expected) and len(list(wav_pieces(path, 100))) == 11
    with av.open(str(path)) as container:  # as ffmpeg reads it
        stream = container.streams.audio[0]
        assert isinstance(stream, AudioStream) and (stream.rate, stream.channels, stream.duration) == (22050, 3, 1001)
    if bits == 16:
        with wavefile.open(str(path)) as file:
            assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (3, 22050, 1001)
    write_wav(tmp_path / "b.wav", sound, 22050, bits=bits)
    assert np.array_equal(next(wav_pieces(tmp_path / "b.wav", 2000)), expected)
    assert replace(wav_format(tmp_path / "b.wav"), data_start=0) == replace(wav_format(path), data_start=0)


def test_a_wav_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("before")
    wav = WavWriter(tmp_path / "a.wav", 8000, 1)
    with wav, pytest.raises(ValueError, match="a piece has 2 channels"):
        wav.write(np.zeros((2, 5), np.float32))
    write_wav(tmp_path / "b.wav", np.zeros((2, 9), np.float32), 8000)
    (tmp_path / "a.wav").write_text("before")
    with pytest.raises(ValueError, match="a piece has 2 channels"), WavWriter(tmp_path / "a.wav", 8000, 1) as wav:
        wav.write(next(wav_pieces(tmp_path / "b.wav", 100)))
    (tmp_path / "b.wav").unlink()
    assert [item.name for item in tmp_path.iterdir()] == ["a.wav"] and (tmp_path / "a.wav").read_text() == "before"
    with pytest.raises(ValueError, match="bits is 24"):
        WavWriter(tmp_path / "a.wav", 8000, 1, bits=24)
    with pytest.raises(ValueError, match="is not a wav file"):
        wav_format(tmp_path / "a.wav")


def test_a_wav_above_4_gb(tmp_path: Path) -> None:
    """A file with holes of zeros, but for its ends; ffmpeg finds the end where it is."""
    writer, samples = WavWriter(path := tmp_path / "a.wav", 48000, 1, bits=32), (5 << 30) // 4
    end = np.linspace(-1, 1, 77, dtype=np.float32)[None]
    writer._file.seek((samples - 77) * 4, 1)
    writer.samples = samples - 77
    writer.write(end)
    writer.close()
    form = wav_format(path)
    assert (form.samples, form.data_start) == (samples, 80) and path.read_bytes()[:4] == b"RF64" if path.stat().st_blocks > 10**6 else True
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        assert stream.duration == samples and container.format.name == "wav"
    assert encode._wav_header(48000, 1, 32, samples, roomy=False)[:4] == b"RF64"
    with open(path, "rb") as file:
        assert file.read(4) == b"RF64"
        file.seek(-77 * 4, 2)
        assert np.array_equal(np.frombuffer(file.read(), "<f4"), end[0])


# Memory

UNIT_FRAMES, UNIT_SOUND_PACKETS = 80, 50
"""3.2 s: of pictures at 25 fps, and of AAC at 16 kHz."""


def _long(path: Path, unit: Path, minutes: int) -> Path:
    """The unit over and over: packets are copied, not encoded again."""
    with av.open(str(unit)) as source:
        packets = [packet for packet in source.demux() if packet.size]
        own = [(packet, packet.pts, packet.dts) for packet in packets if packet.stream.type == "video"][:UNIT_FRAMES]
        own += [(packet, packet.pts, packet.dts) for packet in packets if packet.stream.type == "audio"][:UNIT_SOUND_PACKETS]
        own.sort(key=lambda item: item[2] * item[0].time_base)
        with av.open(str(path), "w") as out:
            streams = {stream.type: out.add_stream_from_template(stream, opaque=True) for stream in source.streams}
            for n in range(round(minutes * 60 / 3.2)):
                for packet, pts, dts in own:
                    shift = round(n * Fraction(16, 5) / packet.time_base)
                    copy = av.Packet(bytes(packet))
                    copy.time_base, copy.pts, copy.dts, copy.is_keyframe = packet.time_base, pts + shift, dts + shift, packet.is_keyframe
                    copy.duration, copy.stream = packet.duration, streams[packet.stream.type]
                    out.mux_one(copy)
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same pictures and sound for a minute and for twelve."""
    folder = tmp_path_factory.mktemp("films")
    options = (("bf", "2"), ("crf", "1"))
    make_clip(unit := folder / "unit.mp4", seconds=Fraction(16, 5), audio_rate_hz=16000, width=64, height=48, video_options=options)
    return _long(folder / "short.mp4", unit, 1), _long(folder / "long.mp4", unit, 12)


def _peak_mb(work: Callable[[Child], object]) -> float:
    """The most memory that a fresh process took for it."""
    child = Child(Limits())
    work(child)
    peak = child.call(isolate.peak_bytes)
    child.close()
    return peak / 2**20


def test_memory_does_not_grow_with_the_film(tmp_path: Path, films: tuple[Path, Path]) -> None:
    frames, peaks, held = [], [], []
    for film in films:

        def count(child: Child, film: Path = film) -> None:
            frames.append(sum(len(piece) for piece in child.stream(partial(picture_pieces, piece_frames=250), film)))

        peaks.append(_peak_mb(count))
        held.append(_peak_mb(lambda child, film=film: child.call(faults.held_whole, film)))

    assert frames == [19 * UNIT_FRAMES, 225 * UNIT_FRAMES]
    assert held[1] - held[0] > 20, "else the film is too small to tell"
    assert peaks[1] - peaks[0] < 10, peaks

    muxed = []
    for film, seconds in zip(films, (60, 720), strict=True):
        with WavWriter(wav := tmp_path / "a.wav", 16000, 1) as file:
            for n in range(seconds):
                file.write(np.sin(np.arange(16000, dtype=np.float32) * (0.1 + 0.0001 * n))[None])
        muxed.append(_peak_mb(lambda child, film=film, wav=wav: child.call(mux_wav, film, wav, tmp_path / "out.mp4")))

    assert muxed[1] - muxed[0] < 14, muxed
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert [round(stream.duration * stream.time_base) for stream in container.streams] == [720, 720]
