"""The paper's tables: every row builds, differs from its base in what it says and in nothing else, trains; the runner; the printing. At tiny sizes."""
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_maskdino import random_targets

import data
import dformer
import evaluate
import losses
import mask2former
import maskdino
import train
from evaluate import SMALL, TABLES, Cell, Run, run_of
from losses import Criterion
from maskdino import ConfigError, preset

ROWS = {f"{name}: {label}": row for name, table in TABLES.items() for label, row in table.rows.items()}
RUNS = {run.name: run for row in ROWS.values() if (run := run_of(row))}
TINY = dict(backbone="resnet10", backbone_norm="group", backbone_weights="none", hidden=32, heads=4, enc_layers=1, enc_ffn=32, dec_ffn=32, queries=10,
            denoising_queries=12, mask_points=32, workers=0, image_size=64, test_short=64, test_long=64, crop_height=0, total_batch=2, max_steps=2, log_every=1,
            detections=5)
ALONE = train.World(0, 1, torch.device("cpu"))


def tiny(run, **changes):
    """A run's Config, small where the run says nothing about it."""
    sizes = TINY | changes
    if "swin" in preset(run.preset).backbone:
        sizes |= dict(backbone="swin_t")
    return preset(run.preset, **sizes | {k: v for k, v in run.overrides.items() if k not in evaluate.TWELVE})


def parameters(config):
    with torch.device("meta"):
        return {k: tuple(p.shape) for k, p in maskdino.file_of(config.model).MODEL(config, 7).named_parameters()}


# ---------------------------------------------------------------------------------------------------------------- what the tables say
def test_the_papers_tables_are_all_there():
    assert [*TABLES] == ["combination", "instance", "panoptic", "semantic", "pretrained", "selection", "enhanced", "scales", "tasks", "depth", "matching",
                         "decoupled", "components", "models", "m2f_components", "m2f_scales", "m2f_points", "dformer"]
    for name, table in TABLES.items():
        assert set(table.metrics) <= evaluate.EMPTY.keys() | evaluate.COSTS.keys()
        for row in table.rows.values():
            assert len(row.paper) == len(table.metrics) and any(number is not None for number in row.paper) == (name != "dformer")
            assert not row.base or row.base in table.rows
            assert (row.preset is None) == bool(row.remark)
            assert set(row.at_test) <= set(evaluate.OVERRIDES) - set(row.overrides) and not (row.at_test and row.layer is not None)


def test_shared_rows_train_once():
    """The same setting has the same folder, wherever it stands and however it is said."""
    small = {run.name for name in ("components", "matching") for row in TABLES[name].rows.values() if (run := run_of(row, "shapes"))}
    assert len(small) == 8
    with_me = run_of(TABLES["components"].rows["full model"])
    assert with_me.name == "coco_instance_r50_12ep" == run_of(TABLES["instance"].rows["12 epochs"]).name
    without = "coco_instance_r50_12ep--box_init=token"
    assert {run_of(TABLES[name].rows[label]).name for name, label in (("depth", "9 layers"), ("matching", "class + box + mask"))} == {without}
    assert run_of(TABLES["scales"].rows["4 scales"]).name == run_of(TABLES["tasks"].rows["both"]).name == "coco_instance_r50_50ep--box_init=token"
    assert Run("shapes", {"levels": (8, 16), "dec_layers": 3}).name == "shapes"
    assert Run("shapes", {"levels": (8, 16, 32), "seed": 2}).name == "shapes--levels=8,16,32--seed=2"


def test_small_rows_are_the_shapes_preset_with_the_rows_own_overrides():
    for row in ROWS.values():
        if run := run_of(row, "shapes"):
            assert "shapes" in run.preset and {k: v for k, v in run.overrides.items() if k in SMALL} == SMALL
            assert run.overrides.keys() - SMALL.keys() == row.overrides.keys() - evaluate.TWELVE.keys()
            preset(run.preset, **run.overrides)
    assert run_of(TABLES["instance"].rows["Swin-L"], "shapes") is None
    assert run_of(TABLES["instance"].rows["50 epochs, without ME, 100 queries"], "shapes").overrides["queries"] == 10
    assert run_of(TABLES["m2f_scales"].rows["stride 32, instance"], "shapes") is None           # small models have two levels
    assert run_of(TABLES["m2f_scales"].rows["stride 16, instance"], "shapes").overrides["attention_strides"] == (16,)
    with pytest.raises(ConfigError, match="--scale=tiny"):
        run_of(TABLES["depth"].rows["3 layers"], "tiny")


