"""How well sound fits pictures in time: what Synchformer says of any cuts of a clip, of a whole clip, and of several sounds for one clip.

Pictures go through the visual tower once, however many sounds are compared with them, and a segment that several windows or cuts share goes
through a tower once. Knows no files of media, no Ray, and nothing of what made the sound.
"""

import sys
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio.functional
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from configs.clock import SEGMENT_FRAMES
from model.segments import OFFSET, SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, SEGMENT_SAMPLES, SYNCHRONISABLE, Cut, SegmentGrid
from model.synchformer import Head, Synchformer, load_synchformer
from model.synchformer_audio import LogMel
from model.synchformer_visual import normalise
from pipeline.features import DTYPES, pick_device
from pipeline.views import view_crop

HOP_FRAMES = OFFSET.hop_frames
NEAR_CLASSES = 1
"""Offsets this far from none still count as in time: 0.2 s, as in the published accuracy within one class."""
SOUND_BATCH = 8
"""Segments of sound that a pass of the audio tower takes, for each segment of pictures in one of the visual tower, which is 28 times the work."""
RESIZED_AT_ONCE = 32
GRIDS: dict[Head, SegmentGrid] = {"offset": OFFSET, "synchronisable": SYNCHRONISABLE}
HEADS: dict[Head, str] = {
    "offset": "says by how much sound and pictures are apart, not whether they can be synchronised",
    "synchronisable": "says whether clips can be synchronised, not by how much they are apart",
}
WANTED: dict[Head, str] = {"offset": "predicts offsets, like `sync`", "synchronisable": "knows what can be synchronised, like `synchability`"}


