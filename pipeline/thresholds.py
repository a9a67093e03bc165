"""What thresholds on a score keep of a set of clips: clips, hours and bytes, what else is true of what is kept, and how scores go together.

Arithmetic on columns: a number for each clip, NaN where there is none. Knows no dataset, no files and no pages.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64

from pipeline.page import ticks

Keep = Literal["above", "below"]
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
DISTINCT = 12
"""A score with no more different values than this, all of them short, is cut at each of them."""
RANGE = (0.005, 0.995)
"""Quantiles between which round thresholds lie and charts are drawn: a few clips far away would leave no room for the others."""
CORRELATED_CLIPS = 100_000
"""Clips that correlations are computed of: enough for three digits."""


@dataclass(frozen=True)
class Clips:
    """Good clips as columns, an element per clip."""

    splits: tuple[str, ...]
    """Names of the splits."""
    split: Int64[np.ndarray, "clips"]
    """The number of each clip's in `splits`."""
    seconds: Float64[np.ndarray, "clips"]
    bytes: Int64[np.ndarray, "clips"]

    def __len__(self) -> int:
        return len(self.split)


@dataclass(frozen=True)
class Kept:
    """What is left of clips."""

    threshold: float | None
    """None: all good clips, with and without a score."""
    clips: Mapping[str, int]
    """By split."""
    seconds: float
    bytes: int

    @property
    def total(self) -> int:
        """Clips of all splits."""
        return sum(self.clips.values())


@dataclass(frozen=True)
class Hours:
    """Hours of some machine that what is kept would take."""

    name: str
    """What takes them, and hours of what."""
    note: str
    """At which rate."""
    per_second: float = 0.0
    """Hours for a second of video."""
    per_clip: float = 0.0

    def of(self, row: Kept) -> float:
        """For what a threshold keeps."""
        return self.per_second * row.seconds + self.per_clip * row.total


