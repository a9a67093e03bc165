"""What Lightning iterates over: the feature stream without worker processes, and how long training waited for it.

Knows `shards.stream` and Lightning's rules for loaders. Knows no model; a batch is features and codes.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float16, Int64
from lightning.pytorch import LightningDataModule
from torch import Tensor

from shards.read import Index
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


class TrainLoader:
    """The endless training stream. Lightning saves and restores its state with its own checkpoints."""

    def __init__(self, stream: FeatureStream, device: torch.device) -> None:
        self._stream, self._device = stream, device
        self._waits: list[tuple[float, torch.cuda.Event | None, torch.cuda.Event | None]] = []

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Windows]:
        with closing(self._endless()) as batches:
            while True:
                idle, began = self._mark(), time.perf_counter()
                batch = next(batches)
                self._waits.append((time.perf_counter() - began, idle, self._mark()))
                yield Windows.of(batch)

    def _endless(self) -> Generator[Batch, None, None]:
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

    def __init__(self, stream: FeatureStream, first: FeatureStream | None = None) -> None:
        self._stream, self._first = stream, first

    def __iter__(self) -> Iterator[Windows]:
        yield from map(Windows.of, self._stream)
        if self._first is not None:
            missing = self._first.steps_per_epoch - self._stream.steps_per_epoch
            for batch in islice(self._first, missing):
                yield Windows.of(batch, counts=False)


class FeatureData(LightningDataModule):
    """Feature shards for Lightning, of one dataset or several. Which samples a rank reads is decided here, from the trainer's ranks, whatever
    launched them. The datasets' weights are for training; validation is one pass over all there is."""

    def __init__(self, train: Sequence[Index], validation: Sequence[Index], stream: StreamConfig, *, accumulate: int) -> None:
        super().__init__()
        self._train, self._validation = train, validation
        if stream.batch_size % accumulate:
            raise ValueError(f"stream.batch_size={stream.batch_size} cannot be cut into trainer.accumulate={accumulate} equal parts")
        self._stream = replace(stream, batch_size=stream.batch_size // accumulate)

    def train_dataloader(self) -> TrainLoader:
        trainer = self._attached()
        stream = FeatureStream(self._train, self._stream, trainer.global_rank, trainer.world_size)
        tell(trainer, stream, "training")
        return TrainLoader(stream, trainer.strategy.root_device)

    def val_dataloader(self) -> ValidationLoader | list[ValidationLoader]:
        trainer = self._attached()
        if not self._validation:
            return []
        config = replace(self._stream, weights=None)
        stream = FeatureStream(self._validation, config, trainer.global_rank, trainer.world_size, shuffle=False)
        tell(trainer, stream, "validation")
        first = (
            FeatureStream(self._validation, config, 0, trainer.world_size, shuffle=False) if isinstance(trainer.strategy, ShardedStrategy) else None
        )
        return ValidationLoader(stream, first)

    def _attached(self) -> Any:
        assert self.trainer is not None
        return self.trainer


def tell(trainer: Any, stream: FeatureStream, split: str) -> None:
    """Say what became of clips shorter than a window, if there are any."""
    for clips, what in ((stream.skipped, "left out (stream.short_clips=pad takes them)"), (stream.padded, "padded")):
        if clips and trainer.is_global_zero:
            print(f"data   {clips} {split} clips are shorter than a window and {what}", flush=True)
