"""The loop by itself, with units that do next to nothing: what it does when processes die, or a shard was written by somebody else."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from configs.load import JobError
from pipeline.discover import Clip
from pipeline.job import JobOptions, Summary, carry_out, open_dataset, settle_plan
from pipeline.progress import Tick
from pipeline.ray_loop import Cluster, RayConfig, Stage
from pipeline.workers import Actors, Payload, Tasks, UnitActor, failed_entry
from shards.dataset import new_info
from shards.write import Entry
from tests.chaos.harness import rows, sha256s

pytestmark = pytest.mark.usefixtures("ray_cluster")


SILENT_SERVER = """\
import threading
from ray._private import worker
from pipeline import ray_loop


class Unanswered:
    def __init__(self, subscriber):
        self.poll, self._close = subscriber.poll, subscriber.close

    def close(self):
        self._close()
        threading.Event().wait()


ray_loop.END_SECONDS = 0.5
cluster = ray_loop.Cluster(ray_loop.RayConfig(num_cpus=1, object_store_mb=80))
cluster.start()
worker.global_worker.gcs_error_subscriber = Unanswered(worker.global_worker.gcs_error_subscriber)
cluster.stop()
print("ended")
"""


def some_clips(count: int) -> list[Clip]:
    clips = [Clip(f"clip{number:03d}", f"/clip{number:03d}.mp4", "train") for number in range(count)]
    return [*clips[:-1], Clip(clips[-1].key, clips[-1].source, "train", reason="missing", message="it was never there")]


def entry(clip: Clip) -> Entry:
    return Entry(clip.key, clip.split, None, clip.source, 1.0, {"txt": clip.key.encode()})


def work(shard: str, clips: Sequence[Clip], marks: str) -> tuple[Tick, Payload]:
    """Entries of the clips; a worker that is given clip003 for the first time, or clip011 ever, dies."""
    for clip in clips:
        first = os.path.join(marks, clip.key)
        if clip.key == "clip003" and not os.path.exists(first):
            Path(first).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if clip.key == "clip011" and os.path.exists(os.path.join(marks, "poison")):
            os.kill(os.getpid(), signal.SIGKILL)
    return Tick(len(clips), node=shard), ([entry(clip) for clip in clips],)


class Careful(UnitActor):
    """As `work`, in an actor; refuses to start where it is told to."""

    def __init__(self, marks: str) -> None:
        if os.path.exists(os.path.join(marks, "broken")):
            raise ValueError("the networks cannot be loaded here")
        self._marks = marks

    def unit(self, shard: str, clips: Sequence[Clip]) -> tuple[Tick, Payload]:
        time.sleep(0.05)
        return work(shard, clips, self._marks)


def run(out: Path, stage: Stage, count: int = 17, clips_per_shard: int = 5, **options) -> Summary:
    config = JobOptions(**options)
    open_dataset(str(out), new_info("media", {"made": "by a test"}), overwrite=False)
    plan = settle_plan(str(out), some_clips, count, config=config, clips_per_shard=clips_per_shard)
    return carry_out(stage, plan, config, Cluster(RayConfig()))[0]


def tasks(out: Path, marks: Path, unit_clips: int = 1) -> Stage:
    return Stage("work", (str(out),), unit_clips, lambda _: Tasks(work, str(marks)))


def actors(out: Path, marks: Path, unit_clips: int, calls: int = 1) -> Stage:
    return Stage("work", (str(out),), unit_clips, lambda _: Actors(Careful, str(marks), count=2, num_cpus=0, calls=calls), networks=True)


def test_the_bytes_do_not_depend_on_units_workers_or_deaths(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    found = []
    for number, (unit_clips, calls) in enumerate([(1, 0), (3, 0), (2, 2)]):
        (marks / "clip003").unlink(missing_ok=True)
        out = tmp_path / str(number)
        summary = run(out, actors(out, marks, unit_clips, calls) if calls else tasks(out, marks, unit_clips), in_flight=number)
        assert (summary.ok, summary.failed, dict(summary.reasons)) == (16, 1, {"missing": 1})
        assert (marks / "clip003").exists(), "no worker died"
        found.append(sha256s(str(out)))
    assert len(found[0]) == 4 and all(other == found[0] for other in found)


def test_a_clip_that_kills_every_worker_costs_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.ray_loop.TRIES", 1)
    for module in ("ray_loop", "workers"):
        monkeypatch.setattr(f"pipeline.{module}.RAY_RETRIES", 0)
    (tmp_path / "poison").touch()
    summary = run(tmp_path / "out", tasks(tmp_path / "out", tmp_path))
    assert (summary.ok, dict(summary.reasons)) == (15, {"crashed": 1, "missing": 1})
    assert "died each of the 2 times" in next(row["message"] for row in rows(str(tmp_path / "out")) if row["key"] == "clip011")
    (tmp_path / "poison").unlink()
    assert run(tmp_path / "out", tasks(tmp_path / "out", tmp_path), retry_failed=True).ok == 16


def test_networks_that_cannot_be_loaded_stop_the_job_and_say_why(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(JobError, match="the networks cannot be loaded here"):
        run(tmp_path / "out", actors(tmp_path / "out", tmp_path, 2))
    (tmp_path / "broken").unlink()
    assert run(tmp_path / "out", actors(tmp_path / "out", tmp_path, 2)).ok == 16


def wrong(shard: str, clips: Sequence[Clip]) -> tuple[Tick, Payload]:
    """A fault of the program, not of a clip or a machine."""
    raise RuntimeError(f"a bug in {shard} with {len(clips)} clips")


def test_a_bug_stops_the_job_at_once(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"work stopped at shard train-00000\d: RuntimeError: a bug in train"):
        run(tmp_path, Stage("work", (str(tmp_path),), 1, lambda _: Tasks(wrong)))


def test_two_datasets_are_written_together_and_mended_separately(tmp_path: Path) -> None:
    both = (str(tmp_path / "a"), str(tmp_path / "b"))
    open_dataset(both[0], new_info("media", {"made": "by a test"}), overwrite=False)

    stage = Stage("work", both, 2, lambda _: Tasks(twice))
    assert run(tmp_path / "b", stage).ok == 16
    before = sha256s(both[0]), sha256s(both[1])
    (tmp_path / "b" / "train-000001.parquet").unlink()
    stamp = (tmp_path / "a" / "train-000001.tar").stat().st_mtime_ns
    assert run(tmp_path / "b", stage).ok == 16
    assert (sha256s(both[0]), sha256s(both[1])) == before
    assert (tmp_path / "a" / "train-000001.tar").stat().st_mtime_ns == stamp, "a shard that was there already was written again"


def twice(shard: str, clips: Sequence[Clip]) -> tuple[Tick, Payload]:
    del shard
    return Tick(len(clips)), ([entry(clip) for clip in clips], [failed_entry(clip, "empty", "") if clip.reason else entry(clip) for clip in clips])


def test_a_job_ends_though_rays_server_does_not_answer() -> None:
    ended = subprocess.run([sys.executable, "-c", SILENT_SERVER], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout.split()) == (0, ["ended"]), ended.stderr
    assert "did not answer for 0.5 s" in ended.stderr
