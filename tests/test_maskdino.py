"""The model against the released implementation: golden numbers (tests/golden), parameter counts, gradients; and its edge cases.

Every golden file holds weights by a recipe from the parameters' official names (recipe.py), inputs and what the released code gave. Maps of mask logits are
kept at every fourth row and column.
"""
import dataclasses
import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import losses
import maskdino
from losses import Criterion, Output, Prediction, Truth
from maskdino import Config, ConfigError, MaskDINO, preset

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import recipe  # noqa: E402

CLASSES = {"names": [f"class {i}" for i in range(7)], "category_ids": list(range(1, 8)), "is_thing": [True] * 7}
HEADS = ["mask2box", "no", "bitmask", "lvl5_res2", "lvl3_high2low", "learn_tgt", "no_initial_pred", "one_stage", "ce"]


def tensor(array):
    return torch.from_numpy(np.asarray(array))


def golden(name):
    return np.load(GOLDEN / f"{name}.npz", allow_pickle=False)


# ---------------------------------------------------------------------------------------------------------------- golden heads
def recipe_weights(shapes):
    """A released checkpoint made by the recipe, buffers included. shapes: {official name: shape}."""
    state = {name: tensor(x) for name, x in recipe.make_weights(shapes).items()}
    for name in shapes.keys() - state.keys():
        integers = name.endswith(("relative_position_index", "num_batches_tracked"))
        state[name] = torch.zeros(shapes[name], dtype=torch.int64) if integers else torch.tensor([1.0] * (shapes[name][0] - 1) + [0.1])
    return state


class Features(nn.Module):
    """Stands for the backbone: the fixtures start from feature maps."""
    channels = [8, 16, 24, 32]

    def __init__(self, _config):
        super().__init__()

    def forward(self, images):
        sizes = [(32, 40), (16, 20), (8, 10), (4, 5)]
        return [tensor(recipe.make_feature(f"res{i + 2}", 2, c, *s)).to(images.dtype) for i, (c, s) in enumerate(zip(self.channels, sizes, strict=True))]


def head_model(z, monkeypatch):
    """The fixture's model with the recipe's weights, its features in place of a backbone."""
    c = json.loads(str(z["config"]))
    levels = {("res3", 3): (8, 16, 32), ("res3", 4): (8, 16, 32, 64), ("res2", 5): (4, 8, 16, 32, 64)}[c["in_features"][0], c["total_num_feature_levels"]]
    config = Config(levels=levels, hidden=64, enc_layers=2, enc_ffn=128, dec_layers=3, dec_ffn=128, queries=20, two_stage=c["two_stage"],
                    content_queries="learned" if c["learn_tgt"] else "selected", initial_prediction=c["initial_pred"],
                    box_init="token" if c["initialize_box_type"] == "no" else c["initialize_box_type"],
                    smallest_proposal="coarse" if c["feature_order"] == "low2high" else "fine", denoising_queries=20, mask_points=256,
                    class_loss="ce" if c["semantic_ce_loss"] else "focal")
    monkeypatch.setattr(maskdino, "make_backbone", Features)
    model = MaskDINO(config, 7)
    state = {f"sem_seg_head.{name}": x for name, x in recipe_weights(json.loads(str(z["params"]))).items()}
    model.load_state_dict(maskdino.from_official(state, model, "fixture"))
    return model


def forward(model, targets=None, noise=None):
    return model(torch.zeros(2, 3, 128, 160, dtype=torch.uint8), [(128, 160)] * 2, targets, noise)


def close(ours, z, name, floor=1e-4):
    """Within the suggested tolerance, or ten times what the released output changes by when its input changes in the last digit."""
    sensitivity = json.loads(str(z["sensitivity"])).get(name, 0)
    ours, theirs = ours.detach(), tensor(z[name])
    if ours.shape != theirs.shape:                                       # maps are stored at every fourth cell
        ours = ours[..., ::4, ::4]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=max(floor, 10 * sensitivity), msg=lambda m: f"{name}: {m}")


def check_set(p, pixels, z, prefix):
    close(p.logits, z, f"{prefix}pred_logits")
    close(p.boxes, z, f"{prefix}pred_boxes")
    if f"{prefix}pred_masks" in z.files:
        close(maskdino.mask_logits(p.embeddings, pixels), z, f"{prefix}pred_masks")


def prefixes(sets):
    """Our names of the sets beside the fixtures': the last is theirs without a number, the others count on."""
    inner = [n for n in sets if n != "selection"]
    return {"selection": "interm_"} | {n: f"aux{i}_" for i, n in enumerate(inner[:-1])} | {inner[-1]: ""}


@pytest.mark.parametrize("case", HEADS)
def test_golden_head(case, monkeypatch):
    z = golden(f"head_{case}")
    model = head_model(z, monkeypatch).eval()
    seen = {"anchors": [], "states": []}

    def record(_layer, args, out):
        seen["anchors"].append(args[2])
        seen["states"].append(model.heads.norm(out))
    for layer in model.decoder.layers:
        layer.register_forward_hook(record)
    with torch.no_grad():
        output = forward(model)
    names = prefixes(output.sets)
    assert sum(f"{p}pred_logits" in z.files for p in names.values()) == len(output.sets)
    for name, p in output.sets.items():
        check_set(p, output.pixels, z, names[name])
    if "mask_features" in z.files:
        close(output.pixels, z, "mask_features")
    for i, (anchors, state) in enumerate(zip(seen["anchors"], seen["states"], strict=True)):
        torch.testing.assert_close(anchors, tensor(z["dec_references"][i]), rtol=0, atol=1e-5)
        torch.testing.assert_close(state, tensor(z["dec_hs"][i]), rtol=0, atol=2e-4)


@pytest.mark.parametrize("case", ["mask2box", "lvl5_res2", "lvl3_high2low"])
def test_golden_selected_tokens(case, monkeypatch):
    """The same tokens in the same order; the released indices count levels from coarse to fine."""
    z = golden(f"head_{case}")
    model = head_model(z, monkeypatch).eval()
    scores = []
    model.heads.class_head.register_forward_hook(lambda _m, _args, out: scores.append(out.amax(-1)) or None)
    with torch.no_grad():
        forward(model)
    shapes = [(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)]
    shapes = {"mask2box": shapes[1:], "lvl5_res2": shapes, "lvl3_high2low": shapes[1:4]}[case]
    levels = list(torch.arange(sum(h * w for h, w in shapes)).split([h * w for h, w in shapes]))
    order = torch.cat(levels if case == "lvl3_high2low" else levels[::-1])
    torch.testing.assert_close(scores[0][:, order], tensor(z["enc_scores"]), rtol=0, atol=1e-4)
    assert torch.equal(scores[0][:, order].topk(20).indices, tensor(z["topk_indices"]))


# ---------------------------------------------------------------------------------------------------------------- training
def training_inputs(z):
    targets = [{"labels": tensor(z[f"target{i}_labels"]), "boxes": tensor(z[f"target{i}_boxes"]), "masks": tensor(z[f"target{i}_masks"]), "key": i}
               for i in range(2)]
    groups, counts = int(z["dn_scalar"]), [len(t["labels"]) for t in targets]
    new = np.zeros(len(z["dn_label_p"]), np.int64)
    new[z["dn_chosen"]] = z["dn_new_label"]
    draws = [a.reshape(groups, -1, *a.shape[1:]) for a in (z["dn_label_p"], new, z["dn_box_rand"])]          # groups, then images, then objects
    ends = np.cumsum(counts)
    noise = [dict(zip(("flip", "label", "box"), (tensor(a[:, e - n:e]) for a in draws), strict=True)) for e, n in zip(ends, counts, strict=True)]
    return targets, groups, noise


