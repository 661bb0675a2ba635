"""Training: presets, the loop, checkpoints, logs. One process or many, the same command.

    python train.py                                                             # preset `shapes`: generated data, a laptop's CPU, 10 minutes
    python train.py --list                                                      # all presets
    torchrun --standalone --nproc_per_node=8 train.py coco_instance_r50_50ep --data=/data/coco
    python train.py shapes --explain_batch                                      # a page about the next step (of the run's checkpoint, if any), no training
    python train.py coco_instance_r50_12ep --data=/data/mine --epochs=20 --total_batch=4 --accumulate=2 --image_size=512
    torchrun --standalone --nproc_per_node=8 train.py --table=components --data=/data/coco     # the rows of a table of the paper, one after the other
    python train.py --table=components --scale=shapes --seeds=3                                 # the same rows, small, on generated data; --dry_run

Every field of `maskdino.Config` is a flag. Beside them: --data=DIR or --{train,val}_{json,images}=PATH, --out=DIR (runs/PRESET), --epochs=N (instead of
iterations; learning rate drops at the same fractions), --resume (goes on from the run's checkpoint if there is one, else starts), --overwrite, --device,
--finetune=CKPT (a checkpoint of ours, a released one, or a detection checkpoint of DINO: starts from its weights, classes matched by name).
--table=NAME (of evaluate.TABLES) instead of a preset: flags of Config then go to all rows, and --out is the folder of their folders (runs).

A run leaves config.json, log.jsonl, checkpoint.pth, result.json, results_{bbox,segm}.json, predictions.png and curves.png.

Every random number of a step is a function of the seed and the sample's position in the run, so a step does not depend on the number of processes,
on accumulation, on loader workers or on how often the run was stopped and resumed; checkpoints need no generator states. Learning rates are one of
the step, too. SIGTERM or SIGUSR1 ends a run with a checkpoint after the step at hand, and exit code 0; the same command with --resume goes on.
"""
import contextlib
import dataclasses
import errno
import inspect
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import evaluate
import maskdino
from evaluate import World, autocast
from losses import WEIGHTS, Criterion
from maskdino import Config, ConfigError, MaskDINO

ACTIONS = {"help": bool, "list": bool, "data": str, "out": str, "resume": bool, "overwrite": bool, "epochs": float, "device": str, "finetune": str,
           "classes": str, "table": str, "scale": str, "seeds": int,
           "dry_run": bool, "explain_batch": bool} | {f"{split}_{kind}": str for split in ("train", "val") for kind in data.FLAGS}
SHAPES = Path("datasets/shapes")                                        # where the generated data set lives
CHECKPOINT, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"
RUN_FILES = ("config.json", "log.jsonl", f"{CHECKPOINT}*", PREVIOUS, "result.json", "result_layers.json", "results_bbox.json", "results_segm.json",
             "panoptic.json", "predictions.png", "curves.png", "bad_batch_*.pth")
STOP_SIGNALS = signal.SIGTERM, signal.SIGUSR1                           # what clusters send before they take a machine away
MEMORY = "can't allocate memory", "out of memory", "ALLOC_FAILED"          # what exceptions say that have no type of their own
DISK = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM


# ---------------------------------------------------------------------------------------------------------------- optimizer
def parameter_groups(model: nn.Module, config: Config) -> list[dict]:
    """No weight decay on norms, embeddings and Swin's position tables; biases and the level vector decay, as released. The backbone learns at
    lr x backbone_lr. Which parameter is in which group depends on the model alone: checkpoints count them in this order."""
    backbone = {id(p) for p in model.backbone.parameters()}
    groups: dict[tuple[bool, bool], list] = {}
    for module in model.modules():
        free = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.Embedding))
        for name, p in module.named_parameters(recurse=False):
            groups.setdefault((id(p) in backbone, free or name == "relative_position_bias_table"), []).append(p)
    rates = {inside: config.lr * (config.backbone_lr if inside else 1) for inside in (True, False)}
    return [{"params": params, "lr": rates[inside], "initial_lr": rates[inside], "weight_decay": 0.0 if free else config.weight_decay}
            for (inside, free), params in groups.items()]


