"""The attention operator: every rung against the released implementation and against the others; the compiled kernels' machine code."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
from kernels import ms_deform_attn, ms_deform_attn_loops, ms_deform_attn_torch, random_inputs

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
SHAPES = [(5, 7), (3, 4), (1, 1)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "msdeform.npz", allow_pickle=False)


@pytest.mark.parametrize("attention", [ms_deform_attn_loops, ms_deform_attn_torch, ms_deform_attn])
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
def test_grid_sample_equals_loops(box, levels):
    arguments = random_inputs(2, 4, SHAPES[:levels], M=2, D=4, P=3, box=box, dtype=torch.float64)
    torch.testing.assert_close(ms_deform_attn_torch(*arguments), ms_deform_attn_loops(*arguments), rtol=0, atol=1e-13)


FIVE = [(9, 6), (5, 3), (1, 2), (1, 1), (8, 1)]
CASES = [  # B, Q, shapes, what differs from 2 heads of width 32 with 4 points. Tiles hold 4 to 128 queries: no Q here is a multiple
    (2, 11, SHAPES, {}), (1, 35, [*SHAPES, (6, 9)], {"D": 64, "P": 1}), (1, 5, FIVE, {"D": 16, "P": 2}), (1, 3, SHAPES, {"D": 8, "P": 8, "M": 1}),
    (1, 1, [(1, 1)], {"M": 3}),
]


def worst(rung, case, **more):
    B, Q, shapes, shape = case
    return kernels.errors(rung, *random_inputs(B, Q, shapes, **{"M": 2, "D": 32, "P": 4, "device": DEVICE, **shape, **more}))


RUNGS = [kernels.in_closed_form, pytest.param(kernels.by_triton, marks=needs_triton)]


@pytest.mark.parametrize("dtype", kernels.TOLERANCE, ids=str)
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rung", RUNGS)
def test_rungs_against_float64(rung, case, box, dtype):
    """Triton on a GPU for real, without one interpreted: the arithmetic is the same, races and launches are not seen."""
    found = worst(rung, case, box=box, dtype=dtype)
    assert max(found.values()) < kernels.TOLERANCE[dtype], found


@pytest.mark.parametrize("rung", RUNGS)
def test_borders_and_far_away(rung):
    """Points on cell centres, on the map's edge, one cell outside, and 1e6 or 1e30 cells away; zero outside."""
    where = torch.tensor([-1e30, -1e6, -1.0, -0.5, 0, 1, 2.5, 3, 3.5, 4, 5, 1e6, 1e30], dtype=torch.float64, device=DEVICE)
    x, y = torch.meshgrid(where, where, indexing="ij")
    offsets = torch.stack((x, y), -1).view(1, -1, 1, 1, 1, 2)
    Q = offsets.shape[1]
    value = torch.randn(1, 16, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)
    corner, even = torch.full((1, Q, 2), 0.125, dtype=torch.float64, device=DEVICE), torch.zeros_like(offsets[..., 0])
    arguments = value, [(4, 4)], corner, offsets, even
    grad = torch.randn(1, Q, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
    out, grad_value, grad_offsets, _ = rung(grad, *arguments)
    leaf = value.clone().requires_grad_()
    wanted = ms_deform_attn_loops(leaf, *arguments[1:])
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad_value, torch.autograd.grad(wanted, leaf, grad)[0], rtol=0, atol=1e-12)
    outside = ((offsets.abs() > 5) | (offsets == 5)).any(-1)
    assert grad_offsets[outside].eq(0).all() and grad_offsets.isfinite().all()


@pytest.mark.parametrize("box", [False, True])
def test_gradcheck(box):
    """All four gradients of the operator, reference points included, many points outside the map."""
    value, _, *others = random_inputs(1, 4, [*SHAPES, (1, 6)], M=2, D=8, P=2, box=box, dtype=torch.float64, device=DEVICE, seed=3)
    leaves = [t.requires_grad_() for t in (value, *others)]
    assert torch.autograd.gradcheck(lambda v, *rest: ms_deform_attn(v, [*SHAPES, (1, 6)], *rest), leaves, nondet_tol=1e-12)


