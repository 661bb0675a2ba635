"""The loop: resume, kills, processes, accumulation, empty images, bad steps, run folders, the command line. On a small set of generated shapes."""
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import write_labels
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
import maskdino
import train
from losses import Criterion
from maskdino import ConfigError, MaskDINO, preset

SMALL = dict(backbone="resnet10", backbone_norm="group", hidden=32, heads=4, enc_layers=1, enc_ffn=32, dec_layers=2, dec_ffn=32, queries=8, denoising_queries=8,
             mask_points=32, image_size=64, test_short=64, test_long=64, total_batch=2, workers=0, log_every=1, warmup=2, detections=5)
ALONE = train.World(0, 1, torch.device("cpu"))
ROOT = Path(train.__file__).parent
PATIENCE = 400                                                          # seconds: a process that has not ended then hangs
SERVER = multiprocessing.get_context("forkserver")                      # its processes start in no time: it has imported everything, and computed nothing
SERVER.set_forkserver_preload(["test_train"])
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
pytestmark = pytest.mark.usefixtures("one_thread")                      # as in the processes that tests start: sums of more differ in the last bits


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    data.make_shapes(folder / "s", train=24, val=6)
    return folder / "s"


@pytest.fixture
def ade20k(tmp_path):
    """Two images: wall, sky, and a strip that is not labelled."""
    values = np.ones((40, 60), dtype=np.uint8)
    values[:, 30:], values[:5] = 3, 0
    for part in ("training", "validation"):
        write_labels(tmp_path / "a/images" / part, tmp_path / "a/annotations" / part, values)
    return tmp_path / "a"


def run(shapes, out, resume=False, world=ALONE, **overrides):
    return train.run("shapes", SMALL | overrides, {"data": str(shapes), "out": str(out)} | ({"resume": True} if resume else {}), world)


def log(out, kind="step"):
    return [line for line in map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines()) if line["kind"] == kind]


# ---------------------------------------------------------------------------------------------------------------- runs
def test_a_run_leaves_what_the_contract_says(shapes, tmp_path):
    result = run(shapes, tmp_path / "r", max_steps=3)
    for name in set(train.RUN_FILES) - {"panoptic.json", "result_layers.json", "checkpoint.pth*", train.PREVIOUS, "bad_batch_*.pth"}:
        assert (tmp_path / "r" / name).stat().st_size > 0, name
    assert json.loads((tmp_path / "r" / "result.json").read_text()) == result
    wanted = {"preset", "overrides", "seed", "git", "device", "versions", "world_size", "steps", "seconds", "images_per_second", "peak_memory", "params",
              "PQ", "PQ_things", "PQ_stuff", "SQ", "RQ", "mIoU", "fwIoU", "pixel_accuracy"}
    wanted |= {f"{kind}_AP{size}" for kind in ("box", "mask") for size in ("", "50", "75", "s", "m", "l")}
    assert wanted <= result.keys() and result["steps"] == 3 and result["PQ"] is None and result["box_AP"] is not None
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    classes = config.pop("classes")
    assert maskdino.build(maskdino.Config(**config), classes).num_classes == 4
    assert [line["step"] for line in log(tmp_path / "r")] == [1, 2, 3] and log(tmp_path / "r", "epoch")[-1]["box_AP"] == result["box_AP"]
    model, classes = maskdino.load(tmp_path / "r" / "checkpoint.pth")
    assert classes["names"] == ["circle", "square", "triangle", "star"] and not model.training


def without_time(line):
    return {k: v for k, v in line.items() if k not in ("seconds", "images_per_second", "peak_memory", "overrides")}


