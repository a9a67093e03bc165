"""What the Ray loop costs when the work costs nothing: per unit, in the driver's memory, and with records of a real clip's size.

    python -m tests.benchmarks.loop_scale [clips=100000] [small=1000] [unit_clips=1,8] [records=512] [megabytes=2] [cpus=2]

First every clip is a row that fails at once, so that neither media nor tar bytes are part of the figures: what is measured is the plan, the
scheduling, the results' way to the writers, the ledgers and the manifest. Then `records` clips of `megabytes` each, beside a bare loop that writes
the same bytes: the difference is what the object store and the tasks cost per clip, also given as a share of a clip's encode (see reencode.py). The
last line is JSON.
"""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.discover import Clip
from pipeline.job import JobOptions, carry_out, open_dataset, settle_plan
from pipeline.progress import Tick
from pipeline.ray_loop import Cluster, RayConfig, Stage, cluster
from pipeline.workers import Payload, Tasks, failed_entry
from shards.dataset import create_or_check, new_info
from shards.write import Entry, write_shard

ENCODE_SECONDS = 3.0


def clips_of(count: int) -> list[Clip]:
    """Clips that exist in name only."""
    return [Clip(f"clip{number:09d}", f"/nowhere/clip{number:09d}.mp4", "train") for number in range(count)]


def record(clip: Clip, size: int) -> Entry:
    """A row that fails at once, or a record of that many bytes."""
    return Entry(clip.key, clip.split, None, clip.source, 10.0, {"mp4": bytes(size)}) if size else failed_entry(clip, "nothing", "no work was done")


def nothing(shard: str, clips: Sequence[Clip], size: int) -> tuple[Tick, Payload]:
    """The unit that does no work."""
    del shard
    return Tick(len(clips)), ([record(clip, size) for clip in clips],)


def resident_mb() -> float:
    """What this process holds in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def run(root: str, count: int, unit_clips: int, size: int, ray_cluster: Cluster) -> dict[str, Any]:
    """One job of `count` clips through the loop."""
    config = JobOptions()
    open_dataset(root, new_info("media", {"made": "of nothing"}), overwrite=False)
    started, before = time.perf_counter(), resident_mb()
    plan = settle_plan(root, clips_of, count, config=config, clips_per_shard=64)
    planned = time.perf_counter() - started
    started = time.perf_counter()
    summary, _ = carry_out(Stage("nothing", (root,), unit_clips, lambda _: Tasks(nothing, size)), plan, config, ray_cluster)
    assert summary.ok + summary.failed == count
    return {
        "clips": count,
        "unit_clips": unit_clips,
        "plan_seconds": round(planned, 2),
        "units_per_second": round(count / unit_clips / summary.seconds, 1),
        "ms_per_unit": round(1e3 * summary.seconds * unit_clips / count, 2),
        "seconds_with_manifest": round(time.perf_counter() - started, 2),
        "driver_mb_before": round(before, 1),
        "driver_mb_after": round(resident_mb(), 1),
    }


def main(argv: list[str]) -> None:
    """Run the loop over all sizes and print the figures."""
    options = dict(argument.split("=") for argument in argv)
    records, size = int(options.get("records", 512)), int(1e6 * float(options.get("megabytes", 2)))
    figures: dict[str, Any] = {"runs": []}
    with tempfile.TemporaryDirectory() as folder, cluster(RayConfig(num_cpus=int(options.get("cpus", 2)))) as ray_cluster:
        ray_cluster.start()
        for unit_clips in map(int, options.get("unit_clips", "1,8").split(",")):
            for count in (int(options.get("small", 1_000)), int(options.get("clips", 100_000))):
                figures["runs"].append(run(f"{folder}/{unit_clips}-{count}", count, unit_clips, 0, ray_cluster))
                print(figures["runs"][-1], flush=True)
        figures["driver_mb_peak"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)
        run(f"{folder}/warm", 8, 1, 0, ray_cluster)
        with_ray = 1 / run(f"{folder}/ray", records, 1, size, ray_cluster)["units_per_second"]
        create_or_check(f"{folder}/bare", new_info("media", {"made": "bare"}))
        started = time.perf_counter()
        for shard, first in enumerate(range(0, records, 64)):
            write_shard(f"{folder}/bare", f"train-{shard:06d}", (record(clip, size) for clip in clips_of(records)[first : first + 64]))
        bare = (time.perf_counter() - started) / records
        names = [f"train-{shard:06d}.tar" for shard in range(-(-records // 64))]
        figures["records"] = {
            "clips": records,
            "megabytes": size / 1e6,
            "same_bytes": all(Path(folder, "ray", name).read_bytes() == Path(folder, "bare", name).read_bytes() for name in names),
            "overhead_ms_per_clip": round(1e3 * (with_ray - bare), 2),
            "share_of_an_encode": round((with_ray - bare) / ENCODE_SECONDS, 4),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
