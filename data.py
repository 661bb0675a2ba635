"""Data: COCO instances and panoptic, ADE20K, Cityscapes, own files laid out as these are; and `shapes`, generated, in the same formats.

    python data.py                                  # makes datasets/shapes if it is not there, counts it, draws a page of augmented samples
    python data.py /data/coco --task=panoptic --split=val --out=page.png

From a file to a batch: open_split finds the files -> a data set reads what describes them once and gives one sample per (index, key):
the transform chooses a View of the image, the truth is drawn in that view alone -> collate pads samples to one size.
BatchSampler says which samples a step takes.

Boxes are (cx, cy, w, h) in 0..1 unless said otherwise. Notation: B batch, N objects, (H0, W0) pixels of a file, (H, W) of one sample, (Hp, Wp) padded.
"""
import argparse
import colorsys
import contextlib
import copy
import json as jsonlib
import math
import os
import pickle
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from pycocotools import mask as mask_api
from torchvision.transforms import v2
from tqdm import tqdm

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")  # of pictures
FLAGS = ("json", "images", "panoptic", "labels")         # what can be given by hand for a split, as --val_json=PATH


class DataError(ValueError):
    """Data that cannot be used: one sentence that names the file, image, annotation or category, and the remedy."""


# ---------------------------------------------------------------------------------------------------------------------
# Files: where a data set lies, and what its json says


def find_coco(data_dir: str | Path | None, split: str, json: str | Path | None = None, images: str | Path | None = None) -> tuple[Path, Path]:
    """(json file, image folder) of a split, "train" or "val", below data_dir; a path given by hand is taken as it is.

    Known are COCO's own tree (annotations/instances_val2017.json, val2017/) and the names that exporters give: see the two lists.
    Raises DataError naming what was looked for.
    """
    jsons = ["annotations/instances_{}.json", "annotations/{}.json", "instances_{}.json", "{}.json",
             "{}/_annotations.coco.json", "{}/annotations.json"]
    return (_first_path(data_dir, json, [name.format(stem) for stem in _stems(split) for name in jsons], Path.is_file, f"{split}_json"),
            _find_images(data_dir, split, images))


def find_panoptic(data_dir: str | Path | None, split: str, json: str | Path | None = None, panoptic: str | Path | None = None,
                  images: str | Path | None = None) -> tuple[Path, Path, Path]:
    """(json file, folder of panoptic PNGs, image folder), as find_coco: of COCO's tree (annotations/panoptic_val2017.json) or Cityscapes'."""
    jsons = [name.format(stem) for stem in _stems(split) for name in ("annotations/panoptic_{}.json", "panoptic_{}.json")]
    json = _first_path(data_dir, json, [*jsons, f"gtFine/cityscapes_panoptic_{split}.json"], Path.is_file, f"{split}_json")
    if panoptic is None and json.with_suffix("").is_dir():  # as both benchmarks are unpacked
        panoptic = json.with_suffix("")
    folders = [f"panoptic_{stem}" for stem in _stems(split)]
    return json, _first_path(data_dir, panoptic, folders, Path.is_dir, f"{split}_panoptic"), _find_images(data_dir, split, images)


def _stems(split: str) -> list[str]:
    names = {"train": ["train"], "val": ["val", "valid", "validation"]}.get(split, [split])
    return [name + year for name in names for year in ("2017", "", "2014")]


def _find_images(data_dir: str | Path | None, split: str, given: str | Path | None) -> Path:
    folders = ["{}/images", "{}", "images/{}", "leftImg8bit/{}", "images"]
    return _first_path(data_dir, given, [name.format(stem) for name in folders for stem in _stems(split)], Path.is_dir, f"{split}_images")


def _first_path(data_dir: str | Path | None, given: str | Path | None, candidates: list[str], exists: Callable[[Path], bool], flag: str) -> Path:
    """The given path, or else the first candidate below data_dir that exists."""
    if given is not None:
        if not exists(Path(given)):
            raise DataError(f"--{flag}={given} does not exist (or is no {'file' if exists is Path.is_file else 'folder'})")
        return Path(given)
    data_dir = Path(data_dir or ".")
    if not data_dir.is_dir():
        raise DataError(f"data folder {data_dir} does not exist; give another with --data=DIR")
    found = [path for name in candidates if exists(path := data_dir / name)]
    if not found:
        raise DataError(f"{data_dir} has none of {', '.join(dict.fromkeys(candidates))}; name it with --{flag}=PATH")
    return found[0]


def read_coco(path: Path, kind: str = "instance") -> dict:
    """The json as a dict that has `images` and `categories`, with unique ids. kind: "instance" or "panoptic". Raises DataError for anything else."""
    try:
        content = jsonlib.loads(path.read_text(encoding="utf-8-sig"))  # -sig: some exporters write a byte-order mark
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # not json, or not text
        raise DataError(f"{path} is no json file: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not in COCO's format: it holds a {type(content).__name__}, not a dict with images, annotations, categories")
    needed = {"images": ("id", "file_name", "height", "width"), "categories": ("id",), "annotations": ("image_id", "category_id")}
    if kind == "panoptic":
        needed |= {"categories": ("id", "isthing"), "annotations": ("image_id", "file_name", "segments_info")}
    for part, keys in needed.items():
        if part not in content and part != "annotations":
            raise DataError(f"{path} is not in COCO's format: the key '{part}' is missing (there are: {', '.join(content)})")
        for number, row in enumerate(content.get(part) or []):
            if missing := [key for key in keys if not isinstance(row, dict) or key not in row]:
                raise DataError(f"{path} is not in COCO's {kind} format: {part}[{number}] has no {' and no '.join(missing)}")
    for part in ("images", "categories"):
        twice = [key for key, count in Counter(row["id"] for row in content[part]).items() if count > 1]
        if twice:
            raise DataError(f"{path}: {len(twice)} id(s) in '{part}' occur more than once, {twice[:5]} first; give each its own id")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Annotations: cleaned before pycocotools sees them, which crashes or guesses on crooked ones


class Annotation(NamedTuple):
    """One cleaned annotation. segmentation: polygons (flat lists of x, y in pixels) or one compressed RLE."""

    label: int
    crowd: bool
    segmentation: list | dict
    bbox: list | None  # the json's own (x, y, w, h) in pixels when usable
    area: float | None  # the json's own when usable


