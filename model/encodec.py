"""EnCodec (Defossez et al. 2022): the published networks of the `encodec` package as codecs on the exact clock.

This module knows waveforms and codes; not how audio or weights are read from files.
"""

import math
import warnings
from typing import Any, Literal

import torch
from encodec.model import EncodecModel
from encodec.modules import SLSTM
from jaxtyping import Float, Int
from torch import Tensor, nn

from model.codec import Codec

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
