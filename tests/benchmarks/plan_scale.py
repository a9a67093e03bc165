"""Planning without media: seconds, and what the driver holds in memory, from a thousand clips to a million.

    python -m tests.benchmarks.plan_scale [clips=1000,200000,1000000] [clips_per_shard=64] [folder=/tmp]

Every clip is an empty file in one flat folder with VGGSound's csv, so that discovery lists and looks at as many files as it would with media; only
their bytes are missing, and on a network file system or in an object store looking takes longer. Each size runs in a driver of its own. Measured
there: the first plan; a rerun where nothing changed; another for one clip in a hundred more; opening and reading the whole plan. `driver_mb` is
resident memory of the driver with what planning imports (no Ray, no torch), before it planned and after it had read the plan; `peak` the most that it
ever had; `planning_process_mb` the most that a planning process had, which ends with the plan. The last line is JSON.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.discover import DiscoverConfig, discover
from pipeline.plan import PLAN, Plan, settle

T = TypeVar("T")


def make_inputs(folder: str, start: int, stop: int) -> None:
    """Empty files called as VGGSound's clips are, and the csv that lists them and those before."""
    os.makedirs(folder, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    for number in range(start, stop):
        name = f"id{number:09d}_{number % 600 * 1000}_{number % 600 * 1000 + 10000}.mp4"
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    os.close(descriptor)
    with open(f"{folder}/vggsound.csv", "w") as file:
        for number in range(stop):
            file.write(f'id{number:09d},{number % 600},"sound number {number % 309}",{"test" if number % 13 == 0 else "train"}\n')


def resident_mb() -> float:
    """What this process holds in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def timed(function: Callable[[], T]) -> tuple[dict[str, float], T]:
    """Seconds that a call took, by the clock and of processors, and what it returned."""
    started, before = time.perf_counter(), os.times()
    result = function()
    seconds, after = time.perf_counter() - started, os.times()
    return {"wall": round(seconds, 2), "cpu": round(sum(after[:4]) - sum(before[:4]), 2)}, result


def measure(folder: str, clips: int, clips_per_shard: int) -> dict[str, object]:
    """All figures of one size."""
    source, root = f"{folder}/clips", f"{folder}/out"

    def plan() -> tuple[Plan, int]:
        found, changes = settle(root, discover, DiscoverConfig(source), clips_per_shard=clips_per_shard)
        return found, changes.added

    make_inputs(source, 0, clips)
    before = resident_mb()
    first, _ = timed(plan)
    again, _ = timed(plan)
    opening, opened = timed(lambda: Plan(root))
    reading, read = timed(lambda: sum(len(shard.clips) for shard in opened.shards()))
    assert read == opened.clips == clips
    after, peak = resident_mb(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    make_inputs(source, clips, clips + clips // 100)
    appending, (_, added) = timed(plan)
    assert added == clips // 100
    return {
        "clips": clips,
        "shards": len(opened.names),
        "first_seconds": first,
        "again_seconds": again,
        "append_seconds": appending,
        "open_seconds": opening,
        "read_seconds": reading,
        "plan_mb": round(os.stat(f"{root}/{PLAN}").st_size / 1e6, 2),
        "driver_mb_before": round(before, 1),
        "driver_mb_after": round(after, 1),
        "driver_mb_peak": round(peak, 1),
        "planning_process_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3, 1),
    }


def main(argv: list[str]) -> None:
    """Measure every size in a process of its own and print the figures."""
    options = dict(argument.split("=") for argument in argv)
    per_shard, parent = int(options.get("clips_per_shard", 64)), options.get("folder")
    if "one" in options:
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            print(json.dumps(measure(folder, int(options["one"]), per_shard)))
        return
    runs = []
    for clips in options.get("clips", "1000,200000,1000000").split(","):
        command = [sys.executable, "-m", "tests.benchmarks.plan_scale", *argv, f"one={clips}"]
        runs.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
        print(runs[-1], flush=True)
    print(json.dumps({"runs": runs}))


if __name__ == "__main__":
    main(sys.argv[1:])
