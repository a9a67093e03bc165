"""How long it takes until the first batch of a run that goes on in the middle of a large dataset's epoch.

    python -m tests.benchmarks.streaming_resume FOLDER

does it in a process of its own, for the dataset in FOLDER. That has its full size in its ledgers and its manifest, which is what resuming reads; its
shards are hard links to one tar, so that it need not fill a disk: only the bytes of the samples repeat.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from shards import ledger
from shards.dataset import create_or_check, new_info, read_info
from shards.read import Index
from shards.stream import FeatureStream, StreamConfig
from shards.write import write_manifest, write_shard
from tests.benchmarks.streaming_sets import SEGMENTS, SHARD_SAMPLES, Shape, entry, samples, spec

CONFIG = StreamConfig(batch_size=64, segments=SEGMENTS)


@dataclass(frozen=True)
class Resumed:
    """Seconds, everything imported."""

    open_s: float
    """The dataset's index."""
    stream_s: float
    load_s: float
    """`load_state_dict`."""
    batch_s: float
    """The first batch, its thread's start included."""
    total_s: float


def resumed(root: Path, rows: int, shape: Shape) -> Resumed:
    """In a process of its own, on a dataset that is made unless it is there."""
    folder = root / f"large-{shape.hop_frames}-{rows}"
    if not folder.is_dir():
        temporary = root / f".{folder.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        make(temporary, rows, shape)
        os.replace(temporary, folder)
    command = [sys.executable, "-m", "tests.benchmarks.streaming_resume", str(folder)]
    return Resumed(**json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))


def make(folder: Path, rows: int, shape: Shape) -> None:
    """A dataset of as many samples, in shards of `SHARD_SAMPLES`."""
    create_or_check(folder, new_info("features", spec(shape)))
    write_shard(folder, "train-000000", [entry(sample) for sample in samples(shape, min(rows, SHARD_SAMPLES))])
    table, fingerprint = ledger.read(ledger.path_of(folder, "train-000000")), read_info(folder).fingerprint
    for number in range(1, -(-rows // SHARD_SAMPLES)):
        name = f"train-{number:06d}"
        os.link(folder / "train-000000.tar", folder / f"{name}.tar")
        count = min(SHARD_SAMPLES, rows - number * SHARD_SAMPLES)
        columns = {
            "key": pa.array([f"{number * SHARD_SAMPLES + row:07d}" for row in range(count)]),
            "shard": pa.array([name] * count),
        }
        ledger.write(ledger.path_of(folder, name), with_columns(table.slice(0, count), columns, fingerprint))
    write_manifest(folder)


def with_columns(table: pa.Table, columns: dict[str, pa.Array], fingerprint: str) -> pa.Table:
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)
    return table.replace_schema_metadata({**(table.schema.metadata or {}), ledger.FINGERPRINT: fingerprint.encode()})


def main(folder: str) -> None:
    """Measure and print."""
    index = Index.open(folder)
    state = FeatureStream(index, CONFIG).state_dict()
    # A position in the middle; making the state has read the manifest into the page cache.
    state["consumed"] = 3 * len(index) // 2 // CONFIG.batch_size * CONFIG.batch_size
    began = time.perf_counter()
    index = Index.open(folder)
    opened = time.perf_counter()
    stream = FeatureStream(index, CONFIG)
    made = time.perf_counter()
    stream.load_state_dict(state)
    loaded = time.perf_counter()
    batches = iter(stream)
    next(batches)
    done = time.perf_counter()
    batches.close()
    print(json.dumps(asdict(Resumed(opened - began, made - opened, loaded - made, done - loaded, done - began))))


if __name__ == "__main__":
    main(*sys.argv[1:])
