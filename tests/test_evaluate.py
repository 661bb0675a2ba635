"""Tests of evaluate.py: AP against COCOeval itself, PQ and mIoU against arithmetic, one process against two, pictures, own images, the command line's
sentences."""
import dataclasses
import json
import math
import os
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import data
import evaluate
import kernels
import maskdino

H, W = 96, 128
CATEGORIES = [{"id": 7, "name": "box"}, {"id": 3, "name": "bar"}, {"id": 90, "name": "rod"}]   # neither sorted nor contiguous
CLASSES = {"names": ["bar", "box", "rod"], "category_ids": [3, 7, 90], "is_thing": [True] * 3}
IDENTITY = partial(evaluate.resize_for_test, short=H, long=W)
pytestmark = pytest.mark.usefixtures("one_thread")                      # two busy cores and OpenMP's spinning threads make small tensors very slow


def mask_of(box: list) -> np.ndarray:
    """uint8 (H, W) of a rectangle [x, y, w, h]."""
    x, y, w, h = box
    mask = np.zeros((H, W), np.uint8)
    mask[y:y + h, x:x + w] = 1
    return mask


def code_of(mask: np.ndarray) -> dict:
    code = rle.encode(np.asfortranarray(mask))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def objects_of(number: int) -> list[tuple[int, list]]:
    """(category id, [x, y, w, h]) of image `number`: 0 to 3 rectangles, the third one larger than 32 x 32."""
    rng = np.random.default_rng(number)
    sizes = [(12, 8), (20, 30), (50, 40)][:number % 4]
    return [(CATEGORIES[i]["id"], [int(rng.integers(W - w)), int(rng.integers(H - h)), w, h]) for i, (w, h) in enumerate(sizes)]


