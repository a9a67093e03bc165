"""Scores of clips from the stored segments of both Segment-AVCLIP towers: how alike pictures and sound are, and how far they are apart in time.

No clip is decoded and no tower runs. Sound that is silence is compared like any other: the scorer `silence`, which decodes, tells it. Knows arrays
of tokens and a Synchformer's weights; not how clips are read and where scores go.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float32, Float64, Int64

from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES
from model.segments import OFFSET, SAMPLES_PER_FRAME
from model.synchformer import Head, synchformer_file
from model.weights import load_state, sha256_file
from pipeline.features import AUDIO_MEMBER
from pipeline.media import MediaError
from pipeline.scorers import Item, ScoreOptions, Scorer, Scores, Scoring, each
from pipeline.sync_answers import PAIRS_AT_ONCE, VISUAL_MEMBER, StoredGrid, TokenScorer, tight
from pipeline.sync_score import WANTED
from pipeline.timeline import Timeline

EVERY_FRAMES = 16
"""From one window to the next along a clip: 0.64 s, as `soundshard sync` has it."""
HOP_FRAMES = OFFSET.hop_frames
"""From one of a window's segments to the next."""
HEAD_TENSORS: dict[Head, str] = {"offset": "transformer.off_head.weight", "synchronisable": "transformer.sync_head.weight"}


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

    def __init__(self, weights: str, *, head: Head, device: str = "auto", precision: Literal["fp32", "bf16", "fp16"] = "fp32") -> None:
        """Loads what is above the towers. Raises ValueError for a network with another head, FileNotFoundError where weights are missing."""
        self._scorer = TokenScorer(weights, device, precision, head=head)
        self.segments = self._scorer.model.config.segments

    def probabilities(self, clips: Sequence[Tokens], stored: StoredGrid) -> list[tuple[Windows, Float32[np.ndarray, "_ classes"]]]:
        """Of each clip its windows and what the network says of them. Raises MediaError, before anything is computed, if one is too short."""
        found = [windows(clip, stored, self.segments) for clip in clips]
        visual, audio = (
            torch.from_numpy(np.concatenate([getattr(clip, name)[getattr(where, name)] for clip, where in zip(clips, found, strict=True)]))
            for name in ("visual", "audio")
        )
        parts = zip(visual.split(PAIRS_AT_ONCE), audio.split(PAIRS_AT_ONCE), strict=True)
        said = torch.cat([self._scorer.logits(v.float(), a.float()) for v, a in parts]).softmax(-1)
        return list(zip(found, (part.numpy() for part in said.split([len(where.visual) for where in found])), strict=True))


def offset_scores(where: Windows, probabilities: Float32[np.ndarray, "windows classes"]) -> dict[str, float | None]:
    """One answer for a clip, as `soundshard sync` gives it for a video: `sync_offset_seconds` (above 0 the sound comes too early),
    `sync_probability` of the most probable class, and `sync_agreement`, the part of the windows whose own answer is within 0.2 s of it."""
    frames = SEGMENT_FRAMES + (where.visual.shape[1] - 1) * HOP_FRAMES
    timeline = Timeline(
        duration_seconds=float(where.starts_seconds[-1]) + frames / FRAME_RATE_HZ,
        window_seconds=frames / FRAME_RATE_HZ,
        starts_seconds=where.starts_seconds,
        probabilities=probabilities,
        faults=("",) * len(probabilities),
        peaks=np.empty(0, np.float32),
    )
    estimate = timeline.estimate()
    best = float(estimate.probabilities[estimate.best])
    return {"sync_offset_seconds": estimate.seconds, "sync_probability": best, "sync_agreement": estimate.agreement}


# --- as scorers -----------------------------------------------------------------------------------------------------------------------


def tokens_of(item: Item) -> Tokens:
    """The stored segments of a clip of a dataset."""
    return Tokens(item.member(VISUAL_MEMBER)[0], item.member(AUDIO_MEMBER)[0])


def stored_grid(spec: Mapping[str, Any]) -> StoredGrid:
    """Where the stored segments of a dataset lie. Raises ValueError for one without features of sound."""
    if not spec.get("audio"):
        raise ValueError("the dataset has no features of sound; featurise with audio.weights=avclip")
    return StoredGrid(spec["hop_frames"], spec["audio"]["hop_samples"])


