"""Mask DINO (arXiv 2206.02777): one transformer that detects objects and segments them. The whole model, in the order in which data flows.

    import maskdino
    model, classes = maskdino.load("runs/shapes/checkpoint.pth")
    predictions = model.predict(["photo.jpg"])         # [{scores, labels, boxes, masks}], in pixels of the photo

    python maskdino.py [PRESET | CHECKPOINT]           # a tour: every room's tensors, parameters and GFLOPs

As DINO (arXiv 2203.03605), except
- every prediction has a mask: the query's embedding times a pixel embedding map (section 3.4, equation 1);
- the queries come from encoder tokens that already predict class, box and mask, and their anchors from those masks (section 3.5);
- denoising, matching and losses know masks, too (section 3.6).
Where the released code and the paper disagree, a comment says so; we follow the code where its checkpoints depend on it.
Mask2Former and DFormer (mask2former.py, dformer.py) are told as differences from this file, and share what is here.

Notation, here and in every other file
    B batch, Q queries, T denoising queries, G denoising groups, K classes, N objects (in the batch's fullest image)
    L levels, from high to low resolution everywhere; S tokens = sum of H * W over levels
    C channels, M heads, P points (of the attention per head and level; of the losses per mask)
    R prediction sets: the selection, the initial prediction, one for each decoder layer
    boxes are cxcywh in 0..1 of the padded image unless a name says otherwise; masks are logits until compared with 0
"""
import contextlib
import dataclasses
import difflib
import importlib
import json
import math
import os
import pickle
import re
import sys
import typing
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Literal, NamedTuple
from urllib.error import URLError

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")                      # huge pages for large CPU tensors: without, the losses take half as long again

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer, SwinTransformerBlock
from torchvision.ops import FrozenBatchNorm2d, box_convert
from torchvision.transforms.v2.functional import pil_to_tensor

from kernels import ms_deform_attn
from losses import Output, Prediction, cell_centres, generator

CLASS_LISTS = Path(__file__).parent / "assets" / "classes.json"        # of the data sets that models were released for


class ConfigError(ValueError):
    """A configuration, checkpoint or command line that cannot be used: one sentence that names the thing and the remedy."""


