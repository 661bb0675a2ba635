"""Data: COCO instances and panoptic, ADE20K, Cityscapes, own files laid out as these are; and `shapes`, generated, in the same formats.

    python data.py                                  # makes datasets/shapes if it is not there, checks it, draws a page of augmented samples
    python data.py /data/coco --task=panoptic --split=val --out=page.png
    python data.py /data/mine --strict --all        # every problem, each of which is an error

From a file to a batch: open_split finds the files -> a data set reads and cleans what describes them once and gives one sample per (index, key):
the transform chooses a View of the image, the truth is drawn in that view alone -> collate pads samples to one size.
BatchSampler says which samples a step takes. What is wrong with the files goes to a Report: loading says it in a line or stops, `python data.py` lists it.

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
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from pycocotools import mask as mask_api
from torchvision.transforms import v2
from tqdm import tqdm

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")  # of pictures
FLAGS = ("json", "images", "panoptic", "labels")         # what can be given by hand for a split, as --val_json=PATH


class DataError(ValueError):
    """Data that cannot be used: one sentence that names the file, image, annotation or category, and the remedy."""

    def __init__(self, sentence: str):
        super().__init__(printable(sentence.rpartition("data.DataError: ")[2].strip()))  # a loader's worker sends it below a traceback


def printable(text: str) -> str:
    """The text with what a terminal would obey, or cannot show, written out."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


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


ERROR = "error"


class Report:
    """What is wrong with a data set, by kind, each with what is done about it. Errors end loading at once (DataError), unless they are collected.

    found: {(kind, effect): [how many, the first `keep` of them in words]}; the effect of an error is ERROR. modes: how many image files have which mode.
    """

    def __init__(self, collect: bool = False, keep: int = 10):
        self.collect, self.keep = collect, keep
        self.found: dict[tuple[str, str], list] = {}
        self.modes: Counter[str] = Counter()

    def note(self, kind: str, effect: str, *cases: str, count: int = 1) -> None:
        group = self.found.setdefault((kind, effect), [0, []])
        group[0] += count
        group[1] += cases[:max(0, self.keep - len(group[1]))]

    def error(self, kind: str, sentence: str) -> None:
        if not self.collect:
            raise DataError(sentence)
        self.note(kind, ERROR, sentence)

    def add(self, other: "Report") -> None:
        self.modes += other.modes
        for group, (count, cases) in other.found.items():
            self.note(*group, *cases, count=count)

    @property
    def errors(self) -> int:
        return sum(count for (_, effect), (count, _) in self.found.items() if effect == ERROR)

    def say(self, source: str | Path) -> None:
        """What training prints of it: a line, or nothing."""
        if self.found and os.environ.get("RANK", "0") == "0":
            print(f"{source}: " + ", ".join(f"{count} {kind} {effect}" for (kind, effect), (count, _) in self.found.items()) + "; python data.py says which")


# What the json's values have to be: each gives the value as it is used, or None. Numbers that went through a table program may end in .0


def whole(value: Any) -> int | None:
    """a whole number"""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return value if type(value) is int and abs(value) <= 2 ** 53 else None


def positive(value: Any) -> int | None:
    """a whole number from 1"""
    number = whole(value)
    return number if number and number > 0 else None


def identity(value: Any) -> int | str | None:
    """a whole number or a short text"""
    return value if isinstance(value, str) and len(value) < 256 else whole(value)


def flag(value: Any) -> bool | None:
    """0 or 1"""
    return bool(value) if value in (0, 1) else None


def inner_path(value: Any) -> str | None:
    """a path inside of its folder (without '..', and not from the root)"""
    if not isinstance(value, str) or not value:
        return None
    path = PureWindowsPath(value)  # which knows both kinds of slashes
    return None if path.drive or path.root or ".." in path.parts or any(len(part) > 255 for part in path.parts) else value


def listed(value: Any) -> list | None:
    """a list"""
    return value if isinstance(value, list) else None


FORMATS = {"instance": {"images": {"id": identity, "file_name": inner_path, "height": positive, "width": positive}, "categories": {"id": whole},
                        "annotations": {"image_id": identity, "category_id": whole}}}
FORMATS["panoptic"] = FORMATS["instance"] | {"categories": {"id": whole, "isthing": flag},
                                             "annotations": {"image_id": identity, "file_name": inner_path, "segments_info": listed}}


