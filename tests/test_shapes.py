"""Tests of shapes.py: what its scenes promise, and that they never change."""
from collections import Counter

import numpy as np
import pytest

from shapes import Scene, coverage, render


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render(0, 0, number) for number in range(200)]


def test_scenes_have_the_promised_objects(scenes):
    objects = [[item for item in scene.items if item.outline is not None] for scene in scenes]
    for number, (scene, things) in enumerate(zip(scenes, objects, strict=True)):
        assert scene.image.shape == (128, 128, 3) and scene.image.dtype == np.uint8
        assert (len(things) == 0) if number % 20 == 13 else (1 <= len(things) <= 5)
        assert (len(scene.items) - len(things)) == (number % 50 == 7)
        covered = sum((coverage(item.visible) > 0.5).astype(int) for item in scene.items)
        assert np.max(covered) <= 1  # visible parts are disjoint
    things = [item for items in objects for item in items]
    visible = np.array([item.visible.sum() / item.whole.sum() for item in things])
    assert visible.min() >= 0.45 and (visible < 0.95).mean() >= 0.2
    assert all(16 <= 2 * item.radius <= 64 for item in things)
    assert all(item.outline.min() > -0.2 * item.radius - 1 and item.outline.max() < 128 + 0.2 * item.radius + 1 for item in things)
    counts = Counter(item.label for item in things)
    assert min(counts[label] for label in range(4)) > 0.18 * len(things)


def test_objects_stand_out_from_what_they_cover(scenes):
    """The colour just inside an object's edge differs from the colour just outside, for nearly all of every object."""
    weak = total = 0
    for scene in scenes[:60]:
        image = scene.image.astype(int)
        for item in scene.items:
            visible = coverage(item.visible)
            inner, outer = visible == 1, coverage(item.whole) == 0
            edge = inner[:, :-3] & outer[:, 3:]  # three pixels apart across an edge
            weak += (np.linalg.norm(image[:, :-3][edge] - image[:, 3:][edge], axis=1) < 40).sum()
            total += edge.sum()
    assert weak < 0.05 * total


def test_ground_regions_are_kept(scenes):
    assert {len(np.unique(scene.regions)) for scene in scenes} == {1, 2, 3}
    assert all(np.unique(scene.regions, return_counts=True)[1].min() > 0.1 * 128 * 128 for scene in scenes)
    assert {int(texture) for scene in scenes for texture in np.unique(scene.regions)} == {0, 1, 2, 3}


@pytest.mark.parametrize(("split", "number", "labels", "areas", "regions", "colour"), [
    (0, 0, [0, 2, 0, 3], [513, 290, 1804, 1029], [4999, 4877, 6508, 0], [147.66, 125.97, 135.08]),
    (0, 7, [0, 0, 0], [1211, 1841, 1083], [4809, 6116, 0, 5459], [140.55, 116.72, 108.88]),
    (0, 13, [], [], [0, 0, 16384, 0], [198.95, 209.87, 168.26]),
    (0, 1234, [3, 3, 2, 1], [1242, 698, 331, 1545], [0, 5004, 11380, 0], [111.84, 142.81, 129.96]),
    (1, 5, [0], [384], [5208, 7141, 4035, 0], [115.75, 114.0, 125.17])])
def test_published_scenes_never_change(split, number, labels, areas, regions, colour):
    """Loose enough for another Pillow, or a processor that rounds the last bit otherwise."""
    scene = render(0, split, number)
    assert [item.label for item in scene.items] == labels
    assert [int((coverage(item.visible) > 0.5).sum()) for item in scene.items] == pytest.approx(areas, abs=4)
    assert np.bincount(scene.regions.ravel(), minlength=4) == pytest.approx(regions, abs=8)
    assert scene.image.mean((0, 1)) == pytest.approx(colour, abs=0.2)
