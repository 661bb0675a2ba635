"""Tests of evaluate.py: the numbers against COCOeval itself, one process against two, pictures, own images, the command line's sentences."""
import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import data
import evaluate
import maskdino

H, W = 96, 128
CATEGORIES = [{"id": 7, "name": "box"}, {"id": 3, "name": "bar"}, {"id": 90, "name": "rod"}]   # neither sorted nor contiguous
CLASSES = {"names": ["bar", "box", "rod"], "category_ids": [3, 7, 90], "is_thing": [True] * 3}
IDENTITY = partial(evaluate.resize_for_test, short=H, long=W)


@pytest.fixture(autouse=True)
def one_thread():
    """Two busy cores and OpenMP's spinning threads make small tensors very slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        self.classes, self.shift, self.extra, self.config = classes, shift, extra, SimpleNamespace(task=task)

    def forward(self, images, sizes):
        assert not self.training and not torch.is_grad_enabled()
        return images[:, 0, 0, 0].tolist()

    def postprocess(self, output, sizes, original_sizes):
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


def test_table_and_hint():
    rows = {f"class {i}": {"box_AP": None, "mask_AP": 12.34, "truth": 0, "detections": 9} for i in range(21)}
    metrics = {f"{kind}_{name}": None for kind in ("box", "mask") for name in evaluate.METRICS} | {"per_class": rows}
    assert "class 3" not in evaluate.table(metrics) and "n/a" in evaluate.table(metrics)
    assert "class 3" in evaluate.table(metrics, per_class=True)
    boxes = results_of(PERFECT)[0]
    assert evaluate.hint(truth_of(BOXES), boxes) == ""
    assert "do not meet" in evaluate.hint(truth_of(BOXES), [b | {"category_id": 1} for b in boxes])
    assert "no detections" in evaluate.hint(truth_of(BOXES), []) and "no ground truth" in evaluate.hint(truth_of({1: []}), boxes)


def run_rank(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    metrics = evaluate.evaluate(Oracle(shift=6, extra=4), dataset_of(folder / "coco"), folder / "two")
    (folder / f"rank{rank}.json").write_text(json.dumps(metrics))
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    dataset = dataset_of(make_coco(tmp_path / "coco"))
    alone = evaluate.evaluate(Oracle(shift=6, extra=4), dataset, tmp_path / "one")
    torch.multiprocessing.spawn(run_rank, (2, tmp_path), nprocs=2)
    assert 0 < alone["mask_AP"] < 100
    assert json.loads((tmp_path / "rank0.json").read_text()) == json.loads((tmp_path / "rank1.json").read_text()) == alone
    for name in ("results_bbox.json", "results_segm.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


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
    sentences = {"nowhere": "no such file", "empty": "no picture", "page.jpg": "page.jpg is not a picture", "cut.png": "cut.png is not a picture"}
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
    semantic = content | {"config": dataclasses.asdict(dataclasses.replace(model.config, task="semantic"))}
    torch.save(semantic, tmp_path / "semantic.pth")
    with pytest.raises(SystemExit, match="semantic model, and mIoU is not computed here yet"):
        evaluate.main([f"{tmp_path}/semantic.pth", f"--data={make_coco(tmp_path / 'coco')}", "--device=cpu"])


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
])
def test_mistakes_end_in_one_sentence(checkpoint, argv, words):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(checkpoint) if word == "CKPT" else word for word in argv])
    assert str(stop.value.code).startswith("error: ") and words in stop.value.code and "\n" not in stop.value.code
