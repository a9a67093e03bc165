"""Media on one clock: made clips with a flash and a click, against slow oracles, ffmpeg's own decoder and the reference's frames."""

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import wave as wavefile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame

from pipeline.decode import PictureFit, hold, scaled_size
from pipeline.media import EncodeConfig, MediaError, decode, decode_audio, decode_video, mux, open_clip, reencode, write_wav
from tests.pipeline.clips import Recipe, click_seconds, corrupt, flash_frame, make_clip, picture, shift_samples

FAST = EncodeConfig(short_side=64, preset="veryfast")
PRIMING = Fraction(1024, 44100)
VARIABLE_MS = (0, 33, 67, 100, 140, 300, 320, 340, 400, 433, 466, 500, 520, 560, 600, 640, 700, 733, 766, 800, 850, 910, 950, 1000, 1040, 1080)
VARIABLE = tuple(Fraction(ms, 1000) for ms in (*VARIABLE_MS, 1400, 1440, 1480, 1500, 1533, 1600, 1700, 1800, 1900, 1960))
RATES = {"23.976": Fraction(24000, 1001), "29.97": Fraction(30000, 1001), "60": Fraction(60)}
OPUS = {"audio_codec": "libopus", "audio_rate_hz": 48000}
WEBM = {"container": "webm", "video_codec": "libvpx-vp9", **OPUS}

EXACT = {
    **{f"mp4-{name}": Recipe(frame_rate=rate) for name, rate in RATES.items()},
    **{f"mkv-{name}": Recipe("mkv", frame_rate=rate) for name, rate in RATES.items()},
    **{f"webm-{name}": Recipe(**WEBM, frame_rate=rate) for name, rate in RATES.items()},
    "mp4": Recipe(),
    "mkv-flac": Recipe("mkv", audio_codec="flac"),
    "webm-vp8-vorbis": Recipe("webm", "libvpx", "vorbis", frame_rate=Fraction(30)),
    "mov-pcm": Recipe("mov", audio_codec="pcm_s16le", frame_rate=Fraction(24)),
    "avi-pcm": Recipe("avi", "mjpeg", "pcm_s16le", frame_rate=Fraction(30), pixel_format="yuvj420p"),
    "avi-xvid": Recipe("avi", "mpeg4", "pcm_s16le", frame_rate=Fraction(25)),
    "mp4-variable": Recipe(picture_times=VARIABLE, flash_picture=21),
    "mkv-variable": Recipe("mkv", picture_times=VARIABLE, flash_picture=21),
    "webm-variable": Recipe(**WEBM, picture_times=VARIABLE, flash_picture=21),
    "mp4-late-sound": Recipe(audio_start=Fraction(1, 10)),
    "mov-late-sound": Recipe("mov", audio_codec="pcm_s16le", audio_start=Fraction(1, 10)),
    "mkv-late-sound": Recipe("mkv", audio_start=Fraction(1, 10)),
    "webm-late-sound": Recipe(**WEBM, audio_start=Fraction(1, 10)),
    "mp4-early-sound": Recipe(start=Fraction(12, 100), audio_start=Fraction(0)),
    "mkv-early-sound": Recipe("mkv", start=Fraction(12, 100), audio_start=Fraction(0)),
    "mkv-start": Recipe("mkv", start=Fraction(5)),
    "webm-start": Recipe(**WEBM, start=Fraction(5)),
    "mp4-start": Recipe(audio_codec="flac", start=Fraction(5)),
    "mp4-edit-list": Recipe(preroll_pictures=11),
    "mov-edit-list": Recipe("mov", preroll_pictures=11, audio_codec="pcm_s16le"),
    "mp4-hole": Recipe(audio_hole=(Fraction(1, 2), Fraction(7, 10)), flash_picture=30),
    "mkv-hole": Recipe("mkv", audio_hole=(Fraction(1, 2), Fraction(7, 10)), flash_picture=30),
    "mp4-5.1": Recipe(layout="5.1", audio_rate_hz=48000),
    "webm-5.1": Recipe(**WEBM, layout="5.1"),
}
"""Clips whose containers say exactly when their sound begins."""
PRIMED = {
    "mpegts": Recipe("mpegts", start=Fraction(5)),
    "flv": Recipe("flv"),
    "mp4-start-aac": Recipe(start=Fraction(5)),
    "avi-mp3": Recipe("avi", "mpeg4", "mp3", frame_rate=Fraction(30)),
}
"""Clips whose containers present the encoder's priming as sound: everything begins with it, and only the streams' relation is known."""


