"""Draws scenes: a numpy ray caster for balls, rods and boxes under one soft light, at a millisecond or two a frame.

What stands still (floor, wall, boxes and the light on them) is drawn once per clip at twice the size; a frame adds the moving
bodies, their soft shadows and their reflections in the floor, each inside its own rectangle of the picture. Everything that
moves is one shape, the points within a radius of a segment (a ball where its ends meet), and one formula, a line's closest
approach to a segment, gives its outline, its shading and its shadow. It knows no time, no sound and no files.

Pictures are planar float32 arrays `[3, height, width]` of linear light until the last step.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray as Array

from pipeline.scenes import Body, Box, Scene, Stage

FIELD_OF_VIEW = 0.62  # radians from the lower edge to the upper
LIGHT_RADIUS = 0.14  # how wide the light is, as the tangent of its angle: what makes shadows soft
LIGHT = np.array([1.05, 0.99, 0.90], np.float32) * 0.95
SKY = np.array([0.92, 0.96, 1.04], np.float32)
AMBIENT = 0.42


@dataclass(frozen=True)
class Surface:
    """How a material answers light."""

    gloss: float
    shininess: float
    mirror: float  # 1: all it shows is reflection, as metal; 0: none but at grazing angles
    clear: float = 0.0  # how much of what is behind it shows through


SURFACES = {
    "rubber": Surface(gloss=0.25, shininess=24.0, mirror=0.0),
    "wood": Surface(gloss=0.12, shininess=40.0, mirror=0.0),
    "metal": Surface(gloss=0.9, shininess=160.0, mirror=0.85),
    "glass": Surface(gloss=1.0, shininess=260.0, mirror=0.0, clear=0.82),
    "stone": Surface(gloss=0.06, shininess=12.0, mirror=0.0),
    "cord": Surface(gloss=0.05, shininess=8.0, mirror=0.0),
}
POLISH = {"planks": 0.16, "tiles": 0.26, "concrete": 0.05}

Planes = Float[Array, "3 height width"]
Vector = Float[Array, "3"]
Area = tuple[slice, slice]
"""Rows and columns of a rectangle of the picture."""


class Renderer:
    """Draws one scene's frames."""

    def __init__(self, scene: Scene, *, width: int, height: int) -> None:
        stage = scene.stage
        self._scene = scene
        self._view = View(stage, width=width, height=height)
        self._light = _unit(np.array(stage.light, np.float32))
        self._still = _draw_still(stage, self._view, self._light)
        self._floor_colour = np.array(stage.floor_colour, np.float32)
        self._wall_colour = np.array(stage.wall_colour, np.float32)
        # Between frames these hold what stands still, but for the areas that the last frame touched.
        self._picture, self._finished = self._still.unshaded.copy(), self._still.finished.copy()
        self._touched: list[Area] = []
        self._direct, self._ambient = (np.ones((height, width), np.float32) for _ in range(2))

    def frame(self, seconds: float) -> UInt8[Array, "height width 3"]:
        """The picture at an instant, RGB."""
        bodies = self._scene.bodies_at(seconds)
        bodies.sort(key=lambda b: -b.start[2])  # the farthest first
        solid = [b for b in bodies if b.material != "cord"]  # a cord's shadow would be too faint to see
        picture = self._picture
        for rows, columns in self._touched:
            picture[:, rows, columns] = self._still.unshaded[:, rows, columns]
            self._finished[rows, columns] = self._still.finished[rows, columns]
        touched = self._shade(picture, solid)
        touched += [self._reflect_in_floor(picture, body) for body in solid]
        touched += [self._draw(picture, body, others=solid) for body in bodies]
        self._touched = _outermost([area for area in touched if area is not None])
        for rows, columns in self._touched:
            self._finished[rows, columns] = _develop(picture[:, rows, columns])
        return self._finished.copy()

    def _shade(self, picture: Planes, bodies: list[Body]) -> list[Area | None]:
        """Takes from the still picture the light that bodies keep away; where two bodies' shadows meet, both take theirs.

        Shadows are soft, so they are worked out for every other pixel of every other row.
        """
        still = self._still
        areas = [self._view.rectangle(_shadow_corners(b, self._light)) for b in bodies]
        direct, ambient = self._direct, self._ambient
        for body, area in zip(bodies, areas, strict=True):
            if area is not None:
                rows, columns = area
                point, normal = still.point[:, rows, columns][:, ::2, ::2], still.normal[:, rows, columns][:, ::2, ::2]
                direct[rows, columns] *= _finer(_light_past(point, self._light, body), direct[rows, columns].shape)
                ambient[rows, columns] *= _finer(1 - _blocked_sky(point, normal, body), direct[rows, columns].shape)
        for rows, columns in (area for area in areas if area is not None):
            picture[:, rows, columns] = (
                still.ambient[:, rows, columns] * ambient[rows, columns] + still.direct[:, rows, columns] * direct[rows, columns]
            )
        for rows, columns in (area for area in areas if area is not None):
            direct[rows, columns] = ambient[rows, columns] = 1
        return areas

    def _reflect_in_floor(self, picture: Planes, body: Body) -> Area | None:
        """A polished floor's faint upside-down image of a body."""
        polish = POLISH[self._scene.stage.floor]
        mirrored = Body(_below(body.start), _below(body.end), body.radius_m, body.material, body.colour, -body.spin_radians)
        area = self._view.rectangle(_corners(mirrored.start, mirrored.end, mirrored.radius_m))
        if area is None:
            return None
        rays = self._view.rays[:, area[0], area[1]]
        _, offset, distance, _ = _approach(self._view.camera, rays, mirrored)
        blur = 1.5 * self._view.pixel + 0.04 * max(0.0, body.start[1] - body.radius_m)
        cover = np.clip((body.radius_m - distance) / (2 * blur) + 0.5, 0, 1) * self._still.is_floor[area[0], area[1]]
        grazing = (1 + rays[1]) ** 3 * (0.6 + 0.4 * cover)
        colour = np.array(body.colour, np.float32)[:, None, None] * (0.45 + 0.35 * np.clip(-offset[1:2] / body.radius_m, -1, 1))
        weight = polish * cover * grazing
        picture[:, area[0], area[1]] += weight * (colour - 0.6 * picture[:, area[0], area[1]])
        return area

    def _draw(self, picture: Planes, body: Body, *, others: list[Body]) -> Area | None:
        area = self._view.rectangle(_corners(body.start, body.end, body.radius_m))
        if area is None:
            return None
        rays = self._view.rays[:, area[0], area[1]]
        along, offset, distance, axis = _approach(self._view.camera, rays, body)
        cover = np.clip((body.radius_m - distance) / (along * self._view.pixel) + 0.5, 0, 1)
        cover *= along - body.radius_m < self._still.depth[area[0], area[1]] + 0.02
        covered = cover > 0  # from here on the covered pixels alone, as a picture one pixel high
        along, distance, cover = (v[covered][None] for v in (along, distance, cover))
        rays, offset, axis = (v[:, covered][:, None] for v in (rays, offset, axis))
        region = picture[:, area[0], area[1]]
        behind, opposite = region[:, covered][:, None], region[:, ::-1, ::-1][:, covered][:, None]
        depth = np.sqrt(np.maximum(body.radius_m**2 - distance**2, 0))
        normal = (offset - axis * depth) / np.maximum(np.sqrt(distance**2 + depth**2), 1e-6)
        point = self._view.camera[:, None, None] + rays * (along - depth)
        visible = np.ones_like(cover)
        for other in others:
            if other is not body and body.material != "cord" and _may_shade(other, body, self._light):
                visible *= _light_past(point, self._light, other)
        colour = self._light_up(body, rays, normal, point, visible, opposite)
        region[:, covered] = (behind + cover * (colour - behind))[:, 0]
        return area

    def _light_up(self, body: Body, rays: Planes, normal: Planes, point: Planes, visible: Float[Array, "height width"], opposite: Planes) -> Planes:
        surface = SURFACES[body.material]
        base = _skin(body, normal)
        facing = np.clip(_dot(normal, self._light[:, None, None]), 0, 1) * visible
        up = 0.5 + 0.5 * normal[1]
        lifted = np.clip(point[1] / (2.2 * body.radius_m), 0, 1)  # near the floor, little comes from below
        around = self._floor_colour[:, None, None] * (0.25 + 0.75 * lifted) * (1 - up) + SKY[:, None, None] * up
        colour = base * (AMBIENT * around * (0.45 + 0.55 * np.maximum(up, lifted)) + LIGHT[:, None, None] * facing)
        towards = -_dot(rays, normal)
        reflected = rays + 2 * towards * normal
        fresnel = np.clip(1 - towards, 0, 1) ** 5
        if surface.mirror > 0:
            colour = (1 - surface.mirror) * colour + surface.mirror * (base + (1 - base) * fresnel) * self._surroundings(reflected, point)
        elif surface.clear > 0:
            caustic = np.clip(-_dot(normal, self._light[:, None, None]) - 0.55, 0, 1) * 0.9  # a ball of glass gathers the light on its far side,
            through = opposite + caustic  # and turns what is behind it upside down
            colour = (1 - surface.clear) * colour + surface.clear * base * (0.35 + 0.65 * np.clip(towards, 0, 1)) * through
            colour = colour + (0.06 + 0.94 * fresnel) * 0.8 * self._surroundings(reflected, point)
        else:
            colour = colour + 0.22 * fresnel * self._surroundings(reflected, point)
        glint = np.clip(_dot(_unit_planes(self._light[:, None, None] - rays), normal), 0, 1) ** surface.shininess
        return colour + surface.gloss * glint * visible * 1.6

    def _surroundings(self, direction: Planes, point: Planes) -> Planes:
        """What a mirror at a point sees: the floor below, the room above, a bright window on the light's side."""
        down = np.clip(-direction[1] * 3 + 0.15, 0, 1)
        near = 0.35 + 0.65 * np.clip(point[1] / np.maximum(-direction[1], 0.05) * 1.5, 0, 1)  # the floor close by lies in shadow
        room = self._wall_colour[:, None, None] * (0.35 + 0.35 * np.clip(direction[1] + 0.3, 0, 1)) + 0.25 * np.clip(direction[1], 0, 1) ** 2
        window = np.clip((_dot(direction, self._light[:, None, None]) - 0.86) * 14, 0, 1) * 1.5
        dark_room = 0.55 + 0.45 * np.clip(direction[2] + 0.6, 0, 1)  # behind the camera there is less light
        return down * near * self._floor_colour[:, None, None] * 0.85 + (1 - down) * room * dark_room + window


