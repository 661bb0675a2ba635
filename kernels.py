"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3), the operator at the heart of encoder and decoder.

Two versions of one equation, easiest first:

1. `ms_deform_attn_loops`: the equation as loops. For reading, and the oracle of the tests.
2. `ms_deform_attn`: the same through `grid_sample`, on any device and in any floating dtype. The model calls this one.

    python kernels.py          # checks the second against the first, then times it

Notation: B batch, S tokens (all levels, one after the other), Q queries, M heads, D width of a head, L levels, P points per head and level.
"""
import time

import torch
import torch.nn.functional as F
from torch import Tensor


def sampling_locations(spatial_shapes: list[tuple[int, int]], reference_points: Tensor, offsets: Tensor) -> Tensor:
    """Where each head looks: (B, Q, M, L, P, 2), (x, y) in 0..1 of each level.

    A 2-d reference (x, y) is a point: offsets count in cells of the level sampled (Deformable DETR, section 4.1).
    A 4-d reference (cx, cy, w, h) is an anchor box: offsets count in half boxes, P points reaching one half box (section A.3).
    """
    ref = reference_points[:, :, None, None, None]                                  # (B, Q, 1, 1, 1, 2 or 4)
    if reference_points.shape[-1] == 2:
        size = torch.tensor([(w, h) for h, w in spatial_shapes], dtype=reference_points.dtype).to(offsets.device)
        return ref + offsets / size[:, None]                                        # (L, 1, 2) broadcasts over points
    return ref[..., :2] + offsets / offsets.shape[4] * ref[..., 2:] * 0.5


def ms_deform_attn_loops(value: Tensor, spatial_shapes: list[tuple[int, int]], reference_points: Tensor, offsets: Tensor,
                         attention_logits: Tensor) -> Tensor:
    """The equation as it is written: for each query and head, a weighted sum of L * P bilinear samples. Same contract as `ms_deform_attn`."""
    (B, _, M, D), (Q, P) = value.shape, (offsets.shape[1], offsets.shape[4])
    locations = sampling_locations(spatial_shapes, reference_points, offsets)
    weights = attention_logits.flatten(3).softmax(-1).view_as(attention_logits)     # A_mlqk, sums to 1 over levels and points
    starts = [sum(h * w for h, w in spatial_shapes[:level]) for level in range(len(spatial_shapes))]
    rows = []
    for b in range(B):
        for q in range(Q):
            for m in range(M):
                total = value.new_zeros(D)
                for level, (H, W) in enumerate(spatial_shapes):
                    for p in range(P):
                        x, y = locations[b, q, m, level, p] * value.new_tensor([W, H]) - 0.5   # cell centres lie at whole numbers
                        x0, y0 = x.floor(), y.floor()
                        for xi, yi in ((x0, y0), (x0 + 1, y0), (x0, y0 + 1), (x0 + 1, y0 + 1)):
                            if 0 <= xi < W and 0 <= yi < H:                         # zero outside
                                near = (1 - (x - xi).abs()) * (1 - (y - yi).abs())
                                token = starts[level] + int(yi) * W + int(xi)
                                total = total + weights[b, q, m, level, p] * near * value[b, token, m]
                rows.append(total)
    return torch.stack(rows).view(B, Q, M * D) if rows else value.new_zeros(B, Q, M * D)


def ms_deform_attn(value: Tensor, spatial_shapes: list[tuple[int, int]], reference_points: Tensor, offsets: Tensor,
                   attention_logits: Tensor) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, equation 3).

    value            (B, S, M, D)        projected tokens, levels one after the other, each row by row; S = sum of H * W
    spatial_shapes   [(H, W)] * L
    reference_points (B, Q, 2 or 4)      points or anchor boxes (cxcywh) in 0..1
    offsets          (B, Q, M, L, P, 2)  as the linear layer gives them, (x, y)
    attention_logits (B, Q, M, L, P)     before the softmax over levels and points
    Returns          (B, Q, M * D). Bilinear, zero outside the map, align_corners False.
    """
    (B, S, M, D), (Q, L, P) = value.shape, (offsets.shape[1], *offsets.shape[3:5])
    if S != sum(h * w for h, w in spatial_shapes) or L != len(spatial_shapes):
        raise ValueError(f"value has {S} tokens and offsets {L} levels, but spatial_shapes is {spatial_shapes}")
    dtype = value.dtype
    grid = 2 * sampling_locations(spatial_shapes, reference_points, offsets) - 1    # grid_sample counts from -1 to 1
    value = value.to(grid.dtype)                                                    # locations in half precision would miss their cell
    grid = grid.permute(3, 0, 2, 1, 4, 5).reshape(L, B * M, Q, P, 2)
    weights = attention_logits.flatten(3).softmax(-1).to(value.dtype)               # (B, Q, M, L * P)
    weights = weights.view(B, Q, M, L, P).permute(3, 0, 2, 1, 4).reshape(L, B * M, 1, Q, P)
    maps = value.permute(0, 2, 3, 1).reshape(B * M, D, S).split([h * w for h, w in spatial_shapes], dim=-1)
    out = value.new_zeros(B * M, D, Q)
    for level, (H, W) in enumerate(spatial_shapes):
        sampled = F.grid_sample(maps[level].unflatten(-1, (H, W)), grid[level], align_corners=False)   # (B * M, D, Q, P)
        out = out + (sampled * weights[level]).sum(-1)
    return out.view(B, M * D, Q).transpose(1, 2).to(dtype)


def random_inputs(B: int, Q: int, shapes: list[tuple[int, int]], M: int = 8, D: int = 32, P: int = 4, box: bool = False,
                  dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> tuple:
    """Arguments of `ms_deform_attn`, with references and offsets that also leave the map."""
    g = torch.Generator().manual_seed(seed)
    S, L = sum(h * w for h, w in shapes), len(shapes)
    references = torch.rand(B, Q, 4 if box else 2, generator=g, dtype=torch.float64) * 1.2 - (0 if box else 0.1)
    tensors = [torch.randn(B, S, M, D, generator=g, dtype=torch.float64), references,
               2 * torch.randn(B, Q, M, L, P, 2, generator=g, dtype=torch.float64), torch.randn(B, Q, M, L, P, generator=g, dtype=torch.float64)]
    value, references, offsets, logits = (t.to(device, dtype) for t in tensors)
    return value, shapes, references, offsets, logits


def main() -> None:
    small = [(5, 7), (3, 4), (1, 1)]
    for box in (False, True):
        arguments = random_inputs(1, 6, small, M=2, D=4, box=box, dtype=torch.float64)
        difference = (ms_deform_attn(*arguments) - ms_deform_attn_loops(*arguments)).abs().max().item()
        print(f"{'anchor boxes' if box else 'points':12} PyTorch against loops, float64: largest difference {difference:.1e}")
        assert difference < 1e-12
    shapes = [(64, 64), (32, 32), (16, 16), (8, 8)]
    value, _, references, offsets, logits = random_inputs(1, 5440, shapes)
    leaves = [t.requires_grad_() for t in (value, offsets, logits)]
    forward, backward = [], []
    for _ in range(5):
        start = time.perf_counter()
        out = ms_deform_attn(value, shapes, references, offsets, logits)
        middle = time.perf_counter()
        torch.autograd.grad(out.sum(), leaves)
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
    print(f"one encoder layer at 512 x 512, batch 1, {torch.get_num_threads()} threads: "
          f"forward {sorted(forward)[2] * 1e3:.0f} ms, backward {sorted(backward)[2] * 1e3:.0f} ms (medians of 5)")


if __name__ == "__main__":
    main()
