"""Data: COCO's instance format, and `shapes`, a generated data set in that same format.

    python data.py                                  # makes datasets/shapes if it is not there, counts it, draws a page of augmented samples
    python data.py /data/coco --split=val --out=page.png

From a file to a batch: find_coco names the files -> CocoDataset reads and cleans the json once and gives one sample per (index, key)
-> large_scale_jitter augments it -> collate pads samples to one size. BatchSampler says which samples a step takes.

Boxes are (cx, cy, w, h) in 0..1 unless said otherwise. Notation: B batch, N objects, (H, W) pixels of one sample, (Hp, Wp) padded pixels.
"""
import argparse
import colorsys
import copy
import json as jsonlib
import math
import os
import pickle
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw
from pycocotools import mask as mask_api
from tqdm import tqdm


class DataError(ValueError):
    """Data that cannot be used: one sentence that names the file, image, annotation or category, and the remedy."""


# ---------------------------------------------------------------------------------------------------------------------
# Files: where a data set lies, and what its json says


def find_coco(data_dir: str | Path, split: str, json: str | Path | None = None, images: str | Path | None = None) -> tuple[Path, Path]:
    """(json file, image folder) of a split, "train" or "val", below data_dir; a path given by hand is taken as it is.

    Known are COCO's own tree (annotations/instances_val2017.json, val2017/) and the names that exporters give: see the two lists.
    Raises DataError naming what was looked for.
    """
    names = {"train": ["train"], "val": ["val", "valid", "validation"]}.get(split, [split])
    stems = [name + year for name in names for year in ("2017", "", "2014")]
    jsons = ["annotations/instances_{}.json", "annotations/{}.json", "instances_{}.json", "{}.json",
             "{}/_annotations.coco.json", "{}/annotations.json"]
    folders = ["{}/images", "{}", "images/{}", "images"]
    return (_first_path(data_dir, json, [name.format(stem) for stem in stems for name in jsons], Path.is_file, f"{split}_json"),
            _first_path(data_dir, images, [name.format(stem) for name in folders for stem in stems], Path.is_dir, f"{split}_images"))


def _first_path(data_dir: str | Path, given: str | Path | None, candidates: list[str], exists: Callable[[Path], bool], flag: str) -> Path:
    """The given path, or else the first candidate below data_dir that exists."""
    if given is not None:
        if not exists(Path(given)):
            raise DataError(f"--{flag}={given} does not exist (or is no {'file' if exists is Path.is_file else 'folder'})")
        return Path(given)
    if not Path(data_dir).is_dir():
        raise DataError(f"data folder {data_dir} does not exist; give another with --data=DIR")
    found = [path for name in candidates if exists(path := Path(data_dir) / name)]
    if not found:
        raise DataError(f"{data_dir} has none of {', '.join(dict.fromkeys(candidates))}; name it with --{flag}=PATH")
    return found[0]


def read_coco(path: Path) -> dict:
    """The json as a dict that has `images` and `categories`, with unique ids. Raises DataError for anything else."""
    try:
        content = jsonlib.loads(path.read_text(encoding="utf-8-sig"))  # -sig: some exporters write a byte-order mark
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # not json, or not text
        raise DataError(f"{path} is no json file: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not in COCO's format: it holds a {type(content).__name__}, not a dict with images, annotations, categories")
    needed = {"images": ("id", "file_name", "height", "width"), "categories": ("id",), "annotations": ("image_id", "category_id")}
    for part, keys in needed.items():
        if part not in content and part != "annotations":
            raise DataError(f"{path} is not in COCO's format: the key '{part}' is missing (there are: {', '.join(content)})")
        for number, row in enumerate(content.get(part) or []):
            if missing := [key for key in keys if not isinstance(row, dict) or key not in row]:
                raise DataError(f"{path} is not in COCO's instance format: {part}[{number}] has no {' and no '.join(missing)}")
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


