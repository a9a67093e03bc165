import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.avclip import Avclip, load_avclip, save_avclip, segment_contrast, shifted_windows
from model.motion_tower import MotionTower, MotionTowerConfig
from model.synchformer_audio import AudioTower, AudioTowerConfig, load_audio_tower
from model.synchformer_visual import VisualTower, VisualTowerConfig, load_tower
from tests.model.fill import fill_module, inp

GOLDENS = Path(__file__).parent / "goldens"
GOLDEN = np.load(GOLDENS / "avclip.npz")
SMALL_VISUAL = VisualTowerConfig(image_size=21, patch_size=7, frames=10, tubelet=2, width=22, depth=1, heads=2)
SMALL_AUDIO = AudioTowerConfig(mels=29, frames=23, patch_size=7, stride=5, width=22, depth=1, heads=2)


def features() -> tuple[torch.Tensor, torch.Tensor]:
    visual = inp("clip_v", (2, 14, 16))
    return visual, 0.25 * visual + inp("clip_a", (2, 14, 16))


def small() -> Avclip:
    model = Avclip(VisualTower(SMALL_VISUAL), AudioTower(SMALL_AUDIO)).eval()
    fill_module(model)
    return model


# --- the loss ---


def test_the_loss_is_the_published_one() -> None:
    contrast = segment_contrast(*features(), torch.tensor(0.07))
    assert contrast.loss.item() == pytest.approx(GOLDEN["avclip_loss_scale0.07"], abs=1e-4)
    np.testing.assert_allclose(contrast.similarity.numpy(), GOLDEN["segment_sim_v2a"], atol=1e-4)
    np.testing.assert_allclose(contrast.visual.numpy(), GOLDEN["vfeat_norm"].reshape(28, 16), atol=1e-6)
    np.testing.assert_allclose(contrast.audio.numpy(), GOLDEN["afeat_norm"].reshape(28, 16), atol=1e-6)


@pytest.mark.parametrize("scale", ["0.07", "0.9", "1e-05"])
def test_the_temperature_is_clamped_in_place_before_the_loss(scale: str) -> None:
    model = small()
    torch.nn.init.constant_(model.logit_scale, float(scale))
    model.clamp_temperature()
    assert model.logit_scale.item() == pytest.approx(GOLDEN[f"avclip_clamped_scale{scale}"])
    loss = segment_contrast(*features(), model.logit_scale).loss
    assert loss.item() == pytest.approx(GOLDEN[f"avclip_loss_scale{scale}"], rel=1e-5)


def test_the_temperature_learns() -> None:
    temperature = torch.tensor(0.07, requires_grad=True)
    segment_contrast(*features(), temperature).loss.backward()
    assert temperature.grad is not None and temperature.grad.item() == pytest.approx(GOLDEN["avclip_loss_grad_logit_scale"], rel=1e-4)


def test_the_loss_is_in_float32_under_autocast() -> None:
    visual, audio = features()
    with torch.autocast("cpu", torch.bfloat16):
        under = segment_contrast(visual.bfloat16(), audio.bfloat16(), torch.tensor(0.07))
    expected = segment_contrast(visual.bfloat16().float(), audio.bfloat16().float(), torch.tensor(0.07))
    assert under.loss.dtype == torch.float32
    torch.testing.assert_close(under.loss, expected.loss)


# --- the zero-shot measure ---


@pytest.mark.parametrize("window", [8, 4, 1])
def test_shifted_windows_are_the_published_measure(window: int) -> None:
    found = shifted_windows(*features(), window=window)
    np.testing.assert_allclose(found.similarity.mT.numpy(), GOLDEN[f"w{window}_sim"], atol=1e-5)
    np.testing.assert_array_equal(found.nearest_audio.numpy(), GOLDEN[f"w{window}_preds_a"])
    np.testing.assert_array_equal(found.nearest_visual.numpy(), GOLDEN[f"w{window}_preds_v"])
    np.testing.assert_allclose(found.precision_audio.numpy(), GOLDEN[f"w{window}_precision_a"], atol=1e-6)
    np.testing.assert_allclose(found.precision_visual.numpy(), GOLDEN[f"w{window}_precision_v"], atol=1e-6)
    np.testing.assert_allclose(found.precision.numpy(), GOLDEN[f"w{window}_precision"], atol=1e-6)
    assert found.precision.mean().item() == pytest.approx(GOLDEN[f"w{window}_precision_batch_mean"], abs=1e-6)


def test_a_windows_similarity_is_that_of_all_its_segments_side_by_side() -> None:
    visual, audio = torch.randn(3, 7, 5), torch.randn(3, 7, 5)
    windows = [torch.stack([F.normalize(x, dim=-1)[:, i : i + 3].flatten(1) for i in range(5)], 1) for x in (visual, audio)]
    torch.testing.assert_close(shifted_windows(visual, audio, window=3).similarity, windows[0] @ windows[1].mT)


def test_shifted_sound_is_found_at_its_place() -> None:
    visual = torch.randn(2, 9, 11)
    found = shifted_windows(visual, visual.roll(2, dims=1), window=4)
    assert found.nearest_audio[:, :4].tolist() == [[2, 3, 4, 5]] * 2
    assert shifted_windows(visual, visual, window=4).precision.tolist() == [1, 1]
    with pytest.raises(ValueError, match="window is 9; expected at least 1 and fewer than the 9"):
        shifted_windows(visual, visual, window=9)


# --- the network ---