class View:
    """A camera: a ray for every pixel, and where a point falls."""

    def __init__(self, stage: Stage, *, width: int, height: int) -> None:
        self.camera = np.array(stage.camera, np.float32)
        forward = _unit(np.array(stage.target, np.float32) - self.camera)
        right = _unit(np.cross(np.array([0, 1, 0], np.float32), forward))
        self._axes = np.stack([right, np.cross(forward, right), forward]).astype(np.float32)
        self.width, self.height = width, height
        self.pixel = float(np.tan(FIELD_OF_VIEW / 2) * 2 / height)
        """Size of a pixel at unit distance."""
        self.rays = self.cast(1)

    def cast(self, oversampling: int) -> Planes:
        """Unit rays through the centres of the pixels of a picture this many times as large."""
        across = (np.arange(self.width * oversampling, dtype=np.float32) + 0.5) / oversampling - self.width / 2
        down = self.height / 2 - (np.arange(self.height * oversampling, dtype=np.float32) + 0.5) / oversampling
        right, up, forward = self._axes
        rays = forward[:, None, None] + self.pixel * (right[:, None, None] * across[None, None, :] + up[:, None, None] * down[None, :, None])
        return _unit_planes(rays.astype(np.float32))

    def project(self, points: Float[Array, "n 3"]) -> Float[Array, "n 2"]:
        """Pixel coordinates (column, row) of points in front of the camera."""
        x, y, z = self._axes @ (points - self.camera).T
        z = np.maximum(z, 0.05)
        return np.stack([x / z / self.pixel + self.width / 2, self.height / 2 - y / z / self.pixel], axis=1)

    def rectangle(self, corners: Float[Array, "n 3"]) -> Area | None:
        """Rows and columns that hold the projections, or None outside the picture."""
        columns_rows = self.project(corners)
        left, top = np.floor(columns_rows.min(axis=0)).astype(int) - 1
        right, bottom = np.ceil(columns_rows.max(axis=0)).astype(int) + 2
        left, right, top, bottom = max(left, 0), min(right, self.width), max(top, 0), min(bottom, self.height)
        return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None


