"""A Synchformer's answers about cuts of clips: from media, decoded ahead in threads, or from stored segments of both towers, without any tower.

From media a cut's segments lie exactly where they were asked for. From features they are the stored ones that are nearest: the pictures' first, then
the sound's for the same offset, since it is the offset that is asked about. Knows no lists and no tables.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from configs import storage
from configs.clock import SEGMENT_FRAMES
from model.avclip import Avclip, shifted_windows
from model.segments import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, SEGMENT_SAMPLES, Cut, SegmentGrid
from model.synchformer import Head, SyncModule, load_sync_module
from model.synchformer_audio import LogMel
from model.synchformer_visual import normalise
from pipeline.features import AUDIO_MEMBER, ahead, autocast, pick_device
from pipeline.isolate import Limits, call
from pipeline.media import DecodedClip, MediaError, decode
from pipeline.sync_score import HEADS, WANTED, SyncScorer
from pipeline.sync_tables import Answer
from pipeline.views import view_crop
from shards.read import ArrayMembers, Index

PAIRS_AT_ONCE = 64
"""Cuts whose tokens are compared together, from features: 40 MB of the published towers' tokens."""
REMOTE_READS = 8
VISUAL_MEMBER = "avclip.npy"


@dataclass(frozen=True)
class Question:
    """A cut of a clip, and what is true of it."""

    cut: Cut
    synchronisable: bool = True
    repeat: int = 0


@dataclass(frozen=True)
class Asked:
    """A clip of a dataset and what is asked about it."""

    key: str
    row: int
    """In the dataset's index."""
    label: str | None
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Contrast:
    """Segment AVCLIP on one device, for stage I."""

    model: Avclip
    window: int
    """Segments of a window."""
    precision: str = "fp32"
    batch_segments: int = 16

    @torch.inference_mode()
    def embed(
        self, frames: np.ndarray, wave: np.ndarray, cut: Cut, grid: SegmentGrid
    ) -> tuple[Float[Tensor, "1 segments d"], Float[Tensor, "1 segments d"]]:
        """Embeddings of a cut's segments of pictures (the middle of them, as for features) and of sound."""
        device, size = self.model.logit_scale.device, self.model.v_encoder.config.image_size
        _, height, width, _ = frames.shape
        shown = torch.from_numpy(view_crop("", 0, height, width, size).apply(frames).copy())
        pixels = torch.stack([shown[start : start + SEGMENT_FRAMES] for start in _moved(grid.frame_starts(), cut.start_frame)])
        heard = torch.stack([torch.from_numpy(wave[s : s + SEGMENT_SAMPLES].copy()) for s in _moved(grid.sample_starts(), cut.start_sample)])
        log_mel = LogMel(self.model.a_encoder.config).to(device)
        visual: list[Tensor] = []
        with autocast(device, self.precision):
            for part in pixels.split(self.batch_segments):
                visual.append(self.model.v_encoder(normalise(part.to(device)).unsqueeze(1))[:, 0].float().mean(1))
            audio = self.model.a_encoder(log_mel(heard.to(device)).unsqueeze(1))[:, 0].float().mean(1)
        return torch.cat(visual)[None], audio[None]


class TokenScorer:
    """What is above the towers, for stored tokens: no tower is loaded."""

    def __init__(self, weights: str, device: str = "auto", precision: str = "fp32", *, head: Head | None = None) -> None:
        """Loads the network. Raises ValueError for one with another head than `head`, FileNotFoundError where weights are missing."""
        self.device, self.precision = pick_device(device), precision
        self.model: SyncModule = load_sync_module(weights, device=self.device).requires_grad_(False).eval()
        if head not in (None, self.model.config.head):
            raise ValueError(f"{weights}: {HEADS[self.model.config.head]}; expected a network that {WANTED[head]}")

    @torch.inference_mode()
    def logits(
        self, visual: Float[Tensor, "b segments v visual_width"], audio: Float[Tensor, "b segments a audio_width"]
    ) -> Float[Tensor, "b classes"]:
        """The head's logits, on the CPU."""
        with autocast(self.device, self.precision):
            return self.model.compare(visual.to(self.device), audio.to(self.device)).float().cpu()


