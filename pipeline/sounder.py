"""From pictures to sound with the networks of a run: videos of equal length as a batch, or one of any length as a stream at constant memory.

What comes out is waveforms, in pieces, as they are made. Knows no Ray, no dataset and no output files; `pipeline.generate` brings those.

    sounder = Sounder.open("runs/first")
    wave = sounder.generate("film.mp4")                        # float32 [channels, samples]
    for piece in sounder.generate("film.mp4", stream=True):    # the same, as it is made
        play(piece)
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor

from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES, SEGMENT_SECONDS, SEGMENT_TOKENS
from model.engine import Engine, EngineOptions
from model.generate import generate_windows, stream_windows
from model.run_folder import RunConfig, local_run, named_run, read_config, read_run_folder
from model.sampling import Sampling
from model.schedule import published_schedule
from model.weights import resolve, sha256_file
from pipeline import isolate
from pipeline.features import DTYPES, CodecOptions, Decoded, FeatureOptions, Featuriser, TowerOptions
from pipeline.isolate import Limits, call
from pipeline.media import MediaError, decode_audio, video_frames
from pipeline.stretch import Stretch, film_pictures

Sound = Float32[np.ndarray, "channels samples"]
Precision = Literal["fp32", "bf16", "fp16"]
FILM_PIECE_SEGMENTS = 4
"""Segments of a film that are decoded and go through the tower at a time: 42 MB of pictures at 256 x 454."""


@dataclass(frozen=True)
class SoundOptions:
    """What decides the sound that is put under a video. `config=generate_published` has the values of the published evaluation."""

    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 666
    """Each clip samples from a generator seeded by this and its key, whatever clips share its batch."""
    duration_seconds: float = 0.0
    """Length to generate, in whole segments of 0.64 s; 0 covers the video."""
    window_segments: int = 0
    """Segments that the decoder sees at once; 0: as many as it was trained on. Fewer cost less and see less."""
    stride_segments: int = 1
    """Segments by which the window moves over a video longer than it; the codes already there are the prompt."""
    windows: Literal["exact", "published"] = "exact"
    """exact: windows lie on the codec's true clock, and the sound ends with the pictures. published: the released evaluation's arithmetic, which
    counts 86 codec steps a second and lets the sound end a little early; for DAC's clock only, and with duration_seconds."""
    prompt_seconds: float = 0.0
    """Begin with so much of the video's own sound, and go on from there."""
    piece_seconds: float = 0.64
    """Sound is handed out in about such pieces while it is made; 0: a window at a time."""

    @property
    def segments(self) -> int:
        """Whole segments to generate; 0 covers the video. Raises ValueError with the nearest valid durations."""
        return whole_segments(self.duration_seconds)

    def check(self, trained: RunConfig) -> None:
        """Raises ValueError where the options do not go together, or not with the run."""
        clock, segments = trained.codec_clock, self.segments
        if self.windows == "published" and (clock.rate != Fraction(44100, 512) or not segments):
            raise ValueError(
                f"windows=published with duration_seconds={self.duration_seconds:g} and a codec of {float(clock.rate):g} steps/s: expected DAC "
                "44.1 kHz (86.13 steps/s), which the released model uses, and a duration; windows=exact is right for every codec"
            )
        if self.windows == "published" and self.prompt_seconds:
            raise ValueError("windows=published knows no prompt_seconds; give windows=exact")
        if self.prompt_seconds < 0 or self.piece_seconds < 0:
            raise ValueError(f"prompt_seconds={self.prompt_seconds:g}, piece_seconds={self.piece_seconds:g}: expected 0 or more")
        if self.duration_seconds and self.prompt_seconds >= self.duration_seconds:
            raise ValueError(f"prompt_seconds={self.prompt_seconds:g} leaves nothing of duration_seconds={self.duration_seconds:g} to generate")
        window = self.window_segments or trained.window_segments
        if not 0 < window <= trained.window_segments:
            raise ValueError(f"window_segments={self.window_segments}: expected at most the {trained.window_segments} that the model was trained on")
        if not 0 < self.stride_segments <= window:
            raise ValueError(f"stride_segments={self.stride_segments}: expected between 1 and the window's {window} segments")


def whole_segments(duration_seconds: float) -> int:
    """A duration in segments; 0 stays 0 (the whole video). Raises ValueError with the nearest valid durations."""
    segments = round(duration_seconds / float(SEGMENT_SECONDS))
    if duration_seconds < 0 or abs(segments * float(SEGMENT_SECONDS) - duration_seconds) > 1e-6:
        below = max(1, int(duration_seconds / float(SEGMENT_SECONDS)))
        near = f"{float(below * SEGMENT_SECONDS):g} or {float((below + 1) * SEGMENT_SECONDS):g}"
        raise ValueError(f"duration_seconds is {duration_seconds:g}; expected a multiple of a segment's 0.64 s, such as {near}")
    return segments


