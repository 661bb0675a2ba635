"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3), the operator at the heart of encoder and decoder.

Four rungs of one equation, easiest first:

1. `ms_deform_attn_loops`: the equation as loops. For reading, and the oracle of the tests.
2. `ms_deform_attn_torch`: the same through `grid_sample`, on any device and in any floating dtype.
3. What runs. Triton kernels (`forward_kernel`, `backward_kernel`) on a GPU; `attend` and `attend_backward`, the same arithmetic in
   PyTorch, on a CPU and wherever `torch.use_deterministic_algorithms` is on.
4. `ms_deform_attn`: the operator that the model calls. Chooses by device, dtype and head width, and says once what it chose and why.

    python kernels.py            # checks the rungs against each other, then times them (GPU: the full benchmark; CPU: a short one)
    python kernels.py --static   # what the compiler made of the Triton kernels, for three GPU generations; needs no GPU

Notation: B batch, S tokens (all levels, one after the other), Q queries, M heads, D width of a head, L levels, P points per head and level.
"""
import collections
import contextlib
import functools
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from tqdm import tqdm

if __name__ == "__main__" and "--static" not in sys.argv and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                # before Triton is imported: its kernels are then checked on the CPU, in numpy
try:
    import triton
    import triton.language as tl
except ImportError:                                     # macOS and Windows have no Triton: PyTorch computes there
    triton, tl = None, types.SimpleNamespace(constexpr=None)

LOG2E = 1.4426950408889634                              # exp(x) = exp2(x * LOG2E); the hardware has exp2


# ---------------------------------------------------------------------------------------------------------------- 1. the equation
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


# ---------------------------------------------------------------------------------------------------------------- 2. grid_sample
def ms_deform_attn_torch(value: Tensor, spatial_shapes: list[tuple[int, int]], reference_points: Tensor, offsets: Tensor,
                         attention_logits: Tensor) -> Tensor:
    """The equation through `grid_sample`; autograd finds the gradients. Same contract as `ms_deform_attn`."""
    (B, S, M, D), (Q, L, P) = value.shape, (offsets.shape[1], *offsets.shape[3:5])
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


# ---------------------------------------------------------------------------------------------------------------- 3. in closed form
# Bilinear interpolation weighs a cell at distance d by the hat function max(0, 1 - |d|), once in x and once in y. Written so, nothing has
# to ask whether a point lies inside: the left one of two neighbouring cells is kept within 0 .. W - 2, so that both exist, and wherever the
# point is further away than one cell the hat is zero by itself. (A level that is one cell wide has no right cell: a hat of height 0.)
class Corners(NamedTuple):
    """The four cells around every sampling point; `distance`, `near` and `far` are (2, B, Q, M, L, P), x and y."""
    row: Tensor             # (B, Q, M, L, P) int32: the upper left cell's row in value.view(B * S * M, D)
    steps: Tensor           # (4, L) int32: cells from there to (left, upper), (right, upper), (left, lower), (right, lower)
    distance: Tensor        # of the point from the upper left cell's centre, in cells
    near: Tensor            # hat of the distance: weight of the left and of the upper cells
    far: Tensor             # hat of the distance - 1: weight of the right and of the lower cells
    scale: Tensor           # cells per unit of offset; broadcasts over (2, B, Q, M, L, P)

    def four(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Row and the two weights of each of the four."""
        (_, _, M, _, P), (left, upper), (right, lower) = self.row.shape, self.near, self.far
        for step, x, y in zip(self.steps, (left, right, left, right), (upper, upper, lower, lower), strict=True):
            yield self.row + (M * step[:, None]).expand(M, -1, P).contiguous(), x, y


def accumulator(value: Tensor) -> torch.dtype:
    """Sums and locations are kept in float32 at least: in bfloat16, a location in a map of 100 cells would be off by a third of a cell."""
    return torch.promote_types(value.dtype, torch.float32)


def corners(value: Tensor, spatial_shapes: list[tuple[int, int]], reference_points: Tensor, offsets: Tensor) -> Corners:
    (B, S, M, _), (L, P), device, dtype = value.shape, offsets.shape[3:5], value.device, accumulator(value)
    size = torch.tensor([[w for _, w in spatial_shapes], [h for h, _ in spatial_shapes]], device=device)
    right, below = (size[0] > 1).int(), (size[1] > 1) * size[0].int()
    steps = torch.stack((0 * right, right, below, below + right))
    # The levels' numbers are spread over (M, L, P) beforehand: combining them with (B, Q, M, L, P) is then one long loop per query.
    size = size.view(2, 1, 1, 1, L, 1).expand(-1, 1, 1, M, L, P)
    stride, size = (size[0] * M).int().contiguous(), size.to(dtype)
    ref = reference_points.to(dtype).movedim(-1, 0)[..., None, None, None]                              # (2 or 4, B, Q, 1, 1, 1)
    scale = torch.ones_like(size) if len(ref) == 2 else ref[2:] * (size / (2 * P))
    xy = torch.empty(2, *offsets.shape[:-1], dtype=dtype, device=device)            # in cells, whose centres lie at whole numbers
    torch.addcmul((ref[:2] * size).sub_(0.5), offsets.movedim(-1, 0).to(dtype), scale, out=xy)
    first = xy.nan_to_num().clamp_(min=0).minimum((size - 2).clamp_(min=0)).floor_()                    # of a NaN: row 0, distance NaN
    distance = xy.sub_(first)
    near = distance.abs().neg_().add_(1).clamp_(min=0)
    far = distance.sub(1).abs_().neg_().add_((size > 1).to(dtype)).clamp_(min=0)
    start = torch.tensor([0, *(h * w for h, w in spatial_shapes[:-1])], device=device).cumsum(0)[:, None]
    image, head = (torch.arange(n, device=device)[:, None, None] for n in (B, M))
    base = ((image[..., None, None] * S + start) * M + head).int().expand(-1, -1, -1, -1, P).contiguous()
    x0, y0 = first.int()
    row = y0.mul_(stride).add_(x0, alpha=M).add_(base)
    return Corners(row, steps, distance, near, far, scale)