def make_coco(folder: Path, count: int = 7, annotated: bool = True) -> Path:
    """A COCO tree in the format's careless form: annotation ids from 0, no iscrowd, no area; one crowd. The first pixel holds the number."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    images, annotations = [], []
    for number in range(count):
        pixels = np.full((H, W, 3), 90, np.uint8)
        pixels[0, 0] = number
        for _, (x, y, w, h) in objects_of(number):
            pixels[y:y + h, x:x + w] = 200
            pixels[0, 0] = number
        Image.fromarray(pixels).save(folder / "val2017" / f"{number}.png")
        images.append({"id": 100 + number, "file_name": f"{number}.png", "height": H, "width": W})
        for category, (x, y, w, h) in objects_of(number):
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append({"id": len(annotations), "image_id": 100 + number, "category_id": category, "segmentation": polygon,
                                "bbox": [x, y, w, h]})
    crowd = {"size": [H, W], "counts": [0, 40 * H, (W - 40) * H]}
    annotations.append({"id": len(annotations), "image_id": 104, "category_id": 7, "iscrowd": 1, "segmentation": crowd, "bbox": [0, 0, 40, H]})
    content = {"images": images, "categories": CATEGORIES} | ({"annotations": annotations} if annotated else {})
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return folder


def dataset_of(folder: Path) -> data.CocoDataset:
    return data.CocoDataset(*data.find_coco(folder, "val"), IDENTITY)


class Oracle(torch.nn.Module):
    """Knows every image by its first pixel and answers with its objects, moved by `shift` pixels, and with `extra` false ones."""

    def __init__(self, classes: dict = CLASSES, shift: int = 0, extra: int = 0, task: str = "instance"):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.classes, self.shift, self.extra, self.config = classes, shift, extra, SimpleNamespace(task=task, precision="auto")

    def forward(self, images, sizes):
        assert not self.training and not torch.is_grad_enabled()
        return images[:, 0, 0, 0].tolist()

    def postprocess(self, output, sizes, original_sizes, semantic=False):
        assert all(size == (H, W) for size in original_sizes)
        return [self.answer(number) for number in output]

    def predict(self, images, threshold=0.0):
        results = [self.answer(3) for _ in images]
        results = [{key: value[result["scores"] > threshold] for key, value in result.items()} for result in results]
        sizes = [(len(result["scores"]), image.height, image.width) for image, result in zip(images, results, strict=True)]
        return [result | {"masks": torch.ones(size, dtype=torch.bool)} for size, result in zip(sizes, results, strict=True)]

    def answer(self, number):
        rng = np.random.default_rng(1000 + number)
        false = [(self.classes["category_ids"][rng.integers(3)], [int(rng.integers(80)), int(rng.integers(60)), 30, 20]) for _ in range(self.extra)]
        found = [(k, [box[0] + int(rng.integers(self.shift + 1)), *box[1:]]) for k, box in objects_of(number)] + false
        names = {c["id"]: c["name"] for c in CATEGORIES}
        labels = torch.tensor([self.classes["names"].index(names[k]) if names[k] in self.classes["names"] else 1 for k, _ in found], dtype=torch.int64)
        boxes = torch.tensor([[x, y, x + w, y + h] for _, (x, y, w, h) in found], dtype=torch.float32).reshape(-1, 4)
        masks = torch.from_numpy(np.array([mask_of(box) for _, box in found]).reshape(-1, H, W)).bool()
        scores = torch.from_numpy(np.sort(rng.random(len(found)))[::-1].astype(np.float32))
        result = {"scores": scores, "labels": labels, "boxes": boxes, "masks": masks}
        return result if self.config.task != "detection" else {k: v for k, v in result.items() if k != "masks"}


KINDS = [*({**c, "isthing": 1} for c in CATEGORIES), {"id": 200, "name": "grass", "isthing": 0}, {"id": 300, "name": "sky", "isthing": 0}]


def make_maps(folder: Path, count: int = 5) -> Path:
    """A panoptic tree, and own folders for semantic segmentation beside it (classes in the order of KINDS): rectangles on grass and sky, void around the
    edge; in image 4 a crowd. The first pixel holds the number."""
    for name in ("annotations", "val2017", "panoptic_val2017", "images/val", "labels/val"):
        (folder / name).mkdir(parents=True)
    (folder / "classes.txt").write_text("".join(f"{kind['name']}\n" for kind in KINDS))
    images, annotations = [], []
    for number in range(count):
        ids, labels = np.zeros((H, W), np.int32), np.full((H, W), 255, np.uint8)
        shapes = [(200, [3, 3, 61, 90]), (300, [64, 3, 61, 90]), *objects_of(number), *([(3, [2, 70, 90, 20])] if number == 4 else [])]
        for i, (category, (x, y, w, h)) in enumerate(shapes):
            ids[y:y + h, x:x + w] = 70000 * (i + 1)
            labels[y:y + h, x:x + w] = [kind["id"] for kind in KINDS].index(category)
        pixels = np.repeat(labels[..., None] * 37, 3, axis=2)
        pixels[0, 0] = number
        for image in (folder / f"val2017/{number}.png", folder / f"images/val/{number}.png"):
            Image.fromarray(pixels).save(image)
        data.save_ids(ids, folder / f"panoptic_val2017/p{number}.png")
        Image.fromarray(labels).save(folder / f"labels/val/{number}.png")
        images.append({"id": 100 + number, "file_name": f"{number}.png", "height": H, "width": W})
        segments = [{"id": 70000 * (i + 1), "category_id": category, "iscrowd": int(number == 4 and category == 3)} for i, (category, _) in enumerate(shapes)]
        annotations.append({"image_id": 100 + number, "file_name": f"p{number}.png", "segments_info": [s for s in segments if (ids == s["id"]).any()]})
    content = {"images": images, "annotations": annotations, "categories": KINDS}
    (folder / "annotations/panoptic_val2017.json").write_text(json.dumps(content))
    return folder


class Echo(torch.nn.Module):
    """Knows every image by its first pixel and answers with its truth, moved by `shift` pixels. It has the data's classes in reverse, and one more."""

    def __init__(self, dataset: data.ImageDataset, task: str, shift: int = 0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.dataset, self.shift, self.config = dataset, shift, SimpleNamespace(task=task, precision="auto")
        names = [*dataset.class_names[::-1], "ghost"]
        self.classes = {"names": names, "category_ids": list(range(len(names))), "is_thing": [*dataset.is_thing[::-1], False]}

    def forward(self, images, sizes):
        assert not self.training and not torch.is_grad_enabled()
        return images[:, 0, 0, 0].tolist()

    def postprocess(self, output, sizes, original_sizes, semantic=False):
        task = self.config.task
        return [(self.map_of(number) if task == "panoptic" else {}) | ({"semantic": self.labels_of(number)} if semantic or task == "semantic" else {})
                for number in output]

    def labels_of(self, number):
        labels, last = np.roll(self.dataset.label_map(number), self.shift, axis=1), len(self.dataset.class_names) - 1
        return torch.from_numpy(np.where(labels < 0, last + 1, last - labels)).long()          # void is a ghost

    def map_of(self, number):
        ids, segments = self.dataset.segments(number)
        ids, segments = np.roll(ids, self.shift, axis=1), [s for s in segments if not s["iscrowd"]]
        masks = torch.stack([torch.from_numpy(ids == s["id"]) for s in segments])
        labels = torch.tensor([len(self.dataset.class_names) - 1 - self.dataset.category_ids.index(s["category_id"]) for s in segments])
        things = torch.tensor(self.classes["is_thing"])[labels]
        found = [{"id": i + 1, "label": k, "isthing": thing, "score": 0.5} for i, (k, thing) in enumerate(zip(labels.tolist(), things.tolist(), strict=True))]
        boxes = torchvision.ops.masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
        return {"panoptic": (masks * torch.arange(1, len(masks) + 1)[:, None, None]).sum(0), "segments": found, "scores": torch.full((int(things.sum()),), 0.9),
                "labels": labels[things], "boxes": boxes[things], "masks": masks[things]}


# ---------------------------------------------------------------------------------------------------------------- numbers
def truth_of(boxes: dict[int, list], crowds: dict[int, list] | None = None) -> dict:
    """COCO truth of one category 5 from {image id: [boxes]}."""
    rows = [(image, box, crowd) for crowd, group in enumerate((boxes, crowds or {})) for image, some in group.items() for box in some]
    annotations = [{"id": i, "image_id": image, "category_id": 5, "iscrowd": crowd, "bbox": box, "area": box[2] * box[3],
                    "segmentation": code_of(mask_of(box))} for i, (image, box, crowd) in enumerate(rows, start=1)]
    return {"images": [{"id": i, "height": H, "width": W} for i in boxes], "annotations": annotations, "categories": [{"id": 5, "name": "thing"}]}


def results_of(rows: list[tuple]) -> tuple[list, list]:
    """Results for boxes and masks from (image id, box, score)."""
    boxes = [{"image_id": i, "category_id": 5, "bbox": box, "score": score} for i, box, score in rows]
    return boxes, [{"image_id": i, "category_id": 5, "segmentation": code_of(mask_of(box)), "score": score} for i, box, score in rows]


BOXES = {1: [[10, 10, 20, 20], [60, 40, 40, 40]], 2: [[5, 5, 30, 12]]}
PERFECT = [(i, box, 0.9) for i, some in BOXES.items() for box in some]


def test_perfect_predictions_score_100_and_sizes_without_truth_none():
    truth, results = truth_of(BOXES), results_of(PERFECT)
    before = json.dumps((truth, results))
    metrics = evaluate.coco_metrics(truth, *results, [1, 2])
    for kind in ("box", "mask"):
        assert [metrics[f"{kind}_{name}"] for name in evaluate.METRICS] == [100, 100, 100, 100, 100, None]
    assert metrics["per_class"] == {"thing": {"box_AP": 100, "mask_AP": 100, "truth": 3, "detections": 3}}
    assert json.dumps((truth, results)) == before


def test_no_detections_score_0_and_no_truth_none():
    nothing = evaluate.coco_metrics(truth_of(BOXES), [], [], [1, 2])
    assert nothing["box_AP"] == nothing["mask_AP"] == nothing["mask_AP50"] == 0 and nothing["box_APl"] is None
    for truth in (None, truth_of({1: [], 2: []})):
        metrics = evaluate.coco_metrics(truth, *results_of(PERFECT), [1, 2])
        assert {metrics[f"{kind}_{name}"] for kind in ("box", "mask") for name in evaluate.METRICS} == {None}
    assert evaluate.coco_metrics(truth_of(BOXES), results_of(PERFECT)[0], None, [1, 2])["mask_AP"] is None


def test_detections_in_a_crowd_are_ignored_and_elsewhere_false():
    crowd = {1: [[64, 0, 60, 30]]}
    for spot, same in (([70, 5, 15, 15], True), ([30, 70, 15, 15], False)):
        metrics = evaluate.coco_metrics(truth_of(BOXES, crowd), *results_of([*PERFECT, (1, spot, 0.99)]), [1, 2])
        assert (metrics["box_AP"] == 100) is (metrics["mask_AP"] == 100) is same
    assert metrics["per_class"]["thing"]["truth"] == 3


def test_only_the_given_images_count():
    metrics = evaluate.coco_metrics(truth_of(BOXES), *results_of([row for row in PERFECT if row[0] == 2]), [2])
    assert metrics["mask_AP"] == 100 and metrics["per_class"]["thing"]["truth"] == 1


def test_numbers_equal_cocoeval_with_more_than_255_masks(tmp_path, capsys):
    dataset, model = dataset_of(make_coco(tmp_path / "coco", 40)), Oracle(shift=6, extra=9)
    metrics = evaluate.evaluate(model, dataset, tmp_path, batch_size=3)
    capsys.readouterr()
    for kind, name in (("box", "bbox"), ("mask", "segm")):
        truth = COCO()
        truth.dataset = dataset.truth()
        truth.createIndex()
        found = truth.loadRes(str(tmp_path / f"results_{name}.json"))
        assert len(found.anns) > 400
        scorer = COCOeval(truth, found, name)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
        expected = [None if v < 0 else 100 * v for v in scorer.stats[:6]]
        assert [metrics[f"{kind}_{m}"] for m in evaluate.METRICS] == pytest.approx(expected, abs=1e-4)
        assert 5 < metrics[f"{kind}_AP"] < 95


# ------------------------------------------------------------------------------------------------------------- evaluation
def test_evaluate_maps_careless_ids_and_leaves_cocos_result_files(tmp_path, capsys):
    dataset, model = dataset_of(make_coco(tmp_path / "coco")), Oracle().train()
    metrics = evaluate.evaluate(model, dataset, tmp_path / "out", batch_size=4)
    assert metrics["box_AP"] == metrics["mask_AP"] == 100 and model.training
    assert metrics["per_class"]["box"]["truth"] == 5                                          # crowds are no objects
    boxes, masks = (json.loads((tmp_path / f"out/results_{name}.json").read_text()) for name in ("bbox", "segm"))
    assert [b["category_id"] for b in boxes if b["image_id"] == 103] == [7, 3, 90]
    assert boxes[0].keys() == {"image_id", "category_id", "bbox", "score"} and boxes[0]["bbox"] == objects_of(1)[0][1]
    assert masks[0].keys() == {"image_id", "category_id", "segmentation", "score"}
    assert np.array_equal(rle.decode(masks[0]["segmentation"]), mask_of(objects_of(1)[0][1]))
    printed = capsys.readouterr().out
    assert "100.0" in printed and "n/a" in printed and "rod" in printed and "Accumulating" not in printed


def test_labels_are_matched_by_name(tmp_path):
    """Another order, and classes that only one side knows: their detections are left out; without any in common there is an error."""
    dataset = dataset_of(make_coco(tmp_path / "coco"))
    turned = {"names": ["rod", "box", "bar"], "category_ids": [1, 2, 3], "is_thing": [True] * 3}
    assert evaluate.evaluate(Oracle(turned), dataset, tmp_path)["mask_AP"] == 100
    other = CLASSES | {"names": ["bar", "cat", "rod"]}
    metrics = evaluate.evaluate(Oracle(other), dataset, tmp_path)["per_class"]
    assert metrics["box"]["box_AP"] == 0 and metrics["bar"]["box_AP"] == metrics["rod"]["box_AP"] == 100
    assert evaluate._missing(other, dataset) == "only the checkpoint knows cat; only the data knows box"
    assert evaluate._missing(turned, dataset) == ""
    evaluate.page(dataset, Oracle(other), tmp_path / "page.png")
    with pytest.raises(data.DataError, match="no class in common: the checkpoint knows a, b, c"):
        evaluate.evaluate(Oracle(CLASSES | {"names": ["a", "b", "c"]}), dataset, tmp_path)


def test_evaluation_draws_no_truth(tmp_path, monkeypatch):
    """Masks of the truth are for training; here they would be work for nothing."""
    dataset, drawn = dataset_of(make_coco(tmp_path / "coco")), []
    rasterise = data.rasterise
    monkeypatch.setattr(data, "rasterise", lambda objects, *size: drawn.extend(objects) or rasterise(objects, *size))
    assert evaluate.evaluate(Oracle(), dataset, tmp_path)["mask_AP"] == 100 and not drawn
    assert sum(len(dataset[i][1]["masks"]) for i in range(len(dataset))) == len(drawn) > 0


def test_a_json_without_annotations_gives_predictions_only(tmp_path, capsys):
    metrics = evaluate.evaluate(Oracle(), dataset_of(make_coco(tmp_path / "coco", annotated=False)), tmp_path)
    assert metrics["box_AP"] is metrics["mask_AP"] is None and metrics["per_class"] == {}
    assert "predictions only" in capsys.readouterr().out and len(json.loads((tmp_path / "results_segm.json").read_text())) == 9


def test_detection_has_no_masks(tmp_path):
    metrics = evaluate.evaluate(Oracle(task="detection"), dataset_of(make_coco(tmp_path / "coco")), tmp_path)
    assert metrics["box_AP"] == 100 and metrics["mask_AP"] is None and not (tmp_path / "results_segm.json").exists()


def quality_of(truth, truth_segments, found, found_segments, things=()):
    """Panoptic quality of one image whose category ids are their names."""
    counts = evaluate.panoptic_counts(np.array(truth), truth_segments, np.array(found), found_segments)
    ids = sorted({s["category_id"] for s in [*truth_segments, *found_segments]})
    return counts, evaluate.panoptic_metrics([counts], ids, ids, [i in things for i in ids])


def segment(number: int, category: str, crowd: int = 0) -> dict:
    return {"id": number, "category_id": category, "iscrowd": crowd}


def test_panoptic_quality_matches_above_half_and_leaves_void_out_of_the_union():
    truth = [[0, 0, 1, 1, 1, 1, 2, 2, 2, 2]]
    found = [[5, 5, 5, 5, 5, 0, 6, 6, 7, 7]]
    segments = [segment(5, "a"), segment(6, "b"), segment(7, "b")]
    counts, metrics = quality_of(truth, [segment(1, "a"), segment(2, "b")], found, segments, things="b")
    # a: 3 pixels in common, 5 + 4 - 3 - 2 in the union without void. b: both halves have an IoU of 2/4, which is not above 0.5.
    assert counts["a"].tolist() == [1, 0, 0, 3 / 4] and counts["b"].tolist() == [0, 2, 1, 0]
    assert metrics["per_class"] == {"a": {"PQ": 75, "SQ": 75, "RQ": 100}, "b": {"PQ": 0, "SQ": 0, "RQ": 0}}
    assert (metrics["PQ"], metrics["PQ_things"], metrics["PQ_stuff"], metrics["SQ"], metrics["RQ"]) == (37.5, 0, 75, 37.5, 50)


def test_void_and_crowds_excuse_more_than_half_of_a_segment():
    truth = [[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 3, 3]]
    found = [[5, 5, 6, 6, 6, 0, 6, 6, 7, 7, 7, 8, 7, 8, 9, 9]]
    segments = [segment(1, "a", crowd=1), segment(2, "a"), segment(3, "b")]
    counts, _ = quality_of(truth, segments, found, [segment(5, "b"), segment(6, "b"), segment(7, "a"), segment(8, "a"), segment(9, "a")])
    # b: 5 lies on void, and so does 6 for 3 pixels of 5; 3 is missed. a: 7 lies on the crowd of a for 3 pixels of 4, but 8 for 1 of 2 only, and 9 is
    # false; 2 is missed, the crowd is not.
    assert counts["b"].tolist() == [0, 0, 1, 0] and counts["a"].tolist() == [0, 2, 1, 0]
    counts, _ = quality_of(truth, segments, found, [segment(7, "b"), segment(6, "a")])
    assert counts["b"].tolist() == [0, 1, 1, 0]                                               # a crowd of another class is no excuse
    assert counts["a"].tolist() == [0, 0, 1, 0]                                               # void and crowd together are


def test_panoptic_quality_without_truth_or_predictions():
    nothing = evaluate.panoptic_metrics([{}], ["a", "b"], [1, 2], [True, False])
    assert {value for key, value in nothing.items() if key != "per_class"} == {None} and nothing["per_class"]["a"] == {"PQ": None, "SQ": None, "RQ": None}
    _, metrics = quality_of([[1, 1]], [segment(1, "a")], [[0, 0]], [], things="a")
    assert (metrics["PQ"], metrics["SQ"], metrics["RQ"], metrics["PQ_things"], metrics["PQ_stuff"]) == (0, 0, 0, 0, None)


SAMPLE = os.environ.get("COCO_PANOPTIC_SAMPLE")


@pytest.fixture(scope="module")
def sample() -> data.PanopticDataset:
    if not SAMPLE:
        pytest.skip("COCO_PANOPTIC_SAMPLE names no folder")
    return data.PanopticDataset(f"{SAMPLE}/panoptic_examples.json", f"{SAMPLE}/panoptic_examples", f"{SAMPLE}/input_images", IDENTITY)


def metrics_on(sample, *found) -> dict:
    """found: (map, segments) of each image."""
    counts = [evaluate.panoptic_counts(*sample.segments(i), *answer) for i, answer in enumerate(found)]
    return evaluate.panoptic_metrics(counts, sample.class_names, sample.category_ids, sample.is_thing)


def test_panoptic_quality_of_the_truth_itself_is_100(sample):
    truth = [sample.segments(i) for i in range(2)]
    everything = metrics_on(sample, *truth)                                                   # crowds drawn as segments are no false positives
    plain = metrics_on(sample, *((ids, [s for s in segments if not s["iscrowd"]]) for ids, segments in truth))
    for metrics in (everything, plain):
        assert {value for key, value in metrics.items() if key != "per_class"} == {100}
        assert [name for name, row in metrics["per_class"].items() if row["PQ"] is not None] == [
            "person", "truck", "horse", "sports ball", "gravel", "tree-merged", "sky-other-merged", "grass-merged"]


def test_panoptic_quality_of_corrupted_truth_is_what_arithmetic_says(sample):
    (ids, segments), second = (sample.segments(i) for i in range(2))
    ids, categories = ids.copy(), {s["id"]: s["category_id"] for s in segments if not s["iscrowd"]}
    sky, grass, person, ball, crowd = 11829830, 10025880, 3937500, 16757838, 3153362
    # The first image has 13 persons and a crowd, a ball, tree, sky and grass; the second 13 persons, 2 trucks, 11 horses, gravel, tree, sky and grass.
    right = (ids == sky) & (np.arange(640) >= 560)                                            # the sky, 8204 pixels, split into 6154 and 2050
    ids[right], categories[1] = 1, 187
    ids[(ids == grass) & (np.arange(427) >= 400)[:, None]] = 0                                # of the grass, 75100 pixels, 57820 remain
    ids[ids == person] = 0                                                                    # a person removed
    categories[ball] = 1                                                                      # the ball is said to be a person
    categories[crowd] = 19                                                                    # the crowd of persons is said to be a horse
    del categories[person]
    metrics = metrics_on(sample, (ids, [{"id": i, "category_id": k} for i, k in categories.items()]), second)
    wanted = {                                           # true positives, false ones, missed ones, sum of IoU
        "person": (12 + 13, 1, 1, 25), "sports ball": (0, 0, 1, 0), "truck": (2, 0, 0, 2), "horse": (11, 1, 0, 11),
        "gravel": (1, 0, 0, 1), "tree-merged": (1 + 1, 0, 0, 2), "sky-other-merged": (1 + 1, 1, 0, 6154 / 8204 + 1),
        "grass-merged": (1 + 1, 0, 0, 57820 / 75100 + 1)}
    qualities = {name: (100 * iou / (tp + fp / 2 + fn / 2), 100 * iou / max(tp, 1), 100 * tp / (tp + fp / 2 + fn / 2))
                 for name, (tp, fp, fn, iou) in wanted.items()}
    assert qualities["person"] == (100 * 25 / 26, 100, 100 * 25 / 26)
    assert qualities["sky-other-merged"][0] == pytest.approx(100 * (0.750121891760117 + 1) / 2.5, abs=1e-9)
    for name, row in metrics["per_class"].items():
        assert list(row.values()) == pytest.approx(qualities.get(name, [None] * 3), abs=1e-9)
    names = list(wanted)
    for part, some in (("", names), ("_things", names[:4]), ("_stuff", names[4:])):
        for i, key in enumerate(evaluate.QUALITIES):
            assert metrics[key + part] == pytest.approx(sum(qualities[name][i] for name in some) / len(some), abs=1e-9)


def test_semantic_numbers_by_hand():
    truth, found = np.array([[0, 0, 0, 0, 1, 1, -1, -1]]), np.array([[0, 0, 1, 2, 1, 3, 0, 2]])
    pixels = evaluate.confusion(truth, found, 3)                                              # class 2 is never true, 3 is none of the three
    assert pixels.tolist() == [[2, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
    metrics = evaluate.semantic_metrics(pixels, ["a", "b", "c"])
    a, b = 2 / 4, 1 / 3                                                                       # of 4 + 2 - 2 and 2 + 2 - 1 pixels
    assert metrics["per_class"] == {"a": {"IoU": 100 * a}, "b": {"IoU": pytest.approx(100 * b)}, "c": {"IoU": None}}
    assert [metrics[name] for name in evaluate.SEMANTIC] == pytest.approx([100 * (a + b) / 2, 100 * (4 * a + 2 * b) / 6, 100 * 3 / 6])
    nothing = evaluate.semantic_metrics(np.zeros((2, 3), np.int64), ["a", "b"])
    assert nothing == dict.fromkeys(evaluate.SEMANTIC) | {"per_class": {"a": {"IoU": None}, "b": {"IoU": None}}}


def test_perfect_maps_score_100_and_round_trip_through_the_servers_formats(tmp_path, capsys):
    root = make_maps(tmp_path / "tree")
    dataset = data.open_split("panoptic", "val", IDENTITY, data_dir=root)
    metrics = evaluate.evaluate(Echo(dataset, "panoptic"), dataset, tmp_path / "out", batch_size=2)
    assert evaluate.EMPTY.keys() | {"per_class"} == metrics.keys()
    assert {metrics[key] for key in evaluate.EMPTY} == {100, None} and metrics["box_APl"] is metrics["mask_APl"] is None
    assert metrics["per_class"]["grass"] == {"PQ": 100, "SQ": 100, "RQ": 100, "IoU": 100}
    assert metrics["per_class"]["rod"] == dict.fromkeys(("PQ", "SQ", "RQ", "IoU", "box_AP", "mask_AP"), 100) | {"truth": 1, "detections": 1}
    assert "stuff" in capsys.readouterr().out
    content = json.loads((tmp_path / "out/panoptic.json").read_text())
    assert [a["image_id"] for a in content["annotations"]] == [100, 101, 102, 103, 104] and content["categories"] == sorted(KINDS, key=lambda c: c["id"])
    images = json.loads((root / "annotations/panoptic_val2017.json").read_text())["images"]
    (tmp_path / "out/panoptic.json").write_text(json.dumps(content | {"images": images}))
    again = data.PanopticDataset(tmp_path / "out/panoptic.json", tmp_path / "out/panoptic", root / "val2017", IDENTITY)
    for i in range(4):                                                                        # image 4 has a crowd, which is not predicted
        assert np.array_equal(again.label_map(i), dataset.label_map(i))
        assert [(s["category_id"], s["area"]) for s in again.segments(i)[1]] == [(s["category_id"], s["area"]) for s in dataset.segments(i)[1]]
    assert {r["image_id"] for r in json.loads((tmp_path / "out/results_segm.json").read_text())} == {101, 102, 103}


def test_perfect_labels_round_trip_through_pngs(tmp_path):
    root = make_maps(tmp_path / "tree")
    dataset = data.open_split("semantic", "val", IDENTITY, data_dir=root)
    metrics = evaluate.evaluate(Echo(dataset, "semantic"), dataset, tmp_path / "out")
    assert [key for key in evaluate.EMPTY if metrics[key] is not None] == [*evaluate.SEMANTIC] and metrics["mIoU"] == metrics["pixel_accuracy"] == 100
    picture, truth = (np.array(Image.open(file)) for file in (tmp_path / "out/semantic/3.png", root / "labels/val/3.png"))
    assert picture.dtype == np.uint8 and np.array_equal(picture, truth)                       # the ghost, which the data do not know, is 255
    dataset.category_ids = [7, 8, 11, 12, 300]                                                # what a server calls them
    evaluate.evaluate(Echo(dataset, "semantic"), dataset, tmp_path / "wide")
    wide = np.array(Image.open(tmp_path / "wide/semantic/3.png"))
    assert wide.dtype == np.uint16 and np.array_equal(wide, np.array([*dataset.category_ids, *[65535] * 251])[truth])


def test_instance_truth_of_a_panoptic_model(tmp_path):
    """Other ids for the same names: detections have those of their own truth."""
    dataset = data.open_split("panoptic", "val", IDENTITY, data_dir=make_maps(tmp_path / "tree"))
    things = dataset_of(make_coco(tmp_path / "coco", count=5))
    things.category_ids = [i + 1000 for i in things.category_ids]
    metrics = evaluate.evaluate(Echo(dataset, "panoptic"), dataset, tmp_path / "out", things=things)
    assert metrics["box_AP"] == metrics["mask_AP"] == 100
    assert {r["category_id"] for r in json.loads((tmp_path / "out/results_bbox.json").read_text())} == {1003, 1007, 1090}


def test_no_truth_gives_predictions_only(tmp_path, capsys):
    root = make_maps(tmp_path / "tree")
    dataset = data.open_split("panoptic", "val", IDENTITY, data_dir=root)
    content = json.loads((root / "annotations/panoptic_val2017.json").read_text())
    del content["annotations"]
    (root / "annotations/panoptic_val2017.json").write_text(json.dumps(content))
    metrics = evaluate.evaluate(Echo(dataset, "panoptic"), data.open_split("panoptic", "val", IDENTITY, data_dir=root), tmp_path / "out")
    assert {metrics[key] for key in evaluate.EMPTY} == {None} and metrics["per_class"]["sky"] == {"PQ": None, "SQ": None, "RQ": None, "IoU": None}
    assert "predictions only" in capsys.readouterr().out and (tmp_path / "out/panoptic/4.png").exists()


def test_annotation_id_0_is_found(tmp_path):
    """pycocotools takes a match with id 0 for none: the evaluator numbers from 1."""
    root = make_coco(tmp_path / "coco")
    file = root / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"] = [row for row in content["annotations"] if row["id"] == 0]
    file.write_text(json.dumps(content | {"images": content["images"][1:2]}))
    assert evaluate.evaluate(Oracle(), dataset_of(root), tmp_path)["mask_AP"] == 100


def test_no_ground_truth_in_the_split_is_not_0(tmp_path, capsys):
    """Crowds alone are no truth."""
    root = make_coco(tmp_path / "coco")
    file = root / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"annotations": [row for row in content["annotations"] if row.get("iscrowd")]}))
    metrics = evaluate.evaluate(Oracle(), dataset_of(root), tmp_path)
    assert metrics["mask_AP"] is None and metrics["box_AP"] is None
    assert "n/a" in (out := capsys.readouterr().out) and "no ground truth in this split: every metric is n/a" in out


