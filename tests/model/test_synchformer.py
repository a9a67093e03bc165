import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from model.motion_tower import MotionTower, MotionTowerConfig
from model.synchformer import Head, SyncConfig, Synchformer, SyncModule, load_synchformer, save_synchformer
from model.synchformer_audio import AudioTower, AudioTowerConfig, load_audio_tower
from model.synchformer_visual import VisualTower, VisualTowerConfig, load_tower
from tests.model.fill import checksum, fill_module, inp

GOLDENS = Path(__file__).parent / "goldens"
GOLDEN = np.load(GOLDENS / "sync.npz")
KEYS = json.loads((GOLDENS / "synchformer_keys.json").read_text())
SMALL_VISUAL = VisualTowerConfig(image_size=21, patch_size=7, frames=10, tubelet=2, width=22, depth=1, heads=2)
SMALL_AUDIO = AudioTowerConfig(mels=29, frames=23, patch_size=7, stride=5, width=26, depth=1, heads=2)
SMALL = SyncConfig(segments=3, visual_tokens=5, visual_width=22, audio_tokens=4, audio_width=26, width=21, depth=3, heads=3, offset_classes=7)


def tokens(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, 5, 22), torch.randn(batch, 3, 4, 26)


def segments(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, 3, 10, 21, 21), torch.randn(batch, 3, 29, 23)


def small(config: SyncConfig = SMALL) -> Synchformer:
    model = Synchformer(VisualTower(SMALL_VISUAL), AudioTower(SMALL_AUDIO), config).eval()
    fill_module(model)
    return model


def filled(config: SyncConfig) -> SyncModule:
    with torch.device("meta"):
        module = SyncModule(config).eval()
    fill_module(module.to_empty(device="cpu"))
    return module


# --- the network ---


@pytest.fixture(scope="module")
def published() -> SyncModule:
    return filled(SyncConfig())


@torch.inference_mode()
def test_offset_logits_are_the_published_ones(published: SyncModule) -> None:
    assert published.config.tokens == GOLDEN["seq_len"]
    logits = published(inp("sync_vis", (1, 14, 8, 768)), inp("sync_aud", (1, 14, 6, 768)))
    np.testing.assert_allclose(logits.numpy(), GOLDEN["logits_21"], atol=1e-4)
    assert F.cross_entropy(logits, torch.tensor([7])).item() == pytest.approx(GOLDEN["loss_target7"], abs=1e-4)


@torch.inference_mode()
def test_a_batch_matches_the_reference_step_by_step(published: SyncModule) -> None:
    visual, audio = inp("sync_vis_b2", (2, 14, 8, 768)), inp("sync_aud_b2", (2, 14, 6, 768))
    logits = published(visual, audio)
    np.testing.assert_allclose(logits.numpy(), GOLDEN["b2_logits"], atol=1e-4)
    assert F.cross_entropy(logits, torch.tensor([3, 20])).item() == pytest.approx(GOLDEN["b2_loss"], abs=1e-4)
    transformer = published.transformer
    x = transformer.embed(published.vproj(visual).flatten(1, 2), published.aproj(audio).flatten(1, 2))
    np.testing.assert_allclose(checksum(x.numpy()), GOLDEN["b2_tokens_in_sum"], atol=1e-4)
    for i, block in enumerate(transformer.blocks):
        x = block(x)
        if i == 0:
            np.testing.assert_allclose(checksum(x.numpy()), GOLDEN["b2_block0_out_sum"], atol=1e-4)
    np.testing.assert_allclose(checksum(transformer.ln_f(x).numpy()), GOLDEN["b2_ln_f_out_sum"], atol=1e-4)


@torch.inference_mode()
def test_synchronisability_logits_are_the_published_ones() -> None:
    module = filled(SyncConfig(head="synchronisable", segments=13))
    assert module.config.tokens == 184
    logits = module(inp("synch3_vis", (1, 13, 8, 768)), inp("synch3_aud", (1, 13, 6, 768)))
    np.testing.assert_allclose(logits.numpy(), GOLDEN["logits_2"], atol=1e-4)


