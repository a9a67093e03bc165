"""Synchformer's stage I as a job: both towers, fitted to each other on clips that are decoded and augmented in the loader's processes (Iashin et al.
2024, sec. 3.1 and 4.1). The step itself is `train.contrast`.

Knows Lightning, streams and networks. Knows no media: what decodes them is handed over (`configs.parts`).
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from configs import storage
from configs.parts import media_decoder
from model.avclip import Avclip, load_avclip
from model.motion_tower import MotionTower, MotionTowerConfig
from model.segments import CONTRAST, SegmentGrid
from model.sync_run import SyncFiles, SyncRun, read_config
from model.synchformer_audio import AudioTower, AudioTowerConfig, audio_config
from model.synchformer_visual import VisualTower, VisualTowerConfig, tower_config
from model.weights import resolve, sha256_file
from shards.clips import ClipConfig, ClipStream
from train.augment import CONTRAST_AUGMENT, AugmentOptions
from train.clips import ContrastClip
from train.contrast import (
    PUBLISHED_CLIPS_PER_DEVICE,
    PUBLISHED_OPTIMISER,
    PUBLISHED_SCHEDULE,
    ContrastModule,
    ContrastOptions,
    forward_flops,
    trainable,
)
from train.data import Clips, StreamData, share_of
from train.fit import prepare_fit
from train.optim import OptimiserConfig, ScheduleConfig
from train.sync_job import GPUS, SyncJob, describe, is_finished, open_splits, resolved
from train.trainer import TrainerConfig, find_start, say, step_options


@dataclass(frozen=True)
class TowersOptions:
    """The towers' sizes, by default the published ones. Where `init` gives weights, they are as large as there."""

    visual: Literal["motionformer", "motion"] = "motionformer"
    """motionformer: the published visual tower; motion: the small convolutional stand-in, which learns from few clips in minutes."""
    motionformer: VisualTowerConfig = field(default_factory=VisualTowerConfig)
    motion: MotionTowerConfig = field(default_factory=MotionTowerConfig)
    audio: AudioTowerConfig = field(default_factory=AudioTowerConfig)

    def new(self) -> Avclip:
        """Both towers with random weights."""
        visual = VisualTower(self.motionformer) if self.visual == "motionformer" else MotionTower(self.motion)
        return Avclip(visual, AudioTower(self.audio))


@dataclass(frozen=True)
class ContrastCutOptions:
    """What of a clip is compared."""

    segments: int = CONTRAST.segments
    """Segments of 0.64 s, which touch: 14 are 8.96 s. Shorter clips are left out."""
    jitter_seconds: float = 0.05
    """The sound is up to so much off while training."""
    longest_seconds: float = CONTRAST.crop_seconds
    """What is beyond is not looked at."""

    @property
    def grid(self) -> SegmentGrid:
        """Where the segments lie."""
        return SegmentGrid(self.longest_seconds, self.segments, CONTRAST.hop_frames)


@dataclass(frozen=True)
class ClipStreamOptions(ClipConfig):
    """Which clips make a step's batch, and how they are read and prepared. The published batch is 2 on each of 32 devices."""

    batch_size: int = PUBLISHED_CLIPS_PER_DEVICE * GPUS
    """Clips in a step, over all devices and accumulated passes."""
    workers: int = 8
    """Processes that decode and augment clips, for each device; 0: one background thread."""
    pin_memory: bool = True
    """Assemble batches in page-locked memory, for faster copies to a GPU. Ignored where there is none."""


