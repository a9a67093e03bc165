"""Small feature datasets made by program, and a training configuration small enough for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.load import load
from model.codecs import save_codec
from model.lapped import LappedCodec, LappedConfig
from model.weights import sha256_file
from shards.dataset import create_or_check, new_info
from shards.write import Entry, write_manifest, write_shard
from train.vaura import TrainConfig

WIDTH, CODEBOOKS, CARD, SEGMENTS = 5, 3, 11, 5
"""Features' width, codebooks, codes; segments of a clip on the grid without overlap."""


def write_features(
    root: Path,
    *,
    clips: int = 24,
    validation: int = 0,
    first: int = 0,
    lengths: Sequence[int] = (SEGMENTS,),
    weights: Path | None = None,
    codec_weights: Path | None = None,
    **spec: Any,
) -> Path:
    """A feature dataset on EnCodec's clock: `clips` training clips in shards of 7, numbered from `first`, and validation clips if asked for.

    `lengths` are the clips' segments, again and again. Deterministic.
    """
    codec = {"name": "encodec24", "sample_rate_hz": 24000, "hop_samples": 320, "channels": 1, "codebooks": CODEBOOKS, "card": CARD}
    described = {"hop_frames": 16, "views": 1, "tower": {"config": {"width": WIDTH}, "weights_sha256": "0" * 64}, "codec": codec, **spec}
    files = {"tower": weights, "codec": codec_weights}
    provenance = {"weights": {name: {"path": str(path), "sha256": sha256_file(path)} for name, path in files.items() if path}}
    create_or_check(root, new_info("features", described, provenance))
    for split, count in (("train", clips), ("validation", validation)):
        entries = [_entry(split, number, lengths[number % len(lengths)]) for number in range(first, first + count)]
        for shard, begin in enumerate(range(0, count, 7)):
            write_shard(root, f"{split}-{shard:06d}", entries[begin : begin + 7])
    write_manifest(root)
    return root


def write_codec(path: Path) -> Path:
    """A codec's weights file that fits the datasets' codes: the stand-in's kind, on EnCodec's clock, with random codebooks."""
    codec = LappedCodec(LappedConfig(card=CARD, envelope_codebooks=1, band_edges=(0, 7, 40, 180, 320)))
    generator = torch.Generator().manual_seed(8)
    codec.envelopes.copy_(torch.randn(codec.envelopes.shape, generator=generator) * 10 - 40)
    for shape in codec.shapes:
        shape.copy_(torch.randn(shape.shape, generator=generator))
    assert codec.codebooks == CODEBOOKS
    save_codec(path, codec)
    return path


def _entry(split: str, number: int, segments: int) -> Entry:
    draw = np.random.default_rng([number, split == "validation"])
    avclip = draw.normal(size=(1, segments, 8, WIDTH)).astype(np.float16)
    codes = draw.integers(CARD, size=(CODEBOOKS, segments * 48), dtype=np.uint16)
    members = {"avclip.npy": avclip, "encodec24.npy": codes, "json": b"{}"}
    return Entry(f"{split}{number}", split, None, f"{split}{number}.mp4", duration_seconds=segments * 0.64, members=members)


SMALL = """
model.layers=2 model.width=24 model.visual_width=8 model.heads=3 model.codebook_dim=4 stream.segments=2 stream.batch_size=6
schedule.warmup_steps=3 optimiser.learning_rate=0.01 trainer.max_steps=8 trainer.log_every=3
trainer.accelerator=cpu trainer.devices=1 trainer.precision=32-true trainer.progress=false
"""


TEN_STEPS = ["trainer.max_steps=10", "schedule.total_steps=10", "trainer.val_check_interval=5", "trainer.keep_every=3"]
"""Over two and a half epochs of 23 clips, with dropout, guidance dropout and two validations."""


def small_config(data: Path, out: Path, *options: str) -> TrainConfig:
    """A configuration that trains in a second or two."""
    return load(TrainConfig, [*SMALL.split(), f"data={data}", f"out={out}", *options])