@dataclass(frozen=True)
class Networks:
    """Where the three networks are, and how they run."""

    run: str
    """Run folder, on this machine."""
    tower: TowerOptions
    """With the file of the tower that the run was trained on."""
    codec: str
    """The codec's weights file."""
    weights: str = "model"
    """Which weights of the run."""
    precision: Precision = "fp32"
    """Arithmetic of the decoder."""
    engine: EngineOptions = field(default_factory=EngineOptions)


def find_networks(
    run: str, *, tower: TowerOptions, codec: str = "", weights: str = "model", precision: Precision = "fp32", engine: EngineOptions | None = None
) -> Networks:
    """The networks of a run: given files, else those recorded with the run. Raises ValueError for others than it was trained on."""
    local = local_run(named_run(run))
    trained = read_config(local)
    found: dict[str, str] = {}
    for name, given in (("tower", tower.weights), ("codec", codec)):
        path = resolve(given) if given else trained.weights_path(local, name)
        if path is None or not path.is_file():
            option = "tower.weights" if name == "tower" else "codec_weights"
            raise ValueError(f"the {name}'s weights that {run} was trained on are not at {path}; give {option}=FILE")
        expected, sha256 = trained.data["spec"][name]["weights_sha256"], sha256_file(path)
        if sha256 != expected:
            raise ValueError(
                f"{name} weights {path} have sha256 {sha256[:12]}...; the run was trained on features of {expected[:12]}...: give that file"
            )
        found[name] = str(path.resolve())
    return Networks(local, replace(tower, weights=found["tower"]), found["codec"], weights, precision, engine or EngineOptions())


