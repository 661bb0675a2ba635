"""The attention operator: both versions against the released implementation and against each other."""
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import ms_deform_attn, ms_deform_attn_loops, random_inputs

GOLDEN = Path(__file__).parent / "golden"
SHAPES = [(5, 7), (3, 4), (1, 1)]


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "msdeform.npz", allow_pickle=False)


@pytest.mark.parametrize("attention", [ms_deform_attn_loops, ms_deform_attn])
def test_golden_output_and_gradients(golden, attention):
    """Released numbers in float64. They give locations and weights: offsets from a reference at 0, and log-weights, say the same."""
    shapes = [tuple(s) for s in golden["spatial_shapes"].tolist()]
    value, locations, weights = (torch.from_numpy(golden[k]).requires_grad_() for k in ("value", "sampling_locations", "attention_weights"))
    size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    reference = torch.zeros(*locations.shape[:2], 2, dtype=torch.float64)
    out = attention(value, shapes, reference, locations * size, weights.log())
    torch.testing.assert_close(out, torch.from_numpy(golden["output"]), rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(out, (value, locations, weights), torch.from_numpy(golden["grad_output"]))
    torch.testing.assert_close(gradients[0], torch.from_numpy(golden["grad_value"]), rtol=0, atol=1e-12)
    regular = ~torch.from_numpy(golden["special"])            # elsewhere the derivative is one-sided
    torch.testing.assert_close(gradients[1][regular], torch.from_numpy(golden["grad_sampling_locations"])[regular], rtol=0, atol=1e-11)
    # Through the softmax the released gradient g arrives as g - sum(g a) (a sums to 1), times a for the logits, over a for the weights.
    wanted = torch.from_numpy(golden["grad_attention_weights"])
    wanted = wanted - (wanted * weights).sum((-2, -1), keepdim=True)
    torch.testing.assert_close(gradients[2], wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_pytorch_equals_loops(box, levels):
    arguments = random_inputs(2, 4, SHAPES[:levels], M=2, D=4, P=3, box=box, dtype=torch.float64)
    torch.testing.assert_close(ms_deform_attn(*arguments), ms_deform_attn_loops(*arguments), rtol=0, atol=1e-13)


@pytest.mark.parametrize("box", [False, True])
def test_gradcheck(box):
    value, shapes, reference, offsets, logits = random_inputs(1, 3, SHAPES, M=2, D=2, P=2, box=box, dtype=torch.float64, seed=3)
    leaves = [t.requires_grad_() for t in (value, reference, offsets, logits)]
    assert torch.autograd.gradcheck(lambda v, r, o, a: ms_deform_attn(v, shapes, r, o, a), leaves)


def test_no_queries_and_far_away():
    value, shapes, reference, offsets, logits = random_inputs(1, 0, SHAPES, M=2, D=4)
    assert ms_deform_attn(value, shapes, reference, offsets, logits).shape == (1, 0, 8)
    value, shapes, reference, offsets, logits = random_inputs(1, 3, SHAPES, M=2, D=4)
    assert ms_deform_attn(value, shapes, reference, offsets + 1e6, logits).abs().max() == 0      # zero outside the map


def test_half_precision_values_keep_exact_locations():
    """Locations stay in float32 when the values are bfloat16: in bfloat16 they would be off by a third of a cell."""
    value, shapes, reference, offsets, logits = random_inputs(1, 50, [(64, 64)], M=2, D=8)
    exact = ms_deform_attn(value, shapes, reference, offsets, logits)
    half = ms_deform_attn(value.bfloat16(), shapes, reference, offsets.bfloat16(), logits.bfloat16())
    again = ms_deform_attn(value.bfloat16().float(), shapes, reference, offsets.bfloat16().float(), logits.bfloat16().float())
    assert half.dtype == torch.bfloat16
    assert (half.float() - again).abs().max() < 0.02 < exact.abs().max()


def test_shapes_that_do_not_fit_are_named():
    value, shapes, reference, offsets, logits = random_inputs(1, 3, SHAPES, M=2, D=4)
    with pytest.raises(ValueError, match="48 tokens"):
        ms_deform_attn(value, shapes[:2], reference, offsets, logits)