def assert_same_run(a, b):
    """Bit for bit: weights, averaged weights, the optimizer's moments, every line of the log, the result."""
    one, two = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (a, b))
    for key in ("model", "ema"):
        assert one[key].keys() == two[key].keys() and all(torch.equal(x, two[key][name]) for name, x in one[key].items())
    for x, y in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values(), strict=True):
        assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    assert all(one[key] == two[key] for key in ("step", "bad", "averaged", "classes"))
    logs = [[without_time(json.loads(line)) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (a, b)]
    assert logs[0] == logs[1]
    results = [without_time(json.loads((folder / "result.json").read_text())) for folder in (a, b)]
    assert results[0] == results[1]
    assert (a / "results_segm.json").read_bytes() == (b / "results_segm.json").read_bytes()
    assert not list(b.glob("*.tmp"))


def test_resumed_equals_undisturbed(shapes, tmp_path):
    """The ends of epochs (24 images, 2 a step) lie before and between; the log has lines that the checkpoint does not count, and half of one."""
    whole, parts, flags = tmp_path / "whole", tmp_path / "parts", dict(ema=0.9, evaluate_every=1, log_every=2)
    run(shapes, whole, max_steps=26, **flags)
    for stop in (5, 12, 12, 26):                                         # in an epoch, at its end, finished and again, to the end
        run(shapes, parts, resume=True, max_steps=stop, **flags)
        if stop == 5:
            with open(parts / "log.jsonl", "a") as file:
                file.write('{"kind": "step", "step": 6, "loss": 1.0}\n{"kind": "st')
    assert [line["step"] for line in log(whole, "epoch")] == [12, 24, 26] and [line["step"] for line in log(whole)] == [1, *range(2, 27, 2)]
    assert_same_run(whole, parts)


def test_flags_by_hand_hold_after_a_resume(shapes, tmp_path, capsys):
    run(shapes, tmp_path / "r", max_steps=2)
    run(shapes, tmp_path / "r", resume=True, max_steps=4, lr=0.0, weight_decay=0.0)
    assert "--lr=0.0 from here on; so far it was 0.0008" in capsys.readouterr().out
    assert [line["lr"] > 0 for line in log(tmp_path / "r")] == [True, True, False, False]


def test_fine_tuning(shapes, tmp_path, capsys):
    """Starts from another run's weights; the checkpoint's architecture wins over the preset's, but not over what was asked for by hand."""
    run(shapes, tmp_path / "first", max_steps=2)
    start, free = str(tmp_path / "first" / "checkpoint.pth"), {k: v for k, v in SMALL.items() if k not in maskdino.ARCHITECTURE}
    actions = {"data": str(shapes), "out": str(tmp_path / "second"), "finetune": start}
    train.run("shapes", free | {"max_steps": 1, "lr": 0.0}, actions, ALONE)
    said = capsys.readouterr().out
    assert "trained with dec_layers=2, not 3: its value is used" in said and "fresh: nothing" in said and "4 of 4 classes matched by name" in said
    a, b = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["model"] for name in ("first", "second"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ConfigError, match="--dec_layers=5 contradicts"):
        train.run("shapes", free | {"dec_layers": 5}, actions | {"out": str(tmp_path / "third")}, ALONE)
    released = tmp_path / "released.pth"
    torch.manual_seed(0)
    model = maskdino.build(preset("shapes", **SMALL | {"backbone": "resnet18", "backbone_norm": "frozen", "hidden": 64, "heads": 8}), maskdino.class_list(80))
    torch.save({"model": maskdino.to_official(model)}, released)
    train.run("shapes", free | {"max_steps": 1}, actions | {"out": str(tmp_path / "fourth"), "finetune": str(released)}, ALONE)
    assert "0 of 4 classes matched by name" in capsys.readouterr().out and log(tmp_path / "fourth")[0]["loss"] < 1e3


TASKS = {"panoptic": dict(task="panoptic", box_init="token"),
         "semantic": dict(task="semantic", box_init="token", class_loss="ce", two_stage=False, denoising="none", scale_jitter=(0.8, 1.5))}


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks_train_and_resume(shapes, tmp_path, task):
    whole, parts, scores = tmp_path / "whole", tmp_path / "parts", {"panoptic": ("PQ", "PQ_stuff", "mIoU", "mask_AP"), "semantic": ("mIoU", "pixel_accuracy")}
    result = run(shapes, whole, max_steps=4, **TASKS[task])
    run(shapes, parts, max_steps=2, **TASKS[task])
    run(shapes, parts, resume=True, max_steps=4, **TASKS[task])
    a, b = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (whole, parts))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert a["classes"]["names"] == ["circle", "square", "triangle", "star", "plain", "stripes", "checks", "dots"]
    assert all(result[name] is not None for name in scores[task]) and (result["PQ"] is None) == (task == "semantic")
    assert len(list((whole / task).glob("*.png"))) == 6 and (whole / "predictions.png").exists()


@pytest.mark.parametrize("preset_name, tree", [
    ("ade20k_semantic_r50", "ade20k"), ("cityscapes_semantic_r50", "cityscapes"), ("coco_panoptic_r50_12ep", "cityscapes"),
    ("coco_instance_r50_12ep", "cityscapes"), pytest.param("coco_panoptic_r50_12ep", "sample", marks=pytest.mark.skipif(
        "COCO_PANOPTIC_SAMPLE" not in os.environ, reason="COCO_PANOPTIC_SAMPLE is not set"))])
def test_presets_run_on_trees_as_the_benchmarks_have_them(request, tmp_path, preset_name, tree):
    if tree == "sample":
        sample = Path(os.environ["COCO_PANOPTIC_SAMPLE"])
        files = {"json": sample / "panoptic_examples.json", "panoptic": sample / "panoptic_examples", "images": sample / "input_images"}
        where = {f"{split}_{kind}": str(path) for split in ("train", "val") for kind, path in files.items()}
    else:
        where = {"data": str(request.getfixturevalue(tree))}
    small = SMALL | {"max_steps": 2, "total_batch": 1, "image_size": 128, "test_short": 128, "test_long": 256, "backbone_weights": "none", "crop_height": 0}
    result = train.run(preset_name, small, where | {"out": str(tmp_path / "r")}, ALONE)
    assert result["steps"] == 2
    assert all(result[name] is not None for name in {"semantic": ["mIoU"], "panoptic": ["PQ", "box_AP"], "instance": ["mask_AP"]}[preset_name.split("_")[1]])


@pytest.mark.parametrize("name, overrides", [("shapes", {}), ("shapes", dict(task="detection", box_init="token", denoising="box", matching="box")),
                                             ("shapes_panoptic", {}), ("mask2former_shapes", {}), ("dformer_shapes", {})])
