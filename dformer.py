"""DFormer (arXiv 2306.03437): masks drawn from noise by a diffusion model. What differs from Mask2Former, and nothing else.

    python train.py dformer_coco_panoptic_r50_50ep --data=/data/coco
    python maskdino.py dformer_coco_panoptic_r50_50ep               # a tour: every room's tensors, parameters and GFLOPs

As mask2former.py, except
- a query's content is the mean pixel embedding inside a noisy mask, and its first attention mask is that mask: in training those of the objects, padded
  with masks of nothing but noise; at inference noise alone, which sampling steps turn into masks (DDIM, arXiv 2010.02502);
- every layer is modulated by the time, that is by how much noise there is;
- queries predict after every layer, not before the first. Their learned positions stay, which the paper does not say.
Where the released code and the paper disagree, a comment says so; we follow the code where its checkpoints depend on it.

Different from the released code on purpose, with the same distributions: noise is drawn only for the pixels that somebody reads, one in four
(see `middle`); it has the padded size, as everything else; images with more objects than queries train on the largest; the pixel decoder runs once,
not in every sampling step; sampling is seeded, every image starts from the same noise.

Notation as in maskdino.py; b is the noise scale.
"""
import contextlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mask2former
from losses import Output, Prediction, generator
from mask2former import MaskedDecoder, Scale, decoder_rooms, outside
from maskdino import MASKS_AT_ONCE, OFFICIAL, Config, ConfigError, Segmenter, mask_logits, renamed

STEPS = 1000                                                            # of the diffusion, t = 0 (clean) ... 999 (noise)