def recorded_points(z, names, groups, counts):
    """The released points of matching and losses in the shapes that Criterion takes; its rows go by object, theirs by matched query."""
    tags = {n: {"interm_": "interm", "": "final"}.get(p, p.rstrip("_")) for n, p in names.items()}
    empty = np.zeros((1, 256, 2), np.float32)
    match = [[z[k] if (k := f"crit/matcher/{tags[n]}/points_img{b}") in z.files else empty for b in range(2)] for n in names]
    points = {"match": tensor(np.stack([np.concatenate(row) for row in match])), "sets": [], "denoising": []}
    for b, n in enumerate(counts):
        start, sets, known = sum(counts[:b]), [], []
        for tag in tags.values():
            rows = z[f"crit/loss/{tag}/points"][start:start + n]
            order = np.argsort(z[f"crit/loss/{tag}/tgt_img{b}"]) if n else []
            sets.append(rows[order] if n else rows)
            if tag != "interm":
                known.append(z[f"crit/loss/dn_{tag}/points"][groups * start:groups * (start + n)])
        # Given as the random extra ones, the final points are taken as they are.
        points["sets"].append((torch.zeros(len(sets), n, 768, 2), tensor(np.stack(sets))))
        points["denoising"].append((torch.zeros(len(known), n * groups, 768, 2), tensor(np.stack(known))))
    return points


OFFICIAL_LOSS = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou", "mask": "loss_mask", "dice": "loss_dice"}


