"""One Vision Transformer for DINOv1 and DINOv2: pixels in, features out.

Read in this order: ViTSpec, the parts of a block, ViT. Parameter names are those of the published weights, blocks unchunked.

Axes: B images, T tokens (CLS, registers, patches), R registers, N patches (N = h * w, row-major), D feature size, M side of the table,
S all tokens of a packed sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.attention import Attention, Shapes
from backbones.position import resample_table
from backbones.wanted import Wanted, wanted_of
from data.errors import InputError

NORM_EPS = 1e-6
VIT_SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "giant2": (1536, 40, 24),
}
"""Width, depth and heads by name (Caron et al. 2021, table 1; Oquab et al. 2023, table 17)."""

SUBSET_ABOVE = 0.1 + 1e-6  # the published 0.1 is a little more in float32
"""Share of skipped samples above which a batch of one size, too, runs its branches on a subset; below, every sample draws for itself, as in
DINOv1. A packed sequence always takes subsets."""
Ffn = Literal["mlp", "swiglu"]
MAX_SIZE = 65_536
MAX_SIZES = {"depth": 1024}
"""What no network has; a manifest that says more is damaged or hostile."""


@dataclass(frozen=True, kw_only=True)
class ViTSpec:
    """The architecture of a ViT; stored in every checkpoint."""

    patch_px: int
    width: int
    depth: int
    heads: int
    img_px: int = 224
    """Side of the square image that the position table was made for."""
    registers: int = 0
    """Extra tokens after CLS (Darcet et al. 2023)."""
    ffn: Ffn = "mlp"
    layer_scale: float | None = None
    """Initial gain of each residual branch; None leaves LayerScale out."""
    qkv_bias: bool = True
    pos_offset: float = 0.1
    """Added to the grid size when encodings are resampled by scale factor; 0 resamples by size."""
    pos_antialias: bool = False
    mask_token: bool = False
    drop_path: float = 0.0
    """Share of samples that skip a residual branch in training; grows linearly over the depth."""
    drop_path_uniform: bool = False
    """The same share in every block instead (DINOv2)."""
    in_channels: int = 3

    def __post_init__(self) -> None:
        sizes = {"patch_px": 1, "width": 1, "depth": 1, "heads": 1, "img_px": 1, "in_channels": 1, "registers": 0}
        for name, least in sizes.items():
            value = getattr(self, name)
            most = MAX_SIZES.get(name, MAX_SIZE)
            if type(value) is not int or not least <= value <= most:
                raise InputError(
                    f"ViT {name} is {value!r:.40}; want a whole number, at least {least} and at most {most}"
                )
        for name in ("layer_scale", "pos_offset", "drop_path"):
            value = getattr(self, name)
            if name == "layer_scale" and value is None:
                continue
            # The bounds also leave out NaN, and whole numbers that no float can hold.
            if type(value) not in (int, float) or not -MAX_SIZE <= value <= MAX_SIZE:
                raise InputError(f"ViT {name} is {value!r:.40}; want a number")
            object.__setattr__(self, name, float(value))
        for name in ("qkv_bias", "pos_antialias", "mask_token", "drop_path_uniform"):
            if type(getattr(self, name)) is not bool:
                raise InputError(f"ViT {name} is {getattr(self, name)!r:.40}; want true or false")
        if self.ffn not in get_args(Ffn):
            raise InputError(f"ViT ffn is {self.ffn!r:.40}; want one of {', '.join(get_args(Ffn))}")
        if self.width % self.heads:
            raise InputError(f"ViT width {self.width} does not divide into {self.heads} heads; change one of them")
        if self.img_px < self.patch_px:
            raise InputError(f"ViT img_px {self.img_px} is smaller than one patch of {self.patch_px} px")
        if not 0 <= self.drop_path < 1:
            raise InputError(f"ViT drop_path is {self.drop_path}; want 0 <= drop_path < 1")

    @property
    def grid(self) -> int:
        """Side of the position table, in patches."""
        return self.img_px // self.patch_px


@dataclass(frozen=True)
class Features:
    """What the last block gives; all but `prenorm` have passed the final norm."""

    cls: Tensor
    """[B, D]"""
    registers: Tensor
    """[B, R, D]"""
    patches: Tensor
    """[B, N, D]"""
    prenorm: Tensor
    """[B, T, D], before the final norm"""


class PatchEmbed(nn.Module):
    """Pixels [B, C, H, W] to patches [B, N, D]; rows and columns beyond the last whole patch are dropped.

    The convolution holds the weights. Each pixel meets its kernel once, so it is a product, which is faster than a convolution in
    training, in bfloat16 on a CPU two to four times (`benchmarks/narrow.py`).
    """

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.spec = spec
        self.proj = nn.Conv2d(spec.in_channels, spec.width, spec.patch_px, stride=spec.patch_px)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        (B, C, H, W), P = pixels_BCHW.shape, self.spec.patch_px
        h, w = H // P, W // P
        patches = pixels_BCHW[:, :, : h * P, : w * P].reshape(B, C, h, P, w, P).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.reshape(B, h * w, -1), self.proj.weight.flatten(1), self.proj.bias)


class Mlp(nn.Module):
    """Two linears with the exact GELU between, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def swiglu_hidden(width: int) -> int:
    """Hidden width of the fused SwiGLU: two thirds of 4 * width, rounded up to a multiple of 8."""
    return (int(4 * width * 2 / 3) + 7) // 8 * 8