def usable_rows(rows: list, keys: dict[str, Callable], where: str, report: Report) -> list[dict]:
    """The rows that have these keys, their values as they are used; others are errors."""
    kept = []
    for number, row in enumerate(rows):
        if missing := [key for key in keys if not isinstance(row, dict) or key not in row]:
            report.error("incomplete entries", f"{where}[{number}] has no {' and no '.join(missing)}: add what is missing, or take it out")
            continue
        values = {key: usable(row[key]) for key, usable in keys.items()}
        if wrong := [f"{key} = {row[key]!r:.60}, not {keys[key].__doc__}" for key, value in values.items() if value is None]:
            report.error("impossible entries", f"{where}[{number}] (id {row.get('id')!r:.40}) has {' and '.join(wrong)}: correct the json")
            continue
        row.update(values)
        kept.append(row)
    return kept


def read_coco(path: Path, kind: str, report: Report) -> dict:
    """The json's images, categories and annotations, complete and with unique ids. kind: "instance" or "panoptic". Raises DataError for anything else."""
    try:
        content = jsonlib.loads(path.read_text(encoding="utf-8-sig"))  # -sig: some exporters write a byte-order mark
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not json, or not text
        raise DataError(f"{path} is no json file: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not in COCO's format: it holds a {type(content).__name__}, not a dict with images, annotations, categories")
    parts = {}
    for part, keys in FORMATS[kind].items():
        rows = content.get(part, [] if part == "annotations" else None)
        if part not in content and rows is None:
            raise DataError(f"{path} is not in COCO's format: the key '{part}' is missing (there are: {', '.join(content):.200})")
        if not isinstance(rows or [], list):
            raise DataError(f"{path} is not in COCO's format: '{part}' holds a {type(rows).__name__}, not a list")
        parts[part] = usable_rows(rows or [], keys, f"{path} is not in COCO's {kind} format: {part}", report)
    for part in ("images", "categories"):
        parts[part] = _one_each(parts[part], "id", f"id(s) in '{part}'", "give each its own id", path, report)
    if len({type(row["id"]) for row in parts["images"]}) > 1:
        raise DataError(f"{path}: some image ids are numbers and some are texts: make all of them one or the other")
    images, large = _one_each(parts["images"], "file_name", "file(s) in 'images'", "make one image of each", path, report), 2 * Image.MAX_IMAGE_PIXELS
    if wrong := [row for row in images if row["height"] * row["width"] > large]:  # which Pillow refuses to open
        report.error("impossible entries", f"{path}: {len(wrong)} image(s) have more than {large:,} pixels, {wrong[0]['width']} x {wrong[0]['height']} "
                                           f"(width x height) of image {wrong[0]['id']} first: they are refused; correct the json, or cut tiles")
    return parts | {"images": [row for row in images if row["height"] * row["width"] <= large]}


def _one_each(rows: list[dict], key: str, what: str, remedy: str, where: str | Path, report: Report) -> list[dict]:
    """The rows, the first one of each value; the others are an error."""
    twice = [value for value, count in Counter(row[key] for row in rows).items() if count > 1]
    if twice:
        report.error("doubles", f"{where}: {len(twice)} {what} occur more than once, {twice[:5]!r:.200} first; {remedy}")
    return list({row[key]: row for row in reversed(rows)}.values())[::-1] if twice else rows


# ---------------------------------------------------------------------------------------------------------------------
# Annotations: cleaned before pycocotools sees them, which crashes or guesses on crooked ones


class Annotation(NamedTuple):
    """One cleaned annotation. segmentation: polygons (flat lists of x, y in pixels) or one compressed RLE."""

    label: int
    crowd: bool
    segmentation: list | dict
    bbox: list | None  # the json's own (x, y, w, h) in pixels when usable
    area: float | None  # the json's own when usable


def _number(value: Any, limit: float = 1e9) -> bool:
    """Whether it is a finite number, and none that overflows later."""
    return isinstance(value, (int, float)) and abs(value) <= limit


