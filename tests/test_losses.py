"""The lean losses against the plain ones of benchmark.py: full masks of all queries, image by image."""
import benchmark
import pytest
import torch

import losses
import maskdino
from losses import Criterion
from maskdino import preset


def both(dtype, counts, shared):
    """Loss, parts and parameter gradients of both paths, with the same random points."""
    torch.manual_seed(0)
    config = preset("shapes", backbone="resnet10", hidden=32, heads=4, enc_layers=1, dec_layers=2, enc_ffn=32, dec_ffn=32, queries=8, denoising_queries=8,
                    mask_points=64)
    model = maskdino.MaskDINO(config, 5).to(dtype)
    torch.nn.init.normal_(model.heads.class_head.bias)                                  # class costs that matter
    images, targets = benchmark.make_batch(len(counts), 64, max(counts), 5, "cpu")
    targets = [{k: v[:n].to(dtype) if k == "boxes" else v[:n] if k in ("labels", "masks") else v for k, v in t.items()} for t, n in zip(targets, counts)]
    output = model(images, [(64, 64)] * len(counts), targets)
    points = benchmark.draw_points(output, targets, config.mask_points, dtype, shared)
    found = []
    for total, parts in (Criterion(config)(output, targets, points=points), benchmark.plain_losses(output, targets, points)):
        gradients = torch.autograd.grad(total, list(model.parameters()), retain_graph=True, allow_unused=True)
        found.append((total, parts, [torch.zeros(()) if g is None else g for g in gradients]))
    return found


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("counts, shared", [((3, 1), False), ((2, 0), False), ((4,), False), ((3, 1), True), ((0, 2), True)])
def test_lean_equals_plain(dtype, tolerance, counts, shared):
    (lean, lean_parts, lean_gradients), (plain, plain_parts, plain_gradients) = both(dtype, counts, shared)
    assert abs(lean - plain) / plain < tolerance
    assert lean_parts.keys() == plain_parts.keys()
    for name, value in lean_parts.items():
        assert value.item() == pytest.approx(float(torch.as_tensor(plain_parts[name]).detach()), rel=tolerance, abs=tolerance), name
    scale = max(g.abs().max() for g in plain_gradients)
    assert max((a - b).abs().max() for a, b in zip(lean_gradients, plain_gradients)) / scale < tolerance


@pytest.mark.parametrize("cost, chosen", [(0.01, 0), (100.0, 1)])
def test_the_class_weighs_apart_in_matching_and_loss(cost, chosen):
    """Of a query with the right mask and one with the right class the matching's weight chooses; the loss has its own."""
    config = preset("mask2former_shapes", class_weight=7, class_cost_weight=cost, mask_points=64)
    logits = torch.tensor([[[0.0, 4.0, 0.0], [4.0, 0.0, 0.0]]])
    embeddings, pixels = torch.tensor([[[9.0], [-9.0]]]), torch.ones(1, 1, 4, 4)
    pixels[..., 2:] = -1
    masks = torch.zeros(1, 16, 16, dtype=torch.uint8)
    masks[..., :8] = 1
    criterion = Criterion(config)
    assert criterion.cost_parts == Criterion(preset("mask2former_shapes", class_weight=0)).cost_parts == ["class", "mask", "dice"]
    output = losses.Output((16, 16), pixels, {"layer1": losses.Prediction(logits, None, embeddings)}, {}, 0)
    target = {"labels": torch.tensor([0]), "boxes": torch.tensor([[0.25, 0.5, 0.5, 1.0]]), "masks": masks, "key": 1}
    total, parts = criterion(output, [target])
    _, query, _ = criterion.matcher(losses.stack(output.sets), pixels, losses.Truth.of([target], True), torch.rand(1, 1, 64, 2))
    assert query.item() == chosen and (parts["layer1/mask"] < 1) == (chosen == 0)
    assert total.item() == pytest.approx(sum({"class": 7, "mask": 5, "dice": 5}[name[7:]] * loss.item() for name, loss in parts.items()))


def test_ignored_pixels_take_no_part():
    """Neither in the matching nor in the losses: whatever truth and prediction say there, all stays the same, and no gradient flows there."""
    config = preset("shapes", task="semantic", class_loss="ce", two_stage=False, box_init="token", denoising="none", mask_points=64)
    g = torch.Generator().manual_seed(0)
    prediction = losses.Prediction(torch.randn(1, 6, 4, generator=g), torch.rand(1, 6, 4, generator=g), torch.randn(1, 6, 8, generator=g))
    ignore = torch.zeros(64, 64, dtype=torch.bool)
    ignore[:, 24:] = True                                               # from the seventh cell of 4 pixels on
    found = []
    for beyond in (0, 1):
        masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
        masks[0, :32, :24] = masks[1, 32:, :24] = 1
        masks[:, :, 24:] = beyond
        pixels = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(1))
        pixels[..., 7:] += 5 * beyond
        pixels.requires_grad_()
        boxes = torch.tensor([[0.2, 0.25, 0.4, 0.5], [0.2, 0.75, 0.4, 0.5]])
        target = {"labels": torch.tensor([0, 2]), "boxes": boxes, "masks": masks, "ignore": ignore, "key": 3}
        total, _ = Criterion(config)(losses.Output((64, 64), pixels, {"layer1": prediction}, {}, 0), [target])
        total.backward()
        assert pixels.grad[..., :6].abs().sum() > 0 and not pixels.grad[..., 7:].any()
        found.append((total.detach(), pixels.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_moved_points():
    ignore = torch.zeros(4, 4, dtype=torch.bool)
    ignore[:, 2:] = True                                                # a sample left of 0.375 has no part in the third column
    points = torch.tensor([[0.2, 0.5], [0.9, 0.9], [0.3, 0.1], [0.6, 0.0], [0.45, 0.0]])
    assert torch.equal(losses.move_points(points, ignore), points[[0, 2, 0, 2, 0]])
    assert torch.equal(losses.move_points(points.expand(2, 3, 5, 2), ignore)[1, 2], points[[0, 2, 0, 2, 0]])
    assert torch.equal(losses.move_points(points, torch.zeros(4, 4, dtype=torch.bool)), points)


@pytest.mark.parametrize("part", ["logits", "embeddings", "boxes"])
def test_the_matcher_reports_what_is_not_finite(part):
    """Also of a query that gets no object, whose boxes and masks no loss sees: the total is not finite, and says why."""
    config = preset("shapes", mask_points=16)
    g = torch.Generator().manual_seed(0)
    values = {"logits": torch.randn(1, 6, 4, generator=g), "boxes": torch.rand(1, 6, 4, generator=g), "embeddings": torch.randn(1, 6, 8, generator=g)}
    target = {"labels": torch.tensor([0]), "boxes": torch.tensor([[0.2, 0.2, 0.4, 0.4]]), "masks": torch.ones(1, 32, 32, dtype=torch.uint8), "key": 3}
    for query, names in ((None, set()), (4, {"logits": {"matching/class"}, "embeddings": {"matching/mask", "matching/dice"},
                                             "boxes": {"matching/l1", "matching/giou"}}[part])):
        if query:
            values[part][0, query, 0] = float("nan")
        output = losses.Output((32, 32), torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1)), {"layer1": losses.Prediction(**values)}, {}, 0)
        total, parts = Criterion(config)(output, [target])
        assert {name for name in parts if name.startswith("matching/")} == names and total.isfinite() == (query is None)