@pytest.mark.parametrize("name", RUNS)
def test_every_row_builds(name):
    run = RUNS[name]
    preset(run.preset, **run.overrides)                                 # at full size it is at least a valid Config
    assert parameters(tiny(run))


CHANGES = {                                                             # row: what its model lacks, has in addition, has in another shape
    "combination: Mask2Former + detection head": ((), ("heads.box_head.",), ()),
    "scales: 1 scale": ((), (), ("cross_attn.sampling_offsets", "cross_attn.attention_weights")),
    "scales: 3 scales": ((), (), ("cross_attn.sampling_offsets", "cross_attn.attention_weights")),
    "tasks: box only": (("heads.mask_head", "pixel_decoder.lateral", "pixel_decoder.smooth", "pixel_decoder.pixel_embed"), (), ()),
    "depth: 3 layers": (tuple(f"decoder.layers.{i}." for i in range(3, 9)), (), ()),
    "depth: 6 layers": (tuple(f"decoder.layers.{i}." for i in range(6, 9)), (), ()),
    "depth: 12 layers": ((), tuple(f"decoder.layers.{i}." for i in range(9, 12)), ()),
    "components: without unified query selection": ((), ("query_selection.content",), ()),
    "components: without all four": ((), ("query_selection.content",), ()),
    "instance: 50 epochs, without ME, 100 queries": ((), (), ()),
} | {f"{label}, {task}": change for task in ("instance", "panoptic", "semantic") for label, change in {
    "m2f_components: without high-resolution features": ((), (), ("decoder.level_embed",)),
    "m2f_components: without learned query features": (("content.weight",), (), ()),
    "m2f_components: the last three at once": (("content.weight",), (), ()),
    **dict.fromkeys(("m2f_scales: stride 32", "m2f_scales: stride 16", "m2f_scales: stride 8"), ((), (), ("decoder.level_embed",)))}.items()}
SAME_PRESET = {key: row for key, row in ROWS.items() if row.base and row.preset == TABLES[key.split(":")[0]].rows[row.base].preset}


@pytest.mark.parametrize("key", SAME_PRESET)
def test_a_row_has_the_parameters_that_it_says(key):
    row, (table, _) = ROWS[key], key.split(": ", 1)
    own, base = (parameters(tiny(run_of(r))) for r in (row, TABLES[table].rows[row.base]))
    less, more, other = CHANGES.get(key, ((), (), ()))
    reshaped = {k for k in own.keys() & base.keys() if own[k] != base[k]}
    for names, parts in ((base.keys() - own.keys(), less), (own.keys() - base.keys(), more), (reshaped, other)):
        assert all(any(part in name for part in parts) for name in names) and all(any(part in name for name in names) for part in parts)


# ---------------------------------------------------------------------------------------------------------------- costs and losses
COSTS = {"tasks: box only": {"class", "l1", "giou"}, "tasks: mask only": {"class", "mask", "dice"}, "matching: class + box": {"class", "l1", "giou"},
         "matching: class + mask": {"class", "mask", "dice"}, "components: without hybrid matching": {"class", "l1", "giou"},
         "components: without all four": {"class", "l1", "giou"}, "combination: Mask2Former": {"class", "mask", "dice"}}
ALL = {"class", "l1", "giou", "mask", "dice"}
PATHS = {key: row for key, row in ROWS.items() if key.split(":")[0] in ("combination", "scales", "tasks", "matching", "decoupled", "components", "enhanced")
         and row.preset}


@pytest.mark.parametrize("key", PATHS)
def test_a_row_has_the_costs_and_losses_that_it_says(key):
    config = tiny(run_of(ROWS[key]), dec_layers=1)
    torch.manual_seed(0)
    model = maskdino.file_of(config.model).MODEL(config, 7).train()
    targets, things = random_targets((2, 3)), [True] * 3 + [False] * 4
    criterion = Criterion(config, things)
    output = model(torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8), [(64, 64)] * 2, targets)
    total, losses = criterion(output, targets)
    assert torch.isfinite(total) and set(criterion.cost_parts) == COSTS.get(key, ALL)
    weighed = {name.rpartition("/")[2] for name in losses if criterion.weights[name.rpartition("/")[2]]}
    assert weighed == {"tasks: box only": ALL - {"mask", "dice"}, "tasks: mask only": ALL - {"l1", "giou"},
                       "combination: Mask2Former": ALL - {"l1", "giou"}}.get(key, ALL)
    noised = {name.rpartition("/")[2] for name in losses if name.startswith("denoising/")}
    box_only = key in ("tasks: box only", "components: without unified denoising", "components: without all four")
    assert noised == (set() if config.model == "mask2former" else ALL - {"mask", "dice"} if box_only else ALL)
    assert (criterion.boxed is not None) == (key in ("decoupled: 12 epochs, with", "decoupled: 50 epochs, with"))
    if config.model == "maskdino":
        scales = {"scales: 1 scale": 1, "scales: 3 scales": 3}.get(key, 4)
        assert model.decoder.layers[0].cross_attn.shape[1] == scales