def test_explain_batch_draws_a_page_and_touches_nothing(shapes, tmp_path, monkeypatch, name, overrides):
    calls, draw = [], evaluate.batch_page
    monkeypatch.setattr(evaluate, "batch_page", lambda *args: (calls.append(args), draw(*args)))
    for _ in range(2):
        assert train.run(name, SMALL | overrides, {"data": str(shapes), "out": str(tmp_path / "r"), "explain_batch": True}, ALONE) is None
    assert [path.name for path in tmp_path.iterdir()] == ["r_batch.png"] and Image.open(tmp_path / "r_batch.png").width > 400
    model, targets, record, (cost, query, found), _ = calls[0]
    b = max(range(len(targets)), key=lambda i: len(targets[i]["labels"]))
    best, total = query[-1, b], sum(cost.values())[-1, b]
    assert found[-1, b].all() and len(set(best.tolist())) == len(best)
    assert total[best, range(len(best))].sum() <= total[range(len(best)), range(len(best))].sum()          # no dearer than any other assignment
    if "label_embed" in record:
        noised = record["decoder"][0].given[1][b, :len(best)]
        assert (noised[:, :2] - targets[b]["boxes"][:, :2]).abs().le(0.5 * 0.4 * targets[b]["boxes"][:, 2:] + 1e-4).all()


def test_explain_batch_of_a_checkpoint_and_without_objects(shapes, tmp_path, monkeypatch, capsys):
    run(shapes, tmp_path / "r", max_steps=2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir() if path.is_file()}
    train.run("shapes", SMALL, {"data": str(shapes), "out": str(tmp_path / "r"), "explain_batch": True}, ALONE)
    assert "the batch of step 3" in capsys.readouterr().out and (tmp_path / "r_batch.png").stat().st_size > 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir() if path.is_file()} == before
    real = data.CocoDataset.__getitem__

    def bare(self, item):
        image, target = real(self, item)
        return image, target | {key: target[key][:0] for key in ("labels", "boxes", "masks")}
    monkeypatch.setattr(data.CocoDataset, "__getitem__", bare)
    train.run("shapes", SMALL, {"data": str(shapes), "out": str(tmp_path / "r"), "explain_batch": True}, ALONE)


def test_resume_without_a_checkpoint_starts(shapes, tmp_path):
    assert run(shapes, tmp_path / "new", resume=True, max_steps=1)["steps"] == 1
    once = log(tmp_path / "new", "epoch")
    assert run(shapes, tmp_path / "new", resume=True, max_steps=1)["steps"] == 1        # a finished run is only evaluated again
    assert log(tmp_path / "new", "epoch") == once


def test_empty_images_and_a_split_without_objects(shapes, tmp_path):
    """An epoch over images half of which are empty; a batch may have no object at all."""
    content = json.loads((shapes / "annotations" / "instances_train.json").read_text())
    full = {row["id"] for row in content["images"][::2]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in full]
    some = tmp_path / "some.json"
    some.write_text(json.dumps(content))
    actions = {"train_json": str(some), "train_images": str(shapes / "train"), "val_json": str(some), "val_images": str(shapes / "train"),
               "out": str(tmp_path / "r"), "epochs": 1}
    result = train.run("shapes", SMALL | {"total_batch": 1}, actions, ALONE)
    assert result["steps"] == 24 and all(torch.isfinite(torch.tensor(line["loss"])) for line in log(tmp_path / "r"))
    dataset = data.CocoDataset(some, shapes / "train", data.large_scale_jitter(64, (1.0, 1.0)), keep_empty=False)
    assert len(dataset) < 13                                             # without keep_empty they are left out


# ---------------------------------------------------------------------------------------------------------------- one effective batch, however it is cut
def batch_of(size=64, n=3, count=2):
    g = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 3, size, size), generator=g, dtype=torch.uint8)
    targets = []
    for i in range(count):
        boxes = torch.rand(n, 4, generator=g, dtype=torch.float64) * 0.3 + 0.3
        masks = (torch.rand(n, size, size, generator=g) > 0.5).to(torch.uint8)
        targets.append({"labels": torch.randint(4, (n,), generator=g), "boxes": boxes, "masks": masks, "size": (size, size), "image_id": i, "key": 10 + i})
    return images, targets


def gradients(parts, accumulate, world, wrap):
    """Gradient of every parameter after one effective batch in float64."""
    torch.manual_seed(0)
    config = preset("shapes", **SMALL, accumulate=accumulate)
    model = MaskDINO(config, 4).double().train()
    loss, _, _ = train.forward_backward(wrap(model), Criterion(config), parts, config, world)
    return loss, {name: p.grad for name, p in model.named_parameters()}


def cut(batch):
    images, targets = batch
    return [(images[i:i + 1], targets[i:i + 1]) for i in range(len(targets))]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        scale = max(1.0, float(b[name].abs().max()))
        assert (a[name] - b[name]).abs().max() <= 1e-10 * scale, name


def test_accumulated_equals_one_batch():
    one_loss, one = gradients([batch_of()], 1, ALONE, lambda m: m)
    two_loss, two = gradients(cut(batch_of()), 2, ALONE, lambda m: m)
    assert two_loss == pytest.approx(one_loss, rel=1e-12)
    assert_same(two, one)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def child(task, output, environment):
    os.environ |= environment
    for number, to in ((1, output), (2, output)):
        os.dup2(os.open(to, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    task()


def start(task, output, world=1):
    """Processes of their own that call task(), one of them or `world` of them that torchrun might have started; they write to the file `output`."""
    meeting = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} | meeting if world > 1 else {} for rank in range(world)]
    processes = [SERVER.Process(target=child, args=(task, output, rank)) for rank in ranks]
    for process in processes:
        process.start()
    return processes