# ---------------------------------------------------------------------------------------------------------------- diffusion
def cosine_schedule() -> tuple[np.ndarray, np.ndarray]:
    """beta and alpha-bar of every t, float64: how much noise is added, how much of the signal's variance is left (arXiv 2102.09672, equation 17)."""
    f = np.cos((np.arange(STEPS + 1) / STEPS + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clip(0, 0.999)
    return beta, np.cumprod(1 - beta)


BETA, ALPHA_BAR = cosine_schedule()


def middle(x: Tensor, stride: int) -> Tensor:
    """The four pixels in the middle of every stride x stride cell: (..., H, W) -> (..., 2 H / stride, 2 W / stride).

    Their mean is the cell's value when a picture is resized bilinearly to H / stride; nothing else of it is read. Of strides 4 and 8, 16, 32 no pixel is
    read twice, so that noise can be drawn for each separately.
    """
    first = stride // 2 - 1
    x = x.unflatten(-1, (-1, stride))[..., first:first + 2].flatten(-2)
    return x.unflatten(-2, (-1, stride))[..., first:first + 2, :].flatten(-3, -2)


def to_cells(m: Tensor) -> Tensor:
    """Means of `middle`'s pixels: (..., 2h, 2w) -> (..., h, w)."""
    return F.avg_pool2d(m, 2)


def to_unit(x: Tensor, b: float) -> Tensor:
    """What the network sees of a noisy mask: clamped to -b ... b, then 0 ... 1."""
    return (x.clamp(-b, b) / b + 1) / 2


def corrupt(x0: Tensor, noise: Tensor, t: int, b: float) -> Tensor:
    """Masks in 0 ... 1 as they look at time t, in 0 ... 1 (forward process, DDPM equation 4). Any shape."""
    return to_unit(math.sqrt(ALPHA_BAR[t]) * (2 * x0 - 1) * b + math.sqrt(1 - ALPHA_BAR[t]) * noise, b)


def draw_noise(target: dict, config: Config) -> dict:
    """Random numbers of one image in training: t, the queries' order (Q,), and for the two strides that are read lists of pads (Q - n, h, w) of fair
    coins, noise (Q, h, w) normal, grey (Q, h, w) uniform (None with binary encoding)."""
    device, (H, W) = target["labels"].device, target["masks"].shape[1:]
    g, Q, n = generator(target, 0, device), config.queries, min(len(target["labels"]), config.queries)
    sizes = [(2 * H // stride, 2 * W // stride) for stride in strides_read(config)]
    return {"t": int(torch.randint(STEPS, (), generator=g, device=device)), "order": torch.randperm(Q, generator=g, device=device),
            "pads": [torch.randint(2, (Q - n, *size), generator=g, device=device, dtype=torch.uint8) for size in sizes],
            "noise": [torch.randn((Q, *size), generator=g, device=device) for size in sizes],
            "grey": [torch.rand((Q, *size), generator=g, device=device) if config.mask_encoding == "shuffled" else None for size in sizes]}


def noisy_masks(target: dict, draws: dict, config: Config) -> list[Tensor]:
    """One image's objects among padding, as they look at time t: for each stride that is read (Q, h, w) in 0 ... 1."""
    masks, found = target["masks"], []
    if len(masks) > config.queries:                                     # the released code stops here
        masks = masks[masks.flatten(1).sum(1, dtype=torch.long).topk(config.queries).indices]
    for stride, pads, noise, grey in zip(strides_read(config), draws["pads"], draws["noise"], draws["grey"], strict=True):
        x0 = torch.cat([middle(masks, stride), pads]).to(noise)[draws["order"]]
        if grey is not None:                                            # object 0.5 ... 1, else 0 ... 0.5: in the paper, not in the released code
            x0 = (x0 + grey) / 2
        found.append(corrupt(x0, noise, draws["t"], config.noise_scale))
    return found


def strides_read(config: Config) -> tuple[int, int]:
    """Where a noisy mask is read: at the cells of the pixel embedding map, for content, and of the first layer's level, for attention."""
    return 4, (config.attention_strides or config.levels)[-1]


def step_back(x: Tensor, x0: Tensor, t: int, after: int, eta: float, noise: Tensor) -> Tensor:
    """From time t to the earlier `after`, given what the network takes for the clean mask (DDIM, equations 12 and 16). All in -b ... b or noisy."""
    now, then = ALPHA_BAR[t], ALPHA_BAR[after]
    sigma = eta * math.sqrt((1 - now / then) * (1 - then) / (1 - now))
    eps = (math.sqrt(1 / now) * x - x0) / math.sqrt(1 / now - 1)
    return math.sqrt(then) * x0 + math.sqrt(1 - then - sigma ** 2) * eps + sigma * noise


def enlarged(probabilities: Tensor, padded: tuple[int, int], stride: int) -> Tensor:
    """(B, Q, h, w) -> `middle` of them at the padded size, a few queries at a time."""
    parts = [middle(F.interpolate(part, size=padded, mode="bilinear", align_corners=False), stride) for part in probabilities.split(MASKS_AT_ONCE, 1)]
    return torch.cat(parts, 1)


def time_embedding(t: Tensor, channels: int) -> Tensor:
    """(B,) -> (B, C): sines, then cosines."""
    half = channels // 2
    angle = t[:, None] * torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / (half - 1)))
    return torch.cat([angle.sin(), angle.cos()], -1)


# ---------------------------------------------------------------------------------------------------------------- the model
class Pooling(nn.Module):
    """Mean pixel embeddings inside noisy masks: m (B, Q, 2h, 2w) in 0 ... 1, pixels (B, C, h, w) -> content (B, Q, C)."""

    def forward(self, m: Tensor, pixels: Tensor) -> Tensor:
        with contextlib.nullcontext() if pixels.is_meta else torch.autocast(pixels.device.type, enabled=False):          # sums over a whole map
            inside = to_cells(m)                                        # (B, Q, h, w)
            total = inside.sum((2, 3))[..., None]
            return torch.einsum("bqhw,bchw->bqc", inside, pixels.to(inside)) / torch.where(total == 0, 1, total)


class DFormer(Segmenter):
    """Figure 2. Images (B, 3, H, W) uint8 RGB, padded right and below to a multiple of 32, and their true sizes -> Output."""

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__(config, num_classes)
        if strides_read(config)[1] == 4:
            raise ConfigError("DFormer's first layer sees a coarser level than the finest: add one of stride 8 or more to --levels")
        C = config.hidden
        self.pool = Pooling()
        self.decoder = MaskedDecoder(config)
        self.time = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, 4 * C))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(4 * C, 2 * C))                     # one for all layers

    def forward(self, images: Tensor, sizes: list[tuple[int, int]], targets: list[dict] | None = None, noise: list | None = None) -> Output:
        """With targets (training) one look at their noisy masks, else sampling. noise: draws instead of random ones, for each image a dict as of
        `draw_noise`; in sampling for each step x (B or 1, Q, h, w) at the two strides."""
        memory, shapes, pixels = self.pixel_decoder(self.backbone(self.normalise(images, sizes)))
        scales, padded = self.decoder.scales(memory, shapes, pixels), tuple(images.shape[-2:])
        if targets is None:
            return Output(padded, pixels, self.sample(scales, pixels, padded, noise), {}, 0)
        noise = noise or [draw_noise(target, self.config) for target in targets]
        m = [torch.stack(parts) for parts in zip(*(noisy_masks(*both, self.config) for both in zip(targets, noise, strict=True)), strict=True)]
        t = torch.tensor([draws["t"] for draws in noise], device=images.device)
        return Output(padded, pixels, self.denoise(m, t, scales, pixels), {}, 0)

    def denoise(self, m: list[Tensor], t: Tensor, scales: list[Scale], pixels: Tensor) -> dict[str, Prediction]:
        """Noisy masks m in 0 ... 1, (B, Q, h, w) at the two strides, at times t (B,) -> the predictions of all layers."""
        content = self.pool(m[0], pixels)
        blocked = outside(to_cells(m[1]).flatten(2) - 0.5) if self.config.masked_attention else None        # the paper compares before it resizes
        modulation = self.modulation(self.time(time_embedding(t, content.shape[-1])))[:, None].chunk(2, -1)
        return self.decoder(content, scales, self.heads, blocked, modulation)

    def sample(self, scales: list[Scale], pixels: Tensor, padded: tuple[int, int], noise: list | None = None) -> dict[str, Prediction]:
        """From noise to masks in `sampling_steps`; the last step's predictions."""
        config, b, strides = self.config, self.config.noise_scale, strides_read(self.config)
        g = None if pixels.is_meta else generator({"key": config.seed}, 0, pixels.device)

        def draw(i: int) -> list[Tensor]:
            return noise[i] if noise else [torch.randn((1, config.queries, 2 * padded[0] // s, 2 * padded[1] // s), generator=g, device=pixels.device)
                                           for s in strides]
        times, state = [int(t) for t in np.linspace(-1, STEPS - 1, config.sampling_steps + 1)][::-1], draw(0)
        for i, (t, after) in enumerate(zip(times, times[1:], strict=False), 1):
            m = [to_unit(x, b).expand(len(pixels), -1, -1, -1) for x in state]
            sets = self.denoise(m, torch.full((len(pixels),), t, device=pixels.device), scales, pixels)
            if after >= 0:
                p = mask_logits(list(sets.values())[-1].embeddings, pixels).float().sigmoid()
                clean = [((2 * enlarged(p, padded, stride) - 1) * b).clamp(-b, b) for stride in strides]
                state = [step_back(*both, t, after, config.sampling_eta, fresh) for *both, fresh in zip(state, clean, draw(i), strict=True)]
        return sets


# ---------------------------------------------------------------------------------------------------------------- for maskdino.py, see `file_of`
MODEL = DFormer
SUPPORTED = mask2former.SUPPORTED | dict(content_queries=("pooled",), initial_prediction=(False,), round_robin=(True,))
RELEASABLE = mask2former.RELEASABLE | {"content_queries": ("pooled",)}
RELEASED = [(r"^time\.0\.", "predictor.time_mlp.1."), (r"^time\.2\.", "predictor.time_mlp.3."), (r"^modulation\.1\.", "predictor.block_time_mlp.1."),
            *mask2former.RELEASED]
facts_of = mask2former.facts_of


def schedule_buffers() -> dict[str, Tensor]:
    """Constants of the diffusion (DDPM, equations 4, 6 and 7) that its released checkpoints carry along, float64."""
    before = np.append(1.0, ALPHA_BAR[:-1])
    posterior = BETA * (1 - before) / (1 - ALPHA_BAR)
    arrays = {
        "betas": BETA, "alphas_cumprod": ALPHA_BAR, "alphas_cumprod_prev": before, "sqrt_alphas_cumprod": np.sqrt(ALPHA_BAR),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - ALPHA_BAR), "log_one_minus_alphas_cumprod": np.log(1 - ALPHA_BAR),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / ALPHA_BAR), "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / ALPHA_BAR - 1),
        "posterior_variance": posterior, "posterior_log_variance_clipped": np.log(posterior.clip(1e-20)),
        "posterior_mean_coef1": BETA * np.sqrt(before) / (1 - ALPHA_BAR), "posterior_mean_coef2": (1 - before) * np.sqrt(1 - BETA) / (1 - ALPHA_BAR)}
    return {name: torch.from_numpy(x) for name, x in arrays.items()}


BUFFERS = schedule_buffers()


def names_of(name: str, config: Config) -> list[str]:
    """The released name of one of our tensors."""
    return [renamed(name, RELEASED + OFFICIAL)]


def rooms(model: DFormer, seen: dict) -> list[tuple]:
    """Rows of the tour between pixel decoder and heads."""
    return [("content", seen["pool"], "pool", "mean pixel embeddings inside noisy masks"),
            ("time", seen["time"], "time", f"how noisy the masks are; from here to the heads, x {model.config.sampling_steps} sampling steps"),
            ("modulation", seen["modulation"], "modulation", "scale and shift of the queries after each layer"), *decoder_rooms(model, seen)]
