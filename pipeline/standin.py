"""`soundshard standin`: small networks fitted on a media dataset, where published weights cannot be had.

Decodes clips of the training split and hands them to `model.standin`, which knows how to fit; the result is a tower's and a codec's
weights file, used like any other. The same dataset and options give the same networks on one kind of machine.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from tqdm import tqdm

from configs import storage
from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES
from configs.load import JobError, job_main, to_plain
from model.codecs import LappedConfig, save_codec
from model.motion_tower import save_motion_tower
from model.standin import Progress, TowerFit, fit_codec, fit_tower
from pipeline.features import Decoded, ahead
from pipeline.media import MediaError, decode
from pipeline.views import view_crop
from shards.dataset import fingerprint
from shards.read import Index

SAMPLE_RATE_HZ = LappedConfig.sample_rate_hz
MEGABYTE = 1_000_000
MOST_SHIFT = 3
"""Averaged pixels by which a segment is moved at most, in each direction."""


@dataclass(frozen=True)
class StandinConfig:
    """Options of `soundshard standin`."""

    data: str = "???"
    """Folder of the media dataset."""
    out: str = "???"
    """Folder for tower.safetensors and codec.safetensors."""
    split: str = "train"
    """Split whose clips are used."""
    clips: int = 200
    """Clips to use at most, drawn by chance."""
    memory_mb: int = 500
    """Memory for decoded pictures, in MB; clips beyond it lend their sound only. Ten seconds take 0.6 MB, averaged as the tower sees them."""
    batch_segments: int = 16
    """Segments in one of the tower's training batches."""
    tower: TowerFit = field(default_factory=TowerFit)
    codec_card: int = 1024
    """Entries of each of the codec's codebooks; fewer if there is too little sound to fit as many."""
    codec_iterations: int = 25
    """Passes of k-means over each codebook."""
    threads: int = 1
    """torch threads. The networks are too small for many, and the last bits of the weights depend on their number."""
    seed: int = 0
    """Draws clips, segments and the codec's first entries; the tower's weights have tower.seed."""

    def __post_init__(self) -> None:
        if min(self.clips, self.memory_mb, self.batch_segments, self.tower.steps, self.codec_iterations, self.threads) < 1:
            raise ValueError("clips, memory_mb, batch_segments, tower.steps, codec_iterations and threads must be at least 1")


@dataclass(frozen=True)
class Material:
    """Decoded clips to fit on: pictures as the tower sees them, and sound at the codec's rate. The last ones may have sound only."""

    frames: tuple[UInt8[np.ndarray, "_ size size 3"], ...]
    waves: tuple[Float32[np.ndarray, "1 _"], ...]


def run(config: StandinConfig) -> tuple[Path, Path]:
    """Fit a small visual tower and a small codec on a media dataset's clips, in a bounded number of steps."""
    out = storage.only_local(config.out, option="out")
    files = out / "tower.safetensors", out / "codec.safetensors"
    media = Index.open(config.data, config.split, kind="media")
    request = fingerprint(
        {**{k: v for k, v in to_plain(config).items() if k not in ("data", "out")}, "media": [media.info.fingerprint, media.content]}
    )
    if all(file.is_file() for file in files) and _request(out) == request:
        print(f"standin: {files[0]} and {files[1]} are there")
        return files
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(config.threads)
    material = read_material(media, config)
    with tqdm(total=config.tower.steps, desc="tower", unit="step") as bar:  # learns to foretell sound from pictures
        save_motion_tower(files[0], fit_tower(batches(material, config), config.tower, progress=_on(bar, "loss")))
    waves = [torch.from_numpy(wave) for wave in material.waves]
    with tqdm(desc="codec", unit="codebook") as bar:  # k-means over frames of sound
        card = LappedConfig(card=config.codec_card)
        save_codec(files[1], fit_codec(waves, card, iterations=config.codec_iterations, seed=config.seed, progress=_on(bar, "error")))
    (out / "standin.json").write_text(json.dumps({"request": request, "options": to_plain(config)}, indent=1))
    print(f"standin: tower and codec fitted on {len(material.frames)} and {len(waves)} clips of {config.data} -> {out}")
    return files