@dataclass(frozen=True)
class Still:
    """The picture without bodies, its light in two parts, and where each pixel's point lies."""

    ambient: Planes
    direct: Planes
    unshaded: Planes
    finished: UInt8[Array, "height width 3"]
    point: Planes
    normal: Planes
    depth: Float[Array, "height width"]
    is_floor: Float[Array, "height width"]


def _draw_still(stage: Stage, view: View, light: Vector) -> Still:
    fine = view.cast(2)
    point, normal, _, which = _cast_still(stage, view.camera, fine)
    albedo, gloss = _texture(stage, point, normal, which)
    shadow = _box_shadows(stage, view, light)
    facing = np.clip(_dot(normal, light[:, None, None]), 0, 1)
    up = 0.5 + 0.5 * normal[1]
    hollow = _box_hollows(stage, point, which) * _corner_hollow(stage, point, which)
    falloff = 1.08 - 0.10 * (point[0] ** 2 + (point[1] - 0.6) ** 2)
    ambient = albedo * (AMBIENT * (0.72 + 0.28 * up) * hollow)[None] * SKY[:, None, None]
    direct = albedo * (facing * np.repeat(np.repeat(shadow, 2, 0), 2, 1) * falloff)[None] * LIGHT[:, None, None]
    glint = np.clip(_dot(_unit_planes(light[:, None, None] - fine), normal), 0, 1) ** 60
    direct = direct + (gloss * glint)[None]
    point_1x, normal_1x, depth_1x, which_1x = _cast_still(stage, view.camera, view.rays)
    ambient, direct = _halve(ambient), _halve(direct)
    unshaded = ambient + direct
    return Still(
        ambient, direct, unshaded, np.ascontiguousarray(_develop(unshaded)), point_1x, normal_1x, depth_1x, (which_1x == 0).astype(np.float32)
    )


