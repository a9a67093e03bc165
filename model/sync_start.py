"""A start for Synchformer's stage II from which it learns at once: the weights of a matched filter.

From random weights the sync transformer answers by chance for a long while (the authors tell of some 4,000 steps' worth of clips before anything
improves), because nothing pulls it towards comparing sound with pictures a given time away. Here the first layers' heads do that from the start:

- Contents: the directions in which the towers' tokens of the same instant vary together within a clip (canonical correlation analysis), from a
  sample of stored features, are what `vproj` and `aproj` let through.
- Positions: sines and cosines of each token's instant. A head's query and key are turned against each other, so that sound at t attends to pictures
  at t + o; every head of every layer but the last has an o of its own.
- MLPs: for each head the product of both contents, from differences of GELUs; summed, it is how well the clip fits at that offset.
- The last layer's first token averages that over the sound; the head interpolates between the heads' offsets.

All of it are ordinary parameters, trained on like any. This is ours and not in the paper. Knows tensors and the network only.
"""

from dataclasses import dataclass
from math import log10, pi, sqrt
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from configs.clock import FRAME_RATE_HZ
from model.segments import OFFSET, offset_grid
from model.synchformer import Block, SyncConfig, SyncModule

POSITION_PAIRS = 16
"""Sines and cosines that tell a token's instant."""
PERIODS_SECONDS = (0.45, 6.0)
CONTENTS = 4
"""Directions in which tokens are compared."""
RIDGE = 1e-2
"""Of the largest variance, added to all before whitening."""
NORM = 0.85
"""What tokens are about as large as, in the root mean square of their features: then the norms in front of the layers hardly change them."""
PEAK = 10.0
"""The logit of a head for the instant that it looks for, over that of any other."""


@dataclass(frozen=True)
class Shared:
    """Directions of both kinds of tokens that vary together."""

    visual: Float[Tensor, "visual_width contents"]
    audio: Float[Tensor, "audio_width contents"]
    strength: Float[Tensor, "contents"]
    """Their correlations, in [0, 1], falling."""
    visual_mean: Float[Tensor, "contents"]
    audio_mean: Float[Tensor, "contents"]


def visual_seconds(config: SyncConfig) -> Float[Tensor, "tokens"]:
    """The middle of every visual token of a cut, from its first segment's start."""
    within = (torch.arange(config.visual_tokens) + 0.5) * 16 / config.visual_tokens / FRAME_RATE_HZ
    return (_segment_seconds(config)[:, None] + within).flatten()


def audio_seconds(config: SyncConfig) -> Float[Tensor, "tokens"]:
    """The same for audio tokens: patches of 0.16 s whose middles lie from 0.08 to 0.58 s."""
    within = torch.linspace(0.08, 0.58, config.audio_tokens)
    return (_segment_seconds(config)[:, None] + within).flatten()


def _segment_seconds(config: SyncConfig) -> Float[Tensor, "segments"]:
    return torch.arange(config.segments) * OFFSET.hop_frames / FRAME_RATE_HZ


def shared_directions(
    visual: Float[Tensor, "clips segments v visual_width"], audio: Float[Tensor, "clips segments a audio_width"], config: SyncConfig, contents: int
) -> Shared:
    """Canonical correlations between each audio token and the visual token of its instant, of cuts in sync; variation within clips only."""
    nearest = (audio_seconds(config)[:, None] - visual_seconds(config)[None]).abs().argmin(1)
    v, a = visual.double().flatten(1, 2)[:, nearest], audio.double().flatten(1, 2)
    x, y = ((tokens - tokens.mean(1, keepdim=True)).flatten(0, 1) for tokens in (v, a))
    white_x, white_y = _whitening(x), _whitening(y)
    left, strength, right = torch.linalg.svd(white_x @ (x.T @ y / len(x)) @ white_y)
    p, q = white_x @ left[:, :contents], white_y @ right[:contents].T
    means = [visual.double().flatten(0, 2).mean(0) @ p, audio.double().flatten(0, 2).mean(0) @ q]
    return Shared(*(each.float() for each in (p, q, strength[:contents], *means)))


def _whitening(x: Float[Tensor, "rows d"]) -> Float[Tensor, "d d"]:
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    return vectors @ torch.diag((values + RIDGE * values.max()).rsqrt()) @ vectors.T


