"""Damage of every kind done to a small dataset, one at a time: is each found, and what can be put right?

    python -m tests.benchmarks.corruptions [count=10000] [seed=0] [repair=1000] [folder=/tmp]

Flipped bits, truncation, zeroed blocks, garbage, bytes that were added, removed or inserted, exchanged members of a tar, files that were exchanged,
removed or copied over others: in tars, ledgers, manifest, plan and dataset.json. `found` is what `soundshard verify` calls a problem; `noted` what it
only tells (that there is no plan: a dataset without one can be whole); `missed` the rest. Any exception ends the run. Of the first `repair` it is
tried to put them right: `equal` are then what they were, to the byte; `clean` are whole but not the same; `left` have problems still. The last line
is JSON.
"""

import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from shards.check_dataset import check_dataset
from shards.repair import repair
from tests.shards.verify_data import damaged, files, make, write_files


def measure(root: str, *, count: int, seed: int, repairs: int) -> dict[str, object]:
    """The counts."""
    make(root)
    whole, before = files(root), check_dataset(root, workers=2)
    assert not before.told.problems
    rng, found, after_repair, by_kind = random.Random(seed), Counter(), Counter(), Counter()
    for number in range(count):
        what, broken = damaged(whole, rng)
        write_files(root, broken)
        verified = check_dataset(root, workers=2)
        kind = "found" if verified.told.problems else "noted" if verified.told.notes != before.told.notes else "missed"
        found[kind] += 1
        by_kind[what.split()[0].rstrip(",")] += 1
        if kind == "missed":
            print(f"missed: {what}", flush=True)
        if kind == "found" and number < repairs:
            repair(verified)
            again = check_dataset(root, workers=2)
            after_repair["equal" if files(root) == whole else "left" if again.told.problems else "clean"] += 1
    counts = {name: found[name] for name in ("found", "noted", "missed")}
    return {"corruptions": count, **counts, "kinds": dict(by_kind), "repaired": dict(after_repair)}


def main() -> None:
    """The command above."""
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    count, seed, repairs, folder = (given.get(name, default) for name, default in [("count", 10000), ("seed", 0), ("repair", 1000), ("folder", None)])
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as root:
        result = measure(str(Path(root) / "set"), count=int(count or 0), seed=int(seed or 0), repairs=int(repairs or 0))
    print(json.dumps({**result, "seconds": round(time.perf_counter() - started, 1)}))


if __name__ == "__main__":
    main()