def _cast_still(stage: Stage, camera: Vector, rays: Planes) -> tuple[Planes, Planes, Float[Array, "height width"], Array]:
    """Where each ray ends: point, normal, distance and what was hit (0 floor, 1 wall, 2 and on the boxes)."""
    with np.errstate(divide="ignore"):
        inverse = (1 / rays).astype(np.float32)
    floor = np.where(rays[1] < -1e-4, -camera[1] * inverse[1], np.float32(np.inf)).astype(np.float32)
    wall = ((stage.wall_z - camera[2]) * inverse[2]).astype(np.float32)
    depth = np.minimum(floor, wall)
    which = (wall < floor).astype(np.int32)
    normal = np.zeros_like(rays)
    normal[1] = which == 0
    normal[2] = -(which == 1).astype(np.float32)
    for i, box in enumerate(stage.boxes):
        near, far, planes = _slab(box, camera[:, None, None], inverse)
        hit = (near < far) & (near > 0) & (near < depth)
        depth = np.where(hit, near, depth)
        which = np.where(hit, i + 2, which)
        for k in range(3):
            normal[k] = np.where(hit, np.where(planes[k] == near, -np.sign(rays[k]), 0), normal[k])
    return camera[:, None, None] + rays * depth, normal, depth, which


def _slab(box: Box, origin: Array, inverse: Array) -> tuple[Array, Array, Array]:
    """Where rays enter and leave a box, and where they pass each axis's first plane: they enter through the last of these."""
    low, high = (np.array(c, np.float32)[:, None, None] for c in (box.low, box.high))
    a, b = (low - origin) * inverse, (high - origin) * inverse
    first = np.minimum(a, b)
    return _largest(first), -_largest(-np.maximum(a, b)), first