def rasterise(segmentations: list[list | dict], height: int, width: int) -> torch.Tensor:
    """Masks uint8 (N, H, W), 1 inside."""
    if not segmentations:
        return torch.zeros((0, height, width), dtype=torch.uint8)
    masks = mask_api.decode([to_rle(segmentation, height, width) for segmentation in segmentations])  # (H, W, N), columns first
    return torch.from_numpy(masks).permute(2, 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The data set


class CocoDataset(torch.utils.data.Dataset):
    """Images with their objects from a json in COCO's format, as in DETR's CocoDetection, except
    - the json is read by itself and cleaned (what is left out is printed in one line), not by pycocotools;
    - a sample is a function of (index, key) alone, whatever process or worker makes it;
    - annotations are kept pickled in one array: forked workers share it, as no reference count in it ever changes.

    json, images: the file and the folder its file names are relative to.
    transform: callable(RGB PIL.Image, target) -> (image uint8 (3, H, W), target). It is given "labels" int64 (N,), "masks" uint8 (N, H0, W0),
        "image_id" and "original_size" (H0, W0), and has to treat the masks as it treats the image, or may leave them as they are if it only
        resizes, and sets "size" if it pads. Boxes are set afterwards from what it returns. It has to be picklable (a function or a partial, no lambda).
    keep_empty: keep images without objects. max_images: the first so many only; 0 is all.
    boxes_only: an annotation without a mask but with a box is kept, its mask the filled box (for detection); otherwise it is left out.
    Labels are indices into class_names, the categories in the order of their ids.
    Raises DataError for whatever of the json or the image files is unusable and can be known now.
    """

    def __init__(self, json: str | Path, images: str | Path, transform: Callable, *, keep_empty: bool = True, max_images: int = 0,
                 boxes_only: bool = False):
        content = read_coco(Path(json))
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.category_ids: list[int] = [category["id"] for category in categories]
        self.class_names: list[str] = [str(category.get("name", category["id"])) for category in categories]
        self.is_thing: list[bool] = [True] * len(categories)
        self.has_truth = bool(content.get("annotations"))
        self.transform, self.boxes_only, self.images_only = transform, boxes_only, False
        annotations = self._clean(content, json)
        kept = [row for row in content["images"] if keep_empty or any(not a.crowd for a in annotations[row["id"]])]
        kept = kept[:max_images or None]
        if not kept:
            raise DataError(f"{json} lists no images" + (" with objects (keep_empty=True keeps those without)" if content["images"] else ""))
        self.image_ids: list[int] = [row["id"] for row in kept]
        self.file_names: list[Path] = [Path(images) / row["file_name"] for row in kept]
        self.sizes = np.array([(row["height"], row["width"]) for row in kept])
        pickles = [pickle.dumps(annotations[row["id"]]) for row in kept]
        self._ends = np.cumsum([len(data) for data in pickles])
        self._pickles = np.frombuffer(b"".join(pickles), dtype=np.uint8)
        self._check_files(json, images)

    def _clean(self, content: dict, json: str | Path) -> dict[int, list[Annotation]]:
        """The usable annotations of each image id."""
        sizes = {row["id"]: (row["height"], row["width"]) for row in content["images"]}
        labels = {category_id: label for label, category_id in enumerate(self.category_ids)}
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

    def _check_files(self, json: str | Path, images: str | Path) -> None:
        missing = [path for path in self.file_names if not path.is_file()]
        if missing:
            names = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
            raise DataError(f"{len(missing)} of the {len(self)} images of {json} are not in the image folder {images}: {names}; "
                            "give the folder that file_name in the json is relative to")

    def __len__(self) -> int:
        return len(self.image_ids)

    def without_objects(self) -> "CocoDataset":
        """The same images with empty targets: evaluation scores against `truth()`, and masks that nobody looks at need not be drawn."""
        other = copy.copy(self)
        other.images_only = True
        return other

    def annotations(self, index: int) -> list[Annotation]:
        """The cleaned annotations of an image, crowds included."""
        end = self._ends[index]
        return pickle.loads(self._pickles[self._ends[index - 1] if index else 0:end].tobytes())

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[torch.Tensor, dict]:
        """item: index, or (index, key); key seeds this sample's augmentation, index alone means key 0.

        Returns image uint8 (3, H, W) RGB and target = {"labels": int64 (N,), "boxes": float32 (N, 4) cxcywh in 0..1 of (H, W),
        "masks": uint8 (N, H, W), "ignore": None, "image_id": int, "size": (H, W) without padding by the transform, "original_size": (H, W) of the file,
        "key": int}.
        Raises DataError for a broken file or one whose size is not the json's.
        """
        index, key = item if isinstance(item, tuple) else (item, 0)
        image = self._open(index)
        objects = [] if self.images_only else [a for a in self.annotations(index) if not a.crowd]
        target = {"labels": torch.tensor([a.label for a in objects], dtype=torch.int64),
                  "masks": rasterise([a.segmentation for a in objects], image.height, image.width),
                  "image_id": self.image_ids[index], "original_size": (image.height, image.width)}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key)  # not torch.manual_seed, which would seed the GPUs, too
            image, target = self.transform(image, target)
        return image, finish_target(target, image.shape[-2:]) | {"key": key}

    def _open(self, index: int) -> Image.Image:
        """The image file as RGB."""
        path = self.file_names[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError is how Pillow calls a broken PNG
            raise DataError(f"image file {path} cannot be read ({error}): repair it, or take it out of the json") from error
        if image.size != tuple(self.sizes[index, ::-1]):
            height, width = self.sizes[index]
            raise DataError(f"image file {path} is {image.width} x {image.height} pixels (width x height), "
                            f"the json says {width} x {height}: correct one of them")
        return image

    def truth(self) -> dict | None:
        """Ground truth of these images for pycocotools: {"info", "images", "annotations", "categories"}; None when the json has no annotations.

        Annotation ids count from 1 (pycocotools never matches id 0), masks are RLE, crowds are kept, bbox (x, y, w, h) in pixels and area are the
        json's own where usable and the mask's otherwise; an annotation whose mask covers no pixel is left out.
        """
        if not self.has_truth:
            return None
        annotations = []
        for index, (height, width) in enumerate(self.sizes.tolist()):
            for a in self.annotations(index):
                rle = to_rle(a.segmentation, height, width)
                if pixels := int(mask_api.area(rle)):
                    annotations.append({
                        "id": len(annotations) + 1, "image_id": self.image_ids[index], "category_id": self.category_ids[a.label],
                        "iscrowd": int(a.crowd), "segmentation": rle, "bbox": a.bbox or mask_api.toBbox(rle).tolist(),
                        "area": pixels if a.area is None else a.area})
        images = [{"id": image_id, "file_name": path.name, "height": height, "width": width}
                  for image_id, path, (height, width) in zip(self.image_ids, self.file_names, self.sizes.tolist(), strict=True)]
        categories = [{"id": category_id, "name": name} for category_id, name in zip(self.category_ids, self.class_names, strict=True)]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def finish_target(target: dict, size: tuple[int, int]) -> dict:
    """The target of an image of this size (H, W): masks brought to it if the transform left them, vanished objects dropped, boxes from the masks."""
    masks = target["masks"]
    _, H, W = masks.shape
    if (H, W) != size:
        masks = pick(masks, nearest(H, size[0], 0, size[0]), nearest(W, size[1], 0, size[1]))
    boxes, seen = boxes_of_masks(masks)
    if not seen.all():
        masks, boxes, target = masks[seen], boxes[seen], target | {"labels": target["labels"][seen]}
    return {"size": tuple(size)} | target | {"masks": masks.contiguous(), "boxes": boxes, "ignore": None}


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


def _jitter(image: Image.Image, target: dict, size: int, scale_range: tuple[float, float],
            flip: float) -> tuple[torch.Tensor, dict]:
    W, H = image.size
    draw_flip, draw_scale, draw_top, draw_left = torch.rand(4).tolist()
    low, high = scale_range
    scale = (low + (high - low) * draw_scale) * size / max(H, W)
    h, w = max(1, round(H * scale)), max(1, round(W * scale))  # the whole image, resized
    crop_h, crop_w = min(h, size), min(w, size)
    top, left = round(draw_top * (h - crop_h)), round(draw_left * (w - crop_w))
    source = (left * W / w, top * H / h, (left + crop_w) * W / w, (top + crop_h) * H / h)
    image = image.resize((crop_w, crop_h), Image.Resampling.BILINEAR, box=source)
    rows, columns = nearest(H, h, top, crop_h), nearest(W, w, left, crop_w)
    if draw_flip < flip:
        image, columns = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), columns[::-1]
    canvas = torch.zeros((3, size, size), dtype=torch.uint8)
    canvas[:, :crop_h, :crop_w] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    masks = torch.zeros((len(target["masks"]), size, size), dtype=torch.uint8)
    masks[:, :crop_h, :crop_w] = pick(target["masks"], rows, columns)
    return canvas, target | {"masks": masks, "size": (crop_h, crop_w)}


