"""DINOv2's losses, masks and whole steps against numbers of the original program (tests/reference, sections 7, 8 and 12)."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from backbones.vit import ViT, ViTSpec
from data.errors import InputError
from tests.training.test_reference import FORWARD, GRADIENT, check_weights, part
from training.dinov2 import Dinov2Learner, Dinov2Spec, make_learners, train_step_
from training.distillation import Schedule, State, update_center_
from training.losses import (
    dino_cross_entropy,
    ibot_loss,
    koleo_loss,
    row_cross_entropy,
    sinkhorn_knopp,
    teacher_targets,
)
from training.masking import MaskSpec, batch_masks, block_mask
from training.optimizer import dinov2_multipliers, make_optimizer
from training.projection_head import HeadSpec, ProjectionHead

TEMPERATURE = 0.1


@pytest.fixture(scope="module")
def losses(reference: Path) -> dict[str, torch.Tensor]:
    return load_file(reference / "v2_loss" / "io.safetensors")


class TestTargets:
    @pytest.mark.parametrize("kind", ["dino", "ibot"])
    def test_centring_over_four_steps(self, losses: dict[str, torch.Tensor], kind: str) -> None:
        center_K = torch.zeros(96)
        for i in range(4):
            step = part(losses, f"{kind}_centering/step{i}/")
            torch.testing.assert_close(center_K, step["center_used"].flatten(), **FORWARD)
            found = teacher_targets(step["teacher_logits"], center_K, float(step["teacher_temp"]))
            torch.testing.assert_close(found, step["teacher_probs"], **FORWARD)
            update_center_(center_K, step["teacher_logits"], 0.9)
        torch.testing.assert_close(center_K, losses[f"{kind}_centering/center_final"].flatten(), **FORWARD)

    @pytest.mark.parametrize("iterations", [1, 3])
    @pytest.mark.parametrize("case", [0, 1])
    def test_sinkhorn(self, losses: dict[str, torch.Tensor], case: int, iterations: int) -> None:
        given = part(losses, f"dino_sinkhorn/case{case}/")
        found = sinkhorn_knopp(given["teacher_logits"], float(given["teacher_temp"]), iterations)
        torch.testing.assert_close(found, given[f"iters{iterations}/teacher_probs"], **FORWARD)

    def test_sinkhorn_of_masked_patches(self, losses: dict[str, torch.Tensor]) -> None:
        given = part(losses, "ibot_sinkhorn/")
        found = sinkhorn_knopp(given["teacher_logits"], float(given["teacher_temp"]))
        torch.testing.assert_close(found, given["teacher_probs"], **FORWARD)

    def test_sinkhorn_uses_prototypes_evenly(self) -> None:
        logits_BK = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) * 0.1
        probs_BK = sinkhorn_knopp(logits_BK, 0.04, 50)
        torch.testing.assert_close(probs_BK.sum(dim=0), torch.full((16,), 4.0), atol=1e-3, rtol=0)

    def test_sinkhorn_survives_logits_that_overflow_an_exponential(self) -> None:
        logits_BK = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) * 30
        torch.testing.assert_close(sinkhorn_knopp(logits_BK, 0.04).sum(dim=1), torch.ones(64))


class TestLosses:
    def test_local_crops(self, losses: dict[str, torch.Tensor]) -> None:
        """The sum over crops and teacher views, which is what the mean over all pairs holds beside the global pairs."""
        given = part(losses, "dino_ce_local/")
        student = given["student"].clone().requires_grad_()
        total = sum(
            row_cross_entropy(crop, targets, TEMPERATURE).mean()
            for crop in student.chunk(4)
            for targets in given["teacher_probs"]
        )
        torch.testing.assert_close(total, given["sum"], **FORWARD)
        total.backward()
        torch.testing.assert_close(student.grad, given["grad_student"], **GRADIENT)

    def test_global_crops(self, losses: dict[str, torch.Tensor]) -> None:
        given = part(losses, "dino_ce_global/")
        student = given["student"].clone().requires_grad_()
        loss = row_cross_entropy(student, given["teacher_probs"], TEMPERATURE).mean()
        torch.testing.assert_close(loss, given["sum"], **FORWARD)
        loss.backward()
        torch.testing.assert_close(student.grad, given["grad_student"], **GRADIENT)

    def test_all_pairs_at_once_equal_the_pairs_one_by_one(self) -> None:
        generator = torch.Generator().manual_seed(1)
        student = torch.randn(5, 3, 8, generator=generator)
        targets = torch.randn(2, 3, 8, generator=generator).softmax(dim=-1)
        pairs = [
            row_cross_entropy(student[v], targets[t], TEMPERATURE).mean() for t in range(2) for v in range(5) if v != t
        ]
        torch.testing.assert_close(dino_cross_entropy(student, targets, TEMPERATURE), torch.stack(pairs).mean())

    def test_masked_patches(self, losses: dict[str, torch.Tensor]) -> None:
        """Crops without a mask count in the denominator."""
        given = part(losses, "ibot_masked/")
        student = given["student"].clone().requires_grad_()
        n_crops = len(given["masks"])
        loss = ibot_loss(student, given["teacher_probs"], given["masks_weight"], n_crops, TEMPERATURE)
        torch.testing.assert_close(loss, given["loss"], **FORWARD)
        loss.backward()
        torch.testing.assert_close(student.grad, given["grad_student"], **GRADIENT)
        custom = ibot_loss(student, given["teacher_probs"], given["custom_weight"], n_crops, TEMPERATURE)
        torch.testing.assert_close(custom, given["loss_custom_weight"], **FORWARD)

    @pytest.mark.parametrize("case", ["small", "batch32", "tight", "duplicate_direction"])
    def test_koleo(self, losses: dict[str, torch.Tensor], case: str) -> None:
        given = part(losses, f"koleo/{case}/")
        features = given["x"].clone().requires_grad_()
        loss = koleo_loss(features)
        torch.testing.assert_close(loss, given["loss"], **FORWARD)
        if "grad" in given:
            loss.backward()
            torch.testing.assert_close(features.grad, given["grad"], **GRADIENT)

    def test_koleo_of_one_image_has_no_neighbour(self) -> None:
        with pytest.raises(InputError, match="at least 2 images"):
            koleo_loss(torch.ones(1, 4))


class TestMasks:
    DRAWS = 2000

    def settings(self, reference: Path) -> list[dict]:  # type: ignore[type-arg]
        return json.loads((reference / "masking" / "stats.json").read_text())["mask_generator"]

    def test_counts_and_places_follow_the_published_distribution(self, reference: Path) -> None:
        rng = np.random.default_rng(0)
        for wanted in self.settings(reference):
            masks = self.draw(wanted, rng)
            counts = masks.sum(axis=(1, 2))
            assert counts.max() <= wanted["requested"]
            margin = 5 * wanted["count_std"] * np.sqrt(2 / self.DRAWS)
            assert abs(counts.mean() - wanted["count_mean"]) <= margin + 1e-9, wanted
            exact = (counts == wanted["requested"]).mean()
            share = wanted["fraction_exactly_requested"]
            assert abs(exact - share) <= 5 * np.sqrt(2 * max(share * (1 - share), 1e-9) / self.DRAWS) + 1e-3, wanted

    def draw(self, wanted: dict, rng: np.random.Generator, n: int = DRAWS) -> np.ndarray:  # type: ignore[type-arg]
        """Masks [n, h, w] of one setting; the small grids were drawn with a cap of their own, in words."""
        cap = wanted["max_num_patches"]
        cap = int(cap.split("=")[1]) if isinstance(cap, str) else int(cap)
        return np.stack(
            [block_mask(wanted["height"], wanted["width"], wanted["requested"], rng, cap) for _ in range(n)]
        )

    def test_each_cell_is_as_often_masked_as_published(self, reference: Path) -> None:
        published = load_file(reference / "masking" / "io.safetensors")
        sides = {16: 0, 14: 1, 7: 2}
        rng = np.random.default_rng(1)
        for wanted in self.settings(reference):
            if not wanted["requested"]:
                continue
            name = f"cfg{sides[wanted['height']]}_n{wanted['requested']}/cell_frequency"
            frequency = published[name].numpy()
            found = self.draw(wanted, rng).mean(axis=0)
            spread = np.sqrt(2 * frequency * (1 - frequency) / self.DRAWS)
            assert (np.abs(found - frequency) <= 5 * spread + 1e-3).all(), name

    def test_masks_hang_together_and_are_as_wide_as_high_as_published(self, reference: Path) -> None:
        """Components of neighbouring patches, and the log of height over width of their bounding boxes."""
        rng = np.random.default_rng(4)
        for wanted in self.settings(reference):
            if not wanted["requested"]:
                continue
            draws = wanted["component_draws"]
            counts, aspects = [], []
            for mask in self.draw(wanted, rng, draws):
                n, _, boxes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
                counts.append(n - 1)
                aspects += np.log(boxes[1:, cv2.CC_STAT_HEIGHT] / boxes[1:, cv2.CC_STAT_WIDTH]).tolist()
            margin = 5 * wanted["components_std"] * np.sqrt(2 / draws)
            assert abs(np.mean(counts) - wanted["components_mean"]) <= margin, wanted
            margin = 5 * wanted["log_aspect_std"] * np.sqrt(2 / draws)
            assert abs(np.mean(aspects) - wanted["log_aspect_mean"]) <= margin, wanted

    def test_a_batch_spreads_its_ratios_over_half_of_the_crops(self, reference: Path) -> None:
        wanted = json.loads((reference / "masking" / "stats.json").read_text())["collate"]
        rng = np.random.default_rng(2)
        batches = np.stack([batch_masks(32, 16, 16, MaskSpec(), rng) for _ in range(200)])
        counts = np.sort(batches.sum(axis=2), axis=1)
        assert set((counts > 0).sum(axis=1)) == {16}
        margin = 5 * np.array(wanted["sorted_counts_std"]) * np.sqrt(1 / 200 + 1 / 400)
        assert (np.abs(counts[:, 16:].mean(axis=0) - wanted["sorted_counts_mean"]) <= margin).all()
        at_position = (batches.sum(axis=2) > 0).mean(axis=0)
        assert at_position.min() > 0.3, "no crop is neglected"
        assert at_position.max() < 0.7, "no crop is favoured"

    def test_the_static_variant_masks_equally_many_in_every_batch(self) -> None:
        rng, spec = np.random.default_rng(3), MaskSpec(static_count=True)
        totals = {int(batch_masks(32, 16, 16, spec, rng).sum()) for _ in range(20)}
        assert totals == {1274}, "the published program's upper bound for these sizes"

    def test_shares_that_are_none_are_refused(self) -> None:
        for wrong in ({"crops": 1.5}, {"ratio": (0.5, 0.1)}, {"ratio": (0.1, 1.0)}):
            with pytest.raises(InputError, match="want shares"):
                MaskSpec(**wrong)  # type: ignore[arg-type]


def head_spec(config: dict, kind: str) -> HeadSpec:  # type: ignore[type-arg]
    c = config[kind]
    return HeadSpec(
        prototypes=c["head_n_prototypes"],
        hidden=c["head_hidden_dim"],
        bottleneck=c["head_bottleneck_dim"],
        layers=c["head_nlayers"],
        freeze_magnitude=False,
    )


def unchunked(state: dict[str, torch.Tensor], chunked: bool) -> dict[str, torch.Tensor]:
    """`backbone.blocks.CHUNK.BLOCK.*` to `backbone.blocks.BLOCK.*`."""
    if not chunked:
        return state
    found = {}
    for name, tensor in state.items():
        words = name.split(".")
        if words[1] == "blocks":
            del words[2]
        found[".".join(words)] = tensor
    return found


def learner_of(config: dict, state: dict[str, torch.Tensor]) -> Dinov2Learner:  # type: ignore[type-arg]
    b = config["backbone"]
    backbone = ViT(
        ViTSpec(
            patch_px=b["patch_size"],
            width=b["embed_dim"],
            depth=b["depth"],
            heads=b["num_heads"],
            img_px=b["img_size"],
            registers=b["num_register_tokens"],
            ffn="swiglu" if b["ffn_layer"] == "swiglufused" else "mlp",
            layer_scale=b["init_values"],
            pos_antialias=b["interpolate_antialias"],
            pos_offset=b["interpolate_offset"],
            mask_token=True,
        )
    )
    untied = ProjectionHead(b["embed_dim"], head_spec(config, "ibot")) if config["ibot"]["separate_head"] else None
    learner = Dinov2Learner(backbone, ProjectionHead(b["embed_dim"], head_spec(config, "dino")), untied)
    learner.load_state_dict(unchunked(state, b["block_chunks"] > 0))
    return learner


@pytest.mark.parametrize("variant", ["centering_shared_head", "sinkhorn_separate_head"])
def test_whole_steps(reference: Path, variant: str) -> None:
    """Every loss term, gradient norms, centres, and the weights of student and teacher."""
    folder = reference / "v2_step" / variant
    config = json.loads((folder / "config.json").read_text())
    io, states = load_file(folder / "io.safetensors"), load_file(folder / "states.safetensors")
    chunked = config["backbone"]["block_chunks"] > 0
    student = learner_of(config, part(states, "student_0/"))
    teacher = learner_of(config, part(states, "teacher_0/")).requires_grad_(False)
    o, depth = config["optim"], config["backbone"]["depth"]
    optimizer = make_optimizer(
        (p, dinov2_multipliers(name, depth, o["layerwise_decay"], o["patch_embed_lr_mult"]))
        for name, p in student.named_parameters()
    )
    untied = config["ibot"]["separate_head"]
    ibot_k = config["ibot" if untied else "dino"]["head_n_prototypes"]
    centers = {"dino": torch.zeros(config["dino"]["head_n_prototypes"]), "ibot": torch.zeros(ibot_k)}
    state = State(student, teacher, centers, optimizer)
    spec = Dinov2Spec(
        ibot_weight=config["ibot"]["loss_weight"],
        ibot_head=head_spec(config, "ibot") if untied else None,
        targets="sinkhorn" if config["train"]["centering"] == "sinkhorn_knopp" else "centering",
        clip_norm=o["clip_grad"],
    )
    gradients = unchunked(part(states, "grad_0/"), chunked)
    for i in range(config["steps"]):
        step = part(io, f"step{i}/")
        last_layer_lr = float(step["last_layer_lr"])
        assert last_layer_lr in (0.0, float(step["lr"]))
        at = Schedule(
            lr=float(step["lr"]),
            weight_decay=float(step["wd"]),
            momentum=float(step["momentum"]),
            teacher_temperature=float(step["teacher_temp"]),
            freeze_last_layer=last_layer_lr == 0,
        )
        if "dino_center_buffer" in step:  # stored before that step's own update took effect
            for name in ("dino", "ibot"):
                torch.testing.assert_close(state.centers[name], step[f"{name}_center_buffer"].flatten(), **FORWARD)
        views = [*step["collated_global_crops"].chunk(2), *step["collated_local_crops"].chunk(3)]
        found = train_step_(state, views, step["collated_masks"], at, spec)
        close = {"rel": 2e-4, "abs": 2e-5}
        assert found["loss"] == pytest.approx(float(step["backpropagated_loss"]), **close)
        assert found["dino_local"] == pytest.approx(float(step["logged/dino_local_crops_loss"]), **close)
        assert found["dino_global"] == pytest.approx(float(step["logged/dino_global_crops_loss"]), **close)
        assert found["koleo"] == pytest.approx(2 * float(step["logged/koleo_loss"]), **close)
        assert found["ibot"] == pytest.approx(2 * spec.ibot_weight * float(step["logged/ibot_loss"]), **close)
        for name, wanted in part(step, "grad_norm_before_clip/").items():
            assert found[f"grad_norm_{name}"] == pytest.approx(float(wanted), rel=1e-3)
        for learner, name in ((student, f"student_{i + 1}/"), (teacher, f"teacher_{i + 1}/")):
            if state_wanted := part(states, name):
                check_weights(learner, unchunked(state_wanted, chunked), gradients, at.lr)
    if "checksum_student_final_l2" in io:
        for learner, name in ((student, "student"), (teacher, "teacher")):
            l2 = torch.stack([t.double().norm() for t in learner.state_dict().values()]).norm()
            assert float(l2) == pytest.approx(float(io[f"checksum_{name}_final_l2"]), rel=1e-4)


def test_a_backbone_without_mask_token_is_refused() -> None:
    backbone = ViT(ViTSpec(patch_px=8, width=24, depth=1, heads=3, img_px=32))
    with pytest.raises(InputError, match="mask_token=True"):
        make_learners(backbone, HeadSpec(prototypes=8, hidden=8, bottleneck=4), Dinov2Spec())