# What a Mask2Former layer sees of 64 pixels (cells, whether some are blocked), which sets are predicted, points of matching and loss, share of dropout.
FULL = {"cells": [4, 16, 64], "masked": [True, True, True], "sets": 4, "matching": 32, "loss": (96, 8), "self first": False, "dropout": 0.0}
OTHERWISE = {
    "without masked attention": {"masked": [False] * 3}, "without high-resolution features": {"cells": [4] * 3}, "with dropout": {"dropout": 0.1},
    "without learned query features": {"sets": 3, "masked": [False, True, True]}, "self-attention first": {"self first": True},
    "the last three at once": {"sets": 3, "masked": [False, True, True], "self first": True, "dropout": 0.1},
    "stride 32": {"cells": [4] * 3}, "stride 16": {"cells": [16] * 3}, "stride 8": {"cells": [64] * 3}, "all three in every layer": {"cells": [84] * 3},
    "matching on masks, loss on masks": {"matching": 256, "loss": (0, 256)}, "matching on masks, loss on points": {"matching": 256},
    "matching on points, loss on masks": {"loss": (0, 256)}, **dict.fromkeys(("full model", "one after the other", "both on points"), {})}


@pytest.mark.parametrize("key", [key for key in ROWS if key.startswith("m2f_")])
def test_a_row_of_mask2former_looks_and_compares_as_it_says(key, monkeypatch):
    config, label = tiny(run_of(ROWS[key]), dec_layers=3), key.split(": ")[1].rpartition(", ")[0]
    torch.manual_seed(0)
    model, targets = mask2former.Mask2Former(config, 7).train(), random_targets((2, 3), 64)
    seen, order, points, layers = [], [], [], model.decoder.layers
    for layer in layers:
        layer.register_forward_hook(lambda _m, args, _out: seen.append((args[2].shape[1], args[4] is not None)))
    for name in ("self_attn", "cross_attn"):
        getattr(layers[0], name).register_forward_hook(lambda *_, name=name: order.append(name))
    real = losses.point_losses
    monkeypatch.setattr(losses, "point_losses", lambda maps, masks, *draws: points.append([d.shape[2] for d in draws]) or real(maps, masks, *draws))
    output = model(torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8), [(64, 64)] * 2, targets)
    criterion = Criterion(config)
    criterion(output, targets)[0].backward()
    matching = criterion.match_points(output.pixels, [torch.Generator()] * 2, torch.device("cpu")).shape[2]
    assert all(p.grad is not None for p in model.parameters())
    assert dict(zip(FULL, ([c for c, _ in seen], [b for _, b in seen], len(output.sets), matching, tuple(points[0]), order[0] == "self_attn",
                           layers[0].dropout.p), strict=True)) == FULL | OTHERWISE[label]
    assert layers[0].self_attn.dropout == layers[0].cross_attn.dropout == layers[0].dropout.p


@pytest.mark.parametrize("key", [key for key in ROWS if key.startswith("dformer")])
def test_a_row_of_dformer_draws_and_samples_as_it_says(key, monkeypatch):
    """Its objects after the least noise: how far from its ground one is, and whether it is grey; how often it looks in sampling."""
    row, calls = ROWS[key], []
    config = tiny(run_of(row), dec_layers=1)
    config = dataclasses.replace(config, **row.at_test)
    model, (target,) = dformer.DFormer(config, 7).eval(), random_targets((3,), 64)
    draws = dformer.draw_noise(target, config) | {"t": 0}
    inside = dformer.noisy_masks(target, draws, config)[0][draws["order"].argsort()[:3]]
    truth = dformer.middle(target["masks"], 4) > 0
    blur = (inside - truth.float()).abs().mean().item()                 # noise of deviation 0.0064 on masks of +-b, shown as 0 ... 1
    expected = 0.25 if "shuffled" in key else 0.5 * 0.4 * 0.0064 / config.noise_scale
    assert blur == pytest.approx(expected, rel=0.2)
    monkeypatch.setattr(model, "denoise", lambda m, t, *rest, real=model.denoise: calls.append(int(t)) or real(m, t, *rest))
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [(64, 64)])
    assert calls == {1: [999], 4: [999, 749, 499, 249]}.get(len(calls), calls) and len(calls) == row.at_test.get("sampling_steps", 1)


