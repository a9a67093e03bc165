"""A video in, what Synchformer says along it out: decoded piece by piece in a process of its own, and looked at in windows as it comes.

Knows no Ray, no dataset and no output; `pipeline.sync` and `pipeline.sync_clips` bring those.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES
from model.segments import OFFSET, SAMPLE_RATE_HZ, Cut, cut_at
from pipeline import isolate
from pipeline.decode import MediaError
from pipeline.isolate import Limits
from pipeline.sync_score import Follower, SyncScorer
from pipeline.sync_video import Length, Piece, watch
from pipeline.timeline import Timeline

PIECE_FRAMES = 128
"""Pictures that are decoded and go through the towers at a time: 44 MB at 256 x 454."""
SILENT_PEAK = 1e-4
"""Sound that never gets louder (-80 dB) is silence: the dither of 16 bits is a third of it."""
BLANK_CONTRAST = 8
"""Pictures whose values are never further apart, of 255, show nothing."""
STEP_SECONDS = 0.32
"""Windows begin on this grid, because segments do: so they share what the towers made of them."""


@dataclass(frozen=True)
class JudgeOptions:
    """Which network judges, and which stretches of a video it is shown."""

    weights: str = "sync"
    """Synchformer's weights for offsets: a file, or the name of published ones (`soundshard weights get=sync`)."""
    synchronisable: bool = False
    """Also say whether there is anything to synchronise, by a second network; windows then count by it."""
    synchronisability_weights: str = "synchability"
    """Its weights: a file, or the name of published ones (`soundshard weights get=synchability`)."""
    start_seconds: float | None = None
    """Look only at the 5 s from here on, as the published example does; null looks at the whole video."""
    offset_seconds: float = 0.0
    """Take the sound so much later in the file (earlier if below 0) before it is compared: what comes out is then this much larger."""
    every_seconds: float = 0.64
    """From one 5 s window to the next along a whole video, a multiple of 0.32."""
    short_videos: Literal["refuse", "repeat"] = "refuse"
    """What becomes of a video shorter than 5 s. `repeat`: it is repeated to fill them, which the network was not trained on; such answers rank sounds
    for the same pictures and should not be taken for offsets."""
    device: str = "auto"
    """`cpu`, `cuda` or `auto`: a GPU if there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the networks. The published figures were made with fp16 autocast."""
    batch_segments: int = 16
    """Segments that go through the towers at a time."""
    threads: int = 0
    """torch threads of a process; 0 leaves it to torch for one video, and takes 1 for many."""

    def __post_init__(self) -> None:
        steps = self.every_seconds / STEP_SECONDS
        if steps < 0.5 or abs(steps - round(steps)) > 1e-6:
            raise ValueError(f"every_seconds is {self.every_seconds:g}; expected a multiple of {STEP_SECONDS:g} s, such as 0.64")
        self.first_cut()  # a start that cannot be is refused at once

    def first_cut(self) -> Cut:
        """Where the first window lies: at `start_seconds`, or where a video begins to have both sound and pictures. Raises ValueError for a start
        before the beginning."""
        start_seconds = max(0.0, -self.offset_seconds) if self.start_seconds is None else self.start_seconds
        return cut_at(start_seconds, self.offset_seconds)

    @property
    def hop_frames(self) -> int:
        """From one window to the next."""
        return round(self.every_seconds / STEP_SECONDS) * OFFSET.hop_frames