def _duration_frames(recipe: Recipe) -> int:
    return round(recipe.seconds * 25)


@pytest.mark.parametrize("name", EXACT)
def test_flash_and_click_stay_together(tmp_path: Path, name: str) -> None:
    recipe = make_clip(path := tmp_path / f"clip.{EXACT[name].container}", EXACT[name])
    zero = recipe.start if recipe.audio_start is None else min(recipe.start, recipe.audio_start)
    flash = recipe.flash - zero
    clip = decode(path, sample_rate_hz=44100, channels=1)
    assert abs(click_seconds(clip.audio, 44100) - flash) <= 1e-3
    assert abs(flash_frame(clip.frames) / 25 - flash) <= 0.021
    assert clip.audio.shape == (1, len(clip.frames) * 1764)
    assert abs(len(clip.frames) / 25 - (recipe.times[-1] + recipe.times[-1] - recipe.times[-2] - zero)) <= 0.021
    assert clip.source.video_faults == clip.source.audio_faults == 0
    assert clip.source.audio_gaps == ("hole" in name)

    encoded = reencode(path, FAST)
    again = decode(encoded.mp4)
    assert flash_frame(again.frames) == flash_frame(clip.frames)
    assert again.frames.shape[0] == encoded.frames == clip.frames.shape[0]
    assert again.audio.shape == (1, encoded.samples) == clip.audio.shape
    assert shift_samples(clip.audio[0], again.audio[0]) == 0
    assert abs(click_seconds(again.audio, 44100) - flash) <= 1e-3
    assert again.source.video_start_seconds == again.source.audio_start_seconds == 0
    assert json.loads(json.dumps(encoded.record()))["source"]["video_codec"] == clip.source.video_codec


@pytest.mark.parametrize("name", PRIMED)
def test_flash_and_click_stay_together_where_priming_is_sound(tmp_path: Path, name: str) -> None:
    make_clip(path := tmp_path / f"clip.{PRIMED[name].container}", PRIMED[name])
    with av.open(str(path)) as container:  # what the file itself says about its start
        zero = min(stream.start_time * stream.time_base for stream in container.streams)
        began = container.streams.video[0].start_time * container.streams.video[0].time_base - zero
    clip = decode(path, sample_rate_hz=44100, channels=1)
    assert clip.source.video_start_seconds == pytest.approx(float(began), abs=1e-6)
    assert abs(click_seconds(clip.audio, 44100) - flash_frame(clip.frames) / 25) <= 0.04
    again = decode(reencode(path, FAST).mp4)
    assert flash_frame(again.frames) == flash_frame(clip.frames) and shift_samples(clip.audio[0], again.audio[0]) == 0


def test_hold_against_a_slow_oracle() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        ticks = sorted(random.integers(-3, 20, random.integers(1, 12)).tolist())
        count = int(random.integers(1, 25))
        expected = [max([n for n, tick in enumerate(ticks) if tick <= k], default=0) for k in range(count)]
        first = next((n for n in range(len(ticks)) if ticks[n] != ticks[0] or n == len(ticks) - 1), 0)
        got = list(hold([(tick, n) for n, tick in enumerate(ticks)], count))
        assert len(got) == count
        for k in range(count):  # before the first picture, a picture of its tick is shown
            assert got[k] == expected[k] or (ticks[0] > k and got[k] <= first)
    with pytest.raises(ValueError, match="nothing to hold"):
        list(hold([], 3))


