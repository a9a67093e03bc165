"""What Ray costs per clip: the same shards written by the Ray loop and by a bare loop, with clips whose encoding takes no time.

    python -m tests.benchmarks.ray_overhead [clips=512] [megabytes=2]

Each clip is a record of `megabytes` that appears at once, so that what is measured is the scheduling, the object store and the progress
counting. The last line is JSON; the overhead is also given as a share of a real clip's encode (tests/benchmarks/reencode.py).
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ray

from pipeline.discover import Clip
from pipeline.ray_loop import Actor, RayConfig, ShardPlan, cluster, plan_shards, run_shards
from shards.dataset import DatasetInfo, create_or_check, new_info
from shards.write import Entry, Outcome, write_shard

ENCODE_SECONDS = 3.0


def entry(clip: Clip, payload: bytes) -> Entry:
    """A good clip's ledger row with one member."""
    return Entry(clip.key, clip.split, None, clip.source, 10.0, {"mp4": payload})


def make(megabytes: float, ticker: Actor) -> bytes:
    """A clip that takes no time to encode."""
    ticker.tick.remote(1, 0)
    return bytes(int(megabytes * 1e6))


def write(root: str, plan: ShardPlan, refs: list[ray.ObjectRef]) -> Outcome:
    """The shard's one write."""

    def entries() -> Iterator[Entry]:
        for clip, ref in zip(plan.clips, refs, strict=True):
            yield entry(clip, ray.get(ref))

    return write_shard(root, plan.name, entries())


def info(name: str) -> DatasetInfo:
    """A dataset.json for shards that nobody keeps."""
    return new_info("media", {"made": name})


def main(argv: list[str]) -> None:
    """Run both loops and print the figures."""
    options = dict(argument.split("=") for argument in argv)
    count, megabytes = int(options.get("clips", 512)), float(options.get("megabytes", 2))
    make_task, write_task = ray.remote(make).options(num_cpus=1), ray.remote(write).options(num_cpus=0)
    plans = plan_shards([Clip(f"clip{n:06d}", f"/{n}", "train") for n in range(count)], 64)
    with tempfile.TemporaryDirectory() as folder, cluster(RayConfig(num_cpus=2)):

        def submit(plan: ShardPlan, ticker: Actor) -> ray.ObjectRef:
            return write_task.remote(f"{folder}/ray", plan, [make_task.remote(megabytes, ticker) for _ in plan.clips])

        run_shards(
            f"{folder}/warm",
            info("warm"),
            plans[:1],
            lambda p, t: write_task.remote(f"{folder}/warm", p, [make_task.remote(0, t) for _ in p.clips]),
            in_flight=1,
            stage="warm-up",
        )
        started = time.perf_counter()
        run_shards(f"{folder}/ray", info("ray"), plans, submit, in_flight=4, stage="ray")
        with_ray = time.perf_counter() - started
        started = time.perf_counter()
        create_or_check(f"{folder}/bare", info("bare"))
        for plan in plans:
            write_shard(f"{folder}/bare", plan.name, (entry(clip, bytes(int(megabytes * 1e6))) for clip in plan.clips))
        bare = time.perf_counter() - started
        same = all((Path(folder) / "ray" / f"{p.name}.tar").read_bytes() == (Path(folder) / "bare" / f"{p.name}.tar").read_bytes() for p in plans)
    overhead = (with_ray - bare) / count
    figures = {
        "clips": count,
        "megabytes": megabytes,
        "ray_seconds": round(with_ray, 3),
        "bare_seconds": round(bare, 3),
        "same_bytes": same,
        "overhead_ms_per_clip": round(overhead * 1e3, 2),
        "share_of_an_encode": round(overhead / ENCODE_SECONDS, 4),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
