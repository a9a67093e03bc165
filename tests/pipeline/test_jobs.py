"""The preparation jobs on a real local Ray: one row per input, good clips intact, the same bytes however it runs, reruns that do nothing twice."""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset

from configs import cli
from configs.clock import segment_count
from model.codecs import load_codec
from model.synchformer_visual import load_tower, normalise
from pipeline import featurise, prepare, subset
from pipeline.media import EncodeConfig, decode
from pipeline.views import view_crop
from shards.read import Index
from tests.pipeline.clips import make_clip
from tests.pipeline.networks import small_networks

GOOD = 12
pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weights files of a tiny tower and a tiny codec."""
    return small_networks(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 inputs, of which 8 are bad in different ways."""
    folder = tmp_path_factory.mktemp("inputs")
    for number in range(GOOD):
        make_clip(
            folder / f"good{number:02d}.{('mp4', 'mkv')[number % 2]}", container=("mp4", "mkv")[number % 2], flash_picture=12 + number, seconds=2
        )
    (folder / "empty.mp4").write_bytes(b"")
    whole = (folder / "good00.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 3])
    (folder / "text.mp4").write_text("this was never a video\n" * 100)
    make_clip(folder / "video_only.mp4", audio_codec=None)
    make_clip(folder / "audio_only.mp4", video_codec=None)
    make_clip(folder / "short.mp4", seconds=Fraction(1, 5), flash_picture=1)
    (folder / "again").mkdir()
    shutil.copy(folder / "good01.mkv", folder / "again" / "good01.mkv")
    (folder / "unreadable.mp4").symlink_to(folder / "unreadable.mp4")  # cannot be opened, whoever runs the test (root reads every real file)
    return folder


def config(inputs: Path, out: Path, networks: dict[str, str], **changes) -> prepare.PrepareConfig:
    base = prepare.PrepareConfig(
        source=str(inputs),
        out=str(out),
        encode=EncodeConfig(short_side=64, preset="ultrafast"),
        clips_per_shard=7,
        actors=1,
        in_flight=1,
        hop_frames=8,
        tower=replace(prepare.PrepareConfig().tower, weights=networks["tower"], device="cpu", batch_segments=5),
        codec=replace(prepare.PrepareConfig().codec, weights=networks["codec"]),
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def prepared(inputs: Path, networks: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    prepare.run(config(inputs, out, networks))
    return out


def rows(dataset: Path) -> list[dict]:
    return pq.read_table(dataset / "manifest.parquet").to_pylist()


def digests(out: Path) -> dict[str, str]:
    return {
        str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.rglob("*")) if p.is_file() and p.name != "report.html"
    }


def test_every_input_ends_in_one_row(prepared: Path) -> None:
    expected = {
        "empty": "empty",
        "truncated": "truncated",
        "text": "undecodable",
        "video_only": "no_audio",
        "audio_only": "no_video",
        "short": "too_short",
        "unreadable": "unreadable",
    }
    for dataset in ("media", "features"):
        table = rows(prepared / dataset)
        assert len(table) == 20
        failed = [row for row in table if row["status"] == "failed"]
        assert {row["key"]: row["reason"] for row in failed if row["reason"] != "duplicate_key"} == expected
        assert [row["key"] for row in failed if row["reason"] == "duplicate_key"] == ["good01"]
        assert sorted(row["key"] for row in table if row["status"] == "ok") == [f"good{n:02d}" for n in range(GOOD)]
        assert all(row["message"] for row in failed)
        assert len({row["source"] for row in table}) == 20


def test_good_clips_are_intact_and_features_are_those_of_the_stored_clip(prepared: Path, networks: dict[str, str]) -> None:
    media, features = Index.open(prepared / "media"), Index.open(prepared / "features")
    tower, codec = load_tower(networks["tower"]).eval(), load_codec(networks["codec"])
    for key in ("good00", "good11"):
        clip = decode(media.bytes(media.row(key), "mp4"), sample_rate_hz=codec.sample_rate_hz, channels=codec.channels)
        assert clip.frames.shape == (50, 64, 96, 3)
        row = features.row(key)
        stored = features.member(row, "avclip.npy")
        assert stored.shape == (1, segment_count(50, 8), 8, tower.config.width) and stored.dtype == np.float16
        cut = view_crop(key, 0, 64, 96, tower.config.image_size).apply(clip.frames)
        with torch.inference_mode():
            for segment in range(stored.shape[1]):
                frames = torch.from_numpy(cut[8 * segment : 8 * segment + 16].copy())
                oracle = tower(normalise(frames)[None, None])[0, 0]
                torch.testing.assert_close(torch.from_numpy(stored[0, segment].copy()), oracle.half(), atol=2e-3, rtol=2e-3)
            codes = codec.encode(torch.from_numpy(clip.audio)[None])[0].numpy()
        np.testing.assert_array_equal(features.member(row, f"{codec.name}.npy"), codes.astype(np.uint16))
        described = json.loads(features.bytes(row, "json"))
        assert described["frames"] == 50 and described["steps"] == codes.shape[1]


def test_stock_webdataset_reads_both(prepared: Path, networks: dict[str, str]) -> None:
    codec = load_codec(networks["codec"])
    seen: Counter[str] = Counter()
    for tar in sorted((prepared / "features").glob("*.tar")):
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False).decode():
            assert sample["avclip.npy"].dtype == np.float16 and sample[f"{codec.name}.npy"].dtype == np.uint16
            assert sample["json"]["key"] == sample["__key__"]
            seen[sample["__key__"]] += 1
    for tar in sorted((prepared / "media").glob("*.tar")):
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False).decode():
            assert sample["json"]["frames"] == 50
            seen[sample["__key__"]] += 1
    assert seen == Counter({f"good{n:02d}": 2 for n in range(GOOD)})