class SwiGLU(nn.Module):
    """silu(a) * b of one fused linear, then a projection (Shazeer 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = swiglu_hidden(width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned gain for each feature of a residual branch (Touvron et al. 2021)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm block: x + ls1(attn(norm1 x)), then x + ls2(mlp(norm2 x)); a branch is skipped per sample with `drop_path`."""

    def __init__(self, spec: ViTSpec, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.width, eps=NORM_EPS)
        self.attn = Attention(spec.width, spec.heads, spec.qkv_bias)
        self.norm2 = nn.LayerNorm(spec.width, eps=NORM_EPS)
        self.mlp = Mlp(spec.width) if spec.ffn == "mlp" else SwiGLU(spec.width)
        scaled = spec.layer_scale is not None
        self.ls1 = LayerScale(spec.width, spec.layer_scale) if scaled else nn.Identity()  # type: ignore[arg-type]
        self.ls2 = LayerScale(spec.width, spec.layer_scale) if scaled else nn.Identity()  # type: ignore[arg-type]
        self.drop_path = drop_path

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.training and self.drop_path > SUBSET_ABOVE:
            return self.packed(x_BTD.flatten(0, 1), [(len(x_BTD), x_BTD.shape[1])]).view_as(x_BTD)
        x_BTD = self._add(x_BTD, self.ls1(self.attn(self.norm1(x_BTD))))
        return self._add(x_BTD, self.ls2(self.mlp(self.norm2(x_BTD))))

    def packed(self, x_SD: Tensor, shapes: Shapes) -> Tensor:
        """The same on crops of several sizes at once, [S, D]; skipped samples cost nothing (Oquab et al. 2023, section 5)."""
        for norm, mix, scale in ((self.norm1, self.attn.packed, self.ls1), (self.norm2, self._mlp_packed, self.ls2)):
            if not self.training or self.drop_path == 0:
                x_SD = x_SD + scale(mix(norm(x_SD), shapes))
                continue
            rows_R, gains_R1, kept = self._subset(shapes, x_SD.device)
            # Not x_SD[rows_R], whose gradient is added row by row on one core.
            branch_RD = scale(mix(norm(x_SD.index_select(0, rows_R)), kept))
            x_SD = x_SD.index_add(0, rows_R, (branch_RD * gains_R1).to(x_SD.dtype))
        return x_SD

    def _mlp_packed(self, x_SD: Tensor, _: Shapes) -> Tensor:
        return self.mlp(x_SD)

    def _subset(self, shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor, Shapes]:
        """Rows of the samples that take the branch, what each row's branch is multiplied by, and the shapes that are left."""
        samples = self._samples(shapes, device)
        kept = [(len(samples_n), T) for samples_n, (_, T) in zip(samples, shapes, strict=True)]
        gains = [torch.full((n * T, 1), B / n, device=device) for (n, T), (B, _) in zip(kept, shapes, strict=True)]
        return _rows_of(samples, shapes), torch.cat(gains), kept

    def _samples(self, shapes: Shapes, device: torch.device) -> list[Tensor]:
        """The samples [n] of each group that take the branch."""
        if not self.training or self.drop_path == 0:
            return [torch.arange(B, device=device) for B, _ in shapes]
        return [torch.randperm(B, device=device)[: max(int(B * (1 - self.drop_path)), 1)] for B, _ in shapes]

    def read(self, x_SD: Tensor, shapes: Shapes, wanted: Wanted) -> Tensor:
        """What `packed` gives for the tokens that are wanted, [R, D], in their order."""
        x_RD = x_SD.index_select(0, wanted.rows(shapes))
        samples = self._samples(shapes, x_SD.device)
        kept = [(len(samples_n), T) for samples_n, (_, T) in zip(samples, shapes, strict=True)]
        taking_r, places_r, gains_r1 = wanted.taking(shapes, samples)
        normed = self.norm1(x_SD.index_select(0, _rows_of(samples, shapes)))
        mixed_rD = self.attn.read(normed, kept, wanted.cls_only).index_select(0, places_r)
        x_RD = x_RD.index_add(0, taking_r, (self.ls1(self.attn.proj(mixed_rD)) * gains_r1).to(x_RD.dtype))
        taking_r, _, gains_r1 = wanted.taking(shapes, self._samples(shapes, x_SD.device))
        branch_rD = self.ls2(self.mlp(self.norm2(x_RD.index_select(0, taking_r))))
        return x_RD.index_add(0, taking_r, (branch_rD * gains_r1).to(x_RD.dtype))

    def cls(self, x_BTD: Tensor) -> Tensor:
        """What `forward` gives for the CLS tokens, [B, 1, D]: without stochastic depth no view, of which FSDP2 warns."""
        B, T, _ = x_BTD.shape
        if self.training and self.drop_path > SUBSET_ABOVE:
            shapes = [(B, T)]
            return self.read(x_BTD.flatten(0, 1), shapes, wanted_of(shapes, [None], 0, x_BTD.device))[:, None]
        mixed_BD = self.attn.read(self.norm1(x_BTD).flatten(0, 1), [(B, T)], [True])
        x_B1D = self._add(x_BTD[:, :1], self.ls1(self.attn.proj(mixed_BD))[:, None])
        return self._add(x_B1D, self.ls2(self.mlp(self.norm2(x_B1D))))

    def forward_with_cls_weights(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output [B, T, D] and the CLS query's softmax weights [B, heads, T]; for evaluation."""
        q, k, v = self.attn.split(self.norm1(x_BTD))
        x_BTD = x_BTD + self.ls1(self.attn.mix(q, k, v))
        return x_BTD + self.ls2(self.mlp(self.norm2(x_BTD))), self.attn.cls_weights(q, k)

    def _add(self, x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
        """Stochastic depth (Huang et al. 2016): leave out the branch of some samples, scale up the others."""
        if not self.training or self.drop_path == 0:
            return x_BTD + branch_BTD
        keep = 1 - self.drop_path
        gains_B11 = (torch.rand(len(x_BTD), 1, 1, device=x_BTD.device) < keep).to(x_BTD.dtype) / keep
        return torch.addcmul(x_BTD, branch_BTD.to(x_BTD.dtype), gains_B11)


def _rows_of(samples: Sequence[Tensor], shapes: Shapes) -> Tensor:
    """Rows of all tokens of some samples [n] of each group of a packed sequence."""
    rows, start = [], 0
    for samples_n, (B, T) in zip(samples, shapes, strict=True):
        rows.append((start + samples_n[:, None] * T + torch.arange(T, device=samples_n.device)).flatten())
        start += B * T
    return torch.cat(rows)


class ViT(nn.Module):
    """A Vision Transformer; see `ViTSpec`. Pixels are normalised floats [B, C, H, W], at least one patch on a side."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.spec = spec
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + spec.grid**2, spec.width))
        self.register_tokens = nn.Parameter(torch.zeros(1, spec.registers, spec.width)) if spec.registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, spec.width)) if spec.mask_token else None
        self.patch_embed = PatchEmbed(spec)
        first_rate = spec.drop_path if spec.drop_path_uniform else 0.0
        rates = torch.linspace(first_rate, spec.drop_path, spec.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(spec, rate) for rate in rates)
        self.norm = nn.LayerNorm(spec.width, eps=NORM_EPS)
        self.reset_parameters()

    @property
    def embed_dim(self) -> int:
        """Size D of an embedding."""
        return self.spec.width

    @property
    def patch_px(self) -> int:
        """Side of a patch, in pixels."""
        return self.spec.patch_px

    def reset_parameters(self) -> None:
        """Published initialisation: linears and tables truncated normal of std 0.02, biases 0, tokens tiny with registers, else 0.02."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02 if self.spec.layer_scale is None else 1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def position_encoding(self, H: int, W: int) -> Tensor:
        """Encodings [1, 1 + N, D] for an image of H x W pixels, CLS row first; the CLS row never changes.

        The table is used as it is when the patch count and the aspect are the table's own, and resampled otherwise.
        """
        side, h, w = self.spec.grid, H // self.spec.patch_px, W // self.spec.patch_px
        table_MMD = self.pos_embed[0, 1:].reshape(side, side, -1)
        # While a graph with dynamic sizes is traced H and W are symbols; there they are whole patches, so the grid alone decides.
        square = H == W if isinstance(H, int) and isinstance(W, int) else True
        patches_ND = resample_table(
            table_MMD, h, w, square=square, offset=self.spec.pos_offset, antialias=self.spec.pos_antialias
        )
        return torch.cat([self.pos_embed[:, :1], patches_ND[None]], dim=1)

    def tokens(self, pixels_BCHW: Tensor, masks_BN: Tensor | None = None) -> Tensor:
        """What enters the first block, [B, T, D]: CLS, registers (without position), patches (masked ones replaced)."""
        B, _, H, W = pixels_BCHW.shape
        patches_BND = self.patch_embed(pixels_BCHW)
        if masks_BN is not None:
            if self.mask_token is None:
                raise InputError("this backbone has no mask token; make it with ViTSpec(mask_token=True) to use masks")
            patches_BND = torch.where(masks_BN[..., None], self.mask_token.to(patches_BND.dtype), patches_BND)
        x_BTD = torch.cat([self.cls_token.expand(B, -1, -1), patches_BND], dim=1) + self.position_encoding(H, W)
        if self.register_tokens is None:
            return x_BTD
        return torch.cat([x_BTD[:, :1], self.register_tokens.expand(B, -1, -1), x_BTD[:, 1:]], dim=1)

    def features(self, pixels_BCHW: Tensor, masks: Tensor | None = None) -> Features:
        """All tokens of the last block; `masks` [B, N] is True where a patch is hidden."""
        x_BTD = self.tokens(pixels_BCHW, masks)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self._features(x_BTD, self.norm(x_BTD))

    def packed_features(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Features]:
        """The features of several batches of crops, each of its own size, from one pass over one sequence of all their tokens."""
        x_SD, shapes = self._packed_tokens(crops, masks)
        for block in self.blocks:
            x_SD = block.packed(x_SD, shapes)  # type: ignore[operator]
        sizes = [B * T for B, T in shapes]
        pairs = zip(shapes, x_SD.split(sizes), self.norm(x_SD).split(sizes), strict=True)
        return [self._features(x.unflatten(0, shape), normed.unflatten(0, shape)) for shape, x, normed in pairs]

    def packed_read(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None], patches: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """Of `packed_features` the CLS tokens [C, D] of all crops, and the patches [R, D] that are True in `patches` [B, N] of each batch
        (None: none), in their order. The last block computes no other."""
        x_SD, shapes = self._packed_tokens(crops, masks)
        for block in self.blocks[:-1]:
            x_SD = block.packed(x_SD, shapes)  # type: ignore[operator]
        wanted = wanted_of(shapes, patches, self.spec.registers, x_SD.device)
        read_RD = self.norm(self.blocks[-1].read(x_SD, shapes, wanted))  # type: ignore[operator]
        is_cls_R = wanted.tokens_R == 0
        cls_C, patches_R = is_cls_R.nonzero().flatten(), is_cls_R.logical_not().nonzero().flatten()
        return read_RD.index_select(0, cls_C), read_RD.index_select(0, patches_R)

    def _packed_tokens(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, Shapes]:
        """What enters the first block, [S, D], and the shapes of its groups."""
        tokens = [self.tokens(pixels_BCHW, masks_BN) for pixels_BCHW, masks_BN in zip(crops, masks, strict=True)]
        shapes = [(len(x_BTD), x_BTD.shape[1]) for x_BTD in tokens]
        return torch.cat([x_BTD.flatten(0, 1) for x_BTD in tokens]), shapes

    def _features(self, x_BTD: Tensor, normed_BTD: Tensor) -> Features:
        first = 1 + self.spec.registers
        return Features(normed_BTD[:, 0], normed_BTD[:, 1:first], normed_BTD[:, first:], x_BTD)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Embedding [B, D]: CLS after the final norm. The last block computes no other token."""
        x_BTD = self.tokens(pixels_BCHW)
        for block in self.blocks[:-1]:
            x_BTD = block(x_BTD)
        return self.norm(self.blocks[-1].cls(x_BTD).squeeze(1))  # type: ignore[operator]

    def outputs(self, pixels_BCHW: Tensor, layers: Sequence[int] = ()) -> dict[str, Tensor]:
        """Served outputs: `embedding` [B, D], `patches` [B, N, D], `attention` [B, heads, h, w]; and of the blocks
        numbered in `layers` (for heads that read them) the tokens before the final norm, `blockK` [B, T, D].

        Attention is the last block's CLS row: softmax over all tokens, patch columns only, so that a row sums to less than 1.
        """
        h, w = (side // self.spec.patch_px for side in pixels_BCHW.shape[2:])
        x_BTD, read = self.tokens(pixels_BCHW), {}
        for i, block in enumerate(self.blocks):
            if i < self.spec.depth - 1:
                x_BTD = block(x_BTD)
            else:
                x_BTD, weights_BhT = block.forward_with_cls_weights(x_BTD)  # type: ignore[operator]
            if i in layers:
                read[f"block{i}"] = x_BTD
        normed_BTD, first = self.norm(x_BTD), 1 + self.spec.registers
        attention = weights_BhT[:, :, first:].unflatten(2, (h, w))
        return {"embedding": normed_BTD[:, 0], "patches": normed_BTD[:, first:], "attention": attention, **read}

    def last_selfattention(self, pixels_BCHW: Tensor) -> Tensor:
        """Softmax weights of the last block, [B, heads, T, T]."""
        x_BTD = self.tokens(pixels_BCHW)
        for block in self.blocks[:-1]:
            x_BTD = block(x_BTD)
        last = self.blocks[-1]
        return last.attn.weights(last.norm1(x_BTD))  # type: ignore[operator, union-attr]

    def intermediate_layers(
        self, pixels_BCHW: Tensor, n: int | Sequence[int] = 1, norm: bool = True
    ) -> list[tuple[Tensor, Tensor]]:
        """(patches [B, N, D], cls [B, D]) of the last `n` blocks, or of the blocks numbered in `n`, oldest first.

        With `norm` the *final* norm is applied to each, as in the published code. Registers are dropped.
        """
        depth = self.spec.depth
        wanted = range(depth - n, depth) if isinstance(n, int) else n
        if not wanted or min(wanted) < 0 or max(wanted) >= depth:
            raise InputError(f"blocks {list(wanted)} were asked for; this backbone has blocks 0 to {depth - 1}")
        made, first = self.outputs(pixels_BCHW, wanted), 1 + self.spec.registers
        tokens = [made[f"block{i}"] for i in sorted(wanted)]
        return [(x[:, first:], x[:, 0]) for x in ((self.norm(x) if norm else x) for x in tokens)]