def attend(value: Tensor, spatial_shapes: list[tuple[int, int]], reference_points: Tensor, offsets: Tensor,
           attention_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, Q, M * D) and log-sum-exp of the logits (B, Q, M), in base 2 as the kernel has it.

    `embedding_bag` adds up weighted rows of a table: here L * P rows per query and head for each corner. No array of samples
    (B, M, D, Q, P) is ever written, which is where `grid_sample` spends its time on a CPU.
    """
    (B, S, M, D), (Q, L, P) = value.shape, (offsets.shape[1], *offsets.shape[3:5])
    c, logits = corners(value, spatial_shapes, reference_points, offsets), attention_logits.to(accumulator(value))
    lse = logits.flatten(3).logsumexp(-1)
    a = (logits - lse[..., None, None]).exp_()
    table = value.reshape(B * S * M, D).to(a.dtype)
    out = sum(F.embedding_bag(row.view(-1, L * P), table, per_sample_weights=(y * a).mul_(x).view(-1, L * P), mode="sum") for row, x, y in c.four())
    return out.view(B, Q, M * D).to(value.dtype), lse * LOG2E


def attend_backward(grad: Tensor, value: Tensor, spatial_shapes: list[tuple[int, int]], reference_points: Tensor, offsets: Tensor,
                    attention_logits: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, offsets and logits. All follow from the weights and the products <grad, corner>; nothing is added up in an
    order that depends on threads, so that this is the deterministic version, too."""
    (B, S, M, D), (Q, L, P) = value.shape, (offsets.shape[1], *offsets.shape[3:5])
    c, logits = corners(value, spatial_shapes, reference_points, offsets), attention_logits.to(accumulator(value))
    a = (logits - lse[..., None, None] / LOG2E).exp_()
    grad, table = grad.reshape(B * Q * M, D).to(a.dtype), value.reshape(B * S * M, D).to(a.dtype)
    # The products are entries of grad @ table.T: of all those, the ones that a sparse matrix names are computed. (It may name one twice, but
    # in all no more than fit: a map of a few cells is extended.)
    bags, dots = torch.arange(0, a.numel() + 1, L * P, dtype=torch.int32, device=a.device), []
    table = F.pad(table, (0, 0, 0, max(0, L * P - len(table))))
    for row, _, _ in c.four():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse")                             # "CSR is in beta state", "invariant checks are disabled"
            wanted = torch.sparse_csr_tensor(bags, row.view(-1), torch.zeros_like(a).view(-1), (len(grad), len(table)), check_invariants=False)
        dots.append(torch.sparse.sampled_addmm(wanted, grad, table.t(), beta=0).values().view_as(a))
    (left, upper), (right, lower) = c.near, c.far
    columns = upper * dots[0] + lower * dots[2], upper * dots[1] + lower * dots[3]
    rows = left * dots[0] + right * dots[1], left * dots[2] + right * dots[3]
    grad_offsets = torch.empty(offsets.shape, dtype=a.dtype, device=a.device)
    for i, lines in enumerate((columns, rows)):
        toward = slope(c.distance[i], c.near[i]).mul_(lines[0]).addcmul_(slope(c.distance[i] - 1, c.far[i]), lines[1])
        torch.mul(toward.mul_(a), c.scale[i], out=grad_offsets[..., i])
    grad_a = (upper * rows[0]).addcmul_(lower, rows[1]).mul_(a)
    grad_logits = grad_a - a * grad_a.sum((-2, -1), keepdim=True)                   # through the softmax
    return value_gradient(value, c, a, grad), grad_offsets.to(offsets.dtype), grad_logits.to(attention_logits.dtype)


def slope(distance: Tensor, height: Tensor) -> Tensor:
    """Derivative of the hat: 1 on the way up (left of the cell), -1 on the way down, 0 outside."""
    return height.sign().copysign_(distance).neg_()


def value_gradient(value: Tensor, c: Corners, a: Tensor, grad: Tensor) -> Tensor:
    """Each query's gradient goes, weighted, to the cells that it looked at. A scatter; done as a sort and a sum of bags, twice: points
    that share their upper left cell are added up for each corner first, so that few rows are left to sort for the second time."""
    row, order = c.row.view(-1).sort(stable=True)
    _, counts = row.unique_consecutive(return_counts=True)
    first = counts.cumsum(0) - counts
    query, seen = order // a.shape[-2:].numel(), order.index_select(0, first)
    sums, rows = [], []
    for row, x, y in c.four():
        sums.append(F.embedding_bag(query, grad, first, per_sample_weights=(y * a).mul_(x).view(-1).index_select(0, order), mode="sum"))
        rows.append(row.view(-1).index_select(0, seen))
    row, order = torch.cat(rows).sort(stable=True)
    bags = torch.searchsorted(row, torch.arange(value.shape[:3].numel(), dtype=torch.int32, device=row.device))
    return F.embedding_bag(order, torch.cat(sums), bags, mode="sum").view_as(value).to(value.dtype)


# ---------------------------------------------------------------------------------------------------------------- 3. in Triton
# A program serves a tile of BQ queries, of one head in one image, and holds their output (BQ, D) in registers. What limits the speed is
# not arithmetic but the number of instructions issued, then the gathers from cache. Hence:
#   - A gather moves 16 bytes per lane, the widest there is: 4 float32 or 8 bfloat16 channels. With D = 32 in float32, 8 lanes would
#     read a cell, and all 8 would compute where it lies. So a cell is cut into two halves, which the same lanes read one after the
#     other: 4 lanes a query, and every coordinate serves twice the channels. BQ follows: 32 lanes x warps x one vector each cover a half
#     tile BQ x D / 2. A larger tile would not fit the lanes one to one, and (BQ, 1) tensors would travel through shared memory.
#   - Everything about a point folds into four numbers, attention x bilinear weight, and then costs one multiply-add per channel.
#   - Loads are unconditional: hats of height zero do what masks would.
#   - The softmax is computed on the way, with its maximum taken beforehand; offsets and logits are read as the linear layers leave them.
#     In units of cells the sampling location is ref * W - 1/2 + offset: offsets in bfloat16 err in cells, not in images.
#   - The backward recomputes all this. Its tile is small, one warp, because each point needs the four products <grad, cell>, sums over
#     the channels: within one warp those are shuffles, without barriers. Gradients of values are added up in memory, in float32, by
#     reductions that return nothing and order nothing (`sem="relaxed"`; the default would fence each one), 16 bytes wide from sm_90 on.
#   - Points are unrolled forward, where their loads overlap; backward, a loop keeps the registers few. A level's size is data, not a
#     constant: new image sizes compile nothing.
def kernel(function: Callable) -> Callable:
    """Triton compiles anew for sizes that are multiples of 16; here that would buy nothing."""
    return triton.jit(function, do_not_specialize=("S", "Q")) if triton else function


