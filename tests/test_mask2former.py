"""Mask2Former against the released implementation: golden numbers (tests/golden), parameter counts, checkpoints; its switches and edge cases.

Every golden file holds weights by a recipe from the parameters' official names (recipe_siblings.py), and what the released code gave.
Maps are kept at every fourth row and column, tokens at every eighth channel.
"""
import dataclasses
import json
import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from test_maskdino import CLASSES, golden, random_targets, recipe_weights, tensor
from torch import nn

import losses
import mask2former
import maskdino
import train
from losses import Criterion, Output, Prediction, Truth
from mask2former import Mask2Former
from maskdino import Config, ConfigError, preset

import recipe_siblings  # isort: skip

OFFICIAL_LOSS = {"class": "loss_ce", "mask": "loss_mask", "dice": "loss_dice"}
FEATURES, MASKS = 2e-4, 1e-3                                            # suggested: logits and features; mask logits, sums of 64 products


def close(ours, theirs, atol, name):
    torch.testing.assert_close(ours.detach(), tensor(theirs), rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


# ---------------------------------------------------------------------------------------------------------------- golden head
class Features(nn.Module):
    """Stands for the backbone: the fixtures start from feature maps."""
    channels = [8, 16, 24, 32]

    def __init__(self, maps):
        super().__init__()
        self.maps = [tensor(x) for x in maps]

    def forward(self, _images):
        return self.maps


def head_model(z, name):
    """A fixture's model with the recipe's weights, its features in place of a backbone."""
    hidden, queries, enc_layers, dec_layers, ffn, K, B, H, W, _ = z["cfg"].tolist()
    config = preset(name, hidden=hidden, enc_layers=enc_layers, enc_ffn=ffn, dec_layers=dec_layers, dec_ffn=ffn, queries=queries, mask_points=256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maskdino, "make_backbone", lambda _config: Features(recipe_siblings.features(int(z["feature_seed"]), B, H, W)))
        model = maskdino.file_of(config.model).MODEL(config, K)
    state = {f"sem_seg_head.{name}": tensor(recipe_siblings.fill(name, shape)) for name, shape in json.loads(str(z["params"])).items()}
    model.load_state_dict(maskdino.from_official(state, model, "fixture"))
    return model


@pytest.fixture(scope="module")
def head():
    z = golden("head_mask2former")
    return z, head_model(z, "mask2former_coco_instance_r50_50ep")


def forward(model):
    return model(torch.zeros(2, 3, 128, 160, dtype=torch.uint8), [(128, 160)] * 2)


def coarse_first(tokens):
    """Tokens of our levels, fine to coarse, in the released order."""
    return torch.cat(tokens.split([320, 80, 20], 1)[::-1], 1)


def test_golden_head(head):
    """Pixel decoder, what every part of every decoder layer gives, its attention mask, and every prediction."""
    z, model = head
    seen, hooks = {}, []
    parts = {f"enc_layer{i}": layer for i, layer in enumerate(model.pixel_decoder.layers)}
    for i, layer in enumerate(model.decoder.layers):
        parts |= {f"dec_layer{i}_cross": layer.norm2, f"dec_layer{i}_self": layer.norm1, f"dec_layer{i}_ffn": layer.norm3, f"attn_mask_used{i}": layer}
    for name, part in parts.items():
        hooks.append(part.register_forward_hook(lambda _m, args, out, name=name: seen.update({name: args[4] if name.startswith("attn") else out})))
    with torch.no_grad():
        output = forward(model)
    for hook in hooks:
        hook.remove()
    close(output.pixels[..., ::4, ::4], z["mask_features"], FEATURES, "mask_features")
    for name, x in seen.items():
        if name.startswith("attn"):
            shape = z[f"{name}_shape"]
            assert np.array_equal(x.numpy(), np.unpackbits(z[name])[:np.prod(shape)].reshape(shape)), name
        else:
            close(coarse_first(x)[..., ::8] if name.startswith("enc") else x, z[name], FEATURES, name)
    assert list(output.sets) == ["initial", "layer1", "layer2", "layer3"]
    for i, p in enumerate(output.sets.values()):
        assert p.boxes is None
        close(p.logits, z[f"pred_logits_{i}"], FEATURES, i)
        close(maskdino.mask_logits(p.embeddings, output.pixels)[..., ::4, ::4], z[f"pred_masks_{i}"], MASKS, i)


def test_golden_tokens_and_positions(head):
    z, model = head
    decoder, (_, *maps) = model.pixel_decoder, model.backbone.maps
    with torch.no_grad():
        tokens = torch.cat([proj(x).flatten(2).mT for proj, x in zip(decoder.input_proj, maps)], 1)
        pos = torch.cat([maskdino.position_encoding(*x.shape[-2:], 64, x) + embed for x, embed in zip(maps, decoder.level_embed)])
    close(coarse_first(tokens)[..., ::8], z["enc_input"], FEATURES, "enc_input")
    close(coarse_first(pos.expand(2, -1, -1))[..., ::8], z["enc_pos"], FEATURES, "enc_pos")


# ---------------------------------------------------------------------------------------------------------------- golden training
def golden_targets(z):
    targets = [{"labels": tensor(z[f"gt_labels_{b}"]).long(), "masks": tensor(np.unpackbits(z[f"gt_masks_{b}"], -1)), "key": b} for b in range(2)]
    return [t | {"boxes": torch.zeros(len(t["labels"]), 4)} for t in targets]


def golden_matching(z, criterion, output, targets):
    """At the recorded points: cost terms, each (R, B, Q, N), their weighted sum, each object's query (R, B, N), and the points as Criterion takes them.

    Where only the final points of the losses are stored, they are given as the random extra ones, which are taken as they are.
    """
    sets, counts = losses.stack(output.sets), [len(t["labels"]) for t in targets]
    R = len(output.sets)
    match = tensor(np.stack([[z[f"match_points_{r}_{b}"] for b in range(2)] for r in range(R)]))
    cost = losses.matching_cost(sets, output.pixels, Truth.of(targets, True), match, criterion.cost_parts, "probability")
    total = sum(criterion.weights[k] * x for k, x in cost.items())
    query, found = losses.assign(total, counts)
    assert all(found[:, b, :n].all() for b, n in enumerate(counts))

    def images(name):
        return [tensor(np.stack(parts)) for parts in zip(*(by_object(z[f"{name}_{r}"], query[r], counts) for r in range(R)), strict=True)]
    if f"loss_points_{R - 1}" in z.files:
        draws = [(torch.zeros(R, n, 768, 2), final) for n, final in zip(counts, images("loss_points"), strict=True)]
    else:
        draws = list(zip(images("oversampled_points"), images("random_points"), strict=True))
    return cost, total, query, {"match": match, "sets": draws}


def by_object(rows, query, counts):
    """Rows that go by matched query, image after image -> for each image, by object. query (B, N): each object's."""
    return [x[query[b, :counts[b]].argsort().argsort()] for b, x in enumerate(np.split(rows, np.cumsum(counts)[:-1]))]


def test_golden_training(head):
    """Costs, assignments, every loss, the total and every gradient, given the recorded points."""
    z = golden("criterion_mask2former")
    model, targets = head[1].train(), golden_targets(z)
    model.zero_grad()
    for x in model.backbone.maps:
        x.requires_grad_().grad = None
    output, criterion = forward(model), Criterion(model.config)
    cost, total, query, points = golden_matching(z, criterion, output, targets)
    for r in range(4):
        for b, n in enumerate([len(t["labels"]) for t in targets]):
            for ours, name in ((cost["mask"], "cost_mask"), (cost["dice"], "cost_dice"), (total, "cost")):
                close(ours[r, b, :, :n], z[f"{name}_{r}_{b}"], 1e-4, f"{name}_{r}_{b}")
            assert query[r, b, :n].tolist() == z[f"assign_query_{r}_{b}"][np.argsort(z[f"assign_gt_{r}_{b}"])].tolist()
    total, ours = criterion(output, targets, points=points)
    assert len(ours) == 12 and z["num_masks"] == 8
    for r, name in enumerate(output.sets):
        for part, official in OFFICIAL_LOSS.items():
            assert ours[f"{name}/{part}"].item() == pytest.approx(float(z[f"{official}_{r}"]), abs=1e-5), (name, part)
    assert total.item() == pytest.approx(float(z["total_weighted"]), rel=1e-6)
    total.backward()
    check_gradients(model, z)
    for i, x in enumerate(model.backbone.maps):
        close(x.grad[:, :, ::4, ::4], z[f"grad_res{i + 2}"], 1e-5, f"res{i + 2}")


def check_gradients(model, z):
    norms = dict(zip(json.loads(str(z["grad_names"])), z["grad_norms"], strict=True))
    for name, p in model.named_parameters():
        official = maskdino.official_names(name, model.config)[0].removeprefix("sem_seg_head.")
        assert float(p.grad.double().norm()) == pytest.approx(norms.pop(official), rel=1e-4, abs=1e-6), name
        if f"gradof:{official}" in z.files:
            close(maskdino.turn_levels(name, p.grad, model.config), z[f"gradof:{official}"], 1e-5, name)
    assert not norms


def test_golden_importance_sampling(head):
    z = golden("criterion_mask2former")
    targets = golden_targets(z)
    with torch.no_grad():
        output = forward(head[1])
        query = golden_matching(z, Criterion(head[1].config), output, targets)[2][3]
    draws = [by_object(z[f"{name}_3"], query, [3, 5]) for name in ("oversampled_points", "random_points", "loss_points")]
    for b, (candidates, extra, theirs) in enumerate(zip(*(map(tensor, d) for d in draws), strict=True)):
        maps = maskdino.mask_logits(output.sets["layer3"].embeddings[b:b + 1, query[b, :len(theirs)]], output.pixels[b:b + 1])
        for ours, wanted in zip(losses.uncertain_points(maps, candidates[None], extra[None])[0], theirs, strict=True):
            assert {tuple(p) for p in ours.tolist()} == {tuple(p) for p in wanted.tolist()}


# ---------------------------------------------------------------------------------------------------------------- golden post-processing
def postprocess_case(task):
    """Stored mask logits enter as the pixel map, with unit vectors as embeddings. -> fixture, a model's own post-processing of them."""
    z = golden("postprocess_mask2former")
    with torch.device("meta"):
        model = Mask2Former(preset(f"mask2former_coco_{'panoptic' if task == 'panoptic' else 'instance'}_r50_50ep", task=task, detections=30), 9)
    model.classes = {"is_thing": [k in z["thing_classes"] for k in range(9)]}
    p = Prediction(tensor(z["pred_logits"])[None], None, torch.eye(20)[None])
    sizes = [tuple(z[k].tolist()) for k in ("padded_size", "image_size", "output_size")]
    return z, model.postprocess(Output(sizes[0], tensor(z["pred_masks"])[None], {"layer9": p}, {}, 0), sizes[1:2], sizes[2:], semantic=True)[0]


@pytest.mark.parametrize("task, suffix", [("instance", ""), ("panoptic", "_thingsonly")])
def test_golden_instance_postprocessing(task, suffix):
    z, found = postprocess_case(task)
    close(found["scores"], z[f"instance_scores{suffix}"], 1e-5, "scores")
    assert found["labels"].tolist() == z[f"instance_classes{suffix}"].tolist()
    assert (found["masks"].flatten(1).sum(1) - tensor(z[f"instance_areas{suffix}"])).abs().max() <= 2
    for mask, (x0, y0, x1, y1) in zip(found["masks"], found["boxes"].round().int().tolist()):                   # each box is that of its mask
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert (x0, y0, x1, y1) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_golden_panoptic_postprocessing():
    z, found = postprocess_case("panoptic")
    assert [[s["id"], s["label"], s["isthing"]] for s in found["segments"]] == z["panoptic_segments"].tolist()
    assert (found["panoptic"].numpy() != z["panoptic_map"]).mean() < 1e-5
    assert (found["semantic"].numpy() != z["semantic_argmax"]).mean() < 1e-4


def test_golden_semantic_postprocessing():
    z, found = postprocess_case("semantic")
    assert found.keys() == {"semantic"} and (found["semantic"].numpy() != z["semantic_after_argmax"]).mean() < 1e-4


def test_queries_that_say_no_object_are_never_drawn():
    """At a low threshold the best class may be above it, and no object yet more probable."""
    p = Prediction(torch.tensor([[0.4, 0, 0.6], [0.6, 0, 0.4]]).log().clamp(min=-9), None, torch.eye(2))
    frame, pixels = maskdino.Frame((16, 16), (16, 16), (16, 16)), torch.full((2, 4, 4), 9.0)
    found = maskdino.panoptic_of(p, pixels, frame, torch.ones(2, dtype=torch.bool), 0.3, temperature=0, class_loss="ce")
    assert [s["score"] for s in found["segments"]] == pytest.approx([0.6], abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------- released checkpoints
RELEASED = {"coco_instance_r50": "coco_instance_r50_50ep", "coco_instance_swint": "coco_instance_swint_50ep",
            "coco_instance_swinl": "coco_instance_swinl_100ep", "coco_panoptic_r50": "coco_panoptic_r50_50ep", "ade20k_semantic_r50": "ade20k_semantic_r50"}


def manifest(name):
    return json.loads(str(golden("manifests_mask2former")[name]))


@pytest.mark.parametrize("name", RELEASED)
def test_parameter_counts(name):
    made, name = manifest(name), f"mask2former_{RELEASED[name]}"
    with torch.device("meta"):
        model = Mask2Former(preset(name), maskdino.classes_of(name))
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    parts = [count(model.backbone), count(model.pixel_decoder), count(model) - count(model.backbone) - count(model.pixel_decoder)]
    assert parts == list(made["parts"].values()) and sum(parts) == made["total"]


@pytest.mark.parametrize("name, groups", [
    ("coco_instance_r50_50ep", {(1e-5, 0.05): 53, (1e-4, 0.05): 199, (1e-4, 0): 93}),
    ("coco_instance_swint_50ep", {(1e-5, 0.05): 101, (1e-5, 0): 76, (1e-4, 0.05): 199, (1e-4, 0): 93})])
def test_optimizer_groups(name, groups):
    config = preset(f"mask2former_{name}")
    with torch.device("meta"):
        found = train.parameter_groups(Mask2Former(config, 80), config)
    assert {(round(g["lr"], 9), g["weight_decay"]): len(g["params"]) for g in found} == groups


def random_checkpoint(name):
    """A released checkpoint of random numbers with the manifest's names and shapes."""
    state = recipe_weights({key: shape for key, shape in manifest(name)["params"].items() if key.endswith((*recipe_siblings.SKIP, "index"))})
    return {key: state[key] if key in state else torch.rand(shape) for key, shape in manifest(name)["params"].items()}


@pytest.mark.parametrize("name", [name for name in RELEASED if name != "coco_instance_swinl"])
def test_released_checkpoint_comes_and_goes(name, capsys):
    state = random_checkpoint(name)
    weights, config, classes = maskdino.read_weights({"model": state}, "model_final_abcdef.pkl", test_short=640)
    assert f"taken from preset mask2former_{RELEASED[name]}:" in capsys.readouterr().out
    assert config == preset(f"mask2former_{RELEASED[name]}", test_short=640) and "class 0" not in classes["names"]
    with torch.device("meta"):
        model = maskdino.build(config, classes)
    assert isinstance(model, Mask2Former) and sum(p.numel() for p in model.parameters()) == manifest(name)["total"]
    model.load_state_dict(weights, strict=False, assign=True)
    back = maskdino.to_official(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], x) for key, x in state.items() if not key.endswith("relative_position_index"))


