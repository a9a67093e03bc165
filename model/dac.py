"""DAC, the Descript Audio Codec (Kumar et al. 2023, "High-Fidelity Audio Compression with Improved RVQGAN"), for inference.

The network is written as layers that take their input in pieces: each keeps the end of its input that the next piece needs, so that a clip of
any length passes through at the memory of a piece, no position is computed twice, and a stream of codes is decoded by the same code as a
whole clip. Parameters have the released names. This module knows waveforms, codes and tensors by name; not how files are read.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from model.codec import Codebooks, Codec, StreamDecoder
from model.weights import load_strictly


@dataclass(frozen=True)
class DacConfig:
    """The network's shape. The defaults are the released one for 44.1 kHz at 8 kbps: 86.13 steps a second, 9 codebooks."""

    sample_rate_hz: int = 44_100
    """Samples per second."""
    encoder_width: int = 64
    """Channels behind the encoder's first convolution; they double with every block."""
    encoder_rates: tuple[int, ...] = (2, 4, 8, 8)
    """By how much each block of the encoder lowers the rate; even numbers."""
    latent_width: int = 1024
    """Channels between encoder, codebooks and decoder."""
    decoder_width: int = 1536
    """Channels behind the decoder's first convolution; they halve with every block."""
    decoder_rates: tuple[int, ...] = (8, 8, 4, 2)
    """By how much each block of the decoder raises the rate; even numbers."""
    codebooks: int = 9
    """Stages of residual quantisation."""
    card: int = 1024
    """Entries of every codebook."""
    codebook_width: int = 8
    """Numbers in an entry: few, for the nearest one is looked for in a projection (sec. 3.2 of the paper)."""

    def __post_init__(self) -> None:
        if math.prod(self.encoder_rates) != math.prod(self.decoder_rates):
            raise ValueError(f"encoder_rates {self.encoder_rates} and decoder_rates {self.decoder_rates} have different products; expected one hop")
        if any(rate < 2 or rate % 2 for rate in (*self.encoder_rates, *self.decoder_rates)):
            raise ValueError(
                f"encoder_rates {self.encoder_rates}, decoder_rates {self.decoder_rates}: expected even rates; an odd one, as in the released "
                "networks for 16 and 24 kHz, loses samples at a clip's end and with them the clock"
            )

    @property
    def hop_samples(self) -> int:
        """Samples in a step."""
        return math.prod(self.encoder_rates)


# --- layers that take their input in pieces -------------------------------------------------------------------------------------------

Flow = Callable[[Tensor, bool], Tensor]
"""A layer at work on one clip: the next piece [1, channels, n] and whether it is the last one, to the output that is now final."""


class InPieces(nn.Module, ABC):
    """A layer whose outputs depend on neighbouring inputs."""

    @abstractmethod
    def flow(self) -> Flow:
        """The layer at the start of a clip."""


def flow_through(layers: Iterable[nn.Module]) -> Flow:
    """Layers one after the other; those that are not `InPieces` work position by position."""
    flows: list[Flow] = [layer.flow() if isinstance(layer, InPieces) else _pointwise(layer) for layer in layers]

    def push(x: Tensor, last: bool) -> Tensor:
        for flow in flows:
            x = flow(x, last)
        return x

    return push


def _pointwise(layer: nn.Module) -> Flow:
    return lambda x, _last: layer(x)


