"""`soundshard sync`: what is printed and written of one video, and the rows of many on a real local Ray."""

import contextlib
import json
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from model.segments import OFFSET, cut_at
from pipeline import sync
from pipeline.discover import Clip
from pipeline.media import MediaError, decode
from pipeline.sync_clips import ClipsConfig, JudgeActor, _Store, failed_row, find_clips, remaining
from pipeline.sync_score import SyncScorer
from shards.dataset import create_or_check, new_info
from shards.write import Entry, write_manifest, write_shard
from tests.pipeline.clips import click_seconds, make_clip
from tests.pipeline.sync_networks import small_sync

RATE = 48000


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    return {"weights": small_sync(folder), "synchronisability_weights": small_sync(folder, "synchronisable")}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    make_clip(folder / "a.mp4", seconds=Fraction(28, 5), flash_picture=70)
    make_clip(folder / "b.mkv", container="mkv", seconds=Fraction(28, 5), flash_picture=50)
    make_clip(folder / "mute.mp4", audio_codec=None)
    make_clip(folder / "short.mp4")
    (folder / "bad.mp4").write_text("no video")
    return folder


def arguments(networks: dict[str, str], **given: object) -> list[str]:
    return [f"{name}={value}" for name, value in {"weights": networks["weights"], "device": "cpu", **given}.items()]


# --- one video ---