# ---------------------------------------------------------------------------------------------------------------- configuration
@dataclass(frozen=True)
class Config:
    """Everything that defines a run: model, data and schedule. The defaults are Mask DINO R50, 50 epochs, as released."""
    # model
    model: Literal["maskdino", "mask2former", "dformer"] = "maskdino"
    task: Literal["detection", "instance", "panoptic", "semantic"] = "instance"     # detection: no masks anywhere (Table 11, "box only")
    backbone: Literal["resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "swin_t", "swin_s", "swin_b", "swin_l"] = "resnet50"
    backbone_norm: Literal["frozen", "batch", "group"] = "frozen"    # of ResNets; frozen only makes sense with trained weights
    backbone_weights: str = "imagenet"                               # imagenet | none | a path
    levels: tuple[int, ...] = (8, 16, 32, 64)                        # strides of the encoder's levels; past 32 by extra convolutions
    decoder_levels: int = 0                                          # how many of them, finest first, the decoder sees (Table 10); 0 = all
    hidden: int = 256
    heads: int = 8
    attention_points: int = 4
    enc_layers: int = 6
    enc_ffn: int = 2048
    dec_layers: int = 9                                              # Table 12
    dec_ffn: int = 2048
    queries: int = 300
    two_stage: bool = True                                           # queries selected from encoder tokens; else learned
    # Unified query selection (Table 15); zero: only positions are learned; pooled: from the pixels inside noisy masks (DFormer).
    content_queries: Literal["selected", "learned", "zero", "pooled"] = "selected"
    box_init: Literal["token", "mask2box", "bitmask"] = "mask2box"   # anchors from the token, or from its mask (Table 9)
    smallest_proposal: Literal["coarse", "fine"] = "coarse"          # which level's proposals are 0.05 wide; doubles level by level
    initial_prediction: bool = True                                  # predict before the first decoder layer, too
    class_loss: Literal["focal", "ce"] = "focal"                     # ce: cross-entropy with a no-object class
    class_cost: Literal["focal", "probability"] = "focal"            # in the matching; probability: with ce
    class_weight: float = 4.0                                        # of the loss
    class_cost_weight: float = 4.0                                   # in the matching
    denoising: Literal["mask", "box", "none"] = "mask"               # unified denoising (Table 15)
    denoising_queries: int = 100
    label_noise: float = 0.2                                         # appendix B.2
    box_noise: float = 0.4
    matching: Literal["hybrid", "box", "mask"] = "hybrid"            # cost terms beside the class (Table 13)
    box_loss: bool = True                                            # False: Table 11, "mask only"
    decoupled_boxes: bool = True                                     # panoptic: stuff has no boxes in losses and matching (Table 14)
    mask_points: int = 12544                                         # points per mask in matching and losses
    matching_on: Literal["points", "masks"] = "points"               # masks: every cell of them (Mask2Former, Table 5)
    loss_on: Literal["points", "masks"] = "points"
    detection_head: bool = True                                      # predict boxes; without, an instance's box is its mask's (Table 1)
    masked_attention: bool = True                                    # Mask2Former (Table 4a): a query looks inside its last mask only
    self_attention_first: bool = False                               # Mask2Former (Table 4b): else each layer starts with cross-attention
    dropout: float = 0.0                                             # Mask2Former (Table 4b), in its decoder: the paper leaves it out
    attention_strides: tuple[int, ...] = ()                          # Mask2Former (Table 4d): levels that its decoder sees; () = all
    round_robin: bool = True                                         # Mask2Former (Table 4d): one of them a layer, coarse to fine; else all in each
    noise_scale: float = 0.1                                         # DFormer: masks are -b and b before noise of variance 1 comes
    mask_encoding: Literal["binary", "shuffled"] = "binary"          # DFormer; shuffled: random grey values, brighter inside an object
    sampling_steps: int = 1                                          # DFormer, at inference
    sampling_eta: float = 1.0                                        # DFormer: 0 = no fresh noise between steps (DDIM)
    detections: int = 100                                            # instances kept per image at inference
    object_threshold: float = 0.25                                   # panoptic: queries below it are not drawn
    overlap_threshold: float = 0.8                                   # panoptic: nor those of whose mask less is left over
    temperature: float = 0.06                                        # panoptic, semantic: sharpens class scores; 0 = leaves them
    # data
    image_size: int = 1024                                           # training: jittered, cropped and padded to this square
    crop_height: int = 0                                             # semantic: of the crops, where they are wider than high; 0 = image_size
    scale_jitter: tuple[float, float] = (0.1, 2.0)                   # of the size that fits; semantic: of the shorter edge
    single_category: float = 1.0                                     # semantic: no class has a larger share of a crop; 1 = off
    colour_jitter: bool = True                                       # semantic: brightness, contrast, saturation, hue
    flip: float = 0.5
    test_short: int = 800
    test_long: int = 1333
    keep_empty: bool = False                                         # train on images without objects
    skip_bad_images: bool = False                                    # leave out files that cannot be used instead of stopping; all are read once for it
    max_images: int = 0                                              # 0 = all
    evaluate_on: Literal["val", "train"] = "val"
    workers: int = 4
    # schedule
    total_batch: int = 16                                            # images per step, over all processes and accumulation
    accumulate: int = 1
    iterations: int = 368_750
    max_steps: int = 0                                               # stop early, schedule untouched; 0 = run to the end
    lr: float = 1e-4
    backbone_lr: float = 0.1                                         # times lr
    lr_schedule: Literal["step", "cosine", "poly"] = "step"
    lr_drops: tuple[int, ...] = (327_778, 355_092)                   # the paper says 0.9 and 0.95 of the run, the released configuration this
    warmup: int = 0                                                  # released: 10 iterations at factor 1, that is none
    weight_decay: float = 0.05
    clip: float = 0.01                                               # gradient norm of the whole model
    ema: float = 0.0                                                 # decay; 0 = off
    precision: Literal["auto", "fp32", "bf16"] = "auto"              # auto: bf16 autocast on GPUs that have it
    checkpoint_activations: bool = False                             # layers are computed again for their backward: less memory, more time
    compile: bool = False                                            # torch.compile of backbone and layers: two graphs each on mixed image sizes
    seed: int = 0
    max_bad_steps: int = 10                                          # non-finite losses in a row until the run stops
    log_every: int = 20                                              # steps
    checkpoint_every: int = 5000
    evaluate_every: int = 0                                          # 0 = only at the end

    @property
    def masks(self) -> bool:
        return self.task != "detection"

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(Config).items():
            if typing.get_origin(kind) is Literal and getattr(self, name) not in typing.get_args(kind):
                raise ConfigError(f"--{name}={getattr(self, name)}: choose one of {', '.join(typing.get_args(kind))}")
            if typing.get_origin(kind) is tuple:
                object.__setattr__(self, name, tuple(getattr(self, name)))              # JSON has lists
        ladder = [2 ** i for i in range(2, 2 + len(self.levels) + 1)]
        if not self.levels or list(self.levels) not in (ladder[:-1], ladder[1:]):
            raise ConfigError(f"--levels={self.levels}: strides from 4 or 8 on, each twice the one before, as in 8,16,32")
        if not 0 <= self.decoder_levels <= len(self.levels):
            raise ConfigError(f"--decoder_levels={self.decoder_levels}: there are {len(self.levels)} levels")
        if list(self.attention_strides) != [stride for stride in self.levels if stride in self.attention_strides]:
            raise ConfigError(f"--attention_strides={self.attention_strides}: some of --levels={self.levels}, in that order")
        if self.hidden % 32 or self.hidden % self.heads:
            raise ConfigError(f"--hidden={self.hidden}: must be a multiple of 32 (group norm) and of --heads={self.heads}")
        if self.backbone.startswith("swin") and (32 not in self.levels or not self.masks and 4 not in self.levels):
            raise ConfigError(f"--backbone={self.backbone} needs all its four maps: --levels=4,8,16,32")        # unused ones would get no gradient
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--dropout={self.dropout:g}: a share of 1, as in 0.1")
        if wrong := misfit(self, file_of(self.model).SUPPORTED):
            raise ConfigError(f"--model={self.model} does not know {wrong}")
        if self.class_cost == "probability" and self.class_loss != "ce":
            raise ConfigError("--class_cost=probability goes with --class_loss=ce: it is a share of 1")
        if self.content_queries == "zero" and self.initial_prediction:
            raise ConfigError("--content_queries=zero have nothing to predict from: add --initial_prediction=false")
        if self.task == "panoptic" and self.class_loss == "ce" and self.temperature:
            raise ConfigError("--task=panoptic goes with --class_loss=focal, or with --temperature=0 --object_threshold=0.8: its thresholds are for "
                              "independent class probabilities")
        if not self.masks and (self.box_init != "token" or self.denoising == "mask" or self.matching != "box"):
            raise ConfigError("--task=detection has no masks: add --box_init=token --denoising=box --matching=box")


# What decides the tensors of a checkpoint and what they mean; the rest of Config may differ between training and use.
ARCHITECTURE = ("model", "task", "backbone", "backbone_norm", "levels", "decoder_levels", "hidden", "heads", "attention_points", "enc_layers", "enc_ffn",
                "dec_layers", "dec_ffn", "queries", "two_stage", "content_queries", "box_init", "smallest_proposal", "initial_prediction", "class_loss",
                "denoising", "detection_head", "masked_attention", "self_attention_first", "attention_strides", "round_robin", "noise_scale", "mask_encoding")
# What Mask DINO knows of fields that are not for every model; its siblings have such a table in their files.
SUPPORTED = dict(content_queries=("selected", "learned"), detection_head=(True,), masked_attention=(True,), self_attention_first=(False,), dropout=(0.0,),
                 attention_strides=((),), round_robin=(True,))

SHAPES = dict(
    backbone="resnet18", backbone_norm="group", backbone_weights="none", levels=(8, 16), hidden=96, heads=6, enc_layers=1, enc_ffn=512, dec_layers=3,
    dec_ffn=512, queries=30, denoising_queries=30, mask_points=256, image_size=128, scale_jitter=(1.0, 1.0), test_short=128, test_long=128,
    keep_empty=True, workers=0, total_batch=4, iterations=3500, lr=8e-4, backbone_lr=1.0, lr_schedule="cosine", warmup=200, clip=0.1,
    checkpoint_every=1000, evaluate_every=2)

MASK2FORMER = dict(
    model="mask2former", levels=(8, 16, 32), enc_ffn=1024, queries=100, two_stage=False, content_queries="learned", box_init="token", smallest_proposal="fine",
    denoising="none", class_loss="ce", class_cost="probability", class_weight=2.0, class_cost_weight=2.0, detection_head=False,
    object_threshold=0.8, temperature=0.0)
DFORMER = MASK2FORMER | dict(model="dformer", content_queries="pooled", initial_prediction=False, total_batch=12, iterations=491_666,
                             lr_drops=(437_037, 473_456))
# Three times around two levels, and a backbone half as deep, which learns as much in less time. Half the queries: of several on an object all but one are told
# that there is none.
# Classes weigh more in the loss, but not in the matching, where each query would choose its class instead of its object (README, the siblings).
# More points: where masks alone are matched, 256 gave one object in five a query that 16,384 did not.
SIBLING = SHAPES | dict(backbone="resnet10", backbone_norm="batch", dec_layers=6, queries=15, class_weight=5.0, mask_points=1024, iterations=6500)
ADE20K = dict(task="semantic", image_size=512, scale_jitter=(0.5, 2.0), test_short=512, test_long=2048, iterations=160_000)
CITYSCAPES = dict(task="semantic", backbone_norm="batch", crop_height=512, scale_jitter=(0.5, 2.0), test_short=1024, test_long=2048, iterations=90_000)

# Masks pull at the backbone four times as hard as classes, and textures are learned late, unless classes weigh more and denoising queries are not told theirs.
TEXTURED = dict(class_weight=20.0, class_cost_weight=20.0, label_noise=1.0)

# One row a preset: overrides of Config and, under "about", what the row claims; under "released", what is in the name of its official checkpoint.
PRESETS: dict[str, dict] = {
    "shapes": dict(about="generated shapes, 128 pixels, from scratch, on a laptop's CPU in 10 minutes", **SHAPES),
    "shapes_panoptic": dict(
        about="the same with its ground as stuff, on a laptop's CPU in 10 minutes",
        **SHAPES | dict(task="panoptic", box_init="token", queries=100, denoising_queries=60, **TEXTURED)),
    "shapes_semantic": dict(
        about="the same, a class for every pixel, on a laptop's CPU in 10 minutes",
        **SHAPES | dict(task="semantic", two_stage=False, class_loss="ce", box_init="token", box_loss=False, colour_jitter=False, **TEXTURED)),
    "overfit": dict(
        about="a few real images learned by heart, on a CPU in 20 minutes: --data=DIR --max_images=8",
        backbone="resnet10", backbone_norm="group", backbone_weights="none", levels=(8, 16, 32), hidden=128, enc_layers=1, enc_ffn=512, dec_layers=3,
        dec_ffn=512, queries=100, denoising_queries=100, mask_points=2048, image_size=384, scale_jitter=(1.0, 1.0), flip=0.0, test_short=384,
        test_long=384, max_images=8, evaluate_on="train", workers=0, total_batch=2, iterations=1500, lr=6e-4, backbone_lr=1.0, lr_schedule="cosine",
        warmup=50, clip=0.1, checkpoint_every=500, evaluate_every=100),
    "coco_instance_r50_12ep": dict(about="paper: mask AP 41.4, box AP 45.7 (Table 3)", iterations=88_500, lr_drops=(81_125,)),
    "coco_instance_r50_24ep": dict(about="paper: mask AP 44.2, box AP 48.4 (Table 3)", iterations=177_000, lr_drops=(147_500,)),
    "coco_instance_r50_50ep": dict(about="paper: mask AP 46.3, box AP 51.7 (Table 3)", released="mask46.3ap_box51.7ap"),
    "coco_instance_r50_50ep_hid1024": dict(about="paper: mask AP 46.1, box AP 51.5 (released model)", released="mask46.1ap_box51.5ap",
                                           levels=(8, 16, 32), enc_ffn=1024, box_init="bitmask", smallest_proposal="fine"),
    "coco_instance_swinl_50ep": dict(about="paper: mask AP 52.3, box AP 59.0 (Table 3)", released="mask52.3ap_box59.0ap",
                                     backbone="swin_l", levels=(4, 8, 16, 32, 64), box_init="bitmask"),
    "coco_instance_swinl_50ep_token": dict(about="paper: mask AP 52.1, box AP 58.3 (Table 3), without mask-enhanced boxes", released="mask52.1ap_box58.3ap",
                                           backbone="swin_l", levels=(4, 8, 16, 32, 64), box_init="token"),
    "coco_panoptic_r50_12ep": dict(about="paper: PQ 49.0 (Table 4)", task="panoptic", box_init="token", iterations=88_500, lr_drops=(81_125,)),
    "coco_panoptic_r50_24ep": dict(about="paper: PQ 51.5 (Table 4)", task="panoptic", box_init="token", iterations=177_000, lr_drops=(147_500,)),
    "coco_panoptic_r50_50ep": dict(about="paper: PQ 53.0 (Table 4)", released="panoptic_pq53.0", task="panoptic", box_init="token"),
    "coco_panoptic_swinl_50ep": dict(about="paper: PQ 58.3 (Table 4)", released="panoptic_58.3pq", task="panoptic", backbone="swin_l",
                                     levels=(4, 8, 16, 32, 64), box_init="token"),
    "ade20k_semantic_r50": dict(
        about="paper: mIoU 48.7 (Table 5)", released="ade20k_48.7miou", class_loss="ce", two_stage=False, levels=(8, 16, 32), enc_ffn=1024,
        queries=100, box_init="token", smallest_proposal="fine", lr_drops=(135_000, 150_000), **ADE20K),
    "cityscapes_semantic_r50": dict(
        about="paper: mIoU 80.0 (Table 6)", released="cityscapes_79.8miou", class_loss="ce", two_stage=False, levels=(8, 16, 32), enc_ffn=1024,
        queries=100, box_init="token", smallest_proposal="fine", lr_drops=(80_000, 87_000), **CITYSCAPES),
    "mask2former_shapes": dict(about="Mask2Former on generated shapes, a model as small", **MASK2FORMER | SIBLING),
    "mask2former_shapes_panoptic": dict(about="the same with its ground as stuff", **MASK2FORMER | SIBLING | dict(task="panoptic", queries=30)),
    "mask2former_shapes_semantic": dict(about="the same, a class for every pixel", task="semantic", **MASK2FORMER | SIBLING | dict(scale_jitter=(1.0, 1.5))),
    "mask2former_coco_instance_r50_50ep": dict(about="paper: mask AP 43.7", released="model_final", **MASK2FORMER),
    "mask2former_coco_instance_swint_50ep": dict(about="paper: mask AP 45.0", released="model_final", backbone="swin_t", **MASK2FORMER),
    "mask2former_coco_instance_swinl_100ep": dict(about="paper: mask AP 50.1", released="model_final", backbone="swin_l", iterations=737_500,
                                                  lr_drops=(655_556, 710_184), **MASK2FORMER | dict(queries=200)),
    "mask2former_coco_panoptic_r50_50ep": dict(about="paper: PQ 51.9", released="model_final", task="panoptic", **MASK2FORMER),
    "mask2former_ade20k_semantic_r50": dict(about="paper: mIoU 47.2", released="model_final", lr_schedule="poly", **MASK2FORMER | ADE20K),
    "mask2former_cityscapes_semantic_r50": dict(about="paper: mIoU 79.0 (Mask DINO, Table 6)", released="model_final", lr_schedule="poly",
                                                **MASK2FORMER | CITYSCAPES),
    "dformer_shapes": dict(about="DFormer on generated shapes, a model as small", **DFORMER | SIBLING),
    "dformer_shapes_panoptic": dict(about="the same with its ground as stuff", **DFORMER | SIBLING | dict(task="panoptic", queries=30)),
    "dformer_shapes_semantic": dict(about="the same, a class for every pixel", task="semantic", **DFORMER | SIBLING | dict(scale_jitter=(1.0, 1.5))),
    "dformer_coco_instance_r50_50ep": dict(about="paper: mask AP 42.6", released="dformer", **DFORMER),
    "dformer_coco_instance_swint_50ep": dict(about="paper: mask AP 44.4", released="dformer", backbone="swin_t", **DFORMER),
    "dformer_coco_panoptic_r50_50ep": dict(about="paper: PQ 51.1", released="dformer", task="panoptic", **DFORMER),
    "dformer_ade20k_semantic_r50": dict(about="paper: mIoU 46.7", released="dformer", lr_schedule="poly", **DFORMER | ADE20K | dict(total_batch=16)),
}


def preset(name: str, **overrides) -> Config:
    """The preset's Config with some fields overridden. Raises ConfigError for an unknown name, naming the nearest."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset '{name}'{nearest(name, PRESETS)}; `python train.py --list` shows them all")
    row = {key: value for key, value in PRESETS[name].items() if key not in ("about", "released")}
    return Config(**row | overrides)


def misfit(config: Config, allowed: dict[str, tuple]) -> str:
    """The first field that has none of the allowed values, and those; or nothing."""
    return next((f"--{name}={getattr(config, name)}, only {' or '.join(map(str, values))}" for name, values in allowed.items()
                 if getattr(config, name) not in values), "")


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """", did you mean ...?" or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""


def parse_value(name: str, text: str, kind: type) -> object:
    """Command-line text as `kind` (int, float, bool, str, Literal or tuple of one type)."""
    try:
        if typing.get_origin(kind) is tuple:
            return tuple(parse_value(name, part, typing.get_args(kind)[0]) for part in text.strip("()").split(",") if part.strip())
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if kind is int:
            return int(text.replace("_", ""))
        return float(text) if kind is float else text
    except (ValueError, KeyError):
        raise ConfigError(f"--{name}={text}: expected {getattr(kind, '__name__', kind)}") from None


def parse_overrides(argv: Sequence[str], actions: dict[str, type]) -> tuple[list[str], dict, dict]:
    """Splits a command line into words, actions (typed by `actions`) and overrides of Config (typed by its fields).

    `--key=value` sets; a bare `--key` is True for booleans. Raises ConfigError for an unknown key, naming the nearest known one.
    """
    fields, words, done, overrides = typing.get_type_hints(Config), [], {}, {}
    for argument in argv:
        if not argument.startswith("--"):
            words.append(argument)
            continue
        name, equals, text = argument[2:].partition("=")
        kind = actions.get(name, fields.get(name))
        if kind is None:
            raise ConfigError(f"unknown key --{name}{nearest(name, [*actions, *fields])}")
        if not equals and kind is not bool:
            raise ConfigError(f"--{name} needs a value: --{name}=...")
        (done if name in actions else overrides)[name] = parse_value(name, text, kind) if equals else True
    return words, done, overrides


def file_of(model: str) -> ModuleType:
    """The file of a model by its name (Config.model): the one place where that name decides.

    Beside the class itself, MODEL, it has what only it knows: of fields (SUPPORTED), of the released format (RELEASABLE, BUFFERS, `names_of` tensors,
    `facts_of` a checkpoint), and its `rooms` in the tour.
    """
    return importlib.import_module(model)                               # not earlier: siblings import this file


def through(module: nn.Module, again: bool, *arguments: object) -> object:
    """module(*arguments); with `again` nothing inside is kept for the backward, which computes it again (activation checkpointing)."""
    return checkpoint(module, *arguments, use_reentrant=False) if again and torch.is_grad_enabled() else module(*arguments)


# ---------------------------------------------------------------------------------------------------------------- backbone
RESNET_BLOCKS = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


class ResNet(nn.Module):
    """torchvision's ResNet without its classifier: (B, 3, H, W) -> maps of strides 4, 8, 16, 32, as far as `levels` needs them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        norm = {"frozen": FrozenBatchNorm2d, "batch": nn.BatchNorm2d, "group": lambda channels: nn.GroupNorm(32, channels)}[config.backbone_norm]
        block = torchvision.models.resnet.Bottleneck if config.backbone in ("resnet50", "resnet101") else torchvision.models.resnet.BasicBlock
        self.body = torchvision.models.ResNet(block, list(RESNET_BLOCKS[config.backbone]), norm_layer=norm)
        del self.body.fc, self.body.avgpool
        self.again = config.checkpoint_activations
        self.stages = [f"layer{i + 1}" for i, stride in enumerate((4, 8, 16, 32)) if stride <= config.levels[-1]]
        for unused in {"layer2", "layer3", "layer4"} - set(self.stages):
            delattr(self.body, unused)
        self.channels = [c * block.expansion for c in (64, 128, 256, 512)][:len(self.stages)]
        if config.backbone_norm == "group":     # torchvision's constructor knows batch norms only
            for m in self.modules():
                if isinstance(m, nn.GroupNorm):
                    nn.init.ones_(m.weight)

    def forward(self, images: Tensor) -> list[Tensor]:
        body = self.body
        x = body.maxpool(body.relu(body.bn1(body.conv1(images))))
        again = self.again and not isinstance(body.bn1, nn.BatchNorm2d)                         # whose statistics would move twice
        return [x := through(getattr(body, stage), again, x) for stage in self.stages]


SWINS = {                                                               # torchvision's, and the large one of the released models
    "swin_t": dict(width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), window=7),
    "swin_s": dict(width=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24), window=7),
    "swin_b": dict(width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), window=7),
    "swin_l": dict(width=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12),
}


def windows(x: Tensor, n: int) -> Tensor:
    """A map (B, H, W, ...), H and W multiples of n, cut into V windows of n x n cells -> (B, V, n * n, ...)."""
    return x.unflatten(2, (-1, n)).unflatten(1, (-1, n)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


class WindowAttention(ShiftedWindowAttention):
    """Self-attention within windows of a map, which every other block shifts by half a window: (B, H, W, C) -> the same.

    The parameters are torchvision's. Its forward does not shift a map that fits into one window; the released detectors do, so it is written anew.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        cells = self.window_size[0] ** 2
        self.relative_position_index = self.relative_position_index.view(cells, cells)      # as in released checkpoints; torchvision keeps it flat

    def forward(self, x: Tensor) -> Tensor:
        (B, H, W, C), M, n, shift = x.shape, self.num_heads, self.window_size[0], self.shift_size[0]
        x = F.pad(x, (0, 0, 0, -W % n, 0, -H % n)).roll((-shift, -shift), (1, 2))           # whole windows
        h, w = x.shape[1:3]
        q, k, v = windows(self.qkv(x), n).unflatten(-1, (3, M, -1)).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)                 # (B, V * M, n * n, C / M) each
        # What came round to the far side by the shift is no neighbour of what was there before. -100 keeps them apart, as released.
        bottom, right = (torch.arange(size, device=x.device) >= size - shift for size in (h, w))
        region = windows((2 * bottom[:, None] + right)[None], n)                                                            # (1, V, n * n)
        same = (region[..., None] == region[..., None, :]).transpose(0, 1)                                                  # (V, 1, n * n, n * n)
        bias = self.get_relative_position_bias()                                                                            # (1, M, n * n, n * n)
        bias = torch.where(same, bias, bias - 100).flatten(0, 1)[None]                      # windows count as heads, so that images can share them
        x = F.scaled_dot_product_attention(q, k, v, bias)
        x = x.view(B, h // n, w // n, M, n, n, -1).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, h, w, C)                         # back to a map
        return self.proj(x.roll((shift, shift), (1, 2))[:, :H, :W])


class Swin(nn.Module):
    """torchvision's Swin transformer without its classifier, a norm on each map: (B, 3, H, W) -> maps (B, C_i, H / s, W / s) of strides s = 4, 8, 16, 32.

    Any size will do; what is missing to whole cells and windows is padded with zeros, so sizes are rounded up.
    """

    def __init__(self, width: int, depths: Sequence[int], heads: Sequence[int], window: int, stochastic_depth: float = 0.3, again: bool = False) -> None:
        super().__init__()
        self.again = again
        block = partial(SwinTransformerBlock, attn_layer=WindowAttention)
        self.body = SwinTransformer([4, 4], width, depths, heads, [window, window], stochastic_depth_prob=stochastic_depth, block=block).features
        self.channels = [width * 2 ** i for i in range(4)]
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.pad(images, (0, -images.shape[-1] % 4, 0, -images.shape[-2] % 4))
        maps = []
        for shrink, blocks, norm in zip(self.body[0::2], self.body[1::2], self.norms, strict=True):
            x = shrink(x)
            for block in blocks:
                x = through(block, self.again, x)                       # (B, H / s, W / s, C_i)
            maps.append(norm(x).permute(0, 3, 1, 2))
        return maps


def make_backbone(config: Config) -> nn.Module:
    """Images (B, 3, H, W), normalised -> maps of strides 4, 8, 16, 32; `channels` are theirs."""
    return Swin(**SWINS[config.backbone], again=config.checkpoint_activations) if config.backbone in SWINS else ResNet(config)


def load_backbone_weights(backbone: nn.Module, config: Config) -> None:
    """`config.backbone_weights`: none, imagenet (torchvision's IMAGENET1K_V1, cached in TORCH_HOME) or a file in torchvision's names (of a Swin, in
    Microsoft's, too).

    Raises ConfigError when they cannot be had or do not fit.
    """
    source, swin = config.backbone_weights, config.backbone in SWINS
    scratch = "--backbone_weights=none" + " --backbone_norm=group" * (not swin)
    if source == "none":
        return
    if source == "imagenet":
        try:
            state = torchvision.models.get_model_weights(config.backbone)["IMAGENET1K_V1"].get_state_dict(progress=True)
        except (URLError, ConnectionError, TimeoutError) as error:
            raise ConfigError(f"torchvision's ImageNet weights of {config.backbone} could not be downloaded ({error}): connect once, put the file into "
                              f"$TORCH_HOME/hub/checkpoints, give --backbone_weights=PATH, or train from scratch with {scratch}") from None
        except ValueError:
            raise ConfigError(f"torchvision has no ImageNet weights for {config.backbone}: give a file with --backbone_weights=PATH (for swin_l Microsoft's "
                              f"swin_large_patch4_window12_384_22k.pth), or train from scratch with {scratch}") from None
    else:
        state = read_torch_file(Path(source))
    if swin:
        return fill(backbone.body, swin_weights(state, backbone.body), f"--backbone_weights={source}")
    unused = {"fc", "layer2", "layer3", "layer4"} - set(backbone.stages)
    fill(backbone.body, {key: value for key, value in state.items() if key.split(".")[0] not in unused}, f"--backbone_weights={source}")


# ---------------------------------------------------------------------------------------------------------------- positions and boxes
def sine_embedding(x: Tensor, features: int) -> Tensor:
    """Numbers in 0..1, any shape -> (..., features): sines and cosines, interleaved, of wavelengths 1 to 10000 (times 2 pi)."""
    i = torch.arange(features, device=x.device)
    angle = x[..., None] * 2 * math.pi / 10000 ** (2 * (i // 2) / features)
    return torch.where(i % 2 == 0, angle.sin(), angle.cos())


def position_encoding(h: int, w: int, channels: int, like: Tensor) -> Tensor:
    """(h * w, channels): the first half of the channels for y, the second for x. Padding counts like any other cell, as released."""
    y, x = (torch.arange(1, n + 1, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32)) / (n + 1e-6) for n in (h, w))
    y, x = sine_embedding(y, channels // 2), sine_embedding(x, channels // 2)
    return torch.cat([y[:, None].expand(h, w, -1), x[None].expand(h, w, -1)], -1).flatten(0, 1)


def inverse_sigmoid(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=1e-5) / (1 - x).clamp(min=1e-5))


def refine(anchor: Tensor, delta: Tensor) -> Tensor:
    """Moves boxes (..., 4) in 0..1 by `delta` in logit space (Deformable DETR, section A.4)."""
    return torch.sigmoid(inverse_sigmoid(anchor) + delta)


def boxes_of_masks(inside: Tensor, variant: str) -> Tensor:
    """Boxes around boolean masks (..., h, w) -> (..., 4) cxcywh in 0..1: mask-enhanced anchor box initialisation (section 3.5).

    Two variants were released. mask2box ends a box at the last cell inside, and an empty mask is a point in the far corner;
    bitmask ends it behind the last cell, and an empty mask is a point at the origin.
    """
    h, w = inside.shape[-2:]
    corners = []
    for hit, size in ((inside.any(-2), w), (inside.any(-1), h)):              # columns, rows
        first, last = hit.byte().argmax(-1), size - 1 - hit.byte().flip(-1).argmax(-1)
        if variant == "bitmask":
            last = last + 1
        none = ~hit.any(-1)
        corners.append((torch.where(none, 1e8 if variant == "mask2box" else 0, first.float()) / size, torch.where(none, 0, last.float()) / size))
    (x0, x1), (y0, y1) = corners
    return torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1)


# ---------------------------------------------------------------------------------------------------------------- building blocks
class MLP(nn.Sequential):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        layers = [[nn.Linear(a, b), nn.ReLU()] for a, b in zip(widths, widths[1:], strict=False)]
        super().__init__(*sum(layers, [])[:-1])


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections (Deformable DETR, equation 3); `kernels.py` has the operator."""

    def __init__(self, config: Config, levels: int) -> None:
        super().__init__()
        C, self.shape = config.hidden, (config.heads, levels, config.attention_points)
        self.sampling_offsets = nn.Linear(C, math.prod(self.shape) * 2)
        self.attention_weights = nn.Linear(C, math.prod(self.shape))
        self.value_proj = nn.Linear(C, C)
        self.output_proj = nn.Linear(C, C)

    def reset_parameters(self) -> None:
        """Head m starts out looking in direction m, point p at p cells' distance; all samples weigh the same."""
        M, L, P = self.shape
        theta = 2 * math.pi * torch.arange(M) / M
        star = torch.stack([theta.cos(), theta.sin()], -1)
        star = (star / star.abs().amax(-1, keepdim=True))[:, None, None] * torch.arange(1, P + 1)[:, None]      # (M, 1, P, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(star.expand(M, L, P, 2).flatten())

    def forward(self, query: Tensor, reference_points: Tensor, memory: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """query (B, Q, C), reference_points (B, Q, 2 or 4), memory (B, S, C) -> (B, Q, C)."""
        offsets = self.sampling_offsets(query).unflatten(-1, (*self.shape, 2))                                  # (B, Q, M, L, P, 2)
        logits = self.attention_weights(query).unflatten(-1, self.shape)                                        # (B, Q, M, L, P)
        value = self.value_proj(memory).unflatten(-1, (self.shape[0], -1))                                      # (B, S, M, D)
        return self.output_proj(ms_deform_attn(value, shapes, reference_points, offsets, logits))


# ---------------------------------------------------------------------------------------------------------------- pixel decoder
class EncoderLayer(nn.Module):
    """Deformable self-attention over the tokens of all levels, then an FFN; post-norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(config, len(config.levels))
        self.norm1 = nn.LayerNorm(config.hidden)
        self.ffn = MLP(config.hidden, config.enc_ffn, config.hidden)
        self.norm2 = nn.LayerNorm(config.hidden)

    def forward(self, x: Tensor, pos: Tensor, centres: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        x = self.norm1(x + self.self_attn(x + pos, centres, x, shapes))
        return self.norm2(x + self.ffn(x))


class PixelDecoder(nn.Module):
    """Deformable encoder over the backbone's levels, and the pixel embedding map (equation 1).

    four backbone maps -> tokens (B, S, C), their shapes [(H, W)] * L, pixel embedding map (B, C, H/4, W/4)
    """

    def __init__(self, channels: list[int], config: Config) -> None:
        super().__init__()
        C = config.hidden
        self.strides, self.masks, self.again = config.levels, config.masks, config.checkpoint_activations
        self.input_proj = nn.ModuleList()
        for stride in self.strides:
            extra = stride > 32                                                                 # strided convolutions on the coarsest map
            conv = nn.Conv2d(channels[-1] if stride == 64 else C, C, 3, stride=2, padding=1) if extra else nn.Conv2d(channels[stride.bit_length() - 3], C, 1)
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
            self.input_proj.append(nn.Sequential(conv, nn.GroupNorm(32, C)))
        self.level_embed = nn.Parameter(torch.randn(len(self.strides), C))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.enc_layers))
        init_transformer(self.layers)
        if not config.masks:
            return
        self.lateral = nn.Sequential(nn.Conv2d(channels[0], C, 1, bias=False), nn.GroupNorm(32, C))                             # T in eq. 1
        self.smooth = nn.Sequential(nn.Conv2d(C, C, 3, padding=1, bias=False), nn.GroupNorm(32, C), nn.ReLU())
        self.pixel_embed = nn.Conv2d(C, C, 1)                                                                                   # M in eq. 1
        for conv in (self.lateral[0], self.smooth[0], self.pixel_embed):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.pixel_embed.bias)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]], Tensor | None]:
        maps = []
        for stride, proj in zip(self.strides, self.input_proj, strict=True):
            maps.append(proj(maps[-1] if stride > 64 else features[min(stride, 32).bit_length() - 3]))
        shapes = [tuple(m.shape[-2:]) for m in maps]
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)                                                          # (B, S, C)
        pos = torch.cat([position_encoding(h, w, x.shape[-1], x) + embed for (h, w), embed in zip(shapes, self.level_embed, strict=True)])
        centres = cell_centres(shapes, x).expand(len(x), -1, -1)                                                                # (B, S, 2)
        for layer in self.layers:
            x = through(layer, self.again, x, pos, centres, shapes)
        if not self.masks:
            return x, shapes, None
        h, w = shapes[0]
        finest = x[:, :h * w].transpose(1, 2).unflatten(-1, (h, w))
        y = self.lateral(features[0])
        y = y + F.interpolate(finest, size=y.shape[-2:], mode="bilinear", align_corners=False)                                  # F in eq. 1
        return x, shapes, self.pixel_embed(self.smooth(y))


# ---------------------------------------------------------------------------------------------------------------- heads
class Heads(nn.Module):
    """Class, box and mask head: one set of weights for encoder tokens, the initial prediction and every decoder layer.

    x (B, Q, C), and boxes (B, Q, 4) of those who refine anchors; else the box head, if there is one, predicts them from nothing.
    """

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__()
        C = config.hidden
        self.norm = nn.LayerNorm(C)
        self.class_head = nn.Linear(C, num_classes + (config.class_loss == "ce"))               # the last column of a ce head: no object
        self.box_head = MLP(C, C, C, 4) if config.detection_head else None
        self.mask_head = MLP(C, C, C, C) if config.masks else None
        if config.class_loss == "focal":
            nn.init.constant_(self.class_head.bias, -math.log(99))  # focal prior 0.01; the released code has none and starts at a loss of 25,000
        if self.box_head:
            nn.init.zeros_(self.box_head[-1].weight)
            nn.init.zeros_(self.box_head[-1].bias)

    def forward(self, x: Tensor, boxes: Tensor | None = None) -> Prediction:
        x = self.norm(x)
        if boxes is None and self.box_head:
            boxes = self.box_head(x).sigmoid()
        return Prediction(self.class_head(x), boxes, self.mask_head(x) if self.mask_head else None)


def mask_logits(embeddings: Tensor, pixels: Tensor) -> Tensor:
    """Equation 1's dot product: (B, Q, C), (B, C, h, w) -> (B, Q, h, w)."""
    return torch.einsum("bqc,bchw->bqhw", embeddings, pixels)


# ---------------------------------------------------------------------------------------------------------------- query selection
class QuerySelection(nn.Module):
    """Unified and enhanced query selection (section 3.5): encoder tokens that predict class, box and mask; the best become queries.

    tokens (B, S, C), shapes, pixel map -> content (B, Q, C), anchors (B, Q, 4), both detached where selected, and the tokens' Prediction
    (None for learned queries), which is supervised like a layer's.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        if config.two_stage:
            self.enc_output = nn.Linear(config.hidden, config.hidden)
            self.enc_output_norm = nn.LayerNorm(config.hidden)
        else:
            self.anchor_logits = nn.Embedding(config.queries, 4)
        if not config.two_stage or config.content_queries == "learned":
            self.content = nn.Embedding(config.queries, config.hidden)

    def proposals(self, shapes: list[tuple[int, int]], like: Tensor) -> Tensor:
        """(S, 4): a square at each token, 0.05 wide on one end of the pyramid and twice as wide with each level.

        The released order makes the finest level's the widest, the reverse of Deformable DETR; its hid1024 models have it the other way.
        """
        steps = range(len(shapes)) if self.config.smallest_proposal == "fine" else reversed(range(len(shapes)))
        widths = torch.cat([torch.full((h * w, 2), 0.05 * 2 ** step) for (h, w), step in zip(shapes, steps, strict=True)])
        centres = cell_centres(shapes, like)
        return torch.cat([centres, widths.to(centres)], -1)

    def forward(self, memory: Tensor, shapes: list[tuple[int, int]], pixels: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Prediction | None]:
        B, S, C = memory.shape
        config = self.config
        if not config.two_stage:
            return self.content.weight.expand(B, -1, -1), self.anchor_logits.weight.sigmoid().expand(B, -1, -1), None
        proposals = self.proposals(shapes, memory)
        valid = ((proposals > 0.01) & (proposals < 0.99)).all(-1, keepdim=True)
        tokens = self.enc_output_norm(self.enc_output(memory * valid))                          # (B, S, C)
        logits = torch.where(valid, inverse_sigmoid(proposals), torch.inf)                      # infinite: box 1, 1, 1, 1, as released
        best = heads.class_head(tokens).amax(-1).topk(min(config.queries, S)).indices           # (B, Q); no norm before the class head here
        rows = torch.arange(B, device=memory.device)[:, None]
        tokens, boxes = tokens[rows, best], torch.sigmoid(logits[best] + heads.box_head(tokens[rows, best]))
        prediction = heads(tokens, boxes)
        content = tokens.detach() if config.content_queries == "selected" else self.content.weight[:best.shape[1]].expand(B, -1, -1)
        if config.box_init == "token":
            return content, boxes.detach(), prediction
        with torch.no_grad():                                                                   # masks are easier than boxes early on
            anchors = boxes_of_masks(mask_logits(prediction.embeddings, pixels) > 0, config.box_init)
        return content, torch.sigmoid(inverse_sigmoid(anchors)).to(boxes.dtype), prediction


# ---------------------------------------------------------------------------------------------------------------- denoising
class Denoising(NamedTuple):
    """Denoising queries of a batch: G groups, each with a copy of every object, N slots a group; T = G * N."""
    content: Tensor         # (B, T, C) embeddings of the noised labels
    anchors: Tensor         # (B, T, 4) noised boxes
    groups: int


def draw_noise(target: dict, groups: int, num_classes: int) -> dict[str, Tensor]:
    """Uniform draws of one image with n objects: flip (G, n) in 0..1, label (G, n) of the classes, box (G, n, 4) in 0..1."""
    shape, device = (groups, len(target["labels"])), target["labels"].device
    g = generator(target, 0, device)
    return {"flip": torch.rand(shape, generator=g, device=device), "label": torch.randint(num_classes, shape, generator=g, device=device),
            "box": torch.rand((*shape, 4), generator=g, device=device)}


def make_denoising(targets: list[dict], label_embed: nn.Embedding, config: Config, noise: list[dict] | None = None) -> Denoising | None:
    """Unified denoising (section 3.6, appendix B.2): noised boxes and labels of the truth, fed as queries that must give back box, label and mask.

    A noised box is a noised mask. Positive copies only. None when the batch has no objects, or more in one image than denoising queries.
    """
    counts = [len(t["labels"]) for t in targets]
    N = max(counts)
    groups = config.denoising_queries // N if N else 0
    if groups == 0:
        return None
    noise = noise or [draw_noise(t, groups, label_embed.num_embeddings) for t in targets]
    content, anchors = [], []
    for target, draw, n in zip(targets, noise, counts, strict=True):
        labels = torch.where(draw["flip"] < config.label_noise, draw["label"], target["labels"])                # (G, n)
        boxes, wh = target["boxes"], target["boxes"][:, 2:]
        boxes = (boxes + (2 * draw["box"] - 1) * config.box_noise * torch.cat([wh / 2, wh], -1)).clamp(0, 1)    # (G, n, 4)
        slots = (0, 0, 0, N - n)                            # slots without an object: content 0, anchor in the middle; they count as background
        content.append(F.pad(label_embed(labels), slots).flatten(0, 1))
        anchors.append(torch.sigmoid(F.pad(inverse_sigmoid(boxes), slots)).flatten(0, 1))
    return Denoising(torch.stack(content), torch.stack(anchors), groups)


def denoising_attention_mask(groups: int, slots: int, queries: int, device: torch.device) -> Tensor:
    """(T + Q, T + Q) boolean, True = blocked: queries do not see denoising queries, nor groups each other (they would see the truth)."""
    group = torch.cat([torch.arange(groups).repeat_interleave(slots), torch.full((queries,), -1)]).to(device)
    seen, by = group[None], group[:, None]
    return (seen >= 0) & (seen != by)


# ---------------------------------------------------------------------------------------------------------------- decoder
class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable cross-attention inside and around each query's anchor box, FFN; post-norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        C = config.hidden
        self.self_attn = nn.MultiheadAttention(C, config.heads, batch_first=True)
        self.norm1 = nn.LayerNorm(C)
        self.cross_attn = MSDeformAttn(config, config.decoder_levels or len(config.levels))
        self.norm2 = nn.LayerNorm(C)
        self.ffn = MLP(C, config.dec_ffn, C)
        self.norm3 = nn.LayerNorm(C)

    def forward(self, x: Tensor, pos: Tensor, anchors: Tensor, memory: Tensor, shapes: list[tuple[int, int]], blocked: Tensor | None) -> Tensor:
        q = x + pos
        x = self.norm1(x + self.self_attn(q, q, x, attn_mask=blocked, need_weights=False)[0])
        x = self.norm2(x + self.cross_attn(x + pos, anchors, memory, shapes))
        return self.norm3(x + self.ffn(x))


class Decoder(nn.Module):
    """Refines content and anchor box of every query layer by layer (DAB-DETR; look forward twice, DINO section 3.5)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        C = config.hidden
        self.again = config.checkpoint_activations
        self.anchor_embed = MLP(2 * C, C, C)                        # C / 2 sine features for each of y, x, w, h
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.dec_layers))
        init_transformer(self)

    def forward(self, x: Tensor, anchors: Tensor, memory: Tensor, shapes: list[tuple[int, int]], blocked: Tensor | None,
                heads: Heads) -> list[tuple[Tensor, Tensor]]:
        """content (B, Q, C), anchors (B, Q, 4) -> normalised state (B, Q, C) and boxes (B, Q, 4) after each layer."""
        states = []
        before = anchors                                            # this layer's anchor, with its gradient
        for layer in self.layers:
            pos = self.anchor_embed(sine_embedding(anchors[..., [1, 0, 2, 3]], x.shape[-1] // 2).flatten(-2))
            x = through(layer, self.again, x, pos, anchors, memory, shapes, blocked)
            state = heads.norm(x)                                   # the class and mask heads will normalise it again, as released
            states.append((state, refine(before, heads.box_head(state))))
            before = refine(anchors, heads.box_head(x))
            anchors = before.detach()
        return states


def init_transformer(module: nn.Module) -> None:
    """Xavier-uniform matrices, then the deformable attention's own start."""
    for p in module.parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)
    for m in module.modules():
        if isinstance(m, MSDeformAttn):
            m.reset_parameters()


# ---------------------------------------------------------------------------------------------------------------- the model
class Segmenter(nn.Module):
    """What Mask DINO and its siblings share: backbone, pixel decoder, heads, what goes in and what comes out. They add a `decoder` and a `forward`."""

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.classes: dict | None = None                                                        # set by whoever knows the names
        self.register_buffer("mean", torch.tensor([123.675, 116.28, 103.53])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([58.395, 57.12, 57.375])[:, None, None], persistent=False)
        self.backbone = make_backbone(config)
        self.pixel_decoder = PixelDecoder(self.backbone.channels, config)
        self.heads = Heads(config, num_classes)

    def compile_regions(self) -> None:
        """torch.compile of the parts without data-dependent shapes. Dynamic: one graph serves all image sizes, one more the square ones."""
        for region in (self.backbone, *self.pixel_decoder.layers, *self.decoder.layers):
            region.compile(dynamic=True)

    def normalise(self, images: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        x = (images - self.mean) / self.std
        for image, (h, w) in zip(x, sizes, strict=True):                                        # padding is 0 after the normalisation
            image[:, h:], image[:, :, w:] = 0, 0
        return x.contiguous(memory_format=torch.channels_last)                                  # convolutions are faster so, on CPUs and tensor cores

    def postprocess(self, output: Output, sizes: list[tuple[int, int]], original_sizes: list[tuple[int, int]], semantic: bool = False) -> list[dict]:
        """The last prediction in pixels of the original images, for each what its task gives: the dict of `detections_of`; panoptic: of
        `panoptic_of`, too, with things alone as detections; semantic: {"semantic": (H, W) class}. semantic=True: a panoptic model gives that as
        well, for which every query's mask is enlarged."""
        config, last, found = self.config, list(output.sets.values())[-1], []
        is_thing = torch.tensor(self.classes["is_thing"] if self.classes else [True] * self.num_classes, device=last.logits.device)
        for b, (size, original) in enumerate(zip(sizes, original_sizes, strict=True)):
            p, frame = rows(last, b, 0), Frame(output.padded, size, original)
            pixels = None if output.pixels is None else output.pixels[b]
            found.append({})
            if config.task != "semantic":
                found[-1] |= detections_of(p, pixels, frame, config.detections, config.class_loss, is_thing if config.task == "panoptic" else None)
            if config.task == "panoptic":
                found[-1] |= panoptic_of(p, pixels, frame, is_thing, config.object_threshold, config.overlap_threshold, config.temperature, config.class_loss)
            if config.task == "semantic" or config.task == "panoptic" and semantic:
                found[-1]["semantic"] = semantic_labels(p, pixels, frame, config.temperature, config.class_loss, resize_first=config.task == "panoptic")
        return found

    @torch.no_grad()
    def predict(self, images: Sequence[np.ndarray | Image.Image | str | os.PathLike], threshold: float = 0.0) -> list[dict]:
        """Images (RGB arrays (H, W, 3) uint8, PIL images or paths) -> for each the dict of `postprocess`, detections with scores above `threshold`."""
        results = []
        for image in images:
            image = Image.fromarray(image) if isinstance(image, np.ndarray) else image if isinstance(image, Image.Image) else Image.open(image)
            x = preprocess(image.convert("RGB"), self.config.test_short, self.config.test_long)
            size = tuple(x.shape[-2:])
            batch = F.pad(x, (0, -size[1] % 32, 0, -size[0] % 32))[None].to(self.mean.device)
            results.append(above(self.postprocess(self(batch, [size]), [size], [(image.height, image.width)])[0], threshold))
        return results


class MaskDINO(Segmenter):
    """Figure 1. Images (B, 3, H, W) uint8 RGB, padded right and below to a multiple of 32, and their true sizes -> Output."""

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.query_selection = QuerySelection(config)
        self.decoder = Decoder(config)
        self.label_embed = nn.Embedding(num_classes, config.hidden) if config.denoising != "none" else None

    def forward(self, images: Tensor, sizes: list[tuple[int, int]], targets: list[dict] | None = None, noise: list[dict] | None = None) -> Output:
        """With targets (training) the denoising queries run along; `noise` gives their draws (see `draw_noise`)."""
        # Backbone and pixel decoder: tokens for attention, and the pixel embedding map for masks (section 3.4).
        features = self.backbone(self.normalise(images, sizes))                                 # maps of strides 4, 8, 16, 32
        memory, shapes, pixels = self.pixel_decoder(features)                                   # (B, S, C), [(H, W)] * L, (B, C, H/4, W/4)
        if self.config.decoder_levels:
            shapes = shapes[:self.config.decoder_levels]
            memory = memory[:, :sum(h * w for h, w in shapes)]
        # Unified and enhanced query selection: content and anchor boxes from encoder tokens (section 3.5).
        content, anchors, selection = self.query_selection(memory, shapes, pixels, self.heads)  # (B, Q, C), (B, Q, 4)
        # Unified denoising: noised truth in front of the queries (section 3.6).
        denoising, blocked, T = None, None, 0
        if targets is not None and self.label_embed is not None:
            denoising = make_denoising(targets, self.label_embed, self.config, noise)
            if denoising is None:
                content = content + 0 * self.label_embed.weight.sum()                           # every parameter takes part in every step
            else:
                T = denoising.content.shape[1]
                blocked = denoising_attention_mask(denoising.groups, T // denoising.groups, content.shape[1], content.device)
                content = torch.cat([denoising.content, content], 1)                            # (B, T + Q, C)
                anchors = torch.cat([denoising.anchors, anchors], 1)
        # Decoder: nine rounds of refinement, a prediction after each (and one before the first).
        states = [(content, anchors)] if self.config.initial_prediction else []
        states += self.decoder(content, anchors, memory, shapes, blocked, self.heads)
        first = 0 if self.config.initial_prediction else 1
        names = ["initial" if i == 0 else f"layer{i}" for i in range(first, first + len(states))]
        every = {name: self.heads(state, boxes) for name, (state, boxes) in zip(names, states, strict=True)}
        sets = {"selection": selection} if selection is not None else {}
        sets |= {name: rows(p, slice(T, None)) for name, p in every.items()}
        noised = {name: rows(p, slice(0, T)) for name, p in every.items()} if T else {}
        return Output(tuple(images.shape[-2:]), pixels, sets, noised, denoising.groups if T else 0)


def above(result: dict, threshold: float) -> dict:
    """A result with its detections of scores above `threshold` alone."""
    if "scores" not in result:
        return result
    keep = result["scores"] > threshold
    return {key: value[keep] if key in ("scores", "labels", "boxes", "masks") else value for key, value in result.items()}


def rows(p: Prediction, index: slice | int, dim: int = 1) -> Prediction:
    """The same prediction for some of the queries (dim 1) or one image (dim 0)."""
    pick = (lambda t: t[index]) if dim == 0 else (lambda t: t[:, index])
    return Prediction(*(None if t is None else pick(t) for t in p))


# ---------------------------------------------------------------------------------------------------------------- inference
def preprocess(image: Image.Image, short: int, long: int) -> Tensor:
    """RGB image -> (3, h, w) uint8, shorter edge `short` unless the longer would exceed `long`."""
    w, h = image.size
    scale = min(short / min(h, w), long / max(h, w))
    return pil_to_tensor(image.resize((max(1, int(w * scale + 0.5)), max(1, int(h * scale + 0.5))), Image.Resampling.BILINEAR))


MASKS_AT_ONCE = 20          # full-size mask logits are most of the memory
ROWS_AT_ONCE = 64           # so are full-size class maps


class Frame(NamedTuple):
    """Where an image lies in the model's input and how large its result shall be; (height, width) in pixels."""
    padded: tuple[int, int]         # the batch; the image is its upper left part
    size: tuple[int, int]           # the image in it
    original: tuple[int, int]       # the result


def class_probabilities(logits: Tensor, class_loss: str, temperature: float = 0.0) -> Tensor:
    """logits (Q, K), with class_loss "ce" (Q, K + 1) -> (Q, K). A temperature sharpens the independent probabilities of "focal" into shares of 1."""
    if class_loss == "ce":
        return logits.float().softmax(-1)[:, :-1]                           # the last column says "no object"
    probabilities = logits.float().sigmoid()
    return (probabilities / temperature).softmax(-1) if temperature else probabilities


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, h, w) -> (n, *size), bilinear."""
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]      # n as the batch, which may be empty


def resized_masks(embeddings: Tensor, pixels: Tensor, frame: Frame) -> Iterator[Tensor]:
    """Mask logits (MASKS_AT_ONCE or fewer, H, W) in the original size, chunk by chunk: embeddings (n, C), pixels (C, h, w)."""
    h, w = frame.size
    for chunk in embeddings.float().split(MASKS_AT_ONCE):
        masks = torch.einsum("nc,chw->nhw", chunk, pixels.float())
        yield resize(resize(masks, frame.padded)[:, :h, :w], frame.original)                # no name keeps the padded ones alive


def in_pixels(boxes: Tensor, height: float, width: float) -> Tensor:
    """Boxes (n, 4) cxcywh in 0..1 of a picture -> xyxy in its pixels."""
    return box_convert(boxes.float(), "cxcywh", "xyxy") * torch.tensor([width, height] * 2, device=boxes.device)


def detections_of(p: Prediction, pixels: Tensor | None, frame: Frame, count: int, class_loss: str = "focal", is_thing: Tensor | None = None) -> dict:
    """One image's instances: the best `count` of query x class (a query may appear with several classes), no threshold, no NMS.

    p: logits (Q, K or K + 1), boxes (Q, 4) or None: an instance's box is then that of its mask, embeddings (Q, C). is_thing (K,) bool: of these
    `count`, only things stay (panoptic models).
    Returns, best first: scores (n,), labels (n,), boxes (n, 4) xyxy in pixels of the original image, not clipped, and, unless the model has no masks,
    masks (n, H, W) bool of the original size. Score = class score times the mask's mean probability.
    """
    scores = class_probabilities(p.logits, class_loss)
    K = scores.shape[1]
    scores, best = scores.flatten().topk(min(count, scores.numel()))
    query, labels = best // K, best % K
    if is_thing is not None:
        scores, query, labels = (t[is_thing[labels]] for t in (scores, query, labels))
    (H, W), (h, w), original = frame.padded, frame.size, frame.original
    boxes = None if p.boxes is None else in_pixels(p.boxes[query], H * original[0] / h, W * original[1] / w)
    if p.embeddings is None:
        return {"scores": scores, "labels": labels, "boxes": boxes}
    unique, where = query.unique(return_inverse=True)
    masks, quality = [], []
    for x in resized_masks(p.embeddings[unique], pixels, frame):
        inside = x > 0
        masks.append(inside)
        quality.append((x.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6))
    masks = torch.cat(masks)
    if boxes is None:
        boxes = in_pixels(boxes_of_masks(masks, "bitmask"), *original)[where]
    scores, order = (scores * torch.cat(quality)[where]).sort(descending=True, stable=True)
    return {"scores": scores, "labels": labels[order], "boxes": boxes[order], "masks": masks[where[order]]}


def panoptic_of(p: Prediction, pixels: Tensor, frame: Frame, is_thing: Tensor, object_threshold: float = 0.25, overlap_threshold: float = 0.8,
                temperature: float = 0.06, class_loss: str = "focal") -> dict:
    """One image's pixels, each in one segment or in none (MaskFormer, arXiv 2107.06278, section 3.4).

    Queries whose best class has more than `object_threshold` compete for every pixel with class score times mask probability. Whoever wins too
    little of its own mask (`overlap_threshold`) is dropped. p: logits (Q, K or K + 1), embeddings (Q, C); is_thing (K,) bool.
    Returns panoptic (H, W) int32, segment ids from 1 on, 0 where there is none, and segments [{"id", "label": class, "isthing", "score": the query's
    best class probability}]. temperature 0: no sharpening.
    """
    best = class_probabilities(p.logits, class_loss).amax(-1)                                   # (Q,)
    kept = ((best > object_threshold) & (p.logits.argmax(-1) < len(is_thing))).nonzero()[:, 0]  # (n,), without those that say "no object"
    scores, labels = class_probabilities(p.logits[kept], class_loss, temperature).max(-1)
    winner = torch.full(frame.original, len(kept), device=kept.device)                          # (H, W) int64; n is nobody
    highest, inside = torch.full_like(winner, -1, dtype=torch.float32), torch.zeros_like(winner, dtype=torch.bool)
    full = [0] * len(kept)
    for k, mask in enumerate(chain.from_iterable(resized_masks(p.embeddings[kept], pixels, frame))):        # a running maximum: no stack of full-size masks
        mask = mask.sigmoid()
        better = scores[k] * mask > highest
        highest, winner = torch.where(better, scores[k] * mask, highest), torch.where(better, k, winner)
        inside = torch.where(better, mask >= 0.5, inside)                                       # does the pixel belong to its winner's own mask?
        full[k] = (mask >= 0.5).sum().item()
    won, drawn = (pixel.bincount(minlength=len(kept) + 1).tolist() for pixel in (winner.flatten(), winner[inside]))
    things, best, ids, segments = is_thing.tolist(), best[kept].tolist(), [0] * (len(kept) + 1), {}
    for k, label in enumerate(labels.tolist()):
        if drawn[k] and won[k] / full[k] >= overlap_threshold:
            key = (label, k) if things[label] else label                                        # stuff of one class shares a segment
            segment = segments.setdefault(key, {"id": len(segments) + 1, "label": label, "isthing": things[label], "score": 0.0})
            segment["score"] = max(segment["score"], best[k])
            ids[k] = segment["id"]
    return {"panoptic": torch.tensor(ids, dtype=torch.int32, device=kept.device)[winner] * inside, "segments": list(segments.values())}


def semantic_of(p: Prediction, pixels: Tensor, frame: Frame, temperature: float = 0.06, class_loss: str = "focal", resize_first: bool = False) -> Tensor:
    """Class scores (K, H, W) of one image's pixels: every query's class probabilities times its mask's (MaskFormer, arXiv 2107.06278, section 3.4).

    p: logits (Q, K or K + 1), embeddings (Q, C). Models for semantic segmentation alone resize the class maps to the original size, others the mask
    logits (resize_first), as released. Large: 150 classes of 1024 x 2048 pixels are 1.2 GB, and twice that while class maps are resized;
    `semantic_labels` needs less.
    """
    weights = class_probabilities(p.logits, class_loss, temperature)                            # (Q, K)
    inner = frame if resize_first else frame._replace(original=frame.size)
    maps = weights.new_zeros(weights.shape[1], math.prod(inner.original))                       # (K, H * W)
    for part, masks in zip(weights.split(MASKS_AT_ONCE), resized_masks(p.embeddings, pixels, inner), strict=True):
        maps.addmm_(part.T, masks.sigmoid().flatten(1))                                         # in place, not one K x H x W more
    maps = maps.view(-1, *inner.original)
    return maps if resize_first else resize(maps, frame.original)


def stretch(x: Tensor, padded: int, size: int, original: int) -> Tensor:
    """What the two steps of `resized_masks` do along one axis: (n, m, length) -> (n, m, original)."""
    linear = partial(F.interpolate, mode="linear", align_corners=False)
    return linear(linear(x, size=padded)[..., :size], size=original)


def semantic_labels(p: Prediction, pixels: Tensor, frame: Frame, temperature: float = 0.06, class_loss: str = "focal", resize_first: bool = False) -> Tensor:
    """(H, W) int64: each pixel's best class of `semantic_of`, computed a band of rows at a time, so that no full-size map of every class is needed."""
    if resize_first:
        weights = class_probabilities(p.logits, class_loss, temperature)                        # (Q, K)
        maps = torch.einsum("qc,chw->qhw", p.embeddings.float(), pixels.float())                # a quarter of the padded size
    else:
        maps = semantic_of(p, pixels, frame._replace(original=frame.size), temperature, class_loss, resize_first=True)
        frame = frame._replace(padded=frame.size)
    heights, widths = zip(*frame, strict=True)                                                  # (padded, size, original) each
    vertical = stretch(torch.eye(maps.shape[1], device=maps.device)[None], *heights)[0].T       # (H, h): a row says which rows it is made of
    labels = []
    for rows in vertical.split(ROWS_AT_ONCE):
        used = rows.any(0).nonzero()[:, 0]
        band = stretch(torch.einsum("rh,nhw->nrw", rows[:, used], maps[:, used]), *widths)     # (n, r, W)
        labels.append((torch.einsum("qk,qrw->krw", weights, band.sigmoid()) if resize_first else band).argmax(0))
    return torch.cat(labels)


# ---------------------------------------------------------------------------------------------------------------- files
MODEL = MaskDINO


def build(config: Config, classes: dict) -> Segmenter:
    """A fresh model for `classes` = {"names", "category_ids", "is_thing"}."""
    model = file_of(config.model).MODEL(config, len(classes["names"]))
    model.classes = classes
    return model


def say(text: str) -> None:
    """Prints, in the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write to, under a temporary name beside `path`. It takes that name once it is on the disk, so a killed run or a power cut never leaves half
    a file. previous: a name under which what was there is kept. Raises ConfigError when the disk does not take it; what was there is then untouched.
    """
    path, reason = Path(path), None
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)                                  # a kill after this line leaves `previous`, and `temporary` whole
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)                                                # the names, too
        os.close(folder)
    except (OSError, RuntimeError) as error:                            # torch.save says a full disk as the one or the other
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"{path} cannot be written ({reason.strerror}): " + ("it is kept as it was before, " if path.exists() else "") +
                          "make room for it, or choose another folder") from None


