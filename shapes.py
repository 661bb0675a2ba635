"""Shapes: circles, squares, triangles and stars on textured ground, drawn from a seed; data.make_shapes writes them as a data set.

Published: what is drawn for (seed, split, number) never changes.
"""
import colorsys
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SHAPES = {"circle": 48, "square": 4, "triangle": 3, "star": 10}  # class -> corners; told by form, colours are random
TEXTURES = ("plain", "stripes", "checks", "dots")  # of the ground's regions; told by pattern
SIDE, FINE = 128, 4  # pixels of an image's side; drawn this many times finer, then averaged


class Item(NamedTuple):
    """One object of a scene, or a crowd of them. Lengths in pixels."""

    label: int
    centre: np.ndarray  # (2,) x, y
    radius: float  # of the circumscribed circle
    outline: np.ndarray | None  # (P, 2) corners x, y; None for a crowd
    whole: np.ndarray  # bool (512, 512), all of it that lies in the image
    visible: np.ndarray  # the same without what later objects hide


class Scene(NamedTuple):
    """What make_shapes writes of an image."""

    image: np.ndarray  # uint8 (128, 128, 3)
    items: list[Item]  # from the farthest to the nearest
    regions: np.ndarray  # uint8 (128, 128), the index of the texture, under the objects, too


def render(seed: int, split: int, number: int) -> Scene:
    """Image `number` of a split: every 20th has no objects, every 50th a crowd, each has 1 to 5 objects otherwise."""
    rng = np.random.default_rng([seed, split, number])
    canvas, regions = _ground(rng)
    items = []
    crowd = number % 50 == 7
    if crowd:
        canvas = _crowd(rng, canvas, items)
    for _ in range(0 if number % 20 == 13 else rng.integers(1, 4 if crowd else 6)):
        canvas = _object(rng, canvas, items)
    canvas = canvas + rng.uniform(-4, 4, (SIDE, SIDE, 1))
    return Scene(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), items, regions)


