"""What scoring costs: processor seconds for a clip, and the table of a large dataset.

    python -m tests.benchmarks.scores [clip=FILE] [repeats=4] [rows=200000]

`decode` is by what scorers need, and each scorer's own time comes on top; one made clip of 10 s at 256 x 456 pixels unless a file is given. Then the
table of so many clips, whose scores are made up: written in parts, read again, merged, and the most memory that took. The last line is JSON.
"""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from pipeline.media_scores import SCORERS, decoded
from pipeline.score import UNIT_CLIPS, Unit, find_units, table_of
from pipeline.score_store import Made, ScoreStore
from pipeline.scorers import Item, ScoreOptions
from pipeline.scores import read_scores
from shards.dataset import new_info
from shards.read import Index
from tests.pipeline.clips import make_clip

T = TypeVar("T")


def main() -> None:
    """The command above."""
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        clip = given.get("clip") or str(Path(folder) / "clip.mp4")
        if "clip" not in given:
            make_clip(Path(clip), seconds=Fraction(10), width=456, height=256)
        result = of_a_clip(Path(clip).read_bytes(), int(given.get("repeats", 4)))
        print(json.dumps(result), flush=True)
        print(json.dumps(result | of_a_table(folder, int(given.get("rows", 200_000)))))


def of_a_clip(data: bytes, repeats: int) -> dict[str, object]:
    """Processor seconds of this process, which computes with one thread."""
    import torch

    torch.set_num_threads(1)
    needs = {"sound": {"sound"}, "pictures": {"pictures"}, "all": {"pictures", "sound", "speech", "stills"}}
    decode = {name: processor_seconds(lambda wanted=wanted: decoded(data, wanted), repeats) for name, wanted in needs.items()}
    item = Item("clip", {}, lambda _: np.zeros(0), decoded(data, needs["all"]))
    scores = {}
    for scorer in SCORERS:
        scoring = scorer.make(ScoreOptions())
        items = [item] * (8 if scorer.name == "speech" else 1)  # a network takes a batch
        scores[scorer.name] = round(processor_seconds(lambda scoring=scoring, items=items: scoring(items), repeats) / len(items), 4)
    return {"decode_cpu_seconds": decode, "score_cpu_seconds": scores}


def processor_seconds(work: Callable[[], object], repeats: int) -> float:
    """Of one call, after a first one."""
    work()
    started = time.process_time()
    for _ in range(repeats):
        work()
    return round((time.process_time() - started) / repeats, 4)


def of_a_table(folder: str, rows: int) -> dict[str, object]:
    """Seconds for so many clips in shards of 64, five scorers."""
    scorers = [scorer for scorer in SCORERS if scorer.usual]
    info = new_info("media", {"made": "up"})
    shard = [f"train-{row // 64:06d}" for row in range(rows)]
    columns = {"key": [f"{row:011d}_{row}_{row + 10}" for row in range(rows)], "split": ["train"] * rows, "status": ["ok"] * rows, "shard": shard}
    index = Index(folder, info, pa.table(columns | {"shard_sha256": [name.rjust(16, "0").ljust(64, "0") for name in shard]}))
    made = {scorer.name: Made("1", scorer.columns, info.fingerprint) for scorer in scorers}
    path, asked, seconds = str(Path(folder) / "scores.parquet"), np.ones(rows, bool), {}
    keys = index.keys.to_pylist()

    def units() -> list[Unit]:
        return list(find_units(ScoreStore(path, index, made, overwrite=False), scorers, asked, retry_failed=False))

    seconds["plan"], todo = timed(units)
    one = {scorer.name: {column: 1 if pa.types.is_integer(kind) else 0.5 for column, kind in scorer.columns.items()} for scorer in scorers}

    def add() -> None:
        with ScoreStore(path, index, made, overwrite=False).writing(2000) as store:
            for unit in todo:
                mine = [keys[row] for row in unit.rows]
                store.add(table_of(mine, scorers, {name: [row] * len(mine) for name, row in one.items()}), unit.rows, unit.names)

    seconds["add"], _ = timed(add)
    seconds["resume"], left = timed(units)
    seconds["merge"], table = timed(lambda: ScoreStore(path, index, made, overwrite=False).finish())
    seconds["read"], read = timed(lambda: read_scores(path))
    assert not left and table.num_rows == read.num_rows == rows
    size_mb = round(Path(path).stat().st_size / 1e6, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return {
        "rows": rows,
        "unit_clips": UNIT_CLIPS["media"],
        "seconds": seconds,
        "file_mb": size_mb,
        "peak_mb": peak,
    }


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and the result."""
    started = time.perf_counter()
    found = work()
    return round(time.perf_counter() - started, 2), found


if __name__ == "__main__":
    main()