def clean_polygon(polygon: list, height: int, width: int) -> list | None:
    """A polygon that pycocotools can rasterise, or None where it has fewer than three points, an odd length, a number that is not finite, or no end."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return None
    try:
        if not math.isfinite(sum(polygon)):
            return None
    except (TypeError, OverflowError):  # not numbers, or none that a float can hold
        return None
    if min(polygon) < -min(height, width) or max(polygon) > 2 * min(height, width):
        # Far outside pycocotools runs out of memory or off its arrays; near the image its own clipping is exact and stays untouched.
        points = np.clip(np.array(polygon, dtype=np.float64).reshape(-1, 2), (-width, -height), (2 * width, 2 * height))
        polygon = points.ravel().tolist()
    if len(polygon) > 1000:  # else it cannot be long
        steps = np.abs(np.diff(np.array(polygon, dtype=np.float64).reshape(-1, 2), axis=0)).sum()
        return polygon if steps <= 1000 * (height + width) else None  # pycocotools takes 40 bytes a pixel of outline
    return polygon


def clean_rle(rle: dict, height: int, width: int, where: str, report: Report) -> dict | None:
    """The RLE compressed. `where` names the annotation in the error for an RLE of another size or length, or a damaged one."""
    size, counts, pixels = rle.get("size"), rle.get("counts"), height * width
    lengths = decoded_counts(counts) if isinstance(counts, str) else counts
    if size != [height, width]:
        wrong = f"of size {size!r:.60}, its image has [{height}, {width}] (height, width)"
    elif not isinstance(lengths, list) or not all(type(number) is int and 0 <= number <= pixels for number in lengths):
        wrong = "without counts" if counts is None else "whose counts are damaged"
    elif sum(lengths) != pixels:
        wrong = f"whose counts add up to {sum(lengths)}, its image has {pixels} pixels"
    else:
        size = [height, width]
        rle = {"size": size, "counts": counts.encode()} if isinstance(counts, str) else mask_api.frPyObjects({"size": size, "counts": counts}, *size)
        return mask_api.encode(mask_api.decode(rle)) if 0 in lengths[1:] else rle  # runs of nothing mislead pycocotools' IoU
    report.error("unusable RLEs", f"{where} has an RLE {wrong}: correct the json")


def decoded_counts(text: str) -> list[int] | None:
    """Lengths of the runs in a compressed RLE; None for what no encoder writes, at which pycocotools reads on behind the end.

    COCO's format: 5 bits a character from 48 on, the lowest first, a sixth where more follow; from the fourth run on a length is told as the
    difference to the one two before.
    """
    codes = np.frombuffer(text.encode(errors="surrogatepass"), np.uint8).astype(np.int64) - 48
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    last = np.flatnonzero(codes < 32)
    first = np.append(0, last[:-1] + 1)
    place = np.arange(codes.size) - first.repeat(last - first + 1)
    if place.max() > 6:
        return None
    runs = np.add.reduceat((codes & 31) << 5 * place, first) - ((codes[last] & 16) << 5 * place[last] + 1)  # two's complement
    for start in (1, 2):
        runs[start::2] = runs[start::2].cumsum()
    return runs.tolist()


def clean_segmentation(segmentation: Any, height: int, width: int, where: str, report: Report) -> list | dict | None:
    """Polygons or an RLE; None where nothing is left."""
    if isinstance(segmentation, dict):
        return clean_rle(segmentation, height, width, where, report)
    polygons = segmentation if isinstance(segmentation, list) else []
    if polygons and not isinstance(polygons[0], list):
        polygons = [polygons]
        report.note("polygon(s) without a list around them", "taken as one", where)
    kept = []
    for raw in filter(None, polygons):
        polygon = clean_polygon(raw, height, width)
        if polygon is None:
            report.note("malformed polygon(s)", "left out", where)
        else:
            kept.append(polygon)
            if polygon != raw:
                report.note("polygon(s) far outside the image", "clipped", where)
    return kept or None


def clean_annotation(row: dict, label: int, height: int, width: int, boxes_only: bool, where: str, report: Report) -> Annotation | None:
    """A json's annotation, or None where it has to be left out. boxes_only: see CocoDataset."""
    bbox, area, crowd = row.get("bbox"), row.get("area"), flag(row.get("iscrowd", 0))
    if crowd is None:
        return report.error("impossible entries", f"{where} has iscrowd = {row['iscrowd']!r:.60}, not 0 or 1: correct the json")
    segmentation = clean_segmentation(row.get("segmentation"), height, width, where, report)
    if segmentation is None and isinstance(row.get("segmentation"), dict):
        return None  # an error, told already
    bbox = bbox if _usable_box(bbox, height, width) else None
    if segmentation is None and boxes_only and bbox:
        x, y, w, h = bbox
        segmentation = [clean_polygon([x, y, x + w, y, x + w, y + h, x, y + h], height, width)]
    if segmentation is None:
        return report.note("annotation(s) without a box" if boxes_only else "annotation(s) without a mask", "left out", where)
    area = area if _number(area) and 0 <= area <= height * width else None
    for key, is_usable, effect in (("iscrowd", "iscrowd" in row, "taken as 0"), ("bbox", bbox, "taken from the mask"), ("area", area is not None, "computed")):
        if not is_usable:
            report.note(f"annotation(s) without a usable {key}", effect, where)
    return Annotation(label, crowd, segmentation, bbox, area)


