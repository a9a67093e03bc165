import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model.standin import SMALL_TOWER, SOUND_BANDS, TowerFit, fit_codec, fit_tower, kmeans, sound_targets
from model.synchformer_visual import VisualTower, VisualTowerConfig

TINY = VisualTowerConfig(image_size=32, patch_size=16, width=32, depth=2, heads=2, drop_path=0.0)


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
    tower = fit_tower(batches(1), TowerFit(tower=TINY, steps=120), progress=lambda _done, _steps, loss: losses.append(loss))
    assert len(losses) == 120
    assert sum(losses[:10]) / 10 > 0.8, "to begin with no better than the mean"
    assert sum(losses[-10:]) / 10 < 0.5
    assert not tower.training and not any(p.requires_grad for p in tower.parameters())


def test_the_same_seed_fits_the_same_tower_and_data_may_end_early() -> None:
    def fit() -> Tensor:
        return fit_tower(itertools.islice(batches(2), 3), TowerFit(tower=TINY)).norm.weight

    assert torch.equal(fit(), fit())


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


def test_the_small_tower_is_small() -> None:
    tower = VisualTower(SMALL_TOWER)
    multiplications = sum(p.numel() for name, p in tower.named_parameters() if p.dim() > 1 and "agg" not in name) * 393
    assert multiplications < 500e6
    assert SMALL_TOWER.image_size == VisualTowerConfig().image_size


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
