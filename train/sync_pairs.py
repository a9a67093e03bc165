"""Synchformer's stages II and III: what is above the towers, fitted to the offset between sound and pictures, then to whether there is one at all
(Iashin et al. 2024, sec. 3.2, 3.4 and 4.1).

The towers stay as they are. Their features come from feature shards, or (parity with the published way) media shards are decoded and the towers run
in every step.

Knows Lightning, streams and networks. Knows no media: what decodes them is handed over (`configs.parts`).
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import storage
from configs.parts import listed_offsets, media_decoder
from model.motion_tower import MotionTower
from model.segments import OFFSET, SYNCHRONISABLE, SegmentGrid
from model.sync_metrics import auc_roc, hits
from model.sync_run import TOWERS, SyncFiles, SyncRun, read_config
from model.sync_start import scale_answers, start_aligned
from model.synchformer import Head, SyncConfig, SyncModule, load_sync_module, synchformer_file
from model.synchformer_audio import AudioTower, AudioTowerConfig, LogMel, audio_config, load_audio_tower
from model.synchformer_visual import VisualTower, load_tower, normalise, tower_config
from model.weights import resolve, sha256_file
from shards.clips import ClipConfig, ClipStream
from shards.pairs import PairConfig, PairStream
from shards.read import Index
from train.augment import PAIR_AUGMENT, AugmentOptions
from train.callbacks import Figures
from train.clips import PairClip
from train.data import Clips, Pairs, StreamData, share_of
from train.fit import prepare_fit
from train.module import StepOptions, TrainingModule
from train.optim import OptimiserConfig, ScheduleConfig
from train.pairs import DrawPair, ListedPair, StoredGrid
from train.sync_job import GPUS, SyncJob, describe, is_finished, open_splits, resolved
from train.trainer import TrainerConfig, find_start, say, step_options

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# --- options --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleOptions:
    """What is above the towers. Where `init` gives weights, it is as large as there."""

    width: int = 768
    """Features inside the transformer."""
    depth: int = 3
    """Transformer layers."""
    heads: int = 8
    """Attention heads."""
    mlp_ratio: int = 4
    """Hidden features of an MLP, in widths."""
    dropout: float = 0.1
    """While training: of the embeddings, of attention weights and of what is added to the residual."""


@dataclass(frozen=True)
class PairCutOptions:
    """What of a clip is compared. The published lengths; shorter clips need shorter ones."""

    seconds: float = OFFSET.crop_seconds
    """Length of the cut, in which the segments lie in the middle. In stage 3 also the offset of what cannot be synchronised."""
    segments: int = OFFSET.segments
    """Segments of 0.64 s, which overlap by half."""
    jitter_seconds: float = 0.05
    """The sound is up to so much off, beyond the offset, while training. From feature shards: to the nearest stored segment."""

    @property
    def grid(self) -> SegmentGrid:
        """Where the segments lie."""
        grid = SegmentGrid(self.seconds, self.segments, OFFSET.hop_frames)
        if grid.span_frames > grid.crop_frames:
            raise ValueError(f"cut.segments={self.segments} take {grid.span_frames / 25:.2f} s; expected a longer cut.seconds than {self.seconds}")
        return grid


@dataclass(frozen=True)
class PairStreamOptions(ClipConfig):
    """Which examples make a step's batch, and how they are read. The published batch is 16 on each of 32 GPUs."""

    batch_size: int = 16 * GPUS
    """Examples in a step, over all devices and accumulated passes."""
    pin_memory: bool = True
    """Assemble batches in page-locked memory, for faster copies to a GPU. Ignored where there is none."""
    workers: int = 0
    """Processes that prepare examples; media shards want as many as there are processors, feature shards none (0: one background thread)."""
    pairs_per_clip: int = 1
    """From feature shards: examples taken of a clip in an epoch, near each other in the order. With more, remote reading gains."""