@pytest.mark.parametrize("box", [False, True])
def test_registration(box):
    value, shapes, reference, offsets, logits = random_inputs(2, 5, SHAPES, M=2, D=8, box=box, device=DEVICE)
    sizes = [n for shape in shapes for n in shape]
    leaves = [t.requires_grad_() for t in (value, offsets, logits)]
    torch.library.opcheck(kernels.forward_op, (value, sizes, reference, offsets, logits))
    value, offsets, logits = (t.detach() for t in leaves)
    out, lse = kernels.forward_op(value, sizes, reference, offsets, logits)
    torch.library.opcheck(kernels.backward_op, (torch.randn_like(out), value, sizes, reference, offsets, logits, out, lse),
                          test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_compile_and_export():
    value, shapes, reference, offsets, logits = random_inputs(2, 5, SHAPES, M=2, D=8, device=DEVICE)
    leaves = [t.requires_grad_() for t in (value, offsets, logits)]

    class Attention(torch.nn.Module):
        def forward(self, value, reference, offsets, logits):
            return ms_deform_attn(value * 2, shapes, reference, offsets, logits)

    plain = Attention()(value, reference, offsets, logits)
    compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager")(value, reference, offsets, logits)
    assert torch.equal(plain, compiled)
    for a, b in zip(torch.autograd.grad(plain.square().sum(), leaves), torch.autograd.grad(compiled.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)
    queries = torch.export.Dim("queries")
    exported = torch.export.export(Attention(), (value, reference, offsets, logits), dynamic_shapes=(None, {1: queries}, {1: queries}, {1: queries}))
    more = random_inputs(2, 9, SHAPES, M=2, D=8, device=DEVICE, seed=1)
    torch.testing.assert_close(exported.module()(more[0], *more[2:]), Attention()(more[0], *more[2:]))
    assert sum("maskdino.ms_deform_attn" in str(node.target) for node in exported.graph.nodes) == 1


def test_autocast():
    """Values become 16 bits wide, reference points don't: rounded to bfloat16 they would be off by a third of a cell in a map of 64."""
    value, shapes, reference, offsets, logits = random_inputs(1, 50, [(64, 64)], M=2, D=8, device=DEVICE)
    value.requires_grad_()
    exact = ms_deform_attn(value, shapes, reference, offsets, logits)
    with torch.autocast(DEVICE, torch.bfloat16):
        half = ms_deform_attn(value, shapes, reference, offsets, logits)
        compiled = torch.compile(ms_deform_attn, fullgraph=True, backend="aot_eager")(value, shapes, reference, offsets, logits)
    assert half.dtype == compiled.dtype == torch.bfloat16
    assert torch.equal(half, compiled)
    assert (half.float() - exact).abs().max() < 0.02 < exact.abs().max()
    half.sum().backward()
    assert value.grad.dtype == torch.float32


def test_no_queries_and_not_a_number():
    value, shapes, reference, offsets, logits = random_inputs(1, 0, SHAPES, M=2, D=8, device=DEVICE)
    value.requires_grad_()
    out = ms_deform_attn(value, shapes, reference, offsets.requires_grad_(), logits)
    assert out.shape == (1, 0, 16)
    out.sum().backward()
    assert value.grad.eq(0).all() and offsets.grad.shape == offsets.shape
    value, shapes, reference, offsets, logits = random_inputs(1, 3, SHAPES, M=2, D=8, device=DEVICE)
    offsets[0, 1] = torch.nan                                                   # a diverged training must not read beyond its memory
    assert ms_deform_attn(value, shapes, reference, offsets.requires_grad_(), logits)[0, [0, 2]].isfinite().all()


def test_the_choice_is_made_beforehand_and_said_once(capsys, monkeypatch):
    gpu = "cuda", torch.bfloat16, 32, (9, 0), False
    monkeypatch.setattr(kernels, "triton", object())
    for arguments, reason in [(gpu, "Triton kernels"), (("cpu", *gpu[1:3], (0, 0), False), "the values are on cpu"),
                              ((*gpu[:3], (7, 5), False), "(7, 5) is below"), ((*gpu[:2], 12, *gpu[3:]), "head width 12 is not 8, 16, 32 or 64"),
                              ((*gpu[:4], True), "deterministic algorithms")]:
        kernels.choice.cache_clear()
        assert kernels.choice(*arguments) == (reason == "Triton kernels") == kernels.choice(*arguments)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and reason in said
    kernels.choice.cache_clear()
    monkeypatch.setattr(kernels, "triton", None)
    assert not kernels.choice(*gpu) and "Triton is not installed" in capsys.readouterr().err
    kernels.choice.cache_clear()


def test_shapes_that_do_not_fit_are_named():
    value, shapes, reference, offsets, logits = random_inputs(1, 3, SHAPES, M=2, D=4)
    with pytest.raises(ValueError, match="48 tokens"):
        ms_deform_attn(value, shapes[:2], reference, offsets, logits)
    for wrong in ((reference[..., :1], offsets, logits), (reference, offsets[:, :2], logits), (reference, offsets, logits[:, :, :1])):
        with pytest.raises(ValueError, match="do not fit together"):
            ms_deform_attn(value, shapes, *wrong)


@needs_triton
def test_machine_code():
    """Compiled for GPUs that are not here: nothing spilled, few registers, wide gathers, reductions that neither return nor fence, few instructions."""
    tools = kernels.triton.knobs.nvidia
    try:
        assert tools.nvdisasm.path and tools.cuobjdump.path
    except RuntimeError as error:
        pytest.skip(f"no disassembler: {error}")
    code = "import json, kernels; print(json.dumps(kernels.static_table()))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(ran.stdout)
    assert len(rows) == 12
    ceiling = {("forward", "fp32"): 18, ("forward", "bf16"): 18, ("backward", "fp32"): 35, ("backward", "bf16"): 41}
    for row in rows:
        capped = "maxnreg" in kernels.options(row["kernel"], row["arch"])       # for more warps; Triton 3.8 pays with three registers, 3.6 and 3.9 with none
        assert row["atomics"] == row["fences"] == 0 and row["registers"] <= 96 and max(row["stack"], row["spills"]) <= 16 * capped, row
        width = "gathers_64" if (row["kernel"], row["dtype"]) == ("backward", "bf16") else "gathers_128"       # there as wide as the reductions
        assert row[width] >= 8 and (row["reductions"] > 0) == (row["kernel"] == "backward"), row
        if row["arch"] >= 90:
            assert row["reductions_v4"] == row["reductions"] and row["per_point"] <= ceiling[row["kernel"], row["dtype"]], row
