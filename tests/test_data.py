"""Tests of data.py on small generated files; those on real images run where COCO_TINY or COCO_PANOPTIC_SAMPLE name a folder with a few."""
import json
import os
import pickle
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import data
from data import BatchSampler, CocoDataset, DataError, PanopticDataset, View, collate, find_coco, large_scale_jitter, make_shapes, open_split, semantic_jitter

SQUARE = [10, 5, 30, 5, 30, 25, 10, 25]  # of 20 x 20 pixels


def as_is(image: Image.Image, truth) -> tuple[torch.Tensor, None]:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), None


def halve(image: Image.Image, truth) -> tuple[torch.Tensor, None]:
    return as_is(image.resize((image.width // 2, image.height // 2)), truth)


def annotation(**changes) -> dict:
    row = {"id": 0, "image_id": 7, "category_id": 18, "iscrowd": 0, "area": 400, "bbox": [10, 5, 20, 20], "segmentation": [SQUARE]} | changes
    return {key: value for key, value in row.items() if value is not ...}  # ... leaves a key out


def rle(height: int, width: int, counts: list | None = None) -> dict:
    return {"size": [height, width], "counts": counts or [height, 3, height * width - height - 3]}


@pytest.fixture
def write(tmp_path):
    """write(annotations, **other parts of the json) -> (json, images): two images of 60 x 40 pixels, ids 7 and 3, categories 18 and 5."""
    def write(annotations: list | None = None, **parts) -> tuple[Path, Path]:
        content = {"images": [{"id": key, "file_name": f"{key}.png", "width": 60, "height": 40} for key in (7, 3)],
                   "categories": [{"id": 18, "name": "dog"}, {"id": 5, "name": "car"}]}
        content |= ({} if annotations is None else {"annotations": annotations}) | parts
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        for number, row in enumerate(content["images"]):
            Image.new("RGB", (60, 40), (200, 50 * number, 100)).save(images / row["file_name"])
        (tmp_path / "some.json").write_text(json.dumps(content))
        return tmp_path / "some.json", images
    return write


# Files


@pytest.mark.parametrize(("split", "json_name", "folder"), [
    ("train", "annotations/instances_train2017.json", "train2017"), ("val", "annotations/instances_val2017.json", "val2017"),
    ("train", "annotations/instances_train.json", "train"), ("val", "annotations/val.json", "images/val"), ("train", "train.json", "train"),
    ("val", "valid/_annotations.coco.json", "valid"), ("train", "train.json", "images")])
def test_find_coco_knows_the_usual_names(tmp_path, split, json_name, folder):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / json_name).parent.mkdir(exist_ok=True)
    (tmp_path / json_name).touch()
    assert find_coco(tmp_path, split) == (tmp_path / json_name, tmp_path / folder)


def test_find_coco_errors_name_what_is_missing(tmp_path, write):
    json_path, images = write([])
    assert find_coco(tmp_path, "val", json_path, images) == (json_path, images)
    assert find_coco(None, "val", json_path, images) == (json_path, images)
    with pytest.raises(DataError, match=r"instances_val2017\.json.*--val_json=PATH"):
        find_coco(tmp_path, "val")
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_coco(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match=r"--train_json=.*no\.json does not exist"):
        find_coco(tmp_path, "train", tmp_path / "no.json")


@pytest.mark.parametrize(("text", "message"), [
    ("[]", "holds a list"), ("{", "no json"), ('{"images": []}', "'categories' is missing"), ('{"images": [], "categories": []}', "lists no images"),
    ('{"images": [{"id": 1}], "categories": []}', r"images\[0\] has no file_name"),
    ('{"images": [], "categories": [], "annotations": [{"id": 4}]}', r"annotations\[0\] has no image_id and no category_id"),
    ('{"images": [3], "categories": []}', r"images\[0\] has no id")])
def test_json_that_is_not_coco(tmp_path, text, message):
    (tmp_path / "some.json").write_text(text)
    with pytest.raises(DataError, match=message):
        CocoDataset(tmp_path / "some.json", tmp_path, as_is)


def test_json_problems_are_named(write, tmp_path):
    twice = [{"id": 9, "file_name": "a.png", "width": 60, "height": 40}] * 2
    with pytest.raises(DataError, match=r"'images' occur more than once, \[9\]"):
        CocoDataset(*write([], images=twice), as_is)
    with pytest.raises(DataError, match=r"category ids \[2, 77\]"):
        CocoDataset(*write([annotation(category_id=77), annotation(category_id=2), annotation()]), as_is)
    with pytest.raises(DataError, match="some.json: annotation 31 has an RLE of size"):
        CocoDataset(*write([annotation(id=31, segmentation=rle(60, 40))]), as_is)
    with pytest.raises(DataError, match="annotation 31 has an RLE whose counts add up to 99"):
        CocoDataset(*write([annotation(id=31, segmentation=rle(40, 60, [90, 9]))]), as_is)
    with pytest.raises(DataError, match="lists no images with objects"):
        CocoDataset(*write([annotation(iscrowd=1)]), as_is, keep_empty=False)
    with pytest.raises(DataError, match="cannot read"):
        CocoDataset(tmp_path / "absent.json", tmp_path, as_is)


def test_byte_order_mark_is_read(write):
    json_path, images = write([annotation()])
    json_path.write_bytes(b"\xef\xbb\xbf" + json_path.read_bytes())
    assert len(CocoDataset(json_path, images, as_is)) == 2


def test_missing_images_are_found_at_the_start(write):
    json_path, images = write([annotation()])
    (images / "3.png").unlink()
    with pytest.raises(DataError, match=r"1 of the 2 images .* not in the image folder .*images: .*3\.png"):
        CocoDataset(json_path, images, as_is)
    assert len(CocoDataset(json_path, images, as_is, max_images=1)) == 1  # the missing one is not asked for


def test_broken_image_and_wrong_size_are_named(write):
    json_path, images = write([annotation()])
    dataset = CocoDataset(json_path, images, as_is)
    whole = (images / "7.png").read_bytes()
    for broken in (b"", b"<html>not found</html>", whole[:60]):
        (images / "7.png").write_bytes(broken)
        with pytest.raises(DataError, match=r"7\.png cannot be read"):
            dataset[0]
    Image.new("RGB", (40, 60)).save(images / "7.png")
    with pytest.raises(DataError, match=r"7\.png is 40 x 60 pixels .*, the json says 60 x 40"):
        dataset[0]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA"])
def test_other_image_modes_become_rgb(write, mode):
    json_path, images = write([annotation()])
    Image.new("RGB", (60, 40), (255, 255, 255)).convert(mode).save(images / "7.png")
    image, _ = CocoDataset(json_path, images, as_is)[0]
    assert image.shape == (3, 40, 60) and image.dtype == torch.uint8 and (image == 255).all()


# Annotations


@pytest.mark.parametrize(("segmentation", "pixels"), [
    ([SQUARE], 400), (SQUARE, 400), ([SQUARE, [1, 2, 3, 4]], 400), ([SQUARE, [*SQUARE, 1]], 400), ([[float("nan"), *SQUARE[1:]], SQUARE], 400),
    ([[float("inf"), *SQUARE[1:]]], None), ([["a", *SQUARE[1:]]], None), ([[1, 2, 3, 4]], None), (..., None), (None, None), ([], None), ([[]], None),
    ([[-1e9, -1e9, 1e9, -1e9, 1e9, 1e9, -1e9, 1e9]], 2400), ([[50, 30, 70, 30, 70, 50, 50, 50]], 100), (rle(40, 60), 3),
    (mask_api.frPyObjects(rle(40, 60), 40, 60) | {"counts": mask_api.frPyObjects(rle(40, 60), 40, 60)["counts"].decode()}, 3)])
def test_crooked_segmentations(write, capsys, segmentation, pixels):
    dataset = CocoDataset(*write([annotation(segmentation=segmentation)]), as_is)
    _, target = dataset[0]
    assert target["masks"].sum((1, 2)).tolist() == ([] if pixels is None else [pixels])
    assert [row["segmentation"]["size"] for row in dataset.truth()["annotations"]] == ([] if pixels is None else [[40, 60]])
    assert (pixels is None) == ("without a mask" in capsys.readouterr().out)


def test_boxes_alone_serve_detection(write):
    """Without a mask an annotation is dropped, or with boxes_only its filled box stands for it."""
    json_path, images = write([annotation(segmentation=...)])
    assert not len(CocoDataset(json_path, images, as_is)[0][1]["labels"])
    target = CocoDataset(json_path, images, as_is, boxes_only=True)[0][1]
    assert target["boxes"][0].tolist() == pytest.approx([20 / 60, 15 / 40, 20 / 60, 20 / 40])


def test_what_is_left_out_is_counted_in_one_line(write, capsys):
    CocoDataset(*write([annotation(), annotation(segmentation=...), annotation(image_id=99), annotation(segmentation=[SQUARE, [1, 2]])]), as_is)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert all(part in line for part in ("1 annotation(s) of unknown images", "1 annotation(s) without a mask", "1 malformed polygon(s)"))
    CocoDataset(*write([annotation()]), as_is)
    assert not capsys.readouterr().out


def test_wild_polygons_never_crash(write):
    rng = np.random.default_rng(0)
    for scale in (1e2, 1e4, 1e9, 1e300):
        polygons = [(scale * rng.standard_normal(2 * rng.integers(3, 9))).tolist() for _ in range(50)]
        segmentations = [kept for polygon in polygons if (kept := data.clean_segmentation([polygon], 40, 60, "")[0])]
        assert data.rasterise(segmentations, View.whole((40, 60), (40, 60))).shape == (50, 40, 60)


def test_crowds_and_missing_iscrowd_and_empty_images(write):
    rows = [annotation(iscrowd=...), annotation(category_id=5, iscrowd=1, segmentation=rle(40, 60)), annotation(image_id=3, iscrowd=1)]
    dataset = CocoDataset(*write(rows), as_is)
    assert dataset.class_names == ["car", "dog"] and dataset.category_ids == [5, 18] and dataset.is_thing == [True, True]
    assert dataset.image_ids == [7, 3] and [path.name for path in dataset.file_names] == ["7.png", "3.png"]
    assert [dataset[index][1]["labels"].tolist() for index in range(2)] == [[1], []]
    assert [row["iscrowd"] for row in dataset.truth()["annotations"]] == [0, 1, 1]
    without = CocoDataset(*write(rows), as_is, keep_empty=False)
    assert without.image_ids == [7] and len(without.truth()["images"]) == 1


# Samples


def test_target_is_what_the_contract_says(write):
    dataset = CocoDataset(*write([annotation(), annotation(category_id=5, segmentation=[[0, 0, 60, 0, 60, 40, 0, 40]])]), as_is)
    image, target = dataset[0, 5]
    assert image.shape == (3, 40, 60) and image[:, 0, 0].tolist() == [200, 0, 100]
    assert target["labels"].tolist() == [1, 0] and target["labels"].dtype == torch.int64
    torch.testing.assert_close(target["boxes"], torch.tensor([[20 / 60, 15 / 40, 20 / 60, 20 / 40], [0.5, 0.5, 1, 1]]))
    assert target["masks"].shape == (2, 40, 60) and target["masks"].dtype == torch.uint8 and target["masks"].is_contiguous()
    assert {key: target[key] for key in ("ignore", "image_id", "size", "original_size", "key")} == {
        "ignore": None, "image_id": 7, "size": (40, 60), "original_size": (40, 60), "key": 5}
    _, empty = dataset[1]
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 40, 60) and empty["key"] == 0


def test_a_transform_may_resize_only_the_image(write):
    image, target = CocoDataset(*write([annotation()]), halve)[0]
    assert image.shape == (3, 20, 30) and target["masks"].shape == (1, 20, 30)
    assert target["size"] == (20, 30) and target["original_size"] == (40, 60)
    torch.testing.assert_close(target["boxes"], torch.tensor([[20 / 60, 15 / 40, 20 / 60, 20 / 40]]), atol=1 / 20, rtol=0)


def same(one: tuple, other: tuple) -> bool:
    return torch.equal(one[0], other[0]) and all(torch.equal(one[1][key], other[1][key]) for key in ("labels", "boxes", "masks"))


def test_a_sample_depends_on_index_and_key_alone(shapes):
    dataset = CocoDataset(*find_coco(shapes, "train"), large_scale_jitter(96, (0.5, 2.0)))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = dataset[4, 11]
    assert torch.equal(state, torch.get_rng_state())  # the caller's random numbers go on undisturbed
    torch.manual_seed(2)
    assert same(first, dataset[4, 11]) and same(first, pickle.loads(pickle.dumps(dataset))[4, 11])
    assert not torch.equal(first[0], dataset[4, 12][0])
    sampler = BatchSampler(len(dataset), total_batch=4, steps=2)
    here = [collate([dataset[item] for item in batch]) for batch in sampler]
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=2, multiprocessing_context="spawn")
    for (images, targets), (other_images, other_targets) in zip(here, loader, strict=True):
        assert torch.equal(images, other_images)
        assert all(torch.equal(a["masks"], b["masks"]) and a["key"] == b["key"] for a, b in zip(targets, other_targets, strict=True))