def test_pictures_are_the_world_at_each_tick(tmp_path: Path) -> None:
    """Every output frame shows the last picture that started before its half tick, straight from the recipe's own times."""
    recipe = make_clip(path := tmp_path / "clip.mkv", container="mkv", picture_times=VARIABLE, flash_picture=21)
    for k, frame in enumerate(decode_video(path)):
        shown = [time for time in recipe.times if time < Fraction(2 * k + 1, 50)][-1]
        assert np.abs(frame.astype(int) - picture(recipe, shown)).mean() < 3, k


def test_hidden_pictures_stay_hidden(tmp_path: Path) -> None:
    recipe = make_clip(path := tmp_path / "clip.mp4", preroll_pictures=11)
    with av.open(str(path)) as container:
        assert sum(packet.is_discard for packet in container.demux(video=0)) == 11
    frames = decode_video(path)
    assert len(frames) == 50
    assert np.abs(frames[0].astype(int) - picture(recipe, recipe.start)).mean() < 3


@pytest.mark.parametrize(("degrees", "quarter_turns"), [(90, 1), (180, 2), (270, 3), (0, 0)])
def test_rotation(tmp_path: Path, degrees: int, quarter_turns: int) -> None:
    recipe = make_clip(path := tmp_path / "clip.mp4", rotation_degrees=degrees)
    expected = np.rot90(picture(recipe, recipe.start), quarter_turns).astype(int)
    frame = decode_video(path)[0]
    assert frame.shape == expected.shape and np.abs(frame - expected).mean() < 3
    encoded = reencode(path, FAST)
    assert (encoded.height, encoded.width) == ((96, 64) if degrees % 180 else (64, 96))
    again = decode_video(encoded.mp4)[0]
    assert np.abs(again - expected).mean() < 4 and decode(encoded.mp4).source.rotation_degrees == 0


def test_downmix_is_swresamples(tmp_path: Path) -> None:
    """Front centre whole, left and right at -3 dB, the surrounds at -6 dB, no low frequency channel: ITU-R BS.775 without normalising."""
    make_clip(path := tmp_path / "clip.mkv", container="mkv", audio_codec="flac", audio_rate_hz=48000, layout="5.1")
    channels, mono = decode_audio(path), decode_audio(path, 48000, 1)
    expected = np.array([0.5**0.5, 0.5**0.5, 1, 0, 0.5, 0.5]) @ channels
    assert channels.shape[0] == 6 and np.abs(mono[0] - expected).max() < 1e-5


def test_sound_beside_the_pictures_is_silence_or_cut(tmp_path: Path) -> None:
    make_clip(short := tmp_path / "short.mkv", container="mkv", audio_codec="flac", audio_seconds=Fraction(1), amplitude=0.3)
    make_clip(long := tmp_path / "long.mkv", container="mkv", audio_codec="flac", audio_seconds=Fraction(3), amplitude=0.3)
    make_clip(late := tmp_path / "late.mkv", container="mkv", audio_codec="flac", audio_start=Fraction(1, 2), amplitude=0.3)
    assert decode_audio(short, channels=1).shape == decode_audio(long, channels=1).shape == (1, 88200)
    silent = decode_audio(short, channels=1)[0] == 0
    assert silent[44100:].all() and not silent[:44000].all()
    silent = decode_audio(late, channels=1)[0] == 0
    assert silent[:22050].all() and not silent[22050:22100].all()


@pytest.mark.parametrize(
    ("width", "height", "scaled"), [(480, 360, (341, 256)), (1280, 720, (455, 256)), (360, 640, (256, 455)), (101, 101, (256, 256))]
)
def test_scaled_size(width: int, height: int, scaled: tuple[int, int]) -> None:
    assert scaled_size(width, height, 256) == scaled


def test_sizes_are_even_and_odd_sources_work(tmp_path: Path) -> None:
    make_clip(path := tmp_path / "clip.mkv", container="mkv", video_codec="ffv1", audio_codec="flac", width=97, height=63, pixel_format="yuv444p")
    encoded = reencode(path, FAST)
    assert (encoded.width, encoded.height) == (98, 64)
    assert decode_video(path).shape[1:] == (63, 97, 3)
    assert decode_video(path, short_side=64).shape == (50, 64, 98, 3)


