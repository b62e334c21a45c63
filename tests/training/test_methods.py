"""What a recipe's fields change in a step: where the released code and the paper differ, and what a network with batch norm does."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from backbones.resnet import ResNet, ResNetSpec
from training.dinov1 import train_step_
from training.distillation import Learner, Schedule, State, StepSpec, make_learners, teacher_copy
from training.losses import koleo_loss
from training.methods import make_state, take_step_
from training.optimizer import dino_multipliers, make_optimizer
from training.projection_head import HeadSpec, ProjectionHead
from training.recipes import RECIPES

CPU = torch.device("cpu")
AT = Schedule(lr=1e-3, weight_decay=0.0, momentum=0.9, teacher_temperature=0.1, freeze_last_layer=False)
SMOKE = replace(RECIPES["smoke_dinov2"], backbone=replace(RECIPES["smoke_dinov2"].backbone, drop_path=0.0))


def views(n_images: int = 4, sides: tuple[int, ...] = (32, 32, 16)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n_images, 3, side, side, generator=generator) for side in sides]


@pytest.mark.parametrize(("koleo_as", "n_views"), [("paper", 1), ("released", 2)])
def test_koleo_is_of_the_first_global_crop_or_summed_over_both(koleo_as: str, n_views: int) -> None:
    recipe = replace(SMOKE, step=replace(SMOKE.step, koleo_as=koleo_as))
    torch.manual_seed(0)
    state = make_state(recipe, CPU)
    with torch.no_grad():  # no mask, so that the features are those of the plain backbone
        state.student.backbone.mask_token.zero_()
    recipe = replace(recipe, step=replace(recipe.step, masks=replace(recipe.step.masks, crops=0.0)))
    by_view = [koleo_loss(state.student.backbone(view)).item() for view in views()[:2]]
    assert by_view[0] != pytest.approx(by_view[1])
    found = take_step_(state, views(), AT, recipe, np.random.default_rng(0))
    assert found["koleo"] == pytest.approx(0.1 * sum(by_view[:n_views]), rel=1e-4)


@pytest.mark.parametrize(("guided_as", "n_patches"), [("paper", 2 * 4 * 16), ("released", None)])
def test_a_guides_student_is_compared_on_all_patches_or_on_those_the_masks_pick(
    guided_as: str, n_patches: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either way it sees every patch: the mask token takes no gradient."""
    recipe = replace(SMOKE, step=replace(SMOKE.step, guided_as=guided_as))
    state = make_state(recipe, CPU)
    state.guide = teacher_copy(state.student).eval()
    rows = []
    scores = state.guide.scores
    monkeypatch.setattr(
        state.guide, "scores", lambda cls, patches: (rows.append(len(patches)), scores(cls, patches))[1]
    )
    take_step_(state, views(), AT, recipe, np.random.default_rng(0))
    assert state.student.backbone.mask_token.grad is None
    if n_patches is None:
        assert 0 < rows[0] < 40, "4 of 8 crops, 10 to 50 % of 16 patches"
    else:
        assert rows == [n_patches]


@pytest.fixture(scope="module")
def resnet_state() -> State[Learner]:
    torch.manual_seed(0)
    student, teacher = make_learners(ResNet(ResNetSpec()), HeadSpec(prototypes=16, hidden=8, bottleneck=4))
    optimizer = make_optimizer(((p, dino_multipliers(n, p)) for n, p in student.named_parameters()), "sgd")
    return State(student, teacher, {"dino": torch.zeros(16)}, optimizer)


def test_a_resnet_teacher_uses_the_statistics_of_its_batch_and_no_average_of_the_students(
    resnet_state: State[Learner],
) -> None:
    """Batch norm as released: the teacher stays in training mode, keeps running statistics of its own, and only parameters are averaged."""
    state = resnet_state
    assert state.teacher.training
    with torch.no_grad():  # statistics that no batch has, which would change every output if they were used
        state.teacher.backbone.bn1.running_mean.fill_(7.0)
        state.student.backbone.bn1.running_mean.fill_(-7.0)
    batch = views(4, (32, 32))
    with torch.no_grad():
        stem = state.teacher.backbone.conv1(torch.cat(batch))
    train_step_(state, batch, AT, StepSpec())
    wanted = 0.9 * 7.0 + 0.1 * stem.mean(dim=(0, 2, 3))
    torch.testing.assert_close(state.teacher.backbone.bn1.running_mean, wanted, atol=1e-4, rtol=1e-4)
    assert (state.student.backbone.bn1.running_mean < 0).all()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        one = state.teacher.backbone(x)
        state.teacher.backbone.bn1.running_mean.fill_(100.0)
        torch.testing.assert_close(state.teacher.backbone(x), one)


def test_only_parameters_of_a_resnet_are_averaged(resnet_state: State[Learner]) -> None:
    state = resnet_state
    before = {n: p.clone() for n, p in state.teacher.named_parameters()}
    train_step_(state, views(4, (32, 32)), AT, StepSpec())
    student = dict(state.student.named_parameters())
    for name, parameter in state.teacher.named_parameters():
        torch.testing.assert_close(parameter, 0.9 * before[name] + 0.1 * student[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_every_optimiser_drives_a_run(optimizer: str) -> None:
    recipe = RECIPES["smoke"]
    recipe = replace(recipe, optim=replace(recipe.optim, optimizer=optimizer))
    state = make_state(recipe, CPU)
    before = [p.clone() for p in state.student.parameters() if p.requires_grad]
    take_step_(state, views(8), replace(AT, weight_decay=0.1), recipe, np.random.default_rng(0))
    moved = [
        not torch.equal(p, old)
        for p, old in zip((p for p in state.student.parameters() if p.requires_grad), before, strict=True)
    ]
    assert all(moved)
    frozen = replace(AT, freeze_last_layer=True)
    held = state.student.head.last_layer.weight_v.clone()
    take_step_(state, views(8), frozen, recipe, np.random.default_rng(0))
    assert torch.equal(state.student.head.last_layer.weight_v, held)


def test_prototypes_begin_as_torch_makes_a_linear_and_the_mlp_as_the_backbone_does() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(48, HeadSpec(prototypes=512, hidden=256, bottleneck=64))
    like = torch.nn.Linear(64, 512, bias=False).weight
    of_v, of_mlp = head.last_layer.weight_v.detach(), head.mlp[0].weight.detach()
    assert of_v.std().item() == pytest.approx(like.std().item(), rel=0.02)
    assert of_v.abs().max().item() == pytest.approx(64**-0.5, rel=0.01)  # uniform, not normal
    assert of_mlp.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(head.last_layer.weight_g, torch.ones(512, 1))
