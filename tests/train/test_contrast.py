"""Stage I's module on networks of a few thousand weights: its loss, its figures, its pictures, and that it learns."""

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from model.avclip import Avclip, load_avclip, save_avclip, segment_contrast, shifted_windows
from model.motion_tower import MotionTower, MotionTowerConfig
from model.synchformer_audio import AudioTower, AudioTowerConfig, LogMel
from model.synchformer_visual import VisualTower, VisualTowerConfig, normalise
from train.contrast import ContrastModule, ContrastOptions, blocks, checkpoint_blocks, forward_flops, gathered, picture, similarities, trainable
from train.data import Clips
from train.module import StepOptions
from train.optim import OptimiserConfig, ScheduleConfig
from train.previews import COLOURS
from train.trainer import Described

ROOT = Path(__file__).parents[2]
OPTIONS = StepOptions(3, OptimiserConfig(learning_rate=3e-3, clip_by="norm"), ScheduleConfig(warmup_steps=2), 40, 1, True)
FEW = ContrastOptions(window=2)


@dataclass(frozen=True)
class Run:
    """What a run folder would say."""

    train: dict[str, Any]

    def identity(self) -> dict[str, Any]:
        return {"model": "small"}

    @staticmethod
    def completed(identity: Any) -> dict[str, Any]:
        return dict(identity)


RUN: Described = Run({})


def small(drop_path: float = 0.0) -> Avclip:
    torch.manual_seed(5)
    visual = VisualTowerConfig(image_size=14, patch_size=7, width=22, depth=2, heads=2, drop_path=drop_path)
    return Avclip(VisualTower(visual), AudioTower(AudioTowerConfig(mels=29, patch_size=7, stride=5, width=22, depth=1, heads=2)))