def lr_factor(step: int, config: Config) -> float:
    """What the learning rates are multiplied with at a step (counted from 0): linear warm-up, then drops by ten, half a cosine or a polynomial."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.lr_schedule == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.iterations)))
    if config.lr_schedule == "poly":
        return warm * (1 - step / config.iterations) ** 0.9
    return warm * 0.1 ** sum(step >= drop for drop in config.lr_drops)


# ---------------------------------------------------------------------------------------------------------------- one step
@dataclass
class State:
    """What a checkpoint holds."""
    model: MaskDINO
    optimizer: torch.optim.Optimizer
    ema: AveragedModel | None
    step: int = 0                   # finished steps
    bad: int = 0                    # the last so many of them were skipped
    seconds: float = 0.0            # spent on them, over all sessions

    @classmethod
    def fresh(cls, model: MaskDINO, config: Config) -> "State":
        optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, fused=True)
        return cls(model, optimizer, AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None)

    @property
    def best(self) -> MaskDINO:
        """The model to evaluate: the averaged one if there is one."""
        return self.ema.module if self.ema else self.model

    def save(self, out: Path, config: Config) -> None:
        """Writes checkpoint.pth; the one before it stays, under another name."""
        content = {"model": self.model.state_dict(), "ema": self.ema.module.state_dict() if self.ema else None,
                   "averaged": int(self.ema.n_averaged) if self.ema else 0, "optimizer": self.optimizer.state_dict(), "step": self.step, "bad": self.bad,
                   "seconds": self.seconds, "config": dataclasses.asdict(config), "classes": self.model.classes}
        maskdino.save(out / CHECKPOINT, content, previous=out / PREVIOUS)

    def restore(self, content: dict, checkpoint: Path) -> None:
        """Takes over what a checkpoint holds; learning rates and weight decay are those of the configuration. Raises ConfigError."""
        maskdino.fill(self.model, content["model"], checkpoint)
        if self.ema and content.get("ema"):
            maskdino.fill(self.ema.module, content["ema"], checkpoint)
        groups, parameters = self.optimizer.state_dict()["param_groups"], [p for group in self.optimizer.param_groups for p in group["params"]]
        try:
            moments = content["optimizer"]["state"]
            if any(x.shape not in ((), parameters[i].shape) for i, row in moments.items() for x in row.values()):       # the optimizer would not look
                raise ValueError
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
            self.step, self.bad, self.seconds = int(content["step"]), int(content["bad"]), float(content["seconds"])
            if self.ema:
                self.ema.n_averaged.fill_(int(content["averaged"]))                 # at 0 the first update copies instead of averaging
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            raise ConfigError(f"{checkpoint} does not hold what a run needs to go on: --finetune={checkpoint} starts from its weights") from None


def to_device(targets: list[dict], device: torch.device) -> list[dict]:
    return [{k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in t.items()} for t in targets]


def by_part(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """The criterion's losses summed over the prediction sets: {"mask": ..., "denoising/mask": ...}."""
    parts = {}
    for name, value in losses.items():
        where, part = name.partition("/")[0], name.rpartition("/")[2]
        key = f"{where}/{part}" if where in ("denoising", "matching") else part
        parts[key] = parts.get(key, 0) + value.detach()
    return parts


def forward_backward(network: nn.Module, criterion: Criterion, batches: list, config: Config, world: World) -> tuple[float, dict[str, Tensor], list[str]]:
    """Gradients of one effective batch: this process's micro-batches, one after the other.

    Returns this process's share of the loss, its parts, and which images and parts were not finite. The losses are divided by the objects of the whole
    effective batch (over processes and micro-batches) divided by the processes, since DDP averages over them: the gradient is that of one process with
    everything in one batch.
    """
    objects, = world.sum([sum(len(t["labels"]) for _, targets in batches for t in targets)])
    num_objects = max(objects, 1) / world.size
    total, sums, wrong = 0.0, {}, []
    for i, (images, targets) in enumerate(batches):
        last = i == len(batches) - 1
        images, targets = images.to(world.device, non_blocking=True), to_device(targets, world.device)
        with contextlib.nullcontext() if last or world.size == 1 else network.no_sync():
            with autocast(config, world.device):
                output = network(images, [t["size"] for t in targets], targets)
            loss, losses = criterion(output, targets, num_objects)
            loss.backward()
        value, parts = loss.item(), by_part(losses)
        total += value
        for name, part in parts.items():
            sums[name] = sums.get(name, 0) + part
        if not math.isfinite(value):
            bad = {name: float(part) for name, part in parts.items() if not math.isfinite(part)}
            wrong.append(f"images {[t['image_id'] for t in targets]}, parts {bad}")
    return total, sums, wrong


