"""Augmentation against slow oracles (HSV of the standard library, pixel by pixel), sox's own reverberation, and what an ear would check."""

import colorsys
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from train.augment import (
    CONTRAST_AUGMENT,
    PAIR_AUGMENT,
    STEPS,
    AugmentOptions,
    Colour,
    Square,
    augment_pictures,
    augment_sound,
    change_colours,
    cut_square,
    draw_colour,
    draw_square,
    low_pass,
    make_grey,
    middle_square,
    resize,
    reverberate,
    shift_pitch,
)

GOLDEN = np.load(Path(__file__).parents[1] / "model/goldens/reverb.npz")
NOTHING = AugmentOptions(
    p_zoom=0.0, p_flip=0.0, p_colour=0.0, p_grey=0.0, p_reverb=0.0, p_volume=0.0, p_pitch=0.0, p_low_pass=0.0, p_noise=0.0, random_crop=False
)


def pictures(*shape: int) -> Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def tone(hz: float, samples: int = 10240, amplitude: float = 0.4) -> Tensor:
    return amplitude * torch.sin(2 * torch.pi * hz / 16000 * torch.arange(samples))[None]


def loudest_hz(sound: Tensor) -> float:
    return float(torch.fft.rfft(sound[0]).abs().argmax() * 16000 / sound.shape[1])


# --- the square ---


def test_squares_lie_in_the_picture_everywhere_and_some_are_smaller() -> None:
    rng, options = random.Random(3), CONTRAST_AUGMENT
    squares = [draw_square(rng, 256, 341, 224, options) for _ in range(2000)]
    assert {s.side for s in squares} == {192, 224}
    assert 0.17 < sum(s.side == 192 for s in squares) / 2000 < 0.23
    usual = [s for s in squares if s.side == 224]
    assert (min(s.top for s in usual), max(s.top for s in usual)) == (0, 32)
    assert (min(s.left for s in usual), max(s.left for s in usual)) == (0, 117)
    assert all(s.top + s.side <= 256 and s.left + s.side <= 341 for s in squares)


def test_the_middle_is_the_published_one() -> None:
    assert middle_square(256, 341, 224) == Square(16, round(58.5), 224) == Square(16, 58, 224)
    assert draw_square(random.Random(0), 256, 341, 224, NOTHING) == middle_square(256, 341, 224)
    with pytest.raises(ValueError, match="pictures of 341x200 are smaller than the network's square of 224x224"):
        middle_square(200, 341, 224)


def test_a_square_is_cut_out_of_every_picture_and_a_smaller_one_is_scaled() -> None:
    frames = pictures(3, 11, 13)
    assert torch.equal(cut_square(frames, Square(2, 5, 7), 7), frames[:, 2:9, 5:12])
    scaled = cut_square(frames, Square(1, 4, 6), 9)
    expected = torch.nn.functional.interpolate(frames[:, 1:7, 4:10].movedim(-1, 1).float(), (9, 9), mode="bilinear").movedim(1, -1)
    assert scaled.dtype == torch.uint8 and (scaled - expected).abs().max() <= 1.01


def test_smaller_pictures_are_averages() -> None:
    frames = torch.zeros(1, 12, 12, 3, dtype=torch.uint8)
    frames[:, ::2] = 200
    middle = resize(frames, 3, 3)[0, 1, 1]
    assert (middle.int() - 100).abs().max() <= 2


# --- colours ---


def test_hue_turns_as_in_hsv() -> None:
    frames = pictures(1, 5, 7)
    frames[0, 0, 0] = 77  # grey stays grey
    turned = change_colours(frames, Colour(hue=0.17))[0].reshape(-1, 3)
    for before, after in zip(frames[0].reshape(-1, 3).tolist(), turned.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in before))
        expected = [255 * c for c in colorsys.hsv_to_rgb((hue + 0.17) % 1, saturation, value)]
        assert after == pytest.approx(expected, abs=0.51)


