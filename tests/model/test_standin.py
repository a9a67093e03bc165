import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.motion_tower import MotionTower, MotionTowerConfig, save_motion_tower
from model.standin import SOUND_BANDS, TowerFit, fit_codec, fit_tower, kmeans, sound_targets
from model.synchformer_visual import VisualTowerConfig, load_tower, normalise

TINY = MotionTowerConfig(image_size=32, reduce=1, channels=8, width=32)


def bounces(clips: int, seed: int, size: int = 32, samples: int = 7_680) -> tuple[Tensor, Tensor]:
    """A square that falls and bounces in each clip's 16 frames, and the sound of it: deep if red, high if blue."""
    generator = torch.Generator().manual_seed(seed)
    frames, waves = torch.full((clips, 16, size, size, 3), 40, dtype=torch.uint8), torch.zeros(clips, samples)
    side, time = size // 4, torch.arange(samples) / samples * 0.64
    for i in range(clips):
        contact, place = (torch.rand(2, generator=generator) * torch.tensor([16, size - side])).tolist()
        red = bool(torch.rand(1, generator=generator) < 0.5)
        for t in range(16):
            top = int((1 - min(1.0, abs(t - contact) / 8)) * (size - side))
            frames[i, t, top : top + side, int(place) : int(place) + side] = torch.tensor([230, 60, 60] if red else [60, 60, 230], dtype=torch.uint8)
        since = time - (contact + 0.5) / 25
        waves[i] = 0.5 * torch.sin(2 * math.pi * (300 if red else 2_500) * since) * torch.exp(-since.clamp(min=0) / 0.03) * (since >= 0)
    return frames, waves


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    frames, waves = bounces(512, seed)
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(0, len(frames), (32,), generator=generator)
        yield frames[chosen], waves[chosen]


def test_the_tower_learns_when_and_how_it_sounds() -> None:
    losses: list[float] = []
    tower = fit_tower(batches(1), TowerFit(tower=TINY, steps=160), progress=lambda _done, _steps, loss: losses.append(loss))
    assert len(losses) == 160
    assert sum(losses[-10:]) < 0.35 * sum(losses[:10])
    assert not tower.training and not any(p.requires_grad for p in tower.parameters())
    # Tokens of clips that it never saw tell red from blue and the token of the contact, to a linear reader.
    frames, waves = bounces(200, seed=3)
    tokens = tower(normalise(frames)[:, None])[:, 0].flatten(0, 1).double()
    wanted = sound_targets(waves, 8)[..., -1].flatten() > 0.6
    inputs = torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1)
    foretold = inputs @ torch.linalg.lstsq(inputs, wanted.double()[:, None]).solution
    assert ((foretold[:, 0] > 0.5) == wanted).double().mean() > 0.95 > 1 - wanted.double().mean()


def test_the_same_seed_fits_the_same_tower_and_data_may_end_early() -> None:
    def fit() -> Tensor:
        return next(fit_tower(itertools.islice(batches(2), 3), TowerFit(tower=TINY)).parameters())

    assert torch.equal(fit(), fit())


def test_a_tower_fitted_on_averaged_pixels_sees_whole_frames_alike(tmp_path: Path) -> None:
    fine = MotionTower(MotionTowerConfig(image_size=56, reduce=4, channels=3, width=5)).eval()
    coarse = MotionTower(MotionTowerConfig(image_size=14, reduce=1, channels=3, width=5)).eval()
    coarse.load_state_dict(fine.state_dict())
    frames = torch.rand(2, 3, 3, 16, 56, 56) * 2 - 1
    averaged = frames.unflatten(-1, (14, 4)).unflatten(-3, (14, 4)).mean((-1, -3))
    assert fine(frames).shape == (2, 3, 8, 5)
    torch.testing.assert_close(fine(frames), coarse(averaged), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fine(frames)[1, 2], fine(frames[1:, 2:])[0, 0])  # each segment by itself
    save_motion_tower(tmp_path / "tower.safetensors", fine)
    loaded = load_tower(tmp_path / "tower.safetensors")
    assert isinstance(loaded, MotionTower) and loaded.config == fine.config
    assert torch.equal(loaded(frames), fine(frames))
    with pytest.raises(ValueError, match="expects"):
        fine(frames[..., :55])
    with pytest.raises(ValueError, match="multiples"):
        MotionTowerConfig(image_size=225)


def test_targets_tell_loudness_pitch_and_onsets() -> None:
    time = torch.arange(15_360) / 24_000
    wave = torch.sin(2 * math.pi * torch.tensor([[150.0], [9_000.0]]) * time) * (time >= 0.36)
    targets = sound_targets(wave, 8)
    assert targets.shape == (2, 8, SOUND_BANDS + 1)
    assert (targets[:, :4, :-1] == -6).all(), "silence until the fifth token"
    assert targets[0, 6, :-1].argmax() < 3 and targets[1, 6, :-1].argmax() == SOUND_BANDS - 1
    assert targets[..., -1].argmax(1).tolist() == [4, 4]
    with pytest.raises(ValueError, match="multiple of 32"):
        sound_targets(wave[:, 1:], 8)


def test_the_stand_in_sees_the_published_towers_frames() -> None:
    ours, published = MotionTowerConfig(), VisualTowerConfig()
    assert (ours.image_size, ours.frames, ours.tokens) == (published.image_size, published.frames, published.tokens)


def test_fitting_a_codec_is_repeatable_and_shrinks_to_the_data() -> None:
    waves = 0.1 * torch.randn(3, 1, 24_000, generator=torch.Generator().manual_seed(0))
    done: list[int] = []
    codecs = [fit_codec(waves, iterations=8, seed=seed, progress=lambda d, _n, _l: done.append(d)) for seed in (0, 0, 1)]
    assert done == [1, 2, 3, 4, 5, 6, 7, 8] * 3
    assert codecs[0].card == 16, "225 steps, at least 8 for an entry"
    states = [codec.state_dict() for codec in codecs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    with pytest.raises(ValueError, match="sound in 0 steps"):
        fit_codec(torch.zeros(1, 1, 9_600))


def test_kmeans_finds_clusters_and_weighs_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(7, 3, generator=generator)
    rows = centres.repeat(101, 1) + 0.1 * torch.randn(707, 3, generator=generator)
    book = kmeans(rows, 29, generator=generator, iterations=30, batch=307)
    assert torch.cdist(centres, book).amin(1).max() < 0.3
    weights = torch.where(torch.arange(707) % 7 == 0, 1.0, 1e-6)
    assert torch.dist(kmeans(rows, 1, weights=weights, generator=generator), centres[:1]) < 0.3