def finish(processes, seconds=PATIENCE):
    """Their exit codes."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            pytest.fail("a process hangs")
    return [process.exitcode for process in processes]


def two_ranks(path):
    with evaluate.joined("cpu") as world:
        own, grads = gradients(cut(batch_of())[world.rank:world.rank + 1], 1, world, DistributedDataParallel)
        loss = world.sum([own])[0] / 2
        if world.first:
            torch.save((loss, grads), path)


def test_two_processes_equal_one(tmp_path):
    one_loss, one = gradients([batch_of()], 1, ALONE, lambda m: m)
    assert finish(start(partial(two_ranks, tmp_path / "two.pt"), tmp_path / "said", world=2)) == [0, 0], (tmp_path / "said").read_text()
    loss, two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert loss == pytest.approx(one_loss, rel=1e-12)
    assert_same(two, one)


def score_seven(shapes, out):
    with evaluate.joined("cpu"):
        torch.manual_seed(0)
        dataset = data.open_split("instance", "train", partial(evaluate.resize_for_test, short=64, long=64), data_dir=shapes, max_images=7)
        model = maskdino.build(preset("shapes", **SMALL), {"names": dataset.class_names, "category_ids": dataset.category_ids, "is_thing": dataset.is_thing})
        scores = evaluate.evaluate(model, dataset, out)
    (out / f"scores_{os.environ.get('RANK', 'alone')}.json").write_text(json.dumps(scores))


def test_three_processes_score_seven_images_as_one_does(shapes, tmp_path):
    """No image twice, none left out, the same AP on every rank."""
    said, ones = tmp_path / "said", [tmp_path / "one", tmp_path / "three"]
    assert finish(start(partial(score_seven, shapes, ones[0]), said) + start(partial(score_seven, shapes, ones[1]), said, world=3)) == [0] * 4, said.read_text()
    alone = json.loads((ones[0] / "scores_alone.json").read_text())
    assert alone["box_AP"] is not None
    assert all(json.loads((ones[1] / f"scores_{rank}.json").read_text()) == alone for rank in range(3))
    found = json.loads((ones[1] / "results_segm.json").read_text())
    assert found == json.loads((ones[0] / "results_segm.json").read_text()) and len(found) == 7 * SMALL["detections"]


def test_processes_without_objects_do_not_hang(shapes, tmp_path):
    """Of two processes one often has no object, and then no denoising."""
    content = json.loads((shapes / "annotations" / "instances_train.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] % 2]
    some = tmp_path / "some.json"
    some.write_text(json.dumps(content))
    where = [f"--{split}_{key}={value}" for split in ("train", "val") for key, value in (("json", some), ("images", shapes / "train"))]
    flags = [f"--{k}={v}" for k, v in (SMALL | {"epochs": 1}).items()] + ["--device=cpu", f"--out={tmp_path / 'r'}", *where]
    assert finish(start(partial(call_main, flags), tmp_path / "said", world=2)) == [0, 0], (tmp_path / "said").read_text()
    lines = log(tmp_path / "r")
    assert len(lines) == 12 and all(np.isfinite(line["loss"]) and "denoising/mask" in line["losses"] for line in lines if line["losses"]["mask"])


# ---------------------------------------------------------------------------------------------------------------- killed, stopped, no room
LIVES = SMALL | dict(ema=0.9, max_steps=14, evaluate_every=1, checkpoint_every=3, accumulate=2)


def call_main(argv, before=None):
    """What `python train.py ARGV` does, after `before()`."""
    if before:
        before()
    sys.argv = ["train.py", *map(str, argv)]
    train.main()


def flags_of(shapes, out, **more):
    return ["shapes", *(f"--{k}={v}" for k, v in (LIVES | more).items()), f"--data={shapes}", "--device=cpu", f"--out={out}", "--resume"]


def live(shapes, out, before=None, world=1, **more):
    return start(partial(call_main, flags_of(shapes, out, **more), before), out.with_suffix(".said"), world)


def said(out):
    return out.with_suffix(".said").read_text()


def wait_for(condition, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def steps_logged(out):
    file = out / "log.jsonl"
    return file.read_text().count('"kind": "step"') if file.exists() else 0


@pytest.fixture(scope="module")
def whole(shapes, tmp_path_factory):
    """The undisturbed run, and how many seconds it took."""
    out, began = tmp_path_factory.mktemp("whole") / "same", time.monotonic()
    assert finish(live(shapes, out)) == [0], said(out)
    return out, time.monotonic() - began


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_anywhere(shapes, whole, tmp_path, kills):
    """SIGKILL after random times, between the start and the last of the evaluation; the same command each time."""
    rng, out, killed = np.random.default_rng(kills), tmp_path / "same", 0
    while killed < kills:
        process, = live(shapes, out)
        process.join(rng.uniform(0, whole[1] * min(1, 3 / kills)))
        killed += process.exitcode is None
        process.kill()
        process.join()
    assert finish(live(shapes, out)) == [0], said(out)
    assert_same_run(whole[0], out)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dies_while_writing(nth, moment):
    """The nth checkpoint is half written, or written, or the one before it has just got its other name."""
    real, count = {"save": torch.save, "replace": os.replace}, []

    def save(content, file):
        count.append(1)
        if len(count) < nth or moment != "half":
            return real["save"](content, file)
        real["save"](content, buffer := io.BytesIO())
        file.write(buffer.getvalue()[:len(buffer.getvalue()) // 2])
        file.flush()
        die()

    def replace(old, new):
        if len(count) >= nth and Path(new).name == {"written": train.PREVIOUS, "between": train.CHECKPOINT}.get(moment):
            die()
        real["replace"](old, new)
    torch.save, os.replace = save, replace


@pytest.mark.parametrize("nth, moment", [(1, "half"), (3, "half"), (3, "written"), (2, "between")])
def test_killed_while_writing_a_checkpoint(shapes, whole, tmp_path, nth, moment):
    out = tmp_path / "same"
    assert finish(live(shapes, out, partial(dies_while_writing, nth, moment))) == [-signal.SIGKILL]
    assert (out / "checkpoint.pth.tmp").exists()
    assert finish(live(shapes, out)) == [0], said(out)
    assert f"resumed from {out}" in said(out) or nth == 1
    assert_same_run(whole[0], out)


@pytest.mark.parametrize("number, workers", [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_a_signal_writes_a_checkpoint(shapes, whole, tmp_path, number, workers):
    """Also when, as torchrun and Slurm do, it goes to the loader's workers, too."""
    out = tmp_path / "same"
    process, = live(shapes, out, os.setsid, workers=workers)
    wait_for(lambda: steps_logged(out) >= 5)
    os.killpg(process.pid, number)
    assert finish([process]) == [0] and f"stopped by {number.name}: the same command with --resume goes on" in said(out)
    step = torch.load(out / "checkpoint.pth", weights_only=True)["step"]
    assert 5 <= step == log(out)[-1]["step"] < 14 and not (out / "result.json").exists()
    assert finish(live(shapes, out, workers=workers)) == [0], said(out)
    assert_same_run(whole[0], out)