# ---------------------------------------------------------------------------------------------------------------- the runner
@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "s"
    data.make_shapes(folder, train=8, val=3)
    return folder


# At 128 pixels the level of stride 64 has more than one cell, as group norm wants it.
LITTLE = {k: v for k, v in TINY.items() if k not in ("workers", "queries")} | dict(dec_layers=1, iterations=2, test_short=128, test_long=128)


def table(name, shapes, out, **actions):
    train.run_table(name, LITTLE, {"data": str(shapes), "out": str(out), "scale": "shapes"} | actions, ALONE)


@pytest.mark.parametrize("name", ["combination", "enhanced", "scales", "tasks", "components"])
def test_rows_train_and_evaluate(name, shapes, tmp_path, capsys):
    table(name, shapes, tmp_path)
    said, results = capsys.readouterr().out, list(tmp_path.glob("*/result.json"))
    assert len(results) == len(train.jobs_of(TABLES[name], "shapes", LITTLE, 1))
    assert all(json.loads(file.read_text())["steps"] == 2 for file in results)
    assert TABLES[name].title in said and (tmp_path / f"{name}_shapes.png").exists()
    if name == "combination":                                           # the same by hand; Mask2Former has no selection
        checkpoint = next(tmp_path.glob("*detection_head*/checkpoint.pth"))
        evaluate.main([str(checkpoint), f"--data={shapes}", f"--out={tmp_path}/layers", "--layers", "--device=cpu"])
        found, result = (json.loads(f.read_text()) for f in (tmp_path / "layers/result_layers.json", checkpoint.parent / "result.json"))
        assert found["layer1"]["box_AP"] == result["box_AP"] and [*found] == ["initial", "layer1"]
    if name == "enhanced":
        assert all(set(json.loads(f.read_text())) == {"selection", "initial", "layer1"} for f in tmp_path.glob("*/result_layers.json"))


@pytest.mark.parametrize("name", ["m2f_components", "m2f_scales", "m2f_points"])
def test_rows_of_mask2former_train_and_evaluate(name, shapes, tmp_path, monkeypatch, capsys):
    """Those for instances; the others differ by task alone. Numbers that were not looked up again say so."""
    rows = {label: row for label, row in TABLES[name].rows.items() if label.endswith(", instance")}
    monkeypatch.setitem(TABLES, name, TABLES[name]._replace(rows=rows))
    table(name, shapes, tmp_path)
    runs = [run for row in rows.values() if (run := run_of(row, "shapes"))]
    assert len(list(tmp_path.glob("*/result.json"))) == len(runs) >= len(rows) - 1              # none for stride 32
    lines = [line for line in capsys.readouterr().out.splitlines() if "  mask_AP  " in line]
    assert sum("(unchecked)" in line for line in lines) == len(rows) - 1 and "43.7  " in next(line for line in lines if "(unchecked)" not in line)


def test_models_side_by_side(shapes, tmp_path, capsys):
    """Scores, minutes and memory of the three."""
    table("models", shapes, tmp_path)
    results = {label: json.loads((tmp_path / run_of(row, "shapes", LITTLE).name / "result.json").read_text()) for label, row in TABLES["models"].rows.items()}
    cells = {label: evaluate.cells_of(row, ("minutes", "GB"), tmp_path, "shapes", LITTLE) for label, row in TABLES["models"].rows.items()}
    for label, result in results.items():
        assert [cell.mean for cell in cells[label]] == [result["seconds"] / 60, result["peak_memory"] / 2 ** 30]
    assert len({result["steps"] for result in results.values()}) == 1 and "Mask2Former  minutes" in " ".join(capsys.readouterr().out.split("   "))


