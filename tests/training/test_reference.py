"""The trainer's pieces, and whole steps, against numbers of the original programs (tests/reference, sections 5, 6, 8 and 9)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from backbones.vit import ViT, ViTSpec
from training.dinov1 import train_step_
from training.distillation import Learner, Schedule, State, StepSpec, ema_update_, update_center_
from training.losses import dino_cross_entropy, teacher_targets
from training.optimizer import LARS, clip_each_, dino_multipliers, dinov2_multipliers, make_optimizer
from training.projection_head import HeadSpec, ProjectionHead
from training.schedules import Cosine, LinearWarmup

FORWARD = {"atol": 2e-5, "rtol": 1e-4}
GRADIENT = {"atol": 1e-5, "rtol": 1e-3}
V1_HEADS = ("v1_norm_last_layer_true", "v1_norm_last_layer_false", "v1_bn", "v1_nlayers1")
V2_HEADS = ("v2_default", "v2_nlayers2_nobias")
STEP_VARIANTS = ("norm_last_true", "norm_last_false_clip")


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class TestHead:
    @pytest.mark.parametrize("name", [*V1_HEADS, *V2_HEADS])
    def test_outputs_and_gradients(self, reference: Path, name: str) -> None:
        found = load_file(reference / "head" / f"{name}.safetensors")
        config = json.loads((reference / "head" / "config.json").read_text())
        spec = HeadSpec(
            prototypes=config["out_dim"],
            hidden=config["hidden_dim"],
            bottleneck=config["bottleneck_dim"],
            layers={"v1_nlayers1": 1, "v2_nlayers2_nobias": 2}.get(name, config["nlayers_default"]),
            batch_norm=name == "v1_bn",
            bias=name != "v2_nlayers2_nobias",
            freeze_magnitude="grad/last_layer.weight_g" not in found,
        )
        head = ProjectionHead(found["in"].shape[1], spec)
        head.load_state_dict(part(found, "weights/"))
        features = found["in"].clone().requires_grad_()
        out = head(features)
        torch.testing.assert_close(out, found["out_train_mode" if name == "v1_bn" else "out"], **FORWARD)
        if "upstream" in found:
            (out * found["upstream"]).sum().backward()
            torch.testing.assert_close(features.grad, found["grad_in"], **GRADIENT)
            gradients = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
            assert gradients.keys() == part(found, "grad/").keys()
            for key, wanted in part(found, "grad/").items():
                torch.testing.assert_close(gradients[key], wanted, **GRADIENT)
        if name == "v1_bn":
            for key, wanted in part(found, "after/").items():
                torch.testing.assert_close(head.state_dict()[key], wanted, **FORWARD)
            torch.testing.assert_close(head.eval()(found["in"]), found["out_eval_mode_after"], **FORWARD)


def test_loss_and_centre_over_six_steps(reference: Path) -> None:
    found = load_file(reference / "v1_loss" / "io.safetensors")
    config = json.loads((reference / "v1_loss" / "config.json").read_text())
    temperature = LinearWarmup(
        config["warmup_teacher_temp"], config["teacher_temp"], config["warmup_teacher_temp_epochs"]
    )
    center_K = torch.zeros(config["out_dim"])
    for i in range(6):
        step = part(found, f"step{i}/")
        student = step["student"].clone().requires_grad_()
        teacher_TBK = step["teacher"].view(2, config["batch"], -1)
        torch.testing.assert_close(center_K[None], step["center_before"], **FORWARD)
        targets = teacher_targets(teacher_TBK, center_K, temperature.at(int(step["epoch"])))
        loss = dino_cross_entropy(student.view(config["ncrops"], config["batch"], -1), targets, config["student_temp"])
        loss.backward()
        update_center_(center_K, teacher_TBK, config["center_momentum"])
        torch.testing.assert_close(loss.detach(), step["loss"], **FORWARD)
        torch.testing.assert_close(student.grad, step["grad_student"], **GRADIENT)
        torch.testing.assert_close(center_K[None], step["center_after"], **FORWARD)


def test_schedules(reference: Path) -> None:
    found = load_file(reference / "schedules" / "io.safetensors")
    config = json.loads((reference / "schedules" / "config.json").read_text())
    for name in ("v1_lr", "v1_wd", "v1_momentum", "v1_warm_nonzero_start"):
        c = config[name]
        steps = c["epochs"] * c["niter_per_ep"]
        schedule = Cosine(
            c["base_value"],
            c["final_value"],
            steps,
            c.get("warmup_epochs", 0) * c["niter_per_ep"],
            c.get("start_warmup_value", 0.0),
        )
        np.testing.assert_allclose([schedule.at(i) for i in range(steps)], found[name].numpy(), rtol=1e-12)


def test_schedules_of_dinov2(reference: Path) -> None:
    """Also beyond their end."""
    found = load_file(reference / "schedules" / "io.safetensors")
    config = json.loads((reference / "schedules" / "config.json").read_text())
    for name in ("v2_lr", "v2_wd", "v2_momentum", "v2_freeze"):
        c = config[name]
        schedule = Cosine(
            c["base_value"],
            c["final_value"],
            c["total_iters"],
            c.get("warmup_iters", 0),
            c.get("start_warmup_value", 0.0),
            c.get("freeze_iters", 0),
        )
        np.testing.assert_allclose([schedule.at(i) for i in range(c["queried"])], found[name].numpy(), rtol=1e-12)
    c = config["v2_teacher_temp"]
    warmup = LinearWarmup(c["start_warmup_value"], c["base_value"], c["warmup_iters"])
    np.testing.assert_allclose(
        [warmup.at(i) for i in range(c["queried"])], found["v2_teacher_temp"].numpy(), rtol=1e-12
    )


def test_the_last_layers_rate_is_the_others_with_zeros_first(reference: Path) -> None:
    """What a plan's `freeze_last_layer` makes of the rate."""
    found = load_file(reference / "schedules" / "io.safetensors")
    c = json.loads((reference / "schedules" / "config.json").read_text())["v2_last_layer_lr"]
    wanted = found["v2_lr"].clone()
    wanted[: c["zero_for_first"]] = 0
    assert torch.equal(found["v2_last_layer_lr"], wanted)


