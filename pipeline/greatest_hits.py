"""Greatest Hits: who is hit when, how its videos and the parts cut from them are called, and where a part begins and ends.

A video is there as `<video>_denoised.mp4` and `<video>_mic.mp4`; `<video>_times.txt` has a line for each hit (Owens et al. 2016, "Visually indicated
sounds"). Parts are cut as V-AURA does (Viertola et al. 2024): around every hit, named by the frame at 25 fps in which it lies; differs: the ends
are not moved by a nanosecond. CondFoleyGen's lists (Du et al. 2023) name parts of 2 s by where they begin, in samples at 22.05 kHz or in
seconds. Knows names and times; no files, no media.
"""

import math
import re
from typing import NamedTuple

VIDEO_NAME = r"\d{4}(?:-\d\d){5}(?:-\d+)?"
HIT_NAME = re.compile(rf"({VIDEO_NAME})_(denoised|mic)_(\d+)")
START_NAME = re.compile(rf"({VIDEO_NAME})_(\d+(?:\.\d+)?)")
WHOLE_NAME = re.compile(rf"({VIDEO_NAME})(?:_(denoised|mic))?")
FPS = 25
CONDFOLEY_RATE_HZ = 22050
CONDFOLEY_SECONDS = 2.0


class Hit(NamedTuple):
    """A line of `<video>_times.txt`."""

    seconds: float
    material: str | None
    action: str | None
    """hit or scratch."""
    reaction: str | None


class Part(NamedTuple):
    """A part of a video, as its name in a list says."""

    video: str
    start_seconds: float
    end_seconds: float


def hits(text: str, path: str) -> list[Hit]:
    """The hits of a video in the order of its file; `None` in it is None here. ValueError for a line of another form, which `path` helps to find."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        seconds, *words = line.split()
        if len(words) != 3 or not re.fullmatch(r"\d+(\.\d+)?", seconds):
            raise ValueError(f"{path}, line {number}: {line!r}; expected `seconds material action reaction`, as Greatest Hits has it")
        found.append(Hit(float(seconds), *(None if word == "None" else word for word in words)))
    return found


def label_of(material: str | None, action: str | None) -> str | None:
    """`wood hit`: what is hit, and how, as far as it is known."""
    return " ".join(word for word in (material, action) if word and word != "None") or None


def part_name(video: str, recording: str, seconds: float) -> str:
    """What the part around a hit is called."""
    return f"{video}_{recording}_{math.ceil(seconds * FPS)}"


def around(seconds: float, length_seconds: float) -> tuple[float, float]:
    """Where the part around a hit begins and ends, to a microsecond; one that would begin before the video is shorter."""
    return round(max(0.0, seconds - length_seconds / 2), 6), round(seconds + length_seconds / 2, 6)


def part_of(name: str) -> Part | None:
    """The part that a name of CondFoleyGen's lists stands for: `<video>_<sample>` or `<video>_<seconds, with a point>`; None for another name."""
    match = START_NAME.fullmatch(name)
    if match is None:
        return None
    start = float(match[2]) if "." in match[2] else int(match[2]) / CONDFOLEY_RATE_HZ
    return Part(match[1], round(start, 6), round(start + CONDFOLEY_SECONDS, 6))