def save(path: str | os.PathLike, content: dict, previous: Path | None = None) -> None:
    """torch.save that leaves a whole file or none: see `replacing`."""
    with replacing(path, previous) as file:
        torch.save(content, file)


def save_json(path: str | os.PathLike, content: object) -> None:
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode())


class Array:
    """A numpy array, or its type, while a pickle is read. Numpy's own would do what the pickle tells them about memory that is not theirs."""

    def __init__(self, value: np.ndarray | np.dtype | None = None) -> None:
        self.value = value

    def __setstate__(self, state: tuple) -> None:
        if isinstance(self.value, np.dtype):                            # (version, byte order ...)
            self.value = self.value.newbyteorder(state[1])
        else:                                                           # (version, shape, type, Fortran's order, bytes)
            self.value = array_of(state[4], state[2], state[1], "F" if state[3] else "C")


def array_of(data: bytes | str, kind: Array, shape: tuple, order: str = "C") -> np.ndarray:
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, kind.value).reshape(shape, order=order)


class ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays of numbers and plain containers. Whatever else a pickle asks for, which may be any code, is refused.

    A pickle may also set attributes of what it names, so these are only methods, which have none of their own, and a type written in C.
    """

    def find_class(self, module: str, name: str) -> Callable:
        admitted = {"OrderedDict": OrderedDict, "ndarray": self.number, "dtype": self.number, "_reconstruct": self.empty, "_frombuffer": self.whole,
                    "scalar": self.scalar, "encode": self.encode}
        if module.split(".")[0] in ("collections", "numpy", "_codecs") and name in admitted:
            return admitted[name]
        raise pickle.UnpicklingError(f"{module}.{name}")

    def number(self, name: str, *_: object) -> Array:
        if not isinstance(name, str) or not re.fullmatch(r"[<>=|]?[biufc]\d{1,2}", name):
            raise pickle.UnpicklingError(f"an array of {name}")
        return Array(np.dtype(name))

    def empty(self, *_: object) -> Array:
        return Array()

    def whole(self, data: bytes, kind: Array, shape: tuple, order: str) -> Array:
        return Array(array_of(data, kind, shape, order))

    def scalar(self, kind: Array, data: bytes) -> Array:
        return Array(array_of(data, kind, ()))

    def encode(self, text: str, _: str) -> bytes:
        return text.encode("latin1")


def read_pickle(path: Path) -> dict:
    """A .pkl of detectron2, {"model": {name: array}} or the weights alone -> {"model": {name: Tensor}}."""
    with open(path, "rb") as file:
        content = ArrayUnpickler(file, encoding="latin1").load()
    return {"model": {key: torch.tensor(x.value) for key, x in content.get("model", content).items()}}


def read_torch_file(path: Path) -> dict:
    """torch.load, or `read_pickle`, of tensors and plain containers only. Raises ConfigError for a missing file or one that is something else."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        content = read_pickle(path) if path.suffix == ".pkl" else torch.load(path, map_location="cpu", weights_only=True)
        # torch.load reads past damaged numbers; what we wrote has check sums. (Of other files nobody knows whether they do.)
        whole = not isinstance(content, dict) or not OWN <= content.keys() or zipfile.ZipFile(path).testzip() is None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, MemoryError,
            pickle.UnpicklingError, zipfile.BadZipFile):                                                # whatever is not whole
        whole = False
    if not whole:
        raise ConfigError(f"{path} is not a file of PyTorch weights (of tensors and plain values: nothing else is read), or it is damaged")
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    if OWN <= content.keys() and (wrong := misshapen(content)):
        raise ConfigError(f"{path} is no checkpoint that train.py wrote, or it is damaged: {wrong}")
    return content


