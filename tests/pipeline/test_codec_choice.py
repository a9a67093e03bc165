"""Features with DAC as their codec: found by name in the cache, on the clip's clock, in the dataset's spec."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from model.codecs import DacCodec, DacConfig, load_codec
from model.weights import KNOWN
from pipeline.features import CodecOptions, Decoded, FeatureOptions, Features, Featuriser, TowerOptions, networks_spec
from pipeline.media import decode
from tests.model.fill import fill_module
from tests.pipeline.clips import make_clip
from tests.pipeline.networks import small_networks


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureOptions:
    """A tiny DAC with the published file's layout and rates, where the published one would be."""
    monkeypatch.setenv("SOUNDSHARD_CACHE", str(tmp_path / "cache"))
    codec = DacCodec(DacConfig(encoder_width=2, latent_width=8, decoder_width=16, card=64))
    fill_module(codec.network)
    (tmp_path / "cache").mkdir()
    torch.save({"state_dict": codec.network.state_dict(), "metadata": {"kwargs": {"sample_rate": 44_100}}}, tmp_path / "cache" / KNOWN["dac44"].file)
    tower = TowerOptions(weights=small_networks(tmp_path)["tower"], device="cpu", batch_segments=5)
    return FeatureOptions(tower=tower, codec=CodecOptions(name="dac44"))


def test_codes_of_a_clip_cover_its_sound_on_the_exact_clock(options: FeatureOptions, tmp_path: Path) -> None:
    make_clip(tmp_path / "clip.mp4", seconds=Fraction(3, 2), flash_picture=13)
    featuriser = Featuriser(options)
    assert featuriser.decode_rates() == (44_100, 1)
    clip = decode((tmp_path / "clip.mp4").read_bytes(), sample_rate_hz=44_100, channels=1)
    assert clip.audio is not None
    [(_, features)] = list(featuriser.run(["clip"], lambda _: Decoded(clip.frames, clip.audio)))
    assert isinstance(features, Features) and features.codes is not None
    assert features.codes.shape == (9, -(-clip.audio.shape[1] // 512)) and features.codes.dtype == np.uint16
    expected = load_codec("dac44").encode(torch.from_numpy(clip.audio)[None])[0]
    assert np.array_equal(features.codes, expected) and len(expected.unique()) > 10


def test_the_spec_says_what_decides_the_codes(options: FeatureOptions) -> None:
    spec = networks_spec(options)["codec"]
    sizes = {"name": "dac44", "sample_rate_hz": 44_100, "hop_samples": 512, "channels": 1, "codebooks": 9, "card": 64}
    assert spec == {**sizes, "weights_sha256": load_codec("dac44").weights_sha256}
    assert networks_spec(replace(options, codec=CodecOptions(name="dac44", bandwidth_kbps=24.0)))["codec"] == spec