def _usable_box(bbox: Any, height: int, width: int) -> bool:
    """Whether bbox (x, y, w, h) in pixels is four finite numbers with an inside that meets the image."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_number, bbox)):
        return False
    x, y, w, h = bbox
    return w > 0 and h > 0 and x < width and y < height and x + w > 0 and y + h > 0


def to_rle(segmentation: list | dict, height: int, width: int) -> dict:
    """One compressed RLE of a cleaned segmentation."""
    return segmentation if isinstance(segmentation, dict) else mask_api.merge(mask_api.frPyObjects(segmentation, height, width))


# ---------------------------------------------------------------------------------------------------------------------
# Image files

PICTURES = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")  # what is decoded, whatever the suffix says: others may run programs (EPS)
BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, MemoryError, struct.error, zlib.error,
          EOFError, Image.DecompressionBombError)  # what Pillow's decoders raise for broken files


@contextlib.contextmanager
def opened(path: Path, formats: Sequence[str] = PICTURES) -> Iterator[Image.Image]:
    """A picture file, to be decoded inside the `with`, where nothing else should be done. Raises DataError for a broken one."""
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise DataError(f"image file {path} is not there, or is no file: correct its name in what lists it")
    try:
        with Image.open(path, formats=formats) as file:
            yield file
    except DataError:
        raise
    except BROKEN as error:
        raise DataError(f"image file {path} cannot be read ({error}): repair it, or take it out of the data set") from error


def read_image(path: Path, size: tuple[int, int] | None = None, sized_by: str = "", report: Report | None = None) -> Image.Image:
    """An image file as RGB, 16 bits scaled to 8. Cameras may store it turned: it is brought into the orientation that has this (height, width), which
    `sized_by` says, or without one upright. Raises DataError where there is none, before pixels are decoded."""
    with opened(path) as file:
        stored, mode = (file.height, file.width), file.mode
        turned = size != stored and (size is None or size == stored[::-1] and file.getexif().get(0x0112) in (5, 6, 7, 8))
        if size not in (None, stored) and not turned:
            raise DataError(f"image file {path} is {stored[1]} x {stored[0]} pixels (width x height), {sized_by} says {size[1]} x {size[0]}: "
                            "correct one of them")
        if mode == "F" or mode == "I" and file.format != "PNG":
            raise DataError(f"image file {path} has pixels of 32 bits (mode {mode}), of which nobody knows what is white: save it with 8 or 16")
        if report and file.getexif().get(0x0112, 1) != 1:
            effect = f"turned to the size in {sized_by}" if turned else f"left as stored, which has the size in {sized_by}"
            report.note("image(s) with an EXIF orientation", effect, str(path))
        image = ImageOps.exif_transpose(file) if turned else file
        if mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert("RGB")
    if report:
        report.modes[mode] += 1
        if mode.startswith("I"):
            report.note("image(s) of 16 bits", "scaled to 8", str(path))
    return image


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

    def contents(self, index: int, truth: Any) -> list[tuple[int, bool, int]]:
        """(label, crowd, pixels) of each object, segment or class in an image; truth: what `read` returns."""
        raise NotImplementedError

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

    def select(self, indices: Sequence[int]) -> "ImageDataset":
        """The same data, these images alone."""
        other = copy.copy(self)
        for name, values in vars(self).items():
            if name in ("image_ids", "file_names", "sizes", "png_names", "label_names", "_bounds") and len(values):
                setattr(other, name, values[indices] if isinstance(values, np.ndarray) else [values[index] for index in indices])
        return other

    def examine(self, index: int, report: Report) -> list[tuple[int, bool, int]]:
        """`contents` of an image, whose files are read once; what is wrong with them goes to the report, which collects."""
        contents, told = [], set()
        try:
            contents = self.contents(index, self.read(index))
        except DataError as error:
            told.add(str(error))
        try:
            self._open(index, report)
        except DataError as error:
            told.add(str(error))
        for sentence in told:
            report.error("unusable files", f"image {self.image_ids[index]}: {sentence}")
        if empty := sum(not pixels for *_, pixels in contents):
            report.note("mask(s) without a pixel", "left out", f"image {self.image_ids[index]}: {empty} annotation(s)", count=empty)
        return [row for row in contents if row[2]]

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

    def _open(self, index: int, report: Report | None = None) -> Image.Image:
        """The image file as RGB, of the size that is told of it."""
        return read_image(self.file_names[index], self._size(index), self.sized_by, report)

    def _size(self, index: int) -> tuple[int, int]:
        return tuple(self.sizes[index].tolist())

    def _set_classes(self, categories: list[dict], json: str | Path, report: Report) -> dict[int, int]:
        """Labels are indices into the categories in the order of their ids; names are printable and differ. Returns {category id: label}."""
        if not categories:
            raise DataError(f"{json} lists no categories" + " of things" * (self.counted == "segments") + ": add them")
        categories = sorted(categories, key=lambda category: category["id"])
        self.category_ids, self.class_names = [category["id"] for category in categories], []
        for category in categories:
            name = printable(str(category.get("name", category["id"])))[:100]
            if name in self.class_names:
                report.note("category name(s) used twice", "told apart by their ids", f"{json}: category {category['id']}, {name}")
                name = f"{name} ({category['id']})"
            self.class_names.append(name)
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
        ends = np.cumsum([0, *map(len, pickles)])
        self._bounds = np.stack([ends[:-1], ends[1:]], axis=1)
        self._pickles = np.frombuffer(b"".join(pickles), dtype=np.uint8)
        return kept

    def _facts(self, index: int) -> list:
        return pickle.loads(self._pickles[slice(*self._bounds[index])].tobytes())

    def _as_coco(self, annotations: list[dict], labels: Iterable[int]) -> dict:
        """What pycocotools reads: annotations, numbered here, of these classes."""
        images = [{"id": image_id, "file_name": path.name, "height": height, "width": width}
                  for image_id, path, (height, width) in zip(self.image_ids, self.file_names, self.sizes.tolist(), strict=True)]
        return {"info": {}, "images": images, "annotations": [{"id": number} | row for number, row in enumerate(annotations, start=1)],
                "categories": [{"id": self.category_ids[label], "name": self.class_names[label]} for label in labels]}


def _check_files(paths: list[Path], folder: str | Path, of: str | Path, report: Report, what: str = "image") -> None:
    if report.collect:
        return  # each is told when it is examined
    missing = [path for path in paths if not os.path.isfile(path)]
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
    report: where to put what is wrong; None: it is said in a line. Raises DataError for whatever of the json or the image files is unusable and can be
    known now.
    """

    def __init__(self, json: str | Path, images: str | Path, transform: Callable, *, keep_empty: bool = True, max_images: int = 0,
                 boxes_only: bool = False, report: Report | None = None):
        found = report or Report()
        content = read_coco(Path(json), "instance", found)
        self.source, self.transform, self.boxes_only = f"{json}, images in {images}", transform, boxes_only
        labels = self._set_classes([category | {"isthing": True} for category in content["categories"]], json, found)
        self.has_truth = bool(content["annotations"])
        kept = self._set_images(content["images"], self._clean(content, labels, json, found), json, keep_empty, max_images)
        self.file_names = [Path(images) / row["file_name"] for row in kept]
        _check_files(self.file_names, images, json, found)
        if not report:
            found.say(json)

    def _clean(self, content: dict, labels: dict[int, int], json: str | Path, report: Report) -> dict[int, list[Annotation]]:
        """The usable annotations of each image id."""
        sizes = {row["id"]: (row["height"], row["width"]) for row in content["images"]}
        if unknown := sorted({row["category_id"] for row in content["annotations"]} - labels.keys()):
            report.error("unknown categories", f"{json}: annotations use the category ids {unknown[:20]}, which 'categories' does not list: add them there")
        cleaned, ids = {image_id: [] for image_id in sizes}, Counter()
        for row in content["annotations"]:
            number, image_id, label = identity(row.get("id")), row["image_id"], labels.get(row["category_id"])
            where = f"{json}: annotation {number} of image {image_id}"
            ids[number] += number is not None
            if ids[number] > 1 or number == 0:
                report.note("annotation id(s) 0" if number == 0 else "annotation id(s) used twice", "numbered anew", where)
            if image_id not in sizes:
                report.note("annotation(s) of unknown images", "left out", where)
            elif label is not None and (annotation := clean_annotation(row, label, *sizes[image_id], self.boxes_only, where, report)):
                cleaned[image_id].append(annotation)
        return cleaned

    def read(self, index: int) -> list[Annotation]:
        """The cleaned annotations of an image, crowds included."""
        return self._facts(index)

    def contents(self, index: int, truth: list[Annotation]) -> list[tuple[int, bool, int]]:
        return [(a.label, a.crowd, int(mask_api.area(to_rle(a.segmentation, *self._size(index))))) for a in truth]

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
    things: only things are classes and objects. keep_empty, max_images, report: as in CocoDataset.
    Raises DataError for what is unusable and can be known now; the PNGs are checked against the json when they are read.
    """

    counted = "segments"

    def __init__(self, json: str | Path, panoptic: str | Path, images: str | Path, transform: Callable, *, things: bool = False,
                 keep_empty: bool = True, max_images: int = 0, report: Report | None = None):
        found = report or Report()
        content = read_coco(Path(json), "panoptic", found)
        self.source, self.transform = f"{json}, segments in {panoptic}, images in {images}", transform
        labels = self._set_classes([category for category in content["categories"] if category["isthing"] or not things], json, found)
        labels = {category["id"]: labels.get(category["id"], -1) for category in content["categories"]}
        rows = _one_each(content["annotations"], "image_id", "image ids in 'annotations'", "leave one entry for each", json, found)
        rows, self.has_truth = {row["image_id"]: row for row in rows}, bool(rows)
        bare = [row["id"] for row in content["images"] if row["id"] not in rows]
        if self.has_truth and bare:
            found.error("images without truth", f"{json}: {len(bare)} image(s) have no entry in 'annotations', {bare[:5]} first: add them, or take the "
                                                "images out")
        if unknown := len(rows) + len(bare) - len(content["images"]):
            found.note("annotation(s) of unknown images", "left out", str(json), count=unknown)
        images_kept = [row for row in content["images"] if row["id"] in rows or not rows]
        facts = {row["id"]: _segments_of(rows[row["id"]], labels, json, found) if rows else [] for row in images_kept}
        kept = self._set_images(images_kept, facts, json, keep_empty, max_images)
        self.file_names = [_cityscapes_name(Path(images), row["file_name"]) for row in kept]
        self.png_names = [Path(panoptic) / rows[row["id"]]["file_name"] for row in kept] if rows else []
        _check_files(self.file_names, images, json, found)
        _check_files(self.png_names, panoptic, json, found, "panoptic PNG")
        if not report:
            found.say(json)

    def segments(self, index: int) -> tuple[np.ndarray, list[dict]]:
        """The map of segment ids int32 (H0, W0), 0 = void, and [{"id", "category_id", "iscrowd", "area"}], area counted in pixels.

        Raises DataError, naming file and ids, where PNG and json contradict each other.
        """
        if not self.has_truth:
            return np.zeros(self._size(index), np.int32), []
        path, facts, where = self.png_names[index], self._facts(index), f"image {self.image_ids[index]}"
        with opened(path, ("PNG",)) as file:
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

    def contents(self, index: int, truth: tuple[np.ndarray, list[dict]]) -> list[tuple[int, bool, int]]:
        return [(self.category_ids.index(segment["category_id"]), bool(segment["iscrowd"]), segment["area"]) for segment in truth[1]]

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


def _segments_of(row: dict, labels: dict[int, int], json: str | Path, report: Report) -> list[Segment]:
    """An image's segments_info, checked."""
    where, kept = f"{json}: image {row['image_id']}", []
    for segment in usable_rows(row["segments_info"], {"id": positive, "category_id": whole}, f"{where}: segments_info", report):
        crowd = flag(segment.get("iscrowd", 0))
        if segment["category_id"] not in labels:
            report.error("unknown categories", f"{where}: segment {segment['id']} has the category id {segment['category_id']}, which 'categories' does not "
                                               "list: add it there")
        elif crowd is None or segment["id"] >= 256 ** 3:
            report.error("impossible entries", f"{where}: segment {segment['id']} has iscrowd = {segment.get('iscrowd')!r:.60}: iscrowd is 0 or 1, "
                                               "and ids are below 256^3: correct the json")
        else:
            kept.append(Segment(segment["id"], labels[segment["category_id"]], crowd))
    if twice := [key for key, count in Counter(segment.id for segment in kept).items() if count > 1]:
        report.error("doubles", f"{where} lists the segment ids {twice[:5]} twice: give each segment its own id from 1")
    return kept


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

    def __init__(self, images: str | Path, labels: str | Path, coding: Coding, transform: Callable, *, max_images: int = 0, report: Report | None = None):
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
        _check_files(self.label_names, labels, images, report or Report(), "label PNG")
        self._table = np.full(257, -2, np.int32)  # value -> label; -1 no class, -2 an error, as is all beyond 255
        self._table[coding.ignored], self._table[coding.values] = -1, range(len(coding.values))

    @cached_property
    def sizes(self) -> np.ndarray:
        """(images, 2) height, width: read off all files, when somebody asks."""
        return np.array([self._size(index) for index in range(len(self))])

    def _size(self, index: int) -> tuple[int, int]:
        with opened(self.label_names[index], ("PNG",)) as file:
            return file.height, file.width

    def label_map(self, index: int) -> np.ndarray:
        """The class of every pixel, int32 (H0, W0): an index into class_names, -1 where there is none. Raises DataError naming file and values."""
        path = self.label_names[index]
        with opened(path, ("PNG",)) as file:
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

    def contents(self, index: int, truth: np.ndarray) -> list[tuple[int, bool, int]]:
        return [(label, False, pixels) for label, pixels in count_values(truth).items() if label >= 0]