def test_bad_images_are_left_out_of_the_scores_when_asked(tmp_path, checkpoint, capsys):
    root = make_coco(tmp_path / "coco")
    (root / "val2017/3.png").write_bytes((root / "val2017/3.png").read_bytes()[:90])
    command = [str(checkpoint), f"--data={root}", f"--out={tmp_path / 'out'}", "--device=cpu"]
    with pytest.raises(SystemExit, match=r"error: image file .*3\.png cannot be read"):
        evaluate.main(command)
    evaluate.main([*command, "--skip_bad_images"])
    result = json.loads((tmp_path / "out/result_eval.json").read_text())
    assert "1 of 7 images are skipped" in capsys.readouterr().out and result["images"] == 6
    truth = Counter(category for number in range(7) if number != 3 for category, _ in objects_of(number))
    assert {name: row["truth"] for name, row in result["per_class"].items()} == {c["name"]: truth[c["id"]] for c in CATEGORIES}
    assert not {row["image_id"] for row in json.loads((tmp_path / "out/results_bbox.json").read_text())} & {103}


def test_nothing_is_written_outside_of_its_folder(tmp_path):
    """Files are named after images, whose names a json gives: with folders in them, dots, and a name that two share."""
    root = make_maps(tmp_path / "maps", 3)
    names = ["a/b/0.png", "c/0.png", "a/...png"]
    file = root / "annotations/panoptic_val2017.json"
    content = json.loads(file.read_text())
    for number, (row, name) in enumerate(zip(content["images"], names, strict=True)):
        (root / "val2017" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"val2017/{number}.png").rename(root / "val2017" / name)
        row["file_name"] = name
    file.write_text(json.dumps(content))
    before = sorted(tmp_path.rglob("*"))
    dataset = data.open_split("panoptic", "val", IDENTITY, data_dir=root)
    evaluate.evaluate(Echo(dataset, "panoptic"), dataset, tmp_path / "out")
    made = [path for path in tmp_path.rglob("*") if path not in before]
    assert all(path == tmp_path / "out" or tmp_path / "out" in path.parents for path in made) and len(list((tmp_path / "out/panoptic").iterdir())) == 3
    content["images"][0]["file_name"] = "../../../0.png"
    file.write_text(json.dumps(content))
    with pytest.raises(data.DataError, match="not a path inside of its folder"):
        data.open_split("panoptic", "val", IDENTITY, data_dir=root)