OWN = {"model", "config", "classes"}                                  # what a checkpoint of train.py holds


def misshapen(content: dict) -> str:
    """What in a checkpoint of train.py, by its keys, is not of the kind that belongs there; or nothing. So a made-up one ends here, and not anywhere."""
    classes, config, kinds = content["classes"], content["config"], {"names": str, "category_ids": int, "is_thing": bool}
    if not isinstance(config, dict) or not isinstance(classes, dict) or classes.keys() != kinds.keys():
        return "'config' and 'classes' should be dictionaries, with names, category_ids and is_thing"
    if not all(isinstance(row, list) and {kinds[key]} >= set(map(type, row)) and len(row) == len(classes["names"]) > 0 for key, row in classes.items()):
        return "'classes' should have a name, an id and is_thing for each"
    for weights in (content["model"], content.get("ema") or {}):
        if not isinstance(weights, dict) or not all(isinstance(key, str) and isinstance(x, Tensor) for key, x in weights.items()):
            return "its weights should be tensors by name"
    hints = typing.get_type_hints(Config)
    return next((f"its configuration has {key}={value!r}" for key, value in config.items() if key in hints and not fits(value, hints[key])), "")


def fits(value: object, kind: type) -> bool:
    """Whether a value may stand in a field of Config: int, float, bool, str, Literal or tuple of one type."""
    if typing.get_origin(kind) is tuple:
        return isinstance(value, (tuple, list)) and all(fits(x, typing.get_args(kind)[0]) for x in value)
    return type(value) in {float: (float, int), int: (int,), bool: (bool,)}.get(kind, (str,))


