"""Which windows of a long video the decoder sees, in which order, and which codec steps each of them makes.

Knows integers and fractions: no tensors, no model.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from configs.clock import FRAME_RATE_HZ, SEGMENT_FRAMES, SEGMENT_SECONDS, SEGMENT_TOKENS

PUBLISHED_RATE_HZ = 86
"""Codec steps per second in the published generator's arithmetic; DAC 44.1 kHz itself has 86.1328."""
PUBLISHED_WINDOW_SECONDS = 2.56


@dataclass(frozen=True)
class Window:
    """One pass of the decoder over a part of a long video: these video tokens, making these codec steps.

    The codes that exist from `steps.start` on are its prompt, kept as they are.
    """

    tokens: Sequence[int]
    steps: range


def total_steps(tokens: int, clock: Fraction) -> int:
    """Codec steps that cover `tokens` video tokens to their end, the last one perhaps reaching past it: 221 for four segments of DAC 44.1 kHz."""
    return math.ceil(tokens * clock)


class WindowPlan:
    """The windows over a video whose length is known only when it ends: regular starts, and a last window that ends with the video.

    The last one is as long as the others, as in training; only a video shorter than a window has a short one. Windows begin at the step that begins
    nearest to their first token, as training's do; the last one's end is rounded up, so that its sound covers the whole video.
    Nothing accumulates: every window's steps come from its tokens' exact place.
    """

    def __init__(self, clock: Fraction, *, window_tokens: int, stride_tokens: int) -> None:
        if not 0 < stride_tokens <= window_tokens:
            raise ValueError(f"a stride of {stride_tokens} video tokens and a window of {window_tokens}: expected a stride between 1 and the window")
        self.clock, self.window_tokens, self.stride_tokens = clock, window_tokens, stride_tokens
        self.start = 0
        """First token of the next regular window."""
        self.needed = 0
        """No token before this one, and no code before `needed_step`, is asked for again."""

    @property
    def needed_step(self) -> int:
        """The codec step at which token `needed` begins."""
        return self._step(self.needed)

    def ready(self, tokens: int) -> Iterator[Window]:
        """The windows that can be made once `tokens` tokens are there and more will come."""
        while self.start + self.window_tokens < tokens:
            stop = self.start + self.window_tokens
            # The last window may begin anywhere after this one.
            self.needed = self.start + 1
            yield Window(range(self.start, stop), range(self._step(self.start), self._step(stop)))
            self.start += self.stride_tokens

    def last(self, tokens: int) -> Iterator[Window]:
        """The windows that are left once a video of `tokens` tokens has ended."""
        yield from self.ready(tokens)
        start = max(0, tokens - self.window_tokens)
        yield Window(range(start, tokens), range(self._step(start), total_steps(tokens, self.clock)))

    def _step(self, token: int) -> int:
        return math.floor(token * self.clock + Fraction(1, 2))


def windows(tokens: int, clock: Fraction, *, window_tokens: int, stride_tokens: int) -> list[Window]:
    """The windows over a video of `tokens` tokens; `clock` is codec steps per video token."""
    if tokens < 1:
        raise ValueError(f"a video of {tokens} video tokens: expected one or more")
    return list(WindowPlan(clock, window_tokens=window_tokens, stride_tokens=stride_tokens).last(tokens))


def published_schedule(duration_seconds: float, stride_seconds: float, available_segments: int) -> list[Window]:
    """The windows of the published V-AURA generator (and of AudioCraft's, which it took over), its float arithmetic included.

    One window of int(duration * 86) steps up to 2.56 s; beyond, windows of ceil(2.56 * 86) = 221 that move on by int(stride * 86) steps, each
    over the segments that its start in seconds, rounded up to a picture, falls in; for segments past the video's end it takes those from the start.
    Differs: strides that are any number of segments are accepted (the published check of 1.92 s fails on a rounding error).
    """
    segments = float(SEGMENT_SECONDS)
    if available_segments < 1 or duration_seconds < segments - 1e-6:
        raise ValueError(f"duration_seconds={duration_seconds:g} of {available_segments} segments: expected 0.64 s or more and at least one segment")
    if not 0 < stride_seconds <= PUBLISHED_WINDOW_SECONDS or abs(stride_seconds / segments - round(stride_seconds / segments)) > 1e-6:
        raise ValueError(f"stride_seconds={stride_seconds:g}: expected 0.64, 1.28, 1.92 or 2.56")
    whole = int(duration_seconds * PUBLISHED_RATE_HZ)
    if duration_seconds <= PUBLISHED_WINDOW_SECONDS:
        return [Window(_tokens(0.0, duration_seconds, available_segments), range(whole))]
    stride = int(PUBLISHED_RATE_HZ * stride_seconds)
    made, start, plan = 0, 0, []
    while made < whole:
        begin_seconds = start / PUBLISHED_RATE_HZ
        window_seconds = min(duration_seconds - begin_seconds, PUBLISHED_WINDOW_SECONDS)
        steps = range(start, start + math.ceil(window_seconds * PUBLISHED_RATE_HZ))
        plan.append(Window(_tokens(begin_seconds, window_seconds, available_segments), steps))
        made, start = steps.stop, start + stride
    return plan


def _tokens(begin_seconds: float, window_seconds: float, available_segments: int) -> list[int]:
    """The video tokens of the segments that a stretch of time covers, in the published rounding."""
    first = math.ceil(begin_seconds * FRAME_RATE_HZ)
    segments = range(first // SEGMENT_FRAMES, (first + math.ceil(window_seconds * FRAME_RATE_HZ)) // SEGMENT_FRAMES)
    return [segment % available_segments * SEGMENT_TOKENS + token for segment in segments for token in range(SEGMENT_TOKENS)]
