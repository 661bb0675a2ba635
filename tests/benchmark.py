"""What a training step and an inference cost: the lean path of the model, the plain one, and torchvision's Mask R-CNN, side by side in one run.

    python tests/benchmark.py [PRESET] [--image_size=512] [--total_batch=1] [--objects=8] [--steps=5] [--device=cpu] [--data=DIR]
    python tests/benchmark.py [PRESET] --growth                # the lean path alone: more objects, larger images

Any field of Config can be given (--precision=bf16 --checkpoint_activations --compile). The images are noise with ellipses, in memory; with --data those of
a COCO tree, and how long the step waits for them is the column "data"; what the loader does for an image is split up below the table.

The plain path is the method as one would write it down first: full masks of all queries in every prediction set, cost and loss on them, truth
masks as floats, copied for every denoising group. It is also the oracle of the tests. Every path runs in a process of its own, one after the
other, so that its peak of memory is its own. Times are medians; of their absolute values nothing is claimed, the ratios are what counts.
"""
import contextlib
import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.ops import box_convert, sigmoid_focal_loss

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import evaluate
import losses
import maskdino
import train
from losses import WEIGHTS, Output, giou, point_sample, uncertain_points
from maskdino import Config, mask_logits

PATHS = ("lean", "plain", "Mask R-CNN")


# ---------------------------------------------------------------------------------------------------------------- the plain path
def plain_match(logits: Tensor, boxes: Tensor, maps: Tensor, target: dict, points: Tensor) -> Tensor:
    """Hybrid matching of one image and set: logits (Q, K), boxes (Q, 4), full mask logits (Q, h, w), points (P, 2) -> each object's query (n,)."""
    labels, masks, p = target["labels"], target["masks"].to(maps), logits.sigmoid()
    positive, negative = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log(), 0.75 * p ** 2 * -(1 - p + 1e-8).log()
    x = point_sample(maps[:, None], points.expand(len(maps), -1, -1))[:, 0]                             # (Q, P)
    t = point_sample(masks[:, None], points.expand(len(masks), -1, -1))[:, 0]                           # (n, P)
    pairs = x[:, None].expand(-1, len(t), -1), t[None].expand(len(x), -1, -1)
    bce = F.binary_cross_entropy_with_logits(*pairs, reduction="none").mean(-1)
    dice = 1 - (2 * (pairs[0].sigmoid() * pairs[1]).sum(-1) + 1) / (pairs[0].sigmoid().sum(-1) + pairs[1].sum(-1) + 1)
    l1 = (boxes[:, None] - target["boxes"][None]).abs().sum(-1)
    overlap = giou(box_convert(boxes, "cxcywh", "xyxy")[:, None], box_convert(target["boxes"], "cxcywh", "xyxy")[None])
    cost = {"class": (positive - negative)[:, labels], "l1": l1, "giou": -overlap, "mask": bce, "dice": dice}
    query, object_ = linear_sum_assignment(sum(WEIGHTS[k] * c for k, c in cost.items()).detach().cpu().numpy())
    return torch.as_tensor(query)[torch.as_tensor(object_).argsort()].to(labels.device)