@pytest.mark.slow
def test_matches_the_reference_at_full_size() -> None:
    with torch.device("meta"):
        model = Avclip(VisualTower(), AudioTower()).eval()
    fill_module(model.to_empty(device="cpu"))
    names = {name: list(t.shape) for name, t in model.state_dict().items()}
    visual, audio = json.loads((GOLDENS / "visual_keys.json").read_text()), json.loads((GOLDENS / "synchformer_keys.json").read_text())["audio"]
    prefixed = {f"v_encoder.{n}": s for n, s in visual.items()} | {f"a_encoder.{n}": s for n, s in audio.items()}
    assert names == prefixed | {"logit_scale": []}
    traces: dict[str, torch.Tensor] = {}
    for name in ("v_encoder", "a_encoder"):
        model.get_submodule(name).register_forward_hook(lambda _module, _args, out, name=name: traces.__setitem__(name, out))
    with torch.inference_mode():
        contrast = model(inp("visual", (1, 2, 3, 16, 224, 224)), inp("spec", (1, 2, 1, 128, 66))[:, :, 0])
    for name, letter in (("v_encoder", "v"), ("a_encoder", "a")):
        np.testing.assert_allclose(traces[name][..., :32].numpy(), GOLDEN[f"a1_{letter}_feats_t_slice"], atol=1e-4)
        np.testing.assert_allclose(traces[name].mean(2).numpy(), GOLDEN[f"a1_{letter}_segment_embedding_raw"], atol=1e-4)
    np.testing.assert_allclose(contrast.visual.numpy(), GOLDEN["a1_v_segment_embedding"], atol=1e-4)
    np.testing.assert_allclose(contrast.audio.numpy(), GOLDEN["a1_a_segment_embedding"], atol=1e-4)
    assert contrast.loss.item() == pytest.approx(GOLDEN["a1_loss"], abs=1e-4)


def test_a_segments_embedding_is_the_mean_of_its_tokens() -> None:
    model, pixels, spectrograms = small(), torch.randn(2, 3, 3, 10, 21, 21), torch.randn(2, 3, 29, 23)
    visual, audio = model.embed(pixels, spectrograms)
    torch.testing.assert_close(visual, model.v_encoder(pixels).mean(2))
    torch.testing.assert_close(audio, model.a_encoder(spectrograms).mean(2))
    assert model(pixels, spectrograms).similarity.shape == (6, 6)


def test_a_few_steps_bring_segments_and_their_sound_together() -> None:
    model, pixels, spectrograms = small().train(), torch.randn(2, 3, 3, 10, 21, 21), torch.randn(2, 3, 29, 23)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        loss = model(pixels, spectrograms).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 < 1 < losses[0]
    assert [name for name, p in model.named_parameters() if p.grad is None] == [f"v_encoder.patch_embed.proj.{n}" for n in ("weight", "bias")]


def test_our_own_file_gives_the_same_network_and_its_towers(tmp_path: Path) -> None:
    model, path = small(), tmp_path / "avclip.safetensors"
    save_avclip(path, model)
    pixels, spectrograms = torch.randn(1, 2, 3, 10, 21, 21), torch.randn(1, 2, 29, 23)
    expected = model.embed(pixels, spectrograms)
    loaded = load_avclip(path)
    assert not any(p.requires_grad for p in loaded.parameters()) and loaded.logit_scale == model.logit_scale
    for found in (loaded.embed(pixels, spectrograms), (load_tower(path)(pixels).mean(2), load_audio_tower(path)(spectrograms).mean(2))):
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_the_stand_in_for_the_visual_tower_can_take_its_place(tmp_path: Path) -> None:
    visual = MotionTower(MotionTowerConfig(image_size=16, reduce=2, frames=10, channels=2, width=22))
    model = Avclip(visual, AudioTower(SMALL_AUDIO)).eval()
    save_avclip(tmp_path / "avclip.safetensors", model)
    loaded = load_avclip(tmp_path / "avclip.safetensors")
    assert isinstance(loaded.v_encoder, MotionTower)
    pixels = torch.randn(1, 2, 3, 10, 16, 16)
    assert torch.equal(loaded.v_encoder(pixels), visual(pixels))


def test_the_published_file_loads_strictly(tmp_path: Path) -> None:
    # One number for each name, spread over the whole shape: a file as small as a test wants it, in the published names and shapes.
    shapes = {"logit_scale": []}
    shapes |= {f"v_encoder.{n}": s for n, s in json.loads((GOLDENS / "visual_keys.json").read_text()).items()}
    shapes |= {f"a_encoder.{n}": s for n, s in json.loads((GOLDENS / "synchformer_keys.json").read_text())["audio"].items()}
    assert len(shapes) == 451
    state = {f"module.{name}": torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(shapes.items())}
    file = {
        "epoch": 7,
        "name": "x",
        "state_dict": state,
        "optimizer": {},
        "metrics": {"sync_w_shifts": {"precision": 0.5}},
        "args": None,
        "scaler": {},
    }
    torch.save(file, tmp_path / "epoch_best.pt")
    loaded = load_avclip(tmp_path / "epoch_best.pt").state_dict()
    assert {name: (t.min().item(), t.max().item()) for name, t in loaded.items()} == {name: (float(i), float(i)) for i, name in enumerate(shapes)}
    del state["module.logit_scale"]
    torch.save(file, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"less\.pt does not fit Avclip: 1 missing \(logit_scale\)"):
        load_avclip(tmp_path / "less.pt")


def test_towers_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="towers of 22 and 24 features"):
        Avclip(VisualTower(SMALL_VISUAL), AudioTower(AudioTowerConfig(width=24, heads=2, depth=1)))