def test_bytes_do_not_depend_on_workers_or_interruptions(prepared: Path, inputs: Path, networks: dict[str, str], tmp_path: Path) -> None:
    other = config(inputs, tmp_path, networks, actors=2, in_flight=3, decode_threads=3, decode_ahead=5)
    prepare.run(other)
    assert digests(tmp_path) == digests(prepared)
    # A run that stopped before the second media shard was committed, with a torn tar left behind.
    for name in ("train-000001.parquet", "manifest.parquet"):
        (tmp_path / "media" / name).unlink()
        (tmp_path / "features" / name).unlink()
    with (tmp_path / "media" / "train-000001.tar").open("r+b") as tar:
        tar.truncate(5000)
    prepare.run(other)
    assert digests(tmp_path) == digests(prepared)


def test_a_materialised_subset_is_what_preparing_only_those_clips_gives(
    prepared: Path, inputs: Path, networks: dict[str, str], tmp_path: Path
) -> None:
    """Media and features of good and bad clips: the same tars and ledgers, to the byte."""
    names = ["good11", "good03", "short", "good00", "good08", "video_only", "good04", "good05", "truncated", "good09"]
    (tmp_path / "list.txt").write_text("\n".join(names))
    prepare.run(config(inputs, tmp_path / "alone", networks, listing=str(tmp_path / "list.txt")))
    for kind in ("media", "features"):
        subset.run(subset.SubsetConfig(data=str(prepared / kind), out=str(tmp_path / kind), lists=str(tmp_path / "list.txt"), materialise=True))
        alone, copied = (
            {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".tar" or path.name.startswith("train-")}
            for folder in (tmp_path / "alone" / kind, tmp_path / kind)
        )
        assert len(alone) == 4 and alone == copied


def test_a_rerun_does_nothing_and_other_settings_are_refused(
    prepared: Path, inputs: Path, networks: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in prepared.rglob("*.tar")}
    prepare.run(config(inputs, prepared, networks))
    assert "reencode: 3 shards done, 0 to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in prepared.rglob("*.tar")} == before
    with pytest.raises(ValueError, match="crf"):
        prepare.run(config(inputs, prepared, networks, encode=EncodeConfig(short_side=64, preset="ultrafast", crf=30.0)))


def test_too_many_failures_end_in_status_1_and_keep_what_is_done(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"source={inputs}", f"out={tmp_path}", "encode.short_side=64", "encode.preset=ultrafast", "clips_per_shard=50"]
    assert cli.main(["reencode", *arguments, "max_failed_fraction=0.1"]) == 1
    printed = capsys.readouterr()
    assert "12 ok, 8 failed (duplicate_key 1, empty 1, no_audio 1, no_video 1" in printed.out and "8 of 20 clips failed" in printed.err
    assert len(rows(tmp_path)) == 20
    assert cli.main(["reencode", *arguments]) == 0
    assert "1 shards done, 0 to do" in capsys.readouterr().out
    assert cli.main(["featurise", f"data={tmp_path}", f"out={tmp_path}/f", f"tower.weights={tmp_path}/nothing"]) == 2
    assert "nothing" in capsys.readouterr().err


def test_views_keep_the_centre_crop_first(prepared: Path, networks: dict[str, str], tmp_path: Path, inputs: Path) -> None:
    base = config(inputs, tmp_path, networks)
    options = {f: getattr(base, f) for f in ("ray", "in_flight", "max_failed_fraction", "actors", "tower", "codec")}
    featurise.run(featurise.FeaturiseConfig(data=str(prepared / "media"), out=str(tmp_path), hop_frames=16, views=3, **options))
    one, three = Index.open(prepared / "features"), Index.open(tmp_path)
    different = 0
    for key in three.keys.to_pylist():
        views, centre = three.member(three.row(key), "avclip.npy"), one.member(one.row(key), "avclip.npy")
        np.testing.assert_array_equal(views[0], centre[0, ::2])
        different += int(not np.array_equal(views[1], views[0])) + int(not np.array_equal(views[2], views[1]))
    assert different >= 2 * GOOD - 3


def test_fused_stages_give_the_same_media_and_nearly_the_same_features(
    prepared: Path, inputs: Path, networks: dict[str, str], tmp_path: Path
) -> None:
    prepare.run(config(inputs, tmp_path, networks, fused=True, actors=2))
    for tar in (prepared / "media").glob("*.tar"):
        assert (tmp_path / "media" / tar.name).read_bytes() == tar.read_bytes()
    stored, fused = Index.open(prepared / "features"), Index.open(tmp_path / "features")
    assert fused.info.fingerprint != stored.info.fingerprint
    assert [(r["key"], r["status"], r["reason"]) for r in fused.rows()] == [(r["key"], r["status"], r["reason"]) for r in stored.rows()]
    for key in stored.keys.to_pylist():
        a = stored.member(stored.row(key), "avclip.npy").astype(np.float32)
        b = fused.member(fused.row(key), "avclip.npy").astype(np.float32)
        assert a.shape == b.shape
        assert 0 < np.abs(a - b).mean() < 0.1 * a.std()


def test_missing_weights_are_noticed_before_anything_is_made(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOUNDSHARD_CACHE", str(tmp_path / "cache"))
    assert cli.main(["prepare", f"source={inputs}", f"out={tmp_path}/out"]) == 2
    message = capsys.readouterr().err
    assert "soundshard weights get=avclip" in message and "soundshard standin" in message and not (tmp_path / "out").exists()
