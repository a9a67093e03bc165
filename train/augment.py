"""Augmentation of clips for Synchformer's training: what is done to pictures and to sound at random, and how often.

Every draw comes from the `random.Random` that is handed in, so a clip's pixels and samples follow from its seed alone. Pictures stay uint8 and
sound stays a waveform; normalisation and spectrograms are made where the network is. Effects are those of the published training (Iashin et al.
2024, sec. 4.1, and its configuration files). Differs: colours are rounded once and not after every step, and pitch is shifted
in shorter pieces. Knows tensors only: no files, no segments' places, no network.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
import torchaudio.functional as AF
from jaxtyping import Float, UInt8
from torch import Tensor

from model.segments import SAMPLE_RATE_HZ

GREY = (0.2989, 0.587, 0.114)
"""What red, green and blue weigh in brightness (ITU-R BT.601)."""
STEPS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class AugmentOptions:
    """What is changed at random while training. p is how often. The defaults are those of the published stage I on VGGSound and AudioSet; LRS3
    had none but the random crop and the flip, like stages II and III on all of them."""

    each: Literal["segment", "clip"] = "segment"
    """What draws for itself whether it is flipped, coloured or made to sound otherwise: every segment (as published in stage I), or the clip as a
    whole (as in stages II and III)."""
    random_crop: bool = True
    """Cut the square of the pictures at a random place, the same in the whole clip; false: in the middle."""
    p_zoom: float = 0.2
    """Cut a smaller square and scale it up."""
    zoom: float = 192 / 224
    """The smaller square's side, as a fraction of the usual one's."""
    p_flip: float = 0.5
    """Left for right."""
    p_colour: float = 0.2
    """Brightness, contrast, saturation and hue, in a random order."""
    colour_strength: float = 1.0
    """At 1 the first three change by factors in [0.2, 1.8], and the hue by up to a fifth of its circle."""
    p_grey: float = 0.2
    """No colours."""
    p_reverb: float = 0.2
    """As in a hall of middle size: the reflections alone, without what came straight."""
    p_volume: float = 0.2
    """Times `gain`; what is then too loud is clipped."""
    gain: float = 2.0
    """A factor of the amplitude."""
    p_pitch: float = 0.2
    """Higher, at the same tempo."""
    pitch_cents: float = 1000.0
    """By how much, in hundredths of a semitone. Not lower: pieces of the sound would be left out for it, and with them what is to be found."""
    p_low_pass: float = 0.2
    """Muffled: a filter of second order."""
    cutoff_hz: float = 100.0
    """Where the filter begins."""
    p_noise: float = 0.2
    """White noise is added."""
    noise_amplitude: float = 0.01
    """The noise's standard deviation; full scale is 1."""

    def __post_init__(self) -> None:
        wrong = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name.startswith("p_") and not 0 <= getattr(self, f.name) <= 1]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: expected probabilities, from 0 to 1")
        if not (
            0 < self.zoom <= 1 and 0 <= self.colour_strength <= 2.5 and 0 < self.cutoff_hz < SAMPLE_RATE_HZ / 2 and 0 <= self.pitch_cents <= 2400
        ):
            raise ValueError(
                f"zoom={self.zoom}, colour_strength={self.colour_strength}, cutoff_hz={self.cutoff_hz}, pitch_cents={self.pitch_cents}: expected "
                f"(0, 1], [0, 2.5], (0, {SAMPLE_RATE_HZ // 2}) and [0, 2400]"
            )


CONTRAST_AUGMENT = AugmentOptions()
"""The published stage I's on VGGSound and AudioSet."""
PAIR_AUGMENT = AugmentOptions("clip", p_zoom=0.0, p_colour=0.0, p_grey=0.0, p_reverb=0.0, p_volume=0.0, p_pitch=0.0, p_low_pass=0.0, p_noise=0.0)
"""The published stages II and III's: the square's place and the flip."""


# --- the square -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Square:
    """Of every picture of a clip, in pixels."""

    top: int
    left: int
    side: int


def middle_square(height: int, width: int, size: int) -> Square:
    """The square of evaluation. ValueError for pictures smaller than it."""
    _check_fits(height, width, size)
    return Square(round((height - size) / 2), round((width - size) / 2), size)


