import json
from fractions import Fraction
from pathlib import Path

import pytest

from configs.clock import SEGMENT_SECONDS
from model.schedule import Window, WindowPlan, published_schedule, total_steps, windows

ENCODEC = Fraction(6)
DAC = Fraction(441, 64)
PUBLISHED = json.loads((Path(__file__).parent / "goldens" / "generation_schedule.json").read_text())


@pytest.mark.parametrize(
    ("tokens", "window", "stride", "expected"),
    [
        (16, 16, 8, [(0, 16)]),
        (40, 16, 8, [(0, 16), (8, 24), (16, 32), (24, 40)]),
        (40, 16, 16, [(0, 16), (16, 32), (24, 40)]),  # The last window moves less, and is as long as the others.
        (8, 16, 8, [(0, 8)]),
        (24, 24, 24, [(0, 24)]),
        (29, 16, 8, [(0, 16), (8, 24), (13, 29)]),  # Not a whole number of segments.
    ],
)
def test_windows_cover_the_video(tokens: int, window: int, stride: int, expected: list[tuple[int, int]]) -> None:
    made = windows(tokens, ENCODEC, window_tokens=window, stride_tokens=stride)
    assert [(w.tokens[0], w.tokens[-1] + 1) for w in made] == expected
    assert [w.steps for w in made] == [range(6 * start, 6 * stop) for start, stop in expected]


def test_windows_do_not_drift_on_a_clock_that_is_no_whole_number() -> None:
    minute = windows(750, DAC, window_tokens=32, stride_tokens=8)
    assert minute[-1].steps.stop == -(-60 * 44100 // 512)
    assert all(len(w.steps) in (220, 221) for w in minute)
    assert all(abs(w.steps.start - w.tokens[0] * Fraction(2 * 44100, 25 * 512)) <= Fraction(1, 2) for w in minute)


def test_the_last_step_covers_the_end_of_the_video() -> None:
    assert total_steps(32, DAC) == 221 and 221 * 512 >= 112896
    assert total_steps(32, ENCODEC) == 192
    for tokens in range(1, 200):
        made = windows(tokens, DAC, window_tokens=16, stride_tokens=8)
        assert 0 <= made[-1].steps.stop * 512 - tokens * Fraction(2 * 44100, 25) < 512


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 16), (24, 16), (8, 8), (11, 7)])
def test_a_stream_has_the_windows_of_the_whole(window: int, stride: int) -> None:
    """Whatever the pieces: every window once, made when its tokens are there, from tokens and codes that were not let go."""
    for tokens in (*range(1, 70), 301):
        for piece in (1, 5, 64):
            plan, made, seen = WindowPlan(DAC, window_tokens=window, stride_tokens=stride), [], 0
            while seen < tokens:
                seen = min(seen + piece, tokens)
                needed, needed_step = plan.needed, plan.needed_step
                for ready in plan.ready(seen):
                    assert ready.tokens[-1] < seen and ready.tokens[0] >= needed and ready.steps.start >= needed_step
                    made.append(ready)
            needed, needed_step = plan.needed, plan.needed_step
            last = list(plan.last(tokens))
            assert last[0].tokens[0] >= needed and last[0].steps.start >= needed_step
            assert tokens - needed < window + max(stride, piece)
            assert made + last == windows(tokens, DAC, window_tokens=window, stride_tokens=stride)


@pytest.mark.parametrize("case", PUBLISHED)
def test_the_published_schedule(case: str) -> None:
    golden, (duration, stride) = PUBLISHED[case], map(float, case.removeprefix("duration").split("_stride"))
    made = published_schedule(duration, stride, round(duration / float(SEGMENT_SECONDS)))
    assert [[token // 8 for token in w.tokens[::8]] for w in made] == golden["segments"]
    assert all([token % 8 for token in w.tokens] == [*range(8)] * (len(w.tokens) // 8) for w in made)
    assert [len(w.steps) for w in made] == golden["steps"]
    stops = [0, *(w.steps.stop for w in made)]
    assert [stop - w.steps.start for stop, w in zip(stops, made, strict=False)] == golden["prompt"]
    assert stops[-1] == golden["total"]


def test_the_published_schedule_takes_missing_segments_from_the_start() -> None:
    assert published_schedule(2.56, 0.64, 3) == [Window([*range(24), *range(8)], range(220))]
    assert [w.tokens[::8] for w in published_schedule(3.2, 0.64, 4)] == [[0, 8, 16, 24], [8, 16, 24, 0]]


def test_schedules_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="stride of 24"):
        windows(40, ENCODEC, window_tokens=16, stride_tokens=24)
    with pytest.raises(ValueError, match="0 video tokens"):
        windows(0, ENCODEC, window_tokens=16, stride_tokens=8)
    for duration, stride, segments, problem in [(2.56, 1.0, 4, "stride_seconds=1"), (5.12, 3.2, 8, "stride_seconds=3.2"), (0.5, 0.64, 1, "=0.5")]:
        with pytest.raises(ValueError, match=problem):
            published_schedule(duration, stride, segments)
    with pytest.raises(ValueError, match="0 segments"):
        published_schedule(2.56, 0.64, 0)
