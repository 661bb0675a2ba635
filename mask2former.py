"""Mask2Former (arXiv 2112.01527): queries that look only where their own masks are. What differs from Mask DINO, and nothing else.

    python train.py mask2former_coco_instance_r50_50ep --data=/data/coco
    python maskdino.py mask2former_coco_instance_r50_50ep           # a tour: every room's tensors, parameters and GFLOPs

As maskdino.py, except
- the decoder attends to every cell of one level in each layer, from coarse to fine and round again, but only inside the mask that the query
  predicted before (section 3.2); there are no anchor boxes, and an instance's box is that of its mask;
- queries are learned, and predict before they have seen the image; there is neither query selection nor denoising;
- a query's class is one of K + 1, the last for no object; matching takes its probability, and class weighs 2 (section 3.3).
The last is configuration alone (class_loss, class_cost and the two weights). Where released code and paper disagree, a comment says so.

Notation as in maskdino.py.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses import Output, Prediction
from maskdino import MLP, OFFICIAL, Clues, Config, Segmenter, init_transformer, position_encoding, renamed, through


# ---------------------------------------------------------------------------------------------------------------- decoder
class Attention(nn.MultiheadAttention):
    """PyTorch's, but all heads share one boolean mask, which PyTorch's copies for every head and turns into numbers.

    query (B, Q, C), key and value (B, S, C), blocked (B, Q, S) bool, True where a query must not look -> (B, Q, C).
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None = None) -> Tensor:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)                        # (B, M, Q or S, C / M)
                   for x, w, b in zip((query, key, value), weights, biases, strict=True))
        x = F.scaled_dot_product_attention(q, k, v, None if blocked is None else ~blocked[:, None], self.dropout * self.training)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class MaskedDecoderLayer(nn.Module):
    """Masked cross-attention to a level, self-attention among queries, FFN; post-norm. Cross-attention comes first: the first layer's queries know nothing
    of the image yet that they could tell each other (section 3.2.2)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        C, self.self_attention_first = config.hidden, config.self_attention_first
        self.dropout = nn.Dropout(config.dropout)
        self.self_attn = Attention(C, config.heads, config.dropout)
        self.norm1 = nn.LayerNorm(C)
        self.cross_attn = Attention(C, config.heads, config.dropout)
        self.norm2 = nn.LayerNorm(C)
        self.ffn = MLP(C, config.dec_ffn, C)
        self.norm3 = nn.LayerNorm(C)

    def forward(self, x: Tensor, pos: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None) -> Tensor:
        drop = self.dropout

        def among(x: Tensor) -> Tensor:
            return self.norm1(x + drop(self.self_attn(x + pos, x + pos, x)))

        def inside(x: Tensor) -> Tensor:
            return self.norm2(x + drop(self.cross_attn(x + pos, key, value, blocked)))                          # equation 2
        x = inside(among(x)) if self.self_attention_first else among(inside(x))
        widen, relu, narrow = self.ffn
        return self.norm3(x + drop(narrow(drop(relu(widen(x))))))


class Scale(NamedTuple):
    """What a decoder layer sees: the S cells of one level, or of all."""
    key: Tensor             # (B, S, C) value with its position
    value: Tensor           # (B, S, C) tokens of the pixel decoder, with the level's embedding
    pixels: Tensor          # (B, S, C) pixel embedding map at the level's size


def outside(inside: Tensor) -> Tensor:
    """Equation 3: logits or the like at a level's cells, (B, Q, S) -> bool, True = blocked: cells outside. Whoever has nothing inside looks everywhere."""
    blocked = inside < 0
    return blocked & ~blocked.all(-1, keepdim=True)