def _box_shadows(stage: Stage, view: View, light: Vector) -> Float[Array, "height width"]:
    """How much of the wide light each pixel's point sees past the boxes: the share of a dozen points of it."""
    shadow = np.ones((view.height, view.width), np.float32)
    if not stage.boxes:
        return shadow
    point, normal, _, _ = _cast_still(stage, view.camera, view.rays)
    origin = point + normal * 2e-3
    side = _unit(np.cross(light, np.array([0, 0, 1], np.float32)))
    other = np.cross(light, side)
    blocked = np.zeros_like(shadow)
    samples = 14
    for i in range(samples):
        angle, out = 2.399963 * i, LIGHT_RADIUS * np.sqrt((i + 0.5) / samples)  # a sunflower's arrangement covers a disc evenly
        direction = _unit(light + out * (np.cos(angle) * side + np.sin(angle) * other)).astype(np.float32)
        inverse = (1 / np.where(np.abs(direction) < 1e-6, 1e-6, direction))[:, None, None].astype(np.float32)
        hit = np.zeros(shadow.shape, bool)
        for box in stage.boxes:
            near, far, _ = _slab(box, origin, inverse)
            hit |= (near < far) & (far > 1e-3)
        blocked += hit
    return 1 - _smooth(blocked / samples)


def _smooth(x: Float[Array, "height width"]) -> Float[Array, "height width"]:
    """A three by three mean: takes the steps out of a dozen samples."""
    padded = np.pad(x, 1, mode="edge")
    rows = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 3


def _box_hollows(stage: Stage, point: Planes, which: Array) -> Float[Array, "height width"]:
    """Ambient light lost where a box stands on or beside something."""
    hollow = np.ones(which.shape, np.float32)
    for i, box in enumerate(stage.boxes):
        low, high = (np.array(c, np.float32)[:, None, None] for c in (box.low, box.high))
        away = np.maximum(np.maximum(low - point, point - high), 0)
        distance = np.sqrt((away**2).sum(axis=0))
        hollow *= np.where(which == i + 2, 1, 1 - 0.55 * np.exp(-distance / 0.07))
    on_floor = np.exp(-np.clip(point[1], 0, None) / 0.06)
    return hollow * np.where(which >= 2, 1 - 0.4 * on_floor, 1)


def _corner_hollow(stage: Stage, point: Planes, which: Array) -> Float[Array, "height width"]:
    """The edge where floor and wall meet is darker."""
    gap = np.where(which == 0, stage.wall_z - point[2], np.where(which == 1, point[1], 10))
    return 1 - 0.45 * np.exp(-np.clip(gap, 0, None) / 0.12)


def _texture(stage: Stage, point: Planes, normal: Planes, which: Array) -> tuple[Planes, Float[Array, "height width"]]:
    """Colour and gloss of everything that stands still."""
    rng = np.random.Generator(np.random.Philox(stage.texture_seed))
    noise = rng.random((64, 64), np.float32)
    albedo, gloss = np.empty_like(point), np.zeros(which.shape, np.float32)
    floor, wall = which == 0, which == 1
    colour, shine = _floor_texture(stage, point[:, floor][:, None], noise)
    albedo[:, floor], gloss[floor] = colour[:, 0], shine[0]
    albedo[:, wall] = _wall_texture(stage, point[:, wall][:, None], noise)[:, 0]
    for i, box in enumerate(stage.boxes):
        mask = which == i + 2
        if not mask.any():
            continue
        albedo[:, mask] = _box_texture(box, point[:, mask], normal[:, mask], noise)
        gloss[mask] = SURFACES[box.material].gloss * 0.5
    return albedo, gloss