@pytest.mark.parametrize("step", STEPS[:3])
def test_colours_change_towards_black_the_mean_or_grey(step: str) -> None:
    frames = pictures(2, 5, 3)
    x = frames.double()
    grey = (x * torch.tensor([0.2989, 0.587, 0.114])).sum(-1, keepdim=True)
    towards = {"brightness": torch.zeros_like(grey), "contrast": grey.mean((1, 2, 3), keepdim=True), "saturation": grey}[step]
    colour = replace(Colour(), **{step: 1.4})
    expected = (towards + 1.4 * (x - towards)).clamp(0, 255)
    assert (change_colours(frames, colour) - expected).abs().max() <= 0.51
    assert torch.equal(change_colours(frames, replace(colour, order=())), frames)


def test_the_order_of_steps_matters_because_they_clip() -> None:
    frames = pictures(1, 4, 4)
    first, last = (change_colours(frames, Colour(brightness=1.8, contrast=0.3, order=order)) for order in (STEPS, STEPS[::-1]))
    assert not torch.equal(first, last)


def test_factors_are_of_the_published_range() -> None:
    rng = random.Random(2)
    drawn = [draw_colour(rng, 1.0) for _ in range(500)]
    for name, low, high in (("brightness", 0.2, 1.8), ("contrast", 0.2, 1.8), ("saturation", 0.2, 1.8), ("hue", -0.2, 0.2)):
        values = [getattr(colour, name) for colour in drawn]
        span = high - low
        assert low <= min(values) < low + 0.05 * span and high - 0.05 * span < max(values) <= high
    assert len({colour.order for colour in drawn}) == 24


def test_grey_has_one_brightness() -> None:
    frames = pictures(2, 3, 5)
    grey = make_grey(frames)
    assert torch.equal(grey[..., 0], grey[..., 1]) and torch.equal(grey[..., 0], grey[..., 2])
    assert make_grey(torch.tensor([200, 100, 50], dtype=torch.uint8).expand(1, 1, 1, 3))[0, 0, 0, 0] == round(200 * 0.2989 + 58.7 + 5.7)


def test_groups_are_drawn_apart_and_pictures_of_a_group_together() -> None:
    frames = pictures(1, 1, 4, 6).expand(40, 3, -1, -1, -1)
    changed = augment_pictures(frames, random.Random(1), CONTRAST_AUGMENT)
    assert changed.is_contiguous() and changed.shape == frames.shape
    assert (changed == changed[:, :1]).all()
    flipped, same = ((changed == like).flatten(1).all(1) for like in (frames.flip(3), frames))
    coloured = ~(flipped | same)
    assert 8 <= flipped.sum() <= 19 and 8 <= same.sum() <= 19 and 6 <= coloured.sum() <= 22
    assert torch.equal(augment_pictures(frames, random.Random(1), CONTRAST_AUGMENT), changed)
    assert torch.equal(augment_pictures(frames, random.Random(1), NOTHING), frames)


# --- sound ---


def test_reverberation_is_that_of_sox() -> None:
    """The figures are what `sox reverb -w` of 14.4.2 answered to these samples, mixed down to one channel."""
    heard = reverberate(torch.from_numpy(GOLDEN["noise"])[None])[0]
    np.testing.assert_allclose(heard, GOLDEN["wet"], atol=2e-7)
    assert np.abs(GOLDEN["wet"]).max() > 0.05


def test_reverberation_comes_after_the_sound() -> None:
    click = torch.zeros(1, 4321)
    click[0, 1000] = 1
    heard = reverberate(click)[0]
    assert heard[:1300].abs().max() < 1e-6 < 1e-3 < heard[1300:2000].abs().max()