def check_one_training(spec: Mapping[str, Any]) -> None:
    """Raises ValueError unless the towers of pictures and of sound were in one weights file: only such were trained to say alike things."""
    visual, audio = spec["tower"]["weights_sha256"], spec["audio"]["tower"]["weights_sha256"]
    if visual != audio:
        raise ValueError(
            f"the features of pictures are of weights {visual[:12]}, those of sound of {audio[:12]}; they can be compared only if both towers are of "
            "one file: featurise with the same tower.weights and audio.weights"
        )


def check_towers(weights: str, spec: Mapping[str, Any]) -> None:
    """Raises ValueError for a network that was trained on other towers than those that made the features. Published ones do not say."""
    towers = (load_state(synchformer_file(weights))[1] or {}).get("towers", {})
    for what, kind, tower in (("pictures", "visual", spec["tower"]), ("sound", "audio", spec["audio"]["tower"])):
        sha256 = towers.get(kind, {}).get("sha256")
        if sha256 not in (None, tower["weights_sha256"]):
            raise ValueError(
                f"{weights} was trained on another tower (of {what}: {sha256[:12]}) than the one that made the features "
                f"({tower['weights_sha256'][:12]}); give the weights that go with them"
            )


def _avclip(options: ScoreOptions) -> Scoring:  # noqa: ARG001 - needs none
    def score(item: Item) -> Scores:
        stored = stored_grid(item.spec)
        check_one_training(item.spec)
        return avclip_scores(tokens_of(item), stored)

    return each(score)


def _judged(weights: str, head: Head, options: ScoreOptions, scores: Callable[[Windows, np.ndarray], Scores]) -> Scoring:
    """The scoring by a Synchformer's answers about each clip's windows."""
    judge = SyncJudge(weights, head=head, device=options.device, precision=options.precision)
    checked: list[Mapping[str, Any]] = []

    def score(items: Sequence[Item]) -> Sequence[Scores]:
        stored = stored_grid(items[0].spec)
        if items[0].spec not in checked:
            check_towers(weights, items[0].spec)
            checked.append(items[0].spec)
        return [scores(*found) for found in judge.probabilities([tokens_of(item) for item in items], stored)]

    return score


def _version(weights: str, head: Head, options: ScoreOptions) -> str:
    """Raises FileNotFoundError or ValueError where there are no weights, ValueError for those of a network with another head."""
    path = synchformer_file(weights)
    if HEAD_TENSORS[head] not in load_state(path)[0]:
        raise ValueError(f"{weights}: expected a Synchformer that {WANTED[head]}")
    return f"1 {sha256_file(path)} {options.precision}"


AVCLIP = Scorer(
    name="avclip",
    kind="features",
    columns={"avclip_similarity": pa.float64(), "avclip_contrast": pa.float64()},
    make=_avclip,
    version=lambda _: "1",
    summary="how alike pictures and sound are at the same time, by Segment AVCLIP's stored features, and how much more than at other times",
    members=(VISUAL_MEMBER, AUDIO_MEMBER),
    usual=True,
)
SYNC = Scorer(
    name="sync",
    kind="features",
    columns={"sync_offset_seconds": pa.float64(), "sync_probability": pa.float64(), "sync_agreement": pa.float64()},
    make=lambda options: _judged(options.sync_weights, "offset", options, offset_scores),
    version=lambda options: _version(options.sync_weights, "offset", options),
    summary="by how much the sound is ahead of the pictures, how sure Synchformer is, and how far its windows agree, from stored features",
    members=(VISUAL_MEMBER, AUDIO_MEMBER),
    networks=True,
)
CAN = Scorer(
    name="synchronisable",
    kind="features",
    columns={"synchronisable": pa.float64()},
    make=lambda options: _judged(
        options.synchronisability_weights, "synchronisable", options, lambda _, said: {"synchronisable": float(said[:, 1].mean())}
    ),
    version=lambda options: _version(options.synchronisability_weights, "synchronisable", options),
    summary="how probable it is that there is anything to synchronise, by Synchformer, from stored features",
    members=(VISUAL_MEMBER, AUDIO_MEMBER),
    networks=True,
)
SCORERS = (AVCLIP, SYNC, CAN)