def test_names_of_files_that_are_made_differ():
    files = [Path("x/a.png"), Path("x/b.png"), Path("x/b.bmp"), Path("x/c.png"), Path("y/c.png")]
    assert evaluate._stems(files) == ["a", "b.png", "b.bmp", "x_c.png", "y_c.png"]


def test_table_and_hint():
    rows = {f"class {i}": {"box_AP": None, "mask_AP": 12.34, "truth": 0, "detections": 9} for i in range(21)}
    metrics = {f"{kind}_{name}": None for kind in ("box", "mask") for name in evaluate.METRICS} | {"per_class": rows}
    assert "class 3" not in evaluate.table(metrics) and "n/a" in evaluate.table(metrics)
    assert "class 3" in evaluate.table(metrics, per_class=True)
    boxes = results_of(PERFECT)[0]
    assert evaluate.hint(truth_of(BOXES), boxes) == ""
    assert "do not meet" in evaluate.hint(truth_of(BOXES), [b | {"category_id": 1} for b in boxes])
    assert "no detections" in evaluate.hint(truth_of(BOXES), []) and "no ground truth" in evaluate.hint(truth_of({1: []}), boxes)


def three_tasks(folder: Path, out: Path) -> list[dict]:
    dataset = dataset_of(folder / "coco")
    metrics = [evaluate.evaluate(Oracle(shift=6, extra=4), dataset, out)]
    for task in ("panoptic", "semantic"):
        dataset = data.open_split(task, "val", IDENTITY, data_dir=folder / "maps")
        metrics.append(evaluate.evaluate(Echo(dataset, task, shift=5), dataset, out))
    return metrics