def train_step(state: State, network: nn.Module, criterion: Criterion, batches: list, config: Config, world: World) -> dict | None:
    """One optimizer step. Returns what the log wants to know, or None when the loss or gradient was not finite and the step was skipped (on all ranks)."""
    seed = np.random.SeedSequence([config.seed, state.step, world.rank]).generate_state(1)[0]
    torch.manual_seed(int(seed))                                                    # for whatever layers draw by themselves
    statistics = [(x, x.clone()) for m in state.model.modules() if isinstance(m, nn.BatchNorm2d) for x in m.buffers()]
    for group in state.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_factor(state.step, config)
    state.optimizer.zero_grad(set_to_none=True)
    own, parts, wrong = forward_backward(network, criterion, batches, config, world)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
    loss = world.sum([own])[0] / world.size
    finite = math.isfinite(loss) and math.isfinite(norm)
    state.step += 1
    state.bad = 0 if finite else state.bad + 1
    if not finite:
        report = [f"the loss is not finite, step skipped; rank {world.rank}, {line}" for line in wrong]
        if math.isfinite(loss) and world.first:
            report = [f"the gradient is not finite (the loss is {loss:.4g}), step skipped"]
        for line in report:
            tqdm.write(f"step {state.step}: {line}")
        for x, before in statistics:
            x.copy_(before)
        return None
    state.optimizer.step()
    if state.ema:
        state.ema.update_parameters(state.model)
    lr = max(group["lr"] for group in state.optimizer.param_groups)
    return {"loss": loss, "parts": parts, "lr": lr, "grad_norm": float(norm)}


# ---------------------------------------------------------------------------------------------------------------- when it does not go on
class Stopped(BaseException):
    """A signal asked for the end, and everything is on the disk. Its argument: the signal's number."""


@contextlib.contextmanager
def on_signal(handler: Callable) -> Iterator[None]:
    """What SIGTERM and SIGUSR1 do within."""
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def leave(number: int, _: object) -> None:
    raise Stopped(number)


def spare_once(_: int) -> None:
    """For a loader's worker, which such a signal may reach, too, and which has to live until its step is finished: the first of each is ignored."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: signal.signal(number, signal.SIG_DFL))


def out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Of a GPU, which has an exception of its own, or of a CPU or an Apple GPU, which have none."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in MEMORY)


def memory_advice(name: str, config: Config, batches: list, world: World) -> str:
    (images, targets), everything = batches[0], [t for _, targets in batches for t in targets]
    ids, objects = [t["image_id"] for t in everything], [len(t["labels"]) for t in everything]
    less = f"--accumulate={2 * config.accumulate} (the batch of {config.total_batch} stays), " if len(targets) % 2 == 0 else ""
    return (f"out of memory on rank {world.rank} ({world.device}): preset {name}, images {ids} with {objects} objects, {len(targets)} at once of "
            f"{images.shape[-2]} x {images.shape[-1]} pixels: try {less}--checkpoint_activations, --precision=bf16, a smaller --image_size")


def give_up(state: State, batches: list, config: Config, out: Path, world: World) -> None:
    """After too many steps without a finite loss: every process leaves its batch. Raises ConfigError."""
    path = out / f"bad_batch_{world.rank}.pth"
    maskdino.save(path, {"step": state.step, "batches": batches} | ({"model": state.model.state_dict()} if world.first else {}))
    raise ConfigError(f"{state.bad} steps in a row had no finite loss: look at the images named above and at the last of their batches, {path} "
                      "(torch.load reads it), lower --lr, or try --precision=fp32")


# ---------------------------------------------------------------------------------------------------------------- the loop
def train(state: State, config: Config, dataset: data.ImageDataset, out: Path, world: World, evaluation: data.ImageDataset, name: str) -> None:
    """From state.step to the end. Writes log lines and checkpoints; evaluates at epochs when asked to, after a checkpoint.

    Raises Stopped after SIGTERM or SIGUSR1: the step is finished and on the disk. An evaluation, which can be made again, ends at once.
    """
    stop = min(config.iterations, config.max_steps or config.iterations)
    sampler = data.BatchSampler(len(dataset), total_batch=config.total_batch, world=world.size, rank=world.rank, accumulate=config.accumulate,
                                seed=config.seed, start_step=state.step, steps=stop)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=data.collate, num_workers=config.workers, pin_memory=world.device.type == "cuda",
                        worker_init_fn=spare_once)
    criterion = Criterion(config, state.model.classes["is_thing"])
    network = state.model.train()
    if world.size > 1:
        network = DistributedDataParallel(network, device_ids=[world.device] if world.device.type == "cuda" else None)
    batches, start, began, before, signals = iter(loader), state.step, time.perf_counter(), state.seconds, []
    bar = tqdm(range(state.step, stop), "train", initial=state.step, total=stop, disable=not world.first, mininterval=1, leave=False)
    with on_signal(lambda number, _: signals.append(number)):
        for _ in bar:
            if epoch := ended(state.step, config, dataset):
                with on_signal(leave):
                    write_epoch(out, state, config, world, epoch, score(state.best, evaluation, out, config) if evaluates(epoch, config) else {})
            batch = [next(batches) for _ in range(config.accumulate)]
            try:
                facts = train_step(state, network, criterion, batch, config, world)
            except (RuntimeError, MemoryError) as error:
                if out_of_memory(error):
                    raise ConfigError(memory_advice(name, config, batch, world)) from None
                raise
            state.seconds = before + time.perf_counter() - began
            if state.bad >= config.max_bad_steps:
                give_up(state, batch, config, out, world)
            if facts and (state.step % config.log_every == 0 or state.step == 1):
                write_step(out, state, config, world, facts, (state.step - start) * config.total_batch / (time.perf_counter() - began))
                bar.set_postfix_str(f"loss {facts['loss']:.2f}, lr {facts['lr']:.1e}")
            asked, = world.sum([len(signals)])
            if asked or state.step % config.checkpoint_every == 0 or state.step == stop or evaluates(ended(state.step, config, dataset), config):
                if world.first:
                    state.save(out, config)
            if asked:
                if world.size > 1:
                    dist.barrier()                                  # nobody leaves before it is written
                raise Stopped(*signals[:1])


def ended(step: int, config: Config, dataset: data.ImageDataset) -> int:
    """The number of the epoch that ends with this step; 0 when none does."""
    epoch = step * config.total_batch // len(dataset)
    return epoch if step and epoch > (step - 1) * config.total_batch // len(dataset) else 0


def evaluates(epoch: int, config: Config) -> bool:
    return epoch > 0 and config.evaluate_every > 0 and epoch % config.evaluate_every == 0


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak_memory(device: torch.device) -> None:
    """A table trains several runs in one process; each has its own peak. On a CPU only Linux can do that, elsewhere the peak is that of all so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (switch := Path("/proc/self/clear_refs")).exists():
        with contextlib.suppress(PermissionError):                      # a container may not let us
            switch.write_text("5")


