"""`soundshard train`: feature shards -> a run folder with a V-AURA decoder. The recipe's options, the Lightning module, and the job.

Knows features and codes only: no video and no tower; what the dataset records of them goes into the run folder as it is. The codec is opened for two
things alone, the embeddings' start and previews (`train.codec`).
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule

from configs import storage
from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES, SEGMENT_TOKENS, CodecClock
from configs.load import job_main, to_plain
from model.run_folder import RunConfig, weights_references
from model.vaura import Vaura, VauraConfig, forward_flops
from shards.read import Index
from shards.stream import check_alike
from train.averages import Averages, EmaConfig
from train.callbacks import Cadence, Checkpoints, Metrics, Stopped
from train.codec import Embeddings, find_codec, start_embeddings
from train.data import FeatureData, StreamOptions, Windows
from train.optim import OptimiserConfig, ScheduleConfig, build_optimiser, clip_gradients
from train.previews import PreviewConfig, Previews
from train.sharding import ShardedStrategy, shard
from train.trainer import TrainerConfig, build_trainer, find_start, identity, is_first, quieten_lightning, say


@dataclass(frozen=True)
class ModelOptions(VauraConfig):
    """The decoder's sizes. What the dataset decides is taken from it (0); a value given for it must agree."""

    feature_width: int = 0
    """Channels of the video features; 0: the dataset's."""
    codebooks: int = 0
    """The codec's codebooks; 0: the dataset's."""
    card: int = 0
    """Codes per codebook; 0: the dataset's."""
    steps_per_token: int = 0
    """Codec steps that see the same video token, over `steps_per_token_divisor`; 0: the codec's clock (EnCodec 24 kHz 6 / 1, DAC 441 / 64)."""
    steps_per_token_divisor: int = 0
    """See `steps_per_token`; 0: the codec's clock."""
    window_tokens: int = 0
    """Video tokens of a training window; 0: 8 for each of stream.segments."""
    max_steps: int = 0
    """The longest sequence, in positions; 0: 256, or what a window needs if that is more."""

    def __post_init__(self) -> None:
        """Nothing: sizes are checked once those of the dataset are in."""


@dataclass(frozen=True)
class TrainConfig:
    """Options of `soundshard train`. The defaults are the published recipe (Viertola et al. 2024, sec. 4.2, and its configuration files)."""

    data: Any = "???"
    """Folder or address of the feature dataset; several, to mix: [first,second], and stream.weights=[3,1] says how much of each."""
    out: str = "???"
    """The run folder: checkpoints, weights, losses and the configuration."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str | None = "validation"
    """Split to validate on, if the dataset has it; null: none."""
    model: ModelOptions = field(default_factory=ModelOptions)
    stream: StreamOptions = field(default_factory=StreamOptions)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    embeddings: Embeddings = "auto"
    """What the codes' embeddings begin with. codec: the codec's own codebooks (as published), from the weights file that the dataset was made with;
    random: normal numbers; auto: the codec's if that file is here."""
    seed: int = 0
    """Decides the initial weights, dropout and guidance dropout. The order of samples has its own, stream.seed."""
    copy_weights: bool = True
    """Copy the tower's and the codec's weights files into the run folder, if they are here, so that generation needs nothing else."""

    @property
    def roots(self) -> list[str]:
        """The datasets."""
        return [str(root) for root in (self.data if isinstance(self.data, list) else [self.data])]