def run_rank(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    (folder / f"rank{rank}.json").write_text(json.dumps(three_tasks(folder, folder / "two")))
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    make_coco(tmp_path / "coco")
    make_maps(tmp_path / "maps")
    alone = three_tasks(tmp_path, tmp_path / "one")
    torch.multiprocessing.spawn(run_rank, (2, tmp_path), nprocs=2)
    assert 0 < alone[0]["mask_AP"] < 100 and 0 < alone[1]["PQ"] < 100 and 0 < alone[2]["mIoU"] < 100
    assert json.loads((tmp_path / "rank0.json").read_text()) == json.loads((tmp_path / "rank1.json").read_text()) == alone
    files = [file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*.*")]
    assert len(files) == 3 + 5 + 5 and all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


# --------------------------------------------------------------------------------------------------------------- pictures
def test_overlay_enlarges_small_images_and_draws_inside_the_mask():
    image, result = torch.full((3, H, W), 128, dtype=torch.uint8), Oracle().answer(3)
    drawn = evaluate.overlay(image, result["labels"].tolist(), result["scores"], result["boxes"], result["masks"], CLASSES["names"])
    assert drawn.shape == (3, 3 * H, 3 * W) and drawn.dtype == torch.uint8
    x, y, w, h = objects_of(3)[2][1]
    inside = drawn[:, 3 * (y + h) - 9, 3 * (x + w) - 9].float()
    expected = 0.55 * 128 + 0.45 * torch.tensor(evaluate.colour(2))
    assert (inside - expected).abs().max() <= 2
    empty = evaluate.overlay(image, [], None, torch.zeros(0, 4), torch.zeros(0, H, W, dtype=torch.bool), [], side=64)
    assert empty.shape == (3, 48, 64) and (empty == 128).all()
    boxes_only = evaluate.overlay(image, result["labels"].tolist(), None, result["boxes"], None, CLASSES["names"], side=W)
    assert boxes_only.shape == image.shape and (boxes_only != image).any()


def test_overlay_survives_boxes_beyond_the_image():
    image, boxes = torch.zeros((3, H, W), dtype=torch.uint8), torch.tensor([[-50.0, -50, 500, 500], [300, 200, 400, 300]])
    assert evaluate.overlay(image, [0, 1], [0.5, 0.4], boxes, None, ["a", "a name much longer than the picture is wide, which must not matter"]).any()


def test_the_first_colours_differ_in_greyscale_and_all_are_colours():
    colours = np.array([evaluate.colour(k) for k in range(1000)])
    assert colours.min() >= 0 and colours.max() <= 255
    grey = np.sort(colours[:4] @ (0.299, 0.587, 0.114))
    assert np.diff(grey).min() > 25


def test_page_shows_truth_beside_prediction(tmp_path):
    dataset = dataset_of(make_coco(tmp_path / "coco"))
    evaluate.page(dataset, Oracle(), tmp_path / "page.png", count=5, title="A title")
    page = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert page.shape == (64 + 2 * (192 + 8), 6 * (256 + 8) + 8 + 2 * 8, 3)                     # two rows of three pairs
    assert (page[:44] < 100).any() and (page[44:64] < 100).any()                              # title, captions
    assert (page[264:, :256] != 255).any() and (page[264:, -256:] == 255).all()               # the fifth pair is the last
    evaluate.page(dataset, Oracle(task="detection"), tmp_path / "boxes.png", count=100)
    assert Image.open(tmp_path / "boxes.png").height == 64 + 3 * 200                          # 7 images, not 100


def test_maps_are_painted_in_the_classes_colours():
    image, regions = torch.full((3, 100, 100), 128, dtype=torch.uint8), torch.full((100, 100), -1)
    regions[10:, :50], regions[10:, 50:] = 0, 1                                               # two instances of one class under a void strip
    drawn = evaluate.overlay_map(image, regions, [1, 1], ["a", "b"], side=400).float()
    expected = 0.55 * 128 + 0.45 * torch.tensor(evaluate.colour(1))
    assert (drawn[:, 300, 50] - expected).abs().max() <= 2 and (drawn[:, 300, 350] - expected).abs().max() <= 2
    assert drawn[:, :30].max() <= 33 and (drawn[:, 300, 195:205] == 255).all(0).any()         # void is dark, a white line runs between the two
    assert (drawn[:, 120:160, 80:120] == torch.tensor(evaluate.colour(1)).view(3, 1, 1)).all(0).any()                # a name
    assert (evaluate.overlay_map(image, torch.full((100, 100), -1), [], []) <= 33).all()


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_page_of_maps(tmp_path, task):
    dataset = data.open_split(task, "val", IDENTITY, data_dir=make_maps(tmp_path / "tree"))
    evaluate.page(dataset, Echo(dataset, task), tmp_path / "page.png", count=2)
    page = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert page.shape == (64 + 192 + 8, 4 * (256 + 8) + 8 + 8, 3)


def test_curves(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("")
    evaluate.curves(log, tmp_path / "empty.png")
    parts = {f"layer{i}/{name}": 0.5 * i for i in range(3) for name in ("class", "mask")}
    lines = [{"kind": "step", "step": s, "loss": 9 / (s + 1), "lr": 1e-4, "grad_norm": math.inf if s == 5 else 3.0, "losses": parts}
             for s in range(900)]
    lines += [{"kind": "epoch", "step": 400}, {"kind": "epoch", "step": 800, "box_AP": 12.5, "mask_AP": None}]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate.curves(log, tmp_path / "curves.png")
    empty, full = (np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("empty.png", "curves.png"))
    assert empty.shape == full.shape and min(full.shape) > 800
    assert (full < 128).sum() > 2 * (empty < 128).sum()


@pytest.mark.parametrize("low, high", [(0, 1), (0, 3e-4), (0, 368_750), (0, 61.3), (0, 0.7)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = evaluate._ticks(low, high, log=False)
    assert 3 <= len(ticks) <= 8 and ticks[0] == 0 and ticks[-1] <= high * (1 + 1e-9)
    assert all(len(f"{t:g}") <= 6 for t in ticks)
    assert evaluate._ticks(-1.2, 0.9, log=True) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5])
    assert evaluate._ticks(-4.1, 0.9, log=True) == pytest.approx([0.0001, 0.001, 0.01, 0.1, 1])


# ------------------------------------------------------------------------------------------------------------- own images
def test_prediction_on_a_folder(tmp_path):
    folder, out = tmp_path / "mine", tmp_path / "out"
    folder.mkdir()
    grey = Image.new("L", (W, H), 77)
    for name in ("b.png", "a.jpeg", "b.bmp", "notes.txt", ".hidden.png"):
        if name == "notes.txt":
            (folder / name).write_text("not a picture, and not in the way")
        else:
            grey.save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6                                                                          # a phone held upright: turn by 90 degrees
    grey.save(folder / "phone.JPG", format="JPEG", exif=exif)
    returned = evaluate.predict_folder(Oracle(), folder, out, threshold=0.0)
    assert sorted(f.name for f in out.iterdir()) == ["a.jpg", "b.bmp.png", "b.png.png", "phone.jpg", "predictions.json"]
    predictions = json.loads((out / "predictions.json").read_text())
    assert predictions == returned and len(predictions) == 4 * 3
    first = predictions[0]
    assert first.keys() == {"file_name", "category_id", "category_name", "score", "bbox", "segmentation"}
    assert (first["file_name"], first["category_name"], first["category_id"]) == ("a.jpeg", "box", 7) and first["bbox"] == objects_of(3)[0][1]
    assert first["segmentation"]["size"] == [H, W] and predictions[-1]["segmentation"]["size"] == [W, H]
    assert Image.open(out / "phone.jpg").size == (3 * H, 3 * W)
    top = max(p["score"] for p in predictions)
    assert len(evaluate.predict_folder(Oracle(), folder / "b.png", tmp_path / "one", threshold=top - 1e-4)) == 1


def test_bad_images_end_in_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    sentences = {"nowhere": "no such file", "empty": "no picture", "page.jpg": "page.jpg cannot be read", "cut.png": "cut.png cannot be read"}
    for images, words in sentences.items():
        with pytest.raises(data.DataError, match=words):
            evaluate.predict_folder(Oracle(), tmp_path / images, tmp_path / "out")
    with pytest.raises(data.DataError, match="own folder"):
        evaluate.predict_folder(Oracle(), tmp_path / "page.jpg", tmp_path)


# ----------------------------------------------------------------------------------------------------------- command line
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny untrained model with the classes of make_coco."""
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    config = maskdino.Config(
        backbone="resnet18", backbone_norm="batch", backbone_weights="none", levels=(8, 16, 32), hidden=32, enc_layers=1, enc_ffn=32, dec_layers=1,
        dec_ffn=32, queries=10, denoising_queries=10, detections=5, test_short=H, test_long=W, workers=0)
    model = maskdino.build(config, CLASSES)
    maskdino.save(path, {"model": model.state_dict(), "ema": None, "config": dataclasses.asdict(config), "classes": CLASSES})
    return path


def test_the_two_commands(tmp_path, checkpoint, capsys):
    coco = make_coco(tmp_path / "coco")
    evaluate.main([str(checkpoint), f"--data={coco}", f"--out={tmp_path}/eval", "--max_images=3", "--device=cpu", "--batch_size=2"])
    result = json.loads((tmp_path / "eval/result_eval.json").read_text())
    assert result["images"] == 3 and 0 <= result["mask_AP"] <= 100 and result["per_class"].keys() == {"bar", "box", "rod"}
    assert len(json.loads((tmp_path / "eval/results_bbox.json").read_text())) == 3 * 5
    assert Image.open(tmp_path / "eval/predictions.png").width > 1000
    evaluate.main([str(checkpoint), f"--images={coco}/val2017/3.png", f"--out={tmp_path}/mine", "--threshold=0", "--device=cpu", "--detections=2"])
    assert len(json.loads((tmp_path / "mine/predictions.json").read_text())) == 2 and (tmp_path / "mine/3.png").exists()
    assert str(coco) in capsys.readouterr().out


SMALL = {"backbone": "resnet18", "backbone_norm": "frozen", "hidden": 64, "heads": 8, "enc_layers": 1, "dec_layers": 2, "queries": 6}


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_pictures_of_panoptic_and_semantic_models(tmp_path, task):
    """The benchmarks' formats: ids coded in RGB with a json beside, or category ids in grey."""
    classes = {"names": ["cat", "sky", "sea"], "category_ids": [7, 40, 200], "is_thing": [True, False, False]}
    torch.manual_seed(0)
    model = maskdino.build(maskdino.preset("shapes", **SMALL, task=task, object_threshold=0.0, overlap_threshold=0.0), classes).eval()
    (tmp_path / "in").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(tmp_path / "in" / "a.png")
    rows = evaluate.predict_folder(model, tmp_path / "in", tmp_path / "out", threshold=0.0)
    assert Image.open(tmp_path / "out/a.png").width >= 384 and json.loads((tmp_path / "out/predictions.json").read_text()) == rows
    picture = np.array(Image.open(tmp_path / f"out/{task}/a.png")).astype(int)
    if task == "semantic":
        assert picture.shape == (50, 70) and {r["category_id"] for r in rows} == set(picture.flat) <= {7, 40, 200}
        assert sum(r["area"] for r in rows) == 50 * 70
        return
    assert all(r["category_name"] == "cat" for r in rows)                                      # detections: things alone
    content = json.loads((tmp_path / "out/panoptic.json").read_text())
    segments = content["annotations"][0]["segments_info"]
    assert set((picture @ (1, 256, 65536)).flat) - {0} == {s["id"] for s in segments} and content["annotations"][0]["file_name"] == "a.png"
    assert segments and all(s["isthing"] == (s["category_id"] == 7) for s in segments) and content["categories"][2]["id"] == 200


def semantic_model(**overrides) -> maskdino.MaskDINO:
    torch.manual_seed(0)
    classes = {"names": ["cat", "sky", "sea"], "category_ids": [7, 40, 200], "is_thing": [True, False, False]}
    return maskdino.build(maskdino.preset("shapes", **SMALL | {"task": "semantic", "test_short": 64, "test_long": 96} | overrides), classes).eval()


@torch.no_grad()
def test_augmentation_at_test_time_is_the_mean_over_scales_and_mirrored(tmp_path):
    model, picture = semantic_model(), Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    total = torch.zeros(3, 50, 70)
    for short, (h, w) in ((32, (32, 45)), (48, (48, 67)), (64, (64, 90)), (80, (80, 112)), (96, (96, 134)), (112, (112, 157))):
        for image in (picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
            images = torch.nn.functional.pad(maskdino.preprocess(image, short, 1000)[None], (0, -w % 32, 0, -h % 32))
            output = model(images, [(h, w)])
            last, frame = list(output.sets.values())[-1], maskdino.Frame(tuple(images.shape[-2:]), (h, w), (50, 70))
            maps = maskdino.semantic_of(maskdino.rows(last, 0, 0), output.pixels[0], frame)
            total += (maps if image is picture else maps.flip(-1)) / 12
    maps = evaluate.augmented(model, picture)
    torch.testing.assert_close(maps, total, rtol=0, atol=1e-4)
    mirrored = evaluate.augmented(model, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    torch.testing.assert_close(mirrored.flip(-1), maps, rtol=0, atol=1e-4)
    (tmp_path / "in").mkdir()
    picture.save(tmp_path / "in/a.png")
    evaluate.predict_folder(model, tmp_path / "in", tmp_path / "out", tta=True)
    assert np.array_equal(np.array([7, 40, 200])[maps.argmax(0)], np.array(Image.open(tmp_path / "out/semantic/a.png")))


def test_evaluation_with_augmentation_sees_the_whole_images(tmp_path):
    dataset, model = data.open_split("semantic", "val", IDENTITY, data_dir=make_maps(tmp_path / "tree", count=2)), semantic_model()
    model.classes = model.classes | {"names": ["grass", "sky", "sea"]}
    metrics = evaluate.evaluate(model, dataset, tmp_path / "out", batch_size=2, tta=True)
    labels = evaluate.augmented(model.requires_grad_(False), Image.open(tmp_path / "tree/images/val/1.png")).argmax(0)
    assert np.array_equal(np.array([3, 4, 255])[labels], np.array(Image.open(tmp_path / "out/semantic/1.png"))) and metrics["mIoU"] is not None


def test_half_precision_is_for_the_model_alone():
    images, sizes = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8), [(64, 96)]
    with torch.no_grad():
        plain, half = (evaluate._forward(semantic_model(precision=precision), images, sizes) for precision in ("auto", "bf16"))
        assert torch.equal(plain.pixels, semantic_model()(images, sizes).pixels) and plain.pixels.dtype == torch.float32 and half.pixels.dtype == torch.bfloat16
        torch.testing.assert_close(half.pixels.float(), plain.pixels, rtol=0.1, atol=0.1)
        assert semantic_model().postprocess(half, sizes, [(32, 48)])[0]["semantic"].shape == (32, 48)


@pytest.mark.parametrize("resize_first", [False, True])
def test_labels_by_bands_are_those_of_whole_maps(monkeypatch, resize_first):
    generator = torch.Generator().manual_seed(0)
    p = maskdino.Prediction(*(torch.randn(7, n, generator=generator) for n in (5, 4, 8)))
    pixels, frame = torch.randn(8, 16, 24, generator=generator), maskdino.Frame((64, 96), (60, 83), (131, 97))
    monkeypatch.setattr(maskdino, "ROWS_AT_ONCE", 10)
    maps = maskdino.semantic_of(p, pixels, frame, resize_first=resize_first)
    labels = maskdino.semantic_labels(p, pixels, frame, resize_first=resize_first)
    best = maps.gather(0, labels[None])[0]
    torch.testing.assert_close(best, maps.amax(0), rtol=0, atol=1e-5)                         # but for ties


def test_released_names_there_and_back(tmp_path, capsys):
    """--save_official writes what the loader of released checkpoints takes: the same predictions."""
    model = maskdino.build(maskdino.preset("shapes", **SMALL), maskdino.class_list(80)).eval()
    content = {"model": model.state_dict(), "ema": None, "config": dataclasses.asdict(model.config), "classes": model.classes}
    torch.save(content, tmp_path / "ours.pth")
    evaluate.main([f"{tmp_path}/ours.pth", f"--save_official={tmp_path}/new/theirs.pth", "--device=cpu"])
    assert torch.load(tmp_path / "new/theirs.pth")["model"].keys() == maskdino.to_official(model).keys()
    again, classes = maskdino.load(tmp_path / "new/theirs.pth", queries=6, test_short=128, test_long=128)
    assert "taken from preset" in capsys.readouterr().out and classes == model.classes
    picture = np.random.default_rng(0).integers(0, 256, (60, 70, 3), np.uint8)
    a, b = again.predict([picture])[0], model.predict([picture])[0]
    assert torch.equal(a["scores"], b["scores"]) and torch.equal(a["masks"], b["masks"])


# --------------------------------------------------------------------------------------------------------- how it thinks
LITTLE = dict(backbone="resnet10", backbone_norm="group", backbone_weights="none", hidden=32, heads=4, enc_layers=1, enc_ffn=32, dec_layers=2, dec_ffn=32,
              queries=10, test_short=64, test_long=96)


def look(name: str, **overrides) -> tuple:
    """A small model of a preset's layout with random weights, and what was recorded of it looking at 50 x 70 pixels."""
    torch.manual_seed(0)
    model = maskdino.build(maskdino.preset(name, **LITTLE | overrides), maskdino.class_list(maskdino.classes_of(name))).eval()
    for key, weight in model.named_parameters():
        if key.endswith(("box_head.4.weight", "sampling_offsets.weight", "attention_weights.weight")):
            torch.nn.init.normal_(weight, std=0.1)                                            # boxes, points and weights that differ
    with maskdino.recording(model, evaluate.INSIDE + r"|query_selection\.enc_output_norm|decoder\.layers\.\d+\.cross_attn") as record:
        model.predict([np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)])
    return model, record


LAYOUTS = [("coco_instance_r50_50ep", {}), ("coco_instance_r50_50ep_hid1024", {}), ("coco_instance_swinl_50ep", {}), ("coco_instance_swinl_50ep_token", {}),
           ("coco_panoptic_r50_50ep", {}), ("ade20k_semantic_r50", {}), ("cityscapes_semantic_r50", {}),
           ("coco_instance_r50_50ep", dict(task="detection", box_init="token", denoising="box", matching="box")),
           ("coco_instance_r50_50ep", dict(decoder_levels=2, initial_prediction=False, queries=2)),
           ("mask2former_coco_panoptic_r50_50ep", {}), ("mask2former_coco_instance_r50_50ep", dict(round_robin=False, detection_head=True)),
           ("mask2former_coco_instance_r50_50ep", dict(masked_attention=False)), ("dformer_coco_instance_r50_50ep", dict(sampling_steps=3))]


@pytest.mark.parametrize("name, overrides", LAYOUTS)
def test_a_page_of_every_layout(tmp_path, name, overrides):
    model, record = look(name, **overrides)
    output, queries = record[""][0].gave, torch.tensor([1, 0])
    rows = evaluate.stages(model, record, queries)
    expected = ["sampling step 1", "sampling step 2", "sampling step 3"] * (model.config.model == "dformer") + ["query selection"] * model.config.two_stage
    assert [row.name for row in rows] == expected + ["initial prediction"] * model.config.initial_prediction + ["layer 1", "layer 2"]
    assert torch.equal(rows[-1].said.logits, list(output.sets.values())[-1].logits[0, queries])
    if model.config.model == "maskdino":
        assert all(row.points is not None and row.before.shape == (2, 4) for row in rows[-2:])
    else:
        assert any(row.seen is not None for row in rows) == model.config.masked_attention
    evaluate.explain(model, record, tmp_path / "page.png")
    page = np.array(Image.open(tmp_path / "page.png").convert("L"))
    assert page.shape[0] > 100 * len(rows) and (page[-12:] == 255).all() and (page[:, -8:] == 255).all() and page.std() > 20     # nothing cut off


@pytest.mark.parametrize("name", ["coco_instance_r50_50ep", "coco_instance_swinl_50ep", "ade20k_semantic_r50"])
@torch.no_grad()
def test_the_pages_points_and_weights_reproduce_the_attention(name):
    """Put through the equation written as loops, they give what the layer gave."""
    model, record = look(name)
    queries = torch.tensor([3, 0, 7])
    for i, row in enumerate(evaluate.stages(model, record, queries)[-2:]):
        attention, call = model.decoder.layers[i].cross_attn, record[f"decoder.layers.{i}.cross_attn"][0]
        _, anchors, memory, shapes = call.given
        assert torch.equal(row.before, anchors[0, queries])
        value = attention.value_proj(memory).unflatten(-1, (attention.shape[0], -1))
        cells = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32)[:, None]
        found = kernels.ms_deform_attn_loops(value, shapes, torch.zeros(1, 3, 2), row.points[None] * cells, row.weights[None].log())
        torch.testing.assert_close(attention.output_proj(found), call.gave[:, queries], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(row.weights.flatten(2).sum(-1), torch.ones(3, 4))          # which the loops would have made so


@torch.no_grad()
def test_a_column_is_one_query_from_its_token_on():
    model, record = look("coco_instance_r50_50ep")
    queries, tokens, sets = torch.tensor([4, 1]), evaluate.tokens_of(model, record), record[""][0].gave.sets
    content, anchors, _ = record["query_selection"][0].gave
    assert torch.equal(record["query_selection.enc_output_norm"][0].gave[0, tokens.chosen], content[0])
    selection, initial, first, _ = evaluate.stages(model, record, queries)
    assert torch.equal(selection.said.boxes, sets["selection"].boxes[0, queries]) and torch.equal(initial.before, selection.said.boxes)
    assert torch.equal(initial.said.boxes, anchors[0, queries]) and torch.equal(first.before, anchors[0, queries])
    assert torch.equal(selection.cells[:, :2], selection.before[:, :2])                       # a proposal is a square around its token
    h, w = tokens.shapes[0]
    assert tokens.cells[w + 2].tolist() == pytest.approx([2.5 / w, 1.5 / h, 1 / w, 1 / h])


def test_sibling_pages_show_what_was_let_through():
    model, record = look("mask2former_coco_instance_r50_50ep")
    output, queries = record[""][0].gave, torch.tensor([2])
    initial, first, second = evaluate.stages(model, record, queries)
    for row, before, stride in ((first, initial, 32), (second, first, 16)):
        small = torch.nn.functional.interpolate(output.pixels, size=(64 // stride, 96 // stride), mode="bilinear")
        inside = maskdino.mask_logits(before.said.embeddings[None], small)[0] >= 0
        assert torch.equal(row.seen.bool(), inside) or not inside.any() and row.seen.all()
    model, record = look("dformer_coco_instance_r50_50ep", sampling_steps=2)
    steps = evaluate.stages(model, record, queries)[:2]
    assert not torch.equal(steps[0].seen, steps[1].seen) and 0 <= steps[1].seen.min() and steps[1].seen.max() <= 1
    assert torch.equal(steps[1].said.logits, list(record[""][0].gave.sets.values())[-1].logits[0, queries])


def test_windows_show_and_place_the_same():
    """A white rectangle in a picture padded from 100 x 150 to 128 x 160, in a window that the image's border makes flat."""
    pixels = np.zeros((128, 160), np.uint8)
    pixels[40:60, 50:110] = 255
    picture, boxes = Image.fromarray(pixels), torch.tensor([[80 / 160, 50 / 128, 60 / 160, 20 / 128], [75 / 160, 60 / 128, 150 / 160, 4 / 128]])
    window = evaluate._Window.around(boxes, (100, 150), (128, 160))
    assert window.part == pytest.approx((0, 0, 150 / 160, 100 / 128)) and window.size == (380, 253)
    x0, y0, x1, y1 = evaluate._corners(window, boxes[0])
    tile = np.asarray(window.show(picture))
    assert (tile[round(y0) + 3:round(y1) - 3, round(x0) + 3:round(x1) - 3] == 255).all()
    assert tile[:round(y0) - 3].max() == tile[round(y1) + 3:].max() == tile[:, :round(x0) - 3].max() == tile[:, round(x1) + 3:].max() == 0
    close = evaluate._Window.around(boxes[:1], (100, 150), (128, 160))
    assert evaluate._corners(close, boxes[0])[::2] == pytest.approx([380 * 0.1 / 1.2, 380 * 1.1 / 1.2], abs=0.01)         # in the middle
    assert close.size == (380, 380) and np.subtract(close.part[2:], close.part[:2]) @ (160, -128) == pytest.approx(0)


def test_inks_differ_in_greyscale():
    grey = evaluate._heat(np.linspace(0, 1, 50)) @ (0.299, 0.587, 0.114)
    assert (np.diff(grey) > 0).all()
    levels = [np.dot(evaluate._level_ink(i, 5), (0.299, 0.587, 0.114)) for i in range(5)]
    assert min(-np.diff(levels)) > 25


def test_explain_from_the_command_line(tmp_path, checkpoint):
    coco = make_coco(tmp_path / "coco", count=2)
    flags = [str(checkpoint), f"--images={coco}/val2017", "--threshold=0", "--device=cpu"]
    evaluate.main([*flags, f"--out={tmp_path}/plain"])
    evaluate.main([*flags, f"--out={tmp_path}/told", "--explain"])
    assert (tmp_path / "plain/predictions.json").read_bytes() == (tmp_path / "told/predictions.json").read_bytes()
    assert sorted(p.name for p in (tmp_path / "told/explain").iterdir()) == ["0.png", "1.png"] and not (tmp_path / "plain/explain").exists()


@pytest.mark.parametrize("argv, words", [
    ([], "one checkpoint is needed"),
    (["CKPT"], "--data=DIR"),
    (["CKPT", "--images=x"], "--out=DIR"),
    (["CKPT", "--data=x", "--images=x", "--out=y"], "one of"),
    (["CKPT", "--data=/nowhere"], "/nowhere"),
    (["nowhere.pth", "--data=x"], "nowhere.pth"),
    (["CKPT", "--data=x", "--treshold=0.5"], "threshold"),
    (["CKPT", "--data=x", "--threshold=50"], "between 0 and 1"),
    (["CKPT", "--data=x", "--batch_size=two"], "batch_size"),
    (["CKPT", "--data=x", "--lr=1"], "--lr comes from the checkpoint"),
    (["CKPT", "--data=x", "--device=toaster"], "toaster"),
    (["CKPT", "--data=x", "--tta"], "--tta is for semantic models"),
    (["CKPT", "--data=x", "--val_instances=y.json"], "--val_instances is for panoptic models"),
    (["CKPT", "--data=x", "--layers", "--tta"], "without --tta"),
    (["CKPT", "--data=x", "--scale=shapes"], "--scale goes with --tables"),
    (["CKPT", "--data=x", "--explain"], "--explain goes with --images"),
])
def test_mistakes_end_in_one_sentence(checkpoint, argv, words):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(checkpoint) if word == "CKPT" else word for word in argv])
    assert str(stop.value.code).startswith("error: ") and words in stop.value.code and "\n" not in stop.value.code
