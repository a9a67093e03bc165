"""How long, on what, from where: the options of every training job, Lightning's Trainer made of them, and what a run folder allows.

Knows Lightning and run folders. Knows no network: `train.vaura` and `train.sync` bring theirs.
"""

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from model.run_folder import CONFIG
from train.callbacks import CHECKPOINTS, Cadence
from train.module import StepOptions
from train.optim import OptimiserConfig, ScheduleConfig
from train.sharding import ShardedStrategy


@dataclass(frozen=True)
class TrainerConfig:
    """How long to train, on what, and what to leave behind when. Steps are optimiser steps."""

    max_steps: int = 200_000
    """Steps to train for."""
    accelerator: str = "auto"
    """auto (a GPU if there is one), cpu, gpu, cuda."""
    devices: Any = "auto"
    """How many devices of each node, or which: auto (all), 2, [0], [0,2]. On a CPU: processes."""
    num_nodes: int = 1
    """Machines. Under Slurm one task per device (srun), under torchrun as it says; else start the job on each with NODE_RANK and MASTER_ADDR set."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: a process per device with the whole model each, also for a single one; auto: where there are several. fsdp: weights, gradients and the
    optimiser's state are cut up among the devices (FSDP2), for a model that outgrows one; files are the same, and a run may go on under another."""
    precision: str = "auto"
    """auto (bf16-mixed on a GPU, 32-true on a CPU, which is 12 times faster there unless it has bf16 instructions), bf16-mixed, 16-mixed (as
    published), 32-true, bf16-true."""
    accumulate: int = 1
    """Backward passes per step: batch_size samples are cut into this many, to fit into memory."""
    val_check_interval: int = 1000
    """Steps between validations, if there is a validation split; 0: none."""
    log_every: int = 25
    """Steps between rows in TensorBoard and metrics.jsonl. The device is waited for only then."""
    checkpoint_every: int = 1000
    """Steps between checkpoints, each replacing the last; also written before each validation, at the end, and when the job is told to stop."""
    keep_every: int = 0
    """Steps between checkpoints that stay, as checkpoints/step-....ckpt; 0: none."""
    ckpt_path: str | None = None
    """Where to go on: last, or a checkpoint of this run folder, and then with options other than the run's, too. null: go on with an unfinished
    run of the same options, else start."""
    compile: bool = False
    """Compile the transformer's block with torch.compile (one block, for all are alike): faster steps after a minute or so."""
    checkpoint_activations: bool = False
    """Keep each block's input alone and compute the rest again in the backward pass: the same losses with a fraction of the memory, for a third
    more work."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "num_nodes", "accumulate", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name}={getattr(self, name)}: expected 1 or more")

        if self.strategy == "fsdp" and self.precision == "16-mixed":
            raise ValueError("trainer.strategy=fsdp with trainer.precision=16-mixed: gradients are not scaled there; take bf16-mixed or 32-true")

    @property
    def resolved_precision(self) -> str:
        """The precision that `auto` stands for."""
        on_gpu = self.accelerator in ("gpu", "cuda") or (self.accelerator == "auto" and torch.cuda.is_available())
        return self.precision if self.precision != "auto" else "bf16-mixed" if on_gpu else "32-true"

    def cadence(self, *, validates: bool) -> Cadence:
        """At which steps to log, save and validate."""
        return Cadence(self.log_every, self.checkpoint_every, self.keep_every, self.val_check_interval if validates else 0, self.max_steps)


@runtime_checkable
class TrainingJob(Protocol):
    """The options that every training job has."""

    @property
    def seed(self) -> int: ...
    @property
    def optimiser(self) -> OptimiserConfig: ...
    @property
    def schedule(self) -> ScheduleConfig: ...
    @property
    def trainer(self) -> TrainerConfig: ...


def step_options(job: TrainingJob) -> StepOptions:
    """What a module must know of its job's options to take steps."""
    trainer = job.trainer
    fused = trainer.resolved_precision != "16-mixed"
    return StepOptions(job.seed, job.optimiser, job.schedule, trainer.max_steps, trainer.accumulate, fused)


FREE = {
    "data",
    "out",
    "copy_weights",
    "stream.prefetch",
    "stream.workers",
    "stream.pin_memory",
    "stream.read_ahead_mb",
    "stream.connections",
    "stream.cache_dir",
    "stream.cache_gb",
    "trainer.max_steps",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accumulate",
    "trainer.val_check_interval",
    "trainer.log_every",
    "trainer.checkpoint_every",
    "trainer.keep_every",
    "trainer.ckpt_path",
    "trainer.compile",
    "trainer.checkpoint_activations",
    "trainer.progress",
    "preview.clips",
    "preview.every",
    "preview.seed",
    "preview.sampling.temperature",
    "preview.sampling.top_k",
    "preview.sampling.top_p",
    "preview.sampling.guidance",
    "preview.sampling.greedy",
}
"""Options that may differ when an unfinished run goes on by itself: they do not change what is learned."""