def plain_losses(output: Output, targets: list[dict], points: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """What `Criterion` gives for instance segmentation, with its given draws (`points`), set by set and image by image. As many queries as objects."""
    num, slots, found = max(sum(len(t["labels"]) for t in targets), 1), max(len(t["labels"]) for t in targets), {}
    for where, sets, groups in (("", output.sets, 1), ("denoising/", output.denoising, output.groups)):
        for r, (name, p) in enumerate(sets.items()):
            maps, wanted, parts = mask_logits(p.embeddings, output.pixels), torch.zeros_like(p.logits), defaultdict(float)      # all queries' masks
            for b, target in enumerate(targets):
                n, match = len(target["labels"]), points["match"]
                if not n:
                    continue
                if where:                                               # known: every group has its objects in order
                    query = torch.cat([g * slots + torch.arange(n, device=maps.device) for g in range(groups)])
                else:
                    query = plain_match(p.logits[b], p.boxes[b], maps[b], target, match[r if len(match) > 1 else 0, b])
                labels, boxes, masks = (target[k].repeat(groups, *[1] * (target[k].dim() - 1)) for k in ("labels", "boxes", "masks"))
                wanted[b, query, labels] = 1
                parts["l1"] += (p.boxes[b, query] - boxes).abs().sum() / num / groups
                parts["giou"] += (1 - giou(box_convert(p.boxes[b, query], "cxcywh", "xyxy"), box_convert(boxes, "cxcywh", "xyxy"))).sum() / num / groups
                candidates, extra = points["denoising" if where else "sets"][b]
                chosen = uncertain_points(maps[None, b, query], candidates[None, r], extra[None, r])[0]
                x, t = point_sample(maps[b, query][:, None], chosen)[:, 0], point_sample(masks[:, None].to(maps), chosen)[:, 0]
                parts["mask"] += F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(-1).sum() / num / groups
                parts["dice"] += (1 - (2 * (x.sigmoid() * t).sum(-1) + 1) / (x.sigmoid().sum(-1) + t.sum(-1) + 1)).sum() / num / groups
            parts["class"] = sigmoid_focal_loss(p.logits, wanted, alpha=0.25, gamma=2).sum() / num / groups
            found |= {f"{where}{name}/{part}": value for part, value in parts.items()}
    return sum(WEIGHTS[name.rpartition("/")[2]] * value for name, value in found.items()), found


def draw_points(output: Output, targets: list[dict], P: int, dtype: torch.dtype = torch.float32, shared: bool = False) -> dict:
    """Random points in the shapes that `Criterion` and `plain_losses` take; shared: by the masks of an image and set, as `Criterion` draws them."""
    device, R = targets[0]["labels"].device, len(output.sets)

    def rows(sets: int, groups: int) -> list[tuple[Tensor, Tensor]]:
        sizes = [(sets, 1 if shared else groups * len(t["labels"])) for t in targets]
        return [tuple(torch.rand(*size, count, 2, dtype=dtype, device=device) for count in (3 * P, P - int(0.75 * P))) for size in sizes]
    points = {"match": torch.rand(1, len(targets), P, 2, dtype=dtype, device=device), "sets": rows(R, 1)}
    return points | ({"denoising": rows(len(output.denoising), output.groups)} if output.denoising else {})


# ---------------------------------------------------------------------------------------------------------------- one path
def make_batch(batch: int, size: int, objects: int, classes: int, device: str) -> tuple[Tensor, list[dict]]:
    """Noise with ellipses as objects, of a tenth to a third of the image."""
    g = torch.Generator().manual_seed(0)
    images, targets = torch.randint(0, 256, (batch, 3, size, size), generator=g, dtype=torch.uint8), []
    grid = (torch.arange(size) + 0.5) / size
    for i in range(batch):
        wh = 0.1 + 0.23 * torch.rand(objects, 2, generator=g)
        boxes = torch.cat([wh / 2 + (1 - wh) * torch.rand(objects, 2, generator=g), wh], -1)
        dx, dy = ((grid[None] - boxes[:, k, None]) / boxes[:, k + 2, None] * 2 for k in (0, 1))
        masks = (dx[:, None] ** 2 + dy[:, :, None] ** 2 <= 1).to(torch.uint8)
        target = {"labels": torch.randint(classes, (objects,), generator=g), "boxes": boxes, "masks": masks, "size": (size, size), "key": i}
        targets.append({k: v.to(device) if isinstance(v, Tensor) else v for k, v in target.items()})
    return images.to(device), targets


def batches(config: Config, objects: int, steps: int, where: str | None) -> Iterator[tuple[Tensor, list[dict]]]:
    """The same synthetic batch again and again, or those of a training on the data set in `where`."""
    if where is None:
        return repeat(make_batch(config.total_batch, config.image_size, objects, 80, "cpu"), steps)
    dataset = open_training(config, where)
    sampler = data.BatchSampler(len(dataset), total_batch=config.total_batch, steps=steps)
    return iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=data.collate, num_workers=config.workers))