def read_checkpoint(path: str | os.PathLike, **overrides) -> tuple[dict, Config]:
    """A checkpoint of train.py and its Config; `overrides` may change anything but the architecture (ConfigError)."""
    content = read_torch_file(Path(path))
    if not OWN <= content.keys():
        raise ConfigError(f"{path} is not a checkpoint of this project: it needs 'model', 'config' and 'classes', "
                          f"but holds {', '.join(sorted(map(str, content))[:5])}")
    return content, config_in(content, path, **overrides)


def config_in(content: dict, path: str | os.PathLike, **overrides) -> Config:
    """The configuration in what a checkpoint of train.py holds."""
    if unknown := sorted(content["config"].keys() - {field.name for field in dataclasses.fields(Config)}):
        raise ConfigError(f"{path} was written by another version: its configuration has {', '.join(unknown)}, which this one does not know")
    config = Config(**content["config"])
    for name, value in overrides.items():
        if name in ARCHITECTURE and value != getattr(config, name):
            raise ConfigError(f"--{name}={value} contradicts {path}, which was trained with {getattr(config, name)}: leave it out")
    return dataclasses.replace(config, **overrides)


def fill(module: nn.Module, state: dict[str, Tensor], source: object) -> None:
    """load_state_dict that says in a sentence what does not fit (ConfigError). Counters of batch norms and constants may be there or not."""
    own = module.state_dict()
    counter = ("num_batches_tracked", "relative_position_index")
    if extra := sorted(key for key in state.keys() - own.keys() if not key.endswith(counter)):
        raise ConfigError(f"{source}: {len(extra)} tensors have no place in this model, for example '{extra[0]}'")
    if missing := sorted(key for key in own.keys() - state.keys() if not key.endswith(counter)):
        raise ConfigError(f"{source}: {len(missing)} tensors are missing, for example '{missing[0]}'")
    for key in own.keys() & state.keys():
        if state[key].shape != own[key].shape:
            raise ConfigError(f"{source}: '{key}' has shape {tuple(state[key].shape)}, this model needs {tuple(own[key].shape)}")
    module.load_state_dict(state, strict=False)


