"""What every codec has: a waveform becomes integer codes [codebooks, steps] and back, with step i covering samples [i, i + 1) * hop_samples.

Sound is decoded at once, or as a stream while the codes are being made. This module knows waveforms and codes; not how audio is read from
files, not what predicts the codes, and none of the networks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from configs.clock import CodecClock


@dataclass(frozen=True)
class Codebooks:
    """The vectors that codes stand for, one table a codebook: what a model of the codes can start its embeddings from."""

    tables: list[Tensor]
    """[card, width] each. Widths are equal in EnCodec (128) and DAC (8), and differ in the stand-in codec."""
    biases: list[Tensor] | None
    """What the codec adds behind each table's projection, [latent channels] each; None for codecs that have no projection."""


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
        with _exact_arithmetic():
            return torch.stack([self.encode_clip(clip) for clip in wave])

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "b codebooks steps"], *, samples: int | None = None) -> Float[Tensor, "b channels samples"]:
        """Waveforms of steps * hop_samples samples, or the first `samples` of them."""
        if codes.shape[1] != self.codebooks or codes.shape[2] == 0 or codes.min() < 0 or codes.max() >= self.card:
            raise ValueError(f"codes of the shape {tuple(codes.shape)}; {self.name} expects [clips, {self.codebooks}, steps > 0] in [0, {self.card})")
        with _exact_arithmetic():
            return torch.stack([self.decode_clip(clip.long()) for clip in codes])[..., :samples]

    @abstractmethod
    def encode_clip(self, wave: Float[Tensor, "channels samples"]) -> Int[Tensor, "codebooks steps"]:
        """`encode` of one clip."""

    @abstractmethod
    def decode_clip(self, codes: Int[Tensor, "codebooks steps"]) -> Float[Tensor, "channels samples"]:
        """`decode` of one clip."""

    @abstractmethod
    def stream(self) -> "StreamDecoder":
        """A decoder of one clip whose codes come in pieces. Several may be open at the same time."""

    @abstractmethod
    def codebook_tables(self) -> Codebooks:
        """The vectors that the codes of each codebook stand for."""


class StreamDecoder(ABC):
    """Decodes one clip while its codes are being made: `push` pieces of any number of steps, then `finish`.

    The waveforms returned, end to end, are those that `Codec.decode` gives for all the codes at once, within 1e-4, and steps * hop_samples
    long. A codec that looks ahead returns samples only once they are final, so a piece's sound may come with a later one, and `push` may
    return none. What is kept between calls does not grow with the clip.
    """

    def __init__(self, codec: Codec) -> None:
        self._name, self._codebooks, self._card = codec.name, codec.codebooks, codec.card
        self._finished = False

    @torch.no_grad()
    def push(self, codes: Int[Tensor, "codebooks n"]) -> Float[Tensor, "channels m"]:
        """The next steps' codes in, the samples that became final out. Raises ValueError for codes that the codec does not have."""
        if codes.shape[0] != self._codebooks or (codes.numel() and (codes.min() < 0 or codes.max() >= self._card)):
            raise ValueError(f"codes of the shape {tuple(codes.shape)}; {self._name} expects [{self._codebooks}, steps] in [0, {self._card})")
        assert not self._finished, "a stream decodes one clip; open another one"
        with _exact_arithmetic():
            return self._push(codes.long())

    @torch.no_grad()
    def finish(self) -> Float[Tensor, "channels m"]:
        """The clip has ended: the samples still owed."""
        assert not self._finished, "a stream decodes one clip; open another one"
        self._finished = True
        with _exact_arithmetic():
            return self._finish()

    @abstractmethod
    def _push(self, codes: Int[Tensor, "codebooks n"]) -> Float[Tensor, "channels m"]: ...

    @abstractmethod
    def _finish(self) -> Float[Tensor, "channels m"]: ...


@contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """On a GPU, convolutions and products round to TF32, and algorithms are picked by trial, if told so; codes would then change between runs."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
