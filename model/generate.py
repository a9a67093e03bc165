"""Sampling from the decoder: one sequence step at a time, through a key-value cache, with classifier-free guidance, over videos of any length.

Knows the decoder and tensors. Knows no codec and no files: what comes out are codes, and what they sound like is the codec's business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from configs.clock import SEGMENT_TOKENS
from model.delay import delay, undelay
from model.vaura import Block, KeyValueCache, Vaura, rms_norm, rotary, rotate

UNKNOWN = -1


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn. The defaults are the published ones."""

    temperature: float = 1.0
    """Divides the logits: below 1 is safer, above 1 more varied."""
    top_k: int = 128
    """Draw among this many most likely codes (and those as likely as the last of them); 0 for no such limit."""
    top_p: float = 0.0
    """Draw among the most likely codes that together have this probability; takes the place of top_k where it is above 0."""
    guidance: float = 6.0
    """Classifier-free guidance: how far to go from the prediction without the video towards (1) and past (above 1) the one with it."""
    greedy: bool = False
    """Take the most likely code in place of drawing one."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: expected above 0; greedy=true takes the most likely code")
        if self.top_k < 0 or not 0 <= self.top_p <= 1:
            raise ValueError(f"top_k={self.top_k}, top_p={self.top_p}: expected top_k of 0 or more, and top_p between 0 and 1")
        if self.guidance < 1:
            raise ValueError(f"guidance={self.guidance}: expected 1 (the model's own prediction) or more")


@dataclass(frozen=True)
class Window:
    """One pass of the decoder over a part of a long video. `steps.start` is where its tokens begin; the codes that exist by then are its prompt."""

    tokens: range
    steps: range


def generate(
    model: Vaura,
    features: Float[Tensor, "b tokens c"],
    *,
    steps: int,
    sampling: Sampling,
    prompt: Int[Tensor, "b q p"] | None = None,
    seeds: Sequence[int] | None = None,
    cache: bool = True,
) -> Int[Tensor, "b q {steps}"]:
    """`steps` codec steps for each video, the first of them `prompt` word for word.

    With `seeds`, one per sample, a sample's codes do not depend on its neighbours in the batch; without, they come from torch's global generator.
    `cache=False` computes the whole sequence again for every step: slow, and the same.
    """
    generators = _generators(seeds, len(features))
    with torch.inference_mode():
        codes = _generate(model, features, steps, sampling, prompt, generators, cache)
    return codes.clone()


def generate_windows(
    model: Vaura,
    features: Float[Tensor, "b tokens c"],
    *,
    sampling: Sampling,
    window_segments: int | None = None,
    stride_segments: int = 1,
    schedule: Sequence[Window] | None = None,
    seeds: Sequence[int] | None = None,
    cache: bool = True,
) -> Int[Tensor, "b q steps"]:
    """Codes for videos of any length, by a window that moves on by `stride_segments` and takes the codes already there as its prompt.

    `window_segments` is the training window where not given. `schedule` says the windows themselves, for a published model's own arithmetic.
    """
    if schedule is None:
        length = model.config.window_tokens if window_segments is None else window_segments * SEGMENT_TOKENS
        schedule = windows(model, features.shape[1], window_tokens=length, stride_tokens=stride_segments * SEGMENT_TOKENS)
    generators = _generators(seeds, len(features))
    codes = torch.empty(len(features), model.config.codebooks, 0, dtype=torch.long, device=features.device)
    with torch.inference_mode():
        for window in schedule:
            prompt, seen = codes[..., window.steps.start :], features[:, window.tokens.start : window.tokens.stop]
            new = _generate(model, seen, len(window.steps), sampling, prompt, generators, cache)
            codes = torch.cat([codes[..., : window.steps.start], new], dim=-1)
    return codes.clone()


def windows(model: Vaura, tokens: int, *, window_tokens: int, stride_tokens: int) -> list[Window]:
    """The windows over a video of `tokens` tokens, on the model's exact clock.

    The last one ends with the video and is as long as the others, as in training; only a video shorter than a window has a short one.
    """
    if not 0 < stride_tokens <= window_tokens:
        raise ValueError(f"a stride of {stride_tokens} video tokens and a window of {window_tokens}: expected a stride between 1 and the window")
    last = max(0, tokens - window_tokens)
    starts = [*range(0, last, stride_tokens), last]
    spans = [range(start, min(start + window_tokens, tokens)) for start in starts]
    return [Window(span, range(model.config.steps_at(span.start), model.config.steps_at(span.stop))) for span in spans]


def probabilities(logits: Float[Tensor, "*batch card"], sampling: Sampling) -> Float[Tensor, "*batch card"]:
    """The distribution that codes are drawn from: temperature, then top-p or top-k, in fp32."""
    chances = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.top_p > 0:
        ordered, order = chances.sort(dim=-1, descending=True)
        # A code stays if those before it have not reached top_p, so the first always does.
        ordered = torch.where(ordered.cumsum(-1) - ordered > sampling.top_p, 0, ordered)
        chances = torch.zeros_like(chances).scatter(-1, order, ordered)
    elif 0 < sampling.top_k < logits.shape[-1]:
        least = chances.topk(sampling.top_k, dim=-1).values[..., -1:]
        chances = torch.where(chances < least, 0, chances)
    else:
        return chances
    return chances / chances.sum(-1, keepdim=True)


def draw(chances: Float[Tensor, "*batch card"], uniform: Float[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """The code whose share of [0, 1) a uniform number falls in."""
    upto = chances.cumsum(-1)
    total = upto[..., -1:]
    # Rounding must not carry the number to the very end, past which there is no code.
    level = torch.minimum(uniform[..., None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(upto, level, right=True)[..., 0]


class RecomputedLogits:
    """The logits after any part of a sequence, from the whole of it each time: the slow oracle."""

    def __init__(self, model: Vaura, features: Float[Tensor, "b tokens c"]) -> None:
        self.model, self.features = model, features

    def __call__(self, sequence: Int[Tensor, "b q s"], length: int) -> Float[Tensor, "b q card"]:
        """Scores of the codes at sequence step `length`, given those before it."""
        return self.model(sequence[..., :length], self.features)[:, -1]


class BlockWeights(NamedTuple):
    """One block's weights, out of their modules."""

    attention_norm: Tensor
    wqkv: Tensor
    wo: Tensor
    ffn_norm: Tensor
    w1: Tensor
    w3: Tensor
    w2: Tensor

    @classmethod
    def of(cls, block: Block) -> "BlockWeights":
        """The weights of a block."""
        attention, feed_forward = block.attention, block.feed_forward
        mixing = block.attention_norm.weight, attention.wqkv.weight, attention.wo.weight
        return cls(*mixing, block.ffn_norm.weight, feed_forward.w1.weight, feed_forward.w3.weight, feed_forward.w2.weight)