def write_step(out: Path, state: State, config: Config, world: World, facts: dict, speed: float) -> None:
    names = [f"{where}{part}" for where in ("", "denoising/") for part in sorted(WEIGHTS)]
    known = [k in facts["parts"] for k in names]                    # a process without objects has no denoising
    sums = world.sum([*known, *(float(facts["parts"].get(k, 0)) for k in names)])
    losses = {k: value / world.size for k, has, value in zip(names, sums, sums[len(names):]) if has}
    line = {"kind": "step", "step": state.step, "loss": facts["loss"], "losses": losses, "lr": facts["lr"],
            "grad_norm": facts["grad_norm"], "images_per_second": round(speed, 3), "peak_memory": peak_memory(world.device), "batch": config.total_batch}
    append(out, world, line)


def write_epoch(out: Path, state: State, config: Config, world: World, epoch: float, scores: dict) -> None:
    append(out, world, {"kind": "epoch", "step": state.step, "epoch": epoch, "seconds": round(state.seconds, 1)}
           | {k: v for k, v in scores.items() if k != "per_class"})


def append(out: Path, world: World, line: dict) -> None:
    if world.first:
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())                                 # before the checkpoint that counts it


def score(model: MaskDINO, dataset: data.ImageDataset, out: Path, config: Config) -> dict:
    return evaluate.evaluate(model, dataset, out, workers=config.workers)


# ---------------------------------------------------------------------------------------------------------------- setting up a run
def prepare_folder(out: Path, actions: dict) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start. Raises ConfigError for a folder that is in use."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        if not actions.get("resume"):
            raise ConfigError("torchrun --max_restarts starts the same command again: add --resume, so that it goes on")
        if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":     # the store would keep the addresses of those before (torch 2.14)
            raise ConfigError("torchrun --max_restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment: without, processes that are started "
                              "again may wait for dead ones")
    used, there = out.exists() and any(out.iterdir()), [out / name for name in (CHECKPOINT, PREVIOUS) if (out / name).exists()]
    checkpoint = there[0] if there else None                            # the second alone: killed between two renames
    if actions.get("explain_batch"):                                    # writes beside it
        return checkpoint
    if used and actions.get("overwrite"):
        for file in [file for pattern in RUN_FILES for file in out.glob(pattern)]:
            file.unlink()
    elif used and not actions.get("resume"):
        raise ConfigError(f"{out} is not empty: --resume goes on with that run, --overwrite starts it again, --out=DIR takes another folder")
    out.mkdir(parents=True, exist_ok=True)
    return checkpoint if actions.get("resume") else None