def nearest(old: int, new: int, start: int, length: int) -> np.ndarray:
    """For the places start .. start + length - 1 of a row of `old` pixels resized to `new`: the pixel whose centre is nearest."""
    return (2 * np.arange(start, start + length) + 1) * old // (2 * new)


def pick(masks: torch.Tensor, rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
    """masks (N, H, W) -> (N, len(rows), len(columns)). By numpy's take, which copies runs: five times faster here than torch's indexing."""
    return torch.from_numpy(masks.numpy().take(columns, axis=2).take(rows, axis=1))


def collate(batch: list[tuple[torch.Tensor, dict]]) -> tuple[torch.Tensor, list[dict]]:
    """Samples -> (images uint8 (B, 3, Hp, Wp), targets): zeros right and below up to one size, a multiple of 32.

    In the targets masks are (N, Hp, Wp) and boxes 0..1 of (Hp, Wp); "size" still says (H, W).
    """
    Hp, Wp = (-(-max(image.shape[axis] for image, _ in batch) // 32) * 32 for axis in (1, 2))
    images = torch.zeros((len(batch), 3, Hp, Wp), dtype=torch.uint8)
    targets = []
    for padded, (image, target) in zip(images, batch, strict=True):
        _, H, W = image.shape
        padded[:, :H, :W] = image
        if (H, W) != (Hp, Wp):
            masks = torch.nn.functional.pad(target["masks"], (0, Wp - W, 0, Hp - H))
            target = target | {"masks": masks, "boxes": target["boxes"] * torch.tensor([W / Wp, H / Hp, W / Wp, H / Hp])}
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
# Shapes: circles, squares, triangles and stars on textured ground. Published: what is drawn for (seed, split, number) never changes.

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
    """What make_shapes writes of an image, and the ground's regions, which it does not."""

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


def _write_scene(folder: Path, seed: int, split: int, first: int, number: int) -> tuple[dict, list[dict]]:
    """Draws and saves image `number` of a split; returns its row for the json, with id first + number, and its annotations."""
    scene, image_id = render(seed, split, number), first + number
    Image.fromarray(scene.image).save(folder / f"{image_id:06d}.png")
    return {"id": image_id, "file_name": f"{image_id:06d}.png", "height": SIDE, "width": SIDE}, [_annotation(item) for item in scene.items]


def _write_json(path: Path, rows: list[tuple[dict, list[dict]]]) -> None:
    annotations = [{"image_id": image["id"]} | annotation for image, items in rows for annotation in items]
    path.write_text(jsonlib.dumps({
        "info": {"description": "shapes: circles, squares, triangles and stars, generated by data.py", "version": "1"},
        "images": [image for image, _ in rows],
        "annotations": [{"id": number} | annotation for number, annotation in enumerate(annotations, start=1)],
        "categories": [{"id": number, "name": name, "supercategory": "shape"} for number, name in enumerate(SHAPES, start=1)]}))


def make_shapes(folder: str | Path = "datasets/shapes", train: int = 2000, val: int = 200, seed: int = 0) -> None:
    """Writes the data set: train/*.png, val/*.png, annotations/instances_{train,val}.json. Does nothing when it is there already.

    It grows under another name, so that a killed run leaves nothing that looks finished. Raises DataError when the folder holds something else.
    """
    folder = Path(folder)
    finished = folder / "annotations/instances_val.json"
    if finished.is_file():
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not the shapes data set: move it away, or name another folder")
    growing = folder.with_name(f"{folder.name}.growing-{os.getpid()}")
    try:
        (growing / "annotations").mkdir(parents=True)
        with tqdm(total=train + val, desc=f"generating {folder}", unit=" images") as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
            for split, (name, first, count) in enumerate((("train", 1, train), ("val", train + 1, val))):
                (growing / name).mkdir()
                rows = []
                for row in pool.map(partial(_write_scene, growing / name, seed, split, first), range(count)):
                    rows.append(row)
                    progress.update()
                _write_json(growing / f"annotations/instances_{name}.json", rows)
        if not finished.is_file():  # else another process was faster
            growing.rename(folder)
    finally:
        shutil.rmtree(growing, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# A look at a data set


def describe(dataset: CocoDataset) -> str:
    """Counts of a data set, a line each: images, objects of every class, crowds, images without objects."""
    objects, crowds, empty = Counter(), 0, 0
    for index in range(len(dataset)):
        annotations = dataset.annotations(index)
        objects.update(a.label for a in annotations if not a.crowd)
        crowds += sum(a.crowd for a in annotations)
        empty += all(a.crowd for a in annotations)
    lines = [f"{len(dataset)} images, {empty} without objects; {objects.total()} objects, {crowds} crowds"]
    return "\n".join(lines + [f"  {objects[label]:7d} {name}" for label, name in enumerate(dataset.class_names)])


def draw_page(dataset: CocoDataset, path: Path, count: int = 24, columns: int = 6) -> None:
    """Saves a page of `count` samples, a random but fixed choice, all of one size after its transform, with masks, boxes and class names."""
    palette = [tuple(int(255 * c) for c in colorsys.hsv_to_rgb(label * 0.381966 % 1, 0.8, 1)) for label in range(len(dataset.class_names))]
    tiles = []
    for index in np.random.default_rng(0).permutation(len(dataset))[:count].tolist():
        image, target = dataset[index, index]
        boxes = torchvision.ops.box_convert(target["boxes"], "cxcywh", "xyxy") * torch.tensor(image.shape[:0:-1]).repeat(2)
        if len(boxes):
            colours = [palette[label] for label in target["labels"]]
            names = [dataset.class_names[label] for label in target["labels"]]
            image = torchvision.utils.draw_segmentation_masks(image, target["masks"].bool(), alpha=0.35, colors=colours)
            image = torchvision.utils.draw_bounding_boxes(image, boxes, names, colors=colours)
        tiles.append(image)
    page = torchvision.utils.make_grid(tiles, columns, padding=4, pad_value=255)
    Image.fromarray(page.permute(1, 2, 0).numpy()).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts a data set in COCO's format and draws a page of augmented samples.")
    parser.add_argument("dir", nargs="?", default="datasets/shapes", help="data folder; the default is generated when it is missing")
    parser.add_argument("--split", default="train", choices=("train", "val"))
    parser.add_argument("--json", help="annotation file, where it is not found by itself")
    parser.add_argument("--images", help="image folder, where it is not found by itself")
    parser.add_argument("--out", help="page to write (default: DIR's name in a png in the current folder)")
    args = parser.parse_args()
    try:
        if args.dir == parser.get_default("dir"):
            make_shapes(args.dir)
        json, images = find_coco(args.dir, args.split, args.json, args.images)
        print(f"annotations {json}, images {images}")
        dataset = CocoDataset(json, images, large_scale_jitter(256, (0.5, 1.5)))
        print(describe(dataset))
        out = Path(args.out or f"{Path(args.dir).resolve().name}.png")
        draw_page(dataset, out)
        print(f"page of augmented samples: {out}")
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