def coloured_square() -> tuple[Image.Image, list[np.ndarray]]:
    """A white square on dark ground, and a pixel in the last corner."""
    masks = np.zeros((2, 60, 90), dtype=np.uint8)
    masks[0, 12:40, 30:58], masks[1, -1, -1] = 1, 1
    return Image.fromarray(np.stack([40 + 200 * masks[0]] * 3, axis=2)), masks


def test_jitter_moves_image_and_masks_together():
    image, masks = coloured_square()
    jitter = large_scale_jitter(64, (0.4, 2.0))
    flips, vanished = 0, 0
    for key in range(60):
        torch.manual_seed(key)
        flips += torch.rand(1).item() < 0.5
        torch.manual_seed(key)
        out, view = jitter(image, None)
        square, corner = (view.map(mask, 0) for mask in masks)
        assert out.shape == (3, 64, 64) and out.dtype == torch.uint8
        vanished += not corner.any()
        assert ((out[0].numpy() > 140) ^ square).sum() <= 0.6 * (square.sum() ** 0.5 * 4)  # they differ along the edge at most
    assert 20 < flips < 40 and vanished > 10


def test_boxes_are_those_of_what_is_left_of_the_masks(shapes):
    dataset = CocoDataset(*find_coco(shapes, "train"), large_scale_jitter(64, (0.4, 2.0)))
    vanished = 0
    for index in range(40):
        _, target = dataset[index, index]
        assert all(len(target[key]) == len(target["labels"]) for key in ("boxes", "masks"))
        vanished += len(target["labels"]) < sum(not crowd for _, crowd in dataset.contents(index))
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = np.nonzero(mask.numpy())
            cx, cy, w, h = (64 * box).tolist()
            assert (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2) == pytest.approx((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    assert vanished > 3


def test_jitter_says_what_is_padding_and_flips_as_often_as_told():
    """A 60 x 90 image at half of what fits 64 x 64: 21 x 32 pixels of image, the rest is padding."""
    image, _ = coloured_square()
    (never, view), (always, mirrored) = (large_scale_jitter(64, (0.5, 0.5), flip)(image, None) for flip in (0.0, 1.0))
    assert view.window == mirrored.window == (21, 32) and not never[:, 21:].any() and not never[:, :, 32:].any()
    assert torch.equal(never[:, :21, :32].flip(-1), always[:, :21, :32]) and not torch.equal(never, always)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
def test_jitter_is_resize_then_crop_then_pad(scale):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    mask = rng.integers(0, 2, (60, 90), dtype=np.uint8)
    for key in range(6):
        torch.manual_seed(key)
        flip, _, top, left = torch.rand(4).tolist()
        torch.manual_seed(key)
        out, view = large_scale_jitter(72, (scale, scale))(image, None)
        h, w = round(60 * scale * 72 / 90), round(90 * scale * 72 / 90)
        y, x = round(top * max(0, h - 72)), round(left * max(0, w - 72))
        window = (slice(None), slice(y, y + 72), slice(x, x + 72))
        resized = torch.from_numpy(np.array(image.resize((w, h), Image.Resampling.BILINEAR))).permute(2, 0, 1)[window]
        nearest = torch.nn.functional.interpolate(torch.from_numpy(mask)[None, None].float(), size=(h, w), mode="nearest-exact")[0].byte()[window]
        if flip < 0.5:
            resized, nearest = resized.flip(2), nearest.flip(2)
        pad = (0, 72 - resized.shape[2], 0, 72 - resized.shape[1])
        assert (out.int() - torch.nn.functional.pad(resized, pad).int()).abs().max() <= 1
        picked = torch.from_numpy(view.map(mask, 0))
        assert (picked != torch.nn.functional.pad(nearest, pad)[0]).float().mean() < 1e-3  # ties between two pixels may differ


# Views: drawn in the crop's frame, the truth is what it was at full size

STAR = [[30.2, 1.5, 36.9, 20.3, 57.7, 20.1, 41.2, 32.6, 47.5, 38.9, 30.4, 27.1, 12.8, 39.0, 19.1, 32.2, 2.6, 20.4, 23.3, 20.7], [1, 1, 9.5, 1, 9.5, 7.2]]


def at_full_size(segmentation: list | dict) -> np.ndarray:
    return mask_api.decode(data.to_rle(segmentation, 40, 60))


def test_polygons_are_drawn_as_pycocotools_draws_them():
    """In an identity view to the pixel, whatever part of a polygon lies outside, though only the box around it is touched."""
    identity, rng = View.whole((40, 60), (40, 60)), np.random.default_rng(0)
    polygons = [STAR, [SQUARE], [[-20, -5, 80, -5, 80, 55, -20, 55]], [[70, 5, 90, 5, 90, 25]]]
    polygons += [[(rng.uniform(-0.3, 1.3, (rng.integers(3, 9), 2)) * (60, 40)).ravel().tolist()] for _ in range(200)]
    masks = data.rasterise(polygons, identity).numpy()
    assert all(np.array_equal(mask, at_full_size(polygon)) for mask, polygon in zip(masks, polygons, strict=True))


def test_a_crop_shows_that_part_of_the_masks():
    """Nothing resized: what is left of a crop's border is all that differs, by the rounding of negative numbers, at most a pixel along edges."""
    rle_star = mask_api.encode(np.asfortranarray(at_full_size(STAR)))
    for top, left in ((0, 0), (7, 13), (20, 35)):
        view = View((40, 60), (40, 60), (top, left), (20, 25), (32, 32))
        drawn, picked = data.rasterise([STAR, rle_star], view).numpy()
        full = np.pad(at_full_size(STAR)[top:top + 20, left:left + 25], ((0, 12), (0, 7)))
        assert np.array_equal(picked, full) and (drawn != full).sum() <= 6 and not drawn[20:].any() and not drawn[:, 25:].any()
        assert np.array_equal(view.map(at_full_size(STAR), 0), full)


def test_enlarged_polygons_are_sharp_and_enlarged_rles_are_squares():
    segmentation = mask_api.encode(np.asfortranarray(at_full_size(STAR)))
    twice = View.whole((40, 60), (80, 120))
    drawn, picked = data.rasterise([STAR, segmentation], twice).numpy()
    assert np.array_equal(picked, at_full_size(STAR).repeat(2, axis=0).repeat(2, axis=1))
    doubled = mask_api.decode(data.to_rle([[2 * value for value in polygon] for polygon in STAR], 80, 120))
    assert np.array_equal(drawn, doubled) and 0 < (drawn != picked).sum() < 0.1 * picked.sum()


def test_flips_are_mirror_images():
    for shape in ((40, 60), (53, 77)):
        view = View((40, 60), shape, (5, 11), (30, 40), (48, 64))
        masks, mirrored = (data.rasterise([STAR, [SQUARE], mask_api.frPyObjects(rle(40, 60), 40, 60)], v) for v in (view, view._replace(flip=True)))
        assert torch.equal(masks[:, :30, :40].flip(-1), mirrored[:, :30, :40]) and mirrored[:, :30, :40].sum() == mirrored.sum() > 0


def test_wild_polygons_in_wild_windows_never_crash():
    rng = np.random.default_rng(0)
    for scale in (1e2, 1e4, 1e300):
        polygons = [kept for _ in range(30) if (kept := data.clean_polygon((scale * rng.standard_normal(12)).tolist(), 40, 60))]
        for corner in ((0, 0), (700, 0), (0, 1100), (790, 1190)):
            assert data.rasterise([polygons], View((40, 60), (800, 1200), corner, (10, 10), (32, 32))).shape == (1, 32, 32)


def test_nothing_is_drawn_of_what_is_out_of_sight():
    far = View((40, 60), (400, 600), (300, 500), (100, 100), (100, 100))
    assert not data.rasterise([[SQUARE], STAR], far).any()


def test_collate_pads_to_one_size(write):
    dataset = CocoDataset(*write([annotation()]), as_is)
    small, whole = CocoDataset(*write([annotation()]), halve)[0], dataset[0]
    images, targets = collate([small, whole])
    assert images.shape == (2, 3, 64, 64) and images.dtype == torch.uint8
    assert torch.equal(images[1, :, :40, :60], whole[0]) and images[1, :, 40:].sum() == 0 and images[1, :, :, 60:].sum() == 0
    for (_, before), after in zip([small, whole], targets, strict=True):
        H, W = before["size"]
        assert after["size"] == (H, W) and after["masks"].shape == (1, 64, 64) and after["masks"].sum() == before["masks"].sum()
        torch.testing.assert_close(after["boxes"] * 64, before["boxes"] * torch.tensor([W, H, W, H]))
        torch.testing.assert_close(after["boxes"], data.boxes_of_masks(after["masks"])[0])
    assert collate([dataset[1]])[1][0]["masks"].shape == (0, 64, 64)


def test_collate_ignores_its_padding_where_anything_is_ignored(write):
    image, target = CocoDataset(*write([annotation()]), as_is)[0]
    ignore = torch.zeros((40, 60), dtype=torch.bool)
    ignore[:5] = True
    _, (one, other) = collate([(image, target | {"ignore": ignore}), (image, target)])
    assert other["ignore"] is None and torch.equal(one["ignore"][:40, :60], ignore) and one["ignore"][40:].all() and one["ignore"][:, 60:].all()


def test_batches_are_a_function_of_the_step():
    alone = list(BatchSampler(10, total_batch=4, seed=3, steps=5))
    assert len(alone) == 5 and sorted(index for batch in alone for index, _ in batch) == sorted(list(range(10)) * 2)  # two epochs
    assert list(BatchSampler(10, total_batch=4, seed=3, start_step=2, steps=5)) == alone[2:]
    assert list(BatchSampler(10, total_batch=4, seed=4, steps=5)) != alone
    keys = [key for batch in BatchSampler(10, total_batch=4, steps=100) for _, key in batch]
    assert len(set(keys)) == 400 and all(isinstance(key, int) and 0 <= key < 2 ** 32 for key in keys)
    for world, accumulate in ((2, 1), (1, 2), (2, 2), (4, 1)):
        samplers = [BatchSampler(10, total_batch=4, seed=3, steps=5, world=world, rank=rank, accumulate=accumulate) for rank in range(world)]
        assert all(len(sampler) == 5 * accumulate for sampler in samplers)
        parts = [list(sampler) for sampler in samplers]
        for step in range(5):
            union = [pair for rank in parts for batch in rank[step * accumulate:(step + 1) * accumulate] for pair in batch]
            assert sorted(union) == sorted(alone[step])
    with pytest.raises(DataError, match="total_batch=4 cannot be divided among 3"):
        BatchSampler(10, total_batch=4, world=3, steps=1)


# Ground truth for pycocotools


def test_truth_scores_a_perfect_detection_fully(write):
    rows = [annotation(area=...), annotation(category_id=5, bbox=..., segmentation=rle(40, 60)), annotation(bbox=[70, 0, 5, 5], image_id=3),
            annotation(segmentation=[[70, 5, 90, 5, 90, 25]])]  # the last outside the image: no pixel
    dataset = CocoDataset(*write(rows), as_is)
    truth = dataset.truth()
    assert [row["id"] for row in truth["annotations"]] == [1, 2, 3] and [row["area"] for row in truth["annotations"]] == [400, 400, 400]
    assert [row["bbox"] for row in truth["annotations"]] == [[10, 5, 20, 20], [1, 0, 1, 3], [10, 5, 20, 20]]
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    for kind in ("bbox", "segm"):
        results = [{"image_id": row["image_id"], "category_id": row["category_id"], "score": 0.9, "bbox": row["bbox"],
                    "segmentation": row["segmentation"]} for row in truth["annotations"]]
        score = COCOeval(coco, coco.loadRes(results), kind)
        score.evaluate()
        score.accumulate()
        score.summarize()
        assert score.stats[0] == pytest.approx(1)


def test_truth_is_none_without_annotations(write):
    assert CocoDataset(*write(None), as_is).truth() is None
    assert CocoDataset(*write([]), as_is).truth() is None


# Maps


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool])
def test_counted_values(dtype):
    for values in (np.random.default_rng(0).integers(0, 256, (40, 60)).astype(dtype), np.full((40, 60), 255).astype(dtype), np.ones((1, 1), dtype)):
        assert data.count_values(values) == dict(zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True))