def slow_evaluation():
    evaluate._detect = lambda *_: time.sleep(1000)


def test_a_signal_ends_an_evaluation_at_once(shapes, whole, tmp_path):
    """Its checkpoint is written already; the resumed run evaluates again."""
    out = tmp_path / "same"
    process, = live(shapes, out, slow_evaluation, checkpoint_every=100)
    wait_for(lambda: steps_logged(out) == 12 and (out / "checkpoint.pth").exists())
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    assert finish([process], 90) == [0] and "stopped by SIGTERM" in said(out)
    assert finish(live(shapes, out)) == [0], said(out)
    assert_same_run(whole[0], out)


def test_a_signal_to_one_process_stops_all_at_one_step(shapes, tmp_path):
    processes = live(shapes, tmp_path / "r", world=2, accumulate=1, max_steps=1000, evaluate_every=0)
    wait_for(lambda: steps_logged(tmp_path / "r") >= 3)
    os.kill(processes[1].pid, signal.SIGUSR1)
    assert finish(processes) == [0, 0], said(tmp_path / "r")
    assert torch.load(tmp_path / "r/checkpoint.pth", weights_only=True)["step"] == log(tmp_path / "r")[-1]["step"] < 1000


def torchrun(shapes, out, *options, **more):
    """The real command with two processes, in a session of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options, "train.py",
               *flags_of(shapes, out, accumulate=1, **more)]
    with open(out.with_suffix(".said"), "a") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})


@pytest.fixture(scope="module")
def whole_two(shapes, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "two"
    assert torchrun(shapes, out).wait(PATIENCE) == 0, said(out)
    return out


def test_torchrun_two_processes(shapes, whole_two, tmp_path):
    """The same numbers in its log as one process gives."""
    run(shapes, tmp_path / "one", **LIVES | {"max_steps": 2})
    for two, one in zip(log(whole_two)[:2], log(tmp_path / "one"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-2)      # groups of denoising queries may differ between the halves of a batch
    result = json.loads((whole_two / "result.json").read_text())
    assert result["world_size"] == 2 and result["steps"] == 14


def workers_of(process):
    """The processes that torchrun has started, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists(), reason="no /proc")