@dataclass(frozen=True)
class ContrastJob(SyncJob):
    """Options of stage 1. The defaults are the published recipe for VGGSound and AudioSet."""

    stage: int = 1
    model: TowersOptions = field(default_factory=TowersOptions)
    cut: ContrastCutOptions = field(default_factory=ContrastCutOptions)
    augment: AugmentOptions = field(default_factory=lambda: CONTRAST_AUGMENT)
    contrast: ContrastOptions = field(default_factory=ContrastOptions)
    stream: ClipStreamOptions = field(default_factory=ClipStreamOptions)
    optimiser: OptimiserConfig = field(default_factory=lambda: PUBLISHED_OPTIMISER)
    schedule: ScheduleConfig = field(default_factory=lambda: PUBLISHED_SCHEDULE)
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(max_steps=50_000))

    def __post_init__(self) -> None:
        if self.stage != 1:
            raise ValueError(f"stage={self.stage}; expected 1, 2 or 3")
        if self.trainer.strategy == "fsdp":
            raise ValueError(
                "trainer.strategy=fsdp: the towers fit every device; take ddp, and trainer.checkpoint_activations=true where memory is short"
            )
        if not 1 <= self.contrast.window < self.cut.segments:
            raise ValueError(f"contrast.window={self.contrast.window}: expected at least 1 and fewer than cut.segments={self.cut.segments}")


class Pictures(Callback):
    """Puts what a module draws at validation into TensorBoard."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logger = trainer.logger
        if trainer.is_global_zero and isinstance(logger, TensorBoardLogger):
            for name, picture in cast(ContrastModule, pl_module).validation_pictures().items():
                logger.experiment.add_image(f"similarity/{name}", picture, trainer.global_step, dataformats="HWC")


def run_contrast(config: ContrastJob) -> Path:
    """Train Synchformer's stage 1: both towers, on which segments belong together. Run the same command again to go on after an interruption."""
    config.schedule.check(config.trainer.max_steps)
    folder = storage.only_local(config.out, option="out")
    train, validation = open_splits(config, kind="media")
    torch.manual_seed(config.seed)
    model = trainable(load_avclip(config.init) if config.init else config.model.new())
    info = train[0].info
    described = SyncRun(
        1,
        tower_config(model.v_encoder),
        audio_config(model.a_encoder),
        None,
        {"fingerprint": info.fingerprint, "spec": info.spec},
        resolved(config),
        start={"file": config.init, "sha256": sha256_file(resolve(config.init))} if config.init else {},
    )
    start = find_start(folder, described, config.trainer, read=read_config)
    if is_finished(folder, config, start):
        return folder
    fit = prepare_fit(
        folder,
        config.trainer,
        config.ema,
        start,
        ContrastModule.FIGURES,
        SyncFiles(folder, described, copies_weights=False),
        validates=bool(validation),
        batch_size=config.stream.batch_size,
        sample_flops=3 * forward_flops(model, config.cut.segments),
    )
    again, compiled = config.trainer.checkpoint_activations, config.trainer.compile
    module = ContrastModule(step_options(config), described, model, config.contrast, checkpoint_activations=again, compiled=compiled)
    cut, size = config.cut, model.v_encoder.config.image_size
    prepare = ContrastClip(media_decoder(), cut.grid, config.augment, size, cut.jitter_seconds, cut.longest_seconds)
    options = {name: getattr(config.stream, name) for name in ClipConfig.__dataclass_fields__}
    share = share_of(ClipConfig(**{**options, "least_seconds": cut.grid.span_frames / 25}), config.trainer.accumulate)
    opened = partial(ClipStream, train, share, prepare=prepare)
    watched = partial(ClipStream, validation, replace(share, weights=None), prepare=replace(prepare, augment=None), shuffle=False)
    say(describe(config, train, validation, model, "decoded in the loader's processes", config.stream.batch_size, start.step))
    fit.run(module, StreamData(opened, watched if validation else None, Clips.of), [Pictures()])
    best = f", best shifted-window accuracy {fit.metrics.best:.4f}" if math.isfinite(fit.metrics.best) else ""
    weights = folder / ("best.safetensors" if (folder / "best.safetensors").exists() else "model.safetensors")
    say(
        f"{folder} is finished: step {config.trainer.max_steps}{best}; `soundshard featurise tower.weights={weights} audio.weights={weights}` uses it"
    )
    return folder