def cut_log(out: Path, step: int) -> None:
    """Leaves out the lines after a checkpoint's step, and of that step all but its losses: they will be written again."""
    log = out / "log.jsonl"
    kept = []
    for line in log.read_text().splitlines() if log.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):                             # a killed run may leave half a line
            facts = json.loads(line)
            if facts["step"] < step or facts["step"] == step and facts["kind"] == "step":
                kept.append(line)
    with maskdino.replacing(log) as file:
        file.write("".join(f"{line}\n" for line in kept).encode())


def open_data(config: Config, actions: dict, world: World, name: str) -> tuple[data.ImageDataset, data.ImageDataset]:
    """Training and evaluation data. Prints what was found. Raises DataError or ConfigError before anything expensive begins."""
    where, by_hand = actions.get("data"), {"train_json", "train_images", "train_labels"} & actions.keys()
    if where is None and not by_hand:
        if "shapes" not in name:
            raise ConfigError("training needs data: --data=DIR (a COCO, ADE20K or Cityscapes tree), or own files by --train_json=FILE --train_images=DIR "
                              "--val_json=FILE --val_images=DIR (see the README)")
        where = SHAPES
        if world.first:
            data.make_shapes(SHAPES)
        if world.size > 1:
            dist.barrier()
    if config.task == "semantic":
        size = config.crop_height or config.image_size, config.image_size
        jitter = data.semantic_jitter(size, config.scale_jitter, config.flip, config.single_category, config.colour_jitter)
    else:
        jitter = data.large_scale_jitter(config.image_size, config.scale_jitter, config.flip)
    resize = partial(evaluate.resize_for_test, short=config.test_short, long=config.test_long)

    def split(which: str, transform, keep_empty: bool) -> data.ImageDataset:
        paths = {kind: actions.get(f"{which}_{kind}") for kind in data.FLAGS}
        dataset = data.open_split(config.task, which, transform, data_dir=where, **paths, classes=actions.get("classes"), keep_empty=keep_empty,
                                  max_images=config.max_images, skip_bad_images=config.skip_bad_images)
        if world.first:
            print(f"{which} data: {dataset.source}: {len(dataset)} images, {len(dataset.class_names)} classes")
        return dataset
    training = split("train", jitter, config.keep_empty)
    if config.evaluate_on == "train":
        return training, split("train", resize, config.keep_empty)
    evaluation = split("val", resize, True)
    data.check_classes(training, evaluation)
    return training, evaluation


def in_epochs(config: Config, epochs: float, images: int) -> Config:
    """The same schedule over `epochs` passes of the data: drops and warm-up at the same fractions."""
    iterations = max(1, round(epochs * images / config.total_batch))
    scaled = [round(n * iterations / config.iterations) for n in (*config.lr_drops, config.warmup)]
    return dataclasses.replace(config, iterations=iterations, lr_drops=tuple(scaled[:-1]), warmup=scaled[-1])


def read_run(checkpoint: Path, overrides: dict) -> tuple[dict, Config]:
    """`maskdino.read_checkpoint`; of a damaged one, the error names the one before it if that is whole."""
    try:
        return maskdino.read_checkpoint(checkpoint, **overrides)
    except ConfigError as error:
        previous = checkpoint.with_name(PREVIOUS)
        try:
            step = maskdino.read_checkpoint(previous, **overrides)[0]["step"]
        except ConfigError:
            raise error from None
        raise ConfigError(f"{error}; the last good one is {previous}, of step {step}: delete {checkpoint.name}, and --resume goes on from there") from None


