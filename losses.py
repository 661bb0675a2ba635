"""Matching and losses of Mask DINO (arXiv 2206.02777, section 3.6 and appendix B.1) and its siblings: what a model says, held against the truth.

A prediction carries mask embeddings instead of masks. Costs sample the pixel embedding map at random points, losses make the maps of matched
queries alone: full masks of all queries, which are most of the work elsewhere, are never made. Notation as in maskdino.py.
"""
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, sigmoid_focal_loss

WEIGHTS = {"class": 4.0, "l1": 5.0, "giou": 2.0, "mask": 5.0, "dice": 5.0}      # of costs and losses alike (appendix B.1); the class has two, see Config

# Sampled logits made at once, in the matcher and in the losses (one set's at least): temporaries stay small enough for caches and for memory that is
# used again. Everything at once needs gigabytes, which an operating system hands out more slowly than they are computed.
POINTS_AT_ONCE = 2 ** 22


# ---------------------------------------------------------------------------------------------------------------- what is compared
class Prediction(NamedTuple):
    """What one place of the model says about every query."""
    logits: Tensor                  # (B, Q, K); with class_loss=ce K + 1, the last for no object
    boxes: Tensor | None            # (B, Q, 4); None without a detection head
    embeddings: Tensor | None       # (B, Q, C): mask logits = embeddings times the pixel embedding map; None when the task has no masks


class Output(NamedTuple):
    """Everything the model says about a batch. The last of `sets` is the answer."""
    padded: tuple[int, int]                 # (H, W) of the padded images
    pixels: Tensor | None                   # (B, C, H/4, W/4) pixel embedding map; None when the task has no masks
    sets: dict[str, Prediction]             # "selection", "initial", "layer1" ... in this order, as far as the configuration has them
    denoising: dict[str, Prediction]        # "initial", "layer1" ...: the denoising queries' part; empty without denoising
    groups: int                             # denoising groups; 0 without denoising


class Truth(NamedTuple):
    """Targets of a batch, padded to N objects an image. Masks stay as they are, one (n, H, W) uint8 tensor an image."""
    labels: Tensor          # (B, N) int64
    boxes: Tensor           # (B, N, 4)
    valid: Tensor           # (B, N) bool
    boxed: Tensor           # (B, N) bool: objects whose boxes count; with decoupled boxes things alone
    counts: list[int]
    masks: list[Tensor] | None
    ignore: list[Tensor | None]         # (H, W) bool an image: pixels that take no part in costs and losses of masks

    @classmethod
    def of(cls, targets: list[dict], masks: bool, boxed: Tensor | None = None) -> Self:
        """boxed (K,) bool: the classes whose boxes count; None: all."""
        labels = pad_sequence([t["labels"] for t in targets], batch_first=True)
        boxes = pad_sequence([t["boxes"] for t in targets], batch_first=True)
        counts = [len(t["labels"]) for t in targets]
        valid = torch.arange(labels.shape[1])[None] < torch.tensor(counts)[:, None]
        valid = valid.to(labels.device)
        boxed = valid if boxed is None else valid & boxed.to(labels.device)[labels]
        return cls(labels, boxes, valid, boxed, counts, [t["masks"] for t in targets] if masks else None, [t.get("ignore") for t in targets])


def generator(target: dict, stream: int, device: torch.device) -> torch.Generator:
    """The random numbers of one image: a function of its "key" alone, so that they do not depend on batch, process or resume."""
    key = target["key"] if "key" in target else int(torch.randint(2 ** 31, ()))
    return torch.Generator(device).manual_seed(2 * key + stream)


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples: maps (B, C, h, w), points (B, P, 2) as (x, y) in 0..1 -> (B, C, P)."""
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[..., 0]


def sample_masks(masks: Tensor, points: Tensor) -> Tensor:
    """Truth masks uint8 (n, H, W) at points (n, P, 2) -> (n, P). A few at a time become floats: a hundred full ones would be most of the memory."""
    samples = [point_sample(m[:, None].to(p), p)[:, 0] for m, p in zip(masks.split(16), points.split(16), strict=True)]
    return torch.cat(samples) if samples else points.new_zeros(points.shape[:2])


def cell_centres(shapes: list[tuple[int, int]], like: Tensor) -> Tensor:
    """(S, 2): (x, y) of every token's cell in 0..1 of its map."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    rows = []
    for h, w in shapes:
        y, x = ((torch.arange(n, device=like.device, dtype=dtype) + 0.5) / n for n in (h, w))
        rows.append(torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1).flatten(0, 1))
    return torch.cat(rows)