def clean_polygon(polygon: list, height: int, width: int) -> list | None:
    """A polygon that pycocotools can rasterise, or None where it has fewer than three points, an odd length, or a number that is not finite."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return None
    try:
        if not math.isfinite(sum(polygon)):
            return None
    except TypeError:  # not numbers
        return None
    if min(polygon) >= -min(height, width) and max(polygon) <= 2 * min(height, width):
        return polygon
    # Far outside pycocotools runs out of memory or off its arrays; near the image its own clipping is exact and stays untouched.
    points = np.clip(np.array(polygon, dtype=np.float64).reshape(-1, 2), (-width, -height), (2 * width, 2 * height))
    return points.ravel().tolist()


def clean_rle(rle: dict, height: int, width: int, where: str) -> dict:
    """The RLE compressed. `where` names the annotation in the DataError for an RLE of another size or length."""
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        raise DataError(f"{where} has an RLE of size {size}, its image has [{height}, {width}] (height, width): correct the json")
    if isinstance(counts, str):
        return {"size": size, "counts": counts.encode()}
    if not isinstance(counts, list):
        raise DataError(f"{where} has an RLE without counts: correct the json")
    if sum(counts) != height * width or min(counts) < 0:
        raise DataError(f"{where} has an RLE whose counts add up to {sum(counts)}, its image has {height * width} pixels: correct the json")
    return mask_api.frPyObjects({"size": size, "counts": counts}, height, width)


def clean_segmentation(segmentation: list | dict | None, height: int, width: int, where: str) -> tuple[list | dict | None, int]:
    """(segmentation or None where nothing is left, number of polygons dropped)."""
    if isinstance(segmentation, dict):
        return clean_rle(segmentation, height, width, where), 0
    polygons = segmentation or []
    if polygons and not isinstance(polygons[0], list):
        polygons = [polygons]  # one polygon without the list around it
    kept = [polygon for raw in polygons if (polygon := clean_polygon(raw, height, width)) is not None]
    return kept or None, sum(map(bool, polygons)) - len(kept)


def _usable_box(bbox: list | None, height: int, width: int) -> list | None:
    """bbox (x, y, w, h) in pixels if it is four finite numbers with an inside that meets the image, else None."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in bbox):
        return None
    x, y, w, h = bbox
    return bbox if w > 0 and h > 0 and x < width and y < height and x + w > 0 and y + h > 0 else None


def _usable_area(area: float | None) -> float | None:
    return area if isinstance(area, (int, float)) and math.isfinite(area) and area >= 0 else None


def to_rle(segmentation: list | dict, height: int, width: int) -> dict:
    """One compressed RLE of a cleaned segmentation."""
    return segmentation if isinstance(segmentation, dict) else mask_api.merge(mask_api.frPyObjects(segmentation, height, width))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A picture file, to be decoded inside the `with`. Raises DataError for a broken one."""
    try:
        with Image.open(path) as file:
            yield file
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError is how Pillow calls a broken PNG
        raise DataError(f"image file {path} cannot be read ({error}): repair it, or take it out of the data set") from error


def count_values(values: np.ndarray) -> dict[int, int]:
    """{value: how many pixels have it} of a map of integers (H, W), ascending. Counted by runs: far quicker than np.unique, as maps are made of areas."""
    flat = values.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    found, which = np.unique(flat[starts], return_inverse=True)
    return dict(zip(found.tolist(), np.bincount(which, np.diff(starts, append=flat.size)).astype(int).tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Views: the truth is brought into the frame of the crop, whatever it is made of


class View(NamedTuple):
    """What a sample shows of an image: the image resized, a window of that, mirrored or not, in the upper left corner of a canvas. (height, width) each."""

    original: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]  # (top, left) of the window in the resized image
    window: tuple[int, int]
    canvas: tuple[int, int]
    flip: bool = False

    @classmethod
    def whole(cls, original: tuple[int, int], size: tuple[int, int]) -> "View":
        """All of the image, resized."""
        return cls(original, size, (0, 0), size, size)

    def inside(self, canvas: np.ndarray) -> np.ndarray:
        """The window (..., h, w) of a canvas (..., H, W), not mirrored: what is written to it is mirrored in the canvas."""
        window = canvas[..., :self.window[0], :self.window[1]]
        return window[..., ::-1] if self.flip else window

    def cut(self, image: Image.Image) -> Image.Image:
        """The window of the resized image, without resizing the rest."""
        (H, W), (h, w), (top, left), (rows, columns) = self[:4]
        source = (left * W / w, top * H / h, (left + columns) * W / w, (top + rows) * H / h)
        return image.resize((columns, rows), Image.Resampling.BILINEAR, box=source)

    def lay(self, window: Image.Image) -> torch.Tensor:
        """The canvas uint8 (3, H, W) with what `cut` gave; zeros elsewhere."""
        canvas = np.zeros((3, *self.canvas), dtype=np.uint8)
        self.inside(canvas)[:] = np.asarray(window).transpose(2, 0, 1)
        return torch.from_numpy(canvas)

    def nearest(self, values: np.ndarray) -> np.ndarray:
        """The window (h, w) of a map (H0, W0): of every place the pixel whose centre is nearest."""
        rows, columns = ((2 * np.arange(start, start + length) + 1) * old // (2 * new)
                         for old, new, start, length in zip(*self[:4], strict=True))
        return values.take(columns, axis=1).take(rows, axis=0)  # numpy's take copies runs: several times faster than indexing with both

    def map(self, values: np.ndarray, empty: int) -> np.ndarray:
        """A map (H0, W0) on the canvas (H, W); `empty` outside the image."""
        canvas = np.full(self.canvas, empty, values.dtype)
        self.inside(canvas)[:] = self.nearest(values)
        return canvas

    def polygon(self, polygon: list) -> np.ndarray:
        """Corners (P, 2) x, y in pixels of the window."""
        (H, W), (h, w), (top, left) = self[:3]
        return np.array(polygon, dtype=np.float64).reshape(-1, 2) * (w / W, h / H) - (left, top)


def rasterise(segmentations: list[list | dict], view: View) -> torch.Tensor:
    """Masks uint8 (N, H, W) on the view's canvas, 1 inside. Polygons are drawn there, as sharp as it is; RLEs are picked by nearest pixel."""
    masks = np.zeros((len(segmentations), *view.canvas), dtype=np.uint8)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        if isinstance(segmentation, dict):
            view.inside(mask)[:] = view.nearest(mask_api.decode(segmentation))
        else:
            _draw_polygons(view.inside(mask), [view.polygon(polygon) for polygon in segmentation])
    return torch.from_numpy(masks)


def _draw_polygons(window: np.ndarray, polygons: list[np.ndarray]) -> None:
    """Sets the inside of polygons (P, 2) to 1 in a window (h, w). Only the box around them is touched: most objects are small, or out of sight."""
    height, width = window.shape
    points = np.concatenate(polygons)
    left, top = np.clip(np.floor(points.min(0)), 0, (width, height)).astype(int)
    right, bottom = np.clip(np.ceil(points.max(0)) + 1, 0, (width, height)).astype(int)
    if left < right and top < bottom:
        moved = [(polygon - (left, top)).ravel().tolist() for polygon in polygons]
        window[top:bottom, left:right] = mask_api.decode(to_rle(moved, int(bottom - top), int(right - left)))


# ---------------------------------------------------------------------------------------------------------------------
# The data sets


