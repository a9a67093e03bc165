"""What happens beside the steps: losses and speeds are logged, checkpoints and weights saved, signals obeyed.

Knows Lightning's hooks and the run folder. Knows no model's insides: a step hands out `figures`, a tensor of means over its samples whose names
(`Figures`) the job brings, and that is what is logged.
"""
# ruff: noqa: ARG002 - Lightning decides the hooks' arguments

import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor
from tqdm import tqdm

from configs.load import JobError
from model.run_folder import BEST, LAST
from train.averages import EMA, Averages, whole_state
from train.data import TrainLoader
from train.module import TrainingModule

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Cadence:
    """At which optimiser steps (counted from 1) something is due."""

    log_every: int
    checkpoint_every: int
    keep_every: int
    validate_every: int
    max_steps: int

    def checkpoint(self, step: int) -> bool:
        """Every `checkpoint_every`, at the end, and before each validation, which may be long: a stop in it then loses nothing."""
        return step == self.max_steps or any(every and step % every == 0 for every in (self.checkpoint_every, self.keep_every, self.validate_every))

    def keep(self, step: int) -> bool:
        return self.keep_every > 0 and step % self.keep_every == 0

    def log(self, step: int) -> bool:
        """The first step, every `log_every`, and wherever a checkpoint is: so an interval's sums never need saving, and no bad loss is saved."""
        return step == 1 or step % self.log_every == 0 or self.checkpoint(step)


class Stopwatch:
    """Seconds of training since it was last read: what validation and checkpoints took is forgotten."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def forget(self, seconds: float) -> None:
        self._start += seconds

    def read(self) -> float:
        """The seconds so far; starts again from 0."""
        now = time.perf_counter()
        self._start, seconds = now, now - self._start
        return seconds


@dataclass(frozen=True)
class Figures:
    """What a step measures: the names of a tensor's numbers, in order, each a mean over samples. One is the `loss`, or all are parts of it."""

    names: tuple[str, ...] = ("loss",)
    parts: str = ""
    """If given: the numbers are parts of the loss, which is their mean, and a row has them together in a list of this name."""
    best: str = "loss"
    """Which decides what weights are the best, at validation; the module's `validated` may add names."""
    larger_is_better: bool = False

    def row(self, means: Sequence[float]) -> dict[str, Any]:
        """For `metrics.jsonl`; it has `loss`."""
        if self.parts:
            return {"loss": sum(means) / len(means), self.parts: list(means)}
        return dict(zip(self.names, means, strict=True))

    def curves(self, means: Sequence[float]) -> dict[str, float]:
        """For TensorBoard; it has `loss`."""
        return {"loss": self.row(means)["loss"], **dict(zip(self.names, means, strict=True))}

    @property
    def worst(self) -> float:
        return -math.inf if self.larger_is_better else math.inf

    def improves(self, value: float, best: float) -> bool:
        """Whether a value of `best` is better than the best one so far."""
        return value > best if self.larger_is_better else value < best


