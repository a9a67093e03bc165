"""The stand-in codec where published weights cannot be had: a lapped transform and codebooks fitted in seconds, on EnCodec's clock.

This module knows waveforms, codes and tables; `model/standin.py` fits them.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from model.codec import Codebooks, Codec, StreamDecoder


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
        return self.synthesise(self.coefficients(codes))[None]

    def coefficients(self, codes: Int[Tensor, "codebooks steps"]) -> Float64[Tensor, "steps coefficients"]:
        """What codes stand for."""
        stages = self.config.envelope_codebooks
        levels = torch.stack([book[code] for book, code in zip(self.envelopes.double(), codes, strict=False)]).sum(0)
        shapes = torch.cat([book[code] for book, code in zip(self.shapes, codes[stages:], strict=True)], dim=1)
        return shapes.double() * self.gains(levels)

    def stream(self) -> StreamDecoder:
        """A stream that is half a step behind: a step's second half overlaps with the next one."""
        return _LappedStream(self)

    def codebook_tables(self) -> Codebooks:
        """The loudness tables [card, bands], then the shapes' [card, coefficients of the pair of bands]."""
        return Codebooks([*self.envelopes, *self.shapes], None)


class _LappedStream(StreamDecoder):
    """Holds the last frame's second half, which is windowed in another way if the clip ends there."""

    def __init__(self, codec: LappedCodec) -> None:
        super().__init__(codec)
        self._codec = codec
        self._second: Tensor | None = None

    def _push(self, codes: Int[Tensor, "codebooks n"]) -> Float[Tensor, "channels m"]:
        hop, slope = self._codec.hop_samples, self._codec.slope
        if codes.shape[-1] == 0:
            return slope.new_empty(1, 0).float()
        rising, falling = (self._codec.coefficients(codes) @ self._codec.basis.T).split(hop, dim=1)
        first = rising * slope
        first[1:] += falling[:-1] * slope.flip(0)
        if self._second is None:
            # Ahead of a clip's first sample there is nothing, and up to it the alias.
            first[0] = rising[0]
            wave = first.flatten()[hop // 2 :]
        else:
            first[0] += self._second * slope.flip(0)
            wave = first.flatten()
        self._second = falling[-1].clone()
        return wave.float()[None]

    def _finish(self) -> Float[Tensor, "channels m"]:
        hop = self._codec.hop_samples
        return self._codec.slope.new_empty(1, 0).float() if self._second is None else self._second[: hop // 2].float()[None]


def nearest(
    x: Float[Tensor, "n d"], codebook: Float[Tensor, "card d"], weights: Float[Tensor, "n d"] | None = None, *, block: int = 4096
) -> Int[Tensor, "n"]:
    """Index of each row's nearest entry, by weighted squared distance; the first among equals (0 where all weights are 0)."""
    if weights is None:
        return torch.cat([(codebook.square().sum(1) - 2 * rows @ codebook.T).argmin(1) for rows in x.split(block)])
    pieces = zip(x.split(block), weights.split(block), strict=True)
    found = torch.cat([(w @ codebook.square().T - 2 * (w * rows) @ codebook.T).argmin(1) for rows, w in pieces])
    return torch.where(weights.any(1), found, 0)
