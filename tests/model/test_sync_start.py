"""The aligned start: a module that was never trained finds the offset between tokens that have something in common, and learns on."""

import pytest
import torch

from model.segments import SYNC_CLASS, offset_grid
from model.sync_start import audio_seconds, scale_answers, shared_directions, start_aligned, visual_seconds
from model.synchformer import SyncConfig, SyncModule

CONFIG = SyncConfig(visual_width=23, audio_width=19, width=256, depth=3, heads=8, mlp_ratio=2)


def clips(config: SyncConfig, offsets: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of clips in which some things happen that both kinds of tokens show, each in its own directions, among noise of their own."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(3, config.visual_width + config.audio_width, generator=torch.Generator().manual_seed(1))
    visual, audio = [], []
    for offset in offsets:
        times, strengths = torch.rand(9, generator=generator) * 10 - 2.5, torch.rand(9, 3, generator=generator) + 0.5
        for tokens, seconds, part in (
            (visual, visual_seconds(config), directions[:, : config.visual_width]),
            # Sound that starts later in the file by the offset hears everything earlier.
            (audio, audio_seconds(config) + offset, directions[:, config.visual_width :]),
        ):
            shown = torch.exp(-0.5 * ((seconds[:, None] - times) / 0.08) ** 2) @ strengths @ part
            own = torch.randn(len(seconds), part.shape[1], generator=generator) * 0.3 + torch.randn(part.shape[1], generator=generator)
            tokens.append(shown + own)
    shape = (config.segments, -1)
    return torch.stack([v.unflatten(0, shape) for v in visual]), torch.stack([a.unflatten(0, shape) for a in audio])


def drawn(config: SyncConfig, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    target = torch.randint(config.offset_classes, (count,), generator=torch.Generator().manual_seed(seed))
    return *clips(config, offset_grid()[target], seed), target


@pytest.fixture(scope="module")
def aligned() -> SyncModule:
    torch.manual_seed(0)
    module = SyncModule(CONFIG)
    start_aligned(module, *clips(CONFIG, torch.zeros(60), seed=2))
    return module


def test_offsets_are_found_before_any_training(aligned):
    loss = scale_answers(aligned, *drawn(CONFIG, 60, seed=3))
    visual, audio, target = drawn(CONFIG, 100, seed=4)
    with torch.no_grad():
        away = (aligned.eval()(visual, audio).argmax(1) - target).abs()
    assert loss < 2.2  # chance: 3.04
    assert (away <= 1).float().mean() > 0.7 and (away == 0).float().mean() > 0.5  # chance: 0.14 and 0.05


def test_a_random_start_finds_nothing():
    torch.manual_seed(0)
    visual, audio, target = drawn(CONFIG, 100, seed=4)
    with torch.no_grad():
        away = (SyncModule(CONFIG).eval()(visual, audio).argmax(1) - target).abs()
    assert (away <= 1).float().mean() < 0.3


def test_every_parameter_learns_from_there(aligned):
    visual, audio, target = drawn(CONFIG, 8, seed=5)
    torch.nn.functional.cross_entropy(aligned(visual, audio), target).backward()
    gradients = {name: p.grad for name, p in aligned.named_parameters()}
    aligned.zero_grad()
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())
    still = [name for name, gradient in gradients.items() if gradient is not None and not gradient.any()]
    assert not still


def test_shared_directions_are_those_in_common():
    visual, audio = clips(CONFIG, torch.zeros(60), seed=2)
    shared = shared_directions(visual, audio, CONFIG, 4)
    assert (shared.strength[:3] > 0.4).all() and shared.strength[3] < 0.2  # three things that both show
    moved = shared_directions(visual, audio.roll(1, 0), CONFIG, 4)  # the sound of other clips
    assert (moved.strength < 0.2).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 96}, r"width 96, depth 3 and 8 heads is too small .* a width of 144 or more"),
        ({"depth": 1}, r"too small for the aligned start; expected a depth of 2"),
        ({"head": "synchronisable"}, r"stage 3 starts from stage 2's weights"),
    ],
)
def test_what_has_no_aligned_start(changes, message):
    config = SyncConfig(**{**vars(CONFIG), **changes})
    with pytest.raises(ValueError, match=message):
        start_aligned(SyncModule(config), *clips(CONFIG, torch.zeros(3), seed=2))


def test_the_published_size_has_one():
    config = SyncConfig(visual_width=23, audio_width=19)
    torch.manual_seed(0)
    module = SyncModule(config)
    start_aligned(module, *clips(config, torch.zeros(40), seed=2))
    visual, audio, target = drawn(config, 12, seed=4)
    with torch.no_grad():
        away = (module.eval()(visual, audio).argmax(1) - target).abs()
    assert (away <= 1).float().mean() > 0.7 and SYNC_CLASS == 10