@kernel
def level_geometry(levels, level, reference, P: tl.constexpr, R: tl.constexpr, ACC: tl.constexpr):
    """Of one level: width, height, first token, cells to the right and below (0 where there are none), and x = base + scale * offset."""
    H, W, start = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1), tl.load(levels + 3 * level + 2)
    x_base, y_base = tl.load(reference).to(ACC) * W - 0.5, tl.load(reference + 1).to(ACC) * H - 0.5
    x_scale, y_scale = 1.0, 1.0
    if R == 4:
        x_scale, y_scale = tl.load(reference + 2).to(ACC) * W * (0.5 / P), tl.load(reference + 3).to(ACC) * H * (0.5 / P)
    return W, H, start, tl.minimum(W - 1, 1), tl.minimum(H - 1, 1), x_base, y_base, x_scale, y_scale


@kernel
def hats(x, size, step, ACC: tl.constexpr):
    """Left of the two cells around x, distance from it, and the weights of both (`Corners` has the same in PyTorch)."""
    first = tl.minimum(tl.maximum(x, 0.0), (size - 1 - step).to(ACC)).to(tl.int32)      # clamped before it becomes an integer: x may be huge
    distance = x - first.to(ACC)
    return first, distance, tl.maximum(1 - tl.abs(distance), 0.0), tl.maximum(step.to(ACC) - tl.abs(distance - 1), 0.0)


@kernel
def hat_slope(distance, height):
    return tl.where(height > 0, tl.where(distance < 0, 1.0, -1.0), 0.0)


@kernel
def gather(result, corner, right, below, w00, w10, w01, w11, ACC: tl.constexpr):
    """Adds the weighted sum of four cells; corner: pointers (BQ, D / 2) to the upper left one, right and below: from there, in elements."""
    result += w00 * tl.load(corner).to(ACC)
    result += w10 * tl.load(corner + right).to(ACC)
    result += w01 * tl.load(corner + below).to(ACC)
    result += w11 * tl.load(corner + below + right).to(ACC)
    return result


@kernel
def scatter(corner, half, w, g0, g1):
    """One cell gets its share of the gradient."""
    tl.atomic_add(corner, w * g0, sem="relaxed")
    tl.atomic_add(corner + half, w * g1, sem="relaxed")


@kernel
def dot(corner, half, g0, g1, ACC: tl.constexpr):
    """Product of the gradient with one cell, (BQ, 1): first the lane's own channels of both halves, then across lanes."""
    return tl.sum(g0 * tl.load(corner).to(ACC) + g1 * tl.load(corner + half).to(ACC), 1, keep_dims=True)