def _floor_texture(stage: Stage, point: Planes, noise: Array) -> tuple[Planes, Float[Array, "height width"]]:
    x, z = point[0], point[2]
    colour = np.array(stage.floor_colour, np.float32)[:, None, None]
    if stage.floor == "planks":
        row = np.floor(z / 0.13)
        shift = _hash(row) * 1.7
        column = np.floor((x + shift) / 1.25)
        tone = 0.80 + 0.36 * _hash(row * 7.3 + column * 3.1)
        grain = _value_noise(noise, x * 2.2 + 11 * row, z * 42) * 0.65 + _value_noise(noise, x * 9, z * 130 + 5 * row) * 0.35
        seam = np.minimum(_groove(z / 0.13, 0.020), _groove((x + shift) / 1.25, 0.0025))
        return colour * (tone * (0.76 + 0.44 * grain) * (0.45 + 0.55 * seam))[None], (0.10 + 0.10 * grain) * seam
    if stage.floor == "tiles":
        size = 0.34
        u, v = x / size + 0.37, z / size + 0.12
        chess = (np.floor(u) + np.floor(v)) % 2
        mottle = _value_noise(noise, x * 9, z * 9) * 0.6 + _value_noise(noise, x * 31, z * 31) * 0.4
        seam = np.minimum(_groove(u, 0.016), _groove(v, 0.016))
        tone = (0.66 + 0.36 * chess) * (0.88 + 0.22 * mottle)
        return colour * tone[None] * (0.62 + 0.38 * seam)[None], 0.28 * seam
    mottle = 0.5 * _value_noise(noise, x * 2.1, z * 2.1) + 0.3 * _value_noise(noise, x * 9, z * 9) + 0.2 * _value_noise(noise, x * 60, z * 60)
    return colour * (0.76 + 0.46 * mottle)[None], np.full(x.shape, 0.04, np.float32)


def _wall_texture(stage: Stage, point: Planes, noise: Array) -> Planes:
    x, y = point[0], point[1]
    plaster = 0.965 + 0.05 * _value_noise(noise, x * 3, y * 3) + 0.03 * _value_noise(noise, x * 47, y * 47)
    wall = np.array(stage.wall_colour, np.float32)[:, None, None] * plaster[None]
    board = (y < 0.11)[None]
    edge = 0.72 + 0.28 * _groove((y - 0.11) / 0.3, 0.02)
    skirting = np.array([0.80, 0.78, 0.74], np.float32)[:, None, None] * np.ones_like(wall)
    return np.where(board, skirting, wall) * edge[None]


def _box_texture(box: Box, point: Float[Array, "3 n"], normal: Float[Array, "3 n"], noise: Array) -> Float[Array, "3 n"]:
    colour = np.array(box.colour, np.float32)[:, None]
    x, y, z = point
    if box.material == "wood":
        grain = 0.7 * _value_noise(noise, x * 4 + z * 3, y * 45 + z * 25 * np.abs(normal[1])) + 0.3 * _value_noise(noise, x * 13, (y + z) * 120)
        tone = 0.74 + 0.46 * grain
    elif box.material == "metal":
        sheen = 0.5 + 0.5 * np.sin(6 * z + 9 * x + 3 * y)
        tone = 0.72 + 0.34 * sheen * np.abs(normal[1]) + 0.06 * _value_noise(noise, x * 150, z * 3)
    elif box.material == "glass":
        tone = 0.80 + 0.30 * np.clip((z - box.low[2]) / (box.high[2] - box.low[2]), 0, 1)
    else:
        tone = 0.72 + 0.3 * _value_noise(noise, x * 14 + z * 9, y * 14 + z * 5) + 0.2 * _value_noise(noise, x * 70 + z * 31, y * 70)
    corner = np.minimum(point - np.array(box.low, np.float32)[:, None], np.array(box.high, np.float32)[:, None] - point)
    bevel = np.exp(-np.sort(corner, axis=0)[1] / 0.006)  # light caught along the edges
    return colour * tone[None] * (1 + 0.35 * bevel)[None]


