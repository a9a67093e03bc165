"""ImageBind's towers and what they are given, against the published code.

The numbers were made with the network and the functions of the package imagebind-packaged 0.1.2 at a tiny size, with weights and inputs that are
sines. The published weights are nowhere near the tests.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from model.imagebind import ImageBind, ImageBindConfig, TowerShape, config_of, imagebind_file, load_imagebind
from model.weights import load_strictly
from pipeline.decode import MediaError
from pipeline.imagebind import SCORERS, ImageBindScorer, picture_clips, sound_clips
from pipeline.scorers import Item, Media, ScoreOptions, registered

SMALL = ImageBindConfig(TowerShape(24, 2, 3), TowerShape(16, 3, 2), 10)
VISION = [0.41848, -0.253823, -0.184618, 0.423922, -0.205966, -0.234154, 0.421705, -0.154387, -0.279459, 0.411869]
"""Mean embedding of three clips."""
AUDIO = [-6.944024, 3.794477, 8.484619, -0.349639, -8.626575, -3.152835, 7.346494, 6.135583, -4.855388, -8.106918]
"""Mean embedding of two, times the published network's factor of 20."""


def sines(shape: tuple[int, ...], step: float, start: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(np.sin(np.arange(int(np.prod(shape))) * step + start).astype(np.float32)).reshape(shape)


def weights(config: ImageBindConfig = SMALL) -> dict[str, torch.Tensor]:
    """Small sines by the names' order; norms' factors are near 1."""
    norms = ("0.weight", "norm_1.weight", "norm_2.weight", "norm_layer.weight")
    state = ImageBind(config).state_dict()
    return {
        name: 0.08 * sines(tuple(state[name].shape), 0.7, number) + (state[name].ndim == 1 and name.endswith(norms))
        for number, name in enumerate(sorted(state))
    }


def small(config: ImageBindConfig = SMALL) -> ImageBind:
    model = ImageBind(config).eval()
    load_strictly(model, weights(config), source="sines")
    return model


def test_the_towers_are_those_of_the_published_network() -> None:
    model = small()
    with torch.inference_mode():
        vision = model.vision(sines((3, 3, 2, 224, 224), 0.01)).mean(0)
        audio = 20 * model.audio(sines((2, 1, 128, 204), 0.013)).mean(0)
    np.testing.assert_allclose(vision.numpy(), VISION, atol=2e-5)
    np.testing.assert_allclose(audio.numpy(), AUDIO, atol=5e-4)


def test_spectrograms_are_the_published_ones() -> None:
    time = np.arange(32000) / 16000
    wave = (0.3 * np.sin(2 * np.pi * 440 * time) + 0.1 * np.sin(2 * np.pi * 3000 * time * time) + 0.05).astype(np.float32)[None]
    mels = sound_clips(wave, 16000)
    assert mels.shape == (3, 1, 128, 204) and torch.equal(mels[0], mels[2])
    found = mels[0, 0][[0, 17, 63, 127]][:, [0, 50, 100, 197, 198, 203]]
    expected = [
        [0.07211, -1.14598, -1.17903, -0.96382, 0.46706, 0.46706],
        [-0.33887, -0.34605, -0.34605, -0.34392, 0.46706, 0.46706],
        [-1.27756, -1.27756, -1.27756, -1.27756, 0.46706, 0.46706],
        [-1.27756, -1.27756, -1.27756, -1.27756, 0.46706, 0.46706],
    ]
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)  # far below anything heard, the floor's rounding differs


def test_sound_is_cut_at_its_beginning_middle_and_end() -> None:
    sound = np.concatenate([np.random.default_rng(2).normal(0, level, (2, 44100 * 2)) for level in (0.1, 0.01, 0.001)], 1).astype(np.float32)
    loud = [float(mel[0, :, :190].mean()) for mel in sound_clips(sound, 44100)]
    assert loud[0] - loud[1] == pytest.approx(2 * np.log(10) / 9.138, rel=0.05) and loud[1] - loud[2] == pytest.approx(loud[0] - loud[1], rel=0.05)
    assert sound_clips(sound[:, :22050], 44100).shape == (3, 1, 128, 204)
    with pytest.raises(MediaError, match="too_short"):
        sound_clips(sound[:, :400], 44100)


