import json
import random
from pathlib import Path

import numpy as np
import pytest

from model.segments import (
    CONTRAST,
    OFFSET,
    SYNC_CLASS,
    SYNCHRONISABLE,
    SegmentGrid,
    class_seconds,
    cut_at,
    draw_cut,
    draw_offset,
    draw_synchronisable,
    index_at,
    offset_class,
    offset_grid,
)

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "offset_grid.json").read_text())
CLIP = (250, 160000)
"""Frames and samples of the clip that the worked examples are about."""


def test_the_grid_of_offsets_is_the_published_one() -> None:
    np.testing.assert_array_equal(offset_grid().numpy(), np.array(GOLDEN["class_grid_float32"], np.float32))
    assert {str(i): class_seconds(i) for i in range(21)} == GOLDEN["index_to_seconds"]
    assert GOLDEN["sync_class"] == SYNC_CLASS and class_seconds(SYNC_CLASS) == 0
    with pytest.raises(ValueError, match="21 classes"):
        class_seconds(21)


@pytest.mark.parametrize("example", GOLDEN["quantize"])
def test_an_offset_between_classes_is_the_nearest(example: dict) -> None:
    assert offset_class(example["sec"]) == example["index"]


def test_segments_lie_where_the_published_ones_do() -> None:
    assert [*OFFSET.frame_starts()] == [2, 10, 18, 26, 34, 42, 50, 58, 66, 74, 82, 90, 98, 106]
    assert [*OFFSET.sample_starts()] == [1280 + 5120 * i for i in range(14)]
    assert [*CONTRAST.frame_starts()] == [13, 29, 45, 61, 77, 93, 109, 125, 141, 157, 173, 189, 205, 221]
    assert [*CONTRAST.sample_starts()] == [8320 + 10240 * i for i in range(14)]
    assert [*SYNCHRONISABLE.frame_starts()] == [8 * i for i in range(13)]
    assert (OFFSET.crop_frames, OFFSET.crop_samples, OFFSET.span_frames) == (125, 80000, 120)
    assert (SYNCHRONISABLE.crop_frames, SYNCHRONISABLE.crop_samples, SYNCHRONISABLE.span_frames) == (112, 71680, 112)


def test_an_instant_becomes_an_index_by_truncation() -> None:
    assert index_at(2.32, 25) == 57 and index_at(0.04, 25) == 1


@pytest.mark.parametrize("example", GOLDEN["fixed_offset_examples"])
def test_fixed_offsets_cut_what_the_published_evaluation_cuts(example: dict) -> None:
    cut = cut_at(example["v_start_i_sec"], example["offset_sec"])
    assert (cut.start_frame, cut.frames) == (example["v_start_frame"], example["v_frames"])
    assert (cut.start_sample, cut.samples) == (example["a_start_sample"], example["a_samples"])
    assert cut.target == example["offset_target"] and class_seconds(cut.target) == pytest.approx(example["offset_label"])


def test_sound_from_before_the_clip_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.5 s with an offset of -0\.6 s begin before"):
        cut_at(0.5, -0.6)


@pytest.mark.parametrize("example", GOLDEN["train_time_examples_no_jitter"])
def test_random_cuts_are_drawn_as_in_the_published_training(example: dict) -> None:
    rng = random.Random(example["random_seed"])
    cut = draw_cut(rng, draw_offset(rng), *CLIP)
    assert cut.offset_seconds == example["offset_sec"] and cut.target == example["offset_target"]
    assert (cut.start_frame, cut.start_sample) == (example["v_start_frame"], example["a_start_sample"])


@pytest.mark.parametrize("example", GOLDEN["train_time_examples_jitter_0_05"])
def test_jitter_is_drawn_as_in_the_published_training(example: dict) -> None:
    rng = random.Random(example["random_seed"])
    cut = draw_cut(rng, draw_offset(rng), *CLIP, jitter_seconds=0.05)
    assert (cut.start_sample, cut.jitter_samples, cut.target) == (example["a_start_sample"], example["a_jitter_i"], example["offset_target"])


@pytest.mark.parametrize("example", GOLDEN["synchability_examples"])
def test_synchronisable_cuts_are_drawn_as_in_the_published_training(example: dict) -> None:
    rng = random.Random(example["random_seed"])
    offset, synchronisable = draw_synchronisable(rng)
    cut = draw_cut(rng, offset, *CLIP, grid=SYNCHRONISABLE)
    assert (offset, int(synchronisable)) == (example["offset_sec"], example["sync_target"])
    assert (cut.start_frame, cut.frames) == (example["v_start_frame"], example["v_frames"])
    assert (cut.start_sample, cut.samples) == (example["a_start_sample"], example["a_samples"])


def test_drawn_cuts_lie_inside_the_clip() -> None:
    grid = SegmentGrid(1.0, 2, 7)
    for seed in range(300):
        rng = random.Random(seed)
        cut = draw_cut(rng, rng.choice([-0.6, 0.0, 0.6]), 43, 43 * 640, grid=grid, jitter_seconds=0.05)
        assert cut.start_frame >= 0 and cut.start_frame + cut.frames <= 43
        assert cut.start_sample >= 0 and cut.start_sample + cut.samples <= 43 * 640


@pytest.mark.parametrize(("offset", "frames", "samples"), [(2.0, 174, 160000), (-2.0, 174, 160000), (0.0, 250, 79999)])
def test_a_clip_too_short_for_the_offset_is_refused(offset: float, frames: int, samples: int) -> None:
    with pytest.raises(ValueError, match=r"too short|too few"):
        draw_cut(random.Random(0), offset, frames, samples)