def _skin(body: Body, normal: Planes) -> Planes:
    """A body's colour at each point of its surface, turned with its spin so that rolling shows."""
    base = np.array(body.colour, np.float32)[:, None, None]
    if body.start != body.end:
        return base * np.ones_like(normal[:1])
    c, s = np.float32(np.cos(body.spin_radians)), np.float32(np.sin(body.spin_radians))
    x, y, z = c * normal[0] + s * normal[1], c * normal[1] - s * normal[0], normal[2]
    if body.material == "rubber":
        stripe = np.clip((np.abs(y + 0.15 * z) - 0.24) * 14 + 0.5, 0, 1)
        return base * stripe + np.array([0.88, 0.86, 0.80], np.float32)[:, None, None] * (1 - stripe)
    if body.material == "wood":
        rings = np.sin(17 * (y + 0.3 * x) + 2.2 * np.sin(3 * x + 2 * z))
        return base * (0.93 + 0.14 * rings)
    if body.material == "metal":
        line = np.clip((np.abs(y) - 0.06) * 20, 0, 1)
        return base * (0.72 + 0.28 * line)
    return base * np.ones_like(normal[:1])


def _approach(origin: Array, direction: Planes, body: Body) -> tuple[Array, Planes, Array, Planes]:
    """Lines' closest approach to a body's segment: how far along the line, the vector from the segment there, its length, and the
    line's direction across the segment (for a ball, the direction itself)."""
    start = np.array(body.start, np.float32)
    axis = np.array(body.end, np.float32) - start
    away = (origin - start)[:, None, None] if origin.ndim == 1 else origin - start[:, None, None]
    d = _dot(direction, away)
    square = float(axis @ axis)
    if square == 0:
        along = -d
        offset = away + along * direction
        return along, offset, np.sqrt(_dot(offset, offset)), direction
    b, e = _dot(direction, axis[:, None, None]), _dot(away, axis[:, None, None])
    share = np.clip((e - b * d) / np.maximum(square - b * b, 1e-9), 0, 1)
    along = b * share - d
    offset = away + along * direction - share * axis[:, None, None]
    across = _unit_planes(direction - b / square * axis[:, None, None])
    return along, offset, np.sqrt(_dot(offset, offset)), across


def _light_past(point: Planes, light: Vector, body: Body) -> Float[Array, "height width"]:
    """How much of the wide light reaches points past a body: its disc is covered as the line towards its middle nears the body."""
    direction = np.broadcast_to(light[:, None, None], point.shape)
    along, _, distance, _ = _approach(point, direction, body)
    soft = np.maximum(LIGHT_RADIUS * np.maximum(along, 0), 4e-3)
    cover = np.clip((body.radius_m - distance) / (2 * soft) + 0.5, 0, 1)
    cover = cover * cover * (3 - 2 * cover)
    most = np.minimum(1, (body.radius_m / soft) ** 2)  # a thin thing never hides the whole light
    thickness = 0.45 if body.material == "glass" else 1.0
    return 1 - thickness * most * cover * (along > 0.3 * body.radius_m)


def _may_shade(body: Body, other: Body, light: Vector) -> bool:
    """Whether one body can keep light from the other; for rods always perhaps."""
    if body.start != body.end or other.start != other.end:
        return True
    apart = np.subtract(body.start, other.start)
    along = float(apart @ light)
    reach = body.radius_m + other.radius_m
    return along > -reach and float(np.linalg.norm(apart - along * light)) < reach + 1.2 * LIGHT_RADIUS * max(along + reach, 0.0)


def _blocked_sky(point: Planes, normal: Planes, body: Body) -> Float[Array, "height width"]:
    """The share of a hemisphere that a ball at the body's nearest point takes up, weighted by the cosine."""
    start = np.array(body.start, np.float32)[:, None, None]
    axis = np.array(body.end, np.float32)[:, None, None] - start
    square = float((axis**2).sum())
    to = start - point
    if square > 0:
        to = to + np.clip(-_dot(to, axis) / square, 0, 1) * axis
    distance = np.sqrt(_dot(to, to))
    return np.clip(_dot(to, normal) / distance, 0, 1) * np.minimum(1, (body.radius_m / distance) ** 2) * 0.85