class ImageDataset(torch.utils.data.Dataset):
    """Images and what is known of them: all that data sets have in common.

    A sample is a function of (index, key) alone, whatever process or worker makes it. A kind of data set sets the attributes below and defines
    `read(index)`, the truth of an image as its files say it, and `draw(truth, view)`, that truth in a sample's frame: labels, masks uint8 (N, H, W) on the
    view's canvas, and bool (H, W), what takes no part in mask losses, or None.

    transform: callable(RGB PIL.Image, truth) -> (image uint8 (3, H, W), View), or None for the View when it resizes the whole image and no more.
        It may look at the truth, which is what `read` returns, or None. It has to be picklable (a function or a partial, no lambda).
    """

    source: str  # where it was found, for printing
    class_names: list[str]
    category_ids: list[int]  # of each class: what the benchmark's files and servers call it
    is_thing: list[bool]
    image_ids: list  # int, or str where the benchmark has names
    file_names: list[Path]
    sizes: np.ndarray  # (images, 2) height, width
    has_truth: bool = True
    counted: str = "objects"  # what `contents` lists
    sized_by = "the json"
    images_only = False

    def contents(self, index: int) -> list[tuple[int, bool]]:
        """(label, crowd) of each object, segment or class in an image."""
        return [(fact.label, fact.crowd) for fact in self._facts(index) if fact.label >= 0]

    def truth(self) -> dict | None:
        """Objects as ground truth for pycocotools: {"info", "images", "annotations", "categories"}; None where there are none.

        Annotation ids count from 1 (pycocotools never matches id 0), masks are RLE, crowds are kept; bbox (x, y, w, h) and area in pixels.
        """
        return None

    def __len__(self) -> int:
        return len(self.image_ids)

    def without_objects(self) -> "ImageDataset":
        """The same images with empty targets: evaluation scores against `truth()`, and masks that nobody looks at need not be drawn."""
        other = copy.copy(self)
        other.images_only = True
        return other

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[torch.Tensor, dict]:
        """item: index, or (index, key); key seeds this sample's augmentation, index alone means key 0.

        Returns image uint8 (3, H, W) RGB and target = {"labels": int64 (N,), "boxes": float32 (N, 4) cxcywh in 0..1 of (H, W),
        "masks": uint8 (N, H, W), none of them empty, "ignore": bool (H, W), what takes no part in mask losses, or None, "image_id", "size": (H, W)
        without padding by the transform, "original_size": (H, W) of the file, "key": int}.
        Raises DataError for a broken file, or one that contradicts what describes it.
        """
        index, key = item if isinstance(item, tuple) else (item, 0)
        image, truth = self._open(index), None if self.images_only else self.read(index)
        original = (image.height, image.width)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key)  # not torch.manual_seed, which would seed the GPUs, too
            image, view = self.transform(image, truth)
        view = view or View.whole(original, tuple(image.shape[-2:]))
        labels, masks, ignore = ([], torch.zeros((0, *view.canvas), dtype=torch.uint8), None) if truth is None else self.draw(truth, view)
        labels, (boxes, seen) = torch.tensor(labels, dtype=torch.int64), boxes_of_masks(masks)
        if not seen.all():
            labels, boxes, masks = labels[seen], boxes[seen], masks[seen]
        return image, {"labels": labels, "boxes": boxes, "masks": masks, "ignore": ignore, "image_id": self.image_ids[index], "size": view.window,
                       "original_size": original, "key": key}

    def _open(self, index: int) -> Image.Image:
        """The image file as RGB."""
        path, (height, width) = self.file_names[index], self._size(index)
        with opened(path) as file:
            image = file.convert("RGB")
        if image.size != (width, height):
            raise DataError(f"image file {path} is {image.width} x {image.height} pixels (width x height), "
                            f"{self.sized_by} says {width} x {height}: correct one of them")
        return image

    def _size(self, index: int) -> tuple[int, int]:
        return tuple(self.sizes[index].tolist())

    def _set_classes(self, categories: list[dict]) -> dict[int, int]:
        """Labels are indices into the categories in the order of their ids. Returns {category id: label}."""
        categories = sorted(categories, key=lambda category: category["id"])
        self.category_ids = [category["id"] for category in categories]
        self.class_names = [str(category.get("name", category["id"])) for category in categories]
        self.is_thing = [bool(category.get("isthing", True)) for category in categories]
        return {category_id: label for label, category_id in enumerate(self.category_ids)}

    def _set_images(self, rows: list[dict], facts: dict[int, list], json: str | Path, keep_empty: bool, max_images: int) -> list[dict]:
        """Takes over a json's images and what is known of each image id (a list of Annotation or Segment). Returns the rows that are kept.

        The facts are kept pickled in one array: forked workers share it, as no reference count in it ever changes.
        """
        kept = [row for row in rows if keep_empty or any(fact.label >= 0 and not fact.crowd for fact in facts[row["id"]])][:max_images or None]
        if not kept:
            raise DataError(f"{json} lists no images" + (" with objects (keep_empty=True keeps those without)" if rows else ""))
        self.image_ids, self.sizes = [row["id"] for row in kept], np.array([(row["height"], row["width"]) for row in kept])
        pickles = [pickle.dumps(facts[row["id"]]) for row in kept]
        self._ends = np.cumsum([len(data) for data in pickles])
        self._pickles = np.frombuffer(b"".join(pickles), dtype=np.uint8)
        return kept

    def _facts(self, index: int) -> list:
        return pickle.loads(self._pickles[self._ends[index - 1] if index else 0:self._ends[index]].tobytes())

    def _as_coco(self, annotations: list[dict], labels: Iterable[int]) -> dict:
        """What pycocotools reads: annotations, numbered here, of these classes."""
        images = [{"id": image_id, "file_name": path.name, "height": height, "width": width}
                  for image_id, path, (height, width) in zip(self.image_ids, self.file_names, self.sizes.tolist(), strict=True)]
        return {"info": {}, "images": images, "annotations": [{"id": number} | row for number, row in enumerate(annotations, start=1)],
                "categories": [{"id": self.category_ids[label], "name": self.class_names[label]} for label in labels]}


def _check_files(paths: list[Path], folder: str | Path, of: str | Path, what: str = "image") -> None:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        names = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
        raise DataError(f"{len(missing)} of the {len(paths)} {what}s of {of} are not in the {what} folder {folder}: {names}; "
                        f"give the folder that the names in {of} are relative to")