class Snake(nn.Module):
    """x + sin^2(a x) / a with an `a` for every channel (Ziyin et al. 2020): an activation for periodic signals."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Float[Tensor, "one c n"]) -> Float[Tensor, "one c n"]:
        # In place but for two tensors: on a CPU this is bound by memory.
        wave = (x * self.alpha).sin_().square_()
        return torch.addcmul(x, wave, (self.alpha + 1e-9).reciprocal())


class WeightNormed(InPieces):
    """A convolution kept as released, direction `weight_v` and gain `weight_g` (Salimans & Kingma 2016), which are multiplied once, on loading."""

    def __init__(self, shape: tuple[int, int, int], channels_out: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels_out))
        self.weight_g = nn.Parameter(torch.ones(shape[0], 1, 1))
        self.weight_v = nn.Parameter(torch.randn(shape))
        self.fold()
        self.register_load_state_dict_post_hook(_fold)

    def normed(self) -> Float[Tensor, "a b kernel"]:
        """The weights that the two parameters stand for."""
        return (self.weight_v * (self.weight_g / self.weight_v.norm(dim=(1, 2), keepdim=True))).detach()

    @abstractmethod
    def fold(self) -> None:
        """Make the weights that are computed with from the parameters."""


def _fold(layer: nn.Module, _keys: object) -> None:
    assert isinstance(layer, WeightNormed)
    layer.fold()


class Conv(WeightNormed):
    """A convolution padded with zeros on both sides, so that n inputs give n / stride outputs."""

    weight: Float[Tensor, "out in kernel"]

    def __init__(self, channels_in: int, channels_out: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> None:
        self.channels_out, self.stride, self.dilation = channels_out, stride, dilation
        self.span = (kernel - 1) * dilation + 1
        super().__init__((channels_out, channels_in, kernel), channels_out)

    def fold(self) -> None:
        self.register_buffer("weight", self.normed(), persistent=False)

    def forward(self, x: Float[Tensor, "one c_in n"]) -> Float[Tensor, "one c_out m"]:
        """Without padding."""
        count = max(0, (x.shape[-1] - self.span) // self.stride + 1)
        return F.conv1d(x, self.weight, self.bias, self.stride, dilation=self.dilation) if count else x.new_empty(1, self.channels_out, 0)

    def flow(self) -> Flow:
        if self.span == 1:
            return _pointwise(self)
        padding = self.weight.new_zeros(1, self.weight.shape[1], (self.span - self.stride) // 2)
        held = padding

        def push(x: Tensor, last: bool) -> Tensor:
            nonlocal held
            x = torch.cat([held, x, padding] if last else [held, x], dim=-1)
            y = self(x)
            held = x[..., y.shape[-1] * self.stride :].clone()
            return y

        return push


class TransposedConv(WeightNormed):
    """A transposed convolution with a kernel of two strides, cut on both sides so that n inputs give n * stride outputs.

    An input's kernel reaches over its own outputs and those of the next one; written so, it is two matrix products, which a CPU does two
    to three times as fast as torch's own.
    """

    own: Float[Tensor, "outputs in"]
    next: Float[Tensor, "outputs in"]

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        self.channels_in, self.channels_out, self.stride = channels_in, channels_out, stride
        super().__init__((channels_in, channels_out, 2 * stride), channels_out)

    def fold(self) -> None:
        for name, half in zip(("own", "next"), self.normed().split(self.stride, dim=2), strict=True):
            self.register_buffer(name, half.permute(1, 2, 0).reshape(-1, self.channels_in), persistent=False)

    def forward(self, x: Float[Tensor, "one c_in n"]) -> Float[Tensor, "one c_out m"]:
        """The outputs of all inputs but the first, which is the one before them."""
        before, x = x[0, :, :-1], x[0, :, 1:]
        y = torch.addmm(self.bias.repeat_interleave(self.stride)[:, None], self.own, x).addmm_(self.next, before)
        return y.view(self.channels_out, self.stride, -1).transpose(1, 2).reshape(1, self.channels_out, -1)

    def flow(self) -> Flow:
        nothing = self.own.new_zeros(1, self.channels_in, 1)
        before, cut = nothing, self.stride // 2

        def push(x: Tensor, last: bool) -> Tensor:
            nonlocal before, cut
            x = torch.cat([before, x, nothing] if last else [before, x], dim=-1)
            before = x[..., -1:].clone()
            y = self(x)
            start = min(cut, y.shape[-1])
            cut -= start
            return y[..., start : y.shape[-1] - (self.stride // 2 if last else 0)]

        return push


class Chain(InPieces):
    """Layers one after the other, called `block` in the released file."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(*layers)

    def flow(self) -> Flow:
        return flow_through(self.block)


