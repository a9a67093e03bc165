"""`soundshard synth`: clips made by program, whose contact times are known exactly.

Writes what a download of VGGSound looks like (a folder of `<11 characters>_<start ms>_<end ms>.mp4` and its headerless csv), plus
`contacts.json`. Each clip depends on the seed and its own number alone, so the set is the same on any number of workers, and a
longer set begins with the shorter one's clips. Knows nothing of datasets, models or Ray.
"""

import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray as Array
from tqdm import tqdm

from configs import storage
from configs.load import job_main, to_plain
from pipeline.contact_sound import soundtrack
from pipeline.render import Renderer
from pipeline.scenes import KINDS, Scene, draw_scene


@dataclass(frozen=True)
class SynthConfig:
    """Options of `soundshard synth`."""

    out: str = "???"
    """Folder for the clips, vggsound.csv and contacts.json. Clips that are there already are kept."""
    clips: int = 96
    """How many."""
    validation: int = 8
    """How many of these belong to the validation split."""
    test: int = 8
    """How many belong to the test split; the rest are for training."""
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    """Kinds of scenes that clips take in turn: bounce, mallet, bumper, swings."""
    seconds: float = 4.0
    """Length of each clip."""
    width: int = 320
    """Pixels; even."""
    height: int = 240
    """Pixels; even."""
    frame_rates_hz: list[int] = field(default_factory=lambda: [30, 25, 24])
    """Clips take these in turn, so that re-encoding has something to do."""
    sample_rate_hz: int = 48000
    """Of the sound."""
    seed: int = 0
    """Another seed makes another set."""
    workers: int = 0
    """Processes; 0 takes one per processor."""

    def __post_init__(self) -> None:
        """Refuse what cannot be made."""
        if self.validation + self.test >= self.clips or min(self.validation, self.test) < 0:
            raise ValueError(
                f"clips={self.clips} leaves no clip for training beside validation={self.validation} and test={self.test}; ask for more clips"
            )
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise ValueError(f"kinds is {self.kinds}; expected one or more of {', '.join(KINDS)}")
        if self.width % 2 or self.height % 2 or min(self.width, self.height) < 32:
            raise ValueError(f"a picture of {self.width}x{self.height}; expected even sides of 32 pixels or more")
        if not self.seconds >= 2:
            raise ValueError(f"seconds={self.seconds}; expected 2 or more, so that two contacts fit into every clip")
        if not self.frame_rates_hz or min(self.frame_rates_hz) < 1:
            raise ValueError(f"frame_rates_hz={self.frame_rates_hz}; expected one or more positive rates")


@dataclass(frozen=True)
class SynthClip:
    """A clip of the set before it is made."""

    number: int
    key: str
    start_seconds: int
    split: str
    kind: str
    frame_rate_hz: int


@dataclass(frozen=True)
class Made:
    """What the csv and contacts.json say of a clip."""

    label: str
    contacts: list[dict]
    bytes: int


def run(config: SynthConfig) -> Path:
    """Make clips of solid objects that strike and bounce, with the sound of each contact; returns the folder."""
    out = storage.only_local(config.out, option="out")
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, config)
    clips = plan(config)
    made: dict[str, Made] = {}
    with tqdm(total=len(clips), desc="synth", unit="clip", disable=None) as bar:
        pool = ProcessPoolExecutor(config.workers or len(os.sched_getaffinity(0)), get_context("spawn"), initializer=_leave_interrupts_to_parent)
        try:
            futures = {pool.submit(make_clip, clip, config): clip.key for clip in clips}  # one process per clip at a time
            for future in as_completed(futures):
                made[futures[future]] = future.result()
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    _write(out / "vggsound.csv", "".join(f'{c.key[:11]},{c.start_seconds},"{made[c.key].label}",{c.split}\n' for c in clips))
    _write(out / "contacts.json", json.dumps({c.key: made[c.key].contacts for c in clips}, indent=1) + "\n")
    contacts, size = sum(len(m.contacts) for m in made.values()), sum(m.bytes for m in made.values())
    print(f"synth: {len(clips)} clips of {config.seconds:g} s with {contacts} contacts, {size / 1e6:.1f} MB in {out}")
    return out