def test_names_and_shapes_of_the_largest():
    """Without 862 MB of numbers."""
    with torch.device("meta"):
        model = Mask2Former(preset("mask2former_coco_instance_swinl_100ep"), 80)
    ours = {name: list(x.shape) for name, x in maskdino.to_official(model).items()}
    assert ours == manifest("coco_instance_swinl")["params"]


def check_whole_model(made, path):
    """A released checkpoint of the recipe's weights, from file to detections: it says what the recipe's author measured of its activations."""
    state = {key: torch.zeros(shape) if any(part in key for part in recipe_siblings.SKIP) else
             tensor(recipe_siblings.fill(key.removeprefix("sem_seg_head."), shape)) for key, shape in made["params"].items()}
    torch.save({"model": state}, path)
    model, _ = maskdino.load(path, test_short=64, test_long=96)
    assert sum(p.numel() for p in model.parameters()) == sum(made["parts"].values())
    picture = np.random.default_rng(0).integers(256, size=(128, 192, 3), dtype=np.uint8)
    with torch.no_grad():
        output = model(torch.from_numpy(picture[:64, :96]).permute(2, 0, 1)[None].contiguous(), [(64, 96)])
    last = list(output.sets.values())[-1]
    assert len(output.sets) == 9 + model.config.initial_prediction
    for x, std in ((last.logits, 1.0), (output.pixels, 0.7), (maskdino.mask_logits(last.embeddings, output.pixels), 2.0)):
        assert std / 2 < x.std() < 2 * std
    found = model.predict([picture])[0]
    for key, task in (("masks", "instance"), ("panoptic", "panoptic"), ("semantic", "semantic")):
        assert model.config.task != task or found[key].shape[-2:] == (128, 192)


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_whole_models_run(name, tmp_path):
    check_whole_model(manifest(name), tmp_path / "model_final.pth")


