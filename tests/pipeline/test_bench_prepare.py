"""The rates of a real sample: what they count, that they survive their file, and what a user is told."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from configs import cli
from configs.clock import segment_count
from model.synchformer_audio import AudioTower, AudioTowerConfig, save_audio_tower
from pipeline import bench_prepare
from pipeline.bench_prepare import BenchPrepareConfig, choose, table
from pipeline.discover import Clip, DiscoverConfig, discover
from pipeline.features import AudioOptions
from pipeline.media import EncodeConfig, reencode
from pipeline.rates import Cost, Rates, read_rates
from tests.pipeline.clips import make_clip
from tests.pipeline.networks import SMALL_TOWER, small_networks

GOOD, BAD = 5, 2
ENCODE = EncodeConfig(short_side=64, preset="ultrafast")
SMALL_AUDIO = AudioTowerConfig(mels=29, frames=66, patch_size=7, stride=17, width=22, depth=1, heads=2)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    for number in range(GOOD):
        make_clip(folder / f"good{number}.mp4", flash_picture=12 + number)
    (folder / "empty.mp4").write_bytes(b"")
    make_clip(folder / "silent.mp4", audio_codec=None)
    return folder


@pytest.fixture(scope="module")
def config(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> BenchPrepareConfig:
    folder = tmp_path_factory.mktemp("bench")
    networks, base = small_networks(folder), BenchPrepareConfig()
    save_audio_tower(folder / "audio.safetensors", AudioTower(SMALL_AUDIO))
    return replace(
        base,
        source=str(sample),
        out=str(folder / "rates.json"),
        encode=ENCODE,
        views=2,
        chunk_clips=3,
        tower=replace(base.tower, weights=networks["tower"], device="cpu", batch_segments=4),
        codec=replace(base.codec, weights=networks["codec"]),
        audio=AudioOptions(weights=str(folder / "audio.safetensors")),
    )


@pytest.fixture(scope="module")
def rates(config: BenchPrepareConfig) -> Rates:
    return bench_prepare.run(config)


def test_counts_are_those_of_the_sample(rates: Rates, sample: Path) -> None:
    assert (rates.clips, rates.failed, rates.reasons) == (GOOD + BAD, BAD, {"empty": 1, "no_audio": 1})
    assert rates.video_seconds == 2.0 and rates.segments == 2 * segment_count(50, 8)
    assert rates.source_bytes == sum(path.stat().st_size for path in sample.iterdir()) / (GOOD + BAD)
    assert rates.decoded_bytes == 50 * 64 * 96 * 3
    mp4 = sum(len(reencode(path, ENCODE).mp4) for path in sample.glob("good*")) / GOOD
    assert mp4 < rates.media_bytes < mp4 + 4096  # the record and tar's headers and padding
    features = 2 * segment_count(50, 8) * 8 * SMALL_TOWER.width * 2 + (50 - 15) * SMALL_AUDIO.tokens * SMALL_AUDIO.width * 2
    assert features < rates.feature_bytes < features + 7 * 1024


def test_times_and_the_machine_are_there(rates: Rates) -> None:
    for cost in (rates.reencode, rates.reencode_fused, rates.decode, rates.tower, rates.codec, rates.audio):
        assert cost.cpu_seconds > 0 and cost.wall_seconds > 0
    assert rates.networks.cpu_seconds == pytest.approx(rates.tower.cpu_seconds + rates.codec.cpu_seconds + rates.audio.cpu_seconds)
    assert "audio tower" in table(rates) and "audio tower" not in table(replace(rates, audio=Cost(0.0, 0.0)))
    assert (rates.device, rates.gpu_kind, rates.gpu_memory_bytes) == ("cpu", "", 0)
    assert rates.cpus >= 1 and rates.cpu_kind and rates.actor_process_bytes > rates.decoder_process_bytes > 20e6


def test_the_file_holds_the_same_rates(rates: Rates, config: BenchPrepareConfig, tmp_path: Path) -> None:
    assert read_rates(config.out) == rates
    assert rates.options["tower"]["batch_segments"] == 4 and rates.options["encode"]["preset"] == "ultrafast"
    before = tmp_path / "before.json"  # as it was written before the audio tower was measured
    before.write_text(json.dumps({name: value for name, value in json.loads(Path(config.out).read_text()).items() if name != "audio"}))
    assert read_rates(str(before)) == replace(rates, audio=Cost(0.0, 0.0))
    torn = tmp_path / "torn.json"
    torn.write_bytes(Path(config.out).read_bytes()[:-50])
    other = tmp_path / "other.json"
    other.write_text('{"clips": 3}')
    for path in (torn, other):
        with pytest.raises(ValueError, match="bench-prepare"):
            read_rates(str(path))
    with pytest.raises(ValueError, match="no such file"):
        read_rates(str(tmp_path / "absent.json"))


def test_the_sample_is_spread_over_the_listing(sample: Path) -> None:
    clips = [Clip(f"{n:02d}", f"{n}.mp4", "train") for n in range(17)]
    assert [clip.key for clip in choose(clips, 5)] == ["00", "03", "06", "10", "13"]
    assert choose(clips, 40) == clips and choose([], 3) == []
    assert len(choose(discover(DiscoverConfig(source=str(sample))), 3)) == 3


def test_a_sample_without_a_good_clip_is_an_error(
    config: BenchPrepareConfig, sample: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(sample / "silent.mp4", tmp_path)
    networks = [f"tower.weights={config.tower.weights}", f"codec.weights={config.codec.weights}", "tower.device=cpu"]
    assert cli.main(["bench-prepare", f"source={tmp_path}", f"out={tmp_path}/rates.json", *networks]) == 1
    assert "no_audio" in capsys.readouterr().err and not (tmp_path / "rates.json").exists()
    assert cli.main(["bench-prepare", f"source={tmp_path}", "clips=0", *networks]) == 2