class Means:
    """Means of a step's figures over steps (or samples) and ranks, summed where they are computed, so that no step waits for them."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._weight = 0.0

    def add(self, figures: Tensor, weight: float = 1.0) -> None:
        weighted = figures.detach().float() * weight
        self._sum = weighted if self._sum is None else self._sum + weighted
        self._weight += weight

    def take(self, trainer: Trainer, count: int, *more: float) -> tuple[list[float], float, list[float]]:
        """The means of `count` figures over all ranks, their weight, and the sums of further numbers; starts again from nothing.

        Waits for the device. Every rank must call it, those too that added nothing: an uneven validation gives some rank a batch less.
        """
        device = trainer.strategy.root_device
        summed = torch.zeros(count, device=device) if self._sum is None else self._sum
        values = torch.cat([summed, torch.tensor([self._weight, *more], device=device)])
        self._sum, self._weight = None, 0.0
        if trainer.world_size > 1:
            torch.distributed.all_reduce(values)
        totals = values.tolist()
        weight = totals[count]
        return [total / max(weight, 1.0) for total in totals[:count]], weight, totals[count + 1 :]


class Metrics(Callback):
    """Losses, learning rate and speeds: to TensorBoard, to `metrics.jsonl` and to a progress bar, at the cadence; nothing on other steps."""

    def __init__(self, folder: Path, cadence: Cadence, figures: Figures, *, batch_size: int, sample_flops: int, start_step: int, bar: bool) -> None:
        self.stopwatch = Stopwatch()
        self._folder, self._cadence, self._figures, self._batch_size, self._start_step, self._show = (
            folder, cadence, figures, batch_size, start_step, bar,
        )  # fmt: skip
        self._sample_flops = sample_flops
        self._train, self._validation = Means(), Means()
        self._steps = 0
        self._validation_began = 0.0
        self._bar: tqdm | None = None
        self._terminal = sys.stderr.isatty()
        self.best = figures.worst
        """The best validation so far (`Figures.best`: the smallest loss, the highest accuracy), in this run's earlier processes too."""
        self.improved = False
        """Whether the latest validation is that one."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rows after the checkpoint that training resumes from are dropped: their steps come again."""
        path = self._folder / METRICS
        rows = [r for r in read_metrics(self._folder) if r["step"] <= self._start_step]
        for row in rows:
            if row["split"] == "validation" and self._figures.improves(row[self._figures.best], self.best):
                self.best = row[self._figures.best]
        if trainer.is_global_zero:
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in rows))
            os.replace(temporary, path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._show and trainer.is_global_zero:
            # A log file gets a line now and then instead of a bar that redraws itself.
            self._bar = tqdm(
                total=self._cadence.max_steps, initial=trainer.global_step, desc="train", unit="step", mininterval=0.5 if self._terminal else 20
            )
        self.stopwatch.read()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._train.add(outputs["figures"])
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._steps += 1
        if self._bar is not None:
            self._bar.update()
        if self._cadence.log(trainer.global_step):
            self._log_training(trainer)

    def _log_training(self, trainer: Trainer) -> None:
        loader = cast(TrainLoader, trainer.train_dataloader)
        means, _, (waited,) = self._train.take(trainer, len(self._figures.names), loader.take_wait_seconds())
        seconds, steps, self._steps = self.stopwatch.read(), self._steps, 0
        loss = self._figures.row(means)["loss"]
        if not math.isfinite(loss):
            raise JobError(
                f"the loss is {loss} at step {trainer.global_step}; nothing was saved after the last checkpoint: resume from an earlier one "
                "(trainer.ckpt_path=) with a smaller optimiser.learning_rate, or train with trainer.precision=32-true"
            )
        row = {
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "samples_per_second": steps * self._batch_size / seconds,
            "model_teraflops_per_second": steps * self._batch_size * self._sample_flops / seconds / 1e12,
            "data_wait_fraction": waited / trainer.world_size / seconds,
        }
        self._write(trainer, "train", means, row)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {row['samples_per_second']:.1f} samples/s", refresh=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_began = time.perf_counter()
        if self._bar is not None:
            self._bar.set_description("validate", refresh=self._terminal)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._validation.add(outputs["figures"], weight=float(batch.samples))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        figures = self._figures
        means, samples, _ = self._validation.take(trainer, len(figures.names))
        more = cast(TrainingModule, pl_module).validated()
        seconds = time.perf_counter() - self._validation_began
        self._write(trainer, "validation", means, {**more, "samples": int(samples), "samples_per_second": samples / seconds})
        measured = {**figures.row(means), **more}
        value = measured[figures.best]
        if self._bar is not None:
            self._bar.set_description("train", refresh=self._terminal)
            also = "" if figures.best == "loss" else f", {figures.best} {value:.4f}"
            self._bar.write(f"step {trainer.global_step}: validation loss {measured['loss']:.4f}{also}", file=sys.stderr)
        self.improved = figures.improves(value, self.best)
        self.best = value if self.improved else self.best
        self.stopwatch.forget(seconds)

    def _write(self, trainer: Trainer, split: str, means: Sequence[float], more: Mapping[str, float | int]) -> None:
        if not trainer.is_global_zero:
            return
        row = {"step": trainer.global_step, "split": split, **self._figures.row(means), **more}
        with (self._folder / METRICS).open("a") as file:
            file.write(json.dumps(row) + "\n")
        if trainer.logger is not None:
            curves = {**self._figures.curves(means), **more}
            trainer.logger.log_metrics({f"{split}/{name}": value for name, value in curves.items()}, step=trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`: `step`, `split` (train or validation), `loss`, other figures and speeds. A line cut short is left out."""
    path = folder / METRICS
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal asked for the end, and the last checkpoint is written."""


class StopSignals:
    """SIGINT and SIGTERM ask for an orderly end: the step under way is finished and saved. A second one ends the process at once."""

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def install(self, children: _SubprocessScriptLauncher | None) -> None:
        """Take the signals over, from Lightning too: its handler broadcasts between ranks from within a signal, which can deadlock."""
        if threading.current_thread() is not threading.main_thread():
            return

        def handle(signal_number: int, _frame: FrameType | None) -> None:
            if self.received and signal_number == signal.SIGINT:
                raise KeyboardInterrupt
            if children is not None and signal_number == signal.SIGTERM:
                # A terminal sends Ctrl-C to every process by itself; a scheduler may send SIGTERM to the first one only.
                children.kill(signal_number)
            self.received = True
            print("\nstopping after this step, with a checkpoint (Ctrl-C again: at once, without)", file=sys.stderr)

        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, handle)

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


@runtime_checkable
class RunFiles(Protocol):
    """What a job puts into its run folder beside checkpoints."""

    def begin(self) -> list[str]:
        """The configuration, and what else is there from the start; a line for everything that could not be put there."""
        ...

    def write(self, state: Mapping[str, Tensor], name: str) -> None:
        """Weights, as the file `name`.safetensors; whole or not at all."""
        ...


class Checkpoints(Callback):
    """The run folder: `config.yaml` at the start, then Lightning checkpoints in `checkpoints/` and the model's weights alone beside them.

    `last` is the latest, `best` that of the best validation, `step-...` those to keep. Averaged weights are `ema`, and those in `best`
    if they are what was validated.
    """

    def __init__(self, folder: Path, cadence: Cadence, metrics: Metrics, averages: Averages, files: RunFiles) -> None:
        self._folder, self._cadence, self._metrics, self._averages, self._files = folder / CHECKPOINTS, cadence, metrics, averages, files
        self._signals = StopSignals()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        for problem in self._files.begin():
            print(f"not copied into the run folder: {problem}", file=sys.stderr)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        launcher = trainer.strategy.launcher
        self._signals.install(launcher if isinstance(launcher, _SubprocessScriptLauncher) else None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        stop = self._must_stop(trainer, step)
        if stop or self._cadence.checkpoint(step):
            self._save(trainer, pl_module, "last", {LAST: None, **({EMA: self._averages.of_run()} if self._averages.on else {})})
        if self._cadence.keep(step) and trainer.is_global_zero:
            _link(self._folder / "last.ckpt", self._folder / f"step-{step:09d}.ckpt")
        if stop and step < self._cadence.max_steps:
            raise Stopped

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # This step's checkpoint is written. Ranks have their own number of batches here and cannot agree to stop; alone, there is no need to.
        if self._signals.received and trainer.world_size == 1:
            raise Stopped

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._metrics.improved:
            self._save(trainer, pl_module, "best", {BEST: self._averages.validated()})

    def _must_stop(self, trainer: Trainer, step: int) -> bool:
        """Whether a signal came, to any rank. Ranks ask each other only where they wait for each other anyway: when losses are logged."""
        if trainer.world_size == 1:
            return self._signals.received
        if not self._cadence.log(step):
            return False
        received = torch.tensor(int(self._signals.received), device=trainer.strategy.root_device)
        torch.distributed.all_reduce(received)
        return bool(received.item())

    def _save(self, trainer: Trainer, pl_module: LightningModule, checkpoint: str, weights: Mapping[str, Mapping[str, Tensor] | None]) -> None:
        """A checkpoint, and weights files by name, each of the model's parameters or of those given in their place. Every process must call it."""
        began = time.perf_counter()
        path = self._folder / f"{checkpoint}.ckpt"
        temporary = path.with_name(f".{path.name}.tmp")
        trainer.save_checkpoint(temporary)  # every rank calls it, the first writes
        if trainer.is_global_zero:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        for name, instead in weights.items():
            state = whole_state(cast(TrainingModule, pl_module).model, instead, keep=trainer.is_global_zero)
            if state is not None:
                self._files.write(state, name)
        self._metrics.stopwatch.forget(time.perf_counter() - began)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._signals.restore()


def _link(path: Path, name: Path) -> None:
    """A second name for a file that is only ever replaced, or a copy where the file system has no hard links."""
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)
