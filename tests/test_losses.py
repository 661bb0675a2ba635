"""The lean losses against the plain ones of benchmark.py: full masks of all queries, image by image."""
import benchmark
import pytest
import torch

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