class Residual(Chain):
    """A dilated and a pointwise convolution, added to what came in."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__(Snake(channels), Conv(channels, channels, 7, dilation=dilation), Snake(channels), Conv(channels, channels, 1))

    def flow(self) -> Flow:
        branch, held = super().flow(), None

        def push(x: Tensor, last: bool) -> Tensor:
            nonlocal held
            y = branch(x, last)
            x = x if held is None else torch.cat([held, x], dim=-1)
            count = y.shape[-1]
            held = x[..., count:].clone()
            return y.add_(x[..., :count])

        return push


def _residuals(channels: int) -> list[nn.Module]:
    return [Residual(channels, dilation) for dilation in (1, 3, 9)]


# --- the network ----------------------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Latents to a waveform; its layers are called `model` in the released file."""

    def __init__(self, config: DacConfig) -> None:
        super().__init__()
        widths = [config.decoder_width // 2**i for i in range(len(config.decoder_rates) + 1)]
        blocks = [
            Chain(Snake(wide), TransposedConv(wide, narrow, rate), *_residuals(narrow))
            for (wide, narrow), rate in zip(itertools.pairwise(widths), config.decoder_rates, strict=True)
        ]
        self.model = nn.Sequential(Conv(config.latent_width, widths[0], 7), *blocks, Snake(widths[-1]), Conv(widths[-1], 1, 7), nn.Tanh())


def _encoder(config: DacConfig) -> Chain:
    """A waveform to latents."""
    widths = [config.encoder_width * 2**i for i in range(len(config.encoder_rates) + 1)]
    blocks = [
        Chain(*_residuals(narrow), Snake(narrow), Conv(narrow, wide, 2 * rate, stride=rate))
        for (narrow, wide), rate in zip(itertools.pairwise(widths), config.encoder_rates, strict=True)
    ]
    return Chain(Conv(1, widths[0], 7), *blocks, Snake(widths[-1]), Conv(widths[-1], config.latent_width, 3))


class Stage(nn.Module):
    """One codebook, between a projection to its few dimensions and one back."""

    def __init__(self, config: DacConfig) -> None:
        super().__init__()
        self.in_proj = Conv(config.latent_width, config.codebook_width, 1)
        self.out_proj = Conv(config.codebook_width, config.latent_width, 1)
        self.codebook = nn.Embedding(config.card, config.codebook_width)


class Quantizer(nn.Module):
    """Residual quantisation: every stage codes what the ones before it left over."""

    def __init__(self, config: DacConfig) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(Stage(config) for _ in range(config.codebooks))

    def stages(self) -> list[Stage]:
        """The stages, as what they are."""
        return [stage for stage in self.quantizers if isinstance(stage, Stage)]

    def encode(self, latents: Float[Tensor, "one width steps"]) -> Int[Tensor, "codebooks steps"]:
        """Each stage's entry of the nearest direction; what is taken off is the entry itself, of its own length."""
        codes, left = [], latents
        for stage in self.stages():
            wanted = F.normalize(stage.in_proj(left)[0], dim=0)
            codes.append((F.normalize(stage.codebook.weight, dim=1) @ wanted).argmax(0))
            left = left - stage.out_proj(stage.codebook(codes[-1]).T[None])
        return torch.stack(codes)

    def decode(self, codes: Int[Tensor, "codebooks steps"]) -> Float[Tensor, "one width steps"]:
        """The latents that codes stand for."""
        parts = [stage.out_proj(stage.codebook(code).T[None]) for stage, code in zip(self.stages(), codes, strict=True)]
        return torch.stack(parts).sum(0)


class Dac(nn.Module):
    """The network, with the released names."""

    def __init__(self, config: DacConfig) -> None:
        super().__init__()
        self.encoder, self.quantizer, self.decoder = _encoder(config), Quantizer(config), Decoder(config)


# --- the codec ------------------------------------------------------------------------------------------------------------------------


class DacCodec(Codec):
    """DAC on its exact clock: 44100 / 512 steps a second, 441 in eight segments. Mono; 9 codebooks of 1024.

    Clips pass through in pieces of `piece_steps` (0: 128 on a CPU, where a piece then stays in its cache; 512 on a GPU), whatever their length.
    """

    def __init__(self, config: DacConfig = DacConfig(), *, piece_steps: int = 0) -> None:
        super().__init__(
            name=f"dac{config.sample_rate_hz // 1000}",
            sample_rate_hz=config.sample_rate_hz,
            hop_samples=config.hop_samples,
            channels=1,
            codebooks=config.codebooks,
            card=config.card,
        )
        self.config, self.piece_steps = config, piece_steps
        self.network = Dac(config).requires_grad_(False).eval()

    def steps_at_once(self) -> int:
        """Steps of a piece on the device that the weights are on."""
        return self.piece_steps or (128 if next(self.parameters()).device.type == "cpu" else 512)

    def latents(self, wave: Float[Tensor, "channels samples"]) -> Float[Tensor, "one width steps"]:
        """What the encoder makes of a clip, before it is quantised."""
        return torch.cat(list(self._latents(wave)), dim=-1)

    def _latents(self, wave: Tensor) -> Iterable[Tensor]:
        flow, samples = self.network.encoder.flow(), self.steps_at_once() * self.hop_samples
        padded = F.pad(wave, (0, -wave.shape[-1] % self.hop_samples))[None]
        for start in range(0, padded.shape[-1], samples):
            yield flow(padded[..., start : start + samples], start + samples >= padded.shape[-1])

    def encode_clip(self, wave: Float[Tensor, "channels samples"]) -> Int[Tensor, "codebooks steps"]:
        return torch.cat([self.network.quantizer.encode(latents) for latents in self._latents(wave)], dim=-1)

    def decode_clip(self, codes: Int[Tensor, "codebooks steps"]) -> Float[Tensor, "channels samples"]:
        stream = _DacStream(self)
        return torch.cat([stream.push(codes), stream.finish()], dim=-1)

    def stream(self) -> StreamDecoder:
        """A stream that gives a step's sound some ten steps later (0.11 s), when all that it depends on is there.

        Pieces of a few steps cost more than the same steps at once, for every piece reads all weights.
        """
        return _DacStream(self)

    def codebook_tables(self) -> Codebooks:
        """The codebooks [card, 8] and the biases of their projections back [1024]."""
        stages = self.network.quantizer.stages()
        return Codebooks([stage.codebook.weight for stage in stages], [stage.out_proj.bias for stage in stages])


class _DacStream(StreamDecoder):
    def __init__(self, codec: DacCodec) -> None:
        super().__init__(codec)
        self._codec, self._flow = codec, flow_through(codec.network.decoder.model)

    def _push(self, codes: Int[Tensor, "codebooks n"]) -> Float[Tensor, "channels m"]:
        quantizer = self._codec.network.quantizer
        pieces = [self._flow(quantizer.decode(piece), False)[0] for piece in codes.split(self._codec.steps_at_once(), dim=-1) if piece.shape[-1]]
        return torch.cat(pieces, dim=-1) if pieces else codes.new_empty((1, 0), dtype=torch.float32)

    def _finish(self) -> Float[Tensor, "channels m"]:
        return self._flow(self._nothing(), True)[0]

    def _nothing(self) -> Float[Tensor, "one width 0"]:
        return next(self._codec.parameters()).new_empty(1, self._codec.config.latent_width, 0)


# --- tensors by name ------------------------------------------------------------------------------------------------------------------


def dac_from(tensors: Mapping[str, Tensor], config: DacConfig, *, source: str | Path) -> DacCodec:
    """The codec of these sizes with these parameters, of any floating type; computes in fp32. ValueError if they do not fit; it names `source`."""
    with torch.device("meta"):
        codec = DacCodec(config)
    codec.to_empty(device="cpu")
    load_strictly(codec.network, tensors, source=source)
    return codec


def is_dac(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these names are a DAC network's."""
    return "quantizer.quantizers.0.codebook.weight" in tensors and "decoder.model.0.weight_v" in tensors


def dac_config(tensors: Mapping[str, Tensor], *, sample_rate_hz: int = 44_100) -> DacConfig:
    """The shape of the network that has these parameters, from their names and shapes, which do not tell the sample rate.

    Raises ValueError if they are not a DAC network's.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise ValueError(f"not a DAC network: it has no {name}, among {len(tensors)} tensors")
        return tuple(tensors[name].shape)

    def rates(name: str) -> tuple[int, ...]:
        """Of the blocks, which are numbered from 1: a kernel that changes the rate has twice its length."""
        numbers = itertools.takewhile(lambda i: name.format(i) in tensors, itertools.count(1))
        return tuple(shape(name.format(i))[2] // 2 for i in numbers)

    card, codebook_width = shape("quantizer.quantizers.0.codebook.weight")
    decoder_width, latent_width, _kernel = shape("decoder.model.0.weight_v")
    return DacConfig(
        sample_rate_hz=sample_rate_hz,
        encoder_width=shape("encoder.block.0.weight_v")[0],
        encoder_rates=rates("encoder.block.{}.block.4.weight_v"),
        latent_width=latent_width,
        decoder_width=decoder_width,
        decoder_rates=rates("decoder.model.{}.block.1.weight_v"),
        codebooks=sum(name.startswith("quantizer.") and name.endswith(".codebook.weight") for name in tensors),
        card=card,
        codebook_width=codebook_width,
    )


def check_settings(config: DacConfig, settings: Mapping[str, object], *, source: str | Path) -> None:
    """Raises ValueError if the constructor's arguments that a released file carries beside its parameters (`metadata.kwargs`) say otherwise."""
    found = {
        "encoder_dim": config.encoder_width,
        "encoder_rates": list(config.encoder_rates),
        "latent_dim": config.latent_width,
        "decoder_dim": config.decoder_width,
        "decoder_rates": list(config.decoder_rates),
        "n_codebooks": config.codebooks,
        "codebook_size": config.card,
        "codebook_dim": config.codebook_width,
    }
    said = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items() if name in found and value is not None}
    wrong = [f"{name} {value}, its parameters have {found[name]}" for name, value in said.items() if value != found[name]]
    if wrong:
        raise ValueError(f"{source}: its metadata and its parameters disagree: the metadata says " + "; ".join(wrong) + ". Is the file put together?")
