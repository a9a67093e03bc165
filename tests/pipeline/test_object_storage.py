"""Every job with its inputs and outputs in an object store, as a user runs them."""

import json
from pathlib import Path

import pytest

from configs import cli, storage
from shards.read import Index
from tests.chaos.harness import Driver, check, rows, sha256s
from tests.pipeline.clips import make_clip
from tests.pipeline.networks import small_networks
from tests.s3 import S3


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_from_clips_to_sound_in_object_storage(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SOUNDSHARD_CACHE", str(tmp_path / "cache"))
    clips, networks = tmp_path / "clips", small_networks(tmp_path)
    clips.mkdir()
    for number in range(6):
        make_clip(clips / f"clip{number}.mp4", flash_picture=10 + 3 * number)
    (clips / "text.mp4").write_text("no video\n" * 50)
    for path in [*clips.iterdir(), *map(Path, networks.values())]:
        storage.write_bytes(f"{s3.url}/in/{path.name}" if path.parent == clips else f"{s3.url}/weights/{path.name}", path.read_bytes())

    def job(name: str, *arguments: str) -> str:
        driver = Driver(name, *arguments)
        assert driver.wait(240) == 0, driver.text
        return driver.text

    def here(name: str, *arguments: str) -> str:
        assert cli.main([name, *arguments]) == 0
        return capsys.readouterr().out

    small = ("encode.short_side=64", "encode.preset=ultrafast", "clips_per_shard=3", "ray.num_cpus=2", "actors=1", "tower.device=cpu")
    weights = (f"tower.weights={s3.url}/weights/tower.safetensors", f"codec.weights={s3.url}/weights/codec.safetensors")
    local = ("prepare", f"source={clips}", f"out={tmp_path}/data", *small, f"tower.weights={networks['tower']}", f"codec.weights={networks['codec']}")
    here(*local)
    printed = job("prepare", f"source={s3.url}/in", f"out={s3.url}/data", *small, *weights)
    assert "6 ok, 1 failed (undecodable 1)" in printed and f"report in {s3.url}/data/report.html" in printed
    for dataset in ("media", "features"):
        assert check(f"{s3.url}/data/{dataset}", clips, {"text": "undecodable"}) == []
        assert sha256s(f"{s3.url}/data/{dataset}") == sha256s(f"{tmp_path}/data/{dataset}")
    # Where nothing is left to do no worker needs to know where the storage is, so that these run here.
    again = here("prepare", f"source={s3.url}/in", f"out={s3.url}/data", *small, *weights)
    assert "reencode: 3 shards done, 0 to do" in again and "featurise: 3 shards done, 0 to do" in again
    assert "undecodable" in here("inspect", f"{s3.url}/data/features")

    model = (
        "model.layers=1",
        "model.width=32",
        "model.heads=2",
        "model.visual_width=8",
        "stream.segments=2",
        "stream.batch_size=4",
        "trainer.max_steps=3",
        "schedule.warmup_steps=1",
        "trainer.accelerator=cpu",
    )
    job("train", f"data={s3.url}/data/features", f"out={tmp_path}/run", *model)
    for path in (tmp_path / "run").rglob("*"):
        if path.suffix in (".yaml", ".safetensors"):
            storage.write_bytes(f"{s3.url}/run/{path.relative_to(tmp_path / 'run')}", path.read_bytes())
    sound = ("ray.num_cpus=2", "tower.device=cpu", "duration_seconds=1.28", "limit=2")
    assert "2 ok, 0 failed" in job("generate", f"run={s3.url}/run", f"source={s3.url}/in", f"out={s3.url}/sound", *sound)
    assert "2 videos done, 0 to do" in here("generate", f"run={s3.url}/run", f"source={s3.url}/in", f"out={s3.url}/sound", *sound)
    row = json.loads(storage.read_bytes(f"{s3.url}/sound/clip0.json"))
    assert row["status"] == "ok" and storage.stat(f"{s3.url}/sound/{row['mp4']}")
    assert Index.open(f"{s3.url}/data/features").ok == 6 and len(rows(f"{s3.url}/data/media")) == 7


def test_what_must_be_local_says_so(s3: S3) -> None:
    driver = Driver("synth", f"out={s3.url}/synth")
    assert driver.wait(60) == 2 and "it must be a local folder" in driver.text
