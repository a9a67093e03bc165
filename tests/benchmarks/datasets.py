"""Large datasets without media: seconds and memory of everything that deals with lists, ledgers and views, at 200 thousand rows and at 2 million.

    python -m tests.benchmarks.datasets [clips=190053,2000000] [datasets=../shared/datasets] [folder=/tmp] [width=16] [steps=open,subset,...]

The dataset is made by `tests.made_ledgers`: real ledgers over tars of holes, feature shards of 64 clips of 10 s as `soundshard prepare` makes
them, but for the features' width: of 768, most of an epoch's time would go into the system's making zeros. 190,053 clips are VGGSound's own, and the
subset is VisualSound, where the published lists are; other sizes, and without the lists, have keys made up in their form, and a subset of 48 %.

Every step runs in a process of its own, as a user's command would: `seconds` and `cpu` of what it does, `start` of starting Python and importing what
it needs, `peak_mb` the most resident memory it had (mapped parts of shards included), `own_mb` the most without what is mapped from files.

    plan, plan_again   list a folder of as many empty files with a csv, make the plan, find it unchanged; `planning_mb`: of the planning process
    open_ledgers       index the dataset from its ledgers
    manifest, open     merge the ledgers; index the dataset from that
    subset, open_view  the command that writes a view of what the split files name; index it
    train              open its training split as a stream, give the first batch
    epoch              give all batches of an epoch, read from the holes, and compare their keys with the lists'
    materialise        if named: write the view's shards, and compare the keys that stock webdataset reads in them with the lists'

The last line is JSON.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

from tests.made_ledgers import clips_of, made_up_keys, published_keys, write_dataset

DATASETS = Path(__file__).resolve().parents[3] / "shared/datasets"
PUBLISHED = 190_053
"""Clips in VGGSound's published lists."""
SAMPLED_SECONDS = 0.01