@dataclass(frozen=True)
class Layout:
    """Which segments a clip is taken apart into, and which of them are compared together.

    Segments start every 8 frames. A window is as many neighbouring ones as the network compares (14: 4.8 s); windows overlap by half and the
    last one ends with the clip, so up to 7 frames at the end are not looked at. A clip shorter than a window is repeated: time goes round,
    for pictures and sound alike.
    """

    frames: int
    starts: tuple[int, ...]
    """First frames of the segments, each once. One that starts less than 16 frames before the end of a repeated clip goes on at its beginning."""
    windows: Int[Tensor, "windows segments"]
    """Indices into `starts`."""

    @classmethod
    def of(cls, frames: int, segments: int) -> "Layout":
        """The layout of a clip of `frames` frames in windows of `segments` segments. Raises ValueError for less than a segment."""
        if frames < SEGMENT_FRAMES:
            raise ValueError(f"{frames} frames at 25 fps; a segment, the shortest that can be compared, is {SEGMENT_FRAMES}")
        fitting = (frames - SEGMENT_FRAMES) // HOP_FRAMES + 1
        if fitting >= segments:
            last = fitting - segments
            firsts = [*range(0, last, max(1, segments // 2)), last]
            return cls(frames, tuple(range(0, fitting * HOP_FRAMES, HOP_FRAMES)), torch.tensor(firsts)[:, None] + torch.arange(segments))
        places = [i * HOP_FRAMES % frames for i in range(segments)]
        starts = sorted(set(places))
        return cls(frames, tuple(starts), torch.tensor([[starts.index(place) for place in places]]))


@dataclass(frozen=True)
class Seen:
    """A clip's pictures, as the visual tower sees them."""

    layout: Layout
    tokens: Float[Tensor, "segments tokens width"]


def synchrony(probabilities: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    """How much of the offsets' distribution is within one class (0.2 s) of none: what ranks sounds for the same pictures."""
    none = probabilities.shape[-1] // 2
    return probabilities[..., none - NEAR_CLASSES : none + NEAR_CLASSES + 1].sum(-1)


def best_of(probabilities: Float[Tensor, "waves classes"]) -> int:
    """The row with the most `synchrony`; of equals, the one with the most at no offset, then the first."""
    scores, none = synchrony(probabilities).tolist(), probabilities[:, probabilities.shape[1] // 2].tolist()
    return max(range(len(scores)), key=lambda i: (scores[i], none[i]))


class SyncScorer:
    """A Synchformer on one device.

    On clips of at least 4.8 s the probabilities mean what the published network's do. A shorter one (2.56 s of generated sound) is repeated
    to fill the window: it was not trained on such joints, so its answer only ranks sounds for the same pictures.
    """

    def __init__(
        self,
        weights: str = "sync",
        device: str = "auto",
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        *,
        batch_segments: int = 16,
        head: Head | None = None,
    ) -> None:
        """Loads the network: a weights file, or the name of a published one in the cache. `batch_segments` segments of pictures go through the
        tower at a time. With `head`, only a network with that head will do.

        Raises ValueError for a network with another head, FileNotFoundError where weights are missing.
        """
        if batch_segments < 1:
            raise ValueError(f"batch_segments is {batch_segments}; expected at least 1")
        self.device = pick_device(device)
        self.model: Synchformer = load_synchformer(weights, device=self.device)
        if head not in (None, self.head):
            raise ValueError(f"{weights}: {HEADS[self.head]}; expected a network that {WANTED[head]}")
        self.log_mel = LogMel(self.model.afeat_extractor.config).to(self.device)
        self.precision, self.batch_segments = DTYPES[precision], batch_segments

    @property
    def head(self) -> Head:
        """What the network answers."""
        return self.model.config.head

    @property
    def grid(self) -> SegmentGrid:
        """How a cut is taken apart for this network, as published for its head."""
        return GRIDS[self.head]

    # --- answers ---

    def offsets(
        self, frames: UInt8[np.ndarray | Tensor, "n h w 3"], wave: Float32[np.ndarray | Tensor, "channels samples"], sample_rate_hz: int
    ) -> Float[Tensor, "classes"]:
        """Probabilities of the offsets (`model.segments.class_seconds`; the middle one is none), averaged over the clip's windows.

        `frames` are pictures at 25 fps of any size, of which the middle is looked at; the sound begins with them. Sound beyond the last picture
        is not heard, sound that ends before is followed by silence. Raises ValueError for less than 16 frames or no sound.
        """
        return self.compare(self.see(frames), [wave], sample_rate_hz)[0]

    def best(
        self,
        frames: UInt8[np.ndarray | Tensor, "n h w 3"],
        waves: Sequence[Float32[np.ndarray | Tensor, "_ _"]],
        sample_rate_hz: int,
    ) -> tuple[int, list[float]]:
        """Which of several sounds [channels, samples] is best in time with the pictures (`best_of`), and every sound's `synchrony`.

        Otherwise as `offsets`; the pictures go through their tower once.
        """
        probabilities = self.compare(self.see(frames), waves, sample_rate_hz)
        return best_of(probabilities), synchrony(probabilities).tolist()

    @torch.inference_mode()
    def cut_logits(
        self,
        frames: UInt8[np.ndarray | Tensor, "n h w 3"],
        wave: Float32[np.ndarray | Tensor, "samples"],
        cuts: Sequence[Cut],
        grid: SegmentGrid,
    ) -> Float[Tensor, "cuts classes"]:
        """The head's logits for cuts of a clip, exactly where they lie, on the CPU: `grid` says which segments of a cut are compared.

        `frames` are pictures at 25 fps of any size, of which the middle is looked at; `wave` is their sound at 16 kHz, in one channel. Cuts may
        overlap, come in any order and be there twice: every segment goes through its tower once. Raises ValueError for a cut that reaches beyond
        the clip, and for a grid of other segments than the network compares.
        """
        self.check_grid(grid)
        for cut in cuts:
            last_frame, last_sample = cut.start_frame + grid.frame_starts()[-1], cut.start_sample + grid.sample_starts()[-1]
            if min(cut.start_frame, cut.start_sample) < 0 or last_frame + SEGMENT_FRAMES > len(frames) or last_sample + SEGMENT_SAMPLES > len(wave):
                raise ValueError(f"{cut} reaches beyond a clip of {len(frames)} frames and {len(wave)} samples")
        if not cuts:
            return torch.empty(0, self.model.config.classes)
        frame_starts = _distinct((cut.start_frame, grid.frame_starts()) for cut in cuts)
        sample_starts = _distinct((cut.start_sample, grid.sample_starts()) for cut in cuts)
        pictures = _pictures(frames, self.model.vfeat_extractor.config.image_size)
        seen = self._visual_tokens(pictures, list(frame_starts))
        heard = self._audio_tokens(_tensor(wave).to(self.device)[None], list(sample_starts))[0]
        visual = torch.tensor([[frame_starts[cut.start_frame + start] for start in grid.frame_starts()] for cut in cuts])
        audio = torch.tensor([[sample_starts[cut.start_sample + start] for start in grid.sample_starts()] for cut in cuts])
        pairs = zip(visual.split(self.batch_segments), audio.split(self.batch_segments), strict=True)
        return torch.cat([self.logits(seen[v.to(self.device)], heard[a.to(self.device)]) for v, a in pairs])

    # --- the steps ---

    @property
    def short_side(self) -> int:
        """The shorter side, in pixels, to which pictures are brought before their middle is cut out: 256 for the published tower's 224."""
        return short_side(self.model.vfeat_extractor.config.image_size)

    def check_grid(self, grid: SegmentGrid) -> None:
        """Raises ValueError if the network does not compare so many segments."""
        if grid.segments != self.model.config.segments:
            raise ValueError(f"{grid.segments} segments in a cut; this network compares {self.model.config.segments}")

    @torch.inference_mode()
    def logits(
        self, visual: Float[Tensor, "b segments v visual_width"], audio: Float[Tensor, "b segments a audio_width"]
    ) -> Float[Tensor, "b classes"]:
        """The head's logits from tokens of the towers, on the CPU."""
        with self._autocast():
            return self.model.compare(visual.to(self.device), audio.to(self.device)).float().cpu()

    @torch.inference_mode()
    def see(self, frames: UInt8[np.ndarray | Tensor, "n h w 3"]) -> Seen:
        """The visual tower over a clip's pictures at 25 fps; its result can be compared with any number of sounds."""
        layout = Layout.of(len(frames), self.model.config.segments)
        pictures = _pictures(frames, self.model.vfeat_extractor.config.image_size)
        return Seen(layout, self._visual_tokens(pictures, layout.starts))

    @torch.inference_mode()
    def compare(self, seen: Seen, waves: Sequence[Float32[np.ndarray | Tensor, "_ _"]], sample_rate_hz: int) -> Float[Tensor, "waves classes"]:
        """Probabilities of the offsets of several sounds, each [channels, samples], against the same pictures. On the CPU."""
        if not waves:
            raise ValueError("no sound to compare with the pictures")
        heard = self._hear(seen.layout, [self._mono(wave, sample_rate_hz, seen.layout.frames) for wave in waves])
        windows = seen.layout.windows.to(self.device)
        visual = seen.tokens[windows]
        pairs = [(sound, window) for sound in range(len(waves)) for window in range(len(windows))]
        logits: list[Tensor] = []
        for start in range(0, len(pairs), self.batch_segments):
            sounds, places = torch.tensor(pairs[start : start + self.batch_segments], device=self.device).T
            with self._autocast():
                logits.append(self.model.compare(visual[places], heard[sounds[:, None], windows[places]]).float())
        return torch.cat(logits).softmax(-1).unflatten(0, (len(waves), -1)).mean(1).cpu()

    @torch.inference_mode()
    def segment_tokens(
        self, pictures: UInt8[Tensor, "n size size 3"], wave: Float[Tensor, "samples"], starts: Sequence[int]
    ) -> tuple[Float[Tensor, "segments v visual_width"], Float[Tensor, "segments a audio_width"]]:
        """Both towers over the segments that begin at these frames of pictures of the network's own size, and of their sound at 16 kHz."""
        heard = self._audio_tokens(wave.to(self.device)[None], [start * SAMPLES_PER_FRAME for start in starts])[0]
        return self._visual_tokens(pictures, starts), heard

    def _autocast(self) -> "torch.autocast | nullcontext[None]":
        return nullcontext() if self.precision == torch.float32 else torch.autocast(self.device.type, self.precision)

    def _mono(self, wave: Float32[np.ndarray | Tensor, "channels samples"], sample_rate_hz: int, frames: int) -> Float[Tensor, "heard"]:
        """The sound under `frames` pictures: one channel at 16 kHz, cut or filled with silence."""
        if not wave.shape[0] or not wave.shape[1]:
            raise ValueError(f"a sound of the shape {tuple(wave.shape)}; expected [channels, samples], none of them 0")
        mono = _tensor(wave).to(self.device).mean(0)
        mono = torchaudio.functional.resample(mono, sample_rate_hz, SAMPLE_RATE_HZ)[: frames * SAMPLES_PER_FRAME]
        return F.pad(mono, (0, frames * SAMPLES_PER_FRAME - len(mono)))

    def _hear(self, layout: Layout, waves: list[Tensor]) -> Float[Tensor, "waves segments tokens width"]:
        """The audio tower over every segment of every sound."""
        # The beginning once more after the end, for segments that go on there.
        rounds = torch.stack([torch.cat([wave, wave[:SEGMENT_SAMPLES]]) for wave in waves])
        return self._audio_tokens(rounds, [start * SAMPLES_PER_FRAME for start in layout.starts])

    def _visual_tokens(self, pictures: UInt8[Tensor, "n size size 3"], starts: Sequence[int]) -> Float[Tensor, "segments tokens width"]:
        """The visual tower over segments of pictures, in batches; what would lie beyond the last picture goes on with the first."""
        within = torch.arange(SEGMENT_FRAMES)
        tokens: list[Tensor] = []
        for batch in torch.tensor(starts).split(self.batch_segments):
            pixels = pictures[(batch[:, None] + within) % len(pictures)].to(self.device)
            with self._autocast():
                tokens.append(self.model.vfeat_extractor(normalise(pixels).unsqueeze(1))[:, 0].float())
        return torch.cat(tokens)

    def _audio_tokens(self, waves: Float[Tensor, "waves samples"], starts: Sequence[int]) -> Float[Tensor, "waves segments tokens width"]:
        """The audio tower over the segments of sounds of one length, in batches."""
        places = [(i, start) for i in range(len(waves)) for start in starts]
        tokens: list[Tensor] = []
        for first in range(0, len(places), step := SOUND_BATCH * self.batch_segments):
            spectrograms = self.log_mel(torch.stack([waves[i, start : start + SEGMENT_SAMPLES] for i, start in places[first : first + step]]))
            with self._autocast():
                tokens.append(self.model.afeat_extractor(spectrograms.unsqueeze(1))[:, 0].float())
        return torch.cat(tokens).unflatten(0, (len(waves), -1))


class Follower:
    """Windows along a video whose pictures and sound come in pieces, each answered as soon as it is there.

    Segments that windows share go through a tower once, and nothing is kept that no later window needs: memory does not grow with the video.
    """

    def __init__(self, scorer: SyncScorer, starts: Sequence[int], grid: SegmentGrid) -> None:
        """`starts` are the first frames of the windows' cuts, ascending, counted from the first piece's first picture."""
        scorer.check_grid(grid)
        self._scorer, self._grid = scorer, grid
        self._windows = deque(starts)
        self._segments = deque(_distinct((start, grid.frame_starts()) for start in starts))
        self._first = 0
        size = scorer.model.vfeat_extractor.config.image_size
        self._pictures = torch.empty(0, size, size, 3, dtype=torch.uint8)
        self._wave = torch.empty(0)
        self._tokens: dict[int, tuple[Tensor, Tensor]] = {}

    def push(self, frames: UInt8[np.ndarray | Tensor, "n h w 3"], wave: Float32[np.ndarray | Tensor, "samples"]) -> Float[Tensor, "_ classes"]:
        """The next pictures at 25 fps with their sound at 16 kHz, 640 samples for each; the logits of the windows that are complete with them."""
        if len(wave) != len(frames) * SAMPLES_PER_FRAME:
            raise ValueError(f"{len(wave)} samples for {len(frames)} pictures; expected {SAMPLES_PER_FRAME} for each")
        self._pictures = torch.cat([self._pictures, _pictures(frames, self._pictures.shape[1])])
        self._wave = torch.cat([self._wave, _tensor(wave).cpu()])
        self._look()
        return self._answer()

    def _look(self) -> None:
        """The towers over the segments that are there, and no more pictures and sound than the others need."""
        last, ready = self._first + len(self._pictures) - SEGMENT_FRAMES, []
        while self._segments and self._segments[0] <= last:
            ready.append(self._segments.popleft())
        if ready:
            seen, heard = self._scorer.segment_tokens(self._pictures, self._wave, [start - self._first for start in ready])
            self._tokens |= dict(zip(ready, zip(seen, heard, strict=True), strict=True))
        needed = self._segments[0] if self._segments else self._first + len(self._pictures)
        gone = min(needed - self._first, len(self._pictures))
        self._pictures, self._wave = self._pictures[gone:].clone(), self._wave[gone * SAMPLES_PER_FRAME :].clone()
        self._first += gone

    def _answer(self) -> Float[Tensor, "_ classes"]:
        """The windows whose segments have all been looked at, and no more tokens than the others need."""
        starts, visual, audio, scorer = self._grid.frame_starts(), [], [], self._scorer
        while self._windows and self._windows[0] + starts[-1] in self._tokens:
            first = self._windows.popleft()
            own = [self._tokens[first + start] for start in starts]
            visual.append(torch.stack([seen for seen, _ in own]))
            audio.append(torch.stack([heard for _, heard in own]))
        needed = self._windows[0] + starts[0] if self._windows else sys.maxsize
        self._tokens = {start: tokens for start, tokens in self._tokens.items() if start >= needed}
        size = scorer.batch_segments
        batches = [scorer.logits(torch.stack(visual[i : i + size]), torch.stack(audio[i : i + size])) for i in range(0, len(visual), size)]
        return torch.cat([torch.empty(0, scorer.model.config.classes), *batches])


def _distinct(places: Iterable[tuple[int, range]]) -> dict[int, int]:
    """Where segments start, each once and in order, with the number that each has then."""
    starts = sorted({first + start for first, starts in places for start in starts})
    return {start: number for number, start in enumerate(starts)}


def short_side(size: int) -> int:
    """The shorter side of pictures of which a square of `size` is cut out, as published: 256 for 224."""
    return round(size * 256 / 224)


def _pictures(frames: UInt8[np.ndarray | Tensor, "n h w 3"], size: int) -> UInt8[Tensor, "n size size 3"]:
    """The middle of every picture, as the network was trained to see it: the short side at 8/7 of `size` (256 for 224), then a square of `size`."""
    _, height, width, _ = frames.shape
    short = short_side(size)
    resized = (short, short * width // height) if height < width else (short * height // width, short)
    crop = view_crop("", 0, *resized, size)
    cut = torch.empty(len(frames), size, size, 3, dtype=torch.uint8)
    for start, into in zip(range(0, len(frames), RESIZED_AT_ONCE), cut.split(RESIZED_AT_ONCE), strict=True):
        part = _tensor(frames[start : start + RESIZED_AT_ONCE]).cpu()
        if resized != (height, width):
            part = F.interpolate(part.movedim(-1, 1), resized, mode="bilinear", antialias=True).movedim(1, -1)
        into[:] = part[:, crop.top : crop.top + size, crop.left : crop.left + size]
    return cut


def _tensor(array: np.ndarray | Tensor) -> Tensor:
    """A tensor of it; of an array a copy, since arrays may be read-only or run backwards."""
    return array if isinstance(array, Tensor) else torch.from_numpy(array.copy())