# Panoptic data

SEGMENTS = [{"id": 1000, "category_id": 18, "iscrowd": 0}, {"id": 70000, "category_id": 2, "iscrowd": 0}, {"id": 300, "category_id": 18, "iscrowd": 1}]


def id_map() -> np.ndarray:
    """A dog, sky beside it, more dogs; the last rows are void."""
    ids = np.zeros((40, 60), dtype=np.int32)
    ids[:30, :20], ids[:30, 20:], ids[:10, 50:] = 1000, 70000, 300
    return ids


@pytest.fixture
def write_panoptic(tmp_path):
    """write_panoptic(ids, segments, **other parts) -> (json, PNG folder, images): COCO's tree with one image of 60 x 40 pixels, id 7."""
    def write(ids: np.ndarray | None = None, segments: list | None = None, **parts) -> tuple[Path, Path, Path]:
        for folder in ("annotations", "panoptic_val", "val"):
            (tmp_path / folder).mkdir(exist_ok=True)
        content = {"images": [{"id": 7, "file_name": "7.jpg", "width": 60, "height": 40}],
                   "categories": [{"id": 18, "name": "dog", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}],
                   "annotations": [{"image_id": 7, "file_name": "7.png", "segments_info": SEGMENTS if segments is None else segments}]} | parts
        Image.new("RGB", (60, 40), (200, 50, 100)).save(tmp_path / "val/7.jpg")
        data.save_ids(id_map() if ids is None else ids, tmp_path / "panoptic_val/7.png")
        (tmp_path / "annotations/panoptic_val.json").write_text(json.dumps(content))
        return tmp_path / "annotations/panoptic_val.json", tmp_path / "panoptic_val", tmp_path / "val"
    return write


