"""What Lightning iterates over: a stream of samples without worker processes of Lightning's, and how long training waited for it.

Knows `shards.samples` and Lightning's rules for loaders. Knows no model; a batch is tensors, and how many samples of it count.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float16, Float32, Int64, UInt8
from lightning.pytorch import LightningDataModule
from torch import Tensor

from shards.pairs import PairBatch
from shards.read import Index
from shards.samples import SampleConfig, SampleStream
from shards.stream import FeatureStream, StreamConfig
from shards.windows import Batch
from train.sharding import ShardedStrategy

ENDLESS = 2**40
"""The stream has no end. Lightning reads a batch ahead from a loader that has no length, which would put the stream's state a batch ahead too."""


@dataclass(frozen=True)
class StreamOptions(StreamConfig):
    """Which windows make a step's batch, and how they are read. Defaults: the published batch, and page-locked memory where there is a GPU."""

    batch_size: int = 48
    """Windows in a step, over all devices and accumulated passes. Published: 12 on each of 4 GPUs."""
    pin_memory: bool = True
    """Assemble batches in page-locked memory, for faster copies to a GPU. Ignored where there is none."""


class Windows(NamedTuple):
    """A rank's share of a batch."""

    features: Float16[Tensor, "b segments 8 width"]
    codes: Int64[Tensor, "b codebooks steps"]
    segment_mask: Bool[Tensor, "b segments"] | None = None
    """What is video and not padding after a short clip's end; None: all of it."""
    step_mask: Bool[Tensor, "b steps"] | None = None
    """The same for codec steps."""
    samples: int = 0
    """How many of them count: all, or none where a batch only keeps a process in step with the others."""

    @classmethod
    def of(cls, batch: Batch, *, counts: bool = True) -> "Windows":
        samples = len(batch["codes"]) if counts else 0
        return cls(batch["features"], batch["codes"], batch.get("segment_mask"), batch.get("step_mask"), samples)


class Pairs(NamedTuple):
    """A rank's share of a batch: both towers' features of the same segments, and what is to be said of them."""

    visual: Float16[Tensor, "b segments 8 visual_width"]
    audio: Float16[Tensor, "b segments tokens audio_width"]
    target: Int64[Tensor, "b"]
    samples: int = 0

    @classmethod
    def of(cls, batch: PairBatch, *, counts: bool = True) -> "Pairs":
        return cls(batch["visual"], batch["audio"], batch["target"], len(batch["target"]) if counts else 0)


class Clips(NamedTuple):
    """A rank's share of a batch: pictures and sound of segments, as bytes and waves, and what is to be said of them."""

    pixels: UInt8[Tensor, "b segments frames size size 3"]
    sound: Float32[Tensor, "b segments length"]
    target: Int64[Tensor, "b"]
    samples: int = 0

    @classmethod
    def of(cls, batch: dict[str, Any], *, counts: bool = True) -> "Clips":
        pixels = batch["pixels"]
        # Where segments' places are the same in both, there is nothing to be said of them.
        target = batch.get("target", torch.zeros(len(pixels), dtype=torch.int64))
        return cls(pixels, batch["sound"], target, len(pixels) if counts else 0)