@dataclass(frozen=True)
class PairJob(SyncJob):
    """Options of stages 2 and 3. The defaults are stage 2's published recipe."""

    model: ModuleOptions = field(default_factory=ModuleOptions)
    cut: PairCutOptions = field(default_factory=PairCutOptions)
    start: Literal["random", "aligned"] = "random"
    """Weights to begin with where there is no `init`. random: as published; aligned: those of a matched filter, fitted to some clips of the training
    split, with which stage 2 predicts offsets before its first step and learns on from there. From feature shards only."""
    start_clips: int = 256
    """Clips that the aligned start is fitted to."""
    towers: str = "avclip"
    """From media shards: the weights of both towers, a file or a published name. Feature shards say what they were made with."""
    precision_towers: Literal["fp32", "bf16", "fp16"] = "fp32"
    """From media shards: arithmetic of the towers. Published: fp16."""
    augment: AugmentOptions = field(default_factory=lambda: PAIR_AUGMENT)
    """From media shards. What feature shards know of it is in their views."""
    stream: PairStreamOptions = field(default_factory=PairStreamOptions)
    listing: str = ""
    """Where validation cuts, and which offset it takes: a published list of fixed offsets (`path,offset_sec,vstart_sec`). Empty: drawn, always the
    same."""
    iter_times: int = 1
    """How often validation takes each clip, with another draw each time."""
    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(
            learning_rate=2e-6 * GPUS, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-7, clip=1.0, clip_by="norm"
        )
    )
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(shape="constant", warmup_steps=1000, start=0.01))
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(max_steps=100_000))

    def __post_init__(self) -> None:
        if self.stage not in (2, 3):
            raise ValueError(f"stage={self.stage}; expected 1, 2 or 3")
        trainer = self.trainer
        unfit = [
            name
            for name, given in (("strategy=fsdp", trainer.strategy == "fsdp"), ("checkpoint_activations", trainer.checkpoint_activations))
            if given
        ]
        if self.start == "aligned" and (self.stage != 2 or self.init):
            raise ValueError("start=aligned is for stage 2 without init: stage 3 begins with stage 2's weights, and init gives others")
        if unfit:
            raise ValueError(f"trainer.{', trainer.'.join(unfit)}: what stages 2 and 3 train is small and fits every device; leave it out")

    @property
    def head(self) -> Head:
        """What is answered."""
        return "offset" if self.stage == 2 else "synchronisable"


@dataclass(frozen=True)
class SynchronisableJob(PairJob):
    """Options of stage 3."""

    stage: int = 3
    cut: PairCutOptions = field(default_factory=lambda: PairCutOptions(SYNCHRONISABLE.crop_seconds, SYNCHRONISABLE.segments))


# --- a step ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Towers:
    """Both towers, frozen, for examples that come as pixels and sound."""

    visual: VisualTower | MotionTower
    audio: AudioTower
    log_mel: LogMel
    precision: torch.dtype

    @classmethod
    def load(cls, name_or_path: str, precision: torch.dtype) -> "Towers":
        """Both from one file, on the CPU."""
        audio = load_audio_tower(name_or_path)
        return cls(load_tower(name_or_path), audio, LogMel(audio.config), precision)

    def to(self, device: torch.device) -> "Towers":
        return replace(self, visual=self.visual.to(device), audio=self.audio.to(device), log_mel=self.log_mel.to(device))

    @torch.no_grad()
    def __call__(self, clips: Clips) -> Pairs:
        """Features of a batch, as feature shards have them but for the rounding to float16."""
        device = clips.pixels.device.type
        with torch.autocast(device, self.precision, enabled=self.precision != torch.float32):
            return Pairs(self.visual(normalise(clips.pixels)), self.audio(self.log_mel(clips.sound)), clips.target, clips.samples)