def small_official():
    """A small model in the released format, and its weights."""
    config = tiny(backbone="resnet18", backbone_norm="frozen", levels=(8, 16, 32), heads=8)
    model = maskdino.build(config, CLASSES)
    return model, maskdino.to_official(model)


def test_pickles_of_detectron2(tmp_path):
    """Numpy arrays by name, from whatever version of numpy and pickle; an older name of the learned queries is known."""
    model, state = small_official()
    arrays = {key.replace("query_feat", "static_query"): x.numpy() for key, x in state.items()}
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "third party", "matching_heuristics": True}))
    again, _ = maskdino.load(tmp_path / "m.pkl")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    few = {"a": np.arange(6.0).reshape(2, 3), "b": np.float32(2), "c": np.array(3)}
    for protocol in range(6):
        for content in (few, {"model": few}, {"model": OrderedDict(few)}):
            for module in (b"numpy._core", b"numpy.core"):              # of numpy 2 and 1
                (tmp_path / "few.pkl").write_bytes(pickle.dumps(content, protocol).replace(b"numpy._core", module) if protocol < 4
                                                   else pickle.dumps(content, protocol))
                found = maskdino.read_torch_file(tmp_path / "few.pkl")["model"]
                assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and (found["b"], found["c"]) == (2, 3)