class CocoDataset(ImageDataset):
    """Images with their objects from a json in COCO's format, as in DETR's CocoDetection, except that the json is read by itself and cleaned
    (what is left out is printed in one line), not by pycocotools.

    json, images: the file and the folder its file names are relative to. transform: see ImageDataset; the truth it is given is a list of Annotation.
    keep_empty: keep images without objects. max_images: the first so many only; 0 is all.
    boxes_only: an annotation without a mask but with a box is kept, its mask the filled box (for detection); otherwise it is left out.
    Raises DataError for whatever of the json or the image files is unusable and can be known now.
    """

    def __init__(self, json: str | Path, images: str | Path, transform: Callable, *, keep_empty: bool = True, max_images: int = 0,
                 boxes_only: bool = False):
        content = read_coco(Path(json))
        self.source, self.transform, self.boxes_only = f"{json}, images in {images}", transform, boxes_only
        labels = self._set_classes([category | {"isthing": True} for category in content["categories"]])
        self.has_truth = bool(content.get("annotations"))
        kept = self._set_images(content["images"], self._clean(content, labels, json), json, keep_empty, max_images)
        self.file_names = [Path(images) / row["file_name"] for row in kept]
        _check_files(self.file_names, images, json)

    def _clean(self, content: dict, labels: dict[int, int], json: str | Path) -> dict[int, list[Annotation]]:
        """The usable annotations of each image id."""
        sizes = {row["id"]: (row["height"], row["width"]) for row in content["images"]}
        rows = content.get("annotations") or []
        if unknown := sorted({row["category_id"] for row in rows} - labels.keys(), key=str):
            raise DataError(f"{json}: annotations use the category ids {unknown[:20]}, which 'categories' does not list: add them there")
        cleaned, dropped = {image_id: [] for image_id in sizes}, Counter()
        for row in rows:
            if row["image_id"] not in sizes:
                dropped["annotation(s) of unknown images"] += 1
                continue
            height, width = sizes[row["image_id"]]
            segmentation, lost = clean_segmentation(row.get("segmentation"), height, width, f"{json}: annotation {row.get('id')}")
            dropped["malformed polygon(s)"] += lost
            bbox = _usable_box(row.get("bbox"), height, width)
            if segmentation is None and self.boxes_only and bbox:
                x, y, w, h = bbox
                segmentation = [clean_polygon([x, y, x + w, y, x + w, y + h, x, y + h], height, width)]
            if segmentation is None:
                dropped["annotation(s) without a mask"] += 1
                continue
            cleaned[row["image_id"]].append(Annotation(
                labels[row["category_id"]], bool(row.get("iscrowd", 0)), segmentation,
                bbox, _usable_area(row.get("area"))))
        if +dropped and os.environ.get("RANK", "0") == "0":
            print(f"{json}: left out " + ", ".join(f"{count} {what}" for what, count in (+dropped).items()))
        return cleaned

    def read(self, index: int) -> list[Annotation]:
        """The cleaned annotations of an image, crowds included."""
        return self._facts(index)

    def draw(self, truth: list[Annotation], view: View) -> tuple[list[int], torch.Tensor, None]:
        objects = [a for a in truth if not a.crowd]
        return [a.label for a in objects], rasterise([a.segmentation for a in objects], view), None

    def truth(self) -> dict | None:
        """See ImageDataset. bbox and area are the json's own where usable and the mask's otherwise; a mask that covers no pixel is left out."""
        if not self.has_truth:
            return None
        annotations = []
        for index, (height, width) in enumerate(self.sizes.tolist()):
            for a in self.read(index):
                rle = to_rle(a.segmentation, height, width)
                if pixels := int(mask_api.area(rle)):
                    annotations.append({"image_id": self.image_ids[index], "category_id": self.category_ids[a.label], "iscrowd": int(a.crowd),
                                        "segmentation": rle, "bbox": a.bbox or mask_api.toBbox(rle).tolist(),
                                        "area": pixels if a.area is None else a.area})
        return self._as_coco(annotations, range(len(self.class_names)))


class Segment(NamedTuple):
    """What a panoptic json says of a segment. label: -1 for a class that the data set leaves out."""

    id: int
    label: int
    crowd: bool


class PanopticDataset(ImageDataset):
    """Images with their segments, things and stuff, in COCO's panoptic format: a json, and PNGs whose pixels are ids, R + 256 G + 256^2 B.

    json, panoptic, images: the file, the folder of its PNGs and that of the images. transform: see ImageDataset; the truth is what `segments` returns.
    things: only things are classes and objects. keep_empty, max_images: as in CocoDataset.
    Raises DataError for what is unusable and can be known now; the PNGs are checked against the json when they are read.
    """

    counted = "segments"

    def __init__(self, json: str | Path, panoptic: str | Path, images: str | Path, transform: Callable, *, things: bool = False,
                 keep_empty: bool = True, max_images: int = 0):
        content = read_coco(Path(json), "panoptic")
        self.source, self.transform = f"{json}, segments in {panoptic}, images in {images}", transform
        labels = self._set_classes([category for category in content["categories"] if category["isthing"] or not things])
        labels = {category["id"]: labels.get(category["id"], -1) for category in content["categories"]}
        rows = {row["image_id"]: row for row in content.get("annotations") or []}
        self.has_truth = bool(rows)
        if self.has_truth and (bare := [row["id"] for row in content["images"] if row["id"] not in rows]):
            raise DataError(f"{json}: {len(bare)} image(s) have no entry in 'annotations', {bare[:5]} first: add them, or take the images out")
        facts = {row["id"]: _segments_of(rows[row["id"]], labels, json) if rows else [] for row in content["images"]}
        kept = self._set_images(content["images"], facts, json, keep_empty, max_images)
        self.file_names = [_cityscapes_name(Path(images), row["file_name"]) for row in kept]
        self.png_names = [Path(panoptic) / rows[row["id"]]["file_name"] for row in kept] if rows else []
        _check_files(self.file_names, images, json)
        _check_files(self.png_names, panoptic, json, "panoptic PNG")

    def segments(self, index: int) -> tuple[np.ndarray, list[dict]]:
        """The map of segment ids int32 (H0, W0), 0 = void, and [{"id", "category_id", "iscrowd", "area"}], area counted in pixels.

        Raises DataError, naming file and ids, where PNG and json contradict each other.
        """
        if not self.has_truth:
            return np.zeros(self._size(index), np.int32), []
        path, facts, where = self.png_names[index], self._facts(index), f"image {self.image_ids[index]}"
        with opened(path) as file:
            mode, pixels = file.mode, np.asarray(file)
        if mode != "RGB":
            kind = {"P": "a palette image", "L": "a grey image"}.get(mode, f"of mode {mode}")
            raise DataError(f"panoptic PNG {path} of {where} is {kind}, but ids are told by colours (id = R + 256 G + 256^2 B): write it as RGB")
        if pixels.shape[:2] != self._size(index):
            (height, width), (H, W) = pixels.shape[:2], self._size(index)
            raise DataError(f"panoptic PNG {path} is {width} x {height} pixels (width x height), the json says {W} x {H} for {where}: correct one of them")
        ids = pixels[..., 0] + 256 * pixels[..., 1].astype(np.int32) + 256 ** 2 * pixels[..., 2].astype(np.int32)
        areas, told = count_values(ids), {fact.id for fact in facts}
        if unknown := sorted(areas.keys() - told - {0}):
            raise DataError(f"panoptic PNG {path} has the segment ids {unknown[:5]}, which the json does not list for {where}: add them, or make them 0 (void)")
        if absent := sorted(told - areas.keys()):
            raise DataError(f"panoptic PNG {path} has no pixel of the segment ids {absent[:5]}, which the json lists for {where}: take them out of the json")
        if left_out := [fact.id for fact in facts if fact.label < 0]:
            ids[np.isin(ids, left_out)] = 0
        return ids, [{"id": fact.id, "category_id": self.category_ids[fact.label], "iscrowd": int(fact.crowd), "area": areas[fact.id]}
                     for fact in facts if fact.label >= 0]

    def label_map(self, index: int) -> np.ndarray:
        """The class of every pixel, int32 (H0, W0): an index into class_names, -1 for void. Crowds are of their class."""
        ids, segments = self.segments(index)
        labels = np.full_like(ids, -1)
        for segment in segments:
            labels[ids == segment["id"]] = self.category_ids.index(segment["category_id"])
        return labels

    read = segments

    def draw(self, truth: tuple[np.ndarray, list[dict]], view: View) -> tuple[list[int], torch.Tensor, None]:
        ids, segments = view.map(truth[0], 0), [segment for segment in truth[1] if not segment["iscrowd"]]
        return [self.category_ids.index(segment["category_id"]) for segment in segments], _masks_of(ids, [segment["id"] for segment in segments]), None

    def truth(self) -> dict | None:
        """See ImageDataset: the segments of things."""
        if not self.has_truth:
            return None
        annotations, things = [], [label for label, thing in enumerate(self.is_thing) if thing]
        categories = {self.category_ids[label] for label in things}
        for index, image_id in enumerate(self.image_ids):
            ids, segments = self.segments(index)
            segments = [segment for segment in segments if segment["category_id"] in categories]
            masks = _masks_of(np.ascontiguousarray(ids.T), [segment["id"] for segment in segments]).numpy()  # (N, W0, H0): pycocotools wants columns
            for segment, rle in zip(segments, mask_api.encode(masks.transpose(2, 1, 0)), strict=True):
                annotations.append({"image_id": image_id, "category_id": segment["category_id"], "iscrowd": segment["iscrowd"],
                                    "segmentation": rle, "bbox": mask_api.toBbox(rle).tolist(), "area": segment["area"]})
        return self._as_coco(annotations, things)


