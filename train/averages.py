"""Weights averaged over the steps: a moving mean that is saved beside the weights, and that validation and previews may use in their place.

Knows parameters, whole or sharded, and Lightning's hooks. Knows no loss and no files.
"""
# ruff: noqa: ARG002 - Lightning decides the hooks' arguments

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from model.vaura import Vaura
from train.sharding import gather, like, local

EMA = "ema"
"""Name of the averaged weights' file, and of their part of a checkpoint."""


@dataclass(frozen=True)
class EmaConfig:
    """Exponential moving average of the weights (Polyak & Juditsky 1992, in the form that Karras et al. 2024 call traditional)."""

    decay: float = 0.0
    """What each step keeps of the average, such as 0.9999; 0: no average. In the first steps less, (1 + step) / (10 + step), so that it forgets
    the random start. Takes 4 bytes a parameter. The run folder gets ema.safetensors: `soundshard generate weights=ema`."""
    validates: bool = True
    """Validation, previews and best.safetensors are of the averaged weights; false: of the latest ones."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay={self.decay}: expected 0 (no average) or more, and below 1")

    def keeps(self, step: int) -> float:
        """The decay at a step, counted from 1."""
        return min(self.decay, (1 + step) / (10 + step))


class Averages(Callback):
    """Keeps the average, in fp32. Must come before the callbacks that use it, so that they find it up to date."""

    def __init__(self, config: EmaConfig) -> None:
        self._config = config
        self._average: dict[str, Tensor] = {}
        self._restored: dict[str, Tensor] = {}
        self._kept: list[Tensor] = []

    @property
    def on(self) -> bool:
        return self._config.decay > 0

    def of_run(self) -> Mapping[str, Tensor] | None:
        """The averaged parameters by name, sharded where the parameters are; None without an average."""
        return self._average if self.on else None

    def validated(self) -> Mapping[str, Tensor] | None:
        """The parameters that validation used in place of the model's; None: the model's."""
        return self._average if self.on and self._config.validates else None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get(EMA, {})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.on:
            checkpoint[EMA] = gather(self._average, keep=trainer.is_global_zero)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where the checkpoint's average ended, or from the weights as they are. Not before: the parameters are on their devices only now."""
        if self.on:
            restored, self._restored = self._restored, {}
            # Copied, for a tensor that was loaded may be a view of the file.
            start = {name: like(restored[name], p) if name in restored else p for name, p in self._parameters(pl_module).items()}
            self._average = {name: tensor.detach().float().clone() for name, tensor in start.items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.on or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        now = [local(p).float() for p in self._parameters(pl_module).values()]
        torch._foreach_lerp_([local(a) for a in self._average.values()], now, 1 - self._config.keeps(trainer.global_step))

    @torch.no_grad()
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.validated() is not None:
            parameters = [local(p) for p in self._parameters(pl_module).values()]
            self._kept = [p.clone() for p in parameters]
            torch._foreach_copy_(parameters, [local(a) for a in self._average.values()])

    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._kept:
            torch._foreach_copy_([local(p) for p in self._parameters(pl_module).values()], self._kept)
            self._kept = []

    def _parameters(self, pl_module: LightningModule) -> dict[str, Tensor]:
        return {name.removeprefix("model."): p for name, p in pl_module.named_parameters() if p.requires_grad}


def whole_state(model: nn.Module, instead: Mapping[str, Tensor] | None = None, *, keep: bool) -> dict[str, Tensor] | None:
    """A model's tensors by name, without copying those that are in one piece already; `instead` are parameters that replace its own.

    Where they are sharded, every process must call this, and they lie on the CPU of those that `keep` them; the others get None.
    """
    state = gather({**model.state_dict(), **(instead or {})}, keep=keep)
    return state if keep else None


def assembled(model: Vaura, instead: Mapping[str, Tensor] | None = None, *, keep: bool) -> Vaura | None:
    """The decoder in one piece, in evaluation mode, of its `whole_state`."""
    state = whole_state(model, instead, keep=keep)
    if state is None:
        return None
    with torch.device("meta"):
        piece = Vaura(model.config)
    piece.load_state_dict(state, assign=True)
    return piece.eval()
