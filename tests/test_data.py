"""Tests of data.py on small generated files; those on real images run where COCO_TINY or COCO_PANOPTIC_SAMPLE name a folder with a few."""
import contextlib
import copy
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import traceback
import warnings
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import data
import evaluate
from data import BatchSampler, CocoDataset, DataError, PanopticDataset, View, collate, find_coco, large_scale_jitter, make_shapes, open_split, semantic_jitter

SQUARE = [10, 5, 30, 5, 30, 25, 10, 25]  # of 20 x 20 pixels


def as_is(image: Image.Image, truth) -> tuple[torch.Tensor, None]:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), None


def halve(image: Image.Image, truth) -> tuple[torch.Tensor, None]:
    return as_is(image.resize((image.width // 2, image.height // 2)), truth)


def annotation(**changes) -> dict:
    row = {"id": 1, "image_id": 7, "category_id": 18, "iscrowd": 0, "area": 400, "bbox": [10, 5, 20, 20], "segmentation": [SQUARE]} | changes
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
    ("[]", "holds a list"), ("{", "no json"), ('{"images": []}', "'categories' is missing"), ('{"images": [], "categories": [{"id": 1}]}', "lists no images"),
    ('{"images": [], "categories": []}', "lists no categories"),
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
    with pytest.raises(DataError, match="some.json: annotation 31 of image 7 has an RLE of size"):
        CocoDataset(*write([annotation(id=31, segmentation=rle(60, 40))]), as_is)
    with pytest.raises(DataError, match="annotation 31 of image 7 has an RLE whose counts add up to 99"):
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


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "CMYK"])
def test_other_image_modes_become_rgb(write, mode):
    json_path, images = write([annotation()])
    Image.new("RGB", (60, 40), (255, 255, 255)).convert(mode).save(images / "7.png", format="TIFF" if mode == "CMYK" else "PNG")
    image, _ = CocoDataset(json_path, images, as_is)[0]
    assert image.shape == (3, 40, 60) and image.dtype == torch.uint8 and (image == 255).all()


def test_16_bits_are_scaled_and_32_are_refused(write):
    json_path, images = write([annotation()])
    grey = np.linspace(0, 65535, 2400).reshape(40, 60)
    Image.fromarray(grey.astype(np.uint16)).save(images / "7.png")
    dataset = CocoDataset(json_path, images, as_is)
    assert np.array_equal(dataset[0][0], np.broadcast_to(grey.astype(np.uint16) // 256, (3, 40, 60)))
    for kind in (np.float32, np.int32):
        Image.fromarray(grey.astype(kind)).save(images / "7.png", format="TIFF")
        with pytest.raises(DataError, match=r"7\.png has pixels of 32 bits .*save it with 8 or 16"):
            dataset[0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_that_agrees_with_the_json(write, orientation):
    """An upright picture of 60 x 40 pixels, stored as a camera would; then one that nobody turned, whatever its EXIF says; then one that fits in no way."""
    json_path, images = write([annotation()])
    upright = Image.fromarray(np.arange(60 * 40 * 3).reshape(40, 60, 3).astype(np.uint8))
    exif, swapped = Image.Exif(), orientation > 4
    exif[0x0112] = orientation
    stored = upright.transpose([None, Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_270]
                               [orientation - 4]) if swapped else upright
    stored.save(images / "7.png", exif=exif)
    report = data.Report(collect=True)
    dataset = CocoDataset(json_path, images, as_is, report=report)
    assert np.array_equal(dataset[0][0].permute(1, 2, 0), upright)
    dataset.examine(0, report)
    assert report.errors == 0 and ("turned" in data.problems(report)) is swapped and ("as stored" in data.problems(report)) is (1 < orientation < 5)
    upright.save(images / "7.png", exif=exif)
    assert np.array_equal(dataset[0][0].permute(1, 2, 0), upright)
    upright.resize((40, 50)).save(images / "7.png", exif=exif)
    with pytest.raises(DataError, match=r"7\.png is 40 x 50 pixels .*, the json says 60 x 40"):
        dataset[0]


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims this size."""
    chunks = (b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0]), b"IDAT" + zlib.compress(b""), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join((len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") for chunk in chunks)


def test_what_is_not_decoded(write, tmp_path):
    """Bombs, pipes, PostScript (for which Pillow would start an interpreter): refused before a pixel is read."""
    json_path, images = write([annotation()])
    dataset, picture = CocoDataset(json_path, images, as_is), images / "7.png"
    for content, words in ((bomb(30000, 30000), "exceeds limit"), (bomb(9000, 9000), "is 9000 x 9000 pixels"),
                           (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n%%EndComments\nshowpage\n", "cannot identify")):
        picture.write_bytes(content)
        with pytest.raises(DataError, match=rf"7\.png .*{words}"):
            dataset[0]
    picture.unlink()
    os.mkfifo(picture)
    with pytest.raises(DataError, match=r"7\.png is not there, or is no file"):
        dataset[0]
    with pytest.raises(DataError, match=r"1 image\(s\) have more than .* pixels, 20000 x 20000 .* of image 7 first: they are refused"):
        CocoDataset(*write([], images=[{"id": 7, "file_name": "8.png", "width": 20000, "height": 20000}]), as_is)


@pytest.mark.parametrize("name", ["../7.png", "a/../../7.png", "/etc/hostname", "C:\\7.png", "..\\7.png", "x" * 300, "", None, 7])
def test_file_names_stay_in_their_folder(write, write_panoptic, name):
    json_path, images = write([annotation()])
    content = json.loads(json_path.read_text())
    content["images"][0]["file_name"] = name
    json_path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"images\[0\] \(id 7\) has file_name = .* not a path inside of its folder"):
        CocoDataset(json_path, images, as_is)
    with pytest.raises(DataError, match=r"annotations\[0\] .*has file_name = .* not a path inside of its folder"):
        PanopticDataset(*write_panoptic(annotations=[{"image_id": 7, "file_name": name, "segments_info": SEGMENTS}]), as_is)


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
def test_bad_images_are_skipped_and_counted(write, write_panoptic, request, tmp_path, capsys, task):
    """One image of two has a broken file: an error, or a sentence and the other image."""
    if task == "instance":
        json_path, images = write([annotation(), annotation(id=2, image_id=3, category_id=5)])
        paths, broken = {"json": json_path, "images": images}, images / "7.png"
    elif task == "panoptic":
        rows = [{"image_id": key, "file_name": "7.png", "segments_info": SEGMENTS} for key in (7, 3)]
        (tmp_path / "val").mkdir()
        Image.new("RGB", (60, 40)).save(tmp_path / "val/3.jpg")
        images = [{"id": key, "file_name": f"{key}.jpg", "width": 60, "height": 40} for key in (7, 3)]
        paths, broken = dict(zip(("json", "panoptic", "images"), write_panoptic(annotations=rows, images=images), strict=True)), tmp_path / "val/7.jpg"
    else:
        paths, broken = {"data_dir": request.getfixturevalue("own")}, tmp_path / "labels/val/photo_0.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    with pytest.raises(DataError, match=f"{broken.name} cannot be read"):
        list(open_split(task, "val", as_is, **paths))
    dataset = open_split(task, "val", as_is, **paths, skip_bad_images=True)
    assert "1 of 2 images are skipped" in (out := capsys.readouterr().out) and str(broken) in out
    assert dataset.image_ids == [{"semantic": "photo_1"}.get(task, 3)] and len(dataset) == 1 and len(dataset.sizes) == 1
    assert dataset[0][1]["labels"].tolist() == {"instance": [0], "panoptic": [1, 0], "semantic": [0, 2]}[task]
    if task == "instance":
        assert [row["image_id"] for row in dataset.truth()["annotations"]] == [3]
    for path in broken.parent.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no image is usable; image .* cannot be read"):
        open_split(task, "val", as_is, **paths, skip_bad_images=True)


# Annotations


@pytest.mark.parametrize(("segmentation", "pixels"), [
    ([SQUARE], 400), (SQUARE, 400), ([SQUARE, [1, 2, 3, 4]], 400), ([SQUARE, [*SQUARE, 1]], 400), ([[float("nan"), *SQUARE[1:]], SQUARE], 400),
    ([[float("inf"), *SQUARE[1:]]], None), ([[10 ** 400, *SQUARE[1:]]], None), ("polygon", None), (7, None),
    ([["a", *SQUARE[1:]]], None), ([[1, 2, 3, 4]], None), (..., None), (None, None), ([], None), ([[]], None),
    ([[-1e9, -1e9, 1e9, -1e9, 1e9, 1e9, -1e9, 1e9]], 2400), ([[50, 30, 70, 30, 70, 50, 50, 50]], 100), (rle(40, 60), 3),
    (mask_api.frPyObjects(rle(40, 60), 40, 60) | {"counts": mask_api.frPyObjects(rle(40, 60), 40, 60)["counts"].decode()}, 3)])
def test_crooked_segmentations(write, capsys, segmentation, pixels):
    dataset = CocoDataset(*write([annotation(segmentation=segmentation)]), as_is)
    _, target = dataset[0]
    assert target["masks"].sum((1, 2)).tolist() == ([] if pixels is None else [pixels])
    assert [row["segmentation"]["size"] for row in dataset.truth()["annotations"]] == ([] if pixels is None else [[40, 60]])
    assert (pixels is None) == ("without a mask" in capsys.readouterr().out)


@pytest.mark.parametrize("counts", [
    "", "0", "z", "zzzzzzzz", "P", "PPPPPPPPP1", "\0", "\x7f", "é", "\ud800", "0" * 99, [2400.0], ["2400"], [True] * 2400, None, {}])
def test_damaged_rles_never_reach_pycocotools(write, counts):
    with pytest.raises(DataError, match=r"some\.json: annotation 4 of image 7 has an RLE (whose counts (are damaged|add up to)|without counts)"):
        CocoDataset(*write([annotation(id=4, segmentation={"size": [40, 60], "counts": counts})]), as_is)


def test_compressed_rles_are_understood():
    """As pycocotools writes them; and runs of nothing inside are taken out, which its IoU stops at."""
    rng = np.random.default_rng(0)
    for share in (0, 0.01, 0.3, 1):
        mask = np.asfortranarray(rng.random((70, 90)) < share, dtype=np.uint8)
        code = mask_api.encode(mask)
        assert data.decoded_counts(code["counts"].decode()) == data._run_lengths(mask)
        assert data.clean_rle({"size": [70, 90], "counts": code["counts"].decode()}, 70, 90, "", data.Report()) == code
    spread = [100, 0, 0, 50, 0, 10, 2240]
    for counts in (spread, mask_api.frPyObjects({"size": [40, 60], "counts": spread}, 40, 60)["counts"].decode()):
        clean = data.clean_rle({"size": [40, 60], "counts": counts}, 40, 60, "", data.Report())
        assert data.decoded_counts(clean["counts"].decode()) == [100, 60, 2240] and mask_api.area(clean) == 60


def test_a_polygon_without_end_is_left_out():
    zigzag = [0, 0, 120, 80] * 1000
    assert data.clean_polygon(zigzag[:400], 40, 60) and data.clean_polygon(zigzag, 40, 60) is None
    circle = (30 + 10 * np.stack([np.cos(turn := np.linspace(0, 6.28, 5000)), np.sin(turn)], axis=1)).ravel().tolist()
    assert data.clean_polygon(circle, 40, 60) == circle


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
        segmentations = [kept for polygon in polygons if (kept := data.clean_segmentation([polygon], 40, 60, "", data.Report()))]
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
        vanished += len(target["labels"]) < sum(not a.crowd for a in dataset.read(index))
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
    assert set(np.unique(dataset.label_map(0))) == {-1, 0} and dataset.contents(0, dataset.read(0)) == [(0, False, 600), (0, True, 100)]


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
    fails(r"1 image\(s\) have no entry in 'annotations', \[8\] first",
          images=[{"id": key, "file_name": f"{key}.jpg", "width": 60, "height": 40} for key in (7, 8)])
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
            mask = mask_api.decode(data.to_rle(data.clean_segmentation(row["segmentation"], 128, 128, "", data.Report()), 128, 128))
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
    ("instance", ["instances_val.json", "20 images (20 RGB), 1 without objects", "star", "1 crowds"]),
    ("panoptic", ["panoptic_val.json, segments in", "20 images (20 RGB), 0 without segments", "checks", "1 crowds"]),
    ("semantic", ["labels/val", "20 images (20 RGB), 0 without regions", "dots"])])
def test_command(shapes, tmp_path, monkeypatch, capsys, task, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.py", str(shapes), "--split=val", f"--task={task}"])
    data.main()
    out = capsys.readouterr().out
    assert all(word in out for word in words)
    page = np.asarray(Image.open("shapes.png"))
    assert min(page.shape[:2]) > 500 and len(np.unique(page.reshape(-1, 3), axis=0)) > 1000
    monkeypatch.setattr(sys, "argv", ["data.py", str(tmp_path), f"--task={task}"])
    with pytest.raises(SystemExit, match="error: training cannot start with the train and val data"):
        data.main()
    assert all(f"{split}: {tmp_path} has none of" in capsys.readouterr().out for split in ("train", ))


# Fuzzing: whatever stands in the files, training and evaluation end with a result or a sentence

NASTY = [
    None, True, False, 0, 1, -1, 7, 2 ** 31, 2 ** 63, 10 ** 400, 0.5, -0.0, 60.0, 1e9, 1e308, float("nan"), float("inf"), "", "7", "x", "../7.png",
    "/etc/hostname", "C:\\x.png", "a\0b", "\ud800", "\u202e\x1b[2J", "x" * 5000, [], {}, [[]], [[[]]], [0], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6],
    [[1e9] * 6], [[float("nan")] * 6], [None] * 6, ["a"] * 6, [[10 ** 400] * 6], {"counts": [0] * 50 + [2400]},
    *({"size": [40, 60]} | ({} if counts is None else {"counts": counts}) for counts in (
        None, [2400], [2399], [-1, 2401], [1.5, 2398.5], [0] * 50 + [2400], [1, 0, 0, 9, 2390], "", "zzzzzzzz", "00000\0", "0" * 100)),
    {"size": [10 ** 6, 10 ** 6], "counts": [10 ** 12]}]


def nodes(content, path: tuple = ()) -> list[tuple]:
    """The paths of all values inside lists and dicts."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [found for key, value in inner for found in [(*path, key), *nodes(value, (*path, key))]]


def mutate_json(rng: np.random.Generator, content: dict) -> None:
    for _ in range(rng.integers(1, 4)):
        *path, key = (paths := nodes(content))[rng.integers(len(paths))]
        parent = content
        for step in path:
            parent = parent[step]
        kind, other = rng.integers(5), copy.deepcopy(parent[key])
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, list):
            parent.insert(rng.integers(len(parent) + 1), other)
        elif kind == 2 and isinstance(other, str) and other:
            place = rng.integers(len(other))
            parent[key] = other[:place] + chr(rng.integers(1, 128)) * rng.integers(3) + other[place + 1:]
        elif kind == 3 and isinstance(other, (int, float)) and abs(other) < 1e300:
            parent[key] = other * float(rng.choice([-1, 0, 0.5, 1.5, 2, 1000])) + float(rng.choice([0, 0, 1, -1]))
        else:
            parent[key] = copy.deepcopy(NASTY[rng.integers(len(NASTY))])
        if not content:
            return


def mutate_bytes(rng: np.random.Generator, whole: bytes) -> bytes:
    array, kind = bytearray(whole), rng.integers(6)
    if kind == 0:
        return bytes(array[:rng.integers(len(array))])
    if kind == 1:
        heads = (b"", b"<html>not found</html>", b"\xef\xbb\xbf", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n", b"[" * 100000)
        return heads[rng.integers(len(heads))] + whole * int(rng.integers(2))
    if kind == 2 and array[:4] == b"\x89PNG":  # another size, with the right checksum
        place = 16 + 4 * int(rng.integers(2))
        array[place:place + 4] = int(rng.choice([0, 1, 40, 60, 20000, 2 ** 31 - 1])).to_bytes(4, "big")
        array[29:33] = zlib.crc32(array[12:29]).to_bytes(4, "big")
        return bytes(array)
    for _ in range(rng.integers(1, 12)):
        array[rng.integers(len(array)) if kind < 5 else rng.integers(min(60, len(array)))] = rng.integers(256)
    return bytes(array)


def fuzz_case(seed: int, root: Path) -> str:
    """Makes data, damages them, and does with them all that the doctor, training and evaluation do."""
    rng = np.random.default_rng(seed)
    task = str(rng.choice(["detection", "instance", "instance", "panoptic", "semantic"]))
    photos = root / ("images/val" if task == "semantic" else "val")
    for folder in (photos, root / "panoptic_val", root / "labels/val", root / "annotations"):
        folder.mkdir(parents=True)
    kinds = rng.choice(["png", "jpg", "bmp", "gif", "tif", "webp"], 3)
    pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8) // 64 * 64
    ids = id_map()
    for number, kind in enumerate(kinds):
        picture = Image.fromarray(pixels).convert(str(rng.choice(["RGB", "L"])))
        if rng.random() < 0.1:
            picture = Image.fromarray(rng.integers(0, 65536, (40, 60), dtype=np.uint16)) if kind == "png" else picture.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(1, 9))
        picture.save(photos / f"{number}.{kind}", **({"exif": exif} if kind == "jpg" and rng.random() < 0.3 else {}))
        data.save_ids(ids, root / f"panoptic_val/{number}.png")
        Image.fromarray(np.where(ids == 0, 255, ids % 7 % 2).astype(np.uint8)).save(root / f"labels/val/{number}.png")
    (root / "classes.txt").write_text("dog\nsky\n")
    images = [{"id": 5 + number, "file_name": f"{number}.{kind}", "width": 60, "height": 40} for number, kind in enumerate(kinds)]
    rle_text = mask_api.encode(np.asfortranarray(ids == 1000, dtype=np.uint8))["counts"].decode()
    shapes = [[SQUARE], STAR, {"size": [40, 60], "counts": rle_text}, rle(40, 60), SQUARE]
    content = {"images": images, "categories": [{"id": 18, "name": "dog", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]}
    if task == "panoptic":
        content["annotations"] = [{"image_id": 5 + number, "file_name": f"{number}.png", "segments_info": copy.deepcopy(SEGMENTS)} for number in range(3)]
    else:
        content["annotations"] = [annotation(id=number, image_id=int(5 + number % 3), category_id=[18, 2][number % 2], segmentation=shapes[number],
                                             iscrowd=int(number == 3)) for number in range(5)]
    if task != "semantic" and rng.random() < 0.7:
        mutate_json(rng, content)
    file = root / f"annotations/{'panoptic' if task == 'panoptic' else 'instances'}_val.json"
    file.write_text(json.dumps(content))
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and (path.suffix != ".json" or rng.random() < 0.2)]
    for _ in range(rng.choice([0, 1, 2])):
        path = files[rng.integers(len(files))]
        path.write_bytes(mutate_bytes(rng, path.read_bytes() or b" "))
    return use(task, root, skip_bad_images=bool(rng.random() < 0.3))


def use(task: str, root: Path, skip_bad_images: bool) -> str:
    """Everything that is done with a split; in words, how it ended. The doctor has to know it beforehand."""
    before, report, outcome, bad = set(root.rglob("*")), data.Report(collect=True), "fine", False
    jitter, resize = (semantic_jitter if task == "semantic" else large_scale_jitter)(64, (0.1, 2.0)), partial(evaluate.resize_for_test, short=48, long=96)
    try:
        dataset = open_split(task, "val", jitter, data_dir=root, report=report)
        data.check(dataset, report)
        data.problems(report)
    except DataError:
        bad = True
    try:
        dataset = open_split(task, "val", jitter, data_dir=root)
        for key in range(3):
            collate([dataset[index, key] for index in range(len(dataset))])
    except DataError as error:
        outcome = str(error)
    assert (outcome == "fine") == (not bad and not report.errors), (outcome, report.found)
    try:
        dataset = open_split(task, "val", resize, data_dir=root, skip_bad_images=skip_bad_images)
        (root / "out").mkdir()
        evaluate.evaluate(Guess(dataset, task), dataset, root / "out")
        evaluate.page(dataset, Guess(dataset, task), root / "out/predictions.png", count=2)
        if len(dataset):
            data.draw_page(dataset.select([0]), root / "out/page.png")
    except DataError as error:
        assert skip_bad_images or outcome != "fine", error
        outcome = str(error)
    assert not {path for path in root.rglob("*") if root / "out" not in (path, *path.parents)} - before, "written outside of the folder for it"
    assert len(outcome) < 3000 and outcome.count("\n") == 0, outcome
    return outcome


class Guess(torch.nn.Module):
    """A model that answers with fixed boxes, masks and maps, whatever it sees."""

    def __init__(self, dataset: data.ImageDataset, task: str):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(task=task, precision="fp32")
        self.classes = {"names": dataset.class_names, "category_ids": dataset.category_ids, "is_thing": dataset.is_thing}

    def forward(self, images, sizes):
        return len(images)

    def postprocess(self, output, valid, sizes, semantic=False):
        return [self.answer(*size) for size in sizes]

    def answer(self, H: int, W: int) -> dict:
        masks, last = torch.zeros((2, H, W), dtype=torch.bool), len(self.classes["names"]) - 1
        masks[0, :H // 2 + 1], masks[1, :, :W // 2 + 1] = True, True
        things = {"scores": torch.tensor([0.9, 0.5]), "labels": torch.tensor([0, last]), "masks": masks,
                  "boxes": torch.tensor([[0, 0, W, H // 2 + 1], [0, 0, W // 2 + 1, H]]).float()}
        segment = {"id": 1, "label": last, "isthing": bool(self.classes["is_thing"][last]), "score": 0.9}
        task = self.config.task
        if task == "semantic":
            return {"semantic": masks[0].long() * last}
        if task == "detection":
            del things["masks"]
        return things | ({"panoptic": masks[0].long(), "segments": [segment], "semantic": masks[0].long() * last} if task == "panoptic" else {})


def fuzz(first: int, last: int, root: Path) -> None:
    """A line for each case as it ends; what is no clean end, with its traceback, begins with FAILED."""
    torch.set_num_threads(1)
    for seed in range(first, last):
        print(seed, end=": ", flush=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                outcome = fuzz_case(seed, root / str(seed))
            except Exception:
                outcome = "FAILED " + " | ".join(traceback.format_exc().splitlines())
        shutil.rmtree(root / str(seed))
        print(outcome.encode("ascii", "backslashreplace").decode(), flush=True)


def run_fuzz(first: int, last: int, root: Path, processes: int = 1, limit: int = 900) -> None:
    """Cases in processes of their own, which a decoder may crash or hang."""
    bounds = np.linspace(first, last, processes + 1).astype(int).tolist()
    code = "import sys, test_data; test_data.fuzz(int(sys.argv[1]), int(sys.argv[2]), test_data.Path(sys.argv[3]))"
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([sys.executable, "-c", code, str(start), str(end), str(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env=environment) for start, end in zip(bounds, bounds[1:], strict=False)]
    lines = []
    for process in running:
        try:
            out, complaints = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            out, complaints = process.communicate()
            pytest.fail(f"case {out.splitlines()[-1]} takes for ever")
        assert process.returncode == 0, f"a crash in case {(out.splitlines() or ['none'])[-1]}: {complaints[-3000:]}"
        lines += out.splitlines()
    assert len(lines) == last - first
    failed = [line for line in lines if ": FAILED" in line]
    assert not failed, "\n".join([f"{len(failed)} of {len(lines)}", *failed[:5]])
    fine = sum(line.endswith(": fine") for line in lines)
    print(f"{len(lines)} cases, {fine} with a result, {len(lines) - fine} with a sentence")
    assert 0.1 < fine / len(lines) < 0.9  # neither harmless nor hopeless


def test_fuzz(tmp_path):
    run_fuzz(0, 300, tmp_path)


@pytest.mark.slow
def test_fuzz_long(tmp_path):
    run_fuzz(1000, 3000, tmp_path, processes=2, limit=3600)


# The doctor: each row of what is known to go wrong, and what becomes of it


@pytest.fixture
def doctor(monkeypatch, capsys):
    """doctor(*arguments) -> (what is printed, the last sentence when training cannot start)."""
    def run(*arguments) -> tuple[str, str | None]:
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
        try:
            data.main()
        except SystemExit as error:
            return capsys.readouterr().out, error.code
        return capsys.readouterr().out, None
    return run


CROOKED = [
    ({"segmentation": ...}, "1 annotation(s) without a mask: left out"), ({"segmentation": []}, "1 annotation(s) without a mask: left out"),
    ({"segmentation": [[]]}, "1 annotation(s) without a mask: left out"), ({"segmentation": [[1, 2, 3, 4]]}, "1 malformed polygon(s): left out"),
    ({"segmentation": [[*SQUARE, 1]]}, "1 malformed polygon(s): left out"), ({"segmentation": SQUARE}, "1 polygon(s) without a list around them: taken as one"),
    ({"segmentation": [[float("nan"), *SQUARE[1:]]]}, "1 malformed polygon(s): left out"),
    ({"segmentation": [[float("inf"), *SQUARE[1:]]]}, "1 malformed polygon(s): left out"),
    ({"segmentation": [[1e9, *SQUARE[1:]]]}, "1 polygon(s) far outside the image: clipped"),
    ({"segmentation": [[70, 5, 90, 5, 90, 25]]}, "1 mask(s) without a pixel: left out"),
    ({"segmentation": [[5, 5] * 3]}, "1 mask(s) without a pixel: left out"),
    ({"segmentation": rle(40, 60)}, "no problems"), ({"segmentation": rle(40, 60, [2399])}, "1 unusable RLEs: error"),
    ({"segmentation": rle(60, 40)}, "1 unusable RLEs: error"), ({"segmentation": {"size": [40, 60], "counts": "zz"}}, "1 unusable RLEs: error"),
    ({"iscrowd": ...}, "1 annotation(s) without a usable iscrowd: taken as 0"), ({"area": ...}, "1 annotation(s) without a usable area: computed"),
    ({"area": float("nan")}, "1 annotation(s) without a usable area: computed"), ({"iscrowd": 1}, "1 crowds"),
    ({"iscrowd": "no"}, "1 impossible entries: error"),
    ({"id": 0}, "1 annotation id(s) 0: numbered anew"), ({"id": 2}, "1 annotation id(s) used twice: numbered anew"),
    ({"image_id": 99}, "1 annotation(s) of unknown images: left out"), ({"category_id": 77}, "1 unknown categories: error"),
    ({"category_id": float("nan")}, "1 impossible entries: error"), ({"bbox": ...}, "1 annotation(s) without a usable bbox: taken from the mask"),
    ({"bbox": [70, 5, 9, 9]}, "1 annotation(s) without a usable bbox: taken from the mask"),
    ({"bbox": [5, 5, 0, 9]}, "1 annotation(s) without a usable bbox: taken from the mask"),
    ({"bbox": [float("nan")] * 4, "segmentation": ...}, "1 annotation(s) without a mask: left out")]


@pytest.mark.parametrize(("changes", "words"), CROOKED)
def test_crooked_annotations(write, doctor, tmp_path, changes, words):
    """The second annotation is crooked, the first one is not; the doctor names it, and does as training does."""
    json_path, images = write([annotation(id=2), annotation(**{"id": 31} | changes)])
    out, sentence = doctor(tmp_path, f"--json={json_path}", f"--images={images}", "--split=val", f"--out={tmp_path / 'page.png'}")
    assert words in out and (sentence is None) is (": error" not in words), out
    good = words in ("no problems", "1 crowds")
    assert (tmp_path / "page.png").exists() and ("no problems" in out) is good
    assert doctor(tmp_path, f"--json={json_path}", f"--images={images}", "--split=val", "--strict", f"--out={tmp_path / 'page.png'}")[1] is None or not good
    if not good and "annotations[1]" not in out and "unknown categories" not in words and "mask(s)" not in words:
        assert f"annotation {changes.get('id', 31)} of image {changes.get('image_id', 7)}" in out
    if ": error" in words:
        with pytest.raises(DataError):
            CocoDataset(json_path, images, as_is)
    else:
        kept = sum(len(target["labels"]) for _, target in CocoDataset(json_path, images, as_is))
        assert f"; {kept} objects" in out


def test_crooked_jsons_and_files(write, doctor, tmp_path):
    def told(*annotations, spoil=lambda json_path, images: None, **parts) -> str:
        json_path, images = write(list(annotations) or [annotation()], **parts)
        spoil(json_path, images)
        out, sentence = doctor(tmp_path, f"--json={json_path}", f"--images={images}", f"--out={tmp_path / 'page.png'}")
        assert (sentence is None) is (": error" not in out and " images (" in out), out
        return out
    rows = [{"id": key, "file_name": f"{key}.png", "width": 60, "height": 40} for key in (7, 3)]
    exif = Image.Exif()
    exif[0x0112] = 6
    assert "1 doubles: error" in told(images=[*rows, rows[0] | {"file_name": "8.png"}])
    assert "1 doubles: error" in told(images=[rows[0], rows[1] | {"file_name": "7.png"}])
    assert "1 impossible entries: error" in told(images=[rows[0], rows[1] | {"width": float("nan")}])
    assert "1 incomplete entries: error" in told(images=[rows[0], {"id": 3, "file_name": "3.png"}])
    assert "some image ids are numbers and some are texts" in told(images=[rows[0], rows[1] | {"id": "3"}])
    assert "1 category name(s) used twice: told apart by their ids" in told(categories=[{"id": 18, "name": "dog"}, {"id": 5, "name": "dog"}])
    assert "there are no objects to learn from" in told(annotation(iscrowd=1))
    assert "images (2 RGB), 1 without objects" in told(spoil=lambda json_path, images: json_path.write_bytes(b"\xef\xbb\xbf" + json_path.read_bytes()))
    assert "is no json file" in told(spoil=lambda json_path, images: json_path.write_text("[" * 100000))
    assert "3.png is not there" in told(spoil=lambda json_path, images: (images / "3.png").unlink())
    assert "3.png is 40 x 60 pixels (width x height), the json says 60 x 40" in told(
        spoil=lambda json_path, images: Image.new("RGB", (40, 60)).save(images / "3.png"))
    assert "1 image(s) with an EXIF orientation: turned to the size in the json" in told(
        spoil=lambda json_path, images: Image.new("RGB", (40, 60)).save(images / "3.png", exif=exif))
    assert "1 image(s) of 16 bits: scaled to 8" in told(spoil=lambda json_path, images: Image.new("I;16", (60, 40)).save(images / "3.png"))
    assert "2 images (1 RGB, 1 L)" in told(spoil=lambda json_path, images: Image.new("L", (60, 40)).save(images / "3.png"))
    for broken in (b"", b"<html>not found</html>", bomb(60, 40)):
        out = told(spoil=lambda json_path, images, broken=broken: (images / "3.png").write_bytes(broken))
        assert "1 unusable files: error\n    image 3: image file" in out


def test_a_split_without_truth_can_be_evaluated_but_not_learnt(write, doctor, tmp_path):
    json_path, images = write(None)
    command = [tmp_path, f"--json={json_path}", f"--images={images}", f"--out={tmp_path / 'page.png'}"]
    out, sentence = doctor(*command, "--split=val")
    assert sentence is None and "1 split without objects: every metric is n/a" in out
    out, sentence = doctor(*command, "--split=train")
    assert "train data" in sentence and "1 empty splits: error" in out


def test_many_problems_stay_readable(write, doctor, tmp_path, capsys):
    json_path, images = write([annotation(id=number, area=...) for number in range(1, 2001)])
    out, sentence = doctor(tmp_path, f"--json={json_path}", f"--images={images}", f"--out={tmp_path / 'page.png'}")
    assert sentence is None and len(out) < 3000 and "2000 annotation(s) without a usable area: computed" in out and "and 1990 more: --all" in out
    out, sentence = doctor(tmp_path, f"--json={json_path}", f"--images={images}", "--all", "--strict", f"--out={tmp_path / 'page.png'}")
    assert sentence == "error: training cannot start with the train data: correct what is above" and "annotation 2000 of image 7" in out
    CocoDataset(json_path, images, as_is)
    assert capsys.readouterr().out == f"{json_path}: 2000 annotation(s) without a usable area computed; python data.py says which\n"


def test_the_doctor_counts_sizes_and_checks_both_splits(shapes, own, doctor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, sentence = doctor(shapes)
    assert sentence is None and out.count("no problems") == 2 and "60 images" in out and "20 images" in out
    rows = [line.split() for line in out.split("val: ")[1].splitlines() if line.split()[-1] in data.SHAPES]
    areas = Counter((row["category_id"], row["area"] >= 32 ** 2) for row in json.loads((shapes / "annotations/instances_val.json").read_text())["annotations"]
                    if not row["iscrowd"])
    assert [[int(number) for number in row[:4]] for row in rows] == [[areas[k, 0] + areas[k, 1], areas[k, 0], areas[k, 1], 0] for k in (1, 2, 3, 4)]
    (own / "labels/val/photo_0.png").write_bytes(b"")
    out, sentence = doctor(own, "--task=semantic")
    assert "train and val data" in sentence and "has none of labels/train" in out and "1 unusable files: error" in out
    for task in ("panoptic", "semantic"):
        assert doctor(shapes, f"--task={task}")[1] is None


def test_splits_without_a_common_class_cannot_start(shapes, doctor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = shutil.copytree(shapes, tmp_path / "other")
    file = other / "annotations/instances_val.json"
    content = json.loads(file.read_text())
    for category in content["categories"]:
        category["name"] += "!"
    file.write_text(json.dumps(content))
    assert "have no class name in common" in doctor(other)[1]


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