def test_full_range_pictures_keep_their_brightness(tmp_path: Path) -> None:
    recipe = make_clip(path := tmp_path / "clip.avi", EXACT["avi-pcm"])
    expected = picture(recipe, recipe.start).astype(int)
    assert np.abs(decode_video(path)[0] - expected).mean() < 3
    encoded = reencode(path, FAST)
    assert np.abs(decode_video(encoded.mp4)[0] - expected).mean() < 4
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.color_range == 2 or container.streams.video[0].codec_context.pix_fmt == "yuvj420p"


# Failures


def _truncated(path: Path, keep: float, **recipe) -> None:
    make_clip(path, **recipe)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def _bad_clip(folder: Path, kind: str) -> Path:
    path = folder / "bad.mp4"
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("#EXTM3U\n#EXTINF:10,\nfile:///etc/hostname\n" + "this is no video\n" * 200)
        case "noise":
            path.write_bytes(np.random.default_rng(0).bytes(30000))
        case "video only":
            make_clip(path, audio_codec=None)
        case "audio only":
            make_clip(path, video_codec=None)
        case "short":
            make_clip(path, seconds=Fraction(1, 5), flash_picture=1)
        case "cut before the index":
            _truncated(path, 0.5)
        case "cut mkv":
            path = path.with_suffix(".mkv")
            _truncated(path, 0.5, container="mkv")
        case "cut with the index first":
            make_clip(path)
            subprocess.run([sys.executable, "-c", _FASTSTART, str(path)], check=True)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "garbled":
            make_clip(path)
            path.write_bytes(corrupt(path.read_bytes(), [(0.02, 0.9)]))
        case "unreadable":
            path.mkdir()
    return path


_FASTSTART = """
import av, sys, pathlib
path = pathlib.Path(sys.argv[1])
source = av.open(str(path))
with av.open(str(path) + ".mp4", "w", options={"movflags": "faststart"}) as out:
    streams = {stream.index: out.add_stream_from_template(stream, opaque=True) for stream in source.streams}
    for packet in source.demux():
        if packet.size:
            packet.stream = streams[packet.stream_index]
            out.mux(packet)
pathlib.Path(str(path) + ".mp4").replace(path)
"""

FAILURES = {
    "missing": "missing",
    "unreadable": "unreadable",
    "empty": "empty",
    "text": "undecodable",
    "noise": "undecodable",
    "garbled": "undecodable",
    "video only": "no_audio",
    "audio only": "no_video",
    "short": "too_short",
    "cut before the index": "truncated",
    "cut with the index first": "truncated",
    "cut mkv": "truncated",
}


@pytest.mark.parametrize("kind", FAILURES)
def test_failures_have_reasons(tmp_path: Path, kind: str) -> None:
    path = _bad_clip(tmp_path, kind)
    with pytest.raises(MediaError) as failure:
        reencode(path, FAST)
    assert failure.value.reason == FAILURES[kind], failure.value
    assert failure.value.message
    if path.is_file() and kind != "audio only":
        with pytest.raises(MediaError) as same:
            reencode(path.read_bytes(), FAST)
        assert same.value.reason == failure.value.reason


def test_a_few_damaged_packets_are_counted_and_not_fatal(tmp_path: Path) -> None:
    make_clip(path := tmp_path / "clip.mkv", container="mkv", audio_codec="mp3", seconds=Fraction(4))
    with av.open(str(path)) as container:
        size = path.stat().st_size
        victims = [packet.pos / size for packet in container.demux(audio=0) if packet.size and packet.pts in range(1500, 1600)]
    assert victims
    path.write_bytes(corrupt(path.read_bytes(), [(at + 10 / size, at + 200 / size) for at in victims]))
    encoded = reencode(path, FAST)
    assert encoded.frames == 100 and encoded.source.audio_faults + encoded.source.video_faults > 0


