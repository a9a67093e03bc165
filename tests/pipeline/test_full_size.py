"""Preparation with networks of full size, from weights files in the published layouts (filled, not trained)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from encodec import EncodecModel

from configs import cli
from model.codecs import load_codec
from model.synchformer_visual import VisualTower, load_tower, normalise
from pipeline.media import decode
from shards.read import Index
from tests.model.fill import fill_module
from tests.pipeline.clips import make_clip


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_prepare_with_published_layouts(tmp_path: Path) -> None:
    tower = VisualTower()
    fill_module(tower, "v_encoder.")
    # Segment AVCLIP's file as its trainer leaves it: every name prefixed by DistributedDataParallel, the audio tower beside the visual one.
    state = {f"module.v_encoder.{name}": tensor for name, tensor in tower.state_dict().items()}
    torch.save({"epoch": 3, "name": "x", "state_dict": state | {"module.logit_scale": torch.tensor(0.07)}, "metrics": {}}, tmp_path / "epoch_best.pt")
    torch.save(EncodecModel.encodec_model_24khz(pretrained=False).state_dict(), tmp_path / "encodec.th")
    make_clip(tmp_path / "clips.mp4", seconds=1, width=320, height=256, flash_picture=10)
    weights = [f"tower.weights={tmp_path}/epoch_best.pt", f"codec.weights={tmp_path}/encodec.th"]
    assert cli.main(["prepare", f"source={tmp_path}/clips.mp4", f"out={tmp_path}/out", "actors=1", "tower.device=cpu", *weights]) == 0
    features, media = Index.open(tmp_path / "out" / "features"), Index.open(tmp_path / "out" / "media")
    stored, codes = features.member(0, "avclip.npy"), features.member(0, "encodec24.npy")
    assert stored.shape == (1, 2, 8, 768) and codes.shape == (8, 75) and codes.max() < 1024
    codec = load_codec(tmp_path / "encodec.th")
    clip = decode(media.bytes(0, "mp4"), sample_rate_hz=24000, channels=1)
    assert clip.frames.shape == (25, 256, 320, 3)
    centre = torch.from_numpy(clip.frames[8:24, 16:240, 48:272].copy())
    with torch.inference_mode():
        expected = load_tower(tmp_path / "epoch_best.pt")(normalise(centre)[None, None])[0, 0]
        np.testing.assert_allclose(stored[0, 1].astype(np.float32), expected.numpy(), atol=4e-3)
        np.testing.assert_array_equal(codes, codec.encode(torch.from_numpy(clip.audio)[None])[0].numpy())
    spec = json.loads((tmp_path / "out" / "features" / "dataset.json").read_text())["spec"]
    assert spec["tower"]["config"]["depth"] == 12 and spec["codec"]["codebooks"] == 8 and len(spec["tower"]["weights_sha256"]) == 64