class PairModule(TrainingModule[SyncModule]):
    """A step of stage 2 or 3."""

    def __init__(self, options: StepOptions, described: SyncRun, model: SyncModule, towers: Towers | None = None, *, compiled: bool = False) -> None:
        super().__init__(options, described.identity())
        self.model = model
        # In a list, so that Lightning neither saves nor trains them.
        self._towers = [towers] if towers else []
        self._scores: list[Tensor] = []
        if compiled:
            self.model.compile(dynamic=False)

    @staticmethod
    def figures(head: Head) -> Figures:
        """What a step measures; the best weights are those of the highest accuracy (as published: the loss does not go with it)."""
        names = ("loss", "accuracy", "accuracy_within_1") if head == "offset" else ("loss", "accuracy")
        return Figures(names, best="accuracy", larger_is_better=True)

    def on_fit_start(self) -> None:
        self._towers = [towers.to(self.device) for towers in self._towers]

    def _measured(self, batch: Pairs | Clips) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, the loss and the figures."""
        pairs = self._towers[0](batch) if isinstance(batch, Clips) else batch
        logits = self.model(pairs.visual, pairs.audio).float()
        loss = F.cross_entropy(logits, pairs.target)
        seen = logits.detach()
        reaches = (0, 1) if self.model.config.head == "offset" else (0,)
        found = [hits(seen, pairs.target, within=reach).float().mean() for reach in reaches]
        return seen, loss, torch.stack([loss.detach(), *found])

    def training_step(self, batch: Pairs | Clips) -> dict[str, Tensor]:
        _, loss, figures = self._measured(batch)
        return {"loss": loss, "figures": figures}

    def validation_step(self, batch: Pairs | Clips) -> dict[str, Tensor]:
        logits, _, figures = self._measured(batch)
        if self.model.config.head == "synchronisable" and batch.samples:
            self._scores.append(torch.stack([logits.softmax(-1)[:, 1], batch.target.float()]))
        return {"figures": figures}

    def validated(self) -> dict[str, float]:
        """Of all examples of all processes: the area under the curve of what can be synchronised against what cannot."""
        if self.model.config.head == "offset":
            return {}
        mine = torch.cat(self._scores, 1).cpu() if self._scores else torch.empty(2, 0)
        self._scores = []
        parts: list[Any] = [mine]
        if self.trainer.world_size > 1:
            parts = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, mine)
        scores, targets = torch.cat(cast(list[Tensor], parts), 1)
        area = auc_roc(scores, targets > 0.5)
        return {"auc_roc": area} if math.isfinite(area) else {}


def module_flops(config: SyncConfig) -> int:
    """Floating point operations of a forward pass for one example: a multiplication and an addition for each weight that a token meets."""
    d, n = config.width, config.tokens
    inner = 4 * d * d + 2 * config.mlp_ratio * d * d
    towers = config.segments * (config.visual_tokens * config.visual_width + config.audio_tokens * config.audio_width) * d
    # Of the last layer only the first token asks, and goes through the MLP.
    layers = (config.depth - 1) * (n * inner + 2 * n * n * d) + 2 * n * d * d + inner - 2 * d * d + 2 * n * d
    return 2 * (towers + layers + d * config.classes)


# --- the job --------------------------------------------------------------------------------------------------------------------------


def run_pairs(config: PairJob) -> Path:
    """Train Synchformer's stage 2 (offset) or 3 (synchronisability). Run the same command again to go on after an interruption."""
    config.schedule.check(config.trainer.max_steps)
    folder = storage.only_local(config.out, option="out")
    train, validation = open_splits(config)
    kind = train[0].info.kind
    listed = listed_offsets(config.listing) if config.listing else None
    if listed is not None and config.head == "synchronisable":
        raise ValueError(f"listing={config.listing}: a list of offsets says nothing of what cannot be synchronised; leave it out in stage 3")
    grid = config.cut.grid
    if kind == "features":
        towers, weights, shapes = None, stored_towers(train[0]), stored_shapes(train[0])
        opener = feature_openers(config, grid, train, validation, listed)
        of: Callable[..., Any] = Pairs.of
    elif config.start == "aligned":
        raise ValueError(f"start=aligned is fitted to stored features, and {config.roots[0]} is a media dataset; featurise it, or leave start out")
    else:
        towers = Towers.load(config.towers, DTYPES[config.precision_towers])
        reference = {"path": str(resolve(config.towers).resolve()), "sha256": sha256_file(resolve(config.towers))}
        weights, shapes = dict.fromkeys(TOWERS, reference), (tower_config(towers.visual), audio_config(towers.audio))
        opener = media_openers(config, grid, train, validation, listed, towers.visual.config.image_size)
        of = Clips.of
    model, begin = new_module(config, shapes)
    info = train[0].info
    start_from = {"file": config.init, "sha256": begin} if begin else {}
    described = SyncRun(
        cast(Any, config.stage), *shapes, model.config, {"fingerprint": info.fingerprint, "spec": info.spec}, resolved(config), weights, start_from
    )
    start = find_start(folder, described, config.trainer, read=read_config)
    if is_finished(folder, config, start):
        return folder
    fit = prepare_fit(
        folder,
        config.trainer,
        config.ema,
        start,
        PairModule.figures(config.head),
        SyncFiles(folder, described, copies_weights=config.copy_weights),
        validates=bool(validation),
        batch_size=config.stream.batch_size,
        sample_flops=3 * module_flops(model.config),
    )
    module = PairModule(step_options(config), described, model, towers, compiled=config.trainer.compile)
    begins = align(config, model, train) if config.start == "aligned" and start.checkpoint is None else ""
    trained_on = "features" if kind == "features" else f"media, with the towers of {config.towers} in every step"
    say(describe(config, train, validation, model, trained_on, config.stream.batch_size, start.step, begins))
    fit.run(module, StreamData(opener[0], opener[1] if validation else None, of), [])
    best = f", best accuracy {fit.metrics.best:.4f}" if math.isfinite(fit.metrics.best) else ""
    say(f"{folder} is finished: step {config.trainer.max_steps}{best}; `soundshard sync weights={folder}` and `evaluate.sync` use it")
    return folder