class Evil:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", [(print, ("code ran",)), (eval, ("print('code ran')",)), (np.load, ("x",)), (np.lib.format.open_memmap, ("x",))])
def test_pickles_that_want_more_than_arrays(call, tmp_path, capsys):
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"model": {"a": np.zeros(2)}, "more": Evil(call)}))
    with pytest.raises(ConfigError, match="nothing else is read"):
        maskdino.load(tmp_path / "evil.pkl")
    assert "code ran" not in capsys.readouterr().out


NDARRAY, DTYPE, MADE = b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\n_reconstruct\n"
ARRAY = MADE + b"(" + NDARRAY + b"(K\x00tU\x01btR"                            # an empty one, whose state comes with BUILD: (version, shape, type, order, bytes)
KIND = DTYPE + b"(U\x02%stR"


@pytest.mark.parametrize("attack", {
    "memory that numpy would take for objects": b"(" + NDARRAY + b"(K\x01t" + KIND % b"V8" + b"tR",
    "an array of objects": ARRAY + b"(K\x01(K\x01t" + KIND % b"O8" + b"\x89](Natb",
    "more numbers than there are bytes": ARRAY + b"(K\x01(J\x00\x00\x00\x40t" + KIND % b"f4" + b"\x89U\x04aaaatb",
    "a type made of numbers in a row": DTYPE + b"(U\x05f4,f4tR",
    "a type's state that says 64 bytes": ARRAY + b"(K\x01(K\x09t" + KIND % b"f4" + b"(K\x03U\x01<NNNK\x40K\x01K\x00tb" + b"\x89U\x04aaaatb",
    "another meaning for a function": MADE + b"(N}U\x08__code__Nstb",
    "another meaning for a class": b"ccollections\nOrderedDict\n(N}U\x05itemsNstb",
    "another meaning for a method": b"ccollections\nOrderedDict\n)R}U\x03get" + MADE + b"sb",
    "a dotted name": b"\x8c\x05numpy\x8c\x0endarray.tofile\x93",
    "a persistent name": b"U\x01xQ", "an extension": b"\x82\x01", "more bytes than memory": b"\x8e" + b"\xff" * 7 + b"\x0f"}.items(), ids=lambda x: x[0])