def memory_mb(name: str) -> float:
    """A figure of /proc/self/status about this process: VmHWM is the most resident memory since it began, RssAnon what is its own now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1e3
    raise ValueError(f"no {name} in /proc/self/status")


@contextmanager
def measured(figures: dict[str, Any]) -> Iterator[None]:
    """Seconds, processor seconds and memory of what is done inside, into `figures`."""
    most, over = [memory_mb("RssAnon")], threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLED_SECONDS):
            most[0] = max(most[0], memory_mb("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    began, before = time.perf_counter(), os.times()
    try:
        yield
    finally:
        seconds, after = time.perf_counter() - began, os.times()
        over.set()
        thread.join()
    figures |= {"seconds": round(seconds, 2), "cpu": round(sum(after[:4]) - sum(before[:4]), 2)}
    figures |= {"peak_mb": round(memory_mb("VmHWM")), "own_mb": round(max(most[0], memory_mb("RssAnon")))}


# --- the steps: each imports what it needs, then does it ------------------------------------------------------------------------------


def plan_step(figures: dict[str, Any], folder: Path) -> None:
    from pipeline.discover import DiscoverConfig, discover
    from pipeline.plan import settle

    with measured(figures):
        plan, _ = settle(folder / "plan", discover, DiscoverConfig(f"{folder}/clips"), clips_per_shard=64)
    figures |= {"rows": plan.clips, "planning_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3)}


def manifest_step(figures: dict[str, Any], folder: Path) -> None:
    from shards.write import write_manifest

    with measured(figures):
        totals = write_manifest(folder / "data")
    figures["rows"] = totals.ok + totals.failed


def open_step(figures: dict[str, Any], folder: Path) -> None:
    from shards.read import Index

    with measured(figures):
        figures["rows"] = Index.open(folder / "data").table.num_rows


def subset_step(figures: dict[str, Any], folder: Path) -> None:
    from pipeline.subset import SubsetConfig, run

    with measured(figures):
        chosen = run(SubsetConfig(data=f"{folder}/data", out=f"{folder}/view", lists=f"{folder}/lists"))
    figures["rows"] = chosen.table.num_rows


def open_view_step(figures: dict[str, Any], folder: Path) -> None:
    from shards.read import Index

    with measured(figures):
        figures["rows"] = Index.open(folder / "view").table.num_rows


def train_step(figures: dict[str, Any], folder: Path) -> None:
    from shards.read import Index
    from shards.stream import FeatureStream, StreamConfig

    with measured(figures):
        stream = FeatureStream(Index.open(folder / "view", "train"), StreamConfig(batch_size=64))
        batch = next(iter(stream))
        figures["rows"] = stream.samples
    assert len(batch["keys"]) == 64


def epoch_step(figures: dict[str, Any], folder: Path) -> None:
    from shards.read import Index
    from shards.stream import FeatureStream, StreamConfig

    with measured(figures):
        stream, keys = FeatureStream(Index.open(folder / "view", "train"), StreamConfig(batch_size=64)), []
        for batch in stream:
            keys += batch["keys"]
            if len(keys) >= stream.samples:
                break
    seen, wanted = keys[: stream.samples], (folder / "wanted.txt").read_text().split()
    assert len(set(seen)) == len(seen) and set(seen) == set(wanted), "an epoch has not exactly the list's good clips, each once"
    figures["rows"] = len(seen)


def materialise_step(figures: dict[str, Any], folder: Path) -> None:
    import webdataset

    from shards.materialise import materialise

    with measured(figures):
        totals = materialise(folder / "view", folder / "shards")
    open_stock: Any = webdataset.WebDataset  # pyright: ignore[reportAttributeAccessIssue] - it has one
    stock = open_stock(sorted(map(str, (folder / "shards").glob("train-*.tar"))), shardshuffle=False)
    seen, wanted = [sample["__key__"] for sample in stock], (folder / "wanted.txt").read_text().split()
    assert len(set(seen)) == len(seen) and set(seen) == set(wanted), "stock webdataset does not read exactly the list's good clips, each once"
    figures |= {"rows": totals.ok + totals.failed, "megabytes": round(totals.bytes / 1e6)}


STEPS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "plan": plan_step,
    "plan_again": plan_step,
    "open_ledgers": open_step,
    "manifest": manifest_step,
    "open": open_step,
    "subset": subset_step,
    "open_view": open_view_step,
    "train": train_step,
    "epoch": epoch_step,
    "materialise": materialise_step,
}
ONLY_NAMED = "materialise"
"""What is measured where `steps` names it: it writes 20 GB for 2 million clips."""


# --- what they work on ----------------------------------------------------------------------------------------------------------------


def make_inputs(folder: Path, keys: dict[str, list[str]]) -> None:
    """Empty files called as the clips are, and VGGSound's csv that lists them."""
    (folder / "clips").mkdir(parents=True)
    descriptor = os.open(folder / "clips", os.O_RDONLY)
    with open(folder / "clips/vggsound.csv", "w") as csv:
        for split, members in keys.items():
            for key in members:
                os.close(os.open(f"{key}.mp4", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
                csv.write(f'{key[:11]},{int(key[12:].partition("_")[0]) // 1000},"sound, number {crc32(key.encode()) % 309}",{split}\n')
    os.close(descriptor)


def make_lists(folder: Path, keys: dict[str, list[str]], published: Path | None) -> dict[str, list[str]]:
    """The subset's split files in `folder`: VisualSound's own, or 48 of every 100 clips of each split. Returns what they list."""
    folder.mkdir()
    for split, members in keys.items():
        name = f"visualsound_{split}.txt"
        text = (published / "visualsound" / name).read_text() if published else "\n".join(key for key in members if crc32(key.encode()) % 100 < 48)
        (folder / name).write_text(text)
    return {split: (folder / f"visualsound_{split}.txt").read_text().split() for split in keys}


def run_step(step: str, folder: Path) -> dict[str, Any]:
    """A step's figures, from a process of its own."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "tests.benchmarks.datasets", f"step={step}", f"folder={folder}"]
    figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    figures["start"] = round(time.perf_counter() - began - figures["seconds"], 2)
    print(f"{step:13}", *(f"{name} {value:>9,}" for name, value in figures.items()), flush=True)
    return figures


def measure(clips: int, datasets: Path | None, folder: Path, width: int, chosen: Collection[str]) -> dict[str, Any]:
    """The figures of one size."""
    keys = published_keys(datasets) if datasets else made_up_keys(clips)
    listed, steps = make_lists(folder / "lists", keys, datasets), {}
    if "plan" in chosen:
        make_inputs(folder, keys)
        steps |= {step: run_step(step, folder) for step in ("plan", "plan_again")}
        shutil.rmtree(folder / "clips")
    made = clips_of(keys)
    del keys
    (folder / "data").mkdir()
    began = time.perf_counter()
    shards = write_dataset(folder / "data", made, width=width, whole=ONLY_NAMED in chosen)
    print(f"{shards:,} shards of {len(made.keys):,} clips made in {time.perf_counter() - began:.0f} s", flush=True)
    good = set(made.good_keys("train")) & set(listed["train"])
    (folder / "wanted.txt").write_text("\n".join(sorted(good)))
    del good, listed
    steps |= {step: run_step(step, folder) for step in STEPS if step in chosen and step not in steps}
    return {"clips": len(made.keys), "published": datasets is not None, "shards": shards, "steps": steps}


def main(argv: list[str]) -> None:
    """Measure every size, each step in a process of its own, and print the figures."""
    options = dict(argument.split("=", 1) for argument in argv)
    if "step" in options:
        figures: dict[str, Any] = {}
        STEPS[options["step"]](figures, Path(options["folder"]))
        print(json.dumps(figures))
        return
    datasets, runs = Path(options.get("datasets", DATASETS)), []
    for clips in map(int, options.get("clips", f"{PUBLISHED},2000000").split(",")):
        published = datasets if clips == PUBLISHED and (datasets / "vggsound").is_dir() else None
        with tempfile.TemporaryDirectory(dir=options.get("folder")) as folder:
            runs.append(
                measure(
                    clips,
                    published,
                    Path(folder),
                    int(options.get("width", 16)),
                    options.get("steps", ",".join(STEPS.keys() - {ONLY_NAMED})).split(","),
                )
            )
    print(json.dumps({"runs": runs}))


if __name__ == "__main__":
    main(sys.argv[1:])