def _segments_of(row: dict, labels: dict[int, int], json: str | Path) -> list[Segment]:
    """An image's segments_info, checked."""
    where = f"{json}: image {row['image_id']}"
    for number, segment in enumerate(row["segments_info"]):
        if missing := [key for key in ("id", "category_id") if not isinstance(segment, dict) or key not in segment]:
            raise DataError(f"{where}: segments_info[{number}] has no {' and no '.join(missing)}")
        if segment["category_id"] not in labels:
            raise DataError(f"{where}: segment {segment['id']} has the category id {segment['category_id']}, which 'categories' does not list: add it there")
    if twice := [key for key, count in Counter(segment["id"] for segment in row["segments_info"]).items() if count > 1 or key == 0]:
        raise DataError(f"{where} lists the segment ids {twice[:5]} twice, or 0, which is void: give each segment its own id from 1")
    return [Segment(segment["id"], labels[segment["category_id"]], bool(segment.get("iscrowd", 0))) for segment in row["segments_info"]]


def _cityscapes_name(images: Path, name: str) -> Path:
    """The image that a json's file_name means. Cityscapes' panoptic json says x_1_2_gtFine_leftImg8bit.png for x/x_1_2_leftImg8bit.png."""
    stem, found, _ = name.partition("_gtFine_leftImg8bit")
    return images / stem.split("_")[0] / f"{stem}_leftImg8bit.png" if found else images / name


def _masks_of(values: np.ndarray, wanted: list[int]) -> torch.Tensor:
    """Masks uint8 (N, ...) of a map: where it has each of N values."""
    return torch.from_numpy((values == np.array(wanted, values.dtype).reshape(-1, 1, 1)).view(np.uint8))


class Coding(NamedTuple):
    """How label PNGs tell classes, and how their names follow from the images'."""

    class_names: list[str]
    values: list[int]  # of each class in the PNGs
    ignored: list[int]  # values that are no class
    category_ids: list[int]
    image_end: str = ""  # how an image's name ends, before its suffix
    label_end: str = ".png"


class SemanticDataset(ImageDataset):
    """Images with the class of every pixel, in label PNGs of one channel (or a palette: its indices are the classes). Image ids are file names without ending.

    images, labels: folders, or trees that are alike, with an image and a PNG of the same name. transform: see ImageDataset; the truth it is given is
    what `label_map` returns. Raises DataError for files without a partner; the PNGs are checked when they are read.
    """

    counted, sized_by = "regions", "its label PNG"

    def __init__(self, images: str | Path, labels: str | Path, coding: Coding, transform: Callable, *, max_images: int = 0):
        images, labels = Path(images), Path(labels)
        self.source, self.transform, self.coding = f"{images}, labels in {labels}", transform, coding
        self.class_names, self.category_ids, self.is_thing = coding.class_names, coding.category_ids, [False] * len(coding.class_names)
        found = (path for path in images.rglob("*") if path.stem.endswith(coding.image_end) and path.suffix.lower() in SUFFIXES)
        self.file_names = sorted(found)[:max_images or None]
        if not self.file_names:
            raise DataError(f"{images} has no images (*{coding.image_end} with one of {' '.join(SUFFIXES)})")
        self.image_ids = [path.stem.removesuffix(coding.image_end) for path in self.file_names]
        if twice := [name for name, count in Counter(self.image_ids).items() if count > 1]:
            raise DataError(f"{images} has more than one image named {', '.join(twice[:5])}: names have to differ without folders and suffixes, too")
        self.label_names = [labels / path.relative_to(images).parent / f"{image_id}{coding.label_end}"
                            for path, image_id in zip(self.file_names, self.image_ids, strict=True)]
        _check_files(self.label_names, labels, images, "label PNG")
        self._table = np.full(257, -2, np.int32)  # value -> label; -1 no class, -2 an error, as is all beyond 255
        self._table[coding.ignored], self._table[coding.values] = -1, range(len(coding.values))

    @cached_property
    def sizes(self) -> np.ndarray:
        """(images, 2) height, width: read off all files, when somebody asks."""
        return np.array([self._size(index) for index in range(len(self))])

    def _size(self, index: int) -> tuple[int, int]:
        with opened(self.label_names[index]) as file:
            return file.height, file.width

    def label_map(self, index: int) -> np.ndarray:
        """The class of every pixel, int32 (H0, W0): an index into class_names, -1 where there is none. Raises DataError naming file and values."""
        path = self.label_names[index]
        with opened(path) as file:
            mode, values = file.mode, np.asarray(file)
        if mode not in ("L", "P", "1", "I", "I;16"):
            raise DataError(f"label PNG {path} holds colours (mode {mode}), not one number a pixel: write the class's number into one channel of 8 bits")
        labels = self._table.take(values, mode="clip")
        if labels.min() < -1:
            known = {*self.coding.values, *self.coding.ignored}
            wrong = sorted(count_values(values).keys() - known)
            raise DataError(f"label PNG {path} has the values {wrong[:5]}; the {len(self.class_names)} classes are {min(self.coding.values)} to "
                            f"{max(self.coding.values)}, no class is {', '.join(map(str, self.coding.ignored[:5]))}: correct the PNG, or the list of classes")
        return labels

    read = label_map

    def draw(self, truth: np.ndarray, view: View) -> tuple[list[int], torch.Tensor, torch.Tensor | None]:
        labels = view.map(truth, -1)
        present, ignore = [label for label in count_values(labels) if label >= 0], labels < 0
        return present, _masks_of(labels, present), torch.from_numpy(ignore) if ignore.any() else None

    def contents(self, index: int) -> list[tuple[int, bool]]:
        return [(label, False) for label in count_values(self.label_map(index)) if label >= 0]


