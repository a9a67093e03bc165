"""Generation: a window at once, or videos of any length by windows that move on, as a whole or as a stream of pieces in and pieces out.

Knows the decoder's engine and the schedule of windows. Knows no codec and no files: what comes out are codes, and what they sound like is the
codec's business.
"""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

import torch
from jaxtyping import Float, Int
from torch import Tensor

from configs.clock import SEGMENT_TOKENS
from model.delay import delay, undelay
from model.engine import UNKNOWN, Engine, EngineOptions, check_length
from model.sampling import Chance, Sampling, choose
from model.schedule import Window, WindowPlan, windows
from model.vaura import Vaura, VauraConfig

__all__ = ["RecomputedLogits", "Sampling", "generate", "generate_windows", "stream_windows"]


def generate(
    model: Vaura | Engine,
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
    maker = _Maker(model, sampling, Chance(seeds, len(features)), cache)
    *_, codes = maker.make(features, steps, prompt, piece_steps=0)
    return codes


def generate_windows(
    model: Vaura | Engine,
    features: Float[Tensor, "b tokens c"],
    *,
    sampling: Sampling,
    clock: Fraction | None = None,
    window_segments: int | None = None,
    stride_segments: int = 1,
    schedule: Sequence[Window] | None = None,
    prompt: Int[Tensor, "b q p"] | None = None,
    seeds: Sequence[int] | None = None,
    cache: bool = True,
) -> Int[Tensor, "b q steps"]:
    """Codes for videos of any length, by a window that moves on by `stride_segments` and takes the codes already there as its prompt.

    See `stream_windows`, which gives the same in pieces. `schedule` says the windows themselves, as a published model's own arithmetic has them.
    """
    if schedule is None:
        plan = _plan(model.config, clock, window_segments, stride_segments)
        schedule = windows(features.shape[1], plan.clock, window_tokens=plan.window_tokens, stride_tokens=plan.stride_tokens)
    track = _Track(_Maker(model, sampling, Chance(seeds, len(features)), cache), prompt)
    with_prompt: list[Tensor] = []
    for window in schedule:
        with_prompt += track.window(window, features[:, list(window.tokens)], piece_steps=0)
    track.check_finished(schedule[-1].steps.stop)
    return torch.cat(with_prompt, dim=-1)


def stream_windows(
    model: Vaura | Engine,
    features: Iterable[Float[Tensor, "b tokens c"]],
    *,
    sampling: Sampling,
    clock: Fraction | None = None,
    window_segments: int | None = None,
    stride_segments: int = 1,
    prompt: Int[Tensor, "b q p"] | None = None,
    seeds: Sequence[int] | None = None,
    piece_steps: int = 0,
) -> Iterator[Int[Tensor, "b q n"]]:
    """Codes for a video that arrives in pieces of any number of tokens, as soon as they are final: after every window, or every `piece_steps` steps.

    The pieces end to end are `generate_windows` of the whole, and begin with `prompt` word for word. `clock` is codec steps per video token (the
    model's own where not given) and says where windows lie in the sound; inside a window the model aligns as it was trained. `window_segments` is the
    training window where not given. A window is made when it is known not to be the last one: once a token after it is there.
    No more is kept than a window needs.
    """
    if piece_steps < 0:
        raise ValueError(f"piece_steps={piece_steps}: expected 0 (a piece per window) or more")
    plan = _plan(model.config, clock, window_segments, stride_segments)
    return _stream(model, features, plan, sampling, prompt, seeds, piece_steps)


def _stream(
    model: Vaura | Engine,
    features: Iterable[Tensor],
    plan: WindowPlan,
    sampling: Sampling,
    prompt: Tensor | None,
    seeds: Sequence[int] | None,
    piece_steps: int,
) -> Iterator[Tensor]:
    track, stock, first = None, None, 0
    for piece in features:
        stock = piece if stock is None else torch.cat([stock, piece], dim=1)
        track = track or _Track(_Maker(model, sampling, Chance(seeds, len(stock)), cache=True), prompt)
        for window in plan.ready(first + stock.shape[1]):
            yield from track.window(window, stock[:, window.tokens[0] - first : window.tokens[-1] + 1 - first], piece_steps)
            track.forget(plan.needed_step)
        stock, first = stock[:, plan.needed - first :], plan.needed
    if track is None or stock is None or first + stock.shape[1] == 0:
        raise ValueError("no video tokens came; expected one or more")
    for window in plan.last(first + stock.shape[1]):
        yield from track.window(window, stock[:, window.tokens[0] - first : window.tokens[-1] + 1 - first], piece_steps)
        track.check_finished(window.steps.stop)


def _plan(config: VauraConfig, clock: Fraction | None, window_segments: int | None, stride_segments: int) -> WindowPlan:
    length = config.window_tokens if window_segments is None else window_segments * SEGMENT_TOKENS
    return WindowPlan(config.token_clock if clock is None else clock, window_tokens=length, stride_tokens=stride_segments * SEGMENT_TOKENS)


class _Maker:
    """Makes windows, by the engine or by the slow definition."""

    def __init__(self, model: Vaura | Engine, sampling: Sampling, chance: Chance, cache: bool) -> None:
        if not cache and isinstance(model, Engine):
            raise ValueError("cache=False recomputes with the model itself; give the Vaura, not an Engine")
        self.model: Vaura | Engine = ready(model) if cache else model
        self.config, self.sampling, self.chance = model.config, sampling, chance

    def make(self, features: Tensor, steps: int, prompt: Tensor | None, piece_steps: int) -> Iterator[Tensor]:
        """The final codes of a window so far, again and again until they are all; they begin with the prompt."""
        # A window that cannot be made must not use up chance.
        check_length(self.config.codebooks, self.config.max_steps, steps, prompt)
        uniform = self.chance.draw(self.config.codebooks, steps + self.config.codebooks)
        if isinstance(self.model, Vaura):
            yield _recomputed(self.model, features, steps, self.sampling, prompt, uniform).clone()
            return
        run = self.model.begin(features, steps=steps, sampling=self.sampling, uniform=uniform, prompt=prompt)
        try:
            while not run.done:
                run.advance(piece_steps or steps + self.config.codebooks)
                yield run.codes()
        finally:
            run.close()


class _Track:
    """The codes of a long video so far, of which the next window's prompt is taken."""

    def __init__(self, maker: _Maker, prompt: Tensor | None) -> None:
        self.maker = maker
        self.codes = prompt
        self.start = 0
        self.handed_out = 0

    @property
    def stop(self) -> int:
        """The step after the last that is there."""
        return self.start + (0 if self.codes is None else self.codes.shape[-1])

    def window(self, window: Window, seen: Tensor, piece_steps: int) -> Iterator[Tensor]:
        """Codes that have become final and were not handed out."""
        if window.steps.stop <= self.stop:
            return  # Nothing of it is new.
        if not self.start <= window.steps.start <= self.stop:
            raise ValueError(
                f"a window begins at step {window.steps.start}, with codes for steps {self.start} to {self.stop}: expected it among them"
            )
        before = window.steps.start - self.start
        kept = None if self.codes is None else self.codes[..., :before]
        prompt = None if self.codes is None or self.stop == window.steps.start else self.codes[..., before:]
        for codes in self.maker.make(seen, len(window.steps), prompt, piece_steps):
            self.codes = codes if kept is None else torch.cat([kept.to(codes), codes], dim=-1)
            if self.stop > self.handed_out:
                new, self.handed_out = self.codes[..., self.handed_out - self.start :], self.stop
                yield new.clone()

    def forget(self, step: int) -> None:
        """Let go of codes before a step; no later window begins there."""
        if self.codes is not None and self.start < step <= self.handed_out:
            self.codes, self.start = self.codes[..., step - self.start :].clone(), step

    def check_finished(self, steps: int) -> None:
        """Refuse a prompt that left nothing to make."""
        if self.handed_out < steps:
            raise ValueError(f"a prompt of {self.stop} steps for a video of {steps}: expected a prompt shorter than what is made")


class RecomputedLogits:
    """The logits after any part of a sequence, from the whole of it each time: the slow oracle."""

    def __init__(self, model: Vaura, features: Float[Tensor, "b tokens c"]) -> None:
        self.model, self.features = model, features

    def __call__(self, sequence: Int[Tensor, "b q s"], length: int) -> Float[Tensor, "b q card"]:
        """Scores of the codes at sequence step `length`, given those before it."""
        return self.model(sequence[..., :length], self.features)[:, -1]


def ready(model: Vaura | Engine) -> Engine:
    """The engine itself, or one for this call: without graphs, and under autocast in its precision."""
    if isinstance(model, Engine):
        return model
    kind = model.norm.weight.device.type
    return Engine(model, EngineOptions(graph="off"), dtype=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)


@torch.inference_mode()
def _recomputed(model: Vaura, features: Tensor, steps: int, sampling: Sampling, prompt: Tensor | None, uniform: Tensor) -> Tensor:
    config, batch, known = model.config, len(features), 0 if prompt is None else prompt.shape[-1]
    if model.training:
        raise ValueError("the model is in training mode, with dropout on; call model.eval() before generating")
    if sampling.guided:
        unconditional = model.cls_embeddings.unconditional(features.shape[1]).to(features.dtype)
        features = torch.cat([features, unconditional.expand(batch, -1, -1)])
    codes = torch.full((batch, config.codebooks, steps), UNKNOWN, device=features.device)
    if prompt is not None:
        codes[..., :known] = prompt
    sequence, uniform = delay(codes, config.special), uniform.to(features.device)
    next_logits = RecomputedLogits(model, features)
    for step in range(known + 1, steps + config.codebooks):
        chosen = choose(next_logits(sequence.repeat(1 + sampling.guided, 1, 1), step), uniform[..., step], sampling)
        there = sequence[..., step]
        sequence[..., step] = torch.where(there == UNKNOWN, chosen, there)
    return undelay(sequence, steps)
