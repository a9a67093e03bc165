"""What reading costs a training loop: the part of a step spent waiting for data, and the loop's speed where a step computes nothing.

    python -m tests.benchmarks.step_wait [samples=1000] [steps=40] [batch_size=8] [layers=4] [width=192] [seconds=2.0] [folder=]

The model is trained by `soundshard train`'s own code on the CPU, and the fraction is what it logs. Then Lightning's loop reads such a loader
with an empty step, and a plain loop the bare stream, in batches of 64. Prints one JSON line last.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
from lightning.pytorch import LightningModule

from configs.load import load
from shards.read import Index
from shards.stream import FeatureStream, StreamConfig
from tests.benchmarks.streaming_sets import SEGMENTS, Shape, written
from train.callbacks import read_metrics
from train.data import TrainLoader, Windows
from train.trainer import TrainerConfig, build_trainer, quieten_lightning
from train.vaura import TrainConfig, run

DEFAULTS = {"samples": "1000", "steps": "40", "batch_size": "8", "layers": "4", "width": "192", "seconds": "2.0", "folder": ""}
READ_BATCH = 64
LOG_EVERY = 10


class Empty(LightningModule):
    """A step that computes nothing, and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def training_step(self, batch: object) -> None:  # noqa: ARG002
        optimiser = self.optimizers()
        assert not isinstance(optimiser, list)
        optimiser.step()  # Lightning counts steps by it


def trained(data: Path, out: Path, options: dict[str, str], prefetch: int) -> dict[str, float]:
    """A small model, as a user would train it."""
    arguments = {
        "data": data,
        "out": out,
        "model.layers": options["layers"],
        "model.width": options["width"],
        "model.heads": 4,
        "model.visual_width": int(options["width"]) // 3,
        "stream.batch_size": options["batch_size"],
        "stream.prefetch": prefetch,
        "schedule.warmup_steps": 1,
        "trainer.max_steps": options["steps"],
        "trainer.log_every": LOG_EVERY,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.progress": "false",
    }
    run(load(TrainConfig, [f"{name}={value}" for name, value in arguments.items()]))
    rows = [row for row in read_metrics(out) if row["split"] == "train" and row["step"] > LOG_EVERY]  # the first includes starting up
    speed = statistics.median(row["samples_per_second"] for row in rows)
    fraction = statistics.median(row["data_wait_fraction"] for row in rows)
    return {"samples_per_s": speed, "step_s": float(options["batch_size"]) / speed, "wait_fraction": fraction}


def stream(data: Path, prefetch: int) -> FeatureStream:
    return FeatureStream(Index.open(data), StreamConfig(batch_size=READ_BATCH, segments=SEGMENTS, prefetch=prefetch))


def bare(data: Path, prefetch: int, seconds: float) -> float:
    """Samples per second of the stream by itself."""
    with closing(iter(stream(data, prefetch))) as batches:
        return rate(batches, seconds)


def rate(batches: Iterator[object], seconds: float) -> float:
    for _ in islice(batches, 10):
        pass
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        next(batches)
        count += 1
    return READ_BATCH * count / (time.perf_counter() - began)


def empty_steps(data: Path, folder: Path, prefetch: int, seconds: float, bare_rate: float) -> dict[str, float]:
    """Lightning's loop around nothing: samples per second, and the part of the time that it waited for the loader."""
    steps = max(50, int(0.2 * seconds * bare_rate / READ_BATCH))
    config = TrainerConfig(max_steps=steps, accelerator="cpu", devices=1, log_every=10_000, progress=False)
    trainer = build_trainer(config, folder, [], start_step=0, validates=False)
    loader = TrainLoader(stream(data, prefetch), Windows.of, torch.device("cpu"))
    began = time.perf_counter()
    trainer.fit(Empty(), train_dataloaders=loader)
    wall = time.perf_counter() - began
    return {"samples_per_s": READ_BATCH * steps / wall, "wait_fraction": loader.take_wait_seconds() / wall, "step_ms": 1000 * wall / steps}


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    given = dict(argument.split("=", 1) for argument in arguments)
    if unknown := given.keys() - DEFAULTS.keys():
        raise ValueError(f"unknown option {', '.join(sorted(unknown))}; expected some of {', '.join(DEFAULTS)}")
    options = DEFAULTS | given
    seconds, found = float(options["seconds"]), {}
    quieten_lightning()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = written(Path(options["folder"] or temporary), "tar", Shape(8), int(options["samples"]))
        for name, prefetch in (("thread", 2), ("no_thread", 0)):
            model = trained(data, folder / name, options, prefetch)
            speed = bare(data, prefetch, seconds)
            nothing = empty_steps(data, folder / f"{name}-empty", prefetch, seconds, speed)
            found[name] = {"model": model, "bare_samples_per_s": speed, "empty_step": nothing}
            print(
                f"prefetch={prefetch}: model of {options['layers']} x {options['width']}: {model['step_s']:.3f} s a step, of which "
                f"{model['wait_fraction']:.5f} waiting for data; with an empty step {nothing['samples_per_s']:,.0f} samples/s "
                f"({nothing['wait_fraction']:.2f} waiting); the bare stream {speed:,.0f} samples/s"
            )
    print(json.dumps({"benchmark": "step_wait", **options, **found}))


if __name__ == "__main__":
    main(sys.argv[1:])
