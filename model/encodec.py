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

from model.codec import Codebooks, Codec, StreamDecoder

Variant = Literal["encodec24", "encodec48"]

PAST_STEPS = 2
"""What EnCodec 24 kHz needs of the past on the side where steps are samples: its convolutions look back 478, less than 2 steps of 320."""


class EncodecCodec(Codec):
    """EnCodec at 24 kHz (mono, causal, 75 steps/s) or 48 kHz (stereo, 150 steps/s). `bandwidth_kbps` decides how many codebooks are used.

    24 kHz: codes and audio are those of the package. Clips longer than `window_steps` are encoded through convolutions in windows with enough
    of their past, and are decoded in pieces, so that memory hardly grows with the clip; what the recurrent layer remembers is carried on.

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
            return self._quantise(self._latents(wave[None]))
        scale = wave.mean(0).square().mean().sqrt() + 1e-8
        chunks = (wave / scale)[None].split(self.sample_rate_hz, dim=-1)
        return torch.cat([self._quantise(self.network.encoder(chunk)) for chunk in chunks], dim=-1)

    def decode_clip(self, codes: Int[Tensor, "codebooks steps"]) -> Float[Tensor, "channels samples"]:
        stream = self.stream()
        return torch.cat([stream.push(codes), stream.finish()], dim=-1)

    def _quantise(self, hidden: Float[Tensor, "one d steps"]) -> Int[Tensor, "codebooks steps"]:
        return self.network.quantizer.encode(hidden, self.network.frame_rate, self.bandwidth_kbps)[:, 0]

    def _latents(self, wave: Float[Tensor, "one c samples"]) -> Float[Tensor, "one d steps"]:
        """The causal encoder: the layers that see samples in windows, the recurrent layer and what is behind it over the whole."""
        layers, hop = self.network.encoder.model, self.hop_samples
        recurrent = next(i for i, layer in enumerate(layers) if isinstance(layer, SLSTM))
        pieces = []
        for start in range(0, math.ceil(wave.shape[-1] / hop), self.window_steps):
            past = min(PAST_STEPS, start)
            piece = layers[:recurrent](wave[..., (start - past) * hop : (start + self.window_steps) * hop])
            pieces.append(piece[..., past:])
        return layers[recurrent:](torch.cat(pieces, dim=-1))

    def stream(self) -> StreamDecoder:
        """24 kHz: a step's sound comes at once, but for the first six steps, whose sound needs the seventh. 48 kHz: a second at a time."""
        return _CausalStream(self) if self.name == "encodec24" else _ChunkStream(self)

    def codebook_tables(self) -> Codebooks:
        """The codebooks in use [1024, 128]."""
        tables = [table for name, table in self.network.quantizer.named_buffers() if name.endswith(".embed")]
        return Codebooks(tables[: self.codebooks], None)


class _CausalStream(StreamDecoder):
    """EnCodec 24 kHz: what the recurrent layer remembers, and of the layers before and after it the inputs that the next step still sees."""

    FIRST_STEPS = 7
    """The first layer's kernel. It pads a clip's start with its own reflection, so that nothing is known before this many steps."""

    def __init__(self, codec: EncodecCodec) -> None:
        super().__init__(codec)
        self._codec, self._waiting = codec, list[Tensor]()
        self._memory: tuple[Tensor, Tensor] | None = None
        self._latents: Tensor | None = None
        self._hidden: Tensor | None = None
        first, recurrent, *rest = codec.network.decoder.model
        assert isinstance(recurrent, SLSTM) and recurrent.skip
        self._first, self._recurrent, self._rest = first, recurrent.lstm, nn.Sequential(*rest)

    def _push(self, codes: Int[Tensor, "codebooks n"]) -> Float[Tensor, "channels m"]:
        pieces = [self._piece(piece) for piece in codes.split(self._codec.window_steps, dim=-1) if piece.shape[-1]]
        return torch.cat(pieces, dim=-1) if pieces else self._silence()

    def _finish(self) -> Float[Tensor, "channels m"]:
        if not self._waiting:
            return self._silence()
        network = self._codec.network
        return network.decoder(network.quantizer.decode(torch.cat(self._waiting, dim=-1)[:, None]))[0]

    def _silence(self) -> Float[Tensor, "channels 0"]:
        return next(self._codec.parameters()).new_empty(self._codec.channels, 0)

    def _piece(self, codes: Int[Tensor, "codebooks n"]) -> Float[Tensor, "channels m"]:
        if self._memory is None:
            self._waiting.append(codes)
            codes = torch.cat(self._waiting, dim=-1)
            if codes.shape[-1] < self.FIRST_STEPS:
                return self._silence()
            self._waiting.clear()
        latents, seen = _behind(self._latents, self._codec.network.quantizer.decode(codes[:, None]))
        self._latents = latents[..., 1 - self.FIRST_STEPS :].clone()
        x = self._first(latents)[..., seen:].permute(2, 0, 1)
        y, self._memory = self._recurrent(x, self._memory)
        hidden, seen = _behind(self._hidden, (y + x).permute(1, 2, 0))
        self._hidden = hidden[..., -PAST_STEPS:].clone()
        return self._rest(hidden)[0, :, seen * self._codec.hop_samples :]


def _behind(past: Float[Tensor, "one c m"] | None, new: Float[Tensor, "one c n"]) -> tuple[Float[Tensor, "one c k"], int]:
    """What came before and what is new, and how much came before."""
    return (new, 0) if past is None else (torch.cat([past, new], dim=-1), past.shape[-1])


class _ChunkStream(StreamDecoder):
    """EnCodec 48 kHz: a chunk of 1 s and the step behind it, which is faded into the next chunk."""

    def __init__(self, codec: EncodecCodec) -> None:
        super().__init__(codec)
        self._codec, self._chunk_steps = codec, codec.sample_rate_hz // codec.hop_samples
        device = next(codec.parameters()).device
        self._codes = torch.empty(codec.codebooks, 0, dtype=torch.long, device=device)
        self._fade = (torch.arange(codec.hop_samples, device=device) + 0.5) / codec.hop_samples
        self._tail: Tensor | None = None

    def _push(self, codes: Int[Tensor, "codebooks n"]) -> Float[Tensor, "channels m"]:
        self._codes = torch.cat([self._codes, codes], dim=-1)
        pieces = [self._fade.new_empty(self._codec.channels, 0)]
        while self._codes.shape[-1] > self._chunk_steps:
            chunk = self._decoded(self._codes[:, : self._chunk_steps + 1])
            self._tail = chunk[:, -self._codec.hop_samples :] * (1 - self._fade)
            pieces.append(chunk[:, : -self._codec.hop_samples])
            self._codes = self._codes[:, self._chunk_steps :].clone()
        return torch.cat(pieces, dim=-1) * self._codec.rms

    def _finish(self) -> Float[Tensor, "channels m"]:
        if self._codes.shape[-1] == 0:
            return self._fade.new_empty(self._codec.channels, 0)
        return self._decoded(self._codes) * self._codec.rms

    def _decoded(self, codes: Int[Tensor, "codebooks n"]) -> Float[Tensor, "channels m"]:
        """A chunk's sound, the last one's end faded into its start."""
        network, hop = self._codec.network, self._codec.hop_samples
        wave = network.decoder(network.quantizer.decode(codes[:, None]))[0]
        if self._tail is not None:
            wave[:, :hop] = wave[:, :hop] * self._fade + self._tail
        return wave
