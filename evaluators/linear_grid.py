"""Many linear classifiers on the same images, trained as one: features and labels in, one head per learning rate and
combination of features out.

The heads share every batch, so their logits are one product X W with the heads side by side, and the gradient of
softmax cross-entropy is known in closed form: two products a step, whatever the number of heads, and no autograd.
Each head's columns see its own gradient only: the result is that of as many separate `nn.Linear` under SGD.
Legend: n images, B batch, D feature size, H heads, C classes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOMENTUM = 0.9
CACHED_BYTES = 2**20
"""Logits that become errors at a time: between these passes they stay in a core's cache."""
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
) -> Heads:
    """Train one head per learning rate on all features; see `train_grid`."""
    whole = {"all": slice(0, features_nD.shape[1])}
    grid = train_grid(
        lambda rows, _: features_nD[rows],
        whole,
        labels_n,
        n_classes,
        learning_rates,
        steps=steps,
        batch=batch,
        seed=seed,
    )
    return grid["all"]


def train_grid(
    take: Callable[[Tensor, int], Tensor],
    combinations: Mapping[str, slice],
    labels_n: Tensor,
    n_classes: int,
    learning_rates: Sequence[float],
    *,
    steps: int,
    batch: int,
    seed: int,
) -> dict[str, Heads]:
    """Train one head per combination and learning rate: SGD, momentum 0.9, no decay, cosine to 0 per step, mean loss.

    `take(rows, epoch)` gives the features [B, W] of a batch; a combination is a range of their columns. All heads share
    each batch. Batches are cut from a fresh permutation each epoch; an incomplete last one is dropped, as published.
    """
    generators = [torch.Generator().manual_seed(seed) for _ in combinations]
    batch = min(batch, len(labels_n))
    error_Bn = torch.empty(batch, len(learning_rates) * n_classes)
    group = {
        name: _Group(columns, n_classes, learning_rates, error_Bn, generator)
        for (name, columns), generator in zip(combinations.items(), generators, strict=True)
    }
    order, epoch = torch.empty(0, dtype=torch.int64), -1
    for step in range(steps):
        if len(order) < batch:
            order, epoch = torch.randperm(len(labels_n), generator=generators[0]), epoch + 1
        rows, order = order[:batch], order[batch:]
        x_BW = take(rows, epoch)
        shrink = (1 + math.cos(math.pi * step / steps)) / 2
        for heads in group.values():
            heads.step_(x_BW[:, heads.columns], labels_n[rows], shrink)
    return {name: heads.result() for name, heads in group.items()}


class _Group:
    """The heads of one combination, side by side: a step is two products, and passes over what these gave."""

    def __init__(
        self, columns: slice, n_classes: int, rates: Sequence[float], error_Bn: Tensor, generator: torch.Generator
    ) -> None:
        self.columns, self._shape_HC, self._error = columns, (len(rates), n_classes), error_Bn
        width, n = columns.stop - columns.start, len(rates) * n_classes
        first_DC = torch.empty(width, n_classes).normal_(0.0, INITIAL_STD, generator=generator)
        self._weight = first_DC.repeat(1, len(rates))
        self._bias = torch.zeros(n)
        self._speed, self._bias_speed = torch.zeros_like(self._weight), torch.zeros_like(self._bias)
        self._rates = torch.tensor(rates, dtype=torch.float32).repeat_interleave(n_classes) / len(error_Bn)
        self._logits = torch.empty(min(len(error_Bn), max(1, CACHED_BYTES // (4 * n))), n)
        self._bias_change = torch.empty(n)

    def step_(self, x_BD: Tensor, labels_B: Tensor, shrink: float) -> None:
        """One step of SGD. The gradient of the summed cross-entropy is softmax - one-hot; 1 / B is part of the rates."""
        torch.mm(x_BD, self._weight, out=self._error)
        self._bias_speed.mul_(MOMENTUM)
        for start in range(0, len(x_BD), len(self._logits)):
            self._to_error_(self._error[start : start + len(self._logits)], labels_B[start : start + len(self._logits)])
        torch.addmm(self._speed, x_BD.T, self._error, beta=MOMENTUM, out=self._speed)
        self._weight.addcmul_(self._speed, self._rates, value=-shrink)
        self._bias.addcmul_(self._bias_speed, self._rates, value=-shrink)

    def _to_error_(self, some_bn: Tensor, labels_b: Tensor) -> None:
        """Products without bias become softmax - one-hot, for as many images as a core's cache holds."""
        logits_bn = torch.add(some_bn, self._bias, out=self._logits[: len(some_bn)])
        error_bHC = some_bn.view(-1, *self._shape_HC)
        torch.softmax(logits_bn.view_as(error_bHC), dim=2, out=error_bHC)
        error_bHC[torch.arange(len(labels_b)), :, labels_b] -= 1
        self._bias_speed += torch.sum(some_bn, dim=0, out=self._bias_change)

    def result(self) -> Heads:
        """The heads as they stand."""
        return Heads(self._weight.reshape(-1, *self._shape_HC), self._bias.reshape(self._shape_HC))