def weights_in(content: dict, path: str | os.PathLike) -> dict[str, Tensor]:
    """A released checkpoint's weights: the file itself, or what it holds under "model" as detectron2 writes it."""
    state = content.get("model", content)
    if not isinstance(state, dict) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise ConfigError(f"{path} is no checkpoint: it should hold weights by name, or 'model', 'config' and 'classes' as train.py writes them, "
                          f"but has {', '.join(sorted(map(str, content))[:5]) or 'nothing'}")
    # "module." is DistributedDataParallel's; Mask2Former's older files have another name for one tensor.
    return {key.removeprefix("module.").replace(".static_query.", ".query_feat."): x for key, x in state.items()}


def read_weights(content: dict, path: str | os.PathLike, **overrides) -> tuple[dict[str, Tensor], Config, dict]:
    """Weights under our names, configuration and classes in a checkpoint of train.py (its averaged weights, if it has some) or in a released one."""
    if OWN <= content.keys():
        return content.get("ema") or content["model"], config_in(content, path, **overrides), content["classes"]
    state, remedy = weights_in(content, path), {"DINO": "it can only be a start: python train.py PRESET --finetune=..."}
    if (kind := family(state)) not in RELEASED:
        known = ", ".join(RELEASED)
        raise ConfigError(f"{path} is a checkpoint of {kind}, none of {known}: {remedy.get(kind, 'it cannot be used here')}" if kind != "unknown" else
                          f"{path} is no checkpoint of {known}: its tensors have names like '{next(iter(state))}'")
    config = official_config(state, path, **overrides)
    classes = class_list(len(state[CLASS_HEAD]) - (config.class_loss == "ce"))
    with torch.device("meta"):                                          # names and shapes only
        shell = build(config, classes)
    return from_official(state, shell, path), config, classes


def load(path: str | os.PathLike, device: str | torch.device = "cpu", **overrides) -> tuple[Segmenter, dict]:
    """A checkpoint of train.py or a released one -> the model in evaluation mode and its classes.

    `overrides` change fields of Config that are no architecture, such as test_short. Raises ConfigError for a file that is something else.
    """
    state, config, classes = read_weights(read_torch_file(Path(path)), path, **overrides)
    model = build(config, classes)
    fill(model, state, path)
    return model.to(device).eval(), classes