def test_pickles_that_attack(attack, tmp_path):
    """Each ends in the same sentence; and the reader is as good as before."""
    head, tail = b"\x80\x02}U\x05model}U\x01a", b"ss."
    (tmp_path / "evil.pkl").write_bytes(head + attack[1] + tail if "method" not in attack[0] else b"\x80\x02" + attack[1] + b".")
    with pytest.raises(ConfigError, match="nothing else is read"):
        maskdino.load(tmp_path / "evil.pkl")
    whole = ARRAY + b"(K\x01(K\x01t" + KIND % b"f4" + b"(K\x03U\x01<NNNK\xffK\xffK\x00tb\x89U\x04\x00\x00\x80\x3ftb"
    (tmp_path / "good.pkl").write_bytes(head + whole + tail)
    assert maskdino.read_torch_file(tmp_path / "good.pkl")["model"]["a"].tolist() == [1.0]


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps([1]), pickle.dumps({"model": {"a": "text"}}), pickle.dumps({"a": np.array([None])}),
                                     pickle.dumps({"a": np.zeros(99)})[:50]])
def test_pickles_that_are_no_checkpoints(content, tmp_path):
    (tmp_path / "bad.pkl").write_bytes(content)
    with pytest.raises(ConfigError, match="not a file of PyTorch weights"):
        maskdino.load(tmp_path / "bad.pkl")


