"""Audio codecs: a waveform to integer codes [codebooks, steps] and back, with step i covering samples [i, i + 1) * hop_samples.

`EncodecCodec` runs the published EnCodec networks (Defossez et al. 2022) of the `encodec` package; `LappedCodec` is the stand-in where
their weights cannot be had: a lapped transform and codebooks fitted in seconds, on the same clock. This module knows waveforms and codes;
not how audio is read from files, and not what predicts the codes.
"""

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from encodec.model import EncodecModel
from encodec.modules import SLSTM
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from configs.clock import CodecClock
from model.weights import load_state, load_strictly, resolve, save_state, sha256_file


class Codec(nn.Module, ABC):
    """What every codec has. Clips are coded one at a time, so that their codes do not depend on their neighbours in a batch."""

    def __init__(self, *, name: str, sample_rate_hz: int, hop_samples: int, channels: int, codebooks: int, card: int) -> None:
        super().__init__()
        self.name, self.sample_rate_hz, self.hop_samples = name, sample_rate_hz, hop_samples
        self.channels, self.codebooks, self.card = channels, codebooks, card
        self.weights_sha256 = ""

    @property
    def clock(self) -> CodecClock:
        """Where the steps lie in time."""
        return CodecClock(self.sample_rate_hz, self.hop_samples)

    def spec(self) -> dict[str, Any]:
        """What decides a dataset's codes, as plain values."""
        return {
            "name": self.name,
            "sample_rate_hz": self.sample_rate_hz,
            "hop_samples": self.hop_samples,
            "channels": self.channels,
            "codebooks": self.codebooks,
            "card": self.card,
            "weights_sha256": self.weights_sha256,
        }

    @torch.no_grad()
    def encode(self, wave: Float[Tensor, "b channels samples"]) -> Int[Tensor, "b codebooks steps"]:
        """Codes of waveforms in [-1, 1]: ceil(samples / hop_samples) steps."""
        if wave.shape[1] != self.channels or wave.shape[2] == 0:
            raise ValueError(f"a wave of the shape {tuple(wave.shape)}; {self.name} expects [clips, {self.channels}, samples > 0]")
        with _exact_convolutions():
            return torch.stack([self.encode_clip(clip) for clip in wave])

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "b codebooks steps"], *, samples: int | None = None) -> Float[Tensor, "b channels samples"]:
        """Waveforms of steps * hop_samples samples, or the first `samples` of them."""
        if codes.shape[1] != self.codebooks or codes.shape[2] == 0 or codes.min() < 0 or codes.max() >= self.card:
            raise ValueError(f"codes of the shape {tuple(codes.shape)}; {self.name} expects [clips, {self.codebooks}, steps > 0] in [0, {self.card})")
        with _exact_convolutions():
            return torch.stack([self.decode_clip(clip.long()) for clip in codes])[..., :samples]

    @abstractmethod
    def encode_clip(self, wave: Float[Tensor, "channels samples"]) -> Int[Tensor, "codebooks steps"]:
        """`encode` of one clip."""

    @abstractmethod
    def decode_clip(self, codes: Int[Tensor, "codebooks steps"]) -> Float[Tensor, "channels samples"]:
        """`decode` of one clip."""


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """On a GPU, convolutions round to TF32 and pick algorithms by trial unless told not to; codes would then change between runs."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


# --- EnCodec --------------------------------------------------------------------------------------------------------------------------

Variant = Literal["encodec24", "encodec48"]


class EncodecCodec(Codec):
    """EnCodec at 24 kHz (mono, causal, 75 steps/s) or 48 kHz (stereo, 150 steps/s). `bandwidth_kbps` decides how many codebooks are used.

    24 kHz: codes and audio are those of the package. Clips longer than `window_steps` pass through the convolutions in windows with enough
    of their past, so that memory does not grow with the clip; the recurrent layer in between sees the whole.

    48 kHz differs from the published use in two ways, because codes alone must say what is heard when. The package codes chunks of 1 s that
    overlap by 1 %, so that its steps repeat and drift from the clock, and scales every chunk to unit loudness, sending the scale beside the
    codes. Here chunks are 1 s and touch, and one scale, the clip's, applies to all; decoded sound has the loudness `rms`. Against a seam
    between chunks, each is decoded one step further and faded into the next.
    """

    def __init__(self, variant: Variant = "encodec24", *, bandwidth_kbps: float = 6.0, window_steps: int = 2250, rms: float = 0.1) -> None:
        with warnings.catch_warnings():
            # The package uses the older of torch's two weight normalisations, whose names the published files have.
            warnings.simplefilter("ignore", FutureWarning)
            build = {"encodec24": EncodecModel.encodec_model_24khz, "encodec48": EncodecModel.encodec_model_48khz}[variant]
            network = build(pretrained=False)
        if bandwidth_kbps not in network.target_bandwidths:
            raise ValueError(f"bandwidth_kbps is {bandwidth_kbps:g}; {variant} has {', '.join(f'{b:g}' for b in network.target_bandwidths)}")
        super().__init__(
            name=variant,
            sample_rate_hz=network.sample_rate,
            hop_samples=int(network.encoder.hop_length),
            channels=network.channels,
            codebooks=network.quantizer.get_num_quantizers_for_bandwidth(network.frame_rate, bandwidth_kbps),
            card=network.quantizer.bins,
        )
        self.network = network.requires_grad_(False).eval()
        self.bandwidth_kbps, self.window_steps, self.rms = bandwidth_kbps, window_steps, rms

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"bandwidth_kbps": self.bandwidth_kbps}

    def encode_clip(self, wave: Float[Tensor, "channels samples"]) -> Int[Tensor, "codebooks steps"]:
        if self.name == "encodec24":
            return self._quantise(self._through(self.network.encoder.model, wave[None], self.hop_samples, 1))
        scale = wave.mean(0).square().mean().sqrt() + 1e-8
        chunks = (wave / scale)[None].split(self.sample_rate_hz, dim=-1)
        return torch.cat([self._quantise(self.network.encoder(chunk)) for chunk in chunks], dim=-1)

    def decode_clip(self, codes: Int[Tensor, "codebooks steps"]) -> Float[Tensor, "channels samples"]:
        if self.name == "encodec24":
            return self._through(self.network.decoder.model, self.network.quantizer.decode(codes[:, None]), 1, self.hop_samples)[0]
        return self._decode_chunks(codes) * self.rms

    def _quantise(self, hidden: Float[Tensor, "one d steps"]) -> Int[Tensor, "codebooks steps"]:
        return self.network.quantizer.encode(hidden, self.network.frame_rate, self.bandwidth_kbps)[:, 0]

    def _through(self, layers: nn.Sequential, x: Float[Tensor, "one c n"], unit_in: int, unit_out: int) -> Float[Tensor, "one d m"]:
        """A causal network's layers: what is before and after the recurrent layer in windows, that layer over the whole.

        A step is `unit_in` positions of the input and `unit_out` of the output, on the side of the recurrent layer where these are samples.
        """
        recurrent = next(i for i, layer in enumerate(layers) if isinstance(layer, SLSTM))
        before, after = layers[:recurrent], layers[recurrent + 1 :]
        x = self._windowed(before, x, unit_in, 1) if unit_in > 1 else before(x)
        x = layers[recurrent](x)
        return self._windowed(after, x, 1, unit_out) if unit_out > 1 else after(x)

    def _windowed(self, layers: nn.Module, x: Float[Tensor, "one c n"], unit_in: int, unit_out: int) -> Float[Tensor, "one d m"]:
        past_steps = 2  # The convolutions look back 478 samples, less than 2 steps of 320.
        steps = math.ceil(x.shape[-1] / unit_in)
        pieces = []
        for start in range(0, steps, self.window_steps):
            past = min(past_steps, start)
            piece = layers(x[..., (start - past) * unit_in : (start + self.window_steps) * unit_in])
            pieces.append(piece[..., past * unit_out :])
        return torch.cat(pieces, dim=-1)

    def _decode_chunks(self, codes: Int[Tensor, "codebooks steps"]) -> Float[Tensor, "channels samples"]:
        steps, hop = codes.shape[-1], self.hop_samples
        chunk_steps = self.sample_rate_hz // hop
        fade = (torch.arange(hop, device=codes.device) + 0.5) / hop
        wave = torch.zeros(self.channels, steps * hop, device=codes.device)
        for start in range(0, steps, chunk_steps):
            chunk = self.network.decoder(self.network.quantizer.decode(codes[:, None, start : start + chunk_steps + 1]))[0]
            if start > 0:
                chunk[:, :hop] *= fade
            if start + chunk_steps < steps:
                chunk[:, -hop:] *= 1 - fade
            wave[:, start * hop : start * hop + chunk.shape[-1]] += chunk
        return wave


# --- the stand-in ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LappedConfig:
    """The stand-in codec's shape. The defaults lie on EnCodec 24 kHz's clock with its number of codebooks."""

    sample_rate_hz: int = 24_000
    """Samples per second."""
    hop_samples: int = 320
    """Samples in a step, and coefficients of a frame."""
    card: int = 1024
    """Entries of every codebook."""
    envelope_codebooks: int = 2
    """Codebooks for the loudness of the bands; the other ones are for the shapes within them, a pair of bands each."""
    band_edges: tuple[int, ...] = (0, 4, 8, 12, 17, 23, 30, 40, 54, 76, 110, 180, 320)
    """First coefficient of each band, and the end: narrow where the ear is fine, an even number of bands."""
    floor_db: float = -65.0
    """Mean square of a band's coefficients, relative to full scale, below which it counts as silent."""

    def __post_init__(self) -> None:
        edges = self.band_edges
        if len(edges) % 2 == 0 or edges[0] != 0 or edges[-1] != self.hop_samples or any(b <= a for a, b in itertools.pairwise(edges)):
            raise ValueError(f"band_edges {edges}: expected an even number of growing bands from 0 to hop_samples {self.hop_samples}")

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Half-open range of coefficients of each pair of bands."""
        return list(zip(self.band_edges[:-2:2], self.band_edges[2::2], strict=True))

    @property
    def codebooks(self) -> int:
        """Envelope codebooks and one for each pair of bands."""
        return self.envelope_codebooks + len(self.pairs)


class LappedCodec(Codec):
    """A lapped transform with codebooks: loudness of the bands first (two stages), then the shape of the coefficients in pairs of bands.

    A frame is the MDCT (Princen, Johnson & Bradley 1987; sine window of two hops) centred on its step, so that decoded sound lies where it was
    to the sample. Gain-shape quantisation (as in CELT, Valin et al. 2010) with codebooks fitted by k-means: whatever shapes are chosen, the
    first two codes alone decide how loud each band is, which is what an ear and a small model of codes need first. The codes of silence are
    all 0, and decode to silence.

    What quantises is computed in float64: nearest entries then do not depend on threads, batches or devices.
    """

    envelopes: Float[Tensor, "stages card bands"]
    basis: Float64[Tensor, "window coefficients"]
    slope: Float64[Tensor, "hop"]
    band_of: Int[Tensor, "coefficients"]

    def __init__(self, config: LappedConfig = LappedConfig()) -> None:
        super().__init__(
            name="lapped",
            sample_rate_hz=config.sample_rate_hz,
            hop_samples=config.hop_samples,
            channels=1,
            codebooks=config.codebooks,
            card=config.card,
        )
        self.config = config
        hop, edges = config.hop_samples, torch.tensor(config.band_edges)
        self.register_buffer("envelopes", torch.zeros(config.envelope_codebooks, config.card, len(edges) - 1))
        self.shapes = nn.ParameterList(nn.Parameter(torch.zeros(config.card, hi - lo), requires_grad=False) for lo, hi in config.pairs)
        position, frequency = torch.arange(2 * hop, dtype=torch.float64), torch.arange(hop, dtype=torch.float64)
        basis = torch.cos(math.pi / hop * (position[:, None] + 0.5 + hop / 2) * (frequency + 0.5)) * math.sqrt(2 / hop)
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("slope", torch.sin(math.pi / 2 * (position[:hop] + 0.5) / hop), persistent=False)
        self.register_buffer("band_of", torch.bucketize(torch.arange(hop), edges, right=True) - 1, persistent=False)

    def _windows(self, steps: int) -> Float64[Tensor, "steps window"]:
        """Every step's window. The first rises and the last falls at once, about the point where the alias would fold: nothing is lost there."""
        hop = self.hop_samples
        windows = torch.cat([self.slope, self.slope.flip(0)]).repeat(steps, 1)
        edge = torch.cat([torch.zeros(hop // 2), torch.ones(hop - hop // 2)]).to(windows)
        windows[0, :hop], windows[-1, hop:] = edge, edge.flip(0)
        return windows

    def analyse(self, wave: Float[Tensor, "samples"]) -> Float64[Tensor, "steps coefficients"]:
        """Coefficients of each step, orthonormal: their squares sum to the wave's. The last step is filled up with zeros."""
        hop = self.hop_samples
        steps = math.ceil(wave.shape[0] / hop)
        padded = F.pad(wave.double(), (hop // 2, steps * hop - wave.shape[0] + hop - hop // 2))
        return (padded.unfold(0, 2 * hop, hop) * self._windows(steps)) @ self.basis

    def synthesise(self, coefficients: Float64[Tensor, "steps coefficients"]) -> Float[Tensor, "samples"]:
        """The inverse of `analyse`."""
        hop, steps = self.hop_samples, coefficients.shape[0]
        first, second = ((coefficients @ self.basis.T) * self._windows(steps)).split(hop, dim=1)
        wave = F.pad(first.flatten(), (0, hop)) + F.pad(second.flatten(), (hop, 0))
        return wave[hop // 2 : hop // 2 + steps * hop].float()

    def levels(self, coefficients: Float64[Tensor, "steps coefficients"]) -> Float64[Tensor, "steps bands"]:
        """Mean square of each band in dB, not below the floor."""
        bands = self.envelopes.shape[-1]
        energy = coefficients.new_zeros(coefficients.shape[0], bands).index_add_(1, self.band_of, coefficients.square())
        return (10 * torch.log10(energy / torch.bincount(self.band_of, minlength=bands) + 1e-12)).clamp(min=self.config.floor_db)

    def gains(self, levels: Float64[Tensor, "steps bands"]) -> Float64[Tensor, "steps coefficients"]:
        """Root mean square of each coefficient; exactly 0 up to 3 dB above the floor."""
        gains = torch.where(levels < self.config.floor_db + 3, 0, 10 ** (levels / 20))
        return gains[:, self.band_of]

    def encode_levels(self, levels: Float64[Tensor, "steps bands"]) -> tuple[Int[Tensor, "stages steps"], Float64[Tensor, "steps bands"]]:
        """Codes of the bands' loudness, and the loudness that they stand for."""
        codes, decoded = [], torch.zeros_like(levels)
        for codebook in self.envelopes.double():
            codes.append(nearest(levels - decoded, codebook))
            decoded = decoded + codebook[codes[-1]]
        return torch.stack(codes), decoded

    def encode_clip(self, wave: Float[Tensor, "channels samples"]) -> Int[Tensor, "codebooks steps"]:
        coefficients = self.analyse(wave[0])
        codes, levels = self.encode_levels(self.levels(coefficients))
        gains = self.gains(levels)
        shapes = torch.where(gains > 0, coefficients / gains.clamp(min=1e-9), 0)
        # Errors count by their loudness to the power 0.7: between equal in dB and equal in energy, as hearing is.
        weights = gains**1.4
        pairs = zip(self.config.pairs, self.shapes, strict=True)
        return torch.cat([codes, torch.stack([nearest(shapes[:, lo:hi], book.double(), weights[:, lo:hi]) for (lo, hi), book in pairs])])

    def decode_clip(self, codes: Int[Tensor, "codebooks steps"]) -> Float[Tensor, "channels samples"]:
        stages = self.config.envelope_codebooks
        levels = torch.stack([book[code] for book, code in zip(self.envelopes.double(), codes, strict=False)]).sum(0)
        shapes = torch.cat([book[code] for book, code in zip(self.shapes, codes[stages:], strict=True)], dim=1)
        return self.synthesise(shapes.double() * self.gains(levels))[None]


def nearest(
    x: Float[Tensor, "n d"], codebook: Float[Tensor, "card d"], weights: Float[Tensor, "n d"] | None = None, *, block: int = 4096
) -> Int[Tensor, "n"]:
    """Index of each row's nearest entry, by weighted squared distance; the first among equals (0 where all weights are 0)."""
    if weights is None:
        return torch.cat([(codebook.square().sum(1) - 2 * rows @ codebook.T).argmin(1) for rows in x.split(block)])
    pieces = zip(x.split(block), weights.split(block), strict=True)
    found = torch.cat([(w @ codebook.square().T - 2 * (w * rows) @ codebook.T).argmin(1) for rows, w in pieces])
    return torch.where(weights.any(1), found, 0)


# --- files ----------------------------------------------------------------------------------------------------------------------------


def save_codec(path: str | Path, codec: LappedCodec) -> None:
    """Writes a fitted stand-in codec with its configuration to a .safetensors file."""
    save_state(path, codec.state_dict(), {"kind": "lapped_codec", **asdict(codec.config)})


def load_codec(name_or_path: str | Path, *, bandwidth_kbps: float = 6.0, device: str | torch.device = "cpu") -> Codec:
    """The codec in a weights file: EnCodec's published .th of either rate (told by its contents), or a fitted stand-in.

    `name_or_path` is a file, or `encodec24` or `encodec48` if these are in the cache. `bandwidth_kbps` chooses EnCodec's number of codebooks
    and means nothing to the stand-in. Raises ValueError if the file holds no codec.
    """
    path = resolve(name_or_path)
    tensors, config = load_state(path)
    if config is not None:
        if config.pop("kind", None) != "lapped_codec":
            raise ValueError(f"{path}: holds another kind of network; expected a codec")
        values: dict[str, Any] = {**config, "band_edges": tuple(config["band_edges"])}
        codec: Codec = LappedCodec(LappedConfig(**values))
        load_strictly(codec, tensors, source=path)
    else:
        # The causal 24 kHz network has normalised weights, the other one normalised activations.
        variant: Variant = "encodec24" if "encoder.model.0.conv.conv.weight_g" in tensors else "encodec48"
        codec = EncodecCodec(variant, bandwidth_kbps=bandwidth_kbps)
        load_strictly(codec.network, tensors, source=path)
    codec.weights_sha256 = sha256_file(path)
    return codec.to(device).eval()