class Judge:
    """The networks on one device."""

    def __init__(self, options: JudgeOptions, limits: Limits) -> None:
        """Loads them. Raises ValueError for networks with other heads than theirs, FileNotFoundError where weights are missing."""
        self.options, self._limits = options, limits
        if options.threads:
            torch.set_num_threads(options.threads)
        load = partial(SyncScorer, device=options.device, precision=options.precision, batch_segments=options.batch_segments)
        self.scorer = load(options.weights, head="offset")
        self.other = load(options.synchronisability_weights, head="synchronisable") if options.synchronisable else None

    def judge(
        self,
        source: str | Path | bytes,
        *,
        part: tuple[float | None, float | None] = (None, None),
        as_stored: bool = False,
        tell: Callable[[float, float], None] = lambda _done, _of: None,
    ) -> Timeline:
        """The timeline of one video, or of the part of it from one second to another. Clips of a media dataset are looked at `as_stored`, not brought
        to size again.

        `tell` hears, in seconds, how far it is and of how much. Raises MediaError where the video is at fault: `too_short`, `silent`, `blank`
        (nothing to see), `no_video`, `no_audio`, or what decoding finds.
        """
        options = self.options
        cut = options.first_cut()
        watching = partial(
            watch,
            start_frame=cut.start_frame,
            start_sample=cut.start_sample,
            most_frames=None if options.start_seconds is None else cut.frames,
            short_side=None if as_stored else self.scorer.short_side,
            piece_frames=PIECE_FRAMES,
            part=part,
        )
        with closing(isolate.stream(watching, source, limits=self._limits)) as items:
            length = cast(Length, next(items))
            pieces = cast(Iterator[Piece], items)
            if length.together < cut.frames:
                return self._repeated(length, pieces, cut.start_frame)
            frames = length.together if options.start_seconds is None else cut.frames
            starts = window_starts(frames, options.hop_frames)
            seen = _Seen(starts, cut.frames)
            offsets, can = self._follow(starts, pieces, seen, lambda done: tell(done / FRAME_RATE_HZ, frames / FRAME_RATE_HZ))
        return Timeline(
            duration_seconds=length.frames / FRAME_RATE_HZ,
            window_seconds=cut.frames / FRAME_RATE_HZ,
            starts_seconds=(cut.start_frame + np.array(starts)) / FRAME_RATE_HZ,
            probabilities=offsets.softmax(-1).numpy(),
            faults=seen.faults(),
            peaks=seen.peaks,
            synchronisable=None if can is None else can.softmax(-1)[:, 1].numpy(),
            offset_seconds=cut.offset_seconds,
        )

    def _follow(self, starts: list[int], pieces: Iterator[Piece], seen: "_Seen", tell: Callable[[int], None]) -> tuple[Tensor, Tensor | None]:
        """Both networks' logits for all windows."""
        scorers = [scorer for scorer in (self.scorer, self.other) if scorer is not None]
        followers = [Follower(scorer, starts, scorer.grid) for scorer in scorers]
        answers: list[list[Tensor]] = [[] for _ in followers]
        for piece in pieces:
            seen.add(piece)
            for follower, answer in zip(followers, answers, strict=True):
                answer.append(follower.push(piece.frames, piece.wave))
            tell(seen.frames)
            del piece  # its memory is free before the next comes
        seen.check()
        offsets, *rest = [torch.cat(answer) for answer in answers]
        return offsets, rest[0] if rest else None

    def _repeated(self, length: Length, pieces: Iterator[Piece], start_frame: int) -> Timeline:
        """The answer for a video that does not fill a window."""
        seconds, needed = length.together / FRAME_RATE_HZ, OFFSET.crop_frames / FRAME_RATE_HZ
        if self.options.short_videos == "refuse" or length.together < SEGMENT_FRAMES:
            what = f"{max(0.0, seconds):.2f} s of pictures with sound"
            what += f" from {start_frame / FRAME_RATE_HZ:.2f} s on" if start_frame else ""
            way = "; short_videos=repeat answers all the same, less reliably" if length.together >= SEGMENT_FRAMES else ""
            raise MediaError("too_short", f"{what}; an offset is found in {needed:g} s{way}")
        together = list(pieces)
        seen = _Seen([0], length.together)
        for piece in together:
            seen.add(piece)
        seen.check()
        frames, wave = np.concatenate([piece.frames for piece in together]), np.concatenate([piece.wave for piece in together])
        answers = [scorer.offsets(frames, wave[None], SAMPLE_RATE_HZ) for scorer in chain([self.scorer], [self.other] if self.other else [])]
        return Timeline(
            duration_seconds=length.frames / FRAME_RATE_HZ,
            window_seconds=seconds,
            starts_seconds=np.array([start_frame / FRAME_RATE_HZ]),
            probabilities=answers[0].numpy()[None],
            faults=("",),
            peaks=seen.peaks,
            synchronisable=answers[1].numpy()[1:] if self.other else None,
            offset_seconds=self.options.offset_seconds,
            repeated=True,
        )


def window_starts(frames: int, hop_frames: int) -> list[int]:
    """First frames of the windows of 5 s in so many frames: every `hop_frames`, and a last one as near to the end as their common grid allows."""
    last = (frames - OFFSET.crop_frames) // OFFSET.hop_frames * OFFSET.hop_frames
    return [*range(0, last, hop_frames), last]


class _Seen:
    """What pictures and sound of the windows are like: whether there is anything in them."""

    def __init__(self, starts: list[int], window_frames: int) -> None:
        self._starts, self._window = starts, window_frames
        self._peaks: list[np.ndarray] = []
        self._contrasts: list[np.ndarray] = []
        self.frames = 0

    def add(self, piece: Piece) -> None:
        """The next pictures and their sound."""
        self._peaks.append(piece.peaks)
        self._contrasts.append(piece.contrasts)
        self.frames += len(piece.frames)

    @property
    def peaks(self) -> np.ndarray:
        """Under every picture."""
        return np.concatenate(self._peaks)

    def faults(self) -> tuple[str, ...]:
        """Of every window."""
        peaks, contrasts = self.peaks, np.concatenate(self._contrasts)

        def fault(start: int) -> str:
            silent = peaks[start : start + self._window].max() < SILENT_PEAK
            return "silent" if silent else "blank" if contrasts[start : start + self._window].max() <= BLANK_CONTRAST else ""

        return tuple(fault(start) for start in self._starts)

    def check(self) -> None:
        """Raises MediaError if there is not one window with sound and pictures."""
        faults = self.faults()
        if all(faults):
            if "silent" in faults:
                raise MediaError("silent", f"its sound never gets above {SILENT_PEAK:g} (-80 dB): there is nothing to hear")
            raise MediaError("blank", "its pictures are of one colour: there is nothing to see")