def run(config: TrainConfig) -> Path:
    """Train a V-AURA decoder on feature shards. Run the same command again to go on after an interruption."""
    config.schedule.check(config.trainer.max_steps)
    folder = storage.only_local(config.out, option="out")
    train = [Index.open(root, config.train_split, kind="features") for root in config.roots]
    check_alike(train)
    validation = open_validation(config)
    info, spec = train[0].info, train[0].info.spec
    described = RunConfig(
        model=derive_model(config.model, spec, config.stream.segments),
        window_segments=config.stream.segments,
        data={"fingerprint": info.fingerprint, "spec": spec},
        # Resolved, so that a run that goes on to more steps does not silently stretch its schedule.
        train=to_plain(replace(config, schedule=replace(config.schedule, total_steps=config.schedule.total_steps or config.trainer.max_steps))),
        weights=weights_references(info.provenance),
    )
    start = find_start(folder, described, config.trainer)
    if start.step >= config.trainer.max_steps:
        say(f"{folder} is finished: step {start.step} of trainer.max_steps={config.trainer.max_steps}; a larger trainer.max_steps goes on")
        return folder
    torch.set_float32_matmul_precision("high")
    quieten_lightning()
    module = VauraModule(described, config)
    begin = start_embeddings(module.model, config.embeddings, folder, described) if start.checkpoint is None else f"resumes at step {start.step}"
    cadence = config.trainer.cadence(validates=bool(validation))
    window_steps, tokens = described.codec_clock.steps_in(config.stream.segments), described.model.window_tokens
    metrics = Metrics(
        folder,
        cadence,
        batch_size=config.stream.batch_size,
        sample_flops=3 * forward_flops(described.model, window_steps + described.model.codebooks - 1, tokens),
        codebooks=described.model.codebooks,
        start_step=start.step,
        bar=config.trainer.progress,
    )
    averages = Averages(config.ema)
    previews = build_previews(config, folder, described, validation, averages, cadence, metrics)
    checkpoints = Checkpoints(folder, cadence, metrics, averages, described, copy_weights=config.copy_weights)
    # In this order: validation's weights are put back, its loss is known, its clips are made, and then it is saved.
    callbacks = [averages, metrics, *previews, checkpoints]
    trainer = build_trainer(config.trainer, folder, callbacks, start_step=start.step, validates=cadence.validate_every > 0)
    data = FeatureData(train, validation, config.stream, accumulate=config.trainer.accumulate)
    say(describe(config, described, train, validation, module, begin))
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint, weights_only=True)
    except Stopped:
        # The first process alone reports it; Lightning would take another's status for a crash and kill the rest.
        if is_first():
            raise KeyboardInterrupt from None
    else:
        best = f", smallest validation loss {metrics.best:.4f}" if math.isfinite(metrics.best) else ""
        say(f"{folder} is finished: step {config.trainer.max_steps}{best}; `soundshard generate run={folder}` uses it")
    return folder


def build_previews(
    config: TrainConfig,
    folder: Path,
    described: RunConfig,
    validation: list[Index],
    averages: Averages,
    cadence: Cadence,
    metrics: Metrics,
) -> list[Previews]:
    """What generates clips at validation, if it is asked for. ValueError where it cannot."""
    if config.preview.clips == 0:
        return []
    codec, why = find_codec(folder, described)
    if not validation:
        raise ValueError(f"preview.clips={config.preview.clips}: clips are generated at validation, and there is none: give preview.clips=0")
    if codec is None:
        raise ValueError(
            f"preview.clips={config.preview.clips}: the codec's weights are needed to hear what is generated, and {why}; put the file there "
            "(`soundshard weights` fetches published ones), or give preview.clips=0"
        )
    stopwatch = metrics.stopwatch
    return [Previews(folder, config.preview, described, averages, cadence, stopwatch, validation=validation, stream=config.stream, codec=codec)]


def open_validation(config: TrainConfig) -> list[Index]:
    """The validation split of each dataset that has it."""
    if config.validation_split is None or config.trainer.val_check_interval == 0:
        return []
    splits = {root: Index.open(root, kind="features").table["split"].unique().to_pylist() for root in config.roots}
    return [Index.open(root, config.validation_split) for root in config.roots if config.validation_split in splits[root]]


def derive_model(options: ModelOptions, spec: dict[str, Any], segments: int) -> VauraConfig:
    """The decoder's configuration: the options, and what the dataset's spec decides. Raises ValueError where an option contradicts the dataset."""
    codec = spec["codec"]
    clock = CodecClock(codec["sample_rate_hz"], codec["hop_samples"])
    steps_per_token = clock.rate * SEGMENT_FRAMES / SEGMENT_TOKENS / FRAME_RATE_HZ
    derived = {
        "feature_width": spec["tower"]["config"]["width"],
        "codebooks": codec["codebooks"],
        "card": codec["card"],
        "steps_per_token": steps_per_token.numerator,
        "steps_per_token_divisor": steps_per_token.denominator,
        "window_tokens": segments * SEGMENT_TOKENS,
    }
    given = {f.name: getattr(options, f.name) for f in fields(VauraConfig)}
    conflicts = [f"model.{name}={given[name]}, the dataset has {value}" for name, value in derived.items() if given[name] not in (0, value)]
    # Generation's last window reaches from the step nearest to its start to the one that covers its end: up to two more, where steps do not fit.
    positions = clock.steps_in(segments) + codec["codebooks"] + (0 if steps_per_token.denominator == 1 else 2)
    if 0 < options.max_steps < positions:
        conflicts.append(f"model.max_steps={options.max_steps}, a window takes {positions} positions")
    if conflicts:
        raise ValueError(f"{'; '.join(conflicts)}: leave these options out (or 0), or train on another dataset or with another stream.segments")
    return VauraConfig(**{**given, **derived, "max_steps": options.max_steps or max(VauraConfig.max_steps, positions)})


