"""What every training job's Lightning module does alike: the optimiser, its rates, a step's draws, clipping, and what a checkpoint says of itself.

Knows Lightning's hooks and the optimiser. Knows no network and no data: `train.vaura`, `train.sync` and `train.contrast` bring theirs.
"""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import nn

from train.optim import OptimiserConfig, ScheduleConfig, build_optimiser, clip_gradients

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class StepOptions:
    """How steps are taken."""

    seed: int
    optimiser: OptimiserConfig
    schedule: ScheduleConfig
    max_steps: int
    accumulate: int
    """Backward passes of a step."""
    fused: bool
    """Whether the optimiser's step is one kernel; it must not be under a gradient scaler."""


class TrainingModule(LightningModule, Generic[Model]):
    """A network and its steps. Rates follow from the step's number and draws from (seed, step, rank), so nothing but tensors needs saving.

    `training_step` returns `loss` and `figures`, `validation_step` returns `figures`: a tensor of means over the batch's samples, which
    `callbacks.Figures` names.
    """

    model: Model
    """What is trained; its tensors are what the run folder's weights files hold."""

    def __init__(self, options: StepOptions, identity: dict[str, Any]) -> None:
        super().__init__()
        self._options, self._identity = options, identity

    def validated(self) -> dict[str, float]:
        """What can only be said of a whole validation, at its end; every process calls this."""
        return {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimiser(self.model.parameters(), self._options.optimiser, fused=self._options.fused)

    def on_train_start(self) -> None:
        """Options win over what a checkpoint brought: resuming with another weight decay means it."""
        fresh = build_optimiser(self.model.parameters(), self._options.optimiser, fused=self._options.fused)
        for group, given in zip(self.trainer.optimizers[0].param_groups, fresh.param_groups, strict=True):
            group.update({name: value for name, value in given.items() if name != "params"})

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ARG002 - Lightning's
        trainer, options = self.trainer, self._options
        part = batch_idx % options.accumulate
        words = np.random.SeedSequence([options.seed, trainer.global_step, part, trainer.global_rank]).generate_state(1, np.uint64)
        # torch.manual_seed notes a stack trace for every kind of device that is not there: a hundred times as long.
        torch.default_generator.manual_seed(int(words[0]))
        if self.device.type == "cuda":
            torch.cuda.manual_seed(int(words[0]))
        if part == 0:
            rate = options.optimiser.learning_rate * options.schedule.factor(trainer.global_step, options.max_steps)
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = rate

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:  # noqa: ARG002 - Lightning's
        """Here and not by Lightning's option, which refuses fused optimisers although they clip well without a gradient scaler."""
        clip_gradients([p for group in optimizer.param_groups for p in group["params"]], self._options.optimiser)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["identity"] = self._identity
