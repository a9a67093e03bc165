"""Clips that are parts of videos: the frames and samples that the whole video has there, wherever key frames and packets lie, in every job."""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import cache
from math import floor
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame

from model.generate import Sampling
from pipeline.decode import MediaError, Track, open_clip, video_frames
from pipeline.discover import Clip, DiscoverConfig, discover
from pipeline.encode import EncodeConfig, EncodedClip, reencode
from pipeline.features import CodecOptions, TowerOptions
from pipeline.featurise import FeaturiseActor, FeaturiseConfig
from pipeline.generate import GenerateConfig, request_id
from pipeline.plan import media_plans
from pipeline.prepare import FusedActor, PrepareConfig
from pipeline.reencode import encode_clip, limits_of, media_entry, media_info
from pipeline.stretch import Stretch
from pipeline.sync_video import Length, Piece, watch
from shards.dataset import create_or_check
from shards.read import Index
from shards.view import write_view
from shards.write import Entry, write_shard
from tests.pipeline.clips import Recipe, make_clip
from tests.pipeline.networks import made_here, small_networks, small_run

KEY_FRAMES = (("g", "10"), ("bf", "0"), ("sc_threshold", "0"))
"""One every ten pictures and nowhere else."""
FAST = EncodeConfig(short_side=48, preset="ultrafast")
RECIPES = {
    "plain": Recipe(seconds=Fraction(3), flash_picture=41),
    "webm": Recipe("webm", "libvpx", "libopus", Fraction(30), seconds=Fraction(3), audio_rate_hz=48000, flash_picture=50),
    "late": Recipe("mkv", frame_rate=Fraction(30000, 1001), start=Fraction(1, 2), audio_start=Fraction(3, 10), seconds=Fraction(3), flash_picture=50),
    "avi": Recipe("avi", "mpeg4", seconds=Fraction(3), flash_picture=41),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    paths = {name: folder / f"{name}.{recipe.container}" for name, recipe in RECIPES.items()}
    for name, path in paths.items():
        make_clip(path, RECIPES[name])
    return paths


@cache
def whole(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """A video's pictures, its sound, its sound at 16 kHz, and its rate."""
    with open_clip(path, need_audio=True) as clip:
        (wave, rate_hz), (mono, _) = clip.sounds((None, None), (16000, 1))
        return clip.rgb(), wave, mono, rate_hz


# --- decoding -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("start", "end"), [(Fraction(0), Fraction(1)), (Fraction(18, 25), Fraction(2)), (Fraction(2), None), (Fraction(1), Fraction(3))]
)
def test_a_part_on_the_grid_is_the_whole_videos_bit_for_bit(clips: dict[str, Path], name: str, start: Fraction, end: Fraction | None) -> None:
    pictures, wave, mono, rate_hz = whole(clips[name])
    for in_memory in (True, False):
        with open_clip(clips[name], need_audio=True, start_seconds=start, end_seconds=end, in_memory=in_memory) as clip:
            (cut, _), (cut_mono, _) = clip.sounds((None, None), (16000, 1))
            first, last = int(start * 25), len(pictures) if end is None else int(end * 25)
            assert clip.frames == last - first and np.array_equal(clip.rgb(), pictures[first:last])
            assert cut.shape[1] == round(Fraction((last - first) * rate_hz, 25)) and clip.audio_gaps == 0
            for part, of, hz in ((cut, wave, rate_hz), (cut_mono, mono, 16000)):
                at = round(start * hz)
                assert np.array_equal(part, of[:, at : at + part.shape[1]])


@pytest.mark.parametrize("name", ["webm", "late"])
def test_a_part_from_anywhere_shows_what_was_shown_then(clips: dict[str, Path], name: str) -> None:
    """Against frames and times as libav gives them, with no clock between."""
    path, recipe, start = clips[name], RECIPES[name], Fraction(413, 1000)
    with av.open(str(path)) as container:
        frames = [frame for frame in container.decode(video=0) if isinstance(frame, VideoFrame)]
    with open_clip(path, need_audio=True, start_seconds=0.413, end_seconds=2.413) as clip:
        times = [Fraction(frame.time or 0).limit_denominator(10**6) - clip.origin for frame in frames]
        wave, rate_hz = clip.sound()
        cut = clip.rgb()
    assert len(cut) == 50
    for k, picture in enumerate(cut):
        shown = max(n for n, time in enumerate(times) if time < start + Fraction(2 * k + 1, 50))
        assert np.array_equal(picture, frames[shown].to_ndarray(format="rgb24"))
    origin = min(recipe.start, recipe.start if recipe.audio_start is None else recipe.audio_start)
    assert abs(int(np.abs(wave[0]).argmax()) - floor((recipe.flash - origin - start) * rate_hz)) < 0.002 * rate_hz


def test_what_lies_beyond_the_end_is_too_short(clips: dict[str, Path]) -> None:
    path = clips["plain"]
    for start, end in [(3.0, None), (3.0, 4.0), (60.0, 61.0), (2.0, 3.2), (None, 3.4)]:
        with pytest.raises(MediaError, match=r"too_short: it ends at 3\.00 s; the clip is the part of it") as error:
            reencode(path, FAST, start_seconds=start, end_seconds=end)
        assert error.value.reason == "too_short"
    with pytest.raises(MediaError, match="too_short: 10 frames"):
        reencode(path, FAST, start_seconds=2.6)
    with open_clip(path, start_seconds=1.0, end_seconds=3.1) as clip:  # within a tenth: as far as the video goes
        assert clip.frames == 50
    for start, end in [(-0.1, None), (2.0, 2.0), (2.0, 1.0)]:
        with pytest.raises(ValueError, match="expected a start of at least 0 and an end after it"):
            reencode(path, FAST, start_seconds=start, end_seconds=end)


def test_a_part_is_decoded_from_the_key_frame_before_it_and_not_beyond_its_end(clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    make_clip(path := clips["plain"].with_name("keys.mp4"), seconds=Fraction(4), video_options=KEY_FRAMES)
    seen: list[int] = []
    with open_clip(path, start_seconds=2.0, end_seconds=3.0) as clip:
        decoded = clip._decoded

        def counted(track: Track, start: int = 0) -> Iterator:
            for item in decoded(track, start):
                seen.append(start)
                yield item

        monkeypatch.setattr(clip, "_decoded", counted)
        assert len(list(clip.pictures())) == 25
    assert set(seen) == {50} and len(seen) <= 26


def test_damage_after_a_part_does_not_fail_it_and_damage_in_it_does(clips: dict[str, Path]) -> None:
    make_clip(path := clips["plain"].with_name("damaged.mkv"), container="mkv", seconds=Fraction(4), video_options=KEY_FRAMES)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        places = [
            (packet.pos, packet.size) for packet in container.demux(video=0) if packet.size and packet.pos is not None and (packet.pts or 0) >= 3000
        ]
    for at, size in places:
        data[at + 8 : at + size] = bytes(size - 8)
    assert reencode(bytes(data), FAST, start_seconds=0.4, end_seconds=2.4).frames == 50
    for start in (None, 3.0):
        with pytest.raises(MediaError, match=r"undecodable: .*video packets"):
            reencode(bytes(data), FAST, start_seconds=start)


# --- the jobs -------------------------------------------------------------------------------------------------------------------------


def part(path: Path, start: float | None, end: float | None, key: str = "part") -> Clip:
    return Clip(key, str(path), "train", "x", start_seconds=start, end_seconds=end)


def test_a_part_is_encoded_as_if_the_video_were_no_more(clips: dict[str, Path]) -> None:
    pictures, wave, _, rate_hz = whole(clips["plain"])
    clip = part(clips["plain"], 0.4, 2.4)
    config = replace(FAST, short_side=64)  # the clip's own size: nothing is scaled
    encoded = encode_clip(clip, config, limits_of(PrepareConfig()), keep_frames=True)
    assert isinstance(encoded, EncodedClip) and encoded.pictures is not None and encoded.audio is not None
    assert (encoded.frames, encoded.samples, encoded.duration_seconds) == (50, 2 * rate_hz, 2.0)
    assert (
        np.abs(encoded.pictures.astype(int) - pictures[10:60]).max() <= 1
    )  # one goes through yuv420p and back as the other does, with another converter
    assert np.abs(encoded.audio[0] - wave[:, round(0.4 * rate_hz) :][:, : 2 * rate_hz].sum(0) / 2**0.5).max() < 0.01
    entry = media_entry(clip, encoded)
    assert entry.members is not None and isinstance(entry.members["json"], bytes)
    described = json.loads(entry.members["json"])
    assert (described["start_seconds"], described["end_seconds"], described["frames"]) == (0.4, 2.4, 50)
    all_of_it = media_entry(part(clips["plain"], None, None), reencode(clips["plain"], config))
    assert (
        all_of_it.members is not None
        and isinstance(all_of_it.members["json"], bytes)
        and "start_seconds" not in json.loads(all_of_it.members["json"])
    )


def test_parts_of_one_video_in_a_tar_are_listed_and_prepared(clips: dict[str, Path], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        tar.add(clips["plain"], "deep/plain.mp4")
    (tmp_path / "parts.csv").write_text(
        "path,key,start_seconds,end_seconds,label\nplain.mp4,one,0,1,a\nplain.mp4,two,1.2,2.4,b\nplain.mp4,far,4,5,c\n"
    )
    found = discover(DiscoverConfig(str(tmp_path), listing=str(tmp_path / "parts.csv")))
    assert [(clip.key, clip.start_seconds, clip.end_seconds, clip.label) for clip in found] == [
        ("far", 4.0, 5.0, "c"),
        ("one", 0.0, 1.0, "a"),
        ("two", 1.2, 2.4, "b"),
    ]
    assert len({(clip.source, clip.offset) for clip in found}) == 1 and found[0].offset is not None
    networks = small_networks(tmp_path)
    chosen = {"tower": TowerOptions(weights=networks["tower"], device="cpu"), "codec": CodecOptions(weights=networks["codec"])}
    _, (media, features) = FusedActor(PrepareConfig(source="s", out="o", fused=True, encode=FAST, **chosen)).unit("train-000000", found)
    assert [entry.reason for entry in media] == [entry.reason for entry in features] == ["too_short", None, None]
    assert [entry.duration_seconds for entry in media[1:]] == [entry.duration_seconds for entry in features[1:]] == [1.0, 1.2]
    for clip, entry in zip(found, media, strict=True):
        assert entry.members == media_entry(clip, encode_clip(clip, FAST, limits_of(PrepareConfig()))).members


def test_features_of_a_view_are_those_of_its_clips(clips: dict[str, Path], tmp_path: Path) -> None:
    networks, data, view = small_networks(tmp_path), str(tmp_path / "media"), str(tmp_path / "view")
    options = {"tower": TowerOptions(weights=networks["tower"], device="cpu"), "codec": CodecOptions(weights=networks["codec"])}
    create_or_check(data, media_info(replace(PrepareConfig(), encode=FAST, clips_per_shard=3)))
    made = {
        name: media_entry(Clip(name, f"/in/{name}", "train"), encode_clip(Clip(name, str(path), "train"), FAST, limits_of(PrepareConfig())))
        for name, path in clips.items()
    }
    write_shard(data, "train-000000", [made["avi"], Entry("bad", "train", None, "/in/bad", reason="empty", message="0 bytes"), made["late"]])
    write_shard(data, "train-000001", [made["plain"], made["webm"]])
    index = Index.open(data)
    rows = [row for row in index.rows() if row["key"] != "late"]
    table = index.table.slice(0, 0).from_pylist(rows, schema=index.table.schema)
    write_view(view, index, table, selection=["not late"])
    shards = media_plans(view)
    assert [(shard.name, [clip.key for clip in shard.clips]) for shard in shards] == [
        ("train-000000", ["avi", "bad", "plain"]),
        ("train-000001", ["webm"]),
    ]
    assert [shard.clips[0].version for shard in shards] == [f"sha256:{index.table['shard_sha256'][row]}" for row in (0, 4)]
    of_view, of_data = (FeaturiseActor(FeaturiseConfig(data=root, out="o", **options)) for root in (view, data))
    _, (first,) = of_view.unit("train-000000", [clip for clip in shards[0].clips if clip.reason is None])
    _, (second,) = of_view.unit("train-000001", shards[1].clips)
    _, (expected,) = of_data.unit("train-000001", [Clip("plain", "/in/plain", "train"), Clip("webm", "/in/webm", "train")])
    for entry, other in zip([first[1], second[0]], expected, strict=True):
        assert entry.members is not None and other.members is not None and entry.members.keys() == other.members.keys()
        assert all(np.array_equal(np.asarray(data), np.asarray(other.members[name])) for name, data in entry.members.items())


def test_sync_looks_at_the_part(clips: dict[str, Path]) -> None:
    looking = {"start_frame": 3, "start_sample": 1600, "most_frames": None, "short_side": None, "piece_frames": 17}
    length, *pieces = watch(clips["webm"], part=(0.4, 2.4), **looking)
    _, *all_pieces = watch(clips["webm"], **{**looking, "start_frame": 13, "start_sample": 8000})
    assert length == Length(50, 47)
    assert isinstance(pieces[0], Piece) and isinstance(all_pieces[0], Piece)
    frames, wave = (np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("frames", "wave"))
    assert np.array_equal(frames, np.concatenate([piece.frames for piece in all_pieces if isinstance(piece, Piece)])[:47])
    assert np.array_equal(wave, np.concatenate([piece.wave for piece in all_pieces if isinstance(piece, Piece)])[: 47 * 640])


def test_sound_is_generated_for_the_part(clips: dict[str, Path], tmp_path: Path) -> None:
    assert Stretch.of(0.4, 0, end_seconds=2.4).frames_of(video_frames(clips["plain"])) == 50
    assert Stretch.of(0.4, 2, end_seconds=9.0).frames_of(75) == 32
    with pytest.raises(MediaError, match="too_short"):
        Stretch.of(0.4, 2, end_seconds=1.4).frames_of(75)
    run = small_run(tmp_path, small_networks(tmp_path))
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        info = tarfile.TarInfo("plain.mp4")
        info.size = clips["plain"].stat().st_size
        tar.addfile(info, io.BytesIO(clips["plain"].read_bytes()))
    (tmp_path / "parts.csv").write_text("path,key,start_seconds,end_seconds\nplain.mp4,one,1,2.4\n")
    (tmp_path / "starts.csv").write_text("file,start_sec\none,0.4\n")
    config = GenerateConfig(
        run=str(run),
        source=str(tmp_path),
        listing=str(tmp_path / "parts.csv"),
        out=str(tmp_path / "out"),
        sampling=Sampling(guidance=1.0),
        tower=TowerOptions(weights="", device="cpu"),
        short_side=48,
    )
    rows = [made_here(config)["one"], made_here(replace(config, starts=str(tmp_path / "starts.csv")))["one"]]
    assert [(row["start_seconds"], row["duration_seconds"]) for row in rows] == [(1.0, 1.4), (1.4, 1.0)]
    assert rows[0]["source"] == f"{tmp_path}/p.tar::plain.mp4"
    # A part that ends elsewhere is another request, and is not taken for done.
    assert request_id(config, config.run, {"one": 1.0}, {"one": 2.4}) != request_id(config, config.run, {"one": 1.0}, {"one": 2.5})
