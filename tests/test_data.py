"""Tests of data.py on small generated files; `COCO_TINY=/folder/with/a/small/coco pytest tests/test_data.py` adds those on real images."""
import json
import os
import pickle
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
from data import BatchSampler, CocoDataset, DataError, collate, find_coco, large_scale_jitter, make_shapes

SQUARE = [10, 5, 30, 5, 30, 25, 10, 25]  # of 20 x 20 pixels


def as_is(image: Image.Image, target: dict) -> tuple[torch.Tensor, dict]:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), target


def halve(image: Image.Image, target: dict) -> tuple[torch.Tensor, dict]:
    return as_is(image.resize((image.width // 2, image.height // 2)), target)


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
        assert data.rasterise(segmentations, 40, 60).shape == (50, 40, 60)


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


def coloured_square() -> tuple[Image.Image, dict]:
    """A white square on dark ground, and a pixel in the last corner."""
    masks = torch.zeros((2, 60, 90), dtype=torch.uint8)
    masks[0, 12:40, 30:58], masks[1, -1, -1] = 1, 1
    pixels = 40 + 200 * masks[0].numpy()
    return Image.fromarray(np.stack([pixels] * 3, axis=2)), {"labels": torch.tensor([3, 4]), "masks": masks}


def test_jitter_moves_image_and_masks_together():
    image, target = coloured_square()
    jitter = large_scale_jitter(64, (0.4, 2.0))
    flips, vanished = 0, 0
    for key in range(60):
        torch.manual_seed(key)
        flips += torch.rand(1).item() < 0.5
        torch.manual_seed(key)
        out, moved = jitter(image, target)
        moved = data.finish_target(moved, out.shape[-2:])
        assert out.shape == (3, 64, 64) and out.dtype == torch.uint8
        vanished += 4 not in moved["labels"]
        white = out[0] > 140
        assert (3 in moved["labels"]) or white.sum() < 20
        if 3 in moved["labels"]:
            mask = moved["masks"][0].bool()
            assert (mask ^ white).sum() <= 0.6 * (mask.sum() ** 0.5 * 4)  # they differ along the edge at most
            rows, columns = np.nonzero(mask.numpy())
            cx, cy, w, h = (64 * moved["boxes"][0]).tolist()
            assert (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2) == pytest.approx((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        assert all(len(moved[key]) == len(moved["labels"]) for key in ("boxes", "masks"))
    assert 20 < flips < 40 and vanished > 10


def test_jitter_says_what_is_padding_and_flips_as_often_as_told():
    """A 60 x 90 image at half of what fits 64 x 64: 21 x 32 pixels of image, the rest is padding; boxes are of the whole square."""
    image, target = coloured_square()
    never, always = (large_scale_jitter(64, (0.5, 0.5), flip)(image, target) for flip in (0.0, 1.0))
    assert never[1]["size"] == always[1]["size"] == (21, 32) and not never[0][:, 21:].any() and not never[0][:, :, 32:].any()
    assert torch.equal(never[0][:, :21, :32].flip(-1), always[0][:, :21, :32])
    finished = data.finish_target(never[1], (64, 64))
    assert finished["size"] == (21, 32) and finished["boxes"][0, 0] < 0.3


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
def test_jitter_is_resize_then_crop_then_pad(write, scale):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    masks = torch.from_numpy(rng.integers(0, 2, (3, 60, 90), dtype=np.uint8))
    for key in range(6):
        torch.manual_seed(key)
        flip, _, top, left = torch.rand(4).tolist()
        torch.manual_seed(key)
        out, target = large_scale_jitter(72, (scale, scale))(image, {"labels": torch.arange(3), "masks": masks})
        h, w = round(60 * scale * 72 / 90), round(90 * scale * 72 / 90)
        y, x = round(top * max(0, h - 72)), round(left * max(0, w - 72))
        window = (slice(None), slice(y, y + 72), slice(x, x + 72))
        resized = torch.from_numpy(np.array(image.resize((w, h), Image.Resampling.BILINEAR))).permute(2, 0, 1)[window]
        nearest = torch.nn.functional.interpolate(masks[None].float(), size=(h, w), mode="nearest-exact")[0].byte()[window]
        if flip < 0.5:
            resized, nearest = resized.flip(2), nearest.flip(2)
        pad = (0, 72 - resized.shape[2], 0, 72 - resized.shape[1])
        assert (out.int() - torch.nn.functional.pad(resized, pad).int()).abs().max() <= 1
        assert (target["masks"] != torch.nn.functional.pad(nearest, pad)).float().mean() < 1e-3  # ties between two pixels may differ


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


# Shapes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    make_shapes(folder, train=60, val=20)
    return folder


@pytest.fixture(scope="module")
def scenes() -> list[data.Scene]:
    return [data.render(0, 0, number) for number in range(200)]


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
    assert len(files) == 82 and all((shapes / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    before = (shapes / "train/000001.png").stat().st_mtime_ns
    make_shapes(shapes, train=60, val=20)
    assert (shapes / "train/000001.png").stat().st_mtime_ns == before


def test_a_killed_generation_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "_write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        make_shapes(tmp_path / "shapes", train=2, val=1)
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").touch()
    with pytest.raises(DataError, match="mine exists and is not the shapes data set"):
        make_shapes(tmp_path / "mine")


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


# The command


def test_command(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.py", str(shapes), "--split=val"])
    data.main()
    out = capsys.readouterr().out
    assert "instances_val.json" in out and "20 images, 1 without objects" in out and "star" in out and "1 crowds" in out
    assert min(Image.open("shapes.png").size) > 500
    monkeypatch.setattr(sys, "argv", ["data.py", str(tmp_path)])
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