class MaskedDecoder(nn.Module):
    """Looks at the levels in turn, from the coarsest on, and predicts class and mask after every layer (section 3.2)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        C, strides = config.hidden, config.attention_strides or config.levels
        self.config = config
        self.levels = [config.levels.index(stride) for stride in strides]
        self.position = nn.Embedding(config.queries, C)
        self.level_embed = nn.Embedding(len(strides), C)
        self.layers = nn.ModuleList(MaskedDecoderLayer(config) for _ in range(config.dec_layers))
        init_transformer(self.layers)

    def scales(self, memory: Tensor, shapes: list[tuple[int, int]], pixels: Tensor) -> list[Scale]:
        """tokens (B, S, C), pixel embedding map (B, C, H/4, W/4) -> what the layers see, in their order: levels from coarse to fine (section 3.2.1), or
        all of them at once."""
        tokens, scales = memory.split([h * w for h, w in shapes], 1), []
        for level, embed in zip(self.levels, self.level_embed.weight, strict=True):
            value = tokens[level] + embed
            key = value + position_encoding(*shapes[level], value.shape[-1], value)
            small = F.interpolate(pixels.detach(), size=shapes[level], mode="bilinear", align_corners=False)
            scales.append(Scale(key, value, small.flatten(2).transpose(1, 2)))
        return scales[::-1] if self.config.round_robin else [Scale(*(torch.cat(parts, 1) for parts in zip(*scales, strict=True)))]

    def forward(self, x: Tensor, scales: list[Scale], heads: nn.Module, blocked: Tensor | None = None,
                modulation: tuple[Tensor, Tensor] | None = None) -> dict[str, Prediction]:
        """content (B, Q, C), what `scales` gives -> predictions "initial", "layer1" ...

        DFormer has two more: what is blocked in the first layer, (B, Q, S), where no prediction says so yet; and a modulation (scale, shift), (B, 1, C)
        each, of the queries after every layer.
        """
        config, pos = self.config, self.position.weight
        sets = {"initial": heads(x)} if config.initial_prediction else {}
        for i, layer in enumerate(self.layers):
            scale = scales[i % len(scales)]
            if config.masked_attention and sets:
                with torch.no_grad():       # a resized mask is the product with the resized pixel embedding: masks are never made in full size
                    blocked = outside(list(sets.values())[-1].embeddings @ scale.pixels.mT)
            x = through(layer, config.checkpoint_activations, x, pos, scale.key, scale.value, blocked)          # (B, Q, C)
            if modulation is not None:
                x = x * (1 + modulation[0]) + modulation[1]
            sets[f"layer{i + 1}"] = heads(x)
        return sets


# ---------------------------------------------------------------------------------------------------------------- the model
class Mask2Former(Segmenter):
    """Figure 2. Images (B, 3, H, W) uint8 RGB, padded right and below to a multiple of 32, and their true sizes -> Output."""

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.content = nn.Embedding(config.queries, config.hidden) if config.content_queries == "learned" else None
        self.decoder = MaskedDecoder(config)

    def forward(self, images: Tensor, sizes: list[tuple[int, int]], targets: list[dict] | None = None) -> Output:
        """The targets are for models with denoising."""
        memory, shapes, pixels = self.pixel_decoder(self.backbone(self.normalise(images, sizes)))
        content = self.content.weight if self.content else torch.zeros_like(self.decoder.position.weight)
        sets = self.decoder(content.expand(len(images), -1, -1), self.decoder.scales(memory, shapes, pixels), self.heads)
        return Output(tuple(images.shape[-2:]), pixels, sets, {}, 0)


# ---------------------------------------------------------------------------------------------------------------- for maskdino.py, see `file_of`
MODEL = Mask2Former
SUPPORTED = dict(task=("instance", "panoptic", "semantic"), two_stage=(False,), content_queries=("learned", "zero"), decoder_levels=(0,), box_init=("token",),
                 smallest_proposal=("fine",), denoising=("none",), matching=("hybrid", "mask"))      # fine: its encoder, too, was released coarse first
BUFFERS: dict[str, Tensor] = {}
RELEASABLE = {"denoising": ("none",), "content_queries": ("learned",), "attention_strides": ((),), "detection_head": (False,), "class_loss": ("ce",)}

RELEASED = [                                                            # our name -> the released one, before those that all models share
    (r"^content\.", "predictor.query_feat."), (r"^decoder\.position\.", "predictor.query_embed."), (r"^decoder\.level_embed\.", "predictor.level_embed."),
    (r"^decoder\.layers\.(\d+)\.(self_attn|norm1)\.", r"predictor.transformer_self_attention_layers.\1.\2."),
    (r"^decoder\.layers\.(\d+)\.(cross_attn|norm2)\.", r"predictor.transformer_cross_attention_layers.\1.\2."),
    (r"^decoder\.layers\.(\d+)\.(ffn|norm3)\.", r"predictor.transformer_ffn_layers.\1.\2."),
    (r"(_layers\.\d+)\.norm\d\.", r"\1.norm."), (r"\.cross_attn\.", ".multihead_attn."),
]


def names_of(name: str, config: Config) -> list[str]:
    """The released name of one of our tensors."""
    return [renamed(name, RELEASED + OFFICIAL)]


def facts_of(clues: Clues) -> dict[str, object]:
    """Fields of Config that tell Mask2Former's models apart."""
    ffn = "sem_seg_head.predictor.transformer_ffn_layers"
    return {"dec_layers": clues.count(rf"{ffn}\.(\d+)\."), "dec_ffn": clues.shape(f"{ffn}.0.linear1.weight")[0],
            "queries": clues.shape("sem_seg_head.predictor.query_embed.weight")[0], "two_stage": False, "class_loss": "ce"}


def rooms(model: Segmenter, seen: dict) -> list[tuple]:
    """Rows of the tour between pixel decoder and heads."""
    content = [("content", model.content.weight, "content", "learned queries, the first to predict")] if model.content else []
    return content + decoder_rooms(model, seen)


def decoder_rooms(model: Segmenter, seen: dict) -> list[tuple]:
    config = model.config
    strides = config.attention_strides or config.levels
    order = ", then ".join(map(str, strides[::-1])) if config.round_robin else " and ".join(map(str, strides))
    return [
        ("decoder", None, "decoder", f"x {config.dec_layers}: stride {order}" + ", and so on" * (config.round_robin and len(strides) > 1)),
        ("  position", model.decoder.position.weight, "decoder.position", "learned, added in attention"),
        ("  layers: cross_attn", None, r"decoder.layers.\d+.(cross_attn|norm2)", "inside the last mask" if config.masked_attention else "to every cell"),
        ("  layers: self_attn", None, r"decoder.layers.\d+.(self_attn|norm1)", "among queries"),
        ("  layers: ffn", None, r"decoder.layers.\d+.(ffn|norm3)", ""),
        ("  state", seen[f"decoder.layers.{config.dec_layers - 1}"], None, "the queries after a layer"),
    ]
