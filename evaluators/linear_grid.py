"""Many linear classifiers on the same images, trained as one: features and labels in, one head per learning rate and
combination of features out.

The heads share every batch, so their logits are one product X W with the heads side by side, and the gradient of
softmax cross-entropy is known in closed form: two products a step, whatever the number of heads, and no autograd.
Biases are the weights of a column of ones, so the products hold them too.
Each head's columns see its own gradient only: the result is that of as many separate `nn.Linear` under SGD.
Legend: n images, B batch, D feature size, H heads, C classes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Take = Callable[[Tensor, int, slice, Tensor], object]
"""`take(rows, epoch, columns, out)` writes these columns of the features of a batch [B, W] to `out`, for which there is no other place: a
copy of a batch costs a hundredth of a step."""
Anneal = Literal["step", "epoch"]
MOMENTUM = 0.9
INITIAL_STD = 0.01
"""Weights start from N(0, 0.01), biases from 0 (DINO, DINOv2)."""


@dataclass(frozen=True)
class Heads:
    """Trained classifiers, one per learning rate."""

    weight_DHC: Tensor
    bias_HC: Tensor

    def logits(self, features_nD: Tensor) -> Tensor:
        """Logits [n, H, C]; a head that diverged says the same about every class."""
        n_heads, n_classes = self.bias_HC.shape
        flat = features_nD @ self.weight_DHC.reshape(len(self.weight_DHC), -1)
        logits_nHC = flat.reshape(-1, n_heads, n_classes) + self.bias_HC
        return torch.where(self.finite_H[None, :, None], logits_nHC, 0.0)

    @property
    def finite_H(self) -> Tensor:
        """False for heads whose learning rate was too high for the features."""
        return self.weight_DHC.isfinite().all(dim=2).all(dim=0) & self.bias_HC.isfinite().all(dim=1)


def train_heads(
    features_nD: Tensor,
    labels_n: Tensor,
    n_classes: int,
    learning_rates: Sequence[float],
    *,
    steps: int,
    batch: int,
    seed: int,
    anneal: Anneal = "step",
) -> Heads:
    """Train one head per learning rate on all features; see `train_grid`."""
    whole = {"all": slice(0, features_nD.shape[1])}
    grid = train_grid(
        lambda rows, _, columns, out: torch.index_select(features_nD[:, columns], 0, rows, out=out),
        whole,
        labels_n,
        n_classes,
        learning_rates,
        steps=steps,
        batch=batch,
        seed=seed,
        anneal=anneal,
    )
    return grid["all"]


def train_grid(
    take: Take,
    combinations: Mapping[str, slice],
    labels_n: Tensor,
    n_classes: int,
    learning_rates: Sequence[float],
    *,
    steps: int,
    batch: int,
    seed: int,
    anneal: Anneal = "step",
) -> dict[str, Heads]:
    """Train one head per combination and learning rate: SGD, momentum 0.9, no decay, cosine to 0, mean loss.

    Learning rates follow the cosine from step to step (DINOv2), or stand still within an epoch (DINO).
    A combination is a range of the columns of what `take` gives. The column of ones is put where the first range ends,
    so no range may begin beyond that. All heads share each batch. Batches are cut from a fresh permutation each epoch;
    an incomplete last one is dropped, as published.
    """
    generators = [torch.Generator().manual_seed(seed) for _ in combinations]
    batch = min(batch, len(labels_n))
    ones = min(columns.stop for columns in combinations.values())
    logits_Bn = torch.empty(batch, len(learning_rates) * n_classes)
    buffers = logits_Bn, torch.empty_like(logits_Bn)
    group = {
        name: _Group(columns, ones, n_classes, learning_rates, buffers, generator)
        for (name, columns), generator in zip(combinations.items(), generators, strict=True)
    }
    order, epoch = torch.empty(0, dtype=torch.int64), -1
    width = max(columns.stop for columns in combinations.values())
    x_BW = torch.ones(batch, width + 1)
    n_epochs = math.ceil(steps / (len(labels_n) // batch))
    for step in range(steps):
        if len(order) < batch:
            order, epoch = torch.randperm(len(labels_n), generator=generators[0]), epoch + 1
        rows, order = order[:batch], order[batch:]
        take(rows, epoch, slice(0, ones), x_BW[:, :ones])
        if ones < width:
            take(rows, epoch, slice(ones, width), x_BW[:, ones + 1 :])
        passed = step / steps if anneal == "step" else epoch / n_epochs
        shrink = (1 + math.cos(math.pi * passed)) / 2
        for heads in group.values():
            heads.step_(x_BW, labels_n[rows], shrink)
    return {name: heads.result() for name, heads in group.items()}


class _Group:
    """The heads of one combination, side by side: a step is two products, and passes over what these gave."""

    def __init__(
        self,
        columns: slice,
        ones: int,
        n_classes: int,
        rates: Sequence[float],
        buffers: tuple[Tensor, Tensor],
        generator: torch.Generator,
    ) -> None:
        """`ones` is the column of ones among those of all batches, `columns` the features' range without it."""
        self._columns, self._bias_at = slice(columns.start, columns.stop + 1), ones - columns.start
        self._shape_HC, (self._logits, self._error) = (len(rates), n_classes), buffers
        first_DC = torch.empty(columns.stop - columns.start, n_classes).normal_(0.0, INITIAL_STD, generator=generator)
        before, after = first_DC[: self._bias_at], first_DC[self._bias_at :]
        self._weight = torch.cat([before, torch.zeros(1, n_classes), after]).repeat(1, len(rates))
        self._speed = torch.zeros_like(self._weight)
        self._rates = torch.tensor(rates, dtype=torch.float32).repeat_interleave(n_classes) / len(self._error)
        self._first_BH = np.arange(0, self._error.numel(), n_classes).reshape(-1, len(rates))

    def step_(self, x_BW: Tensor, labels_B: Tensor, shrink: float) -> None:
        """One step of SGD. The gradient of the summed cross-entropy is softmax - one-hot; 1 / B is part of the rates."""
        x_BD = x_BW[:, self._columns]
        torch.mm(x_BD, self._weight, out=self._logits)
        torch.softmax(self._logits.view(-1, *self._shape_HC), dim=2, out=self._error.view(-1, *self._shape_HC))
        self._error.view(-1).numpy()[self._first_BH + labels_B.numpy()[:, None]] -= 1
        torch.addmm(self._speed, x_BD.T, self._error, beta=MOMENTUM, out=self._speed)
        self._weight.addcmul_(self._speed, self._rates, value=-shrink)

    def result(self) -> Heads:
        """The heads as they stand."""
        weight_DHC, at = self._weight.reshape(-1, *self._shape_HC), self._bias_at
        return Heads(torch.cat([weight_DHC[:at], weight_DHC[at + 1 :]]), weight_DHC[at])