class VauraModule(LightningModule):
    """One training step. Rates follow from the step's number and draws from (seed, step, rank), so nothing but tensors needs saving."""

    def __init__(self, described: RunConfig, config: TrainConfig) -> None:
        super().__init__()
        self._described, self._config = described, config
        torch.manual_seed(config.seed)
        self.model = Vaura(described.model)
        self._fused = config.trainer.resolved_precision != "16-mixed"
        self.model.checkpoint_activations = config.trainer.checkpoint_activations
        if config.trainer.compile:
            # Blocks are alike, so that one is compiled and serves for all: it takes no longer for more layers, as the whole at once would.
            for layer in self.model.layers:
                layer.compile(dynamic=False)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ShardedStrategy):
            shard(self.model, self.trainer.strategy.device_mesh, entry="training_loss")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimiser(self.model.parameters(), self._config.optimiser, fused=self._fused)

    def on_train_start(self) -> None:
        """Options win over what a checkpoint brought: resuming with another weight decay means it."""
        fresh = build_optimiser(self.model.parameters(), self._config.optimiser, fused=self._fused)
        for group, given in zip(self.trainer.optimizers[0].param_groups, fresh.param_groups, strict=True):
            group.update({name: value for name, value in given.items() if name != "params"})

    def on_train_batch_start(self, batch: Windows, batch_idx: int) -> None:  # noqa: ARG002
        trainer, config = self.trainer, self._config
        part = batch_idx % config.trainer.accumulate
        words = np.random.SeedSequence([config.seed, trainer.global_step, part, trainer.global_rank]).generate_state(1, np.uint64)
        # torch.manual_seed notes a stack trace for every kind of device that is not there: a hundred times as long.
        torch.default_generator.manual_seed(int(words[0]))
        if self.device.type == "cuda":
            torch.cuda.manual_seed(int(words[0]))
        if part == 0:
            rate = config.optimiser.learning_rate * config.schedule.factor(trainer.global_step, config.trainer.max_steps)
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = rate

    def _inputs(self, batch: Windows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What the loss is computed from. The video tokens are in the precision of the parameters."""
        tokens = batch.features.flatten(1, 2).to(self.model.norm.weight.dtype)
        there = None if batch.segment_mask is None else batch.segment_mask.repeat_interleave(SEGMENT_TOKENS, dim=1)
        return batch.codes, tokens, there, batch.step_mask

    def training_step(self, batch: Windows) -> dict[str, torch.Tensor]:
        loss = self.model.training_loss(*self._inputs(batch))
        return {"loss": loss.total, "per_codebook": loss.per_codebook.detach()}

    def validation_step(self, batch: Windows) -> dict[str, torch.Tensor]:
        return {"per_codebook": self.model.training_loss(*self._inputs(batch)).per_codebook}

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:  # noqa: ARG002 - Lightning's
        """Here and not by Lightning's option, which refuses fused optimisers although they clip well without a gradient scaler."""
        clip_gradients([p for group in optimizer.param_groups for p in group["params"]], self._config.optimiser)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["identity"] = identity(self._described)


def describe(config: TrainConfig, described: RunConfig, train: list[Index], validation: list[Index], module: VauraModule, begin: str) -> str:
    """What is about to happen, in a few lines."""
    model = described.model
    parameters = sum(p.numel() for p in module.model.parameters())
    return "\n".join(
        [
            f"data   {', '.join(config.roots)}: {' + '.join(str(index.ok) for index in train)} training clips, "
            f"{' + '.join(str(index.ok) for index in validation) or 'no'} validation clips",
            f"model  {model.layers} layers of width {model.width}, {model.codebooks} codebooks of {model.card}: {parameters / 1e6:.1f} M parameters",
            f"start  {begin}",
            f"run    {config.out} to step {config.trainer.max_steps}; {config.trainer.resolved_precision}, batches of {config.stream.batch_size}",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`soundshard train`, `python -m train.vaura`."""
    return job_main(TrainConfig, run, argv, command="train")


if __name__ == "__main__":
    sys.exit(main())