def test_panoptic_segments_and_targets(write_panoptic):
    dataset = PanopticDataset(*write_panoptic(), as_is)
    assert dataset.class_names == ["sky", "dog"] and dataset.category_ids == [2, 18] and dataset.is_thing == [False, True]
    ids, segments = dataset.segments(0)
    assert ids.dtype == np.int32 and np.array_equal(ids, id_map())
    assert segments == [SEGMENTS[0] | {"area": 600}, SEGMENTS[1] | {"area": 1100}, SEGMENTS[2] | {"area": 100}]
    labels = dataset.label_map(0)
    assert labels.dtype == np.int32 and [(labels == label).sum() for label in (-1, 0, 1)] == [600, 1100, 700]  # crowds are of their class
    _, target = dataset[0]
    assert target["labels"].tolist() == [1, 0] and target["ignore"] is None and target["masks"].dtype == torch.uint8
    assert all(np.array_equal(mask, id_map() == number) for mask, number in zip(target["masks"].numpy(), (1000, 70000), strict=True))
    torch.testing.assert_close(target["boxes"], torch.tensor([[10 / 60, 15 / 40, 20 / 60, 30 / 40], [40 / 60, 15 / 40, 40 / 60, 30 / 40]]))
    assert target["image_id"] == 7 and dataset.without_objects()[0][1]["masks"].shape == (0, 40, 60)


