"""From decoded clips to features and codes: decoding runs ahead in threads, the visual tower works in batches across clips.

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
from jaxtyping import Float16, UInt8, UInt16
from torch import Tensor

from configs.clock import SEGMENT_FRAMES, check_hop, segment_count
from model.codecs import Codec, load_codec
from model.motion_tower import MotionTower
from model.synchformer_visual import VisualTower, load_tower, normalise
from model.weights import resolve, sha256_file
from pipeline.media import MediaError
from pipeline.views import Crop, view_crop

T = TypeVar("T")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    says itself what it is."""
    weights: str = ""
    """A weights file; empty takes the published one of that name from the cache."""
    bandwidth_kbps: float = 6.0
    """EnCodec's bandwidth; it decides the number of codebooks (24 kHz: 6 kbps gives 8). DAC has 9 codebooks whatever this says."""


@dataclass(frozen=True)
class FeatureOptions:
    """What decides the feature shards' bytes, and how decoding keeps ahead of the networks."""

    hop_frames: int = 8
    """Frames from one stored segment's start to the next: 16 is V-AURA's grid, 8 Synchformer's 50 % overlap, 4 finer random starts."""
    views: int = 1
    """Stored views of a clip: the centre crop, then random crops and flips."""
    tower: TowerOptions = field(default_factory=TowerOptions)
    codec: CodecOptions = field(default_factory=CodecOptions)
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


@dataclass(frozen=True)
class Features:
    """What is stored of one clip."""

    avclip: Float16[np.ndarray, "views segments tokens width"]
    codes: UInt16[np.ndarray, "codebooks steps"] | None
    crops: list[Crop]
    frames: int


@dataclass
class _Open(Generic[T]):
    """A clip whose segments are on their way through the tower."""

    item: T
    decoded: Decoded
    crops: list[Crop]
    codes: np.ndarray | None
    waiting: int
    rows: list[Tensor] = field(default_factory=list)


class Featuriser:
    """The visual tower and the codec on one device."""

    def __init__(self, options: FeatureOptions, *, with_codec: bool = True) -> None:
        """Loads both networks. Raises ValueError for a wrong option, FileNotFoundError where weights are missing."""
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
        self.codec: Codec | None = open_codec(options.codec).to(self.device) if with_codec else None
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Time that decoding (summed over its threads), tower and codec were busy since `take_seconds` was last called."""
        self._timed: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    def take_seconds(self) -> dict[str, float]:
        """Busy seconds by kind of work since the last call: decode, tower, codec."""
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

    def run(self, items: Iterable[T], decode: Callable[[T], Decoded]) -> Iterator[tuple[T, Features | MediaError]]:
        """Features of every item, in order; a MediaError raised by `decode` comes out in its item's place."""
        size, batch_segments = self.tower.config.image_size, self.options.tower.batch_segments
        queue: deque[_Open[T] | tuple[T, MediaError]] = deque()
        pending: deque[tuple[_Open[T], int, int]] = deque()

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
                    clip = _Open(item, decoded, crops, self._encode(decoded.sound), segments * len(crops))
                    queue.append(clip)
                    pending.extend((clip, view, segment) for view in range(len(crops)) for segment in range(segments))
            while len(pending) >= batch_segments:
                self._tower_batch([pending.popleft() for _ in range(batch_segments)])
            yield from self._finished(queue)
        while pending:
            self._tower_batch([pending.popleft() for _ in range(min(batch_segments, len(pending)))])
        yield from self._finished(queue)

    @staticmethod
    def _key(item: object) -> str:
        return str(getattr(item, "key", item))

    def _finished(self, queue: "deque[_Open[T] | tuple[T, MediaError]]") -> Iterator[tuple[T, Features | MediaError]]:
        while queue:
            head = queue[0]
            if isinstance(head, _Open):
                if head.waiting:
                    return
                rows = torch.stack(head.rows).unflatten(0, (len(head.crops), -1)).to("cpu", torch.float16).numpy()
                yield head.item, Features(rows, head.codes, head.crops, head.decoded.own_frames or len(head.decoded.frames))
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
        precision = DTYPES[self.options.tower.precision]
        autocast = nullcontext() if precision == torch.float32 else torch.autocast(self.device.type, precision)
        with autocast, self._busy("tower"):
            tokens = self._forward(normalise(pixels.to(self.device, non_blocking=True)).unsqueeze(1))[:, 0]
        for (clip, _, _), features in zip(batch, tokens, strict=True):
            clip.rows.append(features)
            clip.waiting -= 1

    @torch.inference_mode()
    def _encode(self, sound: np.ndarray | None) -> UInt16[np.ndarray, "codebooks steps"] | None:
        if self.codec is None or sound is None:
            return None
        with self._busy("codec"):
            codes = self.codec.encode(torch.from_numpy(np.ascontiguousarray(sound)).to(self.device).unsqueeze(0))
        return codes[0].to("cpu").numpy().astype(np.uint16)


def networks_spec(options: FeatureOptions) -> dict:
    """The part of a feature dataset's spec that the networks and their arithmetic decide. Loads both, on the CPU, and lets them go."""
    tower = options.tower
    return {
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
        "codec": open_codec(options.codec).spec(),
    }


def find_weights(options: FeatureOptions) -> tuple[Path, Path]:
    """The weights files of tower and codec, found before hours of work depend on them. Raises FileNotFoundError that says how to get them."""
    try:
        return resolve(options.tower.weights), resolve(options.codec.weights or options.codec.name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; or fit small stand-ins on a media dataset with `soundshard standin` and give tower.weights= and codec.weights="
        ) from error


def open_codec(options: CodecOptions) -> Codec:
    """The codec that the options name, from its weights file or the cache."""
    return load_codec(options.weights or options.name, bandwidth_kbps=options.bandwidth_kbps)


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU if there is one. Raises ValueError for a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name}, but torch sees no GPU on this machine; give tower.device=cpu")
    return torch.device(name)


def ahead(items: Iterable[T], work: Callable[[T], Decoded], *, threads: int, limit: int) -> Iterator[tuple[T, Decoded | MediaError]]:
    """`work` of every item in a few threads, at most `limit` results ahead of the consumer; results come in the items' order."""
    results: deque[tuple[T, Future[Decoded]]] = deque()
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
                    outcome: Decoded | MediaError = future.result()
                except MediaError as error:
                    outcome = error
                yield item, outcome
        finally:
            pool.shutdown(cancel_futures=True)