def test_released_checkpoints_that_are_not_whole(tmp_path):
    _, state = small_official()
    predictor = "sem_seg_head.predictor"
    for name in (f"{predictor}.query_feat.weight", f"{predictor}.class_embed.weight", f"{predictor}.transformer_ffn_layers.0.linear1.weight",
                 f"{predictor}.transformer_cross_attention_layers.1.norm.weight", "sem_seg_head.pixel_decoder.adapter_1.weight"):
        torch.save({"model": {k: x for k, x in state.items() if k != name}}, tmp_path / "half.pth")
        with pytest.raises(ConfigError, match=re.escape(f"'{name}' is missing")):
            maskdino.load(tmp_path / "half.pth")
    torch.save({"model": state | {f"{predictor}.more": torch.zeros(1)}}, tmp_path / "more.pth")
    with pytest.raises(ConfigError, match="predictor.more"):
        maskdino.load(tmp_path / "more.pth")
    for change in ({"detection_head": True}, {"attention_strides": (8,)}, {"content_queries": "zero", "initial_prediction": False}):
        model = maskdino.build(tiny(backbone="resnet18", backbone_norm="frozen", **change), CLASSES)
        with pytest.raises(ConfigError, match="no place for this model: .*" + next(iter(change))):
            maskdino.to_official(model)


# ---------------------------------------------------------------------------------------------------------------- switches and edge cases
def tiny(**overrides):
    return preset("mask2former_shapes", **{"backbone": "resnet10", "hidden": 32, "enc_layers": 1, "dec_layers": 2, "enc_ffn": 32, "dec_ffn": 32,
                                           "queries": 8, "mask_points": 64, "heads": 4} | overrides)


def step(config, counts, size=64):
    torch.manual_seed(0)
    model, targets = Mask2Former(config, 7).train(), random_targets(counts, size)
    images = torch.randint(256, (len(counts), 3, size, size), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
        output = model(images, [(size, size)] * len(counts), targets)
    total, parts = Criterion(config)(output, targets)
    total.backward()
    return model, output, total, parts


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (3, 0), (13, 2)])
def test_any_number_of_objects(counts):
    """None at all, more than queries: finite, and every parameter gets a gradient (DDP needs that)."""
    model, _, total, parts = step(tiny(), counts)
    assert torch.isfinite(total) and total > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    if max(counts) == 0:
        assert all(v.item() == 0 for k, v in parts.items() if not k.endswith("class"))


@pytest.mark.parametrize("change", [
    {}, {"masked_attention": False}, {"self_attention_first": True}, {"content_queries": "zero", "initial_prediction": False},
    {"initial_prediction": False}, {"attention_strides": (16,)}, {"round_robin": False}, {"detection_head": True}, {"detection_head": True, "box_loss": False},
    {"matching_on": "masks"}, {"loss_on": "masks"}, {"matching": "mask"}, {"task": "panoptic"}, {"task": "semantic"}, {"checkpoint_activations": True},
    {"levels": (8, 16, 32), "dec_layers": 4}, {"precision": "bf16"}, {"class_loss": "focal", "class_cost": "focal"}])