@pytest.mark.parametrize("case", ["train_dn", "train_dn_zero"])
def test_golden_training(case, monkeypatch):
    """Denoising queries, assignments, every loss, the total and the gradient of every parameter, given the recorded draws."""
    z = golden(f"head_{case}")
    model = head_model(z, monkeypatch).train()
    targets, groups, noise = training_inputs(z)
    denoising = maskdino.make_denoising(targets, model.label_embed, model.config, noise)
    assert denoising.groups == groups
    torch.testing.assert_close(denoising.content, tensor(z["dn_input_query_label"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(denoising.anchors, tensor(z["dn_input_query_bbox_unsig"]).sigmoid(), rtol=0, atol=1e-6)
    mask = maskdino.denoising_attention_mask(groups, denoising.content.shape[1] // groups, 20, torch.device("cpu"))
    assert torch.equal(mask, tensor(z["dn_attn_mask"]))

    output = forward(model, targets, noise)
    names = prefixes(output.sets)
    for name, p in output.sets.items():
        check_set(p, output.pixels, z, names[name])
    for name, p in output.denoising.items():
        check_set(p, output.pixels, z, f"dn_out_{names[name]}")

    counts = [len(t["labels"]) for t in targets]
    points = recorded_points(z, names, groups, counts)
    criterion = Criterion(model.config)
    cost = losses.matching_cost(losses.stack(output.sets), output.pixels, Truth.of(targets, True), points["match"], criterion.cost_parts)
    query, _ = losses.assign(sum(losses.WEIGHTS[k] * v for k, v in cost.items()), counts)
    for r, name in enumerate(output.sets):
        tag = {"interm_": "interm", "": "final"}.get(names[name], names[name].rstrip("_"))
        for b, n in enumerate(counts):
            wanted = np.full(n, -1)
            wanted[z[f"crit/loss/{tag}/tgt_img{b}"]] = z[f"crit/loss/{tag}/src_img{b}"]
            assert query[r, b, :n].tolist() == wanted.tolist(), (name, b)

    total, ours = criterion(output, targets, points=points)
    theirs = json.loads(str(z["losses"]))
    for name, loss in ours.items():
        *where, set_name, part = name.split("/")
        suffix = {"interm_": "_interm", "": ""}.get(names[set_name], "_" + names[set_name][3:-1])
        assert loss.item() == pytest.approx(theirs.pop(OFFICIAL_LOSS[part] + ("_dn" if where else "") + suffix), abs=1e-4), name
    assert not theirs                                                    # every released term has its twin
    assert total.item() == pytest.approx(float(z["total_loss"]), rel=1e-5)
    total.backward()
    check_gradients(model, z)


def check_gradients(model, z):
    """L2 norms of the gradients; tensors with a reversed level axis or shared names keep theirs."""
    official = {recipe.canonical(name): norm for name, (norm, _) in json.loads(str(z["grad_norm_sum"])).items()}
    ours = {recipe.canonical(maskdino.official_names(name, model.config)[0]): p.grad for name, p in model.named_parameters()}
    assert ours.keys() == official.keys()
    for name, grad in ours.items():
        assert float(grad.double().norm()) == pytest.approx(official[name], rel=1e-3, abs=1e-5), name


# ---------------------------------------------------------------------------------------------------------------- criterion.npz
def criterion_case(task="instance"):
    """Stored mask logits enter as the pixel map, with unit vectors as embeddings."""
    z = golden("criterion")
    z = {k.removeprefix(f"{task}/"): z[k] for k in z.files}
    targets = [{k: tensor(z[f"img{b}_target_{k}"]) for k in ("labels", "boxes", "masks")} | {"key": b} for b in range(2)]
    masks = tensor(z["pred_masks"])
    p = Prediction(tensor(z["pred_logits"]), tensor(z["pred_boxes"]), torch.eye(12).expand(2, -1, -1))
    return z, targets, Output((128, 160), masks, {"layer1": p}, {}, 0)


@pytest.mark.parametrize("task, suffix", [("instance", ""), ("panoptic", ""), ("panoptic", "_panoptic")])
def test_golden_costs_and_losses(task, suffix):
    """Suffix _panoptic: with decoupled boxes. Their losses are stored for the assignment without, which is given here."""
    z, targets, output = criterion_case(task)
    is_thing = [label < 80 for label in range(output.sets["layer1"].logits.shape[-1])]
    criterion = Criterion(Config(mask_points=200, task=task, decoupled_boxes=bool(suffix)), is_thing)
    points = torch.stack([tensor(z[f"img{b}_match_points"]) for b in range(2)], 1)
    truth = Truth.of(targets, True, criterion.boxed)
    cost = losses.matching_cost(losses.stack(output.sets), output.pixels, truth, points, criterion.cost_parts)
    official = {"class": "class", "l1": "box", "giou": "giou", "mask": "mask", "dice": "dice"}
    query, found = losses.assign(sum(losses.WEIGHTS[k] * cost[k] for k in official), truth.counts)
    for b, n in enumerate(truth.counts):
        for part, name in official.items():
            torch.testing.assert_close(cost[part][0, b, :, :n], tensor(z[f"img{b}_cost_{name}{suffix}"]), rtol=0, atol=1e-4)
        order = np.argsort(z[f"img{b}_match_tgt{suffix}"])
        assert found[0, b, :n].all() and query[0, b, :n].tolist() == z[f"img{b}_match_src{suffix}"][order].tolist()
        query[0, b, :n] = tensor(z[f"img{b}_match_src"][np.argsort(z[f"img{b}_match_tgt"])])
    start = np.cumsum([0, *truth.counts])
    final = [tensor(z["loss_points"][start[b]:start[b + 1]][np.argsort(z[f"img{b}_match_tgt"])])[None] for b in range(2)]
    draws = [(torch.zeros(1, f.shape[1], 600, 2), f) for f in final]
    ours = criterion.losses_of(losses.stack(output.sets), output.pixels, truth, query, found, 1, float(z["num_masks"]), draws, [None, None])
    for part, name in OFFICIAL_LOSS.items():
        name += suffix if part in ("l1", "giou") else ""
        assert float(ours[part][0]) == pytest.approx(float(z[name]), abs=1e-5), part


def test_golden_cross_entropy():
    """The 8 logits read as 7 classes and no object."""
    z, targets, output = criterion_case()
    query = [tensor(z[f"img{b}_match_src"]) for b in range(2)]
    labels = [targets[b]["labels"][tensor(z[f"img{b}_match_tgt"])] for b in range(2)]
    wanted = torch.zeros(1, 2, 12, 8)
    for b in range(2):
        wanted[0, b, query[b], labels[b]] = 1
    loss = losses.cross_entropy(output.sets["layer1"].logits[None], wanted)
    assert loss.item() == pytest.approx(float(z["loss_ce_softmax"]), abs=1e-5)


def test_golden_importance_sampling():
    z = golden("criterion")
    ours = losses.uncertain_points(tensor(z["points/logits"])[None, :, 0], tensor(z["points/draw1"])[None], tensor(z["points/draw2"])[None])[0]
    theirs = tensor(z["points/selected"])
    for a, b in zip(ours, theirs, strict=True):
        assert {tuple(p) for p in a.tolist()} == {tuple(p) for p in b.tolist()}


@pytest.mark.parametrize("variant", ["mask2box", "bitmask"])
def test_golden_boxes_of_masks(variant):
    z = golden("criterion")
    boxes = maskdino.boxes_of_masks(tensor(z["mask2box/masks"]) > 0, variant)
    torch.testing.assert_close(maskdino.inverse_sigmoid(boxes), tensor(z[f"mask2box/{variant}_ref_unsig"]), rtol=0, atol=1e-5)


def test_golden_giou():
    z = golden("criterion")
    torch.testing.assert_close(losses.giou(tensor(z["giou/a"])[:, None], tensor(z["giou/b"])[None]), tensor(z["giou/giou"]), rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- the rest of the goldens
def test_golden_backbone():
    z = golden("backbone_r50")
    backbone, state = maskdino.ResNet(Config()), recipe_weights(json.loads(str(z["params"])))
    backbone.load_state_dict({name: state.pop(maskdino.official_names(f"backbone.{name}", Config())[0]) for name in backbone.state_dict()})
    assert not state
    model = MaskDINO(Config(enc_layers=1, dec_layers=1), 2)
    with torch.no_grad():
        features = backbone(model.normalise(tensor(z["image"])[None], [z["image"].shape[1:]]))
    for i, f in enumerate(features):
        torch.testing.assert_close(f[:, ::8], tensor(z[f"res{i + 2}_sub"]), rtol=0, atol=1e-4)


def postprocess_case(logits="pred_logits"):
    """Stored mask logits enter as the pixel map, with unit vectors as embeddings."""
    z = golden("postprocess")
    p = Prediction(tensor(z[logits])[0], tensor(z["pred_boxes"])[0], torch.eye(20))
    is_thing = torch.zeros(10, dtype=torch.bool)
    is_thing[z["thing_classes"]] = True
    return z, p, tensor(z["pred_masks"])[0], maskdino.Frame(*(tuple(z[k].tolist()) for k in ("padded_size", "image_size", "output_size"))), is_thing


@pytest.mark.parametrize("variant", ["instance", "instance_in_panoptic"])
def test_golden_instance_postprocessing(variant):
    z, p, pixels, frame, is_thing = postprocess_case()
    found = maskdino.detections_of(p, pixels, frame, int(z["topk"]), is_thing=is_thing if variant == "instance_in_panoptic" else None)
    order = np.lexsort((found["labels"], -found["scores"]))              # the fixture breaks ties by class
    np.testing.assert_allclose(found["scores"][order], z[f"{variant}_scores"], rtol=0, atol=1e-5)
    assert found["labels"][order].tolist() == z[f"{variant}_classes"].tolist()
    kept = is_thing[z["instance_classes"]].numpy() if variant == "instance_in_panoptic" else slice(None)        # its boxes and masks are rows of instance's
    np.testing.assert_allclose(found["boxes"][order], z["instance_boxes"][kept], rtol=0, atol=1e-3)
    wanted = np.unpackbits(z["instance_masks_packed"][kept], axis=1)[:, :240 * 300].reshape(-1, 240, 300).astype(bool)
    assert (found["masks"].numpy()[order] != wanted).mean() < 1e-5


@pytest.mark.parametrize("variant, settings", [
    ("transform", {}), ("plain", {"temperature": 0.0}), ("thr08", {"object_threshold": 0.8}), ("ov03", {"overlap_threshold": 0.3}),
    ("none", {"object_threshold": 0.99})])
def test_golden_panoptic_postprocessing(variant, settings):
    z, p, pixels, frame, is_thing = postprocess_case()
    found = maskdino.panoptic_of(p, pixels, frame, is_thing, **settings)
    assert found["panoptic"].dtype == torch.int32 and np.array_equal(found["panoptic"], z[f"panoptic_{variant}_seg"])
    wanted = json.loads(str(z[f"panoptic_{variant}_info"]))
    assert [(s["id"], s["label"], s["isthing"]) for s in found["segments"]] == [(s["id"], s["category_id"], s["isthing"]) for s in wanted]
    assert all(settings.get("object_threshold", 0.25) < s["score"] <= 1 for s in found["segments"])


@pytest.mark.parametrize("variant, settings", [
    ("transform", {"resize_first": True}), ("plain", {"resize_first": True, "temperature": 0.0}), ("after_transform", {}),
    ("ce_before", {"class_loss": "ce", "resize_first": True}), ("ce_after", {"class_loss": "ce"})])
def test_golden_semantic_postprocessing(variant, settings):
    z, p, pixels, frame, _ = postprocess_case("pred_logits_ce" if "ce" in variant else "pred_logits")
    maps = maskdino.semantic_of(p, pixels, frame, **settings)
    assert (maps.argmax(0).numpy() != z[f"semantic_{variant}_argmax"]).mean() < 1e-4
    np.testing.assert_allclose(maps[:, ::16, ::16], z[f"semantic_{variant}_sub16"], rtol=0, atol=1e-5)


def test_postprocessing_of_one_row_at_a_time(monkeypatch):
    """Chunks are for memory alone."""
    z, p, pixels, frame, is_thing = postprocess_case()

    def everything():
        return [maskdino.semantic_of(p, pixels, frame), maskdino.panoptic_of(p, pixels, frame, is_thing)["panoptic"],
                maskdino.detections_of(p, pixels, frame, 30)["masks"]]
    whole = everything()
    monkeypatch.setattr(maskdino, "MASKS_AT_ONCE", 7)
    torch.testing.assert_close(everything(), whole, rtol=0, atol=1e-5)


def test_stuff_shares_a_segment_and_things_do_not():
    """Two queries of one class, left and right half of the image."""
    left = torch.full((4, 8), -9.0)
    left[:, :4] = 9
    p = Prediction(torch.tensor([[2.0, -5], [3, -5]]), torch.full((2, 4), 0.5), torch.eye(2))
    frame = maskdino.Frame((16, 32), (16, 32), (16, 32))
    shared, apart = (maskdino.panoptic_of(p, torch.stack([left, -left]), frame, torch.tensor([thing, True])) for thing in (False, True))
    assert shared["panoptic"].unique().tolist() == [1] and apart["panoptic"].unique().tolist() == [1, 2]
    assert [s["score"] for s in shared["segments"]] == pytest.approx([torch.tensor(3.0).sigmoid().item()])
    assert [s["id"] for s in apart["segments"]] == [1, 2]


def test_postprocessing_with_nothing_to_find():
    z, p, pixels, frame, _ = postprocess_case()
    found = maskdino.detections_of(p, pixels, frame, 30, is_thing=torch.zeros(10, dtype=torch.bool))
    assert found["masks"].shape == (0, 240, 300) and found["boxes"].shape == (0, 4) and len(found["labels"]) == len(found["scores"]) == 0
    found = maskdino.panoptic_of(p, pixels, frame, torch.ones(10, dtype=torch.bool), object_threshold=1.0)
    assert found["segments"] == [] and found["panoptic"].shape == (240, 300) and not found["panoptic"].any()


def test_boxes_only_of_a_model_without_masks():
    z, p, *_, frame, is_thing = postprocess_case()
    found = maskdino.detections_of(p._replace(embeddings=None), None, frame, 30)
    assert found.keys() == {"scores", "labels", "boxes"} and torch.equal(found["scores"], p.logits.sigmoid().flatten().topk(30).values)
    assert len(maskdino.detections_of(p._replace(embeddings=None), None, frame, 30, is_thing=is_thing)["labels"]) == 18


def official_name(name):
    return maskdino.official_names(f"backbone.{name}", Config())[0]


def golden_swin(window):
    """The fixture, its small model with the recipe's weights, and those under their official names."""
    z = golden(f"backbone_swin_w{window}")
    c = json.loads(str(z["config"]))
    model = maskdino.Swin(c["embed_dim"], c["depths"], c["num_heads"], c["window_size"], stochastic_depth=0.3).eval()
    official = {k: tensor(x) for k, x in recipe.make_weights(json.loads(str(z["params"]))).items()}
    maskdino.fill(model, {name: official[official_name(name)] for name in model.state_dict() if not name.endswith("relative_position_index")}, "fixture")
    return z, model, official


@pytest.mark.parametrize("window", [7, 12])
def test_golden_swin(window):
    z, model, _ = golden_swin(window)
    with torch.no_grad():
        maps = model(maskdino.build(tiny(), CLASSES).normalise(tensor(z["image"])[None], [z["image"].shape[1:]]))
    for i, x in enumerate(maps):
        torch.testing.assert_close(x, tensor(z[f"res{i + 2}"]), rtol=0, atol=1e-5)


def test_names_and_shapes_of_the_released_swin():
    official = {name: shape for name, shape in manifest("swinl_instance_2048")["params"].items() if name.startswith("backbone.")}
    with torch.device("meta"):
        model = maskdino.Swin(**maskdino.SWINS["swin_l"])
    assert sum(p.numel() for p in model.parameters()) == 195_201_204
    assert {official_name(name): list(x.shape) for name, x in model.state_dict().items()} == official           # indices included


@pytest.mark.parametrize("name", ["swin_t", "swin_s", "swin_b"])
def test_torchvision_swin_has_the_same_tensors(name):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
        ours = maskdino.Swin(**maskdino.SWINS[name], stochastic_depth={"swin_t": 0.2, "swin_s": 0.3, "swin_b": 0.5}[name])
        weights = maskdino.swin_weights(theirs.state_dict(), ours.body)
    assert {key: x.shape for key, x in weights.items()} == {key: x.shape for key, x in ours.body.state_dict().items()}
    depth = lambda m: [b.p for b in m.modules() if isinstance(b, torchvision.ops.StochasticDepth)]  # noqa: E731
    assert depth(ours) == depth(theirs)


def test_torchvision_swin_gives_the_same_maps():
    """A picture whose every map is larger than a window, where torchvision shifts as we do; 8 x 9 cells in the last map need padding, too."""
    torch.manual_seed(0)
    theirs, ours = torchvision.models.swin_t().eval(), maskdino.Swin(**maskdino.SWINS["swin_t"]).eval()
    for name, p in theirs.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(p)                                           # fresh ones are too small to matter
    ours.body.load_state_dict(maskdino.swin_weights(theirs.state_dict(), ours.body))
    ours.norms = nn.ModuleList([nn.Identity()] * 4)
    x = images = torch.randn(1, 3, 256, 288)
    with torch.no_grad():
        maps = ours(images)
        for i, layer in enumerate(theirs.features):
            x = layer(x)
            if i % 2:
                torch.testing.assert_close(maps[i // 2], x.permute(0, 3, 1, 2), rtol=0, atol=1e-5)


def test_microsofts_swin_weights():
    _, model, official = golden_swin(7)
    file = {name.removeprefix("backbone."): x for name, x in official.items() if name[:13] != "backbone.norm"}
    file |= {official_name(f"body.{name}").removeprefix("backbone."): x for name, x in model.body.named_buffers()}
    assert "layers.0.blocks.1.attn.relative_position_index" in file
    rest = {"norm.weight": torch.ones(192), "norm.bias": torch.zeros(192), "head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5),
            "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}
    weights, own = maskdino.swin_weights({"model": file | rest}, model.body), model.body.state_dict()
    assert weights.keys() == own.keys() and all(torch.equal(weights[key], own[key]) for key in own)
    assert "absolute_pos_embed" in maskdino.swin_weights({"model": file | {"absolute_pos_embed": torch.zeros(1)}}, model.body)      # not dropped in silence


def test_swin_takes_any_size_and_any_batch():
    _, model, _ = golden_swin(7)
    images = torch.randn(2, 3, 37, 53)
    maps = model(images)
    assert [tuple(x.shape[1:]) for x in maps] == [(24, 10, 14), (48, 5, 7), (96, 3, 4), (192, 2, 2)]
    for together, alone in zip(maps, model(images[1:])):
        torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-5)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        sum(x.float().square().sum() for x in model(images)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name, total, backbone, pixel_decoder", [
    ("coco_instance_r50_50ep", 52_058_004, 23_454_912, 14_055_424), ("coco_instance_r50_50ep_hid1024", 43_816_436, 23_454_912, 6_035_904)])
def test_parameter_counts(name, total, backbone, pixel_decoder):
    with torch.device("meta"):
        model = MaskDINO(preset(name), 80)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert (count(model), count(model.backbone), count(model.pixel_decoder)) == (total, backbone, pixel_decoder)
    with torch.device("meta"):
        assert count(MaskDINO(dataclasses.replace(preset("coco_instance_r50_50ep_hid1024"), levels=(8, 16, 32, 64)), 80)) == 48_906_132


# ---------------------------------------------------------------------------------------------------------------- edge cases
def tiny(**overrides):
    return preset("shapes", **{"backbone": "resnet10", "hidden": 32, "enc_layers": 1, "dec_layers": 2, "enc_ffn": 32, "dec_ffn": 32, "queries": 8,
                               "denoising_queries": 12, "mask_points": 64, "heads": 4} | overrides)


def random_targets(counts, size=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    targets = []
    for i, n in enumerate(counts):
        boxes = torch.rand(n, 4, generator=g) * 0.3 + 0.3
        masks = torch.zeros(n, size, size, dtype=torch.uint8)
        for mask, (cx, cy, w, h) in zip(masks, boxes * size, strict=True):
            mask[int(cy - h / 2):int(cy + h / 2), int(cx - w / 2):int(cx + w / 2)] = 1
        targets.append({"labels": torch.randint(7, (n,), generator=g), "boxes": boxes, "masks": masks, "key": i})
    return targets


def step(config, counts, size=64, seed=0):
    torch.manual_seed(seed)
    model = MaskDINO(config, 7).train()
    targets = random_targets(counts, size)
    images = torch.randint(256, (len(counts), 3, size, size), dtype=torch.uint8)
    output = model(images, [(size, size)] * len(counts), targets)
    total, losses = Criterion(config)(output, targets)
    total.backward()
    return model, output, total, losses


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (3, 0), (13, 2), (20, 1)])
def test_any_number_of_objects(counts):
    """None at all, more than denoising queries, more than queries: finite, and every parameter gets a gradient (DDP needs that)."""
    model, output, total, losses = step(tiny(), counts)
    assert torch.isfinite(total) and total > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert output.groups == (0 if max(counts) in (0, 13, 20) else 4)
    if max(counts) == 0:
        assert all(v.item() == 0 for k, v in losses.items() if not k.endswith("class"))


@pytest.mark.parametrize("change, gone", [
    ({"task": "detection", "box_init": "token", "denoising": "box", "matching": "box"}, "mask"), ({"denoising": "none"}, "denoising"),
    ({"denoising": "box"}, "denoising/layer1/mask"), ({"matching": "box"}, None), ({"matching": "mask"}, None), ({"box_loss": False}, None),
    ({"content_queries": "learned"}, None), ({"two_stage": False, "box_init": "token"}, "selection"), ({"initial_prediction": False}, "initial"),
    ({"box_init": "token"}, None), ({"box_init": "bitmask"}, None), ({"decoder_levels": 1}, None), ({"levels": (4, 8, 16, 32, 64, 128)}, None),
    ({"levels": (8, 16)}, None), ({"levels": (8,)}, None), ({"levels": (4,)}, None)])
def test_every_switch_trains(change, gone):
    model, _, total, losses = step(tiny(**change), (2, 3))
    assert torch.isfinite(total)
    assert all(p.grad is not None for p in model.parameters())
    assert gone is None or not any(gone in name for name in losses)


def test_matching_terms():
    assert Criterion(tiny()).cost_parts == ["class", "l1", "giou", "mask", "dice"]
    assert Criterion(tiny(matching="box")).cost_parts == ["class", "l1", "giou"]
    assert Criterion(tiny(matching="mask")).cost_parts == ["class", "mask", "dice"]
    assert Criterion(tiny(box_loss=False)).cost_parts == ["class", "mask", "dice"]


def test_padding_changes_nothing_but_the_frame():
    """The colour under the padding never enters: it is zeroed after the normalisation."""
    torch.manual_seed(0)
    model = MaskDINO(tiny(), 7).eval()
    image = torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8)
    dirty = image.clone()
    image[:, :, 50:], image[..., 70:] = 0, 0
    dirty[:, :, 50:], dirty[..., 70:] = 200, 100
    with torch.no_grad():
        a, b = (model(x, [(50, 70)]).sets["layer2"].logits for x in (image, dirty))
    assert torch.equal(a, b)


def test_draws_depend_on_the_image_alone():
    """An image's noise and points do not depend on the batch it is in: what makes two processes equal one."""
    one, two = random_targets((3, 3)), random_targets((3, 3))[::-1]
    for key in ("flip", "label", "box"):
        assert torch.equal(maskdino.draw_noise(one[1], 4, 7)[key], maskdino.draw_noise(two[0], 4, 7)[key])
    assert not torch.equal(maskdino.draw_noise(one[0], 4, 7)["flip"], maskdino.draw_noise(one[1], 4, 7)["flip"])


def test_overfits_one_batch():
    torch.manual_seed(0)
    config = tiny(hidden=64, total_batch=2)
    model, criterion, targets = MaskDINO(config, 7).train(), Criterion(config), random_targets((2, 3))
    images = torch.randint(80, (2, 3, 64, 64), dtype=torch.uint8)
    for image, target in zip(images, targets, strict=True):
        for mask, label in zip(target["masks"], target["labels"], strict=True):
            image[:, mask > 0] = torch.tensor([[255], [30 * int(label)], [255 - 30 * int(label)]], dtype=torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for i in range(120):
        total, losses = criterion(model(images, [(64, 64)] * 2, targets), targets)
        if i == 0:
            first = losses
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for part in ("class", "l1", "giou", "dice"):
        assert losses[f"layer2/{part}"].item() < 0.4 * first[f"layer2/{part}"].item(), part


# ---------------------------------------------------------------------------------------------------------------- files, command line, prediction
def test_save_load_predict(tmp_path):
    torch.manual_seed(0)
    model = maskdino.build(tiny(detections=5), CLASSES).eval()
    maskdino.save(tmp_path / "c.pth", {"model": model.state_dict(), "ema": None, "config": dataclasses.asdict(model.config), "classes": CLASSES})
    again, classes = maskdino.load(tmp_path / "c.pth", test_long=96)
    assert classes == CLASSES and again.config == dataclasses.replace(model.config, test_long=96) and not list(tmp_path.glob("*.tmp"))
    picture = np.random.default_rng(0).integers(256, size=(90, 200, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "p.png")
    results = again.predict([picture, Image.fromarray(picture), tmp_path / "p.png"])
    for r in results:
        assert r["masks"].shape == (5, 90, 200) and r["boxes"].shape == (5, 4) and r["masks"].dtype == torch.bool
        assert torch.equal(r["scores"], results[0]["scores"]) and r["scores"].diff().le(0).all()
    assert len(again.predict([picture], threshold=1.0)[0]["scores"]) == 0


@pytest.mark.parametrize("backbone", [{}, {"backbone_norm": "batch"}, {"backbone": "swin_t", "levels": (8, 16, 32)}])
def test_checkpointed_activations_change_nothing(backbone):
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model = MaskDINO(tiny(checkpoint_activations=again, **backbone), 7).train()
        targets = [t | {"key": 1} for t in random_targets([2, 1])]
        torch.manual_seed(1)                                                 # Swin's stochastic depth
        total, _ = Criterion(model.config)(model(torch.full((2, 3, 64, 64), 100, dtype=torch.uint8), [(64, 64)] * 2, targets), targets)
        total.backward()
        found.append([total.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_compiled_regions_change_nothing_and_are_compiled_twice_at_most():
    """On mixed image sizes each region has two graphs, one of them for square images; the backbone, one encoder layer's code and one decoder layer's: six."""
    torch.manual_seed(0)
    model = MaskDINO(tiny(levels=(8, 16, 32), box_init="token"), 7).double().train()
    torch.compiler.reset()
    counters.clear()
    found = []
    for compiled in (False, True):
        if compiled:
            model.compile_regions()
        for h, w in [(64, 64), (96, 96), (64, 96), (96, 64), (128, 64), (128, 128), (96, 128)]:
            targets = [t | {"key": 1, "masks": t["masks"].repeat(1, 2, 2)[:, :h, :w]} for t in random_targets([2, 1])]
            output = model(torch.arange(6 * h * w).view(2, 3, h, w).to(torch.uint8), [(h, w)] * 2, targets)
            parts = [part for p in (*output.sets.values(), *output.denoising.values()) for part in p]
            total = sum(part.square().mean() for part in (*parts, output.pixels))       # smooth, unlike losses that choose points
            model.zero_grad()
            total.backward()
            found.append((total.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    for (plain, gradient), (total, other) in zip(found[:7], found[7:], strict=True):
        assert total == pytest.approx(plain, rel=1e-8)
        assert (gradient - other).norm() < 1e-6 * gradient.norm()
    assert 0 < counters["stats"]["unique_graphs"] <= 6


# ---------------------------------------------------------------------------------------------------------------- released checkpoints
RELEASED = {  # manifest: what has to be found out from names and shapes, and the preset that tells the rest
    "r50_instance_2048": dict(preset="coco_instance_r50_50ep", classes=80, box_init="mask2box", smallest_proposal="coarse", levels=(8, 16, 32, 64)),
    "r50_instance_hid1024_3s": dict(preset="coco_instance_r50_50ep_hid1024", classes=80, box_init="bitmask", smallest_proposal="fine", enc_ffn=1024),
    "r50_instance_hid1024_3sd1_variant": dict(preset="coco_instance_r50_50ep_hid1024", classes=80, smallest_proposal="coarse", levels=(8, 16, 32, 64)),
    "r50_panoptic_2048": dict(preset="coco_panoptic_r50_50ep", classes=133, task="panoptic", box_init="token"),
    "r50_ade20k_semantic": dict(preset="ade20k_semantic_r50", classes=150, two_stage=False, class_loss="ce", queries=100, test_short=512),
    "r50_cityscapes_semantic": dict(preset="cityscapes_semantic_r50", classes=19, backbone_norm="batch", two_stage=False, queries=100, test_short=1024),
    "swinl_instance_2048": dict(preset="coco_instance_swinl_50ep", classes=80, backbone="swin_l", levels=(4, 8, 16, 32, 64), box_init="bitmask"),
    "swinl_panoptic_2048": dict(preset="coco_panoptic_swinl_50ep", classes=133, backbone="swin_l", task="panoptic"),
}


def manifest(name):
    return json.loads(str(golden("manifests")[name]))


def random_checkpoint(name):
    """A released checkpoint of random numbers with the manifest's names and shapes; aliases are the same tensors."""
    state, first = {}, {}
    for key, shape in manifest(name)["params"].items():
        if key.endswith(("relative_position_index", "num_batches_tracked")):
            state[key] = torch.zeros(shape, dtype=torch.int64)
        elif key.endswith("empty_weight"):
            state[key] = torch.tensor([1.0] * (shape[0] - 1) + [0.1])
        else:
            state[key] = first.setdefault(recipe.canonical(key), torch.rand(shape))
    return state


@pytest.mark.parametrize("name", RELEASED)
def test_released_checkpoint_comes_and_goes(name, tmp_path, capsys):
    state, wanted = random_checkpoint(name), dict(RELEASED[name])
    torch.save({"model": state}, tmp_path / "released.pth")
    model, classes = maskdino.load(tmp_path / "released.pth")
    assert f"taken from preset {wanted.pop('preset')}:" in capsys.readouterr().out
    assert len(classes["names"]) == wanted.pop("classes") and "class 0" not in classes["names"]
    assert {key: getattr(model.config, key) for key in wanted} == wanted
    assert sum(p.numel() for p in model.parameters()) == manifest(name)["total"]
    back = maskdino.to_official(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], x) for key, x in state.items() if "relative_position_index" not in key)


def test_the_file_name_tells_what_shapes_do_not(tmp_path):
    state = random_checkpoint("r50_instance_2048")
    assert maskdino.official_config(state, "mask46.3ap_box51.7ap.pth").box_init == "mask2box"
    assert maskdino.official_config(state, "r50.pth", box_init="token", test_short=640).box_init == "token"
    with pytest.raises(ConfigError, match="--levels=.* contradicts"):
        maskdino.official_config(state, "r50.pth", levels=(8, 16, 32))
    swin = random_checkpoint("swinl_instance_2048")
    assert maskdino.official_config(swin, "mask52.1ap_box58.3ap.pth").box_init == "token"
    assert maskdino.official_config(swin, "mask52.3ap_box59.0ap.pth").box_init == "bitmask"


def test_levels_of_models_that_count_from_coarse_to_fine():
    """An extra level comes after the backbone's in the list of projections, yet is the first for the encoder."""
    model = maskdino.build(tiny(backbone="resnet18", backbone_norm="frozen", levels=(8, 16, 32, 64), smallest_proposal="fine"), CLASSES)
    names = [maskdino.official_names(f"pixel_decoder.input_proj.{i}.0.weight", model.config)[0] for i in range(4)]
    assert names == [f"sem_seg_head.pixel_decoder.input_proj.{i}.0.weight" for i in (2, 1, 0, 3)]
    state = maskdino.to_official(model)
    assert torch.equal(state["sem_seg_head.pixel_decoder.transformer.level_embed"].flip(0), model.pixel_decoder.level_embed)
    again = maskdino.build(model.config, CLASSES)
    again.load_state_dict(maskdino.from_official(state, again, "round trip"))
    with pytest.raises(ConfigError, match="no place for this model"):
        maskdino.to_official(maskdino.build(tiny(), CLASSES))
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x), name


def test_released_checkpoints_that_are_not_whole(tmp_path):
    small = tiny(backbone="resnet18", backbone_norm="frozen", heads=8, levels=(8, 16, 32, 64))
    state = maskdino.to_official(maskdino.build(small, CLASSES))
    key, alias = "sem_seg_head.predictor.mask_embed.layers.1.weight", "sem_seg_head.predictor.bbox_embed.1.layers.0.bias"
    for change, message in [({key: None}, f"'{key}' is missing.*download it again"), ({key: torch.zeros(3, 3)}, f"'{key}' has shape \\(3, 3\\)"),
                            ({alias: torch.ones(32)}, "should be the same tensor"), ({"sem_seg_head.more": torch.zeros(1)}, "'sem_seg_head.more'"),
                            ({"backbone.res4.9.conv1.weight": torch.zeros(1)}, "backbone is none of")]:
        wrong = {name: x for name, x in (state | change).items() if x is not None}
        torch.save({"model": wrong}, tmp_path / "wrong.pth")
        with pytest.raises(ConfigError, match=message):
            maskdino.load(tmp_path / "wrong.pth")
    for name in sorted(state):                                               # whichever is missing is named, but for aliases and constants
        if name.endswith("weight") and ("bbox_embed" not in name or "_bbox_embed" in name) and "decoder.norm." not in name and "empty" not in name:
            with pytest.raises(ConfigError, match=re.escape(f"'{name}' is missing")):
                torch.save({k: x for k, x in state.items() if k != name}, tmp_path / "wrong.pth")
                maskdino.load(tmp_path / "wrong.pth")
    for name, kind in [("transformer.enc_out_class_embed.weight", "DINO"), ("transformer.decoder.layers.0.norm1.weight", "DETR")]:
        torch.save({"model": {name: torch.zeros(1)}}, tmp_path / "other.pth")
        with pytest.raises(ConfigError, match=f"checkpoint of {kind}, none of Mask DINO, "):
            maskdino.load(tmp_path / "other.pth")


def test_fine_tuning_with_other_classes(tmp_path):
    """Rows of classes of the same name come along, in whatever order; everything else as it was; the loss is finite."""
    old = maskdino.build(tiny(), CLASSES)
    torch.save({"model": old.state_dict(), "ema": None, "config": dataclasses.asdict(old.config), "classes": CLASSES}, tmp_path / "old.pth")
    classes = {"names": ["new", "class 5", "class 2"], "category_ids": [7, 8, 9], "is_thing": [True] * 3}
    model = maskdino.build(tiny(), classes)
    said = maskdino.start_from(model, maskdino.read_start(tmp_path / "old.pth"))
    assert "2 of 3 classes matched by name (class 5, class 2)" in said
    assert torch.equal(model.heads.class_head.weight[[1, 2]], old.heads.class_head.weight[[5, 2]])
    assert torch.equal(model.label_embed.weight[[1, 2]], old.label_embed.weight[[5, 2]])
    assert torch.equal(model.decoder.layers[0].ffn[0].weight, old.decoder.layers[0].ffn[0].weight)
    none = [maskdino.build(tiny(class_loss="ce"), c) for c in (CLASSES, classes)]                  # with a row for no object
    maskdino.start_from(none[1], maskdino.Start(none[0].state_dict(), none[0].config, CLASSES, "ce"))
    assert torch.equal(none[1].heads.class_head.weight[[1, 2, 3]], none[0].heads.class_head.weight[[5, 2, 7]])
    strangers = maskdino.build(tiny(), {"names": ["x"], "category_ids": [1], "is_thing": [True]})
    assert "0 of 1 classes" in maskdino.start_from(strangers, maskdino.read_start(tmp_path / "old.pth"))
    with pytest.raises(ConfigError, match="needs .*: choose the preset"):
        maskdino.start_from(maskdino.build(tiny(dec_ffn=64), classes), maskdino.read_start(tmp_path / "old.pth"))


def test_dino_as_a_start(tmp_path):
    """DINO's 6 decoder layers become 9, its 91 rows by COCO id the rows of our classes; what is not there stays fresh."""
    made = manifest("dino_r50_4scale")
    state = {key: torch.rand(shape) for key, shape in made["params"].items()}
    for key, others in made["aliases"].items():
        state |= dict.fromkeys(others, state[key])
    torch.save({"model": state}, tmp_path / "dino.pth")
    classes = {"names": ["zebra", "unicorn"], "category_ids": [1, 2], "is_thing": [True] * 2}
    model = maskdino.build(preset("coco_instance_r50_12ep"), classes)
    said = maskdino.start_from(model, maskdino.read_start(tmp_path / "dino.pth"))
    fresh = said.split("fresh: ")[1].split("\n")[0]
    assert fresh == "heads.mask_head, pixel_decoder.lateral, pixel_decoder.pixel_embed, pixel_decoder.smooth"
    assert torch.equal(model.heads.class_head.weight[0], state["transformer.decoder.class_embed.5.weight"][24])                     # zebra's COCO id
    assert torch.equal(model.label_embed.weight[0], state["label_enc.weight"][24])
    for ours, theirs in ((0, 0), (5, 5), (8, 5)):
        layer = model.decoder.layers[ours]
        assert torch.equal(layer.cross_attn.sampling_offsets.weight, state[f"transformer.decoder.layers.{theirs}.cross_attn.sampling_offsets.weight"])
        assert torch.equal(layer.norm1.weight, state[f"transformer.decoder.layers.{theirs}.norm2.weight"])
    assert torch.equal(model.backbone.body.layer4[2].conv3.weight, state["backbone.0.body.layer4.2.conv3.weight"])
    with pytest.raises(ConfigError, match="checkpoint of DINO.*--finetune"):
        maskdino.load(tmp_path / "dino.pth")


def test_files_that_are_no_checkpoints(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        maskdino.load(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ConfigError, match="not a file of PyTorch weights"):
        maskdino.load(tmp_path / "text.pth")
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "other.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:20_000])
    with pytest.raises(ConfigError, match="damaged"):
        maskdino.load(tmp_path / "half.pth")
    with pytest.raises(ConfigError, match="no checkpoint of Mask DINO, Mask2Former, DFormer: its tensors have names like 'a'"):
        maskdino.load(tmp_path / "other.pth")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    with pytest.raises(ConfigError, match="should hold weights by name.* but has epoch"):
        maskdino.load(tmp_path / "numbers.pth")
    model = maskdino.build(tiny(), CLASSES)
    maskdino.save(tmp_path / "c.pth", {"model": model.state_dict(), "ema": None, "config": dataclasses.asdict(model.config), "classes": CLASSES})
    with pytest.raises(ConfigError, match="--dec_layers=4 contradicts"):
        maskdino.load(tmp_path / "c.pth", dec_layers=4)
    content = {"model": model.state_dict(), "ema": None, "config": dataclasses.asdict(model.config), "classes": CLASSES}
    one, config = {"names": ["one"], "category_ids": [1], "is_thing": [True]}, content["config"]
    for change, message in [({"classes": one}, "'heads.class_head.*' has shape|'label_embed.weight' has shape"),
                            ({"classes": CLASSES | {"names": ["one"]}}, "a name, an id and is_thing for each"), ({"classes": ["one"]}, "dictionaries"),
                            ({"classes": one | {"category_ids": ["../x"]}}, "a name, an id"), ({"model": {"a": 1}}, "tensors by name"),
                            ({"config": config | {"hidden": "64"}}, "hidden='64'"), ({"config": config | {"levels": ["a"]}}, "levels=.'a'"),
                            ({"config": config | {"model": "os"}}, "choose one of maskdino"), ({"config": config | {"lr": True}}, "lr=True"),
                            ({"model": dict(list(content["model"].items())[:-1])}, "1 tensors are missing"),
                            ({"model": content["model"] | {"more": torch.zeros(1)}}, "'more'"), ({"config": content["config"] | {"magic": 1}}, "has magic")]:
        torch.save(content | change, tmp_path / "d.pth")
        with pytest.raises(ConfigError, match=message):
            maskdino.load(tmp_path / "d.pth")


def test_command_line():
    words, actions, overrides = maskdino.parse_overrides(["shapes", "--dec_layers=6", "--keep_empty=false", "--levels=8,16", "--resume", "--lr=2e-4"],
                                                         {"resume": bool})
    assert words == ["shapes"] and actions == {"resume": True}
    assert overrides == {"dec_layers": 6, "keep_empty": False, "levels": (8, 16), "lr": 2e-4}
    for argument, message in [("--dec_layer=6", "did you mean 'dec_layers'"), ("--dec_layers=six", "expected int"), ("--keep_empty=maybe", "expected bool"),
                              ("--dec_layers", "needs a value")]:
        with pytest.raises(ConfigError, match=message):
            maskdino.parse_overrides([argument], {})
    with pytest.raises(ConfigError, match="did you mean 'shapes'"):
        preset("shape")
    for change, message in [({"matching": "both"}, "choose one of"), ({"levels": (8, 32)}, "each twice"), ({"task": "detection"}, "has no masks"),
                            ({"decoder_levels": 5}, "levels"), ({"hidden": 100}, "multiple of 32")]:
        with pytest.raises(ConfigError, match=message):
            Config(**change)


def test_backbone_weights(tmp_path, monkeypatch):
    backbone = maskdino.ResNet(tiny())
    torch.save(backbone.body.state_dict() | {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}, tmp_path / "w.pth")
    fresh = maskdino.ResNet(tiny())
    maskdino.load_backbone_weights(fresh, tiny(backbone_weights=str(tmp_path / "w.pth")))
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), backbone.state_dict().values(), strict=True))
    with pytest.raises(ConfigError, match="tensors are missing, for example 'layer1.1.bn1"):
        maskdino.load_backbone_weights(maskdino.ResNet(tiny(backbone="resnet18")), tiny(backbone="resnet18", backbone_weights=str(tmp_path / "w.pth")))
    with pytest.raises(ConfigError, match="no ImageNet weights for resnet10"):
        maskdino.load_backbone_weights(backbone, tiny(backbone_weights="imagenet"))

    def offline(*_args, **_kwargs):
        raise maskdino.URLError("no route to host")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(maskdino.torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(ConfigError, match="--backbone_weights=none"):
        maskdino.load_backbone_weights(maskdino.ResNet(Config(backbone="resnet50")), Config())


def test_recording_keeps_every_call_and_changes_no_bit():
    """Outputs and gradients, in training with its denoising; and nothing of it stays behind, not even after an error."""
    def outcome(look):
        torch.manual_seed(0)
        model = MaskDINO(tiny(), 7)
        with maskdino.recording(model) if look else nullcontext() as record:
            output = model(torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8), [(64, 64), (64, 40)], random_targets([3, 1]))
        (output.pixels.sum() + sum(part.sum() for said in (*output.sets.values(), *output.denoising.values()) for part in said)).backward()
        return model, record, output, [p.grad for p in model.parameters()]
    (_, _, plain, gradients), (model, record, looked, again) = outcome(False), outcome(True)
    for a, b in ((plain.sets, looked.sets), (plain.denoising, looked.denoising)):
        assert a.keys() == b.keys() and all(torch.equal(*pair) for name in a for pair in zip(a[name], b[name], strict=True))
    assert torch.equal(plain.pixels, looked.pixels) and all(torch.equal(*pair) for pair in zip(gradients, again, strict=True))
    assert record[""][0].gave is looked and len(record["heads"]) == 4 and record["decoder.layers.1"][0].given[0] is record["decoder.layers.0"][0].gave
    with pytest.raises(ZeroDivisionError), maskdino.recording(model, "heads"):
        assert [name for name, module in model.named_modules() if module._forward_hooks] == ["heads"]
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("overrides", [{}, dict(box_init="token"), dict(levels=(8, 16, 32), smallest_proposal="fine", box_init="bitmask"),
                                       dict(two_stage=False, box_init="token"), dict(levels=(4, 8, 16, 32, 64), decoder_levels=3)])
@torch.no_grad()
def test_recorded_anchors_are_those_that_the_decoder_moved(overrides):
    torch.manual_seed(0)
    model = MaskDINO(tiny(**overrides), 7).eval()
    nn.init.normal_(model.heads.box_head[-1].weight)
    with maskdino.recording(model, r"query_selection|decoder\.layers\.\d+") as record:
        sets = model(torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8), [(64, 90)]).sets
    anchors = before = record["query_selection"][0].gave[1]
    assert torch.equal(sets["initial"].boxes, anchors)
    for i in (0, 1):
        given, x = record[f"decoder.layers.{i}"][0]
        assert torch.equal(given[2], anchors)
        assert torch.equal(sets[f"layer{i + 1}"].boxes, maskdino.refine(before, model.heads.box_head(model.heads.norm(x))))
        anchors = before = maskdino.refine(anchors, model.heads.box_head(x))
        assert not torch.equal(given[2], anchors)


# ---------------------------------------------------------------------------------------------------------------- the tour
def read_tour(text):
    """{"room" or "room/row": {column: text}}"""
    head, rows, room = text.splitlines()[1], {}, ""
    ends = {head.index(name) + len(name): name for name in ("parameters", "GFLOPs")}
    for line in text.splitlines()[2:]:
        room = room if line.startswith(" ") else line.split()[0]
        row = rows[f"{room}/{re.split('  +', line.strip())[0]}" if line.startswith(" ") else room] = {}
        for cell in re.finditer(r"\S+( x \S+)*", line[:max(ends)]):
            row |= {ends.get(cell.end(), "shape"): cell[0]} if cell.start() >= head.index("shape") else {}
    return rows


def column(rows, name, room=""):
    """The numbers of the rooms, or of the rows in a room; without the total."""
    chosen = [row for key, row in rows.items() if (key.startswith(room + "/") if room else "/" not in key) and key != "total"]
    return sum(float(row.get(name, "0").replace(",", "")) for row in chosen)


def test_tour():
    """Parts, shapes and FLOPs of the released R50 model; the model itself stays as it was."""
    with torch.device("meta"):
        model = MaskDINO(preset("coco_instance_r50_50ep"), 80).train()
    before = torch.get_rng_state()
    text = maskdino.tour(model)
    assert torch.equal(torch.get_rng_state(), before) and model.training and not any(m._forward_hooks for m in model.modules())
    rows = read_tour(text)
    assert text.splitlines()[-1].split()[1] == "52,058,004" and "14,547,668 for the rest" in text.splitlines()[-1]
    assert (rows["backbone"]["parameters"], rows["pixel_decoder"]["parameters"]) == ("23,454,912", "14,055,424")
    for room in ("pixel_decoder", "decoder"):
        assert column(rows, "parameters", room) == float(rows[room]["parameters"].replace(",", ""))
    shapes = {"images": "1 x 3 x 800 x 1344", "backbone/features[3]": "1 x 2048 x 25 x 42", "pixel_decoder/memory": "1 x 22323 x 256",
              "pixel_decoder/pixels": "1 x 256 x 200 x 336", "query_selection/logits of tokens": "1 x 22323 x 80", "query_selection/anchors": "1 x 300 x 4",
              "label_embed/blocked": "400 x 400", "decoder/state": "1 x 300 x 256", "heads/embeddings": "1 x 300 x 256", "masks": "1 x 300 x 200 x 336"}
    assert {name: rows[name]["shape"] for name in shapes} == shapes
    assert float(rows["masks"]["GFLOPs"]) == round(2 * 300 * 256 * 200 * 336 / 1e9, 2)
    attention = 6 * 22323 * (2 * 256 * (256 + 256 + 128 + 256) + 8 * 256 * 16)             # offsets, values, weights, output; 16 points of 4 corners
    assert float(rows["pixel_decoder/layers: self_attn"]["GFLOPs"]) == round(attention / 1e9, 2)


@pytest.mark.parametrize("change", [
    {}, {"task": "detection", "box_init": "token", "denoising": "box", "matching": "box"}, {"two_stage": False, "box_init": "token"},
    {"content_queries": "learned"}, {"denoising": "none"}, {"denoising_queries": 5}, {"initial_prediction": False}, {"decoder_levels": 1}, {"levels": (4,)}])
def test_tour_counts_what_runs(change):
    """Every configuration has a tour; its rooms add up, and its FLOPs are those of the model on a CPU."""
    model = MaskDINO(tiny(**change), 7).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        output = model(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), [(50, 70)])
        if output.pixels is not None:
            maskdino.mask_logits(output.sets["layer2"].embeddings, output.pixels)
    rows = read_tour(maskdino.tour(model, 50, 70))
    _, flops = maskdino.walk(model.to("meta"), torch.zeros(1, 3, 64, 96, dtype=torch.uint8, device="meta"), (50, 70))
    assert flops.total() == pytest.approx(counter.get_total_flops(), rel=1e-3)                      # torch 2.11 does not count self-attention on a CPU
    assert rows["images"]["shape"] == "1 x 3 x 64 x 96"
    assert column(rows, "parameters") == sum(p.numel() for p in model.parameters())
    assert column(rows, "GFLOPs") == pytest.approx(counter.get_total_flops() / 1e9, abs=0.05)
    assert ("masks" in rows) == (output.pixels is not None) and ("label_embed" in rows) == (model.label_embed is not None)


def test_tour_command(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["maskdino.py", *arguments])
        maskdino.main()
        return capsys.readouterr().out

    model = maskdino.build(tiny(), CLASSES)
    torch.save({"model": model.state_dict(), "ema": None, "config": dataclasses.asdict(tiny()), "classes": CLASSES}, tmp_path / "c.pth")
    assert "instance, resnet10, 7 classes" in run(str(tmp_path / "c.pth")) and "1 x 3 x 128 x 128" in run(str(tmp_path / "c.pth"))
    assert "52,085,193" in run("coco_panoptic_r50_50ep") and "43,798,216" in run("cityscapes_semantic_r50") and "222,826,333" in run("coco_panoptic_swinl_50ep")
    assert "52,058,004" in run() and "x 3: 8 heads" in run("coco_instance_r50_50ep", "--enc_layers=3", "--classes=7")
    for arguments, message in [(["coco_instance_r50"], "did you mean"), (["no/such.pth"], "no such file"), (["--enc_layer=3"], "did you mean 'enc_layers'"),
                               (["shapes", "overfit"], "one model at a time"), ([str(tmp_path / "c.pth"), "--classes=3"], "knows its own")]:
        with pytest.raises(SystemExit, match=message):
            run(*arguments)
