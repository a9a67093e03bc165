"""`soundshard train`: feature shards -> a run folder with a V-AURA decoder. The recipe's options, the Lightning module, and the job.

Knows features and codes only: no video and no tower; what the dataset records of them goes into the run folder as it is. The codec is opened for two
things alone, the embeddings' start and previews (`train.codec`).
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from configs import storage
from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES, SEGMENT_TOKENS, CodecClock
from configs.load import job_main, to_plain
from model.run_folder import RunConfig, copy_weights, read_config, weights_references, write_config, write_state
from model.vaura import Vaura, VauraConfig, forward_flops
from shards.read import Index
from shards.samples import check_alike
from train.averages import EmaConfig
from train.callbacks import Figures
from train.codec import Embeddings, find_codec, start_embeddings
from train.data import StreamOptions, Windows, feature_data
from train.fit import Fit, prepare_fit
from train.module import TrainingModule
from train.optim import OptimiserConfig, ScheduleConfig
from train.previews import PreviewConfig, Previews
from train.sharding import ShardedStrategy, shard
from train.trainer import TrainerConfig, find_start, say, step_options


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
    start = find_start(folder, described, config.trainer, read=read_config)
    if start.step >= config.trainer.max_steps:
        say(f"{folder} is finished: step {start.step} of trainer.max_steps={config.trainer.max_steps}; a larger trainer.max_steps goes on")
        return folder
    window_steps, tokens = described.codec_clock.steps_in(config.stream.segments), described.model.window_tokens
    fit = prepare_fit(
        folder,
        config.trainer,
        config.ema,
        start,
        Figures(tuple(f"loss_codebook_{k}" for k in range(described.model.codebooks)), parts="per_codebook"),
        VauraFiles(folder, described, copies_weights=config.copy_weights),
        validates=bool(validation),
        batch_size=config.stream.batch_size,
        sample_flops=3 * forward_flops(described.model, window_steps + described.model.codebooks - 1, tokens),
    )
    module = VauraModule(described, config)
    begin = start_embeddings(module.model, config.embeddings, folder, described) if start.checkpoint is None else f"resumes at step {start.step}"
    previews = build_previews(config, folder, described, validation, fit)
    data = feature_data(train, validation, config.stream, accumulate=config.trainer.accumulate)
    say(describe(config, described, train, validation, module, begin))
    fit.run(module, data, [*previews])
    best = f", smallest validation loss {fit.metrics.best:.4f}" if math.isfinite(fit.metrics.best) else ""
    say(f"{folder} is finished: step {config.trainer.max_steps}{best}; `soundshard generate run={folder}` uses it")
    return folder


def build_previews(config: TrainConfig, folder: Path, described: RunConfig, validation: list[Index], fit: Fit) -> list[Previews]:
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
    watch = fit.metrics.stopwatch
    return [Previews(folder, config.preview, described, fit.averages, fit.cadence, watch, validation=validation, stream=config.stream, codec=codec)]


def open_validation(config: TrainConfig) -> list[Index]:
    """The validation split of each dataset that has it."""
    if config.validation_split is None or config.trainer.val_check_interval == 0:
        return []
    splits = {root: Index.open(root, kind="features").table["split"].unique().to_pylist() for root in config.roots}
    return [Index.open(root, config.validation_split) for root in config.roots if config.validation_split in splits[root]]


def derive_model(options: ModelOptions, spec: dict[str, Any], segments: int) -> VauraConfig:
    """The decoder's configuration: the options, and what the dataset's spec decides. Raises ValueError where an option contradicts the dataset."""
    codec = spec["codec"]
    if codec is None:
        raise ValueError("the dataset holds features without codec tokens (codec.name=none); V-AURA learns tokens: featurise the clips with a codec")
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


class VauraModule(TrainingModule[Vaura]):
    """One training step of the decoder."""

    def __init__(self, described: RunConfig, config: TrainConfig) -> None:
        super().__init__(step_options(config), described.identity())
        torch.manual_seed(config.seed)
        self.model = Vaura(described.model)
        self.model.checkpoint_activations = config.trainer.checkpoint_activations
        if config.trainer.compile:
            # Blocks are alike, so that one is compiled and serves for all: it takes no longer for more layers, as the whole at once would.
            for layer in self.model.layers:
                layer.compile(dynamic=False)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ShardedStrategy):
            shard(self.model, self.trainer.strategy.device_mesh, entry="training_loss")

    def _inputs(self, batch: Windows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What the loss is computed from. The video tokens are in the precision of the parameters."""
        tokens = batch.features.flatten(1, 2).to(self.model.norm.weight.dtype)
        there = None if batch.segment_mask is None else batch.segment_mask.repeat_interleave(SEGMENT_TOKENS, dim=1)
        return batch.codes, tokens, there, batch.step_mask

    def training_step(self, batch: Windows) -> dict[str, torch.Tensor]:
        loss = self.model.training_loss(*self._inputs(batch))
        return {"loss": loss.total, "figures": loss.per_codebook.detach()}

    def validation_step(self, batch: Windows) -> dict[str, torch.Tensor]:
        return {"figures": self.model.training_loss(*self._inputs(batch)).per_codebook}


class VauraFiles:
    """What the run folder gets beside checkpoints: `config.yaml`, the networks' weights, and the decoder's."""

    def __init__(self, folder: Path, described: RunConfig, *, copies_weights: bool) -> None:
        self._folder, self._described, self._copies_weights = folder, described, copies_weights

    def begin(self) -> list[str]:
        described, problems = copy_weights(self._folder, self._described) if self._copies_weights else (self._described, [])
        write_config(self._folder, described)
        return problems

    def write(self, state: Mapping[str, torch.Tensor], name: str) -> None:
        write_state(self._folder, state, self._described.model, name=name)


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