def test_every_switch_trains(change):
    model, output, total, parts = step(tiny(**change), (2, 3))
    assert torch.isfinite(total) and all(p.grad is not None for p in model.parameters())
    assert ("initial" in output.sets) == model.config.initial_prediction
    assert ("layer1/giou" in parts) == model.config.detection_head


def test_what_the_layers_see(monkeypatch):
    """Sizes of the attention masks, layer by layer: from the coarsest level on and round again; one level; all at once; none without masks."""
    def cells(**change):
        seen = []
        model = Mask2Former(tiny(levels=(8, 16, 32), dec_layers=4, **change), 7)
        for layer in model.decoder.layers:
            layer.register_forward_hook(lambda _m, args, _out: seen.append(None if args[4] is None else args[4].shape[-1]))
        model(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), [(64, 96)])
        return seen
    assert cells() == [6, 24, 96, 6]
    assert cells(attention_strides=(8, 32)) == [6, 96, 6, 96] and cells(attention_strides=(16,)) == [24] * 4
    assert cells(round_robin=False) == [126] * 4
    assert cells(initial_prediction=False) == [None, 24, 96, 6] and cells(masked_attention=False) == [None] * 4


def test_attention_is_pytorchs():
    """But for the mask: one for all heads."""
    torch.manual_seed(0)
    ours, theirs = mask2former.Attention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    q, k, v, blocked = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32), torch.rand(2, 5, 7) < 0.4
    wanted = theirs(q, k, v, attn_mask=blocked.repeat_interleave(4, 0), need_weights=False)[0]
    torch.testing.assert_close(ours(q, k, v, blocked), wanted, rtol=0, atol=1e-6)


def test_masks_of_nothing_look_everywhere():
    logits = torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 0], [-1, -2, -3]])
    assert mask2former.outside(logits).tolist() == [[False, True, False], [True, False, False], [False] * 3, [False] * 3]


def test_whole_masks_are_points_at_every_cell():
    """Loss and cost on whole masks: BCE's mean over the map's cells, truth sampled there."""
    _, output, _, parts = step(tiny(matching_on="masks", loss_on="masks"), (1, 1))
    targets = random_targets((1, 1), 64)
    truth = torch.stack([nn.functional.interpolate(t["masks"][None].float(), scale_factor=0.25, mode="bilinear")[0, 0] for t in targets])
    p = output.sets["layer2"]
    maps = maskdino.mask_logits(p.embeddings, output.pixels)
    bce = nn.functional.binary_cross_entropy_with_logits(maps, truth[:, None].expand_as(maps), reduction="none").mean((2, 3))
    dice = 1 - (2 * (maps.sigmoid() * truth[:, None]).sum((2, 3)) + 1) / (maps.sigmoid().sum((2, 3)) + truth[:, None].sum((2, 3)) + 1)
    label = torch.stack([t["labels"] for t in targets])
    best = (5 * bce + 5 * dice - 2 * p.logits.softmax(-1).gather(-1, label[:, None].expand(-1, 8, 1))[..., 0]).argmin(1)
    for part, value in (("mask", bce), ("dice", dice)):
        assert parts[f"layer2/{part}"].item() == pytest.approx(value[[0, 1], best].mean().item(), rel=1e-5)


def test_mixed_sizes_and_padding():
    """Images of different sizes in a batch: what is beside an image changes nothing but the frame."""
    torch.manual_seed(0)
    model = Mask2Former(tiny(), 7).eval()
    image = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    dirty = image.clone()
    image[0, :, 50:], image[0, ..., 70:] = 0, 0
    dirty[0, :, 50:], dirty[0, ..., 70:] = 200, 100
    with torch.no_grad():
        a, b = (model(x, [(50, 70), (64, 96)]) for x in (image, dirty))
        found = model.postprocess(a, [(50, 70), (64, 96)], [(100, 140), (32, 48)])
    assert torch.equal(a.sets["layer2"].logits, b.sets["layer2"].logits)
    assert [tuple(f["masks"].shape[1:]) for f in found] == [(100, 140), (32, 48)]
    assert all((f["boxes"][:, 2] <= f["masks"].shape[2]).all() for f in found)


