"""Rerunning preparation: new clips are appended, failed ones tried again, changed inputs noticed; and nothing else is touched."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from configs.load import JobError
from pipeline import prepare, reencode
from pipeline.media import EncodeConfig
from shards.read import Index
from tests.chaos.harness import check, rows, sha256s
from tests.pipeline.clips import make_clip
from tests.pipeline.networks import small_networks

pytestmark = pytest.mark.usefixtures("ray_cluster")
CLIPS = 8


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(CLIPS):
        make_clip(folder / f"clip{number}.mp4", flash_picture=10 + number)
    return folder


@pytest.fixture
def inputs(clips: Path, tmp_path: Path) -> Path:
    """A folder that a test may change: 8 clips, of which one is cut short and one is empty."""
    folder = tmp_path / "in"
    shutil.copytree(clips, folder)
    (folder / "clip2.mp4").write_bytes((clips / "clip2.mp4").read_bytes()[:3000])
    (folder / "clip6.mp4").write_bytes(b"")
    return folder


def options(inputs: Path, out: Path) -> reencode.ReencodeConfig:
    return reencode.ReencodeConfig(
        source=str(inputs), out=str(out), encode=EncodeConfig(short_side=64, preset="ultrafast"), clips_per_shard=3, clip_seconds=60.0
    )


def stamps(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix in (".tar", ".parquet") and path.stem.startswith("train")}


def test_retrying_mends_failed_clips_and_leaves_the_others_alone(inputs: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    reencode.run(options(inputs, out))
    before = stamps(out)
    assert {row["key"]: row["reason"] for row in rows(str(out)) if row["reason"]} == {"clip2": "truncated", "clip6": "empty"}
    for name in ("clip2", "clip6"):
        shutil.copy(clips / f"{name}.mp4", inputs / f"{name}.mp4")
    again = replace(options(inputs, out), retry_failed=True, overwrite=True, reasons="empty")
    reencode.run(replace(options(inputs, tmp_path / "whole"), source=str(clips)))
    capsys.readouterr()
    reencode.run(again)
    assert "2 shards are made again because their inputs changed" in capsys.readouterr().out
    assert sha256s(str(out)) == sha256s(str(whole))
    after = stamps(out)
    assert after["train-000001.tar"] == before["train-000001.tar"], "a shard without failed clips was written again"


def test_retrying_runs_failed_clips_only(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A clip that a short time limit stopped is tried again under a longer one; its shard's other clips are copied, not encoded."""
    out = tmp_path / "out"
    with pytest.raises(JobError, match=r"8 of 8 clips failed.*retry_failed=true"):
        reencode.run(replace(options(inputs, out), clip_seconds=0.01))
    # A fast machine finds out what is wrong with the two bad files in less than the limit.
    assert {row["key"] for row in rows(str(out)) if row["reason"] == "timeout"} >= {f"clip{n}" for n in (0, 1, 3, 4, 5, 7)}
    with pytest.raises(ValueError, match="retry_failed"):
        reencode.run(replace(options(inputs, out), reasons="timeout"))
    capsys.readouterr()
    with pytest.raises(JobError, match="none is good"):
        reencode.run(replace(options(inputs, out), retry_failed=True, reasons="io"))
    assert "3 shards done, 0 to do (0 clips)\n" in capsys.readouterr().out
    reencode.run(replace(options(inputs, out), retry_failed=True, reasons="timeout,io"))
    fresh = tmp_path / "fresh"
    reencode.run(options(inputs, fresh))
    assert sha256s(str(out)) == sha256s(str(fresh))
    assert check(str(out), inputs, {"clip2": "truncated", "clip6": "empty"}) == []
    before = stamps(out)
    reencode.run(replace(options(inputs, out), retry_failed=True))
    now = stamps(out)
    assert now["train-000001.tar"] == before["train-000001.tar"] and now["train-000000.tar"] != before["train-000000.tar"]
    assert sha256s(str(out)) == sha256s(str(fresh))


def test_new_clips_are_appended_as_new_shards(inputs: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    reencode.run(options(inputs, out))
    before = stamps(out)
    for number in range(4):
        shutil.copy(clips / f"clip{number}.mp4", inputs / f"a_new_clip{number}.mp4")
    capsys.readouterr()
    reencode.run(options(inputs, out))
    printed = capsys.readouterr().out
    assert "4 new clips are appended" in printed and "3 shards done, 2 to do (4 clips)" in printed
    assert {name: stamp for name, stamp in stamps(out).items() if name in before} == before
    assert check(str(out), inputs, {"clip2": "truncated", "clip6": "empty"}) == []
    assert [row["key"] for row in rows(str(out)) if row["shard"] == "train-000004"] == ["a_new_clip3"]


def test_changed_inputs_are_refused_or_made_again(inputs: Path, clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reencode.run(options(inputs, out))
    before = sha256s(str(out))
    shutil.copy(clips / "clip5.mp4", inputs / "clip4.mp4")
    with pytest.raises(ValueError, match=r"(?s)clip4.*overwrite=true"):
        reencode.run(options(inputs, out))
    assert sha256s(str(out)) == before
    reencode.run(replace(options(inputs, out), overwrite=True))
    after = sha256s(str(out))
    assert {name for name in after if after[name] != before[name]} == {"train-000001.tar"}
    with pytest.raises(ValueError, match=r"(?s)encode.crf.*overwrite=true"):
        reencode.run(replace(options(inputs, out), encode=EncodeConfig(short_side=64, preset="ultrafast", crf=30.0)))
    reencode.run(replace(options(inputs, out), overwrite=True, encode=EncodeConfig(short_side=64, preset="ultrafast", crf=30.0)))
    assert all(after[name] != sha for name, sha in sha256s(str(out)).items())
    assert Index.open(out).info.spec["encode"]["crf"] == 30.0


def test_features_follow_the_media_shards_that_were_made_again(inputs: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    networks = small_networks(tmp_path)
    base = prepare.PrepareConfig(
        source=str(inputs),
        out=str(tmp_path / "out"),
        encode=EncodeConfig(short_side=64, preset="ultrafast"),
        clips_per_shard=3,
        actors=1,
        tower=replace(prepare.PrepareConfig().tower, weights=networks["tower"], device="cpu"),
        codec=replace(prepare.PrepareConfig().codec, weights=networks["codec"]),
    )
    prepare.run(base)
    before = stamps(tmp_path / "out" / "features")
    shutil.copy(clips / "clip6.mp4", inputs / "clip6.mp4")
    os.utime(inputs / "clip6.mp4", ns=(1, 1))
    prepare.run(replace(base, overwrite=True))
    printed = capsys.readouterr().out
    assert "1 shards are made again because their media shards changed" in printed
    after = stamps(tmp_path / "out" / "features")
    assert {name for name in after if after[name] != before[name]} == {"train-000002.tar", "train-000002.parquet"}
    features = Index.open(tmp_path / "out" / "features")
    assert features.member(features.row("clip6"), "avclip.npy").shape[0] == 1
    prepare.run(base)
    printed = capsys.readouterr().out
    assert "reencode: 3 shards done, 0 to do" in printed and "featurise: 3 shards done, 0 to do" in printed