@pytest.mark.parametrize(("head", "count"), [("offset", 14), ("synchronisable", 13)])
def test_names_and_shapes_are_those_of_the_published_files(head: Head, count: int) -> None:
    with torch.device("meta"):
        model = Synchformer(VisualTower(), AudioTower(), SyncConfig(head=head, segments=count))
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == published_shapes(head)


def published_shapes(head: Head) -> dict[str, list[int]]:
    visual = json.loads((GOLDENS / "visual_keys.json").read_text())
    towers = {f"vfeat_extractor.{n}": s for n, s in visual.items()} | {f"afeat_extractor.{n}": s for n, s in KEYS["audio"].items()}
    return towers | KEYS[head]


@torch.inference_mode()
def test_asking_only_the_first_token_changes_nothing() -> None:
    module = small()
    visual, audio = tokens()
    x = module.transformer.embed(module.vproj(visual).flatten(1, 2), module.aproj(audio).flatten(1, 2))
    for block in module.transformer.blocks:
        x = block(x)
    expected = module.transformer.get_submodule("off_head")(module.transformer.ln_f(x)[:, 0])
    torch.testing.assert_close(module.compare(visual, audio), expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_clips_do_not_see_each_other() -> None:
    model, (pixels, spectrograms) = small(), segments()
    one_by_one = torch.cat([model(pixels[i : i + 1], spectrograms[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(model(pixels, spectrograms), one_by_one, atol=1e-5, rtol=1e-5)
    assert one_by_one.shape == (2, 7)


@torch.inference_mode()
def test_pixels_and_their_tokens_give_the_same_answer() -> None:
    model, (pixels, spectrograms) = small(), segments()
    stored = model.vfeat_extractor(pixels), model.afeat_extractor(spectrograms)
    torch.testing.assert_close(model(pixels, spectrograms), model.compare(*stored))


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.06), (torch.float16, 0.006)])
def test_half_precision_is_close(dtype: torch.dtype, share: float) -> None:
    model, (visual, audio) = small(), tokens(23)
    expected = model.compare(visual, audio)
    with torch.autocast("cpu", dtype):
        assert 1e-6 < (model.compare(visual, audio).float() - expected).std() / expected.std() < share
    logits = model.to(dtype).compare(visual, audio)
    assert logits.dtype == dtype
    assert 1e-6 < (logits.float() - expected).std() / expected.std() < share


def test_every_parameter_is_trained_and_a_few_clips_are_learned() -> None:
    module, (visual, audio) = SyncModule(SMALL), tokens(7)
    optimizer, targets = torch.optim.Adam(module.parameters(), 3e-3), torch.arange(7)
    for _ in range(60):
        loss = F.cross_entropy(module(visual, audio), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []
    assert module.eval()(visual, audio).argmax(1).tolist() == targets.tolist()


def test_dropout_is_of_training_only() -> None:
    module, (visual, audio) = SyncModule(SMALL), tokens()
    assert not torch.equal(module(visual, audio), module(visual, audio))
    module.eval()
    assert torch.equal(module(visual, audio), module(visual, audio))
    undropped = SyncModule(SyncConfig(**{**vars(SMALL), "dropout": 0.0}))
    assert torch.equal(undropped(visual, audio), undropped(visual, audio))


def test_wrong_sizes_are_refused_with_both_shapes() -> None:
    visual, audio = tokens()
    with pytest.raises(ValueError, match=r"\(2, 5, 22\) and \(2, 4, 26\); expected \(3, 5, 22\) of pictures and \(3, 4, 26\) of sound"):
        small().compare(visual[:, :2], audio[:, :2])
    with pytest.raises(ValueError, match="an odd number"):
        SyncConfig(offset_classes=20)
    with pytest.raises(ValueError, match="towers of 5 tokens of 22 and 4 of 26 do not fit"):
        small(SyncConfig())


# --- files ---


def test_our_own_file_gives_the_same_network_and_its_towers(tmp_path: Path) -> None:
    model, path, (pixels, spectrograms) = small(), tmp_path / "sync.safetensors", segments()
    save_synchformer(path, model)
    loaded = load_synchformer(path)
    assert loaded.config == SMALL and not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(pixels, spectrograms), model(pixels, spectrograms))
    assert torch.equal(load_tower(path)(pixels), model.vfeat_extractor(pixels))
    assert torch.equal(load_audio_tower(path)(spectrograms), model.afeat_extractor(spectrograms))


def test_the_stand_in_for_the_visual_tower_can_take_its_place(tmp_path: Path) -> None:
    visual = MotionTower(MotionTowerConfig(image_size=16, reduce=2, frames=10, channels=2, width=22))
    model = Synchformer(visual, AudioTower(SMALL_AUDIO), SMALL).eval()
    save_synchformer(tmp_path / "sync.safetensors", model)
    loaded = load_synchformer(tmp_path / "sync.safetensors")
    pixels, spectrograms = torch.randn(1, 3, 3, 10, 16, 16), torch.randn(1, 3, 29, 23)
    assert isinstance(loaded.vfeat_extractor, MotionTower)
    assert torch.equal(loaded(pixels, spectrograms), model(pixels, spectrograms))


def test_positions_beyond_what_is_compared_are_left_out_and_too_few_are_an_error(tmp_path: Path) -> None:
    model, path, (visual, audio) = small(), tmp_path / "sync.safetensors", tokens()
    save_synchformer(path, model)
    shorter = load_synchformer(path, segments=2)
    assert torch.equal(shorter.transformer.pos_emb_cfg.pos_emb, model.transformer.pos_emb_cfg.pos_emb[:, :20])
    assert shorter.compare(visual[:, :2], audio[:, :2]).shape == (2, 7)
    with pytest.raises(ValueError, match=r"positions for 29 tokens, and 38 are needed; give fewer segments"):
        load_synchformer(path, segments=4)


def checkpoint(layout: str) -> tuple[dict, Head, dict[str, float]]:
    """What a file of this layout holds, its head, and the number that is everywhere in each tensor (so that the file is as small as its names)."""
    head: Head = "synchronisable" if layout == "stage III" else "offset"
    shapes = published_shapes(head)
    values = {name: float(i) for i, name in enumerate(shapes)}
    state = {name: torch.tensor(values[name]).expand(shape) for name, shape in shapes.items()}
    if layout == "published again":
        return state, head, values
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    parts = [torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=3), torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)]
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [3])
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    rest = {
        "args": OmegaConf.create({"model": {"target": "a.B", "params": {"x": [1, None, 0.5]}}, "lr": "${model.params.x}"}),
        "loss": 1.5,
        "metrics": {"accuracy_1": np.float64(0.25)},
        "epoch": 3,
        "optimizer": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "model_type": "Synchformer",
    }
    return {**rest, "model": state}, head, values