def test_teacher_temperature(reference: Path) -> None:
    wanted = load_file(reference / "v1_loss" / "io.safetensors")["teacher_temp_schedule"].numpy()
    schedule = LinearWarmup(0.04, 0.07, 5)
    np.testing.assert_allclose([schedule.at(i) for i in range(len(wanted))], wanted, rtol=1e-12)


@pytest.mark.parametrize("momentum", ["0.9", "0.992", "0.996", "1.0"])
def test_moving_average(reference: Path, momentum: str) -> None:
    found = load_file(reference / "ema" / "io.safetensors")

    def network(prefix: str) -> torch.nn.ParameterDict:
        return torch.nn.ParameterDict({k.replace(".", "_"): v.clone() for k, v in sorted(part(found, prefix).items())})

    teacher = network("teacher_before/")
    ema_update_(teacher, network("student/"), float(momentum))
    for name, wanted in network(f"teacher_after_m{momentum}/").items():
        torch.testing.assert_close(teacher[name], wanted, atol=1e-7, rtol=1e-6)


def test_clipping_of_each_tensor(reference: Path) -> None:
    found = load_file(reference / "optim" / "io.safetensors")
    config = json.loads((reference / "optim" / "config.json").read_text())
    before, after = part(found, "clip/grad_before/"), part(found, "clip/grad_after/")
    parameters = {name: torch.nn.Parameter(torch.zeros_like(g)) for name, g in before.items()}
    for name, parameter in parameters.items():
        parameter.grad = before[name].clone()
    clip_each_(parameters.values(), config["clip"])
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, after[name], atol=1e-7, rtol=1e-5)


def test_two_steps_of_lars(reference: Path) -> None:
    found = load_file(reference / "optim" / "io.safetensors")
    config = json.loads((reference / "optim" / "config.json").read_text())["lars"]
    parameters = {name: torch.nn.Parameter(p.clone()) for name, p in part(found, "lars/param0/").items()}
    optimizer = LARS([{"params": list(parameters.values())}], config["momentum"], config["eta"])
    for group in optimizer.param_groups:
        group.update(lr=config["lr"], weight_decay=config["weight_decay"])
    for step in range(2):
        for name, parameter in parameters.items():
            parameter.grad = found[f"lars/grad{step}/{name}"].clone()
        optimizer.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.data, found[f"lars/param{step + 1}/{name}"], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("frozen", "batch_norm"), [(True, False), (False, True)])
def test_parameter_groups(reference: Path, frozen: bool, batch_norm: bool) -> None:
    groups = json.loads((reference / "param_groups" / "v1_groups.json").read_text())
    wanted = groups[f"norm_last_layer_{frozen}_use_bn_{batch_norm}"]
    head = HeadSpec(prototypes=56, hidden=32, bottleneck=16, batch_norm=batch_norm, freeze_magnitude=frozen)
    learner = Learner(ViT(ViTSpec(patch_px=8, width=24, depth=2, heads=3, img_px=32)), ProjectionHead(24, head))
    names = {id(parameter): name for name, parameter in learner.named_parameters()}
    optimizer = make_optimizer((p, dino_multipliers(name, p)) for name, p in learner.named_parameters())
    by_decay = {1.0: set(), 0.0: set()}  # type: dict[float, set[str]]
    for group in optimizer.param_groups:
        by_decay[group["multipliers"][1]] |= {names[id(p)] for p in group["params"]}
    decayed, spared = by_decay[1.0], by_decay[0.0]
    assert decayed == {name for name, group in wanted.items() if group == "regularized"}
    assert spared == {name for name, group in wanted.items() if group == "not_regularized"}


