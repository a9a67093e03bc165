"""Generation on a real local Ray with small networks: what comes out beside each video, and what a rerun, a bad video or a wrong network does."""

import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from configs import cli
from model.generate import Sampling
from pipeline import generate, reencode
from pipeline.discover import Clip
from pipeline.features import TowerOptions
from pipeline.media import EncodeConfig, decode
from tests.pipeline.clips import make_clip
from tests.pipeline.networks import made_here, small_networks, small_run

pytestmark = pytest.mark.usefixtures("ray_cluster")
STEPS_PER_SEGMENT = 48
RATE_HZ = 24000


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return small_run(folder, small_networks(folder))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    make_clip(folder / "a.mp4", seconds=2)  # 3 segments and 2 frames
    make_clip(folder / "b.mkv", container="mkv", seconds=2, flash_picture=30)
    make_clip(folder / "silent.mp4", seconds=1, audio_codec=None, flash_picture=10)
    make_clip(folder / "webm.webm", container="webm", video_codec="libvpx-vp9", audio_codec="libopus", audio_rate_hz=48000, seconds=3)
    (folder / "bad.mp4").write_text("no video")
    return folder


def options(run_folder: Path, **changes) -> generate.GenerateConfig:
    base = generate.GenerateConfig(
        run=str(run_folder),
        out="",
        sampling=Sampling(guidance=2.0, top_k=20),
        tower=TowerOptions(weights="", device="cpu"),
        short_side=64,
        batch_clips=3,
    )
    return replace(base, **changes)


def test_each_video_gets_an_mp4_a_wav_and_a_row(run_folder: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = options(run_folder, source=str(videos), out=str(tmp_path))
    rows = {row["key"]: row for row in generate.run(config)}
    assert "4 ok, 1 failed (undecodable 1)" in capsys.readouterr().out
    assert rows["bad"]["status"] == "failed" and rows["bad"]["message"]
    assert pq.read_table(tmp_path / "ledger.parquet").num_rows == 5
    for key, seconds in (("a", 2.0), ("b", 2.0), ("silent", 1.0), ("webm", 3.0)):
        source = next(videos.glob(f"{key}.*"))
        result = tmp_path / rows[key]["mp4"]
        assert video_packets(result) == video_packets(source)  # the pictures are copied, byte for byte
        clip = decode(result, sample_rate_hz=RATE_HZ, channels=1)
        assert clip.audio.shape == (1, round(seconds * RATE_HZ)) and np.abs(clip.audio).max() > 1e-4
        assert wav_samples(tmp_path / f"{key}.wav") == round(seconds * RATE_HZ)
    # A rerun does nothing; another seed does everything again.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.wav")}
    generate.run(config)
    assert "5 videos done, 0 to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.wav")} == before
    generate.run(replace(config, seed=1, limit=2))
    assert "0 videos done, 2 to do" in capsys.readouterr().out


def video_packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def wav_samples(path: Path) -> int:
    with av.open(str(path)) as wav:
        return sum(frame.samples for frame in wav.decode(audio=0))


def test_sound_depends_on_the_seed_and_the_clip_but_not_on_the_batch(run_folder: Path, videos: Path, tmp_path: Path) -> None:
    outs = {}
    for name, changes in {"together": {}, "alone": {"batch_clips": 1}, "other": {"seed": 5}}.items():
        made_here(options(run_folder, source=str(videos), out=str(tmp_path / name), **changes))
        outs[name] = {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.wav")}
    assert outs["together"] == outs["alone"] and len(outs["alone"]) == 4
    assert all(outs["other"][name] != sound for name, sound in outs["together"].items())
    assert outs["together"]["a.wav"] != outs["together"]["b.wav"]


def test_durations_are_whole_segments(run_folder: Path, videos: Path, tmp_path: Path) -> None:
    rows = made_here(options(run_folder, source=str(videos), out=str(tmp_path), duration_seconds=1.28))
    assert rows["a"]["duration_seconds"] == pytest.approx(1.28) and rows["silent"]["reason"] == "too_short"
    assert wav_samples(tmp_path / "a.wav") == round(1.28 * RATE_HZ)
    assert 32 <= len(decode(tmp_path / "a.mp4").frames) <= 34  # cut by packets: a picture that an earlier one needs may stay
    with pytest.raises(ValueError, match=r"0\.64 or 1\.28"):
        generate.run(options(run_folder, source=str(videos), out=str(tmp_path), duration_seconds=1.0))


def test_a_media_dataset_as_the_source(run_folder: Path, videos: Path, tmp_path: Path) -> None:
    reencode.run(reencode.ReencodeConfig(source=str(videos), out=str(tmp_path / "media"), encode=EncodeConfig(short_side=64, preset="ultrafast")))
    rows = {r["key"]: r for r in generate.run(options(run_folder, data=str(tmp_path / "media"), out=str(tmp_path / "out")))}
    assert {key: row["reason"] for key, row in rows.items()} == {"a": None, "b": None, "webm": None, "silent": "no_audio", "bad": "undecodable"}
    assert decode(tmp_path / "out" / "a.mp4").frames.shape == (50, 64, 96, 3)


def test_other_networks_than_the_run_was_trained_on_are_refused(
    run_folder: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes((run_folder / "codec.safetensors").read_bytes())
    arguments = [f"run={run_folder}", f"source={videos}", f"out={tmp_path / 'out'}"]
    assert cli.main(["generate", *arguments, f"tower.weights={other}"]) == 2
    message = capsys.readouterr().err
    assert "tower weights" in message and "trained on" in message
    assert cli.main(["generate", f"run={tmp_path}", f"source={videos}", f"out={tmp_path / 'out'}"]) == 2
    assert "not a run folder" in capsys.readouterr().err
    assert cli.main(["generate", f"run={run_folder}", f"out={tmp_path / 'out'}"]) == 2
    assert "source=VIDEOS or data=" in capsys.readouterr().err


def test_all_failed_is_a_failure(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.mp4").write_text("no video")
    assert cli.main(["generate", f"run={run_folder}", str(tmp_path / "bad.mp4"), f"out={tmp_path / 'out'}"]) == 1
    assert "none of 1 videos" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "bad.json").read_text())["reason"] == "undecodable"


def test_clip_seeds_differ() -> None:
    assert len({generate.clip_seed(seed, clip.key) for seed in range(3) for clip in (Clip("a", "", "t"), Clip("b", "", "t"))}) == 6