def test_panoptic_truth_are_the_things(write_panoptic):
    truth = PanopticDataset(*write_panoptic(), as_is).truth()
    assert truth["categories"] == [{"id": 18, "name": "dog"}]
    rows = [tuple(row[key] for key in ("id", "iscrowd", "area", "bbox")) for row in truth["annotations"]]
    assert rows == [(1, 0, 600, [0, 0, 20, 30]), (2, 1, 100, [50, 0, 10, 10])]
    assert np.array_equal(mask_api.decode(truth["annotations"][0]["segmentation"]), id_map() == 1000)
    nothing = PanopticDataset(*write_panoptic(annotations=[]), as_is)
    assert nothing.truth() is None and not nothing.has_truth and nothing.segments(0)[1] == [] and (nothing.label_map(0) == -1).all()
    stuff = PanopticDataset(*write_panoptic(np.full((40, 60), 70000), SEGMENTS[1:2]), as_is)
    assert stuff.truth()["annotations"] == []


def test_things_alone(write_panoptic):
    dataset = PanopticDataset(*write_panoptic(), as_is, things=True)
    assert dataset.class_names == ["dog"] and dataset.is_thing == [True] and dataset[0][1]["labels"].tolist() == [0]
    assert [segment["id"] for segment in dataset.segments(0)[1]] == [1000, 300] and set(np.unique(dataset.segments(0)[0])) == {0, 300, 1000}
    assert set(np.unique(dataset.label_map(0))) == {-1, 0} and dataset.contents(0) == [(0, False), (0, True)]


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_panoptic_masks_are_cut_from_the_id_map(write_panoptic, flip):
    """Enlarged twice, a window of 64 x 64: each mask is what the crop shows of the segment at full size."""
    dataset = PanopticDataset(*write_panoptic(), large_scale_jitter(64, (1.875, 1.875), flip))
    torch.manual_seed(3)
    top, left = torch.rand(4)[2:].tolist()
    _, target = dataset[0, 3]
    window = id_map().repeat(2, axis=0).repeat(2, axis=1)[round(top * 16):][:64, round(left * 56):][:, :64]
    for mask, label in zip(target["masks"].numpy(), target["labels"].tolist(), strict=True):
        assert np.array_equal(mask, (window[:, ::-1] if flip else window) == (70000, 1000)[label])


def test_panoptic_png_and_json_have_to_agree(write_panoptic, tmp_path):
    png = tmp_path / "panoptic_val/7.png"

    def fails(words: str, *arguments) -> None:
        with pytest.raises(DataError, match=words):
            PanopticDataset(*write_panoptic(*arguments), as_is)[0]
    fails(r"7\.png has the segment ids \[300\], which the json does not list for image 7", None, SEGMENTS[:2])
    fails(r"7\.png has no pixel of the segment ids \[5\], which the json lists for image 7", None, [*SEGMENTS, SEGMENTS[0] | {"id": 5}])
    fails(r"7\.png is 40 x 60 pixels .*, the json says 60 x 40 for image 7", id_map().T)
    dataset = PanopticDataset(*write_panoptic(), as_is)
    for mode, words in (("P", "a palette image"), ("L", "a grey image"), ("RGBA", "of mode RGBA")):
        Image.open(png).convert(mode).save(png)
        with pytest.raises(DataError, match=rf"panoptic PNG .*7\.png of image 7 is {words}"):
            dataset[0]
    png.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=r"7\.png cannot be read"):
        dataset[0]


def test_panoptic_json_is_checked_at_the_start(write_panoptic, tmp_path):
    def fails(words: str, *arguments, **parts) -> None:
        with pytest.raises(DataError, match=words):
            PanopticDataset(*write_panoptic(*arguments, **parts), as_is)
    fails(r"panoptic_val\.json: image 7: segment 1000 has the category id 77", None, [SEGMENTS[0] | {"category_id": 77}])
    fails(r"image 7 lists the segment ids \[300\] twice", None, [*SEGMENTS, SEGMENTS[2]])
    fails(r"image 7: segments_info\[0\] has no category_id", None, [{"id": 1}])
    fails(r"categories\[0\] has no isthing", categories=[{"id": 18, "name": "dog"}])
    fails(r"not in COCO's panoptic format: annotations\[0\] has no file_name and no segments_info", annotations=[annotation()])
    fails(r"1 image\(s\) have no entry in 'annotations', \[8\] first", images=[{"id": key, "file_name": "7.jpg", "width": 60, "height": 40} for key in (7, 8)])
    fails("lists no images", images=[])
    paths = write_panoptic()
    (tmp_path / "panoptic_val/7.png").unlink()
    with pytest.raises(DataError, match=r"1 of the 1 panoptic PNGs .* not in the panoptic PNG folder .*7\.png"):
        PanopticDataset(*paths, as_is)
    paths = write_panoptic()
    (tmp_path / "val/7.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of the 1 images .*7\.jpg"):
        PanopticDataset(*paths, as_is)


@pytest.mark.parametrize("place", ["annotations/panoptic_val", "panoptic_val", "panoptic_val2017"])
def test_panoptic_trees(write_panoptic, tmp_path, place):
    _, png, _ = write_panoptic()
    png.rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / place)
    dataset = open_split("panoptic", "val", as_is, data_dir=tmp_path)
    assert len(dataset) == 1 and place in dataset.source and dataset[0][1]["labels"].tolist() == [1, 0]
    (tmp_path / place).rename(tmp_path / "mine")
    with pytest.raises(DataError, match="panoptic_val2017.*--val_panoptic=PATH"):
        open_split("panoptic", "val", as_is, data_dir=tmp_path)
    assert len(open_split("panoptic", "val", as_is, data_dir=tmp_path, panoptic=tmp_path / "mine")) == 1


