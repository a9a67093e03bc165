"""The arithmetic of `soundshard plan` against numbers worked out by hand, and what it refuses."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from configs import cli
from configs.load import load
from pipeline.estimate import Cluster, NodeGroup, duration, estimate, text
from pipeline.rates import Cost, Rates
from tests.pipeline.clips import make_clip

RATES = Rates(
    clips=20,
    failed=1,
    reasons={"empty": 1},
    video_seconds=10.0,
    segments=30.0,
    reencode=Cost(3.1, 3.0),
    reencode_fused=Cost(3.3, 3.2),
    decode=Cost(0.26, 0.25),
    tower=Cost(0.06, 0.02),
    codec=Cost(0.04, 0.01),
    source_bytes=1.5e6,
    media_bytes=2e6,
    feature_bytes=4e5,
    decoded_bytes=7e7,
    worker_process_bytes=400_000_000,
    decoder_process_bytes=100_000_000,
    actor_process_bytes=3_000_000_000,
    device="cuda",
    gpu_kind="GPU 9",
    gpu_memory_bytes=5_000_000_000,
    cpu_kind="CPU 7",
    cpus=16,
    versions={},
    options={"views": 1, "hop_frames": 8, "tower": {"batch_segments": 64, "threads": 1, "precision": "bf16"}, "encode": {"preset": "fast"}},
)
CLUSTER = Cluster(
    [NodeGroup("plain", 3, 32, memory_gb=128.0, network_mb_per_second=1000.0), NodeGroup("fast", 2, 16, 4, "GPU 9", 256.0, 2000.0)],
    storage_read_mb_per_second=500.0,
    storage_write_mb_per_second=250.0,
)


def test_the_whole_arithmetic_on_gpus() -> None:
    result = estimate(64_000, RATES, CLUSTER, clips_per_shard=60)
    assert result.good == 60_800  # 1 of 20 fails
    assert result.reencode.limits() == pytest.approx(
        {
            "cpu": 64_000 * 3 / 128,  # 3 x 32 and 2 x 16 processors
            "gpu": 0,
            "read": 64_000 * 1.5 / 500,
            "write": 60_800 * 2 / 250,
            "network": (60_800 * 2 + 60_800 * 2 * 4 / 5) / 7000,  # out to storage, and 4 of 5 clips to the machine that writes their shard
        }
    )
    assert (result.reencode.limit, result.reencode.seconds) == ("cpu", 1500)
    assert result.suggestion.decode_threads == 3  # a GPU takes 0.1 s for a clip that takes 0.25 s to decode
    assert result.featurise.limits() == pytest.approx(
        {
            "cpu": 60_800 * 0.25 / (8 * 3),  # 3 threads beside each of 8 GPUs
            "gpu": 60_800 * 0.1 / 8,
            "read": 60_800 * 2 / 500,
            "write": 60_800 * 0.4 / 250,
            "network": 60_800 * 2 / 7000,
        }
    )
    assert result.featurise.limit == "gpu"
    assert result.fused.cpu_seconds == pytest.approx((64_000 * 3.2 + 60_800 * 0.03) / 32)
    assert result.fused.write_seconds == pytest.approx(60_800 * 2.4 / 250)
    assert result.sequential_seconds == pytest.approx(1500 + 760)
    assert not result.suggestion.fused  # its encoding would be left to the processors beside the GPUs
    assert (result.shards, result.files) == (1067, 2 * (2 * 1067 + 3))
    assert (result.media_bytes, result.feature_bytes) == pytest.approx((60_800 * 2e6, 60_800 * 4e5))


def test_suggestions_keep_every_worker_busy() -> None:
    options = estimate(64_000, RATES, CLUSTER, clips_per_shard=60).suggestion
    assert options.chunk_clips == 43  # 43 x 30 segments hold 20 full batches of 64, and 64 / 1290 is 5 %
    assert options.decode_ahead == 6
    assert estimate(64_000, RATES, CLUSTER, clips_per_shard=20).suggestion.chunk_clips == 20  # no more than a shard


def test_memory_counts_processes_buffers_and_the_object_store() -> None:
    need = estimate(64_000, RATES, CLUSTER, clips_per_shard=60).memory
    assert need["plain"].reencode_bytes == 32 * 5e8 and need["plain"].featurise_bytes == 0
    assert need["fast"].featurise_bytes == pytest.approx(
        4 * (3e9 + 2 * 3 * 1e8 + 2 * (6 + 3) * 7e7)
    )  # two calls: 3 decoders, 6 clips ahead, 3 in batches
    assert need["fast"].object_store_bytes == pytest.approx((2 * 128 + 2 * 60) * 2e6 / 5)


def test_decoding_that_cannot_keep_ahead_limits_the_gpus() -> None:
    few = replace(CLUSTER, nodes=[NodeGroup("fast", 1, 9, 4, "GPU 9", network_mb_per_second=10_000.0)], storage_read_mb_per_second=1e6)
    result = estimate(20, RATES, few, clips_per_shard=10)
    assert result.suggestion.decode_threads == 2
    assert (result.featurise.limit, result.featurise.seconds) == ("cpu", pytest.approx(19 * 0.25 / 8))


def test_the_audio_tower_is_one_more_network() -> None:
    with_sound = replace(RATES, audio=Cost(0.1, 0.05), options={**RATES.options, "audio": {"weights": "avclip", "hop_samples": 640}})
    result = estimate(64_000, with_sound, CLUSTER, clips_per_shard=60)
    assert result.featurise.gpu_seconds == pytest.approx(60_800 * 0.2 / 8)
    assert result.fused.cpu_seconds == pytest.approx((64_000 * 3.2 + 60_800 * 0.08) / 32)
    assert "features of the sound every 640 samples" in text(result, with_sound, CLUSTER)
    assert "features of the sound" not in text(estimate(64_000, RATES, CLUSTER, clips_per_shard=60), RATES, CLUSTER)


def test_without_gpus_the_towers_processor_time_counts() -> None:
    rates = replace(RATES, device="cpu", gpu_kind="", tower=Cost(200.0, 140.0))
    result = estimate(2000, rates, CLUSTER, clips_per_shard=50)
    assert result.featurise.limits()["cpu"] == pytest.approx(1900 * (0.25 + 140 + 0.01) / 128) and result.featurise.gpu_seconds == 0
    assert result.fused.cpu_seconds == pytest.approx((2000 * 3.2 + 1900 * 140.01) / 128) and result.suggestion.fused
    assert "GPUs are not used" in text(result, rates, CLUSTER)


def test_storage_can_be_the_limit() -> None:
    slow = replace(CLUSTER, storage_write_mb_per_second=1.0)
    result = estimate(1000, RATES, slow, clips_per_shard=64)
    assert (result.reencode.limit, result.reencode.seconds) == ("write", pytest.approx(1900))
    narrow = replace(CLUSTER, nodes=[replace(group, network_mb_per_second=0.1) for group in CLUSTER.nodes])
    assert estimate(1000, RATES, narrow, clips_per_shard=64).reencode.limit == "network"


def test_other_gpus_than_those_measured_are_refused() -> None:
    with pytest.raises(ValueError, match=r"GPU 9.*GPU 5"):
        estimate(10, RATES, replace(CLUSTER, nodes=[NodeGroup("old", 1, 8, 1, "GPU 5", network_mb_per_second=1.0)]), clips_per_shard=5)
    with pytest.raises(ValueError, match="none"):
        estimate(10, RATES, replace(CLUSTER, nodes=[NodeGroup("plain", 1, 8, network_mb_per_second=1.0)]), clips_per_shard=5)


def test_what_is_printed_states_figures_and_assumptions() -> None:
    printed = text(estimate(64_000, RATES, CLUSTER, clips_per_shard=60), RATES, CLUSTER)
    for part in (
        "64,000 clips",
        "60,800 of them good",
        "25 min, cpu",
        "13 min, gpu",
        "media 121.6 GB",
        "chunk_clips=43 decode_threads=3",
        "CPU 7",
        "GPU 9",
        "assumed:",
    ):
        assert part in printed
    assert "more than its" not in printed
    crowded = replace(CLUSTER, nodes=[replace(group, memory_gb=16.0) for group in CLUSTER.nodes])
    assert printed.count("\n") > 15 and "more than its 16 GB" in text(estimate(64_000, RATES, crowded, clips_per_shard=60), RATES, crowded)


def test_durations() -> None:
    assert [duration(s) for s in (0.04, 59.9, 61, 3599, 3601, 100_000)] == ["0.0 s", "59.9 s", "1 min", "1 h 00", "1 h 00", "27 h 47"]


def test_the_command_counts_clips_or_takes_their_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps(asdict(replace(RATES, device="cpu", gpu_kind=""))))
    common = [f"rates={rates}", "cluster=cluster/example_cluster"]
    clips = tmp_path / "clips"
    clips.mkdir()
    make_clip(clips / "one.mp4")
    (clips / "again").mkdir()
    (clips / "again" / "one.mp4").write_bytes(b"")
    assert cli.main(["plan", f"source={clips}", *common]) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 clips are listed but absent or duplicates" in printed and "1 clips of 10.0 s" in printed
    assert cli.main(["plan", "clips=200000", *common]) == 0
    assert "200,000 clips" in capsys.readouterr().out
    for wrong in ([], ["clips=3", f"source={clips}"], ["clips=-1"], ["clips=3", "clips_per_shard=0"]):
        assert cli.main(["plan", *wrong, *common]) == 2
    assert cli.main(["plan", "clips=3", f"rates={rates}", f"cluster={rates}"]) == 2


def test_a_cluster_description_that_lacks_something_says_so(tmp_path: Path) -> None:
    assert load(Cluster, ["config=cluster/example_cluster"]).gpus == 8
    for number, content in enumerate(
        (
            "nodes: []",
            "storage_read_mb_per_second: 1\nstorage_write_mb_per_second: 1\nnodes: [{name: a, cpus: 2}]",
            "storage_read_mb_per_second: 1\nstorage_write_mb_per_second: 1\nnodes: [{name: a, cpus: 2, gpus: 1, network_mb_per_second: 5}]",
            "storage_read_mb_per_second: 1\nstorage_write_mb_per_second: 1\nnodes: [{name: a, cpu: 2, network_mb_per_second: 5}]",
        )
    ):
        path = tmp_path / f"{number}.yaml"
        path.write_text(content)
        with pytest.raises(ValueError):
            load(Cluster, [f"config={path}"])