def _corners(start: tuple[float, float, float], end: tuple[float, float, float], pad: float) -> Float[Array, "8 3"]:
    low, high = np.minimum(start, end) - pad, np.maximum(start, end) + pad
    return np.array([[x, y, z] for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])])


def _shadow_corners(body: Body, light: Vector) -> Float[Array, "16 3"]:
    """A body and its shadow on the floor: all that it darkens lies between the two."""
    onto_floor = [np.array(p) - light * (max(p[1], 0.0) / light[1]) for p in (body.start, body.end)]
    low, high = (tuple(f(*onto_floor)) for f in (np.minimum, np.maximum))
    farthest = max(body.start[1], body.end[1]) / float(light[1])
    near = 2.2 * body.radius_m  # as far as the hemisphere's dimming is seen
    return np.concatenate([_corners(body.start, body.end, near), _corners(low, high, max(near, body.radius_m + LIGHT_RADIUS * farthest) * 1.1)])


def _below(point: tuple[float, float, float]) -> tuple[float, float, float]:
    return point[0], -point[1], point[2]


def _groove(u: Array, width: float) -> Array:
    """0 in a groove at every whole number, 1 away from it."""
    return np.clip(np.abs(u - np.round(u)) / width - 0.3, 0, 1)


def _hash(n: Array) -> Array:
    """A number in [0, 1) for each whole number."""
    wild = np.sin(n * 12.9898) * 43758.547
    return wild - np.floor(wild)


def _value_noise(table: Float[Array, "64 64"], u: Array, v: Array) -> Array:
    """Smooth noise in [0, 1] that repeats every 64 units."""
    iu, iv = np.floor(u).astype(np.int32), np.floor(v).astype(np.int32)
    fu, fv = (u - iu).astype(np.float32), (v - iv).astype(np.float32)
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    iu, iv, ju, jv = iu & 63, iv & 63, (iu + 1) & 63, (iv + 1) & 63
    low = table[iu, iv] + fu * (table[ju, iv] - table[iu, iv])
    high = table[iu, jv] + fu * (table[ju, jv] - table[iu, jv])
    return low + fv * (high - low)


def _develop(picture: Planes) -> UInt8[Array, "height width 3"]:
    """Linear light to 8 bit: a soft shoulder for the brightest, then a gamma of two."""
    shoulder = picture * (1 + 0.12 * picture) / (1 + 0.32 * picture)
    levels = np.sqrt(np.clip(shoulder, 0, 1)) * np.float32(255) + np.float32(0.5)
    return levels.astype(np.uint8).transpose(1, 2, 0)


def _outermost(areas: list[Area]) -> list[Area]:
    """The areas without those that lie inside another."""

    def inside(a: Area, b: Area) -> bool:
        return all(x.start >= y.start and x.stop <= y.stop for x, y in zip(a, b, strict=True))

    return [a for i, a in enumerate(areas) if not any(inside(a, b) and (j < i or not inside(b, a)) for j, b in enumerate(areas) if j != i)]


def _finer(coarse: Float[Array, "rows columns"], shape: tuple[int, ...]) -> Float[Array, "height width"]:
    """Twice as many rows and columns, and no more than `shape`, with means in between."""
    for axis in (0, 1):
        after = np.concatenate([coarse[1:], coarse[-1:]])
        both = np.empty((2 * len(coarse), coarse.shape[1]), np.float32)
        both[::2], both[1::2] = coarse, (coarse + after) / 2
        coarse = both[: shape[axis]].T
    return coarse


def _halve(planes: Planes) -> Float[Array, "3 half_height half_width"]:
    return 0.25 * (planes[:, ::2, ::2] + planes[:, 1::2, ::2] + planes[:, ::2, 1::2] + planes[:, 1::2, 1::2])


def _dot(a: Array, b: Array) -> Array:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _largest(v: Array) -> Array:
    return np.maximum(np.maximum(v[0], v[1]), v[2])


def _unit(v: Array) -> Array:
    return (v / np.sqrt((v**2).sum())).astype(np.float32)


def _unit_planes(v: Array) -> Array:
    return v / np.sqrt(_dot(v, v))