def plan(config: SynthConfig) -> list[SynthClip]:
    """The set's clips: kinds and frame rates in turn, the last ones held out."""
    clips = []
    for number in range(config.clips):
        kind = config.kinds[number % len(config.kinds)]
        held_out = config.clips - number
        split = "test" if held_out <= config.test else "validation" if held_out <= config.test + config.validation else "train"
        start = int(_rng(config, number, 0).integers(0, 300))
        key = f"{kind}-{number:04d}_{start * 1000}_{start * 1000 + round(config.seconds * 1000)}"
        clips.append(SynthClip(number, key, start, split, kind, config.frame_rates_hz[number % len(config.frame_rates_hz)]))
    return clips


def make_clip(clip: SynthClip, config: SynthConfig) -> Made:
    """Draw, sound and write one clip, unless it is there."""
    scene = draw_scene(_rng(config, clip.number, 1), clip.kind, seconds=config.seconds)
    path = Path(config.out) / f"{clip.key}.mp4"
    if not path.exists():
        sound = soundtrack(scene.contacts, seconds=config.seconds, sample_rate_hz=config.sample_rate_hz, rng=_rng(config, clip.number, 2))
        _write(path, encode_mp4(scene, sound, clip.frame_rate_hz, config))
    contacts = [{"seconds": round(c.seconds, 6), "strength": round(c.strength, 4), "material": c.material} for c in scene.contacts]
    return Made(scene.label, contacts, path.stat().st_size)


def encode_mp4(scene: Scene, sound: Float[Array, "samples"], frame_rate_hz: int, config: SynthConfig) -> bytes:
    """H.264 and AAC in mp4. One thread and no AVX-512 code, which alone make x264's bytes repeat."""
    renderer = Renderer(scene, width=config.width, height=config.height)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=frame_rate_hz, options={"preset": "veryfast", "crf": "17", "x264-params": "asm=avx2"})
        video.width, video.height, video.pix_fmt = config.width, config.height, "yuv420p"
        video.codec_context.thread_count = 1
        audio = container.add_stream("aac", rate=config.sample_rate_hz, layout="mono", options={"aac_coder": "fast"})
        audio.bit_rate = 160_000
        for index in range(round(config.seconds * frame_rate_hz)):
            container.mux(video.encode(_picture(renderer.frame(index / frame_rate_hz), index)))
        container.mux(video.encode(None))
        for start in range(0, len(sound), 1024):
            frame = av.AudioFrame.from_ndarray(sound[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = config.sample_rate_hz, start
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return file.getvalue()


def _picture(pixels: UInt8[Array, "height width 3"], index: int) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    frame.pts = index
    return frame


def _rng(config: SynthConfig, number: int, purpose: int) -> np.random.Generator:
    """Numbers that depend on the seed, the clip's number and what they are for, and on nothing drawn before."""
    return np.random.Generator(np.random.Philox(key=[config.seed, number * 8 + purpose]))


def _claim(out: Path, config: SynthConfig) -> None:
    """Refuse to mix two sets in one folder."""
    held_in = out / "synth.json"
    decides = {k: v for k, v in to_plain(config).items() if k not in ("out", "workers")}
    if held_in.exists() and (there := json.loads(held_in.read_text())) != decides:
        differing = ", ".join(f"{k}={there.get(k)!r} there, {decides.get(k)!r} asked" for k in decides if there.get(k) != decides.get(k))
        raise ValueError(f"{out} holds another set of clips ({differing}); choose another out= or remove the folder")
    _write(held_in, json.dumps(decides, indent=1) + "\n")


def _write(path: Path, content: bytes | str) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.synth`."""
    return job_main(SynthConfig, run, argv, command="synth", positional="out")


if __name__ == "__main__":
    sys.exit(main())
