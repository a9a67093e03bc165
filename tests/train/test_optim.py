"""The schedule at the steps that matter, what decays, and clipping by value and by norm."""

import math

import pytest
import torch
from torch import nn

from train.optim import OptimiserConfig, ScheduleConfig, build_optimiser, clip_gradients

PEAK = 1.08e-4


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.0),
        (1, 1.08e-7),
        (999, 1.07892e-4),
        (1000, 1.08e-4),
        # Half way by steps is short of half way along the cosine, because the warm-up is not part of it: 99000 / 199000.
        (100_000, 1.08e-4 * (0.1 + 0.45 * (1 + math.cos(math.pi * 99_000 / 199_000)))),
        (200_000, 1.08e-5),
        (300_000, 1.08e-5),
    ],
)
def test_published_schedule(step: int, rate: float) -> None:
    assert PEAK * ScheduleConfig().factor(step, max_steps=200_000) == pytest.approx(rate, rel=1e-9)


def test_schedule_ends_with_training_unless_told() -> None:
    assert ScheduleConfig(warmup_steps=3).factor(50, max_steps=50) == 0.1
    assert ScheduleConfig(warmup_steps=3, total_steps=100).factor(50, max_steps=50) > 0.5


def test_schedule_shorter_than_its_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps=1000.*total_steps=50"):
        ScheduleConfig().check(max_steps=50)


def test_only_tensors_of_two_dimensions_decay() -> None:
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3), nn.LayerNorm(3))
    model[1].weight.requires_grad_(False)
    decaying, others = build_optimiser(model.parameters(), OptimiserConfig()).param_groups
    assert [tuple(p.shape) for p in decaying["params"]] == [(7, 5)] and decaying["weight_decay"] == 1.08e-5
    assert [tuple(p.shape) for p in others["params"]] == [(3,), (3,), (3,)] and others["weight_decay"] == 0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (OptimiserConfig(), [1.0, -0.5]),
        (OptimiserConfig(clip_by="norm"), [3 / math.hypot(3, 0.5), -0.5 / math.hypot(3, 0.5)]),
        (OptimiserConfig(clip=0.0), [3.0, -0.5]),
    ],
)
def test_clipping(config: OptimiserConfig, expected: list[float]) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, -0.5])
    clip_gradients([parameter], config)
    torch.testing.assert_close(parameter.grad, torch.tensor(expected), rtol=1e-5, atol=1e-5)