def open_training(config: Config, where: str) -> data.ImageDataset:
    jitter = data.large_scale_jitter(config.image_size, config.scale_jitter, config.flip)
    return data.open_split("instance", "train", jitter, data_dir=where, keep_empty=False)


def loading(dataset: data.ImageDataset, count: int) -> dict[str, float]:
    """Seconds an image of one loading process, by part."""
    spent, names = Counter(), ("decode", "read truth", "jitter", "masks", "boxes")
    for index in range(count):
        times = [time.perf_counter()]

        def done(times: list = times) -> None:
            times.append(time.perf_counter())
        image = dataset._open(index)
        done()
        truth = dataset.read(index)
        done()
        torch.manual_seed(index)
        _, view = dataset.transform(image, truth)
        done()
        masks = dataset.draw(truth, view)[1]
        done()
        data.boxes_of_masks(masks)
        done()
        spent.update(dict(zip(names, np.diff(times).tolist(), strict=True)))
    return {name: seconds / count for name, seconds in spent.items()}


class Clock:
    """Seconds by name, of one step after the other."""

    def __init__(self, device: str) -> None:
        self.device, self.steps = device, []

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str):
        start = self.now()
        yield
        self.steps[-1][name] += self.now() - start

    def watch(self, module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda *_: self.steps[-1].__setitem__("start " + name, self.now()))
        module.register_forward_hook(lambda *_: self.steps[-1].__setitem__(name, self.now() - self.steps[-1].pop("start " + name)))

    def medians(self) -> dict[str, float]:
        steps = self.steps[1:]                                          # the first one warms up
        return {name: torch.tensor([s[name] for s in steps]).median().item() for name in steps[0]}


def run_path(path: str, config: Config, objects: int, steps: int, device: str, where: str | None) -> dict:
    """Medians of a training step's parts and of an inference, and the peak of memory (of the training, in bytes)."""
    torch.manual_seed(0)
    clock, size = Clock(device), config.image_size
    model = (maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=81, min_size=size, max_size=size) if path == "Mask R-CNN"
             else maskdino.MaskDINO(config, 80)).to(device).train()
    if config.compile and path == "lean":
        model.compile_regions()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss_of = mask_rcnn_loss(model, config, clock) if path == "Mask R-CNN" else mask_dino_loss(path, model, clock)
    loader = batches(config, objects, steps + 1, where)
    for _ in range(steps + 1):
        clock.steps.append(defaultdict(float))
        with clock("step"):
            with clock("data"):
                images, targets = next(loader)
            images, targets = images.to(device), train.to_device(targets, torch.device(device))
            loss = loss_of(images, targets)
            with clock("backward"):
                loss.backward()
            with clock("optimizer"):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    taken = clock.medians()
    peak = train.peak_memory(torch.device(device))
    model.eval()
    clock.steps.clear()
    sizes = [(size, size)] * len(images)
    for _ in range(steps + 1):
        clock.steps.append(defaultdict(float))
        with torch.no_grad(), clock("inference"), evaluate.autocast(config, torch.device(device)):
            if path == "Mask R-CNN":
                model([image / 255 for image in images])
            else:
                model.postprocess(model(images, sizes), sizes, sizes)
    return taken | clock.medians() | {"images/s": config.total_batch / taken["step"], "peak GB": peak / 1e9}