def test_a_damaged_timestamp_is_not_a_day_of_still_picture(tmp_path: Path) -> None:
    times = (*(Fraction(n, 25) for n in range(30)), Fraction(86400))
    make_clip(path := tmp_path / "clip.mkv", container="mkv", picture_times=times)
    with pytest.raises(MediaError, match=r"undecodable: .* jump by 86399 s"):
        decode_video(path)


def test_names_that_are_not_utf8_do_not_matter(tmp_path: Path) -> None:
    make_clip(path := tmp_path / "clip: 1.mkv", container="mkv", title="SOME_TITLE")
    data = path.read_bytes()
    assert b"SOME_TITLE" in data
    path.write_bytes(data.replace(b"SOME_TITLE", b"caf\xe9 \xff\xfe-x"))
    assert len(decode_video(path)) == 50


def test_errors_of_the_configuration_name_the_field() -> None:
    with pytest.raises(ValueError, match="short_side is 255"):
        EncodeConfig(short_side=255)


def test_options_reach_the_encoder(tmp_path: Path) -> None:
    make_clip(path := tmp_path / "clip.mp4", seconds=Fraction(3), flash_picture=28)
    config = EncodeConfig(
        short_side=48, crf=30.0, gop_frames=7, audio_rate_hz=32000, audio_channels=2, audio_bitrate=96000, tune="grain", preset="fast"
    )
    encoded = reencode(path, config)
    with av.open(str(_save(tmp_path / "out.mp4", encoded.mp4))) as container:
        keys = [round(packet.pts * packet.time_base * 25) for packet in container.demux(video=0) if packet.is_keyframe]
        audio = container.streams.audio[0].codec_context
        assert keys[:4] == [0, 7, 14, 21] and (audio.sample_rate, audio.channels) == (32000, 2)
    assert (encoded.height, encoded.width, encoded.samples) == (48, 72, 96000)
    assert b"crf=30.0" in encoded.mp4 and b"deblock=1:-2:-2" in encoded.mp4  # x264 writes its settings into the stream


