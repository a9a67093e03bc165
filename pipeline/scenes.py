"""Small physical scenes whose contacts are known exactly: bodies that fall, roll, swing and strike, as functions of time.

A scene gives its bodies' poses at any instant (closed form or event by event, never by time steps, so that a contact's time is
exact to rounding) and the list of its contacts. It knows no pixels, no samples and no files: `pipeline/render.py` draws it,
`pipeline/contact_sound.py` gives it its sound. Axes: x right, y up, z away from the camera; metres and seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, cos, pi, sin, sqrt

import numpy as np

GRAVITY = 9.81
MARGIN_SECONDS = 0.12
"""No contact this close to either end of a clip, where neither eye nor ear could confirm it."""
MIN_GAP_SECONDS = 0.1
"""Contacts closer together than this would be heard as one."""

Point = tuple[float, float, float]
Colour = tuple[float, float, float]

RESTITUTION = {"rubber": 0.82, "glass": 0.72, "metal": 0.66, "wood": 0.56}
DENSITY = {"rubber": 1.1, "glass": 2.5, "metal": 7.8, "wood": 0.7}
ADJECTIVE = {"rubber": "rubber", "glass": "glass", "metal": "metal", "wood": "wooden"}
FLOORS = ("planks", "tiles", "concrete")
FLOOR_NAME = {"planks": "wooden", "tiles": "tiled", "concrete": "concrete"}


@dataclass(frozen=True)
class Body:
    """A moving solid: every point within `radius_m` of the segment from `start` to `end`; a ball where the two are one point."""

    start: Point
    end: Point
    radius_m: float
    material: str
    colour: Colour
    spin_radians: float = 0.0


@dataclass(frozen=True)
class Box:
    """A solid that stays where it is, parallel to the axes."""

    low: Point
    high: Point
    material: str
    colour: Colour


@dataclass(frozen=True)
class Sounder:
    """What rings when struck: its material and size decide its partials, `voice` tells apart equal bodies of one clip."""

    material: str
    size_m: float
    voice: int = 0


@dataclass(frozen=True)
class Contact:
    """One strike: when, how hard (1 is the hardest that the scene's kind knows), and what sounds, the loudest first."""

    seconds: float
    strength: float
    sounders: tuple[tuple[Sounder, float], ...]

    @property
    def material(self) -> str:
        """Of the body that is heard most."""
        return self.sounders[0][0].material


@dataclass(frozen=True)
class Stage:
    """What does not move: floor, wall, boxes, camera and light."""

    floor: str
    floor_colour: Colour
    wall_colour: Colour
    wall_z: float
    boxes: tuple[Box, ...]
    camera: Point
    target: Point
    light: Point
    texture_seed: int


@dataclass(frozen=True)
class Scene:
    """A clip before it is drawn and sounded."""

    kind: str
    label: str
    stage: Stage
    bodies_at: Callable[[float], list[Body]]
    contacts: tuple[Contact, ...]


def draw_scene(rng: np.random.Generator, kind: str, *, seconds: float) -> Scene:
    """A scene of the kind, its contacts apart from one another and from the clip's ends. Draws again until they are."""
    assert kind in KINDS, kind
    for _ in range(10_000):
        scene = KINDS[kind](rng, seconds)
        times = [c.seconds for c in scene.contacts]
        apart = all(b - a >= MIN_GAP_SECONDS for a, b in pairwise(times))
        if len(times) >= 2 and apart and times[0] >= MARGIN_SECONDS and times[-1] < seconds - MARGIN_SECONDS:
            return scene
    raise ValueError(f"no {kind} scene fits into {seconds} s; use clips of 2 s or more")


def _bounce(rng: np.random.Generator, seconds: float) -> Scene:
    """Balls that fall one after another and bounce until they lie still."""
    floor = str(rng.choice(FLOORS))
    materials = [str(m) for m in rng.permutation(list(RESTITUTION))]
    balls: list[Callable[[float], list[Body]]] = []
    contacts: list[Contact] = []
    first, speed = rng.uniform(0.15, 0.6), rng.uniform(3.6, 4.6)
    lanes = rng.permutation([-0.28, 0.02, 0.3])
    names = []
    for lane, material in zip(lanes, materials, strict=False):
        radius = float(rng.uniform(0.11, 0.17))
        bounces = _bounces(first, speed, RESTITUTION[material])
        if bounces[0][0] > seconds - 0.4:
            break
        sounder = Sounder(material, radius, voice=len(balls))
        ground = Sounder("wood" if floor == "planks" else "stone", 0.5, voice=9)
        contacts += [Contact(t, min(1.0, v / 5.8), ((sounder, 1.0), (ground, 0.25))) for t, v in bounces if t < seconds]
        x0, vx = rng.uniform(0.1, 0.45) * (1, -1)[len(balls) % 2], rng.uniform(0.06, 0.16) * (-1, 1)[len(balls) % 2]
        colour = _body_colour(rng, material)
        balls.append(_bouncing_ball(bounces, radius, RESTITUTION[material], (x0, vx, float(lane)), material, colour))
        names.append(ADJECTIVE[material])
        first, speed = bounces[-1][0] + rng.uniform(0.35, 0.7), rng.uniform(5.3, 5.8)
    what = f"{names[0]} ball" if len(names) == 1 else " and ".join(names) + " balls"
    label = f"{what} bouncing on a {FLOOR_NAME[floor]} floor, indoors"
    stage = _stage(rng, floor, target_y=0.56, boxes=(), distance=(2.2, 2.5))
    return Scene("bounce", label, stage, lambda t: [b for ball in balls for b in ball(t)], tuple(sorted(contacts, key=lambda c: c.seconds)))


def _bounces(first: float, speed: float, restitution: float) -> list[tuple[float, float]]:
    """(time, speed) of every impact of a ball that first lands at `first`, until a flight is too short to hear apart."""
    impacts = [(first, speed)]
    while True:
        speed *= restitution
        flight = 2 * speed / GRAVITY
        if flight < MIN_GAP_SECONDS * 1.15:
            return impacts
        impacts.append((impacts[-1][0] + flight, speed))


def _bouncing_ball(
    bounces: list[tuple[float, float]], radius: float, restitution: float, path: tuple[float, float, float], material: str, colour: Colour
) -> Callable[[float], list[Body]]:
    x0, vx, z = path
    first, speed = bounces[0]

    def at(t: float) -> list[Body]:
        if t < first - speed / GRAVITY and first > 2 * speed / GRAVITY:
            return []  # a later ball comes in from above the picture; the first one's arc is in the picture from the start
        if t < first:
            height = speed * (first - t) - GRAVITY / 2 * (first - t) ** 2
        else:
            at_contact, at_speed = next(b for b in reversed(bounces) if b[0] <= t)
            rise = at_speed * restitution * (t - at_contact) - GRAVITY / 2 * (t - at_contact) ** 2
            height = max(0.0, rise)
        settled = max(0.0, t - bounces[-1][0])
        along = t - first - settled + (1 - np.exp(-1.5 * settled)) / 1.5  # rolls out after the last bounce
        x = x0 + vx * float(along)
        centre = (x, radius + height, z)
        return [Body(centre, centre, radius, material, colour, spin_radians=-(x - x0) / radius)]

    return at


def _bumper(rng: np.random.Generator, seconds: float) -> Scene:
    """Two balls that roll between two blocks, off these and off one another."""
    materials = [str(m) for m in rng.choice(["glass", "metal", "wood", "rubber"], size=2)]
    radii = [float(rng.uniform(0.10, 0.15)) for _ in range(2)]
    masses = [DENSITY[m] * r**3 for m, r in zip(materials, radii, strict=True)]
    blocks = str(rng.choice(["wood", "stone"]))
    edge, thick, tall = 0.54, 0.13, float(rng.uniform(0.22, 0.34))
    position = [float(rng.uniform(-0.36, -0.2)), float(rng.uniform(0.2, 0.36))]
    speed = [float(rng.uniform(0.7, 1.5)), -float(rng.uniform(0.5, 1.4))]
    # Knots: (time, positions, speeds) at every event; straight lines between them, a little speed lost at each.
    reach = 2 * sqrt(radii[0] * radii[1])  # how near two balls on a floor come, centre to centre along it
    knots, contacts, now = [(0.0, tuple(position), tuple(speed))], [], 0.0
    sounders = [Sounder(m, r, voice=i) for i, (m, r) in enumerate(zip(materials, radii, strict=True))]
    block = Sounder(blocks, 0.25, voice=5)
    while now < seconds:
        closing = speed[0] - speed[1]
        events = [((position[1] - position[0] - reach) / closing, 2)] if closing > 1e-6 else []
        if speed[0] < 0:
            events.append(((-edge + radii[0] - position[0]) / speed[0], 0))
        if speed[1] > 0:
            events.append(((edge - radii[1] - position[1]) / speed[1], 1))
        if not events:
            break
        wait, who = min(events)
        now += wait
        position = [p + v * wait for p, v in zip(position, speed, strict=True)]
        if who == 2:
            impact = closing
            speed = _collide(speed, masses, restitution=0.94)
            louder = 0 if materials[0] != "rubber" else 1
            sound = ((sounders[louder], 0.8), (sounders[1 - louder], 0.6))
        else:
            impact = abs(speed[who])
            speed[who] *= -0.92
            sound = ((block, 0.7), (sounders[who], 0.55))
        if now < seconds:
            contacts.append(Contact(now, min(1.0, 0.25 + 0.3 * impact), sound))
        knots.append((now, tuple(position), tuple(speed)))

    colours = [_body_colour(rng, m) for m in materials]

    def at(t: float) -> list[Body]:
        since, where, how_fast = next(k for k in reversed(knots) if k[0] <= t)
        bodies = []
        for i in range(2):
            x = where[i] + how_fast[i] * (t - since)
            bodies.append(Body((x, radii[i], 0.0), (x, radii[i], 0.0), radii[i], materials[i], colours[i], spin_radians=-x / radii[i]))
        return bodies

    block_colour = _block_colour(rng, blocks)
    boxes = tuple(
        Box((min(x, x + s * thick), 0.0, -0.22), (max(x, x + s * thick), tall, 0.22), blocks, block_colour) for x, s in ((-edge, -1), (edge, 1))
    )
    names = [ADJECTIVE[m] for m in materials]
    what = f"two {names[0]} balls" if names[0] == names[1] else f"a {names[0]} and a {names[1]} ball"
    floor = str(rng.choice(FLOORS))
    stage = _stage(rng, floor, target_y=0.2, boxes=boxes, height=(0.6, 0.95), distance=(1.75, 2.0))
    return Scene("bumper", f"{what} colliding between {'wooden' if blocks == 'wood' else 'stone'} blocks", stage, at, tuple(contacts))


def _collide(speed: list[float], masses: list[float], *, restitution: float) -> list[float]:
    total = sum(masses)
    centre = (masses[0] * speed[0] + masses[1] * speed[1]) / total
    closing = speed[0] - speed[1]
    return [centre - masses[1] / total * restitution * closing, centre + masses[0] / total * restitution * closing]


def _mallet(rng: np.random.Generator, seconds: float) -> Scene:
    """A mallet that strikes a row of bars in an uneven rhythm."""
    material = str(rng.choice(["metal", "wood", "glass"]))
    head = str(rng.choice(["wood", "rubber"]))
    count = int(rng.integers(3, 6))
    table_top = float(rng.uniform(0.16, 0.26))
    width, gap = 0.13, 0.045
    lefts = [(i - count / 2) * (width + gap) + gap / 2 for i in range(count)]
    lengths = [0.62 - 0.1 * i for i in range(count)]
    hue = rng.uniform(0, 1)
    bars = [
        Box((x, table_top, -n / 2), (x + width, table_top + 0.035, n / 2), material, _bar_colour(rng, material, hue + 0.16 * i))
        for i, (x, n) in enumerate(zip(lefts, lengths, strict=True))
    ]
    table = Box((lefts[0] - 0.06, 0.0, -0.24), (lefts[-1] + width + 0.06, table_top, 0.24), "wood", _block_colour(rng, "wood"))
    radius, top = 0.065, table_top + 0.035
    # Strikes from before the clip to after it, so that the mallet is always between two.
    times = [float(rng.uniform(-0.5, -0.1))]
    while times[-1] < seconds:
        times.append(times[-1] + float(rng.uniform(0.3, 0.85)))
    which = rng.integers(0, count, size=len(times))
    heights = [min(0.42, 0.62 * (b - a)) * float(rng.uniform(0.75, 1.0)) for a, b in pairwise(times)]
    contacts = []
    for i in range(1, len(times)):
        if 0 <= times[i] < seconds:
            impact = pi * heights[i - 1] / (times[i] - times[i - 1])
            bar = Sounder(material, 0.55 * lengths[which[i]], voice=int(which[i]))
            contacts.append(Contact(times[i], min(1.0, impact / 2.0), ((bar, 1.0), (Sounder(head, radius, voice=7), 0.3))))
    head_colour, stick_colour = _body_colour(rng, head), (0.52, 0.34, 0.17)

    def at(t: float) -> list[Body]:
        i = max(k for k in range(len(times)) if times[k] <= t or k == 0)
        i = min(i, len(times) - 2)
        u = min(1.0, max(0.0, (t - times[i]) / (times[i + 1] - times[i])))
        glide = u * u * (3 - 2 * u)
        x_from, x_to = (lefts[which[k]] + width / 2 for k in (i, i + 1))
        lift = heights[i] * sin(pi * u)
        x, y = x_from + (x_to - x_from) * glide, top + radius + lift
        centre = (x, y, -0.02)
        tail = (x + 0.16, y + 0.14 + 0.35 * lift, -0.55)
        return [Body(centre, tail, 0.013, "wood", stick_colour), Body(centre, centre, radius, head, head_colour)]

    floor = str(rng.choice(FLOORS))
    noun = {"metal": "metal bars", "wood": "wooden bars", "glass": "glass bars"}[material]
    stage = _stage(rng, floor, target_y=0.36, boxes=(table, *bars), height=(0.85, 1.15), distance=(1.45, 1.7))
    return Scene("mallet", f"{ADJECTIVE[head]} mallet striking {noun}, percussion", stage, at, tuple(contacts))


def _swings(rng: np.random.Generator, seconds: float) -> Scene:
    """Two pendulums that swing against a block from both sides (small-angle law; half a period from hit to hit)."""
    block_material = str(rng.choice(["wood", "stone", "metal"]))
    half, block_top, beam = float(rng.uniform(0.09, 0.14)), float(rng.uniform(0.55, 0.75)), 1.12
    boxes = [
        Box((-half, 0.0, -0.2), (half, block_top, 0.2), block_material, _block_colour(rng, block_material)),
        Box((-0.62, beam, -0.04), (0.62, beam + 0.05, 0.04), "wood", (0.36, 0.22, 0.11)),
    ]
    contacts: list[Contact] = []
    swings = []
    materials = [str(m) for m in rng.choice(["metal", "wood", "glass", "rubber"], size=2)]
    block = Sounder(block_material, 0.3, voice=5)
    for side, material in zip((-1, 1), materials, strict=True):
        radius = float(rng.uniform(0.075, 0.11))
        length = float(rng.uniform(beam - block_top + 0.12, beam - 0.3))
        omega = sqrt(GRAVITY / length)
        amplitude, keep = float(rng.uniform(0.5, 0.7)) * min(1.0, 0.55 / length), float(rng.uniform(0.84, 0.9))
        first = float(rng.uniform(0.15, pi / omega))
        hits = [first + k * pi / omega for k in range(-1, ceil(seconds * omega / pi) + 1)]
        sounder = Sounder(material, radius, voice=(side + 1) // 2)
        for k, t in enumerate(hits):
            if 0 <= t < seconds:
                impact = amplitude * keep ** (k - 1) * omega * length
                contacts.append(Contact(t, min(1.0, impact / 1.8), ((sounder, 0.9), (block, 0.6))))
        swings.append((side, radius, length, omega, amplitude, keep, hits, material, _body_colour(rng, material)))

    def at(t: float) -> list[Body]:
        bodies = []
        for side, radius, length, omega, amplitude, keep, hits, material, colour in swings:
            k = max(i for i, h in enumerate(hits) if h <= t)
            angle = amplitude * keep**k * sin(omega * (t - hits[k]))
            x0 = side * (half + radius)
            centre = (x0 + side * length * sin(angle), beam - length * cos(angle), 0.0)
            bodies += [Body((x0, beam, 0.0), centre, 0.006, "cord", (0.12, 0.11, 0.1)), Body(centre, centre, radius, material, colour, side * angle)]
        return bodies

    floor = str(rng.choice(FLOORS))
    names = [ADJECTIVE[m] for m in materials]
    what = f"{names[0]} pendulums" if names[0] == names[1] else f"{names[0]} and {names[1]} pendulums"
    block_name = {"wood": "wooden", "stone": "stone", "metal": "metal"}[block_material]
    stage = _stage(rng, floor, target_y=0.58, boxes=tuple(boxes), height=(0.6, 0.95), distance=(2.1, 2.4))
    return Scene("swings", f"{what} hitting a {block_name} block", stage, at, tuple(sorted(contacts, key=lambda c: c.seconds)))


KINDS: dict[str, Callable[[np.random.Generator, float], Scene]] = {"bounce": _bounce, "mallet": _mallet, "bumper": _bumper, "swings": _swings}
"""By name; every name has six letters, so that a name, a dash and four digits make an identifier as long as YouTube's."""


def _stage(
    rng: np.random.Generator,
    floor: str,
    *,
    target_y: float,
    boxes: tuple[Box, ...],
    height: tuple[float, float] = (0.7, 1.2),
    distance: tuple[float, float] = (2.5, 2.9),
) -> Stage:
    walls = [
        (0.62, 0.66, 0.68),
        (0.70, 0.60, 0.47),
        (0.36, 0.46, 0.52),
        (0.56, 0.62, 0.50),
        (0.66, 0.48, 0.42),
        (0.30, 0.33, 0.40),
        (0.72, 0.70, 0.64),
    ]
    tones = {
        "planks": [(0.46, 0.27, 0.13), (0.58, 0.39, 0.21), (0.30, 0.18, 0.10)],
        "tiles": [(0.62, 0.60, 0.56), (0.42, 0.47, 0.50), (0.58, 0.44, 0.36)],
        "concrete": [(0.42, 0.42, 0.41), (0.50, 0.47, 0.43)],
    }[floor]
    return Stage(
        floor=floor,
        floor_colour=_jitter(rng, tones[int(rng.integers(len(tones)))]),
        wall_colour=_jitter(rng, walls[int(rng.integers(len(walls)))]),
        wall_z=float(rng.uniform(0.7, 1.3)),
        boxes=boxes,
        camera=(float(rng.uniform(-0.35, 0.35)), float(rng.uniform(*height)), -float(rng.uniform(*distance))),
        target=(0.0, target_y, 0.0),
        light=(float(rng.choice([-1.0, 1.0]) * rng.uniform(0.35, 0.75)), 1.0, -float(rng.uniform(0.25, 0.7))),
        texture_seed=int(rng.integers(2**31)),
    )


def _jitter(rng: np.random.Generator, colour: Colour, spread: float = 0.05) -> Colour:
    r, g, b = (float(np.clip(c * (1 + rng.uniform(-spread, spread)), 0, 1)) for c in colour)
    return r, g, b


def _body_colour(rng: np.random.Generator, material: str) -> Colour:
    choices = {
        "metal": [(0.82, 0.83, 0.85), (0.92, 0.70, 0.34), (0.88, 0.52, 0.36)],
        "wood": [(0.62, 0.38, 0.18), (0.74, 0.52, 0.28), (0.42, 0.23, 0.11)],
        "glass": [(0.62, 0.88, 0.82), (0.60, 0.76, 0.95), (0.92, 0.72, 0.60)],
        "rubber": [(0.78, 0.08, 0.06), (0.06, 0.26, 0.66), (0.90, 0.48, 0.04), (0.05, 0.45, 0.22), (0.85, 0.72, 0.08)],
    }[material]
    return _jitter(rng, choices[int(rng.integers(len(choices)))])


def _block_colour(rng: np.random.Generator, material: str) -> Colour:
    choices = {
        "wood": [(0.55, 0.34, 0.17), (0.38, 0.22, 0.11), (0.68, 0.49, 0.28)],
        "stone": [(0.40, 0.40, 0.39), (0.52, 0.50, 0.46)],
        "metal": [(0.55, 0.57, 0.60)],
    }[material]
    return _jitter(rng, choices[int(rng.integers(len(choices)))])


def _bar_colour(rng: np.random.Generator, material: str, hue: float) -> Colour:
    if material == "wood":
        return _body_colour(rng, material)
    deep = 0.34 if material == "metal" else 0.24  # lacquered metal; tinted glass
    r, g, b = (0.50 + deep * cos(2 * pi * (hue - k / 3)) for k in range(3))
    return r, g, b
