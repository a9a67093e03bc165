"""What object storage costs: CPU seconds a gigabyte up (one large file) and down (2 MB clips, and one large file to disk), against bare obstore;
and what the merging of many ledgers costs.

`python -m tests.benchmarks.storage [megabytes=512] [ledgers=15000] [rows=14]`

Starts its own server (SeaweedFS, of the extra `dev`), whose CPU time is not counted. Prints one JSON line last.
"""

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import md5, sha256
from pathlib import Path

import numpy as np
import obstore
from obstore.store import S3Store

from configs import storage
from shards.dataset import create_or_check, new_info
from shards.write import Entry, totals, write_manifest, write_shard
from tests.s3 import BUCKET, server

OPTIONS = {"megabytes": 512, "ledgers": 15_000, "rows": 14}
ROUNDS = 3


def main(arguments: list[str]) -> None:
    """Measure, and print one line."""
    options = OPTIONS | {name: int(value) for name, _, value in (argument.partition("=") for argument in arguments)}
    merged = manifest(options["ledgers"], options["rows"])  # first, while the process is small
    print(json.dumps({**options, **merged, **transfers(options["megabytes"])}))


def transfers(megabytes: int) -> dict[str, float]:
    """CPU seconds and wall seconds a gigabyte, the best of some rounds taken in turn."""
    data = np.random.default_rng(0).bytes(megabytes << 20)
    with server() as s3, tempfile.TemporaryDirectory() as folder:
        os.environ |= s3.environment
        bare = S3Store(BUCKET, client_options={"allow_http": True})
        url, part, copy = s3.url, storage.PART_BYTES, Path(folder) / "copy"

        for number in range(megabytes // 2):
            storage.write_bytes(f"{url}/clip{number}", data[number << 21 :][: 2 << 20])

        def download() -> None:
            with copy.open("wb") as file:
                for chunk in obstore.get(bare, "bare").stream(min_chunk_size=part):
                    file.write(chunk)

        def local_copy() -> None:
            storage.local_copy(f"{url}/ours", folder).unlink()

        ways: dict[str, Callable[[], object]] = {
            "up_bare": lambda: obstore.put(bare, "bare", data, chunk_size=part, max_concurrency=storage.CONCURRENT_PARTS),
            "up": lambda: storage.write_bytes(f"{url}/ours", data),
            "of_which_md5": lambda: md5(data, usedforsecurity=False),
            "a_tars_sha256": lambda: sha256(data),
            "down_clips_bare": lambda: [len(obstore.get(bare, f"clip{number}").bytes()) for number in range(megabytes // 2)],
            "down_clips": lambda: [len(storage.read_bytes(f"{url}/clip{number}")) for number in range(megabytes // 2)],
            "down_to_disk_bare": download,
            "down_to_disk": local_copy,
        }
        spent = _rounds(ways)
    per_gigabyte = {}
    for name, (cpu, wall) in spent.items():
        per_gigabyte |= {f"{name}_cpu_s": round(cpu / megabytes * 953.67, 2), f"{name}_wall_s": round(wall / megabytes * 953.67, 2)}
        print(f"{name:20} {cpu / megabytes * 953.67:6.2f} CPU s/GB {wall / megabytes * 953.67:6.2f} s/GB", file=sys.stderr)
    return per_gigabyte


def _rounds(ways: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            found.setdefault(name, []).append(_spent(way))
    return {name: min(times) for name, times in found.items()}


def _spent(way: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of this process, all threads, and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    way()
    return time.process_time() - cpu, time.perf_counter() - wall


def manifest(ledgers: int, rows: int) -> dict[str, float]:
    """Seconds and memory of merging many ledgers of small clips, and of reading what they hold afterwards."""
    with tempfile.TemporaryDirectory() as root:
        create_or_check(root, new_info("features", {}))
        write_shard(root, "train-000000", list(_entries(rows)))
        ledger = Path(root, "train-000000.parquet").read_bytes()
        for number in range(1, ledgers):  # the same ledger under many names: the merge reads every one, and looks at no tar
            Path(root, f"train-{number:06d}.parquet").write_bytes(ledger)
            Path(root, f"train-{number:06d}.tar").touch()
        with _peak_memory() as grown:
            wall = _spent(lambda: write_manifest(root))[1]
        again = _spent(lambda: totals(root))[1]
        size = Path(root, "manifest.parquet").stat().st_size
    print(
        f"manifest of {ledgers} ledgers: {wall:.1f} s, {grown[0]:.0f} MB more memory; totals again: {again:.2f} s; {size / 1e6:.1f} MB",
        file=sys.stderr,
    )
    return {"manifest_s": round(wall, 2), "manifest_memory_mb": round(grown[0], 1), "totals_s": round(again, 3), "manifest_mb": round(size / 1e6, 2)}


def _entries(rows: int) -> Iterator[Entry]:
    for number in range(rows):
        members = {"avclip.npy": np.zeros((1, 2, 8, 3), np.float16), "encodec24.npy": np.zeros((8, 48), np.uint16), "json": b"{}"}
        yield Entry(f"{number:011d}_1000_11000", "train", "playing bells", f"/data/clips/{number:011d}_1000_11000.mp4", 10.0, members)


@contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """Megabytes by which the process's greatest resident size grew."""
    grown = [0.0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield grown
    grown[0] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    main(sys.argv[1:])