def open_split(task: str, split: str, transform: Callable, *, data_dir: str | Path | None = None, json: str | Path | None = None,
               images: str | Path | None = None, panoptic: str | Path | None = None, labels: str | Path | None = None,
               classes: str | Path | None = None, keep_empty: bool = True, max_images: int = 0) -> ImageDataset:
    """The data of a split, "train" or "val", for a task, "detection", "instance", "panoptic" or "semantic".

    What lies below data_dir says what is opened: detection, instance and panoptic COCO's tree or Cityscapes'; semantic Cityscapes, ADE20K or own folders
    (images/val, labels/val, classes.txt). Paths given by hand win: json, images, panoptic (folder of PNGs), labels (folder of label PNGs), classes (file with a
    name a line). keep_empty: keep images without objects. max_images: the first so many only; 0 is all. Raises DataError.
    """
    if task == "semantic":
        return SemanticDataset(*find_semantic(data_dir, split, images, labels, classes), transform, max_images=max_images)
    options = {"keep_empty": keep_empty, "max_images": max_images}
    if task == "panoptic" or panoptic or json is None and Path(data_dir or ".", "gtFine").is_dir():
        return PanopticDataset(*find_panoptic(data_dir, split, json, panoptic, images), transform, things=task != "panoptic", **options)
    return CocoDataset(*find_coco(data_dir, split, json, images), transform, boxes_only=task == "detection", **options)


def find_semantic(data_dir: str | Path | None, split: str, images: str | Path | None = None, labels: str | Path | None = None,
                  classes: str | Path | None = None) -> tuple[Path, Path, Coding]:
    """(image folder, folder of label PNGs, how they tell classes) of a split, "train" or "val"; see open_split."""
    root, own = Path(data_dir or "."), images or labels or classes
    if not own and (root / "gtFine").is_dir():
        names, ids = _known_classes("cityscapes")
        coding = Coding(names, list(range(len(names))), [255], ids, "_leftImg8bit", "_gtFine_labelTrainIds.png")
        if next(root.glob(f"gtFine/{split}/*/*{coding.label_end}"), None) is None:  # not converted: raw ids 0 .. 33, most of them no class
            coding = coding._replace(values=ids, ignored=[value for value in range(34) if value not in ids], label_end="_gtFine_labelIds.png")
        return root / "leftImg8bit" / split, root / "gtFine" / split, coding
    if not own and any((root / "images" / part).is_dir() for part in ("training", "validation")):
        names, ids = _known_classes("ade20k")
        part = {"train": "training", "val": "validation"}[split]
        return root / "images" / part, root / "annotations" / part, Coding(names, ids, [0], ids)
    label_folder = _first_path(data_dir, labels, [f"labels/{stem}" for stem in _stems(split)], Path.is_dir, f"{split}_labels")
    file = _first_path(data_dir, classes, ["classes.txt", "names.txt"], Path.is_file, "classes")
    names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not 0 < len(set(names)) == len(names) <= 255:
        raise DataError(f"{file} has {len(names)} classes, {len(set(names))} of them different: 1 to 255 names are needed, one a line, each once")
    numbers = list(range(len(names)))
    return _find_images(data_dir, split, images), label_folder, Coding(names, numbers, [255], numbers)


def _known_classes(benchmark: str) -> tuple[list[str], list[int]]:
    row = jsonlib.loads((Path(__file__).parent / "assets/classes.json").read_text())[benchmark]
    return row["names"], row["category_ids"]


