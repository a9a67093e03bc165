"""Segment AVCLIP: two towers trained so that sound and pictures of the same segment are near each other (Iashin et al. 2024, sec. 3.1).

The contrastive loss over all segments of a batch, and the zero-shot measure that its training watches: how often a window of segments finds
the window of sound at its own place among the shifted ones. Parameter names are those of the published files. This module knows tensors and
weights files; not where segments come from.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from model.motion_tower import MotionTower
from model.synchformer_audio import AudioTower, audio_config, new_audio_tower
from model.synchformer_visual import VisualTower, new_tower, tower_config
from model.weights import load_state, load_strictly, resolve, save_state

KIND = "avclip"
INITIAL_SCALE = 0.07
SCALE_RANGE = (0.001, 0.5)
"""The temperature stays in here."""


# --- the loss -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contrast:
    """The loss and what it is made of; a row is a segment of the batch."""

    loss: Float[Tensor, ""]
    similarity: Float[Tensor, "visual_rows audio_rows"]
    """Cosines over the temperature, pictures down and sound across."""
    visual: Float[Tensor, "rows d"]
    """Of length 1."""
    audio: Float[Tensor, "rows d"]
    """Of length 1."""


def segment_contrast(visual: Float[Tensor, "b segments d"], audio: Float[Tensor, "b segments d"], temperature: Float[Tensor, ""]) -> Contrast:
    """Cross entropy of finding a segment's sound among all of the batch, and its pictures, on average (sec. 3.1, eq. 2).

    The other segments of the same clip are negatives like any other. `temperature` divides. In float32 whatever autocast says.
    """
    with torch.autocast(visual.device.type, enabled=False):
        v, a = (F.normalize(x.float().flatten(0, 1), dim=-1) for x in (visual, audio))
        similarity = v @ a.T / temperature.float()
        own = torch.arange(len(v), device=v.device)
        loss = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
    return Contrast(loss, similarity, v, a)


# --- the zero-shot measure ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShiftedWindows:
    """Which window of one kind is nearest to each window of the other, and how often that is the one at its own place."""

    similarity: Float[Tensor, "b visual_windows audio_windows"]
    nearest_audio: Int[Tensor, "b visual_windows"]
    """For every window of pictures."""
    nearest_visual: Int[Tensor, "b audio_windows"]
    """For every window of sound."""
    precision_audio: Float[Tensor, "b"]
    """Share of the windows of pictures that find their sound."""
    precision_visual: Float[Tensor, "b"]
    """Share of the windows of sound that find their pictures."""

    @property
    def precision(self) -> Float[Tensor, "b"]:
        """Both directions on average; a batch's accuracy is its mean."""
        return (self.precision_audio + self.precision_visual) / 2


def shifted_windows(visual: Float[Tensor, "b segments d"], audio: Float[Tensor, "b segments d"], *, window: int = 8) -> ShiftedWindows:
    """Windows of `window` neighbouring segments of a clip against all of the same clip (shifted-window zero-shot accuracy).

    Two windows are as alike as their segments, compared in order, are on the whole: the sum of cosines along a diagonal. Raises ValueError
    unless there is more than one window.
    """
    segments = visual.shape[1]
    if not 1 <= window < segments:
        raise ValueError(f"window is {window}; expected at least 1 and fewer than the {segments} segments of a clip")
    v, a = (F.normalize(x.float(), dim=-1) for x in (visual, audio))
    similarity = (v @ a.mT).unfold(1, window, 1).unfold(2, window, 1).diagonal(dim1=-2, dim2=-1).sum(-1)
    own = torch.arange(segments - window + 1, device=v.device)
    nearest_audio, nearest_visual = similarity.argmax(2), similarity.argmax(1)
    hits = ((nearest == own).float().mean(1) for nearest in (nearest_audio, nearest_visual))
    return ShiftedWindows(similarity, nearest_audio, nearest_visual, *hits)


# --- the network ----------------------------------------------------------------------------------------------------------------------


class Avclip(nn.Module):
    """Both towers and the temperature. A segment's embedding is the mean of its tokens."""

    def __init__(self, visual: VisualTower | MotionTower, audio: AudioTower) -> None:
        super().__init__()
        if visual.config.width != audio.config.width:
            raise ValueError(f"towers of {visual.config.width} and {audio.config.width} features; expected the same number: they are compared")
        self.v_encoder = visual
        self.a_encoder = audio
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_SCALE))

    def embed(
        self, pixels: Float[Tensor, "b segments 3 t h w"], spectrograms: Float[Tensor, "b segments mels frames"]
    ) -> tuple[Float[Tensor, "b segments d"], Float[Tensor, "b segments d"]]:
        """Embeddings of pictures and of sound, of any length."""
        return self.v_encoder(pixels).mean(2), self.a_encoder(spectrograms).mean(2)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Bring `logit_scale` (by which similarities are divided) into its range, in place: before every step, as published."""
        self.logit_scale.clamp_(*SCALE_RANGE)

    def forward(self, pixels: Float[Tensor, "b segments 3 t h w"], spectrograms: Float[Tensor, "b segments mels frames"]) -> Contrast:
        """The loss on `synchformer_visual.normalise`d pixels and `LogMel` spectrograms of the same segments."""
        self.clamp_temperature()
        return segment_contrast(*self.embed(pixels, spectrograms), self.logit_scale)


def save_avclip(path: str | Path, model: Avclip) -> None:
    """Writes the network with its configuration to a .safetensors file."""
    save_state(path, model.state_dict(), {"kind": KIND, "visual": tower_config(model.v_encoder), "audio": audio_config(model.a_encoder)})


def load_avclip(name_or_path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Avclip:
    """Both towers and the temperature in a weights file, for inference: ours, or a published Segment AVCLIP checkpoint (stage I).

    `name_or_path` is a file or the name of published weights in the cache. Raises ValueError, with the names, if the file does not hold
    exactly this network.
    """
    path = resolve(name_or_path)
    tensors, config = load_state(path)
    config = config or {"kind": KIND, "visual": None, "audio": None}
    if config.get("kind") != KIND:
        raise ValueError(f"{path}: holds another kind of network; expected Segment AVCLIP")
    with torch.device("meta"):  # without values, which are about to be loaded
        model = Avclip(new_tower(config["visual"], source=path), new_audio_tower(config["audio"], source=path))
    model.to_empty(device=device)
    load_strictly(model, tensors, source=path)
    return model.to(device, dtype).requires_grad_(False).eval()