@pytest.mark.parametrize(
    ("tall", "expected"),
    [
        (False, [(-1.79226, -1.0219, 0.70001), (0.01336, 0.06424, -0.52008), (-0.93564, -0.91137, 1.53443)]),
        (True, [(-1.79226, 1.36195, 0.70001), (0.01336, -0.14567, -0.52008), (-0.93564, -1.21535, 1.53443)]),
    ],
)
def test_pictures_are_scaled_and_cropped_as_published(tall: bool, expected: list[tuple[float, float, float]]) -> None:
    pictures = ((np.arange(2 * 180 * 331 * 3) * 7919) % 251).astype(np.uint8).reshape(2, 180, 331, 3)
    clips = picture_clips(np.ascontiguousarray(pictures.transpose(0, 2, 1, 3)) if tall else pictures)
    assert clips.shape == (3, 3, 2, 224, 224)
    found = [(float(clip[0, 0, 0, 0]), float(clip[1, 1, 100, 50]), float(clip[2, 0, 223, 223])) for clip in clips]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def item(seed: int, **changes: object) -> Item:
    rng = np.random.default_rng(seed)
    fields: Mapping[str, object] = {
        "frames": 75,
        "stills": rng.integers(0, 255, (10, 48, 64, 3), np.uint8),
        "sound": rng.normal(0, 0.1 * seed, (2, 22050)).astype(np.float32),
        "sound_rate_hz": 22050,
    }
    return Item(str(seed), {}, lambda _: np.zeros(0), Media(**fields | changes))  # type: ignore[arg-type]  # of a mapping


def test_a_score_is_the_cosine_of_mean_embeddings_whatever_the_batch() -> None:
    model = small()
    scorer = ImageBindScorer(model, torch.device("cpu"), "fp32")
    together = [row["imagebind_similarity"] for row in scorer([item(1), item(2), item(3)])]
    alone = [scorer([item(seed)])[0]["imagebind_similarity"] for seed in (1, 2, 3)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    media = item(2).media
    assert media is not None and media.stills is not None and media.sound is not None
    with torch.inference_mode():
        vision, audio = model.vision(picture_clips(media.stills)).mean(0), model.audio(sound_clips(media.sound, 22050)).mean(0)
    assert together[1] == pytest.approx(float(vision @ audio / vision.norm() / audio.norm()), abs=1e-5)
    with pytest.raises(MediaError, match="no_audio"):
        scorer([item(1, sound=None)])


def test_the_published_file_is_read_without_its_other_towers(tmp_path: Path) -> None:
    config = ImageBindConfig(TowerShape(160, 1, 2), TowerShape(64, 2, 1), 10)
    state = weights(config) | {"modality_postprocessors.audio.1.log_logit_scale": torch.ones([]), "modality_trunks.text.blocks.0.x": torch.ones(3)}
    torch.save(state, tmp_path / "imagebind_huge.pth")
    assert config_of(state) == config
    model, options = small(config), ScoreOptions(imagebind_weights=str(tmp_path / "imagebind_huge.pth"), device="cpu")
    (scorer,) = SCORERS
    (found,) = scorer.make(options)([item(1)])
    (expected,) = ImageBindScorer(model, torch.device("cpu"), "fp32")([item(1)])
    assert found["imagebind_similarity"] == pytest.approx(expected["imagebind_similarity"], abs=1e-5)
    assert registered()["imagebind"] is scorer
    assert scorer.version(options) != scorer.version(ScoreOptions(imagebind_weights=options.imagebind_weights, precision="bf16"))
    del state["modality_heads.audio.2.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"modality_heads\.audio\.2\.weight"):
        load_imagebind(tmp_path / "part.pth", device=torch.device("cpu"))
    torch.save({"x": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no ImageBind"):
        load_imagebind(tmp_path / "other.pth", device=torch.device("cpu"))


def test_the_published_network_has_its_published_size() -> None:
    with torch.device("meta"):
        model = ImageBind()
    state = model.state_dict()
    assert config_of(state) == ImageBindConfig()
    assert state["modality_trunks.vision.blocks.31.mlp.fc1.weight"].shape == (5120, 1280)
    assert state["modality_preprocessors.audio.pos_embedding_helper.pos_embed"].shape == (1, 229, 768)
    assert state["modality_trunks.audio.blocks.11.attn.bias_k"].shape == (1, 1, 768)
    assert state["modality_preprocessors.vision.rgbt_stem.proj.1.weight"].shape == (1280, 3, 2, 14, 14)


def test_without_weights_it_says_where_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOUNDSHARD_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"CC BY-NC 4\.0.*imagebind_weights=FILE, or put it at"):
        SCORERS[0].version(ScoreOptions())
    (tmp_path / "imagebind_huge.pth").write_bytes(b"x")
    assert imagebind_file("imagebind_huge.pth") == tmp_path / "imagebind_huge.pth"
