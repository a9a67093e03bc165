"""Segment AVCLIP's audio tower: 0.64 s of sound in, 6 tokens out, one per 0.1 s.

A log-mel spectrogram, an Audio Spectrogram Transformer (Gong et al. 2021) over patches of it, and one transformer layer that summarises the
frequencies of each instant in one token (Iashin et al. 2024, sec. 3.1). Parameter names are those of the published files. This module
knows no video and no files of sound: it hears waveforms of 16 kHz as tensors, one segment at a time.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchaudio.functional
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from model.segments import SAMPLE_RATE_HZ
from model.synchformer_visual import TokenSummary
from model.weights import load_state, load_strictly, resolve, save_state

EPS = 1e-12
"""Of the layer norms of the spectrogram transformer, as published."""
PREFIXES = ("a_encoder.", "afeat_extractor.")
"""The tower's place in Segment AVCLIP's and Synchformer's checkpoints."""
KIND = "audio_tower"

WINDOW_SAMPLES, HOP_SAMPLES, FFT_SAMPLES = 400, 160, 1024
LOG_FLOOR = 1e-6
MEAN, STD = -4.2677393, 4.5689974
"""Of the log-mel spectrograms of AudioSet, by which the transformer's input is normalised."""


@dataclass(frozen=True)
class AudioTowerConfig:
    """The tower's shape. The defaults are the published network's."""

    mels: int = 128
    """Mel bands of the spectrogram."""
    frames: int = 66
    """Spectrogram frames of a segment (10 ms each; the last is padding)."""
    patch_size: int = 16
    """Side of the square patch that becomes one token."""
    stride: int = 10
    """Distance of neighbouring patches, in bands and in frames."""
    width: int = 768
    """Features of a token, and of the output."""
    depth: int = 12
    """Transformer layers."""
    heads: int = 12
    """Attention heads, in the layers and in the one that summarises."""
    mlp_ratio: int = 4
    """Hidden features of an MLP, in widths."""

    def __post_init__(self) -> None:
        if min(self.mels, self.frames) < self.patch_size or self.width % self.heads:
            raise ValueError(
                f"mels {self.mels}, frames {self.frames}, width {self.width}: expected at least patch_size {self.patch_size}, "
                f"and a multiple of heads {self.heads}"
            )

    @property
    def bands(self) -> int:
        """Patches over frequency."""
        return (self.mels - self.patch_size) // self.stride + 1

    @property
    def tokens(self) -> int:
        """Patches over time: output tokens of a segment."""
        return (self.frames - self.patch_size) // self.stride + 1


# --- the front end --------------------------------------------------------------------------------------------------------------------


class LogMel(nn.Module):
    """Waveforms at 16 kHz to normalised log-mel spectrograms, in float32 on the module's device. It has no weights."""

    window: Tensor
    filters: Tensor

    def __init__(self, config: AudioTowerConfig = AudioTowerConfig()) -> None:
        super().__init__()
        self.frames = config.frames
        nyquist, bins = SAMPLE_RATE_HZ / 2, FFT_SAMPLES // 2 + 1
        filters = torchaudio.functional.melscale_fbanks(bins, 0.0, nyquist, config.mels, SAMPLE_RATE_HZ, norm=None, mel_scale="htk")
        self.register_buffer("window", torch.hann_window(WINDOW_SAMPLES), persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, wave: Float[Tensor, "*batch samples"]) -> Float[Tensor, "*batch mels frames"]:
        """Spectrograms of `frames` frames: what is too much is left out at the end, what is missing is 0 before the normalisation.

        That padding (one frame of a segment of 10240 samples) is +0.467 afterwards, far louder than silence: so the published tower was
        trained.
        """
        with torch.autocast(wave.device.type, enabled=False):
            spectrum = torch.stft(
                wave.float().reshape(-1, wave.shape[-1]),
                FFT_SAMPLES,
                HOP_SAMPLES,
                WINDOW_SAMPLES,
                window=self.window,
                center=True,
                pad_mode="reflect",
                return_complex=True,
            )
            power = torch.view_as_real(spectrum).square().sum(-1)
            log = (self.filters.T @ power + LOG_FLOOR).log()[..., : self.frames]
            log = F.pad(log, (0, self.frames - log.shape[-1]))
            return ((log - MEAN) / (2 * STD)).reshape(*wave.shape[:-1], *log.shape[1:])


# --- the tower ------------------------------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """A linear layer, under the name that the published files give it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)

    def forward(self, x: Float[Tensor, "n tokens inputs"]) -> Float[Tensor, "n tokens outputs"]:
        return self.dense(x)


class Heads(nn.Module):
    """Scaled dot-product attention of every token to all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Float[Tensor, "n tokens d"]) -> Float[Tensor, "n tokens d"]:
        q, k, v = (rearrange(layer(x), "n t (h d) -> n h t d", h=self.heads) for layer in (self.query, self.key, self.value))
        return rearrange(F.scaled_dot_product_attention(q, k, v), "n h t d -> n t (h d)")


class Attention(nn.Module):
    """Attention and its output projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Heads(width, heads)
        self.output = Dense(width, width)

    def forward(self, x: Float[Tensor, "n tokens d"]) -> Float[Tensor, "n tokens d"]:
        return self.output(self.attention(x))


