"""The optimiser and its schedule: AdamW, warm-up and cosine. Knows parameters and step numbers; no model, no data, no trainer."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from train.sharding import local


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW (Loshchilov & Hutter 2019) as V-AURA was trained with."""

    learning_rate: float = 1.08e-4
    """The peak, reached at the end of the warm-up."""
    weight_decay: float = 1.08e-5
    """Of tensors with two dimensions or more (matrices, embeddings, weight-norm gains); biases and norms never decay."""
    beta1: float = 0.9
    """Memory of the gradients' mean."""
    beta2: float = 0.95
    """Memory of the gradients' square."""
    eps: float = 1e-8
    """Added to the root of the gradients' mean square."""
    clip: float = 1.0
    """Limit on the gradients, by `clip_by`; 0: none."""
    clip_by: Literal["value", "norm"] = "value"
    """value: every element on its own to [-clip, clip] (as published); norm: the whole gradient scaled to an L2 norm of at most clip."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then half a cosine down to a fraction of the peak, which stays, or the peak throughout."""

    shape: Literal["cosine", "constant"] = "cosine"
    """What comes after the warm-up."""
    warmup_steps: int = 1000
    """Length of the warm-up, which rises in equal steps from `start` to the peak."""
    start: float = 0.0
    """The first step's learning rate as a fraction of the peak: 0 as V-AURA was trained, 0.01 as Synchformer was."""
    total_steps: int | None = None
    """The step at which the cosine ends; null: trainer.max_steps. Published: 200000."""
    floor: float = 0.1
    """What is left at the end, as a fraction of the peak (not an absolute rate)."""

    def factor(self, step: int, max_steps: int) -> float:
        """The fraction of the peak learning rate at `step`, the number of optimiser steps already taken."""
        total = self.total_steps or max_steps
        if step < self.warmup_steps:
            return self.start + (1 - self.start) * step / self.warmup_steps
        if self.shape == "constant":
            return 1.0
        if step >= total:
            return self.floor
        progress = (step - self.warmup_steps) / (total - self.warmup_steps)
        return self.floor + (1 - self.floor) / 2 * (1 + math.cos(math.pi * progress))

    def check(self, max_steps: int) -> None:
        """Raises ValueError where the warm-up would outlast the schedule."""
        total = self.total_steps or max_steps
        if not 0 <= self.warmup_steps < total or not 0 <= self.floor <= 1 or not 0 <= self.start <= 1:
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps}, schedule.total_steps={total}, schedule.floor={self.floor}, schedule.start={self.start}: "
                "expected a warm-up shorter than the schedule (total_steps, or trainer.max_steps where it is null), and floor and start between 0 "
                "and 1; give fewer warmup_steps"
            )


def build_optimiser(parameters: Iterable[nn.Parameter], config: OptimiserConfig, *, fused: bool = True) -> torch.optim.AdamW:
    """AdamW in two groups: what decays, and what does not. `fused` makes a step one kernel (CPU, CUDA and MPS have it).

    Under a gradient scaler (precision 16-mixed) it must not be fused: the fused step undoes the scaling itself, after gradients were clipped.
    """
    trainable = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)


def clip_gradients(parameters: Iterable[nn.Parameter], config: OptimiserConfig) -> None:
    """Limit the gradients in place, as `config` says. Of sharded ones each process limits its own part; a norm is that of the whole."""
    if config.clip > 0 and config.clip_by == "value":
        # One pass over each gradient: torch's own way clamps all from below and then all from above.
        for gradient in [local(p.grad) for p in parameters if p.grad is not None]:
            gradient.clamp_(-config.clip, config.clip)
    elif config.clip > 0:
        nn.utils.clip_grad_norm_(parameters, config.clip)