@torch.no_grad()
def start_aligned(
    module: SyncModule, visual: Float[Tensor, "clips segments v visual_width"], audio: Float[Tensor, "clips segments a audio_width"]
) -> None:
    """Sets the module's weights, from the towers' tokens of cuts in sync. The answers' scale is left to `scale_answers`.

    Raises ValueError for a module that is too small: it needs two layers, and a width of 64 and five features for each head of each layer but the
    last.
    """
    config = module.config
    if config.head != "offset":
        raise ValueError("the aligned start is for offsets (stage 2); stage 3 starts from stage 2's weights")
    layers, heads, width = config.depth - 1, config.heads, config.width
    count = layers * heads
    needed = 4 * POSITION_PAIRS + count * (CONTENTS + 1)
    if layers < 1 or width < needed or width // heads < CONTENTS + 1 or config.mlp_ratio * width < 4 * CONTENTS * heads:
        raise ValueError(
            f"a module of width {width}, depth {config.depth} and {heads} heads is too small for the aligned start; expected a depth of 2 or "
            f"more and here a width of {needed} or more, or start=random"
        )
    shared = shared_directions(visual, audio, config, CONTENTS)
    place = _Places(config)
    _set_inputs(module, shared, place)
    grid = offset_grid()
    offsets = torch.linspace(float(grid[0]), float(grid[-1]), count)
    *comparing, averaging = cast(list[Block], list(module.transformer.blocks))
    for layer, block in enumerate(comparing):
        _set_comparing(block, layer, offsets, shared, place)
    _set_averaging(averaging, place)
    head = module.transformer.get_submodule("off_head")
    assert isinstance(head, nn.Linear)
    head.weight.zero_()
    head.bias.zero_()
    step = offsets[1] - offsets[0] if count > 1 else torch.tensor(1.0)
    head.weight[:, place.score : place.score + count] = (1 - ((grid[:, None] - offsets) / step).abs()).clamp(min=0)


@torch.no_grad()
def scale_answers(
    module: SyncModule,
    visual: Float[Tensor, "pairs segments v visual_width"],
    audio: Float[Tensor, "pairs segments a audio_width"],
    target: Int[Tensor, "pairs"],
) -> float:
    """Makes the answers as certain as they ought to be, on a sample with known offsets; the cross entropy that is left."""
    training, head = module.training, module.transformer.get_submodule("off_head")
    assert isinstance(head, nn.Linear)
    logits = torch.cat([module.eval()(v, a) for v, a in zip(visual.split(64), audio.split(64), strict=True)])
    module.train(training)
    scales = torch.logspace(-1, 3, 41)
    losses = torch.stack([F.cross_entropy(logits * scale, target) for scale in scales])
    head.weight.mul_(scales[losses.argmin()])
    return float(losses.min())


class _Places:
    """Which features of a token are for what."""

    def __init__(self, config: SyncConfig) -> None:
        self.config, self.positions = config, 2 * POSITION_PAIRS
        self.content = self.positions
        self.modality = self.content + CONTENTS
        """1 for pictures, -1 for sound."""
        self.taken = 4 * POSITION_PAIRS
        """From here on: what each head of each layer brought."""
        count = (config.depth - 1) * config.heads
        self.score = self.taken + count * CONTENTS
        """From here on: how well the clip fits at each head's offset."""
        self.anchors = [*range(self.modality + 1, self.taken), *range(self.score + count, config.width)]
        """Constants, which keep the norms from changing with the contents."""
        self.signs = torch.tensor([1.0, -1.0]).repeat(config.width)[: config.width]
        self.anchor = sqrt(max(NORM**2 * config.width - POSITION_PAIRS - CONTENTS, 1.0) / max(len(self.anchors), 1))
        shortest, longest = (log10(seconds) for seconds in PERIODS_SECONDS)
        self.frequencies = 2 * pi / torch.logspace(shortest, longest, POSITION_PAIRS)

    def brought(self, layer: int, head: int) -> int:
        """The first feature of what a head brought."""
        return self.taken + (layer * self.config.heads + head) * CONTENTS