def test_one_video_prints_the_distribution_and_writes_what_it_is_asked_for(
    networks: dict[str, str], videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(networks | {}, synchronisable="true", synchronisability_weights=networks["synchronisability_weights"], top=3)
    outputs = [f"html={tmp_path / 'page.html'}", f"json={tmp_path / 'found.json'}", "every_seconds=0.32"]
    assert sync.main([str(videos / "a.mp4"), *given, *outputs]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    assert "a.mp4: 5.60 s, 2 windows of 5 s, 0.32 s apart" in printed
    lines = re.findall(r"^  ([+-]\d\.\d\d) s  (0\.\d{4})  ", printed, re.MULTILINE)
    assert len(lines) == 3
    order = np.argsort(-np.array(found["probabilities"]))[:3]
    assert [(float(seconds), float(p)) for seconds, p in lines] == [
        (found["classes_seconds"][i], pytest.approx(found["probabilities"][i], abs=6e-5)) for i in order
    ]
    assert "can be synchronised at all: probability 0." in printed and len(found["windows"]) == 2
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page and "synchronisable" in page and f"{found['offset_seconds']:+.2f} s" in page


def test_the_published_cut_and_a_shift_of_the_sound(networks: dict[str, str], videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sync.main([str(videos / "a.mp4"), *arguments(networks, start_seconds=0.4, offset_seconds=-0.2)]) == 0
    printed = capsys.readouterr().out
    assert "one window from 0.4 s on" in printed and "taken -0.20 s later" in printed and "agree" not in printed


def test_a_video_is_put_right(networks: dict[str, str], videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.mp4", "b.mkv"):
        out, found = tmp_path / f"fixed.{name}", tmp_path / "found.json"
        assert sync.main([str(videos / name), *arguments(networks, fix="true", out=out, json=found)]) == 0
        offset = json.loads(found.read_text())["offset_seconds"]
        assert abs(offset) > 0.1 and f"sound moved by {offset:+.3f} s" in capsys.readouterr().out
        before, after = (decode(path, sample_rate_hz=RATE, channels=1) for path in (videos / name, out))
        assert click_seconds(after.audio, RATE) - click_seconds(before.audio, RATE) == pytest.approx(offset, abs=0.0015)
        np.testing.assert_array_equal(after.frames, before.frames)
        assert _video_packets(out) == _video_packets(videos / name)
    # What the sound was moved by before it was compared is no part of the file's own offset.
    assert sync.main([str(videos / "a.mp4"), *arguments(networks, offset_seconds=0.5, fix="true", out=tmp_path / "c.mp4", json=found)]) == 0
    assert f"sound moved by {json.loads(found.read_text())['offset_seconds'] - 0.5:+.3f} s" in capsys.readouterr().out


def _video_packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def test_what_cannot_be_answered_is_an_error_that_says_so(
    networks: dict[str, str], videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOUNDSHARD_CACHE", str(tmp_path))
    cases = {
        "short.mp4: too_short: 2.00 s of pictures with sound; an offset is found in 5 s": [videos / "short.mp4"],
        "mute.mp4: no_audio": [videos / "mute.mp4"],
        "bad.mp4: undecodable": [videos / "bad.mp4"],
        "missing: ": [videos / "nothing.mp4"],
        "one of the two": [],
        "give video=FILE, or source=FOLDER": [videos / "a.mp4", f"source={videos}"],
        "fix=true needs out=FILE, the video to write, such as a.fixed.mp4": [videos / "a.mp4", "fix=true"],
        "whose ending says no container": [videos / "a.mp4", "fix=true", f"out={tmp_path / 'x.jpg'}"],
        "out is the video itself": [videos / "a.mp4", "fix=true", f"out={videos / 'a.mp4'}"],
        "which a video has only with fix=true": [videos / "a.mp4", f"out={tmp_path / 'x.parquet'}"],
        "expected a file that ends in .parquet": [f"source={videos}", f"out={tmp_path / 'folder'}"],
        "fix=true takes one video": [f"source={videos}", "fix=true", "out=x.parquet"],
        "soundshard weights": [videos / "a.mp4", "weights=sync"],
    }
    for message, given in cases.items():
        assert sync.main([*arguments(networks), *map(str, given)]) == 2, message
        assert message in capsys.readouterr().err
    assert sync.main([str(videos / "short.mp4"), *arguments(networks, short_videos="repeat")]) == 0
    assert "repeated to fill them: this ranks sounds, it is no offset" in capsys.readouterr().out


# --- many ---


@pytest.mark.usefixtures("ray_cluster")
def test_every_clip_of_a_folder_gets_a_row_and_a_rerun_does_what_is_missing(
    networks: dict[str, str], videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "offsets.parquet"
    given = [f"source={videos}", f"out={out}", *arguments(networks, actors=1)]
    assert sync.main([*given, f"html={tmp_path / 'page.html'}"]) == 0
    assert "2 ok, 3 failed (no_audio 1, too_short 1, undecodable 1); " in capsys.readouterr().out
    rows = {row["key"]: row for row in pq.read_table(out).to_pylist()}
    assert {key: row["reason"] for key, row in rows.items()} == {"a": None, "b": None, "bad": "undecodable", "mute": "no_audio", "short": "too_short"}
    assert sync.main([str(videos / "b.mkv"), *arguments(networks, json=tmp_path / "one.json")]) == 0
    one = json.loads((tmp_path / "one.json").read_text())
    for name in ("offset_seconds", "best_offset_seconds", "agreement", "duration_seconds"):
        assert rows["b"][name] == pytest.approx(one[name], abs=1e-4)
    np.testing.assert_allclose(rows["b"]["probabilities"], one["probabilities"], atol=1e-5)
    assert rows["b"]["window_seconds"] == [window["start_seconds"] for window in one["windows"]] and rows["b"]["synchronisable"] is None
    assert "of 2 clips" in (tmp_path / "page.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["offsets.parquet", "one.json", "page.html"]
    capsys.readouterr()
    assert sync.main([*given, "max_failed_fraction=0.5"]) == 1
    printed = capsys.readouterr()
    assert "5 clips done, 0 to do" in printed.out and "3 of 5 clips failed, more than max_failed_fraction=0.5 allows" in printed.err
    assert {row["key"]: row for row in pq.read_table(out).to_pylist()} == rows
    assert sync.main([*given, "every_seconds=0.32"]) == 2 and "other networks or options" in capsys.readouterr().err


def test_what_is_left_to_do_is_new_changed_or_tried_again() -> None:
    clips = [Clip(key, f"/clips/{key}.mp4", "train", version=f"mtime:{key}") for key in ("good", "failed", "changed", "new")]
    good, failed, changed, _ = (failed_row(clip, MediaError("silent", "nothing")) for clip in clips)
    rows = {(row["key"], row["source"], False): row for row in (good | {"status": "ok"}, failed, changed | {"version": "mtime:before"})}
    assert [clip.key for clip in remaining(clips, rows, retry_failed=False)] == ["changed", "new"]
    assert [clip.key for clip in remaining(clips, rows, retry_failed=True)] == ["failed", "changed", "new"]


def test_clips_of_a_media_dataset_are_taken_as_they_are_stored(networks: dict[str, str], videos: Path, tmp_path: Path) -> None:
    stored = [Entry(path.stem, "test", "door", path.name, 5.6, {"mp4": path.read_bytes()}) for path in (videos / "a.mp4", videos / "short.mp4")]
    create_or_check(tmp_path / "media", new_info("media", {"encode": {}}))
    write_shard(tmp_path / "media", "test-000000", [*stored, Entry("bad", "test", None, "bad.mp4", reason="timeout", message="not done")])
    write_manifest(tmp_path / "media")
    config = ClipsConfig(source=str(tmp_path / "media"), weights=networks["weights"], device="cpu")
    found = find_clips(config)
    assert [(clip.key, clip.split, clip.reason) for clip in found] == [("a", "test", None), ("bad", "test", "timeout"), ("short", "test", None)]
    rows, tick = JudgeActor(config).unit([clip for clip in found if not clip.reason])
    assert [row["reason"] for row in rows] == [None, "too_short"] and rows[0]["label"] == "door" and rows[0]["duration_seconds"] == 5.6
    assert tick.clips == 2 and tick.failures[0][:2] == ("short", "too_short")
    own = SyncScorer(networks["weights"], "cpu")  # of the pictures' own size, 64 high: not brought to 32 by the decoder
    clip = decode(videos / "a.mp4", sample_rate_hz=16000, channels=1)
    expected = own.cut_logits(clip.frames, clip.audio[0], [cut_at(start, 0.0) for start in (0.0, 0.32 + 1e-6)], OFFSET).softmax(-1).mean(0)
    np.testing.assert_allclose(rows[0]["probabilities"], expected.numpy(), atol=1e-5)


def test_what_came_in_before_a_run_died_is_not_done_again(tmp_path: Path) -> None:
    out = str(tmp_path / "offsets.parquet")
    clips = [Clip(f"k{i}", f"/clips/k{i}.mp4", "train", version="mtime:1") for i in range(5)]
    rows = [failed_row(clip, MediaError("silent", "nothing")) for clip in clips]
    store = _Store(out, "r1", overwrite=False)
    with contextlib.suppress(KeyboardInterrupt), store.writing(part_clips=2) as add:
        add(rows[:2])
        add(rows[2:3])
        raise KeyboardInterrupt
    assert len(list(tmp_path.iterdir())) == 2
    again = _Store(out, "r1", overwrite=False)
    assert {key for key, _, _ in again.rows} == {"k0", "k1", "k2"}
    with again.writing(part_clips=2) as add:
        add(rows[3:])
    again.finish(rows)
    assert [path.name for path in tmp_path.iterdir()] == ["offsets.parquet"]
    assert pq.read_table(out).column("key").to_pylist() == [clip.key for clip in clips]
    with pytest.raises(ValueError, match="overwrite=true"):
        _Store(out, "r2", overwrite=False)
    assert _Store(out, "r2", overwrite=True).rows == {}