@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_torchrun_restarts_a_killed_process(shapes, whole_two, tmp_path, kills):
    """One process is killed, torchrun starts both again; then all is killed, torchrun too, and the same command goes on."""
    rng, out = np.random.default_rng(kills), tmp_path / "two"
    for target in np.linspace(4, 10, kills).astype(int):
        process = torchrun(shapes, out, "--max_restarts=3")
        wait_for(partial(lambda p, n: len(workers_of(p)) == 2 and steps_logged(out) >= n, process, target))      # the log may be that far from before
        before = said(out).count("resumed from")
        os.kill(workers_of(process)[rng.integers(2)], signal.SIGKILL)
        wait_for(partial(lambda n: said(out).count("resumed from") > n, before))
        time.sleep(rng.uniform(0, 1))
        for pid in [*workers_of(process), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert torchrun(shapes, out, "--max_restarts=3").wait(PATIENCE) == 0, said(out)
    assert_same_run(whole_two, out)


def test_an_error_in_one_process_ends_all(shapes, tmp_path):
    """torchrun ends with the message of that process; the others, which wait for it, say nothing."""
    shutil.copytree(shapes, tmp_path / "s")
    sampler = data.BatchSampler(24, total_batch=2, world=2, rank=1, seed=0, steps=9)
    (index, _), = list(sampler)[7]
    file = data.open_split("instance", "train", None, data_dir=shapes).file_names[index]
    broken = tmp_path / "s" / "train" / file.name
    broken.write_bytes(broken.read_bytes()[:300])
    assert torchrun(tmp_path / "s", tmp_path / "r").wait(PATIENCE) == 1
    text = said(tmp_path / "r")
    assert f"error: image file {broken}" in text and "rank      : 1" in text.partition("Root Cause")[2]
    assert "Connection closed" not in text and "stopped by" not in text


def no_room_for_checkpoints():
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def test_no_room_for_a_checkpoint(shapes, whole, tmp_path):
    out = tmp_path / "same"
    assert finish(live(shapes, out, no_room_for_checkpoints)) == [1]
    assert f"error: {out}/checkpoint.pth cannot be written (File too large): make room" in said(out) and "Traceback" not in said(out)
    run(shapes, out, resume=True, **LIVES | {"max_steps": 4})
    before = (out / "checkpoint.pth").read_bytes()
    assert finish(live(shapes, out, no_room_for_checkpoints)) == [1]
    assert f"error: {out}/checkpoint.pth cannot be written (File too large): it is kept as it was before, make room" in said(out)
    assert (out / "checkpoint.pth").read_bytes() == before and not list(out.glob("*.tmp"))
    assert finish(live(shapes, out)) == [0], said(out)
    assert_same_run(whole[0], out)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_no_room_for_results(shapes, tmp_path, monkeypatch):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/results_bbox.json").symlink_to("/dev/full")
    text = command(monkeypatch, *flags_of(shapes, tmp_path / "r", max_steps=1))
    assert text.startswith("error: ") and "No space left on device" in text and "the last checkpoint is kept" in text
    (tmp_path / "r/results_bbox.json").unlink()
    assert run(shapes, tmp_path / "r", resume=True, **LIVES | {"max_steps": 1})["steps"] == 1


def nobody():
    if os.geteuid() == 0:
        os.seteuid(65534)


def test_a_folder_that_may_not_be_written(shapes, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    assert finish(start(partial(call_main, flags_of(shapes, tmp_path / "locked/r"), nobody), tmp_path / "said")) == [1]
    text = (tmp_path / "said").read_text()
    assert f"error: {tmp_path / 'locked/r'} cannot be written (Permission denied)" in text and "Traceback" not in text


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b[:len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1:]])
def test_a_damaged_checkpoint(shapes, whole, tmp_path, monkeypatch, damage):
    """Cut, empty, or one bit turned in the middle of its numbers, which torch.load does not see: the error names the one before it."""
    out = tmp_path / "same"
    run(shapes, out, **LIVES | {"max_steps": 7})
    file = out / "checkpoint.pth"
    file.write_bytes(damage(file.read_bytes()))
    text = command(monkeypatch, *flags_of(shapes, out))
    assert f"error: {file} is not a file of PyTorch weights" in text and f"the last good one is {out}/checkpoint_previous.pth, of step 6" in text
    file.unlink()
    run(shapes, out, resume=True, **LIVES)
    assert_same_run(whole[0], out)
    (out / train.PREVIOUS).write_bytes(b"")
    file.write_bytes(b"")
    assert "last good one" not in command(monkeypatch, *flags_of(shapes, out))


def test_a_checkpoint_that_does_not_fit(shapes, tmp_path, monkeypatch):
    """Made up by hand, or of a version that wrote something else: nothing is taken from it half."""
    out = tmp_path / "r"
    run(shapes, out, **LIVES | {"max_steps": 1})
    content = torch.load(out / "checkpoint.pth", weights_only=True)
    state = content["optimizer"]["state"]
    short = state | {0: state[0] | {"exp_avg": torch.zeros(1)}}
    for change in ({"optimizer": {"state": short}}, {"optimizer": {"state": {10 ** 6: state[0]}}}, {"optimizer": 3}, {"step": "one"}, {"bad": None}):
        torch.save(content | change, out / "checkpoint.pth")
        assert "does not hold what a run needs to go on: --finetune=" in command(monkeypatch, *flags_of(shapes, out))


