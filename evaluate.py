"""Evaluation and pictures: AP, panoptic quality, mIoU; a page of predictions, own images, training curves.

    python evaluate.py CHECKPOINT --data=DIR [--out=DIR]                        # scores the validation split, draws a page of pictures
    python evaluate.py CHECKPOINT --images=PATH --out=DIR [--threshold=0.3]     # a picture or a folder: overlays + predictions.json
    python evaluate.py CHECKPOINT --images=PATH --out=DIR --explain             # a page each: from query selection to the last layer
    python evaluate.py CHECKPOINT --save_official=PATH                          # the weights under the released code's names
    python evaluate.py CHECKPOINT --data=DIR --layers                           # scores after every decoder layer (Tables 8 and 9)
    python evaluate.py --tables [NAME ...] [--scale=shapes] [--out=runs]        # the paper's tables beside what is in runs/

CHECKPOINT is one of train.py or a released one. Also: --val_{json,images,panoptic,labels}=PATH and --classes=names.txt (instead of what --data
finds), --val_instances=JSON (truth for the AP of a panoptic model's things; else its data's own segments), --tta (semantic models: the mean over
scales and mirrored), --per_class, --batch_size=1, --device=cuda|mps|cpu, and these fields of the checkpoint's Config: --max_images (here: of the
validation split, 0 = all), --skip_bad_images, --test_short, --test_long, --detections, --workers, --precision, --object_threshold,
--overlap_threshold, --temperature, --sampling_steps, --sampling_eta and --seed (DFormer); of a released one, --box_init and --queries.

AP is that of pycocotools (COCOeval, 100 detections an image), PQ that of the panoptic task's own code, mIoU that of the released code, except that
- what does not apply is None ("n/a"), never -1 or NaN: no ground truth in the split, or none of that size or class;
- no detections at all is AP 0, where COCO.loadRes raises an IndexError;
- every image counts once, whatever the number of processes: `torchrun --standalone --nproc_per_node=8 evaluate.py ...` shares the work.
"""
import colorsys
import contextlib
import io
import json
import math
import os
import signal
import statistics
import sys
import textwrap
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.ndimage import distance_transform_edt
from torch.utils.data import DataLoader, Subset
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

import data
import kernels
import maskdino

# ---------------------------------------------------------------------------------------------------------------- numbers
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
QUALITIES = ("PQ", "SQ", "RQ")
PARTS = {"": (True, False), "_things": (True,), "_stuff": (False,)}                           # of the classes: which is_thing are in it
SEMANTIC = ("mIoU", "fwIoU", "pixel_accuracy")
MAPS = ("panoptic", "semantic")                                                               # tasks whose results are maps, every pixel in one region


def coco_metrics(truth: dict | None, boxes: list, masks: list | None, image_ids) -> dict:
    """Box and mask AP of results in COCO's format.

    truth: {"images", "annotations", "categories"}, annotation ids from 1, `iscrowd` and `area` on each; None: there are no annotations.
    boxes: [{"image_id", "category_id", "bbox": [x, y, w, h] in pixels, "score"}].
    masks: [{"image_id", "category_id", "segmentation": compressed RLE, "score"}]; None: a model without masks.
    image_ids: the images that count. None of the arguments is changed.

    Returns {"box_AP", "box_AP50", "box_AP75", "box_APs", "box_APm", "box_APl", the same with mask_, "per_class": {name: {"box_AP", "mask_AP",
    "truth": objects without crowds, "detections": boxes}}}; AP in 0..100, None = does not apply.
    """
    metrics = {f"{kind}_{name}": None for kind in ("box", "mask") for name in METRICS}
    if truth is None:
        return metrics | {"per_class": {}}
    wanted = set(image_ids)
    real = Counter(a["category_id"] for a in truth["annotations"] if a["image_id"] in wanted and not a["iscrowd"])
    found = Counter(b["category_id"] for b in boxes if b["image_id"] in wanted)
    categories = sorted(truth["categories"], key=lambda c: c["id"])
    rows = [{"box_AP": None, "mask_AP": None, "truth": real[c["id"]], "detections": found[c["id"]]} for c in categories]
    for kind, coco_kind, results in (("box", "bbox", boxes), ("mask", "segm", masks))[:1 if masks is None else 2]:
        p = _precision(truth, results, coco_kind, wanted)
        overall, small, medium, large = (p[..., area] for area in range(4))                   # (T, R, K) each
        parts = (overall, overall[0], overall[5], small, medium, large)                       # IoU thresholds 0.50, 0.55, 0.60 ...
        metrics |= {f"{kind}_{name}": _mean(part) for name, part in zip(METRICS, parts, strict=True)}
        for k, row in enumerate(rows):
            row[f"{kind}_AP"] = _mean(overall[:, :, k])
    return metrics | {"per_class": {c["name"]: row for c, row in zip(categories, rows, strict=True)}}


def _precision(truth: dict, results: list, kind: str, image_ids: set) -> np.ndarray:
    """Precision (T IoU thresholds, R recalls, K categories by ascending id, A sizes) at 100 detections an image; -1 where there is no truth."""
    # One area at a time: rle.area overflows on a list of more than 255 (pycocotools 2.0.11 with numpy 2).
    areas = [rle.area(r["segmentation"]) if kind == "segm" else r["bbox"][2] * r["bbox"][3] for r in results]
    found = [r | {"id": i, "area": float(area), "iscrowd": 0} for i, (r, area) in enumerate(zip(results, areas, strict=True), start=1)]
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(_index(truth, [dict(a) for a in truth["annotations"]]), _index(truth, found), kind)     # it writes into annotations
        scorer.params.imgIds = list(image_ids)
        scorer.evaluate()
        scorer.accumulate()
    return scorer.eval["precision"][..., -1]


def _index(truth: dict, annotations: list) -> COCO:
    """A COCO object with these annotations. (COCO.loadRes would do, but fails on an empty list.)"""
    coco = COCO()
    coco.dataset = {"images": truth["images"], "categories": truth["categories"], "annotations": annotations}
    coco.createIndex()
    return coco


def _mean(precision: np.ndarray) -> float | None:
    """Mean in 0..100 over what has ground truth; None where nothing has."""
    known = precision[precision > -1]
    return round(100 * float(known.mean()), 4) if known.size else None


def panoptic_counts(truth: np.ndarray, truth_segments: list[dict], found: np.ndarray, found_segments: list[dict]) -> dict[int, np.ndarray]:
    """One image's share of panoptic quality: {category id: [true positives, false positives, false negatives, the true ones' sum of IoU]}.

    truth, found: int (H, W) segment ids, 0 is void. The segments: [{"id", "category_id"}], those of the truth with "iscrowd".

    The benchmark's rules: segments of one class match when their IoU is above 0.5, the union without what is void in the truth. Crowds can neither be
    found nor missed. A segment that matches nothing is no false positive where more than half of it lies on void or on the crowd of its class (on
    the last one listed, should there be several).
    """
    common = {(pair >> 32, pair & 0xffffffff): pixels for pair, pixels in data.count_values(truth.astype(np.int64) << 32 | found).items()}
    truth_area, found_area, counts = Counter(), Counter(), defaultdict(lambda: np.zeros(4))
    for (t, f), pixels in common.items():
        truth_area[t] += pixels
        found_area[f] += pixels
    missed = {s["id"]: s["category_id"] for s in truth_segments if not s["iscrowd"]}          # until matched
    false = {s["id"]: s["category_id"] for s in found_segments}
    crowds = {s["category_id"]: s["id"] for s in truth_segments if s["iscrowd"]}
    for (t, f), pixels in common.items():
        if t in missed and missed[t] == false.get(f):
            iou = pixels / (truth_area[t] + found_area[f] - pixels - common.get((0, f), 0))
            if iou > 0.5:                                                                     # which no other pair of t or f can have
                counts[missed.pop(t)] += 1, 0, 0, iou
                del false[f]
    for category in missed.values():
        counts[category] += 0, 0, 1, 0
    for f, category in false.items():
        if common.get((0, f), 0) + common.get((crowds.get(category), f), 0) <= found_area[f] / 2:
            counts[category] += 0, 1, 0, 0
    return dict(counts)


def panoptic_metrics(counts: Iterable[dict], names: list[str], category_ids: list[int], is_thing: list[bool]) -> dict:
    """Panoptic quality, PQ = SQ * RQ (arXiv 1801.00868), from `panoptic_counts` of every image.

    Returns {"PQ", "SQ", "RQ", the same with _things and _stuff, "per_class": {name: {"PQ", "SQ", "RQ"}}} in 0..100. A class that is neither in the
    truth nor predicted is None, and in no mean.
    """
    total = defaultdict(lambda: np.zeros(4))
    for image in counts:
        for category, count in image.items():
            total[category] += count
    rows = {}
    for name, category in zip(names, category_ids, strict=True):
        tp, fp, fn, iou = total[category].tolist()
        size = tp + fp / 2 + fn / 2
        rows[name] = {"PQ": 100 * iou / size, "SQ": 100 * iou / tp if tp else 0.0, "RQ": 100 * tp / size} if size else dict.fromkeys(QUALITIES)
    metrics = {"per_class": rows}
    for part, kinds in PARTS.items():
        some = [rows[name] for name, thing in zip(names, is_thing, strict=True) if thing in kinds]
        metrics |= {key + part: _average(row[key] for row in some) for key in QUALITIES}
    return metrics


