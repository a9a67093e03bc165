"""What decoding and re-encoding in a process of its own costs: the same calls in process and isolated, in alternating pairs.

    python -m tests.benchmarks.isolation [FOLDER] [--pairs N] [--threads N]

Without a folder of clips, three are made. `decode` is measured on the clips' re-encoded bytes, as featurising reads them, and `reencode` on the
files, with its pictures kept and without. The machine may be shared, so the two sides alternate within a pair, and what is reported is the median
over pairs of the ratio isolated / in process: of wall time, and of CPU time of the process and its children, which a busy machine changes least.
With `--threads`, as many threads work at the same time. Also: seconds to start a child, milliseconds of an empty call, the children's own memory,
and its growth in the second half of the pairs. Prints one JSON line last.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

from pipeline.isolate import Child, Limits, call
from pipeline.media import decode, reencode
from tests.benchmarks.reencode import make_clips

LIMITS = Limits()


def cpu_seconds(pids: list[int]) -> float:
    """CPU time of this process and of children that are running."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ticks = sum(sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])) for pid in pids)
    return own.ru_utime + own.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def private_mb(pid: int) -> float:
    """Resident memory of a process, without what it shares."""
    resident, shared = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
    return (resident - shared) * resource.getpagesize() / 2**20


def pairs_of(name: str, work: Callable, sources: list, pairs: int, pool: ThreadPoolExecutor, threads: int) -> dict[str, float]:
    """Ratios and seconds of `work` over all sources, by both sides in turn."""

    def isolated(source: object) -> None:
        call(work, source, limits=LIMITS)

    def inside(source: object) -> None:
        work(source)

    list(pool.map(lambda _: call(time.sleep, 0.5, limits=LIMITS), range(threads)))  # at the same time: one child for each thread
    pids = [int(pid) for tasks in Path("/proc/self/task").glob("*/children") for pid in tasks.read_text().split()]
    rows, private = [], []
    for number in range(pairs + 1):
        sides = {}
        for side in (inside, isolated) if number % 2 else (isolated, inside):
            wall, cpu = time.perf_counter(), cpu_seconds(pids)
            list(pool.map(side, sources * threads))
            sides[side] = (time.perf_counter() - wall, cpu_seconds(pids) - cpu)
        private.append(sum(map(private_mb, pids)) / len(pids))
        (wall, cpu), (wall_isolated, cpu_isolated) = sides[inside], sides[isolated]
        rows.append((wall_isolated / wall, cpu_isolated / cpu, wall / len(sources) / threads, wall_isolated / len(sources) / threads))
    wall_ratio, cpu_ratio, seconds, seconds_isolated = (round(median(column), 4) for column in zip(*rows[1:], strict=True))  # the first warms up
    middle = len(private) // 2  # growth of the second half is a leak, not a warming up
    figures = {"wall_ratio": wall_ratio, "cpu_ratio": cpu_ratio, "seconds": seconds, "seconds_isolated": seconds_isolated}
    figures |= {"child_mb": round(private[-1], 1), "child_grew_mb": round(private[-1] - private[middle], 1)}
    print(f"{name:24} " + "  ".join(f"{key} {value}" for key, value in figures.items()), flush=True)
    return figures


def run(clips: list[Path], *, pairs: int, threads: int) -> dict:
    """Measure, print a table, return the figures."""
    stored = [reencode(clip).mp4 for clip in clips]
    result: dict = {"benchmark": "isolation", "clips": len(clips), "pairs": pairs, "threads": threads} | overhead()
    with ThreadPoolExecutor(threads) as pool:
        result["decode"] = pairs_of("decode", decode, stored, pairs, pool, threads)
        result["reencode"] = pairs_of("reencode", reencode, list(map(str, clips)), max(5, pairs // 3), pool, threads)
        kept = partial(reencode, keep_frames=True)
        result["reencode_keep_frames"] = pairs_of("reencode, keep_frames", kept, list(map(str, clips)), max(5, pairs // 3), pool, threads)
    return result


def overhead() -> dict[str, float]:
    """What there is to pay without any work."""
    starts, child = [], Child(LIMITS)
    for _ in range(5):
        child.close()
        started = time.perf_counter()
        child.call(os.getpid)
        starts.append(time.perf_counter() - started)
    started = time.perf_counter()
    for _ in range(200):
        child.call(os.getpid)
    empty = (time.perf_counter() - started) / 200
    child.close()
    print(f"start {median(starts):.3f} s, empty call {1000 * empty:.2f} ms", flush=True)
    return {"start_seconds": round(median(starts), 3), "empty_call_ms": round(1000 * empty, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="a folder of clips")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of runs over all clips")
    parser.add_argument("--threads", type=int, default=1, help="threads that work at the same time")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        clips = sorted(arguments.folder.rglob("*.mp4")) if arguments.folder else make_clips(Path(made))
        print(json.dumps(run(clips, pairs=arguments.pairs, threads=arguments.threads)))


if __name__ == "__main__":
    main()
