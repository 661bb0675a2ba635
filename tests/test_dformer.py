"""DFormer against the released implementation: golden numbers (tests/golden), parameter counts, checkpoints; its noise, switches and edge cases.

What Mask2Former shares with it is tested there. Fixtures keep noise only at the pixels that are read (`dformer.middle`).
"""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from test_mask2former import FEATURES, MASKS, OFFICIAL_LOSS, check_gradients, check_whole_model, close, golden_matching, golden_targets, head_model
from test_maskdino import CLASSES, golden, random_targets, tensor
from torch import nn

import data
import dformer
import maskdino
from dformer import DFormer, middle, noisy_masks, to_cells
from losses import Criterion
from maskdino import ConfigError, preset


# ---------------------------------------------------------------------------------------------------------------- golden numbers
@pytest.fixture(scope="module")
def head():
    z = golden("head_dformer")
    return z, head_model(z, "dformer_coco_instance_r50_50ep")


def recorded(z, name):
    return [tensor(z[f"{name}_{stride}"]).float() for stride in (4, 32)]


def recorded_draws(z):
    return [{"t": int(z[f"t_{b}"]), "order": tensor(z[f"perm_{b}"]), "pads": recorded(z, f"pad_masks_{b}"), "noise": recorded(z, f"noise_{b}"),
             "grey": [None, None]} for b in range(2)]


def test_golden_schedule(head):
    np.testing.assert_allclose(dformer.ALPHA_BAR, head[0]["alphas_cumprod"], rtol=1e-12)


def test_golden_corruption(head):
    z, model = head
    assert model.config.noise_scale == z["scale"]
    for b, (target, draws) in enumerate(zip(golden_targets(z), recorded_draws(z), strict=True)):
        fine, coarse = noisy_masks(target, draws, model.config)
        close(fine[::10], z["noisy_4"][b], 1e-6, "fine")
        close(coarse, z["noisy_32"][b], 1e-6, "coarse")


def test_golden_head_and_training(head):
    """Time, pooled queries, every layer and its mask, every prediction, every loss, the total and every gradient, given the recorded draws."""
    z, model = head
    targets, seen, hooks = golden_targets(z), {}, []
    parts = {"time_embed": model.time, "scale_shift": model.modulation, "dec_cross0": model.decoder.layers[0].norm2, "dec_self0": model.decoder.layers[0].norm1,
             "dec_ffn0": model.decoder.layers[0].norm3}
    for name, part in parts.items():
        hooks.append(part.register_forward_hook(lambda _m, _args, out, name=name: seen.update({name: out})))
    for i, layer in enumerate(model.decoder.layers):
        hooks.append(layer.register_forward_hook(lambda _m, args, _out, i=i: seen.update({f"dec_in{i}": args[0], f"attn_mask_used{i}": args[4]})))
    hooks.append(model.time.register_forward_pre_hook(lambda _m, args: seen.update({"time_sin": args[0]})))
    output = model(torch.zeros(2, 3, 96, 128, dtype=torch.uint8), [(96, 128)] * 2, targets, recorded_draws(z))
    for hook in hooks:
        hook.remove()
    for name, x in seen.items():
        if name.startswith("attn"):
            assert np.array_equal(x.numpy(), z[name]), name
        else:
            close(x, z[name], FEATURES, name)
    close(output.pixels[..., ::4, ::4], z["mask_features"], FEATURES, "mask_features")
    assert list(output.sets) == ["layer1", "layer2", "layer3"]
    for i, p in enumerate(output.sets.values()):
        close(p.logits, z[f"pred_logits_{i}"], FEATURES, i)
        close(maskdino.mask_logits(p.embeddings, output.pixels)[..., ::4, ::4], z[f"pred_masks_{i}"], MASKS, i)

    criterion = Criterion(model.config)
    model.zero_grad()
    total, ours = criterion(output, targets, points=golden_matching(z, criterion, output, targets)[3])
    for r, name in enumerate(output.sets):
        for part, official in OFFICIAL_LOSS.items():
            assert criterion.weights[part] * ours[f"{name}/{part}"].item() == pytest.approx(float(z[f"{official}_{r}_weighted"]), abs=5e-5), (name, part)
    assert total.item() == pytest.approx(float(z["total_weighted"]), rel=1e-5)
    total.backward()
    check_gradients(model, z)


