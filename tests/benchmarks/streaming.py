"""Reading for training: this project's reader beside others, on the same samples and the same machine at the same time.

    python -m tests.benchmarks.streaming [samples=4000] [rounds=2] [seconds=0.5] [hop_frames=8] [batch_size=64] [readers=all] [resume=200000]
                                         [storage=0] [folder=]

Every sample is a float16 array of 184 KB, 12 KB of codes and a json; every reader cuts a random window of 2.56 s from each and collates 64. Each
runs in a process of its own with the page cache warm and one thread for torch, in rounds, so that a busy machine slows all alike; figures are medians
over rounds. `readers=soundshard,webdataset` takes some of them; those of libraries that are not installed (extra `peers`) are left out. `resume` is
the number of samples of the dataset in whose middle an epoch is resumed (0: left out); `storage` the number of samples read from an object store (0:
left out; needs the extra `dev`); `folder` keeps the sets for another run. Prints tables and one JSON line last.
"""

import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tests.benchmarks.streaming_readers import READERS, Measured, Task, in_a_process
from tests.benchmarks.streaming_resume import Resumed, resumed
from tests.benchmarks.streaming_sets import Shape, written
from tests.benchmarks.streaming_storage import BYTES_PER_SECOND, LATENCY_SECONDS, REMOTE, from_storage

DEFAULTS = {
    "samples": "4000",
    "rounds": "2",
    "seconds": "0.5",
    "hop_frames": "8",
    "batch_size": "64",
    "readers": "all",
    "resume": "200000",
    "storage": "0",
    "folder": "",
}
COLUMNS = {"samples_per_s": "samples/s", "cpu_s": "CPU s per 1,000", "first_s": "first batch s", "memory_mb": "memory MB", "missing": "missing"}

LINKS = {"direct": "directly", "link": f"{1000 * LATENCY_SECONDS:.0f} ms a request and {BYTES_PER_SECOND / 1e6:.0f} MB/s a connection"}


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    options = parse(arguments)
    names = list(READERS) if options["readers"] == "all" else options["readers"].split(",")
    absent = {name: module for name in names for module in READERS[name].modules if importlib.util.find_spec(module) is None}
    names = [name for name in names if name not in absent]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(options["folder"] or temporary)
        local = measure(root, [name for name in names if name != "bare ranges"], options)
        print(table(local))
        for name, module in absent.items():
            print(f"{name} is left out: {module} is not installed (extra `peers`)")
        found: dict[str, Any] = {"benchmark": "streaming", **options, "local": local, "left_out": list(absent)}
        if int(options["resume"]):
            found["resume"] = asdict(resume(root, options))
        if int(options["storage"]):
            found["storage"] = stored(root, [name for name in REMOTE if name in names], options)
    print(json.dumps(found))


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """`key=value` over the defaults."""
    given = dict(argument.split("=", 1) for argument in arguments)
    if unknown := given.keys() - DEFAULTS.keys():
        raise ValueError(f"unknown option {', '.join(sorted(unknown))}; expected some of {', '.join(DEFAULTS)}")
    if "readers" in given and (unknown := set(given["readers"].split(",")) - {"all", *READERS}):
        raise ValueError(f"unknown reader {', '.join(sorted(unknown))}; expected some of {', '.join(READERS)}")
    return DEFAULTS | given


def measure(root: Path, names: Sequence[str], options: dict[str, str]) -> dict[str, dict[str, float]]:
    """Every reader in every round; medians."""
    samples, shape = int(options["samples"]), Shape(int(options["hop_frames"]))
    places = {name: written(root, READERS[name].form, shape, samples) for name in names}
    rounds: dict[str, list[Measured]] = {name: [] for name in names}
    for number in range(int(options["rounds"])):
        for name in names:
            warm(places[name])
            task = Task(name, str(places[name]), samples, shape.hop_frames, int(options["batch_size"]), float(options["seconds"]), number)
            rounds[name].append(in_a_process(task))
            print(f"round {number}: {name}: {rounds[name][-1]}", file=sys.stderr, flush=True)
    return summary(rounds)


def warm(folder: Path) -> None:
    """Into the page cache."""
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 22):
                pass


def summary(rounds: dict[str, list[Measured]]) -> dict[str, dict[str, float]]:
    """Medians, and the median over rounds of each reader's CPU beside this project's in the same round."""
    ours = rounds.get("soundshard")
    found: dict[str, dict[str, float]] = {}
    for name, measured in rounds.items():
        found[name] = {field.name: statistics.median(getattr(one, field.name) for one in measured) for field in fields(Measured)}
        found[name]["missing"] = max(one.missing for one in measured)
        if ours:
            found[name]["cpu_of_ours"] = statistics.median(other.cpu_s / own.cpu_s for other, own in zip(measured, ours, strict=True))
    return {name: {figure: float(f"{value:.4g}") for figure, value in figures.items()} for name, figures in found.items()}


def table(found: dict[str, dict[str, float]]) -> str:
    """As markdown."""
    extra = {"cpu_of_ours": "CPU, soundshard = 1"} if any("cpu_of_ours" in figures for figures in found.values()) else {}
    columns = COLUMNS | extra
    lines = [f"| reader | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for name, figures in found.items():
        cells = [f"{figures[column]:,.0f}" if figures[column] >= 100 else f"{figures[column]:.3g}" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def stored(root: Path, names: Sequence[str], options: dict[str, str]) -> dict[str, dict[str, dict[str, float]]]:
    """One epoch of each reader from object storage, directly and behind a link; medians."""
    template = Task("", "", int(options["storage"]), int(options["hop_frames"]), int(options["batch_size"]), 0.0)
    found = {way: summary(rounds) for way, rounds in from_storage(root, names, template, int(options["rounds"])).items()}
    for way, figures in found.items():
        print(f"\nFrom object storage, {LINKS[way]}: one epoch of {options['storage']} samples, opening included\n\n{table(figures)}")
    return found


def resume(root: Path, options: dict[str, str]) -> Resumed:
    """Medians over rounds."""
    rounds = [resumed(root, int(options["resume"]), Shape(int(options["hop_frames"]))) for _ in range(int(options["rounds"]))]
    found = Resumed(*(round(statistics.median(getattr(one, field.name) for one in rounds), 3) for field in fields(Resumed)))
    print(
        f"\nresumed in the middle of an epoch of {options['resume']} samples: {found.total_s:.3f} s until the first batch "
        f"(index {found.open_s:.3f}, stream {found.stream_s:.3f}, state {found.load_s:.3f}, batch {found.batch_s:.3f})"
    )
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