class Layer(nn.Module):
    """A pre-norm transformer layer with an exact GELU."""

    def __init__(self, config: AudioTowerConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.attention = Attention(width, config.heads)
        self.intermediate = Dense(width, hidden)
        self.output = Dense(hidden, width)
        self.layernorm_before = nn.LayerNorm(width, eps=EPS)
        self.layernorm_after = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Float[Tensor, "n tokens d"]) -> Float[Tensor, "n tokens d"]:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output(F.gelu(self.intermediate(self.layernorm_after(x))))


class PatchEmbeddings(nn.Module):
    """Overlapping patches of a spectrogram, as tokens in the order frequency, time."""

    def __init__(self, config: AudioTowerConfig) -> None:
        super().__init__()
        self.projection = nn.Conv2d(1, config.width, config.patch_size, config.stride)

    def forward(self, x: Float[Tensor, "n mels frames"]) -> Float[Tensor, "n tokens d"]:
        return self.projection(x.unsqueeze(1)).flatten(2).mT


class Embeddings(nn.Module):
    """[CLS], a second token of DeiT's (distillation), then the patches; all with learned positions."""

    def __init__(self, config: AudioTowerConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 2 + config.bands * config.tokens, config.width))
        self.patch_embeddings = PatchEmbeddings(config)

    def forward(self, x: Float[Tensor, "n mels frames"]) -> Float[Tensor, "n tokens d"]:
        first = torch.cat([self.cls_token, self.distillation_token], dim=1).expand(x.shape[0], -1, -1)
        return torch.cat([first, self.patch_embeddings(x)], dim=1) + self.position_embeddings


class Encoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: AudioTowerConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.depth))

    def forward(self, x: Float[Tensor, "n tokens d"]) -> Float[Tensor, "n tokens d"]:
        for layer in self.layer:
            x = layer(x)
        return x


class SpectrogramTransformer(nn.Module):
    """Spectrograms to the last layer's tokens, normalised."""

    def __init__(self, config: AudioTowerConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.layernorm = nn.LayerNorm(config.width, eps=EPS)

    def forward(self, x: Float[Tensor, "n mels frames"]) -> Float[Tensor, "n tokens d"]:
        return self.layernorm(self.encoder(self.embeddings(x)))


class AudioTower(nn.Module):
    """Spectrogram of a segment to one token of `width` features per 0.1 s. Segments are independent of each other."""

    def __init__(self, config: AudioTowerConfig = AudioTowerConfig()) -> None:
        super().__init__()
        self.config = config
        self.ast = SpectrogramTransformer(config)
        self.freq_attn_agg = TokenSummary(config.width, config.heads, config.mlp_ratio * config.width)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        embeddings = self.ast.embeddings
        for parameter in (embeddings.cls_token, embeddings.distillation_token, embeddings.position_embeddings, self.freq_attn_agg.cls_token):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Float[Tensor, "b segments mels frames"]) -> Float[Tensor, "b segments tokens width"]:
        """Features of spectrograms from `LogMel`."""
        config = self.config
        if x.shape[2:] != (config.mels, config.frames):
            raise ValueError(f"spectrograms have the shape {tuple(x.shape[2:])}; the tower expects ({config.mels}, {config.frames})")
        tokens = self.ast(x.flatten(0, 1).to(self.freq_attn_agg.cls_token.dtype))[:, 2:]
        features = self.freq_attn_agg(rearrange(tokens, "n (f t) d -> (n t) f d", f=config.bands))
        return rearrange(features, "(b segments t) d -> b segments t d", b=x.shape[0], t=config.tokens)


# --- files ----------------------------------------------------------------------------------------------------------------------------


def audio_config(tower: AudioTower) -> dict[str, Any]:
    """What a file says about its tower."""
    return {"kind": KIND, **asdict(tower.config)}


def new_audio_tower(config: Mapping[str, Any] | None, *, source: str | Path) -> AudioTower:
    """A tower of the shape that a file's configuration gives (without one the published shape), with random weights."""
    settings = dict(config or {"kind": KIND})
    if settings.pop("kind", None) != KIND:
        raise ValueError(f"{source}: holds another kind of network; expected an audio tower")
    return AudioTower(AudioTowerConfig(**settings))


def save_audio_tower(path: str | Path, tower: AudioTower) -> None:
    """Writes a tower with its configuration to a .safetensors file."""
    save_state(path, tower.state_dict(), audio_config(tower))


def load_audio_tower(name_or_path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> AudioTower:
    """The audio tower in a weights file, for inference: ours, or the published Segment AVCLIP and Synchformer checkpoints.

    `name_or_path` is a file or the name of published weights in the cache. Raises ValueError, with the names, if the file does not hold
    exactly a tower.
    """
    path = resolve(name_or_path)
    tensors, config = load_state(path)
    for prefix in PREFIXES:
        if inside := {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}:
            tensors = inside
    with torch.device("meta"):  # without values, which are about to be loaded
        tower = new_audio_tower(config.get("audio", config) if config else None, source=path)
    tower.to_empty(device=device)
    load_strictly(tower, tensors, source=path)
    return tower.to(device, dtype).requires_grad_(False).eval()
