"""The windows that a feature dataset offers, and batches of them cut from its shards.

Knows tensors, the segment clock and the dataset format. Knows no order: which windows make a batch is the caller's matter.
"""

from typing import TypedDict

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float16, Int64
from torch import Tensor

from configs.clock import SEGMENT_FRAMES, SEGMENT_SECONDS, SEGMENT_TOKENS, CodecClock, check_hop, window_starts
from shards.dataset import DatasetMismatch
from shards.read import ArrayMembers, Index


class Batch(TypedDict):
    """One rank's share of a global batch."""

    features: Float16[Tensor, "b segments 8 width"]
    codes: Int64[Tensor, "b codebooks steps"]
    keys: list[str]


class Windows:
    """The windows that a feature dataset offers, and how they are cut from the mapped shards."""

    def __init__(self, index: Index, segments: int, *, pin_memory: bool = False) -> None:
        if index.info.kind != "features":
            raise DatasetMismatch(
                f"{index.root} is a {index.info.kind} dataset; training reads a features dataset, which `soundshard featurise` makes of it"
            )
        spec, self._index, self._segments, self._pin = index.info.spec, index, segments, pin_memory and torch.cuda.is_available()
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
        self._first_step = np.array([clock.window_steps(start * hop, segments).start for start in range(by_count.max())], np.int64)
        # A codec may give a step fewer than the pictures need: then the last starts are not offered.
        self.starts = np.minimum(by_count[stored], np.searchsorted(self._first_step + self._steps, steps, side="right"))
        """How many hop indices may begin a window, by row of the index."""
        self.views = features.shape[:, 0]
        self.rows = np.flatnonzero(self.starts)
        if not len(self.rows):
            raise ValueError(
                f"{index.root} has {index.ok} good clips in {sorted(set(index.table['split'].to_pylist()))} and none is as long as a window of "
                f"{segments} segments ({float(segments * SEGMENT_SECONDS):g} s); take fewer segments or another split"
            )
        self.bytes = int((features.size + codes.size)[self.rows].sum())
        shapes = np.unique(np.column_stack([features.shape[self.rows, 2:], codes.shape[self.rows, :1]]), axis=0)
        if len(shapes) > 1 or shapes[0, 0] != SEGMENT_TOKENS or shapes[0, -1] != codec["codebooks"] or features.dtype != np.float16:
            raise ValueError(
                f"{index.root}: features must be float16 [views, segments, {SEGMENT_TOKENS}, width] of one width, with {codec['codebooks']} "
                f"codebooks as dataset.json says; found {features.dtype} with [tokens, width, codebooks] {shapes.tolist()}"
            )
        self._width, self._codebooks = int(shapes[0, 1]), int(shapes[0, 2])

    def blocks(self, block_bytes: int) -> np.ndarray:
        """The block of every row in `rows`, counted from 0: runs of a shard of this many bytes."""
        shard, block = self._index.shard_of[self.rows], self._features.offset[self.rows] // max(1, block_bytes)
        changes = (np.diff(shard) != 0) | (np.diff(block) != 0)
        return np.concatenate([[0], np.cumsum(changes)])

    def batch(self, rows: np.ndarray, starts: np.ndarray, views: np.ndarray) -> Batch:
        """The windows of these rows at these hop indices, cut before they are copied: a window is a quarter of a 10 s clip's bytes."""
        features = torch.empty((len(rows), self._segments, SEGMENT_TOKENS, self._width), dtype=torch.float16, pin_memory=self._pin)
        codes = torch.empty((len(rows), self._codebooks, self._steps), dtype=torch.int64, pin_memory=self._pin)
        features_out, codes_out = features.numpy(), codes.numpy()
        feature_type, code_type = self._features.dtype, self._codes.dtype
        token = self._width * feature_type.itemsize
        segment = SEGMENT_TOKENS * token
        feature_at = self._features.data_offset[rows] + (views * self._features.shape[rows, 1] + starts) * segment
        feature_strides = (self._stride * segment, token, feature_type.itemsize)
        code_at = self._codes.data_offset[rows] + self._first_step[starts] * code_type.itemsize
        code_rows = self._codes.shape[rows, 1] * code_type.itemsize
        shards = self._index.shard_of[rows].tolist()
        for number, (shard, at, steps_at, code_row) in enumerate(zip(shards, feature_at.tolist(), code_at.tolist(), code_rows.tolist(), strict=True)):
            mapped = self._index.mapped(shard)
            features_out[number] = np.ndarray(features_out.shape[1:], feature_type, mapped, at, feature_strides)
            codes_out[number] = np.ndarray(codes_out.shape[1:], code_type, mapped, steps_at, (code_row, code_type.itemsize))
        return {"features": features, "codes": codes, "keys": self._index.keys.take(pa.array(rows)).to_pylist()}