def stored_towers(index: Index) -> dict[str, dict[str, Any]]:
    """Where the weights of both towers are that a feature dataset was made with. ValueError for one without the sound's segments."""
    if not index.info.spec.get("audio"):
        raise ValueError(f"{index.root} has no features of the sound's segments; featurise the clips with audio.weights=, or give the media dataset")
    return {name: dict(index.info.provenance["weights"][name]) for name in TOWERS}


def stored_shapes(index: Index) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configurations of both towers, as the dataset has them."""
    spec = index.info.spec
    return dict(spec["tower"]["config"]), dict(spec["audio"]["tower"]["config"])


def new_module(config: PairJob, shapes: tuple[Mapping[str, Any], Mapping[str, Any]]) -> tuple[SyncModule, str]:
    """What is trained, with its first weights; and the sha256 of the file that they are from, if they are from one."""
    torch.manual_seed(config.seed)
    visual, audio = shapes
    audio_tokens = AudioTowerConfig(**{name: value for name, value in audio.items() if name != "kind"}).tokens
    measures = {"visual_width": visual["width"], "audio_tokens": audio_tokens, "audio_width": audio["width"]}
    if not config.init:
        return SyncModule(SyncConfig(config.head, segments=config.cut.segments, **measures, **asdict(config.model))), ""
    model = load_sync_module(config.init, head=config.head, segments=config.cut.segments)
    differing = [
        f"{name} {getattr(model.config, name)} there, {value} in the data" for name, value in measures.items() if getattr(model.config, name) != value
    ]
    if differing:
        raise ValueError(f"init={config.init} is for other towers than those of {', '.join(config.roots)}: {'; '.join(differing)}")
    return model.train(), sha256_file(synchformer_file(config.init))


def align(config: PairJob, model: SyncModule, train: list[Index]) -> str:
    """Gives the module its aligned start, from clips of the training split; what is to be said of it."""
    began = time.perf_counter()
    sample = partial(aligned_sample, config, train)
    visual, audio, _ = sample(in_sync=True)
    start_aligned(model, visual, audio)
    loss = scale_answers(model, *sample(in_sync=False))
    seconds = time.perf_counter() - began
    return f"aligned, fitted to {len(visual)} clips in {seconds:.0f} s: a loss of {loss:.2f} on them before the first step (chance: 3.04)"


def aligned_sample(config: PairJob, train: list[Index], *, in_sync: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Examples of the training split for the aligned start: features in float32, and their classes."""
    stored = stored_grid(config, config.cut.grid, train[0])
    clips = min(config.start_clips, sum(index.ok for index in train))
    stream = replace(pair_stream(config, stored), batch_size=clips, lanes=1, workers=0, pairs_per_clip=1, weights=None)
    batches = iter(PairStream(train, stream, draw=DrawPair(stored, in_sync=in_sync)))
    batch = next(batches)
    batches.close()
    return batch["visual"].float(), batch["audio"].float(), batch["target"]


