"""Scores of clips from the stored segments of both Segment-AVCLIP towers: how alike pictures and sound are, and how far they are apart in time.

No clip is decoded and no tower runs. Knows arrays of tokens and a Synchformer's weights; not how clips are read and where scores go.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64

from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES
from model.segments import OFFSET, SAMPLES_PER_FRAME
from model.synchformer import Head
from pipeline.media import MediaError
from pipeline.sync_answers import PAIRS_AT_ONCE, StoredGrid, TokenScorer, tight
from pipeline.timeline import Timeline

EVERY_FRAMES = 16
"""From one window to the next along a clip: 0.64 s, as `soundshard sync` has it."""
HOP_FRAMES = OFFSET.hop_frames
"""From one of a window's segments to the next."""


@dataclass(frozen=True)
class Tokens:
    """The stored segments of a clip, from its first view: the middle of the pictures."""

    visual: Float[np.ndarray, "segments tokens width"]
    """Segment i begins with frame i * hop_frames."""
    audio: Float[np.ndarray, "audio_segments audio_tokens audio_width"]
    """Segment i begins with sample i * hop_samples at 16 kHz."""


# --- how alike ------------------------------------------------------------------------------------------------------------------------


def similarities(tokens: Tokens, stored: StoredGrid) -> Float32[np.ndarray, "visual_segments audio_segments"]:
    """Cosines of the embeddings of segments: pictures down, the sound at the same times across. An embedding is the mean of a segment's tokens,
    which is what Segment AVCLIP's loss compares (Iashin et al. 2024, sec. 3.1). Raises MediaError where no sound is stored for any pictures."""
    starts = np.arange(len(tokens.visual)) * stored.hop_frames * SAMPLES_PER_FRAME
    places = nearest(starts, stored.hop_samples)
    places = places[places < len(tokens.audio)]
    if not len(places):
        raise MediaError("too_short", f"{len(tokens.visual)} segments of pictures and {len(tokens.audio)} of sound are stored; one of each is needed")
    visual, audio = (_unit(part.astype(np.float32).mean(axis=1)) for part in (tokens.visual[: len(places)], tokens.audio[places]))
    return visual @ audio.T


def _unit(vectors: Float32[np.ndarray, "segments width"]) -> Float32[np.ndarray, "segments width"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def avclip_scores(tokens: Tokens, stored: StoredGrid) -> dict[str, float | None]:
    """`avclip_similarity`: the mean cosine of pictures and sound at the same time. `avclip_contrast`: by how much that is above pictures and sound of
    the same clip that do not overlap in time; None for a clip without such.

    The first says whether what is heard fits what is seen, the second whether it fits now rather than at another time.
    """
    cosines = similarities(tokens, stored)
    number = np.arange(len(cosines))
    apart = np.abs(number[:, None] - number) * stored.hop_frames >= SEGMENT_FRAMES
    same = float(cosines.diagonal().mean())
    return {"avclip_similarity": same, "avclip_contrast": same - float(cosines[apart].mean()) if apart.any() else None}


# --- how far apart --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """Which stored segments of a clip are compared with each other."""

    visual: Int64[np.ndarray, "windows segments"]
    audio: Int64[np.ndarray, "windows segments"]
    starts_seconds: Float64[np.ndarray, "windows"]


def windows(tokens: Tokens, stored: StoredGrid, segments: int) -> Windows:
    """Windows of so many segments along a whole clip, one every 0.64 s and the last one as late as it fits; sound begins with the pictures, to half a
    hop of the stored sound. Raises MediaError for a clip that does not hold one, ValueError where segments were stored too far apart."""
    stride, audio_stride = stored.strides(tight(segments, HOP_FRAMES))
    places = np.arange(max(0, len(tokens.visual) - (segments - 1) * stride))
    heard = nearest(places * stored.hop_frames * SAMPLES_PER_FRAME, stored.hop_samples)
    places = places[heard + (segments - 1) * audio_stride < len(tokens.audio)]
    if not len(places):
        needed = (SEGMENT_FRAMES + (segments - 1) * HOP_FRAMES) / FRAME_RATE_HZ
        there = f"{len(tokens.visual)} segments of pictures and {len(tokens.audio)} of sound are stored"
        raise MediaError("too_short", f"{there}; an answer is found in {needed:g} s of both")
    firsts = np.array([*range(0, int(places[-1]), EVERY_FRAMES // stored.hop_frames), places[-1]])
    within = np.arange(segments)
    return Windows(firsts[:, None] + within * stride, heard[firsts][:, None] + within * audio_stride, firsts * stored.hop_frames / FRAME_RATE_HZ)


def nearest(samples: Int64[np.ndarray, "n"], hop_samples: int) -> Int64[np.ndarray, "n"]:
    """The stored segments of sound that begin nearest to these samples."""
    return (2 * samples + hop_samples) // (2 * hop_samples)


class SyncJudge:
    """A Synchformer's answers about clips from their stored segments, in batches across clips."""

    def __init__(
        self, weights: str, stored: StoredGrid, *, head: Head, device: str = "auto", precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ) -> None:
        """Loads what is above the towers. Raises ValueError for a network with another head, FileNotFoundError where weights are missing."""
        self._scorer, self._stored = TokenScorer(weights, device, precision, head=head), stored

    def probabilities(self, clips: Sequence[Tokens | MediaError]) -> list[tuple[Windows, Float32[np.ndarray, "windows classes"]] | MediaError]:
        """Of each clip its windows and what the network says of them; the error of a clip that is too short for one, or was an error already."""
        found = [self._windows(clip) for clip in clips]
        pairs = [(clip, where) for clip, where in zip(clips, found, strict=True) if isinstance(clip, Tokens) and isinstance(where, Windows)]
        if not pairs:
            return [where for where in found if isinstance(where, MediaError)]
        visual, audio = (
            torch.from_numpy(np.concatenate([getattr(clip, name)[getattr(where, name)] for clip, where in pairs])) for name in ("visual", "audio")
        )
        parts = zip(visual.split(PAIRS_AT_ONCE), audio.split(PAIRS_AT_ONCE), strict=True)
        said = torch.cat([self._scorer.logits(v.float(), a.float()) for v, a in parts]).softmax(-1).numpy()
        answers = iter(np.split(said, np.cumsum([len(where.visual) for _, where in pairs])[:-1]))
        return [where if isinstance(where, MediaError) else (where, next(answers)) for where in found]

    def _windows(self, clip: Tokens | MediaError) -> Windows | MediaError:
        if isinstance(clip, MediaError):
            return clip
        try:
            return windows(clip, self._stored, self._scorer.model.config.segments)
        except MediaError as error:
            return error


def offset_scores(where: Windows, probabilities: Float32[np.ndarray, "windows classes"], window_seconds: float) -> dict[str, float | None]:
    """One answer for a clip, as `soundshard sync` gives it for a video: `sync_offset_seconds` (above 0 the sound comes too early),
    `sync_probability` of the most probable class, and `sync_agreement`, the part of the windows whose own answer is within 0.2 s of it."""
    timeline = Timeline(
        duration_seconds=float(where.starts_seconds[-1]) + window_seconds,
        window_seconds=window_seconds,
        starts_seconds=where.starts_seconds,
        probabilities=probabilities,
        faults=("",) * len(probabilities),
        peaks=np.empty(0, np.float32),
    )
    estimate = timeline.estimate()
    best = float(estimate.probabilities[estimate.best])
    return {"sync_offset_seconds": estimate.seconds, "sync_probability": best, "sync_agreement": estimate.agreement}
