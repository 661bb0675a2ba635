"""The loop: resume, processes, accumulation, empty images, bad steps, run folders, the command line. On a small set of generated shapes."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
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
    for name in set(train.RUN_FILES) - {"panoptic.json", "result_layers.json"}:
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


def test_resumed_equals_undisturbed(shapes, tmp_path):
    """Bit for bit: weights, averaged weights, optimizer, and what the log says; the end of an epoch lies between (24 images, 2 a step)."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(shapes, whole, max_steps=14, ema=0.9)
    run(shapes, parts, max_steps=5, ema=0.9)
    with open(parts / "log.jsonl", "a") as file:                         # as if killed after the checkpoint, in the middle of a line
        file.write('{"kind": "step", "step": 6, "loss": 1.0}\n{"kind": "st')
    run(shapes, parts, resume=True, max_steps=14, ema=0.9)
    a, b = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (whole, parts))
    for key in ("model", "ema"):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])
    assert all(torch.equal(x["exp_avg"], y["exp_avg"]) for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True))
    assert a["scheduler"] == b["scheduler"] and a["step"] == b["step"] == 14
    assert [line["step"] for line in log(whole, "epoch")] == [line["step"] for line in log(parts, "epoch")] == [12, 14]
    for x, y in zip(log(whole), log(parts), strict=True):
        assert {k: x[k] for k in ("step", "loss", "losses", "lr", "grad_norm")} == {k: y[k] for k in ("step", "loss", "losses", "lr", "grad_norm")}


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
    loss, _ = train.forward_backward(wrap(model), Criterion(config), parts, config, world)
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


def process(rank, port, path):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world = train.start_world("cpu")
    own, grads = gradients(cut(batch_of())[rank:rank + 1], 1, world, DistributedDataParallel)
    loss = world.sum([own])[0] / 2
    if rank == 0:
        torch.save((loss, grads), path)
    torch.distributed.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_equal_one(tmp_path):
    one_loss, one = gradients([batch_of()], 1, ALONE, lambda m: m)
    mp.start_processes(process, (free_port(), tmp_path / "two.pt"), nprocs=2, start_method="spawn")
    loss, two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert loss == pytest.approx(one_loss, rel=1e-12)
    assert_same(two, one)


def test_torchrun_two_processes(shapes, tmp_path):
    """The real command, and the same numbers in its log as one process gives."""
    flags = [f"--{k}={v}" for k, v in SMALL.items()] + ["--max_steps=2", f"--data={shapes}", "--device=cpu"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", "shapes", *flags, f"--out={tmp_path / 'two'}"]
    done = subprocess.run(command, cwd=Path(train.__file__).parent, capture_output=True, text=True, timeout=180, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    run(shapes, tmp_path / "one", max_steps=2)
    for two, one in zip(log(tmp_path / "two"), log(tmp_path / "one"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-2)      # groups of denoising queries may differ between the halves of a batch
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["world_size"] == 2 and result["steps"] == 2


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
    commands = re.findall(r"(?:python|--nproc_per_node=8) (train|evaluate)\.py([^#`\n]*)", text)
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