def _set_inputs(module: SyncModule, shared: Shared, place: _Places) -> None:
    """Contents through the projections and their norms, which large constants make nearly linear; instants and constants as positions."""
    config, transformer = module.config, module.transformer
    contents, large = slice(place.content, place.content + CONTENTS), 6.0
    for projection, norm, directions, mean, modality in (
        (module.vproj, transformer.vis_in_lnorm, shared.visual, shared.visual_mean, 1.0),
        (module.aproj, transformer.aud_in_lnorm, shared.audio, shared.audio_mean, -1.0),
    ):
        projection.weight.mul_(0.02)
        projection.bias.copy_(place.signs * large)
        projection.weight[contents], projection.bias[contents] = directions.T, -mean
        norm.weight.zero_()
        norm.bias.zero_()
        norm.weight[contents], norm.bias[place.modality] = large, modality
    transformer.OFF_tok.zero_()
    transformer.MOD_tok.zero_()
    positions = transformer.pos_emb_cfg.pos_emb
    positions.zero_()
    first_sound = 2 + config.segments * config.visual_tokens
    for rows, seconds in ((slice(1, first_sound - 1), visual_seconds(config)), (slice(first_sound, None), audio_seconds(config))):
        angles = seconds[:, None] * place.frequencies
        positions[0, rows, : place.positions] = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    positions[0, :, place.anchors] = place.signs[place.anchors] * place.anchor


def _set_comparing(block: Block, layer: int, offsets: Float[Tensor, "heads_and_layers"], shared: Shared, place: _Places) -> None:
    """A layer whose heads bring the pictures' contents of their offsets, and whose MLP multiplies them with the sound's."""
    config = place.config
    heads, size, layers = config.heads, config.width // config.heads, config.depth - 1
    attention, rise, fall = block.attn, cast(nn.Linear, block.mlp[0]), cast(nn.Linear, block.mlp[2])
    for linear in (attention.query, attention.key, attention.value, attention.proj, rise, fall):
        linear.bias.zero_()
    for linear in (attention.query, attention.key, rise):
        linear.weight.mul_(0.2)
    for linear in (attention.value, attention.proj, fall):
        linear.weight.zero_()
    pairs = min((size - 1) // 2, POSITION_PAIRS)
    chosen = torch.linspace(0, POSITION_PAIRS - 1, pairs).round().long().tolist()
    gain = sqrt(PEAK * sqrt(size) / pairs * NORM**2)
    unit = 0
    for head in range(heads):
        number = head * layers + layer
        rows = slice(head * size, (head + 1) * size)
        query, key = torch.zeros(size, config.width), torch.zeros(size, config.width)
        for row, f in enumerate(chosen):
            # The key is turned back by the offset: the product is the cosine of (pictures' instant - offset - sound's instant).
            c, s = torch.cos(place.frequencies[f] * offsets[number]), torch.sin(place.frequencies[f] * offsets[number])
            query[2 * row, 2 * f], query[2 * row + 1, 2 * f + 1] = gain, gain
            key[2 * row, 2 * f], key[2 * row, 2 * f + 1] = gain * c, -gain * s
            key[2 * row + 1, 2 * f], key[2 * row + 1, 2 * f + 1] = gain * s, gain * c
        towards_pictures = sqrt(2.5 * sqrt(size)) * NORM
        query[-1, place.modality], key[-1, place.modality] = -towards_pictures, towards_pictures
        attention.query.weight[rows], attention.key.weight[rows] = query, key
        for content in range(CONTENTS):
            own, brought = place.content + content, place.brought(layer, head) + content
            attention.value.weight[head * size + content, own] = 1.0
            attention.proj.weight[brought, head * size + content] = 1.0
            # gelu(x) + gelu(-x) is even: the four together are about 3.2 times the product, for small contents.
            for of_own, of_brought, sign in ((1, 1, 1), (-1, -1, 1), (1, -1, -1), (-1, 1, -1)):
                rise.weight[unit].zero_()
                rise.weight[unit, own], rise.weight[unit, brought] = of_own, of_brought
                fall.weight[place.score + number, unit] = sign * shared.strength[content]
                unit += 1


def _set_averaging(block: Block, place: _Places) -> None:
    """The last layer: its first token averages the sound's tokens, unchanged."""
    config, attention = place.config, block.attn
    size = config.width // config.heads
    for linear in (attention.query, attention.key):
        linear.weight.mul_(0.2)
        linear.bias.zero_()
    for linear in (attention.value, attention.proj):
        linear.weight.copy_(torch.eye(config.width))
        linear.bias.zero_()
    towards_sound = 2 * size**0.25
    attention.query.bias[::size] = towards_sound
    attention.key.weight[::size] = 0.0
    attention.key.weight[::size, place.modality] = -towards_sound
    cast(nn.Linear, block.mlp[2]).weight.mul_(0.1)