def draw_square(rng: random.Random, height: int, width: int, size: int, options: AugmentOptions) -> Square:
    """The square of training, to be scaled to `size`. ValueError for pictures smaller than it."""
    _check_fits(height, width, size)
    side = round(size * options.zoom) if rng.random() < options.p_zoom else size
    if not options.random_crop:
        return middle_square(height, width, side)
    return Square(rng.randint(0, height - side), rng.randint(0, width - side), side)


def cut_square(frames: UInt8[Tensor, "n h w 3"], square: Square, size: int) -> UInt8[Tensor, "n size size 3"]:
    """The square of every picture, scaled up to `size` if it is smaller (bilinear). A view of the pictures where nothing is scaled."""
    cut = frames[:, square.top : square.top + square.side, square.left : square.left + square.side]
    return cut if square.side == size else resize(cut, size, size)


def resize(frames: UInt8[Tensor, "n h w 3"], height: int, width: int) -> UInt8[Tensor, "n height width 3"]:
    """Bilinear, rounded; averaged over what a smaller pixel covers."""
    smaller = height < frames.shape[1] or width < frames.shape[2]
    return F.interpolate(frames.movedim(-1, 1), (height, width), mode="bilinear", antialias=smaller).movedim(1, -1)


def _check_fits(height: int, width: int, size: int) -> None:
    if min(height, width) < size:
        raise ValueError(f"pictures of {width}x{height} are smaller than the network's square of {size}x{size}; expected a larger short side")


# --- colours --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Colour:
    """How colours change, the same in all pictures of a group."""

    brightness: float = 1.0
    """A factor."""
    contrast: float = 1.0
    """A factor of the distance to the picture's mean brightness."""
    saturation: float = 1.0
    """A factor of the distance to grey."""
    hue: float = 0.0
    """Turns of the colour circle, added."""
    order: tuple[str, ...] = STEPS


def draw_colour(rng: random.Random, strength: float) -> Colour:
    """Factors and their order."""
    low, high = max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength
    light, contrast, saturation = (rng.uniform(low, high) for _ in range(3))
    return Colour(light, contrast, saturation, rng.uniform(-0.2 * strength, 0.2 * strength), tuple(rng.sample(STEPS, len(STEPS))))


def change_colours(frames: UInt8[Tensor, "t h w 3"], colour: Colour) -> UInt8[Tensor, "t h w 3"]:
    """The pictures in other colours: what leaves [0, 255] at a step is clipped there, and the result is rounded."""
    x = frames.movedim(-1, 0).float()
    for step in colour.order:
        if step == "brightness":
            x = x.mul_(colour.brightness).clamp_(0, 255)
        elif step == "contrast":
            mean = brightness(x).mean((1, 2), keepdim=True)
            x = x.mul_(colour.contrast).add_((1 - colour.contrast) * mean).clamp_(0, 255)
        elif step == "saturation":
            grey = brightness(x).mul_(1 - colour.saturation)
            x = x.mul_(colour.saturation).add_(grey).clamp_(0, 255)
        else:
            x = turn_hue(x, colour.hue)
    return x.round_().to(torch.uint8).movedim(0, -1)


def brightness(x: Float[Tensor, "3 *shape"]) -> Float[Tensor, "*shape"]:
    """What an eye takes for the brightness of red, green and blue."""
    return (x[0] * GREY[0]).add_(x[1], alpha=GREY[1]).add_(x[2], alpha=GREY[2])


def turn_hue(x: Float[Tensor, "3 *shape"], turns: float) -> Float[Tensor, "3 *shape"]:
    """Hue in the sense of HSV, turned; the largest and the smallest of the three colours of a pixel stay what they are."""
    red, green, blue = x
    value, chroma = x.amax(0), x.amax(0).sub_(x.amin(0))
    over = chroma.clamp(min=1e-6)
    # In sixths of the circle, from red. A pixel without colour has none, and its chroma of 0 makes that harmless.
    hue = torch.where(value == red, (green - blue) / over, torch.where(value == green, (blue - red) / over + 2, (red - green) / over + 4))
    turned = torch.empty_like(x)
    for channel, offset in enumerate((5, 3, 1)):
        k = (hue + (offset + 6 * turns)).remainder_(6)
        turned[channel] = value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)
    return turned