# ---------------------------------------------------------------------------------------------------------------- released checkpoints
RELEASED = {"Mask DINO": "maskdino", "Mask2Former": "mask2former", "DFormer": "dformer"}
BUFFERS: dict[str, Tensor] = {}                                         # constants in released checkpoints of this model alone
CLASS_HEAD = "sem_seg_head.predictor.class_embed.weight"
OFFICIAL = [                                                            # our name -> the released one
    (r"^backbone\.body\.(bn1|conv1)\.", lambda m: "backbone.stem.conv1." + "norm." * (m[1] == "bn1")),
    (r"^backbone\.body\.layer(\d)\.", lambda m: f"backbone.res{int(m[1]) + 1}."), (r"(?<=\d\.)bn(\d)\.", r"conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."), (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^backbone\.body\.0\.0\.", "backbone.patch_embed.proj."), (r"^backbone\.body\.0\.2\.", "backbone.patch_embed.norm."),                 # Swin
    (r"^backbone\.body\.([1357])\.", lambda m: f"backbone.layers.{int(m[1]) // 2}.blocks."),
    (r"^backbone\.body\.([246])\.", lambda m: f"backbone.layers.{int(m[1]) // 2 - 1}.downsample."),
    (r"\.mlp\.0\.", ".mlp.fc1."), (r"\.mlp\.3\.", ".mlp.fc2."), (r"^backbone\.norms\.", "backbone.norm"),
    (r"^pixel_decoder\.layers\.", "pixel_decoder.transformer.encoder.layers."), (r"^pixel_decoder\.level_embed", "pixel_decoder.transformer.level_embed"),
    (r"\.pixel_embed\.", ".mask_features."), (r"\.lateral\.0\.", ".adapter_1."), (r"\.lateral\.1\.", ".adapter_1.norm."),
    (r"\.smooth\.0\.", ".layer_1."), (r"\.smooth\.1\.", ".layer_1.norm."), (r"\.ffn\.0\.", ".linear1."), (r"\.ffn\.2\.", ".linear2."),
    (r"^query_selection\.content\.", "predictor.query_feat."), (r"^query_selection\.anchor_logits\.", "predictor.query_embed."),
    (r"^query_selection\.", "predictor."), (r"^label_embed\.", "predictor.label_enc."), (r"^heads\.norm\.", "predictor.decoder_norm."),
    (r"^heads\.class_head\.", "predictor.class_embed."), (r"^heads\.mask_head\.(\d)\.", lambda m: f"predictor.mask_embed.layers.{int(m[1]) // 2}."),
    (r"^heads\.box_head\.(\d)\.", lambda m: f"predictor._bbox_embed.layers.{int(m[1]) // 2}."),
    (r"^decoder\.anchor_embed\.(\d)\.", lambda m: f"predictor.decoder.ref_point_head.layers.{int(m[1]) // 2}."),
    (r"^decoder\.layers\.(\d+)\.norm([12])\.", lambda m: f"predictor.decoder.layers.{m[1]}.norm{3 - int(m[2])}."),      # theirs count differently
    (r"^decoder\.", "predictor.decoder."), (r"^(pixel_decoder|predictor)\.", r"sem_seg_head.\1."),
]


def renamed(name: str, table: list[tuple]) -> str:
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    return name


def official_names(name: str, config: Config) -> list[str]:
    """All names that one of our tensors has in a released checkpoint; the first is its own, the others are aliases of the same tensor."""
    if config.smallest_proposal == "fine" and (m := re.match(r"pixel_decoder\.input_proj\.(\d)\.", name)):
        backbone_levels = sum(stride <= 32 for stride in config.levels)
        if int(m[1]) < backbone_levels:                                 # these models count the backbone's levels from coarse to fine, extra ones after
            name = name.replace(m[0], f"pixel_decoder.input_proj.{backbone_levels - 1 - int(m[1])}.")
    return file_of(config.model).names_of(name, config)


def names_of(name: str, config: Config) -> list[str]:
    """`official_names` of Mask DINO."""
    name = renamed(name, OFFICIAL)
    numbers = range(config.dec_layers)
    return [name, *(name.replace("._bbox_embed.", f".{where}bbox_embed.{i}.") for where in ("", "decoder.") for i in numbers if "._bbox_embed." in name),
            *([name.replace(".decoder_norm.", ".decoder.norm.")] if ".decoder_norm." in name else [])]


def turn_levels(name: str, x: Tensor, config: Config) -> Tensor:
    """Ours to released and back. Our levels run from fine to coarse everywhere. The released decoder reads its encoder's levels in reverse, and there
    are two kinds of models: the encoder runs from fine to coarse and the decoder reversed, or the encoder reversed and the decoder as ours."""
    if name.startswith("decoder." if config.smallest_proposal == "coarse" else "pixel_decoder."):
        if re.search(r"\.(sampling_offsets|attention_weights)\.", name):
            levels = len(config.levels) if name.startswith("pixel") else config.decoder_levels or len(config.levels)
            return x.unflatten(0, (config.heads, levels, -1)).flip(1).flatten(0, 2)
        if name.endswith("level_embed"):
            return x.flip(0)
    return x.flip(0) if name == "decoder.level_embed.weight" else x     # Mask2Former's decoder, whose levels have no other trace


# What models must be like to have a place in the released format; a sibling's own table goes before.
RELEASABLE = {"task": ("instance", "panoptic", "semantic"), "denoising": ("mask", "box"), "decoder_levels": (0,), "backbone_norm": ("frozen", "batch"),
              "backbone": tuple(name for name in (*RESNET_BLOCKS, *SWINS) if name != "resnet10")}


def to_official(model: Segmenter) -> dict[str, Tensor]:
    """The model's weights as a released checkpoint has them, aliases and buffers included."""
    config, state = model.config, {}
    if wrong := misfit(config, RELEASABLE | file_of(config.model).RELEASABLE):
        raise ConfigError(f"the released format has no place for this model: it does not know {wrong}")
    for name, x in model.state_dict().items():
        state |= dict.fromkeys(official_names(name, config), turn_levels(name, x, config))
    weight = torch.ones(model.num_classes + 1)
    weight[-1] = 0.1
    return state | {"criterion.empty_weight": weight} | file_of(config.model).BUFFERS


def from_official(state: dict[str, Tensor], model: Segmenter, source: object) -> dict[str, Tensor]:
    """A released checkpoint under our names. Every tensor is accounted for: used, an alias (checked to be equal) or a buffer that is known.

    Raises ConfigError for a missing tensor, one of another shape, an alias that differs, and one that nobody asked for.
    """
    left, ours, config = dict(state), {}, model.config
    for name, own in model.state_dict().items():
        if name.endswith("relative_position_index"):                    # a constant of Swin's
            continue
        official, *aliases = official_names(name, config)
        if official not in left:
            raise ConfigError(f"{source}: '{official}' is missing; the file is damaged or of another version: download it again")
        x = left.pop(official)
        if x.shape != own.shape:
            raise ConfigError(f"{source}: '{official}' has shape {tuple(x.shape)}, the rest of the file asks for {tuple(own.shape)}: download it again")
        for alias in aliases:
            if not torch.equal(left.pop(alias, x), x):
                raise ConfigError(f"{source}: '{alias}' should be the same tensor as '{official}' and is not: this is no checkpoint of the released code")
        ours[name] = turn_levels(name, x, config)
    known = ("criterion.empty_weight", "relative_position_index", "num_batches_tracked", *file_of(config.model).BUFFERS)
    if unknown := sorted(key for key in left if not key.endswith(known)):
        raise ConfigError(f"{source}: {len(unknown)} tensors have no place in this model, for example '{unknown[0]}': it is of a model that is not known here")
    return ours


def class_list(count: int) -> dict:
    """The classes of the released models, told by their number: COCO 80, COCO panoptic 133, ADE20K 150, Cityscapes 19; others go by number."""
    for known in json.loads(CLASS_LISTS.read_text()).values():
        if len(known["names"]) == count:
            return known
    return {"names": [f"class {i}" for i in range(count)], "category_ids": list(range(1, count + 1)), "is_thing": [True] * count}


class Clues(NamedTuple):
    """The names and shapes in a released checkpoint, which tell what model it is."""
    state: dict[str, Tensor]
    source: object

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.state:
            raise ConfigError(f"{self.source}: '{name}' is missing; the file is damaged or of another version: download it again")
        return tuple(self.state[name].shape)

    def has(self, pattern: str) -> bool:
        return any(re.match(pattern, key) for key in self.state)

    def count(self, pattern: str) -> int:
        return len({m[1] for key in self.state if (m := re.match(pattern, key))})


def facts_of(clues: Clues) -> dict[str, object]:
    """Fields of Config that tell Mask DINO's models apart."""
    decoder, learned = "sem_seg_head.predictor.decoder.layers", "sem_seg_head.predictor.query_feat.weight"
    labels, outputs = clues.shape("sem_seg_head.predictor.label_enc.weight")[0], clues.shape(CLASS_HEAD)[0]
    two_stage = clues.has(r"sem_seg_head\.predictor\.enc_output")
    facts = {"dec_layers": clues.count(re.escape(decoder) + r"\.(\d+)\."), "dec_ffn": clues.shape(f"{decoder}.0.linear1.weight")[0],
             "two_stage": two_stage, "class_loss": "ce" if outputs == labels + 1 else "focal",
             "content_queries": "learned" if two_stage and learned in clues.state else "selected"}
    return facts | ({"queries": clues.shape(learned)[0]} if learned in clues.state else {})


def official_config(state: dict[str, Tensor], source: object, **overrides) -> Config:
    """The configuration of a released checkpoint: the architecture by names and shapes, what they don't tell by the matching preset. Prints the latter."""
    clues, model = Clues(state, source), RELEASED[family(state)]
    proj, encoder = "sem_seg_head.pixel_decoder.input_proj", "sem_seg_head.pixel_decoder.transformer.encoder.layers"
    L = clues.count(re.escape(proj) + r"\.(\d+)\.")
    inputs = [clues.shape(f"{proj}.{i}.0.weight") for i in range(L)]
    known = sorted(s[1] for s in inputs if s[-1] == 1)                                  # 1 x 1 convolutions read the backbone, 3 x 3 ones the level before
    finest = 4 if (known and known[0] == clues.shape("sem_seg_head.pixel_decoder.adapter_1.weight")[1]) else 8
    facts = {
        "model": model, "backbone": backbone_of(clues), "backbone_norm": "batch" if clues.has(r"backbone\.stem.*\.num_batches_tracked") else "frozen",
        "levels": tuple(finest * 2 ** i for i in range(L)), "hidden": clues.shape(f"{proj}.0.0.weight")[0],
        "smallest_proposal": "coarse" if L < 2 or inputs[0][1] < inputs[1][1] else "fine",
        "enc_layers": clues.count(re.escape(encoder) + r"\.(\d+)\."), "enc_ffn": clues.shape(f"{encoder}.0.linear1.weight")[0]}
    facts |= file_of(model).facts_of(clues)
    K = clues.shape(CLASS_HEAD)[0] - (facts["class_loss"] == "ce")
    facts["task"] = {80: "instance", 133: "panoptic", 150: "semantic", 19: "semantic"}.get(K, "instance")

    def likeness(name: str) -> tuple[int, bool]:
        told = ("task", "backbone", "backbone_norm", "enc_ffn", "two_stage", "class_loss")      # enough to tell the released models apart, but for two
        return sum(getattr(preset(name), key) == facts[key] for key in told), PRESETS[name]["released"] in str(source)
    name = max((name for name, row in PRESETS.items() if "released" in row and preset(name).model == model), key=likeness)
    config = dataclasses.replace(preset(name), **facts)
    for key, value in overrides.items():
        if key in facts and value != facts[key]:
            raise ConfigError(f"--{key}={value} contradicts {source}, which has {facts[key]}: leave it out")
    config = dataclasses.replace(config, **overrides)
    guessed = ("box_init", "queries", "test_short", "test_long", "object_threshold", "overlap_threshold", "temperature")
    guessed = [key for key in guessed if key not in facts and key not in overrides and key not in file_of(model).SUPPORTED]
    say(f"{source}: a released checkpoint, {config.task}, {config.backbone}, levels {','.join(map(str, config.levels))}, {K} classes; "
        f"taken from preset {name}: " + ", ".join(f"{key}={getattr(config, key)}" for key in guessed))
    return config


def backbone_of(clues: Clues) -> str:
    """The backbone's name by its blocks: how many the third stage has, and how wide the first is."""
    if clues.has(r"backbone\.layers\."):
        key = clues.count(r"backbone\.layers\.2\.blocks\.(\d+)\."), clues.shape("backbone.patch_embed.proj.weight")[0]
        found = {(6, 96): "swin_t", (18, 96): "swin_s", (18, 128): "swin_b", (18, 192): "swin_l"}.get(key)
    else:
        key = clues.count(r"backbone\.res4\.(\d+)\."), clues.has(r"backbone\.res\d\.\d+\.conv3\.")                      # the latter: bottleneck blocks
        found = {(6, True): "resnet50", (23, True): "resnet101", (2, False): "resnet18", (6, False): "resnet34"}.get(key)
    if not found:
        raise ConfigError(f"{clues.source}: its backbone is none of ResNet-18, 34, 50, 101, Swin-T, S, B and L")
    return found


def family(state: dict) -> str:
    """Whose checkpoint it is, by its names."""
    marks = {"DFormer": "predictor.time_mlp", "Mask2Former": "predictor.transformer_cross_attention_layers.0.",
             "Mask DINO": "sem_seg_head.predictor.", "DINO": "transformer.enc_out_class_embed.", "DETR": "transformer.decoder.layers.0."}
    return next((name for name, mark in marks.items() if any(mark in key for key in state)), "unknown")


def swin_weights(content: dict, body: nn.Module) -> dict[str, Tensor]:
    """A Swin classifier's weights, torchvision's or Microsoft's ({"model": ...}) -> those of `body`, under its names. The norms of the maps start fresh.

    The classifier (final norm and head) and Microsoft's attention masks are left out; other names that `body` lacks stay in, for `fill` to complain about.
    """
    names = {renamed(f"backbone.body.{name}", OFFICIAL).removeprefix("backbone."): name for name in body.state_dict()}          # Microsoft's -> ours
    state = {names.get(key, key.removeprefix("features.")): x for key, x in content.get("model", content).items()
             if not key.startswith(("norm.", "head.")) and not key.endswith(".attn_mask")}
    return {key: x.view(math.isqrt(x.numel()), -1) if key.endswith(".relative_position_index") else x for key, x in state.items()}


DINO = [                                                                # our name -> that of DINO's detection checkpoints
    (r"^backbone\.body\.", "backbone.0.body."), (r"^pixel_decoder\.layers\.", "transformer.encoder.layers."),
    (r"^pixel_decoder\.input_proj\.", "input_proj."), (r"^pixel_decoder\.level_embed", "transformer.level_embed"),
    (r"\.ffn\.0\.", ".linear1."), (r"\.ffn\.2\.", ".linear2."), (r"^query_selection\.enc", "transformer.enc"), (r"^label_embed\.", "label_enc."),
    (r"^heads\.norm\.", "transformer.decoder.norm."), (r"^heads\.class_head\.", "transformer.decoder.class_embed.5."),
    (r"^heads\.box_head\.(\d)\.", lambda m: f"transformer.decoder.bbox_embed.5.layers.{int(m[1]) // 2}."),
    (r"^decoder\.anchor_embed\.(\d)\.", lambda m: f"transformer.decoder.ref_point_head.layers.{int(m[1]) // 2}."),
    (r"^decoder\.layers\.(\d+)\.", lambda m: f"transformer.decoder.layers.{min(int(m[1]), 5)}."),        # it has 6 layers: more start as the last
    (r"^(transformer\.decoder\.layers\.\d+)\.norm([12])\.", lambda m: f"{m[1]}.norm{3 - int(m[2])}."),
]


CLASS_ROWS = ("heads.class_head.", "label_embed.")                      # tensors with a row for each class


def from_dino(state: dict[str, Tensor], model: Segmenter, category_ids: list[int]) -> dict[str, Tensor]:
    """What a DINO detection checkpoint (arXiv 2203.03605) has for this model, under our names; class rows for the given COCO ids.

    Its heads for encoder tokens are not used: here encoder and decoder share one set of heads. Nor are its 900 learned queries.
    """
    ours = {}
    for name in model.state_dict():
        if (theirs := renamed(name, DINO)) in state:
            ours[name] = state[theirs][category_ids] if name.startswith(CLASS_ROWS) else state[theirs]
    return ours


class Start(NamedTuple):
    """What fine-tuning starts from."""
    weights: dict[str, Tensor]      # under our names; DINO's under its own
    config: Config | None           # None: DINO's, which go with any preset of their levels and widths
    classes: dict
    source: str


def read_start(path: str, **overrides) -> Start:
    """A checkpoint of ours, a released one or a detection checkpoint of DINO."""
    content = read_torch_file(Path(path))
    if OWN - content.keys() and family(state := weights_in(content, path)) == "DINO":
        return Start(state, None, class_list(80), path)
    return Start(*read_weights(content, path, **overrides), path)


def start_from(model: Segmenter, start: Start) -> str:
    """Fills a fresh model; tensors that the checkpoint lacks stay as they are. Class head and label embedding get the rows of classes of the same name.

    Returns what happened, in words. Raises ConfigError for tensors of another shape.
    """
    state = start.weights if start.config else from_dino(start.weights, model, start.classes["category_ids"])
    own, names, rows = model.state_dict(), model.classes["names"], {name: i for i, name in enumerate(start.classes["names"])}
    common = [name for name in names if name in rows]
    carried = own.keys() & state.keys()
    for key in carried:
        if key.startswith(CLASS_ROWS):
            none = [-1] * (len(own[key]) > len(names) and len(state[key]) > len(rows))         # both heads have a row for no object
            own[key][[names.index(name) for name in common] + none] = state[key][[rows[name] for name in common] + none]
        elif state[key].shape == own[key].shape:
            own[key].copy_(state[key])
        else:
            raise ConfigError(f"{start.source}: '{key}' has shape {tuple(state[key].shape)}, this model needs {tuple(own[key].shape)}: choose the preset "
                              "that it was made with")
    rooms = [sorted({".".join(key.split(".")[:2]) for key in keys}) for keys in (carried, own.keys() - carried)]
    listed = f" ({', '.join(common[:8])}{' ...' if len(common) > 8 else ''})" if common else ""
    return (f"started from {start.source}\n  carried over: {', '.join(rooms[0])}\n  fresh: {', '.join(rooms[1]) or 'nothing'}\n"
            f"  rows of class head and label embedding: {len(common)} of {len(names)} classes matched by name{listed}")


# ---------------------------------------------------------------------------------------------------------------- looking inside
class Call(NamedTuple):
    """What a module was given and what it gave."""
    given: tuple
    gave: object


@contextlib.contextmanager
def recording(model: nn.Module, pattern: str = ".*") -> Iterator[dict[str, list[Call]]]:
    r"""While it lasts, keeps the calls of all modules whose whole name matches `pattern` ("" is the model itself), in order:

        with maskdino.recording(model, r"decoder\.layers\.\d+") as record:
            model.predict(["photo.jpg"])
        record["decoder.layers.0"][0].given[2]                          # the anchors of the first layer, (1, Q, 4)

    PyTorch's hooks do it: the model does not know, so its numbers are the same, and nobody pays when nobody looks. Tensors are not copied.
    """
    record: dict[str, list[Call]] = {}
    hooks = [module.register_forward_hook(lambda _module, given, gave, name=name: record.setdefault(name, []).append(Call(given, gave)))
             for name, module in model.named_modules() if re.fullmatch(pattern, name)]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------------------------------------------------------- a tour
def walk(model: Segmenter, images: Tensor, size: tuple[int, int]) -> tuple[dict, Counter]:
    """Sends one image through the model -> what every module (by name; "" is the model) gave out first, and every module's own FLOPs.

    Own: a stack says which module is at work, and what was counted since the last look is its work alone, not that of those who called it.
    """
    names = {module: name for name, module in model.named_modules()}
    at_work, seen, flops, counter = ["masks"], {"masks": None}, Counter(), FlopCounterMode(display=False)

    def look() -> None:
        flops[at_work[-1]] += counter.get_total_flops() - flops.total()

    def enter(module: nn.Module, _args: tuple) -> None:
        look()
        at_work.append(names[module])

    def leave(_module: nn.Module, _args: tuple, out: object) -> None:
        look()
        seen.setdefault(at_work.pop(), out)

    for module in names:
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    with counter:
        output = model(images, [size])
        if output.pixels is not None:
            seen["masks"] = mask_logits(list(output.sets.values())[-1].embeddings, output.pixels)
        look()
    return seen, flops


def tour(model: Segmenter, height: int = 800, width: int = 1333) -> str:
    """Figure 1 as a table, from image to masks: rooms with their parameters and GFLOPs, and in them the tensors with their shapes.

    A twin on the meta device does the walk: its tensors have shapes but no numbers, nothing is computed, and `model` stays as it is. A room's
    FLOPs are those of its own modules, wherever they are called from. Counted are matrix products, convolutions and both kinds of attention;
    not norms, activations and sums. Frozen norms have no parameters.
    """
    config, K = model.config, model.num_classes
    with torch.device("meta"):
        twin = type(model)(config, K).eval().requires_grad_(False)
        images = torch.empty(1, 3, height + -height % 32, width + -width % 32, dtype=torch.uint8)
    seen, flops = walk(twin, images, (height, width))
    parameters = {name: p.numel() for name, p in twin.named_parameters()}
    memory, shapes, pixels = seen["pixel_decoder"]
    sets = seen[""].sets
    last = list(sets.values())[-1]

    # Name, tensor, whose parameters and FLOPs (a pattern of names), remark. What a configuration does not have drops out.
    rows = [
        ("images", images, None, f"{height} x {width}, padded to multiples of 32"),
        ("backbone", None, "backbone", config.backbone),
        *((f"  features[{i}]", x, None, f"stride {4 * 2 ** i}") for i, x in enumerate(seen["backbone"])),
        ("pixel_decoder", None, "pixel_decoder", "tokens for attention, a map for masks (section 3.4)"),
        ("  input_proj", None, "pixel_decoder.(input_proj|level_embed)", "one level for each stride of " + ", ".join(map(str, config.levels))),
        ("  layers: self_attn", None, r"pixel_decoder.layers.\d+.(self_attn|norm1)", f"x {config.enc_layers}: {places(config)} each token"),
        ("  layers: ffn", None, r"pixel_decoder.layers.\d+.(ffn|norm2)", f"x {config.enc_layers}"),
        ("  memory", memory, None, "tokens of the levels: " + " + ".join(f"{h} x {w}" for h, w in shapes)),
        ("  pixels", pixels, "pixel_decoder.(lateral|smooth|pixel_embed)", "pixel embedding map, from features[0] and the finest tokens"),
        *file_of(config.model).rooms(model, seen),
        ("heads", None, "heads", f"one set of weights for {len(sets)} predictions: {', '.join([*sets][:3])} ... {[*sets][-1]}"),
        ("  logits", last.logits, "heads.class_head", "of each prediction; for the selection, of all tokens" if "selection" in sets else "of each prediction"),
        ("  boxes", last.boxes, "heads.box_head", ""),
        ("  embeddings", last.embeddings, "heads.mask_head", ""),
        ("masks", seen["masks"], "masks", "embeddings of the last prediction times pixels (equation 1)")]
    lines = [("", "shape", "parameters", "GFLOPs", "")]
    for name, tensor, pattern, remark in rows:
        own = [sum(n for key, n in counts.items() if pattern and re.match(rf"({pattern})(\.|$)", key)) for counts in (parameters, flops)]
        if tensor is not None or any(own):
            lines.append((name, "" if tensor is None else " x ".join(map(str, tensor.shape)), *numbers(*own), remark))
    rest = sum(n for key, n in parameters.items() if not key.startswith(("backbone.", "pixel_decoder.")))
    lines.append(("total", "", *numbers(sum(parameters.values()), flops.total()), f"= backbone + pixel_decoder + {rest:,} for the rest"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = ["  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, "<<>><", widths)).rstrip() for line in lines]
    head = f"{config.task}, {config.backbone}, {K} classes, one image. A multiply-add is two FLOPs, as PyTorch counts; papers often count one."
    return "\n".join([head, *lines])


def places(config: Config) -> str:
    return f"{config.heads} heads x {config.attention_points} places on each level, around"


def rooms(model: Segmenter, seen: dict) -> list[tuple]:
    """Rows of the tour between pixel decoder and heads: what only Mask DINO has."""
    config, (content, anchors, selection), (state, boxes) = model.config, seen["query_selection"], seen["decoder"][-1]
    Q = content.shape[1]
    return [
        ("query_selection", None, "query_selection", "tokens become queries (section 3.5)" if selection else "learned queries"),
        ("  logits of tokens", selection and seen["heads.class_head"], None, f"by the class head; the best {Q} are selected"),
        ("  content", content, None, "what a query is: " + (config.content_queries if selection else "learned")),
        ("  anchors", anchors, None, "where it looks: " + (f"box_init {config.box_init}" if selection else "learned")),
        ("label_embed", None, "label_embed", "denoising, in training only (section 3.6)"),
        *noised(config, model.num_classes, Q),
        ("decoder", None, "decoder", f"x {config.dec_layers}; moves the anchors layer by layer"),
        ("  anchor_embed", None, "decoder.anchor_embed", "anchors as positions"),
        ("  layers: self_attn", None, r"decoder.layers.\d+.(self_attn|norm1)", "among queries"),
        ("  layers: cross_attn", None, r"decoder.layers.\d+.(cross_attn|norm2)", f"{places(config)} each anchor"),
        ("  layers: ffn", None, r"decoder.layers.\d+.(ffn|norm3)", ""),
        ("  state", state, None, "the queries after a layer"),
        ("  boxes", boxes, None, "their anchors after it")]


def noised(config: Config, K: int, Q: int) -> list[tuple]:
    """Rows of the tour about denoising, for an image with ten objects."""
    truth = {"labels": torch.zeros(10, dtype=torch.long), "boxes": torch.zeros(10, 4), "key": 0}
    denoising = make_denoising([truth], nn.Embedding.from_pretrained(torch.zeros(K, config.hidden)), config) if config.denoising != "none" else None
    if denoising is None:
        return []
    blocked = denoising_attention_mask(denoising.groups, 10, Q, denoising.content.device)
    return [("  content", denoising.content, None, f"noised labels of 10 objects, {denoising.groups} groups, in front of the queries"),
            ("  anchors", denoising.anchors, None, "noised boxes"),
            ("  blocked", blocked, None, "who must not see whom in the decoder's self-attention")]


def numbers(parameters: int, flops: int) -> tuple[str, str]:
    return f"{parameters:,}" if parameters else "", f"{flops / 1e9:,.2f}" if flops else ""


def classes_of(name: str) -> int:
    """How many classes the data set has that a preset is named after; else 80."""
    lists = json.loads(CLASS_LISTS.read_text())
    return next((len(lists[key]["names"]) for key in sorted(lists, key=len, reverse=True) if key in name), 80)


def main() -> None:
    """The command line. What the user can mend ends as one sentence and exit code 1."""
    try:
        words, actions, overrides = parse_overrides(sys.argv[1:], {"classes": int, "help": bool})
        name = words[0] if words else "coco_instance_r50_50ep"
        if actions.get("help"):
            return print(__doc__)
        if len(words) > 1:
            raise ConfigError(f"one model at a time, not {' and '.join(words)}")
        if name == Path(name).stem:                                     # no folder, no ending: a preset
            config = preset(name, **overrides)
            with torch.device("meta"):
                model = file_of(config.model).MODEL(config, actions.get("classes", classes_of(name)))
        elif "classes" in actions:
            raise ConfigError(f"--classes is for presets, {name} knows its own: leave it out")
        else:
            model = load(name, **overrides)[0]
        print(tour(model, model.config.test_short, model.config.test_long))
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.modules["maskdino"] = sys.modules["__main__"]       # so that a sibling imports this very file, not a second copy
    main()