def test_restarts_need_resume(shapes, tmp_path, monkeypatch):
    """Otherwise --overwrite would make each restart begin at nothing. And they need a store of their own, else they can hang."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert "add --resume" in command(monkeypatch, "shapes", f"--data={shapes}", f"--out={tmp_path / 'r'}", "--overwrite")
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in command(monkeypatch, "shapes", f"--data={shapes}", f"--out={tmp_path / 'r'}", "--resume")


def test_processes_that_see_different_checkpoints(shapes, tmp_path):
    """As on machines that do not share a folder."""
    run(shapes, tmp_path / "a", **LIVES | {"max_steps": 1})
    world = train.World(1, 2, torch.device("cpu"))
    object.__setattr__(world, "sum", lambda own: [own[0] + 7, 2 * own[1]])
    with pytest.raises(ConfigError, match="process 1 would start at step 1 .* all machines share"):
        train.check_shared(train.State(None, None, None, step=1), range(24), world)


# ---------------------------------------------------------------------------------------------------------------- steps that go wrong
def test_steps_without_a_finite_loss_are_skipped_and_then_stop(shapes, tmp_path, monkeypatch, capsys):
    real, calls = Criterion.forward, []

    def sometimes(self, *args, **kwargs):
        total, losses = real(self, *args, **kwargs)
        calls.append(1)
        if len(calls) in (2, 3) or len(calls) > 4:
            losses = losses | {"layer1/giou": losses["layer1/giou"] * float("nan")}
            total = total * float("nan")
        return total, losses
    monkeypatch.setattr(Criterion, "forward", sometimes)
    with pytest.raises(ConfigError, match="3 steps in a row"):
        run(shapes, tmp_path / "r", max_steps=20, max_bad_steps=3)
    said = capsys.readouterr().out
    assert "step 2: the loss is not finite" in said and "'giou': nan" in said and "images [" in said
    assert [line["step"] for line in log(tmp_path / "r")] == [1, 4]


def test_a_bad_batch_is_left_for_inspection(shapes, tmp_path, monkeypatch, capsys):
    """And bad steps change nothing: no weight, no average, no statistics of a batch norm. They count on over a resume."""
    def broken(self, maps):
        return [x * float("nan") for x in real(self, maps)]
    flags = dict(max_bad_steps=3, backbone_norm="batch", ema=0.9, accumulate=2)
    run(shapes, tmp_path / "r", max_steps=1, **flags)
    before = torch.load(tmp_path / "r/checkpoint.pth", weights_only=True)
    real = maskdino.ResNet.forward
    monkeypatch.setattr(maskdino.ResNet, "forward", broken)
    run(shapes, tmp_path / "r", resume=True, max_steps=3, **flags)
    after = torch.load(tmp_path / "r/checkpoint.pth", weights_only=True)
    assert after["bad"] == 2 and all(torch.equal(after[key][name], x) for key in ("model", "ema") for name, x in before[key].items())
    with pytest.raises(ConfigError, match=f"3 steps in a row .*{tmp_path}/r/bad_batch_0.pth"):
        run(shapes, tmp_path / "r", resume=True, max_steps=20, **flags)
    left = torch.load(tmp_path / "r/bad_batch_0.pth", weights_only=True)
    assert left["step"] == 4 and len(left["batches"]) == 2 and left["model"].keys() == before["model"].keys()
    images, targets = left["batches"][1]
    assert images.dtype == torch.uint8 and f"step 4: the loss is not finite, step skipped; rank 0, images [{targets[0]['image_id']}]" in capsys.readouterr().out


CPU_MEMORY = "[enforce fail at alloc_cpu.cpp:126] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes."


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), RuntimeError(CPU_MEMORY), MemoryError(), None])
def test_out_of_memory_says_what_helps(shapes, tmp_path, monkeypatch, error):
    """None: what PyTorch really raises here."""
    def forward(self, images, *_):
        if error:
            raise error
        torch.empty(2 ** 60, dtype=torch.uint8)
    monkeypatch.setattr(MaskDINO, "forward", forward)
    text = command(monkeypatch, *flags_of(shapes, tmp_path / "r", accumulate=1))
    assert re.search(r"images \[\d+, \d+\] with \[\d+, \d+\] objects, 2 at once of 64 x 64 pixels", text) and len(text.splitlines()) == 1
    assert all(words in text for words in ("error: out of memory", "preset shapes", "--accumulate=2", "--checkpoint_activations", "--image_size"))
    monkeypatch.setattr(MaskDINO, "forward", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):                     # another error stays what it is
        run(shapes, tmp_path / "s", **LIVES)


def test_bf16_and_ema_train(shapes, tmp_path):
    assert run(shapes, tmp_path / "r", max_steps=2, precision="bf16", ema=0.5)["steps"] == 2


# ---------------------------------------------------------------------------------------------------------------- schedule and groups
def test_schedule():
    config = preset("coco_instance_r50_50ep")
    assert [round(train.lr_factor(s, config), 6) for s in (0, 327_777, 327_778, 355_092, 368_749)] == [1, 1, 0.1, 0.01, 0.01]
    config = preset("shapes", warmup=10, iterations=100)
    assert train.lr_factor(0, config) == pytest.approx(0.1) and train.lr_factor(100, config) == pytest.approx(0)
    config = preset("ade20k_semantic_r50", lr_schedule="poly", iterations=100)
    assert [train.lr_factor(s, config) for s in (0, 50, 100)] == pytest.approx([1, 0.5 ** 0.9, 0])
    short = train.in_epochs(preset("coco_instance_r50_12ep"), 12, 1600)
    assert short.iterations == 1200 and short.lr_drops == (1100,)        # 81,125 of 88,500


def test_parameter_groups():
    """Embeddings and norms do not decay; biases and the level vector do; the backbone learns at a tenth."""
    model = MaskDINO(preset("coco_instance_r50_12ep"), 80)
    groups = {(g["lr"], g["weight_decay"]): {id(p) for p in g["params"]} for g in train.parameter_groups(model, model.config)}
    assert set(groups) == {(1e-5, 0.05), (1e-4, 0.05), (1e-4, 0.0)}
    assert len(groups[1e-5, 0.05]) == 53                                 # convolutions: the frozen norms are buffers
    assert {id(model.label_embed.weight), id(model.heads.norm.bias), id(model.pixel_decoder.lateral[1].weight)} <= groups[1e-4, 0.0]
    assert {id(model.pixel_decoder.level_embed), id(model.heads.class_head.bias)} <= groups[1e-4, 0.05]
    assert sum(len(g) for g in groups.values()) == len(list(model.parameters()))


# ---------------------------------------------------------------------------------------------------------------- what bad input gets
def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    with pytest.raises(SystemExit) as caught:
        train.main()
    return str(caught.value)


def test_errors_are_sentences(shapes, tmp_path, monkeypatch):
    small = [f"--{k}={v}" for k, v in SMALL.items()]
    assert "did you mean 'dec_layers'" in command(monkeypatch, "--dec_layer=3")
    assert "did you mean 'shapes'" in command(monkeypatch, "shape")
    assert "needs data: --data=DIR" in command(monkeypatch, "coco_instance_r50_12ep", f"--out={tmp_path / 'a'}")
    assert str(tmp_path / "nowhere") in command(monkeypatch, "shapes", f"--data={tmp_path / 'nowhere'}", f"--out={tmp_path / 'b'}")
    assert "no multiple of 1 process(es) x --accumulate=3" in command(monkeypatch, "--accumulate=3", f"--out={tmp_path / 'c'}")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "notes.txt").write_text("mine")
    said = command(monkeypatch, f"--out={tmp_path / 'd'}")
    assert all(word in said for word in ("not empty", "--resume", "--overwrite", "--out"))
    run(shapes, tmp_path / "e", max_steps=1)
    again = ["shapes", *small, f"--data={shapes}", f"--out={tmp_path / 'e'}", "--resume"]
    assert "--dec_layers=3 contradicts" in command(monkeypatch, *again, "--dec_layers=3")
    content = json.loads((shapes / "annotations" / "instances_train.json").read_text())
    content["categories"].append({"id": 99, "name": "hexagon"})
    (tmp_path / "five.json").write_text(json.dumps(content))
    assert "has 4 classes" in command(monkeypatch, *again, f"--train_json={tmp_path / 'five.json'}")


def test_a_broken_image_is_one_sentence(shapes, tmp_path, monkeypatch):
    """Also when a loader's worker finds it."""
    shutil.copytree(shapes, tmp_path / "s")
    for file in (tmp_path / "s" / "train").iterdir():
        file.write_bytes(file.read_bytes()[:300])
    small = [f"--{k}={v}" for k, v in (SMALL | {"workers": 1}).items()]
    said = command(monkeypatch, "shapes", *small, f"--data={tmp_path / 's'}", f"--out={tmp_path / 'r'}")
    assert said.startswith("error: image file") and "cannot be read" in said and len(said.splitlines()) == 1


