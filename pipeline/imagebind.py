"""ImageBind similarity: whether what is heard in a clip is what is seen, as VisualSound was chosen from VGGSound (cosine of 0.3 and above).

Pictures and sound are cut and normalised as the published code does it: five clips of 2 s, two pictures each, seen in three square crops; three
clips of 2 s of the first channel of the sound. A clip's embedding is the mean of its parts' (Girdhar et al. 2023). Never downloads weights.
"""

from collections.abc import Callable, Sequence
from math import ceil, floor

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
import torchaudio.functional
from jaxtyping import Float, Float32, UInt8
from torch import Tensor
from torchaudio.compliance import kaldi

from model.imagebind import MEL_FRAMES, MELS, PICTURE_FRAMES, PICTURE_SIZE, ImageBind, imagebind_file, load_imagebind
from model.weights import sha256_file
from pipeline.features import autocast, pick_device
from pipeline.media import MediaError
from pipeline.scorers import Item, ScoreOptions, Scorer, Scores, Scoring

RATE_HZ = 16000
SOUND_CLIPS = 3
SOUND_CLIP_SAMPLES = 2 * RATE_HZ
CROPS = 3
MEL_MEAN, MEL_STD = -4.268, 9.138
PICTURE_MEAN, PICTURE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CROPS_AT_ONCE = 48
"""Crops in one pass of the tower: a gigabyte of attention in fp32."""


def picture_clips(stills: UInt8[np.ndarray, "stills height width 3"]) -> Float[Tensor, "clips 3 2 224 224"]:
    """Pairs of pictures as the tower sees them: scaled to 224 on the short side (bilinear, as published without smoothing before), in three square
    crops along the long one, clip by clip."""
    pairs = torch.from_numpy(stills).unflatten(0, (-1, PICTURE_FRAMES)).permute(0, 4, 1, 2, 3).float() / 255
    height, width = stills.shape[1:3]
    short = min(height, width)
    size = [PICTURE_SIZE if side == short else floor(side / short * PICTURE_SIZE) for side in (height, width)]
    scaled = F.interpolate(pairs.flatten(0, 1), size=size, mode="bilinear", align_corners=False).unflatten(0, (-1, 3))
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (PICTURE_MEAN, PICTURE_STD))
    scaled = (scaled - mean) / std
    spare = [side - PICTURE_SIZE for side in size]
    crops = []
    for crop in range(CROPS):
        # The middle of an odd rest is rounded up, as published; along the short side nothing is left over.
        top, left = ((0, ceil(rest / 2), rest)[crop] for rest in spare)
        crops.append(scaled[..., top : top + PICTURE_SIZE, left : left + PICTURE_SIZE])
    return torch.stack(crops, 1).flatten(0, 1)


def sound_clips(sound: Float32[np.ndarray, "channels samples"], rate_hz: int) -> Float[Tensor, "clips 1 128 204"]:
    """Log-mel spectrograms of 2 s at the beginning, in the middle and at the end, normalised. Less is filled with zeros, as published."""
    wave = torch.from_numpy(sound)
    if rate_hz != RATE_HZ:
        wave = torchaudio.functional.resample(wave, rate_hz, RATE_HZ)
    spare = max(0.0, wave.shape[1] / RATE_HZ - SOUND_CLIP_SAMPLES / RATE_HZ)
    starts = [int(spare / (SOUND_CLIPS - 1) * clip * RATE_HZ) for clip in range(SOUND_CLIPS)]
    return torch.stack([_spectrogram(wave[:, start : start + SOUND_CLIP_SAMPLES]) for start in starts])


def _spectrogram(wave: Float[Tensor, "channels samples"]) -> Float[Tensor, "1 128 204"]:
    if wave.shape[1] < RATE_HZ // 40:
        raise MediaError("too_short", f"{wave.shape[1]} samples of sound at 16 kHz; a spectrogram needs {RATE_HZ // 40}")
    mel = kaldi.fbank(
        wave - wave.mean(),
        htk_compat=True,
        sample_frequency=RATE_HZ,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=MELS,
        dither=0.0,
        frame_length=25,
        frame_shift=10,
    ).T
    mel = F.pad(mel, (0, max(0, MEL_FRAMES - mel.shape[1])))[:, :MEL_FRAMES]
    return ((mel - MEL_MEAN) / MEL_STD)[None]


class ImageBindScorer:
    """The network with what it needs to know of clips."""

    def __init__(self, model: ImageBind, device: torch.device, precision: str) -> None:
        self._model, self._device, self._precision = model, device, precision

    def __call__(self, items: Sequence[Item]) -> Sequence[Scores]:
        """`imagebind_similarity` of decoded clips, in batches across them."""
        seen, heard = [], []
        for item in items:
            assert item.media is not None and item.media.stills is not None
            if item.media.sound is None:
                raise MediaError("no_audio", "the clip has no sound")
            seen.append(picture_clips(item.media.stills))
            heard.append(sound_clips(item.media.sound, item.media.sound_rate_hz))
        vision, audio = self._means(self._model.vision, seen), self._means(self._model.audio, heard)
        return [{"imagebind_similarity": float(value)} for value in F.cosine_similarity(vision, audio)]

    @torch.inference_mode()
    def _means(self, tower: Callable[[Tensor], Tensor], clips: Sequence[Tensor]) -> Float[Tensor, "items embedding"]:
        """The mean embedding of each item's clips."""
        with autocast(self._device, self._precision):
            found = torch.cat([tower(part.to(self._device)) for part in torch.cat(list(clips)).split(CROPS_AT_ONCE)])
        return torch.stack([part.mean(0) for part in found.split([len(part) for part in clips])])


def _make(options: ScoreOptions) -> Scoring:
    device = pick_device(options.device)
    return ImageBindScorer(load_imagebind(options.imagebind_weights, device=device), device, options.precision)


SCORERS: tuple[Scorer, ...] = (
    Scorer(
        name="imagebind",
        kind="media",
        columns={"imagebind_similarity": pa.float64()},
        make=_make,
        version=lambda options: f"1 {sha256_file(imagebind_file(options.imagebind_weights))[:16]} {options.precision}",
        summary="whether what is heard is what is seen: the cosine of ImageBind's embeddings; VisualSound has clips from 0.3 on",
        needs=frozenset({"sound", "stills"}),
        networks=True,
    ),
)
