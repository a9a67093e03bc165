"""The windows that a feature dataset offers, and batches of them cut from its shards.

Knows tensors, the segment clock and the dataset format. Knows no order: which windows make a batch is the caller's matter.
"""

from typing import Literal, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float16, Int64
from torch import Tensor

from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES, SEGMENT_SECONDS, SEGMENT_TOKENS, CodecClock, check_hop, window_starts
from shards.blocks import FetchConfig
from shards.dataset import DatasetMismatch
from shards.read import ArrayMembers, Index
from shards.source import Source


class Batch(TypedDict):
    """One rank's share of a global batch."""

    features: Float16[Tensor, "b segments 8 width"]
    codes: Int64[Tensor, "b codebooks steps"]
    keys: list[str]
    segment_mask: NotRequired[Bool[Tensor, "b segments"]]
    """Where short clips are padded: which segments are there; what follows a clip's end is zeros."""
    step_mask: NotRequired[Bool[Tensor, "b steps"]]
    """Where short clips are padded: which codec steps are there."""


class Windows(Source):
    """The windows that a feature dataset offers, and how they are cut from mapped shards, or from an object store's blocks in memory."""

    def __init__(
        self,
        index: Index,
        segments: int,
        *,
        short_clips: Literal["drop", "pad"] = "drop",
        pin_memory: bool = False,
        fetch: FetchConfig | None = None,
    ) -> None:
        if index.info.kind != "features":
            raise DatasetMismatch(
                f"{index.root} is a {index.info.kind} dataset; training reads a features dataset, which `soundshard featurise` makes of it"
            )
        spec, self._segments, self._pin = index.info.spec, segments, pin_memory and torch.cuda.is_available()
        codec: dict = spec.get("codec") or {"name": "(no codec)"}
        features, codes = index.members.get("avclip.npy"), index.members.get(f"{codec['name']}.npy")
        if not isinstance(features, ArrayMembers) or not isinstance(codes, ArrayMembers):
            raise ValueError(
                f"{index.root} offers no windows: a sample needs avclip.npy and {codec['name']}.npy; it has {index.ok} good samples with "
                f"{', '.join(index.members) or 'no members'}"
            )
        self._features, self._codes = features, codes
        clock, hop = CodecClock(codec["sample_rate_hz"], codec["hop_samples"]), check_hop(spec["hop_frames"])
        self._stride, self._steps = SEGMENT_FRAMES // hop, clock.steps_in(segments)
        stored, steps = features.shape[:, 1], codes.shape[:, 1]
        by_count = np.array([window_starts(count, segments, hop) for count in range(stored.max() + 1)])
        self._first_step = np.array([clock.window_steps(start * hop, segments).start for start in range(max(1, by_count.max()))], np.int64)
        # A codec may give a step fewer than the pictures need: then the last starts are not offered.
        self.starts = np.minimum(by_count[stored], np.searchsorted(self._first_step + self._steps, steps, side="right"))
        """How many hop indices may begin a window, by row of the index."""
        self.views = features.shape[:, 0]
        given = np.zeros(len(index)) if index.start_seconds is None else np.round(index.start_seconds * FRAME_RATE_HZ / hop)
        self.given = np.clip(given, 0, np.maximum(self.starts - 1, 0)).astype(np.int64)
        """The hop index nearest to where a view says that a clip's stretch begins; 0 where nothing says it."""
        self._pad, short = short_clips == "pad", self.starts == 0
        # What there is of a window: all of it, but where a short clip is padded.
        whole = np.array([clock.steps_in(count) for count in range(segments + 1)])
        self._segments_of = np.where(short, np.minimum(segments, (stored - 1) // self._stride + 1), segments)
        self._steps_of = np.where(short, np.minimum(whole[self._segments_of], steps), self._steps)
        if self._pad:
            self.starts = np.where(short & (self._steps_of > 0), 1, self.starts)
        rows = np.flatnonzero(self.starts)
        self.padded = int(np.count_nonzero(short[rows]))
        """How many clips are shorter than a window, and padded."""
        if not len(rows):
            raise ValueError(
                f"{index.root} has {index.ok} good clips in {sorted(set(index.table['split'].to_pylist()))} and none is as long as a window of "
                f"{segments} segments ({float(segments * SEGMENT_SECONDS):g} s); take fewer segments or another split"
            )
        shapes = np.column_stack([features.shape[rows, 2:], codes.shape[rows, :1]])
        shapes = shapes[:1] if (shapes == shapes[0]).all() else np.unique(shapes, axis=0)  # which sorts: a second for a million
        if len(shapes) > 1 or shapes[0, 0] != SEGMENT_TOKENS or shapes[0, -1] != codec["codebooks"] or features.dtype != np.float16:
            raise ValueError(
                f"{index.root}: features must be float16 [views, segments, {SEGMENT_TOKENS}, width] of one width, with {codec['codebooks']} "
                f"codebooks as dataset.json says; found {features.dtype} with [tokens, width, codebooks] {shapes.tolist()}"
            )
        self._width, self._codebooks = int(shapes[0, 1]), int(shapes[0, 2])
        super().__init__(index, rows, (features, codes), fetch)

    def batch(self, rows: np.ndarray, starts: np.ndarray, views: np.ndarray) -> Batch:
        """The windows of these rows at these hop indices."""
        batch = self.empty(len(rows))
        self.fill(batch, np.arange(len(rows)), rows, starts, views)
        return batch

    def empty(self, size: int) -> Batch:
        """A batch of so many windows, for `fill`."""
        features = torch.empty((size, self._segments, SEGMENT_TOKENS, self._width), dtype=torch.float16, pin_memory=self._pin)
        codes = torch.empty((size, self._codebooks, self._steps), dtype=torch.int64, pin_memory=self._pin)
        batch: Batch = {"features": features, "codes": codes, "keys": [""] * size}
        if self._pad:
            batch["segment_mask"] = torch.ones((size, self._segments), dtype=torch.bool)
            batch["step_mask"] = torch.ones((size, self._steps), dtype=torch.bool)
        return batch

    def fill(self, batch: Batch, slots: np.ndarray, rows: np.ndarray, starts: np.ndarray, views: np.ndarray) -> None:
        """Puts windows into these places of a batch, which ascend, cut before they are copied: a window is a quarter of a 10 s clip's bytes."""
        features_out, codes_out = batch["features"].numpy(), np.empty((len(rows), self._codebooks, self._steps), self._codes.dtype)
        assert features_out.shape[-1] == self._width and batch["codes"].shape[1:] == codes_out.shape[1:]
        feature_type, code_type = self._features.dtype, self._codes.dtype
        token = self._width * feature_type.itemsize
        segment = SEGMENT_TOKENS * token
        feature_at = self._features.data_offset[rows] + (views * self._features.shape[rows, 1] + starts) * segment
        feature_strides = (self._stride * segment, token, feature_type.itemsize)
        code_at = self._codes.data_offset[rows] + self._first_step[starts] * code_type.itemsize
        code_rows = self._codes.shape[rows, 1] * code_type.itemsize
        segments, steps = self._segments_of[rows], self._steps_of[rows]
        features_to, codes_to = [features_out[slot] for slot in slots.tolist()], list(codes_out)
        for number in np.flatnonzero(steps < self._steps).tolist():
            features_to[number][:], codes_to[number][:] = 0, 0
            features_to[number], codes_to[number] = features_to[number][: segments[number]], codes_to[number][:, : steps[number]]
        with self.reading(rows) as (buffers, begins):
            places = zip(features_to, codes_to, buffers, (feature_at - begins).tolist(), (code_at - begins).tolist(), code_rows.tolist(), strict=True)
            for feature_to, code_to, buffer, at, steps_at, code_row in places:
                feature_to[:] = np.ndarray(feature_to.shape, feature_type, buffer, at, feature_strides)
                code_to[:] = np.ndarray(code_to.shape, code_type, buffer, steps_at, (code_row, code_type.itemsize))
        batch["codes"].numpy()[slots if len(slots) < len(batch["keys"]) else ...] = codes_out  # widened all at once
        for slot, key in zip(slots.tolist(), self.index.keys.take(pa.array(rows)).to_pylist(), strict=True):
            batch["keys"][slot] = key
        if "segment_mask" in batch and "step_mask" in batch:
            batch["segment_mask"].numpy()[slots] = np.arange(self._segments) < segments[:, None]
            batch["step_mask"].numpy()[slots] = np.arange(self._steps) < steps[:, None]
