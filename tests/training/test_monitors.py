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


@pytest.mark.parametrize("kind", ["one patch", "uniform", "one prototype", "centre"])
def test_collapse_of_masked_patches_is_named_where_images_are_well(kind: str) -> None:
    (targets, features), (patch_targets, patches) = healthy(), healthy()
    center, said = torch.zeros(K), {"one patch": "different patches", "centre": "without bound"}.get(kind, kind)
    if kind == "one patch":
        patches = torch.ones(64, D) + 1e-3 * patches
    elif kind == "uniform":
        patch_targets = torch.full((64, K), 1 / K)
    elif kind == "one prototype":
        patch_targets = torch.softmax(50 * torch.eye(K)[:1].repeat(64, 1), dim=-1)
    else:
        center = center + 20
    found = collapse_monitors(
        targets, features, torch.zeros(K), student_RK=targets,
        patch_targets_RK=patch_targets, patch_features_RD=patches, patch_center_K=center,
    )  # fmt: skip
    warnings = collapse_warnings(found | {"kl_nats": 1.0}, K, K)
    assert len(warnings) == 1
    assert said in next(iter(warnings.values()))
    assert "patches" in next(iter(warnings.values()))


def test_no_or_one_masked_patch_is_nothing_to_tell_of() -> None:
    for n in (0, 1):
        found = collapse_monitors(
            *healthy(), torch.zeros(K),
            patch_targets_RK=torch.ones(n, K) / K, patch_features_RD=torch.ones(n, D), patch_center_K=torch.zeros(K),
        )  # fmt: skip
        assert not [name for name in found if "ibot" in name or "patch" in name]


def test_entropies_are_means_over_rows() -> None:
    """Oracle: the definition, row by row."""
    targets, features = healthy()
    student = torch.softmax(torch.randn(64, K, generator=torch.Generator().manual_seed(1)), dim=-1)
    found = collapse_monitors(targets, features, torch.zeros(K), student_RK=student)
    for name, rows in (("target_entropy_nats", targets), ("student_entropy_nats", student)):
        wanted = sum(-sum(p * math.log(p) for p in row if p > 0) for row in rows.tolist()) / len(rows)
        assert found[name] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_effective_rank_counts_equally_strong_directions(rank: int) -> None:
    rows = torch.zeros(4 * rank, D)
    for i in range(rank):
        rows[4 * i : 4 * i + 4, i] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert effective_rank(rows).item() == pytest.approx(rank, rel=1e-4)
    assert effective_rank(torch.ones(5, D)).item() == 1.0