@kernel
def forward_kernel(value, levels, reference, offsets, logits, out, lse, S, Q, M: tl.constexpr, D: tl.constexpr, L: tl.constexpr,
                   P: tl.constexpr, R: tl.constexpr, BQ: tl.constexpr, ACC: tl.constexpr):
    m, b = tl.program_id(0) % M, tl.program_id(1).to(tl.int64)                          # 64 bits up to the image's base, 32 within it
    query = tl.program_id(0) // M * BQ + tl.arange(0, BQ)[:, None]
    q, real = tl.minimum(query, Q - 1), query < Q                                       # the last tile's surplus repeats the last query
    row, channel = q * M + m, tl.arange(0, D // 2)[None, :]
    value += (b * S * M + m) * D + channel
    reference += (b * Q + q) * R
    offsets += b * Q * M * L * P * 2 + row * (L * P * 2)
    logits += b * Q * M * L * P + row * (L * P)
    largest = tl.load(logits).to(ACC)
    for j in tl.static_range(1, L * P):
        largest = tl.maximum(largest, tl.load(logits + j).to(ACC))
    largest *= 1.4426950408889634                                                       # log2(e): the hardware's exponential has base 2
    total = tl.zeros((BQ, 1), ACC)
    result0, result1 = tl.zeros((BQ, D // 2), ACC), tl.zeros((BQ, D // 2), ACC)
    for level in tl.range(L):
        W, H, start, right, below, x_base, y_base, x_scale, y_scale = level_geometry(levels, level, reference, P, R, ACC)
        for p in tl.static_range(P):
            i = level * P + p
            x0, _, wx0, wx1 = hats(x_base + x_scale * tl.load(offsets + 2 * i).to(ACC), W, right, ACC)
            y0, _, wy0, wy1 = hats(y_base + y_scale * tl.load(offsets + 2 * i + 1).to(ACC), H, below, ACC)
            a = tl.exp2(tl.load(logits + i).to(ACC) * 1.4426950408889634 - largest)
            total += a
            w00, w10, w01, w11 = wx0 * (a * wy0), wx1 * (a * wy0), wx0 * (a * wy1), wx1 * (a * wy1)
            corner = value + (start + y0 * W + x0) * (M * D)
            result0 = gather(result0, corner, right * (M * D), below * W * (M * D), w00, w10, w01, w11, ACC)
            result1 = gather(result1, corner + D // 2, right * (M * D), below * W * (M * D), w00, w10, w01, w11, ACC)
    out += b * Q * M * D + row * D + channel
    tl.store(out, result0 / total, mask=real)
    tl.store(out + D // 2, result1 / total, mask=real)
    tl.store(lse + b * Q * M + row, largest + tl.log2(total), mask=real)


@kernel
def backward_kernel(grad, value, levels, reference, offsets, logits, out, lse, grad_value, grad_offsets, grad_logits, S, Q,
                    M: tl.constexpr, D: tl.constexpr, L: tl.constexpr, P: tl.constexpr, R: tl.constexpr, BQ: tl.constexpr, ACC: tl.constexpr):
    m, b = tl.program_id(0) % M, tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) // M * BQ + tl.arange(0, BQ)[:, None]
    q, real = tl.minimum(query, Q - 1), query < Q
    row, channel = q * M + m, tl.arange(0, D // 2)[None, :]
    value += (b * S * M + m) * D + channel
    grad_value += (b * S * M + m) * D + channel
    reference += (b * Q + q) * R
    points = b * Q * M * L * P
    offsets += 2 * points + row * (L * P * 2)
    grad_offsets += 2 * points + row * (L * P * 2)
    logits += points + row * (L * P)
    grad_logits += points + row * (L * P)
    grad += b * Q * M * D + row * D + channel
    out += b * Q * M * D + row * D + channel
    g0, g1 = tl.where(real, tl.load(grad).to(ACC), 0.0), tl.where(real, tl.load(grad + D // 2).to(ACC), 0.0)        # surplus queries add zeros
    # <grad, out>, what the softmax takes off; from the output as it was rounded, as in FlashAttention (arXiv 2205.14135).
    delta = dot(out, D // 2, g0, g1, ACC)
    norm = tl.load(lse + b * Q * M + row)
    for level in tl.range(L):
        W, H, start, right, below, x_base, y_base, x_scale, y_scale = level_geometry(levels, level, reference, P, R, ACC)
        for p in tl.range(P, loop_unroll_factor=1):
            i = level * P + p
            a = tl.exp2(tl.load(logits + i).to(ACC) * 1.4426950408889634 - norm)
            x0, dx, wx0, wx1 = hats(x_base + x_scale * tl.load(offsets + 2 * i).to(ACC), W, right, ACC)
            y0, dy, wy0, wy1 = hats(y_base + y_scale * tl.load(offsets + 2 * i + 1).to(ACC), H, below, ACC)
            cell, to_right, to_below = (start + y0 * W + x0) * (M * D), right * (M * D), below * W * (M * D)
            dot00, dot10 = dot(value + cell, D // 2, g0, g1, ACC), dot(value + cell + to_right, D // 2, g0, g1, ACC)
            dot01, dot11 = dot(value + cell + to_below, D // 2, g0, g1, ACC), dot(value + cell + to_below + to_right, D // 2, g0, g1, ACC)
            left_dot, right_dot = wy0 * dot00 + wy1 * dot01, wy0 * dot10 + wy1 * dot11
            tl.store(grad_logits + i, a * (wx0 * left_dot + wx1 * right_dot - delta), mask=real)
            tl.store(grad_offsets + 2 * i, x_scale * a * (hat_slope(dx, wx0) * left_dot + hat_slope(dx - 1, wx1) * right_dot), mask=real)
            upper_dot, lower_dot = wx0 * dot00 + wx1 * dot10, wx0 * dot01 + wx1 * dot11
            tl.store(grad_offsets + 2 * i + 1, y_scale * a * (hat_slope(dy, wy0) * upper_dot + hat_slope(dy - 1, wy1) * lower_dot), mask=real)
            wy0, wy1 = a * wy0, a * wy1
            scatter(grad_value + cell, D // 2, wx0 * wy0, g0, g1)
            scatter(grad_value + cell + to_right, D // 2, wx1 * wy0, g0, g1)
            scatter(grad_value + cell + to_below, D // 2, wx0 * wy1, g0, g1)
            scatter(grad_value + cell + to_below + to_right, D // 2, wx1 * wy1, g0, g1)


WARPS = {"forward": 4, "backward": 1}


def options(which: str, arch: int) -> dict[str, Any]:
    """How to compile: multiply-adds in one instruction. Before sm_90 a reduction adds single numbers, and all the more of them; there the
    backward would take 128 registers if one let it, and only 16 warps would fit on a multiprocessor."""
    return {"num_warps": WARPS[which], "enable_fp_fusion": True} | ({"maxnreg": 96} if which == "backward" and arch < 90 else {})


def tile(which: str, D: int, itemsize: int) -> int:
    """Queries per program; itemsize in bytes, of the values forward and of their gradients backward."""
    return 32 * WARPS[which] * min(16 // itemsize, D // 2) // (D // 2)


@functools.lru_cache(maxsize=1024)
def level_table(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(L, 3) int32: H, W, first token. Kept, so that a size seen before costs no copy to the device."""
    starts = itertools.accumulate((h * w for h, w in shapes), initial=0)
    return torch.tensor([(h, w, s) for (h, w), s in zip(shapes, starts)], dtype=torch.int32, device=device)


def launch(which: str, value: Tensor, spatial_shapes: list[tuple[int, int]], before: list[Tensor], reference_points: Tensor, offsets: Tensor,
           attention_logits: Tensor, after: list[Tensor]) -> None:
    (B, S, M, D), (Q, L, P), acc = value.shape, (offsets.shape[1], *offsets.shape[3:5]), accumulator(value)
    BQ = tile(which, D, (value if which == "forward" else torch.empty((), dtype=acc)).element_size())
    if B * Q == 0:
        return
    tensors = [*before, value, level_table(tuple(spatial_shapes), value.device), reference_points.to(acc), offsets, attention_logits, *after]
    function = forward_kernel if which == "forward" else backward_kernel
    major, minor = torch.cuda.get_device_capability(value.device) if value.is_cuda else (0, 0)
    with torch.cuda.device_of(value):
        function[(M * triton.cdiv(Q, BQ), B)](
            *(t.contiguous() for t in tensors), S, Q, M=M, D=D, L=L, P=P, R=reference_points.shape[-1], BQ=BQ,
            ACC=tl.float64 if acc == torch.float64 else tl.float32, **options(which, 10 * major + minor))


def stored(like: Tensor) -> torch.dtype:
    """Of a kernel's output. Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds: there, PyTorch does it afterwards."""
    return torch.float32 if like.dtype == torch.bfloat16 and triton.knobs.runtime.interpret else like.dtype


def triton_forward(value: Tensor, spatial_shapes: list[tuple[int, int]], reference_points: Tensor, offsets: Tensor,
                   attention_logits: Tensor) -> tuple[Tensor, Tensor]:
    """`attend` by the Triton kernel."""
    (B, _, M, D), Q = value.shape, offsets.shape[1]
    out, lse = value.new_empty(B, Q, M * D, dtype=stored(value)), value.new_empty(B, Q, M, dtype=accumulator(value))
    launch("forward", value, spatial_shapes, [], reference_points, offsets, attention_logits, [out, lse])
    return out.to(value.dtype), lse


def triton_backward(grad: Tensor, value: Tensor, spatial_shapes: list[tuple[int, int]], reference_points: Tensor, offsets: Tensor,
                    attention_logits: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` by the Triton kernel."""
    grad_value = torch.zeros_like(value, dtype=accumulator(value), memory_format=torch.contiguous_format)
    grad_offsets, grad_logits = (t.new_empty(t.shape, dtype=stored(t)) for t in (offsets, attention_logits))
    launch("backward", value, spatial_shapes, [grad], reference_points, offsets, attention_logits, [out, lse, grad_value, grad_offsets, grad_logits])
    return grad_value.to(value.dtype), grad_offsets.to(offsets.dtype), grad_logits.to(attention_logits.dtype)


# ---------------------------------------------------------------------------------------------------------------- 4. the operator
# Registered with PyTorch, forward and backward, so that compile and export take it for what it is, one operator with known shapes, instead
# of looking inside. Level sizes travel flat, [H0, W0, H1, W1 ...]: an operator's arguments may be lists of integers, not of pairs.
@torch.library.custom_op("maskdino::ms_deform_attn", mutates_args=())
def forward_op(value: Tensor, sizes: list[int], reference_points: Tensor, offsets: Tensor, attention_logits: Tensor) -> tuple[Tensor, Tensor]:
    rung = triton_forward if takes_triton(value) else attend
    return rung(value, pairs(sizes), reference_points, offsets, attention_logits)


@torch.library.custom_op("maskdino::ms_deform_attn_backward", mutates_args=())
def backward_op(grad: Tensor, value: Tensor, sizes: list[int], reference_points: Tensor, offsets: Tensor, attention_logits: Tensor, out: Tensor,
                lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if takes_triton(value):
        return triton_backward(grad, value, pairs(sizes), reference_points, offsets, attention_logits, out, lse)
    return attend_backward(grad, value, pairs(sizes), reference_points, offsets, attention_logits, lse)


@forward_op.register_fake
def _(value: Tensor, sizes: list[int], reference_points: Tensor, offsets: Tensor, attention_logits: Tensor) -> tuple[Tensor, Tensor]:
    (B, _, M, D), Q = value.shape, offsets.shape[1]
    return value.new_empty(B, Q, M * D), value.new_empty(B, Q, M, dtype=accumulator(value))


@backward_op.register_fake
def _(grad: Tensor, value: Tensor, sizes: list[int], reference_points: Tensor, offsets: Tensor, attention_logits: Tensor, out: Tensor,
      lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (value, offsets, attention_logits))


def save(ctx: Any, inputs: tuple, output: tuple) -> None:
    value, ctx.sizes, *others = inputs
    ctx.save_for_backward(value, *others, *output)


def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    value, reference_points, offsets, logits, out, lse = ctx.saved_tensors
    grad_value, grad_offsets, grad_logits = backward_op(grad, value, ctx.sizes, reference_points, offsets, logits, out, lse)
    grad_reference = reference_gradient(pairs(ctx.sizes), reference_points, offsets, grad_offsets) if ctx.needs_input_grad[2] else None
    return grad_value, None, grad_reference, grad_offsets, grad_logits


def reference_gradient(spatial_shapes: list[tuple[int, int]], reference_points: Tensor, offsets: Tensor, grad_offsets: Tensor) -> Tensor:
    """x = cx * W + offset * w * W / (2 P): the gradient of cx, and of w, is that of the offset in other units. Only learned anchors ask for it."""
    grad_offsets, everything = grad_offsets.to(reference_points.dtype), (2, 3, 4)
    if reference_points.shape[-1] == 2:
        size = torch.tensor([(w, h) for h, w in spatial_shapes], device=offsets.device)[:, None]
        return (grad_offsets * size).sum(everything)
    extent = reference_points[..., 2:].clamp(min=torch.finfo(reference_points.dtype).tiny)
    return torch.cat(((grad_offsets * (2 * offsets.shape[4])).sum(everything) / extent, (grad_offsets * offsets).sum(everything) / extent), -1)


forward_op.register_autograd(backward, setup_context=save)


@register_flop_formula(torch.ops.maskdino.ms_deform_attn)
def flops(value: torch.Size, sizes: list[int], reference_points: torch.Size, offsets: torch.Size, attention_logits: torch.Size, **_: Any) -> int:
    """For PyTorch's FLOP counter: each point adds up 4 corners of D numbers, 8 D FLOPs. Softmax and the corners' weights are not counted."""
    return 8 * value[-1] * attention_logits.numel()


def under_autocast(device: str) -> Callable:
    """Values in autocast's dtype; offsets and logits as they come; references, which 16 bits would spoil, as they are."""
    def rule(value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        dtype = value.dtype if value.dtype == torch.float64 else torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return forward_op(value.to(dtype), *others)
    return rule


library = torch.library.Library("maskdino", "FRAGMENT")
library.impl("ms_deform_attn", under_autocast("cpu"), "AutocastCPU")
library.impl("ms_deform_attn", under_autocast("cuda"), "AutocastCUDA")


def pairs(sizes: list[int]) -> list[tuple[int, int]]:
    return list(zip(sizes[::2], sizes[1::2]))


def takes_triton(value: Tensor) -> bool:
    capability = torch.cuda.get_device_capability(value.device) if value.is_cuda and torch.version.cuda else (0, 0)
    return choice(value.device.type, value.dtype, value.shape[-1], capability, torch.are_deterministic_algorithms_enabled())


@functools.cache
def choice(device: str, dtype: torch.dtype, D: int, capability: tuple[int, int], deterministic: bool) -> bool:
    """Triton or the closed form? Decided by what is known beforehand, never by trying; said once."""
    reasons = {f"the values are on {device}": device != "cuda",
               "Triton is not installed": triton is None,
               f"the GPU's compute capability {capability} is below (8, 0)": capability < (8, 0),
               f"the head width {D} is not 8, 16, 32 or 64": D not in (8, 16, 32, 64),
               "deterministic algorithms are asked for": deterministic}
    against = [reason for reason, holds in reasons.items() if holds]
    if os.environ.get("RANK", "0") == "0":
        rung = f"PyTorch in closed form, because {against[0]}" if against else "Triton kernels"
        tqdm.write(f"ms_deform_attn ({device}, {str(dtype).removeprefix('torch.')}, head width {D}): {rung}", file=sys.stderr)
    return not against


def ms_deform_attn(value: Tensor, spatial_shapes: list[tuple[int, int]], reference_points: Tensor, offsets: Tensor,
                   attention_logits: Tensor) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, equation 3).

    value            (B, S, M, D)        projected tokens, levels one after the other, each row by row; S = sum of H * W
    spatial_shapes   [(H, W)] * L
    reference_points (B, Q, 2 or 4)      points or anchor boxes (cxcywh) in 0..1, float32 or float64
    offsets          (B, Q, M, L, P, 2)  as the linear layer gives them, (x, y)
    attention_logits (B, Q, M, L, P)     before the softmax over levels and points
    Returns          (B, Q, M * D) in the dtype of value. Bilinear, zero outside the map, align_corners False.

    Values, offsets and logits may have any floating dtypes; sums are kept in float32 (float64 for float64 values). Differentiable once;
    `ms_deform_attn_torch` where more is needed. Raises ValueError when the shapes don't fit together.
    """
    (B, S, M, _), (Q, L, P) = value.shape, (offsets.shape[1], *offsets.shape[3:5])
    if S != sum(h * w for h, w in spatial_shapes) or L != len(spatial_shapes):
        raise ValueError(f"value has {S} tokens and offsets {L} levels, but spatial_shapes is {spatial_shapes}")
    if offsets.shape != (B, Q, M, L, P, 2) or attention_logits.shape != (B, Q, M, L, P) or reference_points.shape not in ((B, Q, 2), (B, Q, 4)):
        raise ValueError(f"value {tuple(value.shape)}, reference_points {tuple(reference_points.shape)}, offsets {tuple(offsets.shape)} and "
                         f"attention_logits {tuple(attention_logits.shape)} do not fit together")
    if value.device.type not in ("cpu", "cuda", "meta"):                                # meta: shapes alone
        return ms_deform_attn_torch(value, spatial_shapes, reference_points, offsets, attention_logits)
    return forward_op(value, [n for shape in spatial_shapes for n in shape], reference_points, offsets, attention_logits)[0]


# ---------------------------------------------------------------------------------------------------------------- check
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}      # relative; 16 bits: the output's rounding


def random_inputs(B: int, Q: int, shapes: list[tuple[int, int]], M: int = 8, D: int = 32, P: int = 4, box: bool = False,
                  dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> tuple:
    """Arguments of `ms_deform_attn`, with references and offsets that also leave the map."""
    g = torch.Generator().manual_seed(seed)
    S, L = sum(h * w for h, w in shapes), len(shapes)
    references = torch.rand(B, Q, 4 if box else 2, generator=g, dtype=torch.float64) * 1.2 - (0 if box else 0.1)
    tensors = [torch.randn(B, S, M, D, generator=g, dtype=torch.float64), references,
               2 * torch.randn(B, Q, M, L, P, 2, generator=g, dtype=torch.float64), torch.randn(B, Q, M, L, P, generator=g, dtype=torch.float64)]
    value, _, offsets, logits = (t.to(device, dtype) for t in tensors)
    return value, shapes, references.to(device, torch.promote_types(dtype, torch.float32)), offsets, logits


def errors(rung: Callable, value: Tensor, shapes: list, references: Tensor, offsets: Tensor, logits: Tensor) -> dict[str, float]:
    """Largest differences of output and gradients from `grid_sample` in float64 on the same inputs, relative to the largest entry.

    rung(grad, *arguments) -> (output, grad_value, grad_offsets, grad_logits).
    """
    exact = [t.detach().double().requires_grad_() for t in (value, offsets, logits)]
    out = ms_deform_attn_torch(exact[0], shapes, references.double(), *exact[1:])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.device, value.dtype)
    wanted = [out.detach(), *torch.autograd.grad(out, exact, grad.double())]
    with poisoned_memory():
        got = rung(grad, value, shapes, references, offsets, logits)
    return {name: ((g.double() - w).abs().max() / w.abs().max().clamp(min=1e-30)).item() if w.numel() else 0.0
            for name, g, w in zip(("output", "grad_value", "grad_offsets", "grad_logits"), got, wanted, strict=True)}


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory comes filled with NaN, which PyTorch does for us in its deterministic mode: an output that nobody writes is found out."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def by_triton(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    out, lse = triton_forward(*arguments)
    return out, *triton_backward(grad, *arguments, out, lse)


def in_closed_form(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    out, lse = attend(*arguments)
    return out, *attend_backward(grad, *arguments, lse)


def check(device: str) -> None:
    small = [(5, 7), (3, 4), (1, 1), (1, 9)]
    for box in (False, True):
        arguments = random_inputs(1, 6, small, M=2, D=4, box=box, dtype=torch.float64, device=device)
        difference = (ms_deform_attn_torch(*arguments) - ms_deform_attn_loops(*arguments)).abs().max().item()
        print(f"grid_sample against loops, float64, {'anchor boxes' if box else 'points'}: {difference:.1e}")
        assert difference < 1e-12
        value, _, *others = random_inputs(1, 3, small, M=2, D=8, P=2, box=box, dtype=torch.float64, device=device)
        leaves = [t.requires_grad_() for t in (value, *others)]
        torch.autograd.gradcheck(lambda v, *others: ms_deform_attn(v, small, *others), leaves, nondet_tol=1e-12)        # raises; atomics vary
    print("gradients of the operator against finite differences, float64: equal")
    rungs = {"closed form": in_closed_form} | ({"Triton kernels" + (" (interpreted)" if device == "cpu" else ""): by_triton} if triton else {})
    for name, rung in rungs.items():
        for dtype, tolerance in TOLERANCE.items():
            found = [errors(rung, *random_inputs(2, 19, small, M=2, D=32, P=3, box=box, dtype=dtype, device=device, seed=int(box))) for box in (False, True)]
            worst = {key: max(f[key] for f in found) for key in found[0]}
            print(f"{name} against grid_sample in float64, {str(dtype)[6:]}: " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))
            assert max(worst.values()) < tolerance, f"more than {tolerance}"


# ---------------------------------------------------------------------------------------------------------------- static
def disassemble(which: str, dtype: str, arch: int, D: int = 32, L: int = 4, P: int = 4, R: int = 2) -> tuple[list[str], dict[str, int], str]:
    """Compiles a kernel for a GPU that need not be there: machine instructions, jump targets, resource usage."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    function = forward_kernel if which == "forward" else backward_kernel
    acc, itemsize = ("fp64", 8) if dtype == "fp64" else ("fp32", 4)
    constants = {"M": 8, "D": D, "L": L, "P": P, "R": R, "ACC": tl.float64 if acc == "fp64" else tl.float32,
                 "BQ": tile(which, D, itemsize if which == "backward" else {"bf16": 2, "fp16": 2}.get(dtype, itemsize))}
    types = {"levels": "*i32", "reference": f"*{acc}", "lse": f"*{acc}", "grad_value": f"*{acc}", "S": "i32", "Q": "i32"}
    signature = {name: "constexpr" if name in constants else types.get(name, f"*{dtype}") for name in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options(which, arch))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tools = triton.knobs.nvidia
        text = subprocess.run([tools.nvdisasm.path, "-c", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([tools.cuobjdump.path, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    return instructions, labels, usage


def static_row(which: str, dtype: str, arch: int, **shape: int) -> dict[str, Any]:
    """What decides about speed and can be read off machine code. `per_point`: warp instructions per query, head and point, the whole level
    loop counted, the prologue (its logits' maximum too) left out."""
    instructions, labels, usage = disassemble(which, dtype, arch, **shape)
    loops = []
    for i, instruction in enumerate(instructions):
        jump = re.search(r"BRA.*(\.L_x_\d+)", instruction)
        if jump and labels.get(jump[1], i) < i and any("LDG" in x for x in instructions[labels[jump[1]]:i]):
            loops.append(instructions[labels[jump[1]]:i + 1])
    inner, outer, P = min(loops, key=len), max(loops, key=len), shape.get("P", 4)
    level = len(outer) + (P - 1) * len(inner) if inner is not outer else len(outer)
    queries = tile(which, shape.get("D", 32), 2 if which == "forward" and dtype in ("bf16", "fp16") else 8 if dtype == "fp64" else 4)
    count = collections.Counter(re.sub(r"^@!?U?P\d+ ", "", x).split()[0] for x in instructions)
    named = lambda *prefixes: sum(n for name, n in count.items() if name.startswith(prefixes))          # noqa: E731
    return {"kernel": which, "dtype": dtype, "arch": arch, "registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "stack": int(re.search(r"STACK:(\d+)", usage)[1]), "spills": named("LDL", "STL"),
            "gathers_128": count["LDG.E.128"], "gathers_64": count["LDG.E.64"],
            "reductions": named("RED"), "reductions_v4": sum(n for name, n in count.items() if name.startswith("RED") and "F32x4" in name),
            "atomics": named("ATOM"), "fences": named("MEMBAR", "CCTL", "ERRBAR"), "per_point": level * WARPS[which] / (queries * P)}


def static_table() -> list[dict[str, Any]]:
    return [static_row(which, dtype, arch) for which in ("forward", "backward") for dtype in ("fp32", "bf16") for arch in (80, 90, 100)]


def print_table(rows: list[dict[str, Any]]) -> None:
    cells = [list(rows[0]), *([f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


# ---------------------------------------------------------------------------------------------------------------- benchmark
R50, SWIN_L = ((100, 168), (50, 84), (25, 42), (13, 21)), ((200, 336), (100, 168), (50, 84), (25, 42), (13, 21))     # 800 x 1344 pixels
SMALL = ((64, 64), (32, 32), (16, 16), (8, 8))                                                                       # 512 x 512


def workload(shapes: tuple, queries: int | None, spread: float | None, B: int, dtype: torch.dtype, device: str) -> tuple:
    """Arguments as a model makes them. queries None: an encoder layer, every token looks around itself. Offsets: the initial pattern of
    `MSDeformAttn` plus noise of `spread` cells; None: points anywhere on the map."""
    M, D, P, L = 8, 32, 4, len(shapes)
    S, g = sum(h * w for h, w in shapes), torch.Generator(device).manual_seed(0)
    random = functools.partial(torch.randn, generator=g, device=device)
    if queries is None:
        grids = [torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij") for h, w in shapes]
        references = torch.cat([torch.stack((x, y), -1).flatten(0, 1) for y, x in grids]).to(device).expand(B, -1, -1).contiguous()
    else:
        references = torch.cat((torch.rand(B, queries, 2, generator=g, device=device), 0.3 * torch.rand(B, queries, 2, generator=g, device=device)), -1)
    Q = references.shape[1]
    angle = torch.arange(M, device=device) * (2 * torch.pi / M)
    star = torch.stack((angle.cos(), angle.sin()), -1)[:, None, None] * torch.arange(1, P + 1, device=device)[:, None]
    if spread is None:
        size = torch.tensor([(w, h) for h, w in shapes], device=device)[:, None]
        offsets = (torch.rand(B, Q, M, L, P, 2, generator=g, device=device) - references[:, :, None, None, None, :2]) * size
        references = references[..., :2].contiguous()
    else:
        offsets = star + spread * random(B, Q, M, L, P, 2)
    return random(B, S, M, D).to(dtype), list(shapes), references, offsets.to(dtype), random(B, Q, M, L, P).to(dtype)


def quantiles(run: Callable[[int], Any], device: str, repeats: int) -> list[float]:
    """Microseconds at 20, 50 and 80 percent; run(i) is the i-th repetition."""
    times = []
    for i in range(-3, repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run(i)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        else:
            start = time.perf_counter()
            run(i)
            times.append((time.perf_counter() - start) * 1e6)
    return torch.tensor(times[3:]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()


def official(value: Tensor, spatial_shapes: list, reference_points: Tensor, offsets: Tensor, attention_logits: Tensor) -> Tensor:
    """The released CUDA operator, with the softmax and the arithmetic of locations that it leaves to its caller."""
    import MultiScaleDeformableAttention as op
    sizes = torch.tensor(spatial_shapes, device=value.device)
    starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))

    class Official(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            ctx.save_for_backward(value, locations, weights)
            return op.ms_deform_attn_forward(value, sizes, starts, locations, weights, 64)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple:
            value, locations, weights = ctx.saved_tensors
            return tuple(op.ms_deform_attn_backward(value, sizes, starts, locations, weights, grad.contiguous(), 64))

    weights = attention_logits.flatten(3).softmax(-1).view_as(attention_logits)
    return Official.apply(value, sampling_locations(spatial_shapes, reference_points, offsets).contiguous(), weights.contiguous())


def compulsory_bytes(value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor) -> tuple[int, int]:
    """What forward and backward have to read and write at least once, however they work."""
    size = lambda *tensors: sum(t.numel() * t.element_size() for t in tensors)                          # noqa: E731
    out = offsets.shape[:3].numel() * value.shape[-1] * value.element_size()
    inputs = size(value, references, offsets, logits)
    return inputs + out, inputs + 2 * out + size(value, offsets, logits)


def benchmark(device: str) -> None:
    rungs, dtypes, ceiling = {"grid_sample": ms_deform_attn_torch, "ours": ms_deform_attn}, (torch.float32,), None
    if device == "cuda":
        smi = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
        source, target = torch.empty(2, 2**30, dtype=torch.uint8, device=device)
        ceiling = 2 * source.numel() / quantiles(lambda i: target.copy_(source), device, 20)[1] / 1e3
        del source, target
        print(f"{torch.cuda.get_device_name()}, driver {smi.stdout.strip()}, CUDA {torch.version.cuda}; copying reaches {ceiling:.0f} GB/s")
        rungs["grid_sample, compiled"] = torch.compile(ms_deform_attn_torch)
        if importlib.util.find_spec("MultiScaleDeformableAttention"):
            rungs["official CUDA op"] = official
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
    print(f"torch {torch.__version__}, triton {triton.__version__ if triton else 'absent'}, {torch.get_num_threads()} threads")
    sizes = {"R50, 800 x 1344": R50, "Swin-L, 800 x 1344": SWIN_L} if device == "cuda" else {"512 x 512": SMALL}
    for (name, shapes), queries, B in itertools.product(sizes.items(), (None, 300, 500), (1, 2) if device == "cuda" else (1,)):
        rows = []
        for spread, dtype, (rung, function) in itertools.product((1, 3, None) if queries is None else (1,), dtypes, rungs.items()):
            if function is not official or dtype == torch.float32:                      # it knows no 16-bit numbers
                arguments = workload(shapes, queries, spread, B, dtype, device)
                head = {"offsets": "anywhere" if spread is None else f"sigma {spread}", "dtype": str(dtype)[6:], "rung": rung}
                for cache, copies in {"warm": 1, "rotated": 4}.items():
                    if copies == 1 or (device == "cuda" and rung == "ours"):
                        rows += [head | {"cache": cache} | row for row in timings(function, arguments, copies, ceiling)]
        print(f"\n{name}, {'encoder' if queries is None else f'decoder, {queries} queries'}, batch {B}")
        print_table(rows)


def timings(function: Callable, arguments: tuple, copies: int, ceiling: float | None) -> list[dict[str, Any]]:
    """Forward and backward on `copies` copies of the arguments in turn: one fits the GPU's cache, four large ones do not."""
    value, shapes, references, offsets, logits = arguments
    device, repeats = value.device.type, 30 if value.is_cuda else 7
    leaves = [[t.clone().requires_grad_() for t in (value, offsets, logits)] for _ in range(copies)]
    if value.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    outs = [function(v, shapes, references, *others) for v, *others in leaves]
    grad = torch.randn_like(outs[0])

    def forward(i: int) -> None:
        with torch.no_grad():
            function(leaves[i % copies][0], shapes, references, *leaves[i % copies][1:])

    def backward(i: int) -> tuple:
        return torch.autograd.grad(outs[i % copies], leaves[i % copies], grad, retain_graph=True)

    rows, varies = [], (backward(0)[0] - backward(0)[0]).abs().max().item()
    for run, size in zip((forward, backward), compulsory_bytes(value, references, offsets, logits)):
        low, median, high = quantiles(run, device, repeats)
        row = {"direction": run.__name__, "us": median, "p20": low, "p80": high, "Mpoints/s": logits.numel() / median}
        if ceiling:
            row |= {"GB/s": size / median / 1e3, "% of copy": size / median / 10 / ceiling, "peak MB": (torch.cuda.max_memory_allocated() - before) / 1e6}
        rows.append(row | {"run to run": f"{varies:.0e}" if run is backward else ""})
    return rows


def main() -> None:
    if "--static" in sys.argv:
        return print_table(static_table())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(device)
    if triton:                                                                          # in a process of its own: in this one kernels may be interpreted
        sys.stdout.flush()
        subprocess.run([sys.executable, __file__, "--static"], env=os.environ | {"TRITON_INTERPRET": "0"}, check=True)
    benchmark(device)


if __name__ == "__main__":
    main()
