"""How good offsets and answers about synchronisability are: accuracies, the area under the ROC curve, and how sure one can be of them.

Training and evaluation count with the same functions, as published (Iashin et al. 2024, sec. 4): Acc@1, Acc@1 within one class (0.2 s), AUC-ROC,
and the offsets' accuracy among the clips that are said to be synchronisable. This module knows tensors of answers; not where they come from.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

RESAMPLES = 1000
"""Of a bootstrap: the ends of a 95 % interval are then right to about a hundredth of its width."""
AT_ONCE = 1 << 20
"""Numbers that a bootstrap holds at a time."""


class Kept(NamedTuple):
    """The accuracy of the offsets among the clips that a threshold keeps."""

    threshold: float
    kept: int
    """Clips."""
    accuracy: float
    """nan where none is kept."""


# --- measures -------------------------------------------------------------------------------------------------------------------------


def hits(logits: Float[Tensor, "n classes"], targets: Int[Tensor, "n"], within: int = 0) -> Bool[Tensor, "n"]:
    """Whether the most probable class is at most `within` classes from the true one (of equally probable ones, the first)."""
    return (logits.argmax(-1) - targets).abs() <= within


def accuracy(logits: Float[Tensor, "n classes"], targets: Int[Tensor, "n"], within: int = 0) -> float:
    """The share of `hits`: Acc@1, or with `within=1` Acc@1 within one class. nan of nothing."""
    return hits(logits, targets, within).double().mean().item()


def auc_roc(scores: Float[Tensor, "n"], positive: Bool[Tensor, "n"]) -> float:
    """How often a positive has a higher score than a negative, a tie counting half: the area under the ROC curve.

    nan where there are only positives or only negatives.
    """
    return float(_areas(scores, positive, torch.ones(1, len(scores), dtype=torch.float64))[0])


def accuracy_by_threshold(hit: Bool[Tensor, "n"], synchronisable_probability: Float[Tensor, "n"], thresholds: Sequence[float]) -> list[Kept]:
    """The share of hits among the clips whose probability of being synchronisable is above a threshold, for each threshold."""
    rows: list[Kept] = []
    for threshold in thresholds:
        kept = synchronisable_probability > threshold
        rows.append(Kept(threshold, int(kept.sum()), hit[kept].double().mean().item()))
    return rows


# --- how sure -------------------------------------------------------------------------------------------------------------------------


def interval(
    values: Float[Tensor, "n"] | Bool[Tensor, "n"],
    groups: Sequence[object] | None = None,
    level: float = 0.95,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Between which numbers the mean of `values` lies, at a level: percentiles of a bootstrap, the same for the same seed.

    Whole groups are drawn (`groups` names each value's clip): several answers about a clip are not several clips. Without them every value is its
    own. (nan, nan) for fewer than two groups, of which one cannot tell.
    """
    member = _members(groups, len(values))
    count = int(member.max()) + 1 if len(member) else 0
    if count < 2:
        return math.nan, math.nan
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, member, values.double().cpu())
    sizes = torch.bincount(member, minlength=count).double()
    means = [(times @ sums) / (times @ sizes) for times in _draws(count, resamples, seed)]
    return _ends(torch.cat(means), level)


def auc_interval(
    scores: Float[Tensor, "n"],
    positive: Bool[Tensor, "n"],
    groups: Sequence[object] | None = None,
    level: float = 0.95,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """As `interval`, of `auc_roc`."""
    member = _members(groups, len(scores))
    count = int(member.max()) + 1 if len(member) else 0
    if count < 2 or math.isnan(auc_roc(scores, positive)):
        return math.nan, math.nan
    areas = torch.cat([_areas(scores, positive, times[:, member]) for times in _draws(count, resamples, seed, width=len(member))])
    return _ends(areas[~areas.isnan()], level)


def _members(groups: Sequence[object] | None, n: int) -> Int[Tensor, "n"]:
    """The number of every value's group, counted from 0."""
    if groups is None:
        return torch.arange(n)
    if len(groups) != n:
        raise ValueError(f"{len(groups)} groups for {n} values; expected one for each")
    numbers: dict[object, int] = {}
    return torch.tensor([numbers.setdefault(group, len(numbers)) for group in groups], dtype=torch.int64)


def _draws(groups: int, resamples: int, seed: int, *, width: int = 0) -> Iterator[Float[Tensor, "part groups"]]:
    """How often each group is in each resample, [resamples, groups], a part of the resamples at a time."""
    rng = torch.Generator().manual_seed(seed)
    for first in range(0, resamples, step := max(1, AT_ONCE // max(groups, width))):
        drawn = torch.randint(groups, (min(step, resamples - first), groups), generator=rng)
        yield torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))


def _areas(scores: Float[Tensor, "n"], positive: Bool[Tensor, "n"], weights: Float[Tensor, "times n"]) -> Float[Tensor, "times"]:
    """The area under the ROC curve for each row of weights."""
    _, rank = scores.cpu().unique(return_inverse=True)  # equal scores share a rank
    ranks, of = int(rank.max()) + 1 if len(rank) else 0, positive.cpu().double()
    empty = torch.zeros(len(weights), ranks, dtype=torch.float64)
    positives, negatives = (empty.index_add(1, rank, weights * share) for share in (of, 1 - of))
    below = negatives.cumsum(1) - negatives / 2
    return (positives * below).sum(1) / (positives.sum(1) * negatives.sum(1))


def _ends(means: Float[Tensor, "resamples"], level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a number between 0 and 1, such as 0.95")
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high