def open_split(task: str, split: str, transform: Callable, *, data_dir: str | Path | None = None, json: str | Path | None = None,
               images: str | Path | None = None, panoptic: str | Path | None = None, labels: str | Path | None = None,
               classes: str | Path | None = None, keep_empty: bool = True, max_images: int = 0, skip_bad_images: bool = False,
               report: Report | None = None) -> ImageDataset:
    """The data of a split, "train" or "val", for a task, "detection", "instance", "panoptic" or "semantic".

    What lies below data_dir says what is opened: detection, instance and panoptic COCO's tree or Cityscapes'; semantic Cityscapes, ADE20K or own folders
    (images/val, labels/val, classes.txt). Paths given by hand win: json, images, panoptic (folder of PNGs), labels (folder of label PNGs), classes (file with a
    name a line). keep_empty: keep images without objects. max_images: the first so many only; 0 is all. skip_bad_images: see `usable_images`.
    report: see CocoDataset. Raises DataError.
    """
    options = {"max_images": max_images, "report": report}
    if task == "semantic":
        dataset = SemanticDataset(*find_semantic(data_dir, split, images, labels, classes), transform, **options)
    elif task == "panoptic" or panoptic or json is None and Path(data_dir or ".", "gtFine").is_dir():
        found = find_panoptic(data_dir, split, json, panoptic, images)
        dataset = PanopticDataset(*found, transform, things=task != "panoptic", keep_empty=keep_empty, **options)
    else:
        dataset = CocoDataset(*find_coco(data_dir, split, json, images), transform, boxes_only=task == "detection", keep_empty=keep_empty, **options)
    return usable_images(dataset) if skip_bad_images else dataset


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
    try:
        names = [printable(line.strip()) for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    if not 0 < len(set(names)) == len(names) <= 255:
        raise DataError(f"{file} has {len(names)} classes, {len(set(names))} of them different: 1 to 255 names are needed, one a line, each once")
    numbers = list(range(len(names)))
    return _find_images(data_dir, split, images), label_folder, Coding(names, numbers, [255], numbers)


def _known_classes(benchmark: str) -> tuple[list[str], list[int]]:
    row = jsonlib.loads((Path(__file__).parent / "assets/classes.json").read_text())[benchmark]
    return row["names"], row["category_ids"]


def check_classes(training: ImageDataset | None = None, evaluation: ImageDataset | None = None) -> None:
    """Raises DataError where the two splits have no class in common: they meet by name."""
    if training and evaluation and not set(training.class_names) & set(evaluation.class_names):
        raise DataError(f"{training.source} and {evaluation.source} have no class name in common: name the classes alike")


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
    Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=2).astype(np.uint8)).save(path, format="PNG")


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