@pytest.mark.parametrize("layout", ["stage II", "stage III", "published again"])
def test_published_files_load_strictly(tmp_path: Path, layout: str) -> None:
    file, head, values = checkpoint(layout)
    assert len(values) == 513
    torch.save(file, tmp_path / "sync.pt")
    model = load_synchformer(tmp_path / "sync.pt")
    assert model.config == SyncConfig(head=head, segments=13 if head == "synchronisable" else 14)
    assert {name: (t.min().item(), t.max().item()) for name, t in model.state_dict().items()} == {n: (v, v) for n, v in values.items()}


def test_what_is_not_exactly_a_synchformer_is_refused(tmp_path: Path) -> None:
    towers = {"v_encoder.cls_token": torch.zeros(1, 1, 768), "a_encoder.ast.layernorm.bias": torch.zeros(768)}
    torch.save({"state_dict": towers}, tmp_path / "avclip.pt")
    with pytest.raises(ValueError, match=r"avclip\.pt: has 0 of transformer\.off_head and transformer\.sync_head; .* not the towers alone"):
        load_synchformer(tmp_path / "avclip.pt")
    file, _, _ = checkpoint("published again")
    file["transformer.extra"] = torch.zeros(3)
    del file["vproj.bias"]
    torch.save(file, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"1 missing \(vproj\.bias\); 1 unexpected \(transformer\.extra\)"):
        load_synchformer(tmp_path / "other.pth")