# Cityscapes and ADE20K, as they lie on disk


def test_cityscapes(cityscapes):
    panoptic, instances, semantic = (open_split(task, "val", as_is, data_dir=cityscapes) for task in ("panoptic", "instance", "semantic"))
    assert panoptic.image_ids == semantic.image_ids == ["munster_000000_000019"] and panoptic.file_names == semantic.file_names
    assert panoptic.class_names == ["road", "person", "car"] and panoptic[0][1]["labels"].tolist() == [0, 2, 2]
    assert instances.class_names == ["person", "car"] and instances[0][1]["labels"].tolist() == [1, 1] and instances.category_ids == [24, 26]
    assert [row["iscrowd"] for row in instances.truth()["annotations"]] == [1, 0, 0]
    assert len(semantic.class_names) == 19 and semantic.category_ids[:3] == [7, 8, 11] and semantic.sizes.tolist() == [[40, 60]]
    names = [semantic.class_names[label] for label in semantic[0][1]["labels"]]
    assert names == ["road", "person", "car"] and semantic[0][1]["ignore"].sum() == 300
    before = semantic.label_map(0)
    for path in cityscapes.rglob("*_labelIds.png"):  # converted to the 19 train ids by Cityscapes' scripts
        raw = np.asarray(Image.open(path))
        ids = {7: 0, 24: 11, 26: 13, 1: 255}
        Image.fromarray(np.vectorize(ids.get)(raw).astype(np.uint8)).save(path.with_name(path.name.replace("labelIds", "labelTrainIds")))
    assert np.array_equal(open_split("semantic", "val", as_is, data_dir=cityscapes).label_map(0), before)


def write_labels(images: Path, labels: Path, *maps: np.ndarray, suffix: str = ".jpg") -> None:
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    for number, values in enumerate(maps):
        Image.new("RGB", values.shape[::-1], (90, 120, 30)).save(images / f"photo_{number}{suffix}")
        Image.fromarray(values).save(labels / f"photo_{number}.png")


def test_ade20k(tmp_path):
    values = np.zeros((40, 60), dtype=np.uint8)
    values[:30, :20], values[:30, 20:50] = 1, 150
    write_labels(tmp_path / "images/training", tmp_path / "annotations/training", values, values)
    write_labels(tmp_path / "images/validation", tmp_path / "annotations/validation", values)
    training, validation = (open_split("semantic", split, as_is, data_dir=tmp_path) for split in ("train", "val"))
    assert len(training) == 2 and validation.image_ids == ["photo_0"] and len(open_split("semantic", "train", as_is, data_dir=tmp_path, max_images=1)) == 1
    assert len(training.class_names) == 150 and training.category_ids == list(range(1, 151)) and training.class_names[0] == "wall"
    _, target = training[1]
    assert target["labels"].tolist() == [0, 149] and target["masks"].sum((1, 2)).tolist() == [600, 900] and target["ignore"].sum() == 2400 - 1500
    assert validation.truth() is None and validation.has_truth and "validation" in validation.source
    assert validation.without_objects()[0][1]["labels"].tolist() == []


@pytest.fixture
def own(tmp_path) -> Path:
    """Own folders: images/val, labels/val, classes.txt: three classes, with the ignore label 255."""
    values = np.zeros((40, 60), dtype=np.uint8)
    values[:, 30:], values[:5] = 2, 255
    write_labels(tmp_path / "images/val", tmp_path / "labels/val", values, values)
    (tmp_path / "classes.txt").write_text("lake\nforest\ncar park\n\n")
    return tmp_path


def test_own_label_pngs(own):
    dataset = open_split("semantic", "val", as_is, data_dir=own)
    assert dataset.class_names == ["lake", "forest", "car park"] and dataset.category_ids == [0, 1, 2] and dataset.image_ids == ["photo_0", "photo_1"]
    _, target = dataset[0]
    assert target["labels"].tolist() == [0, 2] and target["ignore"][:5].all() and target["ignore"].sum() == 300
    assert target["masks"].dtype == torch.uint8 and not (target["masks"].bool() & target["ignore"]).any()
    by_hand = open_split("semantic", "train", as_is, images=own / "images/val", labels=own / "labels/val", classes=own / "classes.txt")
    assert len(by_hand) == 2 and len(pickle.loads(pickle.dumps(by_hand))) == 2
    labels = own / "labels/val/photo_0.png"
    whole = np.zeros((40, 60), dtype=np.uint8)
    for picture in (Image.fromarray(whole), Image.fromarray(whole.astype(np.uint16)), Image.fromarray(whole > 0), Image.fromarray(whole, "P")):
        picture.save(labels)  # a palette's indices are the classes, whatever their colours
        assert dataset[0][1]["labels"].tolist() == [0] and dataset[0][1]["ignore"] is None


def test_label_pngs_that_cannot_be_right(own):
    dataset, labels = open_split("semantic", "val", as_is, data_dir=own), own / "labels/val/photo_0.png"
    for values, words in ((np.full((40, 60), 3, np.uint8), r"\[3\]"), (np.full((40, 60), 900, np.uint16), r"\[900\]")):
        Image.fromarray(values).save(labels)
        with pytest.raises(DataError, match=rf"photo_0\.png has the values {words}; the 3 classes are 0 to 2, no class is 255"):
            dataset[0]
    for mode in ("RGB", "RGBA", "LA"):
        Image.new(mode, (60, 40)).save(labels)
        with pytest.raises(DataError, match=rf"photo_0\.png holds colours \(mode {mode}\)"):
            dataset[0]
    Image.new("L", (40, 60)).save(labels)
    with pytest.raises(DataError, match=r"photo_0\.jpg is 60 x 40 pixels .*, its label PNG says 40 x 60"):
        dataset[0]
    labels.write_bytes(b"")
    with pytest.raises(DataError, match=r"photo_0\.png cannot be read"):
        dataset[0]


def test_semantic_folders_are_checked_at_the_start(own):
    def fails(words: str) -> None:
        with pytest.raises(DataError, match=words):
            open_split("semantic", "val", as_is, data_dir=own)
    (own / "images/val/photo_1.bmp").write_bytes((own / "images/val/photo_1.jpg").read_bytes())
    fails("more than one image named photo_1")
    (own / "images/val/photo_1.bmp").rename(own / "images/val/photo_2.bmp")
    fails(r"1 of the 3 label PNGs .* not in the label PNG folder .*photo_2\.png")
    for names in ("", "lake\nlake", "\n".join(map(str, range(256)))):
        (own / "classes.txt").write_text(names)
        fails(r"classes\.txt has \d+ classes, \d+ of them different")
    (own / "classes.txt").unlink()
    fails("none of classes.txt.*--classes=PATH")
    (own / "labels/val").rename(own / "labels/elsewhere")
    fails("none of labels/val.*--val_labels=PATH")


# Semantic jitter


