"""Sound moved against untouched pictures, found again by decoding what was written."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pipeline.media import MediaError, decode
from pipeline.shift import delayed, move_sound
from tests.pipeline.clips import click_seconds, make_clip

RATE = 48000
CASES: dict[str, dict[str, Any]] = {
    "mp4": {},
    "mov": {"frame_rate": Fraction(30000, 1001), "video_options": (("bf", "2"),)},
    "mkv": {"video_options": (("bf", "3"),)},
    "webm": {"video_codec": "libvpx-vp9", "audio_codec": "libopus", "audio_rate_hz": 48000},
    "avi": {"video_codec": "mpeg4", "audio_codec": "libmp3lame"},
    "ts": {"container": "mpegts"},
    "flv": {},
    "wmv": {"container": "asf", "video_codec": "mpeg4", "audio_codec": "wmav2"},
}


def video_packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def click_after_first_picture(path: Path) -> float:
    clip = decode(path, sample_rate_hz=RATE, channels=1)
    return click_seconds(clip.audio, RATE) - clip.source.video_start_seconds


@pytest.mark.parametrize("ending", CASES)
def test_the_click_moves_and_the_pictures_stay(tmp_path: Path, ending: str) -> None:
    source = tmp_path / f"clip.{ending}"
    make_clip(source, **{"container": ending, "seconds": Fraction(5, 2), "flash_picture": 30, **CASES[ending]})
    before = click_after_first_picture(source)
    for delay in (0.6, -0.52):
        moved = move_sound(source, tmp_path / f"moved.{ending}", delay)
        # An avi whose sound is copied counts in packets of 26 ms, and is left alone where that happens to be near enough.
        assert click_after_first_picture(moved.path) - before == pytest.approx(delay, abs=0.003 if ending == "avi" else 0.0015)
        assert video_packets(moved.path) == video_packets(source) and moved.video_packets == len(video_packets(source))
        assert moved.encoded == ((delay > 0 and ending in ("avi", "wmv")) or ending == "wmv")
        assert (moved.notes == ()) == (not moved.encoded)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, f"moved.{ending}"])


def test_the_sound_itself_is_copied_and_what_is_beyond_the_pictures_left_out(tmp_path: Path) -> None:
    source = tmp_path / "clip.mkv"
    make_clip(source, container="mkv", seconds=2)
    with av.open(str(source)) as container:
        packets = [bytes(packet) for packet in container.demux(audio=0) if packet.size]
    for delay, expected in ((0.5, packets[:-21]), (-0.5, packets[21:])):
        move_sound(source, tmp_path / "out.mkv", delay)
        with av.open(str(tmp_path / "out.mkv")) as container:
            kept = [bytes(packet) for packet in container.demux(audio=0) if packet.size]
        assert len(expected) - 2 <= len(kept) <= len(expected) + 2
        assert kept == packets[: len(kept)] if delay > 0 else kept == packets[-len(kept) :]


def test_another_container_can_be_asked_for_and_titles_stay(tmp_path: Path) -> None:
    source = tmp_path / "clip.mp4"
    make_clip(source, title="a title")
    moved = move_sound(source.read_bytes(), tmp_path / "clip.mkv", 0.25)
    assert moved.container == "matroska" and not moved.encoded
    assert click_after_first_picture(moved.path) == pytest.approx(click_after_first_picture(source) + 0.25, abs=0.0015)
    with av.open(str(moved.path)) as container:
        assert {key.lower(): value for key, value in container.metadata.items()}["title"] == "a title"


def test_what_cannot_be_done_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    make_clip(tmp_path / "clip.mp4")
    with pytest.raises(ValueError, match=r"webm does not take h264 pictures and aac sound.*or \.mkv"):
        move_sound(tmp_path / "clip.mp4", tmp_path / "out.webm", 0.5)
    with pytest.raises(ValueError, match=r"which container it is; expected one of \.mp4"):
        move_sound(tmp_path / "clip.mp4", tmp_path / "out.txt", 0.5)
    make_clip(tmp_path / "quiet.mp4", audio_codec=None)
    with pytest.raises(MediaError, match="no_audio"):
        move_sound(tmp_path / "quiet.mp4", tmp_path / "out.mp4", 0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "quiet.mp4"]


@pytest.mark.parametrize("samples", [0, 3, 7, 11, 20, -3, -7, -11, -20])
def test_samples_are_moved_by_silence_or_left_out(samples: int) -> None:
    whole = np.arange(1, 23, dtype=np.float32).reshape(2, 11)
    pieces = np.split(whole, [2, 3, 9], axis=1)
    expected = np.zeros_like(whole)
    for i in range(11):
        if 0 <= i - samples < 11:
            expected[:, i] = whole[:, i - samples]
    np.testing.assert_array_equal(np.concatenate(list(delayed(iter(pieces), 2, samples, 11)), axis=1), expected)