def build_trainer(config: TrainerConfig, folder: Path, callbacks: list[Callback], *, start_step: int, validates: bool) -> Trainer:
    """Lightning's Trainer: steps, not epochs; our own checkpoints, progress bar and signals; TensorBoard in the run folder."""
    # Rows after the checkpoint are about steps that come again: TensorBoard is told to forget them.
    logger = TensorBoardLogger(folder, name="tensorboard", version="", purge_step=start_step + 1)
    trainer = Trainer(
        max_steps=config.max_steps,
        max_epochs=-1,
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=ShardedStrategy() if config.strategy == "fsdp" else config.strategy,
        precision=config.resolved_precision,  # pyright: ignore[reportArgumentType] - Lightning checks the name
        accumulate_grad_batches=config.accumulate,
        val_check_interval=config.val_check_interval * config.accumulate if validates else 1.0,
        check_val_every_n_epoch=None if validates else 1,
        limit_val_batches=1.0 if validates else 0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=logger,
        log_every_n_steps=config.log_every,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_autolog_hparams=False,
        use_distributed_sampler=False,
        # Shards of weights are gathered into tensors that autograd tracks, which inference mode does not allow.
        inference_mode=config.strategy != "fsdp",
        default_root_dir=folder,
        # One way to resume: Lightning's own under Slurm would write and prefer checkpoints of its own.
        plugins=[SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else None,
    )
    if isinstance(trainer.strategy, DDPStrategy):
        # Broadcasting buffers at each forward would tie the ranks together in validation, where they have unequal numbers of batches.
        trainer.strategy._ddp_kwargs.update(broadcast_buffers=False, gradient_as_bucket_view=True)
    # Lightning asks all ranks before each step whether one got SIGTERM, which waits for the device every time; train.callbacks asks at the cadence.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer


@dataclass(frozen=True)
class Start:
    """Where training begins: at a checkpoint's step, or from nothing at step 0."""

    step: int = 0
    checkpoint: Path | None = None


@runtime_checkable
class Described(Protocol):
    """What `config.yaml` of a run folder says of a run."""

    @property
    def train(self) -> dict[str, Any]:
        """The job's options, resolved."""
        ...

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed from. Plain values."""
        ...

    @staticmethod
    def completed(identity: Mapping[str, Any]) -> dict[str, Any]:
        """The identity that a checkpoint of an earlier version has in this one."""
        ...


def find_start(folder: Path, run: Described, config: TrainerConfig, *, read: Callable[[Path], Described]) -> Start:
    """Where a run of these options begins, given what the folder holds. A finished run starts at its end. `read` reads a folder's `config.yaml`.

    Raises ValueError where the folder's run is another one: of other data, another network, or (unless `ckpt_path` says so) other options.
    """
    last = folder / CHECKPOINTS / "last.ckpt"
    if config.ckpt_path is not None:
        return _start_at(last if config.ckpt_path == "last" else Path(config.ckpt_path), folder, run)
    if not (folder / CONFIG).exists():
        return Start()
    there = read(folder)
    _check_same(folder / CONFIG, there.identity(), run.identity())
    differing = [
        f"  {name}: {old!r} there, {new!r} here" for name, old, new in _differences(_leaves(there.train), _leaves(run.train)) if name not in FREE
    ]
    if differing:
        raise ValueError(
            f"{folder} holds a run of other options; use another out=, or its options, or trainer.ckpt_path=last to go on with the new ones:\n"
            + "\n".join(differing)
        )
    return _start_at(last, folder, run) if last.exists() else Start()


def _start_at(path: Path, folder: Path, run: Described) -> Start:
    checkpoints = folder / CHECKPOINTS
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in checkpoints.glob("[!.]*.ckpt")))
        raise ValueError(f"trainer.ckpt_path: {path} does not exist; {checkpoints} has {there or 'no checkpoints: leave the option out to start'}")
    if path.resolve().parent != checkpoints.resolve():
        raise ValueError(f"trainer.ckpt_path={path} is of another run; training resumes into its own run folder: expected out={path.parent.parent}")
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    _check_same(path, run.completed(state["identity"]), run.identity())
    return Start(state["global_step"], path)


def _check_same(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    differing = _differences(_leaves(there), _leaves(here))
    if differing:
        raise ValueError(
            f"{path} is of a run on other data or of another network (see below); use the same data, or another out=:\n"
            + "\n".join(f"  {name}: {old!r} there, {new!r} here" for name, old, new in differing)
        )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    absent = "(absent)"
    return [
        (name, there.get(name, absent), here.get(name, absent))
        for name in sorted({*there, *here})
        if there.get(name, absent) != here.get(name, absent)
    ]


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    return {leaf: v for key, inner in value.items() for leaf, v in _leaves(inner, f"{name}.{key}" if name else str(key)).items()}


def is_first() -> bool:
    """Whether this is the process of rank 0, as far as is known before and while Lightning runs."""
    return getattr(rank_zero_only, "rank", 0) == 0


def say(text: str) -> None:
    """Print, from the first process only."""
    if is_first():
        print(text, flush=True)


def quieten_lightning() -> None:
    """Leave out Lightning's notes on the machine, its tips and its use of an old torch call; warnings stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