def test_semantic_jitter_scales_the_shorter_edge(own):
    """60 x 40 pixels, the shorter edge to 1 x 64: 96 x 64; a crop of 64 x 64, or where it is scaled down, padding that is ignored."""
    for key in range(5):
        dataset = open_split("semantic", "val", semantic_jitter(64, (1.0, 1.0)), data_dir=own)
        image, target = dataset[0, key]
        assert image.shape == (3, 64, 64) and target["size"] == (64, 64) and target["ignore"][:8].all() and not target["ignore"][8:].any()
        _, small = open_split("semantic", "val", semantic_jitter(64, (0.5, 0.5)), data_dir=own)[0, key]
        assert small["size"] == (32, 48) and small["ignore"][32:].all() and small["ignore"][:, 48:].all() and not small["ignore"][4:32, :48].any()
        _, wide = open_split("semantic", "val", semantic_jitter((32, 64), (0.5, 2.0)), data_dir=own)[0, key]
        assert wide["masks"].shape[1:] == (32, 64)
    strip, view = semantic_jitter(64, (2.0, 2.0))(Image.new("RGB", (900, 10)), None)
    assert view.resized == (3, 256)  # the longer edge is 4 x 64 at most


def test_semantic_jitter_moves_image_and_labels_together():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (6, 9)).astype(np.int32).repeat(10, axis=0).repeat(10, axis=1)
    image = Image.fromarray(np.stack([80 * labels + 20] * 3, axis=2).astype(np.uint8))
    for key in range(20):
        torch.manual_seed(key)
        out, view = semantic_jitter(64, (0.5, 2.0), colour=False)(image, labels)
        shown = view.map(labels, -1)
        assert ((out[0].numpy() - 20.0) / 80).round()[shown >= 0] == pytest.approx(shown[shown >= 0], abs=1.1)
        assert np.mean(((out[0].numpy() - 20.0) / 80).round()[shown >= 0] != shown[shown >= 0]) < 0.3  # but for the edges, which the image blends
        assert not out[:, shown < 0].any()


def test_colours_change_and_the_labels_and_the_padding_do_not(own):
    plain, coloured = (open_split("semantic", "val", semantic_jitter(64, (0.5, 2.0), colour=colour), data_dir=own) for colour in (False, True))
    changed = 0
    for key in range(10):
        (image, target), (other, same) = plain[0, key], coloured[0, key]
        assert torch.equal(target["masks"], same["masks"]) and not other[:, target["size"][0]:].any() and other.float().std((1, 2)).max() < 130
        changed += not torch.equal(image, other)
        assert torch.equal(other, coloured[0, key][0])
    assert changed >= 7


def test_crops_of_a_single_category_are_avoided():
    """Nearly all is of class 0; the others are in a corner, and a cap finds it."""
    labels = np.zeros((200, 200), dtype=np.int32)
    labels[:, :60], labels[:20] = 1, -1
    image = Image.new("RGB", (200, 200))

    def share(cap: float) -> float:
        single = 0
        for key in range(100):
            torch.manual_seed(key)
            shown = semantic_jitter(64, (3.125, 3.125), single_category=cap, colour=False)(image, labels)[1].nearest(labels)
            single += np.bincount(shown[shown >= 0]).max() >= 0.75 * (shown >= 0).sum()
        return single / 100
    assert share(1.0) > 0.6 and share(0.75) < 0.15


# Shapes


@pytest.fixture(scope="module")
def scenes() -> list[data.Scene]:
    return [data.render(0, 0, number) for number in range(200)]


def test_scenes_have_the_promised_objects(scenes):
    objects = [[item for item in scene.items if item.outline is not None] for scene in scenes]
    for number, (scene, things) in enumerate(zip(scenes, objects, strict=True)):
        assert scene.image.shape == (128, 128, 3) and scene.image.dtype == np.uint8
        assert (len(things) == 0) if number % 20 == 13 else (1 <= len(things) <= 5)
        assert (len(scene.items) - len(things)) == (number % 50 == 7)
        covered = sum((data._coverage(item.visible) > 0.5).astype(int) for item in scene.items)
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
            visible = data._coverage(item.visible)
            inner, outer = visible == 1, data._coverage(item.whole) == 0
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
    scene = data.render(0, split, number)
    assert [item.label for item in scene.items] == labels
    assert [int((data._coverage(item.visible) > 0.5).sum()) for item in scene.items] == pytest.approx(areas, abs=4)
    assert np.bincount(scene.regions.ravel(), minlength=4) == pytest.approx(regions, abs=8)
    assert scene.image.mean((0, 1)) == pytest.approx(colour, abs=0.2)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    make_shapes(folder, train=60, val=20)
    return folder