def resume_config(config: Config, checkpoint: Path, overrides: dict, classes: dict) -> tuple[Config, dict]:
    """A checkpoint's content, and the configuration with its architecture: the checkpoint wins. All differences are printed."""
    content, trained = read_run(checkpoint, overrides)
    if content["classes"] != classes:
        ours, theirs = content["classes"]["names"], classes["names"]
        raise ConfigError(f"{checkpoint} has {len(ours)} classes ({', '.join(ours[:4])} ...), the data {len(theirs)} ({', '.join(theirs[:4])} ...): "
                          "resume with the data it was trained on")
    config, before = adopt(config, trained, maskdino.ARCHITECTURE, checkpoint), Config(**content["config"])
    for field in dataclasses.fields(Config):
        if (now := getattr(config, field.name)) != (old := getattr(before, field.name)):
            maskdino.say(f"--{field.name}={now} from here on; so far it was {old}")
    return config, content


def adopt(config: Config, trained: Config, fields: Iterable[str], checkpoint: Path | str) -> Config:
    """The configuration with a checkpoint's architecture; the differences are printed."""
    changes = {k: getattr(trained, k) for k in fields if getattr(trained, k) != getattr(config, k)}
    for name, value in changes.items():
        maskdino.say(f"{checkpoint} was trained with {name}={value}, not {getattr(config, name)}: its value is used")
    return dataclasses.replace(config, **changes)


def read_start(config: Config, checkpoint: str, overrides: dict) -> tuple[Config, maskdino.Start]:
    """For fine-tuning: the checkpoint's architecture, but the preset's task, class loss and denoising; and the checkpoint."""
    fields = [k for k in maskdino.ARCHITECTURE if k not in ("task", "class_loss", "denoising")]
    start = maskdino.read_start(checkpoint, **{k: v for k, v in overrides.items() if k in fields})
    return adopt(config, start.config, fields, checkpoint) if start.config else config, start


def check_batch(config: Config, world: World) -> None:
    if config.total_batch % (world.size * config.accumulate):
        raise ConfigError(f"--total_batch={config.total_batch} is no multiple of {world.size} process(es) x --accumulate={config.accumulate}")
    if world.first:
        micro = config.total_batch // (world.size * config.accumulate)
        print(f"batch {config.total_batch} = {world.size} process(es) x {config.accumulate} accumulated x {micro} images")


def check_shared(state: State, dataset: data.ImageDataset, world: World) -> None:
    """Raises ConfigError when the processes do not see the same checkpoint and data."""
    own = [state.step, len(dataset)]
    if world.sum(own) != [n * world.size for n in own]:
        raise ConfigError(f"process {world.rank} would start at step {own[0]} with {own[1]} images, others would not: --out and --data have to be folders "
                          "that all machines share")


# ---------------------------------------------------------------------------------------------------------------- results
def git_hash() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def result_of(config: Config, name: str, overrides: dict, state: State, world: World, scores: dict) -> dict:
    """The run in one flat dictionary; what does not apply is None."""
    facts = {"preset": name, "overrides": overrides, "seed": config.seed, "git": git_hash(),
             "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else f"{world.device.type}, {torch.get_num_threads()} threads",
             "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "torchvision": torchvision.__version__},
             "world_size": world.size, "steps": state.step, "seconds": round(state.seconds, 1),
             "images_per_second": round(state.step * config.total_batch / state.seconds, 3) if state.seconds else None,
             "peak_memory": peak_memory(world.device), "params": sum(p.numel() for p in state.model.parameters())}
    return facts | evaluate.EMPTY | scores


def finish(state: State, config: Config, name: str, overrides: dict, out: Path, world: World, epochs: float, evaluation: data.ImageDataset) -> dict:
    """Evaluates, and leaves result.json and the pictures."""
    scores = score(state.best, evaluation, out, config)
    write_epoch(out, state, config, world, epochs, scores | {"final": True})
    result = result_of(config, name, overrides, state, world, scores)
    if world.first:
        evaluate.page(evaluation, state.best, out / "predictions.png")
        evaluate.curves(out / "log.jsonl", out / "curves.png")
        maskdino.save_json(out / "result.json", result)             # last: what has one is finished
        print(f"{out}: checkpoint.pth, result.json, predictions.png, curves.png")
    return result


def explain_batch(state: State, config: Config, dataset: data.ImageDataset, path: Path) -> None:
    """Draws the first micro-batch of the next step, how its queries are noised and who answers for which object. Trains nothing, saves nothing."""
    sampler = data.BatchSampler(len(dataset), total_batch=config.total_batch, accumulate=config.accumulate, seed=config.seed, start_step=state.step,
                                steps=state.step + 1)
    images, targets = data.collate([dataset[item] for item in next(iter(sampler))])
    device, criterion = state.model.mean.device, Criterion(config, state.model.classes["is_thing"])
    images, targets = images.to(device), to_device(targets, device)
    with torch.no_grad(), maskdino.recording(state.model.train(), evaluate.INSIDE) as record, maskdino.recording(criterion, "matcher") as matching:
        criterion(state.model(images, [t["size"] for t in targets], targets), targets)
    evaluate.batch_page(state.model, targets, record, matching["matcher"][0].gave, path)
    print(f"{path}: the batch of step {state.step + 1}, its denoising and its assignment")