def _save(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# Determinism


_ENCODE = """
import hashlib, sys
from pipeline.media import EncodeConfig, reencode
print(hashlib.sha256(reencode(sys.argv[1], EncodeConfig(short_side=64)).mp4).hexdigest())
"""


def test_bytes_are_the_same_in_every_process(tmp_path: Path) -> None:
    """Heaps filled with different patterns: uninitialised memory that reached the output would show."""
    make_clip(path := tmp_path / "clip.mkv", container="mkv", width=202, height=118, frame_rate=Fraction(30))
    environments = [{"MALLOC_PERTURB_": pattern, "PYTHONHASHSEED": pattern} for pattern in ("0", "85", "211")]
    runs = [
        subprocess.run(
            [sys.executable, "-c", _ENCODE, str(path)], env=os.environ | extra, check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip()
        for extra in environments
    ]
    assert len(set(runs)) == 1
    assert runs[0] == hashlib.sha256(reencode(path.read_bytes(), EncodeConfig(short_side=64, decode_threads=3)).mp4).hexdigest()


def test_decoding_in_threads(tmp_path: Path) -> None:
    make_clip(path := tmp_path / "clip.mp4")
    frames, audio = decode_video(path), decode_audio(path)
    with ThreadPoolExecutor(4) as pool:
        for clip in pool.map(lambda threads: decode(path.read_bytes(), threads=threads), (1, 2, 3, 1, 2)):
            assert np.array_equal(clip.frames, frames) and np.array_equal(clip.audio, audio)


def test_frames_about_to_be_encoded(tmp_path: Path) -> None:
    make_clip(path := tmp_path / "clip.mkv", container="mkv", frame_rate=Fraction(15))
    encoded = reencode(path, FAST, keep_frames=True)
    assert encoded.pictures is not None and encoded.audio is not None
    assert np.array_equal(encoded.pictures, decode_video(path, short_side=64))
    assert np.array_equal(encoded.audio, decode_audio(path, 44100, 1))
    error = encoded.pictures.astype(int) - decode_video(encoded.mp4)
    assert 0 < np.abs(error).mean() < 3
    assert reencode(path, FAST).pictures is None and reencode(path, FAST).mp4 == encoded.mp4


# New sound under the same pictures


def _packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


MUXED = [
    "mp4",
    "mkv-23.976",
    "webm-29.97",
    "webm-vp8-vorbis",
    "mov-pcm",
    "avi-xvid",
    "mp4-edit-list",
    "mp4-late-sound",
    "mp4-early-sound",
    "mkv-start",
]


@pytest.mark.parametrize("name", [*MUXED, "webm-variable"])
def test_mux_keeps_the_pictures_and_their_time(tmp_path: Path, name: str) -> None:
    make_clip(path := tmp_path / f"clip.{EXACT[name].container}", EXACT[name])
    clip = decode(path, sample_rate_hz=24000, channels=1)
    muxed = mux(path, clip.audio, 24000, tmp_path / "out.mp4")
    assert _packets(muxed.path) == _packets(path)
    again = decode(muxed.path)
    assert again.frames.shape == clip.frames.shape and np.array_equal(again.frames, clip.frames)
    assert again.audio.shape == clip.audio.shape and shift_samples(clip.audio[0], again.audio[0]) == 0
    assert (muxed.container, muxed.path.suffix) == (("matroska", ".mkv") if "vp8" in name else ("mp4", ".mp4"))
    assert (muxed.note is None) == ("vp8" not in name)
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted([path.name, muxed.path.name])


def test_mux_keeps_the_rotation(tmp_path: Path) -> None:
    make_clip(path := tmp_path / "clip.mp4", rotation_degrees=90, audio_codec=None)
    muxed = mux(path, np.zeros((1, 32000), np.float32), 16000, tmp_path / "out.mp4")
    assert np.array_equal(decode_video(muxed.path), decode_video(path))


@pytest.mark.parametrize("name", ["mp4", "mkv-29.97"])
def test_mux_of_a_part(tmp_path: Path, name: str) -> None:
    recipe = make_clip(path := tmp_path / f"clip.{EXACT[name].container}", EXACT[name], video_options=(("g", "9"),))
    clip = decode(path, sample_rate_hz=16000, channels=2)
    muxed = mux(path, clip.audio[:, 3200:], 16000, tmp_path / "out.mp4", start_seconds=0.2, duration_seconds=1.28)
    again = decode(muxed.path)
    expected = recipe.flash - Fraction(1, 5)
    assert abs(click_seconds(again.audio, 16000) - expected) <= 1e-3 and abs(flash_frame(again.frames) / 25 - expected) <= 0.04
    assert 32 <= len(again.frames) <= 36 and set(_packets(muxed.path)) < set(_packets(path))
    if name == "mp4":
        assert np.array_equal(again.frames[:32], clip.frames[5:37])
    with av.open(str(muxed.path)) as container:
        assert container.streams.audio[0].duration * container.streams.audio[0].time_base == pytest.approx(1.28, abs=1e-3)


def test_write_wav(tmp_path: Path) -> None:
    audio = np.random.default_rng(0).uniform(-1.2, 1.2, (3, 1001)).astype(np.float32)
    write_wav(tmp_path / "int.wav", audio, 22050)
    with wavefile.open(str(tmp_path / "int.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes(), file.getsampwidth()) == (3, 22050, 1001, 2)
        stored = np.frombuffer(file.readframes(1001), "<i2").reshape(-1, 3).T
    assert np.abs(stored / 32767 - audio.clip(-1, 1)).max() <= 0.5 / 32767 + 1e-7
    write_wav(tmp_path / "float.wav", audio, 22050, bits=32)
    with av.open(str(tmp_path / "float.wav")) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    assert np.array_equal(np.concatenate(frames, axis=1).reshape(-1, 3).T, audio)
    with pytest.raises(ValueError, match="bits is 24"):
        write_wav(tmp_path / "x.wav", audio, 22050, bits=24)


# ffmpeg's own decoder


@pytest.fixture(scope="module")
def ffmpeg() -> str:
    """Debian's ffmpeg; without it the comparison skips, except in CI."""
    path = shutil.which("ffmpeg")
    if path is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no ffmpeg on the PATH to compare with")
    return path


def _ffmpeg(ffmpeg: str, *arguments: str) -> bytes:
    return subprocess.run([ffmpeg, "-v", "error", "-nostdin", *arguments, "-"], check=True, stdout=subprocess.PIPE).stdout


def _assert_equals_ffmpeg(ffmpeg: str, path: Path) -> None:
    """Pictures bit for bit, in YUV and RGB; sound to the rounding of another FFT (ffmpeg 5.1 and 8 compute AAC's transform differently)."""
    with open_clip(path) as clip:
        upright = PictureFit(None, None)
        pictures = [upright(frame) for _, frame in clip._ticked_pictures()]
        planes, rgb = [frame.to_ndarray() for frame in pictures], [frame.to_ndarray(format="rgb24") for frame in pictures]
    arguments = ("-i", str(path), "-map", "0:v:0", "-vsync", "passthrough", "-f", "rawvideo", "-pix_fmt")
    for pixel_format, ours in (("yuv420p", planes), ("rgb24", rgb)):
        assert np.array_equal(np.frombuffer(_ffmpeg(ffmpeg, *arguments, pixel_format), np.uint8), np.concatenate(ours).reshape(-1))
    for arguments, ours in (
        ([], decode_audio(path)),
        (["-ar", "24000", "-ac", "1"], decode_audio(path, 24000, 1)),
        (["-ar", "16000", "-ac", "1"], decode_audio(path, 16000, 1)),
        (["-ar", "48000", "-ac", "2"], decode_audio(path, 48000, 2)),
    ):
        theirs = np.frombuffer(_ffmpeg(ffmpeg, "-i", str(path), "-map", "0:a:0", *arguments, "-f", "f32le"), np.float32).reshape(-1, ours.shape[0]).T
        both = min(ours.shape[1], theirs.shape[1])
        assert both >= ours.shape[1] - 2048  # ours is as long as the pictures
        assert np.abs(ours[:, :both] - theirs[:, :both]).max() <= 1e-6


@pytest.mark.parametrize("name", ["mp4", "mp4-29.97", "mp4-60", "mkv-flac", "webm-29.97", "webm-vp8-vorbis", "mov-pcm", "mp4-edit-list", "mp4-5.1"])
def test_decoding_equals_ffmpegs(tmp_path: Path, ffmpeg: str, name: str) -> None:
    """Not AAC in matroska: ffmpeg 5.1 presents the priming that the file says to skip, 8 does not (and the click is then in its place)."""
    make_clip(path := tmp_path / f"clip.{EXACT[name].container}", EXACT[name])
    _assert_equals_ffmpeg(ffmpeg, path)


@pytest.mark.parametrize("name", ["mp4-23.976", "mp4-29.97", "mp4-60", "mov-pcm", "mp4-variable"])
def test_frame_selection_equals_ffmpegs_fps_filter(tmp_path: Path, ffmpeg: str, name: str) -> None:
    """On containers whose times are exact; matroska rounds them to milliseconds, and ffmpeg counts Opus' hidden priming as the start."""
    make_clip(path := tmp_path / f"clip.{EXACT[name].container}", EXACT[name])
    frames = decode_video(path)
    raw = np.frombuffer(_ffmpeg(ffmpeg, "-i", str(path), "-vf", "fps=25", "-f", "rawvideo", "-pix_fmt", "rgb24"), np.uint8)
    theirs = raw.reshape(-1, *frames.shape[1:])
    both = min(len(frames), len(theirs))
    assert abs(len(frames) - len(theirs)) <= 1 and np.array_equal(frames[:both], theirs[:both])


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_decoding_a_media_clip_equals_ffmpegs(tmp_path: Path, ffmpeg: str, degrees: int) -> None:
    make_clip(path := tmp_path / "clip.mp4", rotation_degrees=degrees, frame_rate=Fraction(30), layout="5.1", audio_rate_hz=48000)
    _assert_equals_ffmpeg(ffmpeg, path)
    _assert_equals_ffmpeg(ffmpeg, _save(tmp_path / "media.mp4", reencode(path, FAST).mp4))


def test_decoding_real_clips_equals_ffmpegs(shared: Path, ffmpeg: str, tmp_path: Path) -> None:
    path = shared / "clips" / "ZYc410CE4Rg_0_10000.mp4"
    _assert_equals_ffmpeg(ffmpeg, path)
    encoded = reencode(path, EncodeConfig(preset="ultrafast"))
    assert (encoded.frames, encoded.width, encoded.height, encoded.samples) == (250, 340, 256, 441000)
    _assert_equals_ffmpeg(ffmpeg, _save(tmp_path / "media.mp4", encoded.mp4))


# The reference's frames of its own re-encoded clip


@pytest.fixture(scope="module")
def reference_clip() -> Path:
    from tests.conftest import SHARED

    path = SHARED / "clips" / "h264_video_25fps_256side_16000hz_aac" / "ZYc410CE4Rg_0_10000.mp4"
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


@pytest.mark.parametrize("work", [decode, reencode])
def test_decoded_pictures_are_let_go_one_by_one(tmp_path: Path, work: Callable) -> None:
    """A clip of 4K pictures is gigabytes, and Python's collector does not run for a few hundred objects."""
    make_clip(tmp_path / "clip.mp4", seconds=Fraction(3), rotation_degrees=90)
    gc.collect()
    gc.disable()
    try:
        clip = work(tmp_path / "clip.mp4")
        alive = sum(isinstance(item, VideoFrame) for item in gc.get_objects())
    finally:
        gc.enable()
    assert clip is not None and alive < 5


def test_pictures_and_sound_are_the_references(shared: Path, reference_clip: Path) -> None:
    golden = np.load(shared / "reference" / "golden_d_rgb.npz")
    clip = decode(reference_clip)
    assert hashlib.sha256(clip.frames.transpose(0, 3, 1, 2).tobytes()).hexdigest() == str(golden["rgb_sha256"][()])
    head = golden["audio_head"]  # the reference seeks first, so the first 1,024 samples lack the packet before them
    assert np.array_equal(clip.audio[0, 1024 : len(head)], head[1024:])
    crops = clip.frames[:, 16:240, 58:282]
    for prefix in ("sync", "sync_v1.2_off-0.6", "stage1"):
        for start, stop, sha in zip(*(golden[f"{prefix}_{name}"] for name in ("v_start_frame", "v_end_frame", "seg_u8_sha256")), strict=True):
            segment = crops[start:stop].transpose(0, 3, 1, 2)
            assert hashlib.sha256(segment.tobytes()).hexdigest() == str(sha)


def test_frame_selection_of_vaura(shared: Path, reference_clip: Path) -> None:
    golden = np.load(shared / "reference" / "golden_d_vaura_rgb.npz")
    frames = decode_video(reference_clip)
    for start in ("0.0", "1.49", "3.24", "5.7", "7.43"):
        window = frames[golden[f"start{start}_read_frames"][:64], 16:240, 58:282]
        normal = (window.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.5) / 0.5
        for segment, mean, std in zip(
            normal.reshape(4, 16, 3, 224, 224), golden[f"start{start}_seg_mean"], golden[f"start{start}_seg_std"], strict=True
        ):
            assert segment.mean() == pytest.approx(mean, abs=1e-6) and segment.std() == pytest.approx(std, abs=1e-5)


def test_what_re_encodes_imports_no_torch() -> None:
    """Every worker of a cluster imports it, and would wait for two seconds longer."""
    found = subprocess.run([sys.executable, "-c", "import pipeline.reencode, sys; print('torch' in sys.modules)"], capture_output=True, check=True)
    assert found.stdout == b"False\n"
