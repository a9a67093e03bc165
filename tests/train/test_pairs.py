"""Which stored segments make an example: the offset that was drawn is the one that is there, on every grid, and lists are followed."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.segments import OFFSET, SYNCHRONISABLE, SegmentGrid, offset_class
from train.pairs import DrawPair, ListedPair, StoredGrid

STORED = StoredGrid(OFFSET, "offset", 8, 640)


def found_offset(grid: StoredGrid, visual: int, audio: int) -> float:
    """By how much later the sound starts than the pictures, in seconds."""
    return audio * grid.hop_samples / 16000 - visual * grid.hop_frames / 25


def counts(grid: StoredGrid, frames: int) -> tuple[int, int]:
    """Stored segments of a clip of so many frames."""
    return (frames - 16) // grid.hop_frames + 1, (frames * 640 - 10240) // grid.hop_samples + 1


@settings(deadline=None, database=None, max_examples=200)
@given(seed=st.integers(0, 2**32), hop_frames=st.sampled_from([8, 4, 2]), hop_samples=st.sampled_from([640, 320, 160]), frames=st.integers(176, 300))
def test_an_offset_of_the_grid_is_exact_and_the_jitter_small(seed, hop_frames, hop_samples, frames):
    grid = StoredGrid(OFFSET, "offset", hop_frames, hop_samples)
    visual, audio = counts(grid, frames)
    assert visual >= grid.least_visual and audio >= grid.least_audio  # 7.04 s are enough for every offset
    exact = DrawPair(grid)("clip", random.Random(seed), visual, audio)
    assert exact is not None and offset_class(found_offset(grid, exact.visual, exact.audio)) == exact.target
    assert found_offset(grid, exact.visual, exact.audio) == pytest.approx(-2 + 0.2 * exact.target, abs=1e-9)
    moved = DrawPair(grid, jitter_seconds=0.05)("clip", random.Random(seed), visual, audio)
    assert moved is not None and moved.target == exact.target
    assert abs(found_offset(grid, moved.visual, moved.audio) - (-2 + 0.2 * moved.target)) <= 0.05 + hop_samples / 16000 / 2
    for pair in (exact, moved):
        assert 0 <= pair.visual <= visual - grid.visual_span and 0 <= pair.audio <= audio - grid.audio_span


def test_all_offsets_places_and_jitters_are_drawn():
    visual, audio = counts(STORED, 250)
    assert (visual, audio) == (30, 235)
    drawn = [DrawPair(STORED, 0.05)("clip", random.Random(seed), visual, audio) for seed in range(2000)]
    assert all(drawn) and {pair.target for pair in drawn} == set(range(21))
    assert {pair.visual for pair in drawn} == set(range(17))
    jitters = [round((found_offset(STORED, pair.visual, pair.audio) + 2 - 0.2 * pair.target) * 25) for pair in drawn]
    assert sorted(set(jitters)) == [-1, 0, 1] and 500 < jitters.count(0) < 1000
    offsets = [pair.target for pair in drawn]
    assert all(60 < offsets.count(target) < 140 for target in range(21))


def test_a_clip_too_short_for_an_offset_gives_no_pair():
    visual, audio = counts(STORED, 130)
    found = {seed: DrawPair(STORED)("clip", random.Random(seed), visual, audio) for seed in range(200)}
    targets = {pair.target for pair in found.values() if pair is not None}
    assert None in found.values() and targets == {9, 10, 11, 8, 12} & targets and 10 in targets


def test_half_of_stage_three_cannot_be_synchronised():
    grid = StoredGrid(SYNCHRONISABLE, "synchronisable", 8, 640)
    visual, audio = counts(grid, 250)
    assert visual >= grid.least_visual and audio >= grid.least_audio
    drawn = [DrawPair(grid)("clip", random.Random(seed), visual, audio) for seed in range(1000)]
    far = [abs(found_offset(grid, pair.visual, pair.audio)) for pair in drawn if pair is not None and pair.target == 0]
    near = [abs(found_offset(grid, pair.visual, pair.audio)) for pair in drawn if pair is not None and pair.target == 1]
    assert len(far) + len(near) == 1000 and 420 < len(far) < 580
    assert {round(seconds, 9) for seconds in far} == {4.48} and max(near) == pytest.approx(2.0)


def test_a_list_says_where_and_by_how_much():
    listed = ListedPair(STORED, {"a": (0.24, 0.4), "b": (3.0, -1.6), "c": (4.9, 1.8), "d": (1.0, 0.1)})
    visual, audio = counts(STORED, 250)
    rng = random.Random(0)
    exact = listed("a", rng, visual, audio)  # its first segment begins at frame 8, which is stored
    assert exact is not None and (exact.visual, exact.audio, exact.target) == (1, 8 + 10, 12)
    near = listed("b", rng, visual, audio)  # frame 77, the nearest of which is 80
    assert near is not None and near.visual == 10 and found_offset(STORED, near.visual, near.audio) == pytest.approx(-1.6) and near.target == 2
    between = listed("d", rng, visual, audio)
    assert between is not None and abs(found_offset(STORED, between.visual, between.audio) - 0.1) <= 0.02 and between.target == offset_class(0.1)
    assert listed("c", rng, visual, audio) is None and listed("not there", rng, visual, audio) is None


def test_hops_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"pictures every 16 frames .* expected a divisor of 8"):
        StoredGrid(OFFSET, "offset", 16, 640)
    with pytest.raises(ValueError, match=r"sound every 700 samples .* expected a divisor of 5120"):
        StoredGrid(OFFSET, "offset", 8, 700)
    assert StoredGrid(SegmentGrid(2.56, 6, 8), "offset", 4, 160).audio_stride == 32
