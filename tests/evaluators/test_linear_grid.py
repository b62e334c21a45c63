"""The fused heads are the same classifiers as separate modules under torch's own SGD."""

import math

import pytest
import torch
from torch import Tensor, nn

from evaluators.linear_grid import Anneal, Heads, train_grid, train_heads

RATES = (0.01, 0.1, 1.0)
STEPS, BATCH, CLASSES, WIDTH = 50, 16, 7, 12


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, CLASSES, (70,), generator=generator)
    means = torch.randn(CLASSES, WIDTH, generator=generator)
    return means[labels] + torch.randn(70, WIDTH, generator=generator), labels


def separate_module(features: Tensor, labels: Tensor, rate: float, seed: int, anneal: Anneal) -> nn.Linear:
    """One `nn.Linear` under torch's SGD, cosine schedule and cross-entropy, on the batches described in train_heads."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(WIDTH, CLASSES)
    with torch.no_grad():
        module.weight.copy_(torch.empty(WIDTH, CLASSES).normal_(0.0, 0.01, generator=generator).T)
        module.bias.zero_()
    optim = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9, weight_decay=0)
    epochs = math.ceil(STEPS / (len(labels) // BATCH))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, STEPS if anneal == "step" else epochs, eta_min=0)
    order: list[int] = []
    for step in range(STEPS):
        if len(order) < BATCH:
            if anneal == "epoch" and step:
                schedule.step()
            order = torch.randperm(len(labels), generator=generator).tolist()
        rows, order = order[:BATCH], order[BATCH:]
        optim.zero_grad()
        nn.functional.cross_entropy(module(features[rows]), labels[rows]).backward()
        optim.step()
        if anneal == "step":
            schedule.step()
    return module


@pytest.mark.parametrize("anneal", ["step", "epoch"])
def test_fused_grid_equals_separate_modules_after_fifty_steps(problem: tuple[Tensor, Tensor], anneal: Anneal) -> None:
    """Rates that follow the cosine each step as DINOv2's, or once an epoch as in DINO's script."""
    heads = train_heads(*problem, CLASSES, RATES, steps=STEPS, batch=BATCH, seed=3, anneal=anneal)
    for head, rate in enumerate(RATES):
        module = separate_module(*problem, rate, seed=3, anneal=anneal)
        torch.testing.assert_close(heads.weight_DHC[:, head].T, module.weight.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(heads.bias_HC[head], module.bias.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(heads.logits(problem[0])[:, head], module(problem[0]).detach(), atol=1e-4, rtol=1e-4)


def test_heads_of_overlapping_ranges_of_columns_are_those_of_each_alone(problem: tuple[Tensor, Tensor]) -> None:
    features, labels = problem
    ranges = {"first": slice(0, 8), "last": slice(4, 12)}
    how = {"steps": STEPS, "batch": BATCH, "seed": 3}

    def take(rows: Tensor, _: int, columns: slice, out: Tensor) -> None:
        out[:] = features[rows, columns]

    grid = train_grid(take, ranges, labels, CLASSES, RATES, **how)
    for name, columns in ranges.items():
        alone = train_heads(features[:, columns], labels, CLASSES, RATES, **how)
        torch.testing.assert_close(grid[name].weight_DHC, alone.weight_DHC, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(grid[name].bias_HC, alone.bias_HC, atol=1e-5, rtol=1e-4)


def test_a_head_that_diverges_leaves_the_others_untouched(problem: tuple[Tensor, Tensor]) -> None:
    features, labels = problem
    alone = train_heads(features * 100, labels, CLASSES, (1e-6,), steps=STEPS, batch=BATCH, seed=0)
    beside = train_heads(features * 100, labels, CLASSES, (1e-6, 1e36), steps=STEPS, batch=BATCH, seed=0)
    assert beside.finite_H.tolist() == [True, False]
    torch.testing.assert_close(beside.weight_DHC[:, 0], alone.weight_DHC[:, 0])
    assert beside.logits(features)[:, 1].eq(0).all()


def test_training_repeats_under_a_seed_and_learns_separable_classes(problem: tuple[Tensor, Tensor]) -> None:
    def train(seed: int) -> Heads:
        return train_heads(*problem, CLASSES, (0.1,), steps=200, batch=BATCH, seed=seed)

    first, second, other = train(0), train(0), train(1)
    assert torch.equal(first.weight_DHC, second.weight_DHC)
    assert not torch.equal(first.weight_DHC, other.weight_DHC)
    assert (first.logits(problem[0])[:, 0].argmax(dim=1) == problem[1]).float().mean() > 0.95