def test_shapes_are_coco(shapes):
    assert sorted(path.name for path in shapes.parent.iterdir()) == ["shapes"]  # nothing else is left
    for split, count in (("train", 60), ("val", 20)):
        content = json.loads((shapes / f"annotations/instances_{split}.json").read_text())
        assert len(content["images"]) == count == len(list((shapes / split).iterdir()))
        kinds = Counter()
        for row in content["annotations"]:
            mask = mask_api.decode(data.to_rle(data.clean_segmentation(row["segmentation"], 128, 128, "")[0], 128, 128))
            kinds["crowd" if row["iscrowd"] else "polygon" if isinstance(row["segmentation"], list) else "rle"] += 1
            assert int(mask.sum()) == pytest.approx(row["area"], rel=0.15, abs=6) and row["id"] > 0
            x, y, w, h = row["bbox"]
            rows, columns = np.nonzero(mask)
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == pytest.approx((x, y, x + w, y + h), abs=2)
            if row["iscrowd"]:
                assert isinstance(row["segmentation"]["counts"], list)  # uncompressed, as COCO's
        assert kinds["polygon"] > 10 and kinds["rle"] > 5 and kinds["crowd"] == -(-(count - 7) // 50)
    train, val = (CocoDataset(*find_coco(shapes, split), as_is) for split in ("train", "val"))
    assert train.class_names == ["circle", "square", "triangle", "star"] and not set(train.image_ids) & set(val.image_ids)
    assert [index for index in range(60) if not len(train[index][1]["labels"])] == [13, 33, 53]


def test_shapes_are_deterministic_and_made_once(shapes, tmp_path):
    make_shapes(tmp_path / "again", train=60, val=20)
    files = sorted(path.relative_to(shapes) for path in shapes.rglob("*") if path.is_file())
    assert len(files) == 80 * 3 + 5 and all((shapes / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    before = (shapes / "train/000001.png").stat().st_mtime_ns
    make_shapes(shapes, train=60, val=20)
    assert (shapes / "train/000001.png").stat().st_mtime_ns == before


def test_a_killed_generation_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "_write_jsons", stop)
    with pytest.raises(KeyboardInterrupt):
        make_shapes(tmp_path / "shapes", train=2, val=1)
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").touch()
    with pytest.raises(DataError, match="mine exists and is not the shapes data set"):
        make_shapes(tmp_path / "mine")


def test_shapes_have_panoptic_and_semantic_truth(shapes):
    """The same scenes in three formats: segments of things are the instances, the semantic maps are the segments' classes."""
    instances, panoptic, semantic = (open_split(task, "train", as_is, data_dir=shapes) for task in ("instance", "panoptic", "semantic"))
    assert panoptic.class_names == semantic.class_names == [*data.SHAPES, *data.TEXTURES]
    assert panoptic.category_ids == [1, 2, 3, 4, 5, 6, 7, 8] and semantic.category_ids == [0, 1, 2, 3, 4, 5, 6, 7]
    assert panoptic.is_thing == [True] * 4 + [False] * 4 and not any(semantic.is_thing)
    content = json.loads((shapes / "annotations/panoptic_train.json").read_text())["annotations"]
    kinds = Counter()
    for index in range(len(panoptic)):
        ids, segments = panoptic.segments(index)
        assert np.array_equal(panoptic.label_map(index), semantic.label_map(index)) and (ids > 0).all()
        assert [{key: segment[key] for key in ("id", "category_id", "iscrowd", "area")} for segment in content[index]["segments_info"]] == segments
        kinds.update((segment["category_id"] > 4, segment["iscrowd"]) for segment in segments)
        things = [segment["id"] for segment in segments if segment["category_id"] <= 4 and not segment["iscrowd"]]
        masks = instances[index][1]["masks"].numpy()
        assert len(masks) == len(things)
        for number in things:  # polygons are rasterised, segments are not: along edges they differ
            assert min(((ids == number) ^ mask.astype(bool)).sum() for mask in masks) <= 0.1 * (ids == number).sum() + 6
    assert kinds[False, 1] == 2 and kinds[True, 1] == 0 and kinds[True, 0] > 60
    truth, theirs = panoptic.truth(), instances.truth()
    assert len(truth["annotations"]) == len(theirs["annotations"]) and [c["name"] for c in truth["categories"]] == list(data.SHAPES)


def test_shapes_of_an_earlier_version_are_completed(shapes, tmp_path):
    for part in ("train", "val", "annotations"):
        shutil.copytree(shapes / part, tmp_path / "old" / part, ignore=shutil.ignore_patterns("panoptic*"))
    other = shutil.copytree(tmp_path / "old", tmp_path / "other")
    before = (tmp_path / "old/train/000001.png").stat().st_mtime_ns
    make_shapes(tmp_path / "old", train=60, val=20)
    names = sorted(path.relative_to(shapes) for path in shapes.rglob("*"))
    assert names == sorted(path.relative_to(tmp_path / "old") for path in (tmp_path / "old").rglob("*"))
    assert (tmp_path / "old/train/000001.png").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="other has no panoptic and semantic truth, and its images are not those"):
        make_shapes(other, train=5, val=20)


# The command


@pytest.mark.parametrize(("task", "words"), [
    ("instance", ["instances_val.json", "20 images, 1 without objects", "star", "1 crowds"]),
    ("panoptic", ["panoptic_val.json, segments in", "20 images, 0 without segments", "checks", "1 crowds"]),
    ("semantic", ["labels/val", "20 images, 0 without regions", "dots"])])
def test_command(shapes, tmp_path, monkeypatch, capsys, task, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.py", str(shapes), "--split=val", f"--task={task}"])
    data.main()
    out = capsys.readouterr().out
    assert all(word in out for word in words)
    page = np.asarray(Image.open("shapes.png"))
    assert min(page.shape[:2]) > 500 and len(np.unique(page.reshape(-1, 3), axis=0)) > 1000
    monkeypatch.setattr(sys, "argv", ["data.py", str(tmp_path), f"--task={task}"])
    with pytest.raises(SystemExit, match="error: .*has none of"):
        data.main()


# Real images


@pytest.mark.skipif("COCO_TINY" not in os.environ, reason="set COCO_TINY to a folder with a small COCO")
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_coco(split):
    json_path, images = find_coco(os.environ["COCO_TINY"], split)
    dataset = CocoDataset(json_path, images, large_scale_jitter(320, (0.1, 2.0)))
    assert len(dataset) == 80 and len(dataset.class_names) == 80 and dataset.category_ids[-1] == 90
    samples = [dataset[index, index] for index in range(len(dataset))]
    for image, target in samples:
        assert image.shape == (3, 320, 320) and (target["boxes"] >= 0).all() and (target["boxes"] <= 1).all()
        assert target["masks"].amax((1, 2)).all() and len(target["labels"]) == len(target["boxes"]) == len(target["masks"])
    collate(samples[:4])
    raw = json.loads(json_path.read_text())["annotations"]
    truth = dataset.truth()["annotations"]
    assert len(truth) == len(raw) and sum(row["iscrowd"] for row in truth) == sum(row["iscrowd"] for row in raw)
    coco = COCO(str(json_path))
    theirs = {(row["image_id"], row["category_id"], *row["bbox"]): row for row in coco.dataset["annotations"]}
    for row in truth:
        other = theirs[(row["image_id"], row["category_id"], *row["bbox"])]
        assert row["area"] == other["area"] and (mask_api.decode(row["segmentation"]) == coco.annToMask(other)).all()


@pytest.mark.skipif("COCO_PANOPTIC_SAMPLE" not in os.environ, reason="set COCO_PANOPTIC_SAMPLE to the panoptic task's two sample images")
def test_real_panoptic():
    sample = Path(os.environ["COCO_PANOPTIC_SAMPLE"])
    json_path = sample / "panoptic_examples.json"
    dataset = open_split("panoptic", "val", large_scale_jitter(320, (0.5, 2.0)), data_dir=sample, json=json_path, images=sample / "input_images")
    assert len(dataset) == 2 and len(dataset.class_names) == 133 and sum(dataset.is_thing) == 80
    for index, row in enumerate(json.loads(json_path.read_text())["annotations"]):
        ids, segments = dataset.segments(index)
        assert [segment["area"] for segment in segments] == [segment["area"] for segment in row["segments_info"]]  # counted here, told there
        for segment in row["segments_info"]:
            y, x = np.nonzero(ids == segment["id"])
            assert [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1] == segment["bbox"]
        labels = dataset.label_map(index)
        assert ((labels == -1) == (ids == 0)).all() and labels.max() < 133
        image, target = dataset[index, 5]
        assert image.shape == (3, 320, 320) and len(target["labels"]) > 5 and target["masks"].sum(0).max() == 1  # segments never overlap
    truth = dataset.truth()
    assert [row["iscrowd"] for row in truth["annotations"]].count(1) == 3 and len(truth["categories"]) == 80
    with pytest.raises(DataError, match="000000142238.png has the segment ids"):
        PanopticDataset(json_path, sample / "panoptic_examples_2ch_format", sample / "input_images", as_is).segments(0)
