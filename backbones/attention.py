"""Self-attention of a ViT, on images of one size and on packed sequences of several.

Axes: B images, T tokens, S all tokens of a packed sequence, D feature size, d that of a head.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEPT_KEYS = 512
"""Tokens of an image up to which narrow attention keeps its weights for the way back. Those of more would outgrow all else,
and are computed again."""
Shapes = Sequence[tuple[int, int]]
"""Images B and tokens T of each group of equally large crops in a packed sequence."""


class Attention(nn.Module):
    """Multi-head self-attention; `qkv` holds all of q, then k, then v, each head-major."""

    def __init__(self, width: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def split(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, heads, T, d]."""
        B, T, _ = x_BTD.shape
        q, k, v = _SplitHeads.apply(self.qkv(x_BTD).flatten(0, 1), [(B, T)], self.heads, 3)
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend and project: [B, T, D]."""
        mixed = attend(q, k, v, self.scale)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.mix(*self.split(x_BTD))

    def packed(self, x_SD: Tensor, shapes: Shapes) -> Tensor:
        """Every image of a packed sequence attends to itself only: [S, D]."""
        found = _SplitHeads.apply(self.qkv(x_SD), shapes, self.heads, 3)
        return self.proj(self._attend(found[0::3], found[1::3], found[2::3]))

    def read(self, x_SD: Tensor, shapes: Shapes, cls_only: Sequence[bool]) -> Tensor:
        """What all tokens of an image, or in some groups its first one alone, take from all of its tokens, before the projection: [Q, D].

        The rows stand in the order of the packed sequence.
        """
        width = x_SD.shape[1]
        parts = zip(x_SD.split([B * T for B, T in shapes]), shapes, cls_only, strict=True)
        asking_QD = torch.cat([part[::T] if only else part for part, (_, T), only in parts])
        asked = [(B, 1 if only else T) for (B, T), only in zip(shapes, cls_only, strict=True)]
        bias = self.qkv.bias
        q_QD = F.linear(asking_QD, self.qkv.weight[:width], None if bias is None else bias[:width])
        kv_SY = F.linear(x_SD, self.qkv.weight[width:], None if bias is None else bias[width:])
        found = _SplitHeads.apply(kv_SY, shapes, self.heads, 2)
        return self._attend(_SplitHeads.apply(q_QD, asked, self.heads, 1), found[0::2], found[1::2])

    def _attend(self, queries: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """Attention of each group [B, heads, T, d], all their rows one after the other, heads side by side: [Q, D]."""
        mixed = [
            attend(q, k, v, self.scale).transpose(1, 2).flatten(0, 1).flatten(1)
            for q, k, v in zip(queries, keys, values, strict=True)
        ]
        return torch.cat(mixed) if len(mixed) > 1 else mixed[0]

    def weights(self, x_BTD: Tensor) -> Tensor:
        """Softmax weights of every query, [B, heads, T, T]; costs O(T^2) memory."""
        q, k, _ = self.split(x_BTD)
        return torch.softmax(q @ k.transpose(-2, -1) * self.scale, dim=-1)

    def cls_weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Softmax weights of the CLS query over all tokens, [B, heads, T]; costs O(T)."""
        return torch.softmax((q[:, :, :1] * self.scale) @ k.transpose(-2, -1), dim=-1).squeeze(2)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v of each head: queries [B, heads, Q, d], keys and values [B, heads, T, d] to [B, heads, Q, d]."""
    if q.device.type == "cpu" and q.dtype != torch.float32 and torch.is_grad_enabled() and q.requires_grad:
        mixed: Tensor = _NarrowAttention.apply(q, k, v, scale)
        return mixed
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


class _NarrowAttention(torch.autograd.Function):
    """Attention in bfloat16 or float16 on a CPU, with gradients, as products over all heads at once.

    torch's own (2.13) multiplies head by head on the way back, and for each product makes the objects of the library anew: 1.5 to 7 times
    the time of this for the crops of a training step (`benchmarks/narrow.py`).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        # Contiguous copies, made once: the way back multiplies by each of them.
        q_NQd, k_NTd, v_NTd = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        weights_NQT = _weights(q_NQd, k_NTd, scale)
        ctx.save_for_backward(q_NQd, k_NTd, v_NTd, weights_NQT if k.shape[2] <= KEPT_KEYS else None)
        return torch.bmm(weights_NQT, v_NTd).unflatten(0, q.shape[:2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_NQd, k_NTd, v_NTd, weights_NQT = ctx.saved_tensors
        if weights_NQT is None:
            weights_NQT = _weights(q_NQd, k_NTd, ctx.scale)
        heads, gradient_NQd = gradient.shape[:2], gradient.flatten(0, 1)
        of_v = torch.bmm(weights_NQT.transpose(1, 2), gradient_NQd)
        of_weights = torch.bmm(gradient_NQd, v_NTd.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_weights, weights_NQT, -1, weights_NQT.dtype)
        of_q = _scaled(of_scores, k_NTd, ctx.scale)
        of_k = _scaled(of_scores.transpose(1, 2), q_NQd, ctx.scale)
        return of_q.unflatten(0, heads), of_k.unflatten(0, heads), of_v.unflatten(0, heads), None


def _weights(q_NQd: Tensor, k_NTd: Tensor, scale: float) -> Tensor:
    """Softmax weights of each query over all keys, [N, Q, T]."""
    return torch.softmax(_scaled(q_NQd, k_NTd.transpose(1, 2), scale), dim=-1, dtype=q_NQd.dtype)


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b of each pair, [N, ., .]."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _heads_of(qkv_SX: Tensor, shapes: Shapes, heads: int, n: int) -> list[Tensor]:
    """The `n` views (q, k, v) [B, heads, T, d] of each group of [S, n * D], one group after the other."""
    ends = list(accumulate((B * T for B, T in shapes), initial=0))
    found: list[Tensor] = []
    for (B, T), start, end in zip(shapes, ends, ends[1:], strict=False):
        found += qkv_SX[start:end].view(B, T, n, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return found


class _SplitHeads(torch.autograd.Function):
    """`_heads_of`, whose gradients are gathered in one pass: stacking, permuting and joining them are three on memory-bound cores."""

    @staticmethod
    def forward(ctx: Any, qkv_SX: Tensor, shapes: Shapes, heads: int, n: int) -> tuple[Tensor, ...]:
        ctx.shapes, ctx.heads, ctx.n = shapes, heads, n
        return tuple(_heads_of(qkv_SX, shapes, heads, n))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        rows = sum(B * T for B, T in ctx.shapes)
        gradient_SX = gradients[0].new_empty(rows, ctx.n * ctx.heads * gradients[0].shape[-1])
        for place, gradient in zip(_heads_of(gradient_SX, ctx.shapes, ctx.heads, ctx.n), gradients, strict=True):
            place.copy_(gradient)
        return gradient_SX, None, None, None