def test_overfits_one_batch():
    torch.manual_seed(0)
    config = tiny(hidden=64)
    model, criterion, targets = Mask2Former(config, 7).train(), Criterion(config), random_targets((2, 3))
    images = torch.randint(80, (2, 3, 64, 64), dtype=torch.uint8)
    for image, target in zip(images, targets, strict=True):
        for mask, label in zip(target["masks"], target["labels"], strict=True):
            image[:, mask > 0] = torch.tensor([[255], [30 * int(label)], [255 - 30 * int(label)]], dtype=torch.uint8)
    optimizer, first = torch.optim.AdamW(model.parameters(), 1e-3), None
    for _ in range(80):
        total, parts = criterion(model(images, [(64, 64)] * 2, targets), targets)
        first = first or parts
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for part in ("class", "mask", "dice"):
        assert parts[f"layer2/{part}"].item() < 0.4 * first[f"layer2/{part}"].item(), part


# ---------------------------------------------------------------------------------------------------------------- files and command line
def test_save_load_predict(tmp_path):
    torch.manual_seed(0)
    model = maskdino.build(tiny(detections=5), CLASSES).eval()
    assert isinstance(model, Mask2Former)
    maskdino.save(tmp_path / "c.pth", {"model": model.state_dict(), "ema": None, "config": dataclasses.asdict(model.config), "classes": CLASSES})
    again, classes = maskdino.load(tmp_path / "c.pth", test_long=96)
    assert classes == CLASSES and again.config == dataclasses.replace(model.config, test_long=96)
    picture = np.random.default_rng(0).integers(256, size=(90, 200, 3), dtype=np.uint8)
    found, wanted = (m.predict([picture])[0] for m in (again, maskdino.build(again.config, CLASSES).eval()))
    assert found["masks"].shape == (5, 90, 200) and found["boxes"].shape == (5, 4) and not torch.equal(found["scores"], wanted["scores"])
    with pytest.raises(ConfigError, match="--masked_attention=False contradicts"):
        maskdino.load(tmp_path / "c.pth", masked_attention=False)


def test_fine_tuning_with_other_classes():
    """Rows of classes of the same name come along, and the row for no object."""
    old, classes = maskdino.build(tiny(), CLASSES), {"names": ["new", "class 5", "class 2"], "category_ids": [7, 8, 9], "is_thing": [True] * 3}
    model = maskdino.build(tiny(), classes)
    assert "2 of 3 classes" in maskdino.start_from(model, maskdino.Start(old.state_dict(), old.config, CLASSES, "old"))
    assert torch.equal(model.heads.class_head.weight[[1, 2, 3]], old.heads.class_head.weight[[5, 2, 7]])
    assert torch.equal(model.content.weight, old.content.weight) and torch.equal(model.decoder.level_embed.weight, old.decoder.level_embed.weight)


@pytest.mark.parametrize("change, message", [
    ({"task": "detection"}, "model=mask2former does not know --task=detection"), ({"denoising": "mask"}, "--denoising=mask, only none"),
    ({"two_stage": True}, "--two_stage=True"), ({"content_queries": "selected"}, "only learned or zero"),
    ({"content_queries": "zero"}, "initial_prediction=false"), ({"class_loss": "focal"}, "class_cost=probability"),
    ({"attention_strides": (4,)}, "--attention_strides"), ({"attention_strides": (16, 8)}, "in that order")])
def test_settings_that_do_not_go_together(change, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**change)


def test_configuration_through_json():
    for config in (tiny(attention_strides=(8,)), Config()):
        assert Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_mask_dino_does_not_know_them():
    for change in ({"masked_attention": False}, {"content_queries": "zero"}, {"detection_head": False}, {"attention_strides": (8,)}):
        with pytest.raises(ConfigError, match="model=maskdino does not know --" + next(iter(change))):
            Config(**change)


@pytest.mark.parametrize("change", [{}, {"round_robin": False}, {"content_queries": "zero", "initial_prediction": False}, {"detection_head": True}])
def test_tour(change):
    model = maskdino.build(tiny(**change), CLASSES)
    text = maskdino.tour(model, 50, 70)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text.splitlines()[-1] and "decoder" in text