def test_a_process_that_writes_nothing_evaluates_no_plain_row_again(tmp_path, monkeypatch):
    """Whoever is not first comes from training while the first still writes result.json, and must not start an evaluation alone."""
    calls = []
    monkeypatch.setattr(train, "run", lambda *_: None)
    monkeypatch.setattr(train, "read_out", lambda row, *_: calls.append(row))
    for name, wanted in (("models", 0), ("dformer", 6), ("enhanced", 2)):
        calls.clear()
        train.run_table(name, {}, {"out": str(tmp_path), "scale": "shapes"}, train.World(1, 2, torch.device("cpu")))
        assert len(calls) == wanted and all(row.read_out for row in calls)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux knows a way")
def test_a_runs_peak_of_memory_is_its_own():
    torch.ones(2 ** 27)                                                 # half a GB, by somebody before
    before = train.peak_memory(ALONE.device)
    train.forget_peak_memory(ALONE.device)
    assert train.peak_memory(ALONE.device) < before - 2 ** 28


def test_more_sampling_steps_are_read_out_of_the_trained_model(shapes, tmp_path, capsys):
    """Four trainings for ten rows; what is missing alone is evaluated, by the command that the table names."""
    table("dformer", shapes, tmp_path)
    found = sorted(tmp_path.glob("*/sampling_steps=*/result_eval.json"))
    assert len(list(tmp_path.glob("*/result.json"))) == 4 and len(found) == 6
    before, first = found[0].read_text(), found[0].parent
    shutil.rmtree(first)
    command = next(line for line in evaluate.table_text("dformer", tmp_path, "shapes", LITTLE, str(shapes)).splitlines() if "evaluate.py" in line)
    evaluate.main([*command.partition("evaluate.py ")[2].split(), "--device=cpu"])
    by_hand = json.loads((first / "result_eval.json").read_text())
    assert {k: by_hand[k] for k in json.loads(before)} == json.loads(before)
    shutil.rmtree(first)
    capsys.readouterr()
    table("dformer", shapes, tmp_path)
    assert found[0].read_text() == before and "train data" in capsys.readouterr().out


def test_the_runner_goes_on_where_it_was_stopped(shapes, tmp_path, monkeypatch, capsys):
    real, calls = train.run, []

    def stopped(name, overrides, actions, world):
        calls.append(overrides)
        if len(calls) == 2:                                             # the second row: killed after its first step
            real(name, overrides | {"max_steps": 1}, actions, world)
            Path(actions["out"], "result.json").unlink()
            raise KeyboardInterrupt
        return real(name, overrides, actions, world)
    monkeypatch.setattr(train, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        table("matching", shapes, tmp_path)
    capsys.readouterr()
    table("matching", shapes, tmp_path)
    said = capsys.readouterr().out
    assert len(calls) == 4 and calls[2] == calls[1] and said.count("resumed from") == 1 and "at step 1" in said
    table("matching", shapes, tmp_path)
    assert len(calls) == 4                                              # nothing is left to do
    table("matching", shapes, tmp_path, dry_run=True, seeds=2)
    said = capsys.readouterr().out
    assert said.count(": done") == 3 and said.count(": to do") == 3 and "images/s" in said


def test_a_dry_run_says_what_would_run(tmp_path, capsys):
    train.run_table("components", {}, {"out": str(tmp_path), "dry_run": True, "data": "/data/coco"}, ALONE)
    said = capsys.readouterr().out
    assert said.count("train.py coco_instance_r50_12ep") == 6 and "6 runs, time unknown" in said and not list(tmp_path.iterdir())
    (tmp_path / "cityscapes").mkdir()
    train.run_table("semantic", {}, {"dry_run": True, "data": str(tmp_path)}, ALONE)
    assert capsys.readouterr().out.count(f"--data={tmp_path}/cityscapes\n") == 2
    train.run_table("components", {}, {"dry_run": True, "scale": "shapes"}, ALONE)
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize("argv, words", [
    (["--table=component"], "did you mean 'components'"), (["shapes", "--table=depth"], "leave out shapes"), (["--seeds=3"], "goes with --table"),
    (["--table=depth", "--seed=1"], "--seeds=N"), (["--table=depth", "--seeds=0"], "at least 1"), (["--table=depth", "--scale=big"], "--scale=big"),
    (["--table=depth", "--finetune=x.pth"], "--finetune")])
def test_mistakes_end_in_one_sentence(argv, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert str(stop.value.code).startswith("error: ") and words in stop.value.code


# ---------------------------------------------------------------------------------------------------------------- printing
def leave(root, table, label, scores):
    """Result files of seeds 0, 1 ... of a row at full size."""
    for seed, (box, mask) in enumerate(scores):
        folder = root / run_of(TABLES[table].rows[label], None, {"seed": seed} if seed else {}).name
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"box_AP": box, "mask_AP": mask}))


