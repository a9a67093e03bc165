"""Weights files of networks small enough to run in every test: real ones in everything but size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model.codecs import LappedCodec, LappedConfig, load_codec, save_codec
from model.dac import DacCodec, DacConfig
from model.run_folder import RunConfig, write_config, write_model
from model.synchformer_visual import VisualTower, VisualTowerConfig, save_tower
from model.vaura import Vaura, VauraConfig
from model.weights import sha256_file
from pipeline.generate import GenerateConfig, Generator, Job, request_id, videos
from tests.model.fill import fill_module

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


SMALL_VAURA = VauraConfig(
    layers=2,
    width=48,
    heads=2,
    visual_width=16,
    feature_width=SMALL_TOWER.width,
    codebooks=3,
    card=64,
    steps_per_token=6,
    window_tokens=16,
    max_steps=112,
)
"""Windows of two segments, for the small codec's clock."""


def small_run(folder: Path, networks: dict[str, str], model: VauraConfig = SMALL_VAURA) -> Path:
    """A run folder as training leaves it, of a model that was never trained."""
    weights = {name: {"path": path, "sha256": sha256_file(path)} for name, path in networks.items()}
    spec = {"tower": {"weights_sha256": weights["tower"]["sha256"]}, "codec": load_codec(networks["codec"]).spec()}
    write_config(folder, RunConfig(model, window_segments=model.window_tokens // 8, data={"fingerprint": "0", "spec": spec}, weights=weights))
    torch.manual_seed(11)
    vaura = Vaura(model)
    for head in vaura.lm_heads.parameters():  # heads begin at zero, which would make every code equally likely
        torch.nn.init.normal_(head, std=0.3)
    write_model(folder, vaura)
    return folder


def small_dac_run(folder: Path) -> Path:
    """The same with a small DAC, on its clock of 441 / 64 steps per video token."""
    networks, codec = small_networks(folder), DacCodec(DacConfig(encoder_width=4, latent_width=24, decoder_width=32, codebooks=2, card=64))
    fill_module(codec.network)  # as made, it amplifies rounding errors
    save_codec(folder / "dac.safetensors", codec)
    model = replace(SMALL_VAURA, codebooks=2, steps_per_token=441, steps_per_token_divisor=64, max_steps=256)
    return small_run(folder, networks | {"codec": str(folder / "dac.safetensors")}, model)


def made_here(config: GenerateConfig) -> dict[str, dict[str, Any]]:
    """The rows by key of what generation makes, in this process: batch after batch, without Ray."""
    todo, starts = videos(config)
    generator = Generator(config, Job(starts, request_id(config, config.run, starts)))
    batches = [todo[start : start + config.batch_clips] for start in range(0, len(todo), config.batch_clips)]
    return {progress.row["key"]: progress.row for batch in batches for progress in generator.batch(batch) if progress.row is not None}