@pytest.mark.parametrize("part_name", ["backbone_unchunked", "backbone_chunked", "backbone_nodecay", "dino_head"])
def test_rates_of_each_layer(reference: Path, part_name: str) -> None:
    """DINOv2: which share of the learning rate and of the weight decay each parameter takes."""
    group = json.loads((reference / "param_groups" / "v2_groups.json").read_text())[part_name]
    rates = []
    for stored, wanted in group["params"].items():
        words = stored.split(".")
        name = ".".join([*words[:1], *words[2:]]) if group.get("block_chunks") and words[0] == "blocks" else stored
        found = dinov2_multipliers(name, group.get("depth", 0), group["layerwise_decay"], group["patch_embed_lr_mult"])
        rates.append(found)
        assert found.lr == pytest.approx(wanted["lr_multiplier"], rel=1e-12), name
        assert found.weight_decay == wanted["wd_multiplier"], name
        assert found.last_layer == wanted["is_last_layer"], name
    if "n_fused_groups" in group:
        assert len(set(rates)) == group["n_fused_groups"]


def learner_of(config: dict, state: dict[str, torch.Tensor]) -> Learner:  # type: ignore[type-arg]
    b, h = config["backbone"], config["head"]
    backbone = ViT(
        ViTSpec(
            patch_px=b["patch_size"], width=b["embed_dim"], depth=b["depth"], heads=b["num_heads"], img_px=b["img_size"]
        )
    )
    head = HeadSpec(
        prototypes=h["out_dim"],
        hidden=h["hidden_dim"],
        bottleneck=h["bottleneck_dim"],
        layers=h["nlayers"],
        freeze_magnitude=h["norm_last_layer"],
    )
    learner = Learner(backbone, ProjectionHead(b["embed_dim"], head))
    learner.load_state_dict(state)
    return learner


def adamw(learner: Learner) -> torch.optim.AdamW:
    return make_optimizer((p, dino_multipliers(name, p)) for name, p in learner.named_parameters())


@pytest.mark.parametrize("variant", STEP_VARIANTS)
def test_two_whole_steps(reference: Path, variant: str) -> None:
    """Losses, gradient norms, centre, and the weights of student and teacher after each step."""
    folder = reference / "v1_step" / variant
    config = json.loads((folder / "config.json").read_text())
    io, states = load_file(folder / "io.safetensors"), load_file(folder / "states.safetensors")
    student = learner_of(config, part(states, "student_0/"))
    teacher = learner_of(config, part(states, "teacher_0/")).requires_grad_(False)
    state = State(student, teacher, {"dino": torch.zeros(config["head"]["out_dim"])}, adamw(student))
    spec = StepSpec(clip_norm=config["clip_grad"] or 0.0)
    for i in range(config["steps"]):
        step = part(io, f"step{i}/")
        at = Schedule(
            lr=float(io["lr"][i]),
            weight_decay=float(io["wd"][i]),
            momentum=float(io["momentum"][i]),
            teacher_temperature=float(io["teacher_temp"][i]),
            freeze_last_layer=i < config["freeze_last_layer"],
        )
        views = [*step["global_crops"].unbind(), *step["local_crops"].unbind()]
        found = train_step_(state, views, at, spec)
        assert found["loss"] == pytest.approx(float(step["loss"]), rel=1e-4)
        assert found["grad_norm"] == pytest.approx(float(step["grad_norm_before_clip"]), rel=1e-3)
        torch.testing.assert_close(state.centers["dino"][None], step["center_after"], **FORWARD)
        for learner, name in ((state.student, f"student_{i + 1}/"), (state.teacher, f"teacher_{i + 1}/")):
            if wanted := part(states, name):
                check_weights(learner, wanted, part(states, "grad_0/"), at.lr)
    assert part(states, f"student_{config['steps']}/"), "the weights after the last step are what this test is about"


def check_weights(
    learner: Learner, wanted: dict[str, torch.Tensor], gradient: dict[str, torch.Tensor], lr: float
) -> None:
    """Weights agree wherever the first gradient is not rounding noise: there Adam's first step is a coin toss of +-lr."""
    got = learner.state_dict()
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        # Where the gradient was dropped, or is a thousandth of what rounding moves, only the bound of +-lr a step can be asked.
        sure = gradient[name].abs() > 1e-5 if name in gradient else torch.ones_like(value, dtype=torch.bool)
        torch.testing.assert_close(
            got[name][sure], value[sure], atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
        torch.testing.assert_close(got[name], value, atol=4 * lr + 2e-6, rtol=1e-4)
