"""Scenes of one to five coloured shapes on textured, cluttered ground.

Drawn with numpy alone: the same seed gives the same pixels.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

SIZE = 96  # pixels, width and height
MOST = 5  # objects in a scene
RADII = (10.0, 18.0)  # pixels, smallest and largest
COLORS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 20),
    "yellow": (240, 222, 50),
    "green": (44, 160, 60),
    "blue": (40, 80, 215),
    "purple": (150, 50, 180),
}
SHAPES = ("circle", "square", "triangle", "cross")
# Uneven, because POPE's category "popular" asks for absent objects that are frequent elsewhere.
_COLOR_ODDS = np.array([0.24, 0.12, 0.14, 0.16, 0.22, 0.12])
_SHAPE_ODDS = np.array([0.32, 0.28, 0.22, 0.18])
KINDS = tuple((color, shape) for color in COLORS for shape in SHAPES)
KIND_ODDS = np.outer(_COLOR_ODDS, _SHAPE_ODDS).ravel()


@dataclass(frozen=True)
class Thing:
    """One object; centre and radius are in pixels."""

    color: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """The objects of a picture, and the seed that draws it."""

    seed: tuple[int, ...]
    things: tuple[Thing, ...]

    @property
    def names(self) -> set[str]:
        return {thing.name for thing in self.things}


def make_scene(*seed: int) -> Scene:
    """Choose 1 to MOST things for a scene, all of different kinds."""
    rng = np.random.default_rng([*seed, 0])
    count = int(rng.integers(1, MOST + 1))
    kinds = rng.choice(len(KINDS), size=count, replace=False, p=KIND_ODDS)
    things: list[Thing] = []
    while len(things) < count:
        for _ in range(20):
            color, shape = KINDS[kinds[len(things)]]
            thing = _placed(color, shape, rng)
            if all(_apart(thing, other) for other in things):
                things.append(thing)
                break
        else:  # too full: start again
            things.clear()
    return Scene(seed, tuple(things))


def _placed(color: str, shape: str, rng: np.random.Generator) -> Thing:
    """A thing of any size, anywhere; at most two pixels of its radius leave the picture."""
    radius = float(rng.uniform(*RADII))
    x, y = rng.uniform(radius - 2, SIZE - radius + 2, 2)
    return Thing(color, shape, float(x), float(y), radius)


def _apart(a: Thing, b: Thing) -> bool:
    """Whether two things overlap at most slightly."""
    return bool(np.hypot(a.x - b.x, a.y - b.y) >= 0.95 * (a.radius + b.radius))


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points are inside the shape; x and y are in units of its radius, y points down."""
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.85
    if shape == "triangle":
        return (y <= 0.8) & (abs(x) <= (y + 1) * 0.55)
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def coverage(thing: Thing) -> np.ndarray:
    """[SIZE, SIZE] share of each pixel that the thing covers, from 3 x 3 samples per pixel."""

    def span(centre: float) -> slice:
        """Pixels within the radius along one axis; no shape reaches further."""
        return slice(max(int(centre - thing.radius) - 1, 0), int(centre + thing.radius) + 2)

    at = (np.arange(SIZE * 3) + 0.5).reshape(SIZE, 3) / 3
    columns, rows = at[span(thing.x)], at[span(thing.y)]
    x, y = np.meshgrid(
        (columns.ravel() - thing.x) / thing.radius, (rows.ravel() - thing.y) / thing.radius
    )
    share = np.zeros((SIZE, SIZE))
    inside = _inside(thing.shape, x, y).reshape(len(rows), 3, len(columns), 3)
    share[span(thing.y), span(thing.x)] = inside.mean(axis=(1, 3))
    return share


def _ground(rng: np.random.Generator) -> np.ndarray:
    """Grey texture (coarse patches and fine noise) with short strokes as clutter."""
    coarse = np.kron(rng.normal(0, 14, (12, 12)), np.ones((8, 8)))
    grey = rng.uniform(95, 160) + coarse + rng.normal(0, 9, (SIZE, SIZE))
    for _ in range(int(rng.integers(6, 14))):
        x, y, angle, length = (
            rng.uniform(0, SIZE),
            rng.uniform(0, SIZE),
            rng.uniform(0, np.pi),
            rng.uniform(3, 11),
        )
        along = np.linspace(-length / 2, length / 2, 24)
        rows = np.clip(y + along * np.sin(angle), 0, SIZE - 1).astype(int)
        columns = np.clip(x + along * np.cos(angle), 0, SIZE - 1).astype(int)
        grey[rows, columns] += rng.choice([-70, 70])
    return grey[..., None] + rng.normal(0, 6, (SIZE, SIZE, 3))


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image of SIZE x SIZE."""
    rng = np.random.default_rng([*scene.seed, 1])
    pixels = _ground(rng)
    for thing in scene.things:
        shade = np.array(COLORS[thing.color]) * rng.uniform(0.85, 1.1) + rng.normal(
            0, 7, (SIZE, SIZE, 3)
        )
        share = coverage(thing)[..., None]
        pixels = pixels * (1 - share) + shade * share
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