def hours_text(hours: float | int) -> str:
    """Hours to three digits, and whole ones above a hundred."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


@dataclass(frozen=True)
class Curation:
    """All that is known of a score and what thresholds on it keep."""

    data: str
    kind: str
    name: str
    """Of the score."""
    keep: Keep
    clips: Clips
    score: Float64[np.ndarray, "clips"]
    others: Mapping[str, Float64[np.ndarray, "clips"]]
    """Other scores that tell clips apart."""
    kept: tuple[Kept, ...]
    """First of all good clips, then of each threshold, in the order in which they keep less."""
    scored: int
    """Clips that have the score."""
    hours: tuple[Hours, ...]
    commands: tuple[str, ...]
    """That take a threshold: one for each."""
    marked: tuple[float, str] | None
    """A threshold that was published, and whose it is."""
    names: tuple[str, ...]
    """Of the scores in `correlations`, this one first."""
    correlations: Float64[np.ndarray, "scores scores"]


def meets(score: Float64[np.ndarray, "clips"], threshold: float | int, keep: Keep) -> Bool[np.ndarray, "clips"]:
    """Whether a clip stays; one without a score never does."""
    return score >= threshold if keep == "above" else score <= threshold


def kept(clips: Clips, score: Float64[np.ndarray, "clips"], threshold: float | int | None, keep: Keep) -> Kept:
    """What a threshold keeps."""
    stays = np.ones(len(clips), bool) if threshold is None else meets(score, threshold, keep)
    counts = np.bincount(clips.split[stays], minlength=len(clips.splits)).tolist()
    return Kept(
        None if threshold is None else float(threshold),
        dict(zip(clips.splits, counts, strict=True)),
        float(clips.seconds[stays].sum()),
        int(clips.bytes[stays].sum()),
    )


def usual(score: Float64[np.ndarray, "clips"], keep: Keep, *, also: Sequence[float] = ()) -> list[float]:
    """Thresholds to look at: round numbers and quantiles, in the order in which they keep less and less.

    Quantiles are rounded to a thousandth of the range, and left out beside a round number; `also` is always there.
    """
    known = score[np.isfinite(score)]
    distinct = np.unique(known)
    if len(distinct) <= DISTINCT and all(value == float(f"{value:.3g}") for value in distinct.tolist()):
        chosen = {*distinct.tolist(), *also}
    else:
        low, high = span(score)
        chosen = {*round_numbers(low, high), *also}
        digits = round(-np.log10(high - low)) + 3
        for value in np.quantile(known, QUANTILES):
            rounded = round(float(value), digits) + 0.0  # no negative zero
            if all(abs(rounded - other) > 0.035 * (high - low) for other in chosen):
                chosen.add(rounded)
    return sorted((float(value) for value in chosen), reverse=keep == "below")


def span(score: Float64[np.ndarray, "clips"]) -> tuple[float, float]:
    """Where nearly all of a score lies: from its 0.5 % to its 99.5 % quantile, or around its only value."""
    known = score[np.isfinite(score)]
    low, high = (float(value) for value in np.quantile(known, RANGE)) if len(known) else (0.0, 1.0)
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    whole = (float(known.min()), float(known.max())) if len(known) else (low, high)
    return whole if whole[1] > whole[0] else (low - 0.5, low + 0.5)


def round_numbers(low: float, high: float) -> list[float]:
    """Round numbers in the range, five to ten."""
    found = ticks(low, high)
    if len(found) > 5:
        return found
    middle = (low + high) / 2
    finer = ticks(middle, high)
    step = finer[1] - finer[0] if len(finer) > 1 else (high - low) / 4
    return [round(k * step, 10) + 0.0 for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


# --- over all thresholds --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sorted:
    """Clips in the order in which a rising (or, of `below`, falling) threshold drops them."""

    order: Int64[np.ndarray, "scored"]
    """Of the clips that have a score, the last to be dropped first."""
    score: Float64[np.ndarray, "scored"]
    """Theirs, in this order."""
    keep: Keep

    @classmethod
    def of(cls, score: Float64[np.ndarray, "clips"], keep: Keep) -> "Sorted":
        """The order of a score."""
        rows = np.flatnonzero(np.isfinite(score))
        order = rows[np.argsort(-score[rows] if keep == "above" else score[rows], kind="stable")]
        return cls(order, score[order], keep)

    def count(self, thresholds: Float64[np.ndarray, "t"]) -> Int64[np.ndarray, "t"]:
        """Clips that each threshold keeps: so many of the first in order."""
        signed, bounds = (-self.score, -thresholds) if self.keep == "above" else (self.score, thresholds)
        return np.searchsorted(signed, bounds, side="right")

    def share(self, of: Bool[np.ndarray, "clips"], thresholds: Float64[np.ndarray, "t"]) -> Float64[np.ndarray, "t"]:
        """The part of some clips that each threshold keeps, of all of them whether they have a score or not."""
        running = np.concatenate([[0], np.cumsum(of[self.order])])
        return running[self.count(thresholds)] / max(1, int(of.sum()))

    def mean(self, other: Float64[np.ndarray, "clips"], thresholds: Float64[np.ndarray, "t"]) -> Float64[np.ndarray, "t"]:
        """The mean of another score among what each threshold keeps; NaN where it is known of none."""
        values = other[self.order]
        known = np.isfinite(values)
        sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(known, values, 0.0), known))
        at = self.count(thresholds)
        return np.divide(sums[at], counts[at], out=np.full(len(at), np.nan), where=counts[at] > 0)


def correlations(scores: Sequence[Float64[np.ndarray, "clips"]]) -> Float64[np.ndarray, "scores scores"]:
    """Spearman's rank correlation of every two scores, among the clips that have both; NaN where one of them is the same for all.

    Ranks, not values: scores are skewed, and a threshold on one asks only for the order. Of many clips, some spread evenly are taken.
    """
    found = np.eye(len(scores))
    if not len(scores):
        return found
    taken = np.unique(np.linspace(0, max(0, len(scores[0]) - 1), min(len(scores[0]), CORRELATED_CLIPS)).round().astype(int))
    columns = [score[taken] for score in scores]
    known = [np.isfinite(column) for column in columns]
    ranks = [_ranks(column[there]) for column, there in zip(columns, known, strict=True)]
    for i, j in combinations(range(len(columns)), 2):
        both = known[i] & known[j]
        pair = [ranks[k] if len(ranks[k]) == both.sum() else _ranks(columns[k][both]) for k in (i, j)]
        found[i, j] = found[j, i] = _pearson(*pair)
    return found


def _ranks(values: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _pearson(left: Float64[np.ndarray, "n"], right: Float64[np.ndarray, "n"]) -> float:
    if len(left) < 2:
        return float("nan")
    a, b = left - left.mean(), right - right.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else float("nan")
