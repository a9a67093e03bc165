"""How codes are drawn from the decoder's scores: temperature, top-k or top-p, classifier-free guidance, and one uniform number per code.

Knows tensors of scores only: not the decoder, not the order in which codes are made.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


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

    @property
    def guided(self) -> bool:
        """Whether every step also needs the prediction without the video."""
        return self.guidance > 1


def choose(logits: Float[Tensor, "rows q card"], uniform: Float[Tensor, "b q"], sampling: Sampling) -> Int[Tensor, "b q"]:
    """The next codes of `b` samples; with guidance the first half of the rows saw the video and the second did not.

    No decision of Python's depends on a tensor, so the whole can be part of a graph.
    """
    if sampling.guided:
        with_video, without = logits.chunk(2)
        logits = without + (with_video - without) * sampling.guidance
    return logits.argmax(-1) if sampling.greedy else draw(probabilities(logits, sampling), uniform)


def probabilities(logits: Float[Tensor, "*batch card"], sampling: Sampling) -> Float[Tensor, "*batch card"]:
    """The distribution that codes are drawn from: temperature, then top-p or top-k, in fp32."""
    chances = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.top_p > 0:
        ordered, order = chances.sort(dim=-1, descending=True)
        # A code stays if those before it have not reached top_p, so the first always does.
        ordered = torch.where(ordered.cumsum(-1) - ordered > sampling.top_p, 0, ordered)
        chances = torch.zeros_like(chances).scatter(-1, order, ordered)
    elif 0 < sampling.top_k < logits.shape[-1]:
        least = chances.topk(sampling.top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
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


class Chance:
    """The uniform numbers that a batch of samples draws by: from each sample's own generator, or all from torch's global one."""

    def __init__(self, seeds: Sequence[int] | None, batch: int) -> None:
        if seeds is not None and len(seeds) != batch:
            raise ValueError(f"{len(seeds)} seeds for a batch of {batch}; expected one for each sample")
        self._generators = [None] * batch if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self, codebooks: int, length: int) -> Float[Tensor, "b {codebooks} {length}"]:
        """All that a window needs, at once and on the CPU: the same on every device, whatever the other samples are."""
        return torch.stack([torch.rand(codebooks, length, generator=generator) for generator in self._generators])
