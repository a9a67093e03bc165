"""Synchformer's stage I for Lightning: towers for pictures and for sound that learn which segments belong together (Iashin et al. 2024, sec. 3.1).

The contrastive loss over the segments of a process's clips, the zero-shot measure that decides which weights are the best, and pictures of how alike
segments are. Knows the network and batches of decoded segments. Knows no files, no dataset and no run folder: `train.sync` is the job.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from configs.clock import SEGMENT_FRAMES
from model.avclip import Avclip, segment_contrast, shifted_windows
from model.synchformer_audio import LogMel, audio_config, new_audio_tower
from model.synchformer_visual import UnusedPatchEmbed, VisualTower, new_tower, normalise, tower_config
from train.callbacks import Figures
from train.data import Clips
from train.module import StepOptions, TrainingModule
from train.optim import OptimiserConfig, ScheduleConfig
from train.previews import COLOURS
from train.trainer import Described

PUBLISHED_OPTIMISER = OptimiserConfig(learning_rate=1e-4, weight_decay=0.0, beta1=0.9, beta2=0.999, clip=1.0, clip_by="norm")
"""For VGGSound and AudioSet; for LRS3 the learning rate was half of it."""
PUBLISHED_SCHEDULE = ScheduleConfig(warmup_steps=1000, floor=0.0)
"""The warm-up was 1000 steps over the number of processes, the whole 100 epochs (of which 20 to 30 were taken)."""
PUBLISHED_CLIPS_PER_DEVICE = 2


@dataclass(frozen=True)
class ContrastOptions:
    """What stage I's loss compares, and what is measured beside it."""

    cross_device_negatives: bool = False
    """Compare with the segments of all processes' clips, not only with those of the process's own (as published: own)."""
    window: int = 8
    """Segments in a window of the zero-shot measure; fewer than a clip has. 8 are 5.12 s, about what stage II sees."""
    shown_clips: int = 2
    """Clips of which validation's pictures show how alike their segments are."""

    def __post_init__(self) -> None:
        for name in ("window", "shown_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"contrast.{name}={getattr(self, name)}: expected 1 or more")


# --- the module -----------------------------------------------------------------------------------------------------------------------


class ContrastModule(TrainingModule[Avclip]):
    """Stage I. Takes `train.data.Clips`, whose targets it does not look at."""

    FIGURES: ClassVar[Figures] = Figures(("loss", "shifted_window_accuracy", "temperature"), best="shifted_window_accuracy", larger_is_better=True)
    """In training the accuracy is that of augmented clips, with stochastic depth. Its chance is 1 / (segments - window + 1)."""

    def __init__(
        self,
        options: StepOptions,
        described: Described,
        model: Avclip,
        contrast: ContrastOptions = ContrastOptions(),
        *,
        checkpoint_activations: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__(options, described.identity())
        self.model = model
        self._contrast = contrast
        self._log_mel = LogMel(model.a_encoder.config)
        self._shown: tuple[Tensor, Tensor] | None = None
        if checkpoint_activations:
            checkpoint_blocks(model)
        if compiled:
            for block in blocks(model):
                block.compile(dynamic=False)

    def embed(self, batch: Clips) -> tuple[Float[Tensor, "b segments d"], Float[Tensor, "b segments d"]]:
        """Embeddings of the batch's segments, of pictures and of sound."""
        return self.model.embed(normalise(batch.pixels), self._log_mel(batch.sound))

    def training_step(self, batch: Clips) -> dict[str, Tensor]:
        self.model.clamp_temperature()
        visual, audio = self.embed(batch)
        compared = (gathered(visual), gathered(audio)) if self._contrast.cross_device_negatives else (visual, audio)
        loss = segment_contrast(*compared, self.model.logit_scale).loss
        return {"loss": loss, "figures": self._figures(loss, visual, audio)}

    def on_validation_start(self) -> None:
        self._shown = None

    def validation_step(self, batch: Clips) -> dict[str, Tensor]:
        visual, audio = self.embed(batch)
        if self._shown is None:
            self._shown = visual[: self._contrast.shown_clips], audio[: self._contrast.shown_clips]
        loss = segment_contrast(visual, audio, self.model.logit_scale).loss
        return {"figures": self._figures(loss, visual, audio)}

    def validation_pictures(self) -> dict[str, UInt8[np.ndarray, "height width 3"]]:
        """How alike the segments of the validation's first clips are (`similarities`), by name. Empty before a validation."""
        return {} if self._shown is None else {name: picture(matrix) for name, matrix in similarities(*self._shown).items()}

    @torch.no_grad()
    def _figures(self, loss: Tensor, visual: Tensor, audio: Tensor) -> Float[Tensor, "figures"]:
        accuracy = shifted_windows(visual, audio, window=self._contrast.window).precision.mean()
        return torch.stack([loss.detach(), accuracy, self.model.logit_scale.detach().float()])


# --- what it is made of ---------------------------------------------------------------------------------------------------------------


def gathered(features: Float[Tensor, "b segments d"]) -> Float[Tensor, "all segments d"]:
    """The features of all processes, in their order, as every process has them; alone, its own.

    Gradients go back to where a feature came from. Where every process computes the same loss of it, as here, and gradients are averaged over
    processes, as data parallelism does, the result is the gradient of that loss.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return features
    return torch.cat(all_gather(features.contiguous()))


def blocks(model: Avclip) -> list[nn.Module]:
    """The transformer blocks of both towers; the stand-in for the visual tower has none."""
    visual = list(model.v_encoder.blocks) if isinstance(model.v_encoder, VisualTower) else []
    return [*visual, *model.a_encoder.ast.encoder.layer]


def checkpoint_blocks(model: Avclip) -> None:
    """Keep each block's input alone for the backward pass and compute the rest of it again then, with the same draws: the same gradients with a
    fraction of the memory, for a third more work. Names and tensors stay what they are."""
    for block in blocks(model):
        block.forward = partial(_again, block.forward)


def _again(forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return checkpoint(forward, *inputs, use_reentrant=False) if torch.is_grad_enabled() else forward(*inputs)


def trainable(model: Avclip) -> Avclip:
    """The network with everything to be trained, as it is not when it was loaded; less what only the published files need."""
    model.requires_grad_(True).train()
    for module in model.modules():
        if isinstance(module, UnusedPatchEmbed):
            module.requires_grad_(False)
    return model


def forward_flops(model: Avclip, segments: int) -> int:
    """Floating point operations of both towers for a clip of `segments` segments, in matrix products and convolutions; counted, with no tensor's
    value computed."""
    with torch.device("meta"):
        copy = Avclip(new_tower(tower_config(model.v_encoder), source="a copy"), new_audio_tower(audio_config(model.a_encoder), source="a copy"))
        visual, audio = copy.v_encoder.config, copy.a_encoder.config
        pixels = torch.empty(1, 1, 3, SEGMENT_FRAMES, visual.image_size, visual.image_size)
        spectrograms = torch.empty(1, 1, audio.mels, audio.frames)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.eval().embed(pixels, spectrograms)
    return segments * counter.get_total_flops()


# --- pictures -------------------------------------------------------------------------------------------------------------------------


def similarities(visual: Float[Tensor, "b segments d"], audio: Float[Tensor, "b segments d"]) -> dict[str, Float[Tensor, "rows rows"]]:
    """Cosines between all segments of the clips: rows first, columns second in the name."""
    v, a = (nn.functional.normalize(x.detach().float().flatten(0, 1), dim=-1) for x in (visual, audio))
    return {"visual_visual": v @ v.T, "audio_audio": a @ a.T, "visual_audio": v @ a.T, "audio_visual": a @ v.T}


def picture(matrix: Float[Tensor, "rows columns"], *, pixels: int = 8) -> UInt8[np.ndarray, "height width 3"]:
    """A matrix in colours, each row from its smallest (dark blue) to its largest number (yellow), for rows differ in level."""
    low, high = matrix.amin(1, keepdim=True), matrix.amax(1, keepdim=True)
    place = ((matrix - low) / (high - low).clamp(min=1e-9) * (len(COLOURS) - 1)).cpu().numpy()
    channels = [np.interp(place, range(len(COLOURS)), [colour[c] for colour in COLOURS]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8).repeat(pixels, axis=0).repeat(pixels, axis=1)