def test_tables_from_results(tmp_path, capsys):
    leave(tmp_path, "matching", "class + box + mask", [(44.0, 41.0), (45.0, 41.2), (44.6, 41.1)])
    leave(tmp_path, "matching", "class + mask", [(40.0, 41.4), (41.0, 40.4), (40.3, 41.0)])
    leave(tmp_path, "components", "without all four", [(41.0, 38.0)])
    lines = {(line["row"], line["metric"]): line for line in evaluate.compared(TABLES["matching"], tmp_path, None)}
    line = lines["class + mask", "box_AP"]
    assert line["ours"].seeds == 3 and line["ours"].mean == pytest.approx(40.433, abs=1e-3) and line["paper_effect"] == -4.3
    assert line["effect"][0] == pytest.approx(-4.1) and line["effect"][1] == pytest.approx((0.263333 / 3 + 0.253333 / 3) ** 0.5, abs=1e-4)
    assert line["verdict"] == "reproduced" and lines["class + mask", "mask_AP"]["verdict"] == "not resolved"
    assert lines["class + box", "box_AP"]["ours"] is None
    evaluate.main(["--tables", f"--out={tmp_path}"])
    said = capsys.readouterr().out
    assert all(table.title in said for table in TABLES.values()) and "40.4 ± 0.5 (3)" in said and "paper only" in said
    assert "train.py coco_instance_r50_12ep --box_init=token --matching=box" in said
    assert {f.name for f in tmp_path.glob("*.png")} == {"matching.png"} and Image.open(tmp_path / "matching.png").width > 500
    assert "41.0 (1)" in evaluate.table_text("components", tmp_path)
    with pytest.raises(SystemExit, match="did you mean"):
        evaluate.main(["--tables", "match"])


def test_rows_that_are_one_run_are_not_compared(tmp_path):
    """On shapes 12 and 24 epochs are the same schedule."""
    folder = tmp_path / run_of(TABLES["panoptic"].rows["12 epochs"], "shapes").name
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"PQ": 30.0}))
    lines = {(line["row"], line["metric"]): line for line in evaluate.compared(TABLES["panoptic"], tmp_path, "shapes")}
    assert lines["24 epochs", "PQ"]["ours"].mean == 30 and lines["24 epochs", "PQ"]["effect"] is None
    assert "24 epochs: at this scale the same run as '12 epochs'" in evaluate.table_text("panoptic", tmp_path, "shapes")


def test_a_sign_needs_more_than_twice_its_standard_error():
    assert evaluate.effect(Cell(40.0, None, 1), Cell(41.0, 0.1, 3)) == (-1.0, None) and evaluate.effect(None, Cell(1.0, None, 1)) is None
    assert [evaluate.verdict(-1.0, ours) for ours in ((-1.0, None), (-1.0, 0.5), (-1.0, 0.4), (1.0, 0.4), None)] == \
        ["not resolved", "not resolved", "reproduced", "contrary", ""]


# ---------------------------------------------------------------------------------------------------------------- commands
def test_the_readme_has_the_commands_of_every_table():
    """Its commands for 8 GPUs are those of the tables, each can be parsed, and no table is forgotten."""
    text = (Path(train.__file__).parent / "README.md").read_text()
    two = ("semantic", "m2f_components", "m2f_scales", "m2f_points")    # of several data sets
    where = {name: "/data" if name in two else "/data/coco" for name, table in TABLES.items() if any(row.preset for row in table.rows.values())}
    for name, folder in where.items():
        assert f"torchrun --standalone --nproc_per_node=8 train.py --table={name} --data={folder}\n" in text, name
        for run, _ in train.jobs_of(TABLES[name], None, {}, 1).values():
            words, actions, overrides = maskdino.parse_overrides(run.command(Path("runs"), folder).partition("train.py ")[2].split(), train.ACTIONS)
            assert Run(words[0], overrides).name == run.name and actions["out"] == f"runs/{run.name}"
    for row in ROWS.values():
        for command in row.remark.split("train.py ")[1:]:
            words, _, overrides = maskdino.parse_overrides(command.partition(";")[0].split(), train.ACTIONS)
            preset(words[0], **overrides)