def test_overwrite_starts_again_and_spares_other_files(shapes, tmp_path):
    run(shapes, tmp_path / "r", max_steps=2)
    (tmp_path / "r" / "notes.txt").write_text("mine")
    train.run("shapes", SMALL | {"max_steps": 1}, {"data": str(shapes), "out": str(tmp_path / "r"), "overwrite": True}, ALONE)
    assert len(log(tmp_path / "r")) == 1 and (tmp_path / "r" / "notes.txt").read_text() == "mine"


@pytest.mark.skipif("COCO_TINY" not in os.environ, reason="COCO_TINY is not set")
def test_real_images(tmp_path):
    flags = dict(image_size=128, test_short=128, test_long=213, total_batch=1, max_steps=1, max_images=2, backbone_weights="none", workers=0, dec_layers=2)
    result = train.run("coco_instance_r50_12ep", flags, {"data": os.environ["COCO_TINY"], "out": str(tmp_path)}, ALONE)
    assert result["steps"] == 1 and result["mask_AP"] is not None


def test_the_readme_is_true():
    """Its line counts are the files', and every command line in it can be parsed."""
    root = Path(train.__file__).parent
    text = (root / "README.md").read_text()
    counts = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", text, re.M))
    assert counts == {file.name: str(len(file.read_text().splitlines())) for file in root.glob("*.py")}
    actions = {"train": train.ACTIONS, "evaluate": evaluate.ACTIONS}
    commands = re.findall(r"(?:python|--nproc_per_node=8|--max_restarts=3) (train|evaluate)\.py([^#`\n]*)", text)
    for room, line in commands:
        words, _, overrides = maskdino.parse_overrides(line.split(), actions[room])
        if room == "train":
            preset(*words or ["shapes"], **overrides)
    assert len(commands) > 8


@pytest.mark.slow
@pytest.mark.skipif("COCO_TINY" not in os.environ, reason="COCO_TINY is not set")
def test_learns_real_images_by_heart(tmp_path):
    """The preset `overfit` as the README shows it, about 20 minutes on two cores."""
    result = train.run("overfit", {"max_images": 8}, {"data": os.environ["COCO_TINY"], "out": str(tmp_path)}, ALONE)
    assert result["mask_AP"] > 50