def run(name: str, overrides: dict, actions: dict, world: World) -> dict | None:
    """One whole run: data, model, training, evaluation. Returns its result.json; with --explain_batch a page is drawn instead, nothing returned."""
    config = maskdino.preset(name, **overrides)
    forget_peak_memory(world.device)
    check_batch(config, world)
    out = Path(actions.get("out") or Path("runs") / name)
    checkpoint = prepare_folder(out, actions)
    if world.size > 1:
        dist.barrier()                                              # nobody writes before everybody has looked
    dataset, evaluation = open_data(config, actions, world, name)
    if "epochs" in actions:
        config = in_epochs(config, actions["epochs"], len(dataset))
    classes = {"names": dataset.class_names, "category_ids": dataset.category_ids, "is_thing": dataset.is_thing}
    content = start = None
    if checkpoint:
        config, content = resume_config(config, checkpoint, overrides, classes)
    elif "finetune" in actions:
        config, start = read_start(config, actions["finetune"], overrides)
    torch.manual_seed(config.seed)
    model = maskdino.build(config, classes)
    if start:
        maskdino.say(maskdino.start_from(model, start))             # instead of the backbone's ImageNet weights
    elif content is None:
        maskdino.load_backbone_weights(model.backbone, config)
    state = State.fresh(model.to(world.device), config)
    if config.compile:
        model.compile_regions()
    if content:
        state.restore(content, checkpoint)
        maskdino.say(f"resumed from {checkpoint} at step {state.step}")
    if actions.get("explain_batch"):
        out.parent.mkdir(parents=True, exist_ok=True)
        return explain_batch(state, config, dataset, out.parent / f"{out.name}_batch.png")
    check_shared(state, dataset, world)
    if world.first:
        (out / "result.json").unlink(missing_ok=True)
        cut_log(out, state.step)
        maskdino.save_json(out / "config.json", dataclasses.asdict(config) | {"classes": classes})
    train(state, config, dataset, out, world, evaluation, name)
    epochs = round(state.step * config.total_batch / len(dataset), 2)
    return finish(state, config, name, overrides, out, world, epochs, evaluation)


# ---------------------------------------------------------------------------------------------------------------- the paper's tables
def jobs_of(table: evaluate.Table, scale: str | None, by_hand: dict, seeds: int) -> dict[str, tuple[evaluate.Run, dict[str, evaluate.Row]]]:
    """What a table trains, by folder: the run and the rows that want it. All rows of a seed before the next one."""
    jobs = {}
    for seed in range(seeds):
        for label, row in table.rows.items():
            if run := evaluate.run_of(row, scale, by_hand | ({"seed": seed} if seed else {})):
                jobs.setdefault(run.name, (run, {}))[1][label] = row
    return jobs


def run_table(name: str, overrides: dict, actions: dict, world: World) -> None:
    """Trains the rows of a table that have no result.json yet, evaluates again where rows want that, prints and draws the table.

    A row that was stopped goes on from its checkpoint, so the same command is safe to repeat.
    """
    table, root, scale = evaluate.find_table(name), Path(actions.get("out") or "runs"), actions.get("scale")
    if wrong := [key for key in ("epochs", "finetune", "resume", "overwrite", "explain_batch") if key in actions] + ["seed"] * ("seed" in overrides):
        raise ConfigError(f"--{wrong[0]} does not go with --table, whose rows say how they train; it always resumes, and --seeds=N trains seeds 0 to N - 1")
    if actions.get("seeds", 1) < 1:
        raise ConfigError(f"--seeds={actions['seeds']}: how many, at least 1")
    jobs = jobs_of(table, scale, overrides, actions.get("seeds", 1))
    if actions.get("dry_run"):
        if world.first:
            print(plan(jobs, root, actions.get("data")))
        return
    for folder, (run_, rows) in jobs.items():
        where = {k: v for k, v in actions.items() if k not in ("table", "scale", "seeds", "out")} | {"out": str(root / folder)}
        if "data" in actions:
            where["data"] = run_.data(actions["data"])
        if world.first:
            print(f"\n{name}: {', '.join(rows)}, seed {run_.overrides.get('seed', 0)}: {root / folder}")
        if not (root / folder / "result.json").exists():
            run(run_.preset, run_.overrides, where | {"resume": True}, world)
        for file, row in {row.result(root / folder): row for row in rows.values() if row.read_out}.items():     # several rows may want one file
            if not file.exists():                                       # the same on every process: the first writes it after all have evaluated
                read_out(row, root / folder, where, world, run_.preset)
    if world.first:
        print()
        evaluate.show_tables([name], root, scale, overrides, actions.get("data"))


