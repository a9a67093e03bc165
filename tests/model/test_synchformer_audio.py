import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model.synchformer_audio import AudioTower, AudioTowerConfig, LogMel, load_audio_tower, save_audio_tower
from tests.model.fill import checksum, fill_module, inp

GOLDENS = Path(__file__).parent / "goldens"
SMALL = AudioTowerConfig(mels=29, frames=23, patch_size=7, stride=5, width=22, depth=3, heads=2)


# --- the front end ---


def test_log_mel_is_the_published_front_end() -> None:
    golden, log_mel = np.load(GOLDENS / "logmel.npz"), LogMel()
    assert int((log_mel.filters != 0).sum()) == golden["mel_filterbank_nonzero"]
    np.testing.assert_allclose(checksum(log_mel.filters.numpy()), golden["mel_filterbank_sum"], atol=1e-7)
    spectrogram = log_mel(inp("wave", (1, 10240), 0.1))
    assert spectrogram.shape == (1, 128, 66)
    np.testing.assert_allclose(spectrogram.numpy(), golden["out"], atol=2e-4)
    power = (spectrogram[:, ::16, :65].double() * 2 * 4.5689974 - 4.2677393).exp() - 1e-6
    np.testing.assert_allclose(power.numpy(), golden["mel_power"], rtol=1e-4, atol=1e-6)


def test_the_padded_frame_is_0_before_the_normalisation() -> None:
    spectrogram = LogMel()(torch.zeros(2, 10240))
    assert spectrogram[..., 65].allclose(torch.tensor(0.46703), atol=1e-5)
    assert spectrogram[..., :65].max() < -1


def test_log_mel_of_many_is_that_of_each_and_has_no_weights() -> None:
    log_mel, wave = LogMel(), torch.randn(2, 3, 10240) / 9
    torch.testing.assert_close(log_mel(wave), torch.stack([torch.stack([log_mel(w) for w in row]) for row in wave]), atol=1e-4, rtol=1e-4)
    assert log_mel(wave[..., :20000]).shape == (2, 3, 128, 66)
    assert not log_mel.state_dict()


def test_log_mel_stays_in_float32_under_autocast() -> None:
    log_mel, wave = LogMel(), torch.randn(1, 10240)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_mel(wave), log_mel(wave))
        under = log_mel(wave.half())
    assert under.dtype == torch.float32
    torch.testing.assert_close(under, log_mel(wave.half().float()))


# --- the tower ---


@pytest.fixture(scope="module")
def tower() -> AudioTower:
    with torch.device("meta"):
        tower = AudioTower().eval()
    fill_module(tower.to_empty(device="cpu"), "afeat_extractor.")
    return tower


def test_names_and_shapes_are_those_of_the_published_file(tower: AudioTower) -> None:
    published = json.loads((GOLDENS / "synchformer_keys.json").read_text())["audio"]
    assert {name: list(t.shape) for name, t in tower.state_dict().items()} == published


def test_matches_the_reference_at_full_size_step_by_step(tower: AudioTower) -> None:
    golden = np.load(GOLDENS / "audio.npz")
    stages = {"embeddings": tower.ast.embeddings, "layer0_out": tower.ast.encoder.layer[0], "last_hidden_state": tower.ast}
    traces: dict[str, np.ndarray] = {}

    def keep(name: str):
        return lambda _module, _args, out: traces.__setitem__(name, checksum(out.numpy()))

    hooks = [module.register_forward_hook(keep(name)) for name, module in stages.items()]
    with torch.inference_mode():
        features = tower(inp("spec", (1, 2, 1, 128, 66))[:, :, 0])
    for hook in hooks:
        hook.remove()
    assert set(traces) == set(stages)
    for name, trace in traces.items():
        np.testing.assert_allclose(trace, golden[f"trace_{name}_sum"], atol=1e-4, err_msg=name)
    np.testing.assert_allclose(features.numpy(), golden["feats"], atol=1e-4)


def small_tower() -> AudioTower:
    tower = AudioTower(SMALL).eval()
    fill_module(tower)
    return tower


@torch.inference_mode()
def test_segments_do_not_see_each_other() -> None:
    tower, x = small_tower(), torch.randn(2, 3, 29, 23)
    one_by_one = torch.stack([torch.cat([tower(x[i : i + 1, j : j + 1]) for j in range(3)], dim=1)[0] for i in range(2)])
    assert tower(x).shape == (2, 3, 4, 22) and SMALL.bands == 5
    torch.testing.assert_close(tower(x), one_by_one, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.06), (torch.float16, 0.006)])
def test_half_precision_is_close(dtype: torch.dtype, share: float) -> None:
    tower, x = small_tower(), torch.randn(1, 2, 29, 23)
    expected = tower(x)
    with torch.autocast("cpu", dtype):
        assert 1e-5 < ((tower(x).float() - expected).std() / expected.std()) < share
    features = tower.to(dtype)(x)
    assert features.dtype == dtype
    assert 1e-5 < (features.float() - expected).std() / expected.std() < share


def test_every_parameter_is_trained() -> None:
    tower = AudioTower(SMALL)
    tower(torch.randn(2, 1, 29, 23)).square().sum().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None] == []


def test_our_own_file_gives_the_same_tower(tmp_path: Path) -> None:
    tower = small_tower()
    save_audio_tower(tmp_path / "audio.safetensors", tower)
    loaded = load_audio_tower(tmp_path / "audio.safetensors")
    assert loaded.config == SMALL and not any(p.requires_grad for p in loaded.parameters())
    x = torch.randn(1, 1, 29, 23)
    assert torch.equal(loaded(x), tower(x))


@pytest.mark.parametrize("prefix", ["module.a_encoder.", "a_encoder.", "afeat_extractor.", ""])
def test_the_tower_is_found_in_the_published_layouts(tmp_path: Path, prefix: str) -> None:
    # One number for each name, spread over the whole shape: a file as small as a test wants it, in the published names and shapes.
    shapes = json.loads((GOLDENS / "synchformer_keys.json").read_text())["audio"]
    values = {name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(shapes.items())}
    others = {prefix.replace("a_enc", "v_enc").replace("afeat", "vfeat") + "cls_token": torch.zeros(1)} if prefix else {}
    torch.save({"state_dict": {prefix + name: t for name, t in values.items()} | others}, tmp_path / "x.pt")
    loaded = load_audio_tower(tmp_path / "x.pt").state_dict()
    assert {name: (t.min().item(), t.max().item()) for name, t in loaded.items()} == {name: (float(i), float(i)) for i, name in enumerate(values)}


def test_what_does_not_fit_is_refused_with_both_shapes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(29, 24\).*\(29, 23\)"):
        small_tower()(torch.zeros(1, 1, 29, 24))
    with pytest.raises(ValueError, match="multiple of heads 5"):
        AudioTowerConfig(heads=5)
    with pytest.raises(ValueError, match="at least patch_size 16"):
        AudioTowerConfig(frames=15)
    torch.save({"state_dict": {"v_encoder.cls_token": torch.zeros(1, 1, 768)}}, tmp_path / "video.pt")
    with pytest.raises(ValueError, match=r"does not fit AudioTower: 212 missing .*1 unexpected \(v_encoder.cls_token\)"):
        load_audio_tower(tmp_path / "video.pt")
