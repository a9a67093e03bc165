"""Small Synchformers with deterministic weights: real ones in everything but size."""

from pathlib import Path

from model.synchformer import Head, SyncConfig, Synchformer, save_synchformer
from model.synchformer_audio import AudioTower, AudioTowerConfig
from model.synchformer_visual import VisualTower, VisualTowerConfig
from tests.model.fill import fill_module

SMALL_VISUAL = VisualTowerConfig(image_size=28, patch_size=14, tubelet=2, width=22, depth=1, heads=2)
SMALL_AUDIO = AudioTowerConfig(width=26, depth=1, heads=2)


def network(head: Head = "offset") -> Synchformer:
    """A network of the published layout of segments."""
    config = SyncConfig(head=head, segments=14 if head == "offset" else 13, visual_width=22, audio_width=26, width=21, depth=2, heads=3)
    model = Synchformer(VisualTower(SMALL_VISUAL), AudioTower(SMALL_AUDIO), config).eval()
    fill_module(model)
    return model.requires_grad_(False)


def small_sync(folder: Path, head: Head = "offset") -> str:
    """Writes its weights file; returns the path."""
    path = folder / f"{head}.safetensors"
    save_synchformer(path, network(head))
    return str(path)