@pytest.mark.parametrize("steps", [1, 4])
def test_golden_sampling(head, steps, monkeypatch):
    """Every step of the released sampler: time, pooled queries, attention masks, its last prediction."""
    z, zs, seen = head[0], golden("sampling_dformer"), []
    case = {"params": z["params"], "cfg": np.array([64, 20, 2, 3, 128, 7, 2, 64, 96, 8]), "feature_seed": zs["feature_seed"]}
    model = head_model(case, "dformer_coco_instance_r50_50ep").eval()
    model.config = dataclasses.replace(model.config, sampling_steps=steps)
    model.backbone.maps = [x[:1] for x in model.backbone.maps]
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda _m, args, _out: seen.append((args[0], args[4])))
    predictions, denoise = [], model.denoise
    monkeypatch.setattr(model, "denoise", lambda m, t, *rest: predictions.append((t, denoise(m, t, *rest))) or predictions[-1][1])
    with torch.no_grad():
        output = model(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), [(64, 96)], noise=[recorded(zs, f"noise{i}") for i in range(steps)])
    for i, (t, sets) in enumerate(predictions):
        assert t.tolist() == zs[f"s{i}:t"].tolist()
        close(seen[3 * i][0], zs[f"s{i}:dec_in0"], FEATURES, f"content {i}")
        for layer in range(3):
            assert np.array_equal(seen[3 * i + layer][1].numpy(), zs[f"s{i}:attn_mask_used{layer}"]), (i, layer)
        close(sets["layer3"].logits, zs[f"s{i}:pred_logits_2"], FEATURES, f"logits {i}")
        close(maskdino.mask_logits(sets["layer3"].embeddings, output.pixels)[..., ::2, ::2], zs[f"s{i}:pred_masks_2"], MASKS, f"masks {i}")
    assert output.sets is predictions[-1][1] and len(predictions) == steps
    if steps == 4:
        close(output.sets["layer3"].logits, zs["final_pred_logits"], FEATURES, "final")


# ---------------------------------------------------------------------------------------------------------------- released checkpoints
def manifest(name):
    return json.loads(str(golden("manifests_dformer")[name]))


@pytest.mark.parametrize("name", ["coco_instance_r50", "coco_instance_swint", "coco_panoptic_r50", "ade20k_semantic_r50"])
def test_released_checkpoint_comes_and_goes(name, capsys):
    own = f"dformer_{name}" + "_50ep" * name.startswith("coco")
    state = {key: torch.rand(shape) for key, shape in manifest(name)["params"].items()}
    weights, config, classes = maskdino.read_weights({"model": state}, "dformer.pth")
    assert f"taken from preset {own}:" in capsys.readouterr().out and config == preset(own)
    with torch.device("meta"):
        model = maskdino.build(config, classes)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    parts = [count(model.backbone), count(model.pixel_decoder), count(model) - count(model.backbone) - count(model.pixel_decoder)]
    assert isinstance(model, DFormer) and parts == list(manifest(name)["parts"].values())
    model.load_state_dict(weights, strict=False, assign=True)
    back = maskdino.to_official(model)
    assert {key: x.shape for key, x in back.items()} == {key: x.shape for key, x in state.items()}
    constant = (*dformer.BUFFERS, "empty_weight", "relative_position_index")
    assert all(torch.equal(back[key], x) for key, x in state.items() if not key.endswith(constant))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coco_instance_r50", "coco_instance_swint", "coco_panoptic_r50", "ade20k_semantic_r50"])
def test_whole_models_run(name, tmp_path):
    check_whole_model(manifest(name), tmp_path / "dformer.pth")