Openers = tuple[Callable[[int, int], Any], Callable[[int, int], Any]]
Listed = Mapping[str, tuple[float, float]]


def stored_grid(config: PairJob, grid: SegmentGrid, index: Index) -> StoredGrid:
    """Where the segments lie in what the dataset stores. ValueError where they are not stored."""
    spec = index.info.spec
    return StoredGrid(grid, config.head, spec["hop_frames"], spec["audio"]["hop_samples"])


def pair_stream(config: PairJob, stored: StoredGrid) -> PairConfig:
    """How examples are read from feature shards."""
    options = {name: getattr(config.stream, name) for name in PairConfig.__dataclass_fields__ if hasattr(config.stream, name)}
    places = {"segments": stored.grid.segments, "visual_stride": stored.visual_stride, "audio_stride": stored.audio_stride}
    return PairConfig(**{**options, **places, "least_visual": stored.least_visual, "least_audio": stored.least_audio})


def feature_openers(config: PairJob, grid: SegmentGrid, train: list[Index], validation: list[Index], listed: Listed | None) -> Openers:
    """Streams of stored features: for training and for validation."""
    stored = stored_grid(config, grid, train[0])
    stream = pair_stream(config, stored)
    share = share_of(stream, config.trainer.accumulate)
    watched = replace(share, weights=None, pairs_per_clip=1, **({"least_visual": 0, "least_audio": 0} if listed is not None else {}))
    draws = ListedPair(stored, listed) if listed is not None else DrawPair(stored)
    repeats = 1 if listed is not None else config.iter_times
    return (
        partial(PairStream, train, share, draw=DrawPair(stored, config.cut.jitter_seconds)),
        partial(PairStream, validation, watched, draw=draws, shuffle=False, repeats=repeats),
    )


def media_openers(config: PairJob, grid: SegmentGrid, train: list[Index], validation: list[Index], listed: Listed | None, size: int) -> Openers:
    """Streams of clips that are decoded: for training and for validation."""
    decode = media_decoder()
    drawn = PairClip(decode, grid, config.head, None, config.augment, size, config.cut.jitter_seconds)
    watching = replace(drawn, augment=None, fixed=listed)
    options = {name: getattr(config.stream, name) for name in ClipConfig.__dataclass_fields__}
    share = share_of(ClipConfig(**{**options, "least_seconds": drawn.least_seconds}), config.trainer.accumulate)
    watched = replace(share, weights=None, **({"least_seconds": 0.0} if listed is not None else {}))
    repeats = 1 if listed is not None else config.iter_times
    return (
        partial(ClipStream, train, share, prepare=drawn),
        partial(ClipStream, validation, watched, prepare=watching, shuffle=False, repeats=repeats),
    )