@dataclass(frozen=True)
class Networks:
    """What answers: of stage I, or of stages II and III or both."""

    contrast: Contrast | None = None
    offset: SyncScorer | TokenScorer | None = None
    synchronisable: SyncScorer | TokenScorer | None = None

    def from_tokens(
        self, visual: Float[Tensor, "b segments v visual_width"], audio: Float[Tensor, "b segments a audio_width"]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of the offsets, and probabilities of being synchronisable, each where there is a network for it. A network that compares fewer
        segments takes the first, as published."""
        parts = list(zip(visual.split(PAIRS_AT_ONCE), audio.split(PAIRS_AT_ONCE), strict=True))
        logits = said = None
        if self.offset is not None:
            logits = torch.cat([self.offset.logits(v, a) for v, a in parts])
        if self.synchronisable is not None:
            first = self.synchronisable.model.config.segments
            said = torch.cat([self.synchronisable.logits(v[:, :first], a[:, :first]) for v, a in parts]).softmax(-1)[:, 1]
        return logits, said


# --- from media -----------------------------------------------------------------------------------------------------------------------


class FromMedia:
    """Answers about clips of a media dataset. A clip is decoded once, in a process of its own, whatever is asked about it."""

    def __init__(self, index: Index, networks: Networks, grid: SegmentGrid, *, threads: int, limits: Limits) -> None:
        assert not any(isinstance(network, TokenScorer) for network in (networks.offset, networks.synchronisable)), "media needs towers"
        self._index, self._networks, self._grid, self._threads, self._limits = index, networks, grid, threads, limits

    def answers(self, asked: Sequence[Asked]) -> Iterator[list[Answer]]:
        """The answers about each clip, in order; of a clip that cannot be decoded, one that says why."""
        for clip, decoded in ahead(asked, self._decode, threads=self._threads, limit=self._threads + 2):
            if isinstance(decoded, MediaError):
                yield [Answer(clip.key, clip.label, reason=decoded.reason, message=decoded.message)]
            else:
                yield self._answers(clip, decoded.frames, decoded.audio[0])

    def _decode(self, clip: Asked) -> DecodedClip:
        stored = self._index.bytes(clip.row, "mp4")
        return call(partial(decode, sample_rate_hz=SAMPLE_RATE_HZ, channels=1), stored, limits=self._limits)

    def _answers(self, clip: Asked, frames: np.ndarray, wave: np.ndarray) -> list[Answer]:
        fits = [question for question in clip.questions if _fits(question.cut, self._grid, len(frames), len(wave))]
        if len(fits) < len(clip.questions):
            return [too_short(clip, len(frames))]
        networks, cuts = self._networks, [question.cut for question in fits]
        if networks.contrast is not None:
            return [_windows(clip, q, networks.contrast, *networks.contrast.embed(frames, wave, q.cut, self._grid)) for q in fits]
        logits = said = None
        if isinstance(networks.offset, SyncScorer):
            logits = networks.offset.cut_logits(frames, wave, cuts, self._grid)
        if isinstance(networks.synchronisable, SyncScorer):
            own = tight(networks.synchronisable.model.config.segments, self._grid.hop_frames)
            inner = [_inner(cut, self._grid, own) for cut in cuts]
            said = networks.synchronisable.cut_logits(frames, wave, inner, own).softmax(-1)[:, 1]
        return [_answer(clip, question, logits, said, i) for i, question in enumerate(fits)]


def _fits(cut: Cut, grid: SegmentGrid, frames: int, samples: int) -> bool:
    last_frame, last_sample = cut.start_frame + grid.frame_starts()[-1], cut.start_sample + grid.sample_starts()[-1]
    return last_frame + SEGMENT_FRAMES <= frames and last_sample + SEGMENT_SAMPLES <= samples


def tight(segments: int, hop_frames: int) -> SegmentGrid:
    """A grid whose first segment begins with the cut and whose last one ends with it."""
    span = SEGMENT_FRAMES + (segments - 1) * hop_frames
    grid = SegmentGrid(span / 25, segments, hop_frames)
    return grid if grid.crop_frames == span else replace(grid, crop_seconds=(span + 1e-6) / 25)


def _inner(cut: Cut, grid: SegmentGrid, inner: SegmentGrid) -> Cut:
    """The cut whose segments, on a tight grid, are the first of this one's."""
    return replace(
        cut,
        start_frame=cut.start_frame + grid.frame_starts()[0],
        start_sample=cut.start_sample + grid.sample_starts()[0],
        frames=inner.crop_frames,
        samples=inner.crop_samples,
    )


# --- from features --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nearest:
    """The stored segments that a cut's are answered with."""

    visual: int
    """The first one's number; the others follow at the grid's hop."""
    audio: int
    moved_frames: int
    offset_error_samples: int


@dataclass(frozen=True)
class StoredGrid:
    """Where the stored segments of a dataset lie."""

    hop_frames: int
    hop_samples: int

    def nearest(self, cut: Cut, grid: SegmentGrid, visual: int, audio: int) -> Nearest | None:
        """The stored segments nearest to a cut's, of a clip with so many of pictures and of sound; None where the clip is too short for them.

        The pictures begin at the stored segment nearest to where they were asked for whose sound, with the same offset, is stored too: less than a
        hop away.
        """
        first, reach = cut.start_frame + grid.frame_starts()[0], (grid.segments - 1) * grid.hop_frames
        last_visual, last_audio = visual - 1 - reach // self.hop_frames, audio - 1 - reach * SAMPLES_PER_FRAME // self.hop_samples
        around = {first // self.hop_frames, -(-first // self.hop_frames)}
        for number in sorted(around, key=lambda n: (abs(n * self.hop_frames - first), n)):
            moved = number * self.hop_frames - first
            wanted = cut.start_sample + grid.sample_starts()[0] + moved * SAMPLES_PER_FRAME
            heard = (2 * wanted + self.hop_samples) // (2 * self.hop_samples)
            if 0 <= number <= last_visual and 0 <= heard <= last_audio:
                return Nearest(number, heard, moved, heard * self.hop_samples - wanted)
        return None

    def strides(self, grid: SegmentGrid) -> tuple[int, int]:
        """From one of a cut's segments to the next, in stored ones of pictures and of sound. Raises ValueError where they were not stored."""
        hop_samples = grid.hop_frames * SAMPLES_PER_FRAME
        if grid.hop_frames % self.hop_frames or hop_samples % self.hop_samples:
            raise ValueError(
                f"segments are stored every {self.hop_frames} frames and {self.hop_samples} samples; a cut's lie {grid.hop_frames} frames and "
                f"{hop_samples} samples apart: featurise with hops that divide these (hop_frames=8 audio.hop_samples=640), or give the media dataset"
            )
        return grid.hop_frames // self.hop_frames, hop_samples // self.hop_samples


class FromFeatures:
    """Answers about clips of a feature dataset with both towers' segments, from the first view (the middle of the pictures)."""

    def __init__(self, index: Index, networks: Networks, grid: SegmentGrid) -> None:
        stored, members = index.info.spec.get("audio"), [index.members.get(name) for name in (VISUAL_MEMBER, AUDIO_MEMBER)]
        if not stored or not all(isinstance(member, ArrayMembers) for member in members):
            raise ValueError(
                f"{index.root} has no features of sound ({', '.join(index.members) or 'no members'}); featurise with audio.weights=avclip, or give "
                "the media dataset that it was made from"
            )
        self._index, self._networks, self._grid = index, networks, grid
        self._stored = StoredGrid(index.info.spec["hop_frames"], stored["hop_samples"])
        self._strides = self._stored.strides(grid)

    def answers(self, asked: Sequence[Asked]) -> Iterator[list[Answer]]:
        """The answers about each clip, in order, compared in batches across clips."""
        waiting: deque[tuple[Asked, list[Nearest], Tensor, Tensor]] = deque()
        threads = REMOTE_READS if storage.is_remote(self._index.root) else 1
        for clip, found in ahead(asked, self._read, threads=threads, limit=2 * threads):
            if isinstance(found, MediaError):
                yield from self._flushed(waiting)
                yield [Answer(clip.key, clip.label, reason=found.reason, message=found.message)]
                continue
            waiting.append((clip, *found))
            if sum(len(places) for _, places, _, _ in waiting) >= PAIRS_AT_ONCE:
                yield from self._flushed(waiting)
        yield from self._flushed(waiting)

    def _read(self, clip: Asked) -> tuple[list[Nearest], Tensor, Tensor]:
        visual, audio = (self._index.member(clip.row, name)[0] for name in (VISUAL_MEMBER, AUDIO_MEMBER))
        places = [self._stored.nearest(question.cut, self._grid, len(visual), len(audio)) for question in clip.questions]
        there = [place for place in places if place is not None]
        if len(there) < len(places):
            raise MediaError("too_short", f"{len(visual)} segments of pictures and {len(audio)} of sound are stored, too few for the cut")
        segments, (visual_stride, audio_stride) = self._grid.segments, self._strides
        shown = np.stack([visual[place.visual :: visual_stride][:segments] for place in there])
        heard = np.stack([audio[place.audio :: audio_stride][:segments] for place in there])
        return there, torch.from_numpy(shown), torch.from_numpy(heard)

    def _flushed(self, waiting: "deque[tuple[Asked, list[Nearest], Tensor, Tensor]]") -> Iterator[list[Answer]]:
        if not waiting:
            return
        visual, audio = torch.cat([entry[2] for entry in waiting]).float(), torch.cat([entry[3] for entry in waiting]).float()
        logits = said = None
        if self._networks.contrast is None:
            logits, said = self._networks.from_tokens(visual, audio)
        at = 0
        while waiting:
            clip, places, _, _ = waiting.popleft()
            found: list[Answer] = []
            for question, place in zip(clip.questions, places, strict=True):
                contrast = self._networks.contrast
                pair = visual[at : at + 1].mean(2), audio[at : at + 1].mean(2)
                answer = _answer(clip, question, logits, said, at) if contrast is None else _windows(clip, question, contrast, *pair)
                found.append(replace(answer, moved_frames=place.moved_frames, offset_error_samples=place.offset_error_samples))
                at += 1
            yield found


# --- both -----------------------------------------------------------------------------------------------------------------------------


def too_short(clip: Asked, frames: int) -> Answer:
    """In place of answers about a clip that does not hold the cuts."""
    needs = "; ".join(f"pictures from frame {q.cut.start_frame} and sound from sample {q.cut.start_sample}" for q in clip.questions[:1])
    return Answer(clip.key, clip.label, reason="too_short", message=f"{frames} frames at 25 fps, too few for a cut with {needs}")


def _moved(starts: range, by: int) -> Iterator[int]:
    return (start + by for start in starts)


def _answer(clip: Asked, question: Question, logits: Tensor | None, said: Tensor | None, row: int) -> Answer:
    cut = question.cut
    return Answer(
        clip.key,
        clip.label,
        question.repeat,
        cut.start_frame,
        cut.start_sample,
        cut.offset_seconds,
        question.synchronisable,
        None if logits is None else logits[row].tolist(),
        None if said is None else float(said[row]),
    )


def _windows(clip: Asked, question: Question, contrast: Contrast, visual: Tensor, audio: Tensor) -> Answer:
    found = shifted_windows(visual, audio, window=contrast.window)
    answer = _answer(clip, question, None, None, 0)
    return replace(answer, precision_audio=float(found.precision_audio[0]), precision_visual=float(found.precision_visual[0]))