class CachedLogits:
    """The same logits from the new steps alone, for a sequence that only grows."""

    def __init__(self, model: Vaura, features: Float[Tensor, "b tokens c"], positions: int) -> None:
        config = model.config
        self.model = model
        self.visual = model.align(features, positions)
        self.codes = model.stacked_codes()
        self.rope = rotary(positions, config.width // config.heads, features.device)
        self.layers = cast(list[Block], list(model.layers))
        self.weights = [BlockWeights.of(layer) for layer in self.layers]
        shape = len(features), config.heads, positions, config.width // config.heads
        self.caches = [KeyValueCache(*shape, dtype=self.visual.dtype, device=features.device) for _ in self.layers]

    def __call__(self, sequence: Int[Tensor, "b q s"], length: int) -> Float[Tensor, "b q card"]:
        """Scores of the codes at sequence step `length`, given those before it."""
        new = slice(self.caches[0].length, length)
        x = self.model.combine(self.visual[:, new], self.codes.embed(sequence[..., new]))
        if x.shape[1] == 1:
            last = self._step(x[:, 0], self.rope[:, new])
        else:
            rope = self.rope[:, new]
            for layer, cache in zip(self.layers, self.caches, strict=True):
                x = layer(x, rope, cache)
            last = x[:, -1]
        return self.codes.logits(self.model.norm(last[:, None]))[:, 0]

    def _step(self, x: Tensor, rope: Tensor) -> Tensor:
        """One position through all blocks: what `Block.forward` computes, without the calls of modules, which in small models cost more than it."""
        b, heads = len(x), self.model.config.heads
        for w, cache in zip(self.weights, self.caches, strict=True):
            qkv = F.linear(rms_norm(x, w.attention_norm), w.wqkv).view(b, 3, heads, 1, -1)
            turned = rotate(qkv[:, :2], rope)
            keys, values = cache.extend(turned[:, 1], qkv[:, 2])
            mixed = F.scaled_dot_product_attention(turned[:, 0], keys, values)
            x = x + F.linear(mixed.view(b, -1), w.wo)
            normed = rms_norm(x, w.ffn_norm)
            x = x + F.linear(F.silu(F.linear(normed, w.w1)) * F.linear(normed, w.w3), w.w2)
        return x


def _generate(
    model: Vaura,
    features: Tensor,
    steps: int,
    sampling: Sampling,
    prompt: Tensor | None,
    generators: Sequence[torch.Generator | None],
    cache: bool,
) -> Tensor:
    config, batch = model.config, len(features)
    known = 0 if prompt is None else prompt.shape[-1]
    length = steps + config.codebooks
    if model.training:
        raise ValueError("the model is in training mode, with dropout on; call model.eval() before generating")
    if known >= steps:
        raise ValueError(f"a prompt of {known} steps and {steps} steps to make: expected a prompt shorter than what is made")
    if length - 1 > config.max_steps:
        raise ValueError(f"{steps} steps need {length - 1} positions; the model has max_steps={config.max_steps}: take shorter windows")
    guided = sampling.guidance > 1
    if guided:
        unconditional = model.cls_embeddings.unconditional(features.shape[1]).to(features.dtype)
        features = torch.cat([features, unconditional.expand(batch, -1, -1)])
    next_logits = CachedLogits(model, features, length - 1) if cache else RecomputedLogits(model, features)
    codes = torch.full((batch, config.codebooks, steps), UNKNOWN, device=features.device)
    if prompt is not None:
        codes[..., :known] = prompt
    sequence = delay(codes, config.special).repeat(1 + guided, 1, 1)
    uniform = _uniform(generators, (config.codebooks, length), features.device)
    for step in range(known + 1, length):
        logits = next_logits(sequence, step)
        if guided:
            with_video, without = logits.chunk(2)
            logits = without + (with_video - without) * sampling.guidance
        chosen = logits.argmax(-1) if sampling.greedy else draw(probabilities(logits, sampling), uniform[..., step])
        # Codebook k is at codec step `step` - 1 - k: those before the prompt's end are known, those past the end stay special.
        unknown = slice(max(0, step - steps), min(config.codebooks, step - known))
        sequence[:, unknown, step] = chosen[:, unknown].repeat(1 + guided, 1)
    return undelay(sequence[:batch], steps)


def _generators(seeds: Sequence[int] | None, batch: int) -> list[torch.Generator | None]:
    """A generator per sample; None stands for torch's global one."""
    if seeds is None:
        return [None] * batch
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for a batch of {batch}; expected one for each sample")
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _uniform(generators: Sequence[torch.Generator | None], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """All the chance a window needs, drawn at once on the CPU: the same on every device, and of each sample's own generator."""
    return torch.stack([torch.rand(shape, generator=generator) for generator in generators]).to(device)
