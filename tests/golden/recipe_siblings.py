"""Reproducible weights and features for the golden fixtures of Mask2Former and DFormer (numpy only)."""
import zlib

import numpy as np

SKIP = ("relative_position_index", "num_batches_tracked", "empty_weight", "alphas", "betas", "posterior_")
EMBEDDINGS = ("query_feat.weight", "query_embed.weight", "level_embed.weight", "level_embed")


def star(n, heads=8, points=4):
    """Bias of the sampling offsets: head m looks in direction m, point p at p cells' distance."""
    theta = np.arange(heads) * (2 * np.pi / heads)
    d = np.stack([np.cos(theta), np.sin(theta)], -1)
    d = (d / np.abs(d).max(-1, keepdims=True))[:, None, None] * np.arange(1, points + 1)[:, None]
    return np.broadcast_to(d, (heads, n // (heads * points * 2), points, 2)).reshape(-1)


def fill(name, shape):
    """float32 array for one state-dict entry; names are relative to the segmentation head."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    n = rng.standard_normal(tuple(shape))
    if name.endswith("sampling_offsets.bias"):
        n = star(int(np.prod(shape)))
    elif name.endswith("running_var"):
        n = 0.5 + rng.random(tuple(shape))
    elif name.endswith(("running_mean", "bias")):
        n = 0.05 * n
    elif name.endswith("relative_position_bias_table"):
        n = 0.2 * n
    elif len(shape) <= 1:                                                # norm scales
        n = 1 + 0.1 * n
    elif not name.endswith(EMBEDDINGS):
        n = n / np.sqrt(np.prod(shape[1:]))
    return n.astype(np.float32)


def features(seed, batch, height, width, channels=(8, 16, 24, 32)):
    """Maps of strides 4, 8, 16, 32 of normal noise, drawn in this order from one generator."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((batch, c, height // s, width // s)).astype(np.float32) for c, s in zip(channels, (4, 8, 16, 32))]