class TrainLoader:
    """The endless training stream. Lightning saves and restores its state with its own checkpoints."""

    def __init__(self, stream: SampleStream, of: Callable[..., Any], device: torch.device) -> None:
        self._stream, self._of, self._device = stream, of, device
        self._waits: list[tuple[float, torch.cuda.Event | None, torch.cuda.Event | None]] = []

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Any]:
        with closing(self._endless()) as batches:
            while True:
                idle, began = self._mark(), time.perf_counter()
                batch = next(batches)
                self._waits.append((time.perf_counter() - began, idle, self._mark()))
                yield self._of(batch)

    def _endless(self) -> Generator[Any, None, None]:
        """Epoch after epoch, where the stream ends with each."""
        while True:
            yield from self._stream

    def state_dict(self) -> dict[str, Any]:
        return dict(self._stream.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state)

    def take_wait_seconds(self) -> float:
        """Seconds for which steps waited for data since this was last asked. Call it where the device has been waited for.

        On a GPU only the time in which it was idle counts: the host runs ahead of it, and a wait behind queued work costs nothing.
        """
        waits, self._waits = self._waits, []
        return sum(min(waited, a.elapsed_time(b) / 1000) if a is not None and b is not None else waited for waited, a, b in waits)

    def _mark(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class ValidationLoader:
    """One complete pass over the validation split, each time.

    `first` is the first process's stream where all must take equally many batches, as sharded weights ask for: one that has fewer, for it never has
    more, ends with batches of that one, which do not count.
    """

    def __init__(self, stream: SampleStream, of: Callable[..., Any], first: SampleStream | None = None) -> None:
        self._stream, self._of, self._first = stream, of, first

    def __iter__(self) -> Iterator[Any]:
        yield from map(self._of, self._stream)
        if self._first is not None:
            missing = self._first.steps_per_epoch - self._stream.steps_per_epoch
            for batch in islice(self._first, missing):
                yield self._of(batch, counts=False)


Opener = Callable[[int, int], SampleStream]
"""(rank, how many ranks there are) -> that rank's stream."""


class StreamData(LightningDataModule):
    """Streams for Lightning. Which samples a rank reads is decided here, from the trainer's ranks, whatever launched them."""

    def __init__(self, train: Opener, validation: Opener | None, of: Callable[..., Any]) -> None:
        super().__init__()
        self._train, self._validation, self._of = train, validation, of

    def train_dataloader(self) -> TrainLoader:
        trainer = self._attached()
        stream = self._train(trainer.global_rank, trainer.world_size)
        tell(trainer, stream, "training")
        return TrainLoader(stream, self._of, trainer.strategy.root_device)

    def val_dataloader(self) -> ValidationLoader | list[ValidationLoader]:
        trainer = self._attached()
        if self._validation is None:
            return []
        stream = self._validation(trainer.global_rank, trainer.world_size)
        tell(trainer, stream, "validation")
        first = self._validation(0, trainer.world_size) if isinstance(trainer.strategy, ShardedStrategy) else None
        return ValidationLoader(stream, self._of, first)

    def _attached(self) -> Any:
        assert self.trainer is not None
        return self.trainer


Config = TypeVar("Config", bound=SampleConfig)


def share_of(stream: Config, accumulate: int) -> Config:
    """The stream of a backward pass, of which a step has `accumulate`. Raises ValueError where a batch cannot be cut so."""
    if stream.batch_size % accumulate:
        raise ValueError(f"stream.batch_size={stream.batch_size} cannot be cut into trainer.accumulate={accumulate} equal parts")
    return replace(stream, batch_size=stream.batch_size // accumulate)


def feature_data(train: Sequence[Index], validation: Sequence[Index], stream: StreamConfig, *, accumulate: int) -> StreamData:
    """Windows of feature shards, of one dataset or several. The datasets' weights are for training; validation is one pass over all there is."""
    stream = share_of(stream, accumulate)

    def opened(rank: int, world: int) -> FeatureStream:
        return FeatureStream(train, stream, rank, world)

    def validated(rank: int, world: int) -> FeatureStream:
        return FeatureStream(validation, replace(stream, weights=None), rank, world, shuffle=False)

    return StreamData(opened, validated if validation else None, Windows.of)


def tell(trainer: Any, stream: SampleStream, split: str) -> None:
    """Say what became of clips shorter than a sample, if there are any."""
    padded = stream.padded if isinstance(stream, FeatureStream) else 0
    advice = " (stream.short_clips=pad takes them)" if isinstance(stream, FeatureStream) else ""
    for clips, what in ((stream.skipped, f"left out{advice}"), (padded, "padded")):
        if clips and trainer.is_global_zero:
            print(f"data   {clips} {split} clips are shorter than a window and {what}", flush=True)
