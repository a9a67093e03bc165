"""From decoded clips to features and codes: decoding runs ahead in threads, both towers work in batches across clips.

Knows no Ray and no shards; `pipeline.featurise` and `pipeline.generate` run it. The result does not depend on timing: clips come out in the
order in which they went in, and which segments share a batch follows from that order alone.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float16, Float32, UInt8, UInt16
from torch import Tensor

from configs.clock import SEGMENT_FRAMES, check_hop, segment_count
from model.codecs import Codec, load_codec
from model.motion_tower import MotionTower
from model.segments import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, SEGMENT_SAMPLES
from model.synchformer_audio import LogMel, load_audio_tower
from model.synchformer_visual import VisualTower, load_tower, normalise
from model.weights import resolve, sha256_file
from pipeline.media import MediaError
from pipeline.views import Crop, view_crop

T = TypeVar("T")
U = TypeVar("U")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NO_CODEC = "none"
AUDIO_MEMBER = "avclip_audio.npy"
"""Features of the sound in a shard: float16 [1, segments, tokens, width]. Segment i begins with sample i * hop_samples at 16 kHz."""


@dataclass(frozen=True)
class TowerOptions:
    """The Segment-AVCLIP visual tower and how it runs."""

    weights: str = "avclip"
    """A weights file (a published Segment-AVCLIP, Synchformer or V-AURA checkpoint, or a safetensors file of this project), or the name of a
    published one in the cache: `soundshard weights` lists them."""
    device: str = "auto"
    """`cpu`, `cuda` or `auto`: a GPU if there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the tower. The published features were made with fp16 autocast."""
    batch_segments: int = 16
    """Segments in one forward pass, taken across clips."""
    threads: int = 1
    """torch threads of one process; several processes share a machine, and one thread gives the same bits for every batch size."""
    compile: bool = False
    """Run the tower through torch.compile: some minutes at the start, faster afterwards on a GPU."""


@dataclass(frozen=True)
class CodecOptions:
    """The audio codec whose tokens are stored."""

    name: str = "encodec24"
    """`encodec24` (75 steps a second, the exact clock), `encodec48` (stereo) or `dac44` (44.1 kHz, 86.13 a second, V-AURA's own); a weights file
    says itself what it is. `none` stores no tokens: features alone, of which V-AURA cannot learn."""
    weights: str = ""
    """A weights file; empty takes the published one of that name from the cache."""
    bandwidth_kbps: float = 6.0
    """EnCodec's bandwidth; it decides the number of codebooks (24 kHz: 6 kbps gives 8). DAC has 9 codebooks whatever this says."""

    def __post_init__(self) -> None:
        if self.name == NO_CODEC and self.weights:
            raise ValueError(f"codec.name={NO_CODEC} stores no tokens, and codec.weights is {self.weights!r}; give one of them")


@dataclass(frozen=True)
class AudioOptions:
    """The Segment-AVCLIP audio tower, whose features synchronisation is trained and measured with. It runs on `tower.device`."""

    weights: str = ""
    """A weights file (a published Segment-AVCLIP or Synchformer checkpoint, or one of this project), or the name of a published one in the cache,
    such as `avclip`; empty stores no features of the sound."""
    hop_samples: int = 640
    """Samples at 16 kHz from one stored segment's start to the next. 640 is a frame of pictures: offsets of the 0.2 s grid are met exactly, and a
    jitter of 0.05 s is one hop to either side; 320 and 160 are finer, for two and four times the work and bytes."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the tower; spectrograms are always made in fp32."""
    batch_segments: int = 64
    """Segments in one forward pass, taken across clips."""

    def __post_init__(self) -> None:
        if min(self.hop_samples, self.batch_segments) < 1:
            raise ValueError(f"audio.hop_samples is {self.hop_samples}, audio.batch_segments {self.batch_segments}; expected at least 1")


@dataclass(frozen=True)
class FeatureOptions:
    """What decides the feature shards' bytes, and how decoding keeps ahead of the networks."""

    hop_frames: int = 8
    """Frames from one stored segment's start to the next: 16 is V-AURA's grid, 8 Synchformer's 50 % overlap, 4 finer random starts."""
    views: int = 1
    """Stored views of a clip: the centre crop, then random crops and flips."""
    tower: TowerOptions = field(default_factory=TowerOptions)
    codec: CodecOptions = field(default_factory=CodecOptions)
    audio: AudioOptions = field(default_factory=AudioOptions)
    chunk_clips: int = 8
    """Clips that one call of a process takes: segments share batches within it, and a process that dies loses no more than it."""
    decode_threads: int = 2
    """Clips decoded at the same time in each process."""
    decode_ahead: int = 4
    """Decoded clips that may wait for the network; a 10 s clip takes 65 MB."""


@dataclass(frozen=True)
class Decoded:
    """A decoded clip: pictures on the 25 fps clock and sound at the codec's rate, both from time 0."""

    frames: UInt8[np.ndarray, "frames height width 3"]
    sound: np.ndarray | None
    """float32 [channels, samples]; None where only pictures are wanted."""
    own_frames: int | None = None
    """Frames that are the clip's own, if the last picture is held beyond them to fill a segment."""
    heard: Float32[np.ndarray, "samples"] | None = None
    """The sound as the audio tower hears it, one channel at 16 kHz; None where it is not wanted."""


@dataclass(frozen=True)
class Features:
    """What is stored of one clip."""

    avclip: Float16[np.ndarray, "views segments tokens width"]
    codes: UInt16[np.ndarray, "codebooks steps"] | None
    crops: list[Crop]
    frames: int
    audio: Float16[np.ndarray, "1 audio_segments audio_tokens audio_width"] | None = None
    """Of the sound; as many segments as fit into the pictures' time."""


@dataclass
class _Rows:
    """Features of a clip's segments, which come out of a tower in order."""

    waiting: int
    rows: list[Tensor] = field(default_factory=list)

    def add(self, features: Tensor) -> None:
        self.rows.append(features)
        self.waiting -= 1

    def stored(self, views: int) -> Float16[np.ndarray, "views segments tokens width"]:
        return torch.stack(self.rows).unflatten(0, (views, -1)).to("cpu", torch.float16).numpy()


@dataclass
class _Open(Generic[T]):
    """A clip whose segments are on their way through the towers."""

    item: T
    decoded: Decoded
    crops: list[Crop]
    codes: np.ndarray | None
    sounds: Float32[np.ndarray, "segments samples"]
    seen: _Rows
    heard: _Rows


class Listener:
    """The audio tower and its front end on one device."""

    def __init__(self, options: AudioOptions, device: torch.device) -> None:
        """Loads the network. Raises FileNotFoundError where its weights are missing, ValueError where they are another network's."""
        self.options, self.device = options, device
        self.tower = load_audio_tower(options.weights, device=device)
        self.log_mel = LogMel(self.tower.config).to(device)

    @torch.inference_mode()
    def __call__(self, sounds: Float32[Tensor, "segments samples"]) -> Float32[Tensor, "segments tokens width"]:
        """Features of segments of sound at 16 kHz, each by itself: on the tower's device, in one forward pass."""
        spectrograms = self.log_mel(sounds.to(self.device, non_blocking=True))
        with autocast(self.device, self.options.precision):
            return self.tower(spectrograms.unsqueeze(1))[:, 0].float()


class Featuriser:
    """The visual tower, and where they are wanted the codec and the audio tower, on one device."""

    def __init__(self, options: FeatureOptions, *, with_codec: bool = True) -> None:
        """Loads the networks. Raises ValueError for a wrong option, FileNotFoundError where weights are missing."""
        check_hop(options.hop_frames)
        if (
            min(options.views, options.tower.batch_segments, options.decode_threads, options.decode_ahead, options.chunk_clips, options.tower.threads)
            < 1
        ):
            raise ValueError("views, chunk_clips, tower.batch_segments, tower.threads, decode_threads and decode_ahead must be at least 1")
        self.options = options
        self.device = pick_device(options.tower.device)
        torch.set_num_threads(options.tower.threads)
        self.tower: VisualTower | MotionTower = load_tower(options.tower.weights, device=self.device)
        self._forward: Callable[[Tensor], Tensor] = torch.compile(self.tower) if options.tower.compile else self.tower
        codec = open_codec(options.codec) if with_codec else None
        self.codec: Codec | None = codec.to(self.device) if codec else None
        self.listener = Listener(options.audio, self.device) if options.audio.weights else None
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Time that decoding (summed over its threads), tower, audio tower and codec were busy since `take_seconds` was last called."""
        self._timed: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    def take_seconds(self) -> dict[str, float]:
        """Busy seconds by kind of work since the last call: decode, tower, audio, codec."""
        while self._timed:
            work, begin, end = self._timed.popleft()
            end.synchronize()
            self.seconds[work] += begin.elapsed_time(end) / 1000
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken

    @contextmanager
    def _busy(self, work: str) -> Iterator[None]:
        """Count the time of the device: on a GPU between two events of its stream, since the calls return before the work is done."""
        if self.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._timed.append((work, begin, end))
        else:
            started = time.perf_counter()
            yield
            self.seconds[work] += time.perf_counter() - started

    def decode_rates(self) -> tuple[int, int] | None:
        """(sample rate in Hz, channels) that the codec wants, or None without one."""
        return (self.codec.sample_rate_hz, self.codec.channels) if self.codec else None

    def heard_rate_hz(self) -> int | None:
        """Sample rate of the one channel that the audio tower wants, or None without one."""
        return SAMPLE_RATE_HZ if self.listener else None

    def run(self, items: Iterable[T], decode: Callable[[T], Decoded]) -> Iterator[tuple[T, Features | MediaError]]:
        """Features of every item, in order; a MediaError raised by `decode` comes out in its item's place."""
        size, batch_segments, batch_sounds = self.tower.config.image_size, self.options.tower.batch_segments, self.options.audio.batch_segments
        queue: deque[_Open[T] | tuple[T, MediaError]] = deque()
        pending: deque[tuple[_Open[T], int, int]] = deque()
        unheard: deque[tuple[_Open[T], int]] = deque()

        def timed(item: T) -> Decoded:
            started = time.perf_counter()
            try:
                return decode(item)
            finally:
                self.seconds["decode"] += time.perf_counter() - started

        for item, decoded in ahead(items, timed, threads=self.options.decode_threads, limit=self.options.decode_ahead):
            if isinstance(decoded, MediaError):
                queue.append((item, decoded))
            else:
                count, height, width, _ = decoded.frames.shape
                segments = segment_count(count, self.options.hop_frames)
                if not segments:
                    queue.append((item, MediaError("too_short", f"{count} frames at 25 fps; a segment is {SEGMENT_FRAMES}")))
                else:
                    crops = [view_crop(self._key(item), view, height, width, size) for view in range(self.options.views)]
                    sounds = self._sounds(decoded)
                    clip = _Open(item, decoded, crops, self.encode(decoded.sound), sounds, _Rows(segments * len(crops)), _Rows(len(sounds)))
                    queue.append(clip)
                    pending.extend((clip, view, segment) for view in range(len(crops)) for segment in range(segments))
                    unheard.extend((clip, segment) for segment in range(len(sounds)))
            while len(pending) >= batch_segments:
                self._tower_batch([pending.popleft() for _ in range(batch_segments)])
            while len(unheard) >= batch_sounds:
                self._sound_batch([unheard.popleft() for _ in range(batch_sounds)])
            yield from self._finished(queue)
        while pending:
            self._tower_batch([pending.popleft() for _ in range(min(batch_segments, len(pending)))])
        while unheard:
            self._sound_batch([unheard.popleft() for _ in range(min(batch_sounds, len(unheard)))])
        yield from self._finished(queue)

    @staticmethod
    def _key(item: object) -> str:
        return str(getattr(item, "key", item))

    def _finished(self, queue: "deque[_Open[T] | tuple[T, MediaError]]") -> Iterator[tuple[T, Features | MediaError]]:
        while queue:
            head = queue[0]
            if isinstance(head, _Open):
                if head.seen.waiting or head.heard.waiting:
                    return
                audio = head.heard.stored(views=1) if head.heard.rows else None
                frames = head.decoded.own_frames or len(head.decoded.frames)
                yield head.item, Features(head.seen.stored(len(head.crops)), head.codes, head.crops, frames, audio)
            else:
                yield head
            queue.popleft()

    @torch.inference_mode()
    def _tower_batch(self, batch: list[tuple[_Open[T], int, int]]) -> None:
        """One forward pass over segments of several clips: [b, 16, size, size, 3] bytes travel to the device, floats are made there."""
        size = self.tower.config.image_size
        pixels = torch.empty(len(batch), SEGMENT_FRAMES, size, size, 3, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        for row, (clip, view, segment) in zip(pixels.numpy(), batch, strict=True):
            start = segment * self.options.hop_frames
            row[:] = clip.crops[view].apply(clip.decoded.frames[start : start + SEGMENT_FRAMES])
        with autocast(self.device, self.options.tower.precision), self._busy("tower"):
            tokens = self._forward(normalise(pixels.to(self.device, non_blocking=True)).unsqueeze(1))[:, 0]
        for (clip, _, _), features in zip(batch, tokens, strict=True):
            clip.seen.add(features)

    def _sounds(self, decoded: Decoded) -> Float32[np.ndarray, "segments samples"]:
        """The segments that the audio tower shall hear; none without one."""
        if self.listener is None or decoded.heard is None:
            return np.empty((0, SEGMENT_SAMPLES), np.float32)
        return sound_segments(decoded.heard, len(decoded.frames), self.options.audio.hop_samples)

    def _sound_batch(self, batch: list[tuple[_Open[T], int]]) -> None:
        """One forward pass of the audio tower over segments of several clips."""
        assert self.listener is not None
        sounds = torch.empty(len(batch), SEGMENT_SAMPLES, pin_memory=self.device.type == "cuda")
        for row, (clip, segment) in zip(sounds.numpy(), batch, strict=True):
            row[:] = clip.sounds[segment]
        with self._busy("audio"):
            tokens = self.listener(sounds)
        for (clip, _), features in zip(batch, tokens, strict=True):
            clip.heard.add(features)

    @torch.inference_mode()
    def encode(self, sound: np.ndarray | None) -> UInt16[np.ndarray, "codebooks steps"] | None:
        """The codec's tokens of one clip's sound; None without a codec or a sound."""
        if self.codec is None or sound is None:
            return None
        with self._busy("codec"):
            codes = self.codec.encode(torch.from_numpy(np.ascontiguousarray(sound)).to(self.device).unsqueeze(0))
        return codes[0].to("cpu").numpy().astype(np.uint16)


def networks_spec(options: FeatureOptions) -> dict:
    """The part of a feature dataset's spec that the networks and their arithmetic decide. Loads them, on the CPU, and lets them go."""
    tower, codec = options.tower, open_codec(options.codec)
    spec = {
        "hop_frames": options.hop_frames,
        "views": options.views,
        "chunk_clips": options.chunk_clips,
        "tower": {
            "config": asdict(load_tower(tower.weights).config),
            "weights_sha256": sha256_file(resolve(tower.weights)),
            "precision": tower.precision,
            "device": torch.device(tower.device).type,
            "threads": tower.threads,
            "batch_segments": tower.batch_segments,
            "compile": tower.compile,
        },
        "codec": codec.spec() if codec else None,
    }
    return spec | ({"audio": audio_spec(options)} if options.audio.weights else {})


def audio_spec(options: FeatureOptions) -> dict:
    """The same for the sound's features, which readers need to know where a stored segment lies."""
    audio, tower = options.audio, options.tower
    return {
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "segment_samples": SEGMENT_SAMPLES,
        "hop_samples": audio.hop_samples,
        "views": 1,
        "tower": {
            "config": asdict(load_audio_tower(audio.weights).config),
            "weights_sha256": sha256_file(resolve(audio.weights)),
            "precision": audio.precision,
            "device": torch.device(tower.device).type,
            "threads": tower.threads,
            "batch_segments": audio.batch_segments,
        },
    }


def sound_segments(wave: Float32[np.ndarray, "samples"], frames: int, hop_samples: int) -> Float32[np.ndarray, "segments segment_samples"]:
    """The segments of a clip's sound under its `frames` pictures, one every `hop_samples`: views of a copy. Missing sound is silence."""
    samples = frames * SAMPLES_PER_FRAME
    fitted = np.zeros(samples, np.float32)
    fitted[: len(wave)] = wave[:samples]
    return np.lib.stride_tricks.sliding_window_view(fitted, SEGMENT_SAMPLES)[::hop_samples]


def find_weights(options: FeatureOptions) -> dict[str, Path]:
    """The weights files of tower, codec and audio tower, as far as they are wanted, found before hours of work depend on them.

    Raises FileNotFoundError that says how to get them.
    """
    names = {"tower": options.tower.weights} | ({} if options.codec.name == NO_CODEC else {"codec": options.codec.weights or options.codec.name})
    try:
        found = {network: resolve(name) for network, name in names.items()}
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; or fit small stand-ins on a media dataset with `soundshard standin` and give tower.weights= and codec.weights="
        ) from error
    return found | ({"audio": resolve(options.audio.weights)} if options.audio.weights else {})


def open_codec(options: CodecOptions) -> Codec | None:
    """The codec that the options name, from its weights file or the cache; None if they want none."""
    return None if options.name == NO_CODEC else load_codec(options.weights or options.name, bandwidth_kbps=options.bandwidth_kbps)


def autocast(device: torch.device, precision: str) -> "torch.autocast | nullcontext[None]":
    """What makes a network compute in this precision; for fp32 nothing."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU if there is one. Raises ValueError for a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name}, but torch sees no GPU on this machine; give tower.device=cpu")
    return torch.device(name)


def ahead(items: Iterable[T], work: Callable[[T], U], *, threads: int, limit: int) -> Iterator[tuple[T, U | MediaError]]:
    """`work` of every item in a few threads, at most `limit` results ahead of the consumer; results come in the items' order."""
    results: deque[tuple[T, Future[U]]] = deque()
    source = iter(items)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            while True:
                while len(results) < limit and (item := next(source, None)) is not None:
                    results.append((item, pool.submit(work, item)))
                if not results:
                    return
                item, future = results.popleft()
                try:
                    outcome: U | MediaError = future.result()
                except MediaError as error:
                    outcome = error
                yield item, outcome
        finally:
            pool.shutdown(cancel_futures=True)