def make_grey(frames: UInt8[Tensor, "t h w 3"]) -> UInt8[Tensor, "t h w 3"]:
    """The pictures' brightness in all three colours."""
    return brightness(frames.movedim(-1, 0).float()).round_().to(torch.uint8)[..., None].expand(frames.shape)


def augment_pictures(pictures: UInt8[Tensor, "groups t h w 3"], rng: random.Random, options: AugmentOptions) -> UInt8[Tensor, "groups t h w 3"]:
    """Flip, colours and grey, drawn for every group of pictures. The result is a contiguous copy."""
    changed = torch.empty(pictures.shape, dtype=torch.uint8)
    for group, into in zip(pictures, changed, strict=True):
        if rng.random() < options.p_flip:
            group = group.flip(2)
        if rng.random() < options.p_colour:
            group = change_colours(group, draw_colour(rng, options.colour_strength))
        if rng.random() < options.p_grey:
            group = make_grey(group)
        into.copy_(group)
    return changed


# --- sound ----------------------------------------------------------------------------------------------------------------------------


def louder(sound: Float[Tensor, "n samples"], gain: float) -> Float[Tensor, "n samples"]:
    """Times `gain`, clipped to [-1, 1]."""
    return (sound * gain).clamp_(-1, 1)


def low_pass(sound: Float[Tensor, "n samples"], cutoff_hz: float) -> Float[Tensor, "n samples"]:
    """A Butterworth filter of second order, clipped to [-1, 1]."""
    return AF.lowpass_biquad(sound, SAMPLE_RATE_HZ, cutoff_hz, Q=0.707)


PIECE, OVERLAP, REACH = 512, 128, 100
"""Of stretching, in samples: pieces of 32 ms, shorter than sox's 82, for what is to be learned is when something sounds; how far neighbours go into
each other; how far a piece may be moved to fit on (half a period of 80 Hz)."""


def shift_pitch(sound: Float[Tensor, "n samples"], cents: float) -> Float[Tensor, "n samples"]:
    """Higher by so many hundredths of a semitone and as long as before: stretched, and then sampled at fewer points.

    The ratio is that of the nearest fraction with a denominator of up to 32 (1000 cents: 57 / 32, which are 999.5).
    """
    ratio = Fraction(2 ** (cents / 1200)).limit_denominator(32)
    if ratio == 1:
        return sound
    return AF.resample(stretch(sound, ratio), ratio.numerator, ratio.denominator)[:, : sound.shape[1]]


