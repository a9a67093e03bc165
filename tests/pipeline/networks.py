"""Weights files of networks small enough to run in every test: real ones in everything but size."""

from dataclasses import asdict
from pathlib import Path

import torch

from model.codecs import LappedCodec
from model.synchformer_visual import VisualTower, VisualTowerConfig
from model.weights import save_state

SMALL_TOWER = VisualTowerConfig(image_size=48, patch_size=16, width=24, depth=1, heads=2)


def small_networks(folder: Path) -> dict[str, str]:
    """Writes `tower` and `codec` weights into the folder; returns their paths."""
    torch.manual_seed(5)
    tower = VisualTower(SMALL_TOWER)
    save_state(folder / "tower.safetensors", tower.state_dict(), asdict(SMALL_TOWER))
    waves = torch.randn(3, 1, 24000) * torch.linspace(0.01, 0.5, 24000)
    LappedCodec.fit(list(waves), codebooks=3, card=64).save(folder / "codec.safetensors")
    return {"tower": str(folder / "tower.safetensors"), "codec": str(folder / "codec.safetensors")}