def read_material(media: Index, config: StandinConfig) -> Material:
    """Decode clips in a random but repeatable order, until there are enough."""
    size, reduce = config.tower.tower.image_size, config.tower.tower.reduce
    keys = media.keys.to_pylist()
    order = np.random.Generator(np.random.Philox(key=[config.seed, 0])).permutation(len(keys))[: config.clips]

    def load(key: str) -> Decoded:
        clip = decode(media.bytes(media.row(key), "mp4"), sample_rate_hz=SAMPLE_RATE_HZ, channels=1)
        height, width = clip.frames.shape[1:3]
        cut = view_crop(key, 0, height, width, size).apply(clip.frames)
        return Decoded(average(cut, reduce), clip.audio)

    frames, waves, left = [], [], config.memory_mb * MEGABYTE
    with tqdm(total=len(order), desc="decode", unit="clip") as bar:
        for _, clip in ahead([keys[i] for i in order], load, threads=len(os.sched_getaffinity(0)), limit=4):
            bar.update()
            if isinstance(clip, MediaError) or clip.sound is None:
                continue
            waves.append(clip.sound)
            left -= clip.frames.nbytes
            if left >= 0 or not frames:
                frames.append(clip.frames)
    if not waves:
        raise JobError(f"none of {len(order)} clips of split {config.split!r} of {config.data} could be decoded")
    return Material(tuple(frames), tuple(waves))


def average(frames: UInt8[np.ndarray, "frames height width 3"], side: int) -> UInt8[np.ndarray, "frames low narrow 3"]:
    """Means over squares of pixels."""
    count, height, width, _ = frames.shape
    squares = frames.reshape(count, height // side, side, width // side, side, 3)
    return squares.mean((2, 4), dtype=np.float32).round().astype(np.uint8)


def batches(material: Material, config: StandinConfig) -> Iterator[tuple[UInt8[Tensor, "b t h w 3"], Float32[Tensor, "b samples"]]]:
    """Segments with the sound of the same 0.64 s, from anywhere in any clip, shifted a little and half of them mirrored.

    Endless; batch n is always the same.
    """
    samples = SAMPLE_RATE_HZ // FRAME_RATE_HZ
    for number in range(sys.maxsize):
        rng = np.random.Generator(np.random.Philox(key=[config.seed, 1 + number]))
        pictures, sounds = [], []
        for _ in range(config.batch_segments):
            which = int(rng.integers(len(material.frames)))
            clip, wave = material.frames[which], material.waves[which]
            start = int(rng.integers(len(clip) - SEGMENT_FRAMES + 1))
            down, right = rng.integers(-MOST_SHIFT, MOST_SHIFT + 1, 2).tolist()
            pictures.append(shifted(clip[start : start + SEGMENT_FRAMES], down, right, mirror=bool(rng.integers(2))))
            sounds.append(wave[0, start * samples : (start + SEGMENT_FRAMES) * samples])
        yield torch.from_numpy(np.stack(pictures)), torch.from_numpy(np.stack(sounds))


def shifted(frames: UInt8[np.ndarray, "frames size size 3"], down: int, right: int, *, mirror: bool) -> UInt8[np.ndarray, "frames size size 3"]:
    """Frames moved by whole pixels, what comes in at the edges being the edges' own pixels; mirrored from left to right after that."""
    places = np.arange(frames.shape[1])
    rows, columns = (np.clip(places - by, 0, len(places) - 1) for by in (down, right))
    return frames[:, rows[:, None], columns[::-1] if mirror else columns]


def _on(bar: tqdm, name: str) -> Progress:
    """Progress onto a bar."""

    def show(done: int, total: int, value: float) -> None:
        bar.total = total
        bar.set_postfix_str(f"{name} {value:.3f}", refresh=False)
        bar.update(done - bar.n)

    return show


def _request(out: Path) -> str | None:
    path = out / "standin.json"
    return json.loads(path.read_text())["request"] if path.is_file() else None


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.standin`."""
    return job_main(StandinConfig, run, argv, command="standin")


if __name__ == "__main__":
    sys.exit(main())