# ---------------------------------------------------------------------------------------------------------------- noise
def test_noise_that_is_read_is_all_there_is():
    """The same numbers as noise on every pixel, resized: cells read only the pixels that `middle` picks, and no pixel serves both sizes.

    Independent draws for the two sizes are therefore draws from the same distribution.
    """
    torch.manual_seed(0)
    full = dformer.corrupt(torch.randint(2, (3, 64, 96)).double(), torch.randn(3, 64, 96).double(), 300, 0.1)
    for stride in (4, 8, 16, 32):
        resized = nn.functional.interpolate(full[None], size=(64 // stride, 96 // stride), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(to_cells(middle(full, stride)), resized, rtol=0, atol=1e-12)
    number = torch.arange(64 * 96).view(64, 96)
    fine = set(middle(number, 4).flatten().tolist())
    assert all(fine.isdisjoint(middle(number, stride).flatten().tolist()) for stride in (8, 16, 32))


def test_how_much_signal_there_is():
    """The share of pixels on the right side of 0: Phi(b sqrt(abar / (1 - abar)))."""
    g = torch.Generator().manual_seed(0)
    for t, b in ((100, 0.1), (500, 0.1), (500, 1.0)):
        x0 = torch.randint(2, (200_000,), generator=g).float()
        right = ((dformer.corrupt(x0, torch.randn(200_000, generator=g), t, b) > 0.5) == x0.bool()).double().mean().item()
        ratio = b * math.sqrt(dformer.ALPHA_BAR[t] / (1 - dformer.ALPHA_BAR[t]))
        assert right == pytest.approx(0.5 * (1 + math.erf(ratio / math.sqrt(2))), abs=4e-3)


@pytest.mark.parametrize("encoding", ["binary", "shuffled"])
def test_masks_without_noise(encoding):
    """At time 0 they are still there: in their rows, among coins."""
    config, (target,) = tiny(levels=(8, 16, 32), mask_encoding=encoding, noise_scale=100.0), random_targets((3,))
    draws = dformer.draw_noise(target, config) | {"t": 0}
    fine, coarse = noisy_masks(target, draws, config)
    rows = draws["order"].argsort()[:3]
    for m, stride in ((fine, 4), (coarse, 32)):
        assert m.shape == (8, 128 // stride, 128 // stride) and 0 <= m.min() and m.max() <= 1
        truth = middle(target["masks"], stride).bool()
        assert torch.equal(m[rows] > 0.5, truth)
        if encoding == "binary":
            assert (m - (m > 0.5).float()).abs().max() < 0.1
        else:
            assert 0.7 < m[rows][truth].mean() < 0.8 and 0.2 < m[rows][~truth].mean() < 0.3


def test_draws_depend_on_the_image_alone():
    one, two = random_targets((3, 3)), random_targets((3, 3))[::-1]
    a, b, c = (dformer.draw_noise(t, tiny()) for t in (one[1], two[0], one[0]))
    assert a["t"] == b["t"] and torch.equal(a["noise"][0], b["noise"][0]) and not torch.equal(a["noise"][0], c["noise"][0])


def test_a_sampler_that_knows_the_answer():
    """Given the truth in every step, what comes out is the forward process of the truth: mean and variance."""
    g = torch.Generator().manual_seed(0)
    for eta in (0.0, 1.0):
        x0 = torch.full((200_000,), 0.1)
        x = torch.randn(200_000, generator=g) * math.sqrt(1 - dformer.ALPHA_BAR[999]) + math.sqrt(dformer.ALPHA_BAR[999]) * x0
        for t, after in ((999, 499), (499, 100)):
            x = dformer.step_back(x, x0, t, after, eta, torch.randn(200_000, generator=g))
        assert x.mean().item() == pytest.approx(0.1 * math.sqrt(dformer.ALPHA_BAR[100]), abs=2e-3)
        assert x.var().item() == pytest.approx(1 - dformer.ALPHA_BAR[100], rel=1e-2)


# ---------------------------------------------------------------------------------------------------------------- switches and edge cases
def tiny(**overrides):
    return preset("dformer_shapes", **{"backbone": "resnet10", "hidden": 32, "enc_layers": 1, "dec_layers": 2, "enc_ffn": 32, "dec_ffn": 32,
                                       "queries": 8, "mask_points": 64, "heads": 4} | overrides)


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (8, 2), (13, 2)])
def test_any_number_of_objects(counts):
    """None at all, as many as queries, more: finite, and every parameter gets a gradient."""
    check_step(tiny(), counts)


@pytest.mark.parametrize("change", [{"mask_encoding": "shuffled"}, {"masked_attention": False}, {"self_attention_first": True}, {"detection_head": True},
                                    {"attention_strides": (16,)}, {"task": "panoptic"}, {"levels": (8, 16, 32)}, {"precision": "bf16"}])
def test_every_switch_trains(change):
    check_step(tiny(**change), (2, 3))


def check_step(config, counts):
    torch.manual_seed(0)
    model, targets = DFormer(config, 7).train(), random_targets(counts, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
        output = model(torch.randint(256, (len(counts), 3, 64, 64), dtype=torch.uint8), [(64, 64)] * len(counts), targets)
    total, _ = Criterion(config)(output, targets)
    total.backward()
    assert torch.isfinite(total) and all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_largest_objects_stay():
    config, (target,) = tiny(noise_scale=100.0), random_targets((13,))
    draws = dformer.draw_noise(target, config) | {"t": 0}
    areas = target["masks"].flatten(1).sum(1, dtype=torch.long)
    rows = noisy_masks(target, draws, config)[0][draws["order"].argsort()] > 0.5
    assert torch.equal(rows, middle(target["masks"][areas.topk(8).indices], 4).bool())


def test_images_of_mixed_sizes_train():
    """In one padded batch, one with more objects than queries; the noise is of the padded size, so that masks stay where they are in it."""
    config, sizes = tiny(noise_scale=100.0), [(64, 70), (50, 96)]
    images, targets = data.collate([(torch.randint(256, (3, h, w), dtype=torch.uint8), target | {"masks": target["masks"][:, :h, :w], "ignore": None})
                                    for (h, w), target in zip(sizes, random_targets((2, 13), 96), strict=True)])
    for target in targets:
        draws = dformer.draw_noise(target, config) | {"t": 0}
        objects = noisy_masks(target, draws, config)[0][draws["order"].argsort()[:min(len(target["labels"]), 8)]]
        assert objects.shape[1:] == (32, 48)
        if len(objects) < 8:
            assert torch.equal(objects > 0.5, middle(target["masks"], 4).bool())
    model = DFormer(config, 7).train()
    total, _ = Criterion(config)(model(images, sizes, targets), targets)
    total.backward()
    assert torch.isfinite(total) and all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("steps", [1, 3])
def test_sampling_is_seeded(steps):
    """Padding, mixed sizes, any company in the batch: an image has one answer."""
    torch.manual_seed(0)
    model = maskdino.build(tiny(sampling_steps=steps), CLASSES).eval()
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    sizes = [(64, 96), (50, 70)]
    with torch.no_grad():
        together, again, alone = model(images, sizes), model(images, sizes), model(images[1:], sizes[1:])
        other = DFormer(dataclasses.replace(model.config, seed=1), 7).eval()
        other.load_state_dict(model.state_dict())
        other = other(images, sizes)
    last = [output.sets["layer2"].logits for output in (together, again, other)]
    assert torch.equal(last[0], last[1]) and not torch.equal(last[0], last[2])
    torch.testing.assert_close(last[0][1:], alone.sets["layer2"].logits, rtol=0, atol=1e-4)
    found = model.postprocess(together, sizes, [(32, 48), (100, 140)])
    assert [tuple(f["masks"].shape[1:]) for f in found] == [(32, 48), (100, 140)]


def test_save_load_predict(tmp_path):
    model = maskdino.build(tiny(detections=5), CLASSES).eval()
    maskdino.save(tmp_path / "c.pth", {"model": model.state_dict(), "ema": None, "config": dataclasses.asdict(model.config), "classes": CLASSES})
    again, _ = maskdino.load(tmp_path / "c.pth", sampling_steps=2, sampling_eta=0.5)
    found = again.predict([np.zeros((90, 200, 3), np.uint8)])[0]
    assert isinstance(again, DFormer) and found["masks"].shape == (5, 90, 200)
    with pytest.raises(ConfigError, match="--noise_scale=0.5 contradicts"):
        maskdino.load(tmp_path / "c.pth", noise_scale=0.5)


def test_overfits_one_batch():
    torch.manual_seed(0)
    config = tiny(hidden=64)
    model, criterion, targets = DFormer(config, 7).train(), Criterion(config), random_targets((2, 3))
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    for image, target in zip(images, targets, strict=True):
        for mask, label in zip(target["masks"], target["labels"], strict=True):
            image[:, mask > 0] = torch.tensor([[255], [30 * int(label)], [255 - 30 * int(label)]], dtype=torch.uint8)
    optimizer, history = torch.optim.AdamW(model.parameters(), 1e-3), []
    for i in range(80):
        targets = [t | {"key": 2 * i + b} for b, t in enumerate(targets)]                                   # other noise in every step
        total, _ = criterion(model(images, [(64, 64)] * 2, targets), targets)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append(total.item())
    assert np.mean(history[-5:]) < 0.6 * np.mean(history[:5])


@pytest.mark.parametrize("change", [{}, {"sampling_steps": 3}])
def test_tour(change):
    model = maskdino.build(tiny(**change), CLASSES)
    text = maskdino.tour(model, 50, 70)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text.splitlines()[-1] and "modulation" in text


@pytest.mark.parametrize("change, message", [
    ({"content_queries": "learned"}, "only pooled"), ({"initial_prediction": True}, "initial_prediction=True"), ({"denoising": "mask"}, "only none"),
    ({"round_robin": False}, "round_robin=False")])
def test_settings_that_do_not_go_together(change, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**change)
