"""One answer from many windows."""

import numpy as np
import pytest

from pipeline.timeline import Timeline, words


def timeline(*windows: dict[int, float], faults: tuple[str, ...] | None = None, synchronisable: list[float] | None = None) -> Timeline:
    """Windows with these probabilities of classes; the rest is spread over all."""
    probabilities = np.zeros((len(windows), 21), np.float32)
    for row, given in zip(probabilities, windows, strict=True):
        row[list(given)] = list(given.values())
        row += (1 - row.sum()) / 21
    can = None if synchronisable is None else np.array(synchronisable, np.float32)
    starts = np.arange(len(windows)) * 0.64
    return Timeline(9.0, 5.0, starts, probabilities, faults or ("",) * len(windows), np.full(225, 0.1, np.float32), can)


def test_the_offset_lies_between_classes_as_their_probabilities_do() -> None:
    estimate = timeline({13: 0.5, 12: 0.3, 14: 0.1, 0: 0.1}).estimate()
    assert estimate.best == 13 and estimate.seconds == pytest.approx((0.5 * 0.6 + 0.3 * 0.4 + 0.1 * 0.8) / 0.9, abs=1e-3)
    assert estimate.top(2) == [(0.6, pytest.approx(0.5)), (0.4, pytest.approx(0.3))]
    at_the_end = timeline({20: 0.7, 19: 0.2, 0: 0.1}).estimate()
    assert at_the_end.seconds == pytest.approx((0.7 * 2.0 + 0.2 * 1.8) / 0.9, abs=1e-3)


def test_windows_that_are_sure_of_something_else_do_not_move_the_answer() -> None:
    found = timeline(*[{13: 0.6}] * 5, *[{2: 0.95}] * 2, *[{}] * 4).estimate()
    assert found.best == 13 and found.seconds == pytest.approx(0.6, abs=0.01)
    assert found.agreement == pytest.approx(5 / 11)
    neighbours = timeline({12: 0.9}, {13: 0.9}, {14: 0.9}, {15: 0.9}).estimate()
    assert neighbours.agreement == pytest.approx(2 / 4)  # 12 is the first of equals: 13 is within one class of it, 14 and 15 are not
    assert timeline({10: 0.9}, {11: 0.95}, {12: 0.9}).estimate().agreement == 1.0


def test_silent_windows_do_not_count_and_the_others_by_what_can_be_synchronised() -> None:
    faults = ("", "silent", "silent")
    assert timeline({13: 0.5}, {4: 0.9}, {4: 0.9}, faults=faults).estimate().best == 13
    can = timeline({13: 0.5}, {4: 0.5}, {4: 0.5}, synchronisable=[0.9, 0.1, 0.1]).estimate()
    assert can.best == 13 and can.agreement == pytest.approx(0.9 / 1.1) and can.synchronisable == pytest.approx(1.1 / 3)
    assert timeline({13: 0.5}, {4: 0.5}, synchronisable=[0.0, 0.0]).estimate().agreement == 0.5


def test_offsets_in_words() -> None:
    assert words(0.6) == "0.60 s ahead of the pictures" and words(-1.25) == "1.25 s behind the pictures"
    assert words(0.1) == words(-0.1) == "in sync with the pictures"
    assert timeline({10: 0.8}).estimate().in_sync and not timeline({11: 0.9}).estimate().in_sync