def clips(count: int = 3, segments: int = 5, seed: int = 1) -> Clips:
    """Segments of one colour that sound at a height of their own, which goes with the colour."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(count, segments, generator=generator)
    pixels = (level * 255).to(torch.uint8)[..., None, None, None, None].expand(-1, -1, 16, 14, 14, 3).contiguous()
    sound = 0.3 * torch.sin((level[..., None] * 0.8 + 0.1) * torch.arange(10240))
    return Clips(pixels, sound, torch.full((count,), 10), count)


def module(model: Avclip, contrast: ContrastOptions = FEW, **how: bool) -> ContrastModule:
    return ContrastModule(OPTIONS, RUN, model, contrast, **how)


# --- a step ---


def test_the_loss_and_the_figures_are_those_of_normalised_segments() -> None:
    model, batch = small(), clips()
    torch.nn.init.constant_(model.logit_scale, 0.9)
    step = module(model).training_step(batch)
    visual, audio = model.v_encoder(normalise(batch.pixels)).mean(2), model.a_encoder(LogMel(model.a_encoder.config)(batch.sound)).mean(2)
    # The temperature was brought into its range first.
    torch.testing.assert_close(step["loss"], segment_contrast(visual, audio, torch.tensor(0.5)).loss)
    assert step["loss"].requires_grad and not step["figures"].requires_grad
    named = dict(zip(ContrastModule.FIGURES.names, step["figures"].tolist(), strict=True))
    accuracy = shifted_windows(visual, audio, window=2).precision.mean().item()
    assert named == pytest.approx({"loss": step["loss"].item(), "shifted_window_accuracy": accuracy, "temperature": 0.5})
    assert ContrastModule.FIGURES.best in named and ContrastModule.FIGURES.larger_is_better


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_and_the_loss_is_whole(precision: torch.dtype) -> None:
    steps, batch = module(small()), clips()
    expected = steps.training_step(batch)["loss"]
    with torch.autocast("cpu", precision):
        step = steps.training_step(batch)
    assert step["loss"].dtype == step["figures"].dtype == torch.float32
    assert step["loss"].item() == pytest.approx(expected.item(), rel=0.02) and step["loss"].item() != expected.item()


def test_every_weight_that_is_trained_has_a_gradient(tmp_path: Path) -> None:
    """Else data parallelism would wait for one; and a network that was loaded is trained whole."""
    save_avclip(tmp_path / "avclip.safetensors", small())
    loaded = load_avclip(tmp_path / "avclip.safetensors")
    assert not any(p.requires_grad for p in loaded.parameters())
    step = module(trainable(loaded)).training_step(clips())
    step["loss"].backward()
    assert loaded.training
    assert sorted(name for name, p in loaded.named_parameters() if p.grad is None) == [
        "v_encoder.patch_embed.proj.bias",
        "v_encoder.patch_embed.proj.weight",
    ]


def test_what_is_saved_is_the_network() -> None:
    model = small()
    assert set(module(model, checkpoint_activations=True).state_dict()) == {f"model.{name}" for name in model.state_dict()}


def test_blocks_computed_again_give_the_same_gradients() -> None:
    gradients, calls = [], []
    for again in (False, True):
        model = trainable(small(drop_path=0.5))
        count = [0]
        for block in blocks(model):
            block.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
            plain = block.forward
            block.forward = lambda *inputs, plain=plain, count=count: (count.__setitem__(0, count[0] + 1), plain(*inputs))[1]
        if again:
            checkpoint_blocks(model)
        torch.manual_seed(9)
        module(model).training_step(clips())["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        calls.append(count[0])
        with torch.no_grad():
            before = count[0]
            module(model.eval()).validation_step(clips())
            assert count[0] - before == 2 * len(blocks(model))
    # Each block is called once by the network and once more for the backward pass; hooks on it see the first alone.
    assert calls == [2 * 3, 3 * 3]
    torch.testing.assert_close(gradients[0], gradients[1])


def gradients_of(rank: int, meet: str) -> None:
    """The gradients of one process of two, each with half of the clips, averaged, against those of one with all."""
    generator = torch.Generator().manual_seed(1)
    v, a, w = (torch.randn(*shape, generator=generator) for shape in ((4, 3, 5), (4, 3, 5), (5, 7)))
    weights = [w.requires_grad_(), torch.tensor(0.3, requires_grad=True)]
    whole = torch.autograd.grad(segment_contrast(gathered(v) @ w, a @ w, weights[1]).loss, weights)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    try:
        mine = slice(2 * rank, 2 * rank + 2)
        parts = torch.autograd.grad(segment_contrast(gathered(v[mine] @ w), gathered(a[mine] @ w), weights[1]).loss, weights)
        for part in parts:
            torch.distributed.all_reduce(part)
        torch.testing.assert_close([part / 2 for part in parts], list(whole))
    finally:
        torch.distributed.destroy_process_group()


def test_negatives_of_all_processes_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    program = f"from tests.train.test_contrast import gradients_of; gradients_of(1, '{tmp_path}/meet')"
    other = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        gradients_of(0, f"{tmp_path}/meet")
        errors = other.communicate(timeout=120)[1]
    finally:
        other.kill()
    assert other.returncode == 0, errors


# --- training ---


def test_it_learns_under_lightning_in_half_precision() -> None:
    model = trainable(small(drop_path=0.1))
    steps = module(model, ContrastOptions(window=3))
    seen: list[Tensor] = []

    class Loader:
        def __iter__(self) -> Iterator[Clips]:
            yield from (clips(2, seed=seed) for seed in range(100, 130))

    steps.on_train_batch_end = lambda outputs, *_: seen.append(outputs["figures"])  # pyright: ignore[reportAttributeAccessIssue]
    trainer = Trainer(
        max_steps=30,
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(steps, Loader())
    losses, accuracies, temperatures = torch.stack(seen).T
    assert losses[0] == pytest.approx(math.log(10), abs=0.7)
    assert losses[-8:].mean() < losses[:4].mean() - 0.7 and accuracies[-8:].mean() > accuracies[:4].mean()
    assert len(set(temperatures.tolist())) > 25


def test_the_stand_in_tower_has_no_blocks_and_trains() -> None:
    visual = MotionTower(MotionTowerConfig(image_size=14, reduce=1, channels=2, width=22))
    model = Avclip(visual, small().a_encoder)
    assert len(blocks(model)) == 1
    module(model, checkpoint_activations=True).training_step(clips())["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert 2 * forward_flops(model, 3) == forward_flops(model, 6) > 0


def test_the_published_networks_work_is_what_its_matrices_are() -> None:
    with torch.device("meta"):
        model = Avclip(VisualTower(), AudioTower())
    width, tokens, heard = 768, 1569, 74
    products = 2 * 12 * width**2 * (16 * tokens + 12 * heard)
    assert products < forward_flops(model, 1) < 1.15 * products


# --- validation ---


def test_validation_shows_how_alike_its_first_clips_are() -> None:
    model = small().eval()
    steps = module(model, ContrastOptions(window=2, shown_clips=2))
    assert steps.validation_pictures() == {}
    steps.on_validation_start()
    for seed in (1, 2):
        step = steps.validation_step(clips(seed=seed))
        assert step["figures"].shape == (3,)
    drawn = steps.validation_pictures()
    assert set(drawn) == {"visual_visual", "audio_audio", "visual_audio", "audio_visual"}
    assert all(image.dtype == np.uint8 and image.shape == (80, 80, 3) for image in drawn.values())
    with torch.no_grad():
        visual, audio = steps.embed(clips(count=3, seed=1))
    for name, matrix in similarities(visual[:2], audio[:2]).items():
        np.testing.assert_array_equal(drawn[name], picture(matrix))
    steps.on_validation_start()
    assert steps.validation_pictures() == {}


def test_similarities_are_cosines_rows_first() -> None:
    visual, audio = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    found = similarities(visual, audio)
    expected = torch.nn.functional.cosine_similarity(visual[1, 0], audio[0, 2], dim=0)
    assert found["visual_audio"][3, 2].item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(found["audio_visual"], found["visual_audio"].T)
    torch.testing.assert_close(found["audio_audio"].diagonal(), torch.ones(6))


def test_a_picture_has_the_whole_scale_in_every_row() -> None:
    image = picture(torch.tensor([[1.0, 2.0, 1.5], [-3.0, -3.1, -3.2]]), pixels=2)
    assert image.shape == (4, 6, 3)
    assert [tuple(int(c) for c in image[y, x]) for y, x in ((0, 0), (1, 3), (0, 4), (2, 0), (3, 5))] == [
        COLOURS[0], COLOURS[-1], COLOURS[2], COLOURS[-1], COLOURS[0],
    ]  # fmt: skip
    assert (picture(torch.full((2, 2), 0.3)) == np.array(COLOURS[0])).all()


@pytest.mark.parametrize("wrong", [{"window": 0}, {"shown_clips": 0}])
def test_options_that_cannot_be(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"contrast.{next(iter(wrong))}=0: expected 1 or more"):
        ContrastOptions(**wrong)


def test_a_window_needs_more_segments_than_it_has() -> None:
    with pytest.raises(ValueError, match="window is 8; expected at least 1 and fewer than the 5"):
        module(small(), ContrastOptions()).training_step(clips())