@pytest.mark.parametrize(("cents", "hz"), [(1000.0, 712.5), (700.0, 599.3), (1200.0, 800.0)])
def test_pitch_is_another_and_the_length_the_same(cents: float, hz: float) -> None:
    sound = tone(400.0)
    shifted = shift_pitch(sound, cents)
    assert shifted.shape == sound.shape
    assert loudest_hz(shifted) == pytest.approx(hz, abs=1.6)
    inside = slice(1000, 9000)
    assert shifted[:, inside].abs().max() == pytest.approx(0.4, rel=0.02)
    assert torch.equal(shift_pitch(sound, 0.0), sound)


@pytest.mark.parametrize("at", [2000, 5000, 8500])
def test_pitch_leaves_what_happens_where_it_is(at: int) -> None:
    """To 0.01 s, of the 0.2 s that offsets are apart."""
    sound = torch.zeros(1, 10240)
    sound[0, at - 150 : at + 150] = torch.hann_window(300) * torch.sin(torch.arange(300) * 0.5)
    energy = shift_pitch(sound, 1000.0)[0].square()
    centre = float((energy * torch.arange(10240)).sum() / energy.sum())
    assert abs(centre - at) < 160


def test_the_low_pass_takes_12_db_for_an_octave() -> None:
    levels = [low_pass(tone(hz, 16000), 100.0)[0, 8000:].abs().max().item() / 0.4 for hz in (50.0, 100.0, 400.0, 800.0)]
    assert levels == pytest.approx([0.97, 0.707, 1 / 16, 1 / 64], rel=0.03)


@pytest.mark.parametrize(
    ("option", "check"),
    [
        ("p_volume", lambda before, after: torch.allclose(after, (2 * before).clamp(-1, 1))),
        ("p_noise", lambda before, after: 0.0095 < (after - before).std() < 0.0105 and (after[0] - before[0] != after[1] - before[1]).any()),
        ("p_reverb", lambda before, after: torch.allclose(after, reverberate(before), atol=1e-6)),
        ("p_pitch", lambda before, after: torch.equal(after, shift_pitch(before, 1000.0))),
        ("p_low_pass", lambda before, after: torch.equal(after, low_pass(before, 100.0))),
    ],
)
def test_each_effect_has_its_own_probability(option: str, check: Callable[[Tensor, Tensor], bool]) -> None:
    sound = torch.cat([tone(300.0), tone(700.0, amplitude=0.9)])
    kept = sound.clone()
    assert check(sound, augment_sound(sound, random.Random(1), replace(NOTHING, **{option: 1.0})))
    assert torch.equal(sound, kept)
    assert torch.equal(augment_sound(sound, random.Random(1), NOTHING), sound)


def test_a_fifth_of_the_groups_gets_an_effect() -> None:
    sound = tone(300.0, 512).expand(1000, -1)
    louder = (augment_sound(sound, random.Random(4), replace(NOTHING, p_volume=0.2)) != sound).any(1)
    assert 165 < louder.sum() < 235


def test_the_same_seed_gives_the_same_sound() -> None:
    sound = tone(300.0).expand(14, -1)
    first, again, other = (augment_sound(sound, random.Random(seed), CONTRAST_AUGMENT) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- options ---


def test_the_later_stages_only_crop_and_flip() -> None:
    sound, frames = tone(300.0).expand(9, -1), pictures(1, 1, 4, 5).expand(9, 2, -1, -1, -1)
    assert torch.equal(augment_sound(sound, random.Random(1), PAIR_AUGMENT), sound)
    changed = augment_pictures(frames, random.Random(1), PAIR_AUGMENT)
    assert all(torch.equal(c, f) or torch.equal(c, f.flip(2)) for c, f in zip(changed, frames, strict=True))


@pytest.mark.parametrize("wrong", [{"p_zoom": 1.5}, {"p_noise": -0.1}, {"zoom": 0.0}, {"cutoff_hz": 8000.0}, {"pitch_cents": -100.0}])
def test_options_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        replace(CONTRAST_AUGMENT, **wrong)
