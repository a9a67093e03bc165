"""What a scorer is, and which there are.

A scorer looks at a clip and gives numbers for its own columns. Those of kind `media` are given pictures and sound, decoded once for all of them;
those of kind `features` read stored arrays, and no clip is decoded. They are called with a few clips at a time, so that networks may compute them in
one batch: `make(options)`, once in each process, gives a function from items to as many rows of values. Others wrap a function of one clip in `each`.
Where a call raises, its clips are tried one by one, and what raises then is that clip's error: a scorer catches nothing and guesses nothing. None is
for what cannot be told of a clip (the loudness of silence).

Knows nothing of where scores go, of Ray, and of what any scorer computes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, UInt8

Kind = Literal["media", "features"]
Need = Literal["pictures", "sound", "speech", "stills"]
"""What is decoded of a clip because some scorer looks at it: fields of `Media`."""
Value = float | int | bool | None
Scores = Mapping[str, Value]


@dataclass(frozen=True)
class ScoreOptions:
    """What scorers can be told. It decides the scores, all but `device` and `batch_clips`."""

    silence_dbfs: float = -60.0
    """silence: a tenth of a second whose root mean square is below this is silent, in dB of full scale."""
    imagebind_weights: str = "imagebind_huge.pth"
    """imagebind: the published weights (4.8 GB; CC BY-NC 4.0), a file or the name of one in the cache. They are never downloaded by this job."""
    sync_weights: str = "sync"
    """sync: a Synchformer for offsets, as in `soundshard sync`: a file, a run folder of train.sync or the name of a published one."""
    synchronisability_weights: str = "synchability"
    """synchronisable: a Synchformer that knows what can be synchronised."""
    device: str = "auto"
    """Of networks: `cpu`, `cuda` or `auto`, a GPU if there is one. Each process holds its networks: on a cpu, `actors` should be few."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of networks."""
    batch_clips: int = 8
    """Clips that a scorer is given at a time."""


@dataclass(frozen=True)
class Media:
    """A decoded clip: what some scorer needs of it, all on one clock. The rest is None."""

    frames: int
    """Pictures on the 25 fps clock."""
    pictures: UInt8[np.ndarray, "frames height width 3"] | None = None
    """All of them, small: the shorter side has 64 pixels."""
    sound: Float32[np.ndarray, "channels samples"] | None = None
    """At its own rate."""
    sound_rate_hz: int = 0
    speech: Float32[np.ndarray, "speech_samples"] | None = None
    """The mean of the sound's channels at 16 kHz."""
    stills: UInt8[np.ndarray, "stills still_height still_width 3"] | None = None
    """A few pictures at the size that ImageBind looks at, two for each of its short clips."""


@dataclass(frozen=True)
class Item:
    """A clip as a scorer sees it."""

    key: str
    spec: Mapping[str, Any]
    """The dataset's spec: hops, rates, weights' hashes."""
    member: Callable[[str], np.ndarray]
    """A stored array by its extension, such as `avclip.npy`; ValueError where the clip has none."""
    media: Media | None = None
    """For scorers of kind `media`."""


Scoring = Callable[[Sequence[Item]], Sequence[Scores]]


@dataclass(frozen=True)
class Scorer:
    """A way to tell something of clips."""

    name: str
    kind: Kind
    columns: Mapping[str, pa.DataType]
    """What it gives: float64, float32, int64 or bool columns, whose names are no other scorer's."""
    make: Callable[[ScoreOptions], Scoring]
    """Loads what it needs and gives the function from clips to values: one mapping with all columns for each clip."""
    version: Callable[[ScoreOptions], str]
    """What decides its values beside the clip: a number of its own, options, hashes of weights. Scores of another version are not mixed. Called
    before the work begins: raises ValueError or FileNotFoundError that says how to get what is missing."""
    summary: str = ""
    """What it tells, in a line."""
    needs: frozenset[Need] = frozenset()
    """For kind `media`: what is decoded for it."""
    members: tuple[str, ...] = ()
    """For kind `features`: members that a dataset must have."""
    networks: bool = False
    """Whether it computes on `ScoreOptions.device`."""
    usual: bool = False
    """Whether it is taken where no scorers are named: it needs no weights and is quick."""


def each(function: Callable[[Item], Scores]) -> Scoring:
    """The scoring of a function that looks at one clip."""
    return lambda items: [function(item) for item in items]


def registered() -> dict[str, Scorer]:
    """All scorers by name. Those of the same columns and names are refused."""
    from pipeline import feature_scores, imagebind, media_scores  # each is written in this module's words

    scorers = (*media_scores.SCORERS, *imagebind.SCORERS, *feature_scores.SCORERS)
    columns = [column for scorer in scorers for column in scorer.columns]
    assert len({scorer.name for scorer in scorers}) == len(scorers) and len(set(columns)) == len(columns), "scorers share a name or a column"
    return {scorer.name: scorer for scorer in scorers}
