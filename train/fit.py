"""What every training job does once it knows what to train on what: Lightning runs it, with the callbacks that every run has, and its last words.

Knows Lightning's Trainer, callbacks and run folders. Knows no network: `train.vaura` and `train.sync` bring theirs.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback

from train.averages import Averages, EmaConfig
from train.callbacks import Cadence, Checkpoints, Figures, Metrics, RunFiles, Stopped
from train.data import StreamData
from train.module import TrainingModule
from train.trainer import Start, TrainerConfig, build_trainer, is_first, quieten_lightning


@dataclass(frozen=True)
class Fit:
    """A run that is about to begin, or to go on."""

    folder: Path
    trainer: TrainerConfig
    cadence: Cadence
    start: Start
    metrics: Metrics
    averages: Averages
    files: RunFiles

    def run(self, module: TrainingModule, data: StreamData, more: list[Callback]) -> None:
        """Train to the end. `more` callbacks work at the end of each validation, before its weights are saved. KeyboardInterrupt if told to stop."""
        checkpoints = Checkpoints(self.folder, self.cadence, self.metrics, self.averages, self.files)
        # In this order: validation's weights are put back, its figures are known, what it shows is made, and then it is saved.
        callbacks = [self.averages, self.metrics, *more, checkpoints]
        trainer = build_trainer(self.trainer, self.folder, callbacks, start_step=self.start.step, validates=self.cadence.validate_every > 0)
        try:
            trainer.fit(module, datamodule=data, ckpt_path=self.start.checkpoint, weights_only=True)
        except Stopped:
            # The first process alone reports it; Lightning would take another's status for a crash and kill the rest.
            if is_first():
                raise KeyboardInterrupt from None


def prepare_fit(
    folder: Path,
    trainer: TrainerConfig,
    ema: EmaConfig,
    start: Start,
    figures: Figures,
    files: RunFiles,
    *,
    validates: bool,
    batch_size: int,
    sample_flops: int,
) -> Fit:
    """What watches and keeps a run. `batch_size` samples make a step, each of `sample_flops` floating point operations, backward pass included."""
    torch.set_float32_matmul_precision("high")
    quieten_lightning()
    cadence = trainer.cadence(validates=validates)
    metrics = Metrics(folder, cadence, figures, batch_size=batch_size, sample_flops=sample_flops, start_step=start.step, bar=trainer.progress)
    return Fit(folder, trainer, cadence, start, metrics, Averages(ema), files)