def boxes_of_masks(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks uint8 (N, H, W) -> boxes float32 (N, 4), cxcywh in 0..1 of (H, W), the far side one past the last pixel,
    and bool (N,): whether the mask has any pixel."""
    N, H, W = masks.shape
    if not N:
        return torch.zeros((0, 4)), torch.zeros(0, dtype=torch.bool)
    columns, rows = masks.amax(1), masks.amax(2)  # (N, W), (N, H)
    left, top = columns.argmax(1), rows.argmax(1)
    right, bottom = W - columns.flip(1).argmax(1), H - rows.flip(1).argmax(1)
    boxes = torch.stack([(left + right) / (2 * W), (top + bottom) / (2 * H), (right - left) / W, (bottom - top) / H], dim=1)
    return boxes, columns.amax(1).bool()


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation and batches


def large_scale_jitter(size: int, scale_range: tuple[float, float], flip: float = 0.5) -> Callable:
    """The training transform: flip with this probability, scale U(scale_range) of what fits (size, size), random crop to it, zeros right and below.

    As detectron2's ResizeScale and FixedSizeCrop, except that only the crop is resized, with the same result, and that "size" says which part of the
    (size, size) square is image, so that the model can tell the padding.
    """
    return partial(_jitter, size=size, scale_range=tuple(scale_range), flip=flip)


def _jitter(image: Image.Image, truth: Any, size: int, scale_range: tuple[float, float], flip: float) -> tuple[torch.Tensor, View]:
    draw_flip, draw_scale, *place = torch.rand(4).tolist()
    scale = _between(scale_range, draw_scale) * size / max(image.size)
    view = _window(image, scale, (size, size), place, draw_flip < flip)
    return view.lay(view.cut(image)), view


def semantic_jitter(size: int | tuple[int, int], scale_range: tuple[float, float], flip: float = 0.5, single_category: float = 1.0,
                    colour: bool = True) -> Callable:
    """The training transform for semantic segmentation: the shorter edge scaled to U(scale_range) of size (the longer at most 4 times size), random crop
    to (size, size), colours jittered, flip with this probability, zeros right and below, which are ignored.

    size: or the crop's (height, width), of which the larger counts for the scale; Cityscapes is trained on 512 x 1024. single_category: up to ten crops are
    tried until no class has more than this share of what is labelled; 1 = off.
    As MaskFormer's, except that the scale is continuous, and that "size" tells the padding.
    """
    crop = (size, size) if isinstance(size, int) else tuple(size)
    return partial(_semantic_jitter, crop=crop, scale_range=tuple(scale_range), flip=flip, single_category=single_category, colour=colour)


def _semantic_jitter(image: Image.Image, truth: np.ndarray | None, crop: tuple[int, int], scale_range: tuple[float, float], flip: float,
                     single_category: float, colour: bool) -> tuple[torch.Tensor, View]:
    draw_flip, draw_scale, *place = torch.rand(4).tolist()
    scale = min(_between(scale_range, draw_scale) * max(crop) / min(image.size), 4 * max(crop) / max(image.size))
    view = _window(image, scale, crop, place, draw_flip < flip)
    for _ in range(9 if single_category < 1 and truth is not None else 0):
        counts = [count for label, count in count_values(view.nearest(truth)).items() if label >= 0]
        if len(counts) > 1 and max(counts) < single_category * sum(counts):
            break
        view = _window(image, scale, crop, torch.rand(2).tolist(), view.flip)
    window = view.cut(image)
    return view.lay(COLOURS(window) if colour else window), view


# Each half of the time: SSD's distortion of colours, with factors throughout
COLOURS = v2.Compose([v2.RandomApply([v2.ColorJitter(**{kind: strength})])
                      for kind, strength in (("brightness", 0.25), ("contrast", 0.5), ("saturation", 0.5), ("hue", 0.1))])


def _between(bounds: tuple[float, float], draw: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * draw


def _window(image: Image.Image, scale: float, canvas: tuple[int, int], place: Sequence[float], flip: bool) -> View:
    """The image scaled, and as much of it as the canvas holds; place: in 0..1 of the (vertical, horizontal) room that the window has."""
    original = (image.height, image.width)
    resized = tuple(max(1, round(length * scale)) for length in original)
    window = tuple(map(min, resized, canvas))
    corner = tuple(round(share * (length - part)) for share, length, part in zip(place, resized, window, strict=True))
    return View(original, resized, corner, window, canvas, flip)


def collate(batch: list[tuple[torch.Tensor, dict]]) -> tuple[torch.Tensor, list[dict]]:
    """Samples -> (images uint8 (B, 3, Hp, Wp), targets): zeros right and below up to one size, a multiple of 32.

    In the targets masks are (N, Hp, Wp), boxes 0..1 of (Hp, Wp), and padding is ignored where anything is; "size" still says (H, W).
    """
    Hp, Wp = (-(-max(image.shape[axis] for image, _ in batch) // 32) * 32 for axis in (1, 2))
    images = torch.zeros((len(batch), 3, Hp, Wp), dtype=torch.uint8)
    targets = []
    for padded, (image, target) in zip(images, batch, strict=True):
        _, H, W = image.shape
        padded[:, :H, :W] = image
        if (H, W) != (Hp, Wp):
            padding = (0, Wp - W, 0, Hp - H)
            target = target | {"masks": F.pad(target["masks"], padding), "boxes": target["boxes"] * torch.tensor([W / Wp, H / Hp, W / Wp, H / Hp]),
                               "ignore": None if target["ignore"] is None else F.pad(target["ignore"], padding, value=True)}
        targets.append(target)
    return images, targets


class BatchSampler:
    """Which samples each step takes: a function of the step alone, so that a run resumes exactly, on any number of processes.

    Position p = step * total_batch + i of the endless stream is image permutation(seed, epoch)[p % length] of epoch p // length, with a key drawn
    from (seed, p). Yields for the steps start_step .. steps - 1 `accumulate` micro-batches each, lists of total_batch / (world * accumulate)
    pairs (index, key), this rank's part. All ranks' micro-batches of a step together are the same samples whatever world and accumulate are.
    """

    def __init__(self, length: int, *, total_batch: int, world: int = 1, rank: int = 0, accumulate: int = 1, seed: int = 0,
                 start_step: int = 0, steps: int):
        if total_batch % (world * accumulate):
            raise DataError(f"total_batch={total_batch} cannot be divided among {world} process(es) x accumulate={accumulate}")
        self.length, self.total_batch, self.world, self.rank, self.accumulate = length, total_batch, world, rank, accumulate
        self.seed, self.start_step, self.steps = seed, start_step, steps

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        micro = self.total_batch // (self.world * self.accumulate)
        epoch, order = -1, None
        for step in range(self.start_step, self.steps):
            for part in range(self.accumulate):
                first = step * self.total_batch + (part * self.world + self.rank) * micro
                batch = []
                for position in range(first, first + micro):
                    if position // self.length != epoch:
                        epoch = position // self.length
                        order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
                    key = np.random.SeedSequence([self.seed, position]).generate_state(1)[0]
                    batch.append((int(order[position % self.length]), int(key)))
                yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Shapes: circles, squares, triangles and stars on textured ground. Published: what is drawn for (seed, split, number) never changes

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


def _coverage(fine: np.ndarray) -> np.ndarray:
    """Bool (512, 512) -> the share (128, 128) of every pixel, exact sixteenths."""
    return np.asarray(Image.fromarray(fine.astype(np.uint8) * 240).reduce(FINE)) / 240


def _paint(rng: np.random.Generator, canvas: np.ndarray, whole: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    """The canvas with a shape in one colour, clearly another than what it covers, gently shaded and half of the time faintly striped."""
    alpha = _coverage(whole)
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


def _annotation(item: Item) -> dict | None:
    """An item in COCO's format, without ids but the category's: what is seen of it, more than half of a pixel."""
    rle = mask_api.encode(np.asfortranarray(_coverage(item.visible) > 0.5, dtype=np.uint8))
    if item.outline is None:
        segmentation = {"size": [SIDE, SIDE], "counts": _run_lengths(mask_api.decode(rle))}
    elif np.array_equal(item.visible, item.whole) and item.outline.min() >= 0 and item.outline.max() <= SIDE:
        segmentation = [item.outline.round(2).ravel().tolist()]
    else:  # partly hidden, or cut by the border
        segmentation = {"size": [SIDE, SIDE], "counts": rle["counts"].decode()}
    return {"category_id": item.label + 1, "iscrowd": int(item.outline is None), "segmentation": segmentation,
            "area": int(mask_api.area(rle)), "bbox": mask_api.toBbox(rle).tolist()}


def _run_lengths(mask: np.ndarray) -> list[int]:
    """Uncompressed RLE: lengths of the runs of 0 and 1 in turn, column by column, the first one of 0."""
    flat = np.concatenate([[0], mask.ravel(order="F"), [2]])  # what stands before and behind the pixels
    changes = np.flatnonzero(np.diff(flat))
    return np.diff(changes, prepend=0).tolist()


def save_ids(ids: np.ndarray, path: Path) -> None:
    """Saves a map (H, W) of segment ids as COCO's panoptic PNGs do: id = R + 256 G + 256^2 B."""
    Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=2).astype(np.uint8)).save(path)


def _segment_map(scene: Scene) -> np.ndarray:
    """Segment ids int32 (128, 128), as Cityscapes makes them: 1000 * category id + the item's number. The ground's textures are the categories 5 to 8."""
    ids = 1000 * (len(SHAPES) + 1 + scene.regions.astype(np.int32))
    for number, item in enumerate(scene.items):
        ids[_coverage(item.visible) > 0.5] = 1000 * (item.label + 1) + number
    return ids


def _segments_info(ids: np.ndarray, items: list[Item]) -> list[dict]:
    """A scene's segments as the panoptic json has them."""
    rows = []
    for number, area in count_values(ids).items():
        y, x = np.nonzero(ids == number)
        category_id, crowd = number // 1000, number // 1000 <= len(SHAPES) and items[number % 1000].outline is None
        rows.append({"id": number, "category_id": category_id, "iscrowd": int(crowd), "area": area,
                     "bbox": [int(x.min()), int(y.min()), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1]})
    return rows


