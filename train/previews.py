"""A few clips generated at validation, to hear what the losses do not tell: sound and spectrograms in TensorBoard and in the run folder.

Knows Lightning's hooks, the stream of windows, the decoder's sampling and the codec. Draws no random number that training draws, and takes nothing
from its stream.
"""

import struct
import time
import wave
import zlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchaudio.transforms import MelSpectrogram

from configs.clock import SEGMENT_TOKENS
from model.codecs import Codec
from model.generate import Sampling, generate
from model.run_folder import RunConfig
from model.vaura import Vaura
from shards.read import Index
from shards.stream import FeatureStream, StreamConfig
from shards.windows import Batch
from train.averages import Averages, assembled
from train.callbacks import Cadence, Stopwatch
from train.codec import open_codec

SAMPLES = "samples"
COLOURS = [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]
"""From silence to full scale; between them, straight lines."""
RANGE_DB = 80.0


@dataclass(frozen=True)
class PreviewConfig:
    """Clips that validation generates, in samples/step-.../ of the run folder and in TensorBoard, beside the codec's version of the original."""

    clips: int = 0
    """The first so many windows of the validation split; 0: none. Needs the codec's weights."""
    every: int = 1
    """Every how many validations: 1 is each of them."""
    seed: int = 666
    """Of the draws: the same at each validation, so that what changes is the model."""
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.clips < 0 or self.every < 1:
            raise ValueError(f"preview.clips={self.clips}, preview.every={self.every}: expected 0 clips or more, at every validation (1) or fewer")


class Previews(Callback):
    """Generates on the first process, while the others wait for it in the next step."""

    def __init__(
        self,
        folder: Path,
        config: PreviewConfig,
        described: RunConfig,
        averages: Averages,
        cadence: Cadence,
        stopwatch: Stopwatch,
        *,
        validation: Sequence[Index],
        stream: StreamConfig,
        codec: Path,
    ) -> None:
        self._folder, self._config, self._described, self._averages = folder / SAMPLES, config, described, averages
        self._cadence, self._stopwatch = cadence, stopwatch
        self._validation, self._stream, self._codec_path = validation, stream, codec
        self._opened: tuple[Batch, Codec] | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        validation = trainer.global_step // self._cadence.validate_every
        if validation % self._config.every:
            return
        began = time.perf_counter()
        # Sharded weights are put together by all processes.
        model = assembled(cast(Vaura, pl_module.model), self._averages.validated(), keep=trainer.is_global_zero)
        if model is not None:
            self._make(model, trainer)
        self._stopwatch.forget(time.perf_counter() - began)

    @torch.inference_mode()
    def _make(self, model: Vaura, trainer: Trainer) -> None:
        batch, codec = self._open()
        codes = generate_each(model, batch, self._config)
        step = trainer.global_step
        for key, made, original in zip(batch["keys"], codes, originals(batch), strict=True):
            self._write(f"step-{step:09d}", key, "generated", made, codec, trainer)
            if not (self._folder / "original" / f"{_file(key)}.wav").is_file():
                self._write("original", key, "original", original, codec, trainer)

    def _open(self) -> tuple[Batch, Codec]:
        """The windows and the codec, once; on the first process alone."""
        if self._opened is None:
            few = replace(self._stream, batch_size=self._config.clips, weights=None, workers=0, prefetch=0, pin_memory=False)
            with closing(iter(FeatureStream(self._validation, few, 0, 1, shuffle=False))) as batches:
                self._opened = next(batches), open_codec(self._codec_path, self._described)
        return self._opened

    def _write(self, where: str, key: str, kind: str, codes: Int[Tensor, "q steps"], codec: Codec, trainer: Trainer) -> None:
        sound = codec.decode(codes[None])[0].float().clamp(-1, 1)
        picture = spectrogram(sound.mean(0), codec.sample_rate_hz)
        base = self._folder / where / _file(key)
        base.parent.mkdir(parents=True, exist_ok=True)
        write_wav(base.with_name(f"{base.name}.wav"), sound, codec.sample_rate_hz)
        base.with_name(f"{base.name}.png").write_bytes(png(picture))
        if trainer.logger is not None:
            writer = cast(TensorBoardLogger, trainer.logger).experiment
            writer.add_audio(f"preview/{key}/{kind}", sound.mean(0, keepdim=True), trainer.global_step, codec.sample_rate_hz)
            writer.add_image(f"preview/{key}/{kind}_spectrogram", picture, trainer.global_step, dataformats="HWC")


def _file(key: str) -> str:
    return key.replace("/", "_")


def originals(batch: Batch) -> list[Int[Tensor, "q steps"]]:
    """The windows' own codes, without padding."""
    there = batch.get("step_mask")
    return [codes if there is None else codes[:, : int(there[n].sum())] for n, codes in enumerate(batch["codes"])]


def generate_each(model: Vaura, batch: Batch, config: PreviewConfig) -> list[Int[Tensor, "q steps"]]:
    """Codes for each window of a batch, as long as its own, on the CPU. Those of one length are generated together."""
    lengths = [codes.shape[-1] for codes in originals(batch)]
    features = batch["features"].flatten(1, 2).to(model.norm.weight)
    there = batch.get("segment_mask")
    made: dict[int, Tensor] = {}
    for steps in sorted(set(lengths)):
        rows = [n for n, length in enumerate(lengths) if length == steps]
        tokens = features.shape[1] if there is None else SEGMENT_TOKENS * int(there[rows[0]].sum())
        codes = generate(model, features[rows, :tokens], steps=steps, sampling=config.sampling, seeds=[config.seed + n for n in rows])
        made |= dict(zip(rows, codes.cpu(), strict=True))
    return [made[n] for n in range(len(lengths))]


def spectrogram(sound: Float[Tensor, " samples"], sample_rate_hz: int) -> UInt8[np.ndarray, "height width 3"]:
    """A picture of the sound's log-mel spectrogram: 10 ms and half a band a pixel, low frequencies at the bottom, 80 dB below a full-scale tone."""
    window = 1024
    mel = MelSpectrogram(sample_rate_hz, n_fft=window, hop_length=sample_rate_hz // 100, n_mels=80)(sound.cpu())
    level = 1 + 10 * torch.log10(mel / (window / 4) ** 2 + 1e-12) / RANGE_DB
    place = (level.clamp(0, 1) * (len(COLOURS) - 1)).flip(0).repeat_interleave(2, dim=0).numpy()
    channels = [np.interp(place, range(len(COLOURS)), [colour[c] for colour in COLOURS]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def png(picture: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """The picture as a PNG file (ISO/IEC 15948): one chunk of rows without a filter."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = picture.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), picture.reshape(height, -1)], axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def write_wav(path: Path, sound: Float[Tensor, "channels samples"], sample_rate_hz: int) -> None:
    """16-bit samples."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(sound.shape[0])
        file.setsampwidth(2)
        file.setframerate(sample_rate_hz)
        file.writeframes((sound.T.cpu() * 32767).round().to(torch.int16).numpy().tobytes())