def _average(values: Iterable[float | None]) -> float | None:
    """Mean of the known ones; None where there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def confusion(truth: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    """Pixels (classes, classes + 1) of each true class by predicted one. truth: int (H, W), -1 is not counted; found: int (H, W), `classes` is none."""
    known = truth >= 0
    return np.bincount(truth[known] * (classes + 1) + found[known], minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def semantic_metrics(pixels: np.ndarray, names: list[str]) -> dict:
    """{"mIoU", "fwIoU" (weighted by the classes' true pixels), "pixel_accuracy", "per_class": {name: {"IoU"}}} in 0..100 from `confusion` of all images.

    A class without a true pixel is None, and in no mean; where it is predicted, the true class loses the pixel.
    """
    hit, real, found = (counts.tolist() for counts in (pixels.diagonal(), pixels.sum(1), pixels.sum(0)[:-1]))
    iou, total = [100 * h / (r + f - h) if r else None for h, r, f in zip(hit, real, found, strict=True)], sum(real)
    weighted = sum(i * r for i, r in zip(iou, real, strict=True) if r) / total if total else None
    metrics = dict(zip(SEMANTIC, (_average(iou), weighted, 100 * sum(hit) / total if total else None), strict=True))
    return metrics | {"per_class": {name: {"IoU": i} for name, i in zip(names, iou, strict=True)}}


EMPTY = dict.fromkeys([q + part for part in PARTS for q in QUALITIES] + [*SEMANTIC] + [f"{kind}_{name}" for kind in ("box", "mask") for name in METRICS])
COLUMNS = (*QUALITIES, "IoU", "box_AP", "mask_AP", "truth", "detections")                     # of per_class


def table(metrics: dict, per_class: bool = False) -> str:
    """The metrics as text: overall numbers, then a line per class when there are at most 20 (or with per_class=True)."""
    grids = {"PQ": (("all", "things", "stuff"), {q: [metrics.get(q + part) for part in PARTS] for q in QUALITIES}),
             "mIoU": (SEMANTIC, {"": [metrics.get(name) for name in SEMANTIC]}),
             "box_AP": (METRICS, {kind: [metrics.get(f"{kind}_{name}") for name in METRICS] for kind in ("box", "mask")})}
    blocks = [_grid("", *grid) for key, grid in grids.items() if key in metrics]
    rows = metrics["per_class"]
    if rows and (per_class or len(rows) <= 20):
        columns = [name for name in COLUMNS if any(name in row for row in rows.values())]
        blocks.append(_grid("class", columns, {name: [row.get(column) for column in columns] for name, row in rows.items()}))
    return "\n\n".join(blocks)


def _grid(corner: str, columns: Iterable[str], rows: dict[str, list]) -> str:
    """Named rows of numbers under named columns."""
    cells = {name: ["n/a" if v is None else f"{v:.1f}" if isinstance(v, float) else str(v) for v in row] for name, row in rows.items()}
    first = max(4, *map(len, [corner, *rows]))
    return "\n".join(f"{name:{first}}" + "".join(f"{cell:>{max(7, len(column) + 1)}}" for cell, column in zip(row, columns, strict=True))
                     for name, row in [(corner, columns), *cells.items()])


def hint(truth: dict | None, boxes: list) -> str:
    """Why numbers are missing or 0, in a sentence; empty when nothing is odd."""
    if truth is None:
        return "the data have no annotations: predictions only, every metric is n/a"
    real, found = {a["category_id"] for a in truth["annotations"] if not a["iscrowd"]}, {b["category_id"] for b in boxes}
    if not real or not found:
        return "no detections at all: AP is 0" if real else "no ground truth in this split: every metric is n/a"
    if not real & found:
        return f"hint: predicted category ids {sorted(found)[:5]} and true ones {sorted(real)[:5]} do not meet: is the checkpoint of these classes?"
    return ""


# ------------------------------------------------------------------------------------------------------------- evaluation
def resize_for_test(image: Image.Image, _, short: int, long: int) -> tuple[torch.Tensor, None]:
    """The data set's transform at test time (as a partial with the sizes, see maskdino.preprocess)."""
    return maskdino.preprocess(image, short, long), None


def evaluate(model, dataset, out: Path, *, batch_size: int = 1, workers: int = 0, per_class: bool = False, tta: bool = False,
             things: data.CocoDataset | None = None, answer: str | None = None) -> dict:
    """Runs the model over a data set and scores it, in one process or under torch.distributed.

    model: a MaskDINO (not wrapped in DDP) on its device; it is left in the mode (train or eval) it came in.
    dataset: one of data.py's whose transform is the test-time resize. per_class: print the classes even when there are more than 20.
    out: folder for the results in the formats of the benchmarks' servers, in pixels of the original images: results_bbox.json and results_segm.json;
    panoptic.json with panoptic/*.png; semantic/*.png, whose values are the data's category ids (of a class that the data do not know: 255, or
    65535 in 16 bits). tta: see `augmented`. things: the same images with other truth for the detections, whose category ids these then have.
    answer: the prediction set that is scored; None: the last.

    Returns, the same on every rank and in 0..100, the keys of EMPTY, None for what does not apply, and "per_class": what coco_metrics,
    panoptic_metrics and semantic_metrics say of each. A panoptic model has all of it (its things are detections), a semantic one the last.
    Rank r takes the images r, r + world, ... and writes their PNGs as it goes. Of an image no mask or map stays in memory, but counts and, a detection,
    1.3 KB with its RLE; when rank 0 scores, pycocotools takes 5 KB more. Classes are matched by name; raises DataError when none is in common.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    out, task, indices = Path(out), model.config.task, range(rank, len(dataset), world)
    (out / task if task in MAPS else out).mkdir(parents=True, exist_ok=True)
    things, bare = things or dataset, dataset.without_objects()
    record = partial(_record, dataset=dataset, ids=_category_ids(model.classes, dataset), thing_ids=_category_ids(model.classes, things), out=out)
    if tta:
        bare.transform = _whole
    loader = DataLoader(Subset(bare, indices), batch_size, num_workers=workers, collate_fn=data.collate, pin_memory=next(model.parameters()).is_cuda)
    names, share = iter(zip(indices, _stems(dataset.file_names)[rank::world], strict=True)), []
    with _inference(model):
        for images, targets in tqdm(loader, "evaluate", unit="batch", disable=rank > 0, leave=False):
            results = (_augment if tta else _detect)(model, images, targets, [t["original_size"] for t in targets], dataset.has_truth, answer)
            share += [record(result, *next(names)) for result in results]
    shares, answer = [share] if world == 1 else [None] * world, [None]
    if world > 1:
        dist.gather_object(share, shares if rank == 0 else None, dst=0)
    if rank == 0:
        found = [shares[i % world][i // world] for i in range(len(dataset))]                  # the data set's order again: sums do not depend on `world`
        answer = [_score(dataset, things, found, out, task, per_class)]
    if world > 1:
        dist.broadcast_object_list(answer, src=0)
    return answer[0]


def _record(result: dict, index: int, name: str, dataset, ids: list[int | None], thing_ids: list[int | None], out: Path) -> dict:
    """What is kept of an image's result, which is little; its PNG is written. ids, thing_ids: each label's category id, in maps and in detections."""
    record = {"image_id": dataset.image_ids[index], "file_name": f"{name}.png"}
    if "labels" in result:
        record["entries"] = _entries(result, thing_ids)
    if "panoptic" in result:
        found, record["segments_info"] = _save_segments(result, ids, out / "panoptic" / f"{name}.png")
        if dataset.has_truth:
            record["counts"] = panoptic_counts(*dataset.segments(index), found, record["segments_info"])
    elif "semantic" in result:
        _save_labels(result["semantic"], ids, out / "semantic" / f"{name}.png")
    if "semantic" in result and dataset.has_truth:
        K = len(dataset.category_ids)
        places = np.array([K if i is None else dataset.category_ids.index(i) for i in ids])
        pixels = confusion(dataset.label_map(index), places[result["semantic"].cpu().numpy()], K).ravel()
        record["pixels"] = (cells := pixels.nonzero()[0]), pixels[cells]                      # most are 0
    return record


def _stems(files: list[Path]) -> list[str]:
    """A name for what is made of each file: its stem; where two share that, its name (a.png.png, a.bmp.png); where two share that, its path."""
    stems, names = Counter(f.stem for f in files), Counter(f.name for f in files)
    return [f.stem if stems[f.stem] == 1 else f.name if names[f.name] == 1 else f.as_posix().strip("/").replace("/", "_") for f in files]


def _category_ids(classes: dict, dataset) -> list[int | None]:
    """The data's category id of each of the model's labels, found by name: the order may differ. None: the data has no such class."""
    ids = dict(zip(dataset.class_names, dataset.category_ids, strict=True))
    if not ids.keys() & set(classes["names"]):
        ours, theirs = (", ".join(list(names)[:5]) for names in (classes["names"], ids))
        raise data.DataError(f"checkpoint and data have no class in common: the checkpoint knows {ours} ..., the data {theirs} ...; choose the data that "
                             "it was trained for, or train on this")
    return [ids.get(name) for name in classes["names"]]


def _missing(classes: dict, dataset) -> str:
    """The classes that only the checkpoint or only the data knows, in words; empty when there are none."""
    ours, theirs = (set(names) for names in (classes["names"], dataset.class_names))
    sides = {"only the checkpoint knows": sorted(ours - theirs), "only the data knows": sorted(theirs - ours)}
    return "; ".join(f"{who} {', '.join(names[:10])}{f' and {len(names) - 10} more' if len(names) > 10 else ''}" for who, names in sides.items() if names)


@contextlib.contextmanager
def _inference(model):
    """Eval mode without gradients; afterwards the mode is as before."""
    training = model.training
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        model.train(training)


def autocast(config: maskdino.Config, device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 where asked for, or by itself on GPUs that have it. Matcher, losses and post-processing stay outside."""
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def _forward(model, images: torch.Tensor, sizes: list[tuple[int, int]]) -> maskdino.Output:
    device = next(model.parameters()).device
    with autocast(model.config, device):
        return model(images.to(device, non_blocking=True), sizes)


def _detect(model, images: torch.Tensor, targets: list, sizes: list, semantic: bool = False, answer: str | None = None) -> list:
    """The model's results for a collated batch, in pixels of images of the given (H, W) sizes. semantic: also of a panoptic model. answer: see `evaluate`."""
    valid = [t["size"] for t in targets]
    output = _forward(model, images, valid)
    if answer:
        output = output._replace(sets={answer: output.sets[answer]})
    return model.postprocess(output, valid, sizes, semantic)


def layers(model, dataset, out: Path, workers: int = 0, things: data.CocoDataset | None = None) -> dict[str, dict]:
    """What each prediction set scores, {"selection", "initial", "layer1" ...: the keys of EMPTY}, one pass over the data for each: Tables 8 and 9.

    Layer 0 of the tables is "initial": the classes and masks of query selection, and as boxes the anchors it gave, which mask-enhanced initialisation
    has from the masks; "selection" has the tokens' own boxes. Leaves result_layers.json in `out`, beside the last set's results.
    """
    images, targets = data.collate([dataset[0]])
    with _inference(model):
        names = list(_forward(model, images, [t["size"] for t in targets]).sets)
    first, found = not dist.is_initialized() or dist.get_rank() == 0, {}
    for name in names:
        if first:
            print(f"\n{name}")
        metrics = evaluate(model, dataset, out, workers=workers, things=things, answer=name)
        found[name] = {key: value for key, value in metrics.items() if key in EMPTY}
    if first:
        maskdino.save_json(out / "result_layers.json", found)
    return found


SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)          # of the test size; Mask2Former's for ADE20K


def augmented(model, image: Image.Image) -> torch.Tensor:
    """Test-time augmentation: the mean of a semantic model's class scores, (K, H, W) in the image's size, over SCALES, each as it is and mirrored."""
    config, total = model.config, 0
    for scale in SCALES:
        x = maskdino.preprocess(image, round(scale * config.test_short), round(scale * config.test_long))
        size = tuple(x.shape[-2:])
        for mirror in (lambda t: t, lambda t: t.flip(-1)):
            output = _forward(model, F.pad(mirror(x), (0, -size[1] % 32, 0, -size[0] % 32))[None], [size])
            frame = maskdino.Frame(output.padded, size, (image.height, image.width))
            last = maskdino.rows(list(output.sets.values())[-1], 0, 0)
            total += mirror(maskdino.semantic_of(last, output.pixels[0], frame, config.temperature, config.class_loss))
    return total.div_(2 * len(SCALES))


def _whole(image: Image.Image, _) -> tuple[torch.Tensor, None]:
    """A transform that leaves the image as it is, as `augmented` wants it."""
    return pil_to_tensor(image), None


def _augment(model, images: torch.Tensor, targets: list, sizes: list, *_) -> list:
    """As `_detect`, for semantic models and images that are not resized."""
    return [{"semantic": augmented(model, to_pil_image(image[:, :h, :w])).argmax(0)} for image, (h, w) in zip(images, sizes, strict=True)]


def _entries(result: dict, category_ids: list[int | None]) -> list[dict]:
    """One image's result as [{"category_id", "score", "bbox": [x, y, w, h], "segmentation" when there are masks}], ready for json.

    category_ids: of each label; instances of a label without one are left out.
    """
    boxes = box_convert(result["boxes"].cpu().double(), "xyxy", "xywh").tolist()
    rows = zip(result["labels"].tolist(), result["scores"].tolist(), boxes, strict=True)
    entries = [{"category_id": category_ids[k], "score": round(score, 6), "bbox": [round(v, 3) for v in box]} for k, score, box in rows]
    if "masks" in result:
        columns = result["masks"].transpose(1, 2).to(torch.uint8).contiguous().cpu().numpy()  # (N, W, H) is (H, W, N) in Fortran's order
        for entry, code in zip(entries, rle.encode(columns.transpose(2, 1, 0)), strict=True):
            entry["segmentation"] = {"size": [int(n) for n in code["size"]], "counts": code["counts"].decode()}
    return [entry for entry in entries if entry["category_id"] is not None]


def _save_segments(result: dict, ids: list[int | None], file: Path) -> tuple[np.ndarray, list[dict]]:
    """Writes a panoptic result as COCO's PNG; returns its ids (H, W) and segments. What has no category id becomes void."""
    segments = [{"id": s["id"], "category_id": ids[s["label"]], "isthing": int(s["isthing"]), "score": round(s["score"], 6)} for s in result["segments"]]
    known = np.array([0] + [s["id"] * (s["category_id"] is not None) for s in segments])      # segment ids are 1, 2, 3 ... in order
    found = known[result["panoptic"].cpu().numpy()]
    data.save_ids(found, file)
    return found, [s for s in segments if s["category_id"] is not None]


def _save_panoptic(records: list[dict], ids: list[int], names: list[str], is_thing: list[bool], out: Path) -> None:
    """Writes panoptic.json, which says in COCO's format what is in panoptic/*.png."""
    annotations = [{key: record[key] for key in ("image_id", "file_name", "segments_info")} for record in records]
    categories = [{"id": i, "name": name, "isthing": int(thing)} for i, name, thing in zip(ids, names, is_thing, strict=True)]
    (out / "panoptic.json").write_text(json.dumps({"annotations": annotations, "categories": categories}))


def _save_labels(labels: torch.Tensor, ids: list[int | None], file: Path) -> None:
    """Writes labels (H, W) as a grey PNG of category ids, with 16 bits where 8 do not do; its highest value where there is no id."""
    kind = np.uint8 if max(i or 0 for i in ids) < 255 else np.uint16
    Image.fromarray(np.array([np.iinfo(kind).max if i is None else i for i in ids], kind)[labels.cpu().numpy()]).save(file, format="PNG")


def _score(dataset, things, found: list[dict], out: Path, task: str, per_class: bool) -> dict:
    """Writes the json files, prints the table, returns the metrics. found: `_record` of every image."""
    parts, remark, K = [], "", len(dataset.class_names)
    if task == "panoptic":
        _save_panoptic(found, dataset.category_ids, dataset.class_names, dataset.is_thing, out)
        parts.append(panoptic_metrics((record.get("counts", {}) for record in found), dataset.class_names, dataset.category_ids, dataset.is_thing))
    if task in MAPS:
        pixels = np.zeros(K * (K + 1), np.int64)
        for cells, values in (record["pixels"] for record in found if "pixels" in record):
            pixels[cells] += values
        parts.append(semantic_metrics(pixels.reshape(K, K + 1), dataset.class_names))
    if task != "semantic":
        truth, results = things.truth(), {"segm": None}
        for name, key in (("bbox", "bbox"), ("segm", "segmentation"))[:1 + (task != "detection")]:
            results[name] = [{"image_id": record["image_id"]} | {k: entry[k] for k in ("category_id", key, "score")}
                             for record in found for entry in record["entries"]]
            (out / f"results_{name}.json").write_text(json.dumps(results[name]))
        parts.append(coco_metrics(truth, results["bbox"], results["segm"], [record["image_id"] for record in found]))
        remark = hint(truth, results["bbox"])
    rows = {}
    for name, row in (item for part in parts for item in part["per_class"].items()):
        rows.setdefault(name, {}).update(row)
    metrics = {key: value for part in parts for key, value in part.items()} | {"per_class": rows}
    print("\n".join(filter(None, (table(metrics, per_class), remark))), flush=True)
    return EMPTY | metrics


# --------------------------------------------------------------------------------------------------------------- pictures
def colour(label: int) -> tuple[int, int, int]:
    """RGB of a class: hue by the golden angle; brightness by halving (van der Corput), so that the first classes differ in greyscale, too."""
    hue, light = (0.08 + 0.618034 * label) % 1, 0.3 + 0.58 * ((0.6 + int(f"{label:012b}"[::-1], 2) / 4096) % 1)
    rgb = np.array(colorsys.hsv_to_rgb(hue, 1, 1))
    own = rgb @ (0.299, 0.587, 0.114)
    rgb = rgb * light / own if own > light else 1 - (1 - rgb) * (1 - light) / (1 - own)       # towards black or white, to that brightness
    return tuple(round(255 * c) for c in rgb)


_font = cache(ImageFont.load_default)


def overlay(image: torch.Tensor, labels: list[int], scores, boxes: torch.Tensor, masks: torch.Tensor | None, names: list[str],
            side: int = 0) -> torch.Tensor:
    """Draws masks, boxes and labels on a picture.

    image: uint8 (3, H, W). labels: N ints. scores: N floats or None. boxes: (N, 4) xyxy in its pixels. masks: bool (N, H, W) or None.
    names: class names by label. side: the drawing's longer side in pixels; 0: the image's own, but at least 384, so that labels are legible.
    Returns uint8 (3, H', W') on the CPU.
    """
    _, H, W = image.shape
    image = _enlarged(image, side)
    _, h, w = image.shape
    if not len(labels):
        return image
    boxes = boxes.cpu().float() * torch.tensor([w / W, h / H] * 2)
    boxes = boxes.clamp(min=0).minimum(torch.tensor([w - 1, h - 1] * 2))
    order = (boxes[:, 2:] - boxes[:, :2]).prod(1).argsort(descending=True, stable=True)       # large ones first: small ones stay visible
    colours = [colour(label) for label in labels]
    ordered = [colours[i] for i in order]
    if masks is not None:
        masks = F.interpolate(masks.cpu()[order, None].float(), (h, w), mode="bilinear", antialias=True)[:, 0] > 0.5
        image = _paint(image, _stacked(masks), ordered, is_map=False)
    canvas = to_pil_image(draw_bounding_boxes(image, boxes[order], colors=ordered, width=max(1, round(max(h, w) / 640))))
    texts = [names[k] if scores is None else f"{names[k]} {float(scores[i]):.2f}" for i, k in enumerate(labels)]
    _write_labels(canvas, boxes.tolist(), texts, colours, max(12, round(max(h, w) / 55)))
    return pil_to_tensor(canvas)


def overlay_map(image: torch.Tensor, regions: torch.Tensor, labels: list[int], names: list[str], side: int = 0) -> torch.Tensor:
    """Paints a picture each of whose pixels is in one region or in none (dark), and writes names into all but tiny ones.

    image: uint8 (3, H, W). regions: int (H, W), an index into labels, -1 is none. names, side: as for `overlay`.
    Returns uint8 (3, H', W') on the CPU.
    """
    image, colours = _enlarged(image, side), [colour(label) for label in labels]
    _, h, w = image.shape
    regions = F.interpolate(regions[None, None].cpu().float(), (h, w), mode="nearest-exact")[0, 0].long()
    canvas, size = to_pil_image(_paint(image, regions, colours, is_map=True)), max(12, round(max(h, w) / 55))
    areas, spots = (regions + 1).flatten().bincount(minlength=len(labels) + 1)[1:], []
    named = [i for i in areas.argsort(descending=True, stable=True).tolist() if areas[i] > size ** 2]
    for i in named:
        inner = distance_transform_edt(np.pad(regions == i, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(inner.argmax(), inner.shape)                                  # the point farthest from the border
        spots.append((x, y - size / 2, x, y + size / 2))
    _write_labels(canvas, spots, [names[labels[i]] for i in named], [colours[i] for i in named], size)
    return pil_to_tensor(canvas)


def _paint(image: torch.Tensor, regions: torch.Tensor, colours: list, is_map: bool) -> torch.Tensor:
    """The picture with each region in its colour. Of a map it is grey, so that a hue is a class; dark in no region; borders are white, between
    instances of a class, too."""
    r, paint = regions[None].float(), torch.tensor([*colours, (0, 0, 0)])[regions].permute(2, 0, 1)
    border = (F.max_pool2d(r, 3, 1, 1) != r)[0]                                               # on one side of the line
    if is_map:
        image, paint[:, border] = image.float().mean(0), 255
    else:
        border = (border | (F.max_pool2d(-r, 3, 1, 1) != -r)[0]) & (regions >= 0)
    share = torch.where(border, 1.0, torch.where(regions < 0, 0.75 * is_map, 0.45))
    return (image * (1 - share) + paint * share).round().byte()


def _stacked(masks: torch.Tensor) -> torch.Tensor:
    """Index (H, W) of the last of N masks that covers each pixel, -1 where none does."""
    regions = torch.full(masks.shape[1:], -1)
    for i, mask in enumerate(masks):
        regions[mask] = i
    return regions


def _enlarged(image: torch.Tensor, side: int) -> torch.Tensor:
    """The picture on the CPU, its longer side `side` pixels; 0: its own, but at least 384."""
    _, H, W = image.shape
    scale = (side or max(H, W, 384)) / max(H, W)
    return resize(image.cpu(), [max(1, round(H * scale)), max(1, round(W * scale))], antialias=True)


def _write_labels(canvas: Image.Image, boxes: list, texts: list, colours: list, size: int) -> None:
    """A text on its colour above each box (xyxy), or else inside or beside it, or around a box without width; where that is taken by earlier texts, none."""
    draw, font, taken = ImageDraw.Draw(canvas), _font(size), []
    for (left, top, right, bottom), text, rgb in zip(boxes, texts, colours, strict=True):
        w, h = math.ceil(draw.textlength(text, font)) + 5, size + 3
        places = ((left, top - h), (left, top), (left, bottom - h), (right, top), (left - w, top)) if left < right else ((left - w / 2, top),)
        for x, y in ((max(0, min(int(x), canvas.width - w)), int(y)) for x, y in places):
            if 0 <= y <= canvas.height - h and all(x >= x1 or x + w <= x0 or y >= y1 or y + h <= y0 for x0, y0, x1, y1 in taken):
                taken.append((x, y, x + w, y + h))
                draw.rectangle(taken[-1], fill=rgb)
                ink = "black" if np.dot(rgb, (0.299, 0.587, 0.114)) > 128 else "white"
                draw.text((x + 3, y + h / 2), text, fill=ink, font=font, anchor="lm")
                break


def page(dataset, model, path: Path, count: int = 12, threshold: float = 0.3, title: str = "") -> None:
    """Saves a PNG of `count` images spread over the data set, truth beside prediction (scores from `threshold`); title: its first line."""
    count = min(count, len(dataset))
    side, gap, pairs, top = 256, 8, min(3, count), 64
    with _inference(model):
        drawn = [_pair(dataset, i * len(dataset) // count, model, threshold, side) for i in range(count)]
    rows = [[tile for pair in drawn[i:i + pairs] for tile in pair] for i in range(0, count, pairs)]
    heights = [max(tile.height for tile in row) for row in rows]
    left = [gap + i * (side + gap) + i // 2 * gap for i in range(2 * pairs)]                  # twice the gap between pairs
    sheet = Image.new("RGB", (left[-1] + side + gap, top + sum(heights) + gap * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    title = title or f"{count} of {len(dataset)} images: truth beside prediction" + f", scores from {threshold:g}" * (model.config.task not in MAPS)
    draw.text((gap, 22), title, fill="black", font=_font(20), anchor="lm")
    for i, x in enumerate(left):
        draw.text((x + side / 2, top - 14), ("truth", "prediction")[i % 2], fill="#444444", font=_font(15), anchor="mm")
    for row, height in zip(rows, heights, strict=True):
        for x, tile in zip(left, row, strict=False):                                          # the last row may be shorter
            sheet.paste(tile, (x + (side - tile.width) // 2, top + (height - tile.height) // 2))
        top += height + gap
    sheet.save(path)


def _pair(dataset, index: int, model, threshold: float, side: int) -> list[Image.Image]:
    """Truth and prediction of one image, drawn."""
    image, target = dataset[index]
    result = _detect(model, *data.collate([(image, target)]), [target["size"]])[0]
    names = list(dict.fromkeys([*model.classes["names"], *dataset.class_names]))
    truth = _truth(image, target, [names.index(dataset.class_names[k]) for k in target["labels"].tolist()], names, model.config.task, side)
    return [to_pil_image(truth), to_pil_image(_drawn(image, result, names, threshold, side))]


def _truth(image: torch.Tensor, target: dict, labels: list[int], names: list[str], task: str, side: int) -> torch.Tensor:
    """A target on its image, which may be padded right and below. labels: those of the target, as indices into names."""
    (_, H, W), (h, w) = image.shape, target["size"]
    image, masks = image[:, :h, :w], target["masks"][:, :h, :w].bool().cpu()
    if task in MAPS:
        return overlay_map(image, _stacked(masks), labels, names, side)
    return overlay(image, labels, None, maskdino.in_pixels(target["boxes"], H, W), masks if task != "detection" else None, names, side)


def _drawn(image: torch.Tensor, result: dict, names: list[str], threshold: float, side: int = 0) -> torch.Tensor:
    """A result on its picture (3, H, W): detections with scores above the threshold, or a panoptic or semantic map."""
    if "panoptic" in result:                                                                  # segment ids are 1, 2, 3 ... in order
        return overlay_map(image, result["panoptic"] - 1, [s["label"] for s in result["segments"]], names, side)
    if "semantic" in result:
        labels, regions = result["semantic"].unique(return_inverse=True)
        return overlay_map(image, regions, labels.tolist(), names, side)
    result = maskdino.above(result, threshold)
    return overlay(image, result["labels"].tolist(), result["scores"], result["boxes"], result.get("masks"), names, side)


# ----------------------------------------------------------------------------------------------------------------- curves
INKS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")


def curves(log_path: Path, path: Path) -> None:
    """Draws a run's log.jsonl as a page of four charts: loss, learning rate, gradient norm, scores.

    Lines: {"kind": "step", "step", "loss", "lr", "grad_norm", "losses": {part: value}} and {"kind": "epoch", "step", "box_AP", "mask_AP", "PQ", "mIoU"}.
    Parts whose names differ only before the last "/" (the same part of several layers) are drawn as one line, their mean.
    """
    lines = [json.loads(line) for line in Path(log_path).read_text().splitlines()]
    steps, epochs = ([line for line in lines if line["kind"] == kind] for kind in ("step", "epoch"))

    def points(rows, get):
        return _thin([(row["step"], get(row)) for row in rows])

    def part(name, row):
        values = [v for key, v in row["losses"].items() if key.rpartition("/")[2] == name and v is not None]
        return sum(values) / len(values) if values else None

    names = list(dict.fromkeys(key.rpartition("/")[2] for row in steps for key in row["losses"]))[:len(INKS)]
    loss = {name: (ink, points(steps, partial(part, name))) for ink, name in zip(INKS, names, strict=False)}
    scores = [key for key in ("box_AP", "mask_AP", "PQ", "mIoU") if any(row.get(key) is not None for row in epochs)]
    charts = {"loss (log scale)": {"total": ("#222222", points(steps, lambda row: row["loss"]))} | loss,
              "learning rate": {"lr": (INKS[0], points(steps, lambda row: row["lr"]))},
              "gradient norm": {"grad_norm": (INKS[0], points(steps, lambda row: row["grad_norm"]))},
              ", ".join(scores) or "AP": {key: (ink, points(epochs, lambda row, key=key: row.get(key))) for ink, key in zip(INKS, scores, strict=False)}}
    zoom, width, height, margin = 2, 700, 400, 24                                             # drawn twice as large, then halved: smooth lines
    sheet = Image.new("RGB", (zoom * (2 * width + 3 * margin), zoom * (2 * height + 3 * margin)), "white")
    for i, (title, series) in enumerate(charts.items()):
        corner = margin + i % 2 * (width + margin), margin + i // 2 * (height + margin)
        _chart(ImageDraw.Draw(sheet), [zoom * v for v in (*corner, width, height)], title, series, zoom, log="log" in title)
    sheet.resize((sheet.width // zoom, sheet.height // zoom), Image.Resampling.LANCZOS).save(path)


def _thin(points: list, bins: int = 250) -> list[tuple[float, float]]:
    """At most `bins` (x, y): means of neighbours, so that a long log reads as a line and not as a band. What is not finite is left out."""
    points = np.array([(x, y) for x, y in points if y is not None and math.isfinite(y)]).reshape(-1, 2)
    return [tuple(chunk.mean(0).tolist()) for chunk in np.array_split(points, min(bins, max(1, len(points)))) if len(chunk)]


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers within low..high: about 3 to 8 of them. log: the bounds are exponents of 10, the numbers are not."""
    if log:
        digits = (1, 2, 5) if high - low < 3 else (1,)
        return [m * 10.0 ** e for e in range(math.floor(low), math.ceil(high) + 1) for m in digits if low <= e + math.log10(m) <= high]
    rough = (high - low) / 3
    step = 10.0 ** math.floor(math.log10(rough))
    step *= 5 if 5 * step <= rough else 2 if 2 * step <= rough else 1
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _chart(draw: ImageDraw.ImageDraw, area: list, title: str, series: dict, zoom: int, log: bool) -> None:
    """A chart with title, legend, axes and lines. area: (x, y, width, height); series: {name: (colour, [(x, y)])}; log: a logarithmic y axis."""
    x0, y0, width, height = area
    left, top, right, bottom = x0 + 56 * zoom, y0 + 44 * zoom, x0 + width - 12 * zoom, y0 + height - 42 * zoom
    text = partial(draw.text, font=_font(13 * zoom), fill="#333333")
    draw.text((x0, y0), title, fill="black", font=_font(17 * zoom), anchor="lm")
    scale = math.log10 if log else float
    series = {name: (ink, [(x, scale(y)) for x, y in line if y > 0 or not log]) for name, (ink, line) in series.items()}
    points = np.array([point for _, line in series.values() for point in line])
    if not len(points):
        text(((left + right) / 2, (top + bottom) / 2), "nothing in the log yet", anchor="mm")
        return
    last, ys = max(points[:, 0].max(), 1), np.sort(points[:, 1])
    high = ys[-1 - len(ys) // 100]                                                            # a spike, 1 % of the points, may leave the frame
    low, high = (ys[0] - 0.05, high + 0.05) if log else (0.0, 1.05 * high or 1.0)

    def place(x, y):
        return left + (right - left) * x / last, bottom - (bottom - top) * min(max((y - low) / (high - low), 0), 1)

    for value in _ticks(low, high, log):
        y = place(0, scale(value))[1]
        draw.line((left, y, right, y), fill="#e4e4e4", width=zoom)
        text((left - 6 * zoom, y), f"{value:g}", anchor="rm")
    for value in _ticks(0, last, False):
        x = place(value, 0)[0]
        draw.line((x, bottom, x, bottom + 4 * zoom), fill="#333333", width=zoom)
        text((x, bottom + 14 * zoom), f"{value:g}", anchor="mm")
    text(((left + right) / 2, bottom + 32 * zoom), "step", anchor="mm")
    draw.line((left, top, left, bottom, right, bottom), fill="#333333", width=zoom)
    x = left
    for name, (ink, line) in series.items():
        dots = [place(*point) for point in line]
        draw.line(dots, fill=ink, width=2 * zoom, joint="curve")
        for a, b in dots if len(dots) <= 30 else ():
            draw.ellipse((a - 3 * zoom, b - 3 * zoom, a + 3 * zoom, b + 3 * zoom), fill=ink)
        if len(series) > 1:
            draw.line((x, y0 + 26 * zoom, x + 14 * zoom, y0 + 26 * zoom), fill=ink, width=3 * zoom)
            text((x + 18 * zoom, y0 + 26 * zoom), name, anchor="lm")
            x += 34 * zoom + draw.textlength(name, _font(13 * zoom))


# ----------------------------------------------------------------------------------------------------------- how it thinks
# A look inside a model (maskdino.recording) as a page of pictures. Told apart without colours, too: what was before is dashed, what came out is solid;
# heat maps and the dots of coarse and fine levels are scales of lightness.
INSIDE = r"|pixel_decoder|query_selection|heads(\.class_head)?|label_embed|pool|decoder(\.layers\.\d+(\.cross_attn\.(sampling_offsets|attention_weights))?)?"
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))            # ever lighter
LOGITS, INK, BLUE = 8, "#d0006f", "#0060ff"                                                   # where the heat of mask logits ends; inks of boxes and tokens
SIDE, ZOOM = 190, 2                                                                           # of a tile in pixels; it is drawn larger and reduced


class Stage(NamedTuple):
    """A row of the page: what one place of the model says about n queries, and what it had to look at. Boxes are cxcywh in 0..1 of the padded image."""
    name: str
    said: maskdino.Prediction                   # logits (n, K), boxes (n, 4), embeddings (n, C)
    cells: torch.Tensor | None = None           # (n, 4) the tokens that were selected
    before: torch.Tensor | None = None          # (n, 4) boxes that it moved: proposals, anchors
    points: torch.Tensor | None = None          # (n, M, L, P, 2) where deformable attention looked, (x, y) in 0..1
    weights: torch.Tensor | None = None         # (n, M, L, P) how much it took from there
    seen: torch.Tensor | None = None            # (n, h, w) in 0..1: what an attention mask or a noisy mask let through


class Tokens(NamedTuple):
    """What query selection had to choose from."""
    scores: torch.Tensor                        # (S,) of the best class
    proposals: torch.Tensor                     # (S, 4)
    cells: torch.Tensor                         # (S, 4)
    chosen: torch.Tensor                        # (Q,) the tokens that became queries 0, 1, 2 ...
    shapes: list[tuple[int, int]]


def tokens_of(model, record: dict) -> Tokens | None:
    """Query selection in a recorded look at one image; None where queries are learned."""
    selection = record.get("query_selection")
    if not selection or selection[0].gave[2] is None:
        return None
    memory, shapes = selection[0].given[:2]
    best, proposals = record["heads.class_head"][0].gave.amax(-1), model.query_selection.proposals(shapes, memory)
    sizes = torch.cat([proposals.new_tensor([1 / w, 1 / h]).expand(h * w, 2) for h, w in shapes])
    return Tokens(best[0].float().sigmoid(), proposals, torch.cat([proposals[:, :2], sizes], 1), best.topk(selection[0].gave[0].shape[1]).indices[0], shapes)


def stages(model, record: dict, queries: torch.Tensor) -> list[Stage]:
    """A recorded look at one image as rows about some queries (n,), which keep their index from selection to the last layer."""
    output, tokens, found = record[""][0].gave, tokens_of(model, record), []
    layers = len(model.decoder.layers)
    for step, call in enumerate(record.get("pool", ()), 1):                                   # DFormer: the prediction that ended a sampling step
        said = record["heads"][step * layers - 1].gave
        found.append(Stage(f"sampling step {step}", _some(said, queries), seen=call.given[0][0, queries]))
    for name, said in output.sets.items():
        stage = Stage({"selection": "query selection", "initial": "initial prediction"}.get(name, name.replace("r", "r ")), _some(said, queries))
        if name == "selection":
            chosen = tokens.chosen[queries]
            stage = stage._replace(cells=tokens.cells[chosen], before=tokens.proposals[chosen])
        elif name == "initial" and tokens:
            stage = stage._replace(before=output.sets["selection"].boxes[0, queries])
        elif name != "initial":
            stage = stage._replace(**_looked(model, record, f"decoder.layers.{int(name[5:]) - 1}", queries))
        found.append(stage)
    return found


def _some(said: maskdino.Prediction, queries: torch.Tensor) -> maskdino.Prediction:
    return maskdino.rows(maskdino.rows(said, 0, 0), queries, 0)


def _looked(model, record: dict, name: str, queries: torch.Tensor) -> dict:
    """Where a decoder layer looked, as fields of Stage: anchors and sampling points, or the sibling's attention mask."""
    given = record[name][-1].given
    if f"{name}.cross_attn.sampling_offsets" in record:
        offsets, logits = (record[f"{name}.cross_attn.{part}"][0].gave[:1, queries] for part in ("sampling_offsets", "attention_weights"))
        anchors, shape = given[2][:1, queries], model.decoder.layers[0].cross_attn.shape
        points = kernels.sampling_locations(given[4], anchors, offsets.unflatten(-1, (*shape, 2)))
        return {"before": anchors[0], "points": points[0], "weights": logits.float().unflatten(-1, shape).flatten(3).softmax(-1).view(-1, *shape)}
    if given[4] is None:
        return {}
    shapes, order = record["pixel_decoder"][0].gave[1], model.decoder.levels
    h, w = shapes[order[-1 - int(name.rpartition(".")[2]) % len(order)] if model.config.round_robin else order[0]]
    return {"seen": (~given[4])[0, queries, :h * w].unflatten(-1, (h, w)).float()}            # of all levels at once the finest


def explain(model, record: dict, path: Path, count: int = 3) -> None:
    """Saves a page about a recorded look at one image: what the model thought of its `count` strongest queries, one a column, place by place.

    record: what maskdino.recording(model, evaluate.INSIDE) kept of one model(images (1, 3, H, W), [size]).
    """
    (images, [size]), output = record[""][0]
    last, tokens = maskdino.rows(list(output.sets.values())[-1], 0, 0), tokens_of(model, record)
    queries = maskdino.class_probabilities(last.logits, model.config.class_loss).amax(-1).topk(min(count, len(last.logits))).indices
    rows, picture, whole = stages(model, record, queries), to_pil_image(images[0].cpu()), _Window.around(None, size, output.padded)
    maps = [None if output.pixels is None else maskdino.mask_logits(row.said.embeddings[None].float(), output.pixels[:1].float())[0].cpu() for row in rows]
    columns = []
    for k in range(len(queries)):
        boxes = [box[k] for row in rows for box in (row.said.boxes, row.cells, row.before) if box is not None]
        columns.append(_Window.around(torch.stack(boxes).cpu().float(), size, output.padded) if boxes else whole)
    strip = [("the answers", _answers(images[0], size, output.padded, rows[-1].said.boxes, maps[-1]))]
    strip += _token_maps(tokens, queries, whole) if tokens else []
    strip += [("pixel embeddings", _embedding_map(output.pixels[0], whole))] if output.pixels is not None else []
    lines, height = [("", strip), ("legend", _legend(rows, output.pixels is not None))], max(window.size[1] for window in columns)
    for row, logits in zip(rows, maps, strict=True):
        best = maskdino.class_probabilities(row.said.logits, model.config.class_loss).max(-1)
        captions = [f"{chr(65 + k)}: {model.classes['names'][label]} {score:.2f}" for k, (score, label) in enumerate(zip(*map(torch.Tensor.tolist, best)))]
        cells = [_cell(picture, columns[k], row, k, None if logits is None else logits[k], height) for k in range(len(queries))]
        lines.append((row.name, list(zip(captions, cells, strict=True))))
    _sheet(f"The {len(queries)} strongest of {len(last.logits)} queries, each in its column all the way", lines).save(path)


class _Window(NamedTuple):
    """A part of a picture, and its size on the page."""
    part: tuple[float, float, float, float]     # xyxy in 0..1 of the padded picture
    size: tuple[int, int]                       # (width, height) in pixels, before it is reduced

    @classmethod
    def around(cls, boxes: torch.Tensor | None, size: tuple[int, int], padded: tuple[int, int]) -> "_Window":
        """All of an image of `size` (h, w), or what is around boxes (n, 4), as square as the image allows."""
        (h, w), (H, W) = size, padded
        corners = torch.tensor([[0.0, 0, w, h]]) if boxes is None else maskdino.in_pixels(boxes, H, W).clamp(min=0).minimum(torch.tensor([w, h, w, h]))
        low, high = corners[:, :2].amin(0), corners[:, 2:].amax(0)
        side = float((high - low).max()) * (1 if boxes is None else 1.2)
        extent = torch.tensor([min(side, w), min(side, h)])
        start = ((low + high - extent) / 2).clamp(min=0).minimum(torch.tensor([w, h]) - extent)
        x0, y0, x1, y1 = *start.tolist(), *(start + extent).tolist()
        return cls((x0 / W, y0 / H, x1 / W, y1 / H), tuple(max(1, round(SIDE * ZOOM * float(e) / max(extent.tolist()))) for e in extent))

    def show(self, picture: Image.Image, how: Image.Resampling = Image.Resampling.BILINEAR) -> Image.Image:
        """This part of a picture or map, both of the padded size."""
        return picture.resize(self.size, how, [part * n for part, n in zip(self.part, picture.size * 2, strict=True)])

    def place(self, xy: torch.Tensor) -> list:
        """(..., 2) in 0..1 of the padded picture -> pixels here."""
        start, end = torch.tensor(self.part).view(2, 2)
        return ((xy.cpu().float() - start) / (end - start) * torch.tensor(self.size)).tolist()


def _cell(picture: Image.Image, window: _Window, row: Stage, k: int, logits: torch.Tensor | None, height: int) -> Image.Image:
    """Where query k looked and its boxes; beside it its mask logits (h, w). height: of the result, as that of the row's highest."""
    tile = _faded(picture, window)
    if row.seen is not None:
        light = window.show(to_pil_image(row.seen[k].cpu().clamp(0, 1)), Image.Resampling.NEAREST)
        tile = Image.composite(tile, Image.blend(tile, Image.new("RGB", window.size, "#201040"), 0.8), light)
    tiles = [tile] if logits is None else [tile, _mask_heat(logits, window)]
    if row.cells is not None:
        veil = tile.copy()
        ImageDraw.Draw(veil).rectangle(_corners(window, row.cells[k]), BLUE, "white", 2 * ZOOM)
        tile.paste(Image.blend(tile, veil, 0.6))
    if row.points is not None:
        _dots(ImageDraw.Draw(tile), window.place(row.points[k]), row.weights[k])
    for canvas in tiles if row.said.boxes is not None else ():
        for boxes, ink in ((row.before, None), (row.said.boxes, INK)):
            if boxes is not None:
                _box(ImageDraw.Draw(canvas), _corners(window, boxes[k]), ink)
    sheet = Image.new("RGB", ((SIDE + 4) * len(tiles) * ZOOM, height), "white")
    for i, canvas in enumerate(tiles):
        sheet.paste(canvas, ((SIDE + 4) * ZOOM * i, 0))
    return sheet.reduce(ZOOM)


def _faded(picture: Image.Image, window: _Window) -> Image.Image:
    return Image.blend(window.show(picture), Image.new("RGB", window.size, "white"), 0.3)


def _corners(window: _Window, box: torch.Tensor) -> list[float]:
    (x0, y0), (x1, y1) = window.place(box_convert(box.cpu().float(), "cxcywh", "xyxy").view(2, 2))
    return [x0, y0, max(x0, x1), max(y0, y1)]


def _box(draw: ImageDraw.ImageDraw, corners: list[float], ink: str | None) -> None:
    """A rectangle in this ink with a white rim; None: light dashes on a dark line."""
    x0, y0, x1, y1 = corners
    if ink:
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="white", width=2 * ZOOM + 2)
        return draw.rectangle(corners, outline=ink, width=2 * ZOOM)
    draw.rectangle(corners, outline="#202020", width=2 * ZOOM)
    for a, b, across in ((x0, x1, True), (y0, y1, False)):
        for start in np.arange(a, b, 10 * ZOOM):
            end = min(start + 5 * ZOOM, b)
            for edge in (y0 + ZOOM, y1 - ZOOM + 1) if across else (x0 + ZOOM, x1 - ZOOM + 1):
                draw.line((start, edge, end, edge) if across else (edge, start, edge, end), fill="#ffe03a", width=2 * ZOOM)


def _dots(draw: ImageDraw.ImageDraw, points: list, weights: torch.Tensor) -> None:
    """Sampling points [M][L][P][2] as dots, their areas the weights (M, L, P), the finest level the lightest; large ones below."""
    L = weights.shape[1]
    flat = [(float(weight), level, xy) for heads, ws in zip(points, weights, strict=True) for level, (ps, w) in enumerate(zip(heads, ws, strict=True))
            for xy, weight in zip(ps, w, strict=True)]
    for weight, level, (x, y) in sorted(flat, key=lambda dot: -dot[0]):
        r = ZOOM * (0.5 + 9 * math.sqrt(weight))
        draw.ellipse((x - r, y - r, x + r, y + r), _level_ink(level, L), "black" if level < L / 2 else "white", ZOOM // 2)


def _level_ink(level: int, levels: int) -> tuple[int, int, int]:
    return tuple(_heat(np.array(0.95 - 0.75 * level / max(1, levels - 1))).tolist())


def _heat(x: np.ndarray) -> np.ndarray:
    """0..1, any shape -> (..., 3) uint8, from black to pale yellow."""
    return np.stack([np.interp(x, np.linspace(0, 1, len(HEAT)), channel) for channel in zip(*HEAT, strict=True)], -1).astype(np.uint8)


def _mask_heat(logits: torch.Tensor, window: _Window) -> Image.Image:
    """Mask logits (h, w), of the padded image, as heat; a line where they are 0."""
    x = np.asarray(window.show(Image.fromarray(logits.numpy())))
    inside = torch.from_numpy(x > 0)[None].float()
    colours = _heat((x / (2 * LOGITS) + 0.5).clip(0, 1))
    colours[(F.max_pool2d(inside, 2 * ZOOM + 1, 1, ZOOM) != inside)[0].numpy()] = 255
    return Image.fromarray(colours)


def _answers(image: torch.Tensor, size: tuple[int, int], padded: tuple[int, int], boxes: torch.Tensor | None, logits: torch.Tensor | None) -> Image.Image:
    """The image with the last stage's boxes and masks, lettered by column."""
    (h, w), masks = size, None if logits is None else maskdino.resize(logits, padded)[:, :size[0], :size[1]] > 0
    boxes = maskdino.in_pixels(maskdino.boxes_of_masks(masks, "bitmask"), h, w) if boxes is None else maskdino.in_pixels(boxes.cpu(), *padded)
    letters = [chr(65 + k) for k in range(len(boxes))]
    return to_pil_image(overlay(image[:, :h, :w], list(range(len(boxes))), None, boxes, masks, letters, SIDE * 3 // 2))


def _token_maps(tokens: Tokens, queries: torch.Tensor, window: _Window) -> list[tuple[str, Image.Image]]:
    """Each level's scores as heat, of the same scale; rings around the tokens that were chosen, letters where columns come from."""
    tiles, starts, top = [], np.cumsum([0] + [h * w for h, w in tokens.shapes]), tokens.scores.max().item()
    for (h, w), start, end in zip(tokens.shapes, starts, starts[1:]):
        scores = Image.fromarray(tokens.scores[start:end].view(h, w).cpu().numpy())
        tile = Image.fromarray(_heat(np.asarray(window.show(scores, Image.Resampling.NEAREST)) / top))
        draw, here = ImageDraw.Draw(tile), (tokens.chosen >= start) & (tokens.chosen < end)
        for x, y in window.place(tokens.cells[tokens.chosen[here], :2]):
            draw.ellipse((x - 4 * ZOOM, y - 4 * ZOOM, x + 4 * ZOOM, y + 4 * ZOOM), outline="white", width=ZOOM)
        lettered = [k for k, query in enumerate(queries.tolist()) if here[query]]
        _write_labels(tile, [_corners(window, tokens.cells[tokens.chosen[queries[k]]]) for k in lettered], [chr(65 + k) for k in lettered],
                      [colour(k) for k in lettered], 12 * ZOOM)
        tiles.append((f"{h} x {w} tokens: {int(here.sum())} chosen", tile.reduce(ZOOM)))
    return tiles


def _embedding_map(pixels: torch.Tensor, window: _Window) -> Image.Image:
    """The pixel embedding map (C, h, w), its three principal components as red, green and blue."""
    h, w = (math.ceil(n * part) for n, part in zip(pixels.shape[1:], window.part[:1:-1]))     # without the padding
    x = pixels[:, :h, :w].flatten(1).T.double().cpu()
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.T @ x).eigenvectors[:, -3:].flip(1)
    x = x @ (axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign())                # an axis has no sign of its own
    low, high = x.quantile(0.02, 0), x.quantile(0.98, 0)
    colours = ((x - low) / (high - low) * 255).clamp(0, 255).byte().view(h, w, 3).numpy()
    return Image.fromarray(colours).resize(window.size, Image.Resampling.NEAREST).reduce(ZOOM)


def _legend(rows: list[Stage], masks: bool) -> list[tuple[str, Image.Image]]:
    """Only what there is on the page."""
    def sample(draw_it, width: int = 60) -> Image.Image:
        tile = Image.new("RGB", (width * ZOOM, 22 * ZOOM), "#b8b8b8")
        draw_it(ImageDraw.Draw(tile))
        return tile.reduce(ZOOM)
    box, entries = [8 * ZOOM, 4 * ZOOM, 52 * ZOOM, 18 * ZOOM], []
    if any(row.cells is not None for row in rows):
        entries.append(("token", sample(lambda draw: draw.rectangle([24 * ZOOM, 5 * ZOOM, 36 * ZOOM, 17 * ZOOM], BLUE, "white", ZOOM))))
    if any(row.before is not None for row in rows):
        entries.append(("box before: proposal, anchor", sample(lambda draw: _box(draw, box, None))))
    if any(row.said.boxes is not None for row in rows):
        entries.append(("box after", sample(lambda draw: _box(draw, box, INK))))
    if points := [row.weights for row in rows if row.points is not None]:
        L = points[0].shape[2]
        spots, weights = torch.tensor([[12 + 18 * level, 11] for level in range(L)]) * ZOOM, torch.full((1, L, 1), 0.5)
        entries.append(("samples: area = weight, fine to coarse level", sample(lambda draw: _dots(draw, spots[None, :, None].tolist(), weights), 18 * L + 6)))
    if any(row.seen is not None for row in rows):
        entries.append(("dark: not looked at", sample(lambda draw: draw.rectangle([30 * ZOOM, 0, 60 * ZOOM, 22 * ZOOM], "#201040"))))
    if masks:
        ramp = torch.linspace(-LOGITS, LOGITS, 200)[None].expand(22, 200)
        entries.append((f"mask logits from -{LOGITS} to {LOGITS}, line at 0", _mask_heat(ramp, _Window((0, 0, 1, 1), (200 * ZOOM, 22 * ZOOM))).reduce(ZOOM)))
    return entries


def batch_page(model, targets: list[dict], record: dict, matched: tuple, path: Path) -> None:
    """Saves a page about one step of training: the batch; of its fullest image the denoising groups, who sees whom, and the assignment with its cost.

    record: what maskdino.recording(model, evaluate.INSIDE) kept of one model(images, sizes, targets). matched: what the criterion's matcher gave.
    """
    images, names, b = record[""][0].given[0], model.classes["names"], max(range(len(targets)), key=lambda i: len(targets[i]["labels"]))
    picture, target, N = to_pil_image(images[b].cpu()), targets[b], len(targets[b]["labels"])
    window = _Window.around(None, target["size"], images.shape[-2:])
    lines = [("the batch", [(f"image {t['image_id']}", to_pil_image(_truth(image.cpu(), t, t["labels"].tolist(), names, model.config.task, SIDE)))
                            for image, t in list(zip(images, targets, strict=True))[:8]])]
    if N and "label_embed" in record:
        _, anchors, _, _, blocked, _ = record["decoder"][0].given
        noised, slots = record["label_embed"][b].given[0], max(len(t["labels"]) for t in targets)
        grid = Image.fromarray(np.where(blocked.cpu().numpy(), 60, 235).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST).convert("RGB")
        lines.append((f"denoising in {len(noised)} groups", [(f"group {g + 1}: {int((noised[g] != target['labels']).sum())} of {N} labels wrong", _pairs(
            picture, window, target["boxes"], anchors[b, g * slots:g * slots + N], [names[k] for k in labels], labels)) for g, labels in
            enumerate(noised[:4].tolist())]))
        lines[-1][1].append((f"light: rows see columns, the last {len(blocked) - len(noised) * slots} are the queries", grid))
    if "pool" in record:
        noisy = record["pool"][0].given[0][b, :6].cpu()
        lines.append(("noisy masks", [(f"query {q}", window.show(to_pil_image(m)).reduce(ZOOM)) for q, m in enumerate(noisy)]))
    if N:
        cost, query = {part: c[-1, b, :, :N].cpu() for part, c in matched[0].items()}, matched[1][-1, b, :N].tolist()             # of the last layer
        tiles = _assignment(record[""][0].gave, picture, window, target, b, cost, query, names)
        lines += [("assignment", tiles[:3]), ("", tiles[3:])]
    _sheet(f"One step's batch; below, image {target['image_id']}: clean boxes solid, noised or predicted ones dashed", lines).save(path)


def _pairs(picture: Image.Image, window: _Window, solid: torch.Tensor, dashed: torch.Tensor, texts: list[str], labels: list[int]) -> Image.Image:
    """Boxes (n, 4), and dashed what became of them, with a text in the colour of a label."""
    tile, corners = _faded(picture, window), [_corners(window, box) for box in dashed]
    for before, after in zip(solid, corners, strict=True):
        _box(ImageDraw.Draw(tile), _corners(window, before), INK)
        _box(ImageDraw.Draw(tile), after, None)
    _write_labels(tile, corners, texts, [colour(k) for k in labels], 11 * ZOOM)
    return tile.reduce(ZOOM)


def _assignment(output: maskdino.Output, picture: Image.Image, window: _Window, target: dict, b: int, cost: dict[str, torch.Tensor], query: list[int],
                names: list[str], most: int = 8) -> list[tuple[str, Image.Image]]:
    """The objects with their queries' boxes; the total cost and its parts, of these and of the next cheapest queries."""
    last, labels, n = list(output.sets.values())[-1], target["labels"][:most].tolist(), min(most, len(query))
    boxes = None if last.boxes is None else last.boxes[b, query[:n]]
    if boxes is None:
        boxes = maskdino.boxes_of_masks(maskdino.mask_logits(last.embeddings[b:b + 1, query[:n]].float(), output.pixels[b:b + 1].float())[0] > 0, "bitmask")
    tile = _pairs(picture, window, target["boxes"][:n], boxes, [f"{i + 1}: query {q}" for i, q in enumerate(query[:n])], labels)
    objects = [f"{i + 1} {names[k]}" for i, k in enumerate(labels)]
    groups = {"class": ("class",), "box": ("l1", "giou"), "mask": ("mask", "dice")}
    parts = {name: sum(cost[key] for key in keys) for name, keys in groups.items() if cost.keys() & set(keys)}
    parts = {"total": sum(parts.values())} | parts
    cheapest = [q for q in parts["total"].amin(1).argsort().tolist() if q not in query]
    shown = [*dict.fromkeys(query[:n]), *cheapest][:n + 6]
    marked = [(i, shown.index(q)) for i, q in enumerate(query[:n])]
    return [("objects and their queries", tile),
            *((f"{name} cost: queries across, the assigned ones framed", _matrix(c[shown].T[:n], objects, shown, marked)) for name, c in parts.items())]


def _matrix(values: torch.Tensor, rows: list[str], columns: list[int], marked: list[tuple[int, int]]) -> Image.Image:
    """Numbers (n, q) on a ground that is the lighter the smaller they are; some framed."""
    font, w, h = _font(11), 36, 22
    left = math.ceil(max(map(font.getlength, rows))) + 6
    tile = Image.new("RGB", (left + w * len(columns) + 2, h * (len(rows) + 1) + 2), "white")
    draw, (low, high) = ImageDraw.Draw(tile), (values.min().item(), values.max().item())
    for j, name in enumerate(columns):
        draw.text((left + w * (j + 0.5), h / 2), str(name), fill="#333333", font=font, anchor="mm")
    for i, (name, line) in enumerate(zip(rows, values.tolist(), strict=True)):
        draw.text((0, h * (i + 1.5)), name, fill="#333333", font=font, anchor="lm")
        for j, value in enumerate(line):
            ground = tuple(_heat(np.array(1 - 0.9 * (value - low) / (high - low + 1e-9))).tolist())
            x, y = left + w * j, h * (i + 1)
            draw.rectangle((x, y, x + w - 1, y + h - 1), ground)
            draw.text((x + w / 2, y + h / 2), f"{value:.1f}", fill="black" if np.dot(ground, (0.299, 0.587, 0.114)) > 128 else "white", font=font, anchor="mm")
    for i, j in marked:
        x, y = left + w * j, h * (i + 1)
        draw.rectangle((x, y, x + w - 1, y + h - 1), outline="white", width=3)
        draw.rectangle((x, y, x + w - 1, y + h - 1), outline="black")
    return tile


def _sheet(title: str, lines: list[tuple[str, list[tuple[str, Image.Image]]]]) -> Image.Image:
    """A page: under a title, lines of pictures with captions above them, each with its name on the left."""
    font, gap, names = _font(14), 12, _font(16)
    left = gap + round(max(names.getlength(part) for name, _ in lines for part in textwrap.wrap(name, 10))) + gap
    widths = [[max(tile.width, math.ceil(font.getlength(caption))) + gap for caption, tile in tiles] for _, tiles in lines]
    heights = [max(tile.height for _, tile in tiles) + 30 for _, tiles in lines]
    sheet = Image.new("RGB", (left + max(map(sum, widths)), 46 + sum(heights) + gap), "white")
    draw, y = ImageDraw.Draw(sheet), 46
    draw.text((gap, 24), title, fill="black", font=_font(18), anchor="lm")
    for (name, tiles), row, height in zip(lines, widths, heights, strict=True):
        draw.text((gap, y + 22), "\n".join(textwrap.wrap(name, 10)), fill="#333333", font=names)
        x = left
        for (caption, tile), width in zip(tiles, row, strict=True):
            draw.text((x, y + 11), caption, fill="#333333", font=font, anchor="lm")
            sheet.paste(tile, (x, y + 22))
            x += width
        y += height
    return sheet


# ------------------------------------------------------------------------------------------------------------- own images
def predict_folder(model, images: Path, out: Path, threshold: float = 0.3, tta: bool = False, thinking: bool = False) -> list[dict]:
    """Predicts one picture or a folder of them, one at a time; tta: see `augmented`; thinking: of each `explain` leaves a page, explain/*.png.

    Leaves in `out` an overlay per picture (its stem, or its name where two share a stem; .jpg for JPEG, else .png) and predictions.json: a list of
    {file_name, category_id, category_name, score, bbox [x, y, w, h], segmentation {size, counts}} in pixels of the original image,
    upright as a viewer shows it. Of panoptic models these are things alone, and panoptic.json and panoptic/*.png hold all segments in COCO's format;
    of semantic ones semantic/*.png hold category ids, and predictions.json the classes seen: {file_name, category_id, category_name, area}.
    Returns the list. Raises DataError: nothing there, not a picture, `out` is the pictures' own folder.
    """
    files, out = _picture_files(Path(images)), Path(out)
    if out.resolve() == files[0].resolve().parent:
        raise data.DataError(f"--out={out} is the pictures' own folder, where overlays would replace them: choose another")
    task, names, ids = model.config.task, model.classes["names"], model.classes["category_ids"]
    for folder in [out / task] * (task in MAPS) + [out / "explain"] * thinking + [out]:
        folder.mkdir(parents=True, exist_ok=True)
    predictions, segments = [], []
    for file, stem in zip(tqdm(files, "predict", unit="image", leave=False), _stems(files), strict=True):
        image = data.read_image(file)                                                         # upright
        with maskdino.recording(model, INSIDE) if thinking else contextlib.nullcontext() as record:
            result = {"semantic": augmented(model, image).argmax(0)} if tta else model.predict([image], threshold=threshold)[0]
        if thinking:
            explain(model, record, out / "explain" / f"{stem}.png")
        if task == "semantic":
            seen, areas = result["semantic"].unique(return_counts=True)
            rows = [(k, {"category_id": ids[k], "area": n}) for k, n in zip(seen.tolist(), areas.tolist(), strict=True)]
            _save_labels(result["semantic"], ids, out / task / f"{stem}.png")
        else:
            rows = list(zip(result["labels"].tolist(), _entries(result, ids), strict=True))
        if task == "panoptic":
            _, kept = _save_segments(result, ids, out / task / f"{stem}.png")
            segments.append({"image_id": file.stem, "file_name": f"{stem}.png", "segments_info": kept})
        predictions += [{"file_name": file.name, "category_id": row["category_id"], "category_name": names[k]} | row for k, row in rows]
        suffix = ".jpg" if file.suffix.lower() in (".jpg", ".jpeg") else ".png"
        to_pil_image(_drawn(pil_to_tensor(image), result, names, threshold)).save(out / f"{stem}{suffix}", quality=92)
    (out / "predictions.json").write_text(json.dumps(predictions, indent=1))
    if task == "panoptic":
        _save_panoptic(segments, ids, names, model.classes["is_thing"], out)
    return predictions


def _picture_files(images: Path) -> list[Path]:
    """The picture that `images` is, or the pictures in that folder (not below it), sorted."""
    if not images.exists():
        raise data.DataError(f"--images={images}: there is no such file or folder; name a picture or a folder of pictures")
    files = [images] if images.is_file() else sorted(f for f in images.iterdir() if f.suffix.lower() in data.SUFFIXES and f.name[0] != ".")
    if not files:
        raise data.DataError(f"--images={images}: no picture ({' '.join(data.SUFFIXES)}) in this folder; folders below it are not searched")
    return files


# ------------------------------------------------------------------------------------------------------- the paper's tables
class Row(NamedTuple):
    """A row of a table: a preset with something changed, and what the paper measured."""
    preset: str | None                      # None: another system's recipe, paper only
    overrides: dict
    paper: tuple[float | None, ...]         # in the order of the table's metrics
    base: str = ""                          # the row that it is compared with
    layer: int | None = None                # what is read out: the prediction after this of nine decoder layers, 0 = query selection
    at_test: dict = {}                      # what is changed of the trained model, which is then evaluated again
    remark: str = ""                        # of a row that is paper only: why, or the command that comes nearest
    unchecked: bool = False                 # the paper's numbers are from memory: not looked up again

    @property
    def read_out(self) -> bool:
        """Whether the row evaluates a trained model once more, instead of being what training leaves."""
        return self.layer is not None or bool(self.at_test)

    def result(self, folder: Path) -> Path:
        """The file with this row's numbers, in its run's folder."""
        if self.at_test:
            return folder / "--".join(f"{k}={_flag(v)}" for k, v in self.at_test.items()) / "result_eval.json"
        return folder / ("result.json" if self.layer is None else "result_layers.json")

    def command(self, run: "Run", root: Path, where: str | None) -> str:
        """What leaves that file: trains, or evaluates the trained model once more."""
        folder = root / run.name
        if not self.read_out or not (folder / "result.json").exists():
            return run.command(root, where)
        words = [f"--{k}={_flag(v)}" for k, v in self.at_test.items()] + [f"--out={self.result(folder).parent}"] if self.at_test else ["--layers"]
        return " ".join(["python evaluate.py", str(folder / "checkpoint.pth"), *words, f"--data={run.data(where) or 'DIR'}"])


class Table(NamedTuple):
    """A table of the paper, or two that belong together."""
    title: str
    metrics: tuple[str, ...]                # keys of EMPTY or COSTS
    rows: dict[str, Row]


COSTS = {"minutes": ("seconds", 60), "GB": ("peak_memory", 2 ** 30)}                          # of training: a key of result.json, and its unit
TOKEN = dict(box_init="token")                                                                # without mask-enhanced box initialisation
DETECTION = dict(task="detection", box_init="token", denoising="box", matching="box")
SCALED = TOKEN | dict(levels=(8, 16, 32, 64))
UNLEARNED = dict(content_queries="zero", initial_prediction=False)
NO_PARTS = dict(box_init="token", content_queries="learned", denoising="box", matching="box")
OBJECTS365 = "pre-train: train.py coco_instance_swinl_50ep_token --task=detection --denoising=box --matching=box --train_json=JSON --train_images=DIR " \
             "--val_json=JSON --val_images=DIR --out=runs/objects365; then train.py {} --finetune=runs/objects365/checkpoint.pth"
I12, I24, I50 = (f"coco_instance_r50_{epochs}ep" for epochs in (12, 24, 50))
P12, P24, P50 = (f"coco_panoptic_r50_{epochs}ep" for epochs in (12, 24, 50))
M50, D50 = (f"{name}_coco_instance_r50_50ep" for name in ("mask2former", "dformer"))
TWELVE = dict(iterations=88_500, lr_drops=(81_125,))


def three_tasks(rows: dict[str, tuple[dict, tuple[float, ...]]], base: str) -> dict[str, Row]:
    """Rows of an ablation of Mask2Former's, each for three tasks: {label: (overrides, the paper's mask AP, PQ and ADE20K's mIoU)}. Its main numbers alone
    were looked up again."""
    presets = {"instance": M50, "panoptic": "mask2former_coco_panoptic_r50_50ep", "semantic": "mask2former_ade20k_semantic_r50"}
    return {f"{label}, {task}": Row(preset, overrides, tuple(number if i == k else None for k, number in enumerate(numbers)),
                                    base="" if label == base else f"{base}, {task}", unchecked=label != base)
            for i, (task, preset) in enumerate(presets.items()) for label, (overrides, numbers) in rows.items()}


# A run is named after its preset and overrides, so that tables share it. What a row is about stands in its overrides even where the preset says the same.
TABLES: dict[str, Table] = {
    "combination": Table("Tables 1 and 2: why one model had not replaced two, 50 epochs", ("box_AP", "mask_AP"), {
        "Mask2Former": Row(M50, {}, (46.2, 43.7)),
        "Mask2Former + detection head": Row(M50, dict(detection_head=True), (21.6, 41.3), base="Mask2Former"),
        "DINO": Row(None, {}, (50.7, None), remark="900 queries with contrastive denoising"),
        "DINO + DETR's segmentation head": Row(None, {}, (None, 35.8), remark="another system's head"),
        "DINO + Mask2Former's mask head": Row(None, {}, (49.9, 40.2), remark="900 queries with contrastive denoising")}),
    "instance": Table("Table 3: instance segmentation and detection", ("mask_AP", "box_AP", "mask_AP50", "mask_AP75", "mask_APs", "mask_APm", "mask_APl"), {
        "Mask2Former, 12 epochs": Row(M50, TWELVE, (38.7, None, 59.8, 41.2, 18.2, 41.5, 59.8)),
        "12 epochs": Row(I12, {}, (41.4, 45.7, 62.9, 44.6, 21.1, 44.2, 61.4), base="Mask2Former, 12 epochs"),
        "24 epochs": Row(I24, {}, (44.2, 48.4, 66.6, 47.9, 23.9, 47.0, 64.0), base="12 epochs"),
        "Mask2Former, 50 epochs": Row(M50, {}, (43.7, 46.2, 66.0, 46.9, 23.4, 47.2, 64.8)),
        "50 epochs, without ME, 100 queries": Row(I50, TOKEN | dict(queries=100), (45.4, 49.8, 67.9, 49.3, 25.2, 48.3, 65.8),
                                                  base="50 epochs, without ME"),
        "50 epochs, without ME": Row(I50, TOKEN, (46.0, 50.5, 68.9, 50.3, 26.0, 49.3, 65.5), base="Mask2Former, 50 epochs"),
        "50 epochs": Row(I50, {}, (46.3, 51.7, 69.0, 50.7, 26.1, 49.3, 66.1), base="50 epochs, without ME"),
        "50 epochs, hid 1024": Row("coco_instance_r50_50ep_hid1024", {}, (46.1, 51.5, *[None] * 5), base="50 epochs"),
        "DINO, 36 epochs": Row(None, {}, (None, 50.9, *[None] * 5), remark="900 queries with contrastive denoising"),
        "Swin-L, without ME": Row("coco_instance_swinl_50ep_token", {}, (52.1, 58.3, 76.5, 57.6, 32.9, 55.4, 72.5)),
        "Swin-L": Row("coco_instance_swinl_50ep", {}, (52.3, 59.0, 76.6, 57.8, 33.1, 55.4, 72.6), base="Swin-L, without ME")}),
    "panoptic": Table("Table 4: panoptic segmentation", ("PQ", "PQ_things", "PQ_stuff", "box_AP", "mask_AP"), {
        "Mask2Former, 12 epochs": Row("mask2former_coco_panoptic_r50_50ep", TWELVE, (46.9, 52.5, 38.4, None, 37.2)),
        "12 epochs": Row(P12, {}, (49.0, 54.8, 40.2, 43.2, 40.4), base="Mask2Former, 12 epochs"),
        "24 epochs": Row(P24, {}, (51.5, 57.3, 42.6, 46.4, 42.8), base="12 epochs"),
        "Mask2Former, 50 epochs": Row("mask2former_coco_panoptic_r50_50ep", {}, (51.9, 57.7, 43.0, None, 41.7)),
        "50 epochs, 100 queries": Row(P50, dict(queries=100), (52.3, 58.3, 43.2, 47.7, 43.7), base="50 epochs"),
        "50 epochs": Row(P50, {}, (53.0, 59.1, 43.9, 48.8, 44.3), base="Mask2Former, 50 epochs"),
        "Swin-L": Row("coco_panoptic_swinl_50ep", {}, (58.3, 65.1, 48.0, 56.2, 50.6))}),
    "semantic": Table("Tables 5 and 6: semantic segmentation, 100 queries, mean of three runs", ("mIoU",), {
        "ADE20K, Mask2Former": Row("mask2former_ade20k_semantic_r50", {}, (46.1,)),
        "ADE20K": Row("ade20k_semantic_r50", {}, (47.7,), base="ADE20K, Mask2Former"),
        "Cityscapes, Mask2Former": Row("mask2former_cityscapes_semantic_r50", {}, (78.7,)),
        "Cityscapes": Row("cityscapes_semantic_r50", {}, (79.8,), base="Cityscapes, Mask2Former")}),
    "pretrained": Table("Table 7: Swin-L, pre-trained for detection on Objects365", ("mask_AP", "PQ", "mIoU"), {
        "COCO instances": Row(None, {}, (54.5, None, None), remark=OBJECTS365.format("coco_instance_swinl_50ep --data=/data/coco")),
        "COCO panoptic": Row(None, {}, (None, 59.4, None), remark=OBJECTS365.format("coco_panoptic_swinl_50ep --data=/data/coco")),
        "ADE20K": Row(None, {}, (None, None, 59.5), remark=OBJECTS365.format("ade20k_semantic_r50 --data=/data/ADEChallengeData2016"))}),
    "selection": Table("Table 8: one model, read out after each decoder layer, 50 epochs, without ME", ("mask_AP",), {
        f"{name}, layer {n}": Row(preset, changes, (paper,), base=f"{name}, layer 9" * (n < 9), layer=n)
        for name, preset, changes, numbers in (("Mask DINO", I50, TOKEN, (39.6, 44.0, 45.9, 46.0)), ("Mask2Former", M50, {}, (1.1, 42.3, 43.3, 43.7)))
        for n, paper in zip((0, 3, 6, 9), numbers, strict=True)}),
    "enhanced": Table("Table 9: mask-enhanced box initialisation (ME), 50 epochs", ("mask_AP", "box_AP"), {
        "without ME, layer 0": Row(I50, TOKEN, (39.6, 25.6), layer=0),
        "with ME, layer 0": Row(I50, {}, (39.8, 41.2), base="without ME, layer 0", layer=0),
        "without ME, layer 9": Row(I50, TOKEN, (46.0, 50.5), layer=9),
        "with ME, layer 9": Row(I50, {}, (46.3, 51.7), base="without ME, layer 9", layer=9)}),
    "scales": Table("Table 10: feature scales given to the decoder, 50 epochs, without ME", ("box_AP", "mask_AP"), {
        "1 scale": Row(I50, SCALED | dict(decoder_levels=1), (45.8, 45.1), base="4 scales"),
        "3 scales": Row(I50, SCALED | dict(decoder_levels=3), (50.5, 45.8), base="4 scales"),
        "4 scales": Row(I50, SCALED, (50.5, 46.0))}),
    "tasks": Table("Table 11: tasks, 50 epochs, without ME", ("box_AP", "mask_AP"), {
        "box only": Row(I50, DETECTION, (50.1, None), base="both"),
        "mask only": Row(I50, TOKEN | dict(box_loss=False), (None, 43.3), base="both"),
        "both": Row(I50, TOKEN, (50.5, 46.0))}),
    "depth": Table("Table 12: decoder layers, 12 epochs, without ME", ("box_AP", "mask_AP"), {
        f"{n} layers": Row(I12, TOKEN | dict(dec_layers=n), paper, base="9 layers" * (n != 9))
        for n, paper in ((3, (43.1, 40.7)), (6, (44.3, 41.1)), (9, (44.5, 41.4)), (12, (44.8, 41.1)))}),
    "matching": Table("Table 13: matching, 12 epochs, without ME", ("box_AP", "mask_AP"), {
        "class + box": Row(I12, TOKEN | dict(matching="box"), (44.4, 40.5), base="class + box + mask"),
        "class + mask": Row(I12, TOKEN | dict(matching="mask"), (40.2, 38.4), base="class + box + mask"),
        "class + box + mask": Row(I12, TOKEN, (44.5, 41.4))}),
    "decoupled": Table("Table 14: decoupled box prediction, panoptic", ("PQ", "PQ_things", "PQ_stuff", "box_AP", "mask_AP"), {
        "12 epochs, without": Row(P12, dict(decoupled_boxes=False), (47.9, 54.0, 38.8, 42.8, 39.6), base="12 epochs, with"),
        "12 epochs, with": Row(P12, {}, (49.0, 54.8, 40.2, 43.2, 40.4)),
        "50 epochs, without": Row(P50, dict(decoupled_boxes=False), (52.7, 58.8, 43.5, 48.7, 44.1), base="50 epochs, with"),
        "50 epochs, with": Row(P50, {}, (53.0, 59.1, 43.9, 48.8, 44.3))}),
    "components": Table("Table 15: components, 12 epochs", ("box_AP", "mask_AP"), {
        "full model": Row(I12, {}, (45.7, 41.4)),
        "without mask-enhanced boxes (ME)": Row(I12, TOKEN, (44.5, 41.4), base="full model"),
        "without unified query selection": Row(I12, dict(content_queries="learned"), (43.6, 40.3), base="full model"),
        "without unified denoising": Row(I12, dict(denoising="box"), (44.4, 40.3), base="full model"),
        "without hybrid matching": Row(I12, dict(matching="box"), (44.9, 40.5), base="full model"),
        "without all four": Row(I12, NO_PARTS, (41.7, 38.5), base="full model")}),
    "models": Table("Mask DINO and its siblings with the same budget, 50 epochs", ("box_AP", "mask_AP", "minutes", "GB"), {
        "Mask DINO": Row(I50, {}, (51.7, 46.3, None, None)),
        "Mask2Former": Row(M50, {}, (46.2, 43.7, None, None), base="Mask DINO"),
        "DFormer": Row(D50, {}, (None, 42.6, None, None), base="Mask DINO")}),
    "m2f_components": Table("Mask2Former's Tables 4a and 4b: what its decoder is made of", ("mask_AP", "PQ", "mIoU"), three_tasks({
        "full model": ({}, (43.7, 51.9, 47.2)),
        "without masked attention": (dict(masked_attention=False), (37.8, 47.1, 45.5)),
        "without high-resolution features": (dict(attention_strides=(32,)), (41.5, 50.2, 46.1)),
        "without learned query features": (UNLEARNED, (42.9, 51.2, 45.4)),
        "self-attention first": (dict(self_attention_first=True), (43.2, 51.6, 46.3)),
        "with dropout": (dict(dropout=0.1), (43.0, 51.3, 47.2)),
        "the last three at once": (UNLEARNED | dict(self_attention_first=True, dropout=0.1), (42.3, 50.8, 46.3))}, base="full model")),
    "m2f_scales": Table("Mask2Former's Table 4d: levels that its decoder sees", ("mask_AP", "PQ", "mIoU"), three_tasks({
        "stride 32": (dict(attention_strides=(32,)), (41.5, 50.2, 46.1)),
        "stride 16": (dict(attention_strides=(16,)), (43.0, 51.5, 46.5)),
        "stride 8": (dict(attention_strides=(8,)), (44.0, 51.8, 47.4)),
        "all three in every layer": (dict(round_robin=False), (44.0, 51.9, 46.3)),
        "one after the other": ({}, (43.7, 51.9, 47.2))}, base="one after the other")),
    "m2f_points": Table("Mask2Former's Table 5: masks compared at points or whole (loss on them: 6 or 18 GB an image in the paper, unchecked)",
                        ("mask_AP", "PQ", "mIoU", "GB"), three_tasks({
        "matching on masks, loss on masks": (dict(matching_on="masks", loss_on="masks"), (41.0, 50.3, 45.9, None)),
        "matching on masks, loss on points": (dict(matching_on="masks"), (41.0, 50.8, 45.9, None)),
        "matching on points, loss on masks": (dict(loss_on="masks"), (43.1, 51.4, 47.3, None)),
        "both on points": ({}, (43.7, 51.9, 47.2, None))}, base="both on points")),
    "dformer": Table("DFormer: noise scale b, sampling steps, encoding (its paper's numbers are not known)", ("mask_AP",), {
        **{f"b = {b}, {steps}": Row(D50, dict(noise_scale=b), (None,), base="" if (b, n) == (0.1, 1) else "b = 0.1, 1 step",
                                    at_test=dict(sampling_steps=n) if n > 1 else {})
           for b in (0.1, 0.5, 1.0) for n, steps in ((1, "1 step"), (4, "4 steps"), (8, "8 steps"))},
        "b = 0.1, shuffled encoding": Row(D50, dict(mask_encoding="shuffled"), (None,), base="b = 0.1, 1 step")}),
}
# --scale=shapes: the same rows on generated data. A short schedule, the same for all rows; the rest is the shapes preset's.
SMALL = dict(iterations=1000, warmup=100, evaluate_every=0)
DATA = {"coco": "/data/coco", "ade20k": "/data/ADEChallengeData2016", "cityscapes": "/data/cityscapes"}


class Run(NamedTuple):
    """What a row trains."""
    preset: str
    overrides: dict

    @property
    def name(self) -> str:
        """Its folder's: the same for everything that means the same. Where many flags by hand make it too long for a file system, it ends in a checksum."""
        plain, seed = maskdino.preset(self.preset), self.overrides.get("seed")
        changes = {k: v for k, v in sorted(self.overrides.items()) if getattr(plain, k) != v and k != "seed"}
        name = "".join([self.preset, *(f"--{k}={_flag(v)}" for k, v in changes.items())])
        short = name if len(name) <= 200 else f"{name[:180]}--{zlib.crc32(name.encode()):08x}"
        return short + (f"--seed={seed}" if seed else "")

    def data(self, where: str | None) -> str | None:
        """Its --data: the folder given, or what is in it under the usual name, since a table may need two data sets."""
        usual = next((folder for kind, folder in DATA.items() if kind in self.preset), None)
        inside = Path(where, Path(usual).name) if where and usual else None
        return str(inside) if inside and inside.is_dir() else where or usual

    def command(self, root: Path, where: str | None = None) -> str:
        """What trains it, or goes on with it. where: --data, if it is known."""
        words = [f"--{k}={_flag(v)}" for k, v in self.overrides.items()] + [f"--out={root / self.name}", "--resume"]
        words += [f"--data={where}"] if (where := self.data(where)) else []
        return " ".join(["python" if "shapes" in self.preset else "torchrun --standalone --nproc_per_node=8", "train.py", self.preset, *words])


def _flag(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def run_of(row: Row, scale: str | None = None, by_hand: dict | None = None) -> Run | None:
    """The run that a row asks for at a scale; None: paper only, or nothing that small. Raises ConfigError for an unknown scale.

    by_hand: overrides of every row, which lose against the row's own.
    """
    by_hand = by_hand or {}
    if scale not in (None, "shapes"):
        raise maskdino.ConfigError(f"--scale={scale}: there is shapes, or leave it out for the paper's size")
    if row.preset is None or scale is None:
        return row.preset and Run(row.preset, by_hand | row.overrides)
    full, changes = maskdino.preset(row.preset), {k: v for k, v in row.overrides.items() if k not in TWELVE}
    if full.backbone != "resnet50" or "hid1024" in row.preset:
        return None
    name = ("" if full.model == "maskdino" else f"{full.model}_") + ("shapes" if full.task == "instance" else f"shapes_{full.task}")
    small = maskdino.preset(name)
    if not set(changes.get("attention_strides", ())) <= set(small.levels):                    # small models have no such level
        return None
    if "queries" in changes:                                                                  # a third is a third
        changes["queries"] = round(changes["queries"] / full.queries * small.queries)
    return Run(name, SMALL | by_hand | changes)


def find_table(name: str) -> Table:
    """The table of this name. Raises ConfigError for an unknown one, naming the nearest."""
    if name not in TABLES:
        raise maskdino.ConfigError(f"there is no table '{name}'{maskdino.nearest(name, TABLES)}; there are {', '.join(TABLES)}")
    return TABLES[name]


class Cell(NamedTuple):
    """A metric's mean over seeds, its standard deviation (None of one seed) and their number."""
    mean: float
    spread: float | None
    seeds: int


def cells_of(row: Row, metrics: tuple[str, ...], root: Path, scale: str | None, by_hand: dict | None = None) -> list[Cell | None]:
    """What was measured for a row, from the results of every seed; None where nothing was."""
    run = run_of(row, scale, by_hand)
    results = [] if run is None else _results(root, run, row)
    cells = []
    for metric in metrics:
        key, unit = COSTS.get(metric, (metric, 1))
        known = [result[key] / unit for result in results if result.get(key) is not None]
        cells.append(Cell(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known)) if known else None)
    return cells


def _results(root: Path, run: Run, row: Row) -> list[dict]:
    """The results of a row, one for each seed of its run."""
    folders = [root / run.name, *(f for f in root.glob(f"{run.name}--seed=*") if f.name.rpartition("=")[2].isdigit() and f.name.count("--seed=") == 1)]
    found = [json.loads(file.read_text()) for f in folders if (file := row.result(f)).exists()]
    if row.layer is None:
        return found
    depth = row.layer * maskdino.preset(run.preset, **run.overrides).dec_layers // 9
    return [sets[f"layer{depth}" if depth else "initial"] for sets in found]


def effect(ours: Cell | None, base: Cell | None) -> tuple[float, float | None] | None:
    """Difference of a row to its base row and its standard error (None with fewer than two seeds on a side)."""
    if ours is None or base is None:
        return None
    known = ours.spread is not None and base.spread is not None
    return ours.mean - base.mean, math.sqrt(ours.spread ** 2 / ours.seeds + base.spread ** 2 / base.seeds) if known else None


def verdict(paper: float, ours: tuple[float, float | None] | None) -> str:
    """Is the paper's sign reproduced? Only a difference of more than twice its standard error has a sign."""
    if ours is None or paper == 0:
        return ""
    difference, error = ours
    if error is None or abs(difference) <= 2 * error:
        return "not resolved"
    return "reproduced" if (difference > 0) == (paper > 0) else "contrary"


def compared(table: Table, root: Path, scale: str | None, by_hand: dict | None = None) -> list[dict]:
    """A table as lines, one for each row and metric: {row, metric, paper, ours (Cell), paper_effect, effect, verdict}, None where there is nothing."""
    cells = {name: dict(zip(table.metrics, cells_of(row, table.metrics, root, scale, by_hand), strict=True)) for name, row in table.rows.items()}
    source = {name: (row.result(Path(run.name if (run := run_of(row, scale, by_hand)) else name)), row.layer) for name, row in table.rows.items()}
    lines = []
    for name, row in table.rows.items():
        for i, metric in enumerate(table.metrics):
            line = {"row": name, "metric": metric, "paper": row.paper[i], "ours": cells[name][metric], "paper_effect": None, "effect": None, "verdict": ""}
            if row.base and source[name] != source[row.base]:                                 # at a small scale two rows may be one run
                line["effect"] = effect(line["ours"], cells[row.base][metric])
                if None not in (row.paper[i], base := table.rows[row.base].paper[i]):
                    line["paper_effect"] = round(row.paper[i] - base, 1)
                    line["verdict"] = verdict(line["paper_effect"], line["effect"])
            if line["paper"] is not None or line["ours"]:
                lines.append(line)
    return lines


def table_text(name: str, root: Path, scale: str | None = None, by_hand: dict | None = None, where: str | None = None) -> str:
    """A table as text: paper, ours (mean and spread over seeds), their difference; the differences to the base row; a command for each missing row."""
    table, missing, names = find_table(name), {}, {}
    grid = [("", "metric", "paper", "ours", "difference", "paper's effect", "ours", "sign")]
    for line in compared(table, root, scale, by_hand):
        ours, (own, error) = line["ours"], line["effect"] or (None, None)
        paper = _number(line["paper"]) + " (unchecked)" * (table.rows[line["row"]].unchecked and line["paper"] is not None)
        grid.append((line["row"], line["metric"], paper, f"{ours.mean:.1f}{_spread(ours.spread)} ({ours.seeds})" if ours else "",
                     _number(ours.mean - line["paper"], "+") if ours and line["paper"] is not None else "", _number(line["paper_effect"], "+"),
                     _number(own, "+") + _spread(error), line["verdict"]))
    for label, row in table.rows.items():
        run = run_of(row, scale, by_hand)
        if run is None:
            missing[label] = "paper only: " + row.remark if row.preset is None else "only at the paper's size"
        elif (first := names.setdefault((row.result(Path(run.name)), row.layer), label)) != label:
            missing[label] = f"at this scale the same run as '{first}'"
        elif not any(cells_of(row, table.metrics, root, scale, by_hand)):
            missing[label] = row.command(run, root, where)
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = ["  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, "<<>>>>><", widths, strict=True)).rstrip() for line in grid]
    return "\n".join([f"{name}: {table.title}" + f", at scale {scale}" * bool(scale), *lines, *(f"  {label}: {what}" for label, what in missing.items())])


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.1f}"


def _spread(value: float | None) -> str:
    return "" if value is None else f" ± {value:.1f}"


def bars(table: Table, lines: list[dict], path: Path) -> None:
    """Draws the effects in a table's lines (see `compared`), the paper's beside ours with twice the standard error, a panel for each metric.

    Nothing to draw, no picture.
    """
    lines = [line for line in lines if line["paper_effect"] is not None]
    metrics = [metric for metric in table.metrics if any(line["metric"] == metric for line in lines)]
    if not any(line["effect"] for line in lines):
        return
    names, zoom, width, step = list(dict.fromkeys(line["row"] for line in lines)), 2, 380, 44
    text = partial(ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength, font=_font(13 * zoom))
    label = max(text(name) for name in names) / zoom + 36
    sheet = Image.new("RGB", (round(zoom * (label + width * len(metrics))), zoom * (96 + step * len(names))), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((24 * zoom, 26 * zoom), table.title, fill="black", font=_font(17 * zoom), anchor="lm")
    for i, name in enumerate(names):
        draw.text(((label - 8) * zoom, (70 + step * (i + 0.5)) * zoom), name, fill="#333333", font=_font(13 * zoom), anchor="rm")
    for i, metric in enumerate(metrics):
        rows = {line["row"]: line for line in lines if line["metric"] == metric}
        _panel(draw, [zoom * v for v in (label + i * width, 70, width - 24, step * len(names))], metric, [rows.get(name) for name in names], zoom)
    sheet.resize((sheet.width // zoom, sheet.height // zoom), Image.Resampling.LANCZOS).save(path)


def _panel(draw: ImageDraw.ImageDraw, area: list, metric: str, lines: list[dict | None], zoom: int) -> None:
    """Two horizontal bars for each line, the paper's above ours. area: (x, y, width, height)."""
    x0, y0, width, height = area
    ends = [0.0]
    for line in filter(None, lines):
        ours, error = line["effect"] or (0.0, None)
        ends += [line["paper_effect"], ours - 2 * (error or 0), ours + 2 * (error or 0)]
    low, high = min(ends) * 1.05 - 0.1, max(ends) * 1.05 + 0.1

    def place(value: float) -> float:
        return x0 + width * (value - low) / (high - low)
    for value in _ticks(low, high, False):
        draw.line((place(value), y0, place(value), y0 + height), fill="#e4e4e4", width=zoom)
        draw.text((place(value), y0 + height + 12 * zoom), f"{value:g}", fill="#333333", font=_font(13 * zoom), anchor="mm")
    for i, (name, ink) in enumerate((("paper", "#999999"), ("ours", INKS[0]))):
        draw.text((x0 + (80 + 60 * i) * zoom, y0 - 16 * zoom), name, fill=ink, font=_font(13 * zoom), anchor="lm")
    draw.text((x0, y0 - 16 * zoom), metric, fill="black", font=_font(13 * zoom), anchor="lm")
    step, half = height / len(lines), 9 * zoom
    for i, line in enumerate(lines):
        middle = y0 + step * (i + 0.5)
        if line:
            paper = place(line["paper_effect"])
            draw.rectangle((min(place(0), paper), middle - half, max(place(0), paper), middle), "#999999")
        if line and line["effect"]:
            ours, error = line["effect"]
            draw.rectangle((min(place(0), place(ours)), middle, max(place(0), place(ours)), middle + half), INKS[0])
            if error is not None:
                draw.line((place(ours - 2 * error), middle + half / 2, place(ours + 2 * error), middle + half / 2), fill="black", width=zoom)
    draw.line((place(0), y0, place(0), y0 + height), fill="#333333", width=zoom)


def show_tables(names: list[str], root: Path, scale: str | None = None, by_hand: dict | None = None, where: str | None = None) -> None:
    """Prints tables (none named: all) from what is in `root`, and draws those of which something has been measured there: NAME.png, NAME_SCALE.png."""
    for name in names or TABLES:
        print(table_text(name, root, scale, by_hand, where), end="\n\n")
        path = root / (f"{name}_{scale}.png" if scale else f"{name}.png")
        bars(TABLES[name], compared(TABLES[name], root, scale, by_hand), path)


# -------------------------------------------------------------------------------------------------------------- processes
@dataclass(frozen=True)
class World:
    """This process among all: torchrun's variables, or one process alone."""
    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all processes."""
        if self.size == 1:
            return values
        t = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(t)
        return t.tolist()


def start_world(device: str | None) -> World:
    """Joins torchrun's processes (nccl on GPUs, gloo on CPUs) if it started us."""
    rank, size, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    chosen = choose_device(device)
    if size > 1:
        if chosen.type == "cuda":
            chosen = torch.device("cuda", local)
            torch.cuda.set_device(chosen)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return World(rank, size, chosen)


@contextlib.contextmanager
def joined(device: str | None) -> Iterator[World]:
    """`start_world` and its end. After an error the group is left as it is, since taking it apart could wait for the others in vain: that this process
    ends is what ends them. Those whose collective then fails give torchrun the time to end them, so that the message that is read is not theirs.
    """
    try:
        yield start_world(device)
    except RuntimeError:
        if dist.is_initialized():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(name: str | None = None) -> torch.device:
    """The device of this name; None: cuda if there is one, else mps, else cpu. Raises ConfigError when it cannot be had."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    had = [kind for kind, available in there.items() if available]
    if name and name.partition(":")[0] not in had:
        raise maskdino.ConfigError(f"--device={name}: this machine has {', '.join(had)}")
    return torch.device(name or had[0])


# ----------------------------------------------------------------------------------------------------------- command line
PATHS = ("val_json", "val_images", "val_panoptic", "val_labels", "classes", "val_instances")
ACTIONS = {"data": str, "out": str, "images": str, "threshold": float, "per_class": bool, "batch_size": int, "device": str, "save_official": str,
           "tta": bool, "layers": bool, "explain": bool, "tables": bool, "scale": str} | dict.fromkeys(PATHS, str)
DEFAULTS = dict.fromkeys(ACTIONS) | {"threshold": 0.3, "per_class": False, "batch_size": 1, "tta": False, "explain": False}
OVERRIDES = ("max_images", "test_short", "test_long", "detections", "workers", "precision", "object_threshold", "overlap_threshold", "temperature",
             "box_init", "queries", "sampling_steps", "sampling_eta", "seed", "skip_bad_images")


def _parse(argv: list[str]) -> tuple[str, dict, dict]:
    """(checkpoint, actions, overrides of its Config). Raises ConfigError."""
    words, actions, overrides = maskdino.parse_overrides(argv, ACTIONS)
    actions = DEFAULTS | actions
    fixed = [key for key in overrides if key not in OVERRIDES]
    if len(words) != 1:
        raise maskdino.ConfigError(f"one checkpoint is needed, not {len(words)}: python evaluate.py CHECKPOINT --data=DIR | --images=PATH --out=DIR")
    if fixed:
        raise maskdino.ConfigError(f"--{fixed[0]} comes from the checkpoint; at evaluation there are --{', --'.join(OVERRIDES)}")
    if not 0 <= actions["threshold"] <= 1:
        raise maskdino.ConfigError(f"--threshold={actions['threshold']:g}: a score is between 0 and 1")
    if actions["scale"]:
        raise maskdino.ConfigError("--scale goes with --tables")
    if actions["layers"] and (actions["tta"] or actions["images"] or actions["save_official"]):
        raise maskdino.ConfigError("--layers scores on the validation split: give --data=DIR alone, without --tta")
    if actions["explain"] and (actions["tta"] or not actions["images"]):
        raise maskdino.ConfigError("--explain goes with --images=PATH --out=DIR, without --tta: it follows one look at a picture")
    wanted = [actions["images"], actions["data"] or actions["val_json"] or actions["val_labels"], actions["save_official"]]
    if sum(map(bool, wanted)) != 1 or actions["images"] and not actions["out"]:
        raise maskdino.ConfigError("give one of --data=DIR (scores on its validation split), --images=PATH --out=DIR (own pictures), --save_official=PATH")
    return words[0], actions, overrides


def _evaluate_data(model, checkpoint: Path, actions: dict, max_images: int, world: World) -> None:
    """Scores on the validation split; the results, result_eval.json and predictions.png go to --out, else beside the checkpoint."""
    config, out = model.config, Path(actions["out"] or checkpoint.parent)
    transform = partial(resize_for_test, short=config.test_short, long=config.test_long)
    given = {key.removeprefix("val_"): actions[key] for key in PATHS if key != "val_instances"}
    dataset = data.open_split(config.task, "val", transform, data_dir=actions["data"], max_images=max_images, skip_bad_images=config.skip_bad_images, **given)
    things = data.CocoDataset(actions["val_instances"], dataset.file_names[0].parent, transform) if actions["val_instances"] else dataset
    if missing := sorted(set(dataset.image_ids) - set(things.image_ids)):
        raise data.DataError(f"--val_instances={actions['val_instances']} has no image {missing[0]}, as {dataset.source} has: they must be of one split")
    if world.first:
        print(dataset.source)
        if missing := _missing(model.classes, dataset):
            print(f"classes are matched by name; {missing}")
    if actions["layers"]:
        layers(model, dataset, out, config.workers, things)
        return
    start = time.perf_counter()
    metrics = evaluate(model, dataset, out, batch_size=actions["batch_size"], workers=config.workers, per_class=actions["per_class"], tta=actions["tta"],
                       things=things)
    if not world.first:
        return
    facts = {"checkpoint": str(checkpoint), "data": dataset.source, "images": len(dataset), "seconds": round(time.perf_counter() - start, 1)}
    (out / "result_eval.json").write_text(json.dumps(facts | metrics, indent=1))
    page(dataset, model, out / "predictions.png", threshold=actions["threshold"])
    print(f"{len(dataset)} images in {facts['seconds']} s; result_eval.json, predictions.png and the results are in {out}")


def _use(checkpoint: str, actions: dict, overrides: dict, world: World) -> None:
    """What a checkpoint is wanted for."""
    model, _ = maskdino.load(checkpoint, world.device, **overrides)
    for flag, task in (("tta", "semantic"), ("val_instances", "panoptic")):
        if actions[flag] and model.config.task != task:
            raise maskdino.ConfigError(f"--{flag} is for {task} models; {checkpoint} is for {model.config.task}: leave it out")
    if actions["save_official"]:
        Path(actions["save_official"]).absolute().parent.mkdir(parents=True, exist_ok=True)
        maskdino.save(actions["save_official"], {"model": maskdino.to_official(model)})
        print(f"{actions['save_official']}: the weights under the released code's names")
    elif actions["images"]:
        predictions = predict_folder(model, actions["images"], actions["out"], actions["threshold"], actions["tta"], actions["explain"])
        print(f"{len(predictions)} predictions; overlays, predictions.json" + ", explain/*.png" * actions["explain"] + f" are in {actions['out']}")
    else:
        _evaluate_data(model, Path(checkpoint), actions, overrides.get("max_images", 0), world)                 # not the training's number


def main(argv: list[str] | None = None) -> None:
    """The command line. What the user can mend ends as one sentence and exit code 1."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv:
        return print(__doc__)
    try:
        words, actions, overrides = maskdino.parse_overrides(argv, ACTIONS)
        if actions.get("tables"):
            return show_tables(words, Path(actions.get("out", "runs")), actions.get("scale"), overrides, actions.get("data"))
        checkpoint, actions, overrides = _parse(argv)
        with joined(actions["device"]) as world:
            _use(checkpoint, actions, overrides, world)
    except (data.DataError, maskdino.ConfigError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