def _write_scene(root: Path, name: str, seed: int, split: int, first: int, number: int) -> tuple[dict, list[dict], dict]:
    """Draws and saves image `number` of a split, first + number being its id, with its PNGs; returns its row for the jsons, its annotations (instances),
    and its annotation (panoptic)."""
    scene, image_id = render(seed, split, number), first + number
    file_name, ids = f"{image_id:06d}.png", _segment_map(scene)
    Image.fromarray(scene.image).save(root / name / file_name)
    save_ids(ids, root / f"panoptic_{name}" / file_name)
    Image.fromarray((ids // 1000 - 1).astype(np.uint8)).save(root / "labels" / name / file_name)
    return ({"id": image_id, "file_name": file_name, "height": SIDE, "width": SIDE}, [_annotation(item) for item in scene.items],
            {"image_id": image_id, "file_name": file_name, "segments_info": _segments_info(ids, scene.items)})


def _write_jsons(folder: Path, name: str, rows: list[tuple[dict, list[dict], dict]]) -> None:
    annotations = [{"image_id": image["id"]} | annotation for image, items, _ in rows for annotation in items]
    things = [{"id": number, "name": thing, "supercategory": "shape"} for number, thing in enumerate(SHAPES, start=1)]
    stuff = [{"id": number, "name": texture, "supercategory": "ground", "isthing": 0} for number, texture in enumerate(TEXTURES, start=len(SHAPES) + 1)]
    content = {"info": {"description": "shapes: circles, squares, triangles and stars, generated by data.py", "version": "1"},
               "images": [image for image, *_ in rows],
               "annotations": [{"id": number} | annotation for number, annotation in enumerate(annotations, start=1)],
               "categories": things}
    (folder / f"instances_{name}.json").write_text(jsonlib.dumps(content))
    content |= {"annotations": [panoptic for *_, panoptic in rows], "categories": [thing | {"isthing": 1} for thing in things] + stuff}
    (folder / f"panoptic_{name}.json").write_text(jsonlib.dumps(content))


def make_shapes(folder: str | Path = "datasets/shapes", train: int = 2000, val: int = 200, seed: int = 0) -> None:
    """Writes the data set: {train,val}/*.png, annotations/{instances,panoptic}_{train,val}.json, panoptic_{train,val}/*.png for their segments, and
    for semantic segmentation labels/{train,val}/*.png and classes.txt. Does nothing when it is there already.

    It grows under another name, so that a killed run leaves nothing that looks finished. A folder of an earlier version, which wrote instances alone, is
    completed. Raises DataError when the folder holds something else.
    """
    folder = Path(folder)
    if (folder / "classes.txt").is_file():
        return
    earlier = (folder / "annotations/instances_val.json").is_file()
    if folder.exists() and not earlier and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not the shapes data set: move it away, or name another folder")
    growing = folder.with_name(f"{folder.name}.growing-{os.getpid()}")
    try:
        for name in ("annotations", "train", "val", "panoptic_train", "panoptic_val", "labels/train", "labels/val"):
            (growing / name).mkdir(parents=True)
        with tqdm(total=train + val, desc=f"generating {folder}", unit=" images") as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
            for split, (name, first, count) in enumerate((("train", 1, train), ("val", train + 1, val))):
                rows = []
                for row in pool.map(partial(_write_scene, growing, name, seed, split, first), range(count)):
                    rows.append(row)
                    progress.update()
                _write_jsons(growing / "annotations", name, rows)
        (growing / "classes.txt").write_text("".join(f"{name}\n" for name in (*SHAPES, *TEXTURES)))
        if earlier:
            _complete(folder, growing)
        elif not (folder / "classes.txt").is_file():  # else another process was faster
            growing.rename(folder)
    finally:
        shutil.rmtree(growing, ignore_errors=True)


def _complete(folder: Path, growing: Path) -> None:
    """Moves what an earlier version did not write from the whole data set in `growing` to `folder`; classes.txt, which says that all is there, last."""
    jsons = [f"annotations/instances_{name}.json" for name in ("train", "val")]
    if any((folder / name).read_bytes() != (growing / name).read_bytes() for name in jsons):
        raise DataError(f"{folder} has no panoptic and semantic truth, and its images are not those that would get it (another seed or number): move it away")
    for name in ("labels", "panoptic_train", "panoptic_val", "annotations/panoptic_train.json", "annotations/panoptic_val.json", "classes.txt"):
        if not (folder / name).exists():
            (growing / name).rename(folder / name)


# ---------------------------------------------------------------------------------------------------------------------
# A look at a data set


def describe(dataset: ImageDataset) -> str:
    """Counts of a data set, a line each: images, objects (or segments, or regions) of every class, crowds, images without any. Label PNGs are read for it."""
    counts, crowds, empty = Counter(), 0, 0
    for index in tqdm(range(len(dataset)), "count", unit=" images", leave=False):
        contents = dataset.contents(index)
        counts.update(label for label, crowd in contents if not crowd)
        crowds += sum(crowd for _, crowd in contents)
        empty += all(crowd for _, crowd in contents)
    lines = [f"{len(dataset)} images, {empty} without {dataset.counted}; {counts.total()} {dataset.counted}, {crowds} crowds"]
    return "\n".join(lines + [f"  {counts[label]:7d} {name}" for label, name in enumerate(dataset.class_names)])


def draw_page(dataset: ImageDataset, path: Path, count: int = 24, columns: int = 6) -> None:
    """Saves a page of `count` samples, a random but fixed choice, all of one size after its transform: masks, class names, boxes of things; what is ignored
    is black."""
    palette = [tuple(int(255 * c) for c in colorsys.hsv_to_rgb(label * 0.381966 % 1, 0.8, 1)) for label in range(len(dataset.class_names))]
    tiles = []
    for index in np.random.default_rng(0).permutation(len(dataset))[:count].tolist():
        image, target = dataset[index, index]
        labels, masks = target["labels"].tolist(), target["masks"].bool()
        if labels:
            image = torchvision.utils.draw_segmentation_masks(image, masks, alpha=0.35, colors=[palette[label] for label in labels])
        if target["ignore"] is not None:
            image[:, target["ignore"]] = 0
        picture = v2.functional.to_pil_image(image)
        for label, mask, box in zip(labels, masks, torchvision.ops.masks_to_boxes(masks).tolist(), strict=True):
            pen = ImageDraw.Draw(picture)
            if dataset.is_thing[label]:
                pen.rectangle(box, outline=palette[label])
            places = mask.nonzero().flip(1).double()  # x, y; the name is written at the one nearest to their middle
            pen.text(places[(places - places.mean(0)).norm(dim=1).argmin()].tolist(), dataset.class_names[label], palette[label], anchor="mm", stroke_width=1,
                     stroke_fill="black")
        tiles.append(v2.functional.pil_to_tensor(picture))
    page = torchvision.utils.make_grid(tiles, columns, padding=4, pad_value=255)
    v2.functional.to_pil_image(page).save(path)


PATHS = {"json": "annotation file", "images": "image folder", "panoptic": "folder of panoptic PNGs", "labels": "folder of label PNGs",
         "classes": "file with the names of the label PNGs' classes, one a line"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts a data set and draws a page of augmented samples.")
    parser.add_argument("dir", nargs="?", default="datasets/shapes", help="data folder; the default is generated when it is missing")
    parser.add_argument("--task", default="instance", choices=("detection", "instance", "panoptic", "semantic"))
    parser.add_argument("--split", default="train", choices=("train", "val"))
    for name, what in PATHS.items():
        parser.add_argument(f"--{name}", help=f"{what}, where it is not found by itself")
    parser.add_argument("--out", help="page to write (default: DIR's name in a png in the current folder)")
    args = parser.parse_args()
    try:
        if args.dir == parser.get_default("dir"):
            make_shapes(args.dir)
        transform = semantic_jitter(256, (0.5, 1.5)) if args.task == "semantic" else large_scale_jitter(256, (0.5, 1.5))
        dataset = open_split(args.task, args.split, transform, data_dir=args.dir, **{name: getattr(args, name) for name in PATHS})
        print(f"annotations {dataset.source}")
        print(describe(dataset))
        out = Path(args.out or f"{Path(args.dir).resolve().name}.png")
        draw_page(dataset, out)
        print(f"page of augmented samples: {out}")
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