def mask_dino_loss(path: str, model: maskdino.MaskDINO, clock: Clock) -> Callable[[Tensor, list[dict]], Tensor]:
    config, criterion = model.config, losses.Criterion(model.config)
    clock.watch(model.backbone, "backbone")
    clock.watch(model.pixel_decoder, "encoder")
    matching_cost, assign = losses.matching_cost, losses.assign

    def timed(function):
        def run(*arguments):
            with clock("matcher"):
                return function(*arguments)
        return run
    losses.matching_cost, losses.assign = timed(matching_cost), timed(assign)

    def loss_of(images: Tensor, targets: list[dict]) -> Tensor:
        now = clock.steps[-1]
        with clock("decoder"), evaluate.autocast(config, images.device):
            output = model(images, [t["size"] for t in targets], targets)
        now["decoder"] -= now["backbone"] + now["encoder"]
        with clock("criterion"):
            if path == "plain":
                return plain_losses(output, targets, draw_points(output, targets, config.mask_points))[0]
            loss = criterion(output, targets)[0]
        now["criterion"] -= now["matcher"]
        return loss
    return loss_of


def mask_rcnn_loss(model: nn.Module, config: Config, clock: Clock) -> Callable[[Tensor, list[dict]], Tensor]:
    clock.watch(model.backbone, "backbone")

    def loss_of(images: Tensor, targets: list[dict]) -> Tensor:
        scale = torch.tensor(images.shape[:1:-1], device=images.device).repeat(2)
        truth = [{"boxes": box_convert(t["boxes"], "cxcywh", "xyxy") * scale, "labels": t["labels"] + 1, "masks": t["masks"]} for t in targets]
        with evaluate.autocast(config, images.device):
            return sum(model([image / 255 for image in images], truth).values())
    return loss_of


# ---------------------------------------------------------------------------------------------------------------- side by side
COLUMNS = ("data", "backbone", "encoder", "decoder", "matcher", "criterion", "backward", "optimizer", "step", "inference", "images/s",
           "peak GB")


def apart(path: str, *arguments: str) -> dict:
    """`run_path` in a process of its own."""
    ran = subprocess.run([sys.executable, __file__, *sys.argv[1:], *arguments, f"--path={path}"], capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"error: the {path} path failed:\n{ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1])


def show(name: str, row: dict) -> None:
    print(f"{name:12}" + "".join(f"{row[column]:11.3f}" if column in row else f"{'':11}" for column in COLUMNS), flush=True)


def main() -> None:
    actions = {"path": str, "objects": int, "steps": int, "device": str, "data": str, "growth": bool}
    words, given, overrides = maskdino.parse_overrides(sys.argv[1:], actions)
    given = {"objects": 8, "steps": 5, "device": "cuda" if torch.cuda.is_available() else "cpu", "data": None} | given
    name = words[0] if words else "coco_instance_r50_50ep"
    config = maskdino.preset(name, **{"image_size": 512, "total_batch": 1} | overrides)
    if "path" in given:
        return print(json.dumps(run_path(given["path"], config, given["objects"], given["steps"], given["device"], given["data"])))
    print(f"{name}, {config.image_size} x {config.image_size}, batch {config.total_batch}, {given['objects']} objects an image, {given['device']}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}; seconds, medians of {given['steps']}")
    print(f"{'':12}" + "".join(f"{column:>11}" for column in COLUMNS), flush=True)
    if given.get("growth"):
        for objects in (1, 10, 30, 100):
            show(f"{objects} objects", apart("lean", f"--objects={objects}"))
        for size in (256, 512, 768, 1024):
            show(f"{size} pixels", apart("lean", f"--image_size={size}"))
        return None
    rows = {path: apart(path) for path in PATHS}
    for path, row in rows.items():
        show(path, row)
    for path in PATHS[:2]:
        ratios = [rows[path][key] / rows["Mask R-CNN"][key] for key in ("step", "inference", "peak GB")]
        print("{} to Mask R-CNN: step {:.2f}, inference {:.2f}, memory {:.2f}".format(path, *ratios))
    if given["data"]:
        parts = loading(open_training(config, given["data"]), 50)
        print(f"loader: {1 / sum(parts.values()):.0f} images/s a worker; ms an image: " + ", ".join(f"{part} {1000 * t:.1f}" for part, t in parts.items()))


if __name__ == "__main__":
    main()