def stretch(sound: Float[Tensor, "n samples"], ratio: Fraction) -> Float[Tensor, "n longer"]:
    """`ratio` (1 or more) times as long at the same pitch: pieces are repeated, each moved to where it goes on best from the one before (WSOLA,
    Verhelst & Roelands 1993)."""
    rows, samples = sound.shape
    longer, step = math.ceil(samples * ratio), PIECE - OVERLAP
    count = math.ceil(longer / step) + 1
    # A piece's middle is taken from where it belongs. Before the first and after the last there is silence.
    middles = [round((k * step + step // 2) / ratio) for k in range(count)]
    before, after = step // 2 + REACH, PIECE + step + 2 * REACH
    padded = F.pad(sound, (before, after + max(0, middles[-1] - samples)))
    fade = torch.ones(PIECE)
    fade[:OVERLAP] = (torch.arange(OVERLAP) + 0.5) / OVERLAP
    fade[step:] = fade[:OVERLAP].flip(0)
    out = sound.new_zeros(rows, count * step + OVERLAP)
    goes_on = torch.full((rows, 1), middles[0] - step // 2 + before)
    for k, middle in enumerate(middles):
        first = middle - step // 2 + before - REACH
        candidates = padded[:, first : first + 2 * REACH + OVERLAP].unfold(1, OVERLAP, 1)
        wanted = padded.gather(1, goes_on + torch.arange(OVERLAP))[:, :, None]
        likeness = (candidates @ wanted)[..., 0] / candidates.square().sum(-1).add_(1e-9).sqrt_()
        start = first + (likeness.argmax(1, keepdim=True) if k else REACH)
        out[:, k * step : k * step + PIECE] += fade * padded.gather(1, (start + torch.arange(PIECE)).expand(rows, -1))
        goes_on = start + step if k else goes_on + step
    return out[:, :longer]


def reverberate(sound: Float[Tensor, "n samples"]) -> Float[Tensor, "n samples"]:
    """The reflections alone, the mean of both ears: what sox calls `reverb -w`, to the bit depth of its floats."""
    samples = sound.shape[-1]
    spectrum = torch.fft.rfft(sound, 2 * samples) * torch.fft.rfft(room(samples), 2 * samples)
    return torch.fft.irfft(spectrum, 2 * samples)[..., :samples]


COMBS = (1116, 1188, 1277, 1356, 1422, 1491, 1557, 1617)
ALL_PASSES = (556, 441, 341, 225)
"""Delays of Freeverb's filters (J. Wakefield, 2000), in samples at 44.1 kHz."""
SPREAD = 12
"""What one ear's are longer or shorter, in turn."""
FEEDBACK = 1 - 0.02 ** (1 / 2) * 0.7 ** (1 / 2)
"""Of the combs: half way, in the logarithm of what is lost, between the driest (0.3) and the longest room (0.98)."""
DAMPING = 0.35
"""Of high frequencies, at each reflection."""
WET = 0.015


@lru_cache(maxsize=4)
def room(samples: int) -> Float[Tensor, "samples"]:
    """The beginning of the room's impulse response, which is all that `samples` of sound can hear of it.

    Eight combs side by side, then four all-passes one after the other (Schroeder 1962; Freeverb). From the transfer function on a circle around the
    unit circle, on which the part that is left out has died away to nothing.
    """
    points = 2 * samples
    radius = 10 ** (8 / points)
    delay = torch.polar(torch.full((points,), 1 / radius, dtype=torch.float64), -2 * math.pi / points * torch.arange(points, dtype=torch.float64))
    heard = torch.zeros(points, dtype=torch.complex128)
    for ear in (0, SPREAD):
        combs, passes = (_delays(lengths, ear) for lengths in (COMBS, ALL_PASSES[::-1]))
        damped = 1 - DAMPING * delay
        wet = sum((damped * delay**n / (damped - FEEDBACK * (1 - DAMPING) * delay**n) for n in combs), torch.zeros(()))
        for n in passes:
            wet = wet * (1.5 * delay**n - 1) / (1 - 0.5 * delay**n)
        heard += wet * WET / 2
    response = torch.fft.ifft(heard).real * radius ** torch.arange(points, dtype=torch.float64)
    return response[:samples].float()


def _delays(lengths: Sequence[int], spread: int) -> list[int]:
    """In samples at 16 kHz."""
    return [int((length + spread * (-1) ** n) * SAMPLE_RATE_HZ / 44100 + 0.5) for n, length in enumerate(lengths)]


def augment_sound(sound: Float[Tensor, "groups samples"], rng: random.Random, options: AugmentOptions) -> Float[Tensor, "groups samples"]:
    """Reverberation, volume, pitch, low-pass and noise, in this order (as published), each drawn for every group of samples."""
    noise = torch.Generator().manual_seed(rng.getrandbits(63))
    effects: list[tuple[float, Callable[[Tensor], Tensor]]] = [
        (options.p_reverb, reverberate),
        (options.p_volume, lambda x: louder(x, options.gain)),
        (options.p_pitch, lambda x: shift_pitch(x, options.pitch_cents)),
        (options.p_low_pass, lambda x: low_pass(x, options.cutoff_hz)),
        (options.p_noise, lambda x: x + options.noise_amplitude * torch.randn(x.shape, generator=noise)),
    ]
    changed = sound.clone()
    for p, effect in effects:
        chosen = [group for group in range(len(sound)) if rng.random() < p]
        if chosen:
            changed[chosen] = effect(changed[chosen])
    return changed