def move_points(points: Tensor, ignore: Tensor) -> Tensor:
    """Points (..., P, 2) of an image, those that touch an ignored pixel moved onto others that do not, in turn. ignore (H, W) bool.

    So costs and losses, which are means over points, know nothing of what is ignored, and need not ask.
    """
    touches = point_sample(ignore[None, None].to(points), points.reshape(1, -1, 2)).view(points.shape[:-1]) > 0
    kept = (~touches).sum(-1, keepdim=True).clamp(min=1)
    index = touches.int().argsort(stable=True).gather(-1, (torch.arange(points.shape[-2], device=points.device) % kept))
    return points.gather(-2, index[..., None].expand(points.shape))


def uncertain_points(maps: Tensor, candidates: Tensor, extra: Tensor) -> Tensor:
    """PointRend's importance sampling (arXiv 1912.08193): of the candidates those whose logits are nearest to 0, and random ones.

    maps (R, n, h, w) logits, candidates (R, m, 3P, 2), extra (R, m, P / 4, 2) -> (R, n, P, 2). m = n, or m = 1: maps share their set's draws, which
    costs a third, as every map is sampled at the same places; every map still chooses for itself. The choice carries no gradient. No candidates (and any
    number of others): all the others.
    """
    R, m, count, _ = candidates.shape
    n = maps.shape[1]
    with torch.no_grad():
        uncertainty = point_sample(maps.view(R * m, n // m, *maps.shape[2:]), candidates.flatten(0, 1)).view(R, n, count).abs_()
        chosen = uncertainty.topk(max(count // 3 - extra.shape[2], 0), largest=False, sorted=False).indices
        chosen = candidates.expand(-1, n, -1, -1).gather(2, chosen[..., None].expand(-1, -1, -1, 2))
        return torch.cat([chosen, extra.expand(-1, n, -1, -1)], 2)


# ---------------------------------------------------------------------------------------------------------------- matching
def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU (arXiv 1902.09630) of boxes xyxy, broadcast over all but the last dimension."""
    area = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)]
    inter = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = area[0] + area[1] - inter
    return inter / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def class_costs(logits: Tensor, kind: str) -> Tensor:
    """What it costs a query to be of each class: logits (..., K or K + 1) -> the same shape. kind: Config.class_cost."""
    if kind == "probability":
        return -logits.softmax(-1)
    p, alpha, gamma = logits.sigmoid(), 0.25, 2
    return alpha * (1 - p) ** gamma * -(p + 1e-8).log() - (1 - alpha) * p ** gamma * -(1 - p + 1e-8).log()


def matching_cost(sets: Prediction, pixels: Tensor, truth: Truth, points: Tensor | None, parts: Sequence[str], class_cost: str = "focal") -> dict[str, Tensor]:
    """Unweighted cost terms (section 3.6), each (R, B, Q, N), for stacked prediction sets (R, B, Q, ...).

    points (1 or R, B, P, 2): where masks are compared, shared by all masks of an image. A mask logit is a dot product with the pixel embedding and
    sampling is linear, so the embedding is sampled once per image and no query's full mask is ever made.
    """
    R, B, Q, _ = sets.logits.shape
    N = truth.labels.shape[1]
    cost = {"class": class_costs(sets.logits, class_cost).gather(-1, truth.labels[None, :, None].expand(R, B, Q, N))}
    if "l1" in parts:
        cost["l1"] = (sets.boxes[..., :, None, :] - truth.boxes[None, :, None]).abs().sum(-1)
        cost["giou"] = -giou(box_convert(sets.boxes, "cxcywh", "xyxy")[..., :, None, :], box_convert(truth.boxes, "cxcywh", "xyxy")[None, :, None])
        boxed = truth.boxed[:, None]                                                                                    # (B, 1, N)
        for part in ("l1", "giou"):                         # decoupled boxes (section 3.6): stuff costs what things cost on average, so that it can compete
            mean = (cost[part] * boxed).sum((2, 3), keepdim=True) / (boxed.sum((1, 2), keepdim=True) * Q).clamp(min=1)
            cost[part] = torch.where(boxed, cost[part], mean)
    if "mask" in parts:
        points = points.to(pixels).unbind(1)                                                                            # (1 or R, P, 2) each
        points = torch.stack([p if i is None else move_points(p, i) for p, i in zip(points, truth.ignore, strict=True)])   # (B, 1 or R, P, 2)
        pixel = point_sample(pixels, points.flatten(1, 2)).unflatten(-1, points.shape[1:3]).movedim(2, 0)               # (1 or R, B, C, P)
        t = [sample_masks(m, p.flatten(0, 1).expand(len(m), -1, -1)) for m, p in zip(truth.masks, points, strict=True)]
        t = pad_sequence(t, batch_first=True).unflatten(-1, points.shape[1:3]).movedim(2, 0)                            # (1 or R, B, N, P)
        at_once = max(1, POINTS_AT_ONCE // (B * Q * points.shape[2]))
        chunks = zip(*(v.expand(R, -1, -1, -1).split(at_once) for v in (sets.embeddings, pixel, t)), strict=True)
        parts = [mask_costs(*chunk) for chunk in chunks]
        cost["mask"], cost["dice"] = (torch.cat(part) for part in zip(*parts, strict=True))
    return cost


def mask_costs(embeddings: Tensor, pixel: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """BCE and dice, each (R, B, Q, N), between queries (R, B, Q, C) and objects t (R, B, N, P) at P points of the pixel embedding, (R, B, C, P)."""
    x = embeddings @ pixel                                                                                              # (R, B, Q, P)
    # BCE with logits is softplus(x) - x t: the sum over points splits into a term of the query and a matrix product.
    bce = (F.softplus(x).sum(-1)[..., None] - x @ t.mT) / x.shape[-1]
    p = x.sigmoid_()
    return bce, 1 - (2 * (p @ t.mT) + 1) / (p.sum(-1)[..., None] + t.sum(-1)[:, :, None] + 1)


def assign(cost: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Hungarian matching: total cost (R, B, Q, N) -> each object's query (R, B, N), and whether it got one (more objects than queries: not all do)."""
    R, B, Q, N = cost.shape
    table = np.nan_to_num(cost.detach().cpu().double().numpy(), nan=1e10, posinf=1e10, neginf=-1e10)        # one copy; the criterion reports a NaN
    query, found = np.zeros((R, B, N), np.int64), np.zeros((R, B, N), bool)
    for r in range(R):
        for b, n in enumerate(counts):
            q, o = linear_sum_assignment(table[r, b, :, :n])
            query[r, b, o], found[r, b, o] = q, True
    return torch.from_numpy(query).to(cost.device), torch.from_numpy(found).to(cost.device)


class Matcher(nn.Module):
    """Hybrid matching (section 3.6). weights: of the cost terms that take part."""

    def __init__(self, weights: dict[str, float], class_cost: str) -> None:
        super().__init__()
        self.weights, self.class_cost = weights, class_cost

    def forward(self, sets: Prediction, pixels: Tensor | None, truth: Truth, points: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Stacked sets -> the weighted cost terms, each (R, B, Q, N), and what `assign` makes of their sum."""
        cost = matching_cost(sets, pixels, truth, points, list(self.weights), self.class_cost)
        cost = {part: weight * cost[part] for part, weight in self.weights.items()}
        return cost, *assign(sum(cost.values()), truth.counts)


# ---------------------------------------------------------------------------------------------------------------- losses
class Criterion(nn.Module):
    """Matching and the losses of every prediction set: class, L1 and GIoU of boxes where the model predicts some, BCE and dice of masks.

    All parts are divided by the number of objects (times groups for denoising) and weigh the same in every set. config: a maskdino.Config.
    is_thing: of each class; stuff of panoptic models has no box loss (decoupled boxes, section 3.6).
    """

    def __init__(self, config: Any, is_thing: Sequence[bool] | None = None) -> None:
        super().__init__()
        self.config = config
        self.boxed = torch.tensor(is_thing) if is_thing and config.task == "panoptic" and config.decoupled_boxes else None
        absent = ("mask", "dice") * (not config.masks) + ("l1", "giou") * (not config.detection_head)
        self.weights = {k: w for k, w in WEIGHTS.items() if k not in absent} | {"class": config.class_weight}
        if config.detection_head and not config.box_loss:
            self.weights |= {"l1": 0.0, "giou": 0.0}            # still computed, so that the box head stays in the graph
        kinds = {"class": "hybrid box mask", "l1": "hybrid box", "giou": "hybrid box", "mask": "hybrid mask", "dice": "hybrid mask"}
        costs = self.weights | {"class": config.class_cost_weight}
        self.cost_parts = [k for k, uses in kinds.items() if config.matching in uses.split() and costs.get(k)]
        self.matcher = Matcher({part: costs[part] for part in self.cost_parts}, config.class_cost)

    def forward(self, output: Output, targets: list[dict], num_objects: float | None = None, points: dict | None = None) -> tuple[Tensor, dict]:
        """Weighted total and the unweighted parts, {"layer9/mask": scalar, "denoising/layer9/mask": ...}; a cost that is not finite, which makes the
        total so, is told as "matching/mask".

        num_objects: normaliser; default the objects in this batch. In distributed or accumulated training: max(objects in the effective batch, 1)
        divided by the number of processes. points: given draws, {"match": (1 or R, B, P, 2), "sets": [(candidates, extra)] per image, "denoising": the same},
        candidates (R, m, 3P, 2), extra (R, m, P / 4, 2), m = G * n or 1, all uniform in 0..1; default: drawn from each image's generator, m = 1.
        """
        device = targets[0]["labels"].device
        with torch.autocast(device.type, enabled=False):
            pixels = None if output.pixels is None else full_precision(output.pixels)
            truth = Truth.of(targets, self.config.masks, self.boxed)
            num = float(max(sum(truth.counts), 1)) if num_objects is None else num_objects
            generators = [generator(t, 1, device) for t in targets]
            points = points or {"match": self.match_points(pixels, generators, device)}
            sets = stack(output.sets)
            with torch.no_grad():
                cost, query, found = self.matcher(sets, pixels, truth, points["match"])
            losses = self.losses_of(sets, pixels, truth, query, found, 1, num, points.get("sets"), generators)
            losses = {f"{name}/{part}": loss[r] for part, loss in losses.items() for r, name in enumerate(output.sets)}
            if output.denoising:
                known = torch.arange(output.groups * truth.labels.shape[1], device=device).expand(len(output.denoising), len(targets), -1)
                valid = truth.valid.repeat(1, output.groups).expand_as(known)
                parts = self.losses_of(stack(output.denoising), pixels, truth, known, valid, output.groups, num * output.groups,
                                       points.get("denoising"), generators)
                losses |= {f"denoising/{name}/{part}": loss[r] for part, loss in parts.items() for r, name in enumerate(output.denoising)
                           if self.config.denoising == "mask" or part not in ("mask", "dice")}
            if not sum(cost.values()).isfinite().all():         # a query that got no object may hide it from the losses
                losses |= {f"matching/{part}": term.sum() for part, term in cost.items() if not term.isfinite().all()}
            total = sum(self.weights[name.rpartition("/")[2]] * loss for name, loss in losses.items())
        return total, losses

    def match_points(self, pixels: Tensor | None, generators: list[torch.Generator], device: torch.device) -> Tensor:
        """Where masks are compared, (1, B, P, 2): random points, or the centres of all cells of the pixel embedding map."""
        if self.config.matching_on == "masks":
            return cell_centres([pixels.shape[-2:]], pixels).expand(1, len(pixels), -1, -1)
        return torch.stack([torch.rand((self.config.mask_points, 2), generator=g, device=device) for g in generators])[None]

    def losses_of(self, sets: Prediction, pixels: Tensor, truth: Truth, query: Tensor, found: Tensor, groups: int, num: float,
                  draws: list | None, generators: list[torch.Generator]) -> dict[str, Tensor]:
        """Unweighted losses (R,) of R stacked sets. query (R, B, G * N): which query answers for which object; found: whether one does."""
        R, B, Q, K = sets.logits.shape
        labels, boxes = truth.labels.repeat(1, groups), truth.boxes.repeat(1, groups, 1)                    # (B, G * N)
        r, b = torch.arange(R, device=query.device)[:, None, None], torch.arange(B, device=query.device)[None, :, None]
        wanted = torch.zeros_like(sets.logits).index_put((r, b, query, labels[None]), found.to(sets.logits), accumulate=True)
        if self.config.class_loss == "focal":
            losses = {"class": sigmoid_focal_loss(sets.logits, wanted, alpha=0.25, gamma=2).flatten(1).sum(1) / num}
        else:
            losses = {"class": cross_entropy(sets.logits, wanted)}
        if sets.boxes is not None:
            own = sets.boxes[r, b, query]                                                                   # (R, B, G * N, 4)
            overlap = giou(box_convert(own, "cxcywh", "xyxy"), box_convert(boxes, "cxcywh", "xyxy"))
            counts = found & truth.boxed.repeat(1, groups)                                                  # yet divided by all objects
            losses["l1"] = ((own - boxes).abs().sum(-1) * counts).sum((1, 2)) / num
            losses["giou"] = ((1 - overlap) * counts).sum((1, 2)) / num
        if truth.masks is not None:
            own = sets.embeddings[r, b, query].unflatten(2, (groups, -1))                                   # (R, B, G, N, C)
            parts = [self.mask_losses(own[:, i, :, :n].flatten(1, 2), pixels[i], truth.masks[i], truth.ignore[i],
                                      draws[i] if draws else None, generators[i])
                     for i, n in enumerate(truth.counts)]
            kept = [found[:, i].unflatten(1, (groups, -1))[:, :, :n].flatten(1) for i, n in enumerate(truth.counts)]
            for k, name in enumerate(("mask", "dice")):
                losses[name] = sum((part[k] * keep).sum(1) for part, keep in zip(parts, kept, strict=True)) / num
        return losses

    def mask_losses(self, embeddings: Tensor, pixels: Tensor, masks: Tensor, ignore: Tensor | None, draws: tuple | None,
                    g: torch.Generator) -> tuple[Tensor, Tensor]:
        """BCE and dice, each (R, G * n), of one image's matched rows: embeddings (R, G * n, C), pixels (C, h, w), masks (n, H, W)."""
        R, total, _ = embeddings.shape
        n, P = len(masks), self.config.mask_points
        if n == 0:
            nothing = embeddings.sum(-1) + 0 * pixels.sum()                                                 # (R, 0), yet in the graph
            return nothing, nothing
        if draws is None and self.config.loss_on == "masks":
            draws = pixels.new_zeros(R, 1, 0, 2), cell_centres([pixels.shape[-2:]], pixels).expand(R, 1, -1, -1)       # none to choose from: all cells
        elif draws is None:
            draws = [torch.rand((R, 1, count, 2), generator=g, device=pixels.device).to(pixels) for count in (3 * P, P - int(0.75 * P))]
        if ignore is not None:
            draws = [move_points(d, ignore) for d in draws]
        at_once = max(1, POINTS_AT_ONCE // (sum(d.shape[2] for d in draws) * total))
        parts = [point_losses(torch.einsum("rqc,chw->rqhw", e, pixels), masks, uncertain, extra)                        # only the matched rows' masks
                 for e, uncertain, extra in zip(*(v.split(at_once) for v in (embeddings, *draws)), strict=True)]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def point_losses(maps: Tensor, masks: Tensor, candidates: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
    """BCE and dice, each (R, q), of mask logits maps (R, q = G * n, h, w) against truth masks (n, H, W), at points chosen by `uncertain_points`."""
    points = uncertain_points(maps, candidates, extra).flatten(0, 1)                                        # (R * q, P, 2)
    x = point_sample(maps.flatten(0, 1)[:, None], points)[:, 0]
    grouped = points.unflatten(0, (-1, len(masks))).transpose(0, 1).flatten(1, 2)                           # (n, R * G * P, 2): each mask sampled once
    t = sample_masks(masks, grouped).unflatten(1, (-1, points.shape[1])).transpose(0, 1).flatten(0, 1)      # (R * q, P)
    bce = F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(-1)
    p = x.sigmoid()
    dice = 1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)
    return bce.view(maps.shape[:2]), dice.view(maps.shape[:2])


def cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """(R,): weighted mean over the queries of each set; no object, the last class, weighs 0.1. logits, wanted (0 or 1): (R, B, Q, K + 1)."""
    K = logits.shape[-1] - 1
    label = torch.where(wanted.any(-1), wanted.argmax(-1), K)                                               # (R, B, Q)
    weight = logits.new_ones(K + 1).index_fill(0, torch.tensor(K, device=logits.device), 0.1)
    loss = F.cross_entropy(logits.flatten(0, 2), label.flatten(), weight, reduction="none").view_as(label)
    return loss.sum((1, 2)) / weight[label].sum((1, 2))


def full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def stack(sets: dict[str, Prediction]) -> Prediction:
    """Prediction sets side by side: (R, B, Q, ...), in full precision."""
    return Prediction(*(None if parts[0] is None else full_precision(torch.stack(parts)) for parts in zip(*sets.values(), strict=True)))
