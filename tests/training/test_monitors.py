"""Monitors tell a healthy batch from each kind of collapse, and say what to change."""

import math

import pytest
import torch

from training.monitors import collapse_monitors, collapse_warnings, effective_rank

K, D = 32, 16


def healthy() -> tuple[torch.Tensor, torch.Tensor]:
    """Targets [64, K] that favour each prototype twice, and features [64, D] in all directions."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.softmax(8 * torch.eye(K).repeat(2, 1), dim=-1)
    return targets, torch.randn(64, D, generator=generator)


def watch(targets: torch.Tensor, features: torch.Tensor) -> dict[str, float]:
    return {**collapse_monitors(targets, features, torch.full((K,), 0.5)), "kl_nats": 1.0}


def test_a_healthy_batch_raises_no_warning() -> None:
    found = watch(*healthy())
    assert found["prototypes_used"] == pytest.approx(K, rel=1e-4)
    assert 0.8 * D < found["effective_rank"] <= D
    assert found["feature_spread"] == pytest.approx(1, abs=0.1)
    assert found["center_norm"] == pytest.approx(0.5 * math.sqrt(K))
    assert collapse_warnings(found, K) == {}


@pytest.mark.parametrize("kind", ["one point", "a line", "uniform targets", "one prototype"])
def test_each_collapse_is_named_with_what_to_change(kind: str) -> None:
    targets, features = healthy()
    if kind == "one point":
        features, said = torch.ones(64, D) + 1e-3 * features, "nearly equal"
    elif kind == "a line":
        features, said = features[:, :1] * torch.ones(1, D), "features lie on a line"
    elif kind == "uniform targets":
        targets, said = torch.full((64, K), 1 / K), "uniform"
    else:
        targets, said = torch.softmax(50 * torch.eye(K)[:1].repeat(64, 1), dim=-1), "one prototype"
    warning = next(iter(collapse_warnings(watch(targets, features), K).values()))
    assert said in warning
    assert "lower the" in warning or "raise the" in warning


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_effective_rank_counts_equally_strong_directions(rank: int) -> None:
    rows = torch.zeros(4 * rank, D)
    for i in range(rank):
        rows[4 * i : 4 * i + 4, i] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert effective_rank(rows).item() == pytest.approx(rank, rel=1e-4)
    assert effective_rank(torch.ones(5, D)).item() == 1.0