def read_out(row: evaluate.Row, folder: Path, where: dict, world: World, name: str) -> None:
    """Evaluates a trained model once more: the prediction of every layer, or with what the row changes at inference."""
    model, _ = maskdino.load(folder / "checkpoint.pth", world.device, **row.at_test)
    evaluation = open_data(model.config, where, world, name)[1]
    if row.layer is not None:
        evaluate.layers(model, evaluation, folder, model.config.workers)
        return
    scores = score(model, evaluation, row.result(folder).parent, model.config)
    if world.first:
        maskdino.save_json(row.result(folder), scores)


def plan(jobs: dict, root: Path, where: str | None) -> str:
    """What a table would train, with commands and hours. The speed is that of the rows that are finished; of shapes, before one is, the README's."""
    lines, total, done = [], 0.0, [file for folder in jobs if (file := root / folder / "result.json").exists()]
    if not done and all("shapes" in run_.preset for run_, _ in jobs.values()):
        done = [Path(__file__).parent / "assets" / "shapes.json"]
    speeds = [speed for file in done if (speed := json.loads(file.read_text())["images_per_second"])]
    speed = sum(speeds) / len(speeds) if speeds else None
    for folder, (run_, rows) in jobs.items():
        config, there = maskdino.preset(run_.preset, **run_.overrides), root / folder
        state = "done" if (there / "result.json").exists() else "resumes" if (there / "checkpoint.pth").exists() else "to do"
        hours = (config.max_steps or config.iterations) * config.total_batch / speed / 3600 if speed else None
        total += (hours or 0) * (state != "done")
        again = ", ".join(label for label, row in rows.items() if row.read_out)
        lines += [f"{', '.join(rows)}, seed {config.seed}: {state}" + (f", {hours:.2f} hours" if hours and state != "done" else "") +
                  f"; evaluated again for {again}" * bool(again), f"    {run_.command(root, where)}"]
    estimate = f"about {total:.1f} hours at {speed:.1f} images/s" if speed else "time unknown until a row has run"
    return "\n".join([*lines, f"{len(jobs)} runs, {estimate}, evaluation not counted"])


def list_presets() -> str:
    width = max(map(len, maskdino.PRESETS))
    return "\n".join(f"{name:{width}}  {row['about']}" for name, row in maskdino.PRESETS.items())


@record                                                             # torchrun's summary then tells the first error of all processes
def command(argv: list[str]) -> None:
    words, actions, overrides = maskdino.parse_overrides(argv, ACTIONS)
    if actions.get("help"):
        return print(__doc__, inspect.getsource(Config).partition("    @property")[0], sep="\n")
    if actions.get("list"):
        return print(list_presets())
    if len(words) > 1:
        raise ConfigError(f"one preset at a time, not {' and '.join(words)}")
    if "table" in actions and words:
        raise ConfigError(f"--table={actions['table']} brings its own presets: leave out {words[0]}")
    if "table" not in actions and (wrong := {"scale", "seeds", "dry_run"} & actions.keys()):
        raise ConfigError(f"--{min(wrong)} goes with --table=NAME")
    with on_signal(leave), evaluate.joined(actions.get("device")) as world:
        if actions.get("explain_batch") and world.size > 1:
            raise ConfigError("--explain_batch draws one page: start it without torchrun")
        if "table" in actions:
            run_table(actions["table"], overrides, actions, world)
        else:
            run(words[0] if words else "shapes", overrides, actions, world)


def main() -> None:
    try:
        command(sys.argv[1:])
    except Stopped as stopped:
        maskdino.say(f"stopped{''.join(f' by {signal.Signals(number).name}' for number in stopped.args)}: the same command with --resume goes on")
    except (ConfigError, data.DataError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in DISK:
            raise
        sys.exit(f"error: {error.filename or 'the run folder'} cannot be written ({error.strerror}): the last checkpoint is kept; make room for it, or choose "
                 "another folder")


if __name__ == "__main__":
    main()
