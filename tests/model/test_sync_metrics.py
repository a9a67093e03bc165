"""Measures against slow counting by hand, and intervals against what they must cover."""

import math
import random
from itertools import product

import pytest
import torch

from model.sync_metrics import Kept, accuracy, accuracy_by_threshold, auc_interval, auc_roc, hits, interval


def test_hits_count_classes_not_their_order() -> None:
    logits = torch.zeros(5, 7)
    for row, best in enumerate([0, 3, 3, 6, 2]):
        logits[row, best] = 1.0
    targets = torch.tensor([0, 4, 1, 5, 2])
    assert hits(logits, targets).tolist() == [True, False, False, False, True]
    assert hits(logits, targets, within=1).tolist() == [True, True, False, True, True]
    assert accuracy(logits, targets) == pytest.approx(2 / 5) and accuracy(logits, targets, within=2) == 1.0
    assert hits(torch.zeros(1, 3), torch.tensor([0])).item()  # the first of equals
    assert math.isnan(accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)))


@pytest.mark.parametrize("levels", [3, 1000])
def test_auc_is_how_often_a_positive_is_above_a_negative(levels: int) -> None:
    rng = random.Random(levels)
    scores, positive = [rng.randrange(levels) / 7 for _ in range(53)], [rng.random() < 0.3 for _ in range(53)]
    pairs = list(product([s for s, p in zip(scores, positive, strict=True) if p], [s for s, p in zip(scores, positive, strict=True) if not p]))
    expected = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
    assert auc_roc(torch.tensor(scores), torch.tensor(positive)) == pytest.approx(expected, abs=1e-12)


def test_auc_of_the_ends() -> None:
    scores = torch.tensor([0.1, 0.2, 0.8, 0.9])
    assert auc_roc(scores, torch.tensor([False, False, True, True])) == 1.0
    assert auc_roc(scores, torch.tensor([True, True, False, False])) == 0.0
    assert auc_roc(torch.ones(4), torch.tensor([True, False, True, False])) == 0.5
    assert math.isnan(auc_roc(scores, torch.ones(4, dtype=torch.bool))) and math.isnan(auc_roc(torch.zeros(0), torch.zeros(0, dtype=torch.bool)))


def test_accuracy_among_what_a_threshold_keeps() -> None:
    hit, probability = torch.tensor([True, False, True, False, True]), torch.tensor([0.9, 0.5, 0.7, 0.1, 0.4])
    rows = accuracy_by_threshold(hit, probability, [0.0, 0.5, 0.75, 0.95])
    assert rows[:3] == [Kept(0.0, 5, 3 / 5), Kept(0.5, 2, 1.0), Kept(0.75, 1, 1.0)]
    assert rows[3].kept == 0 and math.isnan(rows[3].accuracy)


def test_an_interval_is_that_of_a_share() -> None:
    n, share = 1009, 0.37
    values = torch.arange(n) < round(n * share)
    low, high = interval(values)
    spread = 1.96 * math.sqrt(share * (1 - share) / n)
    assert low == pytest.approx(share - spread, abs=0.004) and high == pytest.approx(share + spread, abs=0.004)
    assert interval(values) == (low, high) != interval(values, seed=1)
    narrower = interval(values, level=0.5)
    assert low < narrower[0] < share < narrower[1] < high


def test_answers_about_one_clip_are_not_several_clips() -> None:
    once = torch.rand(83) < 0.5
    keys = [f"clip{n}" for n in range(83)]
    assert interval(once.repeat_interleave(7), [key for key in keys for _ in range(7)]) == pytest.approx(interval(once, keys))
    wrong = interval(once.repeat_interleave(7))
    assert wrong[1] - wrong[0] < 0.5 * (interval(once)[1] - interval(once)[0])
    # Clips that are asked about more often weigh more, as in the mean itself.
    low, high = interval(torch.tensor([1.0] * 99 + [0.0]), ["a"] * 99 + ["b"])
    assert (low, high) == (0.0, 1.0)


def test_intervals_of_the_area() -> None:
    positive = torch.arange(401) % 3 == 0
    scores = torch.randn(401) + positive.float()
    low, high = auc_interval(scores, positive)
    assert low < auc_roc(scores, positive) < high and 0.05 < high - low < 0.15
    assert auc_interval(scores.repeat(2), positive.repeat(2), [*range(401), *range(401)]) == pytest.approx((low, high))
    assert all(map(math.isnan, auc_interval(scores, torch.ones(401, dtype=torch.bool))))


def test_of_less_than_two_clips_one_cannot_tell() -> None:
    assert all(
        map(math.isnan, (*interval(torch.ones(3), ["a"] * 3), *interval(torch.zeros(0)), *auc_interval(torch.zeros(0), torch.zeros(0).bool())))
    )
    with pytest.raises(ValueError, match="2 groups for 3 values"):
        interval(torch.ones(3), ["a", "b"])
    with pytest.raises(ValueError, match="level is 95"):
        interval(torch.ones(3), level=95.0)
