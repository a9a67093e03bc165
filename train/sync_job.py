"""What Synchformer's three stages have in common as jobs: options, splits, and what they say of themselves.

Knows datasets and the trainer's options. Knows no network: `train.sync_contrast` and `train.sync_pairs` bring theirs.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from configs.load import to_plain
from shards.read import Index
from shards.samples import check_alike
from train.averages import EmaConfig
from train.optim import OptimiserConfig, ScheduleConfig
from train.trainer import Start, TrainerConfig, say

GPUS = 32
"""That the published models were trained on: 4 nodes of 4 cards with 2 devices each."""


@dataclass(frozen=True)
class SyncJob:
    """Options of every stage."""

    stage: int = 2
    """1: both towers, from media shards. 2: the offset, from feature shards or media shards. 3: whether there is one, the same."""
    data: Any = "???"
    """Folder or address of the dataset; several, to mix: [first,second], and stream.weights=[3,1] says how much of each."""
    out: str = "???"
    """The run folder: checkpoints, weights, figures and the configuration."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str | None = "validation"
    """Split to validate on, if the dataset has it; null: none."""
    init: str = ""
    """Weights to start from: a file, a published name, or a run folder. Stage 1: both towers (`avclip`). Stage 2: the network for offsets (`sync`),
    to go on with it on other data. Stage 3: the network for offsets; what is new is the head. Empty: random weights."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    seed: int = 0
    """Decides the initial weights and dropout. The order of samples and what is drawn of them have their own, stream.seed."""
    copy_weights: bool = True
    """Copy the towers' weights files into the run folder, if they are here, so that nothing else is needed to predict offsets with it."""

    @property
    def roots(self) -> list[str]:
        """The datasets."""
        return [str(root) for root in (self.data if isinstance(self.data, list) else [self.data])]


def open_splits(config: SyncJob, *, kind: str | None = None) -> tuple[list[Index], list[Index]]:
    """The training split of each dataset, and the validation split of each that has it. DatasetMismatch for a dataset of another kind."""
    train = [Index.open(root, config.train_split, kind=kind) for root in config.roots]
    check_alike(train)
    if config.validation_split is None or config.trainer.val_check_interval == 0:
        return train, []
    splits = {root: Index.open(root).table["split"].unique().to_pylist() for root in config.roots}
    return train, [Index.open(root, config.validation_split) for root in config.roots if config.validation_split in splits[root]]


def resolved(config: Any) -> dict[str, Any]:
    """A job's options as plain values, with a cosine's length settled: a run that goes on to more steps must not silently stretch it."""
    schedule = config.schedule
    if schedule.shape == "cosine":
        schedule = replace(schedule, total_steps=schedule.total_steps or config.trainer.max_steps)
    return to_plain(replace(config, schedule=schedule))


def describe(
    config: SyncJob, train: list[Index], validation: list[Index], model: nn.Module, what: str, batch_size: int, step: int, begins: str = ""
) -> str:
    """What is about to happen, in a few lines."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    begin = begins or (f"resumes at step {step}" if step else f"from {config.init}" if config.init else "from random weights")
    return "\n".join(
        [
            f"data   {', '.join(config.roots)} ({what}): {' + '.join(str(index.ok) for index in train)} training clips, "
            f"{' + '.join(str(index.ok) for index in validation) or 'no'} validation clips",
            f"model  stage {config.stage}: {parameters / 1e6:.1f} M parameters that are trained",
            f"start  {begin}",
            f"run    {config.out} to step {config.trainer.max_steps}; {config.trainer.resolved_precision}, batches of {batch_size}",
        ]
    )


def is_finished(folder: Path, config: SyncJob, start: Start) -> bool:
    """Whether there is nothing left to do, which is said."""
    if start.step < config.trainer.max_steps:
        return False
    say(f"{folder} is finished: step {start.step} of trainer.max_steps={config.trainer.max_steps}; a larger trainer.max_steps goes on")
    return True