def _ground(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Colours (128, 128, 3) in 0..255 of 1 to 3 regions, each of another texture, and their map uint8 (128, 128)."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    count, shares = rng.integers(1, 4), []
    while not shares or min(share.mean() for share in shares) < 0.15:
        shares = [np.ones((SIDE, SIDE))]  # of every pixel, soft at the borders
        for _ in range(count - 1):
            border = _border(rng, x, y)
            shares += [shares[-1] * border]
            shares[-2] = shares[-2] * (1 - border)
    textures = rng.permutation(len(TEXTURES))[:len(shares)]
    canvas = sum(share[..., None] * _texture(rng, TEXTURES[texture], x, y) for share, texture in zip(shares, textures, strict=True))
    return canvas, textures[np.argmax(shares, axis=0)].astype(np.uint8)


def _border(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """0 on one side of a straight or wavy line across the image, 1 on the other, one pixel soft."""
    along, across = _turned(x - SIDE / 2, y - SIDE / 2, rng.uniform(0, 2 * np.pi))
    wave = rng.uniform(3, 7) * np.sin(along * 2 * np.pi / rng.uniform(30, 70)) if rng.random() < 0.5 else 0
    return np.clip(across + rng.uniform(-30, 30) + wave + 0.5, 0, 1)


def _turned(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _texture(rng: np.random.Generator, texture: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Colours (128, 128, 3) of one texture in two muted tones."""
    hue, saturation, value = rng.random(), rng.uniform(0.08, 0.4), rng.uniform(0.35, 0.9)
    step = rng.uniform(0.1, 0.2) * (1 if value < 0.6 else -1)
    tones = [255 * np.array(colorsys.hsv_to_rgb(hue, saturation, level)) for level in (value, value + step)]
    u, v = _turned(x - SIDE / 2, y - SIDE / 2, rng.uniform(0, 2 * np.pi))
    period = rng.uniform(9, 15)
    shift = rng.uniform(0, period)
    if texture == "plain":
        mix = 0.5 + 0.8 * u / SIDE + rng.uniform(-0.15, 0.15, x.shape)
    elif texture == "stripes":
        mix = 0.5 + period / 5 * np.sin(2 * np.pi * (u + shift) / period)
    elif texture == "checks":
        mix = 0.5 + period / 4 * np.sin(np.pi * (u + shift) / period) * np.sin(np.pi * v / period)
    else:
        mix = 0.5 + 0.3 * period - np.hypot((u + shift) % period - period / 2, v % period - period / 2)
    return tones[0] + np.clip(mix, 0, 1)[..., None] * (tones[1] - tones[0])


def _object(rng: np.random.Generator, canvas: np.ndarray, items: list[Item]) -> np.ndarray:
    """One more object, which leaves at least half of every earlier one visible; it is added to items, and the new canvas returned."""
    label = int(rng.integers(len(SHAPES)))
    for _ in range(50):
        radius = rng.uniform(SIDE / 16, SIDE / 4)
        centre = rng.uniform(0.8 * radius, SIDE - 0.8 * radius, 2)  # at most a tenth of the diameter beyond the border
        if items and rng.random() < 0.6:
            other = items[rng.integers(len(items))]
            angle = rng.uniform(0, 2 * np.pi)
            centre = other.centre + rng.uniform(0.5, 0.9) * (radius + other.radius) * np.array([np.cos(angle), np.sin(angle)])
        outline = centre + _outline(label, radius, rng.uniform(0, 2 * np.pi))
        inside = np.all(np.abs(centre - SIDE / 2) <= SIDE / 2 - 0.8 * radius)
        whole = _fill([outline])
        if inside and all(np.count_nonzero(item.visible & ~whole) > 0.5 * np.count_nonzero(item.whole) for item in items):
            break
    else:
        return canvas  # no room left
    for index, item in enumerate(items):
        items[index] = item._replace(visible=item.visible & ~whole)
    items.append(Item(label, centre, radius, outline, whole, whole))
    return _paint(rng, canvas, whole, centre, radius)


def _crowd(rng: np.random.Generator, canvas: np.ndarray, items: list[Item]) -> np.ndarray:
    """A cluster of 15 to 25 small shapes of one class, in one item."""
    label, middle, reach = int(rng.integers(len(SHAPES))), rng.uniform(36, SIDE - 36, 2), rng.uniform(24, 32)
    count = rng.integers(15, 26)
    spots = []
    for _ in range(400):
        spot = rng.uniform(-reach, reach, 2)
        if len(spots) < count and np.hypot(*spot) <= reach and all(np.hypot(*(spot - other)) > 9 for other in spots):
            spots.append(spot)
    outlines = [middle + spot + _outline(label, rng.uniform(4, 6), rng.uniform(0, 2 * np.pi)) for spot in spots]
    whole = _fill(outlines)
    items.append(Item(label, middle, reach, None, whole, whole))
    return _paint(rng, canvas, whole, middle, reach)


def _outline(label: int, radius: float, angle: float) -> np.ndarray:
    """Corners (P, 2) x, y of a shape inscribed in a circle of this radius about (0, 0)."""
    name, corners = list(SHAPES.items())[label]
    turn = angle + 2 * np.pi * np.arange(corners) / corners
    reach = np.where(np.arange(corners) % 2, 0.45, 1.0) if name == "star" else 1.0
    return radius * np.stack([reach * np.cos(turn), reach * np.sin(turn)], axis=1)


def _fill(outlines: list[np.ndarray]) -> np.ndarray:
    """Bool (512, 512): inside any of the outlines (P, 2), which are in pixels of the image."""
    drawing = Image.new("L", (SIDE * FINE, SIDE * FINE))
    for outline in outlines:
        ImageDraw.Draw(drawing).polygon([tuple(point) for point in outline * FINE], fill=1)
    return np.asarray(drawing) > 0


def coverage(fine: np.ndarray) -> np.ndarray:
    """Bool (512, 512) -> the share (128, 128) of every pixel, exact sixteenths."""
    return np.asarray(Image.fromarray(fine.astype(np.uint8) * 240).reduce(FINE)) / 240


def _paint(rng: np.random.Generator, canvas: np.ndarray, whole: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    """The canvas with a shape in one colour, clearly another than what it covers, gently shaded and half of the time faintly striped."""
    alpha = coverage(whole)
    under = canvas[alpha > 0.5][::3]
    best, colour = -1, None
    for _ in range(30):
        candidate = 255 * np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.5, 1), rng.uniform(0.3, 1)))
        distance = np.quantile(np.linalg.norm(under - candidate, axis=1), 0.1)
        if distance > best:
            best, colour = distance, candidate
        if best > 110:
            break
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    u, _ = _turned(x - centre[0], y - centre[1], rng.uniform(0, 2 * np.pi))
    light = 1 + 0.15 * u / radius
    if rng.random() < 0.5:
        u, _ = _turned(x, y, rng.uniform(0, 2 * np.pi))
        light = light + 0.08 * np.sin(2 * np.pi * u / rng.uniform(4, 8))
    return canvas + alpha[..., None] * (np.clip(colour * light[..., None], 0, 255) - canvas)