class _Examined(torch.utils.data.Dataset):
    """What `examine` says of each image, for a loader's workers."""

    def __init__(self, dataset: ImageDataset, keep: int):
        self.dataset, self.keep = dataset, keep

    def __getitem__(self, index: int) -> tuple[int, list[tuple[int, bool, int]], Report]:
        report = Report(collect=True, keep=self.keep)
        return index, self.dataset.examine(index, report), report


def examined(dataset: ImageDataset, report: Report, indices: Sequence[int]) -> Iterator[tuple[int, list[tuple[int, bool, int]], bool]]:
    """(index, contents, whether all its files are usable) of each of these images, read by all cores; what is wrong is added to the report."""
    workers = min((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), len(indices) // 64)
    loader = torch.utils.data.DataLoader(_Examined(dataset, report.keep), batch_size=None, sampler=indices, num_workers=workers, collate_fn=tuple)
    for index, contents, found in tqdm(loader, "check", unit=" images", leave=False, disable=os.environ.get("RANK", "0") != "0"):
        report.add(found)
        yield index, contents, not found.errors


def usable_images(dataset: ImageDataset) -> ImageDataset:
    """The images whose files can be read and agree with what is told of them; how many are not is said. All are read for it once, shared by all processes."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    report = Report(collect=True, keep=3)
    mine = [index for index, _, usable in examined(dataset, report, range(rank, len(dataset), world)) if usable], report
    shares = [mine]
    if world > 1:
        dist.all_gather_object(shares := [None] * world, mine)
    kept = sorted(index for indices, _ in shares for index in indices)
    cases = [case for _, found in shares for (_, effect), (_, some) in found.found.items() if effect == ERROR for case in some]
    if rank == 0 and len(kept) < len(dataset):
        print(f"{dataset.source}: {len(dataset) - len(kept)} of {len(dataset)} images are skipped, as their files cannot be used; {cases[0]}")
    if not kept:
        raise DataError(f"{dataset.source}: no image is usable; {cases[0]}")
    return dataset.select(kept)


SIZES = {"small": 32 ** 2, "medium": 96 ** 2, "large": math.inf}  # below so many pixels


def check(dataset: ImageDataset, report: Report, training: bool = False) -> tuple[str, list[int]]:
    """Reads all files of a data set. Returns its counts in words, and the indices of the usable images; what is wrong is added to the report.
    training: without any object it is of no use."""
    table, crowds, empty, kept = np.zeros((len(dataset.class_names), len(SIZES)), np.int64), 0, 0, []
    for index, contents, usable in examined(dataset, report, range(len(dataset))):
        for label, crowd, pixels in contents:
            table[label, np.searchsorted(list(SIZES.values()), pixels, "right")] += not crowd
            crowds += crowd
        empty += all(crowd for _, crowd, _ in contents)
        kept += [index] * usable
    if not table.any() and training:
        report.error("empty splits", f"{dataset.source}: there are no {dataset.counted} to learn from")
    elif not table.any():
        report.note(f"split without {dataset.counted}", "every metric is n/a", dataset.source)
    modes = ", ".join(f"{count} {mode}" for mode, count in report.modes.most_common())
    lines = [f"{len(dataset)} images ({modes}), {empty} without {dataset.counted}; {table.sum()} {dataset.counted}, {crowds} crowds",
             f"  {'all':>9}" + "".join(f"{size:>9}" for size in SIZES)]
    lines += [f"  {row.sum():9d}" + "".join(f"{count:9d}" for count in row) + f"  {name}" for row, name in zip(table, dataset.class_names, strict=True)]
    return "\n".join(lines), kept


def problems(report: Report) -> str:
    """What a report holds, in words, errors last."""
    lines = []
    for (kind, effect), (count, cases) in sorted(report.found.items(), key=lambda item: item[0][1] == ERROR):
        lines += [f"{count} {kind}: {effect}", *(f"    {printable(case)}" for case in cases)]
        lines += [f"    and {count - len(cases)} more: --all"] * (0 < len(cases) < count)
    return "\n".join(lines) or "no problems"


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


def examine_split(args: argparse.Namespace, split: str, report: Report) -> ImageDataset:
    """Checks a split and prints what there is and what is wrong; returns its usable images. Raises DataError where it cannot be opened at all."""
    transform = semantic_jitter(256, (0.5, 1.5)) if args.task == "semantic" else large_scale_jitter(256, (0.5, 1.5))
    dataset = open_split(args.task, split, transform, data_dir=args.dir, report=report, **{name: getattr(args, name) for name in PATHS})
    print(f"{split}: {dataset.source}")
    counts, kept = check(dataset, report, split == "train")
    print(counts, problems(report), sep="\n")
    return dataset.select(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks a data set and draws a page of augmented samples. The exit code is 0 if training can start.")
    parser.add_argument("dir", nargs="?", default="datasets/shapes", help="data folder; the default is generated when it is missing")
    parser.add_argument("--task", default="instance", choices=("detection", "instance", "panoptic", "semantic"))
    parser.add_argument("--split", choices=("train", "val"), help="default: both; the one that the paths belong to, where they are given")
    for name, what in PATHS.items():
        parser.add_argument(f"--{name}", help=f"{what}, where it is not found by itself")
    parser.add_argument("--strict", action="store_true", help="whatever is not as it should be is an error")
    parser.add_argument("--all", action="store_true", help="list all problems, not the first 10 of a kind")
    parser.add_argument("--out", help="page to write (default: DIR's name in a png in the current folder)")
    args = parser.parse_args()
    by_hand, wrong, opened_splits = any(getattr(args, name) for name in PATHS if name != "classes"), [], []
    for split in [args.split] if args.split else ["train"] if by_hand else ["train", "val"]:
        report = Report(collect=True, keep=sys.maxsize if args.all else 10)
        try:
            if args.dir == parser.get_default("dir"):
                make_shapes(args.dir)
            opened_splits.append(examine_split(args, split, report))
        except DataError as error:
            report.error("", str(error))
            print(f"{split}: {error}".replace(f"--{split}_", "--"))  # as the flags are called here
        if report.errors or args.strict and report.found:
            wrong.append(split)
    if usable := [dataset for dataset in opened_splits if len(dataset)]:
        out = Path(args.out or f"{Path(args.dir).resolve().name}.png")
        draw_page(usable[0], out)
        print(f"page of augmented samples: {out}")
    try:
        check_classes(*opened_splits)
    except DataError as error:
        sys.exit(f"error: {error}")
    if wrong:
        sys.exit(f"error: training cannot start with the {' and '.join(wrong)} data: correct what is above")


if __name__ == "__main__":
    main()
