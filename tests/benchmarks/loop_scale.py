"""What the Ray loop costs when the work costs nothing: tasks per second and the driver's memory, from a thousand to a hundred thousand clips.

    python -m tests.benchmarks.loop_scale [clips=100000] [small=1000] [unit_clips=1,8] [cpus=2]

Every clip is a row that fails at once, so that neither media nor tar bytes are part of the figures: what is measured is the plan, the scheduling, the
results' way to the writers, the ledgers and the manifest. The last line is JSON.
"""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.discover import Clip
from pipeline.job import JobOptions, carry_out, open_dataset, settle_plan
from pipeline.progress import Tick
from pipeline.ray_loop import RayConfig, Stage, cluster
from pipeline.workers import Payload, Tasks, failed_entry
from shards.dataset import new_info


def clips_of(count: int) -> list[Clip]:
    """Clips that exist in name only."""
    return [Clip(f"clip{number:09d}", f"/nowhere/clip{number:09d}.mp4", "train") for number in range(count)]


def nothing(shard: str, clips: Sequence[Clip]) -> tuple[Tick, Payload]:
    """The unit that does no work."""
    del shard
    return Tick(len(clips)), ([failed_entry(clip, "nothing", "no work was done") for clip in clips],)


def resident_mb() -> float:
    """What this process holds in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def main(argv: list[str]) -> None:
    """Run the loop over both sizes and print the figures."""
    options = dict(argument.split("=") for argument in argv)
    sizes = [int(options.get("small", 1_000)), int(options.get("clips", 100_000))]
    results = []
    with tempfile.TemporaryDirectory() as folder, cluster(RayConfig(num_cpus=int(options.get("cpus", 2)))) as ray_cluster:
        ray_cluster.start()
        for unit_clips in map(int, options.get("unit_clips", "1,8").split(",")):
            for count in sizes:
                root = f"{folder}/{unit_clips}-{count}"
                config = JobOptions()
                open_dataset(root, new_info("media", {"made": "of nothing"}), overwrite=False)
                started, before = time.perf_counter(), resident_mb()
                plan = settle_plan(root, clips_of, count, config=config, clips_per_shard=64)
                planned = time.perf_counter() - started
                stage = Stage("nothing", (root,), unit_clips, lambda: Tasks(nothing))
                started = time.perf_counter()
                summary, _ = carry_out(stage, plan, config, ray_cluster)
                assert summary.failed == count
                results.append(
                    {
                        "clips": count,
                        "unit_clips": unit_clips,
                        "plan_seconds": round(planned, 2),
                        "units_per_second": round(count / unit_clips / summary.seconds, 1),
                        "ms_per_unit": round(1e3 * summary.seconds * unit_clips / count, 2),
                        "seconds_with_manifest": round(time.perf_counter() - started, 2),
                        "driver_mb_before": round(before, 1),
                        "driver_mb_after": round(resident_mb(), 1),
                    }
                )
                print(results[-1], flush=True)
    print(json.dumps({"runs": results, "driver_mb_peak": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)}))


if __name__ == "__main__":
    main(sys.argv[1:])
