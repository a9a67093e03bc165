"""Weights files of networks small enough to run in every test: real ones in everything but size."""

from pathlib import Path

import torch

from model.codecs import LappedCodec, LappedConfig, save_codec
from model.synchformer_visual import VisualTower, VisualTowerConfig, save_tower

SMALL_TOWER = VisualTowerConfig(image_size=48, patch_size=16, width=24, depth=1, heads=2)
SMALL_CODEC = LappedConfig(card=64, band_edges=(0, 40, 320))


def small_networks(folder: Path) -> dict[str, str]:
    """Writes `tower` and `codec` weights into the folder; returns their paths."""
    torch.manual_seed(5)
    save_tower(folder / "tower.safetensors", VisualTower(SMALL_TOWER))
    codec = LappedCodec(SMALL_CODEC)
    codec.envelopes[0] = torch.linspace(-60, 0, SMALL_CODEC.card)[:, None]
    codec.envelopes[1] = torch.randn_like(codec.envelopes[1])
    for shape in codec.shapes:
        torch.nn.init.normal_(shape)
    save_codec(folder / "codec.safetensors", codec)
    return {"tower": str(folder / "tower.safetensors"), "codec": str(folder / "codec.safetensors")}