class Sounder:
    """Tower, decoder and codec in one process, and how to go from pictures to sound with them."""

    def __init__(self, networks: Networks, options: SoundOptions = SoundOptions()) -> None:
        """Loads everything. Raises ValueError where the options do not fit the run."""
        self.trained, model = read_run_folder(networks.run, name=networks.weights)
        options.check(self.trained)
        self.options = options
        codec = self.trained.data["spec"]["codec"]
        # Contiguous segments from the start: V-AURA's own grid.
        self.featuriser = Featuriser(
            FeatureOptions(
                hop_frames=SEGMENT_FRAMES,
                tower=networks.tower,
                codec=CodecOptions(
                    weights=networks.codec, name=codec["name"], bandwidth_kbps=codec.get("bandwidth_kbps", CodecOptions.bandwidth_kbps)
                ),
            )
        )
        assert self.featuriser.codec is not None
        self.codec = self.featuriser.codec
        self.dtype = DTYPES[networks.precision]
        self.engine = Engine(model.to(self.featuriser.device, self.dtype).eval(), networks.engine)

    @classmethod
    def open(cls, run: str, options: SoundOptions = SoundOptions(), *, device: str = "auto", precision: Precision = "fp32") -> "Sounder":
        """The networks of a run folder whose weights files are where it says."""
        return cls(find_networks(run, tower=TowerOptions(weights="", device=device), precision=precision), options)

    @property
    def sample_rate_hz(self) -> int:
        """Samples per second of the sound."""
        return self.codec.sample_rate_hz

    def samples_of(self, frames: int) -> int:
        """Samples in so many frames at 25 fps, to the nearest."""
        return round(Fraction(frames * self.sample_rate_hz, FRAME_RATE_HZ))

    @overload
    def generate(self, video: str | Path | bytes, *, start_seconds: float = 0.0, key: str = "") -> Sound: ...
    @overload
    def generate(self, video: str | Path | bytes, *, stream: Literal[True], start_seconds: float = 0.0, key: str = "") -> Iterator[Sound]: ...
    def generate(self, video: str | Path | bytes, *, stream: bool = False, start_seconds: float = 0.0, key: str = "") -> Sound | Iterator[Sound]:
        """Sound for one video of any length, at constant memory; with `stream`, pieces as they are made, which end to end are the same sound.

        `key` is what the clip's own chance is seeded with beside `options.seed`; empty takes the file's stem. Raises MediaError where the video is
        at fault.
        """
        stretch = Stretch.of(start_seconds, self.options.segments)
        pieces = self.film(video, stretch, seed=clip_seed(self.options.seed, key or (Path(video).stem if isinstance(video, (str, Path)) else "")))
        return pieces if stream else np.concatenate(list(pieces), axis=1)

    def film(self, video: str | Path | bytes, stretch: Stretch, *, seed: int, short_side: int | None = 256) -> Iterator[Sound]:
        """Sound for one video as a stream: decoded, featurised, generated and decoded from codes piece by piece."""
        frames = stretch.frames_of(call(video_frames, video, limits=Limits()))
        prompt = self.prompt(video, stretch, frames)
        decoding = partial(film_pictures, short_side=short_side, piece_segments=FILM_PIECE_SEGMENTS)
        pictures = isolate.stream(decoding, video, stretch, limits=Limits())
        codes = None if prompt is None else self.encode(prompt)[None]
        pieces = self.waves(self.tokens(pictures), seeds=[seed], prompt=codes)
        yield from (piece[0] for piece in self.cut(pieces, frames))

    def prompt(self, video: str | Path | bytes, stretch: Stretch, frames: int) -> Sound | None:
        """The stretch's own sound for as long as the prompt is; None without one. Raises MediaError for no sound, or a stretch of no more frames."""
        if not self.options.prompt_seconds:
            return None
        if frames <= self.options.prompt_seconds * FRAME_RATE_HZ:
            raise MediaError(
                "too_short",
                f"{frames / FRAME_RATE_HZ:.2f} s of pictures; nothing is left to make after prompt_seconds={self.options.prompt_seconds:g}",
            )
        own = call(partial(decode_audio, sample_rate_hz=self.sample_rate_hz, channels=self.codec.channels), video, limits=Limits())
        start, samples = self.samples_of(stretch.start_frame), round(self.options.prompt_seconds * self.sample_rate_hz)
        return own[:, start : start + samples]

    def encode(self, sound: Sound) -> Int[Tensor, "q steps"]:
        """The codes of the whole steps of a sound."""
        codes = self.codec.encode(torch.from_numpy(np.ascontiguousarray(sound))[None].to(self.featuriser.device))[0]
        return codes[:, : sound.shape[1] // self.codec.hop_samples]

    def tokens(self, pictures: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """Video tokens [1, tokens, width] of pieces of pictures, each of whole segments."""
        for _, features in self.featuriser.run(pictures, lambda piece: Decoded(piece, None)):
            assert not isinstance(features, Exception)  # pieces have whole segments
            yield self.as_tokens(features.avclip)

    def as_tokens(self, avclip: np.ndarray) -> Tensor:
        """Features [b, segments, 8, width] as the decoder takes them: [b, tokens, width]."""
        return torch.from_numpy(avclip).flatten(1, 2).to(self.featuriser.device, self.dtype)

    def waves(
        self, features: Iterable[Tensor], *, seeds: Sequence[int], prompt: Int[Tensor, "b q p"] | None = None
    ) -> Iterator[Float32[np.ndarray, "b channels _"]]:
        """Sound for a batch of videos of equal length, whose tokens [b, n, width] come in pieces. All of the last step, so it may end late."""
        streams = [self.codec.stream() for _ in seeds]
        for codes in self._codes(features, seeds, prompt):
            yield _together([stream.push(own) for stream, own in zip(streams, codes, strict=True)])
        yield _together([stream.finish() for stream in streams])

    def _codes(self, features: Iterable[Tensor], seeds: Sequence[int], prompt: Tensor | None) -> Iterator[Int[Tensor, "b q n"]]:
        options = self.options
        if options.windows == "published":
            whole = torch.cat(list(features), dim=1)
            schedule = published_schedule(
                options.duration_seconds, options.stride_segments * float(SEGMENT_SECONDS), available_segments=whole.shape[1] // SEGMENT_TOKENS
            )
            yield generate_windows(self.engine, whole, sampling=options.sampling, schedule=schedule, seeds=seeds)
            return
        rate = self.codec.clock.rate
        yield from stream_windows(
            self.engine,
            features,
            sampling=options.sampling,
            clock=rate * SEGMENT_SECONDS / SEGMENT_TOKENS,
            window_segments=options.window_segments or self.trained.window_segments,
            stride_segments=options.stride_segments,
            prompt=prompt,
            seeds=seeds,
            piece_steps=round(options.piece_seconds * rate),
        )

    def cut(self, pieces: Iterable[np.ndarray], frames: int) -> Iterator[np.ndarray]:
        """The pieces up to the end of so many frames, to the sample. With published windows they may end a little earlier."""
        left = self.samples_of(frames)
        for piece in pieces:
            if part := min(left, piece.shape[-1]):
                yield piece[..., :part]
            left -= part
        assert left == 0 or self.options.windows == "published", "the codes cover the video"


def clip_seed(seed: int, key: str) -> int:
    """A clip's own seed, so that its sound does not depend on which clips share its batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{key}".encode()).digest()[:7], "little")


def _together(waves: Sequence[Tensor]) -> Float32[np.ndarray, "b channels _"]:
    return torch.stack([wave.float() for wave in waves]).cpu().numpy()
